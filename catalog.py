"""The catalogue: its rows, read and checked; SDSS's identifiers; which rows are one star.

    name, subclass, plate, mjd, fiberID [, ra, dec, simulated, ...]
    file, subclass [, name, ra, dec, ...]

Columns stand in any order, in upper or lower case, under SDSS's own names; nan, null, -- and the
like are empty cells. `name` is any other label that can name a file; without that column, specObjID
is the name, and gives plate, mjd and fiberID too. `file` is the path of the star's spectrum below
spectra/, for files that are not named as SDSS names them; without a name, that is the file's, less
its ending.

Source: specObjID, https://www.sdss.org/dr16/help/glossary/#specobj
"""

import csv
import math
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from cli import DataError, printable

CLASS_NAMES = ("M0", "M1", "M2", "M3", "M4")

SAME_STAR_ARCSEC = 2.0  # rows closer than this on the sky are one star observed twice

# A cutout is taken at the catalogue's position, a spectrum at the fibre's, some years apart. Few M dwarfs move 5″ in
# that time, and one that did is still inside its cutout of 25.6″.
MAX_OFFSET_ARCSEC = 5.0

# DR16 holds plates below the first number under run2d 26, and those from the second on as BOSS and eBOSS.
FIRST_PLATE_BEYOND_26 = 1960
FIRST_BOSS_PLATE = 3523

# plate, mjd, fiberID and run2d of real specObjIDs: SDSS-I/II, then BOSS and eBOSS (v5_4_0 to v5_13_99). An identifier
# of another survey with a possible value in all four is rare.
_SPEC_OBJ_ID_RANGES = (
    (range(266, FIRST_BOSS_PLATE), range(51_500, 55_100), range(1, 641), (26, 103, 104)),
    (range(FIRST_BOSS_PLATE, 2**14), range(55_000, 60_000), range(1, 1001), range(400, 1400)),
)

# Allowed values of the cells; for plate, mjd and fiberID, the range of a specObjID.
_WHOLE, _ANGLE = "a whole number", "an angle in degrees"
_IDENTITY = {"plate": (_WHOLE, 1, 2**14 - 1), "mjd": (_WHOLE, 50_000, 66_383), "fiberID": (_WHOLE, 1, 2**12 - 1)}
_POSITION = {"ra": (_ANGLE, 0, 360), "dec": (_ANGLE, -90, 90)}
_LIMITS = _IDENTITY | _POSITION
_EMPTY = re.compile(r"nan|null|none|#?n/?a|<na>|-+|masked|-9999(\.0*)?", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# Spreadsheets keep 15 digits: 3.07417E+17, or 307416612011534000.
_ROUNDED = re.compile(r"\d([.,]\d+)?[eE]\+?1[789]|\d{15}0{3,5}(\.0*)?", re.ASCII)
# A name becomes part of a file's name: no separators, no leading dot, none of ? " < > | $. SIMBAD has "V* Prox".
_SAFE_NAME = re.compile(r"[\w(\[][\w .,+\-()\[\]'=@#&~*:]*")
_MAX_NAME_BYTES = 100  # of the 255 that file systems allow
_DWARF_SUBCLASS = re.compile(r"^d?(M\d)( \(\d+\))?$")
SPECTRUM_ENDING = re.compile(r"\.fits?(\.gz)?$", re.IGNORECASE)  # of a file's name


class Star(NamedTuple):
    """One row of the catalogue. `ra` and `dec` are degrees (J2000), NaN where the catalogue has none."""

    name: str
    subclass: str  # "" where it is not known
    plate: int
    mjd: int
    fiberID: int
    ra: float = float("nan")
    dec: float = float("nan")
    simulated: bool = False
    file: str = ""  # of the spectrum; below spectra/ in a catalogue, where plate, mjd and fiberID are then 0

    @property
    def class_name(self) -> str:
        """The subclass if it is one of CLASS_NAMES, else ""."""
        return self.subclass if self.subclass in CLASS_NAMES else ""

    @property
    def spectrum_id(self) -> str:
        """A label of the spectrum, unique in a catalogue: SDSS's plate-mjd-fiberID, or the file."""
        return self.file or f"{self.plate:04d}-{self.mjd:05d}-{self.fiberID:04d}"


# The columns that are read, by their names in lower case
_COLUMNS = {column.lower(): column for column in ("specObjID", *Star._fields)}


def describe(stars: Sequence[Star]) -> str:
    """The number of stars, and how many are simulated; every output shows it."""
    simulated = sum(star.simulated for star in stars)
    if simulated in (0, len(stars)):
        return f"{len(stars)} {'SIMULATED ' if simulated else ''}stars"
    return f"{len(stars)} stars, {simulated} of them SIMULATED"


def without_note(subclass: str) -> str:
    """ "M1" of BOSS's "M1 (204445)", which names the template's star, and of LAMOST's "dM1"; others as they are."""
    return _DWARF_SUBCLASS.sub(r"\1", subclass)


def read_catalog(path: Path, *, labelled: bool = True) -> tuple[list[Star], Counter[str]]:
    """Read the stars of classes M0 to M4 from a CSV file.

    With `labelled` false the stars of any class or none are read, and the column subclass may be absent.

    Returns the stars in the file's order and, by reason, the number of rows left out: other classes
    and rows that repeat a spectrum. Raises DataError, naming file, line and column, for a cell that
    is not possible and for rows that contradict each other.
    """
    rows: list[tuple[int, Star]] = []  # with their line numbers
    left_out: Counter[str] = Counter()
    for line, cells in _read_rows(path, ["name", *["subclass"] * labelled, *_IDENTITY]):
        subclass = printable(without_note(cells.get("subclass", "")))
        if subclass in CLASS_NAMES or not labelled:
            rows.append((line, _parse_row(f"{path}, line {line}", cells, subclass)))
        else:
            left_out[f"subclass {subclass or '(empty)'} is not one of {', '.join(CLASS_NAMES)}"] += 1
    _check_rounding(path, rows)
    check_places(path, [(f"line {line}", star) for line, star in rows])

    stars: dict[str, Star] = {}
    for line, star in rows:
        first = stars.setdefault(star.spectrum_id, star)
        if labelled and first.subclass != star.subclass:
            raise DataError(
                f"{path}, line {line}: spectrum {star.spectrum_id} is {star.subclass} here and "
                f"{first.subclass} further up; keep the line that is right"
            )
        left_out["repeats a spectrum listed further up"] += first is not star
    if not stars:
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in left_out.items()) or "no rows"
        wanted = f"star of class {', '.join(CLASS_NAMES)}" if labelled else "star"
        raise DataError(f"{path}: no {wanted} in it ({reasons})")
    return list(stars.values()), +left_out


def report_left_out(left_out: Counter[str]) -> None:
    """Print the number of rows that `read_catalog` left out, by reason."""
    for reason, count in left_out.items():
        print(f"rows of the catalogue left out: {count} ({reason})")


def _read_rows(path: Path, needed: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells, by column, of each row that is not blank; as text, which holds any specObjID exactly."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            rows = (stripped for cells in lines if any(stripped := [cell.strip() for cell in cells]))
            header = next((cells for cells in rows if not cells[0].startswith("#")), [])  # SkyServer begins: "#Table1"
            while header and not header[-1]:
                header.pop()
            columns = [_COLUMNS.get(cell.lower(), "") for cell in header]
            _check_header(path, header, columns, needed)
            for cells in rows:
                if len(cells) < len(header) or any(cells[len(header) :]):
                    counts = f"{len(cells)} cells where the header has {len(header)} columns"
                    raise DataError(f"{path}, line {lines.line_num}: {counts}")
                filled = ["" if _EMPTY.fullmatch(cell) else cell for cell in cells]
                yield lines.line_num, dict(zip(columns, filled, strict=False))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it is the list of stars (columns {_choices(needed)})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a comma-separated UTF-8 text file ({error})") from None


def _check_header(path: Path, header: list[str], columns: list[str], needed: list[str]) -> None:
    if not header:
        raise DataError(f"{path}: the file is empty")
    if twice := [column for column in _COLUMNS.values() if columns.count(column) > 1]:
        raise DataError(f"{path}: a column stands twice in the header line, {', '.join(twice)}")
    given = {*columns, *(["name", *_IDENTITY] if {"specObjID", "file"} & {*columns} else [])}
    if missing := [column for column in needed if column not in given]:
        raise DataError(
            f"{path}: column {', '.join(missing)} is missing; the header line reads {' | '.join(header)} "
            f"(needed, separated by commas: {_choices(needed)})"
        )


def _choices(needed: list[str]) -> str:
    others = [column for column in needed if column not in ("name", *_IDENTITY)]
    return f"{', '.join(needed)}; or {', '.join(['file', *others])}"


def _parse_row(where: str, cells: dict[str, str], subclass: str) -> Star:
    spec_obj_id, file = cells.get("specObjID", ""), _parse_file(where, cells.get("file", ""))
    name = _exact_name(cells.get("name") or spec_obj_id or SPECTRUM_ENDING.sub("", PurePath(file).name))
    if not _SAFE_NAME.fullmatch(name) or len(name.encode()) > _MAX_NAME_BYTES:
        raise DataError(
            f"{where}, column name: {name[:_MAX_NAME_BYTES]!r} cannot name a file (letters, digits, spaces and "
            f"_.,+-()[]'=@#&~*:; at most {_MAX_NAME_BYTES} bytes)"
        )
    known = dict(zip(_IDENTITY, decode_spec_obj_id(_exact_name(spec_obj_id or name)) or (), strict=False))
    numbers = {
        column: _parse_number(where, column, cells.get(column) or str(known.get(column, "")))
        for column in (_POSITION if file else _LIMITS)
    }
    identity = (int(numbers.get(column, 0)) for column in _IDENTITY)
    simulated = cells.get("simulated", "").lower() not in {"", "0", "0.0", "false", "no"}
    return Star(name, subclass, *identity, numbers["ra"], numbers["dec"], simulated, file)


def _parse_file(where: str, text: str) -> str:
    path = PurePath(text)
    if path.is_absolute() or ".." in path.parts or not text.isprintable():
        raise DataError(f"{where}, column file: {text!r} is not the path of a file below spectra/")
    return path.as_posix() if text else ""


def _exact_name(text: str) -> str:
    """The label; a specObjID written as a signed integer or as a float with all its digits becomes unsigned digits."""
    if len(text) < 40 and _NUMBER.fullmatch(text) and -(2**63) <= float(text) < 2**64:
        value = int(text) if text.lstrip("+-").isdigit() else int(float(text))  # exact: it ends in ten zero bits
        if decode_spec_obj_id(unsigned := str(value % 2**64)):
            return unsigned
    return unicodedata.normalize("NFC", text)


def _parse_number(where: str, column: str, text: str) -> float:
    kind, low, high = _LIMITS[column]
    if kind == _ANGLE and not text:
        return math.nan
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not low <= value <= high or (kind == _WHOLE and not value.is_integer()):  # "372.0" is whole
        raise DataError(f"{where}, column {column}: {text[:40]!r} is not {kind} from {low} to {high}")
    return value


def _check_rounding(path: Path, rows: list[tuple[int, Star]]) -> None:
    rounded = [row for row in rows if _ROUNDED.fullmatch(row[1].name) and not decode_spec_obj_id(row[1].name)]
    if rounded and 2 * len(rounded) >= len(rows):  # a few may end in zeros by chance
        line, star = rounded[0]
        raise DataError(
            f"{path}, line {line}, column name: {star.name} is a specObjID rounded by a spreadsheet, its last digits "
            "are lost; export the catalogue again with this column formatted as text"
        )


# The same star


def separation_arcsec(ra: float, dec: float, other_ra: float, other_dec: float) -> float:
    """Angle on the sky in arcsec, from degrees; NaN if any of them is NaN."""
    from astropy.coordinates import angular_separation  # here: slow to import, and --help needs this module

    return float(np.degrees(angular_separation(*np.radians([ra, dec, other_ra, other_dec]))) * 3600)


def check_places(path: Path, rows: Sequence[tuple[str, Star]]) -> None:
    """Raise DataError if one name stands for two places on the sky; each row has a label by which to find it in `path`.

    Rows of one name share their cutout.
    """
    located: dict[str, tuple[str, Star]] = {}
    for label, star in rows:
        if math.isnan(star.ra + star.dec):
            continue
        first_label, first = located.setdefault(star.name, (label, star))
        distance = 0.0 if first is star else separation_arcsec(first.ra, first.dec, star.ra, star.dec)
        if distance > MAX_OFFSET_ARCSEC:
            raise DataError(
                f"{path}: {first_label} and {label} are both named {star.name}, but lie {distance / 3600:.2g}° apart "
                "on the sky; give each star a name of its own"
            )


def position_conflict(ra: float, dec: float, spectrum_ra: float, spectrum_dec: float) -> str:
    """How a star's position in the catalogue contradicts that of its spectrum, all in degrees; "" if it does not."""
    offset = separation_arcsec(ra, dec, spectrum_ra, spectrum_dec)
    if not offset > MAX_OFFSET_ARCSEC:  # NaN: unknown
        return ""
    angle = f"{offset:.0f}″" if offset < 360 else f"{offset / 3600:.1f}°"
    return f"the catalogue places it {angle} from where its spectrum was taken"


def group_same_stars(stars: Sequence[Star]) -> np.ndarray:
    """(N,) group numbers, equal for rows that are one star: the same name, or within 2″ on the sky."""
    # Imported here, since scripts import this module for --help.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import KDTree

    row_of_name: dict[str, int] = {}
    first_of_name = [row_of_name.setdefault(star.name, row) for row, star in enumerate(stars)]
    ra, dec = np.radians(np.array([(star.ra, star.dec) for star in stars]).reshape(-1, 2)).T
    located = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    ra, dec = ra[located], dec[located]
    on_sphere = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)
    chord = 2 * np.sin(np.radians(SAME_STAR_ARCSEC / 3600) / 2)
    pairs = located[KDTree(on_sphere).query_pairs(chord, output_type="ndarray")]
    rows = np.concatenate([np.arange(len(stars)), pairs[:, 0]])
    columns = np.concatenate([first_of_name, pairs[:, 1]])
    links = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(len(stars), len(stars)))
    return connected_components(links, directed=False)[1]


def count_known(stars: Sequence[Star], known: Sequence[Star]) -> int:
    """How many of the stars are among the known ones, perhaps observed again."""
    groups = group_same_stars([*known, *stars])
    return int(np.isin(groups[len(known) :], groups[: len(known)]).sum())


# specObjID: plate 14 bits, fiberID 12, mjd − 50000 14, run2d 14, ten zero bits.


def encode_spec_obj_id(plate: int, mjd: int, fiberID: int, run2d: int) -> int:
    """The 64-bit specObjID; `run2d` is 26, 103, 104, or 10000·(x−5) + 100·y + z for v{x}_{y}_{z}."""
    return plate << 50 | fiberID << 38 | (mjd - 50_000) << 24 | run2d << 10


def decode_spec_obj_id(name: str) -> tuple[int, int, int, str] | None:
    """(plate, mjd, fiberID, run2d) of a specObjID, run2d as in SDSS's paths ("26", "v5_13_0").

    None for a name that is no specObjID of SDSS-I to eBOSS.
    """
    if not (name.isascii() and name.isdigit() and len(name) <= 20) or int(name) >= 2**64 or int(name) % 2**10:
        return None
    value = int(name)
    plate, fiberID, mjd, run2d = value >> 50, value >> 38 & 0xFFF, (value >> 24 & 0x3FFF) + 50_000, value >> 10 & 0x3FFF
    fields = (plate, mjd, fiberID, run2d)
    if not any(all(map(operator.contains, ranges, fields)) for ranges in _SPEC_OBJ_ID_RANGES):
        return None
    return plate, mjd, fiberID, str(run2d) if run2d <= 104 else f"v5_{run2d // 100}_{run2d % 100}"
