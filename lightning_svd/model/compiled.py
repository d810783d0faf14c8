"""What `torch.compile` has made: run as the code that it was made of for a while, or made anew."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def as_written() -> AbstractContextManager[Any]:
    """Have compiled functions run the code that they were made of inside, so that hooks see what it calls.

    Compiled code would be compiled anew for hooks, and once more without them. From torch 2.6 on; before, and where
    nothing was compiled, without effect.
    """
    stance: Any = getattr(torch.compiler, "set_stance", None)
    return stance("force_eager") if stance and _is_loaded() else nullcontext()


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
