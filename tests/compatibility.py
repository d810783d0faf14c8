"""Writes docs/compatibility.md from the tests that are marked ``combination``; with --check says whether it is so.

A mark ``@pytest.mark.combination(area, what, refused=None)`` is a row: ``what`` works, or is refused with a message
that matches ``refused``, as the marked test shows. Both may name the test's parameters in braces, "{id}" among them.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
HEAD = """# What works with what

Each row is a test of the project; this page is written from their own parametrization (`make compatibility`). What is
refused is refused before the first step, with the message shown and your model as it was; what your code does to a
weight later, when it does it.
"""


class Collector:
    """Gathers the rows while pytest collects."""

    def __init__(self):
        self.areas = {}

    def pytest_collection_modifyitems(self, items):
        for item in items:
            for mark in item.iter_markers("combination"):
                area, what = (fill_in(text, item) for text in mark.args)
                row = (what, fill_in(mark.kwargs.get("refused"), item))
                if row not in self.areas.setdefault(area, []):
                    self.areas[area].append(row)


def fill_in(text, item):
    """``text`` with the parameters of a test in the place of their names in braces."""
    if text is None or not hasattr(item, "callspec"):
        return text
    parameters = {name: shown(value) for name, value in item.callspec.params.items()}
    return text.format(id=item.callspec.id, **parameters)


def shown(value):
    """A test's parameter as a reader wants it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={item!r}" for key, item in value.items()) or "defaults"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, (str, int, float)):
        return value
    return getattr(value, "__name__", type(value).__name__).replace("_", " ")


def page():
    """The page's text as the tests say it now."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", str(Path(__file__).parent)], plugins=[collector])
    parts = [HEAD]
    for area, rows in sorted(collector.areas.items()):
        cells = [(what, "works" if refused is None else f"refused: {plain(refused)}") for what, refused in rows]
        lines = ["| {} | {} |".format(*(cell.replace("|", "\\|") for cell in row)) for row in cells]
        parts.append("\n".join([f"## {area}", "", "| | |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def plain(pattern):
    """A message's regular expression as text for a reader."""
    return re.sub(r"\\(.)", r"\1", pattern.replace(".*", " ... ").replace(r"\d+", "N"))


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
