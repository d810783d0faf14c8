"""How others cut a trained net without training it, so that ours can be compared with them at equal cost.

Each takes a dense model, batches of its inputs, and the share of the multiply-accumulates that is to be left, and gives
a copy in plain torch layers. The factors are computed here, from the papers, and stand in this package's layers only
so that costs are counted in one way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from step_cost import cut
from torch import Tensor, nn

from lightning_svd import decompose, svd_layers, to_factored
from lightning_svd.layers.matrices import Factors, refactorized
from lightning_svd.model.counting import count_costs
from lightning_svd.ranks.costs import ModelCost

Batches = Sequence[Tensor]
Truncate = Callable[[Tensor, "Inputs", int], tuple[Tensor, Tensor]]


# ----------------------------------------------------------------------------------------------- what layers are given


@dataclass
class Inputs:
    """What the rows of a layer's inputs were, in sum.

    Attributes:
        moment: Sum of x x^T, (n, n).
        magnitude: Sum of |x|, (n,).
        count: How many rows.
    """

    moment: Tensor
    magnitude: Tensor
    count: int

    @classmethod
    def of(cls, rows: Tensor) -> Inputs:
        """Of rows (count, n)."""
        wide = rows.double()
        return cls(wide.T @ wide, wide.abs().sum(0), len(wide))

    def __add__(self, other: Inputs) -> Inputs:
        return Inputs(self.moment + other.moment, self.magnitude + other.magnitude, self.count + other.count)


Seen = Iterator[tuple[str, Tensor]]  # the name of a layer, and rows of its inputs


def of_linear(layer: nn.Linear, x: Tensor) -> Seen:
    """The features."""
    yield "", x.flatten(0, -2)


def of_convolution(layer: nn.Conv2d, x: Tensor) -> Seen:
    """The patches under the kernel."""
    if layer.groups > 1 or not isinstance(layer.padding, tuple):
        raise ValueError("convolutions in groups, or padded by name, have no inputs here")
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    yield "", patches.transpose(1, 2).flatten(0, 1)


def of_lstm(whole: nn.LSTM, x: Tensor) -> Seen:
    """What enters each layer, and the hidden states of the step before, the first of which is zero."""
    if whole.bidirectional or whole.proj_size or not whole.batch_first:
        raise ValueError("of LSTMs only those in one direction, without projections, batch first, have inputs here")
    own = dict(whole.named_parameters())
    for number in range(whole.num_layers):
        layer = nn.LSTM(x.shape[-1], whole.hidden_size, bias=whole.bias, batch_first=True)
        layer.load_state_dict({key: own[key.removesuffix("0") + str(number)] for key in layer.state_dict()})
        yield f"ih_l{number}", x.flatten(0, 1)
        x = layer(x)[0]
        yield f"hh_l{number}", F.pad(x, (0, 0, 1, -1)).flatten(0, 1)


READERS: Mapping[type[nn.Module], Callable[..., Seen]] = {
    nn.Linear: of_linear,
    nn.Conv2d: of_convolution,
    nn.LSTM: of_lstm,
}


@torch.no_grad()
def inputs_of_layers(model: nn.Module, batches: Batches) -> dict[str, Inputs]:
    """What every layer of a dense model is given, by the names that its layers have once it is decomposed."""
    found: dict[str, Inputs] = {}

    def note(name: str, layer: nn.Module, x: Tensor) -> None:
        for part, rows in READERS[type(layer)](layer, x):
            key = ".".join(filter(None, (name, part)))
            seen = Inputs.of(rows)
            found[key] = found[key] + seen if key in found else seen

    with hooks(model, note):
        for batch in batches:
            model(batch)
    return found


@contextmanager
def hooks(model: nn.Module, note: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Have ``note`` called with the name, the layer and its input, whenever a layer is."""
    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
        for name, layer in model.named_modules()
        if type(layer) in READERS
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# ---------------------------------------------------------------------------------------------------------- truncating


def best_pair(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U diag(s) and V of the leading ranks."""
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * s[:rank], Vh[:rank].T


def svd_llm(W: Tensor, inputs: Inputs, rank: int) -> tuple[Tensor, Tensor]:
    """SVD-LLM (Wang et al. 2024): the SVD of W L, where L L^T, by Cholesky, is the inputs' second moment."""
    moment = inputs.moment / inputs.count
    L = cholesky(moment)
    left, right = best_pair(W @ L, rank)
    return left, torch.linalg.solve_triangular(L.T, right, upper=True)


def cholesky(moment: Tensor) -> Tensor:
    """Its lower factor; the diagonal is raised by the least power of ten that makes the matrix definite."""
    scale = moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    eye = torch.eye(len(moment), dtype=moment.dtype)
    for exponent in range(-12, 1):
        L, failed = torch.linalg.cholesky_ex(moment + 10.0**exponent * scale * eye)
        if not failed:
            return L
    raise ValueError("a second moment holds NaN or infinity")


def asvd(W: Tensor, inputs: Inputs, rank: int) -> tuple[Tensor, Tensor]:
    """ASVD (Yuan et al. 2023): the SVD of W with its columns scaled by the root of the inputs' mean magnitude."""
    magnitude = (inputs.magnitude / inputs.count).sqrt()
    scale = magnitude.clamp_min(1e-6 * magnitude.max())
    left, right = best_pair(W * scale, rank)
    return left, right / scale[:, None]


# ------------------------------------------------------------------------------------------------------ whole models


def factorized(model: nn.Module, batches: Batches) -> tuple[nn.Module, ModelCost]:
    """A copy whose layers are factorized at full rank, and what it costs for one input."""
    full = copy.deepcopy(model)
    decompose(full)
    return full, count_costs(full, batches[0][:1])


def spectrum(model: nn.Module, batches: Batches, share: float) -> nn.Module:
    """This package's first edition: plain SVDs, ranks by the log shares of the weights' energy under one budget."""
    full, cost = factorized(model, batches)
    return to_factored(cut(full, cost, share), cost)


def uniform_ranks(cost: ModelCost, share: float) -> dict[str, int]:
    """Ranks that keep the same share of the parameters of each layer, the largest within the budget of MACs.

    Layers of one shape take their next rank together; what that leaves of the budget goes to single ones, in order.
    """

    def at(kept: float) -> dict[str, int]:
        return {
            name: max(1, min(layer.break_even, int(kept * layer.dense_params / layer.params_per_rank)))
            for name, layer in cost.layers.items()
        }

    if cost.ratio(at(0.0), "macs") > share:
        raise ValueError(f"one rank in each layer leaves more than {share} of the MACs")
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.ratio(at(middle), "macs") <= share else (low, middle)
    ranks = at(low)
    for name, rank in at(high).items():
        more = ranks | {name: rank}
        if cost.ratio(more, "macs") <= share:
            ranks = more
    return ranks


def uniform(model: nn.Module, batches: Batches, share: float, truncate: Truncate) -> nn.Module:
    """Every layer cut by ``truncate`` at the same share of its parameters."""
    seen = inputs_of_layers(model, batches)
    full, cost = factorized(model, batches)
    layers = svd_layers(full)
    for name, rank in uniform_ranks(cost, share).items():
        W = layers[name].view.unfold(layers[name].rebuilt().detach()).double()
        left, right = truncate(W, seen[name], rank)
        layers[name].to_svd(refactorized(Factors(left, left.new_ones(rank), right), name))
    return to_factored(full, cost)


def by_svd_llm(model: nn.Module, batches: Batches, share: float) -> nn.Module:
    """:func:`svd_llm` in every layer alike."""
    return uniform(model, batches, share, svd_llm)


def by_asvd(model: nn.Module, batches: Batches, share: float) -> nn.Module:
    """:func:`asvd` in every layer alike."""
    return uniform(model, batches, share, asvd)
