"""Statistics of layers from a few training batches, for ranks that are judged by what they do on data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.calls import CallWatcher, holders, inputs_in
from lightning_svd.ranks.statistics import Statistics, features_of
from lightning_svd.training import processes


class Observer(CallWatcher):
    """Notes what goes through layers, and the gradients that come back, in the batches in which it is asked to.

    A call counts when its gradient comes, so that neither validation nor a replay does, and what an activation
    checkpoint computes again does once. Of each layer it keeps two r x r matrices, from the first batch that it notes
    until ranks are judged.

    Args:
        model: What is trained.
        layers: Its factorized layers by name.
        with_gradients: Whether moments of gradients are wanted too.

    Attributes:
        seen: What was noted of each layer since ranks were judged last; empty if nothing was.
        batches: In how many batches.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVDLayer], with_gradients: bool) -> None:
        super().__init__()
        self.model, self.layers, self.with_gradients = model, layers, with_gradients
        self.seen: dict[str, Statistics] = {}
        self.batches = 0
        self._inputs = self._most = 0  # of the present call, and the most of any in this batch

    def know(self, layers: Mapping[str, SVDLayer]) -> None:
        """Of the layers only these are left."""
        self.layers = layers
        self.seen = {name: each for name, each in self.seen.items() if name in layers}

    # ------------------------------------------------------------------------------------------------------ a batch

    def begin_batch(self) -> None:
        """Note from now on, what belongs to one batch."""
        for name, layer in self.layers.items():
            if name not in self.seen:
                self.seen[name] = Statistics(layer, self.with_gradients, checks=False)
            vars(layer)["watch"] = self._watch
        self._inputs = self._most = 0
        self.watch(holders(self.model, self.layers.values()))

    def end_batch(self) -> None:
        """Note no more; without effect where nothing is noted."""
        if not self._forwards:
            return
        self.rest()
        self.batches += 1
        for each in self.seen.values():
            each.end_batch(max(1, self._most))

    def rest(self) -> None:
        """Note no more."""
        self.stop()
        for layer in self.layers.values():
            vars(layer)["watch"] = None

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Note nothing inside."""
        for layer in self.layers.values():
            vars(layer)["watch"] = None
        try:
            yield
        finally:
            for layer in self.layers.values() if self._forwards else ():
                vars(layer)["watch"] = self._watch

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See how many inputs a call has."""
        self._inputs = inputs_in((args, kwargs))
        self._most = max(self._most, self._inputs)

    def _watch(self, layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        if out.requires_grad:
            # Features now, not when the gradient comes: by then the model may have written into x.
            between, inputs = features_of(layer, x), self._inputs or len(x)

            def note(gradient: Tensor) -> None:
                statistics = self.seen.get(layer.layer_name)
                if statistics is not None:
                    statistics.see(layer, between)
                    statistics.see_gradient(layer, between, gradient, inputs)

            out.register_hook(note)  # type: ignore[no-untyped-call]
        return out

    # ----------------------------------------------------------------------------------------------------- together

    def gather(self) -> bool:
        """Add up what all processes have seen; returns whether all of it is finite."""
        counts = torch.tensor([(each.inputs, each.positions) for each in self.seen.values()], dtype=torch.int64)
        (first, *_) = self.seen.values()
        counts = counts.to(first.total.device)
        for tensor in (counts, *(tensor for each in self.seen.values() for tensor in each.sums().values())):
            processes.add_up(tensor)
        for each, (inputs, positions) in zip(self.seen.values(), counts.tolist(), strict=True):
            each.inputs, each.positions = inputs, positions
        sums = [tensor.sum() for each in self.seen.values() for tensor in each.sums().values()]
        return bool(torch.isfinite(torch.stack(sums)).all())

    def forget(self) -> None:
        """Begin anew."""
        self.seen, self.batches = {}, 0

    # ------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What was noted so far."""
        seen = {
            name: {"inputs": each.inputs, "positions": each.positions, **each.sums()}
            for name, each in self.seen.items()
        }
        return {"batches": self.batches, "seen": seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self.batches, self.seen = state["batches"], {}
        for name, saved in state["seen"].items():
            if name in self.layers:
                mine = self.seen[name] = Statistics(self.layers[name], self.with_gradients, checks=False)
                mine.inputs, mine.positions = saved["inputs"], saved["positions"]
                for key, tensor in mine.sums().items():
                    tensor.copy_(saved[key])
