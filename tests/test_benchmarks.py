"""The performance benchmarks run, count what they say they count, and their page is what their results say."""

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import allocator
import casts
import compress_cost
import deployment
import forms
import full_data
import harness
import heads
import inputs
import latency
import nested
import nets
import orthogonalize
import pages
import policies
import pretrained
import pytest
import quality
import recurrent
import repeats
import rivals
import scale
import scaling
import step_cost
import text
import time_budget
import torch
import trained_nets
import whole_run

from lightning_svd import Alternating, FallToBudget, GrowAndPrune, Nested, Regularizer, svd_layers
from lightning_svd.model.counting import count_costs

ROOT = Path(__file__).parents[1]
SMALL = (lambda: nets.vgg(3, 10, width=8), (4, 3, 8, 8))


@pytest.fixture(autouse=True)
def _one_small_net(monkeypatch):
    monkeypatch.setattr(step_cost, "CASES", {"small": SMALL})
    for script in (latency, whole_run):
        monkeypatch.setattr(script, "CASES", step_cost.CASES)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):  # the scripts silence them
        logger.setLevel(level)


def rows_written(main, path, *arguments):
    main([*arguments, "--threads", "1", "--device", "cpu", "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------- scaling


def test_a_7_b_model_has_a_row_for_each_number_of_gpus(capsys, monkeypatch):
    assert sum(group.numbers(1) for group in scaling.llama_7b(is_dense=True)) == 6_738_415_616
    monkeypatch.setattr("sys.argv", ["scaling.py", "--bandwidth", "1e11"])
    scaling.main()
    printed = capsys.readouterr().out
    assert all(f"{count}, {name}" in printed for count in (8, 64) for name in ("dense", "U, s, V"))


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="torch has fully_shard from 2.6 on")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_memory_falls_as_one_over_the_processes_beyond_that_of_one_layer():
    width, depth = 98, 24  # rows that four processes cannot share evenly
    rows = [scaling.measure(count, width, depth, "fork") for count in scaling.PROCESSES]
    layer = 4 * 2 * width * width
    penalties = 4 * scaling.step_numbers(scaling.stack_groups(width, depth), 1)["penalties"]
    for row in rows:
        kept = scaling.memory(scaling.stack_groups(width, depth), row["processes"])["kept"]
        assert row["kept"] == kept
        small = 4 * width * width * depth  # at most, in process 0
        for phase, most in {
            "step": 4 * layer + 3 * penalties,
            "cut": 4 * layer,
            "gather": 4 * layer + small / 2,
        }.items():
            assert row[phase] <= rows[0][phase] / row["processes"] + most, (row["processes"], phase)
    (table,) = scaling.tables(rows)
    assert [line[0] for line in table.rows] == ["1", "2", "4"]


# ------------------------------------------------------------------------------------------------------------- harness


def test_a_ratio_is_the_median_within_rounds_and_not_of_the_medians():
    mine, base = [2.0, 20.0, 200.0, 4.0, 3.0], [1.0, 10.0, 100.0, 1.0, 1.0]
    assert harness.against(mine, base) == {"ratio": 2.0, "low": 2.0, "high": 3.0, "seconds": 4.0}


def test_actions_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    seconds = harness.in_turns(
        {name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, repeats=2, warm_up=1
    )
    assert "".join(calls) == "aabb" * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_the_command_is_without_the_file_it_was_written_to():
    argv = ["--rounds", "3", "--json", "a/b.json", "--json=c.json", "--plot", "d.svg", "--modes", "eager;compiled"]
    assert harness.command("latency", argv) == "python benchmarks/latency.py --rounds 3 --modes 'eager;compiled'"


# ------------------------------------------------------------------------------------------------------------- scripts


def test_costs_are_counted_without_computing_anything():
    model = step_cost.factorized(SMALL[0]())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step_cost.cost_of(model, SMALL[1]) == count_costs(model.eval(), torch.zeros(SMALL[1]))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_floor_of_a_step_is_the_arithmetic_of_its_products():
    full = step_cost.factorized(torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False)))
    cost = step_cost.cost_of(full, (100, 6))
    dense, regularizer = 3 * 100 * 24, 2 * (6 + 4)
    # Rank 4: W is rebuilt; rank 1: two factors cost less; a Gram matrix and a product with it for U and V.
    assert step_cost.arithmetic(cost, {"0": 4}) == (3 * (4 * 24 + 100 * 24) + regularizer * 16) / dense
    assert step_cost.arithmetic(cost, {"0": 1}) == (3 * 100 * 10 + regularizer) / dense
    assert step_cost.arithmetic(cost, {"0": 1}, "rebuilt") == (3 * (24 + 100 * 24) + regularizer) / dense


@pytest.mark.parametrize("setting", [(), ("--dtype", "bf16"), ("--channels-last",)], ids=["plain", "bf16", "layout"])
def test_step_cost_has_a_row_for_each_variant(tmp_path, setting):
    result = rows_written(step_cost.main, tmp_path / "r.json", "--rounds", "1", *setting)
    rows = {row["variant"]: row for row in result["rows"]}
    assert rows["dense"]["ratio"] == rows["dense"]["floor"] == 1.0 and len(rows) == 12
    assert rows["ours, full rank as dense"]["floor"] == 1.0 <= rows["ours, full rank"]["floor"]
    assert rows["ours, 0.25 of the MACs"]["floor"] < rows["ours, 0.5 of the MACs"]["floor"] < 1.0
    assert result["command"] == " ".join(
        ["python benchmarks/step_cost.py --rounds 1", *setting, "--threads 1 --device cpu"]
    )


def test_a_step_at_the_same_ranks_is_timed_in_every_form(tmp_path):
    rows = rows_written(step_cost.main, tmp_path / "r.json", "--parts", "low-rank", "--rounds", "1")["rows"]
    assert len(rows) == 5 and rows[0]["variant"] == "fixed ranks" and rows[0]["ratio"] == 1.0
    assert all(0.2 < row["macs"] <= step_cost.LOW_BUDGET for row in rows)


def test_a_runs_memory_is_told_apart_in_every_phase(tmp_path, monkeypatch):
    # One square layer: U and V are twice its weight, whole in storage at half of the ranks; a tenth of both is left.
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(40, 40, bias=False))

    monkeypatch.setattr(step_cost, "CASES", {"square": (net, (16, 40))})
    rows = rows_written(step_cost.main, tmp_path / "r.json", "--parts", "memory")["rows"]
    shares = [[row["parameters"], row["gradients"], row["state"]] for row in rows]
    svd, low, pair = 2 + 1 / 40, (2 * 4 * 40 + 4) / 1600, 2 * 4 * 40 / 1600
    counts = [0, 3 * 4, 0, 3 * 4, 3 * 4, 2 * 4]
    for mine, share, beside in zip(shares, (1, svd, 1, svd, low, pair), counts, strict=True):
        tensors = beside / 4 / 1600 if beside else 1 / 1600  # AdamW counts the steps of each, in four bytes
        assert mine == pytest.approx([share, share, 2 * share + tensors])
    assert (
        rows[2]["activations"]
        == rows[0]["activations"]
        == pytest.approx((16 * 40 + 16 * 40 + 16 * 2 + 1) / 1600, rel=0.1)
    )


def test_a_step_is_observed_for_each_importance_that_needs_data(tmp_path):
    rows = rows_written(step_cost.main, tmp_path / "r.json", "--parts", "observed", "--rounds", "1")["rows"]
    assert [row["variant"] for row in rows] == ["not observed", *step_cost.OBSERVERS]
    assert all(row["ratio"] > 0 and row["cut"] > 0 for row in rows)


def test_every_change_of_ranks_of_a_policy_is_timed(tmp_path):
    rows = rows_written(policies.main, tmp_path / "r.json", "--rounds", "1", "--nets", "small")["rows"]
    growing = GrowAndPrune()
    assert {row["policy"]: row["changes"] for row in rows} == {
        "fall": FallToBudget().cuts,
        "finetune": 1,
        "alternating": 2 * Alternating().cycles + 1,
        "grow_and_prune": growing.cuts + growing.groups * growing.rounds,
        "nested": Nested().cuts + 1,
    }
    assert all(row["all_changes"] >= row["change"] > 0 for row in rows)
    assert [row["policy"] for row in rows if "step" in row and row["passes"]["ratio"] > 0] == ["nested"]


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read off Linux's /proc"
)
def test_memory_is_that_of_the_step_alone():
    # 64 MB, which glibc always maps apart and gives back: weight, gradient, momentum, and the gradient with its decay.
    # Not what was there before, nor the net that the variant was copied from. In a process of its own, as the script
    # has it: what this one freed before may still be its.
    code = """
import step_cost, torch
step_cost.CASES["wide"] = (lambda: torch.nn.Linear(4096, 4096), (1, 4096))
before = torch.ones(1 << 24)
print(step_cost.peak_memory("wide", "dense", step_cost.Setting()) / before.untyped_storage().nbytes())
"""
    run = [sys.executable, "-c", code]
    printed = subprocess.run(run, cwd=ROOT / "benchmarks", check=True, capture_output=True, text=True).stdout
    assert 3 <= float(printed) <= 5.5  # a kernel may pack one more for itself


def test_latency_has_rows_of_models_and_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "TURN", 0.0)
    arguments = ["--nets", "small", "--batches", "2", "--rounds", "1", "--budget", "0.5", "--spectra", "power"]
    arguments += ["--modes", "eager; folded, channels-last", "--layers", "eager"]
    result = rows_written(latency.main, tmp_path / "r.json", *arguments)
    models = [row for row in result["rows"] if row["what"] == "model"]
    assert {row["mode"] for row in models} == {"eager", "folded, channels-last"}
    assert all(row["macs"] <= 0.5 for row in models if row["variant"] == "ours")
    layers = [row for row in result["rows"] if row["what"] == "layer"]
    assert layers and all(row["first_seconds"] > 0 < row["second_seconds"] for row in layers)
    with pytest.raises(SystemExit):
        latency.main(["--modes", "fast"])


def test_a_budget_of_time_has_a_row_for_each_share_or_says_what_can_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(time_budget, "NETS", {"small": (lambda: nets.mlp(64, 10, width=256, depth=2), (1, 8, 8))})
    arguments = ("--batches", "4", "--targets", "0.9,0.01", "--seconds", "0.1", "--rounds", "1")
    rows = rows_written(time_budget.main, tmp_path / "r.json", *arguments)["rows"]
    assert [row["target"] for row in rows] == [0.9, 0.01] and "at least" in rows[1]["refused"]
    assert rows[0].keys() >= {"promised", "ratio", "macs", "macs_ratio"} or "refused" in rows[0]
    assert len(time_budget.tables(rows)[0].rows) == 2


def test_a_budget_of_time_in_the_layout_that_is_asked_for_and_without_normalizations(tmp_path, monkeypatch):
    seen = []

    def cut(model, batch, budget):
        weight = model.get_parameter("0.weight")
        layouts = [x.is_contiguous(memory_format=torch.channels_last) for x in (batch, weight)]
        normalizes = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        seen.append((layouts, normalizes, budget["latency_table"].runtime))
        raise ValueError("`target_latency` must be at least 1")

    def net():
        return torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.BatchNorm2d(32), torch.nn.Conv2d(32, 32, 3))

    monkeypatch.setattr(time_budget, "NETS", {"small": (net, (3, 8, 8))})
    monkeypatch.setattr(time_budget, "cut", cut)
    runtimes = "eager,eager channels-last,compiled channels-last,compiled folded,eager folded channels-last"
    arguments = ("--batches", "4", "--targets", "0.9", "--runtimes", runtimes)
    rows_written(time_budget.main, tmp_path / "r.json", *arguments)
    contiguous, last = [False, False], [True, True]
    ways = [(contiguous, True, "eager"), (last, True, "eager"), (last, True, "compiled")]
    ways += [(contiguous, False, "compiled"), (last, False, "eager")]
    assert seen == ways


def test_each_way_to_treat_memory_has_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    nets_of_test = {"small": (lambda: nets.mlp(64, 10, width=256, depth=2), (1, 8, 8))}
    monkeypatch.setattr(time_budget, "NETS", nets_of_test)
    monkeypatch.setattr(allocator, "NETS", nets_of_test)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")  # is none of the ways
    allocator.main(["--only", "small", "4", "--rounds", "2"])
    printed, environments = capsys.readouterr().out, []

    def run(command, env, **options):
        assert command[-3:] == ["--only", "small", "4"]
        environments.append({name: value for name, value in env.items() if name.startswith("MALLOC_")})
        return argparse.Namespace(stdout=printed)

    monkeypatch.setattr(allocator.subprocess, "run", run)
    rows = rows_written(allocator.main, tmp_path / "r.json", "--nets", "small", "--batches", "4")["rows"]
    assert [row["memory"] for row in rows] == [*allocator.WAYS] and environments == [*allocator.WAYS.values()]
    (table,) = allocator.tables(rows)
    assert [line[4] for line in table.rows] == ["1.00"] * 3


def test_a_process_that_keeps_memory_is_started_anew_once(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda path, command, env: started.append((command, env)))
    for name in harness.KEPT_MEMORY:
        monkeypatch.delenv(name, raising=False)
    harness.keep_memory()
    ((command, env),) = started
    assert command[1:] == sys.orig_argv[1:] and env.items() >= {*os.environ.items(), *harness.KEPT_MEMORY.items()}
    for name, value in harness.KEPT_MEMORY.items():
        monkeypatch.setenv(name, value)
    harness.keep_memory()
    assert len(started) == 1


def test_a_budget_of_macs_that_takes_as_long_is_searched_for(monkeypatch):
    # Time made up: half of it is not the layers'.
    taken = {0.5: 0.75, 0.75: 0.875, 0.625: 0.8125, 0.6875: 0.84375, 0.65625: 0.828, 0.640625: 0.8203}

    def cut(model, x, budget):
        return budget["target_macs"], argparse.Namespace(distance=1 - budget["target_macs"]), 0.0

    monkeypatch.setattr(time_budget, "cut", cut)
    monkeypatch.setattr(time_budget, "ratio", lambda model, small, *rest: {"ratio": taken[small]})
    found = time_budget.equal_in_time(None, None, "eager", 1, 0.825)
    assert found == {"equal_macs": 0.640625, "equal_ratio": 0.8203, "equal_distance": 1 - 0.640625}
    row = {"net": "small", "batch": 1, "runtime": "eager", "target": 0.8, "ratio": 0.82, "macs": 0.6}
    row |= {"promised": 0.8, "cutting_seconds": 1.0, "low": 0.8, "high": 0.9, "distance": 0.1}
    (_, equal) = time_budget.tables([row | found])
    assert [line[-1] for line in equal.rows] == ["1.00e-01 *", "3.59e-01"]


@pytest.mark.parametrize("mode", [mode for mode in latency.MODES if "compiled" not in mode])
def test_every_way_of_computing_gives_the_same(mode):
    torch.manual_seed(0)
    x, model = torch.randn(SMALL[1]), SMALL[0]().eval()
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    expected = model(x)
    eps = torch.finfo(torch.float32).eps
    with torch.inference_mode():
        error = (latency.computed(model, x, mode)() - expected).abs().max()
    assert error <= 32 * eps * (9 * 32) ** 0.5 * expected.abs().max()


def test_shaped_spectra_end_at_different_ranks():
    torch.manual_seed(0)
    full = step_cost.factorized(SMALL[0]())
    latency.shape_spectra(full)
    cost = step_cost.cost_of(full, SMALL[1])
    ranks = step_cost.ranks_of(step_cost.cut(full, cost, 0.35))
    assert len({ranks[name] / layer.full_rank for name, layer in svd_layers(full).items()}) > 2


@pytest.mark.filterwarnings("ignore:.*number of training batches")
@pytest.mark.filterwarnings("ignore:`isinstance")
def test_a_whole_run_is_timed_with_and_without_a_logger(tmp_path):
    small = ["--net", "small", "--batch-size", "64", "--epochs", "2", "--steps", "5"]
    arguments = [*small, "--rounds", "1", "--loggers", "CSV"]
    result = rows_written(whole_run.main, tmp_path / "r.json", *arguments)
    assert [row["variant"] for row in result["rows"] if row["what"] == "logging"] == [
        "dense, CSV",
        "ours, to 0.35 of the MACs, CSV",
    ]
    ours = result["rows"][1]
    assert 0.35 < ours["floor"] < 1.0
    assert 0 < ours["before"] < ours["seconds"] and all(seconds >= 0 for seconds in ours["hooks"].values())
    assert ours["hooks"]["decomposition"] > 0 < ours["hooks"]["regularizer, weight decay"]


def test_casts_of_both_models_are_tested_and_weighed(tmp_path, monkeypatch):
    monkeypatch.setattr(casts, "EPOCHS", 1)
    result = rows_written(casts.main, tmp_path / "r.json", "--quick", "--nets", "mlp")
    sizes = {(row["form"], row["precision"]): row["bytes"] for row in result["rows"]}
    assert len(sizes) == 2 * len(casts.CASTS) and all(0 < row["accuracy"] <= 1 for row in result["rows"])
    for form in ("dense", "low-rank"):
        assert sizes[form, "int8, dynamic"] < sizes[form, "float16"] < 0.6 * sizes[form, "float32"]
    assert sizes["low-rank", "float32"] < 0.5 * sizes["dense", "float32"]


def test_an_lstm_is_timed_in_every_form(tmp_path):
    rows = rows_written(recurrent.main, tmp_path / "r.json", "--rounds", "1", "--widths", "8")["rows"]
    assert [(row["way"], row["variant"]) for row in rows] == [*itertools.product(recurrent.WAYS, recurrent.variants(8))]
    assert all(row["ratio"] == 1.0 for row in rows if row["variant"] == "dense")


def test_scale_measures_each_part_and_draws_the_same_figures_again(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "resnet50_layers", lambda width: torch.nn.Linear(8, 8))
    monkeypatch.setattr(scale, "vit", lambda width, depth: torch.nn.Linear(8, 8))
    small = ["--quick", "--rounds", "1", "--side", "4", "--layers", "4"]
    result = rows_written(scale.main, tmp_path / "r.json", *small)
    assert {row["what"] for row in result["rows"]} == {"decomposition", "width", "depth", "logging", "cut"}
    assert all(row["layers"] == 4 and row["ratio"] > 0 for row in result["rows"] if row["what"] in ("logging", "cut"))
    for folder in ("a", "b"):
        pages.draw("scale", scale, result["rows"], tmp_path / folder)
    drawn = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert drawn == ["scale-depth.svg", "scale-width.svg"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in drawn)


def test_resnet50_has_the_parameters_it_is_known_for():
    layers = sum(p.numel() for name, p in scale.resnet50_layers().named_parameters() if not name.endswith("bias"))
    norms = 2 * 26560  # scale and shift of each of its batch normalizations
    assert layers + norms + 1000 == 25_557_032


# ---------------------------------------------------------------------------------------------------------------- page


def test_a_section_is_replaced_and_nothing_else():
    page = "# A\n<!-- x -->\nold\n<!-- /x -->\n<!-- y -->\n<!-- /y -->\nend\n"
    filled = pages.fill(page, "x", "new")
    assert filled == page.replace("old", "\nnew\n")
    assert pages.fill(filled, "x", "new") == filled
    with pytest.raises(ValueError, match=r"one section <!-- z --> .*, it has 0"):
        pages.fill(page, "z", "new")


def test_the_page_is_written_and_checked(tmp_path, monkeypatch):
    row = {"ratio": 0.5, "low": 0.4, "high": 0.6, "seconds": 1.0, "floor": 0.3, "peak_bytes": None}
    row |= {"net": "small", "input": [4, 3], "variant": "ours"}
    result = {"benchmark": "step_cost", "command": "python benchmarks/step_cost.py", "machine": {"CPU": "fast"}}
    (tmp_path / "mine.json").write_text(json.dumps(result | {"rows": [row]}))
    page = tmp_path / "performance.md"
    page.write_text("<!-- mine -->\n<!-- /mine -->\n")
    for other in pages.PAGES.values():
        (tmp_path / other).write_text("")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    assert pages.main(["--check"]) == 1
    assert pages.main([]) == 0
    assert pages.main(["--check"]) == 0
    assert "| ours | 0.50 | 0.40 - 0.60 | 0.30 | 1.000 |" in page.read_text()
    assert "`python benchmarks/step_cost.py`, on CPU fast." in page.read_text()


def test_the_projects_page_is_what_its_results_say():
    assert pages.main(["--check"]) == 0, "run `python benchmarks/pages.py`"


# ------------------------------------------------------------------------------------------------------------- quality


def accuracies(*entries):
    return [{"method": m, "target": t, "seed": s, "accuracy": a} for m, t, s, a in entries]


def test_margins_are_those_to_the_best_rival_and_to_the_dense_net():
    rows = accuracies(
        ("dense", 1.0, 0, 0.9),
        ("dense", 1.0, 1, 0.8),
        ("ours", 0.5, 0, 0.7),
        ("ours {}", 0.5, 0, 0.9),
        ("truncate_at_half", 0.5, 0, 0.8),
        ("truncate_at_half", 0.5, 1, 0.6),
        ("fixed_rank", 0.5, 0, 0.75),
        ("narrow", 0.5, 1, 0.85),
        ("ours", 0.25, 0, 0.7),
    )
    (table,) = quality.margins(rows)
    assert table.rows == [["0.5", "truncate_at_half", "-10.00", "-20.00"]]  # on the seed that all have
    assert quality.margins(rows[2:]) == []


def test_quality_builds_the_objects_that_its_further_arguments_are_for():
    name = 'ours {"schedule": {"start": 0.2}, "regularizer": {"sparsity_weight": 0.006}, "conv_mode": "spatial"}'
    assert quality.method_named(name).keywords == {
        "schedule": FallToBudget(start=0.2),
        "regularizer": Regularizer(sparsity_weight=0.006),
        "conv_mode": "spatial",
    }
    assert quality.method_named('ours {"regularizer": null}').keywords == {"regularizer": None}
    with pytest.raises(ValueError, match="`start` must be in"):
        quality.method_named('ours {"schedule": {"start": 2}}')


@pytest.mark.parametrize("name", list(nets.WIDTHS))
def test_a_narrower_net_has_fewer_macs_at_every_step(name):
    example, widths = torch.zeros(1, 3, 16, 16), nets.widths(name)
    few = [*widths[:2], *widths[len(widths) // 2 :][:3], *widths[-2:]]
    macs = [count_costs(nets.build(name, 3, 16, 10, width).eval(), example).dense("macs") for width in few]
    assert macs == sorted(set(macs))
    assert widths[-1] == nets.WIDTHS[name][0]
    own = nets.build(name, 3, 16, 10)
    assert sum(p.numel() for p in own.parameters()) == sum(
        p.numel() for p in nets.build(name, 3, 16, 10, widths[-1]).parameters()
    )


def setting(**changes):
    data = quality.Data("mnist1d", train_size=128, test_size=100)
    return quality.Setting(data, "mlp", 1, 64, 0.05, "32-true", "channel", **({"seed": 0, "target": 0.25} | changes))


def test_a_narrow_net_is_the_widest_within_the_macs():
    mine = setting()
    width, whole = quality.width_in_macs(mine), quality.macs_of(mine.build(), mine)
    shares = [quality.macs_of(mine.build(each), mine) / whole for each in (width, width + 1)]
    assert shares[0] <= mine.target < shares[1]
    trained = quality.narrow(mine)
    assert quality.macs_of(trained, mine) == shares[0] * whole


def test_a_net_that_is_narrow_in_time_takes_no_longer_than_ours(monkeypatch):
    # Time made up: a unit for each hidden unit, and one width of more that is quicker than those just below.
    mine = setting(seed=1)

    class Clock:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def seconds(self, models, x, rounds):
            return {name: [takes.get(name, takes["other"] or name)] * rounds for name in models}

    monkeypatch.setattr(quality, "Clock", Clock)
    takes = {"ours": 100.0, 107: 99.0, "other": None}
    assert quality.width_in_time.__wrapped__(mine) == 107
    takes = {"ours": 1, "other": 2}
    assert quality.width_in_time.__wrapped__(mine) == 1
    takes = {"ours": 1, "other": 0.5}
    assert quality.width_in_time.__wrapped__(mine) == 256


def test_ours_is_trained_once_for_those_measured_against_it():
    mine, calls = setting(seed=2), []
    once = quality.Once(lambda setting: calls.append(setting) or torch.nn.Linear(2, 2))
    first, second = once(mine), once(mine)
    assert first is not second and calls == [mine] and once.seconds(mine) >= 0
    once(setting(seed=2, target=0.5))
    assert len(calls) == 2


def row_with(method, target, accuracy, **more):
    row = {"method": method, "target": target, "seed": 0, "accuracy": accuracy, "macs": target, "params": 10}
    return row | {"epochs": 1, "seconds": 1.0} | more


def test_the_time_is_shown_where_rows_have_it():
    old = row_with("ours", 0.5, 0.8)
    table = quality.tables([old])[0]
    assert "time / dense" not in table.headings and table.rows == [
        ["ours *", "0.5", "80.00%", "", "0.500", "10", "1", "1"]
    ]
    new = row_with("narrow", 0.5, 0.7, time=0.6, time_low=0.55, time_high=0.7)
    table = quality.tables([old, new])[0]
    assert table.headings[4:7] == ["MACs", "time / dense", "middle half"]
    assert [row[5:7] for row in table.rows] == [["", ""], ["0.60", "0.55 - 0.70"]]


def test_without_rounds_no_time_is_taken():
    assert quality.time_of(torch.nn.Identity(), setting(rounds=0), clock=None) == {}


def test_accuracy_is_drawn_against_time_where_rows_have_it(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: saved.append(figure))
    old = [row_with("dense", 1.0, 0.9), *(row_with("ours", target, 0.8) for target in (0.5, 0.25))]
    measured = {"time": 0.6, "time_low": 0.55, "time_high": 0.7}
    for rows in (old, [row | measured for row in old]):
        quality.plot(rows, "made up", tmp_path / "a.svg")
    assert [[axes.get_xlabel() for axes in figure.axes] for figure in saved] == [
        ["MACs, % of dense"],
        ["MACs, % of dense", "measured time, % of dense"],
    ]
    looks = quality.looks_of(['ours {"distill": true}'])
    assert len({(look["color"], look["marker"]) for look in looks.values()}) == len(looks) == len(quality.METHODS)
    assert looks["ours"] == quality.looks_of([])["ours"]


def test_quality_trains_every_method_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.json"
    arguments = ["--data-set", "mnist1d", "--net", "mlp", "--epochs", "4", "--train-size", "256", "--test-size", "100"]
    arguments += ["--optimizer", "adamw", "--rate", "1e-3", "--targets", "0.5", "--rounds", "5", "--json", str(path)]
    for methods in (["dense", "ours"], list(quality.METHODS)):
        monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--methods", ",".join(methods)])
        quality.main()
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [row["method"] for row in result["rows"]] == [
        "dense",
        "ours",
        *[m for m in quality.METHODS if m not in ("dense", "ours")],
    ]
    assert result["setting"]["optimizer"] == "adamw"
    for row in result["rows"]:
        assert row["epochs"] == 4 and 0 <= row["accuracy"] <= 1
        assert row["time"] > 0 and row["time_low"] <= row["time"] <= row["time_high"]
        if row["method"] != "narrow_in_time":
            assert row["macs"] == 1.0 if row["method"] == "dense" else 0.4 <= row["macs"] <= 0.5
        assert ("width" in row) == row["method"].startswith("narrow")
    assert "ours, against it" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--epochs", "5", "--methods", "dense"])
    with pytest.raises(SystemExit, match="holds rows of another setting"):
        quality.main()


# ---------------------------------------------------------------------------------------------------------- pretrained


class EveryKind(torch.nn.Module):
    """Patches, then steps of an LSTM, then a class: every kind of layer whose inputs the rivals read."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 12, (3, 3), stride=(2, 1), padding=(1, 0))
        self.lstm = torch.nn.LSTM(48, 16, 2, batch_first=True)
        self.linear = torch.nn.Linear(16, 10)

    def forward(self, x):
        maps = self.conv(x).relu()
        return self.linear(self.lstm(maps.flatten(1, 2).mT)[0][:, -1])


def made_up_net(cache, data, labeled=torch.nn.functional.cross_entropy):
    torch.manual_seed(0)
    model, inputs = EveryKind().eval(), torch.randn(64, 2, 8, 8)
    labels = model(inputs).argmax(1)

    def agreement(model):
        return 100 * float((model(inputs).argmax(1) == labels).float().mean())

    batches = [*zip(inputs.split(16), labels.split(16), strict=True)]
    return trained_nets.TrainedNet(
        name="made-up",
        model=model,
        measure="agreement, %",
        higher_is_better=True,
        quality=agreement,
        inputs=trained_nets.drawn(inputs),
        batches=lambda seed: itertools.cycle(batches),
        held_out=batches[:1],
        labeled=labeled,
        distance=trained_nets.divergence,
        rates=(1e-3, 1e9),
    )


def test_a_rivals_second_moments_are_those_of_what_its_layers_compute():
    net = made_up_net(None, None)
    batches = net.calibration(seed=0, count=64)
    seen, model = rivals.inputs_of_layers(net.model, batches), net.model
    assert set(seen) == {"conv", "linear", *(f"lstm.{kind}_l{layer}" for kind in ("ih", "hh") for layer in (0, 1))}
    with torch.no_grad():
        x = torch.cat(batches)
        maps = model.conv(x)
        outputs = (maps - model.conv.bias[:, None, None]).transpose(0, 1).flatten(1).double()
        states, (last, _) = model.lstm(maps.relu().flatten(1, 2).mT)
    W = model.conv.weight.detach().flatten(1).double()
    torch.testing.assert_close(W @ seen["conv"].moment @ W.T, outputs @ outputs.T, rtol=1e-4, atol=1e-3)
    before = states[:, :-1].flatten(0, 1).double()
    torch.testing.assert_close(seen["lstm.hh_l1"].moment, before.T @ before, rtol=1e-4, atol=1e-4)
    assert seen["lstm.hh_l1"].count == states.shape[0] * states.shape[1]
    torch.testing.assert_close(seen["linear"].moment, last[-1].double().T @ last[-1].double(), rtol=1e-4, atol=1e-4)


def test_svd_llm_is_the_best_cut_for_its_inputs_and_asvd_is_not_better():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mix
    W = torch.randn(8, 12, generator=generator, dtype=torch.float64)

    def error(left, right):
        return float((x @ (W - left @ right.T).T).square().sum())

    least = torch.linalg.svdvals(x @ W.T)[3:].square().sum()
    found = error(*rivals.svd_llm(W, rivals.Inputs.of(x), 3))
    assert found == pytest.approx(float(least), rel=1e-6)
    assert found < error(*rivals.asvd(W, rivals.Inputs.of(x), 3))
    assert found < error(*rivals.best_pair(W, 3))
    for _ in range(20):
        right = torch.randn(12, 3, generator=generator, dtype=torch.float64)
        left = torch.linalg.lstsq(x @ right, x @ W.T).solution.T  # the best for this right factor
        assert found < error(left, right)


def test_a_second_moment_of_too_few_inputs_is_whitened_all_the_same():
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = torch.ones(8, 12, dtype=torch.float64)
    left, right = rivals.svd_llm(W, rivals.Inputs.of(x), 2)
    torch.testing.assert_close(x @ right @ left.T, x @ W.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [rivals.spectrum, rivals.by_svd_llm, rivals.by_asvd])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_every_rival_leaves_the_same_share_of_the_macs(method, share):
    net = made_up_net(None, None)
    batches = net.calibration(seed=0, count=64)
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    small = method(net.model, batches, share)
    left = [count_costs(model, batches[0][:1]).dense("macs") for model in (small, net.model)]
    assert share - 0.05 <= left[0] / left[1] <= share
    assert not svd_layers(small)
    assert all(torch.equal(value, before[name]) for name, value in net.model.state_dict().items())


def test_mel_filters_are_of_equal_area_and_overlap_in_pairs():
    filters = trained_nets.mel_filters()
    assert filters.shape == (40, 201) and bool((filters >= 0).all())
    assert int((filters > 0).sum(0).max()) == 2
    frames = trained_nets.mel_frames(torch.sin(2 * torch.pi * 1000 * torch.arange(16000) / 16000))
    assert frames.shape == (101, 40) and int(frames[50].argmax()) == 13
    assert 950 < 40 * int(filters[13].argmax()) < 1100  # Hz


def test_the_equal_error_rate_is_none_for_voices_apart_and_half_for_voices_alike():
    speakers = torch.arange(4).repeat_interleave(5)
    assert trained_nets.equal_error_rate(torch.eye(4)[speakers], speakers) == 0.0
    alike = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rate = trained_nets.equal_error_rate(torch.nn.functional.normalize(alike), torch.arange(400) % 20)
    assert rate == pytest.approx(50, abs=3)


def test_partials_cover_an_utterance():
    frames = torch.arange(330.0)[:, None].expand(330, 40)
    windows = trained_nets.partials(frames)
    assert windows.shape == (4, 160, 40) and windows[:, 0, 0].tolist() == [0.0, 80.0, 160.0, 240.0]
    assert windows[3, 89, 0] == 329.0 and windows[3, 90, 0] == 0.0
    assert trained_nets.partials(frames[:100]).shape == (1, 160, 40)


def test_a_language_model_is_trained_and_judged_by_its_next_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(trained_nets, "TEXT_STEPS", 2)
    monkeypatch.setattr(trained_nets, "sources", lambda: (torch.arange(20_000).byte(), torch.arange(2_000).byte()))
    monkeypatch.setattr(trained_nets.LanguageModel.__init__, "__defaults__", (32, 1, None))
    trained, loaded = (trained_nets.NETS["text"](tmp_path, None) for _ in range(2))
    (batch,) = trained.calibration(0, 4)
    assert torch.equal(trained.model(batch), loaded.model(batch)) and trained.model(batch).shape == (4, 128, 256)
    inputs, following = next(trained.batches(0))
    assert torch.equal(inputs[:, 1:], following[:, :-1])
    assert 0 <= trained.quality(trained.model) <= 100


def test_trained_nets_are_compressed_finetuned_and_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "NETS", {"made-up": made_up_net})
    monkeypatch.setattr(pretrained, "ROUNDS", 1)
    for ours in ("ours", "reconstructed"):
        monkeypatch.setitem(pretrained.METHODS, ours, rivals.spectrum)
    path = tmp_path / "rows.json"
    arguments = ["--cache", str(tmp_path), "--inputs", "64", "--threads", "1", "--json", str(path), "--shares", "0.5"]
    for steps in ("0", "0,3"):
        pretrained.main([*arguments, "--nets", "made-up", "--finetune", steps])
    result = json.loads(path.read_text(encoding="utf-8"))
    kinds = [(row["method"], row["steps"], row["teacher"]) for row in result["rows"]]
    assert len(kinds) == len(set(kinds)) == 1 + 5 * 3
    rows = dict(zip(kinds, result["rows"], strict=True))
    assert rows["original", 0, ""]["quality"] == 100.0 and rows["original", 0, ""]["macs"] == 1.0
    assert all(
        row["macs"] <= 0.5 and row["bytes"] > 0 < row["latency"] for kind, row in rows.items() if kind[0] != "original"
    )
    assert all(row["rate"] == 1e-3 for row in rows.values() if row["steps"])
    assert str(tmp_path) not in result["command"]
    assert "agreement, %" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds rows of another setting"):
        pretrained.main([*arguments, "--nets", "made-up", "--inputs", "32"])


def test_a_net_without_labels_is_only_distilled():
    assert pretrained.finetunings(made_up_net(None, None, labeled=None), [0, 5], pretrained.TEACHERS) == [
        (0, ""),
        (5, "original"),
    ]


def test_a_rival_that_wins_is_named():
    about = {"net": "a", "share": 0.5, "steps": 0, "teacher": "", "higher_is_better": True}
    rows = [about | {"method": method, "quality": quality} for method, quality in (("ours", 8.0), ("ASVD", 9.0))]
    assert pretrained.lost(rows) == ["a, 0.5, finetuning none: ASVD is 1.00 points better than ours"]
    assert pretrained.lost([row | {"higher_is_better": False} for row in rows]) == []


def test_quality_is_shown_against_the_inputs_that_were_calibrated_on(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "NETS", {"made-up": made_up_net})
    small = ["--nets", "made-up", "--counts", "8,32", "--seeds", "0", "--cache", str(tmp_path), "--threads", "1"]
    inputs.main([*small, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["rows"]
    assert [row["inputs"] for row in rows] == [8, 32] and all(0 <= row["quality"] <= 100 for row in rows)
    (table,) = inputs.tables(rows)
    assert [line[0] for line in table.rows] == ["8", "32"]
    pages.draw("inputs", inputs, rows, tmp_path)
    assert (tmp_path / "inputs-quality.svg").exists()


# ------------------------------------------------------------------------------------------------------ compress_cost


def test_the_cost_of_compression_is_that_of_its_passes_svds_and_the_rest(tmp_path):
    few = ("--width", "64", "--depth", "1", "--size", "32", "--inputs", "8", "--batch-size", "4", "--parts", "time")
    rows = rows_written(compress_cost.main, tmp_path / "out.json", *few)["rows"]
    seconds = {row["part"]: row["seconds"] for row in rows if row["what"] == "time"}
    assert seconds["whole"] == pytest.approx(seconds["passes"] + seconds["whole, without the passes"])
    (passes,) = [row for row in rows if row["what"] == "passes"]
    assert passes["backward"] == 2 * 4  # the batch that is not held out, for moments and for what the loss feels
    inside = {row["part"]: row["seconds"] for row in rows if row["what"] == "inside"}
    whole = inside.pop("whole")
    assert whole == pytest.approx(sum(inside.values()))
    assert [table.title.split(";")[0] for table in compress_cost.tables(rows)] == [
        "Time",
        "Inside the call, one of them",
    ]


# -------------------------------------------------------------------------------------------------------------- nested


def test_one_nested_run_is_held_against_a_run_for_each_budget(tmp_path):
    rows = rows_written(nested.main, tmp_path / "r.json", "--quick", "--nested", '{"budgets": 2}')["rows"]
    at_budgets = {(row["way"], round(row["budget"], 2)) for row in rows}
    assert at_budgets == {*itertools.product(nested.WAYS, (0.15, 0.39)), ("nested", 1.0), ("dense", 1.0)}
    assert all(0 < row["accuracy"] < 1 for row in rows)
    (table,) = nested.tables(rows)
    assert [row[0] for row in table.rows] == ["0.15", "0.39", "1.00"] and table.rows[2][1] == ""


# ---------------------------------------------------------------------------------------------------------- deployment


def test_forms_of_a_layer_are_timed_in_turns(tmp_path):
    rows = rows_written(forms.main, tmp_path / "out.json", "--quick")["rows"]
    assert [row["rank"] for row in rows] == [96, 144] and all(row["identity"] > 0 for row in rows)
    assert rows[0]["macs_pair"] == pytest.approx(96 * 1920 / (384 * 1536))
    assert rows[0]["macs_identity"] == pytest.approx(96 * (1920 - 96) / (384 * 1536))
    forms_of_conv = forms.conv_forms(32, 8)
    x = torch.randn(2, 32, 3, 3)
    assert {form(x).shape for form in forms_of_conv.values()} == {x.shape}
    assert [table.title for table in forms.tables(rows)] == ["eager fp32, time / dense"]


def test_what_is_deployed_is_smaller_and_computes_nearly_the_same(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(deployment.NETS, "small", (lambda: nets.vgg(3, 10, width=16), (3, 8, 8)))
    encoder = torch.nn.TransformerEncoderLayer(32, 2, 64, 0.0, batch_first=True)
    monkeypatch.setitem(deployment.NETS, "encoder", (lambda: encoder, (4, 32)))
    few = ("--nets", "small,encoder", "--batches", "2", "--rounds", "1", "--share", "0.5")
    rows = rows_written(deployment.main, tmp_path / "out.json", *few)["rows"]
    by = {(row["net"], row["form"], row["kind"]): row for row in rows}
    assert {form for net, form, _ in by if net == "small"} == {"dense", "pairs"}
    assert {form for net, form, _ in by if net == "encoder"} == {"dense", "pairs", "identity"}
    assert by["small", "pairs", "fp32, folded"]["distance"] < 1e-5
    for net, form in {key[:2] for key in by}:
        size = {kind: by[net, form, kind]["bytes"] for kind in ("fp32", "bf16", "ONNX fp32", "ONNX int8")}
        assert size["bf16"] < size["fp32"] and size["ONNX int8"] < size["ONNX fp32"]
        assert by[net, form, "ONNX fp32"]["distance"] < 1e-4 and by[net, form, "ONNX int8"]["distance"] < 0.2
    assert len(deployment.tables(rows)) == 2


def test_queries_and_keys_lose_less_together(tmp_path):
    rows = rows_written(heads.main, tmp_path / "out.json", "--quick")["rows"]
    assert len(rows) == 9 and all(0 <= row["together"] < row["apart"] for row in rows)
    torch.manual_seed(0)
    matrix = torch.randn(8, 8)
    assert torch.linalg.matrix_rank(heads.cut(matrix, 3)) == 3
    assert heads.lost(16, 2, 0.5, 1.0)["together"] < 1e-10


# ------------------------------------------------------------------------------------------- what runs several times


def test_a_step_is_timed_with_weights_rebuilt_in_each_time_step_and_once(tmp_path):
    rows = rows_written(repeats.main, tmp_path / "out.json", "--quick", "--rounds", "2")["rows"]
    assert [row["way"] for row in rows] == list(repeats.WAYS) and all(row["ratio"] > 0 for row in rows)
    (table,) = repeats.tables(rows)
    assert len(table.rows) == 1 and len(table.rows[0]) == len(table.headings)


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.filterwarnings("ignore:.*number of training batches")
def test_a_language_model_is_trained_in_four_ways_and_each_net_once(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    call = ("--quick", "--targets", "0.5", "--rounds", "2", "--folder", str(tmp_path))
    rows = rows_written(text.main, tmp_path / "out.json", *call)["rows"]
    assert [row["method"] for row in rows] == [name for name in text.METHODS if name != "ours_by_spectrum"]
    assert all(row["params"] == round(row["params_ratio"] * rows[0]["params"]) for row in rows)
    assert all(0.3 < row["params_ratio"] <= 0.5 for row in rows[1:])
    assert all(1 < row["perplexity"] < 256 for row in rows)
    assert len(text.tables(rows)[0].rows) == 4
    monkeypatch.setattr(text, "METHODS", {})  # nothing is trained again
    work = text.Work(tmp_path, rows[0]["steps"], rows[0]["rate"], text.QUICK_WIDTH, 0)
    again = [text.perplexity(text.final(work, row["method"], row["target"]), work) for row in rows]
    assert again == [row["perplexity"] for row in rows]


def test_the_schedule_of_a_language_model_goes_on_where_it_was_cut(tmp_path):
    work = text.Work(tmp_path, 40, 1e-2, 32, 0)
    whole, half = text.Language(work, torch.nn.Linear(1, 1), 0), text.Language(work, torch.nn.Linear(1, 1), 20)
    rates = [text.Language.rate(whole, step) for step in range(1, 41)]
    assert rates[0] == 0.5 and rates[1] == max(rates) and rates[-1] == 0.0
    resumed = half.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert resumed.get_last_lr() == [pytest.approx(1e-2 * rates[20])]
    first, last = [*text.Windows(work, 0, 40)], [*text.Windows(work, 20, 40)]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(first[20:], last, strict=True))


# ----------------------------------------------------------------------------------------------------------- full_data


def test_rows_of_full_data_stand_beside_those_of_papers():
    row = {"method": "ours", "target": 0.33, "accuracy": 0.86, "macs": 0.33, "params": 9, "epochs": 30, "seed": 0}
    (table,) = full_data.tables([row, row | {"method": "narrow", "accuracy": 0.87, "time": 0.5}])
    assert [line[0] for line in table.rows[:2]] == ["narrow", "ours"] and table.rows[0][3] == "0.50"
    assert len(table.rows) == 2 + len(full_data.PUBLISHED)


def test_full_data_does_not_mix_schedules(tmp_path, monkeypatch, capsys):
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"rows": [{"method": "dense", "target": 1.0, "epochs": 30}]}))
    monkeypatch.setattr("sys.argv", ["full_data.py", "--epochs", "60", "--folder", str(tmp_path), "--json", str(path)])
    with pytest.raises(SystemExit):
        full_data.main()
    assert "rows of another number of epochs" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- orthogonalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", orthogonalize.KINDS)
def test_newton_schulz_finds_the_polar_factor(kind, dtype):
    torch.manual_seed(0)
    for m, k in ((24, 24), (60, 20), (5, 1)):
        matrix = orthogonalize.made(kind, m, k, dtype)
        found, iterations = orthogonalize.newton_schulz(matrix)
        assert iterations is not None
        exact = orthogonalize.polar(matrix.double())
        condition = float(torch.linalg.cond(matrix.double()))
        assert torch.dist(found.double(), exact) <= 100 * torch.finfo(dtype).eps * condition * m


def test_newton_schulz_says_where_it_does_not_converge():
    for matrix in (torch.zeros(6, 3), torch.ones(6, 3), torch.full((6, 3), torch.nan)):
        assert orthogonalize.newton_schulz(matrix)[1] is None


def test_exact_factors_by_products(tmp_path):
    torch.manual_seed(0)
    U, V = torch.randn(12, 4), torch.randn(9, 4)
    for left in (U, U * torch.tensor([1.0, 1.0, 1.0, 0.0])):  # the latter by QR
        found = orthogonalize.refactorized_by_products(orthogonalize.Factors(left, torch.ones(4), V))
        assert torch.allclose(found.U * found.s @ found.V.mT, left @ V.mT, atol=1e-4)
        assert torch.allclose(found.U.mT @ found.U, torch.eye(4), atol=1e-4)
    rows = rows_written(orthogonalize.main, tmp_path / "out.json", "--quick", "--rounds", "1")["rows"]
    assert [row["kind"] for row in rows] == list(orthogonalize.KINDS)
    assert len(orthogonalize.tables(rows)[0].rows) == len(rows)
