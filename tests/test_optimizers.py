"""Weight decay acts on s alone, the user's groups are as they were, and pruned ranks stay where they are."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from lightning_svd.optimizers import OptimizerOfFactors, check_holds_factors, forget_pruned, merge_factors
from lightning_svd.surgery import decompose, svd_layers

DECAY = 0.1
OPTIMIZERS = {
    "sgd": lambda params, decay: SGD(params, lr=0.1, momentum=0.9, weight_decay=decay),
    "adam": lambda params, decay: Adam(params, lr=0.1, weight_decay=decay),
    "adamw": lambda params, decay: AdamW(params, lr=0.1, weight_decay=decay),
    "rmsprop": lambda params, decay: RMSprop(params, lr=0.1, weight_decay=decay),
    "adagrad": lambda params, decay: Adagrad(params, lr=0.1, weight_decay=decay),
}


def model():
    """Two factorised layers around a plain one and a normalisation."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5))
    decompose(net, exclude_modules=["2"])
    return net


def set_gradients(net, seed):
    """The same gradients for every copy of the model, wherever its parameters are."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def train(net, optimizer, steps=3, before_step=lambda: None):
    for seed in range(steps):
        set_gradients(net, seed)
        before_step()
        optimizer.step()
    return dict(net.named_parameters())


def is_frame(name):
    return name.endswith((".U", ".V"))


def decaying(net, build=OPTIMIZERS["sgd"]):
    optimizer = build(net.parameters(), DECAY)
    return optimizer, OptimizerOfFactors(optimizer, svd_layers(net).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_moves_s_and_the_rest_but_not_u_and_v(name):
    build, net, undecayed, decayed = OPTIMIZERS[name], model(), model(), model()
    optimizer, decay = decaying(net, build)
    actual = train(net, optimizer, before_step=decay.split)
    without = train(undecayed, build(undecayed.parameters(), 0.0))
    plain = train(decayed, build(decayed.parameters(), DECAY))
    for key, p in actual.items():
        assert torch.equal(p, without[key] if is_frame(key) else plain[key]), key
        assert not torch.equal(without[key], plain[key]), key  # decay makes a difference to every one


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_merged_factors_decay_as_plain_layers_do_and_s_stays_one(name):
    build, net, plain = OPTIMIZERS[name], model(), model()
    optimizer, decay = decaying(net, build)
    train(net, optimizer, before_step=decay.split)  # so that there is momentum of s
    merge_factors([optimizer], svd_layers(net).values())
    assert not any(optimizer.state[p] for layer in svd_layers(net).values() for p in (layer.U, layer.s, layer.V))
    plain.load_state_dict(net.state_dict())

    def before_step():
        decay.hold_constants()
        decay.split()

    actual = train(net, optimizer, before_step=before_step)
    held = [layer.s for layer in svd_layers(plain).values()]
    kept = [p for p in plain.parameters() if all(p is not s for s in held)]
    fresh = build(kept, DECAY)
    for key, p in train(plain, fresh).items():
        if not key.startswith(("1.", "2.")):  # those had momentum
            assert torch.equal(actual[key], p) or key.endswith(".bias"), key
    assert all(bool((layer.s == 1).all()) for layer in svd_layers(net).values())


def test_s_takes_the_decay_of_the_weight_although_vectors_are_exempt():
    def exempt(net, decay_of_s):
        groups = [
            {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for n, p in net.named_parameters() if n.endswith(".s")], "weight_decay": decay_of_s},
            {"params": [p for n, p in net.named_parameters() if p.ndim == 1 and not n.endswith(".s")]},
        ]
        return SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.0)

    net, twin, undecayed = model(), model(), model()
    optimizer = exempt(net, 0.0)
    decay = OptimizerOfFactors(optimizer, svd_layers(net).values())
    actual = train(net, optimizer, before_step=decay.split)
    expected = train(twin, exempt(twin, DECAY))
    frames = train(undecayed, OPTIMIZERS["sgd"](undecayed.parameters(), 0.0))
    for key, p in actual.items():
        assert torch.equal(p, frames[key] if is_frame(key) else expected[key]), key


def test_each_layer_takes_the_decay_of_its_own_group():
    net = model()
    first, rest = list(net[0].parameters()), [p for layer in net[1:] for p in layer.parameters()]
    optimizer = SGD([{"params": first, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.25}], lr=0.1)
    OptimizerOfFactors(optimizer, svd_layers(net).values()).split()
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {
        p: 0.0 if is_frame(name) else 0.5 if name.startswith("0.") else 0.25 for name, p in net.named_parameters()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_between_steps_the_groups_are_the_users_own(name):
    net, plain = model(), model()
    optimizer, decay = decaying(net, OPTIMIZERS[name])
    reference = OPTIMIZERS[name](plain.parameters(), DECAY)
    groups, group, params = optimizer.param_groups, optimizer.param_groups[0], list(optimizer.param_groups[0]["params"])
    schedulers = [torch.optim.lr_scheduler.StepLR(each, step_size=1, gamma=0.5) for each in (optimizer, reference)]
    for _ in range(3):
        train(net, optimizer, 1, decay.split)
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
    optimizer, decay = decaying(net, lambda params, decay: Counting(params, lr=0.1, weight_decay=decay))
    train(net, optimizer, steps=3, before_step=decay.split)
    assert optimizer.param_groups[0]["k"] == 3
    assert optimizer.param_groups[0]["weight_decay"] == DECAY


def test_splitting_inside_the_closure_of_a_step_works_as_lightning_does_it():
    net, twin = model(), model()
    optimizer, decay = decaying(net)
    other, other_decay = decaying(twin)
    set_gradients(net, 0)
    optimizer.step(decay.split)
    expected = train(twin, other, 1, other_decay.split)
    assert all(torch.equal(p, expected[key]) for key, p in net.named_parameters())
    assert len(optimizer.param_groups) == 1


def test_merging_twice_and_before_any_split_is_harmless():
    optimizer, decay = decaying(model())
    groups = optimizer.param_groups
    decay.merge()
    decay.split()
    decay.split()
    assert len(optimizer.param_groups) == 2
    decay.merge()
    decay.merge()
    assert optimizer.param_groups is groups and len(groups) == 1


def test_a_step_that_failed_is_undone_by_merging():
    net = model()
    optimizer, decay = decaying(net)
    groups = optimizer.param_groups

    def failing():
        decay.split()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(failing)
    assert optimizer.param_groups is not groups
    decay.merge()
    assert optimizer.param_groups is groups


def test_without_decay_nothing_is_split():
    net = model()
    optimizer, decay = decaying(net, lambda params, _: SGD(params, lr=0.1))
    group = optimizer.param_groups[0]
    decay.split()
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0] is group


def test_after_remove_the_optimizer_is_as_if_untouched():
    net, plain = model(), model()
    optimizer, decay = decaying(net)
    groups = optimizer.param_groups
    decay.split()
    decay.remove()
    assert optimizer.param_groups is groups
    decay.merge = None  # a hook that were left would call this
    actual, expected = train(net, optimizer), train(plain, OPTIMIZERS["sgd"](plain.parameters(), DECAY))
    assert all(torch.equal(p, expected[key]) for key, p in actual.items())


# ------------------------------------------------------------------------------------------- the optimizer has them all


def check(net, *optimizers):
    check_holds_factors(optimizers, net, svd_layers(net))


def test_one_or_several_optimizers_may_hold_the_factors():
    net = model()
    check(net, SGD(net.parameters(), lr=0.1))
    check(net, SGD(net[0].parameters(), lr=0.1), SGD(net[1:].parameters(), lr=0.1))


def test_an_optimizer_built_before_decomposing_is_refused():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    optimizer = SGD(net.parameters(), lr=0.1)
    decompose(net)
    with pytest.raises(ValueError, match="an optimizer holds 2 parameters that the model does not have"):
        check(net, optimizer)


@pytest.mark.parametrize("factor", "UsV")
def test_a_factor_without_an_optimizer_is_refused_by_name(factor):
    net = model()
    held = [p for name, p in net.named_parameters() if name != f"3.{factor}"]
    with pytest.raises(ValueError, match=rf"`3\.{factor}` must be in exactly one optimizer, found it in 0"):
        check(net, SGD(held, lr=0.1))


def test_a_factor_in_two_optimizers_is_refused_by_name():
    net = model()
    with pytest.raises(ValueError, match=r"`0\.s` must be in exactly one optimizer, found it in 2"):
        check(net, SGD(net.parameters(), lr=0.1), SGD([net[0].s], lr=0.1))


def test_a_frozen_factor_needs_no_optimizer():
    net = model()
    net[0].requires_grad_(False)
    check(net, SGD([p for p in net.parameters() if p.requires_grad], lr=0.1))


# ------------------------------------------------------------------------------------------------------- pruned ranks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exactly_the_pruned_ranks_are_forgotten(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters(), 0.0)
    train(net, optimizer)
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    kept = torch.tensor([True, False, True, True, False, True])
    net[0].keep(kept)
    forget_pruned([optimizer], svd_layers(net).values())
    factors = {net[0].U, net[0].s, net[0].V}
    compared = 0
    for p, state in optimizer.state.items():
        for key, memory in state.items():
            old = before[p][key]
            if p in factors and memory.shape == p.shape:
                assert not memory[..., ~kept].any() and old[..., ~kept].any()
                assert torch.equal(memory[..., kept], old[..., kept])
                compared += 1
            else:
                assert torch.equal(memory, old)
    assert compared >= 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_ranks_do_not_move_and_the_others_move_on(name):
    net = model()
    optimizer = OPTIMIZERS[name](net.parameters(), 0.0)
    train(net, optimizer)
    layer = net[0]
    layer.keep(torch.tensor([True, False, True, True, False, True]))
    forget_pruned([optimizer], svd_layers(net).values())
    before = copy.deepcopy(layer)
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        net(inputs).square().sum().backward()
        optimizer.step()
    for factor in "UsV":
        now, then = getattr(layer, factor), getattr(before, factor)
        assert torch.equal(now[..., ~layer.mask], then[..., ~layer.mask])
        assert (now != then)[..., layer.mask].any(0).all()
