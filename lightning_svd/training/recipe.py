"""What a run is asked for: which layers, how far and when, with which regularizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_svd.arguments import (
    check_choice,
    check_count,
    check_flag,
    check_rank_pattern,
    check_share,
    check_targets,
    check_weight,
)
from lightning_svd.layers.views import CONV_MODES
from lightning_svd.model.plan import LayerPlan, Targets, plan, read_plan
from lightning_svd.ranks.allocation import keep_by_budget, keep_by_energy, share_above, smallest_cost
from lightning_svd.ranks.costs import ModelCost, Unit
from lightning_svd.ranks.importance import Importance, Spectrum
from lightning_svd.training.distillation import Distillation
from lightning_svd.training.policies import FallToBudget, RankPolicy
from lightning_svd.training.regularizers import SPARSITY
from lightning_svd.training.schedules import SHAPES

# Strengths at which each penalty helps a falling budget without doing the pruning alone.
SPARSITY_WEIGHTS = {"hoyer": 2e-3, "hoyer_square": 2e-4, "l1": 5e-4, None: 0.0}
DEFAULT_TARGET_MACS = 0.5
FINAL = ("factored", "dense", "decomposed")
Target = Literal["macs", "params", "energy"]
TARGETS: dict[str, Target] = {"target_macs": "macs", "target_params": "params", "energy_threshold": "energy"}


@dataclass
class Recipe:
    """The arguments of a run that do not need Lightning; what each is for, says ``SVDTrainingCallback``.

    Raises:
        ValueError: If one is out of range; the message names it.
    """

    target_modules: Targets = None
    exclude_modules: Targets = None
    conv_mode: str = "channel"
    rank_pattern: Mapping[str, int] | None = None
    plan_file: str | None = None
    orthogonality_weight: float = 1.0
    sparsity: str | None = "hoyer"
    sparsity_weight: float | None = None
    sparsity_schedule: str = "linear"
    target_macs: float | None = None
    target_params: float | None = None
    energy_threshold: float | None = None
    sparsify_start: float = 0.5
    sparsify_end: float = 0.7
    full_rank_as: str = "svd"
    budget_schedule: str = "cubic"
    rank_updates: int = 20
    min_rank: int = 1
    round_to: int = 1
    measure_latency: bool = False
    final: str = "factored"
    importance: str | Importance = "spectrum"
    schedule: str | RankPolicy = "fall"
    distill: bool | Distillation = False

    def __post_init__(self) -> None:
        check_targets("target_modules", self.target_modules)
        check_targets("exclude_modules", self.exclude_modules)
        check_choice("conv_mode", self.conv_mode, (*CONV_MODES, "auto"))
        check_rank_pattern(self.rank_pattern)
        chosen = (self.target_modules, self.exclude_modules, self.conv_mode, self.rank_pattern)
        if self.plan_file is not None and chosen != (None, None, "channel", None):
            raise ValueError(
                "give either `plan_file`, which says it for each layer, or `target_modules`, `exclude_modules`, "
                "`conv_mode`, `rank_pattern`"
            )
        check_weight("orthogonality_weight", self.orthogonality_weight)
        check_choice("sparsity", self.sparsity, (*SPARSITY, None))
        if self.sparsity_weight is None:
            self.sparsity_weight = SPARSITY_WEIGHTS[self.sparsity]
        check_weight("sparsity_weight", self.sparsity_weight)
        check_choice("sparsity_schedule", self.sparsity_schedule, SHAPES)
        check_share("sparsify_start", self.sparsify_start, zero=True)
        check_share("sparsify_end", self.sparsify_end)
        if self.sparsify_start > self.sparsify_end:
            raise ValueError(
                f"`sparsify_start` must be <= `sparsify_end` ({self.sparsify_end!r}), got {self.sparsify_start!r}"
            )
        check_choice("full_rank_as", self.full_rank_as, ("svd", "dense"))
        check_choice("budget_schedule", self.budget_schedule, SHAPES)
        check_count("rank_updates", self.rank_updates, most=1_000_000)
        check_count("min_rank", self.min_rank)
        check_count("round_to", self.round_to)
        check_flag("measure_latency", self.measure_latency)
        check_choice("final", self.final, FINAL)
        if not isinstance(self.importance, Importance):
            check_choice("importance", self.importance, ("spectrum",))
        if not isinstance(self.schedule, RankPolicy):
            check_choice("schedule", self.schedule, ("fall",))
        if not isinstance(self.distill, (bool, Distillation)):
            raise ValueError(f"`distill` must be True, False or a Distillation, got {self.distill!r}")
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name) is not None}
        for name, value in given.items():
            check_share(name, value)
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(f'`{name}`' for name in TARGETS)}, got {', '.join(given)}")
        if not given:
            self.target_macs = DEFAULT_TARGET_MACS

    @property
    def target(self) -> tuple[Target, float]:
        """What is to be kept, and which share of it."""
        return next(
            (kind, float(value)) for name, kind in TARGETS.items() if (value := getattr(self, name)) is not None
        )

    def policy(self) -> RankPolicy:
        """Which ranks when."""
        if isinstance(self.schedule, RankPolicy):
            return self.schedule
        return FallToBudget(
            self.sparsify_start, self.sparsify_end, self.budget_schedule, self.rank_updates, self.sparsity_schedule
        )

    def measure(self) -> Importance:
        """What a rank carries."""
        return self.importance if isinstance(self.importance, Importance) else Spectrum()

    def plan(self, model: nn.Module, include_frozen: bool = False) -> list[LayerPlan]:
        """Which layers are factorized.

        Raises:
            ValueError: If the arguments do not fit the model.
        """
        if self.plan_file is not None:
            plans = read_plan(self.plan_file, model)
        else:
            plans = plan(
                model, self.target_modules, self.exclude_modules, self.conv_mode, self.rank_pattern, include_frozen
            )
        lookups = [layer.name for layer in plans if layer.kind == "Embedding" and not layer.skipped]
        if lookups and self.target[0] == "macs":
            raise ValueError(
                f"`{lookups[0]}` is an Embedding, whose lookups cost no MACs: give `target_params` or "
                "`energy_threshold`, or leave it out"
            )
        return plans

    def bounds(self, plans: list[LayerPlan]) -> dict[str, Any]:
        """What ranks a layer may have."""
        most = {layer.name: layer.max_rank for layer in plans if layer.max_rank is not None}
        return {"min_rank": self.min_rank, "round_to": self.round_to, "max_ranks": most}

    def choose_ranks(self, energies: dict[str, Tensor], cost: ModelCost, bounds: Mapping[str, Any]) -> dict[str, int]:
        """The ranks to end with: those that carry most for the budget."""
        kind, share = self.target
        if kind == "energy":
            return keep_by_energy(energies, cost.by("params"), share, **bounds)
        return keep_by_budget(energies, cost.by(kind), share * cost.dense(kind), **bounds)

    def check_reachable(self, cost: ModelCost, full_ranks: Mapping[str, int], bounds: Mapping[str, Any]) -> None:
        """Refuse a budget that no ranks can meet.

        Raises:
            ValueError: Saying what could be met.
        """
        kind, share = self.target
        if kind == "energy":
            return
        unit: Unit = kind
        if not cost.dense(unit):
            raise ValueError("`target_macs`: the first forward pass used no layer whose MACs could be counted")
        least = smallest_cost(cost.by(unit), full_ranks, **bounds) / cost.dense(unit)
        if least > share:
            raise ValueError(
                f"`target_{unit}` must be at least {share_above(least)} for this model, its cost when every "
                f"factorized layer keeps its fewest ranks, got {share!r}"
            )
