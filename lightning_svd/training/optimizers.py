"""Factors in a user's optimizer: in the group of their weight, decay on s only, its state moving with the columns.

A layer's factors are trained in the very group that its weight was in. Weight decay must act on s and never on U and V,
which it would pull off orthonormality; on s it is exactly decay of the layer's Frobenius norm. And what an optimizer
remembers of a column goes where the column goes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.forms import SVDForm
from lightning_svd.layers.layer import Replaced, SVDLayer

Group = dict[str, Any]
# Entries of an optimizer's state that are momentum or second moments, element by element: their columns can be moved
# with those of the parameter. Preconditioners of the same shape, and quantized moments, cannot.
MOMENTS = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "acc_delta"),
    *("sum", "ax", "prev", "step_size", "exp_avg_diff", "previous_grad", "z"),
}


class OptimizerOfFactors:
    """A user's optimizer while it trains factors in the place of weights.

    Schedulers, hooks, checkpoints and wrapping optimizers rely on the groups as they were made. So the factors of a
    layer stand in the group of its weight, in its place; and where a group's weight decay is not meant for all of its
    parameters, the group is split for the update itself only, by hooks of the optimizer's own step: after the closure
    that Lightning passes to it, in which the user's own hooks run.

    Attributes:
        optimizer: The user's.
        enforced: Whether a step that was not announced is an error; off at first, since a learning rate finder steps
            the optimizer for its trials.
        announced: Whether the step that comes was announced.
        gradients_added: Whether the regularizers' gradient is in ``.grad`` already, ahead of the step.
    """

    def __init__(self, optimizer: Optimizer, layers: Iterable[SVDLayer]) -> None:
        """Adopt ``optimizer``.

        Args:
            optimizer: Any but those that cannot work.
            layers: Those of the model that are factorized.

        Raises:
            ValueError: If it is none of torch's, steps more than once for a gradient, trains matrices only, or keeps a
                list of the parameters of its own.
        """
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"SVD training does not work with {type(optimizer).__name__}, which is no subclass of torch's "
                "Optimizer: it has no hooks, by which factors are kept from weight decay"
            )
        self.optimizer = optimizer
        self.enforced = self.announced = self.gradients_added = self._are_reached = False
        self._begun = 0  # steps that are not over: one that calls the step of its base class runs hooks for both
        self._layers = list(layers)
        self._all = [optimizer, *_inner(optimizer)]
        self._check()
        self._whole: list[tuple[list[Group], list[Group], list[list[Group]]]] = []
        self._per_group = [
            (each, values)
            for each in self._all
            for values in vars(each).values()
            if _repeats(values, each.param_groups)
        ]
        self._widened: list[tuple[list[Any], list[Any]]] = []
        self._held: tuple[Any, frozenset[nn.Parameter]] = (None, frozenset())
        self._factors: tuple[int, frozenset[nn.Parameter]] = (-1, frozenset())
        self._forms = 0
        self._hooks = [optimizer.register_state_dict_pre_hook(_forget_lookups)]
        for each in self._all:  # of SAM in parts, `first_step` and `second_step`, the inner one alone has a `step`
            self._hooks += [
                each.register_step_pre_hook(self._before_step),
                each.register_step_post_hook(self._after_step),
            ]

    def _check(self) -> None:
        kind = type(self.optimizer).__name__
        if any(isinstance(each, LBFGS) for each in self._all):
            raise ValueError(f"SVD training does not work with {kind}, which steps more than once for a gradient")
        if any("muon" in base.__name__.lower() for each in self._all for base in type(each).__mro__):
            raise ValueError(f"SVD training does not work with {kind}, which trains matrices only, and s is a vector")
        held = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for each in self._all:
            for name, value in vars(each).items():
                if name not in ("param_groups", "state", "defaults") and _is_a_list_of(held, value):
                    raise ValueError(
                        f"SVD training does not work with {kind}, which keeps a list of its own, `{name}`, of the "
                        "parameters that it was built with"
                    )
        for group in self.optimizer.param_groups:
            for name, value in group.items():
                if name not in ("params", "param_names", *self.optimizer.defaults) and _is_like(group["params"], value):
                    raise ValueError(
                        f"SVD training does not work with {kind}, in whose groups `{name}` has an entry for each "
                        "parameter: U, s and V stand in the place of a weight"
                    )

    def know(self, layers: Iterable[SVDLayer]) -> None:
        """Take note of which layers are factorized from now on."""
        self._layers, self._forms = list(layers), self._forms + 1

    def begin_batch(self) -> None:
        """A batch begins, in which every step is announced."""
        self.enforced, self._begun = True, 0  # one of before may have failed
        self.adopt_faces()

    def end_batch(self) -> None:
        """A batch is over; the user's parameter groups are whole, where a step was skipped too."""
        self.merge()
        self.enforced, self._begun = False, 0

    def adopt_faces(self) -> None:
        """Replace dense weights that were added to the optimizer later, by a finetuning schedule say, by factors."""
        faces = [p for group in self._groups() for p in group["params"] if isinstance(p, DenseWeight)]
        if faces:
            self.replace([([face], [*face.source.trained_parameters()]) for face in faces])

    @contextmanager
    def showing_weights(self, faces: Iterable[DenseWeight]) -> Iterator[None]:
        """Have the groups hold dense weights in the place of their factors, as they were before; state is untouched.

        Args:
            faces: Those of the model.
        """
        face_of = {id(p): face for face in faces for p in face.source.trained_parameters()}
        for group in {id(group): group for groups in self._lists() for group in groups}.values():
            shown: dict[int, tuple[nn.Parameter, str]] = {}
            for p, name in zip(group["params"], group.get("param_names") or [""] * len(group["params"]), strict=True):
                face = face_of.get(id(p))
                one = (p, name) if face is None else (face, name.rpartition(".")[0])
                shown.setdefault(id(one[0]), one)
            group["params"][:] = [p for p, _ in shown.values()]
            if "param_names" in group:
                group["param_names"][:] = [name for _, name in shown.values()]
        try:
            yield
        finally:
            self.adopt_faces()

    def held(self) -> frozenset[nn.Parameter]:
        """The parameters that the optimizer trains at present."""
        key = [(id(group), len(group["params"])) for group in self._groups()], self._forms
        if self._held[0] != key:
            parameters = frozenset(p for group in self._groups() for p in group["params"])
            self._held = (key, parameters)
        return self._held[1]

    def check_gradients(self) -> None:
        """Look whether gradients are of what is trained, and once whether they reach it.

        A backward pass for ``inputs=model.parameters()`` leaves gradients there only, and no graph leads to a weight.

        Raises:
            RuntimeError: If a layer's bias has a gradient and its factors have none, or theirs are of other values; the
                message names it.
        """
        for layer in self._layers:
            layer.check_gradients()
        if self._are_reached:
            return
        for layer in self.regularized:
            bias = layer.shown_parameters().get("bias")
            if bias is not None and bias.grad is not None and bias in self.held():
                if any(p.grad is not None or not p.requires_grad for p in layer.form.trained):
                    self._are_reached = True
                    return
                raise RuntimeError(
                    f"`{layer.weight_name()}` got no gradient where its bias got one: its layer trains U, s and V "
                    f"in its place: leave the layer out, `exclude_modules={layer.layer_names()}`, or call the backward "
                    "pass without `inputs`"
                )

    @property
    def layers(self) -> list[SVDLayer]:
        """The factorized layers of which it trains a factor."""
        held = self.held()
        return [layer for layer in self._layers if not held.isdisjoint(layer.form.trained)]

    @property
    def regularized(self) -> list[SVDLayer]:
        """Those of them that are trained as an SVD, for which alone the regularizers are meant."""
        return [layer for layer in self.layers if isinstance(layer.form, SVDForm)]

    def _groups(self) -> list[Group]:
        return self._whole[0][1] if self._whole else self.optimizer.param_groups

    def _lists(self) -> list[list[Group]]:
        """The lists of groups, of which an optimizer and one that wraps it may share one."""
        return list({id(each.param_groups): each.param_groups for each in self._all}.values())

    # The place of a weight is its factors'

    def replace(self, replaced: Iterable[Replaced]) -> None:
        """Put parameters into the groups in the place of others, whose state is dropped.

        Args:
            replaced: What is no longer trained, and what is in its place.
        """
        self._forms += 1
        for old, new in replaced:
            for groups in self._lists():
                self._replace_in({id(group): group for group in groups}.values(), old, new)
            for each in self._all:
                remembered = [each.state.pop(p) for p in old if p in each.state]
                if any(remembered) and any(new_p in self.held() for new_p in new):
                    for parameter in new:
                        state = _initial_state(each, parameter)
                        if state:
                            each.state[parameter] = state

    def _replace_in(self, groups: Iterable[Group], old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
        gone = {id(p) for p in old}
        there = {id(p) for group in groups for p in group["params"]}
        pending = [p for p in new if id(p) not in there]
        for group in groups:
            parameters: list[nn.Parameter] = group["params"]
            names: list[str] | None = group.get("param_names")
            places = [place for place, p in enumerate(parameters) if id(p) in gone]
            if names is not None and places:
                name = names[places[0]] if len(old) == 1 else names[places[0]].rpartition(".")[0]
                new_names = [name] if len(pending) == 1 else [f"{name}.{number}" for number, _ in enumerate(pending)]
            for place in reversed(places):
                first = place == places[0]
                parameters[place : place + 1] = pending if first else []
                if names is not None:
                    names[place : place + 1] = new_names if first else []
            if places:
                pending = []

    def move_columns(
        self, before: Sequence[nn.Parameter], after: Sequence[nn.Parameter], move: Callable[[Tensor], Tensor]
    ) -> None:
        """Move or shorten the state of parameters with their columns; state that is not entry by entry begins anew.

        Args:
            before: The parameters as the optimizer knows them.
            after: Those in their places from now on; the same ones where only their columns moved.
            move: From a tensor of the shape of a parameter to the one of the new shape.
        """
        for each in self._all:
            for old, new in zip(before, after, strict=True):
                state = each.state.pop(old, None)
                if not state:
                    continue
                if _is_understood(state, old):
                    each.state[new] = {
                        key: move(value) if _is_moment(key, value) else value for key, value in state.items()
                    }
                elif initial := _initial_state(each, new):
                    each.state[new] = initial
        changed = [(old, new) for old, new in zip(before, after, strict=True) if old is not new]
        for groups in self._lists():
            for old, new in changed:
                for group in groups:
                    group["params"][:] = [new if p is old else p for p in group["params"]]
        self._forms += 1

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember nothing of parameters that are trained as something else from now on."""
        self._forms += 1
        for parameter in parameters:
            for each in self._all:
                if each.state.pop(parameter, None) and (initial := _initial_state(each, parameter)):
                    each.state[parameter] = initial

    # A step

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        self._begun += 1
        if optimizer is not self.optimizer and self._begun > 1:
            return None  # inside of a step of the outer one
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._split()
            return None

        def then_split() -> Any:
            self.merge()
            with torch.enable_grad():
                result = closure()
            self._split()
            return result

        return args[:1], {**kwargs, "closure": then_split}

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._begun -= 1
        if self._begun:
            return
        announced, self.announced = self.announced, False
        self.merge()
        if self.enforced and not announced and self.regularized:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step() was called on the optimizer itself, so the factors "
                "missed their regularizers: in `training_step` call it on what `self.optimizers()` "
                "returns, not on what it returns with `use_pl_optimizer=False`, nor on an optimizer inside of it, as "
                "parts of a step do (`first_step`, `second_step`); in a loop of your own call "
                "`SVDTraining.step` in its place, where a GradScaler would step by itself"
            )

    def _split(self) -> None:
        """Give U and V, which must not decay, groups of their own."""
        self.merge()
        factors = self._undecayed()
        for each in self._all:
            groups = each.param_groups
            if any(groups is done[0] for done in self._whole):
                continue
            parts = [_parts(group, factors) for group in groups]
            if any(part is not group for of_group, group in zip(parts, groups, strict=True) for part in of_group):
                self._whole.append((groups, list(groups), parts))
                groups[:] = [part for of_group in parts for part in of_group]
                for owner, values in self._per_group:
                    if owner.param_groups is groups and len(values) == len(parts):
                        self._widened.append((values, list(values)))
                        values[:] = [value for value, of in zip(values, parts, strict=True) for _ in of]

    def _undecayed(self) -> frozenset[nn.Parameter]:
        if self._factors[0] != self._forms:
            svd = [layer.form.parameters for layer in self._layers if isinstance(layer.form, SVDForm)]
            self._factors = (self._forms, frozenset(p for of in svd for p in (of["U"], of["V"])))
        return self._factors[1]

    def merge(self) -> None:
        """Put the user's parameter groups back together; does nothing where they are whole."""
        for groups, whole, parts in self._whole:
            for group, of_group in zip(whole, parts, strict=True):
                # What the optimizer noted in its group during the step stays.
                noted = {key: value for key, value in of_group[0].items() if key not in _OF_A_PART}
                group.update(noted)
            groups[:] = whole
        for values, whole_values in self._widened:
            values[:] = whole_values
        self._whole, self._widened = [], []

    def remove(self) -> None:
        """Let go of the optimizer."""
        self.merge()
        for hook in self._hooks:
            hook.remove()


_OF_A_PART = ("params", "weight_decay", "param_names")


def _parts(group: Group, undecayed: frozenset[nn.Parameter]) -> list[Group]:
    """The group itself, or it split by the decay its parameters should have."""
    if not group.get("weight_decay"):
        return [group]
    without = [p for p in group["params"] if p in undecayed]
    if not without:
        return [group]
    rest = [p for p in group["params"] if p not in undecayed]
    own = {key: value for key, value in group.items() if key != "param_names"}
    parts = [{**own, "params": rest}] if rest else []
    return [*parts, {**own, "params": without, "weight_decay": 0.0}]


def _inner(optimizer: Optimizer) -> list[Optimizer]:
    """The optimizers that one wraps, as Lookahead and SAM do."""
    found: list[Optimizer] = []
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and value is not optimizer and value not in found:
            found += [value, *(each for each in _inner(value) if each not in found)]
    return found


def _forget_lookups(optimizer: Optimizer) -> None:
    """Drop what a look at ``optimizer.state[layer.weight]`` leaves there: an empty state of no parameter in a group."""
    for face in [key for key, state in optimizer.state.items() if isinstance(key, DenseWeight) and not state]:
        del optimizer.state[face]


def _is_a_list_of(held: Collection[int], value: Any) -> bool:
    """Whether an attribute has as many tensors as there are parameters, or notes some of these by their ids."""
    found = [*_in_containers(value)]
    tensors = sum(isinstance(each, Tensor) for each in found)
    return tensors >= max(1, len(held)) or any(type(each) is int and each in held for each in found)


def _is_like(parameters: Sequence[nn.Parameter], value: Any) -> bool:
    """Whether it is a list with an entry for each parameter: a tensor of its shape or, of several, a number or name."""
    if not isinstance(value, (list, tuple)) or len(value) != len(parameters) or not value:
        return False
    if len(value) > 1 and all(isinstance(each, (int, float, str)) for each in value):
        return True
    return all(isinstance(each, Tensor) and each.shape == p.shape for each, p in zip(value, parameters, strict=True))


def _repeats(values: Any, groups: Sequence[Group]) -> bool:
    """Whether it is a list of what each group has under some key, as AdaBound keeps the rates that it began with."""
    if not isinstance(values, list) or not all(isinstance(value, (int, float)) for value in values):
        return False
    return any(values == [group.get(key) for group in groups] for key in next(iter(groups), {}))


def _in_containers(value: Any, depth: int = 2) -> Iterator[Any]:
    if isinstance(value, (list, tuple, set, frozenset, dict)) and depth:
        for item in value:  # of a dict the keys
            yield from _in_containers(item, depth - 1)
    else:
        yield value


def _is_moment(key: Any, value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and key in MOMENTS


def _is_understood(state: dict[Any, Any], parameter: nn.Parameter) -> bool:
    """Whether all that is remembered of a parameter is element by element, or numbers."""
    return all(
        type(value) in (Tensor, type(parameter.data)) and value.shape == parameter.shape
        if _is_moment(key, value)
        else _is_number(value)
        for key, value in state.items()
    )


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float)) or (type(value) is Tensor and value.numel() == 1)


def _initial_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[Any, Any]:
    """State that an optimizer has before its first step, as Adagrad does; {} for most."""
    try:
        return dict(type(optimizer)([parameter], **optimizer.defaults).state.get(parameter, {}))
    except Exception:  # it is built in another way; then it begins at its first step, as nearly all do
        return {}
