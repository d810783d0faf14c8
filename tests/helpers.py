"""What several test modules need."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_svd.factorization import roundoff


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
