"""A layer's weight seen as a matrix, and as the weights of two plain layers in sequence.

A Linear of rank k is two Linears through k features, an Embedding is one of k features and a Linear. A convolution of
rank k is, in mode "channel", a convolution to k maps and one of 1x1; in mode "spatial" one along all axes but the last
and one along the last (kh x 1, then 1 x kw; Yang et al. 2020, section 3.1). A transposed one is the adjoint of a
convolution, so its factors come in the opposite order: in mode "channel" one of 1x1 to k maps, and a transposed one.
With groups there is a matrix for each group, and all have the same rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

CONV_MODES = ("channel", "spatial")
CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def supported_type(layer: nn.Module) -> type[nn.Module] | None:
    """The type of layer that ``layer`` is or is derived from, if its weight can be seen as a matrix."""
    return next((kind for kind in type(layer).__mro__ if _is_supported(kind)), None)


def _is_supported(kind: type) -> bool:
    # By its name: transformers is not imported for it.
    conv1d = (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")
    return kind in (nn.Linear, nn.Embedding) or kind in CONVOLUTIONS or conv1d


@dataclass(frozen=True)
class Half:
    """One of the two plain layers.

    Attributes:
        layer_type: Its class.
        kernel: Sizes of its kernel; () for Linear.
        geometry: What its constructor and its functional form take beside channels, kernel and bias.
    """

    layer_type: type[nn.Module]
    kernel: tuple[int, ...] = ()
    geometry: dict[str, Any] = field(default_factory=dict)

    @property
    def transposed(self) -> bool:
        """Whether its weight's inputs come first."""
        return self.layer_type in (*_TRANSPOSED, nn.Embedding)


@dataclass(frozen=True)
class View:
    """How the weight of a layer is a matrix (m, n) for each group: its outputs are m, its inputs n.

    Attributes:
        layer_type: Class of the dense layer: Linear, a convolution, Embedding, or the Conv1D of transformers.
        inputs: Features or channels of the layer's input.
        outputs: Features or channels of its output.
        conv_mode: "channel" or "spatial"; None for a layer without a kernel.
        kernel: Sizes of the kernel, one for each axis; () without one.
        geometry: The other arguments of a convolution or an embedding.
    """

    layer_type: type[nn.Module]
    inputs: int
    outputs: int
    conv_mode: str | None = None
    kernel: tuple[int, ...] = ()
    geometry: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, layer: Any, conv_mode: str = "channel") -> View:
        """The view of a plain layer.

        Raises:
            ValueError: If the mode is unknown, or the layer's weight cannot be seen as a matrix.
        """
        if conv_mode not in CONV_MODES:
            raise ValueError(f"`conv_mode` must be one of {', '.join(CONV_MODES)}, got {conv_mode!r}")
        kind = supported_type(layer)
        if kind is nn.Linear:
            return cls(kind, layer.in_features, layer.out_features)
        if kind in CONVOLUTIONS:
            geometry = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
            if kind in _TRANSPOSED:
                geometry["output_padding"] = layer.output_padding
            return cls(kind, layer.in_channels, layer.out_channels, conv_mode, tuple(layer.kernel_size), geometry)
        if kind is nn.Embedding:
            geometry = {"padding_idx": layer.padding_idx}
            return cls(kind, layer.num_embeddings, layer.embedding_dim, geometry=geometry)
        if kind is not None:
            return cls(kind, *layer.weight.shape)
        raise ValueError(f"{type(layer).__name__} has no weight that can be seen as a matrix")

    def to_dict(self) -> dict[str, Any]:
        """As plain data, the class by its name."""
        about = {name: getattr(self, name) for name in ("inputs", "outputs", "conv_mode", "kernel")}
        kind = f"{self.layer_type.__module__}:{self.layer_type.__qualname__}"
        return {"layer_type": kind, **about, "geometry": dict(self.geometry)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> View:
        """The inverse of :meth:`to_dict`."""
        module, _, name = data["layer_type"].partition(":")
        return cls(**{**data, "layer_type": getattr(import_module(module), name)})

    @property
    def transposed(self) -> bool:
        """Whether the weight's inputs come first."""
        return self.layer_type is not nn.Linear and self.layer_type not in _PLAIN

    @property
    def groups(self) -> int:
        """How many matrices there are."""
        groups: int = self.geometry.get("groups", 1)
        return groups

    @property
    def kernels(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The kernels of the first and the second of two layers."""
        ones = (1,) * len(self.kernel)
        if self.conv_mode == "spatial":
            return (*self.kernel[:-1], 1), (*ones[:-1], self.kernel[-1])
        return (ones, self.kernel) if self.transposed else (self.kernel, ones)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of each group's matrix."""
        _, outputs, inputs, right, left = self._sizes
        return outputs * left, inputs * right

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the dense weight."""
        if self.transposed:
            return self.inputs, self.outputs // self.groups, *self.kernel
        return self.outputs, self.inputs // self.groups, *self.kernel

    @property
    def _sizes(self) -> tuple[int, int, int, int, int]:
        """Groups; outputs and inputs of each; entries of the first layer's kernel and of the second's."""
        groups = self.groups
        right, left = self.kernels
        return groups, self.outputs // groups, self.inputs // groups, prod(right), prod(left)

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight."""
        return prod(self.weight_shape)

    @property
    def params_per_rank(self) -> int:
        """Entries of each rank's two weights."""
        return self.groups * sum(self.matrix_shape)

    # In two halves

    @property
    def halves(self) -> tuple[Half, Half]:
        """The two plain layers, the first one to the rank's features or maps, the second one from them."""
        if self.layer_type is nn.Embedding:
            return self.whole, Half(nn.Linear)
        if not self.kernel:
            return Half(nn.Linear), Half(nn.Linear)
        first, second = self.kernels
        plain = _PLAIN[len(self.kernel) - 1]
        if self.conv_mode == "spatial":
            rows, columns = ({key: self._along(key, last) for key in self.geometry} for last in (False, True))
            return Half(self.layer_type, first, rows), Half(self.layer_type, second, columns)
        pointwise = Half(plain, first if self.transposed else second, {"groups": self.groups})
        return (pointwise, self.whole) if self.transposed else (self.whole, pointwise)

    @property
    def whole(self) -> Half:
        """The dense layer itself, in the form of a half."""
        return Half(self.layer_type, self.kernel, self.geometry)

    def _along(self, key: str, last: bool) -> Any:
        """An entry of the geometry for the axes of one half: all but the last axis, or the last one."""
        value = self.geometry[key]
        if isinstance(value, (int, str)):
            return value
        nothing = 0 if "padding" in key else 1
        return tuple(size if (axis == len(value) - 1) == last else nothing for axis, size in enumerate(value))

    # Between weights and matrices, stacked for groups: (groups, m, n), and (m, n) for one.

    def unfold(self, weight: Tensor) -> Tensor:
        """A dense weight as its matrix."""
        groups, outputs, inputs, right, left = self._sizes
        if self.transposed:
            parts = weight.reshape(groups, inputs, outputs, right, left).transpose(1, 2)
        else:
            parts = weight.reshape(groups, outputs, inputs, right, left)
        return self._stacked(parts.permute(0, 1, 4, 2, 3).reshape(groups, outputs * left, inputs * right))

    def fold(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`unfold`."""
        if self.layer_type is nn.Linear:
            return matrix
        groups, outputs, inputs, right, left = self._sizes
        parts = matrix.reshape(groups, outputs, left, inputs, right).permute(0, 1, 3, 4, 2)
        return (parts.transpose(1, 2) if self.transposed else parts).reshape(self.weight_shape)

    def first_weight(self, V: Tensor) -> Tensor:
        """Right factors (n, k) as the weight of the first layer."""
        groups, _, inputs, right, _ = self._sizes
        half = self.halves[0]
        if half.transposed:
            parts = V.reshape(groups, inputs, right, -1).transpose(2, 3)
            return parts.reshape(self.inputs, -1, *half.kernel)
        # A contiguous matrix first: copying it as such is much faster than as a strided kernel.
        return V.mT.contiguous().reshape(-1, inputs, *half.kernel)

    def second_weight(self, U: Tensor) -> Tensor:
        """Left factors (m, k) as the weight of the second layer."""
        groups, outputs, _, _, left = self._sizes
        half = self.halves[1]
        if half.transposed:
            return U.mT.contiguous().reshape(-1, outputs, *half.kernel)
        return U.reshape(groups, outputs, left, -1).transpose(2, 3).reshape(self.outputs, -1, *half.kernel)

    def right_factor(self, first: Tensor) -> Tensor:
        """The inverse of :meth:`first_weight`."""
        groups, _, inputs, right, _ = self._sizes
        if self.halves[0].transposed:
            parts = first.reshape(groups, inputs, -1, right).transpose(2, 3)
            return self._stacked(parts.reshape(groups, inputs * right, -1))
        return self._stacked(first.reshape(groups, -1, inputs * right).mT)

    def left_factor(self, second: Tensor) -> Tensor:
        """The inverse of :meth:`second_weight`."""
        groups, outputs, _, _, left = self._sizes
        if self.halves[1].transposed:
            return self._stacked(second.reshape(groups, -1, outputs * left).mT)
        parts = second.reshape(groups, outputs, -1, left).transpose(2, 3)
        return self._stacked(parts.reshape(groups, outputs * left, -1))

    def _stacked(self, matrices: Tensor) -> Tensor:
        return matrices if self.groups > 1 else matrices.squeeze(0)

    # What the layer computes

    def apply_matrix(self, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """The dense layer's output for its weight as a matrix."""
        if self.kernel:
            return _convolve(x, self.fold(matrix), bias, self.whole)
        if self.layer_type is nn.Embedding:
            return F.embedding(x, self.fold(matrix), self.geometry["padding_idx"])
        return F.linear(x, matrix, bias)

    def apply_factors(self, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The output for the weight ``left @ right.T``, by two layers: left (m, k), right (n, k)."""
        if self.kernel and left.shape[-1] == 0:
            return self.apply_matrix(x, left @ right.mT, bias)  # there is no convolution to no maps
        return self.apply_second(self.apply_first(x, right), left, bias)

    def apply_first(self, x: Tensor, right: Tensor) -> Tensor:
        """What the first of two layers puts out, the rank's features or maps: right (n, k)."""
        if self.layer_type is nn.Embedding:
            return F.embedding(x, right, self.geometry["padding_idx"])
        if not self.kernel:
            return F.linear(x, right.mT)
        return _convolve(x, self.first_weight(right), None, self.halves[0])

    def apply_second(self, between: Tensor, left: Tensor, bias: Tensor | None) -> Tensor:
        """What the second of two layers makes of them: left (m, k)."""
        if not self.kernel:
            return F.linear(between, left, bias)
        return _convolve(between, self.second_weight(left), bias, self.halves[1])

    @property
    def output_is_product(self) -> bool:
        """Whether the layer's output is the product of its matrix itself, and no sum of shifted ones."""
        return not self.kernel or (self.conv_mode == "channel" and not self.transposed)

    def by_input(self, between: Tensor) -> Tensor:
        """The rank's features of each input, (inputs, positions, groups * k)."""
        if not self.kernel:
            return between.reshape(len(between) if between.ndim > 1 else 1, -1, between.shape[-1])
        batched = between if between.ndim == len(self.kernel) + 2 else between.unsqueeze(0)
        return batched.movedim(1, -1).flatten(1, -2)

    # What it costs: multiply-accumulates for an input of (..., channels, *sizes), of (..., features) without a kernel,
    # and of (...) for a lookup

    def dense_macs(self, input_shape: tuple[int, ...]) -> int:
        """Of the dense layer; none for a lookup."""
        if self.layer_type is nn.Embedding:
            return 0
        return self._positions(input_shape, self.transposed) * self.dense_params

    def macs_per_rank(self, input_shape: tuple[int, ...]) -> int:
        """Of each rank of two layers."""
        m, n = self.matrix_shape
        if self.layer_type is nn.Embedding:
            return prod(input_shape) * m
        first = second = self._positions(input_shape, self.transposed)
        if self.conv_mode == "spatial":
            between = self._positions(input_shape, along_last=False)
            first, second = (first, between) if self.transposed else (between, second)
        return self.groups * (first * n + second * m)

    def _positions(self, input_shape: tuple[int, ...], of_input: bool = False, along_last: bool = True) -> int:
        """Positions of the input, or of the output along every axis or along all but the last, in the whole batch."""
        if not self.kernel:
            return prod(input_shape[:-1])
        axes = len(self.kernel)
        batch, sizes = input_shape[: -axes - 1], input_shape[-axes:]
        if not of_input:
            outside = axes if along_last else axes - 1
            sizes = (*(self._output_size(axis, sizes[axis]) for axis in range(outside)), *sizes[outside:])
        return prod(batch) * prod(sizes)

    def _output_size(self, axis: int, size: int) -> int:
        geometry, padding = self.geometry, 0
        stride, reach = geometry["stride"][axis], geometry["dilation"][axis] * (self.kernel[axis] - 1)
        if geometry["padding"] == "same":
            padding = reach
        elif geometry["padding"] != "valid":
            padding = 2 * int(geometry["padding"][axis])
        if self.transposed:
            return int((size - 1) * stride - padding + reach + geometry["output_padding"][axis] + 1)
        return int((size + padding - reach - 1) // stride + 1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, half: Half) -> Tensor:
    """What a plain convolution of this type and geometry does, padding modes included."""
    options = dict(half.geometry)
    mode = options.pop("padding_mode", "zeros")
    # The output's layout follows the weight's strides, even those of dimensions of size 1. Plain ones leave the choice
    # to the input, as in the dense layer; otherwise a later `.view` in the user's model may fail.
    weight = weight.reshape(-1).view(weight.shape)
    if mode != "zeros":
        x = F.pad(x, _pad_amounts(half.kernel, options), mode=mode)
        options["padding"] = 0
    out: Tensor = CONVOLUTIONS[half.layer_type](x, weight, bias, **options)
    return out


def _pad_amounts(kernel: tuple[int, ...], options: dict[str, Any]) -> list[int]:
    """What F.pad takes: both sides of the last axis, of the one before it, ..."""
    if options["padding"] == "valid":
        return [0, 0] * len(kernel)
    if options["padding"] == "same":
        totals = [d * (k - 1) for d, k in zip(options["dilation"], kernel, strict=True)]
        return [amount for total in reversed(totals) for amount in (total // 2, total - total // 2)]
    return [amount for pad in reversed(options["padding"]) for amount in (pad, pad)]
