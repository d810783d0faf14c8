"""What one training step costs: forward, backward, regularizer, optimizer; dense against factorized, and rivals.

    python benchmarks/step_cost.py --json out.json
    python benchmarks/step_cost.py --quick
    python benchmarks/step_cost.py --parts low-rank --nets mlp1024,vit384,resnet18
    python benchmarks/step_cost.py --memory --nets resnet18

All variants of a net take turns in one process, so that a noisy machine treats them alike; a row is the median of the
ratios to the dense step of the same round, with the middle half of them as its spread. ``floor`` is the arithmetic of
the row's products against the dense net's: what the ratio could be if nothing but products cost time.

The part ``low-rank`` trains by :class:`SVDTraining` down to 0.25 of the MACs, and compares a step in each form in which
a layer of this rank may be trained with that of plain pairs of torch layers of the same ranks. The goal is 1.15.

The part ``observed`` compares a step whose batch is observed, for ranks that are judged by data, with one that is not,
says how many plain steps the cut takes that follows, and which share of a run both take beyond a cut by the spectrum.
The goal is 2 %.

With ``--memory`` each variant of the part ``step`` also makes steps in a process of its own, whose memory at the peak
of a step is compared (not with ``--quick``), and the part ``memory`` is measured: what a run under AdamW holds in each
of its phases, by what it is. The goal, of all together: below 1.3 times the dense run's at the start with
``full_rank_as="dense"``, below 0.6 of it after the last cut to a tenth of the ranks.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import nets
import torch
import torch.nn.functional as F
from harness import Row, Table, against, arguments, in_turns, middle_half, progress, save, times
from torch import Tensor, nn

from lightning_svd import Fisher, Outputs, SVDLayer, SVDTraining, add_gradients, decompose, svd_layers, to_factored
from lightning_svd.model.counting import count_costs
from lightning_svd.ranks.allocation import keep_by_budget
from lightning_svd.ranks.costs import ModelCost
from lightning_svd.training.optimizers import OptimizerOfFactors
from lightning_svd.training.policies import Change, Choose, PlannedPolicy
from lightning_svd.training.regularizers import COLUMNS

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: nets.build("resnet18", 3, 32, 10), (128, 3, 32, 32)),
    "resnet20": (lambda: nets.build("resnet20", 3, 32, 10), (128, 3, 32, 32)),
    "vit384": (lambda: nets.ViT(3, 32, 10, patch=4, width=384, depth=6, heads=6), (64, 3, 32, 32)),
    "mlp1024": (lambda: nets.mlp(1024, 10, width=1024, depth=4), (256, 1, 32, 32)),
}
BUDGETS = (0.5, 0.35, 0.25)
LOW_BUDGET = 0.25
LENGTH = 1_000  # steps of a run of which two observed ones and one cut are a share
LEFT = 0.1  # of every layer's ranks, where a run ends whose memory is measured
PARTS = ("step", "low-rank", "observed", "memory")
QUICK_ROUNDS, QUICK_INPUTS = 3, 8
QUICK_NETS = {
    "step": ["resnet18"],
    "low-rank": ["mlp1024", "vit384", "resnet18"],
    "observed": ["mlp1024", "vit384", "resnet18"],
    "memory": ["mlp1024", "vit384", "resnet18"],
}


@dataclass(frozen=True)
class Setting:
    """How every variant computes."""

    device: str = "cpu"
    dtype: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    seed: int = 0


def batch_of(shape: tuple[int, ...], setting: Setting) -> tuple[Tensor, Tensor]:
    """Noise and its labels."""
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    x = torch.randn(shape, device=setting.device).contiguous(memory_format=layout)
    return x, torch.randint(10, shape[:1], device=setting.device)


class Stepper:
    """A model, its optimizer, and what happens between backward and step."""

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], floor: float, setting: Setting = Setting(), **how: bool
    ) -> None:
        layout = torch.channels_last if setting.channels_last else torch.preserve_format
        self.model, self.floor, self.how, self.setting = model.train().to(memory_format=layout), floor, how, setting
        self.x, self.y = batch_of(shape, setting)
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
            regularized = self.decay.regularized
            if regularized:
                add_gradients(regularized, 1.0, "hoyer", 2e-3, only=self.decay.held(), step=self.steps)
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


def factorized(model: nn.Module) -> nn.Module:
    """A copy of a dense model, factorized at full rank, its factors shown as parameters."""
    model = copy.deepcopy(model)
    decompose(model)
    return model


def cut(full: nn.Module, cost: ModelCost, budget: float, round_to: int = 1) -> nn.Module:
    """A copy of a factorized model with its ranks cut to the budget, its storage as small as they are."""
    model = copy.deepcopy(full)
    layers = svd_layers(model)
    energies = {name: layer.energies() for name, layer in layers.items()}
    counted = cost.by("macs")
    for name, rank in keep_by_budget(energies, counted, budget * counted.dense(), round_to=round_to).items():
        layers[name].keep(rank)
        layers[name].shrink()
    return model


def cost_of(model: nn.Module, shape: tuple[int, ...]) -> ModelCost:
    """What a factorized model costs for an input of this shape; nothing is computed for it."""
    shapes_only = copy.deepcopy(model).to("meta")
    return count_costs(shapes_only, torch.zeros(shape, device="meta"))


def regularizer_products(m_plus_n: int, rank: int) -> int:
    """Products of the closed form on U (m, r) and V (n, r): Gram columns and one product with them.

    All of both, or a block of U's in one step and of V's in the next.
    """
    return 2 * m_plus_n * rank * rank if rank <= COLUMNS else m_plus_n * rank * COLUMNS


def arithmetic(cost: ModelCost, ranks: Mapping[str, int], always: str = "") -> float:
    """Products of a step over the dense net's: both ways of computing, and the regularizer."""
    products = 3 * cost.other_macs
    for name, price in cost.layers.items():
        rebuilt = ranks[name] * price.dense_params + price.dense_macs
        factored = ranks[name] * price.macs_per_rank
        products += 3 * {"factored": factored, "rebuilt": rebuilt}.get(always, min(rebuilt, factored))
        products += regularizer_products(price.params_per_rank, ranks[name])
    return products / (3 * cost.dense("macs"))


def always_factored(model: nn.Module) -> nn.Module:
    """The authors' form: two layers at any rank, sqrt|s| on both."""

    def forward(layer: SVDLayer, x: Tensor) -> Tensor:
        U, s, V = layer.factors()
        root = s.abs().sqrt()
        return layer.view.apply_factors(x, U * root, V * root, layer.bias)

    for layer in svd_layers(model).values():
        layer.forward = forward.__get__(layer)
    return model


def always_rebuilt(model: nn.Module) -> nn.Module:
    """A peer's form: W at any rank."""

    def forward(layer: SVDLayer, x: Tensor) -> Tensor:
        return layer.view.apply_matrix(x, layer.form.matrix(), layer.bias)

    for layer in svd_layers(model).values():
        layer.forward = forward.__get__(layer)
    return model


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank that each factorized layer keeps."""
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
        """The net, factorized at full rank."""
        return factorized(self.dense)

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
            layer.to_dense()
        return self.stepper(model, 1.0, closed_form=True)

    def rival(self, form: Callable[[nn.Module], nn.Module], always: str) -> Stepper:
        model = form(copy.deepcopy(self.full))
        return self.stepper(model, arithmetic(self.cost, ranks_of(model), always), autograd_penalty=True)

    def fixed_rank(self, budget: float) -> Stepper:
        return self.stepper(to_factored(cut(self.full, self.cost, budget), self.cost), budget)


# ---------------------------------------------------------------------------------------------------------- whole runs

STEPS = 10_000  # of a run, as it is told: more than any that is measured


class Cuts(PlannedPolicy):
    """Cuts after the steps of a plan, each to a share of every layer's ranks, or for None to the budget.

    Args:
        shares: Step -> share.
        final: The step with which ranks are final; None if they never are.
    """

    def __init__(self, shares: Mapping[int, float | None], final: int | None = None) -> None:
        self.shares, self.final = dict(shares), final

    def plan(self, total_steps: int) -> list[int]:
        return sorted(self.shares)

    def change(self, step: int, full: Mapping[str, int], now: Mapping[str, int], choose: Choose) -> Change:
        share = self.shares[step]
        ranks = choose() if share is None else {name: max(1, round(share * rank)) for name, rank in full.items()}
        return Change({name: min(rank, now[name]) for name, rank in ranks.items()}, step == self.final)

    def strength(self, step: int) -> float:
        return 1.0


class Run:
    """A run by :class:`SVDTraining` in a loop as a user would write it; or of the dense net, without one."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        optimizer: Callable[[Any], torch.optim.Optimizer],
        setting: Setting,
        steps: int = STEPS,
        **arguments: Any,
    ) -> None:
        self.model, (self.x, self.y), self.setting = model.train(), batch, setting
        if setting.channels_last:
            model.to(memory_format=torch.channels_last)
        self.optimizer = optimizer(model.parameters())
        self.training = SVDTraining(model, self.optimizer, steps, **arguments) if arguments else None

    def backward(self, inputs: int | None = None) -> None:
        """Forward and backward, on the first ``inputs`` of the batch."""
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.setting.dtype == "bf16"):
            loss = F.cross_entropy(self.model(self.x[:inputs]), self.y[:inputs])
        loss.backward()

    def update(self) -> None:
        """What comes after it."""
        (self.training or self.optimizer).step()

    def step(self, inputs: int | None = None) -> None:
        """One training step."""
        self.backward(inputs)
        self.update()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


class Changes:
    """The seconds of each change of ranks that a run makes from now on.

    Args:
        run: With an :class:`SVDTraining`.
    """

    def __init__(self, run: Run) -> None:
        assert run.training is not None
        self.seconds: list[float] = []
        self._cut, self._device = run.training.cut, run.x.device
        run.training.cut = self._timed  # type: ignore[method-assign]

    def _timed(self, *arguments: Any) -> Any:
        made: list[Any] = []
        self.seconds += in_turns({"": lambda: made.append(self._cut(*arguments))}, 1, self._device, warm_up=0)[""]
        return made[0]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=5e-4)


def low_rank(net: str, options: argparse.Namespace, setting: Setting) -> list[Row]:
    """A step at the same ranks in every form, against pairs of plain layers that never were anything else."""
    torch.manual_seed(setting.seed)
    build, shape = CASES[net]
    dense, batch = build().to(setting.device), batch_of(shape, setting)

    def ours(plan: Mapping[int, float | None], final: int | None = None) -> Run:
        progress(f"{net}: a run to {LOW_BUDGET:g} of the MACs")
        policy = Cuts(plan, final)
        run = Run(copy.deepcopy(dense), batch, sgd, setting, target_macs=LOW_BUDGET, schedule=policy)
        for _ in range(1 + max(plan, default=0)):
            run.step(QUICK_INPUTS)
        return run

    pairs, shrunk, prefix = ours({1: None}, 1), ours({1: None}), ours({})
    for name, layer in prefix.training.layers.items():
        layer.keep(pairs.training.layers[name].rank)  # and not SVDTraining.cut, which lets go of storage
    fixed = Run(to_factored(pairs.model, pairs.training.cost), batch, sgd, setting)
    runs = {
        "fixed ranks": fixed,
        "ours, svd, all of the storage": prefix,
        "ours, svd, storage as left by the cut": shrunk,
        "ours, pairs": pairs,
        "dense": Run(copy.deepcopy(dense), batch, sgd, setting),
    }
    for run in runs.values():
        run.step(QUICK_INPUTS)
    progress(f"{net}: steps at {LOW_BUDGET:g} of the MACs")
    seconds = in_turns({name: run.step for name, run in runs.items()}, options.rounds, torch.device(setting.device))
    return [
        {
            "what": "low-rank",
            "net": net,
            "input": list(shape),
            "variant": name,
            "macs": pairs.training.ratio("macs"),
            **against(seconds[name], seconds["fixed ranks"]),
        }
        for name in runs
    ]


# ----------------------------------------------------------------------------------------------------------- observed

OBSERVERS = {
    "outputs": lambda steps: Outputs(steps),
    "fisher, targets given": lambda steps: Fisher(steps, targets="given"),
    "fisher, targets drawn": lambda steps: Fisher(steps),
}


def observed(net: str, options: argparse.Namespace, setting: Setting) -> list[Row]:
    """A step of layers that are dense still with its batch observed, against one without; and the cut after one."""
    torch.manual_seed(setting.seed)
    build, shape = CASES[net]
    dense, batch = build().to(setting.device), batch_of(shape, setting)

    def run(plan: Mapping[int, float | None], **importance: Any) -> Run:
        policy = Cuts(plan, max(plan, default=0))
        made = Run(copy.deepcopy(dense), batch, sgd, setting, schedule=policy, full_rank_as="dense", **importance)
        made.step()
        return made

    runs = {"not observed": run({})}
    # With a cut that is due after so many steps, each of them is observed.
    runs |= {name: run({STEPS: None}, importance=make(STEPS)) for name, make in OBSERVERS.items()}
    progress(f"{net}: observed steps")
    seconds = in_turns({name: each.step for name, each in runs.items()}, options.rounds, torch.device(setting.device))
    cuts = {"not observed": cut_seconds(run({2: 0.5}))}
    cuts |= {name: cut_seconds(run({2: 0.5}, importance=make(1))) for name, make in OBSERVERS.items()}
    plain = statistics.median(seconds["not observed"])
    return [
        {
            "what": "observed",
            "net": net,
            "input": list(shape),
            "variant": name,
            **against(seconds[name], seconds["not observed"]),
            "cut": cuts[name] / plain,
        }
        for name in runs
    ]


def cut_seconds(run: Run) -> float:
    """Seconds of the cut after a run's second step."""
    changes = Changes(run)
    run.step()
    return changes.seconds[0]


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


KINDS = ("parameters", "gradients", "state", "activations")


def memory(net: str, options: argparse.Namespace, setting: Setting) -> list[Row]:
    """What a run under AdamW holds in a step of each of its phases, as shares of the dense weights' bytes."""
    torch.manual_seed(setting.seed)
    build, shape = CASES[net]
    dense, batch = build().to(setting.device), batch_of(shape, setting)
    weights = sum(p.numel() * p.element_size() for p in dense.parameters())
    rows: list[Row] = []

    def note(phase: str, run: Run) -> None:
        progress(f"{net}: memory, {phase}")
        held = bytes_held(run)
        shares = {kind: held[kind] / weights for kind in KINDS}
        rows.append({"what": "memory", "net": net, "input": list(shape), "variant": phase, "bytes": weights, **shares})
        rows[-1]["device"] = torch.device(setting.device).type

    run = Run(copy.deepcopy(dense), batch, torch.optim.AdamW, setting)
    run.step()
    note("dense", run)
    # In the first step nothing is remembered yet, and SVDTraining holds what it could go back to.
    run = Run(copy.deepcopy(dense), batch, torch.optim.AdamW, setting, schedule=Cuts({}))
    run.step()
    note("full rank, svd", run)
    plan = {3: 0.5, 5: LEFT, 7: LEFT}
    run = Run(copy.deepcopy(dense), batch, torch.optim.AdamW, setting, schedule=Cuts(plan, 7), full_rank_as="dense")
    for phase in (
        "full rank, dense",
        "svd, the first cut, to 0.5 of the ranks",
        f"svd, a cut to {LEFT:g}",
        f"pairs, the last cut, at {LEFT:g}",
    ):
        run.step()  # after it a cut, but for the first
        note(phase, run)
    return rows


def bytes_held(run: Run) -> dict[str, int]:
    """Bytes by what they are, of one more step of a run; each storage counts once.

    Activations are on CUDA what torch's allocator gave out at the peak of the step beyond all the rest, and elsewhere
    what the forward pass saves for the backward pass, weights that are rebuilt from factors among it.
    """
    run.optimizer.zero_grad()
    cuda = run.x.is_cuda
    if cuda:
        torch.cuda.synchronize(run.x.device)
        torch.cuda.reset_peak_memory_stats(run.x.device)
        before = torch.cuda.memory_allocated(run.x.device)
    with saved_for_backward({storage_of(p)[0] for p in run.parameters}) as saved:
        run.backward()
    run.update()
    remembered = [value for state in run.optimizer.state.values() for value in state.values()]
    held = {
        "parameters": total(run.parameters),
        "gradients": total(p.grad for p in run.parameters if p.grad is not None),
        "state": total(value for value in remembered if isinstance(value, Tensor)),
        "activations": sum(saved.values()),
    }
    if cuda:
        peak = torch.cuda.max_memory_allocated(run.x.device)
        held["activations"] = max(0, peak - before - held["gradients"])
    return held


def storage_of(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor's storage is, and its bytes."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def total(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of some tensors."""
    return sum(dict(map(storage_of, tensors)).values())


@contextmanager
def saved_for_backward(left_out: Collection[int]) -> Iterator[dict[int, int]]:
    """The storages that autograd keeps of the forward passes inside, by place, with their bytes."""
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        place, size = storage_of(tensor)
        if place not in left_out:
            saved[place] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


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
    peak = peaks(net, list(actions), setting, options.threads) if options.memory and not options.quick else {}
    return [
        {
            "net": net,
            "input": list(variants.shape),
            "variant": name,
            **against(seconds[name], seconds["dense"]),
            "floor": steppers[name].floor,
            "peak_bytes": peak.get(name),
        }
        for name in actions
    ]


def tables(rows: list[Row]) -> list[Table]:
    """One table for each net and part."""
    made = []
    for net, what in dict.fromkeys((row["net"], row.get("what", "step")) for row in rows):
        mine = [row for row in rows if (row["net"], row.get("what", "step")) == (net, what)]
        title = f"{net}, input {' x '.join(map(str, mine[0]['input']))}"
        made.append(_TABLES[what](title, mine))
    return made


def _steps_table(title: str, rows: list[Row]) -> Table:
    headings = ["variant", "step / dense", "middle half", "floor", "seconds"]
    cells = [
        [row["variant"], times(row["ratio"]), middle_half(row), times(row["floor"]), f"{row['seconds']:.3f}"]
        for row in rows
    ]
    dense_peak = rows[0]["peak_bytes"]
    if dense_peak:
        headings += ["peak memory / dense", "MB"]
        for row, line in zip(rows, cells, strict=True):
            line += [times(row["peak_bytes"] / dense_peak), f"{row['peak_bytes'] / 1e6:.0f}"]
    return Table(title, headings, cells)


def _low_rank_table(title: str, rows: list[Row]) -> Table:
    cells = [[row["variant"], times(row["ratio"]), middle_half(row), f"{row['seconds']:.4f}"] for row in rows]
    title = f"{title}, at {rows[0]['macs']:.3f} of the MACs"
    return Table(title, ["variant", "step / fixed ranks", "middle half", "seconds"], cells)


def _observed_table(title: str, rows: list[Row]) -> Table:
    of_run = 2 * rows[0]["ratio"] + rows[0]["cut"]
    cells = [
        [
            row["variant"],
            times(row["ratio"]),
            middle_half(row),
            times(row["cut"]),
            f"{(2 * row['ratio'] + row['cut'] - of_run) / LENGTH:.2%}",
        ]
        for row in rows
    ]
    headings = ["observed for", "step / not observed", "middle half", "the cut, in steps", f"more in {LENGTH:,} steps"]
    return Table(f"{title}, layers dense until the cut", headings, cells)


def _memory_table(title: str, rows: list[Row]) -> Table:
    parts = {"without activations": KINDS[:-1], "together": KINDS}
    of_dense = {name: sum(rows[0][kind] for kind in kinds) for name, kinds in parts.items()}
    cells = [
        [
            row["variant"],
            *(times(row[kind]) for kind in KINDS),
            *(times(sum(row[kind] for kind in kinds) / of_dense[name]) for name, kinds in parts.items()),
        ]
        for row in rows
    ]
    how = "at the peak of a step" if rows[0]["device"] == "cuda" else "saved for the backward pass"
    title = f"{title}, AdamW: bytes / the dense weights' {rows[0]['bytes'] / 1e6:.1f} MB; activations {how}"
    return Table(title, ["phase", *KINDS, *(f"{name} / dense" for name in parts)], cells)


_TABLES = {"step": _steps_table, "low-rank": _low_rank_table, "observed": _observed_table, "memory": _memory_table}


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["step"], help=", ".join(PARTS))
    parser.add_argument("--nets", type=lambda text: text.split(","), help="all if not given, with --quick some")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also the peak of each step, and the part `memory`")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = Setting(options.device, options.dtype, options.compile, options.channels_last, options.seed)
    rows: list[Row] = []
    for part in [*options.parts, *(["memory"] if options.memory and "memory" not in options.parts else [])]:
        for net in options.nets or (QUICK_NETS[part] if options.quick else CASES):
            if part == "step":
                rows += measure(net, options, setting)
            else:
                parts = {"low-rank": low_rank, "observed": observed, "memory": memory}
                rows += parts[part](net, options, setting)
            tables(rows)[-1].print()
            save("step_cost", argv, options, rows)


if __name__ == "__main__":
    main()
