"""Stars made from templates of real M dwarfs: their bands, their noise, and files that hold no templates."""

import numpy as np
import pytest
import template_stars
from astropy.io import fits
from common import SHARED_DATA, run_script

from catalog import Star, read_catalog
from cli import DataError
from simulate_sdss_data import Target
from star_files import catalog_path, spectrum_path
from survey_files import PIXELS_PER_DEX, read_spectrum

LOGLAM = np.arange(35_500, 39_701) / PIXELS_PER_DEX


@pytest.fixture
def templates_file(tmp_path):
    """Flat spectra with two bands: one at 7100 Å, of a depth that tells the subclass, one at 8000 Å of metallicity."""
    arrays = {"loglam": LOGLAM}
    for subclass in range(6):
        for metallicity in (0.0, 0.5):
            flux = np.ones(len(LOGLAM))
            flux[np.abs(10**LOGLAM - 7100) < 60] -= 0.15 * subclass
            flux[np.abs(10**LOGLAM - 8000) < 60] -= 0.4 + 0.4 * metallicity
            flux[:123] = np.nan  # as the real ones, where no star has flux
            arrays[f"M{subclass}_{metallicity:+.1f}_flux"] = flux
    np.savez(tmp_path / "templates.npz", **arrays)
    return tmp_path / "templates.npz"


@pytest.fixture
def one_metallicity_file(templates_file):
    """The same templates as Bochanski et al. 2007 give theirs, up to M9 and at one metallicity."""
    templates = np.load(templates_file)
    arrays = {f"M{k}_flux": templates[f"M{min(k, 5)}_+0.0_flux"] for k in range(10)}
    path = templates_file.with_name("one_metallicity.npz")
    np.savez(path, loglam=LOGLAM, **arrays)
    return path


def band_depth(wavelength, flux, centre):
    offset = np.abs(wavelength - centre)
    return 1 - np.median(flux[offset < 50]) / np.median(flux[(offset > 70) & (offset < 120)])


def observe(path, snr=20.0, r=16.0, count=40):
    """Stars of subtype M2.0: the columns of their spectra, and their magnitudes (count, 5)."""
    templates = template_stars.read_templates(path)
    target = Target(Star("1", "M2", 300, 52000, 1, 150.0, 20.0), subtype=2.0, r=r, snr=snr)
    observed = [template_stars.observe_spectrum(target, np.random.default_rng(k), templates) for k in range(count)]
    return [observation.columns for observation in observed], np.array([o.magnitudes for o in observed])


@pytest.mark.parametrize("file", ["templates_file", "one_metallicity_file"])
def test_stars_have_the_bands_of_their_subclass(file, request, tmp_path):
    path = request.getfixturevalue(file)
    options = ["--templates", path, "--per-class", 12, "--min-snr", 50, "--max-snr", 60, "--quiet"]
    done = run_script("benchmarks/template_stars.py", tmp_path / "stars", *options)
    assert done.returncode == 0, done.stderr
    stars, _ = read_catalog(catalog_path(tmp_path / "stars"))
    assert len(stars) == 60 and all(star.simulated for star in stars)
    for star in stars:
        spectrum = read_spectrum(spectrum_path(tmp_path / "stars", star), star)
        good = spectrum.ivar > 0
        depth = band_depth(10 ** spectrum.loglam[good], spectrum.flux[good], 7100)
        assert abs(depth / 0.15 - int(star.subclass[1])) < 0.6, star
    assert b"template_stars.py" in spectrum_path(tmp_path / "stars", stars[0]).read_bytes()


def test_stars_have_the_noise_that_they_state_and_vary_in_metallicity(templates_file):
    deviations, products, depths = [], [], []
    for columns in observe(templates_file)[0]:
        error = (columns["flux"] - columns["model"]) * np.sqrt(columns["ivar"])
        good = (columns["ivar"] > 0) & (np.abs(error) < 8)
        deviations.append(error[good])
        products.append((error[1:] * error[:-1])[good[1:] & good[:-1]])
        assert np.median((columns["model"] * np.sqrt(columns["ivar"]))[good]) == pytest.approx(20, rel=0.02)
        depths.append(band_depth(10 ** columns["loglam"], columns["model"], 8000))
    assert np.concatenate(deviations).var() == pytest.approx(1, abs=0.03)
    assert np.concatenate(products).mean() == pytest.approx(0.56, abs=0.03)
    # Depth is 0.4 and 0.4 more a dex: a scatter of 0.25 dex.
    assert np.mean(depths) == pytest.approx(0.4, abs=0.06) and np.std(depths) == pytest.approx(0.1, abs=0.04)


def test_templates_of_one_metallicity_give_stars_of_one(one_metallicity_file):
    depths = [band_depth(10 ** c["loglam"], c["model"], 8000) for c in observe(one_metallicity_file)[0]]
    assert np.mean(depths) == pytest.approx(0.4, abs=0.02) and np.std(depths) < 0.02


def test_without_a_wanted_signal_to_noise_it_follows_from_the_magnitude(templates_file):
    snrs = []
    for r in (16.0, 20.0):
        columns, magnitudes = observe(templates_file, snr=None, r=r, count=10)
        snrs.append(np.median([np.median(c["model"] * np.sqrt(c["ivar"])) for c in columns]))
        np.testing.assert_allclose(magnitudes[:, 2], r)
    assert 30 < snrs[0] < 80 and 2 < snrs[1] < 6


@pytest.mark.parametrize("name, count", [("sdss_m_templates.npz", 2), ("bochanski_m_templates.npz", 1)])
def test_published_templates_can_be_read(name, count, tmp_path):
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip("published templates are not part of the project")
    templates = template_stars.read_templates(path)
    assert np.any(templates.per_dex) == (count == 2)
    # TiO absorbs more, and the red is brighter relative to the median, from class to class.
    wavelength = 10**templates.loglam
    depths = [band_depth(wavelength, templates.flux(subtype, 0.0), 7150) for subtype in range(5)]
    red = [templates.flux(subtype, 0.0)[wavelength > 8500].mean() for subtype in np.arange(-0.5, 5, 0.5)]
    assert np.all(np.diff(depths) > 0) and np.all(np.diff(red) > 0)
    stars = template_stars.simulate_from_templates(tmp_path / "stars", path, per_class=2, seed=1, num_workers=2)
    header = fits.getheader(spectrum_path(tmp_path / "stars", stars[0]))
    assert len(stars) == 10 and "template_stars.py" in str(header["COMMENT"])


def test_a_file_that_holds_no_templates_is_named(templates_file, one_metallicity_file, tmp_path):
    (tmp_path / "text.npz").write_text("no templates")
    np.savez(tmp_path / "few.npz", loglam=LOGLAM)
    np.savez(tmp_path / "gap.npz", **{k: v for k, v in np.load(one_metallicity_file).items() if k != "M3_flux"})
    np.savez(tmp_path / "short.npz", **{**np.load(templates_file), "M2_+0.5_flux": np.ones(3)})
    np.savez(tmp_path / "blue.npz", **{name: values[:3000] for name, values in np.load(templates_file).items()})
    reasons = {
        "text": "not a file of templates",
        "few": "no M0_+0.0_flux in it",
        "gap": "no M3_flux in it",
        "short": "M2_+0.5_flux has not as many",
        "blue": "not all of its spectra reach",
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError, match=f"{name}.npz: ") as error:
            template_stars.simulate_from_templates(tmp_path / "stars", tmp_path / f"{name}.npz", per_class=1, seed=1)
        assert reason in str(error.value) and not (tmp_path / "stars").exists()
