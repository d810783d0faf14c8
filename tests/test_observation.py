"""Ranks judged by data in a fit: what is noted in a few training batches, and cuts by it."""

import copy

import pytest
import torch
from helpers import in_metric_of_data
from lightning.pytorch.callbacks import ModelCheckpoint
from models import SmallNet, data, quiet_trainer, same_state
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_svd import Fisher, Outputs, Spectrum, SVDTraining, SVDTrainingCallback
from lightning_svd.compression.calibration import collect
from lightning_svd.compression.data import CalibrationData
from lightning_svd.layers.matrices import truncate
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import begin
from lightning_svd.training.observation import Listener, Replayer
from lightning_svd.training.policies import FallToBudget, Finetune

INPUTS = 6


class Mixed(nn.Module):
    """Convolutions, attention, a recurrent module, and a layer that is called twice."""

    def __init__(self, rerun=None):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 10, batch_first=True)
        self.twice, self.head = nn.Linear(10, 10), nn.Linear(10, 5)
        self.rerun = rerun

    def middle(self, x):
        return self.grouped(self.conv(x).relu())

    def forward(self, x):
        # A reentrant checkpoint has gradients where its input has.
        x = self.middle(x) if self.rerun is None else checkpoint(self.middle, x, use_reentrant=self.rerun)
        x = x.flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        return self.head(self.twice(self.twice(self.lstm(x)[0][:, -1]).relu()))


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(INPUTS, 3, 9, 9, generator=generator, dtype=torch.float64).requires_grad_(),
            torch.randint(5, (INPUTS,), generator=generator),
        )
        for _ in range(count)
    ]


def noted(model, layers, many):
    observer = Listener(model, layers)
    for batch in many:
        observer.begin_batch()
        with torch.no_grad():  # as a validation does
            model(batch[0])
        loss_of(model, batch).backward()
        observer.end_batch()
        loss_of(model, batch).backward()
    return observer


@pytest.mark.parametrize("rerun", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_what_is_noted_in_training_is_what_a_calibration_collects(rerun):
    torch.manual_seed(0)
    model, many = Mixed().double(), batches(3)
    layers = begin(model, plan(model))
    for layer in layers.values():
        layer.to_svd()
    calibration = CalibrationData(model, [*many, many[0]], 100, loss_of)
    expected = collect(calibration, layers, True, lambda items, _: items)
    assert len(calibration.batches) == 3
    model.rerun = rerun
    observer = noted(model, layers, many)
    assert observer.seen.keys() == expected.keys() == layers.keys() and observer.batches == 3
    for name, mine in observer.seen.items():
        theirs = expected[name]
        assert (mine.inputs, mine.positions) == (theirs.inputs, theirs.positions)
        # The loss is a mean over inputs, and a calibration's a sum.
        factors = {"total": 1, "features": 1, "gradients": INPUTS**2, "squares": INPUTS**2, "tails": INPUTS**2}
        for key, factor in factors.items():
            torch.testing.assert_close(factor * getattr(mine, key), getattr(theirs, key), msg=f"{name} {key}")


@pytest.mark.parametrize("with_gradients", [True, False])
def test_what_is_replayed_is_what_a_calibration_collects_and_leaves_no_trace(with_gradients):
    torch.manual_seed(0)
    model, many = Mixed().double(), batches(1)
    layers = begin(model, plan(model))
    for layer in layers.values():
        layer.to_svd()
    inputs = [x.detach() for x, _ in many]
    expected = collect(CalibrationData(model, inputs, 100), layers, with_gradients, lambda items, _: items, seed=0)
    observer = Replayer(model, layers, with_gradients)
    observer.begin_batch()
    loss_of(model, many[0]).backward()
    parameters = [p for layer in layers.values() for p in layer.form.trained]
    before, state = [p.grad.clone() for p in parameters], torch.get_rng_state()
    observer.end_batch()
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, before, strict=True))
    for name, mine in observer.seen.items():
        assert mine.sums().keys() == expected[name].sums().keys()
        for key, tensor in mine.sums().items():
            torch.testing.assert_close(tensor, expected[name].sums()[key], msg=f"{name} {key}")


class NotDifferentiable(torch.autograd.Function):
    """Has a backward pass once, as for the loss that it was made for."""

    @staticmethod
    def forward(ctx, x):
        ctx.is_made_for = x.requires_grad and NotDifferentiable.works
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if not ctx.is_made_for:
            raise RuntimeError("only in training")
        return gradient

    works = True


def test_a_model_without_gradients_in_evaluation_is_refused_before_the_first_step():
    class Net(nn.Sequential):
        def forward(self, x):
            NotDifferentiable.works = self.training
            return NotDifferentiable.apply(super().forward(x))

    model = Net(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    run = SVDTraining(model, optimizer, 10, target_macs=0.4, schedule="finetune", importance="fisher")
    model(torch.randn(INPUTS, 12)).square().sum().backward()
    with pytest.raises(ValueError, match=r"targets that are drawn .* fails: only in training: give .*targets='given'"):
        run.step()
    run.undo()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class WithCheckpoint(SmallNet):
    """What its layers but the last compute is computed again in the backward pass, in the older way."""

    def encoded(self, x):
        maps = nn.functional.avg_pool2d(self.features(x), 2)
        return self.hidden(maps.flatten(1)).relu()

    def forward(self, x):
        return self.head(checkpoint(self.encoded, x.requires_grad_(), use_reentrant=True))

    def training_step(self, batch, batch_idx):
        # Lightning resumes at the right index and with the first batch of a loader that keeps no state of its own.
        return super().training_step([*data()][batch_idx], batch_idx)


def trained_with_a_checkpoint(folder, resume=None, **arguments):
    """A fit of a net whose gradients no targets but the loss's own can be drawn for."""
    torch.manual_seed(0 if resume is None else 1)
    model, schedule = WithCheckpoint(), FallToBudget(start=0.2, end=0.6, cuts=3)
    callback = SVDTrainingCallback(target_macs=0.4, schedule=schedule, **arguments)
    keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [callback, *([keep] if resume is None else [])]
    quiet_trainer(callbacks=callbacks, enable_checkpointing=resume is None).fit(model, data(), ckpt_path=resume)
    return model, callback.report


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_where_no_targets_can_be_drawn_ranks_are_judged_by_the_loss_that_is_trained(tmp_path):
    model, report = trained_with_a_checkpoint(tmp_path)
    expected, _ = trained_with_a_checkpoint(tmp_path / "given", importance=Fisher(targets="given"))
    assert same_state(model.state_dict(), expected.state_dict())
    assert report.macs_ratio <= 0.4 and not report.warnings
    steps = sorted(int(path.stem.removeprefix("step=")) for path in tmp_path.glob("*.ckpt"))
    for step in steps[:-1]:
        resumed, _ = trained_with_a_checkpoint(tmp_path, tmp_path / f"step={step}.ckpt")
        assert same_state(resumed.state_dict(), model.state_dict()), step
    with pytest.raises(
        ValueError, match=r"gradients are off where features.0, .* is called, .* give .*targets='given'"
    ):
        trained_with_a_checkpoint(tmp_path / "asked", importance="fisher")


def test_what_is_run_again_to_count_costs_is_not_observed():
    """The first batch is both observed and run again, in full and in part."""
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = SVDTraining(model, optimizer, 10, target_macs=0.4, schedule=Finetune(end=0.1))
    x, y = batches(1)[0]
    nn.functional.cross_entropy(model(x.detach().float()), y).backward()
    run.step()
    assert {name: each.inputs for name, each in run.evidence.observer.seen.items()} == dict.fromkeys(run.layers, INPUTS)


def test_without_an_open_batch_nothing_is_noted_and_a_model_keeps_no_hooks():
    model = Mixed().double()
    layers = begin(model, plan(model))
    observer = noted(model, layers, batches(1))
    before = observer.seen["head"].positions
    observer.end_batch()
    loss_of(model, batches(1)[0]).backward()
    assert observer.seen["head"].positions == before and observer.batches == 1
    assert all(layer.watch is None for layer in layers.values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# -------------------------------------------------------------------------------------------------------------- cuts


def trained(model, total, act=lambda run, step: None, rate=1e-3, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), rate)
    run = SVDTraining(model, optimizer, total, **arguments)
    run.begin_batch([optimizer])
    for step, batch in enumerate(batches(total)):
        act(run, step)
        loss_of(model, batch).backward()
        run.step()
        optimizer.zero_grad()
    return run


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize(
    "importance", [Outputs(3), Fisher(3), Fisher(3, targets="given")], ids=["outputs", "fisher", "fisher, given"]
)
def test_a_cut_keeps_the_best_layers_in_the_metric_of_what_was_noted(importance, full_rank_as):
    torch.manual_seed(0)
    model = Mixed().double()
    kept = {}

    def keep(run, step):
        if step == 2:
            kept["layers"] = {name: [f.detach() for f in each.form.left_right()] for name, each in run.layers.items()}

    def cut(run, *arguments):
        seen = copy.deepcopy(run.evidence.observer.seen)
        kept["best"] = {
            name: in_metric_of_data(*kept["layers"][name], seen[name], importance.of_loss).factors for name in seen
        }
        return SVDTraining.cut(run, *arguments)

    def act(run, step):
        keep(run, step)
        run.cut = lambda *arguments: cut(run, *arguments)

    # No rate: the layers are the same in all three steps.
    schedule = Finetune(start=0.0, end=1.0, cuts=1)
    run = trained(
        model, 3, act, 0.0, target_macs=0.4, importance=importance, schedule=schedule, full_rank_as=full_rank_as
    )
    assert run.timeline and run.ratio("macs") <= 0.4
    fell = [name for name, layer in run.layers.items() if layer.rank < layer.full_rank]
    assert len(fell) >= 4
    for name in fell:
        U, s, V = truncate(kept["best"][name], run.layers[name].rank)
        torch.testing.assert_close(run.layers[name].form.matrix(), (U * s.unsqueeze(-2)) @ V.mT, msg=name)


def test_statistics_are_collected_ahead_of_cuts_and_never_else():
    observed = []

    def act(run, step):
        observed.append(run.evidence.observer.is_open)

    schedule = FallToBudget(start=0.25, end=0.75, cuts=2)
    run = trained(Mixed().double(), 20, act, target_macs=0.4, importance=Outputs(2), schedule=schedule)
    cuts = [change.step for change in run.timeline]
    assert cuts == [10, 15]
    assert [step for step, is_observed in enumerate(observed) if is_observed] == [8, 9, 13, 14]
    assert not run.evidence.observer.seen


def test_statistics_of_other_ranks_are_refused_by_name_and_change_nothing():
    model = Mixed().double()
    layers = begin(model, plan(model))
    observer = noted(model, layers, batches(1))
    state = observer.state_dict()
    for key, wrong, said in (
        ("features", torch.zeros(1, 2, 2), r"`features` is \(1, 2, 2\) there"),
        ("squares", torch.zeros(()), r"`squares` is \(\) there"),
        ("total", None, "`total` is missing there"),
    ):
        entry = {k: v for k, v in (state["seen"]["head"] | {key: wrong}).items() if v is not None}
        before = {name: each.total.clone() for name, each in observer.seen.items()}
        with pytest.raises(ValueError, match=f"checkpoint's statistics of `head` are not of this run: {said}"):
            observer.load_state_dict({"batches": 7, "seen": state["seen"] | {"head": entry}})
        assert observer.batches == 1
        assert all(torch.equal(each.total, before[name]) for name, each in observer.seen.items())


class Chosen(SVDTrainingCallback):
    def should_prune(self, step):
        return step == 5

    def on_train_batch_end(self, trainer, *others):
        super().on_train_batch_end(trainer, *others)
        self.ranks = [*getattr(self, "ranks", []), sum(self._run.ranks().values())]


@pytest.mark.filterwarnings("ignore:SVD training. the fit ended at step")  # of the schedule's own cuts none is made
def test_a_cut_that_nobody_foresaw_waits_for_as_many_steps_as_are_wanted():
    # The schedule itself foresees one at the end.
    schedule = FallToBudget(start=0.0, end=1.0, cuts=1)
    callback = Chosen(target_macs=0.4, importance=Fisher(3), schedule=schedule)
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    first, changes = callback.ranks[0], [rank != callback.ranks[0] for rank in callback.ranks]
    assert changes.index(True) == 5 + 3 - 1 and first == max(callback.ranks)


def test_a_cut_waits_while_gradients_are_not_finite():
    model = Mixed().double()
    poisoned = {2, 3}

    def poison(module, args, out):
        if poison.step in poisoned and out.requires_grad:
            out.register_hook(lambda gradient: gradient * torch.inf)

    model.head.register_forward_hook(poison)

    arguments = {"importance": Fisher(2, targets="given"), "schedule": Finetune(start=0.0, end=0.2, cuts=1)}
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    run = SVDTraining(model, optimizer, 20, target_macs=0.4, **arguments)
    run.begin_batch([optimizer])
    for step, batch in enumerate(batches(12)):
        poison.step = step  # as in the first steps of a loss scaler
        loss_of(model, batch).backward()
        for parameter in run.optimizers[0].optimizer.param_groups[0]["params"]:
            if not torch.isfinite(parameter.grad).all():
                parameter.grad.zero_()
        run.step()
        optimizer.zero_grad()
    assert [change.step for change in run.timeline] == [6]


class WithAnotherPart(Mixed):
    def __init__(self):
        super().__init__()
        self.seldom = nn.Linear(10, 10)

    def forward(self, x):
        out = super().forward(x)
        return out + self.head(self.seldom(x.new_ones(len(x), 10))) if self.first else out

    first = True


def test_a_layer_that_no_observed_batch_reaches_is_judged_by_its_weight_and_named():
    model = WithAnotherPart().double()

    def act(run, step):
        model.first = step == 0

    schedule = Finetune(start=0.0, end=0.5, cuts=1)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    run = SVDTraining(model, optimizer, 12, target_macs=0.4, importance=Fisher(2), schedule=schedule)
    run.begin_batch([optimizer])
    for step, batch in enumerate(batches(12)):
        act(run, step)
        loss_of(model, batch).backward()
        run.step()
        optimizer.zero_grad()
    ranks, report = run.ranks(), run.finish()
    assert len(report.warnings) == 2 and report.warnings[1].startswith("lstm: recurrent layers so small")
    assert "1 layer met no data before ranks were cut, judged by weights alone: seldom" in report.warnings[0]
    assert ranks["seldom"] > 1


def test_finetuning_has_no_sparsity_and_ranks_fall_by_what_the_loss_feels():
    callback = SVDTrainingCallback(target_macs=0.4, schedule="finetune")
    assert isinstance(callback.recipe.measure(), Fisher) and isinstance(callback.recipe.policy(), Finetune)
    quiet_trainer(callbacks=[callback]).fit(SmallNet(), data())
    assert {strength for _, strength in callback.report.strengths} == {0.0}
    assert callback.report.timeline[-1].step <= 0.3 * 24 and callback.report.macs_ratio <= 0.4
    by_weights = SVDTrainingCallback(target_macs=0.4, schedule="finetune", importance="spectrum")
    assert not isinstance(by_weights.recipe.measure(), Fisher)


@pytest.mark.parametrize(
    ("arguments", "judged_by"),
    [
        ({"target_macs": 0.25}, Fisher),
        ({"target_params": 0.9}, Fisher),
        ({"target_latency": 0.5}, Fisher),
        ({"energy_threshold": 0.1}, Spectrum),
        ({"energy_threshold": 0.1, "schedule": "finetune"}, Spectrum),
        ({"energy_threshold": 0.1, "importance": "fisher"}, Fisher),
        ({"target_macs": 0.1, "importance": "spectrum"}, Spectrum),
        ({"target_macs": 0.1, "schedule": "alternating"}, Spectrum),
        ({"target_macs": 0.1, "schedule": "grow_and_prune"}, Fisher),
        ({"target_macs": 0.9, "schedule": "finetune"}, Fisher),
    ],
)
def test_a_budget_is_judged_by_the_loss_unless_something_else_is_said(arguments, judged_by):
    assert type(SVDTrainingCallback(**arguments).recipe.measure()) is judged_by


# Dynamo's own, as in `test_compile.py`.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "kind", [Listener, lambda model, layers: Replayer(model, layers, True)], ids=["given", "drawn"]
)
def test_a_compiled_network_is_observed_all_the_same(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)).double()
    x = torch.randn(INPUTS, 12, dtype=torch.float64)
    seen = []
    for model in (nn.Sequential(net), nn.Sequential(torch.compile(copy.deepcopy(net), backend="eager"))):
        layers = begin(model, plan(model))
        for layer in layers.values():
            layer.to_svd()
        observer = kind(model, layers)
        model(x).sum().backward()
        observer.begin_batch()
        model(x).square().sum().backward()
        observer.end_batch()
        model(x).sum().backward()
        seen.append([*observer.seen.values()])
    for plain, compiled in zip(*seen, strict=True):
        assert plain.positions == compiled.positions == INPUTS
        for key, tensor in compiled.sums().items():
            torch.testing.assert_close(tensor, plain.sums()[key])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_module_is_left_as_it_was_found():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12))
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    run = SVDTraining(model, optimizer, 6, target_macs=0.4, importance=Fisher(2), schedule=Finetune(end=0.5))
    run.begin_batch([optimizer])
    for _ in range(6):
        model(torch.randn(INPUTS, 12)).square().sum().backward()
        run.step()
        optimizer.zero_grad()
    assert run.timeline and run.ratio("macs") <= 0.4
    assert model._compiled_call_impl is compiled


@pytest.mark.parametrize("targets", ["drawn", "given"])
def test_the_last_step_cuts_by_what_there_is(targets):
    """A run that is too short to observe as many batches as were asked for is cut all the same."""
    callback = SVDTrainingCallback(target_macs=0.4, importance=Fisher(steps=3, targets=targets))
    quiet_trainer(callbacks=[callback], max_epochs=None, max_steps=2).fit(SmallNet(), data())
    assert callback.report.macs_ratio <= 0.4 and not callback.report.warnings
