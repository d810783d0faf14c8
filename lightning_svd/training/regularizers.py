"""Regularizers of the factors, each as its value and its gradient in closed form.

Nothing here builds an autograd graph: a value and its gradient share their intermediate products, and the gradient is
added to ``.grad`` after the backward pass, so the user's loss stays what it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_choice, check_flag, check_weight
from lightning_svd.layers.forms import DenseForm, SVDForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import exact_products, gram_defect

ValueAndGradient = tuple[Tensor, Tensor]
LARGE = 1 << 16  # entries of a factor from which copying it beside its like costs more than a kernel's launch
ALL = slice(None)
# Of a Gram matrix that are computed in one step, where a step's number is given: as many as a processor's kernels
# compute at once. Fewer cost as much, and often more.
COLUMNS = 16


def orthogonality(factor: Tensor, columns: slice = ALL) -> ValueAndGradient:
    """``|A^T A - I|_F^2 / r^2`` for factors A (..., n, r) and its gradient ``4 A (A^T A - I) / r^2``.

    The penalty of Yang et al. 2020 (equation 3) for one of the two factors, r being the ranks A has. Leading
    dimensions hold factors of several layers; the value has one entry for each.

    Args:
        factor: A (..., n, r).
        columns: Those b columns of the Gram matrix that the value sums over; the gradient (..., n, b) is exactly that
            of the whole penalty for these columns of A, at b / r of the cost.
    """
    scale = 1.0 / max(1, factor.shape[-1]) ** 2
    wider = _with_some_before(columns, factor.shape[-1])
    asked = slice(columns.start - wider.start, None) if wider is not columns else ALL
    # Products in half precision or TF32 would drown the defect.
    with exact_products(factor.device):
        defect = gram_defect(factor, wider)
        value = defect[..., asked].square().sum((-2, -1)) * scale
        return value, (factor @ defect.mul_(4.0 * scale))[..., asked]  # the smaller of the two is scaled


def _with_some_before(columns: slice, rank: int) -> slice:
    """The same columns, and a few before them where that makes their number one that kernels are made for."""
    if columns == ALL:
        return columns
    stop = min(columns.stop, rank)
    more = -(stop - columns.start) % COLUMNS
    return slice(columns.start - more, stop) if 0 < more <= columns.start else columns


def l1(s: Tensor) -> ValueAndGradient:
    """``sum |s|`` for singular values s (..., r) and its gradient ``sign(s)``."""
    return s.abs().sum(-1), s.sign()


def hoyer(s: Tensor) -> ValueAndGradient:
    """``|s|_1 / |s|_2`` for s (..., r), between 1 and sqrt(r), and its gradient; both 0 for s = 0.

    The gradient is ``sign(s) / |s|_2 - s |s|_1 / |s|_2^3`` (Yang et al. 2020, equation 4): it pulls small singular
    values down and lets large ones grow, and does not depend on the scale of the layer but through 1 / |s|_2.
    """
    unit, length = _normalized(s)
    ratio = unit.abs().sum(-1, keepdim=True)
    return ratio.squeeze(-1), (unit.sign() - unit * ratio) / length


def hoyer_square(s: Tensor) -> ValueAndGradient:
    """``|s|_1^2 / |s|_2^2`` for s (..., r), between 1 and r, and its gradient; both 0 for s = 0."""
    ratio, gradient = hoyer(s)
    return ratio.square(), 2.0 * ratio.unsqueeze(-1) * gradient


def group_lasso(s: Tensor) -> ValueAndGradient:
    """``sum_b |s_b.|_2`` over all suffixes ``s_b. = (s_b, ..., s_r)`` of s (..., r), and its gradient.

    The hierarchical group lasso of Maestro (Horvath et al. 2023, arXiv 2308.14929) for orthonormal factors: the later a
    rank stands, the more groups it is in, so that ranks go from the last on. The gradient is ``s_i`` times the sum of
    ``1 / |s_b.|_2`` over b <= i, without the suffixes that are 0.
    """
    unit, length = _normalized(s)
    suffixes = unit.square().flip(-1).cumsum(-1).flip(-1).sqrt()
    pulls = torch.where(suffixes > 0, 1.0 / suffixes, 0.0).cumsum(-1)
    return (suffixes * length).sum(-1), unit * pulls


def _normalized(s: Tensor) -> tuple[Tensor, Tensor]:
    """``s / |s|_2`` and ``|s|_2`` (..., 1), safe from overflow and underflow; 0 and 1 for s = 0."""
    largest = s.abs().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    scaled = s / torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    unit = scaled / torch.where(length > 0, length, 1.0)
    return unit, torch.where(length > 0, length * largest, 1.0)


SPARSITY: dict[str, Callable[[Tensor], ValueAndGradient]] = {
    "hoyer": hoyer,
    "hoyer_square": hoyer_square,
    "l1": l1,
    "group_lasso": group_lasso,
}

# Weights at which each penalty helps a falling budget without doing the pruning alone.
SPARSITY_WEIGHTS = {"hoyer": 2e-3, "hoyer_square": 2e-4, "l1": 5e-4, "group_lasso": 5e-5, None: 0.0}


@dataclass(frozen=True)
class Regularizer:
    """What the factors are regularized by: U and V towards orthonormal columns, s towards few singular values.

    Args:
        sparsity: The penalty of s, "hoyer", "hoyer_square", "l1" or "group_lasso"; None for none.
        sparsity_weight: Its full weight; None for 0.002, 0.0002, 0.0005 and 0.00005 respectively.
        orthogonality_weight: Weight of the orthogonality penalty of U and V.
        centralize: Whether the loss's gradient is centered over each layer's inputs, see
            :func:`~lightning_svd.training.regularizers.centralize`.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    sparsity: str | None = "hoyer"
    sparsity_weight: float | None = None
    orthogonality_weight: float = 1.0
    centralize: bool = False

    def __post_init__(self) -> None:
        check_flag("centralize", self.centralize)
        check_choice("sparsity", self.sparsity, (*SPARSITY, None))
        check_weight("orthogonality_weight", self.orthogonality_weight)
        if self.sparsity_weight is None:
            object.__setattr__(self, "sparsity_weight", SPARSITY_WEIGHTS[self.sparsity])
        check_weight("sparsity_weight", self.sparsity_weight)


@dataclass(frozen=True)
class Penalties:
    """What the regularizers came to in one step, 0-d tensors on the layers' device.

    Attributes:
        orthogonality: Sum over layers of both factors' :func:`orthogonality`, without its weight.
        sparsity: Sum over layers of the sparsity penalty, without its strength.
        orthogonality_error: Root mean square of ``|A^T A - I|_F`` per rank, over all factors; 0 when orthonormal.
    """

    orthogonality: Tensor
    sparsity: Tensor
    orthogonality_error: Tensor


@torch.no_grad()
def add_gradients(
    layers: Iterable[SVDLayer],
    orthogonality_weight: float = 1.0,
    sparsity: str | None = "hoyer",
    sparsity_weight: float = 0.0,
    scale: float = 1.0,
    only: Collection[nn.Parameter] | None = None,
    step: int | None = None,
) -> Penalties:
    """Add the weighted regularizers' gradient to ``.grad`` of the kept ranks; call it between backward and step.

    Parameters that do not require a gradient are left alone, and one whose gradient is None gets one, as with
    ``(loss + penalty).backward()``.

    Args:
        layers: Factorized layers; those that are trained as something else than an SVD have no penalty.
        orthogonality_weight: Factor of the orthogonality penalty.
        sparsity: A key of ``SPARSITY``, or None.
        sparsity_weight: Factor of the sparsity penalty.
        scale: Of the gradients that are there, a loss scaler's for instance.
        only: Those factors that get a gradient, where an optimizer holds some of them; None for all.
        step: Number of the training step. Given, each step computes up to ``COLUMNS`` columns of the Gram matrix of U
            or, in the next step, of V, the next ones each time and weighted up, so that all are pulled as strongly
            over a few steps while the products of a wide layer stay a small share of its own. None: all columns.

    Returns:
        The penalties, each without its weight; estimated from the columns whose turn it is.
    """
    only = None if only is None else frozenset(only)  # in a list they would be looked for by their values
    factors, values = list[_Part](), list[_Part]()
    for layer in layers:
        if isinstance(layer.form, SVDForm):
            (U, s, V), kept = layer.form.stored(), layer.form.factors()
            both = [_Part(U, kept.U), _Part(V, kept.V)]  # type: ignore[arg-type]
            factors += both[turn_of(layer.rank, step).factors]
            values.append(_Part(s, kept.s))  # type: ignore[arg-type]
    if not values:
        return Penalties(*(torch.zeros(()) for _ in range(3)))
    defects, ranks, orthogonalities, sparsities = [], 0, [], []
    for group in _alike(factors):
        rank = group[0].value.shape[-1]
        turn = turn_of(rank, step)
        penalty = functools.partial(orthogonality, columns=turn.columns)
        penalties = turn.turns * _add(group, penalty, turn.turns * scale * orthogonality_weight, only, turn.columns)
        orthogonalities.append(penalties.sum())
        defects.append(penalties.sum() * rank**2)
        ranks += rank * penalties.numel() * turn.stands_for
    if sparsity is not None:
        for group in _alike(values):
            sparsities.append(_add(group, SPARSITY[sparsity], scale * sparsity_weight, only).sum())
    return Penalties(
        torch.stack(orthogonalities).sum(),
        torch.stack(sparsities).sum() if sparsities else torch.zeros_like(orthogonalities[0]),
        (torch.stack(defects).sum() / max(1, ranks)).sqrt(),
    )


@torch.no_grad()
def centralize(layers: Iterable[SVDLayer], only: Collection[nn.Parameter] | None = None) -> None:
    """Center the gradient of each layer's weight over its inputs (gradient centralization), in ``.grad``.

    After Yong et al. 2020 (arXiv 2004.01461): of the gradient G (m, n) of a weight each row loses its mean. Of factors,
    each column of dL/dV (n, r) does, which is what V gets of the centered G, since ``dL/dV = G^T U diag(s)``; so is the
    gradient of B in a pair ``A B^T``. U, s and A keep theirs. Call it before penalties are added.

    Args:
        layers: Factorized layers, in any form. The rows of an embedding are no inputs: it is left alone.
        only: Those parameters whose gradient is centered; None for all.
    """
    for layer in layers:
        form = layer.form
        parameter = form.trained[-1]  # V, B, or the weight
        gradient = parameter.grad
        if gradient is None or layer.view.layer_type is nn.Embedding or not (only is None or parameter in only):
            continue
        if isinstance(form, DenseForm):
            mine = gradient if form.rows is None else gradient[form.rows]
            matrix = layer.view.unfold(mine)
            mine.copy_(layer.view.fold(matrix - matrix.mean(-1, keepdim=True)))
        else:
            gradient.sub_(gradient.mean(-2, keepdim=True))


class _Part(NamedTuple):
    """What a penalty is computed for: a parameter, and those of its first columns that are in use."""

    parameter: nn.Parameter
    value: Tensor


class Turn(NamedTuple):
    """What of a layer's U and V is pulled in one step.

    Attributes:
        factors: Which of the two.
        columns: Of it.
        turns: In how many steps each column of both has its turn.
    """

    factors: slice = ALL
    columns: slice = ALL
    turns: int = 1

    @property
    def stands_for(self) -> int:
        """How many factors one that is pulled is an estimate of."""
        return 1 if self.factors == ALL else 2


def turn_of(rank: int, step: int | None) -> Turn:
    """All of both for a low rank, or without a step's number; a few columns of U in the even steps, of V in the odd."""
    if step is None or rank <= COLUMNS:
        return Turn()
    blocks = -(-rank // COLUMNS)
    start = step // 2 % blocks * COLUMNS
    return Turn(slice(step % 2, step % 2 + 1), slice(start, start + COLUMNS), 2 * blocks)


def _alike(parts: Iterable[_Part]) -> Iterable[list[_Part]]:
    """Groups of one shape, so that many small layers cost one kernel and not one each; large ones stay alone."""
    groups: dict[object, list[_Part]] = {}
    for number, part in enumerate(parts):
        shape, dtype, device = part.value.shape, part.value.dtype, part.value.device
        large = part.value.numel() > LARGE
        groups.setdefault((number if large else None, shape, dtype, device), []).append(part)
    return groups.values()


def _add(
    group: Sequence[_Part],
    penalty: Callable[[Tensor], ValueAndGradient],
    weight: float,
    only: Collection[nn.Parameter] | None,
    columns: slice = ALL,
) -> Tensor:
    """Add the weighted gradient of each part's penalty to these columns of its parameter's; returns the penalties."""
    wide = torch.promote_types(group[0].value.dtype, torch.float32)
    if len(group) == 1:
        penalties, gradient = penalty(group[0].value.to(wide))
        gradients: Sequence[Tensor] = [gradient]
    else:
        penalties, stacked = penalty(torch.stack([part.value for part in group]).to(wide))
        gradients = stacked.unbind()
    if weight == 0.0:
        return penalties
    for (parameter, value), gradient in zip(group, gradients, strict=True):
        if parameter.requires_grad and (only is None or parameter in only):
            _accumulate(parameter, gradient, weight, columns.start or 0, value.shape[-1])
    return penalties


def _accumulate(parameter: nn.Parameter, gradient: Tensor, weight: float, start: int, rank: int) -> None:
    grad = parameter.grad
    if grad is None:
        grad = parameter.grad = torch.zeros_like(parameter)
    if gradient.dtype != grad.dtype:
        gradient = gradient.to(grad.dtype)
    if gradient.shape[-1] != grad.shape[-1]:  # a view of all would cost small layers as much as the addition
        grad = grad.narrow(-1, start, min(gradient.shape[-1], rank - start))
    grad.add_(gradient, alpha=weight)
