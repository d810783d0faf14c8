"""What is drawn when, and what every logger gets; W&B's own file is read in test_wandb.py."""

import contextlib
import csv
import itertools
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from models import SmallNet, data, quiet_trainer, same_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_strategies import two_processes

from lightning_svd import SpectrumMonitor, SVDTrainingCallback
from lightning_svd.lightning import loggers
from lightning_svd.lightning.loggers import (
    MOST_CHARTS,
    MOST_EPOCHS,
    MOST_INDICES,
    Chart,
    SpectrumHistory,
    evenly,
    metric_name,
)

# Lightning's own when tensorboard is used; torch's in the processes that it forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


class Notes(Logger):
    """A logger as anyone may write one: it takes numbers only."""

    def __init__(self):
        super().__init__()
        self.rows = []

    name = version = "notes"

    def log_hyperparams(self, params, *args, **kwargs):
        raise AssertionError("hyperparameters are the user's")

    def log_metrics(self, metrics, step=None):
        assert all(isinstance(value, int | float) for value in metrics.values())
        self.rows.append((step, metrics))


def fit(logger, model=None, epochs=4, **options):
    torch.manual_seed(0)
    callback = SVDTrainingCallback(target_macs=0.4)
    callbacks = [callback, SpectrumMonitor()]
    options = {"callbacks": callbacks, "logger": logger, "log_every_n_steps": 4, "max_epochs": epochs} | options
    trainer = quiet_trainer(**options)
    model = model or SmallNet()
    trainer.fit(model, data())
    return trainer, model, callback


PENALTIES = {"svd/orthogonality_error", "svd/orthogonality_penalty", "svd/sparsity_penalty"}
KEYS = PENALTIES | {
    *("svd/total_rank", "svd/rank_ratio", "svd/macs_ratio", "svd/params_ratio", "svd/sparsity_strength"),
    *("svd_rank/features_0", "svd_rank/features_2", "svd_rank/hidden", "svd_rank/head"),
}
FINAL = {"svd_final/macs_ratio", "svd_final/params_ratio", "svd_final/rank_ratio"}


# -------------------------------------------------------------------------------------------------------------- loggers


def test_a_logger_of_any_kind_gets_every_number():
    notes = Notes()
    _, _, callback = fit(notes)
    steps = {step: set() for step, row in notes.rows if row.keys() & KEYS}
    for step, row in notes.rows:
        steps.get(step, set()).update(row.keys() & KEYS)
    # After the last cut, at 70 % of the run, nothing is penalized.
    assert steps == {step: KEYS if step < 0.7 * 32 else KEYS - PENALTIES for step in range(3, 32, 4)}
    (final,) = [(step, row) for step, row in notes.rows if row.keys() & FINAL]
    assert final == (32, {name: getattr(callback.report, name.split("/")[1]) for name in FINAL})


def test_pauses_are_a_curve_where_a_metric_is_watched():
    notes = Notes()
    guarded = SVDTrainingCallback(target_macs=0.4, monitor="train_loss", mode="min")
    fit(notes, callbacks=[guarded])
    assert [row["svd/paused"] for _, row in notes.rows if "svd/paused" in row] == [0.0] * 8


def test_csv_gets_every_number(tmp_path):
    _, _, callback = fit(CSVLogger(tmp_path, name="", version=""))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert rows[0].keys() >= KEYS | FINAL
    assert float(rows[-1]["svd_final/macs_ratio"]) == callback.report.macs_ratio
    assert [int(row["step"]) for row in rows if row["svd_rank/hidden"]] == list(range(3, 32, 4))


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_gets_numbers_histograms_and_the_heat_map(tmp_path):
    _, _, callback = fit(TensorBoardLogger(tmp_path, name="", version=""))
    found = events(tmp_path)
    tags = found.Tags()
    assert set(tags["scalars"]) >= KEYS | FINAL
    layers = {layer.name: layer for layer in callback.report.layers}
    for name, layer in layers.items():
        histograms = found.Histograms(f"svd_histogram/{metric_name(name)}")
        assert [event.step for event in histograms] == [0, 8, 16, 24, 32]
        assert [sum(event.histogram_value.bucket) for event in (histograms[0], histograms[-1])] == [
            layer.full_rank,
            layer.rank,
        ]
        assert histograms[-1].histogram_value.max == pytest.approx(max(layer.spectrum_after))
    assert tags["images"] == ["svd/spectrum_heatmap", "layer/spectrum_heatmap"]
    assert [event.step for event in found.Images("svd/spectrum_heatmap")] == [32]


def test_tensorboard_draws_no_figure_without_matplotlib(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.colors"):
        monkeypatch.setitem(sys.modules, module, None)
    fit(TensorBoardLogger(tmp_path, name="", version=""), epochs=1)
    tags = events(tmp_path).Tags()
    assert tags["images"] == [] and "svd_histogram/hidden" in tags["histograms"]


def test_tensorboard_gets_its_figure_again_when_much_was_drawn(tmp_path):
    history, logger = SpectrumHistory({"fc": (4, 4)}), TensorBoardLogger(tmp_path, name="", version="")
    for epoch in range(40):
        history.draw([logger], lambda: {"fc": [2.0, 1.0, 0.0]}, epoch, epoch)
    logger.finalize("success")
    assert [event.step for event in events(tmp_path).Images("svd/spectrum_heatmap")] == [16, 32]


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger, Notes])
def test_weights_do_not_depend_on_the_logger(kind, tmp_path):
    logger = kind() if kind is Notes else kind(tmp_path)
    _, without, _ = fit(False)
    _, model, _ = fit([logger, Notes()])
    assert same_state(model.state_dict(), without.state_dict())


def test_two_processes_log_once(tmp_path):
    both = [CSVLogger(tmp_path, name="", version=""), TensorBoardLogger(tmp_path, name="", version="")]
    fit(both, **two_processes())
    assert len(list(tmp_path.glob("metrics.csv"))) == len(list(tmp_path.glob("events.*"))) == 1
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["svd_final/macs_ratio"]] == [12]
    assert [int(row["step"]) for row in rows if row["layer_stable_rank/hidden"]] == [0, 4, 8, 12]
    assert [event.step for event in events(tmp_path).Histograms("svd_histogram/hidden")] == [0, 4, 8, 12]


class WandbLogger(Notes):
    """By its name. It leaves it to its callers that only one process logs, and writes down what each one does."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def note(self, *keys):
        with (self.folder / f"{torch.distributed.get_rank()}.txt").open("a") as file:
            file.write("".join(f"{key}\n" for key in keys))

    def log_hyperparams(self, params, *args, **kwargs):
        self.note(*params)

    def log_metrics(self, metrics, step=None):
        self.note(*metrics)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_of_two_processes_only_the_first_logs_where_lightning_does_not_see_to_it(tmp_path, monkeypatch):
    artist = loggers.Artist("WandbLogger", 1, lambda logger, drawing, step: logger.note("drawing"))
    monkeypatch.setattr(loggers, "_ARTISTS", [artist])
    fit(WandbLogger(tmp_path), **two_processes())
    first, second = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in (0, 1))
    ours = {"svd_training", "svd_plan", "svd_layers", "drawing", "layer_stable_rank/hidden", *FINAL}
    assert ours <= set(first) and not ours & set(second)


def test_a_trial_run_logs_nothing_that_stays(tmp_path):
    trainer, _, _ = fit(TensorBoardLogger(tmp_path), fast_dev_run=True)
    assert type(trainer.logger).__name__ == "DummyLogger"
    assert not list(tmp_path.iterdir())


def test_the_progress_bar_shows_the_share_of_macs_and_the_total_rank(capsys):
    bar = TQDMProgressBar(refresh_rate=1)
    torch.manual_seed(0)
    callback = SVDTrainingCallback(target_macs=0.4)
    options = {"callbacks": [callback, bar], "enable_progress_bar": True, "log_every_n_steps": 4}
    trainer = quiet_trainer(**options)
    trainer.fit(SmallNet(), data())
    assert trainer.progress_bar_metrics["svd_macs"] == pytest.approx(callback.report.macs_ratio, abs=5e-4)
    assert trainer.progress_bar_metrics["svd_rank"] == sum(layer.rank for layer in callback.report.layers)
    assert "svd_rank=" in capsys.readouterr().out


def test_nothing_is_printed_where_the_progress_bar_is_off(capsys):
    fit(False)
    assert "svd_rank=" not in "".join(capsys.readouterr())


# -------------------------------------------------------------------------------------------------------------- history


@contextlib.contextmanager
def drawn_by(artist):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loggers, "_ARTISTS", [loggers.Artist("Notes", 1, artist)])
        yield


def test_nothing_is_computed_where_nobody_draws():
    def never():
        raise AssertionError("spectra were asked for")

    history = SpectrumHistory({"fc": (4, 4)})
    history.draw([], never, 0, 0)
    history.draw([Notes(), CSVLogger("logs")], never, 1, 1, last=True)


def test_one_moment_is_drawn_once_and_the_last_one_whole():
    history, seen = SpectrumHistory({"fc": (3, 3)}), []
    moments = [(0, 0), (1, 8), (1, 8), (2, 16), (3, 24), (3, 24, True), (3, 24, True)]
    with drawn_by(lambda logger, drawing, step: seen.append((step, drawing))):
        for moment in moments:
            history.draw([Notes()], lambda: {"fc": [1.0]}, *moment)
    assert [(step, bool(drawing.spectra), bool(drawing.charts)) for step, drawing in seen] == [
        (0, True, False),
        (8, True, True),
        (16, True, True),
        (24, True, False),
        (24, False, True),
    ]
    assert seen[-1][1].charts[0].epochs == [0, 1, 2, 3]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(0, 40))
def test_charts_are_few_however_long_the_run(count, layers):
    history, seen = SpectrumHistory({f"fc{i}": (40, 50 + i) for i in range(layers)}), []
    spectra = {f"fc{i}": [1.0] * 40 for i in range(layers)}
    with drawn_by(lambda logger, drawing, step: seen.append((step, drawing))):
        for step in range(count):
            history.draw([Notes()], lambda: spectra, step, step, step == count - 1)
    for step, drawing in seen:
        assert drawing.spectra == spectra and len(drawing.charts) <= MOST_CHARTS
        for chart in drawing.charts:
            assert len(chart.epochs) == len(chart.columns) <= MOST_EPOCHS and len(chart.indices) <= MOST_INDICES
            assert chart.epochs[-1] == step
    assert sum(bool(drawing.charts) for _, drawing in seen) <= count.bit_length() + 1
    assert not layers or seen[-1][1].charts


@given(st.integers(0, 1000), st.integers(2, 50))
def test_positions_are_spread_evenly_over_all(count, most):
    positions = evenly(count, most)
    assert len(positions) == min(count, most) and positions == sorted(set(positions))
    if count:
        assert (positions[0], positions[-1]) == (0, count - 1)
    gaps = {b - a for a, b in itertools.pairwise(positions)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_heat_map_is_relative_to_the_start_and_empty_where_ranks_went():
    chart = Chart("fc", [1, 2, 3], [0, 5], [[4.0, 2.0, 1.0], [5.0, 1.0]])
    heat_map = chart.heat_map()
    assert heat_map.rows == [[1.0, 1.25], [0.5, 0.25], [0.25, None]]
    assert (heat_map.title, heat_map.x, heat_map.y) == ("fc", [0, 5], [1, 2, 3])


def test_a_layer_of_zeros_has_a_heat_map_too():
    assert Chart("", [1, 2], [0, 1], [[0.0, 0.0], []]).heat_map().rows == [[0.0, None], [0.0, None]]


def test_a_resumed_history_begins_with_the_start():
    history = SpectrumHistory({"fc": (2, 2)}, start={"fc": [3.0, 1.0]})
    with drawn_by(lambda logger, drawing, step: None):
        history.draw([Notes()], lambda: {"fc": [2.0]}, 5, 40)
    (chart,) = history.charts()
    assert {name: list(curve) for name, curve in chart.curves().items()} == {"start": [3.0, 1.0], "epoch 5": [2.0]}
