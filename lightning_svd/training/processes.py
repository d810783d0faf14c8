"""Several processes that train one model: one decision for all of them, and work shared out."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
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
            outcome[1] = _sendable(error)
    with _exchange():
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
    first = next((each for each in _gathered(None if error is None else _sendable(error)) if each is not None), None)
    if first is not None:
        raise first


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse what is to be the same in every process where it is not.

    Args:
        values: By name. Strings, numbers, lists and dicts are compared, of anything else the type.

    Raises:
        ValueError: In every process, naming the first value that differs, and in which process.
    """
    if size() == 1:
        return
    first, *others = _gathered({name: _plain(value) for name, value in values.items()})
    for number, other in enumerate(others, start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            here, there = first.get(name), other.get(name)
            if here != there:
                shown = f"{_short(here)} in process 0 and {_short(there)} in process {number}"
                raise ValueError(f"`{name}` must be the same in every process, got {shown}")


def meet(device: torch.device) -> None:
    """Wait for the other processes, ahead of what all of them are to do.

    Args:
        device: That of the model.

    Raises:
        RuntimeError: If another one has no batches left and is at the end of a ``Join``.
    """
    if size() == 1:
        return
    here = torch.ones(1, device=device)  # what Join counts processes by, to which one that has ended adds nothing
    add_up(here)
    if int(here) != size():
        raise RuntimeError(
            "ranks cannot change inside `torch.distributed.algorithms.Join`, where another process has no batches "
            "left: give each process as many, as `DistributedSampler` does, or end all of them with the first one"
        )


def add_up(tensor: Tensor) -> None:
    """Have the sum over all processes in a tensor."""
    if size() > 1:
        with _exchange():
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
                with _exchange():
                    for tensor in tensors:
                        dist.broadcast(tensor, src=owner)
            yield piece, tensors


def _compute(
    compute: Callable[[Piece], list[Tensor]], pieces: Sequence[Piece], results: dict[Piece, list[Tensor]]
) -> None:
    for piece in pieces:
        results[piece] = [tensor.contiguous() for tensor in compute(piece)]


def _gathered(value: Any) -> list[Any]:
    """What each process gives."""
    values: list[Any] = [None] * size()
    with _exchange():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def _exchange() -> Iterator[None]:
    """Say what it means where something cannot be sent or received."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            "SVD training: another process has ended, or does something else than this one, while all were to agree "
            "on ranks: see which one failed first, and why, and resume from the last checkpoint "
            f"({type(error).__name__}: {_short(str(error))})"
        ) from error


def _sendable(error: Exception) -> Exception:
    """An error, or one that says the same and can be sent."""
    try:
        same = pickle.loads(pickle.dumps(error))
    except Exception:
        same = None
    if type(same) is type(error) and str(same) == str(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool)) or value is None else type(value).__name__


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
