"""What a rank carries: exact factors of a layer, and a number for each of their ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_svd.arguments import check_choice, check_count
from lightning_svd.layers.forms import DenseForm, SVDForm, exact_of, stacked
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors
from lightning_svd.ranks.statistics import Basis, Statistics, bases_of
from lightning_svd.ranks.statistics import sides as sides_of


class Importance(ABC):
    """A measure of what each rank of a layer is worth, in whose order ranks are kept.

    Attributes:
        adds_up: Whether what ranks of different layers carry is in one unit, see
            :func:`~lightning_svd.keep_by_budget`.
    """

    adds_up: ClassVar[bool] = False

    @abstractmethod
    def factors(self, layer: SVDLayer) -> Factors:
        """Exact factors of the layer, the ranks that are worth most first, in float32 or wider.

        Raises:
            ValueError: If its parameters are not finite.
        """

    def factors_of(self, layers: Sequence[SVDLayer]) -> Factors:
        """:meth:`factors` of layers alike in form, shapes and dtype, each factor stacked along a first dimension.

        Raises:
            ValueError: If parameters are not finite; the message names a layer that has them.
        """
        return Factors(*map(stacked, zip(*map(self.factors, layers), strict=True)))

    @abstractmethod
    def values(self, factors: Factors) -> Tensor:
        """What each rank of such factors carries, (r,), descending."""


class Spectrum(Importance):
    """The layer's own singular values: a rank carries s^2, its share of the weight's squared Frobenius norm."""

    def factors(self, layer: SVDLayer) -> Factors:
        return layer.form.exact(layer.svd_name)

    def factors_of(self, layers: Sequence[SVDLayer]) -> Factors:
        forms = [layer.form for layer in layers if isinstance(layer.form, SVDForm)]
        if len(layers) == 1 or len(forms) < len(layers):
            return super().factors_of(layers)
        try:
            return exact_of(forms)
        except ValueError:  # one by one, so that the one to blame is named
            return super().factors_of(layers)

    def values(self, factors: Factors) -> Tensor:
        squares = factors.s.square()
        return squares if squares.ndim == 1 else squares.sum(0)


class OnData(Spectrum):
    """Base of the importances that are measured on data, in training batches just before each change of ranks.

    In between what a rank is worth is read off the spectrum.

    Args:
        steps: Optimizer steps before each change of ranks in whose batches statistics are collected. Such a step
            takes 1.4 to 2.5 times as long, and each layer holds two r x r matrices meanwhile, r being its rank.

    Raises:
        ValueError: If ``steps`` is not a count.
    """

    of_loss: ClassVar[bool]
    targets: str = "drawn"

    def __init__(self, steps: int = 2) -> None:
        check_count("steps", steps)
        self.steps = steps

    def basis(self, layer: SVDLayer, seen: Statistics) -> Basis:
        """Ranks in the order of what they do on data, and how much that is."""
        (basis,) = bases_of(*sides(layer), seen, (self.of_loss,))
        return basis


def sides(layer: SVDLayer) -> tuple[Tensor | None, Tensor | None]:
    """L and R whose product ``L R^T`` a layer's matrix is, detached, with None for the identity."""
    if isinstance(layer.form, DenseForm):
        return sides_of(layer, layer.form.weight())
    left, right = layer.form.left_right()
    return left.detach(), right.detach()


class Outputs(OnData):
    """How much of a layer's outputs goes through a rank.

    After Zhang et al. 2016 (arXiv 1505.06798); the same as the whitening of SVD-LLM (arXiv 2403.07378).
    """

    of_loss = False


class Fisher(OnData):
    """How much the loss rises without a rank, estimated from a layer's inputs and the gradients of its outputs (K-FAC).

    To second order and in Kronecker factors, as Martens and Grosse 2015 (arXiv 1503.05671) have them.

    Args:
        steps: As of :class:`~lightning_svd.ranks.importance.OnData`.
        targets: What the loss is against: "drawn", targets drawn from what the model puts out itself, so that it makes
            no difference how small the loss of a trained net is, or whether it is one that distills; or "given", those
            of your own loss, in its own backward pass, which costs less.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    of_loss = True
    adds_up = True

    def __init__(self, steps: int = 2, targets: str = "drawn") -> None:
        super().__init__(steps)
        check_choice("targets", targets, ("drawn", "given"))
        self.targets = targets


IMPORTANCES: dict[str, type[Importance]] = {"spectrum": Spectrum, "outputs": Outputs, "fisher": Fisher}
