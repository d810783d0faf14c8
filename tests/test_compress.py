"""A trained model cut by what its data uses, without training."""

import pytest
import torch
from torch import nn

from lightning_svd import compress
from lightning_svd.compression.calibration import collect
from lightning_svd.compression.data import CalibrationData, inputs_in, numbers_in
from lightning_svd.model.counting import count_costs
from lightning_svd.model.surgery import begin
from lightning_svd.ranks.statistics import in_metric_of_data
from lightning_svd.training.recipe import Recipe


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r, self.f = nn.LSTM(5, 8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.f(self.r(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.t = nn.Embedding(20, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.t(self.e(x))


def convolutions(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.ReLU(inplace=True), *layers)


images = torch.randn(8, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 10)), images[:, 0], "channel"),
    "grouped": (lambda: convolutions(nn.Conv2d(6, 8, 3, groups=2)), images, "channel"),
    "spatial": (lambda: convolutions(nn.Conv2d(6, 8, 3, dilation=2)), images, "spatial"),
    "transposed": (lambda: convolutions(nn.ConvTranspose2d(6, 8, 3, groups=2, stride=2)), images, "channel"),
    "transposed, spatial": (lambda: convolutions(nn.ConvTranspose2d(6, 8, 3, stride=2)), images, "spatial"),
    "lstm": (LastState, images[:, 0, :7, :5], "channel"),
    "attention": (Encoder, torch.randint(0, 20, (6, 7), generator=torch.Generator().manual_seed(0)), "channel"),
}


def in_order(items, text):
    return items


@pytest.fixture(params=NETS)
def factorized(request):
    """A net of double precision with its layers as U, s and V, a batch, and what it puts out."""
    make, x, mode = NETS[request.param]
    torch.manual_seed(0)
    model = make().double().eval()
    data = CalibrationData(model, [x], 1000)
    before = data.outputs([x])[0]
    plan = Recipe(target_params=0.5, conv_mode=mode).plan(model, include_frozen=True)
    layers = begin(model, plan)
    for layer in layers.values():
        layer.to_svd()
    return data, layers, x, before


def test_what_the_loss_feels_of_a_rank_is_its_derivative_of_each_input(factorized):
    data, layers, x, _ = factorized
    seen = collect(data, layers, True, in_order, seed=3)
    outputs = numbers_in(data.call(x))
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randn(y.shape, generator=generator).to(y) / y.detach().square().mean().sqrt() for y in outputs]
    for name, layer in layers.items():
        s = layer.form.parameters["s"]
        expected = torch.zeros(layer.rank, dtype=s.dtype)
        for number in range(inputs_in(x)):
            one = [torch.zeros_like(each) for each in drawn]
            for zeros, each in zip(one, drawn, strict=True):
                zeros[number] = each[number]
            (slope,) = torch.autograd.grad(outputs, s, one, retain_graph=True)
            expected += (s.detach() * slope).reshape(-1, layer.rank).sum(0).square()
        assert torch.allclose(seen[name].squares, expected, rtol=1e-9, atol=1e-12 * float(expected.max()))


@pytest.mark.parametrize("of_loss", [False, True])
def test_another_basis_computes_the_same_and_its_statistics_are_those_collected_in_it(factorized, of_loss):
    data, layers, x, before = factorized
    seen = collect(data, layers, True, in_order)
    for name, layer in layers.items():
        basis = in_metric_of_data(*layer.form.left_right(), seen[name], of_loss)
        seen[name].move(basis)
        layer.to_svd(basis.factors)
        assert (basis.carried.diff() <= 1e-12 * basis.carried[0]).all()
    for one, other in zip(before, data.outputs([x])[0], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    again = collect(data, layers, True, in_order)
    for name in layers:
        for moved, collected in ((seen[name].features, again[name].features), (seen[name].total, again[name].total)):
            assert torch.allclose(moved, collected, rtol=1e-7, atol=1e-9 * float(collected.abs().max()))


def test_no_other_layer_of_the_rank_does_better_on_the_data():
    torch.manual_seed(0)
    x = torch.randn(4000, 12, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    layers = begin(model, Recipe().plan(model))
    layers["0"].to_svd()
    data = CalibrationData(model, [x], 10_000)
    seen = collect(data, layers, False, in_order)
    W = layers["0"].form.matrix().detach()
    basis = in_metric_of_data(*layers["0"].form.left_right(), seen["0"], of_loss=False)

    def error(U, s, V, rank=3):
        return float((x @ (W - (U[:, :rank] * s[:rank]) @ V[:, :rank].T).T).square().sum())

    ours = error(*basis.factors)
    C = torch.linalg.cholesky(x.T @ x)
    U, s, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    best = error(U, s, torch.linalg.solve(C.T, Vh.T))
    assert ours <= 1.02 * best  # a hundredth of the metric is that of white inputs
    plain = torch.linalg.svd(W, full_matrices=False)
    assert ours < error(plain.U, plain.S, plain.Vh.T)
    for _ in range(50):
        Q = torch.linalg.qr(torch.randn(10, 3, dtype=torch.float64)).Q
        assert ours < error(Q, torch.ones(3, dtype=torch.float64), W.T @ Q)


def narrow_data(count=12):
    """Inputs in a subspace of a quarter of their dimensions, which weights know nothing of."""
    torch.manual_seed(1)
    mix = torch.randn(8, 32)
    return [torch.randn(32, 8) @ mix for _ in range(count)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 16)).eval()


def test_the_budget_is_met_in_plain_layers_and_the_original_stays():
    model, batches = mlp(), narrow_data()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, report = compress(model, batches, target_macs=0.5, progress=False, curve=True)
    assert count_costs(small, batches[0]).dense("macs") <= 0.5 * count_costs(model, batches[0]).dense("macs")
    assert report.ranks.macs_ratio <= 0.5
    assert {type(child).__module__.partition(".")[0] for child in small.modules()} == {"torch"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].weight.requires_grad
    assert model[2].weight.grad is None
    assert min(report.tried, key=report.tried.get) == report.choice != "spectrum"
    assert report.tried[report.choice] < 0.5 * report.tried["spectrum"]
    assert [*report.curve.values()] == sorted(report.curve.values())
    assert report.choice in str(report)
    assert '"choice"' in report.to_json()


def test_a_loss_says_what_matters():
    model, batches = mlp(), [(x, torch.randint(0, 16, (len(x),))) for x in narrow_data()]

    def loss(net, batch):
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    _, report = compress(model, batches, target_params=0.6, loss=loss, progress=False)
    assert report.measure == "increase of the loss"
    assert report.ranks.params_ratio <= 0.6


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([torch.randn(4, 31)], "fails for a batch"),
        ([torch.full((64, 32), torch.nan)], "NaN or infinity"),
    ],
)
def test_bad_batches_are_refused_and_the_model_is_as_it_was(batches, message):
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        compress(model, batches, inplace=True, progress=False)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_is_never_reached_is_left_with_the_reason():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(32, 32)

        def forward(self, x):
            return self.used(x)

    _, report = compress(Unused().eval(), narrow_data(), progress=False)
    assert ("unused", "Linear", "the calibration data never reaches it") in report.ranks.skipped
