"""Layers that run several times in one call of the model: their weight is rebuilt once for all of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lightning_svd.layers.dense_weight import in_transform
from lightning_svd.layers.forms import SVDForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.calls import CallWatcher, holders, in_backward, is_compiled


class RepeatedCalls(CallWatcher):
    """Has a layer that runs T times in one call of the model rebuild its weight once, instead of T times.

    A spiking net, a recurrent cell in a loop, a block that is applied again and again: such layers multiply the same U,
    s and V in each of their calls. From a call of the model from outside to its end they share one W, and autograd adds
    up the gradients of the T calls before it goes through that product, once too. Rebuilding is then weighed as the
    T-th part against two factors (see :meth:`SVDLayer.rebuilding_is_cheaper`).

    What an activation checkpoint computes again in a backward pass is no call of the model: there each weight is
    rebuilt by itself.

    Args:
        model: What is called.
        layers: The factorized layers in it by name.
        times: How often each of them runs in a call of the model; of those that are absent, once.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVDLayer], times: Mapping[str, int]) -> None:
        super().__init__()
        self._times = {layers[name]: count for name, count in times.items() if name in layers and count > 1}
        self._weights: dict[tuple[Any, ...], Tensor] = {}
        if not self._times or any(map(is_compiled, model.modules())):  # a compiler sees by itself what is the same
            return
        self.watch(holders(model, layers.values()))
        for layer in self._times:
            vars(layer)["repeats"] = self

    def stop(self) -> None:
        """Let go of the layers, each of which rebuilds its weight in each call again."""
        super().stop()
        self._weights.clear()
        for layer in self._times:
            vars(layer).pop("repeats", None)

    def returned(self, module: nn.Module, output: Any) -> None:
        """What weights are needed longer the graph keeps; for who writes through ``.data`` they are others by then."""
        self._weights.clear()

    def times_of(self, layer: SVDLayer) -> int:
        """For how many calls like the present one the weight that is rebuilt in it serves."""
        # A mode may count products, or cache them for a checkpoint: each call is to make the same ones.
        alone = torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None
        return 1 if alone or in_transform() else self._times[layer]

    def matrix(self, layer: SVDLayer) -> Tensor:
        """W (m, n) of a layer, differentiable: the one of the present call of the model, or the first in it."""
        key = (layer, layer.stamp(), _way(layer))
        shared = bool(self._open) and not in_backward()
        if shared and key in self._weights:
            return self._weights[key]
        matrix = _rebuilt(layer)
        if shared:
            self._weights[key] = matrix
        return matrix


def _rebuilt(layer: SVDLayer) -> Tensor:
    """W (m, n) of a layer, differentiable as often as its factors are."""
    if isinstance(layer.form, SVDForm):
        return _Product.apply(*layer.form.factors())  # type: ignore[no-any-return, no-untyped-call]
    left, right = layer.form.left_right()
    return _Product.apply(left, None, right)  # type: ignore[no-any-return, no-untyped-call]


def _way(layer: SVDLayer) -> tuple[Any, ...]:
    """How tensors are computed at present: with a graph or without, in which dtype."""
    kind = layer.form.trained[0].device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if casts else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), dtype


class _Product(torch.autograd.Function):
    """``U diag(s) V^T`` or ``A B^T``, whose graph outlives a backward pass.

    Two calls of a dense layer in one call of the model have graphs of their own: losses of each may go backward one
    after the other. Calls that share a product would have the first of these free what the second needs. So nothing is
    saved as autograd saves it; the factors are there as long as their graph is. This is also how an activation
    checkpoint, which wants as many tensors saved when it computes again, finds none here.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, scale: Tensor | None, right: Tensor) -> Tensor:
        ctx.factors = left, scale, right
        ctx.versions = _versions(ctx.factors)
        return _scaled(left, scale) @ right.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        if _versions(ctx.factors) != ctx.versions:
            raise RuntimeError(
                "a factor of a layer's weight has been modified by an inplace operation since the forward pass: step "
                "the optimizer after the backward pass"
            )
        left, scale, right = ctx.factors
        # Under autocast the product, and so its gradient, is of a narrower dtype than the factors.
        of_scaled = (gradient @ right.to(gradient.dtype)).to(left.dtype)
        of_right = (gradient.mT @ _scaled(left, scale).to(gradient.dtype)).to(right.dtype)
        of_scale = None if scale is None else (left * of_scaled).sum(-2)
        return _scaled(of_scaled, scale), of_scale, of_right


def _scaled(columns: Tensor, scale: Tensor | None) -> Tensor:
    return columns if scale is None else columns * scale.unsqueeze(-2)


def _versions(tensors: Iterable[Tensor | None]) -> list[int | None]:
    return [None if each is None else each._version for each in tensors]
