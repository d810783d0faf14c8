"""Modules of torch that hold several weight matrices in one piece (attention, LSTM), each matrix as a layer of its own.

Such a module hands its raw weights to a function, so no layer in it could be replaced. It is taken apart in place, in
one of two ways. While it trains, its parts are out of sight (:class:`TakenApart`): what it shows are torch's own
parameters, under torch's own names, whatever its parts train. In the end, where parts became two layers in sequence,
they are its children (:class:`InParts` alone). Of plain layers it can be put together again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.forms import DenseForm
from lightning_svd.layers.layer import PART_OF, FactorizedModule, Replaced, SVDLayer
from lightning_svd.layers.pairs import bias_of, is_pair, merged_weight
from lightning_svd.layers.views import View

State = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """Where the weight or the bias of one part is stored: a parameter of the whole module, or some of its rows.

    Attributes:
        key: Name of the parameter.
        rows: Its rows, where several parts share it; None for all of it.
    """

    key: str
    rows: slice | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """What stands there, a view of the parameter."""
        return parameter if self.rows is None else parameter[self.rows]


Slots = dict[str, tuple[Slot, Slot | None]]  # of each part's weight and bias, in order


class InParts(nn.Module):
    """A torch module that computes with a separate layer for each of its weight matrices.

    The class of each such module derives from this one, by the kind's own, and from torch's.
    """

    _slots: Slots

    # What each kind of module says of itself

    @staticmethod
    def linears(whole: nn.Module) -> dict[str, nn.Linear]:
        """The weight matrices of a module in one piece as linear layers, which share its parameters."""
        raise NotImplementedError

    @staticmethod
    def slots_of(whole: nn.Module) -> Slots:
        """Where in a module in one piece the weights stand that it holds itself, and their biases."""
        raise NotImplementedError

    @staticmethod
    def why_not(whole: nn.Module) -> str | None:
        """Why a module of a supported type cannot be taken apart; None if it can."""
        return None

    @property
    def rebuilds(self) -> bool:
        """Whether its low-rank parts are multiplied out in each call, which saves no time."""
        return False

    def factored_up_to(self, part: SVDLayer) -> int:
        """The highest rank at which two factors of a part are multiplied with: above it they are multiplied out."""
        return part.full_rank

    def input_shapes(self, *args: Any, **kwargs: Any) -> dict[str, list[tuple[int, ...]]]:
        """Of what each part gets, one product after the other, when the module is called with these arguments."""
        raise NotImplementedError

    def _relink(self) -> None:
        """Have what torch keeps beside the parameters fit those that are there now."""

    # A state dict in torch's own names and in those of the layers, for the module whose names begin with `prefix`

    @staticmethod
    def is_whole_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether the state dict holds the module in one piece: it may hold a part of a model only."""
        raise NotImplementedError

    @staticmethod
    def is_split_in(state: Mapping[str, Tensor], prefix: str) -> bool:
        """Whether the state dict holds the module as plain layers."""
        raise NotImplementedError

    @staticmethod
    def join_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        """The state dict with torch's own names in the place of the layers'."""
        raise NotImplementedError

    @staticmethod
    def split_state(state: Mapping[str, Tensor], prefix: str = "") -> State:
        """The inverse of :meth:`join_state`."""
        raise NotImplementedError

    # Its parts

    def parts(self) -> dict[str, nn.Module]:
        """The layers by their names in it."""
        return dict(self.named_children())

    @property
    def is_dense(self) -> bool:
        """Whether all weights are plain dense parameters, so that torch's own forward can be used."""
        return False

    @property
    def watched(self) -> bool:
        """Whether what goes through one of its parts is looked at, so that each must be called."""
        return any(getattr(part, "watch", None) is not None for part in self.parts().values())

    def function_of(self, name: str) -> Callable[[Tensor], Tensor]:
        """The function that a part computes; looked up once before a loop over time steps."""
        return self.parts()[name]

    def weight_of(self, name: str) -> Tensor:
        """The dense weight that a part stands for, differentiable."""
        part = self.parts()[name]
        if isinstance(part, SVDLayer):  # as a layer alone computes: not with what was loaded and its ranks cannot hold
            return part.view.fold(part.form.matrix())
        return dense_weight(part)

    def bias_of(self, name: str) -> Tensor | None:
        """The bias of a part."""
        return bias_of(self.parts()[name])

    # From plain layers back to one piece

    def can_join(self) -> bool:
        """Whether its layers are plain."""
        return all(isinstance(part, nn.Linear) and not isinstance(part, SVDLayer) for part in self.parts().values())

    def join(self) -> list[Replaced]:
        """Become the module of torch again, of plain layers; says which parameters took the place of which."""
        replaced = []
        for key, parameters in self._by_key().items():
            whole = parameters[0]
            if len(parameters) > 1:
                whole = nn.Parameter(_concatenated(parameters), _any_trained(parameters))
                replaced.append((parameters, [whole]))
            self._parameters[key] = whole  # in the place that None has held for it
        for name in vars(self).pop("_slots"):
            delattr(self, name)
        self._become_whole()
        return replaced

    def _by_key(self) -> dict[str, list[nn.Parameter]]:
        """The parameters of plain parts that each of torch's own consists of."""
        parameters: dict[str, list[nn.Parameter]] = {}
        parts: dict[str, Any] = self.parts()
        for name, (weight, bias) in self._slots.items():
            parameters.setdefault(weight.key, []).append(parts[name].weight)
            if bias is not None:
                parameters.setdefault(bias.key, []).append(parts[name].bias)
        return parameters

    def _become_whole(self) -> None:
        relink = self._relink  # which torch's own class does not have
        self.__class__ = _bases(self)[1]
        relink()

    def _state(self) -> dict[str, Any]:
        """What a copy or a pickle has: all but torch's weak references, which it makes anew."""
        self._relink()
        return {key: value for key, value in vars(self).items() if key != "_flat_weight_refs"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new, (in_parts_class, *_bases(self)), self._state()


class TakenApart(FactorizedModule, InParts):
    """A torch module in training whose matrices are separate hidden layers; outwards it shows torch's own parameters.

    Attributes:
        svd_name: How the module is called in the model.
        shows_factors: Whether ``parameters()`` gives what is trained instead.
    """

    svd_name: str
    shows_factors: bool
    _keys: list[str]  # of the parameters that it shows otherwise, where it shows factors

    def parts(self) -> dict[str, nn.Module]:
        return self.hidden_parts() | dict(self.named_children())

    def hidden_parts(self) -> dict[str, Any]:
        """The layers that are out of sight: all but those that torch's own module has as children too."""
        return {name: vars(self)[name] for name in self._slots}

    # What it computes. A parameter that is no DenseWeight is what is to be used: the layer's own, or another that
    # torch.func.functional_call put in its place.

    def _held(self, key: str) -> Any:
        """The parameter that the module has under one of torch's names."""
        return self._parameters[key] if key in self._parameters else vars(self).get(key)

    @property
    def is_dense(self) -> bool:
        if self.watched:
            return False
        own = (self._held(weight.key) for weight, _ in self._slots.values())
        others = (getattr(child, "weight", None) for child in self.children())
        return not any(type(weight) is DenseWeight for weight in (*own, *others))

    def _given(self, name: str) -> Tensor | None:
        """The dense weight to compute with; None where a part has other parameters, or is to be called."""
        if getattr(vars(self)[name], "watch", None) is not None:
            return None
        slot = self._slots[name][0]
        held, part = self._held(slot.key), vars(self)[name]
        if type(held) is not DenseWeight:
            return slot.of(held)
        return None if isinstance(part, SVDLayer) and not isinstance(part.form, DenseForm) else part.weight

    def function_of(self, name: str) -> Callable[[Tensor], Tensor]:
        if name not in self._slots:
            return cast("nn.Module", getattr(self, name))
        given, bias = self._given(name), self.bias_of(name)
        if given is None:
            return functools.partial(vars(self)[name].output_with, bias=bias)
        return functools.partial(F.linear, weight=given, bias=bias)

    def weight_of(self, name: str) -> Tensor:
        given = self._given(name) if name in self._slots else None
        return super().weight_of(name) if given is None else given

    def bias_of(self, name: str) -> Tensor | None:
        slot = self._slots[name][1]
        return None if slot is None else slot.of(self._held(slot.key))

    def extra_repr(self) -> str:
        ranks = [
            f"{name}: rank={part.rank}/{part.full_rank}, form={part.form.name}"
            for name, part in self.parts().items()
            if name in self._slots and isinstance(part, SVDLayer)
        ]
        return "\n".join(filter(None, [super().extra_repr(), *ranks]))

    # What its parts ask of it

    def dense_form(self, part: Any, view: View) -> DenseForm:
        """The form of a part that trains its dense weight: a parameter that it has, or rows of one."""
        slot = self._slots[self._name_of(part)][0]
        if type(self._held(slot.key)) is DenseWeight:
            return DenseForm(view, part._parameters)
        return DenseForm(view, self._parameters, slot.key, slot.rows)

    def own_weight(self, part: Any) -> Replaced:
        """Give a part a weight parameter of its own, in the place of rows of a shared one.

        Where several share one, each of them gets one, and the shared one stands for all of them from then on.
        """
        slot = self._slots[self._name_of(part)][0]
        held = self._held(slot.key)
        if type(held) is DenseWeight:
            return [part.weight], [part.weight]
        if slot.rows is None:
            part.weight = held
            _separate([other for other in self._parameters.values() if other is not None and other is not held])
            return [held], [held]
        sharing = self._sharing(slot.key)
        for other, rows in sharing:
            other.weight = _cut(rows, held)
            if isinstance(other, SVDLayer):
                other.form = DenseForm(other.view, other._parameters)
        DenseWeight.take_over(held, PackedWeight(self, slot.key))
        return [held], [other.weight for other, _ in sharing]

    def name_of_weight(self, part: Any) -> str:
        """How the weight of a part is called in an error."""
        return f"{self.svd_name}.{self._slots[self._name_of(part)][0].key}".lstrip(".")

    def parts_changed(self) -> None:
        """Bring the parts and the parameters that are shown into agreement after one of them changed."""
        for name, (weight, bias) in self._slots.items():
            part, held = vars(self)[name], self._held(weight.key)
            if is_pair(part) or held is None:
                continue  # on its way to the final form; or parameters are shown as they are trained, for a moment
            vars(part)[PART_OF] = self
            if bias is not None and bias.rows is None:
                part.bias = self._held(bias.key)
            if type(held) is not DenseWeight:
                part.weight = (
                    held if weight.rows is None else nn.Parameter(weight.of(held).detach(), held.requires_grad)
                )
            if isinstance(part, SVDLayer):
                if isinstance(part.form, DenseForm):
                    part.form = self.dense_form(part, part.view)
                part.set_true_parameters({})
        for key, sharing in self._shared():
            held = self._held(key)
            if type(held) is DenseWeight and not any(is_pair(part) for part, _ in sharing):
                held.refresh(held.source.trained_parameters()[-1])
        if self.shows_factors:
            self._arrange()
        self._relink()

    def _name_of(self, part: nn.Module) -> str:
        return next(name for name in self._slots if vars(self)[name] is part)

    def _sharing(self, key: str) -> list[tuple[Any, Slot]]:
        """The parts whose weights are rows of one parameter."""
        return [(vars(self)[name], weight) for name, (weight, _) in self._slots.items() if weight.key == key]

    def _shared(self) -> list[tuple[str, list[tuple[Any, Slot]]]]:
        keys = dict.fromkeys(weight.key for weight, _ in self._slots.values() if weight.rows is not None)
        return [(key, self._sharing(key)) for key in keys]

    def weight_names(self) -> list[str]:
        """Torch's names of the weights that its hidden parts stand for."""
        return [*dict.fromkeys(weight.key for weight, _ in self._slots.values())]

    def layers_of(self, key: str) -> list[SVDLayer]:
        """The factorized layers that the weight of this name consists of."""
        return [part for part, _ in self._sharing(key) if isinstance(part, SVDLayer)]

    # The two ways to show its parameters

    def true_parameters(self) -> dict[str, nn.Parameter]:
        return {key: parameter for key, parameter in self._true().items() if parameter is not None}

    def _true(self) -> dict[str, Any]:
        """What is trained, factors in the place of what they stand for; None where torch has None."""
        true: dict[str, Any] = {}
        for key, held in self._shown().items():
            if type(held) is not DenseWeight:
                true[key] = held
                continue
            for name in (name for name, (weight, _) in self._slots.items() if weight.key == key):
                part = vars(self)[name]
                if is_pair(part):  # on the way to the final model
                    true |= {f"{name}.{half}.weight": part[half].weight for half in (0, 1)}
                    continue
                factorized = isinstance(part, SVDLayer) and not isinstance(part.form, DenseForm)
                columns = part.form.columns if factorized else ("weight",)
                of = part.form.parameters if factorized else part._parameters
                true |= {f"{name}.{column}": of[column] for column in columns}
        return true

    def _shown(self) -> dict[str, Any]:
        """Torch's own parameters by torch's names, in order."""
        if not self.shows_factors:
            return dict(self._parameters)
        others = [key for key in self._parameters if key not in self._keys and "." not in key]
        return {key: self._held(key) for key in (*self._keys, *others)}

    def set_true_parameters(self, parameters: dict[str, nn.Parameter]) -> None:
        for key, parameter in parameters.items():
            name, dot, column = key.rpartition(".")
            if not dot or key in self._parameters:  # the latter within another such moment
                self._parameters[key] = parameter
            if not dot:
                continue
            if column == "weight":
                part, _, half = name.partition(".")
                of = vars(self)[part]
                (of[int(half)] if half else of).weight = parameter
            else:
                vars(self)[name].form.parameters[column] = parameter
        self.parts_changed()

    def show_factors(self) -> None:
        """Have ``parameters()`` give what is trained from now on, for optimizers that are built later."""
        if not self.shows_factors:
            self._keys, self.shows_factors = list(self._parameters), True
        for part in self.parts().values():
            if isinstance(part, SVDLayer) and not part.shows_factors:
                part.show_factors()
        self.parts_changed()

    def _arrange(self) -> None:
        shown, true = self._shown(), self._true()
        self._set_parameters(true)
        for key, held in shown.items():
            if type(held) is DenseWeight:
                vars(self)[key] = held  # for who reads it; not among the parameters
            else:
                vars(self).pop(key, None)

    def _set_parameters(self, parameters: Mapping[str, Any]) -> None:
        self._parameters.clear()
        self._parameters.update(parameters)

    def __setattr__(self, name: str, value: Any) -> None:
        slots = vars(self).get("_slots", {})
        keys = {slot.key: part for part, both in slots.items() for slot in both if slot is not None}
        if name in keys and (type(self._held(name)) is DenseWeight or self._bring_back(name)):
            raise RuntimeError(
                f"`{self.svd_name}.{name}` cannot be replaced while its layers train U, s and V: leave them out, "
                f"`exclude_modules={self._names_of(name)}`, or load it by `load_state_dict`"
            )
        super().__setattr__(name, value)
        if name in keys:
            self.parts_changed()

    def _bring_back(self, key: str) -> bool:
        """Put a weight back into its place if it is gone, as when torch's prune begins; whether it was."""
        for part in [vars(self)[name] for name, (weight, _) in self._slots.items() if weight.key == key]:
            if self._held(key) is None and isinstance(part, SVDLayer):
                if isinstance(part.form, DenseForm):
                    return part.form.bring_back()
                self._parameters[key] = part._face
                return True
        return False

    def _names_of(self, key: str) -> list[str]:
        names = (name for name, (weight, _) in self._slots.items() if weight.key == key)
        return [f"{self.svd_name}.{name}".lstrip(".") for name in names]

    # Files and copies have the dense weights, under torch's own names

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        shown = self._shown()
        if not keep_vars:
            faces = {key: held for key, held in shown.items() if type(held) is DenseWeight}
            shown |= {key: face.source.rebuilt().detach() for key, face in faces.items()}
        with self._having(shown):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *errors: list[str]
    ) -> None:
        missing, unexpected, messages = errors
        shown = self._shown()
        faces = {f"{prefix}{key}": held for key, held in shown.items() if type(held) is DenseWeight}
        rest = {name: value for name, value in state_dict.items() if name not in faces}
        with self._having({key: held for key, held in shown.items() if type(held) is not DenseWeight}):
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, messages)
        self.parts_changed()
        for name, face in faces.items():
            if name not in state_dict:
                missing += [name] if strict else []
                continue
            try:
                face.source.load_weight(state_dict[name])
            except ValueError as error:
                messages.append(str(error))
            else:
                for part, rows in self._sharing(name.removeprefix(prefix)):
                    if isinstance(part, SVDLayer):
                        part.warn_of_loss(rows.of(state_dict[name]))

    @contextmanager
    def _having(self, parameters: dict[str, Any]) -> Iterator[None]:
        """Have these in the place of its parameters inside; what is put in the place of real ones stays."""
        before = dict(self._parameters)
        self._set_parameters(parameters)
        try:
            yield
        finally:
            now = dict(self._parameters)
            kept = {key: now.get(key) for key, held in before.items() if key in now and type(held) is not DenseWeight}
            self._set_parameters(before | kept)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state, slots = self._state(), self._slots
        if not self.shows_factors:
            own = (*_OWN, *slots)
            kept = {key: value for key, value in state.items() if key not in own}
            return object.__new__, (_bases(self)[1],), kept
        # What stands for parts has no values of its own to copy.
        faces = {key for key, held in self._shown().items() if type(held) is DenseWeight}
        state = {key: value for key, value in state.items() if key not in faces} | {"_flat_weights": []}
        return _new, (taken_apart_class, *_bases(self)), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, (weight, _) in self._slots.items():
            if self._held(weight.key) is None:
                if weight.rows is None:
                    vars(self)[weight.key] = vars(self)[name].weight
                else:
                    source = PackedWeight(self, weight.key)
                    vars(self)[weight.key] = DenseWeight.take_over(source.stand_in(), source)
        self.parts_changed()

    # Where it goes from here

    def join(self) -> list[Replaced]:
        shown, replaced = self._shown(), []
        for key, sharing in self._shared():
            if type(shown[key]) is DenseWeight:
                weights = [part.weight for part, _ in sharing]
                replaced.append((weights, [_given_back(shown[key], weights)]))
        self._let_go(shown)
        self._become_whole()
        return replaced

    def open_up(self) -> list[Replaced]:
        """Register the parts as child modules, for the final model; each gets a bias of its own.

        Returns:
            Which parameters took the place of which, where parts shared one.
        """
        shown, slots = self._shown(), self._slots
        for key, sharing in self._shared():
            if type(shown[key]) is DenseWeight:  # for who holds it still
                _given_back(shown[key], [dense_weight(part) for part, _ in sharing])
                shown[key] = None
        parts: dict[str, Any] = self._let_go(shown)
        cut: dict[str, list[nn.Parameter]] = {}
        for name, (weight, bias) in slots.items():
            part = parts[name]
            if weight.rows is not None and shown[weight.key] is not None and not is_pair(part):
                part.weight = _cut(weight, shown[weight.key])
                cut.setdefault(weight.key, []).append(part.weight)
            if isinstance(part, SVDLayer) and isinstance(part.form, DenseForm):
                part.form = DenseForm(part.view, part._parameters)
            if bias is not None and bias.rows is not None:
                cut.setdefault(bias.key, []).append(_with_bias(part, bias, shown[bias.key]))
            part.train(self.training)
        self._show_parts(parts, slots)
        return [([shown[key]], parameters) for key, parameters in cut.items()]

    def _show_parts(self, parts: Mapping[str, nn.Module], slots: Slots) -> None:
        """Have these parts as children, and torch's own parameters no more."""
        # None holds the places of torch's own, for when they come back and for code that looks whether they are there.
        self._parameters.update(dict.fromkeys(slot.key for both in slots.values() for slot in both if slot is not None))
        children = dict(self._modules)
        self._modules.clear()
        self._modules.update({**parts, **children})
        vars(self)["_slots"] = slots
        self.__class__ = in_parts_class(*_bases(self))  # type: ignore[assignment]
        self._relink()

    def opened_twin(self, pairs: Mapping[str, nn.Module]) -> nn.Module:
        """What :meth:`open_up` would make of it; itself it stays as it is.

        Args:
            pairs: In the place of hidden parts, by name; the other parts are plain layers in the twin.
        """
        shown, twin = self._shown(), self._twin()
        plain = {name: linear_of(dense_weight(part), part.bias) for name, part in self.hidden_parts().items()}
        parts: dict[str, nn.Module] = {**plain, **pairs}
        for name, (_, bias) in self._slots.items():
            if bias is not None and bias.rows is not None:
                _with_bias(parts[name], bias, shown[bias.key])
        twin._set_parameters(shown)
        twin._show_parts(parts, self._slots)
        return twin

    def whole_twin(self) -> nn.Module:
        """The torch module of the weights that its parts stand for; itself it stays as it is."""
        values, twin = self._shown(), self._twin()
        for key, held in values.items():
            if type(held) is DenseWeight:
                values[key] = nn.Parameter(held.source.rebuilt().detach(), held.requires_grad)
        twin._set_parameters(values)
        twin._become_whole()
        return twin

    def _twin(self) -> TakenApart:
        """A shallow copy without parts."""
        twin = object.__new__(type(self))
        hidden = {*_OWN, *self._slots, *self.weight_names()}
        vars(twin).update({key: value for key, value in vars(self).items() if key not in hidden})
        vars(twin).update(_parameters=dict(self._parameters), _modules=dict(self._modules))
        return twin

    def _let_go(self, parameters: dict[str, Any]) -> dict[str, nn.Module]:
        """Have these parameters, and forget what only a module taken apart has; returns the parts."""
        parts = {name: vars(self).pop(name) for name in self._slots}
        for part in parts.values():
            vars(part).pop(PART_OF, None)
        for attribute in (*self.weight_names(), *_OWN):
            vars(self).pop(attribute, None)
        self._set_parameters(parameters)
        return parts


_OWN = ("_slots", "_keys", "svd_name", "shows_factors")


class PackedWeight:
    """What computes a packed weight (such as ``in_proj_weight``), whose rows belong to several parts."""

    def __init__(self, whole: TakenApart, key: str) -> None:
        self._whole, self._key = whole, key

    @property
    def _parts(self) -> list[Any]:
        return [part for part, _ in self._whole._sharing(self._key)]

    def stand_in(self) -> nn.Parameter:
        """A parameter of its shape, without storage of that size."""
        trained = self.trained_parameters()
        rows = sum(dense_shape(part)[0] for part in self._parts)
        shape = (rows, *dense_shape(self._parts[0])[1:])
        return nn.Parameter(trained[0].detach().new_zeros(()).expand(shape), _any_trained(trained))

    def weight_name(self) -> str:
        """How it is called in an error."""
        return f"{self._whole.svd_name}.{self._key}".lstrip(".")

    def layer_names(self) -> list[str]:
        """The layers to leave out for who wants to write into it."""
        return self._whole._names_of(self._key)

    def rebuilt(self) -> Tensor:
        """Its values, differentiable."""
        return torch.cat([dense_weight(part) for part in self._parts])

    @torch.no_grad()
    def load_weight(self, weight: Tensor) -> None:
        """Have each part take its rows.

        Raises:
            ValueError: If it has another shape, or holds NaN or infinity.
        """
        if weight.shape != (shape := self.stand_in().shape):
            raise ValueError(f"`{self.weight_name()}` must be of shape {tuple(shape)}, got {tuple(weight.shape)}")
        for part, slot in self._whole._sharing(self._key):
            if isinstance(part, SVDLayer):
                part.load_weight(slot.of(weight))
            else:
                part.weight.copy_(slot.of(weight))

    def trained_parameters(self) -> Sequence[nn.Parameter]:
        """What is trained in its place."""
        return [p for part in self._parts for p in _trained_in(part)]


def _separate(parameters: Sequence[Any]) -> None:
    """Have parameters on CUDA own their storage: cuDNN brings all weights into one, which none would let go of."""
    for parameter in parameters:
        whole = parameter.untyped_storage().nbytes() if type(parameter) is nn.Parameter and parameter.is_cuda else 0
        if whole > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()


def _trained_in(part: Any) -> Sequence[nn.Parameter]:
    return part.trained_parameters() if isinstance(part, SVDLayer) else [part.weight]


def dense_shape(part: Any) -> tuple[int, ...]:
    """The shape of the weight that a part stands for."""
    return part.view.weight_shape if isinstance(part, SVDLayer) else tuple(part.weight.shape)


def dense_weight(part: Any) -> Tensor:
    """The weight that a part stands for, plain, factorized or a pair; differentiable."""
    if isinstance(part, SVDLayer):
        return part.rebuilt()
    if is_pair(part):
        first, second = part
        return merged_weight(part, first.weight, second.weight)
    weight: Tensor = part.weight
    return weight


def _given_back(face: DenseWeight, weights: Sequence[Tensor]) -> nn.Parameter:
    parameter = face.give_back(_concatenated(weights))
    parameter.requires_grad_(_any_trained(weights))
    return parameter


@torch.no_grad()
def _concatenated(weights: Sequence[Tensor]) -> Tensor:
    return torch.cat([weight.detach() for weight in weights])


def _any_trained(weights: Sequence[Tensor]) -> bool:
    return any(weight.requires_grad for weight in weights)


def _with_bias(part: Any, slot: Slot, parameter: Tensor) -> nn.Parameter:
    """Give a plain layer or a pair the bias that stands there."""
    holder = part[1] if is_pair(part) else part
    holder.bias = _cut(slot, parameter)
    bias: nn.Parameter = holder.bias
    return bias


def _cut(slot: Slot, parameter: Tensor) -> nn.Parameter:
    """A parameter of its own for what stands there."""
    return nn.Parameter(slot.of(parameter).detach().clone(), parameter.requires_grad)


# How a module is taken apart; its class is made from the kind's own and torch's.


def take_apart(whole: nn.Module, kind: Any, name: str = "") -> None:
    """Turn a torch module, in place, into one whose weight matrices train as separate hidden layers.

    Args:
        whole: Changed in place.
        kind: What it is taken apart as, a class derived from :class:`InParts`.
        name: What to call it in errors.
    """
    slots, linears = kind.slots_of(whole), kind.linears(whole)
    of_torch: Any = type(whole)
    whole.__class__ = taken_apart_class(kind, of_torch)
    vars(whole).update({"_slots": slots, "svd_name": name, "shows_factors": False})
    for part, (_, bias) in slots.items():
        if bias is not None and bias.rows is not None:
            linears[part].bias = None  # the whole's, and added by it
        vars(whole)[part] = linears[part]  # past nn.Module, which would register it
    cast("TakenApart", whole).parts_changed()


@functools.cache
def taken_apart_class(kind: type[InParts], whole: type[nn.Module]) -> type[TakenApart]:
    """The class of modules of torch's class ``whole`` that train in parts."""
    about = {"__doc__": f"``{whole.__name__}`` whose weights are trained one by one.", "__module__": __name__}
    return cast("type[TakenApart]", type(f"SVD{whole.__name__}", (TakenApart, kind, whole), about))


@functools.cache
def in_parts_class(kind: type[InParts], whole: type[nn.Module]) -> type[InParts]:
    """The class of modules of torch's class ``whole`` whose parts are children."""
    about = {"__doc__": f"``{whole.__name__}`` of layers of its own.", "__module__": __name__}
    return cast("type[InParts]", type(f"Split{whole.__name__}", (kind, whole), about))


def _bases(module: InParts) -> tuple[Any, Any]:
    """The kind that a module is taken apart as, and torch's own class."""
    kind, whole = type(module).__bases__[-2:]
    return kind, whole


def _new(make: Callable[..., Any], kind: type[InParts], whole: type[nn.Module]) -> Any:
    made = make(kind, whole)
    return made.__new__(made)


def prefix_of(name: str) -> str:
    """The prefix of state dict keys for the module of this name; "" for the model itself."""
    return f"{name}." if name else ""


def attributes_of(module: nn.Module) -> dict[str, object]:
    """What a module's own class keeps beside parameters, buffers, children, hooks and the training flag."""
    of_every_module = vars(nn.Module())
    return {key: value for key, value in vars(module).items() if key not in of_every_module}


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these very parameters, or of views of a parameter."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            own = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach(), value.requires_grad)
            setattr(layer, name, own)
    return layer
