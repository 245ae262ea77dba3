"""LAMOST's spectra, in both of their formats: read, prepared, and found through the catalogue's column `file`."""

import csv
import gzip

import numpy as np
import pytest
from common import SHARED_DATA
from lamost import HEADER, lamost_file

import cache
from catalog import Star, read_catalog
from cli import DataError
from prediction import read_star, star_of_file
from preparation import WAVELENGTH, prepare_spectrum
from survey_files import WrongFileError, read_spectrum

STAR = Star("a", "M3", 0, 0, 0, file="a.fits")
PIXELS = 3909
LOGLAM = 3.5682 + 1e-4 * np.arange(PIXELS)
FLUX = 500 + 50 * np.sin(np.arange(PIXELS) / 99)
IVAR = np.where((np.arange(PIXELS) > 1880) & (np.arange(PIXELS) < 2030), 0, 0.01)  # between the arms


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.filterwarnings("error")
def test_a_spectrum_of_either_format_is_read(tmp_path, table, compress):
    path = tmp_path / "a.fits"
    path.write_bytes(compress(lamost_file(10**LOGLAM, FLUX, IVAR, table=table)))
    read = read_spectrum(path, STAR)
    assert (read.loglam.dtype, read.flux.dtype, read.ivar.dtype) == (np.float64, np.float32, np.float32)
    np.testing.assert_allclose(read.loglam, LOGLAM, atol=1e-7)
    np.testing.assert_allclose(read.flux, FLUX, rtol=1e-6)
    np.testing.assert_allclose(read.ivar, IVAR, rtol=1e-6)
    assert read[3:] == (HEADER["RA"], HEADER["DEC"], False, path, -1.5e-4, "M3")
    prepared = prepare_spectrum(read)
    assert np.array_equal(prepared[1] > 0, np.interp(np.log10(WAVELENGTH), LOGLAM, IVAR) > 0)


@pytest.mark.parametrize("table", [False, True])
def test_pixels_between_sdss_pixels_are_interpolated(tmp_path, table):
    loglam = LOGLAM + 3e-5
    (tmp_path / "a.fits").write_bytes(lamost_file(10**loglam, FLUX, IVAR, table=table))
    prepared = prepare_spectrum(read_spectrum(tmp_path / "a.fits", STAR))
    good, expected = prepared[1] > 0, np.interp(np.log10(WAVELENGTH), loglam, FLUX)
    assert good.mean() > 0.95
    np.testing.assert_allclose(prepared[0, good] / prepared[0, 0], expected[good] / expected[0], rtol=1e-5)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize(
    "cards, redshift, subclass", [({"Z": -9999, "SUBCLASS": "dM2"}, 0.0, "dM2"), ({"Z": 0.3}, 0.0, "M3")]
)
def test_redshifts_that_are_no_stars_are_unknown(tmp_path, table, cards, redshift, subclass):
    (tmp_path / "a.fits").write_bytes(lamost_file(10**LOGLAM, FLUX, IVAR, table=table, **cards))
    assert read_spectrum(tmp_path / "a.fits", STAR)[-2:] == (redshift, subclass)
    read = read_star(("spectra",), *star_of_file(tmp_path / "a.fits"))
    assert read.star.subclass == subclass.removeprefix("d")


DISORDER = LOGLAM.copy()
DISORDER[[9, 10]] = DISORDER[[10, 9]]
REFUSED: dict[str, tuple[dict, str]] = {
    "in air": ({"VACUUM": False}, "its wavelengths are in air (VACUUM = F)"),
    "out of order": ({"wavelength": 10**DISORDER}, "its wavelengths do not increase"),
    "a wavelength of 0": ({"wavelength": np.where(np.arange(PIXELS) == 9, 0, 10**LOGLAM)}, "do not increase"),
}


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("error")
def test_a_wrong_spectrum_is_refused(tmp_path, case, table):
    changes, message = REFUSED[case]
    arrays = {"wavelength": 10**LOGLAM, "flux": FLUX, "ivar": IVAR}
    (tmp_path / "a.fits").write_bytes(lamost_file(**arrays | {"table": table} | changes))
    with pytest.raises(DataError) as error:
        read_spectrum(tmp_path / "a.fits", STAR)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_an_image_of_another_kind_and_a_spectrum_of_another_star_are_refused(tmp_path):
    path = tmp_path / "a.fits"
    path.write_bytes(lamost_file(np.full(PIXELS, 7.0), FLUX, IVAR))
    with pytest.raises(DataError, match="neither wavelengths in its third row nor PLATEID"):
        read_spectrum(path, STAR)
    path.write_bytes(lamost_file(10**LOGLAM, FLUX, IVAR))
    with pytest.raises(WrongFileError, match="does not say which star it is"):
        read_spectrum(path, Star("a", "M3", 300, 52000, 7))


@pytest.mark.parametrize("table", [False, True])
def test_a_file_cut_anywhere_is_refused(tmp_path, table):
    content = lamost_file(10 ** LOGLAM[:60], FLUX[:60], IVAR[:60], table=table)
    for length in range(0, len(content), 97):
        (tmp_path / "a.fits").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"a\.fits"):
            read_spectrum(tmp_path / "a.fits", STAR)


def test_a_catalogue_names_the_files(tmp_path):
    (tmp_path / "spectra" / "night 1").mkdir(parents=True)
    rows = [("night 1/a.fits.gz", "M2"), ("b.fits", "dM2"), ("c.fits", "gM0"), ("absent.fits", "M1")]
    with open(tmp_path / "objects.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "subclass"), *rows])
    for file, _ in rows[:3]:
        (tmp_path / "spectra" / file).write_bytes(lamost_file(10**LOGLAM, FLUX, IVAR, RA=10.0))
    prepared, report = cache.read_stars(tmp_path, "spectrum", 1)
    position = (10.0, HEADER["DEC"])
    assert prepared.stars == [
        Star("a", "M2", 0, 0, 0, *position, False, "night 1/a.fits.gz"),
        Star("b", "M2", 0, 0, 0, *position, False, "b.fits"),
    ]
    assert report["stars_missing"] == {"M1: no spectrum": 1} and len(report["rows_left_out"]) == 1


def test_the_real_spectra_are_read():
    directory = SHARED_DATA / "lamost"
    if not directory.exists():
        pytest.skip(f"the real spectra are not in {SHARED_DATA} (SHARED_DATA names their folder)")
    stars, left_out = read_catalog(directory / "lamost_m_stars.csv")
    assert len(stars) == 49 and not left_out
    for star in stars:
        read = read_spectrum(directory / star.file, star)
        assert (read.ra, read.dec, read.subclass) == (star.ra, star.dec, star.subclass) and abs(read.redshift) < 5e-4
        prepared = prepare_spectrum(read)
        assert prepared.shape == (2, 3522) and np.isfinite(prepared).all() and (prepared[1] > 0).mean() > 0.7
    sample = read_spectrum(directory / "dr8_format_sample.fits", STAR)
    assert (prepare_spectrum(sample) > 0).all()
