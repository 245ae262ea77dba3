"""The cache of prepared stars: what is in it is what is in the files, whatever happens to either."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from astropy.io import fits
from common import ROOT

import cache
import data
from data import DataError, Star
from simulate_sdss_data import simulate

PER_CLASS = 3


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    simulate(directory, per_class=PER_CLASS, seed=5)
    return directory


@pytest.fixture
def stars_dir(simulated, tmp_path) -> Path:
    return shutil.copytree(simulated, tmp_path / "stars")


def catalog(stars_dir: Path) -> list[Star]:
    return data.read_catalog(stars_dir / "objects.csv")[0]


def open_all(stars_dir: Path, num_workers: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each usable star, by name, its spectrum and image as the cache gives them."""
    checked, arrays = cache.open_stars(
        catalog(stars_dir), stars_dir, spectra=True, images=True, num_workers=num_workers
    )
    names = [entry.star.name for entry in checked if not (entry.missing or entry.damage)]
    rows = np.arange(len(names))
    return dict(zip(names, zip(arrays["spectra"][rows], arrays["images"][rows], strict=True), strict=True))


def assert_true_to_the_files(stars_dir: Path, opened: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    stars = {star.name: star for star in catalog(stars_dir)}
    for name, (spectrum, image) in opened.items():
        assert np.array_equal(spectrum, data.load_spectrum(stars_dir, stars[name]))
        assert np.array_equal(image, data.load_cutout(stars_dir, stars[name]))


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The files that are decoded from now on, in this process."""
    names, decode_file = [], cache.decode_file

    def count(task, **others):
        names.append(task.name)
        return decode_file(task, **others)

    monkeypatch.setattr(cache, "decode_file", count)
    return names


# What is read


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_the_prepared_files(stars_dir, monkeypatch, num_workers):
    monkeypatch.setattr(cache, "FEW_FILES", 0)
    opened = open_all(stars_dir, num_workers)
    assert len(opened) == 5 * PER_CLASS
    assert_true_to_the_files(stars_dir, opened)


def test_every_file_is_decoded_once(stars_dir, decoded):
    first = open_all(stars_dir)
    assert len(decoded) == 2 * 5 * PER_CLASS
    second = open_all(stars_dir)
    assert len(decoded) == 2 * 5 * PER_CLASS
    assert all(torch.equal(first[name][k], second[name][k]) for name in first for k in (0, 1))


def test_an_array_is_indexed_like_a_tensor(stars_dir):
    _, arrays = cache.open_stars(catalog(stars_dir), stars_dir, spectra=True, images=True, num_workers=0)
    for array, shape, dtype in (
        (arrays["spectra"], (3522,), torch.float32),
        (arrays["images"], (3, 128, 128), torch.uint8),
    ):
        whole = array[torch.arange(len(array))]
        assert whole.shape == (5 * PER_CLASS, *shape) and whole.dtype == dtype
        chosen = torch.tensor([4, 0, 4])
        assert torch.equal(array[chosen], whole[chosen])


def test_an_input_that_is_not_wanted_may_be_missing_or_damaged(stars_dir):
    first, second = catalog(stars_dir)[:2]
    data.cutout_path(stars_dir, first).unlink()
    data.spectrum_path(stars_dir, second).write_bytes(b"no spectrum")
    for wanted, missing, damaged in (
        ({"spectra": True, "images": True}, 1, 1),
        ({"spectra": True, "images": False}, 0, 1),
        ({"spectra": False, "images": True}, 1, 0),
    ):
        checked, arrays = cache.open_stars(catalog(stars_dir), stars_dir, **wanted, num_workers=0)
        assert [bool(entry.missing) for entry in checked[:2]] == [bool(missing), False]
        assert [bool(entry.damage) for entry in checked[:2]] == [False, bool(damaged)]
        assert set(arrays) == {kind for kind, is_wanted in wanted.items() if is_wanted}
        assert all(len(array) == 5 * PER_CLASS - missing - damaged for array in arrays.values())


def test_position_and_simulation_come_from_the_spectrum_where_the_catalogue_is_silent(stars_dir):
    stars = [Star(*star[:5]) for star in catalog(stars_dir)]
    path = data.spectrum_path(stars_dir, stars[0])
    with fits.open(path, mode="update") as hdus:
        hdus[0].header.update(PLUG_RA=12.5, PLUG_DEC=-3.25)
        del hdus[0].header["SIMULATD"]
    for wanted in ({"spectra": True, "images": False}, {"spectra": False, "images": True}):
        checked, _ = cache.open_stars(stars, stars_dir, **wanted, num_workers=0)
        assert [checked[0].star.ra, checked[0].star.dec] == [12.5, -3.25]
        assert checked[0].star.simulated  # its cutout says so
    data.cutout_path(stars_dir, stars[0]).unlink()
    checked, _ = cache.open_stars(stars, stars_dir, spectra=True, images=False, num_workers=0)
    assert not checked[0].star.simulated and checked[1].star.simulated
    known = [stars[0]._replace(ra=1.0, dec=2.0), *stars[1:]]
    checked, _ = cache.open_stars(known, stars_dir, spectra=True, images=False, num_workers=0)
    assert (checked[0].star.ra, checked[0].star.dec) == (1.0, 2.0)


# Files that change


def swap_spectrum(stars_dir: Path) -> str:
    """Another content of the same size, as after a second download; returns the star's name."""
    star = catalog(stars_dir)[1]
    path = data.spectrum_path(stars_dir, star)
    size = path.stat().st_size
    with fits.open(path, mode="update") as hdus:
        hdus[1].data["flux"] = hdus[1].data["flux"][::-1].copy()
    assert path.stat().st_size == size
    return star.name


def test_a_changed_file_of_the_same_size_is_decoded_again_and_no_other(stars_dir, decoded):
    before = open_all(stars_dir)
    decoded.clear()
    name = swap_spectrum(stars_dir)
    after = open_all(stars_dir)
    assert len(decoded) == 1
    assert_true_to_the_files(stars_dir, after)
    assert not torch.equal(before[name][0], after[name][0])


def test_removed_and_added_files_are_noticed(stars_dir, decoded):
    complete = open_all(stars_dir)
    path = data.cutout_path(stars_dir, catalog(stars_dir)[2])
    content = path.read_bytes()
    path.unlink()
    assert len(open_all(stars_dir)) == len(complete) - 1
    decoded.clear()
    path.write_bytes(content)
    assert set(open_all(stars_dir)) == set(complete) and len(decoded) == 1


def test_a_catalogue_in_another_order_with_stars_more_and_fewer_gets_the_right_rows(stars_dir, simulated, decoded):
    objects = stars_dir / "objects.csv"
    header, *rows = objects.read_text().splitlines()
    objects.write_text("\n".join([header, *rows[:8]]))
    open_all(stars_dir)
    decoded.clear()
    objects.write_text("\n".join([header, *rows[:2:-1]]))
    opened = open_all(stars_dir)
    assert len(opened) == 12 and len(decoded) == 2 * 7
    assert_true_to_the_files(stars_dir, opened)
    objects.write_text("\n".join([header, *rows[5:]]))
    decoded.clear()
    assert_true_to_the_files(stars_dir, open_all(stars_dir))
    assert not decoded


def test_damage_is_remembered_and_told_under_the_path_of_today(stars_dir, tmp_path, decoded):
    star = catalog(stars_dir)[0]
    data.cutout_path(stars_dir, star).write_bytes(b"\xff\xd8\xff\xe0 cut")
    told = []
    for directory in (stars_dir, tmp_path / "moved"):
        if not directory.exists():
            stars_dir.rename(directory)
        checked, _ = cache.open_stars(catalog(directory), directory, spectra=True, images=True, num_workers=0)
        told.append(checked[0].damage)
        assert str(data.cutout_path(directory, star)) in checked[0].damage
    assert len(decoded) == 2 * 5 * PER_CLASS
    assert told[0].partition(": ")[2] == told[1].partition(": ")[2] != ""


def test_a_file_that_could_not_be_read_is_tried_again(stars_dir):
    star = catalog(stars_dir)[0]
    with patch.object(data, "read_spectrum", side_effect=data.UnreadableError("Input/output error")):
        assert not open_all(stars_dir)
    assert star.name in open_all(stars_dir)


def test_another_preparation_is_noticed(stars_dir, decoded):
    plain = open_all(stars_dir)
    with patch.object(data, "SCALED_FLUX_RANGE", (0.9, 1.1)):
        clipped = open_all(stars_dir)
    assert all(spectrum.max() <= np.float32(1.1) for spectrum, _ in clipped.values())
    again = open_all(stars_dir)
    assert all(torch.equal(plain[name][0], again[name][0]) for name in plain)
    assert len(decoded) == 3 * 2 * 5 * PER_CLASS


# A cache that is damaged, or disturbed


@pytest.mark.parametrize("name", ["spectra.npy", "images.npy", "index.json"])
@pytest.mark.parametrize("content", ["truncated", "empty", "garbage", "garbage of the same size", "absent"])
def test_a_damaged_cache_is_made_anew(stars_dir, name, content):
    open_all(stars_dir)
    path = stars_dir / cache.CACHE_DIR / name
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "garbage": b"[" * 5000, "garbage of the same size": b"\0" * len(whole)}
        .get(content, b"")
    )  # fmt: skip
    if content == "absent":
        path.unlink()
    opened = open_all(stars_dir)
    assert len(opened) == 5 * PER_CLASS
    assert_true_to_the_files(stars_dir, opened)


@pytest.mark.parametrize("index", [{}, [], {"preparation": ""}])
def test_an_index_of_another_form_is_made_anew(stars_dir, index):
    open_all(stars_dir)
    (stars_dir / cache.CACHE_DIR / cache.INDEX_FILE).write_text(json.dumps(index))
    assert len(open_all(stars_dir)) == 5 * PER_CLASS


def test_a_run_keeps_its_rows_when_the_cache_is_deleted_or_made_anew(stars_dir):
    _, arrays = cache.open_stars(catalog(stars_dir), stars_dir, spectra=True, images=True, num_workers=0)
    rows = np.arange(5 * PER_CLASS)
    before = arrays["spectra"][rows]
    swap_spectrum(stars_dir)
    open_all(stars_dir)
    assert torch.equal(arrays["spectra"][rows], before)
    shutil.rmtree(stars_dir / cache.CACHE_DIR)
    assert torch.equal(arrays["spectra"][rows], before)


def test_an_array_that_is_written_over_under_a_run_stops_it(stars_dir):
    _, arrays = cache.open_stars(catalog(stars_dir), stars_dir, spectra=True, images=True, num_workers=0)
    with open(stars_dir / cache.CACHE_DIR / "images.npy", "rb+") as file:
        file.truncate(4096)
    with pytest.raises(DataError, match=r"images.npy: was changed while it was read; run again"):
        arrays["images"][np.arange(5)]


OPEN = """
import sys
from pathlib import Path
import cache, data
directory = Path(sys.argv[1])
cache.FEW_FILES = 0
checked, _ = cache.open_stars(
    data.read_catalog(directory / "objects.csv")[0], directory, spectra=True, images=True, num_workers=2)
print(sum(not (entry.missing or entry.damage) for entry in checked), "usable")
"""


def start_opening(stars_dir: Path, code: str = OPEN) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(stars_dir)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_runs_that_start_together_share_the_work(stars_dir, decoded):
    slow = OPEN.replace("cache.FEW_FILES", "real = data.read_cutout; import time\n"
        "data.read_cutout = lambda path: (time.sleep(0.2), real(path))[1]\ncache.FEW_FILES")  # fmt: skip
    both = [start_opening(stars_dir, slow) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert all(f"{5 * PER_CLASS} usable" in out for out, _ in told)
    assert sum("waiting for it" in out for out, _ in told) <= 1
    assert_true_to_the_files(stars_dir, open_all(stars_dir))
    assert not decoded


def test_a_killed_run_leaves_nothing_that_counts(stars_dir):
    endless = OPEN.replace("cache.FEW_FILES = 0", "import time\ndata.read_cutout = lambda path: time.sleep(60)")
    process = start_opening(stars_dir, endless)
    directory = stars_dir / cache.CACHE_DIR
    deadline = time.monotonic() + 60
    while not list(directory.glob(".images-*.partial.npy")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(directory.glob(".*.partial*"))
    assert_true_to_the_files(stars_dir, open_all(stars_dir))
    assert {path.name for path in directory.iterdir()} == {"spectra.npy", "images.npy", "index.json", ".lock"}


def test_a_directory_that_cannot_be_written_gets_a_cache_elsewhere(stars_dir, capsys):
    """A file in the cache's place: even the superuser cannot write there."""
    (stars_dir / cache.CACHE_DIR).write_text("in the way")
    opened = open_all(stars_dir)
    assert len(opened) == 5 * PER_CLASS
    assert_true_to_the_files(stars_dir, opened)
    assert f"{stars_dir / cache.CACHE_DIR}: cannot be written" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser can write everywhere")
def test_a_read_only_directory(stars_dir, capsys, decoded):
    stars_dir.chmod(0o500)
    assert len(open_all(stars_dir)) == 5 * PER_CLASS and "cannot be written" in capsys.readouterr().out
    stars_dir.chmod(0o700)
    open_all(stars_dir)
    stars_dir.chmod(0o500)
    decoded.clear()
    assert len(open_all(stars_dir)) == 5 * PER_CLASS  # a cache that is there is used
    assert not decoded and "cannot be written" not in capsys.readouterr().out
    stars_dir.chmod(0o700)
