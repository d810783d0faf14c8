"""Writes docs/user-code.md from the patterns of ``test_user_code.py``; with --check says whether it is so."""

import sys
from pathlib import Path

from compatibility import plain

PAGE = Path(__file__).parents[1] / "docs" / "user-code.md"
HEAD = """# What people write

Code that people write around a network, and what becomes of it with this callback. Each row is a test of the project:
it runs the code without the callback, with layers that train as dense ones, with layers that train as U, s and V, and
with ranks that are cut, and compares what the code sees: groups, calls of hooks, averages, files, losses. This page is
written from the tests (`make user-code`).

- **same**: what the code sees is what it sees without the callback, as long as no rank is cut; it runs to the end when
  ranks are. Once layers train as U, s and V they take other steps than the dense weight would.
- **same, left dense**: so too, but layers are left as they are, with the reason in the plan.
- **refused**: an error that names the layer and says what to do, when the code does it for the first time.

Leave a layer out, `exclude_modules=[...]`, and all of this is possible with its weight.
"""


def page(patterns, elsewhere):
    """The page's text.

    Args:
        patterns: As in ``test_user_code.py``.
        elsewhere: Area -> what other tests hold, which stand on the page of combinations.
    """
    areas = {}
    for pattern in patterns:
        areas.setdefault(pattern.area, []).append((pattern.what, outcome(pattern)))
    parts = [HEAD]
    for area, rows in areas.items():
        lines = ["| {} | {} |".format(*(cell.replace("|", "\\|") for cell in row)) for row in rows]
        lines += [
            f"| {what} | see [what works with what](compatibility.md#{to}) |" for what, to, _ in elsewhere.get(area, [])
        ]
        parts.append("\n".join([f"## {area}", "", "| | |", "|---|---|", *lines, ""]))
    return "\n".join(parts)


def outcome(pattern):
    """What becomes of a pattern, for a reader."""
    if pattern.broken is not None:
        return f"not yet: {pattern.broken}"
    if pattern.refused is not None:
        return f"refused: {plain(pattern.refused)}"
    if pattern.stays:
        return f"same, left dense: {'; '.join(dict.fromkeys(pattern.stays.values()))}"
    return "same" if pattern.says is None else f"same, with a warning: {plain(pattern.says)}"


if __name__ == "__main__":
    from test_user_code import ELSEWHERE, PATTERNS

    text = page(PATTERNS, ELSEWHERE)
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
