"""Models that people use, built narrow and with random weights: what is found in them, and whether all of it works.

    python benchmarks/real_models.py --json out.json
    python benchmarks/real_models.py --quick

Each model is trained for a few steps under the callback down to half of its multiply-accumulates, saved as a low-rank
file and loaded again, followed by ``torch.export`` and, without ``--quick``, written as ONNX and run in onnxruntime.
What does not work is printed and kept in the table, and what does not work of the dense model either is called so.
So is what the callback refuses, with the error.

Two differences are in units of eps, 1.2e-7, the rounding of one number: of the first step's loss to that of the same
step without the callback, and of the outputs of the final model, in plain torch layers, to those of the model with
factorized layers at the end of its training.

The dense model's multiply-accumulates are counted twice. Once by the package, which replays the first batch in
evaluation; all that multiplies matrices or convolves counts, the products of attention among them. And once by torch's
own FlopCounterMode (whose operations are two for each of them) around an ordinary forward pass in evaluation, in
which scaled dot-product attention and LSTMs are told to do without the kernels that it knows no formula for.
"""

from __future__ import annotations

import io
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, BATCH
from harness import Row, Table, arguments, progress, save
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_svd import FallToBudget, SVDTrainingCallback, load_low_rank, save_low_rank
from lightning_svd.model.export import largest_difference, to_onnx
from lightning_svd.model.replay import untouched

TARGET, STEPS = 0.5, 8
EXPORTS = ("low-rank file", "torch.export", "ONNX")
Inputs = tuple[Tensor, ...]


class Task(LightningModule):
    """Random labels for the last dimension of whatever the model gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*inputs)

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        scores = self.model(*batch).flatten(0, -2)
        loss = F.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[-1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class AsTrained(Callback):
    """Keeps what the model gives in evaluation when its training has ended, before it becomes a plain one."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.outputs: Tensor | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Task)
        self.outputs = evaluated(pl_module.model, self.inputs)


def built(name: str) -> tuple[Task, Inputs]:
    """A model, always with the same weights, and what it is called with."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    return Task(architecture.build()), tuple(make() for make in architecture.inputs)


def fit(task: Task, inputs: Inputs, *callbacks: Callback) -> None:
    """Train for a few steps, always with the same random numbers."""
    torch.manual_seed(1)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([inputs] * STEPS, batch_size=None))


def evaluated(model: nn.Module, inputs: Inputs) -> Tensor:
    """What it gives in evaluation, which some models (observers of ranges, RWKV) are not to remember."""
    model.eval()
    with untouched(model), torch.no_grad():
        return model(*inputs)


@contextmanager
def without_kernels_of_onednn() -> Iterator[None]:
    """Compute by torch's own products, in LSTMs too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Intel's GPUs, whatever is set
        flags = torch.backends.mkldnn.flags(enabled=False)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


def counted(name: str) -> int:
    """Multiply-accumulates of the dense model for one input, as torch counts them."""
    task, inputs = built(name)
    task.model.eval()
    for child in task.modules():
        if hasattr(child, "set_experts_implementation"):
            child.set_experts_implementation("eager")
    # With gradients: without them torch's encoders have one kernel for a whole layer, which has no formula.
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), without_kernels_of_onednn(), counter:
        task.model(*inputs)
    return counter.get_total_flops() // 2 // BATCH


def measure(name: str, quick: bool) -> Row:
    """Take one model the whole way."""
    row: Row = {"model": name, "counted": counted(name), "refused": None}
    dense, inputs = built(name)
    fit(dense, inputs)
    task, inputs = built(name)
    schedule, asked = FallToBudget(cuts=3), ARCHITECTURES[name].arguments
    callback, as_trained = SVDTrainingCallback(target_macs=TARGET, schedule=schedule, **asked), AsTrained(inputs)
    try:
        fit(task, inputs, callback, as_trained)
    except ValueError as error:
        return row | {"refused": str(error)}
    report, low_rank = callback.report, task.model.eval()
    assert report is not None and as_trained.outputs is not None
    final, eps = evaluated(low_rank, inputs), torch.finfo(torch.float32).eps
    row |= {
        "layers": len(callback.plan),
        "factorized": sum(not layer.skipped for layer in callback.plan),
        "skipped": Counter(f"{layer.kind}: {layer.skipped}" for layer in callback.plan if layer.skipped),
        "warnings": report.warnings,
        "macs": report.dense_macs,
        "share": sum(layer.dense_macs for layer in report.layers) / report.dense_macs,
        "left": report.macs_ratio,
        "first loss": abs(task.losses[0] - dense.losses[0]) / abs(dense.losses[0]) / eps,
        "final": largest_difference(final, as_trained.outputs) / eps,
        "low-rank file": attempt(lambda: largest_difference(evaluated(reloaded(name, low_rank), inputs), final)),
        "torch.export": compared(exported, low_rank, dense.model, inputs),
    }
    return row if quick else row | {"ONNX": compared(in_onnxruntime, low_rank, dense.model, inputs)}


def reloaded(name: str, low_rank: nn.Module) -> nn.Module:
    """The model from its low-rank file."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_low_rank(low_rank, Path(folder) / "model.safetensors")
        return load_low_rank(built(name)[0].model, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the whole graphs that torch prints where it cannot export a model."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def exported(model: nn.Module, inputs: Inputs) -> float:
    """How far the graph that torch.export makes is from the model."""
    expected = evaluated(model, inputs)
    with untouched(model), torch.no_grad(), quiet():
        return largest_difference(torch.export.export(model, inputs).module()(*inputs), expected)


def in_onnxruntime(model: nn.Module, inputs: Inputs) -> float:
    """How far the model is from itself in onnxruntime."""
    with tempfile.TemporaryDirectory() as folder:
        return to_onnx(model.eval(), Path(folder) / "model.onnx", inputs)


def compared(
    work: Callable[[nn.Module, Inputs], float], low_rank: nn.Module, dense: nn.Module, inputs: Inputs
) -> float | str:
    """The difference that ``work`` gives for the low-rank model, or why it failed and whether the dense does too."""
    found = attempt(lambda: work(low_rank, inputs))
    if isinstance(found, float):
        return found
    alone = attempt(lambda: work(dense.eval(), inputs))
    return found if isinstance(alone, float) else f"nor the dense model: {found}"


def attempt(work: Callable[[], float]) -> float | str:
    """The difference that ``work`` gives, or why it failed."""
    try:
        return work()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        said = re.sub(r"\x1b\[\d*m", "", lines[0]).replace(tempfile.gettempdir(), "")  # without colors and folders
        return f"{type(error).__name__}: {said[:100]}"


def tables(rows: list[Row]) -> list[Table]:
    """What was found, whether it computes what it did, and what is refused."""
    trained = [row for row in rows if not row["refused"]]
    exports = [key for key in EXPORTS if trained and key in trained[0]]
    found = [
        [
            row["model"],
            str(row["layers"]),
            str(row["factorized"]),
            f"{row['share']:.0%}",
            f"{row['left']:.1%}",
            "; ".join(f"{count} {reason}" for reason, count in row["skipped"].items()),
        ]
        for row in trained
    ]
    computed = [
        [
            row["model"],
            f"{row['macs'] / 1e6:.3g}",
            f"{row['macs'] / row['counted'] - 1:.2%}",
            *(f"{row[key]:.2g}" for key in ("first loss", "final")),
            *(f"{row[key]:.1g}" if isinstance(row[key], float) else row[key].partition(":")[0] for key in exports),
        ]
        for row in trained
    ]
    refused = [[row["model"], f"{row['counted'] / 1e6:.3g}", row["refused"]] for row in rows if row["refused"]]
    headings = ["million MACs", "of torch's count", "first loss, eps", "end, eps"]
    return [
        Table("What is found", ["model", "layers", "factorized", "their MACs", "left", "skipped, because"], found),
        Table("Whether it computes the same", ["model", *headings, *exports], computed),
        Table("What is refused before the first step", ["model", "million MACs", "the error"], refused),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(ARCHITECTURES))
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "transformers", "torch.fx", "torch.export"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    rows = []
    for name in options.models:
        progress(name)
        rows.append(measure(name, options.quick))
    for table in tables(rows):
        table.print()
    save("real_models", argv, options, rows)


if __name__ == "__main__":
    main()
