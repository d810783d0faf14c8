"""Models that people use, built small and with random weights: trained, pruned, saved, loaded and exported."""

import pytest
import real_models

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.neurons"),
    pytest.mark.filterwarnings("ignore:SVD training. 1 layers stay dense .*the model needs what only the dense"),
]


@pytest.mark.parametrize("name", real_models.MODELS)
def test_a_model_goes_the_whole_way(name):
    row = real_models.measure(name, quick=True)
    assert 0.45 < row["macs"] <= real_models.TARGET < row["share"]
    assert row["factorized"] + sum(row["skipped"].values()) == row["layers"]
    assert row["low-rank file"] == 0.0
    assert isinstance(row["torch.export"], float), row["torch.export"]
    assert row["torch.export"] < 1e-6
