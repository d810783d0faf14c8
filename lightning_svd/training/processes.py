"""Several processes that train one model: one decision for all of them, and work shared out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Piece = TypeVar("Piece")


def size() -> int:
    """How many processes there are; 1 without a process group."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Which one this is."""
    return dist.get_rank() if _together() else 0


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def decide(decision: Callable[[], T]) -> T:
    """What the first process decides, or the error it decides with, in every process.

    Args:
        decision: Called in the first process only; what it returns is sent as a whole.

    Raises:
        Exception: What ``decision`` raised, in every process, so that none waits for another.
    """
    if size() == 1:
        return decision()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = decision()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def agree(check: Callable[[], None]) -> None:
    """Run a check in every process; if one fails, all end with its error."""
    error: Exception | None = None
    try:
        check()
    except Exception as failed:
        error = failed
    if size() == 1:
        if error is not None:
            raise error
        return
    errors: list[Any] = [None] * size()
    dist.all_gather_object(errors, error)
    first = next((each for each in errors if each is not None), None)
    if first is not None:
        raise first


def add_up(tensor: Tensor) -> None:
    """Have the sum over all processes in a tensor."""
    if size() > 1:
        dist.all_reduce(tensor)


def shared_out(
    pieces: Sequence[Piece], compute: Callable[[Piece], list[Tensor]], empty: Callable[[Piece], list[Tensor]]
) -> Iterator[tuple[Piece, list[Tensor]]]:
    """Independent pieces of work, each done by one process and sent to all, as many at a time as there are processes.

    Args:
        pieces: What tells them apart, the same in every process.
        compute: What gives the tensors of one.
        empty: Tensors of the same shapes, dtypes and device, for those who receive them.

    Yields:
        Piece, and its tensors, bit for bit the same in every process.

    Raises:
        Exception: What ``compute`` raised, in every process.
    """
    for start in range(0, len(pieces), size()):
        together = pieces[start : start + size()]
        mine: dict[Piece, list[Tensor]] = {}
        agree(partial(_compute, compute, together[rank() : rank() + 1], mine))
        for owner, piece in enumerate(together):
            tensors = mine[piece] if piece in mine else empty(piece)
            if size() > 1:
                for tensor in tensors:
                    dist.broadcast(tensor, src=owner)
            yield piece, tensors


def _compute(
    compute: Callable[[Piece], list[Tensor]], pieces: Sequence[Piece], results: dict[Piece, list[Tensor]]
) -> None:
    for piece in pieces:
        results[piece] = [tensor.contiguous() for tensor in compute(piece)]
