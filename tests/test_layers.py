"""A factorised layer is its dense layer: values, gradients, costs, layout, files, and what its mask means."""

import copy
import io

import pytest
import torch
from helpers import assert_same, counted_macs
from torch import nn

from lightning_svd.layers import SVDConv, SVDLinear
from lightning_svd.views import View

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
# Convolutions of other kinds, each for inputs of 6 channels.
OTHER_CONVS = {
    "Conv1d": lambda: nn.Conv1d(6, 4, 3, padding=1),
    "Conv1d, strided": lambda: nn.Conv1d(6, 9, 4, stride=3, dilation=2, padding="valid", bias=False),
    "Conv1d, same": lambda: nn.Conv1d(6, 5, 4, padding="same", dilation=2),
    "Conv1d, circular": lambda: nn.Conv1d(6, 5, 3, padding=2, padding_mode="circular"),
    "Conv3d": lambda: nn.Conv3d(6, 4, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 2)),
    "Conv3d, replicate": lambda: nn.Conv3d(6, 4, 3, padding=(2, 1, 1), padding_mode="replicate", dilation=(1, 1, 2)),
    "groups": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "groups of few inputs": lambda: nn.Conv2d(6, 9, (3, 2), stride=2, groups=3, bias=False),
    "groups, 1d": lambda: nn.Conv1d(6, 10, 5, padding="same", groups=2),
    "groups, 3d": lambda: nn.Conv3d(6, 8, 2, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(6, 4, 2, stride=2),
    "ConvTranspose2d, odd": lambda: nn.ConvTranspose2d(
        6, 5, (3, 4), stride=(2, 3), padding=(1, 2), output_padding=(1, 0), dilation=(2, 1), bias=False
    ),
    "ConvTranspose2d, groups": lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, output_padding=1, groups=3),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(6, 5, (2, 3, 2), stride=(1, 2, 2), padding=(0, 1, 0)),
}
INPUTS = {1: (2, 6, 13), 2: (2, 6, 9, 8), 3: (2, 6, 5, 6, 7)}


def transformers_conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(5, 6)


# One of each kind for what holds for all of them: the dense layer, its mode, the shape of an input.
DENSE = {
    "linear": (lambda: nn.Linear(6, 5), None, (3, 6)),
    "transformers": (transformers_conv1d, None, (3, 6)),
    "channel": (lambda: nn.Conv2d(5, 4, 3, padding=1), "channel", IMAGE),
    "spatial": (lambda: nn.Conv2d(5, 4, (3, 2), stride=(1, 2)), "spatial", IMAGE),
    "1d": (OTHER_CONVS["Conv1d"], "spatial", INPUTS[1]),
    "3d": (OTHER_CONVS["Conv3d"], "spatial", INPUTS[3]),
    "groups": (OTHER_CONVS["groups"], "channel", INPUTS[2]),
    "spatial groups": (OTHER_CONVS["groups"], "spatial", INPUTS[2]),
    "transposed": (OTHER_CONVS["ConvTranspose2d"], "channel", INPUTS[2]),
    "spatial transposed": (OTHER_CONVS["ConvTranspose2d, groups"], "spatial", INPUTS[2]),
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
    build, mode, shape = DENSE[kind]
    dense = build().to(dtype)
    return dense, SVDConv(dense, mode) if mode else SVDLinear(dense), torch.randn(shape, dtype=dtype)


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
    layer = SVDConv(conv, conv_mode)
    batch = torch.randn(IMAGE, dtype=dtype)
    for x in (batch, batch[0]):
        for compute in (layer, layer.forward_rebuilt, layer.forward_factored, layer.dense(), layer.factored()):
            assert_same(compute(x), conv(x), layer.matrix_shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", OTHER_CONVS)
def test_other_convs_are_the_dense_ones(kind, conv_mode, dtype):
    conv = OTHER_CONVS[kind]().to(dtype)
    layer = SVDConv(conv, conv_mode)
    batch = torch.randn(INPUTS[len(conv.kernel_size)], dtype=dtype)
    for x in (batch, batch[0]):
        for compute in (layer, layer.forward_rebuilt, layer.forward_factored, layer.dense(), layer.factored()):
            assert_same(compute(x), conv(x), layer.matrix_shape)


def test_a_transposed_conv_refuses_an_output_size():
    layer = SVDConv(nn.ConvTranspose2d(4, 4, 3, stride=2))
    with pytest.raises(NotImplementedError, match="takes no `output_size`: build the layer with `output_padding`"):
        layer(torch.randn(1, 4, 5, 5), output_size=(12, 12))


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


@pytest.mark.parametrize("kind", [kind for kind in DENSE if kind != "transformers"])
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


KEPT = ["all", "scattered", "one"]


def perturbed(layer):
    """As training leaves it: no longer orthonormal, some singular values negative."""
    with torch.no_grad():
        for parameter in (layer.U, layer.s, layer.V):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("mask", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_refactorised_it_computes_the_same_by_an_exact_svd(kind, mask):
    layer = prune(perturbed(factorise(kind)[1]), mask)
    weight, dropped = layer.weight.detach(), ~layer.mask
    before = [parameter[..., dropped].clone() for parameter in (layer.U, layer.s, layer.V)]
    layer.set_factors(layer.refactorised())
    assert_same(layer.weight, weight, layer.matrix_shape)
    U, s, V = layer.factors()
    identity = torch.eye(layer.rank, dtype=s.dtype)
    for factor in (U, V):
        assert_same(factor.mT @ factor, identity.expand(*factor.shape[:-2], -1, -1), layer.matrix_shape)
    exact = torch.linalg.svdvals(layer.view.unfold(weight))[..., : layer.rank]
    assert_same(s.sort(descending=True).values, exact, layer.matrix_shape)
    after = [parameter[..., dropped] for parameter in (layer.U, layer.s, layer.V)]
    assert all(torch.equal(now, then) for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize("mask", KEPT)
@pytest.mark.parametrize("kind", [kind for kind in DENSE if DENSE[kind][0]().__dict__.get("groups", 1) == 1])
def test_an_svd_that_is_exact_stays_where_it_is(kind, mask):
    layer = factorise(kind)[1]
    with torch.no_grad():
        order = torch.randperm(layer.full_rank)
        for parameter in (layer.U, layer.s, layer.V):
            parameter.copy_(parameter[..., order])
        layer.U.neg_()
        layer.V.neg_()
    prune(layer, mask)
    before = [parameter.detach().clone() for parameter in (layer.U, layer.s, layer.V)]
    layer.set_factors(layer.refactorised())
    for now, then in zip((layer.U, layer.s, layer.V), before, strict=True):
        assert_same(now, then, layer.matrix_shape)


@pytest.mark.parametrize("mask", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_merged_it_is_the_two_plain_layers(kind, mask):
    _, layer, x = factorise(kind)
    prune(perturbed(layer), mask)
    weight, energies = layer.weight.detach(), layer.energies()
    layer.merge()
    assert layer.trained_as == "pair" and bool((layer.s == 1).all())
    assert_same(layer.weight, weight, layer.matrix_shape)
    assert_same(layer.energies(), energies, layer.matrix_shape)
    first, second = layer.factored()
    U, _, V = layer.factors()
    assert torch.equal(first.weight, layer.view.first_weight(V)) and torch.equal(
        second.weight, layer.view.second_weight(U)
    )
    assert_same(layer.forward_factored(x), layer.factored()(x), layer.matrix_shape)


@pytest.mark.parametrize("kind", DENSE)
def test_joined_it_trains_as_the_dense_layer_until_factors_are_set(kind):
    dense, layer, x = factorise(kind)
    dense, spectrum = copy.deepcopy(dense), layer.singular_values()  # its bias is the layer's too
    layer.join()
    assert layer.trained_as == "dense"
    for trained in (dense, layer):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-2, weight_decay=0.1)
        trained(x).square().sum().backward()
        optimizer.step()
    assert_same(layer.weight, dense.weight, layer.matrix_shape)
    assert len(layer.untrained) == 2 and all(constant.grad is None for constant in layer.untrained)
    assert not torch.allclose(layer.singular_values(), spectrum)
    weight, trained_spectrum = layer.weight.detach().clone(), layer.singular_values()
    assert layer.full_spectrum() == trained_spectrum.tolist()
    for compute in (layer.forward, layer.forward_factored, layer.dense(), layer.factored()):
        assert_same(compute(x), dense(x), layer.matrix_shape)
    layer.set_factors(layer.refactorised())
    assert layer.trained_as == "svd" and layer.untrained == ()
    assert_same(layer.weight, weight, layer.matrix_shape)
    assert_same(layer.singular_values(), trained_spectrum, layer.matrix_shape)


@pytest.mark.parametrize("kind", DENSE)
def test_unfolding_a_weight_is_undone_by_folding(kind):
    dense, layer, _ = factorise(kind)
    view = layer.view
    matrix = view.unfold(dense.weight)
    assert matrix.shape == (*([view.groups] if view.groups > 1 else []), *view.matrix_shape)
    assert view.weight_shape == dense.weight.shape and torch.equal(view.fold(matrix), dense.weight)
    assert torch.equal(view.right_factor(view.first_weight(layer.V)), layer.V)
    assert torch.equal(view.left_factor(view.second_weight(layer.U)), layer.U)


def test_what_cannot_be_factorised_is_refused():
    with pytest.raises(ValueError, match=r"`conv_mode` must be one of channel, spatial, got 'depth'"):
        SVDConv(nn.Conv2d(4, 4, 3), "depth")
    with pytest.raises(ValueError, match="EmbeddingBag has no weight that can be seen as a matrix"):
        View.of(nn.EmbeddingBag(3, 4))


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
    layer = prune(SVDConv(nn.Conv2d(5, 7, **geometry), conv_mode), "scattered")
    x = torch.randn(shape)
    assert layer.dense_macs(x.shape) == counted_macs(layer.dense(), x)
    assert layer.rank * layer.macs_per_rank(x.shape) == counted_macs(layer.factored(), x)


@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", OTHER_CONVS)
def test_macs_of_other_convs_are_what_torch_counts(kind, conv_mode):
    conv = OTHER_CONVS[kind]()
    layer = prune(SVDConv(conv, conv_mode), "scattered")
    x = torch.randn(INPUTS[len(conv.kernel_size)])
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
    bias = dense.bias.reshape(-1, *[1] * (x.ndim - 2))
    assert torch.equal(output, bias.squeeze().expand_as(dense(x)) if x.ndim == 2 else bias.expand_as(dense(x)))


# ----------------------------------------------------------------------------------------------- plain layers and files


@pytest.mark.parametrize("mask", ["all", "scattered", "one"])
@pytest.mark.parametrize("kind", DENSE)
def test_plain_layers_reproduce_the_output(kind, mask):
    original, layer, x = factorise(kind)
    with torch.no_grad():
        layer.s[..., ::2] *= -1  # training may make singular values negative
    prune(layer, mask).eval()
    dense, factored = layer.dense(), layer.factored()
    assert type(dense) is type(original)
    kinds = [nn.Linear] * 2 if kind == "transformers" else [type(original)] * 2
    if kind == "transposed":  # of which the first half is of 1x1
        kinds[0] = nn.Conv2d
    assert type(factored) is nn.Sequential and [type(half) for half in factored] == kinds
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
    root = layer.s[..., layer.mask].detach().sqrt()
    assert_same(layer.view.right_factor(first.weight.detach()).norm(dim=-2), root, layer.matrix_shape)
    assert_same(layer.view.left_factor(second.weight.detach()).norm(dim=-2), root, layer.matrix_shape)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("compute", ["forward", "forward_rebuilt", "forward_factored"])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask", ["all", "one"])
def test_output_has_the_layout_of_the_dense_conv(mask, layout, conv_mode, channels, compute, padding_mode):
    conv = nn.Conv2d(channels, 8, 3, padding=1, padding_mode=padding_mode)
    layer = prune(SVDConv(conv, conv_mode), mask)
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
    assert held == rank * layer.view.groups * (sum(layer.matrix_shape) + 1) * x.element_size()
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
