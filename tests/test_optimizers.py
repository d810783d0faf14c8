"""Factors stand in the places of weights, decay acts on s alone, and what is remembered follows its columns."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from lightning_svd.layers.compounds import svd_layers
from lightning_svd.layers.dense_weight import DenseWeight
from lightning_svd.model.plan import plan
from lightning_svd.model.surgery import begin, decompose
from lightning_svd.training.optimizers import OptimizerOfFactors

DECAY = 0.1
OPTIMIZERS = {
    "sgd": lambda params, decay: SGD(params, lr=0.1, momentum=0.9, weight_decay=decay),
    "adam": lambda params, decay: Adam(params, lr=0.1, weight_decay=decay),
    "adamw": lambda params, decay: AdamW(params, lr=0.1, weight_decay=decay),
    "rmsprop": lambda params, decay: RMSprop(params, lr=0.1, weight_decay=decay),
    "adagrad": lambda params, decay: Adagrad(params, lr=0.1, weight_decay=decay),
}


def dense():
    """Three layers and a normalization."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5))


def model():
    """Two factorized layers around a plain one and a normalization, which show their factors."""
    net = dense()
    decompose(net, exclude_modules=["2"])
    return net


def set_gradients(net, seed):
    """The same gradients for every copy of the model, wherever its parameters are."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def train(net, optimizer, steps=3):
    for seed in range(steps):
        set_gradients(net, seed)
        optimizer.step()
    return dict(net.named_parameters())


def is_frame(name):
    return name.endswith((".U", ".V"))


def decaying(net, build=OPTIMIZERS["sgd"]):
    optimizer = build(net.parameters(), DECAY)
    return optimizer, OptimizerOfFactors(optimizer, svd_layers(net).values())


def factorized_under(net, optimizer, exclude=("2",)):
    """Factorize what an optimizer trains already, as a run does; the layers show their weights."""
    layers = begin(net, plan(net, exclude_modules=exclude))
    of_factors = OptimizerOfFactors(optimizer, layers.values())
    of_factors.replace([layer.to_svd() for layer in layers.values()])
    return layers, of_factors


class Spy(SGD):
    """Notes the decay of every parameter in each step."""

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        self.decays = {p: group["weight_decay"] for group in self.param_groups for p in group["params"]}
        self.seen = list(self.param_groups)
        super().step()
        return loss


# ---------------------------------------------------------------------------------------------------- decay acts on s


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_moves_s_and_the_rest_but_not_u_and_v(name):
    build, net, undecayed, decayed = OPTIMIZERS[name], model(), model(), model()
    optimizer, _ = decaying(net, build)
    actual = train(net, optimizer)
    without = train(undecayed, build(undecayed.parameters(), 0.0))
    plain = train(decayed, build(decayed.parameters(), DECAY))
    for key, p in actual.items():
        assert torch.equal(p, without[key] if is_frame(key) else plain[key]), key
        assert not torch.equal(without[key], plain[key]), key  # decay makes a difference to every one


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_pairs_factors_decay_as_plain_layers_do_from_a_fresh_memory(name):
    build, net = OPTIMIZERS[name], model()
    optimizer, of_factors = decaying(net, build)
    train(net, optimizer)
    old = [p for layer in svd_layers(net).values() for p in layer.form.trained]
    of_factors.replace([layer.to_pair() for layer in svd_layers(net).values()])
    assert not any(p in optimizer.state for p in old)
    twin = copy.deepcopy(net)
    fresh, pairs = build(twin.parameters(), DECAY), 0
    expected = train(twin, fresh)
    for key, p in train(net, optimizer).items():
        if key.endswith((".A", ".B")):  # the others had momentum
            assert torch.equal(p, expected[key]), key
            pairs += 1
    assert pairs == 4 and not of_factors.regularized and len(of_factors.layers) == 2


def test_s_takes_the_decay_of_the_weight_although_vectors_are_exempt():
    net = dense()
    groups = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = Spy(groups, lr=0.1)
    plain = [p for p in net[2].parameters() if p.ndim > 1]
    layers, _ = factorized_under(net, optimizer)
    optimizer.step()
    assert len(optimizer.seen) == 3
    frames, values = [], []
    for layer in layers.values():
        U, s, V = layer.form.trained
        frames, values = [*frames, U, V], [*values, s]
    for p, decay in optimizer.decays.items():
        assert decay == (DECAY if any(p is other for other in (*values, *plain)) else 0.0)
    assert len(optimizer.decays) == 4 + len(frames) + len(values) + 2


def test_each_layer_takes_the_decay_of_its_own_group():
    net = model()
    first, rest = list(net[0].parameters()), [p for layer in net[1:] for p in layer.parameters()]
    optimizer = Spy([{"params": first, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.25}], lr=0.1)
    OptimizerOfFactors(optimizer, svd_layers(net).values())
    optimizer.step()
    assert optimizer.decays == {
        p: 0.0 if is_frame(name) else 0.5 if name.startswith("0.") else 0.25 for name, p in net.named_parameters()
    }


# ------------------------------------------------------------------------------------------- the groups are the user's


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_between_steps_the_groups_are_the_users_own(name):
    net, plain = model(), model()
    optimizer, _ = decaying(net, OPTIMIZERS[name])
    reference = OPTIMIZERS[name](plain.parameters(), DECAY)
    groups, group, params = optimizer.param_groups, optimizer.param_groups[0], list(optimizer.param_groups[0]["params"])
    schedulers = [torch.optim.lr_scheduler.StepLR(each, step_size=1, gamma=0.5) for each in (optimizer, reference)]
    for _ in range(3):
        train(net, optimizer, 1)
        train(plain, reference, 1)
        for scheduler in schedulers:
            scheduler.step()
        assert optimizer.param_groups is groups and groups[0] is group and len(groups) == 1
        assert all(one is other for one, other in zip(group["params"], params, strict=True))
        assert optimizer.state_dict()["param_groups"] == reference.state_dict()["param_groups"]
    assert group["lr"] == 0.1 * 0.5**3


class Counting(SGD):
    """Notes its steps in its groups, as schedule-free optimizers and Prodigy do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_notes_in_its_groups_during_a_step_stays():
    net = model()
    optimizer, _ = decaying(net, lambda params, decay: Counting(params, lr=0.1, weight_decay=decay))
    train(net, optimizer, steps=3)
    assert optimizer.param_groups[0]["k"] == 3
    assert optimizer.param_groups[0]["weight_decay"] == DECAY


@pytest.mark.parametrize("by_keyword", [False, True])
def test_in_the_closure_of_a_step_groups_are_whole_and_what_is_set_there_counts(by_keyword):
    net, twin = model(), model()
    optimizer, _ = decaying(net)
    other, _ = decaying(twin)
    group = optimizer.param_groups[0]

    def closure():
        assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0] is group and torch.is_grad_enabled()
        group["lr"] = 0.03
        set_gradients(net, 0)
        return 5.0

    assert (optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)) == 5.0
    other.param_groups[0]["lr"] = 0.03
    expected = train(twin, other, 1)
    assert all(torch.equal(p, expected[key]) for key, p in net.named_parameters())
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0] is group


def test_merging_is_harmless_at_any_time():
    net = model()
    optimizer, of_factors = decaying(net)
    groups = optimizer.param_groups
    of_factors.merge()
    train(net, optimizer, 1)
    of_factors.merge()
    of_factors.merge()
    assert optimizer.param_groups is groups and len(groups) == 1


class Failing(SGD):
    def step(self, closure=None):
        if closure:
            closure()
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("where", ["closure", "step"])
def test_a_step_that_failed_is_undone_by_merging(where):
    net = model()
    optimizer, of_factors = decaying(net, lambda params, decay: Failing(params, lr=0.1, weight_decay=decay))
    groups, group = optimizer.param_groups, optimizer.param_groups[0]

    def closure():
        if where == "closure":
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert len(groups) == (1 if where == "closure" else 2)
    of_factors.merge()
    assert optimizer.param_groups is groups and groups[0] is group and len(groups) == 1


def test_without_decay_nothing_is_split():
    net = model()
    optimizer, _ = decaying(net, lambda params, _: Spy(params, lr=0.1))
    optimizer.step()
    assert len(optimizer.seen) == 1 and optimizer.seen[0] is optimizer.param_groups[0]


def test_after_remove_the_optimizer_is_as_if_untouched():
    net, plain = model(), model()
    optimizer, of_factors = decaying(net)
    groups = optimizer.param_groups
    of_factors.remove()
    assert optimizer.param_groups is groups
    of_factors.merge = None  # a hook that were left would call this
    actual, expected = train(net, optimizer), train(plain, OPTIMIZERS["sgd"](plain.parameters(), DECAY))
    assert all(torch.equal(p, expected[key]) for key, p in actual.items())


def test_a_step_that_was_not_announced_is_an_error_where_it_must_be():
    net = model()
    optimizer, of_factors = decaying(net)
    train(net, optimizer, 1)  # a learning rate finder's, before any batch
    of_factors.enforced = True
    for _ in range(2):
        of_factors.announced = True
        train(net, optimizer, 1)
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) was called on the optimizer itself"):
        train(net, optimizer, 1)
    assert len(optimizer.param_groups) == 1
    of_factors.replace([layer.to_pair() for layer in svd_layers(net).values()])
    train(net, optimizer, 1)  # which have no regularizers to miss


# ------------------------------------------------------------------------------------- what stands where the weight was


@pytest.mark.parametrize("named", [False, True])
def test_factors_stand_in_the_place_of_their_weight_in_its_group_and_it_in_theirs(named):
    net = dense()
    decayed = [(name, p) for name, p in net.named_parameters() if p.ndim > 1]
    rest = [(name, p) for name, p in net.named_parameters() if p.ndim == 1]
    groups = [{"params": decayed if named else [p for _, p in decayed], "weight_decay": DECAY}, {"params": rest}]
    if not named:
        groups[1]["params"] = [p for _, p in rest]
    optimizer = SGD(groups, lr=0.1)
    before = [list(group["params"]) for group in optimizer.param_groups]
    layers, of_factors = factorized_under(net, optimizer)
    first, last = (layer.form.trained for layer in layers.values())
    expected = [[*first, before[0][1], *last], before[1]]
    for group, wanted in zip(optimizer.param_groups, expected, strict=True):
        assert all(a is b for a, b in zip(group["params"], wanted, strict=True))
    if named:
        names = optimizer.param_groups[0]["param_names"]
        assert names == [*(f"0.weight.{k}" for k in range(3)), "2.weight", *(f"3.weight.{k}" for k in range(3))]
    assert of_factors.held() == {p for group in expected for p in group}
    assert of_factors.layers == of_factors.regularized == [*layers.values()]
    of_factors.replace([layer.to_dense() for layer in layers.values()])
    for group, wanted in zip(optimizer.param_groups, before, strict=True):
        assert all(a is b for a, b in zip(group["params"], wanted, strict=True))
    assert of_factors.regularized == [] and of_factors.layers == [*layers.values()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_is_remembered_of_what_comes_in_the_place_of_another(name):
    net = dense()
    optimizer = OPTIMIZERS[name](net.parameters(), 0.0)
    train(net, optimizer)
    kept = {p: copy.deepcopy(optimizer.state[p]) for p in net[2].parameters()}
    layers, _ = factorized_under(net, optimizer)
    factors = [p for layer in layers.values() for p in layer.form.trained]
    fresh = OPTIMIZERS[name](factors, 0.0).state  # Adagrad's begins before its first step
    for p in factors:
        assert {key: value.tolist() for key, value in optimizer.state.get(p, {}).items()} == {
            key: value.tolist() for key, value in fresh.get(p, {}).items()
        }
    for p, state in kept.items():
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
    assert not any(isinstance(p, DenseWeight) for p in optimizer.state)
    for p in (*factors, *net[2].parameters()):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(p in optimizer.state for p in factors)


def test_weights_that_are_given_to_an_optimizer_later_are_trained_as_factors():
    net = dense()
    optimizer = SGD(net[0].parameters(), lr=0.1)
    layers, of_factors = factorized_under(net, optimizer)
    assert of_factors.layers == [layers["0"]]
    optimizer.add_param_group({"params": [*net[3].parameters()], "lr": 0.01})
    assert of_factors.layers == [layers["0"]]
    of_factors.adopt_faces()
    assert of_factors.layers == [*layers.values()]
    expected = [*layers["3"].form.trained, net[3].bias]
    assert all(a is b for a, b in zip(optimizer.param_groups[1]["params"], expected, strict=True))


class Wrapper(Optimizer):
    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_inside_another_is_told_too():
    net = dense()
    inner = SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer = Wrapper(inner)
    train(net, optimizer, 1)
    layers, _ = factorized_under(net, optimizer)
    factors = {p for layer in layers.values() for p in layer.form.trained}
    assert factors <= {p for group in inner.param_groups for p in group["params"]}
    assert not any(isinstance(p, DenseWeight) for p in inner.state)


class KeepsAList(SGD):
    def __init__(self, parameters, lr):
        parameters = [*parameters]
        super().__init__(parameters, lr=lr)
        self.slow = [p.detach().clone() for p in parameters]


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda p: LBFGS(p), "LBFGS, which steps more than once for a gradient"),
        (lambda p: Wrapper(LBFGS(p)), "Wrapper, which steps more than once for a gradient"),
        (lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]), "Muon, which trains matrices only"),
        (lambda p: KeepsAList(p, lr=0.1), "KeepsAList, which keeps a list of its own, `slow`, of the parameters"),
        (lambda p: Wrapper(KeepsAList(p, lr=0.1)), "Wrapper, which keeps a list of its own, `slow`, of the parameters"),
    ],
)
def test_what_cannot_train_factors_is_refused_and_left_alone(build, why):
    net = dense()
    optimizer = build([*net.parameters()])
    layers = begin(net, plan(net))
    with pytest.raises(ValueError, match=why):
        OptimizerOfFactors(optimizer, layers.values())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


# ----------------------------------------------------------------------------------------- memory follows the columns


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_remembered_of_a_column_goes_where_the_column_goes(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters(), 0.0)
    of_factors = OptimizerOfFactors(optimizer, svd_layers(net).values())
    train(net, optimizer)
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    parameters, order = net[0].form.trained, torch.tensor([3, 0, 5, 1, 2, 4])
    of_factors.move_columns(parameters, parameters, lambda value: value.index_select(-1, order))
    moved = 0
    for p, state in optimizer.state.items():
        for key, memory in state.items():
            of_factor = any(p is other for other in parameters) and memory.shape == p.shape
            assert torch.equal(memory, before[p][key][..., order] if of_factor else before[p][key])
            moved += of_factor
    assert moved >= 3


class Preconditioned(SGD):
    """Keeps what is of the parameter's shape and no momentum."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("inverse", torch.ones_like(p))
        return super().step(closure)


def test_what_is_remembered_and_not_understood_is_forgotten_for_the_moved_ones_only():
    net = model()
    optimizer = Preconditioned(net.parameters(), lr=0.1, momentum=0.9)
    of_factors = OptimizerOfFactors(optimizer, svd_layers(net).values())
    train(net, optimizer)
    parameters = net[0].form.trained
    of_factors.move_columns(parameters, parameters, lambda value: value.flip(-1))
    assert not any(p in optimizer.state for p in parameters)
    assert all("inverse" in optimizer.state[p] for p in net.parameters() if all(p is not q for q in parameters))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rows", [4, 400], ids=["by factors", "by the weight"])
def test_shrinking_between_two_steps_changes_no_bit(name, rows):
    nets = [model(), model()]
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    ends = []
    for net, shrinks in zip(nets, (False, True), strict=True):
        optimizer, of_factors = decaying(net, OPTIMIZERS[name])
        train(net, optimizer)
        layer = net[0]
        layer.form.rank = rank = 2
        if shrinks:
            old, new = layer.shrink()
            of_factors.move_columns(old, new, lambda value, rank=rank: value.narrow(-1, 0, rank).clone())
            assert all(p in of_factors.held() for p in new) and not any(p in of_factors.held() for p in old)
        stored = [p.detach().clone() for p in layer.form.trained]
        for _ in range(4):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        assert all((p != q)[..., :rank].any() for p, q in zip(layer.form.trained, stored, strict=True))
        ends.append([p.detach()[..., :rank] for p in layer.form.trained] + [p.detach() for p in net[3].parameters()])
        assert layer.form.room == (2 if shrinks else 6)
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
