"""Simulate stars from the mean SDSS spectra of real M dwarfs: a test set made otherwise than the simulator's.

    python benchmarks/template_stars.py DIR --templates TEMPLATES.npz --per-class 80 --seed 5
    python predict.py CHECKPOINT --data-dir DIR

Neither the spectra nor the noise are those of simulate_sdss_data.py, though its bands are fitted to the class means of
these templates (docs/simulator.md). A star lies anywhere between the templates, in subclass (up to half-way to the next
class; the first half of M0 is extrapolated) and in metallicity. Reddening, velocity and a wavy flux calibration are
drawn as well. The noise has long tails and is correlated between neighbouring pixels, as after resampling. Image,
magnitudes, and S/N for a magnitude are those of the simulator.

TEMPLATES.npz, which is not part of this repository, holds `loglam`, log10 of the vacuum wavelength in Å in steps
of 1e-4, and on it the spectra of Kesseli et al. 2017 (ApJS 230, 16), `M{subclass}_{[Fe/H]}_flux` of M0 to M5 and
[Fe/H] of +0.0 and +0.5, or of Bochanski et al. 2007 (AJ 133, 531), `M{subclass}_flux` of M0 to M5, of one
metallicity.

A seed gives the same names as in simulate_sdss_data.py: use different seeds for stars that are used together.
"""

import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import cli
import mdwarf
import simulate_sdss_data as simulator
from catalog import Star
from instrument import Spectrograph, draw_loglam, spectrum_columns

SUBCLASSES = range(6)
SUBTYPE_RANGE = 0.5  # of a class about its centre
METALLICITY_SCATTER, MAX_METALLICITY = 0.25, 0.5  # dex
REDDENING_SCATTER = 0.1  # E(B−V) relative to the templates' own stars
VELOCITY_SCATTER = 50  # km/s
CALIBRATION_ERROR = 0.05  # relative, at each of
CALIBRATION_NODES = 7  # places along the spectrum
SKY_LINES, SKY_LINE_HEIGHT = 60, 1.5  # number in the red; mean noise that one adds, in units of the noise there
NOISE_FREEDOM = 5  # degrees of freedom of the t distribution that is smoothed to the noise
NOISE_KERNEL = np.array([0.35, 1.0, 0.35]) / np.sqrt(1 + 2 * 0.35**2)  # neighbours correlate by 0.56
BAD_PIXELS, MISSED = 10, 0.1  # mean number in a spectrum, and the fraction that ivar does not mark
NOTICE = simulator.NOTICE.replace("simulate_sdss_data.py", "template_stars.py")


class Templates(NamedTuple):
    """The mean spectra of M0 to M5, in units of their median."""

    loglam: np.ndarray  # (pixels,)
    solar: np.ndarray  # (6, pixels), at [Fe/H] = 0
    per_dex: np.ndarray  # (6, pixels), change with [Fe/H]; 0 if the templates have one metallicity

    def flux(self, subtype: float, metallicity: float) -> np.ndarray:
        """(pixels,), on straight lines between the subclasses and in [Fe/H]."""
        first = int(np.clip(subtype, 0, SUBCLASSES[-2]))
        fraction = subtype - first
        pair = (self.solar + metallicity * self.per_dex)[first : first + 2]
        return (1 - fraction) * pair[0] + fraction * pair[1]


def read_templates(path: Path) -> Templates:
    """Read a file of templates. Raises DataError if it is something else, or lacks a template."""
    try:
        with np.load(path, allow_pickle=False) as file:
            spectra = {name: values.astype(float) for name, values in file.items()}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise cli.DataError(f"{path}: not a file of templates (.npz): {error}") from error
    suffixes = ["flux"] if "M0_flux" in spectra else ["+0.0_flux", "+0.5_flux"]
    names = [[f"M{subclass}_{suffix}" for subclass in SUBCLASSES] for suffix in suffixes]
    for name in ("loglam", *np.ravel(names)):
        if name not in spectra:
            raise cli.DataError(f"{path}: no {name} in it; --help says what it must hold")
        if spectra[name].shape != spectra["loglam"].shape:
            raise cli.DataError(f"{path}: {name} has not as many values as loglam")
    grid = np.array([[spectra[name] for name in row] for row in names])  # (metallicities, 6, pixels)
    covered = np.isfinite(grid).all(axis=(0, 1))
    loglam, grid = spectra["loglam"][covered], grid[:, :, covered]
    if loglam.size == 0 or loglam[0] > np.log10(3900) or loglam[-1] < np.log10(9100):
        raise cli.DataError(f"{path}: not all of its spectra reach from 3900 to 9100 Å")
    grid /= np.median(grid, axis=2, keepdims=True)
    return Templates(loglam, grid[0], (grid[-1] - grid[0]) / 0.5)


def observe_spectrum(target: simulator.Target, rng: np.random.Generator, templates: Templates) -> simulator.Observation:
    """In place of the simulator's: the star's spectrum from the templates, with noise of another kind."""
    metallicity = np.clip(rng.normal(0, METALLICITY_SCATTER), -MAX_METALLICITY, MAX_METALLICITY)
    reddening = rng.normal(0, REDDENING_SCATTER)
    redshift = rng.normal(0, VELOCITY_SCATTER) / mdwarf.SPEED_OF_LIGHT
    loglam = draw_loglam(target.is_boss, rng)
    # The templates end before BOSS spectra do; 0.001 dex leave room for the redshift.
    loglam = loglam[(loglam > templates.loglam[0] + 0.001) & (loglam < templates.loglam[-1] - 0.001)]
    shape = np.interp(loglam - np.log10(1 + redshift), templates.loglam, templates.flux(target.subtype, metallicity))
    shape *= 10 ** (-0.4 * reddening * mdwarf.extinction_curve(loglam))
    x = np.linspace(-1, 1, len(loglam))
    nodes = np.linspace(-1, 1, CALIBRATION_NODES)
    shape *= np.exp(CubicSpline(nodes, rng.normal(0, CALIBRATION_ERROR, CALIBRATION_NODES))(x))
    spectrograph = Spectrograph(loglam, target.is_boss, rng)
    flux, r = simulator.scale_flux(shape, target, spectrograph, rng)

    sigma = noise_shape(x, rng)
    sigma *= np.median(flux / sigma) / spectrograph.median_snr(flux)
    white = rng.standard_t(NOISE_FREEDOM, len(loglam)) / np.sqrt(NOISE_FREEDOM / (NOISE_FREEDOM - 2))
    observed, ivar = flux + sigma * np.convolve(white, NOISE_KERNEL, mode="same"), sigma**-2
    bad = rng.integers(len(loglam), size=rng.poisson(BAD_PIXELS))
    observed[bad] += sigma[bad] * rng.exponential(30, len(bad))
    ivar[bad[rng.random(len(bad)) >= MISSED]] = 0
    columns = spectrum_columns(loglam, observed, ivar, flux, sky=np.zeros(len(loglam)), dispersion=1.0)
    return simulator.Observation(
        columns, redshift, mdwarf.draw_magnitudes(target.subtype, metallicity, reddening, r, rng)
    )


def noise_shape(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Relative noise at positions −1…1 along a spectrum: larger to both ends, to the blue, and on lines of the sky."""
    sigma = np.exp(rng.normal(0.8, 0.2) * x**2 - rng.normal(0.3, 0.2) * x)
    centres, heights = rng.uniform(0.2, 1, SKY_LINES), rng.exponential(SKY_LINE_HEIGHT, SKY_LINES)
    return sigma * (1 + heights @ np.exp(-0.5 * ((x - centres[:, None]) * len(x) / 2 / 1.5) ** 2))


def simulate_from_templates(directory: Path, templates_path: Path, **options: Any) -> list[Star]:
    """As simulate_sdss_data.simulate, with the same options, from these templates."""
    observe = partial(observe_spectrum, templates=read_templates(templates_path))
    return simulator.simulate(directory, observe=observe, subtype_range=SUBTYPE_RANGE, notice=NOTICE, **options)


def main() -> None:
    parser = simulator.make_parser(__doc__)
    parser.add_argument("--templates", type=Path, required=True, dest="templates_path", metavar="TEMPLATES.npz",
                        help="the mean spectra")  # fmt: skip
    simulator.run(parser, simulate_from_templates)


if __name__ == "__main__":
    cli.run_as_script(main)
