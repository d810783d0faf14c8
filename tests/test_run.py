"""A run in a loop of plain PyTorch: what a cut keeps, what a resumed run is told, and that nothing is left behind."""

import copy
import inspect
import re
from contextlib import nullcontext

import numpy
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from torch import nn

import lightning_svd
from lightning_svd import (
    FallToBudget,
    Fisher,
    Outputs,
    Regularizer,
    SVDTraining,
    SVDTrainingCallback,
    compress,
    svd_layers,
)
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.training import processes, trained_layers
from lightning_svd.training.recipe import OF_CALLBACK, Recipe

X = torch.ones(2, 8)
# Of what takes a model first, how it is called with it and the path of a file.
TAKING_MODULES = {
    **{
        name: lambda model, _, name=name: getattr(lightning_svd, name)(model)
        for name in ("compact", "decompose", "plan", "summarize", "svd_layers", "to_dense", "to_factored")
    },
    **{
        name: lambda model, _, name=name: getattr(lightning_svd, name)(model, X)
        for name in ("count_costs", "fastest_forms", "fold_norms", "profile")
    },
    **{
        name: lambda model, path, name=name: getattr(lightning_svd, name)(model, path)
        for name in ("load_low_rank", "load_sharded", "save_low_rank")
    },
    "compress": lambda model, _: compress(model, [X]),
    "to_onnx": lambda model, path: lightning_svd.to_onnx(model, path, X),
    "SVDTraining": lambda model, _: SVDTraining(model, torch.optim.SGD([nn.Parameter(X)], 0.1), 10),
}


def net(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.03),
}


def keep(count):
    return lambda energies, cost: dict.fromkeys(energies, count)


def begun(count=3, scale=1.0, total_steps=10, **options):
    """A run whose costs are known and that is to end with so many ranks."""
    model = net(scale)
    run = SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), total_steps, choose_ranks=keep(count), **options)
    model(torch.ones(3, 12))
    assert run.learn_costs()
    return run


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(8, 12, generator=generator)
    labels = torch.arange(32) % 8
    return [(centers[labels] + 0.3 * torch.randn(32, 12, generator=generator), labels) for _ in range(count)]


def loop(model, training, steps, seed=1):
    """As in the documentation of SVDTraining."""
    changes, losses = [], []
    for x, y in batches(steps, seed):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        changes.append(training.step())
        for each in training.optimizers:
            each.optimizer.zero_grad()
        losses.append(loss.item())
    return changes, losses


# ---------------------------------------------------------------------------------------------------------------- a cut


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_cut_keeps_the_strongest_at_any_scale(scale, full_rank_as):
    run = begun(3, scale, full_rank_as=full_rank_as, schedule=FallToBudget(start=0.0, end=0.1, cuts=1))
    weights = {}
    with torch.no_grad():
        for name, layer in run.layers.items():
            for parameter in layer.form.trained if full_rank_as == "svd" else []:
                parameter.copy_(parameter.flip(-1))  # the strongest are now the last
            weights[name] = layer.rebuilt().detach().clone()
    change = run.cut(1, 0)
    assert dict(change.ranks) == {"0": 3, "2": 3}
    for name, layer in run.layers.items():
        U, s, Vh = torch.linalg.svd(weights[name], full_matrices=False)
        best = U[:, :3] * s[:3] @ Vh[:3]
        assert_same(layer.rebuilt().detach(), best, layer.matrix_shape)
        assert_same(layer.singular_values(), s[:3], layer.matrix_shape)


def test_a_cut_that_changes_no_rank_is_no_change():
    run = begun(2, total_steps=100, schedule=FallToBudget(start=0.2, end=0.4, shape="linear"))
    assert run.cut(1, 0) is None and run.timeline == []
    change = run.cut(30, 0)
    assert run.timeline == [change] and change.step == 30
    assert dict(change.ranks) == {"0": 6, "2": 5}
    assert change.macs_ratio == run.cost.ratio(change.ranks, "macs")
    assert {name: layer.form.name for name, layer in run.layers.items()} == {"0": "svd", "2": "svd"}


def test_the_last_cut_makes_layers_what_they_are_going_to_be():
    run = begun(2, schedule=FallToBudget(start=0.1, end=0.5))
    run.cut(5, 0)
    assert {name: layer.form.name for name, layer in run.layers.items()} == {"0": "pair", "2": "pair"}
    run = begun(7, schedule=FallToBudget(start=0.1, end=0.5))  # which costs more than the dense layers
    run.cut(5, 0)
    assert {name: layer.form.name for name, layer in run.layers.items()} == {"0": "dense", "2": "dense"}
    assert run.policy.pending is None and not run.regularized


@pytest.mark.parametrize("count", [6, 2], ids=["in place", "shrunken"])
def test_after_a_cut_momentum_follows_its_columns_and_what_is_not_in_use_stays(count):
    schedule = FallToBudget(start=0.01, end=0.9, shape="constant")
    regularizer = Regularizer(sparsity=None, orthogonality_weight=0.0)
    run = begun(count, total_steps=100, schedule=schedule, regularizer=regularizer)
    loop(run.model, run, 1)
    layer, (held,) = run.layers["0"], run.optimizers
    optimizer = held.optimizer
    with torch.no_grad():  # momentum by which each column is known
        for p in layer.form.trained:
            optimizer.state[p]["momentum_buffer"] = torch.arange(10.0).expand_as(p).clone()
    strongest = layer.energies().argsort(descending=True)[:count].float()
    run.cut(2, 0)
    assert layer.rank == count and layer.form.name == "svd" and layer.form.room == (10 if count == 6 else 2)
    for p in layer.form.trained:
        memory = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(memory[..., :count], strongest.expand_as(memory[..., :count]))
        assert memory.shape == p.shape and not memory[..., count:].any()
    before = [p.detach().clone() for p in layer.form.trained]
    U, s, V = layer.form.trained
    loop(run.model, run, 2)
    for now, then in ((U, before[0]), (V, before[2])):
        assert torch.equal(now[..., count:], then[..., count:])
    assert not torch.equal(s[:count], before[1][:count])


@pytest.mark.parametrize("left", [5, 2], ids=["in place", "shrunken"])
def test_layers_alike_are_cut_as_each_alone(left, monkeypatch):
    states = []
    for entries, sizes in ((trained_layers.STACKED, [1, 4]), (2 * 8 * 17, [1, 2, 2]), (0, [1] * 5)):
        monkeypatch.setattr(trained_layers, "STACKED", entries)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), *(nn.Linear(8, 8) for _ in range(4)))
        options = {"total_steps": 100, "schedule": FallToBudget(start=0.02, end=0.9, shape="constant")}
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        run = SVDTraining(model, optimizer, choose_ranks=keep(left), **options)
        assert [len(stack) for stack in trained_layers._stacks(run.layers, [*run.layers])] == sizes
        loop(model, run, 2)
        with torch.no_grad():
            for layer in run.layers.values():
                for p in layer.form.trained:  # the strongest are now the last
                    p.copy_(p.flip(-1))
                    optimizer.state[p]["momentum_buffer"].copy_(torch.arange(8.0))
        run.cut(2, 0)
        states.append([(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in all_trained(run)])
    for one, *others in zip(*states, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def all_trained(run):
    return [p for layer in run.layers.values() for p in layer.form.trained]


# ------------------------------------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("full_rank_as", ["svd", "dense"])
@pytest.mark.parametrize("final", ["factored", "dense", "decomposed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_ends_with_a_small_model_that_learned(name, final, full_rank_as):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    asked = {"final": final, "full_rank_as": full_rank_as, "importance": "spectrum"}
    training = SVDTraining(model, optimizer, 60, target_macs=0.6, **asked)
    changes, losses = loop(model, training, 60)
    assert [change for change in changes if change] == training.timeline and training.timeline
    x, y = batches(1)[0]
    before = model(x)
    report = training.finish()
    assert report.macs_ratio <= 0.6 if final != "dense" else report.macs_ratio == 1.0
    assert_same(model(x), before, (10, 12))
    assert losses[-1] < 0.3 * losses[0] and (model(x).argmax(1) == y).float().mean() > 0.9
    assert not any(isinstance(p, DenseWeight) for p in model.parameters())
    assert bool(svd_layers(model)) == (final == "decomposed")
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(model.parameters())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("arguments", [{"target_params": 0.001}, {"target_modules": ["9"]}, {"regularizer": "l7"}])
def test_a_run_that_is_refused_changes_nothing(arguments):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"`(target_params|target_modules|regularizer)`"):
        SVDTraining(model, optimizer, 10, **arguments)
    assert [(n, id(p), type(p)) for n, p in model.named_parameters()] == [
        (n, id(p), nn.Parameter) for n, p in held.items()
    ]
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held.values(), strict=True))
    assert not optimizer._optimizer_step_pre_hooks


def test_undone_before_its_first_step_all_is_as_it_was():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    held, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    SVDTraining(model, optimizer, 10).undo()
    assert all(p is held[n] and type(p) is nn.Parameter for n, p in model.named_parameters())
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], held.values(), strict=True))


# --------------------------------------------------------------------------------------------------------------- resume


def test_state_loads_without_pickle_where_arguments_are_numbers_of_numpy(tmp_path):
    model, number = net(), numpy.float64
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    asked = {"regularizer": Regularizer(sparsity_weight=number(0.1)), "target_macs": number(0.5)}
    run = SVDTraining(model, optimizer, 4, schedule=FallToBudget(start=number(0.5), end=number(0.75)), **asked)
    model(torch.ones(2, 12)).sum().backward()
    run.step()
    torch.save(run.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["strengths"] == run.strengths


def test_state_goes_through_a_file_that_loads_without_pickle(tmp_path):
    run = begun(2, total_steps=40, importance="spectrum")
    run.cut(25, 1)
    run.warnings.append("careful")
    torch.save(run.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    model = net(2.0)
    options = {"choose_ranks": keep(2), "importance": "spectrum"}
    resumed = SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), 40, state=loaded, **options)
    again, state = resumed.state_dict(), run.state_dict()
    assert again.keys() == state.keys() and again["layers"].keys() == state["layers"].keys()
    for name, entry in state["layers"].items():
        for key, value in entry.items():
            mine = again["layers"][name][key]
            assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value
    assert {**again, "layers": {}} == {**state, "layers": {}}
    assert resumed.cost == run.cost and resumed.timeline == run.timeline and resumed.warnings == ["careful"]
    assert resumed.last_cut == 25 and resumed.policy.pending == run.policy.pending
    other = net()
    with pytest.raises(ValueError, match="written with other factorized layers, see '2'"):
        SVDTraining(other, OPTIMIZERS["sgd"](other.parameters()), 40, target_modules=["0"], state=loaded)
    assert all(type(p) is nn.Parameter for p in other.parameters())


@pytest.mark.parametrize("at", [5, 25, 35])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loop_that_is_resumed_ends_as_one_that_was_not_interrupted(name, at):
    def start(state=None):
        model = net()
        optimizer = OPTIMIZERS[name](model.parameters())
        if state:
            model.load_state_dict(state["model"])
        training = SVDTraining(model, optimizer, 40, target_macs=0.6, state=state and state["training"])
        if state:
            optimizer.load_state_dict(state["optimizer"])
        return model, optimizer, training

    def go(model, training, steps):
        for x, y in steps:
            F.cross_entropy(model(x), y).backward()
            training.step()
            training.optimizers[0].optimizer.zero_grad()

    steps = batches(40)
    model, optimizer, training = start()
    go(model, training, steps[:at])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "training": training.state_dict()}
    resumed, _, again = start(copy.deepcopy(state))
    for each, run in ((model, training), (resumed, again)):
        go(each, run, steps[at:])
        run.finish()
    assert again.timeline == training.timeline
    assert model.state_dict().keys() == resumed.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in resumed.state_dict().items())


# ------------------------------------------------------------------------------------------- a loop that is not right


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"total_steps": 0}, "`total_steps` must be an integer >= 1, got 0"),
        ({"total_steps": 10.5}, "`total_steps` must be an integer >= 1, got 10.5"),
        ({"optimizers": None}, "`optimizers` must be an optimizer of torch, or a list of them, got None"),
        ({"optimizers": [None]}, "`optimizers` must be an optimizer of torch, or a list of them, got"),
    ],
    ids=["none", "half a step", "no optimizer", "a list without"],
)
def test_what_a_run_cannot_begin_with_is_named(arguments, why):
    model = net()
    given = {"optimizers": OPTIMIZERS["sgd"](model.parameters()), "total_steps": 10} | arguments
    with pytest.raises(ValueError, match=re.escape(why)):
        SVDTraining(model, given["optimizers"], given["total_steps"], target_macs=0.5)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"max_metric_drop": 0.1}, "SVDTraining has no argument `max_metric_drop`: it is one of SVDTrainingCallback"),
        ({"importence": "fisher"}, "SVDTraining has no argument `importence`: did you mean `importance`?"),
        ({"total_step": 3}, "SVDTraining has no argument `total_step`: did you mean `total_steps`?"),
        ({"xyz": 3}, "SVDTraining has no argument `xyz`"),
        ({"recipe": {"target_macs": 0.5}}, "`recipe` must be a Recipe, got {'target_macs': 0.5}"),
        ({"recipe": Recipe(), "round_to": 8}, "give either `recipe` or its fields, got both: `recipe`, `round_to`"),
    ],
)
def test_an_argument_that_a_run_does_not_have_is_named(arguments, why):
    model = net()
    with pytest.raises(TypeError, match=f"^{re.escape(why)}$"):
        SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), 10, **arguments)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("owner", [SVDTrainingCallback, lambda **given: compress(net(), [torch.randn(2, 8)], **given)])
def test_so_is_one_that_the_callback_or_compress_does_not_have(owner):
    with pytest.raises(TypeError, match=r" has no argument `min_ranks`: did you mean `min_rank`\?$"):
        owner(min_ranks=2)


def test_what_only_the_callback_takes_is_known():
    own = inspect.signature(SVDTrainingCallback).parameters.keys() - inspect.signature(Recipe).parameters.keys()
    assert own == set(OF_CALLBACK)


@pytest.mark.parametrize("name", sorted(TAKING_MODULES))
@pytest.mark.parametrize(
    "given", ["net.pt", (nn.Linear(8, 8), None), nn.Linear, {}], ids=["file", "pair", "class", "dict"]
)
def test_what_is_no_module_is_named(name, given, tmp_path):
    with pytest.raises(TypeError, match=r"^`(module|model)` must be a module, got "):
        TAKING_MODULES[name](given, tmp_path / "file")


@pytest.mark.parametrize("stepped", ["too few times", "past the run"])
def test_a_budget_that_a_loop_does_not_come_to_is_warned_of(stepped):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    training = SVDTraining(model, optimizer, 10, target_macs=0.5)
    for x, y in batches(4):
        F.cross_entropy(model(x), y).backward()
        training.step() if stepped == "too few times" else optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"the fit ended at step . of 10, .* 0\.5 of the macs, was not reached"):
        report = training.finish()
    assert any("was not reached" in warning for warning in report.warnings)


def test_a_step_past_the_run_says_what_to_call():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    training = SVDTraining(model, optimizer, 10, target_macs=0.5)
    for way in (training.step, optimizer.step):
        F.cross_entropy(model(torch.ones(4, 12)), torch.arange(4)).backward()
        with nullcontext() if way == training.step else pytest.raises(RuntimeError, match=r"call `SVDTraining\.step`"):
            way()


def test_a_run_that_is_over_says_so():
    run = begun(total_steps=1)
    for x, y in batches(1):
        F.cross_entropy(run.model(x), y).backward()
        run.step()
    run.finish()
    for again in (run.step, run.finish):
        with pytest.raises(RuntimeError, match="this run of SVD training is over"):
            again()


# ------------------------------------------------------------------------------------------------- of several processes


def test_a_process_alone_decides_agrees_and_does_all_of_the_work_itself():
    assert (processes.size(), processes.rank()) == (1, 0)
    assert processes.decide(lambda: {"a": 3}) == {"a": 3}
    with pytest.raises(KeyError, match="why"):
        processes.decide(lambda: {}["why"])
    asked = []
    processes.agree(lambda: asked.append(1))
    assert asked == [1]
    with pytest.raises(ZeroDivisionError):
        processes.agree(lambda: 1 // 0)


def test_work_is_shared_out_one_by_one_and_fails_at_the_piece_that_fails():
    computed = []

    def compute(name):
        computed.append(name)
        return [torch.full((2,), float(name)), torch.arange(6).view(2, 3).mT]

    def empty(name):
        raise AssertionError("nothing is received")

    work = processes.shared_out(["1", "2", "3"], compute, empty)
    name, tensors = next(work)
    assert (name, computed) == ("1", ["1"])  # no more is held than one piece
    assert torch.equal(tensors[0], torch.ones(2)) and tensors[1].is_contiguous()
    assert [name for name, _ in work] == ["2", "3"]
    with pytest.raises(ValueError, match="could not convert"):
        list(processes.shared_out(["1", "x"], compute, empty))
    assert list(processes.shared_out([], compute, empty)) == []


# ------------------------------------------------------------------------------------------------ cuts that cut nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cuts_that_remove_no_rank_do_not_wear_a_weight_down(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40)).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    schedule = FallToBudget(start=0.0, end=1.0)
    training = SVDTraining(net, optimizer, 20, target_macs=1.0, schedule=schedule, regularizer=None)
    x = torch.randn(8, 48).to(dtype)
    for step in range(20):
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        training.step()
        now = {name: layer.rebuilt().detach().float() for name, layer in training.layers.items()}
        if step == 0:
            first = now
        elif training.policy.pending is not None:
            for name, weight in now.items():
                error = (weight - first[name]).norm() / first[name].norm()
                assert error == 0 if dtype != torch.float32 else error < 1e-5
    assert training.timeline == []


def test_layers_that_stay_as_wide_as_they_are_stored_are_others_all_the_same_after_the_first_cut():
    """From dense to U, s, V without shrinking: what lists parameters, as DDP does, must be told."""
    told = []
    net = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 40))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    arguments = {"target_macs": 0.9, "full_rank_as": "dense", "schedule": FallToBudget(start=0.2, end=0.9)}
    arguments["importance"] = "spectrum"
    training = SVDTraining(net, optimizer, 10, on_reshape=lambda: told.append(training._steps), **arguments)
    assert told == []  # the dense layers are as they were
    for _ in range(4):
        optimizer.zero_grad()
        net(torch.randn(8, 48)).square().mean().backward()
        training.step()
    assert told and all(layer.form.name == "svd" for layer in training.layers.values())


def test_a_slight_layer_trains_its_dense_weight_once_ranks_fall_while_it_keeps_all_of_its_own():
    """U, s and V of full rank would cost more; what an optimizer knows of the weight is not lost at later cuts."""
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    training = SVDTraining(net, optimizer, 10, target_macs=0.6, schedule=FallToBudget(start=0.2))
    forms, momenta = [], []
    for _ in range(10):
        optimizer.zero_grad()
        net(torch.randn(8, 64)).square().mean().backward()
        training.step()
        forms.append([layer.form.name for layer in training.layers.values()])
        momenta.append(optimizer.state.get(training.layers["4"].form.trained[0], {}).get("momentum_buffer"))
    head = [form for *_, form in forms]
    first = head.index("dense")
    assert first + 1 == training.timeline[0].step and head == ["svd"] * first + ["dense"] * (10 - first)
    assert [form for *others, _ in forms[:6] for form in others] == ["svd"] * 12 and len(training.timeline) > 2
    assert momenta[first] is None and all(momentum.any() for momentum in momenta[first + 1 :])
    assert len({id(momentum) for momentum in momenta[first + 1 :]}) == 1
    assert training.policy.pending is None and training.ratio("macs") <= 0.6


def test_where_sparsity_decides_no_layer_is_slight():
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    training = SVDTraining(net, optimizer, 20, energy_threshold=0.5, schedule=FallToBudget(start=0.2, end=0.9))
    for _ in range(10):
        optimizer.zero_grad()
        net(torch.randn(8, 64)).square().mean().backward()
        training.step()
    assert training.timeline and {layer.form.name for layer in training.layers.values()} == {"svd"}


def test_a_slight_layer_is_factorized_when_it_is_to_lose_ranks():
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    asked = []

    def choose(energies, cost):
        asked.append(0)
        return {"0": 20, "2": 20, "4": 2 if len(asked) < 4 else 1}

    training = SVDTraining(
        net, optimizer, 10, target_macs=0.6, schedule=FallToBudget(start=0.2, end=0.7, cuts=5), choose_ranks=choose
    )
    forms = []
    for _ in range(10):
        optimizer.zero_grad()
        net(torch.randn(8, 64)).square().mean().backward()
        before = training.layers["4"].rebuilt().detach().clone()
        training.step()
        layer = training.layers["4"]
        forms.append((layer.form.name, layer.rank))
        assert layer.rank == 2 or len(asked) >= 4
        assert not torch.equal(before, layer.rebuilt())
    assert ("dense", 2) in forms and forms[-1][0] == "pair" and forms[-1][1] == 1


# ------------------------------------------------------------------- what a loop does that nobody follows from outside


@pytest.mark.parametrize("beside", ["evaluation", "a part alone", "two batches", "another network between"])
def test_what_a_loop_calls_beside_a_batch_of_its_first_step_costs_nothing(beside):
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)), "b": nn.Linear(8, 8)})
    training = SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), 4, target_macs=0.8)
    x = torch.ones(3, 12)
    if beside == "evaluation":
        with torch.no_grad():
            for _ in range(50):  # more than are kept
                model["b"](model["a"](x))
    if beside == "a part alone":
        with torch.inference_mode():
            model["a"](x)
    model["b"](model["a"](x)).sum().backward()
    if beside == "two batches":
        model["b"](model["a"](x[:2])).sum().backward()
    if beside == "another network between":  # which belongs to the step
        model["b"](torch.ones(3, 8)).sum().backward()
    training.step()
    layers = training.cost.layers
    per_input = {name: layer.dense_macs // training.cost.batch_size for name, layer in layers.items()}
    assert per_input == {"a.0": 120, "a.1": 80, "b": 128 if beside == "another network between" else 64}


@pytest.mark.parametrize("importance", [Outputs(steps=2), Fisher(steps=2)], ids=["outputs", "fisher"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_loop_that_is_resumed_judges_ranks_by_the_same_batches(importance, at):
    def start(state=None):
        model = net()
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        if state:
            model.load_state_dict(state["model"])
        schedule = FallToBudget(start=0.0, end=0.4, cuts=4)
        options = {"target_params": 0.7, "importance": importance, "schedule": schedule}
        training = SVDTraining(model, optimizer, 10, state=state and state["training"], **options)
        if state:
            optimizer.load_state_dict(state["optimizer"])
        return model, optimizer, training

    steps = batches(10)

    def go(model, training, some):
        for x, y in some:
            F.cross_entropy(model(x), y).backward()
            training.step()
            training.optimizers[0].optimizer.zero_grad()

    model, optimizer, training = start()
    go(model, training, steps[:at])
    assert training.last_cut == (0, 2, 3)[at - 1]  # the first one by the first two batches
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "training": training.state_dict()}
    resumed, _, again = start(copy.deepcopy(state))
    for each, run in ((model, training), (resumed, again)):
        go(each, run, steps[at:])
    assert again.timeline == training.timeline and again.warnings == training.warnings
    for one, other in zip(all_trained(training), all_trained(again), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_is_refused_at_its_first_step_leaves_the_weights_that_were_loaded_since():
    model = net()
    training = SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), 10, target_macs=0.01)
    other = {name: value + 1.0 for name, value in net().state_dict().items()}
    model.load_state_dict(other)
    model(torch.ones(3, 12)).sum().backward()
    with pytest.raises(ValueError, match="`target_macs` must be at least"):
        training.step()
    training.undo()
    assert not svd_layers(model) and all(torch.equal(value, other[key]) for key, value in model.state_dict().items())


def test_a_run_whose_layers_are_never_used_says_so():
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(12, 10)])
    training = SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), 2, target_macs=0.5)
    for _ in range(2):
        model[0](torch.ones(2, 3)).sum().backward()
        assert training.step() is None
    assert training.why_not_reached(2).startswith("no step used a layer that is factorized")


def test_batches_are_told_apart_where_no_factor_has_a_gradient():
    model = net()
    training = SVDTraining(model, OPTIMIZERS["sgd"](model.parameters()), 4, target_macs=0.8)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    for _ in range(2):
        model(torch.ones(3, 12)).sum().backward()
    training.step()
    assert sum(layer.dense_macs for layer in training.cost.layers.values()) == 3 * (120 + 80)


@pytest.mark.parametrize("importance", ["spectrum", "outputs", "fisher"])
def test_a_layer_that_a_step_made_infinite_is_named_at_the_cut(importance):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    schedule = FallToBudget(start=0.0, end=0.5, cuts=1)
    measure = {"spectrum": "spectrum", "outputs": Outputs(steps=2), "fisher": Fisher(steps=2)}[importance]
    training = SVDTraining(model, optimizer, 4, target_params=0.8, importance=measure, schedule=schedule)
    loop(model, training, 1)
    F.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    optimizer.param_groups[0]["lr"] = float("inf")  # after what is observed of this batch
    with pytest.raises(ValueError, match=r"`[02]`: expected finite weights"):
        training.step()


@pytest.mark.parametrize("state", ["run.pt", {"a": 1}])
def test_a_state_of_no_run_is_refused(state):
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="`state` must be what the `state_dict` of a run returned, got "):
        SVDTraining(model, torch.optim.SGD(model.parameters(), 0.1), 5, state=state)
