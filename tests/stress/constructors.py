"""Malformed configurations, at random: each is refused where it is written, in a line that names the argument.

    python tests/stress/constructors.py --malformed 1000 --valid 400

What is valid is said here a second time, by values and not by the checks of the package: a configuration is made of
valid values, and a malformed one has some replaced by junk of the argument's kind, or a pair that contradicts itself.
"""

import decimal
import fractions
import math
import random
import signal
import sys

from common import Tally, finish, parser  # isort: skip  # puts the tests' own models on the path
import numpy as np
import torch
from torch import nn

from lightning_svd import (
    Alternating,
    Distillation,
    FallToBudget,
    Finetune,
    Fisher,
    GrowAndPrune,
    Nested,
    Outputs,
    Regularizer,
    SVDTrainingCallback,
    Timing,
    compress,
)

REFUSED, ACCEPTED = "refused, naming the argument", "accepted"
LINES, UNNAMED, OTHER, HANGS = "several lines", "argument not named", "another exception", "took more than 5 s"
ABSENT = object()


class Nasty:
    """An object that cannot even be shown."""

    def __repr__(self):
        raise RuntimeError("no\nword")


# ------------------------------------------------------------------------------------------- kinds of arguments

NAN, INF = math.nan, math.inf
ANYTHING = [
    (),
    (0.5,),
    [],
    [1, "a"],
    {},
    {"a": 1},
    {1, 2},
    b"hoyer",
    object(),
    Nasty(),
    lambda: 1,
    1j,
    decimal.Decimal("0.5"),
    fractions.Fraction(1, 2),
    torch.tensor(0.5),
    torch.tensor([0.5, 0.25]),
    torch.ones(40, 3),
    np.float32(0.5),
    np.array(0.5),
    np.arange(60).reshape(20, 3),
    np.array(["hoyer", "l1"]),
    np.bool_(True),
    nn.Linear(2, 2),
    int,
    "x" * 5000,
    "two\nlines",
]
WORDS = ["", " ", "0.5", "3", "True", "none", "None", "nan", "hoyer ", "LINEAR", "unknown", "é", "factorised"]
NUMBERS = [-1, -0.1, -INF, INF, NAN, -(10**30), 10**400, -(10**400), 10**5000, np.float64("nan")]
BOOLS = [True, False]
NO_NUMBERS = [*ANYTHING, *WORDS, *BOOLS]


class Kind:
    """Values that an argument may have, and values that are junk for it."""

    def __init__(self, valid, junk, optional=False):
        self.valid = [*valid, *([ABSENT, None] if optional else [ABSENT])]
        self.junk = [*junk, *([] if optional else [None])]


def share(zero=False, optional=False):
    valid = [1, 1.0, 0.5, 1e-6, np.float64(0.25), *([0, 0.0] if zero else [])]
    return Kind(valid, [*NUMBERS, *NO_NUMBERS, 1.0001, 2, 35, 1e300, *([] if zero else [0, 0.0, -0.0])], optional)


def weight(zero=True, optional=False):
    valid = [1, 0.5, 1e-12, 1e6, 10**18, np.float64(2), *([0, 0.0] if zero else [])]
    return Kind(valid, [*NUMBERS, *NO_NUMBERS, *([] if zero else [0, 0.0])], optional)


def count(least=1, optional=False, most=10**9):
    floats = [1.0, 2.5, 1e30, np.int64(3), np.float64(3.0)]
    junk = [*NUMBERS, *NO_NUMBERS, *floats, least - 1, 2**63, 10**30, most + 2**31]
    return Kind([least, least + 1, 100], junk, optional)


def choice(*names, others=(), optional=False):
    # A word of this list that is one of the names would be no junk.
    junk = [
        *ANYTHING,
        *NUMBERS,
        *BOOLS,
        *(word for word in WORDS if word not in names),
        0,
        1,
        list(names),
        names[0].upper(),
    ]
    return Kind([*names, *others], junk, optional)


def flag(optional=False):
    junk = [*ANYTHING, *WORDS, *NUMBERS, 0, 1, "no", "false", "yes", np.bool_(False), torch.tensor(True)]
    return Kind(BOOLS, junk, optional)


TARGETS = Kind(
    ["Linear", "all-linear", ["a", "b.c"], ("Conv2d",), r"blocks\.\d+\.fc", []],
    [
        *(
            value
            for value in ANYTHING
            if not isinstance(value, str) and not (isinstance(value, (list, tuple)) and not value)
        ),
        *NUMBERS,
        *BOOLS,
        "",
        " ",
        ["a", 1],
        ["a", ""],
        [None],
        ("a", ("b",)),
        {"a"},
        [b"a"],
    ],
    optional=True,
)
PATTERN = Kind(
    [{"a": 3}, {"Linear": 100, r"b\.\d": 100}, {}],
    [
        *(value for value in ANYTHING if not isinstance(value, dict)),
        *WORDS,
        *NUMBERS,
        *BOOLS,
        {None: 3},
        {1: 3},
        {"": 3},
        {"a": 0},
        {"a": -2},
        {"a": 2.0},
        {"a": "3"},
        {"a": True},
        {"a": None},
        {"a": torch.tensor(3)},
        {"a": 10**30},
        {("a",): 3},
        {"two\nlines": 0},
        [("a", 3)],
    ],
    optional=True,
)
PATH = Kind(
    ["plan.yaml"],
    [*(value for value in ANYTHING if not isinstance(value, str)), *NUMBERS, *BOOLS, "", " ", 5],
    optional=True,
)
NAME = Kind(["val_loss"], [*(v for v in ANYTHING if not isinstance(v, str)), *NUMBERS, *BOOLS, "", " "], optional=True)
WHERE = Kind(["", "backbone", "a.b"], [*(v for v in ANYTHING if not isinstance(v, str)), *NUMBERS, *BOOLS])
DIM = Kind([-1, 1, 0, -3], [*NUMBERS[1:], *NO_NUMBERS, 1.0, 2**40, -(2**40), np.int64(1)])

LAYERS = {
    "target_modules": TARGETS,
    "exclude_modules": TARGETS,
    "conv_mode": choice("channel", "spatial", "auto"),
    "rank_pattern": PATTERN,
    "min_rank": Kind([1, 2, 3], count().junk),
    "round_to": Kind([1, 8, 100, "auto"], count().junk),
}
OF_CALLBACK = LAYERS | {
    "plan_file": PATH,
    "target_macs": share(optional=True),
    "target_params": share(optional=True),
    "target_latency": share(optional=True),
    "latency_table": Kind([*PATH.valid, Timing(batch_size=1)], [junk for junk in PATH.junk if junk is not None]),
    "energy_threshold": share(optional=True),
    "schedule": choice(
        *("fall", "finetune", "alternating", "grow_and_prune", "nested"),
        others=[FallToBudget(cuts=3), Finetune(), Alternating()],
    ),
    "full_rank_as": choice("auto", "svd", "dense"),
    "importance": choice("auto", "spectrum", "outputs", "fisher", others=[Fisher(), Outputs(3)]),
    "regularizer": choice("hoyer", "hoyer_square", "l1", "group_lasso", others=[Regularizer()], optional=True),
    "measure_latency": flag(),
    "final": choice("factored", "dense", "decomposed"),
    "distill": Kind([True, False, Distillation(temperature=2.0)], [*flag().junk, Distillation, "logits"]),
    "monitor": NAME,
    "mode": choice("min", "max", optional=True),
    "max_metric_drop": weight(optional=True),
    "log_every_n_steps": count(optional=True),
    "log_spectrum_every_n_epochs": count(least=0),
}
OF_SCHEDULE = {
    "start": share(zero=True),
    "end": share(),
    "shape": choice("constant", "linear", "cosine", "cubic"),
    "cuts": count(most=10**6),
    "ramp": choice("constant", "linear", "cosine", "cubic", optional=True),
}
RAMP = OF_SCHEDULE["ramp"]
OF_ALTERNATING = {
    "start": Kind([0.0, 0.1], share(zero=True).junk),
    "end": Kind([0.85, 1.0], share().junk),
    "last_full": Kind([0.05, 0.3], share().junk),
    "cycles": count(most=10**6),
    "ramp": RAMP,
}
OF_GROW_AND_PRUNE = OF_SCHEDULE | {
    "start": Kind([0.0, 0.3], share(zero=True).junk),
    "grow": Kind([0.3, 0.5], share().junk),
    "end": Kind([0.5, 1.0], share().junk),
    "groups": count(most=1000),
    "rounds": count(most=1000),
}
OF_NESTED = {
    "budgets": count(most=1000),
    "share": share(zero=True),
    "start": share(zero=True),
    "cuts": count(most=10**6),
    "distill": OF_CALLBACK["distill"],
    "ramp": RAMP,
    "seed": count(least=0),
}
OF_COMPRESS = {name: kind for name, kind in LAYERS.items() if name not in ("min_rank", "round_to")} | {
    "min_rank": Kind([1], count().junk),
    "round_to": Kind([1, 2], count().junk),
    "target_macs": share(optional=True),
    "target_params": share(optional=True),
    "target_latency": Kind([], share().junk[:-1], optional=True),
    "importance": choice("auto", "spectrum", "outputs", "fisher"),
    "inputs": count(),
    "correct_bias": flag(optional=True),
    "recalibrate": flag(),
    "curve": flag(),
    "inplace": flag(),
    "progress": Kind([False], flag().junk),
    "seed": count(least=0),
    "reconstruct": Kind([0, 1], count(least=0).junk),
    "loss": Kind([], [v for v in [*ANYTHING, *WORDS, *NUMBERS, *BOOLS] if not callable(v)], optional=True),
}


def compressed(**arguments):
    """A small net, compressed."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    return compress(net, [torch.randn(4, 8)], **({"progress": False} | arguments))


# Constructor, its arguments, pairs of valid values that contradict each other with the words that must be in the
# message.
CONSTRUCTORS = {
    "SVDTrainingCallback": (
        SVDTrainingCallback,
        OF_CALLBACK,
        [
            ({"target_macs": 0.5, "target_params": 0.5}, "target_macs"),
            ({"target_params": 0.5, "energy_threshold": 0.9}, "energy_threshold"),
            ({"target_macs": 0.5, "energy_threshold": 0.9}, "target_macs"),
            ({"target_macs": 0.5, "target_latency": 0.5}, "target_latency"),
            ({"latency_table": "phone.json"}, "latency_table"),
            ({"mode": "min"}, "mode"),
            ({"max_metric_drop": 0.1}, "max_metric_drop"),
            ({"monitor": "val_loss"}, "mode"),
            ({"monitor": "val_loss", "max_metric_drop": 0.1}, "mode"),
            ({"plan_file": "a.yaml", "target_modules": ["a"]}, "plan_file"),
            ({"plan_file": "a.yaml", "exclude_modules": "a"}, "plan_file"),
            ({"plan_file": "a.yaml", "conv_mode": "spatial"}, "plan_file"),
            ({"plan_file": "a.yaml", "rank_pattern": {"a": 3}}, "plan_file"),
            ({"rank_pattern": {"a": 3}, "min_rank": 4}, "rank_pattern"),
        ],
    ),
    "FallToBudget": (FallToBudget, OF_SCHEDULE, [({"start": 0.8, "end": 0.3}, "start"), ({"end": 0.4}, "start")]),
    "Finetune": (Finetune, OF_SCHEDULE, [({"start": 0.8, "end": 0.3}, "start"), ({"start": 0.5}, "start")]),
    "Alternating": (Alternating, OF_ALTERNATING, [({"start": 0.8, "end": 0.85}, "start")]),
    "GrowAndPrune": (
        GrowAndPrune,
        OF_GROW_AND_PRUNE,
        [({"start": 0.5}, "grow"), ({"grow": 0.8}, "grow"), ({"grow": 0.5, "end": 0.45}, "grow")],
    ),
    "Nested": (Nested, OF_NESTED, []),
    "Regularizer": (
        Regularizer,
        {
            "sparsity": choice("hoyer", "hoyer_square", "l1", "group_lasso", optional=True),
            "sparsity_weight": weight(optional=True),
            "orthogonality_weight": weight(),
            "centralize": flag(),
        },
        [],
    ),
    "Distillation": (
        Distillation,
        {
            "where": WHERE,
            "temperature": weight(zero=False),
            "weight": weight(),
            "kind": choice("auto", "logits", "features"),
            "class_dim": DIM,
        },
        [],
    ),
    "Fisher": (Fisher, {"steps": count(), "targets": choice("drawn", "given")}, []),
    "Outputs": (Outputs, {"steps": count()}, []),
    "Timing": (
        Timing,
        {
            "batch_size": count(optional=True),
            "runtime": choice("eager", "compiled", "onnx"),
            "seconds": weight(zero=False),
        },
        [],
    ),
    "compress": (
        compressed,
        OF_COMPRESS,
        [
            ({"target_macs": 0.5, "target_params": 0.5}, "target_macs"),
            ({"schedule": "fall"}, "schedule"),
            ({"distill": True}, "distill"),
            ({"final": "dense"}, "final"),
            ({"rank_pattern": {"0": 3}, "min_rank": 4}, "rank_pattern"),
        ],
    ),
}
# Values of one argument that would contradict those of another; where they are drawn, one gives way.
BUDGETS = ("target_macs", "target_params", "target_latency", "energy_threshold")
OF_PLANS = ("target_modules", "exclude_modules", "conv_mode", "rank_pattern")
OF_METRICS = ("monitor", "mode", "max_metric_drop")


def valid_arguments(name, rng):
    """A configuration that means something."""
    kinds = CONSTRUCTORS[name][1]
    drawn = {argument: rng.choice(kind.valid) for argument, kind in kinds.items() if rng.random() < 0.5}
    drawn = {argument: value for argument, value in drawn.items() if value is not ABSENT}
    budgets = [argument for argument in BUDGETS if argument in drawn]
    for argument in budgets[1:]:
        del drawn[argument]
    if drawn.get("target_latency") is None:
        drawn.pop("latency_table", None)
    if drawn.get("plan_file") is not None:
        drawn = {argument: value for argument, value in drawn.items() if argument not in OF_PLANS}
    if any(drawn.get(argument) is not None for argument in OF_METRICS):
        drawn |= {"monitor": "val_loss", "mode": rng.choice(["min", "max"])}
    if "end" in kinds:
        low, high = sorted((drawn.get("start", 0.0), drawn.get("end", 0.9)))
        drawn |= {"start": low, "end": high or 0.1}
    if drawn.get("rank_pattern"):
        drawn["min_rank"] = min(drawn["rank_pattern"].values())
    if name == "compress":  # here a model is made, too, and the values must be its own
        for argument, value in {"target_modules": "0", "exclude_modules": "2", "rank_pattern": {"0": 4}}.items():
            if argument in drawn:
                drawn[argument] = value
        drawn.pop("min_rank", None)
        drawn |= {"target_macs": 1.0} if "target_params" not in drawn else {"target_params": 1.0}
    return drawn


def malformed_arguments(name, rng):
    """A configuration with junk in it, and the arguments of which one must be named."""
    _, kinds, pairs = CONSTRUCTORS[name]
    what = rng.random()
    if pairs and what < 0.1:
        given, word = rng.choice(pairs)
        return dict(given), [word]
    drawn = valid_arguments(name, rng)
    if what < 0.15:
        unknown = rng.choice(["target_mac", "ranks", "Steps", "lr", "callback"])
        return drawn | {unknown: 1}, [unknown]
    spoiled = rng.sample(sorted(kinds), rng.choice([1, 1, 1, min(2, len(kinds))]))
    return drawn | {argument: rng.choice(kinds[argument].junk) for argument in spoiled}, spoiled


def named(message, arguments):
    return any(f"`{argument}" in message or f"'{argument}'" in message for argument in arguments)


class TooLongError(BaseException):
    """The alarm."""


def ring(*_):
    raise TooLongError


def outcome(name, arguments, expected):
    """What became of one configuration, and what was said."""
    build = CONSTRUCTORS[name][0]
    signal.setitimer(signal.ITIMER_REAL, 5.0)
    try:
        build(**arguments)
    except TooLongError:
        return HANGS, ""
    except (ValueError, TypeError) as error:
        message = str(error)
        if "\n" in message or len(message) > 1000:
            return LINES, message
        return (REFUSED if named(message, expected) else UNNAMED), message
    except Exception as error:
        return OTHER, f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return ACCEPTED, ""


def run(malformed, valid, seed=0):
    """Try so many of both kinds, all constructors in turn; a tally of each."""
    rng = random.Random(seed)
    signal.signal(signal.SIGALRM, ring)
    bad, good = Tally([REFUSED]), Tally([ACCEPTED])
    names = [*CONSTRUCTORS, "SVDTrainingCallback", "SVDTrainingCallback"]  # which has most arguments
    for number in range(malformed):
        name = names[number % len(names)]
        arguments, expected = malformed_arguments(name, rng)
        came, message = outcome(name, arguments, expected)
        bad.add(f"{name}, malformed", came, f"{expected} of {described(arguments)}: {message[:300]}")
    for number in range(valid):
        name = names[number % len(names)]
        arguments = valid_arguments(name, rng)
        came, message = outcome(name, arguments, [])
        good.add(f"{name}, valid", came, f"{described(arguments)}: {message[:300]}")
    both = Tally([REFUSED, ACCEPTED])
    both.rows, both.faults = bad.rows | good.rows, bad.faults + good.faults
    return both


def described(arguments):
    try:
        return repr(arguments)[:300]
    except Exception:
        return "arguments that cannot be shown"


def main(argv=None):
    options = parser(__doc__)
    options.add_argument("--malformed", type=int, default=1000)
    options.add_argument("--valid", type=int, default=400)
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args(argv)
    tally = run(options.malformed, options.valid, options.seed)
    return finish("constructors", tally, options, f"--malformed {options.malformed} --valid {options.valid}")


if __name__ == "__main__":
    sys.exit(main())
