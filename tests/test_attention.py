"""torch's attention module taken apart: the same results, low-rank projections, and torch's own names in files."""

import copy
import itertools

import pytest
import torch
from helpers import assert_same
from torch import nn

from lightning_svd.attention import SplitAttention
from lightning_svd.costs import svd_layers
from lightning_svd.inspection import inspect_weights
from lightning_svd.pairs import low_rank_pairs
from lightning_svd.plans import plan
from lightning_svd.spectrum_monitor import watched_layers
from lightning_svd.surgery import decompose, restore, to_dense, to_factored

PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
MASKS = {
    "none": {},
    "causal": {"attn_mask": "causal", "is_causal": True},
    "per head": {"attn_mask": "per head"},
    "padding": {"key_padding_mask": "padding"},
    "both": {"attn_mask": "causal", "key_padding_mask": "padding"},
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


def taken_apart(module):
    """As ``decompose`` does it, with every rank."""
    module = copy.deepcopy(module)
    decompose(module)
    assert isinstance(module, SplitAttention)
    return module


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
    expected, actual = (
        module(query, key, value, need_weights=need_weights, **options) for module in (whole, taken_apart(whole))
    )
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
    split = taken_apart(whole)
    for average in (True, False):
        expected = whole(query, key, value, average_attn_weights=average)
        for ours, theirs in zip(split(query, key, value, average_attn_weights=average), expected, strict=True):
            assert_same(ours, theirs, (4, 16))
    unbatched = [x[0] for x in (query, key, value)]
    for ours, theirs in zip(split(*unbatched), whole(*unbatched), strict=True):
        assert_same(ours, theirs, (4, 16))
    dense = to_dense(split).state_dict()
    assert dense.keys() == whole.state_dict().keys()
    for name, weight in whole.state_dict().items():
        assert_same(dense[name], weight, (16, 16))


def test_a_hint_without_a_mask_is_refused_as_by_torch():
    whole = attention()
    x = torch.randn(1, 3, 16).double()
    for module in (whole, taken_apart(whole)):
        with pytest.raises(RuntimeError, match="attn_mask"):
            module(x, x, x, is_causal=True)


def test_dropout_acts_on_the_weights_in_training_only():
    split = taken_apart(attention(dropout=0.5))
    x = torch.randn(2, 64, 16).double()
    dropped = split(x, x, x)[1]
    assert (dropped == 0).any()
    assert (split.eval()(x, x, x)[1] > 0).all()


def test_the_plan_names_each_projection():
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    names = [layer.name for layer in plan(encoder) if not layer.skipped]
    assert names == [*(f"self_attn.{part}" for part in PARTS), "linear1", "linear2"]
    assert isinstance(encoder.self_attn, nn.MultiheadAttention) and not isinstance(encoder.self_attn, SplitAttention)


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
    before = {name: id(p) for name, p in whole.named_parameters()}
    with pytest.raises(ValueError, match="k_proj"):
        decompose(whole)
    assert type(whole) is nn.MultiheadAttention
    assert {name: id(p) for name, p in whole.named_parameters()} == before


def test_restore_brings_back_the_very_parameters():
    encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    before = dict(encoder.named_parameters())
    decompose(encoder)
    now = dict(encoder.named_parameters())
    restore(encoder, {name: p for name, p in before.items() if name not in now})
    assert type(encoder.self_attn) is nn.MultiheadAttention
    assert {name: id(p) for name, p in encoder.named_parameters()} == {name: id(p) for name, p in before.items()}


def test_only_the_chosen_projections_are_factorised_and_frozen_ones_stay_frozen():
    whole = attention().requires_grad_(False)
    decompose(whole, target_modules=["v_proj", "out_proj"])
    assert [*svd_layers(whole)] == ["v_proj", "out_proj"]
    assert not any(p.requires_grad for p in whole.parameters())
    assert not any(p.requires_grad for p in to_dense(whole).parameters())


def test_attention_without_low_rank_projections_is_torchs_own_again():
    whole = attention()
    split = taken_apart(whole)
    assert type(to_factored(split)) is nn.MultiheadAttention  # every rank is kept: no factors pay
    for layer in svd_layers(split).values():
        layer.keep(torch.arange(16) < 3)
    factored = to_factored(split)
    assert [*low_rank_pairs(factored)] == [*PARTS]
    dense = to_dense(factored)
    assert type(dense) is nn.MultiheadAttention
    x = torch.randn(2, 5, 16).double()
    assert_same(dense(x, x, x)[0], factored(x, x, x)[0], (8, 16))


def test_spectra_of_a_plain_model_are_read_projection_by_projection():
    whole = nn.Sequential(attention().float())
    assert [layer.name for layer in watched_layers(whole)] == [f"0.{part}" for part in PARTS]
    inspected = {layer.name: layer.spectrum for layer in inspect_weights(whole.state_dict())}
    expected = torch.linalg.svdvals(whole[0].in_proj_weight.detach()[16:32].float())
    assert_same(torch.tensor(inspected["0.k_proj"]), expected, (16, 16))
