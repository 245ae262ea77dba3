"""reproduce.sh from the queries to the table, against a local server: stopped on its way, gone on with, done.

python -m pytest -m slow tests/test_reproduce.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sdss_server
from common import ROOT
from sdss_server import SdssServer, make_stars, status

pytestmark = pytest.mark.slow

STARS, SEEDS, RECIPES = 5, ("1", "2"), ("paper", "improved")
TRAIN_OPTIONS = "--modality spectrum --layers 1 --epochs 1 --batch-size 8 --device cpu --num-workers 1"


def reproduce(directory: Path, server: SdssServer) -> subprocess.CompletedProcess[str]:
    settings = {
        "PYTHON": sys.executable,
        "STARS": str(STARS),
        "SEEDS": " ".join(SEEDS),
        "TRAIN_OPTIONS": TRAIN_OPTIONS,
        "SERVERS": f"--sas-url {server.sas_url} --skyserver-url {server.skyserver_url}",
        "DOWNLOAD_OPTIONS": "--image-rate 1000 --retries 0",
        "NO_PROXY": "127.0.0.1",
    }
    command = ["bash", str(ROOT / "reproduce.sh"), str(directory)]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=1200)


def test_it_goes_on_where_it_was_and_ends_with_the_table(tmp_path):
    directory = tmp_path / "with a space"
    with sdss_server.running_server() as server:
        for number, star in enumerate(make_stars(server, 10 * STARS)):
            server.list_star(star, snr=15 if number < 5 * STARS else 5)
        server.fail("/spectra/", *[status(404)] * 3)
        stopped = reproduce(directory, server)
        assert stopped.returncode == 1 and "Files missing: 3" in stopped.stdout, stopped.stdout + stopped.stderr
        assert not (directory / "low").exists() and not (directory / "high" / "training_history.json").exists()

        done = reproduce(directory, server)
        assert done.returncode == 0, done.stderr
        assert server.count("SqlSearch") == 10 and server.count("getjpeg") == 10 * STARS
        assert server.count("/spectra/") == 10 * STARS + 3
        table = (directory / "results.txt").read_text()
        assert table in done.stdout
        for snr in ("high", "low"):
            runs, f1 = json.loads((directory / snr / "training_history.json").read_text()), {}
            for run in runs:
                key = run["config"]["recipe"], str(run["config"]["random_seed"])
                f1[key] = run["final_metrics"]["final_test_f1_weighted"]
            assert len(runs) == len(f1) and f1.keys() == {(recipe, seed) for recipe in RECIPES for seed in SEEDS}
            lines = table.partition(f"{snr} S/N: ")[2].splitlines()[1:4]
            means = {line.split()[0]: float(line.split()[1]) for line in lines}
            assert means.keys() == {*RECIPES, "difference"}
            assert means["paper"] == pytest.approx(sum(f1["paper", seed] for seed in SEEDS) / len(SEEDS), abs=6e-4)

        again = reproduce(directory, server)
        assert again.returncode == 0 and (directory / "results.txt").read_text() == table
        assert "epoch" not in again.stdout and server.count("/spectra/") == 10 * STARS + 3
