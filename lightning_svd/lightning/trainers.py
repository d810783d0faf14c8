"""What the callback asks of a Trainer and its LightningModule: facts, and refusals."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_svd.model.counting import as_arguments, running_example
from lightning_svd.model.replay import untouched
from lightning_svd.training.recipe import Recipe
from lightning_svd.training.run import SVDTraining
from lightning_svd.training.sharded import ShardedTraining, check_recipe

PRECISIONS_WITH_LAYERS = ("TransformerEnginePrecision", "BitsandbytesPrecision")


def check_trainer(callback: Callback, trainer: Trainer, recipe: Recipe) -> None:
    """Refuse what would train wrongly and silently.

    Raises:
        ValueError: Naming the strategy, plugin or callback, and what to do.
    """
    us, strategy = type(callback).__name__, trainer.strategy
    if shards(trainer):
        _check_sharding(us, trainer)
        check_recipe(recipe)
    elif strategy.restore_checkpoint_after_setup or strategy.handles_gradient_accumulation:
        raise ValueError(
            f"{us} does not work with {type(strategy).__name__}, which shards parameters or owns the optimizer's step: "
            "use one device, DDP, or ModelParallelStrategy with data parallelism"
        )
    precision = type(trainer.precision_plugin).__name__
    if precision in PRECISIONS_WITH_LAYERS:
        raise ValueError(f"{us} does not work with {precision}, which replaces layers too")
    for other in callbacks_of(trainer):
        if _is_a(other, "ModelPruning"):
            raise ValueError(f"{us} does not work with {type(other).__name__}: both change the same weights")
        if _is_a(other, "FinetuningScheduler") and getattr(other, "restore_best", False):
            raise ValueError(
                f"{us} does not work with {type(other).__name__}(restore_best=True), which takes the optimizer back to "
                "before ranks were cut, where it held other parameters: pass `restore_best=False`"
            )


def shards(trainer: Trainer) -> bool:
    """Whether the strategy is the one whose models the user shards, by ``fully_shard`` in ``configure_model``."""
    return _is_a(trainer.strategy, "ModelParallelStrategy")


def kind_of_run(trainer: Trainer) -> type[SVDTraining]:
    """What trains the layers of a model that this trainer fits."""
    return ShardedTraining if shards(trainer) else SVDTraining


def _check_sharding(us: str, trainer: Trainer) -> None:
    """Refuse what does not work with parameters that are sharded.

    Raises:
        ValueError: Naming it.
    """
    if trainer.strategy.device_mesh["tensor_parallel"].size() > 1:  # type: ignore[attr-defined]
        raise ValueError(
            f"{us} does not work with tensor parallelism: give ModelParallelStrategy(tensor_parallel_size=1)"
        )
    if is_trial(trainer):
        raise ValueError(f"{us} does not work with `fast_dev_run` where parameters are sharded: give `max_steps`")
    if not trainer.lightning_module.automatic_optimization:
        raise ValueError(f"{us} does not work with manual optimization where parameters are sharded")
    for other in callbacks_of(trainer):
        if _is_a(other, "WeightAveraging", "StochasticWeightAveraging", "BaseFinetuning"):
            raise ValueError(f"{us} does not work with {type(other).__name__} where parameters are sharded")


def thaws_layers(trainer: Trainer) -> bool:
    """Whether a callback is going to train layers that are frozen now."""
    return any(_is_a(other, "BaseFinetuning") for other in callbacks_of(trainer))


def connect(trainer: Trainer, run: SVDTraining) -> None:
    """Have the Trainer's callbacks and precision fit a run that has begun, until it is over."""
    if shards(trainer):
        # Imported here: it needs torch's distributed checkpoints, and takes a while.
        from lightning_svd.lightning import sharded_checkpoints

        sharded_checkpoints.connect(trainer.strategy, run)
    _show_weights_to_finetuning(trainer, run)
    run.loss_scale = functools.partial(_loss_scale, trainer)
    if run.distiller is not None:
        for module in run.distiller.teacher.modules():
            if "_trainer" in vars(module):  # which copies leave out; what they log is not the student's
                vars(module).update(_trainer=trainer, **_LOGGING)


def _loss_scale(trainer: Trainer) -> float:
    """What the training step's loss is multiplied by before its backward pass."""
    automatic = trainer.lightning_module.automatic_optimization
    scale = gradient_scale(trainer, trainer.optimizers[0], stepping=False)
    return scale / trainer.accumulate_grad_batches if automatic else scale


@contextmanager
def running_again(trainer: Trainer) -> Iterator[None]:
    """The precision of a training step, for calls of the model that are run once more; what they log is not logged.

    A network may log in its forward pass. Here Lightning would take that for another metric of the same name, which
    would hide the step's own until the epoch is over.
    """
    modules = [vars(module) for module in trainer.lightning_module.modules() if _is_a(module, "LightningModule")]
    before = [{name: own[name] for name in _LOGGING if name in own} for own in modules]
    for own in modules:
        own.update(_LOGGING)
    try:
        with trainer.precision_plugin.forward_context():
            yield
    finally:
        for own, kept in zip(modules, before, strict=True):
            for name in _LOGGING:
                own.pop(name, None)
            own.update(kept)


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


_LOGGING = {"log": _log_nothing, "log_dict": _log_nothing}


def _show_weights_to_finetuning(trainer: Trainer, run: SVDTraining) -> None:
    """Have finetuning callbacks find in the optimizers what ``named_parameters()`` shows, until the run is over.

    They note the name of each parameter that an optimizer holds, look there for those that they add, and restore the
    groups by these names.
    """
    for callback in callbacks_of(trainer):
        if _is_a(callback, "BaseFinetuning"):
            for hook in ("on_fit_start", "on_train_epoch_start"):
                setattr(callback, hook, _showing_weights(run, getattr(callback, hook)))
                run.until_closed.callback(vars(callback).pop, hook)


def _showing_weights(run: SVDTraining, hook: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(hook)
    def showing(*args: Any) -> None:
        with run.showing_weights():
            hook(*args)

    return showing


def wrap_again(trainer: Trainer) -> None:
    """Have DistributedDataParallel know the parameters that the model shows now; nothing with another strategy.

    It lists the model's parameters once, when it wraps it, and builds its buckets for their shapes.
    """
    strategy = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = trainer.lightning_module
        strategy.configure_ddp()  # type: ignore[attr-defined]  # of the strategies that wrap so


def _is_a(given: object, *names: str) -> bool:
    """Whether an object is of a class of one of these names, of `lightning` or of `pytorch_lightning`."""
    return any(kind.__name__ in names for kind in type(given).__mro__)


# Attributes that Trainer's constructor sets without an annotation.


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks in their order."""
    return list(vars(trainer)["callbacks"])


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which must leave the model as it was."""
    return bool(vars(trainer)["fast_dev_run"])


def trains_nothing(trainer: Trainer) -> bool:
    """Whether no batch is asked for: of a fit that validates at most, and ends."""
    return 0 in (trainer.limit_train_batches, trainer.max_epochs, trainer.max_steps)


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
            "SVDTrainingCallback schedules ranks over the run and needs its length, which the Trainer does not know "
            f"(its `estimated_stepping_batches` is {steps}): pass `max_steps`, or `max_epochs` with a sized dataloader "
            "or `limit_train_batches`, to the Trainer"
        )
    return int(min(steps, *(_steps_accumulated(trainer, other) for other in callbacks_of(trainer))))


def _steps_accumulated(trainer: Trainer, callback: Callback) -> int | float:
    """Length of a run whose accumulation a callback sets for each epoch; infinity where that does not decide.

    Lightning estimates by the accumulation of the moment. A run that is shorter would end before the last cut.
    """
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if not _is_a(callback, "GradientAccumulationScheduler") or batches == math.inf or epochs in (None, -1):
        return math.inf
    of_epoch: Callable[[int], int] = callback.get_accumulate_grad_batches  # type: ignore[attr-defined]
    return sum(math.ceil(batches / of_epoch(epoch)) for epoch in range(epochs))


def metric(trainer: Trainer, name: str, lacking_in: set[int]) -> float | None:
    """The last value of a logged metric; None where it is not there yet.

    What is logged of an epoch of training comes after its validations.

    Args:
        trainer: That fits.
        name: Of the metric.
        lacking_in: The epochs in which it was not there, the present one with them.

    Raises:
        ValueError: If it was not there in an epoch before.
    """
    if name in trainer.callback_metrics:
        return float(trainer.callback_metrics[name])
    lacking_in.add(trainer.current_epoch)
    if len(lacking_in) > 1:
        raise ValueError(_lacking(trainer, name))
    return None


def look_for_metric(trainer: Trainer, name: str) -> None:
    """Look, in the sanity check ahead of the first batch, whether a metric is logged, and warn if it is not.

    Raises:
        ValueError: If it is not, and others of the same first word are, as `val` is of `val_acc`.
    """
    known = trainer.callback_metrics
    if name not in known:
        if _first_word(name) in map(_first_word, known):
            raise ValueError(_lacking(trainer, name))
        rank_zero_warn(
            f"SVD training: {_lacking(trainer, name)}. If nobody logs it in the first epoch, the fit ends in the second"
        )


def _first_word(metric: str) -> str:
    return re.split(r"[\W_]", metric)[0]


def _lacking(trainer: Trainer, name: str) -> str:
    known = ", ".join(map(repr, trainer.callback_metrics)) or "none"
    return f"`monitor` must be a metric that is logged, got {name!r}; there are: {known}"


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
def forward_example(trainer: Trainer) -> None:
    """Run ``example_input_array`` through the model as in evaluation, leaving everything as it was.

    Raises:
        ValueError: If it fails.
    """
    pl_module = trainer.lightning_module
    example = pl_module.transfer_batch_to_device(pl_module.example_input_array, pl_module.device, 0)
    with running_again(trainer), untouched(pl_module), running_example("example_input_array"):
        if isinstance(example, dict):
            pl_module(**example)
        else:
            pl_module(*as_arguments(example))
