"""The documentation is complete: every argument and every public name has its place, and no link leads nowhere."""

import ast
import inspect
import re
from pathlib import Path

import interface
import pytest

import lightning_svd
from lightning_svd import Alternating, FallToBudget, GrowAndPrune, Nested, Regularizer, SVDTrainingCallback

ROOT = Path(__file__).parents[1]
MODULE = re.compile(r"`(\w+\.py)`")
ARGUMENTS = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")


def documented_arguments():
    """Name -> default, as the page of arguments says."""
    arguments = {}
    for heading, default in re.findall(r"^### (.+)\n\nDefault: ((?:`[^`]+`(?:, )?)+)", ARGUMENTS, re.MULTILINE):
        names, defaults = (re.findall(r"`([^`]+)`", text) for text in (heading, default))
        arguments |= dict(zip(names, map(ast.literal_eval, defaults), strict=True))
    return arguments


def test_every_argument_is_on_its_page_with_its_default():
    parameters = list(inspect.signature(SVDTrainingCallback.__init__).parameters.values())[1:]
    assert documented_arguments() == {parameter.name: parameter.default for parameter in parameters}


@pytest.mark.parametrize(
    ("kind", "page", "before"),
    [
        (FallToBudget, "arguments.md", "of `FallToBudget`"),
        (Regularizer, "arguments.md", "of `Regularizer`"),
        (Alternating, "schedules.md", "## Alternating"),
        (GrowAndPrune, "schedules.md", "## Grow and prune"),
        (Nested, "schedules.md", "## Nested"),
    ],
)
def test_every_argument_of_an_object_is_in_its_table_with_its_default(kind, page, before):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split(before, 1)[1]
    section = text.split("\n\n| argument", 1)[1].split("\n\n", 1)[0]
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE)
    parameters = inspect.signature(kind).parameters.values()
    assert [(name, ast.literal_eval(value)) for name, value in rows] == [(p.name, p.default) for p in parameters]


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, re.MULTILINE)
    assert sorted(entries) == sorted(lightning_svd.__all__)


def test_what_versions_promise_about_changes_on_purpose():
    listed = interface.LIST.read_text(encoding="utf-8")
    assert listed == interface.interface(), "say it in CHANGELOG.md, deprecate what goes, and run `make interface`"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text) + re.findall(r"(?:src|srcset|href)=\"([^\"#]+)", text)
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


def test_every_module_has_its_reason_in_the_list_of_files():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\|[^|]*\|([^|]+)\|", text, re.MULTILINE)
    modules = [path.name for path in (ROOT / "lightning_svd").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(name for cell in cells for name in MODULE.findall(cell)) == sorted(modules)
