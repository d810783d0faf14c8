"""A low-rank file brings a freshly built model to where it was saved, or leaves it as it is."""

import copy
import json
import re
import resource

import pytest
import torch
from helpers import assert_same
from models import SmallNet, data, quiet_trainer, same_state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_svd import SVDTrainingCallback, decompose, load_low_rank, save_low_rank, svd_layers
from lightning_svd.layers.layer import plain_dense, plain_pair
from lightning_svd.layers.pairs import merged
from lightning_svd.model.counting import count_params
from lightning_svd.model.surgery import to_factored


class Net(nn.Module):
    """Linear and convolution, with a bias or without, running statistics, and a layer too thin to factorize."""

    def __init__(self, bias=True, width=8):
        super().__init__()
        self.thin = nn.Conv2d(1, width, 1)
        self.conv = nn.Conv2d(width, 12, 3, 2, 1, bias=bias)
        self.norm = nn.BatchNorm2d(12)
        self.flat = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 32, bias=bias))
        self.head = nn.Linear(32, 16)

    def forward(self, x):
        return self.head(self.flat(self.norm(self.conv(self.thin(x))).relu()).relu())


def factored(model):
    """A copy in plain torch layers."""
    return to_factored(model, count_params(model))


def images(dtype=torch.float32):
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(2), dtype=dtype)


def pruned(model, conv_mode="channel", rank=3):
    """``model`` with every layer factorized and cut, and running statistics that are not the initial ones."""
    decompose(model, conv_mode=conv_mode)
    for layer in svd_layers(model).values():
        layer.keep(max(1, rank - (layer.full_rank < 20)))  # not the same in all
    model.train()(images(next(model.parameters()).dtype))
    return model.eval()


def header(path):
    with safe_open(str(path), framework="pt") as file:
        return json.loads(file.metadata()["lightning_svd"])


def bits(model):
    """Everything a refused call must leave alone: the very tensors, their values, the classes of the modules."""
    return (
        {key: (id(p), p.requires_grad) for key, p in model.named_parameters(remove_duplicate=False)},
        {key: value.clone() for key, value in model.state_dict().items()},
        [type(module) for module in model.modules()],
    )


def unchanged(model, before):
    after = bits(model)
    return after[0] == before[0] and same_state(after[1], before[1]) and after[2] == before[2]


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
@pytest.mark.parametrize("form", [lambda model: model, factored])
def test_what_is_loaded_computes_the_same_bit_for_bit(form, conv_mode, bias, dtype, tmp_path):
    model = form(pruned(Net(bias).to(dtype), conv_mode))
    expected = factored(model)
    path = save_low_rank(model, tmp_path / "model.safetensors")
    loaded = load_low_rank(Net(bias).to(dtype), path).eval()
    assert same_state(loaded.state_dict(), expected.state_dict())
    assert all(a.dtype == b.dtype for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
    assert torch.equal(loaded(images(dtype)), expected(images(dtype)))


def test_what_a_fit_leaves_can_be_saved_loaded_and_saved_again(tmp_path):
    model = SmallNet()
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4)]).fit(model, data())
    first = save_low_rank(model, tmp_path / "first.safetensors")
    loaded = load_low_rank(SmallNet(), first)
    assert torch.equal(loaded(images()), model(images()))
    second = save_low_rank(loaded, tmp_path / "second.safetensors")
    assert header(second) == header(first) and same_state(load_file(second), load_file(first))
    quiet_trainer(max_epochs=1).fit(loaded, data())  # and trained on
    assert not same_state(loaded.state_dict(), model.state_dict())


def test_saving_leaves_a_factorized_model_as_it_is(tmp_path):
    model = pruned(Net())
    before = bits(model)
    save_low_rank(model, tmp_path / "model.safetensors")
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["small.pt", "small.bin", "small.ckpt", "small", "small.safetensors"])
def test_a_file_of_any_name_is_read_for_what_is_in_it(name, tmp_path):
    model = Net()
    decompose(model)
    small = to_factored(model)
    save_low_rank(small, tmp_path / name)
    assert same_state(load_low_rank(Net(), tmp_path / name).state_dict(), small.state_dict())


def test_a_layer_on_its_own_is_saved_and_loaded(tmp_path):
    layer = nn.Linear(32, 16)
    decompose(layer)
    layer.keep(4)
    path = save_low_rank(layer, tmp_path / "layer.safetensors")
    x = torch.randn(3, 32)
    assert torch.equal(load_low_rank(nn.Linear(32, 16), path)(x), plain_pair(layer)(x))


def test_the_header_tells_ranks_without_reading_a_weight(tmp_path):
    model = pruned(Net(), "spatial")
    path = save_low_rank(model, tmp_path / "model.safetensors")
    ranks = {name: (layer.rank, layer.conv_mode) for name, layer in svd_layers(model).items()}
    assert len(set(ranks.values())) > 1
    assert header(path)["version"] == 1
    assert {name: (entry["rank"], entry["conv_mode"]) for name, entry in header(path)["layers"].items()} == ranks


def test_the_file_is_as_large_as_the_low_rank_parameters(tmp_path):
    model = pruned(Net())
    path = save_low_rank(model, tmp_path / "model.safetensors")
    tensors = sum(value.nbytes for value in factored(model).state_dict().values())
    overhead = path.stat().st_size - tensors
    # The header names each tensor with its type, shape and place, about 100 characters.
    assert 0 < overhead < 200 * len(load_file(path))
    assert tensors + overhead < 0.5 * sum(p.nbytes for p in Net().parameters())


def test_frozen_layers_stay_frozen_and_biases_keep_their_identity(tmp_path):
    path = save_low_rank(pruned(Net()), tmp_path / "model.safetensors")
    model = Net()
    model.head.weight.requires_grad_(False)
    bias = model.head.bias
    load_low_rank(model, path)
    assert {name: p.requires_grad for name, p in model.head.named_parameters()} == {
        "0.weight": False,
        "1.weight": False,
        "1.bias": True,
    }
    assert model.head[1].bias is bias


class Shared(nn.Module):
    """One layer under two names, of which the later in the alphabet comes first, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.z = self.a = nn.Linear(24, 24)
        self.embed = nn.Embedding(10, 24)
        self.out = nn.Linear(24, 10, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.z(self.a(self.embed(tokens))))


def test_shared_modules_and_tied_weights_are_stored_once_and_stay_shared(tmp_path):
    model = Shared()
    decompose(model)
    model.z.keep(5)
    expected, tokens = factored(model), torch.arange(10)
    path = save_low_rank(model, tmp_path / "model.safetensors")
    loaded = load_low_rank(Shared(), path)
    assert loaded.z is loaded.a and loaded.out.weight is loaded.embed.weight
    assert torch.equal(loaded(tokens), expected(tokens))
    assert sum(value.numel() for value in load_file(path).values()) == sum(p.numel() for p in expected.parameters())


# ------------------------------------------------------------------------------------------------------------ refusals


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:40])


def random_bytes(path):
    path.write_bytes(bytes(torch.randint(256, (4096,), dtype=torch.uint8)))


def empty(path):
    path.write_bytes(b"")


def rewritten(**changes):
    """The same tensors with another header."""

    def rewrite(path):
        save_file(load_file(path), path, {"lightning_svd": json.dumps(header(path) | changes)})

    return rewrite


def without_header(path):
    save_file(load_file(path), path)


def header_of_another_kind(path):
    save_file(load_file(path), path, {"lightning_svd": "[1, 2]"})


def without_a_tensor(path):
    save_file(
        {key: value for key, value in load_file(path).items() if key != "norm.running_mean"},
        path,
        {"lightning_svd": json.dumps(header(path))},
    )


def with_tensor(name, change):
    """A file with one of its tensors changed."""

    def rewrite(path):
        tensors = load_file(path)
        save_file(tensors | {name: change(tensors[name])}, path, {"lightning_svd": json.dumps(header(path))})

    return rewrite


def nested(path):
    save_file(load_file(path), path, {"lightning_svd": "[" * 200_000 + "]" * 200_000})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nested, "is not a readable safetensors file"),
        (rewritten(layers={"head": {"rank": 1e30, "conv_mode": None}}), "header is damaged"),
        (rewritten(layers={"head": {"rank": 10**30, "conv_mode": None}}), "`head` has rank 10+.* there, at most 16"),
        (rewritten(layers={"head": {"rank": True, "conv_mode": None}}), "header is damaged"),
        (rewritten(version={"a": 1}), "has format version {'a': 1}, this lightning-svd reads versions 1 and 2"),
        (with_tensor("head.0.weight", torch.Tensor.int), "`head.0.weight` holds whole numbers there, floating-point"),
        (with_tensor("norm.num_batches_tracked", torch.Tensor.float), "holds floating-point numbers there, whole"),
        (with_tensor("head.1.weight", lambda t: t * torch.nan), "`head.1.weight` holds NaN or infinity"),
        (with_tensor("norm.weight", lambda t: t / 0), "`norm.weight` holds NaN or infinity"),
        (
            with_tensor("head.1.weight", lambda t: t[:, 1:].clone()),
            r"`head.1.weight` is \(16, \d\) there, \(16, \d\) here",
        ),
        (truncated, "is not a readable safetensors file"),
        (cut_in_the_header, "is not a readable safetensors file"),
        (random_bytes, "is not a readable safetensors file"),
        (empty, "is not a readable safetensors file"),
        (without_header, "was not written by `save_low_rank`"),
        (header_of_another_kind, "header is damaged"),
        (rewritten(layers={"head": {"rank": "3"}}), "header is damaged"),
        (rewritten(layers={"head": {"rank": 3}}), "header is damaged"),
        (rewritten(version=3), "format version 3, this lightning-svd reads versions 1 and 2: update it"),
        (rewritten(layers={"tail": {"rank": 3, "conv_mode": None}}), "low-rank layer `tail`, which Net does not have"),
        (
            rewritten(layers={"norm": {"rank": 3, "conv_mode": None}}),
            "`norm` must be a plain (linear layer|convolution)",
        ),
        (rewritten(layers={}), "does not fit the model: `conv.0.weight` is .* None here"),
        (without_a_tensor, "does not fit the model: `norm.running_mean` is None there"),
    ],
)
def test_refuses_a_damaged_or_foreign_file_and_leaves_the_model_as_it_was(damage, message, tmp_path):
    path = save_low_rank(pruned(Net()), tmp_path / "model.safetensors")
    damage(path)
    model = Net()
    before = bits(model)
    with pytest.raises(ValueError, match=message) as refused:
        load_low_rank(model, path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert unchanged(model, before)


class WithoutHead(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Identity()


class WithMore(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(3, 3)


class OtherType(Net):
    def __init__(self):
        super().__init__()
        self.flat[1] = nn.Bilinear(2, 2, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Net(width=7), r"`conv.0.weight` is \(\d+, 8, 3, 3\) there, \(\d+, 7, 3, 3\) here"),
        (lambda: Net(bias=False), r"`conv.1.bias` is \(12,\) there, None here"),
        (WithoutHead, "`head` must be a plain (linear layer|convolution) to load .*, got Identity"),
        (WithMore, r"`more.weight` is None there, \(3, 3\) here"),
        (OtherType, "`flat.1` must be a plain (linear layer|convolution) to load .*, got Bilinear"),
        (lambda: pruned(Net()), "must be a plain (linear layer|convolution) to load .*, got SVDConv"),
        (lambda: factored(pruned(Net())), "must be a plain (linear layer|convolution) to load .*, got Sequential"),
    ],
)
def test_refuses_a_model_that_does_not_fit_and_leaves_it_as_it_was(model, message, tmp_path):
    path = save_low_rank(pruned(Net()), tmp_path / "model.safetensors")
    model = model()
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        load_low_rank(model, path)
    assert unchanged(model, before)


# ------------------------------------------------------------------------------------------------ where it comes to lie


@pytest.mark.parametrize("here", [torch.float64, torch.bfloat16])
def test_a_file_is_loaded_in_the_models_own_dtype(here, tmp_path):
    model = pruned(Net())
    path = save_low_rank(model, tmp_path / "model.safetensors")
    loaded = load_low_rank(Net().to(here), path)
    assert all(p.dtype == here for p in loaded.parameters())
    assert same_state(loaded.state_dict(), factored(model).to(here).state_dict())


class Attentive(nn.Module):
    """A module in one piece that is taken apart, under two names."""

    def __init__(self):
        super().__init__()
        self.attention = self.again = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_module_in_one_piece_is_checked_before_it_is_taken_apart(tmp_path):
    model, x = Attentive(), torch.randn(2, 5, 16)
    decompose(model)
    for name, layer in svd_layers(model).items():
        layer.keep(3 if "q_proj" in name or "out_proj" in name else 16)  # the others are dense again
    expected = factored(model)
    path = save_low_rank(model, tmp_path / "model.safetensors")
    assert torch.equal(load_low_rank(Attentive(), path)(x), expected(x))
    assert same_state(load_low_rank(Attentive(), path).state_dict(), expected.state_dict())
    for name in ("attention.k_proj.weight", "attention.q_proj.0.weight", "attention.out_proj.1.bias"):
        tensors = {key: value for key, value in load_file(path).items() if not name.endswith(key.partition(".")[2])}
        save_file(tensors, tmp_path / "less.safetensors", {"lightning_svd": json.dumps(header(path))})
        fresh = Attentive()
        before = bits(fresh)
        with pytest.raises(ValueError, match=r"does not fit the model: `.*` is None there, \("):
            load_low_rank(fresh, tmp_path / "less.safetensors")
        assert unchanged(fresh, before)


@pytest.mark.parametrize("there_was_one", [False, True])
def test_a_disk_that_is_full_leaves_the_file_that_was_there(there_was_one, tmp_path):
    path, small, large = tmp_path / "model.safetensors", pruned(Net()), pruned(Net(width=256))
    if there_was_one:
        save_low_rank(small, path)
    before = path.read_bytes() if there_was_one else None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors cannot be written \(.*\)") as refused:
            save_low_rank(large, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ("the file that was there is as it was" in str(refused.value)) == there_was_one
    assert "\n" not in str(refused.value)
    assert [*tmp_path.iterdir()] == ([path] if there_was_one else [])
    assert before is None or path.read_bytes() == before


class WithExtraState(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        pass


def with_buffer(buffer):
    net = nn.Sequential(nn.Linear(4, 4))
    net.register_buffer("beside", buffer)
    return net


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (with_buffer(torch.eye(3).to_sparse()), "`beside` is a sparse_coo tensor"),
        (with_buffer(torch.zeros(3, dtype=torch.complex128)), "`beside` is a complex128 tensor"),
        (nn.Sequential(WithExtraState(4, 4)), "`0._extra_state` is a dict, from `get_extra_state`,"),
    ],
    ids=["sparse", "dtype", "extra state"],
)
def test_what_the_format_cannot_hold_is_named(model, what, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"cannot be saved as safetensors: {what} which they cannot hold")):
        save_low_rank(model, tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


def test_nothing_is_loaded_into_a_model_without_values(tmp_path):
    path = save_low_rank(pruned(Net()), tmp_path / "small.safetensors")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"`thin\.weight` is on the meta device"):
        load_low_rank(model, path)
    assert type(model.conv) is nn.Conv2d


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/model\.safetensors cannot be written"):
        save_low_rank(pruned(Net()), tmp_path / "nowhere" / "model.safetensors")


# --------------------------------------------------------------------------------------------------------------- pairs


GEOMETRIES = [
    {"padding": padding, "stride": stride, "dilation": dilation, "padding_mode": padding_mode}
    for padding in (0, (2, 1), "same", "valid")
    for stride in (1, (2, 3))
    for dilation in (1, (1, 2))
    for padding_mode in ("zeros", "reflect", "replicate", "circular")
    if padding != "same" or stride == 1
]


@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_of_convolutions_merges_into_the_layer_it_came_from(bias, conv_mode):
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64)
    for geometry in GEOMETRIES:
        dense = nn.Conv2d(5, 6, (3, 5), bias=bias, dtype=torch.float64, **geometry)
        layer = copy.deepcopy(dense)
        decompose(layer, conv_mode=conv_mode)
        layer.keep(4)
        pair, whole = plain_pair(layer), merged(plain_pair(layer))
        assert repr(whole) == repr(dense)
        assert_same(whole.weight, plain_dense(layer).weight, layer.matrix_shape)
        assert whole.bias is (pair[1].bias if bias else None) is layer.bias
        # Two sums one after the other, each of at most the matrix's larger side.
        assert_same(pair(x), whole(x), layer.matrix_shape)


@pytest.mark.parametrize("bias", [True, False])
def test_a_pair_of_linears_merges_into_the_layer_it_came_from(bias):
    layer = dense = nn.Linear(12, 20, bias=bias, dtype=torch.float64)
    layer = copy.deepcopy(dense)
    decompose(layer)
    layer.keep(4)
    whole = merged(plain_pair(layer))
    assert repr(whole) == repr(dense)
    assert_same(whole.weight, plain_dense(layer).weight, layer.matrix_shape)
    assert_same(whole(torch.eye(12, dtype=torch.float64)), layer(torch.eye(12, dtype=torch.float64)), (12, 20))
