"""A run that is interrupted and resumed ends as the run that was not, bit for bit.

Run as a script this module starts processes that train, one after another, each killed at a step or not at all:
``test_resume.py FOLDER KILL_AT_STEP...``.
"""

import copy
import dataclasses
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from models import EMAWeightAveraging, ValidatedNet, data, quiet_trainer
from torch import nn

from lightning_svd import (
    Alternating,
    Distillation,
    FallToBudget,
    Fisher,
    GrowAndPrune,
    Nested,
    SVDTrainingCallback,
    svd_layers,
)

STEPS, BATCHES = 24, list(data())
SGD = {"optimizer": "SGD", "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"optimizer": "Adam", "lr": 1e-3, "weight_decay": 0.01}

pytestmark = [
    # Lightning's own: a resumed Trainer need not write files, nor has a dataset in order any state to restore.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(ValidatedNet):
    """With running statistics and a schedule of the learning rate for every step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.features.insert(1, nn.BatchNorm2d(12))

    def training_step(self, batch, batch_idx):
        # Lightning resumes at the right index and with the first batch of a loader that keeps no state of its own.
        return super().training_step(BATCHES[batch_idx], batch_idx)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.options["lr"], total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class At(Callback):
    """Acts at the start of a training batch, or of the validation after one."""

    def __init__(self, step, act, validating=False):
        self.step, self.act, self.validating = step, act, validating

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not self.validating:
            self.act()

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.global_step == self.step and self.validating:
            self.act()


class Keep(Callback):
    """Keeps everything that training leaves, before the model gets its final form."""

    def on_train_end(self, trainer, pl_module):
        self.end = {
            "weights": {key: value.clone() for key, value in pl_module.state_dict().items()},
            "factors": {name: cloned(layer.exact_state()) for name, layer in svd_layers(pl_module).items()},
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "step": trainer.global_step,
        }


def cloned(state):
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}


FALL = FallToBudget(start=0.2, end=0.8, cuts=6)


def fit(options, *callbacks, ckpt_path=None, svd=True, arguments=None, **trainer):
    """Fit a new model in a new Trainer; everything that is left of it."""
    torch.manual_seed(0 if ckpt_path is None else 1)  # what is resumed must not lean on a model that starts the same
    keep = Keep()
    given = {"target_macs": 0.4, "schedule": FALL, "full_rank_as": "svd", "importance": "spectrum"}
    ours = SVDTrainingCallback(**given | (arguments or {}))
    model, writes = Net(**options), any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer |= {"max_epochs": STEPS // len(BATCHES), "enable_checkpointing": writes}
    trainer = quiet_trainer(callbacks=[*([ours] if svd else []), keep, *callbacks], **trainer)
    trainer.fit(model, data(), data(16), ckpt_path=ckpt_path)
    if not svd:
        return keep.end
    report = dataclasses.asdict(ours.report)
    return keep.end | {"report": report, "final": {key: value.clone() for key, value in model.state_dict().items()}}


def every_step(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def last(folder, **options):
    return ModelCheckpoint(folder, "last", every_n_train_steps=1, enable_version_counter=False, **options)


def assert_equal(actual, expected, where="end"):
    """Equal bit for bit, in nested containers too."""
    assert type(actual) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), where
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for key in expected:
            assert_equal(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_equal(a, b, f"{where}[{index}]")
    else:
        assert actual == expected, where


# -------------------------------------------------------------------------------------------------------- every step


def test_lightning_itself_resumes_the_dense_run_exactly(tmp_path):
    expected = fit(SGD, every_step(tmp_path), svd=False)
    for step in range(1, STEPS):
        assert_equal(fit(SGD, ckpt_path=tmp_path / f"step={step}.ckpt", svd=False), expected)


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize("options", [SGD, ADAM], ids=["sgd", "adam"])
def test_resuming_at_any_step_ends_the_same(options, full_rank_as, tmp_path):
    ours = {"full_rank_as": full_rank_as}
    expected = fit(options, every_step(tmp_path), arguments=ours)
    assert expected["step"] == STEPS and len(expected["report"]["timeline"]) >= 3
    for step in range(1, STEPS):
        resumed = fit(options, ckpt_path=tmp_path / f"step={step}.ckpt", arguments=ours)
        assert_equal(resumed, expected, f"from step {step}")


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
def test_resuming_at_any_step_ends_the_same_where_ranks_are_judged_by_data(full_rank_as, tmp_path):
    ours = {"full_rank_as": full_rank_as, "importance": Fisher(2)}
    expected = fit(ADAM, every_step(tmp_path), arguments=ours)
    assert len(expected["report"]["timeline"]) >= 3
    for step in range(1, STEPS):
        resumed = fit(ADAM, ckpt_path=tmp_path / f"step={step}.ckpt", arguments=ours)
        assert_equal(resumed, expected, f"from step {step}")
    with pytest.raises(
        ValueError, match="was written with an `importance` that needs data, asked for one that does not"
    ):
        fit(ADAM, ckpt_path=tmp_path / "step=2.ckpt")


SCHEDULES = {
    "alternating": Alternating(start=0.2, end=0.9, last_full=0.2, cycles=2),
    "grow_and_prune": GrowAndPrune(start=0.1, grow=0.2, end=0.9, cuts=2, groups=2),
    "nested": Nested(start=0.1, budgets=3, share=0.6, cuts=4, distill=Distillation(kind="logits")),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_resuming_at_any_step_ends_the_same_with_other_schedules(name, tmp_path):
    ours = {"schedule": SCHEDULES[name]}
    expected = fit(ADAM, every_step(tmp_path), arguments=ours)
    for step in range(1, STEPS):
        resumed = fit(ADAM, ckpt_path=tmp_path / f"step={step}.ckpt", arguments=ours)
        assert_equal(resumed, expected, f"from step {step}")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_resuming_from_the_end_of_an_epoch_ends_the_same(accumulate, tmp_path):
    # 3 does not divide an epoch's 8 batches: its last window is shorter.
    folder = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="val_loss")
    expected = fit(SGD, folder, accumulate_grad_batches=accumulate)
    for epoch in range(2):
        resumed = fit(SGD, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", accumulate_grad_batches=accumulate)
        assert_equal(resumed, expected, f"from epoch {epoch}")


@pytest.mark.parametrize("step", [5, 11, 16, 21])
def test_resuming_an_averaged_run_ends_the_same(step, tmp_path):
    expected = fit(SGD, EMAWeightAveraging(decay=0.8), every_step(tmp_path))
    resumed = fit(SGD, EMAWeightAveraging(decay=0.8), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert_equal(resumed["final"], expected["final"])
    assert_equal(resumed["report"], expected["report"])


# ------------------------------------------------------------------------------------------------------ interruptions


def interrupt():
    raise KeyboardInterrupt


def terminate():
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def _signals():
    """Lightning ignores further interrupts once one came, in the whole process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("act", "raised"), [(interrupt, SystemExit), (terminate, SIGTERMException)])
@pytest.mark.parametrize(("step", "validating"), [(11, False), (16, True)])
def test_resuming_what_was_interrupted_ends_the_same(act, raised, step, validating, tmp_path):
    expected = fit(SGD)
    with pytest.raises(raised):
        fit(SGD, At(step, act, validating), last(tmp_path))
    assert_equal(fit(SGD, ckpt_path=tmp_path / "last.ckpt"), expected)


@pytest.mark.skipif(
    "save_on_exception" not in inspect.signature(ModelCheckpoint).parameters,
    reason="Lightning 2.5.0 writes no file on an exception",
)
@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize(("act", "raised"), [(interrupt, SystemExit), (terminate, SIGTERMException)])
def test_resuming_a_file_that_was_written_on_the_exception_ends_the_same(act, raised, tmp_path):
    expected = fit(SGD)
    with pytest.raises(raised):
        fit(SGD, At(11, act), ModelCheckpoint(tmp_path, "last", save_on_exception=True))
    assert_equal(fit(SGD, ckpt_path=tmp_path / "last.ckpt"), expected)


def test_resuming_killed_processes_ends_the_same(tmp_path):
    expected = fit(SGD)
    # The second process goes on where the first was killed, between two rank cuts, and the third is not killed. All are
    # forks of one that has only imported what they need, which takes it longer than they train.
    command = [sys.executable, __file__, str(tmp_path), "9", "15", str(STEPS)]
    process = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert process.stdout.split() == [str(-signal.SIGKILL)] * 2 + ["0"], process.stderr
    assert_equal(torch.load(tmp_path / "end.pt", weights_only=True), expected)


def work(folder, kill_at):
    """Train in this process, from the last file if there is one, until it is killed or done."""
    torch.set_num_threads(1)
    start = folder / "last.ckpt"
    kill = At(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    end = fit(SGD, kill, last(folder), ckpt_path=start if start.exists() else None)
    torch.save(end, folder / "end.pt")


if __name__ == "__main__":
    for kill_at in sys.argv[2:]:
        child = os.fork()
        if not child:
            work(Path(sys.argv[1]), int(kill_at))
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


@pytest.mark.parametrize(
    ("step", "arguments", "message"),
    [
        (8, {"target_params": 0.5}, "was written with `target_macs=0.5`: resume with that, got `target_params=0.5`"),
        (8, {"energy_threshold": 0.9}, "with `target_macs=0.5`: resume with that, got `energy_threshold=0.9`"),
        (24, {"target_macs": 0.2}, "with `target_macs=0.5`, and its ranks are cut: resume with that, got .*=0.2`"),
    ],
)
def test_another_budget_than_the_files_is_refused(step, arguments, message, tmp_path):
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    run = quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.5), every], enable_checkpointing=True)
    run.fit(ValidatedNet(), data(), data())
    before = copy.deepcopy((model := ValidatedNet()).state_dict())
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=[SVDTrainingCallback(**arguments)]).fit(
            model, data(), data(), ckpt_path=tmp_path / f"step={step}.ckpt"
        )
    assert before.keys() == model.state_dict().keys()


def test_a_smaller_budget_may_be_asked_for_while_ranks_fall(tmp_path):
    every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=8, save_top_k=-1)
    run = quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.5), every], enable_checkpointing=True)
    run.fit(ValidatedNet(), data(), data())
    callback = SVDTrainingCallback(target_macs=0.35)
    quiet_trainer(callbacks=[callback]).fit(ValidatedNet(), data(), data(), ckpt_path=tmp_path / "step=8.ckpt")
    assert callback.report.macs_ratio <= 0.35
