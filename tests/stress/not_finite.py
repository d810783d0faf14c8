"""Numbers that are not finite, at every stage: what happens is decided, said in a line, and never a rank chosen by NaN.

    python tests/stress/not_finite.py

In each situation NaN or infinity is put somewhere: into weights, data, gradients, the state of an optimizer,
statistics, a metric, a file. What is written in the table is what came out.
"""

import contextlib
import copy
import functools
import io
import json
import logging
import math
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

from common import Tally, finish, parser  # isort: skip  # puts the tests' own models on the path
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from models import ValidatedNet, data, quiet_trainer
from torch import nn

from lightning_svd import (
    FallToBudget,
    Fisher,
    Outputs,
    SVDLayer,
    SVDReport,
    SVDTrainingCallback,
    compress,
    decompose,
    load_low_rank,
    plan,
    read_plan,
    save_low_rank,
    svd_layers,
    to_onnx,
    write_plan,
)
from lightning_svd.cli import main as command

REFUSED = "refused, model as it was"
ENDS = "the run ends before ranks are chosen"
WAITS = "ranks wait, and fall later"
NEVER = "ranks do not fall, and the report says why"
WARNS = "goes on, and the report says what is not finite"
PAUSES = "pruning pauses"
GOES = "goes on"
WRITTEN = "written as null, and read as NaN"
FINE = (REFUSED, ENDS, WAITS, NEVER, WARNS, PAUSES, GOES, WRITTEN)
SILENT, CHOSEN, MANY = "no word of it", "ranks chosen by NaN", "a long message"

STEPS = 24
CUTS = {"start": 0.3, "end": 0.8, "cuts": 4}  # after 10, 13, 16 and 19 steps
BEFORE_CUT = 8


# ------------------------------------------------------------------------------------------------------------- a fit


class Acts(Callback):
    """Does something to a run in some of its steps, in a hook."""

    def __init__(self, hook, steps, act):
        def then(trainer, pl_module, *others):
            if trainer.global_step in steps:
                act(trainer, pl_module, *others)

        setattr(self, hook, then)


def net(kind=ValidatedNet, **options):
    torch.manual_seed(0)
    return kind(**({"optimizer": "AdamW", "lr": 1e-2} | options))


def training(*callbacks, model=None, trainer=None, validated=False, **arguments):
    """Train; what came of it, and what was said."""
    model = net() if model is None else model
    given = {"target_macs": 0.4, "importance": "spectrum", "schedule": FallToBudget(**CUTS)}
    ours = SVDTrainingCallback(**(given | arguments))
    before, steps = copy.deepcopy(model.state_dict()), []
    count = Acts("on_train_batch_end", range(1, STEPS + 1), lambda trainer, *_: steps.append(trainer.global_step))
    options = {"max_epochs": 3} | (trainer or {})
    fitter = quiet_trainer(callbacks=[*callbacks, ours, count], **options)
    try:
        fitter.fit(model, data(), data(16) if validated else None, ckpt_path=None)
    except ValueError as error:
        plain = not any(isinstance(module, SVDLayer) for module in model.modules())
        if not steps:
            now = model.state_dict()
            same = plain and all(torch.equal(before[key].nan_to_num(), now[key].nan_to_num()) for key in before)
            return (REFUSED if same else "model changed"), str(error)
        return (ENDS if plain else "layers left"), str(error)
    return ended(ours, model)


def ended(ours, model):
    report = ours.report
    said = "; ".join(report.warnings)
    broken = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    json.loads(report.to_json(), parse_constant=refuse)
    first = first_cut(report)
    if broken:
        return (WARNS if "NaN" in said else SILENT), said
    if first is None:
        return (NEVER if said else SILENT), said
    if report.pauses:
        return PAUSES, f"`{report.metric}`: pruning {report.pauses[0]}"
    return (WAITS if first > usual_cut(ours.recipe.schedule.cuts) else GOES), said


def first_cut(report):
    return report.timeline[0].step if report.timeline else None


@functools.cache
def usual_cut(cuts):
    """When ranks fall first where all is finite."""
    ours = SVDTrainingCallback(target_macs=0.4, schedule=FallToBudget(**CUTS | {"cuts": cuts}))
    quiet_trainer(callbacks=[ours], max_epochs=3).fit(net(), data())
    return first_cut(ours.report)


def refuse(name):
    raise ValueError(f"{name} in JSON")


# What may happen in a step.


def spoil(value=torch.nan):
    def act(trainer, pl_module, batch, batch_idx):
        batch[0][0] = value

    return act


def spoil_form(number, value=torch.nan, name="hidden"):
    def act(trainer, pl_module, *_):
        svd_layers(pl_module)[name].form.trained[number].data.view(-1)[0] = value

    return act


def spoil_state(trainer, pl_module, *_):
    next(iter(trainer.optimizers[0].state.values()))["exp_avg"].view(-1)[0] = torch.nan


def drop_gradients(trainer, pl_module, optimizer):
    """What many do: leave a step out whose gradients are not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not all(bool(torch.isfinite(p.grad).all()) for p in parameters):
        for parameter in parameters:
            parameter.grad = None


def poisoned_forward(steps):
    """A network one of whose layers puts out NaN in some steps, in training and where it is run again."""

    class Poisoned(ValidatedNet):
        def forward(self, x):
            out = super().forward(x)
            return out * torch.nan if self.global_step in steps and not self.trainer.validating else out

    return net(Poisoned)


class LossIsNaN(ValidatedNet):
    steps = (BEFORE_CUT,)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if self.global_step in self.steps else loss


class LossIsNaNInTheEnd(LossIsNaN):
    steps = (STEPS - 1,)


class AsksForClass(ValidatedNet):
    """Puts out something else where a layer is none of its class, and NaN for its first batch."""

    def forward(self, x):
        out = super().forward(x)
        out = out if isinstance(self.hidden, nn.Linear) else -out
        return out * torch.nan if self.global_step < 1 and not getattr(self.trainer, "validating", False) else out


class MetricIsNaN(ValidatedNet):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nan if self.global_step == 8 else float(self.global_step), batch_size=1)


def scaled():
    """The first two steps overflow and are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-15)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


def with_weight(value, where="hidden.weight", **options):
    model = net(**options)
    with torch.no_grad():
        model.get_parameter(where).view(-1)[3] = value
    return model


def with_buffer():
    model = net()
    model.features.insert(1, nn.BatchNorm2d(12))
    model.features[1].running_mean[2] = torch.nan
    return model


def guarded():
    return training(
        model=net(MetricIsNaN), validated=True, monitor="val_loss", mode="min", max_metric_drop=100.0,
    )  # fmt: skip


def watched():
    came, said = training(model=net(MetricIsNaN), validated=True, monitor="val_loss", mode="min")
    return came, said


def always(act, **arguments):
    return training(Acts("on_train_batch_start", range(STEPS), act), drops(), **arguments)


def drops():
    return Acts("on_before_optimizer_step", range(STEPS), drop_gradients)


def first_batch():
    model = net(AsksForClass)
    came, said = training(drops(), model=model)
    return (came if isinstance(model.hidden, nn.Linear) else "layer cut all the same"), said


def logged():
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder, name="", version="")
        came, said = training(model=net(LossIsNaNInTheEnd), trainer={"logger": logger, "log_every_n_steps": 1})
        rows = (Path(folder) / "metrics.csv").read_text().splitlines()
    return (came if len(rows) > 20 else "nothing logged"), said


def resumed_in_window():
    """NaN in the first of the observed batches, and a file that is written before ranks are due."""
    with tempfile.TemporaryDirectory() as folder:
        schedule = FallToBudget(**CUTS | {"cuts": 1})
        ours = {"importance": Fisher(3, targets="given"), "schedule": schedule}
        spoils = Acts("on_train_batch_start", (usual_cut(1) - 3,), spoil())
        writes = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        training(spoils, drops(), writes, trainer={"enable_checkpointing": True}, **ours)
        path = Path(folder) / f"step={usual_cut(1) - 2}.ckpt"
        seen = torch.load(path, weights_only=True)["callbacks"]["SVDTrainingCallback"]["observed"]["seen"]
        assert any(bool(torch.isnan(entry["features"]).any()) for entry in seen.values())
        model, ours = net(), SVDTrainingCallback(target_macs=0.4, **ours)
        quiet_trainer(callbacks=[ours], max_epochs=3).fit(model, data(), ckpt_path=path)
        return ended(ours, model)


# --------------------------------------------------------------------------------------------------- without training


def refused(act, model):
    """Do something that is to be refused, with a model that is to stay as it was."""
    before = copy.deepcopy(model.state_dict())
    try:
        said = act(model)
    except ValueError as error:
        now = model.state_dict()
        same = before.keys() == now.keys() and all(
            torch.equal(before[key].nan_to_num(), now[key].nan_to_num()) for key in before
        )
        return (REFUSED if same else "model changed"), str(error)
    except SystemExit as error:
        return REFUSED, str(error)
    return "accepted", str(said)


def plain_net(broken=None, value=torch.nan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    if broken:
        with torch.no_grad():
            model.get_parameter(broken).view(-1)[3] = value
    return model


class Overflows(nn.Module):
    """Puts out infinity."""

    def forward(self, x):
        return (x * 1e30).float() * 1e30


def batches(value=None):
    found = list(torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1)))
    if value is not None:
        found[0][2, 3] = value
    return found


def compressing(model, of=None, **arguments):
    return refused(lambda model: compress(model, of or batches(), progress=False, **arguments), model)


def nan_loss(model, batch):
    return model(batch).square().mean() * torch.nan


def nan_gradients(model, batch):
    out = model(batch)
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * torch.nan)
    return out.square().mean()


def reconstructing():
    """A loss that is NaN now and then, while factors are trained."""
    calls = iter(range(10_000))

    def loss(model, batch):
        out = model(batch).square().mean()
        return out * torch.nan if torch.is_grad_enabled() and next(calls) % 3 == 2 and model.training is False else out

    small, report = compress(
        plain_net(), batches(), loss=loss, importance="spectrum", reconstruct=12, progress=False, target_macs=0.5
    )
    is_finite = all(bool(torch.isfinite(p).all()) for p in small.parameters()) and math.isfinite(report.distance)
    return (GOES if is_finite else SILENT), ""


def in_file(writes, reads, suffix):
    """A file with NaN in it, read by a model that is to stay as it was."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        writes(path)
        came, said = refused(lambda model: reads(model, path), plain_net())
        return came, said.replace(folder, "...")


def low_rank_file(path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    small, _ = compress(plain_net(), batches(), importance="spectrum", progress=False)
    save_low_rank(small, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "weight" in name)
    save_file(tensors | {name: tensors[name] * torch.nan}, path, metadata)


def saving():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.safetensors"
        came, said = refused(lambda model: save_low_rank(model, path), plain_net("2.weight"))
        return ("file left" if [*Path(folder).iterdir()] else came), said


def exporting():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        return refused(lambda model: to_onnx(model, path, torch.zeros(2, 16)), plain_net("2.weight"))


def infinite_outputs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = plain_net()

        def forward(self, x):
            return self.net(x).masked_fill(torch.arange(4) == 1, -torch.inf)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        difference = to_onnx(Masked(), Path(folder) / "net.onnx", torch.randn(2, 16))
    return (GOES if difference < 1e-4 else SILENT), ""


def planning():
    """A plan of a model with NaN goes by shapes; what it plans is refused when it is done."""
    model = plain_net("2.weight")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.yaml"
        write_plan(plan(model), path)
        assert len(read_plan(path, model)) == 3
        text = path.read_text().replace("max_rank: null", "max_rank: .nan")
        text = text if ".nan" in text else re.sub(r"(  '?2'?:\n)", r"\1    max_rank: .nan\n", text, count=1)
        assert ".nan" in text
        path.write_text(text)
        came, said = refused(lambda model: read_plan(path, model), model)
        return came, said.replace(folder, "...")


def reported():
    """A report with NaN in each of its histories."""
    callback = SVDTrainingCallback(
        target_macs=0.4, schedule=FallToBudget(**CUTS), monitor="val_loss", mode="min", max_metric_drop=100.0
    )
    quiet_trainer(callbacks=[callback], max_epochs=3).fit(net(MetricIsNaN), data(), data(16))
    text = callback.report.to_json()
    json.loads(text, parse_constant=refuse)
    read = SVDReport.from_json(text)
    (pause,) = read.pauses
    same = [math.isnan(value) for _, value in read.metric_values] == [True, False, False] and math.isnan(pause.value)
    with tempfile.TemporaryDirectory() as folder:
        page = read.to_html(Path(folder) / "report.html").read_text()
    return (WRITTEN if same and "NaN" not in page else SILENT), ""


def inspected():
    """The command's JSON on a file with NaN."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "foreign.pt"
        torch.save(plain_net("2.weight").state_dict(), path)
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            try:
                command(["inspect", str(path), "--json"])
            except SystemExit as error:
                return REFUSED, str(error).replace(folder, "...")
        json.loads(out.getvalue(), parse_constant=refuse)
        return GOES, ""


WAITING = "ranks waited for data without NaN"
NAMED = r"`hidden`: expected finite weights, got \d+ NaN or infinite"
ANY = r"`features.0`: expected finite weights, got \d+ NaN or infinite"


def at(steps, act, hook="on_train_batch_start"):
    return Acts(hook, steps, act)


GIVEN = {"importance": Fisher(2, targets="given")}

# What is done, what is to happen, and what is to be said.
SITUATIONS = {
    # ------------------------------------------------------------------------------------------------ before a fit
    "NaN in a weight before the fit": (lambda: training(model=with_weight(torch.nan)), REFUSED, NAMED),
    "infinity in a weight before the fit": (lambda: training(model=with_weight(torch.inf)), REFUSED, NAMED),
    "NaN in a weight before the fit, layers dense at first": (
        lambda: training(model=with_weight(torch.nan), full_rank_as="dense"), REFUSED, NAMED,
    ),
    "NaN in a bias before the fit": (
        lambda: training(drops(), model=with_weight(torch.nan, "hidden.bias")),
        WARNS,
        "1 tensor beside the layers' holds NaN",
    ),
    "NaN in a running mean before the fit": (
        lambda: training(model=with_buffer()), NEVER, "met in the model's outputs.*features.1.running_mean",
    ),
    # ------------------------------------------------------------------------------------------------- in a step
    "NaN in a forward output": (lambda: training(model=poisoned_forward((BEFORE_CUT,))), ENDS, ANY),
    "NaN in the first output, gradients dropped": (first_batch, GOES, "hidden"),
    "NaN in the loss before a cut": (lambda: training(model=net(LossIsNaN)), ENDS, ANY),
    "NaN in the loss after the last cut": (lambda: training(model=net(LossIsNaNInTheEnd)), WARNS, "hold NaN"),
    "NaN in a batch": (lambda: training(at((BEFORE_CUT,), spoil())), ENDS, ANY),
    "NaN in a batch, gradients dropped": (lambda: training(at((BEFORE_CUT,), spoil()), drops()), GOES, None),
    "NaN in the loss, clipping by norm": (
        lambda: training(model=net(LossIsNaN), trainer={"gradient_clip_val": 1.0}), ENDS, ANY,
    ),
    "NaN in the loss, accumulation": (
        lambda: training(model=net(LossIsNaN), trainer={"accumulate_grad_batches": 2}), ENDS, ANY,
    ),
    "gradients overflow, steps skipped by a loss scaler": (lambda: training(trainer=scaled()), GOES, None),
    "the same where the loss says what ranks are worth": (lambda: training(trainer=scaled(), **GIVEN), GOES, None),
    "NaN in the state of the optimizer": (lambda: training(at((BEFORE_CUT,), spoil_state)), ENDS, ANY),
    "NaN in the loss, scalars logged": (logged, WARNS, "hold NaN"),
    # ------------------------------------------------------------------------------------------------- at a cut
    "NaN in U at a cut": (
        lambda: training(at((9,), spoil_form(0), "on_before_zero_grad")), ENDS, r"expected finite weights",
    ),
    "infinity in s at a cut": (
        lambda: training(at((9,), spoil_form(1, torch.inf), "on_before_zero_grad")), ENDS, "expected finite weights",
    ),
    "singular values whose squares overflow": (
        lambda: training(at((9,), lambda t, m, *_: spoil_form(1, 1e30)(t, m), "on_before_zero_grad")),
        ENDS, "`hidden`: what its ranks carry is not finite",
    ),
    # ------------------------------------------------------------------------------------------- judged by data
    **{
        f"NaN in {what} observed batch, {label}": (
            lambda steps=steps, importance=importance: training(
                at(steps, spoil()), drops(), importance=importance, schedule=FallToBudget(**CUTS | {"cuts": 1}),
            ),
            expected, says,
        )
        for what, steps, expected, says in (
            ("an", (17, 18), WAITS, None), ("every", range(STEPS), NEVER, WAITING),
        )
        for label, importance in (
            ("outputs", Outputs(2)), ("Fisher, targets drawn", Fisher(2)),
            ("Fisher, targets given", GIVEN["importance"]),
        )
    },
    "NaN in an observed batch, gradients not dropped": (
        lambda: training(at((BEFORE_CUT,), spoil()), importance="fisher"), ENDS, "expected finite weights",
    ),
    "a run that is resumed between observed batches with NaN": (resumed_in_window, WAITS, None),
    # ------------------------------------------------------------------------------------------------ a metric
    "NaN in the watched metric, max_metric_drop": (guarded, PAUSES, "step 8 to step 16: nan with no number before"),
    "NaN in the watched metric": (watched, GOES, None),
    # -------------------------------------------------------------------------------------------- without training
    "decompose: NaN in a weight": (lambda: refused(decompose, plain_net("2.weight")), REFUSED, "`2`: expected finite"),
    "compress: NaN in a batch": (lambda: compressing(plain_net(), batches(torch.nan)), REFUSED, "`0`: NaN or infinity"),
    "compress: infinity in a batch": (
        lambda: compressing(plain_net(), batches(torch.inf)), REFUSED, "`0`: NaN or infinity",
    ),
    "compress: NaN in a weight": (lambda: compressing(plain_net("2.weight")), REFUSED, "`2`: expected finite weights"),
    "compress: NaN in a bias": (lambda: compressing(plain_net("2.bias")), REFUSED, "NaN or infinit"),
    "compress: activations overflow": (
        lambda: compressing(nn.Sequential(nn.Linear(16, 24), Overflows(), nn.Linear(24, 4))), REFUSED, "NaN or infinit",
    ),
    "compress: the loss is NaN": (lambda: compressing(plain_net(), loss=nan_loss), REFUSED, "NaN or infinit"),
    "compress: gradients are NaN": (
        lambda: compressing(plain_net(), loss=nan_gradients), REFUSED, "NaN or infinity among the gradients",
    ),
    "compress: the loss is NaN in steps of a reconstruction": (reconstructing, GOES, None),
    # ------------------------------------------------------------------------------------------------------ files
    "a low-rank file with NaN is loaded": (
        lambda: in_file(low_rank_file, load_low_rank, ".safetensors"), REFUSED, "holds NaN",
    ),
    "a low-rank model with NaN is saved": (saving, REFUSED, "`2.weight` holds NaN"),
    "a model with NaN is exported": (exporting, REFUSED, "`2.weight` holds NaN"),
    "a model is exported that puts out infinity": (infinite_outputs, GOES, None),
    "NaN as a rank in a plan": (planning, REFUSED, "max_rank"),
    "NaN in a report": (reported, WRITTEN, None),
    "a file with NaN is inspected, as JSON": (inspected, GOES, None),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the table


def outcome(name):
    """What came of a situation, the message, and whether both are as promised."""
    act, expected, says = SITUATIONS[name]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            came, said = act()
        except Exception as error:
            came, said = f"{type(error).__name__}", str(error)
    if "\n" in said or len(said) > 400:
        came = MANY
    elif came == expected and says is not None and not re.search(says, said):
        came = SILENT
    return came, said


def run(names=SITUATIONS):
    tally, lines = Tally(FINE), []
    for name in names:
        came, said = outcome(name)
        expected = SITUATIONS[name][1]
        if os.environ.get("SHOW"):
            print(f"{name} | {came} | {said}", file=sys.stderr, flush=True)
        tally.add(name, came if came == expected else f"{came}, not: {expected}", said)
        lines.append((name, came, said))
    return tally, lines


def main(argv=None):
    options = parser(__doc__)
    options.add_argument("--only", default="", help="only situations whose name has this in it")
    options = options.parse_args(argv)
    torch.set_num_threads(1)
    tally, lines = run([name for name in SITUATIONS if options.only in name])
    return finish("not_finite", tally, options, table=[("what is not finite", "what happens", "what is said"), *lines])


if __name__ == "__main__":
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sys.exit(main())
