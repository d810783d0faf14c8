"""NaN and infinity in what is trained: found before anything is decided by it, and told at the end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import check_finite
from lightning_svd.model.surgery import showing_factors
from lightning_svd.wording import counted, few


def check_trained(layers: Mapping[str, SVDLayer]) -> None:
    """Refuse layers whose parameters are not finite, by which no ranks are chosen.

    Raises:
        ValueError: Naming the layer.
    """
    sums = [parameter.detach().sum() for layer in layers.values() for parameter in layer.form.trained]
    if sums and not torch.isfinite(torch.stack([each.float() for each in sums])).all():  # or too large a sum
        for name, layer in layers.items():
            for parameter in layer.form.trained:
                try:
                    check_finite(parameter.detach(), name)
                except ValueError as error:
                    raise ValueError(
                        f"{error}: training has diverged, and no ranks are chosen by such weights: see the loss "
                        "and its gradients, and go on from a checkpoint from before"
                    ) from None


def warnings_of(model: nn.Module, layers: Mapping[str, SVDLayer]) -> list[str]:
    """What to say of a model at the end that holds NaN, or infinity where none can be meant.

    Args:
        model: The whole tree.
        layers: The factorized layers in it.
    """
    broken = [
        name
        for name, layer in layers.items()
        if not all(bool(torch.isfinite(parameter).all()) for parameter in layer.form.trained)
    ]
    hold = counted(len(broken), "layer holds", "layers hold")
    found = [f"{hold} NaN or infinity: {few(broken)}"] if broken else []
    of_layers = {id(parameter) for layer in layers.values() for parameter in layer.form.trained}
    with showing_factors(model):
        others = {name: tensor for name, tensor in model.named_parameters() if id(tensor) not in of_layers}
    others = {name: tensor for name, tensor in others.items() if tensor.is_floating_point() and tensor.numel()}
    # Infinity may be meant in a buffer, NaN nowhere.
    bad = [name for name, tensor in others.items() if not bool(torch.isfinite(tensor).all())]
    bad += [name for name, tensor in model.named_buffers() if bool(torch.isnan(tensor).any())]
    hold = counted(len(bad), "tensor beside the layers' holds", "tensors beside the layers' hold")
    return [*found, f"{hold} NaN: {few(bad)}"] if bad else found
