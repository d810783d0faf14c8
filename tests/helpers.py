"""What several test modules need."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_svd.layers.layer import SVDLayer, factorize, plain_dense, plain_pair
from lightning_svd.layers.matrices import Factors, roundoff
from lightning_svd.layers.pairs import bias_of
from lightning_svd.layers.views import View
from lightning_svd.ranks.statistics import bases_of


def assert_same(actual: Tensor, expected: Tensor, shape: tuple[int, ...], factor: float = 32.0) -> None:
    """Equal but for rounding: sums of ``max(shape)`` terms, relative to the largest expected entry."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = float((actual - expected).detach().abs().max())
    allowed = roundoff(shape, expected.dtype, factor) * float(expected.detach().abs().max())
    assert error <= allowed, f"differs by {error:.3g}, rounding explains {allowed:.3g}"


def counted_macs(module: nn.Module, *inputs: Tensor) -> int:
    """What torch counts in a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops() // 2


def svd_of(layer: nn.Module, conv_mode: str | None = None, form: str = "svd", name: str = "") -> SVDLayer:
    """The very layer, factorized."""
    return factorize(layer, View.of(layer, conv_mode or "channel"), name, form)


def rebuilt(layer: SVDLayer, x: Tensor) -> Tensor:
    """The layer's output by its weight."""
    return layer.view.apply_matrix(x, layer.form.matrix(), bias_of(layer))


def factored(layer: SVDLayer, x: Tensor) -> Tensor:
    """The layer's output by its two factors."""
    return layer.view.apply_factors(x, *layer.form.left_right(), bias_of(layer))


def ways(layer: SVDLayer) -> list[Callable[[Tensor], Tensor]]:
    """All ways to compute what a layer trained as an SVD or a pair does, plain layers among them."""
    both = [lambda x: rebuilt(layer, x), lambda x: factored(layer, x)]
    return [layer, *both, plain_dense(layer), plain_pair(layer)]


class DataBasis(NamedTuple):
    """All factors of a layer in a metric of data, and what their ranks carry."""

    factors: Factors
    carried: torch.Tensor


def in_metric_of_data(left, right, seen, of_loss):
    """The basis of one metric, with its factors."""
    (basis,) = bases_of(left, right, seen, (of_loss,))
    return DataBasis(basis.factors(left, right, basis.of_features.shape[-1]), basis.carried)
