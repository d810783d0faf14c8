"""Writes the tables and figures of the documentation from benchmarks/results.

With --check it writes nothing and says whether the pages are so.

    python benchmarks/step_cost.py --json benchmarks/results/step_cost.json
    python benchmarks/pages.py

The file ``NAME.json`` fills what lies between ``<!-- NAME -->`` and ``<!-- /NAME -->`` on the page of its benchmark;
for other settings of a script (``--dtype bf16``, a GPU) give the file a name of its own, and the page a section of that
name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import allocator
import casts
import compress_cost
import deployment
import forms
import full_data
import heads
import inputs
import latency
import nested
import policies
import pretrained
import quality
import real_models
import recurrent
import scale
import scaling
import step_cost
import text
import time_budget
import whole_run

ROOT = Path(__file__).parents[1]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
SCRIPTS = {
    script.__name__: script
    for script in (
        step_cost,
        whole_run,
        latency,
        scale,
        scaling,
        recurrent,
        quality,
        real_models,
        casts,
        compress_cost,
        pretrained,
        inputs,
        time_budget,
        allocator,
        nested,
        policies,
        deployment,
        forms,
        heads,
        full_data,
        text,
    )
}
# By the benchmark; the others are on the first page.
PAGES = {
    "quality": "quality.md",
    "full_data": "quality.md",
    "text": "quality.md",
    "real_models": "models.md",
    "casts": "models.md",
    "pretrained": "trained.md",
    "inputs": "trained.md",
    "time_budget": "latency.md",
    "allocator": "latency.md",
    "nested": "schedules.md",
    "policies": "schedules.md",
    "deployment": "deployment.md",
    "forms": "deployment.md",
    "heads": "deployment.md",
    "scaling": "scaling.md",
}


def fill(page: str, name: str, text: str) -> str:
    """The page with this text in the section of this name.

    Raises:
        ValueError: If there is not one such section.
    """
    section = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    filled, count = section.subn(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)
    if count != 1:
        raise ValueError(f"the page must have one section <!-- {name} --> ... <!-- /{name} -->, it has {count}")
    return filled


def section(name: str, result: dict[str, Any]) -> str:
    """What a file of results says: its tables, its figures, the machine, the command."""
    script, rows = SCRIPTS[result["benchmark"]], result["rows"]
    parts = [table.markdown() for table in script.tables(rows)]
    parts += [f"![{plot.__doc__}](figures/{name}-{title}.svg)" for title, plot in figures_of(script, rows).items()]
    machine = "; ".join(f"{fact} {value}" for fact, value in result["machine"].items())
    return "\n\n".join([*parts, f"`{result['command']}`, on {machine}."])


def figures_of(script: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What draws the figures of a script's rows, by name; of many there are none."""
    return script.figures(rows) if hasattr(script, "figures") else {}


def draw(name: str, script: Any, rows: list[dict[str, Any]], folder: Path) -> None:
    """The figures of one file of results."""
    import matplotlib

    # The same rows give the same file.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        folder.mkdir(parents=True, exist_ok=True)
        for title, plot in figures_of(script, rows).items():
            plot(rows).savefig(folder / f"{name}-{title}.svg", metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page says something else")
    options = parser.parse_args(argv)
    old = {page: (DOCS / page).read_text(encoding="utf-8") for page in {"performance.md", *PAGES.values()}}
    new = dict(old)
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        page = PAGES.get(result["benchmark"], "performance.md")
        new[page] = fill(new[page], path.stem, section(path.stem, result))
        if not options.check:
            draw(path.stem, SCRIPTS[result["benchmark"]], result["rows"], DOCS / "figures")
    if options.check:
        return int(new != old)
    for page, content in new.items():
        (DOCS / page).write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
