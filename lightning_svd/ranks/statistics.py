"""What goes through the ranks of a layer on data, and what a loss feels of it.

A factorized layer computes ``L (R^T x)``: its ranks' features z = R^T x, one number for each rank and position, are all
that its output depends on, and b = L^T dL/dy is the gradient that comes back to them. Everything here is sums of
products of z and b, so that those of several batches, and of several processes, add up; in this way a linear layer, a
convolution in either mode, a transposed or a grouped one, an embedding and a part of an LSTM are all the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors, exact_products, wide

# The least share of a metric that is of white inputs, or of plain outputs: it bounds what moments of few samples say of
# directions that were hardly seen.
LEAST_WHITE = 0.01
LEAST_PLAIN = 0.05


class NotFiniteError(ValueError):
    """A layer meets NaN or infinity."""


class Statistics:
    """Sums over what a layer's ranks computed for some batches.

    Attributes:
        inputs: How many inputs were seen.
        positions: How many positions the features have.
        total: Sum of z, (groups, r).
        features: Sum of z z^T, (groups, r, r), in float32 or wider; None if moments are not wanted.
        gradients: Sum of b b^T, (groups, r, r); None without a backward pass too.
        squares: Sum over inputs of (z_i b_i)^2, each z_i b_i summed over its positions, (r,): what the loss feels of
            scaling a rank, s_i dL/ds_i.
        tails: Sum over inputs of the square of the sum of z_j b_j over all j >= i, (r,): what it feels of these ranks
            together.
    """

    def __init__(self, layer: SVDLayer, with_gradients: bool, with_moments: bool = True, checks: bool = True) -> None:
        like, rank, groups = wide(layer.form.trained[0].detach()), layer.rank, layer.view.groups
        self.checks = checks  # which waits for the device
        self.inputs = self.positions = 0
        self.total = like.new_zeros(groups, rank)
        self.features = like.new_zeros(groups, rank, rank) if with_moments else None
        self.gradients = like.new_zeros(groups, rank, rank) if with_moments and with_gradients else None
        self.squares, self.tails = like.new_zeros(rank), like.new_zeros(rank)
        self._scores: Tensor | None = None

    def see(self, layer: SVDLayer, between: Tensor) -> None:
        """Take note of the features of a call.

        Raises:
            NotFiniteError: If they are NaN or infinite; the message names the layer.
        """
        with torch.no_grad(), exact_products(between.device):
            features = _by_position(layer, between)
            if self.checks and not torch.isfinite(features).all():
                raise NotFiniteError(f"`{layer.layer_name}`: NaN or infinity in what it is given")
            self.positions += features.shape[1]
            self.total += features.sum(1)
            if self.features is not None:
                self.features += features.mT @ features

    def see_gradient(self, layer: SVDLayer, between: Tensor, gradient: Tensor, inputs: int) -> None:
        """Take note of the gradient of a call's output, in a batch of so many inputs.

        Raises:
            NotFiniteError: If it is NaN or infinite; the message names the layer.
        """
        with torch.enable_grad(), exact_products(gradient.device):
            left, _ = layer.form.left_right()
            between = between.detach().requires_grad_()
            out = layer.view.apply_second(between, wide(left.detach()), None)
            (back,) = torch.autograd.grad(out, between, wide(gradient.detach()))
        with torch.no_grad(), exact_products(gradient.device):
            backs = _by_position(layer, back)
            if self.checks and not torch.isfinite(backs).all():
                raise NotFiniteError(f"`{layer.layer_name}`: NaN or infinity among the gradients of its output")
            if self.gradients is not None:
                self.gradients += backs.mT @ backs
            scores = _by_input(layer.view.by_input(between * back), inputs, layer.rank)
            if self._scores is None or self._scores.shape == scores.shape:
                self._scores = scores if self._scores is None else self._scores + scores
            else:  # calls of the same layer that cannot be told apart by input
                self._scores = self._scores.sum(0, keepdim=True) + scores.sum(0, keepdim=True)

    def end_batch(self, inputs: int) -> None:
        """All calls of a batch of so many inputs were noted."""
        self.inputs += inputs
        if self._scores is not None:
            self.squares += self._scores.square().sum(0)
            self.tails += self._scores.flip(-1).cumsum(-1).flip(-1).square().sum(0)
            self._scores = None

    def sums(self) -> dict[str, Tensor]:
        """The tensors among its attributes, by name; those of several processes add up."""
        found = {name: getattr(self, name) for name in ("total", "features", "gradients", "squares", "tails")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def felt(self) -> Tensor:
        """What the loss feels of each rank, per input, as a share of what dropping several adds up to, (r,).

        The mean of two estimates of what is lost with the ranks from i on: the sum of the squares, as if ranks were
        independent, and the square of their sum.
        """
        falling = self.tails.flip(-1).cummax(-1).values.flip(-1)  # to drop more is never better
        alone = falling - torch.cat([falling[1:], falling.new_zeros(1)])
        return (self.squares + alone) / (2 * max(1, self.inputs))

    @torch.no_grad()
    def move(self, basis: DataBasis) -> None:
        """Go on as if the layer had had these factors all the while; what the loss feels of ranks begins anew."""
        assert self.features is not None
        dtype = self.features.dtype
        of_features, of_gradients = basis.of_features, basis.of_gradients
        self.total = (of_features.mT @ self.total.double().unsqueeze(-1)).squeeze(-1).to(dtype)
        self.features = (of_features.mT @ self.features.double() @ of_features).to(dtype)
        if self.gradients is not None:
            self.gradients = (of_gradients.mT @ self.gradients.double() @ of_gradients).to(dtype)
        self.squares, self.tails = torch.zeros_like(self.squares), torch.zeros_like(self.tails)


class DataBasis(NamedTuple):
    """Factors whose ranks are ordered by what they do on data.

    Attributes:
        factors: U, s and V, columns of unit length that are not orthogonal.
        carried: What each rank carries in the metric, (r,), summed over groups, descending.
        of_features: Features in this basis are its transpose times those before, (groups, r, r).
        of_gradients: The same for gradients.
    """

    factors: Factors
    carried: Tensor
    of_features: Tensor
    of_gradients: Tensor


@torch.no_grad()
def features_of(layer: SVDLayer, x: Tensor) -> Tensor:
    """What a layer's ranks make of its input, in float32 or wider, as the first of two layers puts it out."""
    with exact_products(x.device):
        _, right = layer.form.left_right()
        return layer.view.apply_first(x if layer.view.layer_type is nn.Embedding else wide(x), wide(right))


def _by_position(layer: SVDLayer, between: Tensor) -> Tensor:
    """Features as (groups, positions, r)."""
    by_input, groups = layer.view.by_input(between), layer.view.groups
    return by_input.reshape(-1, groups, by_input.shape[-1] // groups).movedim(1, 0)


def _by_input(scores: Tensor, inputs: int, rank: int) -> Tensor:
    """Scores (s, positions, groups * r) as (inputs, r), summed over positions and groups.

    Which of the first two dimensions counts inputs, or whether the first one holds several for each, is seen by their
    sizes; where none fits all are one.
    """
    first, positions, _ = scores.shape
    scores = scores.reshape(first, positions, -1, rank).sum(-2)
    if first == inputs:
        return scores.sum(1)
    if positions == inputs:
        return scores.sum(0)
    if first % inputs == 0:
        return scores.reshape(inputs, -1, rank).sum(1)
    return scores.sum((0, 1)).unsqueeze(0)


@torch.no_grad()
def in_metric_of_data(left: Tensor, right: Tensor, seen: Statistics, of_loss: bool) -> DataBasis:
    """The same matrix in factors whose ranks are ordered by what they do on data, the most first.

    With S = E[z z^T] and G what an error of the features costs, an error ``L E R^T`` of the matrix costs tr(G E S E^T);
    the best matrix of rank k is then ``L G^(-1/2) P_k P_k^T G^(1/2) R^T``, P_k being the k leading eigenvectors of
    ``G^(1/2) S G^(1/2)``. Where errors of outputs count alike, G = L^T L: then the products with the data's inputs
    change least (Zhang et al. 2016, arXiv 1505.06798; the same as "whitening", SVD-LLM, arXiv 2403.07378). With
    gradients G = E[b b^T]: what the loss feels of them, to second order and in Kronecker factors (Martens and Grosse
    2015, arXiv 1503.05671).

    Args:
        left: L (m, r), with a leading dimension for groups.
        right: R (n, r).
        seen: On data, while these were the factors.
        of_loss: Whether gradients say what an error costs.
    """
    grouped = left.ndim > 2
    L, R = (factor.double() if grouped else factor.double().unsqueeze(0) for factor in (left, right))
    assert seen.features is not None
    features = seen.features.double() / max(1, seen.positions)
    features = _shrunk(features, R.mT @ R, seen.positions, LEAST_WHITE)
    costs = plain = L.mT @ L
    if of_loss:
        assert seen.gradients is not None
        costs = _shrunk(seen.gradients.double() / max(1, seen.inputs), plain, seen.positions, LEAST_PLAIN)
    values, vectors = torch.linalg.eigh(costs)
    largest = values.amax(-1, keepdim=True)
    values = values.maximum(largest * torch.finfo(torch.float32).eps ** 2)
    # A weight of zeros costs nothing, whatever becomes of it.
    roots = values.where(largest > 0, torch.ones_like(values)).sqrt().unsqueeze(-2)
    root, inverse = (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
    carried, basis = torch.linalg.eigh(root @ features @ root)
    carried, basis = carried.flip(-1).clamp_min(0) * (largest > 0), basis.flip(-1)
    of_left, of_right = inverse @ basis, root @ basis
    U, V, tiny = L @ of_left, R @ of_right, torch.finfo(values.dtype).tiny
    u, v = (torch.linalg.vector_norm(factor, dim=-2).clamp_min(tiny) for factor in (U, V))
    found = U / u.unsqueeze(-2), u * v, V / v.unsqueeze(-2)
    factors = Factors(*(_wide_like(factor if grouped else factor.squeeze(0), left) for factor in found))
    return DataBasis(factors, _wide_like(carried.sum(0), left), of_right / v.unsqueeze(-2), of_left * v.unsqueeze(-2))


def _wide_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` in the dtype of ``like``, or in float32 if that is wider."""
    return tensor.to(torch.promote_types(like.dtype, torch.float32))


def _shrunk(moments: Tensor, target: Tensor, samples: int, least: float) -> Tensor:
    """Moments (groups, r, r) mixed with others of the same trace, by as much as samples are few for so many directions.

    The share is that of the oracle approximating shrinkage (Chen et al. 2010, arXiv 0907.4698), which takes samples to
    be independent.
    """
    tiny, size = torch.finfo(moments.dtype).tiny, moments.shape[-1]
    trace, of_target = (each.diagonal(dim1=-2, dim2=-1).sum(-1) for each in (moments, target))
    squared = moments.square().sum((-2, -1))
    spread = (squared - trace.square() / size).clamp_min(tiny)
    share = ((1 - 2 / size) * squared + trace.square()) / ((samples + 1 - 2 / size) * spread)
    share = share.clamp(least, 1).view(-1, 1, 1)
    # Of what is all zero (features, or gradients that never came) a trace of the others is left, and so their order.
    scale = (trace.clamp_min(torch.finfo(torch.float32).tiny) / of_target.clamp_min(tiny)).view(-1, 1, 1)
    return (1 - share) * moments + share * scale * target
