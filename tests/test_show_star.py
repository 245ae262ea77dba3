"""show_star.py: its pages and its sheet, and what can be read in them."""

import contextlib
import gzip
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from astropy.io import fits
from common import run_script, stars_of
from lamost import lamost_file
from PIL import Image
from torch import nn
from untrained import save_untrained

import plots
import show_star
from cache import read_stars
from catalog import CLASS_NAMES, Star
from cli import DataError
from dataset import Batch
from plots import Figure
from preparation import SPECTRUM_LENGTH, WAVELENGTH
from star_files import catalog_path, cutout_path, spectrum_path


@pytest.fixture(scope="module")
def checkpoint(stars_dir, tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("checkpoint") / "a.pth", stars_dir, "spectrum")


def run(*arguments: object) -> None:
    show_star.main(show_star.parse_arguments([str(argument) for argument in arguments]))


def refuse(message: str, *arguments: object) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        run(*arguments)


def assert_picture(path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[0] > 400 and pixels.std() > 10


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """All that can be read in each figure that is drawn from now on; no file is written."""
    read = []

    @contextlib.contextmanager
    def figure_in_memory(path: Path, figsize: tuple[float, float], **options: object) -> Iterator[Figure]:
        yield (figure := Figure(figsize))
        artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
        read.append("\n".join(artist.get_text() for artist in artists))

    monkeypatch.setattr(show_star, "new_figure", figure_in_memory)
    return read


def test_as_a_user_starts_it_in_a_notebook(stars_dir, tmp_path):
    """In a notebook's environment, and with settings that the pages could not be drawn with."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nsavefig.format: pdf\n")
    backend, star = "module://matplotlib_inline.backend_inline", stars_of(stars_dir)[0]
    done = run_script("show_star.py", star.name, "--data-dir", stars_dir, cwd=tmp_path, MPLBACKEND=backend)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"plots/star_{star.spectrum_id}.png"]
    assert_picture(tmp_path / "plots" / f"star_{star.spectrum_id}.png")


def test_without_a_name_a_sheet_of_each_class(own_stars_dir, tmp_path, texts):
    stars = stars_of(own_stars_dir)
    cutout_path(own_stars_dir, stars[0]).write_bytes(b"damaged")
    run("--data-dir", own_stars_dir)
    assert "15 SIMULATED stars of 60" in texts[0] and "5″" in texts[0] and stars[0].name not in texts[0]
    for name in CLASS_NAMES:
        assert texts[0].count(f"{name}: ") == 3
    lines = catalog_path(own_stars_dir).read_text().splitlines()
    of_other_class = "\n".join(re.sub(r",M\d,", ",K7,", line) for line in lines)
    catalog_path(own_stars_dir).write_text(of_other_class)
    run("--data-dir", own_stars_dir)
    assert texts[1].count("K7: ") == 3

    shutil.rmtree(own_stars_dir / "images")
    run("--data-dir", own_stars_dir)
    assert texts[2].count("K7: ") == 3 and "5″" not in texts[2]
    shutil.rmtree(own_stars_dir / "spectra")
    refuse("none of its 60 stars has good spectra (no spectrum)", "--data-dir", own_stars_dir)


def test_a_page_for_each_star(own_stars_dir, tmp_path, checkpoint, capsys):
    first, second, third = stars_of(own_stars_dir)[:3]
    cutout_path(own_stars_dir, second).unlink()
    spectrum_path(own_stars_dir, third).write_bytes(b"damaged")
    options = ("--data-dir", own_stars_dir, "--output-dir", tmp_path / "plots", "--checkpoint", checkpoint)
    run(first.name, f"{second.plate}-{second.mjd}-{second.fiberID}", third.name, first.spectrum_id, *options)
    paths = [tmp_path / "plots" / f"star_{star.spectrum_id}.png" for star in (first, second, third)]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    for path in paths:
        assert_picture(path)
    assert Image.open(paths[0]).height > Image.open(paths[2]).height  # no spectrum, no map of the bands that decided

    refuse("no star Sirius", first.name, "Sirius", *options)
    shutil.rmtree(own_stars_dir / "images")
    refuse("not a FITS file (it begins with b'damaged')", third.name, *options)


def test_a_spectrum_alone_fills_the_width_of_its_page(own_stars_dir, tmp_path):
    star = stars_of(own_stars_dir)[0]
    cutout_path(own_stars_dir, star).unlink()
    run(star.name, "--data-dir", own_stars_dir, "--output-dir", tmp_path)
    pixels = np.asarray(Image.open(tmp_path / f"star_{star.spectrum_id}.png").convert("L"))
    dark = np.flatnonzero((pixels < 128).any(axis=0))  # columns
    assert np.ptp(dark) > 0.9 * pixels.shape[1]


def test_text_on_a_page(own_stars_dir, checkpoint, texts):
    star, other = stars_of(own_stars_dir)[:2]
    run(star.name, "--data-dir", own_stars_dir, "--checkpoint", checkpoint)
    for part in (star.name, f"label: {star.subclass}", "SIMULATED", "TiO", "CaH", "Na", "Hα", "vacuum wavelength",
                 "bad pixels (", "5″", "the network's input", "spectral type M", "outlier score", "network: M",
                 "lost without this piece", "10⁻¹⁷ erg s⁻¹", "TiO5 0.", "CaH3 0.", "zeta", "EW_Halpha", "Å, dM",
                 ):  # fmt: skip
        assert part in texts[0], part
    assert "\nN\n" not in texts[0]  # only an image of the sky has a north
    cutout_path(own_stars_dir, other).unlink()
    run(other.name, "--data-dir", own_stars_dir)
    assert "network" not in texts[1] and "spectral type" not in texts[1] and "no image" in texts[1]
    assert "CaH2 0." in texts[1]


def test_files_need_no_catalogue(stars_dir, tmp_path, checkpoint, texts, capsys):
    star = stars_of(stars_dir)[0]
    zipped, lamost = tmp_path / "a.fits.gz", tmp_path / "b.fits"
    zipped.write_bytes(gzip.compress(spectrum_path(stars_dir, star).read_bytes()))
    with fits.open(zipped) as hdus:
        table = hdus[1].data
        lamost.write_bytes(lamost_file(10 ** table["loglam"], table["flux"], table["ivar"]))
    fusion = save_untrained(tmp_path / "fusion.pth", stars_dir, "fusion")
    for options in ([], ["--checkpoint", checkpoint], ["--checkpoint", fusion]):
        run(zipped, lamost, "--data-dir", tmp_path / "absent", *options)
        first, second = texts[-2:]
        assert f"a, label: {star.subclass}" in first and "erg s⁻¹" in first and "no image" not in first
        assert "b, label: M3" in second and "flux (relative)" in second and "TiO5 0." in second
        assert ("spectral type M" in first) == ("lost without this piece" in first) == bool(options)
    printed = capsys.readouterr().out
    assert printed.count("star_a.png") == 3 and printed.count("trained with images, and gets none") == 1

    run(star.name, zipped, "--data-dir", stars_dir)
    assert f"label: {star.subclass}" in texts[-1] and f"{star.name} ({star.spectrum_id})" in texts[-1]
    (tmp_path / "text.fits").write_text("wavelength flux")
    refuse("text: ", tmp_path / "text.fits")
    refuse("cannot be read (No such file or directory)", tmp_path / "absent.fits")
    refuse("two of these stars have one name", zipped, tmp_path / "other" / "a.fits")


def test_an_image_of_the_sky_shows_north_and_east():
    axes = Figure().subplots()
    show_star.draw_cutout(axes, np.zeros((128, 128, 3), np.uint8), simulated=False)
    assert {text.get_text() for text in axes.texts} == {"5″", "", "N", "E"}


@pytest.mark.parametrize("name", ["618-52049-372", "0618-52049-0372", "00618-052049-00372", "é"])
def test_names_are_found_in_any_form(name):
    wanted, other = Star("\u00e9", "M0", 618, 52049, 372), Star("b", "M0", 618, 52049, 373)
    assert show_star.find_stars([name, "é"], [other, wanted], Path("objects.csv")) == [wanted]


def test_features_lie_where_the_spectrum_dips(stars_dir):
    """Marked in vacuum, where the files' wavelengths are: the mean M4 star is fainter just redwards of a band head."""
    prepared, _ = read_stars(stars_dir, "spectrum", 1)
    mean = prepared.spectra[:][prepared.targets == 4, 0].mean(dim=0)

    def flux(first: float, last: float) -> float:
        return mean[slice(*np.searchsorted(WAVELENGTH, (first, last)))].mean()

    for species, first, last in show_star.FEATURES:
        first, last = show_star.air_to_vacuum(np.array([first, last]))
        if species == "TiO":
            assert flux(first + 5, first + 45) < 0.97 * flux(first - 45, first - 5)
        elif species == "Na":
            assert flux(first - 4, last + 4) < 0.97 * (flux(first - 40, first - 10) + flux(last + 10, last + 40)) / 2


class TiOClassifier(nn.Module):
    """A classifier of known reasons: the mean flux of the TiO band at 7053 Å. Its training stars had no bands."""

    def __init__(self) -> None:
        super().__init__()
        self.standardise = SimpleNamespace(mean=torch.ones(SPECTRUM_LENGTH), filter=lambda spectra: spectra.unbind(1))
        head = show_star.air_to_vacuum(7053)
        self.band = slice(*np.searchsorted(WAVELENGTH, (head, head + 60)))

    def forward(self, batch: Batch) -> tuple[None, None, torch.Tensor]:
        depth = 1 - batch.spectra[:, 0, self.band].mean(dim=1)
        return None, None, torch.stack([depth, *[torch.zeros_like(depth)] * 4], dim=1)


def test_the_occlusion_map_shows_the_band_that_decided():
    classifier, spectra = TiOClassifier(), torch.ones(1, 2, SPECTRUM_LENGTH)
    spectra[:, 0, classifier.band] = 0.4
    centres, losses = show_star.occlusion_map(classifier, Batch(spectra, None, torch.zeros(1)))
    assert abs(centres[losses.argmax()] - 7085) < 60 and losses.max() == pytest.approx(0.6, abs=0.1)
    assert (np.abs(losses[np.abs(centres - 7085) > 250]) < 1e-6).all()


def test_only_earlier_pictures_are_replaced(stars_dir, tmp_path):
    name = stars_of(stars_dir)[0].spectrum_id
    mine = tmp_path / f"star_{name}.png"
    Image.new("RGB", (9, 9)).save(mine)
    before = mine.read_bytes()
    options = (name, "--data-dir", stars_dir, "--output-dir", tmp_path)
    refuse("this script did not write it", *options)
    assert mine.read_bytes() == before
    mine.unlink()
    for _ in range(2):
        run(*options)
    assert_picture(mine)


def test_a_checkpoint_needs_names(capsys):
    with pytest.raises(SystemExit) as exit_:
        show_star.parse_arguments(["--checkpoint", "a.pth"])
    assert exit_.value.code == 2 and "name the stars" in capsys.readouterr().err


def test_settings_of_the_user_are_there_again_after_a_figure(tmp_path):
    with plots.matplotlib.rc_context({"lines.linewidth": 7}):
        with plots.new_figure(tmp_path / "a", (2, 1)) as figure:
            assert figure.subplots().plot([1, 2])[0].get_linewidth() == 1.5
        assert plots.matplotlib.rcParams["lines.linewidth"] == 7
    assert Image.open(tmp_path / "a").format == "PNG"
