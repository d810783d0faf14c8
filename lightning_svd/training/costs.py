"""What a run's model costs: counted from calls that were recorded, and timed where time is the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import nn

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.calls import Call
from lightning_svd.model.checks import FEW, NotTheSameError, has_finite, whole_layers
from lightning_svd.model.counting import count_calls
from lightning_svd.model.plan import LayerPlan, with_reasons
from lightning_svd.model.replay import cut, replay
from lightning_svd.model.timing import beside_dense, corrected
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.training.observation import CannotDrawError, Observer
from lightning_svd.training.recipe import Recipe


class Learned(NamedTuple):
    """What running a batch's calls again has shown.

    Attributes:
        cost: Of the model.
        refused: Why layers cannot become two, by name.
        draws: Whether ranks are judged by targets drawn from the model's own outputs; False where that fails, and was
            not asked for by name.
    """

    cost: ModelCost
    refused: dict[str, str]
    draws: bool


class CostsOfRun:
    """Counts and times a model by running calls of it again, in evaluation; nothing of the run is decided here.

    Args:
        model: What is trained.
        recipe: What is asked for.

    Attributes:
        not_finite: Where NaN or infinity was met instead of numbers to go by.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.recipe = model, recipe
        self.not_finite: list[str] = []
        self._timed: list[Call] = []  # for the final model to be timed as the dense one was

    def learn(
        self,
        layers: Mapping[str, SVDLayer],
        plans: Sequence[LayerPlan],
        bounds: Mapping[str, Any],
        calls: Sequence[Call],
        observer: Observer | None,
    ) -> Learned | None:
        """What is known from then on; None if outputs are NaN, of which everything is the same.

        Args:
            layers: The factorized ones.
            plans: Of all layers.
            bounds: What ranks they may have.
            calls: Of modules in the model, in one batch.
            observer: What collects statistics; it notes nothing here, and is asked whether it could.

        Raises:
            ValueError: If the model cannot be run again, or the budget not be met.
        """
        with observer.resting() if observer is not None else nullcontext():
            try:
                few, inputs = cut(self.model, calls, FEW)
                if not has_finite(replay(self.model, few)):
                    self.not_finite = ["the model's outputs"]
                    return None  # the next batch will show what layers do
                self.not_finite = []
                cost = count_calls(self.model, layers, few, inputs)
                refused = whole_layers(self.model, few, layers) if self.recipe.final == "factored" else {}
            except NotTheSameError:
                raise
            except Exception as error:
                raise ValueError(
                    "the model was run once more in evaluation, to count what it costs and to see which layers can "
                    f"become two, and failed: {type(error).__name__}: {error}"
                ) from error
            cost = self.recipe.timed(cost, self.model, layers, plans, calls)
        if self.recipe.timing:
            self._timed = list(calls)
        draws = True
        if observer is not None:
            try:
                observer.check(few)
            except CannotDrawError:
                if self.recipe.importance != "auto":
                    raise
                draws = False
        cost = cost.without(refused)
        left = {name: layer.full_rank for name, layer in layers.items() if name not in refused}
        self.recipe.check_reachable(cost, left, bounds, with_reasons(plans, refused))
        return Learned(cost, refused, draws)

    def corrected(
        self, cost: ModelCost, plans: Sequence[LayerPlan], choose: Callable[[ModelCost], dict[str, int]]
    ) -> tuple[dict[str, int], ModelCost]:
        """The ranks, and the cost; where this run times its model, ranks of which the whole was measured.

        Args:
            cost: By which they are chosen.
            plans: Of all layers.
            choose: Gives them.
        """
        timing = self.recipe.timing
        if timing is None or not self._timed:
            return choose(cost), cost
        return corrected(self.model, plans, self._timed, timing, cost, self.recipe.target[1], choose)

    def beside_dense(self) -> tuple[float, float] | None:
        """The share of a dense copy's time that the model takes, and the copy's seconds; None if not timed."""
        timing = self.recipe.timing
        return beside_dense(self.model, self._timed, timing) if timing and self._timed else None
