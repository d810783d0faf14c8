"""Two plain torch layers in sequence in the place of one, and the geometry of both.

A Linear of rank k is two Linears through k features. A Conv2d of rank k is, in mode "channel", a convolution to k maps
and one of 1x1; in mode "spatial" one of kh x 1 and one of 1 x kw (Yang et al. 2020, section 3.1).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

CONV_MODES = ("channel", "spatial")
MARK = "low_rank_mode"  # set on a pair's container: "linear", "channel" or "spatial"
PlainT = TypeVar("PlainT", bound=nn.Module)


def conv_matrix_shape(shape: tuple[int, ...], conv_mode: str) -> tuple[int, int]:
    """(m, n) of a convolution's weight (out, in, kh, kw) seen as the matrix of its mode."""
    out, in_, kh, kw = shape
    return (out, in_ * kh * kw) if conv_mode == "channel" else (out * kw, in_ * kh)


def unfold_conv_weight(weight: Tensor, conv_mode: str) -> Tensor:
    """A convolution's weight (out, in, kh, kw) as the matrix of its mode; see :class:`SVDConv2d`."""
    if conv_mode == "channel":
        return weight.flatten(1)
    out, in_, kh, kw = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(out * kw, in_ * kh)


def fold_conv_weight(matrix: Tensor, shape: tuple[int, ...], conv_mode: str) -> Tensor:
    """The inverse of :func:`unfold_conv_weight`."""
    if conv_mode == "channel":
        return matrix.reshape(shape)
    out, in_, kh, kw = shape
    return matrix.reshape(out, kw, in_, kh).permute(0, 2, 3, 1)


def factored_pair(layer: Any, rank: int, conv_mode: str | None) -> nn.Sequential:
    """Two empty plain layers in sequence, on the meta device, that a layer of this rank becomes.

    Args:
        layer: A Linear or Conv2d, plain or factorised, whose geometry is taken.
        rank: Of the factors.
        conv_mode: "channel" or "spatial" for a convolution.
    """
    bias: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    if not hasattr(layer, "kernel_size"):
        first = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        pair = nn.Sequential(first, nn.Linear(rank, layer.out_features, **bias))
    else:
        kh, kw = layer.kernel_size
        kernels = ((kh, kw), (1, 1)) if conv_mode == "channel" else ((kh, 1), (1, kw))
        rows, columns = (stage | {"padding_mode": layer.padding_mode} for stage in stages(layer, conv_mode))
        pair = nn.Sequential(
            nn.Conv2d(layer.in_channels, rank, kernels[0], bias=False, device="meta", **rows),
            nn.Conv2d(rank, layer.out_channels, kernels[1], **columns, **bias),
        )
    vars(pair)[MARK] = conv_mode or "linear"
    return pair.train(layer.training)


def is_pair(module: nn.Module) -> bool:
    """Whether ``module`` was made by :func:`factored_pair`, and is not a container of the user's own."""
    return type(module) is nn.Sequential and MARK in vars(module)


def merged_weight(pair: Any, first: Tensor, second: Tensor) -> Tensor:
    """The dense weight that two weights of a :func:`factored_pair` stand for.

    Args:
        pair: The two layers.
        first: Weight of the first, its own or another of its shape.
        second: Weight of the second.
    """
    if vars(pair)[MARK] == "linear":
        return second @ first
    (rank, in_, kh, kw), out = first.shape, second.shape[0]
    if vars(pair)[MARK] == "channel":
        return (second.flatten(1) @ first.flatten(1)).reshape(out, in_, kh, kw)
    left = second.squeeze(2).transpose(1, 2).reshape(-1, rank)
    return fold_conv_weight(left @ first.reshape(rank, -1), (out, in_, kh, second.shape[3]), "spatial")


def merged(pair: Any) -> nn.Linear | nn.Conv2d:
    """The new dense layer that a :func:`factored_pair` stands for."""
    first, second = pair
    weight = merged_weight(pair, first.weight, second.weight)
    if vars(pair)[MARK] == "linear":
        layer = nn.Linear(first.in_features, second.out_features, second.bias is not None, device="meta")
        return fill(layer, weight, second)
    shape = geometry(first)
    if vars(pair)[MARK] == "spatial" and not isinstance(first.padding, str):
        shape = {key: (value[0], getattr(second, key)[1]) for key, value in shape.items()}
    elif vars(pair)[MARK] == "spatial":
        shape |= {"dilation": (first.dilation[0], second.dilation[1]), "stride": (first.stride[0], second.stride[1])}
    options = shape | {"padding_mode": first.padding_mode, "bias": second.bias is not None, "device": "meta"}
    return fill(nn.Conv2d(first.in_channels, second.out_channels, kernel(weight), **options), weight, second)


def empty_dense(layer: Any) -> nn.Linear | nn.Conv2d:
    """The plain layer of a factorised one's geometry, on the meta device."""
    options: dict[str, Any] = {"bias": layer.bias is not None, "device": "meta"}
    if not hasattr(layer, "kernel_size"):
        return nn.Linear(layer.in_features, layer.out_features, **options)
    options |= geometry(layer) | {"padding_mode": layer.padding_mode}
    return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)


def fill(layer: PlainT, weight: Tensor, like: Any) -> PlainT:
    """``layer`` with this weight and, where it has one, the very bias of ``like``; trainable as ``like`` is."""
    trainable = any(p.requires_grad for name, p in like.named_parameters(recurse=False) if name != "bias")
    # contiguous: some kernels and every saved file want plain storage, not a transposed view.
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trainable)
    if layer.bias is not None:
        layer.bias = like.bias
    return layer.train(like.training)


def geometry(conv: Any) -> dict[str, Any]:
    """What a convolution takes beside its weight and bias."""
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}


def stages(conv: Any, conv_mode: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The geometry of the two convolutions that a convolution's factors are."""
    pointwise = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    if conv_mode == "channel":
        return geometry(conv), pointwise
    rows = {"stride": (conv.stride[0], 1), "dilation": (conv.dilation[0], 1)}
    columns = {"stride": (1, conv.stride[1]), "dilation": (1, conv.dilation[1])}
    if isinstance(conv.padding, str):
        return rows | {"padding": conv.padding}, columns | {"padding": conv.padding}
    return rows | {"padding": (conv.padding[0], 0)}, columns | {"padding": (0, conv.padding[1])}


def kernel(weight: Tensor) -> tuple[int, int]:
    """(kh, kw) of a convolution's weight."""
    return weight.shape[2], weight.shape[3]
