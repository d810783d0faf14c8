"""Which weights a training step reads by their names, beside the calls that are noted of it."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor

from lightning_svd.layers.layer import PART_OF, SVDLayer
from lightning_svd.layers.parts import TakenApart
from lightning_svd.model.replay import LIBRARIES, package_of

_TOLD_OF_READS: list[weakref.WeakMethod[Callable[[SVDLayer], None]]] = []
_TELLING: set[tuple[Any, str]] = set()  # classes that do, and of what


@contextmanager
def telling_of_reads(layers: Iterable[SVDLayer], tell: Callable[[SVDLayer], None]) -> Iterator[None]:
    """Tell of layers of these classes whose weight a ``training_step``, or what it calls, reads by its name inside.

    Reads as one of ``parameters()``, and those by torch, Lightning and this package, are not told. For a batch:
    meanwhile their classes have a property, past which nn.Module would look the parameter up itself.

    Args:
        layers: Of the classes; an attention or recurrent module that has one of them shows its weight by another name.
        tell: A bound method, which is not kept alive.
    """
    told = weakref.WeakMethod(tell)
    del tell
    _TOLD_OF_READS.append(told)
    _TELLING.update(shown for layer in layers for shown in _shown_by(layer))
    del layers
    for kind, name in _TELLING:
        setattr(kind, name, property(functools.partial(_by_name, name)))
    try:
        yield
    finally:
        _TOLD_OF_READS[:] = [each for each in _TOLD_OF_READS if each is not told]
        while _TELLING and not _TOLD_OF_READS:
            delattr(*_TELLING.pop())


def _shown_by(layer: SVDLayer) -> list[tuple[Any, str]]:
    """The class that shows a layer's weight, and by which names it shows weights."""
    owner = vars(layer).get(PART_OF)
    if isinstance(owner, TakenApart):
        return [(type(owner), name) for name in owner.weight_names()]
    return [(type(layer), "weight")]


def _is_users_step(reader: FrameType | None) -> bool:
    """Whether code of a user's own reads, and a ``training_step`` has called it."""
    if reader is None or package_of(reader.f_globals.get("__name__")) in LIBRARIES:
        return False
    frame: FrameType | None = reader
    while frame is not None and frame.f_code.co_name != "training_step":
        frame = frame.f_back
    return frame is not None


def _by_name(name: str, module: SVDLayer | TakenApart) -> Tensor | None:
    if not torch.compiler.is_compiling():
        reader = inspect.currentframe()
        by_step = _is_users_step(reader.f_back if reader else None)
        for told in _TOLD_OF_READS if by_step else ():
            if (tell := told()) is not None:
                for layer in module.layers_of(name) if isinstance(module, TakenApart) else [module]:
                    tell(layer)
    for where in (vars(module), module._parameters):
        if name in where:
            return cast("Tensor | None", where[name])
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
