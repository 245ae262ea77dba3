"""The catalogue is read as SkyServer, CasJobs, astroquery, TOPCAT, pandas and spreadsheets write it, or refused in one
line; identifiers; rows that are one star."""

import random
import time
from collections import Counter
from math import nan
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from common import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import catalog
from catalog import CLASS_NAMES, Star
from cli import DataError

settings.register_profile("any machine", deadline=None, max_examples=50, suppress_health_check=list(HealthCheck))
settings.load_profile("any machine")

HEADER = "name,subclass,plate,mjd,fiberID"
M3, M4 = ("302960290595629056", "M3", 269, 51910, 339), ("302974584246790144", "M4", 269, 51910, 391)
LINES = "302960290595629056,M3,269,51910,339\n302974584246790144,M4,269,51910,391\n"
BOSS = ("10945077900110745600", "M2", 9721, 57251, 745)


def read(directory: Path, content: str | bytes, labelled: bool = True) -> tuple[list[Star], Counter[str]]:
    path = directory / "objects.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return catalog.read_catalog(path, labelled=labelled)


def one_row(**cells: str) -> str:
    """A catalogue of one row, with these cells in place of the usual ones."""
    row = {"name": "b", "subclass": "M0", "plate": "300", "mjd": "52000", "fiberID": "8", "ra": "150", "dec": "1"}
    row |= cells
    return f"{','.join(row)}\n{','.join(row.values())}\n"


# What goes in, and the stars that must come out (without the fields that are not given)
READ: dict[str, tuple[str | bytes, list[tuple]]] = {
    "as the project writes it": (f"{HEADER}\n{LINES}", [M3, M4]),
    "other order, other columns": ("fiberID,r_mag,plate,mjd,subclass,name\n7,18,300,52000,M0,a\n",
                                   [("a", "M0", 300, 52000, 7)]),
    "SkyServer": ("#Table1\nspecobjid,plate,mjd,fiberid,ra,dec,subClass\n"
                  "302960290595629056,269,51910,339,149.75677,0.79320029,M3\n", [(*M3, 149.75677, 0.79320029)]),
    "CasJobs": ("specObjID,plate,mjd,fiberID,subClass\n302960290595629056,269,51910,339,M3\n", [M3]),
    "upper case": ("SPECOBJID,PLATE,MJD,FIBERID,SUBCLASS,RA,DEC\n302960290595629056,269,51910,339,M3,1,2\n",
                   [(*M3, 1.0, 2.0)]),
    "a specObjID alone": ("specObjID,subClass\n302960290595629056,M3\n", [M3]),
    "a name and a specObjID": ("name,specobjid,subclass\nmy star,302960290595629056,M3\n", [("my star", *M3[1:])]),
    "pandas with its index": (f",{HEADER}\n0,302960290595629056,M3,269,51910,339\n", [M3]),
    "pandas with gaps": (f"{HEADER},ra,dec\n302960290595629056,M3,269.0,51910.0,339.0,,\n", [M3]),
    "numpy.savetxt": (f"{HEADER}\n302960290595629056,M3,2.690e+02,5.1910e+04,3.39e+02\n", [M3]),
    "a byte-order mark": (f"\ufeff{HEADER}\n{LINES}", [M3, M4]),
    "Windows": (f"{HEADER}\n{LINES}".replace("\n", "\r\n"), [M3, M4]),
    "quotes and spaces": ('"name", subclass ,plate,mjd,"fiberID"\n"a b", M0 ,300,52000, 7\n',
                          [("a b", "M0", 300, 52000, 7)]),
    "blank lines": (f"\n{HEADER}\n\n{LINES},,,,\n\n", [M3, M4]),
    "empty columns at the end": (f"{HEADER},,\n" + LINES.replace("\n", ",,\n"), [M3, M4]),
    "cells of empty columns": (f"{HEADER}\n" + LINES.replace("\n", ",,\n"), [M3, M4]),
    "signed integers": (f"{HEADER}\n-7501666173598806016,M2,9721,57251,745\n{LINES}", [BOSS, M3, M4]),
    "floats with all digits": (f"{HEADER}\n3.0296029059562906e+17,M3,269,51910,339\n"
                               "302974584246790144.0,M4,269,51910,391\n", [M3, M4]),
    "a specObjID that ends in zeros": (f"{HEADER}\n305126053171456000,M1,271,51883,26\n",
                                       [("305126053171456000", "M1", 271, 51883, 26)]),
    "a Gaia source ID": (one_row(name="4928644747924606848"),
                         [("4928644747924606848", "M0", 300, 52000, 8, 150.0, 1.0)]),
    "a name of SIMBAD": (one_row(name="V* BL Lyn"), [("V* BL Lyn", "M0", 300, 52000, 8, 150.0, 1.0)]),
    "objIDs, one ends in zeros": (f"{HEADER}\n1237648720693755918,M3,269,51910,339\n"
                                  "1237648720693757000,M4,269,51910,391\n",
                                  [("1237648720693755918", *M3[1:]), ("1237648720693757000", *M4[1:])]),
    "some labels end in zeros": (f"{HEADER}\n123456789012345000,M3,269,51910,339\n"
                                 "636342839906737792,M4,269,51910,391\na,M0,300,52000,8\n",
                                 [("123456789012345000", *M3[1:]), ("636342839906737792", *M4[1:]),
                                  ("a", "M0", 300, 52000, 8)]),
    "a designation": (one_row(name="2MASS J04251456-0637168 (B)"),
                      [("2MASS J04251456-0637168 (B)", "M0", 300, 52000, 8, 150.0, 1.0)]),
    "a designation in brackets": (one_row(name="[KHM2004] 12"), [("[KHM2004] 12", "M0", 300, 52000, 8, 150.0, 1.0)]),
    "accents, decomposed": (one_row(name="e\u0301toile"), [("étoile", "M0", 300, 52000, 8, 150.0, 1.0)]),
    "files": ("file,subclass,mjd,fiberID,ra,dec\nspec-1-B2_sp03-004.fits.gz,M2,1,B,1,2\n./night 1/a.FIT,M1,,,,\n",
              [("spec-1-B2_sp03-004", "M2", 0, 0, 0, 1.0, 2.0, False, "spec-1-B2_sp03-004.fits.gz"),
               ("a", "M1", 0, 0, 0, nan, nan, False, "night 1/a.FIT")]),
    "a file of one star": ("name,subclass,plate,mjd,fiberID,file\na,M0,300,52000,7,\nb,M1,,,,spec.fits\n",
                           [("a", "M0", 300, 52000, 7), ("b", "M1", 0, 0, 0, nan, nan, False, "spec.fits")]),
    "one name, one place": (f"{HEADER},ra,dec\na,M0,300,52000,7,150,1\na,M0,301,52000,7,150.0001,1\n",
                            [("a", "M0", 300, 52000, 7, 150.0, 1.0), ("a", "M0", 301, 52000, 7, 150.0001, 1.0)]),
    "a class of BOSS": (one_row(subclass="M1 (204445)"), [("b", "M1", 300, 52000, 8, 150.0, 1.0)]),
    **{f"no position: {mark}": (one_row(ra=mark, dec=mark), [("b", "M0", 300, 52000, 8, nan, nan)])
       for mark in ("", "nan", "NaN", "null", "NULL", "--", "masked", "N/A", "None", "-9999")},
    **{f"simulated: {cell}": (one_row(simulated=cell), [("b", "M0", 300, 52000, 8, 150.0, 1.0, bool(simulated))])
       for cell, simulated in (("1", 1), ("True", 1), ("0", 0), ("False", 0), ("", 0), ("nan", 0))},
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_catalogue_is_read(tmp_path, case):
    content, expected = READ[case]
    for labelled in (True, False):
        stars, left_out = read(tmp_path, content, labelled)
        assert not left_out and repr(stars) == repr([Star(*row) for row in expected])  # NaN has a repr, but no equal


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "the file is empty"),
    "blank lines": ("\n\n\n", "the file is empty"),
    "only a mark": ("\ufeff", "the file is empty"),
    "header only": (HEADER + "\n", "no star of class M0, M1, M2, M3, M4 in it (no rows)"),
    "columns missing": ("name,subclass,plate\na,M0,300\n", "column mjd, fiberID is missing"),
    "no class": ("name,plate,mjd,fiberID\na,300,52000,1\n", "column subclass is missing"),
    "no header": ("a,M0,300,52000,7\nb,M0,300,52000,8\n", "column name, subclass, plate, mjd, fiberID is missing"),
    "a column twice": (f"{HEADER},Plate\na,M0,300,52000,7,1\n", "a column stands twice in the header line, plate"),
    "semicolons": (one_row().replace(",", ";"), "separated by commas"),
    "tabs": (one_row().replace(",", "\t"), "separated by commas"),
    "decimal commas": (one_row(ra="150,5"), "line 2: 8 cells where the header has 7 columns"),
    "a row cut short": (one_row() + "c,M0", "line 3: 2 cells where the header has 7 columns"),
    "a quote left open": (one_row() + '"c,M0,1', "not a comma-separated UTF-8 text file"),
    "a cell without end": (one_row(name="x" * 200_000), "not a comma-separated UTF-8 text file"),
    "latin-1": (one_row(name="é").encode("latin-1"), "not a comma-separated UTF-8 text file"),
    "utf-16": (one_row().encode("utf-16"), "not a comma-separated UTF-8 text file"),
    "a FITS file": (fits.PrimaryHDU(np.ones(99)).header.tostring().encode() + b"\xff\x80", "UTF-8"),
    "blank plate": (one_row(plate=""), "line 2, column plate: '' is not a whole number from 1 to 16383"),
    "word for a plate": (one_row(plate="three"), "line 2, column plate: 'three'"),
    "fraction": (one_row(fiberID="7.5"), "line 2, column fiberID: '7.5'"),
    "NaN": (one_row(mjd="NaN"), "line 2, column mjd: '' is not a whole number"),
    "infinity": (one_row(plate="inf"), "line 2, column plate: 'inf'"),
    "negative": (one_row(plate="-300"), "line 2, column plate: '-300'"),
    "zero": (one_row(fiberID="0"), "line 2, column fiberID: '0'"),
    "plate of 15 bits": (one_row(plate="16384"), "line 2, column plate: '16384'"),
    "fiber of 13 bits": (one_row(fiberID="4096"), "line 2, column fiberID: '4096'"),
    "a Julian date": (one_row(mjd="2452000"), "line 2, column mjd: '2452000'"),
    "digits without end": (one_row(plate="9" * 5000), "line 2, column plate"),
    "other digits": (one_row(plate="３００"), "line 2, column plate"),
    "thousands": (one_row(plate="1_000"), "line 2, column plate: '1_000'"),
    "right ascension of 400": (one_row(ra="400"), "line 2, column ra: '400' is not an angle"),
    "hours and minutes": (one_row(ra="10:00:00"), "line 2, column ra: '10:00:00'"),
    "declination of -91": (one_row(dec="-91"), "line 2, column dec: '-91'"),
    "rounded by Excel": (one_row(name="3.07417E+17"), "line 2, column name: 3.07417E+17 is a specObjID rounded"),
    "rounded in German": (one_row(name='"3,07417E+17"'), "rounded by a spreadsheet"),
    "rounded by pandas": (one_row(name="3.074166120115343e+17"), "rounded by a spreadsheet"),
    "15 true digits": (f"{HEADER}\n307416612011534000,M0,273,51957,167\n302960290595629000,M3,269,51910,339\n"
                       "302974584246790144,M4,269,51910,391\n", "line 2, column name: 307416612011534000 is a spec"),
    "one name, two places": (f"{HEADER},ra,dec\n0,M0,300,52000,7,150,1\nb,M0,300,52000,8,,\n0,M1,301,52000,7,150,1.5\n",
                             "line 2 and line 4 are both named 0, but lie 0.5° apart"),
    "two classes of one spectrum": (f"{HEADER}\na,M0,300,52000,7\nb,M3,300,52000,7\n",
                                    "line 3: spectrum 0300-52000-0007 is M3 here and M0 further up"),
    "a row without file": ("name,subclass,file\na,M0,a.fits\nb,M0,\n", "line 3, column plate: '' is not a whole"),
    "a file of no name": ("file,subclass\n$HOME,M0\n", "line 2, column name: '$HOME' cannot name a file"),
    **{f"as a file: {file!r}": (f"file,subclass\n{file},M0\n", "line 2, column file: ") for file in
       ("../a.fits", "/etc/a.fits", "night/../../a.fits", "a\x1b.fits")},
    "one file, two classes": ("file,subclass\na.fits,M0\n./a.fits,M1\n", "line 3: spectrum a.fits is M1 here and M0"),
    "a class with a path": (one_row(subclass="../M0"), "no star of class"),
    "a name too long": (one_row(name="x" * 101), "at most 100 bytes"),
    "a name of long letters": (one_row(name="星" * 40), "at most 100 bytes"),
    **{f"as a name: {name!r}": (one_row(name=name), "line 2, column name: ") for name in
       ("", "../../.bashrc", "/etc/cron.d/x", "..\\x", "a\0b", "\x1b[2J", "$(touch x)", "*", ".x")},
    "a line break in a name": (one_row(name='"a\nb"'), "column name: 'a\\nb' cannot name a file"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_catalogue_is_refused_in_one_line_that_names_it(tmp_path, case):
    content, message = REFUSED[case]
    with pytest.raises(DataError) as error:
        read(tmp_path, content)
    line = str(error.value)
    assert message in line and line.startswith(str(tmp_path / "objects.csv"))
    assert len(line.splitlines()) == 1 and len(line) < 1000


def test_an_absent_catalogue_is_named(tmp_path):
    with pytest.raises(DataError, match="objects.csv: no such file"):
        catalog.read_catalog(tmp_path / "objects.csv")


def test_other_classes_and_repeated_rows_are_left_out_and_counted(tmp_path):
    classes = ["M5", "K7", "M4.5:III (123657)", "M0III (168720)", "gM0", "sdM1", "", "M1 (204445)", "dM0"]
    rows = [f"star {i},{subclass},300,52000,{i + 1}" for i, subclass in enumerate(classes)]
    text = "\n".join([HEADER, *rows, rows[-1], "a row without identifiers,K7,,,"])
    stars, left_out = read(tmp_path, text)
    assert [star.subclass for star in stars] == ["M1", "M0"]
    reasons = [f"subclass {name or '(empty)'} is not one of M0, M1, M2, M3, M4" for name in [*classes[:7], "K7"]]
    assert left_out == Counter([*reasons, "repeats a spectrum listed further up"])
    stars, left_out = read(tmp_path, text.rpartition("\n")[0], labelled=False)
    assert [star.subclass for star in stars] == [*classes[:7], "M1", "M0"] and left_out.total() == 1
    assert [star.class_name for star in stars] == [""] * 7 + ["M1", "M0"]


def test_stars_without_label(tmp_path):
    text = "name,plate,mjd,fiberID,ra,dec\nmy star 1,269,51910,339,149.75677,0.79320029\n"
    assert read(tmp_path, text, labelled=False)[0] == [Star("my star 1", "", *M3[2:], 149.75677, 0.79320029)]


def test_the_projects_catalogue_is_400_m_stars():
    stars, left_out = catalog.read_catalog(ROOT / "objects.csv")
    assert len(stars) == 400 and not left_out and {star.subclass for star in stars} == set(CLASS_NAMES)
    for star in stars:
        assert catalog.decode_spec_obj_id(star.name) == (star.plate, star.mjd, star.fiberID, "26")


def test_a_hundred_thousand_rows(tmp_path):
    rows = (f"star {i},M{i % 5},{i // 4000 + 1},52000,{i % 4000 + 1},{i % 360},{i % 90}" for i in range(10**5))
    text = "\n".join([f"{HEADER},ra,dec", *rows])
    began = time.process_time()
    assert len(read(tmp_path, text)[0]) == 10**5
    assert time.process_time() - began < 15  # 1 s when measured


# specObjID

SPEC_OBJ_IDS = [
    ("307416612011534336", 273, 51957, 167, "26", 26),
    ("4238154523191472128", 3764, 55514, 972, "v5_7_0", 700),
    ("3588350836130029568", 3187, 54821, 392, "104", 104),
    ("11258999466550599680", 10000, 57346, 1, "v5_10_0", 1000),
    ("10945077900110745600", 9721, 57251, 745, "v5_13_0", 1300),
]


@pytest.mark.parametrize("name, plate, mjd, fiberID, run2d, number", SPEC_OBJ_IDS)
def test_spec_obj_id_of_sdss(name, plate, mjd, fiberID, run2d, number):
    assert catalog.decode_spec_obj_id(name) == (plate, mjd, fiberID, run2d)
    assert str(catalog.encode_spec_obj_id(plate, mjd, fiberID, number)) == name


@pytest.mark.parametrize(
    "name",
    ["LHS 1140", "12345", "1024", str(2**64), "307416612011534337", "-1024", "１０２４", "", "9" * 5000,
     "2371519626175864960", "875864782229178624", "1237648720693757952",
     *(str(catalog.encode_spec_obj_id(*fields)) for fields in
       [(200, 52000, 7, 26), (300, 56000, 7, 26), (300, 52000, 641, 26), (300, 52000, 7, 27),
        (4000, 54000, 7, 1300), (4000, 56000, 1001, 1300), (4000, 56000, 7, 26)])],
)  # fmt: skip
def test_other_labels_are_no_spec_obj_id(name):
    assert catalog.decode_spec_obj_id(name) is None


def test_hardly_a_gaia_source_id_is_a_spec_obj_id():
    chance = random.Random(0)  # HEALPix pixel of level 12, then a running number
    names = [str(chance.randrange(12 * 4**12) << 35 | chance.randrange(2**28) << 7) for _ in range(20_000)]
    assert sum(catalog.decode_spec_obj_id(name) is not None for name in names) <= 10


@given(
    st.tuples(st.integers(266, 3522), st.integers(51_500, 55_099), st.integers(1, 640), st.sampled_from([26, 103, 104]))
    | st.tuples(st.integers(3523, 2**14 - 1), st.integers(55_000, 59_999), st.integers(1, 1000), st.integers(400, 1399))
)
def test_a_spec_obj_id_comes_back_in_every_notation(path, fields):
    value = catalog.encode_spec_obj_id(*fields)
    signed = value - 2**64 * (value >= 2**63)
    floats = [float(value)] * (value < 2**63 or fields[-1] % 2 == 0)  # of 53 bits: above, an odd run2d is lost
    path.write_text("\n".join(["specObjID,subclass", *(f"{text},M0" for text in (value, signed, *floats))]))
    stars, left_out = catalog.read_catalog(path)
    assert [star[:5] for star in stars] == [(str(value), "M0", *fields[:3])] and left_out.total() == 1 + len(floats)


# The same star


def test_rows_within_two_arcseconds_or_of_one_name_are_one_star():
    stars = [
        Star("a", "M0", 1, 52000, 1, 10.0, 60.0),
        Star("b", "M0", 2, 52000, 1, 10.0, 60.0 + 1.5 / 3600),
        Star("c", "M0", 3, 52000, 1, 10.0 + 1.5 / 3600 / 0.5, 60.0),  # cos 60° = 0.5: 1.5″ on the sky
        Star("d", "M0", 4, 52000, 1, 10.0, 60.0 + 3.6 / 3600),  # 2.1″ from b
        Star("e", "M0", 5, 52000, 1),
        Star("e", "M1", 6, 52000, 1, 200.0, 0.0),
        Star("f", "M0", 7, 52000, 1, 359.9999, 0.0),
        Star("g", "M0", 8, 52000, 1, 0.0001, 0.0),  # 0.72″ from f, across 0°
    ]
    groups = catalog.group_same_stars(stars)
    assert groups[0] == groups[1] == groups[2] and groups[4] == groups[5] and groups[6] == groups[7]
    assert len(set(groups)) == 4
    assert len(set(catalog.group_same_stars([star._replace(ra=nan) for star in stars]))) == 7
    assert len(catalog.group_same_stars([])) == 0
    assert catalog.count_known(stars[:4], stars[1:2]) == 3 and catalog.count_known(stars, []) == 0
    assert catalog.separation_arcsec(*stars[0][5:7], *stars[2][5:7]) == pytest.approx(1.5, abs=1e-4)
    assert catalog.separation_arcsec(0, 90, 123, -90) == pytest.approx(180 * 3600)


def test_every_output_says_how_many_stars_are_simulated():
    real, simulated = Star("a", "M0", 1, 52000, 1), Star("b", "M0", 1, 52000, 2, simulated=True)
    described = [catalog.describe(stars) for stars in ([real], [simulated], [real, simulated])]
    assert described == ["1 stars", "1 SIMULATED stars", "2 stars, 1 of them SIMULATED"]


# Catalogues as chance makes them


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("catalogues") / "objects.csv"


STARS = st.builds(
    Star,
    name=st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_ .+\-]{5,30}[A-Za-z0-9]\Z"),  # longer than marks of an empty cell
    subclass=st.sampled_from(CLASS_NAMES),
    plate=st.integers(1, 2**14 - 1),
    mjd=st.integers(50_000, 50_000 + 2**14 - 1),
    fiberID=st.integers(1, 2**12 - 1),
    ra=st.floats(0, 360),
    dec=st.floats(-90, 90),
    simulated=st.booleans(),
    file=st.just(""),
)


@given(st.lists(STARS, min_size=1, max_size=8, unique_by=(lambda star: star.spectrum_id, lambda star: star.name)),
       st.randoms())  # fmt: skip
def test_a_catalogue_comes_back_as_the_stars_that_were_written(path, stars, chance):
    columns = list(Star._fields)
    chance.shuffle(columns)
    rows = [[str(getattr(star, column)) for column in columns] for star in stars]
    header = [chance.choice([column, column.lower(), column.upper()]) for column in columns]
    quoted = [",".join(f'"{cell}"' if chance.random() < 0.5 else cell for cell in row) for row in [header, *rows]]
    text = chance.choice(["", "\ufeff", "#Table1\n"]) + chance.choice(["\n", "\r\n"]).join(quoted)
    path.write_text(text, encoding="utf-8", newline="")
    assert catalog.read_catalog(path) == (stars, Counter())


CELLS = st.text(max_size=12) | st.sampled_from(["M0", "300", "52000", "7", "", "1e3", '"', "\0", "../x", "nan"])
TABLES = st.lists(st.lists(CELLS, max_size=8).map(",".join), max_size=5).map("\n".join)


@given(TABLES.map(lambda rows: f"{HEADER},ra,dec\n{rows}".encode(errors="replace")) | st.binary(max_size=200))
@example(b"name,subclass,plate,mjd,fiberID\na,M\x1e0,1,52000,1")
@example(b"name,subclass,plate,mjd,fiberID\n1e999,M0,1,52000,1")
@example(b"name,subclass,plate,mjd,fiberID\n" + b"0" * 5000 + b",M0,1,52000,1")
def test_any_other_text_is_refused_or_gives_stars_that_can_be_named(path, content):
    path.write_bytes(content)
    for labelled in (True, False):
        try:
            stars, _ = catalog.read_catalog(path, labelled=labelled)
        except DataError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            continue
        for star in stars:
            assert star.name and not {"/", "\\", "\0"} & set(star.name) and not star.name.startswith(".")
            assert star.class_name in ("", *CLASS_NAMES) and (star.subclass + "a").isprintable()


def test_rows_left_out_are_reported_by_reason(capsys):
    catalog.report_left_out(Counter({"subclass K7 is not one of M0": 2, "repeats a spectrum": 1}))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "rows of the catalogue left out: 2 (subclass K7 is not one of M0)",
        "rows of the catalogue left out: 1 (repeats a spectrum)",
    ]
