"""Layers that factors do not make faster stay dense, by measurement."""

import copy

import pytest
import torch
from models import SmallNet, data, quiet_trainer
from torch import nn

from lightning_svd import SVDTrainingCallback, decompose, svd_layers
from lightning_svd.model import layer_times, stopwatch
from lightning_svd.model.counting import count_costs, count_params
from lightning_svd.model.layer_times import time_layers
from lightning_svd.model.surgery import compact, factorized_copy, to_factored


def cut_net(rank=2):
    """Two linear layers, a convolution that is not used, and low ranks everywhere."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(12, 16), nn.Linear(16, 12), nn.Conv2d(4, 8, 3)

        def forward(self, x):
            return self.second(self.first(self.second(self.first(x))))

    net = Net()
    decompose(net)
    for layer in svd_layers(net).values():
        layer.keep(rank)
    return net.eval()


def timed(net, x):
    """Its cost, measured."""
    return time_layers(count_costs(net, x), svd_layers(net))


@pytest.fixture
def slow_factors(monkeypatch):
    """Clocks by which factors of layers with 16 outputs are slower than the dense layer, all others faster."""

    def race(forms, inputs):
        return [1.0, 2.0] if forms[0].weight.shape[0] == 16 else [1.0, 0.5]

    monkeypatch.setattr(layer_times, "_race", race)


def test_every_layer_that_was_used_is_timed_at_all_its_inputs():
    net, x = cut_net(), torch.randn(5, 12)
    cost = count_costs(net, x)
    assert cost.layers["first"].input_shapes == ((5, 12), (5, 12))
    layers = timed(net, x).layers
    for name in ("first", "second"):
        assert layers[name].latency.dense > 0 and layers[name].latency.at(2) > 0
    assert layers["unused"] == cost.layers["unused"]


def test_timing_changes_neither_the_layers_nor_the_random_state():
    net, x = cut_net(), torch.randn(5, 12)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    timed(net, x)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


def test_each_form_does_the_work_of_all_inputs(monkeypatch):
    calls = []

    monkeypatch.setattr(stopwatch, "_mean", lambda action, runs: (action(), float(len(calls)))[1])
    net = cut_net()
    for kind in (nn.Linear, nn.Sequential):
        original = kind.forward
        monkeypatch.setattr(
            kind, "forward", lambda self, x, kind=kind, f=original: (calls.append((kind, x.shape)), f(self, x))[1]
        )
    price = layer_times._timed(count_costs(net, torch.randn(5, 12)).layers["first"], net.first)
    forms = [kind for kind, shape in calls if shape == (5, 12) and kind is nn.Sequential]
    assert len(forms) == 2 * 3  # two inputs: to warm up, to estimate, and in the one turn for which there is time
    assert price.latency.dense < price.latency.at(2)  # the fastest round of each, dense before factored


def test_compact_leaves_dense_what_is_no_faster_as_factors(slow_factors):
    net, x = cut_net(), torch.randn(5, 12)
    expected = net(x)
    twin = factorized_copy(net)
    by_macs, by_time = compact(twin, count_params(twin)), to_factored(net, timed(net, x))
    assert set(svd_layers(by_macs)) == {"first", "second", "unused"}
    assert type(by_time.first) is nn.Linear and type(by_time.second) is nn.Sequential
    assert type(by_time.unused) is nn.Sequential  # by its parameters: it was not used
    assert torch.allclose(by_time(x), expected, atol=1e-6)


def test_a_layer_beyond_break_even_is_dense_whatever_the_clock_says(monkeypatch):
    monkeypatch.setattr(layer_times, "_race", lambda forms, inputs: [1.0, 0.1])
    net = cut_net(rank=8)
    assert type(to_factored(net, timed(net, torch.randn(5, 12))).first) is nn.Linear


def fit(**arguments):
    torch.manual_seed(0)
    callback, model = SVDTrainingCallback(target_macs=0.3, **arguments), SmallNet()
    quiet_trainer(callbacks=[callback]).fit(model, data())
    return callback.report, model


def test_the_callback_reports_both_times_and_says_what_it_cost(monkeypatch):
    monkeypatch.setattr(
        layer_times, "_race", lambda forms, inputs: [3.0, 5.0] if isinstance(forms[0], nn.Conv2d) else [2.0, 1.0]
    )
    plain, _ = fit()
    report, model = fit(measure_latency=True)
    for row, untimed in zip(report.layers, plain.layers, strict=True):
        assert (untimed.dense_seconds, untimed.seconds) == (None, None)
        if row.kind == "Conv2d":
            assert (row.form, row.dense_seconds, row.seconds) == ("dense", 3.0, 3.0)
            assert row.macs == row.dense_macs
            assert type(model.get_submodule(row.name)) is nn.Conv2d
        elif row.form == "factored":
            assert (row.dense_seconds, row.seconds) == (2.0, 1.0)
    assert report.macs_ratio > plain.macs_ratio
    (warning,) = report.warnings
    assert "2 layers are dense because two factors are no faster here (features.0, features.2)" in warning
    assert f"{report.macs_ratio:.1%} of the MACs, not {plain.macs_ratio:.1%}" in warning


def test_a_report_of_faster_layers_has_no_warning(monkeypatch):
    monkeypatch.setattr(layer_times, "_race", lambda forms, inputs: [2.0, 1.0])
    report, _ = fit(measure_latency=True)
    assert not report.warnings and report.macs_ratio <= 0.3


@pytest.mark.parametrize("fails", [False, True])
def test_an_example_input_leaves_modes_and_running_statistics_alone(fails):
    net = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 12))
    decompose(net)
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    if fails:
        with pytest.raises(ValueError, match="`example_input`: the model fails on it: RuntimeError: mat1 and mat2"):
            timed(net, torch.randn(1, 5))
    else:
        timed(net, torch.randn(1, 12))  # one input, which BatchNorm1d refuses in training
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_layers_are_timed_as_the_model_runs_in_its_layout_and_under_its_precision(monkeypatch):
    raced = []

    def race(forms, inputs):
        autocast = torch.is_autocast_enabled("cpu")
        layouts = [x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous() for x in inputs]
        weights = [p.is_contiguous(memory_format=torch.channels_last) for p in forms[1].parameters() if p.ndim == 4]
        raced.append((autocast, layouts, weights))
        return [1.0, 0.5]

    monkeypatch.setattr("lightning_svd.model.layer_times._race", race)
    model = SmallNet().to(memory_format=torch.channels_last)
    callback = SVDTrainingCallback(target_macs=0.4, measure_latency=True)
    quiet_trainer(callbacks=[callback], precision="bf16-mixed").fit(model, data())
    assert all(autocast for autocast, *_ in raced)
    second = raced[1]  # a convolution of several channels: of one channel both layouts are the same
    assert all(second[1]) and all(second[2])
    final = [p for p in model.features.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert final and all(p.is_contiguous(memory_format=torch.channels_last) for p in final)
