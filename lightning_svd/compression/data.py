"""Batches that a trained model is looked at with, and how far its outputs are from what they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.layers.matrices import wide
from lightning_svd.model.replay import untouched
from lightning_svd.model.targets import is_distribution, numbers_in
from lightning_svd.model.values import inputs_in, leaves, mapped
from lightning_svd.ranks.statistics import NotFiniteError

Loss = Callable[[nn.Module, Any], Tensor]
DIVERGENCE, CHANGED = "Kullback-Leibler divergence", "share of outputs that changed"


_A_BATCH = (
    "A batch is a tensor, a tuple of arguments or a dict of arguments by keyword: of a loader of inputs and labels "
    "give the inputs, `(x for x, _ in loader)`, or a `loss`"
)


class CallError(ValueError):
    """The model fails for a batch."""


class CalibrationData:
    """A few batches for a model, the last ones held out to judge by.

    Attributes:
        batches: What statistics are collected on.
        held_out: What the outcome is judged on; the same where there is one batch only.
        loss: Of a batch, if there is one; then batches are what it takes.
        inputs: How many inputs are in ``batches``.
        measure: What :meth:`distance` is.
    """

    def __init__(self, model: nn.Module, batches: Iterable[Any], inputs: int, loss: Loss | None = None) -> None:
        """Take batches until there are enough inputs.

        Args:
            model: On its device, to which the batches are moved.
            batches: Of inputs: a tensor, a tuple of arguments, or a dict of arguments by keyword. With a loss whatever
                that takes.
            inputs: How many are enough.
            loss: ``loss(model, batch)``, a scalar.

        Raises:
            ValueError: If there is no batch.
        """
        self.model, self.loss = model, loss
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        taken: list[Any] = []
        seen = 0
        for batch in batches:
            if _is_empty(batch):
                continue  # as a filter leaves that let nothing through
            taken.append(mapped(batch, lambda tensor: tensor.detach().to(device)))
            seen += inputs_in(batch)
            if seen >= inputs:
                break
        if not taken:
            raise ValueError("`batches` must hold at least one batch of inputs, got none")
        aside = max(1, round(len(taken) / 4)) if len(taken) > 1 else 0
        self.batches, self.held_out = taken[: len(taken) - aside], taken[len(taken) - aside :] or taken
        self.inputs = sum(map(inputs_in, self.batches))
        self.measure = "increase of the loss" if loss else "relative squared error"

    def call(self, batch: Any) -> Any:
        """What the model puts out, or the loss, for a batch.

        Raises:
            CallError: If it fails.
        """
        copied = mapped(batch, lambda tensor: tensor.clone())  # the model may write into what it gets
        try:
            if self.loss is not None:
                return self.loss(self.model, copied)
            if isinstance(copied, Mapping):
                return self.model(**copied)
            return self.model(*copied) if isinstance(copied, (tuple, list)) else self.model(copied)
        except NotFiniteError:
            raise
        except Exception as error:
            what = "`loss(model, batch)`" if self.loss is not None else "the model"
            hint = "" if self.loss else f". {_A_BATCH}"
            raise CallError(f"{what} fails for a batch of `batches`: {type(error).__name__}: {error}{hint}") from error

    def outputs(self, batches: Sequence[Any]) -> list[list[Tensor]]:
        """The tensors of numbers that the model puts out for batches, or the losses, without gradients.

        Raises:
            ValueError: If it fails, or there are none.
        """
        found = []
        with untouched(self.model), torch.no_grad():
            for batch in batches:
                output = self.call(batch)
                numbers = numbers_in(output)
                if not numbers and self.loss is None:
                    numbers = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)]
                    self.measure = CHANGED
                elif self.loss is None and is_distribution(output):
                    self.measure = DIVERGENCE
                if not numbers:
                    what = "`loss(model, batch)` must return" if self.loss else "the model must put out"
                    raise ValueError(f"{what} a tensor{' with fractions' if self.loss else ''}, got {_kind(output)}")
                for tensor in numbers:
                    if tensor.layout is not torch.strided or tensor.is_nested:
                        raise ValueError(f"the model must put out plain tensors, got {_kind(tensor)}")
                found.append([tensor.detach() for tensor in numbers])
        return found

    def distance(self, before: Sequence[Sequence[Tensor]], now: Sequence[Sequence[Tensor]]) -> float:
        """How far outputs are from those before: the loss on top, the mean divergence of distributions, or a share.

        What was not finite before does not count; NaN if nothing was, infinite if anything else is not finite now.
        """
        pairs = [pair for some in zip(before, now, strict=True) for pair in zip(*some, strict=True)]
        if any(one.shape != other.shape for one, other in pairs):
            return math.inf  # a shape that depends on values
        total, size, counted = 0.0, 0.0, 0
        for one, other in pairs:
            far, of, entries = self._apart(one, other)
            total, size, counted = total + far, size + of, counted + entries
        if not counted:
            return math.nan
        distance = total / size if size else total
        return math.inf if math.isnan(distance) else distance

    def _apart(self, one: Tensor, other: Tensor) -> tuple[float, float, int]:
        """What two outputs differ by, what that is a share of, and how many entries count."""
        if self.measure == CHANGED:
            return float((one != other).sum()), float(one.numel()), one.numel()
        one, other = wide(one), wide(other)
        if self.measure == DIVERGENCE:
            far, known = _divergence(one, other)
            return float(far.sum()), float(known.sum()), int(known.sum())
        known = torch.isfinite(one)
        one, other, entries = one[known], other[known], int(known.sum())
        if self.loss is not None:
            return float((other - one).sum()), float(entries), entries
        return float((other - one).square().sum()), float(one.square().sum()), entries


def _is_empty(batch: Any) -> bool:
    """Whether there are tensors in a batch, and no number in them."""
    tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    return bool(tensors) and not any(tensor.numel() for tensor in tensors)


def _kind(output: Any) -> str:
    """What an output is, for an error."""
    if not isinstance(output, Tensor):
        return type(output).__name__
    return f"one of {'nested tensors' if output.is_nested else output.layout}, {output.dtype}"


def _divergence(logits: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of each distribution, and whether it was one; what could not be drawn does not count."""
    one = logits.log_softmax(-1)
    shares, known = one.exp(), ~one.isnan().any(-1)
    terms = (shares * (one - other.log_softmax(-1))).where(shares > 0, torch.zeros_like(one))
    return terms.sum(-1)[known], known
