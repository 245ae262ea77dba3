"""Tests run file by file in several processes (pytest-xdist), each with one thread for its arithmetic."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import SMALL, run_script
from sdss_server import SdssServer, running_server

from simulate_sdss_data import simulate


@pytest.fixture(scope="session")
def stars_dir(tmp_path_factory) -> Path:
    """60 simulated stars, for reading alone."""
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    simulate(directory, per_class=12, seed=7, min_snr=5)
    return directory


@pytest.fixture
def own_stars_dir(stars_dir, tmp_path) -> Path:
    """A copy of the stars that a test may spoil."""
    return shutil.copytree(stars_dir, tmp_path / "stars")


@pytest.fixture
def server() -> Iterator[SdssServer]:
    """A local server that behaves like SDSS, without any star."""
    with running_server() as running:
        yield running


class FinishedRun(NamedTuple):
    directory: Path
    checkpoint: Path
    printed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(stars_dir, tmp_path_factory) -> FinishedRun:
    """A run of train.py as a user starts it, with both inputs and a test part; for reading alone."""
    directory = tmp_path_factory.mktemp("output")
    done = run_script("train.py", "--data-dir", stars_dir, "--output-dir", directory, "--test-split", 0.2, *SMALL)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = (directory / "checkpoints").glob("best_model_*.pth")
    return FinishedRun(directory, checkpoint, done)
