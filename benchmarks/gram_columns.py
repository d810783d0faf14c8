"""Whether factors stay as orthonormal when each step pulls a block of columns as when it pulls all of them.

    python benchmarks/gram_columns.py

Trains the perceptron on MNIST-1D at full rank both ways, with the same batches, and prints the orthogonality error
along the run: the root mean square of |A^T A - I|_F per rank over all factors.
"""

from __future__ import annotations

import argparse
import statistics

import images
import nets
import torch
import torch.nn.functional as F
from harness import Table

from lightning_svd import add_gradients, decompose, svd_layers
from lightning_svd.training.optimizers import OptimizerOfFactors
from lightning_svd.training.regularizers import COLUMNS


def errors(data: images.Images, optimizer: str, rate: float, seed: int, epochs: int, in_turns: bool) -> list[float]:
    """The orthogonality error after every fifth of the run."""
    torch.manual_seed(seed)
    model = nets.build("mlp", *data.shape)
    decompose(model)
    layers = list(svd_layers(model).values())
    trained = getattr(torch.optim, optimizer)(model.parameters(), rate)
    OptimizerOfFactors(trained, layers)  # by hooks of its own
    found, step = [], 0
    for epoch in range(epochs):
        for x, y in data.batches(128, seed, epoch):
            trained.zero_grad()
            F.cross_entropy(model(x), y).backward()
            add_gradients(layers, 1.0, step=step if in_turns else None)
            trained.step()
            step += 1
        if (epoch + 1) % max(1, epochs // 5) == 0:
            found.append(float(add_gradients(layers, 0.0).orthogonality_error))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data, rows = images.load("mnist1d", None, None, None), []
    for optimizer, rate in (("SGD", 0.5), ("Adam", 1e-3)):
        for name, in_turns in (("all columns", False), (f"{COLUMNS} columns in turn", True)):
            runs = [errors(data, optimizer, rate, seed, options.epochs, in_turns) for seed in range(options.seeds)]
            means = [f"{statistics.mean(run[part] for run in runs):.3f}" for part in range(5)]
            rows.append([f"{optimizer}, {name}", *means])
    headings = ["optimizer, Gram matrix", *(f"{20 * part} % of the run" for part in range(1, 6))]
    Table("Orthogonality error, mean of the seeds", headings, rows).print()


if __name__ == "__main__":
    main()
