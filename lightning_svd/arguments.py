"""Checks of arguments, and of what is installed; every message names what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def check_share(name: str, value: Any, zero: bool = False) -> None:
    """A number in (0, 1], or in [0, 1] if ``zero`` is allowed."""
    if not _is_number(value) or not (0.0 <= value <= 1.0) or (value == 0.0 and not zero):
        raise ValueError(f"`{name}` must be in {'[' if zero else '('}0, 1], got {value!r}")


def check_weight(name: str, value: Any) -> None:
    """A finite number that is not negative."""
    if not _is_number(value) or not (0.0 <= value < math.inf):
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    if not _is_number(value) or not (0.0 < value < math.inf):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """An integer of at least ``least``, and at most ``most`` if that is given."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
        raise ValueError(f"`{name}` must be an integer >= {least}{f' and <= {most}' if most else ''}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """True or False, and nothing that is only taken for one of them."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}")


def check_choice(name: str, value: Any, choices: Iterable[Any], kind: type | None = None) -> None:
    """One of ``choices``, or an object of class ``kind`` if that is given."""
    choices = list(choices)
    if kind is not None and isinstance(value, kind):
        return
    if not (value is None or isinstance(value, str)) or value not in choices:
        article = "an" if kind and kind.__name__[0] in "AEIOU" else "a"
        either = f" or {article} {kind.__name__}" if kind else ""
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}{either}, got {value!r}")


def check_targets(name: str, value: Any) -> None:
    """None, a string, or a sequence of strings."""
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"`{name}` must be a name or a pattern, or a list of them, got {value!r}")


def check_rank_pattern(value: Any) -> None:
    """None, or a mapping of patterns to positive integers."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"`rank_pattern` must map names or patterns to ranks, got {value!r}")
    for pattern, rank in (value or {}).items():
        if not isinstance(pattern, str):
            raise ValueError(f"`rank_pattern` must map names or patterns to ranks, got {pattern!r}: {rank!r}")
        check_count(f"rank_pattern[{pattern!r}]", rank)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import inside what only one feature needs; where it is missing, the error says how to install it.

    Args:
        extra: Of this package, that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        how = f"pip install 'lightning-svd[{extra}]'"
        raise ModuleNotFoundError(f"this needs {missing.name}: {how}", name=missing.name) from None
