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


def resnet(channels: int, classes: int, width: int, depths: tuple[int, ...]) -> nn.Sequential:
    """A ResNet of basic blocks, each stage twice as wide as the one before at half the size."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inner = width
    for stage, depth in enumerate(depths):
        outer = width * 2**stage
        for block in range(depth):
            layers.append(BasicBlock(inner, outer, 2 if stage and not block else 1))
            inner = outer
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, classes))


def vgg(channels: int, classes: int, width: int = 32) -> nn.Sequential:
    """Six convolutions in three stages."""
    layers: list[nn.Module] = []
    inner = channels
    for stage in range(3):
        for _ in range(2):
            outer = width * 2**stage
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
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def mlp(features: int, classes: int, width: int = 256, depth: int = 3) -> nn.Sequential:
    """Hidden layers of equal width."""
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))


def build(name: str, channels: int, size: int, classes: int) -> nn.Module:
    """A network by its name for images of this shape."""
    nets = {
        "resnet20": lambda: resnet(channels, classes, 16, (3, 3, 3)),
        "resnet56": lambda: resnet(channels, classes, 16, (9, 9, 9)),
        "resnet18": lambda: resnet(channels, classes, 64, (2, 2, 2, 2)),
        "vgg": lambda: vgg(channels, classes),
        "vit": lambda: ViT(channels, size, classes, patch=max(1, size // 8)),
        "vit16": lambda: ViT(channels, size, classes, patch=max(1, size // 4)),
        "mlp": lambda: mlp(channels * size * size, classes),
    }
    if name not in nets:
        raise ValueError(f"`net` must be one of {', '.join(nets)}, got {name!r}")
    return nets[name]()
