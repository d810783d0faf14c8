"""A language model trained from scratch on the sources of Python's standard library: perplexity at a budget.

    python benchmarks/text.py --folder runs --json out.json

A transformer of the Llama kind on bytes, on one schedule of AdamW: dense, SVD training by the callback, truncated at
half time, and dense but narrower. All see the same windows in the same order. Each final net is kept in ``--folder``,
where a later call finds it; what a net takes is measured in the end, all of them taking turns. Budgets are shares of
the dense net's parameters; the perplexity is that of a byte, in files that nothing is trained on.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from harness import Row, Table, against, arguments, middle_half, progress, save, times
from lightning.pytorch import Callback, LightningModule, Trainer
from quality import numbers, widest
from torch import Tensor, nn
from trained_nets import LENGTH, Batch, LanguageModel, next_byte_loss, random_windows, sources, warm_cosine, windows_of

from lightning_svd import SVDTrainingCallback, compress

WIDTH, BLOCKS, HEADS = 256, 4, 8
QUICK_WIDTH = 32
BATCH = 16
TESTED = 512  # windows that a net is measured on
TIMED = 16  # windows in the batch that is timed


@dataclass(frozen=True)
class Work:
    """What all runs have in common.

    Attributes:
        folder: Where final nets are kept.
        steps: Of the whole schedule.
        rate: The learning rate at its highest.
        width: Of the dense net.
        seed: Of its weights and of what it sees.
    """

    folder: Path
    steps: int
    rate: float
    width: int
    seed: int

    @functools.cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """Bytes to train on, and bytes to measure on."""
        return sources()

    def build(self, width: float | None = None) -> nn.Module:
        """The net with the weights that it begins with."""
        torch.manual_seed(self.seed)
        return LanguageModel(int(width or self.width), BLOCKS, HEADS)

    def fit(self, model: nn.Module, steps: tuple[int, int], *callbacks: Callback) -> nn.Module:
        """Train over these steps of the schedule, from the first to the one before the last."""
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            callbacks=[*callbacks, Progress()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Language(self, model, steps[0]), Windows(self, *steps))
        return model.eval()

    def calibration(self) -> list[Tensor]:
        """Inputs by which MACs are counted."""
        return [random_windows(self.texts[0], BATCH, torch.Generator().manual_seed(self.seed))[0]]


class Language(LightningModule):
    """What a user would write.

    Args:
        work: The schedule.
        model: What is trained.
        first: The step that it begins at.
    """

    def __init__(self, work: Work, model: nn.Module, first: int) -> None:
        super().__init__()
        self.work, self.model, self.first = work, model, first

    def forward(self, text: Tensor) -> Tensor:
        return self.model(text)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return next_byte_loss(self.model(batch[0]).float(), batch[1])

    def rate(self, step: int) -> float:
        """Of a step of the whole schedule, from 1 on, as a share of the highest rate."""
        return warm_cosine(step / self.work.steps)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.work.rate, betas=(0.9, 0.95), weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(self.first + step + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Windows:
    """The batches of steps of the schedule, each a function of the seed and of its step."""

    def __init__(self, work: Work, first: int, last: int) -> None:
        self.work, self.first, self.last = work, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, self.last):
            generator = torch.Generator().manual_seed(self.work.seed + 1_000_003 * step)
            yield random_windows(self.work.texts[0], BATCH, generator)


class Progress(Callback):
    """Says what the loss is."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % 100 == 0:
            progress(f"step {batch_idx} of {trainer.num_training_batches}, loss {float(outputs['loss']):.3f}")


# ------------------------------------------------------------------------------------------------------------- methods


def dense(work: Work, target: float) -> nn.Module:
    """The dense net; that of half time is kept."""
    model, half = work.build(), work.steps // 2

    class Half(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == half:
                torch.save(pl_module.model.state_dict(), work.folder / "half.pt")

    return work.fit(model, (0, work.steps), Half())


def ours(work: Work, target: float, **arguments: Any) -> nn.Module:
    """SVD training by the callback, default arguments but for these."""
    return work.fit(work.build(), (0, work.steps), SVDTrainingCallback(target_params=target, **arguments))


def truncate_at_half(work: Work, target: float) -> nn.Module:
    """The dense run's net of half time, truncated by its spectra, trained on within the same schedule."""
    model = work.build()
    model.load_state_dict(torch.load(work.folder / "half.pt", weights_only=True))
    model, _ = compress(model, work.calibration(), target_params=target, importance="spectrum", progress=False)
    return work.fit(model, (work.steps // 2, work.steps))


def narrow(work: Work, target: float) -> nn.Module:
    """A dense net of fewer features with as many parameters."""
    budget = target * parameters(work.build())
    width = widest([*range(2 * HEADS, work.width, 2 * HEADS)], lambda each: parameters(work.build(each)) <= budget)
    return work.fit(work.build(width), (0, work.steps))


METHODS: dict[str, Callable[[Work, float], nn.Module]] = {
    "dense": dense,
    "ours": ours,
    "ours_by_spectrum": functools.partial(ours, importance="spectrum"),
    "truncate_at_half": truncate_at_half,
    "narrow": narrow,
}


def parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in model.parameters())


def final(work: Work, method: str, target: float) -> nn.Module:
    """The trained net of a method, of an earlier call if there was one."""
    path = work.folder / f"{method}-{target}.pt"
    if path.exists():
        return torch.load(path, weights_only=False)  # written here
    progress(f"{method} at {target} of the parameters")
    model = METHODS[method](work, target)
    torch.save(model, path)
    return model


# ------------------------------------------------------------------------------------------------------------ the table


@torch.inference_mode()
def perplexity(model: nn.Module, work: Work) -> float:
    """Of a byte, in the files that nothing is trained on."""
    test = work.texts[1]
    windows = windows_of(test, torch.linspace(0, len(test) - LENGTH - 1, TESTED).long())
    losses = [next_byte_loss(model(x), y) for x, y in zip(*(part.split(32) for part in windows), strict=True)]
    return math.exp(float(torch.stack(losses).mean()))


def rows_of(work: Work, units: list[tuple[str, float]], rounds: int) -> list[Row]:
    """A row for each net, all of them measured in turns."""
    nets = {unit: final(work, *unit) for unit in units}
    with Clock() as clock:
        seconds = clock.seconds(nets, work.calibration()[0][:TIMED], rounds)
    whole = parameters(nets[units[0]])
    return [
        {
            "method": method,
            "target": target,
            "seed": work.seed,
            "steps": work.steps,
            "rate": work.rate,
            "perplexity": perplexity(net, work),
            "params": parameters(net),
            "params_ratio": parameters(net) / whole,
            "time": against(seconds[method, target], seconds[units[0]]),
        }
        for (method, target), net in nets.items()
    ]


def tables(rows: list[Row]) -> list[Table]:
    """By budget, the best first."""
    lines = [
        [
            row["method"],
            f"{row['rate']:g}",
            str(row["seed"]),
            f"{row['perplexity']:.3f}",
            f"{row['params']:,}",
            times(row["params_ratio"]),
            times(row["time"]["ratio"]),
            middle_half(row["time"]),
        ]
        for row in sorted(rows, key=lambda row: (-row["target"], row["perplexity"]))
    ]
    headings = ["method", "rate", "seed", "perplexity", "parameters", "/ dense", "time / dense", "middle half"]
    return [Table("a language model on bytes, trained from scratch", headings, lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, 51)
    parser.add_argument("--folder", type=Path, required=True, help="of the final nets")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3e-3, help="the learning rate")
    parser.add_argument("--targets", type=numbers(float), default=[0.5, 0.25])
    parser.add_argument("--methods", type=numbers(str), default=["ours", "truncate_at_half", "narrow"])
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    for noisy in ("lightning.pytorch", "lightning_svd"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    options.folder.mkdir(parents=True, exist_ok=True)
    steps, width = (8, QUICK_WIDTH) if options.quick else (options.steps, WIDTH)
    work = Work(options.folder, steps, options.rate, width, options.seed)
    units = [("dense", 1.0), *((method, target) for target in options.targets for method in options.methods)]
    rows = rows_of(work, units, options.rounds)
    for table in tables(rows):
        table.print()
    save("text", argv, options, rows)


if __name__ == "__main__":
    main()
