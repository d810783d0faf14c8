"""The notebooks run from top to bottom and are stored without outputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
everyone = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 6


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


@everyone
def test_runs(path, tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    # Small networks are slower on two threads than on one, far slower where the processor is shared.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if path.stem == "05-a-trained-voice-encoder":
        get_speech_and_encoder(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    (tmp_path / "done.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
