"""Targets drawn from what a model puts out: what its outputs are, and gradients of its own uncertainty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_svd.layers.matrices import wide
from lightning_svd.model.values import logits_of, tensors_of


def numbers_in(output: Any) -> list[Tensor]:
    """The tensors of an output with fractions, as real numbers; of one that has logits those alone."""
    real = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tensors_of(output)]
    return [leaf for leaf in real if leaf.is_floating_point() and leaf.numel()]


def is_distribution(output: Any) -> bool:
    """Whether an output says that it is the logits of a distribution, as those of transformers do.

    Not those of a single class, which are a regression's, nor maps of them, whose classes are not the last dimension.
    """
    logits = logits_of(output)
    return logits is not None and logits.ndim in (1, 2, 3) and logits.shape[-1] > 1


def drawn_gradients(output: Any, generator: torch.Generator) -> list[Tensor]:
    """A gradient for each tensor of an output that has one, of a loss against targets drawn from the output itself.

    For logits of a distribution the cross entropy of classes that are drawn from them, for any other a squared error
    with normal noise of the output's own size. Second moments of such gradients are the Fisher information.
    """
    draw = _from_logits if is_distribution(output) else _noise
    return [draw(tensor.detach(), generator) for tensor in numbers_in(output) if tensor.requires_grad]


def _from_logits(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the log likelihood of classes drawn from the logits (..., classes)."""
    shares = wide(logits).softmax(-1)
    rows = shares.flatten(0, -2) if shares.ndim > 1 else shares.unsqueeze(0)
    drawn = torch.multinomial(rows.cpu(), 1, generator=generator).to(rows.device)
    ones = torch.ones_like(drawn, dtype=rows.dtype)
    return rows.scatter_add(-1, drawn, -ones).reshape(logits.shape).to(logits)


def _noise(values: Tensor, generator: torch.Generator) -> Tensor:
    size = wide(values).square().mean().sqrt()
    noise = torch.randn(values.shape, generator=generator).to(values)
    return torch.where(size > 0, noise / size.to(values), 0.0)  # an output of zeros has no size of its own
