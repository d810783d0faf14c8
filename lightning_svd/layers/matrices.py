"""Matrices and their singular value decomposition.

One convention, used in the whole package: ``W = U @ diag(s) @ V.T`` with U of shape (m, r), s of shape (r,) and V of
shape (n, r), as in :func:`torch.svd_lowrank`. The rows of W are a layer's outputs, its columns the layer's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_svd.layers.shards import is_sharded


class Factors(NamedTuple):
    """A factorized matrix, ``W = U @ diag(s) @ V.T``."""

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
    with torch.no_grad(), exact_products(matrix.device):
        U, s, V = _any_signs(wide(matrix.detach()), name)
        signs = _column_signs(U).unsqueeze(-2)
        return Factors(U * signs, s, V * signs)


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        ValueError: Naming them, and saying how many are not.
    """
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(f"`{name}`: expected finite weights, got {bad} NaN or infinite of {weight.numel()}")


def _any_signs(matrix: Tensor, name: str) -> Factors:
    check_finite(matrix, name)
    try:
        return _tall_svd(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but not in __all__
        return _svd_in_float64(matrix, name)


def _tall_svd(matrix: Tensor) -> Factors:
    if matrix.shape[-2] >= matrix.shape[-1]:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return Factors(U, s, Vh.mT)
    # LAPACK takes several times as long for a wide matrix as for its transpose.
    V, s, Uh = torch.linalg.svd(matrix.mT, full_matrices=False)
    return Factors(Uh.mT, s, V)


def _svd_in_float64(matrix: Tensor, name: str) -> Factors:
    """Where float32 does not converge, as for clusters of nearly equal singular values."""
    try:
        return Factors(*(factor.to(matrix.dtype) for factor in _tall_svd(matrix.double())))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"`{name}`: its singular value decomposition does not converge: {error}") from None


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values (..., r) in descending order, in float32 or wider; all NaN if an entry is not finite."""
    full = wide(matrix.detach())
    if not torch.isfinite(full).all():
        return full.new_full((*full.shape[:-2], min(full.shape[-2:])), math.nan)  # where LAPACK raises
    try:
        values: Tensor = torch.linalg.svdvals(full)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values = torch.linalg.svdvals(full.double()).to(full.dtype)
    return values


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their arguments inside: no autocast, no TF32 or bfloat16 in their place."""
    precision = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if casts else nullcontext():
            yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


def gram_defect(factor: Tensor, columns: slice = slice(None)) -> Tensor:
    """``A^T A - I`` for A (..., n, r), zero where its columns are orthonormal; its b ``columns`` (..., r, b).

    Raises:
        ValueError: If rows of A lie in other processes: I would be subtracted in each of them.
    """
    if is_sharded(factor):
        raise ValueError(
            "expected a whole matrix, got rows of one that is sharded: the penalty of sharded factors is added by "
            "SVDTrainingCallback, or take `factor.full_tensor()`"
        )
    defect = factor.mT @ factor[..., columns]
    defect.diagonal(-(columns.start or 0), -2, -1).sub_(1.0)
    return defect


def refactorized(factors: Factors, name: str = "matrix") -> Factors:
    """The exact SVD of ``U @ diag(s) @ V.T``, for U and V that are orthonormal only about, or not at all.

    Signs are as they come, the same for the same factors. Costs two QR decompositions and an SVD of k x k.

    Args:
        factors: U (..., m, k), s (..., k), V (..., n, k).
        name: What to call it in an error.

    Returns:
        The same product with orthonormal U and V and s in descending order, in float32 or wider.

    Raises:
        ValueError: If a factor holds NaN or infinity.
    """
    U, s, V = map(wide, factors)
    if s.shape[-1] == 0:
        return Factors(U, s, V)
    with torch.no_grad(), exact_products(s.device):
        (left, upper), (right, lower) = torch.linalg.qr(U), torch.linalg.qr(V)
        inner = _any_signs(upper * s.unsqueeze(-2) @ lower.mT, name)
        return Factors(left @ inner.U, inner.s, right @ inner.V)


def _column_signs(U: Tensor) -> Tensor:
    largest = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True)).squeeze(-2)
    return torch.where(largest < 0, -1.0, 1.0).to(U.dtype)


def reconstruct(U: Tensor, s: Tensor, V: Tensor) -> Tensor:
    """``U @ diag(s) @ V.T``, shape (..., m, n); the inverse of :func:`svd`."""
    return (U * s.unsqueeze(-2)) @ V.mT


def truncate(factors: Factors, rank: int) -> Factors:
    """Only the first ``rank`` of the rank-one terms, differentiable views.

    Args:
        factors: U (..., m, r), s (..., r), V (..., n, r).
        rank: How many.

    Example:
        >>> factors = svd(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
        >>> reconstruct(*truncate(factors, 1)).tolist()
        [[3.0, 0.0], [0.0, 0.0]]
    """
    if rank == factors.s.shape[-1]:
        return factors
    return Factors(*(factor.narrow(-1, 0, rank) for factor in factors))


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
