"""Inputs and places that public bug reports of this field describe; an input a row. The tests of each module have
more of the same kinds."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from math import isnan, nan
from pathlib import Path

import pytest
from common import ROOT, SHARED_DATA, SMALL, imports_of, run_script
from sdss_server import make_stars, options_for, write_catalog

import download_sdss_data
import predict
import show_star
import train
from cache import read_stars
from catalog import Star, read_catalog
from cli import DataError
from star_files import catalog_path
from survey_files import read_spectrum
from train_options import parse_arguments as parse_training_options

FIELD = SHARED_DATA / "field"
needs_field = pytest.mark.skipif(not FIELD.exists(), reason="the inputs are not part of this repository")

HEADER = "name,subclass,plate,mjd,fiberID,ra,dec"
FIRST = ("302960290595629056", "M3", 269, 51910, 339)

# Catalogues: the file, the number of its stars and its first, or the message
CATALOGUES = {
    "catalogue_skyserver_default.csv": (5, (*FIRST, 149.75677, 0.79320029)),
    "catalogue_excel_trailing_cols.csv": (5, FIRST),
    "catalogue_float_ids.csv": (5, FIRST),
    "catalogue_nan_ra.csv": (5, (*FIRST, nan, nan)),
    "catalogue_null_ra.csv": (5, (*FIRST, nan, nan)),
    "catalogue_negative_int64.csv": (6, ("10945077900110745600", "M2", 9721, 57251, 745)),
    "gaia_names.csv": (20, ("2371519626175864960", *FIRST[1:], 149.75677, 0.79320029)),
    "objid_names.csv": (2, ("1237648720693755918", *FIRST[1:])),
    "download_unlabelled.csv": (1, ("my star 1", "", *FIRST[2:], 149.75677, 0.79320029)),
    "shuffled_positions.csv": (20, ("s0", "M0", 300, 52000, 1, 31.0, 8.0)),
    "same_name_other_star.csv": "line 3 and line 5 are both named 0, but lie 6.3° apart",
}


@needs_field
@pytest.mark.parametrize("name", CATALOGUES)
def test_a_catalogue_of_the_field(name):
    if isinstance(message := CATALOGUES[name], str):
        with pytest.raises(DataError, match=message):
            read_catalog(FIELD / name)
        return
    stars, left_out = read_catalog(FIELD / name, labelled="unlabelled" not in name)
    count, first = CATALOGUES[name]
    assert len(stars) == count and not left_out and repr(stars[0]) == repr(Star(*first))


# Cells without a value: the content, and its first star
CELLS = {
    "ECSV": (f"# %ECSV 1.0\n# ---\n# delimiter: ','\n{HEADER}\na,M0,300,52000,7,1,2\n", ("a", 1.0)),
    "numbers": ("specObjID,subclass,plate,mjd,fiberID\n302960290595629056,M3,nan,NULL,--\n", (FIRST[0], nan)),
    "names": ("specObjID,name,subclass\n302960290595629056,NaN,M3\n", (FIRST[0], nan)),
    "Excel": (f"{HEADER}\na,M0,300,52000,7,#N/A,#N/A\n", ("a", nan)),
    "SDSS, as a float": (f"{HEADER}\na,M0,300,52000,7,-9999.000,-9999.000\n", ("a", nan)),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_cell_without_a_value_is_empty_in_any_column(tmp_path, case):
    content, (name, ra) = CELLS[case]
    catalog_path(tmp_path).write_text(content)
    [star], _ = read_catalog(catalog_path(tmp_path))
    assert star.name == name and (star.ra == ra or isnan(star.ra) and isnan(ra))


# Spectra: the file, plate, mjd and fiberID, and the number of its pixels or the message
SPECTRA = [
    ("fits_unsigned_masks.fits", (618, 52049, 372), 3834),
    ("fits_spSpec_old.fits", (618, 52049, 372), 3834),
    ("fits_sdssv_header.fits", (618, 52049, 372), r"does not say which star it is \(no PLATEID, FIBERID\)"),
    ("fits_table_write_only.fits", (618, 52049, 372), r"does not say which star it is \(no PLATEID, MJD, FIBERID\)"),
]


@needs_field
@pytest.mark.parametrize("name, identity, expected", SPECTRA)
def test_a_spectrum_of_the_field(name, identity, expected):
    star = Star("a", "M0", *identity)
    if isinstance(expected, int):
        assert len(read_spectrum(FIELD / name, star).flux) == expected
        return
    with pytest.raises(DataError, match=expected):
        read_spectrum(FIELD / name, star)


def test_one_name_on_two_places_is_refused_where_only_the_spectra_tell(tmp_path, server):
    stars = [star._replace(name="0") for star in make_stars(server, 2)]
    write_catalog(tmp_path, stars, positions=False)
    with pytest.raises(DataError, match="0300-51901-0001 and 0300-51902-0002 are both named 0, but lie 0.022° apart"):
        download_sdss_data.main(options_for(tmp_path, server))
    assert not server.count("getjpeg")
    with pytest.raises(DataError, match="are both named 0"):  # by train.py, too
        read_stars(tmp_path, "spectrum", 1)


# Machines


def test_only_one_module_imports_matplotlib():
    """And shields it from the user's settings: a notebook's MPLBACKEND, usetex."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert {name for name, tree in trees.items() if "matplotlib" in imports_of(tree)} == {"plots.py"}


@pytest.mark.parametrize("script", ["train.py", "download_sdss_data.py", "simulate_sdss_data.py"])
def test_help_on_a_terminal_that_is_not_utf_8(script):
    done = run_script(script, "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and f"python {script}" in done.stdout


def test_a_reader_that_has_seen_enough_ends_a_script_silently():
    """As `| head` does."""
    read, write = os.pipe()
    os.close(read)
    code = "import cli; cli.run_as_script(lambda: print('x' * 10**6))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


MAIN: dict[str, Callable[[Path], None]] = {
    "train.py": lambda path: train.main(parse_training_options(train.__doc__, ["--data-dir", str(path)])),
    "predict.py": lambda path: predict.main(predict.parse_arguments(["a.pth", "--data-dir", str(path)])),
    "show_star.py": lambda path: show_star.main(show_star.parse_arguments(["--data-dir", str(path)])),
    "download_sdss_data.py": lambda path: download_sdss_data.main(["--data-dir", str(path)]),
}


@pytest.mark.parametrize("script", MAIN)
def test_a_file_in_place_of_the_data_directory_is_named(tmp_path, script):
    (tmp_path / "objects.csv").write_text(f"{HEADER}\n")
    with pytest.raises(OSError, match="Not a directory: .*objects.csv"):
        MAIN[script](tmp_path / "objects.csv")


def test_plots_that_cannot_be_written_are_found_before_the_first_epoch(stars_dir, tmp_path, monkeypatch):
    (tmp_path / "plots").touch()
    monkeypatch.setattr(train, "fit", lambda *arguments: pytest.fail("trained"))
    options = ("--data-dir", stars_dir, "--output-dir", tmp_path, *SMALL, "--modality", "spectrum")
    with pytest.raises(OSError, match="plots"):
        train.main(parse_training_options(train.__doc__, [str(option) for option in options]))
