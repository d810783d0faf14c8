"""Accuracy and size of small models in fewer bits: half precision, and int8 by dynamic quantization.

    python benchmarks/casts.py --json out.json

Each net is trained on digits, dense and by SVD training to 0.35 of its multiply-accumulates, and then cast. Dynamic
quantization covers linear layers, so nets of those are taken.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import warnings
from collections.abc import Callable, Sequence

import torch
from harness import Row, Table, arguments, progress, save
from quality import Data, Setting, accuracy, dense, mean, ours
from torch import nn
from torch.ao.quantization import quantize_dynamic

TARGET, EPOCHS = 0.35, 30
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.half(),
    "int8, dynamic": lambda model: quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8),
}


def size(model: nn.Module) -> int:
    """Bytes of the weights in a file."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


class InItsType(nn.Module):
    """A model that takes float32 and gives float32, whatever it computes in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.dtype = next((p.dtype for p in model.parameters()), torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.to(self.dtype)).float()


def measure(net: str, seed: int) -> list[Row]:
    """Both models in each precision."""
    setting = Setting(Data("digits"), net, EPOCHS, 64, 0.05, "32-true", "channel", seed)
    target = Setting(**{**vars(setting), "target": TARGET})
    rows = []
    for form, model in (("dense", dense(setting)), ("low-rank", ours(target))):
        for precision, cast in CASTS.items():
            small = cast(copy.deepcopy(model).eval())
            row = {"net": net, "form": form, "precision": precision, "seed": seed, "bytes": size(small)}
            rows.append(row | {"accuracy": accuracy(InItsType(small), setting)})
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """Means over the seeds."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["net"], row["form"], row["precision"]), []).append(row)
    dense_bytes = {net: mean(group, "bytes") for (net, *rest), group in groups.items() if rest == ["dense", "float32"]}
    lines = [
        [
            net,
            form,
            precision,
            f"{mean(group, 'accuracy'):.2%}",
            f"{mean(group, 'bytes') / 1e3:.0f} kB",
            f"{mean(group, 'bytes') / dense_bytes[net]:.0%}",
            str(len(group)),
        ]
        for (net, form, precision), group in groups.items()
    ]
    return [
        Table(
            "Accuracy and size on digits",
            ["net", "form", "precision", "accuracy", "size", "of dense float32", "seeds"],
            lines,
        )
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--nets", type=lambda text: text.split(","), default=["mlp", "vit"])
    options: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[Row] = []
    for net in options.nets:
        for seed in range(1 if options.quick else options.rounds):
            progress(f"{net}, seed {seed}")
            rows += measure(net, seed)
    for table in tables(rows):
        table.print()
    save("casts", argv, options, rows)


if __name__ == "__main__":
    main()
