"""A small sample of what the scripts in tests/stress do at length, and the page of what came out."""

from pathlib import Path

import constructors

SCRIPTS = Path(__file__).parent / "stress"


def test_malformed_configurations_are_refused_and_valid_ones_are_not():
    tally = constructors.run(malformed=300, valid=100, seed=1)
    assert not tally.faults and tally.tried == 400
