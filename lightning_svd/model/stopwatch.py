"""Seconds that something takes on this machine, with whatever else the machine does left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ROUNDS = 5  # in which what is compared takes turns


@contextmanager
def measuring() -> Iterator[None]:
    """Without gradients, and with random numbers that nobody else misses."""
    with torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad():
        yield


def fastest(actions: Mapping[Any, Callable[[], object]], seconds: float, rounds: int = ROUNDS) -> dict[Any, float]:
    """Seconds of one run of each: they take turns, and the fastest turn counts.

    Whatever else the machine does can only make one slower.

    Args:
        actions: What to time, by any key.
        seconds: About how long to take for all; each runs three times whatever it takes.
        rounds: How many turns each has, if there is time.
    """
    for action in actions.values():
        action()  # makes what is made once
    best = {key: _mean(action, 1) for key, action in actions.items()}
    left = seconds - 2 * sum(best.values())
    turn = left / rounds / len(actions)
    for _ in range(max(1, min(rounds, int(left / sum(best.values()))))):
        for key, action in actions.items():
            best[key] = min(best[key], _mean(action, max(1, int(turn / best[key]))))
    return best


def _mean(action: Callable[[], object], runs: int) -> float:
    """Of so many runs in a row; an accelerator is waited for."""
    _wait()
    start = time.perf_counter()
    for _ in range(runs):
        action()
    _wait()
    return (time.perf_counter() - start) / runs


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
