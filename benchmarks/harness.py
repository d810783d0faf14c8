"""What the performance benchmarks share: timing in turns, ratios, tables, and files of results.

A script measures rows, prints them as tables and writes them with ``--json``; ``pages.py`` makes the same
tables of the files in ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable

import lightning_svd

Row = dict[str, Any]
CPU = torch.device("cpu")
# With these in the environment glibc keeps what a process has freed, whatever its size.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**32), "MALLOC_MMAP_THRESHOLD_": str(2**30)}


def progress(text: str) -> None:
    """Say what is being done, at once."""
    print(f"... {text}", flush=True)


def in_turns(
    actions: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device = CPU,
    repeats: int = 1,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each action, round by round: all take turns, so that a noisy machine treats them alike.

    Args:
        actions: What to time, by name.
        rounds: How often each takes its turn.
        device: Where the actions compute.
        repeats: How often an action runs in one turn; its seconds are the mean.
        warm_up: Rounds before the first that counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm_up + rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            for _ in range(repeats):
                action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def against(mine: Sequence[float], base: Sequence[float]) -> Row:
    """The median of the ratios to the base in the same round, the middle half of them, and the median of seconds."""
    ratios = sorted(one / other for one, other in zip(mine, base, strict=True))
    quarter = len(ratios) // 4
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[quarter],
        "high": ratios[-1 - quarter],
        "seconds": statistics.median(mine),
    }


def keep_memory() -> None:
    """Start this process anew so that the C library keeps what it frees, unless it does already."""
    if not os.environ.items() >= KEPT_MEMORY.items():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | KEPT_MEMORY)


# ------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column is on the left, the others on the right."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def print(self) -> None:
        """On the terminal."""
        table = RichTable(title=self.title, title_justify="left", box=SIMPLE)
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        Console(width=120).print(table)

    def markdown(self) -> str:
        """As a Markdown table under its title."""
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        return "\n".join([f"**{self.title}**", "", *("| {} |".format(" | ".join(line)) for line in lines)])


def times(value: float) -> str:
    """A ratio."""
    return f"{value:.2f}"


def middle_half(row: Row) -> str:
    """Where the middle half of the ratios lies."""
    return f"{row['low']:.2f} - {row['high']:.2f}"


def milliseconds(seconds: float) -> str:
    """A duration in milliseconds, three digits."""
    return f"{1e3 * seconds:.3g}"


# ------------------------------------------------------------------------------------------- command line and results


def arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds, help="how often everything takes its turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="small and rough, to see that it works")
    parser.add_argument("--json", type=Path, help="file for the rows")
    return parser


def save(benchmark: str, argv: Sequence[str] | None, options: argparse.Namespace, rows: list[Row]) -> None:
    """Write the rows, and what they were measured with and on, to the file of ``--json``; nothing without one."""
    if options.json is None:
        return
    result = {"benchmark": benchmark, "command": command(benchmark, argv), "machine": machine(options), "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def command(benchmark: str, argv: Sequence[str] | None) -> str:
    """The command line (the process's if None) to measure this again, without the files for the rows and a plot."""
    argv = sys.argv[1:] if argv is None else argv
    kept: list[str] = []
    for argument, before in zip(argv, ["", *argv], strict=False):
        if not argument.startswith(("--json", "--plot")) and before not in ("--json", "--plot"):
            kept.append(argument)
    return shlex.join(["python", f"benchmarks/{benchmark}.py", *kept])


def machine(options: argparse.Namespace) -> dict[str, str]:
    """What a timing depends on."""
    facts = {
        "CPU": cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(options.threads),
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "lightning-svd": lightning_svd.__version__,
        "seed": str(options.seed),
    }
    if options.device.startswith("cuda"):
        facts |= {"GPU": torch.cuda.get_device_name(options.device), "CUDA": str(torch.version.cuda)}
    return facts


def cpu_name() -> str:
    """The processor's model and, where vendors hide it behind a general name, its numbers and vector units."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    model = facts.get("model name", platform.machine())
    if "cpu family" in facts:
        model += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
