"""Trained nets made smaller without training, or with a little: quality at a share of the MACs, against rivals.

    python benchmarks/pretrained.py --data cifar10.npz --json rows.json
    python benchmarks/pretrained.py --nets text --shares 0.5 --finetune 0,50,200 --json rows.json

Every method gets the same calibration inputs, without labels. What is finetuned afterwards is so by one loop for all,
against labels, by distilling from the original (``--teach``), or both, at the learning rate, of a few, whose held-out
loss is the lowest. Nets and speech are made once and kept in the folder of ``--cache``; rows that the file of
``--json`` holds already are not computed again.

Latencies are ratios to the original's for one input, measured in turns with it.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import rivals
import safetensors.torch
import torch
from harness import Row, Table, against, command, cpu_name, in_turns, progress
from quality import numbers
from torch import Tensor, nn
from trained_nets import NETS, Batch, TrainedNet

import lightning_svd
from lightning_svd.model.counting import count_costs

Method = Callable[[nn.Module, Sequence[Tensor], float], nn.Module]
TEACHERS = ("labels", "original")
ROUNDS = 15  # of the latencies


def ours(model: nn.Module, batches: Sequence[Tensor], share: float) -> nn.Module:
    """This package's, with its default arguments."""
    small, _ = lightning_svd.compress(copy.deepcopy(model), batches, target_macs=share)
    return small


def reconstructed(model: nn.Module, batches: Sequence[Tensor], share: float) -> nn.Module:
    """This package's, and a short training towards the original outputs on the same inputs."""
    small, _ = lightning_svd.compress(copy.deepcopy(model), batches, target_macs=share, reconstruct=150)
    return small


METHODS: dict[str, Method] = {
    "original": lambda model, batches, share: copy.deepcopy(model),
    "spectrum": rivals.spectrum,
    "SVD-LLM": rivals.by_svd_llm,
    "ASVD": rivals.by_asvd,
    "ours": ours,
    "reconstructed": reconstructed,
}


# ---------------------------------------------------------------------------------------------------------- finetuning


def objective(net: TrainedNet, teacher: str) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a model on a batch, against its labels or the original's outputs."""
    if teacher == "labels":
        labeled = net.labeled
        if labeled is None:
            raise ValueError(f"{net.name} has no labels")
        return lambda model, batch: labeled(model(batch[0]), batch[1])

    def distance(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            original = net.model(batch[0])
        return net.distance(model(batch[0]), original)

    return distance


@torch.no_grad()
def held_out_loss(net: TrainedNet, model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor]) -> float:
    """The mean over the held-out batches, in evaluation."""
    model.eval()
    return statistics.mean(float(loss(model, batch)) for batch in net.held_out)


def finetuned(
    net: TrainedNet, model: nn.Module, steps: int, teacher: str, seed: int, rates: Sequence[float]
) -> tuple[nn.Module, float]:
    """The copy of ``model`` that AdamW at one of these rates brings to the lowest held-out loss, and that rate."""
    loss = objective(net, teacher)
    tried: list[tuple[float, float, nn.Module]] = []
    for rate in rates:
        student = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(student.parameters(), rate, weight_decay=0.01)
        for step, batch in enumerate(itertools.islice(net.batches(seed), steps)):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            loss(student, batch).backward()
            optimizer.step()
        found = held_out_loss(net, student, loss)
        tried.append((found if math.isfinite(found) else math.inf, rate, student))
    _, rate, best = min(tried, key=lambda item: item[0])
    return best, rate


# ----------------------------------------------------------------------------------------------------------- measuring


def file_bytes(model: nn.Module) -> int:
    """Of the weights as a safetensors file."""
    return len(safetensors.torch.save({key: value.contiguous() for key, value in model.state_dict().items()}))


def latency(net: TrainedNet, model: nn.Module, example: Tensor) -> float:
    """The ratio to the original's for one input."""
    actions = {
        name: torch.inference_mode()(lambda each=each: each(example))
        for name, each in (("original", net.model), ("small", model))
    }
    seconds = in_turns(actions, ROUNDS)
    return float(against(seconds["small"], seconds["original"])["ratio"])


def costs(net: TrainedNet, model: nn.Module, example: Tensor) -> Row:
    """Shares of the original's MACs, parameters and bytes, and of its time."""
    small, original = (count_costs(each, example) for each in (model, net.model))
    return {
        "macs": small.dense("macs") / original.dense("macs"),
        "params": small.dense("params") / original.dense("params"),
        "bytes": file_bytes(model),
        "latency": round(latency(net, model, example), 3),
    }


Finetuning = tuple[int, str]  # steps, teacher; (0, "") for none


def finetunings(net: TrainedNet, steps: Sequence[int], teachers: Sequence[str]) -> list[Finetuning]:
    """Those that are asked for and that the net has the labels for."""
    possible = [teacher for teacher in teachers if teacher == "original" or net.labeled is not None]
    return [each for count in steps for each in ([(count, teacher) for teacher in possible] if count else [(0, "")])]


def measure(
    net: TrainedNet, method: str, share: float, seed: int, how: Sequence[Finetuning], inputs: int
) -> Iterator[Row]:
    """Compress once, and have a row for each way to finetune what comes out."""
    batches = net.calibration(seed, inputs)
    start = time.perf_counter()
    model = METHODS[method](net.model, batches, share).eval()
    seconds = time.perf_counter() - start
    about = costs(net, model, batches[0][:1])
    for steps, teacher in how:
        start, final, rate = time.perf_counter(), model, None
        if steps:
            final, rate = finetuned(net, model, steps, teacher, seed, net.rates)
        spent = time.perf_counter() - start
        row = {"net": net.name, "share": share, "method": method, "seed": seed, "steps": steps, "teacher": teacher}
        row |= {"quality": net.quality(final.eval()), "measure": net.measure, "higher_is_better": net.higher_is_better}
        row |= {"rate": rate, **about}
        yield row | {"seconds": round(seconds, 2), "finetuning_seconds": round(spent, 2)}


# -------------------------------------------------------------------------------------------------------------- tables

Group = tuple[float, int, str, str]  # share, steps, teacher, method


def groups_of(rows: Sequence[Row]) -> dict[Group, list[Row]]:
    """The rows of all seeds together, of one net."""
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["share"], row["steps"], row["teacher"], row["method"]), []).append(row)
    return groups


def mean(rows: Sequence[Row], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def finetuning_name(steps: int, teacher: str) -> str:
    return f"{steps}, {teacher}" if steps else "none"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Means over the seeds for each net, the best at each share and finetuning marked."""
    result = []
    headings = ["method", "share", "finetuning", "quality", "+-", "MACs", "params", "kB", "latency", "seconds", "seeds"]
    for net in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == net]
        measure, higher, groups = own[0]["measure"], own[0]["higher_is_better"], groups_of(own)
        order = sorted(
            groups, key=lambda key: (-key[0], key[1:3], (-1 if higher else 1) * mean(groups[key], "quality"))
        )
        lines, before = [], None
        for share, steps, teacher, method in order:
            group = groups[share, steps, teacher, method]
            first, before = (share, steps, teacher) != before, (share, steps, teacher)
            qualities = [row["quality"] for row in group]
            lines.append(
                [
                    method + (" *" if first and method != "original" else ""),
                    f"{share:g}",
                    finetuning_name(steps, teacher),
                    f"{statistics.mean(qualities):.2f}",
                    f"{statistics.stdev(qualities):.2f}" if len(group) > 1 else "",
                    f"{mean(group, 'macs'):.3f}",
                    f"{mean(group, 'params'):.3f}",
                    f"{mean(group, 'bytes') / 1e3:.0f}",
                    f"{mean(group, 'latency'):.2f}",
                    f"{mean(group, 'seconds') + mean(group, 'finetuning_seconds'):.1f}",
                    str(len(group)),
                ]
            )
        better = "more" if higher else "less"
        result.append(Table(f"{net}: {measure} ({better} is better; * the best)", headings, lines))
    return result


def lost(rows: Sequence[Row]) -> list[str]:
    """Where a rival is better than ours, in words."""
    sentences = []
    for net in dict.fromkeys(row["net"] for row in rows):
        alike = [row for row in rows if row["net"] == net and row["method"] != "original"]
        higher, groups = alike[0]["higher_is_better"], groups_of(alike)
        for (share, steps, teacher, method), group in groups.items():
            own = groups.get((share, steps, teacher, "ours"))
            if own is None or method in ("ours", "reconstructed"):
                continue
            gap = (mean(group, "quality") - mean(own, "quality")) * (1 if higher else -1)
            if gap > 0:
                how = finetuning_name(steps, teacher)
                sentences.append(f"{net}, {share:g}, finetuning {how}: {method} is {gap:.2f} points better than ours")
    return sentences


# ------------------------------------------------------------------------------------------------------------- running


def rows_in(path: Path | None, setting: Row) -> list[Row]:
    """The rows of an earlier run with the same setting.

    Raises:
        SystemExit: If the file is of another setting.
    """
    if path is None or not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["setting"] != setting:
        raise SystemExit(f"{path} holds rows of another setting: {earlier['setting']}, asked for: {setting}")
    return list(earlier["rows"])


def default_cache() -> Path:
    """In the user's folder of caches."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lightning-svd-benchmarks"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    there = list(METHODS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=numbers(str), default=list(NETS))
    parser.add_argument("--shares", type=numbers(float), default=[0.75, 0.5, 0.35], help="of the MACs")
    parser.add_argument("--methods", type=numbers(str), default=there)
    parser.add_argument("--seeds", type=numbers(int), default=[0], help="of the calibration inputs and the finetuning")
    parser.add_argument("--finetune", type=numbers(int), default=[0], help="steps, 0 for none")
    parser.add_argument("--teach", type=numbers(str), default=list(TEACHERS), help="finetune by labels, original")
    parser.add_argument("--inputs", type=int, default=128, help="how many to calibrate on")
    parser.add_argument("--data", type=Path, help="the CIFAR-10 archive; without it torchvision's is downloaded")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for trained nets and speech")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="file for the rows; those it holds are not computed again")
    options = parser.parse_args(argv)
    known = {"nets": list(NETS), "methods": there, "teach": TEACHERS}
    for name, names in known.items():
        unknown = set(getattr(options, name)) - set(names)
        if unknown:
            parser.error(f"--{name} must be out of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    options.cache.mkdir(parents=True, exist_ok=True)
    setting = {"inputs": options.inputs, "Python": platform.python_version()}
    rows = rows_in(options.json, setting)
    machine = {"CPU": cpu_name(), "threads": options.threads, "torch": torch.__version__}
    asked = command("pretrained", argv)
    for path in (options.data, options.cache):
        asked = asked.replace(str(path), path.name) if path else asked
    result = {"benchmark": "pretrained", "command": asked, "machine": machine, "setting": setting}
    for name in options.nets:
        progress(f"{name} is made or loaded")
        net = NETS[name](options.cache, options.data)
        every = finetunings(net, options.finetune, options.teach)
        units = itertools.product(options.seeds, options.shares, options.methods)
        for seed, share, method in units:
            how = every
            if method == "original":
                if (seed, share) != (options.seeds[0], options.shares[0]):
                    continue
                share, seed, how = 1.0, 0, [(0, "")]
            unit = {"net": name, "share": share, "method": method, "seed": seed}
            alike = [row for row in rows if unit.items() <= row.items()]
            how = [each for each in how if each not in {(row["steps"], row["teacher"]) for row in alike}]
            if not how:
                continue
            for row in measure(net, method, share, seed, how, options.inputs):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    shown = [row for row in rows if row["net"] in options.nets]
    for table in tables(shown):
        table.print()
    print(*lost(shown), sep="\n")


if __name__ == "__main__":
    main()
