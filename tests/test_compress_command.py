"""`lightning-svd compress`: a file of a trained model in, a small file that computes nearly the same out."""

import json
import sys

import pytest
import torch
from test_cli import refused, run
from torch import nn

from lightning_svd import load_low_rank
from lightning_svd.layers.pairs import low_rank_pairs
from lightning_svd.model.export import onnx_session

SOURCE = """
import torch
from torch import nn


class Mine(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 4)

    def forward(self, x, scale=None):
        out = self.head(self.layers(x))
        return out if scale is None else out * scale


def batches():
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(3, 16, generator=generator)
    for _ in range(4):
        yield torch.randn(32, 3, generator=generator) @ mixing


def of_the_model(model):
    return [torch.zeros(8, model.layers[0].in_features) + k for k in range(2)]


def by_keyword(count=2):
    return [{"scale": torch.ones(8, 1), "x": torch.randn(8, 16)} for _ in range(count)]


def only_labels():
    return [{"y": torch.zeros(8)}]


def a_tensor():
    return torch.zeros(8, 16)


def nothing():
    return []


def broken():
    return [1 / 0]


def broken_later():
    yield torch.zeros(8, 16)
    raise KeyError("images")


def pairs():
    return [(x, torch.zeros(32, dtype=torch.long), None) for x in batches()]


CONSTANT = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file of a class and functions, and one with its weights as somebody's training script leaves them."""
    (tmp_path / "mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    from mine import Mine

    torch.manual_seed(0)
    model = Mine().eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "net": state}, "trained.pth")
    yield model
    sys.modules.pop("mine", None)


COMMAND = ["compress", "trained.pth", "--model", "mine.py:Mine"]
DATA = ["--data", "mine.py:batches"]
FACTORED = ["--to", "factored", "--out", "small.safetensors"]


@pytest.mark.parametrize("data", ["mine.py:batches", "mine:batches"])
def test_a_small_file_that_computes_nearly_the_same(mine, data, capsys):
    printed = run(capsys, *COMMAND, "--data", data, *FACTORED, "--target-params", 0.5)
    assert "% of the parameters" in printed and "layers.2" in printed and "file: small.safetensors" in printed
    small = load_low_rank(type(mine)(), "small.safetensors").eval()
    assert low_rank_pairs(small) and sum(p.numel() for p in small.parameters()) <= 0.5 * sum(
        p.numel() for p in mine.parameters()
    )
    x = next(sys.modules["mine"].batches())
    assert (small(x) - mine(x)).square().sum() < 0.01 * mine(x).square().sum()


def test_what_it_says_as_json_and_as_files(mine, capsys):
    options = ("--curve", "--json", "--report", "report.json", "--html", "page.html", "--inputs", 64)
    printed = json.loads(run(capsys, *COMMAND, *DATA, *FACTORED, "--importance", "outputs", *options))
    written = printed.pop("written")
    assert written["file"] == "small.safetensors" and written["bytes"] > 0
    with open("report.json", encoding="utf-8") as file:  # noqa: PTH123
        assert json.load(file) == printed
    assert printed["target"] == "macs" and printed["share"] == 0.5 and printed["curve"]["0.8"] >= 0
    assert printed["inputs"] == 32  # the second of two batches is held out
    with open("page.html", encoding="utf-8") as file:  # noqa: PTH123
        assert "Quality against budget" in file.read()


def test_onnx_is_written_and_compared(mine, capsys):
    out = ["--to", "onnx", "--out", "small.onnx", "--json"]
    written = json.loads(run(capsys, *COMMAND, *DATA, *out))["written"]
    assert written["largest difference"] < 1e-4 and "time / dense, batch 32" in written
    x = next(sys.modules["mine"].batches())[:5]
    (output,) = onnx_session("small.onnx")([x])
    expected = mine(x).detach()
    assert (torch.from_numpy(output) - expected).square().sum() < 0.05 * expected.square().sum()


def test_onnx_of_inputs_by_keyword(mine, capsys):
    out = ["--to", "onnx", "--out", "small.onnx", "--json", "--importance", "spectrum"]
    written = json.loads(run(capsys, *COMMAND, "--data", "mine.py:by_keyword", *out))["written"]
    assert written["largest difference"] < 1e-4


def test_a_function_of_the_model_is_given_it(mine, capsys):
    printed = run(capsys, *COMMAND, "--data", "mine.py:of_the_model", *FACTORED, "--json")
    assert json.loads(printed)["inputs"] == 8


def test_a_low_rank_file_is_compressed_as_the_dense_model_that_it_stands_for(mine, capsys):
    run(capsys, *COMMAND, *DATA, *FACTORED, "--target-params", 0.6)
    again = ["compress", "small.safetensors", *COMMAND[2:], *DATA, "--to", "factored", "--out", "less.safetensors"]
    report = json.loads(run(capsys, *again, "--target-params", 0.4, "--json"))
    assert report["ranks"]["dense_params"] == sum(p.numel() for p in mine.parameters())
    assert report["ranks"]["params_ratio"] <= 0.4


def test_inspect_says_what_could_be_asked_for(mine, capsys):
    common = ("inspect", "trained.pth", *COMMAND[2:])
    table = run(capsys, *common, *DATA)
    assert "share of the MACs" in table and "50%" in table and "relative squared error of held-out outputs" in table
    found = json.loads(run(capsys, *common, *DATA, "--target-params", 0.5, "--json"))
    curve = {float(share): distance for share, distance in found["curve"].items()}
    assert curve[0.9] <= curve[0.3] and found["measure"] == "relative squared error"
    assert 0.45 < found["params_ratio"] <= 0.5
    assert "curve" not in json.loads(run(capsys, *common, "--json"))


def test_the_curve_of_a_model_that_can_fall_little(mine, capsys):
    arguments = ("--arguments", '{"width": 4}')
    torch.save(type(mine)(width=4).state_dict(), "narrow.pt")
    message = refused("compress", "narrow.pt", *COMMAND[2:], *arguments, *DATA, *FACTORED, "--target-params", 0.3)
    assert message.startswith("lightning-svd compress: ") and "at least" in message
    assert "90%" in run(capsys, "inspect", "narrow.pt", *COMMAND[2:], *arguments, *DATA)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--data", "mine"], "`--data` must be `package.module:function` or"),
        (["--data", "nowhere:batches"], "`--data`: cannot import nowhere"),
        (["--data", "mine.py:missing"], "`--data`: mine.py has no function 'missing'"),
        (["--data", "mine.py:CONSTANT"], "`--data`: mine.py has no function 'CONSTANT'"),
        (["--data", "mine.py:broken"], "`--data`: mine.py:broken fails: ZeroDivisionError"),
        (["--data", "mine.py:broken_later"], "`--data`: mine.py:broken_later fails: KeyError: 'images'"),
        (["--data", "mine.py:a_tensor"], "must return an iterable of inputs, such as a list of batches, got a Tensor"),
        (["--data", "mine.py:nothing"], "at least one batch"),
        (["--data", "mine.py:pairs"], "A batch is a tensor, a tuple of arguments"),
        (["--data", "mine.py:only_labels"], "the model fails for a batch"),
        ([*DATA, "--key", "ema"], "`--key`: trained.pth has no weights at 'ema', got `net` (6 tensors)"),
        ([*DATA, "--arguments", '{"width": 33}'], "trained.pth does not fit Mine at `net`"),
        ([*DATA, "--importance", "luck"], "`importance`"),
        ([*DATA, "--out", "nowhere/x.safetensors"], "`--out`: there is no folder nowhere"),
        ([*DATA, "--report", "nowhere/x.json"], "`--report`: there is no folder nowhere"),
        ([*DATA, "--out", "trained.pth"], "`--out` is the file of the trained weights"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(mine, options, why):
    message = refused(*COMMAND, *FACTORED, *options)
    assert why in message and message.startswith("lightning-svd compress: ") and "\n" not in message


def test_inputs_that_onnx_cannot_have_are_named(mine, monkeypatch):
    def forward(self, x, other=1, scale=None):
        return self.head(self.layers(x)) * scale

    monkeypatch.setattr(type(mine), "forward", forward)
    message = refused(*COMMAND, "--data", "mine.py:by_keyword", "--to", "onnx", "--out", "x.onnx")
    assert "onnx needs inputs by position" in message and "'scale'" in message and "'other'" in message


def test_data_needs_the_model(mine):
    assert "`--data` needs the model" in refused("inspect", "trained.pth", *DATA)


def test_a_missing_extra_is_named_before_the_work(mine, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = refused(*COMMAND, "--data", "mine.py:broken", "--to", "onnx", "--out", "x.onnx")
    assert message == "compress needs onnxruntime: pip install 'lightning-svd[export]'"


def test_the_command_compresses_a_model_of_transformers(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "words.py").write_text(
        "import torch\n\ndef batches(model):\n"
        "    return [{'input_ids': torch.arange(24).reshape(2, 12) % model.config.vocab_size}] * 2\n"
    )
    out = tmp_path / "small.safetensors"
    arguments = ("--model", "transformers:LlamaForCausalLM", "--data", f"{tmp_path}/words.py:batches")
    options = ("--to", "factored", "--out", out, "--target-params", 0.8, "--json")
    report = json.loads(run(capsys, "compress", tmp_path / "llama", *arguments, *options))
    assert report["measure"] == "Kullback-Leibler divergence" and report["ranks"]["params_ratio"] <= 0.8
    again = load_low_rank(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)), out)
    assert any(isinstance(pair, nn.Sequential) for pair in low_rank_pairs(again).values())
    del sys.modules["words"]
