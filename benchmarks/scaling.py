"""Memory, traffic and time of SVD training of a 7 B model sharded over GPUs, from formulas.

    python benchmarks/scaling.py --tokens 8192 --flops 4e14 --flops64 4e13 --bandwidth 5e10

Nothing is measured here: the formulas of traffic are those whose bytes ``tests/test_sharded.py`` counts in a small run,
and the speeds are the arguments. Time is an upper bound: nothing is computed while something is sent.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from harness import Table

from lightning_svd.training.regularizers import COLUMNS

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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="in each process and step")
    parser.add_argument("--flops", type=float, default=4e14, help="of products in bfloat16 in a second")
    parser.add_argument("--flops64", type=float, default=4e13, help="of products in float64")
    parser.add_argument("--svd", type=float, default=4e11, help="of an SVD in float64")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes in a second to and from the others")
    options = parser.parse_args()
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
    Table("7 B parameters at full rank, for each GPU", headings, rows).print()


if __name__ == "__main__":
    main()
