"""SDSS's spectrograph and camera, simulated: what they do to a spectrum and to the image of a field.

The noise is tuned to ivar and sky of three public spectra (plates 618, 1123 and 5047): at their r magnitudes it gives
their S/N to within a quarter. Colour images: Lupton et al. 2004 (PASP 116, 133).
"""

import functools

import numpy as np
from PIL import Image
from scipy.optimize import brentq

from mdwarf import LINE_SPREAD, air_to_vacuum
from survey_files import CUTOUT_SCALE, IMAGE_SIZE, PIXELS_PER_DEX

# The spectrograph

MAX_LINE_SPREAD = 1.05  # pixels, sigma: R is 1750 to 2000 over fibers and nights
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
# Residuals of the correction for the Earth's atmosphere: O₂ and H₂O bands as centre, half width (Å), relative depth.
TELLURIC_BANDS = (
    ((6875, 8, 0.5), (6895, 14, 0.3), (7607, 10, 1.0), (7640, 20, 0.6)),
    ((7250, 60, 0.4), (8230, 70, 0.4), (9000, 60, 0.4), (9350, 120, 1.0)),
)
TELLURIC_RESIDUAL = 0.03
FULLREJECT = 1 << 18  # bit of SDSS's SPPIXMASK


def draw_loglam(is_boss: bool, rng: np.random.Generator) -> np.ndarray:
    """The wavelength grid of one file (log10 Å): its ends vary by a few pixels from file to file."""
    start, length = (35_545, 4580) if is_boss else (35_800, 3820)
    start += rng.integers(16)
    return np.arange(start, start + length + rng.integers(31)) / PIXELS_PER_DEX


@functools.cache
def night_sky() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel numbers of SDSS's grid, and continuum and lines of the sky there, 1e-17 erg/s/cm²/Å."""
    pixel = np.arange(35_500, 40_200)
    lines = np.array(SKY_LINES.split(), dtype=float).reshape(-1, 2)
    offsets = pixel[:, None] - np.log10(air_to_vacuum(lines[:, 0])) * PIXELS_PER_DEX
    line_flux = (np.exp(-0.5 * offsets**2) * lines[:, 1]).sum(axis=1)
    return pixel, np.interp(10 ** (pixel / PIXELS_PER_DEX), *np.transpose(SKY)), line_flux


class Spectrograph:
    """Throughput, sky and resolution of one star's exposures, on a grid of pixels."""

    def __init__(self, loglam: np.ndarray, is_boss: bool, rng: np.random.Generator) -> None:
        self.loglam, self.wavelength = loglam, 10**loglam
        self.dispersion = rng.uniform(LINE_SPREAD, MAX_LINE_SPREAD)
        throughput = np.interp(self.wavelength, THROUGHPUT[:, 0], THROUGHPUT[:, 1 + is_boss])
        self.throughput = throughput * rng.lognormal(0, EXPOSURE_SCATTER)
        sky_level = rng.lognormal(0, EXPOSURE_SCATTER) * (0.6 if is_boss else 1)  # fibers of 2″, not 3″
        pixel, continuum, lines = night_sky()
        self.sky_lines = sky_level * np.interp(loglam * PIXELS_PER_DEX, pixel, lines)
        self.sky = sky_level * np.interp(loglam * PIXELS_PER_DEX, pixel, continuum) + self.sky_lines

    def sigma(self, flux: np.ndarray) -> np.ndarray:
        """Noise of each pixel: photons of star and sky, read-out, and residuals of the sky subtraction."""
        photons = (np.maximum(flux, 0) + self.sky) / self.throughput
        return np.sqrt(photons + (READ_NOISE / self.throughput) ** 2 + (SKY_RESIDUAL * self.sky_lines) ** 2)

    def median_snr(self, flux: np.ndarray) -> float:
        """Median signal to noise a pixel."""
        return float(np.median(flux / self.sigma(flux)))

    def scale_to_snr(self, shape: np.ndarray, snr: float) -> np.ndarray:
        """The flux of this shape that has this median signal to noise."""
        shape = shape / np.median(shape)
        return shape * np.exp(brentq(lambda x: np.log(self.median_snr(np.exp(x) * shape) / snr), -10, 20, xtol=1e-4))

    def expose(self, flux: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The columns of a spectrum's HDU 1: `flux` with calibration errors, noise, cosmic rays and bad pixels."""
        x = np.log(self.wavelength / 6500)
        # Spectrophotometry is good to about 4 % (Adelman-McCarthy et al. 2008), the two cameras' join to 1 %.
        calibration = rng.normal(0, 0.08) * x + rng.normal(0, 0.12) * x**2
        calibration += rng.normal(0, 0.01) * np.tanh((self.wavelength - 5980) / 60)
        model = flux * np.exp(calibration)
        for bands in TELLURIC_BANDS:
            absorption = sum(d * np.exp(-0.5 * ((self.wavelength - c) / w) ** 2) for c, w, d in bands)
            model *= 1 + rng.normal(0, TELLURIC_RESIDUAL) * absorption
        sigma = self.sigma(model)
        observed, ivar = rng.normal(model, sigma), sigma**-2
        ivar[damage_pixels(observed, sigma, rng)] = 0
        return spectrum_columns(self.loglam, observed, ivar, model, self.sky, self.dispersion)


def spectrum_columns(
    loglam: np.ndarray, flux: np.ndarray, ivar: np.ndarray, model: np.ndarray, sky: np.ndarray, dispersion: float
) -> dict[str, np.ndarray]:
    """The columns of HDU 1 in SDSS's order; `dispersion` in pixels."""
    mask = np.where(ivar == 0, FULLREJECT, 0)
    columns = {"flux": flux, "loglam": loglam, "ivar": ivar, "and_mask": mask, "or_mask": mask}
    return columns | {"wdisp": np.full(len(flux), dispersion), "sky": sky, "model": model}


def damage_pixels(flux: np.ndarray, sigma: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put cosmic rays and dead pixels into `flux`, in place; True where the pipeline found them."""
    bad = np.zeros(len(flux), dtype=bool)

    def draw_runs(mean_number: float, longest: int) -> list[slice]:
        starts = rng.integers(0, len(flux) - longest, size=rng.poisson(mean_number))
        return [slice(start, start + rng.integers(1, longest + 1)) for start in starts]

    for run in draw_runs(2, 3):  # cosmic rays, found
        flux[run] += rng.lognormal(np.log(30), 1) * sigma[run]
        bad[run] = True
    for run in draw_runs(0.7, 2):  # and missed
        flux[run] += rng.uniform(5, 20) * sigma[run]
    for run in draw_runs(4, 6) + draw_runs(0.05, 150):  # dead columns; one spectrum in twenty lacks a larger piece
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
    blue, green, red = np.maximum(planes, 0) * np.array(COLOR_SCALES)[:, None, None]
    intensity = np.maximum((red + green + blue) / 3, 1e-6)
    gain = np.arcsinh(COLOR_Q * COLOR_SLOPE * intensity) / COLOR_Q / intensity
    return (255 * np.clip(np.stack([red, green, blue], axis=2) * gain[:, :, None], 0, 1)).astype(np.uint8)


def render_field(gri: np.ndarray, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nanomaggies in g, r, i (3, FIELD, FIELD) of the star at `center` and of field objects around it."""
    y, x = np.ogrid[:FIELD, :FIELD]
    y, x = y * PIXEL_SCALE, x * PIXEL_SCALE
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
    return sum(
        fraction * np.exp(-0.5 * (x / w) ** 2) * np.exp(-0.5 * (y / w) ** 2) / (2 * np.pi * w**2)
        for fraction, w in widths
    )


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
    """Flux (3, 1, 1) of three magnitudes."""
    return 10 ** (0.4 * (22.5 - magnitudes))[:, None, None]
