"""How costs grow: decomposition against bare SVDs, a step against a layer's width, a step against the number of layers.

    python benchmarks/scale.py --json out.json
    python benchmarks/scale.py --quick

What is compared takes turns; a ratio is the median over the rounds. The depth part uses layers so small that only
Python and the launches of kernels cost anything: ``forward and backward`` is what factorised layers take more than
plain ones there, ``regulariser`` what happens between backward and step, ``optimizer`` what a step of three tensors a
layer in split groups takes more than one of the dense tensors.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import nets
import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, progress, save, times
from step_cost import arithmetic, cost_of, factorised, ranks_of
from torch import Tensor, nn

from lightning_svd import add_gradients, decompose, svd_layers
from lightning_svd.optimizers import OptimizerOfFactors

# The parts of a step in their order, each with the method of `Trained` that is it.
EXTRA = {"forward and backward": "backward", "regulariser": "regularise", "optimizer": "step"}
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
    """A module in training on one input, dense or factorised, as the callback trains it."""

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

    def regularise(self) -> None:
        """What happens between backward and step."""
        self.steps += 1
        layers = self.factors.regularised
        if layers:
            add_gradients(layers, 1.0, "hoyer", 2e-3, 1.0, self.factors.held(), self.steps)
            self.factors.split()

    def step(self) -> None:
        """The optimizer's step; user's groups are whole afterwards."""
        self.optimizer.step()

    def whole(self) -> None:
        self.backward()
        self.regularise()
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
        dense, full = nn.Sequential(layer).to(options.device), factorised(nn.Sequential(layer)).to(options.device)
        quarter = copy.deepcopy(full)
        quarter[0].keep(torch.arange(width, device=options.device) < width // 4)
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
        trained = {"dense": Trained(dense, x), "ours": Trained(factorised(dense), x)}
        actions = {
            f"{who} {part}": getattr(one, method) for who, one in trained.items() for part, method in EXTRA.items()
        }
        seconds = in_turns(actions, options.rounds, torch.device(options.device), warm_up=2)
        micro = {name: 1e6 * statistics.median(mine) / depth for name, mine in seconds.items()}
        row: Row = {"what": "depth", "layers": depth, "dense": sum(micro[f"dense {part}"] for part in EXTRA)}
        rows.append(row | {part: micro[f"ours {part}"] - micro[f"dense {part}"] for part in EXTRA})
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
            ["layers", "forward and backward", "regulariser", "optimizer", "a dense step"],
            lambda row: [str(row["layers"]), *(f"{row[part]:.0f}" for part in (*EXTRA, "dense"))],
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


PARTS = {"decomposition": decompositions, "width": widths, "depth": depths}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--max-width", type=int, default=4096, help="of the Linear of the width part, Conv2d an eighth")
    parser.add_argument("--positions", type=int, default=2048, help="inputs of the Linear of the width part")
    parser.add_argument("--side", type=int, default=16, help="of the images of the width part")
    parser.add_argument("--width", type=int, default=16, help="of the layers of the depth part")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.positions, options.max_width = min(options.rounds, 3), 256, 256
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for part in options.parts:
        rows += PARTS[part](options)
        tables(rows)[-1].print()
        save("scale", argv, options, rows)


if __name__ == "__main__":
    main()
