"""Groups of layers at full rank in turn: whose turn it is when, and what the others and the budget do meanwhile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guard import fit
from test_run import OPTIMIZERS, keep, loop, net
from torch import nn

from lightning_svd import Fisher, GrowAndPrune, SVDTraining
from lightning_svd.training.policies import Change

FULL, FINAL = {"a": 64, "b": 40, "c": 10}, {"a": 4, "b": 8, "c": 10}


def planned(total=100, **arguments):
    policy = GrowAndPrune(**arguments)
    policy.begin(total)
    return policy


def turns(policy, total=100, begin=1, full=FULL, final=FINAL):
    """Step -> the layers that are grown after it, as a run finds them that asks after each step."""
    found, now = {}, dict(full)
    for step in range(begin, total + 1):
        if policy.is_due(step):
            change = policy.change(step, full, now, lambda: final)
            assert policy.judges(step) and change.may_return == (not change.final)
            now = dict(change.ranks)
            found[step] = "".join(name for name in now if now[name] == full[name] != final[name])
    assert now == final
    return found


# ------------------------------------------------------------------------------------------------------------ the plan


def test_ranks_fall_to_the_budget_and_groups_grow_in_turn():
    policy = planned(cuts=2, rounds=2, start=0.2)
    assert turns(policy) == {30: "", 40: "a", 45: "b", 50: "", 55: "a", 60: "b", 65: "", 70: ""}
    assert policy.pending is None and not policy.is_due(100)


def test_on_their_way_to_the_budget_ranks_fall_along_the_curve():
    policy = planned(start=0.2, grow=0.4, cuts=2, shape="linear")
    assert policy.change(30, FULL, FULL, lambda: FINAL) == Change({"a": 34, "b": 24, "c": 10}, False, may_return=True)
    now = {"a": 20, "b": 24, "c": 10}
    assert policy.change(30, FULL, now, lambda: FINAL).ranks["a"] == 20


@pytest.mark.parametrize(
    ("layers", "groups", "expected"),
    [
        ("abcde", 1, ["abcde"] * 3),
        ("abcde", 2, ["ab", "cde", "ab"]),
        ("abcde", 3, ["a", "bc", "de", "a"]),
        ("ab", 3, ["a", "b", "a", "b"]),
    ],
)
def test_groups_are_consecutive_layers_as_many_in_each(layers, groups, expected):
    policy = planned(1000, groups=groups, rounds=4)
    found = turns(policy, 1000, full=dict.fromkeys(layers, 9), final=dict.fromkeys(layers, 2))
    grown = [found[step] for step in sorted(found) if step >= 400]
    assert grown[: len(expected)] == expected and len(grown) == 4 * groups + 1 and grown[-1] == ""


def test_who_had_its_turn_may_have_more_and_others_only_fewer():
    policy, wanted = planned(cuts=1), {"a": 20, "b": 5, "c": 9}
    now = dict(policy.change(40, FULL, FULL, lambda: FINAL).ranks)
    assert now == {"a": 64, "b": 8, "c": 10}
    now = dict(policy.change(45, FULL, now, lambda: wanted).ranks)
    assert now == {"a": 20, "b": 40, "c": 9}  # in exchange for ranks of the last one
    assert policy.change(50, FULL, now, lambda: {"a": 30, "b": 12, "c": 9}).ranks == {"a": 20, "b": 12, "c": 10}


@pytest.mark.parametrize("last", [0, 31, 39, 40, 44, 45, 60, 69, 70])
def test_a_resumed_policy_goes_on_as_one_that_was_not_interrupted(last):
    whole, policy = turns(planned()), planned()
    policy.resume(last)
    assert policy.pending == (70 if last < 70 else None)
    if last < 70:
        assert turns(policy, begin=last + 1) == {step: grown for step, grown in whole.items() if step > last}


def test_what_comes_late_is_whose_turn_it_is_by_then():
    assert planned().change(52, FULL, FULL, lambda: FINAL).ranks == FINAL  # of the last group, which ends with all
    assert planned().change(58, FULL, FULL, lambda: FINAL).ranks == FINAL | {"a": 64}
    assert planned().change(80, FULL, FULL, lambda: FINAL) == Change(FINAL, final=True, may_return=False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    total=st.integers(1, 300),
    shares=st.lists(st.floats(0.01, 1), min_size=3, max_size=3).map(sorted),
    counts=st.tuples(*[st.integers(1, 9)] * 3),
)
def test_any_plan_ends_at_the_budget_within_the_run(total, shares, counts):
    arguments = dict(zip(("start", "grow", "end", "cuts", "groups", "rounds"), (*shares, *counts), strict=True))
    found = turns(planned(total, **arguments), total)
    assert max(found) == max(1, min(total, round(arguments["end"] * total))) and [*found] == sorted(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.5}, r"`grow` must be between `start` \(0.5\) and `end` \(0.7\), got 0.4"),
        ({"grow": 0.8}, r"`grow` must be between `start` \(0.3\) and `end` \(0.7\), got 0.8"),
        ({"start": -0.1}, r"`start` must be in \[0, 1\], got -0.1"),
        ({"grow": 0}, r"`grow` must be in \(0, 1\], got 0"),
        ({"end": 2}, r"`end` must be in \(0, 1\], got 2"),
        ({"shape": "step"}, "`shape` must be one of"),
        ({"cuts": 0}, "`cuts` must be an integer >= 1"),
        ({"groups": 0}, "`groups` must be an integer >= 1"),
        ({"rounds": 1.5}, "`rounds` must be an integer >= 1"),
        ({"ramp": "step"}, "`ramp` must be one of"),
    ],
)
def test_its_constructor_names_the_argument_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        GrowAndPrune(**arguments)


# ------------------------------------------------------------------------------------------------------------ in a run

# The budget is met after step 2 of 12; layer "0" is at full rank until 4 and from 6 to 8, layer "2" after it each time.
SCHEDULE = {"start": 2 / 12, "grow": 2 / 12, "end": 10 / 12, "cuts": 1, "groups": 2, "rounds": 2}


def begun(optimizer="sgd", count=3, **options):
    model = net()
    options = {"schedule": GrowAndPrune(**SCHEDULE), "choose_ranks": keep(count)} | options
    return SVDTraining(model, OPTIMIZERS[optimizer](model.parameters()), 12, **options)


def values(layer):
    return {name: p.detach().clone() for name, p in layer.form.parameters.items() if name in layer.form.columns}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
def test_a_layer_that_grows_has_its_old_vectors_and_the_model_computes_what_it_did(optimizer, full_rank_as):
    run, twin = (begun(optimizer, full_rank_as=full_rank_as) for _ in range(2))
    for each in (run, twin):
        loop(each.model, each, 2)
        assert each.ranks() == {"0": 10, "2": 3}
    layer = run.layers["2"]
    cut = values(layer)
    twin.policy.left = []  # it shows what the change finds
    for each in (run, twin):
        loop(each.model, each, 2)
    assert run.ranks() == {"0": 3, "2": 8} and twin.ranks() == {"0": 10, "2": 3}
    assert not layer.form.parameters["s"][3:].any()
    assert all(torch.equal(values(layer)[key][:, 3:], cut[key][:, 3:]) for key in "UV")
    torch.testing.assert_close(layer.weight.clone(), twin.layers["2"].weight.clone())
    (held,) = run.optimizers
    for p in layer.form.trained:
        moments = [value for value in held.optimizer.state[p].values() if torch.is_tensor(value) and value.ndim]
        assert moments and all(m[..., :3].any() and not m[..., 3:].any() for m in moments)
    loop(run.model, run, 1)
    assert (layer.form.parameters["s"] != 0).all()


def test_layers_trade_ranks_and_it_ends_in_small_layers():
    wanted = [{"0": 5, "2": 2}, {"0": 3, "2": 4}, {"0": 4, "2": 4}]
    run = begun(choose_ranks=lambda energies, cost: wanted[min(run.last_cut // 2, 2)])
    loop(run.model, run, 12)
    assert [(change.step, *change.ranks.values()) for change in run.timeline] == [
        *((2, 10, 2), (4, 3, 8), (6, 10, 4), (8, 4, 8), (10, 4, 4))
    ]
    assert {layer.form.name for layer in run.layers.values()} == {"pair"}
    assert [layer.form.room for layer in run.layers.values()] == [4, 4]
    assert [layer.rank for layer in run.finish().layers] == [4, 4]


class Deep(nn.Sequential):
    """Linear layers alike."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(*(nn.Linear(16, 16) for _ in range(4)))


@pytest.mark.parametrize("target", [0.5, 0.3])
def test_between_turns_and_at_the_end_the_model_without_its_grown_layers_meets_the_budget(target):
    model = Deep()
    run = SVDTraining(
        model,
        OPTIMIZERS["adamw"](model.parameters()),
        40,
        target_macs=target,
        schedule=GrowAndPrune(groups=4, start=0.1, grow=0.2),
    )
    x = torch.randn(64, 16)
    for step in range(40):
        (model(x) - x.flip(1)).square().mean().backward()
        run.step()
        run.optimizers[0].optimizer.zero_grad()
        if step >= 8:
            ranks = run.ranks()
            others = {name: min(rank, 1) if rank == 16 else rank for name, rank in ranks.items()}
            assert run.cost.ratio(others, "macs") <= target
            assert sum(rank == 16 for rank in ranks.values()) <= 1
    assert 0.9 * target < run.finish().macs_ratio <= target


def test_ranks_judged_by_data_are_judged_ahead_of_each_turn():
    run = begun(importance=Fisher(1), full_rank_as="dense")
    observed = []
    for step in range(12):
        observed += [step] if run.evidence.observes else []
        loop(run.model, run, 1)
    assert observed == [1, 3, 5, 7, 9]
    assert [change.step for change in run.timeline] == [2, 4, 6, 8, 10] and run.ranks() == {"0": 3, "2": 3}


def test_a_metric_that_falls_makes_a_turn_longer():
    # 4 steps an epoch: turns begin after 10, 18, 26 and 35 of 48 and end after 43; the pause moves what comes after it.
    schedule = GrowAndPrune(start=0.2, grow=0.2, end=0.9, cuts=1, groups=2)
    callback, _ = fit(0.9, 0.9, 0.1, 0.9, 0.9, 0.9, epochs=12, max_metric_drop=0.1, schedule=schedule)
    assert [(pause.start, pause.end) for pause in callback.report.pauses] == [(12, 16)]
    assert [change.step for change in callback.report.timeline] == [10, 22, 30, 39, 47]
