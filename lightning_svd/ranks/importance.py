"""What a rank carries: exact factors of a layer, and a number for each of their ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from lightning_svd.layers.forms import SVDForm, exact_of, stacked
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors


class Importance(ABC):
    """A measure of what each rank of a layer is worth, in whose order ranks are kept."""

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
        return layer.form.exact(layer.layer_name)

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
