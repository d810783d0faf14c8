"""Lightning's way of writing and reading files, around which a model that is low-rank by now is written and read.

During a fit there is nothing to do here: state dicts are dense, and the callback's own state has the factors. What is
refused is refused while the file is read, before anything is changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import nn

from lightning_svd.files.checkpoints import (
    State,
    check_fits,
    check_of_lightning,
    check_same_layers,
    check_state,
    check_weights,
    exact_layers,
    from_dense_state,
    is_low_rank,
    saved_key,
    saved_state,
    take_form,
    to_dense_state,
)
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.lightning import trainers
from lightning_svd.model.surgery import to_dense
from lightning_svd.training.recipe import Recipe
from lightning_svd.writing import whole_file

# Where an averaging callback of Lightning's puts the weights that are trained, having put its average into their place.
CURRENT = "current_model_state"
_INSTEAD = "load its weights into the model with `load_from_checkpoint`, and call `fit` without `ckpt_path`"


class SVDCheckpointIO(CheckpointIO):
    """Around the strategy's own plugin: a model after its fit is written with dense weights, and takes those of a file.

    Sitting here it sees every file of a Trainer: weights-only ones, averaged models', those of asynchronous writers,
    and the bare state dicts that spawned processes send back.
    """

    def __init__(self, inner: CheckpointIO, trainer: Trainer) -> None:
        self.inner = inner
        self.optimizers_before: Any = None  # those that the strategy had before the fit made its own
        self._of = weakref.ref(trainer)

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Wrap the plugin of ``trainer``'s strategy, once."""
        inner = trainer.strategy.checkpoint_io
        ours = inner if isinstance(inner, cls) else cls(inner, trainer)
        trainer.strategy.checkpoint_io = ours
        ours.optimizers_before = trainer.strategy.optimizers

    # Out

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint, pairs of low-rank layers as the dense ones that they stand for."""
        dense, path = self._dense(checkpoint), args[0] if args else kwargs.pop("path")
        if not _writes_one_file(self.inner, path):
            self.inner.save_checkpoint(dense, path, *args[1:], **kwargs)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:  # Lightning's own moves it here from a folder that may be on another disk
            self.inner.save_checkpoint(dense, beside, *args[1:], **kwargs)

    def _dense(self, checkpoint: State) -> State:
        module = self._module
        if any(not layer.shows_factors for layer in svd_layers(module).values()):
            return checkpoint  # in a fit; where layers of it were pairs before, these are the user's own layers
        if "state_dict" not in checkpoint:
            return to_dense_state(module, checkpoint)
        checkpoint = dict(checkpoint)
        if "hyper_parameters" in checkpoint:
            checkpoint["hyper_parameters"] = {
                name: to_dense(value) if isinstance(value, nn.Module) and low_rank_pairs(value) else value
                for name, value in checkpoint["hyper_parameters"].items()
            }
        if CURRENT in checkpoint and self._trainer.state.status != TrainerStatus.RUNNING:
            # The average has been in the model since the fit's end, and the average's own copy is of no use any more.
            checkpoint["state_dict"] = checkpoint.pop(CURRENT)
            checkpoint.pop("averaging_state", None)
        exact = {"layers": exact_layers(module, checkpoint["state_dict"])}
        checkpoint["state_dict"] = to_dense_state(module, checkpoint["state_dict"])
        if CURRENT in checkpoint:
            exact["current_layers"] = exact_layers(module, checkpoint[CURRENT])
            checkpoint[CURRENT] = to_dense_state(module, checkpoint[CURRENT])
        state, key = saved_state(checkpoint), saved_key(checkpoint)
        if state is not None and exact["layers"] and "layers" not in state:
            checkpoint["callbacks"] = checkpoint["callbacks"] | {key: state | exact | {"is_finished": True}}
        return checkpoint

    # In

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint for the model that is going to load it, which takes its ranks if it is low-rank by now.

        Raises:
            ValueError: If it cannot be read, or SVD training cannot resume from it; nothing is changed then.
        """
        try:
            checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{path} cannot be read as a checkpoint: {lines[0]}") from error
        if not isinstance(checkpoint, dict):
            raise ValueError(f"{path} cannot be read as a checkpoint: it holds a {type(checkpoint).__name__}")
        if not isinstance(checkpoint.get("state_dict"), dict):
            if self._trainer.state.fn == TrainerFn.FITTING and [*self._ours()]:
                raise ValueError(f"{path} is no Lightning checkpoint: it has no `state_dict`")
            return checkpoint
        state = saved_state(checkpoint)
        if state is not None:
            check_state(state, str(path))
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._check_resumable(checkpoint, state, str(path))
            self._rename(checkpoint)
        finished = state is not None and state["is_finished"]
        if self._trainer.state.fn == TrainerFn.FITTING and not finished:
            return checkpoint
        return self._with_its_form(checkpoint, state)

    def _with_its_form(self, checkpoint: State, state: State | None) -> State:
        module, layers = self._module, (state or {}).get("layers", {})
        if CURRENT in checkpoint and not (state and state["is_finished"]):
            layers = {}  # of the weights that were trained, not of their average
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        if not fitting and (low_rank_pairs(module) or svd_layers(module)):
            # Of a copy of the model, which has another form by now and is not looked at outside of a fit.
            states = dict(checkpoint.get("callbacks") or {})
            checkpoint["callbacks"] = {key: of for key, of in states.items() if not _has_average(of)}
        checkpoint["state_dict"] = take_form(module, checkpoint["state_dict"], layers)
        if CURRENT in checkpoint and not fitting:
            checkpoint[CURRENT] = checkpoint["state_dict"]  # which the averaging callback loads last
        elif CURRENT in checkpoint:
            checkpoint[CURRENT] = from_dense_state(module, checkpoint[CURRENT], (state or {}).get("current_layers", {}))
        return checkpoint

    def _check_resumable(self, checkpoint: State, state: State | None, path: str) -> None:
        """Refuse what SVD training cannot resume from."""
        if self._trainer.strategy.optimizers is not self.optimizers_before:
            return  # past the fit's own resuming: what a tuner wrote before its trial, or the user goes back to
        module, ours = self._module, [*self._ours()]
        if any(callback._is_finished(module) for callback in ours):
            if state is not None and not state["is_finished"]:
                raise ValueError(
                    f"{path}: the checkpoint resumes SVD training, but the model is low-rank already, since an earlier "
                    "fit has finished it: build the model anew and pass it to `fit` with this checkpoint"
                )
            return
        if "optimizer_states" not in checkpoint:
            raise ValueError(f"{path} holds only weights, from which SVD training cannot resume: {_INSTEAD}")
        if state is None or not (state["is_finished"] or "layers" in state):
            raise ValueError(
                f"{path} holds the state of a dense training, from which SVD training cannot resume: {_INSTEAD}"
            )
        check_of_lightning(checkpoint, path)
        check_weights(module, checkpoint["state_dict"], path)
        if state["is_finished"]:
            raise ValueError(f"{path}: the checkpoint was written when its SVD training had finished: {_INSTEAD}")
        for callback in ours:
            plan = callback.recipe.plan(module, trainers.thaws_layers(self._trainer))
            check_same_layers(state, plan, path)
        check_fits(module, {name: entry for name, entry in state["layers"].items() if is_low_rank(entry)}, path)

    def _rename(self, checkpoint: State) -> None:
        """Have the state of a callback that is derived, or was renamed, under the name that this one has."""
        key = saved_key(checkpoint)
        names = [callback.state_key for callback in self._ours()]
        if key is not None and names and key not in names:
            states = checkpoint["callbacks"]
            checkpoint["callbacks"] = {names[0] if name == key else name: states[name] for name in states}

    def _ours(self) -> Iterator[Any]:
        """The Trainer's callbacks that train by SVD."""
        return (each for each in trainers.callbacks_of(self._trainer) if _is_ours(each))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the wrapped plugin finish."""
        self.inner.teardown()

    @property
    def _trainer(self) -> Trainer:
        trainer = self._of()
        assert trainer is not None
        return trainer

    @property
    def _module(self) -> LightningModule:
        return self._trainer.lightning_module


def _writes_one_file(inner: CheckpointIO, path: Any) -> bool:
    """Whether the plugin is Lightning's own, which writes a file and returns when it is there, for a path of this disk.

    What others do with a path is theirs: a folder of shards, a queue of a thread.
    """
    return type(inner).__name__ == "TorchCheckpointIO" and "://" not in str(path) and not Path(path).is_dir()


def _has_average(state: Any) -> bool:
    """Whether this is the state of Lightning's StochasticWeightAveraging."""
    return isinstance(state, dict) and "average_model_state" in state


def _is_ours(callback: Callback) -> bool:
    return isinstance(getattr(callback, "recipe", None), Recipe)
