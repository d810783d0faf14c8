"""How many calibration inputs are enough: quality of a compressed net against the inputs that it was calibrated on.

    python benchmarks/inputs.py --data cifar10.npz --json benchmarks/results/inputs.json

Nets and measures are those of pretrained.py. A share of the inputs, a quarter, is held out to judge by.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Row, Table, command, cpu_name
from pretrained import default_cache
from quality import numbers
from trained_nets import NETS

from lightning_svd import compress


def measure(name: str, cache: Path, data: Path | None, counts: Sequence[int], share: float, seeds: Sequence[int]):
    """A row for each number of inputs and seed."""
    net = NETS[name](cache, data)
    about = {"net": name, "measure": net.measure, "original": net.quality(net.model)}
    for count in counts:
        for seed in seeds:
            batches = net.calibration(seed, count, size=max(1, min(16, count // 4)))
            small, report = compress(
                copy.deepcopy(net.model), batches, target_macs=share, inputs=count, progress=False, seed=seed
            )
            found = {"inputs": count, "seed": seed, "quality": net.quality(small), "choice": report.choice}
            yield {**about, "share": share, **found, "seconds": round(report.seconds, 2)}


def tables(rows: Sequence[Row]) -> list[Table]:
    """The mean over seeds for each number of inputs, and the lowest and highest."""
    result = []
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        lines = []
        for count in dict.fromkeys(row["inputs"] for row in own):
            found = [row["quality"] for row in own if row["inputs"] == count]
            seconds = statistics.mean(row["seconds"] for row in own if row["inputs"] == count)
            ends = f"{min(found):.2f} - {max(found):.2f}"
            lines.append([str(count), f"{statistics.mean(found):.2f}", ends, f"{seconds:.1f}", str(len(found))])
        first = own[0]
        title = f"{net}, {first['share']:g} of the MACs: {first['measure']}, {first['original']:.2f} before"
        result.append(Table(title, ["inputs", "quality", "lowest - highest", "seconds", "seeds"], lines))
    return result


def plot(rows: Sequence[Row]) -> Any:
    """Quality against the number of calibration inputs."""
    from matplotlib.figure import Figure

    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure = Figure(figsize=(4 * len(nets), 3.2), layout="constrained")
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        own = [row for row in rows if row["net"] == net]
        counts = list(dict.fromkeys(row["inputs"] for row in own))
        means = [statistics.mean(row["quality"] for row in own if row["inputs"] == count) for count in counts]
        axes.plot(counts, means, marker="o", label=f"{own[0]['share']:g} of the MACs")
        axes.scatter([row["inputs"] for row in own], [row["quality"] for row in own], s=8, alpha=0.5)
        axes.axhline(own[0]["original"], color="gray", linestyle=":", label="original")
        axes.set(xscale="log", xlabel="calibration inputs", ylabel=own[0]["measure"], title=net)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.legend(frameon=False)
    return figure


def figures(rows: list[Row]) -> dict[str, Callable[[list[Row]], Any]]:
    """What draws the figure."""
    return {"quality": plot}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=numbers(str), default=["text", "images"])
    parser.add_argument("--counts", type=numbers(int), default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--share", type=float, default=0.5, help="of the MACs")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="the CIFAR-10 archive; without it torchvision's is downloaded")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for trained nets and speech")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    options.cache.mkdir(parents=True, exist_ok=True)
    asked = command("inputs", argv)
    for path in (options.data, options.cache):
        asked = asked.replace(str(path), path.name) if path else asked
    machine = {"CPU": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    rows: list[Row] = []
    for name in options.nets:
        for row in measure(name, options.cache, options.data, options.counts, options.share, options.seeds):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.json:
                result = {"benchmark": "inputs", "command": asked, "machine": machine, "rows": rows}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for table in tables(rows):
        table.print()


if __name__ == "__main__":
    main()
