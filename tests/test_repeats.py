"""A layer that runs several times in one call of the model has its weight rebuilt once, and nothing else changes."""

import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, seed_everything
from models import quiet_trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_svd import SVDTraining, SVDTrainingCallback, decompose, svd_layers
from lightning_svd.files.checkpoints import check_state
from lightning_svd.layers.forms import SVDForm
from lightning_svd.model import repeats
from lightning_svd.model.counting import count_costs
from lightning_svd.model.repeats import RepeatedCalls

TIMES, WIDTH, BATCH = 5, 12, 16


class Loop(nn.Module):
    """One layer that is applied again and again, between two that are applied once."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x, times=TIMES):
        h = self.first(x)
        for _ in range(times):
            h = torch.tanh(self.again(h))
        return self.last(h)


@contextmanager
def counting_rebuilds(model, monkeypatch):
    """How often each layer computes its dense weight inside, by its name."""
    names = {id(layer.form): name for name, layer in svd_layers(model).items()}
    counts, alone, shared = Counter(), SVDForm.matrix, repeats._rebuilt

    def matrix(form):
        counts[names[id(form)]] += 1
        return alone(form)

    def rebuilt(layer):
        counts[names[id(layer.form)]] += 1
        return shared(layer)

    with monkeypatch.context() as patch:
        patch.setattr(SVDForm, "matrix", matrix)
        patch.setattr(repeats, "_rebuilt", rebuilt)
        yield counts


def decomposed(kind=Loop, dtype=torch.float64):
    torch.manual_seed(0)
    model = kind().to(dtype)
    decompose(model)
    return model


def sharing(model, **times):
    return RepeatedCalls(model, svd_layers(model), times or {"again": TIMES})


def gradients(model):
    return {
        f"{name}.{key}": p.grad.clone()
        for name, layer in svd_layers(model).items()
        for key, p in layer.form.parameters.items()
    }


def data(count=64):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(count, 8), torch.randint(4, (count,))), BATCH)


class Fitted(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Loop()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def test_a_weight_is_rebuilt_once_for_an_input(monkeypatch):
    model = decomposed()
    x = torch.randn(BATCH, 8, dtype=torch.float64)
    with counting_rebuilds(model, monkeypatch) as alone:
        expected = model(x)
    expected.square().sum().backward()
    by_themselves = gradients(model)
    model.zero_grad()
    shared = sharing(model)
    with counting_rebuilds(model, monkeypatch) as together:
        output = model(x)
        output.square().sum().backward()
    assert alone == {"first": 1, "again": TIMES, "last": 1}
    assert together == {"first": 1, "again": 1, "last": 1}
    assert torch.equal(output, expected)
    for name, gradient in gradients(model).items():
        assert_same(gradient, by_themselves[name], (WIDTH, WIDTH), factor=64)
    shared.stop()
    with counting_rebuilds(model, monkeypatch) as after:
        model(x)
    assert after == alone and not any("repeats" in vars(layer) for layer in svd_layers(model).values())


def test_rebuilding_is_weighed_by_how_often_the_weight_serves():
    layer = svd_layers(decomposed())["again"]
    few = (WIDTH // 2, WIDTH)  # rows, of which one call is cheaper by two factors
    assert not layer.rebuilding_is_cheaper(few) and layer.rebuilding_is_cheaper(few, TIMES)
    model = decomposed()
    x = torch.randn(WIDTH // 2, 8, dtype=torch.float64)
    expected = model(x)
    sharing(model)
    assert_same(model(x), expected, (WIDTH, WIDTH), factor=64)


def test_how_often_layers_run_is_counted():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.loop, self.once = Loop(), nn.Linear(4, 4)

        def forward(self, x):
            return self.once(self.loop(x))

    model = Two()
    decompose(model)
    layers = count_costs(model, torch.randn(3, 8)).layers
    assert {name: price.repeats for name, price in layers.items()} == {
        "loop.first": 1,
        "loop.again": TIMES,
        "loop.last": 1,
        "once": 1,
    }
    assert layers["loop.again"].dense_macs == TIMES * 3 * WIDTH**2


def test_a_loop_outside_of_the_model_shares_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = SVDTraining(model, optimizer, total_steps=4)
    h = torch.randn(BATCH, 8)
    for _ in range(TIMES):
        h = model(h)
    h.square().sum().backward()
    run.step()
    assert run.cost.layers["0"].repeats == 1 and run.layers["0"].repeats is None
    run.abandon()


WAYS = ("plain", "checkpoint", "reentrant", "no graph")


@given(st.lists(st.sampled_from(WAYS), min_size=1, max_size=6), st.booleans())
def test_whatever_calls_a_layer_and_computes_it_again(ways, retains):
    """Checkpoints compute again in the backward pass, and refuse to save another number of tensors there."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            for way in ways:
                if way == "no graph":
                    with torch.no_grad():
                        self.again(x)
                elif way == "plain":
                    x = torch.tanh(self.again(x))
                else:
                    x = checkpoint(lambda h: torch.tanh(self.again(h)), x, use_reentrant=way == "reentrant")
            return x

    retains = retains and "reentrant" not in ways  # which torch refuses
    found = []
    for shared in (False, True):
        model, results = decomposed(Net), []
        if shared:
            sharing(model)
        torch.manual_seed(1)
        for _ in range(2):
            x = torch.randn(BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
            output = model(x)
            if retains:
                output.square().sum().backward(retain_graph=True)
            output.square().sum().backward()
            results += [output, x.grad]
            for parameter in model.again.form.trained:
                parameter.data.mul_(1.1)  # as some optimizers write: torch does not notice
        found.append(results if set(ways) == {"no graph"} else [*results, *gradients(model).values()])
    for alone, together in zip(*found, strict=True):
        assert_same(together, alone, (WIDTH, WIDTH), factor=1024)


def test_a_backward_pass_within_a_call():
    class Truncated(Loop):
        def forward(self, x):
            h = self.first(x).detach()
            for _ in range(3):
                for _ in range(2):
                    h = torch.tanh(self.again(h))
                h.square().sum().backward()
                h = h.detach()
            return self.last(h)

    found = []
    for shared in (False, True):
        model = decomposed(Truncated)
        if shared:
            sharing(model)
        torch.manual_seed(1)
        model(torch.randn(BATCH, 8, dtype=torch.float64)).sum().backward()
        found.append(model.again.form.parameters["U"].grad)
    assert_same(found[1], found[0], (WIDTH, WIDTH), factor=256)


@pytest.mark.parametrize("form", ["svd", "pair"])
def test_losses_of_two_calls_go_backward_one_after_the_other(form):
    """As in a network with two views or two heads, whose dense layers have a graph for each call."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.again = nn.Linear(8, WIDTH)

        def forward(self, x, y):
            return self.again(x), self.again(y)

    model = decomposed(Twice)
    if form == "pair":
        svd_layers(model)["again"].keep(3)
        svd_layers(model)["again"].to_pair()
    inputs = torch.randn(2, BATCH, 8, dtype=torch.float64).unbind()
    for output in model(*inputs):
        output.square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    sharing(model, again=2)
    for output in model(*inputs):
        output.square().sum().backward()
    for name, gradient in gradients(model).items():
        assert_same(gradient, expected[name], (WIDTH, WIDTH), factor=64)


@pytest.mark.parametrize("groups", [(), (2,)])
@pytest.mark.parametrize("has_scale", [True, False])
def test_derivatives_of_the_product(has_scale, groups):
    torch.manual_seed(0)
    left, scale, right = (
        torch.randn(*groups, *shape, dtype=torch.float64, requires_grad=True) for shape in [(5, 3), (3,), (4, 3)]
    )
    factors = (left, scale if has_scale else None, right)
    assert torch.autograd.gradcheck(repeats._Product.apply, factors)
    assert torch.autograd.gradgradcheck(repeats._Product.apply, factors)


def test_derivatives_within_a_call():
    class Forces(Loop):
        def forward(self, x):
            x = x.requires_grad_()
            energy = super().forward(x).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
            return force + super().forward(x).sum()

    found = []
    for shared in (False, True):
        model = decomposed(Forces)
        if shared:
            sharing(model, again=2 * TIMES)
        torch.manual_seed(1)
        model(torch.randn(BATCH, 8, dtype=torch.float64)).square().sum().backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert_same(found[1][name], gradient, (WIDTH, WIDTH), factor=1024)


def test_writes_that_nobody_sees_are_seen_by_the_next_call():
    model = decomposed()
    sharing(model)
    x = torch.randn(BATCH, 8, dtype=torch.float64)
    kept = model(x)  # holds its graph, and so the weight in it
    for parameter in model.again.form.trained:
        parameter.data.mul_(1.5)  # as some optimizers write; no version is counted
    twin = copy.deepcopy(model)
    assert_same(model(x), twin(x), (WIDTH, WIDTH), factor=256)
    assert not torch.allclose(model(x), kept)


def test_writes_within_a_call_are_seen():
    class Writes(Loop):
        def forward(self, x):
            before = self.again(self.first(x))
            with torch.no_grad():
                self.again.form.parameters["s"].mul_(2)
            return before, self.again(self.first(x))

    model = decomposed(Writes)
    sharing(model)
    before, after = model(torch.randn(BATCH, 8, dtype=torch.float64))
    assert_same(after - model.again.bias, 2 * (before - model.again.bias), (WIDTH, WIDTH), factor=256)


def test_a_step_before_the_backward_pass_is_refused():
    model = decomposed()
    sharing(model)
    loss = model(torch.randn(BATCH, 8, dtype=torch.float64)).sum()
    with torch.no_grad():
        model.again.form.parameters["V"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_other_ways_to_compute_have_weights_of_their_own():
    class Casts(Loop):
        def forward(self, x):
            h = self.again(self.first(x))
            with torch.autocast("cpu", torch.bfloat16):
                narrow = self.again(h)
            with torch.no_grad():
                assert not self.again(h).requires_grad
            return narrow, self.again(h)

    model = decomposed(Casts, torch.float32)
    sharing(model)
    narrow, wide = model(torch.randn(BATCH, 8))
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32 and wide.requires_grad
    with torch.inference_mode():
        model(torch.randn(BATCH, 8))
    model(torch.randn(BATCH, 8))[1].sum().backward()  # whose weight is none of an inference


def test_transforms_see_each_call():
    model = decomposed()
    x = torch.randn(BATCH, 8, dtype=torch.float64)
    expected = [torch.func.grad(lambda x: model(x).square().sum())(x), torch.func.vmap(model)(x)]
    sharing(model)
    found = [torch.func.grad(lambda x: model(x).square().sum())(x), torch.func.vmap(model)(x)]
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its)


def test_a_mode_sees_the_products_of_each_call():
    """One that caches products for a checkpoint takes them by their number."""
    model = decomposed()
    x, counts = torch.randn(BATCH, 8, dtype=torch.float64), []
    for shares in (False, True):
        if shares:
            sharing(model)
        with FlopCounterMode(display=False) as counter:
            model(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 2 * TIMES * WIDTH**3


def test_nothing_is_shared_where_a_compiler_sees_the_model():
    model = decomposed()
    model.first.compile(backend="eager")
    sharing(model)
    assert model.again.repeats is None


@pytest.mark.parametrize("shows_factors", [False, True])
def test_copies_in_the_middle_share_nothing(shows_factors):
    model = decomposed()
    if shows_factors:
        for layer in svd_layers(model).values():
            layer.show_factors()
    sharing(model)
    twins = []
    hook = model.again.register_forward_hook(lambda layer, args, output: twins.append(copy.deepcopy(layer)))
    output = model(torch.randn(BATCH, 8, dtype=torch.float64))
    hook.remove()
    assert len(twins) == TIMES and all("repeats" not in vars(twin) for twin in twins)
    output.sum().backward()


def fit(epochs, **options):
    seed_everything(0, verbose=False)
    model, callback = Fitted(), SVDTrainingCallback(target_macs=0.5)
    path = options.pop("ckpt_path", None)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=epochs, **options)
    trainer.fit(model, data(), ckpt_path=path)
    return model, callback, trainer


def test_in_a_fit(monkeypatch):
    counts = Counter()

    class Counted(Fitted):
        def training_step(self, batch, batch_idx):
            if isinstance(self.net.again.form, SVDForm):
                with counting_rebuilds(self, monkeypatch) as found:
                    loss = super().training_step(batch, batch_idx)
                counts[self.global_step, found["net.again"]] += 1
                return loss
            return super().training_step(batch, batch_idx)

    seed_everything(0, verbose=False)
    model, callback = Counted(), SVDTrainingCallback(target_macs=0.5)
    quiet_trainer(callbacks=[callback], max_epochs=4).fit(model, data())
    # Not in the first step, after whose forward pass costs are known.
    assert {step: found for step, found in counts if step < 8} == {0: TIMES, **dict.fromkeys(range(1, 8), 1)}
    assert all("repeats" not in vars(module) for module in model.modules())
    assert type(model.net.again) in (nn.Linear, nn.Sequential)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_resumed_bit_for_bit(tmp_path):
    whole, _, _ = fit(4)

    class Saves(Fitted):
        def on_train_epoch_end(self):
            if self.current_epoch == 0:
                self.trainer.save_checkpoint(tmp_path / "half.ckpt")

    seed_everything(0, verbose=False)
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.5)], max_epochs=4).fit(Saves(), data())
    resumed, _, _ = fit(4, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_file_of_before_does_not_say_how_often_layers_run(tmp_path):
    class Saves(Fitted):
        def on_train_epoch_end(self):
            self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    callback = SVDTrainingCallback(target_macs=0.5)
    quiet_trainer(callbacks=[callback], max_epochs=2).fit(Saves(), DataLoader(data().dataset, 32))
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = saved["callbacks"]["SVDTrainingCallback"]
    assert not state["is_finished"]
    check_state(state, "a file")
    for price in state["cost"]["layers"].values():
        del price["repeats"]
    check_state(state, "a file")
    state["cost"]["layers"]["net.again"]["repeats"] = "often"
    with pytest.raises(ValueError, match="`cost` has other fields"):
        check_state(state, "a file")
