"""Running statistics of batch normalization, taken anew for what a changed network computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_svd.compression.data import CalibrationData
from lightning_svd.model.calls import evaluating


def recalibrated(model: nn.Module, data: CalibrationData, distance: Callable[[], float]) -> bool:
    """Take running means and variances anew over the calibration batches; keep them if outputs are nearer then.

    Args:
        model: Changed in place.
        data: Its batches.
        distance: How far outputs are from what they should be.

    Returns:
        Whether the new ones are kept.
    """
    norms = [child for child in model.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]
    if not norms:
        return False
    before, momenta = distance(), [norm.momentum for norm in norms]
    saved = [{name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            for batch in data.batches:
                data.call(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if distance() < before:
        return True
    for norm, buffers in zip(norms, saved, strict=True):
        for name, values in buffers.items():
            getattr(norm, name).copy_(values)
    return False
