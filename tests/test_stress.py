"""A small sample of what the scripts in tests/stress do at length, and the page of what came out there."""

import inspect
from pathlib import Path

import constructors
import damage
import kills
import not_finite
import processes
import pytest
import reliability

from lightning_svd.writing import whole_file, write_whole

pytestmark = [
    # Lightning's own: a resumed Trainer need not write files, nor has a dataset in order any state to restore.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def test_malformed_configurations_are_refused_and_valid_ones_are_not():
    tally = constructors.run(malformed=300, valid=100, seed=1)
    assert not tally.faults and tally.tried == 400


@pytest.mark.parametrize("name", [name for name in constructors.CONSTRUCTORS if name != "compress"])
def test_every_argument_is_tried(name):
    constructor, kinds, _ = constructors.CONSTRUCTORS[name]
    assert inspect.signature(constructor).parameters.keys() == kinds.keys()


def test_damaged_files_leave_the_model_as_it_was():
    tally, files = damage.run(each=3, seed=1)
    assert not tally.faults and files == 24


@pytest.mark.parametrize("way", sorted(damage.PLANS))
def test_a_plan_that_is_none_is_refused_in_a_line(way, tmp_path):
    path, model = tmp_path / "plan.yaml", damage.net()
    path.write_text(damage.PLANS[way], encoding="utf-8")
    came, message = damage.outcome(damage.READERS["plan"]["`read_plan`"], path, model)
    assert came == damage.REFUSED, message


def test_what_a_killed_run_goes_on_to_has_the_same_bits():
    tally = kills.Tally([kills.SAME])
    kills.try_runs(tally, ["AdamW"], steps=[11])
    assert not tally.faults and tally.tried == 1


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated")  # torch's own, for its compiler
def test_what_killed_processes_go_on_to_has_the_same_bits_in_each():
    import sharded_kills  # skips where torch has no fully_shard

    steps = [3, 9, 11, 14]  # of full, of falling and of final ranks: right after the last cut, and later
    tally = sharded_kills.run(steps, ["2 processes, uneven shards, files"])
    assert not tally.faults and tally.tried == len(steps)


def test_killed_writers_and_full_disks_leave_the_old_file_or_the_new_one():
    tally = kills.Tally([kills.OLD, kills.NEW, kills.REFUSED])
    kinds = [kind for kind in kills.all_kinds() if kind.name in ("checkpoint", "plan")]
    kills.try_writers(tally, 2, kinds=kinds)
    kills.try_full_disks(tally, 4, kinds=kinds)
    assert not tally.faults and tally.tried == 12


OF_PROCESSES = [
    "an exception in the first training_step, in the last",
    "NaN in a weight, by data, in the last",
    "killed in a cut, in the first",
    "an exception in a cut that cannot be sent, in the last",
    "the pass that is run again fails, in the last",
    "other layers are left out, in the first",
    "another schedule, in the last",
    "an argument that is refused, in the last",
    "layers of other names, in the last",
    "a metric of process 0 alone",
    "a loop, no_sync",
    "fewer batches, in the last",
    "fewer batches, a loop in Join, before a cut, in the last",
    "fewer batches, a loop in Join, before a cut, by data, in the last",
]


@pytest.mark.parametrize("name", OF_PROCESSES)
def test_processes_of_which_one_goes_wrong_end_with_the_same_bits_or_soon(name):
    tally = processes.run([2], [name])
    assert not tally.faults and tally.tried == 1


@pytest.mark.parametrize("name", sorted(not_finite.SITUATIONS))
def test_what_is_not_finite_is_said_in_a_line_and_no_rank_is_chosen_by_it(name):
    came, said = not_finite.outcome(name)
    assert came == not_finite.SITUATIONS[name][1], said


def test_a_link_stays_one_and_permissions_stay(tmp_path):
    path, link = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_whole(link, "new")
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640
    assert {*tmp_path.iterdir()} == {path, link}


def test_what_is_interrupted_leaves_nothing_beside_the_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as beside:
        Path(beside).write_text("half of it")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("where", ["", "nowhere/a.txt"])
def test_what_cannot_be_written_is_named(where, tmp_path):
    with pytest.raises(OSError, match=r"cannot be written \(") as refused:
        write_whole(tmp_path / where, "text")
    assert str(tmp_path / where) in str(refused.value) and "\n" not in str(refused.value)


def test_the_page_is_what_the_results_say():
    said = reliability.PAGE.read_text(encoding="utf-8")
    assert said == reliability.page(), "run `python tests/stress/reliability.py`"
