"""Orthonormal factors by matrix products alone, Newton-Schulz, against QR and SVD: how exact, and how long.

    python benchmarks/orthogonalize.py --threads 1 --json out.json

Before a cut U and V are made orthonormal by two QR decompositions, and an SVD of k x k follows. The polar factor, the
orthonormal matrix that is nearest, would do in the place of Q, and a Newton-Schulz iteration finds it by products (Song
et al. 2021, arXiv 2105.02498, for the square root): ``X <- X (3 I - X^T X) / 2``, from singular values in (0, sqrt 3).
Far from orthonormal it begins with the quintic of Muon, ``X (a I + b X^T X + c (X^T X)^2)``, which lifts small singular
values faster and does not converge. The matrices: factors as a run trains them, orthonormal up to an error of 0.05
for each rank; normal random numbers; and singular values spread evenly by logarithms over four decades.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import torch
from harness import Row, Table, against, arguments, in_turns, milliseconds, save, times
from torch import Tensor

from lightning_svd.layers.matrices import Factors, exact_products, refactorized, roundoff

SIZES = ((64, 64), (256, 256), (576, 64), (512, 128), (512, 512), (1024, 1024))  # m, k
KINDS = ("as trained", "random", "four decades")
MOST = 40  # iterations
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, Muon


def newton_schulz(matrix: Tensor) -> tuple[Tensor, int | None]:
    """The orthonormal matrix (m, k) that is nearest, m >= k, and after how many iterations; None: not converged."""
    tolerance = roundoff(tuple(matrix.shape), matrix.dtype, 1.0) * math.sqrt(matrix.shape[1])
    identity = torch.eye(matrix.shape[1], dtype=matrix.dtype)
    gram = matrix.mT @ matrix
    largest = float(torch.linalg.matrix_norm(gram))  # no smaller than the largest singular value squared
    if not 0 < largest < math.inf:
        return matrix, None
    # Singular values of 1 on average, as far as none is then past what the iteration brings back to 1.
    scale = min(matrix.shape[1] / float(gram.trace()), 2.0 / largest)
    X, gram = matrix * math.sqrt(scale), gram * scale
    a, b, c = QUINTIC
    best = math.inf
    for iteration in range(MOST):
        defect = float(torch.linalg.matrix_norm(gram - identity))
        if defect <= tolerance or (defect < 1e-2 and defect >= best):
            return X, iteration  # as far as rounding lets it come
        best = defect
        far = defect > 0.25 * math.sqrt(matrix.shape[1]) and scale * largest <= 1.5
        lift = a * identity + (b * identity + c * gram) @ gram if far else 1.5 * identity - 0.5 * gram
        X = X @ lift
        gram = X.mT @ X
        largest = float(torch.linalg.matrix_norm(gram, torch.inf)) / scale
    return X, None


def refactorized_by_products(factors: Factors) -> Factors:
    """As ``refactorized``, with polar factors in the place of Q; by QR where one has not converged."""
    U, s, V = factors
    with torch.no_grad(), exact_products(s.device):
        (left, done), (right, also) = newton_schulz(U), newton_schulz(V)
        if done is None or also is None:
            return refactorized(factors)
        A, values, Bh = torch.linalg.svd((left.mT @ U) * s @ (right.mT @ V).mT)
        return Factors(left @ A, values, right @ Bh.mT)


def polar(matrix: Tensor) -> Tensor:
    """The orthonormal matrix that is nearest, by an SVD."""
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh


def made(kind: str, m: int, k: int, dtype: torch.dtype) -> Tensor:
    """A matrix (m, k) of a kind."""
    if kind == "random":
        return torch.randn(m, k, dtype=dtype)
    U, V = (torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64))[0] for rows in (m, k))
    if kind == "as trained":
        return (U + 0.05 / math.sqrt(2) * torch.randn(m, k, dtype=torch.float64) / math.sqrt(m)).to(dtype)
    return (U * torch.logspace(0, -4, k, dtype=torch.float64) @ V.mT).to(dtype)


def measure(kind: str, m: int, k: int, options: argparse.Namespace) -> Row:
    """A row: errors in float32, and times as shares of those of QR."""
    matrix = made(kind, m, k, torch.float32)
    found, iterations = newton_schulz(matrix)
    exact = polar(matrix.double())
    spectrum = torch.linspace(1, 0.01, k)
    factors = Factors(matrix, spectrum, made(kind, m, k, torch.float32))
    product = (factors.U * spectrum @ factors.V.mT).double()
    row: Row = {"kind": kind, "m": m, "k": k, "iterations": iterations}
    row["defect"] = _defect(found)
    row["defect_qr"] = _defect(torch.linalg.qr(matrix)[0])
    row["distance"] = float((found - exact).norm() / exact.norm())
    ways: dict[str, Callable[[Factors], Factors]] = {"whole_qr": refactorized, "whole": refactorized_by_products}
    for name, way in ways.items():
        U, s, V = map(torch.Tensor.double, way(factors))
        row[f"error_{name}"] = float((U * s @ V.mT - product).norm() / product.norm())
    actions = {
        "qr": lambda: torch.linalg.qr(matrix),
        "svd": lambda: polar(matrix),
        "products": lambda: newton_schulz(matrix),
        **{name: (lambda way=way: way(factors)) for name, way in ways.items()},
    }
    seconds = in_turns(actions, options.rounds)
    row |= {f"{name}_ms": 1e3 * against(seconds[name], seconds["qr"])["seconds"] for name in actions}
    row |= {name: against(seconds[name], seconds["qr"])["ratio"] for name in ("svd", "products")}
    row["whole"] = against(seconds["whole"], seconds["whole_qr"])["ratio"]
    return row


def _defect(matrix: Tensor) -> float:
    wide = matrix.double()
    identity = torch.eye(wide.shape[1], dtype=torch.float64)
    return float((wide.mT @ wide - identity).norm() / math.sqrt(wide.shape[1]))


def tables(rows: list[Row]) -> list[Table]:
    """Errors and times by size."""
    headings = [
        *("matrix", "size", "iterations", "orthogonality error, QR", "products", "QR, ms", "SVD / QR"),
        *("products / QR", "exact factors, products / QR", "their error, QR", "products"),
    ]
    lines = [
        [
            row["kind"],
            f"{row['m']} x {row['k']}",
            "none" if row["iterations"] is None else str(row["iterations"]),
            *(f"{row[key]:.0e}" for key in ("defect_qr", "defect")),
            milliseconds(row["qr_ms"] / 1e3),
            *(times(row[key]) for key in ("svd", "products", "whole")),
            *(f"{row[key]:.0e}" for key in ("error_whole_qr", "error_whole")),
        ]
        for row in rows
    ]
    return [Table("Orthonormal factors by products, float32", headings, lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = arguments(__doc__, rounds=9).parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sizes = SIZES[:1] if options.quick else SIZES
    rows = [measure(kind, m, k, options) for m, k in sizes for kind in KINDS]
    for table in tables(rows):
        table.print()
    save("orthogonalize", argv, options, rows)


if __name__ == "__main__":
    main()
