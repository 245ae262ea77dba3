"""predict.py on simulated stars whose labels it does not see, and on real spectra where they are at hand."""

import csv
import gzip
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
from astropy.table import QTable
from common import ROOT, SHARED_DATA, run_script, stars_of, write_catalog
from untrained import save_untrained

import predict
from cache import read_stars
from catalog import CLASS_NAMES, Star
from checkpoint import load_checkpoint
from cli import DataError, file_lock
from dataset import Batch
from indices import measure_indices
from outliers import outlier_score
from star_files import catalog_path, cutout_path, spectrum_path
from tables import COLUMNS


@pytest.fixture(scope="module")
def checkpoints(stars_dir, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint for each modality."""
    directory = tmp_path_factory.mktemp("checkpoints")
    modalities = ("fusion", "spectrum", "image")
    return {modality: save_untrained(directory / f"{modality}.pth", stars_dir, modality) for modality in modalities}


@pytest.fixture
def own_dir(stars_dir, tmp_path) -> Path:
    """Ten stars that a test may spoil."""
    stars = stars_of(stars_dir)[:10]
    for star in stars:
        for path_of in (spectrum_path, cutout_path):
            path = path_of(tmp_path / "stars", star)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path_of(stars_dir, star), path)
    write_catalog(tmp_path / "stars", stars)
    return tmp_path / "stars"


def run(checkpoint: Path, data_dir: Path, output: Path, *options: object) -> list[dict[str, str]]:
    """The rows that predict.py writes for a catalogue's stars."""
    return run_with(checkpoint, output, "--data-dir", data_dir, *options)


def run_with(checkpoint: Path, output: Path, *words: object) -> list[dict[str, str]]:
    """The same of any words; in this process: the start of a new one takes longer than the stars."""
    words = (checkpoint, "--output", output, "--num-workers", 1, *words)
    predict.main(predict.parse_arguments([str(word) for word in words]))
    with open(output, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_temperature(checkpoint: Path, path: Path, temperature: float) -> Path:
    """A copy of the checkpoint, calibrated to another temperature."""
    contents = torch.load(checkpoint, weights_only=True)
    contents["weights"]["calibration_temperature"].fill_(temperature)
    torch.save(contents, path)
    return path


@pytest.fixture
def classified(monkeypatch) -> list[int]:
    """Chunks of four stars; the number of stars in each that is classified from now on."""
    counts, classify = [], predict.classify
    monkeypatch.setattr(predict, "STARS_PER_PART", 4)
    monkeypatch.setattr(predict, "classify", lambda *args: counts.append(len(args[2])) or classify(*args))
    return counts


# Predictions


def test_a_type_is_given_no_surer_than_a_tenth(checkpoints, own_dir, tmp_path):
    rows = run(with_temperature(checkpoints["fusion"], tmp_path / "a.pth", 1e-4), own_dir, tmp_path / "p.csv")
    assert all(row["spectral_type"].endswith("± 0.1") for row in rows)
    assert max(float(row["expected_subclass_std"]) for row in rows) < 0.05


@pytest.mark.parametrize("subclasses", [None, [""] * 5 + ["K7", "sdM3", "?", "M9", "../.."]])
def test_stars_without_label_wherever_their_files_lie(checkpoints, own_dir, tmp_path, subclasses, capsys):
    stars = stars_of(own_dir)
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

    checkpoint = with_temperature(checkpoints["fusion"], tmp_path / "a.pth", 2.0)
    rows = run(checkpoint, own_dir, tmp_path / "p.csv")

    assert [row["name"] for row in rows] == [star.name for star in stars]
    classifier, _ = load_checkpoint(checkpoint)
    with torch.inference_mode():
        logits = classifier(Batch(prepared.spectra[:], prepared.images[:], prepared.targets))[2]
    # The catalogue's label as it is; where it has none, that in the spectrum's file.
    labels = [label or star.subclass for label, star in zip(subclasses or [""] * 10, stars, strict=True)]
    assert [row["catalog_subclass"] for row in rows] == labels
    for row, probabilities in zip(rows, (logits / 2).softmax(dim=1).numpy(), strict=True):
        found = np.array([float(row[f"p_{name}"]) for name in CLASS_NAMES])
        assert found == pytest.approx(probabilities, abs=2e-5)
        assert row["predicted_subclass"] == CLASS_NAMES[found.argmax()]
        assert float(row["expected_subclass"]) == pytest.approx(found @ np.arange(5), abs=2e-3)
        variance = found @ np.arange(5) ** 2 - (found @ np.arange(5)) ** 2
        assert float(row["expected_subclass_std"]) == pytest.approx(variance**0.5, abs=5e-3)
        assert row["spectral_type"] == f"M{float(row['expected_subclass']):.1f} ± {variance**0.5:.1f}"
        assert (row["problem"], row["simulated"]) == ("", "True")
        assert (row["is_outlier"] == "True") == (float(row["outlier_score"]) > 1)
    assert "10 SIMULATED stars, 10 of them classified" in capsys.readouterr().out


@pytest.mark.parametrize("modality", ["spectrum", "image"])
def test_indices_of_the_spectrum_stand_beside_every_prediction(checkpoints, own_dir, tmp_path, modality):
    stars, (prepared, _) = stars_of(own_dir), read_stars(own_dir, "spectrum", 1)
    spectrum_path(own_dir, stars[-1]).unlink()  # a network of images classifies this star, without indices
    rows = run(checkpoints[modality], own_dir, tmp_path / "p.csv")
    for star, spectrum, row in zip(stars[:-1], prepared.spectra[:], rows, strict=False):
        with fits.open(spectrum_path(own_dir, star)) as hdus:
            expected = measure_indices(spectrum.numpy(), float(hdus[2].data["Z"][0]))
        for name in ("TiO5", "TiO5_err", "CaH2", "CaH3", "zeta", "EW_Halpha", "EW_Halpha_err"):
            assert float(row[name] or "nan") == pytest.approx(expected[name], abs=1e-4, nan_ok=True), name
        assert row["metallicity_class"] == expected["metallicity_class"]
        assert row["is_active"] == ("" if expected["is_active"] is None else str(expected["is_active"]))
        assert float(row["ra"]) == pytest.approx(star.ra, abs=1e-6) and row["predicted_subclass"]
    assert rows[-1]["TiO5"] == rows[-1]["is_active"] == "" and bool(rows[-1]["problem"]) == (modality == "spectrum")


def test_labels_of_the_catalogue_and_training_stars_are_named(checkpoints, own_dir, tmp_path, capsys):
    rows = run(checkpoints["spectrum"], own_dir, tmp_path / "p.csv")
    assert [row["catalog_subclass"] for row in rows] == [star.subclass for star in stars_of(own_dir)]
    assert "10 of these stars were used for training or checkpoint selection" in capsys.readouterr().out


def test_a_problem_is_named_in_its_stars_row(checkpoints, own_dir, tmp_path, capsys):
    stars = stars_of(own_dir)
    cutout_path(own_dir, stars[0]).unlink()
    spectrum_path(own_dir, stars[1]).unlink()
    damaged = spectrum_path(own_dir, stars[2])
    damaged.write_bytes(damaged.read_bytes()[:9000])
    misplaced = spectrum_path(own_dir, stars[3])
    fits.setval(misplaced, "PLUG_DEC", value=stars[3].dec + 0.2)

    rows = run(checkpoints["fusion"], own_dir, tmp_path / "p.csv")
    assert [row["problem"] for row in rows[:2]] == ["no image", "no spectrum"]
    assert str(damaged) in rows[2]["problem"] and "truncated" in rows[2]["problem"]
    assert rows[3]["problem"] == f"{misplaced}: the catalogue places it 0.2° from where its spectrum was taken"
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
    with pytest.raises(
        DataError, match="none of its 10 stars has spectra and images, which this network reads; .* FILE"
    ):
        run(checkpoints["fusion"], own_dir, tmp_path / "none.csv")
    assert not (tmp_path / "none.csv").exists()


def test_one_name_on_two_places_is_refused_where_only_the_spectra_tell(checkpoints, own_dir, tmp_path):
    stars = [star._replace(name="a" * (k < 2) or star.name) for k, star in enumerate(stars_of(own_dir))]
    write_catalog(own_dir, [star._replace(ra="", dec="") for star in stars])
    message = f"{stars[0].spectrum_id} and {stars[1].spectrum_id} are both named a, but lie "
    with pytest.raises(DataError, match=message):
        run(checkpoints["spectrum"], own_dir, tmp_path / "p.csv")
    assert not (tmp_path / "p.csv").exists()


# Files without a catalogue


def test_spectra_need_no_catalogue(checkpoints, own_dir, tmp_path, classified, capsys):
    stars = stars_of(own_dir)[:3]
    listed = run(checkpoints["spectrum"], own_dir, tmp_path / "p.csv")
    zipped, text = tmp_path / "a.FITS.gz", tmp_path / "é.fit"
    zipped.write_bytes(gzip.compress(spectrum_path(own_dir, stars[2]).read_bytes()))
    text.write_text("wavelength flux\n")
    files = [*(spectrum_path(own_dir, star) for star in stars[:2]), zipped, text, cutout_path(own_dir, stars[0])]
    capsys.readouterr()
    rows = run_with(checkpoints["spectrum"], tmp_path / "p.csv", *files, files[0])  # a file given twice has one row

    assert [row["name"] for row in rows] == [files[0].stem, files[1].stem, "a", "é", files[4].name]
    identity = ("name", "plate", "mjd", "fiberID", "catalog_subclass")
    for star, row, expected in zip(stars, rows[:3], listed, strict=False):
        numbers = ["", "", ""] if row["name"] == "a" else [str(number) for number in star[2:5]]  # of SDSS's name
        assert [row[name] for name in identity[1:]] == [*numbers, star.subclass]  # the class in the file
        assert {name: row[name] for name in COLUMNS if name not in identity} == {
            name: expected[name] for name in COLUMNS if name not in identity
        }
    for row, path in zip(rows[3:], files[3:], strict=True):
        assert f"{path}: not a FITS file" in row["problem"] and row["predicted_subclass"] == row["simulated"] * 0
    printed = capsys.readouterr().out
    assert "5 stars, 3 of them SIMULATED, 3 of them classified" in printed and "3 of these stars were used" in printed
    assert classified[-2:] == [4, 1]

    with pytest.raises(DataError, match="none of its stars could be classified"):
        run_with(checkpoints["spectrum"], tmp_path / "none.csv", text)
    assert "not a FITS file" in (tmp_path / "none.csv").read_text() and not list(tmp_path.glob(".*"))
    for path, message in ((tmp_path / "absent.fits", "absent.fits: no such file"), (tmp_path, "a directory; name its")):
        with pytest.raises(DataError, match=message):
            run_with(checkpoints["spectrum"], tmp_path / "p.csv", path)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(SystemExit):
        run_with(checkpoints["spectrum"], tmp_path / "p.csv", text, "--data-dir", own_dir)
    assert "FILEs or --data-dir" in capsys.readouterr().err


def test_a_network_of_both_inputs_sees_no_image_of_a_file(checkpoints, own_dir, tmp_path, capsys):
    prepared, _ = read_stars(own_dir, "fusion", 1)
    files = [spectrum_path(own_dir, star) for star in prepared.stars]
    rows = run_with(checkpoints["fusion"], tmp_path / "p.csv", *files)
    assert "warning: this network was trained with images, and gets none" in capsys.readouterr().out
    classifier, checkpoint = load_checkpoint(checkpoints["fusion"])

    def hide(encoder, inputs, outputs):
        return outputs[0], torch.zeros_like(outputs[1])

    classifier.network.image_encoder.register_forward_hook(hide)
    with torch.inference_mode():
        logits = classifier(Batch(prepared.spectra[:], prepared.images[:], prepared.targets))[2]
    found = [[float(row[f"p_{name}"]) for name in CLASS_NAMES] for row in rows]
    np.testing.assert_allclose(found, logits.softmax(dim=1), atol=2e-5)
    scores = outlier_score("spectra", prepared.spectra[:], checkpoint["references"]["spectra"])
    np.testing.assert_allclose([float(row["outlier_score"]) for row in rows], scores, atol=1e-3)

    with pytest.raises(DataError, match="this network classifies images"):
        run_with(checkpoints["image"], tmp_path / "none.csv", *files)


@pytest.mark.skipif(not (SHARED_DATA / "lamost").exists(), reason=f"no real spectra in {SHARED_DATA}")
def test_real_spectra_of_every_format(checkpoints, tmp_path):
    files = sorted([*SHARED_DATA.glob("lamost/*.fits"), *SHARED_DATA.glob("spec-*.fits"), *SHARED_DATA.glob("*/*.fit")])
    rows = run_with(checkpoints["spectrum"], tmp_path / "p.csv", *files)
    assert len(rows) >= 63 and not any(row["problem"] for row in rows)
    with open(SHARED_DATA / "lamost" / "lamost_m_stars.csv", newline="") as file:
        labels = {row["file"].removesuffix(".fits"): row for row in csv.DictReader(file)}
    found = {row["name"]: row for row in rows}
    assert {name: found[name]["catalog_subclass"] for name in labels} == {
        name: label["subclass"] for name, label in labels.items()
    }
    for name, label in labels.items():
        assert float(found[name]["dec"]) == pytest.approx(float(label["dec"]), abs=1e-3)
    bands = [float(found[name]["TiO5"]) for name in labels if found[name]["TiO5"]]  # two have bad pixels there
    assert len(bands) == len(labels) - 2 and 0.2 < min(bands) < max(bands) < 1


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
    os.utime(cutout_path(own_dir, stars_of(own_dir)[0]), (1, 1))
    run(checkpoints["fusion"], own_dir, output)
    assert classified == [4, 4, 2]


def test_worker_processes_give_the_same_rows(checkpoints, own_dir, tmp_path, classified, monkeypatch):
    monkeypatch.setattr(predict, "FEW_STARS", 0)
    rows = run(checkpoints["fusion"], own_dir, tmp_path / "one.csv")
    assert rows == run(checkpoints["fusion"], own_dir, tmp_path / "two.csv", "--num-workers", 2)


TORCHRUN = """
import predict
predict.STARS_PER_PART = 4
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
    (tmp_path / "directory.csv").mkdir()
    for output in (tmp_path / "file" / "p.csv", tmp_path / "directory.csv"):
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


@pytest.mark.parametrize("ending", [".csv", ".ecsv", ".fits", ".vot"])
def test_the_ending_of_the_output_is_its_format(checkpoints, own_dir, tmp_path, ending, classified):
    output, star = tmp_path / f"p{ending}", stars_of(own_dir)[0]
    words = [checkpoints["spectrum"], "--data-dir", own_dir, "--output", output, "--num-workers", 1]
    for _ in range(2):  # an earlier table is replaced
        predict.main(predict.parse_arguments([str(word) for word in words]))
    table = QTable.read(output)
    assert table.colnames == list(COLUMNS) and len(table) == 10
    assert [int(table[name][0]) for name in ("plate", "fiberID")] == [star.plate, star.fiberID]
    assert sum(classified) == 20 and not list(tmp_path.glob(".*"))


def test_the_report_counts_active_and_metal_poor_stars(capsys):
    row = {"predicted_subclass": "M3", "metallicity_class": "dM", "is_active": "True", "problem": "", "is_outlier": ""}
    rows = [row, row, row | {"metallicity_class": "sdM", "is_active": "False"}, row | {"is_active": ""}]
    assert predict.report(Path("p.csv"), [Star(str(k), "", 0, 0, 0) for k in range(4)], rows) == 4
    assert "  M0 0, M1 0, M2 0, M3 4, M4 0\n  active: 2, sdM: 1\n" in capsys.readouterr().out


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
