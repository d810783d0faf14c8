"""``torch.compile`` of factorized layers: one graph, in each form, before and after ranks change."""

import gc

import pytest
import torch
import torch.nn.functional as F
from models import SmallNet, data, quiet_trainer
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_svd import Alternating, FallToBudget, GrowAndPrune, Nested, SVDTraining, SVDTrainingCallback
from lightning_svd.layers.layer import factorize, release
from lightning_svd.layers.views import View
from lightning_svd.model.compiled import as_written


class Net(nn.Module):
    """A convolution and a linear layer, with what models read of a weight."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 12)

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype).to(self.conv.weight.dtype)
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def built(form):
    net = Net()
    for name, layer in (("conv", net.conv), ("head", net.head)):
        factorize(layer, View.of(layer), name, form="dense" if form == "dense" else "svd")
        if form == "pair":
            layer.to_pair()
    return net


@pytest.fixture(autouse=True)
def _fresh():
    gc.collect()  # of runs that others gave up
    torch._dynamo.reset()


@pytest.mark.parametrize("form", ["dense", "svd", "pair"])
def test_a_factorized_model_compiles_as_one_graph(form):
    net, x = built(form), torch.randn(2, 3, 8, 8)
    expected = net(x)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert all(p.grad is not None for layer in (net.conv, net.head) for p in layer.form.trained)
    compiled(x)
    assert counter.frame_count == 1


def test_a_change_of_rank_or_form_compiles_anew_and_computes_what_it_should():
    net, x = built("svd"), torch.randn(2, 3, 8, 8)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=False)
    compiled(x).sum().backward()  # what is compiled next is given weights of which the factors have gradients
    for change in (lambda layer: layer.keep(6), lambda layer: layer.shrink(), lambda layer: layer.to_pair(), release):
        change(net.head)
        torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 5


# Dynamo's own: it asks the intermediate result, which is no leaf, for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_weight_that_is_read_in_a_compiled_function_is_computed():
    net, x = built("svd"), torch.randn(4, 16)

    def tied(x):
        return x @ net.head.weight.T + net.head.weight.sum()

    torch.testing.assert_close(torch.compile(tied, backend="eager")(x), tied(x))


def test_a_compiled_module_whose_ranks_fall_often_stays_compiled():
    torch.manual_seed(0)
    net, counter = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)), CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=False)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    schedule = FallToBudget(start=0.2, end=0.8, shape="linear", cuts=10)
    run = SVDTraining(net, optimizer, 40, target_macs=0.3, importance="spectrum", schedule=schedule)
    for _ in range(40):
        compiled(torch.randn(4, 16)).square().mean().backward()  # fails beyond eight compilations for one function
        run.step()
        optimizer.zero_grad()
    assert counter.frame_count == len(run.timeline) + 1 == 11
    run.finish()
    before = counter.frame_count
    compiled(torch.randn(4, 16))
    assert counter.frame_count == before + 1


class Silent(SmallNet):
    """Without what the compiler makes nothing of in a step."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("importance", ["spectrum", "fisher"])
def test_a_lightning_module_that_is_compiled_as_a_whole_is_seen_and_trained_as_the_plain_one(importance):
    reports, states = [], []
    for compiles in (False, True):
        torch.manual_seed(0)
        model, counter = Silent(), CompileCounter()
        callback = SVDTrainingCallback(target_macs=0.5, importance=importance)
        trainer = quiet_trainer(callbacks=[callback])
        trainer.fit(torch.compile(model, backend=counter) if compiles else model, data())
        reports.append(callback.report)
        states.append(model.state_dict())
    assert 0 < counter.frame_count < len(callback.report.timeline) + 4
    assert not reports[1].warnings and reports[1].macs_ratio <= 0.5
    assert [layer.rank for layer in reports[0].layers] == [layer.rank for layer in reports[1].layers]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_code_runs_as_written_until_the_last_who_wants_it_ends():
    compiled, x = torch.compile(nn.Linear(4, 4), backend=(counter := CompileCounter())), torch.ones(2, 4)
    first, second = as_written(), as_written()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    compiled(x)
    assert counter.frame_count == 0
    second.__exit__(None, None, None)
    compiled(x)
    assert counter.frame_count == 1


def test_a_loop_that_is_given_up_leaves_torch_compiling():
    net = nn.Linear(8, 8)
    run = SVDTraining(net, torch.optim.SGD(net.parameters(), 0.1), 10, target_macs=0.5)
    compiled = torch.compile(nn.Linear(4, 4), backend=(counter := CompileCounter()))
    compiled(torch.ones(2, 4))
    assert counter.frame_count == 0  # the first batch is watched
    del run, net
    gc.collect()
    compiled(torch.ones(2, 4))
    assert counter.frame_count == 1


def test_an_interrupted_fit_leaves_torch_compiling():
    class Failing(SmallNet):
        def training_step(self, batch, batch_idx):
            raise KeyError("in the batch that is watched")

    compiled = torch.compile(nn.Linear(4, 4), backend=(counter := CompileCounter()))
    with pytest.raises(KeyError):
        quiet_trainer(callbacks=[SVDTrainingCallback(target_macs=0.5)]).fit(Failing(), data())
    compiled(torch.ones(2, 4))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "schedule",
    [Alternating(cycles=3), GrowAndPrune(), Nested(start=0.1, cuts=3, share=0.8)],
    ids=["alternating", "grow_and_prune", "nested"],
)
def test_a_compiled_run_whose_ranks_go_up_and_down_is_the_run_that_is_not_compiled(schedule):
    losses, ranks = [[], []], set()
    for compiles in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))
        if compiles:
            net.compile(backend="eager")
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        run = SVDTraining(net, optimizer, 20, target_macs=0.3, schedule=schedule)
        for _ in range(20):
            loss = net(torch.randn(4, 12)).square().mean()
            ranks.add(tuple(layer.rank for layer in run.layers.values()))
            loss.backward()
            losses[compiles].append(loss.item())
            run.step()
            optimizer.zero_grad()
    assert losses[0] == losses[1] and len(ranks) > 1
