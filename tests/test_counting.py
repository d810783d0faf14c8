"""Costs are those of the dense model, whatever the layers train meanwhile; torch's own counter is the reference."""

import pytest
import torch
import torch.nn.functional as F
from helpers import counted_macs
from test_calls import Forces, factorized, recorded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.calls import Call
from lightning_svd.model.counting import as_arguments, count_calls, count_costs, count_params
from lightning_svd.model.plan import plan
from lightning_svd.model.replay import cut
from lightning_svd.model.surgery import decompose, make_factored

torch.set_num_threads(1)


class Cast(nn.Module):
    """As T5's `wo`: a weight's dtype is read in forward."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 6)

    def forward(self, x):
        hidden = torch.relu(self.up(x.to(self.up.weight.dtype)))
        return self.down(hidden.to(self.down.weight.dtype))


class Tied(nn.Module):
    """A product with the transpose of a layer's weight."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(12, 20), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.fc(x) @ self.fc.weight)


class Attention(nn.Module):
    def __init__(self, weights=False):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Linear(16, 16)
        self.weights = weights

    def forward(self, x):
        return self.mlp(self.attention(x, x, x, need_weights=self.weights)[0])


def mlp():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.Conv2d(6, 6, 3, groups=3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(6 * 81, 5),
    )


NETS = {
    "mlp": (mlp, (7, 12)),
    "conv": (conv, (2, 3, 8, 8)),
    "attention": (Attention, (3, 5, 16)),
    "attention with weights": (lambda: Attention(True), (3, 5, 16)),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), (3, 5, 16)),
    "cast": (Cast, (7, 12)),
    "product with a weight": (Tied, (7, 12)),
    "gru": (lambda: nn.GRU(12, 16, num_layers=2, bidirectional=True), (5, 3, 12)),
    "cell": (lambda: nn.LSTMCell(12, 16), (3, 12)),
}


def torchs_count(module, *args, **kwargs):
    """What torch counts, where every kernel is one that it knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            module.eval()(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("how", ["plain", "dense", "svd", "cut", "pair", "shown"])
@pytest.mark.parametrize("net", NETS)
def test_dense_macs_are_those_that_torch_counts(net, how):
    torch.manual_seed(0)
    build, shape = NETS[net]
    module, x = build(), torch.randn(shape)
    expected, params = torchs_count(module, x), sum(p.numel() for p in module.parameters())
    module.train()
    if how == "shown":
        decompose(module)
    elif how != "plain":
        factorized(module, "dense" if how == "dense" else "svd")
    layers = svd_layers(module)
    for layer in layers.values():
        if how in ("cut", "pair"):
            layer.keep(1)
        if how == "pair":
            layer.to_pair()
    before = {name: layer.rebuilt().detach().clone() for name, layer in layers.items()}
    parameters = dict(module.named_parameters())
    cost = count_costs(module, x)
    assert cost.dense("macs") == expected
    assert cost.dense("params") == params == count_params(module).dense("params")
    assert cost.batch_size == shape[0]
    if how != "plain":
        assert cost.layers.keys() == layers.keys() and all(each.dense_macs for each in cost.layers.values())
        assert len({cost.other_macs for cost in [cost, count_costs(module, x)]}) == 1
    # Nothing was changed by it.
    after = dict(module.named_parameters())
    assert [*after] == [*parameters] and all(after[name] is parameters[name] for name in after)
    assert all(torch.equal(layer.rebuilt(), before[name]) for name, layer in layers.items())
    assert module.training


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("proj_size", [0, 5])
def test_an_lstm_whose_kernel_torch_does_not_count(proj_size):
    net, x = nn.LSTM(12, 16, num_layers=2, proj_size=proj_size, batch_first=True), torch.randn(3, 5, 12)
    by_hand = 15 * sum(p.numel() for name, p in net.named_parameters() if "weight" in name)
    assert count_costs(net, x).dense("macs") == by_hand
    factorized(net)
    cost = count_costs(net, x)
    assert cost.dense("macs") == by_hand
    assert cost.other_macs == 0
    assert set(cost.layers["ih_l1"].input_shapes) == {(15, proj_size or 16)}


def test_a_recurrent_net_of_pairs_costs_what_its_pairs_do():
    net, x = nn.GRU(32, 32), torch.randn(5, 3, 32)
    factorized(net)
    cost = count_costs(net, x)
    for layer in svd_layers(net).values():
        layer.keep(2)
    assert cost.at(dict.fromkeys(cost.layers, 2), "macs") == 15 * 2 * 2 * (96 + 32)
    make_factored(net, cost)
    assert count_costs(net, x).dense("macs") == 15 * 2 * 2 * (96 + 32)


@pytest.mark.parametrize("net", ["mlp", "conv", "attention", "product with a weight"])
def test_a_rank_costs_what_its_two_layers_do(net):
    build, shape = NETS[net]
    module, x = build(), torch.randn(shape)
    layers = factorized(module)
    cost = count_costs(module, x)
    for layer in layers.values():
        layer.keep(1)
    ranks = dict.fromkeys(layers, 1)
    if net == "product with a weight":
        other = 7 * 20 * 12
        assert cost.other_macs == other
        assert cost.layers["fc"].dense_macs == other
        return
    if all(cost.layers[name].pays(1) for name in layers):
        make_factored(module, cost)
        assert torchs_count(module, x) == cost.at(ranks, "macs")


def test_attentions_products_on_this_device():
    net, x = Attention(), torch.randn(3, 5, 16)
    assert count_costs(net, x).dense("macs") == 3 * (5 * 16 * 16 * 5 + 2 * 4 * 5 * 5 * 4)


def test_what_is_a_model_called_with():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, *, x, scale=1.0):
            return self.fc(x) * scale

    class OfBatches(Named):
        def forward(self, batch):
            return self.fc(batch["x"])

    x = torch.randn(3, 4)
    for net in (Named(), OfBatches()):
        cost = count_costs(net, {"x": x})
        assert cost.dense("macs") == 3 * 16 and cost.batch_size == 3
    factorized(net := Named())
    assert count_costs(net, {"x": x}).layers["fc"].dense_macs == 3 * 16
    net = nn.Bilinear(4, 4, 2)
    assert count_costs(net, (x, x)).dense("macs") == 3 * 4 * 4 * 2
    assert as_arguments(x) == (x,) and as_arguments((x, x)) == (x, x)


class Experts(nn.Module):
    """As those of Mixtral: three matrices in one parameter, each for some of ten rows."""

    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(3, 16, 8))

    def forward(self, x):
        return F.grouped_mm(x, self.matrices, offs=torch.tensor([3, 6, 10], dtype=torch.int32))


def of(function):
    """A module that computes this."""
    module = nn.Module()
    module.forward = function
    return module


# Products that torch's counter has no formula for, and how many multiply-accumulates they take.
PRODUCTS = {
    "a matrix and a vector": (lambda x: x @ torch.ones(6), (5, 6), 5 * 6),
    "added": (lambda x: torch.addmv(torch.ones(5), x, torch.ones(6)), (5, 6), 5 * 6),
    "two vectors": (lambda x: torch.dot(x, x), (6,), 6),
    "conjugated": (lambda x: torch.vdot(x, x), (6,), 6),
    "summed over a batch": (lambda x: torch.addbmm(torch.ones(5, 7), x, torch.ones(3, 6, 7)), (3, 5, 6), 3 * 5 * 6 * 7),
    "bilinear": (nn.Bilinear(4, 3, 5), ((2, 4), (2, 3)), 2 * 5 * 4 * 3),
    "distances": (lambda x: torch.cdist(x, torch.ones(40, 5)), (30, 5), 30 * 40 * 5),
    "time first": (lambda x: torch.conv_tbc(x, torch.ones(3, 3, 4), torch.ones(4), 1), (9, 2, 3), 9 * 2 * 3 * 3 * 4),
    "an LSTM's kernel": (nn.LSTM(6, 5), (7, 2, 6), 7 * 2 * 20 * 11),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_that_torchs_counter_does_not_know(kind):
    compute, shapes, macs = PRODUCTS[kind]
    inputs = tuple(torch.randn(shape) for shape in (shapes if isinstance(shapes[0], tuple) else (shapes,)))
    assert count_costs(compute if isinstance(compute, nn.Module) else of(compute), inputs).dense("macs") == macs


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="from torch 2.10 on")
def test_experts_in_one_piece_count():
    assert count_costs(Experts(), torch.randn(10, 16)).dense("macs") == 10 * 16 * 8
    batched = of(lambda x: F.grouped_mm(x, torch.ones(3, 16, 8)))
    assert count_costs(batched, torch.randn(3, 4, 16)).dense("macs") == 3 * 4 * 16 * 8


def test_an_operator_of_the_users_counts_by_the_formula_that_is_registered():
    @torch.library.custom_op("svd_test::product", mutates_args=())
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    @torch.utils.flop_counter.register_flop_formula(torch.ops.svd_test.product)
    def flops(x, weight, *_, out_shape=None, **__):
        return 2 * x[0] * x[1] * weight[1]

    try:
        assert count_costs(of(lambda x: product(x, torch.ones(6, 4))), torch.randn(3, 6)).dense("macs") == 3 * 6 * 4
    finally:
        torch.utils.flop_counter.flop_registry.pop(torch.ops.svd_test.product)


def test_a_derivative_inside_forward():
    net, x = Forces(), torch.randn(3, 6, requires_grad=True)
    forward = 3 * (6 * 16 + 16 * 3)
    backward = forward
    layers = factorized(net)
    for layer in layers.values():
        layer.keep(1)
    cost = count_costs(net, x)
    assert cost.layers["first"].dense_macs == 3 * 6 * 16 and cost.layers["second"].dense_macs == 3 * 48
    assert cost.dense("macs") == forward + backward
    assert all(p.grad is None for p in net.parameters())


def test_a_derivative_in_the_step():
    net, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(3, 6, requires_grad=True)

    def step():
        gradient = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]
        gradient.square().mean().backward()

    recorder = recorded(net, step)
    cost = count_calls(net, recorder.layers, recorder.calls)
    assert cost.dense("macs") == 3 * (6 * 16 + 64) and cost.other_macs == 0 and cost.batch_size == 3


def test_the_step_itself_is_not_counted():
    # `x.to(self.fc.weight.dtype)`, and a penalty on a weight, in the step.
    net, x = mlp(), torch.randn(7, 12)
    expected = counted_macs(net, x)

    def step():
        (net(x.to(net[2].weight.dtype)).sum() + (net[2].weight @ net[2].weight).sum()).backward()

    recorder = recorded(net, step)
    assert count_calls(net, recorder.layers, recorder.calls, 7).dense("macs") == expected


def test_several_calls_of_several_networks():
    gan = nn.ModuleDict({"generator": nn.Linear(4, 8), "critic": nn.Linear(8, 2)})
    z = torch.randn(5, 4)

    def step():
        fake = gan["generator"](z)
        gan["critic"](fake), gan["critic"](fake.detach())

    recorder = recorded(gan, step)
    cost = count_calls(gan, recorder.layers, recorder.calls)
    assert cost.layers["generator"].dense_macs == 5 * 32
    assert cost.layers["critic"].input_shapes == ((5, 8), (5, 8))
    assert cost.dense("macs") == 5 * (32 + 2 * 16)
    fewer, inputs = cut(gan, recorder.calls, 1)
    assert count_calls(gan, recorder.layers, fewer, inputs).dense("macs") * 5 == cost.dense("macs")


def test_repeated_calls_count_as_often_as_they_were():
    cell, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(2, 6)
    recorder = recorded(cell, lambda: [cell(x) for _ in range(100)])
    cost = count_calls(cell, recorder.layers, recorder.calls)
    assert cost.dense("macs") == 100 * 2 * 36 and len(cost.layers["0"].input_shapes) == 100


def test_an_attempt_that_fails_does_not_count():
    class Twice(Forces):
        def forward(self, x):
            F.linear(x, torch.ones(5, 6))
            return super().forward(x)

    net, x = Twice(), torch.randn(3, 6, requires_grad=True)
    factorized(net)
    assert count_calls(net, svd_layers(net), [Call(net, (x,))]).other_macs == 3 * (5 * 6 + 16 * 3 + 16 * 6)


def test_frozen_layers_and_layers_left_out():
    net, x = mlp(), torch.randn(7, 12)
    net[0].requires_grad_(False)
    decompose(net, layer_plans=plan(net, exclude_modules=["2"]))
    cost = count_costs(net, x)
    assert "2" not in cost.layers and cost.dense("macs") == 7 * (12 * 32 + 32 * 32 + 32 * 4)
    assert cost.layers.keys() == {"4"} and isinstance(net[4], SVDLayer)  # a frozen layer is left alone
    assert cost.other_params == (12 * 32 + 32) + (32 * 32 + 32) + 4


def test_on_the_meta_device():
    with torch.device("meta"):
        net = mlp()
    assert count_costs(net, torch.zeros(7, 12, device="meta")).dense("macs") == 7 * (12 * 32 + 32 * 32 + 32 * 4)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50}
    if kind == "bert":
        config = transformers.BertConfig(
            **sizes, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        net = transformers.BertForSequenceClassification(config)
        inputs = {"input_ids": torch.randint(0, 50, (2, 7))}
    else:
        config = transformers.T5Config(
            **sizes, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
        net = transformers.T5ForConditionalGeneration(config)
        inputs = {"input_ids": torch.randint(0, 50, (2, 7)), "labels": torch.randint(0, 50, (2, 5))}
    net.train()
    recorder = recorded(net, lambda: net(**inputs).logits)
    assert len(recorder.calls) == 1 and recorder.calls[0].args == ()
    cost = count_calls(net, recorder.layers, recorder.calls)
    assert cost.batch_size == 2
    assert all(
        each.dense_macs for name, each in cost.layers.items() if not isinstance(recorder.layers[name], nn.Embedding)
    )
    decomposed = cost.dense("macs")
    assert decomposed == count_costs(net, inputs).dense("macs")
    assert decomposed == torchs_count(type(net)(config), **inputs)


@pytest.mark.parametrize("example", [None, torch.randn(1, 3)])
def test_an_example_that_the_model_fails_on_is_named(example):
    with pytest.raises(ValueError, match=r"`example_input`: the model fails on it: (TypeError|RuntimeError): "):
        count_costs(nn.Sequential(nn.Linear(20, 4)), example)
