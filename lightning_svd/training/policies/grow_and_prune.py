"""Groups of layers return to full rank in turn and are cut again, so that layers trade ranks (GaP)."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lightning_svd.arguments import check_choice, check_count, check_share
from lightning_svd.ranks.allocation import interpolate
from lightning_svd.training.policies.policy import Change, Choose, PlannedPolicy
from lightning_svd.training.schedules import SHAPES, cut_steps, removal


@dataclass(kw_only=True)
class GrowAndPrune(PlannedPolicy):
    """Ranks fall to the budget; then one group of layers after the other is at full rank for a while, and cut again.

    GaP of Ma et al. 2021 (arXiv 2106.09857), for ranks in the place of single weights, and from a net that begins at
    full rank. Whenever the turn passes on, the budget is shared anew over all layers, by what their ranks carry by
    then: the group that was at full rank may keep more ranks than before, and others fewer. Ranks that return have the
    vectors that they had, s = 0 and no momentum.

    Args:
        start: Share of the run before ranks begin to fall, in [0, 1].
        grow: Share of the run at which the budget is met and the first group grows, in (0, 1], not before ``start``.
        end: Share of the run at the last cut, after which ranks stay, in (0, 1], not before ``grow``.
        shape: Of the fall, see :mod:`~lightning_svd.training.schedules`.
        cuts: In how many they fall.
        groups: Into how many consecutive parts layers are divided, as many layers in each.
        rounds: How often each group has its turn; turns are equally long.
        ramp: Shape in which the sparsity strength ramps up until ``start``, to be full until ``end``; None for no
            sparsity penalty at all.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    importance = "fisher"

    start: float = 0.3
    grow: float = 0.4
    end: float = 0.7
    shape: str = "cubic"
    cuts: int = 10
    groups: int = 3
    rounds: int = 2
    ramp: str | None = None

    def __post_init__(self) -> None:
        check_share("start", self.start, zero=True)
        check_share("grow", self.grow)
        check_share("end", self.end)
        if not self.start <= self.grow <= self.end:
            raise ValueError(
                f"`grow` must be between `start` ({self.start!r}) and `end` ({self.end!r}), got {self.grow!r}"
            )
        check_choice("shape", self.shape, SHAPES)
        check_count("cuts", self.cuts, most=1_000_000)
        check_count("groups", self.groups, most=1000)
        check_count("rounds", self.rounds, most=1000)
        check_choice("ramp", self.ramp, (*SHAPES, None))
        self.begin(1)

    def plan(self, total_steps: int) -> list[int]:
        fall = cut_steps(total_steps, self.start, self.grow, self.cuts)
        turns = cut_steps(total_steps, self.grow, self.end, self.groups * self.rounds)
        self._turns = sorted({fall[-1], *turns})  # when each begins, and the last one ends
        return sorted({*fall, *turns})

    def change(self, step: int, full: Mapping[str, int], now: Mapping[str, int], choose: Choose) -> Change:
        self.resume(step)
        final, turn = not self.left, bisect(self._turns, step) - 1
        removed = 1.0 if turn >= 0 else removal(step / self.total_steps, self.start, self.grow, self.shape)
        wanted = interpolate(full, choose(), removed)
        grown = self._group(turn, [*full]) if turn >= 0 and not final else ()
        ranks = {name: full[name] if name in grown else min(rank, now[name]) for name, rank in wanted.items()}
        return Change(ranks, final, may_return=not final)

    def _group(self, turn: int, names: list[str]) -> Collection[str]:
        """The layers whose turn it is; where there are fewer layers than groups, each is one."""
        groups = min(self.groups, len(names))
        place = turn % groups
        return names[len(names) * place // groups : len(names) * (place + 1) // groups]

    def strength(self, step: int) -> float:
        return self.ramped(step, self.start, self.end, self.ramp)

    def may_pause(self, step: int) -> bool:
        return super().may_pause(step) and step >= self.start * self.total_steps
