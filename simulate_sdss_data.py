"""Simulate M0–M4 stars in the files SDSS serves: the stand-in for the download where there is no network.

    python simulate_sdss_data.py DIR --per-class 80 --seed 1       400 stars: spectra, cutouts, objects.csv
    python simulate_sdss_data.py DIR --per-class 80 --min-snr 10   brighter stars only
    python train.py --data-dir DIR

Each star has a continuous subclass, a metallicity, a velocity, a reddening and a brightness; its
spectrum and its image follow from those, through the instrument. The files of one seed are always
the same bytes, and each says that it is no observation. Read top to bottom: physics of the star,
spectrograph, camera, files, main.

Sources. Temperatures: Pecaut & Mamajek 2013 (ApJS 208, 9). Band heads: Kirkpatrick et al. 1991
(ApJS 77, 417), Valenti et al. 1998 (ApJ 498, 851). Depths of bands and lines, and the continuum:
smooth functions of subclass and metallicity, tuned until they agree with the mean SDSS spectra of
Kesseli et al. 2017 (ApJS 230, 16). Active fractions: West et al. 2011 (AJ 141, 97). Extinction:
Schlafly & Finkbeiner 2011 (ApJ 737, 103). Colours: medians by class of this repository's
objects.csv. Noise: ivar and sky of public SDSS spectra (plates 618, 1123 and 5047). Colour images:
Lupton et al. 2004 (PASP 116, 133).
"""

import argparse
import contextlib
import csv
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

import data
from data import CLASS_NAMES, CUTOUT_SCALE, IMAGE_SIZE, PIXELS_PER_DEX, SIMULATED_MARK, DataError, Star

NOTICE = f"{SIMULATED_MARK.decode()} by simulate_sdss_data.py: not an observation, this star does not exist"
SPEED_OF_LIGHT = 299_792.458  # km/s

# Physics of the star

SUBTYPE_RANGE = 0.45  # of a class about its centre: half-way stars, which have no right label, are left out
TEMPERATURES = (3850, 3660, 3560, 3430, 3210, 3060)  # K, M0…M5 (Pecaut & Mamajek 2013)
TEMPERATURE_SCATTER = 40  # K, between stars of one subclass
METALLICITY_SCATTER = 0.2  # dex, [Fe/H] of the thin disc
VELOCITY_SCATTER = 40  # km/s, radial velocity of disc dwarfs
MEAN_REDDENING = 0.03  # E(B−V), high galactic latitude
ACTIVE_FRACTION = (0.02, 0.03, 0.04, 0.08, 0.20)  # M0…M4 with Hα in emission (West et al. 2011)

# ln(blackbody / continuum): wavelength (Å, air), at M0, M2 and M4, and its change per dex of [Fe/H].
CONTINUUM = """
3600  0.80  0.56  0.11  0.77
3900  0.44  0.35  0.01  0.01
4200  0.16  0.43  0.44 -0.09
4600 -0.16  0.05  0.16 -0.12
5000 -0.10  0.02 -0.03 -0.19
5400 -0.08  0.02  0.10 -0.10
6000 -0.17 -0.05  0.26 -0.06
6300 -0.12 -0.09  0.12 -0.11
6560 -0.17 -0.18 -0.05 -0.09
7100 -0.16 -0.24 -0.17 -0.15
7600 -0.15 -0.27 -0.32 -0.09
8200 -0.16 -0.31 -0.38 -0.09
9000 -0.15 -0.29 -0.33 -0.06
"""
# Absorption: species, then band heads (or lines) as wavelength (Å, air), width (Å), optical depth at M0, M2, M4.
# A band starts at its head and fades over its width to the red (to the violet where the width is negative).
BANDS = """
TiO     4668  180 .04 .07 .14      4761   80 .24 .34 .40      4804   80 .00 .05 .17      4848   60 .01 .06 .19
TiO     4954  180 .13 .24 .42      5003  300 .15 .16 .18      5167   25 .00 .16 .53      5448   25 .07 .26 .45
TiO     5497  180 .04 .13 .28      5598   60 .02 .13 .18      5847  300 .05 .21 .31      6158   80 .08 .29 .52
TiO     6187   60 .03 .16 .29      6215   60 .09 .25 .35      6651   60 .01 .12 .28      6681  120 .01 .10 .18
TiO     6714  120 .04 .15 .23      6784  180 .05 .12 .13      7053   80 .08 .23 .41      7087   80 .06 .21 .37
TiO     7126  120 .09 .28 .48      7197   60 .04 .11 .20      7589   60 .00 .05 .16      7705  300 .03 .13 .31
TiO     8303  300 .03 .05 .09      8442  300 .00 .04 .12
CaH     6389 -180 .00 .05 .08      6908 -300 .06 .15 .23      6946 -300 .05 .12 .21      7035 -300 .07 .16 .24
MgH     5211 -180 .34 .23 .15
CaOH    6230   80 .03 .10 .15
VO      7851   80 .00 .02 .07
CH      4315 -120 .28 .17 .17
CN      3883  -80 .42 .42 .45
"""
# The width of a line is the half width of its Lorentz profile.
LINES = """
CaII  3933.7    3 .65 .74 .19    3968.5    3 .59 .67 .00      8498  1.5 .23 .21 .11    8542.1  1.5 .60 .54 .34
CaII  8662.1  1.5 .49 .45 .29
CaI   4226.7    5 1.01 1.19 1.11    4454.8    2 .58 .52 .36    6122.2  1.5 .28 .28 .17    6162.2  1.5 .43 .35 .12
CrI   4254.3  1.5 .58 .64 .49    4274.8  1.5 .52 .53 .39    4289.7  1.5 .50 .55 .42      5206  2.5 .32 .43 .45
FeI   4325.8    2 .40 .31 .31    4383.5  2.5 .62 .52 .45    4404.8    2 .55 .45 .37      5270  2.5 .44 .42 .42
FeI   5328.2    2 .29 .27 .27
TiI     4533    3 .36 .26 .12
MgI   5172.7    2 .57 .48 .26    5183.6    2 .39 .29 .16
NaI   5889.95    3 .73 .74 .62      5893   25 .00 .08 .23    5895.92    3 .58 .69 .61    8183.3  1.5 .16 .25 .41
NaI   8194.8  1.5 .23 .36 .57
KI    7664.9    3 .19 .28 .48      7682   25 .00 .08 .25      7699    3 .13 .23 .41
"""
# Optical depth goes as 10^(exponent·[Fe/H]): the balance of CaH to TiO tells metallicity (Lépine et al. 2007).
METALLICITY_EXPONENT = {"TiO": 0.2, "VO": 0.3, "CaH": 0.1, "MgH": 0.0, "atom": 0.1}
LINE_SPREAD = 0.92  # pixels, sigma of the best of SDSS's fibers: R ≈ 2000
REST_LOGLAM = np.arange(35_400, 40_400, 0.5) / PIXELS_PER_DEX  # half pixels


def air_to_vacuum(wavelength: np.ndarray) -> np.ndarray:
    """Ciddor 1996 (Applied Optics 35, 1566); wavelengths in Å."""
    wavenumber = (1e4 / np.asarray(wavelength)) ** 2
    return wavelength * (1 + 5.792105e-2 / (238.0185 - wavenumber) + 1.67917e-3 / (57.362 - wavenumber))


def at_subtype(nodes: np.ndarray, subtype: float) -> np.ndarray:
    """The parabola through the values at M0, M2 and M4, in the last axis of `nodes`."""
    weights = (subtype - 2) * (subtype - 4) / 8, subtype * (4 - subtype) / 4, subtype * (subtype - 2) / 8
    return nodes @ np.array(weights)


def _read_entries(table: str) -> tuple[list[str], np.ndarray]:
    """The species and the five numbers of each band or line."""
    species, numbers = [], []
    for line in table.strip().splitlines():
        name, *values = line.split()
        entries = np.array(values, dtype=float).reshape(-1, 5)
        species += [name] * len(entries)
        numbers.append(entries)
    return species, np.concatenate(numbers)


@functools.cache
def absorption() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Profiles (bands and lines, pixels) on REST_LOGLAM at SDSS's resolution; depths at M0, M2, M4; exponents."""
    wavelength = 10**REST_LOGLAM
    (band_species, bands), (line_species, lines) = _read_entries(BANDS), _read_entries(LINES)
    distance = (wavelength - air_to_vacuum(bands[:, :1])) / bands[:, 1:2]
    band_profiles = np.where(distance >= 0, np.exp(-np.clip(distance, 0, 50)), 0)
    line_profiles = 1 / (1 + ((wavelength - air_to_vacuum(lines[:, :1])) / lines[:, 1:2]) ** 2)
    profiles = np.concatenate([band_profiles, line_profiles])
    profiles = gaussian_filter1d(profiles, 2 * LINE_SPREAD, axis=1, mode="nearest")
    exponents = [METALLICITY_EXPONENT.get(name, METALLICITY_EXPONENT["atom"]) for name in band_species + line_species]
    return profiles.astype(np.float32), np.concatenate([bands, lines])[:, 2:], np.array(exponents)


def rest_spectrum(subtype: float, metallicity: float, hotter: float = 0.0) -> np.ndarray:
    """Flux of a quiet M dwarf on REST_LOGLAM, in units of its blackbody at 7500 Å; `hotter` in K."""
    wavelength = 10**REST_LOGLAM
    temperature = np.interp(subtype, range(6), TEMPERATURES) + hotter
    blackbody = (7500 / wavelength) ** 5 * np.expm1(1.43878e8 / (7500 * temperature))
    blackbody /= np.expm1(1.43878e8 / (wavelength * temperature))
    nodes = np.array([line.split() for line in CONTINUUM.strip().splitlines()], dtype=float)
    continuum = np.interp(wavelength, nodes[:, 0], at_subtype(nodes[:, 1:4], subtype) + metallicity * nodes[:, 4])
    profiles, depths, exponents = absorption()
    depth = np.clip(at_subtype(depths, subtype), 0, None) * 10 ** (exponents * metallicity)
    # einsum, not @: BLAS may add up in another order on another machine.
    return blackbody * np.exp(-continuum - np.einsum("b,bp->p", depth.astype(np.float32), profiles))


def add_balmer_emission(flux: np.ndarray, equivalent_width: float) -> None:
    """Hα of this equivalent width (Å), and the weaker lines in the ratios of active M dwarfs, in place."""
    wavelength = 10**REST_LOGLAM
    h_alpha_flux = equivalent_width * np.interp(6564.6, wavelength, flux)
    for line, ratio in ((6564.6, 1.0), (4862.7, 0.30), (4341.7, 0.15), (4102.9, 0.10), (3934.8, 0.1), (3969.6, 0.1)):
        sigma = line * np.log(10) / PIXELS_PER_DEX  # one pixel, the line spread
        flux += ratio * h_alpha_flux * np.exp(-0.5 * ((wavelength - line) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))


BAND_WAVELENGTHS = (3543, 4770, 6231, 7625, 9134)  # Å, u g r i z
BAND_EXTINCTION = (4.239, 3.303, 2.285, 1.698, 1.263)  # A / E(B−V) in u g r i z (Schlafly & Finkbeiner 2011)


def extinction_curve(loglam: np.ndarray) -> np.ndarray:
    """A / E(B−V), linear in 1/wavelength between the bands."""
    return np.interp(1 / 10**loglam, 1 / np.array(BAND_WAVELENGTHS[::-1]), BAND_EXTINCTION[::-1])


def draw_magnitudes(
    subtype: float, metallicity: float, reddening: float, r: float, rng: np.random.Generator
) -> np.ndarray:
    """True ugriz; parabolas through the median colours of the classes in objects.csv, with intrinsic scatter.

    Metal-poor M dwarfs are redder in g−r (Lépine & Scholz 2008).
    """
    u_g = 2.60 + rng.normal(0, 0.10)
    g_r = 1.37 + 0.017 * subtype - 0.10 * metallicity + rng.normal(0, 0.05)
    r_i = 0.70 + 0.130 * subtype + 0.011 * subtype**2 + rng.normal(0, 0.04)
    i_z = 0.38 + 0.088 * subtype + 0.002 * subtype**2 + rng.normal(0, 0.03)
    colours = np.array([u_g + g_r, g_r, 0, -r_i, -r_i - i_z])
    extinction = reddening * np.array(BAND_EXTINCTION)
    return r + colours + extinction - extinction[2]


# The spectrograph

# Electrons a pixel for a flux of 1e-17 erg/s/cm²/Å: wavelength (Å), SDSS-I, BOSS. The dip near 5980 Å is the dichroic.
THROUGHPUT = np.array(
    [
        (3560, 1, 3), (3800, 4, 11), (4100, 12, 21), (4700, 26, 46), (5300, 33, 53), (5800, 32, 52), (5980, 23, 42),
        (6250, 38, 62), (7000, 36, 56), (7600, 32, 50), (8200, 25, 46), (8800, 19, 46), (9200, 12, 42), (9800, 5, 25),
        (10400, 3, 8),
    ]
)  # fmt: skip
READ_NOISE = 15  # electrons a pixel, of all exposures together
EXPOSURE_SCATTER = 0.2  # ln, of throughput and of sky brightness between plates
SKY = ((3500, 9), (4000, 8), (4700, 7), (5500, 6.5), (6300, 7), (7100, 5.5), (8000, 5), (9000, 4.5), (10400, 6))
# Night-sky lines (Å, air; Osterbrock et al. 1996) and their peak, 1e-17 erg/s/cm²/Å: [O I], Na, and OH to the red.
SKY_LINES = """
5577.3 70  5891.6 12  6300.3 30  6363.8 10  6863.9 7  6923.2 6  7276.4 14  7316.3 14  7340.9 16  7369.2 8  7750.6 22
7794.1 20  7821.5 18  7913.7 22  7964.6 20  7993.3 18  8025.8 9  8288.6 16  8344.6 26  8399.2 28  8430.2 25  8465.4 18
8493.4 12  8761.2 12  8778.3 16  8827.1 30  8885.9 34  8919.6 30  8958.1 22  9001.3 18  9038.1 16  9375.9 36  9439.7 30
9719.8 25  9791.4 30  9872.1 32  9914.7 24  10013 20  10124 30  10213 28
"""
SKY_RESIDUAL = 0.04  # of a sky line's flux is left by the subtraction
# What the correction for the Earth's atmosphere leaves: O₂ and H₂O bands as centre, half width (Å), relative depth.
TELLURIC_BANDS = (
    ((6875, 8, 0.5), (6895, 14, 0.3), (7607, 10, 1.0), (7640, 20, 0.6)),
    ((7250, 60, 0.4), (8230, 70, 0.4), (9000, 60, 0.4), (9350, 120, 1.0)),
)
TELLURIC_RESIDUAL = 0.03
FULLREJECT, BRIGHTSKY = 1 << 18, 1 << 23  # bits of SDSS's SPPIXMASK


class Target(NamedTuple):
    """A star of the simulated catalogue, before it is observed."""

    star: Star
    run2d: int
    plate_center: tuple[float, float]  # degrees
    subtype: float  # continuous: 1.6 is nearer to M2 than to M1
    snr: float  # wanted median signal to noise of its spectrum

    @property
    def is_boss(self) -> bool:
        return self.run2d > 104


class Observation(NamedTuple):
    """The columns of HDU 1, and what the camera and the catalogue need of the same star."""

    columns: dict[str, np.ndarray]
    redshift: float
    magnitudes: np.ndarray  # true u g r i z


def observe_spectrum(target: Target, rng: np.random.Generator) -> Observation:
    """Draw the star's physics, brighten it to the wanted S/N, and add what the spectrograph does to it."""
    metallicity = rng.normal(0, METALLICITY_SCATTER)
    reddening = rng.exponential(MEAN_REDDENING)
    redshift = rng.normal(0, VELOCITY_SCATTER) / SPEED_OF_LIGHT

    rest = rest_spectrum(target.subtype, metallicity, rng.normal(0, TEMPERATURE_SCATTER))
    if rng.random() < np.interp(target.subtype, range(5), ACTIVE_FRACTION):
        add_balmer_emission(rest, rng.lognormal(np.log(3), 0.5))
    spectrograph = Spectrograph(draw_loglam(target.is_boss, rng), target.is_boss, rng)
    loglam, dispersion = spectrograph.loglam, spectrograph.dispersion
    rest = gaussian_filter1d(rest, 2 * np.sqrt(dispersion**2 - LINE_SPREAD**2), mode="nearest")
    shape = np.interp(loglam - np.log10(1 + redshift), REST_LOGLAM, rest)
    shape *= 10 ** (-0.4 * reddening * extinction_curve(loglam))

    flux = shape * spectrograph.brightness(shape, target.snr)
    in_r = np.abs(10**loglam - 6200) < 690
    f_nu = flux[in_r].mean() * 1e-17 * 6200**2 / (SPEED_OF_LIGHT * 1e13)  # erg/s/cm²/Hz, c in Å/s
    r = -2.5 * np.log10(f_nu) - 48.6 + rng.normal(0, 0.05)  # AB; fiber losses are corrected to a few per cent
    return Observation(
        spectrograph.expose(flux, rng), redshift, draw_magnitudes(target.subtype, metallicity, reddening, r, rng)
    )


def draw_loglam(is_boss: bool, rng: np.random.Generator) -> np.ndarray:
    """The grid of one file: it begins and ends a few pixels off the next one's."""
    start, length = (35_545, 4580) if is_boss else (35_800, 3820)
    start += rng.integers(16)
    return np.arange(start, start + length + rng.integers(31)) / PIXELS_PER_DEX


@functools.cache
def night_sky() -> tuple[np.ndarray, np.ndarray]:
    """Continuum and lines on REST_LOGLAM, 1e-17 erg/s/cm²/Å."""
    lines = np.array(SKY_LINES.split(), dtype=float).reshape(-1, 2)
    offsets = (REST_LOGLAM[:, None] - np.log10(air_to_vacuum(lines[:, 0]))) * PIXELS_PER_DEX  # pixels
    return np.interp(10**REST_LOGLAM, *np.transpose(SKY)), np.exp(-0.5 * offsets**2) @ lines[:, 1]


class Spectrograph:
    """One exposure's throughput, sky and noise on a grid of pixels."""

    def __init__(self, loglam: np.ndarray, is_boss: bool, rng: np.random.Generator) -> None:
        self.loglam, self.wavelength = loglam, 10**loglam
        self.dispersion = rng.uniform(LINE_SPREAD, 1.05)  # pixels: R from 2000 to 1750 over fibers and nights
        throughput = np.interp(self.wavelength, THROUGHPUT[:, 0], THROUGHPUT[:, 1 + is_boss])
        self.throughput = throughput * rng.lognormal(0, EXPOSURE_SCATTER)
        sky_level = rng.lognormal(0, EXPOSURE_SCATTER) * (0.6 if is_boss else 1)  # fibers of 2″, not 3″
        continuum, lines = (np.interp(loglam, REST_LOGLAM, sky_level * spectrum) for spectrum in night_sky())
        self.sky, self.sky_lines = continuum + lines, lines

    def sigma(self, flux: np.ndarray, pixels: slice = slice(None)) -> np.ndarray:
        """Noise of these pixels: photons of star and sky, read-out, and what sky subtraction leaves."""
        throughput = self.throughput[pixels]
        photons = (np.maximum(flux, 0) + self.sky[pixels]) / throughput
        return np.sqrt(photons + (READ_NOISE / throughput) ** 2 + (SKY_RESIDUAL * self.sky_lines[pixels]) ** 2)

    def brightness(self, shape: np.ndarray, snr: float) -> float:
        """The factor by which `shape` has this median S/N."""
        some = slice(None, None, 8)  # enough for a median
        factors = np.logspace(-2, 5, 80) / np.median(shape)
        fluxes = factors[:, None] * shape[some]
        medians = np.median(fluxes / self.sigma(fluxes, some), axis=1)
        return float(np.exp(np.interp(np.log(snr), np.log(medians), np.log(factors))))

    def expose(self, flux: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Columns flux, ivar, model, sky and masks: calibration errors, noise, cosmic rays, bad pixels."""
        x = np.log(self.wavelength / 6500)
        # Spectrophotometry is good to about 4 % (Adelman-McCarthy et al. 2008), the two cameras' join to 1 %.
        calibration = rng.normal(0, 0.08) * x + rng.normal(0, 0.12) * x**2
        calibration += rng.normal(0, 0.01) * np.tanh((self.wavelength - 5980) / 60)
        model = flux * np.exp(calibration)
        for bands in TELLURIC_BANDS:
            absorption = sum(d * np.exp(-0.5 * ((self.wavelength - c) / w) ** 2) for c, w, d in bands)
            model = model * (1 + rng.normal(0, TELLURIC_RESIDUAL) * absorption)
        sigma = self.sigma(model)
        observed, ivar = rng.normal(model, sigma), sigma**-2
        bad = damage_pixels(observed, sigma, rng)
        ivar[bad] = 0
        and_mask = np.where(bad, FULLREJECT, 0)
        or_mask = and_mask | np.where(self.sky_lines > 10, BRIGHTSKY, 0)
        return {
            "flux": observed, "loglam": self.loglam, "ivar": ivar, "and_mask": and_mask, "or_mask": or_mask,
            "wdisp": np.full(len(flux), self.dispersion), "sky": self.sky, "model": model,
        }  # fmt: skip


def damage_pixels(flux: np.ndarray, sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put cosmic rays and dead pixels into `flux`, in place; True where the pipeline found them (ivar = 0)."""
    bad = np.zeros(len(flux), dtype=bool)

    def runs(mean_number: float, longest: int) -> list[slice]:
        starts = rng.integers(0, len(flux) - longest, size=rng.poisson(mean_number))
        return [slice(start, start + rng.integers(1, longest + 1)) for start in starts]

    for run in runs(2, 3):  # cosmic rays, found
        flux[run] += rng.lognormal(np.log(30), 1) * sigma[run]
        bad[run] = True
    for run in runs(0.7, 2):  # and missed
        flux[run] += rng.uniform(5, 20) * sigma[run]
    for run in runs(4, 6) + runs(0.05, 150):  # dead columns; one spectrum in twenty lacks a larger piece
        flux[run] = 0
        bad[run] = True
    return bad


# The camera

PIXEL_SCALE = 0.396127  # ″, SDSS imaging camera
FIELD = 96  # native pixels a side: the cutout's diagonal
DEPTH = np.array([22.15, 23.13, 22.70, 22.20, 20.71])  # u g r i z of a star of S/N 5 (sdss.org/dr16/imaging/other_info)
SOFTENING = np.array([1.4, 0.9, 1.2, 1.8, 7.4]) * 1e-10  # b of asinh magnitudes (Lupton et al. 1999)
PHOTOMETRIC_ERROR = 0.015  # mag, of bright stars
SEEING = 1.32  # ″ FWHM in r, median of SDSS; relative to r in g r i:
BAND_SEEING = (1.08, 1.0, 0.95)
PIXEL_NOISE = np.array([0.022, 0.030, 0.050])  # nanomaggies a pixel, sky in g r i; the DEPTH over 25 pixels
ELECTRONS = np.array([1000, 950, 750])  # for a nanomaggy
# Lupton et al. 2004 with Q = 8. SkyServer maps i, r, g to red, green, blue in this way too, but its constants are
# not published: the scales of g, r, i are those of the Legacy Surveys' viewer for SDSS, the slope sets its look.
COLOR_SCALES, COLOR_Q, COLOR_SLOPE = (2.5, 1.5, 1.0), 8, 2.7
JPEG_QUALITY = 90


def observe_magnitudes(magnitudes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The catalogue's asinh magnitudes: sky noise at the survey's depth, and a floor for calibration."""
    sky_noise = 10 ** (-0.4 * DEPTH) / 5
    flux = 10 ** (-0.4 * magnitudes) * (1 + rng.normal(0, PHOTOMETRIC_ERROR, 5)) + rng.normal(0, sky_noise)
    return -2.5 / np.log(10) * (np.arcsinh(flux / (2 * SOFTENING)) + np.log(SOFTENING))


def draw_cutout(gri: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The colour image around a star of these magnitudes, north up, as the cutout service resamples it."""
    center = (FIELD - 1) / 2 + rng.uniform(-0.5, 0.5, 2)  # of the star, native pixels
    planes = render_field(gri, center, rng)
    noise = rng.standard_normal(planes.shape)
    planes += noise * np.sqrt(PIXEL_NOISE[:, None, None] ** 2 + planes / ELECTRONS[:, None, None])
    native = Image.fromarray(color_image(planes))
    # The camera's columns lie at any angle to north; the service turns and enlarges finished colour images.
    angle = rng.uniform(0, 2 * np.pi)
    turn = CUTOUT_SCALE / PIXEL_SCALE * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    x, y = center + 0.5 + rng.normal(0, 0.15, 2) - turn @ [IMAGE_SIZE / 2, IMAGE_SIZE / 2]
    affine = (*turn[0], x, *turn[1], y)
    return native.transform((IMAGE_SIZE, IMAGE_SIZE), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)


def color_image(planes: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 from nanomaggies in g, r, i: the intensity goes through asinh, the colour stays."""
    b, g, r = np.maximum(planes, 0) * np.array(COLOR_SCALES)[:, None, None]
    intensity = np.maximum((r + g + b) / 3, 1e-6)
    gain = np.arcsinh(COLOR_Q * COLOR_SLOPE * intensity) / COLOR_Q / intensity
    return (255 * np.clip(np.stack([r, g, b], axis=2) * gain[:, :, None], 0, 1)).astype(np.uint8)


def render_field(gri: np.ndarray, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nanomaggies in g, r, i (3, FIELD, FIELD) of the star at `center` and of what happens to be around it."""
    y, x = np.mgrid[:FIELD, :FIELD] * PIXEL_SCALE
    seeing = rng.lognormal(np.log(SEEING), 0.12) * rng.normal(BAND_SEEING, 0.04) / 2.355  # sigma, ″
    seeing = np.sqrt(seeing**2 + PIXEL_SCALE**2 / 12)[:, None, None]  # with the pixel's own width
    x0, y0 = center * PIXEL_SCALE
    planes = nanomaggies(gri) * star_profile(x - x0, y - y0, seeing, rng)
    for profile, mean_number, steepness, g_r in NEIGHBOURS:
        for _ in range(rng.poisson(mean_number * (FIELD * PIXEL_SCALE / 30) ** 2)):
            r = max(22.5 + np.log10(1 - rng.random()) / steepness, 14)
            color = rng.uniform(*g_r)
            x0, y0 = rng.uniform(0, FIELD * PIXEL_SCALE, 2)
            magnitudes = np.array([r + color, r, r - 0.1 - 0.35 * color])
            planes += nanomaggies(magnitudes) * profile(x - x0, y - y0, seeing, rng)
    return planes * PIXEL_SCALE**2


def star_profile(x: np.ndarray, y: np.ndarray, seeing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light per square arcsecond: SDSS's point-spread function, a double Gaussian."""
    widths = ((0.85, seeing), (0.15, 2.5 * seeing))
    return sum(share * np.exp(-0.5 * (x**2 + y**2) / w**2) / (2 * np.pi * w**2) for share, w in widths)


def galaxy_profile(x: np.ndarray, y: np.ndarray, seeing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light per square arcsecond: an inclined exponential disc, widened and its cusp smeared by the seeing."""
    scale, ratio, angle = rng.lognormal(np.log(0.45), 0.4), rng.uniform(0.3, 1), rng.uniform(0, np.pi)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    long, short = np.sqrt(scale**2 + seeing**2 / 3), np.sqrt((ratio * scale) ** 2 + seeing**2 / 3)
    radius = np.sqrt((along / long) ** 2 + (across / short) ** 2 + 0.5)
    return np.exp(np.sqrt(0.5) - radius) / (2 * np.pi * long * short * (1 + np.sqrt(0.5)))


# Field objects brighter than r = 22.5 in 30″ × 30″ at high galactic latitude: their mean number, the steepness of
# the counts, 10^(steepness·r), and the range of g−r.
NEIGHBOURS = ((star_profile, 0.3, 0.2, (0.3, 1.5)), (galaxy_profile, 0.9, 0.42, (0.3, 1.4)))


def nanomaggies(magnitudes: np.ndarray) -> np.ndarray:
    return 10 ** (0.4 * (22.5 - magnitudes))[:, None, None]


# Files

FIRST_PLATE, LAST_PLATE = 266, 10_000  # of SDSS, and of DR16 nearly


def simulate(
    directory: Path,
    *,
    per_class: int,
    seed: int,
    boss_fraction: float = 0.2,
    min_snr: float = 5.0,
    max_snr: float = 60.0,
) -> list[Star]:
    """Write `per_class` stars of each of M0…M4 to `directory`, which must not exist or be empty: all or nothing.

    Their median S/N a pixel is log-uniform from `min_snr` to `max_snr`; `boss_fraction` of them are BOSS spectra.
    """
    catalog_seed, *star_seeds = np.random.SeedSequence(seed).spawn(1 + per_class * len(CLASS_NAMES))
    with whole_or_nothing(Path(directory)) as temporary:
        targets = draw_targets(np.random.default_rng(catalog_seed), per_class, boss_fraction, min_snr, max_snr)
        rows = []
        for target, star_seed in zip(data.progress(targets, desc="simulating", unit="star"), star_seeds, strict=True):
            rows.append(write_star(temporary, target, np.random.default_rng(star_seed)))
        with open(data.catalog_path(temporary), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return [target.star for target in targets]


@contextlib.contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory; when the block succeeds it becomes `directory`, otherwise it goes."""
    directory = directory.resolve()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise DataError(f"{directory}: exists and is not an empty directory; name a new one")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = data.partial_path(directory)
    temporary.mkdir()
    try:
        yield temporary
        if directory.exists():
            directory.rmdir()
        temporary.rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def draw_targets(
    rng: np.random.Generator, per_class: int, boss_fraction: float, min_snr: float, max_snr: float
) -> list[Target]:
    """The catalogue, in random order: identifiers, positions, subclasses, wanted S/N."""
    count = per_class * len(CLASS_NAMES)
    is_boss = rng.permutation(count) < round(boss_fraction * count)
    # A number for each place on each plate, taken once: SDSS-I plates have 640 fibers, BOSS plates 1000.
    sdss = rng.choice((data.FIRST_PLATE_BEYOND_26 - FIRST_PLATE) * 640, count, replace=False)
    boss = rng.choice((LAST_PLATE + 1 - data.FIRST_BOSS_PLATE) * 1000, count, replace=False)
    plates = np.where(is_boss, data.FIRST_BOSS_PLATE + boss // 1000, FIRST_PLATE + sdss // 640)
    fibers = np.where(is_boss, 1 + boss % 1000, 1 + sdss % 640)
    mjds = np.interp(plates, (FIRST_PLATE, 1959, data.FIRST_BOSS_PLATE, LAST_PLATE), (51_630, 53_440, 55_144, 57_346))
    centers = np.array([plate_center(plate) for plate in plates.tolist()])
    positions = draw_positions(centers, rng)
    classes = rng.permutation(np.repeat(np.arange(len(CLASS_NAMES)), per_class))
    subtypes = classes + rng.uniform(-SUBTYPE_RANGE, SUBTYPE_RANGE, count)
    snrs = np.exp(rng.uniform(np.log(min_snr), np.log(max_snr), count))
    targets = []
    for k in range(count):
        plate, mjd, fiber, run2d = int(plates[k]), int(mjds[k]), int(fibers[k]), 1300 if is_boss[k] else 26
        name = str(data.encode_spec_obj_id(plate, mjd, fiber, run2d))
        star = Star(name, CLASS_NAMES[classes[k]], plate, mjd, fiber, *positions[k].tolist(), simulated=True)
        targets.append(Target(star, run2d, tuple(centers[k].tolist()), float(subtypes[k]), float(snrs[k])))
    return targets


def plate_center(plate: int) -> tuple[float, float]:
    """Where in the northern galactic cap a plate points (degrees): the same in every catalogue."""
    rng = np.random.default_rng(plate)
    return rng.uniform(120, 250), float(np.degrees(np.arcsin(rng.uniform(0, np.sin(np.radians(60))))))


def draw_positions(centers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """RA and Dec (degrees) within 1.49° of each plate's centre, rounded as SDSS does, no two within 2″."""
    positions, again = np.empty_like(centers), np.arange(len(centers))
    while len(again):
        radius, angle = 1.49 * np.sqrt(rng.random(len(again))), rng.uniform(0, 2 * np.pi, len(again))
        dec = centers[again, 1] + radius * np.sin(angle)
        ra = centers[again, 0] + radius * np.cos(angle) / np.cos(np.radians(dec))
        positions[again] = np.transpose([ra, dec]).round(7)
        ra, dec = np.radians(positions).T
        sphere = np.transpose([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])
        pairs = cKDTree(sphere).query_pairs(np.radians(data.SAME_STAR_ARCSEC / 3600), output_type="ndarray")
        again = np.unique(pairs[:, 1])
    return positions


def write_star(directory: Path, target: Target, rng: np.random.Generator) -> dict[str, object]:
    """Write a star's spectrum and cutout; return its row of the catalogue."""
    star = target.star
    observation = observe_spectrum(target, rng)
    cutout = draw_cutout(observation.magnitudes[1:4], rng)
    magnitudes = observe_magnitudes(observation.magnitudes, rng)
    for path in (data.spectrum_path(directory, star), data.cutout_path(directory, star)):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_fits(data.spectrum_path(directory, star), target, observation)
    cutout.save(data.cutout_path(directory, star), "JPEG", quality=JPEG_QUALITY, comment=NOTICE)
    row = {column: getattr(star, column) for column in ("name", "subclass", "plate", "mjd", "fiberID", "ra", "dec")}
    return row | {f"{band}_mag": f"{m:.5f}" for band, m in zip("ugriz", magnitudes, strict=True)} | {"simulated": 1}


def write_fits(path: Path, target: Target, observation: Observation) -> None:
    """HDUs 0–3 of a lite file: header, spectrum, the catalogue's row, and the table of emission lines."""
    star, flux, ivar = target.star, observation.columns["flux"], observation.columns["ivar"]
    start = round(float(observation.columns["loglam"][0]), 4)
    run2d = data.decode_spec_obj_id(star.name)[3]
    plate_ra, plate_dec = target.plate_center
    header = fits.Header({"PLATEID": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID, "RUN2D": run2d})
    header.update({"PLUG_RA": star.ra, "PLUG_DEC": star.dec, "RA": plate_ra, "DEC": plate_dec})
    # SDSS-I files keep the start of the untrimmed plate here, which is not the file's.
    header["COEFF0"] = start if target.is_boss else round(start - 0.0018, 4)
    header["COEFF1"] = 1 / PIXELS_PER_DEX
    header["BUNIT"] = "1E-17 erg/cm^2/s/Ang"
    header["SIMULATD"] = (True, "not an observation")
    header["COMMENT"] = NOTICE
    row = {"CLASS": "STAR", "SUBCLASS": star.subclass, "Z": observation.redshift}
    row |= {"SN_MEDIAN_ALL": np.median((flux * np.sqrt(ivar))[ivar > 0])}
    row |= {"PLATE": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID, "RUN2D": run2d}
    line = {"LINENAME": "H_alpha", "LINEWAVE": 6564.61, "LINEZ": observation.redshift}
    hdus = [
        fits.PrimaryHDU(header=header),
        table_hdu("COADD", observation.columns),
        table_hdu("SPALL" if target.is_boss else "SPECOBJ", row),
        table_hdu("SPZLINE", line),
    ]
    fits.HDUList(hdus).writeto(path)


def table_hdu(name: str, columns: dict[str, object]) -> fits.BinTableHDU:
    """A table of these columns, of 32-bit numbers as in SDSS."""
    arrays = [np.atleast_1d(column) for column in columns.values()]
    arrays = [array.astype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype)) for array in arrays]
    return fits.BinTableHDU(np.rec.fromarrays(arrays, names=list(columns)), name=name)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add = parser.add_argument
    snr = data.number_between(float, 1, 1000)
    add("directory", type=Path, metavar="DIR", help="new or empty; gets objects.csv, spectra/ and images/")
    add("--per-class", type=data.number_between(int, 1, 20_000), default=80, help="stars of each of M0…M4")
    add("--seed", type=data.number_between(int, 0, 2**32 - 1), default=1, help="the same seed gives the same files")
    add("--boss-fraction", type=data.number_between(float, 0, 1), help="fraction of BOSS spectra")
    add("--min-snr", type=snr, help="lowest median S/N a pixel")
    add("--max-snr", type=snr, help="highest median S/N a pixel")
    parser.add_quiet()
    parser.set_defaults(**simulate.__kwdefaults__)
    args = parser.parse_args(argv)
    if args.min_snr > args.max_snr:
        parser.error(f"--min-snr {args.min_snr} is above --max-snr {args.max_snr}")
    return args


def main(argv: list[str] | None = None) -> None:
    options = vars(parse_arguments(argv))
    with data.quietly(options.pop("quiet")):
        stars = simulate(**options)
        directory, per_class = options["directory"], options["per_class"]
        print(f"{len(stars)} SIMULATED stars, {per_class} of each of {', '.join(CLASS_NAMES)}: spectra, images and")
        print(f"{data.catalog_path(directory)}. They are no observations. Next:")
        print(f"  python train.py --data-dir {directory}")


if __name__ == "__main__":
    data.run_as_script(main)
