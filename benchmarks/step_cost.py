"""What one training step costs: forward, backward, regulariser, optimizer; dense against factorised, and rivals.

    python benchmarks/step_cost.py --json out.json
    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --memory --nets resnet18

All variants of a net take turns in one process, so that a noisy machine treats them alike; a row is the median of the
ratios to the dense step of the same round, with the middle half of them as its spread. ``floor`` is the arithmetic of
the row's products against the dense net's: what the ratio could be if nothing but products cost time. With
``--memory`` each variant also makes steps in a process of its own, whose memory at the peak of a step is compared.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import nets
import torch
import torch.nn.functional as F
from harness import Row, Table, against, arguments, in_turns, middle_half, progress, save, times
from torch import Tensor, nn

from lightning_svd import SVDConv, SVDLayer, add_gradients, decompose, svd_layers, to_factored
from lightning_svd.costs import ModelCost, count_costs
from lightning_svd.optimizers import OptimizerOfFactors
from lightning_svd.ranks import keep_by_budget, strongest
from lightning_svd.regularizers import COLUMNS

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: nets.build("resnet18", 3, 32, 10), (128, 3, 32, 32)),
    "resnet20": (lambda: nets.build("resnet20", 3, 32, 10), (128, 3, 32, 32)),
    "vit384": (lambda: nets.ViT(3, 32, 10, patch=4, width=384, depth=6, heads=6), (64, 3, 32, 32)),
    "mlp1024": (lambda: nets.mlp(1024, 10, width=1024, depth=4), (256, 1, 32, 32)),
}
BUDGETS = (0.5, 0.35, 0.25)
QUICK_ROUNDS, QUICK_INPUTS = 3, 8


@dataclass(frozen=True)
class Setting:
    """How every variant computes."""

    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    seed: int = 0


class Stepper:
    """A model, its optimizer, and what happens between backward and step."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], floor: float, setting: Setting = Setting(), **how: bool
    ) -> None:
        layout = torch.channels_last if setting.channels_last else torch.preserve_format
        self.model, self.floor, self.how, self.setting = model.train().to(memory_format=layout), floor, how, setting
        self.x = torch.randn(shape, device=setting.device).contiguous(
            memory_format=torch.channels_last if setting.channels_last else torch.contiguous_format
        )
        self.y = torch.randint(10, shape[:1], device=setting.device)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
        self.layers = list(svd_layers(model).values())
        self.decay = OptimizerOfFactors(self.optimizer, self.layers)
        self.steps = 0
        self.forward = compiled(model) if setting.compile else model

    def step(self, inputs: int | None = None) -> None:
        """One training step, on the first ``inputs`` of the batch."""
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.setting.dtype == "bf16"):
            loss = F.cross_entropy(self.forward(self.x[:inputs]), self.y[:inputs])
        if self.how.get("autograd_penalty"):
            loss = loss + sum(penalty(layer) for layer in self.layers)
        loss.backward()
        if self.how.get("closed_form"):
            self.steps += 1
            regularised = self.decay.regularised
            if regularised:
                add_gradients(regularised, 1.0, "hoyer", 2e-3, step=self.steps)
            self.decay.split()
        self.optimizer.step()
        if self.how.get("svd"):
            with torch.no_grad():
                for module in self.model.modules():
                    if isinstance(module, (nn.Linear, nn.Conv2d)):
                        U, s, Vh = torch.linalg.svd(module.weight.flatten(1), full_matrices=False)
                        module.weight.copy_(((U * s) @ Vh).reshape(module.weight.shape))


def compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """``model`` compiled as one graph, and anew for each model: beyond a few of one class torch falls back to eager."""
    return torch.compile(model, fullgraph=True, isolate_recompiles=True)


def penalty(layer: SVDLayer) -> Tensor:
    """The authors' orthogonality and Hoyer penalties for autograd."""
    U, s, V = layer.factors()
    eye = torch.eye(layer.rank, device=s.device)
    defects = (U.mT @ U - eye).square().sum() + (V.mT @ V - eye).square().sum()
    return defects / layer.rank**2 + 2e-3 * s.abs().sum() / s.square().sum().sqrt()


def factorised(model: nn.Module) -> nn.Module:
    """A copy of a dense model, factorised at full rank."""
    model = copy.deepcopy(model)
    decompose(model)
    return model


def cut(full: nn.Module, cost: ModelCost, budget: float, round_to: int = 1) -> nn.Module:
    """A copy of a factorised model with its ranks cut to the budget."""
    model = copy.deepcopy(full)
    layers = svd_layers(model)
    energies = {name: layer.energies() for name, layer in layers.items()}
    for name, rank in keep_by_budget(energies, cost, budget * cost.dense("macs"), round_to=round_to).items():
        layers[name].keep(strongest(energies[name], rank))
    return model


def cost_of(model: nn.Module, shape: tuple[int, ...]) -> ModelCost:
    """What a factorised model costs for an input of this shape; nothing is computed for it."""
    shapes_only = copy.deepcopy(model).to("meta")
    return count_costs(shapes_only, torch.zeros(shape, device="meta"))


def regulariser_products(m_plus_n: int, rank: int) -> int:
    """Products of the closed form on U (m, r) and V (n, r): a block of Gram columns, and one product with it."""
    return 2 * m_plus_n * rank * min(rank, COLUMNS)


def arithmetic(cost: ModelCost, ranks: Mapping[str, int], always: str = "") -> float:
    """Products of a step over the dense net's: both ways of computing, and the regulariser."""
    products = 3 * cost.other_macs
    for name, price in cost.layers.items():
        rebuilt = ranks[name] * price.dense_params + price.dense_macs
        factored = ranks[name] * price.macs_per_rank
        products += 3 * {"factored": factored, "rebuilt": rebuilt}.get(always, min(rebuilt, factored))
        products += regulariser_products(price.params_per_rank, ranks[name])
    return products / (3 * cost.dense("macs"))


def always_factored(model: nn.Module) -> nn.Module:
    """The authors' form: two layers at any rank, sqrt|s| on both."""

    def forward(layer: SVDLayer, x: Tensor) -> Tensor:
        U, s, V = layer.factors()
        root = s.abs().sqrt()
        if not isinstance(layer, SVDConv):
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


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank that each factorised layer keeps."""
    return {name: layer.rank for name, layer in svd_layers(model).items()}


class Variants:
    """The rows of a net's table, each built when it is asked for."""

    def __init__(self, net: str, setting: Setting, quick: bool = False) -> None:
        torch.manual_seed(setting.seed)
        self.build, self.shape = CASES[net]
        self.setting = setting
        self.dense = self.build().to(setting.device)
        budgets = BUDGETS[1:2] if quick else BUDGETS
        self.makers: dict[str, Callable[[], Stepper]] = {
            "dense": lambda: self.stepper(copy.deepcopy(self.dense), 1.0),
            "ours, full rank": lambda: self.ours(copy.deepcopy(self.full)),
            "ours, full rank as dense": self.ours_as_dense,
            **{f"ours, {budget:g} of the MACs": partial(self.ours_at, budget) for budget in budgets},
            "two factors always, autograd": lambda: self.rival(always_factored, "factored"),
            "rebuilt always, autograd": lambda: self.rival(always_rebuilt, "rebuilt"),
        }
        if not quick:
            self.makers["an SVD of every layer each step"] = lambda: self.stepper(
                copy.deepcopy(self.dense), 1.0, svd=True
            )
        self.makers |= {f"fixed rank, {budget:g} of the MACs": partial(self.fixed_rank, budget) for budget in budgets}

    @cached_property
    def full(self) -> nn.Module:
        """The net, factorised at full rank."""
        return factorised(self.dense)

    @cached_property
    def cost(self) -> ModelCost:
        """Of the net, for the whole batch."""
        return cost_of(self.full, self.shape)

    def stepper(self, model: nn.Module, floor: float, **how: bool) -> Stepper:
        return Stepper(model, self.shape, floor, self.setting, **how)

    def ours(self, model: nn.Module) -> Stepper:
        return self.stepper(model, arithmetic(self.cost, ranks_of(model)), closed_form=True)

    def ours_at(self, budget: float) -> Stepper:
        return self.ours(cut(self.full, self.cost, budget))

    def ours_as_dense(self) -> Stepper:
        model = copy.deepcopy(self.full)
        for layer in svd_layers(model).values():
            layer.join()
        return self.stepper(model, 1.0, closed_form=True)

    def rival(self, form: Callable[[nn.Module], nn.Module], always: str) -> Stepper:
        model = form(copy.deepcopy(self.full))
        return self.stepper(model, arithmetic(self.cost, ranks_of(model), always), autograd_penalty=True)

    def fixed_rank(self, budget: float) -> Stepper:
        return self.stepper(to_factored(cut(self.full, self.cost, budget), self.cost), budget)


# ------------------------------------------------------------------------------------------------------------- memory


def peak_memory(net: str, variant: str, setting: Setting) -> int:
    """Bytes at the peak of a step: weights, gradients, optimizer, activations, and what kernels take for themselves.

    On CUDA what torch's allocator gave out. Elsewhere (Linux only) what the process holds at the peak beyond what is
    left once all of it is freed, the libraries' code and caches; let the process be a fresh one.
    """
    stepper = Variants(net, setting).makers[variant]()
    gc.collect()  # the nets that it was made from
    stepper.step()
    stepper.step()
    if setting.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(setting.device)
        stepper.step()
        return torch.cuda.max_memory_allocated(setting.device)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is from here on
    stepper.step()
    peak = process_memory("VmHWM")
    del stepper
    gc.collect()
    return peak - process_memory("VmRSS")


def process_memory(fact: str) -> int:
    """Bytes of resident memory of this process, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(fact))


def peaks(net: str, variants: Sequence[str], setting: Setting, threads: int) -> dict[str, int]:
    """:func:`peak_memory` of each variant, in a fresh process each."""
    # What is freed goes back to the system at once, so that the process holds what is in use and nothing else.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for variant in variants:
        progress(f"{net}: memory of {variant}")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, torch.set_num_threads, (threads,)) as process:
            found[variant] = process.submit(peak_memory, net, variant, setting).result()
    return found


# --------------------------------------------------------------------------------------------------------------- rows


def measure(net: str, options: argparse.Namespace, setting: Setting) -> list[Row]:
    """One row for each variant of a net."""
    variants = Variants(net, setting, options.quick)
    steppers = {}
    for name, make in variants.makers.items():
        progress(f"{net}: {name}")
        steppers[name] = make()
        if options.quick:
            # Makes the optimizer's state; a whole step to warm up takes too long. Compiled code is made for one shape.
            steppers[name].step(None if options.compile else QUICK_INPUTS)
    progress(f"{net}: steps")
    actions = {name: stepper.step for name, stepper in steppers.items()}
    rounds, warm_up = (min(options.rounds, QUICK_ROUNDS), 0) if options.quick else (options.rounds, 1)
    seconds = in_turns(actions, rounds, torch.device(setting.device), warm_up=warm_up)
    memory = peaks(net, list(actions), setting, options.threads) if options.memory else {}
    return [
        {
            "net": net,
            "input": list(variants.shape),
            "variant": name,
            **against(seconds[name], seconds["dense"]),
            "floor": steppers[name].floor,
            "peak_bytes": memory.get(name),
        }
        for name in actions
    ]


def tables(rows: list[Row]) -> list[Table]:
    """One table for each net."""
    made = []
    for net in dict.fromkeys(row["net"] for row in rows):
        mine = [row for row in rows if row["net"] == net]
        headings = ["variant", "step / dense", "middle half", "floor", "seconds"]
        cells = [
            [row["variant"], times(row["ratio"]), middle_half(row), times(row["floor"]), f"{row['seconds']:.3f}"]
            for row in mine
        ]
        dense_peak = mine[0]["peak_bytes"]
        if dense_peak:
            headings += ["peak memory / dense", "MB"]
            for row, line in zip(mine, cells, strict=True):
                line += [times(row["peak_bytes"] / dense_peak), f"{row['peak_bytes'] / 1e6:.0f}"]
        made.append(Table(f"{net}, input {' x '.join(map(str, mine[0]['input']))}", headings, cells))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--nets", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also the memory at the peak of a step")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = Setting(options.device, options.dtype, options.compile, options.channels_last, options.seed)
    rows: list[Row] = []
    for net in ["resnet18"] if options.quick else options.nets:
        rows += measure(net, options, setting)
        tables(rows)[-1].print()
        save("step_cost", argv, options, rows)


if __name__ == "__main__":
    main()
