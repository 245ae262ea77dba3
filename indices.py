"""Molecular bands, metallicity class and Hα activity of an M dwarf, each with its error.

    indices = measure_indices(prepare_spectrum(spectrum), spectrum.redshift)
    indices["TiO5"], indices["TiO5_err"]               # 0.66, 0.04

TiO5, CaH2, CaH3: mean flux of a band over that of 7042–7046 Å (Reid, Hawley & Gizis 1995, AJ 110, 1838).
zeta: the depth of TiO5 over that of a star of solar metallicity with the same CaH2 + CaH3: 1 at solar metallicity, 0
without TiO. metallicity_class: dM, sdM, esdM or usdM by zeta (Lépine, Rich & Shara 2007, ApJ 669, 1235).
EW_Halpha: equivalent width in Å at rest, positive in emission, in the windows of The Hammer (Covey et al. 2007,
AJ 134, 2398). is_active: the criteria of West et al. 2011 (AJ 141, 97).

Differences from The Hammer's own measurements (its subdwarf.pro and ew.pro): its TiO5 is of 7130–7135 Å, it does not
correct for velocity, and its error of the equivalent width is too small by √2: it takes panels of the trapezoidal
rule, which share their pixels, as independent.
"""

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval

from mdwarf import air_to_vacuum
from preparation import WAVELENGTH

BANDS = {"TiO5": (7126, 7135), "CaH2": (6814, 6846), "CaH3": (6960, 6990)}  # Å, air
BAND_CONTINUUM = (7042, 7046)  # Å, air

# TiO5 at solar metallicity: coefficients of 1, CaH, CaH², CaH³ with CaH = CaH2 + CaH3 (Lépine et al. 2007).
SOLAR_TIO5 = (-0.050, -0.118, 0.670, -0.164)
SOLAR_TIO5_SLOPE = polyder(SOLAR_TIO5)
METALLICITY_CLASSES = ("usdM", "esdM", "sdM", "dM")
CLASS_LIMITS = (0.2, 0.5, 0.825)  # zeta between the classes

LINE = (6557.61, 6571.61)  # Å, vacuum
LINE_CONTINUUM = ((6500, 6550), (6575, 6625))  # Å, vacuum
MIN_ACTIVE_WIDTH = 0.75  # Å (West et al. 2011)
MIN_SIGNIFICANCE = 3  # of the width over its error, and of height and continuum over the noise of a pixel

Values = dict[str, float | str | bool | None]


def measure_indices(prepared: np.ndarray, redshift: float = 0.0) -> Values:
    """The values of tables.COLUMNS from TiO5 to is_active; NaN, "" or None where one cannot be measured.

    prepared: (2, 3522), flux over its median, and its inverse variance, on preparation.WAVELENGTH. Bad pixels (inverse
    variance 0) are not used; an equivalent width needs all pixels of the line. Errors are propagated to first order.
    """
    flux, ivar = prepared.astype(np.float64)
    wavelength = WAVELENGTH / (1 + redshift)
    return _measure_bands(wavelength, flux, ivar) | _measure_line(wavelength, flux, ivar)


def _measure_bands(wavelength: np.ndarray, flux: np.ndarray, ivar: np.ndarray) -> Values:
    bands = air_to_vacuum(np.array([*BANDS.values(), BAND_CONTINUUM]))
    means, variances = np.transpose([_mean(flux, ivar, _pixels(wavelength, band)) for band in bands])
    continuum = means[-1] if means[-1] > 0 else np.nan
    indices = means[:-1] / continuum
    # The indices share the error of their continuum.
    covariance = (np.diag(variances[:-1]) + np.outer(indices, indices) * variances[-1]) / continuum**2
    values = {}
    for name, index, variance in zip(BANDS, indices, np.diag(covariance), strict=True):
        values |= {name: float(index), f"{name}_err": float(np.sqrt(variance))}
    return values | _measure_metallicity(indices, covariance)


def _measure_metallicity(indices: np.ndarray, covariance: np.ndarray) -> Values:
    """From TiO5, CaH2 and CaH3 (3,) and their covariance (3, 3).

    zeta is NaN where no TiO is expected: of K stars, and of some early M stars in noise. A star has a class if zeta
    lies in it with both ends of its error bar.
    """
    tio5, cah = indices[0], indices[1] + indices[2]
    solar_depth = 1 - polyval(cah, SOLAR_TIO5)
    zeta = (1 - tio5) / solar_depth if solar_depth > 0 else np.nan
    if np.isnan(zeta):
        return {"zeta": np.nan, "zeta_err": np.nan, "metallicity_class": ""}
    slope = zeta * polyval(cah, SOLAR_TIO5_SLOPE) / solar_depth
    gradient = np.array([-1 / solar_depth, slope, slope])
    error = np.sqrt(gradient @ covariance @ gradient)
    lowest, highest = np.searchsorted(CLASS_LIMITS, (zeta - error, zeta + error))
    metallicity_class = METALLICITY_CLASSES[lowest] if lowest == highest else ""
    return {"zeta": float(zeta), "zeta_err": float(error), "metallicity_class": metallicity_class}


def _measure_line(wavelength: np.ndarray, flux: np.ndarray, ivar: np.ndarray) -> Values:
    """Equivalent width and activity of Hα; is_active is None where the S/N of the continuum is below 3."""
    line, *windows = (_pixels(wavelength, limits) for limits in (LINE, *LINE_CONTINUUM))
    means, variances = np.transpose([_mean(flux, ivar, window) for window in windows])
    # Linear interpolation between the windows; each is at the mean wavelength of its good pixels.
    blue, red = (_mean(wavelength, ivar, window)[0] for window in windows)
    fraction = (np.mean(LINE) - blue) / (red - blue)
    sides = np.array([1 - fraction, fraction])
    continuum, continuum_variance = sides @ means, sides**2 @ variances
    if not (continuum > 0 and ivar[line].all()):
        return {"EW_Halpha": np.nan, "EW_Halpha_err": np.nan, "is_active": None}
    weights = np.gradient(wavelength[line])  # Å, of the trapezoidal rule
    weights[[0, -1]] /= 2
    area = weights @ flux[line] / continuum
    width = area - weights.sum()
    error = np.sqrt(weights**2 @ (1 / ivar[line]) + area**2 * continuum_variance) / continuum
    noise = np.sqrt((1 / ivar[line]).mean())  # of one pixel
    is_active = None
    if continuum > MIN_SIGNIFICANCE * noise:
        height = flux[line].max() - continuum
        is_active = bool(width > max(MIN_ACTIVE_WIDTH, MIN_SIGNIFICANCE * error) and height > MIN_SIGNIFICANCE * noise)
    return {"EW_Halpha": float(width), "EW_Halpha_err": float(error), "is_active": is_active}


def _pixels(wavelength: np.ndarray, limits: tuple[float, float]) -> slice:
    return slice(*np.searchsorted(wavelength, limits))


def _mean(values: np.ndarray, ivar: np.ndarray, pixels: slice) -> tuple[float, float]:
    """Mean over the good pixels, and its variance if `values` is the flux; NaN if no pixel is good."""
    good = ivar[pixels] > 0
    count = np.count_nonzero(good)
    if count == 0:
        return np.nan, np.nan
    return values[pixels][good].sum() / count, (1 / ivar[pixels][good]).sum() / count**2
