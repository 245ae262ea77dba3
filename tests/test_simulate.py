"""The simulated stars, judged by an astronomer's measurements on them."""

import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from common import ROOT, command, heed_ctrl_c, run_script
from compare_simulator import simulated_mean
from PIL import Image
from scipy.stats import spearmanr

import mdwarf
import simulate_sdss_data
from catalog import CLASS_NAMES, decode_spec_obj_id, read_catalog
from cli import DataError
from instrument import Spectrograph, draw_cutout, draw_loglam, observe_magnitudes
from preparation import FIRST_PIXEL, SPECTRUM_LENGTH, prepare_spectrum
from simulate_sdss_data import R_MAGNITUDES, R_PERCENTILES, simulate
from star_files import catalog_path, cutout_path, spectrum_path
from survey_files import IMAGE_SIZE, PIXELS_PER_DEX, read_cutout, read_spectrum

PER_CLASS = 36


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Stars of S/N 5 to 60: (directory, text that the script printed)"""
    directory = tmp_path_factory.mktemp("simulated") / "stars"
    options = ["--per-class", PER_CLASS, "--seed", 7, "--min-snr", 5]
    result = run_script("simulate_sdss_data.py", directory, *options)
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


@pytest.fixture(scope="module")
def directory(simulated):
    return simulated[0]


@pytest.fixture(scope="module")
def stars(directory):
    stars, left_out = read_catalog(catalog_path(directory))
    assert not left_out
    return stars


@pytest.fixture(scope="module")
def tables(directory, stars):
    """Of each star, HDU 1 of its spectrum, and the row of HDU 2."""
    return [read_tables(directory, star) for star in stars]


@pytest.fixture(scope="module")
def catalog(directory):
    return pd.read_csv(catalog_path(directory), dtype={"name": str})


@pytest.fixture(scope="module")
def as_in_the_catalogue(tmp_path_factory):
    """(directory, stars) of the default brightness"""
    directory = tmp_path_factory.mktemp("catalogue") / "stars"
    return directory, simulate(directory, per_class=60, seed=11)


def read_tables(directory, star):
    path = spectrum_path(directory, star)
    return fits.getdata(path, 1), fits.getdata(path, 2)[0]


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def vacuum(air):
    """Morton 1991, independent of the simulator's formula."""
    return air * (1 + 2.735182e-4 + 131.4182 / air**2 + 2.76249e8 / air**4)


def mean_flux(table, low, high):
    """Mean flux of the good pixels in an interval of air wavelengths, NaN without any."""
    wavelength = 10 ** table["loglam"].astype(float)
    inside = (wavelength > vacuum(low)) & (wavelength < vacuum(high)) & (table["ivar"] > 0)
    return table["flux"][inside].mean() if inside.any() else np.nan


# Files


def test_every_star_has_its_files_and_they_can_be_read(directory, stars, as_in_the_catalogue):
    assert [sum(star.subclass == name for star in stars) for name in CLASS_NAMES] == [PER_CLASS] * 5
    assert [star.subclass for star in stars] != sorted(star.subclass for star in stars), "rows are in random order"
    for where, star in [(directory, star) for star in stars] + [
        (as_in_the_catalogue[0], s) for s in as_in_the_catalogue[1]
    ]:
        spectrum = read_spectrum(spectrum_path(where, star), star)
        assert prepare_spectrum(spectrum).shape == (2, SPECTRUM_LENGTH)
        assert (spectrum.ra, spectrum.dec) == (star.ra, star.dec)
        assert read_cutout(cutout_path(where, star)).pixels.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert len(contents(directory)) == 2 * len(stars) + 1


def test_it_says_what_it_made_and_what_to_do_next(simulated):
    directory, printed = simulated
    assert f"{5 * PER_CLASS} SIMULATED stars" in printed
    assert f"python train.py --data-dir {directory}" in printed


def test_every_file_says_that_it_is_simulated(directory, stars, catalog):
    assert all(star.simulated for star in stars)
    assert (catalog["simulated"] == 1).all()
    for star in stars[:10]:
        header = fits.getheader(spectrum_path(directory, star))
        assert header["SIMULATD"] is True
        assert "not an observation" in str(header["COMMENT"])
        with Image.open(cutout_path(directory, star)) as image:
            assert b"SIMULATED" in image.info["comment"]


def test_names_are_those_of_sdss(stars):
    assert len({star.spectrum_id for star in stars}) == len({star.name for star in stars}) == len(stars)
    run2ds = set()
    for star in stars:
        *identifiers, run2d = decode_spec_obj_id(star.name)
        assert identifiers == [star.plate, star.mjd, star.fiberID]
        assert (run2d == "26" and star.plate < 1960) or (run2d == "v5_13_0" and star.plate >= 3523)
        run2ds.add(run2d)
    assert run2ds == {"26", "v5_13_0"}


def test_spectra_have_the_format_of_lite_files(directory, stars):
    boss = 0
    for star in stars:
        path = spectrum_path(directory, star)
        assert path.stat().st_size % 2880 == 0
        with fits.open(path) as hdus:
            hdus.verify("exception")
            is_boss = star.plate >= 3523
            boss += is_boss
            assert [hdu.name for hdu in hdus] == ["PRIMARY", "COADD", "SPALL" if is_boss else "SPECOBJ"]
            assert "DATE" not in hdus[0].header
            table = hdus[1].data
            assert table.names == ["flux", "loglam", "ivar", "and_mask", "or_mask", "wdisp", "sky", "model"]
            assert table.dtype["flux"] == np.dtype(">f4") and table.dtype["loglam"] == np.dtype(">f4")
            pixel = np.rint(table["loglam"].astype(float) * PIXELS_PER_DEX)
            assert (table["loglam"] == (pixel / PIXELS_PER_DEX).astype(np.float32)).all()
            start, lengths = (35_545, (4580, 4620)) if is_boss else (35_800, (3820, 3850))
            assert start <= pixel[0] < start + 16 and lengths[0] <= len(pixel) <= lengths[1]
            assert pixel[0] <= FIRST_PIXEL and pixel[-1] >= FIRST_PIXEL + SPECTRUM_LENGTH - 1
            row = hdus[2].data[0]
            assert (row["CLASS"], row["SUBCLASS"], row["PLATE"]) == ("STAR", star.subclass, star.plate)
    assert boss == round(0.2 * len(stars))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_seed_decides_every_byte(tmp_path, num_workers):
    for name, seed, workers in (("first", 3, 1), ("again", 3, num_workers), ("other", 4, num_workers)):
        simulate(tmp_path / name, per_class=5, seed=seed, num_workers=workers)
    first = contents(tmp_path / "first")
    assert first == contents(tmp_path / "again")
    assert not set(first) & set(contents(tmp_path / "other")) - {"objects.csv"}


def test_a_directory_with_something_in_it_is_refused_and_kept(tmp_path):
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "notes.txt").write_text("keep")
    result = run_script("simulate_sdss_data.py", directory, "--per-class", 1)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "not an empty directory" in result.stderr
    assert contents(tmp_path) == {"mine/notes.txt": b"keep"}


def test_an_empty_directory_is_filled(tmp_path):
    assert len(simulate(tmp_path, per_class=1, seed=1)) == 5
    assert catalog_path(tmp_path).exists()


def test_the_current_directory_is_not_replaced(tmp_path):
    result = run_script("simulate_sdss_data.py", ".", "--per-class", 1, cwd=tmp_path)
    assert result.returncode == 1 and "name a new one in it" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(tmp_path):
    def fail(target, rng):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        simulate(tmp_path / "stars", per_class=1, seed=1, observe=fail)
    assert not list(tmp_path.iterdir())


def wait_for_first_star(process, parent):
    while not list(parent.glob(".*/stars/images/*/*.jpg")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def test_a_running_simulation_is_left_alone_and_the_leftovers_of_a_killed_one_are_deleted(tmp_path):
    options = [tmp_path / "stars", "--per-class", 2000, "--num-workers", 1, "--quiet"]
    process = subprocess.Popen(command("simulate_sdss_data.py", *options))
    wait_for_first_star(process, tmp_path)
    with pytest.raises(DataError, match="stars: another simulation is writing it"):
        simulate(tmp_path / "stars", per_class=1, seed=1)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert len(simulate(tmp_path / "stars", per_class=1, seed=1)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["stars"]
    assert len(contents(tmp_path)) == 11


def test_ctrl_c_ends_all_processes_and_leaves_nothing(tmp_path):
    options = [tmp_path / "stars", "--per-class", 2000, "--num-workers", 2]
    process = subprocess.Popen(
        command("simulate_sdss_data.py", *options),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c, start_new_session=True,
    )  # fmt: skip
    wait_for_first_star(process, tmp_path)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert not list(tmp_path.iterdir())


# Options


@pytest.mark.parametrize(
    "options, message",
    [
        (("--per-class", 0), "--per-class"),
        (("--seed", -1), "--seed"),
        (("--boss-fraction", 1.5), "--boss-fraction"),
        (("--min-snr", "nan"), "--min-snr"),
        (("--num-workers", 0), "--num-workers"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        simulate_sdss_data.main([str(tmp_path / "stars"), *map(str, options)])
    assert exit_.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_range_of_signal_to_noise_upside_down_is_refused(tmp_path):
    with pytest.raises(DataError, match="the lowest S/N, 30, is above the highest, 10"):
        simulate(tmp_path / "stars", per_class=1, seed=1, min_snr=30, max_snr=10)
    with pytest.raises(DataError, match="the lowest S/N, 5, is above the highest, 2"):
        simulate(tmp_path / "stars", per_class=1, seed=1, max_snr=2)
    assert not list(tmp_path.iterdir())


def test_nothing_but_the_wanted_signal_to_noise_and_grid(tmp_path):
    stars = simulate(tmp_path / "stars", per_class=3, seed=2, boss_fraction=1, min_snr=40, max_snr=40)
    assert all(star.plate >= 3523 for star in stars)
    for star in stars:
        assert read_tables(tmp_path / "stars", star)[1]["SN_MEDIAN_ALL"] == pytest.approx(40, rel=0.1)


def test_help_is_quick_and_loads_no_torch():
    code = (
        "import resource, sys, simulate_sdss_data\n"
        "assert not {'torch', 'torchvision', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2
    assert "--num-workers" in run_script("simulate_sdss_data.py", "--help").stdout


# Brightness


def test_magnitudes_are_those_of_the_catalogue(as_in_the_catalogue):
    real = pd.read_csv(ROOT / "objects.csv")
    real = real[real["r_mag"] < 24]
    for name, magnitudes in zip(CLASS_NAMES, R_MAGNITUDES, strict=True):
        percentiles = np.percentile(real["r_mag"][real["subclass"] == name], R_PERCENTILES)
        np.testing.assert_allclose(magnitudes, percentiles, atol=0.006)
    directory, _ = as_in_the_catalogue
    made = pd.read_csv(catalog_path(directory))
    for name, magnitudes in zip(CLASS_NAMES, R_MAGNITUDES, strict=True):
        fraction = np.interp(made["r_mag"][made["subclass"] == name], magnitudes, R_PERCENTILES) / 100
        assert np.mean(fraction) == pytest.approx(0.5, abs=0.1), "uniform if the distributions are the same"
        assert np.std(fraction) == pytest.approx(np.sqrt(1 / 12), abs=0.05)


def test_half_of_the_catalogue_is_faint_and_late_classes_are_fainter(as_in_the_catalogue):
    directory, stars = as_in_the_catalogue
    snr = np.array([read_tables(directory, star)[1]["SN_MEDIAN_ALL"] for star in stars])
    classes = np.array([int(star.subclass[1]) for star in stars])
    assert 0.35 < (snr < 5).mean() < 0.6
    assert np.median(snr[classes <= 1]) > 12 and np.median(snr[classes == 4]) < 4
    r = pd.read_csv(catalog_path(directory))["r_mag"]
    assert spearmanr(snr, r).statistic < -0.9


# The spectrograph


def test_noise_agrees_with_ivar_and_with_the_stated_signal_to_noise(tables):
    deviations = []
    for table, row in tables:
        good = table["ivar"] > 0
        deviations.append(((table["flux"] - table["model"]) * np.sqrt(table["ivar"]))[good])
        snr = np.median((table["flux"] * np.sqrt(table["ivar"]))[good])
        assert row["SN_MEDIAN_ALL"] == pytest.approx(snr, rel=1e-5)
        assert 5 * 0.95 < row["SN_MEDIAN_ALL"] < 60 * 1.05
    low, high = np.percentile(np.concatenate(deviations), (15.87, 84.13))
    assert (high - low) / 2 == pytest.approx(1, abs=0.01)
    signal_to_noise = [row["SN_MEDIAN_ALL"] for _, row in tables]
    assert min(signal_to_noise) < 8 and max(signal_to_noise) > 40


def test_flux_is_scaled_to_any_signal_to_noise():
    rng = np.random.default_rng(0)
    for is_boss in (False, True):
        spectrograph = Spectrograph(draw_loglam(is_boss, rng), is_boss, rng)
        shape = 1e-9 * rng.uniform(1, 2, len(spectrograph.loglam))
        for snr in (1, 30, 1000):
            assert spectrograph.median_snr(spectrograph.scale_to_snr(shape, snr)) == pytest.approx(snr, rel=0.001)


def test_the_noise_has_the_shape_of_sdss(tables):
    """More of it in the blue, at the join of the cameras and on night-sky lines than next to them."""
    spectra = [table for table, row in tables if row["RUN2D"] == "26" and row["SN_MEDIAN_ALL"] < 15]
    sigma = np.nanmedian(
        [[1 / np.sqrt(median_ivar(table, w)) for w in (3900, 5300, 5570, 5577, 5980, 6200)] for table in spectra], 0
    )
    assert sigma[0] > 2 * sigma[1]
    assert sigma[3] > 1.3 * sigma[2]
    assert sigma[4] > 1.15 * sigma[5]


def median_ivar(table, wavelength):
    near = (np.abs(10 ** table["loglam"].astype(float) - vacuum(wavelength)) < 5) & (table["ivar"] > 0)
    return np.median(table["ivar"][near]) if near.any() else np.nan


def test_bad_pixels_are_there_and_marked(tables):
    bad_fraction = np.array([(table["ivar"] == 0).mean() for table, _ in tables])
    assert 0.001 < np.median(bad_fraction) < 0.03 and bad_fraction.max() < 0.2
    for table, _ in tables:
        assert np.isfinite(table["flux"]).all()
        assert ((table["and_mask"] != 0) == (table["ivar"] == 0)).all()


# The star


def test_air_wavelengths_become_those_of_vacuum():
    air = np.array([3800.0, 5889.95, 7053.0, 9200.0])
    np.testing.assert_allclose(mdwarf.air_to_vacuum(air), vacuum(air), atol=0.01)  # Å


def test_a_magnitude_is_that_of_its_flux():
    wavelength = 10**mdwarf.REST_LOGLAM
    flux = 3631e-23 * mdwarf.SPEED_OF_LIGHT * 1e13 / wavelength**2 / 1e-17  # 0 mag at all wavelengths
    assert mdwarf.r_magnitude(mdwarf.REST_LOGLAM, flux) == pytest.approx(0, abs=0.03)
    assert mdwarf.r_magnitude(mdwarf.REST_LOGLAM, flux / 100) == pytest.approx(5, abs=0.03)


def test_an_active_star_has_h_alpha_of_its_equivalent_width():
    wavelength, quiet = 10**mdwarf.REST_LOGLAM, mdwarf.rest_spectrum(4, 0.0)
    excess = mdwarf.add_emission(quiet, 4.0) / quiet - 1
    near = np.abs(wavelength - 6564.6) < 15
    assert np.sum((excess * np.gradient(wavelength))[near]) == pytest.approx(4.0, rel=0.03)
    assert excess[np.abs(wavelength - 6700) < 50].max() < 1e-6


def test_titanium_oxide_tells_the_subclass(tables):
    """TiO5 and its relation to spectral type, Sp = −10.775·TiO5 + 8.2 (Reid, Hawley & Gizis 1995).

    SDSS's M0–M4 are earlier on that relation: it gives the mean spectra of Kesseli et al. (2017) 0.9 subclasses less
    than their class, in the mean, and those of Bochanski et al. (2007) 0.4. The simulated stars lie between.
    """
    subclass, types = [], []
    for table, row in tables:
        if row["SN_MEDIAN_ALL"] > 20:
            tio5 = mean_flux(table, 7126, 7135) / mean_flux(table, 7042, 7046)
            subclass.append(int(row["SUBCLASS"][1]))
            types.append(-10.775 * tio5 + 8.2)
    subclass, types = np.array(subclass)[np.isfinite(types)], np.array(types)[np.isfinite(types)]
    assert len(types) > 50
    assert np.corrcoef(subclass, types)[0, 1] > 0.93
    difference = types - subclass
    assert difference.mean() == pytest.approx(-0.65, abs=0.25)
    assert difference.std() < 0.6, "the scatter of real dwarfs about the relation is 0.5"


def test_calcium_hydride_is_that_of_dwarfs():
    """CaH2 and CaH3 (Reid, Hawley & Gizis 1995) of solar metallicity: between Kesseli's and Bochanski's."""

    def mean(flux, low, high):
        return flux[(wavelength > vacuum(low)) & (wavelength < vacuum(high))].mean()

    wavelength = 10**mdwarf.REST_LOGLAM
    for numerator, expected in (
        ((6814, 6846), (0.82, 0.69, 0.61, 0.50, 0.44)),
        ((6960, 6990), (0.91, 0.85, 0.80, 0.73, 0.69)),
    ):
        spectra = [mdwarf.rest_spectrum(subtype, metallicity=0) for subtype in range(5)]
        indices = [mean(flux, *numerator) / mean(flux, 7042, 7046) for flux in spectra]
        np.testing.assert_allclose(indices, expected, atol=0.03)
        assert np.all(np.diff(indices) < 0)


def test_class_means_of_the_files_are_those_of_the_stars_at_rest(directory, stars):
    for k, name in enumerate(CLASS_NAMES):
        of_class = [read_spectrum(spectrum_path(directory, s), s) for s in stars if s.subclass == name]
        median = np.median([prepare_spectrum(spectrum)[0] for spectrum in of_class], axis=0)
        difference = median / np.median(median) - simulated_mean(k)
        assert np.std(difference) < 0.06, name


# The camera


def test_colours_follow_the_subclass_in_catalogue_and_image(directory, stars, catalog):
    r_i = (catalog["r_mag"] - catalog["i_mag"]).to_numpy()
    medians = [np.median(r_i[catalog["subclass"] == name]) for name in CLASS_NAMES]
    np.testing.assert_allclose(medians, (0.72, 0.86, 1.01, 1.22, 1.43), atol=0.07)  # of objects.csv, r < 19
    core = slice(IMAGE_SIZE // 2 - 6, IMAGE_SIZE // 2 + 6)
    cutouts = [read_cutout(cutout_path(directory, star)).pixels for star in stars]
    cores = np.array([pixels[core, core].mean(axis=(0, 1)) for pixels in cutouts])
    assert spearmanr(cores[:, 0] / cores[:, 1], r_i).statistic > 0.75
    assert spearmanr(cores.sum(axis=1), -catalog["r_mag"]).statistic > 0.9, "bright stars are bright in their image"


def test_catalogue_magnitudes_scatter_as_the_depth_of_the_survey_says():
    rng = np.random.default_rng(1)
    for magnitude, scatter in ((16.0, 0.016), (22.7, 0.2)):  # S/N 5 at the depth in r
        r = [observe_magnitudes(np.full(5, magnitude), rng)[2] for _ in range(1000)]
        low, median, high = np.percentile(r, (15.87, 50, 84.13))
        assert median == pytest.approx(magnitude, abs=0.03) and (high - low) / 2 == pytest.approx(scatter, rel=0.2)


def test_the_star_is_in_the_middle_of_its_cutout():
    pixels = np.asarray(draw_cutout(np.array([17.4, 16.0, 15.0]), np.random.default_rng(3))).sum(axis=2)
    bright = np.argwhere(pixels > 0.9 * pixels.max())
    assert np.abs(bright.mean(axis=0) - (IMAGE_SIZE - 1) / 2).max() < 3
