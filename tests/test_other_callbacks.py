"""Beside other callbacks, in Trainers with other options, on models of other kinds, and when something goes wrong."""

import copy
import csv
import pickle
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from helpers import counted_macs
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from models import EMAWeightAveraging, SmallMLP, SmallNet, ValidatedNet, data, quiet_trainer, same_state
from packaging.version import Version
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader

from lightning_svd import FallToBudget, SVDTrainingCallback, svd_layers
from lightning_svd.layers.matrices import roundoff

IMAGES = torch.zeros(2, 1, 8, 8)


def ours(**arguments):
    return SVDTrainingCallback(**({"target_macs": 0.4} | arguments))


def macs(model):
    return counted_macs(model, IMAGES.to(next(model.parameters()).dtype))


def assert_budget_met(model, dense=None, target=0.4):
    """The final model costs what was asked for, and not much less."""
    ratio = macs(model) / macs(dense or type(model)())
    assert 0.85 * target <= ratio <= target


def fit(model, *callbacks, **options):
    trainer = quiet_trainer(callbacks=list(callbacks), **options)
    trainer.fit(model, data(dtype=next(model.parameters()).dtype))
    return trainer


# -------------------------------------------------------------------------------------------------------- averaging


class OwnAverage(Callback):
    """The average of the weights by a formula of its own, and which ranks are in use at the end."""

    def __init__(self, update, moment, start):
        self.update, self.start, self.count, self.average = update, start, 0, {}
        setattr(self, moment, self.note)

    def note(self, trainer, pl_module, *_):
        if trainer.current_epoch >= self.start:
            values = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            self.count += 1
            self.average = {name: self.update(self.average.get(name, p), p, self.count) for name, p in values.items()}
            self.ranks = {name: layer.rank for name, layer in svd_layers(pl_module).items()}
            self.forms = {name: layer.form.name for name, layer in svd_layers(pl_module).items()}


class ValidatedMLP(SmallMLP, ValidatedNet):
    """Under EMA the average is swapped into the model and out again for each validation."""


AVERAGES = {
    "EMA": (
        lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=24),
        lambda: OwnAverage(lambda average, p, count: 0.9 * average + 0.1 * p, "on_train_batch_end", 3),
    ),
    "SWA": (
        lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=3),
        lambda: OwnAverage(lambda average, p, count: average + (p - average) / count, "on_train_epoch_start", 2),
    ),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize("where", ["after", "before"])
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.combination("Other callbacks", "{average} {where} this one")
@pytest.mark.combination("Other callbacks", '{average} with `full_rank_as="{full_rank_as}"`')
def test_the_final_model_is_the_average_at_the_ranks_that_were_kept(average, where, full_rank_as):
    averaging, own = (make() for make in AVERAGES[average])
    model, callback = (
        ValidatedMLP().double(),
        ours(final="dense", schedule=FallToBudget(end=0.5), full_rank_as=full_rank_as),
    )
    # The own average is taken where the other is: before the ranks are cut after a step, or then.
    callbacks = [own, averaging, callback] if where == "before" else [callback, own, averaging]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=6, val_check_interval=3)
    trainer.fit(model, data(dtype=torch.float64), data(dtype=torch.float64))
    assert own.count > 1 and own.ranks["features.1"] < 48 and "pair" in own.forms.values()
    for name, rank in own.ranks.items():
        U, s, Vh = torch.linalg.svd(own.average[f"{name}.weight"], full_matrices=False)
        nearest = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        expected = nearest if own.forms[name] == "pair" else own.average[f"{name}.weight"]
        weight = model.get_submodule(name).weight
        assert (weight - expected).abs().max() <= roundoff((64, 48), torch.float64) * weight.abs().max()


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "averaging", [lambda: EMAWeightAveraging(), lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)]
)
def test_an_averaged_model_meets_the_budget(averaging):
    model = SmallNet()
    fit(model, ours(), averaging())
    assert_budget_met(model)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("other", [EMAWeightAveraging, lambda: StochasticWeightAveraging(0.05, 2)], ids=["EMA", "SWA"])
@pytest.mark.combination("Other callbacks", "averaging before this one: {id}")
def test_averaging_before_us_works_as_after_us(other):
    model = SmallNet()
    fit(model, other(), ours())
    assert_budget_met(model)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.combination(
    "Other callbacks", "ModelPruning, before this one: {first}", refused="does not work with ModelPruning"
)
def test_pruning_is_refused_wherever_it_stands(first):
    class Pruning(ModelPruning):
        def setup(self, *_, **__):  # before us, Lightning's would look for a `weight` to mask at once
            pass

    both = [Pruning("l1_unstructured", amount=0.5), ours()]
    with pytest.raises(ValueError, match="does not work with Pruning: both change the same weights"):
        fit(SmallNet(), *(both if first else reversed(both)))


# --------------------------------------------------------------------------------------------------- other callbacks


@pytest.mark.combination("Other callbacks", "EarlyStopping, LearningRateMonitor, ModelSummary")
def test_monitors_and_summaries_see_the_model_as_it_is_trained(tmp_path, capsys):
    class Summary(ModelSummary):
        @staticmethod
        def summarize(summary_data, total_parameters, *_, **__):
            Summary.names = dict(summary_data)["Name"]

    logger = CSVLogger(tmp_path)
    model = SmallNet(weight_decay=0.1)
    stop = EarlyStopping("train_loss", patience=100)
    fit(model, ours(), stop, LearningRateMonitor(), Summary(max_depth=2), logger=logger, log_every_n_steps=4)
    assert_budget_met(model)
    assert "features.0" in Summary.names
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rates = [{key: row[key] for key in row if key.startswith("lr-")} for row in csv.DictReader(file)]
    assert {"lr-SGD": "0.05"} in rates and all(rate in ({"lr-SGD": "0.05"}, {"lr-SGD": ""}) for rate in rates)


class Tunable(SmallNet):
    """Says its learning rate and batch size to the tuners."""

    def __init__(self, lr=0.05, **options):
        super().__init__(lr=lr, **options)
        self.lr, self.batch_size = lr, 16

    def train_dataloader(self):
        return DataLoader(data().dataset, self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=0.01)


@pytest.mark.filterwarnings("ignore:.*has been deprecated and will be removed:FutureWarning")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tuner", ["rate", "batch"])
@pytest.mark.combination("Other callbacks", "tuner of the {tuner}, before this one: {first}")
def test_tuners_try_and_the_fit_goes_on(tuner, first):
    if tuner == "rate":
        other = LearningRateFinder(num_training_steps=20, min_lr=0.01, max_lr=0.1, early_stop_threshold=None)
    else:
        other = BatchSizeFinder(max_trials=2, steps_per_trial=2)
    model, callback = Tunable(), ours()
    both = [other, callback] if first else [callback, other]
    quiet_trainer(callbacks=both, enable_model_summary=False).fit(model)
    assert_budget_met(model, SmallNet())
    assert callback.report.timeline
    # Two sizes were tried, 2 and 4; before 2.6 Lightning goes on with the one that it would have tried next.
    sizes = (4,) if Version(lightning.__version__) >= Version("2.6") else (4, 8)
    assert model.lr != 0.05 if tuner == "rate" else model.batch_size in sizes


def test_a_tuners_early_exit_leaves_the_model_as_it_was():
    class Exiting(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            self._early_exit = True
            super().on_fit_start(trainer, pl_module)

    model, callback = Tunable(), ours()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    trainer = quiet_trainer(callbacks=[callback, Exiting(num_training_steps=5, early_stop_threshold=None)])
    trainer.fit(model)
    assert trainer.global_step == 0 or callback.report is None
    assert_as_it_was(model, before, values)
    quiet_trainer(callbacks=[callback], max_epochs=2).fit(model)
    assert_budget_met(model, SmallNet())


class FinetuneLater(BaseFinetuning):
    """The features are frozen until epoch 2."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.features)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.features, optimizer, lr=0.05)


class OnlyTrainable(SmallNet):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, weight_decay=0.01)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.combination("Other callbacks", "BaseFinetuning, before this one: {first}")
def test_layers_frozen_at_first_are_regularized_once_they_train(first):
    class Watching(Callback):
        def __init__(self):
            self.moved = {}

        def on_train_epoch_start(self, trainer, pl_module):
            assert [name for name, _ in pl_module.named_parameters()] == [
                name for name, _ in SmallNet().named_parameters()
            ]
            self.before = pl_module.features[2].weight.detach().clone()

        def on_train_epoch_end(self, trainer, pl_module):
            moved = (pl_module.features[2].weight - self.before).abs().max()
            self.moved[trainer.current_epoch] = bool(moved > 1e-5)  # ranks of a frozen layer are refactorized too

    model, watching = OnlyTrainable(), Watching()
    both = [FinetuneLater(), ours()]
    fit(model, *(both if first else reversed(both)), watching)
    assert watching.moved == {0: False, 1: False, 2: True, 3: True}
    assert_budget_met(model)
    assert all("on_train_epoch_start" not in vars(callback) for callback in both)


class FinetuneOn(FinetuneLater):
    """Thaws again what was trained already when a fit is resumed, which Lightning's leaves frozen."""

    def on_fit_start(self, trainer, pl_module):
        resumed = self._restarting
        super().on_fit_start(trainer, pl_module)
        if resumed and len(trainer.optimizers[0].param_groups) > 1:
            self.make_trainable(pl_module.features)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.combination("Other callbacks", "BaseFinetuning, resumed, before this one: {first}")
def test_a_finetuning_schedule_resumes_exactly(first, tmp_path):
    def run(**resume):
        torch.manual_seed(3)
        model = OnlyTrainable()
        both = [FinetuneOn(), ours(schedule=FallToBudget(start=0.3))]
        save = [] if resume else [ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
        callbacks = [*(both if first else reversed(both)), *save]
        quiet_trainer(callbacks=callbacks, max_epochs=5, enable_checkpointing=not resume).fit(model, data(), **resume)
        return model.state_dict()

    straight = run()
    for epoch in range(4):  # at full rank, while ranks fall, after layers were thawed, at the final ranks
        assert same_state(run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), straight)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.combination("Other callbacks", "BaseFinetuning and averaging, before this one: {first}")
def test_finetuning_beside_averaging_ends_with_the_average(first):
    model, (averaging, own) = OnlyTrainable().double(), (make() for make in AVERAGES["EMA"])
    others = [FinetuneLater(), own, averaging]
    callback = ours(final="dense")
    fit(model, *([*others, callback] if first else [callback, *others]), max_epochs=6)
    for name, rank in own.ranks.items():
        weight = model.get_submodule(name).weight.detach().flatten(1)
        U, s, Vh = torch.linalg.svd(own.average[f"{name}.weight"].flatten(1), full_matrices=False)
        if own.forms[name] == "pair":
            s[rank:] = 0.0
        assert (weight - (U * s) @ Vh).abs().max() <= roundoff((24, 108), torch.float64) * weight.abs().max()


# --------------------------------------------------------------------------------------------------- Trainer options


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled training dataloader shuffling")
@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2},
        {"limit_train_batches": 3},
        {"limit_train_batches": 0.5},
        {"val_check_interval": 2, "num_sanity_val_steps": 0},
        {"val_check_interval": 0.5, "num_sanity_val_steps": -1},
        {"max_steps": 13, "max_epochs": -1},
    ],
    ids=str,
)
@pytest.mark.combination("Trainer", "{options}")
def test_runs_of_other_lengths_and_validations_meet_the_budget(options):
    model = ValidatedNet()
    trainer = quiet_trainer(callbacks=[ours()], **options)
    trainer.fit(model, data(), data())
    assert_budget_met(model)
    assert trainer.validate(model, data(), verbose=False)[0]["val_loss"] > 0


@pytest.mark.parametrize("options", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 0}], ids=str)
@pytest.mark.combination("Trainer", "{options}: nothing is trained, and the next fit is the first")
def test_a_fit_without_batches_leaves_the_model_and_the_next_fit_meets_the_budget(options):
    model, callback = ValidatedNet(), ours()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    quiet_trainer(callbacks=[callback], **options).fit(model, data(), data())
    assert callback.report is None and not svd_layers(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    quiet_trainer(callbacks=[callback]).fit(model, data(), data())
    assert_budget_met(model)


@pytest.mark.parametrize("scheduling", [{1: 4}, {0: 4, 1: 2, 3: 1}, {0: 3}], ids=str)
@pytest.mark.combination("Optimization", "GradientAccumulationScheduler({scheduling})")
def test_accumulation_that_changes_between_epochs_meets_the_budget(scheduling):
    model = SmallNet()
    quiet_trainer(callbacks=[ours(), GradientAccumulationScheduler({**scheduling})]).fit(model, data())
    assert_budget_met(model)


@pytest.mark.combination("Trainer", "`validate` before `fit`")
def test_validating_before_the_fit_changes_nothing():
    model, callback = ValidatedNet(), ours()
    trainer = quiet_trainer(callbacks=[callback])
    weights = dict(model.named_parameters())
    trainer.validate(model, data(), verbose=False)
    assert {id(p) for p in weights.values()} == {id(p) for p in model.parameters()}
    trainer.fit(model, data(), data())
    assert_budget_met(model)


@pytest.mark.combination("Trainer", "one callback, one model after another")
def test_one_callback_trains_one_model_after_another():
    callback = ours()
    for model in (SmallNet(), SmallMLP()):
        fit(model, callback)
        assert_budget_met(model)


# ------------------------------------------------------------------------------------------------- what goes wrong


def assert_as_it_was(model, parameters, values):
    """Nothing of ours is left: layers, hooks, modes, wrapped methods."""
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    assert_nothing_left(model)


def assert_nothing_left(model):
    assert "configure_model" not in vars(model)
    assert _get_current_dispatch_mode() is None
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert torch.isfinite(model(IMAGES)).all()


class Lazy(ValidatedNet):
    """Wrapped by us, since layers may be built there."""

    def configure_model(self):
        pass


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("net", [ValidatedNet, Lazy])
@pytest.mark.parametrize(
    "where",
    ["configure_optimizers", "on_fit_start", "validation_step", "on_train_start", "training_step", "forward"],
)
@pytest.mark.combination("Exceptions", "{error} in `{where}` before the first step: the model is as it was")
def test_whatever_fails_before_the_first_step_the_model_is_as_it_was(where, net, error):
    def fail(*_, **__):
        raise error

    model = net()
    before = dict(model.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    setattr(model, where, fail)
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        quiet_trainer(callbacks=[ours()], num_sanity_val_steps=1).fit(model, data(), data())
    delattr(model, where)
    assert_as_it_was(model, before, values)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["training_step", "validation_step", "on_before_optimizer_step"])
@pytest.mark.combination("Exceptions", "{error} in `{where}` later: the model is usable")
def test_whatever_fails_in_the_middle_the_model_is_usable_and_the_groups_are_whole(where, error):
    class Failing(Lazy):
        pass

    original = getattr(Lazy, where)

    def fail(self, *args):
        if self.global_step >= 16:
            raise error
        return original(self, *args)

    setattr(Failing, where, fail)
    model = Failing(weight_decay=0.1)
    trainer = quiet_trainer(callbacks=[ours()])
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        trainer.fit(model, data(), data())
    assert len(trainer.optimizers[0].param_groups) == 1
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert_nothing_left(model)


# ----------------------------------------------------------------------------------------------------- other models


class BuiltInSetup(SmallNet):
    def setup(self, stage):
        self.hidden = nn.Linear(96, 40)


class BuiltInConfigureModel(SmallNet):
    def configure_model(self):
        if not hasattr(self, "built"):
            self.hidden, self.built = nn.Linear(96, 40), True


class TwoNames(SmallNet):
    def __init__(self):
        super().__init__()
        self.alias = self.hidden

    def forward(self, x):
        maps = F.avg_pool2d(self.features(x), 2)
        return self.head(F.relu(self.alias(maps.flatten(1))))


class ListOfLayers(SmallNet):
    def __init__(self):
        super().__init__()
        self.listed = [self.hidden, self.head]

    def forward(self, x):
        maps = F.avg_pool2d(self.features(x), 2)
        return self.listed[1](F.relu(self.listed[0](maps.flatten(1))))


class UsedTwice(SmallNet):
    def __init__(self):
        super().__init__()
        self.square = nn.Linear(40, 40)

    def forward(self, x):
        hidden = F.relu(self.hidden(F.avg_pool2d(self.features(x), 2).flatten(1)))
        return self.head(F.relu(self.square(F.relu(self.square(hidden)))))


@pytest.mark.parametrize("net", [BuiltInSetup, BuiltInConfigureModel, TwoNames, ListOfLayers, UsedTwice])
@pytest.mark.combination("Models", "{net}")
def test_layers_built_late_or_named_twice_or_listed_or_shared_are_trained_and_shrunk(net):
    class Trained(Callback):
        def on_train_start(self, trainer, pl_module):
            self.before = {name: layer.weight.detach().clone() for name, layer in svd_layers(pl_module).items()}

        def on_train_end(self, trainer, pl_module):
            layers = svd_layers(pl_module)
            self.still = [name for name, W in self.before.items() if torch.allclose(W, layers[name].weight, atol=1e-4)]

    model, callback, trained = net(), ours(), Trained()
    fit(model, callback, trained)
    assert "hidden" in trained.before and trained.still == []
    assert_budget_met(model, net())
    assert callback.report.macs_ratio == pytest.approx(macs(model) / macs(net()), rel=1e-9)


class Tied(SmallNet):
    def __init__(self):
        super().__init__()
        self.hidden, self.again = nn.Linear(96, 40), nn.Linear(40, 40)
        self.tied = nn.Linear(40, 40)
        self.tied.weight = self.again.weight

    def forward(self, x):
        hidden = F.relu(self.hidden(F.avg_pool2d(self.features(x), 2).flatten(1)))
        return self.head(F.relu(self.tied(F.relu(self.again(hidden)))))


@pytest.mark.combination("Models", "tied weights: left alone, and stay tied")
def test_tied_weights_are_left_alone_and_stay_tied():
    model, callback = Tied(), ours(target_macs=0.6)
    fit(model, callback)
    assert model.tied.weight is model.again.weight
    skipped = {layer.name: layer.skipped for layer in callback.plan if layer.skipped}
    assert skipped == dict.fromkeys(["again", "tied"], "weight tied to another module's")
    assert_budget_met(model, Tied(), 0.6)


class Transformer(SmallNet):
    """Rows of the image as a sequence."""

    def __init__(self):
        super().__init__()
        self.features = nn.Linear(8, 32)
        self.hidden = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.hidden(self.features(x.squeeze(1))).mean(1))


class ValidatedTransformer(Transformer, ValidatedNet):
    pass


@pytest.mark.combination("Models", "`nn.TransformerEncoder`, which then computes in evaluation as in training")
def test_a_transformer_is_evaluated_during_and_after_the_fit():
    model = ValidatedTransformer().double()
    quiet_trainer(callbacks=[ours(target_params=0.97, target_macs=None)]).fit(
        model, data(dtype=torch.float64), data(dtype=torch.float64)
    )
    images = next(iter(data(dtype=torch.float64)))[0]
    slow = model.train()(images).detach()  # dropout is 0: training differs in nothing but the path taken
    with torch.no_grad():
        fast = model.eval()(images)
    assert (fast - slow).abs().max() <= roundoff((32, 64), torch.float64) * slow.abs().max()


class AsksForADtype(SmallNet):
    """Reads a layer's weight in its forward, as vision transformers do of their first one."""

    def forward(self, x):
        return super().forward(x.to(self.hidden.weight.dtype))


@pytest.mark.combination("Models", "layers whose weight the model reads itself, which then stay dense")
def test_a_layer_whose_weight_the_model_reads_stays_whole_and_the_budget_is_met_by_the_others():
    model, callback = AsksForADtype(), ours(target_macs=0.4)
    with pytest.warns(UserWarning, match=r"1 layer stays dense \(hidden\): the model needs what only the dense"):
        quiet_trainer(callbacks=[callback]).fit(model, data())
    form = {layer.name: layer.form for layer in callback.report.layers}
    assert "no attribute 'weight'" in {name: reason for name, _, reason in callback.report.skipped}["hidden"]
    assert type(model.hidden) is nn.Linear
    assert 0.35 < callback.report.macs_ratio <= 0.4 and "factored" in form.values()
    assert any("hidden" in warning for warning in callback.report.warnings)
    model(next(iter(data()))[0])


def test_what_looks_at_weights_between_steps_does_not_keep_layers_whole():
    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.features[2].weight.norm()

    model, callback = SmallNet(), ours()
    quiet_trainer(callbacks=[callback, Looks()]).fit(model, data())
    assert {layer.name: layer.form for layer in callback.report.layers}["features.2"] == "factored"


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module.. when there are global hooks")
@pytest.mark.combination("Models", "`torch.compile` of a submodule before, of the model after")
def test_a_submodule_compiled_before_the_fit_trains_and_the_final_model_compiles():
    class Compiled(SmallMLP):
        def __init__(self):
            super().__init__()
            self.features = torch.compile(self.features, backend="eager")

    model = Compiled()
    callback = ours()
    fit(model, callback)
    assert callback.report.macs_ratio <= 0.4
    expected = model(IMAGES)
    compiled = torch.compile(model.features, backend="eager")(IMAGES)
    assert torch.equal(model.head(F.relu(model.hidden(compiled))), expected)
    torch.compiler.reset()


@pytest.mark.combination("Models", "deepcopy and pickle, during and after")
def test_copies_and_pickles_during_and_after_the_fit_are_the_models_own():
    class Copying(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer_of, pl_module._trainer = pl_module._trainer, None  # Lightning's Trainer cannot be pickled
            self.same = [same_outputs(twin, pl_module) for twin in twins(pl_module)]
            pl_module._trainer = trainer_of

    copying = Copying()
    model = BuiltInConfigureModel()
    fit(model, ours(), copying)
    assert copying.same == [True, True]
    model._trainer = None
    assert [same_outputs(twin, model) for twin in twins(model)] == [True, True]


def twins(model):
    return copy.deepcopy(model), pickle.loads(pickle.dumps(model))


def same_outputs(twin, model):
    shared = {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    inputs = torch.ones(2, 1, 8, 8)
    return not shared and torch.allclose(twin(inputs), model(inputs), atol=1e-5)


def test_a_new_callback_on_a_finished_model_makes_it_smaller_still():
    model = SmallNet()
    fit(model, ours(target_macs=0.6))
    first = macs(model)
    fit(model, ours(target_macs=0.8), max_epochs=2)
    assert 0.7 * first <= macs(model) <= 0.8 * first


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_costs_are_read_off_the_first_batch_that_is_not_skipped():
    class SkipsFirst(SmallNet):
        def training_step(self, batch, batch_idx):
            return None if self.global_step == 0 else super().training_step(batch, batch_idx)

    model = SkipsFirst()
    fit(model, ours())
    assert_budget_met(model)
