"""How long layers take, measured: MACs that are saved are not always time that is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from lightning_svd.layers.layer import SVDLayer, plain_dense, plain_pair
from lightning_svd.ranks.costs import LayerCost, LayerLatency, ModelCost

ROUNDS, SECONDS = 3, 0.003  # of each form of a layer, and at least so long each


def time_layers(cost: ModelCost, layers: Mapping[str, SVDLayer]) -> ModelCost:
    """``cost`` with how long each layer takes, dense and as two factors of its rank, in evaluation.

    Both forms are run on this machine with inputs of the shapes that were counted. They take turns, and the
    fastest run of each counts: whatever else the machine does can only make one slower.

    Args:
        cost: With the shapes of a forward pass; a layer that was not used in it is not timed, nor is an embedding.
        layers: The factorized layers by name.
    """
    return replace(cost, layers={name: _timed(price, layers[name]) for name, price in cost.layers.items()})


def _timed(price: LayerCost, layer: SVDLayer) -> LayerCost:
    if not price.dense_macs:  # not used, or a lookup
        return price
    like = layer.form.trained[0].detach()
    # As the model runs: in the layout of its weights, and under the caller's autocast.
    inputs = [like.new_ones(shape) for shape in price.input_shapes]
    if layer.layout is not torch.contiguous_format:
        inputs = [x.contiguous(memory_format=layer.layout) if x.ndim > 3 else x for x in inputs]
    return replace(price, latency=LayerLatency(*_race((plain_dense(layer), plain_pair(layer)), inputs)))


@torch.inference_mode()
def _race(forms: Sequence[nn.Module], inputs: Sequence[Tensor]) -> list[float]:
    """Seconds that each form takes for all inputs."""
    timers = [
        Timer(
            "for x in inputs: form(x)",
            globals={"form": form.eval(), "inputs": inputs},
            num_threads=torch.get_num_threads(),
        )
        for form in forms
    ]
    return [
        min(rounds)
        for rounds in zip(
            *([t.blocked_autorange(min_run_time=SECONDS).median for t in timers] for _ in range(ROUNDS)), strict=True
        )
    ]
