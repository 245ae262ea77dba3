"""Spectra and cutouts are read as SDSS, its users and their tools write them, or refused with a line that says why.

    MUTANTS=10000 python -m pytest tests/test_survey_files.py       as many spoilt copies of each file in place of 200

Neither SDSS's FITS files nor JPEG files carry a checksum: a flipped bit that leaves a possible flux or a possible
picture cannot be seen. The tests ask that nothing else comes through.
"""

import gzip
import io
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from common import SHARED_DATA
from PIL import Image, ImageDraw

import survey_files
from catalog import Star
from cli import DataError
from survey_files import UnreadableError, WrongFileError, read_cutout, read_spectrum

MUTANTS = int(os.environ.get("MUTANTS", "200"))
MOST_CHANGES = 20  # to a mutant
FITS_BLOCK = 2880  # bytes, of which the size of any FITS file is a multiple

STAR = Star("a", "M0", 300, 52000, 7, 150.0, 1.0)
PIXELS = 3840
GRID = (np.arange(PIXELS) + 35_800) * 1e-4
FLUX = 9 + np.sin(np.arange(PIXELS))
IVAR = np.full(PIXELS, 4.0)
IDENTITY = {"PLATEID": 300, "MJD": 52000, "FIBERID": 7}
POSITION = {"PLUG_RA": 150.5, "PLUG_DEC": -1.25, "RA": 151.0, "DEC": 0.0}  # RA, DEC: the plate's centre


def fits_bytes(*hdus, **cards) -> bytes:
    """A file of these HDUs, with these cards in its first header."""
    hdus = fits.HDUList([*hdus])
    hdus[0].header.update(cards)
    content = io.BytesIO()
    hdus.writeto(content)
    return content.getvalue()


def coadd(*others: fits.Column, **columns) -> fits.BinTableHDU:
    """SDSS's table, with other columns of these arrays (None: without) and more columns in front."""
    arrays = {"flux": FLUX, "loglam": GRID, "ivar": IVAR, "and_mask": np.zeros(PIXELS)} | columns
    kinds = {"and_mask": "J"}
    plain = [
        fits.Column(name, kinds.get(name, "E"), array=array) for name, array in arrays.items() if array is not None
    ]
    return fits.BinTableHDU.from_columns([*others, *plain], name="COADD")


def spectrum(table=None, **cards) -> bytes:
    return fits_bytes(fits.PrimaryHDU(), table or coadd(), **(IDENTITY | POSITION | cards))


def sp_spec(rows: int = 4) -> bytes:
    """The format until DR7: flux, flux without continuum, noise, mask; the noise of a bad pixel is 0."""
    image = np.zeros((rows, PIXELS), np.float32)
    image[0], image[2] = FLUX, 0.5
    lines = fits.BinTableHDU.from_columns([fits.Column("wave", "E", array=np.ones(44))])
    cards = {"COEFF0": GRID[0], "COEFF1": 1e-4, "RAOBJ": 150.5, "DECOBJ": -1.25, "RA": 151.0, "DEC": 0.0}
    return fits_bytes(fits.PrimaryHDU(image), lines, **IDENTITY, **cards)


def with_cards(content: bytes = b"", **values: str) -> bytes:
    """The file with other values of keywords of its table."""
    content = content or WHOLE
    for key, value in values.items():
        card = f"{key:8}= {value:>20}".ljust(80)
        content, changed = re.subn(f"{key:8}= .{{70}}".encode(), card.encode(), content, count=1)
        assert changed
    return content


WHOLE = spectrum()
UNSIGNED = fits.Column("or_mask", "J", bzero=2**31, array=np.full(PIXELS, 2**31, np.uint32))
BITS = fits.Column("bits", "11X", array=np.ones((PIXELS, 11), bool))
COMPLEX = fits.Column("transform", "M", array=np.ones(PIXELS, complex))
LISTS = fits.Column("lists", "PE()", array=np.array([np.ones(i % 3) for i in range(PIXELS)], dtype=object))
WORDS = fits.Column("words", "5A", array=["abc"] * PIXELS)

READ_SPECTRA: dict[str, bytes] = {
    "as SDSS writes it": WHOLE,
    "names in upper case": spectrum(coadd(flux=None, loglam=None, ivar=None, FLUX=FLUX, LOGLAM=GRID, IVAR=IVAR)),
    "other HDUs behind": fits_bytes(fits.PrimaryHDU(), coadd(), fits.ImageHDU(np.ones((7, 9))), fits.ImageHDU(),
                                    **IDENTITY, **POSITION),
    "gzip": gzip.compress(WHOLE),
    "unsigned masks": spectrum(coadd(UNSIGNED)),
    "unused columns of all kinds": spectrum(coadd(UNSIGNED, BITS, COMPLEX, LISTS, WORDS)),
    "double precision": spectrum(fits.BinTableHDU.from_columns(
        [fits.Column(name, "D", array=array) for name, array in (("loglam", GRID), ("ivar", IVAR), ("flux", FLUX))])),
    "cards that are not standard": spectrum().replace(b"PLUG_RA =", b"plug_ra ="),
    "spSpec": sp_spec(),
    "spSpec of five rows": sp_spec(5),
}  # fmt: skip


@pytest.mark.parametrize("case", READ_SPECTRA)
@pytest.mark.filterwarnings("error")
def test_a_spectrum_is_read(tmp_path, case):
    path = tmp_path / "a.fits"
    path.write_bytes(READ_SPECTRA[case])
    read = read_spectrum(path, STAR)
    assert (read.loglam.dtype, read.flux.dtype, read.ivar.dtype) == (np.float64, np.float32, np.float32)
    np.testing.assert_allclose(read.loglam, GRID, atol=3e-7)  # float32
    np.testing.assert_allclose(read.flux, FLUX, rtol=1e-6)
    np.testing.assert_allclose(read.ivar, IVAR, rtol=1e-6)
    assert read[3:] == (150.5, -1.25, False, path, 0.0, "")


@pytest.mark.parametrize("cards, position", [({"PLUG_DEC": -999.0}, (np.nan, np.nan)), ({}, (150.5, -1.25))])
def test_position_and_mark_of_a_simulated_star(tmp_path, cards, position):
    (tmp_path / "a.fits").write_bytes(spectrum(SIMULATD=True, **cards))
    read = read_spectrum(tmp_path / "a.fits", STAR)
    assert read.simulated
    np.testing.assert_equal((read.ra, read.dec), position)


RESULTS = {"PRIMTARGET": ("2J", [[1, 2]]), "CLASS": ("6A", ["STAR"]), "SUBCLASS": ("21A", ["M1 (204445)"]),
           "BITS": ("11X", np.ones((1, 11), bool)), "Z": ("E", [-1e-4])}  # fmt: skip


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, (-1e-4, "M1 (204445)")),
        ({"Z": ("D", [2e-4])}, (2e-4, "M1 (204445)")),
        ({"Z": ("E", [0.3])}, (0.0, "M1 (204445)")),
        ({"Z": ("E", [np.nan])}, (0.0, "M1 (204445)")),
        ({"SUBCLASS": ("21A", [""])}, (-1e-4, "")),
    ],
)
def test_redshift_and_subclass_are_the_pipelines(tmp_path, changes, expected):
    columns = [fits.Column(name, kind, array=array) for name, (kind, array) in (RESULTS | changes).items()]
    hdus = [fits.PrimaryHDU(), coadd(), fits.BinTableHDU.from_columns(columns)]
    (tmp_path / "a.fits").write_bytes(fits_bytes(*hdus, **IDENTITY))
    redshift, subclass = read_spectrum(tmp_path / "a.fits", STAR)[-2:]
    assert (redshift, subclass) == (pytest.approx(expected[0]), expected[1])


def test_a_file_that_the_catalogue_names_may_be_any_stars(tmp_path):
    (tmp_path / "a.fits").write_bytes(fits_bytes(fits.PrimaryHDU(), coadd()))
    assert len(read_spectrum(tmp_path / "a.fits", STAR._replace(file="a.fits")).flux) == PIXELS


def test_the_noise_of_a_bad_pixel(tmp_path):
    with fits.open(io.BytesIO(sp_spec())) as hdus:
        hdus[0].data[2, :3] = 0, np.nan, -1
        hdus.writeto(tmp_path / "a.fits")
    assert read_spectrum(tmp_path / "a.fits", STAR).ivar[:4].tolist() == [0, 0, 0, 4]


TRUNCATED = "the file is truncated or damaged; delete it and download it again"
NO_SPECTRUM = "not a spectrum as SDSS or LAMOST write it"
EMPTY = "its table of wavelength, flux and ivar is empty or not one-dimensional"
DISORDER = "its wavelengths do not increase"
OTHER_STAR, NO_STAR = "holds the spectrum of another star", "its header does not say which star it is"
SPECTRA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty; delete it and download it again"),
    "a page": (b"<!DOCTYPE html><title>503</title>", "not a FITS file (it begins with b'<!DOCTYPE html>"),
    "a picture": (b"\xff\xd8\xff\xe0" + bytes(3000), "not a FITS file"),
    "cut short": (WHOLE[:-1], TRUNCATED),
    "a block missing": (WHOLE[:-2880], TRUNCATED),
    "half": (WHOLE[: len(WHOLE) // 2], TRUNCATED),
    "a byte too many": (WHOLE + b"x", TRUNCATED),
    "zeros behind": (WHOLE + bytes(2880), TRUNCATED),
    "gzip cut short": (gzip.compress(WHOLE)[:-9], TRUNCATED),
    "gzip, damaged": (gzip.compress(WHOLE)[:500] + bytes(500) + gzip.compress(WHOLE)[1000:], TRUNCATED),
    "gzip of nothing": (gzip.compress(b""), "the file is empty"),
    "gzip of a page": (gzip.compress(b"<html>"), "not a FITS file"),
    "too large": (gzip.compress(bytes(survey_files.MAX_FILE_BYTES + 1), 1), "no file of one star is larger than"),
    "a header without end": (b"SIMPLE  = nonsense" * 160, TRUNCATED),
    "a header without words": (b"SIMPLE  =".ljust(80) + b"END".ljust(2800), TRUNCATED),
    "columns without end": (with_cards(TFIELDS="999999999"), TRUNCATED),
    "rows without end": (with_cards(NAXIS1="99999999999999"), TRUNCATED),
    "rows in words": (with_cards(NAXIS1="99999999999999", NAXIS2="'abc'"), NO_SPECTRUM),
    "axes without end": (with_cards(NAXIS="999999999"), TRUNCATED),
    "rows too short": (with_cards(NAXIS1="15"), TRUNCATED),
    "no HDU 1": (fits_bytes(fits.PrimaryHDU(), **IDENTITY), NO_SPECTRUM),
    "an image in HDU 1": (fits_bytes(fits.PrimaryHDU(), fits.ImageHDU(np.ones((3, 3))), **IDENTITY), NO_SPECTRUM),
    "an image of two rows": (fits_bytes(fits.PrimaryHDU(np.ones((2, 9))), COEFF0=3.5, COEFF1=1e-4), NO_SPECTRUM),
    "no loglam": (spectrum(coadd(loglam=None)), NO_SPECTRUM),
    "no flux": (spectrum(coadd(flux=None)), NO_SPECTRUM),
    "no ivar": (spectrum(coadd(ivar=None)), NO_SPECTRUM),
    "flux as whole numbers": (WHOLE.replace(b"TFORM1  = 'E", b"TFORM1  = 'J"), "not all of floating-point numbers"),
    "no rows": (spectrum(coadd(flux=[], loglam=[], ivar=[], and_mask=[])), EMPTY),
    "an array in each row": (spectrum(fits.BinTableHDU.from_columns(
        [fits.Column(name, "9E", array=np.ones((2, 9))) for name in ("loglam", "flux", "ivar")])), EMPTY),
    "from red to blue": (spectrum(coadd(loglam=GRID[::-1])), DISORDER),
    "one out of order": (spectrum(coadd(loglam=np.where(np.arange(PIXELS) == 9, GRID + 1, GRID))), DISORDER),
    "wavelength NaN": (spectrum(coadd(loglam=np.where(np.arange(PIXELS) == 9, np.nan, GRID))), DISORDER),
    "another plate": (spectrum(PLATEID=301), OTHER_STAR),
    "another night": (spectrum(MJD=52001), OTHER_STAR),
    "another fiber": (spectrum(FIBERID=8), OTHER_STAR),
    "SDSS-V": (fits_bytes(fits.PrimaryHDU(), coadd(), MJD=52000, FIELDID=17057, CATALOGID="27021598108289694"),
               f"{NO_STAR} (no PLATEID, FIBERID)"),
    "a table alone": (fits_bytes(fits.PrimaryHDU(), coadd()), f"{NO_STAR} (no PLATEID, MJD, FIBERID)"),
}  # fmt: skip


def assert_refused(read: Callable[[Path], object], path: Path, content: bytes, message: str) -> None:
    """The file with this content is refused in one line that names it and says why."""
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(path)
    error, line = raised.value, str(raised.value)
    assert line.startswith(f"{path}: ") and message in line
    assert len(line.splitlines()) == 1 and len(line) < 1000
    wrong_file = any(part in line for part in (OTHER_STAR, NO_STAR, "a colour cutout", "tile"))
    assert isinstance(error, WrongFileError) == wrong_file


@pytest.mark.parametrize("case", SPECTRA)
@pytest.mark.filterwarnings("error")
def test_a_wrong_spectrum_is_refused(tmp_path, case):
    assert_refused(lambda path: read_spectrum(path, STAR), tmp_path / "a.fits", *SPECTRA[case])


@pytest.mark.parametrize("read", [lambda path: read_spectrum(path, STAR), read_cutout])
def test_a_file_that_cannot_be_opened_may_be_good(tmp_path, read):
    with pytest.raises(UnreadableError, match="absent: cannot be read"):
        read(tmp_path / "absent")


@pytest.mark.parametrize("plate, mjd, fiberID", [(618, 52049, 372), (1123, 52882, 65), (5047, 55833, 936)])
def test_real_sdss_spectra_are_read_as_astropy_reads_them(plate, mjd, fiberID):
    star = Star("real", "M1", plate, mjd, fiberID)
    path = SHARED_DATA / f"spec-{star.spectrum_id}.fits"
    if not path.exists():
        pytest.skip(f"the real spectra are not in {SHARED_DATA} (SHARED_DATA names their folder)")
    read = read_spectrum(path, star)
    with fits.open(path) as hdus:
        for name in ("loglam", "flux", "ivar"):
            assert np.array_equal(getattr(read, name), hdus[1].data[name])
        assert (read.ra, read.dec) == (hdus[0].header["PLUG_RA"], hdus[0].header["PLUG_DEC"])
    pixel = read.loglam * survey_files.PIXELS_PER_DEX
    assert np.abs(pixel - np.rint(pixel)).max() < 0.01 and not read.simulated


def test_real_sp_spec_files_are_read():
    paths = sorted((SHARED_DATA / "hammer").glob("spSpec-*.fit"))
    if not paths:
        pytest.skip(f"no spSpec files in {SHARED_DATA / 'hammer'} (SHARED_DATA names the folder above)")
    for path in paths:
        mjd, plate, fiberID = map(int, path.stem.split("-")[1:])
        read = read_spectrum(path, Star("real", "M1", plate, mjd, fiberID))
        assert len(read.loglam) == 3820 and (read.ivar > 0).mean() > 0.9 and np.isfinite([read.ra, read.dec]).all()
        assert 2 < np.median(read.flux * np.sqrt(read.ivar)) < 100  # the signal-to-noise ratio


# Cutouts


def jpeg(image: Image.Image | np.ndarray, kind: str = "JPEG", **options) -> bytes:
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, kind, **options)
    return content.getvalue()


def star_on_sky(size: int = 128, low: int = 8, high: int = 30, peak: float = 200, width: float = 4) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    star = peak * np.exp(-(x**2 + y**2) / (2 * width**2))[..., None]
    return (star + np.random.default_rng(0).uniform(low, high, (size, size, 3))).clip(0, 255).astype(np.uint8)


def words(background: str, ink: str, top: int) -> bytes:
    image = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(image).text((2, top), "Requested field\nis not available", fill=ink)
    return jpeg(image, quality=90)


def resized(content: bytes, height: int, width: int) -> bytes:
    """A JPEG that says in its header that it has another size."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


PICTURE = jpeg(star_on_sky())
HALF_BLACK = star_on_sky()
HALF_BLACK[:, :70] = 0

READ_CUTOUTS: dict[str, bytes] = {
    "a star on the sky": PICTURE,
    "less than half black": jpeg(np.where(np.arange(128)[:, None, None] < 60, 0, star_on_sky()).astype(np.uint8)),
    "a bright star on a black sky": jpeg(star_on_sky(low=0, high=0.9)),
    "a faint star on a black sky": jpeg(star_on_sky(low=0, high=0.9, peak=20, width=3)),
    "coarsely compressed": jpeg(star_on_sky(low=0, high=4, peak=60, width=3), quality=60),
}


@pytest.mark.parametrize("case", READ_CUTOUTS)
@pytest.mark.parametrize("comment", [b"", survey_files.SIMULATED_MARK])
def test_a_cutout_is_read(tmp_path, case, comment):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg(Image.open(io.BytesIO(READ_CUTOUTS[case])), quality="keep", comment=comment))
    pixels, simulated = read_cutout(path)
    assert (
        np.array_equal(pixels, np.asarray(Image.open(path)))
        and pixels.shape == (128, 128, 3)
        and simulated == bool(comment)
    )


CUTOUTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "a page": (b"<html>", "not a JPEG image"),
    "only the mark": (PICTURE[:3], "not a JPEG image"),
    "half": (PICTURE[: len(PICTURE) // 2], "a damaged JPEG image"),
    "without its last bytes": (PICTURE[:-20], "a damaged JPEG image"),
    "0 × 0": (resized(PICTURE, 0, 0), "JPEG image"),
    "another scale": (jpeg(star_on_sky(256)), "not a colour cutout of 128×128 pixels (256×256, mode RGB)"),
    "too small": (jpeg(star_on_sky(64)), "not a colour cutout of 128×128 pixels (64×64, mode RGB)"),
    "oblong": (jpeg(star_on_sky()[:, :64]), "(64×128, mode RGB)"),
    "grey": (jpeg(star_on_sky()[..., 0]), "(128×128, mode L)"),
    "for printers": (jpeg(Image.fromarray(star_on_sky()).convert("CMYK")), "(128×128, mode CMYK)"),
    "PNG": (jpeg(star_on_sky(), "PNG"), "not a JPEG image"),
    "TIFF": (jpeg(star_on_sky(), "TIFF"), "not a JPEG image"),
    "a bomb": (resized(PICTURE, 65_500, 65_500), "a damaged JPEG image"),
    "a smaller bomb": (resized(PICTURE, 10_000, 10_000), "(10000×10000, mode RGB)"),
    "black": (jpeg(Image.new("RGB", (128, 128))), "a black tile: the star lies outside the imaging footprint"),
    "at the footprint's edge": (jpeg(HALF_BLACK), "a black tile"),
    "grey all over": (jpeg(Image.new("RGB", (128, 128), "grey")), "a blank tile"),
    "words": (words("white", "black", 4), "a blank tile"),
    "words in the middle": (words("white", "black", 54), "a blank tile"),
    "white words in the middle": (words("black", "white", 54), "a black tile"),
}


@pytest.mark.parametrize("case", CUTOUTS)
@pytest.mark.filterwarnings("error")
def test_a_wrong_cutout_is_refused(tmp_path, case):
    assert_refused(read_cutout, tmp_path / "a.jpg", *CUTOUTS[case])


# Files cut anywhere, and with flipped bits


def small_spectrum() -> bytes:
    pixels = {name: array[:60] for name, array in (("flux", FLUX), ("loglam", GRID), ("ivar", IVAR))}
    return spectrum(coadd(**pixels, and_mask=np.zeros(60)))


@pytest.mark.parametrize(
    ("content", "read", "step"),
    [
        (small_spectrum(), lambda path: np.stack(read_spectrum(path, STAR)[:3]), 97),
        (PICTURE, lambda path: read_cutout(path).pixels, 13),
    ],
    ids=["spectrum", "cutout"],
)
def test_a_file_cut_anywhere_is_refused(tmp_path, content, read, step):
    path = tmp_path / "a"
    for length in {*range(0, len(content), step), *range(0, len(content), FITS_BLOCK), len(content) - 1} - {
        len(content)
    }:
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=re.escape(str(path))):
            read(path)


def mutant(content: bytes, chance: random.Random) -> bytes:
    """The content with some bytes changed, lost, doubled or zeroed."""
    changed = bytearray(content)
    # Half of the mutants are spoilt in the headers, where few bytes mean much.
    end = len(content) if chance.random() < 0.5 else min(len(content), 4 * FITS_BLOCK)
    for _ in range(chance.choice([1, 1, 1, 2, 5, MOST_CHANGES])):
        place, length = chance.randrange(end), chance.choice([1, 4, 80])
        match chance.randrange(6):
            case 0 | 1:
                changed[place] ^= 1 << chance.randrange(8)
            case 2:
                changed[place] = chance.randrange(256)
            case 3:
                changed[place : place + length] = bytes(len(changed[place : place + length]))
            case 4:
                del changed[place : place + length]
            case 5:
                changed[place:place] = changed[place : place + length]
        end = min(end, len(changed))
    return bytes(changed)


def try_mutants(content: bytes, path: Path, check: Callable[[Path], None]) -> None:
    """`check` reads a mutant and compares it with the original, unless it is refused in one line."""
    accepted = 0
    for seed in range(MUTANTS):
        path.write_bytes(mutant(content, random.Random(seed)))
        try:
            check(path)
            accepted += 1
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, f"mutant {seed}"
        except Exception as error:
            raise AssertionError(f"mutant {seed}") from error
    assert 0 < accepted < MUTANTS  # both sides of the test are at work


@pytest.mark.filterwarnings("error")
def test_mutants_of_a_spectrum_are_refused_or_keep_their_wavelengths(tmp_path):
    path = tmp_path / "a.fits"
    path.write_bytes(WHOLE)
    original = read_spectrum(path, STAR)

    def check(path: Path) -> None:
        read = read_spectrum(path, STAR)
        count = len(read.loglam)  # less than all where the header's number of rows was hit
        assert PIXELS - FITS_BLOCK // 16 < count <= PIXELS
        different = [
            (getattr(read, name) != getattr(original, name)[:count]).sum() for name in ("loglam", "flux", "ivar")
        ]
        assert sum(different) <= FITS_BLOCK // 16 * MOST_CHANGES

    try_mutants(WHOLE, path, check)


@pytest.mark.filterwarnings("error")
def test_mutants_of_a_cutout_are_refused_or_pictures_of_the_same_size(tmp_path):
    def check(path: Path) -> None:
        pixels, _ = read_cutout(path)
        assert pixels.shape == (128, 128, 3) and pixels.dtype == np.uint8

    try_mutants(PICTURE, tmp_path / "a.jpg", check)
