"""A trained model made smaller without training."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_choice, check_count, check_flag
from lightning_svd.compression.batch_norm import Values, put, recalibrated
from lightning_svd.compression.calibration import NoGradientError, Track, collect
from lightning_svd.compression.data import CalibrationData, CallError, Loss
from lightning_svd.compression.progress import tracking
from lightning_svd.compression.report import CompressionReport
from lightning_svd.layers.forms import SVDForm
from lightning_svd.layers.layer import SVDLayer, watching
from lightning_svd.layers.matrices import wide
from lightning_svd.layers.pairs import bias_of
from lightning_svd.model.calls import CallRecorder, cut
from lightning_svd.model.checks import FEW, whole_layers
from lightning_svd.model.counting import count_calls
from lightning_svd.model.surgery import begin, check_dense, finish, trained_weights, undo
from lightning_svd.ranks.allocation import keep_by_budget, keep_by_energy
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.ranks.statistics import Statistics, in_metric_of_data
from lightning_svd.report.data import report_on
from lightning_svd.training.recipe import Recipe

ModuleT = TypeVar("ModuleT", bound=nn.Module)

IMPORTANCES = ("auto", "spectrum", "outputs", "fisher")
# Shares of the cost at which a report says what the same calibration would give.
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)


def compress(
    model: ModuleT,
    batches: Iterable[Any],
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    loss: Loss | None = None,
    importance: str = "auto",
    inputs: int = 256,
    correct_bias: bool | None = None,
    recalibrate: bool = True,
    curve: bool = False,
    inplace: bool = False,
    progress: bool = True,
    seed: int = 0,
    **layers: Any,
) -> tuple[ModuleT, CompressionReport]:
    """Make a trained model smaller without training: cut its layers by what its data uses.

    A few batches run through the model. Of each layer, the ranks that are kept are those that its outputs need and
    that a loss feels, and layers share the budget by what the loss feels; several ways to decide are tried, and judged
    by how far outputs move on batches held out. The result is made of plain torch layers::

        small, report = compress(model, batches, target_macs=0.5)

    Args:
        model: Trained, in plain PyTorch, on its device.
        batches: Inputs as the model is called with: a tensor, a tuple of arguments or a dict of arguments by keyword
            each. With ``loss``, whatever that takes.
        target_macs: Share of the multiply-accumulates to keep, in (0, 1]; 0.5 if no budget is given.
        target_params: Share of the parameters to keep instead.
        loss: ``loss(model, batch)``, a scalar; without one the model's own outputs say what matters.
        importance: "fisher" (what the loss feels), "outputs" (what outputs need; no backward pass), "spectrum" (the
            weights alone), or "auto", which tries all.
        inputs: How many inputs to take from ``batches``; the last quarter of the batches is held out.
        correct_bias: Whether biases make up for the mean of what is dropped; None for whether it helps.
        recalibrate: Whether running statistics of batch normalization are taken anew, if that helps.
        curve: Whether the report says how far outputs would move at other budgets.
        inplace: Change ``model`` itself, which saves the memory of a copy.
        progress: Show a progress bar.
        seed: Of what is drawn.
        layers: Which layers, as for :class:`~lightning_svd.training.recipe.Recipe`: ``target_modules``,
            ``exclude_modules``, ``conv_mode``, ``rank_pattern``, ``min_rank``, ``round_to``.

    Returns:
        The small model, in evaluation if ``model`` was, and the report.

    Raises:
        ValueError: If an argument is out of range, a batch does not fit, a layer meets NaN, or the budget cannot be
            met; ``model`` is then as it was.
    """
    check_choice("importance", importance, IMPORTANCES)
    check_count("inputs", inputs)
    flags = {"recalibrate": recalibrate, "curve": curve, "inplace": inplace, "progress": progress}
    for name, flag in flags.items() if correct_bias is None else (flags | {"correct_bias": correct_bias}).items():
        check_flag(name, flag)
    recipe = Recipe(target_macs=target_macs, target_params=target_params, **layers)
    with torch.inference_mode(False), tracking(progress) as track:
        small = model if inplace else copy.deepcopy(model)
        run = _Compression(small, CalibrationData(small, batches, inputs, loss), recipe, track, seed)
        try:
            run.choose(("spectrum", "outputs", "fisher") if importance == "auto" else (importance,))
            distances = run.curve() if curve else {}
            run.cut(correct_bias, recalibrate)
            return small, run.finish(distances)
        except BaseException:
            run.undo()
            raise


class _Candidate(NamedTuple):
    """A way to decide: factors in a metric, and what their ranks carry.

    Attributes:
        label: How it is called in a report.
        metric: "spectrum", "outputs" or "fisher".
        values: What each rank of each layer carries.
        adds_up: As of :func:`~lightning_svd.ranks.allocation.keep_by_budget`.
    """

    label: str
    metric: str
    values: dict[str, Tensor]
    adds_up: bool


class _Compression:
    """A compression on its way: the model with its layers as U, s and V, ranks a prefix that moves back and forth."""

    def __init__(self, model: nn.Module, data: CalibrationData, recipe: Recipe, track: Track, seed: int) -> None:
        self.model, self.data, self.recipe, self.track, self.seed = model, data, recipe, track, seed
        self.started = time.monotonic()
        self.plan = recipe.plan(model, include_frozen=True)
        self.before = data.outputs(data.held_out)  # ahead of any change: a batch that does not fit fails here
        self.biases: dict[str, Tensor] = {}
        self.norms: Values = ()
        self.gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        self.layers = begin(model, self.plan)
        self.weights = trained_weights(self.layers)
        self.bounds = recipe.bounds(self.plan)
        self.tried: dict[str, float] = {}
        self.choice, self.values = "", dict[str, Tensor]()
        try:
            check_dense(model, self.weights)
            self.cost = self._learn_costs()
            for layer in self.track(self.layers.values(), "decomposing"):
                layer.to_svd()
            self.spectra = {name: layer.spectrum() for name, layer in self.layers.items()}
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Give the model back as it was."""
        for name, bias in self.biases.items():
            _set(self._bias(name), bias)
        put(self.norms)
        undo(self.model, self.weights)
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def _learn_costs(self) -> ModelCost:
        recorder, watched = CallRecorder(self.model, self.layers), set[str]()

        def watch(layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
            watched.add(layer.layer_name)
            return out

        recorder.start()
        try:
            with watching(self.layers.values(), watch):
                self.data.outputs(self.data.batches[:1])
        finally:
            recorder.stop()
        calls, inputs = cut(self.model, recorder.calls, FEW)
        cost = count_calls(self.model, self.layers, calls, inputs)
        refused = whole_layers(self.model, calls, self.layers)
        for name in self.layers.keys() - watched:
            seen = name in recorder.seen
            refused[name] = "it is called with more than its input" if seen else "the calibration data never reaches it"
        return self._leave(refused, cost)

    def _leave(self, reasons: Mapping[str, str], cost: ModelCost) -> ModelCost:
        """Leave layers alone, as they were."""
        finish(self.model, dict.fromkeys(reasons, "dense"))
        self.plan = [replace(of, skipped=reasons.get(of.name, of.skipped)) for of in self.plan]
        self.layers = {name: layer for name, layer in self.layers.items() if name not in reasons}
        if not self.layers:
            raise ValueError(f"no layer is left to factorize: {next(iter(reasons.values()))}")
        cost = cost.without(reasons)
        self.recipe.check_reachable(cost, self.full_ranks, self.bounds)
        return cost

    @property
    def full_ranks(self) -> dict[str, int]:
        return {name: layer.full_rank for name, layer in self.layers.items()}

    # ------------------------------------------------------------------------------------------------------- decide

    def choose(self, importances: Sequence[str]) -> None:
        """Find the ranks, and the factors, that move held-out outputs least."""
        found: list[_Candidate] = []
        seen: dict[str, Statistics] = {}

        def judge(label: str, metric: str, values: dict[str, Tensor], adds_up: bool) -> None:
            found.append(_Candidate(label, metric, values, adds_up))
            with self._having(self._ranks(values, adds_up)):
                self.tried[label] = self.distance()

        if "spectrum" in importances:
            judge("spectrum", "spectrum", {n: layer.energies() for n, layer in self.layers.items()}, False)
        if importances != ("spectrum",):
            seen = self._collect("fisher" in importances, "outputs" in importances)
        felt = all(each.gradients is not None for each in seen.values())
        for metric in ("outputs", "fisher"):
            if metric not in importances or (metric == "fisher" and not felt):
                continue
            judge(metric, metric, self._move(seen, metric == "fisher"), metric == "fisher")
            if felt:
                judge(f"{metric}, ranks by what the loss feels", metric, self._felt(), True)
        self.seen = seen
        self.choice, metric, self.values, self.adds_up = min(found, key=lambda each: self.tried[each.label])
        if math.isnan(self.tried[self.choice]):
            raise ValueError("the model's outputs for the held-out ones of `batches` are NaN or infinite")
        if metric == "spectrum":
            for layer in self.layers.values():
                layer.to_svd()
            self.seen = {}
        elif metric != found[-1].metric:
            self._move(seen, metric == "fisher")

    def _collect(self, with_gradients: bool, may_fail: bool) -> dict[str, Statistics]:
        try:
            return collect(self.data, self.layers, with_gradients, self.track, self.seed)
        except (NoGradientError, CallError):  # a model may be one for evaluation without gradients only
            if not (with_gradients and may_fail):
                raise
            return collect(self.data, self.layers, False, self.track)

    def _felt(self) -> dict[str, Tensor]:
        """What the loss feels of each rank, of the layers as they stand."""
        seen = collect(self.data, self.layers, True, self.track, self.seed + 1, with_moments=False)
        return {name: each.felt() for name, each in seen.items()}

    def _move(self, seen: Mapping[str, Statistics], of_loss: bool) -> dict[str, Tensor]:
        """Give every layer the factors of a metric; returns what their ranks carry in it."""
        carried = {}
        for name, layer in self.track(self.layers.items(), "ordering ranks"):
            left, right = layer.form.left_right()
            basis = in_metric_of_data(left, right, seen[name], of_loss)
            seen[name].move(basis)
            layer.to_svd(basis.factors)
            carried[name] = basis.carried
        return carried

    def _ranks(self, values: Mapping[str, Tensor], adds_up: bool, share: float | None = None) -> dict[str, int]:
        kind, target = self.recipe.target
        values = {name: each.cpu() for name, each in values.items()}
        if kind == "energy":
            ranks = keep_by_energy(values, self.cost.by("params"), target, **self.bounds)
        else:
            budget = (target if share is None else share) * self.cost.dense(kind)
            ranks = keep_by_budget(values, self.cost.by(kind), budget, adds_up=adds_up, **self.bounds)
        # A layer that stays dense has all its ranks, whatever bound there is for them.
        full = self.full_ranks
        return {name: rank if self.cost.layers[name].pays(rank) else full[name] for name, rank in ranks.items()}

    @contextmanager
    def _having(self, ranks: Mapping[str, int]) -> Iterator[None]:
        """Have layers use so many of their ranks inside, as they stand."""
        before = {name: layer.rank for name, layer in self.layers.items()}
        self._use(ranks)
        try:
            yield
        finally:
            self._use(before)

    def _use(self, ranks: Mapping[str, int]) -> None:
        for name, rank in ranks.items():
            self.layers[name].form.rank = rank

    def distance(self) -> float:
        """How far held-out outputs are from what they were."""
        return self.data.distance(self.before, self.data.outputs(self.data.held_out))

    def curve(self) -> dict[float, float]:
        """The distance at other shares of the cost, as far as they can be met."""
        distances = {}
        for share in CURVE:
            try:
                ranks = self._ranks(self.values, self.adds_up, share)
            except ValueError:
                break
            with self._having(ranks):
                distances[share] = self.distance()
        return distances

    # ---------------------------------------------------------------------------------------------------------- act

    def cut(self, correct_bias: bool | None, recalibrate: bool) -> None:
        """Use the ranks that were chosen, and make up for what is dropped."""
        self.ranks = self._ranks(self.values, self.adds_up)
        self.shifts = self._shifts()
        if correct_bias and not self.seen:  # ranks by the weights alone
            self.seen = self._collect(False, False)
        self._use(self.ranks)
        self.corrected = False
        if correct_bias is not False and self.seen:
            before = self.distance()
            self._correct_biases()
            self.corrected = bool(self.biases)
            if correct_bias is None and self.distance() >= before:
                self._restore_biases()
                self.corrected = False
        if recalibrate:
            self.norms = recalibrated(self.model, self.data, self.distance)

    def _shifts(self) -> dict[str, float]:
        """Of each layer, how far its output moves for what it is given in the dense model, as a share of its size."""
        moved = dict.fromkeys(self.layers, 0.0)
        sizes = dict.fromkeys(self.layers, 0.0)

        def watch(layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
            name = layer.layer_name
            with self._having({name: self.ranks[name]}):
                cut_out = layer.computed(x, bias)
            moved[name] += float(wide(cut_out - out).square().sum())
            sizes[name] += float(wide(out).square().sum())
            return out

        with watching(self.layers.values(), watch):
            self.data.outputs(self.data.held_out)
        return {name: moved[name] / sizes[name] if sizes[name] else 0.0 for name in self.layers}

    def _bias(self, name: str) -> Tensor | None:
        layer: Any = self.layers[name]
        return layer._part_of.bias_of(name.rpartition(".")[2]) if layer._part_of else bias_of(layer)

    def _correct_biases(self) -> None:
        for name, layer in self.layers.items():
            bias, seen = self._bias(name), self.seen[name]
            if bias is None or not layer.view.output_is_product or self.ranks[name] == layer.form.room:
                continue
            form = layer.form
            assert isinstance(form, SVDForm)
            U, s, _ = (wide(factor.detach()) for factor in form.stored())
            left = U * s.unsqueeze(-2) if layer.view.groups > 1 else (U * s).unsqueeze(0)
            mean = seen.total / seen.positions
            mean[..., : self.ranks[name]] = 0
            self.biases[name] = bias.detach().clone()
            _set(bias, bias.detach() + (left @ mean.unsqueeze(-1)).flatten().to(bias))

    def _restore_biases(self) -> None:
        for name, before in self.biases.items():
            _set(self._bias(name), before)
        self.biases = {}

    def finish(self, curve: Mapping[float, float]) -> CompressionReport:
        """Make the layers plain ones; returns the report."""
        distance = self.distance()
        for layer in self.layers.values():
            layer.to_svd(layer.form.exact(layer.layer_name))  # of its rank, orthonormal again
        ranks = report_on(self.plan, self.layers, self.cost, self.spectra)
        pays = {name: self.cost.layers[name].pays(layer.rank) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            if not pays[name]:
                layer.to_dense(self.weights[name])  # the very values
        finish(self.model, {name: "pair" if pays[name] else "dense" for name in self.layers})
        left = {id(parameter) for parameter in self.model.parameters()}
        for parameter, gradient in self.gradients:
            if id(parameter) in left:
                parameter.grad = gradient
        kind, target = self.recipe.target
        return CompressionReport(
            ranks=ranks,
            target=kind,
            share=target,
            choice=self.choice,
            tried=self.tried,
            distance=distance,
            measure=self.data.measure,
            shifts=self.shifts,
            carried={name: values.tolist() for name, values in self.values.items()},
            curve=dict(curve),
            bias_corrected=self.corrected,
            batch_norm_recalibrated=bool(self.norms),
            inputs=self.data.inputs,
            seconds=time.monotonic() - self.started,
        )


def _set(parameter: Tensor | None, values: Tensor) -> None:
    assert parameter is not None
    parameter.detach().copy_(values)
