"""SVD training of layers whose U, s and V are sharded over processes by ``fully_shard``.

Parameters are never replaced: the rank in use is a prefix of their columns, and beyond it they are zero. What needs
whole columns goes through Gram matrices, products of the rows here that are added up over processes: the orthogonality
penalty, what ranks carry, and the exact factors ahead of a cut (CholeskyQR2 in float64, Yamamoto et al. 2015).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.forms import PairForm, SVDForm
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.layers.matrices import Factors, exact_products, roundoff, svd, wide
from lightning_svd.layers.shards import IN_SHARDS, range_of, reshard, rows_of, whole, why_not_by_rows
from lightning_svd.model.calls import is_compiled
from lightning_svd.model.plan import LayerPlan
from lightning_svd.model.surgery import counted_before
from lightning_svd.ranks.costs import Unit
from lightning_svd.ranks.importance import Importance, Spectrum
from lightning_svd.report.data import SVDReport, report_on
from lightning_svd.training import processes
from lightning_svd.training.policies import FallToBudget
from lightning_svd.training.recipe import Recipe
from lightning_svd.training.regularizers import SPARSITY, Penalties, Regularizer, turn_of
from lightning_svd.training.run import SVDTraining
from lightning_svd.training.trained_layers import TrainedLayers
from lightning_svd.wording import counted, few

# At most so many entries of Gram matrices of layers whose columns are made orthonormal together: 1 GB in float64, and a
# few times that while it is done.
TOGETHER = 1 << 27
NEARLY_DEPENDENT = 0.1  # how far from the identity the second Gram matrix of CholeskyQR2 may be


def check_recipe(recipe: Recipe) -> None:
    """Refuse what is asked for that does not work on shards.

    Raises:
        ValueError: Naming the argument.
    """
    policy = recipe.policy()
    chosen = {
        name: getattr(recipe, name) for name in ("target_modules", "exclude_modules", "rank_pattern", "plan_file")
    }
    given = [name for name, value in chosen.items() if value is not None]
    given += ["conv_mode"] if recipe.conv_mode != "channel" else []
    refusals = {
        f"`{(given or [''])[0]}`": ("in `configure_model`: which layers are factorized says `decompose`", not given),
        f"`target_{recipe.target[0]}`": ("`target_params` or `target_macs`", recipe.target[0] in _BUDGETS),
        "`schedule`": ("FallToBudget", isinstance(policy, FallToBudget)),
        "`importance`": ('"spectrum"', recipe.importance == "auto" or type(recipe.measure()) is Spectrum),
        "`full_rank_as`": ('"svd"', not recipe.begins_dense()),
        "`final`": ('"decomposed", and `gather_factored` afterwards', recipe.final == "decomposed"),
        "`distill`": ("False", not recipe.distill),
        "`measure_latency`": ("False", not recipe.measure_latency),
        "`regularizer`": ("one without `centralize`", not recipe.regularization().centralize),
    }
    for name, (instead, fits) in refusals.items():
        if not fits:
            raise ValueError(f"{name} does not work with sharded parameters as it is: give {instead}")


_BUDGETS = ("params", "energy", "macs")


def check_layers(layers: Mapping[str, SVDLayer]) -> None:
    """Refuse layers that are not trained as U, s and V cut by rows.

    Raises:
        ValueError: If there is none; or naming the layer.
    """
    if not layers:
        raise ValueError(
            "no layer is factorized: where parameters are sharded, call `lightning_svd.decompose` on the network in "
            "`configure_model`, and `fully_shard` after it"
        )
    for name, layer in layers.items():
        reasons = {
            "is in groups": layer.view.groups > 1,
            "is a part of another module": layer._part_of is not None,
            "was trained to its end already": isinstance(layer.form, PairForm),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"`{name}` {reason}, which does not work with sharded parameters: leave it dense")
        for key, parameter in layer.form.parameters.items():
            why_not = why_not_by_rows(parameter) if key in SVDForm.columns else None
            if why_not:
                raise ValueError(f"`{name}.{key}` {why_not}")


class PairInPlace(PairForm):
    """``A B^T`` in the storage of U and V, s being merged into them: parameters stay those that are sharded."""

    columns: ClassVar[tuple[str, ...]] = SVDForm.columns  # type: ignore[assignment]  # of three

    def left_right(self) -> tuple[Tensor, Tensor]:
        return self.parameters["U"][..., : self.rank], self.parameters["V"][..., : self.rank]


class ShardedLayers(TrainedLayers):
    """Factorized layers with sharded factors, and their optimizers.

    Args:
        model: The whole tree.
        by_name: The factorized layers in it, while their parameters are sharded.
        importance: The spectrum.

    Attributes:
        spectra: The singular values of each layer at the last :meth:`look`, in descending order.
    """

    def __init__(self, model: nn.Module, by_name: dict[str, SVDLayer], importance: Importance) -> None:
        super().__init__(model, by_name, importance, lambda: None)
        # Those that the optimizers hold. In the modules whole ones stand for a while, as those of the root module do
        # after a validation.
        self._factors = {name: Factors(*layer.form.trained) for name, layer in by_name.items()}
        self._names = {id(layer): name for name, layer in by_name.items()}
        self.spectra: dict[str, list[float]] = {}

    # ---------------------------------------------------------------------------------------------------- what is here

    def _used(self, name: str) -> Factors:
        """The rows here of U (., k) and V (., k), and s (k,) with zeros for what is elsewhere, in float64."""
        rank, (U, s, V) = self.by_name[name].rank, self._factors[name]
        values = torch.zeros(s.shape, dtype=torch.float64, device=s.device)
        start, stop = range_of(s)
        values[start:stop] = rows_of(s)
        if isinstance(self.by_name[name].form, PairForm):
            values[start:stop] = 1.0  # it is merged into the others
        return Factors(rows_of(U)[:, :rank].double(), values[:rank], rows_of(V)[:, :rank].double())

    @torch.no_grad()
    def factorize(self) -> None:
        """Look at the layers, which are factorized already.

        Raises:
            ValueError: If rows that lie in different processes are not of the same factors.
        """
        for names in self._together([*self.by_name]):
            sums = _summed([part.mT @ part for name in names for part in self._used(name)[::2]])
            for name, left, right in zip(names, sums[::2], sums[1::2], strict=True):
                shape, dtype = self.by_name[name].matrix_shape, self._factors[name].U.dtype
                if max(float(_defect(gram)) for gram in (left, right)) > roundoff(shape, dtype, 256.0):
                    raise ValueError(
                        f"`{name}`: the columns of U and V must be orthonormal, and are not: the network must have the "
                        "same weights in each process before `decompose`, call `seed_everything`"
                    )
        self.look()

    @torch.no_grad()
    def look(self) -> None:
        """Take note of the singular values that there are now; all processes must ask."""
        bad, svds = self.not_finite(), self._svds()
        pairs = [name for name in self.by_name if name not in svds]
        parts = [(U.square().sum(0), s, V.square().sum(0)) for U, s, V in map(self._used, svds)]
        sums = iter(_summed([part for of in parts for part in of]))
        found = {name: next(sums) * next(sums).square() * next(sums) for name in svds}
        found |= {name: of.s.square() for name, of, _ in self._exact_here([name for name in pairs if name not in bad])}
        found |= {name: torch.full((self.by_name[name].rank,), math.nan) for name in bad}
        self.spectra = {name: found[name].sqrt().sort(descending=True).values.tolist() for name in self.by_name}

    @torch.no_grad()
    def not_finite(self) -> dict[str, int]:
        """How many entries of a layer's factors are NaN or infinite, where any are; all processes must ask."""
        bad = [sum((~torch.isfinite(rows_of(p))).sum() for p in factors) for factors in self._factors.values()]
        (counts,) = _summed([torch.stack(bad)])  # type: ignore[arg-type]
        return {name: count for name, count in zip(self.by_name, counts.tolist(), strict=True) if count}

    def check_finite(self) -> None:
        for name, count in self.not_finite().items():
            raise ValueError(
                f"`{name}`: expected finite factors, got {count} NaN or infinite: training has diverged, and no ranks "
                "are chosen by such weights: see the loss and its gradients, and go on from a checkpoint from before"
            )

    # ---------------------------------------------------------------------------------------------------- regularizers

    @torch.no_grad()
    def add_penalties(
        self,
        layers: Sequence[SVDLayer],
        asked: Regularizer,
        sparsity_weight: float,
        scale: float,
        only: Collection[nn.Parameter],
        step: int,
    ) -> Penalties:
        """Add the regularizers' gradient to the rows here, what whole columns say in one sum for all layers."""
        parts, products = [], []
        for layer in layers:
            factors, rank = self._factors[self._names[id(layer)]], layer.rank
            turn = turn_of(rank, step)
            for parameter in factors[::2][turn.factors]:
                rows = wide(rows_of(parameter)[:, :rank])
                parts.append((parameter, rows, turn))
                with exact_products(rows.device):
                    products.append(rows.mT @ rows[:, turn.columns])
        values = [
            (self._factors[name].s, self.by_name[name].rank) for name in (self._names[id(layer)] for layer in layers)
        ]
        sums = iter(_summed(products + [_in_place(s) for s, _ in values]))
        orthogonality, defects, ranks = [], [], 0
        for parameter, rows, turn in parts:
            defect, rank = next(sums), rows.shape[1]
            defect.diagonal(-(turn.columns.start or 0)).sub_(1.0)
            weight = turn.turns * scale * asked.orthogonality_weight
            penalty = turn.turns * defect.square().sum() / rank**2
            orthogonality.append(penalty)
            defects.append(penalty * rank**2)
            ranks += rank * turn.stands_for
            if weight and parameter in only:
                with exact_products(rows.device):
                    pull = rows @ defect
                _gradient(parameter)[:, turn.columns][:, : defect.shape[1]].add_(pull, alpha=4 * weight / rank**2)
        sparsity = [torch.zeros_like(orthogonality[0])]
        for s, rank in values if asked.sparsity is not None else ():
            penalty, gradient = SPARSITY[str(asked.sparsity)](next(sums)[:rank])
            sparsity.append(penalty)
            start, stop = range_of(s)
            if sparsity_weight and s in only and start < rank:
                mine = gradient[start : min(stop, rank)]
                _gradient(s)[: len(mine)].add_(mine, alpha=scale * sparsity_weight)
        error = (torch.stack(defects).sum() / max(1, ranks)).sqrt()
        return Penalties(torch.stack(orthogonality).sum(), torch.stack(sparsity).sum(), error)

    # ---------------------------------------------------------------------------------------------------- exact factors

    @torch.no_grad()
    def refactorize(self, may_stay: Collection[str] = ()) -> dict[str, Tensor]:
        energies = {}
        for name, factors, order in self._exact_here(self._svds()):
            self._write(name, factors)
            energies[name] = factors.s.square()
            if not torch.equal(order, torch.arange(len(order), device=order.device)):
                self._move_here(name, partial(_reordered, order=order), partial(_reordered_rows, order=order))
        return energies

    def take_waiting(self, names: Sequence[str]) -> None:
        """Nothing waits: all are float32 or wider."""

    def _svds(self) -> list[str]:
        return [name for name, layer in self.by_name.items() if isinstance(layer.form, SVDForm)]

    def _together(self, names: Sequence[str]) -> Iterator[list[str]]:
        """These layers in as few groups as the memory for their Gram matrices allows.

        Unless those of a single layer are more, they are no more than the entries of all U and V here: that falls with
        the number of processes.
        """
        group, entries = list[str](), 0
        kept = sum(layer.full_rank * sum(layer.matrix_shape) for layer in self.by_name.values()) // processes.size()
        for name in names:
            mine = 2 * self.by_name[name].rank ** 2
            if group and entries + mine > min(TOGETHER, kept):
                yield group
                group, entries = [], 0
            group, entries = [*group, name], entries + mine
        if group:
            yield group

    def _exact_here(self, names: Sequence[str]) -> Iterator[tuple[str, Factors, Tensor]]:
        """Exact factors of layers, by CholeskyQR2 of U and V and an SVD of k x k in one process for each layer.

        Yields:
            Name; the rows here of U and V, and s, in float64, with the signs of the columns that they take the place
            of; and which columns these are.
        """
        bases: dict[str, tuple[_Basis, _Basis]] = {}
        inner: dict[str, tuple[Tensor, Tensor]] = {}  # of the layers whose SVD is computed here
        orders: dict[str, Tensor] = {}
        owners = {name: number % processes.size() for number, name in enumerate(names)}
        for group in self._together(names):
            for name, left, s, right in self._orthonormal(group):
                energies = left.lengths * s.square() * right.lengths
                orders[name] = energies.argsort(descending=True, stable=True)
                if owners[name] == processes.rank():
                    before = left.upper[:, orders[name]]
                    inner[name] = (left.upper * s) @ right.upper.mT, before
                left.upper = right.upper = torch.empty(0)
                bases[name] = left, right

        def compute(name: str) -> list[Tensor]:
            product, before = inner.pop(name)
            U, s, V = svd(product, name)
            signs = torch.where((U * before).sum(0) < 0, -1.0, 1.0)
            return [U * signs, s, V * signs]

        def empty(name: str) -> list[Tensor]:
            rank = len(orders[name])
            return [
                orders[name].new_empty(shape, dtype=torch.float64) for shape in ((rank, rank), (rank,), (rank, rank))
            ]

        for name, (U, s, V) in processes.shared_out(names, compute, empty):
            left, right = bases.pop(name)
            yield name, Factors(left.rows @ U, s, right.rows @ V), orders[name]

    def _orthonormal(self, names: Sequence[str]) -> Iterator[tuple[str, _Basis, Tensor, _Basis]]:
        """U, s and V of layers, U and V as orthonormal columns and what to multiply them by."""
        used = [self._used(name) for name in names]
        parameters = [parameter for name in names for parameter in self._factors[name][::2]]
        bases = [_Basis(rows) for factors in used for rows in factors[::2]]
        for _ in range(2):
            for basis, gram in zip(bases, _summed([basis.rows.mT @ basis.rows for basis in bases]), strict=True):
                basis.orthonormalize(gram)
        fails = torch.tensor([float(basis.failed) for basis in bases]).to(used[0].s)
        failed, *values = _summed([fails, *(factors.s for factors in used)])
        for basis, parameter, has_failed in zip(bases, parameters, failed.tolist(), strict=True):
            if has_failed:  # in any process, so that all of them do it
                basis.take_whole(parameter)
        yield from zip(names, bases[::2], values, bases[1::2], strict=True)

    def _write(self, name: str, factors: Factors) -> None:
        """Have these rows of U and V and all of s in the rank's columns, and zeros beyond."""
        for parameter, value in zip(self._factors[name], factors, strict=True):
            rows, width = rows_of(parameter), value.shape[-1]
            if parameter.ndim == 1:
                start, stop = range_of(parameter)
                rows.zero_()
                rows[: max(0, min(stop, width) - start)] = value[start:stop].to(rows)
            else:
                rows[:, :width] = value.to(rows)
                rows[:, width:] = 0.0

    def _move_here(self, name: str, columns: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]) -> None:
        """Have what optimizers remember of U and V, and of s, follow what was done to them."""
        U, s, V = self._factors[name]
        self._move([U, V], [U, V], columns)  # type: ignore[list-item]
        self._move([s], [s], rows)  # type: ignore[list-item]

    # ----------------------------------------------------------------------------------------------------- a lower rank

    @torch.no_grad()
    def keep(self, ranks: Mapping[str, int], may_return: bool = False) -> None:
        """Use this many ranks of each layer; the storage of the others is kept and holds zeros.

        Args:
            ranks: By name, none higher than the one in use.
            may_return: False.
        """
        for name, rank in ranks.items():
            form = self.by_name[name].form
            if not isinstance(form, SVDForm) or rank == form.rank:
                continue
            form.rank = rank
            for parameter in self._factors[name]:
                for value in (parameter, parameter.grad):
                    if value is not None:
                        _without(value, rank)
            self._move_here(name, partial(_without, rank=rank), partial(_without, rank=rank))

    def train_dense(self, names: Collection[str]) -> None:  # type: ignore[override]
        """No layer trains its dense weight: parameters stay those that are sharded."""

    @torch.no_grad()
    def train_as_final(self, pays: Callable[[str, int], bool]) -> None:
        """Train all layers as pairs without s and penalties, also those that are better dense in the end."""
        svds = self._svds()
        used = [self._used(name) for name in svds]
        for name, here, s in zip(svds, used, _summed([of.s for of in used]), strict=True):
            root, layer = s.abs().sqrt(), self.by_name[name]
            self._write(name, Factors(here.U * (root * s.sign()), torch.ones_like(s), here.V * root))
            self._as_pair(layer)
            for optimizer in self.optimizers:
                optimizer.forget(self._factors[name])  # type: ignore[arg-type]

    def _use(self, layer: SVDLayer, rank: int, is_pair: bool) -> None:
        layer.form.rank = rank
        if is_pair:
            self._as_pair(layer)

    @staticmethod
    def _as_pair(layer: SVDLayer) -> None:
        layer.form = PairInPlace(layer.view, layer.form.parameters, layer.form.rank)

    # ------------------------------------------------------------------------------------------- as what they are saved

    def exact_states(self) -> dict[str, dict[str, Any]]:
        """As for whole layers without the tensors, of which each process has rows."""
        return {
            name: {"form": layer.form.name, "rank": layer.rank, "conv_mode": layer.conv_mode, IN_SHARDS: True}
            for name, layer in self.by_name.items()
        }

    def gathered_states(self) -> dict[str, dict[str, Any]]:
        """With the tensors, in the process that writes files; none in the others, and all must ask."""
        states = {}
        for name, layer in self.by_name.items():
            factors = [whole(parameter.detach()) for parameter in self._factors[name]]
            if processes.rank() == 0:
                of = Factors(*(factor[..., : layer.rank].cpu().clone() for factor in factors))
                tensors = {"A": of.U, "B": of.V} if isinstance(layer.form, PairForm) else of._asdict()
                state = {"form": layer.form.name, "rank": layer.rank, "conv_mode": layer.conv_mode}
                states[name] = state | tensors
        return states

    def factors_by_name(self) -> dict[str, nn.Parameter]:
        """U, s and V that the optimizers hold, by the names that they have in the model."""
        return {
            f"{name}.{key}".lstrip("."): parameter
            for name, factors in self._factors.items()
            for key, parameter in factors._asdict().items()
        }

    @torch.no_grad()
    def load_exact_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        for name, state in states.items():
            layer, rank = self.by_name[name], state["rank"]
            (m, n), is_pair = layer.matrix_shape, state["form"] == "pair"
            if state.get(IN_SHARDS):  # the rows are here already
                self._use(layer, rank, is_pair)
                continue
            given = [state.get(key) for key in ("A", "B")] if is_pair else [state.get("U"), state.get("V")]
            values = torch.ones(rank) if is_pair else state.get("s")
            shapes = [tuple(value.shape) if isinstance(value, Tensor) else None for value in (*given, values)]
            if shapes != [(m, rank), (n, rank), (rank,)] or not 0 < rank <= layer.full_rank:
                raise ValueError(f"`{name}`: expected U, s, V, or A, B, of {m} x {n} at rank {rank}, got {shapes}")
            (start, stop), (begin, end) = (range_of(parameter) for parameter in self._factors[name][::2])
            self._write(name, Factors(given[0][start:stop], values, given[1][begin:end]))  # type: ignore[index,arg-type]
            self._use(layer, rank, is_pair)
        for optimizer in self.optimizers:
            optimizer.know(self.by_name.values())  # in which form they are: pairs decay


class _Basis:
    """The rows here of a factor on their way to orthonormal columns: the factor is ``rows @ upper``.

    Attributes:
        rows: Here, in float64.
        upper: Triangular, the same in all processes.
        lengths: The squares of the lengths of the columns that there were.
        failed: Whether columns are so nearly dependent that their Gram matrix does not tell.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.failed = rows, False
        self.upper = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        self.lengths: Tensor = torch.empty(0)

    def orthonormalize(self, gram: Tensor) -> None:
        """Take a step of CholeskyQR2, with the Gram matrix of all rows."""
        if self.lengths.numel():
            self.failed |= bool(_defect(gram) > NEARLY_DEPENDENT)
        else:
            self.lengths = gram.diagonal().clone()
        upper, info = torch.linalg.cholesky_ex(gram, upper=True)
        self.failed |= bool(info)
        if not self.failed:
            self.rows = torch.linalg.solve_triangular(upper, self.rows, upper=True, left=False)
            self.upper = upper @ self.upper

    def take_whole(self, parameter: Tensor) -> None:
        """The same by a QR decomposition of all rows, put together in each process; all must ask."""
        start, stop = range_of(parameter)
        rows, self.upper = torch.linalg.qr(whole(parameter)[:, : self.rows.shape[1]].double())
        self.rows = rows[start:stop]


class ShardedTraining(SVDTraining):
    """A run of SVD training of layers that were factorized and sharded before, see :class:`SVDTraining`.

    The model stays sharded when it is over, and its layers factorized: :func:`~lightning_svd.gather_factored` gives
    the small one.
    """

    _trained: ShardedLayers

    def _prepare(self, optimizers: Sequence[Optimizer], thaws: bool) -> None:
        check_recipe(self.recipe)
        reshard(self.model)
        layers = svd_layers(self.model)
        check_layers(layers)
        if any(map(is_compiled, self.model.modules())):
            raise ValueError("SVD training of sharded parameters does not work with torch.compile: leave it out")
        held = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
        for name, layer in layers.items():
            for key, parameter in layer.form.parameters.items():
                if key in SVDForm.columns and not (held[id(parameter)] == 1 and parameter.requires_grad):
                    raise ValueError(
                        f"`{name}.{key}` must be trained by one optimizer, found it in {held[id(parameter)]}, "
                        f"`requires_grad={parameter.requires_grad}`: leave it out, `exclude_modules=['{name}']`"
                    )
        self.distiller = None
        self.plan = [
            LayerPlan(name, of.view.layer_type.__name__, of.view.weight_shape, of.matrix_shape, of.conv_mode)
            for name, of in layers.items()
        ]

    def _settled(self, recipe: Recipe) -> Recipe:
        return replace(recipe, importance="spectrum") if recipe.importance == "auto" else recipe

    def _layers_to_train(self, on_reshape: Callable[[], None]) -> TrainedLayers:
        return ShardedLayers(self.model, svd_layers(self.model), self.importance)

    def _adopt(self, optimizers: Sequence[Optimizer], state: Mapping[str, Any] | None) -> None:
        super()._adopt(optimizers, state)
        self.cost = counted_before(self.model, self.layers)
        if self.recipe.target[0] == "macs":
            if not self.cost.counted:
                raise ValueError(
                    "`target_macs` needs the MACs of the model as it is before it is sharded: give `decompose` an "
                    "`example_input` in `configure_model`, or give `target_params` or `energy_threshold`"
                )
            self.recipe.check_reachable(self.cost, self.full_ranks, self.bounds, self.plan)

    def look(self) -> None:
        self._trained.look()

    def spectra(self) -> dict[str, list[float]]:
        """The singular values of each layer at the last :meth:`look`, in descending order."""
        return dict(self._trained.spectra)

    def ratio(self, unit: Unit) -> float:
        known = unit == "params" or (self.cost is not None and self.cost.counted)
        return super().ratio(unit) if known else math.nan

    def state_dict(self) -> dict[str, Any]:
        """As of any run, without the values of factors: see :meth:`gathered_states` and :meth:`factors_by_name`."""
        return super().state_dict() | {"beside": self._beside()}

    def gathered_states(self) -> dict[str, dict[str, Any]]:
        """What ``layers`` is in the state of any run, in the process that writes files; all processes must ask."""
        return self._trained.gathered_states()

    def factors_by_name(self) -> dict[str, nn.Parameter]:
        """U, s and V of all layers, sharded, by the names that they have in the model."""
        return self._trained.factors_by_name()

    def _beside(self) -> list[str]:
        of_layers = {f"{name}.{key}" for name in self.layers for key in SVDForm.columns}
        return sorted({name for name, _ in self.model.named_parameters()} - of_layers)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            ValueError: If it is of another model.
        """
        differ = sorted({*state.get("beside", ())} ^ {*self._beside()})
        if differ:
            raise ValueError(f"the checkpoint was written with other parameters, see {few(differ)}")
        super().load_state_dict(state)

    def undo(self) -> None:
        """Let go of the model and the optimizers; the layers stay as they are."""
        self.close()

    def abandon(self) -> dict[str, Any]:
        """Let go of a run that failed; nothing is put together, for which other processes would wait."""
        self.close()
        return {}

    def finish(self, arguments: Mapping[str, Any] | None = None) -> SVDReport:
        """Say what happened; the model stays as it is.

        Args:
            arguments: What the run was asked for, for the report; None for the recipe's.
        """
        self.close()
        if bad := self._trained.not_finite():
            self.warnings.append(f"{counted(len(bad), 'layer holds', 'layers hold')} NaN or infinity: {few(bad)}")
        self.look()
        known = report_on(self.plan, self.layers, self._known_cost, self.spectra_before, spectra_after=self.spectra())
        return replace(known, **self.history(), arguments=dict(arguments or self.recipe.arguments))


def _summed(parts: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all processes of tensors of one dtype and device, in one exchange."""
    if not parts:
        return []
    flat = torch.cat([part.reshape(-1) for part in parts])
    processes.add_up(flat)
    sizes = [part.numel() for part in parts]
    return [of.view(part.shape) for of, part in zip(torch.split(flat, sizes), parts, strict=True)]


def _defect(gram: Tensor) -> Tensor:
    """How far a Gram matrix is from the identity in any entry."""
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max()


def _in_place(s: Tensor) -> Tensor:
    """What is here of a vector at its place among zeros."""
    start, stop = range_of(s)
    values = torch.zeros(s.shape, dtype=torch.promote_types(s.dtype, torch.float32), device=s.device)
    values[start:stop] = rows_of(s)
    return values


def _gradient(parameter: Tensor) -> Tensor:
    """The rows here of a parameter's gradient, which it gets where it has none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return rows_of(parameter.grad)


def _without(value: Tensor, rank: int) -> Tensor:
    """With zeros beyond the first columns, or entries of a vector."""
    rows = rows_of(value)
    (rows[max(0, rank - range_of(value)[0]) :] if value.ndim == 1 else rows[:, rank:]).zero_()
    return value


def _reordered(value: Tensor, order: Tensor) -> Tensor:
    """With its first columns in this order."""
    rows = rows_of(value)
    rows[:, : len(order)] = rows[:, order]
    return value


def _reordered_rows(value: Tensor, order: Tensor) -> Tensor:
    """With its first entries in this order, of which each process holds some; all must ask."""
    all_of_them, (start, stop) = whole(value).clone(), range_of(value)
    all_of_them[: len(order)] = all_of_them[order]
    rows_of(value).copy_(all_of_them[start:stop])
    return value
