"""Runs in several processes with sharded parameters that are killed, at each step: they go on to the same bits.

    python tests/stress/sharded_kills.py

All processes are killed (SIGKILL) at the start of a step; as many others go on from the last checkpoint, and what each
of them ends with is compared with a run that was never stopped: its rows of the factors and of what the optimizer
remembers, the dense weights, the report and the small model, bit for bit. Then runs of 100 steps are compared with
those of one process.
"""

import contextlib
import io
import os
import signal
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

from common import Tally, finish, parser  # isort: skip  # puts the tests' own models on the path
import test_resume
import test_sharded as runs
import torch
from kills import equal
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.multiprocessing import ProcessExitedException

from lightning_svd.layers.shards import reshard

SAME, ROUNDING = "same bits in each process", "as in one process, to rounding"
DIFFERENT, OTHER = "other bits", "another outcome"
STEPS = 16
# How many processes, whether they share rows evenly, and whether a checkpoint is a folder of shards.
VARIANTS = {
    f"{count} processes, {'even' if even else 'uneven'} shards, {'folders' if in_folders else 'files'}": (
        count,
        even,
        in_folders,
    )
    for count in (2, 4)
    for even in (True, False)
    for in_folders in (True, False)
}


class Keep(Callback):
    """Keeps what a process has at the end of training."""

    def on_train_end(self, trainer, pl_module):
        reshard(pl_module)
        here = {name: runs.rows(p).detach().clone() for name, p in pl_module.named_parameters()}
        state = trainer.optimizers[0].state
        named = {id(p): name for name, p in pl_module.named_parameters()}
        memory = {named[id(p)]: {key: runs.rows(value) for key, value in of.items()} for p, of in state.items() if of}
        # What is never looked at again is zero, or not there: s of a layer that trains as a pair.
        memory = {name: of for name, of in memory.items() if any(value.any() for value in of.values() if value.ndim)}
        dense = {name: runs.whole(value).clone() for name, value in pl_module.state_dict().items()}
        self.end = {"here": here, "memory": memory, "dense": dense}


def fit(variant, *callbacks, ckpt_path=None):
    """One run; what a process has at its end."""
    _, even, in_folders = VARIANTS[variant]
    keep, ours = Keep(), runs.svd_callback()
    model = runs.ByNumber(even=even)
    writes = {"enable_checkpointing": any(isinstance(each, ModelCheckpoint) for each in callbacks)}
    runs.fit(model, ours, keep, *callbacks, ckpt_path=ckpt_path, in_folders=in_folders, **writes)
    with torch.device("meta"):
        plain = runs.net(even)
    small = runs.gather_factored(model.net, plain)
    final = {} if small is None else small.state_dict()
    return keep.end | {"report": str(ours.report), "small": final}


def every_step(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


def last_of(folder):
    return max(folder.iterdir(), key=lambda path: int(path.stem.partition("=")[2]))


def fit_until(variant, step, folder):
    kill = test_resume.At(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return fit(variant, kill, every_step(folder / "saved"))


def unbroken_and_resumed(variant, saved, _):
    return fit(variant), {step: fit(variant, ckpt_path=path) for step, path in saved.items()}


def killed_at(variant, step, folder):
    """Train in several processes that are all killed at the start of this step; how that ended, if in another way."""
    try:
        runs.in_processes(VARIANTS[variant][0], partial(fit_until, variant, step), folder)
    except ProcessExitedException as error:
        return None if error.signal_name in ("SIGKILL", "SIGTERM") else str(error)
    except Exception as error:  # a process that noticed first that another is gone
        return None if "Connection" in str(error) else f"{type(error).__name__}: {error}"
    return "it was not killed"


def try_kills(tally, variants, steps):
    for variant in variants:
        count = VARIANTS[variant][0]
        with tempfile.TemporaryDirectory() as name:
            root, saved = Path(name), {}
            for step in steps:
                folder = root / str(step)
                folder.mkdir()
                if went := killed_at(variant, step, folder):
                    tally.add(variant, OTHER, f"step {step}: {went}")
                else:
                    saved[step] = last_of(folder / "saved")

            try:
                each = runs.in_processes(count, partial(unbroken_and_resumed, variant, saved), root)
            except Exception as error:
                tally.add(variant, OTHER, f"{type(error).__name__}: {error}")
                continue
            for step in saved:
                differs = None
                for expected, resumed in each:
                    differs = differs or equal(resumed[step], expected)
                tally.add(variant, SAME if differs is None else DIFFERENT, f"step {step}: {differs}")


def try_long_runs(tally, variants):
    """100 steps, against those of one process."""
    for count, even in variants:
        what = f"100 steps, {count} processes, {'even' if even else 'uneven'} shards"
        with tempfile.TemporaryDirectory() as name:
            try:
                off, phases = runs.long_run(count, even, Path(name))
            except Exception as error:
                tally.add(what, OTHER, f"{type(error).__name__}: {error}")
                continue
            fits = off <= runs.LONG_ROUNDING and phases == 3
            tally.add(what, ROUNDING if fits else DIFFERENT, f"{off} in {phases} phases")


def run(steps, variants=VARIANTS, long_runs=()):
    tally = Tally([SAME, ROUNDING])
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        try_kills(tally, variants, steps)
        try_long_runs(tally, long_runs)
    return tally


def main(argv=None):
    options = parser(__doc__).parse_args(argv)
    tally = run(range(1, STEPS), long_runs=[(count, even) for count in (2, 4) for even in (True, False)])
    return finish("sharded_kills", tally, options)


if __name__ == "__main__":
    import logging

    for name in ("lightning.pytorch", "lightning.fabric", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(main())
