"""What compression did as pictures: each layer's importance against its cost, and quality against budget."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from lightning_svd.compression.report import CompressionReport
from lightning_svd.report.charts import Axis, Chart, Line, Mark, curve, decades, spot
from lightning_svd.report.data import LayerReport
from lightning_svd.report.page import Section, hue_of, render_page

SPREAD = 30  # from here on distances are drawn over powers of ten
HEADINGS = ("layer", "rank", "cost, of all", "importance, of all", "importance kept", "output moved")


class Weighed(NamedTuple):
    """A layer's cost and importance, each as a share of all layers', dense and as it is kept."""

    layer: LayerReport
    cost: float
    cost_now: float
    importance: float
    importance_now: float
    shift: float

    def tip(self) -> str:
        """All of it in a line."""
        return (
            f"{self.layer.label}: rank {self.layer.rank} of {self.layer.full_rank}, cost {_share(self.cost)} -> "
            f"{_share(self.cost_now)}, importance {_share(self.importance)} -> {_share(self.importance_now)}"
        )


def render_compression(report: CompressionReport) -> str:
    """The page's source."""
    warnings = (*report.ranks.warnings, *filter(None, [report.warning]))
    made_up = [
        "biases make up for the mean of what was dropped" if report.bias_corrected else "",
        "running statistics were taken anew" if report.batch_norm_recalibrated else "",
        "low-rank layers were trained towards the original outputs" if report.reconstructed else "",
    ]
    facts = (
        f"Made without training from {report.inputs:,} inputs in {report.seconds:.3g} s; decided by {report.choice}"
        f"{''.join(f'; {each}' for each in made_up if each)}. {_capital(report.measure)} of held-out outputs: "
        f"{report.distance:.3g}."
    )
    sections = [_sensitivity(report)] if report.ranks.layers else []
    if report.curve:
        sections.append(_quality(report))
    return render_page(dataclasses.replace(report.ranks, warnings=warnings), {}, sections, facts)


# ---------------------------------------------------------------------------------------------------------- sensitivity


def weighed(report: CompressionReport) -> list[Weighed]:
    """Every layer that was factorized, in the order of the model."""
    layers = report.ranks.layers
    costs = [(a.dense_macs, a.macs) if _by_macs(report) else (a.dense_params, a.params) for a in layers]
    carried = [[max(0.0, each) if math.isfinite(each) else 0.0 for each in report.carried[a.name]] for a in layers]
    cost, importance = sum(dense for dense, _ in costs) or 1, math.fsum(map(math.fsum, carried)) or 1.0
    found = []
    for layer, (dense, now), ranks in zip(layers, costs, carried, strict=True):
        kept = ranks if layer.form == "dense" else ranks[: layer.rank]
        shift = report.shifts.get(layer.name, math.nan)
        shares = math.fsum(ranks) / importance, math.fsum(kept) / importance
        found.append(Weighed(layer, dense / cost, now / cost, *shares, shift))
    return found


def _by_macs(report: CompressionReport) -> bool:
    return report.target != "params" and bool(report.ranks.dense_macs)


def _sensitivity(report: CompressionReport) -> Section:
    layers = weighed(report)
    x = decades("share of the cost of these layers", [c for a in layers for c in (a.cost, a.cost_now)], _share)
    y = decades("share of the importance", [v for a in layers for v in (a.importance, a.importance_now)], _share)
    lines, dots = [], []
    for index, a in enumerate(layers):
        dense, now = ((_log(x, b), _log(y, c)) for b, c in ((a.cost, a.importance), (a.cost_now, a.importance_now)))
        hue = hue_of(index, len(layers))
        if dense != now:
            lines.append(Line(a.layer.label, curve(x, y, [dense, now]), "move", hue, index, a.tip()))
            lines.append(Line(a.layer.label, spot(x, y, *dense), "start", hue, index, a.tip()))
        dots.append(Line(a.layer.label, spot(x, y, *now), "kept", hue, index, a.tip()))
    kept, cost = sum(a.importance_now for a in layers), sum(a.cost_now for a in layers)
    words = (
        f"Of {len(layers)} layers {kept:.1%} of the importance is kept at {cost:.1%} of their cost; the table below "
        "has each one."
    )
    key = (("move", "from the dense layer", 0), ("kept", "what is kept; blue is the first layer, orange the last", 0))
    rows = [
        (
            a.layer.label,
            "dense" if a.layer.form == "dense" else f"{a.layer.rank} of {a.layer.full_rank}",
            _share(a.cost),
            _share(a.importance),
            _share(a.importance_now / a.importance) if a.importance else "-",
            "-" if math.isnan(a.shift) else _share(a.shift),
        )
        for a in layers
    ]
    unit = "MACs" if _by_macs(report) else "parameters"
    return Section(
        "What layers carry, and what they cost",
        f"Importance is what a layer's ranks carry ({report.choice}), cost is {unit}. A long way to the left and a "
        "short one down is a layer that became cheap and lost little.",
        [Chart("Importance against cost", words, x, y, [*lines, *dots])],
        [key],
        [("Sensitivity of layers; an output moved is its squared change as a share of its size", HEADINGS, rows)],
    )


def _log(axis: Axis, value: float) -> float:
    """Where a value is on an axis of logarithms; what is not on it is at its start."""
    return max(axis.low, math.log10(value)) if value > 0 else axis.low


def _share(value: float) -> str:
    return "100%" if value > 0.9995 and value < 1.0005 else f"{100 * value:.3g}%"


# -------------------------------------------------------------------------------------------------------------- quality


def _quality(report: CompressionReport) -> Section:
    points = sorted((share, distance) for share, distance in report.curve.items() if math.isfinite(distance))
    values = [distance for _, distance in points] + [report.distance] * math.isfinite(report.distance)
    x = Axis(f"share of the {report.unit}", 0, 1.03, "{:.0%}".format)
    if values and min(values) > 0 and max(values) > SPREAD * min(values):
        y = decades(report.measure, values, "{:g}".format)
        points = [(share, _log(y, distance)) for share, distance in points]
        made = _log(y, report.distance)
    else:
        low, high = min([0.0, *values]), max([0.0, *values])
        y = Axis(report.measure, low, high + 0.05 * (high - low) or 1.0, "{:.3g}".format, most_ticks=5)
        made = report.distance
    lines = [Line("at other budgets", curve(x, y, points), "now")]
    if math.isfinite(report.distance):
        lines.append(Line("what was made", spot(x, y, report.share, made), "made", index=1))
    words = "; ".join(f"{distance} at {share}" for share, distance in report.curve_rows())
    chart = Chart(
        "Quality against budget",
        f"{_capital(report.measure)}: {words}.",
        x,
        y,
        lines,
        marks=[Mark(x.place(report.share), f"asked for: {report.share:.0%}", "cut")],
    )
    headings = (f"share of the {report.unit}", report.measure)
    return Section(
        "What could be asked for",
        "How far held-out outputs would move at other budgets, from the same calibration and before anything makes up "
        "for what is dropped.",
        [chart],
        [chart.key()],
        [("Held-out outputs at other budgets", headings, report.curve_rows())],
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
