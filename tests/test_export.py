"""ONNX: a file is right for any batch, or its writer says for which."""

import warnings

import pytest
import torch
from torch import nn

from lightning_svd import decompose, to_onnx
from lightning_svd.model.export import onnx_session

pytest.importorskip("onnxruntime")


class WithAToken(nn.Module):
    """Puts a token of its own before what came in, for each input of the batch."""

    def __init__(self, size):
        super().__init__()
        self.body, self.token, self.size = nn.Linear(16, 16), nn.Parameter(torch.randn(1, 1, 16)), size

    def forward(self, x):
        return torch.cat([self.token.expand(self.size(x), -1, -1), self.body(x).unsqueeze(1)], 1)


def test_a_file_that_is_right_for_one_size_of_batch_only_is_warned_of(tmp_path):
    torch.manual_seed(0)
    model = WithAToken(len).eval()
    with pytest.warns(UserWarning, match=r"right for batches of 3 only: WithAToken takes the size .* `len\(x\)`"):
        to_onnx(model, tmp_path / "net.onnx", torch.randn(3, 16))


@pytest.mark.parametrize("examples", [1, 3])
def test_a_file_is_right_for_any_batch(examples, tmp_path):
    torch.manual_seed(0)
    model = WithAToken(lambda x: x.shape[0]).eval()
    decompose(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_onnx(model, tmp_path / "net.onnx", torch.randn(examples, 16)) < 1e-5
    x = torch.randn(7, 16)
    (actual,) = onnx_session(tmp_path / "net.onnx")([x])
    torch.testing.assert_close(torch.from_numpy(actual), model(x), rtol=1e-4, atol=1e-5)


def test_what_takes_one_size_of_batch_itself_is_not_warned_of(tmp_path):
    class Three(nn.Module):
        def forward(self, x):
            return x.reshape(3, 16) * 2.0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_onnx(Three().eval(), tmp_path / "net.onnx", torch.randn(3, 16))


def test_a_wrong_input_is_refused_by_the_model(tmp_path):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        to_onnx(nn.Linear(4, 4), tmp_path / "net.onnx", torch.randn(2, 5))


class Several(nn.Module):
    """Puts out what is given to a function, and what the function makes of it."""

    def __init__(self, outputs):
        super().__init__()
        self.body, self.outputs = nn.Linear(16, 16), outputs

    def forward(self, x, other=None):
        return self.outputs(self.body(x if other is None else x + other))


@pytest.mark.parametrize(
    "outputs",
    [
        lambda y: {"y": y, "rest": (y.relu(), [y + 1])},
        lambda y: (y, y.argmax(1)),
        lambda y: (y > 0, y),
        lambda y: (y, None),
        lambda y: (y, y[:, :0]),
    ],
    ids=["nested", "indices", "a mask", "None", "nothing"],
)
def test_outputs_of_any_kind_are_compared(outputs, tmp_path):
    torch.manual_seed(0)
    assert to_onnx(Several(outputs).eval(), tmp_path / "net.onnx", torch.randn(3, 16)) < 1e-5


@pytest.mark.parametrize("example", [None, {"x": torch.ones(3, 16)}, (torch.ones(3, 16), 2), ([torch.ones(3, 16)],)])
def test_an_example_that_is_no_tensors_by_position_is_refused(example, tmp_path):
    with pytest.raises(ValueError, match=r"^`example_input` must be a tensor, or a tuple of tensors by position, got "):
        to_onnx(Several(torch.relu), tmp_path / "net.onnx", example)


def test_half_precision_may_differ_by_its_rounding(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).half()
    assert to_onnx(model, tmp_path / "net.onnx", torch.randn(32, 64).half()) <= 4 * torch.finfo(torch.half).eps


def test_what_onnxruntime_cannot_run_is_said_in_a_line(tmp_path):
    with pytest.raises(RuntimeError, match=r"net.onnx does not run in onnxruntime: \S[^\n]*$"):
        to_onnx(nn.Linear(8, 8).bfloat16(), tmp_path / "net.onnx", torch.randn(2, 8).bfloat16())
