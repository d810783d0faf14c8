"""A linear layer of low rank with an identity inside, which is neither stored nor computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_svd.layers.matrices import Factors, exact_products, refactorized
from lightning_svd.layers.pairs import rank_of, view_of

LARGEST = 2.0  # of any entry of the mixing, so that it neither overflows nor takes digits from what it is added to


class IdentityLinear(nn.Module):
    """A linear layer of rank r through r of its own inputs: ``W = C [I, T] P``, in r(m + n - r) entries.

    The r chosen columns of W are C, the others are mixtures of them, T, and P brings the chosen inputs to the front: an
    interpolative decomposition (Cheng et al. 2005). Two linear layers of that rank have r(m + n) entries, which is more
    than the mn of W from a rank of mn / (m + n) on; this one has fewer than W at any rank below min(m, n).

    Args:
        inputs: Features of the input, n.
        outputs: Features of the output, m.
        rank: r.
        bias: Whether there is one.

    Attributes:
        columns: C (m, r).
        mixing: T (r, n - r), no entry larger than 2.
        order: All inputs (n,), the chosen ones first.
        bias: (m,), or None.
    """

    order: Tensor
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        self.columns = nn.Parameter(torch.zeros(outputs, rank))
        self.mixing = nn.Parameter(torch.zeros(rank, inputs - rank))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        self.register_buffer("order", torch.arange(inputs))

    @classmethod
    @torch.no_grad()
    def of(cls, pair: nn.Sequential) -> IdentityLinear:
        """The same as two linear layers, in their dtype and trained as they are, with their very bias.

        Args:
            pair: From :func:`~lightning_svd.layers.pairs.factored_pair`, of a linear layer.

        Raises:
            ValueError: If a weight holds NaN or infinity.
        """
        first, second = pair
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        rank = min(rank_of(pair), first.in_features, second.out_features)
        bias: nn.Parameter | None = second.bias
        with torch.device("meta"):
            layer = cls(first.in_features, second.out_features, rank, bias is not None)
        left, right = second.weight.double(), first.weight.double().mT
        with exact_products(left.device):
            exact = refactorized(Factors(left, torch.ones_like(left[0]), right))
            U, s, V = (factor[..., :rank] for factor in exact)
            order, mixing = chosen(V)
            columns = (U * s) @ V[order[:rank]].mT
        trained = first.weight.requires_grad
        layer.columns = nn.Parameter(columns.to(first.weight.dtype).contiguous(), trained)
        layer.mixing = nn.Parameter(mixing.to(first.weight.dtype).contiguous(), trained)
        layer.order, layer.bias = order, bias
        return layer.train(pair.training)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., m) for inputs (..., n)."""
        ordered = x.reshape(-1, self.in_features).index_select(1, self.order)
        between = torch.addmm(ordered[:, : self.rank], ordered[:, self.rank :], self.mixing.mT)
        return F.linear(between, self.columns, self.bias).reshape(*x.shape[:-1], self.out_features)

    def matrix(self) -> Tensor:
        """W (m, n), differentiable."""
        with exact_products(self.columns.device):
            ordered = torch.cat([self.columns, self.columns @ self.mixing], 1)
        return ordered.index_select(1, self.order.argsort())

    def extra_repr(self) -> str:
        """What it is, as torch's layers say it."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={bias}"


@torch.no_grad()
def chosen(V: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows of a factor the others are small mixtures of.

    Args:
        V: (n, r), r <= n, of full rank.

    Returns:
        The order of all rows, the r chosen ones first, and T (r, n - r) with ``V[order[r:]] = T.T @ V[order[:r]]`` and
        no entry larger than :data:`LARGEST`.
    """
    n, rank = V.shape
    _, pivots = torch.linalg.lu_factor(V)
    order = torch.arange(n, device=V.device)
    for row, other in enumerate((pivots - 1).tolist()):
        order[[row, other]] = order[[other, row]]
    while True:
        kept, rest = V[order[:rank]], V[order[rank:]]
        mixing = torch.linalg.solve(kept.mT, rest.mT) if n > rank else V.new_zeros(rank, 0)
        if not mixing.numel():
            break
        # Each exchange makes the chosen rows' determinant larger by that entry, so that this ends.
        largest = int(mixing.abs().argmax())
        row, other = divmod(largest, n - rank)
        if not float(mixing[row, other].abs()) > LARGEST:
            break
        order[[row, rank + other]] = order[[rank + other, row]]
    return order, mixing


def is_linear_pair(pair: nn.Sequential) -> bool:
    """Whether a :func:`~lightning_svd.layers.pairs.factored_pair` stands for ``nn.Linear``."""
    return view_of(pair).layer_type is nn.Linear


def merged_linear(layer: IdentityLinear) -> nn.Linear:
    """The new dense layer that it stands for."""
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    dense.weight = nn.Parameter(layer.matrix().detach().contiguous(), layer.columns.requires_grad)
    if layer.bias is not None:
        dense.bias = layer.bias
    return dense.train(layer.training)
