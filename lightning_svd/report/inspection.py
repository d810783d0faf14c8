"""Spectra and ranks of a model without training, and what a budget would keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.layers.compounds import split_everywhere, svd_layers
from lightning_svd.layers.matrices import effective_rank, energy_rank, singular_values, stable_rank
from lightning_svd.layers.pairs import low_rank_pairs, rank_of, view_of
from lightning_svd.layers.views import CONV_MODES
from lightning_svd.model.counting import count_costs, count_params
from lightning_svd.model.plan import LayerPlan, default_targets, large_left_alone, layers_of, plan
from lightning_svd.model.surgery import decompose, to_dense
from lightning_svd.ranks.allocation import keep_by_budget
from lightning_svd.ranks.costs import LayerCost, ModelCost, Unit
from lightning_svd.report.data import SVDReport, summarize_planned
from lightning_svd.report.tables import screen_table


@dataclass(frozen=True)
class LayerInspection:
    """The spectrum and the ranks of one weight matrix (m, n).

    Attributes:
        name: Of the layer.
        matrix_shape: (m, n).
        rank: Ranks that are kept; min(m, n) for a dense layer.
        stable_rank: ``|W|_F^2 / |W|_2^2``.
        effective_rank: ``exp(entropy(s / sum(s)))``.
        energy_rank_90: Ranks that hold 90 % of the sum of s^2.
        energy_rank_99: Ranks that hold 99 % of it.
        break_even: The largest rank whose factors have fewer parameters than the dense weight.
        budget_rank: What a budget would keep; None if none was asked for.
        spectrum: Singular values, descending.
    """

    name: str
    matrix_shape: tuple[int, int]
    rank: int
    stable_rank: float
    effective_rank: float
    energy_rank_90: int
    energy_rank_99: int
    break_even: int
    budget_rank: int | None
    spectrum: tuple[float, ...]


@torch.no_grad()
def inspect_weights(
    weights: Mapping[str, Tensor], kept: Mapping[str, int] | None = None, target_params: float | None = None
) -> list[LayerInspection]:
    """Spectra of the weight matrices in a dense state dict.

    Args:
        weights: Parameter names -> tensors; those called ``weight`` with two or more dimensions are looked at,
            flattened to (first dimension, the others), for a convolution its "channel" mode.
        kept: Ranks of layers that are low-rank, which the rounding of their dense weight hides.
        target_params: Share of all parameters to keep, in (0, 1], for ``budget_rank``.

    Raises:
        ValueError: If no budget so small can be met.
    """
    weights = split_everywhere(weights)
    matrices = {
        name.removesuffix("weight").removesuffix("."): tensor.flatten(1)
        for name, tensor in weights.items()
        if name.rpartition(".")[2] == "weight" and tensor.ndim >= 2 and tensor.numel() and tensor.is_floating_point()
    }
    found = {name: singular_values(matrix) for name, matrix in matrices.items()}
    spectra = {name: spectrum for name, spectrum in found.items() if torch.isfinite(spectrum).all()}
    costs = {name: LayerCost(matrices[name].numel(), sum(matrices[name].shape)) for name in spectra}
    budget: dict[str, int] = {}
    if target_params is not None:
        total = sum(tensor.numel() for tensor in weights.values())
        cost = ModelCost(costs, total - sum(layer.dense_params for layer in costs.values()))
        energies = {name: spectrum.square() for name, spectrum in spectra.items()}
        budget = keep_by_budget(energies, cost.by("params"), target_params * cost.dense("params"))
    return [
        LayerInspection(
            name,
            (matrices[name].shape[0], matrices[name].shape[1]),
            (kept or {}).get(name, len(spectrum)),
            stable_rank(spectrum),
            effective_rank(spectrum),
            energy_rank(spectrum, 0.9),
            energy_rank(spectrum, 0.99),
            costs[name].break_even,
            budget.get(name),
            tuple(spectrum.tolist()),
        )
        for name, spectrum in spectra.items()
    ]


def left_alone(weights: Mapping[str, Tensor]) -> str | None:
    """What of a dense state dict :func:`inspect_weights` does not look at, and how large it is; None if that is little.

    Args:
        weights: Parameter names -> tensors.
    """
    others = [
        LayerPlan(name, "Parameter", tuple(tensor.shape), skipped="not called `weight`, so of no layer that is known")
        for name, tensor in split_everywhere(weights).items()
        if name.rpartition(".")[2] != "weight" and sum(size > 1 for size in tensor.shape) > 1
    ]
    return large_left_alone(others, sum(tensor.numel() for tensor in weights.values()))


def inspect_model(
    model: nn.Module, example_input: Any = None, target_macs: float | None = None, target_params: float | None = None
) -> SVDReport:
    """The report on a model as it is, or on what a budget would leave of it without training.

    Args:
        model: Dense or low-rank; not changed.
        example_input: What it is called with, a tuple for several arguments; without it MACs are not known.
        target_macs: Share of the dense model's MACs to keep, in (0, 1].
        target_params: Share of its parameters; at most one of the two.

    Raises:
        ValueError: If MACs are asked for without an example input, or no budget so small can be met.
    """
    low_rank = {name: (view_of(pair), rank_of(pair)) for name, pair in low_rank_pairs(model).items()}
    low_rank |= {name: (layer.view, layer.rank) for name, layer in svd_layers(model).items()}
    dense = to_dense(model)
    lookups = [name for name, (view, _) in low_rank.items() if view.layer_type is nn.Embedding]
    targets = [*default_targets(layers_of(dense)), *lookups] if lookups else None
    plans = {mode: {layer.name: layer for layer in plan(dense, targets, conv_mode=mode)} for mode in CONV_MODES}
    # A rank means something in the mode that the layer was trained in.
    modes = {name: view.conv_mode for name, (view, _) in low_rank.items()}
    chosen = decompose(dense, layer_plans=[plans[modes.get(name) or "channel"][name] for name in plans["channel"]])
    layers = svd_layers(dense)
    ranks = {name: min(rank, layers[name].full_rank) for name, (_, rank) in low_rank.items() if name in layers}
    target = target_params if target_macs is None else target_macs
    if target is not None:
        unit: Unit = "params" if target_macs is None else "macs"
        if unit == "macs" and example_input is None:
            raise ValueError("a budget of MACs needs an example input: give its shape, `--example-input 1,3,32,32`")
        cost = count_params(dense) if unit == "params" else count_costs(dense, example_input)
        energies = {name: layer.energies() for name, layer in layers.items()}
        ranks = keep_by_budget(energies, cost.by(unit), target * cost.dense(unit))
    for name, rank in ranks.items():
        layers[name].keep(rank)
    return summarize_planned(dense, chosen, example_input)


def as_table(layers: list[LayerInspection]) -> str:
    """For the terminal, with a picture of each spectrum."""
    headings = ["layer", "matrix", "rank", "stable", "effective", "90 %", "99 %", "break-even", "budget", "spectrum"]
    rows = [
        [
            layer.name or "(model)",
            "{} x {}".format(*layer.matrix_shape),
            str(layer.rank),
            f"{layer.stable_rank:.1f}",
            f"{layer.effective_rank:.1f}",
            str(layer.energy_rank_90),
            str(layer.energy_rank_99),
            str(layer.break_even),
            "" if layer.budget_rank is None else str(layer.budget_rank),
            sparkline(layer.spectrum),
        ]
        for layer in layers
    ]
    if all(layer.budget_rank is None for layer in layers):
        headings, rows = [*headings[:8], headings[9]], [[*row[:8], row[9]] for row in rows]
    return screen_table(headings, rows, {"layer", "spectrum"}, {"spectrum", "effective", "90 %"})


def sparkline(values: tuple[float, ...], width: int = 12) -> str:
    """Values from 0 to the largest as a row of bars."""
    bars, largest = " ▁▂▃▄▅▆▇█", max(values, default=0.0)
    if not largest:
        return ""
    count = min(width, len(values))
    chosen = [values[index * len(values) // count] for index in range(count)]
    return "".join(bars[round(value / largest * (len(bars) - 1))] for value in chosen)
