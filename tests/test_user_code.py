"""What people write around a network, each held against the same code without the callback.

A pattern is a function that trains with ``fit`` as people do and returns what it saw. It runs four times: without the
callback, with layers that train as dense ones, as an SVD at full rank, and with ranks that are cut. What it returns as
``same`` is equal in the first three; as ``values``, what depends on the steps taken, in the first two. What it asserts
by itself holds in all four. The page docs/user-code.md lists the patterns; ``user_code.py`` writes it.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from models import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_svd import FallToBudget, Regularizer, SVDLayer, SVDTrainingCallback, svd_layers

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
        target: What the run with cuts is to keep of the MACs.
    """

    area: str
    run: Callable[["Fit"], Seen | None]
    refused: str | None = None
    stays: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    target: float = 0.6
    warns: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    broken: str | None = None

    @property
    def what(self) -> str:
        return " ".join((self.run.__doc__ or "").split())


PATTERNS: list[Pattern] = []


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
            return SVDTrainingCallback(target_macs=self.pattern.target, schedule=schedule, **self.pattern.options)
        return SVDTrainingCallback(
            target_macs=1.0,
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
        return [{"params": decayed, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if id(p) not in known]}]

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
        return [{"params": model.net[:4].parameters(), "name": "body"}, {"params": model.net[4].parameters(), "name": "head"}]

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
        At("on_train_start", lambda _, m: nn.utils.parametrize.register_parametrization(m.net[2], "weight", Symmetric())),
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


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def _in_double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def seen_by(pattern, form):
    """What a pattern saw, and its :class:`Fit`."""
    torch.manual_seed(1)
    fit = Fit(form, pattern)
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


@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize("pattern", [*cases(refused=False)])
def test_what_people_write_is_what_it_is_without_the_callback(pattern):
    skip_without(pattern)
    reference, _ = seen_by(pattern, "reference")
    for form in ("dense", "svd", "cut"):
        seen, fit = seen_by(pattern, form)
        assert fit.callback.report is not None, form
        reasons = {of.name: of.skipped for of in fit.callback.plan}
        assert all(reason in (reasons[name] or "") for name, reason in pattern.stays.items()), reasons
        if form != "cut":
            assert_same(seen.same, reference.same, f"{form}: same")
        if form == "dense":
            assert_same(seen.values, reference.values, f"{form}: values")


@pytest.mark.usefixtures("_in_double_precision")
@pytest.mark.parametrize("pattern", [*cases(refused=True)])
def test_what_cannot_be_is_refused_by_name(pattern):
    skip_without(pattern)
    seen_by(pattern, "reference")
    with pytest.raises((RuntimeError, ValueError), match=pattern.refused):
        seen_by(pattern, "svd")
