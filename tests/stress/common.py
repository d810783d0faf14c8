"""What the scripts of this folder share: counting what came out, as a table, a JSON file and an exit code."""

import argparse
import json
import os
import platform
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import lightning
import torch

RESULTS = Path(__file__).parent / "results"
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]  # the tests' own models


class Tally:
    """How often each outcome came, by what was tried.

    Attributes:
        fine: The outcomes that are promised; every other one is a fault.
        faults: A line for each of these.
    """

    def __init__(self, fine):
        self.fine, self.rows, self.faults = tuple(fine), {}, []

    def add(self, what, outcome, detail=""):
        self.rows.setdefault(what, Counter())[outcome] += 1
        if outcome not in self.fine:
            self.faults.append(f"{what}: {outcome}: {detail}")

    @property
    def tried(self):
        return sum(count.total() for count in self.rows.values())

    def as_json(self):
        return [{"what": what, "tried": sum(count.values()), **count} for what, count in self.rows.items()]

    def headings(self):
        other = sorted({outcome for count in self.rows.values() for outcome in count} - {*self.fine})
        return [*self.fine, *other]


def markdown(rows, outcomes):
    """A table with a line for each row and one for the sum; an outcome that never came is a zero."""
    total = {"what": "**together**", **{key: sum(row.get(key, 0) for row in rows) for key in ("tried", *outcomes)}}
    lines = [("what", "tried", *outcomes), ("---", *["---:"] * (1 + len(outcomes)))]
    lines += [(row["what"], *(f"{row.get(key, 0):,}" for key in ("tried", *outcomes))) for row in [*rows, total]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_table(lines):
    """A table of texts, headings first."""
    cells = [[str(cell).replace("|", r"\|") for cell in line] for line in lines]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def machine():
    return f"Python {platform.python_version()}, torch {torch.__version__}, Lightning {lightning.__version__}"


def parser(text):
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the counts to, as docs/reliability.md has them")
    return parser


def finish(name, tally, options, arguments="", table=None, figures=None):
    """Print the table and the faults, write the file; returns the exit code.

    Args:
        name: Of the script.
        tally: What came out.
        options: What the script was called with.
        arguments: The same as text.
        table: Lines of texts, headings first, to be shown in the place of the counts.
        figures: For the page's text, by name.
    """
    print(markdown(tally.as_json(), tally.headings()))
    for fault in tally.faults[:200]:
        print("FAULT", fault, file=sys.stderr)
    if options.json:
        result = {
            "script": name,
            "command": f"python tests/stress/{name}.py {arguments}".strip(),
            "machine": machine(),
            "outcomes": tally.headings(),
            "rows": tally.as_json(),
            **({"table": table} if table else {}),
            **({"figures": figures} if figures else {}),
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(bool(tally.faults))


@contextmanager
def silent():
    """Without what the process and those that it starts print."""
    with open(os.devnull, "w") as nothing:  # noqa: PTH123
        out, err = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = nothing
        try:
            yield
        finally:
            sys.stdout, sys.stderr = out, err
