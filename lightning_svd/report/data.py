"""What happened to a model: frozen data, and the same as text, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_svd.arguments import check_module, needs
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.counting import count_costs, count_params
from lightning_svd.model.plan import LayerPlan, large_left_alone
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.report.tables import is_wide, markdown_code, markdown_table, markdown_text, screen_table
from lightning_svd.writing import write_whole

LAYER_HEADINGS = ("layer", "kind", "matrix", "full rank", "break-even", "rank", "MACs", "parameters", "form")
PLAN_HEADINGS = ("layer", "kind", "weight", "matrix", "full rank", "break-even", "skipped, because")
SKIPPED_HEADINGS = ("layer", "kind", "because")
ARGUMENT_HEADINGS = ("argument", "value")
BUDGET_HEADINGS = ("budget", "MACs", "parameters", "ranks")
TIME_HEADING = "time"  # only where it was measured
TEXT_HEADINGS = ("layer", "kind", "form", "skipped, because", "because", "argument", "value")
LATE = 0.1  # by which a model may take longer than was asked for before that is said
WIDE_ONLY = ("kind", "weight", "break-even")


@dataclass(frozen=True)
class RankChange:
    """One cut: the ranks and the costs after it.

    Attributes:
        step: Optimizer steps before it.
        epoch: Epoch in which it happened.
        ranks: Name of each factorized layer -> its rank.
        macs_ratio: Share of the dense model's MACs.
        params_ratio: Share of the dense model's parameters.
    """

    step: int
    epoch: int
    ranks: Mapping[str, int]
    macs_ratio: float
    params_ratio: float

    def __str__(self) -> str:
        macs = "" if math.isnan(self.macs_ratio) else f"MACs {self.macs_ratio:.1%}, "
        ranks = f"{sum(self.ranks.values())} ranks"
        return f"step {self.step} (epoch {self.epoch}): {ranks}, {macs}parameters {self.params_ratio:.1%}"


@dataclass(frozen=True)
class BudgetRanks:
    """Ranks of one budget of a model that was trained for many.

    Attributes:
        share: The budget, a share of what the run's own budget was a share of.
        ranks: Name of each factorized layer -> its rank there.
        macs_ratio: Share of the dense model's MACs at these ranks.
        params_ratio: Share of the dense model's parameters.
    """

    share: float
    ranks: Mapping[str, int]
    macs_ratio: float
    params_ratio: float

    def cells(self) -> tuple[str, ...]:
        """A row of a table under ``BUDGET_HEADINGS``."""
        shares = (percentage(share) for share in (self.share, self.macs_ratio, self.params_ratio))
        return (*shares, str(sum(self.ranks.values())))


@dataclass(frozen=True)
class Pause:
    """A stretch of training in which ranks did not fall, because the watched metric had fallen too far.

    Attributes:
        start: Step at which the metric was found fallen.
        end: Step at which it had recovered; None if it did not.
        value: The metric at ``start``.
        best: Its best until then.
    """

    start: int
    end: int | None
    value: float
    best: float

    def __str__(self) -> str:
        until = f"step {self.end}" if self.end is not None else "the end"
        against = "with no number before" if math.isnan(self.best) else f"against {self.best:.4g} at best"
        return f"paused from step {self.start} to {until}: {self.value:.4g} {against}"


@dataclass(frozen=True)
class LayerReport:
    """What became of one factorized layer.

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
        spectrum_before: Singular values when the layer was factorized, descending.
        spectrum_after: Kept singular values now, descending.
        dense_seconds: Measured time of the dense layer for the inputs that were counted; None if it was not measured.
        seconds: The same of the layer as it is now.
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
    dense_seconds: float | None = None
    seconds: float | None = None

    @property
    def label(self) -> str:
        """The name as it is shown."""
        return label(self.name)

    def cells(self) -> tuple[str, ...]:
        """A row of a table under ``LAYER_HEADINGS``."""
        return (
            self.label,
            kind_and_mode(self.kind, self.conv_mode),
            "{} x {}".format(*self.matrix_shape),
            str(self.full_rank),
            str(self.break_even),
            str(self.rank),
            share(self.macs, self.dense_macs),
            share(self.params, self.dense_params),
            self.form,
        )


@dataclass(frozen=True)
class LatencyReport:
    """How long the model takes against the dense one.

    Attributes:
        dense_seconds: Of the dense model, measured.
        seconds: Of the model as it is now, by the table of its layers' times.
        measured: Share of the dense model's time, both timed at the end; None if they were not.
        dense_at_end: Seconds of the dense model then; other than before where the machine is not steady.
        conditions: What the table was measured on and how, by name.
    """

    dense_seconds: float
    seconds: float
    measured: float | None = None
    dense_at_end: float | None = None
    conditions: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Share of the dense model's time, by the table."""
        return self.seconds / self.dense_seconds

    def missed(self, share: float) -> str | None:
        """How far the model is from the share of the time that was asked for; None if not by more than a tenth."""
        takes = max(self.ratio, self.measured or 0.0)
        if takes <= (1 + LATE) * share:
            return None
        return (
            f"the model takes {takes:.1%} of the dense one's time, and {share:.1%} was asked for: no ranks were found "
            f"that take less, or the machine was busy while they were measured{self._unsteady()}; a table that is "
            "measured where it is idle, by `lightning-svd profile`, is the same for all runs"
        )

    def _unsteady(self) -> str:
        then, now = self.dense_seconds, self.dense_at_end or self.dense_seconds
        if abs(now - then) <= LATE * then:
            return ""
        return f" (the dense model took {1e3 * then:.3g} ms before, and {1e3 * now:.3g} ms at the end)"

    def __str__(self) -> str:
        measured = "" if self.measured is None else f", {self.measured:.1%} measured"
        seconds = f"{1e3 * self.dense_seconds:.3g} ms -> {1e3 * self.seconds:.3g} ms by the table"
        return f"{self.ratio:.1%} of the time ({seconds}{measured})"


@dataclass(frozen=True)
class SVDReport:
    """What SVD training did to a model: each layer's rank and cost, totals, and the history of the run.

    Attributes:
        layers: Every factorized layer.
        skipped: (name, class, reason) of every layer with a weight matrix that was left alone.
        dense_macs: MACs of the dense model for one input, everything included.
        macs: MACs now.
        dense_params: Parameters of the dense model.
        params: Parameters now.
        timeline: Every rank change.
        warnings: What went otherwise than asked for.
        left_alone: What of the model is left alone and how large it is, by the reason; None where that is little.
        strengths: (optimizer step, sparsity weight) from the first step to the last; empty if not known.
        metric: Name of the metric that was watched; None if none was.
        metric_values: (optimizer step, its value) of every validation.
        pauses: When ranks did not fall because the metric had.
        arguments: What the run was asked for, by the names of the callback's arguments; empty if not known.
        latency: How long the model takes; None if that was no budget.
        nested: The ranks of each budget that was trained, ascending; empty unless the schedule was Nested. What the
            small models are worth, is to be measured for each by itself.
    """

    layers: tuple[LayerReport, ...]
    skipped: tuple[tuple[str, str, str], ...]
    dense_macs: int
    macs: int
    dense_params: int
    params: int
    timeline: tuple[RankChange, ...] = ()
    warnings: tuple[str, ...] = ()
    left_alone: str | None = None
    strengths: tuple[tuple[int, float], ...] = ()
    metric: str | None = None
    metric_values: tuple[tuple[int, float], ...] = ()
    pauses: tuple[Pause, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    latency: LatencyReport | None = None
    nested: tuple[BudgetRanks, ...] = ()

    @property
    def macs_ratio(self) -> float:
        """Share of the dense model's MACs; NaN if they are not known."""
        return self.macs / self.dense_macs if self.dense_macs else math.nan

    @property
    def params_ratio(self) -> float:
        """Share of the dense model's parameters."""
        return self.params / max(1, self.dense_params)

    @property
    def is_timed(self) -> bool:
        """Whether how long layers take was measured."""
        return any(layer.dense_seconds is not None for layer in self.layers)

    @property
    def headings(self) -> tuple[str, ...]:
        """Of :meth:`rows`."""
        return (*LAYER_HEADINGS, TIME_HEADING) if self.is_timed else LAYER_HEADINGS

    def rows(self) -> list[tuple[str, ...]]:
        """The table of layers."""
        rows = [layer.cells() for layer in self.layers]
        if self.is_timed:
            times = [share(layer.seconds or 0.0, layer.dense_seconds or 0.0) for layer in self.layers]
            rows = [(*row, time) for row, time in zip(rows, times, strict=True)]
        return rows

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
        """As JSON; also written to ``path`` if given. A number that is not finite becomes null."""
        return _written(json.dumps(finite(self.to_dict()), indent=2, allow_nan=False, default=str), path)

    @classmethod
    def from_json(cls, source: str | Path) -> SVDReport:
        """The report that :meth:`to_json` wrote.

        Args:
            source: The file's path, or the text itself.

        Raises:
            ValueError: If ``source`` holds something else.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        text = str(source) if is_text else Path(source).read_text(encoding="utf-8")
        try:
            data = json.loads(text)
            layers = tuple(_read_layer(layer) for layer in data.pop("layers"))
            timeline = tuple(RankChange(**_with_nan(change)) for change in data.pop("timeline"))
            pauses = tuple(
                Pause(**pause | {key: _number(pause[key]) for key in ("value", "best")})
                for pause in data.pop("pauses", ())
            )
            arguments = data.pop("arguments", {})
            latency = data.pop("latency", None)
            nested = tuple(BudgetRanks(**_with_nan(budget)) for budget in data.pop("nested", ()))
            latency = LatencyReport(**latency) if latency else None
            for name in ("strengths", "metric_values"):
                data[name] = [(step, _number(value)) for step, value in data.get(name, ())]
            fields: dict[str, Any] = {name: _tuples(value) for name, value in data.items() if name not in _RATIOS}
            history: dict[str, Any] = {"timeline": timeline, "pauses": pauses, "arguments": arguments, "nested": nested}
            return cls(layers=layers, latency=latency, **history, **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"`source` must be a report that `to_json` wrote: {error}") from error

    def to_markdown(self, path: str | Path | None = None) -> str:
        """As Markdown: a summary, warnings, and tables of all layers; also written to ``path`` if given."""
        layers = [(markdown_code(name), *map(markdown_text, rest)) for name, *rest in self.rows()]
        skipped = [(markdown_code(label(name)), *map(markdown_text, rest)) for name, *rest in self.skipped]
        arguments = [
            (markdown_code(name), markdown_code(json.dumps(value, default=str)))
            for name, value in self.arguments.items()
        ]
        parts = [self._summary(), *(f"**Warning:** {markdown_text(warning)}" for warning in self.warnings)]
        parts += [f"Left alone are {markdown_text(self.left_alone)}."] if self.left_alone else []
        for title, headings, rows in (
            ("Layers", self.headings, layers),
            ("Budgets", BUDGET_HEADINGS, [budget.cells() for budget in self.nested]),
            ("Left alone", SKIPPED_HEADINGS, skipped),
            ("Asked for", ARGUMENT_HEADINGS, arguments),
        ):
            if rows:
                parts += [f"**{title}**", markdown_table(headings, rows, TEXT_HEADINGS)]
        return _written("\n\n".join(parts) + "\n", path)

    def to_html(self, path: str | Path, comparison: Mapping[str, tuple[str, str]] | None = None) -> Path:
        """One self-contained page with rank curves and spectra, for screens of any width and for print.

        Args:
            path: File to write.
            comparison: Further rows of the summary: name -> (dense, low-rank), for instance the accuracies.

        Returns:
            The path.
        """
        path = Path(path)
        with needs("report"):
            from lightning_svd.report.page import render_page  # knows this module

            page = render_page(self, comparison or {})
        _written(page, path)
        return path

    def __str__(self) -> str:
        table = [screen_table(self.headings, self.rows(), TEXT_HEADINGS, WIDE_ONLY)] if self.layers else []
        separator = ", " if is_wide() else ",\n"
        rest = [f"left alone: {self.left_alone}"] if self.left_alone else []
        warnings = [f"warning: {warning}" for warning in self.warnings]
        return "\n".join([*table, *rest, self._summary(separator), *warnings])

    def _summary(self, separator: str = ", ") -> str:
        parts = [
            f"{self.params_ratio:.1%} of the parameters ({quantity(self.dense_params)} -> {quantity(self.params)})"
        ]
        if self.dense_macs:
            macs = f"({quantity(self.dense_macs)} -> {quantity(self.macs)} per input)"
            parts.insert(0, f"{self.macs_ratio:.1%} of the MACs {macs}")
        if self.latency:
            parts.insert(0, str(self.latency))
        if self.layers:
            parts.append(f"{self.rank_ratio:.1%} of the ranks")
        if self.nested:
            parts.append(
                f"trained for {len(self.nested)} budgets from {self.nested[0].share:.1%} up, each to be judged by "
                "itself as `to_factored` gives it"
            )
        return f"Low-rank model: {separator.join(parts)}"


def report_on(
    plan: Sequence[LayerPlan],
    layers: Mapping[str, SVDLayer],
    cost: ModelCost,
    spectra_before: Mapping[str, Sequence[float]],
    all_dense: bool = False,
    spectra_after: Mapping[str, Sequence[float]] | None = None,
) -> SVDReport:
    """The report on factorized layers as they are now, without the history of a run.

    Args:
        plan: What :func:`~lightning_svd.model.surgery.decompose` returned, for the layers it skipped.
        layers: The factorized layers by name.
        cost: Of their model.
        spectra_before: Name -> singular values when the layer was factorized.
        all_dense: The layers are going to be dense whatever their rank.
        spectra_after: Name -> singular values now, of layers whose own are known.
    """
    inputs = max(1, cost.batch_size)
    rows = []
    for name, layer in layers.items():
        price = cost.layers[name]
        factored = price.pays(layer.rank) and not all_dense
        macs, params = (price.at(layer.rank, "macs"), price.at(layer.rank, "params"))
        rows.append(
            LayerReport(
                name=name,
                kind=layer.view.layer_type.__name__,
                matrix_shape=layer.matrix_shape,
                conv_mode=layer.conv_mode,
                full_rank=len(spectra_before[name]),
                break_even=price.break_even,
                rank=layer.rank,
                form="factored" if factored else "dense",
                dense_macs=price.dense_macs // inputs,
                macs=(macs if factored else price.dense_macs) // inputs,
                dense_params=price.dense_params,
                params=params if factored else price.dense_params,
                spectrum_before=tuple(spectra_before[name]),
                spectrum_after=tuple((spectra_after or {}).get(name) or layer.spectrum()),
                dense_seconds=price.latency.dense if price.latency else None,
                seconds=(price.latency.at(layer.rank) if factored else price.latency.dense) if price.latency else None,
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
        latency=_latency(cost, {row.name: row.full_rank if row.form == "dense" else row.rank for row in rows}),
        left_alone=large_left_alone(plan, cost.dense("params")),
    )


def _latency(cost: ModelCost, ranks: Mapping[str, int]) -> LatencyReport | None:
    if cost.latency is None:
        return None
    priced = cost.by("latency")
    seconds = cost.latency.dense * priced.share(priced.total(ranks))
    return LatencyReport(cost.latency.dense, seconds, conditions=cost.latency.conditions)


def summarize(module: nn.Module, example_input: Any = None) -> SVDReport:
    """The report on a model as it is now.

    Args:
        module: With factorized layers or without.
        example_input: What ``module`` is called with, a tuple for several arguments, its first dimension the batch;
                without it MACs are not known: they are 0, and their ratio is NaN.
    """
    check_module("module", module)
    return summarize_planned(module, (), example_input)


def summarize_planned(module: nn.Module, plan: Sequence[LayerPlan], example_input: Any = None) -> SVDReport:
    """As :func:`summarize`, with what a plan says of the layers that were left alone."""
    layers = svd_layers(module)
    cost = count_params(module) if example_input is None else count_costs(module, example_input)
    return report_on(plan, layers, cost, {name: _stored_spectrum(layer) for name, layer in layers.items()})


def _stored_spectrum(layer: SVDLayer) -> list[float]:
    """The singular values of all ranks that there is storage for, those that are not in use as they were then."""
    spectrum: list[float] = layer.energies().sqrt().sort(descending=True).values.tolist()
    return spectrum


def plan_table(plan: Sequence[LayerPlan]) -> str:
    """The plan as a table for the terminal: what is factorized, and why the rest is not."""
    chosen = sum(not layer.skipped for layer in plan)
    table = screen_table(PLAN_HEADINGS, [_plan_cells(layer) for layer in plan], TEXT_HEADINGS, WIDE_ONLY)
    return f"{table}\nSVD training: {chosen} of {len(plan)} layers with a weight matrix are factorized"


def _plan_cells(layer: LayerPlan) -> tuple[str, ...]:
    numbers = ("", "", "")
    if layer.matrix_shape:
        numbers = ("{} x {}".format(*layer.matrix_shape), str(layer.full_rank), str(layer.break_even))
    shape = " x ".join(map(str, layer.weight_shape))
    return (label(layer.name), kind_and_mode(layer.kind, layer.conv_mode), shape, *numbers, layer.skipped or "")


def label(name: str) -> str:
    """A layer's name as it is shown; a model that is itself a layer has none."""
    return name or "(model)"


def kind_and_mode(kind: str, conv_mode: str | None) -> str:
    """ "Conv2d, channel", or the kind alone."""
    return f"{kind}, {conv_mode}" if conv_mode else kind


def quantity(count: float) -> str:
    """A count with three digits and its prefix: 41.2 M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:  # what three digits round up to it
            return f"{count / size:#.3g}".rstrip(".") + f" {prefix}"
    return f"{count:.3g}"


def percentage(ratio: float) -> str:
    """A share with a decimal, "35.0%"; "-" if it is not known."""
    return "-" if math.isnan(ratio) else f"{ratio:.1%}"


def share(now: float, dense: float) -> str:
    """ "35%" of what was there; "-" if that is not known."""
    return f"{now / dense:.0%}" if dense else "-"


# In files

_RATIOS = ("macs_ratio", "params_ratio", "rank_ratio")


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_whole(path, text)
    return text


def finite(value: Any) -> Any:
    """Nested values, the same with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _with_nan(change: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in change.items()}


def _read_layer(data: Mapping[str, Any]) -> LayerReport:
    spectra = {name: tuple(map(_number, data[name])) for name in ("spectrum_before", "spectrum_after")}
    return LayerReport(**{name: _tuples(value) for name, value in data.items()} | spectra)
