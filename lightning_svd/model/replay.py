"""Calls that were noted run again, in evaluation and without a trace.

What a forward pass costs, and whether a changed layer still computes the same, is found so.
"""

from __future__ import annotations

import functools
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from types import CodeType, FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import Any
from weakref import ProxyTypes

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _of_all_modules
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_svd.layers.compounds import evaluating
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.model import compiled
from lightning_svd.model.calls import Call, inputs_of
from lightning_svd.model.values import DEEP, MANY, leaves, mapped, once_each, with_own_attributes

# What a model or its hooks remember is restored after a replay: so many containers deep, of large ones themselves only.
_CONTAINERS = (list, dict, set, deque)
_VALUES = (bool, int, float, complex, str, bytes, tuple, NoneType, Tensor)
_NO_PLAIN_OBJECTS = (type, ModuleType, FunctionType, MethodType, Tensor)
_PLAIN = (nn.Parameter, Tensor)
MOST = 100_000  # containers in one module that are looked into
# What is no code of a user's own; classes from there keep nothing outside of what they are part of.
LIBRARIES = ("lightning_svd", "torch", "lightning", "pytorch_lightning")
LARGE = 1 << 26  # bytes of an array of numpy's above which it is taken to be data, and not copied


def replay(
    module: nn.Module,
    calls: Sequence[Call],
    watch: Callable[[Call], AbstractContextManager[Any]] | None = None,
) -> list[Any]:
    """Run calls again as in evaluation, and leave everything as it was.

    Afterwards each module is in its own mode; parameters, their gradients and buffers, attributes, lists and tensors
    that the model keeps (counters, caches, states), those of objects among its attributes (the annealed weight of a
    loss), random states and the calls' tensors are as before. Randomness in the model is the same in every replay,
    whether it comes from torch, numpy, ``random`` or a generator of the model's. Gradients are off, unless the model
    differentiates in its forward pass. Autocast is as it was in the call. Hooks that the user registered do run, and
    what they keep (in lists, tensors, metrics and objects, in variables of the function that made them or of its file,
    whose functions they may call) is as before, and so is what ``forward`` keeps in such variables, in attributes of
    its class and in objects in objects of the model's own package. Objects that a model is called with, and what is in
    them, are copies. What is done elsewhere, in files, queues or by functions of other files, is not undone.

    Args:
        module: The whole tree, whose modules may call each other.
        calls: Of modules in it.
        watch: Entered around each attempt at a call: one without gradients that fails is made again with them.

    Returns:
        What each call returned, detached.
    """
    with untouched(module), warnings.catch_warnings():
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
    args, kwargs = mapped((call.args, call.kwargs), once_each(fresh), once_each(with_own_attributes))
    with call.in_its_autocast():
        return call.module(*args, **kwargs)


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation inside, with nothing that it remembers changed afterwards, as in :func:`replay`."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_own_gradients(module))
        stack.enter_context(_keeping_state(module))  # what a `train` of the user's own changes, too: LoRA merges there
        stack.enter_context(evaluating(module))
        stack.enter_context(_same_randomness(module))
        stack.enter_context(_without_shortcuts())
        yield


@contextmanager
def _without_shortcuts() -> Iterator[None]:
    """Compute as in training: attention calls its layers, where torch has a fast path, and nothing is compiled."""
    with without_fast_path(), compiled.as_written():
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
def _own_gradients(module: nn.Module) -> Iterator[None]:
    """Gradients that backward passes inside leave are dropped: reversible blocks and local losses have such."""
    held = (p for p in module.parameters() if p.is_leaf)
    trained = [p for each in held for p in (each.source.trained_parameters() if type(each) is DenseWeight else [each])]
    before = [(parameter, parameter.grad) for parameter in trained]
    for parameter in trained:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


@contextmanager
def _keeping_state(module: nn.Module) -> Iterator[None]:
    """Parameters, buffers, attributes, what is in containers and objects among them, and what hooks keep, as before."""
    kept = _Kept()
    kept.modules(module, and_objects=True)
    for of in {type(child) for child in module.modules()}:
        kept.forward_of(of)
    for hook in (*_hooks(module), *_own_forwards(module)):
        kept.function(hook)
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers(), *kept.tensors)}.values()
    written = _Written(tensors)
    buffers = [(b, b._version, b.detach().clone()) for b in module.buffers() if not b.is_inference()]
    memory = [(tensor, tensor.data) for tensor in tensors if type(tensor) in _PLAIN and _place(tensor)]
    try:
        with written:
            yield
    finally:
        for tensor, before in memory:  # where it was given another, as momentum encoders do: `.data = ...`
            if not tensor.is_set_to(before):
                tensor.data = before
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
            if type(tensor) in _PLAIN and (place := _place(tensor)):
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


_KINDS = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The user's functions that run with the module's parts, forward or backward, those for all modules among them."""
    # nn.Module's private dicts: there is no public way to ask what was registered.
    everywhere = (getattr(_of_all_modules, f"_global_{kind}") for kind in _KINDS)
    own = (getattr(child, f"_{kind}") for child in module.modules() for kind in _KINDS)
    for hooks in (*everywhere, *own):
        for hook in hooks.values():
            if package_of(getattr(hook, "__module__", "")) != package_of(__name__):  # ours count
                yield hook


def _own_forwards(module: nn.Module) -> Iterator[Any]:
    """What the user has set on modules in the place of their class's ``forward``."""
    for child in module.modules():
        own = vars(child).get("forward")
        function = getattr(own, "__func__", own)
        if isinstance(function, FunctionType) and package_of(function.__globals__.get("__name__")) not in LIBRARIES:
            yield own


class _Kept:
    """Containers, attributes, variables, arrays and generators of random numbers as they were, to be restored.

    Attributes:
        tensors: Those that a model or its hooks keep, to be copied before something writes into them.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._seen: set[int] = set()
        self._room = MOST  # for containers in what is looked into now
        self._packages: set[str] = set()  # of the model's own classes, whose objects may hold others
        self._containers: list[tuple[Any, Any]] = []
        self._cells: list[tuple[Any, Any]] = []
        self._variables: list[tuple[dict[str, Any], str, Any]] = []
        self._attributes: list[tuple[Any, str, Any]] = []  # of classes, and of objects with slots
        self._arrays: list[tuple[Any, Any]] = []
        self._rewindings: list[Callable[[], Any]] = []

    def modules(self, root: nn.Module, and_objects: bool = False) -> None:
        """Note the attributes of a tree's modules, and what is in containers among them.

        Args:
            root: Of the tree.
            and_objects: Whether generators and plain objects among them are noted too, as of a model's own.
        """
        if id(vars(root)) in self._seen:
            return
        self._packages |= {package_of(type(child).__module__) for child in root.modules()}.difference(LIBRARIES)
        new = [own for own in map(vars, root.modules()) if id(own) not in self._seen]
        self._seen.update(map(id, new))
        for own in new:
            self._room = MOST
            self._contents(own, DEEP, and_objects)

    def forward_of(self, module_class: type) -> None:
        """Note attributes of a class, and what the methods keep that its ``forward`` calls: a list for losses, say."""
        lines = [of for of in module_class.__mro__ if package_of(of.__module__) not in LIBRARIES]
        for of in lines:
            self._class(of)
        called, left = set[str](), ["forward"]
        while left:
            called.add(name := left.pop())
            for method in (vars(of).get(name) for of in lines):
                function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
                if isinstance(function, FunctionType):
                    self.function(function)
                    left += {*_names_in(function.__code__)} - called

    def _class(self, of: type) -> None:
        if id(of) not in self._seen:
            self._seen.add(id(of))
            for name, value in [*vars(of).items()]:
                if not name.startswith("__") and isinstance(value, (*_CONTAINERS, *_VALUES)):
                    self._attribute(of, name, value)
                else:
                    self._generator(value)

    def _attribute(self, of: Any, name: str, value: Any) -> None:
        self._attributes.append((of, name, value))
        if isinstance(value, (*_CONTAINERS, Tensor)):
            self._kept_by(value)

    def function(self, function: Any) -> None:
        """Note what a function keeps: its object's attributes, its arguments, and the variables that it uses.

        Of global ones those alone that are, or hold, numbers, tensors, containers, modules, functions of the same file,
        which it may call, classes of the model's own package, or objects of such: another object that everybody knows
        may be at work elsewhere.
        """
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
        if isinstance(inner, FunctionType):
            self._globals(inner)

    def _globals(self, function: FunctionType) -> None:
        there = function.__globals__
        for name in there.keys() & _names_in(function.__code__):
            value = there[name]
            is_called = isinstance(value, FunctionType) and value.__globals__ is there
            is_own = isinstance(value, SimpleNamespace) or package_of(type(value).__module__) in self._packages
            if is_called or is_own or isinstance(value, (*_CONTAINERS, nn.Module, Tensor)) or _is_small_array(value):
                self._kept_by(value)
            elif isinstance(value, type) and package_of(value.__module__) in self._packages:
                self._class(value)
            else:
                self._generator(value)
            if isinstance(value, (*_CONTAINERS, *_VALUES)):
                self._variables.append((there, name, value))

    def _kept_by(self, value: Any) -> None:
        self._room = MOST
        if isinstance(value, functools.partial):
            for each in (value.func, *value.args, *value.keywords.values()):
                self._kept_by(each)
        elif isinstance(value, _CONTAINERS):
            self._container(value, DEEP)
        elif isinstance(value, (FunctionType, MethodType)):
            self.function(value)
        elif (
            not self._generator(value)
            and not self._memory(value)
            and hasattr(value, "__dict__")
            and not isinstance(value, _NO_PLAIN_OBJECTS)
        ):
            self._container(vars(value), DEEP)

    def _container(self, container: Any, deep: int, and_objects: bool = False) -> None:
        of = type(container)
        if isinstance(container, (dict, list)) and of.__getitem__ not in (dict.__getitem__, list.__getitem__):
            return  # it gives others than it holds
        if id(container) not in self._seen:
            self._seen.add(id(container))
            self._contents(container, deep, and_objects)

    def _contents(self, container: Any, deep: int, and_objects: bool) -> None:
        self._containers.append((container, {**container} if isinstance(container, dict) else [*container]))
        self._room -= 1
        if len(container) <= MANY and self._room > 0:
            for value in container.values() if isinstance(container, dict) else container:
                if issubclass(type(value), _CONTAINERS):  # past what a weak reference says that it is
                    if deep:
                        self._container(value, deep - 1, and_objects)
                elif not issubclass(type(value), ProxyTypes):
                    self._value(value, and_objects)

    def _value(self, value: Any, and_objects: bool) -> None:
        if self._generator(value) or self._memory(value, and_objects) or not and_objects:
            return
        if not isinstance(value, _NO_PLAIN_OBJECTS):
            is_own = package_of(type(value).__module__) in self._packages
            if isinstance(own := getattr(value, "__dict__", None), dict):
                self._container(own, DEEP, is_own)
            if is_own and id(value) not in self._seen:
                self._seen.add(id(value))
                for name in (name for of in type(value).__mro__ for name in _slots(of)):
                    if hasattr(value, name):
                        self._attribute(value, name, getattr(value, name))

    def _generator(self, value: Any) -> bool:
        """Note what draws random numbers; whether it is such."""
        if type(value) in _VALUES:  # most are: they draw nothing
            return False
        if rewind := _rewinding(value):
            self._rewindings.append(rewind)
        return rewind is not None

    def _memory(self, value: Any, and_objects: bool = False) -> bool:
        """Note what may be written into: a tensor, an array, a module (a metric, say); whether it is one."""
        if isinstance(value, nn.Module):
            self.modules(value, and_objects)
        elif type(value) in _PLAIN:
            self.tensors += [] if value.is_inference() else [value]
        elif _is_small_array(value):
            self._arrays.append((value, value.copy()))
        else:
            return False
        return True

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
        for there, name, before in self._variables:
            there[name] = before
        for of, name, before in self._attributes:
            if getattr(of, name, None) is not before:
                setattr(of, name, before)


def package_of(module_name: object) -> str:
    """The package, or the file, that a module of Python's is in or is."""
    return str(module_name).partition(".")[0]


def _slots(of: type) -> Iterable[str]:
    """The names of a class's slots."""
    slots = vars(of).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def _names_in(code: CodeType) -> Iterator[str]:
    """The names of attributes and global variables in a function, and in those that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


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

    args, kwargs = mapped((call.args, call.kwargs), once_each(narrow))
    return replace(call, args=args, kwargs=kwargs)
