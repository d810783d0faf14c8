"""How long a whole model takes, measured, and ranks at which it takes what was asked for."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_choice, check_count, check_module, check_positive, shown
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors
from lightning_svd.model import stopwatch
from lightning_svd.model.calls import Call, inputs_of
from lightning_svd.model.counting import count_calls, example_call, running_example
from lightning_svd.model.export import onnx_session, to_onnx
from lightning_svd.model.layer_times import layers_timed
from lightning_svd.model.plan import LayerPlan, Targets, plan
from lightning_svd.model.replay import cut, replay
from lightning_svd.model.surgery import begin, finish, frozen_copy, to_dense
from lightning_svd.model.values import mapped
from lightning_svd.ranks.costs import STEP, LayerCost, ModelCost, ModelLatency
from lightning_svd.ranks.latency import LatencyTable, TimedLayer

RUNTIMES = ("eager", "compiled", "onnx")
OF_LAYERS = 0.6  # share of the time that layers are measured in; the rest is for the whole
SHARES = (0.75, 0.5, 0.35, 0.2, 0.1)  # of each layer's break-even rank, at which the whole is measured
CORRECTIONS = 4  # of a budget of time at most, by the whole model's at the ranks that it would give
MADE_ANEW = 5  # times, about, in the time that a choice is held against the whole; few, so that caches get warm
CLOSE = 0.02  # by which the time of the whole may be off what was asked for


@dataclass(frozen=True)
class Timing:
    """How the latency of a model is measured.

    Args:
        batch_size: Inputs at a time; None for those of the batch that is at hand.
        runtime: What the model is going to run in: "eager" PyTorch, "compiled" by ``torch.compile``, or ONNX Runtime,
            "onnx".
        seconds: About how long to measure a table, and as long again to hold what was chosen by it against the whole
            model; a large model takes three runs of each layer at each rank, and of the whole at each choice, at least.

    Raises:
        ValueError: If an argument is out of range; the message names it.
    """

    batch_size: int | None = None
    runtime: str = "eager"
    seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        check_choice("runtime", self.runtime, RUNTIMES)
        check_positive("seconds", self.seconds)


def profile(
    model: nn.Module,
    example_input: Any,
    timing: Timing = Timing(),
    *,
    target_modules: Targets = None,
    exclude_modules: Targets = None,
    conv_mode: str = "channel",
) -> LatencyTable:
    """Measure how long a model and its layers take, dense and as two factors of some ranks.

    What is measured on one machine can be a budget on another: ``table.save("phone.json")`` there, and
    ``SVDTrainingCallback(target_latency=0.5, latency_table="phone.json")`` here. The model is left as it is; a copy of
    it is measured, on its device, in its dtype and layout, under the caller's autocast.

    Args:
        model: In plain PyTorch.
        example_input: What it is called with, a tuple for several arguments, a dict for arguments by keyword.
        timing: How it is measured.
        target_modules: Layers to measure, as for :func:`~lightning_svd.plan`.
        exclude_modules: Layers to leave out.
        conv_mode: As which matrix convolutions are seen.

    Raises:
        ValueError: If the model cannot be copied or run, or has nothing to factorize.
        TypeError: If ``timing`` is none.
    """
    check_module("model", model)
    if not isinstance(timing, Timing):
        raise TypeError(f"`timing` must be a Timing, got {shown(timing)}")
    plans = plan(model, target_modules, exclude_modules, conv_mode, include_frozen=True)
    calls = [example_call(model, example_input)]
    with running_example("example_input"):
        replay(model, calls)
    return profile_calls(model, plans, calls, timing)


def profile_calls(model: nn.Module, plans: Sequence[LayerPlan], calls: Sequence[Call], timing: Timing) -> LatencyTable:
    """:func:`profile` of calls that were noted.

    Args:
        model: The whole tree; a copy of it is measured.
        plans: Of its layers.
        calls: Of modules in it.
        timing: How it is measured.

    Raises:
        ValueError: If it cannot be copied.
    """
    with stopwatch.measuring():
        whole = _Whole(model, plans, calls, timing)
        cost = count_calls(whole.twin, whole.layers, whole.calls)
        latencies = layers_timed(cost, whole.layers, timing.seconds * OF_LAYERS)
        prices = {name: replace(price, latency=latencies.get(name)) for name, price in cost.layers.items()}
        latency = _whole_timed(whole, replace(cost, layers=prices))
    timed = {name: TimedLayer(whole.layers[name].view.to_dict(), latencies[name]) for name in latencies}
    conditions = _conditions(whole.twin, inputs_of(whole.calls), timing)
    return LatencyTable(timed, replace(latency, conditions=conditions))


def corrected(
    model: nn.Module,
    plans: Sequence[LayerPlan],
    calls: Sequence[Call],
    timing: Timing,
    cost: ModelCost,
    target: float,
    choose: Callable[[ModelCost], dict[str, int]],
) -> tuple[dict[str, int], ModelCost]:
    """Ranks at which the whole was measured to take the time that was asked for, and the cost that says so.

    The whole is measured at the very ranks that are chosen by the cost, which is corrected by what it takes, until it
    is about what was asked for. Where no ranks take that long, as with a module that computes in another way beyond
    some rank, these are the slowest of those that take less.

    Args:
        model: As for :func:`profile_calls`.
        plans: As there.
        calls: As there.
        timing: As there.
        cost: With latencies.
        target: The share of the dense model's time.
        choose: The rank of each factorized layer at a cost.
    """
    assert cost.latency is not None
    measured: list[tuple[float, dict[str, int]]] = []
    curve = _Curve(cost.latency)

    def having(share: float, ranks: Mapping[str, int]) -> ModelCost:
        return replace(cost, latency=curve.having_measured(cost.by("latency").total(ranks) / 1e6, share))

    with stopwatch.measuring():
        whole = _Whole(model, plans, calls, timing)
        for _ in range(CORRECTIONS):
            try:
                ranks = choose(cost)
            except ValueError:  # as it turned out, no ranks are as fast as that
                if not measured:
                    raise
                break
            pairs = {name: rank for name, rank in ranks.items() if cost.layers[name].pays(rank)}
            if not pairs or any(ranks == other for _, other in measured):
                measured += [] if pairs else [(1.0, ranks)]
                break
            share = whole.share(pairs)
            measured.append((share, ranks))
            cost = having(share, ranks)
            if abs(share - target) <= CLOSE * target:
                break
    share, ranks = min(measured, key=lambda each: (each[0] > (1 + CLOSE) * target, abs(each[0] - target)))
    return ranks, having(share, ranks)


class _Curve:
    """Seconds of the whole against the sum of its layers', as a table has them, drawn through what is measured later.

    Between two times that were measured the table's are off by as much as at these, in proportion; so that one that is
    off everywhere is right from the second choice of ranks on.
    """

    def __init__(self, table: ModelLatency) -> None:
        self._table = table
        self._points: list[tuple[float, float]] = []

    def having_measured(self, layers: float, share: float) -> ModelLatency:
        """The curve through this one too, and through those before that do not contradict it.

        Args:
            layers: Sum of the layers' seconds.
            share: Of the dense model's time, that the whole took.
        """
        dense = self._table.samples[-1]
        # One that is slower than the dense model says no more than that it is not faster.
        mine = (layers, min(share, 1 - CLOSE / 2) * self._table.dense)
        if layers < dense[0]:
            self._points = sorted([*(point for point in self._points if _agree(point, mine)), mine])
        off = [(x, y / self._table.whole(x)) for x, y in self._points if y < (1 - CLOSE / 2) * dense[1]]
        scaled = ModelLatency(1.0, ((0.0, off[0][1]), *off, (dense[0], 1.0))) if off else None
        rest = [(x, y * scaled.whole(x) if scaled else y) for x, y in self._table.samples[:-1]]
        rest = [each for each in rest if all(_agree(each, point) for point in (*self._points, dense))]
        return replace(self._table, samples=(*sorted([*self._points, *_ascending(rest)]), dense))


def _agree(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether the one of two samples that has more of the layers' seconds takes longer."""
    return (one[0] - other[0]) * (one[1] - other[1]) > 0


def beside_dense(model: nn.Module, calls: Sequence[Call], timing: Timing) -> tuple[float, float]:
    """The share of the time of a dense copy that a finished model takes for calls, and seconds of the copy."""
    with stopwatch.measuring(), ExitStack() as stack:
        now, calls_now = _copied(model, calls, timing)
        dense = to_dense(now).eval()
        modules, names = dict(dense.named_modules()), {module: name for name, module in now.named_modules()}
        calls_dense = [replace(call, module=modules[names[call.module]]) for call in calls_now]
        actions = {
            "now": stack.enter_context(_running(calls_now, timing.runtime)),
            "dense": stack.enter_context(_running(calls_dense, timing.runtime)),
        }
        taken = stopwatch.turns(actions, timing.seconds * (1 - OF_LAYERS))
    return stopwatch.ratio(taken["now"], taken["dense"]), min(taken["dense"])


def _copied(model: nn.Module, calls: Sequence[Call], timing: Timing) -> tuple[nn.Module, list[Call]]:
    """A copy to be measured, and the calls of its modules with as many inputs as are asked for.

    Not the model itself: it may have hooks on it, and what keeps it as it is takes time.
    """
    names = {module: name for name, module in model.named_modules()}
    twin = frozen_copy(model, "`target_latency` measures", "measure a copy of your own with `lightning_svd.profile`")
    twins = dict(twin.named_modules())
    calls = [replace(call, module=twins[names[call.module]]) for call in calls]
    if timing.batch_size is not None:
        calls = _of_size(twin, calls, timing.batch_size)
    return twin, list(calls)


def _of_size(module: nn.Module, calls: Sequence[Call], batch_size: int) -> list[Call]:
    """The calls with so many inputs: cut, or repeated."""
    there = inputs_of(calls)
    if there < batch_size:
        times = -(-batch_size // there)

        def repeated(tensor: Tensor) -> Tensor:
            # Not `repeat`, which would give images another layout than they have.
            return torch.cat([tensor] * times) if tensor.ndim and len(tensor) == there else tensor

        calls = [
            replace(call, args=mapped(call.args, repeated), kwargs=mapped(call.kwargs, repeated)) for call in calls
        ]
    cut_calls, inputs = cut(module, calls, batch_size)
    if inputs != batch_size:
        raise ValueError(
            f"`batch_size`: the model was called with {there} inputs, and a batch of {batch_size} cannot be made of "
            "them: profile it with such a batch, `lightning_svd.profile`"
        )
    return cut_calls


def kernel_width(model: nn.Module) -> int:
    """Ranks that kernels compute at once where a model is: the numbers in a vector, or in a tile of a matrix unit."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cpu"}:
        return 8
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def _conditions(model: nn.Module, inputs: int, timing: Timing) -> dict[str, str | int]:
    like = next(p for p in model.parameters() if p.is_floating_point())
    kind = like.device.type
    autocast = torch.is_autocast_enabled(kind)
    conditions: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(like.device) if like.is_cuda else kind,
        "runtime": timing.runtime,
        "batch_size": inputs,
        "dtype": str(torch.get_autocast_dtype(kind) if autocast else like.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    if kind == "cpu":
        processor = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        conditions |= {"device": processor, "threads": torch.get_num_threads()}
    return conditions


class _Whole:
    """A model to be measured as a whole, dense and with some of its layers cut.

    Attributes:
        twin: A copy whose layers are factorized.
        layers: Its layers by name.
        calls: Of its modules.
    """

    def __init__(self, model: nn.Module, plans: Sequence[LayerPlan], calls: Sequence[Call], timing: Timing) -> None:
        self._source, self._plans, self._timing = (model, calls, timing), plans, timing
        self.twin, self.calls = _copied(*self._source)
        self.layers = begin(self.twin, plans)

    def seconds(self, choices: Sequence[Mapping[str, int]]) -> list[float]:
        """Of the model for each choice of ranks, layers that are in none dense."""
        # What takes long to make is timed at once; otherwise they all take turns, and are made anew for each, so that
        # not all are there at once.
        rounds = stopwatch.ROUNDS if self._is_made_fast else 1
        each = self._timing.seconds * (1 - OF_LAYERS) / (1 + len(SHARES)) / rounds
        taken: list[list[float]] = [[] for _ in choices]
        start = time.perf_counter()
        for done in range(rounds):
            if done and (time.perf_counter() - start) * (done + 1) / done > each * rounds * len(choices):
                break  # another round would take too long
            for ranks, mine in zip(choices, taken, strict=True):
                with self._running(ranks) as run:
                    mine += stopwatch.fastest({0: run}, each, stopwatch.ROUNDS // rounds).values()
        return [min(mine) for mine in taken]

    def share(self, ranks: Mapping[str, int]) -> float:
        """Of the time of the dense model, in the same turns.

        Where in memory a model happens to lie makes it faster or slower by a few percent, if its time is short; so both
        are made anew a few times, unless that takes long.
        """
        seconds, ratios = self._timing.seconds / CORRECTIONS, list[float]()
        start = time.perf_counter()
        while not ratios or (self._is_made_fast and time.perf_counter() - start < seconds):
            with self._running({}) as dense, self._running(ranks) as now:
                actions = {"dense": dense, "now": now}
                if self._is_made_fast:
                    taken = stopwatch.turns(actions, seconds / MADE_ANEW, stopwatch.ROUNDS // 2)
                else:
                    with torch.inference_mode():  # which some of them are made in
                        dense(), now()
                    # What takes long to make may be timed for as long.
                    taken = stopwatch.turns(actions, max(seconds, time.perf_counter() - start))
            ratios.append(stopwatch.ratio(taken["now"], taken["dense"]))
        return statistics.median(ratios)

    @property
    def _is_made_fast(self) -> bool:
        return self._timing.runtime == "eager"

    @contextmanager
    def _running(self, ranks: Mapping[str, int]) -> Iterator[Callable[[], None]]:
        calls = self._cut_to(ranks) if ranks else _copied(*self._source)[1]
        with _running(calls, self._timing.runtime) as run:
            yield run

    def _cut_to(self, ranks: Mapping[str, int]) -> list[Call]:
        """The calls of a copy that is what a model of these ranks ends as, of random weights."""
        small, calls = _copied(*self._source)
        layers = begin(small, self._plans)
        for name, rank in ranks.items():
            layers[name].to_svd(_random_factors(layers[name], rank))
        finish(small, {name: "pair" if name in ranks else "dense" for name in layers})
        return calls


def _whole_timed(whole: _Whole, cost: ModelCost) -> ModelLatency:
    """Seconds of the whole model, dense and at a few ranks, against the sum of its layers' own."""
    timed = {name: price for name, price in cost.layers.items() if price.latency}
    one_by_one, choices = [], []
    for share in (1.0, *SHARES):
        full = {name: whole.layers[name].full_rank for name in timed}
        ranks = {name: _rank_at(price, share) for name, price in timed.items()} if share < 1 else full
        choices.append({name: rank for name, rank in ranks.items() if timed[name].pays(rank)})
        one_by_one.append(sum(timed[name].seconds(rank) for name, rank in ranks.items()))
    samples = _ascending(zip(one_by_one, whole.seconds(choices), strict=True))
    return ModelLatency(samples[-1][1], samples)


def _rank_at(price: LayerCost, share: float) -> int:
    rank = int(share * price.break_even)
    return max(1, rank if rank < STEP else rank // STEP * STEP)


def _ascending(samples: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Those samples, from the one with the most of the layers' seconds on, that are smaller than the last in both."""
    kept: list[tuple[float, float]] = []
    for one_by_one, whole in sorted(samples, key=lambda sample: (-sample[0], sample[1])):
        if not kept or (one_by_one < kept[-1][0] and whole < kept[-1][1]):
            kept.append((one_by_one, whole))
    return tuple(reversed(kept))


def _random_factors(layer: SVDLayer, rank: int) -> Factors:
    like = layer.form.trained[0].detach()
    (m, n), groups = layer.matrix_shape, (layer.view.groups,) if layer.view.groups > 1 else ()
    U, V = (torch.randn(*groups, size, rank, device=like.device) / size**0.5 for size in (m, n))
    return Factors(U, U.new_ones(*groups, rank), V)


@contextmanager
def _running(calls: Sequence[Call], runtime: str) -> Iterator[Callable[[], None]]:
    """What makes the calls in a runtime."""
    if runtime == "onnx":
        call = calls[0]
        if len(calls) > 1 or call.kwargs or not all(isinstance(each, Tensor) for each in call.args):
            raise ValueError('`runtime`: "onnx" is for a model that is called once, with tensors by position')
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(call.module, Path(folder) / "model.onnx", call.args)
            session = onnx_session(Path(folder) / "model.onnx")
            yield lambda: session(call.args)
        return
    made: list[Callable[..., Any]] = [call.module for call in calls]
    if runtime == "compiled":
        torch.compiler.reset()
        made = [torch.compile(module) for module in made]

    def run() -> None:
        for module, call in zip(made, calls, strict=True):
            with call.in_its_autocast():
                for _ in range(call.times):
                    module(*call.args, **call.kwargs)

    try:
        yield run
    finally:
        if runtime == "compiled":
            torch.compiler.reset()
