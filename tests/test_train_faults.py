"""train.py where something is missing, wrong or in short supply.

python -m pytest -m slow tests/test_train_faults.py       a full disk, a long run
"""

import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from common import command
from training import SPECTRUM, fail_in_epoch, files_in, read_history, train_and_interfere, train_here

import classifier
import train
from catalog import read_catalog
from cli import DataError
from device import out_of_memory_hint
from evaluation import Evaluation
from star_files import catalog_path, spectrum_path

# Stars and options that cannot be used


def test_missing_and_damaged_stars_are_recorded(own_stars_dir, tmp_path):
    stars = [star for star in read_catalog(catalog_path(own_stars_dir))[0] if star.subclass == "M2"]
    spectrum_path(own_stars_dir, stars[0]).unlink()
    broken = spectrum_path(own_stars_dir, stars[1])
    broken.write_bytes(broken.read_bytes()[:50_000])
    shutil.rmtree(own_stars_dir / "images")
    train_here("--data-dir", own_stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 1)
    config = read_history(tmp_path)[0]["config"]
    assert config["stars_missing"] == {"M2: no spectrum": 1} and config["rows_left_out"] == {}
    (problem,) = config["set_aside"]
    assert str(broken) in problem and config["stars"] == "58 SIMULATED stars"


def keep_one_star_of(stars_dir: Path, subclass: str) -> None:
    for path in sorted((stars_dir / "spectra" / subclass).iterdir())[1:]:
        path.unlink()


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (lambda d: catalog_path(d).write_text("name,plate\n"), (), "column subclass, mjd, fiberID is missing"),
        (lambda d: shutil.rmtree(d / "spectra"), (), "python download_sdss_data.py --data-dir"),
        (lambda d: keep_one_star_of(d, "M3"), (), "class M3 has 1 usable spectra"),
        (lambda d: None, ("--validation-split", 0.02), "cannot be split"),
        (lambda d: None, ("--modality", "image", "--image-weights", "none.pth"), "none.pth: no such file"),
    ],
)
def test_input_that_cannot_be_used_is_named_and_nothing_is_written(own_stars_dir, tmp_path, spoil, options, message):
    spoil(own_stars_dir)
    with pytest.raises((DataError, OSError), match=message):
        train_here("--data-dir", own_stars_dir, "--output-dir", tmp_path / "out", *SPECTRUM, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--evaluate", "a.pth", "--epochs", 3), "--evaluate does not use --epochs"),
        (("--evaluate", "a.pth", "--seed", 3), "--evaluate does not use --seed"),
        (("--evaluate", "a.pth", "--recipe", "improved"), "--evaluate does not use --recipe"),
        (("--split", "all"), "--split chooses the stars of --evaluate"),
        (("--demo", "--resume", "auto"), "--demo starts a run"),
        (("--demo", "--data-dir", "stars"), "--demo simulates its own stars"),
        (("--initial-checkpoint", "a.pth", "--recipe", "paper"), "--initial-checkpoint has its own recipe"),
        (("--validation-split", 0.6, "--test-split", 0.5), "leave no star to train on"),
        (("--epochs", 0), "argument --epochs: '0' is not a whole number from 1"),
        (("--seed", -1), "argument --seed"),
        (("--device", "tpu"), "argument --device"),
    ],
)
def test_options_that_cannot_be_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        train_here(*options)
    assert exit_.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(stars_dir, tmp_path):
    with pytest.raises(DataError, match="--device cuda: PyTorch finds no GPU"):
        train_here("--data-dir", stars_dir, "--output-dir", tmp_path / "out", *SPECTRUM, "--device", "cuda")


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_a_full_gpu_is_told_from_other_errors(message):
    with pytest.raises(DataError, match="the GPU's memory is full; try"), out_of_memory_hint("try"):
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_hint("try"):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_loss_that_is_not_finite_stops_the_run_within_its_epoch(stars_dir, tmp_path, monkeypatch):
    steps = []

    def loss_terms(align_logits, fuse_logits, *arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
        steps.append(len(fuse_logits))
        return fuse_logits.sum() * (torch.nan if len(steps) == 2 else 1), torch.zeros(())

    monkeypatch.setattr(classifier, "loss_terms", loss_terms)
    with pytest.raises(DataError, match="^the loss is not finite; try a smaller --learning-rate"):
        train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--batch-size", 4)
    assert 2 <= len(steps) <= 4 and not files_in(tmp_path)


# Machines


def test_a_gpu_that_runs_full_costs_no_earlier_epoch(stars_dir, tmp_path, monkeypatch):
    """The run is recorded, and can go on."""
    with monkeypatch.context() as patch:
        fail_in_epoch(patch, 2, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
        with pytest.raises(DataError, match="^the GPU's memory is full; try a smaller --batch-size"):
            train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM)
    (record,) = read_history(tmp_path)
    assert "out of memory" in record["stopped"] and len(record["epoch_metrics"]["val_f1"]) == 1
    train_here("--resume", "auto", "--output-dir", tmp_path)
    (record,) = read_history(tmp_path)
    assert record["stopped"] is None and len(record["epoch_metrics"]["val_f1"]) == 2


@pytest.mark.slow
def test_two_runs_in_one_second_are_both_recorded(stars_dir, tmp_path):
    run = command("train.py", "--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 1)
    runs = [subprocess.Popen(run, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    identifiers = {record["config"]["training_id"] for record in read_history(tmp_path)}
    assert len(identifiers) == 2
    assert {path.stem for path in (tmp_path / "checkpoints").glob("*.pth")} == {f"best_model_{i}" for i in identifiers}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone limits a process from outside")
def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(stars_dir, tmp_path):
    """From the end of the first epoch on, no file can be longer than a megabyte."""
    kept = {}

    def fill_up(process: subprocess.Popen) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10**6, 10**6))
        kept.update(files_in(tmp_path / "checkpoints"))

    options = ("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 5)
    status, printed, errors = train_and_interfere("1/5", fill_up, *options, state_interval=0)
    checkpoint, state = sorted(kept)
    reason = errors.splitlines()[-1]
    assert status == 1 and re.fullmatch(r"train\.py: error: .*(File too large|is the disk full).*", reason)
    assert "Traceback" not in errors and files_in(tmp_path / "checkpoints") == kept
    (record,) = read_history(tmp_path)
    assert record["stopped"] in reason and record["final_metrics"]["best_epoch"] == 1
    assert f"--resume {tmp_path / 'checkpoints' / state}" in printed
    train_here("--resume", "auto", "--output-dir", tmp_path)
    (record,) = read_history(tmp_path)
    assert record["stopped"] is None and len(record["epoch_metrics"]["val_f1"]) == 5
    assert files_in(tmp_path / "checkpoints").keys() == {checkpoint}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux alone tells a process's files so")
def test_a_long_run_keeps_memory_and_open_files_flat(stars_dir, tmp_path, monkeypatch):
    """Each epoch trains, validates, and writes a state and perhaps a checkpoint."""
    held, evaluate = [], train.evaluate

    def measure(*arguments) -> Evaluation:
        resident = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
        held.append((int(resident) / 1024, len(os.listdir("/proc/self/fd"))))
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", measure)
    monkeypatch.setattr(train, "STATE_INTERVAL", 0)
    train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 25)
    memory, files = zip(*held[5:25], strict=True)
    assert np.median(memory[10:]) - np.median(memory[:10]) < 10, f"MB: {memory}"
    assert files[-1] <= files[0], files
