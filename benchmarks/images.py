"""The data sets of the benchmarks, whole in memory as normalized tensors."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """A data set: images (n, channels, size, size), labels (n,)."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    augment: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, size, classes."""
        return self.train[0].shape[1], self.train[0].shape[-1], int(self.train[1].max()) + 1

    def batches(self, batch_size: int, seed: int, epoch: int):
        """The training batches of one epoch, the same for every method."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        images, labels = self.train
        for chosen in torch.randperm(len(labels), generator=generator).split(batch_size):
            if len(chosen) == batch_size:
                batch = images[chosen]
                yield (crop_and_flip(batch, generator) if self.augment else batch), labels[chosen]


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random shift of up to an eighth of the size and a random mirror for each image."""
    count, _, size, _ = images.shape
    pad = size // 8
    padded = F.pad(images, (pad, pad, pad, pad))
    rows, columns = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator) + torch.arange(size)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    index = torch.arange(count)
    return padded.permute(0, 2, 3, 1)[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def load(name: str, path: Path | None, train_size: int | None, test_size: int | None) -> Images:
    """A data set by its name, its training part cut to the first ``train_size``."""
    loaders = {"cifar10": _cifar10, "cifar10-16": _cifar10_16, "digits": _digits, "mnist1d": _mnist1d}
    if name not in loaders:
        raise ValueError(f"`data-set` must be one of {', '.join(loaders)}, got {name!r}")
    title, train, test = loaders[name](path)
    train, test = (train[0][:train_size], train[1][:train_size]), (test[0][:test_size], test[1][:test_size])
    mean, std = train[0].mean((0, 2, 3), keepdim=True), train[0].std((0, 2, 3), keepdim=True)
    return Images(
        title, ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1]), name.startswith("cifar10")
    )


def _cifar10(path: Path | None):
    if path is None:
        from torchvision.datasets import CIFAR10

        parts = [CIFAR10("data", train=train, download=True) for train in (True, False)]
        arrays = [(torch.tensor(part.data).permute(0, 3, 1, 2) / 255.0, torch.tensor(part.targets)) for part in parts]
        return "CIFAR-10", *arrays
    from PIL import Image

    with numpy.load(path) as file:
        jpeg, offsets, labels, is_test = (file[key] for key in ("jpeg", "offsets", "labels", "is_test"))
    pixels = numpy.stack(
        [numpy.asarray(Image.open(io.BytesIO(jpeg[start:end].tobytes()))) for start, end in itertools.pairwise(offsets)]
    )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255.0
    labels, is_test = torch.from_numpy(labels).long(), torch.from_numpy(is_test)
    return "CIFAR-10 (JPEG)", (images[~is_test], labels[~is_test]), (images[is_test], labels[is_test])


def _cifar10_16(path: Path | None):
    """A quarter of the work, to weigh arguments: 16 x 16, and tested on training images that are held out."""
    name, (images, labels), _ = _cifar10(path)
    images = F.avg_pool2d(images, 2)
    return f"{name} at 16 x 16", (images[:40_000], labels[:40_000]), (images[40_000:], labels[40_000:])


def _digits(path: Path | None):
    from lightning_svd.demo import digits

    train, test = digits()
    return "digits", train.tensors, test.tensors


def _mnist1d(path: Path | None):
    from mnist1d.data import get_dataset_args, make_dataset

    signals = make_dataset(get_dataset_args())
    # Forty channels of one pixel: signals for a perceptron.
    images = {
        part: torch.tensor(signals[key]).float()[:, :, None, None] for part, key in (("train", "x"), ("test", "x_test"))
    }
    return "MNIST-1D", (images["train"], torch.tensor(signals["y"])), (images["test"], torch.tensor(signals["y_test"]))
