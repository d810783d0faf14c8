"""Parameters whose rows lie in several processes, as ``fully_shard`` leaves them: those that are here, and which.

Only public methods of torch's DTensor are called, and its class is not asked for, which older versions of torch have
elsewhere.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

IN_SHARDS = "in_shards"  # says in the state of a layer that its factors are not in it, but written by their rows


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def reshard(module: nn.Module) -> None:
    """Have parameters be sharded that ``fully_shard`` left whole after a forward pass, in whichever precision."""
    # Imported here, for it takes most of a second. Only torch from 2.6 on has the class.
    kind = getattr(import_module("torch.distributed.fsdp"), "FSDPModule", ())
    for child in module.modules():
        if isinstance(child, kind):
            child.reshard()


def why_not_by_rows(tensor: Any) -> str | None:
    """Why a parameter is not cut by rows over all processes, as ``fully_shard`` does; None if it is."""
    if not is_sharded(tensor):
        return "is whole in each process: call `fully_shard` on the model after its layers are factorized"
    if not is_by_rows(tensor):
        how = f"{tensor.placements} over {tensor.device_mesh}"
        return f"must be cut by rows over all {dist.get_world_size()} processes, it is {how}"
    if torch.finfo(tensor.dtype).bits < 32:
        return f"must be float32 or wider, in which ranks are cut, it is {tensor.dtype}: use a mixed precision policy"
    return None


def is_by_rows(tensor: Any) -> bool:
    """Whether a sharded parameter is cut by rows over all processes."""
    mesh, placements = tensor.device_mesh, tensor.placements
    return bool(mesh.ndim == 1 and mesh.size() == dist.get_world_size() and placements[0].is_shard(0))


def rows_of(tensor: Any) -> Tensor:
    """The rows that are in this process, to be read and, where no gradient is taken, written."""
    return cast("Tensor", tensor.to_local())


def range_of(tensor: Any) -> tuple[int, int]:
    """From which of all rows to which those in this process are: ``fully_shard`` cuts as ``torch.chunk`` does."""
    mesh, length = tensor.device_mesh, tensor.shape[0]
    start = min(length, mesh.get_local_rank() * -(-length // mesh.size()))
    return start, start + len(rows_of(tensor))


def whole(tensor: Any) -> Tensor:
    """All rows, in each process; all of them must ask."""
    return cast("Tensor", tensor.full_tensor()) if is_sharded(tensor) else cast("Tensor", tensor)
