"""``SVDTrainingCallback``: when things happen during a fit."""

from __future__ import annotations

import copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_svd.arguments import check_count
from lightning_svd.lightning import loggers, trainers
from lightning_svd.lightning.callback_with_run import CallbackWithRun, with_recipe_arguments
from lightning_svd.lightning.checkpoint_io import SVDCheckpointIO
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.report.data import plan_table
from lightning_svd.training.guard import guard_on
from lightning_svd.training.recipe import recipe_of
from lightning_svd.training.run import SVDTraining


@with_recipe_arguments
class SVDTrainingCallback(CallbackWithRun):
    """Trains a LightningModule in factorized form down to a budget and leaves a smaller, faster model.

    When a fit starts, each linear layer and convolution is factorized into its full-rank SVD, U diag(s) V^T, and the
    factors are trained (Yang et al. 2020, arXiv 2004.09031). In three phases of one run: full rank, while the
    sparsity strength ramps up; ranks fall towards the budget; ranks are frozen and the low-rank model is finetuned.
    Parameters, state dicts and files show the dense weights under their own names all the while.

    Works with no argument (``target_macs=0.5``). Give at most one of ``target_macs``, ``target_params``,
    ``target_latency`` and ``energy_threshold``.

    Args:
        monitor: Name of a logged metric; the report says what the pruning cost in it.
        mode: "min" if less of it is better, "max" if more is; to be given with ``monitor``.
        max_metric_drop: How far the metric may fall below its best, in its own unit, before pruning pauses until it
            has recovered. The budget may then not be met, which the report says. None: the budget is met.
        log_every_n_steps: How often scalars are logged, in optimizer steps; None for the Trainer's. The Trainer's own
            interval is a gate in front of it: less often than that, not more often.
        log_spectrum_every_n_epochs: How often spectra are drawn in W&B and TensorBoard; 0 for only at the start and
            the end.
        recipe: All others are the fields of :class:`~lightning_svd.training.recipe.Recipe`.

    Attributes:
        recipe: What was asked for.
        plan: What became of each layer, after the fit has started.
        report: An :class:`SVDReport` after the fit, None before.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        *,
        monitor: str | None = None,
        mode: str | None = None,
        max_metric_drop: float | None = None,
        log_every_n_steps: int | None = None,
        log_spectrum_every_n_epochs: int = 1,
        **recipe: Any,
    ) -> None:
        super().__init__()
        self.recipe = recipe_of(type(self), recipe)
        guard_on(monitor, mode, max_metric_drop)
        if log_every_n_steps is not None:
            check_count("log_every_n_steps", log_every_n_steps)
        check_count("log_spectrum_every_n_epochs", log_spectrum_every_n_epochs, least=0)
        self.monitor, self.mode, self.max_metric_drop = monitor, mode, max_metric_drop
        self.log_every_n_steps, self.log_spectrum_every_n_epochs = log_every_n_steps, log_spectrum_every_n_epochs
        self._spectra: loggers.SpectrumHistory | None = None
        self._before_trial: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------- before the first batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainers.shards(trainer):  # whose layers stay factorized
            SVDCheckpointIO.install(trainer)
        if stage == "fit":
            self._to_resume, self._interrupted = None, {}
            if not self._is_finished(pl_module):
                trainers.check_trainer(self, trainer, self.recipe)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here the model is on its device, its optimizers are made and a checkpoint's weights are loaded; what the
        # optimizers remember comes next, and finds the parameters that it was written for.
        if self._is_finished(pl_module):
            self._tell_of_finished()
            return
        if trainers.trains_nothing(trainer):
            return
        self._before_trial = copy.deepcopy(pl_module.state_dict()) if trainers.is_trial(trainer) else {}
        run = trainers.kind_of_run(trainer)(
            pl_module,
            trainer.optimizers,
            trainers.total_steps(trainer),
            recipe=self.recipe,
            thaws=trainers.thaws_layers(trainer),
            choose_ranks=self.choose_ranks,
            guard=guard_on(self.monitor, self.mode, self.max_metric_drop),
            on_reshape=lambda: trainers.wrap_again(trainer),
            state=self._to_resume,
        )
        self._begin(run)
        trainers.connect(trainer, run)
        rank_zero_info(plan_table(self.plan))
        if pl_module.example_input_array is not None and run.cost is None:
            run.recorder.start()
            trainers.forward_example(trainer)
            self._learn_costs(trainer, run)
        if trainer.is_global_zero:
            self._spectra = loggers.log_start(trainer.loggers, self.arguments, run, trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw_spectra(trainer, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._run is not None:
            self._run.begin_batch(trainer.optimizers, trainers.steps_done(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        run = self._run
        if run is not None:
            run.before_backward(loss)
            # In manual optimization another network may be still to come.
            self._learn_costs(trainer, run, every_layer=not pl_module.automatic_optimization)

    def _learn_costs(self, trainer: Trainer, run: SVDTraining, every_layer: bool = False) -> None:
        if run.cost is None:
            with trainers.running_again(trainer):  # as the pass was that is run again
                run.learn_costs(every_layer)
            for warning in run.warnings:
                rank_zero_warn(f"SVD training: {warning}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Reduced, unscaled and not clipped yet: a gradient added here is what that of `loss + penalty` would be.
        if self._run is not None:
            scale = trainers.gradient_scale(trainer, optimizer)
            if pl_module.automatic_optimization:
                # What `loss + penalty` would weigh in the last, shorter window of an accumulation, or a skipped step.
                scale *= self._run.backwards / trainer.accumulate_grad_batches
            self._run.before_step(self._run.optimizer(optimizer), trainers.steps_done(trainer), scale)

    def add_gradients(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Add the regularizers' gradient now, for code of your own that clips between ``manual_backward`` and ``step``.

        In manual optimization it is added just before each ``optimizer.step()``; where gradients are clipped by hand
        before that, call this first.

        Args:
            trainer: The Trainer that fits.
            optimizer: The one that is going to step.
        """
        if self._run is not None:
            ours = self._run.optimizer(optimizer := getattr(optimizer, "optimizer", optimizer))
            scale = trainers.gradient_scale(trainer, optimizer, stepping=False)
            self._run.add_gradients(ours, trainers.steps_done(trainer), scale)
            ours.gradients_added = True

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._run is not None:
            self._run.backwards = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (run := self._run) is None:
            return
        self._learn_costs(trainer, run)  # where no backward pass came, or not every layer was used
        with trainers.running_again(trainer):  # in which calls may be run again
            run.end_batch()
        done = trainers.steps_done(trainer)
        if change := run.after_step(done, trainer.current_epoch, self.should_prune(run.clock(done))):
            rank_zero_info(f"SVD training: {change}")
        if done % (self.log_every_n_steps or trainers.log_interval(trainer)) == 0:
            loggers.log_scalars(pl_module, run)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and self._run.guard is not None:
            self._see_metric(trainer, self._run.guard)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and self._run.guard is not None and not trainer.enable_validation:
            self._see_metric(trainer, self._run.guard)
        if (every := self.log_spectrum_every_n_epochs) and (trainer.current_epoch + 1) % every == 0:
            self._draw_spectra(trainer, trainer.current_epoch + 1)

    def _draw_spectra(self, trainer: Trainer, epoch: int, last: bool = False) -> None:
        if (run := self._run) is not None:
            run.look()
            if self._spectra is not None and trainer.is_global_zero:
                self._spectra.draw(trainer.loggers, run.spectra, epoch, trainer.global_step, last)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None:
            if (missed := self._run.why_not_reached(trainers.steps_done(trainer))) is not None:
                self._run.warnings.append(missed)
                rank_zero_warn(f"SVD training: {missed}")
            self._draw_spectra(trainer, trainer.current_epoch, last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end, where checkpoints and averaging callbacks still act on the model as it was trained.
        if (run := self._run) is None:
            return
        if trainers.is_trial(trainer):
            self._run = None
            run.undo()
            pl_module.load_state_dict(self._before_trial, strict=pl_module.strict_loading)
            self._before_trial = {}
            return
        with trainers.running_again(trainer):  # layers are timed as they run
            self.report = self._finish(run)
        self.plan = run.plan
        self._note_finished(pl_module)
        rank_zero_info(str(self.report))
        if trainer.is_global_zero:
            loggers.log_end(trainer.loggers, self.report, trainer.global_step)

    def should_prune(self, step: int) -> bool:
        """Whether ranks are cut after this optimizer step; override it to choose other moments.

        How far they fall is the schedule's: nothing before its first cut is due, to the budget from its last one on,
        and no further after that.

        Args:
            step: Optimizer steps so far, those in pauses of ``max_metric_drop`` not counted.
        """
        return self._run is not None and self._run.policy.is_due(step)

    def choose_ranks(self, energies: dict[str, Tensor], cost: ModelCost, share: float | None = None) -> dict[str, int]:
        """The ranks to end with, judged by the model as it is now; override it for a criterion of your own.

        Args:
            energies: For each layer what each of its ranks carries, (r,), descending.
            cost: Of the model.
            share: What of it is to be kept; None for the share that the target is.
        """
        assert self._run is not None
        return self._run.recipe.choose_ranks(energies, cost, self._run.bounds, share)
