"""What is drawn of a run, and on which logger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_svd.report import SVDReport
from lightning_svd.run import SVDRun

HISTOGRAM_BINS = 64


def scalars(run: SVDRun) -> dict[str, float | Tensor]:
    """The numbers of the present step that every logger gets, totals in section ``svd``, ranks in ``svd_rank``."""
    values: dict[str, float | Tensor] = {
        "svd/rank_ratio": run.rank_ratio(),
        "svd/macs_ratio": run.ratio("macs"),
        "svd/params_ratio": run.ratio("params"),
        "svd/sparsity_strength": run.strength,
    }
    if run.penalties is not None:
        values["svd/orthogonality_error"] = run.penalties.orthogonality_error
        values["svd/orthogonality_penalty"] = run.penalties.orthogonality
        values["svd/sparsity_penalty"] = run.penalties.sparsity
    return values | {f"svd_rank/{metric_name(name)}": float(rank) for name, rank in run.ranks().items()}


def metric_name(layer: str) -> str:
    """A layer's name as part of a metric's: W&B cannot define or sort names with dots."""
    return layer.replace(".", "_") or "model"


def log_spectra(
    loggers: Iterable[Logger], now: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]], step: int
) -> None:
    """Each layer's singular values as a curve over their index, beside those of the start, and as a histogram.

    Args:
        loggers: Those that can draw them do; at present W&B.
        now: Layer -> kept singular values, descending.
        before: Layer -> singular values at the start, descending.
        step: Of the trainer.
    """
    for logger in _wandb_loggers(loggers):
        charts: dict[str, Any] = {}
        for name, spectrum in now.items():
            charts |= _spectrum_charts(metric_name(name), spectrum, before[name])
        if charts:
            logger.log_metrics(charts, step=step)


def log_layer_table(loggers: Iterable[Logger], report: SVDReport, step: int) -> None:
    """The table of layers at the end, one fresh table because W&B's cannot be added to."""
    for logger in _wandb_loggers(loggers):
        import wandb

        columns = ["layer", "kind", "m", "n", "full_rank", "break_even", "rank", "form", "macs", "dense_macs"]
        columns += ["params", "dense_params"]
        rows = [
            [layer.name, layer.kind, *layer.matrix_shape, *(getattr(layer, column) for column in columns[4:])]
            for layer in report.layers
        ]
        logger.log_metrics({"svd_layers": wandb.Table(columns=columns, data=rows)}, step=step)


def _spectrum_charts(name: str, now: Sequence[float], before: Sequence[float]) -> dict[str, Any]:
    """The charts of one layer; none where a value is not finite, which W&B would raise on."""
    import wandb

    if not now or not all(map(math.isfinite, now)):
        return {}
    indices = [list(range(1, 1 + len(values))) for values in (before, now)]
    curve = wandb.plot.line_series(
        xs=indices, ys=[list(before), list(now)], keys=["start", "now"], title=name, xname="index"
    )
    counts, edges = torch.histogram(torch.tensor(now), bins=min(HISTOGRAM_BINS, max(1, len(now))))
    histogram = wandb.Histogram(np_histogram=(counts.tolist(), edges.tolist()))
    return {f"svd_spectrum/{name}": curve, f"svd_histogram/{name}": histogram}


def _wandb_loggers(loggers: Iterable[Logger]) -> list[Logger]:
    """By name: lightning and pytorch_lightning have a class each, and importing neither needs wandb."""
    return [logger for logger in loggers if any(t.__name__ == "WandbLogger" for t in type(logger).__mro__)]
