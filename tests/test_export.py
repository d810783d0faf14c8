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
