"""What an LSTM takes by torch's kernel, dense, and as ours at a part of its products.

    python benchmarks/recurrent.py --json out.json
    python benchmarks/recurrent.py --quick

One layer, as many inputs as hidden units, sequences of 64 steps in batches of 32: a training step (forward and
backward) and inference alone, of the dense layer, of ours at full rank, and at ranks that leave 0.35 of the products,
as it trains and as the pairs that it ends as.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, milliseconds, progress, save, times
from torch import Tensor, nn

from lightning_svd import decompose, svd_layers, to_factored
from lightning_svd.model.counting import count_params

STEPS, BATCH, SHARE = 64, 32, 0.35


def variants(width: int) -> dict[str, nn.Module]:
    """The layer in every form."""
    full = nn.LSTM(width, width)
    dense = copy.deepcopy(full)
    decompose(full)
    low = copy.deepcopy(full)
    for layer in svd_layers(low).values():
        rank = int(SHARE * layer.dense_params / layer.params_per_rank)
        layer.keep(rank)
        layer.shrink()
    return {
        "dense": dense,
        "ours, full rank": full,
        "ours, 0.35": low,
        "ours, 0.35, pairs": to_factored(low, count_params(low)),
    }


def training(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: module(x)[0].sum().backward()


def inference(module: nn.Module, x: Tensor) -> Callable[[], object]:
    return torch.inference_mode()(lambda: module(x))


WAYS = {"training": training, "inference": inference}


def measure(width: int, rounds: int, device: torch.device) -> list[Row]:
    """All forms of a layer of one width in turns."""
    modules = {name: module.to(device) for name, module in variants(width).items()}
    x = torch.randn(STEPS, BATCH, width, device=device)
    rows = []
    for way, action in WAYS.items():
        seconds = in_turns({name: action(module, x) for name, module in modules.items()}, rounds, device)
        rows += [
            {"width": width, "way": way, "variant": name} | against(mine, seconds["dense"])
            for name, mine in seconds.items()
        ]
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """One for each way."""
    headings = ["form", "hidden units", "time / dense", "middle half", "ms"]
    return [
        Table(
            f"LSTM, {way}",
            headings,
            [
                [row["variant"], str(row["width"]), times(row["ratio"]), middle_half(row), milliseconds(row["seconds"])]
                for row in rows
                if row["way"] == way
            ],
        )
        for way in WAYS
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--widths", type=lambda text: [*map(int, text.split(","))], default=[128, 256, 512, 1024])
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.widths = min(options.rounds, 3), options.widths[:2]
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for width in options.widths:
        progress(f"{width} hidden units")
        rows += measure(width, options.rounds, torch.device(options.device))
    for table in tables(rows):
        table.print()
    save("recurrent", argv, options, rows)


if __name__ == "__main__":
    main()
