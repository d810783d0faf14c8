"""Batches that a trained model is looked at with, and how far its outputs are from what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.layers.matrices import wide
from lightning_svd.model.calls import leaves, mapped, untouched

Loss = Callable[[nn.Module, Any], Tensor]


_A_BATCH = (
    "A batch is a tensor, a tuple of arguments or a dict of arguments by keyword: of a loader of inputs and labels "
    "give the inputs, `(x for x, _ in loader)`, or a `loss`"
)


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
            ValueError: If it fails.
        """
        copied = mapped(batch, lambda tensor: tensor.clone())  # the model may write into what it gets
        try:
            if self.loss is not None:
                return self.loss(self.model, copied)
            if isinstance(copied, Mapping):
                return self.model(**copied)
            return self.model(*copied) if isinstance(copied, (tuple, list)) else self.model(copied)
        except Exception as error:
            what = "`loss(model, batch)`" if self.loss is not None else "the model"
            hint = "" if self.loss else f". {_A_BATCH}"
            raise ValueError(f"{what} fails for a batch of `batches`: {type(error).__name__}: {error}{hint}") from error

    def outputs(self, batches: Sequence[Any]) -> list[list[Tensor]]:
        """The tensors of numbers that the model puts out for batches, or the losses, without gradients."""
        found = []
        with untouched(self.model), torch.no_grad():
            for batch in batches:
                output = self.call(batch)
                if self.loss is None and is_distribution(output):
                    self.measure = "Kullback-Leibler divergence"
                found.append([tensor.detach() for tensor in numbers_in(output)])
        return found

    def distance(self, before: Sequence[Sequence[Tensor]], now: Sequence[Sequence[Tensor]]) -> float:
        """How far outputs are from those before: the loss on top, the mean divergence of distributions, or a share."""
        pairs = [pair for some in zip(before, now, strict=True) for pair in zip(*some, strict=True)]
        pairs = [(wide(one), wide(other)) for one, other in pairs]
        if self.loss is not None:
            return sum(float(other.sum() - one.sum()) for one, other in pairs) / len(pairs)
        if self.measure.startswith("Kullback"):
            sums = [(float(_divergence(one, other).sum()), float(one[..., 0].numel())) for one, other in pairs]
        else:
            sums = [(float((other - one).square().sum()), float(one.square().sum())) for one, other in pairs]
        total, size = sum(each for each, _ in sums), sum(each for _, each in sums)
        return total / size if size else total


def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    one = logits.log_softmax(-1)
    divergence: Tensor = (one.exp() * (one - other.log_softmax(-1))).sum(-1)
    return divergence


def inputs_in(batch: Any) -> int:
    """How many inputs a batch has: the first dimension of its first tensor; 1 without one."""
    return next((len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def numbers_in(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output; of one that has logits those alone."""
    logits = getattr(output, "logits", None)
    found = [logits] if isinstance(logits, Tensor) else leaves(output)
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def is_distribution(output: Any) -> bool:
    """Whether an output says that it is the logits of a distribution, as those of transformers do."""
    return isinstance(getattr(output, "logits", None), Tensor)
