"""What a layer's weight is trained as: the dense weight, a singular value decomposition, or a pair of two factors.

Each form is an object that knows its parameters and what they multiply to, and is made exactly from another. The ranks
that are in use are a prefix of the columns, so that a rank is one number and nothing is gathered or masked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_svd.layers.matrices import (
    Factors,
    exact_products,
    reconstruct,
    refactorized,
    singular_values,
    svd,
    truncate,
    wide,
)
from lightning_svd.layers.views import View


class Form(ABC):
    """A weight's parameters, and what they stand for.

    Attributes:
        name: "dense", "svd" or "pair".
        columns: Names of the parameters whose last dimension counts ranks.
        view: How the weight is seen as a matrix.
        parameters: By name. Where a module registers them, this is the module's own dictionary.
        rank: How many ranks are in use.
    """

    name: ClassVar[str]
    columns: ClassVar[tuple[str, ...]] = ()

    def __init__(self, view: View, parameters: dict[str, Any], rank: int) -> None:
        self.view, self.parameters, self.rank = view, parameters, rank

    @property
    def room(self) -> int:
        """How many ranks there is storage for."""
        return self.rank

    @property
    def trained(self) -> list[nn.Parameter]:
        """Its parameters, in order."""
        return [self.parameters[name] for name in self.columns]

    @property
    def requires_grad(self) -> bool:
        """Whether any of them is trained."""
        return any(parameter.requires_grad for parameter in self.trained)

    @abstractmethod
    def matrix(self) -> Tensor:
        """W (m, n), differentiable."""

    @abstractmethod
    def exact(self, name: str = "weight") -> Factors:
        """The exact SVD of W at the rank in use, in float32 or wider.

        Raises:
            ValueError: If a parameter holds NaN or infinity; it calls the layer by ``name``.
        """

    @abstractmethod
    def energies(self) -> Tensor:
        """What each stored rank carries, summed over groups, (r,), in float32 or wider; their sum is |W|_F^2."""

    @abstractmethod
    def left_right(self) -> tuple[Tensor, Tensor]:
        """Factors (m, k) and (n, k) whose product is W, differentiable."""

    @classmethod
    def shapes(cls, view: View, rank: int) -> dict[str, tuple[int, ...]]:
        """Of the parameters at a rank, by name."""
        (m, n), groups = view.matrix_shape, (view.groups,) if view.groups > 1 else ()
        sizes = {"U": (m, rank), "A": (m, rank), "s": (rank,), "V": (n, rank), "B": (n, rank)}
        return {name: (*groups, *sizes[name]) for name in cls.columns}

    def shrunk(self, rank: int) -> dict[str, nn.Parameter]:
        """The parameters at this rank, each with storage of just that size."""
        return {name: parameter_of(p.detach().narrow(-1, 0, rank), p) for name, p in self._stored().items()}

    def _stored(self) -> dict[str, nn.Parameter]:
        return {name: self.parameters[name] for name in self.columns}


class DenseForm(Form):
    """The weight itself, as the layer's own class trains it.

    Attributes:
        key: Which of the parameters it is.
        rows: Where it stands in it; None for all of it.
    """

    name = "dense"

    def __init__(self, view: View, parameters: dict[str, Any], key: str = "weight", rows: slice | None = None) -> None:
        super().__init__(view, parameters, min(view.matrix_shape))
        self.key, self.rows = key, rows
        self._last = parameters.get(key)

    @property
    def trained(self) -> list[nn.Parameter]:
        self._last = self.parameters[self.key]  # it may be another by now
        return [self._last]

    def bring_back(self) -> bool:
        """Put the parameter back into its place if it is gone; whether it was."""
        if self._last is None or self.parameters.get(self.key) is not None:
            return False
        self.parameters[self.key] = self._last
        return True

    def weight(self) -> Tensor:
        """The weight, or a view of it."""
        parameter: nn.Parameter = self.parameters[self.key]
        return parameter if self.rows is None else parameter[self.rows]

    def matrix(self) -> Tensor:
        return self.view.unfold(self.weight())

    def left_right(self) -> tuple[Tensor, Tensor]:
        matrix = self.matrix()
        m, n = self.view.matrix_shape
        identity = torch.eye(self.rank, dtype=matrix.dtype, device=matrix.device).expand(*matrix.shape[:-2], -1, -1)
        return (identity, matrix.mT) if m <= n else (matrix, identity)

    def exact(self, name: str = "weight") -> Factors:
        return svd(self.matrix(), name)

    @torch.no_grad()
    def energies(self) -> Tensor:
        return _over_groups(singular_values(self.matrix()).square())


class SVDForm(Form):
    """``U diag(s) V^T``: U (m, r), s (r,), V (n, r), with a leading dimension for groups.

    Training may make an s negative; only its magnitude counts.
    """

    name, columns = "svd", ("U", "s", "V")

    @classmethod
    def of(cls, view: View, factors: Factors, like: Tensor) -> SVDForm:
        """These factors as parameters of the dtype and device of ``like``, trained if it is."""
        trained = {key: parameter_of(factor.to(like), like) for key, factor in factors._asdict().items()}
        return cls(view, trained, factors.s.shape[-1])

    @property
    def room(self) -> int:
        size: int = self.parameters["s"].shape[-1]
        return size

    def stored(self) -> Factors:
        """All columns, those beyond the rank too."""
        return Factors(*self.trained)

    def factors(self) -> Factors:
        """U (m, k), s (k,), V (n, k), differentiable."""
        return truncate(self.stored(), self.rank)

    def left_right(self) -> tuple[Tensor, Tensor]:
        U, s, V = self.factors()
        return U * s.unsqueeze(-2), V

    def matrix(self) -> Tensor:
        return reconstruct(*self.factors())

    def exact(self, name: str = "weight") -> Factors:
        return refactorized(self.factors(), name)

    @torch.no_grad()
    def energies(self) -> Tensor:
        return _over_groups(_products(self.stored()))

    def set_factors(self, factors: Factors) -> Tensor:
        """Take these in the place of the ranks in use, with the signs of those that they take the place of.

        Args:
            factors: U (m, k), s (k,) in descending order, V (n, k), of any dtype.

        Returns:
            Which column each stood in that is most like the new one, (r,): what an optimizer remembers of a column
            goes on with the one that is like it.
        """
        return set_factors_of([self], Factors(*(factor.unsqueeze(0) for factor in factors)))[0]

    @torch.no_grad()
    def order(self) -> Tensor:
        """Column indices (r,), the ranks in use by what they carry first."""
        return _order(self.energies(), self.rank)

    def sort(self) -> Tensor:
        """Bring the ranks in use into the order of what they carry; returns which column each stood in."""
        order = self.order()
        for parameter in self.trained:
            parameter.data.copy_(parameter.data.index_select(-1, order))
        return order


class PairForm(Form):
    """``A B^T``: A (m, r) and B (n, r), the weights of the two plain layers that the layer is going to be."""

    name, columns = "pair", ("A", "B")

    @classmethod
    def of(cls, form: SVDForm) -> PairForm:
        """sqrt|s| in each of U and V, its sign in the former: exactly the product, of equal scale."""
        left, right = balanced(Factors(*map(wide, form.factors())))
        like = form.parameters["s"]
        trained = {"A": parameter_of(left.to(like), like), "B": parameter_of(right.to(like), like)}
        return cls(form.view, trained, form.rank)

    def left_right(self) -> tuple[Tensor, Tensor]:
        return self.parameters["A"], self.parameters["B"]

    def matrix(self) -> Tensor:
        left, right = self.left_right()
        return left @ right.mT

    def exact(self, name: str = "weight") -> Factors:
        left, right = self.left_right()
        return refactorized(Factors(left, torch.ones_like(left[..., 0, :]), right), name)

    @torch.no_grad()
    def energies(self) -> Tensor:
        left, right = self.left_right()
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            return wide(left).new_full((self.rank,), torch.nan)
        return _over_groups(self.exact().s.square())


FORMS: Mapping[str, type[Form]] = {kind.name: kind for kind in (DenseForm, SVDForm, PairForm)}


def balanced(factors: Factors) -> tuple[Tensor, Tensor]:
    """Left (m, k) and right (n, k) factors of equal scale, so that neither overflows in half precision; detached."""
    with torch.no_grad(), exact_products(factors.s.device):
        U, s, V = factors
        root = s.abs().sqrt()
        return U * (root * s.sign()).unsqueeze(-2), V * root.unsqueeze(-2)


# Many small layers cost what the calls cost; alike, they are stacked and cost the calls of one.


@torch.no_grad()
def exact_of(forms: Sequence[SVDForm], name: str = "weight") -> Factors:
    """The exact SVDs of forms alike, each factor stacked along a first dimension, in float32 or wider.

    Raises:
        ValueError: If a parameter of any holds NaN or infinity.
    """
    return refactorized(Factors(*map(stacked, zip(*(form.factors() for form in forms), strict=True))), name)


@torch.no_grad()
def set_factors_of(forms: Sequence[SVDForm], factors: Factors) -> Tensor:
    """:meth:`SVDForm.set_factors` of forms alike, with stacked factors; returns their stacked orders (l, r)."""
    stored = Factors(*map(stacked, zip(*(form.trained for form in forms), strict=True)))
    rank, room = factors.s.shape[-1], forms[0].room
    energies = _products(stored)
    order = _order(energies if energies.ndim == 2 else energies.sum(1), forms[0].rank)
    U, s, V = (factor.to(stored.s) for factor in factors)
    flipped = (U * _columns(stored.U, order[:, :rank])).sum(-2, keepdim=True) < 0
    values = (U.where(~flipped, -U), s, V.where(~flipped, -V))
    for key, before, value in zip(SVDForm.columns, stored, values, strict=True):
        new = value if rank == room else torch.cat([value, _columns(before, order[:, rank:])], -1)
        for form, mine in zip(forms, new.unbind(), strict=True):
            form.parameters[key].copy_(mine)
    return order


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first dimension; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack([*tensors])


def _columns(tensor: Tensor, order: Tensor) -> Tensor:
    """Of each of a stack of tensors those columns."""
    index = order.view(order.shape[0], *[1] * (tensor.ndim - 2), order.shape[1])
    return tensor.gather(-1, index.expand(*tensor.shape[:-1], -1))


def _order(energies: Tensor, rank: int) -> Tensor:
    parts = energies.tensor_split([rank], -1)
    used, others = (part.argsort(dim=-1, descending=True, stable=True) for part in parts)
    return torch.cat([used, rank + others], -1)  # the others stay behind


def _products(factors: Factors) -> Tensor:
    """``s^2 |u|^2 |v|^2`` of each column, in float32 or wider."""
    U, s, V = map(wide, factors)
    return s.square() * U.square().sum(-2) * V.square().sum(-2)


def _over_groups(energies: Tensor) -> Tensor:
    return energies if energies.ndim == 1 else energies.sum(0)


def parameter_of(value: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of its own with these values, trained as ``like`` is, with the plain attributes that it was given."""
    # clone: a view would keep, and save, the whole storage.
    parameter = nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), like.requires_grad)
    noted = {key: value for key, value in vars(like).items() if isinstance(value, (bool, int, float, str))}
    vars(parameter).update(noted)  # a rate of its own, say, that the user's optimizer asks for
    return parameter
