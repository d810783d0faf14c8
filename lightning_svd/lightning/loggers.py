"""What is drawn of a run, and on which logger.

Every logger gets numbers. W&B and TensorBoard also get pictures: for each layer a histogram of its singular values
every time spectra are drawn, and for the ``MOST_CHARTS`` layers with the most parameters charts over time. A chart
holds its own past and costs a file and a moment, so it is drawn again only when the number of drawings has doubled,
and at the end: at most ``MOST_CHARTS * (log2(drawings) + 2)`` table artifacts in a run.
"""

from __future__ import annotations

import math
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_svd.lightning import trainers
from lightning_svd.model.plan import LayerPlan
from lightning_svd.report.data import SVDReport
from lightning_svd.report.heat_map import FLOOR, HeatMap, heat_map_page
from lightning_svd.training.run import SVDTraining

HISTOGRAM_BINS = 64
MOST_CHARTS = 6
MOST_INDICES = 32  # of a spectrum in a chart, evenly spaced
MOST_EPOCHS = 48  # in a heat map, evenly spaced
MOST_CURVES = 3  # of one layer in a chart: the start, the middle, now
SHARE = "s / largest s at the start"

Spectra = Mapping[str, Sequence[float]]

# ------------------------------------------------------------------------------------------------------------- numbers


def scalars(run: SVDTraining) -> dict[str, float | Tensor]:
    """The numbers of the present step but for the ranks, in section ``svd``."""
    values: dict[str, float | Tensor] = {**_of_ranks(run).totals, "svd/sparsity_strength": run.strength}
    if run.penalties is not None:
        values["svd/orthogonality_error"] = run.penalties.orthogonality_error
        values["svd/orthogonality_penalty"] = run.penalties.orthogonality
        values["svd/sparsity_penalty"] = run.penalties.sparsity
    if run.guard is not None:
        values["svd/paused"] = float(run.paused)
    return values


def log_scalars(pl_module: LightningModule, run: SVDTraining) -> None:
    """Log :func:`scalars`, two of them under short names in the progress bar, and each layer's rank in ``svd_rank``.

    They go to the loggers directly: what ``pl_module.log`` gets in some steps is logged anew in all that follow, and
    each name costs 0.3 ms.
    """
    values, trainer = scalars(run), pl_module.trainer
    pl_module.log_dict(values, logger=False, batch_size=1)
    in_bar = {"svd_macs": values["svd/macs_ratio"], "svd_rank": values["svd/total_rank"]}
    pl_module.log_dict(in_bar, prog_bar=True, logger=False, batch_size=1)
    known, done = _of_ranks(run), trainers.steps_done(trainer)
    # Where gradients accumulate several batches come at one step; and the Trainer's interval is a gate for all.
    if trainer.is_global_zero and done != known.logged_at and done % trainers.log_interval(trainer) == 0:
        known.logged_at = done
        numbers = {name: float(value) for name, value in values.items()} | known.ranks if trainer.loggers else {}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=done - 1)


@dataclass
class _OfRanks:
    """The numbers of a run that change only when its ranks do, some twenty times.

    Attributes:
        since: What tells that they are still those.
        totals: In section ``svd``.
        ranks: Of each layer, in section ``svd_rank``.
        logged_at: The last step at which the ranks were logged.
    """

    since: tuple[Any, ...]
    totals: dict[str, float]
    ranks: dict[str, float]
    logged_at: int = -1


_KNOWN: weakref.WeakKeyDictionary[SVDTraining, _OfRanks] = weakref.WeakKeyDictionary()


def _of_ranks(run: SVDTraining) -> _OfRanks:
    known = _KNOWN.get(run)
    since = (len(run.timeline), len(run.layers), run.last_cut, run.cost is None)
    if known is None or known.since != since:
        ranks = run.ranks()
        totals = {
            "svd/total_rank": float(sum(ranks.values())),
            "svd/rank_ratio": run.rank_ratio(),
            "svd/macs_ratio": run.ratio("macs"),
            "svd/params_ratio": run.ratio("params"),
        }
        named = {f"svd_rank/{metric_name(name)}": float(rank) for name, rank in ranks.items()}
        known = _KNOWN[run] = _OfRanks(since, totals, named, known.logged_at if known else -1)
    return known


def metric_name(layer: str) -> str:
    """A layer's name as part of a metric's: W&B cannot define or sort names with dots."""
    return layer.replace(".", "_") or "model"


# ---------------------------------------------------------------------------------------------- the start and the end


def log_start(loggers: Iterable[Logger], arguments: Mapping[str, Any], run: SVDTraining, step: int) -> SpectrumHistory:
    """On W&B the callback's arguments in the run's config, as ``svd_training``, and the plan as a table.

    Other loggers get neither: their hyperparameters are the user's, MLflow lets none change when a run is resumed,
    and TensorBoard adds a metric to them.

    Returns:
        What draws the run's spectra.
    """
    for logger in _of_kind("WandbLogger", loggers):
        import wandb

        columns = ["layer", "kind", "weight", "conv_mode", "m", "n", "full_rank", "break_even", "skipped"]
        table = wandb.Table(columns=columns, data=[_plan_row(layer) for layer in run.plan])
        logger.log_hyperparams({"svd_training": dict(arguments)})
        logger.log_metrics({"svd_plan": table}, step=step)
    shapes = {name: layer.matrix_shape for name, layer in run.layers.items()}
    return SpectrumHistory(shapes, run.spectra_before)


def _plan_row(layer: LayerPlan) -> list[Any]:
    weight, (m, n) = " x ".join(map(str, layer.weight_shape)), layer.matrix_shape or (None, None)
    return [layer.name, layer.kind, weight, layer.conv_mode, m, n, layer.full_rank, layer.break_even, layer.skipped]


def log_end(loggers: Sequence[Logger], report: SVDReport, step: int) -> None:
    """What is left of the model in ``svd_final``, W&B's summary too, and on W&B the table of layers.

    The table is a fresh one, logged once, because W&B's cannot be added to.
    """
    for logger in loggers:
        ratios = ("macs_ratio", "params_ratio", "rank_ratio")
        values = {f"svd_final/{ratio}": getattr(report, ratio) for ratio in ratios}
        logger.log_metrics({key: value for key, value in values.items() if not math.isnan(value)}, step=step)
    for logger in _of_kind("WandbLogger", loggers):
        import wandb

        columns = ["layer", "kind", "m", "n", "full_rank", "break_even", "rank", "form", "macs", "dense_macs"]
        columns += ["params", "dense_params"]
        rows = [
            [layer.name, layer.kind, *layer.matrix_shape, *(getattr(layer, column) for column in columns[4:])]
            for layer in report.layers
        ]
        logger.log_metrics({"svd_layers": wandb.Table(columns=columns, data=rows)}, step=step)


# ------------------------------------------------------------------------------------------------------------- spectra


@dataclass(frozen=True)
class Chart:
    """How one layer's spectrum changed.

    Attributes:
        layer: Its name.
        indices: Of the singular values that are shown, from 1.
        epochs: Of the columns.
        columns: For each epoch the singular values at ``indices``; shorter than them where ranks were dropped.
    """

    layer: str
    indices: Sequence[int]
    epochs: Sequence[int]
    columns: Sequence[Sequence[float]]

    def curves(self) -> dict[str, Sequence[float]]:
        """A few of the columns by what to call them: the first, the last, and some between."""
        shown = [(self.epochs[i], self.columns[i]) for i in evenly(len(self.epochs), MOST_CURVES)]
        return {f"epoch {epoch}" if epoch else "start": column for epoch, column in shown}

    def heat_map(self) -> HeatMap:
        """Index over epoch, as shares of the first column's largest value."""
        largest = max(self.columns[0], default=0.0) or 1.0
        rows = [
            [column[row] / largest if row < len(column) else None for column in self.columns]
            for row in range(len(self.indices))
        ]
        return HeatMap(self.layer or "model", "epoch", self.epochs, "index", self.indices, rows)


@dataclass(frozen=True)
class Drawing:
    """What is drawn at one moment.

    Attributes:
        section: What keys begin with.
        spectra: Layer -> singular values, for a histogram each.
        charts: Of those layers that get some.
    """

    section: str
    spectra: Spectra
    charts: Sequence[Chart]


class SpectrumHistory:
    """Spectra of a run as they were, and when to draw what of them.

    It lives as long as the process: a resumed run draws on from the spectra it has.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], start: Spectra | None = None, section: str = "svd"
    ) -> None:
        """Begin with no drawing.

        Args:
            shapes: Layer -> (m, n) of its matrix.
            start: Layer -> singular values at epoch 0, descending, if they are known.
            section: What keys begin with.
        """
        most = sorted(shapes, key=lambda name: -math.prod(shapes[name]))[:MOST_CHARTS]
        self.indices = {name: evenly(min(shapes[name]), MOST_INDICES) for name in shapes if name in most}
        self.section = section
        self._past: dict[int, dict[str, Sequence[float]]] = {}
        self._drawings, self._drawn_at = 0, -1
        self._charted_at: dict[str, int] = {}
        if start is not None:
            self._remember(0, start)

    def draw(
        self, loggers: Iterable[Logger], spectra: Callable[[], Spectra], epoch: int, step: int, last: bool = False
    ) -> None:
        """Draw what is due, on the loggers that can; twice at one step only what was left out.

        Args:
            loggers: Of the trainer.
            spectra: Layer -> singular values, descending; not called where nobody draws. Those that are not finite
                are left out: W&B and NumPy raise on them.
            epoch: How many are done.
            step: Of the trainer.
            last: Whether this is the end, where charts are due.
        """
        able = [(logger, artist) for artist in _ARTISTS for logger in _of_kind(artist.kind, loggers)]
        fresh = step != self._drawn_at
        doubled = fresh and self._drawings.bit_count() == 1
        due = {
            artist.kind
            for _, artist in able
            if (last or (doubled and self._drawings >= artist.first)) and self._charted_at.get(artist.kind) != step
        }
        if not able or not (fresh or due):
            return
        now = {name: values for name, values in spectra().items() if values and math.isfinite(sum(values))}
        self._remember(epoch, now)
        charts = self.charts() if due else []
        for logger, artist in able:
            drawing = Drawing(self.section, now if fresh else {}, charts if artist.kind in due else [])
            artist.draw(logger, drawing, step)
        self._drawings, self._drawn_at = self._drawings + fresh, step
        self._charted_at |= dict.fromkeys(due, step)

    def charts(self) -> list[Chart]:
        """The charts of everything so far."""
        charts = []
        for name, indices in self.indices.items():
            epochs = [epoch for epoch, spectra in self._past.items() if name in spectra]
            epochs = [epochs[position] for position in evenly(len(epochs), MOST_EPOCHS)]
            columns = [self._past[epoch][name] for epoch in epochs]
            if columns:
                charts.append(Chart(name, [index + 1 for index in indices], epochs, columns))
        return charts

    def _remember(self, epoch: int, spectra: Spectra) -> None:
        self._past[epoch] = {
            name: array("d", (spectra[name][index] for index in indices if index < len(spectra[name])))
            for name, indices in self.indices.items()
            if name in spectra
        }


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` of the positions below ``count``, evenly spaced, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(position * (count - 1) / (most - 1)) for position in range(most)]


def _bins(values: Sequence[float]) -> int:
    return min(HISTOGRAM_BINS, len(values))


def _draw_on_wandb(logger: Logger, drawing: Drawing, step: int) -> None:
    import wandb

    media: dict[str, Any] = {}
    for name, values in drawing.spectra.items():
        counts, edges = torch.histogram(torch.tensor(values, dtype=torch.float64), bins=_bins(values))
        histogram = wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
        media[f"{drawing.section}_histogram/{metric_name(name)}"] = histogram
    for chart in drawing.charts:
        curves, name = chart.curves(), metric_name(chart.layer)
        media[f"{drawing.section}_spectrum/{name}"] = wandb.plot.line_series(
            xs=[list(chart.indices[: len(curve)]) for curve in curves.values()],
            ys=[list(curve) for curve in curves.values()],
            keys=list(curves),
            title=name,
            xname="index",
        )
    if drawing.charts:
        page = heat_map_page(SHARE, [chart.heat_map() for chart in drawing.charts])
        media[f"{drawing.section}/spectrum_heatmap"] = wandb.Html(page, inject=False)
    if media:
        logger.log_metrics(media, step=step)


def _draw_on_tensorboard(logger: Any, drawing: Drawing, step: int) -> None:
    writer = logger.experiment
    for name, values in drawing.spectra.items():
        tag = f"{drawing.section}_histogram/{metric_name(name)}"
        writer.add_histogram(tag, torch.tensor(values, dtype=torch.float64), step, bins=_bins(values))
    figure = _matplotlib_heat_maps([chart.heat_map() for chart in drawing.charts]) if drawing.charts else None
    if figure is not None:
        writer.add_figure(f"{drawing.section}/spectrum_heatmap", figure, step)


@dataclass(frozen=True)
class Artist:
    """Who draws on a kind of logger.

    Attributes:
        kind: Name of the logger's class.
        first: How many drawings come before one with charts; the end has some anyway.
        draw: What does it, on a logger, at a step.
    """

    kind: str
    first: int
    draw: Callable[[Any, Drawing, int], None]


# A figure for TensorBoard takes 0.1 s: later, when a run is seen to be no short one.
_ARTISTS = [Artist("WandbLogger", 1, _draw_on_wandb), Artist("TensorBoardLogger", 16, _draw_on_tensorboard)]


def _of_kind(kind: str, loggers: Iterable[Logger]) -> list[Logger]:
    """By name: lightning and pytorch_lightning have a class each, and importing neither needs wandb."""
    return [logger for logger in loggers if any(t.__name__ == kind for t in type(logger).__mro__)]


def _matplotlib_heat_maps(maps: Sequence[HeatMap]) -> Any:
    """A figure of the heat maps; None without matplotlib, which is not required."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError:
        return None
    columns, rows = min(3, len(maps)), math.ceil(len(maps) / 3)
    figure = Figure(figsize=(4 * columns, 3 * rows), dpi=72)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"hspace": 0.4, "wspace": 0.3}).flatten()
    for axis in axes[len(maps) :]:
        axis.remove()
    for heat_map, axis in zip(maps, axes, strict=False):
        cells = [[math.nan if share is None else max(share, FLOOR) for share in row] for row in heat_map.rows]
        axis.imshow(cells, aspect="auto", interpolation="nearest", norm=LogNorm(FLOOR, 1.0))
        axis.set(title=heat_map.title, xlabel=heat_map.x_title, ylabel=heat_map.y_title)
        for ticks, texts in ((axis.set_xticks, heat_map.x), (axis.set_yticks, heat_map.y)):
            shown = evenly(len(texts), 4)
            ticks(shown, [str(texts[place]) for place in shown])
    # A color bar takes as long to draw as all the rest.
    figure.suptitle(f"{SHARE}: {FLOOR:g} (dark) to 1 (light), logarithmic")
    return figure
