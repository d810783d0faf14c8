"""Distillation trains as ``loss + weight * distance`` written by hand does, and leaves no trace elsewhere."""

import copy
import dataclasses
import sys
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.plugins.precision import MixedPrecision
from models import EMAWeightAveraging, SmallMLP, SmallNet, ValidatedNet, data, quiet_trainer
from test_packages import SmallNetForCLI
from test_resume import BATCHES, assert_equal
from test_strategies import Dealing, Witness, two_processes, witnessed
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_svd import Distillation, FallToBudget, SVDTraining, SVDTrainingCallback
from lightning_svd.layers.matrices import roundoff, wide

# Lightning's and torch's own, as in the modules that the helpers are from.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

ASKED = {
    "features": Distillation(weight=3.0),
    "logits": Distillation(weight=2.0, temperature=3.0, kind="logits"),
}
STEPS = 32


def distance(asked, y, t):
    """What the gradients are of, by torch's own functions."""
    y, t = wide(y), wide(t)
    if asked.kind != "logits":
        return asked.weight * F.mse_loss(y, t)
    T, dim = asked.temperature, asked.class_dim
    p, q = (F.log_softmax(tensor / T, dim).movedim(dim, -1).flatten(0, -2) for tensor in (t, y))
    return asked.weight * T**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


class ByHand:
    """Mixed into a LightningModule: its teacher, made before the fit, and the term in its loss."""

    asked = None

    def taught(self, asked):
        self.asked, self.teachers = asked, [copy.deepcopy(self).eval().requires_grad_(False)]
        return self

    def term(self, x):
        if self.asked is None:
            return self(x), 0.0
        with torch.no_grad():
            t = self.teachers[0](x)
        y = self(x)
        return y, distance(self.asked, y, t)


class Net(ByHand, SmallNet):
    """With dropout and running statistics, which the teacher must not have, or change."""

    def __init__(self, **options):
        super().__init__(**options)
        self.features.insert(1, nn.BatchNorm2d(12))
        self.features.append(nn.Dropout(0.1))

    def training_step(self, batch, batch_idx):
        x, labels = batch
        y, term = self.term(x)
        loss = F.cross_entropy(y, labels)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss + term


class Manual(Net):
    """Two steps for a batch, clipped between."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(self.optimizers(), 0.5, "norm")
            self.optimizers().step()


class Scaled(MixedPrecision):
    """A loss scaler on the CPU, whose scale changes on the way."""

    def __init__(self):
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5))

    def forward_context(self):
        return torch.autocast("cpu", enabled=False)


def close(a, b, steps=STEPS):
    """Equal but for rounding, which steps of training hand on."""
    return (a - b).abs().max() <= steps * roundoff((96, 108), a.dtype) * b.abs().max()


def both(net, asked, trainer=None, dtype=torch.float64, arguments=None):
    """The fitted model with the callback's distillation, and the one that writes it by hand."""
    fitted = []
    torch.manual_seed(1)
    start = net(momentum=0.9).state_dict()
    for by_hand in (False, True):
        model = net(momentum=0.9).to(dtype)
        model.load_state_dict(start)
        # Judged without data, of which a net without distillation has other targets.
        options = {"target_macs": 0.5, "importance": "spectrum", "schedule": FallToBudget(start=0.25, cuts=3)}
        options |= arguments or {}
        callback = SVDTrainingCallback(**options, **({} if by_hand else {"distill": asked}))
        if by_hand:
            model.taught(asked)
        torch.manual_seed(2)
        options = {name: make() for name, make in (trainer or {}).items()}
        quiet_trainer(callbacks=[callback], **options).fit(model, data(dtype=dtype))
        fitted.append((model, callback.report))
    return fitted


@pytest.mark.parametrize(
    "asked", [*ASKED.values(), Distillation(weight=0.5, where="features")], ids=[*ASKED, "of a submodule"]
)
def test_the_gradient_is_that_of_the_distance(asked):
    y = torch.randn(3, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    for dim in (-1, 1):
        one = dataclasses.replace(asked, class_dim=dim)
        (expected,) = torch.autograd.grad(distance(one, y, t), y)
        torch.testing.assert_close(one.gradient(y.detach(), t, one.kind == "logits"), expected)


TRAINERS = {
    "plain": {},
    "accumulating, the last window short": {"accumulate_grad_batches": lambda: 3},
    "accumulating and clipped": {"accumulate_grad_batches": lambda: 2, "gradient_clip_val": lambda: 0.3},
    "scaled": {"plugins": Scaled},
    "scaled and accumulating": {"plugins": Scaled, "accumulate_grad_batches": lambda: 2},
}


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
def test_trains_as_the_loss_written_by_hand(asked, trainer):
    (ours, report), (theirs, expected) = both(Net, asked, trainer)
    assert [change.ranks for change in report.timeline] == [change.ranks for change in expected.timeline]
    untaught = both(Net, dataclasses.replace(asked, weight=0.0), trainer)[0][0]
    assert not close(untaught.hidden.bias, theirs.hidden.bias)
    assert torch.allclose(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-6)  # the user's own loss
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.shape == b.shape and close(a, b), name


def test_trains_as_by_hand_in_manual_optimization():
    (ours, _), (theirs, _) = both(Manual, ASKED["logits"])
    assert all(close(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_trains_as_by_hand_in_autocast():
    options = (torch.float32, {"target_macs": 1.0, "full_rank_as": "dense"})
    trainer = {"precision": lambda: "bf16-mixed", "max_epochs": lambda: 1}
    (ours, _), (theirs, _) = both(Net, ASKED["logits"], trainer, *options)
    untaught = both(Net, Distillation(weight=0.0), trainer, *options)[0][0]
    ours, theirs, untaught = (nn.utils.parameters_to_vector(net.parameters()) for net in (ours, theirs, untaught))
    # Both are rounded to bfloat16, before and after they are added.
    assert (ours - theirs).norm() <= 4 * torch.finfo(torch.bfloat16).eps * (untaught - theirs).norm()


class DealingByHand(ByHand, Dealing):
    def training_step(self, batch, batch_idx):
        y, term = self.term(batch[0])
        return F.cross_entropy(y, batch[1]) + term


def test_two_processes_train_as_one_does_by_hand(tmp_path):
    asked = ASKED["logits"]
    model, alone = DealingByHand(momentum=0.9).double(), DealingByHand(momentum=0.9).double()
    alone.load_state_dict(model.state_dict())
    options = {"target_macs": 0.4, "importance": "spectrum"}
    callbacks = [SVDTrainingCallback(**options, distill=asked), Witness(tmp_path)]
    quiet_trainer(callbacks=callbacks, use_distributed_sampler=False, **two_processes()).fit(model)
    quiet_trainer(callbacks=[SVDTrainingCallback(**options)], max_epochs=3).fit(alone.taught(asked))
    (zero, one), outputs = witnessed(tmp_path)
    with torch.no_grad():
        expected = alone.eval()(next(iter(data(dtype=torch.float64)))[0])
    assert zero == one
    assert close(outputs, expected)


# ------------------------------------------------------------------------------------------- which calls, and when


def taught(model, asked=True, **arguments):
    """A run in plain PyTorch, and its calls of the teacher."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = SVDTraining(model, optimizer, 10, target_macs=1.0, regularizer=None, distill=asked, **arguments)
    calls = []
    for module in training.distiller.teacher.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    return training, calls


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.head, self.wrap = nn.Linear(6, 8), nn.Linear(8, 4), wrap

    def forward(self, x):
        return self.wrap(self.head(torch.tanh(self.body(x))))


def gradients(model, loss, asked=None, teacher=None, x=None):
    """Of the parameters that the model shows, by autograd."""
    y = model(x)
    total = loss(y) if asked is None else loss(y) + distance(asked, y, teacher(x))
    return torch.autograd.grad(total, [*model.parameters()])


Pair = namedtuple("Pair", ["y", "other"])
Output = dataclasses.make_dataclass("Output", ["loss", "logits"])
WRAPPED = {
    "tensor": (lambda y: y, lambda out: [out]),
    "tuple": (lambda y: (y, y.square(), y.sum(), y.argmax(-1)), lambda out: [out[0], out[1]]),
    "the same twice": (lambda y: [y, y], lambda out: [out[0]]),
    "dict": (lambda y: {"a": {"b": y}, "c": None}, lambda out: [out["a"]["b"]]),
    "named tuple": (lambda y: Pair(y, y.exp()), lambda out: [out.y, out.other]),
}


def weights(training):
    return {name: layer.form.trained[0] for name, layer in training.layers.items()}


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize(("wrap", "tensors"), WRAPPED.values(), ids=WRAPPED)
def test_every_floating_tensor_of_an_output_is_taught(wrap, tensors, asked):
    model, x = Wrapped(wrap).double(), torch.randn(5, 6, dtype=torch.float64)
    twin, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    training, _ = taught(model, asked, full_rank_as="dense")
    with torch.no_grad():
        for net in (model, twin):
            for parameter in net.parameters():
                parameter.mul_(1.5)
    sum(y.sum() for y in tensors(model(x))).backward()
    outputs = tensors(twin(x))
    terms = [distance(asked, y, t) for y, t in zip(outputs, tensors(teacher(x)), strict=True)]
    (sum(y.sum() for y in outputs) + sum(terms)).backward()
    for name, weight in weights(training).items():
        torch.testing.assert_close(weight.grad, twin.get_submodule(name).weight.grad)


def test_logits_are_told_by_their_name():
    model, x = Wrapped(lambda y: Output(y.sum(), y)), torch.randn(5, 6)
    asked = Distillation(temperature=2.0)
    assert asked.of_logits(model(x)) and not asked.of_logits(model(x).logits)
    assert not dataclasses.replace(asked, kind="features").of_logits(model(x))
    assert asked.of_logits(SimpleNamespace(logits=x)) and not asked.of_logits(SimpleNamespace(logits=None))


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def test_each_call_from_outside_has_its_own_term():
    gan, z = Gan().double(), torch.randn(5, 4, dtype=torch.float64)
    twin, teacher = copy.deepcopy(gan), copy.deepcopy(gan).requires_grad_(False)
    asked = Distillation(weight=2.0)
    training, calls = taught(gan, asked, full_rank_as="dense")
    with torch.no_grad():
        for net in (gan, twin):
            net.generator[0].weight.mul_(2)
            net.critic[0].weight.mul_(2)
    gan.critic(gan.generator(z)).mean().backward()
    assert [*map(type, calls)].count(nn.Sequential) == 2
    fake = twin.generator(z)
    score = twin.critic(fake)
    first, second = distance(asked, fake, teacher.generator(z)), distance(asked, score, teacher.critic(fake.detach()))
    (score.mean() + first + second).backward()
    for name, weight in weights(training).items():
        torch.testing.assert_close(weight.grad, twin.get_submodule(name).weight.grad)


def test_the_teacher_is_asked_in_training_with_gradients_only():
    model, x = Gan().critic, torch.randn(5, 6)
    _, calls = taught(model)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    assert not calls
    model.train()
    model(x)
    assert len(calls) == 4


def test_a_network_that_stays_in_evaluation_while_its_owner_trains_is_taught():
    gan = Gan()
    gan.critic.eval()
    _, calls = taught(gan)
    gan.critic(torch.randn(5, 6))
    assert len(calls) == 4


@pytest.mark.parametrize("where", ["", "body"])
def test_what_is_computed_again_in_a_backward_pass_is_taught_once(where):
    class Checkpointed(Wrapped):
        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    plain, kept = (kind(lambda y: y).double() for kind in (Wrapped, Checkpointed))
    plain.forward = lambda x: plain.head(plain.body(x))
    kept.load_state_dict(plain.state_dict())
    x, grads, counts = torch.randn(5, 6, dtype=torch.float64), [], []
    for model in (plain, kept):
        if model is plain:
            del model.forward
            model.__class__ = Checkpointed
        training, calls = taught(model, Distillation(where=where, weight=5.0), full_rank_as="dense")
        with torch.no_grad():
            model.body.weight.mul_(2)
        model(x).sum().backward()
        grads.append([weight.grad for weight in weights(training).values()])
        counts.append(len(calls))
    assert counts[0] == counts[1]
    assert_equal(grads[0], grads[1])


def test_derivatives_inside_the_step_are_the_users_own():
    critic, x = Gan().critic.double(), torch.randn(5, 6, dtype=torch.float64)
    training, _ = taught(critic, Distillation(weight=10.0))
    with torch.no_grad():
        critic[0].bias.add_(1)
    plain = copy.deepcopy(critic)
    results = []
    for net in (plain, critic):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        (slope,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        of_weight = torch.autograd.grad(y.sum(), [net[0].bias], retain_graph=True)
        results.append((slope.detach(), *of_weight))
    for ours, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(ours, expected)
    net[0].bias.grad = None
    y.sum().backward(retain_graph=True)
    first = critic[0].bias.grad.clone()
    y.sum().backward()
    plain(x).sum().backward()
    taught_once = critic[0].bias.grad - first
    torch.testing.assert_close(taught_once, plain[0].bias.grad)  # the second pass through the graph adds no term
    assert not torch.allclose(first, taught_once)
    assert training.distiller._reached


def test_what_writes_into_its_input_gets_it_once():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(x.add_(1.0))

    model, x = InPlace(), torch.randn(5, 6)
    taught(model)
    model(written := x.clone()).sum().backward()
    assert torch.equal(written, x + 1)


@pytest.mark.parametrize("way", ["torch.compile", "Module.compile"])
def test_compiled_networks_are_taught(way):
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        gan = Gan().double()
        critic = gan.critic
        if compiled and way == "torch.compile":
            gan.critic = torch.compile(gan.critic, backend="aot_eager")
        elif compiled:
            gan.critic.compile(backend="aot_eager")
        training, _ = taught(gan, Distillation(weight=10.0), full_rank_as="dense")
        with torch.no_grad():
            critic[0].bias.add_(1)
        for _ in range(2):
            gan.critic(torch.ones(5, 6, dtype=torch.float64)).sum().backward()
        grads.append([weight.grad for name, weight in weights(training).items() if "critic" in name])
        training.undo()
    assert not torch.allclose(grads[0][0], torch.zeros(()).double())
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)


def test_attention_teaches_in_the_shape_in_which_it_is_taught():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(3, 5, 8)
    padding = torch.tensor([[False] * 3 + [True] * 2] * 3)  # torch's fast path returns three positions of five
    taught(model)
    model(x, src_key_padding_mask=padding).sum().backward()


# ---------------------------------------------------------------------------------------------------- the teacher


def test_the_teacher_is_the_dense_net_of_the_start_and_is_nowhere_else():
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = {}

    class Look(Callback):
        def on_train_end(self, trainer, pl_module):
            (callback,) = (c for c in trainer.callbacks if isinstance(c, SVDTrainingCallback))
            teacher = callback._run.distiller.teacher
            seen["teacher"] = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
            seen["quiet"] = not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
            seen["names"] = set(pl_module.state_dict())
            seen["ref"] = weakref.ref(teacher)

    average = EMAWeightAveraging(decay=0.5)
    quiet_trainer(callbacks=[SVDTrainingCallback(distill=True), Look(), average]).fit(model, data())
    assert_equal(seen["teacher"], before)
    assert seen["quiet"] and seen["names"] == set(before)
    del average
    assert seen["ref"]() is None
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


def test_fast_dev_run_leaves_all_as_it_was():
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quiet_trainer(callbacks=[SVDTrainingCallback(distill=True)], fast_dev_run=True).fit(model, data())
    assert_equal(dict(model.state_dict()), before)
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.modules())


class Resumed(ValidatedNet):
    def training_step(self, batch, batch_idx):
        return super().training_step(BATCHES[batch_idx], batch_idx)


def fit_and_keep(folder, ckpt_path=None, distill=True, seed=0):
    torch.manual_seed(seed)
    model, end = Resumed(momentum=0.9), {}
    options = {"target_macs": 0.4, "schedule": FallToBudget(start=0.2, cuts=4)}
    callbacks = [SVDTrainingCallback(distill=distill, **options)]
    if folder:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1))
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=3, enable_checkpointing=bool(folder))
    trainer.fit(model, data(), data(16), ckpt_path=ckpt_path)
    end["weights"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return end["weights"]


def test_what_is_resumed_has_the_same_teacher(tmp_path):
    expected = fit_and_keep(tmp_path)
    for step in (5, 10, 15, 20):
        assert_equal(fit_and_keep(None, tmp_path / f"step={step}.ckpt", seed=step), expected)
    with pytest.raises(ValueError, match="written with another teacher: resume with the `where`"):
        fit_and_keep(None, tmp_path / "step=5.ckpt", Distillation(where="hidden"))
    fit_and_keep(None, tmp_path / "step=5.ckpt", False)  # the teacher that is there is not needed


def test_what_was_written_without_a_teacher_is_refused(tmp_path):
    fit_and_keep(tmp_path, distill=False)
    with pytest.raises(ValueError, match="the checkpoint was written without `distill`"):
        fit_and_keep(None, tmp_path / "step=5.ckpt")


class LogsInside(Net):
    """What its network computes depends on the Trainer, and logs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dataset, self.seen = TensorDataset(torch.zeros(1)), []

    def forward(self, x):
        self.log("inside", float(self.trainer.max_epochs))
        self.seen.append(1)
        return super().forward(x)


def test_a_network_may_ask_its_trainer_and_log():
    model = LogsInside()
    callback = SVDTrainingCallback(distill=True)
    teachers = []

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            teachers.append(callback._run.distiller.teacher)

    trainer = quiet_trainer(callbacks=[callback, Look()], max_epochs=2)
    trainer.fit(model, data())
    assert float(trainer.callback_metrics["inside"]) == 2.0
    assert teachers[0].dataset is model.dataset
    assert len(teachers[0].seen) == 16  # lists of its own


# ------------------------------------------------------------------------------------------------ refusals, warnings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(where=3), "`where` must be the name of a module, or '', got 3"),
        (lambda: Distillation(temperature=0), "`temperature` must be a finite number > 0, got 0"),
        (lambda: Distillation(temperature=True), "`temperature` must be a finite number > 0, got True"),
        (lambda: Distillation(weight=-1), "`weight` must be a finite number >= 0, got -1"),
        (lambda: Distillation(kind="kl"), "`kind` must be one of 'auto', 'logits', 'features', got 'kl'"),
        (lambda: Distillation(class_dim=1.0), r"`class_dim` must be an integer, got 1.0"),
        (lambda: SVDTrainingCallback(distill="logits"), "`distill` must be True, False or a Distillation, got 'lo"),
    ],
)
def test_arguments_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def unlike(y):
    return y if torch.is_grad_enabled() else torch.cat([y, y])


class Locked(Wrapped):
    def __init__(self):
        super().__init__(lambda y: y)
        self.generator = (i for i in range(3))


class Lazy(Wrapped):
    def __init__(self):
        super().__init__(lambda y: y)
        self.other = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("build", "asked", "message"),
    [
        (lambda: Gan(), Distillation(where="critics"), "in Gan, got 'critics'; it holds: 'generator', 'critic'"),
        (Locked, True, "copy of Locked, which cannot be copied .*: name the network in it"),
        (Lazy, True, "copy of Lazy, which has lazy layers: call it once"),
    ],
)
def test_what_cannot_teach_is_refused_and_the_model_left_as_it_was(build, asked, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        taught(model, asked)
    assert type(next(module for module in model.modules() if isinstance(module, nn.Linear))) is nn.Linear


def test_a_teacher_that_returns_other_shapes_is_refused():
    model = Wrapped(unlike)
    taught(model)
    with pytest.raises(ValueError, match=r"`Wrapped` returns tensors of shapes \(5, 4\) in training and \(10, 4\) "):
        model(torch.randn(5, 6))


def test_a_copy_that_would_call_the_model_itself_is_refused():
    class Closed(Wrapped):
        def __init__(self):
            super().__init__(lambda y: y)
            self.compute = lambda x: self.head(self.body(x))

        def forward(self, x):
            return self.compute(x)

    model = Closed()
    taught(model)
    with pytest.raises(ValueError, match="that copy calls `body` of the model itself"):
        model(torch.randn(5, 6))


def test_an_output_without_a_gradient_is_warned_of_once():
    gan = Gan()
    training, _ = taught(gan)
    z = torch.randn(5, 4)
    with pytest.warns(UserWarning, match="does nothing for `generator`: in the first batch"):
        gan.critic(gan.generator(z).detach()).sum().backward()
        training.step()
    gan.critic(gan.generator(z).detach()).sum().backward()
    training.step()
    assert len([warning for warning in training.warnings if "distill" in warning]) == 1


def test_calls_that_cannot_be_seen_are_warned_of():
    model = Wrapped(lambda y: y.sum())
    training, _ = taught(model)
    with pytest.warns(UserWarning, match="does nothing: in the first batch no call of a network returned a tensor"):
        model(torch.randn(5, 6)).backward()
        training.step()


def test_loops_of_ones_own_say_by_what_they_scale_the_loss():
    grads = []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        model = Gan().critic.double()
        training, _ = taught(model, Distillation(weight=10.0))
        training.distiller.loss_scale = lambda scale=scale: scale
        with torch.no_grad():
            model[0].bias.add_(1)
        (model(torch.ones(5, 6, dtype=torch.float64)).sum() * scale).backward()
        grads.append(model[0].bias.grad / scale)
    torch.testing.assert_close(*grads)


CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 1
  accelerator: cpu
  callbacks:
    - class_path: lightning_svd.SVDTrainingCallback
      init_args:
        distill: {}
"""


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[\s\S]*will be removed in v5")
@pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning")
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("true", True),
        ("{class_path: lightning_svd.Distillation, init_args: {temperature: 4.0}}", Distillation(temperature=4.0)),
        ("{temperature: 4.0, where: hidden}", Distillation(temperature=4.0, where="hidden")),
    ],
)
def test_a_cli_takes_it_from_yaml(written, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    (tmp_path / "config.yaml").write_text(CONFIG.format(written))
    args = [f"--config={tmp_path / 'config.yaml'}"]
    cli = LightningCLI(SmallNetForCLI, args=args, run=False, save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SVDTrainingCallback))
    assert callback.recipe.distill == expected


def test_the_report_says_what_was_asked_for():
    callback = SVDTrainingCallback(distill=Distillation(temperature=4.0))
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(SmallMLP(), data())
    assert callback.report.arguments["distill"]["temperature"] == 4.0
    assert '"temperature": 4.0' in callback.report.to_json()
