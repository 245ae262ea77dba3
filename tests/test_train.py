"""train.py on simulated stars, with a small ResNet and one layer of the Transformer.

python -m pytest -m slow tests/test_train.py       the demo, a longer run
"""

import math
import resource
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SMALL, random_stars, run_script
from PIL import Image
from training import (
    SPECTRUM,
    checkpoint_of,
    evaluation_of,
    fail_in_epoch,
    files_in,
    read_history,
    train_and_interfere,
    train_here,
)

import history
import train
from catalog import read_catalog
from cli import DataError
from evaluation import Evaluation
from preparation import Standardisation
from recipe import PAPER
from simulate_sdss_data import simulate
from star_files import catalog_path, spectrum_path
from train_options import parse_arguments

PER_CLASS = 12


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
    assert record["epoch_metrics"].keys() > names
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


def test_the_record_has_both_terms_of_the_loss_the_rate_the_calibration_and_the_last_epoch(finished):
    (record,) = read_history(finished.directory)
    curves, final = record["epoch_metrics"], record["final_metrics"]
    for part in ("train", "val"):
        terms = zip(curves[f"{part}_classification_loss"], curves[f"{part}_contrastive_loss"], strict=True)
        assert curves[f"{part}_loss"] == pytest.approx([sum(both) for both in terms])
    assert all(0 <= fraction <= 1 for fraction in curves["val_retrieval_accuracy"])
    assert curves["learning_rate"] == pytest.approx([0.5e-4, 0.5e-4 * (1 + math.cos(math.pi / 4))])
    assert sum(curves["seconds"]) == pytest.approx(record["total_training_time_seconds"], abs=0.2)
    assert final["last_epoch"] == 2 and final["last_val_f1"] == curves["val_f1"][1]
    weights = torch.load(finished.checkpoint, weights_only=True)["weights"]
    assert final["calibration_temperature"] == weights["calibration_temperature"].item() != 1
    for part in ("val", "test"):
        assert 0 <= final[f"final_{part}_calibration_error"] <= 1 and len(final[f"final_{part}_confusion_matrix"]) == 5


def test_the_terminal_shows_stars_epochs_scores_and_files(finished):
    lines = finished.printed.stdout.splitlines()
    assert any(line.split() == ["M0", str(PER_CLASS), str(PER_CLASS)] for line in lines)
    assert sum("val loss" in line and "F1" in line for line in lines) == 2
    assert "SIMULATED" in finished.printed.stdout and "weighted avg" in finished.printed.stdout
    files = [Path(line.strip()) for line in lines[lines.index(next(x for x in lines if "Open these" in x)) + 1 :]]
    assert len(files) == 6 and all(file.is_file() and file.is_relative_to(finished.directory) for file in files)
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
        return evaluation_of(*next(outcomes, (8, 1.0)))

    def save(path: Path, *arguments, **contents) -> None:
        written.append(contents["epoch"])
        save_checkpoint(path, *arguments, **contents)

    monkeypatch.setattr(train, "train_one_epoch", lambda *arguments: [1.0, 0.0])
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


def test_patience_ends_a_run_that_gets_no_better(stars_dir, tmp_path, monkeypatch, capsys):
    """Also one that is interrupted, and resumed."""
    outcomes = {1: (5, 2.0), 2: (8, 2.0), 3: (7, 1.0), 4: (8, 2.0)}  # stars classified right, loss
    begun = []

    def train_one_epoch(*arguments) -> list[float]:
        begun.append(arguments[2])
        if begun == [1, 2, 3]:
            raise KeyboardInterrupt
        return [1.0, 0.0]

    monkeypatch.setattr(train, "train_one_epoch", train_one_epoch)
    monkeypatch.setattr(train, "evaluate", lambda *arguments: evaluation_of(*outcomes[begun[-1]]))
    monkeypatch.setattr(train, "finish", lambda *arguments: None)
    options = ("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 8, "--patience", 2)
    with pytest.raises(KeyboardInterrupt):
        train_here(*options)
    train_here("--resume", "auto", "--output-dir", tmp_path)
    assert begun == [1, 2, 3, 3, 4] and "stopped: no better epoch since 2" in capsys.readouterr().out


def test_tensorboard_gets_the_curves(stars_dir, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--tensorboard")
    (record,) = read_history(tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard" / record["config"]["training_id"])).Reload()
    assert set(events.Tags()["scalars"]) == record["epoch_metrics"].keys()
    for name, curve in record["epoch_metrics"].items():
        points = events.Scalars(name)
        assert [point.step for point in points] == [1, 2]
        assert [point.value for point in points] == pytest.approx(curve, rel=1e-6)


def test_tensorboard_that_is_not_installed_is_named_before_the_run(stars_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="TensorBoard is not installed; pip install tensorboard"):
        train_here("--data-dir", stars_dir, "--output-dir", tmp_path / "out", *SPECTRUM, "--tensorboard")
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_shows_both_recipes():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script("train.py", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert done.returncode == 0 and "--recipe {paper,improved}" in done.stdout and "train.py --demo" in done.stdout


# Runs that are stopped, and go on


@pytest.fixture(scope="module")
def whole(stars_dir, tmp_path_factory) -> Path:
    """The output of a run of three epochs that nobody stopped."""
    directory = tmp_path_factory.mktemp("whole")
    train_here("--data-dir", stars_dir, "--output-dir", directory, *SPECTRUM, "--epochs", 3)
    return directory


def assert_same_run(one: Path, other: Path) -> None:
    (first,), (second,) = read_history(one), read_history(other)
    for record in (first, second):
        del record["epoch_metrics"]["seconds"]
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
    assert len(left) == 5 and not any("last_state" in name or "partial" in name for name in left), left


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
    directory = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_in_epoch(patch, 2, KeyboardInterrupt())
        train_here("--data-dir", stars_dir, "--output-dir", directory, *SPECTRUM)
    return directory


@pytest.mark.parametrize(
    "options, message",
    [
        (("--epochs", 7), "had another --epochs; go on without that option"),
        (("--seed", 7), "had another --seed"),
        (("--recipe", "improved"), "had another --recipe"),
        (("--smoothing", 3, "--epochs", 2), "had another --smoothing"),
    ],
)
def test_a_run_goes_on_with_its_own_options_alone(stopped, options, message):
    (state,) = (stopped / "checkpoints").glob("last_state_*")
    with pytest.raises(DataError, match=message):
        train_here("--resume", state, *options)


def test_a_run_goes_on_with_its_own_stars_alone(stopped, own_stars_dir, monkeypatch, capsys):
    """Wherever these are now."""
    begun, moved = [], ("--data-dir", own_stars_dir)
    (state,) = (stopped / "checkpoints").glob("last_state_*")
    monkeypatch.setattr(train, "train", lambda args, *rest: begun.append((args.data_dir, rest[2] and rest[2].options)))
    train_here("--resume", state, *moved)
    train_here("--resume", "auto", *moved, "--output-dir", stopped, *SPECTRUM)
    (data_dir, options), (_, other) = begun
    assert data_dir == own_stars_dir and options["data_dir"] == str(own_stars_dir)
    assert other is None and "not resumed, its run had another --data-dir\n" in capsys.readouterr().out
    spectrum_path(own_stars_dir, read_catalog(catalog_path(own_stars_dir))[0][0]).unlink()
    with pytest.raises(DataError, match="its stars are no longer the 60 SIMULATED stars"):
        train_here("--resume", state, *moved)


def test_a_resumed_run_writes_beside_its_checkpoints(stopped, tmp_path, monkeypatch):
    """However its file is named, also if checkpoints/ is a link to another disk."""
    begun, checkpoints = [], stopped / "checkpoints"
    (state,) = checkpoints.glob("last_state_*")
    (tmp_path / "checkpoints").symlink_to(checkpoints)
    (checkpoints / "below").mkdir()
    monkeypatch.setattr(train, "train", lambda args, *rest: begun.append(args.output_dir))
    for cwd, path in ((checkpoints, ""), (checkpoints / "below", ".."), (tmp_path, "checkpoints")):
        monkeypatch.chdir(cwd)
        train_here("--resume", Path(path, state.name))
    assert begun == [stopped, stopped, tmp_path]


def test_resume_auto_begins_a_run_where_there_is_none(stars_dir, tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(train, "train", lambda args, *rest: begun.append((args.recipe.num_epochs, rest[2])))
    train_here("--resume", "auto", "--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--epochs", 7)
    assert begun == [(7, None)] and "no unfinished run of these options; a new one begins" in capsys.readouterr().out


def test_resume_auto_takes_the_newest_run_of_its_options(stopped, stars_dir, tmp_path, monkeypatch, capsys):
    (state,) = (stopped / "checkpoints").glob("last_state_*")
    (tmp_path / "checkpoints").mkdir()
    for year in (2001, 2003, 2002):
        contents = torch.load(state, weights_only=True)
        contents["record"]["config"]["training_id"] = f"{year}0101_000000"
        contents["options"]["random_seed"] = 7 if year == 2003 else 42
        torch.save(contents, tmp_path / "checkpoints" / history.STATE_FILES.format(f"{year}0101_000000"))
    begun = []
    monkeypatch.setattr(train, "train", lambda args, *rest: begun.append(rest[2]))
    for seed in (7, 42, 1):
        options = ("--data-dir", stars_dir, "--output-dir", tmp_path, *SPECTRUM, "--seed", seed)
        train_here("--resume", "auto", *options)
    assert [run and run.record["config"]["training_id"][:4] for run in begun] == ["2003", "2002", None]
    assert "not resumed, its run had another --seed\n" in capsys.readouterr().out


def test_another_file_is_not_resumed(finished):
    with pytest.raises(
        OSError, match="no unfinished run of this version .*; move it away, or name another with --resume FILE"
    ):
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
