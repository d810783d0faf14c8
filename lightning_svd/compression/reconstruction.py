"""Low-rank layers trained for a moment so that the whole model puts out again what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_svd.compression.calibration import Track, frozen
from lightning_svd.compression.data import CHANGED, DIVERGENCE, CalibrationData
from lightning_svd.layers.forms import PairForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import wide
from lightning_svd.model.replay import untouched
from lightning_svd.model.targets import numbers_in

# A step of Adam as a share of a factor's root mean square, how often in a run outputs are judged, and how much smaller
# steps are where they got no nearer.
RATE, JUDGED, SMALLER = 0.01, 10, 0.3


def reconstruct(
    model: nn.Module,
    layers: Mapping[str, SVDLayer],
    data: CalibrationData,
    originals: Sequence[Sequence[Tensor]],
    steps: int,
    distance: Callable[[], float],
    track: Track,
) -> bool:
    """Train the two factors of each low-rank layer, all of them together, towards the original outputs.

    Adam with a falling rate, in evaluation, everything else frozen. Now and then outputs are judged on what is held
    out: where they are no nearer it goes on from the best with smaller steps, and in the end the best is kept, which
    may be what was there before.

    Args:
        model: The whole.
        layers: Its low-rank ones by name, as U, s and V; they become pairs.
        data: What is trained on, a batch a step; with a loss that is what falls.
        originals: What the dense model put out for each batch; unused with a loss.
        steps: How many.
        distance: How far held-out outputs are.
        track: Shows progress.

    Returns:
        Whether factors are others now.

    Raises:
        ValueError: If outputs have no gradient.
    """
    if data.measure == CHANGED:
        raise ValueError("`reconstruct` needs outputs with gradients, and the model puts out integers only")
    for layer in layers.values():
        layer.to_pair()
    trained = [parameter for layer in layers.values() for parameter in layer.form.trained]
    assert all(isinstance(layer.form, PairForm) for layer in layers.values())
    rates = [RATE * float(wide(p.detach()).square().mean().sqrt()) for p in trained]
    optimizer = torch.optim.Adam([{"params": [p]} for p in trained], foreach=False)
    nearest, best, is_other = distance(), [p.detach().clone() for p in trained], False
    every, share = max(1, steps // JUDGED), 1.0
    wanted = [p.requires_grad for p in trained]
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(frozen(model))
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in track(range(steps), "reconstructing"):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate * (1 + math.cos(math.pi * step / steps)) / 2
            with torch.enable_grad():
                _distance(data, step % len(data.batches), originals).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % every and step + 1 < steps:
                continue
            found = distance()
            if found < nearest:
                nearest, is_other = found, True
                best = [parameter.detach().clone() for parameter in trained]
            else:  # too large steps: on from the best with smaller ones
                share *= SMALLER
                _put(trained, best)
                optimizer.state.clear()
    _put(trained, best)
    for parameter, requires_grad in zip(trained, wanted, strict=True):
        parameter.requires_grad_(requires_grad)
    return is_other


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, held in zip(parameters, values, strict=True):
        parameter.copy_(held)


def _distance(data: CalibrationData, number: int, originals: Sequence[Sequence[Tensor]]) -> Tensor:
    """How far a batch's outputs are from the original's, differentiable; with a loss that itself."""
    output = data.call(data.batches[number])
    tensors = numbers_in(output)
    if not any(tensor.requires_grad for tensor in tensors):
        raise ValueError("`reconstruct` needs outputs with gradients, and the model's have none")
    if data.loss is not None:
        return tensors[0].sum()
    terms = []
    for now, before in zip(tensors, originals[number], strict=True):
        now, before = wide(now), wide(before)
        if data.measure == DIVERGENCE:
            logs = [each.flatten(0, -2).log_softmax(-1) for each in (now, before)]
            known = logs[1].isfinite().all(-1)
            terms.append(F.kl_div(logs[0][known], logs[1][known], reduction="batchmean", log_target=True))
        else:
            known = before.isfinite()
            size = before[known].square().sum().clamp_min(torch.finfo(torch.float32).tiny)
            terms.append((now[known] - before[known]).square().sum() / size)
    return torch.stack(terms).sum()
