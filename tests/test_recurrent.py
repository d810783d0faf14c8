"""torch's recurrent modules taken apart: the same results, low-rank matrices, and torch's own names in files."""

import copy
import itertools

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lightning_svd.costs import count_costs, svd_layers
from lightning_svd.inspection import inspect_weights
from lightning_svd.parts import InParts
from lightning_svd.plans import plan
from lightning_svd.recurrent import SplitCell, SplitRecurrent
from lightning_svd.surgery import decompose, restore, to_dense, to_factored

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
        monkeypatch.setattr("lightning_svd.recurrent.SAVED_BY_KERNEL", 0)
    return request.param


def recurrent(kind="lstm", **options):
    torch.manual_seed(0)
    return KINDS[kind](INPUTS, HIDDEN, **options).double()


def taken_apart(module, rank=None):
    """As ``decompose`` does it, with so many ranks."""
    module = copy.deepcopy(module)
    decompose(module)
    for layer in svd_layers(module).values() if rank else ():
        layer.keep(torch.arange(layer.full_rank) < rank)
    return module


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
    """At full rank, at a low one, and as pairs, for every kind of input and first state."""
    whole = recurrent(kind, **options)
    split, pruned = taken_apart(whole), taken_apart(whole, rank=2)
    pairs = to_factored(pruned)
    joined = to_dense(pairs)
    assert isinstance(split, SplitRecurrent) and isinstance(pairs, SplitRecurrent)
    assert (split.fused, pruned.fused, pairs.fused) == (True, not by_steps, not by_steps)
    assert type(joined) is type(whole)
    for x in inputs(whole.batch_first):
        last = whole(x)[1]
        hidden = torch.randn_like(last) if isinstance(last, torch.Tensor) else tuple(map(torch.randn_like, last))
        for state in (None, hidden):
            assert_alike(split(x, state), whole(x, state))
            for low_rank in (pruned, pairs):
                assert_alike(low_rank(x, state), joined(x, state))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells_compute_what_torch_computes(kind, bias):
    torch.manual_seed(0)
    whole = CELLS[kind](INPUTS, HIDDEN, bias=bias).double()
    split, pairs = taken_apart(whole), to_factored(taken_apart(whole, rank=2))
    joined = to_dense(pairs)
    assert isinstance(pairs, SplitCell) and type(joined) is type(whole)
    for x in (torch.randn(ROWS, INPUTS).double(), torch.randn(INPUTS).double()):
        state = whole(x)
        assert_alike(split(x), state)
        assert_alike(split(x, state), whole(x, state))
        assert_alike(pairs(x, state), joined(x, state))


def test_a_wrong_input_is_refused_as_by_torch(by_steps):
    whole = recurrent()
    x = torch.randn(STEPS, ROWS, INPUTS).double()
    state = torch.zeros(1, ROWS + 1, HIDDEN).double()
    for module in (whole, taken_apart(whole), to_factored(taken_apart(whole, rank=2))):
        with pytest.raises(ValueError, match="2"):
            module(x[None])
        with pytest.raises(RuntimeError, match=str(INPUTS)):
            module(x[..., 1:])
        with pytest.raises(RuntimeError, match="hidden"):
            module(x, (state, state))


def test_gradients_reach_the_factors_as_they_reach_the_weights():
    whole = recurrent("gru")
    split = taken_apart(whole)
    x = inputs(batch_first=False)[0]
    for module in (whole, split):
        module(x)[0].square().sum().backward()
    for name, layer in svd_layers(split).items():
        U, s, V = layer.U, layer.s, layer.V
        assert_same(U.grad, getattr(whole, f"weight_{name}").grad @ V * s, (STEPS * 36, STEPS * 36))


def test_dropout_acts_between_layers_in_training_only(by_steps):
    whole = recurrent("gru", num_layers=2, dropout=0.5)
    x = inputs(batch_first=False)[0]
    for module in (taken_apart(whole), to_factored(taken_apart(whole, rank=2))):
        first, again = module(x)[0], module(x)[0]
        assert not torch.equal(first, again)
        module.eval()
        assert torch.equal(module(x)[0], module(x)[0])
        assert_alike(module(x), to_dense(module)(x))


@pytest.mark.parametrize("finish", [copy.deepcopy, to_factored], ids=["factorised", "pairs"])
def test_under_autocast(finish, by_steps):
    module = finish(taken_apart(recurrent().float(), rank=2))
    x = torch.randn(STEPS, ROWS, INPUTS)
    with torch.autocast("cpu", torch.bfloat16):
        low = module(x)[0]
    assert (low.float() - module(x)[0]).abs().max() < 0.05


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_there_and_back(kind, dtype, by_steps):
    whole = recurrent(kind, num_layers=2).to(dtype)
    pairs = to_factored(taken_apart(whole, rank=2))
    dense = to_dense(pairs)
    assert {p.dtype for p in [*pairs.parameters(), *dense.parameters()]} == {dtype}
    x = inputs(batch_first=False)[0].to(dtype)
    for ours, theirs in zip(flat(pairs(x)), flat(dense(x)), strict=True):
        assert ours.dtype == dtype
        assert_same(ours, theirs, (8 * STEPS, 8 * STEPS), factor=2 if dtype.itemsize == 2 else 32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes are checked, as they are when it is traced
@pytest.mark.parametrize("kind", KINDS)
def test_exported_forms_compute_the_same(kind, by_steps):
    pairs = to_factored(taken_apart(recurrent(kind, num_layers=2, bidirectional=True), rank=2)).eval()
    x = inputs(batch_first=False)[0]
    exported = torch.export.export(pairs, (x,)).module()
    for form in (exported, torch.jit.trace(pairs, x)):
        assert_alike(form(x), pairs(x))


def test_attributes_that_users_read_are_there():
    split = taken_apart(recurrent(num_layers=2, bidirectional=True))
    split.flatten_parameters()
    assert (split.input_size, split.hidden_size, split.num_layers, split.bidirectional) == (INPUTS, HIDDEN, 2, True)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["dense", "factorised", "pruned", "pairs"])
def test_products_are_counted_in_every_form(kind, form, by_steps):
    model = nn.Sequential(recurrent(kind, num_layers=2, bidirectional=True).float())
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    x = torch.randn(STEPS, ROWS, INPUTS)
    expected = STEPS * ROWS * weights
    if form != "dense":
        decompose(model, exclude_modules=["ih_l1"])
        expected_ranks = dict.fromkeys(svd_layers(model), 2)
    if form in ("pruned", "pairs"):
        cost = count_costs(model, x)
        for layer in svd_layers(model).values():
            layer.keep(torch.arange(layer.full_rank) < 2)
    if form == "pairs":
        model, expected = to_factored(model), cost.at(expected_ranks, "macs")
    counted = count_costs(model, x)
    assert counted.dense("macs") == expected


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


def test_restore_brings_back_the_very_parameters():
    model = nn.Sequential(recurrent(), nn.GRUCell(HIDDEN, HIDDEN))
    before = dict(model.named_parameters())
    x = inputs(batch_first=False)[0]
    expected = model[0](x)
    decompose(model)
    assert all(isinstance(child, InParts) for child in model)
    now = dict(model.named_parameters())
    restore(model, {name: p for name, p in before.items() if name not in now})
    assert [type(child) for child in model] == [nn.LSTM, nn.GRUCell]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert_alike(model[0](x), expected)


def test_only_the_chosen_matrices_are_factorised_and_frozen_ones_stay_frozen():
    whole = recurrent().requires_grad_(False)
    decompose(whole, target_modules=["hh_l0"])
    assert [*svd_layers(whole)] == ["hh_l0"]
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(p.requires_grad for p in to_dense(whole).parameters())


def test_a_module_that_moves_computes_as_before(by_steps):
    pairs = to_factored(taken_apart(recurrent(), rank=2))
    dense = to_dense(pairs)
    x = inputs(batch_first=False)[0].float()
    assert_alike(pairs.float()(x), dense.float()(x))
    assert_alike(copy.deepcopy(pairs)(x), dense(x))


def test_spectra_of_a_plain_model_are_read_matrix_by_matrix():
    model = nn.Sequential(recurrent().float())
    inspected = {layer.name: layer.spectrum for layer in inspect_weights(model.state_dict())}
    assert set(inspected) == {"0.ih_l0", "0.hh_l0"}
    expected = torch.linalg.svdvals(model[0].weight_hh_l0.detach())
    assert_same(torch.tensor(inspected["0.hh_l0"]), expected, (48, 12))


def test_a_packed_batch_comes_back_packed(by_steps):
    pairs = to_factored(taken_apart(recurrent(), rank=2))
    assert isinstance(pairs(inputs(batch_first=False)[2])[0], PackedSequence)
