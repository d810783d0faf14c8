"""The report as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from math import ceil

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lightning_svd.report import LAYER_HEADINGS, LayerReport, SVDReport, quantity

COLUMNS = 3
MOST_SPECTRA = 60
BEFORE, AFTER, CUT = "#8c96a5", "#0f766e", "#c2410c"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Low-rank model report</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2933; --paper: #ffffff; --line: #d9dee5; --soft: #5b6675; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ee; --paper: #14181d; --line: #313942; --soft: #9aa5b1; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1080px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.1rem; margin: 2.2rem 0 .3rem; }}
p.note {{ color: var(--soft); margin: .2rem 0 .8rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
.warning {{ border-left: 3px solid #c2410c; padding-left: .8rem; }}
</style>
{library}
</head>
<body>
<h1>Low-rank model report</h1>
<p class="note">{headline}</p>
{warnings}
<h2>Dense against low-rank</h2>
<div class="scroll">{comparison}</div>
<h2>Ranks while training</h2>
<p class="note">Share of each layer's full rank that is kept, and of the whole model's MACs and parameters (thick).</p>
{curves}
<h2>Spectra</h2>
<p class="note">Singular values over their index: at the start (grey), at the end (green); dashed is the cut.</p>
{spectra}
<h2>Layers</h2>
<div class="scroll">{layers}</div>
{skipped}
<script>
const dark = matchMedia("(prefers-color-scheme: dark)");
function paint() {{
  const ink = dark.matches ? "#e6e9ee" : "#1f2933", grid = dark.matches ? "#313942" : "#e4e7ec";
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {{
    const change = {{ "font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" }};
    for (const axis of Object.keys(plot.layout).filter((key) => /^[xy]axis/.test(key))) {{
      change[axis + ".gridcolor"] = grid;
      change[axis + ".zerolinecolor"] = grid;
    }}
    Plotly.relayout(plot, change);
  }}
}}
dark.addEventListener("change", paint);
paint();
</script>
</body>
</html>
"""


def render_page(report: SVDReport, comparison: Mapping[str, tuple[str, str]]) -> str:
    """The page's source.

    Args:
        report: What to show.
        comparison: Further rows of the first table: name -> (dense, low-rank).
    """
    from plotly.offline import get_plotlyjs

    rows = {name: tuple(pair) for name, pair in comparison.items()} | {
        "MACs per input": (quantity(report.dense_macs), f"{quantity(report.macs)} ({report.macs_ratio:.1%})"),
        "Parameters": (quantity(report.dense_params), f"{quantity(report.params)} ({report.params_ratio:.1%})"),
    }
    factored = sum(layer.form == "factored" for layer in report.layers)
    return _PAGE.format(
        library=f"<script>{get_plotlyjs()}</script>",
        headline=f"{factored} of {len(report.layers)} factorised layers ended as two low-rank layers, "
        f"with {report.rank_ratio:.1%} of all ranks kept.",
        warnings="".join(f'<p class="warning">{html.escape(warning)}</p>' for warning in report.warnings),
        comparison=_table(("", "dense", "low-rank"), ((name, *pair) for name, pair in rows.items())),
        curves=_div(_rank_curves(report)) if report.timeline else "<p>No rank was changed.</p>",
        spectra=_div(_spectra(_heaviest(report.layers))),
        layers=_table(LAYER_HEADINGS, (layer.cells() for layer in report.layers)),
        skipped=_skipped(report),
    )


def _skipped(report: SVDReport) -> str:
    if not report.skipped:
        return ""
    return "<h2>Left alone</h2>" + _table(("layer", "kind", "because"), report.skipped)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table><thead>{line(head, 'th')}</thead><tbody>{''.join(line(row, 'td') for row in rows)}</tbody></table>"


def _heaviest(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """The layers with the most MACs, in model order."""
    most = set(sorted(layers, key=lambda layer: -layer.dense_macs)[:MOST_SPECTRA])
    return [layer for layer in layers if layer in most]


def _rank_curves(report: SVDReport) -> go.Figure:
    steps = [0, *(change.step for change in report.timeline)]
    figure = go.Figure()
    for layer in report.layers:
        shares = [1.0, *(change.ranks[layer.name] / layer.full_rank for change in report.timeline)]
        figure.add_scatter(
            x=steps, y=shares, name=layer.name, mode="lines", line={"shape": "hv", "width": 1}, opacity=0.7
        )
    for name, attribute, color in (("all MACs", "macs_ratio", AFTER), ("all parameters", "params_ratio", CUT)):
        ratios = [1.0, *(getattr(change, attribute) for change in report.timeline)]
        figure.add_scatter(
            x=steps, y=ratios, name=name, mode="lines", line={"shape": "hv", "width": 3.5, "color": color}
        )
    figure.update_layout(height=480, margin={"l": 50, "r": 10, "t": 10, "b": 10}, hovermode="closest")
    figure.update_layout(legend={"orientation": "h", "y": -0.15, "itemwidth": 30})  # below: a phone has no room beside
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    return figure


def _spectra(layers: Sequence[LayerReport]) -> go.Figure:
    rows = ceil(len(layers) / COLUMNS)
    titles = [f"{layer.name} ({layer.rank}/{layer.full_rank})" for layer in layers]
    spacing = min(0.08, 0.35 / max(1, rows - 1))
    figure = make_subplots(rows=rows, cols=COLUMNS, subplot_titles=titles, vertical_spacing=spacing)
    for index, layer in enumerate(layers):
        place = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        for values, color in ((layer.spectrum_before, BEFORE), (layer.spectrum_after, AFTER)):
            figure.add_scatter(
                x=list(range(1, len(values) + 1)), y=values, mode="lines", line={"color": color}, **place
            )
        if layer.rank < layer.full_rank:
            figure.add_vline(x=layer.rank + 0.5, line={"color": CUT, "dash": "dash", "width": 1}, **place)
    figure.update_annotations(font_size=12)
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(height=190 * rows + 40, showlegend=False, margin={"l": 40, "r": 10, "t": 30, "b": 30})
    return figure


def _div(figure: go.Figure) -> str:
    config = {"responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=config))
