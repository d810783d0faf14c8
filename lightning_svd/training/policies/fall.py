"""Ranks fall to the budget, over a stretch of the run or at once from a trained net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_svd.arguments import check_choice, check_count, check_share
from lightning_svd.ranks.allocation import interpolate
from lightning_svd.training.policies.policy import Change, Choose, PlannedPolicy
from lightning_svd.training.schedules import SHAPES, cut_steps, removal


@dataclass(kw_only=True)
class FallToBudget(PlannedPolicy):
    """The default schedule: ranks are full, then fall to the budget in cuts along a curve, then stay.

    Args:
        start: Share of the run before they begin to fall, in [0, 1].
        end: Share of the run after which they stay, in (0, 1] and not before ``start``.
        shape: Of the fall, see :mod:`~lightning_svd.training.schedules`.
        cuts: In how many they fall.
        ramp: Shape in which the sparsity strength ramps up until ``start``; None for no sparsity penalty at all.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    importance = "fisher"

    start: float = 0.5
    end: float = 0.7
    shape: str = "cubic"
    cuts: int = 20
    ramp: str | None = "linear"

    def __post_init__(self) -> None:
        check_share("start", self.start, zero=True)
        check_share("end", self.end)
        if self.start > self.end:
            raise ValueError(f"`start` must be <= `end` ({self.end!r}), got {self.start!r}")
        check_choice("shape", self.shape, SHAPES)
        check_count("cuts", self.cuts, most=1_000_000)
        check_choice("ramp", self.ramp, (*SHAPES, None))
        self.begin(1)

    def plan(self, total_steps: int) -> list[int]:
        return cut_steps(total_steps, self.start, self.end, self.cuts)

    def change(self, step: int, full: Mapping[str, int], now: Mapping[str, int], choose: Choose) -> Change:
        final = step >= self.left[-1]
        progress = step / self.total_steps
        removed = 1.0 if final else removal(progress, self.start, self.end, self.shape)
        wanted = interpolate(full, choose(), removed)
        self.resume(step)
        # Ranks only fall: what was cut has been let go of.
        return Change({name: min(rank, now[name]) for name, rank in wanted.items()}, final)

    def strength(self, step: int) -> float:
        return self.ramped(step, self.start, self.end, self.ramp)

    def may_pause(self, step: int) -> bool:
        return super().may_pause(step) and step >= self.start * self.total_steps


@dataclass(kw_only=True)
class Finetune(FallToBudget):
    """The schedule for a trained net: one early cut to the budget, then fine-tuning without a sparsity penalty.

    Until then layers are the dense ones: what Adam does to U, s and V in a few steps of a loss that is small already
    undoes more than a cut. The arguments are those of :class:`FallToBudget`.
    """

    full_rank_as = "dense"

    start: float = 0.0
    end: float = 0.02
    cuts: int = 1
    ramp: str | None = None
