"""The table of predictions: its columns, and the formats in which it is written.

    predictions.csv     plain: a header line and a line for each star
    predictions.ecsv    these three with units and descriptions, for astropy, TOPCAT and other tools of astronomy
    predictions.fits
    predictions.vot     a VOTable

An empty cell is an unknown value; astropy and TOPCAT show it as masked.
"""

import argparse
import csv
import io
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from catalog import CLASS_NAMES
from cli import refuse_foreign_file, write_atomically

if TYPE_CHECKING:
    from astropy.table import MaskedColumn, Table

FORMATS = {".csv": "ascii.csv", ".ecsv": "ascii.ecsv", ".fits": "fits", ".vot": "votable"}  # astropy's names, by ending
HEAD_BYTES = 2**16  # of a file, which hold its columns' names in every format


class Column(NamedTuple):
    kind: type
    unit: str
    description: str


COLUMNS = {
    "name": Column(str, "", "star's name, or its file's"),
    "plate": Column(int, "", "SDSS plate"),
    "mjd": Column(int, "d", "SDSS: modified Julian date"),
    "fiberID": Column(int, "", "SDSS fibre"),
    "ra": Column(float, "deg", "right ascension, J2000"),
    "dec": Column(float, "deg", "declination, J2000"),
    "catalog_subclass": Column(str, "", "subclass in the catalogue, else in the spectrum's file"),
    "simulated": Column(bool, "", "made by simulate_sdss_data.py"),
    "predicted_subclass": Column(str, "", "most probable subclass"),
    **{f"p_{name}": Column(float, "", f"calibrated probability of {name}") for name in CLASS_NAMES},
    "spectral_type": Column(str, "", "expected subclass and its standard deviation, at least 0.1"),
    "expected_subclass": Column(float, "", "mean of 0 (M0) to 4 (M4) over the probabilities"),
    "expected_subclass_std": Column(float, "", "standard deviation of 0 (M0) to 4 (M4) over the probabilities"),
    "TiO5": Column(float, "", "band index, Reid et al. 1995"),
    "TiO5_err": Column(float, "", "standard error of TiO5"),
    "CaH2": Column(float, "", "band index, Reid et al. 1995"),
    "CaH2_err": Column(float, "", "standard error of CaH2"),
    "CaH3": Column(float, "", "band index, Reid et al. 1995"),
    "CaH3_err": Column(float, "", "standard error of CaH3"),
    "zeta": Column(float, "", "metallicity parameter, Lepine et al. 2007"),
    "zeta_err": Column(float, "", "standard error of zeta"),
    "metallicity_class": Column(str, "", "dM, sdM, esdM or usdM, by zeta"),
    "EW_Halpha": Column(float, "Angstrom", "equivalent width, positive in emission"),
    "EW_Halpha_err": Column(float, "Angstrom", "standard error of EW_Halpha"),
    "is_active": Column(bool, "", "H alpha in emission, West et al. 2011"),
    "outlier_score": Column(float, "", "distance from the training stars; below 1 for 99.5 % of these"),
    "is_outlier": Column(bool, "", "outlier_score above 1"),
    "problem": Column(str, "", "why it cannot be classified"),
}


def table_path(text: str) -> Path:
    """An argparse type: a path whose ending names a format."""
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(FORMATS)}")
    return path


def refuse_foreign_table(path: Path) -> None:
    """Raise DataError if `path` exists and is no earlier table of predictions: one with all of its columns."""
    refuse_foreign_file(path, *COLUMNS, head_bytes=HEAD_BYTES)


def write_part(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows by column, as CSV without a header; None is an empty cell."""
    with write_atomically(path) as temporary, _open(temporary, "w") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows)


def read_parts(parts: Sequence[Path]) -> Iterator[dict[str, str]]:
    """The rows of all parts; "" is an empty cell."""
    for part in parts:
        with _open(part, "r") as file:
            yield from csv.DictReader(file, list(COLUMNS))


def write_table(path: Path, parts: Sequence[Path]) -> None:
    """Write the parts' rows in the format that the ending of `path` names."""
    with write_atomically(path) as temporary:
        if path.suffix in (".csv", ".ecsv"):
            _join(_text_header(path.suffix), parts, temporary)
            return
        from astropy.table import vstack
        from astropy.units import UnitsWarning

        table = vstack([_read_part(part, path.suffix) for part in parts])
        with warnings.catch_warnings(action="ignore", category=UnitsWarning):  # VOTable calls Å deprecated
            table.write(str(temporary), format=FORMATS[path.suffix])
        if path.suffix == ".fits":
            _describe_columns(temporary)


def _text_header(suffix: str) -> str:
    if suffix == ".csv":
        return f"{','.join(COLUMNS)}\n"
    from astropy.table import Table

    text = io.StringIO()
    Table({name: _column(name, [], suffix) for name in COLUMNS}).write(text, format=FORMATS[suffix], delimiter=",")
    return text.getvalue()


def _join(header: str, parts: Sequence[Path], path: Path) -> None:
    with open(path, "wb") as table:
        table.write(header.encode())
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, table)


def _read_part(path: Path, suffix: str) -> "Table":
    from astropy.table import Table

    with _open(path, "r") as file:
        by_column = zip(*csv.reader(file), strict=True)
        return Table({name: _column(name, cells, suffix) for name, cells in zip(COLUMNS, by_column, strict=True)})


def _column(name: str, cells: Sequence[str], suffix: str) -> "MaskedColumn":
    from astropy.table import MaskedColumn

    kind, unit, description = COLUMNS[name]
    dtype: Any = kind
    if kind is bool:
        values = [cell == "True" for cell in cells]
        if suffix != ".ecsv":  # astropy writes no empty logical cell into the other formats: 0 and 1
            dtype = "int16"
    elif kind is str and suffix == ".fits":
        values = [cell.replace("±", "+/-").encode("ascii", "backslashreplace").decode() for cell in cells]
    else:
        values = [kind(cell) if cell else kind() for cell in cells]
    mask = [not cell for cell in cells]
    return MaskedColumn(values, mask=mask, dtype=dtype, unit=unit or None, description=description)


def _describe_columns(path: Path) -> None:
    """Put the columns' descriptions where TOPCAT looks for them in a FITS file; astropy has its own place."""
    from astropy.io import fits

    with fits.open(path, mode="update") as hdus:
        for number, column in enumerate(COLUMNS.values(), start=1):
            hdus[1].header[f"TCOMM{number}"] = column.description


def _open(path: Path, mode: str) -> IO[str]:
    # A path that is not UTF-8 has lone surrogates.
    return open(path, mode, newline="", encoding="utf-8", errors="backslashreplace")
