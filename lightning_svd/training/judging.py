"""Ranks judged by what they do on data: how much each is worth, and the best factors of the ranks that are left."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors, refactorized, wide
from lightning_svd.ranks.importance import OnData, sides
from lightning_svd.ranks.statistics import Basis, Statistics
from lightning_svd.training import processes


class Verdict:
    """What ranks of layers are worth, and how layers are cut accordingly.

    Layers are left as they are. Each is judged in one process, which also cuts it; all have the same in the end, bit
    for bit.

    Args:
        layers: By name, of finite parameters, in the form in which statistics were collected.
        importance: The metric.
        seen: Statistics of layers. They are let go of one by one.

    Raises:
        ValueError: If what a layer does on data cannot be decomposed; the message names it.

    Attributes:
        values: What each rank carries, (r,), descending. Of a layer that no batch reached, what it carries of the
            weight, as if that were worth what the median layer is.
        unseen: The names of such layers.
    """

    def __init__(self, layers: Mapping[str, SVDLayer], importance: OnData, seen: dict[str, Statistics]) -> None:
        self.layers = layers
        self.unseen = [name for name in layers if name not in seen or not seen[name].positions]
        self._bases: dict[str, Basis] = {}  # of the layers that this process judges
        self._names = [*layers]
        found = {}

        def judge(name: str) -> list[Tensor]:
            mine = seen.pop(name, None)
            if mine is None or name in self.unseen:
                carried = importance.values(importance.factors(layers[name]))
            else:
                try:
                    self._bases[name] = importance.basis(layers[name], mine)
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, but not in __all__
                    raise ValueError(f"`{name}`: what it does on data cannot be decomposed: {error}") from None
                carried = self._bases[name].carried
            # What was inverted in float64 is sent as the others expect it.
            return [carried.to(_like(layers[name], ()).dtype)]

        for name, (values,) in processes.shared_out(self._names, judge, lambda name: [_like(layers[name], ())]):
            found[name] = values
        totals = torch.stack([values.sum() for values in found.values()]).tolist() if found else []
        worth = [total for name, total in zip(found, totals, strict=True) if name not in self.unseen]
        for name, total in zip(found, totals, strict=True):
            if name in self.unseen and worth and total > 0:
                found[name] = found[name] * (statistics.median(worth) / total)
        self.values = found

    def cut(self, ranks: Mapping[str, int]) -> Iterator[tuple[str, Factors]]:
        """The exact SVD of the best layer of a lower rank, for each of these layers."""

        def compute(name: str) -> list[Tensor]:
            basis = self._bases.pop(name, None)
            if name not in ranks:
                return []
            layer, rank = self.layers[name], ranks[name]
            if basis is None:
                return [factor[..., :rank] for factor in layer.form.exact(layer.svd_name)]
            return [*refactorized(basis.factors(*sides(layer), rank), layer.svd_name)]

        def empty(name: str) -> list[Tensor]:
            (m, n), rank = self.layers[name].matrix_shape, ranks.get(name)
            return [_like(self.layers[name], shape) for shape in ((m, rank), (rank,), (n, rank))] if rank else []

        # As many at a time as when they were judged, so that each is cut where its basis is.
        for name, tensors in processes.shared_out(self._names, compute, empty):
            if tensors:
                yield name, Factors(*tensors)


def _like(layer: SVDLayer, shape: tuple[int, ...]) -> Tensor:
    """Where what another process has computed of a layer is received; () for a number of each of its ranks."""
    groups = (layer.view.groups,) if layer.view.groups > 1 and shape else ()
    return wide(layer.form.trained[0].detach()).new_empty((*groups, *(shape or (layer.rank,))))
