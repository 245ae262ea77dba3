"""SDSS's files of one star, read and checked: the FITS spectrum and the JPEG cutout.

Neither carries a checksum: a value that was changed into another possible one is not noticed.

Sources: spectra, https://data.sdss.org/datamodel/files/SPECTRO_REDUX/RUN2D/spectra/lite/PLATE4/spec.html, and until
DR7 https://classic.sdss.org/dr7/dm/flatFiles/spSpec.html; the image size (128×128) is the paper's.
"""

import gzip
import io
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

IMAGE_SIZE = 128  # pixels a side
CUTOUT_SCALE = 0.2  # arcsec a pixel of a cutout: a field of 25.6″
SIMULATED_MARK = b"SIMULATED"  # in the JPEG comment of a simulated cutout

# No file of one star comes near this: a full BOSS spectrum has 3.2 MB.
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
    """(n,) arrays of an SDSS spectrum, and its star's position."""

    loglam: np.ndarray  # log10 of the vacuum wavelength in Å, float64, increasing
    flux: np.ndarray  # 1e-17 erg/s/cm²/Å, float32
    ivar: np.ndarray  # inverse variance of flux, float32; 0 marks a bad pixel
    ra: float  # degrees, NaN where the file does not say
    dec: float
    simulated: bool  # made by simulate_sdss_data.py
    path: Path


class Cutout(NamedTuple):
    pixels: np.ndarray  # (128, 128, 3) uint8, RGB
    simulated: bool  # made by simulate_sdss_data.py


def read_spectrum(path: Path, star: Star) -> Spectrum:
    """Read and check an SDSS spectrum: full, lite or spSpec, perhaps gzipped.

    Raises DataError if it is damaged, WrongFileError if it is another star's or does not say whose it is.
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
            header, last = hdus[0].header, hdus[len(hdus) - 1].fileinfo()  # len() reads all headers
            if last["datLoc"] + last["datSpan"] != len(content):
                raise DataError(f"{path}: {_DAMAGED}")
            is_image = header["NAXIS"] == 2 and "COEFF0" in header
            loglam, flux, ivar = _read_sp_spec(hdus[0]) if is_image else _read_coadd(hdus[1])
            ra, dec = (float(header.get(f"PLUG_{key}", header.get(f"{key}OBJ", "nan"))) for key in ("RA", "DEC"))
            simulated = bool(header.get("SIMULATD", False))
            _check_identity(path, header, star)
    except DataError:
        raise
    except OSError:  # in memory: a header without its end, or none where one must begin
        raise DataError(f"{path}: {_DAMAGED}") from None
    except _FITS_ERRORS as error:
        raise DataError(f"{path}: not an SDSS spectrum ({type(error).__name__}: {_first_line(error)})") from error

    loglam, flux, ivar = loglam.astype(np.float64), flux.astype(np.float32), ivar.astype(np.float32)
    if loglam.ndim != 1 or not loglam.size or not loglam.shape == flux.shape == ivar.shape:
        raise DataError(f"{path}: its table of loglam, flux and ivar is empty or not one-dimensional")
    if not np.isfinite(loglam).all() or (np.diff(loglam) <= 0).any():
        raise DataError(f"{path}: its wavelengths do not increase from pixel to pixel")
    if not (0 <= ra <= 360 and -90 <= dec <= 90):
        ra = dec = float("nan")
    return Spectrum(loglam, flux, ivar, ra, dec, simulated, path)


def _read_coadd(hdu: fits.BinTableHDU) -> list[np.ndarray]:
    """loglam, flux, ivar of the table that SDSS's files have since DR8; its other columns are not read."""
    columns = [np.asarray(hdu.data[name]) for name in ("loglam", "flux", "ivar")]
    if any(column.dtype.kind != "f" for column in columns):
        raise TypeError("loglam, flux or ivar is not of floating-point numbers")
    return columns


def _read_sp_spec(hdu: fits.PrimaryHDU) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """loglam, flux, ivar of SDSS's files until DR7: an image whose rows are flux, flux without continuum, noise, ..."""
    flux, _, noise = hdu.data[:3].astype(np.float64)
    loglam = hdu.header["COEFF0"] + hdu.header["COEFF1"] * np.arange(len(flux))
    return loglam, flux, np.divide(1, noise**2, out=np.zeros_like(noise), where=noise > 0)


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
