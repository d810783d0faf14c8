"""Statistics of layers from a few training batches, for ranks that are judged by what they do on data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.layers.dense_weight import in_transform
from lightning_svd.layers.layer import SVDLayer, Watch, watching
from lightning_svd.model.calls import Call, CallRecorder, CallWatcher, holders
from lightning_svd.model.noting import Pass
from lightning_svd.model.replay import call_again, untouched
from lightning_svd.model.targets import drawn_gradients, numbers_in
from lightning_svd.model.values import inputs_in
from lightning_svd.ranks.importance import OnData
from lightning_svd.ranks.statistics import Statistics, features_of
from lightning_svd.training import processes
from lightning_svd.wording import few


class CannotDrawError(ValueError):
    """A model that gives no gradients of targets drawn from its own outputs.

    Args:
        why: What is missing.
    """

    def __init__(self, why: str) -> None:
        super().__init__(
            f"the importance asks for gradients of targets that are drawn from the model's own outputs, and {why}: "
            "give `importance=Fisher(targets='given')`, which takes those of the loss, or `importance='outputs'`"
        )


class Observer(ABC):
    """Collects statistics of layers in the batches in which it is asked to.

    Of each layer it keeps two r x r matrices, from the first such batch until ranks are judged.

    Args:
        model: What is trained.
        layers: Its factorized layers by name.
        with_gradients: Whether statistics of gradients are wanted too.

    Attributes:
        seen: What was noted of each layer since ranks were judged last; empty if nothing was.
        batches: In how many batches.
        is_open: Whether a batch is being observed.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVDLayer], with_gradients: bool) -> None:
        self.model, self.layers, self.with_gradients = model, layers, with_gradients
        self.seen: dict[str, Statistics] = {}
        self.batches = 0
        self.is_open = False

    def know(self, layers: Mapping[str, SVDLayer]) -> None:
        """Of the layers only these are left."""
        self.layers = layers
        self.seen = {name: each for name, each in self.seen.items() if name in layers}

    # ------------------------------------------------------------------------------------------------------ a batch

    def begin_batch(self) -> None:
        """Observe from now on, what belongs to one batch; what was seen of one that never ended does not count."""
        self.rest()
        for name, layer in self.layers.items():
            if name not in self.seen:
                self.seen[name] = self._statistics(layer)
            elif processes.rank():
                self.seen[name].clear()  # process 0 has the sums of all
        self.is_open = True
        self._opened()

    def end_batch(self) -> None:
        """The batch is over, and what all processes have seen is added up; without effect where none is observed.

        So between batches each process has what a file is to hold, whoever writes it.

        Raises:
            Exception: What came of collecting statistics in any process, in every one.
        """
        if not self.is_open:
            return
        self.rest()
        processes.agree(self._closed)
        self._add_up()
        self.batches += 1

    def _statistics(self, layer: SVDLayer) -> Statistics:
        return Statistics(layer, self.with_gradients, checks=False)

    @abstractmethod
    def _opened(self) -> None:
        """A batch begins."""

    @abstractmethod
    def _closed(self) -> None:
        """A batch is over, and nothing is watched any more."""

    @abstractmethod
    def rest(self) -> None:
        """Watch nothing any more."""

    @abstractmethod
    def resting(self) -> AbstractContextManager[None]:
        """Note nothing inside."""

    @abstractmethod
    def check(self, calls: Sequence[Call]) -> None:
        """See whether statistics can be collected, with some calls of the model.

        Raises:
            CannotDrawError: If they cannot be of a layer that was called.
        """

    # ----------------------------------------------------------------------------------------------------- together

    def _add_up(self) -> None:
        if processes.size() == 1 or not self.seen:
            return
        counts = torch.tensor([(each.inputs, each.positions) for each in self.seen.values()], dtype=torch.int64)
        (first, *_) = self.seen.values()
        counts = counts.to(first.total.device)
        for tensor in (counts, *(tensor for each in self.seen.values() for tensor in each.sums().values())):
            processes.add_up(tensor)
        for each, (inputs, positions) in zip(self.seen.values(), counts.tolist(), strict=True):
            each.inputs, each.positions = inputs, positions

    def not_finite(self) -> list[str]:
        """The layers of which something that was noted is NaN or infinite."""
        sums = [torch.stack([tensor.sum() for tensor in each.sums().values()]).sum() for each in self.seen.values()]
        are_finite = torch.isfinite(torch.stack(sums)).tolist() if sums else []
        return [name for name, is_finite in zip(self.seen, are_finite, strict=True) if not is_finite]

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
        """Go on from what :meth:`state_dict` returned.

        Raises:
            ValueError: If that is not of these layers at these ranks; nothing is changed then.
        """
        seen = {}
        for name, saved in state["seen"].items():
            if name in self.layers:
                mine = seen[name] = self._statistics(self.layers[name])
                mine.inputs, mine.positions = saved["inputs"], saved["positions"]
                for key, tensor in mine.sums().items():
                    there = tuple(saved[key].shape) if key in saved else "missing"
                    if there != tuple(tensor.shape):
                        shapes = f"`{key}` is {there} there, {tuple(tensor.shape)} here"
                        raise ValueError(f"the checkpoint's statistics of `{name}` are not of this run: {shapes}")
                    tensor.copy_(saved[key])
        self.batches, self.seen = state["batches"], seen


class Listener(Observer, CallWatcher):
    """Notes the gradients of the very loss that is trained, in its own backward pass.

    A call counts when its gradient comes, so that neither validation nor a replay does, and what an activation
    checkpoint computes again does once. What is computed in a transform of ``torch.func`` does not.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVDLayer]) -> None:
        Observer.__init__(self, model, layers, with_gradients=True)
        CallWatcher.__init__(self)
        self._inputs = self._most = 0  # of the present call, and the most of any in this batch

    def _opened(self) -> None:
        self._inputs = self._most = 0
        self.watch(holders(self.model, self.layers.values()))
        self._tell(self._watch)

    def rest(self) -> None:
        """Watch nothing any more."""
        self.is_open = False
        self.stop()
        self._tell(None)

    def _closed(self) -> None:
        for each in self.seen.values():
            each.end_batch(max(1, self._most))

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Note nothing inside."""
        self._tell(None)
        try:
            yield
        finally:
            self._tell(self._watch if self.is_open else None)

    def check(self, calls: Sequence[Call]) -> None:
        """Nothing: what can be trained can be listened to."""

    def _tell(self, watch: Watch | None) -> None:
        for layer in self.layers.values():
            vars(layer)["watch"] = watch

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See how many inputs a call has."""
        self._inputs = inputs_in((args, kwargs))
        self._most = max(self._most, self._inputs)

    def _watch(self, layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        if out.requires_grad and not in_transform():
            # Features now, not when the gradient comes: by then the model may have written into x.
            between, inputs = features_of(layer, x, out, bias), self._inputs or len(x)

            def note(gradient: Tensor) -> None:
                statistics = self.seen.get(layer.svd_name)
                if statistics is not None:
                    statistics.see(layer, between)
                    statistics.see_gradient(layer, between, gradient, inputs)

            out.register_hook(note)  # type: ignore[no-untyped-call]
        return out


class Replayer(Observer):
    """Runs what a batch called once more, in evaluation, against targets drawn from what comes out.

    So it knows nothing of the loss, which may be zero for a net that is finetuned towards itself. Parameters' own
    gradients, the state of random numbers and what modules remember stay as they are.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, SVDLayer], with_gradients: bool) -> None:
        super().__init__(model, layers, with_gradients)
        self._recorder = CallRecorder(model, layers)

    def _opened(self) -> None:
        self._recorder.start()

    def rest(self) -> None:
        """Watch nothing any more."""
        self.is_open = False
        self._recorder.stop()

    def resting(self) -> AbstractContextManager[None]:
        """Note nothing inside."""
        return self._recorder.resting()

    def _closed(self) -> None:
        calls, self._recorder.calls = self._recorder.calls, []
        # Other draws in each batch and process.
        self._collect(calls, self.seen, self.batches * processes.size() + processes.rank())

    def check(self, calls: Sequence[Call]) -> None:
        """See whether statistics can be collected, with some calls of the model.

        Raises:
            CannotDrawError: If they cannot be of a layer that was called.
        """
        seen = {name: self._statistics(layer) for name, layer in self.layers.items()}
        with self.resting():
            reached, heard = self._collect(calls, seen, 0)
        unheard = [name for name, each in seen.items() if each.positions and name not in heard]
        if self.with_gradients and not reached:
            raise CannotDrawError("no output of it has a gradient")
        if self.with_gradients and unheard:
            raise CannotDrawError(
                f"gradients are off where {few(unheard)} is called, as in an activation checkpoint with "
                "`use_reentrant=True`"
            )

    def _collect(self, calls: Sequence[Call], seen: Mapping[str, Statistics], seed: int) -> tuple[bool, set[str]]:
        """Run calls again; returns whether a gradient came back from any, and the layers to which one can."""
        generator, reached, heard = torch.Generator().manual_seed(seed), False, set[str]()
        trained = [call for call in calls if call.grad] or calls
        with untouched(self.model), torch.set_grad_enabled(self.with_gradients):
            for call in trained:
                one = Pass(lambda layer: seen[layer.svd_name], inputs_in((call.args, call.kwargs)))
                with watching(self.layers.values(), one.watch):
                    output = call_again(call)
                    if self.with_gradients:
                        reached |= _differentiate(output, one.probes, generator)
                one.end()
                heard |= one.heard
        return reached, heard


def _differentiate(output: Any, probes: Sequence[Tensor], generator: torch.Generator) -> bool:
    """Have gradients come back to the probes, and nowhere else; returns whether there were any."""
    tensors = [tensor for tensor in numbers_in(output) if tensor.requires_grad]
    if not tensors or not probes:
        return False
    try:
        found = torch.autograd.grad(tensors, probes, drawn_gradients(output, generator), allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # not of every operator there is a derivative
        raise CannotDrawError(f"that fails: {error}") from error
    return any(gradient is not None for gradient in found)


def observer_of(importance: OnData, model: nn.Module, layers: Mapping[str, SVDLayer]) -> Observer:
    """What collects the statistics that an importance is measured by."""
    if importance.targets == "given":
        return Listener(model, layers)
    return Replayer(model, layers, importance.of_loss)
