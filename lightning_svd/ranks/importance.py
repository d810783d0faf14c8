"""What a rank carries: exact factors of a layer, and a number for each of their ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

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

    @abstractmethod
    def values(self, factors: Factors) -> Tensor:
        """What each rank of such factors carries, (r,), descending."""


class Spectrum(Importance):
    """The layer's own singular values: a rank carries s^2, its share of the weight's squared Frobenius norm."""

    def factors(self, layer: SVDLayer) -> Factors:
        return layer.form.exact(layer.layer_name)

    def values(self, factors: Factors) -> Tensor:
        squares = factors.s.square()
        return squares if squares.ndim == 1 else squares.sum(0)
