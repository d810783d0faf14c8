"""What a whole fit costs: with the callback against the dense fit of the same epochs, logging on and off.

    python benchmarks/whole_run.py --json out.json
    python benchmarks/whole_run.py --quick

Fits take turns, and a row is the median of the ratios to the dense fit of the same round. Everything counts: the
decomposition before the first step, rank cuts, spectra, the compaction at the end, and a logger's own end. With so few
steps all of these weigh more than in a run of a usual length. ``floor`` is the arithmetic of the run's products against
the dense run's, step by step at the ranks of each. Images are noise: nothing is learnt, and nothing here depends on it.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from harness import Row, Table, against, arguments, middle_half, progress, save, times
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.profilers import SimpleProfiler
from step_cost import CASES, arithmetic, cost_of, factorized
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_svd import SVDReport, SVDTrainingCallback

NEVER = 10**9
LOGGERS: dict[str, Callable[[str], Logger]] = {
    "CSV": CSVLogger,
    "W&B offline": lambda folder: WandbLogger(save_dir=folder, offline=True),
}
# What the callback's hooks do, by where they do it.
PARTS = {
    "on_fit_start": "decomposition",
    "on_before_optimizer_step": "regularizer, weight decay",
    "on_train_batch_end": "rank cuts, scalars",
    "on_train_start": "first spectra",
    "on_train_epoch_end": "spectra",
    "on_fit_end": "report, compaction",
}


class Net(LightningModule):
    """What a user would write."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)


class Clock(Callback):
    """When each step began, and when the last one was over."""

    def __init__(self) -> None:
        self.began: list[float] = []
        self.over = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        self.over = time.perf_counter()


def fit(options: argparse.Namespace, target: float | None, logger_name: str | None) -> Row:
    """One fit: its seconds in all, before the first step, of each step, and of the callback's hooks."""
    torch.manual_seed(options.seed)
    build, shape = CASES[options.net]
    shape = (options.batch_size or shape[0], *shape[1:])
    batches = [(torch.randn(shape), torch.randint(10, shape[:1])) for _ in range(options.steps)]
    model, clock, profiler = Net(build()), Clock(), SimpleProfiler()
    silent = {"log_every_n_steps": NEVER, "log_spectrum_every_n_epochs": 0} if logger_name is None else {}
    ours = SVDTrainingCallback(target_macs=target, **silent) if target else None
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        logger = LOGGERS[logger_name](folder) if logger_name else False
        trainer = Trainer(
            max_epochs=options.epochs,
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            devices=1,
            callbacks=[clock, ours] if ours else [clock],
            logger=logger,
            profiler=profiler,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
        seconds = time.perf_counter() - start
    began = [*clock.began, clock.over]
    return {
        "seconds": seconds,
        "before": began[0] - start,
        "steps": [later - earlier for earlier, later in itertools.pairwise(began)],
        "hooks": {part: hook_seconds(profiler, hook) for hook, part in PARTS.items()} if ours else {},
        "floor": run_floor(build(), shape, ours.report, trainer.global_step) if ours else 1.0,
    }


def hook_seconds(profiler: SimpleProfiler, hook: str) -> float:
    """Seconds in one hook of the callback, all calls together."""
    name = SVDTrainingCallback.__name__
    return sum(
        sum(durations)
        for action, durations in profiler.recorded_durations.items()
        if name in action and action.endswith(f".{hook}")
    )


def run_floor(net: nn.Module, shape: tuple[int, ...], report: SVDReport | None, steps: int) -> float:
    """The mean over the steps of the arithmetic at the ranks of each; after the last cut that of the low-rank model."""
    assert report is not None
    cost = cost_of(factorized(net), shape)
    ranks = {layer.name.removeprefix("net."): layer.full_rank for layer in report.layers}
    total, done = 0.0, 0
    for change in report.timeline:
        total += (change.step - done) * arithmetic(cost, ranks)
        ranks, done = {name.removeprefix("net."): rank for name, rank in change.ranks.items()}, change.step
    return (total + (steps - done) * cost.ratio(ranks, "macs")) / steps


def summary(what: str, name: str, base: str, fits: dict[str, list[Row]], options: argparse.Namespace) -> Row:
    """A row of a table: this kind of fit against another."""
    mine = fits[name]
    tail = max(1, round(0.3 * len(mine[0]["steps"])))  # the last phase: ranks are frozen
    last = [sum(one["steps"][-tail:]) for one in mine]
    return {
        "what": what,
        "net": options.net,
        "variant": name,
        "against": base,
        "epochs": options.epochs,
        "steps": options.epochs * options.steps,
        **against([one["seconds"] for one in mine], [one["seconds"] for one in fits[base]]),
        "floor": mine[0]["floor"],
        "last_phase": against(last, [sum(one["steps"][-tail:]) for one in fits[base]])["ratio"],
        "before": statistics.median(one["before"] for one in mine),
        "hooks": {part: statistics.median(one["hooks"][part] for one in mine) for part in mine[0]["hooks"]},
    }


def measure(options: argparse.Namespace) -> list[Row]:
    """Rows of every kind of fit against the dense one, then of logging against the same fit without."""
    ours = f"ours, to {options.target:g} of the MACs"
    kinds: dict[str, tuple[float | None, str | None]] = {"dense": (None, None), ours: (options.target, None)}
    for logger in options.loggers:
        kinds |= {f"dense, {logger}": (None, logger), f"{ours}, {logger}": (options.target, logger)}
        progress(f"starting {logger}")  # what starts but once in a process is not to be the first fit's cost
        fit(argparse.Namespace(**vars(options) | {"epochs": 1, "steps": 2}), options.target, logger)
    fits: dict[str, list[Row]] = {name: [] for name in kinds}
    for turn in range(options.rounds):
        for name, (target, logger) in kinds.items():
            progress(f"round {turn + 1} of {options.rounds}: {name}")
            fits[name].append(fit(options, target, logger))
    rows = [summary("fit", name, "dense", fits, options) for name in kinds]
    for name, (target, logger) in kinds.items():
        if logger:
            rows.append(summary("logging", name, ours if target else "dense", fits, options))
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """The fits, what logging adds, and where the callback spends its time."""
    made, fits = [], [row for row in rows if row["what"] == "fit"]
    cells = [
        [
            row["variant"],
            times(row["ratio"]),
            middle_half(row),
            times(row["floor"]),
            times(row["last_phase"]),
            f"{row['before']:.1f}",
            f"{row['seconds']:.1f}",
        ]
        for row in fits
    ]
    headings = ["fit", "fit / dense", "middle half", "floor", "last 30 % of steps", "s before step 1", "s"]
    made.append(Table(f"{fits[0]['net']}, {fits[0]['epochs']} epochs, {fits[0]['steps']} steps", headings, cells))
    logged = [
        [row["variant"], f"{row['ratio']:.3f}", f"{row['low']:.3f} - {row['high']:.3f}"]
        for row in rows
        if row["what"] == "logging"
    ]
    if logged:
        made.append(Table("With a logger against the same without", ["fit", "ratio", "middle half"], logged))
    ours = [row for row in fits if row["hooks"]]
    parts = [
        [part, *(f"{row['hooks'][part]:.2f} s, {row['hooks'][part] / row['seconds']:.1%}" for row in ours)]
        for part in ours[0]["hooks"]
    ]
    made.append(Table("In the callback, and as a share of the fit", ["part", *(row["variant"] for row in ours)], parts))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--net", choices=list(CASES), default="resnet18")
    parser.add_argument("--batch-size", type=int, help="that of the net's case if not given")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15, help="in an epoch")
    parser.add_argument("--target", type=float, default=0.35, help="share of the MACs to end with")
    parser.add_argument(
        "--loggers", type=lambda text: text.split(",") if text else [], default=["W&B offline"], help="CSV, W&B offline"
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.net, options.batch_size, options.epochs, options.steps, options.rounds = "resnet20", 16, 2, 8, 1
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    rows = measure(options)
    for table in tables(rows):
        table.print()
    save("whole_run", argv, options, rows)


if __name__ == "__main__":
    main()
