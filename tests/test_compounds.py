"""Modules of torch that are taken apart, in a fit: exact resume, and files under torch's own names."""

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
from lightning_svd.pairs import low_rank_pairs

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
    monkeypatch.setattr("lightning_svd.recurrent.SAVED_BY_KERNEL", 0)


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


@pytest.mark.parametrize("kind", OPEN)
def test_its_checkpoint_opens_without_the_package(tmp_path, kind):
    trainer, _ = fit(Net(kind))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    program = f"""
import sys, torch
from torch import nn
state = torch.load(sys.argv[1], weights_only=True)["state_dict"]
reader = {OPEN[kind]}
reader.load_state_dict({{k[7:]: v for k, v in state.items() if k.startswith("reader.")}})
assert "lightning_svd" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, tmp_path / "end.ckpt"], check=True)


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
