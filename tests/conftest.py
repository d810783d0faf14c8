"""What every test gets: one thread, a fixed seed, a folder of its own, and no network."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# The same examples each time, at any speed; `make fuzz` tries others.
settings.register_profile("tests", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("COLUMNS", "118")  # tables go by the terminal's width
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
