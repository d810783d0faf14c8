"""What happened to a model: frozen data, and the same as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN, SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_svd.costs import CostMeter, ModelCost, count_params, svd_layers
from lightning_svd.layers import SVDLayer
from lightning_svd.surgery import LayerPlan

WIDTH = 118
ROWS_ON_SCREEN = 60
LAYER_HEADINGS = ("layer", "kind", "matrix", "full rank", "break-even", "rank", "MACs", "parameters", "form")


@dataclass(frozen=True)
class RankChange:
    """Ranks after a cut.

    Attributes:
        step: Optimizer steps before it.
        epoch: Epoch in which it happened.
        ranks: Name of each factorised layer -> its rank.
        macs_ratio: Share of the dense model's MACs.
        params_ratio: Share of the dense model's parameters.
    """

    step: int
    epoch: int
    ranks: Mapping[str, int]
    macs_ratio: float
    params_ratio: float

    def __str__(self) -> str:
        return (
            f"step {self.step} (epoch {self.epoch}): {sum(self.ranks.values())} ranks in {len(self.ranks)} layers, "
            f"{self.macs_ratio:.1%} of the MACs, {self.params_ratio:.1%} of the parameters"
        )


@dataclass(frozen=True)
class LayerReport:
    """One factorised layer.

    Attributes:
        name: As in ``named_modules``.
        kind: Class of the dense layer.
        matrix_shape: (m, n) of its weight seen as a matrix.
        conv_mode: "channel" or "spatial" for a convolution, else None.
        full_rank: min(m, n).
        break_even: The largest rank whose factors cost less than the dense layer.
        rank: The rank it has now.
        form: "factored" or "dense", whichever costs less at this rank.
        dense_macs: MACs of the dense layer for one input.
        macs: MACs now, for one input.
        dense_params: Parameters of the dense weight.
        params: Parameters now.
        spectrum_before: Singular values when the layer was factorised, descending.
        spectrum_after: Kept singular values now, descending.
    """

    name: str
    kind: str
    matrix_shape: tuple[int, int]
    conv_mode: str | None
    full_rank: int
    break_even: int
    rank: int
    form: str
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    spectrum_before: tuple[float, ...]
    spectrum_after: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        """A row of a table under ``LAYER_HEADINGS``."""
        return (
            self.name,
            kind_and_mode(self.kind, self.conv_mode),
            "{} x {}".format(*self.matrix_shape),
            str(self.full_rank),
            str(self.break_even),
            str(self.rank),
            f"{self.macs / max(1, self.dense_macs):.0%}",
            f"{self.params / max(1, self.dense_params):.0%}",
            self.form,
        )


@dataclass(frozen=True)
class SVDReport:
    """A whole model.

    Attributes:
        layers: Every factorised layer.
        skipped: (name, class, reason) of every layer with a weight matrix that was left alone.
        dense_macs: MACs of the dense model for one input, everything included.
        macs: MACs now.
        dense_params: Parameters of the dense model.
        params: Parameters now.
        timeline: Every rank change.
        warnings: What went otherwise than asked for.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str, str], ...]
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    timeline: tuple[RankChange, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def macs_ratio(self) -> float:
        """Share of the dense model's MACs."""
        return self.macs / max(1, self.dense_macs)

    @property
    def params_ratio(self) -> float:
        """Share of the dense model's parameters."""
        return self.params / max(1, self.dense_params)

    @property
    def rank_ratio(self) -> float:
        """Share of all ranks that is kept."""
        return sum(layer.rank for layer in self.layers) / max(1, sum(layer.full_rank for layer in self.layers))

    def to_dict(self) -> dict[str, object]:
        """Plain dicts, lists, strings and numbers."""
        return dataclasses.asdict(self) | {
            "macs_ratio": self.macs_ratio,
            "params_ratio": self.params_ratio,
            "rank_ratio": self.rank_ratio,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON; also written to ``path`` if given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def to_markdown(self) -> str:
        """As a Markdown table of every layer with a summary line above and warnings below."""
        table = _render(self._table(MARKDOWN, self.layers)).strip()
        return "\n\n".join([self._summary(), table, *(f"**Warning:** {warning}" for warning in self.warnings)])

    def to_html(self, path: str | Path, comparison: Mapping[str, tuple[str, str]] | None = None) -> Path:
        """One self-contained page with rank curves and spectra; needs no network.

        Args:
            path: File to write.
            comparison: Further rows of the summary: name -> (dense, low-rank), for instance the accuracies.

        Returns:
            The path.
        """
        from lightning_svd.page import render_page  # plotly takes a moment to import

        path = Path(path)
        path.write_text(render_page(self, comparison or {}), encoding="utf-8")
        return path

    def __str__(self) -> str:
        shown = self.layers[:ROWS_ON_SCREEN]
        more = [f"... and {len(self.layers) - len(shown)} more layers"] if len(shown) < len(self.layers) else []
        warnings = [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([_render(self._table(SIMPLE_HEAD, shown)), *more, self._summary(), *warnings])

    def _summary(self) -> str:
        return (
            f"Low-rank model: {self.macs_ratio:.1%} of the MACs "
            f"({quantity(self.dense_macs)} -> {quantity(self.macs)} per input), "
            f"{self.params_ratio:.1%} of the parameters ({quantity(self.dense_params)} -> {quantity(self.params)}), "
            f"{self.rank_ratio:.1%} of the ranks"
        )

    def _table(self, box: Box, layers: Iterable[LayerReport]) -> Table:
        table = Table(box=box)
        for heading in LAYER_HEADINGS:
            left = heading in ("layer", "kind", "form")
            table.add_column(heading, justify="left" if left else "right", overflow="fold")
        for layer in layers:
            table.add_row(*layer.cells())
        return table


def report_on(
    plan: Sequence[LayerPlan],
    layers: Mapping[str, SVDLayer],
    cost: ModelCost,
    spectra_before: Mapping[str, Sequence[float]],
    timeline: Sequence[RankChange] = (),
    warnings: Sequence[str] = (),
    all_dense: bool = False,
) -> SVDReport:
    """The report on factorised layers as they are now.

    Args:
        plan: What :func:`~lightning_svd.surgery.decompose` returned, for the layers it skipped.
        layers: The factorised layers by name.
        cost: Of their model.
        spectra_before: Name -> singular values when the layer was factorised.
        timeline: Every rank change.
        warnings: What the reader should know.
        all_dense: The layers are going to be dense whatever their rank.
    """
    inputs = max(1, cost.batch_size)
    rows = []
    for name, layer in layers.items():
        price = cost.layers[name]
        factored = layer.rank <= price.break_even and not all_dense
        macs, params = (price.at(layer.rank, "macs"), price.at(layer.rank, "params"))
        rows.append(
            LayerReport(
                name=name,
                kind=layer.dense_kind,
                matrix_shape=layer.matrix_shape,
                conv_mode=getattr(layer, "conv_mode", None),
                full_rank=len(spectra_before[name]),
                break_even=price.break_even,
                rank=layer.rank,
                form="factored" if factored else "dense",
                dense_macs=price.dense_macs // inputs,
                macs=(macs if factored else price.dense_macs) // inputs,
                dense_params=price.dense_params,
                params=params if factored else price.dense_params,
                spectrum_before=tuple(spectra_before[name]),
                spectrum_after=tuple(layer.spectrum()),
            )
        )
    other_macs = cost.other_macs // inputs
    return SVDReport(
        layers=tuple(rows),
        skipped=tuple((layer.name, layer.kind, layer.skipped) for layer in plan if layer.skipped),
        dense_macs=other_macs + sum(row.dense_macs for row in rows),
        macs=other_macs + sum(row.macs for row in rows),
        dense_params=cost.dense("params"),
        params=cost.other_params + sum(row.params for row in rows),
        timeline=tuple(timeline),
        warnings=tuple(warnings),
    )


def summarize(module: nn.Module, example_input: Any = None) -> SVDReport:
    """The report on a model as it is now.

    Args:
        module: With factorised layers or without.
        example_input: What ``module`` is called with, a tuple for several arguments, its first dimension the batch;
            without it MACs are not known and are 0.
    """
    layers = svd_layers(module)
    cost = count_params(module)
    if example_input is not None:
        arguments = example_input if isinstance(example_input, tuple) else (example_input,)
        with CostMeter(module) as meter, torch.no_grad():
            module(*arguments)
        cost = meter.cost(batch_size=len(arguments[0]))
    return report_on((), layers, cost, {name: layer.full_spectrum() for name, layer in layers.items()})


def plan_table(plan: Sequence[LayerPlan]) -> str:
    """The plan as a table for the terminal: what is factorised, and why the rest is not."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for heading in ("weight", "matrix", "full rank", "break-even"):
        table.add_column(heading, justify="right")
    table.add_column("skipped, because", overflow="fold")
    for layer in plan[:ROWS_ON_SCREEN]:
        numbers = ("", "", "")
        if layer.matrix_shape:
            numbers = ("{} x {}".format(*layer.matrix_shape), str(layer.full_rank), str(layer.break_even))
        shape = " x ".join(map(str, layer.weight_shape))
        table.add_row(layer.name, kind_and_mode(layer.kind, layer.conv_mode), shape, *numbers, layer.skipped or "")
    chosen = sum(not layer.skipped for layer in plan)
    more = f"... and {len(plan) - ROWS_ON_SCREEN} more layers\n" if len(plan) > ROWS_ON_SCREEN else ""
    return f"{_render(table)}{more}SVD training: {chosen} of {len(plan)} layers with a weight matrix are factorised"


def kind_and_mode(kind: str, conv_mode: str | None) -> str:
    """ "Conv2d, channel", or the kind alone."""
    return f"{kind}, {conv_mode}" if conv_mode else kind


def quantity(count: float) -> str:
    """A count with three digits and its prefix: 41.2 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.3g}"


def _render(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=WIDTH, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
