"""Layers that a model uses as what they are cannot become two: they are found by replays, and named with the reason."""

import time
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from test_calls import Forces, Net, factorized, no_hooks, recorded
from torch import nn

from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.pairs import is_pair
from lightning_svd.model import checks
from lightning_svd.model.calls import Call
from lightning_svd.model.checks import (
    NotTheSameError,
    chunks,
    difference,
    differing,
    has_finite,
    pairs_in_place,
    tolerance,
    whole_layers,
)
from lightning_svd.model.replay import replay

torch.set_num_threads(1)


class Asking(nn.Module):
    """`isinstance` decides where an activation goes: a pair would lose it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = F.relu(x)
        return x


class Reading(nn.Module):
    """Reads a bias and a weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x):
        x = self.b(torch.relu(self.a(x))) + self.b.bias
        return self.d(self.c(x.to(self.c.weight.dtype)))


def checked(net, *inputs, **options):
    recorder = recorded(net, lambda: net(*inputs))
    return whole_layers(net, recorder.calls, recorder.layers, **options)


def state_of(net):
    """Everything that an in-place change could leave otherwise, by identity."""
    return [
        (
            child,
            type(child),
            {**vars(child)},
            [*child._parameters.items()],
            [*child._buffers.items()],
            [*child._modules.items()],
        )
        for child in net.modules()
    ]


def assert_unchanged(net, before):
    for now, then in zip(state_of(net), before, strict=True):
        assert now[0] is then[0] and now[1] is then[1] and now[2].keys() == then[2].keys()
        assert all(now[2][key] is then[2][key] for key in now[2])
        for mine, theirs in zip(now[3:], then[3:], strict=True):
            assert [key for key, _ in mine] == [key for key, _ in theirs]
            assert all(a is b for (_, a), (_, b) in zip(mine, theirs, strict=True))


def test_nothing_speaks_against_a_plain_net():
    torch.manual_seed(0)
    assert checked(Net(), torch.randn(5, 12)) == {}


def test_a_net_that_asks_what_class_its_layers_are_of():
    torch.manual_seed(0)
    net = Asking()
    reasons = checked(net, torch.randn(5, 12))
    assert reasons.keys() == {"layers.0", "layers.1", "layers.2"}
    assert all(
        reason.startswith("the model computes something else with it (outputs differ by ")
        for reason in reasons.values()
    )


def test_a_net_that_reads_what_only_a_dense_layer_has():
    torch.manual_seed(0)
    net = Reading()
    before = None
    recorder = recorded(net, lambda: net(torch.randn(5, 12)))
    before = state_of(net)
    reasons = whole_layers(net, recorder.calls, recorder.layers)
    assert_unchanged(net, before)
    lacks = "the model needs what only the dense layer has: AttributeError: 'Sequential' object has no attribute "
    assert reasons == {"b": f"{lacks}'bias'", "c": f"{lacks}'weight'"}


def test_what_stays_in_place_of_what_is_blamed():
    torch.manual_seed(0)
    net, x = Reading(), torch.randn(5, 12)
    reasons = checked(net, x)
    layers = svd_layers(net)
    fine = [name for name in layers if name not in reasons]
    expected = net(x)
    with pairs_in_place(net, layers, fine):
        assert [is_pair(child) for child in net.children()] == [True, False, False, True]
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("kind", ["conv", "embedding", "grouped"])
def test_other_layers(kind):
    torch.manual_seed(0)
    if kind == "embedding":
        net, x = nn.Sequential(nn.Embedding(30, 12), nn.Linear(12, 8)), torch.randint(0, 30, (5, 3))
    else:
        groups = 2 if kind == "grouped" else 1
        net = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=groups), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 2)
        )
        x = torch.randn(3, 4, 6, 6)
    assert checked(net, x) == {}


def test_pairs_in_place_are_what_the_layers_become_and_leave_everything_as_it_was():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 12)
    first = net.net[0]
    first.note, first.extra = "mine", nn.Parameter(torch.ones(2))
    first.register_buffer("mask", torch.ones(3))
    seen = []
    handle = first.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    layers = factorized(net)
    weight, bias = first.weight, first.bias
    before, expected = state_of(net), net(x)
    names, optimizer = [*layers], torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ZeroDivisionError), pairs_in_place(net, layers, names):
        assert (
            is_pair(first)
            and first.note == "mine"
            and first.extra.tolist() == [1, 1]
            and "mask" in dict(first.named_buffers())
        )
        assert first[1].bias is bias and not hasattr(first, "weight") and not hasattr(first, "form")
        torch.testing.assert_close(net(x), expected)
        raise ZeroDivisionError
    assert_unchanged(net, before)
    assert first.weight is weight and first.bias is bias and seen[-1] is nn.Sequential
    torch.testing.assert_close(net(x), expected)
    handle.remove()
    net(x).sum().backward()
    optimizer.zero_grad()
    assert all(p.grad is None for layer in layers.values() for p in layer.trained_parameters())


@pytest.mark.parametrize("form", ["dense", "cut", "pair", "shown"])
def test_pairs_in_place_of_layers_in_any_form(form):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 12)
    layers = factorized(net, "dense" if form == "dense" else "svd")
    for layer in layers.values():
        if form in ("cut", "pair"):
            layer.keep(2)
        if form == "pair":
            layer.to_pair()
        if form == "shown":
            layer.show_factors()
    before, expected = state_of(net), net(x)
    with pairs_in_place(net, layers, [*layers]):
        assert all(map(is_pair, layers.values()))
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-4)
    assert_unchanged(net, before)


def test_pairs_in_place_of_layers_in_the_dense_form_cost_no_svd(monkeypatch):
    net, x = Net(), torch.randn(5, 12)
    layers, expected = factorized(net, "dense"), net(x)
    monkeypatch.setattr(torch.linalg, "svd", None)
    with pairs_in_place(net, layers, [*layers]):
        torch.testing.assert_close(net(x), expected)


class Sequences(nn.Module):
    """Attention and a recurrent module, one of which a subclass asks for something."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1)
        self.lstm, self.head = nn.LSTM(8, 8, 2, batch_first=True, dropout=0.1), nn.Linear(8, 8)

    def asked(self, x):
        return x

    def forward(self, x):
        return self.head(self.lstm(self.asked(self.attention(x, x, x)[0]))[0])


class ReadsAttention(Sequences):
    def asked(self, x):
        return x * self.attention.in_proj_weight.abs().mean()


class ReadsOutput(Sequences):
    def asked(self, x):
        return x.to(self.attention.out_proj.weight.dtype)


class ReadsRecurrent(Sequences):
    def asked(self, x):
        return x.to(self.lstm.weight_hh_l1.device)


class AsksForClass(Sequences):
    def asked(self, x):
        return x if type(self.attention) is nn.MultiheadAttention else 2 * x


ATTENTION = {f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
RECURRENT = {f"lstm.{name}_l{layer}" for name in ("ih", "hh") for layer in (0, 1)}


@pytest.mark.parametrize(
    ("kind", "blamed"),
    [
        (Sequences, set()),
        (ReadsAttention, ATTENTION),
        (ReadsOutput, {"attention.out_proj"}),
        (ReadsRecurrent, RECURRENT),
    ],
)
@pytest.mark.parametrize("form", ["dense", "svd"])
def test_what_a_model_reads_inside_attention_and_recurrent_modules(kind, blamed, form):
    torch.manual_seed(0)
    net, x = kind(), torch.randn(2, 3, 8)
    layers = factorized(net, form)
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    kinds = {name: type(module) for name, module in net.named_modules()}
    assert len(layers) == 9
    assert whole_layers(net, [Call(net, (x,))], layers).keys() == blamed
    assert {name: type(module) for name, module in net.named_modules()} == kinds
    for name, module in net.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert vars(module)["_parameters"] is before[name]["_parameters"]


def test_a_model_that_asks_for_the_exact_class_of_attention_is_refused():
    torch.manual_seed(0)
    net = AsksForClass()
    with pytest.raises(NotTheSameError, match=r"type\(layer\) is MultiheadAttention.*attention\.q_proj"):
        whole_layers(net, [Call(net, (torch.randn(2, 3, 8),))], factorized(net, "dense"))


@pytest.mark.parametrize("form", ["dense", "svd"])
def test_pairs_in_place_inside_attention_and_recurrent_modules(form):
    torch.manual_seed(0)
    net, x = Sequences().eval(), torch.randn(2, 3, 8)
    expected = net(x)
    layers = factorized(net, form)
    for names in ([*layers], ["attention.k_proj", "lstm.hh_l1"], ["attention.out_proj"]):
        with pairs_in_place(net, layers, names):
            for name in names:
                assert is_pair(net.get_submodule(name))
            torch.testing.assert_close(net(x), expected)
        torch.testing.assert_close(net(x), expected)
        assert not any(map(is_pair, net.modules()))


def test_derivatives_and_masked_outputs():
    torch.manual_seed(0)
    assert checked(Forces(), torch.randn(5, 6, requires_grad=True)) == {}

    class Masked(Net):
        def forward(self, x):
            logits = self.net(x).masked_fill(torch.tensor([True, False, False, False]), -torch.inf)
            return {"logits": logits, "class": logits.argmax(-1), "all": logits.mean(-1) * torch.nan}

    assert checked(Masked(), torch.randn(5, 12)) == {}


def test_noise_in_evaluation_is_no_difference():
    class Noisy(Net):
        def forward(self, x):
            return self.net(x) + torch.randn(len(x), 4)

    torch.manual_seed(0)
    assert checked(Noisy(), torch.randn(5, 12)) == {}

    class Drifting(Net):
        """Not to be reproduced: it counts somewhere else."""

        def forward(self, x):
            drift[0] += 1
            return self.net(x) * (1 + 0.01 * drift[0])

    drift = [0]
    assert checked(Drifting(), torch.randn(5, 12)) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    torch.manual_seed(0)
    assert checked(Net().to(dtype), torch.randn(5, 12, dtype=dtype)) == {}
    assert checked(Asking().to(dtype), torch.randn(5, 12, dtype=dtype)).keys() == {f"layers.{i}" for i in range(3)}


def test_under_autocast():
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert checked(Net(), torch.randn(5, 12)) == {}


def test_layers_are_checked_in_chunks(monkeypatch):
    torch.manual_seed(0)
    net = Reading()
    layers = factorized(net)
    size = 12 * 24
    assert [*chunks(layers, 2 * size)] == [["a", "b"], ["c", "d"]]
    assert [*chunks(layers, 1)] == [["a"], ["b"], ["c"], ["d"]]
    assert [*chunks({}, 1)] == []
    monkeypatch.setattr(checks, "ENTRIES", size)
    assert whole_layers(net, [Call(net, (torch.randn(5, 12),))], layers).keys() == {"b", "c"}
    assert no_hooks(net)


# --------------------------------------------------------------------------------------------------- the search


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.on = set()

    def forward(self, x):
        if {"u", "v"} <= self.on:
            raise ValueError("both\nof them")
        return x * (2 if "w" in self.on else 1)


def toy():
    net = Toy()

    @contextmanager
    def changed(names):
        tried.append(sorted(names))
        net.on |= {*names}
        try:
            yield
        finally:
            net.on = set()

    tried = []
    return net, changed, tried, [Call(net, (torch.ones(3),))]


def test_halving_finds_what_is_to_blame():
    net, changed, tried, calls = toy()
    names = [*"abcdefgwhijklmno"]
    assert differing(net, calls, names, changed) == {
        "w": "the model computes something else with it (outputs differ by 1)"
    }
    assert len(tried) <= 10
    assert differing(net, calls, [], changed) == {}
    assert differing(net, calls, ["a"], changed, expected=[2 * torch.ones(3)])["a"].endswith("(outputs differ by 0.5)")


def test_changes_that_do_harm_together_only():
    net, changed, tried, calls = toy()
    assert differing(net, calls, [*"aubv"], changed) == {"v": "the model fails with it: ValueError: both"}
    assert tried[-1] == ["a", "b", "u", "v"]


def test_the_search_is_bounded_in_time():
    net, changed, _, calls = toy()

    @contextmanager
    def slow(names):
        time.sleep(0.05)
        with changed(names):
            yield

    reasons = differing(net, calls, ["w", *"abcdefgh"], slow, limit_s=0.08)
    assert reasons.keys() == {"w", *"abcdefgh"}
    assert set(reasons.values()) == {"not cleared within 0.08 s"}


def test_an_error_of_the_unchanged_model_is_raised():
    net = Net()
    with pytest.raises(RuntimeError):
        whole_layers(net, [Call(net, (torch.randn(2, 3),))], factorized(net))


def test_differences():
    x = torch.tensor([1.0, -4.0, torch.nan, torch.inf])
    assert difference(x, x.clone()) == 0
    assert difference({"a": [x]}, {"a": [x + torch.tensor([0.4, 0, 0, 0])]}) == pytest.approx(0.1)
    assert difference(x, x.nan_to_num()) == torch.inf
    assert difference(x, -x) == torch.inf
    assert (
        difference(x, x.double()) == difference(x, x[:2]) == difference(x, (x, x)) == difference(x, None) == torch.inf
    )
    whole, other = torch.tensor([1, 2]), torch.tensor([1, 3])
    assert difference(whole, other) == torch.inf and difference(whole, whole.clone()) == 0
    assert difference((torch.ones(2), whole), (torch.ones(2), other)) == 0
    assert difference(torch.zeros(2), torch.zeros(2)) == 0 and difference(torch.zeros(2), torch.ones(2)) == torch.inf
    assert difference((torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.full((2,), 1e-9))) == pytest.approx(1e-6)
    assert difference({"a": x}, {"b": x}) == torch.inf
    assert has_finite(x) and has_finite((x * torch.nan, {"a": x})) and has_finite([3, "a", torch.arange(2)])
    assert not has_finite((x * torch.nan, {"a": torch.tensor(torch.inf), "b": torch.zeros(0)}, torch.arange(2)))
    assert difference(3.0, 6.0) == 1 and difference("a", "b") == torch.inf


def test_what_rounding_explains():
    net = Net()
    assert tolerance(net, []) == pytest.approx(1e4 * 2**-23)
    assert tolerance(net.bfloat16(), []) == 0.1
    assert tolerance(net.double(), [torch.ones(1, dtype=torch.float64)]) < 1e-11


def test_replays_in_the_middle_do_not_disturb_training():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(8, 12)
    layers = factorized(net)
    net(x).sum().backward()
    gradients = [p.grad for layer in layers.values() for p in layer.trained_parameters()]
    values = [gradient.clone() for gradient in gradients]
    calls = [Call(net, (x,))]
    replay(net, calls), whole_layers(net, calls, layers)
    after = [p.grad for layer in layers.values() for p in layer.trained_parameters()]
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(after, gradients, values, strict=True))
