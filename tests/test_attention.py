"""torch's attention module taken apart: the same results, low-rank projections, and torch's own names everywhere."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from helpers import assert_same
from torch import nn
from torch.func import functional_call

from lightning_svd.layers.attention import SplitAttention
from lightning_svd.layers.compounds import join, linears_of, named_layers, open_up, owners_of, split, svd_layers
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import FactorizedModule, SVDLayer, factorize, plain_pair, release
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.layers.parts import TakenApart
from lightning_svd.layers.views import View
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import become_pair, begin, decompose, to_dense, undo

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
MASKS = {
    "none": {},
    "causal": {"attn_mask": "causal", "is_causal": True},
    "per head": {"attn_mask": "per head"},
    "padding": {"key_padding_mask": "padding"},
    "both": {"attn_mask": "causal", "key_padding_mask": "padding"},
    "both, with the hint": {"attn_mask": "causal", "key_padding_mask": "padding", "is_causal": True},
    "added": {"attn_mask": "added", "key_padding_mask": "added padding"},
}
BATCH, QUERIES, KEYS, HEADS = 3, 5, 5, 4


def mask(kind):
    causal = torch.ones(QUERIES, KEYS).triu(1).bool()
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 3:] = True
    return {
        "causal": causal,
        "per head": torch.rand(BATCH * HEADS, QUERIES, KEYS) * torch.arange(1, KEYS + 1),
        "padding": padding,
        "added": torch.randn(QUERIES, KEYS),
        "added padding": torch.zeros(BATCH, KEYS).masked_fill_(padding, -torch.inf),
    }[kind]


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(16, HEADS, **{"batch_first": True, **options}).double()


def inputs():
    return torch.randn(2, KEYS, 16, dtype=torch.float64)


def factorized(module, names=PARTS, rank=None):
    """A copy that trains factors of these layers, out of sight, and what its layers are called."""
    module = copy.deepcopy(module)
    split(module, names)
    found = dict(named_layers(module))
    for name in names:
        layer = factorize(found[name], View.of(found[name]), name)
        layer.keep(min(rank or layer.full_rank, layer.full_rank))
    return module


def opened(module):
    """As pairs of plain layers."""
    module = copy.deepcopy(module) if not isinstance(module, TakenApart) else module
    for layer in svd_layers(module).values():
        become_pair(layer, plain_pair(layer))
    open_up(module)
    return module


def trained(module):
    """Every parameter that is trained, each once, by who trains it."""
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


# ------------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_at_full_rank_it_computes_what_torch_computes(masks, need_weights, batch_first):
    whole = attention(batch_first=batch_first)
    shape = (BATCH, QUERIES, 16) if batch_first else (QUERIES, BATCH, 16)
    query, key, value = torch.randn(3, *shape, dtype=torch.float64).unbind()
    options = {name: mask(of) if isinstance(of, str) else of for name, of in masks.items()}
    options = {
        name: of.double() if isinstance(of, torch.Tensor) and of.is_floating_point() else of
        for name, of in options.items()
    }
    expected = whole(query, key, value, need_weights=need_weights, **options)
    for module in (factorized(whole), factorized(whole, ["k_proj"]), factorized(whole, ["out_proj"])):
        actual = module(query, key, value, need_weights=need_weights, **options)
        assert_same(actual[0], expected[0], (4, 16))
        if need_weights:
            assert_same(actual[1], expected[1], (4, 16))
        else:
            assert actual[1] is expected[1] is None


@pytest.mark.parametrize(
    "options",
    [{"kdim": 6, "vdim": 10}, {"kdim": 16, "vdim": 10}, {"bias": False}, {"num_heads": 1}],
    ids=["keys and values", "values", "no bias", "one head"],
)
def test_other_shapes_of_attention(options):
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(16, **{"num_heads": 4, "batch_first": True, **options}).double()
    query = torch.randn(2, 3, 16).double()
    key, value = torch.randn(2, 7, whole.kdim).double(), torch.randn(2, 7, whole.vdim).double()
    module = factorized(whole)
    for average in (True, False):
        expected = whole(query, key, value, average_attn_weights=average)
        for ours, theirs in zip(module(query, key, value, average_attn_weights=average), expected, strict=True):
            assert_same(ours, theirs, (4, 16))
    unbatched = [x[0] for x in (query, key, value)]
    for ours, theirs in zip(module(*unbatched), whole(*unbatched), strict=True):
        assert_same(ours, theirs, (4, 16))
    for dense in (module.state_dict(), to_dense(module).state_dict(), to_dense(opened(module)).state_dict()):
        assert [*dense] == [*whole.state_dict()]
        for name, weight in whole.state_dict().items():
            assert_same(dense[name], weight, (16, 16))


def test_low_rank_forms_compute_what_their_dense_weights_do():
    module = factorized(attention(), rank=3)
    x, dense = inputs(), copy.deepcopy(module)
    assert type(dense) is nn.MultiheadAttention
    expected = dense(x, x, x)[0]
    assert_same(module(x, x, x)[0], expected, (8, 16))
    for layer in svd_layers(module).values():
        layer.to_pair()
    assert_same(module(x, x, x)[0], expected, (8, 16))
    assert_same(opened(module)(x, x, x)[0], expected, (8, 16))


def test_a_causal_hint_leaves_the_kernel_without_a_mask(monkeypatch):
    whole, x, seen = attention(), inputs(), []
    of_torch = nn.functional.scaled_dot_product_attention

    def noting(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        seen.append((attn_mask is None, is_causal))
        return of_torch(q, k, v, attn_mask, dropout_p, is_causal)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    module, causal = factorized(whole), {"attn_mask": mask("causal"), "is_causal": True}
    assert_same(
        module(x, x, x, need_weights=False, **causal)[0], whole(x, x, x, need_weights=False, **causal)[0], (4, 16)
    )
    assert seen == [(True, True), (True, True)]


def test_a_hint_without_a_mask_is_refused_as_by_torch():
    whole, x = attention(), inputs()
    for module in (whole, factorized(whole), opened(factorized(whole, rank=2))):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(x, x, x, is_causal=True)


def test_dropout_acts_on_the_weights_in_training_only():
    module = factorized(attention(dropout=0.5))
    x = torch.randn(2, 64, 16).double()
    assert (module(x, x, x)[1] == 0).any()
    assert (module.eval()(x, x, x)[1] > 0).all()


def test_while_all_parts_are_dense_it_is_torchs_own():
    whole, x = attention(), inputs()
    before = ids(whole)
    split(whole, PARTS)
    for name, layer in [*named_layers(whole)]:
        if name in PARTS:
            factorize(layer, View.of(layer), name, form="dense")
    assert isinstance(whole, SplitAttention) and [*svd_layers(whole)] == [*PARTS]
    assert ids(whole) == before and type(whole.in_proj_weight) is nn.Parameter
    assert torch.equal(whole(x, x, x)[0], attention()(x, x, x)[0])
    assert {id(p) for p in trained(whole).values()} == set(before.values())
    with torch.no_grad():
        whole.in_proj_weight += 1  # what a part says of its weight is what is trained
    assert_same(svd_layers(whole)["k_proj"].rebuilt(), attention().in_proj_weight[16:32] + 1, (16, 16))


def test_gradients_reach_every_factor_as_they_reach_the_weights():
    whole = attention()
    module, x = factorized(whole), inputs()
    for each in (whole, module):
        each(x, x, x)[0].square().sum().backward()
    dense = dict(zip(PARTS, [*whole.in_proj_weight.grad.chunk(3), whole.out_proj.weight.grad], strict=True))
    for name, layer in svd_layers(module).items():
        U, s, V = layer.form.trained
        assert_same(U.grad, dense[name] @ V * s, (64, 64))
        assert s.grad is not None and V.grad is not None
    assert_same(module.in_proj_bias.grad, whole.in_proj_bias.grad, (64, 64))
    module.zero_grad()
    assert all(p.grad is None for p in trained(module).values())


def test_under_functional_call_it_computes_with_the_given_weights():
    module, other, x = (
        factorized(attention(), rank=2),
        nn.MultiheadAttention(16, HEADS, batch_first=True).double(),
        inputs(),
    )
    given = {name: p.detach() for name, p in other.named_parameters()}
    assert_same(functional_call(module, given, (x, x, x))[0], other(x, x, x)[0], (4, 16))
    packed = {"in_proj_weight": other.in_proj_weight.detach()}
    dense = copy.deepcopy(module)
    assert_same(functional_call(module, packed, (x, x, x))[0], functional_call(dense, packed, (x, x, x))[0], (4, 16))
    assert_same(module(x, x, x)[0], dense(x, x, x)[0], (8, 16))  # and as before afterwards


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("grad", [True, False])
def test_torchs_fast_paths_leave_factors_alone(grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, HEADS, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    begin(encoder, plan(encoder))
    with torch.set_grad_enabled(grad):
        expected = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    for factors in svd_layers(encoder).values():
        factors.to_svd()
    with torch.set_grad_enabled(grad):
        actual = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    assert_same(actual[0], expected[0], (64, 64))
    assert_same(actual[1][0], expected[1][0], (64, 64))
    assert_same(actual[1][1, :3], expected[1][1, :3], (64, 64))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_compiles():
    module, x = factorized(attention(), rank=3), inputs()
    compiled = torch.compile(module, backend="aot_eager")
    assert_same(compiled(x, x, x)[0], module(x, x, x)[0], (8, 16))
    compiled(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in trained(module).values())


# --------------------------------------------------------------------------------------------------- what it shows


def test_it_shows_torchs_own_parameters_whatever_it_trains():
    for options in ({}, {"kdim": 6, "vdim": 10}, {"bias": False}):
        whole = attention(**options)
        before, expected = ids(whole), {name: value.clone() for name, value in whole.state_dict().items()}
        split(whole, PARTS)
        for name in PARTS:
            layer = dict(named_layers(whole))[name]
            factorize(layer, View.of(layer), name)
            assert ids(whole) == before and isinstance(whole, nn.MultiheadAttention)
            state = whole.state_dict()
            assert [*state] == [*expected] and all(type(value) is torch.Tensor for value in state.values())
            for key, value in expected.items():
                assert_same(state[key], value, (16, 16))
        trained(whole)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_an_optimizer_can_follow_in_any_order(order):
    """Of what it held the new ones take the place, each once."""
    whole = attention()
    begin(whole, plan(whole))
    held = {id(p) for p in whole.parameters()}
    layers = svd_layers(whole)
    for name in [*(PARTS[index] for index in order), "out_proj"]:
        old, new = layers[name].to_svd()
        assert {id(p) for p in old} <= held and not {id(p) for p in new} & held
        held = held - {id(p) for p in old} | {id(p) for p in new}
        assert held == {id(p) for p in trained(whole).values()}
    for layer in layers.values():
        layer.keep(2)
    for old, new in [*(layer.shrink() for layer in layers.values()), *(layer.to_pair() for layer in layers.values())]:
        held = held - {id(p) for p in old} | {id(p) for p in new}
    assert held == {id(p) for p in trained(whole).values()}
    for old, new in undo(whole):
        held = held - {id(p) for p in old} | {id(p) for p in new}
    assert held == {id(p) for p in whole.parameters()}


def test_states_load_in_the_middle():
    module, other = factorized(attention()), nn.MultiheadAttention(16, HEADS, batch_first=True).double()
    assert not module.load_state_dict(other.state_dict()).missing_keys
    for name, value in module.state_dict().items():
        assert_same(value, other.state_dict()[name], (16, 16))
    for layer in svd_layers(module).values():
        layer.keep(2)
    state = copy.deepcopy(module.state_dict())
    module.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    with pytest.warns(UserWarning, match="what was loaded into it is"):
        module.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "in_proj_weight"'):
        module.load_state_dict({name: value for name, value in state.items() if name != "in_proj_weight"})
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        module.load_state_dict(state | {"in_proj_weight": torch.zeros(3, 3)})


@pytest.mark.parametrize("names", [PARTS, ["k_proj"], ["out_proj"]], ids=["all", "k_proj", "out_proj"])
def test_copies_and_pickles_are_torchs_own(names):
    module, x = factorized(attention(), names, rank=3), inputs()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is nn.MultiheadAttention and not any(isinstance(m, SVDLayer) for m in twin.modules())
        assert vars(twin).keys() == vars(attention()).keys()
        assert_same(twin(x, x, x)[0], module(x, x, x)[0], (8, 16))


@pytest.mark.parametrize("names", [PARTS, ["k_proj"]], ids=["all", "k_proj"])
@pytest.mark.parametrize("options", [{}, {"kdim": 16, "vdim": 10}], ids=["packed", "separate"])
def test_it_moves_with_its_factors(options, names):
    module = factorized(attention(**options), names, rank=3)
    before = ids(module)
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        assert ids(module) == before
        assert {p.dtype for p in (*module.parameters(), *trained(module).values())} == {dtype}
        x, value = inputs().to(dtype), torch.randn(2, KEYS, module.vdim, dtype=dtype)
        assert_same(module(x, x, value)[0], copy.deepcopy(module)(x, x, value)[0], (8, 16))
    with module.showing_factors():
        module.float()  # as a strategy may do
    assert {p.dtype for p in (*module.parameters(), *trained(module).values())} == {torch.float32}


def test_a_part_that_trains_dense_weights_follows_what_becomes_of_them():
    module = factorized(attention(), ["out_proj"])
    module.in_proj_weight = nn.Parameter(torch.zeros(48, 16).double())
    assert not module.q_proj.weight.any()
    module.float()
    assert module.q_proj.weight.dtype == torch.float32
    with torch.no_grad():
        module.in_proj_weight.fill_(2.0)
    assert (module.q_proj.weight == 2).all()


def test_a_weight_cannot_be_replaced_while_its_layers_train_factors():
    module = factorized(attention(), ["q_proj"])
    with pytest.raises(RuntimeError, match=r"in_proj_weight.*exclude_modules=\['q_proj', 'k_proj', 'v_proj'\]"):
        module.in_proj_weight = nn.Parameter(torch.zeros(48, 16))
    with pytest.raises(RuntimeError, match="in_proj_weight"), torch.no_grad():
        module.in_proj_weight.mul_(2)


# ------------------------------------------------------------------------------------------ with its factors in sight


def test_shown_factors_are_its_parameters_and_states_stay_dense():
    whole, x = attention(), inputs()
    module = copy.deepcopy(whole)
    decompose(module, exclude_modules=["v_proj"])
    names = [name for name, _ in module.named_parameters()]
    factors = [f"{part}.{factor}" for part in ("q_proj", "k_proj") for factor in ("U", "s", "V")]
    assert names == [*factors, "v_proj.weight", "in_proj_bias", *(f"out_proj.{of}" for of in ("U", "s", "V", "bias"))]
    assert {id(p) for p in module.parameters()} == {id(p) for p in trained(module).values()}
    assert [*module.state_dict()] == [*whole.state_dict()]
    assert_same(module.in_proj_weight.detach(), whole.in_proj_weight.detach(), (16, 16))
    module.q_proj.keep(2)
    module.q_proj.shrink()
    assert dict(module.named_parameters())["q_proj.U"].shape == (16, 2)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.float().double()):
        assert [name for name, _ in twin.named_parameters()] == names and twin.q_proj.rank == 2
        assert_same(twin(x, x, x)[0], module(x, x, x)[0], (8, 16), factor=1e9)
        assert type(twin.in_proj_weight) is DenseWeight
        twin(x, x, x)[0].sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
    given = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert not functional_call(module, given, (x, x, x))[0].any()
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    undo(module)
    assert type(module) is nn.MultiheadAttention
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in whole.named_parameters()]


# ----------------------------------------------------------------------------------------------- to what it becomes


@pytest.mark.parametrize("names", [PARTS, ["k_proj"], ["out_proj"]], ids=["all", "k_proj", "out_proj"])
@pytest.mark.parametrize(
    "options", [{}, {"kdim": 16, "vdim": 10}, {"bias": False}], ids=["packed", "separate", "no bias"]
)
def test_joined_it_is_torchs_own_with_the_very_parameters(options, names):
    whole = attention(**options)
    before, state = ids(whole), copy.deepcopy(whole.state_dict())
    attributes = vars(whole).keys()
    split(whole, names)
    found = dict(named_layers(whole))
    layers = [factorize(found[name], View.of(found[name]), name) for name in names]
    assert not join(whole) and isinstance(whole, TakenApart)
    for layer in layers:
        release(layer)
    replaced = join(whole)
    assert type(whole) is nn.MultiheadAttention and ids(whole) == before and vars(whole).keys() == attributes
    assert type(whole.in_proj_weight) is nn.Parameter or options.get("vdim")
    packed = not options.get("vdim") and names != ["out_proj"]
    assert [[len(side) for side in pair] for pair in replaced] == ([[3, 1]] if packed else [])
    for name, value in whole.state_dict().items():
        assert_same(value, state[name], (16, 16))


@pytest.mark.parametrize("names", [PARTS, ["k_proj"], ["out_proj"]], ids=["all", "k_proj", "out_proj"])
def test_opened_its_parts_are_its_children(names):
    module, x = factorized(attention(), names, rank=3), inputs()
    expected = module(x, x, x)[0]
    for name in names:
        become_pair(svd_layers(module)[name], plain_pair(svd_layers(module)[name]))
    held = {id(p) for p in module.parameters()}
    for old, new in open_up(module):
        assert {id(p) for p in old} <= held
        assert {id(p) for p in new} <= {id(p) for p in module.parameters()}
    assert [name for name, _ in module.named_children()] == [*PARTS] and [*low_rank_pairs(module)] == [*names]
    assert isinstance(module, (SplitAttention, nn.MultiheadAttention)) and not owners_of(module)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert_same(twin.eval()(x, x, x)[0], expected, (8, 16))
        assert twin.state_dict().keys() == module.state_dict().keys()
    module(x, x, x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    dense = to_dense(module)
    assert type(dense) is nn.MultiheadAttention and vars(dense).keys() == vars(attention()).keys()
    assert type(dense.out_proj) is type(attention().out_proj)
    assert [name for name, _ in dense.named_parameters()] == [name for name, _ in attention().named_parameters()]
    assert_same(dense(x, x, x)[0], expected, (8, 16))


def test_only_the_chosen_projections_are_factorized_and_frozen_ones_stay_frozen():
    whole = attention().requires_grad_(False)
    decompose(whole, target_modules=["v_proj", "out_proj"])
    assert [*svd_layers(whole)] == ["v_proj", "out_proj"]
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(p.requires_grad for p in to_dense(whole).parameters())
    assert not any(p.requires_grad for p in opened(factorized(attention().requires_grad_(False))).parameters())


# -------------------------------------------------------------------------------------------------------- which ones


def test_the_plan_names_each_projection():
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    names = [layer.name for layer in plan(encoder) if not layer.skipped]
    assert names == [*(f"self_attn.{part}" for part in PARTS), "linear1", "linear2"]
    assert type(encoder.self_attn) is nn.MultiheadAttention
    begin(encoder, plan(encoder, ["k_proj", "linear1"]))
    layers = {layer.name: layer.skipped for layer in plan(encoder)}
    assert [*layers] == names
    assert {name for name, skipped in layers.items() if skipped} == {"self_attn.k_proj", "linear1"}


class UserAttention(nn.MultiheadAttention):
    """Might do anything in its forward."""


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn"),
        (UserAttention(8, 2), "subclass of MultiheadAttention"),
        (nn.MultiheadAttention(8, 2, device="meta"), "meta device"),
    ],
)
def test_what_cannot_be_taken_apart_is_skipped_with_the_reason(module, reason):
    planned = plan(nn.Sequential(module, nn.Linear(8, 8)))
    assert [layer.name for layer in planned if reason in (layer.skipped or "")] == [f"0.{part}" for part in PARTS]


def test_tied_projections_are_skipped():
    first, second = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    second.in_proj_weight = first.in_proj_weight
    skipped = {layer.name for layer in plan(nn.ModuleList([first, second])) if "tied" in (layer.skipped or "")}
    assert skipped >= {f"{i}.{part}" for i, part in itertools.product((0, 1), PARTS[:3])}


def test_a_refused_weight_leaves_the_module_as_it_was():
    whole = attention()
    with torch.no_grad():
        whole.in_proj_weight[20, 3] = torch.nan  # of k_proj
    before, values = ids(whole), whole.in_proj_weight.detach().clone()
    with pytest.raises(ValueError, match="k_proj"):
        decompose(whole)
    assert type(whole) is nn.MultiheadAttention and ids(whole) == before
    assert torch.equal(whole.in_proj_weight.isnan(), values.isnan())


def test_parts_are_told_what_they_get():
    module = factorized(attention())
    x, memory = torch.randn(2, 3, 16).double(), torch.randn(2, 7, 16).double()
    shapes = module.input_shapes(x, memory, memory, need_weights=False)
    of_query, of_memory = [(2, 3, 16)], [(2, 7, 16)]
    assert shapes == {"q_proj": of_query, "k_proj": of_memory, "v_proj": of_memory, "out_proj": of_query}
    assert [*linears_of(module)] == [*shapes]


def test_a_part_that_was_never_factorized_can_become_a_pair():
    whole, x = attention(), inputs()
    begin(whole, plan(whole, ["k_proj"]))
    held = ids(whole)
    expected, layer = whole(x, x, x)[0], svd_layers(whole)["k_proj"]
    become_pair(layer, plain_pair(layer))
    replaced = open_up(whole)
    assert [id(old) for (old,), _ in replaced] == [held["in_proj_weight"], held["in_proj_bias"]]
    assert [len(new) for _, new in replaced] == [2, 3]
    assert_same(whole(x, x, x)[0], expected, (16, 16))
