"""The weight of a factorized layer as the rest of the model sees it: one dense parameter.

A factorized layer trains U, s and V, but the code around it was written for ``weight``: groups of parameters by name,
averages that walk two ``parameters()`` lists side by side, penalties, functions that read a weight's dtype. So the very
``nn.Parameter`` that the layer had stays in its place and becomes a :class:`DenseWeight`: it has no storage, answers
what it is (shape, dtype, device) for nothing, and is computed from the factors where its values are asked for,
differentiable as any function of theirs. Replacing all of its values (``copy_``) loads them, as ``load_state_dict``
does; a gradient that reaches it, past its type, goes on to the factors; whatever else would be lost is refused: other
writes, hooks, the values of its gradient, derivatives with respect to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn


class Source(Protocol):
    """What computes a weight: the factors behind it."""

    def weight_name(self) -> str:
        """How to call the weight in an error."""

    def layer_names(self) -> list[str]:
        """The layers to leave out for who wants to write into it."""

    def rebuilt(self) -> Tensor:
        """Its values, differentiable."""

    def load_weight(self, weight: Tensor) -> None:
        """Take these values."""

    def trained_parameters(self) -> Sequence[nn.Parameter]:
        """What is trained in its place."""


class DenseWeight(nn.Parameter):
    """A parameter without storage that stands for what factors multiply to.

    Attributes:
        source: What computes it.
    """

    source: Source

    @classmethod
    def take_over(cls, parameter: nn.Parameter, source: Source) -> DenseWeight:
        """Make ``parameter`` itself one, so that whoever holds it holds the weight still; its storage is let go."""
        face: Any = parameter
        face.grad = None
        face.data = _stand_in(face.shape, face)
        face.__class__, face.source = cls, source
        _listen(face)
        return face  # type: ignore[no-any-return]

    def give_back(self, values: Tensor) -> nn.Parameter:
        """Make it a plain parameter again, the same object, with these values."""
        face: Any = self
        if "listens" in vars(face):
            vars(face).pop("listens").remove()
        del face.source
        face.__class__ = nn.Parameter
        if values.is_meta != face.is_meta:  # where torch has no way to set the data
            torch.utils.swap_tensors(face, nn.Parameter(values.detach(), face.requires_grad))  # type: ignore[no-untyped-call]
        face.data = values.detach()
        return face  # type: ignore[no-any-return]

    def refresh(self, like: Tensor) -> None:
        """Take the dtype and the device of ``like``, one of its factors, which was moved."""
        if (self.dtype, self.device) != (like.dtype, like.device):
            source = self.source
            self.take_over(self.give_back(_stand_in(self.shape, like)), source)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OWN and isinstance(args[0], DenseWeight):
            return _OWN[func](*args, **kwargs)
        if _is_about(func) or (func is torch.Tensor.type and len(args) + len(kwargs) == 1):
            return _by_the_stand_in(func, args, kwargs)
        return _computed(func, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        values = nn.Parameter(self.source.rebuilt().detach(), self.requires_grad)
        if (process := get_spawning_popen()) is not None:
            # A process that is spawned, as a loader's worker is, gets memory that it shares with these values: they
            # have to be there when it starts, after the pickle is done.
            vars(process).setdefault("weights_of_factors", []).append(values)
        return values.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.source.rebuilt().detach().clone(), self.requires_grad)
        return memo[id(self)]


class DenseView(torch.Tensor):
    """Values of a :class:`DenseWeight`, or a view of them: read as any tensor, not to be written into.

    Attributes:
        source: What computes the weight.
        whole: Whether these are all of its values, which may be replaced.
    """

    source: Source
    whole: bool

    @classmethod
    def of(cls, values: Tensor, source: Source, whole: bool = False) -> DenseView:
        """``values`` as a view of the weight of ``source``."""
        view = values.as_subclass(cls)
        view.source, view.whole = source, whole
        return view

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NATIVE_OF_VIEWS or _is_about(func):
            return _by_the_stand_in(func, args, kwargs)
        if func in _DETACHES and isinstance(args[0], DenseView):
            return DenseView.of(args[0].as_subclass(torch.Tensor).detach(), args[0].source, args[0].whole)
        return _computed(func, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_is_param":  # as `nn.Parameter` notes what it makes of a tensor
            _refuse(self.source, "was to share its memory, which it has none of, with another parameter")
        super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), self.as_subclass(torch.Tensor).detach().clone())


class DenseGradient(torch.Tensor):
    """The gradients of U, s and V in the place of a weight's own, which nobody computes.

    They can be cleared, scaled, clamped, measured by a norm, as clipping does, and searched for what is not finite;
    anything else is refused.
    """

    source: Source

    @classmethod
    def of(cls, face: DenseWeight) -> DenseGradient | None:
        """The gradient of a weight; None where none of the factors has one."""
        if all(parameter.grad is None for parameter in face.source.trained_parameters()):
            return None
        gradient = _stand_in(face.shape, face).as_subclass(cls)
        gradient.source = face.source
        return gradient

    def factors(self) -> list[Tensor]:
        """Those of the factors."""
        return [p.grad for p in self.source.trained_parameters() if p.grad is not None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_about(func):
            return _by_the_stand_in(func, args, kwargs)
        name = _name_of(func)
        if name in ("data.__get__", "detach"):
            return args[0]
        if name in ("untyped_storage", "storage_offset", "grad.__get__"):  # torch.compile looks at what it is given
            return _by_the_stand_in(func, args, kwargs)
        first = next(value for value in _flattened((args, kwargs)) if isinstance(value, DenseGradient))
        by_entry = any(isinstance(each, Tensor) and each.numel() != 1 for each in _flattened((args[1:], kwargs)))
        if name in _ELEMENTWISE and first is args[0] and not by_entry:
            for gradient in first.factors():
                getattr(gradient, name)(*args[1:], **kwargs)
            return first
        if name in _ELEMENTWISE_OF_LISTS and not by_entry:
            parts = [_parts(gradient) for gradient in args[0]]
            rest = [_for_each(given, parts) for given in args[1:]]
            func([part for of_one in parts for part in of_one], *rest, **kwargs)
            return None
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
        if name in _NORMS and not isinstance(dim, (int, tuple, list)):
            return func(*(_flat(argument) for argument in args), **kwargs)
        if name in _SEARCHES:
            found = func(_flat(first))
            return (found.all() if name == "isfinite" else found.any()).expand(first.shape)
        return _refuse(first.source, f"has no gradient, of which `{name}` was asked")


def _by_the_stand_in(func: Any, args: Any, kwargs: Any) -> Any:
    """What the tensor itself answers, as one of no class of its own."""
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _stand_in(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor of this shape without storage of its size. NaN, so that whoever gets past the type does not go on."""
    return torch.full((), torch.nan, dtype=like.dtype, device=like.device).expand(shape)


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function returns for the values of weights and views among its arguments."""
    name = _name_of(func)
    first = next(_flattened((args, kwargs)), None)  # by keyword too, as torch's initializations pass it on
    mine = (DenseWeight, DenseView)
    if name == "equal" and args[0].shape != args[1].shape:
        return False  # as who looks a weight up among many asks of each
    if name == "_foreach_copy_":
        for target, given in zip(args[0], args[1], strict=True):
            target.copy_(given)
        return None
    written = [*_flattened(args[:1])] if name.startswith("_foreach") and args else [first]
    written = [*written, *_flattened(kwargs.get("out"))] if _writes(name) else [*_flattened(kwargs.get("out"))]
    for target in written:
        if isinstance(target, mine):
            if name in ("copy_", "data.__set__") and (isinstance(target, DenseWeight) or target.whole):
                target.source.load_weight(_plain(args[1], {}))
                return target
            _refuse(target.source, f"was to be changed by `{name}`")
    if name in _HOOKS and isinstance(first, mine):
        _refuse(first.source, f"takes no `{name}`")
    if name == "__dlpack__" and isinstance(first, mine):
        _refuse(first.source, "was to share its memory, which it has none of, by `__dlpack__`")
    values: dict[int, Tensor] = {}
    if func is torch.autograd.grad:
        _refuse_derivatives(args, kwargs)
        # By views themselves, which a graph may lead to.
        return _by_the_stand_in(func, _plain(args, values, views=False), _plain(kwargs, values, views=False))
    result = func(*_plain(args, values), **_plain(kwargs, values))
    if isinstance(first, mine) and not torch.compiler.is_compiling():
        if name in _VIEWS:
            return _as_views(result, first.source, values.get(id(first), first))
        if name in ("numpy", "__array__"):
            result.flags.writeable = False
    return result


def _as_views(result: Any, source: Source, of: Tensor) -> Any:
    if isinstance(result, torch.Tensor):
        # On another device, or of another dtype, it is a copy of the user's own.
        return DenseView.of(result, source) if (result.dtype, result.device) == (of.dtype, of.device) else result
    return type(result)(_as_views(item, source, of) for item in result) if isinstance(result, (list, tuple)) else result


def _plain(value: Any, known: dict[int, Tensor], views: bool = True) -> Any:
    """The same with values in the place of weights, and of views if asked for; each weight is computed once."""
    if isinstance(value, DenseWeight):
        if id(value) not in known:
            known[id(value)] = value.source.rebuilt()
        return known[id(value)]
    if isinstance(value, DenseView) and views:
        return value.as_subclass(torch.Tensor)
    if type(value) in (list, tuple):
        return type(value)(_plain(item, known, views) for item in value)
    if type(value) is dict:
        return {key: _plain(item, known, views) for key, item in value.items()}
    return value


def refuse_in_transforms(given: Tensor) -> None:
    """Refuse a weight itself that ``torch.func`` has wrapped, past its type: it would be of no values.

    Raises:
        RuntimeError: Naming the weight, and what to give instead.
    """
    functorch: Any = torch._C._functorch  # there is no public way to ask
    while functorch.is_functorch_wrapped_tensor(given):
        given = functorch.get_unwrapped(given)
        if isinstance(given, DenseWeight):
            source = given.source
            raise RuntimeError(
                f"`{source.weight_name()}` itself was given to a transform of `torch.func`, but its layer trains U, s "
                "and V in its place: give its values, `{name: p.clone() for name, p in model.named_parameters()}`, or "
                f"leave the layer out, `exclude_modules={source.layer_names()}`"
            )


def in_transform() -> bool:
    """Whether this runs in a transform of ``torch.func``, whose tensors are of no use when it is over."""
    # As torch's own transforms ask; there is no public way.
    return bool(torch._C._functorch.peek_interpreter_stack() is not None)


def _flattened(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flattened(item)
    elif isinstance(value, dict):
        yield from _flattened(list(value.values()))
    else:
        yield value


def _parts(gradient: Tensor) -> list[Tensor]:
    return gradient.factors() if isinstance(gradient, DenseGradient) else [gradient]


def _for_each(given: Any, parts: Sequence[Sequence[Tensor]]) -> Any:
    """A number for each gradient as one for each of its parts; one for all as it is."""
    if not isinstance(given, (list, tuple)) or len(given) != len(parts):
        return given
    return [each for each, of_one in zip(given, parts, strict=True) for _ in of_one]


def _flat(argument: Any) -> Any:
    if isinstance(argument, DenseGradient):
        return torch.cat([part.flatten() for part in argument.factors()])
    return [_flat(item) for item in argument] if isinstance(argument, (list, tuple)) else argument


def _refuse(source: Source, what: str) -> NoReturn:
    names = source.layer_names()
    raise RuntimeError(
        f"`{source.weight_name()}` {what}, but its layer trains U, s and V in its place, where that would be lost: "
        f"leave the layer out, `exclude_modules={names}`, or write whole weights by `load_state_dict` or `copy_`"
    )


def _refuse_derivatives(args: Any, kwargs: Any) -> None:
    """Refuse a derivative with respect to a weight: no graph leads to it, and with ``allow_unused`` none would come."""
    inputs = kwargs["inputs"] if "inputs" in kwargs else args[1]
    sources = [each.source for each in _flattened([inputs]) if isinstance(each, DenseWeight)]
    if sources:
        names = [name for source in sources for name in source.layer_names()]
        # No RuntimeError: where losses are balanced by gradients, code goes on without if that is what it meets.
        raise ValueError(
            f"`{sources[0].weight_name()}` has no derivative, of which `torch.autograd.grad` was asked: its layer "
            f"trains U, s and V in its place: leave the layer out, `exclude_modules={names}`, or differentiate a "
            "function of given weights, by `torch.func.grad` and `torch.func.functional_call`"
        )


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", str(func))
    return f"{func.__self__.__name__}.{name}" if name in ("__get__", "__set__", "__delete__") else name


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _WRITES or name.endswith((".__set__", ".__delete__"))


def _set_trained(face: DenseWeight, flag: bool = True) -> DenseWeight:
    for parameter in face.source.trained_parameters():
        parameter.requires_grad_(flag)
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.requires_grad_(face, flag)
    _listen(face)
    return face


def _listen(face: Any) -> None:
    """Have a gradient that reaches the weight itself passed on to its factors.

    One does where a function gets the weight past its type: an ``autograd.Function``, a checkpoint of the older kind.
    """
    with torch._C.DisableTorchFunctionSubclass():
        if face.requires_grad and face.is_leaf and "listens" not in vars(face):
            vars(face)["listens"] = _T.register_post_accumulate_grad_hook(face, _pass_on)


def _pass_on(face: Any) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        gradient, face.grad = face.grad, None
    if gradient is not None and type(face) is DenseWeight:
        with torch.enable_grad():
            weight: Any = face.source.rebuilt()
        if weight.requires_grad:
            weight.backward(gradient, create_graph=gradient.requires_grad)


def _layout(face: DenseWeight) -> Tensor:
    """A tensor on no device that lies in memory as the weight does, of which the stand-in knows nothing."""
    layout = getattr(face.source, "layout", torch.contiguous_format)
    return torch.empty(face.shape, dtype=face.dtype, device="meta", memory_format=layout)


def _stride(face: DenseWeight, *args: Any, **kwargs: Any) -> Any:
    return _by_the_stand_in(_T.stride, (face, *args), kwargs) if _traced() else _layout(face).stride(*args, **kwargs)


def _is_contiguous(face: DenseWeight, *args: Any, **kwargs: Any) -> bool:
    if _traced():
        return bool(_by_the_stand_in(_T.is_contiguous, (face, *args), kwargs))
    return _layout(face).is_contiguous(*args, **kwargs)


def _traced() -> bool:
    """Whether torch.compile looks, which must see the tensor that there is."""
    return torch.compiler.is_compiling()


def _is_trained(face: DenseWeight) -> bool:
    # Whoever goes by an optimizer's parameters, as `toggle_optimizer` does, freezes the factors.
    return any(parameter.requires_grad for parameter in face.source.trained_parameters())


def _set_gradient(face: DenseWeight, value: Tensor | None = None) -> None:
    if isinstance(value, DenseGradient) and value.source is face.source:
        return
    if value is not None:
        _refuse(face.source, "was to be given a gradient")
    for parameter in face.source.trained_parameters():
        parameter.grad = None


def _detached(face: DenseWeight) -> Tensor:
    return DenseView.of(face.source.rebuilt().detach(), face.source, whole=True)


_T: Any = torch.Tensor


# What a weight is, which the stand-in knows: every attribute but those that hold values, and some methods.
_VALUES = {f"{name}.__get__" for name in ("data", "grad", "T", "mT", "H", "mH", "real", "imag")}
_METHODS = (
    "stride is_contiguous size dim ndimension numel nelement element_size get_device is_floating_point is_complex "
    "is_signed is_conj is_neg is_inference is_pinned is_shared _is_view"
    # Where it lies: each weight in a place of its own, as who looks for parameters that share memory wants to know.
    " data_ptr untyped_storage storage_offset"
)
_ABOUT = {getattr(of, name) for name in _METHODS.split() for of in (_T, torch) if hasattr(of, name)} | {_T.__len__}


def _is_about(func: Any) -> bool:
    return func in _ABOUT or (func.__name__ == "__get__" and _name_of(func) not in _VALUES)


# What only a weight, or a view of all of it, answers in its own way.
_OWN: dict[Any, Any] = {
    _T.requires_grad.__get__: _is_trained,
    _T.stride: _stride,
    _T.is_contiguous: _is_contiguous,
    _T.requires_grad.__set__: _set_trained,
    _T.requires_grad_: _set_trained,
    _T.grad.__get__: DenseGradient.of,
    _T.grad.__set__: _set_gradient,
    _T.grad.__delete__: _set_gradient,
    _T.data.__get__: _detached,
    _T.detach: _detached,
    torch.detach: _detached,
}
_NATIVE_OF_VIEWS = {
    *(_T.requires_grad.__set__, _T.requires_grad_, _T.grad.__get__, _T.grad.__set__, _T.grad.__delete__),
    *(_T.as_subclass, _T.retain_grad),
}
_DETACHES = {_T.data.__get__, _T.detach, torch.detach}
_WRITES = {"__setitem__", "set_", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod"))}
_WRITES |= {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
_VIEWS = {
    *("view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "expand"),
    *("expand_as", "t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "T.__get__"),
    *("mT.__get__", "H.__get__", "mH.__get__", "__getitem__", "narrow", "select", "unbind", "chunk", "split"),
    *("tensor_split", "split_with_sizes", "diagonal", "unfold", "as_strided", "to", "cpu", "cuda", "float", "double"),
    *("half", "bfloat16", "contiguous", "type", "type_as", "adjoint", "broadcast_to", "hsplit", "vsplit", "dsplit"),
    *("unsafe_chunk", "unsafe_split", "atleast_1d", "atleast_2d", "atleast_3d", "positive", "real.__get__"),
}
_ELEMENTWISE = {"zero_", "detach_", "requires_grad_", "mul_", "div_", "clamp_", "clamp_min_", "clamp_max_", "clip_"}
_ELEMENTWISE |= {"nan_to_num_", "__imul__", "__itruediv__"}
_ELEMENTWISE_OF_LISTS = {"_foreach_mul_", "_foreach_div_", "_foreach_zero_", "_foreach_clamp_min_"}
_ELEMENTWISE_OF_LISTS |= {"_foreach_clamp_max_"}
_NORMS = {"norm", "linalg_vector_norm", "vector_norm", "linalg_norm", "_foreach_norm"}
_SEARCHES = {"isfinite", "isnan", "isinf"}
