"""docs/tour.ipynb runs from its first cell to its last, also without a clone, and is kept with its outputs.

jupyter execute --inplace docs/tour.ipynb    makes the outputs anew
"""

import base64
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from common import ROOT
from nbclient import NotebookClient

TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.fixture
def tour() -> nbformat.NotebookNode:
    return nbformat.read(TOUR, as_version=4)


def code_cells(tour: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in tour.cells if cell.cell_type == "code"]


def copy_repository(target: Path) -> Path:
    """The files that the tour needs."""
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "objects.csv", TOUR]:
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return target


def test_it_is_kept_with_its_outputs_and_nothing_of_the_machine(tour):
    cells = code_cells(tour)
    assert len(cells) == 10
    assert all(cell.outputs for cell in cells[1:]) and [cell.execution_count for cell in cells] == list(range(1, 11))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    text = TOUR.read_text(encoding="utf-8")
    assert not re.search(r"/(root|home|work|tmp|usr)/|Warning:", text)
    assert len(text) < 500_000
    pictures = re.findall(r'"image/png": "([^"]+)"', text)
    assert len(pictures) == 4 and all(base64.b64decode(picture)[1:4] == b"PNG" for picture in pictures)


@pytest.mark.slow
def test_it_runs(tour, tmp_path):
    """With one epoch in place of ten."""
    training = code_cells(tour)[4]
    assert '"--epochs", 10' in training.source
    training.source = training.source.replace('"--epochs", 10', '"--epochs", 1')
    docs = copy_repository(tmp_path / "clone") / "docs"
    NotebookClient(tour, timeout=1800, resources={"metadata": {"path": str(docs)}}).execute()
    made = {path.name for path in (tmp_path / "clone" / "demo" / "tour").iterdir()}
    assert made >= {"stars", "others", "plots", "checkpoints", "training_history.json", "predictions.csv"}


@pytest.mark.slow
def test_its_first_cell_makes_a_clone_where_there_is_none(tour, tmp_path):
    repository = copy_repository(tmp_path / "repository")
    commit = ["-c", "user.name=A", "-c", "user.email=a@b.c", "commit", "--quiet", "--message=all"]
    for arguments in (["init", "--quiet"], ["add", "."], commit):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    source = code_cells(tour)[0].source
    assert 'REPOSITORY = ""' in source
    first = source.replace('REPOSITORY = ""', f"REPOSITORY = {str(repository)!r}")
    colab = tmp_path / "content"
    colab.mkdir()
    for _ in range(2):  # again after a restart of the kernel
        subprocess.run(
            [sys.executable, "-c", f"{first}\nimport recipe\nrun('train.py', '--help')"], cwd=colab, check=True
        )
    assert (colab / "m-stars" / "train.py").exists()
