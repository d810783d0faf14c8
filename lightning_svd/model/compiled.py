"""What ``torch.compile`` has made: run as the code that it was made of for a while, or made anew."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# All who want it share one change, since who began last need not end first.
_CHANGE, _WANTED_BY = ExitStack(), set[object]()


@contextmanager
def as_written() -> Iterator[None]:
    """Have compiled functions run the code that they were made of inside, so that hooks see what it calls.

    Compiled code would be compiled anew for hooks, and once more without them, and nothing of what they note in it
    would be left. From torch 2.6 on; before, and where nothing was compiled, without effect.
    """
    me, stance = object(), getattr(torch.compiler, "set_stance", None)
    if stance and _is_loaded() and not _WANTED_BY:
        change: Any = stance("force_eager")
        _CHANGE.enter_context(change)
    _WANTED_BY.add(me)
    try:
        yield
    finally:
        _WANTED_BY.discard(me)
        if not _WANTED_BY:
            _CHANGE.close()


def forget() -> None:
    """Have compiled functions compile anew: what they were compiled for is no longer there.

    Each would keep what it has for ranks that never come back, and from eight of them on, torch's limit, compile no
    more, and run as it was written for good.
    """
    if _is_loaded():
        torch.compiler.reset()


def _is_loaded() -> bool:
    """Whether anything can have been compiled; to ask the compiler itself takes a second or two to load it."""
    return "torch._dynamo" in sys.modules
