"""The callback drives a whole fit: what it trains, what it refuses, what it leaves behind."""

import copy
import csv
import itertools
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from models import (
    EMAWeightAveraging,
    SmallMLP,
    SmallNet,
    ValidatedNet,
    data,
    quiet_trainer,
    same_state,
    trained_parameters,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_svd import (
    Alternating,
    FallToBudget,
    Finetune,
    Fisher,
    GrowAndPrune,
    Nested,
    Outputs,
    Regularizer,
    Spectrum,
    SVDLayer,
    SVDTrainingCallback,
    compress,
    decompose,
    svd_layers,
    to_dense,
)
from lightning_svd.layers.matrices import roundoff


def macs(model, batch=2):
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, 1, 8, 8, dtype=next(model.parameters()).dtype))
    return counter.get_total_flops() // 2


def params(model):
    return sum(p.numel() for p in model.parameters())


class Recorder(Callback):
    """Keeps outputs of the model as it was trained, before the callback gives it its final form."""

    def on_train_end(self, trainer, pl_module):
        batch = next(iter(data(dtype=pl_module.dtype)))[0]
        with torch.no_grad():
            self.outputs = pl_module.eval()(batch)
        pl_module.train()


# ------------------------------------------------------------------------------------------------- reaching a target


@pytest.mark.parametrize("net", [SmallNet, SmallMLP])
@pytest.mark.parametrize("conv_mode", ["channel", "spatial", "auto"])
@pytest.mark.parametrize("optimizer", [{"optimizer": "SGD", "momentum": 0.9}, {"optimizer": "AdamW", "lr": 1e-3}])
def test_final_model_costs_what_was_asked_for(net, conv_mode, optimizer):
    model = net(**optimizer)
    dense = macs(model)
    callback = SVDTrainingCallback(target_macs=0.4, conv_mode=conv_mode)
    quiet_trainer(callbacks=[callback]).fit(model, data())
    # From below, and closer than the dearest single rank of these nets, 4 % of their MACs.
    assert 0.36 <= macs(model) / dense <= 0.4
    assert callback.report.macs_ratio == pytest.approx(macs(model) / dense, rel=1e-9)
    assert callback.report.params == params(model)


def test_a_parameter_budget_and_an_energy_threshold_are_met():
    model = SmallNet()
    dense = params(model)
    quiet_trainer(callbacks=[SVDTrainingCallback(target_params=0.3)]).fit(model, data())
    assert 0.28 <= params(model) / dense <= 0.3

    callback = SVDTrainingCallback(energy_threshold=0.8)
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    for layer in callback.report.layers:
        assert layer.form == "dense" or layer.rank <= layer.break_even
    assert callback.report.macs_ratio < 1


def test_target_of_one_prunes_nothing():
    callback = SVDTrainingCallback(target_macs=1.0)
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    assert callback.report.rank_ratio == 1
    assert callback.report.macs_ratio == 1
    assert callback.report.timeline == ()


def test_works_with_no_argument():
    callback = SVDTrainingCallback()
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    assert 0.47 <= callback.report.macs_ratio <= 0.5


@pytest.mark.parametrize("final", ["factored", "dense", "decomposed"])
def test_final_forms_predict_what_was_trained(final):
    model, recorder = SmallNet().double(), Recorder()
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4, final=final), recorder]).fit(
        model, data(dtype=torch.float64)
    )
    with torch.no_grad():
        outputs = model.eval()(next(iter(data(dtype=torch.float64)))[0])
    assert (outputs - recorder.outputs).abs().max() <= roundoff((96, 108), torch.float64) * recorder.outputs.abs().max()
    kinds = {type(module) for module in model.modules()}
    assert any(issubclass(kind, SVDLayer) for kind in kinds) == (final == "decomposed")
    if final == "dense":
        assert model.state_dict().keys() == SmallNet().state_dict().keys()


def test_ranks_fall_and_freeze_where_they_should():
    callback = SVDTrainingCallback(target_macs=0.4, schedule=FallToBudget(start=0.25, end=0.75, cuts=5))
    quiet_trainer(callbacks=[callback], max_epochs=5).fit(SmallNet(), data())
    timeline = callback.report.timeline
    assert 1 < len(timeline) <= 5
    assert all(10 < change.step <= 30 for change in timeline)
    for earlier, later in itertools.pairwise(timeline):
        assert sum(later.ranks.values()) <= sum(earlier.ranks.values())
    assert timeline[-1].macs_ratio == pytest.approx(callback.report.macs_ratio)


@pytest.mark.parametrize(
    ("cuts", "full_rank_as", "allowed"),
    [
        (1, "svd", {14, 24}),
        (3, "svd", {8, 11, 14, 24}),
        (3, "dense", {8, 11, 14, 24}),
    ],
)
def test_svds_are_computed_where_ranks_are_cut_and_nowhere_else_in_training(cuts, full_rank_as, allowed, monkeypatch):
    steps = set()

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            for name in ("svd", "svdvals", "eigh", "qr"):
                monkeypatch.setattr(torch.linalg, name, self.noted(trainer, getattr(torch.linalg, name)))

        def noted(self, trainer, decomposition):
            def note(*args, **kwargs):
                steps.add(trainer.global_step)
                return decomposition(*args, **kwargs)

            return note

    schedule = FallToBudget(start=0.2, end=0.6, cuts=cuts)
    callback = SVDTrainingCallback(schedule=schedule, full_rank_as=full_rank_as)
    quiet_trainer(callbacks=[callback, Watch()], max_epochs=3).fit(SmallNet(), data())
    assert steps == allowed  # at 24 for the report


class Layers(Callback):
    """Keeps what each layer was trained as, before the callback gives it its final form."""

    def on_train_end(self, trainer, pl_module):
        layers = svd_layers(pl_module)
        self.forms = {name: layer.form.name for name, layer in layers.items()}
        self.trained = {name: [p.detach().clone() for p in layer.form.trained] for name, layer in layers.items()}
        self.views = {name: layer.view for name, layer in layers.items()}


def test_after_the_last_cut_layers_train_as_what_they_become():
    seen = Layers()
    callback = SVDTrainingCallback(target_macs=0.4, schedule=FallToBudget(end=0.5), final="factored")
    model = SmallNet(optimizer="SGD", momentum=0.9, weight_decay=0.01).double()
    trainer = quiet_trainer(callbacks=[callback, seen], max_epochs=3)
    trainer.fit(model, data(dtype=torch.float64))
    forms = {layer.name: layer.form for layer in callback.report.layers}
    assert set(forms.values()) == {"factored", "dense"}
    assert seen.forms == {name: "pair" if form == "factored" else "dense" for name, form in forms.items()}
    for name, trained in seen.trained.items():
        if seen.forms[name] == "pair":
            left, right = trained
            first, second = model.get_submodule(name)
            assert torch.equal(first.weight, seen.views[name].first_weight(right))
            assert torch.equal(second.weight, seen.views[name].second_weight(left))
        else:
            assert torch.equal(model.get_submodule(name).weight, trained[0])


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "averaging",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(0.05, swa_epoch_start=2)],
    ids=["EMA", "SWA"],
)
@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
def test_under_averaging_it_trains_exactly_as_without(averaging, full_rank_as):
    """Validation with the average swapped in and out too, before the first cut, between cuts and after the last."""

    class Steps(Callback):
        def on_train_start(self, trainer, pl_module):
            self.weights, self.forms = [], []

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.weights.append({name: p.detach().clone() for name, p in trained_parameters(pl_module).items()})
            self.forms.append({layer.form.name for layer in svd_layers(pl_module).values()})

    def steps(*others):
        model, seen = ValidatedNet(momentum=0.9), Steps()
        torch.manual_seed(2)
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        callback = SVDTrainingCallback(target_macs=0.4, schedule=FallToBudget(end=0.6), full_rank_as=full_rank_as)
        callbacks = [callback, *others, seen]
        quiet_trainer(callbacks=callbacks, max_epochs=5, val_check_interval=2).fit(model, data(), data())
        return seen, model.losses

    alone, losses = steps()
    averaged, same_losses = steps(averaging())
    assert alone.forms == averaged.forms
    assert alone.forms[0] == {full_rank_as} and alone.forms[-1] == {"pair", "dense"}
    assert losses == same_losses
    assert all(same_state(a, b) for a, b in zip(alone.weights, averaged.weights, strict=True))


class At(Callback):
    """Keeps each layer's weight, and what it is trained as, at the end of the batch that makes this step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            names = ["features.0", "features.2", "hidden", "head"]
            layers = {name: pl_module.get_submodule(name) for name in names}
            self.weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
            self.forms = {layer.form.name if isinstance(layer, SVDLayer) else None for layer in layers.values()}


@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"optimizer": "AdamW", "lr": 1e-3, "weight_decay": 0.1},
        {"optimizer": "RMSprop", "lr": 1e-3},
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_as_dense_layers_it_trains_what_the_dense_model_does_until_the_first_cut(options, conv_mode):
    model = SmallNet(**options).double()
    twin, seen, expected = copy.deepcopy(model), At(12), At(12)
    settings = {"max_epochs": 3, "gradient_clip_val": 1.0}
    callback = SVDTrainingCallback(target_macs=0.4, conv_mode=conv_mode, full_rank_as="dense")
    quiet_trainer(callbacks=[seen, callback], **settings).fit(model, data(dtype=torch.float64))
    quiet_trainer(callbacks=[expected], **settings).fit(twin, data(dtype=torch.float64))
    assert seen.forms == {"dense"} and callback.report.timeline[0].step > 12
    for name, weight in expected.weights.items():
        error = (seen.weights[name] - weight).abs().max()
        assert error <= 12 * roundoff((24, 108), torch.float64) * weight.abs().max(), name
    assert 0.36 <= callback.report.macs_ratio <= 0.4


def test_what_was_dense_is_an_svd_from_the_first_cut_on():
    seen = At(14)
    options = {"target_macs": 0.4, "full_rank_as": "dense", "exclude_modules": "head", "importance": "spectrum"}
    callback = SVDTrainingCallback(**options)
    quiet_trainer(callbacks=[callback, seen], max_epochs=3).fit(SmallNet(), data())
    assert seen.forms == {"svd", None}
    # The weight is 0 while there is nothing to act on, and as always after that.
    strengths = dict(callback.report.strengths)
    assert strengths[11] == 0 < strengths[12] and strengths[23] == 0


def test_frozen_layers_stay_as_they_are_among_dense_ones():
    model, seen = SmallNet(), At(12)
    model.hidden.requires_grad_(False)
    before = model.hidden.weight.clone()
    callback = SVDTrainingCallback(target_macs=0.6, exclude_modules="head", full_rank_as="dense")
    quiet_trainer(callbacks=[seen, callback], max_epochs=3).fit(model, data())
    assert seen.forms == {"dense", None}
    assert torch.equal(seen.weights["hidden"], before) and torch.equal(model.hidden.weight, before)


def test_a_fit_that_ends_before_the_first_cut_leaves_the_dense_layers():
    model = SmallNet()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    callback = SVDTrainingCallback(full_rank_as="dense", final="decomposed")
    trainer = quiet_trainer(callbacks=[callback, EarlyStopping("train_loss", stopping_threshold=1e3)])
    with pytest.warns(UserWarning, match="before the last rank cut"):
        trainer.fit(model, data())
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert callback.report.rank_ratio == 1


def test_a_run_that_diverged_is_stopped_at_the_next_cut_with_the_layer():
    class Diverging(SmallNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

    with pytest.raises(ValueError, match="expected finite weights, got"):
        quiet_trainer(callbacks=[SVDTrainingCallback()], max_epochs=1).fit(Diverging(), data())


# ------------------------------------------------------------------------------------------------ what is optimized


def penalty(layer, sparsity_weight):
    """The paper's regularizers as plain formulas for autograd."""
    U, s, V = layer.factors()
    eye = torch.eye(layer.rank, dtype=s.dtype)
    defects = [(factor.mT @ factor - eye).square().sum() for factor in (U, V)]
    return sum(defects) / layer.rank**2 + sparsity_weight * s.abs().sum() / s.square().sum().sqrt()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"optimizer": "Adam", "lr": 1e-3}])
def test_training_equals_a_hand_written_loop_with_the_summed_loss(options, monkeypatch):
    monkeypatch.setattr("lightning_svd.training.regularizers.COLUMNS", 64)  # all columns of a layer in each step
    model = SmallNet(**options).double()
    reference = copy.deepcopy(model)
    decompose(reference)
    layers = svd_layers(reference).values()
    optimizer = reference.configure_optimizers()
    for x, y in data(dtype=torch.float64):
        optimizer.zero_grad()
        loss = F.cross_entropy(reference(x), y) + sum(penalty(layer, 0.02) for layer in layers)
        loss.backward()
        optimizer.step()

    callback = SVDTrainingCallback(
        target_macs=1.0,
        regularizer=Regularizer(sparsity_weight=0.02),
        schedule=FallToBudget(start=1.0, end=1.0, ramp="constant"),  # the one cut comes after the last step
        final="decomposed",
    )
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(model, data(dtype=torch.float64))
    # 8 steps of arithmetic in another order; layers that keep every rank end dense, so compare weights.
    for name, layer in svd_layers(reference).items():
        weight = model.get_submodule(name).weight
        assert (weight - layer.weight).abs().max() <= 8 * roundoff(layer.matrix_shape, torch.float64)


def test_weight_decay_acts_on_singular_values_only():
    model = SmallNet(lr=0.1, weight_decay=0.5).double()
    before = {name: p.detach().clone() for name, p in decomposed(model).named_parameters()}

    class ZeroLoss(SmallNet):
        def training_step(self, batch, batch_idx):
            return 0.0 * super().training_step(batch, batch_idx)

    model.__class__ = ZeroLoss
    kept = Keep()
    callback = SVDTrainingCallback(
        target_macs=1.0,
        regularizer=Regularizer(sparsity=None, orthogonality_weight=0.0),
        schedule=FallToBudget(start=1.0, end=1.0),
    )
    quiet_trainer(callbacks=[kept, callback], max_epochs=1).fit(model, data(dtype=torch.float64))
    assert kept.parameters.keys() == before.keys()
    for name, value in kept.parameters.items():
        decayed = before[name] * (1.0 if name.endswith((".U", ".V")) else (1 - 0.1 * 0.5) ** 8)
        torch.testing.assert_close(value, decayed, rtol=1e-12, atol=1e-15)


class Keep(Callback):
    """Keeps what is trained after each batch; listed first, before a cut."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.parameters = {name: p.detach().clone() for name, p in trained_parameters(pl_module).items()}


def decomposed(model):
    twin = copy.deepcopy(model)
    decompose(twin)
    return twin


def test_the_users_loss_is_not_touched():
    strong = SVDTrainingCallback(
        target_macs=1.0, regularizer=Regularizer(sparsity_weight=100.0), schedule=FallToBudget(ramp="constant")
    )
    model, plain = SmallNet(), SmallNet()
    plain.load_state_dict(model.state_dict())
    quiet_trainer(callbacks=[strong], max_steps=1, max_epochs=-1).fit(model, data())
    quiet_trainer(max_steps=1, max_epochs=-1).fit(plain, data())
    assert model.losses == pytest.approx(plain.losses, rel=1e-5)  # one float32 forward pass in factors


def test_learning_rates_are_the_dense_runs():
    class WithScheduler(SmallNet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=32)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_train_batch_start(self, batch, batch_idx):
            self.rates = [*getattr(self, "rates", []), [group["lr"] for group in self.optimizers().param_groups]]

    dense, ours = WithScheduler(weight_decay=1e-3), WithScheduler(weight_decay=1e-3)
    quiet_trainer().fit(dense, data())
    quiet_trainer(callbacks=[SVDTrainingCallback()]).fit(ours, data())
    assert ours.rates == dense.rates


# ------------------------------------------------------------------------------------------------------- what it costs


def test_costs_are_counted_the_same_from_example_or_first_batch_with_a_sanity_check_or_without():
    class WithExample(SmallNet):
        @property
        def example_input_array(self):
            return torch.zeros(1, 1, 8, 8)

    reports = []
    for net, options, loaders in (
        (WithExample, {}, [data()]),
        (ValidatedNet, {"num_sanity_val_steps": 1}, [data(), data()]),
        (SmallNet, {}, [data()]),
    ):
        callback = SVDTrainingCallback()
        quiet_trainer(callbacks=[callback], max_epochs=1, **options).fit(net(), *loaders)
        reports.append((callback.report.dense_macs, callback.report.dense_params))
    assert reports == [(macs(SmallNet(), batch=1), params(SmallNet()))] * 3


# ----------------------------------------------------------------------------------------------------- what it prints


def test_plan_before_the_first_batch_then_a_line_per_change_then_a_report(caplog):
    class Marker(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                logging.getLogger("lightning.pytorch").info("FIRST BATCH")

    callback = SVDTrainingCallback(exclude_modules=["head"])
    with caplog.at_level(logging.INFO):
        quiet_trainer(callbacks=[callback, Marker()]).fit(SmallNet(), data())
    text = caplog.text
    plan, _, rest = text.partition("FIRST BATCH")
    assert "features.2" in plan and "excluded by `exclude_modules`" in plan
    assert rest.count("SVD training: step") == len(callback.report.timeline) > 0
    assert rest.rstrip().endswith("of the ranks") and "Low-rank model" in rest


def test_report_tells_the_same_as_text_json_markdown_and_html(tmp_path):
    callback = SVDTrainingCallback(exclude_modules=["head"])
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    report = callback.report
    read = json.loads(report.to_json(tmp_path / "report.json"))
    assert read["macs_ratio"] == report.macs_ratio
    assert [layer["name"] for layer in read["layers"]] == [layer.name for layer in report.layers]
    page = report.to_html(tmp_path / "report.html", {"Accuracy": ("91 %", "90 % <b>")}).read_text()
    for layer in report.layers:
        assert layer.name in page and layer.name in report.to_markdown() and layer.name in str(report)
    assert "90 % &lt;b&gt;" in page and "excluded by" in page
    assert report.skipped == (("head", "Linear", "excluded by `exclude_modules`"),)


def test_scalars_reach_every_logger_and_other_callbacks(tmp_path):
    seen = {}

    class Reader(Callback):
        def on_train_end(self, trainer, pl_module):
            seen.update(trainer.callback_metrics)

    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    callback = SVDTrainingCallback(target_macs=0.4)
    quiet_trainer(callbacks=[callback, Reader()], logger=loggers, log_every_n_steps=4).fit(SmallNet(), data())
    expected = {"rank_ratio", "macs_ratio", "params_ratio", "orthogonality_error", "orthogonality_penalty"}
    expected = {f"svd/{name}" for name in expected | {"sparsity_penalty", "sparsity_strength"}}
    assert expected | {"svd_macs", "svd_rank"} <= seen.keys()
    for logger in loggers:
        lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
        rows = [row for row in csv.DictReader(lines) if row["svd/macs_ratio"]]
        ranks = [row for row in csv.DictReader(lines) if row["svd_rank/hidden"]]
        for at_steps in (rows, ranks):
            assert [int(row["step"]) for row in at_steps] == [3, 7, 11, 15, 19, 23, 27, 31]
        assert float(rows[0]["svd/macs_ratio"]) == 1
        assert float(rows[-1]["svd/macs_ratio"]) == pytest.approx(callback.report.macs_ratio)
        for layer in ("features.0", "features.2", "hidden", "head"):
            name = "svd_rank/" + layer.replace(".", "_")
            assert float(ranks[-1][name]) == callback.report.timeline[-1].ranks[layer]
        assert float(rows[-1]["svd/sparsity_strength"]) == 0


def test_an_interval_of_its_own_is_longer_than_the_trainers(tmp_path):
    logger, callback = CSVLogger(tmp_path), SVDTrainingCallback(target_macs=0.4, log_every_n_steps=8)
    quiet_trainer(callbacks=[callback], logger=logger, log_every_n_steps=1).fit(SmallNet(), data())
    rows = [*csv.DictReader(Path(logger.log_dir, "metrics.csv").read_text().splitlines())]
    for name in ("svd/macs_ratio", "svd/sparsity_strength", "svd_rank/hidden"):
        assert [int(row["step"]) for row in rows if row[name]] == [7, 15, 23, 31]
    macs = {int(row["step"]): float(row["svd/macs_ratio"]) for row in rows if row["svd/macs_ratio"]}
    for step, ratio in macs.items():
        cut = [change.macs_ratio for change in callback.report.timeline if change.step <= step + 1]
        assert ratio == pytest.approx(cut[-1] if cut else 1.0)


@pytest.mark.parametrize("schedule", ["fall", "finetune", "alternating", "grow_and_prune"])
def test_other_moments_than_the_schedules(schedule):
    class Often(SVDTrainingCallback):
        def should_prune(self, step):
            return True

    callback = Often(target_macs=0.5, schedule=schedule)
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    assert callback.report.macs_ratio <= 0.5 and not callback.report.warnings


@pytest.mark.filterwarnings("ignore:SVD training. the fit ended at step 32 of 32")
@pytest.mark.parametrize(("moments", "is_met"), [((24, 28), True), ((3, 6, 9), False)])
def test_a_late_moment_is_the_last_and_early_ones_cut_nothing(moments, is_met):
    class Chosen(SVDTrainingCallback):
        def should_prune(self, step):
            return step in moments

    callback = Chosen(target_macs=0.5)
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    assert [change.step for change in callback.report.timeline] == ([24] if is_met else [])
    assert (callback.report.macs_ratio <= 0.5) == is_met == (not callback.report.warnings)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (lambda energies: None, "`choose_ranks` must give a rank for each of features.0, features.2, .*, got None"),
        (lambda energies: {"head": 2}, "`choose_ranks` must give a rank for each of features.0, features.2, .*, got"),
        (lambda energies: dict.fromkeys(energies, 0), "must give `features.0` a rank from 1 to 9, got 0"),
        (lambda energies: dict.fromkeys(energies, 2.5), "must give `features.0` a rank from 1 to 9, got 2.5"),
        (lambda energies: dict.fromkeys(energies, 10), "must give `features.0` a rank from 1 to 9, got 10"),
    ],
)
def test_ranks_of_ones_own_choice_are_checked(chosen, message):
    class Own(SVDTrainingCallback):
        def choose_ranks(self, energies, cost, share=None):
            return chosen(energies)

    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=[Own(target_macs=0.5)]).fit(SmallNet(), data())


def test_a_second_fit_of_layers_that_are_dense_says_that_ranks_grow_again():
    callback, model = SVDTrainingCallback(target_macs=0.5, final="dense"), SmallNet()
    quiet_trainer(callbacks=[callback]).fit(model, data())
    with pytest.warns(UserWarning, match="of low rank and dense, as `final='dense'` asked for.*ranks grow again"):
        quiet_trainer(callbacks=[callback]).fit(model, data())


# ----------------------------------------------------------------------------------------------------- what it refuses


def test_an_example_that_the_model_fails_on_is_refused_before_the_first_batch():
    model = SmallNet()
    model.example_input_array = torch.randn(2, 3)
    with pytest.raises(ValueError, match="`example_input_array`: the model fails on it: RuntimeError: "):
        quiet_trainer(callbacks=[SVDTrainingCallback()]).fit(model, data())
    assert not model.losses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_macs": 35}, r"`target_macs` must be in \(0, 1\], got 35"),
        ({"target_macs": 0}, r"`target_macs` must be in \(0, 1\], got 0"),
        ({"target_params": float("nan")}, "`target_params` must be in"),
        ({"energy_threshold": "0.9"}, "`energy_threshold` must be a float in .* got '0.9'"),
        ({"target_macs": 0.5, "target_params": 0.5}, "give one of `target_macs`, `target_params`, `target_latency`, "),
        ({"conv_mode": "depth"}, "`conv_mode` must be one of 'channel', 'spatial', 'auto', got 'depth'"),
        (
            {"regularizer": "l2"},
            "`regularizer` must be one of 'hoyer', 'hoyer_square', 'l1', 'group_lasso', None or a Regularizer, "
            "got 'l2'",
        ),
        ({"regularizer": {"sparsity": "l1"}}, r"`regularizer` must be one of .*, got \{'sparsity': 'l1'\}"),
        (
            {"schedule": "rise"},
            "`schedule` must be one of 'fall', 'finetune', .* or a RankPolicy, got 'rise'",
        ),
        ({"schedule": None}, "`schedule` must be one of 'fall', 'finetune', .* or a RankPolicy, got None"),
        (
            {"schedule": FallToBudget},
            "`schedule` must be one of 'fall', 'finetune', .* or a RankPolicy, got <class",
        ),
        (
            {"importance": "taylor"},
            "`importance` must be one of 'auto', 'spectrum', 'outputs', 'fisher' or an Importance, got 'taylor'",
        ),
        ({"min_rank": 0}, "`min_rank` must be an integer >= 1, got 0"),
        ({"round_to": 2.0}, '`round_to` must be an integer >= 1, or "auto", got 2.0'),
        ({"final": "pickle"}, "`final` must be one of 'factored', 'dense', 'decomposed', got 'pickle'"),
        ({"log_every_n_steps": 0}, "`log_every_n_steps` must be an integer >= 1, got 0"),
        ({"full_rank_as": "pair"}, "`full_rank_as` must be one of 'auto', 'svd', 'dense', got 'pair'"),
        ({"target_modules": 3}, "`target_modules` must be a name or a pattern, or a list of them, got 3"),
    ],
)
def test_constructor_names_the_argument_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        SVDTrainingCallback(**arguments)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({}, {"schedule": FallToBudget(), "regularizer": Regularizer(), "importance": Fisher()}),
        ({"regularizer": "l1"}, {"regularizer": Regularizer("l1")}),
        ({"schedule": "finetune"}, {"schedule": Finetune(), "importance": Fisher()}),
        ({"schedule": "alternating"}, {"schedule": Alternating()}),
        ({"schedule": "grow_and_prune"}, {"schedule": GrowAndPrune()}),
        ({"schedule": "nested"}, {"schedule": Nested()}),
        ({"importance": "outputs"}, {"importance": Outputs()}),
        ({"regularizer": None}, {"regularizer": Regularizer(None)}),
    ],
)
def test_a_string_asks_for_what_the_object_of_that_name_does(short, long):
    models = []
    for arguments in (short, long):
        torch.manual_seed(0)
        models.append(SmallNet())
        quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4, **arguments)]).fit(models[-1], data())
    assert same_state(models[0].state_dict(), models[1].state_dict())


def test_objects_are_given_once_and_serve_many_runs_unchanged():
    schedule, regularizer = FallToBudget(start=0.25, end=0.75, cuts=5), Regularizer("l1")
    before = copy.deepcopy(vars(schedule))
    callback = SVDTrainingCallback(target_macs=0.4, schedule=schedule, regularizer=regularizer)
    twin = copy.deepcopy(callback)
    timelines = []
    for each in (callback, callback, twin, copy.deepcopy(callback)):
        torch.manual_seed(0)
        quiet_trainer(callbacks=[each]).fit(SmallNet(), data())
        timelines.append(each.report.timeline)
    assert vars(schedule) == before and callback.recipe.schedule is schedule
    assert timelines[0] and all(timeline == timelines[0] for timeline in timelines)


class EveryFew(FallToBudget):
    """With an argument of its own, and one that it keeps under another name."""

    def __init__(self, few, secret=None):
        super().__init__(end=0.9)
        self.few, self._secret = few, secret


def test_the_report_shows_objects_by_their_class_and_their_own_arguments():
    callback = SVDTrainingCallback(
        target_macs=0.4, schedule=FallToBudget(start=0.3), regularizer=Regularizer("l1"), importance=Spectrum()
    )
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    shown = json.loads(callback.report.to_json())["arguments"]
    assert shown["schedule"] == {
        "class": "FallToBudget",
        "start": 0.3,
        "end": 0.7,
        "shape": "cubic",
        "cuts": 20,
        "ramp": "linear",
    }
    assert shown["regularizer"] == {
        "class": "Regularizer",
        "sparsity": "l1",
        "sparsity_weight": 0.0005,
        "orthogonality_weight": 1.0,
        "centralize": False,
    }
    assert shown["importance"] == {"class": "Spectrum"}
    assert shown == json.loads(json.dumps(callback.arguments))
    plain = SVDTrainingCallback(schedule=EveryFew(3)).arguments
    assert plain["schedule"] == {"class": "EveryFew", "few": 3}
    assert (plain["regularizer"], plain["importance"]) == ("hoyer", "auto")


class NoLayers(SmallNet):
    def __init__(self):
        super().__init__()
        self.features = nn.Flatten()
        self.hidden = self.head = nn.Identity()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.features(x)[:, :4] * self.scale


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1, 8, 8), 0


def poisoned():
    model = SmallNet()
    model.hidden.weight.data[3, 4] = float("nan")
    return model


class OptimizerFromConstructor(SmallNet):
    def __init__(self):
        super().__init__()
        self.built = torch.optim.SGD(self.parameters(), lr=0.1)

    def configure_optimizers(self):
        return self.built


class OptimizerOfNothing(SmallNet):
    def configure_optimizers(self):
        return torch.optim.SGD([p for name, p in self.named_parameters() if name.endswith("bias")], lr=0.1)


class OptimizerFromElsewhere(SmallNet):
    """Of parameters that the model does not have."""

    def configure_optimizers(self):
        return torch.optim.SGD(copy.deepcopy(self).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("model", "arguments", "trainer", "loader", "message"),
    [
        (poisoned, {}, {}, data, "`hidden`: expected finite weights, got 1 NaN or infinite of 3840"),
        (SmallNet, {"target_modules": ["nope"]}, {}, data, "`target_modules`: 'nope' matches no layer"),
        (SmallNet, {"exclude_modules": "x.*"}, {}, data, r"`exclude_modules`: 'x.\*' matches no layer"),
        (NoLayers, {}, {}, data, "NoLayers has no layer to factorize"),
        (SmallNet, {"target_macs": 0.01}, {}, data, r"`target_macs` must be at least 0\.\d+ for this model.*got 0.01"),
        (SmallNet, {"target_params": 0.01}, {}, data, r"`target_params` must be at least 0\.\d+ for this model"),
        (SmallNet, {}, {"max_epochs": -1}, data, r"its length, .*stepping_batches` is inf\): pass `max_steps`"),
        (lambda: SmallNet("LBFGS"), {}, {}, data, "does not work with LBFGS"),
        (
            OptimizerOfNothing,
            {},
            {},
            data,
            r"has no layer to factorize \(features.0, .*: no optimizer trains its weight",
        ),
        (OptimizerFromElsewhere, {}, {}, data, "no optimizer trains its weight"),
    ],
)
def test_refuses_before_the_first_step_and_leaves_the_model_as_it_was(model, arguments, trainer, loader, message):
    model = model()
    before, weights = copy.deepcopy(model.state_dict()), {id(p) for p in model.parameters()}
    callback = SVDTrainingCallback(**arguments)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=[callback], **trainer).fit(model, loader())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].nan_to_num(7.0), after[key].nan_to_num(7.0)) for key in before)
    assert weights == {id(p) for p in model.parameters()}
    assert not svd_layers(model)
    assert all(type(layer) in (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten) for layer in leaves(model))


def leaves(model):
    return [module for module in model.modules() if not [*module.children()] and not isinstance(module, nn.Identity)]


def test_an_optimizer_from_the_constructor_trains_the_factors():
    model, same = OptimizerFromConstructor(), SmallNet(lr=0.1)
    same.load_state_dict(model.state_dict())
    for each in (model, same):
        quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4)]).fit(each, data())
    assert same_state(model.state_dict(), same.state_dict())


def test_a_dataset_of_unknown_length_works_with_max_steps():
    loader = DataLoader(Endless(), batch_size=4)
    callback = SVDTrainingCallback()
    quiet_trainer(callbacks=[callback], max_steps=10, max_epochs=-1).fit(SmallNet(), loader)
    assert callback.report.macs_ratio <= 0.5


# ---------------------------------------------------------------------------------------------------- what it leaves


def test_fast_dev_run_leaves_the_model_as_it_was():
    model = SmallNet()
    parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    callback = SVDTrainingCallback()
    quiet_trainer(callbacks=[callback], fast_dev_run=True).fit(model, data())
    assert same_state(model.state_dict(), values)
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert callback.report is None


def test_fast_dev_run_with_a_state_dict_that_leaves_something_out():
    """As people do with a frozen teacher, and say so by ``strict_loading``."""
    model = SmallNet()
    model.teacher, model.strict_loading = nn.Linear(3, 3).requires_grad_(False), False
    model.state_dict = lambda *args, **kwargs: {
        name: value
        for name, value in SmallNet.state_dict(model, *args, **kwargs).items()
        if not name.startswith("teacher")
    }
    before = copy.deepcopy(SmallNet.state_dict(model))
    quiet_trainer(callbacks=[SVDTrainingCallback()], fast_dev_run=True).fit(model, data())
    after = SmallNet.state_dict(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_second_fit_trains_the_low_rank_model_further():
    model, callback = SmallNet(), SVDTrainingCallback(target_macs=0.4)
    quiet_trainer(callbacks=[callback]).fit(model, data())
    report, before, cost = callback.report, copy.deepcopy(model.state_dict()), macs(model)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(model, data())
    assert callback.report is report
    assert macs(model) == cost
    assert model.state_dict().keys() == before.keys() and not same_state(model.state_dict(), before)


def test_a_new_callback_leaves_what_is_low_rank_alone_until_it_is_made_dense():
    model = SmallNet()
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4)]).fit(model, data())
    before, cost = copy.deepcopy(model.state_dict()), macs(model)
    with pytest.raises(ValueError, match=r"at least 0\.\d+ for this model.*low-rank one; `to_dense\(model\)` makes"):
        quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4)]).fit(model, data())
    assert same_state(model.state_dict(), before)
    with pytest.raises(ValueError, match=r"low-rank one; `to_dense\(model\)` makes"):
        compress(model, [torch.randn(8, 1, 8, 8)] * 4, target_macs=0.1, progress=False)
    again = to_dense(model)
    quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.4)]).fit(again, data())
    assert macs(again) == pytest.approx(cost, rel=0.05)


def test_an_early_end_is_said_in_the_report():
    stop = EarlyStopping("train_loss", stopping_threshold=100.0, check_on_train_epoch_end=True)
    callback = SVDTrainingCallback()
    with pytest.warns(UserWarning, match="the fit ended at step 8 of 32.*was not reached"):
        quiet_trainer(callbacks=[callback, stop]).fit(SmallNet(), data())
    assert "was not reached" in callback.report.warnings[0]
    assert "was not reached" in str(callback.report)


def test_an_exception_in_the_middle_leaves_a_usable_model_and_whole_groups():
    class Failing(SmallNet):
        def training_step(self, batch, batch_idx):
            if self.global_step == 20:
                raise RuntimeError("boom")
            return super().training_step(batch, batch_idx)

    model, callback = Failing(weight_decay=0.1), SVDTrainingCallback()
    trainer = quiet_trainer(callbacks=[callback])
    with pytest.raises(RuntimeError, match="boom"):
        trainer.fit(model, data())
    assert len(trainer.optimizers[0].param_groups) == 1
    assert torch.isfinite(model(torch.zeros(2, 1, 8, 8))).all()
    assert callback.report is None
