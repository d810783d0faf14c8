"""Accuracy at a budget of MACs: SVD training against plain rivals at equal total epochs.

    python benchmarks/quality.py --data cifar10.npz --net resnet20 --train-size 8000 --epochs 24 --targets 0.35,0.25

Every method sees the same batches in the same order, and the optimizer recipe that suits the dense net: SGD with
Nesterov momentum, weight decay 5e-4, one cosine. Budgets are shares of the dense net's MACs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import images as image_data
import nets
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_svd import SVDTrainingCallback, add_gradients, decompose, summarize, svd_layers, to_factored
from lightning_svd.costs import CostMeter, ModelCost
from lightning_svd.ranks import keep_by_budget, keep_by_energy, strongest

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
FINETUNE_SHARE, FINETUNE_RATE = 0.25, 0.2  # of the epochs, and of the learning rate, for those who finetune


@dataclass(frozen=True)
class Setting:
    """One training."""

    images: image_data.Images
    net: str
    epochs: int
    batch_size: int
    rate: float
    seed: int
    target: float
    conv_mode: str

    @property
    def steps(self) -> int:
        return len(self.images.train[1]) // self.batch_size

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return nets.build(self.net, *self.images.shape)

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epochs ``first`` to ``last``, the last one excluded."""
        for epoch in range(first, last):
            yield from self.images.batches(self.batch_size, self.seed, epoch)


def fit(
    model: nn.Module,
    setting: Setting,
    epochs: tuple[int, int],
    rate: Callable[[float], float],
    before_step: Callable[[float], None] = lambda progress: None,
    decayed: Callable[[str], bool] = lambda name: True,
) -> None:
    """Plain training over these epochs; ``rate`` and ``before_step`` get the progress in [0, 1] within them."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[decayed(name)].append(parameter)
    optimizer = torch.optim.SGD(
        [{"params": groups[flag], "weight_decay": WEIGHT_DECAY * flag} for flag in groups],
        lr=setting.rate,
        momentum=MOMENTUM,
        nesterov=True,
    )
    total = (epochs[1] - epochs[0]) * setting.steps
    model.train()
    for step, (x, y) in enumerate(setting.batches(*epochs)):
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * rate(step / total)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        before_step(step / total)
        optimizer.step()


def cosine(progress: float) -> float:
    """One half wave from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def cost_of(model: nn.Module, setting: Setting) -> ModelCost:
    """Costs of a model with factorised layers."""
    with CostMeter(model) as meter, torch.no_grad():
        model.eval()(setting.images.test[0][:1])
    return meter.cost(batch_size=1)


def truncated(model: nn.Module, setting: Setting) -> nn.Module:
    """``model``, dense or factorised, as plain low-rank layers within the budget, ranks allocated globally."""
    if not svd_layers(model):
        decompose(model, conv_mode=setting.conv_mode)
    layers, cost = svd_layers(model), cost_of(model, setting)
    energies = {name: layer.energies() for name, layer in layers.items()}
    ranks = keep_by_budget(energies, cost, setting.target * cost.dense("macs"))
    for name, layer in layers.items():
        layer.keep(strongest(energies[name], ranks[name]))
    return to_factored(model, cost)


# ------------------------------------------------------------------------------------------------------------ methods


def dense(setting: Setting) -> nn.Module:
    """The dense net."""
    model = setting.build()
    fit(model, setting, (0, setting.epochs), cosine)
    return model


def truncate_and_finetune(setting: Setting) -> nn.Module:
    """Dense, then truncated by SVD within a global budget, then finetuned with a restarted learning rate."""
    turn = setting.epochs - round(FINETUNE_SHARE * setting.epochs)
    model = setting.build()
    fit(model, setting, (0, turn), cosine)
    model = truncated(model, setting)
    fit(model, setting, (turn, setting.epochs), lambda progress: FINETUNE_RATE * cosine(progress))
    return model


def truncate_at_half(setting: Setting) -> nn.Module:
    """The same truncation at half time inside one learning-rate schedule (Pufferfish, Cuttlefish)."""
    turn = setting.epochs // 2
    share = turn / setting.epochs
    model = setting.build()
    fit(model, setting, (0, turn), lambda progress: cosine(progress * share))
    model = truncated(model, setting)
    fit(model, setting, (turn, setting.epochs), lambda progress: cosine(share + progress * (1 - share)))
    return model


def fixed_rank(setting: Setting) -> nn.Module:
    """Low-rank from the first step, initialised by the SVD of the dense net's initial weights."""
    model = truncated(setting.build(), setting)
    fit(model, setting, (0, setting.epochs), cosine)
    return model


def svd_every_n_steps(setting: Setting, every: int = 20, nuclear: float = 3e-4, kept: float = 0.98) -> nn.Module:
    """Trained rank pruning (Xu et al. 2020): a nuclear-norm subgradient, and a truncation every ``every`` steps."""
    model = setting.build()
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    turn, taken = setting.epochs - round(FINETUNE_SHARE * setting.epochs), 0

    def before_step(progress: float) -> None:
        nonlocal taken
        taken += 1
        if taken % every:
            return
        with torch.no_grad():
            for weight in weights:
                U, s, Vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
                weight.grad.add_((U @ Vh).reshape(weight.shape), alpha=nuclear * every)
                s[int((s.square().cumsum(0) < kept * s.square().sum()).sum()) + 1 :] = 0
                weight.copy_(((U * s) @ Vh).reshape(weight.shape))

    fit(model, setting, (0, turn), cosine, before_step)
    model = truncated(model, setting)
    fit(model, setting, (turn, setting.epochs), lambda progress: FINETUNE_RATE * cosine(progress))
    return model


def three_stages(setting: Setting, hoyer: float = 0.01) -> nn.Module:
    """The authors' recipe, scaled: full rank, with sparsity, prune by one energy threshold, finetune."""
    model = setting.build()
    decompose(model, conv_mode=setting.conv_mode)
    layers = svd_layers(model)
    cuts = [round(setting.epochs * share) for share in (0, 1 / 3, 2 / 3, 1)]
    for stage, strength in enumerate((0.0, hoyer)):

        def regularise(progress: float, strength: float = strength) -> None:
            add_gradients(layers.values(), 1.0, "hoyer", strength)

        fit(
            model,
            setting,
            (cuts[stage], cuts[stage + 1]),
            cosine,
            regularise,
            lambda name: not name.endswith(("U", "V")),
        )
    cost = cost_of(model, setting)
    energies = {name: layer.energies() for name, layer in layers.items()}
    low, high = 0.0, 1.0
    for _ in range(30):  # the largest threshold within the budget
        middle = (low + high) / 2
        ratio = cost.ratio(keep_by_energy(energies, cost, middle), "macs") if middle else 0.0
        low, high = (middle, high) if ratio <= setting.target else (low, middle)
    for name, rank in keep_by_energy(energies, cost, low).items():
        layers[name].keep(strongest(energies[name], rank))
    model = to_factored(model, cost)
    fit(model, setting, (cuts[2], cuts[3]), cosine)
    return model


class Classifier(LightningModule):
    """What a user would write."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting, self.model = setting, setting.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            self.parameters(), self.setting.rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        total = self.setting.epochs * self.setting.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step / total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Epochs:
    """The batches of one epoch after the other, for Lightning."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.epoch = setting, 0

    def __len__(self) -> int:
        return self.setting.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        yield from self.setting.batches(self.epoch - 1, self.epoch)


def ours(setting: Setting) -> nn.Module:
    """SVD training by the callback, default arguments."""
    model = Classifier(setting)
    callback = SVDTrainingCallback(target_macs=setting.target, conv_mode=setting.conv_mode)
    trainer = Trainer(
        max_epochs=setting.epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Epochs(setting))
    return model.model


METHODS: dict[str, Callable[[Setting], nn.Module]] = {
    "dense": dense,
    "truncate_and_finetune": truncate_and_finetune,
    "truncate_at_half": truncate_at_half,
    "fixed_rank": fixed_rank,
    "svd_every_n_steps": svd_every_n_steps,
    "three_stages": three_stages,
    "ours": ours,
}


# ------------------------------------------------------------------------------------------------------------- running


@torch.inference_mode()
def accuracy(model: nn.Module, images: image_data.Images) -> float:
    """Share of the test images that are classified right."""
    model.eval()
    pieces = zip(*(part.split(500) for part in images.test), strict=True)
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in pieces) / len(images.test[1])


def measure(method: str, setting: Setting, macs_of_dense: int) -> dict[str, object]:
    """Train and test once."""
    start = time.perf_counter()
    model = METHODS[method](setting)
    seconds = time.perf_counter() - start
    report = summarize(model.eval(), setting.images.test[0][:1])
    return {
        "method": method,
        "target": 1.0 if method == "dense" else setting.target,
        "seed": setting.seed,
        "accuracy": accuracy(model, setting.images),
        "macs": report.dense_macs / macs_of_dense,
        "params": report.dense_params,
        "epochs": setting.epochs,
        "seconds": round(seconds, 1),
    }


def print_table(rows: list[dict[str, object]], title: str) -> None:
    """Mean and standard deviation over the seeds, the best at each budget marked."""
    groups: dict[tuple[object, object], list[dict[str, object]]] = {}
    for row in rows:
        groups.setdefault((row["target"], row["method"]), []).append(row)
    means = {key: statistics.mean(row["accuracy"] for row in group) for key, group in groups.items()}
    table = Table(title=title)
    for heading in ("target", "method", "accuracy", "", "MACs", "seconds", "seeds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for (target, method), group in sorted(groups.items(), key=lambda item: (-item[0][0], -means[item[0]])):
        best = means[target, method] == max(mean for (other, _), mean in means.items() if other == target)
        spread = statistics.stdev(row["accuracy"] for row in group) if len(group) > 1 else 0.0
        table.add_row(
            f"{target:g}",
            method + (" *" if best and method != "dense" else ""),
            f"{means[target, method]:.2%}",
            f"± {spread:.2%}" if spread else "",
            f"{statistics.mean(row['macs'] for row in group):.3f}",
            f"{statistics.mean(row['seconds'] for row in group):.0f}",
            str(len(group)),
        )
    Console(width=110).print(table)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the CIFAR-10 archive; without it torchvision's is downloaded")
    parser.add_argument("--data-set", default="cifar10", help="cifar10 or digits")
    parser.add_argument("--net", default="resnet20", help="resnet20, resnet56, resnet18, vgg, vit or mlp")
    parser.add_argument("--train-size", type=int, help="the first so many training images")
    parser.add_argument("--test-size", type=int, help="the first so many test images")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    parser.add_argument("--targets", type=lambda text: [float(item) for item in text.split(",")], default=[0.35, 0.25])
    parser.add_argument("--seeds", type=lambda text: [int(item) for item in text.split(",")], default=[0])
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--conv-mode", default="channel")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    images = image_data.load(options.data_set, options.data, options.train_size, options.test_size)
    rows: list[dict[str, object]] = []
    for seed in options.seeds:
        for method in options.methods:
            for target in options.targets if method != "dense" else [1.0]:
                setting = Setting(
                    images,
                    options.net,
                    options.epochs,
                    options.batch_size,
                    options.rate,
                    seed,
                    target,
                    options.conv_mode,
                )
                macs_of_dense = summarize(setting.build().eval(), images.test[0][:1]).dense_macs
                rows.append(measure(method, setting, macs_of_dense))
                print(json.dumps(rows[-1]), flush=True)
                if options.json:
                    about = {"data": images.name, "net": options.net, "train_size": len(images.train[1])}
                    about |= {"conv_mode": options.conv_mode, "torch": torch.__version__, "cpu": platform.processor()}
                    options.json.write_text(json.dumps({"rows": rows, **about}, indent=1))
    print_table(rows, f"{images.name}, {len(images.train[1])} images, {options.net}, {options.epochs} epochs")


if __name__ == "__main__":
    main()
