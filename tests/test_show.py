"""show_star.py and show_history.py as a user starts them, and what is in their pictures."""

import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from common import checkpoint_contents, run_script
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import data
import outliers
import show_history
import show_star
from data import DataError
from model import FusionModel, SpectrumNormalisation, save_checkpoint
from predict import read_files
from train import Batch


@pytest.fixture(scope="module")
def stars_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    done = run_script("simulate_sdss_data.py", directory, "--per-class", 4, "--seed", 7)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def own_dir(stars_dir, tmp_path) -> Path:
    """A copy of the stars that a test may spoil."""
    return shutil.copytree(stars_dir, tmp_path / "stars")


@pytest.fixture(scope="module")
def checkpoint(stars_dir, tmp_path_factory) -> Path:
    """A small network that reads spectra and learnt nothing, but knows the mean of these stars."""
    spectra = torch.from_numpy(np.stack([data.load_spectrum(stars_dir, star) for star in read_stars(stars_dir)]))
    model = FusionModel(hidden_size=32, num_heads=2, num_layers=1, modality="spectrum")
    model.spectrum_normalisation.fit(spectra)
    references = outliers.fit_references([Batch(spectra, None, None, torch.zeros(len(spectra)))])
    path = tmp_path_factory.mktemp("checkpoint") / "a.pth"
    save_checkpoint(path, model, **checkpoint_contents("spectrum"), references=references)
    return path


def read_stars(data_dir: Path) -> list[data.Star]:
    return data.read_catalog(data.catalog_path(data_dir))[0]


def assert_picture(path: Path) -> None:
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape[0] > 400 and pixels.std() > 10


def show(*arguments: object, script: str = "show_star.py") -> str:
    """What a script prints that is started as a user starts it."""
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(script: ModuleType, message: str, *arguments: object) -> None:
    """The script ends with a DataError, of which run_as_script makes one line."""
    with pytest.raises(DataError, match=re.escape(message)):
        script.main([str(argument) for argument in arguments])


def texts(figure: Figure) -> str:
    """All that can be read in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


# Stars


def test_without_a_name_a_sheet_of_each_class(own_dir, tmp_path):
    stars = read_stars(own_dir)
    data.cutout_path(own_dir, stars[0]).write_bytes(b"damaged")
    assert show("--data-dir", own_dir, "--output-dir", tmp_path).strip() == str(tmp_path / "stars.png")
    assert_picture(tmp_path / "stars.png")
    said = texts(show_star.draw_sheet(stars, own_dir))
    assert "15 SIMULATED stars of 20" in said and "5″" in said and stars[0].name not in said
    for name in data.CLASS_NAMES:
        assert said.count(f"{name}: ") == 3
    unlabelled = [star._replace(subclass="") for star in stars]
    assert texts(show_star.draw_sheet(unlabelled, own_dir)).count("no label: ") == 3

    shutil.rmtree(own_dir / "images")
    message = "none of its 20 stars has a good spectrum and a good image (no image)"
    refuse(show_star, message, "--data-dir", own_dir, "--output-dir", tmp_path)


def test_a_page_for_each_star(own_dir, tmp_path, checkpoint):
    first, second, third = read_stars(own_dir)[:3]
    data.cutout_path(own_dir, second).unlink()
    data.spectrum_path(own_dir, third).write_bytes(b"damaged")
    options = ("--data-dir", own_dir, "--output-dir", tmp_path / "plots", "--checkpoint", checkpoint)
    printed = show(first.name, second.spectrum_id, third.name, first.name, *options)
    paths = [tmp_path / "plots" / f"star_{star.spectrum_id}.png" for star in (first, second, third)]
    assert printed.split() == [str(path) for path in paths]
    for path in paths:
        assert_picture(path)
    assert Image.open(paths[0]).height > Image.open(paths[2]).height  # no spectrum, no map of what decided

    refuse(show_star, "no star Sirius", first.name, "Sirius", *options)
    shutil.rmtree(own_dir / "images")
    refuse(show_star, "not a FITS file (it begins with b'damaged'); no image", third.name, *options)


def test_what_stands_on_a_page(stars_dir, checkpoint):
    star = read_stars(stars_dir)[0]
    entry = read_files(stars_dir, star)
    model, contents = show_star.load_checkpoint(checkpoint)
    bad = int((entry.observed.ivar <= 0).sum())
    said = texts(show_star.draw_star(entry, model, contents["references"]))
    for part in (star.name, f"catalogue: {star.subclass}", "SIMULATED", "TiO", "CaH", "Na", "Hα", "vacuum wavelength",
                 f"bad pixels ({bad})", "5″", "25.6″", "mean of the training stars", "expected subclass", "unlikeness",
                 "network: M", "what the network sees of it", "less its continuum"):  # fmt: skip
        assert part in said, part
    said = texts(show_star.draw_star(entry, None, {}))
    assert "network" not in said.replace("what the network gets", "") and "expected" not in said
    # Only an image from the sky has a north.
    assert "\nN\n" not in said
    on_the_sky = entry._replace(star=star._replace(simulated=False))
    assert "\nN\n" in texts(show_star.draw_star(on_the_sky, None, {}))


def test_features_lie_where_the_spectrum_dips(stars_dir):
    """Marked in vacuum, where the files' wavelengths are: the mean M4 star is fainter just redwards of a band head."""
    members = [star for star in read_stars(stars_dir) if star.subclass == "M4"]
    mean = np.mean([data.load_spectrum(stars_dir, star) for star in members], axis=0)

    def flux(first: float, last: float) -> float:
        return mean[slice(*np.searchsorted(show_star.WAVELENGTH, (first, last)))].mean()

    for species, first, last in show_star.FEATURES:
        first, last = show_star.air_to_vacuum(np.array([first, last]))
        if species == "TiO":
            assert flux(first + 5, first + 45) < 0.97 * flux(first - 45, first - 5)
        elif species == "Na":
            assert flux(first - 4, last + 4) < 0.97 * (flux(first - 40, first - 10) + flux(last + 10, last + 40)) / 2


class TiOClassifier(nn.Module):
    """A classifier of which is known what decides: the mean flux of the TiO band at 7053 Å."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1))
        self.spectrum_normalisation = SpectrumNormalisation()  # of stars without bands, until it is fitted
        head = show_star.air_to_vacuum(7053)
        self.band = slice(*np.searchsorted(show_star.WAVELENGTH, (head, head + 60)))

    def forward(self, specs: torch.Tensor, imgs: None) -> tuple[None, torch.Tensor]:
        depth = 1 - specs[:, self.band].mean(dim=1)
        return None, torch.stack([depth, *[torch.zeros_like(depth)] * 4], dim=1)


def test_the_occlusion_map_shows_the_band_that_decided():
    classifier, spectrum = TiOClassifier(), torch.ones(data.SPECTRUM_LENGTH)
    spectrum[classifier.band] = 0.4
    centres, losses = show_star.occlusion_map(classifier, {"spectrum": spectrum}, predicted=0)
    assert abs(centres[losses.argmax()] - 7085) < 60 and losses.max() == pytest.approx(0.6, abs=0.1)
    assert (np.abs(losses[np.abs(centres - 7085) > 250]) < 1e-6).all()


def test_only_earlier_pictures_are_replaced(stars_dir, tmp_path):
    name = read_stars(stars_dir)[0].spectrum_id
    mine = tmp_path / f"star_{name}.png"
    Image.new("RGB", (9, 9)).save(mine)
    before = mine.read_bytes()
    options = ("--data-dir", stars_dir, "--output-dir", tmp_path)
    refuse(show_star, "this script did not write it", name, *options)
    assert mine.read_bytes() == before
    mine.unlink()
    for _ in range(2):
        show_star.main([name, *map(str, options)])
    assert_picture(mine)


def test_help_and_options(capsys):
    assert "a few stars of each class" in show("--help")
    with pytest.raises(SystemExit) as exit_:
        show_star.main(["--checkpoint", "a.pth"])
    assert exit_.value.code == 2 and "name the stars" in capsys.readouterr().err


# The history


def make_run(training_id: str, f1: float, **config: object) -> dict:
    return {
        "config": {
            "training_id": training_id, "timestamp": "2026-11-23T06:39:42+00:00", "num_epochs": 3, "modality": "fusion",
            "csv_file": "a/objects.csv", "stars": "400 SIMULATED stars", "validation_split": 0.2, "test_split": 0.0,
            "random_seed": 42, "stars_by_class_and_split": {"validation": {"M0": 16}}, **config,
        },
        "epoch_metrics": {"train_loss": [3, 2, 1], "val_loss": [3.0, 2.5, 2.4], "val_f1": [0.2, f1, 0.5]},
        "final_metrics": {"final_val_f1_weighted": f1, "final_val_intervals_95": {"f1": [f1 - 0.04, f1 + 0.02]}},
        "total_training_time_seconds": 461.2,
    }  # fmt: skip


@pytest.fixture
def history(tmp_path) -> Path:
    runs = [
        make_run("20260101_000000", 0.912),
        make_run("20260102_000000", 0.975),
        make_run("20260103_000000", 0.99, random_seed=7),  # other validation stars: no rival of the first two
        {"config": {"training_id": "20250101_000000"}, "final_metrics": {"final_val_f1_weighted": 0.3}},
        {"config": "lost", "epoch_metrics": [], "final_metrics": {"final_val_f1_weighted": "high"}},
        {},
    ]  # fmt: skip
    path = tmp_path / "training_history.json"
    path.write_text(json.dumps(runs), encoding="utf-8")
    return path


def test_the_table_of_runs_marks_the_best_of_each_set(history):
    printed = show("--history", history, script="show_history.py")
    header, *lines = [line for line in printed.splitlines() if line][:7]
    assert [column in header for column in ("when", "data", "reads", "epochs", "val F1", "time")] == [True] * 6
    assert [line.lstrip().startswith("*") for line in lines] == [False, True, False, False, False, False]
    for part in ("20260102_000000", "2026-11-23 06:39", "400 SIMULATED stars", "fusion", " 3 ", "461 s",
                 "0.975 (0.935 to 0.995)"):  # fmt: skip
        assert part in lines[1]
    assert "0.300" in lines[3] and "–" in lines[3]  # of an old record, what it has
    assert set(lines[5].split()) == {"–"}
    assert "others do not compare" in printed


def test_curves_of_runs_over_each_other(history, tmp_path, capsys):
    output = tmp_path / "curves.png"
    options = ("--history", history, "--output", output)
    printed = show("20260101_000000", "20260103_000000", *options, script="show_history.py")
    assert_picture(output)
    assert str(output) in printed and "20260102_000000" not in printed
    first = output.read_bytes()
    show_history.main(["20260101_000000", "20260102_000000", *map(str, options)])  # its own picture is replaced
    assert output.read_bytes() != first
    for other, message in (
        ("19990101_000000", "no run 19990101_000000; it holds 20260101_000000, 20260102"),
        ("20250101_000000", "run 20250101_000000 has no curves"),
    ):
        refuse(show_history, message, "20260101_000000", other, *options)
    Image.new("RGB", (9, 9)).save(output)
    refuse(show_history, "this script did not write it", "20260101_000000", "20260102_000000", *options)
    with pytest.raises(SystemExit) as exit_:
        show_history.main(["20260101_000000"])
    assert exit_.value.code == 2 and "name two runs or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "damaged, or no JSON file"),
        ("\udcff", "damaged, or no JSON file"),
        ('{"runs": []}', "not a history"),
        ("[1, 2]", "not a history"),
        ("[]", "no run in it yet"),
        (None, "no such file"),
    ],
)
def test_a_history_that_cannot_be_read_is_a_clear_error(tmp_path, content, message):
    path = tmp_path / "history.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    refuse(show_history, f"{path}: {message}", "--history", path)


def test_an_error_is_one_line(tmp_path):
    done = run_script("show_history.py", cwd=tmp_path)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("show_history.py: error: training_history.json: no such file")


def test_this_repositorys_history_can_be_shown():
    assert "*" in show(script="show_history.py")
