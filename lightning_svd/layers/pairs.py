"""Two plain torch layers in sequence in the place of one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_svd.layers.views import Half, View

# Set on a pair's container: the view of the layer that it stands for, as plain data, so that a pickle needs no class.
MARK = "low_rank_view"
PlainT = TypeVar("PlainT", bound=nn.Module)


def factored_pair(view: View, rank: int, bias: bool) -> nn.Sequential:
    """Two empty plain layers in sequence, on the meta device, that a layer of this rank becomes.

    Args:
        view: Of the dense layer.
        rank: Of the factors, for each group.
        bias: Whether the second layer has one.
    """
    between = rank * view.groups
    first, second = view.halves
    pair = nn.Sequential(_empty(first, view.inputs, between, False), _empty(second, between, view.outputs, bias))
    vars(pair)[MARK] = view.to_dict()
    return pair


def is_pair(module: nn.Module) -> bool:
    """Whether ``module`` was made by :func:`factored_pair`, and is not a container of the user's own."""
    return type(module) is nn.Sequential and MARK in vars(module)


def low_rank_pairs(module: nn.Module) -> dict[str, nn.Sequential]:
    """The pairs of plain layers that stand for one each, by name."""
    sequences = {name: child for name, child in module.named_modules() if isinstance(child, nn.Sequential)}
    return {name: sequence for name, sequence in sequences.items() if is_pair(sequence)}


def view_of(pair: nn.Sequential) -> View:
    """The view of the layer that a :func:`factored_pair` stands for."""
    return View.from_dict(vars(pair)[MARK])


def rank_of(pair: nn.Sequential) -> int:
    """The rank of a pair, in each group."""
    assert isinstance(pair[0].weight, Tensor)
    return view_of(pair).right_factor(pair[0].weight).shape[-1]


def merged_weight(pair: nn.Sequential, first: Tensor, second: Tensor) -> Tensor:
    """The dense weight that two weights of a :func:`factored_pair` stand for.

    Args:
        pair: The two layers.
        first: Weight of the first, its own or another of its shape.
        second: Weight of the second.
    """
    view = view_of(pair)
    return view.fold(view.left_factor(second) @ view.right_factor(first).mT)


def merged(pair: Any) -> nn.Module:
    """The new dense layer that a :func:`factored_pair` stands for."""
    first, second = pair
    layer = empty_dense(view_of(pair), second.bias is not None)
    return fill(layer, merged_weight(pair, first.weight, second.weight), second.bias, first.weight).train(pair.training)


def empty_dense(view: View, bias: bool) -> nn.Module:
    """The plain layer that is seen so, on the meta device."""
    if view.kernel or view.layer_type in (nn.Linear, nn.Embedding):
        return _empty(view.whole, view.inputs, view.outputs, bias)
    with torch.device("meta"):
        return view.layer_type(view.outputs, view.inputs)


def _empty(half: Half, inputs: int, outputs: int, bias: bool) -> nn.Module:
    if half.layer_type is nn.Embedding:
        return half.layer_type(inputs, outputs, **half.geometry, device="meta")
    kernel = (half.kernel,) if half.kernel else ()
    return half.layer_type(inputs, outputs, *kernel, **half.geometry, bias=bias, device="meta")


def bias_of(layer: Any) -> nn.Parameter | None:
    """The bias of a layer or a pair; None where it has none, as an embedding never has."""
    bias: nn.Parameter | None = getattr(layer[1] if is_pair(layer) else layer, "bias", None)
    return bias


def fill(
    layer: PlainT,
    weight: Tensor,
    bias: nn.Parameter | None,
    like: Tensor,
    layout: torch.memory_format = torch.contiguous_format,
) -> PlainT:
    """``layer`` with this weight in this layout, trainable as ``like`` is, and where it has a bias this very one."""
    layout = layout if weight.ndim > 3 else torch.contiguous_format
    # Plain storage: some kernels and every saved file want it, not a transposed view.
    filled: Any = layer
    filled.weight = nn.Parameter(weight.detach().clone(memory_format=layout), like.requires_grad)
    if getattr(layer, "bias", None) is not None:
        filled.bias = bias
    return layer


def layout_of(weight: Tensor) -> torch.memory_format:
    """How a weight lies in memory: channels last where a convolution's does, as the user arranged it."""
    for axes, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if weight.ndim == axes and not weight.is_contiguous() and weight.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format
