"""The files of one star, read and checked: a FITS spectrum of SDSS or LAMOST, and SDSS's JPEG cutout.

The files carry no checksum: corruption of one value into another plausible one goes unnoticed.

Sources: SDSS's spectra, https://data.sdss.org/datamodel/files/SPECTRO_REDUX/RUN2D/spectra/lite/PLATE4/spec.html, and
until DR7 https://classic.sdss.org/dr7/dm/flatFiles/spSpec.html; LAMOST's low-resolution spectra,
http://www.lamost.org/dr8/v1.0/doc/lr-data-production-description.
"""

import gzip
import io
import math
import re
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from PIL import Image, UnidentifiedImageError

from catalog import Star
from cli import DataError

# SDSS spectra lie on one grid, loglam = pixel * 1e-4 with loglam = log10(vacuum wavelength / Å).
PIXELS_PER_DEX = 10_000

MAX_REDSHIFT = 0.005  # 1500 km/s: no star of the Galaxy is faster
_MIN_WAVELENGTH = 1000  # Å; an spSpec's noise is never as large
# Bytes of a value in a FITS table, by the letter of its format: FITS standard 4.0, table 18
_BYTES = {"L": 1, "X": 1 / 8, "B": 1, "I": 2, "J": 4, "K": 8, "A": 1, "E": 4, "D": 8, "C": 8, "M": 16, "P": 8, "Q": 16}

IMAGE_SIZE = 128  # pixels a side, as in an earlier reproduction; the authors' code takes any size
CUTOUT_SCALE = 0.2  # arcsec a pixel of a cutout: a field of 25.6″
SIMULATED_MARK = b"SIMULATED"  # in the JPEG comment of a simulated cutout

# Far above any file of one star: a full BOSS spectrum has 3.2 MB.
MAX_FILE_BYTES = 64 * 2**20

# A cutout from outside the footprint is black, and an error is text on one colour. A real one with a very dark sky has
# its star in the middle.
_MAX_FRACTION_OF_ONE_COLOUR = 0.5
_MIDDLE = slice(IMAGE_SIZE // 2 - 4, IMAGE_SIZE // 2 + 4)
_MAX_FRACTION_IN_THE_MIDDLE = 0.2  # letters there leave more than a quarter of the background, faint stars a tenth

_DAMAGED = "the file is truncated or damaged; delete it and download it again"
# The FITS standard allows 999 axes and columns; astropy would loop over as many as a damaged header says.
_TOO_MANY = re.compile(rb"(NAXIS   |TFIELDS )= *\d{4}")

# What astropy and Pillow raise on files that are damaged or something else.
_FITS_ERRORS = (
    ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, OverflowError, MemoryError,
    fits.VerifyError,
)  # fmt: skip
_JPEG_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnreadableError(DataError):
    """A file is there, but the system does not let it be read; its content may be good."""


class WrongFileError(DataError):
    """A file is whole, but not the wanted one."""


class Spectrum(NamedTuple):
    """(n,) arrays of a spectrum, and what its file says about the star."""

    loglam: np.ndarray  # log10 of the vacuum wavelength in Å, float64, increasing
    flux: np.ndarray  # 1e-17 erg/s/cm²/Å; LAMOST's is relative; float32
    ivar: np.ndarray  # inverse variance of flux, float32; 0 marks a bad pixel
    ra: float  # degrees, NaN where the file does not say
    dec: float
    simulated: bool  # made by simulate_sdss_data.py
    path: Path
    redshift: float = 0.0  # as the survey's pipeline measured it; 0 where unknown, or impossible for a star
    subclass: str = ""  # as the pipeline wrote it, "M3", "M1 (204445)", "sdM1"; "" where the file has none


class Cutout(NamedTuple):
    pixels: np.ndarray  # (128, 128, 3) uint8, RGB
    simulated: bool  # made by simulate_sdss_data.py


def read_spectrum(path: Path, star: Star) -> Spectrum:
    """Read and check a spectrum of SDSS (full, lite or spSpec) or LAMOST (before or since DR8), perhaps gzipped.

    Raises DataError if it is damaged or something else, WrongFileError if it is another star's or does not say whose
    it is: unless the catalogue names the file, plate, mjd and fiberID must be the star's.
    """
    content = read_bytes(path)
    if not content.startswith(b"SIMPLE  ="):
        raise DataError(f"{path}: not a FITS file (it begins with {content[:20]!r})")
    if _TOO_MANY.search(content):
        raise DataError(f"{path}: {_DAMAGED}")
    try:
        with (
            warnings.catch_warnings(action="ignore", category=AstropyWarning),
            fits.open(io.BytesIO(content)) as hdus,
        ):
            last = hdus[len(hdus) - 1].fileinfo()  # len() reads all headers
            if last["datLoc"] + last["datSpan"] != len(content):
                raise DataError(f"{path}: {_DAMAGED}")
            spectrum = _read_hdus(path, hdus, content)
            if not star.file:
                _check_identity(path, hdus[0].header, star)
    except DataError:
        raise
    except OSError:  # in memory: a header without its end, or none where one must begin
        raise DataError(f"{path}: {_DAMAGED}") from None
    except _FITS_ERRORS as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise DataError(f"{path}: not a spectrum as SDSS or LAMOST write it ({reason})") from error

    loglam, flux, ivar = spectrum[:3]
    if loglam.ndim != 1 or not loglam.size or not loglam.shape == flux.shape == ivar.shape:
        raise DataError(f"{path}: its table of wavelength, flux and ivar is empty or not one-dimensional")
    if not np.isfinite(loglam).all() or (np.diff(loglam) <= 0).any():
        raise DataError(f"{path}: its wavelengths do not increase from pixel to pixel")
    if not (0 <= spectrum.ra <= 360 and -90 <= spectrum.dec <= 90):
        spectrum = spectrum._replace(ra=math.nan, dec=math.nan)
    return spectrum


def _read_hdus(path: Path, hdus: fits.HDUList, content: bytes) -> Spectrum:
    """The spectrum in whichever format, its values not checked."""
    header = hdus[0].header
    is_image = header["NAXIS"] == 2
    is_lamost, *arrays = _read_image(hdus[0]) if is_image else _read_table(hdus[1])
    if is_lamost and not header.get("VACUUM", True):
        raise DataError(f"{path}: its wavelengths are in air (VACUUM = F); convert them to vacuum")
    # RA and DEC of SDSS's header are the plate's centre.
    sdss_keys = ("PLUG_RA", "PLUG_DEC") if "PLUG_RA" in header else ("RAOBJ", "DECOBJ")
    ra, dec = (float(header.get(key, "nan")) for key in (("RA", "DEC") if is_lamost else sdss_keys))
    redshift, subclass = header.get("Z"), header.get("SUBCLASS")
    if not (is_image or is_lamost):
        redshift, subclass = _read_spec_obj(hdus[2], content) if len(hdus) > 2 else (0.0, "")
    return Spectrum(
        *(array.astype(kind) for array, kind in zip(arrays, (np.float64, np.float32, np.float32), strict=True)),
        ra,
        dec,
        simulated=bool(header.get("SIMULATD", False)),
        path=path,
        redshift=redshift if isinstance(redshift, float) and abs(redshift) <= MAX_REDSHIFT else 0.0,
        subclass=subclass if isinstance(subclass, str) else "",
    )


def _read_image(hdu: fits.PrimaryHDU) -> tuple[bool, np.ndarray, np.ndarray, np.ndarray]:
    """Whether the file is LAMOST's; loglam, flux, ivar. Both surveys wrote images until their DR7.

    The rows are flux, flux without continuum, noise in SDSS's, and flux, inverse variance, wavelength in LAMOST's.
    """
    flux, second, third = hdu.data[:3].astype(np.float64)
    if np.mean(third > _MIN_WAVELENGTH) > 0.5:
        return True, _log10(third), flux, second
    if "PLATEID" not in hdu.header:
        raise ValueError("an image with neither wavelengths in its third row nor PLATEID in its header")
    loglam = hdu.header["COEFF0"] + hdu.header["COEFF1"] * np.arange(len(flux))
    return False, loglam, flux, np.divide(1, third**2, out=np.zeros_like(third), where=third > 0)


def _read_table(hdu: fits.BinTableHDU) -> tuple[bool, np.ndarray, np.ndarray, np.ndarray]:
    """Whether the file is LAMOST's; loglam, flux, ivar. Both surveys write tables since their DR8.

    SDSS's have a row per pixel, LAMOST's a single row of arrays. Other columns are not read.
    """
    is_lamost = "WAVELENGTH" in map(str.upper, hdu.columns.names)
    names = ("WAVELENGTH" if is_lamost else "loglam", "flux", "ivar")
    wavelength, flux, ivar = (np.asarray(hdu.data[name]) for name in names)
    if {wavelength.dtype.kind, flux.dtype.kind, ivar.dtype.kind} != {"f"}:
        raise TypeError(f"{', '.join(names)} are not all of floating-point numbers")
    if is_lamost:
        return True, _log10(wavelength[0]), flux[0], ivar[0]
    return False, wavelength, flux, ivar


def _log10(wavelength: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):  # of a damaged file
        return np.log10(wavelength.astype(np.float64))


def _read_spec_obj(hdu: fits.BinTableHDU, content: bytes) -> tuple[float, str]:
    """Redshift and subclass in the first row of SDSS's table of results, HDU 2; 0 and "" where it has none.

    Its cells are cut out of the content: astropy takes longer for its 232 columns than for the spectrum.
    """
    places = hdu.fileinfo()
    header, start = content[places["hdrLoc"] : places["datLoc"]], places["datLoc"]
    names, cells = dict(re.findall(rb"TTYPE(\d+) *= *'(\w+)", header)), {}
    for number, count, kind in re.findall(rb"TFORM(\d+) *= *'(\d*)([A-Z])", header):
        end = start + math.ceil(int(count or 1) * _BYTES[kind.decode()])
        cells[names.get(number)], start = content[start:end], end
    if b"Z" not in cells:
        return 0.0, ""
    redshift = np.frombuffer(cells[b"Z"], f">f{len(cells[b'Z'])}")  # of single or double precision
    return float(redshift[0]), cells.get(b"SUBCLASS", b"").decode().strip("\0 ")


def _check_identity(path: Path, header: fits.Header, star: Star) -> None:
    wanted = {"PLATEID": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID}
    if missing := [key for key in wanted if key not in header]:
        raise WrongFileError(f"{path}: its header does not say which star it is (no {', '.join(missing)})")
    stated = {key: header[key] for key in wanted}
    if stated != wanted:
        raise WrongFileError(f"{path}: holds the spectrum of another star ({stated}, not {wanted})")


def read_cutout(path: Path) -> Cutout:
    """Read and check a JPEG cutout.

    Raises DataError if it is damaged, WrongFileError if it is no colour image of 128×128 pixels or blank: from
    outside the footprint, or an error that the server drew.
    """
    content = read_bytes(path)
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # the size is checked
            image = Image.open(io.BytesIO(content), formats=["JPEG"])
        with image:
            if image.mode != "RGB" or image.size != (IMAGE_SIZE, IMAGE_SIZE):
                raise WrongFileError(
                    f"{path}: not a colour cutout of {IMAGE_SIZE}×{IMAGE_SIZE} pixels ({image.width}×{image.height}, "
                    f"mode {image.mode}); delete it and download it again"
                )
            pixels = np.asarray(image)
            colours = np.asarray(image.convert("RGBX")).view(np.uint32)[..., 0]  # a number for each colour
            simulated = SIMULATED_MARK in image.info.get("comment", b"")
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a JPEG image") from None
    except DataError:
        raise
    except _JPEG_ERRORS as error:
        raise DataError(f"{path}: a damaged JPEG image ({_first_line(error)})") from error
    # A colour of more than half of the pixels is their median, in whichever order.
    filled = colours == np.partition(colours, colours.size // 2, axis=None)[colours.size // 2]
    middle = filled[_MIDDLE, _MIDDLE]
    if filled.mean() > _MAX_FRACTION_OF_ONE_COLOUR and middle.mean() > _MAX_FRACTION_IN_THE_MIDDLE:
        kind = "blank" if pixels[filled].any() else "black"
        raise WrongFileError(
            f"{path}: a {kind} tile: the star lies outside the imaging footprint, or the server drew an error"
        )
    return Cutout(pixels, simulated)


def read_bytes(path: Path) -> bytes:
    """The file's content, uncompressed if it is gzipped. Raises DataError if it is empty, damaged or too large."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_FILE_BYTES + 1)
        except (OSError, EOFError, zlib.error):
            raise DataError(f"{path}: {_DAMAGED}") from None
    if len(content) > MAX_FILE_BYTES:
        raise DataError(f"{path}: no file of one star is larger than {MAX_FILE_BYTES} bytes")
    if not content:
        raise DataError(f"{path}: the file is empty; delete it and download it again")
    return content


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
