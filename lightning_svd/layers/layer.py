"""Layers whose weight is trained as a singular value decomposition, and are still what they were.

The class of a factorized layer derives from the layer's own, and its attributes, hooks, bias and the user's own parts
stay. The forward pass computes in the cheaper of two ways: rebuild W and apply it once, or apply the two factors one
after the other.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from lightning_svd.layers.dense_weight import DenseWeight, refuse_in_transforms
from lightning_svd.layers.forms import FORMS, DenseForm, Form, PairForm, SVDForm, balanced, parameter_of
from lightning_svd.layers.matrices import Factors, exact_products, roundoff, svd, wide
from lightning_svd.layers.pairs import bias_of, empty_dense, factored_pair, fill, layout_of
from lightning_svd.layers.shards import is_sharded
from lightning_svd.layers.views import View, supported_type

State = dict[str, Any]
Replaced = tuple[list[nn.Parameter], list[nn.Parameter]]  # what is no longer trained, and what is in its place


class FactorizedModule(nn.Module):
    """What stands for a module of the user's and trains other parameters than it shows."""

    svd_name: str
    shows_factors: bool

    def shown_parameters(self) -> dict[str, nn.Parameter]:
        """Its own parameters as the rest of the model sees them."""
        return dict(self._parameters)  # type: ignore[arg-type]

    def true_parameters(self) -> dict[str, nn.Parameter]:
        """Its own parameters as they are trained, under names that are unique in it."""
        raise NotImplementedError

    def set_true_parameters(self, parameters: dict[str, nn.Parameter]) -> None:
        """Take these after they were moved."""
        raise NotImplementedError

    @contextmanager
    def showing_factors(self) -> Iterator[None]:
        """Have ``parameters()`` give what is trained inside, for what must know it: a move to a device, DDP."""
        shown, true = dict(self._parameters), self.true_parameters()
        self._parameters.clear()
        self._parameters.update(true)
        try:
            yield
        finally:
            true = cast("dict[str, nn.Parameter]", dict(self._parameters))
            self._parameters.clear()
            self._parameters.update(shown)
            self.set_true_parameters(true)

    def __prepare_scriptable__(self) -> Any:
        # torch.jit.script asks every module for what it is to compile.
        self.refuse_to_be_written_down("torch.jit.script")

    def refuse_to_be_written_down(self, by: str) -> NoReturn:
        """Refuse a program made of the model, which would hold the weight that is shown and not what is trained.

        Args:
            by: What writes it.

        Raises:
            RuntimeError: Naming the layer, and what to give instead.
        """
        of_plain_layers = "`to_factored(model)`" if self.shows_factors else "a copy, `copy.deepcopy(model)`"
        logger = ". `log_graph=True` of a TensorBoardLogger traces: turn it off" if by == "torch.jit.trace" else ""
        raise RuntimeError(
            f"`{self.svd_name}` cannot be taken by `{by}` while it trains U, s and V in the place of its weight: "
            f"give it {of_plain_layers}, which has plain layers, or the model after the fit{logger}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # torch's one place for .to(), .half(), .cuda(): what is moved are the factors.
        with self.showing_factors():
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]


class Whole(Protocol):
    """A module of several weight matrices, for what it shows of the layers that are its parts."""

    def dense_form(self, part: Any, view: View) -> DenseForm:
        """The form of a part that trains its dense weight: its own parameter, or rows of one that several share."""

    def own_weight(self, part: Any) -> Replaced:
        """Have a part that trains its dense weight do so by a parameter ``weight`` of its own."""

    def name_of_weight(self, part: Any) -> str:
        """How the weight of a part is called in an error."""

    def parts_changed(self) -> None:
        """A part trains other parameters by now."""

    def factored_up_to(self, part: Any) -> int:
        """The highest rank at which two factors of a part are multiplied with: above it they are multiplied out."""


@contextmanager
def watching(layers: Iterable[SVDLayer], watch: Watch) -> Iterator[None]:
    """Have layers tell of what goes through them inside."""
    watched = list(layers)
    for layer in watched:
        vars(layer)["watch"] = watch
    try:
        yield
    finally:
        for layer in watched:
            vars(layer)["watch"] = None


def marks_of_gradients(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int]]:
    """What tells the gradients that are there now from others, and from what a backward pass adds to them."""
    return [(id(p.grad), p.grad._version) for p in parameters if p.grad is not None]


class _Before(NamedTuple):
    """What a layer was when another weight was loaded, to be put back exactly.

    Attributes:
        weight: Its weight.
        factors: What was trained.
        place: Rank and shapes, which must be the same for that.
        gradients: The marks of those that were there.
        is_own: Whether these are of the factors that were put in place.
    """

    weight: Tensor
    factors: list[Tensor]
    place: tuple[Any, ...]
    gradients: list[tuple[int, int]]
    is_own: bool


class Repeats(Protocol):
    """What knows of layers that run several times in one call of the model."""

    def times_of(self, layer: SVDLayer) -> int:
        """For how many calls the weight that is rebuilt in the present one is going to serve."""

    def matrix(self, layer: SVDLayer) -> Tensor:
        """W (m, n), the same in all of them."""


class SVDLayer(FactorizedModule):
    """Base of all factorized layers, which train U, s and V of their weight.

    The class of each derives from this one and from the layer's own.

    Attributes:
        view: How the layer's weight is seen as a matrix.
        form: What the weight is trained as, with its parameters.
        svd_name: How the layer is called in errors and reports.
        shows_factors: Whether ``parameters()`` gives U, s and V instead of the dense ``weight``.
        layout: How the dense weight lies in memory.
        watch: What is told of each input and output, and gives the output that goes on; for a few batches only.
        repeats: What has the layer rebuild its weight once for several calls; None where each call is by itself.
    """

    view: View
    form: Form
    svd_name: str
    shows_factors: bool
    layout: torch.memory_format
    watch: Watch | None
    repeats: Repeats | None = None
    _face: DenseWeight
    _remembered: _Before | None
    _loaded: tuple[Tensor, tuple[Any, ...]] | None
    _part_of: Whole | None = None

    # What it is

    @property
    def full_rank(self) -> int:
        """min(m, n)."""
        return min(self.view.matrix_shape)

    @property
    def rank(self) -> int:
        """How many ranks are in use."""
        return self.form.rank

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n): outputs and inputs of the layer seen as a matrix, of each group."""
        return self.view.matrix_shape

    @property
    def conv_mode(self) -> str | None:
        """The matrix that a convolution is seen as; None for other layers."""
        return self.view.conv_mode

    @property
    def dense_params(self) -> int:
        """Entries of the dense weight."""
        return self.view.dense_params

    @property
    def params_per_rank(self) -> int:
        """Entries that one rank costs in two plain layers, s merged into them."""
        return self.view.params_per_rank

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}/{self.full_rank}, form={self.form.name}"

    # What it computes

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The dense layer's output, computed in the cheaper way for this input."""
        (x, *more) = (*args, *kwargs.values())
        if isinstance(x, Proxy):  # torch.fx: a layer of torch's is taken whole, and not what is inside
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), args, kwargs)  # type: ignore
        if any(value is not None for value in more) or (self.form.name == "dense" and self.watch is None):
            return super().forward(*args, **kwargs)  # type: ignore[no-any-return]  # of the layer's own class
        if torch.jit.is_tracing() and not self.shows_factors:  # type: ignore[attr-defined, no-untyped-call]
            self.refuse_to_be_written_down("torch.jit.trace")
        given, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if self.form.name != "dense" and given is not None and type(given) is not DenseWeight:
            refuse_in_transforms(given)
            return self.view.apply_matrix(x, self.view.unfold(given), bias)  # by torch.func.functional_call
        return self.output_with(x, bias)

    def output_with(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """What :meth:`forward` computes of what is trained in the place of the weight, with this bias."""
        out = self.computed(x, bias)
        return out if self.watch is None else _told(self, x, out, bias)

    def computed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """:meth:`output_with` without anybody being told of it."""
        if self.form.name == "dense":
            return self.view.apply_matrix(x, self.form.matrix(), bias)
        times = 1 if self.repeats is None else self.repeats.times_of(self)
        if self.rebuilding_is_cheaper(x.shape, times):
            matrix = self.form.matrix() if self.repeats is None or times == 1 else self.repeats.matrix(self)
            return self.view.apply_matrix(x, matrix, bias)
        if isinstance(self.form, SVDForm) and self.view.layer_type is nn.Linear:
            return self._scaled(x, *self.form.factors(), bias)
        return self.view.apply_factors(x, *self.form.left_right(), bias)

    def _scaled(self, x: Tensor, U: Tensor, s: Tensor, V: Tensor, bias: Tensor | None) -> Tensor:
        """``x V diag(s) U^T``, the smaller of the features and U scaled by s."""
        between = self.view.apply_first(x, V)
        if between.numel() < U.numel() and between.dtype == s.dtype:  # in half precision s would lose digits
            return self.view.apply_second(between * s, U, bias)
        return self.view.apply_second(between, U * s, bias)

    def rebuilding_is_cheaper(self, input_shape: tuple[int, ...], calls: int = 1) -> bool:
        """Whether k*m*n to rebuild W plus the dense layer costs no more than applying two factors of rank k.

        Args:
            input_shape: Of the layer's input, batch included.
            calls: How many calls like this W is rebuilt for.
        """
        rank, view = self.rank, self.view
        axes = len(view.kernel)
        if axes and len(input_shape) not in (axes + 1, axes + 2):
            return True  # the dense layer's to refuse
        rebuild = rank * view.dense_params / calls + view.dense_macs(input_shape)
        return rank == 0 or rebuild <= rank * view.macs_per_rank(input_shape)

    def rebuilt(self) -> Tensor:
        """The dense weight these parameters stand for, differentiable; one that was just loaded, as it was."""
        weight, loaded = self.view.fold(self.form.matrix()), self.just_loaded()
        if not isinstance(self.form, DenseForm):
            # In memory as the dense weight is: `view`, and files of bytes, need that.
            weight = weight.contiguous(memory_format=self.layout)
        if loaded is None:
            return weight
        return loaded + (weight - weight.detach()) if weight.requires_grad else loaded  # 0, with a gradient

    def factors(self) -> Factors:
        """U (m, k), s (k,), V (n, k) of a layer that is trained as an SVD, differentiable; its exact SVD otherwise."""
        return self.form.factors() if isinstance(self.form, SVDForm) else self.form.exact(self.svd_name)

    # Its spectrum

    def energies(self) -> Tensor:
        """What each stored rank carries, (r,), in float32 or wider."""
        return self.form.energies()

    def singular_values(self) -> Tensor:
        """Those in use in descending order, (k,), the root of the sum of squares over groups.

        Of a layer that is trained as an SVD they are read off as what each rank carries, |s| |u| |v|; of another they
        cost an SVD.
        """
        return self.energies()[: self.rank].sqrt().sort(descending=True).values

    def spectrum(self) -> list[float]:
        """:meth:`singular_values` as numbers."""
        return cast("list[float]", self.singular_values().tolist())

    # From one form into another; each says which parameters took the place of which

    def to_svd(self, factors: Factors | None = None) -> Replaced:
        """Train U, s and V from now on.

        Args:
            factors: Of the weight, if they are known; its exact SVD otherwise.

        Raises:
            ValueError: If the weight holds NaN or infinity; it is then as it was.
        """
        if factors is None:
            factors = self.form.exact(self.svd_name)
        return self._take(SVDForm.of(self.view, factors, self._like()))

    def to_pair(self) -> Replaced:
        """Train the two plain layers that the layer is going to be from now on; from an SVD."""
        assert isinstance(self.form, SVDForm)
        return self._take(PairForm.of(self.form))

    def to_dense(self, weight: Tensor | None = None) -> Replaced:
        """Train the dense weight from now on.

        Args:
            weight: If it is known; otherwise what the parameters multiply to.
        """
        if isinstance(self.form, DenseForm):
            return [], []
        old, like = self.form.trained, self._like()
        with torch.no_grad(), exact_products(like.device):
            values = self.rebuilt().to(like).clone(memory_format=self.layout) if weight is None else weight
        face = self._face
        self._hide_factors()
        plain = face.give_back(values)
        plain.requires_grad_(like.requires_grad)
        if self._parameters.get("weight") is None:  # torch's older weight norm takes it out before it is refused
            self._parameters["weight"] = plain
        self.form = DenseForm(self.view, self._parameters)
        self._tell()
        return old, [plain]

    def _take(self, form: Form) -> Replaced:
        old, new = self.form.trained, form.trained
        open_ = self.shows_factors
        if isinstance(self.form, DenseForm):
            old, beside = self._part_of.own_weight(self) if self._part_of else (old, old)
            vars(self)["_face"] = DenseWeight.take_over(self._parameters["weight"], self)  # type: ignore[arg-type]
            # vars: past nn.Module, which would register it.
            new = [trained for p in beside for trained in (new if p is self._face else [p])]
        elif open_:
            self._hide_factors()
        self.form = form
        if open_:
            self._show_factors()
        self._tell()
        return old, new

    def _tell(self) -> None:
        if self._part_of:
            self._part_of.parts_changed()

    def keep(self, rank: int) -> None:
        """Use this many ranks, the strongest; of a layer that is trained as an SVD.

        Raises:
            ValueError: If there is no room for so many.
        """
        if rank != int(rank) or not 0 <= rank <= self.form.room:
            raise ValueError(f"`rank` must be in [0, {self.form.room}], got {rank!r}")
        if isinstance(self.form, SVDForm) and rank != self.rank:
            self.form.sort()
        self.form.rank = rank

    def shrink(self) -> Replaced:
        """Let go of the storage of ranks that are not in use."""
        if self.form.room == self.rank:
            return [], []
        old, new = self.form.trained, self.form.shrunk(self.rank)
        self.form.parameters.update(new)
        self._tell()
        return old, self.form.trained

    # As what it was saved

    def exact_state(self) -> State:
        """The form, the rank and the very parameters, as tensors, numbers and strings; a dense weight is left out."""
        tensors = {key: self.form.parameters[key].detach() for key in self.form.columns}
        state = {"form": self.form.name, "rank": self.rank, "conv_mode": self.conv_mode, **tensors}
        if self._part_of and isinstance(self.form, DenseForm):
            state["alone"] = self.form.rows is None  # once a part trained as something else, it shares no parameter
        return state

    def load_exact_state(self, state: State) -> Replaced:
        """Take up what :meth:`exact_state` returned.

        Raises:
            ValueError: If it is not of this layer; the message names what differs.
        """
        kind = FORMS.get(state.get("form"))  # type: ignore[arg-type]
        if kind is DenseForm:
            old, new = self.to_dense(self.just_loaded())
            if state.get("alone") is True and self._part_of and isinstance(self.form, DenseForm) and self.form.rows:
                old, new = self._part_of.own_weight(self)
                self._tell()
            return old, new
        expected = kind.shapes(self.view, state["rank"]) if kind is not None else {}
        for key, shape in expected.items():
            tensor: Any = state.get(key)
            stored = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
            if stored is None or stored[:-1] != shape[:-1] or stored[-1] < shape[-1]:
                raise ValueError(f"`{self.svd_name}`: expected {key} of shape {shape}, got {stored}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"`{self.svd_name}`: {key} holds NaN or infinity")
        if kind is None:
            raise ValueError(f"`{self.svd_name}`: expected a form out of {', '.join(FORMS)}, got {state.get('form')!r}")
        like = self._like()
        parameters = {key: parameter_of(state[key].to(like), like) for key in expected}
        return self._take(kind(self.view, parameters, state["rank"]))

    # What a DenseWeight asks of it

    def weight_name(self) -> str:
        """How the weight is called in an error."""
        return self._part_of.name_of_weight(self) if self._part_of else f"{self.svd_name}.weight".lstrip(".")

    def layer_names(self) -> list[str]:
        """The layer to leave out for who wants to write into its weight."""
        return [self.svd_name]

    def trained_parameters(self) -> Sequence[nn.Parameter]:
        """What is trained."""
        return self.form.trained

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Take a dense weight: exactly where the rank in use is full, otherwise the nearest of that rank.

        Raises:
            ValueError: If it has another shape, or holds NaN or infinity; if the factors are sharded.
        """
        if tuple(weight.shape) != self.view.weight_shape:
            expected, got = self.view.weight_shape, tuple(weight.shape)
            raise ValueError(f"`{self.weight_name()}` must be of shape {expected}, got {got}")
        if isinstance(self.form, DenseForm):
            self.form.weight().copy_(weight)
            return
        if is_sharded(self._like()):
            raise ValueError(
                f"`{self.weight_name()}` cannot be loaded while U, s and V are sharded: load it before that"
            )
        given, before, remembered = weight.to(self._like()), self.rebuilt(), self._remembered
        if torch.equal(given, before):
            return  # what it is: no rounding
        parameters = [p.detach().clone() for p in self.form.trained]
        as_here = (self.rank, *(p.shape for p in parameters))
        gradients, is_own = marks_of_gradients(self.form.trained), False
        if remembered is not None and remembered.place == as_here and torch.equal(remembered.weight, given):
            values, is_own = remembered.factors, remembered.gradients == gradients
        else:
            exact = svd(self.view.unfold(given), self.weight_name())
            factors = Factors(*(factor[..., : self.rank] for factor in exact))
            values = list(factors) if isinstance(self.form, SVDForm) else [*balanced(factors)]
        self._remembered = _Before(before.clone(), parameters, as_here, gradients, is_own)
        for parameter, value in zip(self.form.trained, values, strict=True):
            parameter[..., : value.shape[-1]].copy_(value)
        # Until training goes on, who reads it gets what was loaded: an average that is swapped in and out again must
        # not come back as the nearest of the rank, nor rounded.
        vars(self)["_loaded"] = (given.clone(), self.stamp())

    def check_gradients(self) -> None:
        """Refuse gradients of factors that were replaced since, which a step would add to those of another weight.

        Raises:
            RuntimeError: Naming the weight.
        """
        before = self._remembered
        if before is None or before.is_own or not before.gradients:
            return
        if before.gradients == marks_of_gradients(self.form.trained):
            raise RuntimeError(
                f"`{self.weight_name()}` was given other values between the backward pass and the step: its gradient "
                "is that of U, s and V of the values before, and those of other values are others: leave the layer "
                f"out, `exclude_modules={self.layer_names()}`"
            )

    def just_loaded(self) -> Tensor | None:
        """The weight that was loaded, while nothing changed since: a plain loop tells nobody that it trains on."""
        if self._loaded is not None and self._loaded[1] != self.stamp():
            vars(self)["_loaded"] = None
        return None if self._loaded is None else self._loaded[0]

    def stamp(self) -> tuple[Any, ...]:
        """What is another after each change of what is trained."""
        return self.rank, *((id(p), p._version, p.dtype, p.device) for p in self.form.trained)

    def warn_of_loss(self, weight: Tensor) -> None:
        """Warn if the weight that was loaded is not one of the ranks that are in use."""
        kept = self.view.fold(self.form.matrix()).detach()
        lost = torch.linalg.vector_norm(wide(kept - weight.to(self._like())))
        share = float(lost / torch.linalg.vector_norm(wide(weight)).clamp_min(torch.finfo(torch.float32).tiny))
        if self.rank < self.full_rank and share > roundoff(self.matrix_shape, self._like().dtype):
            warnings.warn(
                f"`{self.weight_name()}`: what was loaded into it is kept {share:.1%} off, the nearest of the "
                f"{self.rank} out of {self.full_rank} ranks that its layer uses by now",
                stacklevel=2,
            )

    def forget_loaded(self, goes_on: bool = True) -> None:
        """Let go of what was there before a weight was loaded, and of the weight as it was.

        Args:
            goes_on: Whether training goes on from it: then what the ranks in use cannot hold of it is warned of.
        """
        loaded, self._remembered = self.just_loaded(), None
        if loaded is not None and goes_on:
            self.warn_of_loss(loaded)
        vars(self)["_loaded"] = None

    # The two ways to show its parameters

    def true_parameters(self) -> dict[str, nn.Parameter]:
        if self.shows_factors or isinstance(self.form, DenseForm):
            return self.shown_parameters()
        return {**self.form.parameters, **{key: p for key, p in self._parameters.items() if key != "weight"}}

    def set_true_parameters(self, parameters: dict[str, nn.Parameter]) -> None:
        if isinstance(self.form, DenseForm):
            self._parameters.update(parameters)
            return
        for key, parameter in parameters.items():
            (self.form.parameters if key in self.form.columns else self._parameters)[key] = parameter
        self._face.refresh(self._like())

    def show_factors(self) -> None:
        """Have ``parameters()`` give U, s and V from now on, for optimizers that are built later."""
        self.shows_factors = True
        if not isinstance(self.form, DenseForm):
            self._show_factors()

    def _show_factors(self) -> None:
        self._arrange(dict(self.form.parameters), without="weight")
        self.form.parameters = self._parameters
        vars(self)["weight"] = self._face  # for who reads it; not among the parameters

    def _hide_factors(self) -> None:
        """The weight stands where the factors were."""
        if self.form.parameters is self._parameters:
            self.form.parameters = {name: self._parameters.pop(name) for name in self.form.columns}
            del vars(self)["weight"]
            self._arrange({"weight": self._face})

    def _arrange(self, first: dict[str, Any], without: str | None = None) -> None:
        others = {key: value for key, value in self._parameters.items() if key not in (*first, without)}
        self._parameters.clear()
        self._parameters.update(first | others)

    def _like(self) -> Tensor:
        return self.form.trained[-1]

    def __setattr__(self, name: str, value: Any) -> None:
        form = vars(self).get("form")
        # Where it is gone, as for torch's prune and the older weight norm, it comes back before anybody misses it.
        if name == "weight" and (not isinstance(form, DenseForm) or form.bring_back()):
            self._refuse_another_weight()
        if name == "__class__" and not issubclass(value, SVDLayer):  # as what shards a module makes of its class
            raise RuntimeError(
                f"`{self.svd_name}` cannot become a {value.__name__} while it is factorized: make it one before the "
                f"fit, or leave the layer out, `exclude_modules={self.layer_names()}`"
            )
        self._refuse_another_geometry(name, value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name == "weight":
            self._refuse_another_weight()
        super().__delattr__(name)

    def _refuse_another_weight(self) -> NoReturn:
        raise RuntimeError(
            f"`{self.weight_name()}` cannot be replaced while its layer trains U, s and V: leave the layer out, "
            f"`exclude_modules={self.layer_names()}`, or load it by `load_state_dict`"
        )

    def _refuse_another_geometry(self, attribute: str, value: Any) -> None:
        planned = self.view.geometry if "view" in vars(self) else {}
        if attribute in planned and value not in (was := planned[attribute], was[0] if isinstance(was, tuple) else was):
            raise RuntimeError(
                f"`{self.svd_name}.{attribute}` cannot become {value!r} while the layer is factorized, as one of "
                f"{planned[attribute]!r}: set it before the fit, or leave the layer out, "
                f"`exclude_modules={self.layer_names()}`"
            )

    # Files and copies have the dense weight, under its own name

    def _save_to_state_dict(self, destination: State, prefix: str, keep_vars: bool) -> None:
        if isinstance(self.form, DenseForm):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        weight: Any = self._face if keep_vars else self.rebuilt().detach()
        with self._having({"weight": weight} | self._others()):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _others(self) -> dict[str, Any]:
        """Its own parameters that stand for themselves."""
        return {key: p for key, p in self._parameters.items() if key not in ("weight", *self.form.columns)}

    @contextmanager
    def _having(self, parameters: dict[str, Any]) -> Iterator[None]:
        """Have these in the place of its parameters inside; those that are still there afterwards are kept."""
        shown = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update(parameters)
        try:
            yield
        finally:
            kept = {key: value for key, value in self._parameters.items() if key in shown and key != "weight"}
            self._parameters.clear()
            self._parameters.update(shown | kept)

    def _load_from_state_dict(
        self, state_dict: State, prefix: str, local_metadata: Any, strict: bool, *errors: list[str]
    ) -> None:
        if isinstance(self.form, DenseForm):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *errors)
            return
        missing, unexpected, messages = errors
        key = f"{prefix}weight"
        rest = {name: value for name, value in state_dict.items() if name != key}
        with self._having(self._others()):
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, messages)
        if key in state_dict:
            try:
                self.load_weight(state_dict[key])
            except ValueError as error:
                messages.append(str(error))
            else:
                self.warn_of_loss(state_dict[key])
        elif strict:
            missing.append(key)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A dense layer of the user's own class; where the factors are shown, a factorized one."""
        new, arguments, state = self.__reduce_ex__(2)
        memo[id(self)] = twin = new(*arguments)
        twin.__setstate__(copy.deepcopy(state, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        new, kind = (_new_factorized, own_class(self)) if self.shows_factors else (object.__new__, own_class(self))
        return new, (kind,), self._state()

    def __setstate__(self, state: State) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.form.parameters = self._parameters
        face = vars(self).get("_face")
        if not isinstance(self.form, DenseForm) and type(face) is not DenseWeight:
            DenseWeight.take_over(face, self)  # type: ignore[arg-type]  # it was copied as the values it stood for

    def _state(self) -> State:
        """What a copy or a pickle has."""
        # The former tells its parts itself; the latter is of the model that the layer is in.
        own = {key: value for key, value in vars(self).items() if key not in (PART_OF, "repeats")}
        if self.shows_factors:
            own["form"] = copy.copy(self.form)
            own["form"].parameters = {}
            return own
        return {key: value for key, value in own.items() if key not in _OWN}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _told(layer: SVDLayer, x: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
    """The output that goes on, after a layer's watch was told of it; never part of a compiled graph."""
    assert layer.watch is not None
    if not x.numel():  # an idle expert's
        return out
    return layer.watch(layer, x, out, bias)


Watch = Callable[["SVDLayer", Tensor, Tensor, "Tensor | None"], Tensor]  # layer, input, output, its bias -> output
PART_OF = "_part_of"  # set on what is, or was, a part: a plain layer too
_OWN = ("view", "form", "svd_name", "shows_factors", "layout", "watch", "repeats", "_face", "_remembered", "_loaded")


def name_taken(layer: nn.Module) -> str | None:
    """An attribute of a plain layer that has the name of one that the factorized layer has; None if there is none."""
    ours, theirs = _names_of_ours(), (*vars(layer), *layer._parameters, *layer._buffers)
    return next((name for name in theirs if name in ours and not hasattr(type(layer), name)), None)


@functools.cache
def _names_of_ours() -> frozenset[str]:
    classes = SVDLayer.__mro__[: SVDLayer.__mro__.index(nn.Module)]
    names = {*_OWN, *(name for each in classes for name in vars(each))} - {*dir(nn.Module), PART_OF}
    return frozenset(names | {key for form in FORMS.values() for key in form.columns})


def _new_factorized(kind: type[nn.Module]) -> SVDLayer:
    factorized = svd_class(kind)  # type: ignore[arg-type]
    return factorized.__new__(factorized)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module was written as, factorized or not."""
    return type(module).__bases__[-1] if isinstance(module, FactorizedModule) else type(module)


@functools.cache
def svd_class(kind: type[nn.Module]) -> type[SVDLayer]:
    """The class of factorized layers for a class of dense ones, which it derives from."""
    about = {"__doc__": f"``{kind.__name__}`` whose weight is trained as U diag(s) V^T.", "__module__": __name__}
    return cast("type[SVDLayer]", type(f"SVD{kind.__name__}", (SVDLayer, kind), about))


def factorize(
    layer: nn.Module, view: View, name: str = "", form: str = "svd", factors: Factors | None = None
) -> SVDLayer:
    """Make ``layer`` itself a factorized one; whoever holds it, or its weight, holds it still.

    Args:
        layer: A plain layer.
        view: Of its weight.
        name: What to call it in errors.
        form: "svd", or "dense" for a layer that trains as it is until :meth:`SVDLayer.to_svd`.
        factors: Of its weight, if they are known.

    Raises:
        ValueError: If the weight holds NaN or infinity; the layer is then as it was.
    """
    assert supported_type(layer) is not None
    whole: Whole | None = vars(layer).get(PART_OF)
    dense = whole.dense_form(layer, view) if whole else DenseForm(view, layer._parameters)
    if form == "svd" and factors is None:
        factors = dense.exact(name or type(layer).__name__)
    layer.__class__ = svd_class(type(layer))  # type: ignore[arg-type]
    factorized = cast("SVDLayer", layer)
    own: State = {"view": view, "form": dense, "svd_name": name, "shows_factors": False}
    own |= {"layout": layout_of(dense.weight()), "watch": None, "_remembered": None, "_loaded": None}
    vars(factorized).update(own)  # past nn.Module, whose way of setting attributes the layer has no use for here
    if form == "svd":
        factorized.to_svd(factors)
    return factorized


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Have a module be of another class, which a factorized layer lets nobody else do."""
    object.__setattr__(module, "__class__", kind)


def release(layer: SVDLayer, weight: Tensor | None = None) -> Replaced:
    """Make a factorized layer a plain one of its own class again, the same object with the same parameter.

    Args:
        layer: In any form.
        weight: What its weight is to be; otherwise what its parameters multiply to.
    """
    replaced = layer.to_dense(weight)
    kind = own_class(layer)
    for attribute in _OWN:
        vars(layer).pop(attribute, None)
    set_class(layer, kind)
    return replaced


@torch.no_grad()
def plain_dense(layer: SVDLayer) -> nn.Module:
    """A new plain layer with the weight that a factorized one stands for, and its very bias."""
    with exact_products(layer._like().device):
        dense = empty_dense(layer.view, bias_of(layer) is not None)
        return fill(dense, layer.rebuilt(), bias_of(layer), layer._like(), layer.layout).train(layer.training)


@torch.no_grad()
def plain_pair(layer: SVDLayer, exact: bool = True) -> nn.Sequential:
    """Two new plain layers in sequence for a factorized one, of its rank (1 if it is 0), sqrt|s| merged into each.

    Args:
        layer: In any form.
        exact: Whether a layer that trains its dense weight is decomposed; otherwise one of the two is the identity.
    """
    view, form = layer.view, layer.form
    if isinstance(form, PairForm) or (isinstance(form, DenseForm) and not exact):
        left, right = form.left_right()
    else:
        left, right = balanced(Factors(*map(wide, layer.factors())))
    if left.shape[-1] == 0:
        left, right = (factor.new_zeros(*factor.shape[:-1], 1) for factor in (left, right))
    like = layer._like()
    pair = factored_pair(view, left.shape[-1], bias_of(layer) is not None)
    for half, weight in zip(pair, (view.first_weight(right.to(like)), view.second_weight(left.to(like))), strict=True):
        fill(half, weight, bias_of(layer), like, layer.layout)
    return pair.train(layer.training)
