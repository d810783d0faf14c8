"""The demo: a small ResNet on scikit-learn's digits, dense and with the callback, side by side."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_svd.files.low_rank import save_low_rank
from lightning_svd.lightning.callback import SVDTrainingCallback
from lightning_svd.report.data import SVDReport, quantity, summarize

EPOCHS, BATCH_SIZE, LEARNING_RATE = 30, 64, 0.1
TEST_SIZE = 450


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(LightningModule):
    """A ResNet with 9 convolutions for images of 8x8, trained with SGD and one cosine."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.head = nn.Linear(4 * width, 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y, label_smoothing=0.1)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Result:
    """What one training gave.

    Attributes:
        accuracy: On the test images, in [0, 1].
        report: Costs.
        bytes: Of the weights as a safetensors file.
        latency: Batch size -> median seconds of a forward pass on the CPU.
    """

    accuracy: float
    report: SVDReport
    bytes: int
    latency: dict[int, float]

    def numbers(self) -> dict[str, Any]:
        """Its figures, as JSON can hold them."""
        return {
            "accuracy": self.accuracy,
            "macs": self.report.macs,
            "params": self.report.params,
            "bytes": self.bytes,
            "latency_seconds": {str(batch): seconds for batch, seconds in self.latency.items()},
        }


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,347 training and 450 test images, (n, 1, 8, 8) in [0, 1], always the same split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)[order] / 16.0
    labels = torch.tensor(data.target)[order]
    return (
        TensorDataset(images[TEST_SIZE:], labels[TEST_SIZE:]),
        TensorDataset(images[:TEST_SIZE], labels[:TEST_SIZE]),
    )


def run_demo(
    folder: Path, seeds: Sequence[int] = (0,), target_macs: float = 0.35, epochs: int = EPOCHS, logger: str = "wandb"
) -> list[tuple[Result, Result]]:
    """Train dense and low-rank for each seed, print the comparison, write report and weights to ``folder``.

    Returns:
        (dense, low-rank) for each seed.
    """
    console = Console()
    # Lightning 2.6's own use of a name that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec", category=FutureWarning)
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    for seed in seeds:
        console.print(f"[bold]Seed {seed}: dense, {epochs} epochs[/bold]")
        dense, dense_accuracy = _train(seed, epochs, False, [])
        console.print(f"[bold]Seed {seed}: SVD training to {target_macs:.0%} of the MACs, {epochs} epochs[/bold]")
        callback = SVDTrainingCallback(target_macs=target_macs)
        low_rank, accuracy = _train(seed, epochs, _logger(logger, folder), [callback], folder / "low-rank.ckpt")
        assert callback.report is not None
        report = callback.report
        latency = _latencies([dense, low_rank])
        files = _save(dense, folder / "dense.safetensors"), save_low_rank(low_rank, folder / "low-rank.safetensors")
        sizes = [file.stat().st_size for file in files]
        before = Result(dense_accuracy, summarize(dense, torch.zeros(1, 1, 8, 8)), sizes[0], latency[0])
        pairs.append((before, Result(accuracy, report, sizes[1], latency[1])))
    console.print(_table(pairs))
    # The report has rows of its own for what it counts; the rest was measured here.
    measured = {name: (before, after) for name, before, after in _rows(pairs) if name not in ("MACs", "Parameters")}
    page = pairs[-1][1].report.to_html(folder / "report.html", measured)
    console.print(f"Report, weights and logs: {folder.resolve()}\nOpen in a browser: {page.resolve()}", soft_wrap=True)
    return pairs


def _train(
    seed: int, epochs: int, logger: Logger | bool, callbacks: list[Callback], checkpoint: Path | None = None
) -> tuple[DigitsResNet, float]:
    seed_everything(seed, verbose=False)
    train, test = digits()
    model = DigitsResNet()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    loader = DataLoader(train, BATCH_SIZE, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(seed))
    trainer.fit(model, loader)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    metrics = trainer.test(model, DataLoader(test, TEST_SIZE), verbose=False)
    return model.eval(), metrics[0]["test_accuracy"]


def _logger(name: str, folder: Path) -> Logger | bool:
    if name == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")
        return WandbLogger(project="lightning-svd-demo", save_dir=folder, offline=True)
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard")
    return CSVLogger(folder, name="csv") if name == "csv" else False


def _save(model: nn.Module, path: Path) -> Path:
    save_model(model, str(path))
    return path


@torch.inference_mode()
def _latencies(models: Sequence[nn.Module], rounds: int = 5) -> list[dict[int, float]]:
    """Median seconds of a forward pass for each model at batch 1 and 64, the models taking turns."""
    times: list[dict[int, list[float]]] = [{1: [], 64: []} for _ in models]
    for batch in (1, 64):
        x = torch.rand(batch, 1, 8, 8)
        for _ in range(rounds):
            for model, collected in zip(models, times, strict=True):
                timer = Timer("model(x)", globals={"model": model, "x": x}, num_threads=torch.get_num_threads())
                collected[batch].append(timer.blocked_autorange(min_run_time=0.1).median)
    return [{batch: statistics.median(values) for batch, values in collected.items()} for collected in times]


def _rows(pairs: Sequence[tuple[Result, Result]]) -> list[tuple[str, str, str]]:
    """(what, dense, low-rank), means over the seeds."""

    def means(value: Callable[[Result], float]) -> list[float]:
        return [statistics.mean(map(value, results)) for results in zip(*pairs, strict=True)]

    def row(name: str, value: Callable[[Result], float], text: Callable[[float], str]) -> tuple[str, str, str]:
        dense, low_rank = means(value)
        return name, text(dense), f"{text(low_rank)} ({low_rank / dense:.1%})"

    accuracies = [f"{accuracy:.2%}" for accuracy in means(lambda result: result.accuracy)]
    return [
        ("Test accuracy", accuracies[0], accuracies[1]),
        row("Parameters", lambda result: result.report.params, quantity),
        row("MACs", lambda result: result.report.macs, quantity),
        row("File size", lambda result: result.bytes, lambda size: f"{size / 1e3:.0f} kB"),
        row("CPU latency, batch 1", lambda result: result.latency[1], lambda seconds: f"{seconds * 1e3:.2f} ms"),
        row("CPU latency, batch 64", lambda result: result.latency[64], lambda seconds: f"{seconds * 1e3:.2f} ms"),
    ]


def _table(pairs: Sequence[tuple[Result, Result]]) -> Table:
    seeds = f", mean of {len(pairs)} seeds" if len(pairs) > 1 else ""
    table = Table(title=f"Dense against low-rank{seeds}", title_justify="left")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("low-rank", justify="right")
    for row in _rows(pairs):
        table.add_row(*row)
    return table
