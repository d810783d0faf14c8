"""Compressed and full phases in turn (AC/DC)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lightning_svd.arguments import check_choice, check_count, check_share
from lightning_svd.training.policies.policy import Change, Choose, PlannedPolicy
from lightning_svd.training.schedules import SHAPES


@dataclass(kw_only=True)
class Alternating(PlannedPolicy):
    """Ranks are cut to the budget and come back, again and again; at the end they are cut for good.

    AC/DC of Peste et al. 2021 (arXiv 2106.12379), for ranks in the place of single weights: after a warm-up at full
    rank phases alternate, compressed ones in which only the kept ranks are used and trained, and full ones in which all
    are again. Ranks that return have the vectors that they had, s = 0 and no momentum. The last compressed phase is
    longer, and so is the full one before it. The defaults are the proportions of the paper: out of 100 epochs 10 of
    warm-up, 7 compressed phases of 5 with 6 full ones between them, a full one of 10, a compressed one of 15.

    Args:
        start: Share of the run before the first cut, in [0, 1].
        end: Share of the run at the last cut, in (0, 1].
        last_full: Share of the run in the last full phase, in (0, 1], which begins at ``end - last_full``, not before
            ``start``.
        cycles: How many compressed phases there are before the last full one, as long as the full ones between them.
        ramp: Shape in which the sparsity strength ramps up until ``start``, to be full until ``end``; None for no
            sparsity penalty at all.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    start: float = 0.1
    end: float = 0.85
    last_full: float = 0.1
    cycles: int = 7
    ramp: str | None = None

    def __post_init__(self) -> None:
        check_share("start", self.start, zero=True)
        check_share("end", self.end)
        check_share("last_full", self.last_full)
        if self.start + self.last_full > self.end * (1 + 1e-12):
            raise ValueError(
                f"`start` + `last_full` must be <= `end` ({self.end!r}), got {self.start!r} + {self.last_full!r}"
            )
        check_count("cycles", self.cycles, most=1_000_000)
        check_choice("ramp", self.ramp, (*SHAPES, None))
        self.begin(1)

    def begin(self, total_steps: int) -> None:
        phases = 2 * self.cycles - 1
        length = (self.end - self.last_full - self.start) / phases
        shares = [*(self.start + length * phase for phase in range(phases + 1)), self.end]
        steps = [min(total_steps, max(1, round(share * total_steps))) for share in shares]
        # Of phases that begin after the same step in a short run, the last one is left.
        self._compressed_from = {step: phase % 2 == 0 for phase, step in enumerate(steps)}
        super().begin(total_steps)

    def plan(self, total_steps: int) -> Iterable[int]:
        return self._compressed_from

    def judges(self, step: int) -> bool:
        phases = [compressed for begins, compressed in self._compressed_from.items() if begins <= step]
        return bool(phases) and phases[-1]

    def change(self, step: int, full: Mapping[str, int], now: Mapping[str, int], choose: Choose) -> Change:
        self.resume(step)
        final = not self.left
        return Change(choose() if self.judges(step) else full, final, may_return=not final)

    def strength(self, step: int) -> float:
        return self.ramped(step, self.start, self.end, self.ramp)

    def may_pause(self, step: int) -> bool:
        # In a full phase, which then lasts longer; what a cut costs is no reason to keep ranks cut.
        return bool(self.left) and self.left[0] > min(self._compressed_from) and self._compressed_from[self.left[0]]
