"""The calls by which a training step enters a model, kept for a moment so that they can be run again.

The step itself is never changed: hooks note what each network was called with.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import SVDLayer, marks_of_gradients
from lightning_svd.layers.parts import InParts
from lightning_svd.model.values import leaves, mapped, once_each, with_own_attributes

# A loop over time steps calls one module thousands of times: of calls that look alike this many are kept, the others
# are counted as repetitions of the last; and of all calls together no more than that.
ALIKE, KEPT = 32, 10_000


@dataclass(eq=False)
class Call:
    """A call of a module from outside.

    Attributes:
        module: What was called.
        args: Positional arguments. Tensors share the memory of the user's, but hold no graph; whether they required
            gradients is kept. Of plain objects, and of what is in them, copies: a model may write there.
        kwargs: Arguments by keyword.
        inference: Whether it was in ``torch.inference_mode``.
        grad: Whether gradients were enabled.
        times: How many such calls it stands for.
        differentiates: Whether the module is known to differentiate in its forward pass, so that it fails without
            gradients.
        backwards: How many backward passes there had been before it.
        autocast: Type of device -> what autocast computed in there, None where it was off; of no other device it is
            known.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    inference: bool = False
    grad: bool = True
    times: int = 1
    differentiates: bool = False
    backwards: int = 0
    autocast: dict[str, torch.dtype | None] = dataclasses.field(default_factory=dict)

    @contextmanager
    def in_its_autocast(self) -> Iterator[None]:
        """Autocast as it was."""
        with ExitStack() as stack:
            for device, dtype in self.autocast.items():
                stack.enter_context(torch.autocast(device, dtype, enabled=dtype is not None))
            yield

    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def inputs_of(calls: Sequence[Call]) -> int:
    """How many inputs a batch has: the first dimension of the first tensor that the first call got; 1 without one."""
    sizes = (len(tensor) for call in calls[:1] for tensor in call.tensors() if tensor.ndim)
    return next(sizes, 1)


class CallWatcher:
    """Sees by hooks which modules are called from outside; derive from it to say what is done then.

    Outside means: from no other module that is watched. A step may call the whole, a network in it, by a method the
    parts of a network, several networks, one several times. What runs in a backward pass (activation checkpoints) is no
    call of its own. Of a compiled module only the call of the whole is seen.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._open: list[nn.Module] = []
        self._forwards: dict[nn.Module, Any] = {}
        self._compiled: dict[nn.Module, tuple[Any, Any]] = {}

    def entered(self, module: nn.Module) -> None:
        """A watched module is called, from outside or by another."""

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call from outside begins."""

    def returned(self, module: nn.Module, output: Any) -> None:
        """A call from outside has ended; ``output`` is None where it raised."""

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Watch these modules from now on."""
        for module in modules:
            self._forwards[module] = _forward_on(module)
            entering, leaving = UncopiedHook(self._enter), UncopiedHook(self._leave)
            self._handles += [
                module.register_forward_pre_hook(entering, prepend=True, with_kwargs=True),
                module.register_forward_hook(leaving, always_call=True),
            ]
            self._watch_compiled(module)

    def stop(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        for child, (ours, theirs) in self._compiled.items():
            if vars(child).get("_compiled_call_impl") is ours:
                vars(child)["_compiled_call_impl"] = theirs
        own: list[Any] = [self._handles, self._open, self._forwards, self._compiled]
        for container in own:
            container.clear()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module not in self._forwards:
            return
        if _forward_on(module) is not self._forwards[module]:
            return  # a strategy leads `training_step` through the module's call; the step's own calls come inside
        self._open.append(module)
        self.entered(module)
        if len(self._open) == 1 and not in_backward():
            self.called(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module not in self._open:  # it was never entered: another's hook raised before
            return
        while self._open.pop() is not module:
            pass
        if not self._open and not in_backward():
            self.returned(module, output)

    def _watch_compiled(self, module: nn.Module) -> None:
        # What `module.compile()` sets, a private attribute, calls hooks from inside the compiled code only.
        compiled: Any = vars(module).get("_compiled_call_impl")
        if compiled is not None:

            def call(*args: Any, **kwargs: Any) -> Any:
                output = None
                self._enter(module, args, kwargs)
                try:
                    output = compiled(*args, **kwargs)
                    return output
                finally:
                    self._leave(module, args, output)

            vars(module)["_compiled_call_impl"] = call
            self._compiled[module] = call, compiled


class CallRecorder(CallWatcher):
    """Notes which modules that hold a layer were called from outside, and with what; for one batch at a time.

    Of a compiled module all layers are taken to be called. Memory is bounded: of each module's calls that look alike
    (shapes, dtypes, flags) :data:`ALIKE` are kept, of all together :data:`KEPT`; tensors are not copied, so that a
    model that writes into its input is replayed on what it wrote. Start it before a batch, and stop it after.

    Attributes:
        calls: What was called since it was started, in order.
        seen: Names of the layers that were called, parts of attention and recurrent modules with their owner.
        left_out: How many calls were one too many to be kept.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, SVDLayer]) -> None:
        super().__init__()
        self.module, self.layers = module, layers
        self.calls: list[Call] = []
        self.seen: set[str] = set()
        self.left_out = 0
        self._rests = False
        self._alike: Counter[Any] = Counter()
        self._last: dict[Any, Call] = {}
        self._names: dict[nn.Module, list[str]] = {}
        self._backwards, self._gradients = 0, self._present_gradients()

    def start(self) -> None:
        """Forget what was noted, and note from now on."""
        self.stop()
        self.calls, self.seen, self.left_out = [], set(), 0
        self._backwards, self._gradients = 0, self._present_gradients()
        names = {id(layer): name for name, layer in self.layers.items()}
        for child in holders(self.module, self.layers.values()):
            own = [child, *(child.parts().values() if isinstance(child, InParts) else ())]
            own = [*_all_parts(child)] if is_compiled(child) else own
            self._names[child] = [names[id(part)] for part in own if id(part) in names]
        self.watch(self._names)

    def stop(self) -> None:
        """Note no more; what was noted stays."""
        super().stop()
        noted: list[Any] = [self._alike, self._last, self._names]
        for container in noted:
            container.clear()

    def keep_one_batch(self) -> None:
        """Drop what a loop that nobody follows called beside one batch: evaluations before it, and batches like it.

        Between two backward passes there is a batch, or a part of one: parts alike are batches whose gradients are
        accumulated, others belong to the same, as those of two networks that train each other do.
        """
        trained = [call for call in self.calls if call.grad and not call.inference] or self.calls
        parts: dict[int, list[Call]] = {}
        for call in trained:
            parts.setdefault(call.backwards, []).append(call)
        alike: dict[Any, list[Call]] = {}
        for part in parts.values():
            alike.setdefault(tuple((id(c.module), *(t.shape[1:] for t in c.tensors())) for c in part), part)
        self.calls = [call for part in alike.values() for call in part]

    def _present_gradients(self) -> Any:
        """What is another after each backward pass."""
        layers = [layer for layer in self.layers.values() if isinstance(layer, SVDLayer)]  # not those tried as plain
        own = [p for layer in layers for p in layer.form.trained]
        others = [p for p in self.module.parameters() if type(p) is not DenseWeight]
        # In a functional call others stand in the parameters' places, which may be no leaves.
        return marks_of_gradients(p for p in (*own, *others) if p.is_leaf)

    def entered(self, module: nn.Module) -> None:
        """Note the layers that it is, or stands for."""
        self.seen.update(self._names[module])

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the call."""
        if not self._rests:
            self._note(module, args, kwargs)

    @property
    def is_inside(self) -> bool:
        """Whether this runs in a call that is noted."""
        return bool(self._open) or in_backward()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Note no calls inside."""
        before, self._rests = self._rests, True
        try:
            yield
        finally:
            self._rests = before

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = getattr(module, "_orig_mod", module)  # what torch.compile stands for
        flat = [*leaves((args, kwargs))]
        inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        gradients = self._present_gradients()
        self._backwards += gradients != self._gradients
        self._gradients = gradients
        kind = (id(module), inference, grad, *map(_look, flat))
        times = max((_outside_of_transforms(leaf)[1] for leaf in flat if isinstance(leaf, Tensor)), default=1)
        full = len(self.calls) >= KEPT
        if kind in self._last and (full or self._alike[kind] >= ALIKE):
            self._last[kind].times += times
        elif full:
            self.left_out += 1
        else:
            keep = once_each(_without_graph), once_each(with_own_attributes)
            given = mapped(args, *keep), mapped(dict(kwargs), *keep)
            autocast = _autocast_of(flat)
            call = Call(module, *given, inference, grad, times, backwards=self._backwards, autocast=autocast)
            self.calls.append(call)
            self._last[kind] = call
            self._alike[kind] += 1


def holders(module: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules in ``module`` that are one of these layers, or hold one."""
    chosen = {id(layer) for layer in layers}
    return [child for child in module.modules() if any(id(part) in chosen for part in _all_parts(child))]


def _forward_on(module: nn.Module) -> Any:
    """What was set on a module in the place of its class's ``forward``; None if nothing was."""
    own = vars(module).get("forward")  # a strategy that has replaced it for a moment leaves the bound method there
    return None if getattr(own, "__func__", own) is getattr(type(module), "forward", None) else own


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has wrapped it, or its calls."""
    return hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None


class UncopiedHook:
    """A hook that does nothing in copies and pickles of its module, which would take along what it notes for.

    Args:
        function: What is called.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """Call the function, but from code that is being compiled."""
        if not torch.compiler.is_compiling():
            self.function(*args)

    def __reduce__(self) -> Any:
        return _nothing_to_do, ()


def _nothing_to_do() -> Callable[..., None]:
    return _ignore


def _ignore(*_: Any) -> None:
    pass


def _all_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in ``module``, those that an attention or a recurrent module hides among them."""
    for child in module.modules():
        yield child
        if isinstance(child, InParts):
            yield from child.parts().values()


def _autocast_of(flat: Iterable[Any]) -> dict[str, torch.dtype | None]:
    """How autocast is set for the devices of tensors."""
    devices = {leaf.device.type for leaf in flat if isinstance(leaf, Tensor)}
    return {
        device: torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        for device in sorted(filter(torch.amp.is_autocast_available, devices))
    }


def _look(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, (bool, int, float, str)) or leaf is None else type(leaf)


def _outside_of_transforms(tensor: Tensor) -> tuple[Tensor, int]:
    """What a tensor is outside of ``torch.func``'s transforms, and how many such a ``vmap`` goes through: the first.

    There is no public way to ask; in a replay, after the transform, the tensor itself would be of no use.
    """
    functorch: Any = torch._C._functorch
    times = 1
    with torch._C._DisableFuncTorch():
        while functorch.is_functorch_wrapped_tensor(tensor):
            axis = functorch.maybe_get_bdim(tensor)
            tensor = functorch.get_unwrapped(tensor)
            if axis >= 0:
                times *= tensor.shape[axis]
                tensor = tensor.select(axis, 0)
        return tensor, times


def _without_graph(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return tensor
    outside, _ = _outside_of_transforms(tensor)
    with torch._C._DisableFuncTorch():
        detached = outside.detach()
        return detached.requires_grad_() if outside.requires_grad else detached


def in_backward() -> bool:
    """Whether this runs in a backward pass, as what an activation checkpoint computes again does."""
    # As torch.utils.checkpoint asks; there is no public way.
    return bool(torch._C._current_graph_task_id() != -1)
