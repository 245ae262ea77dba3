"""From the pixels of a file to the inputs of the network."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from common import SHARED_DATA

from catalog import Star
from cli import DataError
from preparation import (
    FIRST_PIXEL,
    SPECTRUM_LENGTH,
    WAVELENGTH,
    Standardisation,
    prepare_cutout,
    prepare_spectrum,
    smooth,
)
from recipe import PAPER
from survey_files import Spectrum, read_spectrum


def observed(flux: np.ndarray, ivar: np.ndarray, first_pixel: int = FIRST_PIXEL) -> Spectrum:
    loglam = (first_pixel + np.arange(len(flux))) * 1e-4
    position = (math.nan, math.nan)
    return Spectrum(loglam, flux.astype(np.float32), ivar.astype(np.float32), *position, False, Path("a.fits"))


def flat(pixels: int = SPECTRUM_LENGTH, level: float = 7.0) -> tuple[np.ndarray, np.ndarray]:
    """flux, ivar of a star as bright at every wavelength, of S/N 70"""
    return np.full(pixels, level), np.full(pixels, (70 / level) ** 2)


# One spectrum


def test_spectra_of_both_grids_land_on_the_same_pixels():
    """A line at one wavelength comes out at one index, wherever the file begins."""
    line = 38174  # log10(6565 Å) · 1e4, near Hα
    for first, pixels in ((35812, 3834), (35552, 4599)):  # SDSS-I, BOSS
        flux, ivar = flat(pixels)
        flux[line - first] = 12.0
        prepared = prepare_spectrum(observed(flux, ivar, first))
        assert prepared.shape == (2, 3522) and prepared.dtype == np.float32
        assert np.flatnonzero(prepared[0] > 1.1).tolist() == [line - FIRST_PIXEL]
        assert prepared[0, line - FIRST_PIXEL] == pytest.approx(12 / 7)
        assert prepared[1, line - FIRST_PIXEL] == pytest.approx(70**2)
    step = 10**1e-4
    assert WAVELENGTH[0] / step < 4000 < WAVELENGTH[0] and WAVELENGTH[-1] < 9000 < WAVELENGTH[-1] * step


def test_bad_pixels_are_interpolated_and_do_not_set_the_scale():
    flux, ivar = flat()
    expected = prepare_spectrum(observed(flux, ivar))[0]
    bad = [5, 1000, 1500, 1600, *range(2000, 2050)]
    flux[1000], ivar[1000] = 1e6, 0.0  # a cosmic ray that the pipeline marked
    flux[1500] = np.nan
    flux[1600], ivar[1600] = np.inf, np.nan
    flux[2000:2050], ivar[2000:2050] = 0.0, 0.0
    flux[5] = 1e6  # one that it missed
    prepared = prepare_spectrum(observed(flux, ivar))
    assert np.array_equal(prepared[0], expected)
    assert np.flatnonzero(prepared[1] == 0).tolist() == bad


def test_the_last_good_value_is_held_at_the_missing_ends_of_the_window():
    prepared = prepare_spectrum(observed(np.linspace(1, 3, 3000), flat(3000)[1], first_pixel=FIRST_PIXEL + 79))
    assert (prepared[0, :79] == prepared[0, 79]).all() and (prepared[0, 3079:] == prepared[0, 3078]).all()
    assert not prepared[1, :79].any() and not prepared[1, 3079:].any() and prepared[1, 79:3079].all()


def test_pixels_between_those_of_the_sdss_grid_are_interpolated():
    flux, ivar = np.linspace(1, 3, 4000), np.linspace(100, 200, 4000)
    on_grid = prepare_spectrum(observed(flux, ivar, FIRST_PIXEL - 100))
    spectrum = observed(flux, ivar, FIRST_PIXEL - 100)
    spectrum.ivar[1000] = 0
    prepared = prepare_spectrum(spectrum._replace(loglam=spectrum.loglam + 0.3e-4))
    assert np.flatnonzero(prepared[1] == 0).tolist() == [900, 901]  # the two that the bad pixel lies between
    good, expected = prepared[1] > 0, np.interp(np.arange(SPECTRUM_LENGTH) + 99.7, np.arange(4000), flux)
    np.testing.assert_allclose(prepared[0] / prepared[0, 0], expected / expected[0], rtol=1e-5)
    np.testing.assert_allclose(prepared[1, good] / on_grid[1, good], 1 / (0.7**2 + 0.3**2), rtol=2e-3)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s._replace(ivar=0 * s.ivar), "only 0 of the 3522 pixels"),
        (lambda s: s._replace(flux=np.inf * s.flux), "only 0 of the 3522 pixels"),
        (lambda s: s._replace(loglam=s.loglam + 0.2), "of the 3522 pixels between 4000 and 9000 Å are good"),
        (lambda s: s._replace(loglam=10**s.loglam), "its pixels are not of SDSS's size"),
        (lambda s: s._replace(loglam=3 + s.loglam / 4), "its pixels are not of SDSS's size"),
        (lambda s: s._replace(flux=-s.flux), "its median flux is -7: there is no star"),
    ],
)
def test_a_spectrum_that_cannot_be_used_is_refused(spoil, message):
    with pytest.raises(DataError, match=message) as error:
        prepare_spectrum(spoil(observed(*flat())))
    assert str(error.value).startswith("a.fits: ")


def test_faint_blue_fluxes_are_not_biased_by_noise():
    """An M4's flux at 4000–4500 Å is a fifth of the median; at S/N 1 noise is as large as the median."""
    rng, blue = np.random.default_rng(0), WAVELENGTH < 4500
    truth = np.where(blue, 0.2, 1.0)
    spectra = [truth + rng.standard_normal(SPECTRUM_LENGTH) for _ in range(60)]
    means = np.mean([prepare_spectrum(observed(flux, np.ones(SPECTRUM_LENGTH)))[0] for flux in spectra], axis=0)
    assert means[blue].mean() / means[~blue].mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("height", [1.4, 8])  # 5 Å, an active M4; 30 Å, a flare
def test_emission_lines_are_kept(height):
    """Hα, `height` times the flux beside it."""
    flux, ivar = flat()
    flux *= np.where(WAVELENGTH < 6000, 0.4, 1.8)
    line = 1 + height * np.exp(-0.5 * ((WAVELENGTH - 6564.6) / 1.5) ** 2)
    plain, active = (prepare_spectrum(observed(f, ivar)) for f in (flux, flux * line))
    assert active[1].all() and np.allclose(active[0] / plain[0], line, rtol=1e-4)


def test_the_sodium_lines_of_a_real_m4_are_kept():
    path = SHARED_DATA / "spec-1123-52882-0065.fits"
    if not path.exists():
        pytest.skip(f"the real spectra are not in {SHARED_DATA} (SHARED_DATA names their folder)")
    prepared = prepare_spectrum(read_spectrum(path, Star("a", "M4", 1123, 52882, 65)))
    assert prepared[1, (WAVELENGTH > 8180) & (WAVELENGTH < 8200)].all()


def test_an_image_keeps_its_pixels_and_gets_its_colours_first():
    pixels = np.arange(128 * 128 * 3, dtype=np.uint32).astype(np.uint8).reshape(128, 128, 3)
    prepared = prepare_cutout(pixels)
    assert prepared.shape == (3, 128, 128) and prepared.flags.c_contiguous
    assert np.array_equal(prepared[1], pixels[..., 1])


# All stars


def stars_of_bands(count: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Spectra (count, 2, 3522) of three bands of random depths, with a slope; and their flux without noise."""
    random = torch.Generator().manual_seed(seed)
    pixels, centres = torch.arange(SPECTRUM_LENGTH), torch.tensor([700.0, 1800.0, 2900.0])
    bands = torch.exp(-0.5 * ((pixels - centres[:, None]) / 60) ** 2)
    depths = 0.3 + 0.2 * torch.randn(count, 3, generator=random)
    clean = 1 + pixels / SPECTRUM_LENGTH - depths @ bands
    flux = clean + noise * torch.randn(clean.shape, generator=random)
    return torch.stack([flux, torch.full_like(flux, noise**-2)], dim=1), clean


def fitted(spectra: torch.Tensor, **choices) -> Standardisation:
    standardise = Standardisation(dataclasses.replace(PAPER, **choices))
    standardise.fit(spectra)
    return standardise


def test_the_network_sees_deviations_from_the_mean_spectrum_over_one_scale():
    spectra, _ = stars_of_bands(100, noise=0.1)
    standardise = fitted(spectra)
    specs, imgs = standardise(spectra, None)
    deviations = spectra[:, 0] - spectra[:, 0].mean(dim=0)
    assert imgs is None and torch.allclose(specs, deviations / deviations.std(), atol=0.01)
    assert specs.mean(dim=0).abs().max() < 1e-4 and specs.std().item() == pytest.approx(1, abs=0.01)
    assert {"mean", "scale"} <= standardise.state_dict().keys()  # they travel with the weights


def test_five_noisy_stars_of_125_do_not_change_the_networks_input():
    spectra, clean = stars_of_bands(120, noise=0.05)
    noisy = torch.stack([clean[:5] + 10 * torch.randn(5, SPECTRUM_LENGTH), torch.full((5, SPECTRUM_LENGTH), 0.01)], 1)
    without, with_them = (fitted(some)(spectra, None)[0] for some in (spectra, torch.cat([spectra, noisy])))
    assert with_them.std().item() == pytest.approx(without.std().item(), rel=0.06)
    assert (with_them - without).std() < 0.05


def test_bad_pixels_have_no_say_in_the_mean_spectrum():
    spectra, _ = stars_of_bands(50, noise=0.05)
    spoilt = spectra.clone()
    spoilt[0, :, 1000:2000] = torch.tensor([50.0, 0.0])[:, None]
    assert (fitted(spoilt).mean - fitted(spectra).mean).abs().max() < 0.1


def test_stars_of_one_spectrum_are_refused():
    spectra, _ = stars_of_bands(7, noise=0.1)
    for same in (spectra[:1], spectra[:1].repeat(7, 1, 1)):
        with pytest.raises(DataError, match="all have the same spectrum"):
            fitted(same)


def test_images_are_normalised_as_imagenets():
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    images[0, 1] = 255
    _, imgs = Standardisation(PAPER)(None, images)
    assert imgs[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, (1 - 0.456) / 0.224, -0.406 / 0.225])


# Additions of a recipe


def test_a_polynomial_continuum_is_taken_out():
    spectra, _ = stars_of_bands(50, noise=0.1)
    x, tilted = torch.linspace(-1, 1, SPECTRUM_LENGTH), spectra.clone()
    tilted[:, 0] += 0.5 - x + 0.7 * x**2 + 0.3 * x**3
    for degree, same in ((3, True), (2, False)):
        standardise = fitted(spectra, continuum_degree=degree)
        assert torch.allclose(standardise(tilted, None)[0], standardise(spectra, None)[0], atol=1e-3) == same


def test_smoothing_weighs_pixels_by_their_inverse_variance():
    spectra, clean = stars_of_bands(20, noise=0.2)
    spectra[:, :, 1000] = torch.tensor([1e4, 0.0])  # a bad pixel
    flux, ivar = smooth(*spectra.unbind(dim=1), sigma=3.0)
    residual = (flux - clean)[:, 20:-20]
    expected = 0.2 / math.sqrt(2 * math.sqrt(math.pi) * 3)
    assert residual.std().item() == pytest.approx(expected, rel=0.05)
    assert ivar.rsqrt().median().item() == pytest.approx(expected, rel=0.02)
