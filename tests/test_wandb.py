"""What W&B really gets, read back from the file of an offline run."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.loggers import WandbLogger
from models import SmallNet, data, quiet_trainer
from wandb.proto import wandb_internal_pb2

from lightning_svd import SVDTrainingCallback
from lightning_svd.monitor import log_spectra

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
        position += 7 + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def history(folder: Path) -> list[dict[str, object]]:
    """Every row of the run's history, nested keys joined by a slash."""
    (path,) = folder.rglob("*.wandb")
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import os

    folder = tmp_path_factory.mktemp("run")
    os.environ["WANDB_SILENT"] = "true"
    logger = WandbLogger(project="test", save_dir=folder, offline=True)
    callback = SVDTrainingCallback(target_macs=0.4, log_spectrum_every_n_epochs=2)
    quiet_trainer(callbacks=[callback], logger=logger, max_epochs=5, log_every_n_steps=4).fit(SmallNet(), data())
    logger.experiment.finish()
    return history(folder), callback.report


def test_ranks_and_ratios_are_curves_over_the_trainers_step(run):
    rows, report = run
    curve = [(row["trainer/global_step"], row["svd/macs_ratio"]) for row in rows if "svd/macs_ratio" in row]
    assert [step for step, _ in curve] == list(range(3, 40, 4))
    assert curve[0][1] == 1
    assert curve[-1][1] == pytest.approx(report.macs_ratio)
    ranks = [row["svd_rank/features_2"] for row in rows if "svd_rank/features_2" in row]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] == report.timeline[-1].ranks["features.2"]


def test_spectra_are_drawn_at_the_start_every_n_epochs_and_the_end(run):
    rows, report = run
    drawn = defaultdict(list)
    for row in rows:
        for key in row:
            if key.startswith(("svd_histogram/", "svd_spectrum/")) and key.endswith("/_type"):
                drawn[key].append(row["trainer/global_step"])
    names = [layer.name.replace(".", "_") for layer in report.layers]
    for name in names:
        assert drawn[f"svd_histogram/{name}/_type"] == [0, 16, 32, 40]
        assert drawn[f"svd_spectrum/{name}_table/_type"] == [0, 16, 32, 40]


def test_a_histogram_counts_the_kept_singular_values(run):
    rows, report = run
    counts = [row["svd_histogram/hidden/values"] for row in rows if "svd_histogram/hidden/values" in row]
    layer = next(layer for layer in report.layers if layer.name == "hidden")
    assert sum(counts[0]) == layer.full_rank
    assert sum(counts[-1]) == layer.rank


def test_the_table_of_layers_comes_once_with_a_row_for_each(run):
    rows, report = run
    tables = [row for row in rows if "svd_layers/_type" in row]
    assert len(tables) == 1
    assert tables[0]["svd_layers/_type"] == "table-file"
    assert tables[0]["svd_layers/nrows"] == len(report.layers)


def test_no_metric_name_has_a_dot(run):
    rows, _ = run
    assert not [key for row in rows for key in row if key.startswith("svd") and "." in key.split("/")[1]]


def test_a_spectrum_that_is_not_finite_is_left_out_and_kills_nothing(tmp_path):
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    spectra = {"good": [2.0, 1.0], "bad": [float("nan"), 1.0], "empty": []}
    log_spectra([logger], spectra, {name: [2.0, 1.0] for name in spectra}, step=0)
    logger.experiment.finish()
    keys = {key for row in history(tmp_path) for key in row}
    assert "svd_histogram/good/_type" in keys
    assert not [key for key in keys if "bad" in key or "empty" in key]
