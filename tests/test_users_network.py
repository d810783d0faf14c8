"""What people do to a network while it trains: the same as without the callback, or refused by name."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from models import quiet_trainer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_svd import FallToBudget, Regularizer, SVDLayer, SVDTrainingCallback, svd_layers

combination = pytest.mark.combination


def blobs(count=64, batch_size=16, classes=8, inputs=64):
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    centers = torch.randn(classes, inputs, generator=generator)
    return DataLoader(
        TensorDataset(centers[labels] + 0.3 * torch.randn(count, inputs, generator=generator), labels), batch_size
    )


class Net(LightningModule):
    """64 -> 96 -> 96 -> 8 with ReLU, cross entropy."""

    def __init__(self, optimizer=None):
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 8))
        self.make_optimizer = optimizer or (lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return self.make_optimizer(self)


def svd(**arguments):
    return SVDTrainingCallback(**({"target_macs": 0.5} | arguments))


def only_full_rank(**arguments):
    """Ranks are cut in the last step only, so that until then a run computes what the dense one does."""
    regularizer = Regularizer(sparsity=None, orthogonality_weight=0.0)
    return svd(schedule=FallToBudget(start=1.0, end=1.0), regularizer=regularizer, **arguments)


def fit(model, *callbacks, epochs=3, loader=None, **options):
    trainer = quiet_trainer(callbacks=list(callbacks), max_epochs=epochs, **options)
    trainer.fit(model, loader or blobs())
    return trainer


class At(Callback):
    """Calls a function at a moment of the fit."""

    def __init__(self, moment, function, step=None):
        self.function, self.step, self.seen = function, step, []
        setattr(self, moment, self.act)

    def act(self, trainer, pl_module, *_):
        if self.step is None or trainer.global_step == self.step:
            self.seen.append(self.function(trainer, pl_module))


# --------------------------------------------------------------------------------- A1: derivatives inside the step


class Forces(Net):
    """Energies whose derivative is in the loss."""

    def training_step(self, batch, batch_idx):
        x = batch[0].requires_grad_()
        force = torch.autograd.grad(self(x).sum(), x, create_graph=True)[0]
        return force.square().mean() + super().training_step(batch, batch_idx)


class ForcesInForward(Net):
    """A model that differentiates in its own forward pass."""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(x)
            return energy + torch.autograd.grad(energy.sum(), x, create_graph=True)[0][:, :8]


@pytest.mark.parametrize("net", [Forces, ForcesInForward])
@combination("The user's network", "derivatives inside the step: {net}")
def test_derivatives_inside_the_step(net):
    model, callback = net(), svd(target_macs=0.8)  # what the inner derivative costs is not the layers' own
    fit(model, callback)
    assert callback.report.macs_ratio <= 0.8


class WGAN(LightningModule):
    """A generator and a critic in manual optimization, with a gradient penalty or with clamped weights."""

    def __init__(self, clamp=False):
        super().__init__()
        torch.manual_seed(5)
        self.automatic_optimization, self.clamp = False, clamp
        self.generator = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 64))
        self.critic = nn.Sequential(
            nn.Linear(64, 48), nn.LeakyReLU(), nn.Linear(48, 16), nn.LeakyReLU(), nn.Linear(16, 1)
        )

    def training_step(self, batch, batch_idx):
        x = batch[0]
        for_generator, for_critic = self.optimizers()
        fake = self.generator(torch.randn(len(x), 16))
        between = (0.5 * x + 0.5 * fake.detach()).requires_grad_()
        slope = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)[0]
        loss = self.critic(fake.detach()).mean() - self.critic(x).mean() + (slope.norm(dim=1) - 1).square().mean()
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        if self.clamp:
            for parameter in self.critic.parameters():
                parameter.data.clamp_(-0.1, 0.1)
        for_generator.zero_grad()
        self.manual_backward(-self.critic(fake).mean())
        for_generator.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.critic)]


@combination("The user's network", "WGAN with a gradient penalty, two networks in one step")
def test_a_gan_of_two_networks_with_a_gradient_penalty():
    model, callback = WGAN(), svd()
    fit(model, callback)
    assert callback.report.macs_ratio <= 0.5
    assert {layer.name.split(".")[0] for layer in callback.report.layers} == {"generator", "critic"}
    generator, critic = (sum(p.numel() for p in net.parameters() if p.ndim == 2) for net in WGAN().children())
    assert callback.report.dense_macs == generator + 3 * critic  # the calls until the first backward pass


@combination(
    "The user's network", "WGAN that clamps all weights", refused="`critic.0.weight` was to be changed by `clamp_`"
)
def test_clamping_all_parameters_is_refused_by_name():
    with pytest.raises(RuntimeError, match=r"`critic\.0\.weight` was to be changed by `clamp_`.*exclude_modules"):
        fit(WGAN(clamp=True), svd())


# ----------------------------------------------------------------------------------- A2: networks that do not train


class Distilled(Net):
    """A student with a frozen teacher."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return F.mse_loss(self(batch[0]), target)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")
@combination("The user's network", "a frozen teacher, which is left alone")
def test_a_frozen_teacher_is_left_alone():
    model, callback = Distilled(), svd()
    before = copy.deepcopy(model.teacher.state_dict())
    fit(model, callback)
    assert all(torch.equal(value, before[key]) for key, value in model.teacher.state_dict().items())
    reasons = {of.name: of.skipped for of in callback.plan}
    assert "frozen" in reasons["teacher.0"] and reasons["net.0"] is None
    assert all(layer.name.startswith("net") for layer in callback.report.layers)


class LinearProbe(Net):
    """A backbone that is left out of the optimizer, but not frozen."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[4].parameters(), lr=0.1)


@combination("The user's network", "layers that no optimizer trains, which are left alone")
def test_what_no_optimizer_trains_is_left_alone():
    model, callback = LinearProbe(), svd(target_params=0.97, target_macs=None)
    before = copy.deepcopy(model.net[:4].state_dict())
    fit(model, callback)
    assert all(torch.equal(value, before[key]) for key, value in model.net[:4].state_dict().items())
    assert {of.name: of.skipped for of in callback.plan}["net.0"] == "no optimizer trains its weight"


@pytest.mark.filterwarnings("ignore:Found 4 module.s. in eval mode")
@combination("The user's network", "frozen layers that are named, which are factorized")
def test_a_frozen_layer_that_is_named_is_factorized():
    model, callback = Distilled(), svd(target_modules=["teacher.0", "net.0", "net.2"], target_macs=0.6)
    fit(model, callback)
    assert {layer.name for layer in callback.report.layers} == {"teacher.0", "net.0", "net.2"}


@combination("The user's network", "nothing that trains", refused="has no layer to factorize")
def test_nothing_that_trains_is_refused():
    with pytest.raises(ValueError, match=r"has no layer to factorize \(net\.0, .*: no optimizer trains its weight"):
        fit(Net(lambda net: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)), svd())


# ------------------------------------------------------------------------------------------------------- A3: copies


class AverageBySide(Callback):
    """An exponential average that walks two lists of parameters side by side."""

    def __init__(self, moment):
        self.average, self.kinds = None, None
        setattr(self, moment, self.copy)

    def copy(self, trainer, pl_module, **_):
        self.average = copy.deepcopy(pl_module.net).requires_grad_(False)
        self.kinds = [type(layer) for layer in self.average]

    def on_train_batch_end(self, trainer, pl_module, *_):
        for mine, theirs in zip(self.average.parameters(), pl_module.net.parameters(), strict=True):
            mine.lerp_(theirs, 0.3)


@pytest.mark.parametrize("moment", ["setup", "on_train_start"])
@combination("The user's network", "an average of two `parameters()` lists side by side, copied in `{moment}`")
def test_averages_by_side_are_those_of_the_dense_weights(moment):
    dense, ours = AverageBySide(moment), AverageBySide(moment)
    fit(Net(), dense)
    fit(Net(), only_full_rank(), ours, epochs=3)
    assert ours.kinds == dense.kinds
    for (name, mine), theirs in zip(ours.average.named_parameters(), dense.average.parameters(), strict=True):
        assert mine.shape == theirs.shape, name


def test_an_average_by_side_follows_the_dense_weight_through_cuts():
    average, followed = AverageBySide("on_train_start"), []

    class Follow(Callback):
        def on_train_start(self, trainer, pl_module):
            self.own = {name: p.detach().clone() for name, p in pl_module.net.named_parameters()}

        def on_train_batch_end(self, trainer, pl_module, *_):
            state = pl_module.net.state_dict()
            self.own = {name: value.lerp(state[name], 0.3) for name, value in self.own.items()}
            followed.append(self.own)

    fit(Net(), svd(schedule=FallToBudget(start=0.2, end=0.6)), average, Follow())
    for name, value in average.average.named_parameters():
        torch.testing.assert_close(value, followed[-1][name])


class WithAverageInside(Net):
    """The average is a part of the module, made in `on_train_start`."""

    def on_train_start(self):
        self.ema = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for average, now in zip(self.ema.parameters(), self.net.parameters(), strict=True):
                average.mul_(0.9).add_(now, alpha=0.1)


@combination("The user's network", "an average inside the module, copied in `on_train_start`")
def test_a_copy_inside_the_module_is_a_dense_network_of_its_own():
    model, callback = WithAverageInside(), svd()
    fit(model, callback)
    assert [type(layer) for layer in model.ema] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    x, y = next(iter(blobs()))
    assert (model.ema(x).argmax(1) == y).float().mean() > 0.5
    assert all(layer.name.startswith("net") for layer in callback.report.layers)


# --------------------------------------------------------------------- A4: the package's own arithmetic, what is read


class ReadsDtype(Net):
    def forward(self, x):
        return self.net(x.to(self.net[2].weight.dtype))


class ReadsDtypeOfAParameter(Net):
    def forward(self, x):
        return self.net(x.to(next(self.parameters()).dtype))


@pytest.mark.filterwarnings("ignore:.*layers? stays? dense")
@pytest.mark.parametrize("net", [ReadsDtype, ReadsDtypeOfAParameter])
def test_reading_what_a_weight_is_costs_nothing(net, monkeypatch):
    callback, counted = only_full_rank(target_macs=0.7), []
    rebuilt = SVDLayer.rebuilt
    monkeypatch.setattr(SVDLayer, "rebuilt", lambda self: counted.append(1) or rebuilt(self))
    model = net()
    watcher = At("on_train_batch_start", lambda *_: counted.clear(), step=4)
    at_end = At("on_before_backward", lambda trainer, _: len(counted) if trainer.global_step == 4 else 0)
    fit(model, callback, watcher, at_end)
    assert sum(at_end.seen) == 0
    assert callback.report.dense_macs == sum(p.numel() for p in net().parameters() if p.ndim == 2)


@combination("The user's network", "a dtype that is read of a parameter in `forward`")
def test_a_parameters_dtype_does_not_bar_layers_from_compression():
    callback = svd()
    fit(ReadsDtypeOfAParameter(), callback)
    assert callback.report.macs_ratio <= 0.5 and not callback.report.warnings


# ------------------------------------------------------------------------------------- A5: hooks and partial files


class KeepsTrainable(Net):
    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}


@combination("The user's network", "files with trainable names only, a prefix stripped, `strict=False`")
def test_partial_files_in_mid_fit_hold_the_dense_weights(tmp_path):
    model = KeepsTrainable()

    def save(trainer, pl_module):
        trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
        return {k: v.clone() for k, v in pl_module.state_dict().items()}

    saved = At("on_train_batch_end", save)
    fit(model, svd(), saved)
    for step, state in enumerate(saved.seen, 1):
        loaded = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["state_dict"]
        assert loaded.keys() == Net().state_dict().keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)
        stripped = {key.removeprefix("net."): value for key, value in loaded.items()}
        Net().net.load_state_dict(stripped)
    Net.load_from_checkpoint(tmp_path / "7.ckpt")


@pytest.mark.parametrize("step", [1, 7, 11])
def test_a_part_of_the_model_saves_and_loads_dense_weights_at_any_moment(step):
    def swap(trainer, pl_module):
        layer = pl_module.net[2]
        before, output = copy.deepcopy(layer.state_dict()), layer(torch.ones(1, 96))
        layer.load_state_dict(before)
        assert torch.equal(layer(torch.ones(1, 96)), output)
        return before

    seen = At("on_train_batch_end", swap, step)
    fit(Net(), svd(), seen)
    assert list(seen.seen[0]) == ["weight", "bias"]


# -------------------------------------------------------------------------------- A6: groups by name, type, depth


def by_name(model):
    named = dict(model.named_parameters())
    decayed = [p for name, p in named.items() if name.endswith("weight")]
    rest = [p for name, p in named.items() if not name.endswith("weight")]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def by_type(model):
    linear = [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
    return [{"params": linear, "weight_decay": 0.1}]


def as_hugging_face(model):
    from transformers.trainer_pt_utils import get_parameter_names

    names = [name for name in get_parameter_names(model, [nn.LayerNorm]) if "bias" not in name]
    decayed = [p for name, p in model.named_parameters() if name in names]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [p for name, p in model.named_parameters() if name not in names], "weight_decay": 0.0},
    ]


def by_depth(model):
    return [
        {"params": [*layer.parameters()], "lr": 0.1 * 0.5**depth, "weight_decay": 0.1}
        for depth, layer in enumerate(model.net)
        if [*layer.parameters()]
    ]


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize("groups", [by_name, by_type, as_hugging_face, by_depth])
@combination("The user's network", "parameter groups {groups}")
def test_groups_keep_their_meaning(groups, full_rank_as):
    def look(trainer, pl_module):
        where = {
            id(p): place for place, group in enumerate(trainer.optimizers[0].param_groups) for p in group["params"]
        }
        layers = {name: [where[id(p)] for p in layer.form.trained] for name, layer in svd_layers(pl_module).items()}
        return layers, [group["weight_decay"] for group in trainer.optimizers[0].param_groups]

    expected = {}
    model = Net(lambda net: torch.optim.AdamW(groups(net), lr=0.01))
    for place, group in enumerate(groups(model)):
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and any(layer.weight is p for p in group["params"]):
                expected[name] = place
    looks = [At("on_train_batch_start", look), At("on_before_optimizer_step", look), At("on_train_batch_end", look)]
    fit(model, svd(full_rank_as=full_rank_as), *looks)
    for seen in (moment for at in looks for moment in at.seen):
        layers, decays = seen
        assert all(set(places) == {expected[name]} for name, places in layers.items())
        assert decays == [group["weight_decay"] for group in groups(Net())]


@combination("The user's network", "a scheduler with a function for each group")
def test_a_scheduler_with_a_list_sees_the_same_groups():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(by_name(self), lr=0.1)
            factors = [lambda step: 0.9**step, lambda step: 0.5**step]
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factors), "interval": "step"}
            ]

    rates = lambda trainer, _: [group["lr"] for group in trainer.optimizers[0].param_groups]  # noqa: E731
    dense, ours = At("on_before_optimizer_step", rates), At("on_before_optimizer_step", rates)
    fit(Scheduled(), dense)
    fit(Scheduled(), svd(), ours)
    assert ours.seen == dense.seen


def test_decay_by_name_acts_on_singular_values_as_on_the_dense_weight():
    """One step of SGD without a gradient: W decays by lr * decay, exactly as the dense one; U and V do not move."""

    class Still(Net):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

    model = Still(lambda net: torch.optim.SGD(by_name(net), lr=0.5))
    before = copy.deepcopy(model.state_dict())
    after = At("on_train_batch_end", lambda _, m: copy.deepcopy(m.state_dict()), step=1)
    fit(model, only_full_rank(), after)
    for name, value in after.seen[0].items():
        expected = before[name] * (1 - 0.5 * 0.1) if name.endswith("weight") else before[name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- A7: what is done to a weight


def write(change):
    def act(trainer, pl_module):
        with torch.no_grad():
            change(pl_module.net[2])

    return At("on_train_batch_end", act)


WRITES = {
    "data.clamp_": lambda layer: layer.weight.data.clamp_(min=0),
    "mul_ by a mask": lambda layer: layer.weight.mul_(torch.ones(96, 96)),
    "data[0] = 0": lambda layer: layer.weight.data.__setitem__(0, 0.0),
    "a row's zero_": lambda layer: layer.weight[0].zero_(),
    "renormalized": lambda layer: layer.weight.div_(layer.weight.norm(dim=1, keepdim=True)),
    "nn.init": lambda layer: nn.init.xavier_uniform_(layer.weight),
    "nn.init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "+=": lambda layer: layer.weight.__iadd__(0.0),
    "copy_ into a part": lambda layer: layer.weight[:3].copy_(torch.zeros(3, 96)),
    "out=": lambda layer: torch.add(layer.weight, 0.0, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "register_hook": lambda layer: layer.weight.register_hook(print),
    "the gradient's values": lambda layer: layer.weight.grad.abs(),
    "a parameter in its place": lambda layer: setattr(layer, "weight", nn.Parameter(torch.full((96, 96), 0.01))),
}


@pytest.mark.parametrize("what", WRITES)
@combination("The user's network", "`weight`: {what}", refused=r"`net.2.weight` .* exclude_modules=\['net.2'\]")
def test_what_would_be_lost_of_a_weight_is_refused_by_name(what):
    with pytest.raises(RuntimeError, match=r"`net\.2\.weight` .*exclude_modules=\['net\.2'\]"):
        fit(Net(), svd(), write(WRITES[what]))
    fit(Net(), svd(exclude_modules=["net.2"], target_macs=0.8), *([write(WRITES[what])] if "grad" not in what else []))


VIEWS = {
    "detach().requires_grad_()": lambda weight: weight.detach().requires_grad_(),
    "view(-1)": lambda weight: weight.view(-1),
    "t()[:8]": lambda weight: weight.t()[:8],
}


@pytest.mark.parametrize("view", VIEWS)
@combination("The user's network", "`torch.autograd.grad` of a function of `weight.{view}` by it")
def test_what_is_made_of_a_weight_has_derivatives(view):
    def act(trainer, pl_module):
        part = VIEWS[view](pl_module.net[2].weight)
        (slope,) = torch.autograd.grad((part**2).sum(), part)
        assert type(slope) is torch.Tensor
        torch.testing.assert_close(slope, 2 * part.detach().clone(), check_stride=False)

    fit(Net(), svd(), At("on_train_batch_start", act, step=0))


PAST_HOOKS = {
    "torch.vmap": lambda weight: torch.vmap(lambda row: row.norm())(weight).sum(),
    "torch.func.grad": lambda weight: torch.func.grad(lambda weight: (weight**3).sum())(weight).square().sum(),
    "torch.nested": lambda weight: torch.nested.nested_tensor([weight, weight[:1]]).to_padded_tensor(0.0).sum(),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("what", PAST_HOOKS)
@combination("The user's network", "`{what}` of `weight.clone()`; of the weight itself it is NaN")
def test_what_takes_a_weight_past_all_hooks_takes_its_clone(what):
    def act(trainer, pl_module):
        weight, function = pl_module.net[2].weight, PAST_HOOKS[what]
        torch.testing.assert_close(function(weight.clone()), function(weight.detach().clone().contiguous()))
        assert function(weight).isnan()

    fit(Net(), svd(), At("on_train_batch_start", act, step=0))


TAKES_AWAY = {
    "parametrizations.weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrizations.spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "del": lambda layer: delattr(layer, "weight"),
    "__class__": lambda layer: setattr(layer, "__class__", type("Other", (nn.Linear,), {})),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", TAKES_AWAY)
@pytest.mark.parametrize("form", ["svd", "dense"])
@pytest.mark.parametrize("step", [0, 3])
def test_a_weight_is_not_taken_away_while_its_layer_trains(form, how, step):
    def act(trainer, pl_module):
        TAKES_AWAY[how](pl_module.net[2])

    model, late = Net(), FallToBudget(start=0.9, end=1.0)
    with pytest.raises(RuntimeError, match=r"net\.2|DenseWeight"):
        fit(model, svd(full_rank_as=form, schedule=late), At("on_train_batch_start", act, step=step))
    assert type(model.net[2]) is nn.Linear and model(torch.ones(1, 64)).isfinite().all()
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize("schedule", [FallToBudget(), "finetune"])
def test_a_network_of_which_nothing_is_left_to_cut_is_trained_as_it_is(schedule):
    class ReadsAll(Net):
        def forward(self, x):
            for layer in self.net:
                x = layer(x) + (0 * layer.weight.sum() if isinstance(layer, nn.Linear) else 0)
            return x

    model, callback = ReadsAll(), SVDTrainingCallback(target_macs=1.0, schedule=schedule)
    fit(model, callback)
    assert callback.report.macs_ratio == 1.0 and all(type(layer) in (nn.Linear, nn.ReLU) for layer in model.net)


@pytest.mark.parametrize("lost", [True, False])
def test_a_loss_that_is_nan_at_once_is_said_with_what_may_be_why(lost):
    class Penalized(Net):
        def training_step(self, batch, batch_idx):
            weight = self.net[2].weight
            norms = torch.vmap(torch.linalg.vector_norm)(weight if lost else weight.clone())
            return super().training_step(batch, batch_idx) + 1e-4 * norms.sum()

    said = "the loss of the first batch is NaN"
    with warnings.catch_warnings(record=True) as met, contextlib.suppress(ValueError):  # of NaN, at the first cut
        warnings.simplefilter("always")
        fit(Penalized(), svd())
    assert sum(said in str(warning.message) for warning in met) == lost


@pytest.mark.parametrize("how", ["copy_", "data ="])
@combination("The user's network", "`weight`: all values replaced by `{how}`, which loads them")
def test_replacing_all_values_loads_them(how):
    values = torch.randn(96, 96, generator=torch.Generator().manual_seed(0))

    def act(trainer, pl_module):
        if how == "copy_":
            pl_module.net[2].weight.data.copy_(values)
        else:
            pl_module.net[2].weight.data = values
        torch.testing.assert_close(pl_module.net[2].weight.detach().clone(), values, rtol=1e-4, atol=1e-5)

    fit(Net(), svd(), At("on_train_batch_start", act, step=0))


@combination("The user's network", "`weight`: values written that its ranks cannot hold, with a warning")
def test_what_the_ranks_cannot_hold_is_said():
    def act(trainer, pl_module):
        weight = pl_module.net[2].weight
        weight.data.copy_(weight.detach().clamp(min=0))

    with pytest.warns(UserWarning, match=r"`net\.2\.weight`: what was loaded into it is kept .*% off"):
        fit(Net(), svd(schedule=FallToBudget(start=0.2, end=0.5)), At("on_train_batch_end", act, step=10))


@combination("The user's network", "a hook on a weight before the fit, whose layer stays dense")
def test_a_layer_whose_weight_has_a_hook_stays_dense():
    model, callback, called = Net(), svd(target_macs=0.8), []
    model.net[2].weight.register_hook(lambda grad: called.append(grad.shape))
    fit(model, callback)
    assert len(called) == 12
    assert "hook" in {of.name: of.skipped for of in callback.plan}["net.2"]


@combination("The user's network", "attributes of a weight, and the parameter itself, which stay")
def test_a_weight_stays_the_same_object_with_its_attributes():
    model = Net()
    model.net[2].weight.no_decay = True
    held = [*model.parameters()]

    def look(trainer, pl_module):
        assert all(a is b for a, b in zip(held, pl_module.parameters(), strict=True))
        assert pl_module.net[2].weight.no_decay
        return [p.shape for p in held]

    seen = At("on_train_batch_end", look)
    fit(model, svd(final="dense"), seen)
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True)) and model.net[2].weight.no_decay
    assert seen.seen[-1] == [p.shape for p in Net().parameters()]


def test_gradients_are_clipped_by_hand_over_all_parameters():
    def clip(trainer, pl_module):
        norm = torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 1e-3)
        trained = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        total = torch.stack([p.grad.norm() for p in trained]).norm()
        return float(norm), float(total)

    seen = At("on_before_optimizer_step", clip)
    fit(Net(), svd(), seen)
    assert all(norm > 1e-3 and total == pytest.approx(1e-3, rel=1e-2) for norm, total in seen.seen)


def test_penalties_by_name_are_those_of_the_dense_weights():
    class Penalized(Net):
        def training_step(self, batch, batch_idx):
            penalty = sum(p.square().sum() for name, p in self.named_parameters() if name.endswith("weight"))
            self.penalties = [*getattr(self, "penalties", []), float(penalty.detach())]
            return super().training_step(batch, batch_idx) + 1e-2 * penalty

    model, dense = Penalized(), Penalized()
    fit(model, only_full_rank())
    fit(dense)
    assert model.penalties[0] == pytest.approx(dense.penalties[0], rel=1e-5)
    assert model.penalties[-1] < model.penalties[0]  # its gradient arrives


def test_functions_of_given_parameters_compute_with_those():
    def look(trainer, pl_module):
        x = next(iter(blobs()))[0]
        given = {name: 2.0 * p.detach() for name, p in pl_module.net.named_parameters()}
        dense = Net().net
        dense.load_state_dict(given)
        torch.testing.assert_close(torch.func.functional_call(pl_module.net, given, (x,)), dense(x))
        torch.testing.assert_close(
            torch.func.functional_call(pl_module.net, pl_module.net.state_dict(), (x,)),
            pl_module.net(x),
            rtol=1e-4,
            atol=1e-5,
        )

    fit(Net(), svd(), At("on_train_batch_end", look))


# --------------------------------------------------------------------------- A8, A9: what forward needs of a layer


class BranchesOnType(Net):
    def forward(self, x):
        for layer in self.net[:3:2]:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = F.relu(x)
        return self.net[4](x)


class ReadsBias(Net):
    def forward(self, x):
        return self.net(x) + 0.0 * self.net[2].bias.sum()


class ReadsWeight(Net):
    def forward(self, x):
        return self.net[4](F.relu(F.linear(self.net[:2](x), self.net[2].weight, self.net[2].bias)))


@pytest.mark.parametrize(
    ("net", "whole"), [(BranchesOnType, {"net.0", "net.2"}), (ReadsBias, {"net.2"}), (ReadsDtype, {"net.2"})]
)
@combination(
    "The user's network", "`forward` needs what a dense layer has ({net}): the layer stays dense, which the report says"
)
def test_a_layer_that_forward_needs_as_it_is_stays_dense_with_the_reason(net, whole):
    model, callback = net(), svd(target_macs=1.0 if net is BranchesOnType else 0.9)
    outputs = At("on_train_end", lambda _, m: (x := next(iter(blobs()))[0], m.eval()(x).detach())[1])
    with pytest.warns(UserWarning, match="(1 layer stays|2 layers stay) dense"):
        fit(model, callback, outputs)
    assert whole <= {name for name, _, _ in callback.report.skipped}
    torch.testing.assert_close(model.eval()(next(iter(blobs()))[0]), outputs.seen[0], rtol=1e-4, atol=1e-5)


@combination("The user's network", "`isinstance`, attributes, hooks of a layer while it trains")
def test_a_factorized_layer_is_still_what_it_was():
    model, calls = Net(), []
    model.net[0].register_forward_hook(lambda *_: calls.append(1))
    model.net[2].mine = "here"

    def look(trainer, pl_module):
        layer = pl_module.net[2]
        assert isinstance(layer, nn.Linear) and isinstance(layer, SVDLayer)
        assert (layer.in_features, layer.out_features, layer.mine) == (96, 96, "here")
        assert [name for name, _ in pl_module.named_parameters()] == [name for name, _ in Net().named_parameters()]

    fit(model, svd(), At("on_train_batch_end", look))
    assert len(calls) >= 12 and model.net[2].mine == "here"


# ----------------------------------------------------------------------------------------- A10: after a failure


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@combination("The user's network", "`fit` again after {error} in the middle")
def test_fit_again_after_a_failure_goes_on_with_the_same_model(error):
    model, callback = Net(), svd()

    def fail(trainer, pl_module):
        raise error

    with pytest.raises((SystemExit, KeyboardInterrupt, RuntimeError)):
        fit(model, callback, At("on_train_batch_end", fail, step=8))
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model.net)
    fit(model, callback)
    assert callback.report.macs_ratio <= 0.5


# -------------------------------------------------------------------------- A11, A12: optimizers of other kinds


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer and shares its groups; its slow weights are in its state."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.count = 0

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.count % 3 == 0:
                    slow.lerp_(p.detach(), 0.5)
                    p.data.copy_(slow)
        return loss


class SAM(torch.optim.Optimizer):
    """Climbs, and steps from there with the gradient of a second pass."""

    def __init__(self, parameters, base, **options):
        super().__init__(parameters, options)
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        back = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    back[p] = p.detach().clone()
                    p.add_(p.grad, alpha=0.01)
        for p, value in back.items():
            p.copy_(value)
        self.base.step()
        return loss


@pytest.mark.parametrize("kind", ["Lookahead", "SAM"])
@combination("The user's network", "{kind} around an optimizer: weight decay acts on s only")
def test_wrapping_optimizers_decay_singular_values_only(kind):
    class Still(Net):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

    def wrapped(net):
        if kind == "SAM":
            return SAM([*net.parameters()], torch.optim.SGD, lr=0.5, weight_decay=0.1)
        return Lookahead(torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=0.1))

    def look(trainer, pl_module):
        return {name: [p.detach().clone() for p in layer.form.trained] for name, layer in svd_layers(pl_module).items()}

    seen = At("on_train_batch_start", look)
    fit(Still(wrapped), only_full_rank(), seen, epochs=1)
    for name, (U, s, V) in seen.seen[0].items():
        now = seen.seen[1][name]
        assert torch.equal(now[0], U) and torch.equal(now[2], V)
        torch.testing.assert_close(now[1], s * 0.95)


class SAMInParts(SAM):
    """As it is used where a step of one's own makes both passes."""

    @torch.no_grad()
    def first_step(self):
        self.back = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        for p in self.back:
            if p.grad is not None:
                p.add_(p.grad, alpha=0.01)

    @torch.no_grad()
    def second_step(self):
        for p, value in self.back.items():
            p.data = value
        self.base.step()


def test_an_optimizer_whose_inner_one_steps_alone_is_refused():
    class InParts(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(self(batch[0]).square().mean())
            optimizer.first_step()
            optimizer.zero_grad()
            self.manual_backward(self(batch[0]).square().mean())
            optimizer.second_step()

    def made(net):
        return SAMInParts([*net.parameters()], torch.optim.SGD, lr=0.5, weight_decay=0.1)

    with pytest.raises(RuntimeError, match=r"SGD\.step\(\) was called on the optimizer itself.*`second_step`"):
        fit(InParts(made), only_full_rank(), epochs=1)


SWAPS = {
    "binarized": lambda weight: weight.sign() * weight.abs().mean(),
    "with noise": lambda weight: weight + 0.01 * torch.randn(weight.shape),
}


@pytest.mark.filterwarnings("ignore:SVD training. 1 weight is read by the step itself")
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("batches", [1, 2], ids=["each step", "gradients accumulate"])
def test_gradients_of_other_values_are_not_added_to_those_that_are_put_back(swap, batches):
    class Swapping(Net):
        """Passes forward and back with other weights than those that the step is taken from."""

        def training_step(self, batch, batch_idx):
            self.before = self.net[2].weight.data.clone()
            self.net[2].weight.data.copy_(SWAPS[swap](self.before))
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            self.net[2].weight.data.copy_(self.before)

    def run(**options):
        fit(Swapping(), svd(**options), epochs=1, accumulate_grad_batches=batches)

    message = r"`net\.2\.weight` was given other values between the backward pass and the step.*\['net\.2'\]"
    with pytest.raises(RuntimeError, match=message):
        run()
    run(exclude_modules=["net.2"], target_macs=0.8)


@pytest.mark.filterwarnings("ignore:SVD training. 1 weight is read by the step itself")
def test_weights_that_are_swapped_between_steps_keep_their_own_gradients():
    """An average that is looked at between a backward pass and the step: what comes back has the gradients it had."""

    class Looking(Net):
        def on_after_backward(self):
            mine = self.net[2].weight.detach().clone()
            self.net[2].weight.data.copy_(0.5 * mine)
            self(torch.randn(2, 64))
            self.net[2].weight.data.copy_(mine)

    class Projecting(Net):
        def on_train_batch_end(self, *_):
            weight = self.net[2].weight.detach()
            self.net[2].weight.data.copy_(weight / weight.norm().clamp_min(1.0))

    for net in (Looking, Projecting):
        torch.manual_seed(0)
        fit(net(), svd(), epochs=1)


@combination("The user's network", "a rate set by the group's index in `on_before_optimizer_step`")
def test_hooks_see_whole_groups_and_what_they_set_counts():
    class SetsRates(Net):
        def training_step(self, batch, batch_idx):
            return 0.0 * self(batch[0]).sum()

        def on_before_optimizer_step(self, optimizer):
            assert len(optimizer.param_groups) == 2
            optimizer.param_groups[1]["lr"] = 0.0

    model = SetsRates(
        lambda net: torch.optim.SGD(
            [{"params": net.net[0].parameters()}, {"params": net.net[2:].parameters()}], lr=0.5, weight_decay=0.1
        )
    )
    before = copy.deepcopy(model.state_dict())
    after = At("on_train_batch_end", lambda _, m: copy.deepcopy(m.state_dict()), step=1)
    fit(model, only_full_rank(), after)
    torch.testing.assert_close(after.seen[0]["net.0.weight"], before["net.0.weight"] * 0.95)
    torch.testing.assert_close(after.seen[0]["net.2.weight"], before["net.2.weight"])


class Preconditioned(torch.optim.Optimizer):
    """Keeps a preconditioner of the parameter's shape, as SOAP and Shampoo do in their ways."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["inverse"] = torch.ones_like(p)
                assert (state["inverse"] > 0.1).all()  # a zero would divide the step
                p.sub_(p.grad / state["inverse"], alpha=group["lr"])
        return loss


@combination("The user's network", "an optimizer with a preconditioner of the parameter's shape")
def test_state_that_is_no_momentum_is_dropped_and_not_multiplied():
    model = Net(lambda net: Preconditioned(net.parameters(), lr=0.05))
    callback = svd(schedule=FallToBudget(start=0.2, end=0.7))
    fit(model, callback)
    assert callback.report.macs_ratio <= 0.5 and all(p.isfinite().all() for p in model.parameters())


class KeepsAList(torch.optim.SGD):
    def __init__(self, parameters, lr):
        parameters = [*parameters]
        super().__init__(parameters, lr=lr)
        self.slow_weights = [p.detach().clone() for p in parameters]


@combination(
    "The user's network",
    "an optimizer with a list of the parameters of its own",
    refused="keeps a list of its own, `slow_weights`",
)
def test_an_optimizer_that_keeps_its_own_list_is_refused():
    model = Net(lambda net: KeepsAList(net.parameters(), lr=0.1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="KeepsAList, which keeps a list of its own, `slow_weights`"):
        fit(model, svd())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model.net)


@combination("The user's network", "a weight in two optimizers", refused="must be in one optimizer, found it in 2")
def test_a_weight_in_two_optimizers_is_refused():
    class Two(Net):
        automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.net[0].parameters(), lr=0.1)]

    model = Two()
    with pytest.raises(ValueError, match=r"`net\.0\.weight` must be in one optimizer, found it in 2"):
        fit(model, svd())
    assert type(model.net[0]) is nn.Linear


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_forms_of_adam_go_through_cuts_and_shrinking(options):
    model = Net(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1, **options))
    callback = svd(target_macs=0.2, schedule=FallToBudget(start=0.2, end=0.7))
    fit(model, callback)
    assert callback.report.macs_ratio <= 0.2


# ------------------------------------------------------------------------------------------------ A13: whole pickles


@combination("The user's network", "the whole model in a pickle after the fit, which opens without this package")
def test_a_whole_pickle_opens_without_this_package(tmp_path):
    model, callback = Net(), svd()
    fit(model, callback)
    x = torch.ones(1, 64)
    torch.save({"net": model.net, "x": x, "y": model.net(x)}, tmp_path / "whole.pt")
    code = (
        "import sys, torch; sys.modules['lightning_svd'] = None\n"
        f"saved = torch.load({str(tmp_path / 'whole.pt')!r}, weights_only=False)\n"
        "assert torch.equal(saved['net'](saved['x']), saved['y'])\n"
        "print('opened', type(saved['net'][2]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("opened"), done.stderr
    again = pickle.loads(pickle.dumps(callback))
    assert again.report == callback.report


def test_a_whole_pickle_in_the_middle_is_a_dense_network():
    def dump(trainer, pl_module):
        file = io.BytesIO()
        torch.save(pl_module.net, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        x = torch.ones(1, 64)
        torch.testing.assert_close(loaded(x), pl_module.net(x), rtol=1e-4, atol=1e-5)
        return [type(layer) for layer in loaded]

    seen = At("on_train_batch_end", dump)
    fit(Net(), svd(), seen)
    assert all(kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear] for kinds in seen.seen)


def test_a_process_that_is_spawned_in_the_middle_gets_a_dense_network(tmp_path):
    def hand_over(trainer, pl_module):
        process = torch.multiprocessing.get_context("spawn").Process(
            target=torch.save, args=(pl_module.net, tmp_path / "net.pt")
        )
        process.start()
        process.join()
        loaded = torch.load(tmp_path / "net.pt", weights_only=False)
        assert [type(layer) for layer in loaded] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
        x = torch.ones(1, 64)
        torch.testing.assert_close(loaded(x), pl_module.net(x), rtol=1e-4, atol=1e-5)

    seen = At("on_train_batch_end", hand_over, step=2)
    fit(Net(), svd(), seen)
    assert len(seen.seen) == 1


# ------------------------------------------------------------------------------------------ A14: degenerate spectra


@combination("The user's network", "layers that begin at zero")
def test_a_layer_that_begins_at_zero_learns_as_the_dense_one():
    class ZeroHead(Net):
        def __init__(self):
            super().__init__()
            nn.init.zeros_(self.net[4].weight)
            self.losses = []

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

    dense, ours = ZeroHead(), ZeroHead()
    fit(dense, epochs=8)
    fit(ours, only_full_rank(), epochs=8)
    assert ours.losses[-2] < 2.0 * dense.losses[-2] and dense.losses[-2] < 0.3


# ------------------------------------------------------------------- A15, A19: matrices of other kinds, small things


def layer_in(layer, weight=None):
    model = Net()
    model.net[2] = layer
    return model


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(2, 96, 96) / 10)

    def forward(self, x):
        return sum(x @ matrix for matrix in self.matrices)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (
            lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(96, 96)),
            "net.2",
            "computed from other parameters (WeightNorm)",
        ),
        (
            lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(96, 96)),
            "net.2",
            "computed from other parameters (SpectralNorm)",
        ),
        (Experts, "net.2.matrices", "matrices in one parameter"),
        (lambda: torch.jit.script(nn.Linear(96, 96)), "net.2", "scripted"),
    ],
    ids=["weight_norm", "spectral_norm", "experts", "scripted"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@combination("The user's network", "matrices of other kinds: {id}, which are left alone with the reason")
def test_other_matrices_are_in_the_plan_with_the_reason(make, name, reason):
    callback = svd(target_macs=0.9)
    fit(layer_in(make()), callback)
    assert reason in {of.name: of.skipped for of in callback.plan}[name]


def test_empty_integer_and_shared_weights_are_in_the_plan_with_the_reason():
    from lightning_svd import plan

    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 4)
    integers = nn.Linear(8, 8)
    integers.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    complex_ = nn.Linear(8, 8, dtype=torch.complex64)
    storage = nn.Parameter(torch.randn(8, 8))
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    one.weight, other.weight = nn.Parameter(storage.data), nn.Parameter(storage.data)
    reasons = [of.skipped for of in plan(nn.ModuleList([empty, integers, complex_, one, other]))]
    assert "empty" in reasons[0] and "int8" in reasons[1] and "complex64" in reasons[2]
    assert reasons[3] == reasons[4] == "weight shares its memory with another parameter"


# ----------------------------------------------------------------- A16, A17: optimizers made anew, weights loaded late


@combination("The user's network", "optimizers made anew in the middle of a fit")
def test_optimizers_that_are_made_anew_train_the_factors():
    def anew(trainer, pl_module):
        trainer.strategy.setup_optimizers(trainer)

    seen = At("on_train_batch_end", lambda t, m: [p.detach().clone() for p in svd_layers(m)["net.2"].form.trained])
    callback = svd()
    fit(Net(), callback, At("on_train_epoch_start", anew, step=4), seen)
    assert callback.report.macs_ratio <= 0.5
    assert not torch.equal(seen.seen[4][0], seen.seen[5][0])


@pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "on_train_start"])
@combination("The user's network", "weights loaded late, in `{hook}`, with `strict=False`")
def test_weights_that_are_loaded_late_are_loaded(hook):
    given = Net()
    torch.manual_seed(11)
    for parameter in given.parameters():
        nn.init.normal_(parameter, std=0.1)

    class Late(Net):
        pass

    def load(self):
        keys = self.load_state_dict(given.state_dict(), strict=False)
        assert not keys.missing_keys and not keys.unexpected_keys
        return Net.configure_optimizers(self) if hook == "configure_optimizers" else None

    setattr(Late, hook, load)
    seen = At("on_train_batch_start", lambda _, m: copy.deepcopy(m.state_dict()), step=0)
    fit(Late(), svd(), seen)
    for name, value in given.state_dict().items():
        torch.testing.assert_close(seen.seen[0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*what was loaded into it")
@combination("The user's network", "a fit that restores a checkpoint inside itself")
def test_a_fit_that_restores_a_checkpoint_inside_itself_goes_on_from_it(tmp_path):
    class Restores(Callback):
        done = False

        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "kept.ckpt")
                self.kept = copy.deepcopy(pl_module.state_dict())
            elif trainer.current_epoch == 3 and not self.done:
                self.done = True
                trainer.strategy.load_model_state_dict(torch.load(tmp_path / "kept.ckpt", weights_only=True))
                checkpoint = torch.load(tmp_path / "kept.ckpt", weights_only=True)
                callback.load_state_dict(checkpoint["callbacks"]["SVDTrainingCallback"])
                self.ranks = {name: layer.rank for name, layer in svd_layers(pl_module).items()}
                for name, value in self.kept.items():
                    torch.testing.assert_close(pl_module.state_dict()[name], value, rtol=1e-4, atol=1e-5)

    callback, restores = svd(schedule=FallToBudget(start=0.3, end=0.6)), Restores()
    fit(Net(), callback, restores, epochs=6)
    assert restores.ranks == {"net.0": 64, "net.2": 96, "net.4": 8}
    assert callback.report.macs_ratio <= 0.5


# -------------------------------------------------------------------------- A18: the user's own parts of a plain layer


@combination("The user's network", "parameters and buffers that hang on a plain layer")
def test_the_users_own_parts_of_a_layer_stay():
    model, callback = Net(), svd()
    model.net[2].register_parameter("scale", nn.Parameter(torch.ones(1)))
    model.net[2].register_buffer("count", torch.zeros(1))
    fit(model, callback)
    assert {"net.2.scale", "net.2.count"} <= model.state_dict().keys()
    assert "net.2" in {layer.name for layer in callback.report.layers}


def test_a_layer_with_modules_in_it_is_left_alone():
    model, callback = Net(), svd(target_macs=0.9)
    model.net[2].adapter = nn.Linear(96, 4)
    fit(model, callback)
    assert "modules of its own" in {of.name: of.skipped for of in callback.plan}["net.2"]
    assert isinstance(model.net[2].adapter, nn.Linear)


def test_the_users_types_are_what_tensor_functions_return():
    def look(trainer, pl_module):
        weight = pl_module.net[0].weight
        assert type(weight + 0) is Tensor and type(weight.detach().clone()) is Tensor
        assert isinstance(weight, nn.Parameter) and weight.is_leaf and weight.requires_grad

    fit(Net(), svd(), At("on_train_batch_end", look))
