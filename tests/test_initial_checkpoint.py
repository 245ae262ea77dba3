"""train.py --initial-checkpoint: a run begins with a checkpoint's weights.

python -m pytest -m slow tests/test_initial_checkpoint.py       it learns another zero point
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from training import SPECTRUM, checkpoint_of, fail_in_epoch, read_history, train_here

import train
from cache import read_stars
from catalog import CLASS_NAMES
from checkpoint import load_checkpoint
from classifier import Classifier
from cli import DataError
from preparation import Batch
from star_files import catalog_path


@pytest.fixture(scope="module")
def initial(stars_dir, tmp_path_factory) -> Path:
    """The checkpoint of a run of three epochs."""
    directory = tmp_path_factory.mktemp("initial")
    train_here("--data-dir", stars_dir, "--output-dir", directory, *SPECTRUM, "--epochs", 3)
    return checkpoint_of(directory)


@pytest.fixture(scope="module")
def shifted_dir(stars_dir, tmp_path_factory) -> Path:
    """The stars labelled one subclass later: M1 to M3, and a single M4."""
    directory = tmp_path_factory.mktemp("shifted")
    shutil.copytree(stars_dir / "spectra", directory / "spectra")
    catalog = pd.read_csv(catalog_path(stars_dir), dtype=str)
    last = catalog.index[catalog.subclass == "M3"][1:]
    catalog = catalog[catalog.subclass != "M4"].drop(index=last)
    catalog["subclass"] = catalog["subclass"].map(dict(zip(CLASS_NAMES, CLASS_NAMES[1:], strict=False)))
    catalog.to_csv(catalog_path(directory), index=False)
    return directory


def test_a_run_begins_with_the_weights_and_the_recipe_of_a_checkpoint(
    initial, stars_dir, shifted_dir, tmp_path, monkeypatch, capsys
):
    """Before its first step it answers as the checkpoint does. Classes without stars are allowed."""
    begun, fit, prepared = [], train.fit, read_stars(stars_dir, "spectrum", 1)[0]
    batch = Batch(prepared.spectra[:], None, prepared.targets)

    def logits(classifier: Classifier) -> torch.Tensor:
        with torch.inference_mode():
            return classifier.eval()(batch)[2]

    def fit_after_a_look(trainer, *arguments) -> None:
        begun.append(logits(trainer.classifier))
        fit(trainer, *arguments)

    monkeypatch.setattr(train, "fit", fit_after_a_look)
    before, contents = load_checkpoint(initial)
    options = ("--data-dir", shifted_dir, "--output-dir", tmp_path, "--initial-checkpoint", initial)
    train_here(*options, "--epochs", 1, "--learning-rate", 1e-5, "--precision", "fp32", "--device", "cpu")
    assert torch.equal(begun[0], logits(before))
    after, _ = load_checkpoint(checkpoint_of(tmp_path))
    assert after.recipe == replace(before.recipe, num_epochs=1, learning_rate=1e-5)
    assert torch.equal(after.standardise.mean, before.standardise.mean) and not torch.equal(logits(after), begun[0])
    (record,) = read_history(tmp_path)
    config, printed = record["config"], capsys.readouterr().out
    assert config["initial_checkpoint"] == str(initial) and config["recipe"] == "paper"
    assert "no M0" in printed and "note: 37 of these stars were used for training" in printed
    assert contents["config"]["initial_checkpoint"] is None


@pytest.mark.parametrize(
    "options, message",
    [
        (("--layers", 2), "its num_layers is 1; go on without --layers"),
        (("--modality", "fusion"), "its modality is spectrum; go on without --modality"),
        (("--image-backbone", "resnet34"), "its image_backbone is resnet18; go on without --image-backbone"),
        (("--image-weights", "imagenet"), "its image_weights is none; go on without --image-weights"),
        (("--smoothing", 3), "its smoothing is 0.0; go on without --smoothing"),
        (("--continuum-degree", 3), "its continuum_degree is -1; go on without --continuum-degree"),
    ],
)
def test_the_weights_of_a_checkpoint_fix_its_network_and_preparation(initial, stars_dir, tmp_path, options, message):
    with pytest.raises(DataError, match=f"best_model_.*: {message}"):
        train_here("--data-dir", stars_dir, "--initial-checkpoint", initial, *options)


def test_such_a_run_is_resumed_without_the_checkpoint(initial, shifted_dir, tmp_path, monkeypatch):
    copied = shutil.copy(initial, tmp_path)
    options = ("--data-dir", shifted_dir, "--initial-checkpoint", copied, "--epochs", 2, "--device", "cpu")
    train_here(*options, "--output-dir", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        fail_in_epoch(patch, 2, KeyboardInterrupt())
        train_here(*options, "--output-dir", tmp_path / "resumed")
    Path(copied).unlink()
    train_here("--resume", "auto", "--output-dir", tmp_path / "resumed")
    (whole,), (resumed,) = (read_history(tmp_path / name) for name in ("whole", "resumed"))
    assert whole["final_metrics"] == resumed["final_metrics"] and resumed["config"]["initial_checkpoint"] == copied


@pytest.mark.slow
def test_a_checkpoint_learns_another_zero_point_sooner_than_random_weights_learn_any(stars_dir, shifted_dir, tmp_path):
    options = (*SPECTRUM, "--validation-split", 0.4)
    train_here("--data-dir", stars_dir, "--output-dir", tmp_path, *options, "--epochs", 14)
    initial, scores = ("--initial-checkpoint", checkpoint_of(tmp_path)), []
    for name, directory, start in (("continued", shifted_dir, initial), ("scratch", stars_dir, ())):
        train_here("--data-dir", directory, "--output-dir", tmp_path / name, *options, *start, "--epochs", 5)
        scores.append(read_history(tmp_path / name)[0]["final_metrics"]["final_val_f1_weighted"])
    assert scores[0] > scores[1] + 0.1 and scores[0] > 0.6
