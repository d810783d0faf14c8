"""Compressed and full phases in turn: when each begins, and what comes back when ranks do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_guard import fit
from test_run import OPTIMIZERS, batches, keep, loop, net

from lightning_svd import Alternating, FallToBudget, Fisher, SVDTraining
from lightning_svd.layers.matrices import roundoff
from lightning_svd.training.policies import Change

FULL, FINAL = {"a": 64, "b": 10}, {"a": 4, "b": 10}
C, D = "compressed", "full"


def planned(total=100, **arguments):
    policy = Alternating(**arguments)
    policy.begin(total)
    return policy


def phases(policy, total=100, begin=1):
    """Step -> the phase that begins after it, as a run that asks after each step is told."""
    found, now = {}, dict(FULL)
    for step in range(begin, total + 1):
        if policy.is_due(step):
            judges = policy.judges(step)
            change = policy.change(step, FULL, now, lambda: FINAL)
            assert change.ranks == (FINAL if judges else FULL) and change.may_return == (not change.final)
            now, found[step] = change.ranks, C if judges else D
    return found


# ------------------------------------------------------------------------------------------------------------ the plan


def test_its_defaults_are_the_epochs_of_the_paper():
    expected = {10 + 5 * phase: (C, D)[phase % 2] for phase in range(14)} | {85: C}
    assert phases(planned()) == expected
    assert [*expected.values()].count(C) == 8 and expected[75] == D


def test_the_last_cut_is_final():
    policy = planned(cycles=1, start=0.2, last_full=0.3, end=0.9)
    assert policy.pending == 90
    assert policy.change(20, FULL, FULL, lambda: FINAL) == Change(FINAL, final=False, may_return=True)
    assert policy.change(60, FULL, FINAL, lambda: FINAL) == Change(FULL, final=False, may_return=True)
    assert policy.change(90, FULL, FULL, lambda: FINAL) == Change(FINAL, final=True, may_return=False)
    assert policy.pending is None and not policy.is_due(100)


@pytest.mark.parametrize("last", [0, 9, 10, 12, 75, 84, 85])
def test_a_resumed_policy_goes_on_as_one_that_was_not_interrupted(last):
    policy = planned()
    policy.resume(last)
    whole = {step: phase for step, phase in phases(planned()).items() if step > last}
    assert phases(policy, begin=last + 1) == whole


def test_what_comes_late_is_the_phase_that_it_is_by_then():
    policy = planned()
    assert policy.is_due(22) and policy.judges(22)  # cut, back, cut
    assert policy.change(22, FULL, FULL, lambda: FINAL).ranks == FINAL
    assert not policy.is_due(24) and policy.is_due(25)


def test_a_change_that_is_not_due_leaves_the_phase_as_it_is():
    policy = planned()
    assert not policy.judges(3)
    assert policy.change(3, FULL, FULL, lambda: FINAL).ranks == FULL
    assert policy.change(12, FULL, FULL, lambda: FINAL).ranks == FINAL


@settings(max_examples=200, deadline=None, derandomize=True)
@given(total=st.integers(1, 400), cycles=st.integers(1, 30), shares=st.tuples(*[st.floats(0.01, 1)] * 3))
def test_any_plan_ends_compressed_within_the_run(total, cycles, shares):
    start, last_full, end = (share / max(1.0, sum(shares)) for share in shares)
    policy = planned(total, cycles=cycles, start=start, last_full=last_full, end=min(1.0, start + last_full + end))
    found = phases(policy, total)
    assert [*found.values()][-1] == C and max(found) == max(1, min(total, round(policy.end * total)))
    assert [*found] == sorted(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.8}, r"`start` \+ `last_full` must be <= `end` \(0.85\), got 0.8 \+ 0.1"),
        ({"start": -0.1}, r"`start` must be in \[0, 1\], got -0.1"),
        ({"last_full": 0}, r"`last_full` must be in \(0, 1\], got 0"),
        ({"cycles": 0}, "`cycles` must be an integer >= 1"),
        ({"ramp": "step"}, "`ramp` must be one of"),
    ],
)
def test_its_constructor_names_the_argument_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Alternating(**arguments)


# --------------------------------------------------------------------------------------------------------- what returns

# Compressed after steps 2, 6 and 10 of 12, full from 4 and 8.
SCHEDULE = {"start": 2 / 12, "end": 10 / 12, "last_full": 2 / 12, "cycles": 2}


def begun(optimizer="sgd", count=3, **options):
    model = net()
    options = {"schedule": Alternating(**SCHEDULE), "choose_ranks": keep(count)} | options
    return SVDTraining(model, OPTIMIZERS[optimizer](model.parameters()), 12, **options)


def stored(run):
    return [(layer, [p.detach().clone() for p in layer.form.trained]) for layer in run.layers.values()]


def moments(run, p):
    (held,) = run.optimizers
    return [value for value in held.optimizer.state[p].values() if torch.is_tensor(value) and value.ndim]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
def test_returning_ranks_have_their_vectors_and_no_more(optimizer, full_rank_as):
    run = begun(optimizer, full_rank_as=full_rank_as)
    (x, _), *_ = batches(1)
    loop(run.model, run, 2)
    assert run.ranks() == {"0": 3, "2": 3}
    cut = stored(run)
    assert all(layer.form.room == layer.full_rank for layer, _ in cut)
    loop(run.model, run, 1)
    trained = stored(run)
    before = run.model(x)
    change = loop(run.model, run, 1)[0][0]
    assert change is run.timeline[-1] and change.step == 4 and dict(change.ranks) == run.full_ranks
    # The step before it has moved the kept ranks: its outputs are those of the prefix, what came back adds nothing.
    for (layer, then), (_, meanwhile) in zip(cut, trained, strict=True):
        for p, old, late in zip(layer.form.trained, then, meanwhile, strict=True):
            if p is layer.form.parameters["s"]:
                assert not p[3:].any()
            else:
                assert torch.equal(p[:, 3:], old[:, 3:]) and torch.equal(p[:, 3:], late[:, 3:])
            assert not torch.equal(p[..., :3], late[..., :3]) and moments(run, p)
            assert not any(moment[..., 3:].any() for moment in moments(run, p))
            assert all(moment[..., :3].any() for moment in moments(run, p))
    after = run.model(x)
    for layer in run.layers.values():
        layer.form.rank = 3
    allowed = roundoff((12, 10), after.dtype) * float(after.detach().abs().max())
    assert float((run.model(x) - after).detach().abs().max()) <= allowed < float((before - after).detach().abs().max())


def test_after_they_returned_all_ranks_are_trained():
    run = begun()
    loop(run.model, run, 4)
    returned = stored(run)
    loop(run.model, run, 2)
    assert run.ranks() == {"0": 3, "2": 3}  # cut again, by what all ranks carry by now
    run = begun()
    loop(run.model, run, 5)
    for layer, then in zip(run.layers.values(), (values for _, values in returned), strict=True):
        assert layer.rank == layer.full_rank
        assert all((layer.form.parameters["s"][3:] != 0).tolist())
        assert not torch.equal(layer.form.trained[1], then[1])


def test_it_ends_in_small_layers_whose_storage_has_shrunk():
    run = begun()
    loop(run.model, run, 12)
    assert [change.step for change in run.timeline] == [2, 4, 6, 8, 10]
    assert {layer.form.name for layer in run.layers.values()} == {"pair"} and run.ranks() == {"0": 3, "2": 3}
    report = run.finish()
    assert [layer.rank for layer in report.layers] == [3, 3] and report.params_ratio < 1


def test_ranks_judged_by_data_return_too_and_only_cuts_look_at_data():
    run = begun(importance=Fisher(1), full_rank_as="dense")
    observed = []
    for step in range(12):
        observed += [step] if run.evidence.observes else []
        loop(run.model, run, 1)
    assert [change.step for change in run.timeline] == [2, 4, 6, 8, 10]
    assert observed == [1, 5, 9]
    assert all(layer.form.name == "pair" for layer in run.layers.values())


def test_what_was_seen_of_the_data_at_other_ranks_is_forgotten():
    schedule = Alternating(start=2 / 12, end=6 / 12, last_full=1 / 12, cycles=1)
    run = begun(importance=Fisher(2), schedule=schedule)  # back after step 5, cut after 6: it looks at 5 and 6
    loop(run.model, run, 5)
    assert run.ranks() == run.full_ranks and run.evidence.observer.batches == 0 and run.evidence.observes
    loop(run.model, run, 1)
    assert [change.step for change in run.timeline] == [2, 5, 6]


class Impatient(FallToBudget):
    """Takes back what it let go of."""

    def change(self, step, full, now, choose):
        return Change(full if step > 3 else choose(), False)


def test_ranks_that_were_let_go_of_do_not_return():
    run = begun(schedule=Impatient(start=0.0, end=0.5, cuts=2))
    loop(run.model, run, 3)
    assert run.ranks() == {"0": 3, "2": 3}
    with pytest.raises(ValueError, match=r"`schedule` asks for 10 ranks of `0`, of which 3 are stored"):
        loop(run.model, run, 3)
    assert run.ranks() == {"0": 3, "2": 3}


def test_a_metric_that_falls_makes_the_full_phase_longer_and_no_other():
    # 4 steps an epoch: cut after 10, 29 and 43 of 48, full from 19 and 38; the pause moves what comes after it.
    schedule = Alternating(start=0.2, end=0.9, last_full=0.1, cycles=2)
    callback, _ = fit(0.9, 0.9, 0.1, 0.1, 0.1, 0.9, epochs=12, max_metric_drop=0.1, schedule=schedule)
    assert [(pause.start, pause.end) for pause in callback.report.pauses] == [(20, 24)]
    assert [change.step for change in callback.report.timeline] == [10, 19, 33, 42, 47]
