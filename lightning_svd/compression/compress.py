"""A trained model made smaller without training."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_svd.arguments import check_choice, check_count, check_flag, check_module, shown
from lightning_svd.compression.batch_norm import Values, put, recalibrated
from lightning_svd.compression.calibration import NoGradientError, Track, collect, collect_felt
from lightning_svd.compression.data import CalibrationData, CallError, Loss
from lightning_svd.compression.progress import tracking
from lightning_svd.compression.reconstruction import reconstruct as reconstruct_layers
from lightning_svd.compression.report import CompressionReport
from lightning_svd.layers.compounds import no_faster
from lightning_svd.layers.layer import SVDLayer, watching
from lightning_svd.layers.matrices import Factors, wide
from lightning_svd.layers.pairs import bias_of
from lightning_svd.model.calls import CallRecorder
from lightning_svd.model.checks import ENTRIES, FEW, whole_layers
from lightning_svd.model.counting import count_calls
from lightning_svd.model.plan import with_reasons
from lightning_svd.model.replay import cut
from lightning_svd.model.surgery import begin, check_dense, copied, finish, trained_weights, undo
from lightning_svd.model.timing import corrected
from lightning_svd.ranks.allocation import keep_by_budget, keep_by_energy
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.ranks.statistics import Basis, bases_of, sides, spectral_basis
from lightning_svd.report.data import report_on
from lightning_svd.training.recipe import Recipe, recipe_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_OF_TRAINING = {"schedule", "full_rank_as", "regularizer", "measure_latency", "final", "distill"}
IMPORTANCES = ("auto", "spectrum", "outputs", "fisher")
# Shares of the cost at which a report says what the same calibration would give.
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
# Moments and whole bases, up to so many matrices of r x r for each layer, are held of as many layers at once as fit
# into this share of the weights' bytes, or the bytes of the layers' outputs for a batch, which a pass may hold anyway,
# or what is little: more passes cost time.
BASES, AT_ONCE, LITTLE = 4, 0.5, 1 << 26


def compress(
    model: ModuleT,
    batches: Iterable[Any],
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    target_latency: float | None = None,
    loss: Loss | None = None,
    importance: str = "auto",
    inputs: int = 256,
    correct_bias: bool | None = None,
    recalibrate: bool = True,
    reconstruct: int = 0,
    curve: bool = False,
    inplace: bool = False,
    progress: bool = True,
    seed: int = 0,
    **layers: Any,
) -> tuple[ModuleT, CompressionReport]:
    """Make a trained model smaller without training: cut its layers by what its data uses.

    A few batches run through the model. Of each layer, the ranks that are kept are those that its outputs need and
    that a loss feels, and layers share the budget by what the loss feels. Several ways to decide are tried, and judged
    on batches held out, with statistics of batch normalization that suit each: by how far outputs move, or with
    ``loss`` by how far it rises, which is what to give for a model whose small ones were trained too. Statistics are
    collected of as many layers at a time as there is memory for, half of what the weights take up or what layers put
    out for a batch. The result is made of plain torch layers::

        small, report = compress(model, batches, target_macs=0.5)

    Args:
        model: Trained, in plain PyTorch, on its device.
        batches: Inputs as the model is called with: a tensor, a tuple of arguments or a dict of arguments by keyword
            each. With ``loss``, whatever that takes.
        target_macs: Share of the multiply-accumulates to keep, in (0, 1]; 0.5 if no budget is given.
        target_params: Share of the parameters to keep instead.
        target_latency: Share of the time to keep instead, by a table that ``latency_table`` names, from
            :func:`~lightning_svd.profile`, or that is measured first, for a batch of ``batches``.
        loss: ``loss(model, batch)``, a scalar; without one the model's own outputs say what matters.
        importance: "fisher" (what the loss feels), "outputs" (what outputs need; no backward pass), "spectrum" (the
            weights alone), or "auto", which tries all.
        inputs: How many inputs to take from ``batches``; the last quarter of the batches is held out.
        correct_bias: Whether biases make up for the mean of what is dropped; None for whether it helps.
        recalibrate: Whether running statistics of batch normalization are taken anew, if that helps.
        reconstruct: For how many steps the low-rank layers are trained on the same inputs, without labels, so that the
            model puts out again what it did; the best of what comes out on inputs held out is kept. A step costs a
            forward and a backward pass of a batch.
        curve: Whether the report says how far outputs would move at other budgets.
        inplace: Change ``model`` itself. A copy costs little more memory: what is to be factorized is not copied.
        progress: Show a progress bar.
        seed: Of what is drawn.
        layers: Which layers, as for :class:`~lightning_svd.training.recipe.Recipe`: ``target_modules``,
            ``exclude_modules``, ``conv_mode``, ``rank_pattern``, ``min_rank``, ``round_to``, ``latency_table``.

    Returns:
        The small model, in evaluation if ``model`` was, and the report.

    Raises:
        ValueError: If an argument is out of range, a batch does not fit, a layer meets NaN, or the budget cannot be
            met; ``model`` is then as it was.
    """
    check_choice("importance", importance, IMPORTANCES)
    check_count("inputs", inputs)
    check_count("reconstruct", reconstruct, least=0)
    flags = {"recalibrate": recalibrate, "curve": curve, "inplace": inplace, "progress": progress}
    for name, flag in flags.items() if correct_bias is None else (flags | {"correct_bias": correct_bias}).items():
        check_flag(name, flag)
    check_module("model", model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"`model` has a layer without weights yet, `{name}`: call it once with a batch")
    if not isinstance(batches, Iterable) or isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(f"`batches` must be an iterable of inputs, such as a list of batches, got {shown(batches)}")
    if loss is not None and not callable(loss):
        raise TypeError(f"`loss` must be a function of a model and a batch, got {shown(loss)}")
    check_count("seed", seed, least=0)
    for name in layers.keys() & _OF_TRAINING:
        raise TypeError(f"`{name}` is of training, which `compress` does without")
    targets = {"target_macs": target_macs, "target_params": target_params, "target_latency": target_latency}
    recipe = recipe_of(compress, targets | layers)
    with torch.inference_mode(False), tracking(progress) as track:
        small, shared = (model, set[int]()) if inplace else _twin(model, recipe)
        run = _Compression(small, CalibrationData(small, batches, inputs, loss), recipe, track, seed, recalibrate)
        try:
            originals = run.data.outputs(run.data.batches) if reconstruct and loss is None else []
            run.choose(("spectrum", "outputs", "fisher") if importance == "auto" else (importance,), curve)
            distances = run.curve() if curve else {}
            run.cut(correct_bias)
            if reconstruct:
                run.reconstruct(reconstruct, originals)
            report = run.finish(distances)
            _separate(small, shared)
            return small, report
        except BaseException:
            run.undo()
            raise


class _Candidate(NamedTuple):
    """A way to decide: bases in a metric, and what their ranks carry.

    Attributes:
        label: How it is called in a report.
        metric: "spectrum", "outputs" or "fisher".
        values: What each rank of each layer carries.
        adds_up: As of :func:`~lightning_svd.keep_by_budget`.
    """

    label: str
    metric: str
    values: dict[str, Tensor]
    adds_up: bool


class _Compression:
    """A compression on its way: layers compute with their dense weight, or with factors of ranks that are tried."""

    def __init__(
        self, model: nn.Module, data: CalibrationData, recipe: Recipe, track: Track, seed: int, recalibrate: bool
    ) -> None:
        self.model, self.data, self.recipe, self.track, self.seed = model, data, recipe, track, seed
        self.recalibrate = recalibrate
        self.started = time.monotonic()
        self.plan = recipe.plan(model, include_frozen=True)
        self.before = data.outputs(data.held_out)  # ahead of any change: a batch that does not fit fails here
        self.biases: dict[str, Tensor] = {}
        self.norms: Values = ()
        self.gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        self.layers = begin(model, self.plan)
        self.weights = trained_weights(self.layers)
        self.bounds = recipe.bounds(self.plan, model)
        self.tried: dict[str, float] = {}
        self.spectra: dict[str, list[float]] = {}
        self.reconstructed = False
        self.means: dict[str, Tensor] = {}  # of each layer's features
        self.bases: dict[str, Basis] = {}  # of the choice
        self.choice, self.values, self.adds_up, self.ranks = "", dict[str, Tensor](), False, dict[str, int]()
        try:
            check_dense(model, self.weights)
            self.cost, self.activations = self._learn_costs()
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

    def _learn_costs(self) -> tuple[ModelCost, int]:
        """What the model costs, and how many bytes its layers put out for a batch."""
        recorder, watched = CallRecorder(self.model, self.layers), Counter[str]()

        def watch(layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
            watched[layer.svd_name] += out.numel() * out.element_size()
            return out

        recorder.start()
        try:
            with watching(self.layers.values(), watch):
                self.data.outputs(self.data.batches[:1])
        finally:
            recorder.stop()
        whole = recorder.calls
        calls, inputs = cut(self.model, whole, FEW)
        cost = count_calls(self.model, self.layers, calls, inputs)
        entries = max(int(AT_ONCE * sum(weight.numel() for weight in self.weights.values())), LITTLE // 4)
        refused = whole_layers(self.model, calls, self.layers, entries=min(ENTRIES, entries))
        for name in self.layers.keys() - watched.keys():
            seen = name in recorder.seen
            refused[name] = "it is called with more than its input" if seen else "the calibration data never reaches it"
        cost = self.recipe.timed(cost, self.model, self.layers, self.plan, whole)
        self.calls = list(whole) if self.recipe.timing else []
        return self._leave(refused, cost), watched.total()

    def _leave(self, reasons: Mapping[str, str], cost: ModelCost) -> ModelCost:
        """Leave layers alone, as they were."""
        finish(self.model, dict.fromkeys(reasons, "dense"))
        self.plan = with_reasons(self.plan, reasons)
        self.layers = {name: layer for name, layer in self.layers.items() if name not in reasons}
        if not self.layers:
            raise ValueError(f"no layer is left to factorize: {next(iter(reasons.values()))}")
        cost = cost.without(reasons)
        self.recipe.check_reachable(cost, self.full_ranks, self.bounds, self.plan)
        return cost

    @property
    def full_ranks(self) -> dict[str, int]:
        return {name: layer.full_rank for name, layer in self.layers.items()}

    # ------------------------------------------------------------------------------------------------------- decide

    def choose(self, importances: Sequence[str], other_budgets: bool = False) -> None:
        """Find the ranks, and the factors, that move held-out outputs least.

        Args:
            importances: What to try.
            other_budgets: Whether all ranks that pay are to be there afterwards, and not only those that are chosen.
        """
        found: list[_Candidate] = []
        chosen: dict[str, dict[str, int]] = {}
        bases: dict[str, dict[str, Basis]] = {}

        def judge(candidates: Sequence[_Candidate]) -> None:
            ranks = [self._ranks(candidate.values, candidate.adds_up) for candidate in candidates]
            if not other_budgets and not self.recipe.timing:  # which may yet want other ranks
                for candidate in candidates:
                    self._forget(
                        bases[candidate.metric],
                        [
                            mine
                            for mine, other in zip(ranks, candidates, strict=True)
                            if other.metric == candidate.metric
                        ],
                    )
            for mine, candidate in zip(ranks, candidates, strict=True):
                self.tried[candidate.label] = self._distance_with(mine, bases[candidate.metric])
                found.append(candidate)
                chosen[candidate.label] = mine

        of_weights = self._decompose("spectrum" in importances)
        metrics = [metric for metric in ("outputs", "fisher") if metric in importances]
        if self.recipe.timing and metrics:  # several ways are judged, at about the ranks that will be
            energies = {name: torch.tensor(spectrum).square() for name, spectrum in self.spectra.items()}
            _, self.cost = self._of_measured_time(energies, False)
        if "spectrum" in importances:
            bases["spectrum"] = of_weights
            judge([_Candidate("spectrum", "spectrum", _carried(of_weights), False)])
        if metrics:
            of_data, felt = self._calibrate(metrics, "outputs" in importances)
            bases |= of_data
            candidates = []
            for metric, mine in of_data.items():
                candidates.append(_Candidate(metric, metric, _carried(mine), metric == "fisher"))
                if felt:
                    label = f"{metric}, ranks by what the loss feels"
                    candidates.append(_Candidate(label, metric, felt[metric], True))
            del mine, of_data
            judge(candidates)
        best = min(found, key=lambda each: self.tried[each.label])
        if math.isnan(self.tried[best.label]):
            raise ValueError("the model's outputs for the held-out ones of `batches` are NaN or infinite")
        self.choice, self.values, self.adds_up = best.label, best.values, best.adds_up
        self.ranks, self.bases = chosen[best.label], bases[best.metric]
        if best.metric == "spectrum":
            self.means = {}
        bases.clear()  # of the ways that were not chosen
        if self.recipe.timing:
            self.ranks, self.cost = self._of_measured_time(best.values, best.adds_up)

    def _of_measured_time(self, values: Mapping[str, Tensor], adds_up: bool) -> tuple[dict[str, int], ModelCost]:
        """Ranks by what they carry, of which the whole was measured, and the cost that says how long it takes."""
        timing = self.recipe.timing
        assert timing is not None

        def choose(cost: ModelCost) -> dict[str, int]:
            return self._ranks(values, adds_up, cost=cost)

        return corrected(self.model, self.plan, self.calls, timing, self.cost, self.recipe.target[1], choose)

    def _forget(self, bases: dict[str, Basis], used: Sequence[Mapping[str, int]]) -> None:
        """Let go of what is not used with any of these ranks; a dense layer uses none."""
        for name, layer in self.layers.items():
            ranks = [ranks[name] for ranks in used]
            bases[name] = bases[name].cut(max((rank for rank in ranks if rank < layer.full_rank), default=0))

    def _decompose(self, with_bases: bool) -> dict[str, Basis]:
        """The layers' spectra, and bases in which a rank is one of their singular values."""
        bases = {}
        for name, layer in self.track(self.layers.items(), "decomposing"):
            left, right = sides(layer, self.weights[name])
            if with_bases:
                bases[name] = spectral_basis(left, right, name).cut(self._most(name))
                values = bases[name].carried.sqrt()
            else:
                values = layer.singular_values()
            self.spectra[name] = values.tolist()
        return bases

    def _most(self, name: str) -> int:
        """The most ranks that a layer is ever given factors of."""
        full = self.layers[name].full_rank
        return min(self.cost.layers[name].break_even, int(self.bounds["max_ranks"].get(name, full)))

    def _calibrate(
        self, metrics: Sequence[str], may_fail: bool
    ) -> tuple[dict[str, dict[str, Basis]], dict[str, dict[str, Tensor]]]:
        """Of each metric the layers' bases, cut to what may be kept, and what the loss feels of all of their ranks."""
        bases: dict[str, dict[str, Basis]] = {metric: {} for metric in metrics}
        felt: dict[str, dict[str, Tensor]] = {metric: {} for metric in metrics}
        with_gradients = "fisher" in metrics
        for layers in self._groups():
            seen = None
            if with_gradients:
                try:
                    seen = collect(self.data, self.layers, True, self.track, self.seed, only=layers)
                except (NoGradientError, CallError):  # a model may be one for evaluation without gradients only
                    if not may_fail:
                        raise
                    with_gradients, metrics = False, ["outputs"]
            if seen is None:
                seen = collect(self.data, self.layers, False, self.track, only=layers)
            whole: dict[str, list[Basis]] = {}
            for name, layer in self.track(layers.items(), "ordering ranks"):
                statistics = seen.pop(name)  # and with them the moments, which are as large as a weight
                self.means[name] = statistics.total / statistics.positions
                left, right = sides(layer, self.weights[name])
                whole[name] = bases_of(left, right, statistics, [metric == "fisher" for metric in metrics])
                del statistics
            if with_gradients:
                for name, values in collect_felt(self.data, self.layers, whole, self.track, self.seed + 1).items():
                    for metric, value in zip(metrics, values, strict=True):
                        felt[metric][name] = value
            for name in layers:
                for metric, basis in zip(metrics, whole.pop(name), strict=True):
                    bases[metric][name] = basis.cut(self._most(name))
        return {metric: bases[metric] for metric in metrics}, felt if with_gradients else {}

    def _groups(self) -> Iterator[dict[str, SVDLayer]]:
        """Layers whose moments are collected in the same passes, by how much memory there may be for them."""
        sizes = {name: weight.numel() * weight.element_size() for name, weight in self.weights.items()}
        bound = max(AT_ONCE * sum(sizes[name] for name in self.layers), self.activations, LITTLE)
        group: dict[str, SVDLayer] = {}
        held = 0
        for name, layer in self.layers.items():
            mine = BASES * 4 * layer.view.groups * layer.full_rank**2
            if group and held + mine > bound:
                yield group
                group, held = {}, 0
            group[name], held = layer, held + mine
        yield group

    def _ranks(
        self, values: Mapping[str, Tensor], adds_up: bool, share: float | None = None, cost: ModelCost | None = None
    ) -> dict[str, int]:
        kind, target = self.recipe.target
        cost = cost or self.cost
        values = {name: each.cpu() for name, each in values.items()}
        if kind == "energy":
            ranks = keep_by_energy(values, cost.by("params"), target, **self.bounds)
        else:
            priced = cost.by(kind)
            budget = priced.budget(target if share is None else share)
            ranks = keep_by_budget(values, priced, budget, adds_up=adds_up, **self.bounds)
        # A layer that stays dense has all its ranks, whatever bound there is for them.
        full = self.full_ranks
        return {name: rank if cost.layers[name].pays(rank) else full[name] for name, rank in ranks.items()}

    @contextmanager
    def _having(self, ranks: Mapping[str, int], bases: Mapping[str, Basis]) -> Iterator[None]:
        """Have layers compute with so many ranks of bases inside, and dense again afterwards."""
        self._use(self._factors(ranks, bases))
        try:
            yield
        finally:
            for name in ranks:
                self.layers[name].to_dense(self.weights[name])

    def _factors(self, ranks: Mapping[str, int], bases: Mapping[str, Basis]) -> dict[str, Factors]:
        """Of the layers that do not stay dense, in their dtype."""
        found = {}
        for name, rank in ranks.items():
            layer, weight = self.layers[name], self.weights[name]
            if rank < layer.full_rank:
                factors = bases[name].factors(*sides(layer, weight), rank)
                found[name] = Factors(*(factor.to(weight.dtype) for factor in factors))
        return found

    def _use(self, factors: dict[str, Factors]) -> None:
        """Have layers compute with these, which are let go of on the way."""
        for name in [*factors]:
            self.layers[name].to_svd(factors.pop(name))

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
            distances[share] = self._distance_with(ranks, self.bases)
        return distances

    def _distance_with(self, ranks: Mapping[str, int], bases: Mapping[str, Basis]) -> float:
        """The distance with so many ranks of bases, and with statistics of batch normalization that suit them."""
        with self._having(ranks, bases):
            before, distance = self._recalibrated()
            try:
                return self.distance() if distance is None else distance
            finally:
                put(before)

    def _recalibrated(self) -> tuple[Values, float | None]:
        """Statistics of batch normalization taken anew, as of :func:`recalibrated`, if they are to be."""
        return recalibrated(self.model, self.data, self.distance) if self.recalibrate else ([], None)

    # ---------------------------------------------------------------------------------------------------------- act

    def cut(self, correct_bias: bool | None) -> None:
        """Use the ranks that were chosen, and make up for what is dropped."""
        factors = self._factors(self.ranks, self.bases)
        self.shifts = self._shifts(factors)
        if correct_bias and not self.means:  # ranks by the weights alone
            seen = collect(self.data, self.layers, False, self.track, with_moments=False)
            self.means = {name: each.total / each.positions for name, each in seen.items()}
        self._use(factors)
        self.corrected = False
        if correct_bias is not False and self.means:
            before = self.distance()
            self._correct_biases()
            self.corrected = bool(self.biases)
            if correct_bias is None and self.distance() >= before:
                self._restore_biases()
                self.corrected = False
        self.bases, self.means = {}, {}
        self.norms, _ = self._recalibrated()

    def _shifts(self, factors: Mapping[str, Factors]) -> dict[str, float]:
        """Of each layer, how far its output moves for what it is given in the dense model, as a share of its size."""
        moved = dict.fromkeys(self.layers, 0.0)
        sizes = dict.fromkeys(self.layers, 0.0)

        def watch(layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
            name = layer.svd_name
            if name in factors:
                U, s, V = factors[name]
                cut_out = layer.view.apply_factors(x, U * s.unsqueeze(-2), V, bias)
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
            bias = self._bias(name)
            if bias is None or not layer.view.output_is_product or layer.form.name == "dense":
                continue
            left, right = sides(layer, self.weights[name])
            dropped = self.bases[name].dropped(left, right, self.means[name], layer.rank)
            self.biases[name] = bias.detach().clone()
            _set(bias, bias.detach() + dropped.flatten().to(bias))

    def _restore_biases(self) -> None:
        for name, before in self.biases.items():
            _set(self._bias(name), before)
        self.biases = {}

    def reconstruct(self, steps: int, originals: Sequence[Sequence[Tensor]]) -> None:
        """Train low-rank layers towards the original outputs, if that brings held-out ones nearer."""
        low_rank = {name: layer for name, layer in self.layers.items() if layer.form.name != "dense"}
        if low_rank:
            arguments = self.model, low_rank, self.data, originals, steps, self.distance, self.track
            self.reconstructed = reconstruct_layers(*arguments)

    def finish(self, curve: Mapping[float, float]) -> CompressionReport:
        """Make the layers plain ones; returns the report."""
        distance = self.distance()
        dense = {name for name, layer in self.layers.items() if layer.form.name == "dense"}
        for name, layer in self.layers.items():
            if name not in dense:
                layer.to_svd(layer.form.exact(layer.svd_name))  # of its rank, orthonormal again
        unchanged = {name: self.spectra[name] for name in dense}
        ranks = report_on(self.plan, self.layers, self.cost, self.spectra, spectra_after=unchanged)
        finish(self.model, {name: "dense" if name in dense else "pair" for name in self.layers})
        left = {id(parameter) for parameter in self.model.parameters()}
        for parameter, gradient in self.gradients:
            if id(parameter) in left:
                parameter.grad = gradient
        kind, target = self.recipe.target
        if ranks.latency and (missed := ranks.latency.missed(target)):
            ranks = replace(ranks, warnings=(*ranks.warnings, missed))
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
            reconstructed=self.reconstructed,
            inputs=self.data.inputs,
            seconds=time.monotonic() - self.started,
            no_faster=no_faster(self.model),
        )


def _carried(bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    return {name: basis.carried for name, basis in bases.items()}


def _twin(model: ModuleT, recipe: Recipe) -> tuple[ModuleT, set[int]]:
    """A copy for which the weights to be factorized are not copied: they are read, and most of them are let go.

    Returns:
        The copy, and where in memory it has what is the model's.
    """
    memo: dict[int, Any] = {}
    shared = set()
    for layer in recipe.plan(model, include_frozen=True):
        if layer.skipped:
            continue
        owner = _nearest(model, layer.name)
        for parameter in owner.parameters(recurse=False):
            if type(parameter) is nn.Parameter and parameter.ndim > 1 and not parameter.is_inference():
                memo[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
                shared.add(parameter.untyped_storage().data_ptr())
    return copied(model, "`compress` changes", "give `inplace=True`, which needs none", memo), shared


def _nearest(model: nn.Module, name: str) -> nn.Module:
    """The module of this name; for a part of one in one piece that one."""
    while True:
        try:
            return model.get_submodule(name)
        except AttributeError:
            name = name.rpartition(".")[0]


def _separate(twin: nn.Module, shared: set[int]) -> None:
    """Give a copy its own values where it still has another model's."""
    for parameter in twin.parameters():
        if parameter.untyped_storage().data_ptr() in shared:
            parameter.data = parameter.detach().clone()


def _set(parameter: Tensor | None, values: Tensor) -> None:
    assert parameter is not None
    parameter.detach().copy_(values)
