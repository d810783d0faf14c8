"""Embeddings: lookups in fewer features, for a budget of parameters."""

import copy

import pytest
import torch
from helpers import assert_same, factored, rebuilt, svd_of, ways
from lightning.pytorch import LightningModule
from models import quiet_trainer
from torch import nn

from lightning_svd import SVDTrainingCallback, load_low_rank, save_low_rank
from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.layer import plain_dense, plain_pair
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.model.counting import count_params
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import decompose, to_dense, to_factored
from lightning_svd.report.inspection import inspect_model

ENTRIES, FEATURES = 40, 12
TOKENS = torch.arange(30).view(2, 15)


def factorized(**options):
    torch.manual_seed(0)
    dense = nn.Embedding(ENTRIES, FEATURES, **options).double()
    return dense, svd_of(copy.deepcopy(dense))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}])
@pytest.mark.parametrize("tokens", [TOKENS, torch.tensor(7), torch.arange(200) % ENTRIES])
def test_it_looks_up_what_the_dense_one_does(options, tokens):
    dense, layer = factorized(**options)
    for form in ways(layer):
        assert_same(form(tokens), dense(tokens), (ENTRIES, FEATURES))
    assert torch.equal(plain_dense(layer).weight, layer.weight)
    assert plain_dense(layer).padding_idx == dense.padding_idx


@pytest.mark.parametrize("rank", [1, 5, FEATURES])
def test_both_ways_agree_in_value_and_gradient_at_any_rank(rank):
    _, layer = factorized()
    layer.keep(rank)
    gradients = []
    for form in (rebuilt, factored):
        layer.zero_grad()
        out = form(layer, TOKENS)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in layer.form.trained])
    for by_weight, by_factors in zip(*gradients, strict=True):
        assert_same(by_factors, by_weight, (ENTRIES, FEATURES))
    assert_same(plain_pair(layer)(TOKENS), layer(TOKENS), (ENTRIES, FEATURES))


def test_the_padding_entry_of_zeros_stays_zero():
    dense, layer = factorized(padding_idx=3)
    assert not dense.weight[3].any()
    optimizer = torch.optim.SGD(layer.form.trained, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.tensor([1, 3, 5])).square().sum().backward()
        optimizer.step()
    assert layer.weight[3].abs().max() <= 1e-15 * layer.weight.abs().max()
    assert layer.weight[1].any()


class Words(LightningModule):
    """An untied language model of one layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(60, 16), nn.Linear(16, 16), nn.Linear(16, 60)

    def forward(self, tokens):
        return self.head(torch.relu(self.body(self.embed(tokens))))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def text():
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(torch.randint(60, (64, 9), generator=generator), batch_size=8)


def fit(**options):
    torch.manual_seed(0)
    module, callback = Words(), SVDTrainingCallback(**options)
    trainer = quiet_trainer(callbacks=[callback], max_epochs=3)
    trainer.fit(module, text())
    return module.eval(), callback.report, trainer


def test_without_being_named_they_are_left_alone_and_the_plan_says_why():
    skipped = {layer.name: layer.skipped for layer in plan(Words())}
    assert "lookups cost no MACs" in skipped["embed"] and skipped["body"] is None
    assert {layer.name: layer.skipped for layer in plan(Words(), ["embed", "head"])}["embed"] is None


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_what_only_a_plain_embedding_can_do_is_left_to_it(option):
    (layer,) = plan(nn.Sequential(nn.Embedding(20, 8, **option)), "Embedding")
    assert "`sparse`, `max_norm` or `scale_grad_by_freq`" in layer.skipped


def test_a_budget_of_parameters_is_met_and_every_file_opens(tmp_path):
    module, report, trainer = fit(target_params=0.5, target_modules=["embed", "head"])
    assert 0.45 < report.params_ratio <= 0.5
    first, second = module.embed
    assert type(first) is nn.Embedding and type(second) is nn.Linear and second.bias is None
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    tokens = torch.arange(60).view(4, 15)
    for path in (tmp_path / "end.ckpt", save_low_rank(module, tmp_path / "small.safetensors")):
        loaded = load_low_rank(Words(), path).eval()
        assert low_rank_pairs(loaded).keys() == low_rank_pairs(module).keys()
        assert_same(loaded(tokens), module(tokens), (60, 16))
    assert_same(Words.load_from_checkpoint(tmp_path / "end.ckpt").eval()(tokens), module(tokens), (60, 16))
    assert to_dense(module).state_dict().keys() == Words().state_dict().keys()
    ranks = {layer.name: layer.rank for layer in inspect_model(module).layers}
    assert ranks["embed"] == first.embedding_dim


def test_they_are_not_timed():
    module, report, _ = fit(target_params=0.6, target_modules=["embed", "head"], measure_latency=True)
    seconds = {layer.name: layer.seconds for layer in report.layers}
    assert seconds["embed"] is None and seconds["head"] > 0
    assert type(module.embed) is nn.Sequential


def test_a_budget_of_macs_refuses_them_before_anything_changes():
    module = Words()
    with pytest.raises(ValueError, match="`embed` is an Embedding, whose lookups cost no MACs: give `target_params`"):
        quiet_trainer(callbacks=[SVDTrainingCallback(target_modules=["embed", "head"])]).fit(module, text())
    assert type(module.embed) is nn.Embedding


def test_export_and_compact_forms_are_plain():
    module = Words()
    decompose(module, ["embed"])
    svd_layers(module)["embed"].keep(4)
    small = to_factored(module, count_params(module))
    tokens = torch.arange(30).view(2, 15)
    assert_same(small(tokens), module(tokens), (60, 16))
    exported = torch.export.export(small.eval(), (tokens,)).module()
    assert_same(exported(tokens), small(tokens), (60, 16))
