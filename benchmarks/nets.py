"""The networks of the benchmarks, for images (channels, size, size)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes (He et al. 2016)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            conv = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(channels: int, classes: int, width: float, depths: tuple[int, ...]) -> nn.Sequential:
    """A ResNet of basic blocks, each stage twice as wide as the one before, up to whole channels, at half the size."""
    inner = round(width)
    layers: list[nn.Module] = [nn.Conv2d(channels, inner, 3, 1, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()]
    for stage, depth in enumerate(depths):
        outer = round(width * 2**stage)
        for block in range(depth):
            layers.append(BasicBlock(inner, outer, 2 if stage and not block else 1))
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))


def vgg(channels: int, classes: int, width: float = 32) -> nn.Sequential:
    """Six convolutions in three stages, each twice as wide as the one before, up to whole channels."""
    layers: list[nn.Module] = []
    inner = channels
    for stage in range(3):
        for _ in range(2):
            outer = round(width * 2**stage)
            layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
            inner = outer
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))


class Attention(nn.Module):
    """Multi-head self-attention out of plain linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, positions, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, positions, width))


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer on patches (Dosovitskiy et al. 2021)."""

    def __init__(
        self, channels: int, size: int, classes: int, patch: int, width: int = 96, depth: int = 4, heads: int = 3
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def mlp(features: int, classes: int, width: int = 256, depth: int = 3) -> nn.Sequential:
    """Hidden layers of equal width."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


# Of each network: how wide it is, and the least by which it can be narrower. One channel less in the last stage, which
# is less than one in the first; one feature less for each head, of which there are as many in a narrow net; one hidden
# unit.
WIDTHS = {
    "resnet20": (16, 1 / 4),
    "resnet56": (16, 1 / 4),
    "resnet18": (64, 1 / 8),
    "vgg": (32, 1 / 4),
    "vit": (96, 3),
    "vit16": (96, 3),
    "mlp": (256, 1),
}


def widths(name: str) -> list[float]:
    """Every width that a network can have up to its own, the narrowest first."""
    widest, step = WIDTHS[name]
    return [step * count for count in range(1, round(widest / step) + 1) if step * count >= 1]


def build(name: str, channels: int, size: int, classes: int, width: float | None = None) -> nn.Module:
    """A network by its name for images of this shape.

    Args:
        name: A key of ``WIDTHS``.
        channels: Of an image.
        size: Height and width of an image.
        classes: Outputs.
        width: One of ``widths``: channels of the first stage, features of a token, or hidden units. The widest if None.
    """
    if name not in WIDTHS:
        raise ValueError(f"`net` must be one of {', '.join(WIDTHS)}, got {name!r}")
    width = WIDTHS[name][0] if width is None else width
    nets = {
        "resnet20": lambda: resnet(channels, classes, width, (3, 3, 3)),
        "resnet56": lambda: resnet(channels, classes, width, (9, 9, 9)),
        "resnet18": lambda: resnet(channels, classes, width, (2, 2, 2, 2)),
        "vgg": lambda: vgg(channels, classes, width),
        "vit": lambda: ViT(channels, size, classes, max(1, size // 8), int(width)),
        "vit16": lambda: ViT(channels, size, classes, max(1, size // 4), int(width)),
        "mlp": lambda: mlp(channels * size * size, classes, int(width)),
    }
    return nets[name]()
