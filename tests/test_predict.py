"""predict.py on simulated stars whose labels it does not see."""

import csv
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from common import ROOT, run_script
from untrained import save_untrained

import predict
from cache import read_stars
from catalog import CLASS_NAMES, Star, read_catalog
from checkpoint import load_checkpoint
from cli import DataError, file_lock
from dataset import Batch
from prediction import COLUMNS
from star_files import catalog_path, cutout_path, spectrum_path


@pytest.fixture(scope="module")
def checkpoints(stars_dir, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint for each modality."""
    directory = tmp_path_factory.mktemp("checkpoints")
    modalities = ("fusion", "spectrum", "image")
    return {modality: save_untrained(directory / f"{modality}.pth", stars_dir, modality) for modality in modalities}


@pytest.fixture
def own_dir(stars_dir, tmp_path) -> Path:
    """Ten stars that a test may spoil."""
    stars = read_catalog(catalog_path(stars_dir))[0][:10]
    for star in stars:
        for path_of in (spectrum_path, cutout_path):
            path = path_of(tmp_path / "stars", star)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path_of(stars_dir, star), path)
    write_catalog(tmp_path / "stars", stars)
    return tmp_path / "stars"


def write_catalog(data_dir: Path, stars: list[Star]) -> None:
    with open(catalog_path(data_dir), "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Star._fields, *stars])


def catalog(data_dir: Path) -> list[Star]:
    return read_catalog(catalog_path(data_dir))[0]


def run(checkpoint: Path, data_dir: Path, output: Path, *options: object) -> list[dict[str, str]]:
    """The rows that predict.py writes, in this process: the start of a new one takes longer than the stars."""
    words = (checkpoint, "--data-dir", data_dir, "--output", output, "--num-workers", 1, *options)
    predict.main(predict.parse_arguments([str(word) for word in words]))
    with open(output, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def classified(monkeypatch) -> list[int]:
    """Chunks of four stars; the number of stars in each that is classified from now on."""
    counts, classify = [], predict.classify
    monkeypatch.setattr(predict, "CHUNK", 4)
    monkeypatch.setattr(predict, "classify", lambda *args: counts.append(len(args[2])) or classify(*args))
    return counts


# Predictions


@pytest.mark.parametrize("subclasses", [None, [""] * 5 + ["K7", "sdM3", "?", "M9", "../.."]])
def test_stars_without_label_wherever_their_files_lie(checkpoints, own_dir, tmp_path, subclasses, capsys):
    stars = catalog(own_dir)
    prepared, _ = read_stars(own_dir, "fusion", 1)
    for k, star in enumerate(stars):  # directly in spectra/ and images/, in a folder of any name, or in a wrong class
        for path in (spectrum_path(own_dir, star), cutout_path(own_dir, star)):
            folder = path.parent.parent / ("", "unknown", "M4")[k % 3]
            folder.mkdir(exist_ok=True)
            path.rename(folder / path.name)
    rows = [["name", "plate", "mjd", "fiberID", *["subclass"] * (subclasses is not None)]]
    for k, star in enumerate(stars):
        rows.append([star.name, star.plate, star.mjd, star.fiberID, *(subclasses[k : k + 1] if subclasses else [])])
    catalog_path(own_dir).write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")

    rows = run(checkpoints["fusion"], own_dir, tmp_path / "p.csv")

    assert [row["name"] for row in rows] == [star.name for star in stars]
    classifier, _ = load_checkpoint(checkpoints["fusion"])
    with torch.inference_mode():
        logits = classifier(Batch(prepared.spectra[:], prepared.images[:], prepared.targets))[2]
    for row, probabilities in zip(rows, logits.softmax(dim=1).numpy(), strict=True):
        found = np.array([float(row[f"p_{name}"]) for name in CLASS_NAMES])
        assert found == pytest.approx(probabilities, abs=2e-5)
        assert row["predicted_subclass"] == CLASS_NAMES[found.argmax()]
        assert float(row["expected_subclass"]) == pytest.approx(found @ np.arange(5), abs=2e-3)
        variance = found @ np.arange(5) ** 2 - (found @ np.arange(5)) ** 2
        assert float(row["expected_subclass_std"]) == pytest.approx(variance**0.5, abs=5e-3)
        assert (row["catalog_subclass"], row["problem"], row["simulated"]) == ("", "", "True")
        assert (row["is_outlier"] == "True") == (float(row["outlier_score"]) > 1)
    assert "10 SIMULATED stars, 10 of them classified" in capsys.readouterr().out


def test_labels_of_the_catalogue_and_training_stars_are_named(checkpoints, own_dir, tmp_path, capsys):
    rows = run(checkpoints["spectrum"], own_dir, tmp_path / "p.csv")
    assert [row["catalog_subclass"] for row in rows] == [star.subclass for star in catalog(own_dir)]
    assert "10 of them were used for training or checkpoint selection" in capsys.readouterr().out


def test_a_problem_is_named_in_its_stars_row(checkpoints, own_dir, tmp_path, capsys):
    stars = catalog(own_dir)
    cutout_path(own_dir, stars[0]).unlink()
    spectrum_path(own_dir, stars[1]).unlink()
    damaged = spectrum_path(own_dir, stars[2])
    damaged.write_bytes(damaged.read_bytes()[:9000])
    misplaced = spectrum_path(own_dir, stars[3])
    fits.setval(misplaced, "PLUG_DEC", value=stars[3].dec + 0.1)

    rows = run(checkpoints["fusion"], own_dir, tmp_path / "p.csv")
    assert [row["problem"] for row in rows[:2]] == ["no image", "no spectrum"]
    assert str(damaged) in rows[2]["problem"] and "truncated" in rows[2]["problem"]
    assert rows[3]["problem"] == f"{misplaced}: the catalogue places it 0.1° from where its spectrum was taken"
    for row in rows[:4]:
        assert row["predicted_subclass"] == row["p_M0"] == row["outlier_score"] == row["is_outlier"] == ""
    assert all(row["predicted_subclass"] and not row["problem"] for row in rows[4:])
    printed = capsys.readouterr().out
    assert "6 of them classified" in printed and "not classified: 1 (no spectrum)" in printed

    rows = run(checkpoints["image"], own_dir, tmp_path / "p.csv")  # but a spectrum still says where it was taken
    assert [bool(row["problem"]) for row in rows] == [True, False, False, True, *[False] * 6]
    shutil.rmtree(own_dir / "images")
    rows = run(checkpoints["spectrum"], own_dir, tmp_path / "p.csv")
    assert [bool(row["problem"]) for row in rows] == [False, True, True, True, *[False] * 6]
    with pytest.raises(DataError, match="none of its 10 stars has the files that this network reads, of spectra and i"):
        run(checkpoints["fusion"], own_dir, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


# The table


def test_an_interrupted_run_goes_on_where_it_was(checkpoints, own_dir, tmp_path, classified, monkeypatch, capsys):
    whole = run(checkpoints["fusion"], own_dir, tmp_path / "whole.csv")
    assert classified == [4, 4, 2]
    output, classify = tmp_path / "p.csv", predict.classify

    def interrupted_run() -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            classify_once = iter([classify])
            patch.setattr(predict, "classify", lambda *args: next(classify_once, stop)(*args))
            run(checkpoints["fusion"], own_dir, output)
        classified.clear()

    def stop(*args) -> None:
        raise KeyboardInterrupt

    interrupted_run()
    assert not output.exists()
    assert run(checkpoints["fusion"], own_dir, output) == whole
    assert classified == [4, 2] and "1 of 3 parts" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"stars", "whole.csv", "p.csv"}

    interrupted_run()
    run(checkpoints["spectrum"], own_dir, output)
    assert classified == [4, 4, 2]
    interrupted_run()
    os.utime(cutout_path(own_dir, catalog(own_dir)[0]), (1, 1))
    run(checkpoints["fusion"], own_dir, output)
    assert classified == [4, 4, 2]


def test_worker_processes_give_the_same_rows(checkpoints, own_dir, tmp_path, classified, monkeypatch):
    monkeypatch.setattr(predict, "FEW_STARS", 0)
    rows = run(checkpoints["fusion"], own_dir, tmp_path / "one.csv")
    assert rows == run(checkpoints["fusion"], own_dir, tmp_path / "two.csv", "--num-workers", 2)


TORCHRUN = """
import predict
predict.CHUNK = 4
predict.run_as_script(lambda: predict.main(predict.parse_arguments()))
"""


@pytest.mark.slow
def test_processes_share_the_stars_and_one_writes_the_table(checkpoints, own_dir, tmp_path, classified):
    rows = run(checkpoints["fusion"], own_dir, tmp_path / "p.csv")
    (tmp_path / "script.py").write_text(TORCHRUN)
    torchrun = (
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
    )
    words = (tmp_path / "script.py", checkpoints["fusion"], "--data-dir", own_dir, "--output", tmp_path / "shared.csv")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, (*torchrun, *words))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "shared.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows
    assert done.stdout.count("10 SIMULATED stars, 10 of them classified") == 1
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_cannot_be_written_is_found_before_the_first_star(checkpoints, own_dir, tmp_path, classified):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "p.csv", tmp_path):
        with pytest.raises(OSError, match=r"Not a directory|Is a directory"):
            run(checkpoints["spectrum"], own_dir, output)
    folder = tmp_path / ".p.csv.partial"
    folder.mkdir()
    with (
        file_lock(folder / "lock", timeout=0),
        pytest.raises(DataError, match=r"p\.csv: another predict\.py is writing"),
    ):
        run(checkpoints["spectrum"], own_dir, tmp_path / "p.csv")
    assert not classified


def test_only_an_earlier_output_is_replaced(checkpoints, own_dir, tmp_path):
    output = tmp_path / "p.csv"
    assert run(checkpoints["spectrum"], own_dir, output) != run(checkpoints["image"], own_dir, output)
    assert output.read_text().splitlines()[0] == ",".join(COLUMNS)
    output.write_text("name,notes\nBarnard,mine\n")
    with pytest.raises(DataError, match="this script did not write it"):
        run(checkpoints["spectrum"], own_dir, output)
    assert output.read_text() == "name,notes\nBarnard,mine\n"


# The scripts


def test_errors_are_one_line(own_dir, tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    done = run_script("predict.py", "notes.pth", "--data-dir", own_dir, cwd=tmp_path)
    assert done.returncode == 1 and not list(tmp_path.glob("*predictions*"))
    assert done.stderr.startswith("predict.py: error: notes.pth: damaged, or not a file of PyTorch weights")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", ["predict.py", "show_star.py", "show_history.py"])
def test_help_is_there_at_once_on_any_terminal(script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run_script(script, "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and f"python {script}" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
