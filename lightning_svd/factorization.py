"""Matrices and their singular value decomposition.

One convention, used in the whole package: ``W = U @ diag(s) @ V.T`` with U of shape (m, r), s of shape (r,) and V of
shape (n, r), as in :func:`torch.svd_lowrank`. The rows of W are a layer's outputs, its columns the layer's inputs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A factorised matrix, ``W = U @ diag(s) @ V.T``."""

    U: Tensor  # (m, r)
    s: Tensor  # (r,)
    V: Tensor  # (n, r)


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def svd(matrix: Tensor, name: str = "matrix") -> Factors:
    """Full-rank singular value decomposition with fixed signs.

    It is computed in float32 or wider, whatever the dtype of ``matrix``, and returned in that wider dtype. Singular
    vectors are only defined up to a sign per pair: here the entry of largest magnitude in each column of U is
    positive, so that the same weights always give the same factors.

    Args:
        matrix: Shape (m, n), or a stack of such, (..., m, n).
        name: What to call the matrix in an error, for instance the layer's name.

    Returns:
        U (m, r), s (r,) in descending order, V (n, r), with r = min(m, n), each stacked as ``matrix`` is.

    Raises:
        ValueError: If ``matrix`` holds NaN or infinity, or has no entries.

    Example:
        >>> U, s, V = svd(torch.tensor([[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]]))
        >>> U.shape, s.tolist(), V.shape
        (torch.Size([3, 2]), [3.0, 2.0], torch.Size([2, 2]))
        >>> reconstruct(U, s, V).tolist()
        [[3.0, 0.0], [0.0, -2.0], [0.0, 0.0]]
    """
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ValueError(f"`{name}`: expected a non-empty matrix, got shape {tuple(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        bad = int((~torch.isfinite(matrix)).sum())
        raise ValueError(f"`{name}`: expected finite weights, got {bad} NaN or infinite of {matrix.numel()}")
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        full = wide(matrix.detach())
        if matrix.shape[-2] >= matrix.shape[-1]:
            U, s, Vh = torch.linalg.svd(full, full_matrices=False)
            V = Vh.mT
        else:  # LAPACK takes several times as long for a wide matrix as for its transpose
            V, s, Uh = torch.linalg.svd(full.mT, full_matrices=False)
            U = Uh.mT
        signs = _column_signs(U).unsqueeze(-2)
        return Factors(U * signs, s, V * signs)


def _column_signs(U: Tensor) -> Tensor:
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True)).squeeze(-2)
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)


def reconstruct(U: Tensor, s: Tensor, V: Tensor) -> Tensor:
    """``U @ diag(s) @ V.T``, shape (..., m, n); the inverse of :func:`svd`."""
    return (U * s.unsqueeze(-2)) @ V.mT


def truncate(factors: Factors, kept: Tensor) -> Factors:
    """Only the kept rank-one terms, differentiable.

    Args:
        factors: U (..., m, r), s (..., r), V (..., n, r).
        kept: Their indices (k,); not a mask, whose count would have to be asked of the device.

    Example:
        >>> factors = svd(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        >>> reconstruct(*truncate(factors, torch.tensor([0]))).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    return Factors(*(factor.index_select(-1, kept) for factor in factors))


def roundoff(shape: tuple[int, ...], dtype: torch.dtype, factor: float = 32.0) -> float:
    """Relative error to expect of arithmetic on a matrix of this shape: ``factor * eps * sqrt(max(m, n))``."""
    return factor * torch.finfo(dtype).eps * math.sqrt(max(shape))


def numerical_rank(s: Tensor, shape: tuple[int, int]) -> int:
    """How many singular values stand out of the rounding noise, ``s > max(m, n) * eps * s_max``.

    Args:
        s: Singular values (r,), in any order, of a matrix of shape ``shape``.
        shape: (m, n).

    Example:
        >>> numerical_rank(torch.tensor([5.0, 1.0, 1e-9]), (3, 3))
        2
    """
    magnitudes = s.detach().abs()
    if magnitudes.numel() == 0:
        return 0
    threshold = max(shape) * torch.finfo(s.dtype).eps * magnitudes.max()
    return int((magnitudes > threshold).sum())


def stable_rank(s: Tensor) -> float:
    """``|W|_F^2 / |W|_2^2``, between 1 and the rank; 0 for a zero matrix (Rudelson and Vershynin 2007).

    Args:
        s: Singular values (r,), in any order.

    Example:
        >>> stable_rank(torch.ones(4)), stable_rank(torch.tensor([2.0, 1.0, 1.0]))
        (4.0, 1.5)
    """
    scaled = _scaled(s)
    return float(scaled.square().sum())


def effective_rank(s: Tensor) -> float:
    """``exp(entropy(s / sum(s)))``, between 1 and the rank; 0 for a zero matrix (Roy and Vetterli 2007).

    Args:
        s: Singular values (r,), in any order.

    Example:
        >>> round(effective_rank(torch.ones(4)), 3), round(effective_rank(torch.tensor([2.0, 1.0, 1.0])), 3)
        (4.0, 2.828)
    """
    scaled = _scaled(s)
    total = scaled.sum()
    if total == 0:
        return 0.0
    shares = scaled / total
    return float(torch.special.entr(shares).sum().exp())


def energy_rank(s: Tensor, share: float) -> int:
    """The smallest k whose k largest singular values hold ``share`` of the energy, the sum of s^2.

    This is the pruning rule of Yang et al. 2020 (section 3.3), with ``share = 1 - e``. Zero for a zero matrix.

    Args:
        s: Singular values (r,), in any order.
        share: In (0, 1].

    Example:
        >>> s = torch.tensor([3.0, 2.0, 1.0])  # energies 9, 4 and 1
        >>> energy_rank(s, 0.6), energy_rank(s, 0.9), energy_rank(s, 1.0)
        (1, 2, 3)
    """
    energies = _scaled(s).square().sort(descending=True).values.cumsum(0)
    if energies.numel() == 0 or energies[-1] == 0:
        return 0
    return int((energies < share * energies[-1]).sum()) + 1


def _scaled(s: Tensor) -> Tensor:
    """Magnitudes divided by the largest one, in float64, so that squares neither overflow nor vanish."""
    magnitudes = s.detach().abs().double()
    largest = magnitudes.max() if magnitudes.numel() else magnitudes.new_zeros(())
    return magnitudes / largest if largest > 0 else torch.zeros_like(magnitudes)
