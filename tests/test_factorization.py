"""A matrix and its singular value decomposition: accuracy, order, signs, refusals, and notions of rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_svd.layers.matrices import (
    Factors,
    effective_rank,
    energy_rank,
    exact_products,
    numerical_rank,
    reconstruct,
    refactorized,
    roundoff,
    singular_values,
    stable_rank,
    svd,
    truncate,
)

DTYPES = [torch.float32, torch.float64]


def orthonormal(rows, columns, generator):
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def with_spectrum(spectrum, m, n, generator):
    rank = len(spectrum)
    return (orthonormal(m, rank, generator) * spectrum) @ orthonormal(n, rank, generator).mT


MATRICES = {
    "gaussian": lambda m, n, g: torch.randn(m, n, generator=g, dtype=torch.float64),
    "zero": lambda m, n, g: torch.zeros(m, n, dtype=torch.float64),
    "rank one": lambda m, n, g: with_spectrum(torch.ones(1, dtype=torch.float64), m, n, g),
    "all equal": lambda m, n, g: with_spectrum(torch.ones(min(m, n), dtype=torch.float64), m, n, g),
    "graded": lambda m, n, g: with_spectrum(torch.logspace(0, -12, min(m, n), dtype=torch.float64), m, n, g),
}


def make(kind, m, n, seed, dtype, scale=1.0):
    return (scale * MATRICES[kind](m, n, torch.Generator().manual_seed(seed))).to(dtype)


def spectral_norm(matrix):
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


# 1000 examples for each of the two dtypes.
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(sorted(MATRICES)),
    m=st.just(1) | st.integers(1, 24),
    n=st.just(1) | st.integers(1, 24),
    scale=st.sampled_from([1.0, 1e30, 1e-30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_svd_is_accurate_ordered_signed_and_repeatable(dtype, kind, m, n, scale, seed):
    matrix = make(kind, m, n, seed, dtype, scale)
    tolerance = 32 * torch.finfo(dtype).eps * math.sqrt(max(m, n))
    U, s, V = svd(matrix)
    rank = min(m, n)
    assert (U.shape, s.shape, V.shape) == ((m, rank), (rank,), (n, rank))
    # In float64, so that only the factors' own errors are measured.
    residual = reconstruct(U.double(), s.double(), V.double()) - matrix.double()
    assert spectral_norm(residual) <= tolerance * spectral_norm(matrix)
    for factor in (U, V):
        gram = factor.double().mT @ factor.double()
        assert spectral_norm(gram - torch.eye(rank, dtype=torch.float64)) <= tolerance
    assert (s >= 0).all() and (s.diff() <= 0).all()
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    assert all(torch.equal(one, other) for one, other in zip((U, s, V), svd(matrix.clone()), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_negating_a_matrix_negates_v_alone(dtype):
    spectrum = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    matrix = with_spectrum(spectrum, 7, 5, torch.Generator().manual_seed(0)).to(dtype)
    U, s, V = svd(matrix)
    negated = svd(-matrix)
    # Singular vectors turn by the matrix's error over the smallest gap, 1; the fifth singular value is rounding.
    tolerance = roundoff((7, 5), dtype) * 8.0 / 1.0
    for actual, expected in zip(truncate(negated, 4), truncate(Factors(U, s, -V), 4), strict=True):
        assert (actual - expected).abs().max() <= tolerance


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value):
    matrix = torch.ones(3, 4)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match=r"`encoder\.fc`: expected finite weights, got 1 NaN or infinite of 12"):
        svd(matrix, "encoder.fc")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,), (2, 0, 4), ()])
def test_what_is_not_a_filled_matrix_is_refused_by_name(shape):
    with pytest.raises(ValueError, match=r"`encoder\.fc`: expected a non-empty matrix, got shape"):
        svd(torch.ones(shape), "encoder.fc")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_factors_accurate_to_float32(dtype):
    matrix = make("gaussian", 9, 6, 0, dtype)
    factors = svd(matrix)
    assert {factor.dtype for factor in factors} == {torch.float32}
    residual = reconstruct(*factors) - matrix.float()
    assert residual.abs().max() <= roundoff((9, 6), torch.float32) * spectral_norm(matrix)


def test_autocast_and_autograd_do_not_reach_the_factors():
    matrix = make("gaussian", 9, 6, 0, torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        inside = svd(matrix)
    assert not any(factor.requires_grad for factor in inside)
    assert all(torch.equal(one, other) for one, other in zip(inside, svd(matrix), strict=True))


def test_truncation_is_the_best_approximation_of_its_rank():
    matrix = make("gaussian", 6, 4, 0, torch.float64)
    factors = svd(matrix)
    two = truncate(factors, 2)
    assert (two.U.shape, two.s.shape, two.V.shape) == ((6, 2), (2,), (4, 2))
    # Eckart and Young 1936: the error is the first singular value that was dropped.
    error = spectral_norm(matrix - reconstruct(*two))
    assert error == pytest.approx(float(factors.s[2]), rel=roundoff((6, 4), torch.float64))


def test_truncated_to_what_there_is_nothing_is_copied():
    factors = svd(make("gaussian", 6, 4, 0, torch.float64))
    assert truncate(factors, 4) is factors
    assert all(part.data_ptr() == whole.data_ptr() for part, whole in zip(truncate(factors, 3), factors, strict=True))


# ------------------------------------------------------------------------------------------- where LAPACK has trouble


def test_what_does_not_converge_in_float32_is_computed_in_float64():
    torch.manual_seed(7)
    matrix = torch.eye(256) + 3e-5 * torch.randn(256, 256) / 16  # clusters of nearly equal singular values
    U, s, V = svd(matrix, "fc")
    assert {factor.dtype for factor in (U, s, V)} == {torch.float32}
    assert spectral_norm(reconstruct(U, s, V) - matrix) <= roundoff((256, 256), torch.float32)
    assert (singular_values(matrix) - s).abs().max() <= roundoff((256, 256), torch.float32)
    exact = refactorized(Factors(U, s, V), "fc")
    assert spectral_norm(reconstruct(*exact) - matrix) <= roundoff((256, 256), torch.float32)


def failing_below(dtype, function):
    """`function` as if it converged in wider dtypes only."""

    def compute(matrix, *args, **kwargs):
        if matrix.dtype.itemsize < dtype.itemsize:
            raise torch.linalg.LinAlgError("failed to converge")
        return function(matrix, *args, **kwargs)

    return compute


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (2, 9, 6)])
def test_the_second_try_gives_the_same_in_the_same_dtype(shape, monkeypatch):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected, values = svd(matrix), singular_values(matrix)
    for name in ("svd", "svdvals"):
        monkeypatch.setattr(torch.linalg, name, failing_below(torch.float64, getattr(torch.linalg, name)))
    for actual, wanted in zip((*svd(matrix), singular_values(matrix)), (*expected, values), strict=True):
        assert actual.dtype == torch.float32
        # Singular vectors turn by the error over the smallest gap.
        assert (actual - wanted).abs().max() <= 100 * roundoff(shape[-2:], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_does_not_converge_at_all_is_refused_by_name(dtype, monkeypatch):
    def fail(*_, **__):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with pytest.raises(ValueError, match=r"`encoder\.fc`: its singular value decomposition does not converge: failed"):
        svd(torch.ones(3, 4, dtype=dtype), "encoder.fc")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_of_what_is_not_finite_all_singular_values_are_unknown(value):
    matrix = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    matrix[1, 2, 0] = value
    values = singular_values(matrix)
    assert values.shape == (2, 3) and values.dtype == torch.float32 and values.isnan().all()


# -------------------------------------------------------------------------------------------------- exact arithmetic


@pytest.fixture
def precision():
    """Sets the global precision of matrix products, and restores it."""
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_products_are_exact_inside_and_as_the_user_has_set_them_outside(setting, precision):
    precision(setting)
    with torch.autocast("cpu", torch.bfloat16):
        with exact_products(torch.device("cpu")):
            assert torch.get_float32_matmul_precision() == "highest" and not torch.is_autocast_enabled("cpu")
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == setting and torch.is_autocast_enabled("cpu")
        with pytest.raises(KeyError), exact_products(torch.device("cpu")):
            raise KeyError
        assert torch.get_float32_matmul_precision() == setting and torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize(("m", "n"), [(96, 96), (128, 64), (64, 128)])
def test_twenty_exact_refactorizations_move_a_matrix_by_rounding_only(m, n, setting, precision):
    precision(setting)
    matrix = make("gaussian", m, n, 0, torch.float32)
    factors = svd(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            factors = refactorized(factors)
    error = reconstruct(*(factor.double() for factor in factors)) - matrix.double()
    # Twenty independent roundings, of which each is one.
    assert spectral_norm(error) <= math.sqrt(20) * roundoff((m, n), torch.float32) * spectral_norm(matrix)
    for factor in (factors.U.double(), factors.V.double()):
        defect = factor.mT @ factor - torch.eye(min(m, n), dtype=torch.float64)
        assert spectral_norm(defect) <= roundoff((m, n), torch.float32)
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize("shape", [(9, 6, 4), (6, 9, 4), (5, 5, 5), (7, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_refactorized_is_the_svd_of_the_product_of_any_factors(shape, dtype):
    m, n, k = shape
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in ((m, k), (k,), (n, k))]
    U, s, V = refactorized(Factors(*made))
    product = reconstruct(*(factor.double() for factor in made))
    error = reconstruct(U.double(), s.double(), V.double()) - product
    assert spectral_norm(error) <= roundoff((m, n), dtype) * spectral_norm(product)
    assert (s >= 0).all() and (s.diff() <= 0).all()
    for factor in (U.double(), V.double()):
        gram = factor.mT @ factor - torch.eye(factor.shape[1], dtype=torch.float64)
        assert spectral_norm(gram) <= roundoff((m, n), dtype)


def test_refactorized_of_no_rank_is_no_rank_and_of_what_is_not_finite_is_refused_by_name():
    nothing = Factors(torch.empty(6, 0), torch.empty(0), torch.empty(4, 0))
    assert [tuple(factor.shape) for factor in refactorized(nothing)] == [(6, 0), (0,), (4, 0)]
    with pytest.raises(ValueError, match="`fc`: expected finite weights"):
        refactorized(Factors(torch.ones(6, 2), torch.tensor([1.0, math.nan]), torch.ones(4, 2)), "fc")


def test_roundoff_grows_with_the_root_of_the_longer_side():
    assert roundoff((4, 9), torch.float32) == 32 * 2.0**-23 * 3
    assert roundoff((16, 9), torch.float64, factor=2) == 2 * 2.0**-52 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (12, 8), (8, 12), (20, 20)])
def test_numerical_rank_is_what_torch_says(shape, kind, dtype):
    matrix = make(kind, *shape, seed=0, dtype=dtype)
    assert numerical_rank(svd(matrix).s, shape) == torch.linalg.matrix_rank(matrix)


@pytest.mark.parametrize(("noise", "rank"), [(15.0, 1), (17.0, 2)])
def test_noise_grows_with_the_longer_side(noise, rank):
    s = torch.tensor([1.0, noise * torch.finfo(torch.float32).eps])
    assert numerical_rank(s, (4, 16)) == numerical_rank(s, (16, 4)) == rank


def test_no_singular_values_have_rank_zero():
    nothing = torch.empty(0)
    assert numerical_rank(nothing, (0, 3)) == stable_rank(nothing) == effective_rank(nothing) == 0
    assert energy_rank(nothing, 0.9) == 0


@pytest.mark.parametrize(
    ("s", "stable", "effective"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4, 4),
        ([0.0, 5.0, 0.0], 1, 1),
        ([0.0, 0.0], 0, 0),
        ([2.0, 1.0, 1.0], 1.5, 2 * math.sqrt(2)),  # entropy of (1/2, 1/4, 1/4) is 1.5 log 2
        ([-2.0, 1.0, -1.0], 1.5, 2 * math.sqrt(2)),
    ],
)
def test_stable_and_effective_rank_by_hand(s, stable, effective):
    exact = roundoff((len(s),), torch.float64)
    assert stable_rank(torch.tensor(s)) == pytest.approx(stable, rel=exact)
    assert effective_rank(torch.tensor(s)) == pytest.approx(effective, rel=exact)


@pytest.mark.parametrize(
    ("s", "share", "rank"),
    [
        ([10.0, 1.0, 1.0, 1.0], 0.75, 1),
        ([1.0, 1.0, -10.0, 1.0], 0.75, 1),
        ([10.0, 1.0, 1.0, 1.0], 1.0, 4),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2),
        ([1.0, 1.0, 1.0, 1.0], 0.51, 3),
        ([0.0, 3.0, 0.0], 1.0, 1),
        ([0.0, 0.0], 0.9, 0),
    ],
)
def test_energy_rank_by_hand(s, share, rank):
    assert energy_rank(torch.tensor(s), share) == rank


# Powers of two, about 1e30 and 1e-30: scaling by them is exact, while squares in float32 would not be finite.
@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
def test_ranks_do_not_depend_on_the_scale(scale):
    s = svd(make("gaussian", 8, 6, 0, torch.float32)).s
    assert numerical_rank(scale * s, (8, 6)) == numerical_rank(s, (8, 6))
    assert stable_rank(scale * s) == stable_rank(s) > 1
    assert effective_rank(scale * s) == effective_rank(s) > 1
    assert energy_rank(scale * s, 0.7) == energy_rank(s, 0.7) > 1
