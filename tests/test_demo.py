"""The demo runs end to end and writes what it says."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_svd.cli import main
from lightning_svd.demo import digits, run_demo


def test_demo_meets_the_budget_and_writes_report_weights_and_log(tmp_path, capsys):
    # One epoch says nothing of accuracy; the figures of a full run are in the README with their command.
    assert main(["demo", "--out", str(tmp_path), "--epochs", "1", "--seeds", "0,1", "--logger", "csv"]) == 0
    printed = capsys.readouterr().out
    assert "mean of 2 seeds" in printed and "Test accuracy" in printed and "CPU latency, batch 64" in printed
    assert str(tmp_path) in printed
    page = (tmp_path / "report.html").read_text()
    assert "Test accuracy" in page and "blocks.2.conv2" in page
    dense, low_rank = (load_file(tmp_path / f"{name}.safetensors") for name in ("dense", "low-rank"))
    assert "blocks.2.conv2.weight" in dense and "blocks.2.conv2.0.weight" in low_rank
    assert len(list(tmp_path.glob("csv/*/metrics.csv"))) == 2


def test_demo_reports_the_macs_of_its_model(tmp_path):
    ((dense, low_rank),) = run_demo(tmp_path, epochs=1, logger="none")
    assert dense.report.macs == dense.report.dense_macs == low_rank.report.dense_macs
    assert low_rank.report.macs_ratio == pytest.approx(0.35, rel=0.01)
    assert low_rank.report.macs_ratio <= 0.35
    assert low_rank.bytes < dense.bytes


def test_demo_prints_its_figures_as_json_and_nothing_else(tmp_path, capsys):
    main(["demo", "--out", str(tmp_path), "--epochs", "1", "--seeds", "3", "--logger", "none", "--json"])
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["seed"] == 3 and 0 < figures["low_rank"]["accuracy"] <= 1
    assert figures["low_rank"]["macs"] <= 0.35 * figures["dense"]["macs"]
    assert figures["low_rank"]["latency_seconds"].keys() == {"1", "64"}


def test_digits_are_split_the_same_way_each_time():
    (train, test), (again, _) = digits(), digits()
    assert len(train) == 1347 and len(test) == 450
    assert torch.equal(train.tensors[0], again.tensors[0])
    assert train.tensors[0].min() >= 0 and train.tensors[0].max() <= 1


def test_the_command_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--logger", "paper"])
    assert "invalid choice: 'paper'" in capsys.readouterr().err
