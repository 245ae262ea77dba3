"""A star's catalogue row and its two files: where they lie, how they are read, checked and prepared.

    data directory/
        objects.csv                                     name, subclass, plate, mjd, fiberID [, ra, dec, …]
        spectra/{subclass}/spec-{plate}-{mjd}-{fiberID}.fits
        images/{subclass}/{name}_image.jpg

The downloader writes these files, the simulator imitates them, the trainer reads them; all three
ask this module for names, places and checks.

Sources: SDSS DR16 spectra, https://data.sdss.org/datamodel/files/SPECTRO_REDUX/RUN2D/spectra/lite/
PLATE4/spec.html; specObjID, https://www.sdss.org/dr16/help/glossary/#specobj; the wavelength range
(4000–9000 Å, 3522 values) and the image size (128×128) are the paper's.
"""

import argparse
import contextlib
import contextvars
import csv
import functools
import io
import math
import os
import re
import sys
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord, search_around_sky
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from PIL import Image, UnidentifiedImageError
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

CLASS_NAMES = ("M0", "M1", "M2", "M3", "M4")

# SDSS spectra lie on one grid, loglam = pixel * 1e-4 with loglam = log10(vacuum wavelength / Å);
# pixels 36021…39542 are all those between 4000 and 9000 Å, and exactly the paper's 3522 values.
PIXELS_PER_DEX = 10_000
FIRST_PIXEL = 36021
SPECTRUM_LENGTH = 3522
MIN_GOOD_FRACTION = 0.5  # a spectrum with fewer good pixels in the window is not used

# Flux is divided by its median, then clipped: real M0–M5 dwarfs stay within 0…5.2 of their median
# (Kesseli et al. 2017 templates), so only cosmic rays and failed sky subtraction are cut.
SCALED_FLUX_RANGE = (-1.0, 6.0)

IMAGE_SIZE = 128  # pixels a side
CUTOUT_SCALE = 0.2  # arcsec a pixel of a cutout: a field of 25.6″
# A cutout from outside the footprint is black, and an error is text on one colour; the sky is nowhere without noise.
MAX_FRACTION_OF_ONE_COLOUR = 0.5
CUTOUT_SIZES = (64, 2048)  # pixels a side, the cutout service's own limits

SIMULATED_MARK = b"SIMULATED"  # in the JPEG comment of a cutout that simulate_sdss_data.py made

# No file of one star comes near this: a full BOSS spectrum has 3.2 MB, a 2048-pixel cutout 2 MB.
MAX_FILE_BYTES = 64 * 2**20

_REQUIRED_COLUMNS = ("name", "subclass", "plate", "mjd", "fiberID")
_IDENTIFIER_RANGES = {"plate": (1, 2**14 - 1), "mjd": (50_000, 50_000 + 2**14 - 1), "fiberID": (1, 2**12 - 1)}
# A name becomes part of a file's name on any system: no separators, no leading dot, no wildcards.
_SAFE_NAME = re.compile(r"\w[\w .+\-]*")
_MAX_NAME_BYTES = 100  # file systems allow 255, of which ours take some
# 3.07417E+17, or with all digits, of which a spreadsheet keeps 15
_SPREADSHEET_NUMBER = re.compile(r"\d([.,]\d+)?[eE]\+?\d+|\d{14,17}000")
_BOSS_SUBCLASS = re.compile(r"(M\d) \(\d+\)")  # "M1 (204445)": the class, and the star of the template

# DR16 holds plates below the first number under run2d 26, and those from the second on as BOSS and eBOSS.
FIRST_PLATE_BEYOND_26 = 1960
FIRST_BOSS_PLATE = 3523

SAME_STAR_ARCSEC = 2.0  # rows closer than this on the sky are one star observed twice

FITS_BLOCK = 2880  # bytes, of which the size of any FITS file, and of each header in it, is a multiple
_HEADER_CARDS = re.compile(rb"(?:(?!END {77}).{80}){0,9999}END {77}", re.DOTALL)  # SDSS's have up to about 300
MAX_TABLE_COLUMNS = 999  # FITS standard 4.0, 7.3.1
_FITS_TYPES = {"L": "i1", "B": "u1", "I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8", "A": "S1"}

# What astropy and Pillow raise on files that are damaged or something else.
_FITS_ERRORS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError, OverflowError,
    MemoryError, fits.VerifyError,
)  # fmt: skip
_JPEG_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataError(ValueError):
    """Something of the user's cannot be used; the message says what, in which file, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class UnreadableError(DataError):
    """A file is there, but the system does not let it be read; its content may be good."""


class WrongFileError(DataError):
    """A file is whole, but not what its name says."""


def printable(text: str) -> str:
    """The text with its line breaks and control characters, which could command a terminal, written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_as_script(main: Callable[[], None]) -> None:
    """Run `main`; end with one clear line and exit status 1 on what a user can mend, 130 on Ctrl-C."""
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def number_between(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a whole number or a number from `low` to `high`."""

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")

    return number


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every default, and the examples as they are written."""


class ScriptParser(argparse.ArgumentParser):
    """The options of a script whose docstring is, by paragraphs, a title, examples, and notes: all shown by --help."""

    def __init__(self, docstring: str, **options: Any) -> None:
        title, examples, *notes = docstring.strip().split("\n\n")
        epilog = "\n\n".join([f"examples:\n{examples}", *notes])
        super().__init__(description=title, epilog=epilog, formatter_class=_Help, **options)

    def add_quiet(self) -> None:
        self.add_argument("--quiet", action="store_true", help="print errors alone, and show no progress")


_quiet = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Inside, if `quiet`, nothing goes to the standard output and no progress is shown; errors come as ever."""
    if not quiet:
        yield
        return
    before = _quiet.set(True)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        _quiet.reset(before)


class _Lines(io.TextIOBase):
    """What a progress bar writes, a line each time."""

    def write(self, text: str) -> int:
        if shown := text.strip():
            sys.stderr.write(f"{shown}\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A bar with rate and time left, gone at the end; where no terminal shows it move, a line every ten seconds."""
    if _quiet.get():
        options["disable"] = True
    if not sys.stderr.isatty():
        layout = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left"
        options |= {"file": _Lines(), "delay": 10, "mininterval": 10, "maxinterval": 30, "bar_format": layout}
    return tqdm(iterable, leave=False, **options)


def partial_path(path: Path) -> Path:
    """A name of its own beside `path`, for what is to become `path` when it is whole."""
    return path.with_name(f".{path.stem}-{uuid.uuid4().hex}.partial{path.suffix}")


def remove_leftovers(path: Path) -> None:
    """Delete what killed processes had begun to write in place of `path`, whose name may have wildcards; nobody may
    be writing it now."""
    for leftover in path.parent.glob(f".{path.stem}-*.partial{path.suffix}"):
        leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block succeeds, what was written there becomes `path`.

    Whatever happens inside, and whenever the process dies, `path` holds either its old content or
    the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_foreign_file(path: Path, mark: str) -> None:
    """Raise DataError if `path` is there but no earlier output of the script that asks, which begins with `mark`."""
    if path.exists():
        with open(path, "rb") as file:
            if mark.encode() not in file.read(1024):
                raise DataError(f"{path}: is there already, and this script did not write it; give another --output")


# The catalogue


class Star(NamedTuple):
    """One row of the catalogue. `ra` and `dec` are degrees (J2000), NaN where the catalogue has none."""

    name: str
    subclass: str
    plate: int
    mjd: int
    fiberID: int
    ra: float = float("nan")
    dec: float = float("nan")
    simulated: bool = False

    @property
    def spectrum_id(self) -> str:
        """SDSS's own label of a spectrum, unique in a catalogue: plate-mjd-fiberID."""
        return f"{self.plate:04d}-{self.mjd:05d}-{self.fiberID:04d}"


def describe(stars: list[Star]) -> str:
    """How many stars these are, and that they are simulated where they are; every output shows it."""
    simulated = sum(star.simulated for star in stars)
    if simulated in (0, len(stars)):
        return f"{len(stars)} {'SIMULATED ' if simulated else ''}stars"
    return f"{len(stars)} stars, {simulated} of them SIMULATED"


def catalog_path(data_dir: Path) -> Path:
    return Path(data_dir) / "objects.csv"


def spectrum_path(data_dir: Path, star: Star) -> Path:
    return Path(data_dir) / "spectra" / star.subclass / f"spec-{star.spectrum_id}.fits"


def cutout_path(data_dir: Path, star: Star) -> Path:
    return Path(data_dir) / "images" / star.subclass / f"{star.name}_image.jpg"


def find_spectrum(data_dir: Path, star: Star) -> Path | None:
    """The star's spectrum: at its place or, as for a star without label, in spectra/ or any folder of it."""
    return _find(spectrum_path(data_dir, star), Path(data_dir) / "spectra")


def find_cutout(data_dir: Path, star: Star) -> Path | None:
    """The star's cutout: at its place or, as for a star without label, in images/ or any folder of it."""
    return _find(cutout_path(data_dir, star), Path(data_dir) / "images")


def _find(usual: Path, folder: Path) -> Path | None:
    places = (usual, folder / usual.name, *sorted(folder.glob(f"*/{usual.name}")))
    return next((path for path in places if path.exists()), None)


def read_catalog(path: Path, *, labelled: bool = True) -> tuple[list[Star], Counter[str]]:
    """Read the stars of classes M0…M4 from a CSV file.

    With `labelled` false the stars of any class or none are read, and the column subclass may be
    absent; what it holds other than M0…M4 becomes "".

    Returns the stars in the file's order and, by reason, the number of rows left out: other classes
    and rows that repeat a spectrum. BOSS's "M1 (204445)" counts as M1.
    Raises DataError, naming line and column, where a cell cannot be what its column says.
    """
    stars: dict[str, Star] = {}
    left_out: Counter[str] = Counter()
    required = tuple(column for column in _REQUIRED_COLUMNS if labelled or column != "subclass")
    for where, row in _read_rows(path, required):
        subclass = row.get("subclass", "")
        if boss := _BOSS_SUBCLASS.fullmatch(subclass):
            subclass = boss[1]
        if subclass not in CLASS_NAMES and not labelled:
            subclass = ""
        elif subclass not in CLASS_NAMES:
            left_out[f"subclass {printable(subclass) or '(empty)'} is not one of {', '.join(CLASS_NAMES)}"] += 1
            continue
        star = _parse_row(row, subclass, where)
        first = stars.setdefault(star.spectrum_id, star)
        if first is not star:
            if labelled and first.subclass != star.subclass:
                raise DataError(
                    f"{where}: spectrum {star.spectrum_id} is {star.subclass} here and "
                    f"{first.subclass} further up; keep the line that is right"
                )
            left_out["repeats a spectrum listed further up"] += 1
    if not stars:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items())
        wanted = f"star of class {', '.join(CLASS_NAMES)}" if labelled else "star"
        raise DataError(f"{path}: no {wanted} in it ({reasons or 'no rows'})")
    return list(stars.values()), left_out


def _read_rows(path: Path, required: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of the CSV file by column, as text, and where it stands ("objects.csv, line 7").

    As text: a specObjID is a 64-bit integer, which a float, or int64 for plates from 8192 on, cannot hold.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            if header and header[0].startswith("#"):  # SkyServer's answers begin with "#Table1"
                header = next(lines, [])
            header = [column.strip() for column in header]
            if not header:
                raise DataError(f"{path}: the file is empty")
            if len(set(header)) < len(header):
                raise DataError(f"{path}: a column stands twice in the header line, {', '.join(header)}")
            missing = [column for column in required if column not in header]
            if missing:
                raise DataError(
                    f"{path}: column {', '.join(missing)} is missing; the header line reads {' | '.join(header)} "
                    f"(needed, separated by commas: {', '.join(required)})"
                )
            for cells in lines:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{path}, line {lines.line_num}"
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells where the header has {len(header)} columns")
                yield where, {column: cell.strip() for column, cell in zip(header, cells, strict=True)}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it is the list of stars (columns {', '.join(required)})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a comma-separated UTF-8 text file ({error})") from None


def _parse_row(cells: dict[str, str], subclass: str, where: str) -> Star:
    name = cells["name"]
    if _SPREADSHEET_NUMBER.fullmatch(name) and not decode_spec_obj_id(name):
        raise DataError(
            f"{where}, column name: {name} is a specObjID rounded by a spreadsheet, its last digits are lost; "
            "export the catalogue again with this column formatted as text"
        )
    if not _SAFE_NAME.fullmatch(name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise DataError(
            f"{where}, column name: {name[:_MAX_NAME_BYTES]!r} cannot name a file (letters, digits, '_', '.', '+', "
            f"'-', spaces; at most {_MAX_NAME_BYTES} bytes)"
        )
    return Star(
        name=name,
        subclass=subclass,
        **{column: _parse_integer(cells[column], column, where) for column in _IDENTIFIER_RANGES},
        ra=_parse_degrees(cells.get("ra", ""), "ra", 0, 360, where),
        dec=_parse_degrees(cells.get("dec", ""), "dec", -90, 90, where),
        simulated=cells.get("simulated", "").lower() not in ("", "0", "0.0", "false", "no"),
    )


def _parse_integer(text: str, column: str, where: str) -> int:
    low, high = _IDENTIFIER_RANGES[column]
    # "372.0" is what a spreadsheet or pandas makes of an integer column with a gap in it.
    digits = text.removesuffix(".0")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10 and low <= int(digits) <= high):
        raise DataError(f"{where}, column {column}: {text!r} is not a whole number from {low} to {high}")
    return int(digits)


def _parse_degrees(text: str, column: str, low: float, high: float, where: str) -> float:
    if not text:
        return float("nan")
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise DataError(f"{where}, column {column}: {text!r} is not an angle in degrees from {low} to {high}")
    return value


def group_same_stars(stars: list[Star]) -> np.ndarray:
    """(N,) group numbers, equal for rows that are one star: the same name, or within 2″ on the sky."""
    rows_of_name: dict[str, int] = {}
    first_of_name = [rows_of_name.setdefault(star.name, row) for row, star in enumerate(stars)]
    position = np.array([(star.ra, star.dec) for star in stars])
    located = np.flatnonzero(np.isfinite(position).all(axis=1))
    sky = SkyCoord(*position[located].T, unit="deg")
    left, right, _, _ = search_around_sky(sky, sky, SAME_STAR_ARCSEC * units.arcsec)
    rows = np.concatenate([np.arange(len(stars)), located[left]])
    columns = np.concatenate([first_of_name, located[right]])
    links = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(stars), len(stars)))
    return connected_components(links, directed=False)[1]


def count_known(stars: list[Star], known: list[Star]) -> int:
    """How many of the stars are among the known ones, perhaps observed again."""
    groups = group_same_stars([*known, *stars])
    return int(np.isin(groups[len(known) :], groups[: len(known)]).sum())


# specObjID: plate 14 bits, fiberID 12, mjd − 50000 14, run2d 14, ten zero bits.


def encode_spec_obj_id(plate: int, mjd: int, fiberID: int, run2d: int) -> int:
    """The 64-bit specObjID; `run2d` is 26, 103, 104, or 10000·(x−5) + 100·y + z for v{x}_{y}_{z}."""
    return plate << 50 | fiberID << 38 | (mjd - 50_000) << 24 | run2d << 10


def decode_spec_obj_id(name: str) -> tuple[int, int, int, str] | None:
    """(plate, mjd, fiberID, run2d) of a specObjID, run2d as in SDSS's paths ("26", "v5_13_0").

    None for a name that is no specObjID.
    """
    if not (name.isascii() and name.isdigit()) or int(name) >= 2**64 or int(name) % 2**10:
        return None
    value = int(name)
    plate, fiberID, mjd, run2d = value >> 50, value >> 38 & 0xFFF, (value >> 24 & 0x3FFF) + 50_000, value >> 10 & 0x3FFF
    if not (plate and fiberID):
        return None
    if run2d <= 104:
        return plate, mjd, fiberID, str(run2d)
    return plate, mjd, fiberID, f"v{run2d // 10000 + 5}_{run2d % 10000 // 100}_{run2d % 100}"


# Reading and checking


class Spectrum(NamedTuple):
    """HDU 1 of an SDSS spectrum, and of its header the star's position (PLUG_RA, PLUG_DEC)."""

    loglam: np.ndarray  # log10 of the vacuum wavelength in Å, float64
    flux: np.ndarray  # 1e-17 erg/s/cm²/Å, float32
    ivar: np.ndarray  # inverse variance of flux, float32; 0 marks a bad pixel
    ra: float  # degrees, NaN where the file does not say
    dec: float
    simulated: bool  # made by simulate_sdss_data.py
    path: Path


def read_spectrum(path: Path, star: Star) -> Spectrum:
    """Read and check an SDSS spectrum (full or lite). Raises DataError if it is damaged, WrongFileError if it is
    another star's.

    FITS files of SDSS carry no checksum: a value that was changed into another possible one is not noticed.
    """
    content = _read_bytes(path)
    if not content.startswith(b"SIMPLE  ="):
        raise DataError(f"{path}: not a FITS file (it begins with {content[:20]!r})")
    if len(content) % FITS_BLOCK:
        raise DataError(f"{path}: the file is truncated; delete it and download it again")
    try:
        with warnings.catch_warnings(action="ignore", category=AstropyWarning):
            (cards, _), (table_cards, table_start), *_ = _find_headers(content)
            header, table_header = _parse_header(cards), _parse_header(table_cards)
            row = _table_dtype(table_cards)
        table = np.frombuffer(content, row, table_header["NAXIS2"], table_start)
        columns = {
            name: np.asarray(table[name], dtype=dtype)
            for name, dtype in (("loglam", np.float64), ("flux", np.float32), ("ivar", np.float32))
        }
        if any(table[name].dtype.kind != "f" for name in columns):
            raise TypeError("loglam, flux or ivar is not of floating-point numbers")
        check_identity(path, header, star)
        ra, dec = (float(header.get(key, "nan")) for key in ("PLUG_RA", "PLUG_DEC"))
        simulated = bool(header.get("SIMULATD", False))
    except DataError:
        raise
    except EOFError:
        raise DataError(f"{path}: the file is truncated or damaged; delete it and download it again") from None
    except _FITS_ERRORS as error:
        raise DataError(f"{path}: not an SDSS spectrum ({type(error).__name__}: {_first_line(error)})") from error

    if not (0 <= ra <= 360 and -90 <= dec <= 90):
        ra = dec = float("nan")
    if any(column.ndim != 1 or not column.size for column in columns.values()):
        raise DataError(f"{path}: its table of loglam, flux and ivar is empty or not one-dimensional")
    if not np.isfinite(columns["loglam"]).all() or (np.diff(columns["loglam"]) <= 0).any():
        raise DataError(f"{path}: its wavelengths do not increase from pixel to pixel")
    return Spectrum(**columns, ra=ra, dec=dec, simulated=simulated, path=path)


def check_identity(path: Path, header: fits.Header, star: Star) -> None:
    """Raise WrongFileError if this is the header of another star's spectrum."""
    wanted = {"PLATEID": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID}
    stated = {key: header.get(key) for key in wanted}
    if stated != wanted:
        raise WrongFileError(f"{path}: holds the spectrum of another star ({stated}, not {wanted})")


# The headers are read by astropy, the rows by NumPy, since astropy's own tables take four times as long; and what many
# files have alike, as the headers of tables, is read once. tests/test_data.py compares with astropy alone.


def _find_headers(content: bytes) -> list[tuple[bytes, int]]:
    """The cards of each HDU's header, and where its data begin. Raises EOFError if the last HDU is not whole."""
    headers, position = [], 0
    while position < len(content):
        cards = _HEADER_CARDS.match(content, position)
        if cards is None:
            raise EOFError
        start = position + math.ceil(len(cards[0]) / FITS_BLOCK) * FITS_BLOCK
        headers.append((cards[0], start))
        position = start + _data_size(cards[0])
    if position > len(content):
        raise EOFError
    return headers


@functools.lru_cache(maxsize=16)
def _parse_header(cards: bytes) -> fits.Header:
    return fits.Header.fromstring(cards)


@functools.lru_cache(maxsize=16)
def _data_size(cards: bytes) -> int:
    """Bytes that an HDU's data take in the file, padding included."""
    header = _parse_header(cards)
    if header.data_size < 0:
        raise ValueError("a negative size")
    return header.data_size_padded


@functools.lru_cache(maxsize=16)
def _table_dtype(cards: bytes) -> np.dtype:
    """The NumPy type of a row of a FITS binary table of plain columns, the only ones that SDSS's spectra have."""
    header = _parse_header(cards)
    if not 0 < header["TFIELDS"] <= MAX_TABLE_COLUMNS:
        raise ValueError(f"TFIELDS = {header['TFIELDS']}")
    numbers = range(1, header["TFIELDS"] + 1)
    scaled = [key for number in numbers for key in (f"TSCAL{number}", f"TZERO{number}") if key in header]
    if scaled:
        raise ValueError(f"scaled columns, {scaled[0]}")
    columns = []
    for number in numbers:
        name, form = header[f"TTYPE{number}"].lower(), header[f"TFORM{number}"]  # "E", "1E" or "4A"
        kind, repeat = _FITS_TYPES[form[-1:]], int(form[:-1] or 1)
        columns.append((name, kind) if repeat == 1 else (name, kind, (repeat,)))
    row = np.dtype(columns)
    if row.itemsize != header["NAXIS1"]:
        raise ValueError(f"rows of {header['NAXIS1']} bytes, columns of {row.itemsize}")
    return row


class Cutout(NamedTuple):
    pixels: np.ndarray  # (height, width, 3) uint8, RGB
    simulated: bool  # made by simulate_sdss_data.py


def read_cutout(path: Path, size: int | None = None) -> Cutout:
    """Read and check a JPEG cutout: square, in colour, `size` pixels a side if given.

    Raises DataError if it is damaged, WrongFileError if it is no colour JPEG, of another size, or blank (outside the
    footprint). JPEG files carry no checksum: a change that leaves a picture is not noticed.
    """
    content = _read_bytes(path)
    least, most = CUTOUT_SIZES
    try:
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):  # the size is checked
            image = Image.open(io.BytesIO(content), formats=["JPEG"])
        with image:
            if image.mode != "RGB" or image.width != image.height or not least <= image.width <= most:
                raise WrongFileError(
                    f"{path}: not a square colour cutout of {least} to {most} pixels a side "
                    f"({image.width}×{image.height}, mode {image.mode})"
                )
            if size is not None and image.width != size:
                raise WrongFileError(f"{path}: {image.width}×{image.height} pixels where {size}×{size} were asked for")
            pixels = np.asarray(image)
            colours = np.asarray(image.convert("RGBX")).view(np.uint32)  # a number for each colour
            simulated = SIMULATED_MARK in image.info.get("comment", b"")
    except UnidentifiedImageError:
        raise DataError(f"{path}: not a JPEG image") from None
    except DataError:
        raise
    except _JPEG_ERRORS as error:
        raise DataError(f"{path}: a damaged JPEG image ({_first_line(error)})") from error
    # A colour that fills more than half of the pixels stands in the middle of them, in whichever order.
    middle = np.partition(colours, colours.size // 2, axis=None)[colours.size // 2]
    filled = colours[..., 0] == middle
    if filled.mean() > MAX_FRACTION_OF_ONE_COLOUR:
        kind = "blank" if pixels[filled].any() else "black"
        raise WrongFileError(
            f"{path}: a {kind} tile: the star lies outside the imaging footprint, or the server drew an error"
        )
    return Cutout(pixels, simulated)


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {size} bytes; no file of one star is larger than {MAX_FILE_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read ({error.strerror})") from error
    if not content:
        raise DataError(f"{path}: the file is empty; delete it and download it again")
    return content


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


# Preparing


def prepare_spectrum(spectrum: Spectrum) -> np.ndarray:
    """(3522,) float32: 4000–9000 Å on the SDSS grid, in units of the median flux.

    Bad pixels (ivar = 0, not finite, or absent) are interpolated from their neighbours; neither the
    median nor the clipping lets one wild pixel set the scale. Raises DataError if more than half of
    the window is bad or there is no flux in it, naming the file.
    """
    position = spectrum.loglam * PIXELS_PER_DEX
    pixel = np.rint(position[0]) + np.arange(len(position))
    if not np.abs(position - pixel).max() < 0.1:  # float32 loglam is good to 0.005 pixel
        raise DataError(f"{spectrum.path}: its wavelengths are not on the SDSS grid (loglam in steps of 1e-4)")
    index = pixel - FIRST_PIXEL
    good = (index >= 0) & (index < SPECTRUM_LENGTH) & np.isfinite(spectrum.flux)
    good &= np.isfinite(spectrum.ivar) & (spectrum.ivar > 0)
    if good.sum() < MIN_GOOD_FRACTION * SPECTRUM_LENGTH:
        raise DataError(
            f"{spectrum.path}: only {good.sum()} of the {SPECTRUM_LENGTH} pixels between 4000 and 9000 Å are good"
        )
    index, flux = index[good], spectrum.flux[good]
    median = np.median(flux)
    if not median > 0:
        raise DataError(f"{spectrum.path}: its median flux is {median:.3g}: there is no star in this spectrum")
    filled = np.interp(np.arange(SPECTRUM_LENGTH), index, flux)
    return np.clip(filled / median, *SCALED_FLUX_RANGE).astype(np.float32)


def prepare_cutout(pixels: np.ndarray) -> np.ndarray:
    """(3, 128, 128) uint8 from a cutout's (height, width, 3); one downloaded at another size is resampled."""
    if pixels.shape[0] != IMAGE_SIZE:
        pixels = np.asarray(Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # height, width, colour → colour, height, width


def load_spectrum(data_dir: Path, star: Star) -> np.ndarray:
    """A star's prepared spectrum, (3522,) float32, from its file. Raises DataError, naming the file."""
    return prepare_spectrum(read_spectrum(spectrum_path(data_dir, star), star))


def load_cutout(data_dir: Path, star: Star) -> np.ndarray:
    """A star's prepared cutout, (3, 128, 128) uint8, from its file. Raises DataError, naming the file."""
    return prepare_cutout(read_cutout(cutout_path(data_dir, star)).pixels)
