"""torch's recurrent modules taken apart: the same results, low-rank matrices, and torch's own names in files."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_svd import FallToBudget, SVDTraining, compress
from lightning_svd.layers.compounds import join, linears_of, named_layers, open_up, owners_of, split, svd_layers
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import FactorizedModule, factorize, plain_pair, release
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.layers.recurrent import SplitCell, SplitRecurrent
from lightning_svd.layers.views import View
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import become_pair, begin, decompose, to_dense, undo

# torch's own, said once in a process, by whichever test comes first.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

INPUTS, HIDDEN, STEPS, ROWS = 10, 12, 5, 3
KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "projected": lambda *sizes, **options: nn.LSTM(*sizes, proj_size=7, **options),
}
SHAPES = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "both ways": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False, "batch_first": True},
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.RNNCell,
    "relu": lambda *sizes, **options: nn.RNNCell(*sizes, nonlinearity="relu", **options),
}


@pytest.fixture(params=[True, False], ids=["by steps", "by the kernel"])
def by_steps(request, monkeypatch):
    """Whether low-rank layers of these sizes take steps of their own."""
    if request.param:
        monkeypatch.setattr("lightning_svd.layers.recurrent.SAVED_BY_KERNEL", 0)
    return request.param


def recurrent(kind="lstm", **options):
    torch.manual_seed(0)
    return KINDS[kind](INPUTS, HIDDEN, **options).double()


def factorized(module, rank=None, names=None, form="svd"):
    """A copy that trains factors of these parts, or of all, out of sight."""
    module = copy.deepcopy(module)
    names = names or [*linears_of(module)]
    split(module, names)
    found = dict(named_layers(module))
    for name in names:
        layer = factorize(found[name], View.of(found[name]), name, form)
        layer.keep(min(rank or layer.full_rank, layer.full_rank))
    return module


def opened(module):
    """The same as pairs of plain layers."""
    for layer in svd_layers(module).values():
        become_pair(layer, plain_pair(layer))
    open_up(module)
    return module


def trained(module):
    """Every parameter that is trained, each once."""
    true = {}
    for name, child in module.named_modules():
        own = (
            child.true_parameters() if isinstance(child, FactorizedModule) else dict(child.named_parameters("", False))
        )
        true |= {f"{name}.{key}": parameter for key, parameter in own.items() if parameter is not None}
    assert len({id(parameter) for parameter in true.values()}) == len(true)
    assert not any(isinstance(parameter, DenseWeight) for parameter in true.values())
    return true


def ids(module):
    return {name: id(parameter) for name, parameter in module.named_parameters()}


def inputs(batch_first):
    """Whatever such a module takes: a batch, one sequence, sequences of several lengths."""
    batch = torch.randn(ROWS, STEPS, INPUTS, dtype=torch.float64)
    sequences = [batch[0, :2], batch[1], batch[2, :3]]
    return [
        batch if batch_first else batch.transpose(0, 1),
        batch[0],
        pack_sequence(sequences, enforce_sorted=False),
        pack_sequence([batch[1], batch[2, :3], batch[0, :2]]),
    ]


def flat(result):
    """All tensors of what a recurrent module returns."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result if item is not None for tensor in flat(item)]


def assert_alike(one, other):
    for ours, theirs in zip(flat(one), flat(other), strict=True):
        if ours.is_floating_point():
            assert_same(ours, theirs, (8 * STEPS, 8 * STEPS))
        else:  # how a packed sequence is packed
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_torch_computes(kind, options, by_steps):
    """At full rank, at a low one, as factors of pairs and as pairs, for every kind of input and first state."""
    whole = recurrent(kind, **options)
    module, pruned, trained_as_pairs = factorized(whole), factorized(whole, 2), factorized(whole, 2)
    for layer in svd_layers(trained_as_pairs).values():
        layer.to_pair()
    pairs = opened(factorized(whole, 2))
    dense = to_dense(pairs)
    assert all(isinstance(each, SplitRecurrent) and isinstance(each, type(whole)) for each in (module, pruned, pairs))
    assert [each.fused for each in (module, pruned, trained_as_pairs, pairs)] == [True, *[not by_steps] * 3]
    assert type(dense) is type(copy.deepcopy(pruned)) is type(whole)
    for x in inputs(whole.batch_first):
        last = whole(x)[1]
        hidden = torch.randn_like(last) if isinstance(last, torch.Tensor) else tuple(map(torch.randn_like, last))
        for state in (None, hidden):
            assert_alike(module(x, state), whole(x, state))
            for low_rank in (pruned, trained_as_pairs, pairs):
                assert_alike(low_rank(x, state), dense(x, state))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_compute_what_torch_computes(kind, bias):
    torch.manual_seed(0)
    whole = CELLS[kind](INPUTS, HIDDEN, bias=bias).double()
    module, pruned, pairs = factorized(whole), factorized(whole, 2), opened(factorized(whole, 2))
    dense = to_dense(pairs)
    assert isinstance(pairs, SplitCell) and isinstance(module, type(whole))
    assert type(dense) is type(copy.deepcopy(module)) is type(whole)
    assert vars(dense).keys() == vars(whole).keys()
    for x in (torch.randn(ROWS, INPUTS).double(), torch.randn(INPUTS).double()):
        state = whole(x)
        assert_alike(module(x), state)
        assert_alike(module(x, state), whole(x, state))
        for low_rank in (pruned, pairs):
            assert_alike(low_rank(x, state), dense(x, state))
    assert module.input_shapes(torch.zeros(ROWS, INPUTS)) == {"ih": [(ROWS, INPUTS)], "hh": [(ROWS, HIDDEN)]}
    before = ids(whole)
    begin(whole, plan(whole))
    for layer in svd_layers(whole).values():
        layer.to_svd()
    undo(whole)
    assert ids(whole) == before and type(whole) is type(dense)


def test_a_wrong_input_is_refused_as_by_torch(by_steps):
    whole = recurrent()
    x = torch.randn(STEPS, ROWS, INPUTS).double()
    state = torch.zeros(1, ROWS + 1, HIDDEN).double()
    for module in (whole, factorized(whole), opened(factorized(whole, 2))):
        with pytest.raises(ValueError, match="2"):
            module(x[None])
        with pytest.raises(RuntimeError, match=str(INPUTS)):
            module(x[..., 1:])
        with pytest.raises(RuntimeError, match="hidden"):
            module(x, (state, state))


def test_while_all_parts_are_dense_it_is_torchs_own():
    whole = recurrent(num_layers=2)
    module = factorized(whole, form="dense")
    x = inputs(batch_first=False)[0]
    assert isinstance(module, SplitRecurrent) and {type(p) for p in module.parameters()} == {nn.Parameter}
    assert torch.equal(module(x)[0], whole(x)[0])
    assert {id(p) for p in trained(module).values()} == {*ids(module).values()}


def test_gradients_reach_the_factors_as_they_reach_the_weights(by_steps):
    whole = recurrent("gru")
    module, x = factorized(whole), inputs(batch_first=False)[0]
    for each in (whole, module):
        each(x)[0].square().sum().backward()
    for name, layer in svd_layers(module).items():
        U, s, V = layer.form.trained
        assert_same(U.grad, getattr(whole, f"weight_{name}").grad @ V * s, (STEPS * 36, STEPS * 36))
        assert s.grad is not None and V.grad is not None
    assert_same(module.bias_hh_l0.grad, whole.bias_hh_l0.grad, (STEPS * 36, STEPS * 36))


def test_gradients_are_those_of_the_dense_module_in_steps(by_steps):
    module = factorized(recurrent(num_layers=2, bidirectional=True), 2)
    dense = copy.deepcopy(module)
    for x in inputs(batch_first=False)[1:3]:
        for each in (module, dense):
            each.zero_grad()
            output = each(x)[0]
            (output.data if isinstance(output, PackedSequence) else output).square().sum().backward()
        for name, layer in svd_layers(module).items():
            _, s, V = layer.factors()
            expected = getattr(dense, f"weight_{name}").grad @ V.detach() * s.detach()
            assert_same(layer.form.parameters["U"].grad[:, :2], expected, (1024, 1024))


def test_under_functional_call_it_computes_with_the_given_weights(by_steps):
    module, other = factorized(recurrent(), 2), recurrent().requires_grad_(False)
    x = inputs(batch_first=False)[0]
    nn.init.normal_(other.weight_hh_l0)
    given = {name: p.detach() for name, p in other.named_parameters()}
    assert_alike(functional_call(module, given, (x,)), other(x))
    one, dense = {"weight_hh_l0": given["weight_hh_l0"], "bias_ih_l0": given["bias_hh_l0"]}, copy.deepcopy(module)
    assert_alike(functional_call(module, one, (x,)), functional_call(dense, one, (x,)))
    assert_alike(module(x), dense(x))  # and as before afterwards


def test_dropout_acts_between_layers_in_training_only(by_steps):
    whole = recurrent("gru", num_layers=2, dropout=0.5)
    x = inputs(batch_first=False)[0]
    for module in (factorized(whole), opened(factorized(whole, 2))):
        assert not torch.equal(module(x)[0], module(x)[0])
        module.eval()
        assert torch.equal(module(x)[0], module(x)[0])
        assert_alike(module(x), to_dense(module)(x))


@pytest.mark.parametrize("finish", [lambda module: module, opened], ids=["factorized", "pairs"])
def test_under_autocast(finish, by_steps):
    module = finish(factorized(recurrent().float(), 2))
    x = torch.randn(STEPS, ROWS, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        try:
            low = module(x)[0]
        except RuntimeError:
            with pytest.raises(RuntimeError):
                recurrent().float()(x)  # torch's own
            pytest.skip("torch has no LSTM in bfloat16 for this processor")
    assert (low.float() - module(x)[0]).abs().max() < 0.05


# --------------------------------------------------------------------------------------------------- what it shows


@pytest.mark.parametrize("kind", KINDS)
def test_it_shows_torchs_own_parameters_whatever_it_trains(kind):
    whole = recurrent(kind, num_layers=2, bidirectional=True)
    before, expected = ids(whole), {name: value.clone() for name, value in whole.state_dict().items()}
    begin(whole, plan(whole))
    held = {*before.values()}
    for layer in svd_layers(whole).values():
        old, new = layer.to_svd()
        assert {id(p) for p in old} <= held
        held = held - {id(p) for p in old} | {id(p) for p in new}
        assert held == {id(p) for p in trained(whole).values()} and ids(whole) == before
    state = whole.state_dict()
    assert [*state] == [*expected] and all(type(value) is torch.Tensor for value in state.values())
    for key, value in expected.items():
        assert_same(state[key], value, (48, 48))
    assert [id(p) for layer in whole.all_weights for p in layer] == [*before.values()]
    for old, new in undo(whole):
        held = held - {id(p) for p in old} | {id(p) for p in new}
    assert held == {*before.values()} and ids(whole) == before


def test_states_load_in_the_middle():
    module, other = factorized(recurrent()), recurrent()
    nn.init.normal_(other.weight_hh_l0)
    module.load_state_dict(other.state_dict())
    for name, value in module.state_dict().items():
        assert_same(value, other.state_dict()[name], (48, 48))
    module.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    assert module.hh_l0.bias is module.bias_hh_l0
    for layer in svd_layers(module).values():
        layer.keep(2)
    state = copy.deepcopy(module.state_dict())
    module.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    with pytest.warns(UserWarning, match="`weight_.h_l0`: what was loaded into it is"):
        module.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_hh_l0"'):
        module.load_state_dict({name: value for name, value in state.items() if name != "weight_hh_l0"})
    with pytest.raises(RuntimeError, match="weight_hh_l0"):
        module.load_state_dict(state | {"weight_hh_l0": torch.full((48, HIDDEN), torch.nan)})


@pytest.mark.parametrize("names", [None, ["hh_l0"]], ids=["all", "hh_l0"])
def test_copies_and_pickles_are_torchs_own(names, by_steps):
    module, x = factorized(recurrent(bidirectional=True), 2, names), inputs(batch_first=False)[0]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is nn.LSTM and vars(twin).keys() == vars(recurrent()).keys()
        assert {type(p) for p in twin.parameters()} == {nn.Parameter}
        assert all(ours is theirs for ours, theirs in zip(twin._flat_weights, twin.parameters(), strict=True))
        assert_alike(twin(x), module(x))
        assert_alike(twin.float()(x.float()), twin(x.float()))


def test_its_pickle_opens_without_this_package(tmp_path):
    torch.save(factorized(recurrent()), tmp_path / "whole.pt")
    assert b"lightning_svd" not in (tmp_path / "whole.pt").read_bytes()


@pytest.mark.parametrize("names", [None, ["hh_l0"]], ids=["all", "hh_l0"])
def test_it_moves_with_its_factors(names, by_steps):
    module = factorized(recurrent("projected"), 2, names)
    before, x = ids(module), inputs(batch_first=False)[0]
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        assert ids(module) == before
        assert {p.dtype for p in (*module.parameters(), *trained(module).values())} == {dtype}
        assert all(part.bias is getattr(module, f"bias_{name}", None) for name, part in module.parts().items())
        assert_alike(module(x.to(dtype)), copy.deepcopy(module)(x.to(dtype)))
    with module.showing_factors():
        module.float()  # as a strategy may do
    assert {p.dtype for p in (*module.parameters(), *trained(module).values())} == {torch.float32}


def test_a_weight_cannot_be_replaced_while_its_layer_trains_factors():
    model = nn.Sequential(recurrent())
    begin(model, plan(model, ["hh_l0"]))
    svd_layers(model)["0.hh_l0"].to_svd()
    with pytest.raises(RuntimeError, match=r"`0.weight_hh_l0` cannot be replaced.*exclude_modules=\['0.hh_l0'\]"):
        model[0].weight_hh_l0 = nn.Parameter(torch.zeros(48, HIDDEN))
    with pytest.raises(RuntimeError, match=r"`0.weight_hh_l0`"), torch.no_grad():
        model[0].weight_hh_l0.zero_()
    model[0].weight_ih_l0 = nn.Parameter(torch.zeros(48, INPUTS).double())
    assert model[0].ih_l0.weight is model[0].weight_ih_l0


def test_shown_factors_are_its_parameters_and_states_stay_dense(by_steps):
    whole, x = recurrent(), inputs(batch_first=False)[0]
    module = copy.deepcopy(whole)
    decompose(module, exclude_modules=["ih_l0"])
    names = [name for name, _ in module.named_parameters()]
    assert names == ["weight_ih_l0", "hh_l0.U", "hh_l0.s", "hh_l0.V", "bias_ih_l0", "bias_hh_l0"]
    assert {id(p) for p in module.parameters()} == {id(p) for p in trained(module).values()}
    assert [*module.state_dict()] == [*whole.state_dict()]
    assert_same(module.weight_hh_l0.detach(), whole.weight_hh_l0.detach(), (48, 48))
    module.hh_l0.keep(2)
    module.hh_l0.shrink()
    assert dict(module.named_parameters())["hh_l0.U"].shape == (48, 2)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.float().double()):
        assert [name for name, _ in twin.named_parameters()] == names and twin.hh_l0.rank == 2
        assert_same(twin(x)[0], module(x)[0], (64, 64), factor=1e9)
        assert type(twin.weight_hh_l0) is DenseWeight and twin.hh_l0.weight is twin.weight_hh_l0
        twin(x)[0].sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
    given = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert not functional_call(module, given, (x,))[0].any()
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    undo(module)
    assert type(module) is nn.LSTM
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in whole.named_parameters()]


# ----------------------------------------------------------------------------------------------- to what it becomes


def test_joined_it_is_torchs_own_with_the_very_parameters():
    model = nn.Sequential(recurrent(), nn.GRUCell(HIDDEN, HIDDEN))
    before, x = ids(model), inputs(batch_first=False)[0]
    expected, attributes = model[0](x), [vars(child).keys() for child in model]
    begin(model, plan(model))
    layers = [*svd_layers(model).values()]
    for layer in layers:
        layer.to_svd()
    assert not join(model) and len(owners_of(model)) == 2
    for layer in layers:
        release(layer)
    assert not join(model)  # no parameter took the place of another
    assert [type(child) for child in model] == [nn.LSTM, nn.GRUCell]
    assert ids(model) == before and [vars(child).keys() for child in model] == attributes
    assert_alike(model[0](x), expected)


def test_opened_its_parts_are_its_children(by_steps):
    whole = recurrent(num_layers=2)
    pairs, x = factorized(whole, 2, ["ih_l0", "hh_l0", "hh_l1"]), inputs(batch_first=False)[0]
    expected = pairs(x)
    biases = {id(p) for name, p in pairs.named_parameters() if name.startswith("bias")}
    pairs = opened(pairs)
    assert [*low_rank_pairs(pairs)] == ["ih_l0", "hh_l0", "hh_l1"] and not owners_of(pairs)
    assert [name for name, _ in pairs.named_children()] == ["ih_l0", "hh_l0", "ih_l1", "hh_l1"]
    assert {id(p) for name, p in pairs.named_parameters() if name.endswith("bias")} == biases
    for twin in (pairs, copy.deepcopy(pairs), pickle.loads(pickle.dumps(pairs))):
        assert_alike(twin(x), expected)
        assert twin.state_dict().keys() == pairs.state_dict().keys()
    dense = to_dense(pairs)
    assert type(dense) is nn.LSTM and vars(dense).keys() == vars(whole).keys()
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert_alike(dense(x), expected)
    assert_alike(pairs.float()(x.float()), dense.float()(x.float()))
    pairs(x.float())[0].sum().backward()
    assert all(p.grad is not None for p in pairs.parameters())


def test_a_packed_batch_comes_back_packed(by_steps):
    x = inputs(batch_first=False)[2]
    for module in (factorized(recurrent(), 2), opened(factorized(recurrent(), 2))):
        assert isinstance(module(x)[0], PackedSequence)


def test_only_the_chosen_matrices_are_factorized_and_frozen_ones_stay_frozen():
    whole = recurrent().requires_grad_(False)
    decompose(whole, target_modules=["hh_l0"])
    assert [*svd_layers(whole)] == ["hh_l0"]
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(p.requires_grad for p in to_dense(whole).parameters())


def test_parts_are_told_what_they_get():
    module = factorized(recurrent("projected", num_layers=2, bidirectional=True))
    shapes = module.input_shapes(torch.zeros(STEPS, ROWS, INPUTS))
    rows = STEPS * ROWS
    assert shapes["ih_l0_reverse"] == [(rows, INPUTS)] and shapes["ih_l1"] == [(rows, 14)]
    assert shapes["hh_l1"] == [(ROWS, 7)] * STEPS and shapes["hr_l0"] == [(ROWS, HIDDEN)] * STEPS
    assert shapes.keys() == linears_of(module).keys()
    assert module.input_shapes(torch.zeros(STEPS, INPUTS))["hh_l0"] == [(1, 7)] * STEPS
    packed = nn.utils.rnn.pack_sequence([torch.zeros(steps, INPUTS) for steps in (3, 2, 2)])
    assert module.input_shapes(packed)["hh_l0"] == [(3, 7), (3, 7), (1, 7)]
    first = factorized(recurrent("lstm", batch_first=True))
    assert first.input_shapes(torch.zeros(ROWS, STEPS, INPUTS))["hh_l0"] == [(ROWS, HIDDEN)] * STEPS


# -------------------------------------------------------------------------------------------------------- which ones


def test_the_plan_names_each_matrix():
    model = nn.Sequential(recurrent(num_layers=2, bidirectional=True))
    names = [layer.name for layer in plan(model) if not layer.skipped]
    ends = ("l0", "l0_reverse", "l1", "l1_reverse")
    assert names == [f"0.{of}_{end}" for end, of in itertools.product(ends, ("ih", "hh"))]
    assert type(model[0]) is nn.LSTM


class UserLSTM(nn.LSTM):
    """Might do anything in its forward."""


@pytest.mark.parametrize(
    ("module", "reason"),
    [(UserLSTM(8, 8), "subclass of LSTM"), (nn.GRU(8, 8, device="meta"), "meta device")],
)
def test_what_cannot_be_taken_apart_is_skipped_with_the_reason(module, reason):
    planned = plan(nn.Sequential(module, nn.Linear(8, 8)))
    assert [layer.name for layer in planned if reason in (layer.skipped or "")] == ["0.ih_l0", "0.hh_l0"]


def test_a_refused_weight_leaves_the_module_as_it_was():
    whole = recurrent()
    with torch.no_grad():
        whole.weight_hh_l0[3, 3] = torch.nan
    before = dict(whole.named_parameters())
    with pytest.raises(ValueError, match="hh_l0"):
        decompose(whole)
    assert type(whole) is nn.LSTM
    assert {name: id(p) for name, p in whole.named_parameters()} == {name: id(p) for name, p in before.items()}


class First(nn.Module):
    """The first output of a recurrent module."""

    def __init__(self):
        super().__init__()
        self.of = nn.LSTM(12, 16, batch_first=True)

    def forward(self, x):
        return self.of(x)[0]


def test_who_makes_a_small_recurrent_net_low_rank_is_told_that_it_gets_no_faster():
    model = nn.Sequential(First(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = SVDTraining(model, optimizer, 4, target_macs=0.4, schedule=FallToBudget(start=0.0, end=0.5, cuts=1))
    for _ in range(4):
        model(torch.randn(3, 5, 12)).sum().backward()
        run.step()
        optimizer.zero_grad()
    (warning,) = run.finish().warnings
    assert warning.startswith("0.of: recurrent layers so small take no less time")
    _, report = compress(nn.Sequential(First()), [torch.randn(8, 5, 12)], target_macs=0.4, progress=False)
    assert "Note: 0.of: recurrent layers so small" in str(report)
    _, report = compress(nn.Sequential(nn.Linear(12, 16)), [torch.randn(8, 12)], target_macs=0.4, progress=False)
    assert report.no_faster is None and "Note" not in str(report)
