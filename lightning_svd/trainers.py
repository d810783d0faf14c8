"""What the callback asks of a Trainer and its LightningModule: facts, and refusals."""

from __future__ import annotations

import math
import types
import warnings
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import LBFGS, Optimizer

from lightning_svd.costs import as_arguments, evaluating

AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
PRECISIONS_WITH_LAYERS = ("TransformerEnginePrecision", "BitsandbytesPrecision")


def check_trainer(callback: Callback, trainer: Trainer) -> None:
    """Refuse what would train wrongly and silently.

    Raises:
        ValueError: Naming the strategy, plugin or callback, and what to do.
    """
    us, strategy = type(callback).__name__, trainer.strategy
    if strategy.restore_checkpoint_after_setup or strategy.handles_gradient_accumulation:
        raise ValueError(
            f"{us} does not work with {type(strategy).__name__}, which shards parameters or owns the optimizer's step: "
            "use one device or DDP"
        )
    precision = type(trainer.precision_plugin).__name__
    if precision in PRECISIONS_WITH_LAYERS:
        raise ValueError(f"{us} does not work with {precision}, which replaces layers too")
    callbacks = callbacks_of(trainer)
    for position, other in enumerate(callbacks):
        if _is_a(other, "ModelPruning"):
            raise ValueError(f"{us} does not work with {type(other).__name__}: both change the same weights")
        if _is_a(other, *AVERAGING) and position < callbacks.index(callback):
            raise ValueError(
                f"{type(other).__name__} is before {us} in `callbacks` and would average the dense weights: put it "
                "after"
            )


def averages_weights(trainer: Trainer) -> bool:
    """Whether a callback of Lightning's averages the parameters over time."""
    return any(_is_a(other, *AVERAGING) for other in callbacks_of(trainer))


def _is_a(callback: Callback, *names: str) -> bool:
    """Whether a callback is of a class of one of these names, of `lightning` or of `pytorch_lightning`."""
    return any(kind.__name__ in names for kind in type(callback).__mro__)


# Attributes that Trainer's constructor sets without an annotation.


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks in their order."""
    return list(vars(trainer)["callbacks"])


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which must leave the model as it was."""
    return bool(vars(trainer)["fast_dev_run"])


def log_interval(trainer: Trainer) -> int:
    """The Trainer's `log_every_n_steps`; 1 where logging is off and the interval with it."""
    return vars(trainer)["log_every_n_steps"] or 1


def total_steps(trainer: Trainer) -> int:
    """Length of the whole run in the unit of :func:`steps_done`.

    Raises:
        ValueError: If it is not known, or an optimizer steps more than once for a gradient.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers):
        raise ValueError("SVDTrainingCallback does not work with LBFGS, which steps more than once for a gradient")
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError(
            f"SVDTrainingCallback schedules ranks over the run and needs its length, got {steps} steps: pass "
            "`max_steps`, or `max_epochs` with a sized dataloader or `limit_train_batches`, to the Trainer"
        )
    return int(steps)


def metric(trainer: Trainer, name: str) -> float:
    """The last value of a logged metric.

    Raises:
        ValueError: If there is none of this name.
    """
    if name not in trainer.callback_metrics:
        known = ", ".join(map(repr, trainer.callback_metrics)) or "none"
        raise ValueError(f"`monitor` must be a metric that is logged by then, got {name!r}; there are: {known}")
    return float(trainer.callback_metrics[name])


def steps_done(trainer: Trainer) -> int:
    """How much of the run is done: optimizer steps or, in manual optimization, where a batch may have many, batches.

    Where `max_steps` ends a manual run, optimizer steps all the same.
    """
    if trainer.lightning_module.automatic_optimization or trainer.estimated_stepping_batches == trainer.max_steps:
        return trainer.global_step
    # Not those "ready": the present batch counts when it is done, as a step does.
    return int(vars(trainer.fit_loop.epoch_loop.batch_progress.total)["processed"])


def gradient_scale(trainer: Trainer, optimizer: Optimizer, stepping: bool = True) -> float:
    """What gradients are multiplied by at present.

    Args:
        trainer: With a loss scaler or without.
        optimizer: The one that is going to step.
        stepping: Whether it is about to, so that gradients are unscaled by now, but for a fused one's, which unscales
            them itself.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or (stepping and not getattr(optimizer, "_step_supports_amp_scaling", False)):
        return 1.0
    return float(scaler.get_scale())


def batch_size(batch: Any) -> int:
    """Inputs in a batch; 1 where Lightning cannot tell."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an ambiguous batch only blurs the counts per input
            return extract_batch_size(batch)
    except MisconfigurationException:
        return 1


@torch.no_grad()
def forward_example(pl_module: LightningModule) -> None:
    """Run ``example_input_array`` through the model as in evaluation, leaving its modes as they were."""
    example = pl_module.transfer_batch_to_device(pl_module.example_input_array, pl_module.device, 0)
    with evaluating(pl_module):
        if isinstance(example, dict):
            pl_module(**example)
        else:
            pl_module(*as_arguments(example))


def builds_layers_late(pl_module: LightningModule) -> bool:
    """Whether a hook of the module that runs after ours may build layers."""
    # Of `lightning` or of `pytorch_lightning`, which have a class each.
    base = next(kind for kind in type(pl_module).__mro__ if kind.__name__ == "LightningModule")
    return any(is_overridden(hook, pl_module, parent=base) for hook in ("setup", "configure_model"))


def decompose_after_configure_model(pl_module: LightningModule) -> None:
    """Have the layers factorised when ``configure_model`` has run, the last hook that may build some.

    A method bound to the instance, not a closure: copies and pickles of the module then hold their own.
    """
    vars(pl_module)["configure_model"] = types.MethodType(_configure_model_and_decompose, pl_module)


def unwrap_configure_model(pl_module: LightningModule) -> None:
    """Take the wrapper off; harmless where there is none."""
    vars(pl_module).pop("configure_model", None)


def _configure_model_and_decompose(pl_module: LightningModule) -> None:
    type(pl_module).configure_model(pl_module)
    for callback in callbacks_of(pl_module.trainer):
        begin = getattr(callback, "begin_svd_run", None)  # ours, which may not be imported from here
        if begin is not None:
            begin(pl_module)
