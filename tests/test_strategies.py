"""Two processes stay equal bit for bit after every step; strategies that cannot work are refused by name."""

import csv
import hashlib
import itertools
import json
import time
import types
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from models import SmallMLP, SmallNet, data, dealt, quiet_trainer
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from lightning_svd import (
    Alternating,
    FallToBudget,
    Fisher,
    GrowAndPrune,
    Nested,
    Regularizer,
    SVDLayer,
    SVDTrainingCallback,
    svd_layers,
)
from lightning_svd.layers.matrices import roundoff
from lightning_svd.lightning.trainers import check_trainer
from lightning_svd.ranks.importance import Spectrum
from lightning_svd.training.recipe import Recipe

# Lightning's and torch's own, in the processes that they start.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides"),  # of a matrix of one column
    pytest.mark.filterwarnings("ignore:.*is recommended to use .self.log.*sync_dist=True"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

STEPS = 12


def two_processes(start_method="fork", **options):
    """Workers that end with an error, not never, if one of them waits for the other in vain."""
    return {
        "strategy": DDPStrategy(start_method=start_method, timeout=timedelta(seconds=30), **options),
        "devices": 2,
        "max_epochs": 3,
    }


class Witness(Callback):
    """Writes down for its process what it has after every step, and what the final model predicts."""

    def __init__(self, folder):
        self.folder, self.digests, self.ranks = Path(folder), [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        digest = hashlib.sha256()
        memory = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        factors = [p for layer in svd_layers(pl_module).values() for p in layer.form.trained]
        for value in (*pl_module.state_dict().values(), *memory, *factors):
            digest.update(value.detach().contiguous().numpy().tobytes())
        self.digests.append(digest.hexdigest())
        self.ranks.append([layer.rank for layer in svd_layers(pl_module).values()])

    def on_fit_end(self, trainer, pl_module):
        inputs = next(iter(data(dtype=pl_module.dtype)))[0]
        with torch.no_grad():
            outputs = pl_module.eval()(inputs)
        torch.save(outputs, self.folder / f"{trainer.global_rank}.pt")
        own = {"digests": self.digests, "ranks": self.ranks}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(own))


def witnessed(folder):
    """What both processes wrote, and rank zero's predictions."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], torch.load(folder / "0.pt")


class Unseeded(Callback):
    """Other initial weights in every process, as without `seed_everything`."""

    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(trainer.global_rank)
        for layer in pl_module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.reset_parameters()


class LazyUnseeded(SmallMLP):
    """Layers built late, with other weights in every process."""

    def configure_model(self):
        torch.manual_seed(self.global_rank)
        self.hidden = nn.Linear(48, 40)


class WithUnused(SmallNet):
    """A layer that no forward pass uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(16, 16)


GROWS = {"schedule": GrowAndPrune(start=0.1, grow=0.2, end=0.8, groups=2)}


@pytest.mark.parametrize(
    ("net", "options", "before", "arguments"),
    [
        (SmallNet, {}, [], {}),
        (SmallNet, {}, [Unseeded()], {}),
        (LazyUnseeded, {"gradient_as_bucket_view": True}, [], {}),
        (WithUnused, {"find_unused_parameters": True}, [Unseeded()], {}),
        (SmallNet, {"static_graph": True, "gradient_as_bucket_view": True}, [], {}),
        (SmallNet, {}, [Unseeded()], {"full_rank_as": "dense"}),
        (SmallNet, {}, [Unseeded()], {"importance": "fisher"}),
        (SmallNet, {}, [Unseeded()], {"schedule": Alternating(start=0.2, last_full=0.2, cycles=2)}),
        (SmallNet, {}, [Unseeded()], GROWS),
        (SmallNet, {}, [Unseeded()], GROWS | {"importance": "fisher"}),
        (SmallNet, {}, [Unseeded()], GROWS | {"importance": Fisher(targets="given")}),
        (SmallNet, {}, [Unseeded()], {"schedule": Nested(start=0.1, cuts=3)}),
    ],
    ids=[
        *("seeded", "unseeded", "lazy-bucket-view", "unused-parameters", "static-graph", "dense-first", "by-data"),
        *("alternating", "grow-and-prune", "grow-and-prune-by-data", "grow-and-prune-by-the-loss", "nested"),
    ],
)
@pytest.mark.combination("Strategies", "DDP, 2 processes: {id}")
def test_processes_stay_equal_bit_for_bit_after_every_step(net, options, before, arguments, tmp_path):
    callbacks = [
        *before,
        SVDTrainingCallback(**{"target_macs": 0.4, "schedule": FallToBudget(cuts=4)} | arguments),
        Witness(tmp_path),
    ]
    quiet_trainer(callbacks=callbacks, **two_processes(**options)).fit(net(), data())
    (zero, one), _ = witnessed(tmp_path)
    assert zero == one
    assert len(set(zero["digests"])) == STEPS
    changes = sum(before != after for before, after in itertools.pairwise(zero["ranks"]))
    assert changes > 1 or isinstance(arguments.get("schedule"), Nested)  # which leaves them as they are


class Batches(SmallNet):
    """Batches that are functions of the step and the process: a resumed Trainer begins its loader anew."""

    def training_step(self, batch, batch_idx):
        x, y = BATCHES[batch_idx * self.trainer.world_size + self.global_rank]
        return super().training_step((x, y), batch_idx)


BATCHES = list(data())


def test_what_is_saved_while_data_is_observed_is_what_all_processes_have_seen(tmp_path):
    def fit(name, *others, ckpt_path=None):
        folder = tmp_path / name
        folder.mkdir()
        schedule = FallToBudget(start=0.5, end=0.7, cuts=1)
        ours = SVDTrainingCallback(target_macs=0.4, schedule=schedule, importance=Fisher(3))
        torch.manual_seed(0 if ckpt_path is None else 1)
        options = two_processes() | {"enable_checkpointing": bool(others)}
        quiet_trainer(callbacks=[ours, Witness(folder), *others], **options).fit(
            Batches(optimizer="AdamW", lr=1e-2), data(), ckpt_path=ckpt_path
        )
        return witnessed(folder)[0]

    whole, other = fit("whole", ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    assert whole == other
    fell = next(step for step, ranks in enumerate(whole["ranks"], start=1) if ranks != whole["ranks"][0])
    for step in (fell - 2, fell - 1):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        observed = saved["callbacks"]["SVDTrainingCallback"]["observed"]
        assert observed["batches"] == 3 - (fell - step)
        assert all(each["inputs"] == 16 * observed["batches"] for each in observed["seen"].values())
        for resumed in fit(f"from {step}", ckpt_path=tmp_path / f"step={step}.ckpt"):
            assert resumed["digests"] == whole["digests"][step:]


class Dealing(SmallMLP):
    """Takes images in turn: 8 here and 8 there are 16 in a row."""

    def train_dataloader(self):
        return dealt(self)


def test_two_processes_train_what_one_does_with_their_batches_together(tmp_path):
    def arguments():
        penalties = Regularizer(sparsity_weight=0.02, orthogonality_weight=10.0)
        return {"target_macs": 0.4, "regularizer": penalties, "importance": "spectrum"}

    model, alone = Dealing(momentum=0.9).double(), Dealing(momentum=0.9).double()
    alone.load_state_dict(model.state_dict())
    callbacks = [SVDTrainingCallback(**arguments()), Witness(tmp_path)]
    quiet_trainer(callbacks=callbacks, use_distributed_sampler=False, **two_processes()).fit(model)
    quiet_trainer(callbacks=[SVDTrainingCallback(**arguments())], max_epochs=3).fit(alone)
    _, outputs = witnessed(tmp_path)
    with torch.no_grad():
        expected = alone.eval()(next(iter(data(dtype=torch.float64)))[0])
    assert (outputs - expected).abs().max() <= STEPS * roundoff((64, 48), torch.float64) * expected.abs().max()


@pytest.mark.combination("Strategies", "DDP: metrics are logged once")
def test_metrics_are_logged_once_by_rank_zero(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    options = two_processes() | {"logger": logger, "log_every_n_steps": 2}
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4)], **options).fit(SmallMLP(), data())
    files = list(tmp_path.rglob("metrics.csv"))
    assert files == [tmp_path / "metrics.csv"]
    rows = [row for row in csv.DictReader(files[0].read_text().splitlines()) if row["svd/macs_ratio"]]
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    assert float(rows[-1]["svd/macs_ratio"]) <= 0.4


@pytest.mark.parametrize("final", ["factored", "dense", "decomposed"])
@pytest.mark.parametrize("net", [SmallNet, SmallMLP])
@pytest.mark.combination("Strategies", 'ddp_fork with `final="{final}"`: the main process gets the weights, dense')
def test_the_main_process_predicts_what_forked_workers_trained(net, final, tmp_path):
    check_main_process(net(), final, "fork", tmp_path)


@pytest.mark.combination("Strategies", "ddp_spawn: the main process gets the weights, dense")
def test_the_main_process_predicts_what_spawned_workers_trained(tmp_path):
    check_main_process(SmallNet(), "factored", "spawn", tmp_path)


def check_main_process(model, final, start_method, folder):
    model.double()
    untrained = {name: p.detach().clone() for name, p in model.named_parameters()}
    callbacks = [SVDTrainingCallback(target_macs=0.4, final=final), Witness(folder)]
    options = two_processes(start_method) | {"max_epochs": 1}
    quiet_trainer(callbacks=callbacks, **options).fit(model, data(dtype=torch.float64))
    _, outputs = witnessed(folder)
    with torch.no_grad():
        ours = model.eval()(next(iter(data(dtype=torch.float64)))[0])
    assert (ours - outputs).abs().max() <= roundoff((96, 108), torch.float64) * outputs.abs().max()
    # Every tensor came home: none is as it was before.
    assert not any(torch.equal(p, untrained[name]) for name, p in model.named_parameters() if name in untrained)
    assert untrained.keys() == dict(model.named_parameters()).keys() or svd_layers(model)


# ------------------------------------------------------------------------------------------------------------- refusals


class DeepSpeedLike(SingleDeviceStrategy):
    """Owns the optimizer's step."""

    @property
    def handles_gradient_accumulation(self):
        return True


class ShardedLike(SingleDeviceStrategy):
    """Restores when its parameters are sharded."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


class TransformerEnginePrecision(Precision):
    """By its name only: the library need not be here."""


class BitsandbytesPrecision(Precision):
    """By its name only."""


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"strategy": DeepSpeedLike("cpu")}, "DeepSpeedLike, which shards parameters or owns the optimizer's step"),
        ({"strategy": ShardedLike("cpu")}, "ShardedLike, which shards"),
        ({"plugins": [TransformerEnginePrecision()]}, "TransformerEnginePrecision, which replaces layers too"),
        ({"plugins": [BitsandbytesPrecision()]}, "BitsandbytesPrecision, which replaces layers too"),
    ],
)
@pytest.mark.combination(
    "Strategies",
    "strategies that shard or own the step, precision plugins with layers of their own",
    refused="does not work with {name}",
)
def test_strategies_and_precisions_that_cannot_work_are_refused_by_name(options, name):
    model = SmallMLP()
    with pytest.raises(ValueError, match=f"SVDTrainingCallback does not work with {name}"):
        quiet_trainer(callbacks=[SVDTrainingCallback()], **options).fit(model, data())
    assert not any(isinstance(module, SVDLayer) for module in model.modules())


@pytest.mark.combination("Strategies", "FSDPStrategy", refused="does not work with FSDPStrategy")
def test_the_older_way_of_sharding_is_refused_by_name():
    callback = SVDTrainingCallback()  # Lightning starts that strategy on no CPU
    trainer = types.SimpleNamespace(strategy=FSDPStrategy(), precision_plugin=Precision(), callbacks=[callback])
    with pytest.raises(ValueError, match=r"not work with FSDPStrategy, which shards.*: use one device, DDP, or Model"):
        check_trainer(callback, trainer, callback.recipe)


# ------------------------------------------------------------------------------ decisions that all processes share


class OfAnySize(SmallNet):
    """Takes images of any size, and gets others in every process: the cost of each layer differs between them."""

    def __init__(self):
        super().__init__(optimizer="AdamW", lr=1e-2)
        self.hidden = nn.Linear(24, 40)

    def forward(self, x):
        side = 6 + 4 * self.global_rank
        x = nn.functional.interpolate(x, (side, side))
        return self.head(nn.functional.relu(self.hidden(self.features(x).mean((2, 3)))))


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.combination(
    "Strategies", "DDP, {processes} processes with batches of other shapes, full_rank_as={full_rank_as}"
)
def test_processes_with_batches_of_other_shapes_decide_as_one(processes, full_rank_as, tmp_path):
    callback = SVDTrainingCallback(target_macs=0.2, schedule=FallToBudget(cuts=4), full_rank_as=full_rank_as)
    options = two_processes() | {"devices": processes}
    quiet_trainer(callbacks=[Unseeded(), callback, Witness(tmp_path)], **options).fit(OfAnySize(), data(96))
    all_of_them = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(processes)]
    assert all(of_one == all_of_them[0] for of_one in all_of_them)
    assert len(set(map(tuple, all_of_them[0]["ranks"]))) > 2


class FailsInOne(Callback):
    """In one process alone: an SVD that does not converge, or a budget that this process could not meet."""

    def __init__(self, rank, what):
        self.rank, self.what = rank, what

    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == self.rank:
            self.what(pl_module)


def break_svds(pl_module):
    def fails(layer):
        raise ValueError(f"`{layer.svd_name}`: its singular value decomposition does not converge")

    Spectrum.factors = lambda self, layer: fails(layer)


def ask_too_much(pl_module):
    check = Recipe.check_reachable
    Recipe.check_reachable = lambda self, *others: check(replace(self, target_macs=1e-6), *others)


@pytest.mark.parametrize(
    ("rank", "what", "message"),
    [(1, break_svds, "does not converge"), (0, break_svds, "does not converge"), (0, ask_too_much, "must be at least")],
    ids=["an SVD in the second", "an SVD in the first", "a budget in the first"],
)
@pytest.mark.combination("Strategies", "DDP: one process refuses, {id}", refused="{message}")
def test_where_one_process_refuses_all_end_with_its_message_at_once(rank, what, message, tmp_path):
    class Notes(Callback):
        def on_exception(self, trainer, pl_module, exception):
            (tmp_path / str(trainer.global_rank)).write_text(str(exception))

    started = time.monotonic()
    callbacks = [FailsInOne(rank, what), Notes(), SVDTrainingCallback(target_macs=0.4)]
    with pytest.raises(ProcessRaisedException, match=message):
        quiet_trainer(callbacks=callbacks, **two_processes()).fit(SmallNet(), data())
    assert time.monotonic() - started < 20  # the processes' own limit is 30: none waited for another in vain
    written = [path.read_text() for path in tmp_path.iterdir() if path.name in "01"]
    assert written and all(message in text for text in written)
