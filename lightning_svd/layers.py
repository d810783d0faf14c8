"""Layers whose weight is a trainable singular value decomposition.

A layer owns full-size U (m, r), s (r,), V (n, r) and a persistent mask of the kept ranks, so that the shapes of its
parameters never change while a model trains. The forward pass gathers the kept ranks and computes in the cheaper of
two ways: rebuild W and apply it once, or apply the two factors one after the other.
"""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_svd.factorization import Factors, reconstruct, svd, truncate
from lightning_svd.pairs import (
    CONV_MODES,
    empty_dense,
    factored_pair,
    fill,
    fold_conv_weight,
    geometry,
    kernel,
    stages,
    unfold_conv_weight,
)


class SVDLayer(nn.Module):
    """What all factorised layers share: the factors, the kept ranks, the ``weight`` they stand for.

    Attributes:
        U: Left singular vectors (m, r).
        s: Singular values (r,); training may make them negative, only their magnitude counts.
        V: Right singular vectors (n, r).
        mask: Boolean buffer (r,): which ranks are kept, as it is saved.
        kept: Indices of the kept ranks, or None for all: what the arithmetic goes by. It follows :meth:`keep` and
            loading, and nothing else: what averages or swaps a model's buffers leaves it alone.
        bias: As in the dense layer.
        matrix_shape: (m, n), outputs and inputs of the layer seen as a matrix.
        dense_kind: Name of the dense layer's class.
    """

    dense_kind: ClassVar[str]

    U: nn.Parameter
    s: nn.Parameter
    V: nn.Parameter
    mask: Tensor
    bias: Tensor | None

    def __init__(self, factors: Factors, bias: Tensor | None, requires_grad: bool = True) -> None:
        super().__init__()
        self.matrix_shape = factors.U.shape[0], factors.V.shape[0]
        self.U = nn.Parameter(factors.U, requires_grad)
        self.s = nn.Parameter(factors.s, requires_grad)
        self.V = nn.Parameter(factors.V, requires_grad)
        self.register_parameter("bias", cast("nn.Parameter | None", bias))
        self.register_buffer("mask", torch.ones_like(factors.s, dtype=torch.bool))
        self.kept: Tensor | None = None

    @property
    def full_rank(self) -> int:
        """How many ranks the factors have room for."""
        return self.s.numel()

    @property
    def rank(self) -> int:
        """How many ranks are kept."""
        return self.full_rank if self.kept is None else self.kept.numel()

    @property
    def weight(self) -> Tensor:
        """The dense weight these factors stand for, in the dense layer's shape, differentiable."""
        return self.fold(self.factors())

    def fold(self, factors: Factors) -> Tensor:
        """The dense weight that these or other factors of this layer's shape stand for."""
        return self._fold(reconstruct(*factors))

    def factors(self) -> Factors:
        """The kept U (m, k), s (k,), V (n, k), differentiable."""
        full = Factors(self.U, self.s, self.V)
        if self.kept is None:
            return full
        if self.kept.device != self.s.device:
            self.kept = self.kept.to(self.s.device)
        return truncate(full, self.kept)

    @torch.no_grad()
    def keep(self, mask: Tensor) -> None:
        """Keep exactly these ranks; ones dropped earlier may come back.

        Args:
            mask: Boolean (r,).

        Raises:
            ValueError: If the shape or dtype is another.
        """
        if mask.shape != self.mask.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"`mask` must be bool of shape {tuple(self.mask.shape)}, got {mask.dtype} {tuple(mask.shape)}"
            )
        self.mask.copy_(mask)
        self._gather_from_mask()

    def kept_mask(self) -> Tensor:
        """Boolean (r,): the ranks the arithmetic goes by."""
        if self.kept is None:
            return torch.ones_like(self.s, dtype=torch.bool)
        return torch.zeros_like(self.s, dtype=torch.bool).index_fill_(0, self.kept.to(self.s.device), True)

    def _gather_from_mask(self) -> None:
        self.kept = None if bool(self.mask.all()) else self.mask.nonzero().squeeze(1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # nn.Module's only place that is told about a child's load; `kept` must follow the loaded mask.
        super()._load_from_state_dict(*args, **kwargs)
        self._gather_from_mask()

    @torch.no_grad()
    def energies(self) -> Tensor:
        """What each rank carries, (s |u| |v|)^2, shape (r,), in float32 or wider.

        The sum is |W|_F^2 when U and V are orthonormal.
        """
        U, s, V = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (self.U, self.s, self.V))
        return s.square() * U.square().sum(0) * V.square().sum(0)

    def spectrum(self) -> list[float]:
        """The kept singular values' magnitudes in descending order."""
        return _descending(self.factors().s)

    def full_spectrum(self) -> list[float]:
        """All singular values' magnitudes in descending order, dropped ones as they were then."""
        return _descending(self.s)

    @torch.no_grad()
    def compact(self) -> None:
        """Drop the storage of the pruned ranks; not while an optimizer holds the factors."""
        # clone: a view would keep, and save, the whole storage.
        for name, value in zip("UsV", self.factors(), strict=True):
            setattr(self, name, nn.Parameter(value.detach().clone(), getattr(self, name).requires_grad))
        self.mask = torch.ones_like(self.s, dtype=torch.bool)
        self.kept = None

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight."""
        m, n = self.matrix_shape
        return m * n

    @property
    def params_per_rank(self) -> int:
        """Entries that one rank costs in two plain layers, s merged into them."""
        return sum(self.matrix_shape)

    def dense_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of the dense layer for an input of this shape, batch included."""
        raise NotImplementedError

    def macs_per_rank(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of each rank when two factors are applied to an input of this shape."""
        raise NotImplementedError

    def rebuilding_is_cheaper(self, input_shape: tuple[int, ...]) -> bool:
        """Whether k*m*n to rebuild W plus the dense layer costs no more than applying two factors of rank k."""
        rank = self.rank
        rebuild = rank * self.dense_params + self.dense_macs(input_shape)
        return rank == 0 or rebuild <= rank * self.macs_per_rank(input_shape)

    def forward(self, input: Tensor) -> Tensor:  # its name is the dense layer's, for calls by keyword
        """The dense layer's output, computed in the cheaper way for this input."""
        return self.forward_rebuilt(input) if self.rebuilding_is_cheaper(input.shape) else self.forward_factored(input)

    def forward_rebuilt(self, x: Tensor) -> Tensor:
        """Rebuild W, then apply it as the dense layer does."""
        raise NotImplementedError

    def forward_factored(self, x: Tensor) -> Tensor:
        """Apply V, then U, never forming W."""
        raise NotImplementedError

    @torch.no_grad()
    def dense(self) -> nn.Linear | nn.Conv2d:
        """A new plain layer with the weight these factors stand for."""
        return fill(empty_dense(self), self.weight, self)

    @torch.no_grad()
    def factored(self) -> nn.Sequential:
        """Two new plain layers in sequence, of the kept rank (1 if none is kept), sqrt|s| merged into each."""
        U, V = self._balanced()
        pair = factored_pair(self, max(1, self.rank), getattr(self, "conv_mode", None))
        for layer, weight in zip(pair, (self._fold_right(V), self._fold_left(U)), strict=True):
            fill(layer, weight, self)
        return pair

    def _fold(self, matrix: Tensor) -> Tensor:
        """A matrix (m, n) in the shape of the dense weight."""
        raise NotImplementedError

    def _fold_right(self, V: Tensor) -> Tensor:
        """V (n, k) as the weight of the first of two plain layers."""
        raise NotImplementedError

    def _fold_left(self, U: Tensor) -> Tensor:
        """U (m, k) as the weight of the second of two plain layers."""
        raise NotImplementedError

    def _balanced(self) -> tuple[Tensor, Tensor]:
        """Detached left (m, k) and right (n, k) factors of equal scale, so that neither overflows in half precision."""
        U, s, V = self.factors()
        if self.rank == 0:
            U, s, V = (factor.new_zeros(*factor.shape[:-1], 1) for factor in (U, s, V))
        root = s.abs().sqrt()
        return (U * (root * s.sign())).detach(), (V * root).detach()

    def _describe(self) -> str:
        return f"rank={self.rank}/{self.full_rank}, bias={self.bias is not None}"


class SVDLinear(SVDLayer):
    """``nn.Linear`` with weight (out, in) = U diag(s) V^T."""

    dense_kind = "Linear"

    def __init__(self, linear: nn.Linear, name: str = "weight", factors: Factors | None = None) -> None:
        """Factorise ``linear``; its bias is taken over as it is, the same tensor.

        Args:
            linear: The dense layer; left unchanged.
            name: What to call it in an error.
            factors: To be taken instead of the SVD of its weight.

        Raises:
            ValueError: If the weight holds NaN or infinity.
        """
        weight = linear.weight
        super().__init__(factors or _factors_like(weight, weight, name), linear.bias, weight.requires_grad)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def dense_macs(self, input_shape: tuple[int, ...]) -> int:
        return _positions(input_shape) * self.dense_params

    def macs_per_rank(self, input_shape: tuple[int, ...]) -> int:
        return _positions(input_shape) * self.params_per_rank

    def forward_rebuilt(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def forward_factored(self, x: Tensor) -> Tensor:
        U, s, V = self.factors()
        return F.linear(F.linear(x, V.mT), U * s, self.bias)

    def _fold(self, matrix: Tensor) -> Tensor:
        return matrix

    def _fold_right(self, V: Tensor) -> Tensor:
        return V.mT

    def _fold_left(self, U: Tensor) -> Tensor:
        return U

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class SVDConv2d(SVDLayer):
    """``nn.Conv2d`` whose weight (out, in, kh, kw), seen as a matrix, is U diag(s) V^T.

    In mode "channel" the matrix is (out, in*kh*kw): a convolution to r maps, then one of 1x1. In mode "spatial" it is
    (out*kw, in*kh): a convolution of kh x 1, then one of 1 x kw (Yang et al. 2020, section 3.1).
    """

    dense_kind = "Conv2d"

    def __init__(
        self, conv: nn.Conv2d, conv_mode: str = "channel", name: str = "weight", factors: Factors | None = None
    ) -> None:
        """Factorise ``conv``; its bias is taken over as it is, the same tensor.

        Args:
            conv: The dense layer, without groups; left unchanged.
            conv_mode: "channel" or "spatial".
            name: What to call it in an error.
            factors: To be taken instead of the SVD of its weight.

        Raises:
            ValueError: If the weight holds NaN or infinity, the layer has groups, or the mode is unknown.
        """
        if conv_mode not in CONV_MODES:
            raise ValueError(f"`conv_mode` must be one of {', '.join(CONV_MODES)}, got {conv_mode!r}")
        if conv.groups != 1:
            raise ValueError(f"`{name}`: expected a convolution without groups, got groups={conv.groups}")
        factors = factors or _factors_like(unfold_conv_weight(conv.weight, conv_mode), conv.weight, name)
        super().__init__(factors, conv.bias, conv.weight.requires_grad)
        self.conv_mode = conv_mode
        self.in_channels, self.out_channels, self.groups = conv.in_channels, conv.out_channels, conv.groups
        self.kernel_size = kernel(conv.weight)
        self.stride, self.dilation = conv.stride, conv.dilation
        self.padding, self.padding_mode = conv.padding, conv.padding_mode

    def dense_macs(self, input_shape: tuple[int, ...]) -> int:
        images, out_h, out_w = self._output_shape(input_shape)
        return images * out_h * out_w * self.dense_params

    def macs_per_rank(self, input_shape: tuple[int, ...]) -> int:
        images, out_h, out_w = self._output_shape(input_shape)
        if self.conv_mode == "channel":
            return images * out_h * out_w * self.params_per_rank
        (m, n), in_w = self.matrix_shape, input_shape[-1]
        return images * out_h * (in_w * n + out_w * m)

    def rebuilding_is_cheaper(self, input_shape: tuple[int, ...]) -> bool:
        # An input of another shape is the dense convolution's to refuse.
        return len(input_shape) not in (3, 4) or super().rebuilding_is_cheaper(input_shape)

    def _output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Images in the batch, height and width of the output."""
        sizes = [
            _conv_size(
                input_shape[axis - 2], self.kernel_size[axis], self.stride[axis], self._pads(axis), self.dilation[axis]
            )
            for axis in (0, 1)
        ]
        return (input_shape[0] if len(input_shape) == 4 else 1), sizes[0], sizes[1]

    def _pads(self, axis: int) -> int:
        """Padding of one axis, both sides together."""
        if self.padding == "same":
            return self.dilation[axis] * (self.kernel_size[axis] - 1)
        return 0 if self.padding == "valid" else 2 * int(self.padding[axis])

    def forward_rebuilt(self, x: Tensor) -> Tensor:
        return _convolve(x, self.weight, self.bias, geometry(self), self.padding_mode)

    def forward_factored(self, x: Tensor) -> Tensor:
        if self.rank == 0:
            return self.forward_rebuilt(x)  # there is no convolution to no maps
        U, s, V = self.factors()
        first, second = stages(self, self.conv_mode)
        maps = _convolve(x, self._fold_right(V), None, first, self.padding_mode)
        return _convolve(maps, self._fold_left(U * s), self.bias, second, self.padding_mode)

    def _fold(self, matrix: Tensor) -> Tensor:
        return fold_conv_weight(matrix, (self.out_channels, self.in_channels, *self.kernel_size), self.conv_mode)

    def _fold_right(self, V: Tensor) -> Tensor:
        kh, kw = self.kernel_size
        # A contiguous matrix first: copying it as such is much faster than as a strided kernel.
        return V.mT.contiguous().reshape(-1, self.in_channels, kh, kw if self.conv_mode == "channel" else 1)

    def _fold_left(self, U: Tensor) -> Tensor:
        kw = 1 if self.conv_mode == "channel" else self.kernel_size[1]
        return U.reshape(self.out_channels, kw, -1).transpose(1, 2).unsqueeze(2)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, conv_mode={self.conv_mode!r}, {self._describe()}"
        )


def _factors_like(matrix: Tensor, weight: Tensor, name: str) -> Factors:
    """The SVD of a layer's matrix, in the dtype of its weight, each factor contiguous."""
    return Factors(*(factor.to(weight.dtype).contiguous() for factor in svd(matrix, name)))


def _descending(s: Tensor) -> list[float]:
    return s.detach().abs().float().sort(descending=True).values.tolist()


def _positions(input_shape: tuple[int, ...]) -> int:
    """How many times a linear layer is applied to an input of this shape."""
    return prod(input_shape[:-1])


def _conv_size(size: int, kernel: int, stride: int, pads: int, dilation: int) -> int:
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: dict[str, Any], padding_mode: str) -> Tensor:
    """``F.conv2d`` with nn.Conv2d's padding modes."""
    # The output's layout follows the weight's strides, even those of dimensions of size 1. Plain ones leave the choice
    # to the input, as in the dense layer; otherwise a later `.view` in the user's model may fail.
    weight = weight.reshape(-1).view(weight.shape)
    if padding_mode == "zeros":
        return F.conv2d(x, weight, bias, **geometry)
    padded = F.pad(x, _pad_amounts(weight, geometry), mode=padding_mode)
    return F.conv2d(padded, weight, bias, geometry["stride"], 0, geometry["dilation"])


def _pad_amounts(weight: Tensor, geometry: dict[str, Any]) -> list[int]:
    """What F.pad takes: left, right, top, bottom."""
    if geometry["padding"] == "valid":
        return [0, 0, 0, 0]
    if geometry["padding"] == "same":
        totals = [d * (k - 1) for d, k in zip(geometry["dilation"], weight.shape[2:], strict=True)]
        return [amount for total in reversed(totals) for amount in (total // 2, total - total // 2)]
    return [amount for pad in reversed(geometry["padding"]) for amount in (pad, pad)]
