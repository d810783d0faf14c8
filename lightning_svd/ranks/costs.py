"""What layers and models cost, dense and at any rank: multiply-accumulates, parameters and seconds, as numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

Unit = Literal["macs", "params"]
# Ranks between those that a budget of time chooses from: kernels take about as long for any in between.
STEP = 8


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

    def budget(self, share: float) -> float:
        """The most that a model may cost which is to cost this share of the dense one."""
        return share * self.dense()

    def share(self, total: float) -> float:
        """The share of the dense model's cost that a :meth:`total` is; the inverse of :meth:`budget`."""
        return total / (self.dense() or 1)


@dataclass(frozen=True)
class LayerLatency:
    """Measured seconds of one layer, as a dense layer and as two factors of some ranks.

    Attributes:
        dense: Of the dense layer.
        factored: (rank, seconds) of its factors, ranks ascending; between them time is taken to lie on a line.
    """

    dense: float
    factored: tuple[tuple[int, float], ...]

    def at(self, rank: int) -> float:
        """Of two factors of a rank; beyond the ranks that were measured that of the nearest."""
        least, most = self.factored[0][0], self.factored[-1][0]
        return _along(self.factored, min(max(rank, least), most))


@dataclass(frozen=True)
class ModelLatency:
    """Measured seconds of a whole model, against the sum of its layers' own.

    A model takes more than its layers do one by one, and sometimes less: for what is no layer, what is cold in a cache,
    what a compiler fuses. So the whole was measured too, dense and at a few ranks.

    Attributes:
        dense: Seconds of the dense model.
        samples: (sum of the layers' seconds, seconds of the whole), ascending in both.
        others: Sum of the seconds of layers that were timed and are not factorized.
        conditions: What it was measured on and how, by name: the device, its threads, the batch size, ...
    """

    dense: float
    samples: tuple[tuple[float, float], ...]
    others: float = 0.0
    conditions: Mapping[str, str | int] = field(default_factory=dict)

    def whole(self, layers: float) -> float:
        """Seconds of the model whose layers take so long one by one."""
        return _along(self.samples, layers)

    def layers(self, whole: float) -> float:
        """The inverse of :meth:`whole`."""
        return _along([(seconds, layers) for layers, seconds in self.samples], whole)


def _along(points: Sequence[tuple[float, float]], x: float) -> float:
    """On the lines through points (x, y), ascending in x; beyond the ends on the last line."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(1, bisect_left(points, x, key=lambda point: point[0])), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer, as a dense layer and per kept rank as two factors.

    Attributes:
        dense_params: Entries of the dense weight.
        params_per_rank: Entries of both factors for each rank.
        dense_macs: MACs of the dense layer in the forward pass that was counted; 0 if none was.
        macs_per_rank: MACs of both factors for each rank in that pass; 0 if none was.
        input_shapes: Of the layer's inputs in that pass, batch included.
        latency: None if it was not measured.
        repeats: How often the layer runs in each call of the model that it runs in, at least.
    """

    dense_params: int
    params_per_rank: int
    dense_macs: int = 0
    macs_per_rank: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    latency: LayerLatency | None = None
    repeats: int = 1

    @cached_property  # asked for of each rank
    def break_even(self) -> int:
        """The largest rank whose factors are cheaper than the dense layer, in parameters and in MACs."""
        by_params = (self.dense_params - 1) // self.params_per_rank
        if not self.dense_macs:  # not counted, or a lookup, which costs none
            return by_params
        return min(by_params, (self.dense_macs - 1) // self.macs_per_rank)

    def pays(self, rank: int) -> bool:
        """Whether two factors of this rank are better than the dense layer: cheaper and, if measured, faster."""
        return rank <= self.break_even and (self.latency is None or self.latency.at(rank) < self.latency.dense)

    def dense(self, unit: Unit) -> int:
        """MACs or parameters of the dense layer."""
        return self.dense_macs if unit == "macs" else self.dense_params

    def per_rank(self, unit: Unit) -> int:
        """MACs or parameters of each rank."""
        return self.macs_per_rank if unit == "macs" else self.params_per_rank

    def seconds(self, rank: int) -> float:
        """Measured seconds at this rank, as :meth:`at`; 0 if they were not measured."""
        if self.latency is None:
            return 0.0
        return self.latency.at(rank) if self.pays(rank) else self.latency.dense

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
        latency: Of the whole; None if it was not measured.
    """

    layers: Mapping[str, LayerCost]
    other_params: int
    other_macs: int = 0
    batch_size: int = 0
    latency: ModelLatency | None = None

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
        without = replace(self, layers=left, other_macs=self.other_macs + macs, other_params=self.other_params + params)
        if self.latency is None:
            return without
        seconds = sum(latency.dense for name in names if (latency := self.layers[name].latency))
        return replace(without, latency=replace(self.latency, others=self.latency.others + seconds))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelCost:
        """The inverse of ``dataclasses.asdict``."""
        layers = {}
        for name, price in data["layers"].items():
            latency = price["latency"] and LayerLatency(**price["latency"])
            layers[name] = LayerCost(**{**price, "latency": latency})
        latency = data["latency"] and ModelLatency(**data["latency"])
        return cls(**{**data, "layers": layers, "latency": latency})

    def by(self, unit: Unit | Literal["latency"]) -> Cost:
        """The cost in one unit."""
        return LatencyCost(self) if unit == "latency" else CountedCost(self, unit)


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


@dataclass(frozen=True)
class LatencyCost(Cost):
    """Cost in measured time, in microseconds that the layers take one by one.

    What is to be met is time of the whole: ``budget`` and ``share`` are of that.

    Attributes:
        model: What was measured.
    """

    model: ModelCost

    def at(self, name: str, rank: int) -> float:
        return 1e6 * self.model.layers[name].seconds(rank)

    def rest(self) -> float:
        return 1e6 * self._whole.others

    def dense(self) -> float:
        return self.budget(1.0)

    def budget(self, share: float) -> float:
        return 1e6 * self._whole.layers(share * self._whole.dense)

    def share(self, total: float) -> float:
        return self._whole.whole(total / 1e6) / self._whole.dense

    @property
    def _whole(self) -> ModelLatency:
        assert self.model.latency is not None
        return self.model.latency

    def ladder(self, name: str, candidates: int, min_rank: int, round_to: int) -> Iterator[int]:
        """The ranks that were measured and every eighth between them, each where no larger one is as fast; and dense.

        With ``round_to`` multiples of it in their place.
        """
        price = self.model.layers[name]
        measured = [rank for rank, _ in price.latency.factored] if price.latency else []
        step = round_to if round_to > 1 else STEP
        ranks = {*range(step, price.break_even + 1, step), *(measured if round_to == 1 else [])}
        worth: list[int] = []
        for rank in sorted((r for r in ranks if min_rank <= r <= candidates and price.pays(r)), reverse=True):
            if not worth or self.at(name, rank) < self.at(name, worth[-1]):
                worth.append(rank)
        yield from reversed(worth)
        if not worth or worth[0] < candidates:
            yield candidates
