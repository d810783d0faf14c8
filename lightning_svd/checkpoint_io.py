"""Lightning's way of writing and reading files, with what :mod:`lightning_svd.checkpoints` does on the way."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from lightning_svd.checkpoints import KEY, VERSION, check_version, take_form, to_dense_state, to_factored_state
from lightning_svd.costs import svd_layers


class SVDCheckpointIO(CheckpointIO):
    """Around the strategy's own plugin: dense weights go out, exact factors come in.

    Sitting here it sees every file of a Trainer: weights-only ones, averaged models', those of asynchronous writers,
    and the bare state dicts that spawned processes send back.
    """

    def __init__(self, inner: CheckpointIO, trainer: Trainer) -> None:
        self.inner = inner
        self._trainer = weakref.ref(trainer)

    @classmethod
    def install(cls, trainer: Trainer) -> None:
        """Wrap the plugin of ``trainer``'s strategy, once."""
        inner = trainer.strategy.checkpoint_io
        if not isinstance(inner, cls):
            trainer.strategy.checkpoint_io = cls(inner, trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint with dense weights, the exact factors beside them if it is one to resume from."""
        checkpoint = dict(checkpoint)
        if "state_dict" in checkpoint:
            checkpoint["state_dict"], exact = to_dense_state(self._module(), checkpoint["state_dict"])
            if exact and "optimizer_states" in checkpoint:
                checkpoint[KEY] = {"version": VERSION, "layers": exact}
        else:
            checkpoint, _ = to_dense_state(self._module(), checkpoint)
        self.inner.save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint and give it the form of the model that is going to load it."""
        checkpoint = self.inner.load_checkpoint(path, *args, **kwargs)
        beside = checkpoint.get(KEY)
        if beside is not None:
            check_version(beside["version"], str(path))
        trainer = self._trainer()
        assert trainer is not None
        if trainer.state.fn == TrainerFn.FITTING:
            checkpoint["state_dict"] = self._state_to_resume(checkpoint, beside, path)
        elif "state_dict" in checkpoint:
            checkpoint["state_dict"] = take_form(
                self._module(), checkpoint["state_dict"], beside["layers"] if beside else {}
            )
        return checkpoint

    def _state_to_resume(self, checkpoint: dict[str, Any], beside: Any, path: Any) -> dict[str, Any]:
        module = self._module()
        if beside is not None:
            try:
                return to_factored_state(module, checkpoint["state_dict"], beside["layers"])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        if svd_layers(module):
            what = "only weights" if "optimizer_states" not in checkpoint else "the state of a dense training"
            raise ValueError(
                f"{path} holds {what}, from which SVD training cannot resume: load its weights into the model with "
                "`load_from_checkpoint`, and call `fit` without `ckpt_path`"
            )
        state: dict[str, Any] = checkpoint["state_dict"]
        return state

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the wrapped plugin finish."""
        self.inner.teardown()

    def _module(self) -> LightningModule:
        trainer = self._trainer()
        assert trainer is not None
        return trainer.lightning_module
