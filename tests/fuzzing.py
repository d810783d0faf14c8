"""Runs of any network through any events, as a state machine of hypothesis, held against a slow reference.

Three runs go through the same training: one that all kinds of things happen to, a twin that nobody touches, which must
stay equal to it bit for bit, and a reference that computes each step in the plainest way.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from helpers import counted_macs
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from models import trained_parameters
from random_models import ROWS, Description, descriptions
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel

from lightning_svd import (
    Alternating,
    Distillation,
    FallToBudget,
    GrowAndPrune,
    Nested,
    RankPolicy,
    SVDLayer,
    SVDTraining,
    svd_layers,
)
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import FactorizedModule, own_class
from lightning_svd.layers.matrices import roundoff
from lightning_svd.training.guard import MetricGuard

# Rounding grows on its way through a network and from step to step, where a normalization scales up small values, or
# the square root of a second moment is divided by. In float64 that is still far less than what a fault changes.
AMPLIFIED = 1e4

# For who counts: of what networks, by what they are fed and what they are held against, came what; and which events.
FINISHED, REFUSED = "finished, all as it must be", "refused by name, left as it was"
COUNTS: Counter[tuple[str, str]] = Counter()
EVENTS: Counter[str] = Counter()


POLICIES: dict[str, type[RankPolicy]] = {
    "fall": FallToBudget,
    "alternating": Alternating,
    "grow_and_prune": GrowAndPrune,
    "nested": Nested,
}
RANKS_RETURN = ("alternating", "grow_and_prune")


class RefusedError(Exception):
    """The package refused a run before its first step, by name, and left all as it was."""


@dataclass(frozen=True)
class Optimizers:
    """How optimizers are made.

    Attributes:
        kind: "sgd", "nesterov", "adamw", "adam", "rmsprop" or "adagrad".
        groups: "one", "decay" (none for vectors), "alternating", or "two" optimizers.
        decay: The weight decay.
        frozen: Whether they are given parameters too that do not train.
        fast: Whether rates are so large that singular values change places.
    """

    kind: str = "sgd"
    groups: str = "one"
    decay: float = 0.01
    frozen: bool = False
    fast: bool = False

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        named = [(name, p) for name, p in model.named_parameters() if self.frozen or p.requires_grad]
        parts: list[list[nn.Parameter]]
        if self.groups == "one":
            return [self._make([{"params": [p for _, p in named]}])]
        if self.groups == "decay":
            parts = [[p for _, p in named if (p.ndim > 1) == matrix] for matrix in (True, False)]
            groups = [{"params": part, "weight_decay": w} for part, w in zip(parts, (self.decay, 0.0), strict=True)]
            return [self._make([group for group in groups if group["params"]])]
        parts = [[p for _, p in named[start::2]] for start in (0, 1)]
        parts = [part for part in parts if part]
        if self.groups == "alternating":
            return [
                self._make([{"params": part, "lr": (0.02 + 0.01 * n) * self.speed} for n, part in enumerate(parts)])
            ]
        return [self._make([{"params": part}]) for part in parts]

    @property
    def speed(self) -> float:
        return 10.0 if self.fast else 1.0

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if not groups:
            groups = [{"params": [nn.Parameter(torch.zeros(()))]}]
        # A large eps, by which the step of a gradient that is all rounding is as small as it is.
        make: dict[str, Any] = {
            "sgd": lambda: torch.optim.SGD(groups, 0.03 * self.speed, momentum=0.9, weight_decay=self.decay),
            "nesterov": lambda: torch.optim.SGD(
                groups, 0.03 * self.speed, momentum=0.8, weight_decay=self.decay, nesterov=True
            ),
            "adamw": lambda: torch.optim.AdamW(groups, 0.02 * self.speed, weight_decay=self.decay, eps=1e-2),
            "adam": lambda: torch.optim.Adam(
                groups, 0.02 * self.speed, weight_decay=self.decay, eps=1e-2, amsgrad=True
            ),
            "rmsprop": lambda: torch.optim.RMSprop(groups, 0.01, weight_decay=self.decay, eps=1e-2, momentum=0.5),
            "adagrad": lambda: torch.optim.Adagrad(groups, 0.01, weight_decay=self.decay),
        }
        return make[self.kind]()


@dataclass(frozen=True)
class Case:
    """A network, its optimizers, and what is asked of SVD training.

    Attributes:
        network: The network.
        optimizers: How its optimizers are made.
        schedule: Arguments of the schedule.
        policy: Which schedule, a key of ``POLICIES``.
        arguments: Of the run, beside the schedule.
        steps: Of the whole run.
        watched: Whether a metric is watched, so that ranks may pause.
    """

    network: Description
    optimizers: Optimizers = Optimizers()
    schedule: tuple[tuple[str, Any], ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    steps: int = 8
    watched: bool = False
    policy: str = "fall"

    @property
    def planned(self) -> RankPolicy:
        return POLICIES[self.policy](**dict(self.schedule))

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.arguments)

    def of(self, **arguments: Any) -> Case:
        return replace(self, arguments=tuple((self.options | arguments).items()))


@st.composite
def cases(draw: Any, simple: bool = False) -> Case:
    """Everything that a run is made of.

    Args:
        draw: Of hypothesis.
        simple: Only what the reference can compute.
    """
    kinds = ("sgd", "nesterov", "adamw") if simple else ("sgd", "nesterov", "adamw", "adam", "rmsprop", "adagrad")
    optimizers = Optimizers(
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from(["one", "decay", "alternating", "two"])),
        draw(st.sampled_from([0.0, 0.01, 0.3])),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    start = draw(st.sampled_from([0.0, 0.2, 0.5]))
    end = draw(st.sampled_from([0.5, 0.7, 1.0]))
    schedule = {
        "start": start,
        "end": end,
        "shape": draw(st.sampled_from(["cubic", "linear", "constant"])),
        "cuts": draw(st.integers(1, 4)),
        "ramp": draw(st.sampled_from(["linear", "constant", None])),
    }
    policy = draw(st.sampled_from(["fall", *POLICIES]))
    if policy == "alternating":
        schedule = {
            "start": draw(st.sampled_from([0.0, 0.2, 0.4])),
            "end": draw(st.sampled_from([0.7, 1.0])),
            "last_full": draw(st.sampled_from([0.1, 0.3])),
            "cycles": draw(st.integers(1, 3)),
            "ramp": schedule["ramp"],
        }
    elif policy == "grow_and_prune":
        schedule |= {
            "grow": draw(st.sampled_from([0.5, 0.6])),
            "end": draw(st.sampled_from([0.6, 0.8, 1.0])),
            "groups": draw(st.integers(1, 3)),
            "rounds": draw(st.integers(1, 2)),
        }
    elif policy == "nested":
        schedule = {
            "budgets": draw(st.integers(1, 4)),
            "share": draw(st.sampled_from([0.5, 1.0])),
            "start": draw(st.sampled_from([0.0, 0.3])),
            "cuts": draw(st.integers(1, 4)),
            "distill": not simple and draw(st.sampled_from([False, False, Distillation(kind="logits")])),
            "ramp": schedule["ramp"],
            "seed": draw(st.integers(0, 3)),
        }
    target = draw(st.sampled_from(["target_macs", "target_params", "energy_threshold"]))
    arguments: dict[str, Any] = {target: draw(st.sampled_from([0.2, 0.4, 0.7, 0.9, 1.0]))}
    optional: dict[str, list[Any]] = {
        "full_rank_as": ["auto", "dense"],
        "regularizer": ["hoyer", "l1", "hoyer_square", "group_lasso", None] if not simple else ["hoyer", "l1", None],
        "final": ["factored", "factored", "dense", "decomposed"],
        "min_rank": [1, 1, 2],
        "round_to": [1, 1, 2],
    }
    if simple:
        arguments["importance"] = "spectrum"  # as the reference has it
    else:
        optional |= {
            "conv_mode": ["channel", "spatial", "auto"],
            "importance": ["auto", "auto", "auto", "outputs", "fisher"],
            # Little weight: the distance of features has no bound, and factors take larger steps than weights.
            "distill": [False] * 6 + [Distillation(weight=0.1), Distillation(kind="logits")],
        }
    for name, values in optional.items():
        value = draw(st.sampled_from(values))
        if value != values[0]:
            arguments[name] = value
    steps, watched = draw(st.integers(3, 10)), draw(st.booleans())
    network = draw(descriptions(simple))
    if arguments.get("distill"):  # whose distance has no bound, as the loss here has: the run would diverge
        optimizers = replace(optimizers, fast=False)
    return Case(network, optimizers, tuple(schedule.items()), tuple(arguments.items()), steps, watched, policy)


# ------------------------------------------------------------------------------------------------------------- the runs


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Torch's of a hook on a first layer, and the package's of a weight that its ranks cannot hold."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        warnings.filterwarnings("ignore", message=".*is kept .* off, the nearest of the")
        yield


def perturbed(name: str, value: Tensor, number: int) -> Tensor:
    """Other values, the same for all names of one parameter."""
    wave = torch.arange(value.numel(), dtype=torch.float64).mul(1.7 + number).sin().reshape(value.shape)
    return value + 0.1 * wave.to(value.dtype) if value.is_floating_point() and "running" not in name else value


class Plain:
    """The training loop of a user, without the package."""

    training: SVDTraining | None = None

    def __init__(self, case: Case) -> None:
        self.case, self.done, self.frozen, self.touched = case, 0, frozenset[str](), False
        self.model = case.network.build()
        self.optimizers = case.optimizers.build(self.model)

    def loss(self, number: int) -> Tensor:
        out = self.model(self.case.network.inputs(number))
        return (torch.tanh(out) - 0.3).square().mean()

    def apply(self, event: tuple[Any, ...]) -> None:
        with expected_warnings():
            getattr(self, event[0])(*event[1:])
        self.touched |= event[0] in ("load", "rate", "freeze")

    def step(self, backwards: int, clears: str, clips: bool) -> None:
        for each in range(backwards):
            loss = self.loss(self.done + 100 * each)
            if loss.requires_grad:
                loss.backward()
        if clips:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        self.update()
        self.done += 1
        self.clear(clears)

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def clear(self, how: str) -> None:
        if how.startswith("model"):
            self.model.zero_grad(set_to_none=how.endswith("none"))
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=how.endswith("none"))

    def rate(self, factor: float) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor

    def load(self, number: int) -> None:
        own = self.case.network.build().state_dict()
        state = {name: perturbed(name, value, number) for name, value in own.items()}
        with expected_warnings():
            self.model.load_state_dict(state)

    def freeze(self, name: str, trains: bool) -> None:
        self.model.get_parameter(name).requires_grad_(trains)
        self.frozen = self.frozen - {name} if trains else self.frozen | {name}

    def metric(self, value: float) -> None:
        pass


class Run(Plain):
    """The same with the package."""

    training: SVDTraining

    def __init__(self, case: Case, state: dict[str, Any] | None = None) -> None:
        super().__init__(case)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.done, self.touched = state["done"], True
        self.before = Snapshot(self.model, self.optimizers)
        guard = MetricGuard("loss", "min", 0.1) if case.watched else None
        options = {"schedule": case.planned, **case.options}
        noise = torch.get_rng_state()
        try:
            self.training = SVDTraining(
                self.model, self.optimizers, case.steps, guard=guard, state=state and state["training"], **options
            )
        except ValueError as error:
            assert state is None, f"a run that was saved is refused: {error}"
            self.before.check(self.model, self.optimizers)
            _check_named(error)
            raise RefusedError(str(error)) from error
        assert torch.equal(noise, torch.get_rng_state()), "the constructor drew random numbers"
        if state is not None:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            for name in state["frozen"]:
                self.freeze(name, False)
            trained = trained_parameters(self.model)
            for name in state["zeros"]:
                trained[name].grad = torch.zeros_like(trained[name])

    def update(self) -> None:
        noise = torch.get_rng_state()
        shown = {} if self.done else {name: p.detach().clone() for name, p in self.model.named_parameters()}
        with expected_warnings():
            try:
                self.training.step()
            except ValueError as error:
                if self.done:
                    raise
                self.training.undo()
                if not self.touched:
                    self.before.check(self.model, self.optimizers, buffers=False)
                for name, p in self.model.named_parameters():
                    assert_near(p.detach(), shown[name], f"`{name}` after the run was refused")
                _check_named(error)
                raise RefusedError(str(error)) from error
        assert torch.equal(noise, torch.get_rng_state()), "a step drew random numbers"

    def metric(self, value: float) -> None:
        self.training.see_metric(lambda: value, self.done)

    def saved(self) -> bytes:
        """All that a user saves, as a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "training": self.training.state_dict(),
            "done": self.done,
            "frozen": sorted(self.frozen),
            # Zeros are a gradient too, by which momentum goes on where nothing else comes.
            "zeros": [name for name, p in trained_parameters(self.model).items() if p.grad is not None],
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def take_up(self, file: bytes) -> None:
        """Go back to what was saved, in the middle of a run."""
        state = read(file)
        with expected_warnings():
            self.model.load_state_dict(state["model"])
        self.training.load_state_dict(state["training"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, p in trained_parameters(self.model).items():
            p.grad = torch.zeros_like(p) if name in state["zeros"] else None
        self.done = state["done"]


def read(file: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(file), weights_only=True)


def _check_named(error: Exception) -> None:
    text = str(error)
    named = "`" in text or "has no layer to factorize" in text or "SVD training does not work" in text
    assert named and "\n" not in text, f"an error that names nothing: {text}"


class Snapshot:
    """A model and its optimizers, exactly as they are."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        self.held = dict(model.named_parameters())
        self.values = {name: (p.detach().clone(), p.requires_grad, type(p)) for name, p in self.held.items()}
        self.buffers = {name: b.clone() for name, b in model.named_buffers()}
        self.modules = [(name, id(m), type(m), m.training, _hooks(m)) for name, m in model.named_modules()]
        self.groups = [[[*map(id, group["params"])] for group in o.param_groups] for o in optimizers]
        self.settings = [_settings(o) for o in optimizers]
        self.states = [len(o.state) for o in optimizers]

    def check(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], buffers: bool = True) -> None:
        """Compare with what they are now."""
        now = dict(model.named_parameters())
        assert [*now] == [*self.held], "other names of parameters"
        for name, p in now.items():
            value, trains, kind = self.values[name]
            assert p is self.held[name] and type(p) is kind and p.requires_grad == trains, name
            assert torch.equal(p, value) and p.stride() == value.stride(), name
        if buffers:
            assert all(torch.equal(b, self.buffers[name]) for name, b in model.named_buffers())
        modules = [(name, id(m), type(m), m.training, _hooks(m)) for name, m in model.named_modules()]
        assert modules == self.modules, "other modules"
        assert [[[*map(id, group["params"])] for group in o.param_groups] for o in optimizers] == self.groups
        assert [_settings(o) for o in optimizers] == self.settings
        assert [len(o.state) for o in optimizers] == self.states
        assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)


def _hooks(module: nn.Module) -> tuple[int, ...]:
    return len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


# -------------------------------------------------------------------------------------------------- the slow reference


class Reference:
    """The arithmetic of a run in the plainest way: U, s and V whole with a mask, gradients by autograd, steps by hand.

    It decides nothing: what a layer trains as, which ranks a cut leaves it and when pruning pauses it reads off a run.
    """

    def __init__(self, run: Run) -> None:
        self.case, self.run = run.case, run
        self.model = run.case.network.build()
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.layers = {name: f"{name}.weight" for name in run.training.layers}
        for name, layer in run.training.layers.items():  # of a module with several names, the first
            face = layer.weight
            self.layers[name] = next(key for key, p in run.model.named_parameters() if p is face)
        self.ranks = run.training.ranks()
        self.drawn: Any = None
        self.views = {
            name: (tuple(layer.weight.shape), layer.view.groups) for name, layer in run.training.layers.items()
        }
        self.values: dict[tuple[str, str], Tensor] = {}
        self.grads: dict[tuple[str, str], Tensor | None] = {}
        self.memory: dict[tuple[str, str], dict[str, Any]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.frozen: set[str] = set()
        self.forms: dict[str, str] = {}
        own = dict(self.model.named_parameters())
        names = {id(p): name for name, p in own.items()}
        for optimizer in run.case.optimizers.build(self.model):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) in names:
                        self.settings[names[id(p)]] = {key: value for key, value in group.items() if key != "params"}
        self.trains = {name: p.requires_grad for name, p in own.items()}
        weights = {key: name for name, key in self.layers.items()}
        for name, p in own.items():
            if name in weights:
                self._dense(weights[name], p.detach().clone())
                if run.training.layers[weights[name]].form.name == "svd":
                    self._factorize(weights[name])
            else:
                self._set((name, ""), p.detach().clone())
        schedule = dict(run.case.schedule)
        first, last = schedule["start"] * run.case.steps, schedule.get("end", 1.0) * run.case.steps
        if run.case.policy == "alternating":
            between = (last - schedule["last_full"] * run.case.steps - first) / (2 * schedule["cycles"] - 1)
            steps = [*((first + between * k, k % 2 == 0) for k in range(2 * schedule["cycles"])), (last, True)]
        else:
            met = schedule.get("grow", schedule.get("end", 1.0)) * run.case.steps
            steps = [(first + (met - first) * (k + 1) / schedule["cuts"], True) for k in range(schedule["cuts"])]
        if run.case.policy == "grow_and_prune":
            turns = schedule["groups"] * schedule["rounds"]
            steps += [(met + (last - met) * (k + 1) / turns, True) for k in range(turns)]
        elif run.case.policy == "nested":
            steps.insert(0, (first, True))
        self.planned, self.ladder = run.case.planned, run.training.ladder
        self.is_cut = {min(run.case.steps, max(1, round(step))): is_cut for step, is_cut in steps}
        self.cuts = sorted(self.is_cut)
        self.done = self.paused = 0

    # Matrices and weights

    def matrix(self, layer: str, weight: Tensor) -> Tensor:
        """(groups, outputs, everything else)."""
        shape, groups = self.views[layer]
        return weight.reshape(groups, shape[0] // groups, -1)

    def weight(self, layer: str) -> Tensor:
        """Of what is trained, differentiable."""
        form = self.forms[layer]
        if form == "dense":
            return self.values[layer, "W"]
        if form == "pair":
            return (self.values[layer, "A"] @ self.values[layer, "B"].mT).reshape(self.views[layer][0])
        U, s, V = (self.values[layer, key] for key in "UsV")
        mask = (torch.arange(s.shape[-1]) < (self.drawn or self.ranks)[layer]).to(s)
        return ((U * (s * mask).unsqueeze(-2)) @ V.mT).reshape(self.views[layer][0])

    def _set(self, key: tuple[str, str], value: Tensor) -> None:
        self.values[key] = value.detach().clone().requires_grad_()
        self.grads[key] = None
        self.memory[key] = {}

    def _drop(self, layer: str) -> None:
        for key in [key for key in self.values if key[0] == layer]:
            del self.values[key], self.grads[key], self.memory[key]

    def _dense(self, layer: str, weight: Tensor) -> None:
        self._drop(layer)
        self._set((layer, "W"), weight)
        self.forms[layer] = "dense"

    def _factorize(self, layer: str) -> None:
        U, s, Vh = torch.linalg.svd(self.matrix(layer, self.weight(layer).detach()), full_matrices=False)
        U, V = _fixed_signs(U, Vh.mT)
        self._drop(layer)
        for key, value in zip("UsV", (U, s, V), strict=True):
            self._set((layer, key), value)
        self.forms[layer] = "svd"

    # Events

    def apply(self, event: tuple[Any, ...]) -> None:
        """The same event; a run went through it before."""
        getattr(self, event[0])(*event[1:])

    def step(self, backwards: int, clears: str, clips: bool) -> None:
        rung = self.planned.rung(self.done) if self.ladder and not self.run.training.paused else None
        self.drawn = None if rung is None else self.ladder[rung]
        for each in range(backwards):
            self._backward(self.done + 100 * each)
        self.drawn = None
        if clips:
            there = [grad for grad in self.grads.values() if grad is not None]
            norm = torch.stack([grad.square().sum() for grad in there]).sum().sqrt() if there else torch.zeros(())
            for grad in there:
                grad.mul_((0.05 / (norm + 1e-6)).clamp(max=1.0))
        self._penalize()
        with torch.no_grad():
            for key, value in self.values.items():
                if self.grads[key] is not None:
                    self._update(key, value, self.grads[key])
        self.done += 1
        for layer in [layer for layer in self.layers if layer not in self.run.training.layers]:  # it stays dense
            weight, key = self.weight(layer).detach(), (layer, "W")
            kept = (self.grads[key], self.memory[key]) if self.forms.pop(layer) == "dense" else (None, {})
            self._drop(layer)
            name = (self.layers.pop(layer), "")
            self._set(name, weight)
            self.grads[name], self.memory[name] = kept
        if self.run.training.paused:
            self.paused += 1
        elif self.run.training.cost and self.cuts and self.done - self.paused >= self.cuts[0]:
            self._cut()
            self.ladder = self.run.training.ladder
        for key, grad in self.grads.items():
            self.grads[key] = None if clears.endswith("none") or grad is None else torch.zeros_like(grad)

    def _trained(self, key: tuple[str, str]) -> bool:
        name = self.layers.get(key[0], key[0])
        return self.trains[name] and name not in self.frozen

    def _backward(self, number: int) -> None:
        parameters = {key[0]: value for key, value in self.values.items() if not key[1]}
        parameters |= {key: self.weight(layer) for layer, key in self.layers.items()}
        out = functional_call(self.model, {**parameters, **self.buffers}, (self.case.network.inputs(number),))
        loss = (torch.tanh(out) - 0.3).square().mean()
        wanted = [key for key in self.values if self._trained(key)]
        grads = torch.autograd.grad(loss, [self.values[key] for key in wanted], allow_unused=True)
        for key, grad in zip(wanted, grads, strict=True):
            if grad is not None:
                self.grads[key] = grad if self.grads[key] is None else self.grads[key] + grad

    def _penalize(self) -> None:
        schedule, options = dict(self.case.schedule), self.case.options
        regularizer = options.get("regularizer", "hoyer")
        weight = {"hoyer": 2e-3, "l1": 5e-4, None: 0.0}[regularizer]
        progress, ramp = (self.done - self.paused) / self.case.steps, schedule["ramp"]
        if ramp is None or progress >= schedule.get("end", 1.0) or self.run.training.paused:
            weight = 0.0
        elif ramp == "linear" and progress < schedule["start"]:
            weight *= progress / schedule["start"]
        for layer, form in self.forms.items():
            if form != "svd" or not self._trained((layer, "")) or self.layers[layer] not in self.settings:
                continue
            rank = self.ranks[layer]
            U, s, V = (self.values[layer, key] for key in "UsV")
            penalty = torch.zeros((), dtype=s.dtype)
            for factor in (U[..., :rank], V[..., :rank]):
                penalty = penalty + (factor.mT @ factor - torch.eye(rank)).square().sum() / rank**2
            used = s[..., :rank]
            if weight and regularizer == "l1":
                penalty = penalty + weight * used.abs().sum()
            elif weight:
                penalty = penalty + weight * (used.abs().sum(-1) / used.square().sum(-1).sqrt()).sum()
            keys = [(layer, key) for key in ("UsV" if weight else "UV")]
            for key, grad in zip(keys, torch.autograd.grad(penalty, [self.values[key] for key in keys]), strict=True):
                self.grads[key] = grad if self.grads[key] is None else self.grads[key] + grad

    def _update(self, key: tuple[str, str], value: Tensor, grad: Any) -> None:
        settings = self.settings.get(self.layers.get(key[0], key[0]))
        if settings is None:
            return
        memory, rate = self.memory[key], settings["lr"]
        decay = 0.0 if key[1] in ("U", "V") else settings["weight_decay"]
        if "momentum" in settings:
            grad = grad + decay * value
            if "momentum" in memory:
                memory["momentum"] = settings["momentum"] * memory["momentum"] + grad
            else:
                memory["momentum"] = grad.clone()
            value -= rate * (
                grad + settings["momentum"] * memory["momentum"] if settings["nesterov"] else memory["momentum"]
            )
            return
        first, second = settings["betas"]
        value *= 1 - rate * decay
        memory["step"] = step = memory.get("step", 0) + 1
        memory["mean"] = first * memory.get("mean", 0.0) + (1 - first) * grad
        memory["square"] = second * memory.get("square", 0.0) + (1 - second) * grad.square()
        value -= (
            rate
            * (memory["mean"] / (1 - first**step))
            / ((memory["square"] / (1 - second**step)).sqrt() + settings["eps"])
        )

    @torch.no_grad()
    def _cut(self) -> None:
        clock = self.done - self.paused
        final = clock >= self.cuts[-1] and self.run.case.policy != "nested"
        self.cuts = [step for step in self.cuts if step > clock]
        returns = not self.is_cut[max(step for step in self.is_cut if step <= clock)]
        for layer, form in [*self.forms.items()]:
            now = self.run.training.layers[layer]
            before, rank, trains_as = self.ranks[layer], now.rank, now.form.name
            slight = trains_as == "dense" and layer in self.run.training._slight()
            if form == "dense" and slight:
                continue
            self.ranks[layer] = rank
            if returns:
                self._empty(layer, before)
                continue
            if form == "dense":
                self._factorize(layer)
            else:
                self._sort(layer, before)
            self._empty(layer, min(before, rank))
            assert final or slight or trains_as == "svd", f"{layer} trains as {trains_as} before the last cut"
            if final and trains_as == "pair":
                U, s, V = (self.values[layer, key].detach()[..., :rank] for key in "UsV")
                self._drop(layer)
                self._set((layer, "A"), U * (s.sign() * s.abs().sqrt()).unsqueeze(-2))
                self._set((layer, "B"), V * s.abs().sqrt().unsqueeze(-2))
                self.forms[layer] = "pair"
            elif final or slight:
                self._dense(layer, self.weight(layer).detach())

    def _empty(self, layer: str, before: int) -> None:
        """Of the ranks beyond ``before`` nothing is left but the vectors."""
        if self.forms[layer] == "dense":
            return
        self.values[layer, "s"][..., before:] = 0
        for key in "UsV":
            grad = self.grads[layer, key]
            for remembered in [*self.memory[layer, key].values(), *([] if grad is None else [grad])]:
                if torch.is_tensor(remembered):
                    remembered[..., before:] = 0

    def _sort(self, layer: str, rank: int) -> None:
        """The exact factors in the place of those that were trained; what is remembered of a column follows it."""
        U, s, V = (self.values[layer, key][..., :rank].clone() for key in "UsV")
        carried = (s.square() * U.square().sum(-2) * V.square().sum(-2)).sum(0)
        order = carried.argsort(descending=True)
        new_U, new_s, Vh = torch.linalg.svd((U * s.unsqueeze(-2)) @ V.mT, full_matrices=False)
        new_U, new_s, new_V = new_U[..., :rank], new_s[..., :rank], Vh.mT[..., :rank]
        flip = (new_U * U[..., order]).sum(-2, keepdim=True).sign()
        for key, value in zip("UsV", (new_U * flip, new_s, new_V * flip), strict=True):
            self.values[layer, key][..., :rank] = value
            for name, remembered in self.memory[layer, key].items():
                if name != "step":
                    remembered[..., :rank] = remembered[..., order]

    def rate(self, factor: float) -> None:
        for settings in {id(settings): settings for settings in self.settings.values()}.values():
            settings["lr"] *= factor

    def load(self, number: int) -> None:
        # Of a new network: torch leaves what a functional call was given in modules that have two names.
        own = {name: perturbed(name, p, number) for name, p in self.case.network.build().state_dict().items()}
        with torch.no_grad():
            for key, value in self.values.items():
                if key[1] in ("", "W"):
                    value.copy_(own[self.layers.get(key[0], key[0])])
            for name, buffer in self.buffers.items():
                buffer.copy_(own[name])
            for layer, form in self.forms.items():
                if form == "dense":
                    continue
                rank = self.ranks[layer]
                U, s, Vh = torch.linalg.svd(self.matrix(layer, own[self.layers[layer]]), full_matrices=False)
                U, V = _fixed_signs(U, Vh.mT)
                factors = {"U": U, "s": s, "V": V, "A": U * s.sqrt().unsqueeze(-2), "B": V * s.sqrt().unsqueeze(-2)}
                for key in "UsV" if form == "svd" else "AB":
                    self.values[layer, key][..., :rank] = factors[key][..., :rank]

    def freeze(self, name: str, trains: bool) -> None:
        (self.frozen.discard if trains else self.frozen.add)(name)

    def metric(self, value: float) -> None:
        pass

    def check(self) -> None:
        """Compare with the run."""
        run = self.run
        now = {name: p.detach() for name, p in run.model.named_parameters()}
        for name, p in self.values.items():
            if not name[1]:
                self._same(name[0], now[name[0]], p.detach())
        for layer in self.layers:
            trained = run.training.layers[layer]
            assert self.forms[layer] == trained.form.name, layer
            with torch.no_grad():
                weight = trained.view.fold(trained.form.matrix()).detach()
            self._same(layer, weight, self.weight(layer).detach())
        for name, buffer in run.model.named_buffers():
            self._same(name, buffer, self.buffers[name])

    def _same(self, name: str, actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape, name
        if not actual.is_floating_point():
            assert torch.equal(actual, expected), name
            return
        allowed = roundoff((*expected.shape, 1), expected.dtype) * AMPLIFIED * (1.0 + float(expected.abs().max()))
        error = float((actual - expected).abs().max())
        assert error <= allowed, f"`{name}` differs from the reference by {error:.3g}, rounding explains {allowed:.3g}"


def _fixed_signs(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(U)
    return U * sign, V * sign


# ---------------------------------------------------------------------------------------------------------- invariants


def outputs(model: nn.Module, network: Description) -> Tensor:
    """In evaluation."""
    modes = [(module, module.training) for module in model.modules()]
    calls = [(module, module.calls) for module in model.modules() if hasattr(module, "calls")]
    model.eval()
    with torch.no_grad():
        out: Tensor = model(network.inputs(77))
    for module, mode in modes:
        module.training = mode
    for module, count in calls:
        module.calls = count
    return out


def assert_near(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal but for rounding that grew on its way through a network."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    # Where a normalization meets what is all but constant in float32, rounding is scaled up to nearly anything.
    allowed = roundoff((*expected.shape, 1), expected.dtype) * (AMPLIFIED if expected.dtype == torch.float64 else 100)
    scale = 1.0 + float(expected.abs().max())
    error = float((actual - expected).abs().max())
    assert error <= allowed * scale, f"{what}: differs by {error:.3g}, rounding explains {allowed * scale:.3g}"


class Expected:
    """What a user's network has and must keep, whatever it trains."""

    def __init__(self, case: Case) -> None:
        model = case.network.build()
        self.case = case
        self.parameters = {name: (p.shape, p.dtype) for name, p in model.named_parameters()}
        self.trains = {name: p.requires_grad for name, p in model.named_parameters()}
        self.state = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
        self.classes = {name: type(module) for name, module in model.named_modules()}
        optimizers = case.optimizers.build(model)
        names = {id(p): name for name, p in model.named_parameters()}
        self.groups = [[[names.get(id(p)) for p in g["params"]] for g in o.param_groups] for o in optimizers]
        self.settings = [_settings(o) for o in optimizers]
        self.ranks: dict[str, int] | None = None

    def check(self, run: Run) -> None:
        """What holds at any time."""
        model, training = run.model, run.training
        parameters = dict(model.named_parameters())
        assert {name: (p.shape, p.dtype) for name, p in parameters.items()} == self.parameters
        assert [*parameters] == [*self.parameters], "the order of parameters"
        trains = {name: flag and name not in run.frozen for name, flag in self.trains.items()}
        assert {name: p.requires_grad for name, p in parameters.items()} == trains
        assert {name: (value.shape, value.dtype) for name, value in model.state_dict().items()} == self.state
        for name, module in model.named_modules():
            assert isinstance(module, self.classes[name]), name
        assert len([*model.named_modules()]) == len(self.classes)
        self._check_optimizers(run, parameters)
        ranks = training.ranks()
        for name, layer in training.layers.items():
            assert min(run.case.options.get("min_rank", 1), layer.full_rank) <= layer.rank <= layer.full_rank, name
            # Who ends dense because its last ranks do not pay has room for all of them again.
            ends_dense = training.policy.pending is None and layer.form.name == "dense"
            falls = self.ranks is None or layer.rank <= self.ranks[name]
            assert falls or ends_dense or run.case.policy in RANKS_RETURN, f"the rank of {name} rises"
            assert layer.rank == ranks[name] <= layer.form.room
        self.ranks = ranks

    def _check_optimizers(self, run: Run, parameters: dict[str, Any]) -> None:
        """Each group holds what is trained in the place of what it held, in the same order, each once."""
        for optimizer, groups, settings in zip(run.optimizers, self.groups, self.settings, strict=True):
            assert _settings(optimizer) == settings, "settings of the groups"
            for group, names in zip(optimizer.param_groups, groups, strict=True):
                places: list[int] = []
                for name in names:
                    p = parameters.get(name)
                    if p is None:
                        continue
                    trained = [*p.source.trained_parameters()] if isinstance(p, DenseWeight) else [p]
                    places += [id(each) for each in trained]
                held = [*map(id, group["params"])] if names != [None] else []
                parts = any(
                    isinstance(module, FactorizedModule) and not isinstance(module, SVDLayer)
                    for module in run.model.modules()
                )
                if parts:  # what is trained in the place of a weight that several parts share
                    assert len({*held}) == len(held)
                else:
                    assert held == places, "what the groups hold"
            known = {id(p) for group in optimizer.param_groups for p in group["params"]}
            assert {id(p) for p in optimizer.state} <= known, "state of parameters that are gone"
        everything = [id(p) for o in run.optimizers for g in o.param_groups for p in g["params"]]
        assert len({*everything}) == len(everything)
        trained = {id(p) for p in trained_parameters(run.model).values() if p.requires_grad}
        if None not in self.groups[0][0]:
            assert trained <= {*everything}, "a parameter that no optimizer trains"

    def follow(self, event: tuple[Any, ...]) -> None:
        """Take note of an event."""
        if event[0] == "rate":
            for settings in [settings for each in self.settings for settings in each]:
                settings["lr"] *= event[1]


def assert_equal_runs(a: Run, b: Run, shown: bool) -> None:
    """Bit for bit.

    Args:
        a: One run.
        b: The other.
        shown: Whether weights as they are shown are compared too.
    """
    one, other = trained_parameters(a.model), trained_parameters(b.model)
    assert one.keys() == other.keys()
    for name, p in one.items():
        assert torch.equal(p, other[name]), f"`{name}` is not what it is in a run that nothing happened to"
        assert p.requires_grad == other[name].requires_grad, name
    if shown:
        theirs = b.model.state_dict()
        for name, value in a.model.state_dict().items():
            assert torch.equal(value, theirs[name]), name
    for mine, his in zip(a.optimizers, b.optimizers, strict=True):
        _assert_equal_data(mine.state_dict(), his.state_dict(), "optimizer")
    if a.training is not None:
        _assert_equal_data(a.training.state_dict(), b.training.state_dict(), "training")


def _assert_equal_data(a: Any, b: Any, where: str) -> None:
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape, where
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(a.isfinite(), b.isfinite()), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {[*a]}, {[*b]}"
        for key in a:
            _assert_equal_data(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_equal_data(x, y, f"{where}.{number}")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r}, {b!r}"


def check_finished(run: Run, before: Tensor, report: Any) -> None:
    """What the user has at the end."""
    model, case = run.model, run.case
    final = case.options.get("final", "factored")
    assert_near(outputs(model, case.network), before, "outputs of the final model")
    if final != "decomposed":
        for name, module in model.named_modules():
            assert not isinstance(module, FactorizedModule), name
            assert not type(module).__module__.startswith("lightning_svd") or type(module).__bases__[
                -1
            ].__module__.startswith("torch"), name
        assert not any(isinstance(p, DenseWeight) for p in model.parameters())
    assert not svd_layers(model) or final == "decomposed"
    held = [p for o in run.optimizers for g in o.param_groups for p in g["params"]]
    assert len({id(p) for p in held}) == len(held)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = Expected(case).groups
    if None not in groups[0][0]:
        assert {id(p) for p in trained} <= {id(p) for p in held}, "trained, and in no optimizer"
        assert {id(p) for p in held} <= {id(p) for p in model.parameters()}, "in an optimizer, and not in the model"
    assert [len(o.param_groups) for o in run.optimizers] == [len(each) for each in groups]
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in run.optimizers)
    hooks = Counter(sum(_hooks(module)) for module in case.network.build().modules())
    assert sum(k * n for k, n in hooks.items()) == sum(sum(_hooks(module)) for module in model.modules())
    # The report
    assert report.params == sum(p.numel() for p in model.parameters()) or final == "decomposed"
    assert report.dense_params == sum(p.numel() for p in case.network.build().parameters())
    if case.network.simple and run.training.cost is not None:
        macs = [counted_macs(net.eval(), case.network.inputs(3)) for net in (model, case.network.build())]
        expected = [macs[0] if final != "decomposed" else report.macs * ROWS, macs[1]]
        counted = [report.macs * ROWS, report.dense_macs * ROWS]
        assert counted == expected, f"MACs now and dense are {counted}, torch counts {expected}"
    kind = next(key for key in ("target_macs", "target_params", "energy_threshold") if key in case.options)
    if (
        run.training.why_not_reached(run.done) is None
        and final != "dense"
        and case.policy != "nested"
        and kind != "energy_threshold"
        and report.layers
    ):
        ratio = report.macs_ratio if kind == "target_macs" else report.params_ratio
        assert ratio <= case.options[kind] * (1 + 1e-12), "the budget was not met, and nobody says so"
    for budget in report.nested if kind != "energy_threshold" else ():
        ratio = budget.macs_ratio if kind == "target_macs" else budget.params_ratio
        assert ratio <= budget.share * (1 + 1e-12)
    # It trains on
    model.train()
    loss = run.loss(5)
    if loss.requires_grad:
        with expected_warnings():
            loss.backward()
        for optimizer in run.optimizers:
            optimizer.step()
    copy.deepcopy(model)


# ---------------------------------------------------------------------------------------------------------- the machine


class Machine(RuleBasedStateMachine):
    """Any events in any order."""

    simple = False
    over = True

    @initialize(case=cases())
    def begin(self, case: Case) -> None:
        self.start(case)

    def start(self, case: Case) -> None:
        self.case, self.over = case, True
        try:
            self.run = Run(case)
        except RefusedError as refused:
            words = str(refused).split()
            if "must be at least" not in str(refused):
                self._count(REFUSED)
                return
            kind = next(key for key in ("target_macs", "target_params") if key in case.options)
            self.case = case = case.of(**{kind: float(words[words.index("least") + 1])})
            self.run = Run(case)  # what it says is possible is possible
        self.twin = Run(case)
        self.expected = Expected(case)
        self.reference = Reference(self.run) if self.simple else None
        # The weights train as they are until ranks are cut: then the package changes nothing at all.
        begins_dense = case.options.get("full_rank_as") == "dense" and not case.options.get("distill")
        self.plain: Plain | None = Plain(case) if begins_dense else None
        self.since: list[tuple[Any, ...]] | None = None
        self.file = b""
        self.loaded = False
        assert_near(outputs(self.run.model, case.network), outputs(case.network.build(), case.network), "at the start")
        self.check()

    def _count(self, outcome: str) -> None:
        against = "a reference" if self.simple else "a twin"
        COUNTS[f"{self.case.network.track}, held against {against}", outcome] += 1

    def check(self) -> None:
        self._check()
        self.over = False

    def _check(self) -> None:
        self.expected.check(self.run)
        assert_equal_runs(self.run, self.twin, shown=not self.loaded)
        if self.reference is not None:
            self.reference.check()
        if not self.loaded:
            network = self.case.network
            assert_near(
                outputs(self.run.model, network), outputs(copy.deepcopy(self.run.model), network), "a dense copy"
            )
        if self.plain is not None:
            if self.run.training.last_cut:
                self.plain = None
                return
            theirs = self.plain.model.state_dict()
            for name, value in self.run.model.state_dict().items():
                assert_near(value.double(), theirs[name].double(), name) if self._in_parts() else self._exactly(
                    name, value, theirs[name]
                )

    def _in_parts(self) -> bool:
        """Whether there are modules of several weights, which are taken apart."""
        return any(isinstance(m, nn.MultiheadAttention | nn.RNNBase) for m in self.run.model.modules())

    def _exactly(self, name: str, value: Tensor, theirs: Tensor) -> None:
        assert torch.equal(value, theirs), f"`{name}` differs from the same training without the package"

    def _begins(self, event: str) -> None:
        EVENTS[event] += 1
        self.over = True  # unless all goes well, what `check` says

    def happens(self, event: tuple[Any, ...], twins: tuple[Any, ...] | None = None) -> None:
        """Something that changes the run."""
        self._begins(event[0])
        try:
            self.run.apply(event)
        except RefusedError:
            self._count(REFUSED)
            return
        self.twin.apply(twins or event)
        if self.plain is not None:
            self.plain.apply(event)
        if self.reference is not None:
            self.reference.apply(event)
        self.expected.follow(event)
        if self.since is not None:
            self.since.append(event)
        self.loaded = event[0] == "load" or (self.loaded and event[0] != "step")
        self.check()

    # What changes a run

    @precondition(lambda self: self.over)
    @rule()
    def nothing(self) -> None:
        """The run was refused, or is finished."""

    @precondition(lambda self: not self.over and self.run.done < self.case.steps)
    @rule(
        backwards=st.sampled_from([1, 1, 2]),
        clears=st.sampled_from(["none", "model none", "zeros", "model zeros"]),
        clips=st.sampled_from([False, False, True]),
        times=st.integers(1, 4),
    )
    def steps(self, backwards: int, clears: str, clips: bool, times: int) -> None:
        self.step(backwards, clears, clips, times)

    def step(self, backwards: int, clears: str, clips: bool, times: int) -> None:
        for _ in range(times):
            if not self.over and self.run.done < self.case.steps:
                own = clears.removeprefix("model ")
                self.happens(("step", backwards, clears, clips), ("step", backwards, own, clips))

    @precondition(lambda self: not self.over and self.run.done < self.case.steps)
    @rule(times=st.integers(1, 2), clears=st.sampled_from(["none", "zeros"]))
    def train(self, times: int, clears: str) -> None:
        """What happens most."""
        self.step(1, clears, False, times)

    @precondition(lambda self: not self.over)
    @rule(factor=st.sampled_from([0.5, 0.9, 1.1]))
    def rate(self, factor: float) -> None:
        self.happens(("rate", factor))

    @precondition(lambda self: not self.over and self.case.watched)
    @rule(value=st.sampled_from([1.0, 0.95, 1.5, float("nan")]))
    def metric(self, value: float) -> None:
        self.happens(("metric", value))

    @precondition(lambda self: not self.over)
    @rule(number=st.integers(0, 3))
    def load_other_weights(self, number: int) -> None:
        self.happens(("load", number))

    @precondition(lambda self: not self.over)
    @rule(data=st.data(), trains=st.booleans())
    def freeze(self, data: Any, trains: bool) -> None:
        names = [name for name, flag in self.expected.trains.items() if flag]
        names = [name for name in names if (name in self.run.frozen) == trains]
        if len(names) > (not trains) and not self._in_parts():  # something is trained
            self.happens(("freeze", data.draw(st.sampled_from(names)), trains))

    # What must change nothing

    @precondition(lambda self: not self.over)
    @rule()
    def save(self) -> None:
        self._begins("save")
        self.file, self.since = self.run.saved(), []
        self.check()

    @precondition(lambda self: not self.over)
    @rule()
    def resume_here(self) -> None:
        self._begins("resume")
        self.run = self._resumed(self.run.saved())
        self.check()

    @precondition(lambda self: not self.over and self.since is not None)
    @rule()
    def resume_from_the_file(self) -> None:
        self._begins("resume")
        self.run = self._resumed(self.file)
        for event in self.since or []:
            self.run.apply(event)
        self.check()

    def _midway(self) -> bool:
        return 0 < self.run.done <= self.case.steps - 2 and not self._in_parts()

    def _resumed(self, file: bytes) -> Run:
        run = Run(self.case, read(file))
        if self.reference is not None:
            self.reference.run = run
        return run

    @precondition(lambda self: not self.over and not self.loaded and not self.run.frozen and self._midway())
    @rule(steps=st.integers(1, 2))
    def go_back(self, steps: int) -> None:
        """Train on, then load what was saved into the run itself."""
        self._begins("go back")
        file = self.run.saved()
        for _ in range(steps):
            self.run.apply(("step", 1, "none", False))
        self.run.take_up(file)
        self.check()

    @precondition(lambda self: not self.over)
    @rule(what=st.sampled_from(["copy", "pickle", "average", "round trip", "read", "evaluate", "print", "partial"]))
    def look(self, what: str) -> None:
        self._begins(what)
        model, network = self.run.model, self.case.network
        theirs = self.twin.model.state_dict()
        if what == "copy":
            twin = copy.deepcopy(model)
            assert not svd_layers(twin)
            if not self.loaded:
                assert all(torch.equal(value, theirs[name]) for name, value in twin.state_dict().items())
            with torch.no_grad():
                for p in twin.parameters():
                    p.zero_()
        elif what == "pickle" and not any(_hooks(module) != (0, 0, 0) for module in model.modules()):
            twin = pickle.loads(pickle.dumps(model))
            assert not svd_layers(twin)
            assert_near(outputs(twin, network), outputs(copy.deepcopy(model), network), "a pickled model")
        elif what == "average":
            average = AveragedModel(model)
            average.update_parameters(model)
            assert_near(outputs(average.module, network), outputs(copy.deepcopy(model), network), "an average of one")
        elif what in ("round trip", "partial") and not self.loaded:
            state = model.state_dict()
            if what == "partial":
                state = dict([*state.items()][::2])
            model.load_state_dict(state, strict=what != "partial")
        elif what == "read":
            for name, module in model.named_modules():
                if isinstance(module, SVDLayer):
                    weight = module.weight
                    assert isinstance(module, own_class(module)) and weight.dtype == network.dtype, name
                    assert weight.norm().isfinite() and weight.detach().shape == weight.shape
                    assert torch.equal(weight.mT.detach(), weight.detach().mT)
            assert sum(p.numel() for p in model.parameters()) == sum(
                v[0].numel() for v in self.expected.parameters.values()
            )
            for p in model.parameters():
                _ = p.grad, p.is_leaf, p.data.mean(), p.device
        elif what == "evaluate":
            model.eval()
            with torch.no_grad():
                model(network.inputs(55))
            model.train()
        elif what == "print":
            assert "rank=" in repr(model) or not svd_layers(model)
        self.check()

    @precondition(lambda self: not self.over and self.run.done >= self.case.steps // 2)
    @rule()
    def finish(self) -> None:
        self._begins("finish")
        run, twin = self.run, self.twin
        before = outputs(run.model, self.case.network)
        missed = run.training.why_not_reached(run.done)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* was not reached")  # wherever an example ends
            report, other = run.training.finish(), twin.training.finish()
        if self.case.options.get("final") != "decomposed":
            assert_equal_states(run.model, twin.model)
        _assert_equal_data(report.to_dict(), other.to_dict(), "report")
        if run.done == self.case.steps and not {*run.training.warnings} - {missed}:
            assert missed is None or self.case.watched or run.training.cost is None
        check_finished(run, before, report)
        self._count(FINISHED)

    def teardown(self) -> None:
        if not self.over:
            self.finish()


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


class ReferenceMachine(Machine):
    """The same with networks that the reference can compute."""

    simple = True

    @initialize(case=cases(simple=True))
    def begin(self, case: Case) -> None:
        self.start(case)
