"""The benchmarks: the classical methods, the statistics of accuracy.py, and the scripts on few stars."""

import json
from dataclasses import asdict, replace

import accuracy
import accuracy_report
import classical
import numpy as np
import pandas as pd
import pytest
import speed
import torch
from common import SHARED_DATA, run_script
from untrained import save_untrained

from cache import read_stars
from checkpoint import load_checkpoint
from cli import DataError
from evaluation import Evaluation
from recipe import IMPROVED, PAPER
from simulate_sdss_data import simulate


def spectra_alone(flux: np.ndarray, ivar: np.ndarray) -> classical.ObservedStars:
    """Stars of unknown magnitudes and classes."""
    return classical.ObservedStars(np.stack([flux, ivar], axis=1), None, None)


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stars") / "stars"
    simulate(directory, per_class=20, seed=3, min_snr=10, max_snr=60)
    stars = classical.observed_stars(directory)
    return stars[np.arange(60)], stars[np.arange(60, 100)]


@pytest.mark.parametrize("method", classical.methods(seed=0))
def test_classical_methods_tell_bright_stars_apart(method, observed):
    training, others = observed
    predictions = classical.methods(seed=0)[method].classify(training, others)
    least = 0.15 if "magnitude" in method else 0.6  # one class for all: about 0.2
    assert predictions.shape == others.targets.shape and np.mean(predictions == others.targets) > least


def test_template_fit_leaves_bad_pixels_out_and_the_amplitude_free():
    templates = 1 + np.random.default_rng(0).random((5, 100))
    flux, ivar = 3 * templates[[4, 2]], np.ones((2, 100))
    flux[:, :60], ivar[:, :60] = templates[0, :60], 0
    fit = classical.TemplateFit(templates).fit(None, None)
    assert fit.predict(np.stack([flux, ivar], axis=1)).tolist() == [4, 2]


def test_spectral_indices_are_finite_where_bands_are_bad():
    flux, ivar = np.ones((2, 3522)), np.ones((2, 3522))
    flux[1], ivar[0] = -1, 0
    assert classical.spectral_indices(spectra_alone(flux, ivar)).tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize("file", classical.TEMPLATES.values())
def test_template_fit_knows_published_templates(file):
    if not (SHARED_DATA / file).exists():
        pytest.skip("published templates are not part of the project")
    templates = classical.class_templates(SHARED_DATA / file)
    spectra = np.stack([templates, np.ones_like(templates)], axis=1)
    assert classical.TemplateFit(templates).fit(None, None).predict(spectra).tolist() == [0, 1, 2, 3, 4]


def test_differences_are_paired_and_their_error_is_that_over_sets():
    index = pd.MultiIndex.from_product([["a", "b"], [0, 1], [0, 1]], names=["set", "draw", "seed"])
    paper = pd.Series(np.linspace(0.5, 0.9, 8), index)  # runs differ much more than rows
    gain = pd.Series([0.01, 0.03, 0.02, 0.02, 0.05, 0.05, 0.06, 0.04], index)
    f1 = pd.DataFrame({"paper": paper, "better": paper + gain, "few": (paper + 0.1).where(index.codes[0] == 0)})
    differences = accuracy_report.paired_differences(f1, "paper")
    np.testing.assert_allclose(differences.loc["better"], [0.035, 0.015])  # 0.02 and 0.05
    assert differences.loc["few", "mean"] == pytest.approx(0.1) and np.isnan(differences.loc["few", "error"])
    assert accuracy_report.summarise(f1).loc["paper", "error"] > 0.1


def test_f1_by_snr_counts_every_star_once(observed):
    _, stars = observed
    perfect = Evaluation(stars.targets, np.eye(5)[stars.targets])
    by_snr = accuracy_report.f1_by_snr(perfect, stars.spectra)
    assert sum(count for count, _ in by_snr) == len(stars.targets)
    assert by_snr[0] == (0, 0.0) and by_snr[-1][0] > 0 and by_snr[-1][1] == 1.0


def test_bad_pixels_do_not_lower_the_signal_to_noise():
    spectra = np.stack([np.ones((1, 3522)), np.full((1, 3522), 100.0)], axis=1)
    spectra[:, 1, :3000] = 0
    assert classical.median_snr(spectra).tolist() == [10]


def rows(*options: str) -> dict:
    return accuracy.choose_rows(accuracy.parse_arguments(["directory", "--rows", "networks", *options]))


def test_an_ablation_changes_one_field():
    chosen = rows("--ablate", "improved")
    assert chosen["paper"] == PAPER and chosen["improved"] == IMPROVED
    assert chosen["improved without smoothing"].smoothing == PAPER.smoothing
    assert chosen["paper with smoothing"] == replace(PAPER, smoothing=IMPROVED.smoothing)


def test_a_pretrained_row_starts_from_its_checkpoint(stars_dir, tmp_path, monkeypatch):
    path = save_untrained(tmp_path / "checkpoint.pth", stars_dir, "spectrum")
    recipe = rows("--pretrained", str(path), "--set", "num_epochs=3")["pre-trained"]
    network = {"modality": "spectrum", "image_backbone": "resnet18", "num_layers": 1}
    assert recipe == replace(PAPER, num_epochs=3, **network)
    given = []
    monkeypatch.setattr(accuracy, "train_best", lambda *arguments: given.append(arguments[2]) or 1 / 0)
    prepared, _ = read_stars(stars_dir, "spectrum", 1)
    with pytest.raises(ZeroDivisionError):  # instead of a training
        accuracy.train_network({"recipe": asdict(recipe), "seed": 0, "pretrained": str(path)}, prepared, prepared)
    expected = load_checkpoint(path)[0].state_dict()
    assert given[0].keys() == expected.keys()
    assert all(torch.equal(expected[name], value) for name, value in given[0].items())


def test_overrides_hold_for_every_network_and_train_none_twice():
    assert list(rows("--set", "modality=spectrum", "image_backbone=resnet18")) == ["paper", "improved"]
    chosen = rows("--set", "num_epochs=3", "image_weights=none")
    assert len(chosen) == len(accuracy.NETWORKS) and {recipe.num_epochs for recipe in chosen.values()} == {3}
    with pytest.raises(SystemExit):
        rows("--set", "smoothing=700")
    with pytest.raises(DataError, match="no row 'random tree'"):
        accuracy.choose_rows(accuracy.parse_arguments(["directory", "--rows", "random tree"]))


@pytest.mark.slow
def test_accuracy_trains_compares_and_goes_on(tmp_path):
    few = ["--sets", "simulated", "kesseli", "--draws", "1", "--seeds", "1", "--per-class", "10", "6", "--workers", "1"]
    small = ["--set", "image_backbone=resnet18", "image_weights=none", "num_layers=1", "num_epochs=2"]
    one = run_script("benchmarks/accuracy.py", tmp_path, *few, *small, "--rows", "paper")
    assert one.returncode == 0, one.stderr
    assert "the set kesseli is skipped" in one.stdout
    chosen = ["paper", "improved, spectra only", "improved, images only", "LDA on 32 band means", "pre-trained"]
    checkpoint = save_untrained(tmp_path / "checkpoint.pth", tmp_path / "stars/simulated-0-train-10", "spectrum")
    options = [*small, "--pretrained", str(checkpoint), "--rows", *chosen]
    more = run_script("benchmarks/accuracy.py", tmp_path, *few, *options)
    assert more.returncode == 0, more.stderr
    assert "5 runs, 4 of them to do" in more.stdout
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(result["row"] for result in results) == sorted(chosen)
    assert {result["recipe"]["num_epochs"] for result in results if result["recipe"]} == {2}
    assert all(0 <= result["last_f1"] <= 1 and result["best_epoch"] in (1, 2) for result in results if result["recipe"])
    table = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    assert all(f"| {row} |" in table for row in chosen) and "SIMULATED" in table and "last epoch" in table
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000 and (tmp_path / "snr.png").stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["stars"]

    with open(tmp_path / "results.jsonl", "a", encoding="utf-8") as file:
        file.write('{"row": "pap')
    damaged = run_script("benchmarks/accuracy.py", tmp_path, *few, *small)
    assert damaged.returncode == 1 and "results.jsonl, line 6: not a result" in damaged.stderr


@pytest.mark.slow
def test_download_speed_keeps_to_its_connections():
    options = ["--stars", "12", "--baseline-stars", "2", "--latency", "0.02", "--workers", "3", "--image-rate", "50"]
    done = run_script("benchmarks/download_speed.py", *options)
    assert done.returncode == 0, done.stderr
    table = {
        row[1].strip(): row[2].strip() for row in (line.split("|") for line in done.stdout.splitlines()) if row[1:]
    }
    assert table["requests"] == "24" and int(table["most connections open"]) <= 3
    assert float(table["cutouts a second"]) <= 55


@pytest.mark.slow
def test_speed_compares_every_step_with_the_plain_one():
    options = ["--image-backbone", "resnet18", "--batch-sizes", "4", "--evaluation-sizes", "4", "--rounds", "1"]
    done = run_script("benchmarks/speed.py", *options, "--candidates")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == [
        *(f"training, {name}" for name in ("plain", "paper", "improved")),
        *(f"training, paper, {name}" for name in ("float32 (TF32)", "bf16 weights", "compiled")),
        *("evaluation, plain", "evaluation, paper"),
    ]


def test_speed_can_time_a_whole_training():
    few = replace(PAPER, image_backbone="resnet18", num_layers=1, num_epochs=1)
    speed.training_seconds(few, stars=25)  # the script does this on a GPU alone
