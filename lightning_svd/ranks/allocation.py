"""Which ranks to keep: by energy in each layer, or by a budget over the whole model.

Everything here decides and nothing acts: numbers in, numbers out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_svd.layers.matrices import energy_rank
from lightning_svd.ranks.costs import Cost

WORTH_A_TRADE = 0.01  # share of a budget that is not left unspent if layers can make room for one another


def keep_by_energy(
    energies: Mapping[str, Tensor],
    cost: Cost,
    threshold: float,
    min_rank: int = 1,
    round_to: int = 1,
    max_ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks that hold ``threshold`` of each layer's energy (Yang et al. 2020, section 3.3).

    A layer whose factors would then cost as much as the dense one keeps every rank.

    Args:
        energies: For each layer what each of its candidate ranks carries, (k,).
        cost: Of the model, for the break-even ranks.
        threshold: Share of the energy to keep, in (0, 1].
        min_rank: Fewest ranks of a layer.
        round_to: Ranks are rounded up to a multiple of this.
        max_ranks: The most ranks of some layers.
    """
    ranks = {}
    for name, energy in energies.items():
        wanted = max(min_rank, energy_rank(energy.sqrt(), threshold))
        ranks[name] = next(cost.ladder(name, _most(name, len(energy), max_ranks), wanted, round_to))
    return ranks


def smallest_cost(
    cost: Cost,
    full_ranks: Mapping[str, int],
    min_rank: int = 1,
    round_to: int = 1,
    max_ranks: Mapping[str, int] | None = None,
) -> float:
    """What the model costs when every layer keeps as little as it may."""
    least = {
        name: next(cost.ladder(name, _most(name, full, max_ranks), min_rank, round_to))
        for name, full in full_ranks.items()
    }
    return cost.total(least)


def share_above(share: float) -> float:
    """A short number not below ``share``, to be named in a message and used in its place."""
    return math.ceil(share * 1e4) / 1e4


def keep_by_budget(
    energies: Mapping[str, Tensor],
    cost: Cost,
    budget: float,
    min_rank: int = 1,
    round_to: int = 1,
    max_ranks: Mapping[str, int] | None = None,
    adds_up: bool = False,
) -> dict[str, int]:
    """Ranks whose cost fits a budget over the whole model and which carry the most.

    Each layer's energy counts as a share of the layer's own, since normalization layers make a layer's scale
    arbitrary; and what passes through all layers is about the product of these shares, so the sum of their logarithms
    is what is maximized (the plain sum would starve some layers for others where spectra are flat). Where what ranks
    carry is measured in what the loss feels, the plain sum is. This is a knapsack. It is filled greedily along each
    layer's upper concave hull of (cost, value), whose last point is the dense layer with every rank, and what is then
    left over goes to the single ranks that still fit.

    Args:
        energies: For each layer what each of its candidate ranks carries, (k,).
        cost: Of the model.
        budget: Largest allowed cost of the model, in the unit of ``cost``.
        min_rank: Fewest ranks of a layer.
        round_to: Ranks below the break-even are multiples of this.
        max_ranks: The most ranks of some layers.
        adds_up: Whether what ranks of different layers carry is in one unit, and is maximized as it is.

    Returns:
        For each layer how many of its strongest candidates to keep; as many as it may where it is better left dense.

    Raises:
        ValueError: If the smallest reachable cost is above the budget.
    """
    ladders = {
        name: list(cost.ladder(name, _most(name, len(energy), max_ranks), min_rank, round_to))
        for name, energy in energies.items()
    }
    ranks = {name: ladder[0] for name, ladder in ladders.items()}
    spent = cost.total(ranks)
    if spent > budget * (1 + 1e-12):  # a share of a count rounds
        least, got = share_above(cost.share(spent)), cost.share(budget)
        raise ValueError(f"the budget must be at least {least} of the dense model's cost, got {got:.6g}")
    curves = {name: _curve(cost, name, energies[name], ladders[name], adds_up) for name in ladders}
    for only_hull in (True, False):
        spent = _fill(ranks, curves, spent, budget, only_hull)
    while budget - spent > WORTH_A_TRADE * budget and (gained := _trade(ranks, curves, budget - spent)):
        spent += gained
    return ranks


def _most(name: str, candidates: int, max_ranks: Mapping[str, int] | None) -> int:
    """How many of its candidates a layer may keep."""
    return min(candidates, (max_ranks or {}).get(name, candidates))


Curve = list[tuple[int, float, float]]  # rank, cost, value: the logarithm of a share, or what adds up; ascending


def _curve(cost: Cost, name: str, energy: Tensor, ladder: list[int], adds_up: bool) -> Curve:
    energy = energy.double() if adds_up else energy.double().sort(descending=True).values
    carried = energy.cumsum(0)
    carried = torch.cat([carried.new_zeros(1), carried])
    if not adds_up:
        carried = (carried / carried[-1] if carried[-1] > 0 else torch.ones_like(carried)).log()
    # One list of numbers: a tensor read entry by entry costs microseconds each, and there are many ranks.
    values = carried.tolist()
    return [(rank, cost.at(name, rank), values[rank]) for rank in ladder]


def _hull(curve: Curve) -> Curve:
    """The points of the upper concave hull, the first and the last among them."""
    hull: Curve = []
    slopes: list[float] = []  # between each point and the next; falling
    for point in curve:
        while slopes and slopes[-1] <= _slope(hull[-1], point):
            hull.pop()
            slopes.pop()
        if hull:
            slopes.append(_slope(hull[-1], point))
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, float], b: tuple[int, float, float]) -> float:
    return (b[2] - a[2]) / max(b[1] - a[1], 1e-9)


def _fill(ranks: dict[str, int], curves: Mapping[str, Curve], spent: float, budget: float, only_hull: bool) -> float:
    """Raise ``ranks`` in place, best gain for its cost first, while the budget lasts; returns what is then spent."""
    steps: dict[str, Curve] = {}
    heap: list[tuple[float, str, int]] = []

    def offer(name: str, index: int) -> None:
        if index < len(steps[name]):
            heapq.heappush(heap, (-_slope(steps[name][index - 1], steps[name][index]), name, index))

    for name, curve in curves.items():
        steps[name] = [point for point in (_hull(curve) if only_hull else curve) if point[0] >= ranks[name]]
        offer(name, 1)
    while heap:
        _, name, index = heapq.heappop(heap)
        price = steps[name][index][1] - steps[name][index - 1][1]
        if spent + price <= budget:
            spent += price
            ranks[name] = steps[name][index][0]
            offer(name, index + 1)
    return spent


def _trade(ranks: dict[str, int], curves: Mapping[str, Curve], left: float) -> float:
    """Spend what is left on a step up of one layer that a step down of another makes room for, if more is carried then.

    Args:
        ranks: Changed in place, by the trade that spends most.
        curves: Of the layers.
        left: Of the budget.

    Returns:
        What it spends; 0 if there is none.
    """
    ups, downs = [], []
    for name, curve in curves.items():
        at = next(index for index, point in enumerate(curve) if point[0] == ranks[name])
        here = curve[at]
        if at + 1 < len(curve):
            ups.append((curve[at + 1][1] - here[1], curve[at + 1][2] - here[2], name, curve[at + 1][0]))
        if at:
            downs.append((here[1] - curve[at - 1][1], here[2] - curve[at - 1][2], name, curve[at - 1][0]))
    trades = (
        (price - saved, name, rank, other, lower)
        for price, gain, name, rank in ups
        for saved, loss, other, lower in downs
        if name != other and 0 < price - saved <= left and gain > loss
    )
    spent, name, rank, other, lower = max(trades, default=(0.0, "", 0, "", 0))
    if spent:
        ranks.update({name: rank, other: lower})
    return spent


def interpolate(full: Mapping[str, int], final: Mapping[str, int], removed: float) -> dict[str, int]:
    """Ranks on their way from ``full`` to ``final`` when ``removed`` of the difference, in [0, 1], is gone.

    Ranks fall, not the cost: between full rank and break-even a layer costs what the dense one does, so a falling
    cost would tear all of those ranks off at once.
    """
    return {name: rank - round((rank - final[name]) * removed) for name, rank in full.items()}


def cheapest(cost: Cost, ranks: Mapping[str, int], most: float) -> frozenset[str]:
    """The layers that cost least, as many as do not cost more than ``most`` together.

    Args:
        cost: Of the model.
        ranks: At which they cost that.
        most: In the unit of the cost.
    """
    found, total = set(), 0.0
    for price, name in sorted((cost.at(name, rank), name) for name, rank in ranks.items()):
        total += price
        if total > most:
            break
        found.add(name)
    return frozenset(found)
