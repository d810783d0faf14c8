"""Closed-form penalties and gradients, held against autograd on the formula as the paper writes it."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same, svd_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_svd import SVDTraining
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.matrices import roundoff
from lightning_svd.model.surgery import decompose
from lightning_svd.training.regularizers import (
    COLUMNS,
    SPARSITY,
    Regularizer,
    add_gradients,
    centralize,
    hoyer,
    orthogonality,
)

FORMULAS = {
    "l1": lambda s: s.abs().sum(),
    "hoyer": lambda s: s.abs().sum() / s.square().sum().sqrt(),
    "hoyer_square": lambda s: s.abs().sum().square() / s.square().sum(),
    "group_lasso": lambda s: sum(torch.linalg.vector_norm(s[first:]) for first in range(len(s))),
}


def orthogonality_formula(A):
    rank = A.shape[1]
    return (A.mT @ A - torch.eye(rank, dtype=A.dtype)).square().sum() / rank**2


@pytest.mark.parametrize("name", SPARSITY)
@pytest.mark.parametrize(
    "entries",
    [
        [3.0, 1.0, 0.5, 0.1],
        [-3.0, 1.0, -0.5],
        [2.0, 0.0, 1.0, 0.0],
        [2.0, 2.0, 2.0],
        [-7.0],
        [1e-30, 2e-30],
        [1e30, 1.0],
    ],
)
def test_sparsity_and_its_gradient_are_those_of_the_formula(name, entries):
    s = torch.tensor(entries, dtype=torch.float64, requires_grad=True)
    expected = FORMULAS[name](s)
    (expected_gradient,) = torch.autograd.grad(expected, s)
    value, gradient = SPARSITY[name](s.detach())
    assert_same(value, expected.detach(), s.shape)
    # The gradient is a difference that may cancel, of terms of the size value / |s|.
    error = (gradient - expected_gradient).abs().max()
    assert error <= roundoff(s.shape, s.dtype) * value / s.detach().norm()


@pytest.mark.parametrize("name", SPARSITY)
@pytest.mark.parametrize(
    "entries",
    [[], [0.0], [0.0, 0.0, 0.0], [3.0], [2.0] * 5, [1.0, 0.0, 2.0], [1e-30] * 4, [1e30] * 4, [1e30, 1e-30], [-1e-30]],
)
def test_sparsity_is_finite_in_float32_at_any_scale(name, entries):
    s = torch.tensor(entries)
    value, gradient = SPARSITY[name](s)
    assert value.isfinite() and gradient.isfinite().all()
    assert gradient.shape == s.shape
    if not s.any():
        assert value == 0 and not gradient.any()


def test_hoyer_does_not_depend_on_the_scale():
    s = torch.tensor([3.0, 1.0, -0.5, 0.0])
    value, gradient = hoyer(s)
    for scale in (2.0**60, 2.0**-60):  # exact, unlike a power of ten
        scaled_value, scaled_gradient = hoyer(scale * s)
        assert scaled_value == value
        assert torch.equal(scaled_gradient * scale, gradient)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=16).filter(any))
def test_hoyer_lies_between_one_and_the_root_of_the_rank(entries):
    s = torch.tensor(entries)
    tolerance = 1 + roundoff(s.shape, s.dtype)
    assert 1 / tolerance <= hoyer(s)[0] <= len(s) ** 0.5 * tolerance


@pytest.mark.parametrize(("rank", "direction"), [(1, 0), (4, -1)])
def test_hoyer_pulls_small_values_down_and_lets_large_ones_grow(rank, direction):
    s = torch.tensor([4.0, 1.0, 1.0, 0.5], dtype=torch.float64)[:rank]
    gradient = hoyer(s)[1]
    assert gradient[0].sign() == direction
    assert (gradient[1:] > 0).all()


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 5), (5, 1)])
def test_orthogonality_and_its_gradient_are_those_of_the_formula(shape):
    A = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    expected = orthogonality_formula(A)
    (expected_gradient,) = torch.autograd.grad(expected, A)
    value, gradient = orthogonality(A.detach())
    assert_same(value, expected.detach(), shape)
    assert_same(gradient, expected_gradient, shape)


def test_orthogonality_of_no_rank_is_zero():
    value, gradient = orthogonality(torch.empty(5, 0))
    assert value == 0 and gradient.shape == (5, 0)


# ------------------------------------------------------------------------------------------------------- add_gradients


def model(pruned=True):
    """Two layers away from orthonormality, one of them pruned, with gradients of a loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Flatten(), nn.Linear(6, 5)).double()
    decompose(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if pruned:
        net[0].keep(4)
    net(torch.randn(2, 3, 3, 3, dtype=torch.float64)).square().sum().backward()
    return net


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("sparsity", [*SPARSITY, None])
def test_gradients_are_those_of_loss_plus_penalty(sparsity, pruned):
    net, twin = model(pruned), model(pruned)
    factors = [layer.factors() for layer in svd_layers(twin).values()]
    straightness = sum(orthogonality_formula(A) for U, _, V in factors for A in (U, V))
    sparseness = sum(FORMULAS[sparsity](s) for _, s, _ in factors) if sparsity else torch.tensor(0.0).double()
    (0.7 * straightness + 0.3 * sparseness).backward()  # adds to the gradients of the loss
    penalties = add_gradients(svd_layers(net).values(), 0.7, sparsity, 0.3)
    shape = net[0].matrix_shape
    assert_same(penalties.orthogonality, straightness.detach(), shape)
    assert_same(penalties.sparsity, sparseness.detach(), shape)
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert_same(p.grad, q.grad, shape), name


def test_only_kept_ranks_get_exactly_weight_times_gradient():
    net = model()
    layer = net[0]
    kept = torch.arange(layer.full_rank) < layer.rank
    before = {name: p.grad.clone() for name, p in layer.named_parameters()}
    added = {"U": orthogonality(layer.U[:, kept]), "V": orthogonality(layer.V[:, kept]), "s": hoyer(layer.s[kept])}
    add_gradients([layer], orthogonality_weight=0.5, sparsity="hoyer", sparsity_weight=0.25)
    for name, weight in (("U", 0.5), ("V", 0.5), ("s", 0.25)):
        grad = getattr(layer, name).grad
        assert torch.equal(grad[..., ~kept], before[name][..., ~kept])
        assert torch.equal(grad[..., kept], before[name][..., kept] + weight * added[name][1].detach())
    assert torch.equal(layer.bias.grad, before["bias"])


def test_a_missing_gradient_is_created_like_backward_does():
    layer = copy.deepcopy(model())[0]
    layer.zero_grad(set_to_none=True)
    add_gradients([layer], orthogonality_weight=1.0, sparsity="l1", sparsity_weight=1.0)
    assert all(getattr(layer, name).grad.any() for name in "UsV")
    assert all(getattr(layer, name).grad.is_contiguous() for name in "UsV")
    assert not layer.s.grad[layer.rank :].any()
    assert layer.bias.grad is None


def test_a_frozen_factor_is_left_alone():
    layer = model()[0]
    layer.zero_grad(set_to_none=True)
    layer.U.requires_grad_(False)
    layer.s.requires_grad_(False)
    add_gradients([layer], sparsity_weight=1.0)
    assert layer.U.grad is None and layer.s.grad is None
    assert layer.V.grad is not None


def test_a_weight_of_zero_adds_nothing_but_still_measures():
    layer = model()[0]
    layer.zero_grad(set_to_none=True)
    penalties = add_gradients([layer], orthogonality_weight=0.0, sparsity_weight=0.0)
    assert all(p.grad is None for p in layer.parameters())
    assert penalties.orthogonality > 0 and penalties.sparsity > 0


def test_orthogonality_error_is_zero_when_orthonormal_and_per_rank_otherwise():
    layer = nn.Sequential(nn.Linear(6, 5)).double()
    decompose(layer)
    factorized = layer[0]
    assert add_gradients([factorized]).orthogonality_error <= roundoff((6, 5), torch.float64)
    with torch.no_grad():
        factorized.U.mul_(2)  # U'U - I = 3 I, V'V - I = 0: the mean of 9 and 0 over both factors' ranks
    error = add_gradients([factorized]).orthogonality_error
    assert float(error) == pytest.approx(4.5**0.5, rel=roundoff((6, 5), torch.float64))


@pytest.mark.parametrize("sparsity", SPARSITY)
def test_layers_of_one_shape_computed_together_get_what_each_gets_alone(sparsity):
    together = nn.Sequential(*(nn.Linear(7, 9, dtype=torch.float64) for _ in range(4)), nn.Linear(7, 5).double())
    decompose(together)
    with torch.no_grad():
        for p in together.parameters():
            p.add_(0.2 * torch.randn_like(p))  # factors that are not orthonormal
    alone = copy.deepcopy(together)
    for net in (together, alone):
        net[1].keep(6)  # a rank of its own
    penalties = add_gradients(svd_layers(together).values(), 2.0, sparsity, 0.3)
    singly = [add_gradients([layer], 2.0, sparsity, 0.3) for layer in svd_layers(alone).values()]
    for p, q in zip(together.parameters(), alone.parameters(), strict=True):
        if q.grad is not None:
            assert_same(p.grad, q.grad, (9, 7))
    assert_same(penalties.sparsity, sum(one.sparsity for one in singly), (9, 7))


@pytest.mark.parametrize("ranks", [COLUMNS - 1, COLUMNS, COLUMNS + 1, 3 * COLUMNS, 3 * COLUMNS + 7])
@pytest.mark.parametrize("pruned", [False, True])
def test_over_its_turns_every_column_is_pulled_as_by_the_whole_gram_matrix(ranks, pruned):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(ranks + 5, ranks, dtype=torch.float64) for _ in range(2)))
    decompose(net)
    with torch.no_grad():
        for layer in net:
            layer.U.add_(0.1 * torch.randn_like(layer.U))
            layer.V.add_(0.1 * torch.randn_like(layer.V))
            if pruned:
                layer.keep(ranks - ranks // 5)
    whole, turns = copy.deepcopy(net), 2 * -(-net[0].rank // COLUMNS) if net[0].rank > COLUMNS else 1
    expected = add_gradients(whole, 0.7, None)
    penalties = [add_gradients(net, 0.7, None, step=3 + step) for step in range(turns)]
    for p, q in zip(net.parameters(), whole.parameters(), strict=True):
        if q.grad is not None:
            assert_same(p.grad / turns, q.grad, (ranks + 5, ranks))
    mean = sum(penalty.orthogonality for penalty in penalties) / turns
    assert_same(mean, expected.orthogonality, (ranks + 5, ranks))


def test_a_step_touches_only_the_columns_whose_turn_it_is():
    layer = nn.Sequential(nn.Linear(2 * COLUMNS, 2 * COLUMNS))
    decompose(layer)
    with torch.no_grad():
        for factor in (layer[0].U, layer[0].V):
            factor.mul_(1.1)
    for step, (turned, other) in enumerate([("U", "V"), ("V", "U")], start=2):
        layer.zero_grad()
        add_gradients(svd_layers(layer).values(), sparsity=None, step=step)
        gradient = getattr(layer[0], turned).grad
        assert not gradient[:, :COLUMNS].any() and gradient[:, COLUMNS:].any()
        assert getattr(layer[0], other).grad is None


@pytest.mark.parametrize("form", ["pair", "dense"])
def test_what_is_no_svd_has_no_penalty(form):
    net = model()
    getattr(net[0], f"to_{form}")()
    before = [p.grad for p in net[0].form.trained]
    penalties = add_gradients(svd_layers(net).values(), 0.7, "hoyer", 0.3)
    assert all(p.grad is was for p, was in zip(net[0].form.trained, before, strict=True))
    alone = add_gradients([model()[2]], 0.7, "hoyer", 0.3)
    assert penalties.orthogonality == alone.orthogonality and penalties.sparsity == alone.sparsity
    none = add_gradients([net[0]], 0.7, "hoyer", 0.3)
    assert none.orthogonality == none.sparsity == none.orthogonality_error == 0


@pytest.mark.parametrize("collection", [list, frozenset])
def test_where_an_optimizer_holds_some_factors_only_those_get_a_gradient(collection):
    layer = model()[0]
    before = {name: p.grad.clone() for name, p in layer.form.parameters.items()}
    add_gradients([layer], 0.7, "hoyer", 0.3, only=collection([layer.U]))
    assert not torch.equal(layer.U.grad, before["U"])
    assert torch.equal(layer.s.grad, before["s"]) and torch.equal(layer.V.grad, before["V"])


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_scaled_gradients_get_the_penalty_at_their_scale(scale):
    net, scaled = model(), model()
    for p in scaled.parameters():
        p.grad.mul_(scale)
    add_gradients(svd_layers(net).values(), 0.7, "hoyer", 0.3)
    add_gradients(svd_layers(scaled).values(), 0.7, "hoyer", 0.3, scale)
    for p, q in zip(net.parameters(), scaled.parameters(), strict=True):
        assert_same(q.grad / scale, p.grad, net[0].matrix_shape)


def test_in_half_precision_or_tf32_the_penalty_is_computed_exactly():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 40))
    decompose(net)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            error = add_gradients(net).orthogonality_error
    finally:
        torch.set_float32_matmul_precision(before)
    assert error <= roundoff((48, 40), torch.float32)


# ------------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "l2"}, "`sparsity` must be one of 'hoyer', 'hoyer_square', 'l1', 'group_lasso', None, got 'l2'"),
        ({"sparsity_weight": -1.0}, "`sparsity_weight` must be a finite number >= 0, got -1.0"),
        ({"sparsity_weight": "0.1"}, "`sparsity_weight` must be a finite number >= 0, got '0.1'"),
        ({"orthogonality_weight": float("inf")}, "`orthogonality_weight` must be a finite number >= 0, got inf"),
    ],
)
def test_a_regularizer_names_the_argument_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Regularizer(**arguments)


@pytest.mark.parametrize(
    ("name", "weight"),
    [("hoyer", 2e-3), ("hoyer_square", 2e-4), ("l1", 5e-4), ("group_lasso", 5e-5), (None, 0.0)],
)
def test_each_penalty_has_a_weight_of_its_own_unless_one_is_given(name, weight):
    assert Regularizer(name).sparsity_weight == weight
    assert Regularizer(name, 0.5).sparsity_weight == 0.5


def test_a_regularizer_says_what_it_is_in_a_copy_and_a_pickle_too():
    regularizer = Regularizer("l1", orthogonality_weight=3.0)
    for same in (regularizer, copy.deepcopy(regularizer), pickle.loads(pickle.dumps(regularizer))):
        shown = "sparsity='l1', sparsity_weight=0.0005, orthogonality_weight=3.0, centralize=False"
        assert repr(same) == f"Regularizer({shown})"
        assert same == regularizer


# ----------------------------------------------------------------------------------------------- centralized gradients


def centered(gradient):
    """Of the gradient of a weight, as the paper has it: over all but the outputs."""
    return gradient - gradient.mean(tuple(range(1, gradient.ndim)), keepdim=True)


@pytest.mark.parametrize("form", ["svd", "pair", "dense"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [(lambda: nn.Linear(7, 5), (6, 7)), (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 5, 5))],
    ids=["linear", "grouped conv"],
)
def test_centered_factors_get_what_the_centered_gradient_of_the_weight_gives_them(build, shape, form):
    torch.manual_seed(0)
    dense = build().double()
    layer = svd_of(copy.deepcopy(dense), form="dense" if form == "dense" else "svd")
    if form == "pair":
        layer.to_pair()
    x = torch.randn(shape, dtype=torch.float64)
    for module in (dense, layer):
        module(x).sin().sum().backward()
    G = layer.view.unfold(centered(dense.weight.grad))
    before = [p.grad.clone() for p in layer.form.trained]
    centralize([layer])
    if form == "dense":
        expected = [centered(dense.weight.grad)]
    elif form == "svd":
        U, s, _ = (p.detach() for p in layer.form.trained)
        expected = [*before[:2], G.mT @ U * s.unsqueeze(-2)]
    else:
        expected = [before[0], G.mT @ layer.form.trained[0].detach()]
    for p, value in zip(layer.form.trained, expected, strict=True):
        assert_same(p.grad, value, layer.matrix_shape)
    assert not torch.allclose(before[-1], expected[-1])


def test_a_run_that_centralizes_moves_no_mean_over_the_inputs_but_of_the_penalties():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    regularizer = Regularizer(None, orthogonality_weight=0.0, centralize=True)
    run = SVDTraining(model, torch.optim.SGD(model.parameters(), 0.1), 5, target_params=0.9, regularizer=regularizer)
    V = run.layers["0"].form.parameters["V"]
    means, before = V.detach().mean(0), V.detach().clone()
    model(torch.randn(9, 6, dtype=torch.float64) + 1).square().sum().backward()
    run.step()
    assert_same(V.detach().mean(0), means, (6, 5))
    assert not torch.allclose(V, before)
