"""What a low-rank model is when it is deployed: size on disk and time, in half precision, in int8, folded.

    python benchmarks/deployment.py --json out.json
    python benchmarks/deployment.py --quick

Each net is cut to a share of its multiply-accumulates by ``compress``. Everything takes turns with the dense net in
eager float32. int8 is ONNX Runtime's: for nets of convolutions with scales of activations calibrated beforehand
(static, QDQ, each channel of a weight has its own), otherwise with scales found while it runs (dynamic). How far
outputs are from those of the same form in float32 is relative, in the norm, on inputs that nothing was calibrated on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, milliseconds, progress, save, times
from latency import repeats_of
from time_budget import NETS, cut, dense
from torch import Tensor, nn

from lightning_svd import fold_norms, to_factored, to_onnx
from lightning_svd.files.low_rank import write_weights
from lightning_svd.model.export import onnx_session

CALIBRATION = 4  # batches


class Batches:
    """Calibration data as ONNX Runtime asks for them."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.batches: Iterator[Tensor] = iter([torch.randn(8, *shape) for _ in range(CALIBRATION)])
        self.name = name

    def get_next(self) -> dict[str, object] | None:
        """The next of them."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def quantized(path: Path, shape: tuple[int, ...], static: bool) -> Path:
    """The file in int8, beside it."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, small = path.with_suffix(".ready.onnx"), path.with_suffix(".int8.onnx")
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        # Not symbolic: shapes that depend on the batch are of no use to it.
        quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
        if static:
            reader = Batches(onnx.load(ready).graph.input[0].name, shape)
            options = {"per_channel": True, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
            quantize_static(str(ready), str(small), reader, **options)
        else:
            quantize_dynamic(str(ready), str(small), weight_type=QuantType.QInt8, per_channel=True)
    logging.disable(logging.NOTSET)
    return small


def forms(net: str, share: float, seed: int) -> dict[str, nn.Module]:
    """The dense net, its low-rank pairs, and those with an identity inside where there are linear ones."""
    model = dense(net, seed)
    batch = torch.randn(16, *NETS[net][1])
    small, *_ = cut(model, batch, {"target_macs": share})
    made = {"dense": model, "pairs": small.eval()}
    with_identities = to_factored(small, forms="identity").eval()
    if count(with_identities) != count(small):
        made["identity"] = with_identities
    return made


def count(model: nn.Module) -> int:
    """Numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def kinds(
    model: nn.Module, x: Tensor, folder: Path, shape: tuple[int, ...]
) -> dict[str, tuple[Callable[..., Tensor], int]]:
    """By how it computes: what runs it, and how many bytes it has on disk."""
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    half = to_factored(model).to(torch.bfloat16)
    made = {"fp32": (eager(model), written(model, folder)), "bf16": (eager(half), written(half, folder))}
    if has_norms:
        folded, _ = fold_norms(model, x[:2])
        made["fp32, folded"] = (eager(folded), written(folded, folder))
    path = folder / "model.onnx"
    to_onnx(model, path, torch.randn(2, *shape), fold=has_norms)
    small = quantized(path, shape, static=has_norms)
    made |= {"ONNX fp32": (runtime(path), path.stat().st_size), "ONNX int8": (runtime(small), small.stat().st_size)}
    return made


def written(model: nn.Module, folder: Path) -> int:
    """Bytes of its weights on disk."""
    return write_weights(model, folder / "model.safetensors").stat().st_size


def eager(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A model in PyTorch, in its own dtype."""
    dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return model(x.to(dtype)).float()

    return run


def runtime(path: Path) -> Callable[[Tensor], Tensor]:
    """A file in ONNX Runtime."""
    session = onnx_session(path)
    return lambda x: torch.from_numpy(session([x])[0])


def measure(net: str, options: argparse.Namespace) -> list[Row]:
    """A row for each form, way to compute and batch size."""
    shape = NETS[net][1]
    torch.manual_seed(options.seed)
    ready: dict[tuple[str, str], tuple[Callable[..., Tensor], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, model in forms(net, options.share, options.seed).items():
            progress(f"{net}: {form}")
            made = kinds(model, torch.randn(2, *shape), Path(folder), shape)
            ready |= {(form, kind): value for kind, value in made.items()}
    rows: list[Row] = []
    for batch in options.batches:
        progress(f"{net}: {batch} at a time")
        x = torch.randn(batch, *shape)
        actions = {key: partial(run, x) for key, (run, _) in ready.items()}
        outputs = {key: action() for key, action in actions.items()}
        base = "dense", "fp32"
        named = {" / ".join(key): action for key, action in actions.items()}
        seconds = in_turns(named, options.rounds, repeats=repeats_of(actions[base]))
        for (form, kind), (_, size) in ready.items():
            exact = outputs[form, "fp32"]
            apart = float((outputs[form, kind] - exact).norm() / exact.norm())
            row: Row = {"net": net, "batch": batch, "form": form, "kind": kind, "bytes": size, "distance": apart}
            rows.append(row | against(seconds[f"{form} / {kind}"], seconds[" / ".join(base)]))
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """One for each net."""
    headings = ["form", "MB on disk", "off fp32", "batch", "ms", "time / dense fp32", "middle half"]
    return [
        Table(
            net,
            headings,
            [
                [
                    f"{row['form']}, {row['kind']}",
                    f"{row['bytes'] / 1e6:.2f}",
                    "-" if row["kind"] == "fp32" else f"{row['distance']:.1e}",
                    str(row["batch"]),
                    milliseconds(row["seconds"]),
                    times(row["ratio"]),
                    middle_half(row),
                ]
                for row in rows
                if row["net"] == net
            ],
        )
        for net in dict.fromkeys(row["net"] for row in rows)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--nets", type=lambda text: text.split(","), default=["resnet18", "vit384", "bert-small"])
    parser.add_argument("--batches", type=lambda text: [int(item) for item in text.split(",")], default=[1, 32])
    parser.add_argument("--share", type=float, default=0.35, help="of the multiply-accumulates that is kept")
    options = parser.parse_args(argv)
    if options.quick:
        options.nets, options.batches, options.rounds = ["bert-small"], [1], 3
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for net in options.nets:
        rows += measure(net, options)
        save("deployment", argv, options, rows)
    for table in tables(rows):
        table.print()


if __name__ == "__main__":
    main()
