"""The simulator against published mean spectra (bands, indices and zero point), and its noise against real spectra."""

import compare_simulator
import numpy as np
import pytest
from astropy.io import fits
from common import SHARED_DATA, run_script
from template_stars import read_templates

import mdwarf
from instrument import Spectrograph

CLASSES = range(5)


@pytest.fixture(scope="module")
def means():
    """(3522,) by source and class."""
    templates = {}
    for name, file in compare_simulator.TEMPLATES.items():
        if not (SHARED_DATA / file).exists():
            pytest.skip("published mean spectra are not part of the project")
        templates[name] = read_templates(SHARED_DATA / file)
    return compare_simulator.class_means(templates)


def test_indices_lie_between_the_published_ones(means):
    simulated, *published = (np.array([compare_simulator.indices(means[name][k]) for k in CLASSES]) for name in means)
    assert np.all(simulated > np.minimum(*published) - 0.02)
    assert np.all(simulated < np.maximum(*published) + 0.02)


def test_bands_follow_the_published_ones_as_these_follow_each_other(means):
    bands = {name: np.array([compare_simulator.smooth_bands(means[name][k]) for k in CLASSES]) for name in means}
    for name in ("kesseli", "bochanski"):
        assert np.all(np.std(bands["simulated"] - bands[name], axis=1) < 0.05), name
    assert np.std(bands["simulated"] - (bands["kesseli"] + bands["bochanski"]) / 2) < 0.032


def test_titanium_oxide_gives_the_subclass_of_simulated_stars_but_for_a_constant():
    types = np.array([compare_simulator.type_by_tio5(compare_simulator.simulated_mean(k)) for k in CLASSES])
    np.testing.assert_allclose(types - CLASSES, -0.7, atol=0.4)


def test_the_script_prints_both_tables(means):
    done = run_script("benchmarks/compare_simulator.py", SHARED_DATA)
    assert done.returncode == 0, done.stderr
    first, second = (table.splitlines() for table in done.stdout.strip().split("\n\n"))
    assert len(first) == 2 + 3 * 3 and len(second) == 2 + 3 * 5
    cells = [line.split("|") for line in second[2:]]
    fits = {(row[1].strip(), row[2].strip()): (float(row[-3]), float(row[-2])) for row in cells}
    for k in CLASSES:
        assert fits["Kesseli", f"M{k}"][0] == k == fits["Bochanski", f"M{k}"][1]
        assert fits["simulated", f"M{k}"] == pytest.approx((k, k), abs=0.6)


def test_noise_agrees_with_real_spectra_of_the_same_magnitude():
    real = [SHARED_DATA / f"spec-{name}.fits" for name in ("0618-52049-0372", "1123-52882-0065", "5047-55833-0936")]
    if not all(path.exists() for path in real):
        pytest.skip("real SDSS spectra are not part of the project")
    for path, is_boss in zip(real, (False, False, True), strict=True):
        table, row = fits.getdata(path, 1), fits.getdata(path, 2)[0]
        loglam, flux = table["loglam"].astype(float), table["flux"].astype(float)
        r = mdwarf.r_magnitude(loglam, flux)
        assert r == pytest.approx(22.5 - 2.5 * np.log10(row["SPECTROFLUX"][2]), abs=0.1)
        snrs = [Spectrograph(loglam, is_boss, np.random.default_rng(k)).median_snr(flux) for k in range(20)]
        assert np.median(snrs) == pytest.approx(row["SN_MEDIAN_ALL"], rel=0.25), path.name
