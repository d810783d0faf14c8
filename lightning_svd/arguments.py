"""Checks of arguments, and of what is installed; every message names what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

_MOST = 2**31 - 1  # of what is counted: a larger one is a slip, and arithmetic with it does not end
_LARGEST = 10**300  # of integers that stand for a float
_LONGEST = 200  # characters of a value in a message


def check_share(name: str, value: Any, zero: bool = False) -> None:
    """A number in (0, 1], or in [0, 1] if ``zero`` is allowed."""
    if not _is_number(value) or not (0.0 <= value <= 1.0) or (value == 0.0 and not zero):
        kind = "" if _is_number(value) else "a float "  # which numpy's smaller numbers are not
        raise ValueError(f"`{name}` must be {kind}in {'[' if zero else '('}0, 1], got {shown(value)}")


def check_weight(name: str, value: Any) -> None:
    """A finite number that is not negative."""
    if not _is_number(value) or not (0.0 <= value < math.inf):
        raise ValueError(f"`{name}` must be a finite number >= 0, got {shown(value)}")


def check_positive(name: str, value: Any) -> None:
    """A finite number above zero."""
    if not _is_number(value) or not (0.0 < value < math.inf):
        raise ValueError(f"`{name}` must be a finite number > 0, got {shown(value)}")


def check_count(name: str, value: Any, least: int = 1, most: int | None = None, other: str = "") -> None:
    """An integer of at least ``least``, and at most ``most`` if that is given; an error names what ``other`` may be."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= (most or _MOST):
        most = most or (_MOST if isinstance(value, int) and value > _MOST else None)
        raise ValueError(
            f"`{name}` must be an integer >= {least}{f' and <= {most}' if most else ''}"
            f"{f', or {other}' if other else ''}, got {shown(value)}"
        )


def check_flag(name: str, value: Any) -> None:
    """True or False, and nothing that is only taken for one of them."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}")


def check_choice(name: str, value: Any, choices: Iterable[Any], kind: type | None = None) -> None:
    """One of ``choices``, or an object of class ``kind`` if that is given."""
    choices = list(choices)
    if kind is not None and isinstance(value, kind):
        return
    if not (value is None or isinstance(value, str)) or value not in choices:
        article = "an" if kind and kind.__name__[0] in "AEIOU" else "a"
        either = f" or {article} {kind.__name__}" if kind else ""
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}{either}, got {shown(value)}")


def check_targets(name: str, value: Any) -> None:
    """None, a string, or a sequence of strings."""
    items = [value] if isinstance(value, str) else value
    if items is not None and not (isinstance(items, (list, tuple)) and all(map(_is_name, items))):
        raise ValueError(f"`{name}` must be a name or a pattern, or a list of them, got {shown(value)}")


def check_module(name: str, value: Any) -> None:
    """A module of torch, and not its class, its weights, or a tuple with one in it."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"`{name}` must be a module, got {shown(value)}")


def check_path(name: str, value: Any) -> None:
    """None, or the path of a file."""
    if value is not None and not (isinstance(value, os.PathLike) or _is_name(value)):
        raise ValueError(f"`{name}` must be the path of a file, got {shown(value)}")


def check_rank_pattern(value: Any) -> None:
    """None, or a mapping of patterns to positive integers."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"`rank_pattern` must map names or patterns to ranks, got {shown(value)}")
    for pattern, rank in (value or {}).items():
        if not _is_name(pattern):
            raise ValueError(f"`rank_pattern` must map names or patterns to ranks, got {shown(pattern)}: {shown(rank)}")
        check_count(f"rank_pattern[{shown(pattern)}]", rank)


def shown(value: Any) -> str:
    """A value in a message, in one line and not long, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of somebody's own class, or of a number with more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or -_LARGEST < value < _LARGEST


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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
