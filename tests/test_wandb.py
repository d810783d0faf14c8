"""What W&B really gets, read back from the file of an offline run."""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from models import SmallNet, data, quiet_trainer, same_state
from test_strategies import two_processes
from wandb.proto import wandb_internal_pb2

from lightning_svd import FallToBudget, SpectrumMonitor, SVDTrainingCallback
from lightning_svd.lightning.loggers import MOST_CHARTS, SpectrumHistory

BLOCK, HEADER, FIRST, LAST, FULL = 32768, 7, 2, 4, 1

# wandb 0.31's own, and on import only.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    content, position, parts = path.read_bytes(), HEADER, b""
    while position < len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        chunk = content[position + 7 : position + 7 + length]
        if len(chunk) < length:
            return
        position += 7 + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def finished(folder: Path) -> list[wandb_internal_pb2.Record]:
    """Every record of the one run in ``folder``, which W&B's own process may still be writing."""
    (path,) = [path for path in folder.rglob("*.wandb") if not path.parent.is_symlink()]
    for _ in range(600):
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def items(items) -> dict[str, object]:
    """Values by key, nested keys joined by a slash."""
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def history(folder: Path) -> list[dict[str, object]]:
    """Every row of the run's history."""
    return [items(record.history.item) for record in finished(folder) if record.WhichOneof("record_type") == "history"]


def config(folder: Path) -> dict[str, object]:
    """The run's config as it is at the end."""
    found: dict[str, object] = {}
    for record in finished(folder):
        if record.WhichOneof("record_type") == "config":
            found |= items(record.config.update)
    return found


def drawn(rows, suffix: str = "/_type") -> dict[str, list[int]]:
    """Steps at which each medium was logged."""
    steps = defaultdict(list)
    for row in rows:
        for key in row:
            if key.endswith(suffix):
                steps[key.removesuffix(suffix)].append(row["trainer/global_step"])
    return steps


def wandb_logger(folder: Path, **options) -> WandbLogger:
    return WandbLogger(project="test", save_dir=folder, offline=True, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_SILENT", "true")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    logger = wandb_logger(folder)
    callback = SVDTrainingCallback(
        target_macs=0.4, log_spectrum_every_n_epochs=2, exclude_modules=["features.0"], schedule=FallToBudget()
    )
    watcher = SpectrumMonitor(every_n_epochs=2, target_modules=["features.0", "hidden"])
    callbacks = [callback, watcher]
    quiet_trainer(callbacks=callbacks, logger=logger, max_epochs=5, log_every_n_steps=4).fit(SmallNet(), data())
    logger.experiment.finish()
    patch.undo()
    return folder, history(folder), callback, watcher


def test_ranks_and_ratios_are_curves_over_the_trainers_step(run):
    _, rows, callback, _ = run
    curve = [(row["trainer/global_step"], row["svd/macs_ratio"]) for row in rows if "svd/macs_ratio" in row]
    assert [step for step, _ in curve] == list(range(3, 40, 4))
    assert curve[0][1] == 1
    assert curve[-1][1] == pytest.approx(callback.report.macs_ratio)
    ranks = [row["svd_rank/features_2"] for row in rows if "svd_rank/features_2" in row]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == callback.report.timeline[-1].ranks["features.2"]
    total = [row["svd/total_rank"] for row in rows if "svd/total_rank" in row]
    assert total[0] == sum(layer.full_rank for layer in callback.report.layers)
    assert total[-1] == sum(layer.rank for layer in callback.report.layers)


def test_the_penalties_are_curves_too(run):
    _, rows, _, _ = run
    for name in ("orthogonality_error", "orthogonality_penalty", "sparsity_penalty", "sparsity_strength"):
        curve = [row[f"svd/{name}"] for row in rows if f"svd/{name}" in row]
        # From step 28 on, that of the last cut, there are no penalties.
        assert len(curve) == (10 if name == "sparsity_strength" else 6)
        assert all(value >= 0 for value in curve) and max(curve) > 0


def test_histograms_come_every_time_and_charts_when_there_is_twice_as_much_to_show(run):
    _, rows, callback, _ = run
    steps = drawn(rows)
    for layer in callback.report.layers:
        name = layer.name.replace(".", "_")
        assert steps[f"svd_histogram/{name}"] == [0, 16, 32, 40]
        assert steps[f"svd_spectrum/{name}_table"] == [16, 32, 40]
    assert steps["svd/spectrum_heatmap"] == [16, 32, 40]


def test_a_histogram_counts_the_kept_singular_values(run):
    _, rows, callback, _ = run
    counts = [row["svd_histogram/hidden/values"] for row in rows if "svd_histogram/hidden/values" in row]
    layer = next(layer for layer in callback.report.layers if layer.name == "hidden")
    assert sum(counts[0]) == layer.full_rank
    assert sum(counts[-1]) == layer.rank


def table(folder, rows, key):
    """The table that was logged last under this key."""
    path = next(row[f"{key}/path"] for row in reversed(rows) if f"{key}/path" in row)
    (file,) = {found.resolve() for found in folder.rglob(Path(path).name)}
    return json.loads(file.read_text())


def test_a_spectrum_is_a_curve_for_the_start_the_middle_and_now(run):
    folder, rows, callback, _ = run
    layer = min(callback.report.layers, key=lambda layer: layer.rank / layer.full_rank)
    curves = defaultdict(list)
    for step, key, value in table(folder, rows, f"svd_spectrum/{layer.name.replace('.', '_')}_table")["data"]:
        curves[key].append((step, value))
    assert list(curves) == ["start", "epoch 4", "epoch 5"]
    for name, spectrum in (("start", layer.spectrum_before), ("epoch 5", layer.spectrum_after)):
        for index, value in curves[name]:
            assert value == pytest.approx(spectrum[index - 1], rel=torch.finfo(torch.float32).eps)
    assert [index for index, _ in curves["start"]][:: len(curves["start"]) - 1] == [1, layer.full_rank]
    assert len(curves["epoch 5"]) < len(curves["start"])


def test_the_heat_map_is_one_page_for_all_layers(run):
    folder, rows, callback, _ = run
    path = next(row["svd/spectrum_heatmap/path"] for row in reversed(rows) if "svd/spectrum_heatmap/path" in row)
    (file,) = {found.resolve() for found in folder.rglob(Path(path).name)}
    page = file.read_text()
    assert page.count("<figure>") == len(callback.report.layers)
    assert all(f"<figcaption>{layer.name}</figcaption>" in page for layer in callback.report.layers)


def test_the_plan_comes_at_the_start_and_the_layers_at_the_end(run):
    folder, rows, callback, _ = run
    steps = drawn(rows)
    assert (steps["svd_plan"], steps["svd_layers"]) == ([0], [40])
    plan = table(folder, rows, "svd_plan")
    as_dicts = [dict(zip(plan["columns"], row, strict=True)) for row in plan["data"]]
    assert [row["layer"] for row in as_dicts] == [layer.name for layer in callback.plan]
    assert as_dicts[0]["skipped"] == "excluded by `exclude_modules`" and as_dicts[0]["m"] is None
    assert (as_dicts[2]["m"], as_dicts[2]["n"], as_dicts[2]["full_rank"]) == (40, 96, 40)
    layers = table(folder, rows, "svd_layers")
    as_dicts = [dict(zip(layers["columns"], row, strict=True)) for row in layers["data"]]
    assert [(row["layer"], row["rank"]) for row in as_dicts] == [(row.name, row.rank) for row in callback.report.layers]


def test_the_arguments_are_in_the_runs_config(run):
    folder, _, callback, _ = run
    found = config(folder)["svd_training"]
    assert found["target_macs"] == 0.4 and found["exclude_modules"] == ["features.0"]
    assert found["schedule"]["class"] == "FallToBudget" and found["schedule"]["end"] == 0.7
    assert found == json.loads(json.dumps(callback.arguments))


def test_the_final_ratios_are_in_the_summary(run):
    _, rows, callback, _ = run
    # W&B's summary of a key is its last value.
    (final,) = [row for row in rows if "svd_final/macs_ratio" in row]
    for ratio in ("macs_ratio", "params_ratio", "rank_ratio"):
        assert final[f"svd_final/{ratio}"] == pytest.approx(getattr(callback.report, ratio))


def test_no_metric_name_has_a_dot(run):
    _, rows, _, _ = run
    ours = [key for row in rows for key in row if key.startswith(("svd", "layer"))]
    assert ours and not [key for key in ours if "." in key.split("/")[1]]


def test_spectrum_monitor_draws_in_sections_of_its_own(run):
    _, rows, _, watcher = run
    steps = drawn(rows)
    for name in ("features_0", "hidden"):
        assert steps[f"layer_histogram/{name}"] == [0, 16, 32, 40]
        assert steps[f"layer_spectrum/{name}_table"] == [16, 32, 40]
    assert steps["layer/spectrum_heatmap"] == [16, 32, 40]
    curve = [
        (row["trainer/global_step"], row["layer_energy_rank_99/hidden"])
        for row in rows
        if "layer_energy_rank_99/hidden" in row
    ]
    assert [step for step, _ in curve] == [0, 16, 32, 40]
    assert curve[-1][1] == watcher.ranks["hidden"]["energy_rank_99"]


def test_there_are_charts_for_the_largest_layers_only_and_histograms_for_all(tmp_path):
    logger = wandb_logger(tmp_path)
    shapes = {f"layer{i}": (4, 4 + i) for i in range(2 * MOST_CHARTS)}
    history_of_many = SpectrumHistory(shapes)
    for epoch in range(40):
        history_of_many.draw([logger], lambda: {name: [3.0, 2.0, 1.0] for name in shapes}, epoch, 10 * epoch)
    logger.experiment.finish()
    steps = drawn(history(tmp_path))
    assert all(len(steps[f"svd_histogram/layer{i}"]) == 40 for i in range(2 * MOST_CHARTS))
    charted = {key for key in steps if key.startswith("svd_spectrum/")}
    assert charted == {f"svd_spectrum/layer{i}_table" for i in range(MOST_CHARTS, 2 * MOST_CHARTS)}
    assert all(steps[key] == [10, 20, 40, 80, 160, 320] for key in charted)


def test_a_spectrum_that_is_not_finite_is_left_out_and_kills_nothing(tmp_path):
    logger = wandb_logger(tmp_path)
    start = {"good": [2.0, 1.0], "bad": [2.0, 1.0], "worse": [2.0, 1.0], "empty": [2.0, 1.0]}
    spectra = {"good": [2.0, 1.0], "bad": [float("nan"), 1.0], "worse": [float("inf"), 1.0], "empty": []}
    SpectrumHistory(dict.fromkeys(start, (2, 3)), start).draw([logger], lambda: spectra, 1, 0, last=True)
    logger.experiment.finish()
    (row,) = history(tmp_path)
    assert "svd_histogram/good/_type" in row and "svd_spectrum/good_table/_type" in row
    assert not [key for key in row if key.startswith("svd_histogram/") and "good" not in key]


def test_spectra_of_any_finite_kind_are_drawn(tmp_path):
    logger = wandb_logger(tmp_path)
    spectra = {"zeros": [0.0, 0.0], "equal": [1.0] * 100, "one": [3.0], "tiny": [1e-45], "huge": [1e300, 1.0]}
    SpectrumHistory(dict.fromkeys(spectra, (100, 100))).draw([logger], lambda: spectra, 1, 0, last=True)
    logger.experiment.finish()
    (row,) = history(tmp_path)
    for name, values in spectra.items():
        assert sum(row[f"svd_histogram/{name}/values"]) == len(values)
        assert f"svd_spectrum/{name}_table/_type" in row


class Diverging(SmallNet):
    """Its weights become NaN in the second epoch."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if self.current_epoch else 1.0)


def test_a_run_that_diverges_is_logged_to_its_end(tmp_path):
    logger = wandb_logger(tmp_path)
    with pytest.warns(UserWarning, match="has no finite spectrum"):
        quiet_trainer(callbacks=[SpectrumMonitor()], logger=logger, max_epochs=3, log_every_n_steps=8).fit(
            Diverging(), data()
        )
    logger.experiment.finish()
    steps = drawn(history(tmp_path))
    assert steps["layer_histogram/hidden"] == [0, 8]
    assert steps["layer/spectrum_heatmap"] == [8, 16, 24]


def test_a_prefix_stays_before_every_key(tmp_path):
    logger = wandb_logger(tmp_path, prefix="mine")
    trainer = quiet_trainer(callbacks=[SVDTrainingCallback()], logger=logger, max_epochs=1, log_every_n_steps=8)
    trainer.fit(SmallNet(), data())
    logger.experiment.finish()
    keys = {key for row in history(tmp_path) for key in row}
    assert {"mine-svd/macs_ratio", "mine-svd_final/macs_ratio", "mine-svd_layers/_type"} <= keys
    assert not [key for key in keys if key.startswith("svd")]


@pytest.mark.filterwarnings("ignore:.*`resume` will be ignored since W&B syncing is set to `offline`")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_goes_on_from_the_trainers_step(tmp_path):
    def fit(epochs, part, checkpoint=None):
        (tmp_path / part).mkdir()  # older versions of W&B write to the folder of temporary files otherwise
        logger = wandb_logger(tmp_path / part, id="same", resume="allow")
        saved = ModelCheckpoint(tmp_path / f"{part} files", "{epoch}", save_top_k=-1)
        callbacks = [SVDTrainingCallback(target_macs=0.4), SpectrumMonitor(), saved]
        trainer = quiet_trainer(
            callbacks=callbacks, logger=logger, max_epochs=epochs, log_every_n_steps=4, enable_checkpointing=True
        )
        trainer.fit(SmallNet(), data(), ckpt_path=checkpoint)
        logger.experiment.finish()
        return history(tmp_path / part)

    fit(4, "first")
    rows = fit(4, "second", tmp_path / "first files" / "epoch=1.ckpt")
    steps = drawn(rows)
    assert steps["svd_histogram/hidden"] == steps["layer_histogram/hidden"] == [16, 24, 32]
    assert [row["trainer/global_step"] for row in rows if "svd/macs_ratio" in row] == [19, 23, 27, 31]
    curves = {key for _, key, _ in table(tmp_path / "second", rows, "svd_spectrum/hidden_table")["data"]}
    assert curves == {"start", "epoch 3", "epoch 4"}  # the start is in the checkpoint, epoch 1 is not


@pytest.mark.parametrize("options", [{"mode": "disabled"}, {"offline": True}])
def test_weights_do_not_depend_on_wandb(options, tmp_path):
    def weights(logger):
        torch.manual_seed(0)
        model, callbacks = SmallNet(), [SVDTrainingCallback(target_macs=0.4), SpectrumMonitor()]
        quiet_trainer(callbacks=callbacks, logger=logger, log_every_n_steps=4).fit(model, data())
        return model.state_dict()

    logger = WandbLogger(project="test", save_dir=tmp_path, **options)
    assert same_state(weights(logger), weights(False))
    logger.experiment.finish()


class Finish(Callback):
    """Ends the W&B run in the process that has it, which nobody else does for a process that was forked."""

    def teardown(self, trainer, pl_module, stage):
        if trainer.is_global_zero:
            trainer.logger.experiment.finish()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_two_processes_make_one_run(tmp_path):
    callbacks = [SVDTrainingCallback(target_macs=0.4), SpectrumMonitor(), Finish()]
    options = two_processes() | {"logger": wandb_logger(tmp_path), "log_every_n_steps": 4}
    quiet_trainer(callbacks=callbacks, **options).fit(SmallNet(), data())
    rows = history(tmp_path)  # of the one run there is
    assert [row["trainer/global_step"] for row in rows if "svd/macs_ratio" in row] == [3, 7, 11]
    steps = drawn(rows)
    assert steps["svd_histogram/hidden"] == steps["layer_histogram/hidden"] == [0, 4, 8, 12]
    assert (steps["svd_plan"], steps["svd_layers"]) == ([0], [12])
