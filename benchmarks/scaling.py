"""Memory, traffic and time of SVD training of a 7 B model sharded over GPUs, from formulas; memory, measured.

    python benchmarks/scaling.py --tokens 8192 --flops 4e14 --flops64 4e13 --bandwidth 5e10
    python benchmarks/scaling.py --measure

The formulas of traffic are those whose bytes ``tests/test_sharded.py`` counts in a small run, and the speeds are the
arguments. Time is an upper bound: nothing is computed while something is sent. With ``--measure`` a stack of linear
layers is trained in 1, 2 and 4 processes of this machine, and the bytes of tensors are counted after each operation.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import Row, Table, arguments, progress, save
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_svd import FallToBudget, decompose, gather_factored
from lightning_svd.training.regularizers import COLUMNS
from lightning_svd.training.sharded import ShardedTraining

Shape = tuple[int, ...]
WIDE = 8  # bytes of a number in float64


@dataclass(frozen=True)
class Group:
    """What one call of ``fully_shard`` gathers together.

    Attributes:
        layers: (m, n) of the factorized layers in it.
        others: Shapes of its other parameters.
        gathers: How often in a step: once for the outermost module, which stays whole until its backward pass.
        is_dense: Whether its layers train their dense weights instead, for comparison.
    """

    layers: tuple[tuple[int, int], ...] = ()
    others: tuple[Shape, ...] = ()
    gathers: int = 2
    is_dense: bool = False

    @property
    def shapes(self) -> list[Shape]:
        """Of all its parameters."""
        if self.is_dense:
            return [*self.layers, *self.others]
        return [shape for m, n in self.layers for shape in _factors(m, n)] + [*self.others]

    def numbers(self, processes: int) -> int:
        """What is gathered: each process gives as many rows as the one with most."""
        return sum(-(-rows // processes) * processes * prod(rest) for rows, *rest in self.shapes)


def _factors(m: int, n: int) -> list[Shape]:
    rank = min(m, n)
    return [(m, rank), (rank,), (n, rank)]


def step_numbers(groups: Sequence[Group], processes: int) -> dict[str, int]:
    """How many numbers a step gathers, scatters and adds up for the penalties, at full rank."""
    layers = [layer for group in groups if not group.is_dense for layer in group.layers]
    penalties = sum((2 * min(of) ** 2 if min(of) <= COLUMNS else COLUMNS * min(of)) + min(of) for of in layers)
    return {
        "gathered": sum(group.gathers * group.numbers(processes) for group in groups),
        "scattered": sum(group.numbers(processes) for group in groups),
        "penalties": penalties,
    }


def cut_numbers(ranks: Sequence[int]) -> dict[str, int]:
    """How many numbers a cut adds up and sends from one process to all, for layers of these ranks."""
    return {
        "added up": sum(4 * rank**2 + 2 + rank for rank in ranks),
        "sent": sum(2 * rank**2 + rank for rank in ranks),
    }


@dataclass(frozen=True)
class Speeds:
    """What a GPU does in a second.

    Attributes:
        flops: Of products in bfloat16.
        flops64: Of products in float64.
        svd: Of an SVD in float64.
        bandwidth: Bytes to and from the others.
    """

    flops: float
    flops64: float
    svd: float
    bandwidth: float


def step_seconds(groups: Sequence[Group], processes: int, tokens: int, speeds: Speeds) -> float:
    """Of a step in which each process has so many tokens, in bfloat16 with gradients and penalties in float32."""
    sent = step_numbers(groups, processes)
    share = (processes - 1) / processes
    bytes_sent = share * (2 * sent["gathered"] + 4 * sent["scattered"] + 2 * 4 * sent["penalties"])
    macs = 0
    for group in groups:
        for m, n in group.layers:
            dense, rank = tokens * m * n, min(m, n)
            macs += dense if group.is_dense else min(rank * m * n + dense, tokens * rank * (m + n))
        macs += tokens * sum(prod(shape) for shape in group.others if len(shape) > 1)
    return 6 * macs / speeds.flops + bytes_sent / speeds.bandwidth


def cut_seconds(layers: Sequence[tuple[int, int]], processes: int, speeds: Speeds) -> float:
    """Of a cut at full rank: products and triangular solves of rows here, Cholesky factors, and a share of the SVDs."""
    seconds = 0.0
    for m, n in layers:
        rank = min(m, n)
        here = 5 * 2 * rank**2 * (m + n) / processes + 4 * rank**3 / 3
        seconds += here / speeds.flops64
    turns = -(-len(layers) // processes)
    seconds += turns * 22 * max(min(of) for of in layers) ** 3 / speeds.svd
    sent = cut_numbers([min(of) for of in layers])
    return seconds + WIDE * (2 * sent["added up"] + sent["sent"]) / speeds.bandwidth


def memory(groups: Sequence[Group], processes: int) -> dict[str, float]:
    """Bytes in each process: parameters, gradients and two moments in float32; a group whole, and its gradient."""
    numbers = [group.numbers(processes) for group in groups]
    return {"kept": 16 * sum(numbers) / processes, "gathered": 2 * 2 * max(numbers)}


def llama_7b(is_dense: bool) -> list[Group]:
    """32 blocks of width 4096 with gated layers of 11008, and two tables of 32000 tokens that are left alone."""
    width, inner, tokens = 4096, 11008, 32000
    layers = ((width, width),) * 4 + ((inner, width),) * 2 + ((width, inner),)
    block = Group(layers, ((width,), (width,)), is_dense=is_dense)
    return [block] * 32 + [Group((), ((tokens, width), (tokens, width), (width,)), gathers=1)]


# --------------------------------------------------------------------------------------------------------- measured

PROCESSES, PHASES = (1, 2, 4), ("step", "cut", "gather")


def stack(width: int, depth: int) -> nn.Sequential:
    """Linear layers, none of which is much of the whole."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))


def stack_groups(width: int, depth: int) -> list[Group]:
    """What :func:`measured` shards of it."""
    return [Group(((width, width),))] * depth


def measure(processes: int, width: int, depth: int, start_method: str = "spawn") -> Row:
    """Bytes of the process with most: what is kept between steps, and the peak of each phase."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Large blocks go back to the system when they are let go of: what is resident is then what is used.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_processes(measured, (processes, port, width, depth, folder), processes, start_method=start_method)
        each = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    most = {key: max(of[key] for of in each) for key in each[0]}
    return {"processes": processes, "width": width, "depth": depth, **most}


def measured(rank: int, processes: int, port: int, width: int, depth: int, folder: Path) -> None:
    """Train in one of several processes, and write what was counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    _train(4 * processes, 2, Live())  # loads the libraries, which are not meant
    before, live = _resident(), Live()
    with live:
        found = {"kept": _train(width, depth, live), **live.peaks}
    found |= {f"resident_{name}": resident - before for name, resident in live.resident.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


class Live(TorchDispatchMode):
    """Adds up the bytes of all tensors that are there after each operation.

    Attributes:
        peaks: The most of them at once, by phase.
        resident: The most that the process had in memory, by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._peak = 0
        self.peaks: dict[str, int] = {}
        self.resident: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented  # torch goes on to the operations on what is here of them
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._storages[id(storage)] = weakref.ref(storage)
        # Their sizes too change without an operation: `fully_shard` empties what was gathered.
        there = {key: storage for key, of in self._storages.items() if (storage := of()) is not None}
        self._storages = {key: self._storages[key] for key in there}
        self._peak = max(self._peak, sum(storage.nbytes() for storage in there.values()))
        return result

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the most inside."""
        marks = Path("/proc/self/clear_refs")
        if marks.exists():
            marks.write_text("5", encoding="utf-8")
        self._peak = 0
        yield
        self.peaks[name], self.resident[name] = self._peak, _resident("VmHWM")


def _train(width: int, depth: int, live: Live) -> int:
    """A step, one after which ranks are cut, and the small model; returns the bytes that are kept at full rank."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = stack(width, depth)
    decompose(model)
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    schedule = FallToBudget(start=0.25, end=0.5, cuts=2)
    training = ShardedTraining(
        model, optimizer, total_steps=8, target_params=0.5, final="decomposed", schedule=schedule
    )
    x = torch.randn(4, width)
    for _ in range(2):  # the second has moments
        with live.phase("step"):
            model(x).square().mean().backward()
            assert training.step() is None
            optimizer.zero_grad()
    model(x).square().mean().backward()
    kept = _bytes_of(model, optimizer)
    with live.phase("cut"):
        assert training.step() is not None
    optimizer.zero_grad()
    with torch.device("meta"):
        plain = stack(width, depth)
    with live.phase("gather"):
        gather_factored(model, plain)
    return kept


def _bytes_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of the parameters, gradients and moments that are here; not of the counts of steps."""
    parameters = [*model.parameters()]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held: list[Any] = [*parameters, *(p.grad for p in parameters), *moments]
    return sum(tensor.to_local().nbytes for tensor in held)


def _resident(what: str = "VmRSS") -> int:
    """Bytes that Linux says a process has in memory; 0 elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(what))


def tables(rows: list[Row]) -> list[Table]:
    """One line for each number of processes."""
    headings = ["processes", "parameters, gradients, moments", *PHASES, *(f"{name}, resident" for name in PHASES)]
    lines = [
        [
            str(row["processes"]),
            *(f"{row[name] / 1e6:.1f}" for name in ("kept", *PHASES)),
            *(f"{row[f'resident_{name}'] / 1e6:.0f}" for name in PHASES),
        ]
        for row in rows
    ]
    shape = f"{rows[0]['depth']} layers of {rows[0]['width']} x {rows[0]['width']}"
    return [Table(f"MB in the process that has most, {shape}, AdamW in float32", headings, lines)]


# ------------------------------------------------------------------------------------------------------- the script


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table that is asked for."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--tokens", type=int, default=8192, help="in each process and step")
    parser.add_argument("--flops", type=float, default=4e14, help="of products in bfloat16 in a second")
    parser.add_argument("--flops64", type=float, default=4e13, help="of products in float64")
    parser.add_argument("--svd", type=float, default=4e11, help="of an SVD in float64")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes in a second to and from the others")
    parser.add_argument("--measure", action="store_true", help="train in processes of this machine and count")
    parser.add_argument("--width", type=int, default=512, help="of the layers that are trained")
    parser.add_argument("--depth", type=int, default=16, help="how many there are")
    options = parser.parse_args(argv)
    if options.quick:
        options.width, options.depth = 48, 6
    if options.measure:
        counted: list[Row] = []
        for processes in PROCESSES:
            progress(f"{processes} processes")
            counted.append(measure(processes, options.width, options.depth))
        options.threads = 1
        save("scaling", argv, options, counted)
        for table in tables(counted):
            table.print()
        return
    by_formulas(options).print()


def by_formulas(options: Any) -> Table:
    """Of a model of 7 B parameters."""
    speeds = Speeds(options.flops, options.flops64, options.svd, options.bandwidth)
    rows = []
    for processes in (8, 64):
        for name, is_dense in (("dense", True), ("U, s, V", False)):
            groups = llama_7b(is_dense)
            held, sent = memory(groups, processes), step_numbers(groups, processes)
            layers = [layer for group in groups for layer in group.layers]
            rows.append(
                [
                    f"{processes}, {name}",
                    f"{held['kept'] / 1e9:.1f}",
                    f"{held['gathered'] / 1e9:.1f}",
                    f"{(2 * sent['gathered'] + 4 * sent['scattered']) / 1e9:.0f}",
                    f"{4 * sent['penalties'] / 1e9:.3f}",
                    f"{step_seconds(groups, processes, options.tokens, speeds):.2f}",
                    "-" if is_dense else f"{WIDE * sum(cut_numbers([min(of) for of in layers]).values()) / 1e9:.0f}",
                    "-" if is_dense else f"{cut_seconds(layers, processes, speeds):.0f}",
                ]
            )
    headings = ["GPUs", "GB kept", "GB gathered", "GB a step", "for penalties", "s a step", "GB a cut", "s a cut"]
    return Table("7 B parameters at full rank, for each GPU", headings, rows)


if __name__ == "__main__":
    main()
