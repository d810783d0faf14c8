"""What a policy costs beside the steps themselves: its changes of ranks, and steps with the ranks of a ladder.

    python benchmarks/policies.py --json out.json
    python benchmarks/policies.py --nets vit384 --rounds 3

Each policy makes a run with all the changes of ranks that it makes by default, and each change is timed: factors are
made exact, ranks judged by the layers' spectra, storage let go of. Steps in between see a few inputs only. What all
changes take is said as a share of a run of 1,000 and of 10,000 steps at full rank. The goal is 3 %.

A policy with a ladder makes steps with the ranks of its smallest rung too. Their passes forward and backward take turns
with those of layers that were cut to these ranks, and whole steps with those at full rank.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence

import step_cost
import torch
from harness import Row, Table, against, arguments, in_turns, middle_half, progress, save, times
from step_cost import Changes, Cuts, Run, Setting, batch_of, sgd

from lightning_svd import Nested
from lightning_svd.training.policies import SCHEDULES, RankPolicy

TARGET = 0.25  # of the MACs
STEPS = 100  # of a run whose changes are timed
INPUTS = 8  # of a step in between
LENGTHS = (1_000, 10_000)


class SmallestRung(Nested):
    """Every step uses the ranks of the smallest budget."""

    def rung(self, step: int) -> int:
        return 0


def measure(net: str, options: argparse.Namespace, setting: Setting) -> list[Row]:
    """One row for each policy."""
    torch.manual_seed(setting.seed)
    build, shape = step_cost.CASES[net]
    dense, batch = build().to(setting.device), batch_of(shape, setting)

    def run(schedule: RankPolicy) -> Run:
        model = copy.deepcopy(dense)
        return Run(model, batch, sgd, setting, STEPS, target_macs=TARGET, schedule=schedule, importance="spectrum")

    progress(f"{net}: steps of a rung")
    of_rung, plain = smallest_rung(run(SmallestRung(start=0.0)), run(Cuts({})), run(Cuts({})), options.rounds)
    rows: list[Row] = []
    for name, policy in SCHEDULES.items():
        progress(f"{net}: {name}")
        made = run(policy())
        changes = Changes(made)
        for _ in range(STEPS):
            made.step(INPUTS)
        in_steps = [each / plain for each in changes.seconds]
        rows.append(
            {
                "net": net,
                "input": list(shape),
                "policy": name,
                "changes": len(in_steps),
                "change": statistics.median(in_steps),
                "all_changes": sum(in_steps),
                **(of_rung if policy is Nested else {}),
            }
        )
    return rows


def smallest_rung(nested: Run, cut: Run, full: Run, rounds: int) -> tuple[dict[str, Row], float]:
    """Passes with the ranks of a rung against those of layers cut to them, steps against those at full rank.

    Returns:
        Both, and the seconds of a step at full rank.
    """
    assert nested.training is not None and cut.training is not None
    while not nested.training.ladder:
        nested.step(INPUTS)
    nested.step(INPUTS)
    for name, layer in cut.training.layers.items():
        layer.keep(nested.training.ladder[0][name])
    device = nested.x.device
    passes = in_turns({"rung": nested.backward, "cut": cut.backward}, rounds, device)
    nested.update()
    steps = in_turns({"rung": nested.step, "full": full.step}, rounds, device)
    compared = {"passes": against(passes["rung"], passes["cut"]), "step": against(steps["rung"], steps["full"])}
    return compared, statistics.median(steps["full"])


def tables(rows: list[Row]) -> list[Table]:
    """One for each net."""
    headings = ["policy", "changes", "a change, in steps", *(f"of {length:,} steps" for length in LENGTHS)]
    headings += ["a rung's passes / at its ranks", "middle half", "a rung's step / at full rank", "middle half"]
    made = []
    for net in dict.fromkeys(row["net"] for row in rows):
        mine = [row for row in rows if row["net"] == net]
        cells = [
            [
                row["policy"],
                str(row["changes"]),
                f"{row['change']:.2f}",
                *(f"{row['all_changes'] / length:.2%}" for length in LENGTHS),
                *compared(row, "passes"),
                *compared(row, "step"),
            ]
            for row in mine
        ]
        made.append(Table(f"{net}, input {' x '.join(map(str, mine[0]['input']))}", headings, cells))
    return made


def compared(row: Row, what: str) -> tuple[str, str]:
    """The cells of a ratio, for a policy with a ladder."""
    return (times(row[what]["ratio"]), middle_half(row[what])) if what in row else ("", "")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--nets", type=lambda text: text.split(","), help="all if not given, with --quick the MLP")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    setting = Setting(options.device, seed=options.seed)
    rows: list[Row] = []
    for net in options.nets or (["mlp1024"] if options.quick else step_cost.CASES):
        rows += measure(net, options, setting)
        tables(rows)[-1].print()
        save("policies", argv, options, rows)


if __name__ == "__main__":
    main()
