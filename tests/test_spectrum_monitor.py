"""``SpectrumMonitor``: the values it logs, for which layers and when; the model it watches stays as it is."""

import copy
import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from models import SmallNet, ValidatedNet, data, quiet_trainer, same_state
from test_monitor import Notes
from torch import nn

from lightning_svd import SpectrumMonitor, SVDTrainingCallback, decompose, svd_layers
from lightning_svd.layers.matrices import roundoff
from lightning_svd.lightning.spectrum_monitor import watched_layers

NOTIONS = {
    *("stable_rank", "effective_rank", "energy_rank_90", "energy_rank_95", "energy_rank_99"),
    *("break_even_rank", "numerical_rank"),
}


def fit(monitor, model=None, logger=None, callbacks=(), **options):
    model = model or SmallNet()
    trainer = quiet_trainer(callbacks=[*callbacks, monitor], logger=logger or False, **options)
    trainer.fit(model, data())
    return model


def reference(matrix):
    """By NumPy in float64."""
    (m, n), s = matrix.shape, np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    energies, shares = np.cumsum(s**2) / (s**2).sum(), s / s.sum()
    return {
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "effective_rank": math.exp(-(shares * np.log(shares)).sum()),
        **{f"energy_rank_{share}": int(np.argmax(energies >= share / 100)) + 1 for share in (90, 95, 99)},
        "break_even_rank": next(r for r in range(m * n, -1, -1) if r * (m + n) < m * n),
        "numerical_rank": np.linalg.matrix_rank(matrix) / min(m, n),
    }


def test_the_values_are_those_of_the_weights():
    monitor, notes = SpectrumMonitor(), Notes()
    model = fit(monitor, logger=notes, max_epochs=2, log_every_n_steps=8)
    rows = [(step, row) for step, row in notes.rows if any(key.startswith("layer_") for key in row)]
    assert [step for step, _ in rows] == [0, 8, 16]
    for layer in ("features.0", "features.2", "hidden", "head"):
        matrix = model.get_submodule(layer).weight.detach().flatten(1).numpy()
        expected = reference(matrix)
        logged = {notion: rows[-1][1][f"layer_{notion}/{layer.replace('.', '_')}"] for notion in NOTIONS}
        assert logged == pytest.approx(expected, rel=4 * roundoff((216, 24), torch.float32))
        assert monitor.ranks[layer] == logged
        s = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        assert monitor.spectra[layer].numpy() == pytest.approx(
            s, abs=roundoff(matrix.shape, torch.float32) * float(s[0])
        )
    assert len(rows[-1][1]) == 4 * len(NOTIONS)


def test_of_a_factorized_model_they_are_those_of_the_kept_ranks():
    monitor, notes = SpectrumMonitor(), Notes()
    callback = SVDTrainingCallback(target_macs=0.4, final="decomposed")
    model = fit(monitor, logger=notes, callbacks=[callback], max_epochs=3, log_every_n_steps=8)
    layer = svd_layers(model)["features.2"]
    assert monitor.spectra["features.2"].tolist() == pytest.approx(layer.spectrum(), rel=1e-6)
    assert monitor.spectra["features.2"].numel() == layer.rank < 24
    # Shares are of the full rank of the weight, not of what is left of it.
    assert monitor.ranks["features.2"]["numerical_rank"] == layer.rank / 24
    assert monitor.ranks["features.2"]["break_even_rank"] == (24 * 108 - 1) // (24 + 108)


def test_no_svd_is_computed_for_factorized_layers(monkeypatch):
    model = SmallNet()
    decompose(model)

    def never(*args, **kwargs):
        raise AssertionError("an SVD was computed")

    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, never)
    monitor = SpectrumMonitor()
    fit(monitor, model, max_epochs=1)
    assert monitor.spectra.keys() == svd_layers(model).keys()


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (1, {"max_epochs": 3}, [0, 8, 16, 24]),
        (2, {"max_epochs": 5}, [0, 16, 32, 40]),
        (2, {"max_epochs": 4}, [0, 16, 32]),
        (7, {"max_epochs": 3}, [0, 24]),
        (1, {"max_steps": 11, "max_epochs": -1}, [0, 8, 11]),
    ],
)
def test_it_looks_at_the_start_every_n_epochs_and_at_the_end(every, options, steps):
    notes = Notes()
    fit(SpectrumMonitor(every_n_epochs=every), logger=notes, log_every_n_steps=8, **options)
    assert [step for step, row in notes.rows if "layer_stable_rank/head" in row] == steps


class Looked(Callback):
    """Writes down the random numbers that come next, the modes and the gradients before and after a look."""

    def __init__(self):
        self.seen = []

    def note(self, trainer, pl_module):
        modes = [module.training for module in pl_module.modules()]
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.seen.append((torch.get_rng_state(), np.random.get_state()[1].tolist(), modes, weights))

    on_train_start = on_train_epoch_end = on_train_end = note


def test_it_only_looks():
    class Modes(ValidatedNet):
        def on_train_start(self):
            self.hidden.eval()  # a mode of its own, which nobody may reset

    before, after = Looked(), Looked()
    # An instance for each side: Lightning keeps the callbacks' order.
    model = Modes()
    trainer = quiet_trainer(callbacks=[before, SpectrumMonitor(), after], max_epochs=2)
    trainer.fit(model, data(), data())
    assert len(before.seen) == len(after.seen) == 4
    for one, other in zip(before.seen, after.seen, strict=True):
        assert torch.equal(one[0], other[0]) and one[1:3] == other[1:3] and same_state(one[3], other[3])


@pytest.mark.parametrize("decomposed", [False, True])
def test_weights_do_not_depend_on_it(decomposed):
    def weights(*monitors):
        torch.manual_seed(0)
        model, svd = SmallNet(), [SVDTrainingCallback(target_macs=0.4)] if decomposed else []
        quiet_trainer(callbacks=[*svd, *monitors]).fit(model, data())
        return model.state_dict()

    assert same_state(weights(SpectrumMonitor()), weights())


# --------------------------------------------------------------------------------------------------------------- layers


class Variety(nn.Module):
    """Layers that can be watched and such that cannot."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24)
        self.embedding = nn.Embedding(20, 16)
        self.head = nn.Linear(16, 20)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(4, 8, 3)
        self.thin = nn.Linear(1, 5)
        self.norm = nn.LayerNorm(16)
        self.late = nn.LazyLinear(3)


ATTENTION = [f"encoder.self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj")]
WATCHED = [*ATTENTION, "encoder.linear1", "encoder.linear2", "head", "conv", "grouped", "up", "thin"]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_every_linear_and_convolution_is_watched_those_that_cannot_be_factorized_too():
    layers = watched_layers(Variety())
    assert [layer.name for layer in layers] == WATCHED
    assert not any(layer.skipped for layer in layers)
    shapes = {layer.name: layer.matrix_shape for layer in layers}
    assert (shapes["head"], shapes["conv"], shapes["thin"]) == ((20, 16), (8, 27), (5, 1))
    assert (shapes["grouped"], shapes["up"]) == ((4, 18), (72, 4))


@pytest.mark.parametrize(("mode", "shape"), [("channel", (8, 9)), ("spatial", (24, 3)), ("auto", (24, 3))])
def test_a_convolution_is_seen_as_its_mode_says(mode, shape):
    (layer,) = watched_layers(nn.Sequential(nn.Conv2d(1, 8, 3)), conv_mode=mode)
    assert layer.matrix_shape == shape


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("targets", "excluded", "names"),
    [
        (["linear1", "head"], None, ["encoder.linear1", "head"]),
        (r"encoder\..*", ["linear1"], [*ATTENTION, "encoder.linear2"]),
        (None, r"encoder\..*|thin", ["head", "conv", "grouped", "up"]),
    ],
)
def test_layers_are_chosen_as_in_a_plan_factorized_or_not(targets, excluded, names):
    model = Variety()
    assert [layer.name for layer in watched_layers(model, targets, excluded)] == names
    decompose(model, target_modules=["conv"])
    assert [layer.name for layer in watched_layers(model, targets, excluded)] == names


def test_a_pattern_that_matches_nothing_is_refused_before_the_first_step():
    model = SmallNet()
    with pytest.raises(ValueError, match="`target_modules`: 'hiden' matches no layer"):
        fit(SpectrumMonitor(target_modules=["hiden"]), model)
    assert not model.losses


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no linear layer or convolution to watch"):
        watched_layers(nn.Sequential(nn.Embedding(3, 4)))


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_epochs": 0}, "`every_n_epochs` must be an integer >= 1, got 0"),
        ({"every_n_epochs": 1.5}, "`every_n_epochs` must be an integer >= 1, got 1.5"),
        ({"conv_mode": "rows"}, "`conv_mode` must be one of 'channel', 'spatial', 'auto', got 'rows'"),
        ({"target_modules": 3}, "`target_modules` must be a name or a pattern, or a list of them, got 3"),
        ({"exclude_modules": [3]}, "`exclude_modules` must be a name or a pattern, or a list of them"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        SpectrumMonitor(**arguments)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused_by_name(strategy):
    trainer = types.SimpleNamespace(strategy=strategy())
    with pytest.raises(ValueError, match=f"SpectrumMonitor does not work with {strategy.__name__}, which shards"):
        SpectrumMonitor().on_fit_start(trainer, SmallNet())


class Broken(SmallNet):
    """Two of its weights become infinite after the first epoch, and one comes back."""

    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            self.saved = copy.deepcopy(self.head.weight.data)
            self.hidden.weight.data[0, 0] = math.inf
            self.head.weight.data[0, 0] = math.inf
        elif self.current_epoch == 1:
            self.head.weight.data.copy_(self.saved)

    def training_step(self, batch, batch_idx):
        return None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_layer_that_is_not_finite_is_left_out_with_one_warning():
    notes, monitor = Notes(), SpectrumMonitor()
    with pytest.warns(UserWarning) as caught:
        fit(monitor, Broken(), logger=notes, max_epochs=3, log_every_n_steps=8)
    said = [str(warning.message) for warning in caught if "SpectrumMonitor" in str(warning.message)]
    assert said == ["SpectrumMonitor: `hidden` has no finite spectrum; such layers are left out"]
    rows = [{key.split("/")[1] for key in row if key.startswith("layer_")} for _, row in notes.rows]
    assert all(not math.isnan(value) for _, row in notes.rows for value in row.values())
    assert monitor.spectra.keys() == {"features.0", "features.2", "head"}
    assert {"features_0", "features_2"} in rows


def test_an_svd_that_does_not_converge_is_left_out(monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svdvals", fails)
    monitor = SpectrumMonitor()
    for _ in range(2):  # once in each fit
        with pytest.warns(UserWarning, match="`features.0` has no finite spectrum"):
            fit(monitor, max_epochs=1)
    assert monitor.ranks == {}


def test_it_travels_and_serves_one_fit_after_another():
    monitor = pickle.loads(pickle.dumps(copy.deepcopy(SpectrumMonitor(target_modules=["head"]))))
    fit(monitor, max_epochs=1)
    first = monitor.spectra["head"]
    notes = Notes()
    fit(monitor, logger=notes, max_epochs=1, log_every_n_steps=8)
    assert [step for step, row in notes.rows if "layer_stable_rank/head" in row] == [0, 8]
    assert not torch.equal(monitor.spectra["head"], first)


def test_a_fit_that_resumes_where_another_ended_is_seen_from_its_start(tmp_path):
    monitor, notes, model = SpectrumMonitor(), Notes(), SmallNet()
    trainer = quiet_trainer(callbacks=[monitor], max_epochs=1)
    trainer.fit(model, data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = quiet_trainer(callbacks=[monitor], logger=notes, max_epochs=2, log_every_n_steps=8)
    resumed.fit(model, data(), ckpt_path=tmp_path / "last.ckpt")
    assert [step for step, row in notes.rows if "layer_stable_rank/head" in row] == [8, 16]


class NetForCLI(SmallNet):
    """With typed arguments."""

    def __init__(self, optimizer: str = "SGD"):
        super().__init__(optimizer)


# Lightning's own use of jsonargparse.
@pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4[\s\S]*will be removed in v5")
@pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning")
def test_a_yaml_file_carries_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    arguments = ["--trainer.callbacks=lightning_svd.SpectrumMonitor", "--trainer.callbacks.target_modules=[head]"]
    cli = LightningCLI(
        NetForCLI,
        args=[*arguments, "--trainer.callbacks.every_n_epochs=3", "--trainer.logger=false"],
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, SpectrumMonitor))
    assert (monitor.target_modules, monitor.every_n_epochs) == (["head"], 3)


def test_it_is_lightnings_own_kind():
    assert issubclass(SpectrumMonitor, Callback) and issubclass(SmallNet, LightningModule)
