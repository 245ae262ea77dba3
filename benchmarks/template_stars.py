"""Stars of another making than simulate_sdss_data.py's: from the mean SDSS spectra of real M dwarfs.

    python benchmarks/template_stars.py TEMPLATES.npz DIR --per-class 80 --seed 5     the simulator's options follow
    python benchmarks/accuracy.py --data-dir DIR --test-dir OTHER_DIR --output-dir again

They show what fits only the simulator, as neither the spectra nor their noise are the simulator's. A star lies
anywhere between the templates, in subclass (up to half-way to the next class) and in metallicity. Its noise has long
tails and is correlated between neighbouring pixels, as that of resampled spectra is. Its image and magnitudes are
the simulator's, for its subclass and metallicity, and independent of the brightness of its spectrum.

TEMPLATES.npz holds mean spectra of Kesseli et al. 2017 (ApJS 230, 16), which are not part of this repository:
`loglam`, log10 of the vacuum wavelength in Å in steps of 1e-4, and `M{subclass}_{[Fe/H]}_flux`, as in `M3_-0.5_flux`.
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
from scipy.interpolate import CubicSpline, RegularGridInterpolator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import data  # noqa: E402
import simulate_sdss_data as simulator  # noqa: E402

SUBCLASSES, METALLICITIES = range(6), (-0.5, 0.0, 0.5)
MISSING = (4, -0.5)  # of these, the one that there is no template of
SUBTYPE_RANGE = 0.5  # of a class about its centre
METALLICITY_SCATTER = 0.25  # dex, within the templates' range
REDDENING_SCATTER = 0.1  # E(B−V) more or less than that of the templates' own stars
VELOCITY_SCATTER = 50  # km/s
CALIBRATION_ERROR = 0.05  # relative, at each of
CALIBRATION_NODES = 5  # places along the spectrum
SKY_BUMPS, SKY_BUMP_HEIGHT = 60, 3.0  # lines in the red that double or triple the noise
NOISE_FREEDOM = 5  # degrees of freedom of its t distribution
NOISE_KERNEL = np.array([0.35, 1.0, 0.35]) / np.sqrt(1 + 2 * 0.35**2)  # of white noise, gives what neighbours share
BAD_PIXELS = 10  # a spectrum, in the mean


class Templates(NamedTuple):
    """The grid of templates."""

    loglam: np.ndarray  # (pixels,)
    flux: RegularGridInterpolator  # (subclass, [Fe/H]) → (pixels,), in units of the median


def read_templates(path: Path) -> Templates:
    """Raises DataError for a file that lacks one of them."""
    with np.load(path, allow_pickle=False) as file:
        spectra = {name: values.astype(float) for name, values in file.items()}
    for name in ("loglam", *(f"M{k}_{m:+.1f}_flux" for k in SUBCLASSES for m in METALLICITIES if (k, m) != MISSING)):
        if name not in spectra:
            raise data.DataError(f"{path}: no {name} in it; --help says what it must hold")
    covered = np.isfinite(spectra["M0_+0.0_flux"])

    def flux(subclass: int, metallicity: float) -> np.ndarray:
        if (subclass, metallicity) == MISSING:  # as its neighbours, and as far from them as M4 of solar metallicity is
            later = flux(4, 0.0) - (flux(3, 0.0) + flux(5, 0.0)) / 2
            return (flux(3, -0.5) + flux(5, -0.5)) / 2 + later
        values = spectra[f"M{subclass}_{metallicity:+.1f}_flux"][covered]
        return values / np.median(values)

    grid = np.array([[flux(subclass, metallicity) for metallicity in METALLICITIES] for subclass in SUBCLASSES])
    interpolator = RegularGridInterpolator((SUBCLASSES, METALLICITIES), grid, bounds_error=False, fill_value=None)
    return Templates(spectra["loglam"][covered], interpolator)


def observe_spectrum(target: simulator.Target, rng: np.random.Generator, templates: Templates) -> simulator.Observation:
    """In place of the simulator's: the star's spectrum from the templates, with noise of another kind."""
    metallicity = np.clip(rng.normal(0, METALLICITY_SCATTER), METALLICITIES[0], METALLICITIES[-1])
    reddening = rng.normal(0, REDDENING_SCATTER)
    redshift = rng.normal(0, VELOCITY_SCATTER) / simulator.SPEED_OF_LIGHT
    loglam = simulator.draw_loglam(target.is_boss, rng)
    loglam = loglam[(loglam > templates.loglam[0] + 0.001) & (loglam < templates.loglam[-1] - 0.001)]
    flux = np.interp(loglam - np.log10(1 + redshift), templates.loglam, templates.flux((target.subtype, metallicity)))
    x = np.linspace(-1, 1, len(loglam))
    extinction = np.interp(10**loglam, simulator.BAND_WAVELENGTHS, simulator.BAND_EXTINCTION)
    nodes = np.linspace(-1, 1, CALIBRATION_NODES)
    calibration = CubicSpline(nodes, rng.normal(0, CALIBRATION_ERROR, CALIBRATION_NODES))(x)
    flux *= 10 ** (-0.4 * reddening * (extinction - extinction.mean())) * np.exp(calibration)

    # Noisier to both ends, more so to the blue, and where the sky shines.
    sigma = np.exp(rng.normal(0.8, 0.2) * x**2 - rng.normal(0.3, 0.2) * x)
    centres, heights = rng.uniform(0.2, 1, SKY_BUMPS), rng.exponential(SKY_BUMP_HEIGHT / 2, SKY_BUMPS)
    sigma *= 1 + heights @ np.exp(-0.5 * ((x - centres[:, None]) * len(x) / 2 / 1.5) ** 2)
    sigma *= np.median(flux / sigma) / target.snr
    white = rng.standard_t(NOISE_FREEDOM, len(loglam)) / np.sqrt(NOISE_FREEDOM / (NOISE_FREEDOM - 2))
    observed, ivar = flux + sigma * np.convolve(white, NOISE_KERNEL, mode="same"), sigma**-2
    bad = rng.integers(len(loglam), size=rng.poisson(BAD_PIXELS))
    observed[bad] += sigma[bad] * rng.exponential(30, len(bad))
    ivar[bad[: len(bad) * 9 // 10]] = 0  # the others were not found
    zeros = np.zeros(len(loglam), dtype=int)
    columns = {
        "flux": observed, "loglam": loglam, "ivar": ivar, "and_mask": zeros, "or_mask": zeros,
        "wdisp": np.ones(len(loglam)), "sky": sigma, "model": flux,
    }  # fmt: skip
    magnitudes = simulator.draw_magnitudes(target.subtype, metallicity, max(reddening, 0), rng.normal(18.5, 1.0), rng)
    return simulator.Observation(columns, redshift, magnitudes)


def main() -> None:
    parser = data.ScriptParser(__doc__)
    parser.add_argument("templates", type=Path, metavar="TEMPLATES.npz", help="the mean spectra")
    args, of_simulator = parser.parse_known_args()
    observe = partial(observe_spectrum, templates=read_templates(args.templates))
    with patch.multiple(simulator, observe_spectrum=observe, SUBTYPE_RANGE=SUBTYPE_RANGE):
        simulator.main(of_simulator)


if __name__ == "__main__":
    data.run_as_script(main)
