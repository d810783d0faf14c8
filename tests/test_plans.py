"""Layers are chosen as people name them, and a plan survives a file and an editor."""

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from models import EqualRate, SmallNet, data, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_svd import SVDReport, SVDTrainingCallback, decompose, plan, read_plan, svd_layers, write_plan
from lightning_svd.model.plan import LayerPlan, large_left_alone
from lightning_svd.ranks.costs import LayerCost, ModelCost
from lightning_svd.training.recipe import Recipe


def net():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 16, 3),
            "blocks": nn.ModuleList(
                nn.ModuleDict({"conv": nn.Conv2d(16, 16, 3), "fc": nn.Linear(16, 32)}) for _ in range(2)
            ),
            "up": nn.ConvTranspose2d(16, 16, 3, groups=2),
            "embed": nn.EmbeddingBag(9, 16),
            "head": nn.Linear(16, 12),
        }
    )


def factorized(layer_plans):
    return [layer.name for layer in layer_plans if not layer.skipped]


CONVS, LINEARS = ["blocks.0.conv", "blocks.1.conv"], ["blocks.0.fc", "blocks.1.fc"]


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("Conv2d", ["stem", *CONVS]),
        (["ConvTranspose2d", "head"], ["up", "head"]),
        ("all-linear", [*LINEARS, "head"]),
        (["all-linear", "stem"], ["stem", *LINEARS, "head"]),
        ("conv", CONVS),
        (r"blocks\.0\..*", ["blocks.0.conv", "blocks.0.fc"]),
        ([r".*\.fc", "stem"], ["stem", *LINEARS]),
    ],
)
def test_layers_are_named_by_name_type_pattern_or_all_linear(targets, names):
    everything = factorized(plan(net()))
    assert sorted(factorized(plan(net(), targets))) == sorted(names)
    assert factorized(plan(net(), exclude_modules=targets)) == [name for name in everything if name not in names]


def test_the_most_ranks_of_a_layer_are_given_by_patterns_of_which_the_last_counts():
    layers = {layer.name: layer.max_rank for layer in plan(net(), rank_pattern={"all-linear": 6, r"blocks\.1\..*": 4})}
    assert layers["blocks.0.fc"] == layers["head"] == 6 and layers["blocks.1.fc"] == layers["blocks.1.conv"] == 4
    assert layers["stem"] is layers["embed"] is None
    with pytest.raises(ValueError, match=r"`rank_pattern`: 'tail' matches no layer"):
        plan(net(), rank_pattern={"tail": 3})
    with pytest.raises(ValueError, match=r"`rank_pattern\['head'\]` must be an integer >= 1, got 0"):
        plan(net(), rank_pattern={"head": 0})
    with pytest.raises(ValueError, match=r"`rank_pattern` must map names or patterns to ranks, got \['head'\]"):
        SVDTrainingCallback(rank_pattern=["head"])


@pytest.mark.parametrize("conv_mode", ["channel", "spatial", "auto"])
def test_a_plan_is_read_back_as_it_was_written(conv_mode, tmp_path):
    written = plan(net(), exclude_modules=["stem"], conv_mode=conv_mode, rank_pattern={"head": 5})
    assert read_plan(write_plan(written, tmp_path / "plan.yaml"), net()) == written


def edited(tmp_path, change):
    """The plan of :func:`net` in a file, after an edit of its entries."""
    path = write_plan(plan(net()), tmp_path / "plan.yaml")
    content = yaml.safe_load(path.read_text())
    change(content["layers"])
    path.write_text(yaml.safe_dump(content))
    return path


def test_an_edited_plan_is_followed(tmp_path):
    def change(layers):
        layers["stem"]["skip"] = "the first one"
        layers["blocks.0.conv"]["conv_mode"] = "spatial"
        layers["head"]["max_rank"] = 3
        del layers["up"]

    model = net()
    layers = {layer.name: layer for layer in decompose(model, layer_plans=read_plan(edited(tmp_path, change), model))}
    assert layers["stem"].skipped == "the first one" and layers["up"].skipped == "not in plan.yaml"
    assert layers["blocks.0.conv"].conv_mode == "spatial" and layers["blocks.1.conv"].conv_mode == "channel"
    assert layers["head"].max_rank == 3
    assert list(svd_layers(model)) == [*CONVS[:1], *LINEARS[:1], *CONVS[1:], *LINEARS[1:], "head"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layers: layers.update(tail=layers.pop("head")), "ModuleDict has no layer 'tail'"),
        (lambda layers: layers["head"].update(weight=[12, 17]), r"a weight \[12, 17\], the model's is \[12, 16\]"),
        (lambda layers: layers["stem"].update(conv_mode="wide"), "`stem`: `conv_mode` must be one of .*, got 'wide'"),
        (lambda layers: layers["head"].update(max_rank=0), "`head`: `max_rank` must be an integer >= 1, got 0"),
        (lambda layers: layers["head"].update(rank=3), "`head`: expected .*, got 'rank'"),
        (lambda layers: layers["embed"].pop("skip"), r"`embed` cannot be factorized \(unsupported type\)"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_the_layer(change, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        read_plan(edited(tmp_path, change), net())


@pytest.mark.parametrize("text", ["", "layers: 3", "layers:\n  head: factorized", "{", "\0"])
def test_a_file_that_is_no_plan_is_refused(text, tmp_path):
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read a plan|expected `layers:`"):
        read_plan(tmp_path / "plan.yaml", net())
    with pytest.raises(ValueError, match="cannot read a plan from"):
        read_plan(tmp_path / "missing.yaml", net())


class Experts(nn.Module):
    """A matrix that is no layer's weight, and a vector."""

    def __init__(self):
        super().__init__()
        self.matrices, self.scale = nn.Parameter(torch.randn(3, 8, 8)), nn.Parameter(torch.ones(8))


def changed(change, layer=None):
    """Two layers, the first of them changed."""
    pair = nn.ModuleDict({"fc": layer or nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    change(pair)
    return pair


def with_weight(weight):
    def change(pair):
        pair["fc"].weight = nn.Parameter(weight, weight.is_floating_point())

    return change


def sharing(pair):
    storage = torch.randn(8, 8)
    pair["fc"].weight, pair["other"].weight = nn.Parameter(storage), nn.Parameter(storage)


def with_module(pair):
    pair["fc"].adapter = nn.Identity()


REASONS = {
    "frozen": (
        lambda: changed(lambda pair: pair["fc"].requires_grad_(False)),
        "frozen; name it in `target_modules` to factorize it all the same",
    ),
    "hook": (
        lambda: changed(lambda pair: pair["fc"].weight.register_hook(lambda grad: grad)),
        "its weight has a hook, which factors would not call",
    ),
    "hook after accumulation": (
        lambda: changed(lambda pair: pair["fc"].weight.register_post_accumulate_grad_hook(lambda p: None)),
        "its weight has a hook, which factors would not call",
    ),
    "integers": (lambda: changed(with_weight(torch.ones(8, 8, dtype=torch.int8))), "its weight is of torch.int8"),
    "complex": (lambda: changed(with_weight(torch.ones(8, 8).cfloat())), "its weight is of torch.complex64"),
    "float8": (
        lambda: changed(with_weight(torch.ones(8, 8).to(torch.float8_e4m3fn))),
        "its weight is of torch.float8_e4m3fn",
    ),
    "empty": (lambda: changed(with_weight(torch.ones(0, 8))), "its weight is empty"),
    "memory": (lambda: changed(sharing), "weight shares its memory with another parameter"),
    "computed": (
        lambda: changed(lambda pair: torch.nn.utils.parametrizations.weight_norm(pair["fc"])),
        "its weight is computed from other parameters (WeightNorm)",
    ),
    "scripted": (lambda: changed(lambda pair: None, torch.jit.script(nn.Linear(8, 8))), "scripted"),
    "modules": (lambda: changed(with_module), "has modules of its own in it"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", REASONS)
def test_what_factors_would_lose_is_left_alone_with_the_reason(kind):
    build, why = REASONS[kind]
    model = build()
    reasons = {layer.name: layer.skipped for layer in plan(model)}
    assert reasons["fc"] == why
    assert (reasons["other"] is None) == (kind != "memory")
    if kind != "memory":
        weight = model["fc"].weight
        decompose(model)
        assert list(svd_layers(model)) == ["other"] and (kind == "computed" or model["fc"].weight is weight)


def test_matrices_that_are_no_layers_weight_are_in_the_plan_with_the_reason():
    layers = {layer.name: layer for layer in plan(nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(8, 8)}))}
    assert list(layers) == ["fc", "experts.matrices"]  # the vector is none
    own = layers["experts.matrices"]
    assert (own.kind, own.weight_shape) == ("Parameter", (3, 8, 8))
    assert own.skipped == "3 matrices in one parameter, not the weight of a layer"


@pytest.mark.parametrize("targets", ["fc", ["other", "fc"], ["fc", "Linear"]])
def test_a_frozen_layer_that_is_named_is_factorized_and_one_that_is_meant_by_its_type_is_not(targets):
    model = changed(lambda pair: pair["fc"].requires_grad_(False))
    assert "fc" in factorized(plan(model, targets))
    for general in ("Linear", "all-linear", "f."):
        reasons = {layer.name: layer.skipped for layer in plan(model, general)}
        assert reasons["fc"].startswith("frozen")
    assert factorized(plan(model, include_frozen=True)) == ["fc", "other"]


def test_a_frozen_layer_without_a_skip_in_the_file_is_factorized(tmp_path):
    model = changed(lambda pair: pair["fc"].requires_grad_(False))
    path = write_plan(plan(model), tmp_path / "plan.yaml")
    content = yaml.safe_load(path.read_text())
    assert content["layers"]["fc"].pop("skip").startswith("frozen")
    path.write_text(yaml.safe_dump(content))
    assert factorized(read_plan(path, model)) == ["fc", "other"]


def fit(**arguments):
    model, svd = SmallNet(), SVDTrainingCallback(**arguments)
    quiet_trainer(callbacks=[svd]).fit(model, data())
    return svd


@pytest.mark.parametrize("target", ["target_macs", "target_params", "energy_threshold"])
def test_a_fit_keeps_no_more_ranks_than_it_may(target):
    free = fit(**{target: 0.9})
    svd = fit(**{target: 0.9}, rank_pattern={"hidden": 2, "Conv2d": 4})
    ranks = {layer.name: layer.rank for layer in svd.report.layers}
    assert ranks["hidden"] <= 2 < next(layer.rank for layer in free.report.layers if layer.name == "hidden")
    assert max(ranks["features.0"], ranks["features.2"]) <= 4


def test_a_fit_follows_a_plan_in_a_file(tmp_path):
    layer_plans = plan(SmallNet(), exclude_modules=["head"], conv_mode="spatial", rank_pattern={"hidden": 2})
    path = write_plan(layer_plans, tmp_path / "plan.yaml")
    svd = fit(energy_threshold=0.9, plan_file=str(path))
    assert svd.plan == layer_plans and svd.report.arguments["plan_file"] == str(path)
    assert "head" not in {layer.name for layer in svd.report.layers}
    with pytest.raises(ValueError, match=r"give either `plan_file`, .* or `target_modules`"):
        SVDTrainingCallback(plan_file=str(path), conv_mode="spatial")


class OfExperts(LightningModule):
    """Rows through four experts in one parameter, most of the model, and a layer."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(4, 32, 32) / 8), nn.Linear(32, 8)

    def forward(self, x):
        return self.head((x @ self.experts).mean(0))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit_experts(target):
    svd = SVDTrainingCallback(target_macs=target)
    quiet_trainer(callbacks=[svd]).fit(OfExperts(), DataLoader(torch.randn(16, 32), 8))
    return svd


def test_a_budget_that_cannot_be_met_is_refused_with_what_is_left_alone():
    told = r"left alone are 93.9% of the parameters, experts: 4 matrices in one parameter, not the weight of a layer"
    with pytest.raises(ValueError, match=rf"`target_macs` must be at least 0.9\d+ .* got 0.5; {told}$"):
        fit_experts(0.5)
    with pytest.raises(ValueError, match=rf"`target_params` must be at least .*; {told}$"):
        Recipe(target_params=0.5).check_reachable(
            ModelCost({"head": LayerCost(256, 40)}, 4104), {"head": 8}, {}, plan(OfExperts())
        )


def test_a_report_says_what_is_left_alone_and_how_large_it_is(tmp_path):
    report = fit_experts(0.98).report
    told = "93.9% of the parameters, experts: 4 matrices in one parameter, not the weight of a layer"
    assert report.left_alone == told and f"left alone: {told}" in str(report)
    assert told in report.to_markdown() and told in report.to_html(tmp_path / "report.html").read_text()
    assert SVDReport.from_json(report.to_json()) == report


def test_what_is_left_alone_is_told_by_its_reason_and_where_it_is_much():
    names = ["a", "b", "c", "d", "e", "f"]
    plans = [LayerPlan(name, "Linear", (8, 8), skipped="frozen") for name in names]
    plans += [LayerPlan("g", "Linear", (8, 1), skipped="too thin"), LayerPlan("h", "Linear", (8, 8), (8, 8))]
    assert large_left_alone(plans, 1000) == "38.4% of the parameters, a, b, c, d and 2 more: frozen"
    assert large_left_alone(plans, 38_400) is large_left_alone([], 0) is None


NORMS = {
    "weight norm": (nn.utils.parametrizations.weight_norm, "WeightNorm"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, "SpectralNorm"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "Orthogonal"),
    "the older weight norm": (nn.utils.weight_norm, "WeightNorm"),
    "the older spectral norm": (nn.utils.spectral_norm, "SpectralNorm"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", NORMS)
def test_what_computes_a_weight_is_named_and_not_run(kind):
    norm, name = NORMS[kind]
    model = nn.ModuleDict({"fc": norm(nn.Linear(8, 8)), "other": nn.Linear(8, 8)}).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert plan(model)[0].skipped == f"its weight is computed from other parameters ({name})"
    decompose(model)
    after = model.state_dict()
    assert model["fc"].training and all(torch.equal(after[key], before[key]) for key in before if "fc" in key)


COMPUTED = {
    "out_proj": lambda: normed(nn.MultiheadAttention(16, 4), lambda net: (net.out_proj, "weight")),
    "in_proj": lambda: normed(nn.MultiheadAttention(16, 4), lambda net: (net, "in_proj_weight")),
    "recurrent": lambda: normed(nn.LSTM(16, 16), lambda net: (net, "weight_hh_l0")),
    "cell": lambda: normed(nn.GRUCell(16, 16), lambda net: (net, "weight_hh")),
    "older": lambda: nn.utils.weight_norm(nn.LSTM(16, 16), "weight_hh_l0"),
}


def normed(net, where):
    layer, name = where(net)
    nn.utils.parametrizations.spectral_norm(layer, name)
    return net


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_an_attention_or_recurrent_module_that_computes_a_weight_stays_whole(kind):
    model = nn.ModuleDict({"whole": COMPUTED[kind](), "fc": nn.Linear(8, 8)}).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reasons = {layer.name: layer.skipped for layer in plan(model) if layer.kind != "Parameter"}
    assert reasons.pop("fc") is None
    assert reasons and all("computed from other parameters" in reason for reason in reasons.values())
    decompose(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before if "whole" in key)
    assert all(child.training for child in model.modules())


def test_a_layer_that_has_no_weight_before_its_first_call_stays_as_it_is():
    model = SmallNet()
    EqualRate(model.hidden)
    (of,) = (each for each in plan(model) if each.name == "hidden")
    assert of.skipped == "its weight is computed from other parameters (EqualRate)" and of.weight_shape == ()
    callback = SVDTrainingCallback(target_macs=0.5)
    quiet_trainer(callbacks=[callback]).fit(model, data())
    assert callback.report.macs_ratio <= 0.5 and "weight_orig" in dict(model.hidden.named_parameters())


def test_what_is_left_alone_is_never_more_than_all_of_it():
    plans = [LayerPlan("a", "Linear", (10, 10), skipped="already factorized")]
    assert large_left_alone(plans, 60) == "100.0% of the parameters, a: already factorized"
    model = SmallNet()
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4, final="decomposed")]).fit(model, data())
    with pytest.raises(ValueError, match=r"already factorized; `to_dense\(model\)` makes it a dense layer again"):
        quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.2)]).fit(model, data())


def test_the_most_ranks_of_a_plan_file_are_not_below_the_fewest(tmp_path):
    path = write_plan(plan(SmallNet(), rank_pattern={"hidden": 3}), tmp_path / "plan.yaml")
    Recipe(plan_file=str(path), min_rank=3).plan(SmallNet())
    with pytest.raises(ValueError, match=r"plan.yaml: `hidden`: `max_rank` must be >= `min_rank` \(4\), got 3"):
        Recipe(plan_file=str(path), min_rank=4).plan(SmallNet())
