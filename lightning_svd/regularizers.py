"""Regularisers of the factors, each as its value and its gradient in closed form.

Nothing here builds an autograd graph: a value and its gradient share their intermediate products, and the gradient is
added to ``.grad`` after the backward pass, so the user's loss stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_svd.layers import SVDLayer

ValueAndGradient = tuple[Tensor, Tensor]


def orthogonality(factor: Tensor) -> ValueAndGradient:
    """``|A^T A - I|_F^2 / r^2`` for a factor A (n, r) and its gradient ``4 A (A^T A - I) / r^2`` (n, r).

    The penalty of Yang et al. 2020 (equation 3) for one of the two factors, r being the ranks A has.
    """
    scale = 1.0 / max(1, factor.shape[1]) ** 2
    # In manual optimization steps are taken under autocast, whose half-precision products would drown the defect.
    with torch.autocast(factor.device.type, enabled=False):
        defect = factor.mT @ factor
        defect.diagonal().sub_(1.0)
        return defect.square().sum() * scale, (factor @ defect).mul_(4.0 * scale)


def l1(s: Tensor) -> ValueAndGradient:
    """``sum |s|`` and its gradient ``sign(s)``."""
    return s.abs().sum(), s.sign()


def hoyer(s: Tensor) -> ValueAndGradient:
    """``|s|_1 / |s|_2``, between 1 and sqrt(r), and its gradient; both 0 for s = 0 (Yang et al. 2020, equation 4).

    The gradient is ``sign(s) / |s|_2 - s |s|_1 / |s|_2^3``: it pulls small singular values down and lets large ones
    grow, and does not depend on the scale of the layer but through 1 / |s|_2.
    """
    unit, length = _normalised(s)
    ratio = unit.abs().sum()
    return ratio, (unit.sign() - unit * ratio) / length


def hoyer_square(s: Tensor) -> ValueAndGradient:
    """``|s|_1^2 / |s|_2^2``, between 1 and r, and its gradient; both 0 for s = 0."""
    ratio, gradient = hoyer(s)
    return ratio.square(), 2.0 * ratio * gradient


def _normalised(s: Tensor) -> tuple[Tensor, Tensor]:
    """``s / |s|_2`` and ``|s|_2``, safe from overflow and underflow; 0 and 1 for s = 0."""
    largest = s.abs().amax() if s.numel() else s.new_zeros(())
    scaled = s / torch.where(largest > 0, largest, 1.0)
    length = torch.linalg.vector_norm(scaled)
    unit = scaled / torch.where(length > 0, length, 1.0)
    return unit, torch.where(length > 0, length * largest, 1.0)


SPARSITY: dict[str, Callable[[Tensor], ValueAndGradient]] = {"hoyer": hoyer, "hoyer_square": hoyer_square, "l1": l1}


@dataclass(frozen=True)
class Penalties:
    """What the regularisers came to in one step, 0-d tensors on the layers' device.

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
) -> Penalties:
    """Add the weighted regularisers' gradient to ``.grad`` of the kept ranks; call it between backward and step.

    Parameters that do not require a gradient are left alone, and one whose gradient is None gets one, as with
    ``(loss + penalty).backward()``.

    Args:
        layers: Factorised layers, at least one.
        orthogonality_weight: Factor of the orthogonality penalty.
        sparsity: A key of ``SPARSITY``, or None.
        sparsity_weight: Factor of the sparsity penalty.
        scale: Of the gradients that are there, a loss scaler's for instance.
        only: Those factors that get a gradient, where an optimizer holds some of them; None for all.

    Returns:
        The penalties, each without its weight.
    """

    def add(parameter: nn.Parameter, gradient: Tensor, weight: float, layer: SVDLayer) -> None:
        if only is None or parameter in only:
            _accumulate(parameter, gradient, scale * weight, layer.kept)

    orthogonalities, sparsities, defects, ranks = [], [], [], 0
    for layer in layers:
        U, s, V = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in layer.factors())
        for parameter, factor in ((layer.U, U), (layer.V, V)):
            value, gradient = orthogonality(factor)
            add(parameter, gradient, orthogonality_weight, layer)
            orthogonalities.append(value)
            defects.append(value * layer.rank**2)
            ranks += layer.rank
        if sparsity is not None:
            value, gradient = SPARSITY[sparsity](s)
            add(layer.s, gradient, sparsity_weight, layer)
            sparsities.append(value)
    zero = orthogonalities[0].new_zeros(())
    return Penalties(
        torch.stack(orthogonalities).sum(),
        torch.stack(sparsities).sum() if sparsities else zero,
        (torch.stack(defects).sum() / max(1, ranks)).sqrt(),
    )


def _accumulate(parameter: nn.Parameter, gradient: Tensor, weight: float, kept: Tensor | None) -> None:
    if weight == 0.0 or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = gradient.to(parameter.grad.dtype)
    if kept is None:
        parameter.grad.add_(gradient, alpha=weight)
    else:
        parameter.grad.index_add_(-1, kept, gradient, alpha=weight)
