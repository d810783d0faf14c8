"""A step of a net whose layers run in each of T time steps: their weights rebuilt in each, or once for an input.

    python benchmarks/repeats.py --threads 1 --json out.json

Two linear layers and a head, each run T times for an input, as in a spiking net. A step is the forward and the backward
pass, without an optimizer, while U, s and V are trained at full rank. All ways take turns; ratios are to the dense net.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from harness import Row, Table, against, arguments, in_turns, middle_half, milliseconds, save, times
from torch import Tensor, nn

from lightning_svd import decompose, svd_layers
from lightning_svd.model.counting import count_costs
from lightning_svd.model.repeats import RepeatedCalls

STEPS, INPUTS, CLASSES = 10, 64, 10
WIDTHS, BATCHES = (128, 256, 512), (32, 128)
WAYS = ("rebuilt in each time step", "rebuilt once")


class OverTime(nn.Module):
    """What leaks, is charged and goes on, in each of the time steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (INPUTS, width, width, CLASSES)
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        potentials: list[Tensor | float] = [0.0] * len(self.layers)
        total = torch.zeros(())
        for _ in range(STEPS):
            z = x
            for number, layer in enumerate(self.layers):
                potentials[number] = 0.9 * potentials[number] + layer(z)
                z = torch.sigmoid(potentials[number])
            total = total + z
        return total


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The forward and the backward pass of one batch."""

    def run() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()

    return run


def measure(width: int, batch: int, options: argparse.Namespace) -> list[Row]:
    """The rows of a width and a batch size."""
    dense = OverTime(width)
    models = {"dense": dense} | {way: copy.deepcopy(dense) for way in WAYS}
    for way in WAYS:
        decompose(models[way])
    once, x = models[WAYS[1]], torch.rand(batch, INPUTS)
    counted = {name: price.repeats for name, price in count_costs(once, x).layers.items()}
    repeats = RepeatedCalls(once, svd_layers(once), counted)
    y = torch.randint(CLASSES, (batch,))
    seconds = in_turns({name: step(model, x, y) for name, model in models.items()}, options.rounds)
    repeats.stop()
    about: Row = {"width": width, "batch": batch, "steps": STEPS}
    dense_seconds = against(seconds["dense"], seconds["dense"])["seconds"]
    return [{**about, "way": way, "dense": dense_seconds} | against(seconds[way], seconds["dense"]) for way in WAYS]


def tables(rows: list[Row]) -> list[Table]:
    """Ratios to the dense net's step."""
    sizes = {(row["width"], row["batch"]): row["dense"] for row in rows}
    by = {(row["width"], row["batch"], row["way"]): row for row in rows}
    headings = ["width", "batch", "dense, ms", *(part for way in WAYS for part in (f"{way}, / dense", "middle half"))]
    lines = []
    for (width, batch), seconds in sizes.items():
        cells = [(times(row["ratio"]), middle_half(row)) for row in (by[width, batch, way] for way in WAYS)]
        lines.append([str(width), str(batch), milliseconds(seconds), *(cell for pair in cells for cell in pair)])
    return [Table(f"A step, layers that run {STEPS} times", headings, lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = arguments(__doc__, rounds=25).parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sizes = [(16, 4)] if options.quick else [(width, batch) for width in WIDTHS for batch in BATCHES]
    rows = [row for size in sizes for row in measure(*size, options)]
    for table in tables(rows):
        table.print()
    save("repeats", argv, options, rows)


if __name__ == "__main__":
    main()
