"""Forms of one low-rank layer: two plain layers against one with an identity inside, and against the dense layer.

    python benchmarks/forms.py --json out.json
    python benchmarks/forms.py --quick

Dense layer and both forms take turns, and the fastest turn of each counts: whatever else the machine does can only make
one slower. The middle half is of the ratios within rounds. Ranks are multiples of 16, so that no form gains by how its
rows lie in memory. The convolutions of 1x1 are of no class of the package: here it is seen that they
need none.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, milliseconds, progress, save, times
from latency import repeats_of
from torch import Tensor, nn

from lightning_svd import to_onnx
from lightning_svd.layers.identity import IdentityLinear
from lightning_svd.model.export import onnx_session

LINEAR = {"768 x 768": (768, 768), "2048 x 2048": (2048, 2048), "384 x 1536": (384, 1536), "1536 x 384": (1536, 384)}
CONVOLUTIONS = {"1x1 conv 512": (512, 14)}  # channels in and out, height and width of the maps
BLOCK = 16
RUNTIMES = ("eager fp32", "eager bf16", "compiled fp32", "compiled bf16", "onnx fp32")


class IdentityConv(nn.Module):
    """A convolution of 1x1 through some of its own outputs, which the others are mixtures of."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, rank, 1), nn.Conv2d(rank, channels - rank, 1)
        self.register_buffer("order", torch.randperm(channels))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.first(x)
        return torch.cat([kept, self.second(kept)], 1).index_select(1, self.order)


def linear_forms(m: int, n: int, rank: int) -> dict[str, nn.Module]:
    """The dense layer and both forms, of random weights."""
    inside = IdentityLinear(n, m, rank)
    for parameter in inside.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    inside.order = torch.randperm(n)
    pair = nn.Sequential(nn.Linear(n, rank, bias=False), nn.Linear(rank, m))
    return {"dense": nn.Linear(n, m), "pair": pair, "identity": inside}


def conv_forms(channels: int, rank: int) -> dict[str, nn.Module]:
    """The same of a convolution."""
    pair = nn.Sequential(nn.Conv2d(channels, rank, 1, bias=False), nn.Conv2d(rank, channels, 1))
    return {"dense": nn.Conv2d(channels, channels, 1), "pair": pair, "identity": IdentityConv(channels, rank)}


def computed(form: nn.Module, x: Tensor, runtime: str) -> Callable[[], object]:
    """A form on an input in a runtime."""
    form = form.to(x.dtype).eval()
    if runtime.startswith("compiled"):
        form = torch.compile(form, fullgraph=True, dynamic=False, isolate_recompiles=True)
    if runtime.startswith("onnx"):
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(form, Path(folder) / "form.onnx", x)
            session = onnx_session(Path(folder) / "form.onnx")
        return lambda: session([x])

    def run() -> None:
        with torch.inference_mode():
            form(x)

    return run


def measure(layer: str, share: float, shape: tuple[int, ...], runtime: str, options: argparse.Namespace) -> Row:
    """A row: both forms against the dense layer."""
    dtype = torch.bfloat16 if "bf16" in runtime else torch.float32
    if layer in LINEAR:
        m, n = LINEAR[layer]
        rank = round(share * min(m, n)) // BLOCK * BLOCK
        forms, x = linear_forms(m, n, rank), torch.randn(*shape, n, dtype=dtype)
    else:
        m, size = CONVOLUTIONS[layer]
        n, rank = m, round(share * m) // BLOCK * BLOCK
        forms, x = conv_forms(m, rank), torch.randn(shape[0], m, size, size, dtype=dtype)
        shape = (shape[0],)
    torch.compiler.reset()
    actions = {name: computed(form, x, runtime) for name, form in forms.items()}
    repeats = max(1, repeats_of(actions["dense"]) // 20)
    seconds = in_turns(actions, options.rounds, repeats=repeats)
    row: Row = {"layer": layer, "rank": rank, "inputs": list(shape), "runtime": runtime}
    best = {name: min(turns) for name, turns in seconds.items()}
    row |= {"dense": best["dense"]}
    row |= {f"macs_{name}": rank * (m + n - (rank if name == "identity" else 0)) / (m * n) for name in list(forms)[1:]}
    row |= {name: best[name] / best["dense"] for name in list(forms)[1:]}
    within = against(seconds["identity"], seconds["pair"])
    return row | {"identity_to_pair": best["identity"] / best["pair"], "low": within["low"], "high": within["high"]}


def tables(rows: list[Row]) -> list[Table]:
    """One for each runtime."""
    headings = ["layer", "rank", "inputs", "dense ms", "pair", "identity", "identity / pair", "middle half"]
    headings += ["MACs, pair", "MACs, identity"]
    made = []
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        lines = [
            [
                row["layer"],
                str(row["rank"]),
                " x ".join(map(str, row["inputs"])),
                milliseconds(row["dense"]),
                *(times(row[name]) for name in ("pair", "identity", "identity_to_pair")),
                middle_half(row),
                *(times(row[f"macs_{name}"]) for name in ("pair", "identity")),
            ]
            for row in rows
            if row["runtime"] == runtime
        ]
        made.append(Table(f"{runtime}, time / dense", headings, lines))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=25)
    parser.add_argument("--layers", type=lambda text: text.split(","), default=[*LINEAR, *CONVOLUTIONS])
    parser.add_argument("--shares", type=lambda text: [float(item) for item in text.split(",")], default=[0.25, 0.4])
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=list(RUNTIMES))
    parser.add_argument(
        "--inputs",
        type=lambda text: [tuple(map(int, item.split("x"))) for item in text.split(",")],
        default=[(1, 1), (1, 197), (32, 1), (8, 197)],
        help="batch x tokens",
    )
    options = parser.parse_args(argv)
    if options.quick:
        options.layers, options.runtimes, options.inputs, options.rounds = ["384 x 1536"], ["eager fp32"], [(2, 3)], 3
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for runtime in options.runtimes:
        for layer in options.layers:
            # A convolution has positions instead of tokens.
            shapes = options.inputs if layer in LINEAR else [shape for shape in options.inputs if shape[1] == 1]
            for shape in shapes:
                progress(f"{runtime}: {layer}, {shape}")
                rows += [measure(layer, share, shape, runtime, options) for share in options.shares]
        save("forms", argv, options, rows)
    for table in tables(rows):
        table.print()


if __name__ == "__main__":
    main()
