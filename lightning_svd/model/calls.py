"""The calls by which a training step enters a model, kept for a moment so that they can be run again.

The step itself is never changed: hooks note what each network was called with. What a forward pass costs, and whether a
changed layer still computes the same, is found afterwards by replaying those calls, in evaluation and without a trace.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import FunctionType, MethodType, ModuleType
from typing import Any
from weakref import ProxyTypes

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_all_modules
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lightning_svd.layers.compounds import evaluating
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.parts import InParts

# A loop over time steps calls one module thousands of times: of calls that look alike this many are kept, the others
# are counted as repetitions of the last; and of all calls together no more than that.
ALIKE, KEPT = 32, 10_000
# What a model or its hooks remember is restored after a replay: so many containers deep, of large ones themselves only.
_CONTAINERS = (list, dict, set, deque)
_NO_PLAIN_OBJECTS = (type, ModuleType, FunctionType, MethodType, Tensor, nn.Module)
DEEP, MANY = 2, 1000
LARGE = 1 << 26  # bytes of an array of numpy's above which it is taken to be data, and not copied


@dataclass(eq=False)
class Call:
    """A call of a module from outside.

    Attributes:
        module: What was called.
        args: Positional arguments. Tensors share the memory of the user's, but hold no graph; whether they required
            gradients is kept.
        kwargs: Arguments by keyword.
        inference: Whether it was in ``torch.inference_mode``.
        grad: Whether gradients were enabled.
        times: How many such calls it stands for.
        differentiates: Whether the module is known to differentiate in its forward pass, so that it fails without
            gradients.
        backwards: How many backward passes there had been before it.
    """

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    inference: bool = False
    grad: bool = True
    times: int = 1
    differentiates: bool = False
    backwards: int = 0

    def tensors(self) -> list[Tensor]:
        """The tensors among its arguments."""
        return [leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


# ------------------------------------------------------------------------------------------------ nested values


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with every tensor in tuples, lists, dicts and dataclasses changed; of other objects, the very same."""
    if isinstance(value, Tensor):
        return change(value)
    try:
        return _rebuilt(value, change)
    except Exception:  # a class of the user's that is made in another way: as any other object
        return value


def _rebuilt(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return replace(value, **{name: mapped(item, change) for name, item in own.items()})
    if isinstance(value, Mapping):
        twin: Any = copy.copy(value)
        for key, item in value.items():
            twin[key] = mapped(item, change)
        return twin
    return value


def leaves(value: Any) -> Iterator[Any]:
    """What nested tuples, lists, dicts and dataclasses hold, in order, with a mark for where each of them begins."""
    if isinstance(value, (tuple, list)):
        yield f"{len(value)} items"
        for item in value:
            yield from leaves(item)
    elif isinstance(value, Mapping):
        yield f"keys {list(value)}"
        for item in value.values():
            yield from leaves(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from leaves({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        yield value


def logits_of(output: Any) -> Tensor | None:
    """The logits of an output that says which they are, as those of transformers do."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in an output; of one that has logits those alone."""
    logits = logits_of(output)
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor)] if logits is None else [logits]


def inputs_in(batch: Any) -> int:
    """How many inputs a batch has: the first dimension of its first tensor; 1 without one."""
    return next((len(leaf) for leaf in leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


# ------------------------------------------------------------------------------------------------- noting calls


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
            entering, leaving = _Hook(self._enter), _Hook(self._leave)
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
        gradients = (p.grad for p in (*own, *others) if p.is_leaf)
        return [(id(gradient), gradient._version) for gradient in gradients if gradient is not None]

    def entered(self, module: nn.Module) -> None:
        """Note the layers that it is, or stands for."""
        self.seen.update(self._names[module])

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the call."""
        self._note(module, args, kwargs)

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
            keep = _once_each(_without_graph)
            given = mapped(args, keep), mapped(dict(kwargs), keep)
            call = Call(module, *given, inference, grad, times, backwards=self._backwards)
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


class _Hook:
    """A hook that does nothing in copies and pickles of its module, which would take the recorder along."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
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


def _once_each(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``change`` that gives the same for the same: attention looks whether its query is its key."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def changed(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor, change(tensor)
        return known[id(tensor)][1]

    return changed


def in_backward() -> bool:
    """Whether this runs in a backward pass, as what an activation checkpoint computes again does."""
    # As torch.utils.checkpoint asks; there is no public way.
    return bool(torch._C._current_graph_task_id() != -1)


# ------------------------------------------------------------------------------------------------ running again


def replay(
    module: nn.Module,
    calls: Sequence[Call],
    watch: Callable[[Call], AbstractContextManager[Any]] | None = None,
) -> list[Any]:
    """Run calls again as in evaluation, and leave everything as it was.

    Afterwards each module is in its own mode; parameters and buffers, attributes, lists and tensors that the model
    keeps (counters, caches, states), those of objects among its attributes (the annealed weight of a loss), random
    states and the calls' tensors are as before. Randomness in the model is the same in every replay, whether it comes
    from torch, numpy, ``random`` or a generator of the model's. Gradients are off, unless the model differentiates in
    its forward pass. Autocast is as the caller has it. Hooks that the user registered do run, and what they keep (in
    lists, in objects, in variables of the function that made them) is as before. Objects that a model was called with,
    and what is done elsewhere, in files or global variables, are not undone.

    Args:
        module: The whole tree, whose modules may call each other.
        calls: Of modules in it.
        watch: Entered around each attempt at a call: one without gradients that fails is made again with them.

    Returns:
        What each call returned, detached.
    """
    with untouched(module), _keeping_what_hooks_keep(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the step has given them, or they are of a replay's own making
        return [run_again(call, watch) for call in calls]


def run_again(call: Call, watch: Callable[[Call], AbstractContextManager[Any]] | None = None) -> Any:
    """Run one call on clones of its tensors; what it returned, detached. Arguments as for :func:`replay`."""
    watch = watch or (lambda _: nullcontext())
    if not call.differentiates:
        try:
            return _attempt(call, watch, grad=False)
        except RuntimeError as error:
            if "grad" not in str(error):
                raise
    output = _attempt(call, watch, grad=True)
    call.differentiates = True
    return output


def _attempt(call: Call, watch: Callable[[Call], AbstractContextManager[Any]], grad: bool) -> Any:
    with torch.set_grad_enabled(grad), watch(call):
        output = call_again(call)
    return mapped(output, lambda tensor: tensor.detach())


def call_again(call: Call) -> Any:
    """What a call returns now, on clones of its tensors, with a graph where gradients are enabled."""
    grad = torch.is_grad_enabled()

    def fresh(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return tensor
        return tensor.detach().clone().requires_grad_(grad and tensor.requires_grad)

    # Clones: the model may write into what it gets.
    args, kwargs = mapped((call.args, call.kwargs), _once_each(fresh))
    return call.module(*args, **kwargs)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation inside, with nothing that it remembers changed afterwards, as in :func:`replay`."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(evaluating(module))
        stack.enter_context(_keeping_state(module))
        stack.enter_context(_same_randomness(module))
        stack.enter_context(_without_shortcuts())
        yield


@contextmanager
def _without_shortcuts() -> Iterator[None]:
    """Compute as in training: attention calls its layers, where torch has a fast path, and nothing is compiled."""
    stance: Any = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    with without_fast_path(), stance("force_eager") if stance else nullcontext():
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Attention computes in evaluation as in training, where torch's fast path may return another shape."""
    shortcut = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(shortcut)


@contextmanager
def _same_randomness(module: nn.Module) -> Iterator[None]:
    tensors = [*module.parameters(), *module.buffers()]
    cuda = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    # Masks of patches and of spectrograms often come from numpy; where nobody has imported it nobody draws from it.
    others = [random, *([sys.modules["numpy"].random] if "numpy" in sys.modules else [])]
    with torch.random.fork_rng(cuda), ExitStack() as stack:
        for generator in others:
            if rewind := _rewinding(generator):
                stack.callback(rewind)
            generator.seed(0)
        torch.default_generator.manual_seed(0)
        for index in cuda:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(0)
        yield


def _rewinding(generator: Any) -> Callable[[], Any] | None:
    """What has a generator of random numbers draw again what it draws from now on; None for any other object."""
    if generator is random or (isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom)):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        if generator is numpy or isinstance(generator, numpy.RandomState):
            return functools.partial(generator.set_state, generator.get_state())
        if isinstance(generator, numpy.Generator):
            return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return None


@contextmanager
def _keeping_state(module: nn.Module) -> Iterator[None]:
    """Parameters, buffers, attributes, and what is in containers and objects among those, as they were afterwards."""
    kept = _Kept()
    for child in module.modules():
        kept.attributes(child, and_objects=True)
    written = _Written([*module.parameters(), *kept.tensors])
    buffers = [(b, b._version, b.detach().clone()) for b in module.buffers() if not b.is_inference()]
    try:
        with written:
            yield
    finally:
        written.restore()
        kept.restore()
        with torch.no_grad():
            for buffer, version, values in buffers:
                if buffer._version != version:
                    buffer.copy_(values)


class _Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies a tensor just before something inside writes into it, to restore it; others cost nothing.

    RWKV halves weights when it first evaluates. That is found by where values lie, since ``.data`` hides it.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._at: dict[tuple[torch.device, int], list[Tensor]] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._versions = ExitStack()
        for tensor in tensors:
            if type(tensor) in (nn.Parameter, Tensor) and (place := _place(tensor)):
                self._at.setdefault(place, []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for leaf in leaves(given.get(argument.name)):
                        self._keep(leaf)
        return func(*args, **kwargs)

    def _keep(self, leaf: Any) -> None:
        for tensor in self._at.get(_place(leaf), ()) if isinstance(leaf, Tensor) else ():  # type: ignore[arg-type]
            if id(tensor) not in self._copies:
                # The user's graph, between whose forward and backward pass this may run, must not see it.
                self._versions.enter_context(same_version(tensor))
                self._copies[id(tensor)] = tensor, tensor.detach().clone()

    def restore(self) -> None:
        """Have all tensors as they were."""
        with torch.no_grad():
            for tensor, values in self._copies.values():
                tensor.copy_(values)
        self._versions.close()


def same_version(tensor: Tensor) -> AbstractContextManager[None]:
    """Have autograd not see what is written into a tensor inside; torch has no public way."""
    return torch.autograd._unsafe_preserve_version_counter(tensor)  # type: ignore[attr-defined]


def _place(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Where the memory of a tensor begins; None where it has none that can be asked for."""
    try:
        start = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, or without values
        return None
    return (tensor.device, start) if start else None


@contextmanager
def _keeping_what_hooks_keep(module: nn.Module) -> Iterator[None]:
    kept = _Kept()
    for hook in _forward_hooks(module):
        kept.function(hook)
    try:
        yield
    finally:
        kept.restore()


def _forward_hooks(module: nn.Module) -> Iterator[Any]:
    """The user's functions that a call of the module's parts calls, those for all modules among them."""
    # nn.Module's private dicts: there is no public way to ask what was registered.
    everywhere = (_of_all_modules._global_forward_pre_hooks, _of_all_modules._global_forward_hooks)
    own = ((child._forward_pre_hooks, child._forward_hooks) for child in module.modules())
    for hooks in (everywhere, *own):
        for hook in (*hooks[0].values(), *hooks[1].values()):
            if str(getattr(hook, "__module__", "")).partition(".")[0] != __name__.partition(".")[0]:  # ours count
                yield hook


class _Kept:
    """Containers, attributes, variables, arrays and generators of random numbers as they were, to be restored.

    Attributes:
        tensors: Those of a model that are neither its parameters nor its buffers, which whoever writes into them keeps.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._rewindings: list[Callable[[], Any]] = []

    def attributes(self, owner: Any, and_objects: bool = False) -> None:
        """Note an object's attributes, and what is in containers among them.

        Args:
            owner: A module, or an object of a hook's.
            and_objects: Whether tensors, arrays, generators and plain objects among them are noted too, as of a
                model's own.
        """
        self._container(vars(owner), DEEP, and_objects)

    def function(self, function: Any) -> None:
        """Note what a function keeps: its object's attributes, its arguments, and the variables that it closes over."""
        if id(function) in self._seen:
            return
        self._seen.add(id(function))
        inner = getattr(function, "__func__", function)  # a bound method's own
        self._kept_by(getattr(function, "__self__", None) if inner is not function else function)
        for cell in getattr(inner, "__closure__", None) or ():
            with suppress(ValueError):  # one that is empty still
                self._cells.append((cell, cell.cell_contents))
                self._kept_by(cell.cell_contents)
        for value in getattr(inner, "__defaults__", None) or ():
            self._kept_by(value)

    def _kept_by(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            for each in (value.func, *value.args, *value.keywords.values()):
                self._kept_by(each)
        elif isinstance(value, _CONTAINERS):
            self._container(value, DEEP)
        elif isinstance(value, (FunctionType, MethodType)):
            self.function(value)
        elif hasattr(value, "__dict__") and not isinstance(value, _NO_PLAIN_OBJECTS):
            self.attributes(value)

    def _container(self, container: Any, deep: int, and_objects: bool = False) -> None:
        if id(container) in self._seen:
            return
        self._seen.add(id(container))
        self._containers.append((container, {**container} if isinstance(container, dict) else [*container]))
        if len(container) <= MANY:
            for value in container.values() if isinstance(container, dict) else container:
                if issubclass(type(value), _CONTAINERS):  # past what a weak reference says that it is
                    if deep:
                        self._container(value, deep - 1, and_objects)
                elif and_objects and not issubclass(type(value), ProxyTypes):
                    self._object(value)

    def _object(self, value: Any) -> None:
        if type(value) is Tensor:
            self.tensors += [] if value.is_inference() else [value]
        elif rewind := _rewinding(value):
            self._rewindings.append(rewind)
        elif _is_small_array(value):
            self._arrays.append((value, value.copy()))
        elif not isinstance(value, _NO_PLAIN_OBJECTS) and isinstance(own := getattr(value, "__dict__", None), dict):
            self._container(own, DEEP)

    def restore(self) -> None:
        """Have everything as it was noted."""
        for rewind in self._rewindings:
            rewind()
        for array, before in self._arrays:
            array[...] = before
        for container, before in self._containers:
            _restore(container, before)
        for cell, before in self._cells:
            if cell.cell_contents is not before:
                cell.cell_contents = before


def _is_small_array(value: Any) -> bool:
    """Whether it is an array of numpy's that a model may write into: a memory that it keeps, and no data set."""
    if "numpy" not in sys.modules or type(value) is not sys.modules["numpy"].ndarray:
        return False
    return bool(value.flags.writeable) and value.nbytes <= LARGE


def _restore(container: Any, before: Any) -> None:
    if isinstance(container, dict):
        if [*container] != [*before] or any(container[key] is not value for key, value in before.items()):
            container.clear()
            container.update(before)
    elif [*map(id, container)] != [*map(id, before)]:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(before)


# ------------------------------------------------------------------------------------------------- fewer inputs


def inputs_of(calls: Sequence[Call]) -> int:
    """How many inputs a batch has: the first dimension of the first tensor that the first call got; 1 without one."""
    sizes = (len(tensor) for call in calls[:1] for tensor in call.tensors() if tensor.ndim)
    return next(sizes, 1)


def cut(module: nn.Module, calls: Sequence[Call], few: int) -> tuple[list[Call], int]:
    """The calls with a few of the batch's inputs, where that is safe; the same calls otherwise.

    It is safe where all tensors of a call have the same first dimension, the batch or a multiple of it, the calls can
    be made so, and the first dimension of every output falls with it.

    Args:
        module: The whole tree.
        calls: Of one batch.
        few: How many inputs are enough.

    Returns:
        Calls, and how many inputs they hold.
    """
    whole, batch = list(calls), inputs_of(calls)
    rows = [{len(tensor) if tensor.ndim else batch for tensor in call.tensors()} for call in whole]
    if batch <= few or any(len(sizes) != 1 or min(sizes) % batch for sizes in rows):
        return whole, batch
    try:
        before = replay(module, whole)
        fewer = [_first(call, min(sizes) // batch * few) for call, sizes in zip(whole, rows, strict=True)]
        after = replay(module, fewer)
    except Exception:
        return whole, batch
    for sizes, *outputs in zip(rows, before, after, strict=True):
        shapes = [
            [leaf.shape for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.ndim] for output in outputs
        ]
        expected = (min(sizes), min(sizes) // batch * few)
        if not shapes[0] or len(shapes[0]) != len(shapes[1]):
            return whole, batch
        if any((a[0], b[0]) != expected for a, b in zip(*shapes, strict=True)):
            return whole, batch
    return fewer, few


def _first(call: Call, rows: int) -> Call:
    def narrow(tensor: Tensor) -> Tensor:
        kept = tensor.detach()[:rows] if tensor.ndim else tensor
        return kept.requires_grad_(tensor.requires_grad)

    args, kwargs = mapped((call.args, call.kwargs), _once_each(narrow))
    return replace(call, args=args, kwargs=kwargs)
