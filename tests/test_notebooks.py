"""The notebooks run from top to bottom and are stored without outputs."""

import asyncio
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
everyone = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 7


@everyone
def test_no_output_is_stored(path):
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def get_speech_and_encoder(folder):
    """What one notebook cannot do without; it finds the wheel in its folder and does not download it again."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("needs the program espeak-ng")
    options = ["--quiet", "--no-deps", "--retries", "1", "--timeout", "10", "--dest", str(folder)]
    pip = [sys.executable, "-m", "pip", "download", *options, "resemblyzer==0.1.4"]
    outcome = subprocess.run(pip, check=False, capture_output=True, text=True)
    if outcome.returncode:
        pytest.skip(f"needs the package resemblyzer: {outcome.stderr.strip().splitlines()[-1]}")


def run(path, folder):
    """Run a notebook in a folder; what it is with its outputs."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    if path.stem == "05-a-trained-voice-encoder":
        get_speech_and_encoder(folder)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}})
    asyncio.run(client.async_execute())  # which closes the event loop of this thread, as `execute` does not
    return nbformat.writes(notebook)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Name -> a future of each notebook that is asked for: two run at a time, each in a process of its own."""
    asked = [
        item.callspec.params["path"] for item in request.session.items if getattr(item, "function", None) is test_runs
    ]
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        # Small networks are slower on two threads than on one, far slower where the processor is shared.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("WANDB_MODE", "offline")
        # The last ones take longest: begun first, none of them is left to run alone at the end.
        yield {path: pool.submit(run, path, tmp_path_factory.mktemp(path.stem)) for path in reversed(asked)}
        pool.shutdown(cancel_futures=True)


@everyone
def test_runs(path, tmp_path, runs):
    (tmp_path / "done.ipynb").write_text(runs[path].result(), encoding="utf-8")
