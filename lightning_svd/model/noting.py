"""How statistics of layers are told what goes through them in a forward pass, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.calls import in_backward
from lightning_svd.ranks.statistics import features_of


class Noted(Protocol):
    """What is told of a layer's features and gradients, such as its statistics."""

    def see(self, layer: SVDLayer, between: Tensor) -> None:
        """Take note of the features of a call."""

    def see_gradient(self, layer: SVDLayer, between: Tensor, gradient: Tensor, inputs: int) -> None:
        """Take note of the gradient of a call's output, in a batch of so many inputs."""

    def end_batch(self, inputs: int) -> None:
        """All calls of a batch of so many inputs were noted."""


class Pass:
    """A pass of one batch: what layers are to be watched by, see :func:`~lightning_svd.layers.layer.watching`.

    Args:
        of: What is to be told of a layer; None if nothing is.
        inputs: How many there are in the batch.

    Attributes:
        probes: Zeros that were added to the layers' outputs: to ask for their gradients has those of the outputs
            computed, whatever is frozen before, and no others.
        heard: The names of the layers to which gradients can come back.
    """

    def __init__(self, of: Callable[[SVDLayer], Noted | None], inputs: int) -> None:
        self.of, self.inputs = of, inputs
        self.probes: list[Tensor] = []
        self.heard: set[str] = set()
        self._told: dict[str, Noted] = {}

    def watch(self, layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        """Tell of a call; returns the output that goes on."""
        noted = self.of(layer)
        if noted is None:
            return self._probed(out)
        # Features now, not when the gradient comes: by then the model may have written into x.
        between = features_of(layer, x, out, bias)
        self._told[layer.svd_name] = noted
        if not in_backward():  # where an activation checkpoint computes what was seen before
            noted.see(layer, between)
        if not torch.is_grad_enabled():  # the model may have turned them off here
            return out
        self.heard.add(layer.svd_name)
        out = self._probed(out)
        note: Any = out.register_hook
        note(lambda gradient: noted.see_gradient(layer, between, gradient, self.inputs))
        return out

    def _probed(self, out: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return out
        self.probes.append(out.new_zeros(()).requires_grad_())
        return out + self.probes[-1]

    def end(self) -> None:
        """The pass is over, its gradients too."""
        for noted in self._told.values():
            noted.end_batch(self.inputs)
