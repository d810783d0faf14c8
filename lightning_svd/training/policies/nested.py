"""Train once, choose the budget at deployment: steps in turn use the ranks of many budgets."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_svd.arguments import check_choice, check_count, check_share, shown
from lightning_svd.ranks.importance import Importance, OnData
from lightning_svd.training.distillation import Distillation
from lightning_svd.training.policies.policy import Change, Choose, ChooseRanks, PlannedPolicy
from lightning_svd.training.schedules import SHAPES, cut_steps


@dataclass(kw_only=True)
class Nested(PlannedPolicy):
    """Layers keep every rank, and are trained so that their strongest ones alone are a good model at any budget.

    After Maestro (Horvath et al. 2023, arXiv 2308.14929) and FlexRank (arXiv 2602.02680): now and then factors are made
    exact, the strongest ranks first, and a ladder of budgets is turned into ranks, evenly spread in their logarithm
    from the target up. A share of the steps uses the ranks of one rung, drawn at random, in all layers: the very nets
    that are going to be deployed are trained, one inside the other. The run ends with a dense model, which
    :func:`~lightning_svd.to_factored` makes small at any budget without training, and
    :func:`~lightning_svd.compress` by the loss of a few batches.

    Args:
        budgets: How many rungs the ladder has; all ranks are one rung more.
        start: Share of the run before the first ladder, in [0, 1), in which all steps use all ranks.
        share: Share of the steps from then on that use the ranks of a rung, in [0, 1]; the others use all ranks, and
            are what running statistics of batch normalization are of, so that there should be some.
        cuts: How often factors are made exact and ranks are chosen anew, evenly spread over the rest of the run.
        distill: Whether a step with fewer ranks is pulled towards what all ranks put out for the same batch too, which
            takes another forward pass; or a :class:`~lightning_svd.Distillation`, which says how.
        ramp: Shape in which the sparsity strength ramps up until ``start``, to be full until the end; None for no
            sparsity penalty at all.
        seed: Of the draws, which depend on nothing else but the number of the step.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    budgets: int = 8
    start: float = 0.5
    share: float = 0.8
    cuts: int = 5
    distill: bool | Distillation = False
    ramp: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("budgets", self.budgets, most=1000)
        check_share("share", self.share, zero=True)
        check_share("start", self.start, zero=True)
        check_count("cuts", self.cuts, most=1_000_000)
        if not isinstance(self.distill, (bool, Distillation)):
            raise ValueError(f"`distill` must be True, False or a Distillation, got {shown(self.distill)}")
        check_choice("ramp", self.ramp, (*SHAPES, None))
        check_count("seed", self.seed, least=0)
        self.begin(1)

    @property
    def teaches(self) -> bool | Distillation:
        return self.distill

    def check(self, importance: Importance, choose_ranks: ChooseRanks) -> None:
        if isinstance(importance, OnData):
            raise ValueError(
                "`importance` of the schedule Nested must be the layers' own spectra, in whose order ranks are nested, "
                f"got {type(importance).__name__}: give `importance='spectrum'`"
            )
        try:
            inspect.signature(choose_ranks).bind({}, None, 1.0)
        except TypeError:
            raise ValueError(
                "`choose_ranks` must take a third argument for the schedule Nested, the share of the cost that is to "
                "be kept, or None for the target's"
            ) from None

    def plan(self, total_steps: int) -> list[int]:
        return sorted({max(1, round(self.start * total_steps)), *cut_steps(total_steps, self.start, 1.0, self.cuts)})

    def change(self, step: int, full: Mapping[str, int], now: Mapping[str, int], choose: Choose) -> Change:
        self.resume(step)
        return Change(full, False, ladder=tuple(choose(rung / self.budgets) for rung in range(self.budgets)))

    def rung(self, step: int) -> int | None:
        # Of a text: the same in every process, version and machine.
        drawn = random.Random(f"{self.seed} {step}")
        return drawn.randrange(self.budgets) if drawn.random() < self.share else None

    def strength(self, step: int) -> float:
        return self.ramped(step, self.start, 1.0, self.ramp)

    def may_pause(self, step: int) -> bool:
        return step >= self.start * self.total_steps
