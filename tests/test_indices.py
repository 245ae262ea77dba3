"""Indices of molecular bands and Hα: against The Hammer's, published mean spectra, and noisy copies of one spectrum."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from common import SHARED_DATA

import indices
from catalog import Star
from indices import measure_indices
from mdwarf import REST_LOGLAM, add_emission, rest_spectrum
from preparation import SPECTRUM_LENGTH, WAVELENGTH, prepare_spectrum
from survey_files import read_spectrum


def prepared(loglam: np.ndarray, flux: np.ndarray, snr: float = 1e3, redshift: float = 0.0) -> np.ndarray:
    """(2, 3522), without noise, of a spectrum at rest."""
    flux = np.interp(np.log10(WAVELENGTH / (1 + redshift)), loglam, flux)
    flux /= np.median(flux)
    return np.stack([flux, np.full_like(flux, snr**2)])


def simulated(subtype: float, emission: float = 0.0, **options: float) -> np.ndarray:
    return prepared(REST_LOGLAM, add_emission(rest_spectrum(subtype, 0.0), emission), **options)


def values(spectra: list[np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame([measure_indices(spectrum) for spectrum in spectra])


def pixels(low: float, high: float) -> slice:
    return slice(*np.searchsorted(WAVELENGTH, (low, high)))


def shared_file(name: str) -> Path:
    if not (SHARED_DATA / name).exists():
        pytest.skip("measured spectra and published templates are not part of the project")
    return SHARED_DATA / name


@pytest.fixture(scope="module")
def hammer():
    """Prepared spectra of ten old SDSS files, and what The Hammer measured on them."""
    directory = shared_file("hammer")
    table = pd.read_csv(directory / "hammer_results.csv")
    stars = [Star(name, "M0", plate=0, mjd=0, fiberID=0, ra=0, dec=0, file=name) for name in table.file]
    return [prepare_spectrum(read_spectrum(directory / star.file, star)) for star in stars], table


def test_bands_and_their_errors_are_the_hammers(hammer, monkeypatch):
    spectra, theirs = hammer
    ours = values(spectra)
    np.testing.assert_allclose(ours[["CaH2", "CaH3"]], theirs[["CaH2", "CaH3"]], atol=0.0001)
    np.testing.assert_allclose(ours[["CaH2_err", "CaH3_err"]], theirs[["CaH2err", "CaH3err"]], rtol=0.001)
    np.testing.assert_allclose(ours["TiO5"], theirs["Tio5"], atol=0.04)
    monkeypatch.setitem(indices.BANDS, "TiO5", (7130, 7135))
    np.testing.assert_allclose(values(spectra)["TiO5"], theirs["Tio5"], atol=0.0001)


def test_equivalent_width_of_h_alpha_is_the_hammers(hammer):
    spectra, theirs = hammer
    ours = values(spectra)
    assert np.all(np.abs(ours["EW_Halpha"] - theirs["ewHa"]) < theirs["ewerr"])
    # The Hammer takes trapezia that share pixels as independent.
    np.testing.assert_allclose(ours["EW_Halpha_err"], np.sqrt(2) * theirs["ewerr"], rtol=0.06)
    assert not ours["is_active"].any()


# The zero points of Kesseli's subclasses and of this relation differ.
@pytest.mark.parametrize(("file", "metallicity", "tolerance"), [
    ("bochanski_m_templates.npz", "", 0.7), ("sdss_m_templates.npz", "_+0.0", 1.3),
])  # fmt: skip
def test_bands_of_published_spectra_deepen_with_the_subclass(file, metallicity, tolerance):
    file = np.load(shared_file(file))
    table = values([prepared(file["loglam"], file[f"M{subclass}{metallicity}_flux"]) for subclass in range(6)])
    assert np.all(np.diff(table[["TiO5", "CaH2", "CaH3"]], axis=0) < 0)
    np.testing.assert_allclose(8.2 - 10.775 * table["TiO5"], range(6), atol=tolerance)  # Reid, Hawley & Gizis 1995


def test_published_spectra_are_of_solar_metallicity_and_late_ones_active():
    file = np.load(shared_file("bochanski_m_templates.npz"))
    table = values([prepared(file["loglam"], file[f"M{subclass}_flux"]) for subclass in range(8)])
    np.testing.assert_allclose(table["zeta"][1:], 1, atol=0.06)  # M0 has hardly any TiO
    assert (table["metallicity_class"] == "dM").all()
    assert table["is_active"].tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize("subclass", [0, 1, 2])  # not of M3, nor at [Fe/H] = -1
def test_zeta_of_metal_poor_templates_is_lower(subclass):
    file = np.load(shared_file("sdss_m_templates.npz"))
    poor, solar = (prepared(file["loglam"], file[f"M{subclass}_{metallicity}_flux"]) for metallicity in (-0.5, "+0.0"))
    assert measure_indices(poor)["zeta"] < measure_indices(solar)["zeta"]


# With CaH2 = 0.5 and CaH3 = 0.7, TiO5 is 0.490 at solar metallicity.
@pytest.mark.parametrize(("tio5", "zeta", "name"), [
    (0.490, 1.0, "dM"), (0.694, 0.6, "sdM"), (0.847, 0.3, "esdM"), (0.949, 0.1, "usdM"),
])  # fmt: skip
def test_metallicity_class_follows_zeta_where_its_error_bar_lies_within_the_class(tio5, zeta, name):
    flux = np.ones(SPECTRUM_LENGTH)
    for index, (low, high) in {tio5: (7120, 7145), 0.5: (6810, 6855), 0.7: (6955, 6995)}.items():
        flux[pixels(low, high)] = index
    measured = measure_indices(np.stack([flux, np.full_like(flux, 100**2)]))
    assert measured["zeta"] == pytest.approx(zeta, abs=0.002) and measured["metallicity_class"] == name
    measured = measure_indices(np.stack([flux, np.full_like(flux, 2**2)]))
    assert measured["zeta_err"] > 0.2 and measured["metallicity_class"] == ""


def test_errors_are_the_scatter_of_noisy_copies():
    spectrum, rng = simulated(3, emission=2, snr=25), np.random.default_rng(0)
    noise = rng.normal(0, 1 / 25, (1000, SPECTRUM_LENGTH))
    table, true = values([spectrum + [copy, 0 * copy] for copy in noise]), measure_indices(spectrum)
    for name in ("TiO5", "CaH2", "CaH3", "zeta", "EW_Halpha"):
        pulls = (table[name] - true[name]) / table[f"{name}_err"]
        assert pulls.std() == pytest.approx(1, abs=0.06) and abs(pulls.mean()) < 0.1, name


@pytest.mark.parametrize("emission", [0, 0.4, 1, 4])
def test_emission_is_measured_and_makes_a_star_active(emission):
    quiet, measured = measure_indices(simulated(2)), measure_indices(simulated(2, emission))
    assert measured["EW_Halpha"] - quiet["EW_Halpha"] == pytest.approx(emission, rel=0.03)
    assert measured["is_active"] is (emission > 0.75)


@pytest.mark.parametrize(("low", "high", "excess", "activity"), [
    (6564, 6565, 1.0, {2: None, 5: False, 15: True}),  # one pixel, 1.5 Å: high, but not of significant width
    (*indices.LINE, 0.15, {2: None, 15: False, 25: True}),  # 2 Å, but low
])  # fmt: skip
def test_activity_needs_width_and_height_above_the_noise(low, high, excess, activity):
    flux = np.ones(SPECTRUM_LENGTH)
    flux[pixels(low, high)] += excess
    for snr, is_active in activity.items():
        assert measure_indices(np.stack([flux, np.full_like(flux, snr**2)]))["is_active"] is is_active, snr


def test_bands_move_with_the_star():
    at_rest, moving = measure_indices(simulated(3, 2)), simulated(3, 2, redshift=0.001)
    for name in ("TiO5", "CaH2", "CaH3", "EW_Halpha"):
        assert measure_indices(moving, 0.001)[name] == pytest.approx(at_rest[name], rel=0.02), name
    assert measure_indices(moving)["TiO5"] != pytest.approx(at_rest["TiO5"], rel=0.05)


def not_measured(measured: dict) -> set[str]:
    return {name for name, value in measured.items() if value != value or value in ("", None)}


METALLICITY = {"zeta", "zeta_err", "metallicity_class"}
TIO5 = {"TiO5", "TiO5_err"} | METALLICITY
LINE = {"EW_Halpha", "EW_Halpha_err", "is_active"}


@pytest.mark.parametrize(("low", "high", "hidden"), [
    (7040, 7050, {"CaH2", "CaH2_err", "CaH3", "CaH3_err"} | TIO5),  # the continuum of all bands
    (7120, 7140, TIO5),
    (6564, 6566, LINE),  # a part of the line
    (6574, 6630, LINE),  # the continuum on one side
    (6596, 6630, set()),  # the half of that
])  # fmt: skip
def test_bad_pixels_hide_what_depends_on_them(low, high, hidden):
    whole, spectrum = measure_indices(simulated(3)), simulated(3)
    spectrum[1, pixels(low, high)] = 0
    with warnings.catch_warnings(action="error"):
        measured = measure_indices(spectrum)
    assert not_measured(measured) == hidden
    for name in whole.keys() - hidden:
        assert measured[name] == pytest.approx(whole[name], abs=0.2 if "EW" in name else 0), name


def test_zeta_is_unknown_where_no_tio_is_expected():
    flat = measure_indices(np.stack([np.ones(SPECTRUM_LENGTH), np.full(SPECTRUM_LENGTH, 100.0)]))
    assert flat["TiO5"] == 1 and not_measured(flat) == METALLICITY


def test_a_continuum_below_zero_measures_nothing():
    measured = measure_indices(simulated(3) * [[-1], [1]])
    assert not_measured(measured) == measured.keys()
