"""Trained models made smaller without training: budgets are met, little is lost, and nothing else is touched."""

import copy
import functools
import json
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import counted_macs
from models import same_state
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_svd import CompressionReport, compress, to_dense, to_factored
from lightning_svd.compression import compress as compress_module
from lightning_svd.layers.layer import FactorizedModule, SVDLayer
from lightning_svd.layers.parts import InParts


class Norms(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.of = nn.LSTM(10, 16, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.of(x)[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.of = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens):
        return self.head(self.of(self.embedding(tokens)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(inplace=True), nn.Linear(20, 6))


def vectors(count=16, size=8, width=16):
    """Batches of inputs in a few directions, as those of real data are."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(4, width, generator=generator)
    noise = [0.1 * torch.randn(size, width, generator=generator) for _ in range(count)]
    return [torch.randn(size, 4, generator=generator) @ directions + each for each in noise]


def tokens():
    return list(torch.randint(0, 30, (4, 8, 7), generator=torch.Generator().manual_seed(1)).unbind())


def random(*shape):
    return list(torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).unbind())


MODELS = {
    "mlp": (mlp, vectors),
    "conv": (Norms, lambda: random(8, 3, 9, 9)),
    "lstm": (Recurrent, lambda: random(8, 6, 10)),
    "encoder": (Encoder, tokens),
    "a layer": (lambda: nn.Linear(16, 20), vectors),
}


def trained(make=mlp):
    """A model that is in training mode, has running statistics, and weights that are not those of its start."""
    torch.manual_seed(0)
    model, batches = make(), next(batches() for each, batches in MODELS.values() if each is make)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    targets = torch.randn(len(batches[0]), 5 if make is not mlp else 6)
    for batch in batches:
        optimizer.zero_grad()
        F.mse_loss(model(batch), targets).backward()
        optimizer.step()
    return model, batches


def quietly(model, batches, **options):
    return compress(model, batches, **({"progress": False} | options))


def plain(module):
    """Whether all of it is plain torch, but for what attention and recurrent modules become that have pairs in them."""
    kinds = (FactorizedModule, SVDLayer)
    parameters = all(type(parameter) is nn.Parameter for parameter in module.parameters())
    return parameters and not any(isinstance(child, kinds) for child in module.modules())


# -------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("target", ["target_macs", "target_params"])
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_is_met_by_plain_layers_and_the_users_model_is_as_it_was(name, target):
    make, batches = MODELS[name]
    torch.manual_seed(0)
    model, batches = make().eval(), batches()
    before = copy.deepcopy(model.state_dict())
    small, report = quietly(model, batches, **{target: 0.6})
    assert same_state(model.state_dict(), before) and plain(model) and small is not model
    assert plain(small) and not small.training
    found = [type(child) for child in small.modules() if type(child).__module__.startswith("lightning_svd")]
    assert all(issubclass(kind, InParts) for kind in found)
    counts = [sum(p.numel() for p in each.parameters()) for each in (small, model)]
    assert report.ranks.params == counts[0] and report.ranks.dense_params == counts[1]
    if target == "target_params":
        assert counts[0] <= 0.6 * counts[1]
    elif name in ("mlp", "conv", "a layer"):
        assert counted_macs(small, batches[0]) <= 0.6 * counted_macs(model, batches[0])
        assert report.ranks.macs * len(batches[0]) == counted_macs(small, batches[0])
    assert report.ranks.macs_ratio <= 0.6 or target == "target_params"
    assert report.share == 0.6 and report.target == target.removeprefix("target_")
    held_out = batches[-max(1, round(len(batches) / 4)) :]
    with torch.no_grad():
        pairs = [(model(batch), small(batch)) for batch in held_out]
    apart = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    assert report.distance == pytest.approx(float(apart), rel=1e-2, abs=1e-6)
    assert report.distance < 1 and report.tried[report.choice] == min(report.tried.values())


def test_the_model_itself_is_changed_where_that_is_asked_for():
    model, batches = trained()
    twin, layers = copy.deepcopy(model), list(model)
    small, report = quietly(model, batches, inplace=True)
    assert small is model and list(small) == layers and small.training
    other, twins = quietly(twin, batches)
    assert same_state(small.state_dict(), other.state_dict())
    assert twins.distance == report.distance and twins.tried == report.tried


def test_the_same_seed_gives_the_same_model_and_another_one_asks_otherwise():
    model, batches = trained()
    outcomes = [quietly(model, batches, seed=seed)[1].tried for seed in (0, 0, 1)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != outcomes[2] and outcomes[0]["spectrum"] == outcomes[2]["spectrum"]


def test_data_of_few_directions_is_kept_where_the_weights_alone_would_lose_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    inputs = [torch.randn(16, 3) @ torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) for _ in range(8)]
    distances = {
        way: quietly(model, inputs, target_macs=0.4, importance=way)[1].distance
        for way in ("spectrum", "outputs", "fisher", "auto")
    }
    assert distances["outputs"] < 1e-3 < 0.1 * distances["spectrum"]
    assert distances["fisher"] < 1e-3
    assert distances["auto"] <= min(distances["outputs"], distances["fisher"]) * (1 + 1e-3)


def test_each_way_tries_what_it_says():
    model, batches = trained()
    felt = ", ranks by what the loss feels"
    expected = {
        "spectrum": {"spectrum"},
        "outputs": {"outputs"},
        "fisher": {"fisher", f"fisher{felt}"},
        "auto": {"spectrum", "outputs", f"outputs{felt}", "fisher", f"fisher{felt}"},
    }
    for way, labels in expected.items():
        _, report = quietly(model, batches, importance=way)
        assert set(report.tried) == labels
        assert report.choice == min(report.tried, key=report.tried.get)


def test_layers_that_stay_dense_keep_the_very_values():
    model, batches = trained()
    small, report = quietly(model, batches, target_macs=0.8, importance="outputs", correct_bias=False)
    dense = [layer.name for layer in report.ranks.layers if layer.form == "dense"]
    assert dense and len(dense) < len(report.ranks.layers)
    for name in dense:
        assert torch.equal(small.get_submodule(name).weight, model.get_submodule(name).weight)
        assert torch.equal(small.get_submodule(name).bias, model.get_submodule(name).bias)


def test_a_bound_that_saves_nothing_leaves_the_layer_whole():
    model, batches = trained()
    small, report = quietly(model, batches, target_macs=0.9, rank_pattern={"0": 12}, correct_bias=True)  # of 9 that pay
    (first, *_) = report.ranks.layers
    if first.form == "dense":
        assert first.rank == 16
        assert torch.equal(small[0].weight, model[0].weight) and torch.equal(small[0].bias, model[0].bias)


# ------------------------------------------------------------------------------------------------ batches and losses


@pytest.mark.parametrize("kind", ["tuples", "lists", "dicts", "generator", "loader", "one batch"])
def test_batches_come_in_many_forms(kind):
    model, batches = trained()
    if kind == "dicts":
        model = Keyword(model)
    forms = {
        "tuples": [(batch,) for batch in batches],
        "lists": [[batch] for batch in batches],
        "dicts": [{"x": batch} for batch in batches],
        "generator": (batch for batch in batches),
        "loader": DataLoader(TensorDataset(torch.cat(batches)), 8),
        "one batch": [torch.cat(batches)],
    }
    _, report = quietly(model, forms[kind])
    expected = quietly(model, [{"x": batch} for batch in batches] if kind == "dicts" else batches)[1]
    if kind == "one batch":
        assert report.inputs == sum(map(len, batches))  # and is judged on it too
    else:
        assert report.distance == expected.distance and report.inputs == expected.inputs == 96


class Keyword(nn.Module):
    """Layers whose input arrives by keyword."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, *, x):
        for layer in self.layers:
            x = layer(input=x)
        return x


def test_no_more_batches_are_taken_than_are_needed():
    model, batches = trained()
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield batches[0]

    _, report = quietly(model, endless(), inputs=33)
    assert len(taken) == 5 and report.inputs == 32  # the last one is held out


def test_a_loss_of_the_users_says_what_matters():
    model, batches = trained()
    labels = [model(batch).argmax(-1) for batch in batches]

    def loss(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y)

    small, report = quietly(model, zip(batches, labels, strict=True), loss=loss)
    assert report.measure == "increase of the loss"
    held_out = list(zip(batches, labels, strict=True))[12:]
    with torch.no_grad():
        more = sum(float(loss(small, batch) - loss(model, batch)) for batch in held_out) / len(held_out)
    assert report.distance == pytest.approx(more, rel=1e-2, abs=1e-4)
    with pytest.raises(ValueError, match=r"`loss\(model, batch\)` fails for a batch of `batches`: TypeError: no"):
        quietly(model, batches, loss=refusing)
    with pytest.raises(ValueError, match=r"`loss\(model, batch\)` must return a tensor with fractions, got float"):
        quietly(model, batches, loss=lambda model, batch: float(model(batch).sum()))


def refusing(model, batch):
    raise TypeError("no")


def test_a_language_models_logits_are_compared_as_distributions():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in tokens()]
    small, report = quietly(model, batches, target_macs=0.7)
    assert report.measure == "Kullback-Leibler divergence" and report.ranks.macs_ratio <= 0.7
    assert small.transformer.wte.weight is small.lm_head.weight
    assert reasons(report)["lm_head"] == "weight tied to another module's"
    with torch.no_grad():
        one, other = (each(**batches[-1]).logits.log_softmax(-1) for each in (model, small))
    expected = float((one.exp() * (one - other)).sum(-1).mean())
    assert report.distance == pytest.approx(expected, rel=1e-2, abs=1e-6)


class Logits(nn.Module):
    """What puts out an object with logits."""

    def __init__(self, body, change=lambda logits: logits):
        super().__init__()
        self.body, self.change = body, change

    def forward(self, x):
        return Output(self.change(self.body(x)))


class Output:
    def __init__(self, logits):
        self.logits = logits


def first_only(logits):
    return logits[:, :1]


def as_maps(logits):
    return logits.view(*logits.shape, 1, 1)


def masked(logits):
    return torch.cat([logits[:, :-1], torch.full_like(logits[:, -1:], -torch.inf)], -1)


@pytest.mark.parametrize("change", [first_only, as_maps], ids=["one number", "maps"])
def test_logits_that_are_no_distribution_are_compared_as_numbers(change):
    _, report = quietly(Logits(trained()[0], change), vectors())
    assert report.measure == "relative squared error" and 0 < report.distance < 1


def test_classes_that_are_ruled_out_do_not_count():
    _, report = quietly(Logits(trained()[0], masked), vectors())
    assert report.measure == "Kullback-Leibler divergence"
    assert all(0 < distance < 1 for distance in report.tried.values())


class Indices(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x).argmax(-1)


class OnlyWithoutGradients(nn.Module):
    """What torch refuses to differentiate."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        one, other = self.body(x).unbind(-1)[:2]
        one.relu_()
        return torch.stack([one, other])


class NotDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no derivative of this")


class WithoutDerivative(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return NotDifferentiable.apply(self.body(x))


@pytest.mark.parametrize("kind", [Indices, OnlyWithoutGradients, WithoutDerivative])
def test_without_gradients_outputs_say_what_matters(kind):
    model = kind(trained()[0])
    _, report = quietly(model, vectors())
    assert set(report.tried) == {"spectrum", "outputs"}
    assert quietly(model, vectors(), importance="outputs")[1].choice == "outputs"
    message = "fails for a batch" if kind is OnlyWithoutGradients else "give `importance='outputs'`, which needs none"
    with pytest.raises(ValueError, match=message):
        quietly(model, vectors(), importance="fisher")


def test_whole_numbers_are_compared_by_how_many_changed():
    model = Indices(trained()[0])
    small, report = quietly(model, vectors())
    assert report.measure == "share of outputs that changed"
    changed = torch.cat([model(batch) != small(batch) for batch in vectors()[12:]])
    assert report.distance == pytest.approx(float(changed.float().mean()), abs=0.04)


# -------------------------------------------------------------------------------------------------- nothing touched


def counted(module, args):
    module.calls.add_(1 + 0 * torch.rand(()))


@pytest.mark.parametrize("reconstruct", [0, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_modes_randomness_gradients_hooks_and_buffers_are_the_users(inplace, reconstruct):
    model, batches = trained(Norms)
    model.body[1].eval()
    model.register_buffer("calls", torch.zeros(()))
    seen = []
    model.register_forward_pre_hook(counted)
    handle = model.body[0].register_forward_hook(lambda *_: seen.append(1) and None)
    model.head.weight.requires_grad_(False)
    hooks, gradients = dict(model.body[0]._forward_hooks), {n: p.grad.clone() for n, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    modes = [child.training for child in model.modules()]
    small, report = quietly(
        model, batches, inplace=inplace, target_macs=0.7, recalibrate=False, reconstruct=reconstruct
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert float(model.calls) == float(small.calls) == 0
    assert small.training and not small.body[1].training and small.body[0].training
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in small.named_parameters() if name.startswith("head") and "bias" not in name}
    assert "head" in {layer.name for layer in report.ranks.layers}
    if not inplace:
        assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())
        assert [child.training for child in model.modules()] == modes
        assert dict(model.body[0]._forward_hooks) == hooks and not model.head.weight.requires_grad
    kept = {name: p for name, p in small.named_parameters() if name in gradients}  # others are of pairs
    assert {"head.weight", "head.bias"} <= kept.keys()
    for name, parameter in kept.items():
        assert not inplace or torch.equal(parameter.grad, gradients[name])
    assert not seen and handle


@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("make", [Norms, Recurrent, mlp])
def test_reconstruction_brings_outputs_nearer_and_keeps_the_best(make, with_loss):
    model, batches = trained(make)
    arguments = {"target_macs": 0.35, "importance": "outputs"}
    if with_loss:
        arguments["loss"] = lambda model, x: model(x).square().mean()
    without, before = quietly(model, batches, **arguments)
    small, after = quietly(model, batches, reconstruct=40, **arguments)
    assert not before.reconstructed and after.reconstructed and after.distance < before.distance
    assert {n: p.shape for n, p in small.named_parameters()} == {n: p.shape for n, p in without.named_parameters()}
    assert plain(small) and all(p.requires_grad for p in small.parameters())
    # What is worse on what is held out is not kept.
    step = quietly(model, batches, reconstruct=1, **arguments)[1]
    assert step.reconstructed or step.distance == pytest.approx(before.distance, rel=1e-5)  # the same but for rounding
    assert not step.reconstructed or step.distance < before.distance


CONTEXTS = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_callers_context_does_not_matter(context, inplace):
    model, batches = trained(Norms)
    expected = quietly(model, batches)[1]
    with CONTEXTS[context]():
        given = [batch.clone() for batch in batches]  # inference tensors in one of them
        small, report = quietly(model, given, inplace=inplace)
    assert report.tried == expected.tried and report.distance == expected.distance
    small(batches[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def failing_layer(where):
    def fail(module, args):
        raise RuntimeError("not this")

    where.register_forward_pre_hook(fail)


def spoiled(batches, value):
    first = batches[0].clone()
    first[0, 3] = value
    return [first, *batches[1:]]


BAD_BATCHES = {
    "none": (lambda batches: [], "`batches` must hold at least one batch of inputs, got none", {}),
    "of another shape": (lambda batches: [torch.zeros(4, 5)], "the model fails for a batch of `batches`", {}),
    "with labels": (
        lambda batches: [(batch, torch.zeros(len(batch))) for batch in batches],
        "of a loader of inputs and labels give the inputs",
        {},
    ),
    "NaN": (lambda batches: spoiled(batches, torch.nan), "`0`: NaN or infinity in what it is given", {}),
    "infinity": (lambda batches: spoiled(batches, torch.inf), "`0`: NaN or infinity in what it is given", {}),
    "NaN held out": (lambda batches: [batches[0], torch.full_like(batches[1], torch.nan)], "are NaN or infinite", {}),
    "NaN for weights alone": (
        lambda batches: [torch.full_like(batches[0], torch.nan)],
        "are NaN or infinite",
        {"importance": "spectrum"},
    ),
    "a budget too small": (lambda batches: batches, "`target_macs` must be at least 0.1", {"target_macs": 0.02}),
    "a share": (lambda batches: batches, "`target_params` must be", {"target_params": 1.5}),
    "a way": (lambda batches: batches, "`importance` must be one of", {"importance": "magic"}),
    "a flag": (lambda batches: batches, "`correct_bias` must be True or False, got 3", {"correct_bias": 3}),
    "a name": (lambda batches: batches, "matches no layer", {"target_modules": ["nothing"]}),
}


def as_it_was(model, before, gradients, kinds):
    assert [type(child) for child in model.modules()] == kinds and plain(model)
    assert same_state(model.state_dict(), before)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    model(vectors()[0]).sum().backward()


def noted(model):
    kinds = [type(child) for child in model.modules()]
    return copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], kinds


class Locked(nn.Module):
    """What cannot be copied."""

    def __init__(self, body):
        super().__init__()
        self.body, self.lock = body, threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.body(x)


def test_a_model_that_cannot_be_copied_is_refused_and_can_be_changed_itself():
    model = Locked(trained()[0])
    why = "`compress` changes a copy of Locked, which cannot be copied .*lock.*: give `inplace=True`"
    with pytest.raises(ValueError, match=why):
        quietly(model, vectors())
    assert quietly(model, vectors(), inplace=True)[1].ranks.macs_ratio <= 0.5


@pytest.mark.parametrize("make", [to_dense, to_factored])
def test_so_is_one_that_another_function_has_to_copy(make):
    with pytest.raises(ValueError, match=f"`{make.__name__}` .* a copy of Locked, which cannot be copied"):
        make(Locked(trained()[0]))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", [nn.LazyLinear, nn.LazyBatchNorm1d], ids=["weights", "statistics"])
def test_a_model_that_was_never_called_is_told_to_be(layer, inplace):
    model = nn.Sequential(trained()[0], layer(*([4] if layer is nn.LazyLinear else [])))
    with pytest.raises(ValueError, match=r"`model` has a layer without weights yet, `1.weight`: call it once"):
        quietly(model, vectors(), inplace=inplace)
    model(vectors()[0])
    assert quietly(model, vectors(), inplace=inplace)[1].ranks.macs_ratio <= 0.5


class Also(nn.Module):
    """Puts out something else beside what its body does."""

    def __init__(self, body, also):
        super().__init__()
        self.body, self.also = body, also

    def forward(self, x):
        y = self.body(x)
        return y, self.also(y)


def test_an_output_of_zeros_does_not_spoil_what_others_say():
    model = Also(trained()[0], torch.zeros_like)
    _, expected = quietly(model, vectors(), importance="fisher")  # those have no gradient
    _, report = quietly(Also(trained()[0], lambda y: 0 * y), vectors(), importance="fisher")
    assert report.tried == pytest.approx(expected.tried, rel=0.2)  # other noise is drawn


@pytest.mark.parametrize(
    ("also", "kind"),
    [
        (lambda y: y.relu().to_sparse(), "torch.sparse_coo"),
        (lambda y: torch.nested.as_nested_tensor(y), "nested tensors"),
    ],
    ids=["sparse", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_outputs_that_are_no_plain_tensors_are_refused(also, kind):
    with pytest.raises(ValueError, match=f"the model must put out plain tensors, got one of {kind}, torch.float32"):
        quietly(Also(trained()[0], also), vectors())


def test_a_loss_of_whole_numbers_is_refused_for_what_it_is():
    why = r"`loss\(model, batch\)` must return a tensor with fractions, got one of torch.strided, torch.int64"
    with pytest.raises(ValueError, match=why):
        quietly(trained()[0], vectors(), loss=lambda model, x: model(x).argmax(1).sum())


@pytest.mark.parametrize("at", [0, 3, 16], ids=["first", "between", "last"])
def test_a_batch_without_inputs_is_passed_over(at):
    model, batches = trained()
    _, report = quietly(model, [*batches[:at], batches[0][:0], *batches[at:]])
    assert report.tried == quietly(model, batches)[1].tried


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_an_error_leaves_the_model_as_it_was(case):
    change, message, options = BAD_BATCHES[case]
    model, batches = trained()
    before = noted(model)
    with pytest.raises(ValueError, match=message):
        quietly(model, change(batches), inplace=True, **options)
    as_it_was(model, *before)


def test_weights_that_are_not_finite_are_refused_by_name():
    model, batches = trained()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    before = noted(model)
    with pytest.raises(ValueError, match="`2`: expected finite weights"):
        quietly(model, batches, inplace=True)
    as_it_was(model, *before)


@pytest.mark.parametrize("where", ["choose", "curve", "cut", "_correct_biases", "_shifts", "distance"])
def test_an_interruption_leaves_the_model_as_it_was(where, monkeypatch):
    model, batches = trained()
    before = noted(model)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lightning_svd.compression.compress._Compression.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quietly(model, batches, inplace=True, curve=True, importance="outputs")
    as_it_was(model, *before)


@pytest.mark.parametrize("make", [Norms, Recurrent, Encoder])
def test_an_interruption_late_gives_back_statistics_and_modules_in_one_piece(make, monkeypatch):
    model, batches = trained(make)
    before, kinds = copy.deepcopy(model.state_dict()), [type(child) for child in model.modules()]
    parameters = [*model.parameters()]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_svd.compression.compress._Compression.finish", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quietly(model, batches, inplace=True)
    assert [type(child) for child in model.modules()] == kinds
    assert same_state(model.state_dict(), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in parameters)


# --------------------------------------------------------------------------------------------------- what models do


def reasons(report):
    return {name: why for name, _, why in report.ranks.skipped}


class Odd(nn.Module):
    """Layers that are used in odd ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.one, self.two, self.three = nn.Linear(16, 20), nn.Linear(20, 20), nn.Linear(20, 8)
        self.up = nn.ConvTranspose1d(4, 6, 3, stride=2)
        if how == "shared":
            self.again = self.two
        if how == "read":
            self.scale = 2.0

    def forward(self, x):
        hidden = self.one(x)
        if self.how == "in place before":
            kept = hidden * 1
            wide = self.two(kept)
            kept.mul_(100)  # what the layer was given, after it
            return self.three(wide.relu())
        if self.how == "frozen":
            with torch.no_grad():
                hidden = self.two(hidden).relu()
        elif self.how == "checkpoint":
            hidden = checkpoint(lambda h: self.two(h).relu(), hidden, use_reentrant=False)
        elif self.how == "reentrant":
            hidden = checkpoint(lambda h: self.two(h).relu(), hidden, use_reentrant=True)
        elif self.how == "shared":
            hidden = self.again(self.two(hidden).relu()).relu()
        elif self.how == "unused":
            self.two(hidden)
        elif self.how == "sized":
            hidden = torch.cat([hidden, self.two(hidden)], -1)
            maps = self.up(hidden.view(len(x), 4, 10), output_size=(22,))
            return self.three(maps.flatten(1)[:, :20].relu())
        elif self.how == "read":
            hidden = self.two(hidden) + self.two.weight[0] * self.scale
        return self.three(hidden)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # of the user's own checkpoint
@pytest.mark.parametrize(
    "how", ["in place before", "frozen", "checkpoint", "reentrant", "shared", "unused", "sized", "read", "skipped"]
)
def test_layers_are_cut_however_the_model_uses_them(how):
    torch.manual_seed(0)
    model = Odd(how)
    small, report = quietly(model, vectors(), target_params=0.6, curve=True)
    assert report.ranks.params_ratio <= 0.6 and report.distance < 1 and plain(small)
    names = {layer.name for layer in report.ranks.layers}
    never = "the calibration data never reaches it"
    expected = {
        "skipped": {"two": never},
        "sized": {"up": "it is called with more than its input"},
        "read": {"two": "the model needs what only the dense layer has"},
    }.get(how, {})
    expected = ({} if how == "sized" else {"up": never}) | expected
    assert all(reasons(report)[name].startswith(why) for name, why in expected.items())
    assert names == {"one", "two", "three", "up"} - expected.keys()
    for name in expected:
        assert torch.equal(small.get_submodule(name).weight, model.get_submodule(name).weight)
    if how == "shared":
        assert small.again is small.two
    if how == "unused":
        assert next(layer.rank for layer in report.ranks.layers if layer.name == "two") <= 2


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_how_a_layer_is_checkpointed_does_not_change_what_is_kept():
    distances = {}
    for how in ("plain", "checkpoint", "reentrant"):
        torch.manual_seed(0)
        model = Odd(how)
        if how == "plain":
            model.how, model.two = "skipped", nn.Sequential(model.two, nn.ReLU())
            model.one = nn.Sequential(model.one, model.two)
        distances[how] = quietly(model, vectors(), target_macs=0.5, importance="fisher")[1].tried["fisher"]
    assert distances["checkpoint"] == pytest.approx(distances["plain"], rel=1e-3)
    assert distances["reentrant"] == pytest.approx(distances["plain"], rel=0.2)  # twice as many samples for its layer


def scaled(factor, module, args, out):
    args[0].mul_(factor)


def test_what_a_model_writes_into_a_layers_input_later_is_not_what_it_was_given():
    found = []
    for factor in (1.0, 100.0):
        torch.manual_seed(0)
        model = Odd("in place before")
        model.two.register_forward_hook(functools.partial(scaled, factor))
        found.append(quietly(model, vectors(), importance="fisher")[1].tried["fisher"])
    assert found[0] == found[1]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(30, 16), nn.Linear(16, 16), nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def test_tied_weights_stay_tied():
    small, report = quietly(Tied(), tokens(), target_params=0.9)
    assert small.head.weight is small.embedding.weight
    assert [layer.name for layer in report.ranks.layers] == ["body"]
    assert reasons(report)["head"] == "weight tied to another module's"


def test_embeddings_are_cut_for_a_budget_of_parameters():
    model, batches = trained(Encoder)
    names = ["embedding", "linear1", "linear2", "q_proj", "v_proj"]
    small, report = quietly(model.eval(), batches, target_params=0.8, target_modules=names)
    assert {layer.kind for layer in report.ranks.layers} == {"Embedding", "Linear"}
    assert report.ranks.params_ratio <= 0.8 and report.distance < 1
    with torch.inference_mode():  # where torch's encoder would take its fast path
        torch.testing.assert_close(small(batches[0]), small.train(False)(batches[0]))


def test_a_transformer_encoder_computes_the_same_in_every_mode():
    model, batches = trained(Encoder)
    small, _ = quietly(model.eval(), batches)
    with torch.no_grad():
        fast = small(batches[0])
    torch.testing.assert_close(fast, small(batches[0]).detach())


@pytest.mark.parametrize("by_steps", [True, False])
def test_an_lstm_is_cut_alike_by_steps_and_by_the_kernel(by_steps, monkeypatch):
    monkeypatch.setattr("lightning_svd.layers.recurrent.SAVED_BY_KERNEL", 0 if by_steps else 1 << 18)
    model, batches = trained(Recurrent)
    small, report = quietly(model.eval(), batches, importance="outputs", correct_bias=False)
    with torch.no_grad():
        pairs = [(model(batch), small(batch)) for batch in batches[3:]]
    apart = sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)
    assert report.distance == pytest.approx(float(apart), rel=1e-3)


@pytest.mark.parametrize("make", [mlp, Norms, Recurrent])
def test_bfloat16_models_lose_no_more_than_their_rounding(make):
    model, batches = trained(make)
    wide = quietly(model.eval(), batches, target_macs=0.7)[1]
    small, report = quietly(model.bfloat16(), [batch.bfloat16() for batch in batches], target_macs=0.7)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert report.distance <= 1.2 * wide.distance + 1e-3


# ----------------------------------------------------------------------------------------- making up for what is lost


def test_biases_keep_the_mean_of_the_output():
    torch.manual_seed(0)
    model = nn.Linear(16, 20)
    batch = torch.randn(64, 16) + 3
    small, report = quietly(model, [batch], target_macs=0.3, importance="outputs", correct_bias=True)
    assert report.bias_corrected
    torch.testing.assert_close(small(batch).mean(0), model(batch).mean(0), rtol=1e-4, atol=1e-4)
    other, report = quietly(model, [batch], target_macs=0.3, importance="outputs", correct_bias=False)
    assert not report.bias_corrected and torch.equal(other[1].bias, model.bias)
    assert (other(batch).mean(0) - model(batch).mean(0)).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["grouped", "attention", "weights alone"])
def test_biases_keep_the_mean_in_every_kind_of_layer(case):
    torch.manual_seed(0)
    model = {
        "grouped": nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)),
        "attention": Encoder().of.layers[0].eval(),
        "weights alone": nn.Sequential(nn.Linear(16, 20)),
    }[case]
    batch = {"grouped": torch.randn(16, 8, 5, 5) + 2}.get(case, torch.randn(16, 7, 16) + 2)
    only = {"target_modules": ["v_proj", "linear1"]} if case == "attention" else {}
    way = "spectrum" if case == "weights alone" else "outputs"
    outputs = {}
    for name in ("0", "linear1"):
        if name in dict(model.named_modules()):
            outputs = {"layer": name}
    means = []

    def note(layer, args, out):
        means.append(out.detach().movedim(1, -1).flatten(0, -2).mean(0) if out.ndim == 4 else out.detach().mean((0, 1)))

    small, report = quietly(model, [batch], target_params=0.8, importance=way, correct_bias=True, **only)
    assert report.bias_corrected
    if case == "attention":
        return  # its first layer's input moves a little
    for each in (model, small):
        each.get_submodule(outputs["layer"]).register_forward_hook(note)
        each(batch)
    torch.testing.assert_close(means[1], means[0], rtol=1e-3, atol=1e-3)


def test_running_statistics_are_kept_only_where_they_help():
    model, batches = trained(Norms)
    model.eval()
    for recalibrate in (True, False):
        small, report = quietly(model, batches, target_macs=0.4, recalibrate=recalibrate, importance="spectrum")
        same = torch.equal(small.body[1].running_mean, model.body[1].running_mean)
        assert report.batch_norm_recalibrated is not same
        assert small.body[1].momentum == 0.1 and not small.body[1].training
        if recalibrate:
            with_it = report.distance
        else:
            assert not report.batch_norm_recalibrated and with_it <= report.distance


def test_what_is_tried_is_judged_with_the_statistics_that_suit_it():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    batches = [torch.randn(16, 3, 8, 8) + 1 for _ in range(8)]
    for batch in 4 * batches:
        model(batch)
    model.eval()
    asked = {"target_macs": 0.4, "importance": "spectrum", "correct_bias": False, "curve": True}
    _, report = quietly(model, batches, **asked)
    assert report.batch_norm_recalibrated
    assert report.tried["spectrum"] == pytest.approx(report.distance) == report.curve[0.4]
    _, without = quietly(model, batches, recalibrate=False, **asked)
    assert without.tried["spectrum"] == pytest.approx(without.distance) == without.curve[0.4]
    assert report.distance < without.distance


def test_statistics_of_one_value_are_no_trouble():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 12)).eval()
    small, report = quietly(model, [batch[:1] for batch in vectors()])  # torch refuses to train on them
    assert not report.batch_norm_recalibrated
    assert torch.equal(small[1].running_mean, model[1].running_mean)


# --------------------------------------------------------------------------------------------------------- the report


def test_the_report_says_all_of_it(tmp_path):
    model, batches = trained()
    _, report = quietly(model, batches, curve=True)
    assert isinstance(report, CompressionReport) and report.seconds > 0
    names = {layer.name for layer in report.ranks.layers}
    assert report.shifts.keys() == report.carried.keys() == names
    for layer in report.ranks.layers:
        assert len(report.carried[layer.name]) == layer.full_rank
        assert (report.shifts[layer.name] == 0) == (layer.rank == layer.full_rank)
    shares = list(report.curve)
    assert shares == sorted(shares, reverse=True) and report.curve[shares[0]] <= report.curve[shares[-1]]
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert data == json.loads((tmp_path / "report.json").read_text())
    assert data["distance"] == report.distance and data["tried"] == report.tried and data["choice"] == report.choice
    assert data["ranks"]["params"] == report.ranks.params
    assert {float(share): value for share, value in data["curve"].items()} == report.curve
    text = str(report)
    assert str(report.ranks) in text and f"{report.distance:.4g} ({report.choice})" in text


def test_a_ruined_model_is_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 24), nn.Linear(24, 16))
    batches = random(16, 16)
    _, report = quietly(model, batches, target_macs=0.1)
    assert report.distance > 0.1 and "outputs moved far" in report.warning and "Warning: " in str(report)
    _, report = quietly(model, batches, target_macs=1.0)
    assert report.distance < 1e-6 and report.warning is None and "Warning" not in str(report)


def test_what_overflows_is_warned_of_and_is_null_in_json():
    model, batches = trained()
    _, report = quietly(model, batches)
    ruined = CompressionReport(**(vars(report) | {"distance": math.inf, "measure": "increase of the loss"}))
    assert ruined.warning and json.loads(ruined.to_json())["distance"] is None


def test_progress_is_shown_on_standard_error_alone(capsys):
    model, batches = trained()
    compress(model, batches, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("make", [mlp, Norms, Recurrent, Encoder])
def test_a_copy_shares_nothing_with_the_model_in_the_end(make):
    model, batches = trained(make)
    small, report = quietly(model, batches, target_params=0.9)
    assert {layer.form for layer in report.ranks.layers} == {"dense", "factored"}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not any(tensor.untyped_storage().data_ptr() in own for tensor in (*small.parameters(), *small.buffers()))


@pytest.mark.parametrize("make", [mlp, Norms, Recurrent, Encoder])
def test_layers_in_groups_are_cut_as_all_at_once(make, monkeypatch):
    model, batches = trained(make)
    together = quietly(model, batches)[1]
    for name in ("AT_ONCE", "LITTLE"):
        monkeypatch.setattr(f"lightning_svd.compression.compress.{name}", 0)
    monkeypatch.setattr("lightning_svd.compression.compress._Compression._learn_costs", without_activations)
    apart = quietly(model, batches)[1]
    assert apart.tried == together.tried and apart.distance == together.distance
    assert apart.carried == together.carried


def without_activations(run, learn=compress_module._Compression._learn_costs):
    return learn(run)[0], 0
