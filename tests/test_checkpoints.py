"""Every file of a fit opens where this package is not installed, and what cannot work is refused in words."""

import copy
import inspect
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from models import EMAWeightAveraging, SmallNet, ValidatedNet, data, quiet_trainer, same_state
from torch import nn

from lightning_svd import FallToBudget, SVDTrainingCallback, load_low_rank, svd_layers
from lightning_svd.files.checkpoints import saved_state
from lightning_svd.layers.pairs import low_rank_pairs, rank_of

pytestmark = [
    # Lightning's own, where a Trainer has fewer callbacks than the one that wrote the file.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
LARGEST = (24, 108)  # the largest matrix of ValidatedNet, for what rounding explains


def batch():
    return next(iter(data(dtype=torch.float64)))


def loaders():
    return data(dtype=torch.float64), data(16, dtype=torch.float64)


class Recorder(Callback):
    """Has the outputs of the model as it is when a file is written: of its average, where there is one."""

    def __init__(self, decay=None):
        self.decay, self.average, self.outputs, self.ranks = decay, {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for name, p in pl_module.named_parameters() if self.decay else ():
            before = self.average.get(name, p.detach().clone())
            self.average[name] = self.decay * before + (1 - self.decay) * p.detach()

    def record(self, trainer, path):
        module = trainer.lightning_module
        with torch.no_grad():
            self.outputs[str(path)] = torch.func.functional_call(module, self.average, (batch()[0],))
        self.ranks[str(path)] = {name: layer.rank for name, layer in svd_layers(module).items()}


class SaveInside(Callback):
    """Saves from inside the fit."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in (1, 17, 31):
            trainer.save_checkpoint(self.folder / f"inside{trainer.global_step}.ckpt")
            trainer.save_checkpoint(self.folder / f"inside{trainer.global_step}-weights.ckpt", weights_only=True)


def fit(*callbacks, model=None, asynchronous=False, decay=None, ckpt_path=None, **arguments):
    """A fit that tells what each file was written from: (model, callback, trainer, recorder)."""
    recorder = Recorder(decay)

    class Recording(AsyncCheckpointIO if asynchronous else TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, *args, **kwargs):
            recorder.record(trainer, path)
            super().save_checkpoint(checkpoint, path, *args, **kwargs)

    plugin = Recording(TorchCheckpointIO()) if asynchronous else Recording()
    model = ValidatedNet(momentum=0.9).double() if model is None else model
    callback = SVDTrainingCallback(**{"target_macs": 0.4, "schedule": FallToBudget(start=0.3)} | arguments)
    writes = any(isinstance(other, ModelCheckpoint) for other in callbacks)
    everyone = (
        [callback, recorder, *callbacks] if decay is None else [callback, *callbacks[:1], recorder, *callbacks[1:]]
    )
    trainer = quiet_trainer(callbacks=everyone, plugins=[plugin], enable_checkpointing=writes)
    trainer.fit(model, *loaders(), ckpt_path=ckpt_path)
    return model, callback, trainer, recorder


def assert_loss(metrics, outputs):
    """The metric of a test on the first batch is the loss of these outputs; Lightning keeps it in float32."""
    expected = F.cross_entropy(outputs, batch()[1]).float()
    assert_same(torch.tensor(metrics["test_loss"]), expected, LARGEST)


WRITERS = {
    "best and last": lambda folder: [
        ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=-1, save_last=True)
    ],
    "every 5 steps": lambda folder: [ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1)],
    "weights only": lambda folder: [
        ModelCheckpoint(folder, "{epoch}", save_weights_only=True, save_top_k=-1, monitor="val_loss")
    ],
    "inside": lambda folder: [SaveInside(folder)],
    "average": lambda folder: [
        EMAWeightAveraging(decay=0.9),
        ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1),
    ],
}
# The classes as their author has them: `models` itself imports this package for its helpers.
CLASSES = """
from typing import Any
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
"""
STRANGER = """
import sys, torch
from classes import ValidatedNet
try:
    import lightning_svd
except ImportError:
    torch.set_default_dtype(torch.float64)
else:
    raise SystemExit("this process must not have lightning_svd")
x, paths = torch.load("inputs.pt", weights_only=True)
outputs = {}
for path in paths:
    loaded, own = ValidatedNet.load_from_checkpoint(path, strict=True, map_location="cpu"), ValidatedNet()
    own.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    with torch.no_grad():
        outputs[path] = loaded(x), own(x)
torch.save(outputs, "outputs.pt")
"""


def opened_by_a_stranger(paths, folder):
    """Path -> what the model in that file predicts, opened in two ways by a process without this package."""
    (folder / "stranger.py").write_text(STRANGER)
    (folder / "classes.py").write_text("\n\n".join([CLASSES, *map(inspect.getsource, (SmallNet, ValidatedNet))]))
    (folder / "lightning_svd.py").write_text("raise ImportError('not installed here')")
    torch.save((batch()[0], list(paths)), folder / "inputs.pt")
    command = [sys.executable, "stranger.py"]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return torch.load(folder / "outputs.pt", weights_only=True)


# -------------------------------------------------------------------------------------------------------- anyone opens


@pytest.mark.combination("Files", "every file of a fit opens without this package")
def test_every_file_of_a_fit_opens_without_this_package_and_predicts_the_same(tmp_path):
    expected, ranks = {}, []
    for number, (name, writers) in enumerate(WRITERS.items()):
        for asynchronous in (False, True):
            folder = tmp_path / f"{number}{asynchronous}"
            folder.mkdir()
            decay = 0.9 if name == "average" else None
            *_, recorder = fit(*writers(folder), asynchronous=asynchronous, decay=decay)
            assert len({tuple(of.values()) for of in recorder.ranks.values()}) >= 3  # before, during, after the cuts
            expected |= recorder.outputs
            ranks += recorder.ranks.values()
    opened = opened_by_a_stranger(expected, tmp_path)
    assert opened.keys() == expected.keys()
    for path, outputs in opened.items():
        for output in outputs:
            assert_same(output, expected[path], LARGEST)
    assert len(ranks) == len(expected) > 50


def test_a_plain_trainer_tests_any_file_on_a_fresh_dense_model(tmp_path):
    *_, recorder = fit(*WRITERS["best and last"](tmp_path), SaveInside(tmp_path))
    loader = data(8, dtype=torch.float64)
    for path, outputs in recorder.outputs.items():
        model = ValidatedNet().double()
        (metrics,) = quiet_trainer().test(model, loader, ckpt_path=path, verbose=False)
        assert_loss(metrics, outputs)
        assert type(model.hidden) is nn.Linear


def test_nothing_in_a_file_needs_pickle(tmp_path):
    *_, recorder = fit(*WRITERS["best and last"](tmp_path))
    for path in recorder.outputs:
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["state_dict"].keys() == ValidatedNet().state_dict().keys()
        state = checkpoint["callbacks"]["SVDTrainingCallback"]
        assert state["layers"].keys() == {"features.0", "features.2", "hidden", "head"}


class SharedNet(ValidatedNet):
    """One layer under two names."""

    def __init__(self, **options):
        super().__init__(**options)
        self.middle = self.again = nn.Linear(40, 40)

    def forward(self, x):
        maps = F.avg_pool2d(self.features(x), 2)
        return self.head(self.again(F.relu(self.middle(F.relu(self.hidden(maps.flatten(1)))))))


def test_a_shared_layer_is_whole_in_files_that_are_opened_tested_and_resumed(tmp_path):
    start = SharedNet().double()
    uninterrupted, *_ = fit(model=copy.deepcopy(start))
    model, _, trainer, recorder = fit(*WRITERS["best and last"](tmp_path), model=start)
    path = str(tmp_path / "epoch=1.ckpt")
    loaded = SharedNet().double()
    loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert loaded.middle is loaded.again
    with torch.no_grad():
        assert_same(loaded(batch()[0]), recorder.outputs[path], LARGEST)
    assert_loss(*trainer.test(model, data(8, dtype=torch.float64), path, verbose=False), recorder.outputs[path])
    resumed, *_ = fit(model=SharedNet().double(), ckpt_path=path)
    assert same_state(resumed.state_dict(), uninterrupted.state_dict())


# ------------------------------------------------------------------------------------------------------- after the fit


@pytest.mark.parametrize("final", ["factored", "dense", "decomposed"])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.combination(
    "Files", '`test(ckpt_path="best")` after the fit, `final="{final}"`, weights only: {weights_only}'
)
def test_the_best_file_is_tested_on_the_final_model(weights_only, final, tmp_path):
    # The worst is called best here, so that it is an early one with more ranks.
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_weights_only=weights_only)
    model, callback, trainer, recorder = fit(best, final=final)
    report, told = callback.report, str(callback.report)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert all(recorder.ranks[best.best_model_path][name] >= rank for name, rank in ranks.items())
    assert recorder.ranks[best.best_model_path] != ranks
    for _ in range(2):
        metrics = trainer.test(model, data(8, dtype=torch.float64), ckpt_path="best", verbose=False)
        assert_loss(*metrics, recorder.outputs[best.best_model_path])
    assert callback.report is report and str(report) == told


def test_a_file_saved_after_the_fit_opens_too_and_tests_the_same(tmp_path):
    fits, expected = {}, {}
    for final in ("factored", "dense", "decomposed"):
        model, _, trainer, _ = fit(final=final)
        path = str(tmp_path / f"{final}.ckpt")
        trainer.save_checkpoint(path)
        with torch.no_grad():
            fits[path], expected[path] = (model, trainer), model(batch()[0])
    opened = opened_by_a_stranger(expected, tmp_path)  # one process for all: to import Lightning takes seconds
    for path, (model, trainer) in fits.items():
        for outputs in opened[path]:
            assert_same(outputs, expected[path], LARGEST)
        for p in model.parameters():
            p.data.zero_()
        loader = data(8, dtype=torch.float64)
        assert_loss(*trainer.test(model, loader, ckpt_path=path, verbose=False), expected[path])


# ------------------------------------------------------------------------------------------------------------ refusals


def resume(path, model=None, **arguments):
    fit(model=model, ckpt_path=str(path), **arguments)


def dense_training(folder):
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ValidatedNet(momentum=0.9).double(), *loaders())
    trainer.save_checkpoint(folder / "a.ckpt")


def ours(folder, **arguments):
    fit(ModelCheckpoint(folder, "a", every_n_train_steps=20), **arguments)


def weights_only(folder):
    fit(ModelCheckpoint(folder, "a", every_n_train_steps=20, save_weights_only=True))


def of_the_future(folder):
    ours(folder)
    checkpoint = torch.load(folder / "a.ckpt", weights_only=True)
    saved_state(checkpoint)["lightning_svd"] = 3
    torch.save(checkpoint, folder / "a.ckpt")


def after_the_fit(final):
    def write(folder):
        *_, trainer, _ = fit(final=final)
        trainer.save_checkpoint(folder / "a.ckpt")

    return write


@pytest.mark.parametrize(
    ("write", "arguments", "message"),
    [
        (dense_training, {}, "holds the state of a dense training.*load its weights .*`load_from_checkpoint`"),
        (weights_only, {}, "holds only weights, .*load its weights .*`load_from_checkpoint`"),
        (of_the_future, {}, "has format version 3, this lightning-svd reads version 2: update it"),
        (ours, {"exclude_modules": ["head"]}, "other factorized layers, see 'head': resume with the `target_modules`"),
        (ours, {"target_modules": "head|hidden"}, "other factorized layers, see 'features.0', 'features.2': resume"),
        (ours, {"conv_mode": "spatial"}, "other factorized layers, see 'features.0', 'features.2'.*`conv_mode`"),
        (after_the_fit("factored"), {}, "written when its SVD training had finished.*`load_from_checkpoint`"),
        (after_the_fit("decomposed"), {}, "written when its SVD training had finished.*`load_from_checkpoint`"),
        (after_the_fit("dense"), {}, "written when its SVD training had finished.*`load_from_checkpoint`"),
    ],
)
@pytest.mark.combination("Files", "resume: {write}, {arguments}", refused="{message}")
def test_refuses_to_resume_what_it_cannot_and_leaves_the_model_as_it_was(write, arguments, message, tmp_path):
    write(tmp_path)
    model = ValidatedNet().double()
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        resume(tmp_path / "a.ckpt", model, **arguments)
    assert same_state(model.state_dict(), state)
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert not svd_layers(model) and type(model.hidden) is nn.Linear


@pytest.mark.parametrize("final", ["factored", "dense", "decomposed"])
def test_refuses_to_resume_into_a_model_whose_fit_has_finished(final, tmp_path):
    model, callback, *_ = fit(ModelCheckpoint(tmp_path, "a", every_n_train_steps=20), final=final)
    state = copy.deepcopy(model.state_dict())
    again = quiet_trainer(callbacks=[callback])
    with pytest.raises(ValueError, match="an earlier fit has finished it: build the model anew and pass it to `fit`"):
        again.fit(model, *loaders(), ckpt_path=str(tmp_path / "a.ckpt"))
    assert same_state(model.state_dict(), state)


@pytest.mark.combination(
    "Files", "resume without the callback", refused="Lightning names SVDTrainingCallback; the optimizer does not fit"
)
def test_without_the_callback_lightning_names_it_and_the_optimizer_refuses(tmp_path):
    ours(tmp_path)
    model = ValidatedNet(momentum=0.9).double()
    with (
        pytest.warns(UserWarning, match="need to be provided during `Trainer` instantiation.*SVDTrainingCallback"),
        pytest.raises(ValueError, match="parameter group that doesn't match the size"),
    ):
        quiet_trainer().fit(model, *loaders(), ckpt_path=str(tmp_path / "a.ckpt"))


def test_a_low_rank_model_trained_on_resumes_from_its_own_files(tmp_path):
    model, callback, *_ = fit()
    files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="train_loss")
    quiet_trainer(callbacks=[callback, files], enable_checkpointing=True).fit(model, *loaders())
    expected = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.data.zero_()
    trainer = quiet_trainer(callbacks=[callback])
    trainer.fit(model, *loaders(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert same_state(model.state_dict(), expected)


# ---------------------------------------------------------------------------------------------- what a file is made of


def exact(path):
    """The state of SVD training in a file."""
    return saved_state(torch.load(path, weights_only=True))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_file_after_the_fit_is_about_as_large_as_the_weights(optimizer, tmp_path):
    model = ValidatedNet(optimizer, lr=1e-3).double()
    *_, trainer, _ = fit(model=model)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    dense = sum(p.nbytes for p in ValidatedNet().double().parameters())
    exact_pairs = sum(t.nbytes for e in exact(tmp_path / "end.ckpt")["layers"].values() for t in (e["A"], e["B"]))
    # What the optimizer remembers of parameters that trained to the end: biases, and layers that stayed as they were.
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["optimizer_states"][0]
    live = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert live == {id(p) for p in model.parameters()}
    held = sum(value.nbytes for state in states["state"].values() for value in state.values() if torch.is_tensor(value))
    assert held <= 2.01 * sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "end.ckpt").stat().st_size < dense + exact_pairs + held + 30_000


@pytest.mark.parametrize("final", ["factored", "decomposed", "dense"])
def test_a_file_after_the_fit_has_the_exact_factors_in_the_callbacks_state(final, tmp_path):
    model, callback, trainer, _ = fit(final=final)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    state = exact(tmp_path / "end.ckpt")
    assert state["is_finished"] is True
    kept = {layer.name: layer.rank for layer in callback.report.layers if layer.form == "factored"}
    saved = {name: entry["rank"] for name, entry in state.get("layers", {}).items()}
    assert saved == ({} if final == "dense" else kept)
    fresh = load_low_rank(ValidatedNet().double(), tmp_path / "end.ckpt") if saved else None
    if final == "factored":
        assert same_state(fresh.state_dict(), model.state_dict())
        with torch.no_grad():
            assert torch.equal(fresh(batch()[0]), model(batch()[0]))


def test_a_checkpoint_from_during_the_fit_is_loaded_at_the_ranks_it_had(tmp_path):
    *_, recorder = fit(*WRITERS["every 5 steps"](tmp_path))
    for path, outputs in recorder.outputs.items():
        model = load_low_rank(ValidatedNet().double(), path)
        assert not svd_layers(model)
        with torch.no_grad():
            assert_same(model(batch()[0]), outputs, LARGEST)
    pairs = {name: rank_of(pair) for name, pair in low_rank_pairs(model).items()}
    assert pairs and pairs == {name: recorder.ranks[path][name] for name in pairs}


# ------------------------------------------------------------------------------------------------------------- averages


class Weights(Callback):
    """The dense weights of the average that Lightning keeps, at each file."""

    def __init__(self, ema):
        self.ema, self.at = ema, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        state = self.ema._average_model.module.state_dict()
        self.at[trainer.global_step] = {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("final", ["factored", "decomposed"])
def test_after_a_fit_with_an_average_the_best_file_is_tested_as_the_average_that_it_holds(final, tmp_path):
    ema = EMAWeightAveraging(decay=0.9)
    kept, files = Weights(ema), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    model, _, trainer, _ = fit(ema, kept, files, final=final)
    for step in (5, 20, 30):
        path = tmp_path / f"step={step}.ckpt"
        (metrics,) = trainer.test(model, data(8, dtype=torch.float64), ckpt_path=path, verbose=False)
        average = ValidatedNet().double()
        average.load_state_dict(kept.at[step])
        with torch.no_grad():
            assert_loss(metrics, average(batch()[0]))


@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_a_file_after_a_fit_with_an_average_has_the_final_model_under_the_users_names(tmp_path):
    model, _, trainer, _ = fit(EMAWeightAveraging(decay=0.9))
    with torch.no_grad():
        expected = model(batch()[0])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == ValidatedNet().state_dict().keys() and "current_model_state" not in saved
    assert same_state(load_low_rank(ValidatedNet().double(), tmp_path / "end.ckpt").state_dict(), model.state_dict())
    for p in model.parameters():
        p.data.zero_()
    (metrics,) = trainer.test(model, data(8, dtype=torch.float64), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert_loss(metrics, expected)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_after_a_fit_with_swa_any_file_is_tested(tmp_path):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    files = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, monitor="val_loss")
    model, _, trainer, recorder = fit(swa, files)
    for path, outputs in recorder.outputs.items():
        (metrics,) = trainer.test(model, data(8, dtype=torch.float64), ckpt_path=path, verbose=False)
        assert_loss(metrics, outputs)


def test_weights_that_were_changed_in_the_file_count_and_not_the_factors_beside_them(tmp_path):
    model, _, trainer, _ = fit(ModelCheckpoint(tmp_path, "a", every_n_train_steps=30))
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for weight in checkpoint["state_dict"].values():
        weight *= 0.5
    torch.save(checkpoint, tmp_path / "half.ckpt")
    dense = ValidatedNet().double()
    dense.load_state_dict(checkpoint["state_dict"])
    with torch.no_grad():
        expected = dense(batch()[0])
        assert_same(load_low_rank(ValidatedNet().double(), tmp_path / "half.ckpt")(batch()[0]), expected, LARGEST)
    (metrics,) = trainer.test(model, data(8, dtype=torch.float64), ckpt_path=tmp_path / "half.ckpt", verbose=False)
    assert_loss(metrics, expected)


# ----------------------------------------------------------------------------------------------- whose state, and which


class Derived(SVDTrainingCallback):
    """Has another name in a checkpoint than the class it derives from."""


def test_a_run_resumes_with_a_callback_of_another_name(tmp_path):
    start = ValidatedNet(momentum=0.9).double()
    uninterrupted, *_ = fit(model=copy.deepcopy(start))
    fit(*WRITERS["best and last"](tmp_path), model=start)
    model = ValidatedNet(momentum=0.9).double()
    derived = Derived(target_macs=0.4, schedule=FallToBudget(start=0.3))
    quiet_trainer(callbacks=[derived]).fit(model, *loaders(), ckpt_path=str(tmp_path / "epoch=1.ckpt"))
    assert same_state(model.state_dict(), uninterrupted.state_dict())


def without_state(callbacks):
    def change(checkpoint):
        checkpoint["callbacks"] = callbacks

    return change


def in_state(**changes):
    return lambda checkpoint: saved_state(checkpoint).update(changes)


def in_layer(**changes):
    def change(checkpoint):
        saved_state(checkpoint)["layers"]["hidden"].update(changes)

    return change


def without_factor(checkpoint):
    del saved_state(checkpoint)["layers"]["hidden"]["U"]


def spoiled(checkpoint):
    saved_state(checkpoint)["layers"]["hidden"]["V"][3, 2] = float("nan")


DAMAGED = "the state of SVD training in it is damaged: "
DAMAGES = [
    (without_factor, f"{DAMAGED}`hidden`: it has no U"),
    (spoiled, f"{DAMAGED}`hidden`: its V holds NaN or infinity"),
    (in_layer(U=torch.zeros(40, 40, dtype=torch.int32)), f"{DAMAGED}`hidden`: its U is of torch.int32"),
    (in_layer(U=torch.zeros(41, 40)), r"does not fit the model: U of `hidden` is \(41, 40\) there, \(40, 40\) here"),
    (in_layer(rank=1e30), f"{DAMAGED}`hidden`: its rank is 1e\\+30"),
    (in_layer(rank=10**30), f"{DAMAGED}`hidden`: its [UsV] has 40 columns for a rank of 10"),
    (in_layer(rank=-1), f"{DAMAGED}`hidden`: its rank is -1"),
    (in_layer(form="qr"), f"{DAMAGED}`hidden`: its form is 'qr'"),
    (in_layer(conv_mode="rows"), f"{DAMAGED}`hidden`: its `conv_mode` is 'rows'"),
    (in_state(layers=[1]), f"{DAMAGED}`layers` is a list"),
    (in_state(layers={"hidden": 3}), f"{DAMAGED}`hidden`: it is 3"),
    (in_state(is_finished=None), f"{DAMAGED}`is_finished` is None"),
    (in_state(timeline=[{"step": 3}]), f"{DAMAGED}`timeline` has an entry of another kind"),
    (in_state(cost={"layers": {}}), f"{DAMAGED}`cost` has other fields"),
    (in_state(last_cut="a"), f"{DAMAGED}`last_cut` is 'a'"),
    (
        in_state(lightning_svd=1),
        "has format version 1, this lightning-svd reads version 2: use one that reads version 1",
    ),
    (in_state(lightning_svd="x"), "has format version 'x', this lightning-svd reads version 2"),
]
NO_STATE = "holds the state of a dense training, from which SVD training cannot resume"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file from during a fit, at full rank."""
    folder = tmp_path_factory.mktemp("written")
    ours(folder / ".", schedule=FallToBudget(start=0.8, end=0.9))
    return torch.load(folder / "a.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [*DAMAGES, *((without_state(callbacks), NO_STATE) for callbacks in (None, [], {}, {"SVDTrainingCallback": None}))],
)
def test_a_damaged_state_is_refused_in_one_line_before_anything_changes(damage, message, written, tmp_path):
    checkpoint, path = copy.deepcopy(written), tmp_path / "damaged.ckpt"
    damage(checkpoint)
    torch.save(checkpoint, path)
    model = ValidatedNet(momentum=0.9).double()
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    with pytest.raises(ValueError, match=message) as refused:
        resume(path, model)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    if (damage, message) in DAMAGES[:11]:
        with pytest.raises(ValueError, match=message) as refused:
            load_low_rank(model, path)
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert same_state(model.state_dict(), before)
    assert all(model.get_parameter(name) is p for name, p in parameters.items())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_called_one(share, written, tmp_path):
    path, model = tmp_path / "a.ckpt", ValidatedNet(momentum=0.9).double()
    torch.save(written, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    before = copy.deepcopy(model.state_dict())
    for read in (lambda: load_low_rank(model, path), lambda: resume(path, model)):
        with pytest.raises(ValueError, match="cannot be read as a checkpoint: ") as refused:
            read()
        assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    assert same_state(model.state_dict(), before)
