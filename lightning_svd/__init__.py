"""SVD training for PyTorch Lightning: a callback that trains a smaller, faster model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_svd.costs import svd_layers
from lightning_svd.export import to_onnx
from lightning_svd.layers import SVDConv, SVDEmbedding, SVDLayer, SVDLinear
from lightning_svd.low_rank_files import load_low_rank, save_low_rank
from lightning_svd.plans import LayerPlan, plan, read_plan, write_plan
from lightning_svd.regularizers import add_gradients
from lightning_svd.report import LayerReport, RankChange, SVDReport, summarize
from lightning_svd.surgery import compact, decompose, to_dense, to_factored

if TYPE_CHECKING:
    from lightning_svd.callback import SVDTrainingCallback
    from lightning_svd.spectrum_monitor import SpectrumMonitor

__version__ = "0.1.0"

__all__ = [
    "LayerPlan",
    "LayerReport",
    "RankChange",
    "SVDConv",
    "SVDEmbedding",
    "SVDLayer",
    "SVDLinear",
    "SVDReport",
    "SVDTrainingCallback",
    "SpectrumMonitor",
    "add_gradients",
    "compact",
    "decompose",
    "load_low_rank",
    "plan",
    "read_plan",
    "save_low_rank",
    "summarize",
    "svd_layers",
    "to_dense",
    "to_factored",
    "to_onnx",
    "write_plan",
]


# The rest of the package works in plain PyTorch; only these need Lightning.
_CALLBACKS = {
    "SVDTrainingCallback": "lightning_svd.callback",
    "SpectrumMonitor": "lightning_svd.spectrum_monitor",
}


def __getattr__(name: str) -> Any:
    if name in _CALLBACKS:
        return getattr(import_module(_CALLBACKS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
