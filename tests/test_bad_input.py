"""Wrong catalogues, files, checkpoints and options: one clear line that names what is wrong, and nothing is written.

A star whose own file is wrong is set aside, counted and named; the others go on.
"""

import gzip
import io
import pickle
import re
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sdss_server
import torch
from astropy.io import fits
from common import checkpoint_contents
from PIL import Image

import data
import download_sdss_data
import predict
import show_history
import show_star
import simulate_sdss_data
import train
from data import DataError, Star
from model import FusionModel, save_checkpoint

PLACES = {"subclass": 1, "plate": 2, "mjd": 3, "fiberID": 4, "ra": 5, "dec": 6}


def run_as_script(main: Callable, argv: list[object], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a script's main as its last line does; returns the line with which it ends."""
    monkeypatch.setattr(sys, "argv", ["a_script.py"])
    with pytest.raises(SystemExit) as exit_:
        data.run_as_script(lambda: main([str(argument) for argument in argv]))
    assert isinstance(exit_.value.code, str), "a usage error, or none"  # sys.exit(line) prints it, with status 1
    return exit_.value.code.removeprefix("a_script.py: error: ")


def assert_one_line(line: str, *parts: object) -> None:
    assert all(str(part) in line for part in parts), line
    assert len(line.splitlines()) == 1 and "Traceback" not in line and len(line) < 1000


# Catalogues

HEADER = "name,subclass,plate,mjd,fiberID,ra,dec"
ROW = ["a", "M0", "300", "52000", "7", "150.0", "1.0"]


def catalog(**cells: str) -> str:
    """A catalogue whose second row holds these cells."""
    row = ["b", *ROW[1:4], "8", *ROW[5:]]
    for column, cell in cells.items():
        row[PLACES.get(column, 0)] = cell
    return "\n".join([HEADER, ",".join(ROW), ",".join(row), ""])


CATALOGS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "the file is empty"),
    "blank lines": ("\n\n\n", "the file is empty"),
    "only a mark": ("\ufeff", "the file is empty"),
    "header only": (HEADER + "\n", "no star of class M0, M1, M2, M3, M4 in it (no rows)"),
    "a column missing": ("name,subclass,plate,mjd\na,M0,300,52000\n", "column fiberID is missing"),
    "no header": (",".join(ROW) + "\n" + ",".join(ROW), "column name, subclass, plate, mjd, fiberID is missing"),
    "another header": ("id,class\n1,M0\n", "column name, subclass, plate, mjd, fiberID is missing"),
    "a column twice": (f"{HEADER},plate\n{','.join(ROW)},1\n", "a column stands twice"),
    "semicolons": (catalog().replace(",", ";"), "separated by commas"),
    "tabs": (catalog().replace(",", "\t"), "separated by commas"),
    "decimal commas": (catalog(ra="150,5"), "line 3: 8 cells where the header has 7 columns"),
    "a row cut short": (catalog() + "c,M0", "line 4: 2 cells where the header has 7 columns"),
    "a quote left open": (catalog() + '"c,M0,1', "not a comma-separated UTF-8 text file"),
    "a cell without end": (catalog(name="x" * 200_000), "not a comma-separated UTF-8 text file"),
    "latin-1": (catalog(name="é").encode("latin-1"), "not a comma-separated UTF-8 text file"),
    "utf-16": (catalog().encode("utf-16"), "not a comma-separated UTF-8 text file"),
    "a FITS file": (fits.PrimaryHDU(np.ones(99)).header.tostring().encode() + b"\xff\x80", "UTF-8"),
    "blank plate": (catalog(plate=""), "line 3, column plate: '' is not a whole number"),
    "blank name": (catalog(name=""), "line 3, column name"),
    "word for a plate": (catalog(plate="three"), "line 3, column plate: 'three'"),
    "fraction": (catalog(fiberID="7.5"), "line 3, column fiberID: '7.5'"),
    "NaN": (catalog(mjd="NaN"), "line 3, column mjd: 'NaN'"),
    "infinity": (catalog(plate="inf"), "line 3, column plate: 'inf'"),
    "negative": (catalog(plate="-300"), "line 3, column plate: '-300'"),
    "zero": (catalog(fiberID="0"), "line 3, column fiberID: '0'"),
    "plate of 15 bits": (catalog(plate="16384"), "line 3, column plate: '16384'"),
    "fiber of 13 bits": (catalog(fiberID="4096"), "line 3, column fiberID: '4096'"),
    "a Julian date": (catalog(mjd="2452000"), "line 3, column mjd: '2452000'"),
    "other digits": (catalog(plate="３００"), "line 3, column plate"),
    "thousands": (catalog(plate="1_000"), "line 3, column plate: '1_000'"),
    "right ascension of 400": (catalog(ra="400"), "line 3, column ra: '400' is not an angle"),
    "hours and minutes": (catalog(ra="10:00:00"), "line 3, column ra: '10:00:00'"),
    "declination of -91": (catalog(dec="-91"), "line 3, column dec: '-91'"),
    "NaN position": (catalog(dec="nan"), "line 3, column dec: 'nan'"),
    "rounded by Excel": (catalog(name="3.07417E+17"), "rounded by a spreadsheet"),
    "rounded in German": (catalog(name='"3,07417E+17"'), "rounded by a spreadsheet"),
    "rounded by pandas": (catalog(name="3.074166120115343e+17"), "rounded by a spreadsheet"),
    "all digits, 15 true": (catalog(name="307416612011534000"), "rounded by a spreadsheet"),
    "a path upwards": (catalog(name="../../.bashrc"), "line 3, column name: '../../.bashrc' cannot name a file"),
    "an absolute path": (catalog(name="/etc/cron.d/x"), "line 3, column name: '/etc/cron.d/x' cannot name a file"),
    "a drive": (catalog(name="C:x"), "line 3, column name: 'C:x' cannot name a file"),
    "backslashes": (catalog(name="..\\x"), "cannot name a file"),
    "NUL": (catalog(name="a\0b"), "line 3, column name: 'a\\x00b' cannot name a file"),
    "a line break": (catalog(name='"a\nb"'), "column name: 'a\\nb' cannot name a file"),
    "an escape": (catalog(name="\x1b[2J"), "column name: '\\x1b[2J' cannot name a file"),
    "a command": (catalog(name="$(touch x)"), "line 3, column name: '$(touch x)' cannot name a file"),
    "a wildcard": (catalog(name="*"), "line 3, column name: '*' cannot name a file"),
    "a hidden file": (catalog(name=".x"), "line 3, column name: '.x' cannot name a file"),
    "a name too long": (catalog(name="x" * 101), "at most 100 bytes"),
    "a name of long letters": (catalog(name="星" * 40), "at most 100 bytes"),
    "two classes of one spectrum": (catalog(fiberID="7", subclass="M3"), "is M3 here and M0 further up"),
}


@pytest.mark.parametrize("case", CATALOGS)
def test_a_wrong_catalogue(tmp_path, monkeypatch, case):
    content, message = CATALOGS[case]
    path = data.catalog_path(tmp_path)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for script, options in ((train, ("--output-dir", tmp_path / "out")), (download_sdss_data, ())):
        line = run_as_script(script.main, ["--data-dir", tmp_path, *options], monkeypatch)
        assert_one_line(line, path, message)
    assert list(tmp_path.iterdir()) == [path]


def test_rows_of_other_classes_are_counted_and_the_others_go_on(tmp_path):
    classes = ["M5", "K7", "M4.5:III (123657)", "M0III (168720)", "Carbon", "m0", "", "M1 (204445)", "M0"]
    rows = [",".join([f"star {i}", subclass, "300", "52000", str(i + 1), "", ""]) for i, subclass in enumerate(classes)]
    data.catalog_path(tmp_path).write_text("\n".join([HEADER, *rows, rows[-1]]))
    stars, left_out = data.read_catalog(data.catalog_path(tmp_path))
    assert [star.subclass for star in stars] == ["M1", "M0"]
    assert left_out == {
        **{f"subclass {name or '(empty)'} is not one of M0, M1, M2, M3, M4": 1 for name in classes[:7]},
        "repeats a spectrum listed further up": 1,
    }


def test_a_million_rows(tmp_path):
    with open(data.catalog_path(tmp_path), "w") as file:
        file.write(HEADER + "\n")
        for i in range(10**6):
            file.write(f"star {i},M{i % 5},{i // 4000 + 1},52000,{i % 4000 + 1},{i % 360},{i % 90}\n")
    began = time.process_time()
    stars, _ = data.read_catalog(data.catalog_path(tmp_path))
    assert len(stars) == 10**6 and stars[-1].spectrum_id == "0250-52000-4000"
    assert time.process_time() - began < 60  # 10 s when measured
    size = sum(map(sys.getsizeof, stars[0])) + sys.getsizeof(stars[0])
    assert size < 1000  # bytes a star, at most


# Spectra

STAR = Star("a", "M0", 300, 52000, 7, 150.0, 1.0)


def make_spectrum(change: Callable[[fits.HDUList], object] = lambda hdus: None, **columns: np.ndarray) -> bytes:
    """STAR's file, with other columns (None: without) or changed HDUs."""
    pixels = 3840
    usual = {"flux": np.full(pixels, 9.0), "loglam": (np.arange(pixels) + 35_800) * 1e-4, "ivar": np.ones(pixels)}
    arrays = {name: array for name, array in (usual | columns).items() if array is not None}
    table = fits.BinTableHDU.from_columns([fits.Column(name, "E", array=array) for name, array in arrays.items()])
    hdus = fits.HDUList([fits.PrimaryHDU(), table])
    hdus[0].header.update({"PLATEID": STAR.plate, "MJD": STAR.mjd, "FIBERID": STAR.fiberID})
    changed = change(hdus)
    content = io.BytesIO()
    (changed if isinstance(changed, fits.HDUList) else hdus).writeto(content)
    return content.getvalue()


def with_cards(**values: str) -> bytes:
    """STAR's file, with other values of keywords of its table."""
    content = WHOLE
    for key, value in values.items():
        card = f"{key:8}= {value:>20}".ljust(80)
        content, changed = re.subn(f"{key:8}= .{{70}}".encode(), card.encode(), content, count=1)
        assert changed
    return content


GRID = (np.arange(3840) + 35_800) * 1e-4
WHOLE = make_spectrum()
SPECTRA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "a page": (b"<!DOCTYPE html><title>503</title>", "not a FITS file (it begins with b'<!DOCTYPE html>"),
    "gzip": (gzip.compress(WHOLE), r"not a FITS file (it begins with b'\x1f\x8b"),
    "a picture": (b"\xff\xd8\xff\xe0" + bytes(3000), "not a FITS file"),
    "cut short": (WHOLE[:-1], "the file is truncated"),
    "a block missing": (WHOLE[:-2880], "the file is truncated"),
    "a byte too many": (WHOLE + b"x", "the file is truncated"),
    "zeros behind": (WHOLE + bytes(2880), "the file is truncated"),
    "columns without end": (with_cards(TFIELDS="999999999"), "not an SDSS spectrum (ValueError: TFIELDS"),
    "rows in words": (with_cards(NAXIS1="99999999999999", NAXIS2="'abc'"), "not an SDSS spectrum (MemoryError"),
    "no HDU 1": (make_spectrum(lambda hdus: fits.HDUList(hdus[:1])), "not an SDSS spectrum"),
    "an image in HDU 1": (
        make_spectrum(lambda hdus: fits.HDUList([hdus[0], fits.ImageHDU(np.ones((3, 3)))])),
        "not an SDSS spectrum",
    ),
    "no loglam": (make_spectrum(loglam=None), "not an SDSS spectrum"),
    "no flux": (make_spectrum(flux=None), "not an SDSS spectrum"),
    "no ivar": (make_spectrum(ivar=None), "not an SDSS spectrum"),
    "flux as whole numbers": (WHOLE.replace(b"TFORM1  = 'E", b"TFORM1  = 'J"), "not of floating-point numbers"),
    "no rows": (make_spectrum(flux=[], loglam=[], ivar=[]), "is empty"),
    "all pixels bad": (make_spectrum(ivar=np.zeros(3840)), "only 0 of the 3522 pixels"),
    "flux of NaN": (make_spectrum(flux=np.full(3840, np.nan)), "only 0 of the 3522 pixels"),
    "flux without end": (make_spectrum(flux=np.full(3840, np.inf)), "only 0 of the 3522 pixels"),
    "ivar of NaN": (make_spectrum(ivar=np.full(3840, np.nan)), "only 0 of the 3522 pixels"),
    "ivar without end": (make_spectrum(ivar=np.full(3840, np.inf)), "only 0 of the 3522 pixels"),
    "ivar below zero": (make_spectrum(ivar=np.full(3840, -1.0)), "only 0 of the 3522 pixels"),
    "no light": (make_spectrum(flux=np.zeros(3840)), "there is no star in this spectrum"),
    "light below zero": (make_spectrum(flux=np.full(3840, -3.0)), "there is no star in this spectrum"),
    "infrared": (make_spectrum(loglam=GRID + 0.4), "only 0 of the 3522 pixels"),
    "wavelengths in Å": (make_spectrum(loglam=10**GRID), "not on the SDSS grid"),
    "off the grid": (make_spectrum(loglam=GRID + 0.00005), "not on the SDSS grid"),
    "a gap": (make_spectrum(loglam=np.where(GRID > 3.7, GRID + 0.0001, GRID)), "not on the SDSS grid"),
    "from red to blue": (make_spectrum(loglam=GRID[::-1]), "its wavelengths do not increase"),
    "one out of order": (make_spectrum(loglam=np.where(np.arange(3840) == 9, GRID + 1, GRID)), "do not increase"),
    "wavelength NaN": (make_spectrum(loglam=np.where(np.arange(3840) == 9, np.nan, GRID)), "do not increase"),
    "another plate": (make_spectrum(lambda hdus: hdus[0].header.set("PLATEID", 301)), "another star ({'PLATEID': 301"),
    "another night": (make_spectrum(lambda hdus: hdus[0].header.set("MJD", 52001)), "the spectrum of another star"),
    "another fiber": (make_spectrum(lambda hdus: hdus[0].header.set("FIBERID", 8)), "the spectrum of another star"),
    "nobody's": (make_spectrum(lambda hdus: hdus[0].header.remove("FIBERID")), "'FIBERID': None"),
}


def place(directory: Path, content: bytes, suffix: str) -> Path:
    path = (data.spectrum_path if suffix == "fits" else data.cutout_path)(directory, STAR)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("case", SPECTRA)
def test_a_wrong_spectrum(tmp_path, case):
    content, message = SPECTRA[case]
    path = place(tmp_path, content, "fits")
    with pytest.raises(DataError) as error:
        data.load_spectrum(tmp_path, STAR)
    assert_one_line(str(error.value), path, message)


# Cutouts


def make_picture(*shape: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(10, 250, shape).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, kind)
    return content.getvalue()


def resized(content: bytes, height: int, width: int) -> bytes:
    """A JPEG that says in its header that it has another size."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", height, width) + content[place + 4 :]


PICTURE = make_picture(128, 128, 3)
CUTOUTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "a page": (b"<html>", "not a JPEG image"),
    "only the mark": (PICTURE[:3], "not a JPEG image"),
    "half": (PICTURE[: len(PICTURE) // 2], "a damaged JPEG image"),
    "without its last bytes": (PICTURE[:-20], "a damaged JPEG image"),
    "0 × 0": (resized(PICTURE, 0, 0), "JPEG image"),
    "1 × 1": (make_picture(1, 1, 3), "not a square colour cutout of 64 to 2048 pixels a side (1×1"),
    "63 × 63": (make_picture(63, 63, 3), "(63×63, mode RGB)"),
    "oblong": (make_picture(128, 64, 3), "(64×128, mode RGB)"),
    "grey": (make_picture(128, 128, 3, mode="L"), "(128×128, mode L)"),
    "for printers": (make_picture(128, 128, 3, mode="CMYK"), "(128×128, mode CMYK)"),
    "PNG": (make_picture(128, 128, 3, kind="PNG"), "not a JPEG image"),
    "GIF": (make_picture(128, 128, 3, kind="GIF"), "not a JPEG image"),
    "TIFF": (make_picture(128, 128, 3, kind="TIFF"), "not a JPEG image"),
    "a bomb": (resized(PICTURE, 65_500, 65_500), "a damaged JPEG image"),
    "a smaller bomb": (resized(PICTURE, 10_000, 10_000), "(10000×10000, mode RGB)"),
    "black": (sdss_server.make_black_tile(), "a black tile"),
    "words": (sdss_server.make_error_picture(), "a blank tile"),
}


@pytest.mark.parametrize("case", CUTOUTS)
@pytest.mark.filterwarnings("error")
def test_a_wrong_cutout(tmp_path, case):
    content, message = CUTOUTS[case]
    path = place(tmp_path, content, "jpg")
    with pytest.raises(DataError) as error:
        data.load_cutout(tmp_path, STAR)
    assert_one_line(str(error.value), path, message)


def test_a_file_cut_at_any_byte(tmp_path):
    """Refused, unless what is read of it is whole: a FITS file may end behind any HDU, and the first two are read."""
    spectrum = sdss_server.make_small_spectrum_bytes(STAR)
    cutout = sdss_server.make_cutout_bytes(1.0, 1.0, 64)
    for content, suffix, read in (
        (spectrum, "fits", lambda path: np.stack(data.read_spectrum(path, STAR)[:3])),
        (cutout, "jpg", lambda path: data.read_cutout(path).pixels),
    ):
        whole, accepted = read(place(tmp_path, content, suffix)), []
        for length in range(len(content)):
            path = place(tmp_path, content[:length], suffix)
            try:
                assert np.array_equal(read(path), whole)
                accepted.append(length)
            except DataError as error:
                assert_one_line(str(error), path)
        assert all(length % data.FITS_BLOCK == 0 for length in accepted) and len(accepted) <= 2


def test_stars_whose_files_are_wrong_are_set_aside_and_the_others_go_on(tmp_path, capsys):
    stars = [STAR._replace(name=f"star {i}", fiberID=i + 1) for i in range(len(CUTOUTS) + 2)]
    for star in stars:
        spectrum = make_spectrum(lambda hdus, star=star: hdus[0].header.set("FIBERID", star.fiberID))
        for path, content in ((data.spectrum_path, spectrum), (data.cutout_path, PICTURE)):
            path(tmp_path, star).parent.mkdir(parents=True, exist_ok=True)
            path(tmp_path, star).write_bytes(content)
    for star, (content, _) in zip(stars, CUTOUTS.values(), strict=False):
        data.cutout_path(tmp_path, star).write_bytes(content)
    data.catalog_path(tmp_path).write_text("\n".join([HEADER, *(",".join(map(str, star[:7])) for star in stars)]))

    prepared, not_used = train.read_stars(tmp_path, "fusion", 0)

    assert prepared.stars == stars[len(CUTOUTS) :]
    assert len(not_used["set_aside"]) == len(CUTOUTS)
    printed = capsys.readouterr().out
    for star, (_, message) in zip(stars, CUTOUTS.values(), strict=False):
        assert f"set aside: {data.cutout_path(tmp_path, star)}: " in printed and message in printed


# Checkpoints


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint") / "a.pth"
    small = FusionModel(hidden_size=32, num_heads=2, num_layers=1, modality="spectrum")
    save_checkpoint(path, small, **checkpoint_contents("spectrum"))
    return path.read_bytes()


class Intruder:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> tuple:
        return Path.write_text, (Path("intruder.txt"), "was here")


def spoil(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def spoilt(content: bytes) -> bytes:
        checkpoint = torch.load(io.BytesIO(content), weights_only=True)
        change(checkpoint)
        return saved(checkpoint)

    return spoilt


def saved(thing: object) -> bytes:
    content = io.BytesIO()
    torch.save(thing, content)
    return content.getvalue()


CHECKPOINTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "damaged, or not a file of PyTorch weights"),
    "words": (lambda content: b"not weights", "damaged, or not a file of PyTorch weights"),
    "half": (lambda content: content[: len(content) // 2], "damaged, or not a file of PyTorch weights"),
    "cut short": (lambda content: content[:-1], "damaged, or not a file of PyTorch weights"),
    "a pickle that acts": (lambda content: pickle.dumps(Intruder()), "damaged, or not a file of PyTorch weights"),
    "one in PyTorch's format": (lambda content: saved(Intruder()), "damaged, or not a file of PyTorch weights"),
    "one under our mark": (spoil(lambda c: c.update(config=Intruder())), "damaged, or not a file of PyTorch weights"),
    "another program's": (lambda content: saved({"state_dict": {}}), "not a checkpoint of this program"),
    "a tensor": (lambda content: saved(torch.ones(3)), "not a checkpoint of this program"),
    "a later format": (spoil(lambda c: c.update(format="m-star classifier 99")), "not a checkpoint of this program"),
    "no weights": (spoil(lambda c: c.pop("model_state")), "no model_state in its checkpoint"),
    "no arguments": (spoil(lambda c: c.pop("model_arguments")), "no model_arguments in its checkpoint"),
    "no config": (spoil(lambda c: c.pop("config")), "no config in its checkpoint; another version"),
    "no splits": (spoil(lambda c: c.pop("splits")), "no splits in its checkpoint; another version"),
    "no epoch": (spoil(lambda c: c.pop("epoch")), "no epoch in its checkpoint; another version"),
    "a config of words": (spoil(lambda c: c.update(config="fusion")), "no class_names, modality"),
    "an older set of options": (
        spoil(lambda c: c["config"].pop("sic_negatives")),
        "no sic_negatives in its config; another version of train.py wrote it",
    ),
    "no test stars": (spoil(lambda c: c["splits"].pop("test")), "no test in its splits; another version"),
    "other classes": (
        spoil(lambda c: c["config"].update(class_names=["K", "M"])),
        "made for other classes, ['K', 'M']",
    ),
    "a continuum of a degree beyond all": (
        spoil(lambda c: c["model_arguments"].update(continuum_degree=10**7)),
        "its weights are not those of its network",
    ),
    "a network of 7 classes": (
        lambda content: spoil(
            lambda c: c.update(
                model_arguments=c["model_arguments"] | {"num_classes": 7},
                model_state=FusionModel(**(c["model_arguments"] | {"num_classes": 7})).state_dict(),
            )
        )(content),
        "its network knows 7 classes, not 5",
    ),
    "another size": (spoil(lambda c: c["model_arguments"].update(hidden_size=64)), "not those of its network"),
    "weights missing": (spoil(lambda c: c["model_state"].popitem()), "not those of its network"),
    "weights from elsewhere": (
        spoil(lambda c: c["model_arguments"].update(image_weights="imagenet")),
        "not those of its network",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_wrong_checkpoint(tmp_path, monkeypatch, checkpoint_bytes, case):
    change, message = CHECKPOINTS[case]
    monkeypatch.chdir(tmp_path)
    data.catalog_path(tmp_path).write_text(catalog())
    path = tmp_path / "wrong.pth"
    path.write_bytes(change(checkpoint_bytes))
    before = set(tmp_path.rglob("*"))
    for script, options in (
        (train, ("--evaluate", path)),
        (predict, (path,)),
        (show_star, ("--checkpoint", path, "a")),
    ):
        assert_one_line(run_as_script(script.main, options, monkeypatch), path, message)
    assert set(tmp_path.rglob("*")) == before  # no output, no intruder


# Histories

HISTORIES = {
    "empty": ("", "damaged, or no JSON file"),
    "cut short": ('[{"config": ', "damaged, or no JSON file"),
    "no list": ("{}", "not a history"),
    "a list of numbers": ("[1, 2]", "not a history"),
    "no run": ("[]", "no run in it yet"),
    "brackets": ("[" * 100_000, "damaged, or no JSON file"),
}


@pytest.mark.parametrize("case", HISTORIES)
def test_a_wrong_history(tmp_path, monkeypatch, case):
    content, message = HISTORIES[case]
    path = tmp_path / "training_history.json"
    path.write_text(content)
    assert_one_line(run_as_script(show_history.main, ["--history", path], monkeypatch), path, message)


# Options

OPTIONS = [
    (train, "--epochs", ("0", "-1", "1.5", "nan", "1e3", "ten", "9" * 30, "9" * 5000, "")),
    (train, "--batch-size", ("0", "-32", "inf", "1e9")),
    (train, "--learning-rate", ("0", "-1e-3", "nan", "inf", "1e9", "1,5")),
    (train, "--validation-split", ("0", "1", "-0.2", "nan", "20%")),
    (train, "--test-split", ("1", "-0.1", "nan")),
    (train, "--seed", ("-1", "4294967296", "1.0")),
    (train, "--sic-weight", ("-1", "nan", "inf")),
    (train, "--num-workers", ("-1", "1000000")),
    (train, "--device", ("tpu", "")),
    (download_sdss_data, "--timeout", ("0", "-1", "nan", "inf", "1e9")),
    (download_sdss_data, "--backoff", ("0", "nan", "1e9")),
    (download_sdss_data, "--image-rate", ("0", "-1", "nan", "1e9")),
    (download_sdss_data, "--query", ("0", "-1", "50001")),
    (download_sdss_data, "--sas-url", ("file:///etc", "data.sdss.org", "http://", "https://x/?a=1", "javascript:1")),
    (simulate_sdss_data, "--per-class", ("0", "-1", "20001", "nan")),
    (simulate_sdss_data, "--boss-fraction", ("-0.1", "1.1", "nan")),
    (simulate_sdss_data, "--min-snr", ("0", "nan", "1e9")),
    (predict, "--least-certain", ("-1", "1001", "nan")),
]


@pytest.mark.parametrize(
    "script, option, value", [(script, option, value) for script, option, values in OPTIONS for value in values]
)
def test_a_wrong_option(tmp_path, monkeypatch, capsys, script, option, value):
    monkeypatch.chdir(tmp_path)
    places = {simulate_sdss_data: ["new"], predict: ["none.pth"]}.get(script, [])
    with pytest.raises(SystemExit) as exit_:
        script.main([*places, f"{option}={value}"])
    assert exit_.value.code == 2
    assert f"error: argument {option}: " in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
