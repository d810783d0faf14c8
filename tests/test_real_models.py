"""Models that people use, built small and with random weights: trained, pruned, saved, loaded and exported."""

import pytest
import real_models
from architectures import ARCHITECTURES, WIDTH, WORDS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self.neurons"),
    pytest.mark.filterwarnings("ignore:SVD training. (1 layer stays|. layers stay) dense .*needs what only the dense"),
]

# Of the many, those that go different ways through the package; `python benchmarks/real_models.py` runs all.
TESTED = [
    "GPT-2",
    "T5",
    "Whisper",
    "Mamba",
    "RWKV",
    "ViT",
    "Swin",
    "Transformer (torch)",
    "LSTM language model",
    "U-Net",
    "MobileNet-style",
    "spiking net (snntorch)",
    "BERT with LoRA, its base factorized",
    "activations as of eight bits",
    "spectral norm",
]


@pytest.mark.parametrize("name", TESTED)
def test_a_model_goes_the_whole_way(name):
    if ARCHITECTURES[name].needs:
        pytest.importorskip(ARCHITECTURES[name].needs)
    row = real_models.measure(name, quick=True)
    assert row["refused"] is None
    assert abs(row["macs"] / row["counted"] - 1) < 0.005
    assert row["macs"] == row["counted"] or name == "spectral norm"  # whose iterations torch does not count
    assert 0.45 < row["left"] <= real_models.TARGET < row["share"]
    assert row["factorized"] + sum(row["skipped"].values()) == row["layers"]
    assert row["first loss"] < 32 and row["final"] < 32  # in eps
    assert row["low-rank file"] == 0.0
    if not str(row["torch.export"]).startswith("nor the dense model"):
        assert isinstance(row["torch.export"], float), row["torch.export"]
        assert row["torch.export"] < 1e-6


def test_experts_in_one_piece_are_why_a_budget_is_refused():
    pytest.importorskip("transformers", minversion="5")  # before, experts were modules of their own
    row = real_models.measure("Mixtral, experts in one piece", quick=True)
    attention = 2 * (16 * WIDTH * (2 * WIDTH + 2 * WIDTH // 2) + 2 * 16 * 16 * WIDTH)
    experts = 2 * 16 * 2 * 3 * WIDTH * 2 * WIDTH  # two of four for each word, three matrices each
    router, head = 2 * 16 * WIDTH * 4, 16 * WIDTH * WORDS
    assert row["counted"] == attention + experts + router + head
    assert "gate_up_proj" in row["refused"] and "4 matrices in one parameter" in row["refused"]
