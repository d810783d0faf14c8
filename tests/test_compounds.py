"""Modules of torch that are taken apart, wherever they stand: names of parts and in files, fits, exact resume."""

import subprocess
import sys

import pytest
import torch
from helpers import assert_same
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from models import quiet_trainer
from torch import nn

from lightning_svd import SVDTrainingCallback, load_low_rank, save_low_rank
from lightning_svd.layers.compounds import (
    join_states,
    named_layers,
    open_up,
    owner_of,
    owners_of,
    split,
    split_everywhere,
    split_prefixes,
    split_states,
)
from lightning_svd.layers.layer import SVDLayer, factorize, plain_pair
from lightning_svd.layers.pairs import is_pair, low_rank_pairs
from lightning_svd.layers.views import View
from lightning_svd.model.surgery import become_pair, to_dense

WIDTH, STEPS = 16, 6


def encoder():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def recurrent(kind):
    return lambda: kind(WIDTH, WIDTH // 2, 2, batch_first=True, bidirectional=True)


MODULES = {"encoder": encoder, "LSTM": recurrent(nn.LSTM), "GRU": recurrent(nn.GRU), "RNN": recurrent(nn.RNN)}
# What the parts of such a module are called in the model.
PARTS = {"encoder": ".self_attn.", "LSTM": "reader.hh_l1", "GRU": "reader.hh_l1", "RNN": "reader.hh_l1"}


@pytest.fixture(autouse=True)
def by_steps(monkeypatch):
    """Low-rank recurrent layers of these sizes take steps of their own."""
    monkeypatch.setattr("lightning_svd.layers.recurrent.SAVED_BY_KERNEL", 0)


# -------------------------------------------------------------------------------------------------- names of parts


@pytest.fixture
def model():
    """An attention module under two names, a recurrent one and a cell, each alone in its part of the tree."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    return nn.ModuleDict({"a": attention, "b": nn.Sequential(attention, nn.LSTM(8, 6)), "c": nn.GRUCell(8, 6)})


NAMES = ["a.k_proj", "b.1.hh_l0", "c.ih"]


def factorized(model, names=NAMES):
    split(model, names)
    found = dict(named_layers(model))
    return [factorize(found[name], View.of(found[name]), name) for name in names]


def test_parts_are_found_by_name_and_only_what_has_them_is_taken_apart(model):
    assert owner_of(model, "a.q_proj") is owner_of(model, "b.0.out_proj") is model["a"]
    assert owner_of(model, "a.in_proj") is owner_of(model, "d.q_proj") is owner_of(model, "c") is None
    before = dict(model.named_modules())
    split(model, ["a.k_proj", "b.0.k_proj", "b.1", "a", "nowhere.at_all"])
    assert owners_of(model) == [model["a"]] and owner_of(model, "a.q_proj") is model["a"]
    assert dict(model.named_modules()) == before
    parts = {name for name, _ in named_layers(model)} - before.keys()
    assert parts == {"a.q_proj", "a.k_proj", "a.v_proj"}
    both = [name for name, _ in named_layers(model, remove_duplicate=False) if name.endswith("k_proj")]
    assert both == ["a.k_proj", "b.0.k_proj"]
    assert model.get_submodule("a.k_proj") is dict(named_layers(model))["a.k_proj"]


def test_a_model_inside_another_one_is_as_before_in_every_way(model):
    """What walks over modules and parameters sees no part."""
    layers = [name for name, _ in model.named_modules()]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    factorized(model)
    assert [name for name, _ in model.named_modules()] == layers
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert model.state_dict().keys() >= shapes.keys()
    assert isinstance(model["a"], nn.MultiheadAttention) and isinstance(model["b"][1], nn.LSTM)


def test_names_in_files_follow_modules_whose_parts_are_children(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    layers = factorized(model)
    assert not [*split_prefixes(model)] and split_states(model, state).keys() == state.keys()
    for layer in layers:
        become_pair(layer, plain_pair(layer))
    open_up(model)
    assert [prefix for prefix, _ in split_prefixes(model)] == ["a.", "b.0.", "b.1.", "c."]
    names = split_states(model, state)
    assert torch.equal(names["b.0.k_proj.weight"], state["a.in_proj_weight"][8:16])
    assert torch.equal(names["b.1.hh_l0.bias"], state["b.1.bias_hh_l0"]) and "c.weight_ih" not in names
    assert names.keys() == split_everywhere(state).keys()
    joined = join_states(model, names)
    assert joined.keys() == state.keys() and all(torch.equal(joined[name], state[name]) for name in state)
    assert to_dense(model).state_dict().keys() == state.keys()
    assert sum(map(is_pair, model.modules())) == 3 and not any(isinstance(m, SVDLayer) for m in model.modules())


# ------------------------------------------------------------------------------------------------------------- fits


class Net(LightningModule):
    """A module that reads a sequence, and a head."""

    def __init__(self, kind, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.reader = MODULES[kind]()
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x):
        out = self.reader(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def batches(count=8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * 8, STEPS, WIDTH, generator=generator)
    y = x.mean((1, 2)).mul(8).long().clamp(-1, 1) + 1
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


def fit(module, *callbacks, ckpt_path=None, final="factored", **trainer):
    torch.manual_seed(1)
    callback = SVDTrainingCallback(target_macs=0.4, final=final)
    trainer = quiet_trainer(callbacks=[callback, *callbacks], **({"max_epochs": 2} | trainer))
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer, callback


@pytest.mark.parametrize("kind", MODULES)
def test_a_fit_leaves_low_rank_parts_and_files_with_torchs_names(tmp_path, kind):
    module = Net(kind)
    plain, names = type(module.reader), set(module.state_dict())
    trainer, callback = fit(module)
    assert any(PARTS[kind] in name for name in low_rank_pairs(module))
    assert callback.report.macs_ratio <= 0.4
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == names

    x = torch.randn(4, STEPS, WIDTH)
    module.eval()
    fresh = Net.load_from_checkpoint(tmp_path / "end.ckpt", kind=kind).eval()
    assert type(fresh.reader) is plain
    assert_same(fresh(x), module(x), (64, 64))
    for path in (tmp_path / "end.ckpt", save_low_rank(module, tmp_path / "small.safetensors")):
        loaded = load_low_rank(Net(kind), path).eval()
        assert_same(loaded(x), module(x), (64, 64))
        assert {*low_rank_pairs(loaded)} == {*low_rank_pairs(module)}


OPEN = {
    "encoder": "nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)",
    "LSTM": "nn.LSTM(16, 8, 2, bidirectional=True)",
}


def test_their_checkpoints_open_without_the_package(tmp_path):
    program = """
import sys, torch
from torch import nn
"""
    for kind, built in OPEN.items():
        path = str(tmp_path / f"{kind}.ckpt")
        fit(Net(kind))[0].save_checkpoint(path)
        program += f"""
state = torch.load({path!r}, weights_only=True)["state_dict"]
reader = {built}
reader.load_state_dict({{k[7:]: v for k, v in state.items() if k.startswith("reader.")}})
"""
    program += 'assert "lightning_svd" not in sys.modules'
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("kind", "final"),
    [
        ("encoder", "factored"),
        ("encoder", "dense"),
        ("encoder", "decomposed"),
        ("LSTM", "factored"),
        ("LSTM", "dense"),
        ("GRU", "decomposed"),
    ],
)
def test_a_run_resumes_exactly(tmp_path, kind, final):
    def run(ckpt_path=None):
        module, callbacks = Net(kind), []
        if ckpt_path is None:
            callbacks = [ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)]
        options = {"max_epochs": 5, "enable_checkpointing": ckpt_path is None}
        fit(module, *callbacks, ckpt_path=ckpt_path, final=final, **options)
        return module

    straight = run()
    for step in (16, 24, 32):  # before ranks fall, while they do, and after
        again = run(tmp_path / f"step={step}.ckpt")
        state = straight.state_dict()
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items()), step


@pytest.mark.parametrize("kind", MODULES)
def test_a_file_that_does_not_fit_leaves_the_model_in_one_piece(tmp_path, kind):
    module = Net(kind)
    fit(module)
    path = save_low_rank(module, tmp_path / "small.safetensors")
    other = Net(kind, classes=5)
    parameters = {name: id(p) for name, p in other.named_parameters()}
    types = [type(child) for child in other.modules()]
    with pytest.raises(ValueError, match=r"head\."):
        load_low_rank(other, path)
    assert {name: id(p) for name, p in other.named_parameters()} == parameters
    assert [type(child) for child in other.modules()] == types
