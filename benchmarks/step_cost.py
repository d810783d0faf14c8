"""What one training step costs: forward, backward, regulariser, optimizer; dense against factorised, and rivals.

    python benchmarks/step_cost.py --json out.json
    python benchmarks/step_cost.py --quick

All variants of a net take turns in one process, so that a noisy machine treats them alike; a row is the median of the
ratios to the dense step of the same round, with the middle half of them as its spread. ``floor`` is the arithmetic of
the row's products against the dense net's: what the ratio could be if nothing but products cost time.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import nets
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_svd import SVDConv2d, SVDLayer, add_gradients, decompose, svd_layers, to_factored
from lightning_svd.costs import CostMeter, ModelCost
from lightning_svd.optimizers import OptimizerOfFactors
from lightning_svd.ranks import keep_by_budget, strongest

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: nets.build("resnet18", 3, 32, 10), (128, 3, 32, 32)),
    "resnet20": (lambda: nets.build("resnet20", 3, 32, 10), (128, 3, 32, 32)),
    "vit384": (lambda: nets.ViT(3, 32, 10, patch=4, width=384, depth=6, heads=6), (64, 3, 32, 32)),
    "mlp1024": (lambda: nets.mlp(1024, 10, width=1024, depth=4), (256, 1, 32, 32)),
}
BUDGETS = (0.5, 0.35, 0.25)


class Stepper:
    """A model, its optimizer, and what happens between backward and step."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], floor: float, **how: bool) -> None:
        self.model, self.floor, self.how = model.train(), floor, how
        device = next(model.parameters()).device
        self.x = torch.randn(shape, device=device)
        self.y = torch.randint(10, shape[:1], device=device)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        self.layers = list(svd_layers(model).values())
        self.decay = OptimizerOfFactors(self.optimizer, self.layers)

    def step(self) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        if self.how.get("autograd_penalty"):
            loss = loss + sum(penalty(layer) for layer in self.layers)
        loss.backward()
        if self.how.get("closed_form"):
            add_gradients(self.layers, 1.0, "hoyer", 2e-3)
            self.decay.split()
        self.optimizer.step()
        if self.how.get("svd"):
            with torch.no_grad():
                for module in self.model.modules():
                    if isinstance(module, (nn.Linear, nn.Conv2d)):
                        U, s, Vh = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
                        module.weight.copy_(((U * s) @ Vh).reshape(module.weight.shape))


def penalty(layer: SVDLayer) -> Tensor:
    """The authors' orthogonality and Hoyer penalties for autograd."""
    U, s, V = layer.factors()
    eye = torch.eye(layer.rank, device=s.device)
    defects = (U.mT @ U - eye).square().sum() + (V.mT @ V - eye).square().sum()
    return defects / layer.rank**2 + 2e-3 * s.abs().sum() / s.square().sum().sqrt()


def factorised(model: nn.Module, cost: ModelCost | None, budget: float) -> nn.Module:
    """A copy of a dense or factorised model, factorised, its ranks cut to the budget."""
    model = copy.deepcopy(model)
    layers = svd_layers(model)
    if not layers:
        decompose(model)
    elif cost is not None:
        energies = {name: layer.energies() for name, layer in layers.items()}
        for name, rank in keep_by_budget(energies, cost, budget * cost.dense("macs")).items():
            layers[name].keep(strongest(energies[name], rank))
    return model


def arithmetic(model: nn.Module, cost: ModelCost, always: str = "") -> float:
    """Products of a step over the dense net's: both ways of computing, and the Gram form of the regulariser."""
    products = 3 * cost.other_macs
    for name, layer in svd_layers(model).items():
        price, rank = cost.layers[name], layer.rank
        rebuilt = rank * layer.dense_params + price.dense_macs
        factored = rank * price.macs_per_rank
        products += 3 * {"factored": factored, "rebuilt": rebuilt}.get(always, min(rebuilt, factored))
        products += 2 * sum(layer.matrix_shape) * rank**2
    return products / (3 * cost.dense("macs"))


def always_factored(model: nn.Module) -> nn.Module:
    """The authors' form: two layers at any rank, sqrt|s| on both."""

    def forward(layer: SVDLayer, x: Tensor) -> Tensor:
        U, s, V = layer.factors()
        root = s.abs().sqrt()
        if not isinstance(layer, SVDConv2d):
            return F.linear(F.linear(x, (V * root).mT), U * root, layer.bias)
        kernel = (V * root).mT.reshape(-1, layer.in_channels, *layer.kernel_size)
        maps = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(maps, (U * root)[:, :, None, None], layer.bias)

    for layer in svd_layers(model).values():
        layer.forward = forward.__get__(layer)
    return model


def always_rebuilt(model: nn.Module) -> nn.Module:
    """A peer's form: W at any rank."""
    for layer in svd_layers(model).values():
        layer.forward = layer.forward_rebuilt
    return model


def variants(name: str, device: torch.device, quick: bool) -> dict[str, Stepper]:
    """Every row of a net's table; only the telling ones if ``quick``."""
    torch.manual_seed(0)
    build, shape = CASES[name]
    dense = build().to(device)
    full = factorised(dense, None, 1.0)
    with CostMeter(full) as meter, torch.no_grad():
        full(torch.zeros(shape, device=device))
    cost = meter.cost(shape[0])
    budgets = BUDGETS[1:2] if quick else BUDGETS
    made = {
        "dense": Stepper(dense, shape, 1.0),
        "ours, full rank": Stepper(full, shape, arithmetic(full, cost), closed_form=True),
    }
    for budget in budgets:
        model = factorised(full, cost, budget)
        made[f"ours, {budget:g} of the MACs"] = Stepper(model, shape, arithmetic(model, cost), closed_form=True)
    two = always_factored(copy.deepcopy(full))
    made["two factors always, autograd"] = Stepper(two, shape, arithmetic(two, cost, "factored"), autograd_penalty=True)
    one = always_rebuilt(copy.deepcopy(full))
    made["rebuilt always, autograd"] = Stepper(one, shape, arithmetic(one, cost, "rebuilt"), autograd_penalty=True)
    if not quick:
        made["an SVD of every layer each step"] = Stepper(copy.deepcopy(dense), shape, 1.0, svd=True)
    for budget in budgets:
        model = to_factored(factorised(full, cost, budget), cost)
        made[f"fixed rank, {budget:g} of the MACs"] = Stepper(model, shape, budget)
    return made


def measure(steppers: dict[str, Stepper], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of a step for each variant, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for turn in range(rounds + 1):
        for name, stepper in steppers.items():
            start = time.perf_counter()
            stepper.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(name: str, steppers: dict[str, Stepper], seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    """One row for each variant."""
    rows = []
    for variant, times in seconds.items():
        ratios = sorted(mine / dense for mine, dense in zip(times, seconds["dense"], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            {
                "net": name,
                "variant": variant,
                "ratio": statistics.median(ratios),
                "low": ratios[quarter],
                "high": ratios[-1 - quarter],
                "floor": steppers[variant].floor,
                "seconds": statistics.median(times),
            }
        )
    return rows


def print_table(name: str, rows: list[dict[str, object]]) -> None:
    """The rows of one net."""
    table = Table(title=f"{name}, input {' x '.join(map(str, CASES[name][1]))}", title_justify="left")
    for heading in ("variant", "step / dense", "middle half", "floor", "seconds"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        spread = f"{row['low']:.2f} - {row['high']:.2f}"
        table.add_row(row["variant"], f"{row['ratio']:.2f}", spread, f"{row['floor']:.2f}", f"{row['seconds']:.3f}")
    Console(width=110).print(table)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="ResNet-18, the telling rows, three rounds")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows: list[dict[str, object]] = []
    for name in ["resnet18"] if options.quick else options.nets:
        steppers = variants(name, device, options.quick)
        mine = rows_of(name, steppers, measure(steppers, 3 if options.quick else options.rounds, device))
        print_table(name, mine)
        rows += mine
        if options.json:
            machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
            about = {"machine": machine, "threads": options.threads, "torch": torch.__version__}
            options.json.write_text(json.dumps({"rows": rows, **about}, indent=1))


if __name__ == "__main__":
    main()
