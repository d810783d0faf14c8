"""One run of SVD training in plain PyTorch: what the callback drives, and a training loop of your own can."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_svd.arguments import check_count, check_module, shown
from lightning_svd.layers.compounds import no_faster
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.forms import SVDForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.shards import is_sharded
from lightning_svd.model import compiled
from lightning_svd.model.calls import CallRecorder
from lightning_svd.model.counting import count_params
from lightning_svd.model.layer_times import time_layers
from lightning_svd.model.plan import LayerPlan, weights_of, with_reasons
from lightning_svd.model.reads import telling_of_reads
from lightning_svd.model.repeats import RepeatedCalls
from lightning_svd.model.surgery import (
    begin,
    check_dense,
    check_in_place,
    finish,
    out_of_place,
    trained_weights,
    undo,
)
from lightning_svd.ranks.allocation import cheapest
from lightning_svd.ranks.costs import ModelCost, Unit
from lightning_svd.ranks.importance import OnData
from lightning_svd.report.data import BudgetRanks, LatencyReport, Pause, RankChange, SVDReport, report_on
from lightning_svd.training import processes
from lightning_svd.training.costs import CostsOfRun, Learned
from lightning_svd.training.distillation import distiller_of
from lightning_svd.training.evidence import Evidence
from lightning_svd.training.finite import warnings_of
from lightning_svd.training.guard import MetricGuard
from lightning_svd.training.judging import Verdict
from lightning_svd.training.observation import observer_of
from lightning_svd.training.optimizers import OptimizerOfFactors
from lightning_svd.training.policies import Change, ChooseRanks
from lightning_svd.training.policies.policy import checked
from lightning_svd.training.recipe import TARGETS, Recipe, recipe_of
from lightning_svd.training.regularizers import Penalties, centralize
from lightning_svd.training.step_ranks import StepRanks
from lightning_svd.training.trained_layers import TrainedLayers
from lightning_svd.wording import counted, few

# Of a budget: layers that come to less together train their dense weights once ranks fall, while they keep all of their
# own. Whether one of them loses ranks hardly matters, and U, s and V of full rank take several times as long.
SLIGHT = 0.02
LOST_AT_ONCE = (
    "the loss of the first batch is NaN. If it is not without SVD training, something takes a weight past every hook "
    "that torch has, as `torch.vmap`, `torch.func.grad` and `torch.jit.script` do: give it `weight.clone()`"
)


class SVDTraining:
    """A run of SVD training: factorizes a model's layers, and cuts their ranks while your loop trains it.

    The optimizers are those that train the model already: in their groups the factors take the places of the weights::

        training = SVDTraining(model, optimizer, total_steps=1000, target_macs=0.35)
        for x, y in batches:
            loss_of(model(x), y).backward()
            training.step()
            optimizer.zero_grad()
        report = training.finish()  # model is now small, in plain torch layers

    Args:
        model: To be trained, on its device.
        optimizers: One or several that train it.
        total_steps: Optimizer steps of the whole run.
        recipe: What is asked for; or its fields as keyword arguments.
        thaws: Whether layers are meant too that are frozen now, or that no optimizer trains yet; what unfreezes them
            in the middle of a run, does so in ``showing_weights`` if it looks at what optimizers hold.
        choose_ranks: The ranks to end with, from what each rank carries and the model's cost, instead of the recipe's.
        guard: What watches a metric and may pause the fall of ranks.
        on_reshape: Called after parameters were replaced by others, for what keeps a list of them, as DDP does. Inside,
            ``model.parameters()`` are those that are trained, U, s and V in the place of a weight, so that
            ``DistributedDataParallel(model)`` can be made anew.
        state: Of a run to go on with, from :meth:`state_dict`.
        arguments: Fields of :class:`~lightning_svd.training.recipe.Recipe`.

    Attributes:
        plan: What became of each layer.
        cost: Of the model; None until a forward pass was counted.
        penalties: The regularizers' values in the last step; None before.
        strength: The sparsity weight in the last step.
        timeline: Every rank change so far.
        strengths: (step, sparsity weight) about a hundred times in the run.
        warnings: What the user should know at the end.
        backwards: Backward passes since the last optimizer step.
        distiller: What teaches the model, until the run is over; None without ``distill``.
        ladder: Ranks that single steps use instead of all, if the schedule says so.
        step_ranks: What has them use these.
        last_cut: The :meth:`clock` at the last cut.
        until_closed: What is undone when the run is over, or given up.

    Raises:
        ValueError: If a layer, an optimizer or the budget is refused; the model is then as it was.
        TypeError: If ``model`` is no module, or an argument is none of a run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        total_steps: int,
        *,
        recipe: Recipe | None = None,
        thaws: bool = False,
        choose_ranks: ChooseRanks | None = None,
        guard: MetricGuard | None = None,
        on_reshape: Callable[[], None] | None = None,
        state: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        check_module("model", model)
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"`recipe` must be a Recipe, got {shown(recipe)}")
        if recipe is not None and arguments:
            raise TypeError(f"give either `recipe` or its fields, got both: `recipe`, `{'`, `'.join(arguments)}`")
        self.model, self.guard = model, guard
        self.total_steps = total_steps = processes.decide(lambda: total_steps)  # loaders may differ in length
        check_count("total_steps", total_steps)
        if state is not None and not (isinstance(state, Mapping) and "layers" in state):
            raise ValueError(f"`state` must be what the `state_dict` of a run returned, got {shown(state)}")
        self.recipe = self._settled(recipe or recipe_of(type(self), arguments))
        self.policy, self.importance = self.recipe.policy(), self.recipe.measure()
        self.regularizer = self.recipe.regularization()
        self.policy.begin(total_steps)
        self.cost: ModelCost | None = None
        self.penalties: Penalties | None = None
        self.loss_scale: Callable[[], float] = lambda: 1.0  # of the loss that is differentiated
        self.strength = 0.0
        self.timeline: list[RankChange] = []
        self.strengths: list[tuple[int, float]] = []
        self.warnings: list[str] = []
        self.spectra_before: dict[str, list[float]] = {}
        self.backwards = self.last_cut = self._steps = 0
        self._is_over = False
        self._refused: dict[str, str] = {}
        self._costs = CostsOfRun(model, self.recipe)
        self.policy.check(self.importance, choose_ranks or self._by_recipe)
        self._choose_ranks = checked(choose_ranks, lambda: self.full_ranks) if choose_ranks else self._by_recipe
        self.ladder: tuple[dict[str, int], ...] = ()
        self.step_ranks = StepRanks(model)
        self._repeats: RepeatedCalls | None = None
        trainers = _as_list(optimizers)
        processes.agree(partial(self._prepare, trainers, thaws))
        processes.check_same(self._of_all_processes(state is not None))
        self._trained = self._layers_to_train(on_reshape or (lambda: None))
        self.bounds = self.recipe.bounds(self.plan, model)
        # Until the first step, after which there is no way back: the values of the weights, to undo everything exactly.
        self._dense = trained_weights(self.layers)
        self.until_closed = ExitStack()
        if self.distiller is not None:
            self.distiller.loss_scale = lambda: self.loss_scale()
            self.distiller.start(self.layers)
            self.until_closed.callback(self._dismiss_teacher)
        self.until_closed.callback(self.step_ranks.stop)
        self._as_written = ExitStack()  # what is compiled, in batches that are watched
        self.until_closed.callback(self._as_written.close)
        weakref.finalize(self, self._as_written.close)  # a loop of one's own may end without a word
        self._read: dict[str, None] = {}  # layers whose weights the step reads by itself, in order
        self._reading = ExitStack()
        self.until_closed.callback(self._reading.close)
        self.evidence = self._evidence()
        if self.evidence is not None:
            self.until_closed.callback(self.evidence.rest)
        try:
            processes.agree(partial(self._adopt, trainers, state))
            if state is None and not self.recipe.begins_dense():
                self._trained.factorize()
        except BaseException:
            self.undo()
            raise
        if state is None:
            self.spectra_before = self.spectra()
        else:
            self._dense = {}  # it has stepped before
        self.recorder = CallRecorder(model, self.layers)
        self._trained.tells = True
        if self.cost is None:
            self._as_written.enter_context(compiled.as_written())
            self._record()
        self._trained.tell_of_others()
        if self.evidence is not None and state is None:
            self.evidence.plan(0)
            self.evidence.begin_batch()

    # ------------------------------------------------------------------------------------------- for a loop of your own

    def step(self, epoch: int = 0) -> RankChange | None:
        """Take a step with every optimizer, between your backward pass and ``zero_grad``; cuts ranks where it is time.

        Args:
            epoch: The current one, for the report.

        Returns:
            The change of ranks, if there was one.

        Raises:
            RuntimeError: If the run is over.
        """
        self._check_going_on()
        self._as_written.close()
        self.step_ranks.restore()
        if self.cost is None:
            self.recorder.keep_one_batch()
        self.learn_costs()
        if self.evidence is not None:
            self.evidence.end_batch(self._device)
        for optimizer in self.optimizers:
            self.before_step(optimizer, self._steps)
            optimizer.optimizer.step()
        self._steps += 1
        change = self.after_step(self._steps, epoch)
        self.begin_batch([each.optimizer for each in self.optimizers])
        return change

    def _check_going_on(self) -> None:
        if self._is_over:
            raise RuntimeError(
                "this run of SVD training is over, and its model is of plain layers: train on with the optimizer's own "
                "`step`, or build another `SVDTraining`"
            )

    # -------------------------------------------------------------------------------------------------- what a layer is

    @property
    def layers(self) -> dict[str, SVDLayer]:
        """The factorized layers by name."""
        return self._trained.by_name

    @property
    def optimizers(self) -> list[OptimizerOfFactors]:
        """The optimizers that train them."""
        return self._trained.optimizers

    @property
    def full_ranks(self) -> dict[str, int]:
        """The rank that each layer began with."""
        return {name: layer.full_rank for name, layer in self.layers.items()}

    def ranks(self) -> dict[str, int]:
        """The rank that each layer uses."""
        return {name: layer.rank for name, layer in self.layers.items()}

    def spectra(self) -> dict[str, list[float]]:
        """The singular values of each layer, in descending order."""
        return {name: layer.spectrum() for name, layer in self.layers.items()}

    def look(self) -> None:
        """Have :meth:`spectra` say what there is now, where all processes must ask for it together."""

    def ratio(self, unit: Unit) -> float:
        """Share of the dense model's cost at the present ranks."""
        return self.cost.ratio(self.ranks(), unit) if self.cost else 1.0

    def rank_ratio(self) -> float:
        """Share of all ranks that is in use."""
        return sum(self.ranks().values()) / max(1, sum(self.full_ranks.values()))

    @property
    def regularized(self) -> bool:
        """Whether any layer has penalties now."""
        return any(isinstance(layer.form, SVDForm) for layer in self.layers.values())

    # ------------------------------------------------------------------------------------------------------------ begin

    def _prepare(self, optimizers: Sequence[Optimizer], thaws: bool) -> None:
        """What may be refused while the model is as it was."""
        if sharded := [name for name, parameter in self.model.named_parameters() if is_sharded(parameter)]:
            raise ValueError(
                f"`{sharded[0]}` is sharded: SVDTraining is for whole parameters, SVDTrainingCallback trains sharded "
                "ones with Lightning's ModelParallelStrategy"
            )
        self.plan = self.recipe.plan(self.model, include_frozen=thaws)
        if not thaws:
            self.plan = _trained_by(optimizers, self.model, self.plan)
        self.distiller = distiller_of(self.recipe.distill, self.model)  # of the dense model

    def _settled(self, recipe: Recipe) -> Recipe:
        """The recipe with what it leaves to the run."""
        return recipe

    def _layers_to_train(self, on_reshape: Callable[[], None]) -> TrainedLayers:
        return TrainedLayers(self.model, begin(self.model, self.plan), self.importance, on_reshape)

    def _evidence(self) -> Evidence | None:
        """What observes batches; None where ranks are judged without data."""
        if not isinstance(self.importance, OnData):
            return None
        observer = observer_of(self.importance, self.model, self.layers)
        return Evidence(self.importance, observer, self.policy, self._trained.check_finite)

    def _adopt(self, optimizers: Sequence[Optimizer], state: Mapping[str, Any] | None) -> None:
        """What may be refused when its layers are others, before anything is computed."""
        check_dense(self.model, self._dense)
        self._trained.train_with(optimizers)
        if state is not None:
            self.load_state_dict(state)
        if self.recipe.target[0] == "params":
            self.recipe.check_reachable(count_params(self.model), self.full_ranks, self.bounds, self.plan)

    def _of_all_processes(self, resumes: bool) -> dict[str, Any]:
        """What must not differ between processes, which would do other things at other times."""
        arguments = {name: value for name, value in self.recipe.arguments.items() if name != "plan_file"}
        arguments |= {"monitor": self.guard.monitor if self.guard else None, "ckpt_path": resumes}
        for of in self.plan:
            chosen = f"{of.kind} {of.matrix_shape} {of.conv_mode or ''} {of.max_rank or ''}".strip()
            arguments[of.name] = "left alone" if of.skipped else chosen
        return arguments

    def undo(self) -> None:
        """Let go of the model and the optimizers; before the first step they are exactly as they were."""
        self._let_go()
        self._trained.tell_of_others()

    def _let_go(self) -> None:
        self.close()
        loaded = {name: layer.just_loaded() for name, layer in self.layers.items()}
        loaded = {name: weight for name, weight in loaded.items() if weight is not None}  # since the run began
        self._trained.replace(undo(self.model, {**self._dense, **loaded}))

    def abandon(self) -> dict[str, Any]:
        """Let go of a run that failed; returns what a file that is written because of it needs to resume.

        Before the first step all is as it was. Later the model is a plain one with the weights that it had by then,
        and the optimizers keep what belongs to the state that is returned.
        """
        if self._dense:
            self._let_go()  # and tell nobody: DDP would wait for processes that did not fail
            return {}
        state = self.state_dict()
        self.close()
        undo(self.model)
        return state

    def close(self) -> None:
        """Let go of what watches the model and the optimizers, whatever state the run is in."""
        if hasattr(self, "recorder"):
            self.recorder.stop()
        for optimizer in self.optimizers:
            optimizer.remove()
        self.until_closed.close()

    def _dismiss_teacher(self) -> None:
        if self.distiller is not None:
            self.distiller.stop()
            self.distiller = None

    # ---------------------------------------------------------------------------------------------------- what it costs

    def learn_costs(self, every_layer: bool = False) -> bool:
        """Count what the recorded forward pass costs, and find the layers that cannot become two; once in a run.

        Args:
            every_layer: Wait for more if what was recorded so far did not use every layer.

        Returns:
            Whether costs are known.

        Raises:
            ValueError: If the budget cannot be met, in every process.
        """
        if self.cost is not None:
            return True
        processes.meet(self._device)
        learned = processes.decide(lambda: self._learn(every_layer))
        if learned is None:
            return False
        self.cost, self._refused, draws = learned
        self.recorder.stop()
        self.recorder.calls.clear()
        self._share_weights()
        self._warn_of_reads()
        if self._refused:
            stay = counted(len(self._refused), "layer stays", "layers stay")
            self.warnings.append(f"{stay} dense ({few(self._refused)}): {next(iter(self._refused.values()))}")
        if not draws and self.evidence is not None:
            self.evidence.listen()
        return True

    def _record(self) -> None:
        """Note what the batch that comes calls, and which weights it reads beside."""
        self.recorder.start()
        self._reading.close()
        self._reading.enter_context(telling_of_reads(self.layers.values(), self._note_read))

    def _note_read(self, layer: SVDLayer) -> None:
        if not self.recorder.is_inside and self.layers.get(layer.svd_name) is layer:
            self._read[layer.svd_name] = None

    def _warn_of_reads(self) -> None:
        """Say which weights the step reads beside the calls that are run again, so that nobody knows what for."""
        names = [name for name in self._read if name not in self._refused]
        if names and self.recipe.final == "factored":
            weights = counted(len(names), "weight is read by the step itself", "weights are read by the step itself")
            said = (
                f"{weights} ({few(names)}), outside of the call of a module. Ranks fall all the same, and after the "
                "fit a layer that became two has no `weight`. Where the loss needs it at full rank, or a test reads "
                f"it, leave the layer out, `exclude_modules=['{names[0]}']`, or take `final='dense'`"
            )
            self.warnings.append(said)
            warnings.warn(f"SVD training: {said}", stacklevel=2)

    def _learn(self, every_layer: bool) -> Learned | None:
        calls, seen = self.recorder.calls, self.recorder.seen
        if not seen or (every_layer and not seen >= self.layers.keys()):
            return None
        self.recorder.stop()  # what follows are replays
        self._reading.close()
        observer = self.evidence.observer if self.evidence else None
        return self._costs.learn(self.layers, self.plan, self.bounds, calls, observer)

    def _share_weights(self) -> None:
        """Have layers that run several times in a call of the model rebuild their weights once for these."""
        if self._repeats is None:
            times = {name: price.repeats for name, price in self._known_cost.layers.items()}
            self._repeats = RepeatedCalls(self.model, self.layers, times)
            self.until_closed.callback(self._repeats.stop)

    def _release_refused(self) -> None:
        """Train the layers that cannot become two as the dense ones that they stay."""
        refused, self._refused = self._refused, {}
        if not refused:
            return
        self._trained.release(finish(self.model, dict.fromkeys(refused, "dense"), self.layers), [*refused])
        self.plan = with_reasons(self.plan, refused)
        self.spectra_before = {name: self.spectra_before[name] for name in self.layers}
        if self.evidence is not None:
            self.evidence.observer.know(self.layers)

    # ----------------------------------------------------------------------------------------------------------- a step

    def optimizer(self, optimizer: Optimizer) -> OptimizerOfFactors:
        """The wrapper of one of this run's optimizers."""
        return next(each for each in self.optimizers if each.optimizer is optimizer)

    def clock(self, step: int) -> int:
        """The step count of the schedule of ranks, which stands still in pauses."""
        return step - (self.guard.steps_paused(step) if self.guard else 0)

    @property
    def paused(self) -> bool:
        """Whether ranks must not fall now."""
        return self.guard is not None and self.guard.paused

    def before_step(self, optimizer: OptimizerOfFactors, step: int, scale: float = 1.0) -> None:
        """Announce a step, and add the regularizers' gradient to what the backward pass left; once for each step.

        Args:
            optimizer: Which one steps.
            step: How many steps were taken.
            scale: Of the gradients that are there; 0 for a step whose loss is none.
        """
        self.step_ranks.restore()
        optimizer.announced = True
        optimizer.adopt_faces()
        if optimizer.gradients_added:
            optimizer.gradients_added = False
        else:
            if scale:
                optimizer.check_gradients()
            self.add_gradients(optimizer, step, scale)

    def add_gradients(self, optimizer: OptimizerOfFactors, step: int, scale: float = 1.0) -> None:
        """Add the regularizers' gradient; arguments as for :meth:`before_step`."""
        asked = self.regularizer
        assert asked.sparsity_weight is not None
        off = self.paused or not self.regularized
        self._note_strength(step, 0.0 if off else asked.sparsity_weight * self.policy.strength(self.clock(step)))
        # What the loss does not train in this step, because its gradient was dropped say, is not moved by us either.
        layers = [each for each in optimizer.regularized if any(p.grad is not None for p in each.form.trained)]
        if asked.centralize:
            centralize(optimizer.layers, optimizer.held())
        if layers and scale:
            self.penalties = self._trained.add_penalties(layers, asked, self.strength, scale, optimizer.held(), step)

    def _note_strength(self, step: int, strength: float) -> None:
        """Remembered now and then for the report."""
        self.strength = strength = float(strength)  # a number of numpy's in a file needs pickle
        if step % max(1, self.total_steps // 100) == 0 and (not self.strengths or self.strengths[-1][0] < step):
            self.strengths.append((step, strength))

    def begin_batch(self, optimizers: Sequence[Optimizer], step: int | None = None) -> None:
        """A batch begins, in which every step must be announced.

        Args:
            optimizers: Those that train the model by now: a schedule may have made new ones.
            step: How many steps were taken; None where :meth:`step` counts them.
        """
        self._draw(self._steps if step is None else step)
        self._trained.train_with(optimizers)
        self.recorder.stop()
        if self.evidence is not None:
            self.evidence.begin_batch()
        if self.cost is None:
            check_in_place(self.model, self.layers)
            self._record()  # after the other, since it stops ahead of it: both wrap compiled calls
        self._as_written.close()
        if self.cost is None or (self.evidence is not None and self.evidence.observes):
            self._as_written.enter_context(compiled.as_written())
        for layer in self.layers.values():
            layer.forget_loaded()
        for optimizer in self.optimizers:
            optimizer.begin_batch()

    def _draw(self, step: int) -> None:
        """Have the step after this many use ranks of the ladder, if the policy says so."""
        rung = self.policy.rung(step) if self.ladder and not self.paused else None
        self.step_ranks.drawn = None if rung is None else self.ladder[rung]

    def _climb(self, ladder: Iterable[Mapping[str, int]]) -> None:
        """Have steps use these ranks from now on."""
        self.ladder = tuple(dict(ranks) for ranks in ladder)
        if self.ladder:
            self.step_ranks.start(self.layers, self.policy.teaches)
        if self.step_ranks.distiller is not None:
            self.step_ranks.distiller.loss_scale = lambda: self.loss_scale()

    @contextmanager
    def showing_weights(self) -> Iterator[None]:
        """Have optimizers hold the weights that ``model.parameters()`` shows; what is added to them is trained too."""
        faces = [p for p in self.model.parameters() if isinstance(p, DenseWeight)]
        with ExitStack() as stack:
            for optimizer in self.optimizers:
                stack.enter_context(optimizer.showing_weights(faces))
            yield

    def before_backward(self, loss: Tensor) -> None:
        """A backward pass comes next: count it, and say so if the first batch's loss is NaN.

        Args:
            loss: Whose.
        """
        self.backwards += 1
        if self.cost is None and LOST_AT_ONCE not in self.warnings and bool(loss.detach().isnan().any()):
            self.warnings.append(LOST_AT_ONCE)  # of the first batch only: in others nothing waits for the device

    def end_batch(self) -> None:
        """A batch is over; the user's parameter groups are whole, where a step was skipped too."""
        self._as_written.close()
        self.step_ranks.restore()
        if self.evidence is not None:
            self.evidence.end_batch(self._device)
        for optimizer in self.optimizers:
            optimizer.end_batch()

    def see_metric(self, metric: Callable[[], float | None], step: int) -> Pause | None:
        """Take note of the watched metric; returns the pause that begins or ends with it.

        Args:
            metric: Gives its value, or None, in process 0, by which all others go: it may be that no other has it.
            step: How many steps were taken.
        """
        assert self.guard is not None
        guard, value = self.guard, processes.decide(metric)
        if value is None:
            return None
        pause = guard.see(step, value, self.policy.may_pause(self.clock(step)) and guard.has_fallen(value))
        self._draw(step)  # what comes next may be a step of a pause
        return pause

    def after_step(self, step: int, epoch: int = 0, due: bool | None = None) -> RankChange | None:
        """Cut ranks if it is time.

        Args:
            step: How many steps were taken.
            epoch: The current one.
            due: Whether it is; None for what the policy says.

        Returns:
            The change of ranks, if there was one.
        """
        if step:
            self._dense = {}
        self._release_refused()
        for distiller in (self.distiller, self.step_ranks.distiller if self.step_ranks.drawn else None):
            if distiller is not None:
                self.warnings += [warning for warning in distiller.check() if warning not in self.warnings]
        clock, evidence = self.clock(step), self.evidence
        if due is None:
            due = self.policy.is_due(clock)
        due = due and not self.paused and self.cost is not None and self.policy.pending is not None
        if evidence is None:
            return self.cut(step, epoch) if due else None
        if due and not self.policy.judges(clock):
            change = self.cut(step, epoch)
            evidence.drop()
        else:
            first, last = not self.last_cut, step >= self.total_steps
            enough = evidence.is_enough(due, may_cut=not self.paused, is_first=first, is_last=last)
            change = self.cut(step, epoch) if enough else None
        evidence.plan(clock)
        return change

    # ------------------------------------------------------------------------------------------------------------ a cut

    def cut(self, step: int, epoch: int) -> RankChange | None:
        """Refactorize what was trained and use the ranks that the policy says; None if no rank changes.

        Raises:
            ValueError: If a layer's factors are not finite; the message names it.
        """
        before, clock = self.ranks(), self.clock(step)
        processes.meet(self._device)
        self._trained.check_finite()
        judges, verdict, energies, slight = self.policy.judges(clock), None, dict[str, Tensor](), self._slight()
        if judges:
            verdict = self._verdict(self.evidence) if self.evidence is not None else None
            energies = verdict.values if verdict else self._trained.refactorize(may_stay=slight)
        change, self.cost = processes.decide(lambda: self._decide(clock, before, energies))
        self.policy.resume(clock)
        self.last_cut = clock
        sorts = [change.ranks, *change.ladder]
        fall = [name for name, layer in self.layers.items() if any(ranks[name] < layer.rank for ranks in sorts)]
        if verdict:
            for name, factors in verdict.cut({name: change.ranks[name] for name in fall}):
                self._trained.take(name, factors, change.may_return)
        elif judges:
            self._trained.take_waiting(fall)
        self._trained.keep(change.ranks, change.may_return)
        if change.ranks != self.full_ranks and not change.may_return:
            whole = [name for name, rank in change.ranks.items() if rank == self.layers[name].full_rank]
            self._trained.train_dense(slight & {*whole})
        self._climb(change.ladder)
        if change.final:
            self._trained.train_as_final(lambda name, rank: self._known_cost.layers[name].pays(rank))
            self.penalties = None
        self._trained.tell_of_others()
        if self.ranks() == before:
            return None
        compiled.forget()
        self.timeline.append(RankChange(step, epoch, self.ranks(), self.ratio("macs"), self.ratio("params")))
        return self.timeline[-1]

    def _decide(
        self, clock: int, before: Mapping[str, int], energies: Mapping[str, Tensor]
    ) -> tuple[Change, ModelCost]:
        """What the policy says, and the cost: what it is in time is measured once more ahead of the last cut."""
        cost, pending = self._known_cost, self.policy.pending
        on_cpu = cache(partial(_on_cpu, energies))

        def choose(relief: float = 0.0) -> dict[str, int]:
            nonlocal cost
            by_cost = partial(self._choose_ranks, on_cpu())
            if relief:
                return by_cost(cost, self._share(relief))
            if pending is not None and clock >= pending:
                ranks, cost = self._costs.corrected(cost, self.plan, by_cost)
                return ranks
            return by_cost(cost)

        return self.policy.change(clock, self.full_ranks, before, choose), cost

    def _share(self, relief: float) -> float:
        """The budget that far from the target to the whole, see :class:`~lightning_svd.training.policies.Choose`."""
        return float(self.recipe.target[1] ** (1 - relief))

    def _slight(self) -> frozenset[str]:
        """The layers that come to next to nothing of the budget; where sparsity decides how many ranks stay, none."""
        kind, share = self.recipe.target
        if kind == "energy":
            return frozenset()
        cost = self._known_cost.by(kind)
        return cheapest(cost, self.full_ranks, SLIGHT * cost.budget(share))

    @property
    def _device(self) -> torch.device:
        return next((layer.form.trained[0].device for layer in self.layers.values()), torch.device("cpu"))

    @property
    def _known_cost(self) -> ModelCost:
        assert self.cost is not None
        return self.cost

    def _verdict(self, evidence: Evidence) -> Verdict:
        """What ranks are worth by what was observed."""
        verdict = evidence.verdict(self.layers)
        if verdict.unseen:
            met = counted(len(verdict.unseen), "layer met no data", "layers met no data")
            warning = f"{met} before ranks were cut, judged by weights alone: {few(verdict.unseen)}"
            self.warnings += [warning] if warning not in self.warnings else []
        return verdict

    def _by_recipe(self, energies: dict[str, Tensor], cost: ModelCost, share: float | None = None) -> dict[str, int]:
        return self.recipe.choose_ranks(energies, cost, self.bounds, share)

    # ---------------------------------------------------------------------------------------------------------- the end

    def finish(self, arguments: Mapping[str, Any] | None = None) -> SVDReport:
        """Make the model what was asked for, ``final``, and say what happened.

        Args:
            arguments: What the run was asked for, for the report; None for the recipe's, in a loop of one's own.

        Raises:
            RuntimeError: If the run is over.
        """
        self._check_going_on()
        if arguments is None and (missed := self.why_not_reached(self._steps)) is not None:
            self.warnings.append(missed)  # a callback has said so before, ahead of what other callbacks then do
            warnings.warn(f"SVD training: {missed}", stacklevel=2)
        self.close()
        self._is_over = True
        self._release_refused()
        for layer in self.layers.values():
            layer.forget_loaded(goes_on=False)  # an average that was loaded at the end: its nearest of the ranks
        nested = self._nested() if self.ladder else ()
        cost = self.cost or count_params(self.model)
        if self.recipe.measure_latency and cost.latency is None:
            cost = self._with_latency(cost)
        self.warnings += warnings_of(self.model, self.layers)
        if gone := out_of_place(self.model, self.layers):
            are = counted(len(gone), "layer is not in the model any more", "layers are not in the model any more")
            self.warnings.append(f"{are} ({few(gone)}): what took their place, if anything, was not cut")
        report = replace(
            report_on(self.plan, self.layers, cost, self.spectra_before, all_dense=self.recipe.final == "dense"),
            **self.history(),
            nested=nested,
            arguments=dict(arguments or self.recipe.arguments),
        )
        pays = {name: cost.layers[name].pays(layer.rank) for name, layer in self.layers.items()}
        form = "pair" if self.recipe.final == "factored" else "decomposed"
        finals = {name: form if pays[name] and self.recipe.final != "dense" else "dense" for name in self.layers}
        self._trained.replace(finish(self.model, finals, self.layers))
        known = [no_faster(self.model)]
        if report.latency:
            latency = self._measured(report.latency)
            report = replace(report, latency=latency)
            if self.policy.pending is None and not self.ladder:
                known.append(latency.missed(self.recipe.target[1]))
        return replace(report, warnings=(*report.warnings, *filter(None, known)))

    def _nested(self) -> tuple[BudgetRanks, ...]:
        """The ranks of each budget of the ladder, by the model as it is now."""
        energies = self._trained.refactorize()
        self._trained.take_waiting([*self.layers])
        budgets, on_cpu, cost = len(self.ladder), _on_cpu(energies), self._known_cost
        shares = [self._share(rung / budgets) for rung in range(budgets)]
        ladder = processes.decide(lambda: [self._choose_ranks(on_cpu, cost, share) for share in shares])
        return tuple(
            BudgetRanks(share, ranks, cost.ratio(ranks, "macs"), cost.ratio(ranks, "params"))
            for share, ranks in zip(shares, ladder, strict=True)
        )

    def _measured(self, promised: LatencyReport) -> LatencyReport:
        """How long the final model takes too, where the dense one was timed in this run."""
        if self.recipe.timing is None or self.recipe.final != "factored":
            return promised
        measured, dense = processes.decide(self._costs.beside_dense) or (None, None)
        return replace(promised, measured=measured, dense_at_end=dense)

    def _with_latency(self, cost: ModelCost) -> ModelCost:
        # One decision for all processes, whose clocks differ.
        timed = processes.decide(lambda: time_layers(cost, self.layers))
        ranks = self.ranks()
        slower = [n for n, rank in ranks.items() if cost.layers[n].pays(rank) > timed.layers[n].pays(rank)]
        if slower and self.recipe.final != "dense":
            are_dense = counted(len(slower), "layer is dense", "layers are dense")
            self.warnings.append(
                f"{are_dense} because two factors are no faster here ({few(slower)}): "
                f"{timed.ratio(ranks, 'macs'):.1%} of the MACs, not {cost.ratio(ranks, 'macs'):.1%}"
            )
        return timed

    def why_not_reached(self, done: int) -> str | None:
        """Why the budget was not met after this many steps; None if it was."""
        last = self.policy.pending
        if last is None or not self.layers or self.ladder:
            return None
        kind, share = self.recipe.target
        if self.cost is not None and kind != "energy":
            cost = self.cost.by(kind)
            if cost.total(self.ranks()) <= cost.budget(share):
                return None
        missed = f"the target, {share:g} of the {kind}, was not reached"
        if not_finite := self._costs.not_finite or (self.evidence.not_finite if self.evidence else []):
            return f"ranks waited for data without NaN and infinity, met in {few(not_finite)}: {missed}"
        if self.cost is None and done:
            return f"no step used a layer that is factorized, so that no rank was cut: {missed}"
        if self.guard and self.guard.pauses:
            paused = done - self.clock(done)
            return f"pruning paused for {paused} steps because `{self.guard.monitor}` had fallen: {missed}"
        return f"the fit ended at step {done} of {self.total_steps}, before the last rank cut at step {last}: {missed}"

    def history(self) -> dict[str, Any]:
        """What happened, as fields of a report."""
        happened: dict[str, Any] = {
            "timeline": tuple(self.timeline),
            "warnings": tuple(self.warnings),
            "strengths": tuple(self.strengths),
        }
        if self.guard:
            happened |= {"metric": self.guard.monitor, "metric_values": tuple(self.guard.values)}
            happened |= {"pauses": tuple(self.guard.pauses)}
        return happened

    # ----------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on exactly: tensors, numbers, strings, lists and dicts."""
        self.step_ranks.restore()
        return {
            "layers": self._trained.exact_states(),
            "refused": {of.name: of.skipped for of in self.plan if of.skipped},
            "steps": self._steps,
            "last_cut": self.last_cut,
            "is_final": self.policy.pending is None,
            "target": list(self.recipe.target),
            "timeline": [asdict(change) for change in self.timeline],
            "strengths": list(self.strengths),
            "warnings": list(self.warnings),
            "spectra_before": self.spectra_before,
            "cost": asdict(self.cost) if self.cost else None,
            "guard": self.guard.state_dict() if self.guard else None,
            "teacher": self.distiller.state_dict() if self.distiller else None,
            "observed": self.evidence.state_dict() if self.evidence else None,
            "ladder": [dict(ranks) for ranks in self.ladder],
        }

    def _check_target(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with a budget of another kind, or with another one after the last cut."""
        (kind, share), (saved_kind, saved) = self.recipe.target, state["target"]
        if kind != saved_kind or (state["is_final"] and share != saved):
            name_of = {kind: name for name, kind in TARGETS.items()}
            cut = ", and its ranks are cut" if state["is_final"] else ""
            raise ValueError(
                f"the checkpoint was written with `{name_of[saved_kind]}={saved!r}`{cut}: resume with that, got "
                f"`{name_of[kind]}={share!r}`"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned, at the beginning of a run or in the middle of one.

        Raises:
            ValueError: If other layers are factorized, or the same in another mode.
        """
        if self.distiller is not None:
            self.distiller.load_state_dict(state.get("teacher"))
        skipped = {name: reason for name, reason in state["refused"].items() if name in self.layers}
        saved = state["layers"]
        here = {(name, layer.conv_mode) for name, layer in self.layers.items() if name not in skipped}
        there = {(name, entry["conv_mode"]) for name, entry in saved.items()}
        if here != there:
            differ = sorted({name for name, _ in here ^ there})
            raise ValueError(
                f"the checkpoint was written with other factorized layers, see {few(map(repr, differ))}: "
                "resume with the `target_modules`, `exclude_modules` and `conv_mode` that it was written with"
            )
        self._check_target(state)
        self._trained.load_exact_states(saved)
        self._steps, self.last_cut = state["steps"], state["last_cut"]
        self.policy.resume(self.total_steps + 1 if state["is_final"] else self.last_cut)
        self.timeline = [RankChange(**change) for change in state["timeline"]]
        self.strengths = [(step, strength) for step, strength in state["strengths"]]
        self.warnings = list(state["warnings"])
        self.spectra_before = state["spectra_before"]
        observed = state["observed"]
        if (observed is None) != (self.evidence is None):
            needs = "needs data, asked for one that does not", "needs no data, asked for one that does"
            raise ValueError(f"the checkpoint was written with an `importance` that {needs[observed is None]}")
        if self.evidence is not None and observed is not None:
            self.evidence.load_state_dict(observed)
        if self.guard and state["guard"]:
            self.guard.load_state_dict(state["guard"])
        if state["cost"]:
            self.cost = ModelCost.from_dict(state["cost"])
            self._share_weights()
        self._refused = skipped
        self._release_refused()
        if self.evidence is not None:
            self.evidence.begin_batch()
        self._climb(_ladder_of(self.full_ranks, state.get("ladder", ())))
        self._draw(self._steps)


def _as_list(optimizers: Any) -> list[Optimizer]:
    given = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    if not all(isinstance(getattr(each, "param_groups", None), list) for each in given):
        raise ValueError(f"`optimizers` must be an optimizer of torch, or a list of them, got {shown(optimizers)}")
    return given


def _trained_by(optimizers: Sequence[Optimizer], model: nn.Module, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plan with layers left alone whose weight no optimizer trains, unless it is frozen and meant all the same.

    Raises:
        ValueError: If two optimizers train the weight of a layer, whose regularizers' gradient would be added twice.
    """
    held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    weights = weights_of(model)
    for of in plans:
        if not of.skipped and held[id(weights[of.name])] > 1:
            raise ValueError(
                f"`{of.name}.weight` must be in one optimizer, found it in {held[id(weights[of.name])]}: leave the "
                f"layer out, `exclude_modules=['{of.name}']`"
            )
    return [
        replace(of, skipped="no optimizer trains its weight", matrix_shape=None, conv_mode=None)
        if not of.skipped and weights[of.name].requires_grad and id(weights[of.name]) not in held
        else of
        for of in plans
    ]


def _ladder_of(full: Mapping[str, int], saved: Sequence[Mapping[str, int]]) -> Sequence[Mapping[str, int]]:
    """Saved ranks of single steps.

    Raises:
        ValueError: If they are not of these layers.
    """
    for ranks in saved:
        if ranks.keys() != full.keys() or any(rank > full[name] for name, rank in ranks.items()):
            raise ValueError("the checkpoint's `ladder` is not of the layers that are factorized here")
    return saved


def _on_cpu(energies: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In one transfer: each would wait for the device."""
    if not energies:
        return {}
    parts = torch.split(torch.cat([*energies.values()]).cpu(), [len(values) for values in energies.values()])
    found = dict(zip(energies, parts, strict=True))
    for name, values in found.items():
        if not torch.isfinite(values).all():
            raise ValueError(f"`{name}`: what its ranks carry is not finite: its singular values are too large")
    return found
