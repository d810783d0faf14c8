"""Batch normalization folded into the layer before it: what may be, what may not and why, and that outputs stay."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_svd import decompose, fold_norms, svd_layers, to_dense, to_factored, to_onnx
from lightning_svd.layers.matrices import roundoff
from lightning_svd.layers.pairs import low_rank_pairs


def seen(model):
    """The model in evaluation, with statistics and scales as training leaves them, nothing near 0 and 1."""
    torch.manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 3.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2.0)
                nn.init.normal_(norm.bias)
    return model.eval()


def convolutions(**options):
    torch.manual_seed(0)
    first = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8, **options), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))


def check(model, x, folded, **left):
    """The model folded: these and no others, with why the others are left alone."""
    before, expected = copy.deepcopy(model.state_dict()), model(x).detach()
    small, report = fold_norms(model, x)
    assert dict(report.folded) == folded
    assert report.left.keys() == left.keys() and all(left[name] in why for name, why in report.left.items())
    assert_same(small(x), expected, (64, 64))
    assert report.difference < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(type(small.get_submodule(name)) is nn.Identity for name in folded)
    return small


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
def test_norms_after_convolutions_are_folded(options):
    small = check(seen(convolutions(**options)), torch.randn(3, 4, 5, 5), {"1": "0", "4": "3"})
    assert small[0].bias is not None
    assert sum(p.numel() for p in small.parameters()) == 4 * 8 * 9 + 8 + 8 * 6 + 6


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Linear(5, 7), nn.BatchNorm1d(7), (3, 5)),
        (nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7, affine=False), (3, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (3, 4, 9)),
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, padding_mode="reflect", groups=4), nn.BatchNorm2d(8), (3, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, padding="same"), nn.SyncBatchNorm(8), (3, 4, 9, 9)),
        (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (3, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (3, 4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), (3, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), nn.BatchNorm3d(3), (3, 2, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_type_of_layer(layer, norm, shape, dtype):
    model = seen(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))).to(dtype)
    check(model, torch.randn(shape, dtype=dtype), {"1": "0"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_outputs_move_by_its_rounding(dtype):
    model, x = seen(convolutions()).to(dtype), torch.randn(3, 4, 5, 5, dtype=dtype)
    small, report = fold_norms(model, x)
    assert len(report.folded) == 2 and report.difference < 8 * torch.finfo(dtype).eps
    assert {p.dtype for p in small.parameters()} == {dtype}


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_outputs_stay_whatever_the_statistics_are(seed, inputs, outputs, bias):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(inputs, outputs, 2, bias=bias), nn.BatchNorm2d(outputs)).double().eval()
    model[1].running_var.copy_(torch.rand(outputs).double() * 10.0 ** torch.randint(-6, 6, (outputs,)))
    model[1].running_mean.normal_()
    x = torch.randn(2, inputs, 3, 3, dtype=torch.float64)
    small, report = fold_norms(model, x)
    assert report.folded == {"1": "0"}
    with torch.no_grad():
        expected, scale = model(x), model[1].running_var.rsqrt()
        sizes = expected.abs().max() + (model[1].running_mean * scale).abs().max() + (model[0](x).amax() * scale).max()
        assert float((small(x) - expected).abs().max()) <= roundoff((64, 64), torch.float64, 32) * float(sizes)


def test_low_rank_layers_take_a_norm_into_their_second_half():
    model = seen(convolutions())
    decompose(model, ["0"])
    svd_layers(model)["0"].keep(2)
    x = torch.randn(3, 4, 5, 5)
    small = check(to_factored(model), x, {"1": "0.1", "4": "3"})
    assert low_rank_pairs(small).keys() == {"0"} and small[0][0].bias is None and small[0][1].bias is not None
    assert_same(to_dense(small)(x), to_factored(model)(x), (64, 64))


def test_factorized_layers_are_made_plain_on_the_way():
    model = seen(convolutions())
    decompose(model, ["0"])
    svd_layers(model)["0"].keep(2)
    small, report = fold_norms(model, torch.randn(3, 4, 5, 5))
    assert report.folded == {"1": "0.1", "4": "3"} and svd_layers(model) and not svd_layers(small)


def test_layouts_and_what_is_trained_stay():
    model = seen(convolutions()).to(memory_format=torch.channels_last)
    model[3].weight.requires_grad_(False)
    small, _ = fold_norms(model, torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last))
    assert small[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert small[0].weight.requires_grad and not small[3].weight.requires_grad


class Net(nn.Module):
    """A convolution and a norm, with another use of what is between."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between

    def forward(self, x):
        return self.between(self, self.conv(x))


USED = {
    "a shortcut": (lambda net, x: net.norm(x) + x, "also used by the operation aten.add"),
    "a view of it": (lambda net, x: net.norm(x) * x[:, :1], "also used by the operation aten."),
    "before": (lambda net, x: net.norm(x.relu_()), "also used by the operation aten.relu_"),
    "detached": (lambda net, x: net.norm(x) + x.detach().mean(), "also used by the operation aten.detach"),
    "changed": (lambda net, x: net.norm(2 * x), "is not what one convolution or linear layer puts out"),
    "flattened": (lambda net, x: net.norm(x.view(len(x), 4, -1, 1)), "is not what one convolution"),
    "not called": (lambda net, x: F.batch_norm(x, net.norm.running_mean, net.norm.running_var), "it was not called"),
    "twice": (lambda net, x: net.norm(net.norm(x)), "is not what one convolution"),
    "its weight": (lambda net, x: net.norm(x) * net.norm.weight.sum(), "needs what only the dense layer has"),
    "returned": (lambda net, x: torch.cat([net.norm(x), net.kept])[: len(x)], ""),
}


@pytest.mark.parametrize("use", [use for use in USED if use != "returned"])
def test_what_something_else_sees_stays(use):
    between, why = USED[use]
    check(seen(Net(between)), torch.randn(2, 3, 6, 6), {}, norm=why)


def test_what_the_model_returns_stays():
    model, x = seen(Net(lambda net, x: (net.norm(x), x))), torch.randn(2, 3, 6, 6)
    small, report = fold_norms(model, x)
    assert "computes something else" in report.left["norm"] and torch.equal(small(x)[1], model(x)[1])


def test_shape_may_be_asked_for():
    check(seen(Net(lambda net, x: net.norm(x) / x.shape[1])), torch.randn(2, 3, 6, 6), {"norm": "conv"})


def test_the_innocent_are_folded_beside_what_is_left():
    model = nn.Sequential(*convolutions()[:3], Net(lambda net, x: net.norm(x) * net.norm.weight.sum()))
    model[3].conv = nn.Conv2d(8, 4, 1)
    small = check(seen(model), torch.randn(3, 4, 5, 5), {"1": "0"}, **{"3.norm": "only the dense layer has"})
    assert type(small[3].norm) is nn.BatchNorm2d and small[3].conv.bias is not None


@pytest.mark.parametrize("where", ["norm", "conv"])
def test_hooks_are_left_alone(where):
    model = seen(Net(lambda net, x: net.norm(x)))
    model.get_submodule(where).register_forward_hook(lambda module, args, output: None)
    check(model, torch.randn(2, 3, 6, 6), {}, norm="has hooks")


def test_a_norm_in_training_or_without_statistics_stays():
    model = seen(nn.Sequential(*convolutions(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6, track_running_stats=False)))
    model[1].train()
    small, report = fold_norms(model, torch.randn(3, 4, 5, 5))
    assert report.left == {"1": "it is in training", "6": "it has no running statistics"} and small[1].training
    assert "left: 1: it is in training" in str(report) and str(report).startswith("1 of 3 normalizations folded")


def test_a_layer_with_two_norms_and_a_norm_after_two_layers_stay():
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 1)
    two_norms = seen(nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.BatchNorm2d(4)))
    check(two_norms, torch.randn(2, 4, 3, 3), {}, **{"1": "also used by 3", "3": "also used by 1"})
    norm = nn.BatchNorm2d(4)
    two_layers = seen(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm))
    check(two_layers, torch.randn(2, 4, 3, 3), {}, **{"1": "is not what one convolution or linear layer puts out"})


def test_a_block_called_twice_is_folded_once():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    small = check(seen(nn.Sequential(block, nn.ReLU(), block)), torch.randn(2, 4, 3, 3), {"0.1": "0.0"})
    assert small[0] is small[2] and type(small[2][1]) is nn.Identity


def test_a_tied_weight_stays():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight = model[0].weight
    check(seen(model), torch.randn(2, 4, 3, 3), {}, **{"1": "shares its weight or bias with another module"})


def test_axes_that_are_not_the_same_stay():
    model = seen(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)))
    check(model, torch.randn(2, 6, 5), {}, **{"1": "along the last axis"})
    grouped = seen(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4)))
    check(grouped, torch.randn(2, 4, 3, 3), {}, **{"1": "transposed convolution with groups"})


def test_several_inputs_and_inputs_by_keyword():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x, scale):
            return self.norm(self.conv(x)) * scale

    model, x, scale = seen(Two()), torch.randn(2, 3, 6, 6), torch.tensor(2.0)
    for example in ((x, scale), {"x": x, "scale": scale}):
        assert fold_norms(model, example)[1].folded == {"norm": "conv"}


def test_what_cannot_be_folded_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`fold_norms`: Sequential is in training.*call `model.eval\(\)` first"):
        fold_norms(convolutions(), torch.randn(3, 4, 5, 5))
    with pytest.raises(ValueError, match="`example_input`: Sequential fails on it: RuntimeError"):
        fold_norms(seen(convolutions()), torch.randn(3, 3, 5, 5))


def test_a_model_without_norms_is_copied():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    small, report = fold_norms(model, torch.randn(2, 4))
    assert not report.folded and not report.left and small is not model


def test_a_folded_model_goes_anywhere(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnx

    model, x = seen(convolutions()), torch.randn(3, 4, 5, 5)
    small, _ = fold_norms(model, x)
    assert_same(torch.export.export(small, (x,)).module()(x), small(x), (64, 64))
    assert to_onnx(model, tmp_path / "net.onnx", x, fold=True) < 1e-5
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node}
    assert type(model[1]) is nn.BatchNorm2d
