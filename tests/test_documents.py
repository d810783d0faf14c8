"""The code in the README and the docs runs, and the README prints what it shows."""

import re
from pathlib import Path

import compatibility
import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(path, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def layer_rows(text):
    return [line for line in text.splitlines() if re.match(r"\s+\S+\s+(Conv2d|Linear)", line)]


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_readmes_first_block_prints_the_report_that_follows_it(capsys):
    torch.manual_seed(0)
    exec(compile(blocks(ROOT / "README.md")[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    shown = blocks(ROOT / "README.md", "text")[0]
    # Ranks depend on the random start; which layers there are, their shapes and the budget do not.
    assert [line.split()[:4] for line in layer_rows(printed)] == [line.split()[:4] for line in layer_rows(shown)]
    for text in (printed, shown):
        assert 34.6 <= float(re.search(r"Low-rank model: ([\d.]+)% of the MACs", text).group(1)) <= 35.0


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(
    ("name", "block"),
    [("README.md", block) for block in blocks(ROOT / "README.md")[1:]]
    + [(path.name, block) for path in sorted((ROOT / "docs").glob("*.md")) for block in blocks(path)],
)
def test_every_other_block_runs(name, block):
    exec(compile(block, name, "exec"), {"__name__": name})


def test_the_compatibility_page_is_what_the_tests_say():
    # In this process, which has the tests' modules already: to import them all takes longer than to collect them.
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.page(), "run `make compatibility`"
