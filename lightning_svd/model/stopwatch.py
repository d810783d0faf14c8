"""Seconds that something takes on this machine, with whatever else the machine does left out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

ROUNDS = 5  # in which what is compared takes turns
REUSED = 31 * 2**20  # bytes, a little less than the most that glibc adapts to


@contextmanager
def measuring() -> Iterator[None]:
    """Without gradients, with random numbers that nobody else misses, and with memory that is there already."""
    reuse_memory()
    with torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad():
        yield


def reuse_memory() -> None:
    """Have what modules allocate in each call come from memory that the process has already.

    What is free at the end of the heap beyond twice the largest block that was ever freed, of blocks up to 32 MB, glibc
    hands back to the system (``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` in its manual); in the next call its pages
    are made anew. An LSTM, whose weights torch's kernel copies in each call, takes almost twice as long then, or not,
    as other blocks happen to lie; once a block of this size was freed, it does not. Other allocators are not affected.
    """
    torch.empty(REUSED, dtype=torch.uint8)


def fastest(actions: Mapping[Any, Callable[[], object]], seconds: float, rounds: int = ROUNDS) -> dict[Any, float]:
    """Seconds of one run of each in its fastest turn: whatever else the machine does can only make one slower.

    Args:
        actions: As for :func:`turns`.
        seconds: As there.
        rounds: As there.
    """
    return {key: min(taken) for key, taken in turns(actions, seconds, rounds).items()}


def turns(actions: Mapping[Any, Callable[[], object]], seconds: float, rounds: int = ROUNDS) -> dict[Any, list[float]]:
    """Seconds of one run of each in every turn that it has; as many of each, one after the other.

    Args:
        actions: What to time, by any key.
        seconds: About how long to take for all; each runs three times whatever it takes.
        rounds: How many turns each has, if there is time, after one of a single run.
    """
    for action in actions.values():
        _mean(action, 1)  # makes what is made once
    taken = {key: [_mean(action, 1)] for key, action in actions.items()}
    once = sum(first for first, *_ in taken.values())
    left = seconds - 2 * once
    turn = left / rounds / len(actions)
    for _ in range(max(1, min(rounds, int(left / once)))):
        for key, action in actions.items():
            taken[key].append(_mean(action, max(1, int(turn / min(taken[key])))))
    return taken


def ratio(mine: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios in the same turn, in which the machine treats both alike."""
    return statistics.median(one / other for one, other in zip(mine, base, strict=True))


def _mean(action: Callable[[], object], runs: int) -> float:
    """Of so many runs in a row, in inference mode as a model that is finished runs; an accelerator is waited for."""
    with torch.inference_mode():
        _wait()
        start = time.perf_counter()
        for _ in range(runs):
            action()
        _wait()
        return (time.perf_counter() - start) / runs


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
