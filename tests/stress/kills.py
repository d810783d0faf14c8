"""Runs that are killed, and writers that are: a run goes on to the same bits, and a file is the old or the new one.

    python tests/stress/kills.py --steps 24

A process trains, and is killed (SIGKILL) at the start of a step; another goes on from the last file, and what it ends
with is compared with a run that was never stopped: weights, factors, optimizer, report and final model, bit for bit.

Then files of each kind are written over and over by a process that is killed at random moments, and onto a disk that is
full.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from common import Tally, finish, parser  # isort: skip  # puts the tests' own models on the path
import test_resume as runs
import torch
from models import EMAWeightAveraging
from torch import nn

from lightning_svd import compress, load_low_rank, save_low_rank, to_onnx
from lightning_svd.files.low_rank import write_weights
from lightning_svd.lightning.checkpoint_io import SVDCheckpointIO
from lightning_svd.model.plan import plan, write_plan

SAME, OLD, NEW, REFUSED = "same bits", "old file whole", "new file whole", "error in one line, old file whole"
DIFFERENT, HALF, LEFT, OTHER = "other bits", "half a file", "temporary file left", "another error"
ADAMW = {"optimizer": "AdamW", "lr": 1e-3, "weight_decay": 0.01}


# ------------------------------------------------------------------------------------------------------- killed runs


def averaged():
    return [EMAWeightAveraging(decay=0.8)]


def none():
    return []


# Options of the optimizer, callbacks, and what else `fit` takes.
VARIANTS = {
    "SGD": (runs.SGD, none, {}),
    "AdamW": (ADAMW, none, {}),
    "SGD, layers dense at first": (runs.SGD, none, {"full_rank_as": "dense"}),
    "AdamW, layers dense at first": (ADAMW, none, {"full_rank_as": "dense"}),
    "SGD, gradients of 3 batches": (runs.SGD, none, {"accumulate_grad_batches": 3}),
    "SGD, average of weights": (runs.SGD, averaged, {}),
    'AdamW, importance="fisher"': (ADAMW, none, {"importance": "fisher"}),
    "AdamW, distill=True": (ADAMW, none, {"distill": True}),
}


def fit(variant, *callbacks, ckpt_path=None):
    options, others, arguments = VARIANTS[variant]
    return runs.fit(options, *others(), *callbacks, ckpt_path=ckpt_path, **arguments)


def in_child(work, kill_after=None):
    """How a child process ends that does this, killed after so many seconds: its exit code, or minus a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):  # noqa: PTH123
                work()
            code = 0
        except BaseException:
            if os.environ.get("SHOW"):
                traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at(variant, step, folder):
    """Train, and be killed at the start of this step."""
    kill = runs.At(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(variant, kill, runs.last(folder))


def equal(one, other):
    try:
        runs.assert_equal(one, other)
    except AssertionError as error:
        return str(error).splitlines()[0] or "end"
    return None


def parts(variant, end):
    """What must be the same; what an average is of is compared by what comes of it."""
    return {key: end[key] for key in ("final", "report")} if "average" in variant else end


def try_runs(tally, variants, steps):
    for variant in variants:
        expected = parts(variant, fit(variant))
        last = expected["report"]["timeline"][-1]["step"] if expected["report"]["timeline"] else 0
        assert last, "no rank was cut: there is nothing to lose"
        count = -(-runs.STEPS // 3) if "batches" in variant else runs.STEPS
        for step in (step for step in steps if step < count):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                code = in_child(lambda step=step, folder=folder, variant=variant: killed_at(variant, step, folder))
                if code != -signal.SIGKILL:
                    tally.add(variant, OTHER, f"step {step}: the run to be killed ended with {code}")
                    continue
                try:
                    resumed = parts(variant, fit(variant, ckpt_path=folder / "last.ckpt"))
                except Exception as error:
                    tally.add(variant, OTHER, f"step {step}: {type(error).__name__}: {error}")
                    continue
                differs = equal(resumed, expected)
                tally.add(variant, SAME if differs is None else DIFFERENT, f"step {step}: {differs}")


# --------------------------------------------------------------------------------------------------- killed writers


class Net(nn.Sequential):
    """Layers of one value, so that a file that is of two writers would show it."""

    def __init__(self, value=0.0, width=400):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        for parameter in self.parameters():
            nn.init.constant_(parameter, value)


def small(value):
    net = Net()
    torch.manual_seed(0)
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight)
    less, _ = compress(net, [torch.randn(4, 400)], target_macs=0.5, importance="spectrum", progress=False)
    for parameter in less.parameters():
        nn.init.constant_(parameter, value)
    return less


class Written:
    """Files of one kind: how one is made of a number, and how the number is read again."""

    def __init__(self, name, write, read, prepare=float):
        self.name, self.write, self.read, self.prepare = name, write, read, prepare


def one_value(values):
    (value,) = {float(value) for value in values}
    return value


def of_module(module):
    return one_value(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).unique())


class _Trainer:
    """What the plugin asks of its Trainer."""

    def __init__(self, module):
        self.lightning_module = module


def write_checkpoint(net, path):
    from lightning.pytorch.plugins.io import TorchCheckpointIO

    trainer = _Trainer(net)
    SVDCheckpointIO(TorchCheckpointIO(), trainer).save_checkpoint({"state_dict": net.state_dict()}, path)


def read_checkpoint(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return one_value(torch.cat([tensor.flatten() for tensor in state.values()]).unique())


def numbered(value):
    """A report, with 4,000 numbers that are all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    _, report = compress(net, [torch.randn(4, 16)], target_macs=0.8, importance="spectrum", progress=False)
    return dataclasses.replace(report.ranks, arguments={f"argument{number}": value for number in range(4000)})


def read_report(path):
    return one_value(json.loads(path.read_text())["arguments"].values())


def planned(value):
    layers = plan(nn.Sequential(*(nn.Linear(8, 8) for _ in range(300))))
    return [dataclasses.replace(layer, max_rank=int(value)) for layer in layers]


def read_plan_file(path):
    import yaml

    layers = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["layers"]
    assert len(layers) == 300
    return one_value(entry["max_rank"] for entry in layers.values())


def read_onnx(path):
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path))
    return one_value({float(x) for each in model.graph.initializer for x in set(numpy_helper.to_array(each).flat)})


def write_onnx(value, path):
    to_onnx(Net(value, 200), path, torch.zeros(2, 200))


def all_kinds():
    yield Written("checkpoint", write_checkpoint, read_checkpoint, Net)
    yield Written("low-rank file", save_low_rank, lambda path: of_module(load_low_rank(Net(), path)), small)
    yield Written("dense safetensors", write_weights, _read_safetensors, Net)
    yield Written("plan", write_plan, read_plan_file, planned)
    yield Written("report, JSON", lambda report, path: report.to_json(path), read_report, numbered)
    yield Written("report, Markdown", lambda report, path: report.to_markdown(path), _read_markdown, numbered)
    yield Written("report, page", lambda report, path: report.to_html(path), _read_html, numbered)
    yield Written("ONNX", write_onnx, read_onnx)


def _read_safetensors(path):
    from safetensors.torch import load_file

    return one_value(torch.cat([tensor.flatten() for tensor in load_file(path).values()]).unique())


def _read_markdown(path):
    values = re.findall(r"argument\d+\W+([\d.]+)", path.read_text())
    assert len(values) == 4000
    return one_value(values)


def _read_html(path):
    text = path.read_text()
    assert text.rstrip().endswith("</html>")
    values = re.findall(r"argument\d+[^\d]+([\d.]+)", text)
    assert len(values) == 4000
    return one_value(values)


def try_writers(tally, times, seed=0, kinds=None):
    """Kill a process that writes two files over each other, in turns, at random moments."""
    rng = random.Random(seed)
    for kind in kinds or all_kinds():
        old, new = kind.prepare(1.0), kind.prepare(2.0)
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / f"file{SUFFIXES.get(kind.name, '')}"
            kind.write(old, path)
            assert kind.read(path) == 1.0
            start = time.monotonic()
            kind.write(new, path)
            seconds = time.monotonic() - start
            assert kind.read(path) == 2.0
            for _ in range(times):
                kind.write(old, path)
                moment = 0.05 + rng.uniform(0.0, 4.0) * seconds

                def write(kind=kind, values=(new, old), path=path):
                    for value in itertools.cycle(values):
                        kind.write(value, path)

                in_child(write, kill_after=moment)
                try:
                    value = kind.read(path)
                    came = {1.0: OLD, 2.0: NEW}.get(value, HALF)
                except Exception as error:
                    came, value = HALF, f"{type(error).__name__}: {error}"
                tally.add(f"killed while it writes: {kind.name}", came, f"at {moment:.3g} s of {seconds:.3g}: {value}")
                for part in path.parent.glob(".*.part"):
                    part.unlink()


SUFFIXES = {"ONNX": ".onnx", "plan": ".yaml", "checkpoint": ".ckpt"}


def try_full_disks(tally, times, seed=0, kinds=None):
    """Write one file over another on a disk that takes only so many bytes."""
    rng = random.Random(seed)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python itself has it
    for kind in kinds or all_kinds():
        old, new = kind.prepare(1.0), kind.prepare(2.0)
        for number in range(times):
            with tempfile.TemporaryDirectory() as name:
                path = Path(name) / f"file{SUFFIXES.get(kind.name, '')}"
                there = number % 4 != 3
                if there:
                    kind.write(old, path)
                size = path.stat().st_size if there else 5000
                before = path.read_bytes() if there else None
                room = rng.choice([0, 1, rng.randrange(size), int(0.99 * size)]) if there else rng.randrange(5000)
                error = None
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
                try:
                    kind.write(new, path)
                except Exception as raised:
                    error = raised
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
                message = str(error)
                if (path.read_bytes() if path.exists() else None) != before:
                    came = HALF
                elif [*path.parent.iterdir()] != ([path] if there else []):
                    came = LEFT
                elif not isinstance(error, OSError) or "\n" in message or path.name not in message:
                    came = OTHER
                else:
                    came = REFUSED
                tally.add(f"full disk: {kind.name}", came, f"{room} of {size} bytes: {type(error).__name__}: {message}")


def run(steps, writes, variants=VARIANTS):
    tally = Tally([SAME, OLD, NEW, REFUSED])
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try_runs(tally, variants, range(1, steps))
        if writes:
            try_writers(tally, writes)
            try_full_disks(tally, max(4, writes // 2))
    return tally


def main(argv=None):
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=24, help="kill at each of these steps of each variant")
    options.add_argument("--writes", type=int, default=40, help="kills while a file of each kind is written")
    options = options.parse_args(argv)
    tally = run(options.steps, options.writes)
    return finish("kills", tally, options, f"--steps {options.steps} --writes {options.writes}")


if __name__ == "__main__":
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
