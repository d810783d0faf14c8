"""Calls of a step are noted without a trace in it, and run again without a trace in the model."""

import contextlib
import copy
import gc
import pickle
import random
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import svd_of
from models import ComputedAgain
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_svd.model import calls as module_of_calls
from lightning_svd.model.calls import Call, CallRecorder, inputs_of
from lightning_svd.model.counting import count_calls
from lightning_svd.model.plan import plan
from lightning_svd.model.replay import call_again, cut, replay, same_version, untouched
from lightning_svd.model.surgery import begin
from lightning_svd.model.values import mapped

torch.set_num_threads(1)


def factorized(module, form="svd"):
    """The module's layers, that train U, s and V and show dense weights."""
    layers = begin(module, plan(module))
    for layer in layers.values() if form == "svd" else ():
        layer.to_svd()
    return layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x):
        return self.net(x)

    def encode(self, x):
        return self.net[2](torch.relu(self.net[0](x)))


class Step(nn.Module):
    """As a LightningModule: its step calls what it likes."""

    def __init__(self, kind=Net):
        super().__init__()
        self.model = kind()

    def forward(self, x):
        return self.model(x)


def recorded(module, step, *args):
    recorder = CallRecorder(module, factorized(module))
    recorder.start()
    try:
        step(*args)
    finally:
        recorder.stop()
    return recorder


def no_hooks(module):
    return not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_only_the_outermost_calls_are_noted():
    step, x = Step(), torch.randn(3, 12)
    recorder = CallRecorder(step, factorized(step))
    recorder.start()
    step(x)
    assert [call.module for call in recorder.calls] == [step]
    assert recorder.seen == {"model.net.0", "model.net.2", "model.net.4"}
    recorder.start()
    step.model(x), step.model(x)
    assert [call.module for call in recorder.calls] == [step.model] * 2
    recorder.start()
    step.model.encode(x)
    assert [call.module for call in recorder.calls] == [step.model.net[0], step.model.net[2]]
    assert recorder.seen == {"model.net.0", "model.net.2"}
    recorder.stop()
    recorder.stop()
    assert no_hooks(step)
    step(x)
    assert len(recorder.calls) == 2


def test_a_strategy_that_leads_the_step_through_the_modules_call_is_passed_over():
    step, x = Step(), torch.randn(3, 12)
    recorder = CallRecorder(step, factorized(step))
    recorder.start()
    forward = step.forward

    def redirected(x):
        step.forward = forward  # as Lightning's DDP puts it back: now an attribute of its own
        return step(x)

    step.forward = redirected
    step(x)
    assert [call.module for call in recorder.calls] == [step]
    recorder.stop()


def test_several_networks_and_keywords():
    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator, self.critic = nn.Linear(4, 8), nn.Linear(8, 2)

    gan, z = Gan(), torch.randn(5, 4)

    def step():
        fake = gan.generator(input=z)
        gan.critic(fake), gan.critic(fake.detach())

    recorder = recorded(gan, step)
    assert [call.module for call in recorder.calls] == [gan.generator, gan.critic, gan.critic]
    assert recorder.calls[0].args == () and recorder.calls[0].kwargs.keys() == {"input"}
    assert [tensor.requires_grad for call in recorder.calls for tensor in call.tensors()] == [False, True, False]
    assert all(tensor.grad_fn is None for call in recorder.calls for tensor in call.tensors())


def test_no_graph_is_kept_and_no_tensor_copied():
    step, x = Step(), torch.randn(3, 12)
    held = []

    def run():
        hidden = torch.nn.Linear(12, 12)(x)
        held.append(weakref.ref(hidden))
        held.append(hidden.data_ptr())
        step(hidden).sum().backward()

    recorder = recorded(step, run)
    gc.collect()
    assert held[0]() is None
    (tensor,) = recorder.calls[0].tensors()
    assert tensor.data_ptr() == held[1] and tensor.requires_grad


def test_the_step_computes_the_same_bits():
    torch.manual_seed(0)
    step, x = Step(), torch.randn(3, 12)
    layers = factorized(step)
    expected = step(x)
    recorder = CallRecorder(step, layers)
    recorder.start()
    assert torch.equal(step(x), expected)


def test_an_error_inside_leaves_no_depth():
    class Picky(Net):
        def forward(self, x):
            if len(x) == 1:
                raise ValueError("one")
            return self.net(x)

    step = Step(Picky)
    recorder = CallRecorder(step, factorized(step))
    recorder.start()
    for x in (torch.randn(1, 12), torch.randn(2, 12)):
        with contextlib.suppress(ValueError):
            step(x)
    with pytest.raises(RuntimeError):
        step(torch.randn(2, 11))
    step(torch.randn(2, 12))
    assert [call.module for call in recorder.calls] == [step] * 4


def test_a_hook_of_the_users_that_raises_before_ours():
    step = Step()
    layers = factorized(step)

    def refuse(*_):
        raise ValueError("no")

    recorder = CallRecorder(step, layers)
    recorder.start()
    handle = step.model.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(ValueError, match="no"):
        step(torch.randn(2, 12))
    handle.remove()
    step.model(torch.randn(2, 12))
    assert [call.module for call in recorder.calls] == [step, step.model]


def test_what_a_users_pre_hook_makes_of_the_arguments_is_made_again():
    step, x = Step(), torch.randn(2, 12)
    step.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    outputs = []
    recorder = recorded(step, lambda: outputs.append(step(x)))
    assert torch.equal(recorder.calls[0].args[0], x)
    torch.testing.assert_close(replay(step, recorder.calls)[0], outputs[0].detach())


def test_a_step_led_through_the_modules_call():
    # As Lightning's strategies do: `training_step` in the place of `forward`, which it restores inside.
    step, x = Step(), torch.randn(2, 12)
    recorder = CallRecorder(step, factorized(step))
    recorder.start()

    def redirected(batch, index):
        del step.forward
        return step(batch[0]).sum()

    step.forward = redirected
    step([x], 0)
    assert [len(call.args) for call in recorder.calls] == [1]
    assert torch.equal(recorder.calls[0].args[0], x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_computes_again_is_no_call(reentrant):
    class Saving(Net):
        def forward(self, x):
            return self.net[4](checkpoint(self.encode, x, use_reentrant=reentrant))

    step, x = Step(Saving), torch.randn(2, 12, requires_grad=True)
    recorder = recorded(step, lambda: step(x).sum().backward())
    assert [call.module for call in recorder.calls] == [step]


def test_a_derivative_in_the_step():
    step, x = Step(), torch.randn(3, 12, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(step(x).sum(), x, create_graph=True)
        (gradient.norm(dim=1) - 1).square().mean().backward()

    recorder = recorded(step, penalty)
    assert [call.module for call in recorder.calls] == [step]
    assert replay(step, recorder.calls)[0].shape == (3, 4)
    assert not recorder.calls[0].differentiates


def test_a_loop_over_time_is_bounded(monkeypatch):
    cell = nn.Sequential(nn.Linear(6, 6))
    x = torch.randn(2, 6)

    def loop(steps):
        h = x
        for _ in range(steps):
            h = torch.tanh(cell(h))

    recorder = recorded(cell, loop, 100)
    assert len(recorder.calls) == module_of_calls.ALIKE
    assert sum(call.times for call in recorder.calls) == 100 and recorder.left_out == 0
    monkeypatch.setattr(module_of_calls, "KEPT", 5)
    recorder.start()
    for length in range(8):
        cell(torch.randn(length + 1, 6))
    cell(torch.randn(1, 6))
    recorder.stop()
    assert recorder.calls[0].times == 2
    assert len(recorder.calls) == 5 and recorder.left_out == 3


def test_copies_and_pickles_do_not_take_the_recorder_along():
    step, x = Step(), torch.randn(2, 12)
    recorder = CallRecorder(step, factorized(step))
    recorder.start()
    twin = copy.deepcopy(step)
    twin(x)
    assert recorder.calls == []
    pickle.loads(pickle.dumps(step))(x)
    assert recorder.calls == []


def test_parts_of_attention_and_recurrent_nets_are_seen_with_their_owner():
    class Sequences(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.unused = nn.Linear(8, 8)

        def forward(self, x):
            return self.lstm(self.attention(x, x, x)[0])[0]

    net = Sequences()
    recorder = recorded(net, lambda: net(torch.randn(2, 3, 8)))
    parts = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert recorder.seen == parts | {"lstm.ih_l0", "lstm.hh_l0"}


# ------------------------------------------------------------------------------------------------------- replays


class Moody(nn.Module):
    """Everything that a replay could leave behind."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.drop = nn.Dropout(0.5)
        self.register_buffer("counter", torch.zeros((), dtype=torch.long))
        self.register_buffer("state", None)
        self.register_buffer("cache", torch.zeros(8))
        self.passes, self.seen, self.memory = 0, [], {"last": 0}

    def forward(self, x):
        x.mul_(2.0)  # into its input
        self.counter += 1
        self.passes += 1
        self.late = self.passes
        self.seen.append(len(x))
        self.memory["last"] = len(x)
        self.state = x.mean(0)
        self.cache = self.cache + 1
        noise = torch.randn_like(x)
        return self.drop(self.norm(self.frozen(self.fc(x)))) + noise


def test_a_replay_leaves_nothing_behind():
    net, x = Moody().train(), torch.randn(4, 8)
    net.frozen.eval()
    recorder = recorded(net, lambda: net(x.clone()))
    before = copy.deepcopy(net.state_dict())
    modes = [child.training for child in net.modules()]
    kept, random = recorder.calls[0].args[0].clone(), torch.get_rng_state()
    attributes = (net.passes, net.late, [*net.seen], dict(net.memory), net.cache, net.state)
    first, second = replay(net, recorder.calls), replay(net, recorder.calls)
    assert torch.equal(first[0], second[0])  # noise in evaluation too
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(recorder.calls[0].args[0], kept)
    assert [child.training for child in net.modules()] == modes
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    assert (net.passes, net.late, net.seen, net.memory) == attributes[:4]
    assert net.cache is attributes[4] and net.state is attributes[5]
    assert all(p.grad is None for p in net.parameters())
    assert no_hooks(net)


class Annealed:
    """A plain object of a model's, which a pass changes: the weight of a loss, say."""

    def __init__(self):
        self.passes, self.history = 0, []

    def __call__(self):
        self.passes += 1
        self.history.append(self.passes)
        return 1.0 / self.passes


class Drawing(nn.Module):
    """Random numbers from everywhere, an object, and tensors and an array that are no buffers."""

    def __init__(self):
        super().__init__()
        self.fc, self.annealed = nn.Linear(8, 8), Annealed()
        self.generators = [torch.Generator().manual_seed(1), random.Random(2), numpy.random.default_rng(3)]
        self.older, self.system = numpy.random.RandomState(4), random.SystemRandom()
        self.usage, self.by_name = torch.zeros(8), {"norms": torch.zeros(3)}
        self.codes = {"seen": numpy.zeros(8, int)}
        leaving = Annealed()
        self.gone = weakref.proxy(leaving)  # of an object that is no more, once this is built

    def drawn(self):
        of_torch, of_python, of_numpy = self.generators
        everywhere = [random.random(), numpy.random.rand(), float(torch.rand(()))]
        own = [float(torch.rand((), generator=of_torch)), of_python.random(), of_numpy.random(), self.older.rand()]
        return everywhere + own

    def forward(self, x):
        self.usage += 1
        self.by_name["norms"][1:].add_(1)
        self.codes["seen"][x.argmax(1).numpy()] += 1
        return self.fc(x) * sum(self.drawn()) * self.annealed() + self.usage


def test_what_a_model_draws_and_what_its_objects_and_tensors_hold_is_as_it_was():
    def seen(is_replayed):
        random.seed(5), numpy.random.seed(5), torch.manual_seed(5)
        net, x = Drawing(), torch.ones(4, 8)
        net(x)
        if is_replayed:
            first, second = (replay(net, [module_of_calls.Call(net, (x,))]) for _ in range(2))
            assert torch.equal(first[0], second[0])  # the same masks: what then differs is what was changed
        arrays = net.usage, net.by_name["norms"], net.codes["seen"]
        return net.drawn(), net.annealed.passes, net.annealed.history, [array.tolist() for array in arrays]

    assert seen(True) == seen(False)


class Local(nn.Module):
    """A layer that is trained by a loss of its own, in the forward pass."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        with torch.enable_grad():
            self.fc(x.detach()).square().mean().backward()
        return self.head(ComputedAgain.apply(self.fc(x), self.head))


@pytest.mark.parametrize("form", ["plain", "dense", "svd"])
@pytest.mark.parametrize("there", [False, True], ids=["no gradients", "gradients of before"])
def test_gradients_of_backward_passes_in_a_replay_are_dropped(form, there):
    net, x = Local(), torch.randn(4, 8)
    layers = [] if form == "plain" else [svd_of(layer, form=form, name="a") for layer in (net.fc, net.head)]
    trained = [p for layer in layers for p in layer.form.trained] or [*net.parameters()]
    if there:
        net(x).sum().backward()
    before = [(p.grad, p.grad if p.grad is None else p.grad.clone()) for p in trained]
    assert all((gradient is not None) == there for gradient, _ in before)
    with untouched(net):
        call_again(Call(net, (x,))).sum().backward()
        assert all(p.grad is not None for p in trained)
    for p, (gradient, values) in zip(trained, before, strict=True):
        assert p.grad is gradient and (values is None or torch.equal(gradient, values))


class Tally:
    """A plain object of the user's, as a controller of attention is."""

    passes = 0

    def __init__(self):
        self.calls, self.inner = 0, {"states": []}

    def __call__(self, x):
        self.calls += 1
        return x


OF_FILE, NAMESPACE, GENERATOR = Tally(), SimpleNamespace(passes=0), torch.Generator().manual_seed(1)


class Everywhere(nn.Module):
    """What a forward pass can reach by names of its file: an object, a class, a namespace, a generator."""

    generator = numpy.random.default_rng(2)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        Tally.passes += 1
        NAMESPACE.passes += 1
        noise = torch.rand(8, generator=GENERATOR) + self.generator.random()
        return OF_FILE(self.fc(x)) + noise


def test_what_forward_reaches_by_names_of_its_file_is_as_before():
    net, x, control, old = Everywhere(), torch.ones(2, 8), Tally(), random.Random(3)

    def forward(x):
        control(x)
        return Everywhere.forward(net, x) * old.random()

    net.forward = forward  # as controllers of attention and seamless tiling are set on modules
    before = (Tally.passes, NAMESPACE.passes, OF_FILE.calls, control.calls)
    first, second = (replay(net, [Call(net, (x,))])[0] for _ in range(2))
    assert torch.equal(first, second)
    assert (Tally.passes, NAMESPACE.passes, OF_FILE.calls, control.calls) == before


def test_an_object_that_a_call_is_given_is_as_it_was_when_the_call_is_run_again():
    class Carrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, state):
            state.inner["states"].append(len(state.inner["states"]))
            state.inner.setdefault("last", []).append(x.sum())
            return self.fc(x) + len(state.inner["states"])

    net, state, x = Carrying(), Plain(), torch.ones(2, 8)
    recorder = recorded(net, lambda: (net(x, state), net(x, state)))
    first, second = (replay(net, recorder.calls) for _ in range(2))
    assert state.inner["states"] == [0, 1] and len(state.inner["last"]) == 2
    for output, again, states in zip(first, second, (1, 2), strict=True):
        torch.testing.assert_close(output, net.fc(x).detach() + states)
        assert torch.equal(output, again)


class Plain:
    """A state that is carried from call to call, as a cache of keys and values."""

    def __init__(self):
        self.inner, self.me = {"states": []}, self


def test_a_copy_that_is_made_in_a_replay_counts_as_no_layer():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x) + copy.deepcopy(self.fc)(x)

    net = Copying()
    layers, call = factorized(net), Call(net, (torch.ones(2, 8),))
    cost = count_calls(net, layers, [call])
    assert cost.layers["fc"].dense_macs == 2 * 64 and cost.layers["fc"].input_shapes == ((2, 8),)


class Halved(nn.Module):
    """As RWKV, which divides weights when it first evaluates, and a weight that is clamped past autograd."""

    def __init__(self):
        super().__init__()
        self.fc, self.scale = nn.Linear(6, 6), nn.Parameter(torch.tensor([2.0, 9.0]))
        self.alone = nn.Parameter(torch.ones(3))
        self.is_halved = False

    def forward(self, x):
        if self.training == self.is_halved:
            with torch.no_grad():
                self.fc.weight.mul_(2) if self.training else self.fc.weight.div_(2)
            self.is_halved = not self.training
        torch._foreach_clamp_max_([self.scale.data[1:]], 1.0)
        return self.fc(x) * self.scale.sum()


def test_weights_that_a_model_writes_into_are_as_they_were():
    net, x = Halved(), torch.randn(2, 6)
    out = net(x)  # clamps
    net.scale.data[1] = 9.0
    before = {name: value.clone() for name, value in net.state_dict().items()}
    places = [p.data_ptr() for p in net.parameters()]
    replay(net, [module_of_calls.Call(net, (x,))])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and not net.is_halved
    assert [p.data_ptr() for p in net.parameters()] == places
    out.sum().backward()  # the graph of before has not seen it
    assert torch.equal(net.fc.bias.grad, torch.full((6,), 2 * 3.0))


def test_torch_still_lets_a_write_be_unseen():
    weight = nn.Parameter(torch.ones(2))
    out = (weight * weight).sum()
    with same_version(weight), torch.no_grad():
        weight.mul_(2)
        weight.div_(2)
    out.backward()
    assert torch.equal(weight.grad, torch.full((2,), 2.0))


def test_after_an_error_too():
    class Failing(Moody):
        def forward(self, x):
            super().forward(x)
            raise ValueError("late")

    net = Failing()
    recorder = CallRecorder(net, factorized(net))
    recorder.start()
    with pytest.raises(ValueError, match="late"):
        net(torch.randn(4, 8))
    recorder.stop()
    with pytest.raises(ValueError, match="late"):
        replay(net, recorder.calls)
    assert net.training and net.passes == 1 and int(net.counter) == 1 and net.seen == [4]
    assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def test_replays_are_in_evaluation_and_without_gradients():
    class Telling(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x), torch.tensor([self.training, torch.is_grad_enabled()])

    net = Telling()
    recorder = recorded(net, lambda: net(torch.randn(2, 4)))
    with torch.inference_mode():
        outputs = replay(net, recorder.calls)
    assert outputs[0][1].tolist() == [False, False]


class Forces(nn.Module):
    """Energy and forces, as of a molecular net: a derivative inside the forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        energy = self.second(torch.tanh(self.first(x)))
        (gradient,) = torch.autograd.grad(energy.sum(), x, create_graph=self.training)
        return energy, -gradient


def test_a_model_that_differentiates_in_its_forward_pass():
    net, x = Forces(), torch.randn(3, 6, requires_grad=True)
    outputs = []
    recorder = recorded(net, lambda: outputs.append(net(x)))
    again = replay(net, recorder.calls)
    assert recorder.calls[0].differentiates
    for actual, expected in zip(again[0], outputs[0], strict=True):
        assert not actual.requires_grad
        torch.testing.assert_close(actual, expected.detach())
    assert x.grad is None and all(p.grad is None for p in net.parameters())


def test_the_same_tensor_stays_the_same():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, query, key):
            return self.fc(query) if query is key else query

    net, x = Looking(), torch.randn(2, 4)
    recorder = recorded(net, lambda: net(x, x))
    assert recorder.calls[0].args[0] is recorder.calls[0].args[1]
    torch.testing.assert_close(replay(net, recorder.calls)[0], net.fc(x).detach())


def test_nested_values_keep_their_kinds():
    @dataclass
    class Batch:
        x: torch.Tensor
        name: str

    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    value = {"batch": Batch(torch.ones(2), "a"), "packed": packed, "more": OrderedDict(y=[torch.ones(1), 3])}
    twin = mapped(value, lambda tensor: tensor + 1)
    assert twin["batch"].name == "a" and twin["batch"].x.tolist() == [2.0, 2.0]
    assert type(twin["packed"]) is type(packed) and torch.equal(twin["packed"].data, packed.data + 1)
    assert type(twin["more"]) is OrderedDict and twin["more"]["y"][1] == 3
    assert value["batch"].x.tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------- cuts


def test_a_batch_is_cut_where_outputs_follow():
    step, x = Step(), torch.randn(32, 12)
    recorder = recorded(step, lambda: step(x))
    fewer, inputs = cut(step, recorder.calls, 8)
    assert inputs == 8 and inputs_of(recorder.calls) == 32
    torch.testing.assert_close(replay(step, fewer)[0], step(x)[:8].detach())
    assert cut(step, recorder.calls, 32) == (recorder.calls, 32)


def test_multiples_of_the_batch_are_cut_with_it():
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    net, x = Patches(), torch.randn(16, 3, 4)

    def step():
        y = net.embed(x)
        net.head(y.flatten(0, 1))

    fewer, inputs = cut(net, recorded(net, step).calls, 2)
    assert inputs == 2 and [len(call.args[0]) for call in fewer] == [2, 6]


def test_a_batch_that_is_not_to_be_cut_stays_whole():
    class Over(nn.Module):
        """The batch is in the weights, or in a shape."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, other=None):
            return self.fc(x).view(16, 4) if other is None else self.fc(x) @ other.T

    class Summed(Over):
        def forward(self, x):
            return F.mse_loss(self.fc(x), x)

    net, x = Over(), torch.randn(16, 4)
    recorder = recorded(net, lambda: net(x))
    assert cut(net, recorder.calls, 4) == (recorder.calls, 16)
    recorder.start()
    net(x, torch.randn(5, 4))
    assert cut(net, recorder.calls, 4)[1] == 16
    net = Summed()
    assert cut(net, recorded(net, lambda: net(x)).calls, 4)[1] == 16


@pytest.mark.parametrize("way", ["in its place", "beside it"])
def test_a_compiled_network_is_replayed_in_eager_mode(way):
    step, x = Step(), torch.randn(3, 12)
    layers = factorized(step)
    expected, own = step(x).detach(), step.model
    if way == "in its place":
        own.compile(backend="eager")
    else:
        step.model = torch.compile(step.model, backend="eager")
    compiled = step.model._compiled_call_impl
    recorder = CallRecorder(step, layers)
    recorder.start()
    step.model(x)
    recorder.stop()
    assert [call.module for call in recorder.calls] == [own] and recorder.seen == set(layers)
    assert step.model._compiled_call_impl is compiled and no_hooks(own)
    torch.testing.assert_close(replay(step, recorder.calls)[0], expected)


def test_what_each_of_many_modules_keeps_is_as_before():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(2, 2), {"inputs": []}

        def forward(self, x):
            self.seen["inputs"].append(x)
            return self.layer(x)

    net = nn.Sequential(*(Keeps() for _ in range(400)))
    replay(net, [Call(net, (torch.ones(1, 2),), {})])
    assert not any(module.seen["inputs"] for module in net)
