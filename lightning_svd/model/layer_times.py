"""How long single layers take, measured: dense, as two factors of some ranks, and in other forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.arguments import check_choice, check_module, check_positive
from lightning_svd.layers.identity import IdentityLinear, is_linear_pair
from lightning_svd.layers.layer import SVDLayer, plain_dense, plain_pair
from lightning_svd.layers.pairs import bias_of, factored_pair, fill, merged, rank_of, view_of
from lightning_svd.model import stopwatch
from lightning_svd.model.counting import example_call
from lightning_svd.model.replay import replay
from lightning_svd.model.surgery import called_layers, frozen_copy, plain_pairs, to_factored
from lightning_svd.ranks.costs import STEP, LayerCost, LayerLatency, ModelCost

SECONDS = 0.05  # for the two forms of a layer of a known rank
LEVELS = 3  # of looking for steps between the ranks that were timed
BEND = 0.05  # by which a time is off the line between its neighbors where a staircase has a step


def time_layers(cost: ModelCost, layers: Mapping[str, SVDLayer]) -> ModelCost:
    """``cost`` with how long each layer takes, dense and as two factors of its rank, in evaluation.

    Both forms are run on this machine with inputs of the shapes that were counted. They take turns, and the
    fastest run of each counts: whatever else the machine does can only make one slower.

    Args:
        cost: With the shapes of a forward pass; a layer that was not used in it is not timed, nor is an embedding.
        layers: The factorized layers by name.
    """
    return replace(cost, layers={name: _timed(price, layers[name]) for name, price in cost.layers.items()})


def fastest_forms(
    module: nn.Module, example_input: Any, runtime: str = "eager", seconds: float = 10.0
) -> dict[str, str]:
    """Which form each low-rank layer is fastest in on this machine, for :func:`~lightning_svd.to_factored`.

    Each is run alone, as two plain layers, as one dense layer and, if it is linear, as an
    :class:`~lightning_svd.layers.identity.IdentityLinear`, on inputs of the shapes that it gets from the example. They
    take turns, and the fastest turn of each counts. The other forms have to be faster than the pair by a twentieth.

    Args:
        module: With factorized layers, or with the pairs of plain ones that a fit leaves; it is left as it is.
        example_input: What it is called with, a tuple for several arguments, a dict for arguments by keyword.
        runtime: "eager", or "compiled" by ``torch.compile``.
        seconds: About how long to measure, compilation apart.

    Returns:
        Name of each layer -> "pair", "dense" or "identity"; layers that the example does not use are left out.

    Raises:
        ValueError: If an argument is out of range, or the module cannot be copied.
    """
    check_module("module", module)
    check_choice("runtime", runtime, ("eager", "compiled"))
    check_positive("seconds", seconds)
    names = dict.fromkeys(called_layers(module), "pair")
    twin = frozen_copy(to_factored(module, forms=names), "`fastest_forms` measures", "measure a copy of your own")
    pairs, shapes = plain_pairs(twin), dict[str, list[Tensor]]()
    handles = [
        pair.register_forward_pre_hook(_inputs_into(shapes.setdefault(name, []))) for name, pair in pairs.items()
    ]
    with stopwatch.measuring():
        replay(twin, [example_call(twin, example_input)])
        for handle in handles:
            handle.remove()
        used = {name: inputs for name, inputs in shapes.items() if inputs}
        return {name: _fastest_form(pairs[name], used[name], runtime, seconds / len(used)) for name in used}


def _inputs_into(inputs: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().clone(memory_format=torch.preserve_format))

    return hook


def _fastest_form(pair: nn.Sequential, inputs: Sequence[Tensor], runtime: str, seconds: float) -> str:
    forms: dict[str, nn.Module] = {"pair": pair, "dense": merged(pair)}
    if is_linear_pair(pair) and rank_of(pair) < min(view_of(pair).matrix_shape):
        forms["identity"] = IdentityLinear.of(pair)
    actions = {name: _on(inputs, form) for name, form in forms.items()}
    if runtime == "compiled":
        torch.compiler.reset()
        compiled: dict[str, Any] = {name: torch.compile(form.eval()) for name, form in forms.items()}
        actions = {name: _on(inputs, form) for name, form in compiled.items()}
    taken = stopwatch.fastest(actions, seconds)
    if runtime == "compiled":
        torch.compiler.reset()
    best = min(taken, key=lambda name: taken[name])
    return best if taken[best] < (1 - BEND) * taken["pair"] else "pair"


def _timed(price: LayerCost, layer: SVDLayer) -> LayerCost:
    if not price.dense_macs:  # not used, or a lookup
        return price
    dense, factored = _race((plain_dense(layer), plain_pair(layer)), _inputs(price, layer))
    taken = dense if layer.rank > _factored_up_to(layer) else factored
    return replace(price, latency=LayerLatency(dense, ((max(1, layer.rank), taken),)))


def _most(price: LayerCost, layer: SVDLayer) -> int:
    """The highest rank at which two factors may be faster than the dense layer."""
    return min(price.break_even, _factored_up_to(layer))


def _factored_up_to(layer: SVDLayer) -> int:
    """The highest rank at which two factors are multiplied with."""
    return layer.full_rank if layer._part_of is None else layer._part_of.factored_up_to(layer)


def _inputs(price: LayerCost, layer: SVDLayer) -> list[Tensor]:
    """As the model runs: in the layout of its weights."""
    like = layer.form.trained[0].detach()
    inputs = [like.new_ones(shape) for shape in price.input_shapes]
    if layer.layout is not torch.contiguous_format:
        inputs = [x.contiguous(memory_format=layer.layout) if x.ndim > 3 else x for x in inputs]
    return inputs


def _race(forms: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[float]:
    """Seconds that each form takes for all inputs."""
    return [*stopwatch.fastest({number: _on(inputs, form) for number, form in enumerate(forms)}, SECONDS).values()]


def _on(inputs: Sequence[Tensor], form: nn.Module) -> Callable[[], None]:
    """What computes all inputs in evaluation."""
    form.eval()

    def run() -> None:
        for x in inputs:
            form(x)

    return run


def layers_timed(cost: ModelCost, layers: Mapping[str, SVDLayer], seconds: float) -> dict[str, LayerLatency]:
    """Of each layer that was used, dense and at the ranks at which its time bends; layers alike are timed once."""
    alike: dict[object, list[str]] = {}
    for name, price in cost.layers.items():
        if price.dense_macs and price.break_even:
            layer = layers[name]
            like, most = layer.form.trained[0], _most(price, layer)
            view = repr(sorted(layer.view.to_dict().items(), key=lambda item: item[0]))
            key = view, price.input_shapes, like.dtype, like.device, layer.layout, bias_of(layer) is not None, most
            alike.setdefault(key, []).append(name)
    # Each gets of the time what it has of the MACs, and half of it all are shared out evenly.
    macs = sum(cost.layers[names[0]].dense_macs for names in alike.values())
    found: dict[str, LayerLatency] = {}
    for names in alike.values():
        price, layer = cost.layers[names[0]], layers[names[0]]
        share = (price.dense_macs / macs + 1 / len(alike)) / 2
        latency = _staircase(price, layer, seconds * share)
        found |= dict.fromkeys(names, latency)
    return {name: found[name] for name in cost.layers if name in found}


def _staircase(price: LayerCost, layer: SVDLayer, seconds: float) -> LayerLatency:
    """Seconds of a layer, dense and at a few ranks: more of them where its time does not lie on a line.

    Ranks at which factors are multiplied out take as long as dense.
    """
    inputs = _inputs(price, layer)
    taken: dict[int, float] = {}
    actions = {0: _on(inputs, plain_dense(layer))}
    most = _most(price, layer)
    asked, start = _coarse(most) if most else [], time.perf_counter()
    for _ in range(LEVELS):
        actions |= {rank: _on(inputs, _random_pair(layer, rank)) for rank in asked}
        mine = {rank: actions[rank] for rank in (0, *asked)}
        for rank, fastest in stopwatch.fastest(mine, seconds / LEVELS).items():
            taken[rank] = min(fastest, taken.get(rank, fastest))
        asked = _bent({rank: taken[rank] for rank in sorted(taken) if rank})
        if not asked or time.perf_counter() - start > seconds:
            break
    dense = taken.pop(0)
    if most < price.break_even:
        taken[most + 1] = dense
    return LayerLatency(dense, tuple(sorted(taken.items())))


def _bent(taken: Mapping[int, float]) -> list[int]:
    """The ranks in the middle between two neighbors of one that is off the line between its own."""
    middles = set()
    for low, rank, high in zip(taken, [*taken][1:], [*taken][2:], strict=False):
        line = taken[low] + (taken[high] - taken[low]) * (rank - low) / (high - low)
        if abs(taken[rank] - line) > BEND * line:
            middles |= {(one + other) // 2 // STEP * STEP for one, other in ((low, rank), (rank, high))}
    return sorted(middles - taken.keys() - {0})


def _coarse(most: int) -> list[int]:
    """A few ranks up to ``most``, each about half of the next, multiples of :data:`STEP` where that is small enough."""
    ranks = {most}
    rank = most // 2
    while rank >= STEP:
        ranks.add(rank // STEP * STEP)
        rank //= 2
    ranks.add(min(most, max(1, STEP // 2)))
    return sorted(ranks)


def _random_pair(layer: SVDLayer, rank: int) -> nn.Sequential:
    """Two plain layers of this rank, as :func:`plain_pair` makes them."""
    bias, like = bias_of(layer), layer.form.trained[0].detach()
    pair = factored_pair(layer.view, rank, bias is not None)
    for half in pair:
        shape = half.get_parameter("weight").shape
        weight = torch.randn(shape, dtype=like.dtype, device=like.device) / shape[1:].numel() ** 0.5
        fill(half, weight, bias, like, layer.layout)
    return pair
