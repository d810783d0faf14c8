"""The callback in either Lightning package and in a CLI; the rest without Lightning, in plain PyTorch and in Fabric."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from helpers import counted_macs
from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningCLI
from models import SmallMLP, SmallNet, data
from torch import nn

from lightning_svd import (
    FallToBudget,
    Regularizer,
    SVDTrainingCallback,
    Timing,
    add_gradients,
    decompose,
    svd_layers,
    to_factored,
)
from lightning_svd.model.counting import count_costs
from lightning_svd.ranks.allocation import keep_by_budget

IMAGES = torch.zeros(2, 1, 8, 8)
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class OtherPackagesNet(pytorch_lightning.LightningModule):
    """The same task as a module of the other package."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, weight_decay=0.01)


class BuiltLate(OtherPackagesNet):
    """Its layers are built in a hook."""

    def configure_model(self):
        self.net[1] = nn.Linear(64, 48)


@pytest.mark.parametrize("net", [OtherPackagesNet, BuiltLate])
@pytest.mark.combination("Packages", "pytorch_lightning: {net}")
def test_works_in_pytorch_lightning(net):
    model, callback = net(), SVDTrainingCallback(target_macs=0.4, log_every_n_steps=4)
    trainer = pytorch_lightning.Trainer(accelerator="cpu", devices=1, max_epochs=3, callbacks=[callback], **QUIET)
    trainer.fit(model, data())
    assert 0.34 <= counted_macs(model, IMAGES) / counted_macs(OtherPackagesNet(), IMAGES) <= 0.4
    assert "svd/macs_ratio" in trainer.callback_metrics


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[\s\S]*will be removed in v5")
@pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning")
@pytest.mark.combination("Packages", "LightningCLI")
@pytest.mark.parametrize(
    ("block", "schedule", "regularizer"),
    [(0, "fall", "l1"), (1, FallToBudget(start=0.3, cuts=10), Regularizer("l1", 0.001))],
    ids=["strings", "objects"],
)
def test_works_in_a_cli_from_the_yaml_of_the_docs(block, schedule, regularizer, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    page = Path(__file__).parents[1] / "docs" / "lightning-cli.md"
    config = tmp_path / "config.yaml"
    config.write_text(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[block])
    quiet = [f"--trainer.{name}=false" for name in QUIET]
    cli = LightningCLI(SmallNetForCLI, args=["fit", f"--config={config}", *quiet], save_config_callback=None)
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, SVDTrainingCallback))
    assert (callback.recipe.schedule, callback.recipe.regularizer) == (schedule, regularizer)
    assert callback.report.macs_ratio <= 0.4
    assert callback.report.skipped == (("head", "Linear", "excluded by `exclude_modules`"),)
    assert counted_macs(cli.model, IMAGES) <= 0.4 * counted_macs(SmallNet(), IMAGES)


@pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[\s\S]*will be removed in v5")
@pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning")
def test_a_cli_takes_how_times_are_measured_and_a_path_of_a_table(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    callback = "--trainer.callbacks=lightning_svd.SVDTrainingCallback"

    def read(*arguments):
        cli = LightningCLI(SmallNetForCLI, args=[callback, *arguments], run=False, seed_everything_default=0)
        (found,) = (each for each in cli.trainer.callbacks if isinstance(each, SVDTrainingCallback))
        return found.recipe.latency_table

    table = "--trainer.callbacks.latency_table"
    latency = "--trainer.callbacks.target_latency=0.5"
    assert read(latency, f"{table}=lightning_svd.Timing", f"{table}.seconds=2") == Timing(seconds=2)
    assert str(read(latency, f"{table}=phone.json")) == "phone.json"


class SmallNetForCLI(SmallNet):
    """With typed arguments and data of its own."""

    def __init__(self, optimizer: str = "SGD"):
        super().__init__(optimizer, lr=1e-3)

    def train_dataloader(self):
        return data()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["target_mac=0.4"], "target_mac"),
        (["target_macs=much"], "Expected a <class 'float'>"),
        (["schedule=lightning_svd.FallToBudget", "schedule.begin=0.3"], "begin"),
        (["regularizer={sparsities: l1}"], "sparsities"),
    ],
)
def test_a_cli_names_a_wrong_argument(wrong, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = [f"--trainer.{name}=false" for name in QUIET] + [
        "--trainer.callbacks=lightning_svd.SVDTrainingCallback"
    ]
    with pytest.raises(SystemExit):
        LightningCLI(SmallNetForCLI, args=["fit", *arguments, *(f"--trainer.callbacks.{each}" for each in wrong)])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- without Lightning

PLAIN = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "wandb"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import lightning_svd, lightning_svd.model.surgery
from lightning_svd import add_gradients, compact, decompose, load_low_rank, plan, save_low_rank, summarize, svd_layers
from lightning_svd import FallToBudget, Importance, RankPolicy, Regularizer, Spectrum, to_dense, to_factored
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
x = torch.randn(4, 16)
before = net(x)
assert [layer.name for layer in plan(net)] == ["0", "2"]
decompose(net)
assert torch.allclose(net(x), before, atol=1e-5)
for layer in svd_layers(net).values():
    layer.keep(3)
net(x).sum().backward()
add_gradients(svd_layers(net).values(), sparsity_weight=0.1)
small = to_factored(net)
save_low_rank(small, "small.safetensors")
fresh = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
assert torch.equal(load_low_rank(fresh, "small.safetensors")(x), small(x))
assert summarize(net, x).params_ratio < 1 and to_dense(net)[0].weight.shape == (16, 16)
assert compact(net)[0].form.parameters["U"].shape == (16, 3)
try:
    lightning_svd.SVDTrainingCallback
except ImportError:
    print("plain PyTorch works")
"""


@pytest.mark.combination("Packages", "plain PyTorch without lightning and wandb: all but the callback")
def test_everything_but_the_callback_works_where_lightning_and_wandb_are_not_installed(tmp_path):
    done = subprocess.run([sys.executable, "-c", PLAIN], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("plain PyTorch works\n", 0), done.stderr


def plain_net():
    """As in a script without Lightning."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 4))


def cut(model, cost, share):
    """Ranks by what they carry now, down to a share of the dense model's MACs."""
    energies = {name: layer.energies() for name, layer in svd_layers(model).items()}
    ranks = keep_by_budget(energies, cost.by("macs"), share * cost.dense("macs"))
    for name, layer in svd_layers(model).items():
        layer.keep(ranks[name])


def test_a_plain_loop_trains_cuts_ranks_and_ends_in_budget():
    model = plain_net()
    dense = copy.deepcopy(model)
    decompose(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cost = count_costs(model, IMAGES)
    losses = []
    for epoch in range(4):
        if epoch == 2:
            cut(model, cost, 0.4)
        for x, y in data():
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            add_gradients(svd_layers(model).values(), sparsity_weight=2e-3)
            optimizer.step()
    small = to_factored(model, cost)
    assert 0.34 <= counted_macs(small, IMAGES) / counted_macs(dense, IMAGES) <= 0.4
    assert losses[-1] < 0.5 * losses[0]


def fabric_loop(fabric, folder):
    fabric.seed_everything(fabric.global_rank, verbose=False)  # ranks that differ; DDP sends round rank zero's
    model = plain_net()
    decompose(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(data())
    cost = count_costs(model.module, IMAGES)
    for epoch in range(3):
        if epoch == 1:
            cut(model.module, cost, 0.4)
        for x, y in loader:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            add_gradients(svd_layers(model.module).values(), sparsity_weight=2e-3)
            optimizer.step()
    small = to_factored(model.module, cost)
    torch.save({"state": small.state_dict(), "macs": counted_macs(small, IMAGES)}, folder / f"{fabric.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.combination("Packages", "Fabric, 2 processes")
def test_two_processes_of_fabric_end_with_one_low_rank_model(tmp_path):
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(fabric_loop, tmp_path)
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert zero["state"].keys() == one["state"].keys()
    assert all(torch.equal(value, one["state"][name]) for name, value in zero["state"].items())
    assert zero["macs"] <= 0.4 * counted_macs(plain_net(), IMAGES)


LIGHT = """
import sys, torch
before = set(sys.modules)
import lightning_svd
from lightning_svd import SVDLayer, add_gradients, decompose, svd_layers, to_dense, to_factored
heavy = {"lightning", "pytorch_lightning", "torchmetrics", "wandb", "jinja2", "rich", "yaml", "safetensors"}
print(sorted(heavy & {name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_importing_the_layers_imports_nothing_that_they_do_not_need(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_the_callback_is_lightnings_own_kind():
    assert issubclass(SVDTrainingCallback, lightning.pytorch.Callback)
    assert isinstance(SmallMLP(), lightning.pytorch.LightningModule)


MISSING = {
    "jinja2": ("report", "summarize(net).to_html('report.html')"),
    "safetensors": ("files", "save_low_rank(net, 'small.safetensors')"),
    "yaml": ("files", "write_plan(plan(net), 'plan.yaml')"),
    "onnxruntime": ("export", "to_onnx(net, 'net.onnx', torch.ones(1, 8))"),
}


def test_what_only_one_feature_needs_is_named_with_its_extra(tmp_path):
    code = f"import sys; sys.modules.update(dict.fromkeys({[*MISSING]!r}))\n"
    code += "import torch\nfrom lightning_svd import plan, save_low_rank, summarize, to_onnx, write_plan\n"
    code += "net = torch.nn.Sequential(torch.nn.Linear(8, 8))\n"
    for _, use in MISSING.values():
        code += f"try:\n    {use}\nexcept ImportError as error:\n    print(error)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said = [f"this needs {name}: pip install 'lightning-svd[{extra}]'" for name, (extra, _) in MISSING.items()]
    assert done.stdout.splitlines() == said, done.stdout + done.stderr
