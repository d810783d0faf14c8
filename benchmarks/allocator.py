"""What a model takes by whether memory goes back to the system after each call: dense, and cut to half of its MACs.

    python benchmarks/allocator.py --threads 1 --json out.json

What a model allocates in a call is free after it. glibc, the C library of most Linux systems, keeps it for the next
call or hands it back, whose pages are made anew then. By default it adapts to the blocks that were freed before, so
that the same model takes one time or another in different processes; two variables of the environment settle it. Each
of these ways has a new process; both models take turns there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from harness import (
    KEPT_MEMORY,
    Row,
    Table,
    against,
    arguments,
    in_turns,
    middle_half,
    milliseconds,
    progress,
    save,
    times,
)
from latency import repeats_of
from time_budget import NETS, dense

from lightning_svd import compress

WAYS: dict[str, dict[str, str]] = {
    "kept": KEPT_MEMORY,
    "by default": {},
    "handed back": {"MALLOC_TRIM_THRESHOLD_": str(2**17), "MALLOC_MMAP_THRESHOLD_": str(2**17)},
}


@torch.inference_mode()
def times_of(net: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    """Of the dense model and the small one, in this process."""
    torch.set_num_threads(options.threads)
    with torch.inference_mode(False):
        model, x = dense(net, options.seed), torch.randn(batch, *NETS[net][1])
        small, _ = compress(copy.deepcopy(model), [x, x], target_macs=0.5, importance="spectrum", progress=False)
    actions = {"dense": lambda: model(x), "small": lambda: small(x)}
    seconds = in_turns(actions, options.rounds, repeats=repeats_of(actions["dense"]))
    return against(seconds["small"], seconds["dense"]) | {"dense_seconds": statistics.median(seconds["dense"])}


def measure(net: str, batch: int, argv: Sequence[str]) -> list[Row]:
    """A row for each way."""
    rows, base = [], {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for way, environment in WAYS.items():
        progress(f"{net}, {batch} at a time, memory {way}")
        here = [sys.executable, __file__, *argv, "--only", net, str(batch)]
        found = subprocess.run(here, env=base | environment, check=True, stdout=subprocess.PIPE).stdout
        rows.append({"net": net, "batch": batch, "memory": way, **json.loads(found.splitlines()[-1])})
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """Milliseconds, and ratios of the small model and of the dense one to what it takes where memory is kept."""
    headings = ["net", "batch", "memory", "dense ms", "to kept", "half of the MACs / dense", "middle half"]
    kept = {(row["net"], row["batch"]): row["dense_seconds"] for row in rows if row["memory"] == "kept"}
    lines = [
        [
            row["net"],
            str(row["batch"]),
            row["memory"],
            milliseconds(row["dense_seconds"]),
            times(row["dense_seconds"] / kept[row["net"], row["batch"]]),
            times(row["ratio"]),
            middle_half(row),
        ]
        for row in rows
    ]
    return [Table("Memory that is kept for the next call, or handed back", headings, lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--nets", type=lambda text: text.split(","), default=list(NETS))
    parser.add_argument("--batches", type=lambda text: [int(item) for item in text.split(",")], default=[1, 32])
    parser.add_argument("--only", nargs=2, metavar=("NET", "BATCH"), help="measure in this process, and print it")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.nets, options.batches = 3, ["lstm512"], [1]
    if options.only:
        print(json.dumps(times_of(options.only[0], int(options.only[1]), options)))
        return
    rows: list[Row] = []
    for net in options.nets:
        for batch in options.batches:
            rows += measure(net, batch, sys.argv[1:] if argv is None else argv)
            save("allocator", argv, options, rows)
    for table in tables(rows):
        table.print()


if __name__ == "__main__":
    main()
