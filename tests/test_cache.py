"""The cache of prepared stars: its rows are the content of the files, whatever happens to either."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from common import ROOT, stars_of, write_catalog

import cache
from catalog import Star
from cli import DataError
from preparation import prepare_cutout, prepare_spectrum
from simulate_sdss_data import simulate
from star_files import cutout_path, spectrum_path
from survey_files import UnreadableError, read_cutout, read_spectrum

STARS = 10


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    simulate(directory, per_class=STARS // 5, seed=5, min_snr=20)
    return directory


@pytest.fixture
def stars_dir(simulated, tmp_path) -> Path:
    return shutil.copytree(simulated, tmp_path / "stars")


def read(stars_dir: Path, modality: str = "fusion", num_workers: int = 1) -> cache.PreparedStars:
    return cache.read_stars(stars_dir, modality, num_workers)[0]


def assert_rows_are_the_files(stars_dir: Path, prepared: cache.PreparedStars, count: int = STARS) -> None:
    assert len(prepared.stars) == count
    for star, spectrum, image in zip(prepared.stars, prepared.spectra[:], prepared.images[:], strict=True):
        assert np.array_equal(spectrum, prepare_spectrum(read_spectrum(spectrum_path(stars_dir, star), star)))
        assert np.array_equal(image, prepare_cutout(read_cutout(cutout_path(stars_dir, star)).pixels))


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the stars that are decoded from now on, in this process."""
    names, decode_star = [], cache.decode_star
    monkeypatch.setattr(cache, "decode_star", lambda *task: names.append(task[2].name) or decode_star(*task))
    return names


@pytest.mark.parametrize("num_workers", [1, 2])
def test_rows_are_the_prepared_files(stars_dir, monkeypatch, num_workers):
    monkeypatch.setattr(cache, "FEW_STARS", 0)
    prepared = read(stars_dir, "fusion", num_workers)
    assert_rows_are_the_files(stars_dir, prepared)
    assert prepared.targets.tolist() == [int(star.subclass[1]) for star in prepared.stars]
    spectra, images = prepared.spectra[:], prepared.images[torch.tensor([4, 0, 4])]
    assert (spectra.shape, spectra.dtype) == ((STARS, 2, 3522), torch.float32)
    assert (images.shape, images.dtype) == ((3, 3, 128, 128), torch.uint8)


# Stars that cannot be used


def test_a_file_that_the_modality_does_not_read_may_be_missing_or_damaged(stars_dir, capsys):
    first, second = stars_of(stars_dir)[:2]
    cutout_path(stars_dir, first).unlink()
    spectrum_path(stars_dir, second).write_bytes(b"no spectrum")
    for modality, missing, set_aside in (("fusion", 1, 1), ("spectrum", 0, 1), ("image", 1, 0)):
        prepared, report = cache.read_stars(stars_dir, modality, 1)
        assert report["stars_missing"] == ({f"{first.subclass}: no image": 1} if missing else {})
        assert len(report["set_aside"]) == set_aside and len(prepared.stars) == STARS - missing - set_aside
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert table[6] == ["all", *map(str, filter(None, (STARS, len(prepared.stars), set_aside, missing)))]
        assert (prepared.spectra is None, prepared.images is None) == (modality == "image", modality == "spectrum")


def test_without_any_usable_star_the_reason_is_named(stars_dir):
    shutil.rmtree(stars_dir / "images")
    with pytest.raises(DataError, match=r"none of the 10 stars .* \(the first: no image\)"):
        read(stars_dir)


@pytest.mark.parametrize("modality", ["fusion", "image"])
def test_a_star_whose_position_is_not_its_spectrums_is_set_aside(stars_dir, modality):
    stars = [star._replace(ra=100.0, dec=60.0) for star in stars_of(stars_dir)]
    for star, offset in zip(stars, [4 / 3600, 6 / 3600, 3.2, *[0] * (STARS - 3)], strict=True):
        fits.setval(spectrum_path(stars_dir, star), "PLUG_RA", value=100 + 2 * offset)  # cos 60° = 1/2
        fits.setval(spectrum_path(stars_dir, star), "PLUG_DEC", value=60.0)
    write_catalog(stars_dir, stars)
    prepared, report = cache.read_stars(stars_dir, modality, 1)
    assert len(prepared.stars) == STARS - 2 and prepared.stars[0].name == stars[0].name
    for star, angle, line in zip(stars[1:3], ("6″", "3.2°"), report["set_aside"], strict=True):
        assert f"{spectrum_path(stars_dir, star)}: the catalogue places it {angle} from where its spectrum" in line


def test_position_and_simulation_are_the_files_where_the_catalogue_is_silent(stars_dir):
    first, *_ = stars = [Star(*star[:5]) for star in stars_of(stars_dir)]
    write_catalog(stars_dir, stars)
    with fits.open(spectrum_path(stars_dir, first), mode="update") as hdus:
        hdus[0].header.update(PLUG_RA=12.5, PLUG_DEC=-3.25)
        del hdus[0].header["SIMULATD"]
    for modality in ("spectrum", "image"):
        assert read(stars_dir, modality).stars[0][5:8] == (12.5, -3.25, True)  # the cutout says that it is simulated
    cutout_path(stars_dir, first).unlink()
    assert read(stars_dir, "spectrum").stars[0][5:8] == (12.5, -3.25, False)


# Files that change


def swap_flux(stars_dir: Path) -> None:
    with fits.open(spectrum_path(stars_dir, stars_of(stars_dir)[1]), mode="update") as hdus:
        hdus[1].data["flux"] = hdus[1].data["flux"][::-1].copy()


CHANGES = {
    "content of the same size": (swap_flux, STARS),
    "a star fewer": (lambda directory: write_catalog(directory, stars_of(directory)[1:]), STARS - 1),
    "another order": (lambda directory: write_catalog(directory, stars_of(directory)[::-1]), STARS),
    "no cutout": (lambda directory: cutout_path(directory, stars_of(directory)[2]).unlink(), STARS - 1),
    "an older file": (lambda directory: os.utime(cutout_path(directory, stars_of(directory)[2]), (1, 1)), STARS),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_are_decoded_once_and_again_after_any_change(stars_dir, decoded, change):
    read(stars_dir)
    assert_rows_are_the_files(stars_dir, read(stars_dir))
    assert len(decoded) == STARS
    apply, count = CHANGES[change]
    apply(stars_dir)
    assert_rows_are_the_files(stars_dir, read(stars_dir), count)
    assert len(decoded) == 2 * STARS - (change == "a star fewer")


def test_another_preparation_is_noticed(stars_dir, decoded, monkeypatch, tmp_path):
    read(stars_dir)
    (tmp_path / "other.py").write_text("# another way\n")
    monkeypatch.setattr(cache.preparation, "__file__", str(tmp_path / "other.py"))
    read(stars_dir)
    assert len(decoded) == 2 * STARS


def test_a_file_that_could_not_be_read_is_tried_again(stars_dir, monkeypatch):
    first = stars_of(stars_dir)[0]

    def refuse(path, star):
        if star.name == first.name:
            raise UnreadableError(f"{path}: cannot be read (Permission denied)")
        return read_spectrum(path, star)

    with monkeypatch.context() as patch:
        patch.setattr(cache.survey_files, "read_spectrum", refuse)
        assert len(read(stars_dir).stars) == STARS - 1
    assert len(read(stars_dir).stars) == STARS


# A cache that is damaged or disturbed


@pytest.mark.parametrize("name", ["spectra", "images", "index.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "brackets", "zeros", "absent", "null"])
def test_a_damaged_cache_is_made_anew(stars_dir, name, damage):
    read(stars_dir)
    path = stars_dir / cache.CACHE_DIR / name
    whole = path.read_bytes()
    contents = {"half": whole[: len(whole) // 2], "brackets": b"[" * 5000, "zeros": bytes(len(whole)), "null": b"null"}
    path.write_bytes(contents.get(damage, b""))
    if damage == "absent":
        path.unlink()
    assert_rows_are_the_files(stars_dir, read(stars_dir))


def test_a_run_keeps_its_rows_when_the_cache_is_made_anew_or_deleted(stars_dir):
    prepared = read(stars_dir)
    before = prepared.spectra[:]
    swap_flux(stars_dir)
    assert not torch.equal(read(stars_dir).spectra[:], before)
    assert torch.equal(prepared.spectra[:], before)
    shutil.rmtree(stars_dir / cache.CACHE_DIR)
    assert torch.equal(prepared.spectra[:], before)


def test_an_array_that_is_written_over_stops_the_run(stars_dir):
    prepared = read(stars_dir)
    os.truncate(stars_dir / cache.CACHE_DIR / "images", 4096)
    with pytest.raises(DataError, match="images: was changed while it was read; run again"):
        prepared.images[:]


READ = """
import multiprocessing, sys, time
from pathlib import Path
import cache
multiprocessing.set_start_method("fork")  # workers, too, are slow
read_cutout, cache.FEW_STARS = cache.survey_files.read_cutout, 0

def read_slowly(path):
    with open(sys.argv[3], "a") as file:
        print(path, file=file)
    time.sleep(float(sys.argv[2]))
    return read_cutout(path)

cache.survey_files.read_cutout = read_slowly
print("ready", flush=True)
sys.stdin.readline()
print(len(cache.read_stars(Path(sys.argv[1]), "fusion", 2)[0].stars), "stars read")
"""


def start_reading(stars_dir: Path, seconds_a_star: float, runs: int) -> list[subprocess.Popen[str]]:
    """Runs that start together; they write the path of each cutout that they read into a file, `cutouts_read`."""
    arguments = [sys.executable, "-c", READ, str(stars_dir), str(seconds_a_star), str(stars_dir / "cutouts_read")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(arguments, cwd=ROOT, text=True, **pipes) for _ in range(runs)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        print(file=process.stdin, flush=True)
    return processes


def test_two_runs_that_start_together_share_the_work(stars_dir, decoded):
    told = [process.communicate(timeout=120)[0] for process in start_reading(stars_dir, 0.1, runs=2)]
    assert all(f"{STARS} stars read" in out for out in told)
    assert len((stars_dir / "cutouts_read").read_text().splitlines()) == STARS
    assert_rows_are_the_files(stars_dir, read(stars_dir))
    assert not decoded


def test_a_killed_run_leaves_no_lock_and_nothing_that_counts(stars_dir):
    [process] = start_reading(stars_dir, 60, runs=1)
    directory = stars_dir / cache.CACHE_DIR
    deadline = time.monotonic() + 60
    while not list(directory.glob("partial-*/spectra")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)  # worker processes start
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)  # until its workers, too, have closed their output
    assert list(directory.glob("partial-*"))
    assert_rows_are_the_files(stars_dir, read(stars_dir))
    assert {path.name for path in directory.iterdir()} == {"spectra", "images", "index.json", ".lock"}


def test_a_directory_that_cannot_be_written_gets_a_cache_elsewhere(stars_dir, capsys):
    """A file in the cache's place: even the superuser cannot write there."""
    (stars_dir / cache.CACHE_DIR).write_text("in the way")
    assert_rows_are_the_files(stars_dir, read(stars_dir))
    assert f"{stars_dir / cache.CACHE_DIR}: cannot be written" in capsys.readouterr().out
