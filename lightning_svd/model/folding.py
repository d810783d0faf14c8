"""Batch normalization merged into the layer before it, where a pass and a comparison show that it may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_svd.arguments import check_module
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.model.calls import Call, UncopiedHook
from lightning_svd.model.checks import difference, differing
from lightning_svd.model.counting import count_params, example_call
from lightning_svd.model.replay import replay
from lightning_svd.model.surgery import frozen_copy, to_factored
from lightning_svd.model.values import leaves

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Folding:
    """The result of :func:`~lightning_svd.fold_norms`: which normalizations were folded, and which were not, and why.

    Attributes:
        folded: Name of each normalization that is no more -> the layer that does its work.
        left: Name of each that stays -> why.
        difference: How far outputs for the example inputs moved, relative to the largest.
    """

    folded: Mapping[str, str]
    left: Mapping[str, str]
    difference: float

    def __str__(self) -> str:
        count = len(self.folded)
        lines = [f"{count} of {count + len(self.left)} normalizations folded; outputs differ by {self.difference:.1e}"]
        return "\n".join(lines + [f"left: {name}: {why}" for name, why in self.left.items()])


def fold_norms(module: ModuleT, example_input: Any) -> tuple[ModuleT, Folding]:
    """A copy for inference without the batch normalizations that the layer before them can do.

    In evaluation a batch normalization scales and shifts channels by fixed numbers, and a convolution or linear layer
    before it can do so with its own weight and bias. Which layer each follows, and that nothing else sees what goes
    from one to the other, is watched in a forward pass; the copy then has to give the same outputs, to rounding, or
    that normalization stays. Do it last: the copy is to be run, not trained, and has other names than the module's
    class gives.

    Args:
        module: Of plain layers, dense or low-rank, in evaluation; with factorized layers, those of the copy are as
            :func:`~lightning_svd.to_factored` makes them.
        example_input: What it is called with, a tuple for several arguments, a dict for arguments by keyword.

    Returns:
        The copy, where a folded normalization is an ``nn.Identity``, and what was done.

    Raises:
        ValueError: If the module is in training, cannot be copied, or fails on the example input.
    """
    check_module("module", module)
    if module.training:
        raise ValueError(
            f"`fold_norms`: {type(module).__name__} is in training, where a normalization depends on the batch: "
            "call `model.eval()` first"
        )
    plain: Any = to_factored(module, count_params(module)) if svd_layers(module) else module
    twin: Any = frozen_copy(plain, "`fold_norms` changes", "fold before what cannot be copied is added")
    for one, other in zip(twin.modules(), plain.modules(), strict=False):
        one.training = other.training  # a part that is in training stays so, and is told of
    trained = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(trained[name])
    call = example_call(twin, example_input)
    try:
        watched = _Watched(twin)
        (before,) = watched.replay(call)
    except Exception as error:
        raise ValueError(
            f"`example_input`: {type(module).__name__} fails on it: {type(error).__name__}: {error}"
        ) from error
    pairs, left = watched.pairs()
    blamed = differing(twin, [call], [*pairs], lambda names: _folded(twin, pairs, names))
    kept = {name: layer for name, layer in pairs.items() if name not in blamed}
    # For good: nobody leaves this context.
    _fold(twin, kept, [*kept])
    (after,) = replay(twin, [call])
    folded = {name: kept[name] for name in watched.norms if name in kept}
    left = {name: (left | blamed)[name] for name in watched.norms if name not in kept}
    return twin, Folding(folded, left, difference(before, after))


class _Watched:
    """Sees which layer's outputs go into which normalization, and whether they go anywhere else.

    Attributes:
        layers: By name, those that can do a normalization's work.
        norms: By name, batch normalizations.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        named = dict(module.named_modules())
        self.layers = {name: child for name, child in named.items() if type(child) in _LAYERS}
        self.norms = {name: child for name, child in named.items() if type(child) in _NORMS}
        self._users: dict[str, set[str]] = {name: set() for name in self.layers}
        self._sources: dict[str, set[str | None]] = {name: set() for name in self.norms}
        self._outputs: dict[Any, tuple[str, Tensor]] = {}  # kept, so that no other tensor comes to lie there
        self._inside: list[str] = []
        self._flat: set[str] = set()  # layers whose outputs have no positions

    def replay(self, call: Call) -> list[Any]:
        """The outputs of a call, watched."""
        handles = []
        for name, layer in self.layers.items():
            handles.append(layer.register_forward_hook(UncopiedHook(self._computed(name))))
        for name, norm in self.norms.items():
            handles.append(norm.register_forward_pre_hook(UncopiedHook(self._entered(name)), prepend=True))
            handles.append(norm.register_forward_hook(UncopiedHook(self._left), always_call=True))
        try:
            return replay(self.module, [call], lambda _: _Uses(self._used))
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.clear()

    def _computed(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._outputs[_place(output)] = name, output
            if output.ndim == 2:
                self._flat.add(name)

        return hook

    def _entered(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            source, output = self._outputs.get(_place(args[0]) if args else None, (None, None))
            # A view of an output is not the output.
            same = source is not None and args[0] is output
            self._sources[name].add(source if same else None)
            if same:
                assert source is not None
                self._users[source].add(name)
            self._inside.append(name)

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def _used(self, operation: str, place: Any) -> None:
        name, _ = self._outputs.get(place, (None, None))
        if name is not None and not (self._inside and self._inside[-1] in self._users[name]):
            self._users[name].add(f"the operation {operation}")

    def pairs(self) -> tuple[dict[str, str], dict[str, str]]:
        """Name of a normalization -> the layer that can do its work; and name -> why there is none."""
        pairs, left = {}, {}
        for name, norm in self.norms.items():
            sources = self._sources[name]
            why = _why_not_norm(norm) or (None if sources else "it was not called")
            source = next(iter(sources), None)
            if why is None and (len(sources) > 1 or source is None):
                why = "what it gets is not what one convolution or linear layer puts out"
            if why is None:
                assert source is not None
                why = self._why_not_layer(name, source)
            if why is None and source is not None:
                pairs[name] = source
            else:
                left[name] = str(why)
        return pairs, left

    def _why_not_layer(self, norm: str, source: str) -> str | None:
        layer, others = self.layers[source], sorted(self._users[source] - {norm})
        if others:
            return f"what `{source}` puts out is also used by {others[0]}"
        if _has_hooks(layer):
            return f"`{source}`, the layer before it, has hooks, which would see other outputs"
        if isinstance(layer, nn.Linear) and source not in self._flat:
            return f"features of `{source}` are along the last axis, those of a batch normalization along the second"
        if isinstance(layer, _TRANSPOSED) and layer.groups > 1:
            return f"`{source}` is a transposed convolution with groups, which torch does not fold into"
        own = {id(parameter) for parameter in layer.parameters()}
        holders = [child for child in self.module.modules() if own & {id(p) for p in child._parameters.values()}]
        return f"`{source}` shares its weight or bias with another module" if len(holders) > 1 else None


def _why_not_norm(norm: Any) -> str | None:
    if norm.training:
        return "it is in training"
    if norm.running_mean is None:
        return "it has no running statistics"
    return "it has hooks" if _has_hooks(norm) else None


def _has_hooks(module: nn.Module) -> bool:
    # nn.Module's private dicts: there is no public way to ask what was registered.
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(module).get(kind) for kind in kinds)


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of each tensor that an operation takes, by where its values lie: views are the same tensor."""

    supports_higher_order_operators = True

    def __init__(self, tell: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in leaves((args, kwargs or {})):
            if isinstance(leaf, Tensor) and (place := _place(leaf)):
                self._tell(str(func), place)
        return func(*args, **(kwargs or {}))


def _place(tensor: Any) -> Any:
    """Where the memory of a tensor begins; None for what has none."""
    try:
        start = tensor.untyped_storage().data_ptr()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
    return (tensor.device, start) if start else None


@contextmanager
def _folded(module: nn.Module, pairs: Mapping[str, str], names: Sequence[str]) -> Iterator[None]:
    """Have these normalizations folded inside."""
    with contextlib.ExitStack() as undo:
        _fold(module, pairs, names, undo)
        yield


def _fold(
    module: nn.Module, pairs: Mapping[str, str], names: Sequence[str], undo: contextlib.ExitStack | None = None
) -> None:
    """Fold normalizations into layers in place; ``undo`` is told how to take it back."""
    undo = undo or contextlib.ExitStack()
    for name in names:
        norm, layer = module.get_submodule(name), module.get_submodule(pairs[name])
        fused = _fused(layer, norm)
        for key in ("weight", "bias"):
            undo.callback(setattr, layer, key, getattr(layer, key))
            setattr(layer, key, getattr(fused, key))
        nothing = nn.Identity().train(norm.training)
        for parent in [*module.modules()]:
            for attribute, child in [*parent.named_children()]:
                if child is norm:
                    undo.callback(setattr, parent, attribute, norm)
                    setattr(parent, attribute, nothing)


@torch.no_grad()
def _fused(layer: Any, norm: Any) -> Any:
    if isinstance(layer, nn.Linear):
        # Torch asks for a scale of its own here, which `affine=False` has not.
        scaled = nn.BatchNorm1d(norm.num_features, norm.eps, device="meta").eval()
        scaled.running_mean, scaled.running_var = norm.running_mean, norm.running_var
        ones = torch.ones_like(norm.running_mean)
        scaled.weight = nn.Parameter(ones) if norm.weight is None else norm.weight
        scaled.bias = nn.Parameter(torch.zeros_like(ones)) if norm.bias is None else norm.bias
        return fuse_linear_bn_eval(layer.eval(), scaled)
    return fuse_conv_bn_eval(layer.eval(), norm, transpose=isinstance(layer, _TRANSPOSED))
