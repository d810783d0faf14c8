"""Writes interface.txt, what versions promise about: exported names, their arguments and members, and the command's."""

import argparse
import inspect
from collections.abc import Iterator
from pathlib import Path

import lightning_svd
from lightning_svd.cli import _parser

LIST = Path(__file__).with_name("interface.txt")


def arguments(function) -> str:
    """Of a function or a class, with their defaults."""
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        default = "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.kind is parameter.KEYWORD_ONLY and not any(each.startswith("*") for each in shown):
            shown.append("*")
        shown.append(f"{star}{parameter.name}{default}")
    return f"({', '.join(shown)})"


def members(kind: type) -> Iterator[str]:
    """The public ones that this package defines."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("lightning_svd")]
    names = {name for base in ours for name in (*vars(base), *inspect.get_annotations(base))}
    for name in sorted(name for name in names if not name.startswith("_")):
        value = inspect.getattr_static(kind, name, None)
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        yield f"{name}{arguments(function) if inspect.isfunction(function) else ''}"


def commands() -> Iterator[str]:
    """The command's, with their options."""
    (choices,) = (each.choices for each in _parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, parser in choices.items():
        options = ["/".join(action.option_strings) or action.dest for action in parser._actions]
        yield f"$ lightning-svd {name} {' '.join(option for option in options if option != '-h/--help')}".rstrip()


def interface() -> str:
    """One line for each name, members below their class."""
    lines = []
    for name in sorted(lightning_svd.__all__):
        exported = getattr(lightning_svd, name)
        lines.append(f"{name}{arguments(exported)}")
        if inspect.isclass(exported):
            lines += [f"    {member}" for member in members(exported)]
    return "\n".join([*lines, *commands(), ""])


if __name__ == "__main__":
    LIST.write_text(interface(), encoding="utf-8")
