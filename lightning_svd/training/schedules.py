"""Shapes of a change over time: progress in [0, 1] -> how much of the change is done, in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
    # Fast while there is much to remove, slow near the end (Zhu and Gupta 2017, equation 1).
    "cubic": lambda t: 1.0 - (1.0 - t) ** 3,
}


def progress_between(progress: float, start: float, end: float) -> float:
    """How far ``progress`` is on its way from ``start`` to ``end``, clamped to [0, 1]."""
    if progress >= end:
        return 1.0
    return 0.0 if progress <= start else (progress - start) / (end - start)


def strength(progress: float, start: float, end: float, shape: str) -> float:
    """Sparsity strength as a share of its full weight: ramps up until ``start``, full until ``end``, then off.

    Args:
        progress: Share of the run that is done.
        start: Where ranks begin to fall; the ramp ends here.
        end: Where ranks are frozen; nothing is left to sparsify.
        shape: A key of ``SHAPES``; "constant" is full strength from the first step.

    Example:
        >>> [strength(t, start=0.4, end=0.8, shape="linear") for t in (0.0, 0.1, 0.4, 0.7, 0.8)]
        [0.0, 0.25, 1.0, 1.0, 0.0]
    """
    return 0.0 if progress >= end else SHAPES[shape](progress_between(progress, 0.0, start))


def removal(progress: float, start: float, end: float, shape: str) -> float:
    """Share of the ranks to remove that are gone: 0 until ``start``, 1 from ``end`` on.

    Args:
        progress: Share of the run that is done.
        start: Where ranks begin to fall.
        end: Where ranks are frozen.
        shape: A key of ``SHAPES``; "constant" removes all of them at ``start``.

    Example:
        >>> [removal(t, start=0.25, end=0.75, shape="cubic") for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
        [0.0, 0.0, 0.875, 1.0, 1.0]
    """
    return 0.0 if progress < start else SHAPES[shape](progress_between(progress, start, end))


def cut_steps(total_steps: int, start: float, end: float, cuts: int) -> list[int]:
    """After which optimizer steps the ranks are cut: at most ``cuts``, evenly spread, the last at ``end``.

    Args:
        total_steps: Optimizer steps of the run.
        start: Share of the run before the first cut.
        end: Share of the run at the last cut.
        cuts: How many, at least 1.

    Returns:
        Ascending step counts in [1, total_steps], none twice.

    Example:
        >>> cut_steps(1000, start=0.3, end=0.7, cuts=4)
        [400, 500, 600, 700]
    """
    first, last = start * total_steps, end * total_steps
    steps = [first + (last - first) * k / cuts for k in range(1, cuts + 1)]
    return sorted({min(total_steps, max(1, round(step))) for step in steps})
