"""How fast the final model is: dense against the low-rank model that a fit leaves, whole and layer by layer.

    python benchmarks/latency.py --json out.json
    python benchmarks/latency.py --quick

Dense and low-rank take turns, compute in the same way (eager, channels-last, in ONNX Runtime, ...) and a row is the
median of the ratios to the dense net of the same round. ``yield`` is the speed-up as a share of the reduction of the
MACs. Untrained weights have flat spectra; with ``--spectra power`` the singular values of each layer fall by a power
law of its own, as those of trained layers do, so that layers end at ranks as different. A layer's time is that of its
two convolutions (or products), and of each.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from harness import (
    Row,
    Table,
    against,
    arguments,
    in_turns,
    keep_memory,
    middle_half,
    milliseconds,
    progress,
    save,
    times,
)
from step_cost import CASES, compiled, cost_of, cut, factorized
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_svd import svd_layers, to_factored, to_onnx
from lightning_svd.layers.layer import plain_dense, plain_pair
from lightning_svd.model.export import onnx_session
from lightning_svd.model.layer_times import time_layers

MODES = ("eager", "channels-last", "folded", "folded, channels-last", "compiled", "compiled, channels-last", "onnx")
EXPONENTS = (0.2, 1.2)  # between these lie the power laws of the layers' spectra
BLOCK = 16  # channels that a kernel for 512-bit vectors computes at once: a rank of 17 takes as long as one of 32
TURN = 0.1  # seconds that a turn takes at least, so that caches get warm in it


# ------------------------------------------------------------------------------------------------------------- models


def shape_spectra(model: nn.Module) -> None:
    """Give each factorized layer the singular values of a power law, of an exponent drawn for it."""
    for layer in svd_layers(model).values():
        exponent = EXPONENTS[0] + (EXPONENTS[1] - EXPONENTS[0]) * float(torch.rand(()))
        with torch.no_grad():
            s = layer.form.parameters["s"]
            s.copy_(s[0] * torch.arange(1, layer.full_rank + 1, device=s.device) ** -exponent)


def models(dense: nn.Module, full: nn.Module, x: Tensor, budget: float) -> dict[str, nn.Module]:
    """Every net that is timed, in plain torch layers."""
    cost = cost_of(full, tuple(x.shape))
    made = {"dense": dense}
    for name, round_to in (("ours", 1), (f"ours, ranks in {BLOCK}s", BLOCK)):
        try:
            low_rank = cut(full, cost, budget, round_to).eval()
        except ValueError as error:
            progress(f"no rows of {name}: {error}")
            continue
        made[name] = to_factored(low_rank, cost)
        made[f"{name}, dense where slower"] = to_factored(low_rank, time_layers(cost, svd_layers(low_rank)))
    return made


def computed(model: nn.Module, x: Tensor, mode: str) -> Callable[[], Tensor]:
    """The model on this input, in one of ``MODES``."""
    model = copy.deepcopy(model).eval()
    if "folded" in mode:
        model = folded(model)
    if "channels-last" in mode:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    if "compiled" in mode:
        model = compiled(model)
    if mode == "onnx":
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(model, Path(folder) / "model.onnx", x)
            session = onnx_session(Path(folder) / "model.onnx")
        return lambda: torch.from_numpy(session([x])[0])
    return lambda: model(x)


def folded(model: nn.Module) -> nn.Module:
    """The model with each batch normalization merged into the convolution before it."""
    traced = torch.fx.symbolic_trace(model)
    for node in traced.graph.nodes:
        norm, conv = _module_at(traced, node), _module_at(traced, next(iter(node.args), None))
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d):
            traced.set_submodule(node.args[0].target, fuse_conv_bn_eval(conv, norm))
            traced.set_submodule(node.target, nn.Identity())
    return traced


def _module_at(traced: torch.fx.GraphModule, node: object) -> nn.Module | None:
    """The module that a node of the graph calls."""
    calls = isinstance(node, torch.fx.Node) and node.op == "call_module"
    return traced.get_submodule(node.target) if calls else None


def repeats_of(action: Callable[[], object]) -> int:
    """How often to run a quick action in one turn."""
    action()
    seconds = in_turns({"": action}, rounds=1, warm_up=0)[""][0]
    return max(1, round(TURN / seconds))


# ------------------------------------------------------------------------------------------------------- measurements


def macs_of(models: Mapping[str, nn.Module], shape: tuple[int, ...]) -> dict[str, float]:
    """Each model's MACs as a share of the dense one's."""
    counted = {name: cost_of(model, shape).other_macs for name, model in models.items()}
    return {name: macs / counted["dense"] for name, macs in counted.items()}


@torch.inference_mode()
def whole(net: str, models: Mapping[str, nn.Module], x: Tensor, options: argparse.Namespace) -> list[Row]:
    """A row for each model in each mode."""
    macs = macs_of(models, tuple(x.shape))
    rows = []
    for mode in options.modes:
        if "folded" in mode and not any(isinstance(module, nn.BatchNorm2d) for module in models["dense"].modules()):
            continue
        progress(f"{net}, batch {len(x)}: {mode}")
        actions = {name: computed(model, x, mode) for name, model in models.items()}
        seconds = in_turns(actions, options.rounds, x.device, repeats_of(actions["dense"]))
        for name in actions:
            row = {"what": "model", "net": net, "batch": len(x), "mode": mode, "variant": name, "macs": macs[name]}
            rows.append(row | against(seconds[name], seconds["dense"]))
    return rows


@torch.inference_mode()
def layer_by_layer(net: str, low_rank: nn.Module, x: Tensor, mode: str, options: argparse.Namespace) -> list[Row]:
    """A row for each factorized layer: the dense one, both factors, each factor."""
    cost = cost_of(low_rank, tuple(x.shape))
    rows = []
    progress(f"{net}, batch {len(x)}: layers, {mode}")
    for name, layer in svd_layers(low_rank).items():
        price = cost.layers[name]
        inner = torch.randn(price.input_shapes[0], device=x.device)
        pair = plain_pair(layer)
        actions = {
            "dense": computed(plain_dense(layer), inner, mode),
            "both": computed(pair, inner, mode),
            "first": computed(pair[0], inner, mode),
            "second": computed(pair[1], pair[0](inner), mode),
        }
        seconds = in_turns(actions, options.rounds, x.device, repeats_of(actions["dense"]))
        parts = {part: against(seconds[part], seconds["dense"]) for part in actions}
        rows.append(
            {
                "what": "layer",
                "net": net,
                "batch": len(x),
                "mode": mode,
                "variant": name,
                "matrix": list(layer.matrix_shape),
                "rank": layer.rank,
                "macs": layer.rank * price.macs_per_rank / price.dense_macs,
                **parts["both"],
                **{f"{part}_seconds": row["seconds"] for part, row in parts.items()},
            }
        )
    return rows


def measure(net: str, batch: int, options: argparse.Namespace) -> list[Row]:
    """All rows of a net at a batch size."""
    torch.manual_seed(options.seed)
    build, shape = CASES[net]
    x = torch.randn((batch, *shape[1:]), device=options.device)
    dense = build().to(options.device)
    full = factorized(dense)
    if options.spectra == "power":
        shape_spectra(full)
    rows = whole(net, models(dense, full, x, options.budget), x, options)
    if options.layers:
        low_rank = cut(full, cost_of(full, tuple(x.shape)), options.budget, options.round_to)
        for mode in options.layers:
            rows += layer_by_layer(net, low_rank, x, mode, options)
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """A table of models and one of layers for each net and batch size."""
    made = []
    for net, batch, what in dict.fromkeys((row["net"], row["batch"], row["what"]) for row in rows):
        mine = [row for row in rows if (row["net"], row["batch"], row["what"]) == (net, batch, what)]
        made.append((_models_table if what == "model" else _layers_table)(f"{net}, batch {batch}", mine))
    return made


def _models_table(title: str, rows: list[Row]) -> Table:
    cells = [
        [
            f"{row['variant']}, {row['mode']}",
            milliseconds(row["seconds"]),
            times(row["ratio"]),
            middle_half(row),
            times(row["macs"]),
            f"{row['macs'] / row['ratio']:.0%}",
        ]
        for row in rows
    ]
    return Table(title, ["model", "ms", "time / dense", "middle half", "MACs / dense", "yield"], cells)


def _layers_table(title: str, rows: list[Row]) -> Table:
    cells = [
        [
            f"{row['variant']} ({row['matrix'][0]} x {row['matrix'][1]})",
            str(row["rank"]),
            *(milliseconds(row[f"{part}_seconds"]) for part in ("dense", "both", "first", "second")),
            times(row["ratio"]),
            times(row["macs"]),
        ]
        for row in rows
    ]
    headings = ["layer", "rank", "dense ms", "both ms", "first ms", "second ms", "time / dense", "MACs / dense"]
    return Table(f"{title}, layers, {rows[0]['mode']}", headings, cells)


def modes(text: str) -> list[str]:
    """Some of ``MODES``, separated by semicolons."""
    chosen = [mode.strip() for mode in text.split(";")]
    if not set(chosen) <= set(MODES):
        raise argparse.ArgumentTypeError(f"expected some of {'; '.join(MODES)}, got {text!r}")
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--nets", type=lambda text: text.split(","), default=["resnet18"])
    parser.add_argument("--batches", type=lambda text: [int(item) for item in text.split(",")], default=[1, 64])
    parser.add_argument("--modes", type=modes, default=list(MODES), help="separated by semicolons")
    parser.add_argument("--budget", type=float, default=0.35, help="share of the MACs that is kept")
    parser.add_argument("--spectra", choices=("initial", "power"), default="initial")
    parser.add_argument("--layers", type=modes, default=[], help="modes in which to time layer by layer, too")
    parser.add_argument("--round-to", type=int, default=1, help="ranks of these layers are multiples of it")
    parser.add_argument("--keep-memory", action="store_true", help="have the C library keep what a call has freed")
    options = parser.parse_args(argv)
    if options.keep_memory:
        keep_memory()
    if options.quick:
        options.nets, options.batches, options.modes, options.rounds = ["resnet20"], [1, 8], list(MODES[:4]), 3
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for net in options.nets:
        for batch in options.batches:
            rows += measure(net, batch, options)
    for table in tables(rows):
        table.print()
    save("latency", argv, options, rows)


if __name__ == "__main__":
    main()
