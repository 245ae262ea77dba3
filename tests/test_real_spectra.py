"""benchmarks/real_spectra.py: its scores, and a run on stars written as LAMOST writes them."""

import csv
import shutil

import numpy as np
import pytest
import real_spectra
from common import SMALL, run_script
from lamost import lamost_file
from real_spectra import COLUMNS, FOLDS, Answers

from catalog import read_catalog
from star_files import catalog_path, spectrum_path
from survey_files import read_spectrum

LABELS = np.repeat(np.arange(5), 4)


def scores(types: np.ndarray) -> dict[str, float]:
    answers = Answers(real_spectra.nearest_class(types), types)
    return dict(zip(COLUMNS, real_spectra.score(LABELS, answers), strict=True))


def test_a_zero_point_is_taken_off():
    found = scores(LABELS + 0.7)
    assert found["offset"] == pytest.approx(0.7) and found["rank correlation"] == pytest.approx(1)
    assert found["exact"] == 0.2 and found["exact, less offset"] == 1  # M4: there is no later class
    assert found["within 1"] == found["within 1, less offset"] == 1


def test_stars_without_an_answer_agree_with_no_label():
    found = scores(np.where(np.arange(20) < 5, np.nan, LABELS))
    assert found["exact"] == found["exact, less offset"] == found["within 1"] == 0.75
    assert found["rank correlation"] == pytest.approx(1)


def test_no_star_is_asked_of_what_was_trained_on_it():
    def ask(training: np.ndarray, others: np.ndarray) -> Answers:
        assert sorted([*training, *others]) == list(range(20))
        assert np.bincount(LABELS[training]).min() >= 3 and len(others) == 20 / FOLDS
        return Answers(LABELS[others], others)

    classes, types = real_spectra.cross_validate(LABELS, ask)
    assert classes.tolist() == LABELS.tolist() and types.tolist() == list(range(20))


def test_without_spectra_it_says_what_it_needs(tmp_path):
    done = run_script("benchmarks/real_spectra.py", tmp_path, "--spectra-dir", tmp_path / "absent")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "must hold real spectra" in done.stderr and "columns file and subclass" in done.stderr


@pytest.mark.slow
def test_every_method_is_scored_on_spectra_of_another_survey(stars_dir, tmp_path, monkeypatch, capsys):
    survey, directory = tmp_path / "survey", tmp_path / "results"
    survey.mkdir()
    rows = []
    for number, star in enumerate(read_catalog(catalog_path(stars_dir))[0]):
        loglam, flux, ivar = read_spectrum(spectrum_path(stars_dir, star), star)[:3]
        content = lamost_file(10 ** (loglam + 3e-5), flux, ivar, table=number % 2 == 1, RA=star.ra, DEC=star.dec)
        (survey / f"{number}.fits").write_bytes(content)
        rows.append((f"{number}.fits", star.subclass))
    (survey / "60.fits").write_bytes(content[:-2880])
    with open(survey / "stars.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "subclass"), *rows, ("60.fits", "M1")])
    shutil.copytree(stars_dir, directory / "stars" / "simulated")
    trained = run_script(
        "train.py", "--data-dir", stars_dir, "--output-dir", tmp_path, "--modality", "spectrum", *SMALL
    )
    assert trained.returncode == 0, trained.stderr
    checkpoints = sorted((tmp_path / "checkpoints").glob("best_model_*.pth"))

    monkeypatch.setattr(real_spectra, "CONTINUE", ("--epochs", "1", "--device", "cpu"))
    monkeypatch.setattr(real_spectra, "BOOTSTRAP_DRAWS", 20)
    arguments = [directory, "--spectra-dir", survey, "--catalog", "stars.csv", "--checkpoints", *checkpoints]
    monkeypatch.setattr("sys.argv", ["real_spectra.py", *map(str, arguments)])
    real_spectra.main()
    printed = capsys.readouterr().out
    assert "left out" in printed and "60.fits: the file is truncated" in printed
    text = (directory / "real_spectra.md").read_text(encoding="utf-8")
    table = {
        cells[1].strip(): cells[2:-1] for cells in (line.split("|") for line in text.splitlines()[:12]) if cells[1:]
    }
    assert [name for name in table if "60 stars" in name] == ["All, 60 stars"]
    assert {len(cells) for cells in table.values()} == {len(COLUMNS)}
    name = checkpoints[0].stem
    assert any(row.startswith(f"{name}, spectrum: 48 of 60 SIMULATED") for row in table)
    assert f"{name}, continued: these stars" in table
    assert float(table["random forest: simulated"][0].split()[0]) > 0.9  # it was trained on these stars
    assert "SVM on colours and r" in text and "All, 400 stars" in text
