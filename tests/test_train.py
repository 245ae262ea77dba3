"""train.py on simulated stars, with a small ResNet and one layer of the Transformer.

python -m pytest -m slow tests/test_train.py       the demo, a full disk, a long run
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, SMALL, command, heed_ctrl_c, random_stars, run_script
from PIL import Image

import classifier
import train
from catalog import read_catalog
from cli import DataError
from evaluation import Evaluation
from preparation import Standardisation
from recipe import PAPER
from simulate_sdss_data import simulate
from star_files import catalog_path, spectrum_path
from train_options import parse_arguments

SPECTRUM = (*SMALL, "--modality", "spectrum")
PER_CLASS = 12


def train_here(*options: object) -> None:
    """As `python train.py` with these options, in this process."""
    train.main(parse_arguments(train.__doc__, list(map(str, options))))


def read_history(output_dir: Path) -> list[dict]:
    return json.loads((output_dir / "training_history.json").read_text(encoding="utf-8"))


def checkpoint_of(output_dir: Path) -> Path:
    (path,) = (output_dir / "checkpoints").glob("best_model_*.pth")
    return path


def files_in(directory: Path) -> dict[str, bytes]:
    paths = (path for path in directory.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


# A run and its results


def test_the_history_has_the_keys_of_the_earlier_reproduction(finished):
    (record,) = read_history(finished.directory)
    assert record.keys() >= {"config", "epoch_metrics", "final_metrics", "classification_report"}
    assert record["config"].keys() >= {
        "training_id", "timestamp", "num_epochs", "batch_size", "learning_rate", "validation_split", "random_seed",
        "spec_length", "device", "num_classes", "class_names", "model_architecture", "optimizer", "csv_file",
        "image_dir", "spectra_dir",
    }  # fmt: skip
    names = {"train_loss", "val_loss", "val_accuracy", "val_precision", "val_recall", "val_f1"}
    assert record["epoch_metrics"].keys() == names
    assert all(len(curve) == 2 and np.isfinite(curve).all() for curve in record["epoch_metrics"].values())
    final, best = record["final_metrics"], record["final_metrics"]["best_epoch"] - 1
    assert final["final_val_f1_weighted"] == pytest.approx(record["epoch_metrics"]["val_f1"][best], abs=1e-9)
    assert {"final_val_accuracy", "final_val_precision_weighted", "final_val_recall_weighted"} <= final.keys()
    assert "M4" in record["classification_report"] and record["total_training_time_seconds"] > 0


def test_the_record_has_every_choice_and_star(finished):
    (record,) = read_history(finished.directory)
    config, final = record["config"], record["final_metrics"]
    assert config["recipe"] == "paper"
    for name, choice in torch.load(finished.checkpoint, weights_only=True)["recipe"].items():
        assert config[name] == choice
    assert sum(sum(counts.values()) for counts in config["stars_by_class_and_split"].values()) == 5 * PER_CLASS
    assert config["simulated_stars"] == 5 * PER_CLASS and config["stars"] == f"{5 * PER_CLASS} SIMULATED stars"
    assert config["versions"]["torch"] == torch.__version__
    assert "optimistic" in final["final_val_scored_on"] and "held out" in final["final_test_scored_on"]
    low, high = final["final_test_intervals_95"]["accuracy"]
    assert low <= final["final_test_accuracy"] <= high


def test_the_terminal_shows_stars_epochs_scores_and_files(finished):
    lines = finished.printed.stdout.splitlines()
    assert any(line.split() == ["M0", str(PER_CLASS), str(PER_CLASS)] for line in lines)
    assert sum("val loss" in line and "F1" in line for line in lines) == 2
    assert "SIMULATED" in finished.printed.stdout and "weighted avg" in finished.printed.stdout
    files = [Path(line.strip()) for line in lines[lines.index(next(x for x in lines if "Open these" in x)) + 1 :]]
    assert len(files) == 5 and all(file.is_file() and file.is_relative_to(finished.directory) for file in files)
    assert files_in(finished.directory).keys() == {str(file.relative_to(finished.directory)) for file in files}
    for file in files:
        if file.suffix == ".png":
            pixels = np.asarray(Image.open(file).convert("L"))
            assert pixels.shape[0] > 400 and pixels.std() > 10


def test_a_checkpoint_is_scored_again_as_in_its_run(finished, stars_dir, tmp_path, capsys):
    (record,) = read_history(finished.directory)
    for split, key, report in (("validation", "val", ""), ("test", "test", "test_")):
        train_here("--evaluate", finished.checkpoint, "--data-dir", stars_dir, "--split", split, "--device", "cpu")
        printed, final = capsys.readouterr().out, record["final_metrics"]
        assert record[f"{report}classification_report"] in printed
        low, high = final[f"final_{key}_intervals_95"]["f1"]
        assert f" f1 {final[f'final_{key}_f1_weighted']:.3f}  ({low:.3f} to {high:.3f})" in printed
    train_here("--evaluate", finished.checkpoint, "--data-dir", stars_dir, "--split", "all")
    assert "note: 48 of these stars were used for training or checkpoint selection" in capsys.readouterr().out

    simulate(tmp_path / "new", per_class=2, seed=8, min_snr=5)
    train_here("--evaluate", finished.checkpoint, "--data-dir", tmp_path / "new", "--split", "all")
    printed = capsys.readouterr().out
    assert "on 10 SIMULATED stars" in printed and "note:" not in printed
    with pytest.raises(DataError, match="none of the checkpoint's validation stars is here"):
        train_here("--evaluate", finished.checkpoint, "--data-dir", tmp_path / "new")


def test_the_best_checkpoint_is_the_epoch_of_the_highest_f1(stars_dir, tmp_path, monkeypatch):
    """Of equal ones, that of the lowest loss; and it is written when, and only when, an epoch is better."""
    outcomes = iter([(5, 2.0), (8, 2.0), (7, 0.1), (8, 1.0), (8, 1.5), (8, 1.0)])  # stars classified right, loss
    written, save_checkpoint = [], train.save_checkpoint

    def evaluate(*arguments) -> Evaluation:
        right, loss = next(outcomes, (8, 1.0))
        return Evaluation(loss, np.arange(10) % 5, np.where(np.arange(10) < right, np.arange(10) % 5, 0))

    def save(path: Path, *arguments, **contents) -> None:
        written.append(contents["epoch"])
        save_checkpoint(path, *arguments, **contents)

    monkeypatch.setattr(train, "train_one_epoch", lambda *arguments: 1.0)
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "save_checkpoint", save)
    train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 6, "--quiet")
    assert written == [1, 2, 4]
    assert read_history(tmp_path)[0]["final_metrics"]["best_epoch"] == 4
    assert torch.load(checkpoint_of(tmp_path), weights_only=True)["epoch"] == 4


def test_the_demo_is_the_papers_recipe_from_random_weights():
    args = parse_arguments(train.__doc__, ["--demo"])
    assert args.recipe == replace(PAPER, num_epochs=args.recipe.num_epochs, image_weights="none")
    assert (args.data_dir, args.output_dir) == (Path("demo/stars"), Path("demo"))


def test_spectra_are_standardised_by_the_training_stars_alone():
    prepared, rows, recipe = random_stars(4), np.arange(0, 20, 2), replace(PAPER, modality="spectrum")
    expected = Standardisation(recipe)
    expected.fit(prepared.spectra[rows])
    assert torch.equal(train.make_classifier(recipe, "fp32", prepared, rows).standardise.mean, expected.mean)


def test_improved_runs_too(stars_dir, tmp_path):
    options = ("--data-dir", stars_dir, *SMALL, "--recipe", "improved", "--epochs", 1, "--batch-size", 24)
    train_here(*options, "--output-dir", tmp_path)
    (record,) = read_history(tmp_path)
    assert record["config"]["recipe"] == "improved" and np.isfinite(record["epoch_metrics"]["val_loss"]).all()


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


def test_a_loss_that_is_not_finite_stops_the_run_within_its_epoch(stars_dir, tmp_path, monkeypatch):
    steps = []

    def loss_sic(align_logits, fuse_logits, *arguments, **options) -> torch.Tensor:
        steps.append(len(fuse_logits))
        return fuse_logits.sum() * (torch.nan if len(steps) == 2 else 1)

    monkeypatch.setattr(classifier, "loss_sic", loss_sic)
    with pytest.raises(DataError, match="^the loss is not finite; try a smaller --learning-rate"):
        train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--batch-size", 4)
    assert 2 <= len(steps) <= 4 and not files_in(tmp_path)


def test_help_is_quick_and_shows_both_recipes():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script("train.py", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 0 and "--recipe {paper,improved}" in done.stdout and "train.py --demo" in done.stdout


# Runs that are stopped, and go on


def train_and_interfere(
    after: str, interfere: Callable[[subprocess.Popen], None], *options: object, state_interval: float = 60
) -> tuple[int, str, str]:
    """Start train.py, and do that to the process once a printed line begins with `after`; exit status and output."""
    arguments = [str(option) for option in options]
    code = f"import sys, train; train.STATE_INTERVAL = {state_interval}; sys.argv = {['train.py', *arguments]}; "
    code += "train.run_as_script(lambda: train.main(train.parse_arguments(train.__doc__)))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    printed = ""
    for line in process.stdout:
        printed += line
        if line.strip().startswith(after):
            interfere(process)
            break
    rest, errors = process.communicate(timeout=300)
    return process.returncode, printed + rest, errors


@pytest.fixture(scope="module")
def whole(stars_dir, tmp_path_factory) -> Path:
    """The output of a run of three epochs that nobody stopped."""
    directory = tmp_path_factory.mktemp("whole")
    train_here("--data-dir", stars_dir, "--output-dir", directory, *SPECTRUM, "--epochs", 3)
    return directory


def assert_same_run(one: Path, other: Path) -> None:
    (first,), (second,) = read_history(one), read_history(other)
    for part in ("epoch_metrics", "final_metrics", "classification_report"):
        assert first[part] == second[part]
    weights, others = (torch.load(checkpoint_of(path), weights_only=True)["weights"] for path in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def test_a_killed_run_is_resumed_as_if_never_stopped(stars_dir, tmp_path, whole):
    """After kill -9: the same history and the same weights, bit for bit."""
    options = ("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 3)
    status, _, _ = train_and_interfere("1/3", subprocess.Popen.kill, *options, state_interval=0)
    assert status == -signal.SIGKILL and not (tmp_path / "training_history.json").exists()
    (state,) = (tmp_path / "checkpoints").glob("last_state_*")
    for leftover in (state.with_name(f".{state.stem}-abc.partial.pth"), tmp_path / ".training_history-a.partial.json"):
        leftover.touch()
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name} moved"))
    train_here("--resume", "auto", "--output-dir", moved)
    assert_same_run(whole, moved)
    left = files_in(moved).keys()
    assert len(left) == 4 and not any("last_state" in name or "partial" in name for name in left), left


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_is_recorded_and_can_go_on(stars_dir, tmp_path, whole, number):
    """Ctrl-C and a scheduler's SIGTERM, also in the first minute, before a state has been written."""
    options = ("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 3)
    status, printed, errors = train_and_interfere("1/3", lambda process: process.send_signal(number), *options)
    assert status == 130 and errors.splitlines()[-1] == "interrupted" and "--resume" in printed
    (record,) = read_history(tmp_path)
    assert record["stopped"] == "interrupted" and 1 <= len(record["epoch_metrics"]["val_f1"]) < 3
    assert (tmp_path / "plots" / f"training_plot_{record['config']['training_id']}.png").exists()
    (state,) = (tmp_path / "checkpoints").glob("last_state_*")
    train_here("--resume", state)
    assert read_history(tmp_path)[0]["stopped"] is None
    assert_same_run(whole, tmp_path)


@pytest.fixture(scope="module")
def stopped(stars_dir, tmp_path_factory) -> Path:
    """The output of a run that Ctrl-C ended in its second epoch."""
    directory, train_one_epoch = tmp_path_factory.mktemp("stopped"), train.train_one_epoch

    def train_or_stop(*arguments) -> float:
        if arguments[2] == 2:
            raise KeyboardInterrupt
        return train_one_epoch(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_one_epoch", train_or_stop)
        train_here("--data-dir", stars_dir, "--output-dir", directory, *SPECTRUM)
    return directory


@pytest.mark.parametrize(
    "options, message",
    [
        (("--epochs", 7), "had another --epochs; go on without that option"),
        (("--seed", 7), "had another --seed"),
        (("--recipe", "improved"), "had another --recipe"),
        (("--mixup", 0.5, "--epochs", 2), "had another --mixup"),
    ],
)
def test_a_run_goes_on_with_its_own_options_alone(stopped, options, message):
    (state,) = (stopped / "checkpoints").glob("last_state_*")
    with pytest.raises(DataError, match=message):
        train_here("--resume", state, *options)


def test_a_run_goes_on_with_its_own_stars_alone(stopped, own_stars_dir, tmp_path):
    (state,) = (stopped / "checkpoints").glob("last_state_*")
    contents = torch.load(state, weights_only=True)
    contents["options"]["data_dir"] = str(own_stars_dir)
    torch.save(contents, tmp_path / "state.pth")
    spectrum_path(own_stars_dir, read_catalog(catalog_path(own_stars_dir))[0][0]).unlink()
    with pytest.raises(DataError, match="its stars are no longer the 60 SIMULATED stars"):
        train_here("--resume", tmp_path / "state.pth")


def test_resume_auto_begins_a_run_where_there_is_none(stars_dir, tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(train, "train", lambda args, *rest: begun.append((args.recipe.num_epochs, rest[-1])))
    train_here("--resume", "auto", "--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 7)
    assert begun == [(7, None)] and "no unfinished run of these options; a new one begins" in capsys.readouterr().out


def test_resume_auto_takes_the_newest_run_of_its_options(stopped, stars_dir, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(train, "train", lambda args, *rest: begun.append((args.random_seed, rest[-1] is None)))
    for seed in (7, 42):
        options = ("--data-dir", stars_dir, "--output-dir", stopped, *SPECTRUM, "--seed", seed)
        train_here("--resume", "auto", *options)
    assert begun == [(7, True), (42, False)]
    assert "not resumed, its run had another --seed\n" in capsys.readouterr().out


def test_another_file_is_not_resumed(finished):
    with pytest.raises(OSError, match="no unfinished run of this version"):
        train_here("--resume", finished.checkpoint)


# Longer


@pytest.mark.slow
def test_demo_makes_its_stars_once_and_keeps_to_its_directory(tmp_path):
    for expected in ("brighter than SDSS's", "its stars are used"):
        done = run_script("train.py", "--demo", *SMALL, "--epochs", 1, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout and "demo/training_history.json" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert [run["config"]["stars"] for run in read_history(tmp_path / "demo")] == ["250 SIMULATED stars"] * 2


@pytest.mark.slow
def test_the_network_learns_from_spectra_alone(stars_dir, tmp_path):
    """Far above guessing (F1 of one class for all: 0.07) in a few epochs."""
    train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 14, "--validation-split", 0.4)
    final = read_history(tmp_path)[0]["final_metrics"]
    assert final["final_val_f1_weighted"] > 0.5 and final["final_val_within_one_subclass"] > 0.8


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
