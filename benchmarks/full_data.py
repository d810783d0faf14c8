"""CIFAR-10, all 50,000 training images: one long run after the other, each taken up again where it was stopped.

    python benchmarks/full_data.py --data cifar10.npz --folder runs --json out.json
    python benchmarks/full_data.py --data cifar10.npz --folder runs --times --json out.json

Lightning trains every net and writes a checkpoint after each epoch to ``--folder``; a later call of the same command
goes on from there, and the table grows row by row. All have one recipe: SGD with Nesterov momentum, one cosine.
``truncate_at_half`` and ``ours_from_trained`` begin with the dense run of the same folder, the former at its half time,
the latter at its end, for a quarter of its epochs more. With ``--times`` nothing is trained: the final models take
turns with the dense one. Beside the rows stand those that papers report, of far more epochs.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from harness import Row, Table, arguments, progress, save, times
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from quality import (
    FINETUNE_RATE,
    FINETUNE_SHARE,
    Classifier,
    Data,
    Epochs,
    Setting,
    accuracy,
    built,
    cosine,
    macs_of,
    numbers,
    time_of,
    truncated,
    width_in_macs,
)
from torch import nn

from lightning_svd import Distillation, SVDTrainingCallback, summarize

# ResNet-20 on CIFAR-10: accuracy, times fewer MACs, epochs, and whose they are.
PUBLISHED = [
    (0.9117, 2.18, 492, "SVD training (Yang et al. 2020)"),
    (0.9092, 3.11, 492, "SVD training (Yang et al. 2020)"),
    (0.9013, 3.0, 950, "trained rank pruning (Xu et al. 2020)"),
    (0.8902, 3.85, 950, "trained rank pruning (Xu et al. 2020)"),
]


def at(setting: Setting, target: float) -> Setting:
    """The setting with a budget."""
    return replace(setting, target=target)


class Runs:
    """The runs of one folder.

    Args:
        folder: Where each has its own.
        setting: What all have in common.
    """

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting

    def fit(self, name: str, module: Classifier, *callbacks: Callback) -> nn.Module:
        """The trained net of a run that is begun, taken up or over already."""
        folder, (first, last) = self.folder / name, module.epochs
        folder.mkdir(parents=True, exist_ok=True)
        final, done = folder / "final.pt", folder / "last.ckpt"
        if final.exists():
            return torch.load(final, weights_only=False)  # written here
        epoch = torch.load(done, weights_only=False)["epoch"] + 1 if done.exists() else 0
        progress(f"{name}: epochs {epoch + 1} to {last - first}")
        every = ModelCheckpoint(folder, filename="newest", save_last=True, enable_version_counter=False)
        trainer = Trainer(
            max_epochs=last - first,
            accelerator="cpu",
            precision=self.setting.precision,  # type: ignore[arg-type]
            callbacks=[*callbacks, every, Progress(folder)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Epochs(self.setting, first + epoch), ckpt_path=done if epoch else None, weights_only=False)
        torch.save(module.model, final)
        return module.model

    def whole(self, model: nn.Module) -> Classifier:
        return Classifier(self.setting, model, (0, self.setting.epochs), cosine)

    def dense(self, target: float) -> nn.Module:
        """The dense net."""
        return self.fit("dense", self.whole(self.setting.build()))

    def narrow(self, target: float) -> nn.Module:
        """A dense net of fewer channels."""
        return self.fit(f"narrow-{target}", self.whole(self.setting.build(width_in_macs(at(self.setting, target)))))

    def ours(self, target: float, as_text: str = "") -> nn.Module:
        """The callback, default arguments and those that are given as JSON."""
        arguments = built(json.loads(as_text or "{}"))
        callback = SVDTrainingCallback(target_macs=target, conv_mode=self.setting.conv_mode, **arguments)
        name = "-".join(["ours", str(target), *re.findall(r"[\w.]+", as_text)])
        return self.fit(name, self.whole(self.setting.build()), callback)

    def of(self, method: str, target: float) -> nn.Module:
        """The trained net of a key of ``METHODS``, or of "ours {...}"."""
        kind, *arguments = method.split(" ", 1)
        return METHODS[kind](self, target, *arguments)

    def ours_from_trained(self, target: float) -> nn.Module:
        """The callback on the trained dense net, which teaches the smaller one."""
        more = round(FINETUNE_SHARE * self.setting.epochs)
        epochs = (self.setting.epochs, self.setting.epochs + more)
        module = Classifier(self.setting, self.dense(1.0), epochs, lambda done: FINETUNE_RATE * cosine(done))
        callback = SVDTrainingCallback(
            target_macs=target,
            conv_mode=self.setting.conv_mode,
            schedule="finetune",
            distill=Distillation(kind="logits", temperature=2.0),
        )
        return self.fit(f"ours_from_trained-{target}", module, callback)

    def truncate_at_half(self, target: float) -> nn.Module:
        """The dense run's net of half time, truncated once within its schedule."""
        name, turn, end = f"truncate_at_half-{target}", self.setting.epochs // 2, self.setting.epochs
        self.dense(1.0)
        model = self.setting.build()
        model.load_state_dict(torch.load(self.folder / "dense" / "half.pt"))
        model = truncated(model, at(self.setting, target))
        share = turn / end
        return self.fit(
            name, Classifier(self.setting, model, (turn, end), lambda done: cosine(share + done * (1 - share)))
        )


METHODS: dict[str, Callable[..., nn.Module]] = {
    "dense": Runs.dense,
    "ours": Runs.ours,
    "ours_from_trained": Runs.ours_from_trained,
    "truncate_at_half": Runs.truncate_at_half,
    "narrow": Runs.narrow,
}


class Progress(Callback):
    """Says after each epoch how long it took, and keeps the net of half time.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        epoch = trainer.current_epoch + 1
        progress(f"{self.folder.name}: epoch {epoch} took {time.perf_counter() - self.start:.0f} s")
        if epoch == trainer.max_epochs // 2:
            torch.save(pl_module.model.state_dict(), self.folder / "half.pt")


def epochs_of(method: str, setting: Setting) -> int:
    """How many a method takes, those of the net that it begins with included."""
    return setting.epochs + (round(FINETUNE_SHARE * setting.epochs) if method == "ours_from_trained" else 0)


def row_of(method: str, runs: Runs, target: float) -> Row:
    """What a run came to; it is trained now unless it was before."""
    model, setting = runs.of(method, target), runs.setting
    report = summarize(model.eval(), setting.images.test[0][:1])
    return {
        "method": method,
        "target": target,
        "seed": setting.seed,
        "accuracy": accuracy(model, setting),
        "macs": report.dense_macs / macs_of(setting.build(), setting),
        "params": report.dense_params,
        "epochs": epochs_of(method, setting),
    }


def tables(rows: list[Row]) -> list[Table]:
    """Ours and the rivals, by what they cost; then what papers report."""
    lines = [
        [
            row["method"],
            f"{row['accuracy']:.2%}",
            f"{1 / row['macs']:.2f}",
            times(row["time"]) if "time" in row else "",
            f"{row['params']:,}",
            str(row["epochs"]),
        ]
        for row in sorted(rows, key=lambda row: (-row["target"], -row["accuracy"]))
    ]
    lines += [[whose, f"{right:.2%}", f"{fewer:.2f}", "", "", str(epochs)] for right, fewer, epochs, whose in PUBLISHED]
    headings = ["method", "accuracy", "times fewer MACs", "time / dense", "parameters", "epochs"]
    return [Table("ResNet-20 on CIFAR-10, 50,000 images; the last rows as published", headings, lines)]


def main() -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, 101)
    parser.add_argument("--data", type=Path, help="the CIFAR-10 archive; without it torchvision's is downloaded")
    parser.add_argument("--folder", type=Path, required=True, help="of the runs")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--targets", type=numbers(float), default=[0.33, 0.25, 0.46])
    parser.add_argument("--methods", type=numbers(str), default=list(METHODS))
    parser.add_argument("--ours", nargs="*", default=[], help="further rows: the callback's arguments, each as JSON")
    parser.add_argument("--precision", default="bf16-mixed", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--times", action="store_true", help="only measure how long the final models take")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for noisy in ("lightning.pytorch", "lightning_svd"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    size = (2_000, 1_000) if options.quick else (None, None)
    data = Data("cifar10", options.data, *size)
    setting = Setting(
        data, "resnet20", 4 if options.quick else options.epochs, 128, 0.1, options.precision, "spatial", options.seed
    )
    runs, rows = Runs(options.folder, setting), rows_in(options.json)
    if any(row["epochs"] != epochs_of(row["method"], setting) for row in rows):
        parser.error(f"{options.json} has rows of another number of epochs: give another file, and another --folder")
    if options.times:
        with Clock(options.threads) as clock:
            for row in rows:
                row |= time_of(runs.of(row["method"], row["target"]), setting, clock)
        finish(options, rows)
        return
    methods = [*(method for method in options.methods if method != "dense"), *(f"ours {text}" for text in options.ours)]
    units = [(method, target) for target in options.targets for method in methods]
    for method, target in [*([("dense", 1.0)] if "dense" in options.methods else []), *units]:
        if not any((row["method"], row["target"]) == (method, target) for row in rows):
            rows.append(row_of(method, runs, target))
            finish(options, rows)


def rows_in(path: Path | None) -> list[Row]:
    """Those of an earlier call."""
    return json.loads(path.read_text())["rows"] if path is not None and path.exists() else []


def finish(options: argparse.Namespace, rows: list[Row]) -> None:
    """Print and write the rows that there are."""
    for table in tables(rows):
        table.print()
    save("full_data", None, options, rows)


if __name__ == "__main__":
    main()
