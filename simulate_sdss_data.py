"""Simulate M0–M4 stars in the files SDSS serves: a stand-in for the download where there is no network.

    python simulate_sdss_data.py DIR --per-class 80 --seed 1       400 stars: spectra, cutouts, objects.csv
    python simulate_sdss_data.py DIR --per-class 80 --min-snr 10   brighter stars only
    python train.py --data-dir DIR

Each star has a continuous subclass, a metallicity, a velocity, a reddening and a brightness. Its spectrum
(mdwarf.py) and its image follow from them, through the instrument (instrument.py). The same seed gives the
same bytes, and each file says that it is no observation.

Stars are as bright as those of this repository's objects.csv, class by class: nearly half of the spectra have
S/N below 5, and brightness alone tells much of the class, as it does there. With --min-snr or --max-snr, the
median S/N a pixel is log-uniform between them in every class.
"""

import argparse
import contextlib
import csv
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
from astropy.io import fits
from scipy.ndimage import gaussian_filter1d

import cli
import mdwarf
from catalog import CLASS_NAMES, FIRST_BOSS_PLATE, FIRST_PLATE_BEYOND_26, Star, decode_spec_obj_id, encode_spec_obj_id
from instrument import Spectrograph, draw_cutout, draw_loglam, observe_magnitudes
from star_files import catalog_path, cutout_path, spectrum_path
from survey_files import PIXELS_PER_DEX, SIMULATED_MARK
from workers import parallel_map

NOTICE = f"{SIMULATED_MARK.decode()} by simulate_sdss_data.py: not an observation, this star does not exist"
SUBTYPE_RANGE = 0.45  # of a class about its centre: stars half-way between classes, of ambiguous label, are left out
FIRST_PLATE, LAST_PLATE = 266, 10_000  # of SDSS, and of DR16 nearly
# Percentiles of r_mag in objects.csv for each of M0…M4, without one M3 of r = 24.8, beyond the image's depth.
R_PERCENTILES = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)
R_MAGNITUDES = (
    (16.61, 16.67, 16.86, 17.08, 17.27, 17.49, 17.64, 18.19, 18.42, 18.83, 19.47, 20.08, 21.11),
    (16.67, 16.81, 16.95, 17.21, 17.49, 17.62, 17.78, 17.97, 18.37, 19.01, 20.83, 21.19, 21.36),
    (16.18, 17.09, 17.56, 18.07, 18.41, 19.47, 20.10, 20.32, 20.60, 20.97, 21.21, 21.40, 21.79),
    (16.71, 17.17, 17.29, 18.16, 19.07, 20.06, 20.38, 20.69, 20.91, 21.15, 21.53, 21.77, 22.79),
    (17.04, 18.22, 19.03, 20.07, 20.29, 20.45, 20.65, 20.97, 21.21, 21.62, 21.85, 21.98, 22.23),
)
DEFAULT_SNR_RANGE = (5.0, 60.0)  # where only one of --min-snr and --max-snr is given
FIBER_ERROR = 0.05  # mag: fiber losses are corrected to a few per cent
JPEG_QUALITY = 90


class Target(NamedTuple):
    """A star of the simulated catalogue, before it is observed."""

    star: Star
    subtype: float  # continuous: 1.6 is nearer to M2 than to M1
    r: float  # magnitude; not used where `snr` is given
    snr: float | None  # median signal to noise of its spectrum

    @property
    def is_boss(self) -> bool:
        return self.star.plate >= FIRST_BOSS_PLATE


class Observation(NamedTuple):
    """A star's spectrum, and what its image and catalogue row need."""

    columns: dict[str, np.ndarray]  # of HDU 1
    redshift: float
    magnitudes: np.ndarray  # true u g r i z


def observe_spectrum(target: Target, rng: np.random.Generator) -> Observation:
    """Draw the star's physics and observe it with the spectrograph."""
    metallicity = rng.normal(0, mdwarf.METALLICITY_SCATTER)
    reddening = rng.exponential(mdwarf.MEAN_REDDENING)
    redshift = rng.normal(0, mdwarf.VELOCITY_SCATTER) / mdwarf.SPEED_OF_LIGHT
    rest = mdwarf.draw_rest_spectrum(target.subtype, metallicity, rng)
    spectrograph = Spectrograph(draw_loglam(target.is_boss, rng), target.is_boss, rng)
    loglam = spectrograph.loglam
    broadening = np.sqrt(spectrograph.dispersion**2 - mdwarf.LINE_SPREAD**2) / (PIXELS_PER_DEX * mdwarf.REST_STEP)
    rest = gaussian_filter1d(rest, broadening, mode="nearest")
    shape = np.interp(loglam - np.log10(1 + redshift), mdwarf.REST_LOGLAM, rest)
    shape *= 10 ** (-0.4 * reddening * mdwarf.extinction_curve(loglam))
    flux, r = scale_flux(shape, target, spectrograph, rng)
    magnitudes = mdwarf.draw_magnitudes(target.subtype, metallicity, reddening, r, rng)
    return Observation(spectrograph.expose(flux, rng), redshift, magnitudes)


def scale_flux(
    shape: np.ndarray, target: Target, spectrograph: Spectrograph, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Flux of this shape (1e-17 erg/s/cm²/Å) with the target's r magnitude or S/N, and its r magnitude."""
    fiber_error = rng.normal(0, FIBER_ERROR)
    if target.snr is None:
        dimming = target.r + fiber_error - mdwarf.r_magnitude(spectrograph.loglam, shape)
        return shape * 10 ** (-0.4 * dimming), target.r
    flux = spectrograph.scale_to_snr(shape, target.snr)
    return flux, mdwarf.r_magnitude(spectrograph.loglam, flux) - fiber_error


# The catalogue


def draw_targets(
    rng: np.random.Generator,
    per_class: int,
    boss_fraction: float,
    snr_range: tuple[float, float] | None,
    subtype_range: float,
) -> list[Target]:
    """The catalogue, in random order: identifiers, positions, subclasses, brightness."""
    count = per_class * len(CLASS_NAMES)
    is_boss = rng.permutation(count) < round(boss_fraction * count)
    # A number for each place on each plate, taken once: SDSS-I plates have 640 fibers, BOSS plates 1000.
    sdss = rng.choice((FIRST_PLATE_BEYOND_26 - FIRST_PLATE) * 640, count, replace=False)
    boss = rng.choice((LAST_PLATE + 1 - FIRST_BOSS_PLATE) * 1000, count, replace=False)
    plates = np.where(is_boss, FIRST_BOSS_PLATE + boss // 1000, FIRST_PLATE + sdss // 640)
    fibers = np.where(is_boss, 1 + boss % 1000, 1 + sdss % 640)
    mjds = np.interp(plates, (FIRST_PLATE, 1959, FIRST_BOSS_PLATE, LAST_PLATE), (51_630, 53_440, 55_144, 57_346))
    classes = rng.permutation(np.repeat(np.arange(len(CLASS_NAMES)), per_class))
    subtypes = classes + rng.uniform(-subtype_range, subtype_range, count)
    brightness = rng.random(count)
    # The northern galactic cap, in degrees, rounded as SDSS does.
    ra, dec = rng.uniform(120, 250, count), np.degrees(np.arcsin(rng.uniform(0, np.sin(np.radians(60)), count)))
    positions = np.transpose([ra, dec]).round(7).tolist()
    targets = []
    for k in range(count):
        plate, mjd, fiber = int(plates[k]), int(mjds[k]), int(fibers[k])
        name = str(encode_spec_obj_id(plate, mjd, fiber, run2d=1300 if is_boss[k] else 26))
        star = Star(name, CLASS_NAMES[classes[k]], plate, mjd, fiber, *positions[k], simulated=True)
        r = float(np.interp(100 * brightness[k], R_PERCENTILES, R_MAGNITUDES[classes[k]]))
        snr = snr_range and float(np.exp(np.interp(brightness[k], (0, 1), np.log(snr_range))))
        targets.append(Target(star, float(subtypes[k]), r, snr))
    return targets


# Files


def write_star(
    directory: Path,
    target: Target,
    seed: np.random.SeedSequence,
    observe: Callable[[Target, np.random.Generator], Observation],
    notice: str,
) -> dict[str, object]:
    """Write a star's spectrum and cutout; return its row of the catalogue."""
    star, rng = target.star, np.random.default_rng(seed)
    observation = observe(target, rng)
    cutout = draw_cutout(observation.magnitudes[1:4], rng)
    magnitudes = observe_magnitudes(observation.magnitudes, rng)
    for path in (spectrum_path(directory, star), cutout_path(directory, star)):
        path.parent.mkdir(parents=True, exist_ok=True)
    spectrum_hdus(target, observation, notice).writeto(spectrum_path(directory, star))
    cutout.save(cutout_path(directory, star), "JPEG", quality=JPEG_QUALITY, comment=notice)
    row = {column: getattr(star, column) for column in ("name", "subclass", "plate", "mjd", "fiberID", "ra", "dec")}
    return row | {f"{band}_mag": f"{m:.5f}" for band, m in zip("ugriz", magnitudes, strict=True)} | {"simulated": 1}


def spectrum_hdus(target: Target, observation: Observation, notice: str) -> fits.HDUList:
    """HDUs 0–2 of a lite file: header, spectrum, and the catalogue's row."""
    star, flux, ivar = target.star, observation.columns["flux"], observation.columns["ivar"]
    run2d = decode_spec_obj_id(star.name)[3]
    header = fits.Header({"PLATEID": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID, "RUN2D": run2d})
    header.update({"PLUG_RA": star.ra, "PLUG_DEC": star.dec, "BUNIT": "1E-17 erg/cm^2/s/Ang"})
    header["SIMULATD"] = (True, "not an observation")
    header["COMMENT"] = notice
    row = {"CLASS": "STAR", "SUBCLASS": star.subclass, "Z": observation.redshift}
    row |= {"SN_MEDIAN_ALL": np.median((flux * np.sqrt(ivar))[ivar > 0])}
    row |= {"PLATE": star.plate, "MJD": star.mjd, "FIBERID": star.fiberID, "RUN2D": run2d}
    catalogue_row = fits_table("SPALL" if target.is_boss else "SPECOBJ", row)
    return fits.HDUList([fits.PrimaryHDU(header=header), fits_table("COADD", observation.columns), catalogue_row])


def fits_table(name: str, columns: dict[str, Any]) -> fits.BinTableHDU:
    """A table of these columns, of 32-bit numbers as in SDSS."""
    arrays = [np.atleast_1d(column) for column in columns.values()]
    arrays = [array.astype({"f": np.float32, "i": np.int32}.get(array.dtype.kind, array.dtype)) for array in arrays]
    return fits.BinTableHDU(np.rec.fromarrays(arrays, names=list(columns)), name=name)


@contextlib.contextmanager
def whole_or_nothing(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory; when the block succeeds it becomes `directory`, otherwise it is deleted.

    Raises DataError if there is something in `directory`, it is the current one, or another process is writing it.
    """
    directory = directory.resolve()
    if directory == Path.cwd():
        raise cli.DataError(f"{directory}: the current directory cannot be replaced; name a new one in it")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise cli.DataError(f"{directory}: exists and is not an empty directory; name a new one")
    folder = directory.with_name(f".{directory.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with cli.file_lock(folder / "lock", timeout=0):
            temporary = folder / "stars"
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed run
            try:
                temporary.mkdir()
                yield temporary
                if directory.exists():
                    directory.rmdir()
                temporary.rename(directory)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except filelock.Timeout:
        raise cli.DataError(f"{directory}: another simulation is writing it; wait for its end") from None


def simulate(
    directory: Path,
    *,
    per_class: int,
    seed: int,
    boss_fraction: float = 0.2,
    min_snr: float | None = None,
    max_snr: float | None = None,
    num_workers: int = 1,
    observe: Callable[[Target, np.random.Generator], Observation] = observe_spectrum,
    subtype_range: float = SUBTYPE_RANGE,
    notice: str = NOTICE,
) -> list[Star]:
    """Write `per_class` stars of each of M0…M4 to `directory`, which must not exist or be empty: all or nothing.

    Their brightness is that of the catalogue's stars, or, with `min_snr` or `max_snr`, such that the median S/N a
    pixel is log-uniform between them. `boss_fraction` of them are BOSS spectra. The files depend on the seed, not on
    the number of processes. `observe` makes a star's spectrum. Raises DataError if the directory or S/N cannot be used.
    """
    snr_range = None
    if min_snr is not None or max_snr is not None:
        snr_range = (min_snr or DEFAULT_SNR_RANGE[0], max_snr or DEFAULT_SNR_RANGE[1])
        if snr_range[0] > snr_range[1]:
            raise cli.DataError(f"the lowest S/N, {snr_range[0]:g}, is above the highest, {snr_range[1]:g}")
    catalog_seed, *seeds = np.random.SeedSequence(seed).spawn(1 + per_class * len(CLASS_NAMES))
    targets = draw_targets(np.random.default_rng(catalog_seed), per_class, boss_fraction, snr_range, subtype_range)
    with whole_or_nothing(Path(directory)) as temporary:
        write = functools.partial(write_star, temporary, observe=observe, notice=notice)
        with parallel_map(num_workers) as map_stars:
            rows = map_stars(write, targets, seeds)
            rows = list(cli.progress(rows, total=len(targets), desc="simulating", unit="star"))
        with open(catalog_path(temporary), "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return [target.star for target in targets]


def make_parser(docstring: str) -> cli.ScriptParser:
    """The options of a script that simulates stars."""
    parser = cli.ScriptParser(docstring)
    add, number = parser.add_argument, cli.number_between
    add("directory", type=Path, metavar="DIR", help="new or empty directory for objects.csv, spectra/ and images/")
    add("--per-class", type=number(int, 1, 20_000), default=80, metavar="N", help="stars of each of M0…M4")
    add("--seed", type=number(int, 0, 2**32 - 1), default=1, metavar="N", help="the same seed gives the same files")
    add("--boss-fraction", type=number(float, 0, 1), default=0.2, metavar="X", help="fraction of BOSS spectra")
    for option, limit, default in zip(("min", "max"), ("lowest", "highest"), DEFAULT_SNR_RANGE, strict=True):
        add(f"--{option}-snr", type=number(float, 1, 1000), default=argparse.SUPPRESS, metavar="X",
            help=f"{limit} median S/N a pixel, instead of the catalogue's brightness "
            f"(default: {default:g} if the other is given)")  # fmt: skip
    add("--num-workers", type=number(int, 1, 64), default=min(os.cpu_count() or 1, 16), metavar="N",
        help="worker processes")  # fmt: skip
    parser.add_quiet()
    return parser


def run(parser: argparse.ArgumentParser, make_stars: Callable[..., list[Star]], argv: list[str] | None = None) -> None:
    """Make the stars that the command line asks for, and print the next step."""
    options = vars(parser.parse_args(argv))
    with cli.quietly(options.pop("quiet")):
        stars = make_stars(**options)
        directory = options["directory"]
        print(f"{len(stars)} SIMULATED stars, {options['per_class']} of each of {', '.join(CLASS_NAMES)}: spectra,")
        print(f"images and {catalog_path(directory)}. They are no observations. Next:")
        print(f"  python train.py --data-dir {directory}")


def main(argv: list[str] | None = None) -> None:
    run(make_parser(__doc__), simulate, argv)


if __name__ == "__main__":
    cli.run_as_script(main)
