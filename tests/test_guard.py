"""The guard: pruning pauses when the monitored metric has fallen too far, and goes on when it has recovered."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from models import SmallNet, data, quiet_trainer, same_state

from lightning_svd import FallToBudget, SVDTrainingCallback
from lightning_svd.report.data import Pause
from lightning_svd.training.guard import MetricGuard
from lightning_svd.training.run import SVDTraining


class Scripted(SmallNet):
    """Logs these values, one for each epoch, as its validation metric."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", self.values[min(self.current_epoch, len(self.values) - 1)])


def fit(*values, epochs=10, **arguments):
    """A run of 4 steps an epoch; ranks fall from step 12 to step 28."""
    torch.manual_seed(0)
    schedule = {"schedule": FallToBudget(start=0.3)}
    options = {"target_params": 0.3, "monitor": "val_acc", "mode": "max"} | schedule | arguments
    callback, model = SVDTrainingCallback(**options), Scripted(*values)
    trainer = quiet_trainer(max_epochs=epochs, callbacks=[callback])
    trainer.fit(model, data(32), data(32))
    return callback, model


def cut_steps(callback):
    return [change.step for change in callback.report.timeline]


# ----------------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize(("mode", "values"), [("max", [0.5, 0.7, 0.66, 0.64, 0.71]), ("min", [5, 3, 3.4, 3.6, 2.9])])
def test_it_pauses_beyond_the_allowed_drop_and_ends_when_recovered(mode, values):
    guard = MetricGuard("val", mode, 0.05 if mode == "max" else 0.5)
    paused = []
    for step, value in enumerate(values):
        guard.see(10 * step, value, guard.has_fallen(value))
        paused.append(guard.paused)
    assert paused == [False, False, False, True, False]
    assert guard.pauses == [Pause(30, 40, values[3], values[1])]
    assert [guard.steps_paused(step) for step in (30, 35, 40, 50)] == [0, 5, 10, 10]


def test_a_pause_that_goes_on_counts_up_to_now():
    guard = MetricGuard("val", "max", 0.1)
    guard.see(10, 0.9, False)
    guard.see(20, 0.5, True)
    assert guard.paused and guard.steps_paused(27) == 7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_has_fallen_and_is_no_best(value):
    guard = MetricGuard("val", "max", 0.1)
    assert guard.has_fallen(value)
    guard.see(1, value, True)
    assert guard.best is None
    assert not guard.has_fallen(0.3)


def test_without_an_allowed_drop_it_only_watches():
    guard = MetricGuard("val", "max")
    guard.see(1, 0.9, guard.has_fallen(0.9))
    assert not guard.has_fallen(0.0) and not guard.has_fallen(math.nan)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0, 0.5), st.sampled_from(["min", "max"]))
def test_pauses_are_in_order_and_their_state_survives(values, drop, mode):
    guard = MetricGuard("val", mode, drop)
    for step, value in enumerate(values):
        guard.see(step, value, guard.has_fallen(value))
    marks = [mark for pause in guard.pauses for mark in (pause.start, pause.end) if mark is not None]
    assert marks == sorted(set(marks))
    assert 0 <= guard.steps_paused(len(values)) <= len(values)
    twin = MetricGuard("val", mode, drop)
    twin.load_state_dict(guard.state_dict())
    assert twin == guard


# ---------------------------------------------------------------------------------------------------------- in the fit


def test_ranks_stand_still_while_the_metric_is_low_and_go_on_later():
    # The metric falls in epoch 3 (validated at step 16) and recovers in epoch 5 (at step 24).
    options = {"max_metric_drop": 0.1, "epochs": 12, "importance": "spectrum"}  # of which no batch is observed
    callback, _ = fit(0.9, 0.9, 0.9, 0.5, 0.5, 0.9, **options)
    free, _ = fit(0.9, **options)
    pause = callback.report.pauses
    assert pause == (Pause(16, 24, pytest.approx(0.5), pytest.approx(0.9)),)
    assert cut_steps(callback) == [step if step <= 16 else step + 8 for step in cut_steps(free)]
    assert callback.report.params_ratio == free.report.params_ratio
    assert callback.report.warnings == ()


@pytest.mark.filterwarnings("ignore:SVD training. pruning paused for 24 steps")
def test_a_metric_that_never_recovers_leaves_the_budget_unmet_and_says_so():
    callback, _ = fit(0.9, 0.9, 0.9, 0.2, max_metric_drop=0.1)
    assert callback.report.params_ratio > 0.3
    assert len(callback.report.pauses) == 1 and callback.report.pauses[0].end is None
    (warning,) = callback.report.warnings
    assert "pruning paused for 24 steps because `val_acc` had fallen" in warning
    assert "0.3 of the params, was not reached" in warning


def test_without_an_allowed_drop_the_budget_is_met_and_the_report_has_the_metric():
    callback, _ = fit(0.9, 0.9, 0.9, 0.2, max_metric_drop=None)
    assert callback.report.params_ratio <= 0.3 and not callback.report.pauses
    assert callback.report.metric == "val_acc"
    assert [step for step, _ in callback.report.metric_values] == list(range(4, 41, 4))


def test_watching_changes_nothing():
    watched, model = fit(0.9)
    unwatched, twin = fit(0.9, monitor=None, mode=None)
    assert same_state(model.state_dict(), twin.state_dict())
    assert watched.report.timeline == unwatched.report.timeline


def test_a_fall_after_the_last_cut_is_no_pause():
    callback, _ = fit(0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1, max_metric_drop=0.1)
    assert not callback.report.pauses


def test_a_fall_before_ranks_fall_is_no_pause():
    callback, _ = fit(0.9, 0.1, 0.9, max_metric_drop=0.1)
    assert not callback.report.pauses and callback.report.params_ratio <= 0.3


def test_sparsity_rests_in_a_pause(monkeypatch):
    strengths = {}
    before_step = SVDTraining.before_step

    def noted(self, optimizer, step, *args):
        before_step(self, optimizer, step, *args)
        strengths[step] = self.strength

    monkeypatch.setattr(SVDTraining, "before_step", noted)
    fit(0.9, 0.9, 0.9, 0.5, 0.9, max_metric_drop=0.1)
    assert all(strengths[step] == 0 for step in range(16, 20))
    assert strengths[15] > 0 and strengths[20] > 0


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_pauses_as_the_uninterrupted_one(tmp_path):
    options = {"target_params": 0.3, "monitor": "val_acc", "mode": "max", "max_metric_drop": 0.1}
    options |= {"schedule": FallToBudget(start=0.2, end=0.6)}
    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)

    def run(seed, *callbacks, **options_of_fit):
        torch.manual_seed(seed)
        callback, model = SVDTrainingCallback(**options), Scripted(0.9, 0.9, 0.9, 0.5, 0.5, 0.9)
        trainer = quiet_trainer(max_epochs=12, callbacks=[callback, *callbacks], enable_checkpointing=bool(callbacks))
        trainer.fit(model, data(32), data(32), **options_of_fit)
        return callback.report, model.state_dict()

    report, weights = run(0, every_epoch)
    assert report.pauses == (Pause(16, 24, pytest.approx(0.5), pytest.approx(0.9)),)
    for epoch in (2, 3, 4, 5):  # before, in, and after the pause
        resumed, same_weights = run(1, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert same_state(weights, same_weights)
        assert resumed == report


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "max"}, "`mode` needs `monitor`"),
        ({"max_metric_drop": 0.1}, "`max_metric_drop` needs `monitor`"),
        ({"monitor": "val_acc"}, "`mode` must be one of 'min', 'max', got None"),
        ({"monitor": "val_acc", "mode": "maximum"}, "`mode` must be one of 'min', 'max', got 'maximum'"),
        ({"monitor": 3, "mode": "max"}, "`monitor` must be the name of a logged metric, got 3"),
        ({"monitor": "v", "mode": "max", "max_metric_drop": -1}, "`max_metric_drop` must be a finite number >= 0"),
        ({"monitor": "v", "mode": "max", "max_metric_drop": math.nan}, "`max_metric_drop` must be a finite number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SVDTrainingCallback(**arguments)


def test_a_metric_that_nobody_logs_is_refused_before_the_first_batch():
    torch.manual_seed(0)
    model = Scripted(0.9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"`monitor` must be a metric that is logged, got 'val_f1'.*'val_acc'"):
        quiet_trainer(callbacks=[SVDTrainingCallback(monitor="val_f1", mode="max")]).fit(model, data(), data())
    assert not model.losses
    assert same_state(model.state_dict(), before)


class Late(Scripted):
    """Logs what only an epoch of training, or no sanity check, has."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_mean", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if not self.trainer.sanity_checking:
            self.log("slow", 0.5)

    def on_train_epoch_end(self):
        self.log("of_epoch", 0.5)


@pytest.mark.filterwarnings("ignore:SVD training. `monitor` must be a metric that is logged")
@pytest.mark.parametrize(
    ("monitor", "loaders", "steps"),
    [
        ("train_mean", 1, [8, 12, 16]),
        ("slow", 1, [4, 8, 12, 16]),
        ("slow/dataloader_idx_1", 2, [4, 8, 12, 16]),
        ("of_epoch", 1, [8, 12, 16]),
    ],
)
def test_a_metric_that_is_not_there_in_the_sanity_check_is_watched_from_when_it_is(monitor, loaders, steps):
    callback, model = SVDTrainingCallback(monitor=monitor, mode="max"), Late(0.9)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(model, data(32), [data(32)] * loaders)
    assert [step for step, _ in callback.report.metric_values] == steps


def test_a_metric_that_nobody_ever_logs_ends_the_fit_in_the_second_epoch():
    model, callback = Scripted(0.9), SVDTrainingCallback(monitor="f1", mode="max")
    trainer = quiet_trainer(callbacks=[callback])
    with (
        pytest.raises(ValueError, match=r"`monitor` must be a metric that is logged, got 'f1'; there are: .*'val_acc'"),
        pytest.warns(UserWarning, match=r"`monitor` must be a metric that is logged, got 'f1'.*ends in the second"),
    ):
        trainer.fit(model, data(32), data(32))
    assert trainer.current_epoch == 1


def test_a_training_metric_is_watched_where_there_is_no_validation():
    callback, model = SVDTrainingCallback(monitor="train_loss", mode="min"), SmallNet()
    quiet_trainer(callbacks=[callback]).fit(model, data(32))
    assert [step for step, _ in callback.report.metric_values] == [4, 8, 12, 16]
