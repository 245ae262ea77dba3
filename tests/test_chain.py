"""The whole chain as a user walks it, each script a process of its own, against a local server.

python -m pytest -m slow tests/test_chain.py
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sdss_server
from astropy.table import MaskedColumn, Table
from common import SMALL, run_script
from sdss_server import SdssServer, make_stars, options_for

from catalog import CLASS_NAMES, Star, read_catalog
from star_files import FileIndex, catalog_path, cutout_path, spectrum_path

pytestmark = pytest.mark.slow

STARS = 25
TINY = (*SMALL, "--epochs", 1)


@pytest.fixture(scope="module")
def server() -> Iterator[SdssServer]:
    with sdss_server.running_server() as running:
        for star in make_stars(running, STARS):
            running.list_star(star, snr=10.0)
        yield running


@pytest.fixture(scope="module")
def stars(server) -> list[Star]:
    return list(make_stars(server, STARS))


def run(script: str, *arguments: object, cwd: Path) -> str:
    """Run a script to its successful end in the user's directory; returns its standard output."""
    done = run_script(script, *arguments, cwd=cwd, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(data_dir: Path) -> Path:
    """The checkpoint of a short run, beside the data."""
    run("train.py", "--data-dir", data_dir, *TINY, cwd=data_dir)
    (checkpoint,) = (data_dir / "checkpoints").glob("best_model_*.pth")
    return checkpoint


def predict(checkpoint: Path, data_dir: Path) -> list[dict[str, str]]:
    """The rows of predictions.csv; every star must have a prediction."""
    run("predict.py", checkpoint, "--data-dir", data_dir, "--num-workers", 1, cwd=data_dir)
    with open(data_dir / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(row["predicted_subclass"] in CLASS_NAMES and not row["problem"] for row in rows)
    return rows


@pytest.fixture(scope="module")
def queried(server, tmp_path_factory) -> tuple[Path, Path]:
    """A data directory that began with --query, and the checkpoint trained on it."""
    data_dir = tmp_path_factory.mktemp("queried")
    run("download_sdss_data.py", *options_for(data_dir, server, "--query", STARS // 5), cwd=data_dir)
    run("download_sdss_data.py", *options_for(data_dir, server), cwd=data_dir)
    return data_dir, train(data_dir)


def test_from_a_query_to_a_page(queried, stars):
    data_dir, checkpoint = queried
    rows = predict(checkpoint, data_dir)
    assert {(row["name"], row["catalog_subclass"]) for row in rows} == {(star.name, star.subclass) for star in stars}
    label = f"{stars[0].plate}-{stars[0].mjd}-{stars[0].fiberID}"
    printed = run("show_star.py", label, "--data-dir", data_dir, "--checkpoint", checkpoint, cwd=data_dir)
    assert printed.split() == [f"plots/star_{stars[0].spectrum_id}.png"]
    assert (data_dir / printed.strip()).stat().st_size > 10_000


def write_as_astroquery(path: Path, stars: list[Star]) -> None:
    """SkyServer's spelling, and some positions masked."""
    columns = dict(zip(Star._fields, zip(*stars, strict=True), strict=True))
    masked = np.arange(len(stars)) % 4 == 0
    table = {
        "ra": MaskedColumn(columns["ra"], mask=masked),
        "dec": MaskedColumn(columns["dec"], mask=masked),
        "specobjid": np.array(columns["name"], dtype=np.uint64),
        "run2d": ["26"] * len(stars),
        **{name.lower(): columns[name] for name in ("plate", "mjd", "fiberID")},
        "subClass": columns["subclass"],
    }
    Table(table).write(path, format="csv")


def write_as_a_spreadsheet(path: Path, stars: list[Star]) -> None:
    """All numbers are floats, the header is in capitals, two empty columns follow."""
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["SPECOBJID", "SUBCLASS", "PLATE", "MJD", "FIBERID", "RA", "DEC", "", ""])
        table.writerows([float(star.name), star.subclass, *map(float, star[2:7]), "", ""] for star in stars)


@pytest.mark.parametrize("write", [write_as_astroquery, write_as_a_spreadsheet])
def test_a_catalogue_of_another_program(server, stars, tmp_path, write: Callable[[Path, list[Star]], None]):
    write(catalog_path(tmp_path), stars)
    assert [star[:5] for star in read_catalog(catalog_path(tmp_path))[0]] == [star[:5] for star in stars]
    run("download_sdss_data.py", *options_for(tmp_path, server), cwd=tmp_path)
    assert all(path_of(tmp_path, star).exists() for star in stars for path_of in (spectrum_path, cutout_path))
    rows = predict(train(tmp_path), tmp_path)
    assert [row["name"] for row in rows] == [star.name for star in stars]


def test_stars_without_label(server, stars, queried, tmp_path):
    rows = [f"my star {star.fiberID},{star.plate},{star.mjd},{star.fiberID},{star.ra},{star.dec}" for star in stars]
    catalog_path(tmp_path).write_text("\n".join(["name,plate,mjd,fiberID,ra,dec", *rows]))
    run("download_sdss_data.py", *options_for(tmp_path, server), cwd=tmp_path)
    unlabelled = [star._replace(name=f"my star {star.fiberID}", subclass="") for star in stars]
    index = FileIndex(tmp_path)
    assert [index.spectrum(star).parent for star in unlabelled] == [tmp_path / "spectra"] * STARS
    assert [index.cutout(star).parent for star in unlabelled] == [tmp_path / "images"] * STARS
    data_dir, checkpoint = queried
    own = {row["plate"] + row["mjd"] + row["fiberID"]: row for row in predict(checkpoint, data_dir)}
    for row in predict(checkpoint, tmp_path):
        labelled = own[row["plate"] + row["mjd"] + row["fiberID"]]
        assert row["catalog_subclass"] == "" and row["predicted_subclass"] == labelled["predicted_subclass"]
        assert float(row["p_M0"]) == pytest.approx(float(labelled["p_M0"]), abs=1e-4)
