"""The examples run, in small."""

from pathlib import Path

import pytest
import torch

from lightning_svd import load_low_rank

transformers = pytest.importorskip("transformers")
language_model = pytest.importorskip("language_model")

ROOT = Path(__file__).parents[1]


def test_a_language_model_is_trained_and_opened_as_dense_and_as_low_rank(tmp_path):
    size = [
        "--width",
        "16",
        "--depth",
        "1",
        "--steps",
        "8",
        "--target-params",
        "0.85",
        "--accelerator",
        "cpu",
        "--folder",
        str(tmp_path),
    ]
    found = language_model.main([str(ROOT / "README.md"), *size])
    assert found.keys() == {"dense", "truncated", "low-rank"}
    _, held_out = language_model.texts([ROOT / "README.md"])
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    small = load_low_rank(language_model.llama(16, 1), tmp_path / "low_rank.safetensors")
    for model in (dense, small):
        assert language_model.perplexity(model, held_out) == pytest.approx(found["low-rank"], rel=1e-4)
    count = sum(p.numel() for p in small.parameters())
    assert count <= 0.85 * sum(p.numel() for p in language_model.llama(16, 1).parameters())
    with torch.no_grad():
        assert small.generate(held_out[:1, :8], max_new_tokens=4, pad_token_id=0).shape == (1, 12)
