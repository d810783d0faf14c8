"""What a run is asked for: which layers, how far and when, with which regularizers."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal

from torch import Tensor, nn

from lightning_svd.arguments import (
    check_choice,
    check_count,
    check_flag,
    check_path,
    check_rank_pattern,
    check_share,
    check_targets,
    shown,
)
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.views import CONV_MODES
from lightning_svd.model.calls import Call
from lightning_svd.model.plan import LayerPlan, Targets, large_left_alone, plan, read_plan
from lightning_svd.model.timing import Timing, kernel_width, profile_calls
from lightning_svd.ranks.allocation import keep_by_budget, keep_by_energy, share_above, smallest_cost
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.ranks.importance import IMPORTANCES, Importance
from lightning_svd.ranks.latency import LatencyTable
from lightning_svd.training.distillation import Distillation
from lightning_svd.training.policies import SCHEDULES, RankPolicy
from lightning_svd.training.regularizers import SPARSITY, Regularizer

DEFAULT_TARGET_MACS = 0.5
FINAL = ("factored", "dense", "decomposed")
Target = Literal["macs", "params", "latency", "energy"]
# What only the callback takes, which has a Trainer to ask.
OF_CALLBACK = ("monitor", "mode", "max_metric_drop", "log_every_n_steps", "log_spectrum_every_n_epochs")
TARGETS: dict[str, Target] = {
    "target_macs": "macs",
    "target_params": "params",
    "target_latency": "latency",
    "energy_threshold": "energy",
}


@dataclass
class Recipe:
    """The arguments of a run that do not need Lightning: which layers, how far, when, and by which measure.

    Give at most one of ``target_macs``, ``target_params``, ``target_latency`` and ``energy_threshold``; without one it
    is ``target_macs=0.5``. The page on arguments says when to change which.

    Args:
        target_modules: The layers that are factorized: names, types or patterns; None for all that can be.
        exclude_modules: Those that are not, likewise.
        conv_mode: How a convolution's kernel is seen as a matrix: "channel", "spatial" or "auto".
        rank_pattern: Pattern of a layer's name -> the most ranks that it may end with.
        plan_file: A YAML file that says for each layer whether, and how, it is factorized.
        target_macs: Share of the dense model's multiply-accumulates to keep, in (0, 1].
        target_params: Share of its parameters to keep.
        target_latency: Share of its measured time to keep.
        latency_table: Where the times of ``target_latency`` come from: a file or a table made on the target machine, or
            how to measure here; None measures with a training batch.
        energy_threshold: Share of its energy that each layer keeps, in the place of a budget (the paper's criterion).
        schedule: When ranks change: "fall", "finetune", "alternating", "grow_and_prune", "nested" or an object.
        full_rank_as: What layers train as before the first cut: "svd", "dense", or "auto" for the schedule's own.
        importance: What a rank is worth: "spectrum", "outputs", "fisher" or an object. "auto" is "fisher" for a budget
            with "fall", "finetune" and "grow_and_prune", and "spectrum" otherwise.
        min_rank: The fewest ranks that a layer may end with.
        round_to: What ranks are multiples of; "auto" for what the device's kernels compute at once.
        regularizer: The sparsity penalty: "hoyer", "hoyer_square", "l1", "group_lasso", None for none, or a
            ``Regularizer``.
        measure_latency: Whether layers are timed at the end, and become dense again where factors are no faster.
        final: What the model is made of at the end: "factored" (two plain layers), "dense", or "decomposed" (U, s, V).
        distill: Whether the dense model teaches, True, False or a ``Distillation``.

    Raises:
        ValueError: If one is out of range; the message names it.
    """

    target_modules: Targets = None
    exclude_modules: Targets = None
    conv_mode: str = "channel"
    rank_pattern: Mapping[str, int] | None = None
    plan_file: str | None = None
    target_macs: float | None = None
    target_params: float | None = None
    target_latency: float | None = None
    # The last is what a command line tries last, which can make one of anything.
    latency_table: Timing | LatencyTable | str | os.PathLike[str] | None = None
    energy_threshold: float | None = None
    schedule: str | RankPolicy = "fall"
    full_rank_as: str = "auto"
    importance: str | Importance = "auto"
    min_rank: int = 1
    round_to: int | str = 1
    regularizer: str | Regularizer | None = "hoyer"
    measure_latency: bool = False
    final: str = "factored"
    distill: bool | Distillation = False

    def __post_init__(self) -> None:
        check_targets("target_modules", self.target_modules)
        check_targets("exclude_modules", self.exclude_modules)
        check_choice("conv_mode", self.conv_mode, (*CONV_MODES, "auto"))
        check_rank_pattern(self.rank_pattern)
        check_count("min_rank", self.min_rank)
        if not (isinstance(self.round_to, str) and self.round_to == "auto"):
            check_count("round_to", self.round_to, other='"auto"')
        check_path("plan_file", self.plan_file)
        chosen = (self.target_modules, self.exclude_modules, self.conv_mode, self.rank_pattern)
        if self.plan_file is not None and chosen != (None, None, "channel", None):
            raise ValueError(
                "give either `plan_file`, which says it for each layer, or `target_modules`, `exclude_modules`, "
                "`conv_mode`, `rank_pattern`"
            )
        for pattern, rank in (self.rank_pattern or {}).items():
            if rank < self.min_rank:
                raise ValueError(
                    f"`rank_pattern[{shown(pattern)}]` must be >= `min_rank` ({self.min_rank!r}), got {rank!r}"
                )
        check_choice("schedule", self.schedule, SCHEDULES, RankPolicy)
        check_choice("full_rank_as", self.full_rank_as, ("auto", "svd", "dense"))
        check_choice("importance", self.importance, ("auto", *IMPORTANCES), Importance)
        check_choice("regularizer", self.regularizer, (*SPARSITY, None), Regularizer)
        check_flag("measure_latency", self.measure_latency)
        check_choice("final", self.final, FINAL)
        if not isinstance(self.distill, (bool, Distillation)):
            raise ValueError(f"`distill` must be True, False or a Distillation, got {shown(self.distill)}")
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        for name, value in given.items():
            check_share(name, value)
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(f'`{name}`' for name in TARGETS)}, got {', '.join(given)}")
        if not given:
            self.target_macs = DEFAULT_TARGET_MACS
        if not isinstance(self.latency_table, (LatencyTable, Timing)):
            check_path("latency_table", self.latency_table)
        if self.latency_table is not None and self.target_latency is None:
            raise ValueError("`latency_table` is for a budget of time: give `target_latency` too")

    @property
    def arguments(self) -> dict[str, Any]:
        """Its fields by name, for reports and loggers: an object as a dict of its class and its own arguments."""
        return {field.name: _described(getattr(self, field.name)) for field in fields(self)}

    @property
    def target(self) -> tuple[Target, float]:
        """What is to be kept, and which share of it."""
        return next(
            (kind, float(value)) for name, kind in TARGETS.items() if (value := getattr(self, name)) is not None
        )

    def policy(self) -> RankPolicy:
        """Which ranks when, in one run: a policy keeps where it is, and what the user gave serves many runs."""
        return copy.deepcopy(self.schedule) if isinstance(self.schedule, RankPolicy) else SCHEDULES[self.schedule]()

    def begins_dense(self) -> bool:
        """Whether layers train their dense weights until the first cut; "auto" leaves it to the schedule."""
        return (self.policy().full_rank_as if self.full_rank_as == "auto" else self.full_rank_as) == "dense"

    def regularization(self) -> Regularizer:
        """What the factors are regularized by."""
        return self.regularizer if isinstance(self.regularizer, Regularizer) else Regularizer(self.regularizer)

    def measure(self) -> Importance:
        """What a rank carries; "auto" leaves it to the schedule, but where each layer keeps a share of its energy."""
        if isinstance(self.importance, Importance):
            return self.importance
        if self.importance != "auto":
            return IMPORTANCES[self.importance]()
        return IMPORTANCES["spectrum" if self.target[0] == "energy" else self.policy().importance]()

    def plan(self, model: nn.Module, include_frozen: bool = False) -> list[LayerPlan]:
        """Which layers are factorized.

        Raises:
            ValueError: If the arguments do not fit the model.
        """
        if self.plan_file is not None:
            plans = read_plan(self.plan_file, model)
            for of in plans:
                if of.max_rank is not None and of.max_rank < self.min_rank:
                    raise ValueError(
                        f"{self.plan_file}: `{of.name}`: `max_rank` must be >= `min_rank` ({self.min_rank!r}), got "
                        f"{of.max_rank!r}"
                    )
        else:
            plans = plan(
                model, self.target_modules, self.exclude_modules, self.conv_mode, self.rank_pattern, include_frozen
            )
        lookups = [layer.name for layer in plans if layer.kind == "Embedding" and not layer.skipped]
        if lookups and self.target[0] in ("macs", "latency"):
            what = "MACs" if self.target[0] == "macs" else "time to speak of"
            raise ValueError(
                f"`{lookups[0]}` is an Embedding, whose lookups cost no {what}: give `target_params` or "
                "`energy_threshold`, or leave it out"
            )
        return plans

    def bounds(self, plans: list[LayerPlan], model: nn.Module) -> dict[str, Any]:
        """What ranks a layer may have."""
        round_to = self.round_to
        if round_to == "auto":
            round_to = 1 if self.target[0] == "latency" else kernel_width(model)  # time says it by itself
        most = {layer.name: layer.max_rank for layer in plans if layer.max_rank is not None}
        return {"min_rank": self.min_rank, "round_to": round_to, "max_ranks": most}

    def choose_ranks(
        self, energies: dict[str, Tensor], cost: ModelCost, bounds: Mapping[str, Any], share: float | None = None
    ) -> dict[str, int]:
        """The ranks to end with, or at another share than the target's: those that carry most for the budget."""
        kind, target = self.target
        share = target if share is None else share
        if kind == "energy":
            return keep_by_energy(energies, cost.by("params"), share, **bounds)
        priced = cost.by(kind)
        return keep_by_budget(energies, priced, priced.budget(share), adds_up=self.measure().adds_up, **bounds)

    @property
    def timing(self) -> Timing | None:
        """How latencies are to be measured in the run itself; None where they are not, or are in a table already."""
        if self.target[0] != "latency" or not isinstance(self.latency_table, (Timing, NoneType)):
            return None
        return self.latency_table or Timing()

    def timed(
        self,
        cost: ModelCost,
        model: nn.Module,
        layers: Mapping[str, SVDLayer],
        plans: Sequence[LayerPlan],
        calls: Sequence[Call],
    ) -> ModelCost:
        """The cost with latencies, those of the table or measured now, if they are what the budget is of.

        Args:
            cost: Counted.
            model: The whole tree.
            layers: Its factorized layers by name.
            plans: Of its layers.
            calls: Of modules in it.

        Raises:
            ValueError: If the table cannot be read or is of another model, or the model cannot be measured.
        """
        if self.target[0] != "latency":
            return cost
        if self.timing:
            table, source = profile_calls(model, plans, calls, self.timing), "the one that was measured"
        elif isinstance(self.latency_table, LatencyTable):
            table, source = self.latency_table, "the table"
        else:
            table, source = LatencyTable.load(str(self.latency_table)), str(self.latency_table)
        return table.applied(cost, {name: layer.view for name, layer in layers.items()}, source)

    def check_reachable(
        self, cost: ModelCost, full_ranks: Mapping[str, int], bounds: Mapping[str, Any], plans: Sequence[LayerPlan] = ()
    ) -> None:
        """Refuse a budget that no ranks can meet.

        Args:
            cost: Of the model.
            full_ranks: Of the layers that are factorized.
            bounds: What ranks they may have.
            plans: What became of each layer, to say what is left alone.

        Raises:
            ValueError: Saying what could be met.
        """
        kind, share = self.target
        if kind == "energy":
            return
        if kind != "params" and not cost.dense("macs"):
            raise ValueError(f"`target_{kind}`: the first forward pass used no layer whose MACs could be counted")
        priced = cost.by(kind)
        least = priced.share(smallest_cost(priced, full_ranks, **bounds))
        if least > share:
            what = "time" if kind == "latency" else "cost"
            raise ValueError(
                f"`target_{kind}` must be at least {share_above(least)} for this model, its {what} when every "
                f"factorized layer keeps its fewest ranks, got {share!r}{self._rest(plans, cost)}"
            )

    def _rest(self, plans: Sequence[LayerPlan], cost: ModelCost) -> str:
        """What of the model is left alone, for whom a budget is refused."""
        costly = [of for of in plans if of.kind != "Embedding" or self.target[0] != "macs"]
        rest = large_left_alone(costly, cost.dense("params"))
        return f"; left alone are {rest}" if rest else ""


def recipe_of(owner: Callable[..., Any], arguments: Mapping[str, Any]) -> Recipe:
    """The recipe of what a function or class was given by keyword beside its own arguments.

    Raises:
        TypeError: If one of them is no field of a recipe; the message names it, and what may have been meant.
        ValueError: If one is out of range.
    """
    known = {field.name for field in fields(Recipe)}
    own = known | {*inspect.signature(owner).parameters} - {"arguments", "recipe", "layers"}
    for name in arguments:
        if name in known:
            continue
        hint = ""
        if name in OF_CALLBACK:
            hint = ": it is one of SVDTrainingCallback"
        elif meant := difflib.get_close_matches(name, sorted(own), n=1):
            hint = f": did you mean `{meant[0]}`?"
        raise TypeError(f"{owner.__name__} has no argument `{name}`{hint}")
    return Recipe(**arguments)


def _described(value: Any) -> Any:
    if isinstance(value, LatencyTable):
        return dict(value.whole.conditions)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, (Distillation, Importance, RankPolicy, Regularizer, Timing)):
        return value
    own = [name for name in inspect.signature(type(value)).parameters if name in vars(value)]
    return {"class": type(value).__name__} | {name: _described(vars(value)[name]) for name in own}
