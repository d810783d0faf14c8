"""What compressing a trained model did to it, and what it cost its outputs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_svd.arguments import needs
from lightning_svd.compression.data import CHANGED, DIVERGENCE
from lightning_svd.report.data import SVDReport, finite
from lightning_svd.report.tables import screen_table
from lightning_svd.writing import write_whole

_UNITS = {"macs": "MACs", "params": "parameters", "energy": "energy"}  # as people say

# A relative error of outputs, or a divergence, from which a model is another one.
LARGE = {"relative squared error": 0.1, DIVERGENCE: 0.5, CHANGED: 0.1}


@dataclass(frozen=True)
class CompressionReport:
    """The report of :func:`~lightning_svd.compress`: the ranks kept, the ways tried, and how far outputs moved.

    Attributes:
        ranks: Each layer's rank and cost.
        target: "macs", "params" or "latency".
        share: Of it, that was asked for.
        choice: Which way to decide was taken.
        tried: Each way that was tried -> how far it moved held-out outputs.
        distance: How far they are moved in the end.
        measure: What distances are.
        shifts: Name of each layer -> the squared change of its output on what the dense model gives it, as a share of
            its size.
        carried: Name of each layer -> what each of its ranks carries, in the order in which they are kept.
        curve: Other shares of the cost -> how far outputs would be moved.
        bias_corrected: Whether biases make up for the mean of what was dropped.
        batch_norm_recalibrated: Whether running statistics of batch normalization were taken anew.
        reconstructed: Whether low-rank layers were trained towards the original outputs.
        inputs: How many inputs statistics were collected on.
        seconds: How long it took.
        no_faster: Which modules take no less time than before, in words; None if all may be faster.
    """

    ranks: SVDReport
    target: str
    share: float
    choice: str
    tried: Mapping[str, float]
    distance: float
    measure: str
    shifts: Mapping[str, float]
    carried: Mapping[str, Sequence[float]]
    curve: Mapping[float, float]
    bias_corrected: bool
    batch_norm_recalibrated: bool
    reconstructed: bool
    inputs: int
    seconds: float
    no_faster: str | None = None

    @property
    def warning(self) -> str | None:
        """What to know before the model is used; None if outputs are near what they were."""
        if not self.distance <= LARGE.get(self.measure, sys.float_info.max):
            return (
                f"outputs moved far ({self.measure} {self.distance:.3g}): ask for less, finetune, or calibrate with "
                "more inputs"
            )
        return None

    def __str__(self) -> str:
        lines = [str(self.ranks), f"{self.measure} of held-out outputs: {self.distance:.4g} ({self.choice})"]
        if self.warning:
            lines.append(f"Warning: {self.warning}")
        if self.no_faster:
            lines.append(f"Note: {self.no_faster}")
        if self.curve:
            lines.append(self.curve_table())
        return "\n".join(lines)

    @property
    def unit(self) -> str:
        """What the budget is counted in, in words."""
        return _UNITS.get(self.target, self.target)

    def curve_table(self) -> str:
        """How far outputs would move at other budgets, as a table for the terminal."""
        headings = (f"share of the {self.unit}", f"{self.measure} of held-out outputs")
        return screen_table(headings, self.curve_rows(), (), ())

    def curve_rows(self) -> list[tuple[str, str]]:
        """(share of the cost, distance) as text, the largest share first."""
        return [(f"{share:.0%}", f"{distance:.3g}") for share, distance in sorted(self.curve.items(), reverse=True)]

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it as JSON, written to ``path`` if one is given; a number that is not finite becomes null."""
        text = json.dumps(finite({**asdict(self), "ranks": self.ranks.to_dict()}), indent=2, allow_nan=False)
        if path is not None:
            write_whole(path, text)
        return text

    def to_html(self, path: str | Path) -> Path:
        """One self-contained page: what the ranks report shows, each layer's importance against its cost, the curve.

        Needs ``pip install 'lightning-svd[report]'``.

        Args:
            path: File to write.

        Returns:
            The path.
        """
        path = Path(path)
        with needs("report"):
            from lightning_svd.compression.page import render_compression  # knows this module

            page = render_compression(self)
        write_whole(path, page)
        return path
