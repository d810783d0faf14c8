"""SVD training for PyTorch Lightning: a callback that trains a smaller, faster model."""

from typing import TYPE_CHECKING, Any

from lightning_svd.costs import svd_layers
from lightning_svd.layers import SVDConv2d, SVDLayer, SVDLinear
from lightning_svd.low_rank_files import load_low_rank, save_low_rank
from lightning_svd.regularizers import add_gradients
from lightning_svd.report import LayerReport, RankChange, SVDReport, summarize
from lightning_svd.surgery import LayerPlan, compact, decompose, plan, to_dense, to_factored

if TYPE_CHECKING:
    from lightning_svd.callback import SVDTrainingCallback

__version__ = "0.1.0"

__all__ = [
    "LayerPlan",
    "LayerReport",
    "RankChange",
    "SVDConv2d",
    "SVDLayer",
    "SVDLinear",
    "SVDReport",
    "SVDTrainingCallback",
    "add_gradients",
    "compact",
    "decompose",
    "load_low_rank",
    "plan",
    "save_low_rank",
    "summarize",
    "svd_layers",
    "to_dense",
    "to_factored",
]


def __getattr__(name: str) -> Any:
    # The rest of the package works in plain PyTorch; only the callback needs Lightning.
    if name == "SVDTrainingCallback":
        from lightning_svd.callback import SVDTrainingCallback

        return SVDTrainingCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
