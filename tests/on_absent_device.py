"""A step on an accelerator that is not there: no fault, and nothing that waits for it, outside cuts.

``FakeTensorMode`` runs every operator on shapes, dtypes and devices alone. An operator on two devices fails, and so
does whatever asks for a value: ``.item()``, ``bool()``, indices of a mask. On CUDA each of these would wait for the
device. The device is one of torch's for backends written in Python, since autograd asks for CUDA's library at once. It
changes the process that it is registered in: ``test_devices.py`` runs this module in one of its own.
"""

import os

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from lightning_svd import add_gradients
from lightning_svd.layers.layer import factorize, plain_pair
from lightning_svd.layers.matrices import Factors
from lightning_svd.layers.views import View
from lightning_svd.training.observation import Listener
from lightning_svd.training.optimizers import OptimizerOfFactors

DEVICE = "absent"


class Backend(_DummyBackendModule):
    """What turns autocast off asks for more than torch's own."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


if os.environ.get("DEVICE") == DEVICE:  # not where doctests are looked for
    _setup_privateuseone_for_python_backend(DEVICE, backend_module=Backend())

LAYERS = {
    "linear": (lambda: nn.Linear(32, 48, device="meta"), (16, 32)),
    "conv, channel": (lambda: nn.Conv2d(8, 16, 3, padding=1, device="meta"), (2, 8, 9, 9)),
    "conv, spatial": (lambda: nn.Conv2d(8, 16, 3, padding=1, device="meta"), (2, 8, 9, 9)),
    "conv, transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, stride=2, device="meta"), (2, 8, 9, 9)),
    "conv, groups": (lambda: nn.Conv2d(8, 16, 3, groups=2, device="meta"), (2, 8, 9, 9)),
    "embedding": (lambda: nn.Embedding(40, 16, device="meta"), (3, 5)),
}


def fake_layer(kind, form, rank):
    make, shape = LAYERS[kind]
    layer = make()
    for name, parameter in [*layer.named_parameters()]:
        setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device=DEVICE)))
    view = View.of(layer, "spatial" if kind.endswith("spatial") else "channel")
    m, n = view.matrix_shape
    groups = (view.groups,) if view.groups > 1 else ()
    room = min(m, n)
    factors = Factors(*(torch.empty(*groups, *size, device=DEVICE) for size in ((m, room), (room,), (n, room))))
    layer = factorize(layer, view, kind, form="dense" if form == "dense" else "svd", factors=factors)
    if form != "dense":
        layer.form.rank = rank
    if form == "pair":
        layer.to_pair()
    x = torch.empty(shape, device=DEVICE, dtype=torch.int64 if kind == "embedding" else torch.float32)
    return layer, x


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("form", ["dense", "svd", "svd, cut", "pair"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_step_neither_mixes_devices_nor_waits_for_one(kind, form, optimizer):
    with FakeTensorMode(allow_non_fake_inputs=True):
        rank = 3 if form in ("svd, cut", "pair") else min(fake_layer(kind, "dense", 0)[0].matrix_shape)
        layer, x = fake_layer(kind, form.partition(",")[0], rank)
        trained = [*layer.form.trained, *([layer.bias] if getattr(layer, "bias", None) is not None else [])]
        steps = optimizer(trained, lr=0.1, weight_decay=0.1)
        of_factors = OptimizerOfFactors(steps, [layer])
        loss = layer(x).square().mean()
        loss.backward()
        assert all(p.grad.device.type == DEVICE for p in trained)
        penalties = add_gradients([layer], 1.0, "hoyer", 0.1, 1.0, of_factors.held(), step=7)
        steps.step()
        assert all(p.device.type == DEVICE for p in layer.form.trained)
        assert penalties.orthogonality.device.type == DEVICE or form in ("dense", "pair")
        assert layer.rebuilt().device.type == DEVICE and layer.rebuilt().shape == layer.view.weight_shape


@pytest.mark.parametrize("form", ["dense", "svd, cut"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_is_observed_without_waiting(kind, form):
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = fake_layer(kind, form.partition(",")[0], 3 if form == "svd, cut" else None)
        observer = Listener(layer, {kind: layer})
        observer.begin_batch()
        layer(x).square().mean().backward()
        observer.end_batch()
        assert observer.seen[kind].positions > 0
        assert {sums.device.type for sums in observer.seen[kind].sums().values()} == {DEVICE}


@pytest.mark.parametrize("kind", LAYERS)
def test_forms_are_made_of_another_on_the_device(kind):
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer, x = fake_layer(kind, "svd", 3)
        for replaced in (layer.shrink(), layer.to_pair()):
            assert all(p.device.type == DEVICE for p in replaced[1])
        assert plain_pair(layer)(x).shape == layer(x).shape


def test_what_waits_for_the_device_is_seen_by_these_tests():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        bool(torch.ones(3, device=DEVICE).all())
