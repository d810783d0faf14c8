"""A progress bar in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from lightning_svd.compression.calibration import Track


@contextmanager
def tracking(shown: bool) -> Iterator[Track]:
    """What shows how far a loop has come, on standard error, and is gone afterwards.

    Args:
        shown: Whether to show anything.
    """
    with Progress(console=Console(stderr=True), transient=True, disable=not shown) as progress:
        yield lambda items, text: progress.track([*items], description=text)
