"""Damaged files, each given to every reader: refused in a line that names it, with the model as it was, or read whole.

    python tests/stress/damage.py --each 300

Bytes are cut off, changed, zeroed and added; entries are taken out, added, and given values of other kinds, shapes,
dtypes and versions; and there are files of other models, of other kinds and with code in them.
"""

import contextlib
import copy
import inspect
import io
import json
import pickle
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from common import Tally, finish, parser  # isort: skip  # puts the tests' own models on the path
import lightning.pytorch
import models
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from models import ValidatedNet, data, quiet_trainer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_svd import FallToBudget, SVDTrainingCallback, load_low_rank, read_plan, save_low_rank
from lightning_svd.cli import main as command
from lightning_svd.model.plan import plan, write_plan

REFUSED, READ = "refused in one line, model as it was", "read whole"
CHANGED, OTHER, LINES, UNNAMED, HANGS = (
    "model changed",
    "another exception",
    "several lines",
    "file not named",
    "took more than 30 s",
)
JUNK, RAN = "junk accepted", "code ran"
STEPS = 16
# `Trainer.fit` itself reads its `ckpt_path`, before 2.6 with `weights_only=False`.
LIGHTNING_UNPICKLES = "weights_only" not in inspect.signature(lightning.pytorch.Trainer.fit).parameters


class Trap:
    """Sets a flag when it is unpickled."""

    sprung = False

    def __reduce__(self):
        return setattr, (Trap, "sprung", True)


# ---------------------------------------------------------------------------------------------- files as they should be


def callback(**arguments):
    return SVDTrainingCallback(target_macs=0.4, schedule=FallToBudget(start=0.4, end=0.7, cuts=3), **arguments)


def fit(model, *callbacks, ckpt_path=None, **arguments):
    writes = bool(callbacks)
    trainer = quiet_trainer(callbacks=[callback(**arguments), *callbacks], enable_checkpointing=writes, max_epochs=2)
    trainer.fit(model, data(), data(16), ckpt_path=ckpt_path)
    return model


def net():
    torch.manual_seed(1)
    return ValidatedNet(momentum=0.9)


def originals(folder):
    """What is going to be damaged, by name."""
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    small = fit(net(), every)
    save_low_rank(small, folder / "small.safetensors")
    fit(net(), ModelCheckpoint(folder, "dense-{step}", every_n_train_steps=3, save_top_k=-1), full_rank_as="dense")
    torch.save({"epoch": 3, "model": net().state_dict()}, folder / "foreign.pt")
    save_file(net().state_dict(), folder / "foreign.safetensors")
    write_plan(plan(net()), folder / "plan.yaml")
    return {
        "checkpoint at full rank": folder / "step=3.ckpt",
        "checkpoint between cuts": folder / "step=9.ckpt",
        "checkpoint after the last cut": folder / "step=14.ckpt",
        "checkpoint before the first cut, dense": folder / "dense-step=3.ckpt",
        "low-rank file": folder / "small.safetensors",
        "file of `torch.save`": folder / "foreign.pt",
        "file of safetensors": folder / "foreign.safetensors",
        "plan": folder / "plan.yaml",
    }


# -------------------------------------------------------------------------------------------------------------- damages


def damaged_bytes(content, rng):
    """Bytes that differ, and how."""
    size, way = len(content), rng.randrange(7)
    at = rng.choice([rng.randrange(size), rng.randrange(min(size, 400)), size - 1 - rng.randrange(min(size, 400))])
    if way <= 1:
        return content[: rng.choice([at, 0, 1, 8, size - 1])], "cut off"
    if way <= 3:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :], "a bit"
    if way == 4:
        length = rng.choice([1, 16, 200])
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :], "zeroed"
    if way == 5:
        return content[:at] + bytes(rng.randrange(256) for _ in range(8)) + content[at:], "added"
    length = rng.choice([1, 7, 64])
    return content[:at] + content[at + length :], "taken out"


def of_another_kind(path, rng):
    """A file that is none, or one of something else."""
    way = rng.choice(["empty", "folder", "text", "noise", "zip", "list", "pickle", "trap", "script", "number", "json"])
    if way == "folder":
        path.mkdir()
    elif way == "list":
        torch.save([torch.zeros(2)], path)
    elif way == "trap":
        torch.save({"state_dict": net().state_dict(), "trap": Trap()}, path)
    elif way == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(path))
    elif way == "number":
        torch.save(3, path)
    else:
        contents = {
            "empty": b"",
            "text": "Ceci n'est pas un modèle\n".encode() * 20,
            "noise": rng.randbytes(3000),
            "zip": b"PK\x03\x04" + bytes(100),
            "pickle": pickle.dumps({"state_dict": Trap()}),
            "json": json.dumps({"layers": {"a": 1}}).encode(),
        }
        path.write_bytes(contents[way])
    return way


def places(node, depth=0, at=()):
    """Where in nested dicts and lists there is something, outermost first."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*at, key)
        if depth < 6:
            yield from places(value, depth + 1, (*at, key))


def junk_for(value, rng, with_shapes=True):
    """A value of another kind than this one."""
    if isinstance(value, torch.Tensor):
        shaped = [value[..., :-1].clone()] if with_shapes and value.ndim and value.shape[-1] > 1 else []
        spoiled = [torch.full_like(value, torch.nan)] if value.is_floating_point() else []
        return rng.choice(
            [None, "x", value.to(torch.int32 if value.is_floating_point() else torch.float32), *shaped, *spoiled]
        )
    other = [None, "x", -1, 1e30, float("nan"), 10**30, [1], {"a": 1}, torch.zeros(2), True]
    return rng.choice([each for each in other if type(each) is not type(value)])


def damaged_contents(contents, rng, roots):
    """A copy with an entry of another kind, taken out, or too many; where, and which it was."""
    contents = copy.deepcopy(contents)
    root = contents
    start = rng.choice(roots)
    for key in start:
        root = root[key]
    where = rng.choice([at for at in places(root) if is_promised((*start, *at))])
    node = root
    for key in where[:-1]:
        node = node[key]
    way = rng.choice(["another", "another", "another", "missing", "extra"])
    if way == "another" or isinstance(node, list):
        node[where[-1]] = junk_for(node[where[-1]], rng, start != ("optimizer_states",))
        way = f"another ({type(node[where[-1]]).__name__})"
    elif way == "missing":
        del node[where[-1]]
    else:
        node["extra"] = rng.choice([3, None, torch.zeros(3)])
    return contents, (*start, *where), way


def is_promised(at):
    """Whether what lies there is checked: not what Lightning counts, nor the numbers that an optimizer was given."""
    if at[0] in ("loops", "lr_schedulers"):
        return len(at) == 1
    if at[0] == "optimizer_states" and "param_groups" in at:
        return at[-1] == "params" or len(at) <= 4
    return True


STATE = ("callbacks", "SVDTrainingCallback")
ROOTS = [STATE, STATE, STATE, ("state_dict",), (*STATE, "layers"), (*STATE, "layers"), ("optimizer_states",), ()]


def damage(path, target, rng):
    """Write a damaged copy of a file; what was done."""
    if rng.random() < 0.12:
        return of_another_kind(target, rng), "kind"
    if path.suffix == ".ckpt" and rng.random() < 0.65:
        contents, where, way = damaged_contents(torch.load(path, weights_only=True), rng, ROOTS)
        torch.save(contents, target)
        return f"{way} at {'.'.join(map(str, where))}", where
    if path.suffix == ".pt" and rng.random() < 0.5:
        contents, where, way = damaged_contents(torch.load(path, weights_only=True), rng, [("model",)])
        torch.save(contents, target)
        return f"{way} at {'.'.join(map(str, where))}", where
    if path.suffix == ".safetensors" and rng.random() < 0.5:
        return damaged_safetensors(path, target, rng), "tensors"
    if path.suffix == ".yaml" and rng.random() < 0.6:
        return damaged_plan(path, target, rng), "plan"
    content, way = damaged_bytes(path.read_bytes(), rng)
    target.write_bytes(content)
    return way, "bytes"


def damaged_safetensors(path, target, rng):
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = rng.choice(sorted(tensors))
    way = rng.choice(["missing", "extra", "nan", "shape", "dtype", "renamed", "header"])
    if way == "header" and metadata:
        header = json.loads(metadata["lightning_svd"])
        header, where, _ = damaged_contents(header, rng, [()])
        way = f"header at {where}"
        metadata = {"lightning_svd": json.dumps(header, default=str)}
    elif way == "missing":
        del tensors[name]
    elif way == "extra":
        tensors["extra"] = torch.zeros(3)
    elif way == "renamed":
        tensors[f"{name}x"] = tensors.pop(name)
    elif way == "nan":
        name = rng.choice([name for name, value in tensors.items() if value.is_floating_point()])
        tensors[name] = tensors[name] * torch.nan
    elif way == "shape":
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    else:
        value = tensors[name]
        tensors[name] = value.to(torch.int32) if value.is_floating_point() else value.to(torch.float32)
        way = "dtype"
    save_file(tensors, target, metadata)
    return f"{way} of {name}"


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
PLANS = {
    "aliases": BOMB + "layers: {head: {skip: *i}}\n",
    "aliases of entries": "layers:\n  head: &a {kind: Linear}\n  hidden: *a\n",
    "itself": "layers: &a {head: *a}\n",
    "deep": "layers: " + "[" * 20_000 + "]" * 20_000,
    "deep blocks": "layers:\n" + "".join(" " * n + "a:\n" for n in range(1, 900)),
    "numbers for names": "layers: {0: {}, head: {}}\n",
    "twice": "layers:\n  head: {}\n  head: {skip: no}\n",
    "tag": "layers: !!python/object/apply:os.system ['true']\n",
    "two documents": "layers: {}\n---\nlayers: {}\n",
    "no layers": "layer: {}\n",
    "a list": "- 1\n",
    "null": "layers:\n",
    "tabs": "layers:\n\thead: {}\n",
}
FIELDS = ["kind", "weight", "skip", "conv_mode", "max_rank", "matrix", "colour"]


def damaged_plan(path, target, rng):
    import yaml

    if rng.random() < 0.35:
        way = rng.choice(sorted(PLANS))
        target.write_text(PLANS[way], encoding="utf-8")
        return way
    content = yaml.safe_load(path.read_text())
    entry = content["layers"][rng.choice(sorted(content["layers"]))]
    field = rng.choice(["weight", "skip", "conv_mode", "max_rank", "colour"])
    values = [-1, 0, "x", 2.5, float("nan"), [1], {"a": [1]}, True, 10**30, "two\nlines", [[1] * 50] * 50]
    valid = {"skip": (str, bool), "max_rank": ()}.get(field, ())
    entry[field] = rng.choice([value for value in values if not (isinstance(value, valid) if valid else False)])
    target.write_text(yaml.safe_dump(content), encoding="utf-8")
    return f"{field}: {entry[field]!r:.60}"


# -------------------------------------------------------------------------------------------------------------- readers


def bits(model):
    return {name: (id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()}, copy.deepcopy(
        model.state_dict()
    )


def same(before, model):
    parameters, state = before
    now = model.state_dict()
    return (
        parameters == bits(model)[0]
        and state.keys() == now.keys()
        and all(torch.equal(state[k], now[k]) for k in state)
    )


class TooLongError(BaseException):
    """The alarm."""


def ring(*_):
    raise TooLongError


def finite(model):
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def outcome(read, path, model):
    """What a reader made of a file, and what it said."""
    before = bits(model)
    signal.setitimer(signal.ITIMER_REAL, 30.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(model, path)
    except TooLongError:
        return HANGS, ""
    except SystemExit as error:
        came, message = (None, str(error)) if isinstance(error.code, str) else (OTHER, f"exit {error.code}")
    except (ValueError, OSError) as error:
        came, message = None, str(error)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        came, message = OTHER, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
    else:
        return (READ if finite(model) else JUNK), "NaN in the model"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    if Trap.sprung:
        Trap.sprung = False
        return RAN, message
    if not same(before, model):
        return CHANGED, message
    if came:
        return came, message
    if "\n" in message or len(message) > 1200:
        return LINES, message
    return (REFUSED if path.name in message else UNNAMED), message


def resume(model, path):
    fit(model, ckpt_path=str(path))


def test(model, path):
    quiet_trainer(callbacks=[callback()]).test(model, data(16), ckpt_path=str(path), verbose=False)


MODEL = f"{models.__file__}:ValidatedNet"


def by_command(*arguments):
    """A reader that is the command; the model is its own."""

    def read(model, path):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            filled = [str(each).replace("OUT", f"{folder}/out.safetensors") for each in arguments]
            command([filled[0], str(path), *filled[1:]])

    return read


DATA = f"{__file__}:batches"


def batches():
    return [next(iter(data()))[0]]


COMMANDS = {
    "`inspect`": by_command("inspect"),
    "`inspect --model`": by_command("inspect", "--model", MODEL),
    "`convert`": by_command("convert", "--model", MODEL, "--to", "dense", "--out", "OUT"),
    "`compress`": by_command(
        "compress", "--model", MODEL, "--data", DATA, "--to", "factored", "--out", "OUT", "--inputs", "8",
        "--importance", "spectrum",
    ),
}  # fmt: skip
OF_CHECKPOINTS = {"`fit(ckpt_path=)`": resume, "`load_low_rank`": load_low_rank}
READERS = {
    "checkpoint at full rank": OF_CHECKPOINTS | COMMANDS,
    "checkpoint between cuts": OF_CHECKPOINTS | {"`convert`": COMMANDS["`convert`"]},
    "checkpoint after the last cut": OF_CHECKPOINTS | {"`inspect`": COMMANDS["`inspect`"]},
    "checkpoint before the first cut, dense": OF_CHECKPOINTS,
    "low-rank file": {"`load_low_rank`": load_low_rank} | COMMANDS,
    "file of `torch.save`": COMMANDS,
    "file of safetensors": COMMANDS,
    "plan": {"`read_plan`": lambda model, path: read_plan(path, model)},
}


def must_be_refused(where, how):
    """Whether an entry was damaged that no reader of the weights can do without."""
    return (
        isinstance(where, tuple)
        and "layers" in where
        and "another" in how
        and where[-1] in ("U", "s", "V", "A", "B", "W")
    )


def run(each, seed=0):
    """Damage every file so many times, and give it to its readers."""
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, ring)
    tally = Tally([REFUSED, READ])
    files = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stderr(io.StringIO()):
            written = originals(folder)
        for kind, path in written.items():
            for reader, read in READERS[kind].items():
                came, message = outcome(read, path, net())
                # The file as it is: whoever refuses all would pass otherwise.
                if came != READ and not (kind == "low-rank file" and reader == "`inspect`"):
                    tally.add(f"{kind}, {reader}", "refuses the file as it was written", message)
            for number in range(each):
                target = folder / f"damaged{number}{path.suffix}"
                how, where = damage(path, target, rng)
                files += 1
                for reader, read in READERS[kind].items():
                    if reader.startswith(("`compress", "`inspect --model")) and number % 4:
                        continue  # they read as `convert` does
                    came, message = outcome(read, target, net())
                    if came == RAN and read is resume and LIGHTNING_UNPICKLES:
                        continue
                    if came == READ and (must_be_refused(where, how) and not reader.startswith("`inspect`")):
                        came, message = JUNK, ""
                    tally.add(f"{kind}, {reader}", came, f"{how}: {message[:400]}")
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink()
    return tally, files


def main(argv=None):
    options = parser(__doc__)
    options.add_argument("--each", type=int, default=300, help="damaged copies of each of the files")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args(argv)
    torch.set_num_threads(1)
    tally, files = run(options.each, options.seed)
    print(f"{files} damaged files")
    return finish("damage", tally, options, f"--each {options.each}")


if __name__ == "__main__":
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sys.exit(main())
