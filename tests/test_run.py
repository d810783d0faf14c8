"""The state of a run: which ranks a cut keeps, and what a resumed run is told."""

import pytest
import torch
from torch import nn

from lightning_svd import decompose, svd_layers
from lightning_svd.run import SVDRun


def begun(scale=1.0):
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    weights = {name: model.get_submodule(name).weight for name in ("0", "2")}
    decompose(model)
    run = SVDRun(svd_layers(model), weights)
    run.watch_costs(model)
    model(torch.zeros(3, 12))
    assert run.stop_watching(3)
    return run


def keep(count):
    return lambda energies, cost: dict.fromkeys(energies, count)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_cut_keeps_the_strongest_at_any_scale(scale):
    run = begun(scale)
    with torch.no_grad():
        for layer in run.layers.values():
            layer.s.copy_(layer.s.flip(0))  # the strongest are now the last
    masks = run.choose_masks(1.0, keep(3))
    for name, layer in run.layers.items():
        assert masks[name].tolist() == [False] * (layer.full_rank - 3) + [True] * 3


def test_dropped_ranks_come_back_only_when_all_kept_ones_stay():
    run = begun()
    layer = run.layers["0"]
    weakest = torch.arange(10) >= 7
    run.cut(1, 0, {"0": weakest, "2": torch.ones(8, dtype=torch.bool)}, [])
    assert layer.rank == 3
    assert run.choose_masks(1.0, keep(2))["0"].nonzero().flatten().tolist() == [7, 8]
    assert run.choose_masks(1.0, keep(5))["0"].nonzero().flatten().tolist() == [0, 1, 7, 8, 9]


def test_a_cut_that_changes_no_rank_is_no_change():
    run = begun()
    assert run.cut(1, 0, run.choose_masks(0.0, keep(1)), []) is None
    assert run.timeline == []
    change = run.cut(2, 0, run.choose_masks(0.5, keep(2)), [])
    assert run.timeline == [change]
    assert dict(change.ranks) == {"0": 6, "2": 5}
    assert change.macs_ratio == run.cost.ratio(change.ranks, "macs")


def test_state_goes_through_a_file_that_loads_without_pickle(tmp_path):
    run = begun()
    run.cut(4, 1, run.choose_masks(0.5, keep(2)), [])
    run.warnings.append("careful")
    torch.save(run.state_dict(), tmp_path / "state")
    resumed = begun(2.0)
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert resumed.state_dict() == run.state_dict()
    assert resumed.cost == run.cost and resumed.timeline == run.timeline
