"""Accuracy at a budget of MACs: SVD training against plain rivals at equal total epochs.

    python benchmarks/quality.py --data cifar10.npz --net resnet20 --train-size 8000 --epochs 24 --targets 0.35,0.25

Every method sees the same batches in the same order, and the optimizer recipe that suits the dense net: SGD with
Nesterov momentum or AdamW, weight decay, one cosine. Budgets are shares of the dense net's MACs.

The time of each final model is measured too, as a share of the dense net's: both take turns, in evaluation, eager and
in float32, in a process that never trains, and what counts is the median of the ratios. ``narrow`` is a dense net of
fewer channels with the MACs of the budget, ``narrow_in_time`` one that takes as long as ours does at that budget.

Hours of work are divided among processes (``--jobs``) and resumed: rows that the file of ``--json`` holds already are
not computed again. What two budgets share, such as the dense training before a truncation, is trained once, and its
time counted for both. Further rows of ours with other arguments than the defaults are asked for by ``--ours``, for
instance ``--ours '{"schedule": {"start": 0.2}}' '{"conv_mode": "spatial"}'``.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import functools
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import images as image_data
import nets
import torch
import torch.nn.functional as F
from clock import Clock, processes
from harness import Row, Table, against, command, cpu_name, middle_half, times
from lightning.pytorch import LightningModule, Trainer
from step_cost import cut
from torch import Tensor, nn

import lightning_svd
from lightning_svd import (
    SVDTrainingCallback,
    add_gradients,
    compress,
    decompose,
    summarize,
    svd_layers,
    to_factored,
)
from lightning_svd.model.counting import count_costs
from lightning_svd.ranks.allocation import keep_by_energy
from lightning_svd.ranks.costs import ModelCost

MOMENTUM = 0.9
FINETUNE_SHARE, FINETUNE_RATE = 0.25, 0.2  # of the epochs, and of the learning rate, for those who finetune
SMALLEST, A_QUARTER = 0.15, 0.25  # of the budgets that a nested run leaves open
TIMED_BATCH = 64  # images, for the time of a model
SEARCH_SHARE = 0.2  # of the rounds for a row are those for each step of a search
NEAR = 8  # widths on either side that are measured again where a search has ended
# Told apart by those who do not see all colors (Okabe and Ito 2008, and one of Tol's); black is ours.
COLORS = ("#000000", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#882255")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*", "<", ">", "p")


@dataclass(frozen=True)
class Data:
    """Which images."""

    name: str
    path: Path | None = None
    train_size: int | None = None
    test_size: int | None = None

    @functools.cache  # noqa: B019 - a process holds one data set
    def images(self) -> image_data.Images:
        """The images themselves."""
        return image_data.load(self.name, self.path, self.train_size, self.test_size)


@dataclass(frozen=True)
class Setting:
    """One training."""

    data: Data
    net: str
    epochs: int
    batch_size: int
    rate: float
    precision: str
    conv_mode: str
    seed: int
    target: float = 1.0
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    rounds: int = 101
    """In which models that are timed take their turn; 0 for no times."""
    inputs: int = 512
    """Training images that a model is cut by where nothing is trained for the budget."""

    @property
    def images(self) -> image_data.Images:
        return self.data.images()

    @property
    def steps(self) -> int:
        return len(self.images.train[1]) // self.batch_size

    def build(self, width: float | None = None) -> nn.Module:
        """The dense net, or a narrower one."""
        torch.manual_seed(self.seed)
        return nets.build(self.net, *self.images.shape, width).to(memory_format=torch.channels_last)

    def optimize(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """The optimizer of parameters or groups of them."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, self.rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.rate, MOMENTUM, weight_decay=self.weight_decay, nesterov=True)

    def batches(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epochs ``first`` to ``last``, the last one excluded."""
        for epoch in range(first, last):
            for images, labels in self.images.batches(self.batch_size, self.seed, epoch):
                yield images.contiguous(memory_format=torch.channels_last), labels

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16-mixed")


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
    optimizer = setting.optimize(
        [{"params": groups[flag], "weight_decay": setting.weight_decay * flag} for flag in groups]
    )
    total = (epochs[1] - epochs[0]) * setting.steps
    model.train()
    for step, (x, y) in enumerate(setting.batches(*epochs)):
        for group in optimizer.param_groups:
            group["lr"] = setting.rate * rate(step / total)
        optimizer.zero_grad()
        with setting.autocast():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        before_step(step / total)
        optimizer.step()


class Once:
    """A training that a process does once, its time kept."""

    def __init__(self, train: Callable[[Setting], nn.Module]) -> None:
        self.train, self.trained = train, functools.cache(self._train)

    def _train(self, setting: Setting) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        return self.train(setting), time.perf_counter() - start

    def key(self, setting: Setting) -> Setting:
        """The settings that share a training have the same."""
        return setting

    def __call__(self, setting: Setting) -> nn.Module:
        return copy.deepcopy(self.trained(self.key(setting))[0])

    def seconds(self, setting: Setting) -> float:
        """How long it took."""
        return self.trained(self.key(setting))[1]


class SharedStart(Once):
    """The part of a method that does not depend on the budget: trained once for all budgets, its time kept."""

    def key(self, setting: Setting) -> Setting:
        return replace(setting, target=1.0)


def cosine(progress: float) -> float:
    """One half wave from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def cost_of(model: nn.Module, setting: Setting) -> ModelCost:
    """Costs of a model with factorized layers."""
    return count_costs(model, setting.images.test[0][:1])


def truncated(model: nn.Module, setting: Setting) -> nn.Module:
    """``model``, dense or factorized, as plain low-rank layers within the budget, ranks allocated globally."""
    if not svd_layers(model):
        decompose(model, conv_mode=setting.conv_mode)
    cost = cost_of(model, setting)
    return to_factored(cut(model, cost, setting.target), cost)


# ------------------------------------------------------------------------------------------------------------ methods


def dense(setting: Setting) -> nn.Module:
    """The dense net."""
    model = setting.build()
    fit(model, setting, (0, setting.epochs), cosine)
    return model


def turn_to_finetuning(setting: Setting) -> int:
    """The epoch in which those who finetune begin to."""
    return setting.epochs - round(FINETUNE_SHARE * setting.epochs)


def truncated_and_finetuned(model: nn.Module, setting: Setting) -> nn.Module:
    """Truncated, then trained on with a restarted learning rate."""
    model = truncated(model, setting)
    epochs = (turn_to_finetuning(setting), setting.epochs)
    fit(model, setting, epochs, lambda progress: FINETUNE_RATE * cosine(progress))
    return model


@SharedStart
def dense_but_finetuning(setting: Setting) -> nn.Module:
    """The dense net after a whole schedule that leaves time to finetune."""
    model = setting.build()
    fit(model, setting, (0, turn_to_finetuning(setting)), cosine)
    return model


def truncate_and_finetune(setting: Setting) -> nn.Module:
    """Dense, then truncated by SVD within a global budget, then finetuned with a restarted learning rate."""
    return truncated_and_finetuned(dense_but_finetuning(setting), setting)


@SharedStart
def dense_until_half(setting: Setting) -> nn.Module:
    """The dense net at half time of one schedule."""
    model, turn = setting.build(), setting.epochs // 2
    fit(model, setting, (0, turn), lambda progress: cosine(progress * turn / setting.epochs))
    return model


def truncate_at_half(setting: Setting) -> nn.Module:
    """The same truncation at half time inside one learning-rate schedule (Pufferfish, Cuttlefish)."""
    turn = setting.epochs // 2
    share = turn / setting.epochs
    model = truncated(dense_until_half(setting), setting)
    fit(model, setting, (turn, setting.epochs), lambda progress: cosine(share + progress * (1 - share)))
    return model


def fixed_rank(setting: Setting) -> nn.Module:
    """Low-rank from the first step, initialized by the SVD of the dense net's initial weights."""
    model = truncated(setting.build(), setting)
    fit(model, setting, (0, setting.epochs), cosine)
    return model


@SharedStart
def low_rank_by_svds(setting: Setting, every: int = 20, nuclear: float = 3e-4, kept: float = 0.98) -> nn.Module:
    """A nuclear-norm subgradient, and a truncation by energy, every ``every`` steps."""
    model = setting.build()
    weights = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    taken = 0

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

    fit(model, setting, (0, turn_to_finetuning(setting)), cosine, before_step)
    return model


def svd_every_n_steps(setting: Setting) -> nn.Module:
    """Trained rank pruning (Xu et al. 2020), truncated to the budget and finetuned."""
    return truncated_and_finetuned(low_rank_by_svds(setting), setting)


@SharedStart
def two_of_three_stages(setting: Setting, hoyer: float = 0.01) -> nn.Module:
    """The authors' first two trainings: full rank, then the same with sparsity."""
    model = setting.build()
    decompose(model, conv_mode=setting.conv_mode)
    layers = svd_layers(model)
    for stage, strength in enumerate((0.0, hoyer)):

        def regularize(progress: float, strength: float = strength) -> None:
            add_gradients(layers.values(), 1.0, "hoyer", strength)

        epochs = (setting.epochs * stage // 3, setting.epochs * (stage + 1) // 3)
        fit(model, setting, epochs, cosine, regularize, lambda name: not name.endswith(("U", "V")))
    return model


def three_stages(setting: Setting) -> nn.Module:
    """The authors' recipe, scaled: full rank, with sparsity, prune by one energy threshold, finetune."""
    model = two_of_three_stages(setting)
    layers, cost = svd_layers(model), cost_of(model, setting)
    energies = {name: layer.energies() for name, layer in layers.items()}
    low, high = 0.0, 1.0
    for _ in range(30):  # the largest threshold within the budget
        middle = (low + high) / 2
        ratio = cost.ratio(keep_by_energy(energies, cost.by("macs"), middle), "macs") if middle else 0.0
        low, high = (middle, high) if ratio <= setting.target else (low, middle)
    for name, rank in keep_by_energy(energies, cost.by("macs"), low).items():
        layers[name].keep(rank)
    model = to_factored(model, cost)
    fit(model, setting, (setting.epochs * 2 // 3, setting.epochs), cosine)
    return model


class Classifier(LightningModule):
    """What a user would write; ``epochs`` are those it trains, of which ``rate`` gets the progress in [0, 1]."""

    def __init__(
        self, setting: Setting, model: nn.Module, epochs: tuple[int, int], rate: Callable[[float], float]
    ) -> None:
        super().__init__()
        self.setting, self.model, self.epochs, self.rate = setting, model, epochs, rate

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.setting.optimize(self.parameters())
        total = (self.epochs[1] - self.epochs[0]) * self.setting.steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step / total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Epochs:
    """The batches of one epoch after the other, for Lightning."""

    def __init__(self, setting: Setting, first: int) -> None:
        self.setting, self.epoch = setting, first

    def __len__(self) -> int:
        return self.setting.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        yield from self.setting.batches(self.epoch - 1, self.epoch)


def ours(setting: Setting, **arguments: Any) -> nn.Module:
    """SVD training by the callback; default arguments unless others are asked for."""
    if not arguments:
        return ours_by_default(setting)
    return svd_trained(Classifier(setting, setting.build(), (0, setting.epochs), cosine), arguments)


@Once
def ours_by_default(setting: Setting) -> nn.Module:
    """The same with default arguments, which others are measured against."""
    return svd_trained(Classifier(setting, setting.build(), (0, setting.epochs), cosine), {})


def ours_from_trained(setting: Setting, **arguments: Any) -> nn.Module:
    """The callback's schedule for trained nets: the same start, epochs and rate as truncate_and_finetune."""
    epochs = (turn_to_finetuning(setting), setting.epochs)
    module = Classifier(
        setting, dense_but_finetuning(setting), epochs, lambda progress: FINETUNE_RATE * cosine(progress)
    )
    return svd_trained(module, {"schedule": "finetune"} | arguments)


def nested_run(setting: Setting, **arguments: Any) -> nn.Module:
    """The dense net at the end of a nested run."""
    module = Classifier(setting, setting.build(), (0, setting.epochs), cosine)
    return svd_trained(module, {"schedule": lightning_svd.Nested(**arguments)})


def nested_down_to(smallest: float) -> SharedStart:
    """The dense net at the end of the nested run that leaves budgets from this one up open."""
    return SharedStart(lambda setting: nested_run(replace(setting, target=smallest)))


CUT_LATER = {
    "ours_nested": nested_down_to(SMALLEST),
    "ours_nested_from_a_quarter": nested_down_to(A_QUARTER),
    "dense_compressed": SharedStart(dense),
}


def cut_later(setting: Setting, name: str) -> nn.Module:
    """A net that was trained for all budgets, cut to this one by the loss of training images, without training."""
    return compressed(CUT_LATER[name](setting), setting)


def compressed(model: nn.Module, setting: Setting) -> nn.Module:
    """``model``, dense, within the budget by :func:`~lightning_svd.compress`, which trains nothing."""
    small, _ = compress(
        model,
        setting.batches(0, 1),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        target_macs=setting.target,
        conv_mode=setting.conv_mode,
        inputs=setting.inputs,
        progress=False,
    )
    return small


def svd_trained(module: Classifier, arguments: dict[str, Any]) -> nn.Module:
    """The net of ``module`` after a fit with the callback."""
    setting, (first, last) = module.setting, module.epochs
    callback = SVDTrainingCallback(**{"target_macs": setting.target, "conv_mode": setting.conv_mode} | arguments)
    trainer = Trainer(
        max_epochs=last - first,
        accelerator="cpu",
        precision=setting.precision,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Epochs(setting, first))
    return module.model


# -------------------------------------------------------------------------------------------------------- narrower nets


def narrow(setting: Setting) -> nn.Module:
    """A dense net with fewer channels, whose MACs are within the budget."""
    return trained_at(width_in_macs(setting), setting)


def narrow_in_time(setting: Setting) -> nn.Module:
    """A dense net with fewer channels that takes no longer than ours does at this budget."""
    return trained_at(width_in_time(setting), setting)


def trained_at(width: float, setting: Setting) -> nn.Module:
    """The net of this width, trained as the dense one is."""
    model = setting.build(width)
    fit(model, setting, (0, setting.epochs), cosine)
    return model


def macs_of(model: nn.Module, setting: Setting) -> int:
    """MACs for one image."""
    return summarize(model.eval(), setting.images.test[0][:1]).dense_macs


@functools.cache
def width_in_macs(setting: Setting) -> float:
    """The widest net with no more MACs than the budget."""
    budget = setting.target * macs_of(setting.build(), setting)
    return widest(nets.widths(setting.net), lambda width: macs_of(setting.build(width), setting) <= budget)


@functools.cache
def width_in_time(setting: Setting) -> float:
    """The widest net, up to the dense one, that is measured to take no longer than ours."""
    base = ours_by_default(setting)

    def ratios(asked: list[float]) -> dict[float, float]:
        models: dict[Any, nn.Module] = {"ours": base} | {width: setting.build(width) for width in asked}
        seconds = clock.seconds(models, timed_batch(setting), max(1, round(SEARCH_SHARE * setting.rounds)))
        return {width: against(seconds[width], seconds["ours"])["ratio"] for width in asked}

    widths = nets.widths(setting.net)
    with Clock() as clock:
        found = widths.index(widest(widths, lambda width: ratios([width])[width] <= 1))
        # A net of a few more channels may be faster: kernels compute several at once.
        near = ratios(widths[max(0, found - NEAR) : found + NEAR + 1])
    return max((width for width, ratio in near.items() if ratio <= 1), default=min(near, key=near.__getitem__))


def widest(widths: list[float], fits: Callable[[float], bool]) -> float:
    """The last width that fits, where all that are narrower do; the narrowest where none does."""
    return widths[max(0, bisect.bisect_left(widths, True, key=lambda width: not fits(width)) - 1)]


METHODS: dict[str, Callable[[Setting], nn.Module]] = {
    "dense": dense,
    "narrow": narrow,
    "narrow_in_time": narrow_in_time,
    "truncate_and_finetune": truncate_and_finetune,
    "truncate_at_half": truncate_at_half,
    "fixed_rank": fixed_rank,
    "svd_every_n_steps": svd_every_n_steps,
    "three_stages": three_stages,
    "ours": ours,
    "ours_from_trained": ours_from_trained,
    **{name: functools.partial(cut_later, name=name) for name in CUT_LATER},
}
SHARED_STARTS = {
    "truncate_and_finetune": dense_but_finetuning,
    "truncate_at_half": dense_until_half,
    "svd_every_n_steps": low_rank_by_svds,
    "three_stages": two_of_three_stages,
    "ours": ours_by_default,
    "ours_from_trained": dense_but_finetuning,
    **CUT_LATER,
}
WIDTHS = {"narrow": width_in_macs, "narrow_in_time": width_in_time}  # found before the training, whose time is told


def method_named(name: str) -> Callable[[Setting], nn.Module]:
    """A key of ``METHODS``, or "ours {...}" with the callback's arguments as JSON, see :func:`built`."""
    kind, _, arguments = name.partition(" ")
    return functools.partial(METHODS[kind], **built(json.loads(arguments or "{}")))


def built(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the objects that JSON cannot hold, made of their own.

    A schedule is a ``FallToBudget``, an importance a ``Fisher``, unless it names another "class".
    """
    kinds = {"schedule": "FallToBudget", "regularizer": "Regularizer", "importance": "Fisher"}
    return {
        name: _made(kinds[name], **value) if name in kinds and isinstance(value, dict) else value
        for name, value in arguments.items()
    }


def _made(kind: str, **arguments: Any) -> Any:
    return getattr(lightning_svd, arguments.pop("class", kind))(**arguments)


# ------------------------------------------------------------------------------------------------------------- running


@torch.inference_mode()
def accuracy(model: nn.Module, setting: Setting) -> float:
    """Share of the test images that are classified right."""
    model.eval()
    images, labels = setting.images.test
    with setting.autocast():
        right = sum(
            int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return right / len(labels)


def timed_batch(setting: Setting) -> Tensor:
    """What models compute when their time is taken."""
    return setting.images.train[0][:TIMED_BATCH]


def time_of(model: nn.Module, setting: Setting, clock: Clock) -> Row:
    """The part of a row that tells how long a model takes, as a share of the dense net's time; none in no rounds."""
    if not setting.rounds:
        return {}
    seconds = clock.seconds({"dense": setting.build(), "model": model}, timed_batch(setting), setting.rounds)
    found = against(seconds["model"], seconds["dense"])
    return {"time": found["ratio"], "time_low": found["low"], "time_high": found["high"]}


def measure(method: str, setting: Setting) -> tuple[Row, nn.Module]:
    """Train and test once: the row, as far as it is no matter of time, and the model."""
    width = {"width": WIDTHS[method](setting)} if method in WIDTHS else {}
    shared = SHARED_STARTS.get(method)
    seconds = shared.seconds(setting) if shared else 0.0
    start = time.perf_counter()
    model = method_named(method)(setting)
    seconds += time.perf_counter() - start
    example = setting.images.test[0][:1]
    report = summarize(model.eval(), example)
    row = {
        "method": method,
        "target": setting.target,
        "seed": setting.seed,
        "accuracy": accuracy(model, setting),
        "macs": report.dense_macs / macs_of(setting.build(), setting),
        "params": report.dense_params,
        "epochs": setting.epochs,
        "seconds": round(seconds, 1),
        **width,
    }
    return row, model


def work(method: str, settings: list[Setting]) -> list[tuple[Row, nn.Module]]:
    """What one process does: one method and seed at all budgets."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    return [measure(method, setting) for setting in settings]


def run_all(units: Iterable[tuple[str, list[Setting]]], jobs: int, threads: int) -> Iterator[list[Row]]:
    """The rows of each unit of work as soon as they are there."""
    units = list(units)
    with processes(jobs, threads) as pool, Clock(threads) as clock:
        futures = {pool.submit(work, method, settings): settings for method, settings in units}
        for done, future in enumerate(as_completed(futures), 1):
            found = zip(future.result(), futures[future], strict=True)
            yield [row | time_of(model, setting, clock) for (row, model), setting in found]
            print(f"{done} of {len(units)}", flush=True)


Groups = dict[tuple[float, str], list[Row]]


def grouped(rows: Iterable[Row]) -> Groups:
    """(target, method) -> the rows of all seeds, dense first, then by target and mean accuracy, the best first."""
    groups: Groups = {}
    for row in rows:
        groups.setdefault((row["target"], row["method"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (-item[0][0], -mean(item[1], "accuracy"))))


def mean(rows: list[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def spread(rows: list[Row], key: str) -> float:
    """Standard deviation over the seeds; 0 for one."""
    return statistics.stdev(row[key] for row in rows) if len(rows) > 1 else 0.0


def time_cells(group: list[Row]) -> list[str]:
    """The measured time and the middle half of its ratios, means over the seeds; empty for rows without."""
    measured = [row for row in group if "time" in row]
    if not measured:
        return ["", ""]
    half = {key: mean(measured, f"time_{key}") for key in ("low", "high")}
    return [times(mean(measured, "time")), middle_half(half)]


def tables(rows: list[Row]) -> list[Table]:
    """Mean and standard deviation over the seeds, the best at each budget marked; the time where rows have it."""
    lines, previous = [], None
    has_time = any("time" in row for row in rows)
    for (target, method), group in grouped(rows).items():
        lines.append(
            [
                method + (" *" if target != previous and method != "dense" else ""),
                f"{target:g}",
                f"{mean(group, 'accuracy'):.2%}",
                f"{spread(group, 'accuracy'):.2%}" if len(group) > 1 else "",
                f"{mean(group, 'macs'):.3f}",
                *(time_cells(group) if has_time else []),
                f"{mean(group, 'params'):,.0f}",
                f"{mean(group, 'seconds'):.0f}",
                str(len(group)),
            ]
        )
        previous = target
    measured = ["time / dense", "middle half"] if has_time else []
    headings = ["method", "target", "accuracy", "deviation", "MACs", *measured, "parameters", "seconds", "seeds"]
    return [Table("* the best at this budget", headings, lines), *margins(rows)]


BY_SPECTRUM = 'ours {"importance":"spectrum"}'


def margins(rows: list[Row]) -> list[Table]:
    """How far ours is ahead of the best rival and from the dense net at each budget, in points; behind is negative.

    Ours is the row of default arguments, or where there is none that of ranks judged by the spectrum. Where others have
    fewer seeds it is compared with them on those.
    """
    groups = grouped(rows)
    lines = []
    for (target, method), group in groups.items():
        rivals = {
            rival: lead
            for (at, rival), theirs in groups.items()
            if at == target and not rival.startswith("ours") and (lead := ahead(group, theirs)) is not None
        }
        to_dense = ahead(group, groups.get((1.0, "dense"), []))
        meant = "ours" if (target, "ours") in groups else BY_SPECTRUM
        if method == meant and rivals and to_dense is not None:
            best = min(rivals, key=rivals.__getitem__)
            lines.append([f"{target:g}", best, f"{rivals[best]:+.2f}", f"{to_dense:+.2f}"])
    headings = ["target", "best rival", "ours, against it", "ours, against dense"]
    return [Table("Points of accuracy", headings, lines)] if lines else []


def ahead(group: list[Row], other: list[Row]) -> float | None:
    """The mean difference in accuracy over the seeds that both have, in points; None if there are none."""
    theirs = {row["seed"]: row["accuracy"] for row in other}
    points = [100 * (row["accuracy"] - theirs[row["seed"]]) for row in group if row["seed"] in theirs]
    return statistics.mean(points) if points else None


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Accuracy against MACs and, where rows have it, against measured time; a line and error bars for each method."""
    from matplotlib.figure import Figure

    timed_rows = [row for row in rows if "time" in row]
    panels = [("macs", "MACs, % of dense", rows)]
    panels += [("time", "measured time, % of dense", timed_rows)] if timed_rows else []
    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 4.5), layout="constrained")
    looks = looks_of(dict.fromkeys(row["method"] for row in rows))
    grid, handles = figure.subplots(1, len(panels), sharey=True, squeeze=False), {}
    for axes, (key, label, shown) in zip(grid[0], panels, strict=True):
        handles |= accuracies_against(key, axes, shown, looks)
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
        axes.label_outer()
    figure.suptitle(title)
    figure.supylabel("test accuracy, %", fontsize="medium")
    figure.legend(handles.values(), handles, loc="outside right center", fontsize="small")
    figure.savefig(path)


def looks_of(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Color, marker and line of each method, the same in every plot; markers tell apart what colors do not."""
    order = dict.fromkeys(["ours", *METHODS, *methods])
    del order["dense"]
    return {
        method: {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linewidth": 2.5 if method == "ours" else 1.2,
            "linestyle": "-" if method in METHODS else ":",
            "elinewidth": 1.0,
        }
        for number, method in enumerate(order)
    }


def accuracies_against(key: str, axes: Any, rows: list[Row], looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Draw the mean accuracy of each method against one of its costs; what was drawn, for a legend."""
    lines: dict[str, list[list[Row]]] = {}
    for (_, method), group in grouped(rows).items():
        lines.setdefault(method, []).append(group)
    drawn = {}
    for method, groups in lines.items():
        accuracies = [100 * mean(group, "accuracy") for group in groups]
        if method == "dense":
            drawn[method] = axes.axhline(accuracies[0], color="0.4", linestyle="--")
            continue
        costs = [100 * mean(group, key) for group in groups]
        around = None
        if key == "time":
            ends = [[100 * mean(group, f"time_{end}") for group in groups] for end in ("low", "high")]
            around = [[abs(cost - end) for cost, end in zip(costs, side, strict=True)] for side in ends]
        spreads = [100 * spread(group, "accuracy") for group in groups]
        drawn[method.replace("_", " ")] = axes.errorbar(costs, accuracies, spreads, around, capsize=3, **looks[method])
    return drawn


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of values separated by commas, or none."""
    return lambda text: [kind(item) for item in text.split(",") if item]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the CIFAR-10 archive; without it torchvision's is downloaded")
    parser.add_argument("--data-set", default="cifar10", help="cifar10, cifar10-16, digits or mnist1d (for the MLP)")
    parser.add_argument("--net", default="resnet20", help="resnet20, resnet56, resnet18, vgg, vit, vit16 or mlp")
    parser.add_argument("--train-size", type=int, help="the first so many training images")
    parser.add_argument("--test-size", type=int, help="the first so many test images")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default=Setting.optimizer, choices=["sgd", "adamw"])
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate")
    parser.add_argument("--weight-decay", type=float, default=Setting.weight_decay)
    parser.add_argument("--targets", type=numbers(float), default=[0.35, 0.25])
    parser.add_argument("--seeds", type=numbers(int), default=[0])
    parser.add_argument("--methods", type=numbers(str), default=list(METHODS))
    parser.add_argument("--ours", nargs="*", default=[], help="further rows: the callback's arguments, each as JSON")
    parser.add_argument("--from-trained", nargs="*", default=[], help="the same of ours_from_trained")
    parser.add_argument("--conv-mode", default="channel")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument(
        "--rounds", type=int, default=Setting.rounds, help="how often timed models take turns; 0: never"
    )
    parser.add_argument(
        "--inputs", type=int, default=Setting.inputs, help="training images that ours_nested and dense_compressed see"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--json", type=Path, help="file for the rows; those it holds are not computed again")
    parser.add_argument("--plot", type=Path, help="file for the plot, its ending tells the kind")
    options = parser.parse_args()
    threads = options.threads or max(1, torch.get_num_threads() // options.jobs)

    data = Data(options.data_set, options.data, options.train_size, options.test_size)
    common = (data, options.net, options.epochs, options.batch_size, options.rate, options.precision, options.conv_mode)
    recipe = {key: getattr(options, key) for key in ("optimizer", "weight_decay", "rounds", "inputs")}
    about = asdict(Setting(*common, seed=0, **recipe))
    del about["seed"], about["target"], about["rounds"], about["inputs"]
    about["data"] |= {"path": None, "title": data.images().name, "test_size": len(data.images().test[1])}
    rows = rows_in(options.json, about)
    methods = [*options.methods, *(f"ours {arguments}" for arguments in options.ours)]
    methods += [f"ours_from_trained {arguments}" for arguments in options.from_trained]
    units = []
    for seed in options.seeds:
        for method in methods:
            targets = options.targets if method != "dense" else [1.0]
            settings = [Setting(*common, seed, target, **recipe) for target in targets]
            there = {row["target"] for row in rows if (row["method"], row["seed"]) == (method, seed)}
            settings = [setting for setting in settings if setting.target not in there]
            if settings:
                units.append((method, settings))
    machine = {"CPU": cpu_name(), "processes": options.jobs, "threads": threads, "torch": torch.__version__}
    for new in run_all(units, options.jobs, threads):
        rows += new
        print(*map(json.dumps, new), sep="\n", flush=True)
        if options.json:
            asked = [argument if argument != str(options.data) else options.data.name for argument in sys.argv[1:]]
            result = {"benchmark": "quality", "command": command("quality", asked), "machine": machine}
            options.json.write_text(json.dumps(result | {"setting": about, "rows": rows}, indent=1) + "\n")
    title = f"{data.images().name}, {len(data.images().train[1]):,} images, {options.net}, {options.epochs} epochs"
    print(title)
    for table in tables(rows):
        table.print()
    if options.plot:
        plot(rows, title, options.plot)


def rows_in(path: Path | None, about: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same setting.

    Raises:
        SystemExit: If the file is of another setting.
    """
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text())
    unsaid = {"optimizer": Setting.optimizer, "weight_decay": Setting.weight_decay}
    if unsaid | earlier["setting"] != about:
        raise SystemExit(f"{path} holds rows of another setting: {earlier['setting']}, asked for: {about}")
    return earlier["rows"]


if __name__ == "__main__":
    main()
