"""A linear layer of low rank with an identity inside: the same function, in fewer numbers, wherever a pair can be."""

import json

import pytest
import torch
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_svd import decompose, fastest_forms, load_low_rank, save_low_rank, svd_layers, to_dense, to_factored
from lightning_svd.layers.identity import LARGEST, IdentityLinear, chosen
from lightning_svd.layers.layer import factorize, plain_pair
from lightning_svd.layers.matrices import roundoff
from lightning_svd.layers.pairs import merged
from lightning_svd.layers.views import View
from lightning_svd.model import stopwatch


def pair_of(outputs, inputs, rank, bias=True, dtype=torch.float64, seed=0):
    """Two linear layers of this rank with a spectrum that falls."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias)
    layer = factorize(layer, View.of(layer))
    layer.keep(rank)
    return plain_pair(layer).to(dtype)


class Net(nn.Module):
    """A linear layer with a bias and one without, a convolution, and attention, which calls its layers itself."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(10, 12, 3, padding=1)
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x):
        x = self.second(self.first(self.conv(x).mT).relu())
        return self.attention(x, x, x, need_weights=False)[0]


def cut(rank=3, **ranks):
    torch.manual_seed(0)
    net = Net().eval()
    decompose(net)
    for name, layer in svd_layers(net).items():
        layer.keep(ranks.get(name, rank))
    return net


X = torch.randn(2, 10, 5, generator=torch.Generator().manual_seed(3))
LINEAR = {"first", "second"}


def identities(model):
    return {name for name, child in model.named_modules() if isinstance(child, IdentityLinear)}


# ---------------------------------------------------------------------------------------------------------- the layer


@st.composite
def sizes(draw):
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return m, n, draw(st.integers(1, min(m, n)))


@given(sizes(), st.booleans(), st.sampled_from([torch.float64, torch.float32]), st.integers(0, 99))
def test_it_computes_what_the_pair_does_from_fewer_numbers(size, bias, dtype, seed):
    m, n, rank = size
    pair = pair_of(m, n, rank, bias, dtype, seed)
    layer = IdentityLinear.of(pair)
    assert_same(layer.matrix(), merged(pair).weight, (m, n))
    x = torch.randn(3, 2, n, dtype=dtype)
    scale = merged(pair).weight.detach().norm() * x.norm(dim=-1).max()
    assert float((layer(x) - pair(x)).detach().abs().max()) <= roundoff((m, n), dtype) * float(scale)
    assert layer.columns.numel() + layer.mixing.numel() == rank * (m + n - rank)
    assert layer.bias is pair[1].bias
    assert float(layer.mixing.detach().abs().max() if layer.mixing.numel() else 0) <= LARGEST * (1 + 1e-5)


@given(st.integers(1, 20), st.integers(0, 20), st.floats(0, 12), st.integers(0, 99))
def test_no_row_is_mixed_of_others_by_large_numbers(rank, more, digits, seed):
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(rank + more, rank, generator=generator, dtype=torch.float64)
    V, _ = torch.linalg.qr(V * 10.0 ** -torch.linspace(0, digits, rank + more, dtype=torch.float64)[:, None])
    order, mixing = chosen(V)
    assert sorted(order.tolist()) == list(range(rank + more))
    if more:
        assert float(mixing.abs().max()) <= LARGEST
        assert_same(mixing.mT @ V[order[:rank]], V[order[rank:]], (rank + more, rank), factor=1e3)


def test_rows_that_elimination_would_choose_badly_are_exchanged():
    # Wilkinson's matrix, for which partial pivoting lets numbers grow by 2^(n - 1).
    size = 24
    worst = torch.eye(size, dtype=torch.float64) - torch.ones(size, size, dtype=torch.float64).tril(-1)
    worst[:, -1] = 1
    _, mixing = chosen(worst[:, : size // 2])
    assert float(mixing.abs().max()) <= LARGEST


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_as_near_as_the_pair(dtype):
    exact = pair_of(48, 40, 12)
    x = torch.randn(64, 40, dtype=torch.float64)
    expected, layer = exact(x), IdentityLinear.of(exact).to(dtype)
    pair = exact.to(dtype)
    apart = [float((form(x.to(dtype)).double() - expected).detach().norm()) for form in (layer, pair)]
    assert apart[0] <= 3 * apart[1] and apart[0] <= 4 * torch.finfo(dtype).eps * float(expected.detach().norm())


def test_a_layer_of_zeros_and_one_of_lower_rank_than_its_pair():
    pair = pair_of(8, 6, 3)
    with torch.no_grad():
        pair[1].weight[:, 1:] = 0
    x = torch.randn(4, 6, dtype=torch.float64)
    assert_same(IdentityLinear.of(pair)(x), pair(x), (8, 6))
    with torch.no_grad():
        pair[1].weight.zero_()
    assert torch.equal(IdentityLinear.of(pair)(x), pair[1].bias.expand(4, 8))


def test_nan_is_refused_and_what_is_trained_stays_so():
    pair = pair_of(8, 6, 3).requires_grad_(False).eval()
    layer = IdentityLinear.of(pair)
    assert not any(parameter.requires_grad for parameter in layer.parameters()) and not layer.training
    pair[0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        IdentityLinear.of(pair)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
def test_inputs_of_any_shape(shape):
    pair = pair_of(8, 6, 3)
    layer, x = IdentityLinear.of(pair), torch.randn(shape, dtype=torch.float64)
    assert layer(x).shape == pair(x).shape
    if x.numel():
        assert_same(layer(x), pair(x), (8, 6))
    assert "in_features=6, out_features=8, rank=3, bias=True" in repr(layer)


def test_its_gradients_are_those_of_its_matrix():
    layer = IdentityLinear.of(pair_of(5, 7, 3))
    assert torch.autograd.gradcheck(layer, torch.randn(2, 7, dtype=torch.float64, requires_grad=True))
    layer(torch.randn(2, 7, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("ready", [lambda net: net, to_factored])
def test_linear_pairs_become_such_layers_and_others_stay(ready):
    net = ready(cut())
    small = to_factored(net, forms="identity")
    assert identities(small) == LINEAR and not identities(net)
    assert_same(small(X), to_factored(net)(X), (20, 20), factor=1e3)
    assert (
        sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in to_factored(net).parameters()) - 2 * 3 * 3
    )
    dense = to_dense(small)
    assert not identities(dense) and type(dense.first) is nn.Linear
    assert dense.state_dict().keys() == Net().state_dict().keys()
    assert_same(dense(X), to_factored(net)(X), (20, 20), factor=1e3)


def test_there_is_no_rank_at_which_it_is_larger_than_the_dense_layer():
    net = cut(first=11, second=12)  # a pair of either is larger
    assert not {"first", "second"} & {
        name for name, child in to_factored(net).named_children() if len([*child.children()])
    }
    small = to_factored(net, forms="identity")
    assert identities(small) == {"first"} and type(small.second) is nn.Linear
    assert sum(p.numel() for p in small.first.parameters()) == 11 * (20 + 12 - 11) + 20 < 20 * 12 + 20


def test_the_form_of_each_layer_may_be_named():
    small = to_factored(cut(), forms={"first": "identity", "second": "dense"})
    assert identities(small) == {"first"} and type(small.second) is nn.Linear
    small = to_factored(to_factored(cut()), forms={"first": "pair", "second": "dense"})
    assert type(small.first) is nn.Sequential and type(small.second) is nn.Linear


@pytest.mark.parametrize(
    ("forms", "why"),
    [
        ("lu", "`forms` must be one of"),
        ({"first": "lu"}, r"`forms\['first'\]` must be one of"),
        ({"third": "pair"}, "`forms`: there is no low-rank layer `third`; there are conv, first, second"),
        ({"conv": "identity"}, '`forms`: `conv` is Conv1d, "identity" is for Linear'),
    ],
)
def test_forms_that_cannot_be_are_refused_by_name(forms, why):
    with pytest.raises(ValueError, match=why):
        to_factored(cut(), forms=forms)


def test_encoders_of_torch_call_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 1).eval()
    decompose(model, ["linear1", "linear2"])
    for layer in svd_layers(model).values():
        layer.keep(5)
    small, x = to_factored(model, forms="identity"), torch.randn(2, 3, 16)
    assert len(identities(small)) == 2
    with torch.no_grad():
        assert_same(small(x), to_factored(model)(x), (32, 32), factor=1e3)
        assert_same(to_dense(small)(x), to_factored(model)(x), (32, 32), factor=1e3)


def test_it_is_exported_compiled_and_written_as_any_layer(tmp_path):
    pytest.importorskip("onnxruntime")
    from lightning_svd import to_onnx

    small = to_factored(cut(), forms="identity")
    exported = torch.export.export(small, (X,)).module()
    assert_same(exported(X), small(X), (20, 20))
    assert to_onnx(small, tmp_path / "net.onnx", X) < 1e-5
    layer, x = small.first, torch.randn(3, 12)
    assert_same(torch.compile(layer, backend="aot_eager")(x), layer(x), (20, 12))


# ----------------------------------------------------------------------------------------------------------- its file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_brings_it_back_bit_for_bit(dtype, tmp_path):
    small = to_factored(cut(), forms="identity").to(dtype)
    path = save_low_rank(small, tmp_path / "small.safetensors")
    loaded = load_low_rank(Net().to(dtype), path).eval()
    assert identities(loaded) == LINEAR
    assert loaded.state_dict().keys() == small.state_dict().keys()
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(loaded(X.to(dtype)), small(X.to(dtype)))
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["lightning_svd"])
    assert header["version"] == 2
    assert header["layers"]["first"] == {"rank": 3, "conv_mode": None, "form": "identity"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tensors, header: tensors["first.order"].fill_(0), "`first.order` is no order of 12 inputs"),
        (lambda tensors, header: tensors["first.mixing"].fill_(torch.nan), "first.mixing"),
        (lambda tensors, header: header["layers"]["first"].update(rank=4), "`first.columns` is"),
        (lambda tensors, header: header["layers"]["first"].update(rank=12), "cannot have an identity inside"),
        (lambda tensors, header: header["layers"]["first"].update(form="lu"), "its header is damaged"),
        (lambda tensors, header: header.update(version=3), "this lightning-svd reads versions 1 and 2"),
    ],
)
def test_a_damaged_file_leaves_the_model_as_it_is(change, why, tmp_path):
    path = save_low_rank(to_factored(cut(), forms="identity"), tmp_path / "small.safetensors")
    tensors = load_file(path)
    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["lightning_svd"])
    change(tensors, header)
    save_file(tensors, path, {"lightning_svd": json.dumps(header)})
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        load_low_rank(net, path)
    assert type(net.first) is nn.Linear and all(torch.equal(v, before[key]) for key, v in net.state_dict().items())


# ---------------------------------------------------------------------------------------------------- what is fastest


def test_the_fastest_form_of_each_layer_is_measured(monkeypatch):
    def fastest(actions, seconds, rounds=1):
        return {name: {"pair": 3.0, "identity": 2.0, "dense": 2.5}[name] for name in actions}

    monkeypatch.setattr(stopwatch, "fastest", fastest)
    for net in (cut(), to_factored(cut())):
        forms = fastest_forms(net, X)
        assert forms == {"first": "identity", "second": "identity", "conv": "dense"}
        assert identities(to_factored(net, forms=forms)) == LINEAR
    monkeypatch.setattr(
        stopwatch, "fastest", lambda actions, *_: {name: 1 - 0.01 * (name != "pair") for name in actions}
    )
    assert set(fastest_forms(cut(), {"x": X}).values()) == {"pair"}


def test_a_real_clock_chooses_too():
    assert fastest_forms(cut(), X, seconds=0.01).keys() == {"first", "second", "conv"}


def test_what_cannot_be_measured_is_refused_by_name():
    with pytest.raises(ValueError, match="`runtime` must be one of 'eager', 'compiled'"):
        fastest_forms(cut(), X, runtime="onnx")
    with pytest.raises(ValueError, match="`seconds`"):
        fastest_forms(cut(), X, seconds=0)
