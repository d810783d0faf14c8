"""The command reads what a fit leaves, says what is in it, and turns it into other forms that compute the same."""

import io
import json
import sys

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from models import SmallNet, data, quiet_trainer
from safetensors.torch import load_file, save_file, save_model

import lightning_svd
from lightning_svd import SVDTrainingCallback, load_low_rank, save_low_rank
from lightning_svd.cli import main
from lightning_svd.files.loading import load, model_maker
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.model.export import TOLERANCE, onnx_session
from lightning_svd.report.inspection import inspect_model

MODEL, SHAPE = ["--model", "models:SmallNet"], ["--example-input", "2,1,8,8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a fit leaves: checkpoints from within it and after it, the low-rank and the dense weights."""
    folder = tmp_path_factory.mktemp("fit")
    torch.manual_seed(0)
    model = SmallNet(momentum=0.9)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4), saving], enable_checkpointing=True)
    trainer.fit(model, data())
    trainer.save_checkpoint(folder / "end.ckpt")
    save_low_rank(model, folder / "low-rank.safetensors")
    save_model(SmallNet(), str(folder / "dense.safetensors"))
    torch.save({"weights": {}}, folder / "other.pt")
    (folder / "text.txt").write_text("no model")
    return folder


def run(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_inspect_says_what_it_does_not_look_at(tmp_path, capsys):
    weights = {"fc.weight": torch.randn(8, 8), "fc.bias": torch.randn(8), "experts.up": torch.randn(4, 8, 8)}
    save_file(weights, tmp_path / "experts.safetensors")
    said = run(capsys, "inspect", tmp_path / "experts.safetensors")
    assert "left alone: 78.0% of the parameters, experts.up: not called `weight`" in said
    assert len(json.loads(run(capsys, "inspect", tmp_path / "experts.safetensors", "--json"))) == 1


def test_inspect_of_a_model_says_what_is_left_alone():
    net = torch.nn.Sequential(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 8))
    report = inspect_model(net)
    assert report.left_alone == "42.1% of the parameters, 0: its weight is computed from other parameters (WeightNorm)"
    assert [name for name, *_ in report.skipped] == ["0"]


def refused(*arguments):
    with pytest.raises(SystemExit) as refusal:
        main([str(argument) for argument in arguments])
    return str(refusal.value)


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-svd {lightning_svd.__version__}\n"


# ---------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_printed_and_written(capsys, tmp_path):
    out = tmp_path / "plan.yaml"
    printed = run(capsys, "plan", *MODEL, "--exclude-modules", "head", "--conv-mode", "spatial", "--out", out)
    assert "3 of 4 layers with a weight matrix are factorized" in printed
    layers = yaml.safe_load(out.read_text())["layers"]
    assert layers["features.2"]["conv_mode"] == "spatial" and "exclude_modules" in layers["head"]["skip"]
    rows = json.loads(run(capsys, "plan", *MODEL, "--target-modules", "all-linear", "--json"))
    assert [row["name"] for row in rows if not row["skipped"]] == ["hidden", "head"]


def test_a_model_is_found_in_a_file_too(capsys, tmp_path):
    (tmp_path / "mine.py").write_text("from torch import nn\n\nclass Mine(nn.Linear):\n    pass\n")
    options = ("--arguments", '{"in_features": 9, "out_features": 8}', "--json")
    rows = json.loads(run(capsys, "plan", "--model", f"{tmp_path}/mine.py:Mine", *options))
    assert rows[0]["weight_shape"] == [8, 9] and "subclass of Linear" in rows[0]["skipped"]
    del sys.modules["mine"]


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("SmallNet", "must be `package.module:Class` or"),
        ("nowhere.at_all:Net", "cannot import nowhere.at_all"),
        ("nowhere.py:Net", "there is no such file"),
        ("models:Missing", "models has no class of modules, and no function that returns one, 'Missing'"),
        ("pathlib:Path", "pathlib has no class of modules, and no function that returns one, 'Path'"),
        ("sys:path", "sys has no class of modules, and no function that returns one, 'path'"),
        ("models:data", "`--model`: data must return a module, got a DataLoader"),
    ],
)
def test_a_model_that_is_not_there_is_named(model, why):
    assert why in refused("plan", "--model", model)


MADE = """
import functools
from models import SmallNet

built = SmallNet()

def small(momentum, **options):
    return SmallNet(momentum=momentum, **options)

sgd = functools.partial(small, momentum=0.5)

def nothing():
    small(0.9)
"""


@pytest.fixture
def made(tmp_path):
    (tmp_path / "made.py").write_text(MADE)
    yield tmp_path / "made.py"
    sys.modules.pop("made", None)


def test_a_function_that_returns_the_model_does_as_well_as_its_class(made, folder, capsys, tmp_path):
    arguments = ["--model", f"{made}:small", "--arguments", '{"momentum": 0.9}']
    plans = [run(capsys, "plan", *model) for model in (MODEL, arguments, ["--model", f"{made}:sgd"])]
    assert plans[0] == plans[1] == plans[2]
    out = tmp_path / "out.safetensors"
    run(capsys, "convert", folder / "end.ckpt", *arguments, "--to", "factored", "--out", out)
    assert low_rank_pairs(load_low_rank(SmallNet(), out))


def test_a_function_gets_the_hyperparameters_that_it_names(made, folder, tmp_path):
    checkpoint = torch.load(folder / "end.ckpt", weights_only=True)
    torch.save(checkpoint | {"hyper_parameters": {"momentum": 0.25, "of_the_module_around": 3}}, tmp_path / "a.ckpt")
    assert load(model_maker(f"{made}:small"), tmp_path / "a.ckpt", {}).options["momentum"] == 0.25


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nothing", "`--model`: nothing must return a module, got a NoneType"),
        ("built", "is a model already: name its class, or a function that returns it"),
        ("small", "`--arguments`: small cannot be built with {}: small() missing 1 required positional argument"),
    ],
)
def test_a_function_that_returns_no_model_is_named(made, name, why):
    assert why in refused("plan", "--model", f"{made}:{name}")


def test_arguments_that_a_class_does_not_take_are_refused():
    assert "`--arguments`: Linear cannot be built" in refused("plan", "--model", "torch.nn:Linear", "--arguments", "{}")


CODE = """
from torch import nn

class Picky(nn.Linear):
    def __init__(self, size=8):
        if size > 8:
            raise RuntimeError("no more than 8")
        super().__init__(size, size)
"""


@pytest.mark.parametrize(
    ("code", "options", "why"),
    [
        ("x = (", [], "`--model`: cannot import FILE: SyntaxError: '(' was never closed"),
        ("{}['home']", [], "`--model`: cannot import FILE: KeyError: 'home'"),
        ("import sys; sys.exit(2)", [], "`--model`: cannot import FILE: SystemExit: 2"),
        (CODE, ["--arguments", '{"size": 9}'], "`--model`: building Picky with {'size': 9} fails: RuntimeError: no"),
        (CODE, ["--example-input", "2,3"], "`--example-input`: calling the model with 2,3 fails: RuntimeError: mat1"),
    ],
    ids=["syntax", "import", "exit", "constructor", "input"],
)
def test_what_the_users_code_raises_is_said_in_a_line_with_the_option(code, options, why, tmp_path):
    path = tmp_path / "picky.py"
    path.write_text(code)
    command = ["profile", "--out", tmp_path / "out.json", "--example-input", "2,8", "--model", f"{path}:Picky"]
    message = refused(*command, *options)
    sys.modules.pop("picky", None)
    assert why.replace("FILE", str(path)) in message and "\n" not in message


# ------------------------------------------------------------------------------------------------------------- inspect


@pytest.mark.parametrize("file", ["epoch=2.ckpt", "end.ckpt", "dense.safetensors"])
def test_a_file_with_dense_weights_is_read_without_its_class(file, folder, capsys):
    table = run(capsys, "inspect", folder / file, "--target-params", "0.5")
    assert "features.2" in table and "24 x 108" in table and "budget" in table
    rows = {row["name"]: row for row in json.loads(run(capsys, "inspect", folder / file, "--json"))}
    hidden = rows["hidden"]
    assert hidden["matrix_shape"] == [40, 96] and len(hidden["spectrum"]) == 40
    assert hidden["spectrum"] == sorted(hidden["spectrum"], reverse=True)
    assert 1 <= hidden["stable_rank"] <= hidden["effective_rank"] <= 40 and hidden["budget_rank"] is None
    low_rank = any(row["rank"] < min(row["matrix_shape"]) for row in rows.values())
    assert low_rank == (file != "dense.safetensors")


@pytest.mark.parametrize("file", ["epoch=2.ckpt", "end.ckpt", "low-rank.safetensors"])
def test_with_the_class_the_ranks_and_macs_are_those_of_the_fit(file, folder, capsys, tmp_path):
    page = tmp_path / "page.html"
    printed = run(capsys, "inspect", folder / file, *MODEL, *SHAPE, "--html", page)
    assert "of the MACs" in printed and "hidden" in page.read_text()
    report = json.loads(run(capsys, "inspect", folder / file, *MODEL, *SHAPE, "--json"))
    assert 0.35 < report["macs_ratio"] <= 0.4 or file == "epoch=2.ckpt"


@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
def test_ranks_are_those_of_the_mode_that_the_layer_was_trained_in(conv_mode):
    model, svd = SmallNet(), SVDTrainingCallback(target_macs=0.4, conv_mode=conv_mode)
    quiet_trainer(callbacks=[svd]).fit(model, data())
    rows = {row.name: row for row in svd.report.layers}
    for row in inspect_model(model, torch.zeros(1, 1, 8, 8)).layers:
        if rows[row.name].form == "factored":
            seen, trained = (
                (each.conv_mode, each.matrix_shape, each.rank, each.macs) for each in (row, rows[row.name])
            )
            assert seen == trained
    assert "factored" in {row.form for row in rows.values()}


def test_a_budget_says_what_it_would_keep(folder, capsys):
    common = ("inspect", folder / "dense.safetensors", *MODEL, *SHAPE, "--json")
    by_macs = json.loads(run(capsys, *common, "--target-macs", 0.3))
    by_params = json.loads(run(capsys, *common, "--target-params", 0.3))
    assert 0.25 < by_macs["macs_ratio"] <= 0.3 and 0.25 < by_params["params_ratio"] <= 0.3
    assert json.loads(run(capsys, *common))["macs_ratio"] == 1.0


# ------------------------------------------------------------------------------------------------------------- convert


@pytest.mark.parametrize("file", ["epoch=2.ckpt", "end.ckpt", "low-rank.safetensors"])
def test_a_low_rank_file_becomes_dense_or_factored(file, folder, capsys, tmp_path):
    for form in ("dense", "factored"):
        out = tmp_path / f"{form}.safetensors"
        options = ("--to", form, "--out", out, *SHAPE, "--json")
        result = json.loads(run(capsys, "convert", folder / file, *MODEL, *options))
        assert result["largest difference"] < 1e-5 and result["bytes"] == out.stat().st_size
    dense = SmallNet()
    dense.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    low_rank, x = load_low_rank(SmallNet(), tmp_path / "factored.safetensors"), torch.randn(3, 1, 8, 8)
    assert torch.allclose(dense(x), low_rank(x), atol=1e-5)
    assert low_rank_pairs(low_rank) and type(dense.features[2]) is torch.nn.Conv2d


class Sized(SmallNet):
    """Takes two of what its checkpoint holds."""

    def __init__(self, optimizer="SGD", momentum=0.0):
        super().__init__(optimizer, momentum=momentum)


def test_only_hyperparameters_that_the_class_takes_are_passed_on(folder, capsys, tmp_path):
    checkpoint = torch.load(folder / "end.ckpt", weights_only=True)
    saved = {"optimizer": "Adam", "momentum": 0.5, "_instantiator": "cli", "of_an_old_version": 3}
    torch.save(checkpoint | {"hyper_parameters": saved}, tmp_path / "a.ckpt")
    model = load(Sized, tmp_path / "a.ckpt", {"momentum": 0.7})
    assert (model.optimizer, model.options["momentum"]) == ("Adam", 0.7)
    assert low_rank_pairs(model)


def test_a_file_that_cannot_be_written_is_named(folder, tmp_path):
    out = tmp_path / "nowhere" / "x.safetensors"
    message = refused("convert", folder / "end.ckpt", *MODEL, "--to", "dense", "--out", out)
    assert f"{out} cannot be written" in message and "\n" not in message


@pytest.mark.parametrize("file", ["end.ckpt", "low-rank.safetensors", "dense.safetensors"])
def test_onnx_computes_the_same_for_any_batch(file, folder, capsys, tmp_path):
    out = tmp_path / "model.onnx"
    options = ("--to", "onnx", "--out", out, *SHAPE, "--batch-size", 4, "--json")
    result = json.loads(run(capsys, "convert", folder / file, *MODEL, *options))
    assert result["largest difference"] <= TOLERANCE
    assert ("time / dense, batch 4" in result) == (file != "dense.safetensors")
    model = SmallNet()
    if file == "dense.safetensors":
        model.load_state_dict(load_file(folder / file))
    else:
        load_low_rank(model, folder / file)
    x = torch.randn(7, 1, 8, 8)
    (actual,) = onnx_session(out)([x])
    expected = model(x).detach()
    assert (torch.from_numpy(actual) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["inspect", "missing.ckpt"], "missing.ckpt"),
        (["inspect", "{}/text.txt"], "is neither a checkpoint nor safetensors"),
        (["inspect", "{}/other.pt"], "must hold one state dict"),
        (["inspect", "{}/low-rank.safetensors"], "holds a low-rank model: give its class"),
        (["inspect", "{}/dense.safetensors", "--html", "page.html"], "`--html` needs the model"),
        (["inspect", "{}/dense.safetensors", "--example-input", "2,1,8,8"], "`--example-input` needs the model"),
        (["inspect", "{}/dense.safetensors", "--target-params", "0.001"], "the budget must be at least"),
        (["inspect", "{}/end.ckpt", "--model", "lightning_svd.demo:DigitsResNet"], "does not fit the model"),
        (["inspect", "{}/dense.safetensors", *MODEL, "--target-macs", "0.5"], "`--example-input 1,3,32,32`"),
        (["convert", "{}/dense.safetensors", *MODEL, "--to", "factored", "--out", "x"], "has no low-rank layer"),
        (["convert", "{}/end.ckpt", *MODEL, "--to", "onnx", "--out", "x"], "onnx needs an input"),
        (
            ["convert", "{}/end.ckpt", *MODEL, "--to", "dense", "--out", "x", "--fold"],
            "`--fold` is for `--to onnx`, got",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments, why, folder):
    message = refused(*(argument.replace("{}", str(folder)) for argument in arguments))
    assert why in message and message.startswith(f"lightning-svd {arguments[0]}: ") and "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["convert", "--batch-size", "0"], "argument --batch-size: must be an integer >= 1, got '0'"),
        (["convert", "--example-input", "2,x"], "argument --example-input: must be integers with commas"),
        (["convert", "--example-input", "0,64"], "argument --example-input: must be integers >= 1, got '0,64'"),
        (["plan", "--arguments", '{"a"'], "argument --arguments: is no JSON (Expecting ':'"),
        (["plan", "--arguments", "[1]"], "argument --arguments: must be a JSON object, such as '{\"width\": 64}', got"),
        (["inspect", "--target-params", "2"], "argument --target-params: must be in (0, 1], got '2'"),
        (["compress", "--target-latency", "half"], "argument --target-latency: must be in (0, 1], got 'half'"),
        (["compress", "--inputs", "0"], "argument --inputs: must be an integer >= 1, got '0'"),
        (["demo", "--epochs", "-1"], "argument --epochs: must be an integer >= 1, got '-1'"),
        (["demo", "--target-macs", "7"], "argument --target-macs: must be in (0, 1], got '7'"),
    ],
)
def test_an_option_out_of_range_is_named_before_anything_is_done(arguments, why, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(arguments)
    assert refusal.value.code == 2 and why in capsys.readouterr().err


def test_a_place_where_no_file_can_be_is_refused_before_the_work(tmp_path, monkeypatch):
    command = ["profile", *MODEL, *SHAPE, "--out"]
    assert f"`--out`: {tmp_path} is a folder" in refused(*command, tmp_path)
    assert f"`--out`: there is no folder {tmp_path}/no" in refused(*command, tmp_path / "no" / "table.json")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert f"`--out`: the folder {tmp_path} cannot be written to" in refused(*command, tmp_path / "table.json")


def test_a_console_without_the_signs_of_a_table_gets_others(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", console)
    assert main(["plan", *MODEL]) == 0
    console.flush()
    assert b"4 of 4 layers" in console.buffer.getvalue()


def test_an_interruption_is_said_in_a_line_and_leaves_the_file_that_was_there(folder, capsys, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out.safetensors"
    out.write_text("before")
    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    assert main(["convert", str(folder / "end.ckpt"), *MODEL, "--to", "dense", "--out", str(out)]) == 130
    assert capsys.readouterr().err.endswith("lightning-svd convert: interrupted\n")
    assert out.read_text() == "before" and [*tmp_path.iterdir()] == [out]


def test_a_missing_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused("convert", folder / "end.ckpt", *MODEL, "--to", "onnx", "--out", tmp_path / "x", *SHAPE)
    assert message == "convert needs onnxruntime: pip install 'lightning-svd[export]'"
