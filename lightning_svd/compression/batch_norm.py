"""Running statistics of batch normalization, taken anew for what a changed network computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_svd.compression.data import CalibrationData, CallError
from lightning_svd.model.replay import untouched

Values = Sequence[tuple[Tensor, Tensor]]  # buffers, and what they hold


def recalibrated(model: nn.Module, data: CalibrationData, distance: Callable[[], float]) -> tuple[Values, float | None]:
    """Take running means and variances anew over the calibration batches; keep them if outputs are nearer then.

    Args:
        model: Changed in place.
        data: Its batches.
        distance: How far outputs are from what they should be.

    Returns:
        The buffers that are other ones now, with what they held, empty if none are kept; and how far outputs are now,
        None where nobody had to ask.
    """
    norms = [child for child in model.modules() if isinstance(child, _BatchNorm) and child.running_mean is not None]
    if not norms:
        return [], None
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        now = _anew(norms, model, data, [buffer for buffer, _ in before])
    except CallError:  # batches of one value for each channel, of which there is no variance
        return [], None
    farther = distance()
    try:
        put(now)
        if (nearer := distance()) < farther:
            return before, nearer
    except BaseException:
        put(before)
        raise
    put(before)
    return [], farther


def _anew(norms: Sequence[_BatchNorm], model: nn.Module, data: CalibrationData, buffers: Sequence[Tensor]) -> Values:
    with untouched(model), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.training = True
        for batch in data.batches:
            data.call(batch)
        return [(buffer, buffer.clone()) for buffer in buffers]


@torch.no_grad()
def put(values: Values) -> None:
    """Have buffers hold these."""
    for buffer, held in values:
        buffer.copy_(held)
