"""``SVDTrainingCallback``: when things happen during a fit."""

from __future__ import annotations

import copy
import inspect
import weakref
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_svd import monitor
from lightning_svd.arguments import (
    check_choice,
    check_count,
    check_rank_pattern,
    check_share,
    check_targets,
    check_weight,
)
from lightning_svd.checkpoint_io import SVDCheckpointIO
from lightning_svd.checkpoints import VERSION, check_version
from lightning_svd.costs import ModelCost, Unit, count_params, svd_layers
from lightning_svd.guard import MetricGuard, guard_on
from lightning_svd.latency import time_layers
from lightning_svd.monitor import SpectrumHistory
from lightning_svd.optimizers import OptimizerOfFactors, check_holds_factors
from lightning_svd.plans import LayerPlan, Targets, plan, read_plan
from lightning_svd.ranks import keep_by_budget, keep_by_energy, share_above, smallest_cost
from lightning_svd.regularizers import SPARSITY, add_gradients
from lightning_svd.report import SVDReport, plan_table, report_on
from lightning_svd.run import SVDRun
from lightning_svd.schedules import SHAPES, cut_steps, removal, strength
from lightning_svd.surgery import compact, decompose, make_dense, make_factored, restore
from lightning_svd.trainers import (
    averages_weights,
    batch_size,
    builds_layers_late,
    check_trainer,
    decompose_after_configure_model,
    forward_example,
    gradient_scale,
    is_trial,
    log_interval,
    metric,
    steps_done,
    total_steps,
    unwrap_configure_model,
)
from lightning_svd.views import CONV_MODES

# Strengths at which each penalty helps a falling budget without doing the pruning alone.
SPARSITY_WEIGHTS = {"hoyer": 2e-3, "hoyer_square": 2e-4, "l1": 5e-4, None: 0.0}
DEFAULT_TARGET_MACS = 0.5


class SVDTrainingCallback(Callback):
    """Trains a LightningModule in factorised form down to a budget and leaves a smaller, faster model.

    When the fit is set up, each linear layer and convolution is factorised into its full-rank SVD, U diag(s) V^T, and
    the factors are trained (Yang et al. 2020, arXiv 2004.09031). In three phases of one run: full rank, while the
    sparsity strength ramps up; ranks fall towards the budget; ranks are frozen and the low-rank model is finetuned.

    Works with no argument (``target_macs=0.5``). Give at most one of ``target_macs``, ``target_params`` and
    ``energy_threshold``.

    Args:
        target_modules: Layers to factorise: one or a list of names (whole, or their ends after a dot), types
            ("Conv2d"), "all-linear", or regular expressions for whole names. None: every supported layer.
        exclude_modules: Layers to leave alone, in the same form.
        conv_mode: The matrix that a convolution is seen as: "channel" (out, in*kh*kw), "spatial" (out*kw, in*kh), or
            "auto".
        rank_pattern: Layers, in the same form -> the most ranks that they keep.
        plan_file: A plan as YAML (see :func:`write_plan`), instead of the four arguments above.
        orthogonality_weight: Weight of ``(|U'U - I|^2 + |V'V - I|^2) / r^2``, which keeps U and V singular vectors.
        sparsity: Penalty on the singular values: "hoyer", "hoyer_square", "l1" or None.
        sparsity_weight: Its full weight; None for a measured default of each penalty.
        sparsity_schedule: How the weight ramps up until ``sparsify_start``: "constant", "linear", "cosine", "cubic".
        target_macs: Share of the whole dense model's multiply-accumulates to keep, in (0, 1].
        target_params: Share of the whole dense model's parameters to keep, in (0, 1].
        energy_threshold: Share of each layer's energy (sum of s^2) to keep, in (0, 1].
        sparsify_start: Share of the run's optimizer steps before ranks begin to fall.
        sparsify_end: Share of the run's steps after which ranks are frozen.
        full_rank_as: What layers are trained as before ranks begin to fall: "svd", or "dense", at the speed of dense
            training and without the regularisers, which then begin with the first cut.
        budget_schedule: How ranks fall in between: "constant" (all at once), "linear", "cosine", "cubic".
        rank_updates: In how many cuts they fall.
        min_rank: Fewest ranks that a layer keeps.
        round_to: Ranks are multiples of this, for hardware that likes them so; of half of it, a quarter, ... where a
            layer's break-even rank is smaller.
        refactorise: Before each cut compute the exact SVD of what the factors stand for by then, and after the last
            cut train them as the two plain layers that they are going to be. Both change the factors and not what they
            stand for. False: factors change by training only, which an average of your own over the parameters needs;
            so it is under Lightning's averaging callbacks in any case.
        monitor: Name of a logged metric; the report says what the pruning cost in it.
        mode: "min" if less of it is better, "max" if more is; to be given with ``monitor``.
        max_metric_drop: How far the metric may fall below its best, in its own unit, before pruning pauses until it
            has recovered. The budget may then not be met, which the report says. None: the budget is met.
        measure_latency: After the fit, time each layer on this machine, dense and as factors, for inputs as they were
            counted; the report shows the times, and a layer that is no faster as factors becomes dense again.
        final: The model after the fit: "factored" (pairs of plain torch layers), "dense" (plain layers of the
            original shapes), "decomposed" (this package's layers, compacted).
        log_every_n_steps: How often scalars are logged; None for the Trainer's.
        log_spectrum_every_n_epochs: How often spectra are drawn in W&B and TensorBoard; 0 for only at the start and
            the end.

    Attributes:
        plan: What became of each layer, after the fit was set up.
        report: An :class:`SVDReport` after the fit, None before.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    def __init__(
        self,
        *,
        target_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        conv_mode: str = "channel",
        rank_pattern: dict[str, int] | None = None,
        plan_file: str | None = None,
        orthogonality_weight: float = 1.0,
        sparsity: str | None = "hoyer",
        sparsity_weight: float | None = None,
        sparsity_schedule: str = "linear",
        target_macs: float | None = None,
        target_params: float | None = None,
        energy_threshold: float | None = None,
        sparsify_start: float = 0.5,
        sparsify_end: float = 0.7,
        full_rank_as: str = "svd",
        budget_schedule: str = "cubic",
        rank_updates: int = 20,
        min_rank: int = 1,
        round_to: int = 1,
        refactorise: bool = True,
        monitor: str | None = None,
        mode: str | None = None,
        max_metric_drop: float | None = None,
        measure_latency: bool = False,
        final: str = "factored",
        log_every_n_steps: int | None = None,
        log_spectrum_every_n_epochs: int = 1,
    ) -> None:
        super().__init__()
        check_targets("target_modules", target_modules)
        check_targets("exclude_modules", exclude_modules)
        check_choice("conv_mode", conv_mode, (*CONV_MODES, "auto"))
        check_rank_pattern(rank_pattern)
        if plan_file is not None and (target_modules, exclude_modules, conv_mode, rank_pattern) != _EVERY_LAYER:
            raise ValueError(
                "give either `plan_file`, which says it for each layer, or `target_modules`, `exclude_modules`, "
                "`conv_mode`, `rank_pattern`"
            )
        check_weight("orthogonality_weight", orthogonality_weight)
        check_choice("sparsity", sparsity, (*SPARSITY, None))
        if sparsity_weight is not None:
            check_weight("sparsity_weight", sparsity_weight)
        check_choice("sparsity_schedule", sparsity_schedule, SHAPES)
        check_share("sparsify_start", sparsify_start, zero=True)
        check_share("sparsify_end", sparsify_end)
        if sparsify_start > sparsify_end:
            raise ValueError(f"`sparsify_start` must be <= `sparsify_end` ({sparsify_end!r}), got {sparsify_start!r}")
        check_choice("full_rank_as", full_rank_as, ("svd", "dense"))
        if full_rank_as == "dense" and not refactorise:
            raise ValueError(
                '`full_rank_as` must be "svd" with `refactorise=False`, under which factors change by training only'
            )
        check_choice("budget_schedule", budget_schedule, SHAPES)
        check_count("rank_updates", rank_updates)
        check_count("min_rank", min_rank)
        check_count("round_to", round_to)
        guard_on(monitor, mode, max_metric_drop)
        check_choice("final", final, ("factored", "dense", "decomposed"))
        if log_every_n_steps is not None:
            check_count("log_every_n_steps", log_every_n_steps)
        check_count("log_spectrum_every_n_epochs", log_spectrum_every_n_epochs, least=0)
        self.target_name, self.target = _target(
            target_macs=target_macs, target_params=target_params, energy_threshold=energy_threshold
        )

        self.target_modules: Targets = target_modules
        self.exclude_modules: Targets = exclude_modules
        self.conv_mode = conv_mode
        self.rank_pattern = rank_pattern
        self.plan_file = plan_file
        self.orthogonality_weight = orthogonality_weight
        self.sparsity = sparsity
        self.sparsity_weight = SPARSITY_WEIGHTS[sparsity] if sparsity_weight is None else sparsity_weight
        self.sparsity_schedule = sparsity_schedule
        self.sparsify_start = sparsify_start
        self.sparsify_end = sparsify_end
        self.full_rank_as = full_rank_as
        self.budget_schedule = budget_schedule
        self.rank_updates = rank_updates
        self.min_rank = min_rank
        self.round_to = round_to
        self.refactorise = refactorise
        self.monitor = monitor
        self.mode = mode
        self.max_metric_drop = max_metric_drop
        self.measure_latency = measure_latency
        self.final = final
        self.log_every_n_steps = log_every_n_steps
        self.log_spectrum_every_n_epochs = log_spectrum_every_n_epochs

        self.plan: list[LayerPlan] = []
        self.report: SVDReport | None = None
        self._run: SVDRun | None = None
        self._spectra: SpectrumHistory | None = None
        self._interrupted: dict[str, Any] = {}
        self._before_trial: dict[str, Any] = {}
        self._finished: weakref.ref[nn.Module] | None = None

    # ------------------------------------------------------------------------------------- before the first batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Here, not in on_fit_start: the optimizers are built in between and must get the factors.
        SVDCheckpointIO.install(trainer)
        if stage != "fit":
            return
        if self._finished is not None and self._finished() is pl_module:
            rank_zero_info("SVD training: this model is low-rank already and is trained as it is.")
            return
        check_trainer(self, trainer)
        if self.full_rank_as == "dense" and averages_weights(trainer):
            raise ValueError(
                '`full_rank_as` must be "svd" under a callback that averages weights: those of before and after the '
                "first cut would be of two kinds"
            )
        self._run, self._interrupted = None, {}
        if builds_layers_late(pl_module):
            decompose_after_configure_model(pl_module)
        else:
            self.begin_svd_run(pl_module)

    def begin_svd_run(self, pl_module: LightningModule) -> None:
        """Factorise the layers of ``pl_module`` and begin a run; nothing if one has begun."""
        if self._run is not None:
            return
        if is_trial(pl_module.trainer):
            self._before_trial = copy.deepcopy(pl_module.state_dict())
        weights = dict(pl_module.named_parameters(remove_duplicate=False))
        self.plan = self._choose_layers(pl_module)
        self._check_lookups()
        decompose(pl_module, layer_plans=self.plan)
        layers = svd_layers(pl_module)
        guard = guard_on(self.monitor, self.mode, self.max_metric_drop)
        now = dict(pl_module.named_parameters(remove_duplicate=False))
        dense_weights = {name: parameter for name, parameter in weights.items() if name not in now}
        self.report, self._run = None, SVDRun(layers, dense_weights, guard=guard)
        if self.full_rank_as == "dense":
            self._run.train_as_dense()
        rank_zero_info(plan_table(self.plan))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        unwrap_configure_model(pl_module)
        run = self._run
        if run is None:
            return
        check_holds_factors(trainer.optimizers, pl_module, run.layers)
        run.total_steps = total_steps(trainer)
        run.adopt(trainer.optimizers)
        if self.target_name == "params":
            self._check_reachable(run, count_params(pl_module))
        if pl_module.example_input_array is not None:
            run.watch_costs(pl_module)
            with trainer.precision_plugin.forward_context():
                forward_example(pl_module)
            self._stop_watching_costs(pl_module.example_input_array)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._run is not None:
            self._run.watch_costs(pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._stop_watching_costs(batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None:
            return
        cuts = cut_steps(self._run.total_steps, self.sparsify_start, self.sparsify_end, self.rank_updates)
        self._run.cuts = [step for step in cuts if step > self._run.last_cut]
        shapes = {name: layer.matrix_shape for name, layer in self._run.layers.items()}
        self._spectra = SpectrumHistory(shapes, self._run.spectra_before)
        if trainer.is_global_zero:
            monitor.log_start(trainer.loggers, self.arguments, self.plan, trainer.global_step)
        self._draw_spectra(trainer, trainer.current_epoch)

    # ------------------------------------------------------------------------------------------------- every step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._run is not None:
            self._run.begin_batch(batch, pl_module)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._run is not None:
            self._run.backwards = 0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if self._run is not None:
            self._run.backwards += 1
            self._stop_watching_costs(self._run.batch, trained=True)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # After the backward pass, accumulation, all-reduce and unscaling, and before clipping: here a gradient added
        # by hand is what the gradient of `loss + penalty` would be.
        run = self._run
        if run is None:
            return
        trained = run.optimizer(optimizer)
        if not trained.gradients_added:
            self._add_gradients(run, trainer, trained, gradient_scale(trainer, optimizer))
        trained.gradients_added = False
        trained.split()

    def add_gradients(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Add the regularisers' gradient now, for code of your own that clips between ``manual_backward`` and ``step``.

        In manual optimization it is added just before each ``optimizer.step()``; where gradients are clipped by hand
        before that, call this first.

        Args:
            trainer: The Trainer that fits.
            optimizer: The one that is going to step.
        """
        if self._run is not None:
            optimizer = getattr(optimizer, "optimizer", optimizer)
            trained = self._run.optimizer(optimizer)
            self._add_gradients(self._run, trainer, trained, gradient_scale(trainer, optimizer, stepping=False))
            trained.gradients_added = True

    def _add_gradients(self, run: SVDRun, trainer: Trainer, trained: OptimizerOfFactors, scale: float) -> None:
        step = steps_done(trainer)
        progress = run.clock(step) / run.total_steps
        ramp = strength(progress, self.sparsify_start, self.sparsify_end, self.sparsity_schedule)
        run.set_strength(step, 0.0 if run.paused or not run.regularised else self.sparsity_weight * ramp)
        if trainer.lightning_module.automatic_optimization:
            # What `loss + penalty` would weigh in the last, shorter window of an accumulation, or in a skipped step.
            scale *= run.backwards / trainer.accumulate_grad_batches
        trained.hold_constants()
        layers = trained.regularised
        if layers and scale:
            run.penalties = add_gradients(
                layers, self.orthogonality_weight, self.sparsity, run.strength, scale, trained.held(), step
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        run = self._run
        if run is None:
            return
        self._stop_watching_costs(batch)  # a training step that returned None had no backward pass
        run.end_batch()
        done = steps_done(trainer)
        if trainer.global_step > 0 and not is_trial(trainer):
            run.dense_weights = {}
        if not run.paused and self.should_prune(run.clock(done)):
            self._cut_ranks(run, trainer, done)
        if done % (self.log_every_n_steps or log_interval(trainer)) == 0:
            monitor.log_scalars(pl_module, run)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None or self._run.guard is None:
            return
        if trainer.sanity_checking:
            metric(trainer, self._run.guard.monitor)  # a name that nobody logs is refused before the first batch
        else:
            self._see_metric(trainer, self._run, self._run.guard)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is not None and self._run.guard is not None and not trainer.enable_validation:
            self._see_metric(trainer, self._run, self._run.guard)
        every = self.log_spectrum_every_n_epochs
        if every and (trainer.current_epoch + 1) % every == 0:
            self._draw_spectra(trainer, trainer.current_epoch + 1)

    # ---------------------------------------------------------------------------------------------------- the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run = self._run
        if run is None:
            return
        if run.cuts:
            warning = self._why_not_reached(run, steps_done(trainer))
            run.warnings.append(warning)
            rank_zero_warn(f"SVD training: {warning}")
        self._draw_spectra(trainer, trainer.current_epoch, last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not in on_train_end, where checkpoints and averaging callbacks still act on the model as it was trained.
        run, self._run = self._run, None
        if run is None:
            return
        run.close()
        if is_trial(trainer):
            restore(pl_module, run.dense_weights).load_state_dict(self._before_trial)
            self._before_trial = {}
            return
        cost = run.cost or count_params(pl_module)
        if self.measure_latency:
            cost = self._with_latency(run, trainer, cost)
        self.report = replace(
            report_on(self.plan, run.layers, cost, run.spectra_before, all_dense=self.final == "dense"),
            **run.history(),
            arguments=self.arguments,
        )
        _FINISH[self.final](pl_module, cost)
        self._finished = weakref.ref(pl_module)
        rank_zero_info(str(self.report))
        if trainer.is_global_zero:
            monitor.log_end(trainer.loggers, self.report, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._abandon(pl_module)  # a tuner's early exit comes here past `on_fit_end` and `on_exception`

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._abandon(pl_module)

    def _abandon(self, pl_module: LightningModule) -> None:
        unwrap_configure_model(pl_module)
        run, self._run = self._run, None
        if run is None:
            return
        run.close()
        self._interrupted = run.state_dict()  # for a checkpoint that is written because of the exception
        if run.dense_weights:
            restore(pl_module, run.dense_weights)

    def state_dict(self) -> dict[str, Any]:
        return {"version": VERSION} | (self._run.state_dict() if self._run is not None else self._interrupted)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(state_dict["version"], f"the checkpoint's state of {type(self).__name__}")
        # Without a run this is a test or a validation, and the report of the fit before it must stay.
        if self._run is not None and "last_cut" in state_dict:
            self._run.load_state_dict(state_dict)

    @property
    def arguments(self) -> dict[str, Any]:
        """What this callback was built with, by the arguments' names; a subclass's own where it keeps them so."""
        names = [name for kind in reversed(type(self).__mro__) for name in inspect.signature(kind).parameters]
        return {name: vars(self)[name] for name in names if name in vars(self)} | {
            _ARGUMENT[self.target_name]: self.target
        }

    # -------------------------------------------------------------------------------------------------- decisions

    def should_prune(self, step: int) -> bool:
        """Whether ranks are cut after this optimizer step; override it to choose other moments.

        Args:
            step: Optimizer steps so far, those in pauses of ``max_metric_drop`` not counted.
        """
        return self._run is not None and bool(self._run.cuts) and step >= self._run.cuts[0]

    def choose_ranks(self, energies: dict[str, torch.Tensor], cost: ModelCost) -> dict[str, int]:
        """The ranks to end with, judged by the model as it is now; override it for a criterion of your own.

        Args:
            energies: For each layer what each of its ranks carries, (r,), dropped ones as they were then.
            cost: Of the model.
        """
        if self.target_name == "energy":
            return keep_by_energy(energies, cost, self.target, **self._bounds)
        unit: Unit = self.target_name
        return keep_by_budget(energies, cost, self.target * cost.dense(unit), unit, **self._bounds)

    # ------------------------------------------------------------------------------------------------------ parts

    def _choose_layers(self, pl_module: LightningModule) -> list[LayerPlan]:
        if self.plan_file is not None:
            return read_plan(self.plan_file, pl_module)
        return plan(pl_module, self.target_modules, self.exclude_modules, self.conv_mode, self.rank_pattern)

    def _check_lookups(self) -> None:
        """Refuse a budget of MACs for embeddings, whose lookups cost none."""
        lookups = [layer.name for layer in self.plan if layer.kind == "Embedding" and not layer.skipped]
        if lookups and self.target_name == "macs":
            raise ValueError(
                f"`{lookups[0]}` is an Embedding, whose lookups cost no MACs: give `target_params` or "
                "`energy_threshold`, or leave it out"
            )

    @property
    def _bounds(self) -> dict[str, Any]:
        """What ranks a layer may have."""
        most = {layer.name: layer.max_rank for layer in self.plan if layer.max_rank is not None}
        return {"min_rank": self.min_rank, "round_to": self.round_to, "max_ranks": most}

    def _with_latency(self, run: SVDRun, trainer: Trainer, cost: ModelCost) -> ModelCost:
        # One decision for all processes, whose clocks differ.
        timed: ModelCost = trainer.strategy.broadcast(time_layers(cost, run.layers))
        slower = [
            name for name, rank in run.ranks().items() if cost.layers[name].pays(rank) > timed.layers[name].pays(rank)
        ]
        if slower and self.final != "dense":
            run.warnings.append(
                f"{len(slower)} layers are dense because their factors are no faster here ({', '.join(slower[:8])}): "
                f"{timed.ratio(run.ranks(), 'macs'):.1%} of the MACs, not {cost.ratio(run.ranks(), 'macs'):.1%}"
            )
        return timed

    def _why_not_reached(self, run: SVDRun, done: int) -> str:
        missed = f"the target, {self.target:g} of the {self.target_name}, was not reached"
        last = run.cuts[-1]
        if run.guard and run.guard.pauses:
            return f"pruning paused for {done - run.clock(done)} steps because `{self.monitor}` had fallen: {missed}"
        return f"the fit ended at step {done} of {run.total_steps}, before the last rank cut at step {last}: {missed}"

    def _stop_watching_costs(self, batch: Any, trained: bool = False) -> None:
        run = self._run
        if run is None or not run.stop_watching(batch_size(batch)):
            return
        assert run.cost is not None
        if not trained and not any(layer.input_shapes for layer in run.cost.layers.values()):
            run.cost = None  # a training step that returned early, say; the next pass will tell
            return
        whole = [name for name, layer in run.cost.layers.items() if layer.stays_whole]
        if whole:
            warning = f"{len(whole)} layers stay dense because the model reads their weight: {', '.join(whole[:8])}"
            run.warnings.append(warning)
            rank_zero_warn(f"SVD training: {warning}")
        if self.target_name == "macs":
            self._check_reachable(run, run.cost)

    def _check_reachable(self, run: SVDRun, cost: ModelCost) -> None:
        unit: Unit = self.target_name
        if not cost.dense(unit):
            raise ValueError("`target_macs`: the first forward pass used no layer whose MACs could be counted")
        least = smallest_cost(cost, unit, run.full_ranks, **self._bounds) / cost.dense(unit)
        if least > self.target:
            raise ValueError(
                f"`target_{unit}` must be at least {share_above(least)} for this model, its cost when every "
                f"factorised layer keeps its fewest ranks, got {self.target!r}"
            )

    def _cut_ranks(self, run: SVDRun, trainer: Trainer, step: int) -> None:
        clock = run.clock(step)
        last = clock >= run.cuts[-1]
        progress = clock / run.total_steps
        removed = 1.0 if last else removal(progress, self.sparsify_start, self.sparsify_end, self.budget_schedule)
        refactorise = self.refactorise and not averages_weights(trainer)
        # One decision for all processes: factors or ranks that differ between them would diverge and never say so.
        if refactorise:
            run.set_factors(trainer.strategy.broadcast(run.refactorised()), trainer.optimizers)
        masks = trainer.strategy.broadcast(run.choose_masks(removed, self.choose_ranks))
        change = run.cut(step, trainer.current_epoch, masks, trainer.optimizers)
        if last and refactorise:
            run.train_as_pairs(trainer.optimizers)
        if change is not None:
            rank_zero_info(f"SVD training: {change}")

    def _see_metric(self, trainer: Trainer, run: SVDRun, guard: MetricGuard) -> None:
        value = metric(trainer, guard.monitor)
        step = steps_done(trainer)
        falling = bool(run.cuts) and run.clock(step) >= self.sparsify_start * run.total_steps
        # One decision for all processes, which may have logged different values.
        fallen = trainer.strategy.reduce_boolean_decision(falling and guard.has_fallen(value), all=False)
        change = guard.see(step, value, fallen)
        if change is not None:
            rank_zero_info(f"SVD training: `{guard.monitor}`: pruning {change}")

    def _draw_spectra(self, trainer: Trainer, epoch: int, last: bool = False) -> None:
        if self._run is not None and self._spectra is not None and trainer.is_global_zero:
            self._spectra.draw(trainer.loggers, self._run.spectra, epoch, trainer.global_step, last)


_EVERY_LAYER = (None, None, "channel", None)
_ARGUMENT = {"macs": "target_macs", "params": "target_params", "energy": "energy_threshold"}
_FINISH = {"factored": make_factored, "dense": lambda module, cost: make_dense(module), "decomposed": compact}


def _target(**targets: float | None) -> tuple[Any, float]:
    """The one target that was given: ("macs" | "params" | "energy", share)."""
    given = {name: value for name, value in targets.items() if value is not None}
    for name, value in given.items():
        check_share(name, value)
    if len(given) > 1:
        raise ValueError(f"give one of {', '.join(f'`{name}`' for name in targets)}, got {', '.join(given)}")
    name, value = next(iter(given.items()), ("target_macs", DEFAULT_TARGET_MACS))
    return next(kind for kind, argument in _ARGUMENT.items() if argument == name), float(value)
