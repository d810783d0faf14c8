"""A factorized layer is its dense layer: values, gradients, costs, layout, files, and what its rank means."""

import copy
import io
import warnings

import pytest
import torch
from helpers import assert_same, counted_macs, factored, rebuilt, svd_of, ways
from torch import nn

from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import SVDLayer, own_class, plain_dense, plain_pair, release, svd_class
from lightning_svd.layers.matrices import reconstruct, svd, truncate
from lightning_svd.layers.views import View

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
# How many of r ranks are in use.
RANKS = {"all": lambda r: r, "most": lambda r: r - 1, "one": lambda r: 1, "none": lambda r: 0}
KEPT = ["all", "most", "one"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def factorized(kind, dtype=torch.float64, form="svd"):
    """A dense layer, its copy that is factorized, and an input."""
    build, mode, shape = DENSE[kind]
    dense = build().to(dtype)
    return dense, svd_of(copy.deepcopy(dense), mode, form), torch.randn(shape, dtype=dtype)


def keep(layer, ranks):
    layer.keep(RANKS[ranks](layer.full_rank))
    return layer


def values(layer):
    """Copies of all that the form has stored."""
    return [parameter.detach().clone() for parameter in layer.form.trained]


# ------------------------------------------------------------------------------------------- the same as the dense one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_is_the_dense_conv(geometry, padding_mode, conv_mode, dtype):
    conv = nn.Conv2d(5, 7, **geometry, padding_mode=padding_mode, dtype=dtype)
    layer = svd_of(copy.deepcopy(conv), conv_mode)
    batch = torch.randn(IMAGE, dtype=dtype)
    for x in (batch, batch[0]):
        for compute in ways(layer):
            assert_same(compute(x), conv(x), layer.matrix_shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", OTHER_CONVS)
def test_other_convs_are_the_dense_ones(kind, conv_mode, dtype):
    conv = OTHER_CONVS[kind]().to(dtype)
    layer = svd_of(copy.deepcopy(conv), conv_mode)
    batch = torch.randn(INPUTS[len(conv.kernel_size)], dtype=dtype)
    for x in (batch, batch[0]):
        for compute in ways(layer):
            assert_same(compute(x), conv(x), layer.matrix_shape)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_transposed_conv_takes_an_output_size(ranks):
    layer = keep(svd_of(nn.ConvTranspose2d(4, 4, 3, stride=2)), ranks)
    dense, x = plain_dense(layer), torch.randn(1, 4, 5, 5)
    for size in ((11, 11), (12, 11)):
        output = layer(x, output_size=size)
        assert output.shape[2:] == size
        assert_same(output, dense(x, output_size=size), layer.matrix_shape)
    output.square().sum().backward()
    assert layer.form.parameters["s"].grad.any() or ranks == "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 4)])
@pytest.mark.parametrize("sizes", [(6, 5), (5, 6), (1, 4)])
def test_linear_is_the_dense_linear(sizes, leading, bias, dtype):
    linear = nn.Linear(*sizes, bias=bias, dtype=dtype)
    layer = svd_of(copy.deepcopy(linear))
    x = torch.randn(*leading, sizes[0], dtype=dtype)
    for compute in ways(layer):
        assert_same(compute(x), linear(x), layer.matrix_shape)


@pytest.mark.parametrize("kind", [kind for kind in DENSE if kind != "transformers"])
def test_called_by_keyword_as_the_dense_layer_is(kind):
    dense, layer, x = factorized(kind)
    assert_same(layer(input=x), dense(input=x), layer.matrix_shape)


@pytest.mark.parametrize("kind", DENSE)
def test_what_the_dense_layer_refuses_is_refused_with_its_words(kind):
    dense, layer, x = factorized(kind)
    for wrong in (x[..., :1, None, None, None, None], torch.ones(1, dtype=x.dtype)):
        with pytest.raises(RuntimeError) as expected:
            dense(wrong)
        with pytest.raises(RuntimeError) as actual:
            layer(wrong)
        assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DENSE)
def test_half_precision_is_as_good_as_its_roundoff(kind, dtype):
    dense, layer, x = factorized(kind, dtype)
    assert {p.dtype for p in (*layer.parameters(), *layer.form.trained)} == {dtype}
    for compute in ways(layer):
        # Each of U, s, V, their product and the result is rounded once: a factor of 2 instead of 32, which at 8 bits
        # would allow anything.
        assert_same(compute(x), dense(x), layer.matrix_shape, factor=2)


@pytest.mark.parametrize("kind", DENSE)
def test_its_class_is_the_layers_own_too_and_one_for_all_of_a_kind(kind):
    dense, layer, _ = factorized(kind)
    assert isinstance(layer, SVDLayer) and isinstance(layer, type(dense))
    assert type(layer) is svd_class(type(dense)) and own_class(layer) is type(dense)
    assert type(layer).__name__ == f"SVD{type(dense).__name__}"
    # The Conv1D of transformers has a `__repr__` of its own.
    assert kind == "transformers" or f"rank={layer.rank}/{layer.full_rank}, form=svd" in repr(layer)


@pytest.mark.parametrize("kind", DENSE)
def test_weight_is_the_dense_weight_and_differentiable(kind):
    dense, layer, _ = factorized(kind)
    assert type(layer.weight) is DenseWeight and [name for name, _ in layer.named_parameters()] == [
        name for name, _ in dense.named_parameters()
    ]
    assert_same(layer.weight, dense.weight, layer.matrix_shape)
    layer.weight.square().sum().backward()
    U, s, V = layer.form.trained
    # |W|_F^2 = sum s^2 while U and V are orthonormal.
    assert_same(s.grad, 2 * s.detach(), layer.matrix_shape)
    assert U.grad.any() and V.grad.any()


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
@pytest.mark.parametrize("kind", DENSE)
def test_energies_add_up_to_the_squared_norm(kind, form):
    dense, layer, _ = factorized(kind)
    {"dense": layer.to_dense, "svd": lambda: None, "pair": layer.to_pair}[form]()
    assert layer.form.name == form and len(layer.energies()) == layer.full_rank
    assert_same(layer.energies().sum(), dense.weight.detach().square().sum(), layer.matrix_shape)


# -------------------------------------------------------------------------------------------------------- exact factors


def perturbed(layer):
    """As training leaves it: no longer orthonormal, some singular values negative."""
    with torch.no_grad():
        for parameter in layer.form.trained:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_refactorized_it_computes_the_same_by_an_exact_svd(kind, ranks):
    layer = keep(perturbed(factorized(kind)[1]), ranks)
    weight, before, rank = layer.rebuilt().detach(), values(layer), layer.rank
    order = layer.form.set_factors(layer.form.exact())
    assert layer.rank == rank and sorted(order[:rank].tolist()) == [*range(rank)]
    assert_same(layer.rebuilt(), weight, layer.matrix_shape)
    U, s, V = layer.factors()
    identity = torch.eye(layer.rank, dtype=s.dtype)
    for factor in (U, V):
        assert_same(factor.mT @ factor, identity.expand(*factor.shape[:-2], -1, -1), layer.matrix_shape)
    exact = torch.linalg.svdvals(layer.view.unfold(weight))[..., :rank]
    assert_same(s, exact, layer.matrix_shape)
    # What is not in use is where the returned order says, untouched.
    for now, then in zip(layer.form.trained, before, strict=True):
        assert torch.equal(now[..., rank:], then[..., order][..., rank:])


@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", [kind for kind in DENSE if DENSE[kind][0]().__dict__.get("groups", 1) == 1])
def test_of_an_exact_svd_each_new_column_is_the_old_one_that_it_is_said_to_be(kind, ranks):
    layer = factorized(kind)[1]
    U, s, V = layer.form.trained
    with torch.no_grad():
        order = torch.randperm(layer.full_rank)
        for parameter in (U, s, V):
            parameter.copy_(parameter[..., order])
        U.neg_()
        V.neg_()
    layer.form.rank = RANKS[ranks](layer.full_rank)
    before = values(layer)
    order = layer.form.set_factors(layer.form.exact())
    for now, then in zip((U, s, V), before, strict=True):
        assert_same(now, then[..., order], layer.matrix_shape)


# Energies of 1e-18 and of 1e18: no number may be added to them.
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_strongest_are_kept_at_any_scale(scale, dtype):
    layer = svd_of(nn.Linear(9, 8, dtype=dtype))
    U, s, V = layer.form.trained
    with torch.no_grad():
        s.copy_(scale * torch.logspace(-5, 0, 8))
        s[3].neg_()
    before = values(layer)
    layer.keep(5)
    for now, then in zip((U, s, V), before, strict=True):
        assert torch.equal(now, then.flip(-1))
    # Those that are not in use stay behind, and come back in the order of what they carry.
    with torch.no_grad():
        s[5:].mul_(1e7)
    layer.keep(6)
    expected = [*before[1][3:].flip(0).abs(), (1e7 * before[1][2]).abs()]
    assert torch.equal(layer.form.factors().s.abs().detach(), torch.stack(expected))


# --------------------------------------------------------------------------------------------- from one form to another


DTYPES = {torch.float64: 32, torch.float32: 32, torch.bfloat16: 2, torch.float16: 2}  # and what roundings add up to


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_every_form_is_made_exactly_of_every_other(kind, ranks, dtype):
    _, layer, x = factorized(kind, dtype)
    perturbed(layer).to_svd(layer.form.exact())
    keep(layer, ranks)
    rank = layer.rank
    weight, output = plain_dense(layer).weight.detach(), plain_dense(layer)(x)
    bias = layer._parameters.get("bias")
    for step in ("svd", "pair", "svd", "dense", "svd", "pair", "dense"):
        before = layer.form.trained
        if step == "svd":
            form = layer.form.name
            old, new = layer.to_svd()
            if form == "dense":  # whose numerical rank is known to nobody
                assert layer.rank == layer.full_rank
                layer.keep(rank)
        else:
            old, new = layer.to_pair() if step == "pair" else layer.to_dense()
        assert layer.form.name == step and layer.rank == (layer.full_rank if step == "dense" else rank)
        assert all(a is b for a, b in zip(old, before, strict=True))
        assert all(a is b for a, b in zip(new, layer.form.trained, strict=True))
        assert {p.dtype for p in layer.form.trained} == {dtype} and all(p.is_contiguous() for p in new)
        assert layer._parameters.get("bias") is bias
        assert_same(layer.rebuilt(), weight, layer.matrix_shape, DTYPES[dtype])
        assert_same(layer(x), output, layer.matrix_shape, DTYPES[dtype])


@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_a_pair_is_the_two_plain_layers(kind, ranks):
    _, layer, x = factorized(kind)
    keep(perturbed(layer), ranks)
    weight = layer.rebuilt().detach()
    layer.to_pair()
    assert layer.form.name == "pair" and layer.form.room == layer.rank
    assert_same(layer.rebuilt(), weight, layer.matrix_shape)
    exact = torch.linalg.svdvals(layer.view.unfold(weight))[..., : layer.rank].square()
    assert_same(layer.energies(), exact if exact.ndim == 1 else exact.sum(0), layer.matrix_shape)
    first, second = plain_pair(layer)
    left, right = layer.form.left_right()
    assert torch.equal(first.weight, layer.view.first_weight(right))
    assert torch.equal(second.weight, layer.view.second_weight(left))
    assert_same(factored(layer, x), plain_pair(layer)(x), layer.matrix_shape)


@pytest.mark.parametrize("kind", DENSE)
def test_in_the_dense_form_it_trains_as_the_dense_layer_until_it_is_an_svd_again(kind):
    dense, layer, x = factorized(kind)
    spectrum, face = layer.singular_values(), layer.weight
    layer.to_dense()
    assert layer.form.name == "dense" and layer.weight is face and type(face) is nn.Parameter
    for trained in (dense, layer):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-2, weight_decay=0.1)
        trained(x).square().sum().backward()
        optimizer.step()
    assert_same(layer.weight, dense.weight, layer.matrix_shape)
    assert not torch.allclose(layer.singular_values(), spectrum)
    weight, trained_spectrum = layer.weight.detach().clone(), layer.singular_values()
    assert layer.spectrum() == trained_spectrum.tolist()
    for compute in (layer, plain_dense(layer), plain_pair(layer), plain_pair(layer, exact=False)):
        assert_same(compute(x), dense(x), layer.matrix_shape)
    for of_one, of_other in zip(plain_pair(layer), plain_pair(layer, exact=False), strict=True):
        assert of_one.weight.shape == of_other.weight.shape
    layer.to_svd()
    assert layer.form.name == "svd" and layer.weight is face and type(face) is DenseWeight
    assert_same(layer.weight, weight, layer.matrix_shape)
    assert_same(layer.singular_values(), trained_spectrum, layer.matrix_shape)


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
@pytest.mark.parametrize("kind", DENSE)
def test_released_it_is_the_plain_layer_with_its_very_parameters(kind, form):
    dense, _, x = factorized(kind)
    weight, bias = dense.weight, getattr(dense, "bias", None)
    expected, attributes = dense(x), {*vars(dense)}
    layer = svd_of(dense, DENSE[kind][1], "dense" if form == "dense" else "svd")
    if form == "pair":
        layer.to_pair()
    old, new = release(layer)
    assert old == [] if form == "dense" else new == [weight]
    assert type(dense) is own_class(dense) and {*vars(dense)} == attributes
    assert dense.weight is weight and type(weight) is nn.Parameter and getattr(dense, "bias", None) is bias
    assert_same(dense(x), expected, layer.view.matrix_shape if hasattr(layer, "view") else tuple(weight.shape))


@pytest.mark.parametrize("kind", DENSE)
def test_unfolding_a_weight_is_undone_by_folding(kind):
    dense, layer, _ = factorized(kind)
    view, (U, _, V) = layer.view, layer.form.trained
    matrix = view.unfold(dense.weight)
    assert matrix.shape == (*([view.groups] if view.groups > 1 else []), *view.matrix_shape)
    assert view.weight_shape == dense.weight.shape and torch.equal(view.fold(matrix), dense.weight)
    assert torch.equal(view.right_factor(view.first_weight(V)), V)
    assert torch.equal(view.left_factor(view.second_weight(U)), U)


def test_what_cannot_be_factorized_is_refused():
    with pytest.raises(ValueError, match=r"`conv_mode` must be one of channel, spatial, got 'depth'"):
        View.of(nn.Conv2d(4, 4, 3), "depth")
    with pytest.raises(ValueError, match="EmbeddingBag has no weight that can be seen as a matrix"):
        View.of(nn.EmbeddingBag(3, 4))


@pytest.mark.parametrize("form", ["svd", "dense"])
def test_a_weight_that_is_not_finite_is_refused_and_left_as_it_was(form):
    linear = nn.Linear(6, 5)
    with torch.no_grad():
        linear.weight[1, 2] = torch.inf
    weight = linear.weight
    with pytest.raises(ValueError, match=r"`encoder\.fc`: expected finite weights, got 1 NaN or infinite of 30"):
        svd_of(linear, None, form, "encoder.fc").to_svd()
    assert linear.weight is weight and type(weight) is nn.Parameter and int(weight.isinf().sum()) == 1
    assert type(linear) is nn.Linear if form == "svd" else linear.form.name == "dense"


# ------------------------------------------------------------------------------------------------- two ways to compute


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", DENSE)
def test_both_ways_agree_in_value_and_gradient(kind, ranks):
    _, layer, x = factorized(kind)
    keep(layer, ranks)
    x.requires_grad_()
    wanted = [x, *layer.form.trained, *(p for name, p in layer.named_parameters() if name == "bias")]
    by_weight, by_factors = rebuilt(layer, x), factored(layer, x)
    assert_same(by_factors, by_weight, layer.matrix_shape)
    upstream = torch.randn_like(by_weight)
    expected = torch.autograd.grad(by_weight, wanted, upstream)
    actual = torch.autograd.grad(by_factors, wanted, upstream)
    # A gradient sums over every position of the output too.
    terms = (*layer.matrix_shape, upstream.numel())
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, terms)


@pytest.mark.parametrize(
    ("rank", "positions", "by_weight"),
    # Outputs 4, inputs 6: 24 r to rebuild and 24 N to apply, against 10 r N.
    [(4, 5, False), (4, 6, True), (3, 11, False), (3, 12, True), (2, 1, False), (2, 10_000, False), (0, 1, True)],
)
def test_the_cheaper_way_is_taken(rank, positions, by_weight, monkeypatch):
    layer = svd_of(nn.Linear(6, 4))
    layer.keep(rank)
    monkeypatch.setattr(View, "apply_matrix", lambda *_: "rebuilt")
    monkeypatch.setattr(View, "apply_second", lambda *_: "factored")
    assert layer.rebuilding_is_cheaper((positions, 6)) == by_weight
    assert layer(torch.empty(positions, 6)) == ("rebuilt" if by_weight else "factored")


@pytest.mark.parametrize("positions", [3, 6])
def test_few_features_are_scaled_in_the_place_of_u(positions):
    layer = svd_of(nn.Linear(10, 5).double())
    layer.keep(2)
    x = torch.randn(positions, 10, dtype=torch.float64)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        out = layer.computed(x, layer.bias)
    assert saved.count((positions, 2)) == (2 if positions < 5 else 1)  # before and after, to differentiate by s and U
    upstream = torch.randn_like(out)
    actual = torch.autograd.grad(out, layer.form.trained, upstream)
    expected = torch.autograd.grad(x @ layer.form.matrix().mT, layer.form.trained, upstream)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other, (10, 5))


def assert_counted(layer, x):
    view = layer.view
    assert view.dense_macs(x.shape) == counted_macs(plain_dense(layer), x)
    assert layer.rank * view.macs_per_rank(x.shape) == counted_macs(plain_pair(layer), x)


@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("shape", [IMAGE, IMAGE[1:]])
def test_conv_macs_are_what_torch_counts(shape, geometry, conv_mode):
    assert_counted(keep(svd_of(nn.Conv2d(5, 7, **geometry), conv_mode), "most"), torch.randn(shape))


@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", OTHER_CONVS)
def test_macs_of_other_convs_are_what_torch_counts(kind, conv_mode):
    conv = OTHER_CONVS[kind]()
    assert_counted(keep(svd_of(conv, conv_mode), "most"), torch.randn(INPUTS[len(conv.kernel_size)]))


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_linear_macs_are_what_torch_counts(shape):
    assert_counted(keep(svd_of(nn.Linear(6, 5)), "most"), torch.randn(shape))


@pytest.mark.parametrize("kind", DENSE)
def test_params_are_those_of_the_plain_layers(kind):
    dense, layer, _ = factorized(kind)
    keep(layer, "most")
    assert layer.dense_params == dense.weight.numel()
    assert layer.rank * layer.params_per_rank == sum(half.weight.numel() for half in plain_pair(layer))


# ---------------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("rank", [-1, 6])
def test_a_rank_that_there_is_no_room_for_is_refused(rank):
    layer = svd_of(nn.Linear(6, 5))
    with pytest.raises(ValueError, match=rf"`rank` must be in \[0, 5\], got {rank}"):
        layer.keep(rank)
    assert layer.rank == 5


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", DENSE)
def test_ranks_that_are_not_in_use_neither_act_nor_learn(kind, ranks):
    _, layer, x = factorized(kind)
    parameters = [(p, p.shape) for p in layer.form.trained]
    rank = keep(layer, ranks).rank
    assert all(now is p and p.shape == shape for now, (p, shape) in zip(layer.form.trained, parameters, strict=True))
    assert rank == RANKS[ranks](layer.full_rank) == len(layer.spectrum())
    before = layer(x)
    with torch.no_grad():
        for factor in layer.form.trained:
            factor[..., rank:] = torch.nan
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    for factor in layer.form.trained:
        assert not factor.grad[..., rank:].any()
        assert factor.grad[..., :rank].any() or ranks == "none"


@pytest.mark.parametrize("kind", DENSE)
def test_ranks_can_come_back_while_they_are_stored(kind):
    _, layer, x = factorized(kind)
    before = layer(x)
    assert not torch.equal(keep(layer, "one")(x), before)
    assert torch.equal(keep(layer, "all")(x), before)


@pytest.mark.parametrize("kind", DENSE)
def test_without_any_rank_only_the_bias_is_left(kind):
    dense, layer, x = factorized(kind)
    keep(layer, "none")
    expected = dense(x)
    bias = expected.new_zeros(1) if dense.bias is None else dense.bias
    bias = bias if x.ndim == 2 else bias.reshape(-1, *[1] * (x.ndim - 2))
    for compute in ways(layer):
        assert torch.equal(compute(x), bias.expand_as(expected))


class ByMask(nn.Module):
    """A linear layer of factors whose columns in use are picked by a mask."""

    def __init__(self, factors, mask, bias):
        super().__init__()
        self.U, self.s, self.V = (nn.Parameter(factor.detach().clone()) for factor in factors)
        self.mask, self.bias = mask, nn.Parameter(bias.detach().clone())

    def forward(self, x):
        beyond, used = int((~self.mask).sum()), int(self.mask.sum())
        # As far apart in memory as in the layer: products depend on that, in the last digit.
        U, s, V = (
            nn.functional.pad(factor[..., self.mask], (0, beyond))[..., :used] for factor in (self.U, self.s, self.V)
        )
        if self.by_weight:
            return nn.functional.linear(x, (U * s) @ V.mT, self.bias)
        return nn.functional.linear(nn.functional.linear(x, V.mT) * s, U, self.bias)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0),
}


def trained_by(optimizer, layer, x, steps=5):
    for step in range(steps):
        optimizer.zero_grad()
        (layer(x) - step).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("positions", [4, 640], ids=["by factors", "by the weight"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_prefix_of_ranks_trains_as_the_same_ranks_under_a_mask_bit_for_bit(name, positions, dtype):
    torch.manual_seed(1)
    linear, x = nn.Linear(24, 16, dtype=dtype), torch.randn(positions, 24, dtype=dtype)
    mask = torch.arange(16) % 4 != 1
    factors = svd(linear.weight)
    first = torch.cat([mask.nonzero().flatten(), (~mask).nonzero().flatten()])
    layer = svd_of(copy.deepcopy(linear))
    layer.form.set_factors(type(factors)(*(factor[..., first] for factor in factors)))
    for parameter, factor in zip(layer.form.trained, factors, strict=True):
        parameter.data.copy_(factor[..., first])  # without the signs that were kept
    layer.form.rank = int(mask.sum())
    masked = ByMask(factors, mask, linear.bias)
    masked.by_weight = layer.rebuilding_is_cheaper(x.shape)
    assert masked.by_weight == (positions == 640)
    trained_by(OPTIMIZERS[name]([*layer.form.trained, layer.bias]), layer, x)
    trained_by(OPTIMIZERS[name](masked.parameters()), masked, x)
    for parameter, other, before in zip(layer.form.trained, (masked.U, masked.s, masked.V), factors, strict=True):
        assert torch.equal(parameter[..., : layer.rank], other[..., mask])
        assert torch.equal(parameter[..., layer.rank :], before[..., ~mask])  # which have not moved
        assert not torch.equal(other[..., mask], before[..., mask])
    assert torch.equal(layer.bias, masked.bias)


# ----------------------------------------------------------------------------------------------- plain layers and files


@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_plain_layers_reproduce_the_output(kind, ranks):
    original, layer, x = factorized(kind)
    with torch.no_grad():
        layer.form.parameters["s"][..., ::2] *= -1  # training may make singular values negative
    keep(layer, ranks).eval()
    dense, pair = plain_dense(layer), plain_pair(layer)
    assert type(dense) is type(original)
    kinds = [nn.Linear] * 2 if kind == "transformers" else [type(original)] * 2
    if kind == "transposed":  # of which the first half is of 1x1
        kinds[0] = nn.Conv2d
    assert type(pair) is nn.Sequential and [type(half) for half in pair] == kinds
    assert dense.bias is pair[1].bias is layer.bias and pair[0].bias is None
    assert not (dense.training or pair.training or pair[0].training)
    for plain in (dense, pair):
        assert_same(plain(x), layer(x), layer.matrix_shape)
        assert all(p.is_contiguous() and p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("kind", DENSE)
def test_plain_halves_are_balanced(kind):
    _, layer, _ = factorized(kind)
    keep(layer, "most")
    first, second = plain_pair(layer)
    root = layer.factors().s.detach().sqrt()
    assert_same(layer.view.right_factor(first.weight.detach()).norm(dim=-2), root, layer.matrix_shape)
    assert_same(layer.view.left_factor(second.weight.detach()).norm(dim=-2), root, layer.matrix_shape)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("compute", [lambda layer, x: layer(x), rebuilt, factored], ids=["call", "rebuilt", "factored"])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ranks", ["all", "one"])
def test_output_has_the_layout_of_the_dense_conv(ranks, layout, conv_mode, channels, compute, padding_mode):
    conv = nn.Conv2d(channels, 8, 3, padding=1, padding_mode=padding_mode)
    layer = keep(svd_of(copy.deepcopy(conv), conv_mode), ranks)
    x = torch.randn(2, channels, 6, 6).to(memory_format=layout)
    output = compute(layer, x)
    assert output.stride() == conv(x).stride()
    if layout == torch.contiguous_format:
        assert output.view(len(x), -1).shape == (2, 8 * 6 * 6)


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("form", ["svd", "pair"])
@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_files_hold_the_dense_weight_under_its_own_name(kind, ranks, form, shown):
    dense, layer, x = factorized(kind)
    keep(perturbed(layer), ranks)
    if form == "pair":
        layer.to_pair()
    if shown:
        layer.show_factors()
    state = through_a_file(nn.Sequential(layer))
    assert [*state] == [*nn.Sequential(dense).state_dict()]
    assert {type(value) for value in state.values()} == {torch.Tensor}
    nn.Sequential(dense).load_state_dict(state)
    assert torch.equal(dense.weight, layer.rebuilt())
    assert_same(dense(x), layer(x), layer.matrix_shape)
    # What is loaded where it came from changes no bit of the factors.
    before = values(layer)
    nn.Sequential(layer).load_state_dict(state)
    assert all(torch.equal(now, then) for now, then in zip(layer.form.trained, before, strict=True))


@pytest.mark.filterwarnings("ignore:.*what was loaded into it is kept .* off")
@pytest.mark.parametrize("form", ["svd", "pair"])
@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_a_loaded_weight_is_the_nearest_of_the_ranks_in_use(kind, ranks, form):
    dense, layer, _ = factorized(kind)
    keep(layer, ranks)
    if form == "pair":
        layer.to_pair()
    trained_before = layer.form.trained
    other = torch.randn_like(dense.weight)
    keys = nn.Sequential(layer).load_state_dict({"0.weight": other}, strict=False)
    assert keys.missing_keys == ([] if dense.bias is None else ["0.bias"])
    assert all(a is b for a, b in zip(layer.form.trained, trained_before, strict=True))  # an optimizer holds them
    best = layer.view.fold(reconstruct(*truncate(svd(layer.view.unfold(other)), layer.rank)))
    assert_same(layer.view.fold(layer.form.matrix()).detach(), best, layer.matrix_shape)
    # Who reads it gets what was loaded, until anything changes.
    layer.weight.square().sum().backward()
    assert torch.equal(layer.weight, other) and layer.form.trained[0].grad.any()
    torch.optim.SGD(layer.form.trained, lr=0.0).step()
    assert_same(layer.weight.detach().clone(), best, layer.matrix_shape)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("ranks", KEPT)
@pytest.mark.parametrize("kind", DENSE)
def test_after_loading_it_is_saved_as_it_was_trained(kind, ranks, shown):
    dense, layer, x = factorized(kind)
    keep(layer, ranks)
    if shown:
        layer.show_factors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.load_state_dict(dense.state_dict())
    loaded = layer.state_dict()["weight"].clone()
    trained_by(torch.optim.SGD([*layer.form.trained], lr=0.01), layer, x)
    saved = layer.state_dict()["weight"]
    assert_same(saved, layer.view.fold(layer.form.matrix()).detach(), layer.matrix_shape)
    assert not torch.equal(saved, loaded)


@pytest.mark.filterwarnings("ignore:.*what was loaded into it is kept .* off")
@pytest.mark.parametrize("then", ["keep", "shrink", "pair"])
def test_swapped_in_and_out_the_very_factors_are_back_unless_the_form_changed(then):
    _, layer, _ = factorized("linear")
    keep(perturbed(layer), "most")
    bias = {"bias": layer.bias.detach()}
    before, own, other = values(layer), layer.weight.detach().clone(), torch.randn(5, 6).double()
    layer.load_state_dict({"weight": other} | bias)
    layer.load_state_dict({"weight": own} | bias)
    assert all(torch.equal(now, was) for now, was in zip(layer.form.trained, before, strict=True))
    layer.load_state_dict({"weight": other} | bias)
    keep(layer, "one" if then != "pair" else "most")
    {"keep": lambda: None, "shrink": layer.shrink, "pair": layer.to_pair}[then]()
    layer.load_state_dict({"weight": own} | bias)
    best = reconstruct(*truncate(svd(own), layer.rank))
    assert_same(layer.form.matrix().detach(), best, layer.matrix_shape)


def test_a_loss_by_loading_is_warned_of_and_a_wrong_weight_is_refused():
    layer = svd_of(nn.Linear(6, 5), name="fc")
    layer.keep(2)
    with pytest.warns(
        UserWarning, match=r"`fc\.weight`: what was loaded into it is kept \d+\.\d% off, .* 2 out of 5 ranks"
    ):
        layer.load_state_dict({"weight": torch.randn(5, 6), "bias": torch.zeros(5)})
    for wrong, why in ((torch.ones(6, 5), r"must be of shape \(5, 6\)"), (torch.full((5, 6), torch.nan), "finite")):
        before = values(layer)
        with pytest.raises((RuntimeError, ValueError), match=why):
            layer.load_state_dict({"weight": wrong, "bias": torch.zeros(5)})
        assert all(torch.equal(now, then) for now, then in zip(layer.form.trained, before, strict=True))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"weight\""):
        layer.load_state_dict({"bias": torch.zeros(5)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"U\""):
        layer.load_state_dict({"weight": layer.form.matrix().detach(), "bias": torch.zeros(5), "U": torch.ones(1)})


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
@pytest.mark.parametrize("kind", DENSE)
def test_its_exact_state_goes_through_a_file_bit_for_bit(kind, form, tmp_path):
    _, layer, x = factorized(kind)
    keep(perturbed(layer), "most")
    {"dense": layer.to_dense, "svd": lambda: None, "pair": layer.to_pair}[form]()
    torch.save(layer.exact_state(), tmp_path / "state")
    other = factorized(kind)[1]
    with torch.no_grad():
        other.load_state_dict(layer.state_dict())  # where a dense weight is
    old, new = other.load_exact_state(torch.load(tmp_path / "state", weights_only=True))
    assert other.form.name == form and other.rank == layer.rank
    if form != "dense":
        assert all(torch.equal(a, b) for a, b in zip(other.form.trained, layer.form.trained, strict=True))
        assert torch.equal(other(x), nn.Sequential(layer)(x)) and len(old) == 3 and new == other.form.trained


def wrong_states(state):
    yield state | {"form": "cube"}, "expected a form out of dense, svd, pair, got 'cube'"
    yield {**state, "U": state["U"][:-1]}, r"expected U of shape \(5, 3\), got \(4, 5\)"
    yield {**state, "s": state["s"][:2]}, r"expected s of shape \(3,\), got \(2,\)"
    yield {key: value for key, value in state.items() if key != "V"}, r"expected V of shape \(6, 3\), got None"
    yield {**state, "V": state["V"] * torch.nan}, "V holds NaN or infinity"


@pytest.mark.parametrize("number", range(5))
def test_an_exact_state_of_another_layer_is_refused_by_name(number):
    layer = svd_of(nn.Linear(6, 5), name="fc")
    layer.keep(3)
    before = values(layer)
    state, why = [*wrong_states(layer.exact_state())][number]
    with pytest.raises(ValueError, match=rf"`fc`: {why}"):
        layer.load_exact_state(state)
    assert layer.rank == 3 and all(torch.equal(a, b) for a, b in zip(layer.form.trained, before, strict=True))


@pytest.mark.parametrize("kind", DENSE)
def test_a_copy_is_a_dense_layer_of_its_own(kind):
    dense, layer, x = factorized(kind)
    keep(layer, "most")
    before, twin = layer(x), copy.deepcopy(layer)
    assert type(twin) is type(dense) and {*vars(twin)} == {*vars(dense)}
    assert_same(twin(x), before, layer.matrix_shape)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", DENSE)
def test_a_copy_of_one_that_shows_its_factors_is_factorized_and_independent(kind):
    _, layer, x = factorized(kind)
    keep(layer, "most").show_factors()
    before, twin = layer(x), copy.deepcopy(layer)
    assert type(twin) is type(layer) and torch.equal(twin(x), before)
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in layer.parameters()}
    keep(twin, "one").to_pair()
    assert twin.rank == 1 and torch.equal(layer(x), before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", DENSE)
def test_shrinking_changes_storage_and_no_bit(kind, frozen):
    _, layer, x = factorized(kind)
    keep(layer, "most").requires_grad_(not frozen)
    rank, before, spectrum, old = layer.rank, layer(x), layer.spectrum(), layer.form.trained
    replaced = layer.shrink()
    assert replaced == (old, layer.form.trained) and layer.shrink() == ([], [])
    held = sum(factor.untyped_storage().nbytes() for factor in layer.form.trained)
    assert held == rank * layer.view.groups * (sum(layer.matrix_shape) + 1) * x.element_size()
    assert layer.rank == layer.form.room == rank
    assert layer.spectrum() == spectrum
    assert torch.equal(layer(x), before)
    assert {p.requires_grad for p in layer.form.trained} == {not frozen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", DENSE)
def test_cut_shrunken_and_plain_forms_compute_the_same(kind, ranks, dtype):
    _, layer, x = factorized(kind, dtype)
    keep(layer, ranks)
    expected, cut = rebuilt(layer, x), factored(layer, x)
    layer.shrink()
    for output in (cut, *(compute(x) for compute in ways(layer))):
        assert_same(output, expected, layer.matrix_shape, factor=8)
    if ranks != "none":
        layer.to_pair()
        for compute in ways(layer):
            assert_same(compute(x), expected, layer.matrix_shape, factor=8)


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
def test_moving_it_moves_what_it_trains_and_what_it_shows(form, shown):
    layer = svd_of(nn.Linear(6, 5))
    {"dense": layer.to_dense, "svd": lambda: None, "pair": layer.to_pair}[form]()
    if shown:
        layer.show_factors()
    names, face = [name for name, _ in layer.named_parameters()], layer.weight
    layer.double()
    assert [name for name, _ in layer.named_parameters()] == names and layer.weight is face
    assert face.dtype == torch.float64 == layer.weight.detach().dtype
    assert {p.dtype for p in (*layer.parameters(), *layer.form.trained)} == {torch.float64}
    assert layer(torch.randn(2, 6).double()).dtype == torch.float64
    layer.requires_grad_(False)
    assert not any(p.requires_grad for p in (*layer.parameters(), *layer.form.trained))


# --------------------------------------------------------------------------------------------- the weight that is shown


def test_what_a_weight_is_costs_nothing_and_its_values_are_those_of_the_factors(monkeypatch):
    dense, layer, _ = factorized("linear")
    face, computed, own = layer.weight, [], type(layer).rebuilt
    monkeypatch.setattr(type(layer), "rebuilt", lambda self: computed.append(1) or own(self))
    about = (face.shape, face.dtype, face.device, face.ndim, face.numel(), len(face), face.requires_grad, face.is_leaf)
    expected = (dense.weight.shape, torch.float64, dense.weight.device, 2, 30, 5, True, True)
    assert about == expected
    assert face.size(0) == 5 and face.element_size() == 8 and face.is_floating_point() and not face.is_cuda
    assert isinstance(face, nn.Parameter) and hash(face) == id(face) and not computed
    with torch._C.DisableTorchFunctionSubclass():
        assert face.untyped_storage().nbytes() == 8  # one number, and nothing of the weight's size
    assert_same(face.detach().clone(), dense.weight.detach(), (5, 6))
    assert type(face * 1.0) is torch.Tensor and type(face.detach().clone()) is torch.Tensor and computed


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.sum(),
        lambda w: torch.linalg.matrix_norm(w),
        lambda w: w.T @ w,
        lambda w: w[1:, 2],
        lambda w: torch.cat([w, w], 1),
        lambda w: torch.stack(list(w.unbind())),
        lambda w: w.view(-1).square(),
        lambda w: nn.functional.linear(torch.ones(2, 6, dtype=w.dtype), w),
        lambda w: torch.where(w > 0, w, 0.0),
        lambda w: 2.0 - w,
    ],
)
def test_functions_of_a_weight_are_those_of_the_dense_one_with_their_gradients(read):
    _, layer, _ = factorized("linear")
    expected = layer.view.fold(layer.form.matrix())
    mine, wanted = read(layer.weight), read(expected)
    assert torch.equal(mine, wanted)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torch.autograd.grad(mine.sum(), layer.form.trained),
            torch.autograd.grad(wanted.sum(), layer.form.trained),
            strict=True,
        )
    )


def test_its_gradient_is_that_of_the_factors_to_be_cleared_scaled_and_measured():
    _, layer, x = factorized("linear")
    assert layer.weight.grad is None
    layer(x).square().sum().backward()
    gradients = [p.grad.clone() for p in layer.form.trained]
    assert_same(layer.weight.grad.norm(), torch.cat([g.flatten() for g in gradients]).norm(), (5, 6))
    layer.weight.grad.mul_(0.5)
    assert all(torch.equal(p.grad, 0.5 * g) for p, g in zip(layer.form.trained, gradients, strict=True))
    layer.weight.grad.zero_()
    assert not any(p.grad.any() for p in layer.form.trained)
    layer.weight.grad = None
    assert all(p.grad is None for p in layer.form.trained) and layer.weight.grad is None
    layer(x).sum().backward()
    layer.zero_grad()
    assert all(p.grad is None for p in layer.form.trained)


@pytest.mark.parametrize("trained", [False, True])
def test_freezing_the_weight_freezes_the_factors(trained):
    _, layer, x = factorized("linear")
    layer.weight.requires_grad_(not trained)
    layer.weight.requires_grad = trained
    assert {p.requires_grad for p in (layer.weight, *layer.form.trained)} == {trained}
    layer(x).sum().backward()
    assert all((p.grad is not None) == trained for p in layer.form.trained)


def test_a_given_weight_is_what_functional_call_computes_with():
    _, layer, x = factorized("linear")
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bias = layer.bias.detach()
    output = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    assert torch.equal(output, nn.functional.linear(x, weight, bias))
    output.sum().backward()
    assert weight.grad is not None and layer.form.trained[0].grad is None
    assert type(layer.weight) is DenseWeight
