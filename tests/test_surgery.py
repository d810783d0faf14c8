"""Changing a tree of modules: what is chosen and why not, what stays as it was, and that every way back is exact."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, counted_macs, svd_of
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.layers.layer import SVDLayer, own_class
from lightning_svd.layers.pairs import factored_pair
from lightning_svd.layers.views import View
from lightning_svd.model.counting import count_costs, count_params
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import begin, compact, decompose, finish, to_dense, undo
from lightning_svd.model.surgery import to_factored as to_factored_by


class UserLinear(nn.Linear):
    """Might do anything in its forward."""


class UserEncoderLayer(nn.TransformerEncoderLayer):
    """Inherits the eval fast path."""


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


class Net(nn.Module):
    """A convolution, linear layers and an attention product, with one layer reachable in three ways."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, stride=2)
        self.blocks = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.plain_list = [*self.blocks]
        self.second_name = self.blocks[0]
        self.head = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 10, bias=False))

    def forward(self, images):
        tokens = self.conv(images).flatten(2).mT
        hidden = self.plain_list[0](tokens)
        attended = F.scaled_dot_product_attention(hidden[:, None], hidden[:, None], hidden[:, None])[:, 0]
        return self.head(self.plain_list[1](attended).mean(1))


NAMES = ["conv", "blocks.0", "blocks.1", "head.1"]
ATTENTION = 2 * 16 * 16 * 12 * 2  # query with key, weights with value: 16 tokens of 12 features, 2 images
SHAPE = (4, 36)  # the longest sums in Net: 4 layers of up to 36 inputs each


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def images():
    return torch.randn(2, 3, 8, 8, dtype=torch.float64)


def net():
    return Net().double().eval()


def to_factored(model):
    return to_factored_by(model, count_params(model))


def to_compact(model):
    return compact(copy.deepcopy(model), count_params(model))


def decomposed(*share_kept):
    """Net, each layer pruned to its share of ranks."""
    model = net()
    decompose(model)
    for layer, share in zip(svd_layers(model).values(), share_kept, strict=False):
        layer.keep(math.ceil(share * layer.full_rank))
    return model


def chosen(module, *arguments, **options):
    return [layer.name for layer in plan(module, *arguments, **options) if not layer.skipped]


def reason(module, name, **options):
    return {layer.name: layer.skipped for layer in plan(module, **options)}[name]


class DropsWeights(nn.Module):
    """Gives a recurrent module other tensors for a weight in each call, as fastai's ``WeightDropout``."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(12, 16)
        self.raw = nn.Parameter(self.rnn.weight_hh_l0.detach().clone())
        self.rnn._parameters["weight_hh_l0"] = F.dropout(self.raw, 0.5, training=False)


def pruned_attention():
    module = nn.MultiheadAttention(16, 2)
    prune.l1_unstructured(module, "in_proj_weight", 0.3)
    return module


# ------------------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("build", "name", "why"),
    [
        (Tied, "head", "weight tied to another module's"),
        (Tied, "embed", "lookups cost no MACs; name it to save parameters"),
        (lambda: nn.Sequential(nn.Bilinear(4, 8, 3)), "0", "unsupported type"),
        (lambda: nn.Sequential(UserLinear(8, 8)), "0", "subclass of Linear, which may have a forward of its own"),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)),
            "0",
            "too thin: even rank 1 costs as much as the dense layer",
        ),
        (lambda: nn.Sequential(nn.Linear(8, 8, device="meta")), "0", "on the meta device, without values"),
        (lambda: nn.Sequential(nn.Linear(8, 1)), "0", "too thin: even rank 1 costs as much as the dense layer"),
        (
            lambda: nn.Sequential(svd_of(nn.Linear(8, 8))),
            "0",
            "already factorized; `to_dense(model)` makes it a dense layer again",
        ),
        (
            lambda: nn.Sequential(factored_pair(View.of(nn.Linear(8, 8)), 2, True)),
            "0.1",
            "one of the two layers of a low-rank one; `to_dense(model)` makes them one again",
        ),
        (
            pruned_attention,
            "v_proj",
            "in an attention or recurrent module (MultiheadAttention) with a weight that is computed from other "
            "parameters",
        ),
        (DropsWeights, "rnn.ih_l0", "weight tied to another module's"),
    ],
)
def test_a_layer_is_skipped_with_its_reason(build, name, why):
    assert reason(build(), name) == why


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_padding_row_that_is_not_zero_would_move(value):
    embedding = nn.Embedding(20, 16, padding_idx=3)
    nn.init.constant_(embedding.weight[3], value)
    why = reason(embedding, "", target_modules=["Embedding"])
    assert (why is not None) == bool(value) and "padding row" in (why or "padding row")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(4), lambda: nn.LazyConv2d(4, 3)])
def test_a_lazy_layer_is_skipped_because_it_is_not_initialized(lazy):
    assert reason(nn.Sequential(lazy()), "0") == "not initialized yet"


@pytest.mark.parametrize(
    ("conv", "conv_mode", "thin"),
    [
        (lambda: nn.Conv2d(1, 16, (1, 5)), "channel", False),  # 16 x 5
        (lambda: nn.Conv2d(1, 16, (1, 5)), "spatial", True),  # 80 x 1
        (lambda: nn.Conv2d(8, 1, 3), "channel", True),  # 1 x 72
        (lambda: nn.Conv2d(8, 1, 3), "spatial", False),  # 3 x 24
    ],
)
def test_thinness_is_judged_by_the_matrix_of_the_mode(conv, conv_mode, thin):
    assert bool(reason(conv(), "", conv_mode=conv_mode)) == thin


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("encoder_layer", [nn.TransformerEncoderLayer, UserEncoderLayer])
@pytest.mark.parametrize("stacked", [False, True])
def test_torchs_transformer_evaluates_in_every_form_and_takes_its_fast_path_when_dense(encoder_layer, stacked):
    def fast(module):
        layers = module.layers if stacked else [module]
        flags = [layer.activation_relu_or_gelu for layer in layers]
        return [*flags, module.use_nested_tensor] if stacked else flags

    encoder = encoder_layer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    if stacked:
        encoder = nn.TransformerEncoder(encoder, 2).eval()
    x, before, held = torch.randn(2, 5, 16), fast(encoder), dict(encoder.named_parameters())
    padding = {"src_key_padding_mask": torch.arange(5) > torch.tensor([[4], [2]])}
    real = ~padding["src_key_padding_mask"]  # at the others the paths differ, dense too
    with torch.no_grad():  # where the fast path is taken
        expected = encoder(x, **padding)[real]
        layers = begin(encoder, plan(encoder))
        assert len(layers) == (12 if stacked else 6)
        weights = {name: layer.rebuilt().detach() for name, layer in layers.items()}
        for layer in layers.values():
            layer.to_svd()
        # The weights are no plain tensors now, which turns torch's fast path off by itself.
        assert_same(encoder(x, **padding)[real], expected, SHAPE)
        for layer in layers.values():
            layer.keep(4)
        low_rank = encoder(x, **padding)[real]
        forms = {"factored": to_factored(encoder), "dense": to_dense(encoder), "both": to_dense(to_factored(encoder))}
        for form in forms.values():
            assert_same(form(x, **padding)[real], low_rank, SHAPE)
        assert not any(fast(forms["factored"]))
        assert all(fast(each) == before for each in (forms["dense"], forms["both"], encoder))
        undo(encoder, weights)
        assert fast(encoder) == before and torch.equal(encoder(x, **padding)[real], expected)
    assert [(name, id(p)) for name, p in encoder.named_parameters()] == [(name, id(p)) for name, p in held.items()]


def test_a_plan_describes_matrices_and_changes_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    by_name = {layer.name: layer for layer in plan(model, conv_mode="spatial")}
    assert list(by_name) == NAMES
    conv, linear = by_name["conv"], by_name["head.1"]
    assert (conv.kind, conv.weight_shape, conv.matrix_shape, conv.conv_mode) == (
        ("Conv2d", (12, 3, 3, 3), (36, 9), "spatial")
    )
    assert (conv.full_rank, conv.break_even) == (9, (36 * 9 - 1) // 45)
    assert (linear.kind, linear.matrix_shape, linear.conv_mode, linear.full_rank) == ("Linear", (10, 12), None, 10)
    assert type(model.conv) is nn.Conv2d
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("conv", "mode"),
    [
        (lambda: nn.Conv2d(32, 32, 3), "channel"),  # 32 x 288, not 96 x 96
        (lambda: nn.Conv2d(3, 64, 3), "spatial"),  # 192 x 9, not 64 x 27
        (lambda: nn.Conv2d(16, 16, 1), "channel"),  # the same matrix
    ],
)
def test_auto_takes_the_mode_with_fewer_parameters_at_full_rank(conv, mode):
    def full_rank_params(conv_mode):
        view = View.of(conv(), conv_mode)
        return min(view.matrix_shape) * view.params_per_rank

    (layer,) = plan(conv(), conv_mode="auto")
    assert layer.conv_mode == mode == min(("channel", "spatial"), key=full_rank_params)
    model = nn.Sequential(conv())
    decompose(model, conv_mode="auto")
    assert model[0].conv_mode == mode


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"`conv_mode` must be one of channel, spatial, auto, got 'depth'"):
        plan(net(), conv_mode="depth")


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (None, NAMES),
        (["conv"], ["conv"]),
        (["blocks.1"], ["blocks.1"]),
        (["1"], ["blocks.1", "head.1"]),  # the end of a name, after a dot
        (["conv", "head.1"], ["conv", "head.1"]),
        (r"blocks\.\d", ["blocks.0", "blocks.1"]),
        (r".*\.1", ["blocks.1", "head.1"]),
        (r"conv|head\.1", ["conv", "head.1"]),
    ],
)
def test_layers_are_targeted_and_excluded_by_name_suffix_or_expression(targets, names):
    assert chosen(net(), targets) == names
    if targets is not None:
        assert chosen(net(), exclude_modules=targets) == [name for name in NAMES if name not in names]
        left_out = next(name for name in NAMES if name not in names)
        assert reason(net(), left_out, target_modules=targets) == "not in `target_modules`"
        assert reason(net(), names[0], exclude_modules=targets) == "excluded by `exclude_modules`"


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("value", "culprit"),
    [
        (["typo"], "typo"),
        (["conv", "typo"], "typo"),
        (["locks.0"], "locks.0"),  # not a whole part of a name
        (["blocks"], "blocks"),  # holds layers, is none
        ("block", "block"),  # an expression must match a whole name
        (r"head\.0", r"head\\\\.0"),  # LayerNorm holds no matrix
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_by_name(argument, value, culprit):
    with pytest.raises(ValueError, match=rf"`{argument}`: '{culprit}' matches no layer with a weight matrix"):
        plan(net(), **{argument: value})


@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_a_bad_regular_expression_is_refused_by_name(argument):
    with pytest.raises(ValueError, match=rf"`{argument}`: '\(' matches no layer"):
        plan(net(), **{argument: "("})


@pytest.mark.parametrize(
    ("build", "options", "why"),
    [
        (nn.ReLU, {}, "ReLU has no layer to factorize .no linear layer or convolution in it"),
        (lambda: nn.Sequential(nn.Linear(8, 1)), {}, "Sequential has no layer to factorize .0: too thin"),
        (Net, {"target_modules": []}, "Net has no layer to factorize .conv, blocks.0, .*: not in `target_modules`"),
        (lambda: svd_of(nn.Linear(8, 8)), {}, "the module itself: already factorized"),
    ],
)
def test_nothing_to_factorize_is_refused_with_the_reasons(build, options, why):
    with pytest.raises(ValueError, match=why):
        decompose(build(), **options)


# ------------------------------------------------------------------------------------------------------------ in place


def test_every_reference_to_a_layer_stays_valid(images):
    model = net()
    layers = {name: model.get_submodule(name) for name in NAMES}
    calls = []
    model.blocks[1].register_forward_hook(lambda module, args, output: calls.append(module))
    model.conv.note = "the user's own"
    model.blocks[0].train()
    biases = {name: layer.bias for name, layer in layers.items()}
    expected = model(images)
    calls.clear()
    decompose(model)
    assert all(isinstance(layer, SVDLayer) for layer in layers.values())
    assert [own_class(layer) for layer in layers.values()] == [nn.Conv2d, nn.Linear, nn.Linear, nn.Linear]
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert model.plain_list[0] is model.second_name is model.blocks[0]
    assert all(layer.bias is biases[name] for name, layer in layers.items())
    assert model.conv.note == "the user's own"
    assert model.blocks[0].training and not model.blocks[1].training
    assert_same(model(images), expected, SHAPE)
    assert calls == [model.blocks[1]]


def test_a_frozen_weight_gives_frozen_factors():
    model = net()
    model.conv.weight.requires_grad_(False)
    assert reason(model, "conv") == "frozen; name it in `target_modules` to factorize it all the same"
    decompose(model, NAMES)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not trainable & {"conv.U", "conv.s", "conv.V"}
    assert {"conv.bias", "blocks.0.U", "blocks.0.s", "blocks.0.V"} <= trainable
    assert not to_dense(model).conv.weight.requires_grad
    assert to_dense(model).blocks[0].weight.requires_grad


def test_an_optimizer_trains_what_decompose_leaves(images):
    model = decomposed(0.5, 0.5, 0.5, 0.5)
    names = [name for name, _ in model.named_parameters()]
    assert names == [
        *(f"{layer}.{p}" for layer in ("conv", "blocks.0", "blocks.1") for p in ("U", "s", "V", "bias")),
        *("head.0.weight", "head.0.bias", "head.1.U", "head.1.s", "head.1.V"),
    ]
    before = copy.deepcopy(dict(model.named_parameters()))
    assert not any(isinstance(p, DenseWeight) for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_layer_itself_can_be_decomposed_and_made_dense():
    linear = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    expected = linear(x)
    (layer,) = decompose(linear)
    assert layer.name == "" and isinstance(linear, SVDLayer)
    assert_same(linear(x), expected, (5, 6))
    assert type(to_dense(linear)) is nn.Linear


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_refusal_changes_nothing_at_all(value):
    model = net()
    with torch.no_grad():
        model.head[1].weight[3, 4] = value
    parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`head\.1`: expected finite weights, got 1 NaN or infinite of 120"):
        decompose(model)
    assert [type(model.get_submodule(name)) for name in NAMES] == [nn.Conv2d, nn.Linear, nn.Linear, nn.Linear]
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for key, now in model.state_dict().items():
        assert torch.equal(now.view(torch.int64), values[key].view(torch.int64)), key  # NaN is not equal to itself


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
def test_undo_gives_back_the_very_parameters_with_the_very_values(form, images):
    model = net()
    expected, parameters = model(images), dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    layers = begin(model, plan(model))
    weights = {name: layer.rebuilt().detach() for name, layer in layers.items()}
    for layer in layers.values():
        if form != "dense":
            layer.to_svd()
            layer.keep(2)
        if form == "pair":
            layer.to_pair()
    replaced = undo(model, weights)
    # What an optimizer is told: the weights are in the places of what was trained.
    given_back = [] if form == "dense" else [[parameters[f"{name}.weight"]] for name in NAMES]
    assert [new for _, new in replaced if new] == given_back
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(n, id(p)) for n, p in parameters.items()]
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert list(model.state_dict()) == list(values)
    assert all(torch.equal(now, values[key]) for key, now in model.state_dict().items())
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("shown", [False, True])
def test_finish_gives_each_layer_its_form_in_place_and_says_what_replaced_what(shown, images):
    model = net()
    if shown:
        decompose(model)
    else:
        for layer in begin(model, plan(model)).values():
            layer.to_svd()
    layers = svd_layers(model)
    for layer in layers.values():
        layer.keep(2)
    expected, held = model(images), {name: layer.form.trained for name, layer in layers.items()}
    objects = {name: model.get_submodule(name) for name in NAMES}
    replaced = finish(model, {"conv": "pair", "blocks.0": "dense", "blocks.1": "decomposed"})
    assert_same(model(images), expected, SHAPE)
    assert all(model.get_submodule(name) is layer for name, layer in objects.items())
    assert [type(model.get_submodule(name)) for name in ("conv", "blocks.0")] == [nn.Sequential, nn.Linear]
    assert sorted(svd_layers(model)) == ["blocks.1", "head.1"]
    now = {id(p) for p in model.parameters()}
    in_place = {id(old[0]): new for old, new in replaced if old}
    for name in ("conv", "blocks.0", "blocks.1"):
        assert {id(p) for p in in_place[id(held[name][0])]} <= now, name
    assert {"blocks.1.U", "blocks.1.s", "blocks.1.V"} <= {name for name, _ in model.named_parameters()}
    assert model.blocks[1].form.room == 2


def test_become_knows_every_container_of_a_module():
    containers = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
    stays = {f"_{kind}_hooks" for kind in ("backward", "backward_pre", "forward", "forward_pre")}
    stays |= {"_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"}
    stays |= {"_state_dict_hooks", "_state_dict_pre_hooks", "_is_full_backward_hook", "training"}
    stays |= {"_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}
    unknown = set(vars(nn.Linear(2, 2))) ^ (containers | stays | {"in_features", "out_features"})
    assert not unknown, (
        f"nn.Module's attributes changed in torch {torch.__version__}: {sorted(unknown)}. What holds parameters, "
        "buffers or modules, `lightning_svd.model.surgery.become` must take over; hooks and modes stay: add them here"
    )


# ------------------------------------------------------------------------------------------------------- the ways back


def plain(model):
    weights = any(isinstance(p, DenseWeight) for p in model.parameters())
    return not weights and not any(isinstance(module, SVDLayer) for module in model.modules())


def test_to_dense_undoes_decompose(images):
    original = net()
    model = copy.deepcopy(original)
    decompose(model)
    dense = to_dense(model)
    assert plain(dense) and not plain(model)
    assert str(dense) == str(original)
    assert list(dense.state_dict()) == list(original.state_dict())
    for key, value in dense.state_dict().items():
        assert_same(value, original.state_dict()[key], SHAPE)
    assert_same(dense(images), original(images), SHAPE)


@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.3, 0.3), (0.1, 1.0, 0.5, 1.0), (1.0, 1.0, 1.0, 1.0), (0, 0.5, 0, 0)])
@pytest.mark.parametrize("finished", [to_dense, to_factored, to_compact])
def test_every_final_form_computes_what_the_cut_model_does(finished, shares, images):
    model = decomposed(*shares)
    ranks = {name: layer.rank for name, layer in svd_layers(model).items()}
    expected = model(images)
    assert_same(finished(model)(images), expected, SHAPE)
    assert {name: layer.rank for name, layer in svd_layers(model).items()} == ranks  # the model itself is unchanged
    assert torch.equal(model(images), expected)


def test_compact_makes_layers_dense_that_factors_do_not_help():
    model = decomposed(0.1, 1.0, 0.25, 0.9)
    even = {layer.name: layer.break_even for layer in plan(net())}
    ranks = {name: layer.rank for name, layer in svd_layers(model).items()}
    assert compact(model, count_params(model)) is model
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, SVDLayer) == (rank <= even[name])
        assert not isinstance(layer, SVDLayer) or layer.form.room == layer.rank == rank
    assert [isinstance(model.get_submodule(name), SVDLayer) for name in NAMES] == [True, False, True, False]


def test_compact_goes_by_macs_where_they_are_known():
    # 3 x 24 in spatial mode: rank 2 has 54 parameters instead of 72, but the first convolution runs on every column
    # and the second keeps one in eight.
    model = nn.Sequential(nn.Conv2d(8, 1, 3, stride=(1, 8)))
    decompose(model, conv_mode="spatial")
    model[0].keep(2)
    by_macs = count_costs(model, torch.randn(1, 8, 16, 16))
    assert isinstance(to_compact(model)[0], SVDLayer)
    assert type(compact(copy.deepcopy(model), by_macs)[0]) is nn.Conv2d


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("finished", [to_dense, to_factored])
def test_layers_that_were_factorized_one_by_one_become_plain_too(finished, padding_mode):
    conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode=padding_mode)
    x = torch.randn(2, 4, 6, 6)
    by_hand = nn.Sequential(svd_of(copy.deepcopy(conv)))
    assert plain(finished(by_hand))
    assert_same(finished(by_hand)(x), conv(x), (8, 36))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("finished", [to_dense, to_factored])
def test_training_modes_survive(finished, mode):
    model = decomposed(0.1, 0.1, 0.1, 0.1).train(mode)
    assert {module.training for module in finished(model).modules()} == {mode}


# ----------------------------------------------------------------------------------------------------------- the costs


@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0, 1.0), (0.2, 0.4, 1.0, 0.3), (0.1, 0.1, 0.1, 0.1)])
def test_costs_are_what_torch_counts_on_the_dense_and_on_the_final_model(shares, conv_mode, images):
    dense = net()
    model = copy.deepcopy(dense)
    decompose(model, conv_mode=conv_mode)
    for layer, share in zip(svd_layers(model).values(), shares, strict=True):
        layer.keep(math.ceil(share * layer.full_rank))
    ranks = {name: layer.rank for name, layer in svd_layers(model).items()}
    with sdpa_kernel(SDPBackend.MATH):  # which torch counts on every device
        expected = model(images)
        cost = count_costs(model, images)
        final = to_factored_by(model, cost)
        assert cost.dense("macs") == counted_macs(dense, images)
        assert cost.at(ranks, "macs") == counted_macs(final, images)
        assert torch.equal(model(images), expected)
    assert cost.counted and cost.batch_size == 2
    assert cost.other_macs == ATTENTION
    assert cost.at(ranks, "params") == sum(p.numel() for p in final.parameters())
    assert cost.dense("params") == sum(p.numel() for p in dense.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_attention_is_counted_whichever_kernel_computes_it(images):
    model = decomposed()
    assert count_costs(model, images).other_macs == ATTENTION


def test_a_layer_that_runs_twice_costs_twice():
    model = nn.Sequential(nn.Linear(8, 8))
    model.append(model[0])
    x = torch.randn(3, 8)
    expected = counted_macs(model, x)
    decompose(model)
    assert count_costs(model, x).dense("macs") == expected == 2 * 3 * 64


def test_hooks_are_gone_after_a_forward_that_failed():
    model = decomposed()
    with pytest.raises(ValueError, match="to have 3 channels"):
        count_costs(model, torch.randn(1, 4, 8, 8).double())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0, 1.0), (0.2, 0.4, 1.0, 0.3)])
def test_counted_params_are_those_of_the_final_model(shares):
    model = decomposed(*shares)
    ranks = {name: layer.rank for name, layer in svd_layers(model).items()}
    cost = count_params(model)
    assert not cost.counted
    assert cost.at(ranks, "params") == sum(p.numel() for p in to_factored(model).parameters())
    assert cost.dense("params") == sum(p.numel() for p in net().parameters())
    assert cost.ratio(ranks, "params") == cost.at(ranks, "params") / cost.dense("params")
