"""Words that messages share: a few of many names, and one thing or several."""

from __future__ import annotations

from collections.abc import Iterable


def few(names: Iterable[object], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    every = [str(name) for name in names]
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more


def counted(count: int, one: str, several: str) -> str:
    """A count and what is counted, "1 layer stays" or "3 layers stay"."""
    return f"{count} {one if count == 1 else several}"
