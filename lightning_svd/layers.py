"""Layers whose weight is a trainable singular value decomposition.

A layer owns full-size U (m, r), s (r,), V (n, r) and a persistent mask of the kept ranks, so that the shapes of its
parameters never change while a model trains. The forward pass gathers the kept ranks and computes in the cheaper of
two ways: rebuild W and apply it once, or apply the two factors one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_svd.factorization import Factors, reconstruct, svd, truncate, wide
from lightning_svd.pairs import bias_of, empty_dense, factored_pair, fill, is_pair, merged_weight
from lightning_svd.views import CONVOLUTIONS, Half, View

TrainedAs = Literal["svd", "pair", "dense"]


class SVDLayer(nn.Module):
    """What all factorised layers share: the factors, the kept ranks, the ``weight`` they stand for.

    Attributes:
        view: How the dense layer's weight is seen as a matrix.
        U: Left singular vectors (m, r); with groups (groups, m, r), and s and V likewise.
        s: Singular values (r,); training may make them negative, only their magnitude counts.
        V: Right singular vectors (n, r).
        mask: Boolean buffer (r,): which ranks are kept, as it is saved.
        kept: Indices of the kept ranks, or None for all: what the arithmetic goes by. It follows :meth:`keep` and
            loading, and nothing else: what averages or swaps a model's buffers leaves it alone.
        bias: As in the dense layer.
        weight_reads: How often ``weight`` was read from outside.
        trained_as: "svd": U, s and V are trained. "pair": U and V are, s is part of them, and 1. "dense": the longer of
            U and V is, s is 1 and the other the identity.
        stays_whole: Whether the model itself reads ``weight``, which two layers in the place of one do not have.
    """

    U: nn.Parameter
    s: nn.Parameter
    V: nn.Parameter
    mask: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any, view: View, name: str = "weight", factors: Factors | None = None) -> None:
        """Factorise ``layer``; its bias is taken over as it is, the same tensor.

        Args:
            layer: The dense layer; left unchanged.
            view: Of its weight.
            name: What to call it in an error.
            factors: To be taken instead of the SVD of its weight.

        Raises:
            ValueError: If the weight holds NaN or infinity.
        """
        super().__init__()
        self.view = view
        if factors is None:
            factors = svd(view.unfold(layer.weight), name)
        for factor, value in zip("UsV", factors, strict=True):
            trained = nn.Parameter(value.to(layer.weight.dtype).contiguous(), layer.weight.requires_grad)
            setattr(self, factor, trained)
        self.register_parameter("bias", bias_of(layer))
        self.kept: Tensor | None = None
        self.trained_as: TrainedAs = "svd"
        self.weight_reads, self.stays_whole = 0, False
        self.register_buffer("mask", self.kept_mask())

    @property
    def trained(self) -> bool:
        """Whether any factor is."""
        return self.U.requires_grad or self.s.requires_grad or self.V.requires_grad

    @property
    def full_rank(self) -> int:
        """How many ranks the factors have room for."""
        return self.s.shape[-1]

    @property
    def rank(self) -> int:
        """How many ranks are kept."""
        return self.full_rank if self.kept is None else self.kept.numel()

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the layer seen as a matrix, of each group."""
        return self.view.matrix_shape

    @property
    def conv_mode(self) -> str | None:
        """The matrix that a convolution is seen as; None for other layers."""
        return self.view.conv_mode

    @property
    def weight(self) -> Tensor:
        """The dense weight these factors stand for, in the dense layer's shape, differentiable."""
        self.weight_reads += 1
        return self.rebuilt()

    def rebuilt(self) -> Tensor:
        """The dense weight, differentiable, not counted as a read."""
        return self.view.fold(self.matrix())

    def matrix(self) -> Tensor:
        """W of shape (m, n), differentiable."""
        if self.trained_as != "dense":
            return reconstruct(*self.factors())
        matrix = self.U if self._tall else self.V.mT
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # DistributedDataParallel waits for a gradient of every parameter.
            for constant in self.untrained:
                matrix = matrix + 0.0 * constant.sum()
        return matrix

    @property
    def _tall(self) -> bool:
        """Whether U is the longer of U and V, or as long."""
        return self.U.shape[-2] >= self.V.shape[-2]

    @property
    def untrained(self) -> tuple[nn.Parameter, ...]:
        """The factors that are constants in the way in which the layer is trained."""
        if self.trained_as == "svd":
            return ()
        return (self.s,) if self.trained_as == "pair" else (self.s, self.V if self._tall else self.U)

    def fold(self, factors: Factors) -> Tensor:
        """The dense weight that these or other factors of this layer's shape stand for."""
        return self.view.fold(reconstruct(*factors))

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
            return torch.ones(self.full_rank, dtype=torch.bool, device=self.s.device)
        none = torch.zeros(self.full_rank, dtype=torch.bool, device=self.s.device)
        return none.index_fill_(0, self.kept.to(self.s.device), True)

    def _gather_from_mask(self) -> None:
        self.kept = None if bool(self.mask.all()) else self.mask.nonzero().squeeze(1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # nn.Module's only place that is told about a child's load; `kept` must follow the loaded mask.
        super()._load_from_state_dict(*args, **kwargs)
        self._gather_from_mask()

    @torch.no_grad()
    def energies(self) -> Tensor:
        """What each rank carries, (s |u| |v|)^2 summed over groups, shape (r,), in float32 or wider.

        The sum is |W|_F^2 when U and V are orthonormal.
        """
        U, s, V = map(wide, (self.U, self.s, self.V))
        energies = s.square() * U.square().sum(-2) * V.square().sum(-2)
        return energies if energies.ndim == 1 else energies.sum(0)

    def singular_values(self) -> Tensor:
        """The kept ones in descending order, (k,), the root of the sum of squares over groups.

        They are read off as what each rank carries, |s| |u| |v|; but where U and V are not kept orthogonal, they cost
        an SVD of k x k.
        """
        energies = self.energies()
        kept = energies if self.kept is None else energies[self.kept.to(energies.device)]
        if self.trained_as != "svd" and torch.isfinite(kept).all():
            exact = self.refactorised().s.square()
            kept = exact if exact.ndim == 1 else exact.sum(0)
        return kept.sqrt().sort(descending=True).values

    def spectrum(self) -> list[float]:
        """:meth:`singular_values` as numbers."""
        return cast("list[float]", self.singular_values().tolist())

    def full_spectrum(self) -> list[float]:
        """As :meth:`spectrum`, for all ranks, dropped ones as they were then."""
        if self.trained_as == "dense":
            return self.spectrum()
        return cast("list[float]", self.energies().sqrt().sort(descending=True).values.tolist())

    @torch.no_grad()
    def refactorised(self, name: str = "weight") -> Factors:
        """The exact SVD of what the kept ranks stand for: U (m, k), s (k,), V (n, k), in float32 or wider.

        While U and V train they are orthonormal only about, and then the weakest of their rank-one terms is not what
        the layer can best do without. Costs two QR decompositions and an SVD of k x k.

        Args:
            name: What to call the layer in an error.

        Raises:
            ValueError: If a factor holds NaN or infinity.
        """
        if self.rank == 0:
            return self.factors()
        U, s, V = map(wide, self.factors())
        with torch.autocast(s.device.type, enabled=False):
            (left, upper), (right, lower) = torch.linalg.qr(U), torch.linalg.qr(V)
            inner = svd(upper * s.unsqueeze(-2) @ lower.mT, name)
            return Factors(left @ inner.U, inner.s, right @ inner.V)

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Take these in the place of the kept ranks, the strongest in the place of the strongest, signs as before.

        An optimizer's memory of a rank then goes on with the rank that is most like it.

        Args:
            factors: U (m, k), s (k,) in descending order, V (n, k), of any dtype.
        """
        kept = torch.arange(self.full_rank, device=self.s.device) if self.kept is None else self.kept
        columns = kept[self.energies()[kept].argsort(descending=True)]
        U, s, V = (factor.to(self.s) for factor in factors)
        flipped = (U * self.U.index_select(-1, columns)).sum(-2, keepdim=True) < 0
        U, V = U.where(~flipped, -U), V.where(~flipped, -V)
        for parameter, factor in ((self.U, U), (self.s, s), (self.V, V)):
            parameter.index_copy_(-1, columns, factor)
        if self.trained_as == "dense":
            self.trained_as = "svd"

    @torch.no_grad()
    def join(self) -> None:
        """Put all of the weight into the longer of U and V, to be trained as the dense layer until factors are set.

        Only while every rank is kept. What the layer computes stays as it is.
        """
        matrix = reconstruct(*map(wide, (self.U, self.s, self.V)))
        weight, identity = (self.U, self.V) if self._tall else (self.V, self.U)
        weight.copy_(matrix if self._tall else matrix.mT)
        identity.copy_(torch.eye(self.full_rank))
        self.s.fill_(1.0)
        self.trained_as = "dense"

    @torch.no_grad()
    def merge(self) -> None:
        """Put sqrt|s| into U and V each, with its sign in U, and 1 in its place: two plain factors from now on.

        What the layer computes, and what each rank carries, stay as they are.
        """
        U, s, V = map(wide, (self.U, self.s, self.V))
        root = s.abs().sqrt()
        self.U.copy_(U * (root * s.sign()).unsqueeze(-2))
        self.V.copy_(V * root.unsqueeze(-2))
        self.s.fill_(1.0)
        self.trained_as = "pair"

    @torch.no_grad()
    def compact(self) -> None:
        """Drop the storage of the pruned ranks; not while an optimizer holds the factors."""
        # clone: a view would keep, and save, the whole storage.
        for name, value in zip("UsV", self.factors(), strict=True):
            setattr(self, name, nn.Parameter(value.detach().clone(), getattr(self, name).requires_grad))
        self.kept = None
        self.mask = self.kept_mask()

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight."""
        return self.view.dense_params

    @property
    def params_per_rank(self) -> int:
        """Entries that one rank costs in two plain layers, s merged into them."""
        return self.view.params_per_rank

    def dense_macs(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of the dense layer for an input of this shape, batch included."""
        return self.view.dense_macs(input_shape)

    def macs_per_rank(self, input_shape: tuple[int, ...]) -> int:
        """Multiply-accumulates of each rank when two factors are applied to an input of this shape."""
        return self.view.macs_per_rank(input_shape)

    def rebuilding_is_cheaper(self, input_shape: tuple[int, ...]) -> bool:
        """Whether k*m*n to rebuild W plus the dense layer costs no more than applying two factors of rank k."""
        rank, view = self.rank, self.view
        rebuild = rank * view.dense_params + view.dense_macs(input_shape)
        return rank == 0 or self.trained_as == "dense" or rebuild <= rank * view.macs_per_rank(input_shape)

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
    def dense(self) -> nn.Module:
        """A new plain layer with the weight these factors stand for."""
        return fill(empty_dense(self.view, self.bias is not None), self.rebuilt(), self)

    @torch.no_grad()
    def factored(self) -> nn.Sequential:
        """Two new plain layers in sequence, of the kept rank (1 if none is kept), sqrt|s| merged into each."""
        U, V = self._balanced()
        pair = factored_pair(self.view, U.shape[-1], self.bias is not None)
        for layer, weight in zip(pair, (self.view.first_weight(V), self.view.second_weight(U)), strict=True):
            fill(layer, weight, self)
        return pair.train(self.training)

    def _balanced(self) -> tuple[Tensor, Tensor]:
        """Detached left (m, k) and right (n, k) factors of equal scale, so that neither overflows in half precision."""
        U, s, V = self.factors()
        if self.rank == 0:
            U, s, V = (factor.new_zeros(*factor.shape[:-1], 1) for factor in (U, s, V))
        root = s.abs().sqrt()
        return (U * (root * s.sign()).unsqueeze(-2)).detach(), (V * root.unsqueeze(-2)).detach()

    def _describe(self) -> str:
        return f"rank={self.rank}/{self.full_rank}, bias={self.bias is not None}"


class SVDLinear(SVDLayer):
    """``nn.Linear`` with weight (out, in) = U diag(s) V^T, or the Conv1D of transformers, whose weight is (in, out)."""

    def __init__(self, linear: nn.Module, name: str = "weight", factors: Factors | None = None) -> None:
        """Factorise ``linear``; arguments as for :class:`SVDLayer`."""
        super().__init__(linear, View.of(linear), name, factors)

    def forward_rebuilt(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix(), self.bias)

    def forward_factored(self, x: Tensor) -> Tensor:
        return self.as_function()(x)

    def as_function(self) -> Callable[[Tensor], Tensor]:
        """:meth:`forward_factored` for many calls, for which the kept ranks are gathered once."""
        U, s, V = self.factors()
        left, right = U * s, V.mT
        return lambda x: F.linear(F.linear(x, right), left, self.bias)

    @property
    def in_features(self) -> int:
        """As in ``nn.Linear``."""
        return self.view.inputs

    @property
    def out_features(self) -> int:
        """As in ``nn.Linear``."""
        return self.view.outputs

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self._describe()}"


class SVDEmbedding(SVDLayer):
    """``nn.Embedding`` with weight (entries, features) = V diag(s) U^T: a lookup in V, then a linear layer."""

    def __init__(self, embedding: nn.Module, name: str = "weight", factors: Factors | None = None) -> None:
        """Factorise ``embedding``; arguments as for :class:`SVDLayer`."""
        super().__init__(embedding, View.of(embedding), name, factors)
        # Under their own names, for code that reads an embedding's.
        self.num_embeddings, self.embedding_dim = self.view.inputs, self.view.outputs
        self.padding_idx: int | None = self.view.geometry["padding_idx"]

    def forward_rebuilt(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.rebuilt(), self.padding_idx)

    def forward_factored(self, x: Tensor) -> Tensor:
        U, s, V = self.factors()
        return F.linear(F.embedding(x, V, self.padding_idx), U * s)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}, {self._describe()}"


class SVDConv(SVDLayer):
    """A convolution, plain or transposed, of one to three axes, whose weight, seen as a matrix, is U diag(s) V^T.

    For ``nn.Conv2d`` with weight (out, in, kh, kw): in mode "channel" the matrix is (out, in*kh*kw), a convolution to r
    maps, then one of 1x1; in mode "spatial" it is (out*kw, in*kh), a convolution of kh x 1, then one of 1 x kw (Yang et
    al. 2020, section 3.1). See :class:`~lightning_svd.views.View` for the others.
    """

    def __init__(
        self, conv: nn.Module, conv_mode: str = "channel", name: str = "weight", factors: Factors | None = None
    ) -> None:
        """Factorise ``conv``.

        Args:
            conv: The dense layer; left unchanged.
            conv_mode: "channel" or "spatial".
            name: What to call it in an error.
            factors: To be taken instead of the SVD of its weight.

        Raises:
            ValueError: If the weight holds NaN or infinity, or the mode is unknown.
        """
        super().__init__(conv, View.of(conv, conv_mode), name, factors)
        # Under their own names, for code that reads a convolution's.
        self.in_channels, self.out_channels, self.kernel_size = self.view.inputs, self.view.outputs, self.view.kernel
        for attribute, value in (self.view.geometry or {}).items():
            setattr(self, attribute, value)

    def rebuilding_is_cheaper(self, input_shape: tuple[int, ...]) -> bool:
        # An input of another shape is the dense convolution's to refuse.
        axes = len(self.view.kernel)
        return len(input_shape) not in (axes + 1, axes + 2) or super().rebuilding_is_cheaper(input_shape)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """As :meth:`SVDLayer.forward`.

        Raises:
            NotImplementedError: If an ``output_size`` is given, which two layers in sequence could not take.
        """
        if output_size is not None:
            raise NotImplementedError(
                "a factorised transposed convolution takes no `output_size`: build the layer with `output_padding`, or "
                "leave it out by `exclude_modules`"
            )
        return super().forward(input)

    def forward_rebuilt(self, x: Tensor) -> Tensor:
        return _convolve(x, self.rebuilt(), self.bias, self.view.whole)

    def forward_factored(self, x: Tensor) -> Tensor:
        if self.rank == 0:
            return self.forward_rebuilt(x)  # there is no convolution to no maps
        U, s, V = self.factors()
        first, second = self.view.halves
        maps = _convolve(x, self.view.first_weight(V), None, first)
        return _convolve(maps, self.view.second_weight(U * s.unsqueeze(-2)), self.bias, second)

    def extra_repr(self) -> str:
        geometry = {"kernel_size": self.kernel_size, **(self.view.geometry or {}), "conv_mode": self.conv_mode}
        options = ", ".join(f"{name}={value!r}" for name, value in geometry.items())
        return f"{self.in_channels}, {self.out_channels}, {options}, {self._describe()}"


def svd_layer(
    layer: nn.Module, conv_mode: str | None = None, name: str = "weight", factors: Factors | None = None
) -> SVDLayer:
    """The factorised layer for a plain one of any supported type; arguments as for :class:`SVDConv`."""
    if conv_mode is not None:
        return SVDConv(layer, conv_mode, name, factors)
    kind = SVDEmbedding if isinstance(layer, nn.Embedding) else SVDLinear
    return kind(layer, name, factors)


def dense_weight(layer: Any) -> Tensor:
    """The dense weight of a layer that is plain, factorised, or a pair of plain ones; differentiable."""
    if isinstance(layer, SVDLayer):
        return layer.rebuilt()
    weight: Tensor = merged_weight(layer, layer[0].weight, layer[1].weight) if is_pair(layer) else layer.weight
    return weight


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
