"""train.py as a user starts it, on simulated stars; a small ResNet keeps it quick (the full one: test_model.py).

LONG_RUN=200 python -m pytest tests/test_train.py      a long run of 200 epochs in place of 25
KILLS=20 python -m pytest tests/test_train.py          a run that is killed and resumed 20 times in place of once
"""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from common import command, heed_ctrl_c, run_script
from PIL import Image

import augmentation
import cache
import data
import history
import train
from cache import PreparedStars
from data import DataError, Star
from evaluation import Evaluation
from model import FusionModel, SpectrumNormalisation, flatten_spectra, load_checkpoint

LONG_RUN = int(os.environ.get("LONG_RUN", "25"))  # epochs
KILLS = int(os.environ.get("KILLS", "1"))
SMALL = ("--image-backbone", "resnet18", "--image-weights", "none", "--batch-size", "16", "--num-workers", "2")
PER_CLASS = 12


def run_training(data_dir: Path, output_dir: Path, *options: object) -> subprocess.CompletedProcess[str]:
    done = run_script("train.py", "--data-dir", data_dir, "--output-dir", output_dir, *SMALL, *options)
    assert done.returncode == 0, done.stderr
    return done


def run_here(data_dir: Path, output_dir: Path, *options: object) -> None:
    """In this process, where a test may have put something in place."""
    paths = ("--data-dir", data_dir, "--output-dir", output_dir)
    train.main([str(option) for option in (*paths, *SMALL, *options, "--quiet")])


def read_history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "training_history.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def stars_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    done = run_script("simulate_sdss_data.py", directory, "--per-class", PER_CLASS, "--seed", 7)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def own_stars_dir(stars_dir, tmp_path) -> Path:
    """A copy of the stars that a test may spoil."""
    return shutil.copytree(stars_dir, tmp_path / "stars")


@pytest.fixture(scope="session")
def finished(stars_dir, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The output directory of two runs with the same seed, and what the first one printed."""
    output_dir = tmp_path_factory.mktemp("output")
    first, _ = (run_training(stars_dir, output_dir, "--epochs", 2, "--test-split", 0.2) for _ in range(2))
    return output_dir, first


# A run and what it leaves


def test_history_has_the_keys_of_the_earlier_reproduction(finished):
    record = read_history(finished[0])[0]
    assert set(record) >= {
        "config",
        "epoch_metrics",
        "final_metrics",
        "classification_report",
        "total_training_time_seconds",
    }
    config = record["config"]
    assert set(config) >= {
        "training_id", "timestamp", "num_epochs", "batch_size", "learning_rate", "validation_split", "random_seed",
        "spec_length", "device", "num_classes", "class_names", "model_architecture", "optimizer", "csv_file",
        "image_dir", "spectra_dir", "versions", "git_commit", "stars_by_class_and_split", "simulated_stars",
    }  # fmt: skip
    names = {"train_loss", "val_loss", "val_accuracy", "val_precision", "val_recall", "val_f1"}
    assert set(record["epoch_metrics"]) == names
    assert all(len(values) == 2 and np.isfinite(values).all() for values in record["epoch_metrics"].values())
    final, best = record["final_metrics"], record["final_metrics"]["best_epoch"] - 1
    assert final["final_val_f1_weighted"] == pytest.approx(record["epoch_metrics"]["val_f1"][best], abs=1e-9)
    before, stars = record["epoch_metrics"]["val_f1"], sum(config["stars_by_class_and_split"]["validation"].values())
    highest = max(before[: best + 1])
    assert before[best] >= highest - 2 * np.sqrt(highest * (1 - highest) / stars)
    assert {"final_val_accuracy", "final_val_precision_weighted", "final_val_recall_weighted"} <= set(final)
    assert 0 <= final["final_val_within_one_subclass"] <= 1 and "final_test_f1_weighted" in final
    assert "validation stars" in final["final_val_scored_on"] and "flatters" in final["final_val_scored_on"]
    assert "test stars" in final["final_test_scored_on"] and "chose nothing" in final["final_test_scored_on"]
    for part in ("val", "test"):
        low, high = final[f"final_{part}_intervals_95"]["accuracy"]
        assert low <= final[f"final_{part}_accuracy"] <= high
    assert "M4" in record["classification_report"] and record["total_training_time_seconds"] > 0


def test_history_counts_every_star_and_says_that_they_are_simulated(finished):
    config = read_history(finished[0])[0]["config"]
    assert sum(sum(counts.values()) for counts in config["stars_by_class_and_split"].values()) == 5 * PER_CLASS
    assert config["stars_by_class_and_split"]["test"]["M2"] in (2, 3)
    assert config["simulated_stars"] == 5 * PER_CLASS and config["stars"] == f"{5 * PER_CLASS} SIMULATED stars"
    assert config["versions"]["torch"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU does not round alike every time")
def test_the_same_seed_gives_the_same_history(finished):
    first, second = read_history(finished[0])
    assert first["epoch_metrics"] == second["epoch_metrics"] and first["final_metrics"] == second["final_metrics"]
    assert first["config"]["training_id"] != second["config"]["training_id"]


def test_terminal_tells_stars_epochs_scores_and_files(finished):
    output_dir, done = finished
    lines = done.stdout.splitlines()
    assert any(line.split() == ["M0", str(PER_CLASS), str(PER_CLASS)] for line in lines)
    assert sum("val loss" in line and "F1" in line for line in lines) == 2
    assert "SIMULATED" in done.stdout and "weighted avg" in done.stdout and "Traceback" not in done.stderr
    files = [Path(line.strip()) for line in lines[lines.index(next(x for x in lines if "Open these" in x)) + 1 :]]
    assert len(files) == 5 and all(file.is_file() and file.is_relative_to(output_dir) for file in files)


def test_plots_are_pictures(finished):
    plots = sorted((finished[0] / "plots").glob("*.png"))
    assert [path.name.rsplit("_", 2)[0] for path in plots].count("training_plot") == 2
    for path in plots:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[0] > 400 and pixels.std() > 10


def test_checkpoint_is_scored_alone_as_it_was_in_its_run(finished, stars_dir):
    record = read_history(finished[0])[0]
    path = finished[0] / "checkpoints" / f"best_model_{record['config']['training_id']}.pth"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["config"]["class_names"] == list(data.CLASS_NAMES)
    parts = {part: {star[0] for star in stars} for part, stars in checkpoint["splits"].items()}
    assert not parts["train"] & parts["validation"] and not parts["train"] & parts["test"]
    for split, key in (("validation", "val"), ("test", "test")):
        done = run_script("train.py", "--evaluate", path, "--data-dir", stars_dir, "--split", split)
        assert done.returncode == 0, done.stderr
        assert record["classification_report" if key == "val" else "test_classification_report"] in done.stdout
        final = record["final_metrics"]
        low, high = final[f"final_{key}_intervals_95"]["f1"]
        assert f" f1 {final[f'final_{key}_f1_weighted']:.3f}  ({low:.3f} to {high:.3f})" in done.stdout
    done = run_script("train.py", "--evaluate", path, "--data-dir", stars_dir, "--split", "all")
    assert "the score flatters it" in done.stdout and f"on {5 * PER_CLASS} SIMULATED stars" in done.stdout


def test_spectra_are_normalised_by_training_stars_alone(stars_dir, tmp_path, monkeypatch, small_network):
    seen = []
    monkeypatch.setattr(SpectrumNormalisation, "fit", lambda self, spectra: seen.append(spectra.numpy()))
    monkeypatch.setattr(train, "NORMALISATION_STARS", 20)
    run_here(stars_dir, tmp_path, "--epochs", 1, "--modality", "spectrum")
    (spectra,) = seen
    (path,) = (tmp_path / "checkpoints").glob("best_model_*.pth")
    training = [Star(*star) for star in torch.load(path, weights_only=True)["splits"]["train"]]
    class_of = {data.load_spectrum(stars_dir, star).tobytes(): star.subclass for star in training}
    assert len(training) / 4 < len(spectra) <= 20
    assert {class_of[spectrum.tobytes()] for spectrum in spectra} == set(data.CLASS_NAMES)


def test_a_network_that_keeps_the_continuum_is_one_when_read_again(stars_dir, tmp_path, small_network):
    run_here(stars_dir, tmp_path, "--epochs", 1, "--modality", "spectrum", "--continuum-degree", -1)
    (path,) = (tmp_path / "checkpoints").glob("best_model_*.pth")
    network, checkpoint = load_checkpoint(path)
    spectra = torch.ones(2, data.SPECTRUM_LENGTH)
    assert torch.allclose(flatten_spectra(spectra, network.spectrum_normalisation.continuum_basis), spectra)
    assert checkpoint["config"]["continuum_degree"] == -1


def test_one_modality_needs_only_its_files_and_learns(own_stars_dir, tmp_path):
    """Far above guessing (F1 of one class for all: 0.07) in a few epochs, from spectra alone."""
    shutil.rmtree(own_stars_dir / "images")
    run_training(own_stars_dir, tmp_path, "--modality", "spectrum", "--epochs", 14, "--validation-split", 0.4)
    metrics = read_history(tmp_path)[0]["final_metrics"]
    assert metrics["final_val_f1_weighted"] > 0.4 and metrics["final_val_within_one_subclass"] > 0.7


def test_image_modality_runs_without_spectra(own_stars_dir, tmp_path):
    shutil.rmtree(own_stars_dir / "spectra")
    run_training(own_stars_dir, tmp_path, "--modality", "image", "--epochs", 1)
    assert read_history(tmp_path)[0]["config"]["modality"] == "image"


def test_two_runs_in_one_second_are_both_recorded(stars_dir, tmp_path):
    options = (*SMALL, "--modality", "spectrum", "--epochs", 1)
    run = command("train.py", "--data-dir", stars_dir, "--output-dir", tmp_path, *options)
    runs = [subprocess.Popen(run, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    identifiers = {record["config"]["training_id"] for record in read_history(tmp_path)}
    assert len(identifiers) == 2
    assert {path.stem for path in (tmp_path / "checkpoints").glob("*.pth")} == {f"best_model_{i}" for i in identifiers}


def test_a_directory_new_to_the_checkpoint_is_scored_whole(finished, tmp_path):
    path = next((finished[0] / "checkpoints").glob("*.pth"))
    assert run_script("simulate_sdss_data.py", tmp_path / "new", "--per-class", 2, "--seed", 8).returncode == 0
    done = run_script("train.py", "--evaluate", path, "--data-dir", tmp_path / "new", "--split", "all")
    assert done.returncode == 0 and "on 10 SIMULATED stars" in done.stdout and "flatters" not in done.stdout
    done = run_script("train.py", "--evaluate", path, "--data-dir", tmp_path / "new")
    assert done.returncode == 1 and "none of the checkpoint's validation stars is here" in done.stderr


def test_demo_makes_its_stars_once_and_keeps_to_its_directory(tmp_path):
    for expected in ("SIMULATED", "its stars are used as they are"):
        done = run_script("train.py", "--demo", "--epochs", 1, "--image-backbone", "resnet18", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout and "demo/training_history.json" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert [run["config"]["stars"] for run in read_history(tmp_path / "demo")] == ["250 SIMULATED stars"] * 2


def test_stars_without_a_position_in_the_catalogue_are_told_apart_by_their_spectra(own_stars_dir, tmp_path):
    """Each star twice, under two names and on two nights: both rows in one part, by PLUG_RA and PLUG_DEC."""
    stars, _ = data.read_catalog(own_stars_dir / "objects.csv")
    rows = ["name,subclass,plate,mjd,fiberID"]
    for star in stars:
        again = star._replace(name=f"again {star.name}", mjd=star.mjd + 1)
        shutil.copy(data.cutout_path(own_stars_dir, star), data.cutout_path(own_stars_dir, again))
        with fits.open(data.spectrum_path(own_stars_dir, star)) as hdus:
            hdus[0].header["MJD"] = again.mjd
            hdus.writeto(data.spectrum_path(own_stars_dir, again))
        rows += [",".join(map(str, row[:5])) for row in (star, again)]
    (own_stars_dir / "objects.csv").write_text("\n".join(rows))
    for modality in ("fusion", "image"):
        prepared, not_used = cache.read_stars(own_stars_dir, modality, num_workers=0)
        assert len(prepared.stars) == 10 * PER_CLASS and not not_used["set_aside"]
        assert all(star.simulated for star in prepared.stars)  # their FITS headers say it, the catalogue does not
        splits = train.split_stars(prepared, 0.2, 0.2, seed=0)
        fibers = {part: {(prepared.stars[i].plate, prepared.stars[i].fiberID) for i in splits[part]} for part in splits}
        assert not fibers["train"] & fibers["validation"] and not fibers["train"] & fibers["test"]


# Stars that are missing or damaged


def test_missing_and_damaged_stars_are_counted_named_and_set_aside(own_stars_dir, tmp_path):
    stars, _ = data.read_catalog(own_stars_dir / "objects.csv")
    by_class = {name: [star for star in stars if star.subclass == name] for name in data.CLASS_NAMES}
    data.spectrum_path(own_stars_dir, by_class["M0"][0]).unlink()
    data.cutout_path(own_stars_dir, by_class["M1"][0]).unlink()
    broken = data.spectrum_path(own_stars_dir, by_class["M2"][0])
    broken.write_bytes(broken.read_bytes()[:50_000])
    torn = data.cutout_path(own_stars_dir, by_class["M3"][0])
    torn.write_bytes(torn.read_bytes()[:1500])
    shutil.copy(
        data.spectrum_path(own_stars_dir, by_class["M4"][1]), data.spectrum_path(own_stars_dir, by_class["M4"][0])
    )
    done = run_training(own_stars_dir, tmp_path, "--epochs", 1)
    lines = done.stdout.partition("\n\n")[0].splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table["all"] == ["60", "55", "3", "1", "1"]  # listed, used, damaged, no image, no spectrum
    assert table["M2"] == ["12", "11", "1", "0", "0"] and table["M0"] == ["12", "11", "0", "0", "1"]
    config = read_history(tmp_path)[0]["config"]
    assert config["stars_missing"] == {"M0: no spectrum": 1, "M1: no image": 1} and config["rows_left_out"] == {}
    set_aside = config["set_aside"]
    for path, reason in ((broken, "truncated"), (torn, "JPEG"), (by_class["M4"][0].spectrum_id, "another star")):
        assert sum(str(path) in line and reason in line for line in set_aside) == 1
        assert any(str(path) in line for line in done.stdout.splitlines())


# Bad input: one clear line, exit status 1 or 2, nothing written


def keep_one_star_of(stars_dir: Path, subclass: str) -> None:
    for path in sorted((stars_dir / "spectra" / subclass).iterdir())[1:]:
        path.unlink()


@pytest.mark.parametrize(
    "spoil, options, message",
    [
        (lambda d: (d / "objects.csv").write_text("name,plate\n"), (), "column subclass, mjd, fiberID is missing"),
        (lambda d: shutil.rmtree(d / "spectra"), (), "python download_sdss_data.py --data-dir"),
        (lambda d: keep_one_star_of(d, "M3"), (), "class M3 has 1 usable star"),
        (lambda d: None, ("--validation-split", "0.02"), "cannot be split"),
        (lambda d: None, ("--image-weights", "imagenet"), "--image-weights none"),
        (lambda d: None, ("--epochs", "0"), "argument --epochs"),
    ],
)
def test_bad_input_gets_one_line_and_nothing_is_written(own_stars_dir, tmp_path, spoil, options, message):
    spoil(own_stars_dir)
    done = run_script(
        "train.py", "--data-dir", own_stars_dir, "--output-dir", tmp_path / "out", *SMALL, *options,
        TORCH_HOME=str(tmp_path), https_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    assert done.returncode in (1, 2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: error: ") and message in last and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (("--learning-rate", "-1"), "argument --learning-rate"),
        (("--learning-rate", "nan"), "argument --learning-rate"),
        (("--batch-size", "2.5"), "argument --batch-size"),
        (("--seed", "-1"), "argument --seed"),
        (("--validation-split", "1.5"), "argument --validation-split"),
        (("--validation-split", "0.6", "--test-split", "0.5"), "leave no star to train on"),
        (("--modality", "both"), "argument --modality"),
        (("--sic-weight", "inf"), "argument --sic-weight"),
    ],
)
def test_impossible_options_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        train.main(list(options))
    assert exit_.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(DataError, match="--device cuda"):
        train.choose_device("cuda")


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "loss_sic", lambda _, fuse_logits, *rest, **options: fuse_logits.sum() * torch.nan)
    prepared = many_stars(5)._replace(spectra=torch.rand(25, data.SPECTRUM_LENGTH))
    args = train.parse_arguments(["--modality", "spectrum", "--batch-size", "8", "--output-dir", str(tmp_path)])
    with pytest.raises(DataError, match="not finite in epoch 1.*--learning-rate"):
        train.train(args, prepared, {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def train_and_interfere(
    after: str, interfere: Callable[[subprocess.Popen], None], *options: object
) -> tuple[int, str, str]:
    """Start training, and do that to the process once a printed line begins with `after`; exit status and output."""
    process = subprocess.Popen(
        command("train.py", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_ctrl_c,
    )
    printed = ""
    for line in process.stdout:
        printed += line
        if line.strip().startswith(after):
            interfere(process)
            break
    rest, errors = process.communicate(timeout=300)
    return process.returncode, printed + rest, errors


def files_in(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_a_killed_run_is_resumed_as_if_never_stopped(stars_dir, tmp_path):
    """After kill -9 at random moments of the run and of those that go on with it."""
    options = ("--data-dir", stars_dir, "--modality", "spectrum", "--batch-size", 16, "--num-workers", 1)
    options += ("--epochs", 3 + KILLS, "--state-interval", 0, "--device", "cpu")  # GPUs do not round alike every time
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script("train.py", *options, "--output-dir", whole).returncode == 0
    status, _, _ = train_and_interfere("1/", subprocess.Popen.kill, *options, "--output-dir", killed)
    assert status == -signal.SIGKILL and not (killed / "training_history.json").exists()
    (state,) = (killed / "checkpoints").glob("last_state_*")
    for half_written in (
        state.with_name(f".{state.stem}-abc.partial.pth"),
        killed / ".training_history-abc.partial.json",
    ):
        half_written.touch()
    resume = ("--resume", "auto", "--output-dir", killed)
    rng = random.Random(KILLS)
    for _ in range(KILLS):
        process = subprocess.Popen(command("train.py", *resume, "--quiet"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(2, 12))
            assert process.returncode == 0
        process.kill()
        process.wait()
        if not list((killed / "checkpoints").glob("last_state_*")):
            break  # it was done
    else:
        done = run_script("train.py", *resume)
        assert done.returncode == 0, done.stderr
        assert " epochs are done" in done.stdout and " 1/" not in done.stdout
    one, other = read_history(whole)[0], read_history(killed)[0]
    assert one["epoch_metrics"] == other["epoch_metrics"] and one["final_metrics"] == other["final_metrics"]
    weights = [
        torch.load(next((directory / "checkpoints").glob("best_model_*.pth")), weights_only=True)["model_state"]
        for directory in (whole, killed)
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    left = files_in(killed).keys()
    assert len(left) == 4 and not any("last_state" in name or "partial" in name for name in left), left
    again = run_script("train.py", *resume)
    assert again.returncode == 1 and "no unfinished run" in again.stderr.splitlines()[-1]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone limits a process from outside")
def test_a_disk_that_fills_up_costs_no_earlier_checkpoint(stars_dir, tmp_path):
    """From the end of the first epoch on, no file can be longer than a megabyte."""
    options = ("--data-dir", stars_dir, "--modality", "spectrum", "--batch-size", 16, "--num-workers", 1)
    kept = {}

    def fill_up(process: subprocess.Popen) -> None:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (10**6, 10**6))
        kept.update(files_in(tmp_path / "checkpoints"))

    status, printed, errors = train_and_interfere(
        "1/3", fill_up, *options, "--output-dir", tmp_path, "--epochs", 3, "--state-interval", 0
    )
    assert status == 1 and "Traceback" not in errors
    checkpoint, state = sorted(kept)
    reason = errors.splitlines()[-1]
    assert re.fullmatch(r"train\.py: error: .*/checkpoints/.*(File too large|is the disk full).*", reason)
    assert files_in(tmp_path / "checkpoints") == kept
    (record,) = read_history(tmp_path)
    assert record["stopped"] in reason and record["final_metrics"]["best_epoch"] == 1
    assert f"--resume {tmp_path / 'checkpoints' / state}" in printed
    done = run_script("train.py", "--resume", "auto", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = read_history(tmp_path)
    assert record["stopped"] is None and len(record["epoch_metrics"]["val_f1"]) == 3
    assert files_in(tmp_path / "checkpoints").keys() == {checkpoint}


@pytest.fixture
def small_network(monkeypatch) -> None:
    monkeypatch.setattr(train, "FusionModel", partial(FusionModel, hidden_size=16, num_heads=2, num_layers=1))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux alone tells a process's files so")
def test_a_long_run_keeps_memory_and_open_files_flat(stars_dir, tmp_path, monkeypatch, small_network):
    """Of a small network; each epoch trains, validates, and writes a state and perhaps a checkpoint."""
    held = []

    def evaluate(*arguments):
        resident = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]
        held.append((int(resident) / 1024, len(os.listdir("/proc/self/fd"))))
        return evaluate_as_ever(*arguments)

    evaluate_as_ever = train.evaluate
    monkeypatch.setattr(train, "evaluate", evaluate)
    run_here(stars_dir, tmp_path, "--epochs", LONG_RUN, "--state-interval", 0, "--modality", "spectrum")
    memory, files = zip(*held[LONG_RUN // 5 : LONG_RUN], strict=True)
    half = len(memory) // 2  # a buffer that comes and goes makes the memory of single epochs differ
    assert max(memory[half:]) - max(memory[:half]) < 10, f"MB: {memory}"
    assert files[-1] <= files[0], files


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_a_compiled_step_learns_the_same(stars_dir, tmp_path, small_network):
    options = ("--epochs", 2, "--modality", "spectrum", "--precision", "fp32")
    for name, compiled in (("plain", ()), ("compiled", ("--compile",))):
        run_here(stars_dir, tmp_path / name, *options, *compiled)
    (plain,), (compiled,) = (read_history(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled["config"]["compile"] and not plain["config"]["compile"]
    for curve in ("train_loss", "val_loss"):
        assert compiled["epoch_metrics"][curve] == pytest.approx(plain["epoch_metrics"][curve], rel=1e-3)


def test_a_run_ended_by_ctrl_c_is_recorded_and_can_go_on(stars_dir, tmp_path):
    options = ("--data-dir", stars_dir, "--modality", "spectrum", "--batch-size", 16, "--epochs", 3, "--num-workers", 1)
    status, printed, errors = train_and_interfere(
        "1/3",
        lambda process: process.send_signal(signal.SIGINT),
        *options,
        "--output-dir",
        tmp_path,
        "--state-interval",
        0,
    )
    assert status == 130 and errors.splitlines()[-1] == "interrupted" and "--resume" in printed
    record = read_history(tmp_path)[0]
    assert record["stopped"] == "interrupted" and 1 <= len(record["epoch_metrics"]["val_f1"]) < 3
    training_id = record["config"]["training_id"]
    assert (tmp_path / "plots" / f"training_plot_{training_id}.png").exists()
    assert (tmp_path / "checkpoints" / f"best_model_{training_id}.pth").exists()
    done = run_script("train.py", "--resume", tmp_path / "checkpoints" / f"last_state_{training_id}.pth")
    assert done.returncode == 0, done.stderr
    (record,) = read_history(tmp_path)
    assert record["stopped"] is None and len(record["epoch_metrics"]["val_f1"]) == 3


def test_resume_takes_the_options_of_its_run_and_no_other_file(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "auto", "--epochs", "7"])
    assert "--resume takes all options" in capsys.readouterr().err.splitlines()[-1]
    checkpoint = next((finished[0] / "checkpoints").glob("best_model_*.pth"))
    with pytest.raises(OSError, match="no unfinished run of this version"):
        train.main(["--resume", str(checkpoint)])


def test_other_programs_checkpoints_are_refused(finished, stars_dir, tmp_path):
    whole = next((finished[0] / "checkpoints").glob("*.pth")).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(Path("."), tmp_path / "pickle.pth")  # would execute code if it were unpickled
    messages = {
        "cut": "damaged",
        "text": "damaged",
        "pickle": "damaged",
        "other": "of this program",
        "none": "no such file",
    }
    for name, message in messages.items():
        with pytest.raises(OSError, match=rf"{name}\.pth: .*{message}"):
            train.main(["--evaluate", str(tmp_path / f"{name}.pth"), "--data-dir", str(stars_dir)])
    done = run_script("train.py", "--evaluate", tmp_path / "other.pth", "--data-dir", stars_dir)
    assert done.returncode == 1 and done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ['[{"config": {"training_id": "2025', "{}", "[" * 100_000, "", "\udcff"])
def test_a_damaged_history_is_kept_under_another_name(tmp_path, capsys, content):
    path = tmp_path / "training_history.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    damaged = path.read_bytes()
    history.put_into_history(path, {"config": {"training_id": "20261123_120000"}})
    kept = tmp_path / "training_history.damaged-20261123_120000.json"
    assert kept.read_bytes() == damaged and kept.name in capsys.readouterr().err
    assert read_history(tmp_path) == [{"config": {"training_id": "20261123_120000"}}]


def test_runs_of_other_programs_stay_in_the_history(tmp_path):
    """json.dump writes NaN where it should not, and readers of Python take it: so do we."""
    path = tmp_path / "training_history.json"
    path.write_text('[{"epoch_metrics": {"val_loss": [NaN]}}, {"config": "none"}, "a note"]')
    history.put_into_history(path, {"config": {"training_id": "20261123_120000"}})
    assert len(read_history(tmp_path)) == 4 and np.isnan(read_history(tmp_path)[0]["epoch_metrics"]["val_loss"][0])


def test_training_ids_of_one_second_differ(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 11, 23, 12, 0, 0)

    monkeypatch.setattr(history, "datetime", Clock)
    with history.claim_training_id(tmp_path) as first, history.claim_training_id(tmp_path) as second:
        assert (first, second) == ("20261123_120000", "20261123_120000_2")
        (tmp_path / "checkpoints" / f"best_model_{first}.pth").touch()
    with history.claim_training_id(tmp_path) as third:
        assert third == second  # never used: its run left nothing


def test_help_shows_defaults_and_examples():
    done = run_script("train.py", "--help")
    assert done.returncode == 0
    for text in ("--sic-weight", "(default: 1.0)", "(default: 20)", "python train.py --demo"):
        assert text in done.stdout


# The split


def many_stars(per_class: int = 40) -> PreparedStars:
    rng = np.random.default_rng(0)
    stars = [
        Star(f"{name}-{i}", name, 1 + k, 52000, 1 + i, float(rng.uniform(0, 360)), float(rng.uniform(-60, 60)))
        for k, name in enumerate(data.CLASS_NAMES)
        for i in range(per_class)
    ]
    return PreparedStars(stars, None, None, torch.tensor([data.CLASS_NAMES.index(s.subclass) for s in stars]))


def test_split_is_stratified_complete_and_reproducible():
    prepared = many_stars()
    splits = train.split_stars(prepared, 0.2, 0.1, seed=1)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(200))
    for part, size in (("train", 28), ("validation", 8), ("test", 4)):
        assert np.bincount(prepared.targets[splits[part]]).tolist() == [size] * 5
    again, other = (train.split_stars(prepared, 0.2, 0.1, seed=seed) for seed in (1, 2))
    assert all(np.array_equal(splits[part], again[part]) for part in splits)
    assert not np.array_equal(splits["validation"], other["validation"])


def test_no_star_stands_in_two_parts():
    """Each star observed up to four times: all its rows go to one part, whatever the seed."""
    prepared = many_stars()
    rng = np.random.default_rng(1)
    stars = [
        star._replace(
            name=f"{star.name}, visit {visit}", mjd=star.mjd + visit, dec=star.dec + rng.uniform(-0.9, 0.9) / 3600
        )
        for star in prepared.stars
        for visit in range(rng.integers(1, 5))
    ]
    prepared = PreparedStars(stars, None, None, torch.tensor([data.CLASS_NAMES.index(s.subclass) for s in stars]))
    for seed in range(5):
        splits = train.split_stars(prepared, 0.25, 0.1, seed)
        names = {part: {stars[i].name.split(",")[0] for i in indices} for part, indices in splits.items()}
        assert (
            not names["train"] & names["validation"]
            | names["train"] & names["test"]
            | names["validation"] & names["test"]
        )
        assert sum(map(len, splits.values())) == len(stars)


def test_a_split_that_cannot_be_made_is_refused():
    prepared = many_stars(2)
    with pytest.raises(DataError, match="cannot be split"):
        train.split_stars(prepared, 0.2, 0.0, seed=0)
    with pytest.raises(DataError, match="every class needs at least 3"):
        train.split_stars(prepared, 0.5, 0.2, seed=0)
    prepared = many_stars(20)
    kept = np.array([i for i, star in enumerate(prepared.stars) if star.subclass != "M4" or star.fiberID <= 2])
    few = PreparedStars([prepared.stars[i] for i in kept], None, None, prepared.targets[kept])
    with pytest.raises(DataError, match="no M4 star in the train part"):
        train.split_stars(few, 0.9, 0.0, seed=0)


# Figures


def test_scores_are_weighted_by_class_frequency():
    targets, predictions = np.array([0, 0, 0, 1, 1, 4]), np.array([0, 0, 1, 1, 2, 0])
    scores = Evaluation(0.0, targets, predictions).scores()
    precision = {0: 2 / 3, 1: 1 / 2, 4: 0.0}
    recall = {0: 2 / 3, 1: 1 / 2, 4: 0.0}
    frequency = {0: 3 / 6, 1: 2 / 6, 4: 1 / 6}
    assert scores["accuracy"] == pytest.approx(3 / 6)
    assert scores["precision"] == pytest.approx(sum(frequency[k] * precision[k] for k in frequency))
    assert scores["recall"] == pytest.approx(sum(frequency[k] * recall[k] for k in frequency))
    assert scores["f1"] == pytest.approx(sum(frequency[k] * precision[k] for k in frequency))  # precision = recall here
    assert scores["within_one_subclass"] == pytest.approx(5 / 6)


def test_losses_are_averaged_over_stars_not_batches(monkeypatch):
    monkeypatch.setattr(train, "shift_and_add_noise", lambda spectra, augmentation: spectra)
    monkeypatch.setattr(augmentation, "MIN_SHARE", 1.0)
    torch.manual_seed(0)
    model = train.FusionModel(modality="spectrum", num_layers=1, dropout=0.0)
    prepared = many_stars(5)._replace(spectra=torch.rand(25, data.SPECTRUM_LENGTH))
    engine = train.Engine(model, torch.device("cpu"), "fp32")
    losses = [train.evaluate(engine, train.make_loader(prepared, np.arange(25), size)).loss for size in (25, 8)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    optimizer, scheduler = train.make_optimizer(model, 1e-30, epochs=10, steps_per_epoch=4)  # nothing moves
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    loader = train.TrainingLoader(prepared, np.arange(25), 8, seed=0, image_dropout=0.0).epoch(1)
    loss = train.train_one_epoch(engine, loader, optimizer, scheduler, lambda: None, "")
    assert loss == pytest.approx(losses[0], abs=1e-5)


def test_interval_of_a_score_is_that_of_its_sampling():
    """Of 400 stars nine in ten are right: a fraction whose standard deviation is 0.015."""
    targets = np.arange(400) % 5
    predictions = np.where(np.arange(400) < 40, (targets + 1) % 5, targets)
    low, high = Evaluation(0.0, targets, predictions).intervals()["accuracy"]
    assert low == pytest.approx(0.9 - 1.96 * 0.015, abs=0.006) and high == pytest.approx(0.9 + 1.96 * 0.015, abs=0.006)


def test_stars_are_augmented_for_training_alone_and_anew_in_each_epoch():
    random = torch.Generator().manual_seed(0)
    prepared = many_stars(40)._replace(
        spectra=1 + 0.1 * torch.randn(200, data.SPECTRUM_LENGTH, generator=random),
        images=torch.randint(256, (200, 3, 8, 8), dtype=torch.uint8, generator=random),
    )
    batch = next(iter(train.make_loader(prepared, np.arange(200), 200)))
    assert torch.equal(batch.spectra, prepared.spectra) and torch.equal(batch.images, prepared.images)
    assert batch.image_seen is None
    loader = train.TrainingLoader(prepared, np.arange(200), 200, seed=0, image_dropout=0.3)
    batch, other, again = (next(iter(loader.epoch(epoch))) for epoch in (1, 2, 1))
    assert all(not torch.equal(one, two) for one, two in zip(batch, other, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(batch, again, strict=True))
    plain = next(iter(loader.epoch(1, augmented=False)))
    assert plain.image_seen is None
    assert (batch.targets.gather(1, plain.targets[:, None]) >= augmentation.MIN_SHARE).all()  # in the same order
    assert torch.isin(plain.spectra[:, 0], prepared.spectra[:, 0]).all()


def test_label_spectrum_and_image_of_a_blend_have_the_same_shares(monkeypatch):
    monkeypatch.setattr(augmentation, "MAX_SHIFT", 0)
    monkeypatch.setattr(augmentation, "MAX_EXTRA_NOISE", 0.0)
    prepared = many_stars(40)
    value = 20 * prepared.targets
    prepared = prepared._replace(
        spectra=value[:, None].expand(-1, data.SPECTRUM_LENGTH).float(),
        images=value.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8),
    )
    loader = train.TrainingLoader(prepared, np.arange(200), 200, seed=0, image_dropout=0.3)
    batch = next(iter(loader.epoch(1)))
    expected = 20 * batch.targets @ torch.arange(5.0)
    assert torch.allclose(batch.targets.sum(dim=1), torch.ones(200))
    assert (batch.targets > 0).sum(dim=1).max() == 2 and (batch.targets.max(dim=1).values >= 0.5).all()
    assert torch.allclose(batch.spectra, expected[:, None], atol=1e-4)
    assert torch.equal(batch.images, (expected + 0.5).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8))


def test_the_best_epoch_is_the_latest_that_validation_cannot_tell_from_the_best():
    few = [
        train.is_best(f1, before, 80) for f1, before in [(0.3, []), (0.92, [0.3]), (0.87, [0.3, 0.92]), (0.85, [0.92])]
    ]
    assert few == [True, True, True, False]  # two standard errors of 0.92 are 0.06
    assert not train.is_best(0.9, [0.92], 8000) and train.is_best(0.92, [0.92], 8000) and train.is_best(1.0, [1.0], 5)


def test_the_image_encoders_gradients_do_not_scale_those_of_the_others():
    torch.manual_seed(0)
    model = train.FusionModel(image_backbone="resnet18", num_layers=1)
    random_stars = many_stars(2)._replace(
        spectra=1 + 0.3 * torch.randn(10, data.SPECTRUM_LENGTH),
        images=torch.randint(256, (10, 3, 128, 128), dtype=torch.uint8),
    )
    optimizer, scheduler = train.make_optimizer(model, 1e-9, epochs=1, steps_per_epoch=1)
    image_encoder, others = (group["params"] for group in optimizer.param_groups)
    assert len(image_encoder) + len(others) == len(list(model.parameters()))
    engine = train.Engine(model, torch.device("cpu"), "fp32")
    loader = train.make_loader(random_stars, np.arange(10), 10)
    train.train_one_epoch(engine, loader, optimizer, scheduler, lambda: None, "")
    norms = [torch.nn.utils.get_total_norm(p.grad for p in part) for part in (image_encoder, others)]
    assert norms == pytest.approx([train.MAX_GRADIENT_NORM] * 2, rel=1e-3)


def test_learning_rate_warms_up_then_falls_to_zero():
    model = train.FusionModel(modality="spectrum", num_layers=1)
    optimizer, scheduler = train.make_optimizer(model, 1e-4, epochs=10, steps_per_epoch=5)
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([1e-5 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(1e-4) and rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 1e-6
