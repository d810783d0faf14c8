"""The README's code runs and prints what it shows."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_first_block_prints_the_report_that_follows_it(capsys):
    torch.manual_seed(0)
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL).group(1)
    # Ranks depend on the random start; which layers there are, their shapes and the budget do not.
    assert [line.split()[:4] for line in layer_rows(printed)] == [line.split()[:4] for line in layer_rows(shown)]
    for text in (printed, shown):
        assert 34.6 <= float(re.search(r"Low-rank model: ([\d.]+)% of the MACs", text).group(1)) <= 35.0


def layer_rows(text):
    return [line for line in text.splitlines() if re.match(r"\s+\S+\s+(Conv2d|Linear)", line)]


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_other_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})
