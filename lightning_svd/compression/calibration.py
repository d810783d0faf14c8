"""Passes of a few batches through a model with factorized layers, to collect statistics of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_svd.compression.data import CalibrationData
from lightning_svd.layers.layer import SVDLayer, watching
from lightning_svd.model.noting import Pass
from lightning_svd.model.replay import untouched
from lightning_svd.model.targets import drawn_gradients, numbers_in
from lightning_svd.model.values import inputs_in
from lightning_svd.ranks.statistics import Basis, Felt, Statistics

_WITHOUT = "give `importance='outputs'`, which needs none"


class NoGradientError(ValueError):
    """A model's output has no gradient."""


Track = Callable[[Iterable[Any], str], Iterable[Any]]


def collect(
    data: CalibrationData,
    layers: Mapping[str, SVDLayer],
    with_gradients: bool,
    track: Track,
    seed: int = 0,
    with_moments: bool = True,
    only: Collection[str] | None = None,
) -> dict[str, Statistics]:
    """Statistics of layers over the batches, of those that were called.

    Without a loss the gradients are those of the model's own uncertainty: for an output that is logits of a class drawn
    from them, for any other of a squared error with normal noise of the output's own size. Their second moments are
    the Fisher information (true, not empirical: no labels are needed).

    Args:
        data: The batches, of a model that the layers are in.
        layers: By name; of one that trains its dense weight the features are its outputs, or its inputs where those
            are fewer.
        with_gradients: Whether to run backward passes too.
        track: Shows progress.
        seed: Of what is drawn.
        with_moments: Whether moments are wanted, and not only what the loss feels.
        only: Of which of the layers statistics are wanted, by name; None for all of them.

    Raises:
        ValueError: If the model fails, or a layer meets NaN or infinity.
    """
    seen: dict[str, Statistics] = {}

    def of(layer: SVDLayer) -> Statistics | None:
        if only is not None and layer.svd_name not in only:
            return None
        if layer.svd_name not in seen:
            seen[layer.svd_name] = Statistics(layer, with_gradients, with_moments)
        return seen[layer.svd_name]

    _run(data, layers, of, with_gradients, track, seed)
    return seen


def collect_felt(
    data: CalibrationData, layers: Mapping[str, SVDLayer], bases: Mapping[str, Sequence[Basis]], track: Track, seed: int
) -> dict[str, list[Tensor]]:
    """What a loss feels of the ranks of several bases of each layer, from the same passes.

    Args:
        data: The batches, of a model that the layers are in.
        layers: In the form that the bases are of, by name.
        bases: Of each layer of which that is wanted.
        track: Shows progress.
        seed: Of what is drawn.

    Raises:
        ValueError: If the model fails, or a layer meets NaN or infinity.
    """
    felt = {name: Felt(layers[name], of_layer) for name, of_layer in bases.items()}
    _run(data, layers, lambda layer: felt.get(layer.svd_name), True, track, seed)
    return {name: [statistics.felt() for statistics in each.each] for name, each in felt.items()}


def _run(
    data: CalibrationData,
    layers: Mapping[str, SVDLayer],
    of: Callable[[SVDLayer], Statistics | Felt | None],
    with_gradients: bool,
    track: Track,
    seed: int,
) -> None:
    """Pass the batches through the model, and tell what there is of a layer what it sees.

    All layers are watched, whatever there is of them: gradients come from all of them on.
    """
    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(untouched(data.model))
        stack.enter_context(torch.set_grad_enabled(with_gradients))  # which is so from when it is made
        stack.enter_context(frozen(data.model))
        for batch in track(data.batches, "calibrating"):
            one = Pass(of, inputs_in(batch))
            with watching(layers.values(), one.watch):
                output = data.call(batch)
                if with_gradients:
                    _backward(output, one.inputs if data.loss else None, generator)
            one.end()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Parameters without gradients inside, which nobody needs here and which take time and memory."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _backward(output: Any, of_loss: int | None, generator: torch.Generator) -> None:
    tensors = [tensor for tensor in numbers_in(output) if tensor.requires_grad]
    if not tensors:
        raise NoGradientError(f"the model's output has no gradient: {_WITHOUT}")
    try:
        if of_loss is not None:
            torch.autograd.backward(tensors[0].sum() * of_loss)
        else:
            torch.autograd.backward(tensors, drawn_gradients(output, generator))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # not of every operator there is a derivative
        raise NoGradientError(f"the backward pass fails: {error}: {_WITHOUT}") from error
