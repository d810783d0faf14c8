"""What layers and models cost, dense and at any rank: multiply-accumulates and parameters, as numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Unit = Literal["macs", "params"]


class Cost(ABC):
    """What a rank costs: a model's cost at any ranks, in one unit, and the ranks that are worth having."""

    @abstractmethod
    def at(self, name: str, rank: int) -> float:
        """Cost of one layer at a rank: in whichever form is better there."""

    @abstractmethod
    def rest(self) -> float:
        """Cost of everything that is not factorized."""

    @abstractmethod
    def dense(self) -> float:
        """Cost of the dense model."""

    @abstractmethod
    def ladder(self, name: str, candidates: int, min_rank: int, round_to: int) -> Iterator[int]:
        """The ranks of a layer that are worth having, ascending.

        Args:
            name: Of the layer.
            candidates: How many ranks there are.
            min_rank: The fewest.
            round_to: Ranks in factored form are multiples of this.
        """

    def total(self, ranks: Mapping[str, int]) -> float:
        """Cost of the model at these ranks, a rank for every factorized layer."""
        return self.rest() + sum(self.at(name, rank) for name, rank in ranks.items())


@dataclass(frozen=True)
class LayerLatency:
    """Measured seconds of one layer for the inputs that were counted, as a dense layer and as two factors."""

    dense: float
    factored: float


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, as a dense layer and per kept rank as two factors.

    Attributes:
        dense_params: Entries of the dense weight.
        params_per_rank: Entries of both factors for each rank.
        dense_macs: MACs of the dense layer in the forward pass that was counted; 0 if none was.
        macs_per_rank: MACs of both factors for each rank in that pass; 0 if none was.
        input_shapes: Of the layer's inputs in that pass, batch included.
        latency: At its present rank; None if it was not measured.
    """

    dense_params: int
    params_per_rank: int
    dense_macs: int = 0
    macs_per_rank: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    latency: LayerLatency | None = None

    @cached_property  # asked for of each rank
    def break_even(self) -> int:
        """The largest rank whose factors are cheaper than the dense layer, in parameters and in MACs."""
        by_params = (self.dense_params - 1) // self.params_per_rank
        if not self.dense_macs:  # not counted, or a lookup, which costs none
            return by_params
        return min(by_params, (self.dense_macs - 1) // self.macs_per_rank)

    def pays(self, rank: int) -> bool:
        """Whether two factors of this rank are better than the dense layer: cheaper and, if measured, faster."""
        return rank <= self.break_even and (self.latency is None or self.latency.factored < self.latency.dense)

    def dense(self, unit: Unit) -> int:
        """MACs or parameters of the dense layer."""
        return self.dense_macs if unit == "macs" else self.dense_params

    def per_rank(self, unit: Unit) -> int:
        """MACs or parameters of each rank."""
        return self.macs_per_rank if unit == "macs" else self.params_per_rank

    def at(self, rank: int, unit: Unit) -> int:
        """MACs or parameters at this rank: two factors where they pay, dense beyond."""
        return rank * self.per_rank(unit) if self.pays(rank) else self.dense(unit)


@dataclass(frozen=True)
class ModelCost:
    """Cost of a whole model at any ranks.

    Attributes:
        layers: Name of each decomposed layer -> its cost.
        other_params: Parameters of everything else, biases included.
        other_macs: MACs of everything else.
        batch_size: Inputs in the forward pass that was counted; 0 if none was.
    """

    layers: Mapping[str, LayerCost]
    other_params: int
    other_macs: int = 0
    batch_size: int = 0

    @property
    def counted(self) -> bool:
        """Whether a forward pass was counted, so that MACs are known."""
        return self.batch_size > 0

    def dense(self, unit: Unit) -> int:
        """Cost of the dense model."""
        return self._other(unit) + sum(layer.dense(unit) for layer in self.layers.values())

    def at(self, ranks: Mapping[str, int], unit: Unit) -> int:
        """Cost of the model at these ranks, a rank for every decomposed layer."""
        return self._other(unit) + sum(layer.at(ranks[name], unit) for name, layer in self.layers.items())

    def ratio(self, ranks: Mapping[str, int], unit: Unit) -> float:
        """Share of the dense cost that is left at these ranks."""
        return self.at(ranks, unit) / max(1, self.dense(unit))

    def _other(self, unit: Unit) -> int:
        return self.other_macs if unit == "macs" else self.other_params

    def without(self, names: Collection[str]) -> ModelCost:
        """The cost with these layers dense for good."""
        left = {name: of for name, of in self.layers.items() if name not in names}
        macs = sum(self.layers[name].dense_macs for name in names)
        params = sum(self.layers[name].dense_params for name in names)
        return replace(self, layers=left, other_macs=self.other_macs + macs, other_params=self.other_params + params)

    def by(self, unit: Unit) -> CountedCost:
        """The cost in one unit."""
        return CountedCost(self, unit)


@dataclass(frozen=True)
class CountedCost(Cost):
    """Cost in counted multiply-accumulates or parameters.

    Attributes:
        model: What was counted.
        unit: "macs" or "params".
    """

    model: ModelCost
    unit: Unit

    def at(self, name: str, rank: int) -> int:
        return self.model.layers[name].at(rank, self.unit)

    def rest(self) -> int:
        return self.model.other_macs if self.unit == "macs" else self.model.other_params

    def dense(self) -> int:
        return self.model.dense(self.unit)

    def ladder(self, name: str, candidates: int, min_rank: int, round_to: int) -> Iterator[int]:
        """Multiples of ``round_to`` that are cheaper than dense, or every candidate.

        A layer too narrow for one multiple takes the largest half, quarter, ... of it that is cheaper than dense.
        """
        most = self.model.layers[name].break_even
        while round_to > max(1, most):
            round_to //= 2
        first = -(-min_rank // round_to) * round_to
        yield from range(first, min(most, candidates) + 1, round_to)
        if candidates > most or first > candidates:
            yield candidates
