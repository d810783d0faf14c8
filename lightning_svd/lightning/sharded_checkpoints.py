"""Lightning's files of a sharded model on their way in and out, while its U, s and V are trained.

Its weights are written as dense ones, under the user's own names, and the exact factors beside them: in the callback's
state of a single file, and where a checkpoint is a folder of shards, in a folder of their own in it, by the rows that
each process has. Nothing of a whole model is put together for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_svd.files.checkpoints import check_state, saved_state
from lightning_svd.layers.shards import is_sharded
from lightning_svd.training import processes
from lightning_svd.training.run import SVDTraining
from lightning_svd.training.sharded import ShardedTraining

FOLDER = "lightning_svd"  # in the strategy's own folder


def connect(strategy: Strategy, run: SVDTraining) -> None:
    """Have a strategy write and read what a run of sharded factors needs, until it is over."""
    assert isinstance(run, ShardedTraining)
    write, read, module = strategy.save_checkpoint, strategy.load_checkpoint, strategy.lightning_module

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, *args: Any, **kwargs: Any) -> None:
        state, in_shards = saved_state(checkpoint), any(map(is_sharded, checkpoint["state_dict"].values()))
        if state is not None:
            _fill_moments(run, checkpoint.get("optimizer_states", []))
        if state is not None and in_shards:
            path = Path(strategy.broadcast(filepath))
            if processes.rank() == 0 and path.is_file():
                path.unlink()
            strategy.barrier()
            # Ahead of the rest, whose last file says that a folder is whole.
            save(_by_name(run), checkpoint_id=path / FOLDER)
        elif state is not None:
            state["layers"] = run.gathered_states()
        write(checkpoint, filepath, *args, **kwargs)

    def load_checkpoint(path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        needs = (
            f"{path}: SVD training of sharded parameters resumes only from a checkpoint that it wrote itself in the "
            "middle"
        )
        assert module is not None
        in_shards = Path(path).is_dir()
        if in_shards:
            processes.agree(lambda: _check(run, Path(path) / FOLDER, needs))
        with _not_strict(module), _without_weights(run):
            try:
                checkpoint: dict[str, Any] = read(path, *args, **kwargs)
            except KeyError as error:
                raise ValueError(f"{needs}: it has no {error}") from error
        state = saved_state(checkpoint)
        if state is None or "layers" not in state:
            raise ValueError(f"{needs}: load other weights in `configure_model`, before `decompose`")
        check_state(state, str(path), may_be_in_shards=in_shards)
        if in_shards:
            load(_by_name(run), checkpoint_id=Path(path) / FOLDER)
        return checkpoint

    vars(strategy).update(save_checkpoint=save_checkpoint, load_checkpoint=load_checkpoint)
    for method in ("save_checkpoint", "load_checkpoint"):
        run.until_closed.callback(vars(strategy).pop, method)


def _by_name(run: ShardedTraining) -> dict[str, Tensor]:
    """U, s and V of all layers, with the columns that are not in use, to be read and written in place."""
    return {name: parameter.detach() for name, parameter in run.factors_by_name().items()}


def _fill_moments(run: ShardedTraining, optimizers: list[dict[str, Any]]) -> None:
    """Have an entry for each parameter in the states of optimizers, zeros where one remembers nothing.

    Of those without any, just after the last cut, torch reads no folder, and from a file it gives them what it would
    remember after a step.
    """
    parameters: dict[Any, nn.Parameter] = dict(run.model.named_parameters())
    parameters |= dict(enumerate(run.model.parameters()))  # as files know them, where folders know names
    for optimizer in optimizers:
        states = optimizer.get("state", {})  # there is none but in the process that writes a file
        like: dict[str, Any] = next((state for state in states.values() if state), {})
        for key in (key for group in optimizer.get("param_groups", []) for key in group["params"]):
            if like and not states.get(key) and parameters[key].requires_grad:
                states[key] = {name: _zeros(value, parameters[key]) for name, value in like.items()}


def _zeros(value: Any, parameter: nn.Parameter) -> Any:
    """What is remembered at first, as ``value`` is of another parameter: by rows, or whole."""
    if not isinstance(value, Tensor):
        return value and type(value)(0)
    if value.ndim == 0:
        return torch.zeros_like(value)
    rows = is_sharded(value) and is_sharded(parameter)
    return torch.zeros_like(parameter.detach()) if rows else value.new_zeros(parameter.shape)


def _check(run: ShardedTraining, folder: Path, needs: str) -> None:
    """Refuse a folder whose factors are not those of the layers here, before anything is changed.

    Raises:
        ValueError: Naming the layer.
    """
    try:
        metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # whatever torch says of what is not there, or no such file
        raise ValueError(f"{needs}: {folder} holds no sharded factors ({type(error).__name__})") from error
    there = {name: tuple(of.size) for name, of in metadata.items() if isinstance(of, TensorStorageMetadata)}
    here = {name: tuple(parameter.shape) for name, parameter in run.factors_by_name().items()}
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise ValueError(
                f"{folder.parent}: `{name}` is of shape {here.get(name)} here, and of {there.get(name)} there: resume "
                "with the layers that it was written with"
            )


@contextmanager
def _not_strict(module: LightningModule) -> Iterator[None]:
    """Have the strategy ask a file for what is in it: it asks for each parameter by its own name, and U is in none."""
    before, module.strict_loading = module.strict_loading, False
    try:
        yield
    finally:
        module.strict_loading = before


@contextmanager
def _without_weights(run: ShardedTraining) -> Iterator[None]:
    """Have the model load what is beside its factors only."""
    weights = {f"{name}.weight".lstrip(".") for name in run.layers}

    def leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in weights & state.keys():
            del state[name]

    handle = run.model.register_load_state_dict_pre_hook(leave_out)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()
