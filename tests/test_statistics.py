"""What is known of ranks from data: sums are those of their definitions, and cuts by them are the best there are."""

import pytest
import torch
from helpers import factored, in_metric_of_data, svd_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from lightning_svd.compression.calibration import collect, collect_felt
from lightning_svd.compression.data import CalibrationData
from lightning_svd.layers.layer import watching
from lightning_svd.layers.matrices import reconstruct, roundoff, truncate
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import begin
from lightning_svd.model.targets import numbers_in
from lightning_svd.model.values import inputs_in
from lightning_svd.ranks.statistics import (
    Statistics,
    bases_of,
    features_of,
    sides,
    spectral_basis,
)

# torch's own, said once in a process, by whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
INPUTS, SEED = 4, 3


class First(nn.Module):
    """The first output of a recurrent module, and a layer after it, so that not all of it is the last."""

    def __init__(self, of, width, head=False):
        super().__init__()
        self.of, self.out = of, nn.Linear(width, 6) if head else nn.Identity()

    def forward(self, x):
        out = self.of(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.out(out.data if hasattr(out, "batch_sizes") else out)


class Looped(nn.Module):
    """A cell that is called once for each step, and a layer that is called twice."""

    def __init__(self, cell):
        super().__init__()
        self.cell, self.twice = cell, nn.Linear(6, 6)

    def forward(self, x):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        hidden = state[0] if isinstance(state, tuple) else state
        return self.twice(self.twice(hidden).relu())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.of = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.of(x, x, x)[0]


class Transformed(nn.Module):
    def __init__(self):
        super().__init__()
        self.of = pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 7)

    def forward(self, x):
        return self.of(x)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def images(channels, *sizes):
    return lambda: normal(INPUTS, channels, *sizes)


def sequences():
    return normal(INPUTS, 5, 6)


CASES = {
    "linear": (lambda: nn.Linear(8, 6), lambda: normal(INPUTS, 8), {}),
    "no bias": (lambda: nn.Linear(6, 8, bias=False), lambda: normal(INPUTS, 6), {}),
    "linear at positions": (lambda: nn.Linear(8, 6), lambda: normal(INPUTS, 3, 2, 8), {}),
    "linear by keyword": (lambda: nn.Linear(8, 6), lambda: {"input": normal(INPUTS, 8)}, {}),
    "written into": (
        lambda: nn.Sequential(nn.Linear(8, 9), nn.ReLU(inplace=True), nn.Linear(9, 6), nn.ReLU(inplace=True)),
        lambda: normal(INPUTS, 8),
        {},
    ),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), images(6, 9), {}),
    "conv2d": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(6, 8, (3, 2), stride=2, dilation=2)),
        images(4, 7, 8),
        {},
    ),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), images(4, 5, 6), {}),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), images(4, 5, 6), {}),
    "conv3d": (lambda: nn.Conv3d(3, 5, 2), images(3, 4, 3, 4), {}),
    "conv1d, spatial": (lambda: nn.Conv1d(6, 8, 3), images(6, 7), {"conv_mode": "spatial"}),
    "conv2d, spatial": (
        lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(0, 1)),
        images(4, 7, 6),
        {"conv_mode": "spatial"},
    ),
    "grouped, spatial": (lambda: nn.Conv2d(4, 6, 3, groups=2), images(4, 5, 6), {"conv_mode": "spatial"}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), images(4, 4, 3), {}),
    "transposed, spatial": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), images(4, 4, 3), {"conv_mode": "spatial"}),
    "transposed, grouped": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), images(4, 5), {}),
    "embedding": (
        lambda: nn.Embedding(12, 6, padding_idx=0),
        lambda: torch.randint(0, 12, (INPUTS, 3)),
        {"target_modules": ["Embedding"]},
    ),
    "Conv1D of transformers": (Transformed, lambda: normal(INPUTS, 3, 7), {}),
    "attention": (Attending, sequences, {}),
    "lstm": (lambda: First(nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True), 14, True), sequences, {}),
    "gru": (lambda: First(nn.GRU(6, 7, batch_first=True), 7), sequences, {}),
    "rnn": (lambda: First(nn.RNN(6, 7, 2, batch_first=True), 7), sequences, {}),
    "steps first": (lambda: First(nn.GRU(6, 7), 7), lambda: normal(5, INPUTS, 6), {}),
    "projected": (lambda: First(nn.LSTM(6, 7, proj_size=4, batch_first=True), 4), sequences, {}),
    "lstm cell": (lambda: Looped(nn.LSTMCell(6, 6)), sequences, {}),
    "gru cell": (lambda: Looped(nn.GRUCell(6, 6)), sequences, {}),
    "rnn cell": (lambda: Looped(nn.RNNCell(6, 6)), sequences, {}),
}


def plainly(items, text):
    return items


def begun(make, batch, options):
    """A model in evaluation whose layers are U, s and V, and its data of one batch."""
    torch.manual_seed(0)
    model = make().double().eval()
    layers = begin(model, plan(model, include_frozen=True, **options))
    for layer in layers.values():
        layer.to_svd()
    return layers, CalibrationData(model, [batch()], 10**9)


def noted(layers, data):
    """What each layer was given, and its output, in order, with gradients."""
    calls = {name: [] for name in layers}

    def watch(layer, x, out, bias):
        out = out + torch.zeros((), dtype=out.dtype).requires_grad_()
        calls[layer.svd_name].append((x.detach().clone(), out))
        return out.clone()  # which the model may write into

    with watching(layers.values(), watch):
        outputs = numbers_in(data.call(data.batches[0]))
    return calls, outputs


def drawn(outputs):
    """The noise that a collection with this seed draws."""
    generator = torch.Generator().manual_seed(SEED)
    return [
        torch.randn(out.shape, generator=generator).to(out) / out.detach().square().mean().sqrt() for out in outputs
    ]


def by_group(layer, matrices):
    """Matrices (n, r) for each group."""
    return matrices if layer.view.groups > 1 else matrices.unsqueeze(0)


def unfolded(layer, x):
    """A convolution's inputs as the columns that the first of two plain layers multiplies, (groups, positions, n)."""
    _, right = layer.form.left_right()
    first = layer.view.apply_first(x, right)
    # By a unit matrix in the place of R: the entries of x themselves.
    units = torch.eye(right.shape[-2], dtype=x.dtype)
    units = units.expand(layer.view.groups, -1, -1) if layer.view.groups > 1 else units
    columns = layer.view.apply_first(x, units)
    assert columns.shape[2:] == first.shape[2:]
    groups = layer.view.groups
    return columns.movedim(1, -1).reshape(-1, groups, columns.shape[1] // groups).movedim(1, 0)


def columns(layer, x):
    """The layer's inputs as (groups, positions, n), one row for what one application of R sees."""
    if layer.view.kernel:
        return unfolded(layer, x)
    if layer.view.layer_type is nn.Embedding:
        return nn.functional.one_hot(x, layer.view.inputs).double().reshape(1, -1, layer.view.inputs)
    return x.reshape(1, -1, x.shape[-1])


def close(actual, expected, tolerance=1e-10):
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance * max(1e-300, float(expected.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_what_the_ranks_see(case):
    layers, data = begun(*CASES[case])
    seen = collect(data, layers, True, plainly, SEED)
    calls, outputs = noted(layers, data)
    flat = [out for of in calls.values() for _, out in of]
    back = torch.autograd.grad(outputs, flat, drawn(outputs), allow_unused=True)
    gradients = dict(zip(map(id, flat), back, strict=True))
    for name, layer in layers.items():
        left, right = (by_group(layer, factor.detach()) for factor in layer.form.left_right())
        rows = torch.cat([columns(layer, x) for x, _ in calls[name]], 1)
        features = rows @ right
        assert seen[name].inputs == inputs_in(data.batches[0])
        assert seen[name].positions == features.shape[1]
        close(seen[name].features, features.mT @ features)
        close(seen[name].total, features.sum(1), 1e-8)
        if not layer.view.output_is_product:
            continue  # its second layer is a convolution; the test of scores looks at it
        groups, m = layer.view.groups, layer.matrix_shape[0]
        found = [gradients[id(out)] for _, out in calls[name] if gradients[id(out)] is not None]
        if layer.view.kernel:
            found = [gradient.movedim(1, -1) for gradient in found]
        if not found:  # the last step of a sequence backwards
            assert float(seen[name].gradients.abs().max()) == 0
            continue
        backs = torch.cat([each.reshape(-1, groups, m).movedim(1, 0) for each in found], 1) @ left
        close(seen[name].gradients, backs.mT @ backs)


@pytest.mark.parametrize("case", [case for case in CASES if case != "steps first"])  # whose first dimension is steps
def test_scores_are_derivatives_by_the_ranks_scales_of_each_input(case):
    layers, data = begun(*CASES[case])
    seen = collect(data, layers, True, plainly, SEED)
    scales = [layer.form.parameters["s"] for layer in layers.values()]
    outputs = numbers_in(data.call(data.batches[0]))
    by_input = []
    for index in range(INPUTS):
        alone = [torch.zeros_like(out) for out in outputs]
        for mine, gradient in zip(alone, drawn(outputs), strict=True):
            mine[index] = gradient[index]
        found = torch.autograd.grad(outputs, scales, alone, retain_graph=True, allow_unused=True)
        by_input.append([g if g is not None else torch.zeros_like(s) for g, s in zip(found, scales, strict=True)])
    for (name, layer), scale, *gradients in zip(layers.items(), scales, *by_input, strict=True):
        scores = torch.stack([(scale * gradient).detach() for gradient in gradients])
        scores = scores.sum(1) if layer.view.groups > 1 else scores
        close(seen[name].squares, scores.square().sum(0))
        tails = torch.stack([scores[:, rank:].sum(1).square().sum() for rank in range(layer.rank)])
        close(seen[name].tails, tails)
        assert (seen[name].felt() >= 0).all()


@pytest.mark.parametrize("of_loss", [False, True], ids=["outputs", "loss"])
@pytest.mark.parametrize("case", CASES)
def test_other_factors_change_nothing(case, of_loss):
    layers, data = begun(*CASES[case])
    before = numbers_in(data.call(data.batches[0]))
    seen = collect(data, layers, True, plainly, SEED)
    for name, layer in layers.items():
        basis = in_metric_of_data(*layer.form.left_right(), seen[name], of_loss)
        layer.to_svd(basis.factors)
        U, _, V = basis.factors
        assert (basis.carried.diff() <= 1e-12 * basis.carried[0]).all()
        for factor in (U, V):
            lengths = torch.linalg.vector_norm(factor, dim=-2)
            torch.testing.assert_close(lengths, torch.ones_like(lengths))
    for one, other in zip(before, numbers_in(data.call(data.batches[0])), strict=True):
        close(other, one, 1e-9)


def test_sequences_of_several_lengths_are_seen_at_all_their_steps():
    batch = pack_sequence([normal(length, 6) for length in (5, 3, 3, 1)])
    layers, data = begun(lambda: First(nn.LSTM(6, 7, bidirectional=True), 14), lambda: (batch,), {})
    seen = collect(data, layers, True, plainly, SEED)
    steps = int(batch.batch_sizes.sum())
    assert {name: each.positions for name, each in seen.items()} == dict.fromkeys(layers, steps)
    features = batch.data @ layers["of.ih_l0"].form.left_right()[1].detach()
    close(seen["of.ih_l0"].features, (features.mT @ features).unsqueeze(0))
    assert all(torch.isfinite(each.felt()).all() for each in seen.values())


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_collection_leaves_gradients_on_or_off_as_they_were(with_gradients, enabled):
    layers, data = begun(*CASES["linear"])
    with torch.set_grad_enabled(enabled):
        seen = collect(data, layers, with_gradients, plainly)
        assert torch.is_grad_enabled() is enabled
    assert (seen[""].gradients is None) is not with_gradients


# ----------------------------------------------------------------------------------------------------- the best cut


def seen_of(layer, x, gradient=None):
    statistics = Statistics(layer, gradient is not None)
    between = features_of(layer, x)
    statistics.see(layer, between)
    if gradient is not None:
        statistics.see_gradient(layer, between, gradient, len(x))
    statistics.end_batch(len(x))
    return statistics


def cut(layer, basis, rank):
    return reconstruct(*truncate(basis.factors, rank)).detach()


sizes = st.integers(2, 12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(outputs=sizes, inputs=sizes, rank=st.integers(1, 11), seed=st.integers(0, 10**6), decay=st.floats(0.3, 1))
@pytest.mark.parametrize("shrinkage", [False, True], ids=["of the very data", "as it is"])
def test_no_matrix_of_the_rank_is_nearer_on_the_data(shrinkage, outputs, inputs, rank, seed, decay):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, outputs, inputs)
    layer = svd_of(nn.Linear(inputs, outputs).double())
    x = torch.randn(4096, inputs, generator=generator, dtype=torch.float64)
    x = x * decay ** torch.arange(inputs) @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        if not shrinkage:
            patch.setattr("lightning_svd.ranks.statistics._shrunk", lambda moments, *_: moments)
        basis = in_metric_of_data(*layer.form.left_right(), seen_of(layer, x), False)
    weight = layer.rebuilt().detach()

    def error(approximation):
        return float((x @ (weight - approximation).mT).square().sum())

    total, ours = error(torch.zeros_like(weight)), error(cut(layer, basis, rank))
    # What is nearest is known in closed form: the outputs' leading directions.
    directions = torch.linalg.svd(x @ weight.mT, full_matrices=False)[2][:rank]
    best = error(directions.mT @ directions @ weight)
    blind = error(reconstruct(*truncate(layer.factors(), rank)).detach())
    span = torch.linalg.qr(torch.randn(outputs, rank, generator=generator, dtype=torch.float64))[0]
    other = error(span @ span.mT @ weight)
    # Mixed with white inputs it is the best by a mixture with the blind error, of which no cut has less than the SVD.
    assert ours <= blind + 1e-9 * total
    if not shrinkage:
        assert all(ours <= each + 1e-9 * total for each in (best, other))
        assert float(basis.carried[rank:].sum()) * len(x) == pytest.approx(ours, rel=1e-6, abs=1e-8 * total)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 5))
def test_what_is_lost_by_the_measure_of_a_loss_is_the_least(seed, rank):
    generator = torch.Generator().manual_seed(seed)
    layer = svd_of(nn.Linear(9, 6).double())
    x, gradient = (torch.randn(64, width, generator=generator, dtype=torch.float64) for width in (9, 6))
    seen = seen_of(layer, x, gradient)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_svd.ranks.statistics._shrunk", lambda moments, *_: moments)
        basis = in_metric_of_data(*layer.form.left_right(), seen, True)
    left, right = (factor.detach() for factor in layer.form.left_right())
    features, costs = seen.features[0] / 64, seen.gradients[0] / 64

    def cost(error):  # of the matrix, as an error of the features
        inner = torch.linalg.pinv(left) @ error @ torch.linalg.pinv(right.mT)
        return float((costs @ inner @ features @ inner.mT).trace())

    weight = layer.rebuilt().detach()
    ours = cost(weight - cut(layer, basis, rank))
    torch.testing.assert_close(ours, float(basis.carried[rank:].sum()), rtol=1e-6, atol=1e-12)
    span = torch.linalg.qr(torch.randn(6, rank, generator=generator, dtype=torch.float64))[0]
    for other in (reconstruct(*truncate(layer.factors(), rank)).detach(), span @ span.mT @ weight):
        assert ours <= cost(weight - other) * (1 + 1e-9)


@pytest.mark.parametrize("of_loss", [False, True], ids=["outputs", "loss"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_inputs_leave_the_order_near_that_of_the_weights(count, of_loss):
    layer = svd_of(nn.Linear(24, 20).double())
    weight, blind = layer.rebuilt().detach(), layer.factors().s.square().detach()
    seen = seen_of(layer, normal(count, 24), normal(count, 20))
    basis = in_metric_of_data(*layer.form.left_right(), seen, of_loss)
    assert all(torch.isfinite(factor).all() for factor in basis.factors)
    close(reconstruct(*basis.factors), weight, 1e-9)
    kept = cut(layer, basis, 10)
    lost = float((weight - kept).square().sum())
    assert lost <= 1.5 * float(blind[10:].sum()) and lost <= 0.6 * float(blind.sum())


def degenerate(what):
    layer = nn.Linear(7, 5).double()
    x, gradient = normal(32, 7), normal(32, 5)
    if what == "weights":
        nn.init.zeros_(layer.weight)
    if what == "inputs":
        x = torch.zeros_like(x)
    if what == "gradients":
        gradient = torch.zeros_like(gradient)
    if what == "one output":
        with torch.no_grad():
            layer.weight[1:] = 0
    return layer, x, gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("of_loss", [False, True], ids=["outputs", "loss"])
@pytest.mark.parametrize("what", ["weights", "inputs", "gradients", "one output"])
def test_zeros_are_no_trouble(what, of_loss, dtype):
    layer, x, gradient = degenerate(what)
    layer = svd_of(layer.to(dtype))
    weight, spectrum = layer.rebuilt().detach(), layer.factors().s.detach()
    seen = seen_of(layer, x.to(dtype), gradient.to(dtype))
    basis = in_metric_of_data(*layer.form.left_right(), seen, of_loss)
    assert all(torch.isfinite(factor).all() for factor in (*basis.factors, basis.carried))
    assert (reconstruct(*basis.factors) - weight).abs().max() <= 1e-5
    if what in ("weights", "inputs") or (what == "gradients" and of_loss):
        assert float(basis.carried.max()) <= 1e-30
    if what == "inputs" and not of_loss:  # of which the weights' own order is left
        torch.testing.assert_close(basis.factors.s, spectrum)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)], ids=["wide", "tall"])
@pytest.mark.parametrize("of_loss", [False, True], ids=["outputs", "loss"])
@pytest.mark.parametrize("what", ["weights", "inputs", "gradients"])
def test_zeros_are_no_trouble_of_a_dense_weight_in_float32(what, of_loss, shape):
    outputs, inputs = shape
    dense = nn.Linear(inputs, outputs)
    x, gradient = torch.randn(32, inputs), torch.randn(32, outputs)
    for name, tensor in (("weights", dense.weight.data), ("inputs", x), ("gradients", gradient)):
        tensor.mul_(name != what)
    layer = svd_of(dense)
    layer.to_dense()
    basis = in_metric_of_data(*sides(layer, layer.form.weight()), seen_of(layer, x, gradient), of_loss)
    assert all(torch.isfinite(factor).all() for factor in (*basis.factors, basis.carried))
    assert (reconstruct(*basis.factors) - layer.rebuilt()).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    layer = svd_of(nn.Linear(16, 12).to(dtype))
    x, gradient = (300 * torch.randn(64, width) for width in (16, 12))  # sums of squares are beyond float16
    seen = seen_of(layer, x.to(dtype), gradient.to(dtype))
    _, right = layer.form.left_right()
    features = x.to(dtype).double() @ right.detach().double()
    close(seen.features[0].double(), features.mT @ features, 1e-5)
    sums = (seen.total, seen.features, seen.squares, seen.tails, seen.gradients)
    assert {each.dtype for each in sums} == {torch.float32}
    basis = in_metric_of_data(*layer.form.left_right(), seen, True)
    before = factored(layer, x.to(dtype)).float().detach()
    layer.to_svd(basis.factors)
    assert layer.form.parameters["U"].dtype == dtype
    close(factored(layer, x.to(dtype)).float().detach(), before, 0.05)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_by_the_layers_name(bad):
    layer = svd_of(nn.Linear(4, 3), name="body.first")
    x = torch.zeros(2, 4)
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"`body\.first`: NaN or infinity in what it is given"):
        seen_of(layer, x)
    with pytest.raises(ValueError, match=r"`body\.first`: NaN or infinity among the gradients"):
        seen_of(layer, torch.ones(2, 4), torch.full((2, 3), bad))


# ------------------------------------------------------------------------------- layers that train their dense weight


def begun_dense(make, batch, options):
    """As :func:`begun`, with layers that train their dense weight still."""
    torch.manual_seed(0)
    model = make().double().eval()
    layers = begin(model, plan(model, include_frozen=True, **options))
    return layers, CalibrationData(model, [batch()], 10**9)


@pytest.mark.parametrize("case", CASES)
def test_dense_layers_say_of_other_ranks_what_these_say_themselves(case):
    layers, data = begun_dense(*CASES[case])
    before = numbers_in(data.call(data.batches[0]))
    seen = collect(data, layers, True, plainly, SEED)
    weights = {name: layer.form.weight().detach().clone() for name, layer in layers.items()}
    bases = {}
    for name, layer in layers.items():
        left, right = sides(layer, weights[name])
        data_bases = bases_of(left, right, seen[name], (False, True))
        bases[name] = [*data_bases, spectral_basis(left, right)]
    felt = collect_felt(data, layers, bases, plainly, SEED)
    for number in range(3):
        for name, layer in layers.items():
            layer.to_svd(bases[name][number].factors(*sides(layer, weights[name]), layer.full_rank))
        for one, other in zip(before, numbers_in(data.call(data.batches[0])), strict=True):
            close(other, one, 1e-9)
        again = collect(data, layers, True, plainly, SEED)
        for name, layer in layers.items():
            size = float(again[name].felt().abs().max())
            assert float((felt[name][number] - again[name].felt()).abs().max()) <= 1e-8 * size + 1e-300
            if number < 2:
                ours = in_metric_of_data(*layer.form.left_right(), again[name], number == 1)
                close(ours.carried, bases[name][number].carried, 1e-4)  # what the least directions say is bounded
        for name, layer in layers.items():
            layer.to_dense(weights[name])


@pytest.mark.parametrize("of_loss", [False, True], ids=["outputs", "loss"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48)], ids=["wide", "tall"])
@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_float32_finds_what_float64_does(shape, condition, of_loss):
    torch.manual_seed(0)
    m, n = shape
    rank = min(shape)
    U, V = (torch.linalg.qr(normal(size, rank))[0] for size in shape)
    weight = (U * condition ** -torch.linspace(0, 1, rank, dtype=torch.float64)) @ V.mT
    x = normal(512, n) * 0.9 ** torch.arange(n) @ normal(n, n)
    gradient = normal(512, m) * 0.95 ** torch.arange(m)
    lost = {}
    for dtype in (torch.float64, torch.float32):
        layer = begin(module := nn.Linear(n, m).to(dtype), plan(module))[""]
        with torch.no_grad():
            layer.form.weight().copy_(weight)
        given = layer.form.weight().detach().clone()
        seen = seen_of(layer, x.to(dtype), gradient.to(dtype))
        (basis,) = bases_of(*sides(layer, given), seen, (of_loss,))
        whole, half = (reconstruct(*basis.factors(*sides(layer, given), k)).double() for k in (rank, rank // 4))
        close(whole, given.double(), roundoff(shape, dtype))
        lost[dtype] = float((x @ (weight - half).mT).square().sum())
        if of_loss:
            moments = gradient.mT @ gradient
            error = weight - half
            lost[dtype] = float((moments @ error @ (x.mT @ x) @ error.mT).trace())
    assert lost[torch.float32] == pytest.approx(lost[torch.float64], rel=0.02)
