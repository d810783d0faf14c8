"""A short sample of random networks and events, always the same, and what a long run has found that is no few lines."""

import pytest
import torch
from fuzzing import Case, Machine, Optimizers, ReferenceMachine, expected_warnings, outputs
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from random_models import NAMES, Description, Node

SAMPLE = settings(
    stateful_step_count=12,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes; `make fuzz` does it
    suppress_health_check=[*HealthCheck],
)


@pytest.mark.parametrize(("machine", "networks"), [(Machine, 20), (ReferenceMachine, 20)])
def test_any_network_goes_through_any_events_as_one_that_nothing_happens_to(machine, networks):
    run_state_machine_as_test(machine, settings=settings(SAMPLE, max_examples=networks))


SCHEDULE = (("start", 0.0), ("end", 0.7), ("shape", "linear"), ("cuts", 3), ("ramp", "linear"))


def run_of(track, width, *children, steps=8, machine=Machine, double=True, optimizer="adamw", **arguments):
    """A machine that has begun with a network of these modules in sequence."""
    root = Node("sequential", children=children, names=NAMES[: len(children)])
    network = Description(track, width, root, double, simple=machine.simple)
    run = machine()
    options = tuple({"importance": "spectrum", **(arguments or {"target_params": 0.9})}.items())
    run.start(Case(network, Optimizers(optimizer, fast=True), SCHEDULE, options, steps))
    return run


ATTENTION = Node("attention", (4, 2, True), 0), Node("flat"), Node("linear", (12, 8, True), 1)
LSTM = Node("recurrent", ("LSTM", 4, 3, 1, True, True), 0), Node("flat"), Node("linear", (18, 8, True), 1)


@pytest.mark.parametrize("children", [ATTENTION, LSTM], ids=["attention", "recurrent"])
@pytest.mark.parametrize("share", [0.3, 0.95], ids=["as pairs", "dense again"])
def test_modules_of_several_weights_are_resumed_after_each_step(children, share):
    run = run_of("sequence", 4, *children, energy_threshold=share)
    for _ in range(8):
        run.happens(("step", 1, "none", False))
        run.resume_here()
    run.finish()


LINEARS = Node("linear", (6, 9, True), 0), Node("activation", ("tanh",), 1), Node("linear", (9, 8, False), 2)


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
def test_every_step_is_that_of_the_reference(full_rank_as, optimizer):
    run = run_of(
        "vector",
        6,
        *LINEARS,
        machine=ReferenceMachine,
        optimizer=optimizer,
        full_rank_as=full_rank_as,
        target_params=0.9,
    )
    for clears in ("none", "zeros", "model none", "model zeros") * 2:
        own = clears.removeprefix("model ")
        run.happens(("step", 2, clears, True), ("step", 2, own, True))
    run.finish()


def test_weights_are_loaded_at_any_time_and_a_run_goes_back():
    run = run_of("vector", 6, *LINEARS, machine=ReferenceMachine)
    with expected_warnings():
        for number in range(3):
            run.happens(("load", number))
            run.happens(("step", 1, "none", False))
            run.go_back(2)
            run.happens(("step", 1, "none", False))
    run.finish()


def test_a_recurrent_module_computes_with_the_ranks_in_use_right_after_other_weights_were_loaded():
    run = run_of("sequence", 4, *LSTM, energy_threshold=0.3)
    for _ in range(3):
        run.happens(("step", 1, "none", False))
    assert any(layer.rank < layer.full_rank for layer in run.run.training.layers.values())
    run.happens(("load", 1))
    run.resume_here()
    assert torch.equal(outputs(run.run.model, run.case.network), outputs(run.twin.model, run.case.network))
    run.happens(("step", 1, "none", False))
    run.finish()


def test_the_reference_tells_where_a_run_goes_wrong(monkeypatch):
    run = run_of("vector", 6, *LINEARS, machine=ReferenceMachine)
    monkeypatch.setattr(run.run.optimizers[0], "_optimizer_step_pre_hooks", {})  # by which U and V do not decay
    monkeypatch.setattr(run.twin.optimizers[0], "_optimizer_step_pre_hooks", {})
    with pytest.raises(AssertionError, match="differs from the reference"):
        run.happens(("step", 1, "none", False))


def test_the_twin_tells_what_a_look_has_changed():
    run = run_of("vector", 6, *LINEARS)
    layer = next(iter(run.run.training.layers.values()))
    layer.form.parameters["s"].data[0] *= 2
    with pytest.raises(AssertionError, match="is not what it is in a run that nothing happened to"):
        run.look("read")
