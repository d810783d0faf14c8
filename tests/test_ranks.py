"""Which ranks to keep: budgets are met, not wasted, and spent well; refusals say what is reachable."""

import itertools
import math
import re

import pytest
import torch
from helpers import assert_same, svd_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_svd.ranks.allocation import (
    cheapest,
    interpolate,
    keep_by_budget,
    keep_by_energy,
    share_above,
    smallest_cost,
)
from lightning_svd.ranks.costs import Cost, LayerCost, LayerLatency, ModelCost
from lightning_svd.ranks.importance import Importance, Spectrum

EPS = torch.finfo(torch.float64).eps
sides = st.integers(3, 40)
layer_costs = st.builds(
    # Two factors of a spatial convolution cost a little more or less than positions * (m + n).
    lambda m, n, positions, extra: LayerCost(m * n, m + n, positions * m * n, positions * (m + n) + extra),
    sides,
    sides,
    st.integers(1, 50),
    st.integers(0, 20),
)
thoroughly = settings(max_examples=300, deadline=None, derandomize=True)


def full_rank(layer):
    """min(m, n) from m n and m + n."""
    total, product = layer.params_per_rank, layer.dense_params
    return next(k for k in range(1, total) if k * (total - k) == product)


def problem(layers, other, seed):
    """A model of these layers, and energies as in training: decaying, in no order."""
    cost = ModelCost({str(i): layer for i, layer in enumerate(layers)}, other, other, batch_size=1)
    generator = torch.Generator().manual_seed(seed)
    energies = {}
    for name, layer in cost.layers.items():
        rank = full_rank(layer)
        decay = torch.rand((), generator=generator, dtype=torch.float64) ** torch.arange(rank)
        noise = torch.randn(rank, generator=generator, dtype=torch.float64).square()
        energies[name] = (decay * noise)[torch.randperm(rank, generator=generator)]
    return energies, cost


def allowed(layer, candidates, min_rank=1, round_to=1):
    """Every rank that a layer may have, written down from the documentation: cheaper than dense, or all it has."""
    multiple = max(part for part in (round_to, round_to // 2, round_to // 4, 1) if part <= max(1, layer.break_even))
    cheap = [k for k in range(min_rank, candidates + 1) if k % multiple == 0 and k <= layer.break_even]
    return cheap if cheap and candidates <= layer.break_even else [*cheap, candidates]


def value(energies, ranks):
    """Logarithm of what passes through all layers: the product of the shares of energy that they keep."""
    kept = {name: energy.sort(descending=True).values[: ranks[name]].sum() for name, energy in energies.items()}
    return sum(math.log(kept[name] / energies[name].sum()) for name in energies)


@thoroughly
@given(
    layers=st.lists(layer_costs, min_size=1, max_size=5),
    other=st.integers(0, 500),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    unit=st.sampled_from(["macs", "params"]),
    min_rank=st.integers(1, 6),
    round_to=st.sampled_from([1, 2, 4, 8]),
    already_kept=st.just(1.0) | st.floats(0.1, 1),
    bound=st.none() | st.integers(1, 8),
)
def test_a_budget_is_met_and_what_is_left_buys_nothing(
    layers, other, seed, share, unit, min_rank, round_to, already_kept, bound
):
    energies, cost = problem(layers, other, seed)
    energies = {name: energy[: max(1, round(already_kept * len(energy)))] for name, energy in energies.items()}
    full = {name: len(energy) for name, energy in energies.items()}
    bounds = {} if bound is None else {next(iter(full)): bound}
    least = smallest_cost(cost.by(unit), full, min_rank, round_to, bounds)
    budget = least + share * (cost.dense(unit) - least)
    ranks = keep_by_budget(energies, cost.by(unit), budget, min_rank, round_to, bounds)
    spent = cost.at(ranks, unit)
    assert spent <= budget
    for name, layer in cost.layers.items():
        ladder = allowed(layer, min(full[name], bounds.get(name, full[name])), min_rank, round_to)
        assert ranks[name] in ladder
        for more in ladder[ladder.index(ranks[name]) + 1 :]:
            assert spent + layer.at(more, unit) - layer.at(ranks[name], unit) > budget


@thoroughly
@given(layers=st.lists(layer_costs, min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_the_dense_cost_as_budget_keeps_everything(unit, layers, seed):
    energies, cost = problem(layers, 7, seed)
    ranks = keep_by_budget(energies, cost.by(unit), cost.dense(unit))
    assert ranks == {name: len(energy) for name, energy in energies.items()}


def largest_hull_gain(layer, energy, unit):
    """What the most valuable segment of the upper concave hull of (cost, log share of energy) is worth."""
    shares = energy.sort(descending=True).values.cumsum(0) / energy.sum()
    points = [(layer.at(k, unit), math.log(shares[k - 1])) for k in allowed(layer, len(energy))]
    gains = [0.0]
    while len(points) > 1:
        slopes = [(v - points[0][1]) / (c - points[0][0]) for c, v in points[1:]]
        steepest = 1 + max(range(len(slopes)), key=slopes.__getitem__)
        gains.append(points[steepest][1] - points[0][1])
        points = points[steepest:]
    return max(gains)


small = st.integers(3, 7)
small_costs = st.builds(
    lambda m, n, p: LayerCost(m * n, m + n, p * m * n, p * (m + n)), small, small, st.integers(1, 9)
)


@thoroughly
@given(
    layers=st.lists(small_costs, min_size=2, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1),
    unit=st.sampled_from(["macs", "params"]),
)
def test_greedy_misses_the_optimum_by_less_than_one_step(layers, seed, share, unit):
    # Dantzig 1957: filled along concave hulls, a knapsack is optimal up to the first step that no longer fits.
    energies, cost = problem(layers, 0, seed)
    ladders = [allowed(layer, len(energies[name])) for name, layer in cost.layers.items()]
    choices = [dict(zip(energies, choice, strict=True)) for choice in itertools.product(*ladders)]
    costs = [cost.at(choice, unit) for choice in choices]
    budget = min(costs) + share * (max(costs) - min(costs))
    best = max(value(energies, choice) for choice, price in zip(choices, costs, strict=True) if price <= budget)
    step = max(largest_hull_gain(layer, energies[name], unit) for name, layer in cost.layers.items())
    found = value(energies, keep_by_budget(energies, cost.by(unit), budget))
    rounding = 100 * EPS  # of sums of shares and logarithms, each of order 1
    assert best - step - rounding <= found <= best + rounding


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_a_global_budget_beats_the_same_rank_ratio_everywhere(seed, target):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(16, 64, (8, 3), generator=generator).tolist()
    energies, cost = problem([LayerCost(m * n, m + n, p * m * n, p * (m + n)) for m, n, p in sizes], 0, seed)
    budget = target * cost.dense("macs")
    uniform = [{name: max(1, k * len(energy) // 64) for name, energy in energies.items()} for k in range(1, 65)]
    affordable = [value(energies, ranks) for ranks in uniform if cost.at(ranks, "macs") <= budget]
    assert value(energies, keep_by_budget(energies, cost.by("macs"), budget)) > max(affordable)


def test_flat_spectra_are_better_served_by_one_dense_layer():
    # 10 x 10, flat: a rank costs 20 and brings a tenth, dense costs 100 and brings all. 140 buys 4 and 3 ranks, of
    # which 0.12 passes, or all and 2, of which 0.2 does: found along the hull, never rank by rank.
    cost = ModelCost({"a": LayerCost(100, 20, 100, 20), "b": LayerCost(100, 20, 100, 20)}, 0, 0, 1)
    ranks = keep_by_budget({"a": torch.ones(10), "b": torch.ones(10)}, cost.by("macs"), 140)
    assert sorted(ranks.values()) == [2, 10]


def test_each_layer_counts_by_its_own_scale():
    layers = [LayerCost(100, 20, 100, 20), LayerCost(100, 20, 100, 20)]
    energies, cost = problem(layers, 0, seed=0)
    louder = {"0": energies["0"] * 1e12, "1": energies["1"]}
    assert keep_by_budget(louder, cost.by("macs"), 120) == keep_by_budget(energies, cost.by("macs"), 120)


@thoroughly
@given(layers=st.lists(layer_costs, min_size=1, max_size=4), other=st.integers(0, 5000), seed=st.integers(0, 9))
def test_an_unreachable_budget_names_the_smallest_that_is_reachable(layers, other, seed):
    energies, cost = problem(layers, other, seed)
    full = {name: len(energy) for name, energy in energies.items()}
    least = smallest_cost(cost.by("params"), full)
    assume(least < cost.dense("params"))
    with pytest.raises(ValueError, match="the budget must be at least") as refused:
        keep_by_budget(energies, cost.by("params"), least - 1)
    named = float(re.search(r"at least ([\d.]+) of the dense model's cost", str(refused.value))[1])
    assert named == pytest.approx(least / cost.dense("params"), abs=1e-4)  # four decimals
    # Whoever takes the message at its word must get through.
    assert keep_by_budget(energies, cost.by("params"), named * cost.dense("params"))


def test_a_layer_smaller_than_min_rank_keeps_every_rank():
    energies, cost = problem([LayerCost(12, 7, 12, 7)], 0, seed=0)
    assert keep_by_budget(energies, cost.by("macs"), 12, min_rank=5) == {"0": 3}


def test_a_layer_that_carries_nothing_does_not_disturb():
    _, cost = problem([LayerCost(100, 20, 100, 20)] * 2, 0, seed=0)
    ranks = keep_by_budget({"0": torch.zeros(10), "1": torch.ones(10)}, cost.by("macs"), 120)
    assert ranks["1"] == 10


# ----------------------------------------------------------------------------------------------------------- by energy

TEN = ModelCost({"fc": LayerCost(100, 20)}, 0)  # 10 x 10, break-even 4


@pytest.mark.parametrize(
    ("energy", "threshold", "options", "rank"),
    [
        ([100, 1, 1, 1, 0, 0, 0, 0, 0, 0], 0.75, {}, 1),
        ([0, 0, 1, 0, 1, 0, 0, 0, 0, 0], 0.9, {}, 2),
        ([100, 1, 1, 1, 0, 0, 0, 0, 0, 0], 1.0, {}, 4),
        ([100, 1, 1, 1, 0, 0, 0, 0, 0, 0], 0.75, {"min_rank": 3}, 3),
        ([100, 1, 1, 1, 0, 0, 0, 0, 0, 0], 0.75, {"round_to": 2}, 2),
        ([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], 0.9, {}, 10),  # 5 of 10 would cost as much as dense
        ([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], 0.9, {"round_to": 8}, 4),  # the largest half of 8 below break-even
        ([1, 1, 1], 1.0, {}, 3),
        ([1, 1, 1], 0.5, {"round_to": 4}, 3),  # no more than there are
        ([0, 0, 0], 0.5, {}, 1),
        ([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], 0.9, {"max_ranks": {"fc": 2}}, 2),
        ([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], 0.9, {"max_ranks": {"fc": 2}, "min_rank": 3}, 2),
    ],
)
def test_keep_by_energy_by_hand(energy, threshold, options, rank):
    energies = {"fc": torch.tensor(energy, dtype=torch.float32)}
    assert keep_by_energy(energies, TEN.by("params"), threshold, **options) == {"fc": rank}


# ------------------------------------------------------------------------------------------------------- in between


def test_interpolation_leads_from_full_to_final():
    full, final = {"a": 64, "b": 10, "c": 7}, {"a": 3, "b": 10, "c": 1}
    assert interpolate(full, final, 0.0) == full
    assert interpolate(full, final, 1.0) == final
    assert interpolate(full, final, 0.5) == {"a": 34, "b": 10, "c": 4}


@thoroughly
@given(full=st.integers(1, 4096), kept=st.floats(0, 1), removed=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_interpolation_never_turns_back(full, kept, removed):
    final = round(kept * full)
    earlier, later = (interpolate({"a": full}, {"a": final}, share)["a"] for share in sorted(removed))
    assert final <= later <= earlier <= full


# --------------------------------------------------------------------------------------------------------------- costs


@thoroughly
@given(layers=st.lists(layer_costs, min_size=1, max_size=4), other=st.integers(0, 500), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_cost_in_one_unit_is_the_models_and_adds_up(unit, layers, other, seed):
    energies, model = problem(layers, other, seed)
    cost, generator = model.by(unit), torch.Generator().manual_seed(seed)
    ranks = {name: int(torch.randint(0, len(e) + 1, (), generator=generator)) for name, e in energies.items()}
    assert cost.total(ranks) == model.at(ranks, unit)
    assert model.ratio(ranks, unit) == model.at(ranks, unit) / max(1, model.dense(unit))
    assert cost.rest() == other and cost.dense() == model.dense(unit)
    for name, layer in model.layers.items():
        most = len(energies[name])
        assert cost.at(name, most) == layer.dense(unit)
        assert list(cost.ladder(name, most, 1, 1)) == allowed(layer, most)
        assert cost.at(name, 1) == (layer.per_rank(unit) if layer.pays(1) else layer.dense(unit))


def test_a_budget_that_is_exactly_the_least_is_met_however_its_share_rounds():
    least, dense = 15, 22
    assert least / dense * dense < least
    cost = ModelCost({"0": LayerCost(dense, least, dense, least)}, 0).by("params")
    assert keep_by_budget({"0": torch.ones(2)}, cost, cost.budget(least / dense)) == {"0": 1}


def test_a_layer_whose_factors_are_slower_costs_what_the_dense_one_does():
    fast, slow = LayerLatency(2.0, ((3, 1.0),)), LayerLatency(1.0, ((3, 2.0),))
    assert [LayerCost(100, 20, 100, 20, latency=each).at(3, "macs") for each in (None, fast, slow)] == [60, 60, 100]


class Squared(Cost):
    """A price of its own: a rank costs its square, dense costs 60."""

    def at(self, name, rank):
        return min(60.0, float(rank**2))

    def rest(self):
        return 5.0

    def dense(self):
        return 5.0 + 2 * 60.0

    def ladder(self, name, candidates, min_rank, round_to):
        yield from range(min_rank, candidates + 1, round_to)


def test_ranks_are_allocated_by_any_cost():
    energies = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([9.0, 0.1, 0.1, 0.1])}
    ranks = keep_by_budget(energies, Squared(), 5 + 16 + 1)
    assert ranks == {"a": 4, "b": 1} and Squared().total(ranks) == 22
    assert keep_by_energy(energies, Squared(), 0.95) == {"a": 4, "b": 1}
    assert smallest_cost(Squared(), {"a": 4, "b": 4}, min_rank=2) == 5 + 4 + 4


@thoroughly
@given(st.floats(0, 1))
def test_the_share_that_a_refusal_names_is_enough_and_short(share):
    assert share <= share_above(share) <= share + 1.01e-4
    assert len(str(share_above(share))) <= 6


# ------------------------------------------------------------------------------------------------ what a rank carries


BUILDS = {
    "linear": lambda: nn.Linear(7, 9),
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUILDS)
def test_a_rank_carries_the_square_of_its_singular_value_summed_over_groups(kind, dtype, form):
    layer, importance = svd_of(BUILDS[kind]().to(dtype)), Spectrum()
    with torch.no_grad():
        for parameter in layer.form.trained:
            parameter.add_(0.2 * torch.randn_like(parameter))
    {"dense": layer.to_dense, "svd": lambda: layer.keep(3), "pair": layer.to_pair}[form]()
    factors = importance.factors(layer)
    wide = torch.promote_types(dtype, torch.float32)
    assert {factor.dtype for factor in factors} == {wide}
    squares = torch.linalg.svdvals(layer.view.unfold(layer.rebuilt().detach()).to(wide))[..., : layer.rank].square()
    carried = importance.values(factors)
    # The weight itself is rounded once to its own dtype.
    factor = 2 * torch.finfo(dtype).eps / torch.finfo(wide).eps if dtype == torch.bfloat16 else 32
    assert_same(carried, squares if squares.ndim == 1 else squares.sum(0), layer.matrix_shape, factor)
    assert (carried.diff() <= 0).all() and len(carried) == layer.rank


def test_of_what_is_not_finite_importance_tells_the_layers_name():
    layer = svd_of(nn.Linear(4, 4), name="head")
    with torch.no_grad():
        layer.form.parameters["s"][0] = torch.nan
    with pytest.raises(ValueError, match="`head`: expected finite weights"):
        Spectrum().factors(layer)


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
@pytest.mark.parametrize("kind", BUILDS)
def test_layers_alike_have_their_exact_factors_in_a_stack(kind, form):
    torch.manual_seed(0)
    layers = [svd_of(BUILDS[kind](), name=f"{number}") for number in range(3)]
    for layer in layers:
        with torch.no_grad():
            for parameter in layer.form.trained:
                parameter.add_(0.2 * torch.randn_like(parameter))
        {"dense": layer.to_dense, "svd": lambda layer=layer: layer.keep(3), "pair": layer.to_pair}[form]()
    together = Spectrum().factors_of(layers)
    for number, layer in enumerate(layers):
        for mine, alone in zip(together, Spectrum().factors(layer), strict=True):
            torch.testing.assert_close(mine[number], alone)
    with torch.no_grad():
        layers[1].form.trained[0].view(-1)[0] = torch.inf
    with pytest.raises(ValueError, match="`1`: expected finite weights"):
        Spectrum().factors_of(layers)


def test_importance_is_what_a_class_of_ones_own_may_say():
    with pytest.raises(TypeError, match="abstract"):
        Importance()


@pytest.mark.parametrize(
    ("most", "expected"), [(0, set()), (9, set()), (10, {"a"}), (29, {"a"}), (30, {"a", "c"}), (1000, {"a", "b", "c"})]
)
def test_the_cheapest_layers_are_as_many_as_do_not_cost_more_together(most, expected):
    cost = ModelCost({name: LayerCost(price, price) for name, price in {"a": 10, "b": 40, "c": 20}.items()}, 100)
    full = dict.fromkeys("abc", 1)
    assert cheapest(cost.by("params"), full, most) == expected


def test_what_is_left_of_a_budget_is_spent_by_a_trade():
    wide, small = LayerCost(6400, 160, 6400, 160), LayerCost(1600, 80, 1600, 80)
    cost = ModelCost({"wide": wide, "small": small}, 0, 0, batch_size=1)
    energies = {"wide": torch.tensor([9.0, 8.0, 7.0, 6.0]), "small": torch.tensor([9.0, 5.0, 4.0])}
    # 4 ranks of "small" could be paid beside one of "wide", and there are 3: two of "wide" leave room for 2.
    for budget in (480.0, 470.0):
        ranks = keep_by_budget(energies, cost.by("params"), budget, adds_up=True)
        assert ranks == {480.0: {"wide": 2, "small": 2}, 470.0: {"wide": 1, "small": 3}}[budget]
