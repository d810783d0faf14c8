"""The factorized layers of one run and the optimizers that train them, which change together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_svd.layers.forms import DenseForm, PairForm, SVDForm, set_factors_of
from lightning_svd.layers.layer import Replaced, SVDLayer
from lightning_svd.layers.matrices import Factors, numerical_rank, wide
from lightning_svd.model.surgery import showing_factors
from lightning_svd.ranks.importance import Importance
from lightning_svd.training import processes
from lightning_svd.training.finite import check_trained
from lightning_svd.training.optimizers import OptimizerOfFactors
from lightning_svd.training.regularizers import Penalties, Regularizer, add_gradients

# Entries of layers that are refactorized in one stack: more do not fit a processor's cache, and nothing is gained.
STACKED = 1 << 18


class TrainedLayers:
    """Factorized layers and their optimizers: whatever becomes of a layer's parameters, the optimizers follow.

    Nothing is decided here: what a cut is to leave, is asked for by the methods' arguments.

    Args:
        model: The whole tree.
        by_name: The factorized layers in it.
        importance: In whose metric exact factors are taken.
        on_reshape: Called by :meth:`tell_of_others`, while the model shows what is trained as its parameters.

    Attributes:
        by_name: The layers; fewer when some are released.
        optimizers: That train them; none at first.
        tells: Whether others are told; not before a run has begun, when each process may fail by itself.
    """

    def __init__(
        self, model: nn.Module, by_name: dict[str, SVDLayer], importance: Importance, on_reshape: Callable[[], None]
    ) -> None:
        self.model, self.by_name, self.importance = model, by_name, importance
        self.optimizers: list[OptimizerOfFactors] = []
        self.tells = False
        self._on_reshape, self._are_others = on_reshape, False
        self._of_dense: dict[str, Factors] = {}  # exact factors of dense weights, until it is known whose ranks fall

    def train_with(self, optimizers: Sequence[Optimizer]) -> None:
        """Have these optimizers train the layers, and no others.

        Raises:
            ValueError: If one of them cannot.
        """
        known = {id(each.optimizer): each for each in self.optimizers}
        if known.keys() != {id(each) for each in optimizers}:
            layers = self.by_name.values()
            self.optimizers = [known.get(id(each)) or OptimizerOfFactors(each, layers) for each in optimizers]

    def replace(self, replaced: Sequence[Replaced]) -> None:
        """Let optimizers train parameters in the place of others."""
        for optimizer in self.optimizers:
            optimizer.replace(replaced)
        self._are_others |= any(new for _, new in replaced)

    def tell_of_others(self) -> None:
        """Tell what keeps a list of the parameters if they are others since it was told last."""
        if self._are_others and self.tells:
            self._are_others = False
            with showing_factors(self.model):
                self._on_reshape()

    def release(self, replaced: Sequence[Replaced], names: Sequence[str]) -> None:
        """Let go of layers that are plain ones again, with what is trained in the place of their factors."""
        self.replace(replaced)
        self.by_name = {name: layer for name, layer in self.by_name.items() if name not in names}
        for optimizer in self.optimizers:
            optimizer.know(self.by_name.values())
        self.tell_of_others()

    # ---------------------------------------------------------------------------------------------------- exact factors

    def factorize(self) -> None:
        """Give every layer its full-rank SVD.

        Where most singular values are zero, as in a layer that begins at zero, U and V would get no gradient: it trains
        as it is until ranks are cut.
        """
        for names, stacked in self._exact([*self.by_name]):
            for name, factors in _one_by_one(names, stacked):
                spectrum = factors.s if factors.s.ndim == 1 else factors.s.amin(0)
                if 2 * numerical_rank(spectrum, self.by_name[name].matrix_shape) >= spectrum.shape[-1]:
                    self.replace([self.by_name[name].to_svd(factors)])

    def refactorize(self, may_stay: Collection[str] = ()) -> dict[str, Tensor]:
        """Give every layer its exact factors, the strongest ranks first; returns what each rank carries.

        In half precision taking them rounds: there a layer waits until its rank falls, see :meth:`take_waiting`.

        Args:
            may_stay: Layers that wait for that too if they train a dense weight.
        """
        energies = {}
        for names, stacked in self._exact(self._not_pairs()):
            layers = [self.by_name[name] for name in names]
            for name, factors in _one_by_one(names, stacked):
                energies[name] = self.importance.values(factors)
                if isinstance(self.by_name[name].form, DenseForm):
                    layers = []
                    if name in may_stay:
                        self._of_dense[name] = factors
                    else:
                        self.replace([self.by_name[name].to_svd(factors)])
            if layers and not _is_coarse(layers[0]):
                self._take(layers, stacked)
        return energies

    def take_waiting(self, names: Sequence[str]) -> None:
        """Give those of these layers exact factors that :meth:`refactorize` left alone; the others stay as they are."""
        waiting, self._of_dense = self._of_dense, {}
        coarse = [name for name in names if name not in waiting and _is_coarse(self.by_name[name])]
        for name in waiting.keys() & {*names}:
            self.replace([self.by_name[name].to_svd(waiting[name])])
        for together, factors in self._exact(coarse):
            self._take([self.by_name[name] for name in together], factors)

    def take(self, name: str, factors: Factors, may_return: bool = False) -> None:
        """Let a layer take exact factors, (m, r), (r,) and (n, r), of a rank r below its own.

        Args:
            name: Of the layer.
            factors: In the place of its strongest ranks.
            may_return: Whether the other ranks may be used again.
        """
        layer = self.by_name[name]
        if isinstance(layer.form, DenseForm) and may_return:
            for names, stacked in self._exact([name]):
                self.replace([layer.to_svd(whole) for _, whole in _one_by_one(names, stacked)])
        if isinstance(layer.form, DenseForm):
            self.replace([layer.to_svd(factors)])
        else:
            self._take([layer], Factors(*(factor.unsqueeze(0) for factor in factors)))

    def _not_pairs(self) -> list[str]:
        return [name for name, layer in self.by_name.items() if not isinstance(layer.form, PairForm)]

    def _exact(self, names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Factors]]:
        """Exact factors of layers alike, stacked; each stack is computed in one process and the same in all."""

        def compute(stack: tuple[str, ...]) -> list[Tensor]:
            return list(self.importance.factors_of([self.by_name[name] for name in stack]))

        def empty(stack: tuple[str, ...]) -> list[Tensor]:
            layer = self.by_name[stack[0]]
            like, groups = wide(layer.form.trained[0].detach()), layer.view.groups
            leading = (len(stack), groups) if groups > 1 else (len(stack),)
            m, n = layer.matrix_shape
            return [like.new_empty((*leading, *shape)) for shape in ((m, layer.rank), (layer.rank,), (n, layer.rank))]

        for stack, tensors in processes.shared_out(_stacks(self.by_name, names), compute, empty):
            yield stack, Factors(*tensors)

    def _take(self, layers: Sequence[SVDLayer], factors: Factors) -> None:
        """Let layers alike take exact factors, stacked, in the place of those that they train."""
        forms = [layer.form for layer in layers if isinstance(layer.form, SVDForm)]
        orders = set_factors_of(forms, factors)
        stay = (orders == torch.arange(orders.shape[1], device=orders.device)).all(-1).tolist()
        for form, order, stays in zip(forms, orders.unbind(), stay, strict=True):
            if not stays:
                self._move(form.trained, form.trained, partial(_in_order, order=order))

    def check_finite(self) -> None:
        """Refuse layers whose parameters are not finite, in every process; see :func:`check_trained`."""
        processes.agree(partial(check_trained, self.by_name))

    # ---------------------------------------------------------------------------------------------------- regularizers

    def add_penalties(
        self,
        layers: Sequence[SVDLayer],
        asked: Regularizer,
        sparsity_weight: float,
        scale: float,
        only: Collection[nn.Parameter],
        step: int,
    ) -> Penalties:
        """Add the regularizers' gradient to that of these layers, see :func:`add_gradients`."""
        return add_gradients(layers, asked.orthogonality_weight, asked.sparsity, sparsity_weight, scale, only, step)

    # ------------------------------------------------------------------------------------------- as what they are saved

    def exact_states(self) -> dict[str, dict[str, Any]]:
        """The form, the rank and the very parameters of each layer."""
        return {name: layer.exact_state() for name, layer in self.by_name.items()}

    def load_exact_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what :meth:`exact_states` returned.

        Raises:
            ValueError: If one is not of its layer; the message names what differs.
        """
        for name, state in states.items():
            self.replace([self.by_name[name].load_exact_state(dict(state))])

    # --------------------------------------------------------------------------------------------- fewer ranks, or more

    def keep(self, ranks: Mapping[str, int], may_return: bool = False) -> None:
        """Use this many ranks of each layer; where they are less than half of what it stores, storage shrinks.

        A rank that returns has the vectors that it had, s = 0, and nothing is remembered of it.

        Args:
            ranks: By name.
            may_return: Whether ranks that are not used may be used again: then storage stays.

        Raises:
            ValueError: If ranks are to return that are not stored any more.
        """
        for name, rank in ranks.items():
            layer = self.by_name[name]
            if not isinstance(layer.form, SVDForm) or rank == layer.rank:
                continue
            if rank > layer.form.room:
                raise ValueError(
                    f"`schedule` asks for {rank} ranks of `{name}`, of which {layer.form.room} are stored: a policy "
                    "whose ranks return says so with each change, `Change(..., may_return=True)`, and a run is "
                    "resumed with the one that it was begun with"
                )
            before, layer.form.rank = layer.rank, rank
            if 2 * rank < layer.form.room and not may_return:
                old, new = layer.shrink()
                self._move(old, new, partial(_first_columns, rank=rank))
                continue
            parameters = layer.form.trained
            if rank > before:
                with torch.no_grad():
                    _without_columns(layer.form.parameters["s"], before)
            for parameter in parameters:
                if parameter.grad is not None:
                    _without_columns(parameter.grad, min(before, rank))
            self._move(parameters, parameters, partial(_without_columns, rank=min(before, rank)))

    def train_dense(self, names: Iterable[str]) -> None:
        """Train the dense weights of these layers, until their ranks fall."""
        for name in names:
            if isinstance(self.by_name[name].form, SVDForm):
                self.replace([self.by_name[name].to_dense()])

    def train_as_final(self, pays: Callable[[str, int], bool]) -> None:
        """Train layers as what they are going to be: pairs without s and penalties, or dense.

        Args:
            pays: Whether a layer of this name and rank is better as two.
        """
        for name, layer in self.by_name.items():
            if isinstance(layer.form, SVDForm):
                self.replace([layer.to_pair() if pays(name, layer.rank) else layer.to_dense()])

    def _move(self, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter], move: Callable[[Tensor], Tensor]) -> None:
        for optimizer in self.optimizers:
            optimizer.move_columns(old, new, move)
        self._are_others |= any(before is not after for before, after in zip(old, new, strict=True))


def _one_by_one(names: Sequence[str], stacked: Factors) -> Iterator[tuple[str, Factors]]:
    for name, *factors in zip(names, *(factor.unbind() for factor in stacked), strict=True):
        yield name, Factors(*factors)


def _stacks(layers: Mapping[str, SVDLayer], names: Sequence[str]) -> list[tuple[str, ...]]:
    """These layers in groups alike, of small ones that are trained as an SVD; others are alone."""
    alike: dict[object, list[str]] = {}
    for name in names:
        form = layers[name].form
        like = form.trained[-1]
        shapes = tuple(parameter.shape for parameter in form.trained)
        key = (form.rank, shapes, like.dtype, like.device) if isinstance(form, SVDForm) else name
        alike.setdefault(key, []).append(name)
    stacks = []
    for together in alike.values():
        entries = sum(parameter.numel() for parameter in layers[together[0]].form.trained)
        most = max(1, min(STACKED // max(1, entries), -(-len(together) // processes.size())))
        stacks += [tuple(together[start : start + most]) for start in range(0, len(together), most)]
    return stacks


def _is_coarse(layer: SVDLayer) -> bool:
    """Whether to write exact factors into a layer rounds them visibly."""
    return torch.finfo(layer.form.trained[0].dtype).bits < 32


def _in_order(value: Tensor, order: Tensor) -> Tensor:
    return value.index_select(-1, order)


def _first_columns(value: Tensor, rank: int) -> Tensor:
    return value.narrow(-1, 0, rank).clone()


def _without_columns(value: Tensor, rank: int) -> Tensor:
    value.narrow(-1, rank, value.shape[-1] - rank).zero_()
    return value
