"""Steps that use fewer ranks than are trained: from their call of the model until their backward passes are over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_svd.layers.forms import SVDForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.calls import Call, CallWatcher, holders
from lightning_svd.model.replay import replay
from lightning_svd.training.distillation import Distillation, Distiller


class StepRanks(CallWatcher):
    """Has each step compute with the ranks that were drawn for it, and everybody else see what is trained.

    Layers take the ranks when the model is called in training mode with gradients enabled, so that neither validation
    nor what the user looks at between steps meets them. They have them until :meth:`restore`, since an activation
    checkpoint computes again in the backward pass.

    Args:
        model: What is trained.

    Attributes:
        drawn: The ranks of the present step by layer; None for all.
        distiller: What pulls such a step towards what all ranks put out; None without it.
        norms: The model's batch normalizations, once calls are seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.drawn: Mapping[str, int] | None = None
        self.distiller: OwnTeacher | None = None
        self._layers: dict[str, SVDLayer] = {}
        self._own: dict[str, int] = {}  # ranks of the layers that use fewer now
        self.norms: list[_BatchNorm] = []
        self._held: list[tuple[_BatchNorm, float | None, Tensor | None]] = []  # momentum, and batches that were counted

    def start(self, layers: Mapping[str, SVDLayer], teaches: bool | Distillation) -> None:
        """See calls of the model from now on; does nothing where it does already.

        Args:
            layers: The factorized layers.
            teaches: Whether, and how, a step with fewer ranks is taught by all of them.
        """
        if self._layers:
            return
        self._layers = dict(layers)
        self.norms = [child for child in self.model.modules() if isinstance(child, _BatchNorm)]
        self.watch(holders(self.model, layers.values()))
        if teaches:
            self.distiller = OwnTeacher(Distillation() if teaches is True else teaches, self)
            self.distiller.start(layers)

    def stop(self) -> None:
        """See no calls any more; all ranks are in use."""
        self.restore()
        self.drawn = None
        if self.distiller is not None:
            self.distiller.stop()
        self._layers = {}
        super().stop()

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Use the drawn ranks from here on."""
        if self.draws():
            self._use()

    def draws(self) -> bool:
        """Whether a call of the model that begins now is one of a step with fewer ranks."""
        return self.drawn is not None and self.model.training and torch.is_grad_enabled()

    def _use(self) -> None:
        for name, rank in (self.drawn or {}).items():
            layer = self._layers[name]
            if isinstance(layer.form, SVDForm) and rank < layer.rank:
                self._own[name], layer.form.rank = layer.rank, rank
        for norm in () if self._held else self.norms:
            if norm.training and norm.running_mean is not None:
                counted = norm.num_batches_tracked if norm.momentum is None else None  # whose mean is of all batches
                self._held.append((norm, norm.momentum, None if counted is None else counted.clone()))
                norm.momentum = 0.0

    def restore(self) -> None:
        """Use all ranks again."""
        for name, rank in self._own.items():
            self._layers[name].form.rank = rank
        for norm, momentum, counted in self._held:
            norm.momentum = momentum
            if counted is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(counted)
        self._own, self._held = {}, []

    @contextmanager
    def all_ranks(self) -> Iterator[None]:
        """Use all ranks inside."""
        used = bool(self._own or self._held)
        self.restore()
        try:
            yield
        finally:
            if used:
                self._use()


class OwnTeacher(Distiller):
    """The model with all its ranks, which teaches the same model with fewer (in-place distillation).

    As a teacher it runs in evaluation, and remembers nothing of it; but it normalizes by the batch where the student
    does, as in a step with all ranks: running statistics are those of its weights a few steps ago.
    """

    def __init__(self, asked: Distillation, step_ranks: StepRanks) -> None:
        super().__init__(asked, step_ranks.model, nn.Identity())
        self._step_ranks = step_ranks

    def entered(self, module: nn.Module) -> None:
        """It may call itself."""

    def _chosen(self, layers: Mapping[str, SVDLayer]) -> dict[nn.Module, Call]:
        return {module: Call(module) for module in self._students(layers)}

    def _teaches(self) -> bool:
        return self._step_ranks.draws()

    def _ask(self, call: Call) -> Any:
        norms = [norm for norm in self._step_ranks.norms if norm.training]

        @contextmanager
        def by_the_batch(_: Call) -> Iterator[None]:
            for norm in norms:
                norm.training = True
            yield

        with self._step_ranks.all_ranks():
            return replay(self.model, [call], by_the_batch)[0]
