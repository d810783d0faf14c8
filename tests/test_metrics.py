"""Metrics against NumPy, in one process and in two."""

import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric
from models import SmallNet
from torch import nn
from torchmetrics import MetricCollection

from lightning_svd import decompose, svd_layers
from lightning_svd.layers.matrices import roundoff
from lightning_svd.report.metrics import (
    CompressionRatio,
    EffectiveRank,
    EnergyRank,
    OrthogonalityError,
    StableRank,
    singular_values,
)
from lightning_svd.training.regularizers import add_gradients

EPS = torch.finfo(torch.float32).eps


# NumPy, from the matrices themselves and in float64.


def spectrum(matrix):
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)


def stable(matrix):
    return np.linalg.norm(matrix, "fro") ** 2 / np.linalg.norm(matrix, 2) ** 2 if np.any(matrix) else 0.0


def effective(matrix):
    s = spectrum(matrix)
    if not s.any():
        return 0.0
    shares = s[s > 0] / s.sum()
    return math.exp(-(shares * np.log(shares)).sum())


def energy(matrix, share):
    energies = np.cumsum(spectrum(matrix) ** 2)
    return 0 if energies[-1] == 0 else int(np.argmax(energies >= share * energies[-1])) + 1


RANKS = {"stable": (StableRank, stable), "effective": (EffectiveRank, effective)}
SHAPES = [(1, 1), (7, 3), (3, 7), (40, 5), (5, 40), (12, 12)]


def matrices(seed, dtype=torch.float32):
    """One of each shape, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    return [*(torch.randn(*shape, generator=generator).to(dtype) for shape in SHAPES), torch.zeros(4, 6, dtype=dtype)]


def weight_of(matrix):
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], dtype=matrix.dtype)
    layer.weight.data = matrix.clone()
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", RANKS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_rank_is_the_mean_of_what_numpy_says(kind, dtype, seed):
    metric, reference = RANKS[kind][0](), RANKS[kind][1]
    for matrix in matrices(seed, dtype):
        metric.update(singular_values(weight_of(matrix)))
    expected = np.mean([reference(matrix.double().numpy()) for matrix in matrices(seed, dtype)])
    # Singular values in float32 at least, whatever the weight's dtype; a rank depends on all of them.
    assert metric.compute() == pytest.approx(expected, rel=4 * roundoff((40, 40), torch.float32))
    assert metric.compute().dtype == torch.float32


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_energy_rank_is_the_mean_of_what_numpy_says(share, seed):
    metric = EnergyRank(share)
    for matrix in matrices(seed, torch.float64):
        metric.update(singular_values(weight_of(matrix)))
    expected = [energy(matrix.numpy(), share) for matrix in matrices(seed, torch.float64)]
    assert metric.compute() == pytest.approx(np.mean(expected), rel=2 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_orthogonality_error_is_what_numpy_says(dtype, seed):
    metric, squares, ranks = OrthogonalityError(), 0.0, 0
    for matrix in matrices(seed, dtype):
        metric.update(matrix)
        exact = matrix.double().numpy()
        squares += np.linalg.norm(exact.T @ exact - np.eye(exact.shape[1])) ** 2
        ranks += exact.shape[1]
    assert metric.compute() == pytest.approx(math.sqrt(squares / ranks), rel=roundoff((40, 40), torch.float32))


def test_the_orthogonality_error_is_what_training_logs():
    model = SmallNet()
    decompose(model)
    metric = OrthogonalityError()
    for layer in svd_layers(model).values():
        layer.keep(2 * layer.full_rank // 3)
        layer.U.data += 0.1 * torch.randn_like(layer.U)
        metric.update(layer.factors().U)
        metric.update(layer.factors().V)
    logged = add_gradients(svd_layers(model).values()).orthogonality_error
    assert metric.compute() == pytest.approx(float(logged), rel=roundoff((216, 24), torch.float32))


def test_factors_of_one_shape_may_come_together():
    together, apart = OrthogonalityError(), OrthogonalityError()
    factors = torch.randn(5, 7, 3)
    together.update(factors)
    for factor in factors:
        apart.update(factor)
    assert together.compute() == pytest.approx(float(apart.compute()), rel=4 * EPS)


def test_orthonormal_columns_have_no_error():
    metric = OrthogonalityError()
    metric.update(torch.linalg.qr(torch.randn(64, 16)).Q)
    assert metric.compute() <= roundoff((64, 16), torch.float32)


@given(st.lists(st.tuples(st.integers(0, 10**13), st.integers(1, 10**13)), min_size=1, max_size=20))
def test_a_compression_ratio_counts_one_by_one(costs):
    metric = CompressionRatio()
    for kept, dense in costs:
        metric.update(kept, dense)
    kept, dense = (sum(column) for column in zip(*costs, strict=True))
    assert metric.kept == kept and metric.dense == dense
    assert metric.compute() == pytest.approx(kept / dense, rel=4 * EPS)


def test_the_value_of_one_step_is_that_steps_and_reset_forgets():
    metric = StableRank()
    assert metric(torch.tensor([2.0, 1.0, 1.0])) == 1.5
    assert metric(torch.ones(4)) == 4
    assert metric.compute() == 2.75
    metric.reset()
    metric.update(torch.ones(2))
    assert metric.compute() == 2


def test_one_spectrum_serves_a_collection_that_travels():
    collection = MetricCollection([StableRank(), EffectiveRank(), EnergyRank(0.9)])
    collection = pickle.loads(pickle.dumps(collection))
    collection.update(torch.ones(4))
    assert collection.compute() == {"StableRank": 4, "EffectiveRank": pytest.approx(4, rel=4 * EPS), "EnergyRank": 4}


# Two processes


def all_metrics():
    return {
        "stable": StableRank(),
        "effective": EffectiveRank(),
        "energy": EnergyRank(0.9),
        "error": OrthogonalityError(),
        "ratio": CompressionRatio(),
    }


def feed(metrics, matrix):
    values = singular_values(weight_of(matrix))
    for name in ("stable", "effective", "energy"):
        metrics[name].update(values)
    metrics["error"].update(matrix)
    metrics["ratio"].update(sum(matrix.shape), matrix.numel())


def in_a_process(fabric, folder):
    shared, copied = all_metrics(), all_metrics()
    for number, matrix in enumerate(matrices(0)):
        feed(copied, matrix)
        if number % 3 == fabric.global_rank:  # two thirds of them, and not the same number in both
            feed(shared, matrix)
    values = {
        kind: {name: metric.compute() for name, metric in metrics.items()}
        for kind, metrics in (("shared", shared), ("copied", copied))
    }
    torch.save(values, folder / f"{fabric.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_two_processes_that_share_the_layers_or_hold_them_all_get_the_value_of_all(tmp_path):
    Fabric(accelerator="cpu", devices=2, strategy="ddp_fork").launch(in_a_process, tmp_path)
    expected = {"shared": all_metrics(), "copied": all_metrics()}
    for number, matrix in enumerate(matrices(0)):
        feed(expected["copied"], matrix)
        if number % 3 < 2:
            feed(expected["shared"], matrix)
    for rank in (0, 1):
        for kind, values in torch.load(tmp_path / f"{rank}.pt").items():
            for name, value in values.items():
                assert value == pytest.approx(float(expected[kind][name].compute()), rel=8 * EPS), (kind, name)


# What cannot be measured


@pytest.mark.parametrize("metric", [StableRank(), EffectiveRank(), EnergyRank(0.9)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spectrum_that_is_not_finite_has_no_rank(metric, value):
    metric.reset()
    metric.update(torch.ones(3))
    metric.update(torch.tensor([1.0, value]))
    assert metric.compute().isnan()


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_what_is_not_a_spectrum_or_a_factor_is_refused(shape):
    with pytest.raises(ValueError, match=r"`spectrum` must be singular values of shape \(r,\), got"):
        StableRank().update(torch.ones(shape))
    with pytest.raises(ValueError, match=r"`factor` must have shape \(\.\.\., n, r\), got \(4,\)"):
        OrthogonalityError().update(torch.ones(4))


@pytest.mark.parametrize("threshold", [0.0, 1.1, math.nan, "0.9"])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match=r"`threshold` must be (a float )?in \(0, 1\], got"):
        EnergyRank(threshold)


@pytest.mark.parametrize(("kept", "dense"), [(-1, 3), (1, 0)])
def test_costs_out_of_range_are_refused(kept, dense):
    with pytest.raises(ValueError, match=f"`kept` must be >= 0 and `dense` > 0, got {kept} and {dense}"):
        CompressionRatio().update(kept, dense)


# Singular values of layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(3, 8, 3), nn.Conv1d(3, 8, 3), nn.Embedding(9, 4)])
def test_singular_values_of_a_plain_layer(layer, dtype):
    layer = copy.deepcopy(layer).to(dtype)
    before = layer.weight.detach().clone()
    values = singular_values(layer)
    expected = spectrum(layer.weight.detach().flatten(1).numpy())
    assert values.numpy() == pytest.approx(expected, abs=roundoff((27, 8), dtype) * expected[0])
    assert values.dtype == dtype and not values.requires_grad
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("conv_mode", ["channel", "spatial"])
def test_a_convolution_is_the_matrix_of_its_mode_factorized_or_not(conv_mode):
    conv = nn.Conv2d(3, 8, (3, 5))
    plain = singular_values(conv, conv_mode)
    decompose(nn.Sequential(conv), conv_mode=conv_mode)
    assert singular_values(conv).tolist() == pytest.approx(plain.tolist(), abs=roundoff((24, 40), torch.float32))


def test_of_a_factorized_layer_they_are_the_magnitudes_of_what_is_kept():
    layer = nn.Linear(6, 4)
    decompose(layer)
    layer.s.data = torch.tensor([1.0, -3.0, 2.0, 5.0])
    layer.keep(3)
    assert singular_values(layer).tolist() == pytest.approx([5.0, 3.0, 2.0], rel=roundoff((6, 4), torch.float32))


def test_autocast_does_not_reach_them():
    layer = nn.Linear(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = singular_values(layer)
    assert torch.equal(inside, singular_values(layer))


def test_a_weight_that_is_not_finite_has_no_singular_values():
    layer = nn.Linear(3, 2)
    layer.weight.data[0, 0] = math.inf
    values = singular_values(layer)
    assert values.shape == (2,) and values.isnan().all()


def test_a_layer_without_a_matrix_is_refused():
    with pytest.raises(ValueError, match="`layer` must have a weight of two dimensions or more, got BatchNorm2d"):
        singular_values(nn.BatchNorm2d(4))


def test_metrics_need_no_lightning_and_no_wandb():
    script = """
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "wandb"):
    sys.modules[name] = None  # importing it raises ImportError
import lightning_svd.report.metrics
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
