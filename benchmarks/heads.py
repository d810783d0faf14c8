"""Queries and keys cut as one: what that loses of attention's scores, against each of the two cut by itself.

    python benchmarks/heads.py --json out.json

In each head the scores are ``x W_q^T W_k x^T``, a product of rank d / h. Each of W_q and W_k as two factors of rank k
has 2kd entries; the best approximation of each head's product of rank r has 2rd, in two dense matrices. Both ways are
given as many entries, so as many multiply-accumulates. The weights have random singular vectors and the singular values
of a power law. What is lost is the squared error of all heads' products, as a share of their squared size. Nothing is
timed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Row, Table, arguments, save
from torch import Tensor

SIZES = ((384, 6), (768, 12))  # width and heads
EXPONENTS, SHARES = (0.2, 0.7, 1.2), (0.75, 0.5, 0.35)


def weight(width: int, exponent: float) -> Tensor:
    """A square weight whose singular values fall by a power law."""
    U, V = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
    return U * torch.arange(1.0, width + 1) ** -exponent @ V.mT


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank, of each of a stack."""
    U, s, V = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * s[..., None, :rank] @ V[..., :rank, :]


def lost(width: int, heads: int, exponent: float, share: float) -> Row:
    """A row: what both ways lose at a share of the entries."""
    size = width // heads
    queries, keys = weight(width, exponent), weight(width, exponent)
    products = queries.view(heads, size, width).mT @ keys.view(heads, size, width)
    alone = [cut(matrix, round(share * width / 2)).view(heads, size, width) for matrix in (queries, keys)]
    # The singular values of each product are those of a small matrix.
    triangles = [torch.linalg.qr(matrix.view(heads, size, width).mT)[1] for matrix in (queries, keys)]
    s = torch.linalg.svdvals(triangles[0] @ triangles[1].mT)
    row: Row = {"width": width, "heads": heads, "exponent": exponent, "share": share}
    row["apart"] = float((products - alone[0].mT @ alone[1]).square().sum() / products.square().sum())
    row["together"] = float(s[:, round(share * size) :].square().sum() / s.square().sum())
    return row


def tables(rows: list[Row]) -> list[Table]:
    """What is lost at each share."""
    headings = ["width, heads", "spectrum", "MACs of Q and K", "lost, each cut by itself", "lost, cut as one"]
    lines = [
        [
            f"{row['width']}, {row['heads']}",
            f"rank^-{row['exponent']:g}",
            f"{row['share']:.0%}",
            *(f"{row[way]:.2%}" for way in ("apart", "together")),
        ]
        for row in rows
    ]
    return [Table("Queries and keys", headings, lines)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = arguments(__doc__, rounds=1).parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    sizes = [(48, 3)] if options.quick else SIZES
    rows = [lost(*size, exponent, share) for size in sizes for exponent in EXPONENTS for share in SHARES]
    for table in tables(rows):
        table.print()
    save("heads", argv, options, rows)


if __name__ == "__main__":
    main()
