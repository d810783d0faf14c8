"""Small LightningModules, data and Trainers for tests of the callback."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, callbacks
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_svd.model.surgery import showing_factors


def EMAWeightAveraging(**arguments: Any) -> callbacks.Callback:
    """Lightning's own; a test that makes one is skipped where Lightning has none."""
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("Lightning has EMAWeightAveraging from 2.6 on")
    return callbacks.EMAWeightAveraging(**arguments)


class SmallNet(LightningModule):
    """Two convolutions and two linear layers on 8x8 images, 4 classes."""

    def __init__(self, optimizer: str = "SGD", **options: Any) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.options = {"lr": 0.05} | options
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU()
        )
        self.hidden = nn.Linear(24 * 4, 40)
        self.head = nn.Linear(40, 4)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        maps = F.avg_pool2d(self.features(x), 2)
        return self.head(F.relu(self.hidden(maps.flatten(1))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer)(self.parameters(), **self.options)


class ValidatedNet(SmallNet):
    """The same with validation and test."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), batch_size=len(x))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y), batch_size=len(x))


class SmallMLP(SmallNet):
    """The same task without a convolution."""

    def __init__(self, optimizer: str = "SGD", **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU())
        self.hidden = nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.features(x))))


def data(count: int = 64, batch_size: int = 8, dtype: torch.dtype = torch.float32) -> DataLoader:
    """Four blurry classes, always the same, in a fixed order."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 4
    centers = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    images = centers[labels] + 0.5 * torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(images.to(dtype), labels), batch_size)


def dealt(module: LightningModule) -> DataLoader:
    """Batches of 16 in a row, dealt out to the processes in turn; Lightning's own sampler would shuffle them."""
    world = module.trainer.world_size
    dataset = data(dtype=torch.float64).dataset
    sampler = DistributedSampler(dataset, world, module.global_rank, shuffle=False)
    return DataLoader(dataset, 16 // world, sampler=sampler)


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer on the CPU that writes nothing unless it is told to."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**(defaults | options))


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained by name, factors in the place of the weights that ``named_parameters()`` shows."""
    with showing_factors(module):
        return dict(module.named_parameters())


def same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class ComputedAgain(torch.autograd.Function):
    """Calls a backward pass in its own, as reversible blocks and checkpoints written by hand do."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return x.grad, None


class EqualRate:
    """Scales a weight in each call by how many inputs it has, as StyleGAN does: before the first there is none."""

    def __init__(self, layer):
        layer.weight_orig = nn.Parameter(layer._parameters.pop("weight").data)
        layer.register_forward_pre_hook(self)

    def __call__(self, layer, inputs):
        layer.weight = layer.weight_orig * (2 / layer.in_features) ** 0.5
