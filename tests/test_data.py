"""Catalogue, identifiers, files: read as they are on disk, and refused with a clear line when they are wrong."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from common import ROOT, SHARED_DATA
from PIL import Image

import data
from data import DataError, Star

HEADER = "name,subclass,plate,mjd,fiberID"
STAR = Star("a star", "M2", 618, 52049, 372)


def star_header(**cards) -> tuple:
    return tuple(({"PLATEID": 618, "MJD": 52049, "FIBERID": 372} | cards).items())


def write_spectrum(path: Path, loglam, flux, ivar, header: tuple | None = None) -> Path:
    """A spectrum of chosen pixels, in SDSS's format; STAR's unless a header says otherwise."""
    columns = [
        fits.Column(name, "E", array=array) for name, array in (("flux", flux), ("loglam", loglam), ("ivar", ivar))
    ]
    primary = fits.PrimaryHDU(header=fits.Header(header or star_header()))
    fits.HDUList([primary, fits.BinTableHDU.from_columns(columns, name="COADD")]).writeto(path)
    return path


def flat_spectrum(first_pixel: int = 35800, pixels: int = 3850, level: float = 7.0):
    """loglam, flux, ivar of a star as bright at every wavelength, on the SDSS grid."""
    return np.arange(first_pixel, first_pixel + pixels) * 1e-4, np.full(pixels, level), np.ones(pixels)


def prepared(path: Path, loglam, flux, ivar) -> np.ndarray:
    return data.prepare_spectrum(data.read_spectrum(write_spectrum(path, loglam, flux, ivar), STAR))


# The catalogue


def read(tmp_path: Path, text: str) -> tuple[list[Star], dict[str, int]]:
    (tmp_path / "objects.csv").write_text(text, encoding="utf-8")
    return data.read_catalog(tmp_path / "objects.csv")


def test_the_projects_catalogue_is_400_m_stars():
    stars, left_out = data.read_catalog(ROOT / "objects.csv")
    assert len(stars) == 400 and not left_out
    assert {star.subclass for star in stars} == set(data.CLASS_NAMES)
    for star in stars:
        assert data.decode_spec_obj_id(star.name) == (star.plate, star.mjd, star.fiberID, "26")
        assert 0 <= star.ra < 360 and -90 <= star.dec <= 90


def test_a_row_becomes_a_star_and_its_paths(tmp_path):
    stars, _ = read(
        tmp_path, f"{HEADER},ra,dec\n307416612011534336,M3,273,51957,167,10.5,-1.25\nmy star,M0,12345,57346,1000,,\n"
    )
    assert stars[0] == Star("307416612011534336", "M3", 273, 51957, 167, 10.5, -1.25)
    assert np.isnan([stars[1].ra, stars[1].dec]).all()
    assert data.spectrum_path(tmp_path, stars[0]) == tmp_path / "spectra/M3/spec-0273-51957-0167.fits"
    assert data.spectrum_path(tmp_path, stars[1]) == tmp_path / "spectra/M0/spec-12345-57346-1000.fits"
    assert data.cutout_path(tmp_path, stars[1]) == tmp_path / "images/M0/my star_image.jpg"


def test_columns_may_stand_in_any_order_after_a_byte_order_mark(tmp_path):
    stars, _ = read(tmp_path, "\ufefffiberID,extra,plate,mjd,subclass,name\n372.0,x,618,52049,M1 (204445),a\n")
    assert [star[:5] for star in stars] == [("a", "M1", 618, 52049, 372)]


def test_the_answer_of_skyserver_is_read_as_it_comes(tmp_path):
    stars, _ = read(tmp_path, f"#Table1\n{HEADER}\na,M0,1,52000,1\n,,,,\n\nb,M1,1,52000,2\n")
    assert [star.name for star in stars] == ["a", "b"]


@pytest.mark.parametrize("cell, simulated", [("1", True), ("True", True), ("0", False), ("False", False), ("", False)])
def test_the_catalogue_says_which_stars_are_simulated(tmp_path, cell, simulated):
    stars, _ = read(tmp_path, f"{HEADER},simulated\na,M0,1,52000,1,{cell}\n")
    assert stars[0].simulated is simulated


def test_other_classes_and_repeated_rows_are_left_out_and_counted(tmp_path):
    rows = ["a,M0,1,52000,1", "b,K7,,,", "c,M4.5:III (123657),1,52000,3", "a,M0,1,52000,1", "d,,1,52000,4"]
    stars, left_out = read(tmp_path, "\n".join([HEADER, *rows]))
    assert [star.name for star in stars] == ["a"]
    assert sum(left_out.values()) == 4 and any("K7" in reason for reason in left_out)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the file is empty"),
        (HEADER, "no star of class"),
        (f"{HEADER},name\na,M0,1,52000,1,b", "stands twice"),
        (f"{HEADER}\na,M0,{'9' * 5000},52000,1", "column plate"),
        ("name,subclass,plate\na,M0,1", "column mjd, fiberID is missing"),
        ("name;subclass;plate;mjd;fiberID\na;M0;1;52000;1", "separated by commas"),
        (f"{HEADER}\na,M0,1,52000,1,extra,cells,here", "line 2: 8 cells where the header has 5 columns"),
        (f'{HEADER}\na,M0,1,52000,"1', "not a comma-separated"),
        (f"{HEADER}\na,M0,one,52000,1", "line 2, column plate: 'one' is not a whole number"),
        (f"{HEADER}\na,M0,1,52000,1\nb,M0,1,,1", "line 3, column mjd: '' is not a whole number"),
        (f"{HEADER}\na,M0,1,52000,-1", "column fiberID"),
        (f"{HEADER}\na,M0,99999,52000,1", "column plate: '99999'"),
        (f"{HEADER}\n3.07417E+17,M0,1,52000,1", "rounded by a spreadsheet"),
        (f"{HEADER}\n../../etc/passwd,M0,1,52000,1", "cannot name a file"),
        (f"{HEADER}\n/etc/passwd,M0,1,52000,1", "cannot name a file"),
        (f"{HEADER}\n.hidden,M0,1,52000,1", "cannot name a file"),
        (f"{HEADER}\n,M0,1,52000,1", "cannot name a file"),
        (f"{HEADER}\na,../M0,1,52000,1", "no star of class"),
        (f"{HEADER}\na,M0,1,52000,1\nb,M1,1,52000,1", "is M1 here and M0 further up"),
        (f"{HEADER},ra,dec\na,M0,1,52000,1,400,0", "column ra: '400' is not an angle"),
        (f"{HEADER},ra,dec\na,M0,1,52000,1,0,north", "column dec: 'north' is not an angle"),
    ],
)
def test_a_wrong_catalogue_is_refused_in_one_line_that_names_it(tmp_path, text, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, text)
    assert message in str(error.value) and "objects.csv" in str(error.value) and "\n" not in str(error.value)


def test_an_absent_catalogue_is_named(tmp_path):
    with pytest.raises(DataError, match="objects.csv: no such file"):
        data.read_catalog(tmp_path / "objects.csv")


# specObjID


@pytest.mark.parametrize(
    "name, plate, mjd, fiber, run2d",
    [
        ("307416612011534336", 273, 51957, 167, "26"),
        ("4238154523191472128", 3764, 55514, 972, "v5_7_0"),
        ("3588350836130029568", 3187, 54821, 392, "104"),
        ("11258999466550599680", 10000, 57346, 1, "v5_10_0"),
    ],
)
def test_spec_obj_id_of_sdss(name, plate, mjd, fiber, run2d):
    assert data.decode_spec_obj_id(name) == (plate, mjd, fiber, run2d)
    number = int(run2d) if run2d.isdigit() else int(run2d.split("_")[1]) * 100 + int(run2d.split("_")[2])
    assert str(data.encode_spec_obj_id(plate, mjd, fiber, number)) == name


@pytest.mark.parametrize("name", ["LHS 1140", "12345", str(2**64), "307416612011534337", "-1024", "１０２４", ""])
def test_other_labels_are_no_spec_obj_id(name):
    assert data.decode_spec_obj_id(name) is None


# The same star


def test_rows_within_two_arcseconds_or_of_one_name_are_one_star():
    stars = [
        Star("a", "M0", 1, 52000, 1, 10.0, 60.0),
        Star("b", "M0", 2, 52000, 1, 10.0, 60.0 + 1.5 / 3600),
        Star("c", "M0", 3, 52000, 1, 10.0 + 1.5 / 3600 / 0.5, 60.0),  # cos 60° = 0.5: 1.5″ on the sky
        Star("d", "M0", 4, 52000, 1, 10.0, 60.0 + 10 / 3600),
        Star("e", "M0", 5, 52000, 1),
        Star("e", "M1", 6, 52000, 1, 200.0, 0.0),
        Star("f", "M0", 7, 52000, 1, 359.9999, 0.0),
        Star("g", "M0", 8, 52000, 1, 0.0001, 0.0),  # 0.72″ from f, across 0°
    ]
    groups = data.group_same_stars(stars)
    assert groups[0] == groups[1] == groups[2] and groups[4] == groups[5] and groups[6] == groups[7]
    assert len(set(groups)) == 4
    assert len(set(data.group_same_stars([star._replace(ra=float("nan")) for star in stars]))) == 7


# Spectra


def test_spectra_of_both_grids_land_on_the_same_pixels(tmp_path):
    """A line at one wavelength comes out at one index, wherever the file begins."""
    line = 38174  # log10(6565 Å) · 1e4, near Hα
    for name, first, pixels in (("sdss", 35812, 3834), ("boss", 35552, 4599)):
        loglam, flux, ivar = flat_spectrum(first, pixels)
        flux[line - first] = 21.0
        x = prepared(tmp_path / f"{name}.fits", loglam, flux, ivar)
        assert x.shape == (3522,) and x.dtype == np.float32
        assert np.flatnonzero(x > 1.5).tolist() == [line - 36021] and x[line - 36021] == pytest.approx(3.0)
    edges = 10 ** (np.array([36020, 36021, 39542, 39543]) * 1e-4)
    assert edges[0] < 4000 < edges[1] and edges[2] < 9000 < edges[3]


def test_bad_pixels_are_interpolated_and_do_not_set_the_scale(tmp_path):
    loglam, flux, ivar = flat_spectrum()
    clean = prepared(tmp_path / "clean.fits", loglam, flux, ivar)
    flux[1000], ivar[1000] = 1e6, 0.0  # a cosmic ray that the pipeline marked
    flux[1500] = np.nan
    flux[1600], ivar[1600] = np.inf, np.nan
    ivar[2000:2050] = 0.0
    flux[2000:2050] = 0.0
    assert np.array_equal(prepared(tmp_path / "marked.fits", loglam, flux, ivar), clean)
    flux[1200] = 1e6  # one that it missed
    x = prepared(tmp_path / "missed.fits", loglam, flux, ivar)
    assert (x != clean).sum() == 1 and x.max() == data.SCALED_FLUX_RANGE[1]


def test_missing_ends_of_the_window_are_held_at_the_last_good_value(tmp_path):
    loglam, flux, ivar = flat_spectrum(36100, 3000)
    x = prepared(tmp_path / "short.fits", loglam, np.linspace(1, 3, 3000), ivar)
    assert (x[:79] == x[79]).all() and (x[3079:] == x[3078]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda loglam, flux, ivar: (loglam, flux, 0 * ivar), "only 0 of the 3522 pixels"),
        (lambda loglam, flux, ivar: (loglam, flux * np.nan, ivar), "only 0 of the 3522 pixels"),
        (lambda loglam, flux, ivar: (loglam + 0.3, flux, ivar), "of the 3522 pixels between 4000 and 9000 Å"),
        (lambda loglam, flux, ivar: (loglam + 0.00005, flux, ivar), "not on the SDSS grid"),
        (lambda loglam, flux, ivar: (loglam[::-1], flux, ivar), "do not increase"),
        (lambda loglam, flux, ivar: (loglam * np.nan, flux, ivar), "do not increase"),
        (lambda loglam, flux, ivar: (loglam, -flux, ivar), "there is no star"),
        (lambda loglam, flux, ivar: (loglam[:0], flux[:0], ivar[:0]), "empty"),
    ],
)
def test_unusable_spectra_are_refused_with_the_reason(tmp_path, change, message):
    path = data.spectrum_path(tmp_path, STAR)
    path.parent.mkdir(parents=True)
    write_spectrum(path, *change(*flat_spectrum()))
    with pytest.raises(DataError, match=message) as error:
        data.load_spectrum(tmp_path, STAR)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("other", [{"PLATEID": 619}, {"MJD": 52050}, {"FIBERID": 373}])
def test_another_stars_spectrum_is_refused(tmp_path, other):
    path = write_spectrum(tmp_path / "a.fits", *flat_spectrum(), header=star_header(**other))
    with pytest.raises(DataError, match="another star"):
        data.read_spectrum(path, STAR)


def test_a_position_that_is_none_is_not_taken(tmp_path):
    path = write_spectrum(tmp_path / "a.fits", *flat_spectrum(), header=star_header(PLUG_RA=12.5, PLUG_DEC=-999.0))
    spectrum = data.read_spectrum(path, STAR)
    assert np.isnan([spectrum.ra, spectrum.dec]).all()


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    content = write_spectrum(tmp_path / "whole.fits", *flat_spectrum()).read_bytes()
    data.read_spectrum(tmp_path / "whole.fits", STAR)
    for length in (0, 1, 80, 2879, 2880, 5760, 20000, len(content) - 2880, len(content) - 1):
        (tmp_path / "cut.fits").write_bytes(content[:length])
        with pytest.raises(DataError, match="cut.fits"):
            data.read_spectrum(tmp_path / "cut.fits", STAR)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>503</html>", "not a FITS file"),
        (b"\x1f\x8b\x08gzip", "not a FITS file"),
        (b"SIMPLE  = nonsense" * 160, "the file is truncated or damaged"),
        (b"SIMPLE  =".ljust(80) + b"END".ljust(2800), "not an SDSS spectrum"),
    ],
    ids=["a page", "gzip", "a header without end", "a header without words"],
)
def test_what_is_no_spectrum_is_refused(tmp_path, content, message):
    (tmp_path / "a.fits").write_bytes(content)
    with pytest.raises(DataError, match=f"a.fits: {message}"):
        data.read_spectrum(tmp_path / "a.fits", STAR)


def test_a_table_without_the_columns_is_refused(tmp_path):
    table = fits.BinTableHDU.from_columns([fits.Column("flux", "E", array=[1.0])])
    fits.HDUList([fits.PrimaryHDU(), table]).writeto(tmp_path / "a.fits")
    fits.PrimaryHDU().writeto(tmp_path / "b.fits")
    for name in "ab":
        with pytest.raises(DataError, match="not an SDSS spectrum"):
            data.read_spectrum(tmp_path / f"{name}.fits", STAR)


def assert_read_as_astropy_does(path: Path, star: Star) -> None:
    spectrum = data.read_spectrum(path, star)
    with fits.open(path) as hdus:
        for name in ("loglam", "flux", "ivar"):
            assert np.array_equal(getattr(spectrum, name), hdus[1].data[name])
        header = hdus[0].header
    assert (spectrum.ra, spectrum.dec) == (header["PLUG_RA"], header["PLUG_DEC"])
    assert spectrum.simulated == header.get("SIMULATD", False)


def test_spectra_are_read_as_astropy_reads_them(tmp_path):
    """Columns of every plain kind around the three, comments that look like the header's end, other HDUs behind."""
    random = np.random.default_rng(0)
    kinds = {"L": bool, "B": "u1", "I": "i2", "J": "i4", "K": "i8", "D": "f8", "3E": "f4", "5A": "S5"}
    columns = [fits.Column(f"c{form}", form, array=np.zeros((99, int(form[0]) if form == "3E" else 1), kind).squeeze())
               for form, kind in kinds.items()]  # fmt: skip
    for place, (name, form) in enumerate([("LOGLAM", "D"), ("flux", "1E"), ("ivar", "E")]):
        columns.insert(3 * place, fits.Column(name, form, array=np.sort(random.random(99))))
    primary = fits.PrimaryHDU(header=fits.Header(star_header(PLUG_RA=1.5e1, PLUG_DEC=-3.25, SIMULATD=True)))
    primary.header["AUTHOR"] = ("O'Neil", "with a / and an END")
    primary.header.add_comment("THE END")
    primary.header.add_blank()
    exposure = fits.ImageHDU(random.random((7, 9)))
    table = fits.BinTableHDU.from_columns(columns)
    fits.HDUList([primary, table, exposure, fits.ImageHDU()]).writeto(tmp_path / "a.fits")
    assert_read_as_astropy_does(tmp_path / "a.fits", STAR)


@pytest.mark.parametrize(
    "card",
    [
        ("TSCAL1", 2.0),
        ("NAXIS1", 16),
        ("NAXIS1", -12),
        ("NAXIS2", 10**9),
        ("TFORM2", "1PE(5)"),
        ("GCOUNT", -1),
        ("TFORM2", "9" * 30 + "E"),
    ],
)
def test_tables_that_are_not_sdss_ones_are_refused(tmp_path, card):
    content = write_spectrum(tmp_path / "a.fits", *flat_spectrum()).read_bytes()
    place = content.index(b"EXTNAME " if card[0] == "TSCAL1" else card[0].encode().ljust(8), 2880)
    content = content[:place] + fits.Card(*card).image.encode() + content[place + 80 :]
    (tmp_path / "a.fits").write_bytes(content)
    with pytest.raises(DataError, match=r"a.fits: (not an SDSS spectrum|the file is truncated)"):
        data.read_spectrum(tmp_path / "a.fits", STAR)


@pytest.mark.parametrize(
    "plate, mjd, fiber, snr", [(618, 52049, 372, 50), (1123, 52882, 65, 10), (5047, 55833, 936, 48)]
)
def test_real_sdss_spectra_are_read(plate, mjd, fiber, snr):
    star = Star("real", "M1", plate, mjd, fiber)
    path = SHARED_DATA / f"spec-{star.spectrum_id}.fits"
    if not path.exists():
        pytest.skip(f"the real spectra are not in {SHARED_DATA} (SHARED_DATA names their folder)")
    assert_read_as_astropy_does(path, star)
    spectrum = data.read_spectrum(path, star)
    x = data.prepare_spectrum(spectrum)
    assert x.shape == (3522,) and np.isfinite(x).all()
    assert np.median(x) == pytest.approx(1.0, abs=0.01)
    # An M star is fainter at 4000–4300 Å than at 8000–8300 Å, and its Na D doublet (5892, 5898 Å vacuum) is dark.
    wavelength = 10 ** ((np.arange(3522) + 36021) * 1e-4)
    assert x[wavelength < 4300].mean() < 0.6 * x[(wavelength > 8000) & (wavelength < 8300)].mean()
    sodium = (wavelength > 5888) & (wavelength < 5902)
    assert x[sodium].mean() < 0.85 * x[(wavelength > 5860) & (wavelength < 5880)].mean()


# Cutouts


def save(path: Path, pixels: np.ndarray, kind: str = "JPEG") -> Path:
    Image.fromarray(pixels).save(path, kind)
    return path


def sky(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(20, 60, shape).astype(np.uint8)


def test_a_cutout_is_read_and_prepared(tmp_path):
    path = save(tmp_path / "a.jpg", sky(128, 128, 3))
    pixels, simulated = data.read_cutout(path, size=128)
    assert np.array_equal(pixels, np.asarray(Image.open(path))) and not simulated
    assert np.array_equal(data.prepare_cutout(pixels), pixels.transpose(2, 0, 1))
    large, _ = data.read_cutout(save(tmp_path / "b.jpg", sky(256, 256, 3)))
    assert data.prepare_cutout(large).shape == (3, 128, 128)


def test_what_is_no_cutout_is_refused(tmp_path):
    whole = save(tmp_path / "whole.jpg", sky(128, 128, 3)).read_bytes()
    black = sky(128, 128, 3)
    black[:, :90] = 0
    files = {
        "cut.jpg": (whole[: len(whole) // 2], "damaged"),
        "empty.jpg": (b"", "empty"),
        "html.jpg": (b"<html>", "not a JPEG"),
        "png.jpg": (save(tmp_path / "x.png", sky(128, 128, 3), "PNG").read_bytes(), "not a JPEG"),
        "grey.jpg": (save(tmp_path / "x1", sky(128, 128)).read_bytes(), "mode L"),
        "oblong.jpg": (save(tmp_path / "x2", sky(64, 128, 3)).read_bytes(), "128×64"),
        "black.jpg": (save(tmp_path / "x3", black).read_bytes(), "black tile"),
        "other.jpg": (save(tmp_path / "x4", sky(64, 64, 3)).read_bytes(), "64×64 pixels where 128×128"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            data.read_cutout(tmp_path / name, size=128)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="absent.jpg: cannot be read"):
        data.read_cutout(tmp_path / "absent.jpg")


# Writing


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with data.write_atomically(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), data.write_atomically(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_importing_any_script_does_nothing(tmp_path):
    scripts = [path.stem for path in ROOT.glob("*.py")]
    assert {"train", "model", "data", "download_sdss_data", "simulate_sdss_data"} <= set(scripts)
    done = subprocess.run(
        [sys.executable, "-c", f"import {', '.join(scripts)}"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
