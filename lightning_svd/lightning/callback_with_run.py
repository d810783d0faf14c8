"""What a callback keeps of the run that it drives: state to resume from, after a failure too, and its arguments."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import Any, TypeVar, get_type_hints

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_svd.files.checkpoints import VERSION, check_state
from lightning_svd.lightning import trainers
from lightning_svd.model.plan import LayerPlan
from lightning_svd.model.surgery import check_in_place
from lightning_svd.report.data import SVDReport
from lightning_svd.training import processes
from lightning_svd.training.guard import MetricGuard
from lightning_svd.training.recipe import Recipe
from lightning_svd.training.run import SVDTraining
from lightning_svd.training.sharded import ShardedTraining

CallbackT = TypeVar("CallbackT", bound=type[Callback])


class CallbackWithRun(Callback):
    """A callback with one run of SVD training in each fit, whose state goes into checkpoints.

    Attributes:
        recipe: What is asked for.
        plan: What became of each layer, after the fit has started.
        report: On the run that has ended; None before.
    """

    recipe: Recipe
    report: SVDReport | None

    def __init__(self) -> None:
        super().__init__()
        self.plan: list[LayerPlan] = []
        self.report = None
        self._run: SVDTraining | None = None
        self._to_resume: dict[str, Any] | None = None
        self._interrupted: dict[str, Any] = {}
        self._finished: weakref.ref[nn.Module] | None = None
        self._values: list[tuple[int, int]] | None = None

    def _begin(self, run: SVDTraining) -> None:
        self._run, self.plan = run, run.plan
        self.report = self._to_resume = self._finished = None

    def _finish(self, run: SVDTraining) -> SVDReport:
        try:
            return run.finish(self.arguments)  # which may ask this callback for ranks
        finally:
            self._run = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            check_in_place(pl_module, self._run.layers)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            self._run.step_ranks.restore()

    def _see_metric(self, trainer: Trainer, guard: MetricGuard) -> None:
        if trainer.sanity_checking:
            processes.decide(lambda: trainers.look_for_metric(trainer, guard.monitor))
        elif self._run is not None:
            value = functools.partial(trainers.metric, trainer, guard.monitor, guard.lacking_in)
            if (change := self._run.see_metric(value, trainers.steps_done(trainer))) is not None:
                rank_zero_info(f"SVD training: `{guard.monitor}`: pruning {change}")

    def state_dict(self) -> dict[str, Any]:
        state = self._run.state_dict() if self._run is not None else self._interrupted
        return {"lightning_svd": VERSION, "is_finished": self.report is not None} | state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, type(self).__name__, may_be_in_shards=isinstance(self._run, ShardedTraining))
        if self._run is not None and "layers" in state_dict:
            self._run.load_state_dict(state_dict)  # a fit that restores a checkpoint inside itself
        else:
            self._to_resume = state_dict if "layers" in state_dict else None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._abandon()  # a tuner's early exit comes here past `on_fit_end` and `on_exception`
        if stage == "fit":
            self._note_trained_further(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._abandon()
        self._note_trained_further(pl_module)

    def _abandon(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._interrupted = run.abandon()  # for a checkpoint that is written because of the exception

    def _note_finished(self, pl_module: LightningModule) -> None:
        self._finished = weakref.ref(pl_module)
        # A model of plain layers only may be given other weights, its first ones for the next fold say:
        # then it is a new one.
        is_dense = self.report is not None and all(layer.form == "dense" for layer in self.report.layers)
        self._values = _versions(pl_module) if is_dense else None

    def _is_finished(self, pl_module: LightningModule) -> bool:
        is_same = self._finished is not None and self._finished() is pl_module
        return is_same and self._values in (None, _versions(pl_module))

    def _tell_of_finished(self) -> None:
        if self.recipe.final == "dense":
            rank_zero_warn(
                "SVD training: this model's layers are of low rank and dense, as `final='dense'` asked for. They are "
                "trained as they are, so that their ranks grow again: a new callback would cut them again"
            )
        else:
            rank_zero_info("SVD training: this model is low-rank already and is trained as it is.")

    def _note_trained_further(self, pl_module: LightningModule) -> None:
        """A fit is over; one of a finished model has changed its values."""
        if self._finished is not None and self._finished() is pl_module:
            self._note_finished(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        # Lightning hangs the model's own logging functions on a callback.
        own = {key: value for key, value in vars(self).items() if key not in ("log", "log_dict")}
        return own | {"_run": None, "_finished": None, "_values": None}

    @property
    def arguments(self) -> dict[str, Any]:
        """What this callback was built with, by the arguments' names; a subclass's own where it keeps them so."""
        names = [name for kind in reversed(type(self).__mro__) for name in inspect.signature(kind).parameters]
        return self.recipe.arguments | {n: vars(self)[n] for n in names if n in vars(self) and n != "recipe"}


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Which parameters a module has, and how often each was written into."""
    return [(id(parameter), parameter._version) for parameter in module.parameters()]


def with_recipe_arguments(callback: CallbackT) -> CallbackT:
    """Have a callback that takes the recipe's fields as ``**recipe`` show them in its signature, for all to see."""
    own = inspect.signature(callback.__init__)
    first, *mine = (p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD)
    types = get_type_hints(Recipe)  # a command line checks values against them, and knows no names of other modules
    asked = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=types[p.name])
        for p in inspect.signature(Recipe).parameters.values()
    ]
    callback.__init__.__signature__ = own.replace(parameters=[first, *asked, *mine])  # type: ignore[attr-defined]
    return callback
