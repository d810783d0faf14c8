"""One run for all budgets against a run for each: accuracy where the budget is chosen after training.

    python benchmarks/nested.py --seeds 0,1,2 --json out.json

A run with ``schedule="nested"`` is cut to each budget afterwards, by ``to_factored`` and by ``compress`` with the loss
of training data, neither of which trains. Beside it stand a run with the default schedule for each budget, and the
dense net, which was trained for none, cut in the same ways. The perceptron of the quality benchmark, on MNIST-1D; all
have the same epochs, batches, optimizer and learning rates.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from harness import Row, Table, arguments, progress, save
from quality import Data, Setting, accuracy, compressed, cost_of, dense, nested_run, numbers, ours
from torch import nn

from lightning_svd import decompose, to_factored

WAYS = {
    "fall": "a run for each budget",
    "nested": "one nested run, `to_factored`",
    "nested_compress": "one nested run, `compress`",
    "dense": "the dense net, `to_factored`",
    "dense_compress": "the dense net, `compress`",
}


def at(model: nn.Module, setting: Setting, budgets: Sequence[float], way: str) -> list[Row]:
    """What a dense net is worth at each budget, by ``to_factored`` and by ``compress``."""
    twin = copy.deepcopy(model)
    decompose(twin)
    cost, rows = cost_of(twin, setting), []
    for budget in budgets:
        small = to_factored(model, cost, target_macs=budget)
        rows.append(row_of(way, setting, budget, accuracy(small, setting)))
        small = compressed(model, replace(setting, target=budget))
        rows.append(row_of(f"{way}_compress", setting, budget, accuracy(small, setting)))
    return rows


def row_of(way: str, setting: Setting, budget: float, found: float) -> Row:
    return {"way": way, "seed": setting.seed, "budget": budget, "accuracy": found}


def measure(setting: Setting, budgets: Sequence[float], options: dict[str, Any]) -> list[Row]:
    """All rows of a seed."""
    start = time.perf_counter()
    model = nested_run(setting, **options)
    seconds = {"nested": time.perf_counter() - start}
    rows = [row_of("nested", setting, 1.0, accuracy(model, setting)), *at(model, setting, budgets, "nested")]
    model = dense(setting)
    rows += [row_of("dense", setting, 1.0, accuracy(model, setting)), *at(model, setting, budgets, "dense")]
    start = time.perf_counter()
    for budget in budgets:
        progress(f"seed {setting.seed}, {budget:.2f} of the MACs")
        rows.append(row_of("fall", setting, budget, accuracy(ours(replace(setting, target=budget)), setting)))
    seconds["fall"] = time.perf_counter() - start
    return [row | {"seconds": round(seconds.get(row["way"], 0.0), 1)} for row in rows]


def tables(rows: list[Row]) -> list[Table]:
    """Mean accuracy of each way at each budget, and its deviation over the seeds."""
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    lines = []
    for budget in sorted({row["budget"] for row in rows}):
        line = [f"{budget:.2f}"]
        for way in ways:
            found = [row["accuracy"] for row in rows if (row["way"], row["budget"]) == (way, budget)]
            spread = f" ± {statistics.stdev(found):.1%}" if len(found) > 1 else ""
            line.append(f"{statistics.mean(found):.1%}{spread}" if found else "")
        lines.append(line)
    seeds = len({row["seed"] for row in rows})
    title = f"Accuracy by the share of the MACs, mean of {seeds} seeds"
    return [Table(title, ["MACs", *(WAYS[way] for way in ways)], lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--target", type=float, default=0.15, help="the smallest budget")
    parser.add_argument("--budgets", type=int, default=8, help="how many, spread evenly in their logarithm")
    parser.add_argument("--nested", type=json.loads, default={}, help="arguments of Nested, as JSON")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.epochs, options.budgets = [0], 1, 2
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    budgets = [options.target ** (1 - rung / options.budgets) for rung in range(options.budgets)]
    rows: list[Row] = []
    for seed in options.seeds:
        setting = Setting(
            Data("mnist1d"), "mlp", options.epochs, 128, 0.05, "32-true", "channel", seed, target=options.target
        )
        rows += measure(setting, budgets, options.nested)
        save("nested", argv, options, rows)
    tables(rows)[0].print()


if __name__ == "__main__":
    main()
