"""The state of one training run in factorised form; knows no Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_svd.costs import CostMeter, LayerCost, ModelCost, Unit
from lightning_svd.factorization import Factors
from lightning_svd.guard import MetricGuard
from lightning_svd.layers import SVDLayer
from lightning_svd.optimizers import OptimizerOfFactors, forget, forget_pruned, merge_factors
from lightning_svd.ranks import interpolate, strongest
from lightning_svd.regularizers import Penalties
from lightning_svd.report import RankChange

ChooseRanks = Callable[[dict[str, Tensor], ModelCost], dict[str, int]]


@dataclass
class SVDRun:
    """One run: its layers, how far it is, and what happened.

    Attributes:
        layers: The factorised layers by name.
        dense_weights: By name the parameters that the model had and has no longer, to undo a run exactly; empty once it
            has stepped.
        total_steps: Optimizer steps of the whole run.
        cuts: When ranks are still to be cut by the :meth:`clock`, ascending.
        cost: Of the model; None until a forward pass was counted.
        penalties: The regularisers' values in the last step.
        strength: The sparsity weight in the last step.
        timeline: Every rank change so far.
        strengths: (step, sparsity weight) about a hundred times in the run.
        warnings: What the user should know at the end.
        batch: The present batch, while its forward pass is counted.
        backwards: Backward passes since the last optimizer step.
        guard: What watches the user's metric; None if there is none to watch.
        last_cut: The :meth:`clock` at the last cut.
    """

    layers: dict[str, SVDLayer]
    dense_weights: dict[str, nn.Parameter]
    total_steps: int = 0
    cuts: list[int] = field(default_factory=list)
    cost: ModelCost | None = None
    penalties: Penalties | None = None
    strength: float = 0.0
    timeline: list[RankChange] = field(default_factory=list)
    strengths: list[tuple[int, float]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    batch: Any = None
    backwards: int = 0
    guard: MetricGuard | None = None
    last_cut: int = 0
    _meter: CostMeter | None = None
    _optimizers: dict[int, OptimizerOfFactors] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spectra_before = self.spectra()

    @cached_property
    def full_ranks(self) -> dict[str, int]:
        """The rank that each layer has room for."""
        return {name: layer.full_rank for name, layer in self.layers.items()}

    def ranks(self) -> dict[str, int]:
        """The rank that each layer keeps."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def spectra(self) -> dict[str, list[float]]:
        """The kept singular values of each layer, magnitudes in descending order."""
        return {name: layer.spectrum() for name, layer in self.layers.items()}

    # What a forward pass costs is read off the first one that happens, whichever it is.

    def watch_costs(self, module: nn.Module) -> None:
        """Begin to count a forward pass of ``module``, unless one was counted."""
        if self.cost is None and self._meter is None:
            self._meter = CostMeter(module)
            self._meter.__enter__()

    def stop_watching(self, batch_size: int) -> bool:
        """End the counting; True if costs are known by it."""
        if self._meter is None:
            return False
        self._meter.__exit__()
        self.cost, self._meter = self._meter.cost(batch_size), None
        return True

    # Optimizers

    def adopt(self, optimizers: Sequence[Optimizer]) -> None:
        """Keep these optimizers' weight decay off U and V from now on."""
        self._optimizers = {
            id(optimizer): OptimizerOfFactors(optimizer, self.layers.values()) for optimizer in optimizers
        }

    def optimizer(self, optimizer: Optimizer) -> OptimizerOfFactors:
        """What an adopted optimizer is to the factors."""
        return self._optimizers[id(optimizer)]

    def begin_batch(self, batch: Any, module: nn.Module) -> None:
        """A batch begins, in which every step must be announced."""
        self.batch = batch
        self.watch_costs(module)
        for optimizer in self._optimizers.values():
            optimizer.must_split = True

    def end_batch(self) -> None:
        """A batch is over; the user's parameter groups are whole, where a step was skipped too."""
        self.batch = None
        for optimizer in self._optimizers.values():
            optimizer.merge()
            optimizer.must_split = False

    def close(self) -> None:
        """Let go of the model and the optimizers, whatever state the run is in."""
        self.stop_watching(1)
        for optimizer in self._optimizers.values():
            optimizer.remove()

    # Ranks

    @property
    def paused(self) -> bool:
        """Whether ranks must not fall now."""
        return self.guard is not None and self.guard.paused

    @property
    def regularised(self) -> bool:
        """Whether any layer has penalties now."""
        return any(layer.trained_as == "svd" for layer in self.layers.values())

    def clock(self, step: int) -> int:
        """Where the schedule of ranks and strengths stands after this step: it stands still in pauses."""
        return step - (self.guard.steps_paused(step) if self.guard else 0)

    def refactorised(self) -> dict[str, Factors]:
        """The exact SVD at its rank of each layer that was trained, on the CPU, for processes to agree on."""
        trained = {name: layer for name, layer in self.layers.items() if layer.trained or layer.trained_as == "dense"}
        exact = {name: layer.refactorised(name) for name, layer in trained.items()}
        return {name: Factors(*(factor.cpu() for factor in factors)) for name, factors in exact.items()}

    def set_factors(self, factors: Mapping[str, Factors], optimizers: Sequence[Optimizer]) -> None:
        """Take these factors, in which each layer computes what it did.

        Args:
            factors: By the layers' names.
            optimizers: Those whose memory of a layer that was trained as a dense one is cleared.
        """
        for name, exact in factors.items():
            if self.layers[name].trained_as == "dense":
                forget(optimizers, self.layers[name])
            self.layers[name].set_factors(exact)

    def train_as_dense(self) -> None:
        """Train layers as the dense ones that they were, until factors are set."""
        for layer in self.layers.values():
            if layer.trained:
                layer.join()

    def choose_masks(self, removed: float, choose_ranks: ChooseRanks) -> dict[str, Tensor]:
        """The ranks to keep, on the way to what ``choose_ranks`` says now; changes nothing.

        Args:
            removed: Share of the ranks to remove that are to be gone, in [0, 1].
            choose_ranks: From what each rank carries, dropped ones as they were then, and the model's cost to the
                ranks to end with.

        Returns:
            Layer name -> boolean mask (r,) on the CPU.
        """
        assert self.cost is not None
        energies = {name: layer.energies().cpu() for name, layer in self.layers.items()}
        ranks = interpolate(self.full_ranks, choose_ranks(energies, self.cost), removed)
        masks = {}
        for name, layer in self.layers.items():
            # Kept ranks go first; dropped ones come back only where a layer gets more room than it had.
            shares = energies[name].double() / energies[name].max().clamp_min(torch.finfo(torch.float32).tiny)
            masks[name] = strongest(shares + 2.0 * layer.kept_mask().cpu(), ranks[name])
        return masks

    def cut(
        self, step: int, epoch: int, masks: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
    ) -> RankChange | None:
        """Keep these ranks; None if that changes no layer's rank.

        Args:
            step: Steps so far.
            epoch: Current epoch.
            masks: Layer name -> boolean mask (r,).
            optimizers: Those whose memory of the pruned ranks is cleared.
        """
        before = self.ranks()
        for name, layer in self.layers.items():
            layer.keep(masks[name].to(layer.mask.device))
        forget_pruned(optimizers, self.layers.values())
        self.last_cut = self.clock(step)
        self.cuts = [later for later in self.cuts if later > self.last_cut]
        if self.ranks() == before:
            return None
        change = RankChange(step, epoch, self.ranks(), self.ratio("macs"), self.ratio("params"))
        self.timeline.append(change)
        return change

    def train_as_pairs(self, optimizers: Sequence[Optimizer]) -> None:
        """From now on train layers as the two plain layers that they are going to be: without s and penalties."""
        assert self.cost is not None
        merge_factors(
            optimizers, [layer for name, layer in self.layers.items() if self.cost.layers[name].pays(layer.rank)]
        )
        self.penalties = None

    def history(self) -> dict[str, Any]:
        """What happened, as fields of a report."""
        happened: dict[str, Any] = {
            "timeline": tuple(self.timeline),
            "warnings": tuple(self.warnings),
            "strengths": tuple(self.strengths),
        }
        if self.guard:
            happened |= {"metric": self.guard.monitor, "metric_values": tuple(self.guard.values)}
            happened |= {"pauses": tuple(self.guard.pauses)}
        return happened

    def set_strength(self, step: int, strength: float) -> None:
        """The sparsity weight of the step that follows ``step`` others; remembered now and then for the report."""
        self.strength = strength
        if step % max(1, self.total_steps // 100) == 0 and (not self.strengths or self.strengths[-1][0] < step):
            self.strengths.append((step, strength))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the factors: numbers, strings, lists and dicts."""
        return {
            "last_cut": self.last_cut,
            "trained_as": {name: layer.trained_as for name, layer in self.layers.items()},
            "timeline": [asdict(change) for change in self.timeline],
            "strengths": list(self.strengths),
            "warnings": list(self.warnings),
            "spectra_before": self.spectra_before,
            "cost": asdict(self.cost) if self.cost else None,
            "guard": self.guard.state_dict() if self.guard else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.last_cut = state["last_cut"]
        for name, form in state["trained_as"].items():
            self.layers[name].trained_as = form
        self.timeline = [RankChange(**change) for change in state["timeline"]]
        self.strengths = [(step, strength) for step, strength in state["strengths"]]
        self.warnings = list(state["warnings"])
        self.spectra_before = state["spectra_before"]
        if self.guard and state["guard"]:
            self.guard.load_state_dict(state["guard"])
        if state["cost"]:
            layers = {name: LayerCost(**cost) for name, cost in state["cost"]["layers"].items()}
            self.cost = ModelCost(**(state["cost"] | {"layers": layers}))

    def ratio(self, unit: Unit) -> float:
        """Share of the dense model's cost at the present ranks."""
        return self.cost.ratio(self.ranks(), unit) if self.cost else 1.0

    def rank_ratio(self) -> float:
        """Share of all ranks that is kept."""
        return sum(self.ranks().values()) / sum(self.full_ranks.values())
