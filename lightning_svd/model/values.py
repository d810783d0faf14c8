"""What networks take and give: tensors in tuples, lists, dicts and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")
DEEP, MANY = 4, 1000  # levels of what an object holds, entries of a container that is looked into


def mapped(value: Any, change: Callable[[Tensor], Any], of_objects: Callable[[Any], Any] = lambda value: value) -> Any:
    """``value`` with every tensor in tuples, lists, dicts and dataclasses changed.

    Args:
        value: What a network takes or gives.
        change: What becomes of a tensor.
        of_objects: What becomes of anything else; the very same, if nothing else is said.
    """
    if isinstance(value, Tensor):
        return change(value)
    try:
        return _rebuilt(value, lambda item: mapped(item, change, of_objects), of_objects)
    except Exception:  # a class of the user's that is made in another way: as any other object
        return of_objects(value)


def _rebuilt(value: Any, changed: Callable[[Any], Any], of_objects: Callable[[Any], Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(changed, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(changed, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return replace(value, **{name: changed(item) for name, item in own.items()})
    if isinstance(value, Mapping):
        twin: Any = copy.copy(value)
        for key, item in value.items():
            twin[key] = changed(item)
        return twin
    return of_objects(value)


def with_own_attributes(value: Any, deep: int = DEEP) -> Any:
    """A copy of a plain object, a graph's or a cache's say, whose attributes a model may set; anything else itself.

    What its attributes hold is copied likewise, lists, dicts, sets and further objects, so many levels of it; tensors
    are the same.
    """
    return _copied(value, deep, {})


def _copied(value: Any, deep: int, known: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) in known:
        return known[id(value)][1]
    is_container = type(value) in (list, dict, set, deque)
    if not is_container and not _is_plain(value):
        return value
    try:
        twin = copy.copy(value)
    except Exception:  # one that cannot be copied
        return value
    known[id(value)] = value, twin  # kept, so that no other object comes to lie there
    if not deep or (is_container and len(value) > MANY):
        return twin
    if isinstance(twin, dict):
        for key, item in value.items():
            twin[key] = _copied(item, deep - 1, known)
    elif isinstance(twin, (list, deque)):
        for place, item in enumerate(value):
            twin[place] = _copied(item, deep - 1, known)
    elif not is_container:
        own = vars(twin)
        for name, item in own.items():
            own[name] = _copied(item, deep - 1, known)
    return twin


def _is_plain(value: Any) -> bool:
    """Whether it is an object whose attributes are all that there is to it."""
    if isinstance(value, (nn.Module, Tensor, type, ModuleType)) or callable(value):
        return False
    return type(getattr(value, "__dict__", None)) is dict


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


def once_each(change: Callable[[T], T]) -> Callable[[T], T]:
    """``change`` that gives the same for the same: attention looks whether its query is its key."""
    known: dict[int, tuple[T, T]] = {}

    def changed(value: T) -> T:
        if id(value) not in known:
            known[id(value)] = value, change(value)
        return known[id(value)][1]

    return changed
