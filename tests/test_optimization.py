"""In every mode of optimization the fit equals a hand-written loop with the summed loss."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from models import SmallMLP, data, quiet_trainer, trained_parameters
from torch import nn

from lightning_svd import FallToBudget, Regularizer, SVDTrainingCallback, decompose, svd_layers
from lightning_svd.layers.matrices import roundoff

ORTHOGONALITY, SPARSITY = 10.0, 0.02


@pytest.fixture(autouse=True)
def _all_columns_in_each_step(monkeypatch):
    """A formula for autograd knows no turns of columns."""
    monkeypatch.setattr("lightning_svd.training.regularizers.COLUMNS", 64)


def stretch(model):
    """U and V off orthonormality, so that their regularizer matters from the first step."""
    with torch.no_grad():
        for layer in svd_layers(model).values():
            layer.form.parameters["U"].mul_(1.1)
            layer.form.parameters["V"].mul_(0.9)


class Observer(Callback):
    """Starts from stretched factors; notes what the user logs and the factors after each batch, before a cut."""

    def on_train_start(self, trainer, pl_module):
        self.logged = []
        stretch(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append(float(trainer.callback_metrics.get("train_loss", "nan")))
        self.parameters = {name: p.detach().clone() for name, p in trained_parameters(pl_module).items()}


def svd_training():
    return SVDTrainingCallback(
        target_macs=1.0,
        regularizer=Regularizer(sparsity_weight=SPARSITY, orthogonality_weight=ORTHOGONALITY),
        schedule=FallToBudget(start=1.0, end=1.0, ramp="constant"),  # the one cut comes after the last step
    )


def fit(model, loader, **options):
    observer = Observer()
    callbacks = [observer, svd_training()]
    quiet_trainer(**({"callbacks": callbacks, "max_epochs": 1, "log_every_n_steps": 1} | options)).fit(model, loader)
    return observer


def svd_callback(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, SVDTrainingCallback))


def twin_of(model):
    twin = copy.deepcopy(model)
    decompose(twin)
    stretch(twin)
    return twin


def penalty(module):
    """The paper's regularizers of all layers in ``module`` as plain formulas for autograd."""
    total = 0.0
    for U, s, V in (layer.factors() for layer in svd_layers(module).values()):
        defects = [(factor.mT @ factor - torch.eye(len(s), dtype=s.dtype)).square().sum() for factor in (U, V)]
        total += ORTHOGONALITY * sum(defects) / len(s) ** 2 + SPARSITY * s.abs().sum() / s.square().sum().sqrt()
    return total


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def assert_same_run(observer, twin, losses, steps):
    """The same parameters after ``steps`` steps, and the user's own losses as they would be."""
    for name, p in twin.named_parameters():
        error = (observer.parameters[name] - p).abs().max()
        assert error <= steps * roundoff((64, 48), p.dtype) * p.abs().max().clamp(min=1), name
    if losses is not None:
        expected = [loss.item() for loss in losses]
        assert observer.logged == pytest.approx(expected, rel=steps * roundoff((64, 48), p.dtype))


class Net(SmallMLP):
    """In float64, with optimizers from a table."""

    def __init__(self, optimizer="SGD", **options):
        super().__init__(optimizer, **options)
        self.double()


def windows(loader, size):
    """Batches in groups of ``size``, the last one shorter."""
    batches = iter(loader)
    return iter(lambda: list(itertools.islice(batches, size)), [])


# ----------------------------------------------------------------------------------------------- automatic optimization


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"optimizer": "Adam", "lr": 1e-3}])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.combination("Optimization", "accumulate_grad_batches={accumulate}, the last window shorter")
def test_accumulation_with_a_shorter_last_window(options, accumulate):
    model, loader = Net(**options), data(dtype=torch.float64)
    twin = twin_of(model)
    optimizer, losses, steps = twin.configure_optimizers(), [], 0
    for window in windows(loader, accumulate):  # 8 batches: windows of 3, 3 and 2
        optimizer.zero_grad()
        for batch in window:
            losses.append(cross_entropy(twin, batch))
            ((losses[-1] + penalty(twin)) / accumulate).backward()
        optimizer.step()
        steps += 1
    observer = fit(model, loader, accumulate_grad_batches=accumulate)
    assert_same_run(observer, twin, losses, steps)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.combination("Optimization", "gradient clipping by {algorithm}")
def test_clipping_sees_the_gradient_of_the_sum(algorithm):
    model, loader = Net(), data(dtype=torch.float64)
    twin, clipped = twin_of(model), 0
    optimizer, losses = twin.configure_optimizers(), []
    limit = {"norm": 0.6, "value": 0.02}[algorithm]
    for batch in loader:
        optimizer.zero_grad()
        losses.append(cross_entropy(twin, batch))
        (losses[-1] + penalty(twin)).backward()
        clipped += max(p.grad.norm() if algorithm == "norm" else p.grad.abs().max() for p in twin.parameters()) > limit
        if algorithm == "norm":
            nn.utils.clip_grad_norm_(twin.parameters(), limit)
        else:
            nn.utils.clip_grad_value_(twin.parameters(), limit)
        optimizer.step()
    assert clipped
    observer = fit(model, loader, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
    assert_same_run(observer, twin, losses, 8)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.combination("Optimization", "`training_step` returns None, accumulate_grad_batches={accumulate}")
def test_a_training_step_that_returns_none_adds_nothing(accumulate):
    skipped = {0, 4}

    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    model, loader = Skipping(momentum=0.9), data(dtype=torch.float64)
    twin, index = twin_of(model), 0
    optimizer = twin.configure_optimizers()
    for window in windows(loader, accumulate):
        optimizer.zero_grad()
        for batch in window:
            if index not in skipped:
                ((cross_entropy(twin, batch) + penalty(twin)) / accumulate).backward()
            index += 1
        optimizer.step()
    assert_same_run(fit(model, loader, accumulate_grad_batches=accumulate), twin, None, 8)


def test_an_optimizer_that_steps_on_every_second_batch_gets_one_batchs_gradient():
    class EverySecond(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            # As Lightning's manual shows it; the closure of every batch clears the gradients.
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    model, loader = EverySecond(), data(dtype=torch.float64)
    twin = twin_of(model)
    optimizer = twin.configure_optimizers()
    for batch in list(loader)[1::2]:
        optimizer.zero_grad()
        (cross_entropy(twin, batch) + penalty(twin)).backward()
        optimizer.step()
    assert_same_run(fit(model, loader), twin, None, 4)


# ------------------------------------------------------------------------------------------------------ mixed precision
# One step from equal weights: after it, a difference in the last bit of float32 may round to another half.


@pytest.mark.combination("Optimization", "bf16-mixed with accumulation")
def test_bfloat16_with_accumulation():
    model, loader = SmallMLP(), data(count=16)
    twin, losses = twin_of(model), []
    optimizer = twin.configure_optimizers()
    for batch in loader:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            losses.append(cross_entropy(twin, batch))
        ((losses[-1] + penalty(twin)) / 2).backward()
    optimizer.step()
    observer = fit(model, loader, precision="bf16-mixed", accumulate_grad_batches=2)
    assert_same_run(observer, twin, losses, 1)


def scaled(scaler):
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


OVERFLOWS = {"init_scale": 2.0**40, "backoff_factor": 2.0**-30}  # the first step is skipped, the next has scale 2^10


@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.9}, {"fused": True}, {"optimizer": "Adam", "lr": 1e-3, "fused": True}],
)
@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.combination("Optimization", "16-mixed with a GradScaler, steps skipped: {skipped}; {options}")
def test_float16_under_a_loss_scaler_that_skips_a_step(options, skipped):
    model, loader = SmallMLP(**options), data(count=8 * (skipped + 1))
    twin, losses = twin_of(model), []
    optimizer = twin.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", **(OVERFLOWS if skipped else {"init_scale": 2.0**10}))
    for batch in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, cache_enabled=False):
            losses.append(cross_entropy(twin, batch))
        scaler.scale(losses[-1] + penalty(twin)).backward()
        scaler.step(optimizer)
        scaler.update()
    ours = torch.amp.GradScaler("cpu", **(OVERFLOWS if skipped else {"init_scale": 2.0**10}))
    observer = fit(model, loader, **scaled(ours))
    assert ours.get_scale() == scaler.get_scale() == 2.0**10
    assert_same_run(observer, twin, losses, 1)


def test_groups_are_whole_after_a_skipped_step():
    class Watching(SmallMLP):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert len(self.optimizers().param_groups) == 1

    model = Watching(weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in twin_of(model).named_parameters()}
    observer = fit(model, data(count=8), **scaled(torch.amp.GradScaler("cpu", **OVERFLOWS)))
    assert all(torch.equal(observer.parameters[name], value) for name, value in before.items())


# -------------------------------------------------------------------------------------------------- manual optimization


class Manual(Net):
    """One optimizer, clipped by hand if told to."""

    def __init__(self, clip=None, raw=False, **options):
        super().__init__(**options)
        self.automatic_optimization = False
        self.clip, self.raw = clip, raw

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=not self.raw)
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        if self.clip:
            svd_callback(self.trainer).add_gradients(self.trainer, optimizer)
            self.clip_gradients(optimizer, self.clip, "norm")
        optimizer.step()


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.combination("Optimization", "manual, one optimizer, gradients clipped by hand: {clip}")
def test_manual_optimization_with_one_optimizer_and_clipping_by_hand(clip):
    model, loader = Manual(clip, momentum=0.9), data(dtype=torch.float64)
    twin, losses, clipped = twin_of(model), [], 0
    optimizer = twin.configure_optimizers()
    for batch in loader:
        optimizer.zero_grad()
        losses.append(cross_entropy(twin, batch))
        (losses[-1] + penalty(twin)).backward()
        if clip:
            clipped += nn.utils.clip_grad_norm_(twin.parameters(), clip) > clip
        optimizer.step()
    assert bool(clipped) == bool(clip)
    assert_same_run(fit(model, loader), twin, losses, 8)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_manual_steps_under_autocast_and_a_loss_scaler(options, ahead):
    class Scaled(SmallMLP):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx))
            if ahead:
                svd_callback(self.trainer).add_gradients(self.trainer, optimizer)
            optimizer.step()

    model, loader = Scaled(**options), data(count=8)
    twin = twin_of(model)
    optimizer = twin.configure_optimizers()
    with torch.autocast("cpu", torch.float16, cache_enabled=False):
        loss = cross_entropy(twin, next(iter(loader)))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss + penalty(twin)).backward()
    scaler.step(optimizer)
    observer = fit(model, loader, **scaled(torch.amp.GradScaler("cpu", init_scale=2.0**10)))
    assert_same_run(observer, twin, None, 1)


class Adversarial(LightningModule):
    """A generator and a discriminator with an optimizer each; the generator steps on every ``every`` batches."""

    automatic_optimization = False

    def __init__(self, every=1):
        super().__init__()
        self.every = every
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 2))
        self.noise = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        self.double()

    def generator_loss(self):
        return self.discriminator(self.generator(self.noise))[:, 1].square().mean()

    def discriminator_loss(self, real):
        fake = self.generator(self.noise).detach()
        return F.softplus(self.discriminator(fake)[:, 0]).mean() + F.softplus(-self.discriminator(real)[:, 0]).mean()

    def training_step(self, batch, batch_idx):
        generator, discriminator = self.optimizers()
        self.manual_backward(self.generator_loss())
        if batch_idx % self.every == self.every - 1:
            generator.step()
            generator.zero_grad()
        # The generator's loss left its gradient in the discriminator.
        discriminator.zero_grad()
        self.manual_backward(self.discriminator_loss(batch[0].flatten(1)))
        discriminator.step()
        if self.every > 1:
            discriminator.zero_grad()

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.SGD(self.discriminator.parameters(), lr=0.1, momentum=0.9),
        )


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.combination("Optimization", "manual, two optimizers, one of them every {every} batches")
def test_two_optimizers_at_several_frequencies(every):
    model, loader = Adversarial(every), data(dtype=torch.float64)
    twin = twin_of(model)
    generator, discriminator = twin.configure_optimizers()
    for index, (real, _) in enumerate(loader):
        loss = twin.generator_loss()
        steps = index % every == every - 1
        (loss + penalty(twin.generator) if steps else loss).backward()
        if steps:
            generator.step()
            generator.zero_grad()
        discriminator.zero_grad()
        (twin.discriminator_loss(real.flatten(1)) + penalty(twin.discriminator)).backward()
        discriminator.step()
        if every > 1:
            discriminator.zero_grad()
    assert_same_run(fit(model, loader), twin, None, 8)


def test_only_the_layers_of_the_optimizer_that_steps_get_a_gradient():
    class Watching(Adversarial):
        def training_step(self, batch, batch_idx):
            generator, _ = self.optimizers()
            self.manual_backward(self.generator(self.noise).mean())
            generator.step()
            factors = trained_parameters(self.discriminator).values()
            self.untouched = [p.grad is None for p in (*factors, *self.discriminator.parameters())]

    model = Watching()
    fit(model, data(count=8, dtype=torch.float64))
    assert model.untouched == [True] * (8 + 4)


class ByShape(Net):
    """Matrices and vectors in an optimizer each, as Muon is used; both step after one backward pass."""

    automatic_optimization = False
    ahead = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers() if self.ahead else ():
            svd_callback(self.trainer).add_gradients(self.trainer, optimizer)
        for optimizer in self.optimizers():
            optimizer.step()
        self.zero_grad()

    def configure_optimizers(self):
        return (
            torch.optim.SGD([p for p in self.parameters() if p.ndim > 1], lr=0.05),
            torch.optim.Adam([p for p in self.parameters() if p.ndim == 1], lr=1e-3),
        )


@pytest.mark.parametrize("ahead", [False, True])
def test_a_layer_in_two_optimizers_gets_its_gradient_once(ahead):
    model, loader = ByShape(), data(dtype=torch.float64)
    model.ahead = ahead
    twin = twin_of(model)
    # s is a vector, but stands in its weight's place.
    biases = {name: p for name, p in twin.named_parameters() if name.endswith("bias")}
    factors = [p for name, p in twin.named_parameters() if name not in biases]
    optimizers = torch.optim.SGD(factors, lr=0.05), torch.optim.Adam(biases.values(), lr=1e-3)
    for batch in loader:
        (cross_entropy(twin, batch) + penalty(twin)).backward()
        for optimizer in optimizers:
            optimizer.step()
        twin.zero_grad()
    assert_same_run(fit(model, loader), twin, None, 8)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"optimizer": "Adam", "lr": 1e-3}])
@pytest.mark.combination(
    "Optimization", "manual, a raw torch optimizer", refused="step\\(\\) was called on the optimizer itself"
)
def test_a_raw_torch_optimizer_in_manual_mode_is_an_error_that_says_what_to_do(options):
    model = Manual(raw=True, **options)
    with pytest.raises(RuntimeError, match=r"step\(\) was called on the optimizer itself.*`use_pl_optimizer=False`"):
        fit(model, data(dtype=torch.float64))
    assert torch.isfinite(model(torch.zeros(2, 1, 8, 8, dtype=torch.float64))).all()


def test_a_raw_optimizer_of_other_layers_may_step_as_it_likes():
    class Raw(Adversarial):
        def training_step(self, batch, batch_idx):
            generator, _ = self.optimizers()
            self.manual_backward(self.generator_loss())
            generator.step()
            self.optimizers(use_pl_optimizer=False)[1].step()

    model = Raw()
    before = copy.deepcopy(model.discriminator.state_dict())
    callback = SVDTrainingCallback(target_macs=0.9, exclude_modules=r"discriminator.*")
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(model, data(count=16, dtype=torch.float64))
    assert not torch.equal(model.discriminator[0].weight, before["0.weight"])


@pytest.mark.combination("Optimization", "LBFGS", refused="does not work with LBFGS")
def test_lbfgs_is_refused_in_manual_mode_too():
    with pytest.raises(ValueError, match="does not work with LBFGS"):
        fit(Manual(optimizer="LBFGS"), data(dtype=torch.float64))
