"""What a model costs: multiply-accumulates and parameters, dense and at any rank.

MACs are what :class:`torch.utils.flop_counter.FlopCounterMode` counts, halved: everything that multiplies matrices or
convolves, decomposed or not, the products in the kernels of attention and recurrent nets included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from lightning_svd.layers import SVDLayer
from lightning_svd.parts import prefix_of
from lightning_svd.recurrent import SplitRecurrent

Unit = Literal["macs", "params"]


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
        stays_whole: Whether the model reads the layer's weight itself, so that two layers cannot take its place.
    """

    dense_params: int
    params_per_rank: int
    dense_macs: int = 0
    macs_per_rank: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    latency: LayerLatency | None = None
    stays_whole: bool = False

    @property
    def break_even(self) -> int:
        """The largest rank whose factors are cheaper than the dense layer, in parameters and in MACs."""
        if self.stays_whole:
            return 0
        by_params = (self.dense_params - 1) // self.params_per_rank
        if not self.dense_macs:  # not counted, or a lookup, which costs none
            return by_params
        return min(by_params, (self.dense_macs - 1) // self.macs_per_rank)

    def pays(self, rank: int) -> bool:
        """Whether two factors of this rank are better than the dense layer: cheaper and, if measured, faster."""
        if self.stays_whole:
            return False
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


def svd_layers(module: nn.Module) -> dict[str, SVDLayer]:
    """The factorised layers in ``module`` by name, in the order of ``named_modules``."""
    return {name: child for name, child in module.named_modules() if isinstance(child, SVDLayer)}


def count_params(module: nn.Module) -> ModelCost:
    """The cost of ``module`` in parameters only."""
    layers = svd_layers(module)
    factors = {id(p) for layer in layers.values() for p in (layer.U, layer.s, layer.V)}
    costs = {
        name: LayerCost(layer.dense_params, layer.params_per_rank, stays_whole=layer.stays_whole)
        for name, layer in layers.items()
    }
    return ModelCost(costs, sum(p.numel() for p in module.parameters() if id(p) not in factors))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation inside, each of its modules in the mode it was in afterwards."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def as_arguments(example_input: Any) -> tuple[Any, ...]:
    """What a module is called with: a tuple holds several arguments, anything else is one."""
    return example_input if isinstance(example_input, tuple) else (example_input,)


def count_costs(module: nn.Module, example_input: Any) -> ModelCost:
    """The cost of ``module`` in MACs and parameters.

    Args:
        module: With factorised layers or without; run once, as in evaluation and without gradients.
        example_input: What it is called with, a tuple for several arguments, the first one's first dimension the batch.
    """
    arguments = as_arguments(example_input)
    with evaluating(module), CostMeter(module) as meter, torch.no_grad():
        module(*arguments)
    return meter.cost(batch_size=len(arguments[0]))


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Both products of scaled dot-product attention, shapes (batch, heads, positions, width)."""
    batch, heads, queries, width = query
    return int(2 * batch * heads * queries * key[-2] * (width + value[-1]))


def _recurrent_flops(data: Any, *weights: Any, **_: Any) -> int:
    """Products of an LSTM's kernel on the CPU: one layer in one direction, data (steps, rows, width)."""
    return int(2 * prod(data[:-1]) * sum(prod(weight) for weight in weights[:2]))


def _cudnn_recurrent_flops(data: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Products of a recurrent net's kernel on CUDA, all layers: data (..., width)."""
    return int(2 * prod(data[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2))


# What torch's own counter leaves out. It knows attention's kernels on CUDA and plain products.
_MORE_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_flops,
    torch.ops.aten._cudnn_rnn: _cudnn_recurrent_flops,
}


@dataclass
class CostMeter:
    """Counts the forward pass that runs inside it::

        with CostMeter(model) as meter:
            model(x)
        cost = meter.cost(batch_size=len(x))

    The pass is only watched, never changed. Costs are those of the dense model and of each rank, whatever ranks the
    layers keep while they are watched and in whichever way they compute.
    """

    module: nn.Module
    _shapes: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    _reads: dict[str, int] = field(default_factory=dict)
    _inside: int = 0
    _before: int = 0
    _beside: int = 0

    def __enter__(self) -> CostMeter:
        self._handles: list[RemovableHandle] = []
        for name, layer in self._layers.items():
            self._shapes[name] = []
            self._reads[name] = layer.weight_reads
            self._handles.append(layer.register_forward_pre_hook(self._entering(name), with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._leaving))
        for name, module in self.module.named_modules():
            if isinstance(module, SplitRecurrent):
                self._handles.append(module.register_forward_pre_hook(self._entering_recurrent(name), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaving))
        self._counter = FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)
        self._counter.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._counter.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        for name, layer in self._layers.items():
            layer.stays_whole |= layer.weight_reads > self._reads[name]

    @cached_property
    def _layers(self) -> dict[str, SVDLayer]:
        return svd_layers(self.module)

    def _entering(self, name: str) -> Any:
        def note_shape(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self._shapes[name].append(tuple((*args, *kwargs.values())[0].shape))
            self._before = self._counter.get_total_flops()

        return note_shape

    def _entering_recurrent(self, name: str) -> Any:
        def note_shapes(module: SplitRecurrent, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for part, shape in module.input_shapes((*args, *kwargs.values())[0]).items():
                layer = module.get_submodule(part)
                if isinstance(layer, SVDLayer):
                    self._shapes[prefix_of(name) + part].append(shape)
                else:
                    self._beside += shape[0] * sum(p.numel() for p in layer.parameters() if p.ndim == 2)
            self._before = self._counter.get_total_flops()

        return note_shapes

    def _leaving(self, layer: nn.Module, args: Any, output: Any) -> None:
        self._inside += self._counter.get_total_flops() - self._before

    def cost(self, batch_size: int) -> ModelCost:
        """What was counted.

        Args:
            batch_size: How many inputs the pass held.
        """
        params = count_params(self.module)
        layers = {
            name: LayerCost(
                params.layers[name].dense_params,
                params.layers[name].params_per_rank,
                sum(layer.dense_macs(shape) for shape in self._shapes[name]),
                sum(layer.macs_per_rank(shape) for shape in self._shapes[name]),
                tuple(self._shapes[name]),
                stays_whole=layer.stays_whole,
            )
            for name, layer in self._layers.items()
        }
        other = (self._counter.get_total_flops() - self._inside) // 2 + self._beside
        return ModelCost(layers, params.other_params, other, batch_size)
