"""The report as one self-contained HTML page: what it says and draws; ``page.html`` and ``page.css`` say how it looks.

The charts are inline SVG. A charting library would be 4.8 MB of script in every page, and its charts keep the width
and the colors of the screen they were drawn for; these follow a phone, a dark screen and paper by style alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup, escape

from lightning_svd.report.charts import SIZE, Axis, Band, Chart, EndLabel, Line, Mark, curve, percent, spread, staircase
from lightning_svd.report.data import (
    ARGUMENT_HEADINGS,
    BUDGET_HEADINGS,
    SKIPPED_HEADINGS,
    TEXT_HEADINGS,
    LayerReport,
    RankChange,
    SVDReport,
    label,
    percentage,
    quantity,
    share,
)
from lightning_svd.wording import counted

MOST_BARS = 24
MOST_SMALL = 12
MOST_LABELS = 24
LABEL_LENGTH = 24
LABEL_GAP = 34  # 13.6 of the 400 pixels that the rank chart is high
CHANGE_HEADINGS = ("step", "epoch", "ranks", "MACs", "parameters")
SHARE_TOP = 1.03  # a line at 100% is not cut by the edge
FIRST_HUE, LAST_HUE = 255, 405  # blue for the first layer, through purple and red to orange for the last
GOLDEN = (5**0.5 - 1) / 2  # lines drawn in steps of it through the model: none of its ends hides the other


@dataclass(frozen=True)
class Tile:
    """A headline number: the share that is kept, the absolute value, and a note."""

    name: str
    ratio: float
    number: str
    note: str


@dataclass(frozen=True)
class Bar:
    """A layer's cost as text and as two widths of a bar, dense and now; no widths for totals."""

    name: str
    text: str
    dense: str = ""
    now: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page that only some reports have: charts beside each other, tables below.

    Attributes:
        title: Its heading.
        text: What it shows.
        charts: The charts.
        keys: Of each chart, (look, text, hue) of what is drawn.
        tables: (caption, headings, rows).
    """

    title: str
    text: str
    charts: Sequence[Chart]
    keys: Sequence[Sequence[tuple[str, str, int]]]
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()


def render_page(
    report: SVDReport,
    comparison: Mapping[str, tuple[str, str]],
    sections: Sequence[Section] = (),
    more_facts: str = "",
) -> str:
    """The page's source.

    Args:
        report: What to show.
        comparison: What else was measured: name -> (dense, low-rank).
        sections: What this page has beside.
        more_facts: What is said at its head beside.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    heaviest = sorted(range(len(report.layers)), key=lambda index: -_cost(report, report.layers[index])[0])
    return environment.from_string(_source("page.html")).render(
        style=Markup(_source("page.css")),
        script=Markup(_source("page.js")),
        size=SIZE,
        report=report,
        facts=" ".join(filter(None, (_facts(report), more_facts))),
        sections=sections,
        tiles=_tiles(report),
        comparison=comparison,
        charts=_run_charts(report),
        rank_chart=_rank_chart(report) if report.timeline and report.layers else None,
        rank_data=_rank_data(report),
        unit="MACs" if report.dense_macs else "parameters",
        bars=_bars(report, sorted(heaviest[:MOST_BARS])),
        spectra=[_spectrum(layer) for layer in report.layers],
        shown=heaviest[0] if heaviest else None,
        small=sorted(heaviest[:MOST_SMALL]),
        text_headings=TEXT_HEADINGS,
        skipped_headings=SKIPPED_HEADINGS,
        skipped=[(label(name), kind, reason) for name, kind, reason in report.skipped],
        budget_headings=BUDGET_HEADINGS,
        budgets=[budget.cells() for budget in report.nested],
        change_headings=CHANGE_HEADINGS,
        changes=list(map(_change_cells, report.timeline)),
        argument_headings=ARGUMENT_HEADINGS,
        arguments=[(name, json.dumps(value, default=str)) for name, value in report.arguments.items()],
    )


def _source(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after a dot."""
    return escape(name).replace(".", Markup(".<wbr>"))


# Numbers


def _facts(report: SVDReport) -> str:
    factored = sum(layer.form == "factored" for layer in report.layers)
    dense = len(report.layers) - factored
    facts = [
        f"Of {counted(len(report.layers), 'factorized layer', 'factorized layers')} {factored} are two low-rank layers "
        f"now, {dense} are dense.",
        f"{len(report.skipped)} were left alone." if report.skipped else "",
        f"Left alone are {report.left_alone}." if report.left_alone else "",
        f"Ranks changed {len(report.timeline)} times in {_steps(report):,} optimizer steps." if _steps(report) else "",
    ]
    return " ".join(filter(None, facts))


def _tiles(report: SVDReport) -> list[Tile]:
    def tile(name: str, dense: float, now: float, text: str) -> Tile:
        return Tile(name, now / dense, f"{now / dense:.1%}", text) if dense else Tile(name, 0.0, "-", "not known")

    full, kept = (sum(getattr(layer, name) for layer in report.layers) for name in ("full_rank", "rank"))
    timed = [(layer.dense_seconds, layer.seconds) for layer in report.layers if layer.dense_seconds and layer.seconds]
    before, after = sum(dense for dense, _ in timed), sum(now for _, now in timed)
    tiles = [
        tile("MACs per input", report.dense_macs, report.macs, _from_to(report.dense_macs, report.macs)),
        tile("Parameters", report.dense_params, report.params, _from_to(report.dense_params, report.params)),
    ]
    if report.layers:
        tiles.append(tile("Ranks", full, kept, f"{full:,} → {kept:,}"))
    if timed:
        tiles.append(tile("Time in these layers", before, after, f"{1e3 * before:.3g} ms → {1e3 * after:.3g} ms"))
    return tiles


def _from_to(dense: int, now: int) -> str:
    return f"{quantity(dense)} → {quantity(now)}"


def _cost(report: SVDReport, layer: LayerReport) -> tuple[int, int]:
    """(dense, now) in MACs, or in parameters where MACs are not known."""
    return (layer.dense_macs, layer.macs) if report.dense_macs else (layer.dense_params, layer.params)


def _bars(report: SVDReport, chosen: Sequence[int]) -> list[Bar]:
    costs = [_cost(report, layer) for layer in report.layers]
    shown = [costs[index] for index in chosen]
    whole = (report.dense_macs, report.macs) if report.dense_macs else (report.dense_params, report.params)
    others, rest = _difference(_total(costs), _total(shown)), _difference(whole, _total(costs))
    most = max([1, rest[0], *(dense for dense, _ in shown)])

    def bar(name: str, dense: int, now: int) -> Bar:
        return Bar(name, _cost_text(dense, now), percent(SIZE * dense / most), percent(SIZE * now / most))

    bars = [bar(report.layers[index].label, *costs[index]) for index in chosen]
    if any(others):
        bars.append(Bar(f"{len(costs) - len(shown)} other layers together", _cost_text(*others)))
    if bars and any(rest):
        bars.append(bar("all that is not factorized", *rest))
    return bars


def _cost_text(dense: int, now: int) -> str:
    return f"{_from_to(dense, now)} ({share(now, dense)})"


def _total(costs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(dense for dense, _ in costs), sum(now for _, now in costs)


def _difference(whole: tuple[int, int], part: tuple[int, int]) -> tuple[int, int]:
    return whole[0] - part[0], whole[1] - part[1]


def _change_cells(change: RankChange) -> tuple[str, ...]:
    ranks = sum(change.ranks.values())
    return (
        f"{change.step:,}",
        str(change.epoch),
        f"{ranks:,}",
        percentage(change.macs_ratio),
        percentage(change.params_ratio),
    )


def _rank_data(report: SVDReport) -> dict[str, object]:
    """What the page's script reads off the rank chart under the pointer."""
    return {
        "end": _steps(report),
        "top": SHARE_TOP,
        "steps": [0, *(change.step for change in report.timeline)],
        "layers": [
            [layer.label, layer.full_rank, [layer.full_rank, *(change.ranks[layer.name] for change in report.timeline)]]
            for layer in report.layers
        ],
    }


# Charts over the run


def _steps(report: SVDReport) -> int:
    """The last optimizer step that is known."""
    seen = [step for step, _ in (*report.strengths, *report.metric_values)]
    return max([0, *seen, *(change.step for change in report.timeline)])


def _step_axis(report: SVDReport) -> Axis:
    return Axis("optimizer step", 0, max(1, _steps(report)), whole=True)


def _share_axis(title: str) -> Axis:
    return Axis(title, 0, SHARE_TOP, "{:.0%}".format)


def _run_charts(report: SVDReport) -> list[Chart]:
    charts = []
    if report.timeline:
        charts.append(_budget_chart(report))
    if report.strengths:
        charts.append(_strength_chart(report))
    if report.metric_values:
        charts.append(_metric_chart(report))
    return charts


def _budget_chart(report: SVDReport) -> Chart:
    x, y = _step_axis(report), _share_axis("share of the dense model")
    params = staircase(x, y, [(0, 1.0), *((change.step, change.params_ratio) for change in report.timeline)])
    lines = [Line("parameters", params, "params", index=1)]
    if report.dense_macs:
        macs = staircase(x, y, [(0, 1.0), *((change.step, change.macs_ratio) for change in report.timeline)])
        lines.append(Line("MACs", macs, "now", index=0))
    last = report.timeline[-1]
    macs = f"{percentage(last.macs_ratio)} of the MACs and " if report.dense_macs else ""
    words = (
        f"From step {report.timeline[0].step:,} to step {last.step:,} the model falls to {macs}"
        f"{percentage(last.params_ratio)} of the parameters."
    )
    return Chart("Budget", words, x, y, lines)


def _strength_chart(report: SVDReport) -> Chart:
    most = max([0.0, *_finite(value for _, value in report.strengths)])
    x, y = _step_axis(report), Axis("sparsity weight", 0, 1.03 * most or 1.0, most_ticks=5)
    words = f"The sparsity weight is {most:g} at most and {report.strengths[-1][1]:g} in the last step."
    return Chart("Sparsity strength", words, x, y, [Line(y.title, curve(x, y, report.strengths), "strength")])


def _metric_chart(report: SVDReport) -> Chart:
    values = _finite(value for _, value in report.metric_values) or [0.0]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    x, y = _step_axis(report), Axis(report.metric or "metric", low - margin, high + margin)
    ends = [(pause.start, x.high if pause.end is None else pause.end) for pause in report.pauses]
    words = "; ".join([f"{y.title} from {low:g} to {high:g}", *map(str, report.pauses)])
    line = Line(y.title, curve(x, y, report.metric_values), "metric")
    return Chart("Watched metric", words, x, y, [line], bands=[Band(x.place(a), x.place(b)) for a, b in ends])


def _rank_chart(report: SVDReport) -> Chart:
    x, y = _step_axis(report), _share_axis("share of the layer's full rank")
    lines = []
    for index, layer in enumerate(report.layers):
        shares = [(0, 1.0), *((change.step, change.ranks[layer.name] / layer.full_rank) for change in report.timeline)]
        lines.append(Line(layer.label, staircase(x, y, shares), "layer", hue_of(index, len(report.layers)), index))
    lines.sort(key=lambda line: line.index * GOLDEN % 1)
    words = f"Ranks of {len(lines)} layers, each as a share of its full rank; the table of layers has the last ones."
    return Chart("Ranks of the layers", words, x, y, lines, ends=_end_labels(report, y))


def hue_of(index: int, count: int) -> int:
    """The color of a layer, an angle: blue for the first one, orange for the last."""
    return round(FIRST_HUE + (LAST_HUE - FIRST_HUE) * index / max(1, count - 1)) % 360


def _end_labels(report: SVDReport, y: Axis) -> list[EndLabel]:
    """Names at the right ends of few lines; none for many."""
    if len(report.layers) > MOST_LABELS:
        return []
    last = report.timeline[-1].ranks
    shares = [last[layer.name] / layer.full_rank for layer in report.layers]
    lines = [SIZE - y.place(value) for value in shares]
    places = spread(lines, LABEL_GAP, SIZE)
    return [
        EndLabel(line, at, f"{_short(layer.label)} {value:.0%}", hue_of(index, len(report.layers)))
        for index, (line, at, layer, value) in enumerate(zip(lines, places, report.layers, shares, strict=True))
    ]


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= LABEL_LENGTH else f"…{name[1 - LABEL_LENGTH :]}"


# Spectra


def _spectrum(layer: LayerReport) -> Chart:
    largest = max([0.0, *_finite((*layer.spectrum_before, *layer.spectrum_after))])
    x = Axis("index of the singular value", 0.5, layer.full_rank + 0.5, most_ticks=8, whole=True)
    y = Axis("singular value", 0, 1.05 * largest or 1.0, most_ticks=5)
    lines = [
        Line("at the start", curve(x, y, enumerate(layer.spectrum_before, 1)), "dense"),
        Line("at the end", curve(x, y, enumerate(layer.spectrum_after, 1)), "now"),
    ]
    marks, bands = [], []
    if layer.rank < layer.full_rank:
        cut = x.place(layer.rank + 0.5)
        marks.append(Mark(cut, f"cut: {layer.rank} of {layer.full_rank} kept", "cut"))
        bands.append(Band(cut, SIZE))
    if layer.break_even < layer.full_rank:
        marks.append(Mark(x.place(layer.break_even + 0.5), f"break-even: {layer.break_even}", "even"))
    before, after = (f"{max(values, default=math.nan):.3g}" for values in (layer.spectrum_before, layer.spectrum_after))
    words = (
        f"{layer.label}: {layer.rank} of {layer.full_rank} singular values are kept; the largest was {before} at the "
        f"start and is {after} at the end."
    )
    return Chart(layer.label, words, x, y, lines, marks, bands)


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
