"""Processes that train one model, of which one goes wrong: all end with the same bits, or soon, and say why.

    python tests/stress/processes.py --counts 2 3

In each situation something happens in one process alone: NaN, SIGKILL, an exception, other arguments, fewer batches.
What is left of every process is compared with the others', and with what DDP does in that situation by itself.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from common import Tally, finish, parser  # isort: skip  # puts the tests' own models on the path
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from models import SmallMLP, data, quiet_trainer
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from lightning_svd import FallToBudget, SVDTrainingCallback, svd_layers
from lightning_svd.ranks.importance import Spectrum
from lightning_svd.training.run import SVDTraining

SAME = "same bits in all"
NAMED = "all end in seconds, each says why"
AS_DDP = "all end in seconds, as with DDP alone"
KNOWN = "all wait, see below"
DIFFERENT, HANGS, ABORTS, UNNAMED, OTHER = "other bits", "waits in vain", "aborted", "no word of why", "another outcome"

SECONDS = 15.0  # after which a process waits in vain
BATCHES, EPOCHS = 6, 3
STEPS = BATCHES * EPOCHS
SCHEDULE = {"start": 0.3, "end": 0.8, "cuts": 4}
BETWEEN = 8  # the number of a batch between the first two of the cuts, after 8, 10, 12 and 14 steps; it is observed
ELSEWHERE = "another process"  # what those say to whom nothing happened


# ----------------------------------------------------------------------------------------------------- one process


class Net(SmallMLP):
    """With a loss in validation."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", cross_entropy(self(x), y), batch_size=len(x))


class WithUnused(Net):
    """A layer that no forward pass uses."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(16, 16)


class Other(Net):
    """A model of other layers."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(48, 40))


class OneMore(Net):
    """A layer that trains in one process only."""

    def __init__(self):
        super().__init__()
        self.hidden.requires_grad_(False)


def loader(rank, count, batches=BATCHES):
    """The share of a process in the data."""
    dataset = data(8 * BATCHES * count).dataset
    return DataLoader(Subset(dataset, range(rank, len(dataset), count)[: 8 * batches]), 8)


class At(Callback):
    """Acts at the start of a training batch."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act(trainer, pl_module, batch)


class AfterBackward(At):
    """Acts when gradients are averaged."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pass

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.step:
            self.act(trainer, pl_module, None)


class Keep(Callback):
    """A digest of all that training leaves."""

    def __init__(self):
        self.digest = hashlib.sha256()

    def see(self, tensors):
        for tensor in tensors:
            self.digest.update(tensor.detach().contiguous().numpy().tobytes())

    def on_train_end(self, trainer, pl_module):
        memory = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        factors = [p for layer in svd_layers(pl_module).values() for p in layer.form.trained]
        self.see([*pl_module.state_dict().values(), *factors, *memory])


def fit(rank, count, svd, *, net=Net, callbacks=(), arguments=None, ddp=None, batches=None, validated=False, **options):
    """Train with Lightning; what is the same in all processes, if they are."""
    torch.manual_seed(0)
    model, keep = net(), Keep()
    ours = {"target_macs": 0.4, "importance": "spectrum", "schedule": FallToBudget(**SCHEDULE)} | (arguments or {})
    callbacks = [*callbacks, *([SVDTrainingCallback(**ours)] if svd else []), keep]
    options = {"max_epochs": EPOCHS} | options
    trainer = quiet_trainer(
        callbacks=callbacks,
        devices=count,
        strategy=DDPStrategy(process_group_backend="gloo", **(ddp or {})),
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    more = [loader(rank, count)] if validated else []
    trainer.fit(model, loader(rank, count, batches or BATCHES), *more)
    keep.see(model.state_dict().values())
    return keep.digest.hexdigest()


def loop(rank, count, svd, *, batches=BATCHES, joins=False, accumulate=1, arguments=None):
    """Train in a loop of one's own, with DDP around the model."""
    dist.init_process_group("gloo", rank=rank, world_size=count)
    torch.manual_seed(0)
    keep, model = Keep(), Net()
    wrapped = {"model": DistributedDataParallel(model)}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)

    def wrap_again():
        wrapped["model"] = DistributedDataParallel(model)

    run = None
    if svd:
        ours = {"target_macs": 0.4, "importance": "spectrum", "schedule": FallToBudget(**SCHEDULE)} | (arguments or {})
        run = SVDTraining(model, optimizer, STEPS // accumulate, on_reshape=wrap_again, **ours)
    step = run.step if run else optimizer.step
    with Join([wrapped["model"]]) if joins else contextlib.nullcontext():
        for _ in range(EPOCHS):
            for number, (x, y) in enumerate(loader(rank, count, batches)):
                whole = (number + 1) % accumulate == 0
                with contextlib.nullcontext() if whole else wrapped["model"].no_sync():
                    cross_entropy(wrapped["model"](x), y).backward()
                if whole:
                    step()
                    optimizer.zero_grad()
    if run is not None:
        keep.see(p for layer in run.layers.values() for p in layer.form.trained)
        run.finish()
    keep.see(model.state_dict().values())
    return keep.digest.hexdigest()


# ----------------------------------------------------------------------------------------------- what happens in one


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def spoil_batch(trainer, pl_module, batch):
    batch[0][0, 0, 0, 0] = torch.nan


def spoil_weight(trainer, pl_module, batch):
    layer = svd_layers(pl_module).get("hidden")
    (next(layer.form.trained.__iter__()) if layer else pl_module.hidden.weight).data.view(-1)[0] = torch.nan


def spoil_gradient(trainer, pl_module, batch):
    for group in trainer.optimizers[0].param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.view(-1)[0] = torch.nan


def kill_in_cut(trainer, pl_module, batch):
    Spectrum.factors_of = kill


def kill_in_judging(trainer, pl_module, batch):
    from lightning_svd.ranks.importance import OnData

    OnData.basis = kill


def fail_svd(trainer, pl_module, batch):
    def fails(self, layers):
        raise ValueError(f"`{layers[0].svd_name}`: its singular value decomposition does not converge")

    Spectrum.factors_of = fails


def fail(*_):
    raise OSError("no such image: 7.jpg")


def fail_step(trainer, pl_module, batch):
    pl_module.training_step = fail


class PairError(Exception):
    """One that cannot be sent: what unpickles it gives one argument, and it takes two."""

    def __init__(self, layer, why):
        super().__init__(f"{layer}: {why}")


def fail_unsendable(trainer, pl_module, batch):
    def fails(self, layers):
        raise PairError("hidden", "it is cursed")

    Spectrum.factors_of = fails


def break_replay(trainer, pl_module, batch):
    """From now on the model works in training only."""
    forward = pl_module.forward

    def in_training_only(x):
        if not pl_module.training:
            raise ValueError("this batch has no labels to evaluate with")
        return forward(x)

    pl_module.forward = in_training_only


class Spoiled(Net):
    """NaN in its first weights."""

    def __init__(self):
        super().__init__()
        self.hidden.weight.data[0, 0] = torch.nan


class LogsInFirst(Net):
    """A metric that process 0 alone logs."""

    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0:
            self.log("val_acc", float(self.global_step % 2), rank_zero_only=True)


class Situation:
    """What happens in one process, and in which.

    Attributes:
        expected: The outcome that is promised.
        says: What the process says to which it happened.
        others: What those say to whom it did not, if not the same.
        where: Which one that is, "first" or "last".
        train: :func:`fit` or :func:`loop`.
        all_have: What all of them are trained with.
        one_has: What this one is trained with besides.
    """

    def __init__(self, expected, says=None, where="last", train=fit, one=None, others=ELSEWHERE, **all_have):
        self.expected, self.says, self.where, self.train, self.others = expected, says, where, train, others
        self.one_has, self.all_have = one or {}, all_have

    def work(self, rank, count, svd):
        is_it = rank == (0 if self.where == "first" else count - 1)
        given = self.all_have | (self.one_has if is_it else {})
        return self.train(rank, count, svd, **given)


def at(step, act, kind=At):
    return {"callbacks": [kind(step, act)]}


def both(prefix, *arguments, one, **more):
    """The same in the first process, which decides, and in the last."""
    return {
        f"{prefix}, in the {where}": Situation(*arguments, where=where, one=one, **more) for where in ("first", "last")
    }


BY_DATA = {"arguments": {"importance": "fisher"}}
NOT_FINITE = r"`\S+`: expected finite weights"

SITUATIONS = {
    "nothing": Situation(SAME),
    "static_graph": Situation(SAME, ddp={"static_graph": True}),
    "find_unused_parameters, a layer unused": Situation(SAME, ddp={"find_unused_parameters": True}, net=WithUnused),
    "gradient_as_bucket_view": Situation(SAME, ddp={"gradient_as_bucket_view": True}),
    "accumulate_grad_batches=4": Situation(SAME, accumulate_grad_batches=4),
    'importance="fisher"': Situation(SAME, **BY_DATA),
    "a loop": Situation(SAME, train=loop),
    "a loop, no_sync": Situation(SAME, train=loop, accumulate=2),
    **both("NaN in a batch", NAMED, NOT_FINITE, one=at(4, spoil_batch)),
    **both("NaN in a batch after the last cut", SAME, None, one=at(STEPS - 1, spoil_batch)),
    **both("NaN in gradients", NAMED, NOT_FINITE, one=at(4, spoil_gradient, AfterBackward)),
    **both("NaN in a weight", NAMED, NOT_FINITE, one=at(BETWEEN, spoil_weight)),
    **both("NaN in a weight, by data", NAMED, NOT_FINITE, one=at(BETWEEN, spoil_weight), **BY_DATA),
    "NaN in a weight before the fit, in the first": Situation(NAMED, NOT_FINITE, where="first", one={"net": Spoiled}),
    "NaN in a weight before the fit, in the last": Situation(SAME, one={"net": Spoiled}),
    **both("killed between cuts", AS_DDP, None, one=at(6, kill)),
    **both("killed in a cut", NAMED, None, one=at(BETWEEN, kill_in_cut)),
    **both("killed in an observed batch", AS_DDP, None, one=at(BETWEEN, kill), **BY_DATA),
    **both("killed while ranks are judged", NAMED, None, one=at(BETWEEN, kill_in_judging), **BY_DATA),
    **both("an exception in training_step", AS_DDP, "no such image", one=at(BETWEEN, fail_step)),
    **both("an exception in the first training_step", NAMED, "no such image", one=at(0, fail_step)),
    **both("an exception in an observed training_step", AS_DDP, "no such image", one=at(BETWEEN, fail_step), **BY_DATA),
    **both("an SVD that fails", NAMED, "does not converge", one=at(BETWEEN, fail_svd)),
    **both("an exception in a cut that cannot be sent", NAMED, "it is cursed", one=at(BETWEEN, fail_unsendable)),
    **both("the pass that is run again fails", NAMED, "no labels", one=at(BETWEEN - 1, break_replay), **BY_DATA),
    **both("other layers are left out", NAMED, "exclude_modules", one={"arguments": {"exclude_modules": ["hidden"]}}),
    **both("another schedule", NAMED, "schedule", one={"arguments": {"schedule": FallToBudget(cuts=2)}}),
    **both("another budget", NAMED, "target_macs", one={"arguments": {"target_macs": 0.5}}),
    **both("an argument that is refused", NAMED, "no_such", one={"arguments": {"target_modules": ["no_such"]}}),
    **both("layers of other names", NAMED, "must be the same", one={"net": Other}),
    **both("a layer that is frozen", AS_DDP, None, one={"net": OneMore}),
    "a metric of process 0 alone": Situation(
        SAME, net=LogsInFirst, validated=True,
        arguments={"monitor": "val_acc", "mode": "max", "max_metric_drop": 0.5},
    ),
    **both("fewer batches", AS_DDP, None, one={"batches": BATCHES - 1}),
    **both("fewer batches, max_steps", SAME, None, one={"batches": BATCHES - 1}, max_steps=STEPS, max_epochs=-1),
    **both("fewer batches, limit_train_batches", SAME, None, one={"batches": BATCHES - 1}, limit_train_batches=4),
    **both("fewer batches, a loop", AS_DDP, None, one={"batches": BATCHES - 1}, train=loop),
    **both(
        "fewer batches, a loop in Join, before a cut", NAMED, "Join", one={"batches": 1}, train=loop, joins=True,
        others="by peer",
    ),
    **both(
        "fewer batches, a loop in Join, before a cut, by data", NAMED, "Join", one={"batches": 1}, train=loop,
        joins=True, others="by peer", **BY_DATA,
    ),
    **both("fewer batches, a loop in Join, after a cut", KNOWN, None, one={"batches": 5}, train=loop, joins=True),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- together


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(work, rank, count, port, path):
    """A process that does its part and writes down how it ended."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        surroundings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0}
        os.environ.update({key: str(value) for key, value in surroundings.items()} | {"WORLD_SIZE": str(count)})
        with open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 2)
            os.dup2(nothing.fileno(), 1)
        warnings.simplefilter("ignore")
        try:
            outcome = {"end": work(rank, count)}
        except BaseException as error:
            outcome = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        path.write_text(json.dumps(outcome))
        code = 0
    finally:
        os._exit(code)


def together(work, count, seconds=SECONDS):
    """Have so many processes do something; how each of them ended, and how long the last one took."""
    with tempfile.TemporaryDirectory() as name:
        paths = [Path(name) / str(rank) for rank in range(count)]
        port, began = free_port(), time.monotonic()
        alive = {started(work, rank, count, port, path): rank for rank, path in enumerate(paths)}
        ends = [{} for _ in range(count)]
        while alive and time.monotonic() - began < seconds:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child in alive:
                code = os.waitstatus_to_exitcode(status)
                rank = alive.pop(child)
                ends[rank] = {"signal": -code} if code else json.loads(paths[rank].read_text())
            else:
                time.sleep(0.02)
        took = time.monotonic() - began
        for child, rank in alive.items():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            ends[rank] = {"waits": True}
    return ends, took


def kinds(ends):
    return sorted(next(iter(end)) for end in ends)


def judged(situation, ends, alone):
    """Which outcome this is; ``alone()`` is how DDP ends by itself, which is tried where the outcome goes by it."""
    waits = [end for end in ends if "waits" in end]
    signals = [end["signal"] for end in ends if "signal" in end and end["signal"] != signal.SIGKILL]
    errors = [end["error"] for end in ends if "error" in end]
    digests = {end["end"] for end in ends if "end" in end}
    if waits:
        return KNOWN if situation.expected == KNOWN else HANGS
    if signals:
        return ABORTS
    if digests and not errors:
        return SAME if len(digests) == 1 and kinds(ends) == ["end"] * len(ends) else DIFFERENT
    says = situation.says or ELSEWHERE
    ours = [error for error in errors if situation.others in error or re.search(says, error)]
    if situation.says and not any(re.search(says, error) for error in errors):
        return UNNAMED
    if digests:
        return AS_DDP if kinds(alone()) == kinds(ends) else OTHER
    if len(ours) == len(errors):
        return NAMED
    return AS_DDP if kinds(alone()) == kinds(ends) else UNNAMED


def run(counts=(2, 3), names=SITUATIONS, seconds=SECONDS):
    tally = Tally([SAME, NAMED, AS_DDP, KNOWN])
    for name in names:
        situation = SITUATIONS[name]
        for count in counts:

            @functools.cache
            def alone(it=situation, count=count):
                return together(lambda rank, of: it.work(rank, of, False), count, seconds)[0]

            ends, took = together(lambda rank, of, it=situation: it.work(rank, of, True), count, seconds)
            came = judged(situation, ends, alone)
            detail = f"{count} processes, {took:.0f} s: {[short(end) for end in ends]}"
            if came != situation.expected or os.environ.get("SHOW"):
                detail += f"; alone {[short(end) for end in alone()]}"
            if os.environ.get("SHOW"):
                print(f"{name}: {came}: {detail}", file=sys.stderr, flush=True)
                if os.environ["SHOW"] == "2":
                    print("\n".join(end.get("traceback", "") for end in ends), file=sys.stderr, flush=True)
            tally.add(name, came if came == situation.expected else f"{came}, not {situation.expected}", detail)
    return tally


def short(end):
    (kind, what), *_ = end.items()
    return f"{kind} {str(what)[:8] if kind == 'end' else ' '.join(str(what).split())[:230]}"


def main(argv=None):
    options = parser(__doc__)
    options.add_argument("--counts", type=int, nargs="+", default=[2, 3], help="how many processes")
    options.add_argument("--only", default="", help="only situations whose name has this in it")
    options = options.parse_args(argv)
    torch.set_num_threads(1)
    tally = run(options.counts, [name for name in SITUATIONS if options.only in name])
    return finish("processes", tally, options, f"--counts {' '.join(map(str, options.counts))}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
