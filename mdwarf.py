"""Physics of simulated M dwarfs: spectra at rest, emission, extinction, colours. NumPy and SciPy alone.

Sources. Temperatures: Pecaut & Mamajek 2013 (ApJS 208, 9). Band heads: Kirkpatrick et al. 1991
(ApJS 77, 417), Valenti et al. 1998 (ApJ 498, 851). Depths of bands and lines, and the continuum:
smooth functions of subclass, fitted to the average of the mean SDSS spectra of Kesseli et al. 2017
(ApJS 230, 16; [Fe/H] = 0) and Bochanski et al. 2007 (AJ 133, 531), and of metallicity, fitted to
Kesseli's. docs/simulator.md compares them. Active fractions: West et al. 2011 (AJ 141, 97).
Extinction: Schlafly & Finkbeiner 2011 (ApJ 737, 103). Colours: medians by class of this repository's
objects.csv.
"""

import functools

import numpy as np
from scipy.ndimage import gaussian_filter1d

SPEED_OF_LIGHT = 299_792.458  # km/s (CODATA)
SECOND_RADIATION = 1.43878e8  # Å K, hc/k: the second radiation constant (CODATA)
TEMPERATURES = (3850, 3660, 3560, 3430, 3210, 3060)  # K, M0…M5 (Pecaut & Mamajek 2013)
TEMPERATURE_SCATTER = 40  # K, between stars of one subclass
METALLICITY_SCATTER = 0.2  # dex, [Fe/H] of the thin disc
VELOCITY_SCATTER = 40  # km/s, radial velocity of disc dwarfs
MEAN_REDDENING = 0.03  # E(B−V), high galactic latitude
ACTIVE_FRACTION = (0.02, 0.03, 0.04, 0.08, 0.20)  # M0…M4 with Hα in emission (West et al. 2011)

# ln(blackbody / continuum): wavelength (Å, air), at M0, M2 and M4, and its change per dex of [Fe/H].
CONTINUUM = np.array(
    [
        (3600, 0.80, 0.56, 0.11, 0.77), (3900, 0.31, 0.21, 0.01, 0.01), (4200, 0.13, 0.42, 0.52, -0.09),
        (4600, -0.22, 0.01, 0.18, -0.12), (5000, -0.12, -0.04, -0.03, -0.19), (5400, -0.11, -0.02, 0.09, -0.10),
        (6000, -0.20, -0.05, 0.25, -0.06), (6300, -0.16, -0.13, 0.09, -0.11), (6560, -0.20, -0.24, -0.11, -0.09),
        (7100, -0.16, -0.28, -0.25, -0.15), (7600, -0.16, -0.32, -0.38, -0.09), (8200, -0.16, -0.36, -0.46, -0.09),
        (9000, -0.12, -0.31, -0.39, -0.06),
    ]
)  # fmt: skip
# Absorption: species, then band heads (or lines) as wavelength (Å, air), width (Å), optical depth at M0, M2, M4.
# A band starts at its head and fades over its width to the red (to the violet where the width is negative).
BANDS = """
TiO    4668  180 .04 .08 .14      4761   80 .24 .35 .44      4804   80 .00 .07 .17      4848   60 .00 .09 .17
TiO    4954  180 .12 .27 .46      5003  300 .15 .17 .20      5167   25 .00 .22 .61      5448   25 .08 .29 .49
TiO    5497  180 .05 .14 .34      5598   60 .04 .13 .17      5847  300 .08 .21 .37      6158   80 .11 .35 .61
TiO    6187   60 .05 .19 .34      6215   60 .11 .27 .38      6651   60 .02 .14 .32      6681  120 .02 .11 .20
TiO    6714  120 .05 .17 .26      6784  180 .04 .12 .14      7053   80 .08 .25 .47      7087   80 .07 .24 .43
TiO    7126  120 .10 .30 .54      7197   60 .04 .12 .23      7589   60 .01 .06 .17      7705  300 .04 .16 .34
TiO    8303  300 .03 .05 .09      8442  300 .00 .03 .13
CaH    6908 -300 .09 .20 .28      6946 -300 .06 .16 .25      7035 -300 .05 .13 .20
MgH    5211 -180 .32 .22 .12
CaOH   6230   80 .05 .13 .20
VO     7851   80 .00 .03 .09
CH     4315 -120 .24 .16 .15
CN     3883  -80 .42 .42 .45
"""
# The width of a line is the half width of its Lorentz profile. CaH here: the parts of its bands without a sharp head.
LINES = """
CaII 3933.7    3 .65 .74 .19    3968.5    3 .59 .67 .00      8498  1.5 .25 .21 .12
CaII 8542.1  1.5 .65 .52 .32    8662.1  1.5 .52 .44 .26
CaI  4226.7    5 1.03 1.16 1.07    4454.8    2 .60 .49 .34    6102.7  1.5 .14 .12 .06
CaI  6122.2  1.5 .32 .29 .20    6162.2  1.5 .45 .33 .07    6439.1  1.5 .13 .17 .14
CaI  6462.6  1.5 .12 .12 .07      6495    4 .12 .10 .05
CrI  4254.3  1.5 .61 .60 .48    4274.8  1.5 .56 .52 .40    4289.7  1.5 .54 .57 .49
CrI    5206  2.5 .35 .44 .47
FeI  4325.8    2 .39 .30 .39    4383.5  2.5 .62 .54 .50    4404.8    2 .55 .45 .37
FeI    5270  2.5 .45 .43 .43    5328.2    2 .31 .27 .26
TiI    4533    3 .37 .26 .10
MgI  5172.7    2 .59 .48 .27    5183.6    2 .41 .29 .17
NaI  5889.95    3 .77 .76 .60      5893   25 .00 .11 .24    5895.92    3 .61 .74 .66
NaI  8183.3  1.5 .18 .28 .40    8194.8  1.5 .26 .40 .57
KI   7664.9    3 .20 .30 .51      7682   25 .00 .11 .29      7699    3 .15 .26 .45
CaH    6384    6 .11 .29 .34      6970   30 .03 .09 .14
"""
# Optical depth goes as 10^(exponent·[Fe/H]): the ratio of CaH to TiO measures metallicity (Lépine et al. 2007).
METALLICITY_EXPONENT = {"TiO": 0.2, "VO": 0.3, "MgH": 0.0}
OTHER_EXPONENT = 0.1  # of all other molecules and atoms
# Å (vacuum), and fluxes relative to Hα in active M dwarfs: Balmer series, then Ca II K and H.
EMISSION_LINES = ((6564.6, 1.0), (4862.7, 0.30), (4341.7, 0.15), (4102.9, 0.10), (3934.8, 0.1), (3969.6, 0.1))

REST_STEP = 0.5e-4  # dex, half an SDSS pixel
REST_LOGLAM = np.arange(70_800, 80_800) * REST_STEP  # log10 of the vacuum wavelength in Å
LINE_SPREAD = 0.92  # SDSS pixels, sigma of the best of SDSS's fibers (R ≈ 2000): the resolution of spectra at rest

BAND_WAVELENGTHS = (3543, 4770, 6231, 7625, 9134)  # Å, u g r i z
BAND_EXTINCTION = (4.239, 3.303, 2.285, 1.698, 1.263)  # A / E(B−V) in u g r i z (Schlafly & Finkbeiner 2011)


def air_to_vacuum(wavelength: np.ndarray) -> np.ndarray:
    """Vacuum wavelengths of air wavelengths, both in Å (Ciddor 1996, Applied Optics 35, 1566)."""
    wavenumber = (1e4 / np.asarray(wavelength)) ** 2
    return wavelength * (1 + 5.792105e-2 / (238.0185 - wavenumber) + 1.67917e-3 / (57.362 - wavenumber))


def at_subtype(nodes: np.ndarray, subtype: float) -> np.ndarray:
    """The parabola through the values at M0, M2 and M4, in the last axis of `nodes`."""
    weights = (subtype - 2) * (subtype - 4) / 8, subtype * (4 - subtype) / 4, subtype * (subtype - 2) / 8
    return nodes @ np.array(weights)


def _parse_table(table: str) -> tuple[list[str], np.ndarray]:
    """Species (N,) and numbers (N, 5) of the bands or lines."""
    species, numbers = [], []
    for line in table.strip().splitlines():
        name, *values = line.split()
        entries = np.array(values, dtype=float).reshape(-1, 5)
        species += [name] * len(entries)
        numbers.append(entries)
    return species, np.concatenate(numbers)


@functools.cache
def absorption() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Profiles (N, pixels) on REST_LOGLAM, depths at M0, M2, M4 (N, 3), metallicity exponents (N,)."""
    wavelength = 10**REST_LOGLAM
    (band_species, bands), (line_species, lines) = _parse_table(BANDS), _parse_table(LINES)
    distance = (wavelength - air_to_vacuum(bands[:, :1])) / bands[:, 1:2]
    band_profiles = np.where(distance >= 0, np.exp(-np.clip(distance, 0, 50)), 0)
    line_profiles = 1 / (1 + ((wavelength - air_to_vacuum(lines[:, :1])) / lines[:, 1:2]) ** 2)
    profiles = np.concatenate([band_profiles, line_profiles])
    profiles = gaussian_filter1d(profiles, 2 * LINE_SPREAD, axis=1, mode="nearest")
    exponents = [METALLICITY_EXPONENT.get(name, OTHER_EXPONENT) for name in band_species + line_species]
    return profiles.astype(np.float32), np.concatenate([bands, lines])[:, 2:], np.array(exponents)


def rest_spectrum(subtype: float, metallicity: float, temperature_offset: float = 0.0) -> np.ndarray:
    """Flux of a quiet M dwarf on REST_LOGLAM, in units of its blackbody at 7500 Å; the offset in K."""
    wavelength = 10**REST_LOGLAM
    temperature = np.interp(subtype, range(6), TEMPERATURES) + temperature_offset
    blackbody = (7500 / wavelength) ** 5 * np.expm1(SECOND_RADIATION / (7500 * temperature))
    blackbody /= np.expm1(SECOND_RADIATION / (wavelength * temperature))
    nodes = at_subtype(CONTINUUM[:, 1:4], subtype) + metallicity * CONTINUUM[:, 4]
    profiles, depths, exponents = absorption()
    depth = np.clip(at_subtype(depths, subtype), 0, None) * 10 ** (exponents * metallicity)
    # einsum, not @: BLAS may add up in another order on another machine.
    optical_depth = np.einsum("b,bp->p", depth.astype(np.float32), profiles)
    return blackbody * np.exp(-np.interp(wavelength, CONTINUUM[:, 0], nodes) - optical_depth)


def add_emission(flux: np.ndarray, equivalent_width: float) -> np.ndarray:
    """`flux` on REST_LOGLAM with Hα of this equivalent width (Å), and the weaker lines in proportion."""
    wavelength = 10**REST_LOGLAM
    h_alpha_flux = equivalent_width * np.interp(EMISSION_LINES[0][0], wavelength, flux)
    for line, ratio in EMISSION_LINES:
        sigma = line * np.log(10) * (2 * REST_STEP) * LINE_SPREAD  # Å
        profile = np.exp(-0.5 * ((wavelength - line) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
        flux = flux + ratio * h_alpha_flux * profile
    return flux


def draw_rest_spectrum(subtype: float, metallicity: float, rng: np.random.Generator) -> np.ndarray:
    """Flux on REST_LOGLAM of a star of random temperature and activity."""
    flux = rest_spectrum(subtype, metallicity, rng.normal(0, TEMPERATURE_SCATTER))
    if rng.random() < np.interp(subtype, range(5), ACTIVE_FRACTION):
        flux = add_emission(flux, rng.lognormal(np.log(3), 0.5))
    return flux


def extinction_curve(loglam: np.ndarray) -> np.ndarray:
    """A / E(B−V), linear in 1/wavelength between the bands."""
    return np.interp(1 / 10**loglam, 1 / np.array(BAND_WAVELENGTHS[::-1]), BAND_EXTINCTION[::-1])


def r_magnitude(loglam: np.ndarray, flux: np.ndarray) -> float:
    """AB magnitude in r of a spectrum in 1e-17 erg/s/cm²/Å, from its mean in 5510–6890 Å."""
    in_r = np.abs(10**loglam - 6200) < 690
    f_nu = flux[in_r].mean() * 1e-17 * 6200**2 / (SPEED_OF_LIGHT * 1e13)  # erg/s/cm²/Hz, c in Å/s
    return float(-2.5 * np.log10(f_nu) - 48.6)


def draw_magnitudes(
    subtype: float, metallicity: float, reddening: float, r: float, rng: np.random.Generator
) -> np.ndarray:
    """True u g r i z of a star of this observed r: parabolas through the classes' median colours, with scatter.

    Metal-poor M dwarfs are redder in g−r (Lépine & Scholz 2008).
    """
    u_g = 2.60 + rng.normal(0, 0.10)
    g_r = 1.37 + 0.017 * subtype - 0.10 * metallicity + rng.normal(0, 0.05)
    r_i = 0.70 + 0.130 * subtype + 0.011 * subtype**2 + rng.normal(0, 0.04)
    i_z = 0.38 + 0.088 * subtype + 0.002 * subtype**2 + rng.normal(0, 0.03)
    colours = np.array([u_g + g_r, g_r, 0, -r_i, -r_i - i_z])
    extinction = reddening * np.array(BAND_EXTINCTION)
    return r + colours + extinction - extinction[2]
