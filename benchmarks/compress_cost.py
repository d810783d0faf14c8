"""What `compress` costs: its time against the SVDs and the passes in it, its peak memory against the model.

    python benchmarks/compress_cost.py --json out.json
    python benchmarks/compress_cost.py --quick

The model is a vision transformer with random weights, of width 768 and depth 12 a ViT-B. ``SVDs`` is one
``torch.linalg.svd`` in float32 of each matrix that is factorized. ``passes`` are the very forward and backward passes
that the call makes, those that look for layers that cannot be cut among them, made by the dense model alone: nothing
is collected, and parameters, of which nobody needs gradients, get none. Both take turns with the call; the goal is less
than three times the SVDs on top of the passes. With one thread it is the processor's time that counts.

Memory is the most that the process holds at once in a process of its own, beyond what it held before the call. What a
backward pass keeps of activations depends on the batch alone, and is measured beside it, and so are the second moments
of the largest layer. The goal is less than half as much again as the model, on top of those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import nets
import torch
from harness import Row, Table, against, arguments, middle_half, progress, save, times
from torch import Tensor, nn

from lightning_svd import compress
from lightning_svd.compression import calibration
from lightning_svd.compression.data import CalibrationData

MEGABYTE = 1e6
Call = tuple[Tensor, bool]  # a batch, and whether a backward pass follows
# What is timed inside, each with where it is looked up and its name there.
INSIDE: dict[str, list[tuple[Any, str]]] = {
    "SVDs": [(torch.linalg, "svd"), (torch.linalg, "svdvals")],
    "eigenvectors": [(torch.linalg, "eigh")],
    "triangular and QR": [(torch.linalg, name) for name in ("qr", "cholesky_ex", "solve_triangular")],
    "forward passes": [(CalibrationData, "call")],
    "backward passes": [(calibration, "_backward")],
}


def vit(options: argparse.Namespace) -> nn.Module:
    """A vision transformer for images of the size."""
    torch.manual_seed(options.seed)
    heads = max(1, options.width // 64)
    return nets.ViT(3, options.size, 1000, patch=16, width=options.width, depth=options.depth, heads=heads).eval()


def images(options: argparse.Namespace) -> list[Tensor]:
    """Batches of noise, smoothed, so that some directions have more of it than others."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    shape = (options.batch_size, 3, options.size, options.size)
    noise = [torch.randn(shape, generator=generator) for _ in range(-(-options.inputs // options.batch_size))]
    return [nn.functional.avg_pool2d(each, 3, 1, 1) for each in noise]


def whole(options: argparse.Namespace, model: nn.Module, batches: Sequence[Tensor]) -> Any:
    """The call that is measured."""
    return compress(
        model,
        batches,
        target_macs=options.target,
        importance=options.importance,
        inputs=options.inputs,
        inplace=options.inplace,
        progress=False,
    )


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Have ``wrapper(original, *args)`` in the place of a function inside."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))
    try:
        yield
    finally:
        setattr(owner, name, original)


def calls_of(options: argparse.Namespace, model: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Call], Row]:
    """The passes that the call makes, and seconds by what is done inside."""
    calls: list[Call] = []
    note = calls.append  # what `forward` itself holds is as it was before when calls are run again
    now = clock(options)
    seconds: Counter[str] = Counter()

    def noting(original: Callable[..., Any], net: nn.Module, x: Tensor) -> Any:
        note((x.detach().clone(), torch.is_grad_enabled()))
        return original(net, x)

    def timing(original: Callable[..., Any], *args: Any, what: str, **kwargs: Any) -> Any:
        start = now()
        try:
            return original(*args, **kwargs)
        finally:
            seconds[what] += now() - start

    contexts = [wrapped(nets.ViT, "forward", noting)]
    for what, places in INSIDE.items():
        contexts += [wrapped(owner, name, partial(timing, what=what)) for owner, name in places]
    for context in contexts:
        context.__enter__()
    start = now()
    try:
        whole(options, model, batches)
    finally:
        total = now() - start
        for context in reversed(contexts):
            context.__exit__(None, None, None)
    return calls, {**seconds, "all else": total - sum(seconds.values()), "whole": total}


def matrices_of(model: nn.Module) -> list[Tensor]:
    """The matrices that are factorized."""
    kinds = (nn.Linear, nn.Conv2d)
    return [module.weight.detach().flatten(1) for module in model.modules() if isinstance(module, kinds)]


def bare_svds(matrices: Sequence[Tensor]) -> None:
    """One of each matrix, tall: LAPACK takes several times as long for a wide one."""
    for matrix in matrices:
        torch.linalg.svd(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT, full_matrices=False)


def bare_passes(model: nn.Module, calls: Sequence[Call]) -> None:
    """The passes alone, of a model whose parameters need no gradients."""
    for batch, with_gradients in calls:
        with torch.set_grad_enabled(with_gradients):
            output = model(batch.clone().requires_grad_(with_gradients))
            if with_gradients:
                output.backward(torch.ones_like(output))


def clock(options: argparse.Namespace) -> Callable[[], float]:
    """What tells the time: of one thread the processor's, which does not go on while others have the core."""
    return time.process_time if options.threads == 1 else time.perf_counter


def in_turns_on(
    now: Callable[[], float], actions: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each action by this clock, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = now()
            action()
            seconds[name].append(now() - start)
    return seconds


def timings(options: argparse.Namespace) -> list[Row]:
    """The call against the SVDs and the passes that are in it, and what it spends its time on."""
    model, batches = vit(options), images(options)
    options = argparse.Namespace(**vars(options) | {"inplace": False})
    frozen = vit(options).requires_grad_(False)
    progress("noting passes")
    calls, inside = calls_of(options, model, batches)
    actions: dict[str, Callable[[], object]] = {
        "SVDs": partial(bare_svds, matrices_of(model)),
        "passes": partial(bare_passes, frozen, calls),
        "whole": partial(whole, options, model, batches),
    }
    progress("timing")
    seconds = in_turns_on(clock(options), actions, options.rounds)
    rows = []
    for name in actions:
        rows.append({"what": "time", "part": name, **against(seconds[name], seconds["SVDs"])})
    beyond = [all_ - passes for all_, passes in zip(seconds["whole"], seconds["passes"], strict=True)]
    both = [sum(each) for each in zip(seconds["SVDs"], seconds["passes"], strict=True)]
    rows.append({"what": "time", "part": "whole, without the passes", **against(beyond, seconds["SVDs"])})
    rows.append({"what": "ratio", "part": "whole / (SVDs + passes)", **against(seconds["whole"], both)})
    with_gradients = sum(len(batch) for batch, gradients in calls if gradients)
    inputs = sum(len(batch) for batch, _ in calls)
    rows += [{"what": "inside", "part": part, "seconds": value} for part, value in inside.items()]
    rows.append({"what": "passes", "forward": inputs, "backward": with_gradients})
    return rows


# ------------------------------------------------------------------------------------------------------------- memory


def peak_of(action: Callable[[], object]) -> float:
    """The most that the process held meanwhile beyond what it held before, in MB; on Linux."""
    before = _held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the mark starts from what is held now
    kept = action()
    peak = _held("VmHWM") - before
    del kept
    return peak


def _held(mark: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(mark)) * 1024 / MEGABYTE


def memory_here(options: argparse.Namespace) -> Row:
    """The peaks in this process."""
    small = argparse.Namespace(**vars(options) | {"width": 64, "depth": 1, "inplace": False})
    whole(small, vit(small), images(small))  # what starts but once in a process
    model, batches = vit(options), images(options)
    frozen = vit(options).requires_grad_(False)
    passes = peak_of(partial(bare_passes, frozen, [(batches[0], True)]))
    del frozen
    largest = max(min(matrix.shape) for matrix in matrices_of(model))
    return {
        "what": "memory",
        "inplace": options.inplace,
        "model": sum(p.numel() * p.element_size() for p in model.parameters()) / MEGABYTE,
        "moments": 2 * 4 * largest**2 / MEGABYTE,
        "passes": passes,
        "peak": peak_of(partial(whole, options, model, batches)),
    }


def memory(options: argparse.Namespace) -> list[Row]:
    """The peaks in processes of their own, of a copy and in place."""
    rows = []
    # Blocks that are let go of go back to the system at once, and do not count for what is never held at a time.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    for inplace in (False, True):
        progress(f"memory, {'in place' if inplace else 'of a copy'}")
        given = {key: str(getattr(options, key)) for key in ("width", "depth", "size", "inputs", "target", "seed")}
        given |= {"batch-size": str(options.batch_size), "threads": str(options.threads)}
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
        words += ["--importance", options.importance, "--memory-here", *(["--inplace"] if inplace else [])]
        done = subprocess.run(
            [sys.executable, __file__, *words], env=environment, check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


# ------------------------------------------------------------------------------------------------------------- tables


def tables(rows: list[Row]) -> list[Table]:
    """Time, what it is spent on, and memory."""
    timed = [row for row in rows if row["what"] == "time"]
    counts = next((row for row in rows if row["what"] == "passes"), None)
    made = []
    if counts:
        cells = [[row["part"], f"{row['seconds']:.1f}", times(row["ratio"]), middle_half(row)] for row in timed]
        cells += [[row["part"], "", times(row["ratio"]), middle_half(row)] for row in rows if row["what"] == "ratio"]
        title = f"Time; {counts['forward']} inputs forward, {counts['backward']} of them backward"
        made.append(Table(title, ["part", "s", "times", "middle half"], cells))
        inside = [[row["part"], f"{row['seconds']:.1f}"] for row in rows if row["what"] == "inside"]
        made.append(Table("Inside the call, one of them", ["part", "s"], inside))
    held = [row for row in rows if row["what"] == "memory"]
    if held:
        cells = [
            [
                "in place" if row["inplace"] else "of a copy",
                *(f"{row[key]:.0f}" for key in ("model", "moments", "passes", "peak")),
                times((row["peak"] - row["moments"]) / row["model"]),
                times((row["peak"] - row["moments"] - row["passes"]) / row["model"]),
            ]
            for row in held
        ]
        headings = ["", "model", "moments of a layer", "a pass", "peak", "(peak - moments) / model", "without a pass"]
        made.append(Table("Memory in MB", headings, cells))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--size", type=int, default=64, help="of the images; patches are of 16")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--target", type=float, default=0.5, help="share of the MACs to keep")
    parser.add_argument("--importance", default="auto")
    parser.add_argument("--parts", default="time,memory", help="time, memory")
    parser.add_argument("--inplace", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.width, options.depth = 192, 2
    torch.set_num_threads(options.threads)
    if options.memory_here:
        print(json.dumps(memory_here(options)))
        return
    rows: list[Row] = []
    parts = options.parts.split(",")
    rows += timings(options) if "time" in parts else []
    rows += memory(options) if "memory" in parts else []
    for table in tables(rows):
        table.print()
    save("compress_cost", argv, options, rows)


if __name__ == "__main__":
    main()
