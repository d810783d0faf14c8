"""Which ranks when: what is to change in a run after a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_svd.arguments import check_choice, check_count, check_share
from lightning_svd.ranks.allocation import interpolate
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.training.schedules import SHAPES, cut_steps, removal, strength

ChooseRanks = Callable[[dict[str, Tensor], ModelCost], dict[str, int]]


@dataclass(frozen=True)
class Change:
    """What is to change.

    Attributes:
        ranks: The rank that each layer is to use.
        final: Whether ranks are final, so that layers can train as what they are going to be.
    """

    ranks: Mapping[str, int]
    final: bool


class RankPolicy(ABC):
    """When ranks change in a run, and to what.

    Attributes:
        importance: What ranks are judged by where the user does not say it.
        full_rank_as: What layers are trained as before the first cut where the user does not say it.
    """

    importance: ClassVar[str] = "spectrum"
    full_rank_as: ClassVar[str] = "svd"

    @abstractmethod
    def begin(self, total_steps: int) -> None:
        """Plan a run of this many optimizer steps."""

    @abstractmethod
    def resume(self, last_change: int) -> None:
        """Go on after the change that was made at this step; 0 if none was."""

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether something is to change after this many steps."""

    @abstractmethod
    def change(
        self,
        step: int,
        full: Mapping[str, int],
        now: Mapping[str, int],
        choose: Callable[[], Mapping[str, int]],
    ) -> Change:
        """What is to change after this many steps.

        Args:
            step: How many were taken.
            full: The ranks at the start.
            now: The ranks in use.
            choose: Gives the ranks to end with, judged by the model as it is now.
        """

    @abstractmethod
    def strength(self, step: int) -> float:
        """The sparsity strength in the step after this many, as a share of its full weight."""

    @property
    @abstractmethod
    def pending(self) -> int | None:
        """The step of the last change that is still to come; None if all were made."""


@dataclass(kw_only=True)
class FallToBudget(RankPolicy):
    """Ranks are full, then fall to the budget in cuts along a curve, then stay.

    Args:
        start: Share of the run before they begin to fall, in [0, 1].
        end: Share of the run after which they stay, in (0, 1] and not before ``start``.
        shape: Of the fall, see :mod:`~lightning_svd.training.schedules`.
        cuts: In how many they fall.
        ramp: Shape in which the sparsity strength ramps up until ``start``; None for no sparsity penalty at all.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

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
        self.total_steps, self._steps = 1, [1]

    def begin(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._steps = cut_steps(total_steps, self.start, self.end, self.cuts)

    def resume(self, last_change: int) -> None:
        planned = cut_steps(self.total_steps, self.start, self.end, self.cuts)
        self._steps = [step for step in planned if step > last_change]

    def is_due(self, step: int) -> bool:
        return bool(self._steps) and step >= self._steps[0]

    def change(
        self,
        step: int,
        full: Mapping[str, int],
        now: Mapping[str, int],
        choose: Callable[[], Mapping[str, int]],
    ) -> Change:
        final = step >= self._steps[-1]
        progress = step / self.total_steps
        removed = 1.0 if final else removal(progress, self.start, self.end, self.shape)
        wanted = interpolate(full, choose(), removed)
        self._steps = [later for later in self._steps if later > step]
        # Ranks only fall: what was cut has been let go of.
        return Change({name: min(rank, now[name]) for name, rank in wanted.items()}, final)

    def strength(self, step: int) -> float:
        return strength(step / self.total_steps, self.start, self.end, self.ramp) if self.ramp else 0.0

    @property
    def pending(self) -> int | None:
        return self._steps[-1] if self._steps else None


@dataclass(kw_only=True)
class Finetune(FallToBudget):
    """For a trained net: one cut, soon, judged by what the loss feels on data, and no sparsity penalty.

    Until then layers are the dense ones: what Adam does to U, s and V in a few steps of a loss that is small already
    undoes more than a cut. The arguments are those of :class:`FallToBudget`.
    """

    importance = "fisher"
    full_rank_as = "dense"

    start: float = 0.0
    end: float = 0.02
    cuts: int = 1
    ramp: str | None = None


SCHEDULES: dict[str, type[RankPolicy]] = {"fall": FallToBudget, "finetune": Finetune}
