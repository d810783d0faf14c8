"""Which ranks to keep: by energy in each layer, or by a budget over the whole model.

Everything here decides and nothing acts: numbers in, numbers or masks out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_svd.costs import LayerCost, ModelCost, Unit
from lightning_svd.factorization import energy_rank


def keep_by_energy(
    energies: Mapping[str, Tensor],
    cost: ModelCost,
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
        ranks[name] = next(_ladder(cost.layers[name], _most(name, len(energy), max_ranks), wanted, round_to))
    return ranks


def smallest_cost(
    cost: ModelCost,
    unit: Unit,
    full_ranks: Mapping[str, int],
    min_rank: int = 1,
    round_to: int = 1,
    max_ranks: Mapping[str, int] | None = None,
) -> int:
    """What the model costs when every layer keeps as little as it may."""
    least = {
        name: next(_ladder(cost.layers[name], _most(name, full, max_ranks), min_rank, round_to))
        for name, full in full_ranks.items()
    }
    return cost.at(least, unit)


def share_above(share: float) -> float:
    """A short number not below ``share``, to be named in a message and used in its place."""
    return math.ceil(share * 1e4) / 1e4


def keep_by_budget(
    energies: Mapping[str, Tensor],
    cost: ModelCost,
    budget: float,
    unit: Unit = "macs",
    min_rank: int = 1,
    round_to: int = 1,
    max_ranks: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Ranks whose cost fits a budget over the whole model and which carry the most.

    Each layer's energy counts as a share of the layer's own, since normalisation layers make a layer's scale
    arbitrary; and what passes through all layers is about the product of these shares, so the sum of their logarithms
    is what is maximised (the plain sum would starve some layers for others where spectra are flat). This is a
    knapsack. It is filled greedily along each layer's upper concave hull of (cost, log share), whose last point is
    the dense layer with every rank, and what is then left over goes to the single ranks that still fit.

    Args:
        energies: For each layer what each of its candidate ranks carries, (k,).
        cost: Of the model.
        budget: Largest allowed cost of the model in MACs of the counted pass, or in parameters.
        unit: "macs" or "params".
        min_rank: Fewest ranks of a layer.
        round_to: Ranks below the break-even are multiples of this.
        max_ranks: The most ranks of some layers.

    Returns:
        For each layer how many of its strongest candidates to keep; as many as it may where it is better left dense.

    Raises:
        ValueError: If the smallest reachable cost is above the budget.
    """
    ladders = {
        name: list(_ladder(cost.layers[name], _most(name, len(energy), max_ranks), min_rank, round_to))
        for name, energy in energies.items()
    }
    ranks = {name: ladder[0] for name, ladder in ladders.items()}
    spent = cost.at(ranks, unit)
    if spent > budget:
        dense = cost.dense(unit)
        least = share_above(spent / dense)
        raise ValueError(f"the budget must be at least {least} of the dense {unit}, got {budget / dense:.6g}")
    curves = {name: _curve(cost.layers[name], energies[name], ladders[name], unit) for name in ladders}
    for only_hull in (True, False):
        spent = _fill(ranks, curves, spent, budget, only_hull)
    return ranks


def _most(name: str, candidates: int, max_ranks: Mapping[str, int] | None) -> int:
    """How many of its candidates a layer may keep."""
    return min(candidates, (max_ranks or {}).get(name, candidates))


def _ladder(layer: LayerCost, candidates: int, min_rank: int, round_to: int) -> Iterator[int]:
    """The ranks a layer may have, ascending: multiples of ``round_to`` cheaper than dense, or every candidate.

    A layer too narrow for one multiple takes the largest half, quarter, ... of ``round_to`` that is cheaper than dense.
    """
    while round_to > max(1, layer.break_even):
        round_to //= 2
    first = -(-min_rank // round_to) * round_to
    yield from range(first, min(layer.break_even, candidates) + 1, round_to)
    if candidates > layer.break_even or first > candidates:
        yield candidates


Curve = list[tuple[int, int, float]]  # rank, cost, logarithm of the share of the layer's energy; all ascending


def _curve(layer: LayerCost, energy: Tensor, ladder: list[int], unit: Unit) -> Curve:
    carried = energy.double().sort(descending=True).values.cumsum(0)
    shares = carried / carried[-1] if carried[-1] > 0 else torch.ones_like(carried)
    return [(rank, layer.at(rank, unit), math.log(shares[rank - 1])) for rank in ladder]


def _hull(curve: Curve) -> Curve:
    """The points of the upper concave hull, the first and the last among them."""
    hull: Curve = []
    for point in curve:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, int, float], b: tuple[int, int, float]) -> float:
    return (b[2] - a[2]) / max(b[1] - a[1], 1e-9)


def _fill(ranks: dict[str, int], curves: Mapping[str, Curve], spent: int, budget: float, only_hull: bool) -> int:
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


def interpolate(full: Mapping[str, int], final: Mapping[str, int], removed: float) -> dict[str, int]:
    """Ranks on their way from ``full`` to ``final`` when ``removed`` of the difference, in [0, 1], is gone.

    Ranks fall, not the cost: between full rank and break-even a layer costs what the dense one does, so a falling
    cost would tear all of those ranks off at once.
    """
    return {name: rank - round((rank - final[name]) * removed) for name, rank in full.items()}


def strongest(energies: Tensor, rank: int) -> Tensor:
    """Mask (r,) of the ``rank`` entries that carry most; among equals the earlier."""
    mask = torch.zeros_like(energies, dtype=torch.bool)
    mask[energies.sort(descending=True, stable=True).indices[:rank]] = True
    return mask
