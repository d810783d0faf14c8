"""Ranks, orthogonality and compression as torchmetrics metrics.

Each takes one layer, or one factor, at a time and gives a mean or a ratio over all that it was given, in every
process: processes that hold the same layers get the value of one of them, and processes that share the layers among
themselves get the value of all. A matrix of zeros has rank 0, and singular values that are not finite make a mean NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_svd.arguments import check_share
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import effective_rank, energy_rank, exact_products, gram_defect, stable_rank, wide
from lightning_svd.layers.matrices import singular_values as singular_values_of
from lightning_svd.layers.views import View, supported_type


@torch.no_grad()
def singular_values(layer: nn.Module, conv_mode: str = "channel") -> Tensor:
    """The singular values of a layer's weight seen as a matrix.

    Args:
        layer: A factorized layer, whose kept ones are read off, or any layer with a weight of two dimensions or of a
            convolution, which costs an SVD in float32 or wider. The weight is not changed.
        conv_mode: The matrix a plain convolution is seen as, "channel" or "spatial".

    Returns:
        In descending order, (r,), the root of the sum of squares over groups, on the layer's device; all NaN if a
        weight is not finite.

    Raises:
        ValueError: If the layer has no such weight.
    """
    if isinstance(layer, SVDLayer):
        return layer.singular_values()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        raise ValueError(f"`layer` must have a weight of two dimensions or more, got {type(layer).__name__}")
    matrix = View.of(layer, conv_mode).unfold(weight) if supported_type(layer) else weight.flatten(1)
    values = singular_values_of(matrix)
    return values if values.ndim == 1 else torch.linalg.vector_norm(values, dim=0)


class _MeanRank(Metric):
    """The mean over layers of one notion of rank."""

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    layers: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("layers", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, spectrum: Tensor) -> None:
        """Add a layer.

        Args:
            spectrum: Its singular values (r,), in any order; see :func:`singular_values`.

        Raises:
            ValueError: If it has another shape.
        """
        if spectrum.ndim != 1:
            raise ValueError(f"`spectrum` must be singular values of shape (r,), got {tuple(spectrum.shape)}")
        self.total += self.rank(spectrum) if torch.isfinite(spectrum).all() else math.nan
        self.layers += 1

    def compute(self) -> Tensor:
        """The mean over layers."""
        return self.total / self.layers

    def rank(self, spectrum: Tensor) -> float:
        """Of one layer with these finite singular values."""
        raise NotImplementedError


class StableRank(_MeanRank):
    """Mean of ``|W|_F^2 / |W|_2^2``, between 1 and the rank (Rudelson and Vershynin 2007).

    Args:
        options: As for ``torchmetrics.Metric``.

    Example:
        >>> metric = StableRank()
        >>> metric.update(torch.tensor([2.0, 1.0, 1.0]))
        >>> metric.compute()
        tensor(1.5000)
    """

    def rank(self, spectrum: Tensor) -> float:
        return stable_rank(spectrum)


class EffectiveRank(_MeanRank):
    """Mean of ``exp(entropy(s / sum(s)))``, between 1 and the rank (Roy and Vetterli 2007).

    Args:
        options: As for ``torchmetrics.Metric``.

    Example:
        >>> metric = EffectiveRank()
        >>> metric.update(torch.ones(4))
        >>> metric.compute()
        tensor(4.)
    """

    def rank(self, spectrum: Tensor) -> float:
        return effective_rank(spectrum)


class EnergyRank(_MeanRank):
    """Mean of the fewest ranks that hold a share of a layer's energy, the sum of s^2.

    Args:
        threshold: The share, in (0, 1].
        options: As for ``torchmetrics.Metric``.

    Raises:
        ValueError: If ``threshold`` is out of range.

    Example:
        >>> metric = EnergyRank(0.9)
        >>> metric.update(torch.tensor([3.0, 2.0, 1.0]))  # energies 9, 4 and 1
        >>> metric.compute()
        tensor(2.)
    """

    def __init__(self, threshold: float, **options: Any) -> None:
        check_share("threshold", threshold)
        super().__init__(**options)
        self.threshold = threshold

    def rank(self, spectrum: Tensor) -> float:
        return energy_rank(spectrum, self.threshold)


class OrthogonalityError(Metric):
    """Root mean square of ``|A^T A - I|_F`` per rank over factors A; 0 where all columns are orthonormal.

    Args:
        options: As for ``torchmetrics.Metric``.

    Example:
        >>> metric = OrthogonalityError()
        >>> metric.update(torch.eye(3)[:, :2])
        >>> metric.compute()
        tensor(0.)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    squares: Tensor
    ranks: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("squares", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("ranks", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, factor: Tensor) -> None:
        """Add a factor, or several of one shape.

        Args:
            factor: U or V of a layer, (n, r), or (..., n, r).

        Raises:
            ValueError: If it has another shape.
        """
        if factor.ndim < 2:
            raise ValueError(f"`factor` must have shape (..., n, r), got {tuple(factor.shape)}")
        with exact_products(factor.device):
            self.squares += gram_defect(wide(factor)).square().sum()
        self.ranks += factor.shape[:-2].numel() * factor.shape[-1]

    def compute(self) -> Tensor:
        """The root mean square."""
        return (self.squares / self.ranks).sqrt()


class CompressionRatio(Metric):
    """Remaining cost as a share of the dense cost, over all layers or models that were given.

    The cost is what you count: multiply-accumulates, parameters, bytes.

    Args:
        options: As for ``torchmetrics.Metric``.

    Example:
        >>> metric = CompressionRatio()
        >>> metric.update(kept=30, dense=100)
        >>> metric.update(kept=200, dense=200)
        >>> metric.compute()
        tensor(0.7667)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    kept: Tensor
    dense: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Whole numbers: a model's multiply-accumulates are past what float32 counts one by one.
        self.add_state("kept", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("dense", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, kept: int, dense: int) -> None:
        """Add a layer, or a model.

        Args:
            kept: What it costs now.
            dense: What it costs as a dense layer.

        Raises:
            ValueError: If ``kept`` is negative or ``dense`` is not positive.
        """
        if kept < 0 or dense <= 0:
            raise ValueError(f"`kept` must be >= 0 and `dense` > 0, got {kept!r} and {dense!r}")
        self.kept += int(kept)
        self.dense += int(dense)

    def compute(self) -> Tensor:
        """The ratio."""
        return self.kept / self.dense
