"""Schedules: where each begins and ends, that none turns back, when ranks are cut, and to which."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_svd.training.policies import Change, FallToBudget, RankPolicy
from lightning_svd.training.schedules import SHAPES, cut_steps, progress_between, removal, strength

RAMPS = sorted(set(SHAPES) - {"constant"})
EPS = torch.finfo(torch.float64).eps
exhaustively = settings(max_examples=200, deadline=None, derandomize=True)
shares = st.floats(0, 1)


@pytest.mark.parametrize("shape", RAMPS)
def test_a_ramp_leads_from_nothing_to_everything(shape):
    assert SHAPES[shape](0.0) == 0.0
    assert SHAPES[shape](1.0) == 1.0


def test_constant_is_everything_at_once():
    assert SHAPES["constant"](0.0) == SHAPES["constant"](0.5) == 1.0


@pytest.mark.parametrize(("shape", "halfway"), [("linear", 0.5), ("cosine", 0.5), ("cubic", 0.875)])
def test_shapes_halfway(shape, halfway):
    assert SHAPES[shape](0.5) == pytest.approx(halfway, abs=EPS)


@pytest.mark.parametrize("shape", SHAPES)
@exhaustively
@given(earlier=shares, later=shares)
def test_shapes_never_turn_back(shape, earlier, later):
    earlier, later = sorted((earlier, later))
    # A few roundings of numbers up to 1.
    assert SHAPES[shape](earlier) <= SHAPES[shape](later) + 4 * EPS
    assert 0.0 <= SHAPES[shape](earlier) <= 1.0


@pytest.mark.parametrize(
    ("progress", "start", "end", "expected"),
    [
        (0.0, 0.25, 0.75, 0.0),
        (0.25, 0.25, 0.75, 0.0),
        (0.5, 0.25, 0.75, 0.5),
        (0.75, 0.25, 0.75, 1.0),
        (1.0, 0.25, 0.75, 1.0),
        (0.4, 0.5, 0.5, 0.0),
        (0.5, 0.5, 0.5, 1.0),
        (0.0, 0.0, 0.0, 1.0),
    ],
)
def test_progress_between_is_clamped(progress, start, end, expected):
    assert progress_between(progress, start, end) == expected


@pytest.mark.parametrize("shape", RAMPS)
def test_strength_ramps_up_then_stays_then_is_off(shape):
    at = [strength(progress, 0.5, 0.75, shape) for progress in (0.0, 0.125, 0.25, 0.5, 0.625, 0.75, 1.0)]
    assert at[0] == 0.0
    assert 0.0 < at[1] < at[2] < 1.0
    assert at[3:5] == [1.0, 1.0]
    assert at[5:] == [0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_strength_is_full_at_once_where_nothing_is_left_to_ramp(shape):
    assert strength(0.0, 0.0, 0.5, shape) == 1.0


def test_constant_strength_is_full_from_the_first_step():
    assert strength(0.0, 0.5, 0.75, "constant") == strength(0.6, 0.5, 0.75, "constant") == 1.0
    assert strength(0.75, 0.5, 0.75, "constant") == 0.0


@pytest.mark.parametrize("shape", RAMPS)
def test_removal_begins_after_start_and_is_complete_at_end(shape):
    at = [removal(progress, 0.25, 0.75, shape) for progress in (0.0, 0.2, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert at[:3] == [0.0, 0.0, 0.0]
    assert 0.0 < at[3] < at[4] < 1.0
    assert at[5:] == [1.0, 1.0]


def test_constant_removal_is_a_single_cut_at_start():
    assert removal(0.249, 0.25, 0.75, "constant") == 0.0
    assert removal(0.25, 0.25, 0.75, "constant") == 1.0


def test_cuts_are_evenly_spread_and_the_last_is_at_end():
    assert cut_steps(100, start=0.2, end=0.7, cuts=5) == [30, 40, 50, 60, 70]
    assert cut_steps(100, start=0.2, end=0.7, cuts=1) == [70]


@pytest.mark.parametrize(("total", "expected"), [(1, [1]), (2, [1]), (10, [3, 4, 5, 6, 7])])
def test_a_short_run_has_fewer_cuts(total, expected):
    assert cut_steps(total, start=0.3, end=0.7, cuts=20) == expected


@exhaustively
@given(total=st.integers(1, 5000), bounds=st.tuples(shares, shares), cuts=st.integers(1, 50))
def test_cuts_ascend_within_the_run_to_its_end(total, bounds, cuts):
    start, end = sorted(bounds)
    steps = cut_steps(total, start, end, cuts)
    assert steps == sorted(set(steps))
    assert 1 <= len(steps) <= cuts
    assert steps[0] >= 1 and steps[-1] == max(1, round(end * total))
    # Rounding can merge two cuts only where they are less than two steps apart.
    if (end - start) * total >= 2 * cuts:
        assert len(steps) == cuts


# --------------------------------------------------------------------------------------------------------- the policy

FULL, FINAL = {"a": 64, "b": 10}, {"a": 4, "b": 10}


def falling(start=0.2, end=0.7, shape="linear", cuts=5, ramp="linear", total=100):
    policy = FallToBudget(start=start, end=end, shape=shape, cuts=cuts, ramp=ramp)
    policy.begin(total)
    return policy


def run_through(policy, total=100, choose=lambda step: FINAL, begin=1, ranks=FULL):
    """Every change of a run, by its step."""
    changes, now = {}, dict(ranks)
    for step in range(begin, total + 1):
        if policy.is_due(step):
            changes[step] = policy.change(step, FULL, now, lambda step=step: choose(step))
            now |= changes[step].ranks
    return changes


def test_ranks_fall_along_the_curve_in_cuts_and_then_stay():
    policy = falling()
    assert policy.pending == 70
    changes = run_through(policy)
    assert {step: change.ranks["a"] for step, change in changes.items()} == {30: 52, 40: 40, 50: 28, 60: 16, 70: 4}
    assert all(change.ranks["b"] == 10 for change in changes.values())
    assert [change.final for change in changes.values()] == [False] * 4 + [True]
    assert policy.pending is None and not policy.is_due(100)


def test_ranks_never_rise_again_whatever_is_chosen():
    def choose(step):
        return {"a": 60 if step in (40, 60) else 4, "b": 10}

    ranks = [change.ranks["a"] for change in run_through(falling(), choose=choose).values()]
    assert ranks == sorted(ranks, reverse=True) and ranks[1] == ranks[0]


def test_a_change_that_comes_late_makes_up_for_those_that_were_missed():
    policy = falling()
    assert policy.is_due(55)  # 30, 40 and 50 were missed, in a pause for instance
    assert policy.change(55, FULL, FULL, lambda: FINAL) == Change({"a": 22, "b": 10}, final=False)
    assert not policy.is_due(59) and policy.is_due(60)
    assert policy.change(99, FULL, FULL, lambda: FINAL) == Change(FINAL, final=True)


@pytest.mark.parametrize("last", [0, 29, 30, 45, 70])
def test_a_resumed_policy_goes_on_as_one_that_was_not_interrupted(last):
    whole = run_through(falling())
    policy = falling()
    policy.resume(last)
    ranks = FULL | {name: rank for step, change in whole.items() if step <= last for name, rank in change.ranks.items()}
    assert run_through(policy, begin=last + 1, ranks=ranks) == {s: c for s, c in whole.items() if s > last}


@pytest.mark.parametrize("shape", SHAPES)
@exhaustively
@given(total=st.integers(1, 400), bounds=st.tuples(shares, shares).filter(any), cuts=st.integers(1, 30))
def test_every_policy_ends_at_the_ranks_that_were_chosen(shape, total, bounds, cuts):
    start, end = sorted(bounds)
    changes = run_through(falling(start, end, shape, cuts, total=total), total)
    assert [change.final for change in changes.values()] == [False] * (len(changes) - 1) + [True]
    assert changes[max(changes)].ranks == FINAL and len(changes) <= cuts


def test_its_strength_is_the_schedules():
    policy = falling(0.5, 0.75, ramp="cosine")
    assert [policy.strength(step) for step in range(100)] == [
        strength(s / 100, 0.5, 0.75, "cosine") for s in range(100)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.8}, r"`start` must be <= `end` \(0.7\), got 0.8"),
        ({"start": -0.1}, r"`start` must be in \[0, 1\], got -0.1"),
        ({"end": 1.5}, r"`end` must be in \(0, 1\], got 1.5"),
        ({"start": 0, "end": 0}, r"`end` must be in \(0, 1\], got 0"),
        ({"shape": None}, "`shape` must be one of 'constant', 'linear', 'cosine', 'cubic', got None"),
        ({"cuts": True}, "`cuts` must be an integer >= 1 and <= 1000000, got True"),
        ({"ramp": "step"}, "`ramp` must be one of 'constant', 'linear', 'cosine', 'cubic', None, got 'step'"),
    ],
)
def test_its_constructor_names_the_argument_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        FallToBudget(**arguments)


def test_it_says_what_it_was_built_with_in_a_copy_and_a_pickle_too():
    policy = falling(0.3, 0.6, "cosine", 10, "constant")
    run_through(policy)
    for same in (policy, copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert repr(same) == "FallToBudget(start=0.3, end=0.6, shape='cosine', cuts=10, ramp='constant')"
        assert same == policy and same != FallToBudget() and same.pending is None


def test_a_policy_of_ones_own_must_answer_every_question():
    with pytest.raises(TypeError, match="abstract"):
        RankPolicy()
