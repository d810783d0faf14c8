"""What goes through the ranks of a layer on data, and what a loss feels of it.

A factorized layer computes ``L (R^T x)``: its ranks' features z = R^T x, one number for each rank and position, are all
that its output depends on, and b = L^T dL/dy is the gradient that comes back to them. Everything here is sums of
products of z and b, so that those of several batches, and of several processes, add up; in this way a linear layer, a
convolution in either mode, a transposed or a grouped one, an embedding and a part of an LSTM are all the same.

A layer that trains its dense weight W (m, n) is one of such factors too: I and W^T where it has no more outputs than
inputs, so that z is its output and b the gradient that comes back to it, W and I otherwise, so that z is its input.
What is found there needs no decomposition ahead of it; a :class:`Basis` says what the features of other factors are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_svd.layers.forms import DenseForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors, exact_products, svd, wide

# The least share of a metric that is of white inputs, or of plain outputs: it bounds what moments of few samples say of
# directions that were hardly seen.
LEAST_WHITE = 0.01
LEAST_PLAIN = 0.05
# A root of a metric is inverted in the dtype of the moments where |C| |C^-1| (Frobenius) is at most so often its size.
WELL_CONDITIONED = 30.0


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
        like, rank, groups = wide(layer.form.trained[0].detach()[:0]), layer.rank, layer.view.groups
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
                raise NotFiniteError(f"`{layer.svd_name}`: NaN or infinity in what it is given")
            self.positions += features.shape[1]
            self.total += features.sum(1)
            if self.features is not None:
                self.features.baddbmm_(features.mT, features)  # without another matrix of that size

    def see_gradient(self, layer: SVDLayer, between: Tensor, gradient: Tensor, inputs: int) -> None:
        """Take note of the gradient of a call's output, in a batch of so many inputs.

        Raises:
            NotFiniteError: If it is NaN or infinite; the message names the layer.
        """
        with torch.no_grad(), exact_products(gradient.device):
            back = _back(layer, between, gradient, self.checks)
            if self.gradients is not None:
                backs = _by_position(layer, back)
                self.gradients.baddbmm_(backs.mT, backs)
            self._score(_by_input(layer.view.by_input(between * back), inputs, layer.rank))

    def _score(self, scores: Tensor) -> None:
        """Take note of z_i b_i of a call, (inputs, r)."""
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

    def clear(self) -> None:
        """Begin anew."""
        self.inputs = self.positions = 0
        for tensor in self.sums().values():
            tensor.zero_()

    def felt(self) -> Tensor:
        """What the loss feels of each rank, per input, as a share of what dropping several adds up to, (r,).

        The mean of two estimates of what is lost with the ranks from i on: the sum of the squares, as if ranks were
        independent, and the square of their sum.
        """
        falling = self.tails.flip(-1).cummax(-1).values.flip(-1)  # to drop more is never better
        alone = falling - torch.cat([falling[1:], falling.new_zeros(1)])
        return (self.squares + alone) / (2 * max(1, self.inputs))


class Felt:
    """What a loss feels of the ranks of several bases, while the layer computes in the form that it has.

    Attributes:
        each: Of each basis, without moments.
    """

    def __init__(self, layer: SVDLayer, bases: Sequence[Basis]) -> None:
        self.each = [Statistics(layer, with_gradients=True, with_moments=False) for _ in bases]
        # A basis in float64 is for factors; what is summed is as precise as features are.
        dtype = self.each[0].total.dtype if bases else None
        self._of_features = [basis.of_features.to(dtype) for basis in bases]
        self._of_gradients = [
            first if basis.of_gradients is basis.of_features else basis.of_gradients.to(dtype)
            for basis, first in zip(bases, self._of_features, strict=True)
        ]

    def see(self, layer: SVDLayer, between: Tensor) -> None:
        """Nothing is to be known of features alone."""

    def see_gradient(self, layer: SVDLayer, between: Tensor, gradient: Tensor, inputs: int) -> None:
        """As of :class:`Statistics`."""
        with torch.no_grad(), exact_products(gradient.device):
            back = layer.view.by_input(_back(layer, between, gradient))
            between = layer.view.by_input(between)
            for statistics, first, second in zip(self.each, self._of_features, self._of_gradients, strict=True):
                products = _times(between, first) * _times(back, second)
                statistics._score(_by_input(products, inputs, layer.rank))

    def end_batch(self, inputs: int) -> None:
        """As of :class:`Statistics`."""
        for statistics in self.each:
            statistics.end_batch(inputs)


class Basis(NamedTuple):
    """Ranks ordered by what they do on data, as combinations of those that a layer has, of any length.

    Attributes:
        carried: What each rank carries in the metric, (r,), summed over groups, descending.
        of_features: Features in this basis are its transpose times those before, (groups, r, k).
        of_gradients: The same for gradients; the inverse of the other one's transpose where k = r.
    """

    carried: Tensor
    of_features: Tensor
    of_gradients: Tensor

    def cut(self, rank: int) -> Basis:
        """With the leading so many ranks in storage of just that size; what is carried stays whole."""
        if rank >= self.of_features.shape[-1]:
            return self
        first = self.of_features[..., :rank].clone()
        same = self.of_gradients is self.of_features
        return self._replace(of_features=first, of_gradients=first if same else self.of_gradients[..., :rank].clone())

    def factors(self, left: Tensor | None, right: Tensor | None, rank: int) -> Factors:
        """U, s and V of the leading ranks, columns of unit length, in float32 or wider.

        Args:
            left: L (m, r) of the layer, with a leading dimension for groups; None for the identity.
            right: R (n, r), alike.
            rank: How many.
        """
        with torch.no_grad(), exact_products(self.of_features.device):
            given = left if left is not None else right
            assert given is not None
            bases = [each[..., :rank] for each in (self.of_gradients, self.of_features)]
            bases = bases if given.ndim > 2 else [each.squeeze(0) for each in bases]
            (U, u), (V, v) = (
                _unit_columns(_combined(factor, basis)) for factor, basis in zip((left, right), bases, strict=True)
            )
            dtype = torch.promote_types(given.dtype, torch.float32)
            return Factors(U.to(dtype), (u * v).to(dtype), V.to(dtype))

    def dropped(self, left: Tensor | None, right: Tensor | None, features: Tensor, rank: int) -> Tensor:
        """What the ranks beyond a rank put out, (groups, m), for the layer's own features (groups, r)."""
        with torch.no_grad(), exact_products(features.device):
            of_gradients, of_features = self.of_gradients[..., :rank], self.of_features[..., :rank]
            given = features.to(of_features.dtype).unsqueeze(-1)
            rest = given - of_gradients @ (of_features.mT @ given)
            return (rest if left is None else left.to(rest.dtype) @ rest).squeeze(-1)


def sides(layer: SVDLayer, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """L and R of a layer that trains this dense weight, with None for the identity.

    Args:
        layer: For the shapes.
        weight: Its dense weight.
    """
    matrix = layer.view.unfold(weight.detach())
    m, n = layer.matrix_shape
    return (None, matrix.mT) if m <= n else (matrix, None)


def features_of(layer: SVDLayer, x: Tensor, out: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """What a layer's ranks make of its input, in float32 or wider, as the first of two layers puts it out.

    Args:
        layer: In any form.
        x: What it is given.
        out: What it made of it, if that is known: where it is the features, nothing is computed again.
        bias: What was added to it.
    """
    with torch.no_grad(), exact_products(x.device):
        x = x if x.layout is torch.strided else x.to_dense()
        precise = torch.get_float32_matmul_precision() == "highest"
        if out is not None and precise and _are_outputs(layer) and out.dtype == wide(layer.form.trained[0][:0]).dtype:
            along = () if bias is None else (*bias.shape, *[1] * len(layer.view.kernel))
            return out.detach().clone() if bias is None else out.detach() - bias.detach().view(along)
        if _are_inputs(layer):
            return wide(x.detach()).clone()
        _, right = layer.form.left_right()
        return layer.view.apply_first(x if layer.view.layer_type is nn.Embedding else wide(x), wide(right))


def _are_outputs(layer: SVDLayer) -> bool:
    """Whether a layer's features are its very outputs, but for the bias."""
    m, n = layer.matrix_shape
    return isinstance(layer.form, DenseForm) and m <= n and layer.view.output_is_product


def _are_inputs(layer: SVDLayer) -> bool:
    """Whether a layer's features are its very inputs."""
    (m, n), view = layer.matrix_shape, layer.view
    return isinstance(layer.form, DenseForm) and m > n and not view.kernel and view.layer_type is not nn.Embedding


def _back(layer: SVDLayer, between: Tensor, gradient: Tensor, checks: bool = True) -> Tensor:
    """The gradient that comes back to a layer's features, shaped as they are.

    Raises:
        NotFiniteError: If it is NaN or infinite; the message names the layer.
    """
    gradient = wide(gradient.detach())
    if _are_outputs(layer):
        back = gradient
    else:
        left = wide(layer.form.left_right()[0].detach())
        if not layer.view.kernel:
            back = gradient @ left
        else:
            with torch.enable_grad():
                between = between.detach().requires_grad_()
                (back,) = torch.autograd.grad(layer.view.apply_second(between, left, None), between, gradient)
    if checks and not torch.isfinite(back).all():
        raise NotFiniteError(f"`{layer.svd_name}`: NaN or infinity among the gradients of its output")
    return back


def _times(by_input: Tensor, basis: Tensor) -> Tensor:
    """Features (s, positions, groups * r) in another basis (groups, r, r)."""
    if len(basis) == 1:
        return by_input @ basis[0]
    parts = by_input.reshape(*by_input.shape[:-1], len(basis), -1)
    return torch.einsum("spgr,grk->spgk", parts, basis).flatten(2)


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
def bases_of(left: Tensor | None, right: Tensor | None, seen: Statistics, of_loss: Sequence[bool]) -> list[Basis]:
    """Bases whose ranks are ordered by what they do on data, the most first, in one metric or several.

    With S = E[z z^T] and G what an error of the features costs, an error ``L E R^T`` of the matrix costs tr(G E S E^T);
    the best matrix of rank k is then ``L C^-T P_k P_k^T C^T R^T``, with G = C C^T, P_k being the k leading eigenvectors
    of ``C^T S C``. Where errors of outputs count alike, G = L^T L: then the products with the data's inputs change
    least (Zhang et al. 2016, arXiv 1505.06798; the same as "whitening", SVD-LLM, arXiv 2403.07378). With gradients
    G = E[b b^T]: what the loss feels of them, to second order and in Kronecker factors (Martens and Grosse 2015, arXiv
    1503.05671). It is computed in the dtype of the moments; where a metric is too far from white to be inverted there,
    in float64.

    Args:
        left: L (m, r), with a leading dimension for groups; None for the identity.
        right: R (n, r), alike.
        seen: On data, while these were the factors.
        of_loss: Of each metric whether gradients say what an error costs.
    """
    assert seen.features is not None
    with exact_products(seen.features.device):
        found: dict[int, Basis] = {}
        for dtype in dict.fromkeys((seen.features.dtype, torch.float64)):
            wanted = [number for number in range(len(of_loss)) if number not in found]
            if not wanted:
                break
            plain, white = _gram(left, seen.features, dtype), _gram(right, seen.features, dtype)
            aside = None if right is None else white
            measured = _trace(white), partial(_over, target=aside)
            features, size = _normal(seen.features, seen.positions, white, seen.positions, LEAST_WHITE, *measured)
            for number in wanted:
                root = _root(left is None, plain, aside, seen if of_loss[number] else None)
                if root is not None:
                    found[number] = _basis(features, size, root)
    return [found[number] for number in range(len(of_loss))]


def spectral_basis(left: Tensor | None, right: Tensor | None, name: str = "matrix") -> Basis:
    """The basis in which a rank is a singular value, and carries its square, of a layer one of whose factors is None.

    Args:
        left: L, or None for the identity.
        right: R, alike.
        name: What to call the matrix in an error.

    Raises:
        ValueError: If it holds NaN or infinity.
    """
    given = left if left is not None else right
    assert given is not None
    assert left is None or right is None
    _, s, vectors = svd(given, name)  # tall; what the identity stands for are the combinations of its columns
    if s.ndim < 2:
        s, vectors = s.unsqueeze(0), vectors.unsqueeze(0)
    return Basis(s.square().sum(0), vectors, vectors)


class _Root(NamedTuple):
    """C of a metric ``size * C C^T``, and its inverse; None for the identity."""

    root: Tensor | None
    inverse: Tensor | None
    size: Tensor


def _root(is_identity: bool, plain: Tensor, white: Tensor | None, seen: Statistics | None) -> _Root | None:
    """Of what an error costs; None where that is for float64 to say.

    Args:
        is_identity: Whether ``plain`` is the identity.
        plain: L^T L, in the dtype to compute in.
        white: R^T R; None for the identity.
        seen: Whose gradients say it; None for errors of outputs, which count alike.
    """
    if seen is None:
        if is_identity:
            return _Root(None, None, plain.new_ones(len(plain)))
        size = _trace(plain)
        costs = plain / size.clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
    else:
        assert seen.gradients is not None
        if white is not None:
            white = white / _trace(white).clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1)
        measured = _trace(plain) if white is None else (plain * white).sum((-2, -1)), partial(_under, target=white)
        costs, size = _normal(seen.gradients, seen.inputs, plain, seen.positions, LEAST_PLAIN, *measured)
    rank, eps, narrow = costs.shape[-1], torch.finfo(costs.dtype).eps, torch.finfo(torch.float32).eps
    root, failed = torch.linalg.cholesky_ex(costs)
    if not bool(failed.any()):
        unit = torch.eye(rank, dtype=costs.dtype, device=costs.device).expand_as(costs)
        inverse = torch.linalg.solve_triangular(root, unit, upper=False)
        condition = torch.linalg.matrix_norm(root) * torch.linalg.matrix_norm(inverse)
        if bool((condition <= WELL_CONDITIONED * rank * (narrow / eps) ** 0.5).all()):
            return _Root(root, inverse, size)
    if costs.dtype != torch.float64:
        return None
    values, vectors = torch.linalg.eigh(costs)
    largest = values.amax(-1, keepdim=True)
    values = values.maximum(largest * narrow**2)
    # A weight of zeros costs nothing, whatever becomes of it.
    roots = values.where(largest > 0, torch.ones_like(values)).sqrt().unsqueeze(-2)
    return _Root((vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT, size)


def _basis(features: Tensor, size: Tensor, costs: _Root) -> Basis:
    """The eigenvectors of ``C^T S C``, as of_features ``C P`` and of_gradients ``C^-T P``."""
    root, inverse, of_costs = costs
    values, vectors = torch.linalg.eigh(features if root is None else root.mT @ features @ root)
    carried = values.flip(-1).clamp_min(0).double() * (size.double() * of_costs.double()).unsqueeze(-1)
    vectors = vectors.flip(-1)
    carried = carried.sum(0).to(size.dtype if size.dtype == torch.float64 else torch.float32)
    if root is None or inverse is None:
        return Basis(carried, vectors, vectors)
    return Basis(carried, root @ vectors, inverse.mT @ vectors)


def _gram(factor: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``A^T A`` of a factor (n, r), or of the identity for None, with a leading dimension for groups."""
    if factor is None:
        return torch.eye(like.shape[-1], dtype=dtype, device=like.device).expand_as(like)
    factor = factor.to(dtype) if factor.ndim > 2 else factor.to(dtype).unsqueeze(0)
    return factor.mT @ factor


def _normal(
    moments: Tensor,
    count: int,
    target: Tensor,
    samples: int,
    least: float,
    of_target: Tensor,
    measured: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Mean moments (groups, r, r), shrunk, in the dtype of the target and over their own trace, and that trace.

    Args:
        moments: Sums.
        count: How many they are of.
        target: What they are shrunk towards.
        samples: How many of them are independent.
        least: The least share of the target.
        of_target: The trace of the target where it is measured.
        measured: Gives a matrix with the eigenvalues that moments have there.
    """
    moments = moments.to(target.dtype)
    traces = _trace(moments).clamp_min(torch.finfo(torch.float32).tiny)
    moments = moments / traces.view(-1, 1, 1)
    return _shrunk(moments, target, samples, least, of_target, measured(moments)), traces / max(1, count)


# How few samples are for so many directions depends on the scale of each. It is measured where R is orthonormal, so
# that white inputs have white features, and is then the same for all factors of a weight.


def _over(moments: Tensor, target: Tensor | None) -> Tensor:
    """Moments of features where R is orthonormal, R^T R being the target; None for the identity."""
    if target is None:
        return moments
    size = moments.shape[-1]
    target = target / _trace(target).clamp_min(torch.finfo(torch.float32).tiny).view(-1, 1, 1) * size
    # Directions of which a weight has next to nothing say next to nothing.
    least = torch.finfo(moments.dtype).eps ** 0.5 * torch.eye(size).to(moments)
    root = torch.linalg.cholesky_ex(target + least)[0]
    half = torch.linalg.solve_triangular(root, moments, upper=False)
    whole: Tensor = torch.linalg.solve_triangular(root, half.mT, upper=False)
    return whole


def _under(moments: Tensor, target: Tensor | None) -> Tensor:
    """Moments of gradients there, but for a change of the basis."""
    return moments if target is None else moments @ target


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1)


def _combined(factor: Tensor | None, basis: Tensor) -> Tensor:
    """A factor (n, r), or the identity, times a basis (r, k), in the dtype of the wider one."""
    if factor is None:
        return basis
    dtype = torch.promote_types(factor.dtype, basis.dtype)
    combined: Tensor = factor.to(dtype) @ basis.to(dtype)
    return combined


def _unit_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of unit length, and their lengths."""
    lengths = torch.linalg.vector_norm(matrix, dim=-2).clamp_min(torch.finfo(matrix.dtype).tiny)
    return matrix / lengths.unsqueeze(-2), lengths


def _shrunk(moments: Tensor, target: Tensor, samples: int, least: float, of_target: Tensor, measured: Tensor) -> Tensor:
    """Moments (groups, r, r) mixed with others of the same trace, by as much as samples are few for so many directions.

    The share is that of the oracle approximating shrinkage (Chen et al. 2010, arXiv 0907.4698), which takes samples to
    be independent.

    Args:
        moments: To mix.
        target: With what.
        samples: How many the moments are of.
        least: The least share of the target.
        of_target: The trace of the target where traces are taken.
        measured: A matrix with the eigenvalues of the moments there.
    """
    tiny, size = torch.finfo(torch.float32).tiny, moments.shape[-1]
    trace, squared = _trace(measured), (measured * measured.mT).sum((-2, -1))
    spread = (squared - trace.square() / size).clamp_min(tiny)
    share = ((1 - 2 / size) * squared + trace.square()) / ((samples + 1 - 2 / size) * spread)
    share = share.clamp(least, 1).view(-1, 1, 1)
    # Of what is all zero (features, or gradients that never came) the order of the others is left.
    trace = trace.where(trace > 0, torch.ones_like(trace)).view(-1, 1, 1)
    # In this order: a number over the trace of zeros would be infinite.
    target = target / of_target.clamp_min(tiny).view(-1, 1, 1) * trace
    shrunk: Tensor = (1 - share) * moments + share * target
    return shrunk
