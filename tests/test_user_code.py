"""What people write around a network, each held against the same code without the callback.

A pattern is a function that trains with ``fit`` as people do and returns what it saw. It runs four times: without the
callback, with layers that train as dense ones, as an SVD at full rank, and with ranks that are cut. What it returns as
``same`` is equal in the first three; as ``values``, what depends on the steps taken, in the first two. What it asserts
by itself holds in all four. The page docs/user-code.md lists the patterns; ``user_code.py`` writes it.
"""

import copy
import functools
import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as F
import user_code
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from models import ComputedAgain, EqualRate, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lightning_svd import FallToBudget, Fisher, Regularizer, SVDTrainingCallback, svd_layers

# ------------------------------------------------------------------------------------------------------ the harness


class Seen(NamedTuple):
    """What a pattern saw: what is the same in every form of the layers, and what only where they train as dense."""

    same: Any = None
    values: Any = None


@dataclass
class Pattern:
    """What people do.

    Attributes:
        area: The heading it stands under.
        run: Does it, with a :class:`Fit`.
        refused: What the error says, as a regular expression; None if it works.
        stays: Layers that are left dense because of it, each with a part of the reason.
        needs: Packages that it needs.
        kind: The argument that says what the run with cuts is to keep.
        target: What that is.
        options: Other arguments of the callback.
        says: The warning that it comes with, as a regular expression.
        broken: Why it does not work yet.
    """

    area: str
    run: Callable[["Fit"], Seen | None]
    refused: str | None = None
    stays: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    target: float = 0.6
    kind: str = "target_macs"
    options: dict[str, Any] = field(default_factory=dict)
    says: str | None = None
    broken: str | None = None

    @property
    def what(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


PATTERNS: list[Pattern] = []
READ_BY_NAME = "read by the step itself"
NEEDS_DENSE = "the model needs what only the dense layer has"


def people(area, **about):
    """Registers a pattern under a heading; arguments as the fields of :class:`Pattern`."""

    def register(run):
        PATTERNS.append(Pattern(area, run, **about))
        return run

    return register


class Fit:
    """Trains a model as a user does, with the callback or without it.

    Attributes:
        form: "reference" for the run without it, otherwise what the layers train as.
        callback: The callback of the last fit; None in the reference.
        trainer: That of the last fit.
    """

    def __init__(self, form: str, pattern: Pattern) -> None:
        self.form, self.pattern = form, pattern
        self.callback: SVDTrainingCallback | None = None
        self.trainer: Trainer | None = None

    def __call__(self, model, *callbacks, first=(), again=False, loader=None, val=None, **options):
        """Fit; ``first`` are callbacks before ours, ``again`` takes the callback of the last fit."""
        if not again:
            self.callback = self.make_callback()
        ours = [self.callback] if self.callback else []
        self.trainer = quiet_trainer(callbacks=[*first, *ours, *callbacks], **({"max_epochs": 3} | options))
        self.trainer.fit(model, loader or blobs(), *([val] if val else []))
        return model

    def make_callback(self):
        if self.form == "reference":
            return None
        if self.form == "cut":
            schedule = FallToBudget(start=0.2, end=0.7)
            return SVDTrainingCallback(
                **{self.pattern.kind: self.pattern.target}, schedule=schedule, **self.pattern.options
            )
        return SVDTrainingCallback(
            **{self.pattern.kind: 1.0},
            schedule=FallToBudget(start=1.0, end=1.0),
            regularizer=Regularizer(sparsity=None, orthogonality_weight=0.0),
            full_rank_as=self.form,
            **self.pattern.options,
        )

    @property
    def exact(self):
        """Whether layers are dense all the while, so that weights are those of the reference."""
        return self.form in ("reference", "dense")


def blobs(count=16, batch_size=8, inputs=12, classes=4):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    centers = torch.randn(classes, inputs, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset((centers[labels] + noise).to(torch.get_default_dtype()), labels), batch_size)


def mlp(inputs=12, hidden=16, outputs=4):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class Net(LightningModule):
    """12 -> 16 -> 16 -> 4 with ReLU in ``self.net``, cross entropy, SGD with momentum."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(5)
        self.net = mlp()
        self.make_optimizer = optimizer or (lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
        self.losses: list[Tensor] = []

    def forward(self, x):
        return self.net(x)

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self)


class At(Callback):
    """Calls a function at a moment of the fit, from a certain step on; what it returned is in ``seen``."""

    def __init__(self, moment, function, step=None):
        self.function, self.step, self.seen = function, step, []
        setattr(self, moment, self.act)

    def act(self, trainer, pl_module, *_, **__):
        if self.step is None or trainer.global_step == self.step:
            self.seen.append(self.function(trainer, pl_module))


def weights(module):
    """All values of a module by their names, as they are now."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def net(model):
    """The values of ``model.net`` after the fit, where its layers are dense again."""
    return weights(model.net)


def assert_same(actual, expected, where="seen"):
    """The same but for rounding: structure, types, shapes and values."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), where
        torch.testing.assert_close(
            actual.detach(), expected.detach(), rtol=1e-7, atol=1e-9, msg=lambda text: f"{where}: {text}"
        )
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{where}: {len(actual)} items, expected {len(expected)}"
        for place, value in enumerate(expected):
            assert_same(actual[place], value, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-7, abs=1e-9), where
    else:
        assert actual == expected, where


# ------------------------------------------------------------------------------------------------ groups of parameters

GROUPS = "Groups of parameters"


def rates_and_decays(trainer, pl_module):
    """Each parameter's rate and decay, by its name: those of its factors, where they stand in its place."""
    where = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    layers = {f"{name}.weight": layer.form.trained for name, layer in svd_layers(pl_module).items()}
    found = {}
    for name, parameter in pl_module.named_parameters():
        groups = [where.get(id(p)) for p in layers.get(name, [parameter])]
        assert all(group is groups[0] for group in groups), name
        found[name] = groups[0] and (groups[0]["lr"], groups[0].get("weight_decay"))
    return found


def fit_groups(fit, make, kind=torch.optim.AdamW, **options):
    """Trains in the groups that ``make`` returns; what the optimizer makes of each parameter, and where it ends."""
    groups = At("on_before_optimizer_step", rates_and_decays)
    model = fit(Net(lambda net: kind(make(net), lr=0.01)), groups, **options)
    return Seen(groups.seen, net(model))


@people(GROUPS)
def groups_by_exact_type(fit):
    """Decay for the weights of modules with `type(m) is nn.Linear`"""

    def make(model):
        decayed = [m.weight for m in model.modules() if type(m) is nn.Linear]
        known = {id(p) for p in decayed}
        return [
            {"params": decayed, "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if id(p) not in known]},
        ]

    return fit_groups(fit, make)


@people(GROUPS)
def groups_by_dimension(fit):
    """Decay where `p.dim() >= 2`, none for vectors"""

    def make(model):
        parameters = [*model.parameters()]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    return fit_groups(fit, make)


@people(GROUPS)
def layerwise_rates(fit):
    """A rate for each parameter, by the number in its name: layer-wise decay of the rate"""

    def make(model):
        return [
            {"params": [p], "lr": 0.02 * 0.8 ** int(name.split(".")[1]), "name": name}
            for name, p in model.named_parameters()
        ]

    return fit_groups(fit, make)


@people(GROUPS)
def rates_from_attributes(fit):
    """A rate for each parameter from an attribute on it, `p.lr_scale`"""

    def make(model):
        model.net[2].weight.lr_scale = 0.1
        return [{"params": [p], "lr": 0.02 * getattr(p, "lr_scale", 1.0)} for p in model.parameters()]

    return fit_groups(fit, make)


@people(GROUPS)
def only_what_requires_gradients(fit):
    """`filter(lambda p: p.requires_grad, model.parameters())` with a frozen first layer"""

    def make(model):
        model.net[0].requires_grad_(False)
        return [{"params": [*filter(lambda p: p.requires_grad, model.parameters())], "weight_decay": 0.1}]

    return fit_groups(fit, make)


@people(GROUPS)
def named_parameters_into_the_optimizer(fit):
    """The optimizer gets `named_parameters()`"""
    groups = At("on_before_optimizer_step", rates_and_decays)
    model = fit(Net(lambda net: torch.optim.SGD(net.named_parameters(), lr=0.1)), groups)
    return Seen(groups.seen, net(model))


@people(GROUPS)
def groups_are_found_by_their_name(fit):
    """A group is found by a name of the user's in it, and its rate is changed after each epoch"""

    def change(trainer, pl_module):
        head = next(group for group in trainer.optimizers[0].param_groups if group["name"] == "head")
        head["lr"] *= 0.5

    def make(model):
        return [
            {"params": model.net[:4].parameters(), "name": "body"},
            {"params": model.net[4].parameters(), "name": "head"},
        ]

    groups = At("on_before_optimizer_step", rates_and_decays)
    model = fit(Net(lambda net: torch.optim.SGD(make(net), lr=0.1)), groups, At("on_train_epoch_end", change))
    return Seen(groups.seen, net(model))


@people(GROUPS)
def a_group_is_added_later(fit):
    """`optimizer.add_param_group` of a layer that no optimizer had, after an epoch"""

    def add(trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.optimizers[0].add_param_group({"params": [*pl_module.net[0].parameters()], "lr": 0.02})

    groups = At("on_before_optimizer_step", rates_and_decays)
    model = Net(lambda net: torch.optim.SGD(net.net[2:].parameters(), lr=0.1, momentum=0.9))
    fit(model, groups, At("on_train_epoch_start", add))
    return Seen(groups.seen, net(model))


@people(GROUPS)
def thawed_by_hand(fit):
    """A frozen layer in the optimizer is thawed after an epoch by `requires_grad_(True)`"""

    def thaw(trainer, pl_module):
        pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    model = Net()
    model.net[0].requires_grad_(False)
    before = At("on_train_epoch_end", lambda _, m: weights(m.net[0]))
    fit(model, At("on_train_epoch_start", thaw), before)
    return Seen(before.seen[0], net(model))


@people(GROUPS)
def frozen_by_hand(fit):
    """A layer is frozen after an epoch by `requires_grad_(False)`"""

    def freeze(trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.net[2].requires_grad_(False)

    epochs = At("on_train_epoch_end", lambda _, m: weights(m.net[2]))
    fit(Net(), At("on_train_epoch_start", freeze), epochs)
    if fit.form != "cut":
        assert_same(epochs.seen[2], epochs.seen[0])
    return Seen(None, epochs.seen)


@people(GROUPS)
def frozen_by_the_group(fit):
    """A group's rate is set to 0 after an epoch"""

    def stop(trainer, pl_module):
        if trainer.current_epoch == 1:
            trainer.optimizers[0].param_groups[0]["lr"] = 0.0

    epochs = At("on_train_epoch_end", lambda _, m: weights(m.net[0]))

    def make(model):
        groups = [{"params": model.net[0].parameters()}, {"params": model.net[2:].parameters()}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    fit(Net(make), At("on_train_epoch_start", stop), epochs)
    if fit.form != "cut":
        assert_same(epochs.seen[2], epochs.seen[0])
    return Seen(None, epochs.seen)


class WithBackbone(Net):
    """A backbone and a head, as Lightning's finetuning callbacks want them."""

    def __init__(self):
        super().__init__()
        self.backbone = self.net[:4]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def backbone_finetuning(fit, first):
    from lightning.pytorch.callbacks import BackboneFinetuning

    other = BackboneFinetuning(1, backbone_initial_ratio_lr=0.1, should_align=False, train_bn=True, verbose=False)
    groups = At("on_before_optimizer_step", rates_and_decays)
    model = WithBackbone()
    fit(model, *([] if first else [other]), groups, first=[other] if first else [])
    return Seen(groups.seen, net(model))


@people(GROUPS)
def backbone_finetuning_before(fit):
    """Lightning's `BackboneFinetuning`, before this callback"""
    return backbone_finetuning(fit, True)


@people(GROUPS)
def backbone_finetuning_after(fit):
    """Lightning's `BackboneFinetuning`, after this callback"""
    return backbone_finetuning(fit, False)


@people(GROUPS, refused="does not work with Muon, which trains matrices only")
def muon_and_adamw(fit):
    """`torch.optim.Muon` for matrices, AdamW for the rest"""

    class Both(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            matrices = [p for p in self.parameters() if p.ndim == 2]
            rest = [p for p in self.parameters() if p.ndim != 2]
            return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01)]

    fit(Both())


# --------------------------------------------------------------------------------------------------------------- hooks

HOOKS = "Hooks"


@people(HOOKS)
def a_forward_hook_collects(fit):
    """A forward hook appends the outputs of a layer to a list of the module, which the loss reads"""

    class Features(Net):
        def __init__(self):
            super().__init__()
            self.features = []
            self.net[2].register_forward_hook(lambda module, args, output: self.features.append(output))

        def loss(self, batch):
            self.features.clear()
            loss = super().loss(batch)
            assert len(self.features) == 1
            return loss + 0.1 * self.features[0].square().mean()

    model, counts = Features(), At("on_train_batch_end", lambda _, m: len(m.features))
    fit(model, counts)
    return Seen([counts.seen, model.losses[0]], net(model))


@people(HOOKS)
def a_forward_hook_counts_outside(fit):
    """A forward hook appends to a list outside of the module"""
    model, shapes = Net(), []
    model.net[2].register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    fit(model)
    return Seen(shapes)


ACTIVATIONS, CALLS = {}, 0


@people(HOOKS)
def a_forward_hook_fills_a_dict_of_the_module(fit):
    """A forward hook keeps the last activations in a global dict, and counts in a global number"""

    def hook_of(name):
        def hook(module, args, output):
            global CALLS
            ACTIVATIONS[name] = output.detach()
            CALLS += 1

        return hook

    global CALLS
    ACTIVATIONS.clear()
    CALLS, seen = 0, At("on_train_batch_end", lambda *_: (CALLS, [*ACTIVATIONS], ACTIVATIONS["last"].sum()))
    model = Net()
    model.net[4].register_forward_hook(hook_of("last"))
    fit(model, seen)
    return Seen([(calls, names) for calls, names, _ in seen.seen], [total for *_, total in seen.seen])


TOTAL, LARGEST, ALL = torch.zeros(4), numpy.zeros(1), MeanMetric()


def note_all(output):
    """What a hook calls."""
    TOTAL.add_(output.detach().sum(0))
    numpy.maximum(LARGEST, float(output.detach().max()), out=LARGEST)
    ALL.update(output.detach())


@people(HOOKS)
def a_forward_hook_adds_in_place(fit):
    """A forward hook adds into tensors, arrays, metrics: its own, global ones, by a function that it calls"""

    class Sums:
        def __init__(self):
            self.sum, self.rows, self.mean = torch.zeros(()), numpy.zeros(1, int), MeanMetric()

        def __call__(self, module, args, output):
            self.sum.add_(output.detach().sum())
            self.rows += len(output)
            self.mean.update(output.detach())

    model, sums, count, mean = Net(), Sums(), torch.zeros((), dtype=torch.int64), MeanMetric()

    def note(module, args, output):
        count.add_(1)
        mean.update(output.detach())
        note_all(output)

    for each in (TOTAL, LARGEST):
        each[:] = 0
    ALL.reset()
    model.net[4].register_forward_hook(sums)
    model.net[4].register_forward_hook(note)
    fit(model)
    weights = [metric.weight.clone() for metric in (sums.mean, mean, ALL)]
    values = [sums.sum, TOTAL, LARGEST, *(metric.compute() for metric in (sums.mean, mean, ALL))]
    return Seen([sums.rows.copy(), count, weights], [torch.as_tensor(value).clone() for value in values])


@people(HOOKS)
def a_hook_that_is_an_object(fit):
    """A forward hook is the bound method of an object that keeps sums, by layer"""

    class Statistics:
        def __init__(self):
            self.calls, self.total = {"net": 0}, 0.0

        def __call__(self, module, args, output):
            self.calls["net"] += 1
            self.total += 1.0

        def note(self, module, args):
            self.calls["net"] += 10

    model, statistics = Net(), Statistics()
    model.net[0].register_forward_hook(statistics)
    model.net[2].register_forward_pre_hook(statistics.note)
    fit(model)
    return Seen([statistics.calls, statistics.total])


@people(HOOKS)
def a_forward_hook_changes_the_output(fit):
    """A forward hook returns another output, a pre-hook another input"""
    model = Net()
    model.net[0].register_forward_hook(lambda module, args, output: output.tanh())
    model.net[2].register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    fit(model)
    return Seen(model.losses[0], net(model))


@people(HOOKS)
def full_backward_hooks(fit):
    """Full backward hooks on layers, before and after: what they get"""
    model, got = Net(), []
    model.net[2].register_full_backward_hook(lambda m, into, out: got.append([g.clone() for g in (*into, *out)]))
    model.net[2].register_full_backward_pre_hook(lambda m, out: got.append([g.clone() for g in out]))
    fit(model)
    return Seen([got[:2], len(got)], got)


@people(HOOKS)
def a_backward_hook_changes_gradients(fit):
    """A full backward hook scales the gradient of a layer's input"""
    model = Net()
    model.net[2].register_full_backward_hook(lambda m, into, out: tuple(g * 0.5 for g in into))
    fit(model)
    return Seen(None, net(model))


@people(HOOKS)
def hooks_of_every_module(fit):
    """`register_module_forward_hook`, which all modules call: the order of the layers' calls"""
    calls = []
    model = Net()
    names = {module: name for name, module in model.named_modules()}
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: calls.append(names[module]) if module in names else None
    )
    try:
        fit(model)
    finally:
        handle.remove()
    return Seen(calls)


@people(HOOKS)
def tensor_hooks_in_forward(fit):
    """A hook on an activation in `forward`: Grad-CAM"""

    class GradCam(Net):
        def forward(self, x):
            hidden = self.net[:3](x)
            if hidden.requires_grad:
                hidden.register_hook(lambda g: self.gradients.append(g.clone()))
            return self.net[3:](hidden)

    model = GradCam()
    model.gradients = []
    fit(model)
    return Seen([model.gradients[0], len(model.gradients)], model.gradients)


@people(HOOKS, refused=r"`net\.2\.weight` takes no `register_hook`.*exclude_modules=\['net\.2'\]")
def a_hook_on_a_weight_in_the_fit(fit):
    """A hook on a weight, registered in `on_train_start`: a mask on its gradient"""
    mask = torch.ones(16, 16).tril()
    fit(Net(), At("on_train_start", lambda _, m: m.net[2].weight.register_hook(lambda g: g * mask)))


@people(HOOKS, refused=r"`net\.0\.weight` takes no `register_post_accumulate_grad_hook`.*exclude_modules")
def an_optimizer_in_the_backward_pass(fit):
    """A step for each parameter in the backward pass, by `register_post_accumulate_grad_hook`"""

    def register(trainer, pl_module):
        for parameter in pl_module.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: None)

    fit(Net(), At("on_train_start", register))


@people(HOOKS, stays={"net.2": "its weight is computed from other parameters"}, target=0.9)
def a_parametrization(fit):
    """A parametrization of the user's own (symmetric weights), registered before the fit"""

    class Symmetric(nn.Module):
        def forward(self, W):
            return W.triu() + W.triu(1).mT

    model = Net()
    nn.utils.parametrize.register_parametrization(model.net[2], "weight", Symmetric())
    fit(model)
    return Seen(model.losses[0], net(model))


@people(HOOKS, refused=r"`net\.2\.weight` .*exclude_modules=\['net\.2'\]")
def a_parametrization_in_the_fit(fit):
    """A parametrization that is registered while layers train, in `on_train_start`"""

    class Symmetric(nn.Module):
        def forward(self, W):
            return W.triu() + W.triu(1).mT

    fit(
        Net(),
        At(
            "on_train_start",
            lambda _, m: nn.utils.parametrize.register_parametrization(m.net[2], "weight", Symmetric()),
        ),
    )


@people(HOOKS, stays={"net.2": "its weight is computed from other parameters"}, target=0.9)
def old_spectral_norm(fit):
    """The older `nn.utils.spectral_norm`, a pre-hook that sets `weight`"""
    model = Net()
    nn.utils.spectral_norm(model.net[2])
    fit(model)
    return Seen(model.losses[0], net(model))


@people(HOOKS, stays={"net.2": "its weight is computed from other parameters"}, target=0.9)
def pruning_masks(fit):
    """Masks of `torch.nn.utils.prune`, made before the fit"""
    model = Net()
    nn.utils.prune.l1_unstructured(model.net[2], "weight", 0.5)
    fit(model)
    assert int((model.net[2].weight == 0).sum()) >= 128
    return Seen(model.losses[0], net(model))


@people(HOOKS, refused=r"`net\.2\.weight` .*exclude_modules=\['net\.2'\]")
def pruning_masks_in_the_fit(fit):
    """Masks of `torch.nn.utils.prune`, made after an epoch"""

    def prune(trainer, pl_module):
        if trainer.current_epoch == 0:
            nn.utils.prune.l1_unstructured(pl_module.net[2], "weight", 0.5)

    fit(Net(), At("on_train_epoch_end", prune))


@people(HOOKS)
def state_dict_hooks(fit):
    """Hooks before and after `state_dict()` that rename keys, and before and after `load_state_dict`"""
    model, calls = Net(), []

    def rename(module, state, prefix, metadata):
        for key in [*state]:
            state[key.replace("net.", "layers.")] = state.pop(key)

    def back(module, state, prefix, *_):
        calls.append("load")
        for key in [*state]:
            state[key.replace("layers.", "net.")] = state.pop(key)

    model.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append("save"))
    model.register_state_dict_post_hook(rename)
    model.register_load_state_dict_pre_hook(back)
    model.register_load_state_dict_post_hook(lambda module, keys: calls.append("loaded"))

    def round_trip(trainer, pl_module):
        calls.clear()
        before, output = pl_module.state_dict(), pl_module(torch.ones(1, 12))
        pl_module.load_state_dict(dict(before))
        assert_same(pl_module(torch.ones(1, 12)), output)
        return [*calls], {key: value.shape for key, value in before.items()}

    seen = At("on_train_batch_end", round_trip)
    fit(model, seen)
    return Seen(seen.seen)


@people(HOOKS)
def hooks_of_a_layers_state_dict(fit):
    """A hook on a layer that writes its weight into files in half precision"""
    model = Net()

    def halve(module, state, prefix, metadata):
        state[f"{prefix}weight"] = state[f"{prefix}weight"].half()

    model.net[2].register_state_dict_post_hook(halve)
    seen = At("on_train_batch_end", lambda _, m: (v := m.state_dict()["net.2.weight"], [v.dtype, v.shape])[1])
    fit(model, seen)
    return Seen(seen.seen)


@people(HOOKS)
def overridden_setattr_and_getattr(fit):
    """A module with `__setattr__` and `__getattr__` of its own, which passes names on to its net"""

    class Passing(Net):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("net"), name)

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            vars(self).setdefault("written", []).append(name)

    model = Passing()
    model.net.depth = 3
    fit(model, At("on_train_batch_end", lambda _, m: setattr(m, "depth_seen", m.depth)))
    assert model.depth_seen == 3 and {"net", "depth_seen"} <= {*model.written}
    return Seen(model.losses[0], net(model))


@people(HOOKS)
def save_and_load_hooks_of_the_module(fit):
    """`on_save_checkpoint` and `on_load_checkpoint` that walk the state dict"""

    class Walks(Net):
        keys = None

        def on_save_checkpoint(self, checkpoint):
            self.keys = {key: value.shape for key, value in checkpoint["state_dict"].items()}

    model = Walks()
    fit(model, At("on_train_epoch_end", lambda trainer, _: trainer.save_checkpoint("a.ckpt")))
    return Seen(model.keys)


# ------------------------------------------------------------------------------------------------- copies and averages

COPIES = "Copies and averages"


class WithTarget(Net):
    """A target network beside the one that trains, inside the module."""

    def __init__(self):
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)

    def loss(self, batch):
        with torch.no_grad():
            aim = self.target(batch[0])
        return super().loss(batch) + F.mse_loss(self(batch[0]), aim)


@people(COPIES)
def polyak_over_parameters(fit):
    """A target network follows by `p.data.copy_(tau * q + (1 - tau) * p)` over two `parameters()` lists"""

    class Polyak(WithTarget):
        def on_train_batch_end(self, *_):
            for p, q in zip(self.target.parameters(), self.net.parameters(), strict=True):
                p.data.copy_(0.3 * q.data + 0.7 * p.data)

    # A callback's hook comes before the module's own of the same name.
    old = At("on_train_batch_end", lambda _, m: (weights(m.target), weights(m.net)))
    new = At("on_train_batch_start", lambda _, m: weights(m.target))
    model = fit(Polyak(), old, new)
    for (target, online), now in zip(old.seen[:-1], new.seen[1:], strict=True):
        assert_same(now, {key: 0.3 * online[key] + 0.7 * target[key] for key in target})
    return Seen([old.seen[0][0], model.losses[0]], [new.seen, model.losses])


@people(COPIES)
def polyak_over_state_dicts(fit):
    """A target network follows by `load_state_dict` of a mix of two state dicts"""

    class Polyak(WithTarget):
        def on_train_batch_end(self, *_):
            own, other = self.target.state_dict(), self.net.state_dict()
            self.target.load_state_dict({key: 0.7 * own[key] + 0.3 * other[key] for key in own})

    targets = At("on_train_batch_end", lambda _, m: weights(m.target))
    fit(Polyak(), targets)
    return Seen(targets.seen[0].keys(), targets.seen)


@people(COPIES)
def a_target_that_is_replaced(fit):
    """DQN: the target network takes the whole state dict every few steps"""

    class Hard(WithTarget):
        def on_train_batch_end(self, *_):
            if self.global_step % 2 == 0:
                self.target.load_state_dict(self.net.state_dict())
                assert_same(self.target(torch.ones(2, 12)), self.net(torch.ones(2, 12)))

    targets = At("on_train_batch_end", lambda _, m: weights(m.target))
    fit(Hard(), targets)
    return Seen(targets.seen[0], targets.seen)


@people(COPIES)
def averaged_model(fit):
    """`torch.optim.swa_utils.AveragedModel`, made in `on_train_start`, updated after each step"""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class Averaged(Net):
        def on_train_start(self):
            self.mean = AveragedModel(self.net)
            self.ema = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.5))

        def on_train_batch_end(self, *_):
            self.mean.update_parameters(self.net)
            self.ema.update_parameters(self.net)

    after = At("on_train_batch_end", lambda _, m: weights(m.net))
    both = At("on_train_end", lambda _, m: (weights(m.mean.module), weights(m.ema.module)))
    fit(Averaged(), after, both)
    mean, ema = both.seen[0]
    assert_same(mean, {key: sum(w[key] for w in after.seen) / len(after.seen) for key in mean})
    by_hand = after.seen[0]
    for now in after.seen[1:]:
        by_hand = {key: 0.5 * by_hand[key] + 0.5 * now[key] for key in now}
    assert_same(ema, by_hand)
    return Seen(list(mean), both.seen)


@people(COPIES)
def averaged_model_with_buffers(fit):
    """`AveragedModel(..., use_buffers=True)` of a net with batch norm, then `update_bn`"""
    from torch.optim.swa_utils import AveragedModel, update_bn

    class Averaged(Net):
        def __init__(self):
            super().__init__()
            self.net.insert(1, nn.BatchNorm1d(16))

        def on_train_start(self):
            vars(self)["mean"] = AveragedModel(self.net, use_buffers=True)

        def on_train_batch_end(self, *_):
            self.mean.update_parameters(self.net)

    after = At("on_train_batch_end", lambda _, m: weights(m.mean.module))
    model = fit(Averaged(), after)
    update_bn(blobs(), model.mean)
    return Seen(after.seen[0].keys(), [after.seen, weights(model.mean.module)])


class Shadow(Callback):
    """The average of a tutorial: a dict of tensors, put into the model for validation and taken out again."""

    def on_train_start(self, trainer, pl_module):
        self.shadow = {name: p.data.clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, p in pl_module.named_parameters():
            if p.requires_grad:
                self.shadow[name] = (0.5 * self.shadow[name] + 0.5 * p.data).clone()

    def on_validation_start(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        self.backup = {}
        for name, p in pl_module.named_parameters():
            if p.requires_grad:
                self.backup[name] = p.data
                p.data = self.shadow[name]

    def on_validation_end(self, trainer, pl_module):
        if trainer.sanity_checking:
            return
        for name, p in pl_module.named_parameters():
            if p.requires_grad:
                p.data = self.backup[name]


class Validated(Net):
    """Keeps the losses of its validation."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.val_losses = []

    def validation_step(self, batch, batch_idx):
        self.val_losses.append(self.loss(batch))
        self.log("val_loss", self.val_losses[-1])


@people(COPIES)
def shadow_weights_for_validation(fit):
    """An average by hand over `named_parameters()`, put in by `p.data = shadow` for validation and taken out again"""
    shadow, after = Shadow(), At("on_train_batch_end", lambda _, m: weights(m))
    around = At("on_train_epoch_end", lambda _, m: weights(m))
    model = fit(Validated(), shadow, after, around, val=blobs())
    assert all(name in after.seen[0] for name in shadow.shadow)
    for epoch, state in enumerate(around.seen):
        assert_same(state, after.seen[2 * epoch + 1])  # what is trained is what it was before the validation
    return Seen(list(shadow.shadow), [shadow.shadow, model.val_losses])


@people(COPIES)
def model_ema_by_state_dict_values(fit):
    """timm's `ModelEma`: `ema_v.copy_(decay * ema_v + (1 - decay) * model_v)` over two state dicts' values"""

    class Ema(Callback):
        def on_fit_start(self, trainer, pl_module):
            self.module = copy.deepcopy(pl_module.net).eval()

        @torch.no_grad()
        def on_train_batch_end(self, trainer, pl_module, *_):
            for mine, theirs in zip(
                self.module.state_dict().values(), pl_module.net.state_dict().values(), strict=True
            ):
                mine.copy_(0.5 * mine + 0.5 * theirs)

    before, after = Ema(), Ema()
    fit(Net(), after, first=[before])
    assert [type(layer) for layer in after.module] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    if fit.form != "cut":
        assert_same(weights(after.module), weights(before.module))
    return Seen(list(weights(after.module)), weights(after.module))


class MeanTeacher(Net):
    """A teacher that is an average of the student, a consistency loss between the two."""

    def __init__(self):
        super().__init__()
        self.teacher = mlp()
        for student, teacher in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            teacher.data.copy_(student.data)
            teacher.requires_grad = False

    def loss(self, batch):
        noisy = batch[0] + 0.01
        return super().loss(batch) + (self.net(noisy).softmax(1) - self.teacher(batch[0]).softmax(1)).square().mean()

    def on_before_zero_grad(self, optimizer):
        alpha = min(1 - 1 / (self.global_step + 1), 0.9)
        for student, teacher in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            teacher.data.mul_(alpha).add_(student.data, alpha=1 - alpha)


@people(COPIES)
def mean_teacher(fit):
    """Mean teacher: frozen by `p.requires_grad = False`, updated by `teacher.data.mul_(a).add_(student.data)`"""
    model, teachers = MeanTeacher(), At("on_train_batch_end", lambda _, m: weights(m.teacher))
    fit(model, teachers)
    if fit.callback:
        assert all(layer.name.startswith("net") for layer in fit.callback.report.layers)
    return Seen([teachers.seen[0].keys(), model.losses[0]], [teachers.seen, model.losses])


@people(COPIES)
def byol(fit):
    """BYOL: online encoder and predictor, a momentum encoder made by `deepcopy`"""

    class BYOL(Net):
        def __init__(self):
            super().__init__()
            self.predictor = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
            self.momentum = copy.deepcopy(self.net)
            for p in self.momentum.parameters():
                p.requires_grad = False

        def loss(self, batch):
            one, other = batch[0] + 0.1, batch[0] - 0.1
            aim = self.momentum(other).detach()
            return 2 - 2 * F.cosine_similarity(self.predictor(self.net(one)), aim).mean()

        @torch.no_grad()
        def on_train_batch_end(self, *_):
            for p, q in zip(self.net.parameters(), self.momentum.parameters(), strict=True):
                q.data = 0.9 * q.data + 0.1 * p.data

    model, momenta = BYOL(), At("on_train_batch_end", lambda _, m: weights(m.momentum))
    fit(model, momenta)
    return Seen([momenta.seen[0].keys(), model.losses[0]], [momenta.seen, model.losses])


@people(COPIES)
def moco(fit):
    """MoCo: a momentum encoder and a queue of keys in a buffer"""

    class MoCo(Net):
        def __init__(self):
            super().__init__()
            self.keys = copy.deepcopy(self.net)
            self.keys.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(4, 32), dim=0))
            self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

        def loss(self, batch):
            query = F.normalize(self.net(batch[0]), dim=1)
            with torch.no_grad():
                for q, k in zip(self.net.parameters(), self.keys.parameters(), strict=True):
                    k.data = k.data * 0.9 + q.data * 0.1
                key = F.normalize(self.keys(batch[0] + 0.01), dim=1)
            logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.queue.clone()], dim=1)
            start = int(self.pointer)
            self.queue[:, start : start + len(key)] = key.T
            self.pointer[0] = (start + len(key)) % 32
            return F.cross_entropy(logits / 0.2, torch.zeros(len(key), dtype=torch.long))

    model = MoCo()
    queues = At("on_train_batch_end", lambda _, m: (m.queue.clone(), int(m.pointer), weights(m.keys)))
    fit(model, queues)
    return Seen([queues.seen[0], model.losses[0]], [queues.seen, model.losses])


@people(COPIES)
def the_best_copy(fit):
    """`copy.deepcopy` of the best network so far, used after the fit"""

    class Best(Validated):
        best = None

        def on_validation_epoch_end(self):
            vars(self)["best"] = copy.deepcopy(self.net)

    model = fit(Best(), val=blobs(), num_sanity_val_steps=0)
    assert [type(layer) for layer in model.best] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    return Seen(list(weights(model.best)), weights(model.best))


@people(COPIES)
def a_vector_of_all_parameters(fit):
    """`parameters_to_vector`, changed, and `vector_to_parameters` back"""

    def shrink(trainer, pl_module):
        vector = nn.utils.parameters_to_vector(pl_module.parameters()).detach()
        nn.utils.vector_to_parameters(vector * 0.9, pl_module.parameters())
        assert_same(nn.utils.parameters_to_vector(pl_module.parameters()), vector * 0.9)
        return vector

    seen = At("on_train_batch_end", shrink)
    model = fit(Net(), seen)
    return Seen(len(seen.seen[-1]), [seen.seen, net(model)])


@people(COPIES)
def distance_to_the_start(fit):
    """L2-SP: the squared distance to the weights at the start, from a dict over `named_parameters()`, in the loss"""

    class Near(Net):
        def on_train_start(self):
            self.start = {name: p.clone().detach() for name, p in self.named_parameters()}

        def loss(self, batch):
            self.distance = sum((p - self.start[name]).square().sum() for name, p in self.named_parameters())
            return super().loss(batch) + self.distance

    model, distances = Near(), At("on_train_batch_end", lambda _, m: m.distance.detach())
    fit(model, distances)
    assert distances.seen[0] < 1e-20 < distances.seen[1]
    return Seen(model.losses[0], [distances.seen, net(model)])


@people(COPIES)
def what_forward_puts_in_the_place_of_data(fit):
    """A buffer and a frozen parameter that `forward` moves on by `.data = ...`"""

    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
            self.register_buffer("shift", torch.ones(4))

        def forward(self, x):
            self.scale.data, self.shift.data = self.scale.data * 0.9, self.shift.data + 0.1
            return self.net(x) * self.scale + self.shift

    model = Scaled()
    kept = At("on_train_batch_end", lambda *_: [model.scale.detach().clone(), model.shift.clone()])
    fit(model, kept)
    return Seen(kept.seen, net(model))


# ------------------------------------------------------------------------------------------- losses that read weights

LOSSES = "Losses that read weights"


def fit_penalty(fit, penalty):
    """Trains with a penalty on the module in its loss; the first loss, and all of them."""

    class Penalized(Net):
        def loss(self, batch):
            return super().loss(batch) + 0.01 * penalty(self)

    model = fit(Penalized())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(LOSSES, says=READ_BY_NAME)
def a_method_that_reads_weights(fit):
    """A flow whose method `log_prob(x)`, and no `forward`, reads the determinants of weights"""

    class Flow(Net):
        def __init__(self):
            super().__init__()
            self.flow = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])

        def loss(self, batch):
            x, volume = batch[0], 0.0
            for layer in self.flow:
                x = F.leaky_relu(layer(x), 0.5)
                volume = volume + torch.linalg.slogdet(layer.weight)[1]
            return super().loss(batch) + 0.01 * (x.square().sum(1).mean() - volume)

    model = fit(Flow())
    return Seen(model.losses[0], net(model))


@people(LOSSES, says=READ_BY_NAME)
def l1_of_a_weight(fit):
    """L1 of one layer's weight: `self.net[2].weight.abs().sum()`"""
    return fit_penalty(fit, lambda m: m.net[2].weight.abs().sum())


@people(LOSSES)
def norms_of_named_weights(fit):
    """`torch.norm(p, 2)` over `named_parameters()` with 'weight' in the name, or where `p.dim() > 1`"""
    return fit_penalty(
        fit,
        lambda m: (
            sum(torch.norm(p, 2) for name, p in m.named_parameters() if "weight" in name)
            + sum(p.pow(2.0).sum() for p in m.parameters() if p.dim() > 1)
        ),
    )


@people(LOSSES, says=READ_BY_NAME)
def orthogonality_of_a_weight(fit):
    """`(W @ W.T - I).norm()` of a layer's weight"""
    return fit_penalty(fit, lambda m: (m.net[2].weight @ m.net[2].weight.T - torch.eye(16)).norm())


@people(LOSSES, says=READ_BY_NAME)
def spectral_norms_of_weights(fit):
    """Spectral norms: `torch.linalg.matrix_norm(W, 2)` and `torch.linalg.svdvals(W)` in the loss"""
    return fit_penalty(
        fit, lambda m: torch.linalg.matrix_norm(m.net[2].weight, 2) + torch.linalg.svdvals(m.net[0].weight).sum()
    )


@people(LOSSES, says=READ_BY_NAME)
def power_iteration_in_the_loss(fit):
    """A spectral penalty by power iteration with vectors that are kept in a buffer"""

    def penalty(m):
        W = m.net[2].weight
        if not hasattr(m, "u"):
            m.register_buffer("u", torch.ones(16) / 4)
        with torch.no_grad():
            v = F.normalize(W.t().mv(m.u), dim=0)
            m.u = F.normalize(torch.mv(W, v), dim=0)
        return torch.dot(m.u, W @ v)

    return fit_penalty(fit, penalty)


@people(LOSSES, says=READ_BY_NAME)
def group_lasso(fit):
    """Group lasso: `W.norm(dim=0).sum()`, by layers with `isinstance(m, nn.Linear)`"""
    return fit_penalty(fit, lambda m: sum(c.weight.norm(dim=0).sum() for c in m.modules() if isinstance(c, nn.Linear)))


@people(LOSSES)
def all_parameters_in_one_vector(fit):
    """`torch.cat([p.view(-1) for p in self.parameters()]).norm(1)`"""
    return fit_penalty(fit, lambda m: torch.cat([p.view(-1) for p in m.parameters()]).norm(1))


@people(LOSSES, says=READ_BY_NAME)
def path_norms(fit):
    """A product of absolute weights through the net: a path norm"""

    def penalty(m):
        x = torch.ones(1, 12)
        for layer in m.net:
            if hasattr(layer, "weight"):
                x = F.linear(x, layer.weight.abs())
        return x.sum()

    return fit_penalty(fit, penalty)


@people(LOSSES, says=READ_BY_NAME)
def weights_into_functions_of_ones_own(fit):
    """A `torch.autograd.Function` that gets a weight: `Square.apply(self.net[2].weight)`, as fused losses do"""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, W):
            ctx.save_for_backward(W)
            return W.square().sum()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    seen = fit_penalty(fit, lambda m: 100 * Square.apply(m.net[2].weight))
    plain = fit_penalty(fit, lambda m: 100 * m.net[2].weight.square().sum())
    assert_same(seen.values[0], plain.values[0])
    return seen


@people(LOSSES, says=READ_BY_NAME)
def weights_into_checkpoints(fit):
    """`torch.utils.checkpoint` of a function of a weight, both kinds"""
    from torch.utils.checkpoint import checkpoint

    def penalty(m):
        square = [checkpoint(lambda W: W.square().sum(), m.net[2].weight, use_reentrant=kind) for kind in (False, True)]
        return 50 * sum(square)

    seen = fit_penalty(fit, penalty)
    plain = fit_penalty(fit, lambda m: 100 * m.net[2].weight.square().sum())
    assert_same(seen.values[0], plain.values[0])
    return seen


class Embedded(LightningModule):
    """Tokens through an embedding and a net."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(10, 12)
        self.net = mlp(12, 16, 12)
        self.losses = []

    def logits(self, hidden):
        return F.linear(hidden, self.embed.weight)

    def training_step(self, batch, batch_idx):
        tokens = (batch[0].abs() * 10).long() % 10
        loss = F.cross_entropy(self.logits(self.net(self.embed(tokens[:, :1]).squeeze(1))), tokens[:, 1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@people(LOSSES)
def tied_by_function(fit):
    """Weights tied by use: `F.linear(x, self.embed.weight)` as the output layer"""
    model = fit(Embedded())
    return Seen(model.losses[0], [model.losses, net(model), model.embed.weight])


@people(
    LOSSES,
    options={"target_modules": ["embed", "net.0", "net.2"]},
    kind="target_params",
    target=0.9,
    says=READ_BY_NAME,
)
def tied_by_function_and_named(fit):
    """The same with the embedding named in `target_modules`"""
    model = fit(Embedded())
    return Seen(model.losses[0], [model.losses, net(model), model.embed.weight])


@people(LOSSES, stays={"head": "weight tied to another module's"}, target=0.9)
def tied_by_assignment(fit):
    """Weights tied by `self.head.weight = self.embed.weight`"""

    class Tied(Embedded):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 10, bias=False)
            self.head.weight = self.embed.weight

        def logits(self, hidden):
            return self.head(hidden)

    model = fit(Tied())
    assert model.head.weight is model.embed.weight
    return Seen(model.losses[0], [model.losses, net(model)])


class Sequence(Net):
    """Attention and an LSTM over three steps of four numbers, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.lstm = nn.LSTM(4, 8, batch_first=True)
        self.net = nn.Linear(8, 4)

    def forward(self, x):
        steps = x.unflatten(1, (3, 4))
        hidden, _ = self.attention(steps, steps, steps)
        return self.net(self.lstm(hidden)[0].mean(1))


IN_ATTENTION = tuple(f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj"))
IN_LSTM = ("lstm.ih_l0", "lstm.hh_l0")


@people(LOSSES, stays=dict.fromkeys(IN_LSTM, NEEDS_DENSE), says="stay dense", target=0.95)
def an_lstm_asked_for_its_device(fit):
    """`forward` makes a state on the device of `self.lstm.weight_hh_l0`"""

    class Stateful(Sequence):
        def forward(self, x):
            start = x.new_zeros(1, len(x), 8).to(self.lstm.weight_hh_l0.device)
            steps = x.unflatten(1, (3, 4))
            hidden, _ = self.attention(steps, steps, steps)
            return self.net(self.lstm(hidden, (start, start))[0].mean(1))

    model = fit(Stateful())
    return Seen(model.losses[0], [model.losses, weights(model), model(torch.ones(2, 12))])


@people(LOSSES, stays=dict.fromkeys(IN_ATTENTION, NEEDS_DENSE), says="stay dense", target=0.95)
def attention_by_its_packed_weight(fit):
    """`forward` multiplies by `self.attention.in_proj_weight` itself"""

    class Packed(Sequence):
        def forward(self, x):
            steps = x.unflatten(1, (3, 4))
            q, k, v = F.linear(steps, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, -1)
            return self.net(self.lstm(F.scaled_dot_product_attention(q, k, v))[0].mean(1))

    model = fit(Packed())
    return Seen(model.losses[0], [model.losses, weights(model), model(torch.ones(2, 12))])


@people(LOSSES, says=READ_BY_NAME, target=0.9)
def a_penalty_of_recurrent_weights(fit):
    """`training_step` penalizes `self.lstm.weight_hh_l0`"""

    class Penalized(Sequence):
        def loss(self, batch):
            weight = self.lstm.weight_hh_l0
            return super().loss(batch) + 0.01 * (weight.T @ weight - torch.eye(8)).square().sum()

    model = fit(Penalized())
    return Seen(model.losses[0], [model.losses, weights(model)])


@people(HOOKS, target=0.9)
def a_hook_on_the_output_of_attention(fit):
    """Forward hooks on `attention.out_proj`, which torch never calls"""
    model, calls = Sequence(), []
    model.attention.out_proj.register_forward_hook(lambda module, args, output: calls.append(output) or 2 * output)
    fit(model)
    return Seen([model.losses[0], len(calls)], [model.losses, weights(model)])


@people(LOSSES, refused=r"`net\.3\.weight` cannot be replaced .*exclude_modules=\['net\.3'\]")
def tied_in_the_fit(fit):
    """Weights tied in `on_train_start`, after the layers were factorized"""

    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)
            self.head, self.body = nn.Linear(16, 16), nn.Linear(16, 16)
            self.net = nn.Sequential(nn.Linear(12, 16), self.body, nn.ReLU(), self.head, nn.Linear(16, 4))

        def on_train_start(self):
            self.head.weight = self.body.weight

    fit(Tied())


@people(LOSSES)
def a_hypernetwork(fit):
    """A hypernetwork writes the weights of a second net, which `functional_call` runs"""

    class Hyper(Net):
        def __init__(self):
            super().__init__()
            self.hyper = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12 * 16 + 16))
            vars(self)["base"] = nn.Linear(12, 16)

        def loss(self, batch):
            made = self.hyper(torch.eye(4)[0])
            weights = {"weight": made[: 12 * 16].view(16, 12), "bias": made[12 * 16 :]}
            hidden = torch.func.functional_call(self.base, weights, (batch[0],))
            return super().loss(batch) + hidden.square().mean()

    model = fit(Hyper())
    return Seen(model.losses[0], [model.losses, net(model)])


# -------------------------------------------------------------------------------------------- derivatives in the step

DERIVATIVES = "Derivatives inside the step"


@people(DERIVATIVES)
def r1_penalty(fit):
    """R1: the squared gradient of the scores with respect to real inputs, in the loss"""

    class R1(Net):
        def loss(self, batch):
            x = batch[0].requires_grad_()
            slope = torch.autograd.grad(self(x).sum(), x, create_graph=True)[0]
            return super().loss(batch) + 5 * slope.flatten(1).square().sum(1).mean()

    model = fit(R1())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(DERIVATIVES)
def function_transforms_of_the_net(fit):
    """`torch.func.jvp`, `jacrev` and `vmap` of the net as a function of its input"""

    class Transforms(Net):
        def loss(self, batch):
            x = batch[0]
            _, along = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
            jacobian = torch.func.vmap(torch.func.jacrev(self.net))(x)
            return super().loss(batch) + along.square().mean() + jacobian.square().mean()

    model = fit(Transforms())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(DERIVATIVES)
def gradients_of_each_sample(fit):
    """Gradients of each sample: `vmap(grad(f))` of `functional_call` with detached parameters"""

    def per_sample(trainer, pl_module):
        x, y = next(iter(blobs()))
        given = {name: p.detach() for name, p in pl_module.net.named_parameters()}

        def loss(given, x, y):
            return F.cross_entropy(torch.func.functional_call(pl_module.net, given, (x[None],)), y[None])

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(given, x, y)

    seen = At("on_train_batch_start", per_sample)
    fit(Net(), seen)
    return Seen(seen.seen[0], seen.seen)


@people(DERIVATIVES, refused=r"`net\.0\.weight` .*exclude_modules")
def gradients_with_respect_to_weights(fit):
    """`torch.autograd.grad(loss, self.parameters(), create_graph=True)`: a penalty on the gradient's norm"""

    class Flat(Net):
        def loss(self, batch):
            loss = super().loss(batch)
            gradients = torch.autograd.grad(loss, [*self.parameters()], create_graph=True)
            return loss + 0.1 * sum(g.square().sum() for g in gradients)

    fit(Flat())


@people(DERIVATIVES, refused=r"`net\.0\.weight` .*exclude_modules")
def gradients_with_respect_to_weights_unused(fit):
    """The same with `allow_unused=True`, which forgives weights that got no gradient"""

    class Flat(Net):
        def loss(self, batch):
            loss = super().loss(batch)
            gradients = torch.autograd.grad(loss, [*self.parameters()], create_graph=True, allow_unused=True)
            return loss + 0.1 * sum(g.square().sum() for g in gradients if g is not None)

    fit(Flat())


@people(DERIVATIVES, refused=r"`net\.2\.weight` .*exclude_modules")
def gradnorm(fit):
    """GradNorm: the gradient of each loss with respect to one shared layer's weight"""

    class GradNorm(Net):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss + torch.autograd.grad(loss, self.net[2].weight, retain_graph=True, create_graph=True)[0].norm()

    fit(GradNorm())


@people(DERIVATIVES, refused=r"`net\.0\.weight` .*exclude_modules")
def hessian_vector_products(fit):
    """Hessian-vector products over `self.parameters()`, for the sharpness"""

    def sharpness(trainer, pl_module):
        parameters = [*pl_module.parameters()]
        loss = pl_module.loss(next(iter(blobs())))
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        along = sum((g * torch.ones_like(p)).sum() for g, p in zip(gradients, parameters, strict=True))
        return torch.autograd.grad(along, parameters)

    fit(Net(), At("on_train_batch_end", sharpness))


@people(DERIVATIVES, refused=r"`net\.0\.weight` .*exclude_modules")
def maml(fit):
    """MAML: an inner step from `named_parameters()`, the outer loss by `functional_call`"""

    class MAML(Net):
        def loss(self, batch):
            fast = dict(self.net.named_parameters())
            inner = F.cross_entropy(torch.func.functional_call(self.net, fast, (batch[0],)), batch[1])
            slopes = torch.autograd.grad(inner, [*fast.values()], create_graph=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), slopes, strict=True)}
            return F.cross_entropy(torch.func.functional_call(self.net, fast, (batch[0],)), batch[1])

    fit(MAML())


@people(DERIVATIVES)
def maml_of_first_order(fit):
    """MAML of first order: `p.detach().requires_grad_()`, `torch.autograd.grad` by these, and a step from each `p`"""

    class MAML(Net):
        def loss(self, batch):
            def inner(given):
                return F.cross_entropy(torch.func.functional_call(self.net, given, (batch[0],)), batch[1])

            given = {name: p.detach().requires_grad_() for name, p in self.net.named_parameters()}
            slopes = torch.autograd.grad(inner(given), [*given.values()])
            assert all(type(slope) is Tensor and slope.abs().sum() > 0 for slope in slopes)
            named = zip(self.net.named_parameters(), slopes, strict=True)
            return inner({name: p - 0.1 * slope for (name, p), slope in named})

    model = fit(MAML())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(DERIVATIVES)
def maml_by_function_transforms(fit):
    """MAML by `torch.func.grad` over a dict of the parameters"""

    class MAML(Net):
        def loss(self, batch):
            def inner(given):
                return F.cross_entropy(torch.func.functional_call(self.net, given, (batch[0],)), batch[1])

            given = {name: p.clone() for name, p in self.net.named_parameters()}
            slopes = torch.func.grad(inner)(given)
            return inner({name: p - 0.1 * slopes[name] for name, p in given.items()})

    model = fit(MAML())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(DERIVATIVES, refused=r"`net\.0\.weight` itself was given to a transform.*p\.clone\(\)")
def function_transforms_over_the_parameters(fit):
    """`torch.func.grad` over `dict(self.net.named_parameters())`, the parameters themselves"""

    class MAML(Net):
        def loss(self, batch):
            def inner(given):
                return F.cross_entropy(torch.func.functional_call(self.net, given, (batch[0],)), batch[1])

            given = dict(self.net.named_parameters())
            slopes = torch.func.grad(inner)(given)
            return inner({name: p - 0.1 * slopes[name] for name, p in given.items()})

    fit(MAML())


@people(DERIVATIVES)
def virtual_adversarial_training(fit):
    """Virtual adversarial training: a direction from a backward pass with respect to the input"""

    class VAT(Net):
        def loss(self, batch):
            x = batch[0]
            with torch.no_grad():
                aim = self(x).softmax(1)
            d = (1e-2 * torch.ones_like(x)).requires_grad_()
            F.kl_div(self(x + d).log_softmax(1), aim, reduction="batchmean").backward()
            d = F.normalize(d.grad, dim=1)
            self.zero_grad()
            return super().loss(batch) + F.kl_div(self(x + d).log_softmax(1), aim, reduction="batchmean")

    model = fit(VAT())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(DERIVATIVES)
def sam_in_manual_optimization(fit):
    """SAM in two passes over `optimizer.param_groups`, in manual optimization"""

    class SAM(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = self.loss(batch)
            self.losses.append(loss.detach())
            self.manual_backward(loss)
            climbed = [(p, p.grad * 0.05) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
            with torch.no_grad():
                for p, step in climbed:
                    p.add_(step)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            with torch.no_grad():
                for p, step in climbed:
                    p.sub_(step)
            optimizer.step()
            optimizer.zero_grad()

    model = fit(SAM())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(DERIVATIVES, refused=r"`net\.0\.weight` .*exclude_modules")
def sam_over_parameters(fit):
    """SAM over `self.parameters()`: `p.add_(p.grad * scale)`"""

    class SAM(Net):
        def on_after_backward(self):
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(p.grad * 0.05)

    fit(SAM())


@people(DERIVATIVES)
def two_backward_passes(fit):
    """`manual_backward` twice before a step, once with `retain_graph=True`"""

    class Twice(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            output = self(batch[0])
            loss = F.cross_entropy(output, batch[1])
            self.losses.append(loss.detach())
            self.manual_backward(loss, retain_graph=True)
            self.manual_backward(0.1 * output.square().mean())
            optimizer.step()

    model = fit(Twice())
    return Seen(model.losses[0], [model.losses, net(model)])


# ------------------------------------------------------------------------------------------------ writes into weights

WRITES = "Writes into weights"
LOST = r"`net\.\d\.weight` was to be changed by `{}`.*exclude_modules=\['net\.\d'\]"


def initialize(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@people(WRITES)
def initialized_before(fit):
    """`model.apply(initialize)` in `setup` and in `configure_optimizers`"""

    class Late(Net):
        def setup(self, stage):
            self.apply(initialize)

        def configure_optimizers(self):
            self.net[4].reset_parameters()
            return super().configure_optimizers()

    start = At("on_train_start", lambda _, m: weights(m))
    fit(Late(), start)
    return Seen(start.seen)


@people(WRITES, refused=LOST.format("uniform_"))
def initialized_late(fit):
    """`model.apply(initialize)` in `on_fit_start` or `on_train_start`, with `isinstance(m, nn.Linear)`"""

    class Late(Net):
        def on_fit_start(self):
            self.apply(initialize)

    fit(Late())


@people(WRITES, refused=LOST.format("kaiming_uniform_"))
def the_head_reset(fit):
    """`self.net[4].reset_parameters()` in `on_train_start`: a new head"""

    class Reset(Net):
        def on_train_start(self):
            self.net[4].reset_parameters()

    fit(Reset())


def initialization(name, *arguments):
    """Registers one of torch's initializations, called while layers train."""

    def run(fit):
        fit(Net(), At("on_train_start", lambda _, m: getattr(nn.init, name)(m.net[2].weight, *arguments)))

    run.__name__, run.__doc__ = f"init_{name}", f"`nn.init.{name}(layer.weight)` in `on_train_start`"
    people(WRITES, refused=r"`net\.2\.weight` was to be changed by `\w+_`.*exclude_modules=\['net\.2'\]")(run)


for _name in ("normal_", "kaiming_normal_", "trunc_normal_", "zeros_", "sparse_"):
    initialization(_name, *([0.1] if _name == "sparse_" else []))
initialization("constant_", 0.1)


@people(WRITES, refused=r"`net\.4` is another module .*exclude_modules=\['net\.4'\]")
def the_head_replaced(fit):
    """`self.net[4] = nn.Linear(16, 4)` in `on_train_start`: another module, which no optimizer has"""

    class Replaced(Net):
        def on_train_start(self):
            self.net[4] = nn.Linear(16, 4)

    fit(Replaced())


@people(WRITES, refused=LOST.format("mul_"))
def masks_after_each_step(fit):
    """`p.data.mul_(mask)` over `named_parameters()` after each step"""

    class Masked(Net):
        def on_train_start(self):
            self.masks = {name: torch.ones_like(p) for name, p in self.named_parameters()}

        def on_train_batch_end(self, *_):
            for name, p in self.named_parameters():
                p.data.mul_(self.masks[name])

    fit(Masked())


@people(WRITES)
def masks_by_whole_values(fit):
    """`p.data = p.data * mask` or `p.copy_(p * mask)` after each step, while every rank is kept"""

    class Masked(Net):
        @torch.no_grad()
        def on_train_batch_end(self, *_):
            if fit.form != "cut":
                self.net[0].weight.data = self.net[0].weight.data * torch.ones(16, 12).triu()
                self.net[2].weight.copy_(self.net[2].weight * torch.ones(16, 16).tril())
                assert_same(self.net[2].weight.detach().clone(), self.net[2].weight.tril())

    after = At("on_train_batch_start", lambda _, m: weights(m))
    model = fit(Masked(), after)
    if fit.form != "cut":
        assert not after.seen[-1]["net.2.weight"].triu(1).abs().max() > 1e-12
    return Seen(None, [after.seen, net(model)])


@people(WRITES)
def max_norm(fit):
    """A bound on each unit's norm: `layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 1.0))` after each step"""

    def bound(trainer, pl_module):
        if fit.form == "cut" and trainer.global_step > 1:
            return
        with torch.no_grad():
            for layer in pl_module.net:
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(torch.renorm(layer.weight, 2, 0, 0.5))
        assert all(m.weight.norm(dim=1).max() < 0.5 + 1e-9 for m in pl_module.net if isinstance(m, nn.Linear))

    model = fit(Net(), At("on_train_batch_end", bound))
    return Seen(None, net(model))


@people(WRITES, refused=LOST.format("div_"))
def weights_normalized(fit):
    """`layer.weight.data.div_(layer.weight.data.norm(dim=1, keepdim=True))` after each step"""
    fit(
        Net(),
        At("on_train_batch_end", lambda _, m: m.net[2].weight.data.div_(m.net[2].weight.data.norm(dim=1)[:, None])),
    )


@people(WRITES, refused=LOST.format("add_"))
def noise_on_weights(fit):
    """`p.add_(noise)` on all parameters before each step"""

    @torch.no_grad()
    def shake(trainer, pl_module):
        for p in pl_module.parameters():
            p.add_(0.01 * torch.ones_like(p))

    fit(Net(), At("on_train_batch_start", shake))


@people(WRITES, refused=r"`net\.0\.weight` .*exclude_modules")
def gradient_descent_by_hand(fit):
    """`p -= lr * p.grad` over `self.parameters()`, without an optimizer's step"""

    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.zero_grad()
            self.manual_backward(self.loss(batch))
            with torch.no_grad():
                for p in self.parameters():
                    p -= 0.1 * p.grad
            self.optimizers().step()

    fit(ByHand())


@people(WRITES)
def a_whole_net_copied_in(fit):
    """`with torch.no_grad(): p.copy_(q)` of another net's parameters, in `on_train_start`"""
    torch.manual_seed(9)
    other = mlp()

    class Copied(Net):
        @torch.no_grad()
        def on_train_start(self):
            for p, q in zip(self.net.parameters(), other.parameters(), strict=True):
                p.copy_(q)

    start = At("on_train_batch_start", lambda _, m: weights(m.net))
    model = fit(Copied(), start)
    assert_same(start.seen[0], weights(other))
    return Seen([start.seen[0], model.losses[0]], [start.seen, model.losses])


@people(WRITES)
def foreach_copy(fit):
    """`torch._foreach_copy_` of another net's parameters into this one's"""
    torch.manual_seed(9)
    other = mlp()

    @torch.no_grad()
    def take(trainer, pl_module):
        torch._foreach_copy_([*pl_module.net.parameters()], [*other.parameters()])

    start = At("on_train_batch_start", lambda _, m: weights(m.net))
    fit(Net(), start, first=[At("on_train_start", take)])
    assert_same(start.seen[0], weights(other))
    return Seen(start.seen[0], start.seen)


@people(WRITES, refused=LOST.format("_foreach_lerp_"))
def foreach_lerp(fit):
    """`torch._foreach_lerp_` of all parameters towards others: a slow and a fast net"""

    @torch.no_grad()
    def pull(trainer, pl_module):
        torch._foreach_lerp_([*pl_module.net.parameters()], [p.clone() for p in pl_module.net.parameters()], 0.5)

    fit(Net(), At("on_train_batch_end", pull))


@people(WRITES)
def layers_swapped_by_state_dicts(fit):
    """Population-based training: the weights of one layer loaded into another, by state dicts"""

    def exchange(trainer, pl_module):
        if trainer.global_step == 0:
            state = pl_module.net[2].state_dict()
            pl_module.net[2].load_state_dict({"weight": state["weight"].T.clone(), "bias": state["bias"] * 0})

    start = At("on_train_batch_end", lambda _, m: weights(m.net))
    model = fit(Net(), start, first=[At("on_train_batch_start", exchange)])
    return Seen(model.losses[0], [start.seen, model.losses])


@people(WRITES, refused=r"read-only")
def by_numpy(fit):
    """`weight.detach().numpy()[0] = 0`: the array is read-only"""

    def clear(trainer, pl_module):
        pl_module.net[2].weight.detach().numpy()[0] = 0

    fit(Net(), At("on_train_batch_end", clear))


@people(WRITES, refused=LOST.format("zero_"))
def by_parts_of_other_names(fit):
    """`hsplit`, `adjoint` and `broadcast_to` of `weight.data`, written into"""

    def clear(trainer, pl_module):
        weight = pl_module.net[2].weight
        assert weight.data.hsplit(2)[0].shape == (16, 8) and weight.data.adjoint().shape == (16, 16)
        torch.broadcast_to(weight.data, (1, 16, 16))[0, 0].zero_()

    fit(Net(), At("on_train_batch_end", clear))


@people(WRITES, refused=r"`net\.2\.weight` was to share its memory.*exclude_modules=\['net\.2'\]")
def shared_by_dlpack(fit):
    """`torch.from_dlpack(weight.detach())`, by which other libraries write"""
    fit(Net(), At("on_train_batch_end", lambda trainer, model: torch.from_dlpack(model.net[2].weight.detach())))


@people(WRITES, refused=r"`net\.2\.weight` was to share its memory.*exclude_modules=\['net\.2'\]")
def shared_with_another_parameter(fit):
    """`nn.Parameter(weight.data)` in the middle of a fit: two parameters of the same memory"""
    fit(Net(), At("on_train_start", lambda trainer, model: nn.Parameter(model.net[2].weight.data)))


@people(WRITES)
def a_converted_copy(fit):
    """`weight.detach().float()` of another dtype, a copy, written into"""

    def clear(trainer, pl_module):
        copied = pl_module.net[2].weight.detach().to(torch.bfloat16)
        copied[0] = 0
        assert not copied[0].any() and pl_module.net[2].weight[0].any()

    return Seen(values=net(fit(Net(), At("on_train_batch_end", clear))))


# ---------------------------------------------------------------------------------------------- files and several fits

FILES = "Files, and several fits"


@people(FILES)
def the_best_net_put_back(fit):
    """`on_train_end` puts another net in the place of the trained one, a copy that was kept: `self.net = self.best`"""

    class Best(Net):
        def on_train_epoch_end(self):
            self.best = copy.deepcopy(self.net)

        def on_train_end(self):
            self.net = self.best

    model = fit(Best())
    if fit.callback is not None and fit.form == "cut":
        assert "3 layers are not in the model any more" in " ".join(fit.callback.report.warnings)
    return Seen([type(layer) for layer in model.net], net(model))


class Wrapped(LightningModule):
    """Trains the net that it is given, and keeps it among its hyperparameters."""

    def __init__(self, net, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.hparams.rate)


@people(FILES)
def the_net_among_hyperparameters(fit):
    """`save_hyperparameters()` of a module that is given its net, and `load_from_checkpoint` of a file after the fit"""
    torch.manual_seed(5)
    model, x = Wrapped(mlp()), torch.ones(2, 12)
    in_fit = At("on_train_end", lambda trainer, _: trainer.save_checkpoint(folder / "in_the_fit.ckpt"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit(model, in_fit)
        fit.trainer.save_checkpoint(folder / "after.ckpt")
        for path in folder.iterdir():
            loaded = Wrapped.load_from_checkpoint(path, weights_only=False)
            assert_same(loaded.net(x), model.net(x))
            assert [type(layer) for layer in loaded.net] == [type(layer) for layer in mlp()]
    return Seen([sorted(model.hparams)], net(model))


@people(FILES)
def loaded_with_a_prefix(fit):
    """A file with a prefix stripped, `strict=False`, into a part of the module, in `on_fit_start`"""
    torch.manual_seed(9)
    saved = {f"module.encoder.{key}": value for key, value in weights(mlp()).items()} | {"module.other": torch.ones(1)}

    class Pretrained(Net):
        def on_fit_start(self):
            state = {key.removeprefix("module.encoder."): value for key, value in saved.items()}
            found = self.net.load_state_dict(state, strict=False)
            assert found.missing_keys == [] and found.unexpected_keys == ["module.other"]

    start = At("on_train_start", lambda _, m: weights(m.net))
    model = fit(Pretrained(), start)
    return Seen([start.seen, model.losses[0]], model.losses)


@people(FILES)
def loaded_where_shapes_fit(fit):
    """Only what fits is loaded: `{k: v for k, v in saved.items() if k in own and v.shape == own[k].shape}`"""
    torch.manual_seed(9)
    saved = weights(mlp(outputs=7))

    class Pretrained(Net):
        def on_train_start(self):
            own = self.net.state_dict()
            own.update({key: value for key, value in saved.items() if key in own and value.shape == own[key].shape})
            self.net.load_state_dict(own)

    start = At("on_train_batch_start", lambda _, m: weights(m.net))
    model = fit(Pretrained(), start)
    return Seen([start.seen[0], model.losses[0]], [start.seen, model.losses])


@people(FILES)
def a_size_that_does_not_fit(fit):
    """A file of other sizes, loaded with `strict=False`: torch's own error"""

    class Pretrained(Net):
        message = None

        def on_train_start(self):
            with pytest.raises(RuntimeError, match=r"net\.2\.weight") as caught:
                self.load_state_dict({"net.2.weight": torch.ones(3, 3)}, strict=False)
            self.message = type(caught.value).__name__

    model, start = Pretrained(), At("on_train_batch_start", lambda _, m: weights(m.net))
    fit(model, start)
    return Seen([model.message, start.seen[0]], start.seen)


@people(FILES)
def a_new_model_for_each_fold(fit):
    """k folds: the same initial state dict into a new model, for each fold a new callback"""
    initial, losses, ends = copy.deepcopy(Net().state_dict()), [], []
    for _ in range(2):
        model = Net()
        model.load_state_dict(initial)
        fit(model)
        losses.append(model.losses[0])
        ends.append(net(model))
    return Seen(losses, ends)


@people(FILES)
def one_model_for_all_folds_copied(fit):
    """k folds: `copy.deepcopy(model)` for each fold"""
    model, losses = Net(), []
    for _ in range(2):
        twin = copy.deepcopy(model)
        fit(twin)
        losses.append(twin.losses)
    assert not model.losses
    return Seen([fold[0] for fold in losses], losses)


@people(FILES, options={"final": "dense"})
def one_model_reset_for_each_fold(fit):
    """k folds: one model, reset by `load_state_dict` of its first state, `final="dense"`, one callback"""
    model = Net()
    initial, losses, reports = copy.deepcopy(model.state_dict()), [], []
    for fold in range(2):
        model.load_state_dict(initial)
        model.losses = []
        fit(model, again=fold > 0)
        losses.append(model.losses)
        reports.append(fit.callback and fit.callback.report)
    assert fit.callback is None or reports[0] is not reports[1]
    if fit.form == "cut":
        assert torch.linalg.matrix_rank(model.net[2].weight) < 12
    return Seen([fold[0] for fold in losses], losses)


@people(FILES)
def fit_twice(fit):
    """`trainer.fit` twice with the same model, the second time with a new Trainer"""
    model = Net()
    fit(model)
    first = len(model.losses)
    assert model.losses[first - 1].isfinite()
    fit(model, again=True)
    return Seen([first, len(model.losses)], model.losses[:6])


@people(FILES)
def early_stopping_and_the_best(fit):
    """`EarlyStopping` and `ModelCheckpoint`; afterwards `Net.load_from_checkpoint(best_model_path)`"""
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    best = ModelCheckpoint(f"files-{fit.form}", monitor="val_loss", filename="{epoch}")
    fit(Validated(), EarlyStopping("val_loss", patience=5), best, val=blobs(), enable_checkpointing=True)
    loaded = Validated.load_from_checkpoint(best.best_model_path)
    assert [type(layer) for layer in loaded.net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    return Seen(list(loaded.state_dict()), weights(loaded))


@people(FILES)
def the_best_reloaded_in_the_fit(fit):
    """The best weights so far are loaded in `on_train_end`, by `load_state_dict(torch.load(path)["state_dict"])`"""
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(f"files-{fit.form}", monitor="val_loss", filename="{epoch}")

    class Reloads(Validated):
        def on_train_end(self):
            self.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])

    model = fit(Reloads(), val=blobs(), first=[best], enable_checkpointing=True)
    return Seen(None, net(model))


@people(FILES, refused=r'Missing key\(s\) in state_dict: "net\.0\.0\.weight"')
def the_best_reloaded_after_the_fit(fit):
    """The same after the fit, into a model that is low-rank by then: torch's own error (`final="dense"` avoids it)"""
    from lightning.pytorch.callbacks import ModelCheckpoint

    best = ModelCheckpoint(f"files-{fit.form}", monitor="val_loss", filename="{epoch}")
    fit.form = fit.form if fit.form == "reference" else "cut"
    model = fit(Validated(), best, val=blobs(), enable_checkpointing=True)
    model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])


@people(FILES)
def snapshots_of_a_cycle(fit):
    """Snapshot ensembles: state dicts kept by `deepcopy(model.state_dict())`, each loaded into a new dense model"""
    snapshots = At("on_train_epoch_end", lambda _, m: (copy.deepcopy(m.state_dict()), m(torch.ones(2, 12)).detach()))
    fit(Net(), snapshots)
    for state, output in snapshots.seen:
        twin = Net()
        twin.load_state_dict(state)
        assert_same(twin(torch.ones(2, 12)), output)
    return Seen(list(snapshots.seen[0][0]), snapshots.seen)


@people(FILES)
def state_dicts_without_copies(fit):
    """`model.state_dict()` kept without a copy follows the weights in a dense run; here it is what they were"""
    kept = At("on_train_start", lambda _, m: m.state_dict())
    fit(Net(), kept)
    return Seen({key: value.shape for key, value in kept.seen[0].items()})


@people(FILES)
def keys_with_keep_vars(fit):
    """`state_dict(keep_vars=True)`: the very parameters"""

    def look(trainer, pl_module):
        state = pl_module.state_dict(keep_vars=True)
        named = dict(pl_module.named_parameters())
        assert all(state[name] is p for name, p in named.items())
        return {name: (p.requires_grad, p.shape) for name, p in state.items()}

    seen = At("on_train_batch_end", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(FILES)
def whole_pickles_in_the_fit(fit):
    """`torch.save(self.net, path)` after each epoch, and `torch.load` of it: plain layers"""

    def save(trainer, pl_module):
        torch.save(pl_module.net, "net.pt")
        loaded = torch.load("net.pt", weights_only=False)
        assert [type(layer) for layer in loaded] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
        assert_same(loaded(torch.ones(1, 12)), pl_module.net(torch.ones(1, 12)))
        return list(loaded.state_dict()), weights(loaded)

    seen = At("on_train_epoch_end", save)
    fit(Net(), seen)
    return Seen(seen.seen[0][0], seen.seen)


@people(FILES)
def exported_in_the_fit(fit):
    """`torch.export.export` of the net after each epoch, and `torch.fx.symbolic_trace`, whose nodes are its layers"""
    x = blobs().dataset.tensors[0]

    def export(trainer, pl_module):
        graph = torch.fx.symbolic_trace(pl_module.net)
        for program in (torch.export.export(pl_module.net, (x,)).module(), graph):
            torch.testing.assert_close(program(x), pl_module(x))
        return [f"{node.op} {node.target}" for node in graph.graph.nodes]

    nodes = At("on_train_epoch_end", export)
    fit(Net(), nodes)
    return Seen(nodes.seen[0])


@people(FILES)
def copies_are_traced(fit):
    """`torch.jit.trace` and `torch.jit.script` of a `copy.deepcopy` of the net, after each epoch"""
    x = blobs().dataset.tensors[0]

    def trace(trainer, pl_module):
        net = copy.deepcopy(pl_module.net)
        for program in (torch.jit.trace(net, x), torch.jit.script(net)):
            torch.testing.assert_close(program(x), pl_module(x))
        return [*program.state_dict()]

    keys = At("on_train_epoch_end", trace)
    fit(Net(), keys)
    return Seen(keys.seen)


@people(FILES, needs=("tensorboard",), refused=r"`net.0` cannot be taken by `torch.jit.trace` .*: turn it off")
def a_graph_for_tensorboard(fit):
    """`TensorBoardLogger(log_graph=True)` and an `example_input_array`"""
    model = Net()
    model.example_input_array = torch.zeros(2, 12)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, logger=TensorBoardLogger(folder, log_graph=True), log_every_n_steps=1)


@people(FILES, refused=r"`net.0` cannot be taken by `torch.jit.trace` while it trains .*copy.deepcopy\(model\)")
def traced_in_the_fit(fit):
    """`torch.jit.trace(self.net, x)` after an epoch, as `to_onnx(dynamo=False)` traces too: the net itself"""
    x = blobs().dataset.tensors[0]
    fit(Net(), At("on_train_epoch_end", lambda _, m: torch.jit.trace(m.net, x)))


@people(FILES, refused=r"`net.0` cannot be taken by `torch.jit.script` while it trains .*copy.deepcopy\(model\)")
def scripted_in_the_fit(fit):
    """`torch.jit.script(self.net)` after an epoch: the net itself"""
    fit(Net(), At("on_train_epoch_end", lambda _, m: torch.jit.script(m.net)))


# ---------------------------------------------------------------------------------------------------------- optimizers

OPTIMIZERS = "Optimizers"


def fit_with(fit, make):
    """Trains with an optimizer; the first loss, and all."""
    model = fit(Net(make))
    assert all(loss.isfinite() for loss in model.losses)
    return Seen(model.losses[0], [model.losses, net(model)])


@people(OPTIMIZERS)
def moments_looked_up_by_weights(fit):
    """`if "exp_avg" in optimizer.state[p]` for the model's own parameters, and a checkpoint afterwards"""
    model = Net(lambda net: torch.optim.Adam(net.parameters()))

    def look(trainer, module):
        optimizer = trainer.optimizers[0]
        found = ["exp_avg" in optimizer.state[p] for name, p in module.named_parameters() if name.endswith("bias")]
        return found, [len(optimizer.state[layer.weight]) > 5 for layer in module.net[::2]], len(optimizer.state_dict())

    seen = At("on_train_batch_end", look)
    fit(model, seen)
    return Seen(seen.seen, net(model))


@people(OPTIMIZERS, refused="SVD training does not work with MuonWithAuxAdam, which trains matrices only")
def muon_under_another_name(fit):
    """Muon as its author's package has it, by another name and with Adam for what is no matrix"""

    class MuonWithAuxAdam(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

        def step(self, closure=None):
            return closure()

    fit(Net(lambda net: MuonWithAuxAdam(net.parameters())))


@people(OPTIMIZERS, refused="SVD training does not work with ByIds, which keeps a list of its own, `plain`")
def an_optimizer_that_notes_ids(fit):
    """An optimizer of one's own that notes which parameters are not to decay by their `id`"""

    class ByIds(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters := [*parameters], 0.05)
            self.plain = {id(p) for p in parameters if p.ndim < 2}

    fit(Net(lambda net: ByIds(net.parameters())))


@people(OPTIMIZERS)
def adafactor(fit):
    """`torch.optim.Adafactor`, whose state is a row and a column for each matrix"""
    return fit_with(fit, lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01, weight_decay=0.1))


@people(OPTIMIZERS)
def foreach_and_not(fit):
    """`foreach=True` for some parameters, `foreach=False` for others"""

    def make(m):
        groups = [{"params": m.net[:3].parameters(), "foreach": True}, {"params": m.net[3:].parameters()}]
        return torch.optim.AdamW(groups, lr=0.01, foreach=False)

    return fit_with(fit, make)


@people(OPTIMIZERS)
def rates_as_tensors(fit):
    """A rate that is a tensor, `lr=torch.tensor(0.01)`, with `capturable=True` or `fused=True`"""
    return fit_with(fit, lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), fused=True))


@people(OPTIMIZERS)
def maximizing(fit):
    """`maximize=True` with the negated loss"""

    class Ascends(Net):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)

    model = fit(Ascends(lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True)))
    return Seen(model.losses[0], model.losses)


class TwoNets(LightningModule):
    """A generator and a discriminator, each with an optimizer, in manual optimization with ``toggle_optimizer``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.automatic_optimization = False
        self.generator, self.critic = mlp(12, 16, 12), mlp(12, 16, 1)
        self.losses, self.toggled = [], []

    def training_step(self, batch, batch_idx):
        x, noise = batch[0], torch.linspace(0, 1, 96).view(8, 12)
        for_generator, for_critic = self.optimizers()
        self.toggle_optimizer(for_critic)
        self.toggled.append([name for name, p in self.named_parameters() if p.requires_grad])
        loss = F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(self.generator(noise).detach())).mean()
        self.losses.append(loss.detach())
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        self.untoggle_optimizer(for_critic)
        self.toggle_optimizer(for_generator)
        self.toggled.append([name for name, p in self.named_parameters() if p.requires_grad])
        for_generator.zero_grad()
        self.manual_backward(F.softplus(-self.critic(self.generator(noise))).mean())
        for_generator.step()
        self.untoggle_optimizer(for_generator)

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]


@people(OPTIMIZERS)
def toggled_optimizers(fit):
    """A GAN with `toggle_optimizer` and `untoggle_optimizer`: which parameters train in which half"""
    model = fit(TwoNets())
    assert all(p.requires_grad for p in model.parameters())
    if fit.form == "cut":  # the last form has other names by the end
        return Seen()
    return Seen([model.toggled, model.losses[0]], [model.losses, weights(model)])


@people(OPTIMIZERS)
def an_epoch_for_each_optimizer(fit):
    """Two optimizers that take turns by epochs, the other half frozen by `requires_grad_(False)`"""

    class Turns(TwoNets):
        def training_step(self, batch, batch_idx):
            turn = self.current_epoch % 2
            self.generator.requires_grad_(turn == 0)
            self.critic.requires_grad_(turn == 1)
            optimizer = self.optimizers()[turn]
            loss = F.mse_loss(self.generator(batch[0]), batch[0]) + self.critic(batch[0]).square().mean()
            self.losses.append(loss.detach())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    epochs = At("on_train_epoch_end", lambda _, m: (weights(m.generator), weights(m.critic)))
    model = fit(Turns(), epochs)
    if fit.form != "cut":
        assert_same(epochs.seen[1][0], epochs.seen[0][0])
        assert_same(epochs.seen[2][1], epochs.seen[1][1])
    return Seen([epochs.seen[0][1], model.losses[0]], [epochs.seen, model.losses])


class Soap(torch.optim.Optimizer):
    """A short SOAP: Adam in the eigenbasis of two averages of G G^T, each as large as a side of the parameter."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                G = p.grad if p.ndim == 2 else p.grad.view(1, -1)
                state = self.state[p]
                if not state:
                    state |= {"L": G @ G.T, "R": G.T @ G, "m": torch.zeros_like(G), "v": torch.zeros_like(G)}
                for key, product in (("L", G @ G.T), ("R", G.T @ G)):
                    state[key].lerp_(product, 0.1)
                left, right = (torch.linalg.eigh(state[key])[1] for key in ("L", "R"))
                turned = left.T @ G @ right
                state["m"].lerp_(G, 0.1)
                state["v"].lerp_(turned.square(), 0.1)
                step = left @ ((left.T @ state["m"] @ right) / (state["v"].sqrt() + 1e-3)) @ right.T
                p.sub_(group["lr"] * step.view_as(p))
        return loss


@people(OPTIMIZERS)
def soap(fit):
    """SOAP: preconditioners as large as the sides of each matrix"""
    return fit_with(fit, lambda m: Soap(m.parameters(), lr=0.01))


class Lookahead:
    """A wrapper that is no `Optimizer`: it keeps slow weights of its own, by the groups that it sees in each step."""

    def __init__(self, optimizer):
        self.optimizer, self.slow, self.count = optimizer, {}, 0

    def after_step(self, optimizer, args, kwargs):
        self.count += 1
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if self.count % 2 == 0 and p in self.slow and self.slow[p].shape == p.shape:
                p.data.lerp_(self.slow[p], 0.5)
            self.slow[p] = p.data.clone()


@people(OPTIMIZERS)
def step_hooks_of_an_optimizer(fit):
    """`register_step_post_hook` and `register_step_pre_hook`, which walk the groups: Lookahead by a hook"""

    def make(m):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
        optimizer.register_step_post_hook(Lookahead(optimizer).after_step)
        return optimizer

    return fit_with(fit, make)


@people(OPTIMIZERS)
def per_parameter_optimizers(fit):
    """`optimizer.state` and `optimizer.state_dict()` are looked at after each step"""

    def look(trainer, pl_module):
        state = trainer.optimizers[0].state_dict()
        assert {*state["state"]} <= {place for group in state["param_groups"] for place in group["params"]}
        return [{key: g[key] for key in ("lr", "weight_decay", "betas")} for g in state["param_groups"]]

    seen = At("on_train_batch_end", look)
    fit(Net(lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)), seen)
    return Seen(seen.seen)


@people(OPTIMIZERS, needs=("schedulefree",))
def schedule_free(fit):
    """`schedulefree.AdamWScheduleFree`, its modes set in `on_train_epoch_start` and `on_validation_start`"""
    import schedulefree

    class Free(Validated):
        def on_train_epoch_start(self):
            self.optimizers().optimizer.train()

        def on_validation_start(self):
            if not self.trainer.sanity_checking:
                self.optimizers().optimizer.eval()

        def on_validation_end(self):
            if not self.trainer.sanity_checking:
                self.optimizers().optimizer.train()

    def make(m):
        return schedulefree.AdamWScheduleFree(m.parameters(), lr=0.01, foreach=False)

    model = fit(Free(make), val=blobs(), num_sanity_val_steps=0)
    return Seen(model.losses[0], [model.losses, model.val_losses[:4]])  # the last step's cut begins a new average


@people(OPTIMIZERS, needs=("torchao",))
def low_bit_adam(fit):
    """torchao's `AdamW8bit`, whose moments are quantized"""
    from torchao.optim import AdamW8bit

    return fit_with(fit, lambda m: AdamW8bit(m.parameters(), lr=0.01, block_size=64))


class StepsItsOwnWay(torch.optim.SGD):
    """Steps as plain SGD with a rate for each group in a list, and one of a parameter's own."""

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group, rate in zip(self.param_groups, self.base_lrs, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad + group["weight_decay"] * p, alpha=-rate * getattr(p, "lr_scale", 1.0))
        return loss


@people(OPTIMIZERS)
def a_list_by_groups_in_the_optimizer(fit):
    """`zip(self.param_groups, self.base_lrs)` in the step, as AdaBound has it, with weight decay"""
    before = At("on_train_start", lambda trainer, model: weights(model.net))
    model = fit(Net(lambda net: StepsItsOwnWay(net.parameters(), lr=0.1, weight_decay=0.01)), before)
    if fit.form != "cut":
        assert all(not torch.equal(value, before.seen[0][name]) for name, value in net(model).items())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(OPTIMIZERS)
def an_attribute_in_the_step(fit):
    """`getattr(p, "lr_scale", 1.0)` in the optimizer's own step"""

    def make(model):
        model.net[2].weight.lr_scale = 0.0
        return StepsItsOwnWay(model.parameters(), lr=0.1)

    before = At("on_train_start", lambda trainer, model: weights(model.net[2]))
    model = fit(Net(make), before)
    if fit.form != "cut":
        assert_same(weights(model.net[2])["weight"], before.seen[0]["weight"])
    return Seen(model.losses[0], [model.losses, net(model)])


class CallsItsBase(torch.optim.AdamW):
    """Has a step of its own that calls torch's."""

    def step(self, closure=None):
        return super().step(closure)


@people(OPTIMIZERS)
def a_step_that_calls_its_base(fit):
    """`super().step(closure)` in a subclass of AdamW, where another AdamW was made before"""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    model = fit(Net(lambda net: CallsItsBase(net.parameters(), lr=0.01, weight_decay=0.1)))
    return Seen(model.losses[0], [model.losses, net(model)])


@people(OPTIMIZERS, refused="SVD training does not work with SGD, in whose groups `anchors` has an entry for each")
def anchors_in_a_group(fit):
    """A list of tensors beside `params` in a group: the anchors of FedProx"""

    def make(model):
        own = [*model.parameters()]
        return torch.optim.SGD([{"params": own, "anchors": [p.detach().clone() for p in own]}], lr=0.1)

    fit(Net(make))


class WithMultipliers(torch.optim.SGD):
    """Takes each parameter's rate from a list in its group."""

    @torch.no_grad()
    def step(self, closure):
        loss = torch.enable_grad()(closure)()
        for group in self.param_groups:
            for rate, p in zip(group["lr_mults"], group["params"], strict=True):
                p.add_(p.grad, alpha=-group["lr"] * rate)
        return loss


@people(OPTIMIZERS, refused="SVD training does not work with WithMultipliers, in whose groups `lr_mults` has an entry")
def multipliers_in_a_group(fit):
    """A list of numbers beside `params` in a group, walked by `zip`: a multiplier of the rate for each parameter"""

    def make(model):
        own = [*model.parameters()]
        return WithMultipliers([{"params": own, "lr_mults": [1.0, 2.0] * (len(own) // 2)}], lr=0.1)

    fit(Net(make))


class OnlyLooksLikeOne:
    """What Lightning asks of an optimizer, and no more."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.defaults, self.state, self.param_groups = optimizer.defaults, optimizer.state, optimizer.param_groups
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


@people(OPTIMIZERS, refused="SVD training does not work with OnlyLooksLikeOne, which is no subclass")
def no_optimizer_of_torchs(fit):
    """A wrapper that is no `torch.optim.Optimizer`, which Lightning takes"""
    fit(Net(lambda net: OnlyLooksLikeOne(torch.optim.SGD(net.parameters(), lr=0.1))))


# ----------------------------------------------------------------------------------------- gradients and their clipping

GRADIENTS = "Gradients"


@people(GRADIENTS)
def gradients_dropped_for_a_while(fit):
    """`p.grad = None` of a layer in the first epochs (as DINO does of its last): it does not move"""

    class Dropped(Net):
        def on_after_backward(self):
            if self.current_epoch < 2:
                for parameter in self.net[0].parameters():
                    parameter.grad = None

    model = Dropped()
    first, moved = model.net[0].weight.detach().clone(), []
    look = At("on_train_epoch_end", lambda _, m: moved.append((m.net[0].weight - first).abs().max().item()))
    fit(model, look)
    assert fit.form == "cut" or max(moved[:2]) < 1e-6 < moved[2]  # a cut moves it
    return Seen(len(moved))


@people(GRADIENTS)
def grad_norms_are_logged(fit):
    """Lightning's `grad_norm(self, norm_type=2)` in `on_before_optimizer_step`"""
    from lightning.pytorch.utilities import grad_norm

    class Logs(Net):
        norms = ()

        def on_before_optimizer_step(self, optimizer):
            norms = grad_norm(self, norm_type=2)
            self.log_dict(norms)
            self.norms = [*self.norms, {key: float(value) for key, value in norms.items()}]

    model = fit(Logs())
    assert all(value > 0 for value in model.norms[0].values())
    return Seen([[*norms] for norms in model.norms], model.norms)


@people(GRADIENTS)
def the_total_norm_by_hand(fit):
    """`torch.stack([p.grad.norm() for p in parameters()]).norm()` or `p.grad.data.norm(2).item() ** 2`"""

    def total(trainer, pl_module):
        found = [p.grad.detach().norm() for p in pl_module.parameters() if p.grad is not None]
        by_hand = sum(p.grad.data.norm(2).item() ** 2 for p in pl_module.parameters()) ** 0.5
        assert by_hand == pytest.approx(float(torch.stack(found).norm()))
        return float(torch.stack(found).norm())

    seen = At("on_before_optimizer_step", total)
    fit(Net(), seen)
    return Seen(len(seen.seen), seen.seen)


@people(GRADIENTS)
def which_gradients_are_none(fit):
    """Unused parameters: `[name for name, p in named_parameters() if p.grad is None]`"""

    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(16, 16)

    names = At("on_after_backward", lambda _, m: [n for n, p in m.named_parameters() if p.grad is None])
    fit(Unused(), names)
    return Seen(names.seen)


@people(GRADIENTS)
def steps_skipped_where_gradients_are_not_finite(fit):
    """`if not torch.isfinite(p.grad).all(): self.zero_grad()` in `on_after_backward`"""

    class Skips(Net):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss * torch.inf if self.global_step == 2 else loss

        def on_after_backward(self):
            if not all(torch.isfinite(p.grad).all() for p in self.parameters() if p.grad is not None):
                self.zero_grad()

    after = At("on_train_batch_end", lambda _, m: weights(m.net))
    fit(Skips(), after)
    assert all(value.isfinite().all() for value in after.seen[-1].values())
    return Seen(None, after.seen)


@people(GRADIENTS)
def clipped_by_hand(fit):
    """`clip_grad_norm_` and `clip_grad_value_` over `self.parameters()` in `on_after_backward`"""

    class Clips(Net):
        norms = ()

        def on_after_backward(self):
            nn.utils.clip_grad_value_(self.parameters(), 0.05)
            self.norms = [*self.norms, float(nn.utils.clip_grad_norm_(self.parameters(), 0.01))]

    model = fit(Clips())
    return Seen(len(model.norms), [model.norms, model.losses, net(model)])


@people(GRADIENTS)
def clipping_overridden(fit):
    """`configure_gradient_clipping` overridden, with `self.clip_gradients`, in other ways by epoch"""

    class Clips(Net):
        asked = ()

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.asked = [*self.asked, gradient_clip_val]
            how = "norm" if self.current_epoch else "value"
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm=how)

    model = fit(Clips())
    return Seen(model.asked, [model.losses, net(model)])


@people(GRADIENTS)
def the_step_overridden(fit):
    """`optimizer_step` overridden: warm-up of the rate by hand, and every third step left out"""

    class Warm(Net):
        calls = ()

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 4)
            self.calls = [*self.calls, optimizer.param_groups[0]["lr"]]
            if len(self.calls) % 3:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    model = fit(Warm(), max_steps=6, max_epochs=6)
    return Seen([model.calls, model.losses[0]], [model.losses, net(model)])


@people(GRADIENTS)
def order_of_the_hooks(fit):
    """The hooks of a step in their order and number, with accumulation"""

    class Order(Net):
        calls = None

        def on_before_zero_grad(self, optimizer):
            self.calls.append("zero")

        def on_before_backward(self, loss):
            self.calls.append("before backward")

        def on_after_backward(self):
            self.calls.append("after backward")

        def on_before_optimizer_step(self, optimizer):
            self.calls.append("before step")

        def lr_scheduler_step(self, scheduler, metric):
            self.calls.append("rate")
            scheduler.step()

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    model = Order()
    model.calls = []
    fit(model, accumulate_grad_batches=2)
    return Seen(model.calls, model.losses)


@people(GRADIENTS)
def accumulated_by_hand(fit):
    """Accumulation by hand in manual optimization: a step every second batch"""

    class Accumulates(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch) / 2
            self.losses.append(loss.detach())
            self.manual_backward(loss)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    model = fit(Accumulates())
    return Seen(model.losses[:2], [model.losses, net(model)])


@people(GRADIENTS, refused=r"`net\.0\.weight` has no gradient.*exclude_modules=\['net\.0'\]")
def elastic_weight_consolidation(fit):
    """Fisher information for EWC: `p.grad.pow(2)` over `named_parameters()`"""
    fit(Net(), At("on_after_backward", lambda _, m: {n: p.grad.pow(2) for n, p in m.named_parameters()}))


@people(GRADIENTS, refused=r"`net\.0\.weight` has no gradient.*exclude_modules=\['net\.0'\]")
def gradients_are_centralized(fit):
    """Gradient centralization: `p.grad.sub_(p.grad.mean(1, keepdim=True))`"""

    def centralize(trainer, pl_module):
        for p in pl_module.parameters():
            if p.dim() > 1:
                p.grad.sub_(p.grad.mean(1, keepdim=True))

    fit(Net(), At("on_after_backward", centralize))


@people(GRADIENTS, refused=r"`net\.0\.weight` has no gradient.*exclude_modules=\['net\.0'\]")
def gradient_noise(fit):
    """Noise on gradients: `p.grad += noise`"""

    def shake(trainer, pl_module):
        for p in pl_module.parameters():
            p.grad += 0.01 * torch.ones_like(p)

    fit(Net(), At("on_after_backward", shake))


@people(GRADIENTS, refused=r"`net\.0\.weight` has no gradient.*exclude_modules=\['net\.0'\]")
def adaptive_clipping(fit):
    """Adaptive clipping (AGC): a norm for each unit, `p.grad.norm(2, dim=1, keepdim=True)`"""

    def clip(trainer, pl_module):
        for p in pl_module.parameters():
            most = p.detach().norm(2, dim=-1, keepdim=True).clamp(min=1e-3) * 0.01
            norm = p.grad.norm(2, dim=-1, keepdim=True)
            p.grad.copy_(torch.where(norm > most, p.grad * (most / norm), p.grad))

    fit(Net(), At("on_after_backward", clip))


@people(
    GRADIENTS, refused=r"`net\.0\.weight` (was to be given a gradient|has no gradient).*exclude_modules=\['net\.0'\]"
)
def gradients_are_kept_and_put_back(fit):
    """Gradient surgery: `kept = [p.grad.clone() for p in parameters()]`, later `p.grad = kept[i]`"""

    def keep(trainer, pl_module):
        kept = [p.grad.clone() for p in pl_module.parameters()]
        for p, gradient in zip(pl_module.parameters(), kept, strict=True):
            p.grad = gradient

    fit(Net(), At("on_after_backward", keep))


@people(GRADIENTS, refused=r"`net\.0\.weight` got no gradient.*exclude_modules")
def a_backward_pass_for_some_inputs(fit):
    """`self.manual_backward(loss, inputs=[*self.net.parameters()])`"""

    class Inputs(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch), inputs=[*self.net.parameters()])
            optimizer.step()

    fit(Inputs())


@people(GRADIENTS)
def zero_grad_by_hand(fit):
    """`p.grad = None`, `p.grad.zero_()` and `self.zero_grad(set_to_none=False)` by hand"""

    class Zeros(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            for p in self.parameters():
                if p.grad is not None and batch_idx:
                    p.grad.detach_()
                    p.grad.zero_()
                p.grad = None if not batch_idx else p.grad
            loss = self.loss(batch)
            self.losses.append(loss.detach())
            self.manual_backward(loss)
            optimizer.step()
            self.zero_grad(set_to_none=False)
            assert all(p.grad is None or float(p.grad.norm()) == 0.0 for p in self.parameters())

    model = fit(Zeros())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(GRADIENTS, refused=r"`net\.0\.weight` has no gradient, of which `mul_` was asked.*exclude_modules=\['net\.0'\]")
def masked_by_inputs(fit):
    """`weight.grad.mul_(mask)` with a mask over the inputs"""
    mask = (torch.arange(12) % 2).float()
    fit(Net(), At("on_after_backward", lambda trainer, model: model.net[0].weight.grad.mul_(mask)))


@people(GRADIENTS, refused=r"`net\.0\.weight` has no gradient, of which `norm` was asked")
def norms_by_unit(fit):
    """`weight.grad.norm(dim=1)`, a norm for each unit"""
    fit(Net(), At("on_after_backward", lambda trainer, model: model.net[0].weight.grad.norm(dim=1)))


@people(GRADIENTS)
def searched_for_nan(fit):
    """`torch.isnan(p.grad)`, in the shape of the weight, and `isfinite(p.grad).all()`"""

    def look(trainer, pl_module):
        shapes = [torch.isnan(p.grad).shape == p.shape for p in pl_module.parameters()]
        return shapes, [bool(torch.isfinite(p.grad).all()) for p in pl_module.parameters()]

    found = At("on_after_backward", look)
    model = fit(Net(), found)
    return Seen(found.seen, net(model))


@people(GRADIENTS)
def scaled_by_a_list(fit):
    """`torch._foreach_mul_(gradients, [a number for each])`"""

    def scale(trainer, pl_module):
        gradients = [p.grad for p in pl_module.parameters()]
        torch._foreach_mul_(gradients, [0.5 + 0.1 * place for place in range(len(gradients))])

    model = fit(Net(), At("on_after_backward", scale))
    return Seen(model.losses[0], [model.losses, net(model)])


# -------------------------------------------------------------------------------------------------- looking at modules

MODULES = "Looking at modules"


@people(
    MODULES,
    stays={"net.0": "its attribute `rank` has the name of one of a factorized layer"},
    kind="target_params",
    target=0.9,
)
def attributes_with_names_of_ours(fit):
    """Attributes of layers whose names a factorized layer has too: `layer.rank = 4`"""
    model = Net()
    model.net[0].rank = 4
    seen = At("on_train_batch_end", lambda _, m: m.net[0].rank)
    fit(model, seen)
    return Seen([seen.seen, model.net[0].rank], net(model))


@people(MODULES)
def example_inputs_beside_what_is_kept(fit):
    """`example_input_array` of a network that counts calls, keeps a mean, draws noise, starts by its first data"""

    class Noisy(Net):
        def __init__(self):
            super().__init__()
            self.example_input_array, self.calls = torch.zeros(2, 12), 0
            self.register_buffer("mean", torch.zeros(12))
            self.shift, self.is_set = nn.Parameter(torch.zeros(12)), False

        def forward(self, x):
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
            if not self.is_set:
                self.is_set, self.shift.data = True, -x.mean(0)
            return self.net(x + self.shift + 0.1 * torch.randn_like(x))

    model = fit(Noisy())
    return Seen([model.calls, model.mean.clone(), model.losses[0]])


@people(MODULES)
def autocast_by_hand(fit):
    """`with torch.autocast(...)` in `training_step`, around parts of the network that are called one after the other"""

    class ByHand(Net):
        def loss(self, batch):
            with torch.autocast("cpu", torch.bfloat16):
                out = self.net[4](self.net[:4](batch[0]))
            return F.cross_entropy(out.float(), batch[1])

    return Seen(None, net(fit(ByHand())))


@people(MODULES)
def a_graph_whose_attributes_are_set(fit):
    """A batch is an object whose attributes `forward` sets, as people do with graphs: `data.x = self.conv(data.x)`"""

    class Graph:
        def __init__(self, x):
            self.x = x

    class OnGraphs(Net):
        def forward(self, data):
            for layer in self.net:
                data.x = layer(data.x)
            return data.x

        def loss(self, batch):
            return F.cross_entropy(self(Graph(batch[0])), batch[1])

    model = fit(OnGraphs())
    return Seen(model.losses[0], net(model))


@people(MODULES)
def names_on_layers(fit):
    """`layer.layer_name = name` on each layer, by which a forward hook keeps outputs"""
    model, kept = Net(), {}
    for name, layer in model.net.named_children():
        layer.layer_name = name
        layer.register_forward_hook(lambda layer, args, output: kept.update({layer.layer_name: output.shape}))
    fit(model)
    return Seen(kept)


@people(MODULES)
def experts_without_inputs(fit):
    """A mixture of experts: a layer is called with no rows at all, always or in some batches"""

    class Experts(Net):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])

        def forward(self, x):
            chosen, out = (x[:, 0] > 0).long(), torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                rows = (chosen == index).nonzero()[:, 0]
                out = out.index_add(0, rows, expert(x[rows]))
            return self.net(x + out)

    model = fit(Experts())
    return Seen(None, net(model))


@people(MODULES)
def merged_in_evaluation(fit):
    """LoRA as loralib has it: `train(False)` adds B A to the frozen weight, `train(True)` takes it away"""

    class LoRA(nn.Linear):
        def __init__(self, inputs, outputs):
            super().__init__(inputs, outputs)
            self.weight.requires_grad_(False)
            self.A, self.B = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
            self.merged = False

        def train(self, mode=True):
            super().train(mode)
            if mode is self.merged:
                self.weight.data += (-1 if mode else 1) * self.B.data @ self.A.data
                self.merged = not mode
            return self

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) + (0 if self.merged else x @ self.A.T @ self.B.T)

    model = Net()
    model.lora = LoRA(12, 12)
    model.net = nn.Sequential(model.lora, *model.net)
    seen = At("on_train_batch_end", lambda _, m: m.lora.merged)
    fit(model, seen)
    return Seen([seen.seen, model.lora.merged, model.lora.weight.clone()], net(model))


@people(MODULES)
def a_block_in_front_of_others(fit):
    """A block is inserted in front of others in mid-fit, so that their names move by one"""
    model = Net()
    model.net = nn.ModuleList(layer for layer in model.net if isinstance(layer, nn.Linear))

    def forward(x):
        for layer in model.net[:-1]:
            x = torch.relu(layer(x))
        return model.net[-1](x)

    def insert(trainer, module):
        torch.manual_seed(2)
        module.net.insert(0, nn.Linear(12, 12))
        trainer.optimizers[0].add_param_group({"params": [*module.net[0].parameters()]})

    model.forward = forward
    fit(model, At("on_train_epoch_start", insert, step=2))
    return Seen([len(model.net), [*model.net[0].weight.shape]])


@people(MODULES, refused=r"`net\.0`: .*exact class.*exclude_modules=\['net\.0', 'net\.2', 'net\.4'\]")
def exact_types_in_forward(fit):
    """`if type(layer) is nn.Linear` in `forward`"""

    class Exact(Net):
        def forward(self, x):
            for layer in self.net:
                x = layer(x)
                if type(layer) is nn.Linear:
                    x = x.tanh()
            return x

    fit(Exact())


@people(MODULES)
def types_in_a_callback(fit):
    """`isinstance(m, (nn.Linear, nn.Conv2d))` and `"Linear" in m.__class__.__name__` over `model.modules()`"""

    def look(trainer, pl_module):
        kinds = [m.__class__.__name__.find("Linear") != -1 for m in pl_module.modules()]
        return kinds, [name for name, m in pl_module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]

    seen = At("on_train_batch_start", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def attributes_of_layers(fit):
    """`in_features`, `out_features`, `bias is None`, `weight.shape`, `weight.requires_grad`, `weight.is_leaf`"""

    def look(trainer, pl_module):
        layers = [m for m in pl_module.modules() if hasattr(m, "weight")]
        return [
            (m.in_features, m.out_features, m.bias is None, m.weight.shape, m.weight.requires_grad, m.weight.is_leaf)
            for m in layers
        ]

    seen = At("on_train_batch_start", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def numbers_of_parameters(fit):
    """`sum(p.numel() for p in model.parameters() if p.requires_grad)`, `remove_duplicate=False`, `get_parameter`"""

    def look(trainer, pl_module):
        assert pl_module.get_parameter("net.2.weight") is pl_module.net[2].weight
        return (
            sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            [(name, tuple(p.shape)) for name, p in pl_module.named_parameters(remove_duplicate=False)],
            len(list(pl_module.parameters())),
            sum(p.numel() * p.element_size() for p in pl_module.parameters()),
        )

    seen = At("on_train_batch_end", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def model_summary(fit):
    """`ModelSummary(model, max_depth=-1)` in the middle of a fit: numbers of parameters by module"""
    from lightning.pytorch.utilities.model_summary import ModelSummary

    def look(trainer, pl_module):
        summary = ModelSummary(pl_module, max_depth=-1)
        return summary.total_parameters, summary.trainable_parameters, summary.layer_names, summary.param_nums

    seen = At("on_train_epoch_start", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def modules_in_python_lists(fit):
    """Layers that are kept a second time in a list, a dict and a tuple, and called from there"""

    class Listed(Net):
        def __init__(self):
            super().__init__()
            self.listed = [self.net[0], self.net[2]]
            self.by_name = {"head": self.net[4]}

        def forward(self, x):
            for layer in self.listed:
                x = F.relu(layer(x))
            return self.by_name["head"](x)

    model = fit(Listed())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(MODULES, says="1 layer stays dense .net.4.: .*'Sequential' object has no attribute 'weight'", target=0.8)
def partials_and_lambdas(fit):
    """`functools.partial(layer)`, a lambda, and a bound method `layer.forward`, kept before the fit"""

    class Kept(Net):
        def __init__(self):
            super().__init__()
            self.first = functools.partial(self.net[0])
            self.second = lambda x: self.net[2](x)
            self.third = self.net[4].forward

        def forward(self, x):
            return self.third(F.relu(self.second(F.relu(self.first(x)))))

    model = Kept()
    outputs = At("on_train_end", lambda _, m: m(torch.ones(2, 12)).detach())
    fit(model, outputs)
    assert_same(model.net(torch.ones(2, 12)), outputs.seen[0])
    return Seen(model.losses[0], [model.losses, net(model)])


@people(MODULES)
def a_module_dict(fit):
    """Branches in an `nn.ModuleDict`, chosen by a key of the batch, some never used"""

    class Branches(Net):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleDict({key: nn.Linear(4, 4) for key in "abc"})

        def forward(self, x):
            key = "ab"[self.global_step % 2]
            return self.branches[key](self.net(x))

    model = fit(Branches())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(MODULES)
def apply_on_all(fit):
    """`model.apply(fn)`, with a function that counts and one that sets attributes"""

    def look(trainer, pl_module):
        names = []
        pl_module.apply(lambda m: names.append(type(m).__name__.removeprefix("SVD")))
        pl_module.apply(lambda m: setattr(m, "visited", True))
        assert all(m.visited for m in pl_module.modules())
        return names

    seen = At("on_train_epoch_start", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def train_and_eval_of_parts(fit):
    """`self.net[:2].eval()` in each step, and `model.train()` after validation: modes by module"""

    class Modes(Net):
        def on_train_batch_start(self, *_):
            self.net[:2].eval()

    seen = At("on_before_optimizer_step", lambda _, m: [child.training for child in m.modules()])
    fit(Modes(), seen)
    return Seen(seen.seen)


@people(MODULES)
def another_dtype_in_the_middle(fit):
    """`model.float()` and back, `.half()` of a copy, `.to(memory_format=...)` in the middle of a fit"""

    def move(trainer, pl_module):
        half = copy.deepcopy(pl_module.net).half()
        pl_module.net.to(memory_format=torch.channels_last).double()
        return [p.dtype for p in half.parameters()], [p.dtype for p in pl_module.parameters()]

    seen = At("on_train_epoch_end", move)
    model = fit(Net(), seen)
    return Seen(seen.seen, net(model))


class Convolutions(Net):
    """Convolutions in channels-last memory."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1))
        self.convolutions.to(memory_format=torch.channels_last)

    def forward(self, x):
        maps = self.convolutions(x.view(-1, 1, 3, 4).contiguous(memory_format=torch.channels_last))
        return self.net(maps.mean((2, 3)))


@people(MODULES)
def channels_last(fit):
    """Convolutions in `channels_last`, whose weights are asked for their strides"""
    strides = At("on_train_batch_end", lambda _, m: m.convolutions[2].state_dict()["weight"].shape)
    model = fit(Convolutions(), strides)
    return Seen([strides.seen, model.losses[0]], model.losses)


@people(MODULES, refused=r"`convolutions\.2\.dilation` cannot become \(1, 2\) .*exclude_modules=\['convolutions\.2'\]")
def dilation_that_grows(fit):
    """The dilation and padding of a convolution set anew in `on_train_epoch_start`"""

    class Growing(Convolutions):
        def on_train_epoch_start(self):
            last = self.convolutions[2]
            last.stride, last.padding = 1, 1  # as they are
            if self.current_epoch == 1:
                last.dilation, last.padding = (1, 2), (1, 2)

    fit(Growing())


@people(MODULES)
def compiled_in_the_fit(fit):
    """`self.net = torch.compile(self.net)` in `on_train_start`"""

    class Compiles(Net):
        def on_train_start(self):
            self.net = torch.compile(self.net, backend="eager")

    model = Compiles()
    try:
        fit(model)
    finally:
        torch.compiler.reset()
    if fit.form == "cut":
        assert fit.callback.report.macs_ratio <= 0.6
    return Seen(model.losses[0], model.losses)


@people(MODULES)
def where_weights_lie(fit):
    """Parameters that share memory are looked for by `data_ptr()`, `untyped_storage()`; strides, `is_contiguous()`"""

    def look(trainer, pl_module):
        parameters = [*pl_module.parameters()]
        return [
            len({p.data_ptr(): p for p in parameters}),
            len({p.untyped_storage().data_ptr() for p in parameters}),
            [(p.stride(), p.is_contiguous(), p.stride(0)) for p in parameters],
        ]

    seen = At("on_train_batch_start", look)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def weights_as_arrays(fit):
    """Histograms of weights: `p.detach().cpu().numpy()`, `p.tolist()`, `torch.histc(p)`, `p.data.mean()`"""

    def look(trainer, pl_module):
        W = pl_module.net[2].weight
        array = W.detach().cpu().numpy()
        assert array.tolist() == pytest.approx(W.tolist()) if W.ndim == 1 else array.shape == (16, 16)
        return float(array.sum()), float(W.data.mean()), torch.histc(W.detach(), 5, -1, 1)

    seen = At("on_train_batch_start", look, step=0)
    fit(Net(), seen)
    return Seen(seen.seen)


@people(MODULES)
def the_backward_pass_overridden(fit):
    """`backward` of the module overridden: `loss.backward(retain_graph=True)`"""

    class Own(Net):
        def backward(self, loss):
            loss.backward(retain_graph=True)

    model = fit(Own())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(MODULES)
def batches_left_out(fit):
    """`on_train_batch_start` returns -1, which ends an epoch early"""

    class Skips(Net):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if self.current_epoch == 1 and batch_idx == 1 else None

    model = fit(Skips(), max_steps=5)
    return Seen([len(model.losses), model.losses[0]], [model.losses, net(model)])


@people(MODULES)
def nets_with_checkpointing(fit):
    """`torch.utils.checkpoint.checkpoint`, both kinds, in `forward`"""
    from torch.utils.checkpoint import checkpoint

    class Saves(Net):
        def forward(self, x):
            hidden = checkpoint(self.net[:2], x, use_reentrant=False)
            hidden = checkpoint(self.net[2:4], hidden, use_reentrant=True)
            return self.net[4](hidden)

    model = fit(Saves())
    return Seen(model.losses[0], [model.losses, net(model)])


LOSSES_ON_THE_SIDE: list[Tensor] = []


class KeepsItsLoss(nn.Module):
    """A layer that notes a loss of its own in a list of this file, and a count in its class."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        y = self.inner(x)
        self.note(y.square().mean())
        return y

    def note(self, loss):
        LOSSES_ON_THE_SIDE.append(loss)
        type(self).calls += 1


@people(MODULES)
def losses_in_a_list_of_the_file(fit):
    """`forward` appends a loss to a list of its file, which the step adds and clears, and counts in its class"""

    class OnTheSide(Net):
        def __init__(self):
            super().__init__()
            self.net[2] = KeepsItsLoss()

        def loss(self, batch):
            loss = super().loss(batch)
            counts.append((len(LOSSES_ON_THE_SIDE), KeepsItsLoss.calls))
            loss = loss + 0.1 * sum(LOSSES_ON_THE_SIDE)
            LOSSES_ON_THE_SIDE.clear()
            return loss

    counts, KeepsItsLoss.calls = [], 0
    model = fit(OnTheSide())
    return Seen([counts, model.losses[0]], [model.losses, net(model)])


@dataclass(slots=True)
class Tally:
    """A count in a slot."""

    calls: int = 0


class Holder:
    """An object of the user's own."""


@people(MODULES)
def what_is_kept_deep_down(fit):
    """What `forward` counts in dicts of dicts, in objects in objects, and in slots"""

    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.cache, self.tally, self.agent = {"layer": {"name": []}}, Tally(), Holder()
            self.agent.memory = Holder()
            self.agent.memory.items = []

        def forward(self, x):
            self.cache["layer"]["name"].append(len(x))
            self.agent.memory.items.append(len(x))
            self.tally.calls += 1
            return self.net(x)

    model = fit(Counting())
    return Seen([len(model.cache["layer"]["name"]), len(model.agent.memory.items), model.tally.calls], net(model))


@people(MODULES, refused=r"`net\.2` cannot become a Other while it is factorized.*exclude_modules=\['net\.2'\]")
def another_class_in_the_fit(fit):
    """`layer.__class__ = Other` in the middle of a fit"""

    class Other(nn.Linear):
        pass

    def change(trainer, pl_module):
        pl_module.net[2].__class__ = Other

    fit(Net(), At("on_train_batch_end", change, step=2))


@people(MODULES)
def sparse_inputs(fit):
    """Inputs that are sparse tensors, `x.to_sparse()`"""

    class Sparse(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0].relu().to_sparse(), batch[1]], batch_idx)

    model = fit(Sparse())
    return Seen(model.losses[0], [model.losses, net(model)])


@people(MODULES, refused=r"`net\.0\.weight_hh_l0` cannot be replaced .*exclude_modules=\['net\.0\.hh_l0'\]")
def a_pruned_recurrent_module(fit):
    """`torch.nn.utils.prune` of a weight of an LSTM in the middle of a fit"""

    class Remembers(Net):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 4))

        def forward(self, x):
            return self.net[1](self.net[0](x.unsqueeze(1))[0][:, -1])

    def cut(trainer, pl_module):
        nn.utils.prune.l1_unstructured(pl_module.net[0], "weight_hh_l0", 0.3)

    model = Remembers()
    try:
        fit(model, At("on_train_batch_end", cut, step=2))
    finally:
        assert fit.form == "reference" or type(model.net[0]) is nn.LSTM
        model(torch.ones(1, 12))


# ----------------------------------------------------------------------------------------------------- other libraries

LIBRARIES = "Other libraries"


class Language(Net):
    """A small GPT-2 of transformers."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=10, n_positions=16, n_embd=16, n_layer=1, n_head=2, use_cache=False)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        self.net = GPT2LMHeadModel(config).double()

    def loss(self, batch):
        tokens = (batch[0].abs() * 10).long() % 10
        return self.net(input_ids=tokens, labels=tokens).loss


@people(LIBRARIES, needs=("transformers",), target=0.95)
def gradient_checkpointing_of_transformers(fit):
    """transformers: `model.gradient_checkpointing_enable()`"""
    model = Language()
    model.net.gradient_checkpointing_enable()
    fit(model)
    return Seen(model.losses[0], model.losses)


@people(LIBRARIES, needs=("transformers",), target=0.95)
def save_pretrained_in_the_fit(fit):
    """transformers: `model.save_pretrained(path)` after each epoch, and `from_pretrained(path)`"""

    def save(trainer, pl_module):
        pl_module.net.save_pretrained("pretrained")
        loaded = type(pl_module.net).from_pretrained("pretrained")
        tokens = torch.arange(6)[None]
        assert_same(loaded.eval()(tokens).logits.double(), copy.deepcopy(pl_module.net).eval()(tokens).logits)
        return {key: value.shape for key, value in loaded.state_dict().items()}

    seen = At("on_train_epoch_end", save)
    fit(Language(), seen)
    return Seen(seen.seen)


@people(LIBRARIES, needs=("transformers",), target=0.95)
def resized_embeddings(fit):
    """transformers: `model.resize_token_embeddings(12)` before the fit"""
    model = Language()
    resize = model.net.resize_token_embeddings
    resize(12, **({"mean_resizing": False} if "mean_resizing" in inspect.signature(resize).parameters else {}))
    fit(model)
    return Seen([len(model.net.lm_head.weight), len(model.losses)], None)


@people(LIBRARIES, needs=("peft",), says=r"2 layers stay dense \(.*lora_A.*'weight'", target=0.95)
def lora_of_peft(fit):
    """PEFT: `get_peft_model` with LoRA; the base is frozen and left alone, the two small matrices are layers"""
    import peft

    model = Net()
    torch.manual_seed(5)
    model.net = peft.get_peft_model(model.net, peft.LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"]))
    model.double()
    before = {key: value for key, value in weights(model).items() if "base_layer" in key}
    fit(model)
    if fit.form != "cut":
        assert_same({key: value for key, value in weights(model).items() if key in before}, before)
    return Seen(model.losses[0], [model.losses, net(model)])


@people(LIBRARIES, needs=("wandb",), refused=r"has no layer to factorize \(.*: its weight has a hook")
def wandb_watches_gradients(fit):
    """W&B: `wandb.watch(model)`, whose hooks on gradients read each weight's"""
    import wandb

    run = wandb.init(mode="offline", project="user-code", dir=".", settings=wandb.Settings(silent=True))
    try:
        model = Net()
        run.watch(model, log="gradients", log_freq=1)
        fit(model)
    finally:
        run.unwatch(model)
        run.finish()


@people(LIBRARIES, needs=("wandb",))
def wandb_watches_parameters(fit):
    """W&B: `wandb.watch(model, log="parameters")`, whose hooks read weights in `forward`"""
    import wandb

    run = wandb.init(mode="offline", project="user-code", dir=".", settings=wandb.Settings(silent=True))
    try:
        model = Net()
        run.watch(model, log="parameters", log_freq=1)
        fit(model)
    finally:
        run.unwatch(model)
        run.finish()
    return Seen(model.losses[0], [model.losses, net(model)])


def finetuning_scheduler(fit, first, **options):
    from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping

    other = FinetuningScheduler(epoch_transitions_only=False, max_depth=1, **options)
    model = Validated(lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))
    trained = At("on_train_epoch_start", lambda _, m: [n for n, p in m.named_parameters() if p.requires_grad])
    files = FTSCheckpoint(f"scheduled-{fit.form}", monitor="val_loss", save_top_k=5)
    own = [FTSEarlyStopping("val_loss", patience=1), files, other]
    options = {"enable_checkpointing": True, "val": blobs(), "num_sanity_val_steps": 0, "max_epochs": 6}
    fit(model, *([] if first else own), trained, first=own if first else [], **options)
    return Seen([trained.seen[0], model.losses[0]], [trained.seen, model.losses])


@people(LIBRARIES, needs=("finetuning_scheduler",))
def finetuning_scheduler_before(fit):
    """finetuning-scheduler: `FinetuningScheduler(restore_best=False)`, its implicit schedule, before this callback"""
    return finetuning_scheduler(fit, True, restore_best=False)


@people(LIBRARIES, needs=("finetuning_scheduler",))
def finetuning_scheduler_after(fit):
    """finetuning-scheduler: `FinetuningScheduler(restore_best=False)`, its implicit schedule, after this callback"""
    return finetuning_scheduler(fit, False, restore_best=False)


@people(
    LIBRARIES,
    needs=("finetuning_scheduler",),
    refused=r"FinetuningScheduler\(restore_best=True\).*`restore_best=False`",
)
def finetuning_scheduler_that_restores(fit):
    """finetuning-scheduler: `FinetuningScheduler()`, which goes back to the best checkpoint before each phase"""
    return finetuning_scheduler(fit, False)


@people(LIBRARIES)
def torchmetrics_in_the_module(fit):
    """A torchmetrics metric that is a child of the module, with states of its own"""
    import torchmetrics

    class Measured(Net):
        def __init__(self):
            super().__init__()
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)

        def forward(self, x):
            return self.net(x)

        def loss(self, batch):
            self.accuracy(self(batch[0]), batch[1])
            return super().loss(batch)

    counts = At("on_train_batch_end", lambda _, m: (m.accuracy.update_count, m.accuracy.tp.clone()))
    model = fit(Measured(), counts)
    return Seen([counts.seen[0], [count for count, _ in counts.seen]], [counts.seen, model.losses])


@people(LIBRARIES)
def values_logged_in_forward(fit):
    """Lightning's `self.log` in `forward`, of a network with dropout: the metrics of each step and epoch"""

    class Logging(Net):
        def __init__(self):
            super().__init__()
            self.net.insert(2, nn.Dropout(0.5))

        def forward(self, x):
            out = self.net(x)
            self.log("norm", out.norm().detach(), on_step=True, on_epoch=True, batch_size=len(x))
            return out

    def metrics(trainer, _):
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    steps, epochs = At("on_train_batch_end", metrics), At("on_train_epoch_end", metrics)
    torch.manual_seed(3)
    fit(Logging(), steps, epochs)
    return Seen([steps.seen[0], [*epochs.seen[0]]], [steps.seen, epochs.seen])


def gradients_of_biases(trainer, pl_module):
    return [p.grad.clone() for name, p in pl_module.named_parameters() if name.endswith("bias") and p.grad is not None]


@people(GRADIENTS)
def reversible_blocks(fit):
    """A reversible block, or a checkpoint by hand: an `autograd.Function` that calls `backward()` in its own"""

    class Reversible(Net):
        def forward(self, x):
            x = self.net[0](x)
            return self.net[4](x + ComputedAgain.apply(x, self.net[1:4]))

    gradients = At("on_after_backward", gradients_of_biases)
    model = fit(Reversible(), gradients)
    return Seen(gradients.seen[0], [gradients.seen, net(model)])


@people(GRADIENTS)
def local_losses(fit):
    """Greedy training: `forward` calls `backward()` of a loss of its own at each layer"""

    class Greedy(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def forward(self, x):
            hidden = self.net[:2](x.detach())
            if torch.is_grad_enabled():
                hidden.square().mean().backward()
            return self.net[2:](hidden.detach())

        def training_step(self, batch, batch_idx):
            loss, optimizer = self.loss(batch), self.optimizers()
            self.losses.append(loss.detach())
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()

    gradients = At("on_before_optimizer_step", gradients_of_biases)
    model = fit(Greedy(), gradients)
    return Seen(gradients.seen[0], [gradients.seen, net(model)])


class Carried:
    """A state that goes from call to call, as a cache of keys and values does."""

    def __init__(self):
        self.layers = [{"seen": [], "last": None}]

    def update(self, value):
        self.layers[0]["seen"].append(len(self.layers[0]["seen"]))
        self.layers[0]["last"] = value if self.layers[0]["last"] is None else 0.5 * (value + self.layers[0]["last"])
        return self.layers[0]["last"]


@people(MODULES)
def a_state_that_is_carried(fit):
    """A cache or state object that the network is called with again and again, and writes into"""

    class Chunked(Net):
        def forward(self, x, state):
            return self.net(x) + state.update(x.mean())

        def training_step(self, batch, batch_idx):
            state, losses = Carried(), []
            for part, labels in zip(batch[0].split(2), batch[1].split(2), strict=True):
                losses.append(F.cross_entropy(self(part, state), labels))
            self.losses.append(torch.stack(losses).mean().detach())
            seen.append(len(state.layers[0]["seen"]))
            return torch.stack(losses).mean()

    seen = []
    model = fit(Chunked())
    return Seen([model.losses[0], seen], model.losses)


@people(MODULES)
def a_copy_in_forward(fit):
    """`copy.deepcopy(self.net[2])` in `forward`, as a slow copy to compare with"""

    class Copying(Net):
        def forward(self, x):
            hidden = self.net[:2](x)
            slow = copy.deepcopy(self.net[2]).requires_grad_(False)
            return self.net[3:](0.5 * (self.net[2](hidden) + slow(hidden)))

    model = fit(Copying(), max_epochs=2)
    return Seen(model.losses[0], model.losses)


NOISE = torch.Generator()
WATCHED = type("Watched", (), {"passes": 0})()


@people(MODULES)
def what_a_file_keeps(fit):
    """A generator, and an object of one's own, that `forward` reaches by their names in its file"""

    class Noisy(Net):
        def forward(self, x):
            WATCHED.passes += 1
            return self.net(x + 0.1 * torch.rand(x.shape, generator=NOISE))

    NOISE.manual_seed(7)
    WATCHED.passes = 0
    model = fit(Noisy())
    return Seen([model.losses[0], WATCHED.passes, NOISE.get_state()], model.losses)


@people(MODULES)
def a_forward_set_on_a_module(fit):
    """A `forward` that is set on a module, with a controller in a variable of the function that set it"""

    def controlled(module, store):
        old = module.forward

        def forward(x):
            store.append(len(store))
            return old(x)

        module.forward = forward

    model, store = Net(), []
    controlled(model.net[1], store)
    fit(model)
    return Seen([model.losses[0], store], model.losses)


@people(HOOKS, stays={"net.2": "its weight is computed from other parameters (EqualRate)"}, target=0.8)
def equalized_rate(fit):
    """StyleGAN's equalized learning rate: a hook of a layer sets `weight` in each call"""
    model = Net()
    EqualRate(model.net[2])
    fit(model)
    return Seen(model.losses[0], model.losses)


@people(WRITES, refused=r"`net\.2\.weight` was given other values between the backward pass.*exclude_modules")
def binarized_for_a_pass(fit):
    """BinaryConnect: weights that are binarized for a pass, `weight.data.copy_(...)`, and put back before the step"""

    class Binary(Net):
        def training_step(self, batch, batch_idx):
            weight = self.net[2].weight
            self.kept = weight.data.clone()
            weight.data.copy_(self.kept.sign() * self.kept.abs().mean())
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            self.net[2].weight.data.copy_(self.kept)

    fit(Binary())


@people(DERIVATIVES, refused=r"`net\.4\.weight` has no derivative.*exclude_modules")
def adaptive_weight_in_a_try(fit):
    """A loss balanced by gradients of the last layer, as in VQGAN, inside of `try ... except RuntimeError`"""

    class Balanced(Net):
        def loss(self, batch):
            loss = super().loss(batch)
            try:
                scale = torch.autograd.grad(loss, self.net[4].weight, retain_graph=True)[0].norm().detach()
            except RuntimeError:
                scale = torch.zeros(())
            return loss * (1 + scale)

    fit(Balanced())


# ---------------------------------------------------------------------------------------------------------- the tests

# What other test modules hold in the same way: what it is, the heading on docs/compatibility.md, and the test.
ELSEWHERE = {
    GROUPS: [
        (
            "Groups by name, by `isinstance`, by depth, as transformers makes them",
            "the-users-network",
            "test_users_network.test_groups_keep_their_meaning",
        ),
        (
            "A scheduler with a function for each group",
            "the-users-network",
            "test_users_network.test_a_scheduler_with_a_list_sees_the_same_groups",
        ),
        (
            "Lightning's `BaseFinetuning`, resumed too",
            "other-callbacks",
            "test_other_callbacks.test_a_finetuning_schedule_resumes_exactly",
        ),
    ],
    HOOKS: [
        (
            "A hook on a weight before the fit",
            "the-users-network",
            "test_users_network.test_a_layer_whose_weight_has_a_hook_stays_dense",
        ),
        (
            "`weight_norm`, `spectral_norm` of `parametrizations`, scripted layers",
            "the-users-network",
            "test_users_network.test_other_matrices_are_in_the_plan_with_the_reason",
        ),
    ],
    COPIES: [
        (
            "Lightning's `EMAWeightAveraging` and `StochasticWeightAveraging`, in any order",
            "other-callbacks",
            "test_other_callbacks.test_the_final_model_is_the_average_at_the_ranks_that_were_kept",
        ),
        (
            "`copy.deepcopy(self.net)` in `on_train_start`",
            "the-users-network",
            "test_users_network.test_a_copy_inside_the_module_is_a_dense_network_of_its_own",
        ),
    ],
    DERIVATIVES: [
        (
            "Forces, a net that differentiates in its own `forward`",
            "the-users-network",
            "test_users_network.test_derivatives_inside_the_step",
        ),
        (
            "WGAN with a gradient penalty",
            "the-users-network",
            "test_users_network.test_a_gan_of_two_networks_with_a_gradient_penalty",
        ),
    ],
    WRITES: [
        (
            "Clamped weights, masks, single rows, in place or by `.data`",
            "the-users-network",
            "test_users_network.test_what_would_be_lost_of_a_weight_is_refused_by_name",
        ),
    ],
    FILES: [
        (
            "Partial files by `on_save_checkpoint`, `strict=False`",
            "the-users-network",
            "test_users_network.test_partial_files_in_mid_fit_hold_the_dense_weights",
        ),
        (
            "Tuners of the rate and the batch size, then `fit`",
            "other-callbacks",
            "test_other_callbacks.test_tuners_try_and_the_fit_goes_on",
        ),
    ],
    OPTIMIZERS: [
        (
            "SGD, Adam, AdamW, RMSprop, Adagrad with weight decay",
            "weight-decay-on-s-only",
            "test_weight_decay.test_decay_acts_on_singular_values_and_plain_parameters_only",
        ),
        (
            "Lookahead and SAM as optimizers around another",
            "the-users-network",
            "test_users_network.test_wrapping_optimizers_decay_singular_values_only",
        ),
        ("LBFGS", "optimization", "test_optimization.test_lbfgs_is_refused_in_manual_mode_too"),
    ],
    GRADIENTS: [
        (
            "`gradient_clip_val`, accumulation, 16-bit with a GradScaler",
            "optimization",
            "test_optimization.test_clipping_sees_the_gradient_of_the_sum",
        ),
    ],
    MODULES: [
        (
            "A submodule compiled before the fit",
            "models",
            "test_other_callbacks.test_a_submodule_compiled_before_the_fit_trains_and_the_final_model_compiles",
        ),
        (
            "`isinstance` and reads of `bias` in `forward`",
            "the-users-network",
            "test_users_network.test_a_layer_that_forward_needs_as_it_is_stays_dense_with_the_reason",
        ),
    ],
}


@pytest.fixture
def _in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seen_by(pattern, form, fit=None):
    """What a pattern saw, and its :class:`Fit`."""
    torch.manual_seed(1)
    fit = fit or Fit(form, pattern)
    return pattern.run(fit) or Seen(), fit


def cases(refused):
    for pattern in PATTERNS:
        if (pattern.refused is not None) is refused:
            broken = [pytest.mark.xfail(strict=True, reason=pattern.broken)] if pattern.broken else []
            yield pytest.param(pattern, id=pattern.run.__name__, marks=broken)


def skip_without(pattern):
    for package in pattern.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*`ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`:UserWarning")
@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize("pattern", [*cases(refused=False)])
def test_what_people_write_is_what_it_is_without_the_callback(pattern):
    skip_without(pattern)
    reference, _ = seen_by(pattern, "reference")
    for form in ("dense", "svd", "cut"):
        with pytest.warns(UserWarning, match=pattern.says) if pattern.says else nullcontext():
            seen, fit = seen_by(pattern, form)
        assert fit.callback.report is not None, form
        reasons = {of.name: of.skipped for of in fit.callback.plan}
        assert all(reason in (reasons[name] or "") for name, reason in pattern.stays.items()), reasons
        if form != "cut":
            assert_same(seen.same, reference.same, f"{form}: same")
        if form == "dense":
            assert_same(seen.values, reference.values, f"{form}: values")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize(
    ("run", "unseen"),
    [
        (function_transforms_of_the_net, False),
        (gradients_of_each_sample, False),
        (maml_by_function_transforms, True),
        (compiled_in_the_fit, False),
    ],
)
def test_ranks_can_be_judged_by_the_loss_of_what_people_write(run, unseen):
    """What is computed inside a transform leaves nothing to judge by: with no more than that, weights judge."""
    pattern = next(pattern for pattern in PATTERNS if pattern.run is run)
    by_loss = replace(pattern, options=pattern.options | {"importance": Fisher(targets="given")})
    _, fit = seen_by(by_loss, "cut")
    report = fit.callback.report
    assert report.timeline and report.macs_ratio <= pattern.target
    assert any("met no data" in warning for warning in report.warnings) is unseen


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:SVD training. 1 weight is read by the step itself")
@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize("pattern", [*cases(refused=True)])
def test_what_cannot_be_is_refused_by_name(pattern):
    skip_without(pattern)
    seen_by(pattern, "reference")
    fit = Fit("svd", pattern)
    with pytest.raises((RuntimeError, ValueError), match=pattern.refused):
        seen_by(pattern, "svd", fit)
    assert not svd_layers(fit.trainer.lightning_module)  # the model is a plain one again


def test_each_pattern_is_described_and_there_are_enough():
    assert len(PATTERNS) >= 60
    assert all(pattern.what and not pattern.what.endswith(".") for pattern in PATTERNS)
    assert len({pattern.run.__name__ for pattern in PATTERNS}) == len(PATTERNS)


@pytest.mark.parametrize("test", [test for rows in ELSEWHERE.values() for _, _, test in rows])
def test_what_is_said_to_be_held_elsewhere_is(test):
    module, name = test.split(".")
    assert f"def {name}(" in (Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8")


def test_the_page_is_what_the_patterns_say():
    assert user_code.PAGE.read_text(encoding="utf-8") == user_code.page(PATTERNS, ELSEWHERE), "run `make user-code`"
