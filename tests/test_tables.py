"""The table of predictions in every format, read back by astropy."""

from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
from astropy import units
from astropy.io import fits, votable
from astropy.table import QTable

from cli import DataError
from indices import measure_indices
from preparation import SPECTRUM_LENGTH
from tables import COLUMNS, FORMATS, read_parts, refuse_foreign_table, table_path, write_part, write_table

ENDINGS = (".ecsv", ".fits", ".vot")
ROWS = [
    {"name": "a", "plate": 618, "mjd": 52049, "ra": 160.1940456, "simulated": True, "p_M0": 0.25, "is_active": True,
     "spectral_type": "M2.5 ± 0.4", "metallicity_class": "dM", "EW_Halpha": 3.2, "is_outlier": False},
    {"name": "é, b", "simulated": False, "is_active": False, "problem": "é.fits: <not> a \"FITS\" file"},
    {"name": "c", "plate": 619, "simulated": False, "EW_Halpha": -0.5},
]  # fmt: skip


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    paths = [tmp_path / "0.part", tmp_path / "1.part"]
    write_part(paths[0], ROWS[:2])
    write_part(paths[1], ROWS[2:])
    return paths


def test_csv_is_plain(parts, tmp_path):
    write_table(tmp_path / "t.csv", parts)
    header, *lines = (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()
    assert header == ",".join(COLUMNS) and len(lines) == 3
    assert lines[0].startswith("a,618,52049,,160.1940456,,,True,,0.25,")
    assert [row["name"] for row in read_parts(parts)] == ["a", "é, b", "c"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.filterwarnings("error", "ignore:.*Angstrom.*deprecated:astropy.units.UnitsWarning")
def test_astronomers_formats_have_units_descriptions_and_empty_cells(parts, tmp_path, ending):
    path = tmp_path / f"t{ending}"
    write_table(path, parts)
    table = QTable.read(path)
    assert table.colnames == list(COLUMNS)
    assert {name: table[name].info.description for name in COLUMNS} == {
        name: column.description for name, column in COLUMNS.items()
    }
    assert table["ra"].unit == units.deg and table["EW_Halpha"].unit == units.AA and table["mjd"].unit == units.day
    assert table["ra"][0].value == 160.1940456 and table["EW_Halpha"].mask.tolist() == [False, True, False]
    assert table["EW_Halpha"][2] == -0.5 * units.AA and table["plate"].dtype.kind == "i"
    assert table["plate"].mask.tolist() == [False, True, False] and table["plate"][2] == 619
    assert table["is_active"].mask.tolist() == [False, False, True] and list(table["is_active"][:2]) == [1, 0]
    assert list(table["simulated"]) == [1, 0, 0]
    assert [bool(text) for text in table["problem"].filled("")] == [False, True, False]
    is_ascii = ending == ".fits"
    assert table["name"][1] == ("\\xe9, b" if is_ascii else "é, b")
    assert table["spectral_type"][0] == ("M2.5 +/- 0.4" if is_ascii else "M2.5 ± 0.4")


def test_topcat_finds_what_it_needs(parts, tmp_path):
    """It reads neither astropy's notes in a FITS header nor a VOTable against the standard."""
    for ending in (".fits", ".vot"):
        write_table(tmp_path / f"t{ending}", parts)
    header = fits.getheader(tmp_path / "t.fits", 1)
    assert [header[f"TCOMM{k}"] for k in range(1, len(COLUMNS) + 1)] == [c.description for c in COLUMNS.values()]
    assert votable.validate(tmp_path / "t.vot", output=None)


@pytest.mark.parametrize("ending", FORMATS)
def test_only_an_earlier_table_is_replaced(parts, tmp_path, ending):
    path = tmp_path / f"t{ending}"
    refuse_foreign_table(path)
    write_table(path, parts)
    refuse_foreign_table(path)
    path.unlink()
    QTable({"name": ["Barnard"], "problem": ["mine"]}).write(path, format=FORMATS[ending])
    with pytest.raises(DataError, match="this script did not write it"):
        refuse_foreign_table(path)


@pytest.mark.parametrize("name", ["p.txt", "p", "p.xml", "p.fits.gz"])
def test_other_endings_are_refused(name):
    with pytest.raises(ArgumentTypeError, match=r"does not end in \.csv, \.ecsv, \.fits, \.vot"):
        table_path(name)


def test_every_index_has_a_column():
    assert measure_indices(np.ones((2, SPECTRUM_LENGTH))).keys() < COLUMNS.keys()
