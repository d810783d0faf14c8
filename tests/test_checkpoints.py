"""Every file of a fit opens where this package is not installed, and what cannot work is refused in words."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from models import ValidatedNet, data, quiet_trainer, same_state
from torch import nn

from lightning_svd import SVDTrainingCallback, svd_layers

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
    callback = SVDTrainingCallback(**{"target_macs": 0.4, "sparsify_start": 0.3, "sparsify_end": 0.7} | arguments)
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
STRANGER = """
import sys, torch
from models import ValidatedNet
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
    (folder / "lightning_svd.py").write_text("raise ImportError('not installed here')")
    torch.save((batch()[0], list(paths)), folder / "inputs.pt")
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    command, environment = [sys.executable, "stranger.py"], os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
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
        assert checkpoint["lightning_svd"]["layers"].keys() == {"features.0", "features.2", "hidden", "head"}


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


@pytest.mark.parametrize("final", ["factored", "dense", "decomposed"])
def test_a_file_saved_after_the_fit_opens_too_and_tests_the_same(final, tmp_path):
    model, _, trainer, _ = fit(final=final)
    path = tmp_path / "final.ckpt"
    trainer.save_checkpoint(path)
    with torch.no_grad():
        expected = model(batch()[0])
    for outputs in opened_by_a_stranger([str(path)], tmp_path)[str(path)]:
        assert_same(outputs, expected, LARGEST)
    for p in model.parameters():
        p.data.zero_()
    assert_loss(*trainer.test(model, data(8, dtype=torch.float64), ckpt_path=path, verbose=False), expected)


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
    checkpoint["lightning_svd"]["version"] = 2
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
        (of_the_future, {}, "has format version 2, this lightning-svd reads version 1: update it"),
        (ours, {"exclude_modules": ["head"]}, "other factorised layers, see 'head': resume with the `target_modules`"),
        (ours, {"target_modules": "head|hidden"}, "other factorised layers, see 'features.0', 'features.2': resume"),
        (ours, {"conv_mode": "spatial"}, "other factorised layers, see 'features.0', 'features.2'.*`conv_mode`"),
        (after_the_fit("factored"), {}, "written when its SVD training had finished.*`load_from_checkpoint`"),
        (after_the_fit("decomposed"), {}, "written when its SVD training had finished.*`load_from_checkpoint`"),
        (after_the_fit("dense"), {}, "holds the state of a dense training.*`load_from_checkpoint`"),
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
