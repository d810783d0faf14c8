"""Every type of layer goes the whole way: trained as factors, pruned, resumed, made plain, saved, loaded, exported."""

import copy

import pytest
import torch
from helpers import assert_same
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from models import quiet_trainer, same_state
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_svd import (
    FallToBudget,
    SVDTraining,
    SVDTrainingCallback,
    add_gradients,
    decompose,
    load_low_rank,
    save_low_rank,
    svd_layers,
    to_dense,
    to_factored,
)
from lightning_svd.model.counting import count_params

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def transformers_conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(10, 12)


LAYERS = {
    "Linear": (lambda: nn.Linear(12, 10), (12,)),
    "Conv1D of transformers": (transformers_conv1d, (12,)),
    "Conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2), (6, 9)),
    "Conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False), (6, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding="same"), (4, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(8, 6, 4, stride=2, padding=1), (8, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), (8, 4, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(6, 4, 2, stride=2), (6, 3, 3, 3)),
    "grouped Conv1d": (lambda: nn.Conv1d(12, 8, 5, groups=2), (12, 8)),
    "grouped Conv2d": (lambda: nn.Conv2d(12, 12, 3, groups=3), (12, 6, 6)),
    "grouped ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 8, 3, groups=2), (8, 4, 4)),
}
MODES = ["channel", "spatial"]
DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "bf16-true": torch.bfloat16}
BATCHES, EPOCHS = 2, 4


class Net(LightningModule):
    """The layer alone, to be like another one of its type."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        build, self.shape = LAYERS[kind]
        self.layer, self.wanted = build(), build().requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - self.wanted(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)


def inputs(net, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, *net.shape, generator=generator, dtype=torch.float64).to(dtype)


def fit(net, conv_mode, *callbacks, precision="32-true", final="factored", **options):
    svd = SVDTrainingCallback(
        energy_threshold=0.6,
        target_modules=["layer"],
        conv_mode=conv_mode,
        schedule=FallToBudget(cuts=2),
        final=final,
    )
    x = inputs(net, DTYPES[precision])
    loader = DataLoader(TensorDataset(x), len(x) // BATCHES)
    trainer = quiet_trainer(max_epochs=EPOCHS, callbacks=[svd, *callbacks], precision=precision, **options)
    return trainer, svd, loader


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_weight_lies_in_memory_as_a_dense_one_does(kind, conv_mode, last, tmp_path):
    """Who views it as another shape, or writes it as bytes, does what the dense weight lets them."""
    dense, net = Net(kind), Net(kind)
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d} if last else {}
    for model in (dense, net):
        model.to(memory_format=layouts.get(model.layer.weight.ndim, torch.preserve_format))
    optimizer = net.configure_optimizers()
    training = SVDTraining(net, optimizer, 10, target_params=0.9, conv_mode=conv_mode)
    assert training.layers["layer"].form.name == "svd"
    for weight in (net.state_dict()["layer.weight"], net.layer.weight.detach(), copy.deepcopy(net).layer.weight):
        assert weight.stride() == dense.layer.weight.stride()
    if not last:
        assert net.layer.weight.view(-1).shape == (dense.layer.weight.numel(),)
        save_file(net.state_dict(), tmp_path / "net.safetensors")
        torch.testing.assert_close(load_file(tmp_path / "net.safetensors")["layer.weight"], dense.layer.weight.detach())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_from_dense_to_a_file_and_back(kind, conv_mode, precision, tmp_path):
    net, dtype = Net(kind), DTYPES[precision]
    trainer, svd, loader = fit(net, conv_mode, precision=precision, final="decomposed")
    trainer.fit(net, loader)
    layer, (row,) = svd_layers(net)["layer"], svd.report.layers
    assert 0 < row.rank == layer.rank < row.full_rank == svd.plan[0].full_rank
    assert row.form == "factored" and {p.dtype for p in layer.parameters()} == {dtype}

    x = inputs(net, dtype)
    expected = layer(x)
    plain, dense = to_factored(net, count_params(net)), to_dense(net)
    assert type(dense.layer) is type(LAYERS[kind][0]()) and dense.layer.weight.shape == net.wanted.weight.shape
    for form in (plain, dense):
        # In half precision each of U, s, V, their product and the output is rounded once.
        assert_same(form.layer(x), expected, layer.matrix_shape, factor=4 if dtype == torch.bfloat16 else 32)

    path = save_low_rank(net, tmp_path / "model.safetensors")
    loaded = load_low_rank(Net(kind).to(dtype), path)
    assert same_state(loaded.state_dict(), plain.state_dict())
    assert torch.equal(loaded.layer(x), plain.layer(x))


@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(kind, conv_mode, tmp_path):
    whole, resumed = Net(kind), Net(kind)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer, _, loader = fit(whole, conv_mode, saving, enable_checkpointing=True)
    trainer.fit(whole, loader)
    file = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    assert file["state_dict"].keys() == Net(kind).state_dict().keys()
    Net(kind).load_state_dict(file["state_dict"])
    trainer, _, loader = fit(resumed, conv_mode)
    trainer.fit(resumed, loader, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert type(resumed.layer) is nn.Sequential and same_state(resumed.state_dict(), whole.state_dict())
    # A checkpoint of the finished model loads too, dense and with its pair.
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    dense = Net(kind)
    dense.load_state_dict(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"])
    x = inputs(dense)
    assert_same(dense.layer(x), resumed.layer(x), tuple(dense.layer.weight.shape))


@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_regularizers_act_on_the_kept_ranks_of_every_group_as_autograd_says(kind, conv_mode):
    net = Net(kind).double()
    decompose(net, ["layer"], conv_mode=conv_mode)
    layer = net.layer
    with torch.no_grad():
        for factor in (layer.U, layer.s, layer.V):
            factor += 0.1 * torch.randn_like(factor)
    layer.keep(layer.full_rank - 1)
    penalties = add_gradients([layer], 0.7, "hoyer", 0.3)

    U, s, V = layer.factors()
    defects = [factor.mT @ factor - torch.eye(layer.rank) for factor in (U, V)]
    orthogonality = sum(defect.square().sum() for defect in defects) / layer.rank**2
    hoyer = (s.abs().sum(-1) / s.norm(dim=-1)).sum()
    expected = torch.autograd.grad(0.7 * orthogonality + 0.3 * hoyer, (layer.U, layer.s, layer.V))
    for factor, gradient in zip((layer.U, layer.s, layer.V), expected, strict=True):
        assert_same(factor.grad, gradient, layer.matrix_shape)
        assert not factor.grad[..., -1].any()
    error = (orthogonality * layer.rank**2 / (2 * layer.rank * layer.view.groups)).sqrt()
    for actual, wanted in zip(
        (penalties.orthogonality, penalties.sparsity, penalties.orthogonality_error),
        (orthogonality, hoyer, error),
        strict=True,
    ):
        assert_same(actual, wanted, layer.matrix_shape)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("conv_mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_exported_and_compiled_forms_compute_the_same(kind, conv_mode):
    net = Net(kind)
    decompose(net, ["layer"], conv_mode=conv_mode)
    net.layer.keep(-(-net.layer.full_rank // 2))
    plain, x = to_factored(net, count_params(net)).layer.eval(), inputs(net)
    expected = plain(x)
    exported = torch.export.export(plain, (x,)).module()
    traced, scripted = torch.jit.trace(plain, x), torch.jit.script(plain)
    for form in (exported, traced, scripted):
        assert_same(form(x), expected, net.layer.matrix_shape)
    half = copy.deepcopy(plain).to(torch.bfloat16)
    assert_same(half(x.to(torch.bfloat16)), expected.to(torch.bfloat16), net.layer.matrix_shape, factor=2)
