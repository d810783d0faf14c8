"""Tables as text: for a terminal of any width, and as Markdown."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Collection, Sequence
from typing import Any

WIDTH, LEAST_WIDTH = 118, 80
ROWS_ON_SCREEN = 60


def is_wide() -> bool:
    """Whether the terminal is wide enough for all columns; True where output goes to a log."""
    return _columns() >= WIDTH


def screen_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str], wide_only: Collection[str]
) -> str:
    """A table for the terminal: long texts are folded, names of layers at their dots, numbers never.

    Args:
        headings: Of the columns, names of layers first.
        rows: Their cells; the first ``ROWS_ON_SCREEN`` are shown, the others counted.
        text: Headings of the columns that hold texts; the others hold numbers.
        wide_only: Headings of the columns that a narrow terminal does without.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.containers import Lines
    from rich.table import Table
    from rich.text import Text

    class Name(Text):
        def wrap(self, console: Console, width: int, **options: Any) -> Lines:
            return Lines(Text(line) for line in folded(self.plain, width))

    wide = is_wide()
    shown = [index for index, heading in enumerate(headings) if wide or heading not in wide_only]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1) if wide else (0, 1, 0, 0))
    for heading in (headings[index] for index in shown):
        if heading in text:
            table.add_column(heading, overflow="fold")
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows[:ROWS_ON_SCREEN]:
        # As Text: a name may look like rich's markup.
        table.add_row(*((Text if index else Name)(row[index]) for index in shown))
    out = io.StringIO()
    Console(file=out, width=_columns(), no_color=True, force_jupyter=False, force_terminal=False).print(table)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    if len(rows) > ROWS_ON_SCREEN:
        lines += [f"... and {len(rows) - ROWS_ON_SCREEN} more layers", ""]
    return "\n".join(lines)


def folded(name: str, width: int) -> list[str]:
    """A name in lines of at most so many characters, divided at its dots where they allow it."""
    lines = []
    while len(name) > width:
        cut = name.rfind(".", 0, width) + 1 or width
        lines.append(name[:cut])
        name = name[cut:]
    return [*lines, name]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], text: Collection[str]) -> str:
    """A table as in GitHub Flavored Markdown, aligned in its source too.

    Args:
        headings: Of the columns.
        rows: Their cells, Markdown on one line each.
        text: Headings of the columns that hold texts; the others hold numbers.
    """
    cells = [headings, *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    columns = []
    for column in zip(*cells, strict=True):
        width = max(3, *map(len, column))
        if column[0] in text:
            columns.append([cell.ljust(width) for cell in (column[0], "-" * width, *column[1:])])
        else:
            columns.append([cell.rjust(width) for cell in (column[0], "-" * (width - 1) + ":", *column[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def markdown_text(text: str) -> str:
    """A sentence on one line in which only code spans are markup."""
    spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(span if span.startswith("`") else re.sub(r"([\\*_\[\]<>&~`])", r"\\\1", span) for span in spans)


def markdown_code(text: str) -> str:
    """A code span, its fence longer than any run of backticks in it (CommonMark 6.1)."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if len(fence) > 1 else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _columns() -> int:
    return max(LEAST_WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns)
