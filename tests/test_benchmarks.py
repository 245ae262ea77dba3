"""The benchmarks, as a user starts them, on few stars and small budgets."""

import json

import numpy as np
import pytest
from common import run_script

import data
from simulate_sdss_data import simulate


@pytest.fixture(scope="module")
def stars_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stars") / "data"
    simulate(directory, per_class=14, seed=3)
    return directory


def test_accuracy_scores_networks_and_classical_methods_on_the_same_stars(stars_dir, tmp_path):
    methods = ["LDA on 32 band means", "χ² fit to class means", "random forest on image colours"]
    networks = ["spectra only", "without averaged weights", "without position embeddings", "Adam at a constant 1e-4"]
    options = ["--data-dir", stars_dir, "--test-split", "0.25", "--seeds", "1", "--epochs", "1"]
    options += ["--modality", "spectrum", "--output-dir", tmp_path]
    done = run_script("benchmarks/accuracy.py", *options, "--methods", *methods, *networks)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))
    scores = {run["method"]: run["test"]["accuracy"] for run in results["runs"]}
    assert list(scores) == methods + networks
    assert scores["LDA on 32 band means"] > 0.5 and scores["χ² fit to class means"] > 0.5
    numbers = {"train": 38, "validation": 14, "test": 18}
    assert results["parts"] == {part: f"{number} SIMULATED stars" for part, number in numbers.items()}
    table = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    assert all(f"| {method} |" in table for method in scores) and "SIMULATED" in table
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000

    again = run_script("benchmarks/accuracy.py", *options, "--methods", *methods[:1], "--seeds", "1", "2")
    assert again.returncode == 0, again.stderr
    runs = json.loads((tmp_path / "accuracy.json").read_text(encoding="utf-8"))["runs"]
    assert runs[:-1] == results["runs"] and (runs[-1]["method"], runs[-1]["seed"]) == (methods[0], 2)

    other = run_script("benchmarks/accuracy.py", *options[:-2], "--epochs", "2", "--output-dir", tmp_path)
    assert other.returncode == 1 and "of another experiment" in other.stderr.splitlines()[-1]


def test_data_speed_has_each_figure_beside_its_yardstick(tmp_path):
    options = ["--stars", "200", "--cached", "100", "--many", "200", "--steps", "2", "--image-backbone", "resnet18"]
    done = run_script("benchmarks/data_speed.py", *options, "--work-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    table = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert len(table) == 8
    ratios = [float(row[3].strip("×| ")) for row in table if "×" in row[3]]
    assert len(ratios) == 4 and min(ratios) > 1
    assert not list(tmp_path.iterdir())


def test_download_speed_keeps_to_its_connections(tmp_path):
    options = ["--stars", "12", "--yardstick-stars", "2", "--latency", "0.02", "--workers", "3", "--image-rate", "50"]
    done = run_script("benchmarks/download_speed.py", *options)
    assert done.returncode == 0, done.stderr
    table = {row[1]: row[2:] for row in (line.split("|") for line in done.stdout.splitlines()) if len(row) > 2}
    assert table[" requests "][0].strip() == "24" and int(table[" most connections open "][0]) <= 3
    assert float(table[" cutouts asked for, a second "][0]) <= 55


def test_accuracy_asks_which_stars_to_score_on(stars_dir):
    done = run_script("benchmarks/accuracy.py", "--data-dir", stars_dir)
    assert done.returncode == 2 and "--test-dir DIR or --test-split FRACTION" in done.stderr


def test_template_stars_follow_the_templates(tmp_path):
    """Templates of a known band: its depth in the stars' spectra is that of their subclass."""
    loglam = np.arange(35_500, 39_701) / data.PIXELS_PER_DEX
    in_band = np.abs(10**loglam - 7100) < 60
    templates = {"loglam": loglam}
    for subclass in range(6):
        for metallicity in ("-0.5", "+0.0", "+0.5"):
            flux = np.where(in_band, 1 - 0.15 * subclass, 1.0)
            flux[:123] = np.nan  # as the real ones, where no star has flux
            templates[f"M{subclass}_{metallicity}_flux"] = flux
    del templates["M4_-0.5_flux"]  # which is not among the real ones
    np.savez(tmp_path / "templates.npz", **templates)

    options = ["--per-class", 12, "--min-snr", 50, "--max-snr", 60, "--quiet"]
    done = run_script("benchmarks/template_stars.py", tmp_path / "templates.npz", tmp_path / "stars", *options)
    assert done.returncode == 0, done.stderr
    stars, _ = data.read_catalog(data.catalog_path(tmp_path / "stars"))
    assert len(stars) == 60 and all(star.simulated for star in stars)
    wavelength = 10 ** ((data.FIRST_PIXEL + np.arange(data.SPECTRUM_LENGTH)) / data.PIXELS_PER_DEX)
    band, beside = np.abs(wavelength - 7100) < 50, (np.abs(wavelength - 7100) > 70) & (np.abs(wavelength - 7100) < 120)
    for star in stars:
        spectrum = data.load_spectrum(tmp_path / "stars", star)
        depth = 1 - spectrum[band].mean() / spectrum[beside].mean()
        assert abs(depth / 0.15 - int(star.subclass[1])) < 0.6, star


def test_template_stars_names_what_a_file_of_templates_lacks(tmp_path):
    np.savez(tmp_path / "templates.npz", loglam=np.arange(3))
    done = run_script("benchmarks/template_stars.py", tmp_path / "templates.npz", tmp_path / "stars")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "templates.npz: no M0_-0.5_flux" in done.stderr and not (tmp_path / "stars").exists()
