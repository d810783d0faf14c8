"""``torch.compile`` of factorized layers: one graph, in each form, before and after ranks change."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_svd import Alternating, GrowAndPrune, Nested, SVDTraining
from lightning_svd.layers.layer import factorize, release
from lightning_svd.layers.views import View


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
