"""Of what kind the plain data in a file must be: predicates of values, put together from small ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Fits = Callable[[Any], bool]

_LARGEST = 2**63


def is_count(value: Any) -> bool:
    """An integer that is not negative, and no bool."""
    return type(value) is int and 0 <= value < _LARGEST


def is_number(value: Any) -> bool:
    """A number, NaN and infinity among them."""
    return type(value) is float or (type(value) is int and abs(value) < _LARGEST)


def is_finite(value: Any) -> bool:
    """A number that is neither NaN nor infinite."""
    return is_number(value) and math.isfinite(value)


def is_flag(value: Any) -> bool:
    """True or False."""
    return type(value) is bool


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_tensor(value: Any) -> bool:
    """A dense tensor, in which no number is NaN."""
    return isinstance(value, Tensor) and not (value.is_floating_point() and bool(torch.isnan(value).any()))


def optional(fits: Fits) -> Fits:
    """None, or what ``fits``."""
    return lambda value: value is None or fits(value)


def each(fits: Fits) -> Fits:
    """A list or tuple, whose items ``fits``."""
    return lambda value: isinstance(value, (list, tuple)) and all(map(fits, value))


def row(*kinds: Fits) -> Fits:
    """A list or tuple with an item of each kind."""
    return lambda value: (
        isinstance(value, (list, tuple))
        and len(value) == len(kinds)
        and all(fits(item) for fits, item in zip(kinds, value, strict=True))
    )


def by_name(fits: Fits) -> Fits:
    """A dict of strings to what ``fits``."""
    return lambda value: isinstance(value, dict) and all(map(is_text, value)) and all(map(fits, value.values()))


def having(others: Fits | None = None, **kinds: Fits) -> Fits:
    """A dict with these keys; further ones, of what ``others`` fits, only where that is given."""

    def fits(value: Any) -> bool:
        if not isinstance(value, dict) or not value.keys() >= kinds.keys():
            return False
        more = value.keys() - kinds.keys()
        if more and (others is None or not all(isinstance(key, str) and others(value[key]) for key in more)):
            return False
        return all(kind(value[key]) for key, kind in kinds.items())

    return fits


def is_mapping(value: Any) -> bool:
    """A mapping of strings."""
    return isinstance(value, Mapping) and all(map(is_text, value))
