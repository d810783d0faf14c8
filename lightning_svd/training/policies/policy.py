"""The interface of what decides which ranks are used when: ``RankPolicy``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Protocol

from lightning_svd.arguments import shown
from lightning_svd.ranks.importance import Importance
from lightning_svd.training.distillation import Distillation
from lightning_svd.training.schedules import strength
from lightning_svd.wording import few

ChooseRanks = Callable[..., dict[str, int]]  # (what each rank carries, the cost, another share of it) -> ranks


class Choose(Protocol):
    """A function that gives each layer's rank within a budget, judged by the model as it is now."""

    def __call__(self, relief: float = 0.0) -> Mapping[str, int]:
        """The ranks to end with, or those of a larger budget.

        Args:
            relief: How far from the target to the whole, in [0, 1] and in logarithms: a budget of ``target ** (1 -
                relief)``.
        """


@dataclass(frozen=True)
class Change:
    """A change of ranks that a schedule asks for.

    Attributes:
        ranks: The rank that each layer is to use.
        final: Whether ranks are final, so that layers can train as what they are going to be.
        may_return: Whether ranks that are not used now may be used again, so that their vectors stay stored. Ranks
            that return have the vectors that they had, s = 0, so that the model computes what it did, and no momentum.
        ladder: Ranks that single steps may use from now on, see
            :meth:`~lightning_svd.RankPolicy.rung`.
    """

    ranks: Mapping[str, int]
    final: bool
    may_return: bool = False
    ladder: tuple[Mapping[str, int], ...] = ()


class RankPolicy(ABC):
    """The interface of a schedule: after which optimizer steps ranks change, and to what.

    Attributes:
        importance: What the ranks of a budget are judged by where the user does not say it.
        full_rank_as: What layers are trained as before the first change where the user does not say it.
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

    def judges(self, step: int) -> bool:
        """Whether what is due after this many steps depends on what ranks carry, which takes an SVD of each layer.

        If not, factors stay as they are trained, and ``choose`` is not to be called.
        """
        return True

    @abstractmethod
    def change(
        self,
        step: int,
        full: Mapping[str, int],
        now: Mapping[str, int],
        choose: Choose,
    ) -> Change:
        """What is to change after this many steps.

        Args:
            step: How many were taken.
            full: The ranks at the start.
            now: The ranks in use.
            choose: Gives the ranks to end with, judged by the model as it is now; or those of a larger budget.
        """

    def rung(self, step: int) -> int | None:
        """Which ranks of the ladder the step after this many uses, in all of its passes; None for those in use.

        It must be a function of the number alone: each process asks for itself.
        """
        return None

    @property
    def teaches(self) -> bool | Distillation:
        """Whether, and how, a step with ranks of the ladder is taught by the model with those in use."""
        return False

    def check(self, importance: Importance, choose_ranks: ChooseRanks) -> None:  # noqa: B027 - most refuse nothing
        """Refuse what ranks are judged by, or chosen by, if it does not fit.

        Raises:
            ValueError: Naming the argument.
        """

    @abstractmethod
    def strength(self, step: int) -> float:
        """The sparsity strength in the step after this many, as a share of its full weight."""

    @property
    @abstractmethod
    def pending(self) -> int | None:
        """The step of the last change that is still to come; None if all were made."""

    def may_pause(self, step: int) -> bool:
        """Whether a metric that has fallen by this step may halt the policy until it has recovered."""
        return self.pending is not None


class PlannedPolicy(RankPolicy):
    """A policy that knows when a run begins after which steps it is going to change something.

    Attributes:
        total_steps: Of the run.
        left: The steps after which changes are to come, ascending.
    """

    @abstractmethod
    def plan(self, total_steps: int) -> Iterable[int]:
        """After which optimizer steps of a run of this many something changes, ascending."""

    def begin(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self.resume(0)

    def resume(self, last_change: int) -> None:
        self.left = [step for step in self.plan(self.total_steps) if step > last_change]

    def is_due(self, step: int) -> bool:
        return bool(self.left) and step >= self.left[0]

    @property
    def pending(self) -> int | None:
        return self.left[-1] if self.left else None

    def ramped(self, step: int, start: float, end: float, ramp: str | None) -> float:
        """A :func:`~lightning_svd.training.schedules.strength` over shares of the run; 0 without a ramp."""
        return strength(step / self.total_steps, start, end, ramp) if ramp else 0.0


def checked(choose: ChooseRanks, layers: Callable[[], Mapping[str, int]]) -> ChooseRanks:
    """Ranks of the user's own choice, where each layer has one that it can have.

    Args:
        choose: The choice.
        layers: Gives the ranks that layers began with.

    Raises:
        ValueError: From what is returned, naming the layer.
    """

    def chosen(*given: Any) -> dict[str, int]:
        full, ranks = layers(), choose(*given)
        if not isinstance(ranks, Mapping) or ranks.keys() != full.keys():
            raise ValueError(f"`choose_ranks` must give a rank for each of {few([*full])}, got {shown(ranks)}")
        for name, rank in ranks.items():
            if not _is_whole(rank) or not 1 <= rank <= full[name]:
                raise ValueError(f"`choose_ranks` must give `{name}` a rank from 1 to {full[name]}, got {shown(rank)}")
        return {name: int(rank) for name, rank in ranks.items()}

    return chosen


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
