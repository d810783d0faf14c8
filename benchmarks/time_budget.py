"""What is promised and what is kept where time is the budget: models cut to a share of the dense model's time.

    python benchmarks/time_budget.py --json out.json
    python benchmarks/time_budget.py --quick

Each net is cut by ``compress(..., target_latency=...)``, which measures how long its layers take, dense and at a few
ranks. Then dense and low-rank take turns, in the runtime that was asked for; a row is the median of the ratios of the
same round, with the middle half of them as its spread. The goal is to be within 5 % of what was asked for. Beside it
stands how much of the speed-up is there that the multiply-accumulates promise (their share over that of the time), what
the same net takes at the same share of its multiply-accumulates, and by which factor the dense net itself takes longer
than it did while ranks were chosen: a machine that others use too is not steady. A net that is "folded" has its batch
normalizations merged into its convolutions first, dense and low-rank alike.

With ``--equal`` a budget of multiply-accumulates is searched for that takes as long as the net that was cut to the
time: how far the outputs of either are from the dense net's says what it is worth to ask for time.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import nets
import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, progress, save, times
from latency import computed, folded, repeats_of, shape_spectra
from torch import Tensor, nn

from lightning_svd import Timing, compress, decompose, to_dense

CHANNELS_LAST, FOLDED = "channels-last", "folded"
RUNTIMES = {
    **{runtime: runtime for runtime in ("eager", "compiled", "onnx")},
    **{
        f"{runtime} {how}": runtime
        for runtime in ("eager", "compiled")
        for how in (CHANNELS_LAST, FOLDED, f"{FOLDED} {CHANNELS_LAST}")
    },
}
COPIES = 5  # that are timed: where in memory a model happens to lie makes it faster or slower by a few percent
SEARCH = 6  # halvings of the interval in which a budget of MACs is searched
WIDTH, BLOCKS = 512, 4  # of the encoder of BERT's kind, as its "small" one has them


class LastState(nn.Module):
    """A recurrent net of two layers that gives its last output."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


def encoder() -> nn.Module:
    """Blocks of attention and two linear layers, as BERT has them."""
    block = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, 0.0, "gelu", batch_first=True)
    return nn.TransformerEncoder(block, BLOCKS, enable_nested_tensor=False)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: nets.build("resnet18", 3, 32, 10), (3, 32, 32)),
    "vit384": (lambda: nets.ViT(3, 32, 10, patch=4, width=384, depth=6, heads=6), (3, 32, 32)),
    "bert-small": (encoder, (64, WIDTH)),
    "lstm512": (LastState, (32, 512)),
}


def dense(net: str, seed: int) -> nn.Module:
    """The net with spectra that fall as those of trained layers do."""
    torch.manual_seed(seed)
    model = NETS[net][0]().eval()
    decompose(model)
    shape_spectra(model)
    return to_dense(model)


def cut(model: nn.Module, batch: Tensor, budget: dict[str, object]) -> tuple[nn.Module, object, float]:
    """The model cut to a budget, its report, and the seconds that took."""
    start = time.perf_counter()
    batches = [batch[:8], batch[:8]] if len(batch) > 1 else [batch, batch]
    small, report = compress(
        copy.deepcopy(model), batches, importance="spectrum", inplace=True, progress=False, **budget
    )
    return small, report, time.perf_counter() - start


@torch.inference_mode()
def ratio(model: nn.Module, small: nn.Module, x: Tensor, runtime: str, rounds: int) -> Row:
    """Seconds of a cut model against those of the dense one, of a few copies of either if these are made fast."""
    copies = min(COPIES, rounds) if RUNTIMES[runtime] == "eager" else 1
    seconds: dict[str, list[float]] = {"dense": [], "small": []}
    for _ in range(copies):
        actions = {"dense": computed(model, x, runtime), "small": computed(small, x, runtime)}
        taken = in_turns(actions, rounds // copies, repeats=repeats_of(actions["dense"]))
        for name, mine in taken.items():
            seconds[name] += mine
    return against(seconds["small"], seconds["dense"]) | {"dense_seconds": min(seconds["dense"])}


def equal_in_time(model: nn.Module, x: Tensor, runtime: str, rounds: int, asked: float) -> Row:
    """The largest budget of multiply-accumulates that takes no longer: its share, time, and distance to dense."""
    low, high, best = 0.0, 1.0, dict[str, Any]()
    for _ in range(SEARCH):
        share = (low + high) / 2
        try:
            small, report, _ = cut(model, x, {"target_macs": share})
        except ValueError:  # fewer than any ranks have
            low = share
            continue
        found = ratio(model, small, x, runtime, rounds)["ratio"]
        if found <= asked:
            low = share
            best = {"equal_macs": share, "equal_ratio": found, "equal_distance": report.distance}
        else:
            high = share
    return best


def measure(
    net: str, batch_size: int, runtime: str, targets: Sequence[float], options: argparse.Namespace
) -> list[Row]:
    """A row for each share."""
    model = dense(net, options.seed)
    if FOLDED in runtime:
        model = folded(model)
    x, rounds = torch.randn(batch_size, *NETS[net][1]), options.rounds
    if CHANNELS_LAST in runtime:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    timing = Timing(batch_size=batch_size, runtime=RUNTIMES[runtime], seconds=options.seconds)
    rows: list[Row] = []
    for target in targets:
        progress(f"{net}, {batch_size} at a time, {runtime}: {target:g} of the time")
        row: Row = {"net": net, "batch": batch_size, "runtime": runtime, "target": target}
        try:
            small, report, seconds = cut(model, x, {"target_latency": target, "latency_table": timing})
        except ValueError as error:
            rows.append(row | {"refused": str(error)})
            continue
        of = report.ranks
        row |= {"promised": of.latency.ratio, "macs": of.macs_ratio, "distance": report.distance}
        row |= {"cutting_seconds": seconds, **ratio(model, small, x, runtime, rounds)}
        row["drift"] = row["dense_seconds"] / of.latency.dense_seconds
        try:
            by_macs, *_ = cut(model, x, {"target_macs": target})
            row |= {f"macs_{key}": value for key, value in ratio(model, by_macs, x, runtime, rounds).items()}
        except ValueError:
            pass
        if options.equal:
            row |= equal_in_time(model, x, runtime, rounds, row["ratio"])
        rows.append(row)
    return rows


def tables(rows: list[Row]) -> list[Table]:
    """What was asked for, promised and measured."""
    headings = [
        "net",
        "batch",
        "runtime",
        "asked for",
        "by the table",
        "measured",
        "middle half",
        "off",
        "dense, since",
    ]
    headings += ["MACs", "of the speed-up", "time at as many MACs", "seconds to cut"]
    lines = []
    for row in rows:
        line = [row["net"], str(row["batch"]), row["runtime"], f"{row['target']:.0%}"]
        if "refused" in row:
            least = row["refused"].split("at least ")[-1].split(" ")[0]
            lines.append([*line, f"refused: at least {least}", *[""] * 8])
            continue
        of_macs = f"{row['macs_ratio']:.1%}" if "macs_ratio" in row else "-"
        line += [f"{row['promised']:.1%}", f"{row['ratio']:.1%}", middle_half(row)]
        line += [f"{row['ratio'] / row['target'] - 1:+.1%}"]
        line += [times(row["drift"]) if "drift" in row else "-", f"{row['macs']:.1%}"]
        line += [f"{row['macs'] / row['ratio']:.0%}", of_macs]
        lines.append([*line, f"{row['cutting_seconds']:.0f}"])
    shown = [Table("Time as the budget", headings, lines)]
    equal = [row for row in rows if "equal_ratio" in row]
    if equal:
        headings = ["net", "batch", "runtime", "budget", "measured", "MACs", "distance to dense outputs"]
        lines = []
        for row in equal:
            about = [row["net"], str(row["batch"]), row["runtime"]]
            by_time, by_macs = row["distance"], row["equal_distance"]
            marks = [" *" if one < other else "" for one, other in ((by_time, by_macs), (by_macs, by_time))]
            lines += [
                [*about, "time", f"{row['ratio']:.1%}", f"{row['macs']:.1%}", f"{by_time:.2e}{marks[0]}"],
                [*about, "MACs", f"{row['equal_ratio']:.1%}", f"{row['equal_macs']:.1%}", f"{by_macs:.2e}{marks[1]}"],
            ]
        shown.append(Table("The same time by either budget (* nearer to the dense net)", headings, lines))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--nets", type=lambda text: text.split(","), default=list(NETS))
    parser.add_argument("--batches", type=lambda text: [int(item) for item in text.split(",")], default=[1, 64])
    parser.add_argument("--runtimes", type=lambda text: text.split(","), default=["eager"], help=", ".join(RUNTIMES))
    parser.add_argument(
        "--targets", type=lambda text: [float(item) for item in text.split(",")], default=[0.7, 0.5, 0.35]
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure a table in")
    parser.add_argument("--equal", action="store_true", help="search the budget of MACs that takes as long, too")
    options = parser.parse_args(argv)
    if options.quick:
        options.seconds, options.rounds, options.targets, options.batches = 2.0, 3, [0.5], [8]
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for runtime in options.runtimes:
        for net in options.nets:
            for batch_size in options.batches:
                rows += measure(net, batch_size, runtime, options.targets, options)
                save("time_budget", argv, options, rows)
    for table in tables(rows):
        table.print()


if __name__ == "__main__":
    main()
