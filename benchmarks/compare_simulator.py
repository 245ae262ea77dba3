"""Compare the simulator's mean spectra of M0 to M4 with published ones: differences, indices, zero point of the types.

    python benchmarks/compare_simulator.py TEMPLATES                        a folder with both files of mean spectra
    python benchmarks/compare_simulator.py TEMPLATES --spectra-dir LAMOST   and the means of real stars by their class

Differences are the rms over the pixels of 4000–9000 Å: of flux over its median ("flux"), of flux over a polynomial
continuum of degree 3 ("bands"), and of that smoothed to a resolution of 35 Å ("smooth bands"), without the noise of
the templates. The fit to templates gives the subtype, on straight lines between M0 and M5, of the nearest smooth bands.
"""

import sys
from collections import defaultdict
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.polynomial import Polynomial
from scipy.ndimage import gaussian_filter1d

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

from classical import TEMPLATES, TIO5_RELATION, median_snr
from template_stars import Templates, read_templates

import cli
import mdwarf
from catalog import CLASS_NAMES, Star, without_note
from indices import BANDS, measure_indices
from preparation import WAVELENGTH, prepare_spectrum
from simulate_sdss_data import SUBTYPE_RANGE
from survey_files import read_spectrum

LOGLAM = np.log10(WAVELENGTH)
STARS = 300  # of a class, in the simulator's mean
SMOOTHING = 10  # pixels, sigma
MIN_SNR = 20  # median of the good pixels, of real stars


def simulated_mean(subclass: int) -> np.ndarray:
    """(3522,): mean of simulated stars at rest, without noise."""
    rng = np.random.default_rng(subclass)
    spectra = []
    for subtype in np.linspace(subclass - SUBTYPE_RANGE, subclass + SUBTYPE_RANGE, STARS):
        rest = mdwarf.draw_rest_spectrum(subtype, rng.normal(0, mdwarf.METALLICITY_SCATTER), rng)
        reddening = rng.exponential(mdwarf.MEAN_REDDENING)
        flux = np.interp(LOGLAM, mdwarf.REST_LOGLAM, rest) * 10 ** (-0.4 * reddening * mdwarf.extinction_curve(LOGLAM))
        spectra.append(flux / np.median(flux))
    return np.mean(spectra, axis=0)


def template(templates: Templates, subtype: float) -> np.ndarray:
    """(3522,): the published spectrum at [Fe/H] = 0."""
    return np.interp(LOGLAM, templates.loglam, templates.flux(subtype, 0.0))


def real_means(directory: Path) -> dict[int, np.ndarray]:
    """(3522,) by class: the median of the dwarfs' spectra in a folder, at rest; the class is that of their files."""
    spectra = defaultdict(list)
    for path in sorted(directory.glob("*.fits")):
        spectrum = read_spectrum(path, Star(path.stem, "", 0, 0, 0, file=path.name))
        prepared = prepare_spectrum(spectrum)
        subclass = without_note(spectrum.subclass)
        if subclass in CLASS_NAMES and median_snr(prepared[None])[0] > MIN_SNR:
            spectra[CLASS_NAMES.index(subclass)].append(
                np.interp(LOGLAM, LOGLAM - np.log10(1 + spectrum.redshift), prepared[0])
            )
    return {subclass: np.median(fluxes, axis=0) for subclass, fluxes in sorted(spectra.items())}


def class_means(templates: dict[str, Templates]) -> dict[str, dict[int, np.ndarray]]:
    """(3522,) by source and class: the simulator's, and the published ones."""
    makers = {"simulated": simulated_mean} | {name: partial(template, t) for name, t in templates.items()}
    return {name: {k: make(k) for k in range(len(CLASS_NAMES))} for name, make in makers.items()}


def over_median(flux: np.ndarray) -> np.ndarray:
    return flux / np.median(flux)


def bands(flux: np.ndarray) -> np.ndarray:
    """Flux over its polynomial continuum of degree 3."""
    x = np.linspace(-1, 1, len(flux))
    return flux / Polynomial.fit(x, flux, 3)(x)


def smooth_bands(flux: np.ndarray) -> np.ndarray:
    return gaussian_filter1d(bands(flux), SMOOTHING)


VIEWS = {"flux": over_median, "bands": bands, "smooth bands": smooth_bands}


def indices(flux: np.ndarray) -> list[float]:
    """TiO5, CaH2, CaH3."""
    values = measure_indices(np.stack([flux, np.ones(len(flux))]))
    return [values[name] for name in BANDS]


def type_by_tio5(flux: np.ndarray) -> float:
    """Subclass number by the relation of TiO5."""
    slope, constant = TIO5_RELATION
    return slope * indices(flux)[0] + constant


def type_by_fit(flux: np.ndarray, templates: Templates) -> float:
    """Subclass number of the template nearest in smooth bands."""
    subtypes, wanted = np.arange(0, 5.01, 0.05), smooth_bands(flux)
    return float(min(subtypes, key=lambda subtype: np.std(smooth_bands(template(templates, subtype)) - wanted)))


def print_row(*cells: str | float, decimals: int = 2) -> None:
    print("|", " | ".join(f"{cell:.{decimals}f}" if isinstance(cell, float) else cell for cell in cells), "|")


def print_comparison(templates_dir: Path, spectra_dir: Path | None) -> None:
    """Print the differences and the indices as two tables in Markdown."""
    templates = {name.title(): read_templates(templates_dir / file) for name, file in TEMPLATES.items()}
    means = class_means(templates)
    print_row("rms of", "between", *CLASS_NAMES)
    print("|---" * 7 + "|")
    for name, view in VIEWS.items():
        for one, other in combinations(means, 2):
            values = (float(np.std(view(means[one][k]) - view(means[other][k]))) for k in means[one])
            print_row(name, f"{one} and {other}", *values, decimals=3)
    print()
    means |= {"real": real_means(spectra_dir)} if spectra_dir else {}
    print_row("mean of", "class", "TiO5", "CaH2", "CaH3", "type by TiO5", *(f"by fit to {name}" for name in templates))
    print("|---" * 8 + "|")
    for name, spectra in means.items():
        for k, flux in spectra.items():
            fits = (type_by_fit(flux, published) for published in templates.values())
            print_row(name, CLASS_NAMES[k], *indices(flux), type_by_tio5(flux), *fits)


def main() -> None:
    parser = cli.ScriptParser(__doc__)
    parser.add_argument(
        "templates_dir", type=Path, metavar="TEMPLATES", help=f"directory with {' and '.join(TEMPLATES.values())}"
    )
    parser.add_argument("--spectra-dir", type=Path, metavar="LAMOST", help="directory of real SDSS or LAMOST spectra")
    print_comparison(**vars(parser.parse_args()))


if __name__ == "__main__":
    cli.run_as_script(main)
