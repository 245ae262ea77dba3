"""Stars of another making than simulate_sdss_data.py's: from the mean SDSS spectra of real M dwarfs.

    python benchmarks/template_stars.py DIR --templates TEMPLATES.npz --per-class 80 --seed 5
    python benchmarks/accuracy.py --data-dir DIR --test-dir OTHER_DIR --output-dir again

They show what fits only the simulator, as neither the spectra nor their noise are the simulator's. A star lies
anywhere between the templates, in subclass (up to half-way to the next class; the first half of M0 is extrapolated)
and in metallicity; reddening, velocity and a wavy flux calibration are drawn as well, activity is not. Its noise has
long tails and, as resampling leaves it, is correlated between neighbouring pixels. Its image and magnitudes are
the simulator's, for its subclass, metallicity and reddening, and independent of the brightness of its spectrum.

TEMPLATES.npz holds mean spectra of Kesseli et al. 2017 (ApJS 230, 16), which are not part of this repository:
`loglam`, log10 of the vacuum wavelength in Å in steps of 1e-4, and `M{subclass}_{[Fe/H]}_flux` on it, of M0 to M5 and
[Fe/H] of +0.0 and +0.5. All other options are those of simulate_sdss_data.py. Its stars of the same seed have the same
names: take other seeds where stars of both are used together.
"""

import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from scipy.interpolate import CubicSpline, RegularGridInterpolator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import data  # noqa: E402
import simulate_sdss_data as simulator  # noqa: E402

SUBCLASSES = range(6)
METALLICITIES = (0.0, 0.5)  # those of which all subclasses have a template; others follow along a straight line
SUBTYPE_RANGE = 0.5  # of a class about its centre
METALLICITY_SCATTER, MAX_METALLICITY = 0.25, 0.5  # dex
REDDENING_SCATTER = 0.1  # E(B−V) more or less than that of the templates' own stars
VELOCITY_SCATTER = 50  # km/s
CALIBRATION_ERROR = 0.05  # relative, at each of
CALIBRATION_NODES = 7  # places along the spectrum
SKY_LINES, SKY_LINE_HEIGHT = 60, 1.5  # in the red; what one adds to the noise there, in units of it, in the mean
NOISE_FREEDOM = 5  # degrees of freedom of the t distribution that is smoothed to the noise
NOISE_KERNEL = np.array([0.35, 1.0, 0.35]) / np.sqrt(1 + 2 * 0.35**2)  # neighbours correlate by 0.56
BAD_PIXELS, MISSED = 10, 0.1  # a spectrum, in the mean, and the fraction of them that ivar does not tell of
NOTICE = f"{data.SIMULATED_MARK.decode()} by template_stars.py: not an observation, this star does not exist"


class Templates(NamedTuple):
    """The grid of templates."""

    loglam: np.ndarray  # (pixels,)
    flux: RegularGridInterpolator  # (subclass, [Fe/H]) → (pixels,), in units of the median


def read_templates(path: Path) -> Templates:
    """Raises DataError for a file that is something else, or that lacks a template."""
    try:
        with np.load(path, allow_pickle=False) as file:
            spectra = {name: values.astype(float) for name, values in file.items()}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise data.DataError(f"{path}: not a file of templates (.npz): {error}") from error
    names = [[f"M{subclass}_{metallicity:+.1f}_flux" for metallicity in METALLICITIES] for subclass in SUBCLASSES]
    for name in ("loglam", *np.ravel(names)):
        if name not in spectra:
            raise data.DataError(f"{path}: no {name} in it; --help says what it must hold")
        if spectra[name].shape != spectra["loglam"].shape:
            raise data.DataError(f"{path}: {name} has not as many values as loglam")
    grid = np.array([[spectra[name] for name in row] for row in names])
    covered = np.isfinite(grid).all(axis=(0, 1))
    loglam, grid = spectra["loglam"][covered], grid[:, :, covered]
    if loglam.size == 0 or loglam[0] > np.log10(3700) or loglam[-1] < np.log10(9200):
        raise data.DataError(f"{path}: not all of its spectra reach from 3700 to 9200 Å")
    grid /= np.median(grid, axis=2, keepdims=True)
    return Templates(
        loglam, RegularGridInterpolator((SUBCLASSES, METALLICITIES), grid, bounds_error=False, fill_value=None)
    )


def observe_spectrum(target: simulator.Target, rng: np.random.Generator, templates: Templates) -> simulator.Observation:
    """In place of the simulator's: the star's spectrum from the templates, with noise of another kind."""
    metallicity = np.clip(rng.normal(0, METALLICITY_SCATTER), -MAX_METALLICITY, MAX_METALLICITY)
    reddening = rng.normal(0, REDDENING_SCATTER)
    redshift = rng.normal(0, VELOCITY_SCATTER) / simulator.SPEED_OF_LIGHT
    loglam = simulator.draw_loglam(target.is_boss, rng)
    # The templates end before BOSS spectra do; 0.001 dex leave room for the redshift.
    loglam = loglam[(loglam > templates.loglam[0] + 0.001) & (loglam < templates.loglam[-1] - 0.001)]
    x = np.linspace(-1, 1, len(loglam))
    flux = np.interp(loglam - np.log10(1 + redshift), templates.loglam, templates.flux((target.subtype, metallicity)))
    flux *= 10 ** (-0.4 * reddening * simulator.extinction_curve(loglam))
    nodes = np.linspace(-1, 1, CALIBRATION_NODES)
    flux *= np.exp(CubicSpline(nodes, rng.normal(0, CALIBRATION_ERROR, CALIBRATION_NODES))(x))

    # Noisier to both ends, more so to the blue, and where the sky shines.
    sigma = np.exp(rng.normal(0.8, 0.2) * x**2 - rng.normal(0.3, 0.2) * x)
    centres, heights = rng.uniform(0.2, 1, SKY_LINES), rng.exponential(SKY_LINE_HEIGHT, SKY_LINES)
    sigma *= 1 + heights @ np.exp(-0.5 * ((x - centres[:, None]) * len(x) / 2 / 1.5) ** 2)
    sigma *= np.median(flux / sigma) / target.snr
    white = rng.standard_t(NOISE_FREEDOM, len(loglam)) / np.sqrt(NOISE_FREEDOM / (NOISE_FREEDOM - 2))
    observed, ivar = flux + sigma * np.convolve(white, NOISE_KERNEL, mode="same"), sigma**-2
    bad = rng.integers(len(loglam), size=rng.poisson(BAD_PIXELS))
    observed[bad] += sigma[bad] * rng.exponential(30, len(bad))
    ivar[bad[rng.random(len(bad)) >= MISSED]] = 0
    mask = np.where(ivar == 0, simulator.FULLREJECT, 0)
    columns = {
        "flux": observed, "loglam": loglam, "ivar": ivar, "and_mask": mask, "or_mask": mask,
        "wdisp": np.ones(len(loglam)), "sky": np.zeros(len(loglam)), "model": flux,
    }  # fmt: skip
    magnitudes = simulator.draw_magnitudes(target.subtype, metallicity, reddening, rng.normal(18.5, 1.0), rng)
    return simulator.Observation(columns, redshift, magnitudes)


def main() -> None:
    usage = "%(prog)s DIR --templates TEMPLATES.npz [options of simulate_sdss_data.py]"
    parser = data.ScriptParser(__doc__, usage=usage, allow_abbrev=False)
    parser.add_argument("--templates", type=Path, required=True, metavar="TEMPLATES.npz", help="the mean spectra")
    args, of_simulator = parser.parse_known_args()
    observe = partial(observe_spectrum, templates=read_templates(args.templates))
    with patch.multiple(simulator, observe_spectrum=observe, SUBTYPE_RANGE=SUBTYPE_RANGE, NOTICE=NOTICE):
        simulator.main(of_simulator)


if __name__ == "__main__":
    data.run_as_script(main)
