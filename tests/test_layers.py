"""A factorised layer is its dense layer: values, gradients, costs, layout, files, and what its mask means."""

import copy
import io

import pytest
import torch
from helpers import assert_same, counted_macs
from torch import nn

from lightning_svd.layers import SVDConv2d, SVDLinear, fold_conv_weight, unfold_conv_weight

# torch's own: a kernel of even length with padding "same" has it copy the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

MODES = ["channel", "spatial"]
GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 2, "stride": 2, "bias": False},
    {"kernel_size": (3, 2), "padding": (0, 1), "stride": (2, 1), "dilation": (1, 2)},
    {"kernel_size": (4, 1), "padding": (2, 0), "stride": (3, 2)},
    {"kernel_size": (1, 5), "padding": "valid", "stride": (1, 2)},
    {"kernel_size": (2, 4), "padding": "same", "bias": False},
    {"kernel_size": 3, "padding": "same", "dilation": (2, 1)},
]
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]
IMAGE = (2, 5, 9, 8)
DENSE = {
    "linear": lambda: nn.Linear(6, 5),
    "channel": lambda: nn.Conv2d(5, 4, 3, padding=1),
    "spatial": lambda: nn.Conv2d(5, 4, (3, 2), stride=(1, 2)),
}
MASKS = {
    "all": lambda r: torch.ones(r, dtype=torch.bool),
    "scattered": lambda r: torch.arange(r) % 3 != 1,
    "one": lambda r: torch.arange(r) == 2,
    "none": lambda r: torch.zeros(r, dtype=torch.bool),
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def factorise(kind, dtype=torch.float64):
    dense = DENSE[kind]().to(dtype)
    layer = SVDLinear(dense) if kind == "linear" else SVDConv2d(dense, kind)
    x = torch.randn(3, 6, dtype=dtype) if kind == "linear" else torch.randn(IMAGE, dtype=dtype)
    return dense, layer, x


def prune(layer, mask):
    layer.keep(MASKS[mask](layer.full_rank))
    return layer


# ------------------------------------------------------------------------------------------- the same as the dense one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_is_the_dense_conv(geometry, padding_mode, conv_mode, dtype):
    conv = nn.Conv2d(5, 7, **geometry, padding_mode=padding_mode, dtype=dtype)
    layer = SVDConv2d(conv, conv_mode)
    batch = torch.randn(IMAGE, dtype=dtype)
    for x in (batch, batch[0]):
        for compute in (layer, layer.forward_rebuilt, layer.forward_factored, layer.dense(), layer.factored()):
            assert_same(compute(x), conv(x), layer.matrix_shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 4)])
@pytest.mark.parametrize("sizes", [(6, 5), (5, 6), (1, 4)])
def test_linear_is_the_dense_linear(sizes, leading, bias, dtype):
    linear = nn.Linear(*sizes, bias=bias, dtype=dtype)
    layer = SVDLinear(linear)
    x = torch.randn(*leading, sizes[0], dtype=dtype)
    for compute in (layer, layer.forward_rebuilt, layer.forward_factored, layer.dense(), layer.factored()):
        assert_same(compute(x), linear(x), layer.matrix_shape)


@pytest.mark.parametrize("kind", DENSE)
def test_called_by_keyword_as_the_dense_layer_is(kind):
    dense, layer, x = factorise(kind)
    assert_same(layer(input=x), dense(input=x), layer.matrix_shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DENSE)
def test_half_precision_is_as_good_as_its_roundoff(kind, dtype):
    dense, layer, x = factorise(kind, dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    for compute in (layer.forward_rebuilt, layer.forward_factored, layer.dense(), layer.factored()):
        # Each of U, s, V, their product and the result is rounded once: a factor of 2 instead of 32, which at 8 bits
        # would allow anything.
        assert_same(compute(x), dense(x), layer.matrix_shape, factor=2)


@pytest.mark.parametrize("kind", DENSE)
def test_weight_is_the_dense_weight_and_differentiable(kind):
    dense, layer, _ = factorise(kind)
    assert_same(layer.weight, dense.weight, layer.matrix_shape)
    layer.weight.square().sum().backward()
    # |W|_F^2 = sum s^2 while U and V are orthonormal.
    assert_same(layer.s.grad, 2 * layer.s.detach(), layer.matrix_shape)
    assert layer.U.grad.any() and layer.V.grad.any()


@pytest.mark.parametrize("kind", DENSE)
def test_energies_add_up_to_the_squared_norm(kind):
    dense, layer, _ = factorise(kind)
    assert_same(layer.energies().sum(), dense.weight.detach().square().sum(), layer.matrix_shape)


@pytest.mark.parametrize("conv_mode", MODES)
def test_unfolding_a_conv_weight_is_undone_by_folding(conv_mode):
    weight = torch.randn(7, 5, 3, 2)
    assert torch.equal(fold_conv_weight(unfold_conv_weight(weight, conv_mode), weight.shape, conv_mode), weight)


def test_what_cannot_be_factorised_is_refused():
    with pytest.raises(ValueError, match=r"`conv_mode` must be one of channel, spatial, got 'depth'"):
        SVDConv2d(nn.Conv2d(4, 4, 3), "depth")
    with pytest.raises(ValueError, match=r"`stem`: expected a convolution without groups, got groups=2"):
        SVDConv2d(nn.Conv2d(4, 4, 3, groups=2), name="stem")


# ------------------------------------------------------------------------------------------------- two ways to compute


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", DENSE)
def test_both_ways_agree_in_value_and_gradient(kind, mask):
    _, layer, x = factorise(kind)
    prune(layer, mask)
    x.requires_grad_()
    wanted = dict(layer.named_parameters()) | {"x": x}
    rebuilt, factored = layer.forward_rebuilt(x), layer.forward_factored(x)
    assert_same(factored, rebuilt, layer.matrix_shape)
    upstream = torch.randn_like(rebuilt)
    expected = torch.autograd.grad(rebuilt, list(wanted.values()), upstream)
    actual = torch.autograd.grad(factored, list(wanted.values()), upstream)
    # A gradient sums over every position of the output too.
    terms = (*layer.matrix_shape, upstream.numel())
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, terms)


@pytest.mark.parametrize(
    ("rank", "positions", "rebuild"),
    # Outputs 4, inputs 6: 24 r to rebuild and 24 N to apply, against 10 r N.
    [(4, 5, False), (4, 6, True), (3, 11, False), (3, 12, True), (2, 1, False), (2, 10_000, False), (0, 1, True)],
)
def test_the_cheaper_way_is_taken(rank, positions, rebuild, monkeypatch):
    layer = SVDLinear(nn.Linear(6, 4))
    layer.keep(torch.arange(4) < rank)
    monkeypatch.setattr(layer, "forward_rebuilt", lambda x: "rebuilt")
    monkeypatch.setattr(layer, "forward_factored", lambda x: "factored")
    assert layer.rebuilding_is_cheaper((positions, 6)) == rebuild
    assert layer(torch.empty(positions, 6)) == ("rebuilt" if rebuild else "factored")


@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [IMAGE, IMAGE[1:]])
def test_conv_macs_are_what_torch_counts(shape, geometry, conv_mode):
    layer = prune(SVDConv2d(nn.Conv2d(5, 7, **geometry), conv_mode), "scattered")
    x = torch.randn(shape)
    assert layer.dense_macs(x.shape) == counted_macs(layer.dense(), x)
    assert layer.rank * layer.macs_per_rank(x.shape) == counted_macs(layer.factored(), x)


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_linear_macs_are_what_torch_counts(shape):
    layer = prune(SVDLinear(nn.Linear(6, 5)), "scattered")
    x = torch.randn(shape)
    assert layer.dense_macs(x.shape) == counted_macs(layer.dense(), x)
    assert layer.rank * layer.macs_per_rank(x.shape) == counted_macs(layer.factored(), x)


@pytest.mark.parametrize("kind", DENSE)
def test_params_are_those_of_the_plain_layers(kind):
    dense, layer, _ = factorise(kind)
    prune(layer, "scattered")
    assert layer.dense_params == dense.weight.numel()
    assert layer.rank * layer.params_per_rank == sum(half.weight.numel() for half in layer.factored())


# ---------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    "mask", [torch.ones(4, dtype=torch.bool), torch.ones(5), torch.ones(5, dtype=torch.uint8), torch.arange(5)]
)
def test_a_mask_of_another_shape_or_dtype_is_refused(mask):
    layer = SVDLinear(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=r"`mask` must be bool of shape \(5,\), got"):
        layer.keep(mask)
    assert layer.rank == 5


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", DENSE)
def test_pruned_ranks_neither_act_nor_learn(kind, mask):
    _, layer, x = factorise(kind)
    parameters = {name: (p, p.shape) for name, p in layer.named_parameters()}
    kept = prune(layer, mask).mask
    assert all(getattr(layer, name) is p and p.shape == shape for name, (p, shape) in parameters.items())
    assert layer.rank == int(kept.sum()) == len(layer.spectrum())
    before = layer(x)
    with torch.no_grad():
        for factor in (layer.U, layer.s, layer.V):
            factor[..., ~kept] = torch.nan
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    for factor in (layer.U, layer.s, layer.V):
        assert not factor.grad[..., ~kept].any()
        assert factor.grad[..., kept].any() or mask == "none"


@pytest.mark.parametrize("kind", DENSE)
def test_pruned_ranks_can_come_back(kind):
    _, layer, x = factorise(kind)
    before = layer(x)
    assert not torch.equal(prune(layer, "one")(x), before)
    assert torch.equal(prune(layer, "all")(x), before)


@pytest.mark.parametrize("kind", DENSE)
def test_what_swaps_buffers_leaves_the_kept_ranks_alone(kind):
    _, layer, x = factorise(kind)
    kept = prune(layer, "scattered").mask.clone()
    before = layer(x)
    layer.mask.fill_(True)  # as averaging and swapping of buffers do
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.kept_mask(), kept)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("compute", ["forward", "forward_rebuilt", "forward_factored", "dense"])
def test_without_any_rank_only_the_bias_is_left(kind, compute):
    dense, layer, x = factorise(kind)
    prune(layer, "none")
    output = getattr(layer, compute)(x) if compute.startswith("forward") else getattr(layer, compute)()(x)
    bias = dense.bias if kind == "linear" else dense.bias[:, None, None]
    assert torch.equal(output, bias.expand_as(dense(x)))


# ----------------------------------------------------------------------------------------------- plain layers and files


@pytest.mark.parametrize("mask", ["all", "scattered", "one"])
@pytest.mark.parametrize("kind", DENSE)
def test_plain_layers_reproduce_the_output(kind, mask):
    original, layer, x = factorise(kind)
    with torch.no_grad():
        layer.s[::2] *= -1  # training may make singular values negative
    prune(layer, mask).eval()
    dense, factored = layer.dense(), layer.factored()
    assert type(dense) is type(original)
    assert type(factored) is nn.Sequential and [type(half) for half in factored] == [type(original)] * 2
    assert dense.bias is factored[1].bias is layer.bias and factored[0].bias is None
    assert not (dense.training or factored.training or factored[0].training)
    for plain in (dense, factored):
        assert_same(plain(x), layer(x), layer.matrix_shape)
        assert all(p.is_contiguous() and p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("kind", DENSE)
def test_plain_halves_are_balanced(kind):
    _, layer, _ = factorise(kind)
    prune(layer, "scattered")
    first, second = layer.factored()
    root = layer.s[layer.mask].detach().sqrt()
    assert_same(first.weight.detach().flatten(1).norm(dim=1), root, layer.matrix_shape)
    assert_same(second.weight.detach().transpose(0, 1).flatten(1).norm(dim=1), root, layer.matrix_shape)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("compute", ["forward", "forward_rebuilt", "forward_factored"])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask", ["all", "one"])
def test_output_has_the_layout_of_the_dense_conv(mask, layout, conv_mode, channels, compute, padding_mode):
    conv = nn.Conv2d(channels, 8, 3, padding=1, padding_mode=padding_mode)
    layer = prune(SVDConv2d(conv, conv_mode), mask)
    x = torch.randn(2, channels, 6, 6).to(memory_format=layout)
    output = getattr(layer, compute)(x)
    assert output.stride() == conv(x).stride()
    if layout == torch.contiguous_format:
        assert output.view(len(x), -1).shape == (2, 8 * 6 * 6)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize(("saved", "before"), [("scattered", "all"), ("all", "one"), ("one", "scattered")])
def test_a_loaded_mask_is_in_effect(kind, saved, before):
    _, source, x = factorise(kind)
    prune(source, saved)
    file = io.BytesIO()
    torch.save(nn.Sequential(source).state_dict(), file)
    file.seek(0)
    target = nn.Sequential(prune(factorise(kind)[1], before))
    target.load_state_dict(torch.load(file, weights_only=True))
    assert target[0].rank == source.rank
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("kind", DENSE)
def test_a_copy_is_independent(kind):
    _, layer, x = factorise(kind)
    prune(layer, "scattered")
    twin = copy.deepcopy(layer)
    before = layer(x)
    assert torch.equal(twin(x), before)
    prune(twin, "one")
    assert twin.rank == 1 and torch.equal(layer(x), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_compact_shrinks_storage_and_nothing_else(kind, frozen):
    _, layer, x = factorise(kind)
    prune(layer, "scattered").requires_grad_(not frozen)
    rank, before, spectrum = layer.rank, layer(x), layer.spectrum()
    layer.compact()
    held = sum(factor.untyped_storage().nbytes() for factor in (layer.U, layer.s, layer.V))
    assert held == rank * (sum(layer.matrix_shape) + 1) * x.element_size()
    assert layer.rank == layer.full_rank == rank and layer.mask.all()
    assert layer.spectrum() == spectrum
    assert_same(layer(x), before, layer.matrix_shape)
    assert {p.requires_grad for p in (layer.U, layer.s, layer.V)} == {not frozen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", DENSE)
def test_pruned_compacted_and_plain_forms_compute_the_same(kind, mask, dtype):
    _, layer, x = factorise(kind, dtype)
    prune(layer, mask)
    small = copy.deepcopy(layer)
    small.compact()
    expected = layer.forward_rebuilt(x)
    forms = [layer.forward_factored, small.forward_rebuilt, small.forward_factored, layer.factored(), layer.dense()]
    for form in forms:
        assert_same(form(x), expected, layer.matrix_shape, factor=8)
