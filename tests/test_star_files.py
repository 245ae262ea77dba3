"""A star's files are written to one place, and found by name wherever they lie below spectra/ and images/."""

import gzip
import os
import time
import unicodedata

import pytest

import star_files
from catalog import Star
from cli import DataError, partial_path
from star_files import FileIndex

STAR = Star("étoile 1", "M2", 618, 52049, 372)


def test_places_where_files_are_written(tmp_path):
    unlabelled = Star("b", "", 12345, 57346, 1000)
    assert star_files.catalog_path(tmp_path) == tmp_path / "objects.csv"
    assert star_files.spectrum_path(tmp_path, STAR) == tmp_path / "spectra/M2/spec-0618-52049-0372.fits"
    assert star_files.cutout_path(tmp_path, STAR) == tmp_path / "images/M2/étoile 1_image.jpg"
    assert star_files.spectrum_path(tmp_path, unlabelled) == tmp_path / "spectra/spec-12345-57346-1000.fits"
    assert star_files.cutout_path(tmp_path, unlabelled) == tmp_path / "images/b_image.jpg"


def find(directory, **files: str | bytes):
    """Write files, and look for STAR's."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    index = FileIndex(directory)
    return index.spectrum(STAR), index.cutout(STAR)


@pytest.mark.parametrize(
    "name",
    [
        "M2/spec-0618-52049-0372.fits",
        "spec-0618-52049-0372.fits",  # as for a star without label
        "M3/spec-0618-52049-0372.fits",  # the class of an older label
        "0618/spec-0618-52049-0372.fits",  # as in SDSS's archive
        "sdss/26/lite/0618/spec-0618-52049-0372.fits",
        "spec-618-52049-372.fits",
        "spec-0618-52049-0372.fits.gz",
        "spec-0618-52049-0372.fit",
        "SPEC-0618-52049-0372.FITS",
        "spSpec-52049-0618-372.fit",  # SDSS until DR7
    ],
)
def test_a_spectrum_is_found(tmp_path, name):
    assert find(tmp_path, **{f"spectra/{name}": "a"}) == (tmp_path / "spectra" / name, None)


@pytest.mark.parametrize(
    "name",
    [
        "M2/étoile 1_image.jpg",
        "étoile 1_image.jpg",
        "M3/deep/étoile 1_image.jpeg",
        "étoile 1_IMAGE.JPG",
        unicodedata.normalize("NFD", "étoile 1_image.jpg"),
    ],
)
def test_a_cutout_is_found(tmp_path, name):
    spectrum, cutout = find(tmp_path, **{f"images/{name}": "a"})
    assert spectrum is None and cutout.samefile(tmp_path / "images" / name)


def test_other_files_do_not_count(tmp_path):
    partial = partial_path(star_files.spectrum_path(tmp_path, STAR)).relative_to(tmp_path)
    names = ["spectra/spec-0618-52049-0373.fits", "spectra/spec-0618-52049-0372.fits.txt", "spec-0618-52049-0372.fits",
             "images/spec-0618-52049-0372.fits", "spectra/._spec-0618-52049-0372.fits",
             "spectra/.trash/spec-0618-52049-0372.fits", "spectra/spSpec-0618-52049-372.fit", "images/étoile 1.jpg",
             "images/étoile 1_image.png", "images/étoile 10_image.jpg", "images/Étoile 1_image.jpg"]  # fmt: skip
    assert find(tmp_path, **{str(partial): "a"}, **dict.fromkeys(names, "a")) == (None, None)


def test_nothing_is_found_without_folders(tmp_path):
    assert find(tmp_path) == (None, None)


def test_a_spectrum_that_the_catalogue_names(tmp_path):
    star = STAR._replace(file="night 1/a.fits")
    path = tmp_path / "spectra/night 1/a.fits"
    assert star_files.spectrum_path(tmp_path, star) == path and FileIndex(tmp_path).spectrum(star) is None
    find(tmp_path, **{"spectra/M2/spec-0618-52049-0372.fits": "a", "spectra/night 1/a.fits": "b"})
    assert FileIndex(tmp_path).spectrum(star) == path


def test_two_files_of_one_star_must_be_alike(tmp_path):
    one, other = "spectra/M2/spec-0618-52049-0372.fits", "spectra/0618/spec-618-52049-372.fits.gz"
    spectrum, _ = find(tmp_path, **{one: "a", other: gzip.compress(b"a")})
    assert str(spectrum.relative_to(tmp_path)) in (one, other)
    with pytest.raises(DataError) as error:
        find(tmp_path, **{one: "a", other: gzip.compress(b"b")})
    assert one in str(error.value) and other in str(error.value) and "differ; delete one" in str(error.value)
    with pytest.raises(DataError, match="372.fits.gz: the file is truncated"):
        find(tmp_path, **{one: "a", other: gzip.compress(b"a")[:-1]})
    pictures = {"images/M2/étoile 1_image.jpg": "a", "images/étoile 1_image.jpeg": "b"}
    with pytest.raises(DataError, match="two files for one star"):
        find(tmp_path / "other", **pictures)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "spectra").write_text("a file")
    with pytest.raises(DataError, match="spectra: cannot be read"):
        FileIndex(tmp_path).spectrum(STAR)


def test_a_hundred_thousand_files_are_looked_up_quickly(tmp_path, monkeypatch):
    stars = [Star(f"star {i}", f"M{i % 5}", i // 1000 + 1, 52000, i % 1000 + 1) for i in range(10**5)]
    files = {"spectra": star_files.spectrum_path, "images": star_files.cutout_path}

    def walk(root, **_):
        for folder in range(5):
            yield str(root / f"M{folder}"), [], [files[root.name](tmp_path, star).name for star in stars[folder::5]]

    monkeypatch.setattr(os, "walk", walk)
    began, index = time.process_time(), FileIndex(tmp_path)
    for star in stars[::100]:
        assert index.spectrum(star) == star_files.spectrum_path(tmp_path, star)
        assert index.cutout(star) == star_files.cutout_path(tmp_path, star)
    assert time.process_time() - began < 15  # 2 s when measured, most of it for the names
