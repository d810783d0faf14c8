"""How costs grow: SVDs, a step with a layer's width, a step, its logging and a cut with the number of layers.

    python benchmarks/scale.py --json out.json
    python benchmarks/scale.py --quick

What is compared takes turns; a ratio is the median over the rounds. The depth part uses layers so small that only
Python and the launches of kernels cost anything: ``forward and backward`` is what factorized layers take more than
plain ones there, ``regularizer`` what happens between backward and step, ``optimizer`` what a step of three tensors a
layer in split groups takes more than one of the dense tensors.

The last two parts are about many layers in one run. ``logging`` is a fit of layers as small, with a CSV logger, in
which every second step logs the run's scalars: what such a step takes more than the one before, as a share of it, and
as one of fifty steps, as the Trainer has it by default; the goal is 1 %. ``cut`` is ``SVDTraining.cut`` against the QR
decompositions and SVDs alone that refactorize the same layers; the goal is to take less than twice as long.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import nets
import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, milliseconds, progress, save, times
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from step_cost import Run, Setting, arithmetic, cost_of, factorized, ranks_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_svd import FallToBudget, SVDTrainingCallback, add_gradients, decompose, svd_layers
from lightning_svd.training.optimizers import OptimizerOfFactors
from lightning_svd.training.policies import Change

# The parts of a step in their order, each with the method of `Trained` that is it.
EXTRA = {"forward and backward": "backward", "regularizer": "regularize", "optimizer": "step"}
DECOMPOSITIONS = 3  # rounds at most: they take long, and vary little

# ------------------------------------------------------------------------------------------------------ decomposition


def resnet50_layers(width: int = 64) -> nn.ModuleList:
    """The layers with a weight matrix of a ResNet-50 (He et al. 2016), not connected."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7)]
    inner = width
    for stage, depth in enumerate((3, 4, 6, 3)):
        middle, outer = width * 2**stage, 4 * width * 2**stage
        for block in range(depth):
            layers += [nn.Conv2d(inner, middle, 1), nn.Conv2d(middle, middle, 3), nn.Conv2d(middle, outer, 1)]
            if not block:
                layers.append(nn.Conv2d(inner, outer, 1))
            inner = outer
    return nn.ModuleList([*layers, nn.Linear(inner, 1000)])


def vit(width: int, depth: int) -> nn.Module:
    """A vision transformer for images of 224 x 224 in patches of 16; of width 768 and depth 12 a ViT-B."""
    return nets.ViT(3, 224, 1000, patch=16, width=width, depth=depth, heads=width // 64)


def bare_svds(model: nn.Module) -> None:
    """What any decomposition has to do."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            torch.linalg.svd(module.weight.detach().flatten(1), full_matrices=False)


def decompositions(options: argparse.Namespace) -> list[Row]:
    """``decompose`` against the SVDs that are in it."""
    made: dict[str, Callable[[], nn.Module]] = {
        "ResNet-50": resnet50_layers,
        "ViT-B": partial(vit, 768, 12),
    }
    if options.quick:
        made = {"ResNet-50, a quarter as wide": partial(resnet50_layers, 16), "ViT-Ti, 2 blocks": partial(vit, 192, 2)}
    rows = []
    for name, build in made.items():
        progress(f"decomposing {name}")
        model = build().to(options.device)
        rounds = min(options.rounds, DECOMPOSITIONS)
        copies = [copy.deepcopy(model) for _ in range(rounds)]
        actions = {"bare": partial(bare_svds, model), "decompose": lambda copies=copies: decompose(copies.pop())}
        seconds = in_turns(actions, rounds, torch.device(options.device), warm_up=0)
        row = {"what": "decomposition", "model": name, "parameters": sum(p.numel() for p in model.parameters())}
        row |= against(seconds["decompose"], seconds["bare"])
        rows.append(row | {"bare": statistics.median(seconds["bare"])})
    return rows


# -------------------------------------------------------------------------------------------------------------- width


class Trained:
    """A module in training on one input, dense or factorized, as the callback trains it."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x, self.steps = module, x, 0
        self.gradient = torch.randn_like(module(x))
        self.optimizer = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        self.layers = list(svd_layers(module).values())
        self.factors = OptimizerOfFactors(self.optimizer, self.layers)

    def backward(self) -> None:
        """Forward and backward; the input needs a gradient too, as inside a net."""
        self.optimizer.zero_grad()
        self.module(self.x).backward(self.gradient)

    def regularize(self) -> None:
        """What happens between backward and step."""
        self.steps += 1
        layers = self.factors.regularized
        if layers:
            add_gradients(layers, 1.0, "hoyer", 2e-3, 1.0, self.factors.held(), self.steps)

    def step(self) -> None:
        """The optimizer's step; user's groups are whole afterwards."""
        self.optimizer.step()

    def whole(self) -> None:
        self.backward()
        self.regularize()
        self.step()


def widths(options: argparse.Namespace) -> list[Row]:
    """A step of one layer at full rank, and at a quarter of it, against the dense layer's."""
    linear = [width for width in (128, 256, 512, 1024, 2048, 4096) if width <= options.max_width]
    conv = [width // 8 for width in linear]
    made: list[tuple[str, int, nn.Module, tuple[int, ...]]] = [
        (f"Linear, {options.positions} positions", n, nn.Linear(n, n, bias=False), (options.positions, n))
        for n in linear
    ]
    side = options.side
    made += [
        (f"Conv2d 3x3, 32 images of {side} x {side}", n, nn.Conv2d(n, n, 3, padding=1, bias=False), (32, n, side, side))
        for n in conv
    ]
    rows = []
    for kind, width, layer, shape in made:
        progress(f"{kind}, width {width}")
        dense, full = nn.Sequential(layer).to(options.device), factorized(nn.Sequential(layer)).to(options.device)
        quarter = copy.deepcopy(full)
        quarter[0].keep(width // 4)
        quarter[0].shrink()
        x = torch.randn(shape, device=options.device, requires_grad=True)
        cost = cost_of(full, shape)
        trained = {"dense": Trained(dense, x), "full rank": Trained(full, x), "a quarter": Trained(quarter, x)}
        actions = {name: one.whole for name, one in trained.items()}
        seconds = in_turns(actions, options.rounds, torch.device(options.device))
        for name in list(actions)[1:]:
            row = {"what": "width", "kind": kind, "width": width, "rank": name}
            row |= against(seconds[name], seconds["dense"])
            rows.append(row | {"floor": arithmetic(cost, ranks_of(trained[name].module))})
    return rows


# -------------------------------------------------------------------------------------------------------------- depth


def depths(options: argparse.Namespace) -> list[Row]:
    """Microseconds a layer and step beyond a dense net of small layers, part by part."""
    rows = []
    for depth in (10, 30) if options.quick else (10, 30, 100, 300, 1000):
        progress(f"{depth} layers")
        dense = nn.Sequential(*(nn.Linear(options.width, options.width) for _ in range(depth))).to(options.device)
        x = torch.randn(8, options.width, device=options.device, requires_grad=True)
        trained = {"dense": Trained(dense, x), "ours": Trained(factorized(dense), x)}
        actions = {
            f"{who} {part}": getattr(one, method) for who, one in trained.items() for part, method in EXTRA.items()
        }
        seconds = in_turns(actions, options.rounds, torch.device(options.device), warm_up=2)
        micro = {name: 1e6 * statistics.median(mine) / depth for name, mine in seconds.items()}
        row: Row = {"what": "depth", "layers": depth, "dense": sum(micro[f"dense {part}"] for part in EXTRA)}
        rows.append(row | {part: micro[f"ours {part}"] - micro[f"dense {part}"] for part in EXTRA})
    return rows


# --------------------------------------------------------------------------------------------------------- many layers


class Tiny(LightningModule):
    """Layers so small that a step costs what its calls cost."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        for layer in self.net:
            nn.init.orthogonal_(layer.weight)  # else gradients vanish, and denormal numbers make any arithmetic slow

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Clock(Callback):
    """When each batch began; on the CPU in seconds of its own, which other processes do not take."""

    def __init__(self, device: str) -> None:
        self.began: list[float] = []
        self.now = time.perf_counter if device.startswith("cuda") else time.process_time

    def on_train_batch_start(self, *_: Any) -> None:
        self.began.append(self.now())


def loggings(options: argparse.Namespace) -> list[Row]:
    """A step that logs the run's scalars against the one before it, which does not."""
    progress(f"logging, {options.layers} layers")
    pairs = 10 if options.quick else 100
    steps = 2 * pairs + 10
    callback = SVDTrainingCallback(
        log_every_n_steps=2, log_spectrum_every_n_epochs=0, schedule=FallToBudget(start=1.0, end=1.0)
    )
    clock, module = Clock(options.device), Tiny(options.width, options.layers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            accelerator="gpu" if options.device.startswith("cuda") else "cpu",
            devices=1,
            callbacks=[clock, callback],
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([torch.randn(8, options.width)] * steps, batch_size=None))
    seconds = [later - earlier for earlier, later in itertools.pairwise(clock.began)][6:]  # the first ones warm up
    silent, logged = seconds[0::2][:pairs], seconds[1::2][:pairs]
    row: Row = {"what": "logging", "layers": options.layers, "width": options.width, **against(logged, silent)}
    return [row | {"step": statistics.median(silent)}]


class OneRankLess(FallToBudget):
    """Takes one rank of every layer in each cut, after the ranks for the budget were found as ever."""

    def __init__(self) -> None:
        super().__init__(start=0.0, end=1.0, shape="linear", cuts=1, ramp="constant")

    def change(self, step: int, full: Any, now: Any, choose: Callable[[], Any]) -> Change:
        choose()
        return Change({name: rank - 1 for name, rank in now.items()}, False)


def bare_refactorizations(run: Run) -> None:
    """What any exact refactorization of the factors has to do."""
    assert run.training is not None
    for layer in run.training.layers.values():
        U, s, V = (factor.detach() for factor in layer.factors())
        (_, upper), (_, lower) = torch.linalg.qr(U), torch.linalg.qr(V)
        torch.linalg.svd((upper * s) @ lower.mT)


def cuts(options: argparse.Namespace) -> list[Row]:
    """``SVDTraining.cut`` against the QR decompositions and SVDs that are in it."""
    rows = []
    for width in (32, 64) if options.quick else (32, 64, 128):
        progress(f"a cut of {options.layers} layers of width {width}")
        net = nn.Sequential(*(nn.Linear(width, width) for _ in range(options.layers)), nn.Linear(width, 10))
        batch = torch.randn(8, width, device=options.device), torch.arange(8, device=options.device)
        run = Run(net.to(options.device), batch, torch.optim.AdamW, Setting(options.device), schedule=OneRankLess())
        assert run.training is not None
        run.step()  # AdamW remembers from here on
        actions = {"bare": partial(bare_refactorizations, run), "cut": partial(run.training.cut, 1, 0)}
        seconds = in_turns(actions, options.rounds, torch.device(options.device))
        row = {"what": "cut", "layers": options.layers, "width": width, **against(seconds["cut"], seconds["bare"])}
        rows.append(row | {"bare": statistics.median(seconds["bare"])})
    return rows


# ------------------------------------------------------------------------------------------------- tables and figures


def tables(rows: list[Row]) -> list[Table]:
    """One for each part that was measured."""
    made = []
    for what, title, headings, cells in (
        (
            "decomposition",
            "Decomposition against its bare SVDs",
            ["model", "parameters", "decompose / SVDs", "middle half", "decompose, s", "SVDs, s"],
            lambda row: [
                row["model"],
                f"{row['parameters'] / 1e6:.1f} M",
                times(row["ratio"]),
                middle_half(row),
                f"{row['seconds']:.1f}",
                f"{row['bare']:.1f}",
            ],
        ),
        (
            "width",
            "A training step of one layer against the dense layer's",
            ["layer", "width", "rank", "step / dense", "middle half", "floor"],
            lambda row: [
                row["kind"],
                str(row["width"]),
                row["rank"],
                times(row["ratio"]),
                middle_half(row),
                times(row["floor"]),
            ],
        ),
        (
            "depth",
            "Microseconds a layer and step, in addition to the dense net's",
            ["layers", "forward and backward", "regularizer", "optimizer", "a dense step"],
            lambda row: [str(row["layers"]), *(f"{row[part]:.0f}" for part in (*EXTRA, "dense"))],
        ),
        (
            "logging",
            "A step that logs the run's scalars against one that does not",
            ["layers", "width", "a step, ms", "logging, ms", "of a step", "middle half", "of 50 steps"],
            lambda row: [
                str(row["layers"]),
                str(row["width"]),
                milliseconds(row["step"]),
                milliseconds(row["step"] * (row["ratio"] - 1)),
                f"{row['ratio'] - 1:.1%}",
                f"{row['low'] - 1:.1%} - {row['high'] - 1:.1%}",
                f"{(row['ratio'] - 1) / 50:.2%}",
            ],
        ),
        (
            "cut",
            "A cut against the QR decompositions and SVDs in it",
            ["layers", "width", "cut / SVDs", "middle half", "cut, s", "SVDs, s"],
            lambda row: [
                str(row["layers"]),
                str(row["width"]),
                times(row["ratio"]),
                middle_half(row),
                f"{row['seconds']:.2f}",
                f"{row['bare']:.2f}",
            ],
        ),
    ):
        mine = [cells(row) for row in rows if row["what"] == what]
        if mine:
            made.append(Table(title, headings, mine))
    return made


def plot_width(rows: list[Row]) -> Any:
    """A step of one layer against the dense layer's, by width; dotted, what the products alone would take."""
    from matplotlib.figure import Figure

    mine = [row for row in rows if row["what"] == "width"]
    kinds = list(dict.fromkeys(row["kind"] for row in mine))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for rank, color in (("full rank", "C0"), ("a quarter", "C1")):
            line = [row for row in mine if row["kind"] == kind and row["rank"] == rank]
            x = [row["width"] for row in line]
            axes.plot(x, [row["ratio"] for row in line], "o-", color=color, label=rank)
            axes.fill_between(x, [row["low"] for row in line], [row["high"] for row in line], color=color, alpha=0.2)
            axes.plot(x, [row["floor"] for row in line], ":", color=color, label=f"{rank}, floor")
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xscale="log", title=kind, xlabel="width", xticks=x, xticklabels=x)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("step / dense step")
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].legend()
    return figure


def plot_depth(rows: list[Row]) -> Any:
    """Microseconds a layer and step beyond a dense net's, by the number of layers."""
    from matplotlib.figure import Figure

    mine = [row for row in rows if row["what"] == "depth"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for part in EXTRA:
        axes.plot([row["layers"] for row in mine], [row[part] for row in mine], "o-", label=part)
    axes.set(xscale="log", xlabel="layers", ylabel="microseconds a layer and step")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def figures(rows: list[Row]) -> dict[str, Callable[[list[Row]], Any]]:
    """What draws each part that was measured and has a figure."""
    measured = {row["what"] for row in rows}
    return {what: plot for what, plot in {"width": plot_width, "depth": plot_depth}.items() if what in measured}


PARTS = {"decomposition": decompositions, "width": widths, "depth": depths, "logging": loggings, "cut": cuts}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--max-width", type=int, default=4096, help="of the Linear of the width part, Conv2d an eighth")
    parser.add_argument("--positions", type=int, default=2048, help="inputs of the Linear of the width part")
    parser.add_argument("--side", type=int, default=16, help="of the images of the width part")
    parser.add_argument("--width", type=int, default=16, help="of the layers of the depth and logging parts")
    parser.add_argument("--layers", type=int, default=400, help="of the logging and cut parts")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.positions, options.max_width = min(options.rounds, 3), 256, 256
    torch.set_num_threads(options.threads)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for part in options.parts:
        rows += (new := PARTS[part](options))
        tables(new)[-1].print()
        save("scale", argv, options, rows)


if __name__ == "__main__":
    main()
