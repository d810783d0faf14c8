"""SVD training for PyTorch Lightning: a callback that trains a smaller, faster model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_svd.compression.compress import compress
    from lightning_svd.compression.report import CompressionReport
    from lightning_svd.files.low_rank import load_low_rank, save_low_rank
    from lightning_svd.files.sharded import load_sharded
    from lightning_svd.layers.compounds import svd_layers
    from lightning_svd.layers.layer import SVDLayer
    from lightning_svd.lightning.callback import SVDTrainingCallback
    from lightning_svd.lightning.spectrum_monitor import SpectrumMonitor
    from lightning_svd.model.counting import count_costs
    from lightning_svd.model.export import to_onnx
    from lightning_svd.model.folding import Folding, fold_norms
    from lightning_svd.model.layer_times import fastest_forms
    from lightning_svd.model.plan import LayerPlan, plan, read_plan, write_plan
    from lightning_svd.model.surgery import compact, decompose, to_dense, to_factored
    from lightning_svd.model.timing import Timing, profile
    from lightning_svd.ranks.allocation import keep_by_budget
    from lightning_svd.ranks.costs import ModelCost
    from lightning_svd.ranks.importance import Fisher, Importance, Outputs, Spectrum
    from lightning_svd.ranks.latency import LatencyTable
    from lightning_svd.report.data import BudgetRanks, LatencyReport, LayerReport, RankChange, SVDReport, summarize
    from lightning_svd.training.distillation import Distillation
    from lightning_svd.training.gathering import gather_factored
    from lightning_svd.training.policies import Alternating, FallToBudget, Finetune, GrowAndPrune, Nested, RankPolicy
    from lightning_svd.training.regularizers import Regularizer, add_gradients
    from lightning_svd.training.run import SVDTraining

__version__ = "0.2.0"

__all__ = [
    "Alternating",
    "BudgetRanks",
    "CompressionReport",
    "Distillation",
    "FallToBudget",
    "Finetune",
    "Fisher",
    "Folding",
    "GrowAndPrune",
    "Importance",
    "LatencyReport",
    "LatencyTable",
    "LayerPlan",
    "LayerReport",
    "ModelCost",
    "Nested",
    "Outputs",
    "RankChange",
    "RankPolicy",
    "Regularizer",
    "SVDLayer",
    "SVDReport",
    "SVDTraining",
    "SVDTrainingCallback",
    "Spectrum",
    "SpectrumMonitor",
    "Timing",
    "add_gradients",
    "compact",
    "compress",
    "count_costs",
    "decompose",
    "fastest_forms",
    "fold_norms",
    "gather_factored",
    "keep_by_budget",
    "load_low_rank",
    "load_sharded",
    "plan",
    "profile",
    "read_plan",
    "save_low_rank",
    "summarize",
    "svd_layers",
    "to_dense",
    "to_factored",
    "to_onnx",
    "write_plan",
]

# Each is imported when it is asked for: what one feature needs, W&B or Lightning itself, costs nobody else a second.
_HOMES = {
    "SVDTrainingCallback": "lightning.callback",
    "SpectrumMonitor": "lightning.spectrum_monitor",
    "SVDTraining": "training.run",
    "Distillation": "training.distillation",
    "gather_factored": "training.gathering",
    "compress": "compression.compress",
    "CompressionReport": "compression.report",
    "load_low_rank": "files.low_rank",
    "save_low_rank": "files.low_rank",
    "load_sharded": "files.sharded",
    **dict.fromkeys(("Folding", "fold_norms"), "model.folding"),
    "count_costs": "model.counting",
    "to_onnx": "model.export",
    "SVDLayer": "layers.layer",
    **dict.fromkeys(("Alternating", "FallToBudget", "Finetune", "GrowAndPrune"), "training.policies"),
    **dict.fromkeys(("Nested", "RankPolicy"), "training.policies"),
    **dict.fromkeys(("Regularizer", "add_gradients"), "training.regularizers"),
    **dict.fromkeys(("Fisher", "Importance", "Outputs", "Spectrum"), "ranks.importance"),
    **dict.fromkeys(("LayerPlan", "plan", "read_plan", "write_plan"), "model.plan"),
    **dict.fromkeys(("compact", "decompose", "to_dense", "to_factored"), "model.surgery"),
    "svd_layers": "layers.compounds",
    "fastest_forms": "model.layer_times",
    **dict.fromkeys(("Timing", "profile"), "model.timing"),
    "keep_by_budget": "ranks.allocation",
    "ModelCost": "ranks.costs",
    "LatencyTable": "ranks.latency",
    **dict.fromkeys(("BudgetRanks", "LatencyReport", "LayerReport"), "report.data"),
    **dict.fromkeys(("RankChange", "SVDReport", "summarize"), "report.data"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
