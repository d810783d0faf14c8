"""Steps at the ranks of many budgets: what a step computes, who sees it, and what comes out at any budget."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from lightning.pytorch.callbacks import Callback
from models import SmallNet, data, quiet_trainer
from test_run import OPTIMIZERS, batches, loop, net
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_svd import (
    Distillation,
    Fisher,
    Nested,
    SVDReport,
    SVDTraining,
    SVDTrainingCallback,
    compress,
    decompose,
    svd_layers,
    to_dense,
    to_factored,
)
from lightning_svd.layers.layer import SVDLayer
from lightning_svd.model.counting import count_costs

FULL = {"a": 64, "b": 10}


def begun(model=None, optimizer="sgd", steps=20, **options):
    model = net() if model is None else model
    options = {"schedule": Nested(start=0.1, budgets=4, share=1.0, cuts=3), "target_macs": 0.4} | options
    return SVDTraining(model, OPTIMIZERS[optimizer](model.parameters()), steps, **options)


def normalized():
    first, *others = net()
    return nn.Sequential(first, nn.BatchNorm1d(10), *others)


class RanksOfCalls:
    """Notes with which ranks each layer computes, call by call."""

    def __init__(self, model):
        self.noted = []
        for module in model.modules():
            if isinstance(module, SVDLayer):
                module.register_forward_pre_hook(lambda layer, _: self.noted.append((layer.svd_name, layer.rank)))


# ---------------------------------------------------------------------------------------------------------- the policy


def planned(total=100, **arguments):
    policy = Nested(**arguments)
    policy.begin(total)
    return policy


def test_ladders_come_at_the_start_and_evenly_until_the_end():
    policy, changes = planned(start=0.2, cuts=4, budgets=3), {}
    for step in range(1, 101):
        if policy.is_due(step):
            changes[step] = policy.change(step, FULL, FULL, lambda relief=0.0: {"a": round(30 * (1 + relief)), "b": 10})
    assert [*changes] == [20, 40, 60, 80, 100]
    assert all(dict(change.ranks) == FULL and not change.final for change in changes.values())
    assert all([rung["a"] for rung in change.ladder] == [30, 40, 50] for change in changes.values())
    assert policy.pending is None and not policy.is_due(100)


@pytest.mark.parametrize("last", [0, 20, 39, 80, 100])
def test_a_resumed_policy_goes_on_as_one_that_was_not_interrupted(last):
    policy = planned(start=0.2, cuts=4)
    policy.resume(last)
    first = next((step for step in range(1, 101) if policy.is_due(step)), None)
    assert first == next((step for step in (20, 40, 60, 80, 100) if step > last), None)


def test_draws_are_of_the_step_and_the_seed_alone_and_as_many_as_asked_for():
    policy, again, other = planned(share=0.6, budgets=5), planned(7, share=0.6, budgets=5), planned(share=0.6, seed=1)
    drawn = [policy.rung(step) for step in range(4000)]
    assert [again.rung(step) for step in reversed(range(4000))] == drawn[::-1]
    assert [other.rung(step) for step in range(100)] != drawn[:100]
    shares = {rung: drawn.count(rung) / len(drawn) for rung in (None, *range(5))}
    expected = {None: 0.4} | dict.fromkeys(range(5), 0.12)
    for rung, share in expected.items():  # five standard deviations
        assert abs(shares[rung] - share) < 5 * math.sqrt(share * (1 - share) / len(drawn))
    assert set(shares) == set(drawn)
    assert {planned(share=0.0).rung(step) for step in range(100)} == {None}
    assert None not in {planned(share=1.0).rung(step) for step in range(100)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budgets": 0}, "`budgets` must be an integer >= 1"),
        ({"share": 1.5}, r"`share` must be in \[0, 1\], got 1.5"),
        ({"start": -1}, r"`start` must be in \[0, 1\], got -1"),
        ({"cuts": 0}, "`cuts` must be an integer >= 1"),
        ({"distill": "yes"}, "`distill` must be True, False or a Distillation, got 'yes'"),
        ({"ramp": "step"}, "`ramp` must be one of"),
        ({"seed": -1}, "`seed` must be an integer >= 0"),
    ],
)
def test_its_constructor_names_the_argument_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Nested(**arguments)


# ------------------------------------------------------------------------------------------------------- a single step


def cut_to(model, ranks):
    """A dense copy of a net whose layers are cut to these ranks by their exact SVDs."""
    twin = to_dense(model)
    with torch.no_grad():
        for name, rank in ranks.items():
            U, s, Vh = torch.linalg.svd(twin.get_submodule(name).weight, full_matrices=False)
            twin.get_submodule(name).weight.copy_(U[:, :rank] * s[:rank] @ Vh[:rank])
    return twin


def test_a_step_computes_exactly_what_the_model_cut_to_its_ranks_does():
    run = begun()
    loop(run.model, run, 8)  # with the second ladder factors are exact again
    ranks = run.step_ranks.drawn = run.ladder[0]
    assert all(rank < run.full_ranks[name] for name, rank in ranks.items())
    (x, y), *_ = batches(1)
    small = cut_to(run.model, ranks)
    whole = to_dense(run.model)(x)
    out = run.model(x)
    assert_same(out, small(x), (12, 10))
    assert not torch.allclose(out, whole, atol=1e-3)
    F.cross_entropy(out, y).backward()
    for name, layer in run.layers.items():
        U, s, V = layer.form.trained
        rank = ranks[name]
        assert all(p.grad[..., :rank].any() and not p.grad[..., rank:].any() for p in (U, s, V))
        # The gradient of the small layer's weight, on its way to the factors.
        small.zero_grad()
        F.cross_entropy(small(x), y).backward()
        G = small.get_submodule(name).weight.grad
        expected = (U.detach()[:, :rank] * (G @ V.detach()[:, :rank])).sum(0)
        assert_same(s.grad[:rank], expected, (12, 10, 32), 256)


def test_who_looks_sees_all_ranks():
    run = begun()
    loop(run.model, run, 3)
    (x, y), *_ = batches(1)
    run.step_ranks.drawn = run.ladder[0]
    whole = copy.deepcopy(run.model.state_dict())
    run.model.eval()
    assert_same(run.model(x), to_dense(run.model)(x), (12, 10))
    run.model.train()
    with torch.no_grad():
        assert_same(run.model(x), to_dense(run.model)(x), (12, 10))
    assert run.ranks() == run.full_ranks
    loss = F.cross_entropy(run.model(x), y)
    assert run.ranks() == run.ladder[0]
    loss.backward()
    run.step_ranks.restore()
    assert all(torch.equal(value, whole[name]) for name, value in run.model.state_dict().items())
    F.cross_entropy(run.model(x), y)
    assert {name: entry["rank"] for name, entry in run.state_dict()["layers"].items()} == run.full_ranks
    F.cross_entropy(run.model(x), y)
    run.abandon()
    assert all(torch.equal(value, whole[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_of_all_ranks(momentum):
    model = normalized()
    norm = model[1]
    norm.momentum = momentum
    run = begun(model)
    loop(run.model, run, 2)  # the first ladder
    (x, y), *_ = batches(1)
    before = {name: value.clone() for name, value in norm.named_buffers()}
    ranks = run.ranks()
    for rung in (None, 0, 2):
        run.step_ranks.drawn = None if rung is None else run.ladder[rung]
        F.cross_entropy(run.model(x), y).backward()
        run.step_ranks.restore()
        assert norm.momentum == momentum and run.ranks() == ranks
        now = {name: value.clone() for name, value in norm.named_buffers()}
        changed = [name for name in ("running_mean", "running_var") if not torch.equal(now[name], before[name])]
        assert changed == ([] if rung is not None else ["running_mean", "running_var"])
        before = now
    if momentum is None:  # of the batches that went through all ranks
        assert norm.num_batches_tracked == 3


def test_a_step_goes_on_after_the_draw_with_all_ranks_for_regularizer_and_optimizer():
    run = begun()
    loop(run.model, run, 3)
    before = {name: [p.detach().clone() for p in layer.form.trained] for name, layer in run.layers.items()}
    loop(run.model, run, 1)
    for name, layer in run.layers.items():
        U, _, V = layer.form.trained
        assert not torch.equal(U[:, -1], before[name][0][:, -1])  # pulled towards orthogonality
        assert not torch.equal(V[:, -1], before[name][2][:, -1])


class Checkpointed(nn.Module):
    """Computes its hidden layer again in the backward pass."""

    def __init__(self, active, reentrant):
        super().__init__()
        self.net, self.active, self.reentrant = net(), active, reentrant

    def forward(self, x):
        if self.active:
            return checkpoint(self.net, x, use_reentrant=self.reentrant)
        return self.net(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_activation_checkpoint_computes_again_at_the_same_ranks(reentrant):
    states = []
    for active in (False, True):
        run = begun(Checkpointed(active, reentrant))
        for x, y in batches(12):
            F.cross_entropy(run.model(x.requires_grad_()), y).backward()
            run.step()
            for each in run.optimizers:
                each.optimizer.zero_grad()
        assert run.ladder
        states.append(run.model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_batches_of_one_accumulated_step_have_one_draw():
    torch.manual_seed(0)
    callback = SVDTrainingCallback(target_macs=0.4, schedule=Nested(budgets=8, share=1.0, start=0.0, cuts=1))
    drawn = []

    class Note(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            ranks = tuple(layer.rank for layer in svd_layers(pl_module).values())
            drawn.append((trainer.global_step, ranks))

        def on_after_backward(self, trainer, pl_module):
            assert all(layer.rank == layer.full_rank for layer in svd_layers(pl_module).values())

    quiet_trainer(callbacks=[callback, Note()], accumulate_grad_batches=4, max_epochs=6).fit(SmallNet(), data())
    by_step = {}
    for step, ranks in drawn:
        by_step.setdefault(step, []).append(ranks)
    assert all(len(each) == 4 and len(set(each)) == 1 for each in by_step.values())
    assert len({each[0] for each in by_step.values()}) > 3


@pytest.mark.parametrize("shares", ["drawn", "never"])
def test_all_passes_of_a_step_use_its_ranks_and_other_steps_all(shares):
    run = begun(schedule=Nested(start=0.1, budgets=4, share=1.0 if shares == "drawn" else 0.0, cuts=3))
    loop(run.model, run, 4)
    ranks = RanksOfCalls(run.model)
    (x, y), *_ = batches(1)
    for _ in range(2):
        F.cross_entropy(run.model(x), y).backward()
    expected = run.step_ranks.drawn or run.full_ranks
    assert (expected == run.full_ranks) == (shares == "never")
    assert ranks.noted == 2 * [*expected.items()]


# --------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("make", [net, normalized])
def test_all_ranks_teach_a_step_with_fewer(make):
    asked = Distillation(temperature=2.0, weight=0.5, kind="logits")
    (x, y), *_ = batches(1)
    gradients, teachers = [], []
    for distill in (False, asked):
        torch.manual_seed(0)
        run = begun(make(), schedule=Nested(start=0.1, budgets=4, share=1.0, cuts=3, distill=distill))
        loop(run.model, run, 2)  # the first ladder: the teacher begins with the step after it
        run.step_ranks.drawn = run.ladder[0]
        noise, seen = torch.get_rng_state(), []
        out = run.model(x)
        assert torch.equal(noise, torch.get_rng_state())
        out.register_hook(seen.append)
        F.cross_entropy(out, y).backward()
        run.step_ranks.restore()
        gradients.append(seen[0])
        teachers.append(to_dense(run.model)(x).detach())
    assert torch.equal(*teachers)
    student = out.detach().requires_grad_()
    kl = F.kl_div(F.log_softmax(student / 2, 1), F.softmax(teachers[0] / 2, 1), reduction="batchmean")
    (expected,) = torch.autograd.grad(0.5 * 4 * kl, student)
    assert_same(gradients[1] - gradients[0], expected, (8, 32), 256)


# ---------------------------------------------------------------------------------------------------------- at the end


@pytest.fixture(scope="module")
def trained():
    """A net after a nested run, and its report."""
    run = begun(optimizer="adamw", steps=80, schedule=Nested(start=0.1, budgets=4, share=0.7, cuts=4))
    loop(run.model, run, 80)
    return run.model, run.finish()


def test_the_model_at_the_end_is_the_dense_one(trained):
    model, report = trained
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert report.macs_ratio == 1.0 and not report.warnings
    (x, y), *_ = batches(1)
    assert (model(x).argmax(1) == y).float().mean() > 0.8


def test_any_budget_has_the_ranks_that_the_report_says_and_costs_what_it_says(trained):
    model, report = trained
    assert [budget.share for budget in report.nested] == pytest.approx([0.4 ** (1 - rung / 4) for rung in range(4)])
    twin = copy.deepcopy(model)
    decompose(twin)
    cost = count_costs(twin, torch.zeros(1, 12))
    for module in (model, twin):
        for budget in report.nested:
            small = to_factored(module, cost, target_macs=budget.share)
            ranks = {n: m[0].out_features if isinstance(m, nn.Sequential) else None for n, m in small.named_children()}
            expected = {n: r if cost.layers[n].pays(r) else None for n, r in budget.ranks.items()}
            assert {n: ranks[n] for n in budget.ranks} == expected
            assert budget.macs_ratio <= budget.share
            assert sum(p.numel() for p in small.parameters()) == round(budget.params_ratio * report.dense_params)
            (x, _), *_ = batches(1)
            assert_same(small(x), cut_to(model, budget.ranks)(x), (12, 10), 256)
    assert SVDReport.from_json(report.to_json()) == report
    assert "trained for 4 budgets from 40.0% up" in str(report)
    rows = [line.replace("|", " ").split() for line in report.to_markdown().split("**Budgets**")[1].splitlines()]
    for budget in report.nested:
        shares = [f"{share:.1%}" for share in (budget.share, budget.macs_ratio, budget.params_ratio)]
        assert [*shares, str(sum(budget.ranks.values()))] in rows


def test_a_budget_of_parameters_needs_no_cost(trained):
    model, _ = trained
    for share in (0.4, 0.6, 1.0):
        small = to_factored(model, target_params=share)
        total = sum(p.numel() for p in model.parameters())
        assert 0.3 * total < sum(p.numel() for p in small.parameters()) <= share * total
    assert [type(module) for module in to_factored(model, target_params=0.7, exclude_modules=["2"])][2] is nn.Linear


def test_an_example_input_is_as_good_as_a_cost(trained):
    model, _ = trained
    twin = copy.deepcopy(model)
    decompose(twin)
    x = torch.zeros(1, 12)
    cost = count_costs(twin, x)
    known = ({"example_input": x}, {"cost": cost})
    for arguments in ({"target_macs": 0.5}, {"target_params": 0.5}, {}):
        by_input, by_cost = (to_factored(twin, **given, **arguments) for given in known)
        assert all(torch.equal(a, b) for a, b in zip(by_input.parameters(), by_cost.parameters(), strict=True))
    assert sum(p.numel() for p in to_factored(model, target_macs=0.5, example_input=x).parameters()) < 218
    with pytest.raises(ValueError, match="give one of `cost`, `example_input`, got both"):
        to_factored(model, cost, target_macs=0.5, example_input=x)


def test_the_page_shows_the_budgets_to_choose_from(trained, tmp_path):
    _, report = trained
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    section = page[page.index("<h2>Budgets to choose from</h2>") :].split("</section>")[0].replace("<wbr>", "")
    assert section.count("<tr>") == 1 + len(report.nested) and "No rank was changed" not in page
    assert all(f"<span>{cell}</span>" in section for budget in report.nested for cell in budget.cells())


def test_compress_takes_a_nested_model_too(trained):
    model, _ = trained
    small, report = compress(model, [x for x, _ in batches(2)], target_macs=0.5, progress=False)
    assert report.ranks.macs_ratio <= 0.5 and sum(p.numel() for p in small.parameters()) < 218


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_macs": 0.5}, "`target_macs` needs `example_input`, or `cost` from `count_costs`, to count MACs by"),
        ({"target_macs": 0.5, "target_params": 0.5}, "give one of `target_macs`, `target_params`, got both"),
        ({"target_params": 1.5}, r"`target_params` must be in \(0, 1\], got 1.5"),
        ({"target_params": 0.01}, "the budget must be at least .* of the dense model's cost, got 0.01"),
        ({"target_params": 0.5, "min_rank": 0}, "`min_rank` must be an integer >= 1, got 0"),
        ({"exclude_modules": ["0"]}, "`exclude_modules` is for a budget: give `target_macs` or `target_params` too"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(trained, arguments, message):
    model = copy.deepcopy(trained[0])
    with pytest.raises(ValueError, match=message):
        to_factored(model, **arguments)
    assert not svd_layers(model)


def test_a_cost_of_other_layers_is_refused(trained):
    model = copy.deepcopy(trained[0])
    decompose(model, exclude_modules=["2"])
    cost = count_costs(model, torch.zeros(1, 12))
    with pytest.raises(ValueError, match="`cost` is of other layers than those that are factorized, see 2"):
        to_factored(trained[0], cost, target_macs=0.5)
    with pytest.raises(ValueError, match="`conv_mode` is for a module without factorized layers"):
        to_factored(model, cost, target_macs=0.5, conv_mode="spatial")


# ------------------------------------------------------------------------------------------------------------- refused


def test_ranks_in_another_order_are_refused_before_anything_changes():
    model = net()
    with pytest.raises(
        ValueError, match=r"`importance` of the schedule Nested must be the layers' own spectra.*Fisher"
    ):
        begun(model, importance=Fisher(1))
    assert not svd_layers(model)


def test_a_choice_of_ones_own_that_knows_no_other_budgets_is_refused():
    model = net()
    with pytest.raises(ValueError, match="`choose_ranks` must take a third argument for the schedule Nested"):
        begun(model, choose_ranks=lambda energies, cost: dict.fromkeys(energies, 3))
    assert not svd_layers(model)
    run = begun(model, choose_ranks=lambda energies, cost, share=None: dict.fromkeys(energies, 3 if share else 2))
    loop(run.model, run, 3)
    assert [rung["0"] for rung in run.ladder] == [2, 3, 3, 3]


def test_a_ladder_of_another_model_is_refused():
    run = begun()
    loop(run.model, run, 3)
    file = io.BytesIO()
    torch.save(run.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    state["ladder"][0]["0"] = 11
    with pytest.raises(ValueError, match="the checkpoint's `ladder` is not of the layers"):
        run.load_state_dict(state)


def test_in_a_pause_every_step_uses_all_ranks():
    from test_guard import Scripted

    torch.manual_seed(0)
    drawn = []

    class Note(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            layers = svd_layers(pl_module).values()
            drawn.append(any(layer.rank < layer.full_rank for layer in layers))

    options = {"monitor": "val_acc", "mode": "max", "max_metric_drop": 0.1}
    callback = SVDTrainingCallback(target_params=0.3, schedule=Nested(start=0.1, share=1.0), **options)
    quiet_trainer(max_epochs=6, callbacks=[Note(), callback]).fit(Scripted(0.9, 0.9, 0.5, 0.9), data(32), data(32))
    assert [(pause.start, pause.end) for pause in callback.report.pauses] == [(12, 16)]
    assert drawn == [False] * 2 + [True] * 10 + [False] * 4 + [True] * 8
