"""Schedules: where each begins and ends, that none turns back, and when ranks are cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_svd.schedules import SHAPES, cut_steps, progress_between, removal, strength

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
