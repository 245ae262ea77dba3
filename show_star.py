"""Draw stars: spectrum, image and, with a checkpoint, the network's input, its prediction and an occlusion map.

    python show_star.py --data-dir DIR                               a few stars of each class, to check the data
    python show_star.py NAME NAME --data-dir DIR                     a page each, plots/star_PLATE-MJD-FIBERID.png
    python show_star.py NAME --data-dir DIR --checkpoint CHECKPOINT  with its probabilities, and the bands that decided
    python show_star.py spec-*.fits --checkpoint CHECKPOINT          the same of spectra, without a catalogue

NAME is the star's name in objects.csv, or plate-mjd-fiberID. The occlusion map replaces one piece of the spectrum after
the other by the training stars' mean spectrum. The drop in the log odds of the predicted subclass is the contribution
of that piece; a rise means that the piece speaks against the subclass. In M stars, expect the TiO bands.
"""

import argparse
from pathlib import Path

from cli import ScriptParser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="stars or files to draw; none: a sheet with stars of each class")
    add("--data-dir", type=Path, default=Path("."), metavar="DIR",
        help="directory with objects.csv, spectra/ and images/")  # fmt: skip
    add("--checkpoint", type=Path, metavar="CHECKPOINT", help="a file that train.py wrote into checkpoints/")
    add("--output-dir", type=Path, default=Path("plots"), metavar="DIR",
        help="directory for the PNG files; earlier ones of this script are replaced, no other file is")  # fmt: skip
    parser.add_quiet()
    args = parser.parse_args(argv)
    if args.checkpoint and not args.names:
        parser.error("--checkpoint: name the stars that it is to classify; the sheet shows data alone")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()  # before torch is imported: --help and mistakes are answered at once

import contextlib
import copy
import itertools
import re
import textwrap
import unicodedata
from typing import Any, NamedTuple

import numpy as np
import torch
from astropy.io import fits

from cache import INPUTS, StarFiles
from catalog import CLASS_NAMES, SPECTRUM_ENDING, Star, describe, read_catalog
from checkpoint import load_checkpoint
from classifier import Classifier
from cli import DataError, quietly, refuse_foreign_file, run_as_script
from indices import BANDS
from mdwarf import air_to_vacuum
from outliers import References
from plots import Axes, new_figure
from prediction import StarInputs, classify, inputs_without_images, make_batch, read_star, star_of_file
from preparation import SPECTRUM_LENGTH, WAVELENGTH, Batch
from star_files import FileIndex, catalog_path
from survey_files import CUTOUT_SCALE, IMAGE_SIZE, Cutout, Spectrum, read_cutout, read_spectrum

# Band heads of TiO: Kirkpatrick et al. 1991 (ApJS 77, 417), Valenti et al. 1998 (ApJ 498, 851). CaH: the indices CaH1
# to CaH3 of Reid, Hawley & Gizis 1995 (AJ 110, 1838). Lines: NIST Atomic Spectra Database.
TIO_LENGTH = 80  # Å shown of a band of TiO, which fades to the red of its head
FEATURES = (  # Å, air
    *(("TiO", head, head + TIO_LENGTH) for head in (4954, 5167, 5448, 5847, 6158, 6651, 7053)),
    *(("CaH", *window) for window in ((6380, 6390), BANDS["CaH2"], BANDS["CaH3"])),
    *(("Na", first, last) for first, last in ((5889.95, 5895.92), (8183.26, 8194.82))),
    ("Hα", 6562.8, 6562.8),
)
COLOURS = {"TiO": "tab:red", "CaH": "tab:blue", "Na": "tab:orange", "Hα": "tab:purple"}
SHEET_STARS = 3  # of each class
WINDOW, STEP = 110, 55  # pixels of an occluded piece, 1/32 of the spectrum as a token is; and from one to the next
SOFTWARE = Path(__file__).name  # identifies this script's PNG files


class Page(NamedTuple):
    """Everything that a star's page shows."""

    inputs: StarInputs
    spectrum: Spectrum | None  # as in the file
    cutout: Cutout | None
    classifier: Classifier | None
    row: dict[str, Any]  # of the table of predictions; {} without classifier


def main(args: argparse.Namespace) -> None:
    with quietly(args.quiet):
        if not args.names:
            refuse_foreign_file(path := args.output_dir / "stars.png", SOFTWARE)
            draw_sheet(path, *choose_sheet_stars(args.data_dir))
            print(path)
            return
        files, listed = choose_stars(args.names, args.data_dir)
        chosen = files | listed
        pages = [args.output_dir / f"star_{star.name if star.file else star.spectrum_id}.png" for star in chosen]
        if len({*pages}) < len(pages):
            raise DataError("two of these stars have one name: draw them into two directories (--output-dir)")
        for page in pages:
            refuse_foreign_file(page, SOFTWARE)
        classifier, checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else (None, {})
        kinds = INPUTS[classifier.recipe.modality if classifier else "fusion"]
        file_kinds = inputs_without_images(classifier) if classifier and files else ("spectra",)
        for page, (star, paths) in zip(pages, chosen.items(), strict=True):
            inputs = read_star(file_kinds if star in files else kinds, star, paths)
            draw_page(page, make_page(inputs, paths, classifier, checkpoint.get("references", {})))
            print(page)


def choose_stars(names: list[str], data_dir: Path) -> tuple[dict[Star, StarFiles], dict[Star, StarFiles]]:
    """The stars given as files, and those given by their names in the catalogue, with the paths of their files."""
    spectra = {name: Path(name) for name in names if SPECTRUM_ENDING.search(name)}
    files, listed = dict(map(star_of_file, spectra.values())), {}
    if others := [name for name in names if name not in spectra]:
        catalog, index = catalog_path(data_dir), FileIndex(data_dir)
        stars, _ = read_catalog(catalog, labelled=False)
        listed = {star: index.files(star) for star in find_stars(others, stars, catalog)}
    return files, listed


def find_stars(names: list[str], stars: list[Star], catalog: Path) -> list[Star]:
    """The rows of these names or plate-mjd-fiberIDs, each once; one name can have two rows."""
    wanted: set[str] = set()
    for name in names:
        labels = {unicodedata.normalize("NFC", name)}
        if match := re.fullmatch(r"(\d+)-(\d+)-(\d+)", name, re.ASCII):  # with leading zeros or without
            labels.add(Star(name, "", *map(int, match.groups())).spectrum_id)
        if not any(labels & {star.name, star.spectrum_id} for star in stars):
            raise DataError(f"{catalog}: no star {name}; the first of its {len(stars)} is {stars[0].name}")
        wanted |= labels
    return [star for star in stars if wanted & {star.name, star.spectrum_id}]


def make_page(inputs: StarInputs, paths: StarFiles, classifier: Classifier | None, references: References) -> Page:
    """Raises DataError where there is nothing to draw."""
    spectrum = cutout = None
    with contextlib.suppress(DataError):  # damaged: the page shows the rest
        spectrum = paths["spectra"] and read_spectrum(paths["spectra"], inputs.star)
    with contextlib.suppress(DataError):
        cutout = paths["images"] and read_cutout(paths["images"])
    if spectrum is None and cutout is None:
        raise DataError(f"{inputs.star.name}: {inputs.problem}")
    row = classify(classifier, references, [inputs])[0] if classifier else {}
    return Page(inputs, spectrum, cutout, classifier, row)


def mark_features(axes: Axes, labels: bool = False) -> None:
    """Shade the features behind the curve, and name them above it."""
    for species, first, last in FEATURES:
        ends = air_to_vacuum(np.array([first, last]))
        axes.axvspan(ends[0] - 5, ends[1] + 5, color=COLOURS[species], alpha=0.25, linewidth=0, zorder=0)
        if labels:
            height = 1.01 if species == "TiO" else 1.09  # the Na line lies in a band of TiO
            axes.text(ends.mean(), height, species, color=COLOURS[species], fontsize=8, ha="center",
                      transform=axes.get_xaxis_transform())  # fmt: skip


def draw_spectrum(axes: Axes, page: Page) -> None:
    """The spectrum as it is in the file, its noise, and its bad pixels."""
    wavelength, flux, ivar = 10**page.spectrum.loglam, page.spectrum.flux, page.spectrum.ivar
    good = np.isfinite(flux) & (ivar > 0)
    axes.plot(wavelength, np.where(good, flux, np.nan), color="black", linewidth=0.5, label="flux")
    noise = np.where(good, 1 / np.sqrt(np.where(good, ivar, 1)), np.nan)
    axes.plot(wavelength, noise, color="gray", linewidth=0.5, label="its standard deviation")
    axes.plot(wavelength[~good], np.full((~good).sum(), 0.03), "|", color="magenta", markersize=10,
              label=f"bad pixels ({(~good).sum()})", transform=axes.get_xaxis_transform())  # fmt: skip
    axes.axvspan(WAVELENGTH[-1], 20_000, color="lightgray", zorder=0)
    axes.axvspan(0, WAVELENGTH[0], color="lightgray", zorder=0, label="not used")
    title = "no good pixel"
    if good.any():
        set_limits(axes, flux[good])
        title = f"median S/N {np.median(flux[good] * np.sqrt(ivar[good])):.1f} a pixel"
    has_unit = "BUNIT" in fits.getheader(page.spectrum.path)  # LAMOST's fluxes are relative
    axes.set_ylabel("flux (10⁻¹⁷ erg s⁻¹ cm⁻² Å⁻¹)" if has_unit else "flux (relative)")
    axes.legend(loc="upper left", fontsize=8, ncols=4, title=title, title_fontsize=8)


def set_limits(axes: Axes, curve: np.ndarray) -> None:
    """Scale the axes to the curve without its few highest and lowest pixels: a cosmic ray sets no scale."""
    low, high = np.percentile(curve, [0.5, 99.5])
    axes.set_ylim(min(0, low) - 0.1 * (high - low), high + 0.25 * (high - low))


@torch.inference_mode()
def draw_input(axes: Axes, page: Page) -> None:
    """The spectrum as the network gets it; without a checkpoint, before standardisation."""
    curve, label = page.inputs.arrays["spectra"][0], "flux / median"
    if page.classifier:
        curve = page.classifier.standardise(make_batch(page.classifier, [page.inputs]).spectra, None)[0][0].numpy()
        label = "the network's input: flux / median,\nless the training stars' mean, scaled"
    axes.plot(WAVELENGTH, curve, color="black", linewidth=0.5)
    axes.axhline(0, color="gray", linewidth=0.5)
    set_limits(axes, curve)
    axes.set_ylabel(label)


def draw_cutout(axes: Axes, pixels: np.ndarray, simulated: bool) -> None:
    """The image (128, 128, 3) with a bar of 5″ and, on the sky, north (up) and east (left).

    Source: https://skyserver.sdss.org/dr16/en/tools/chart/chartinfo.aspx; the scale is not in the file.
    """
    bar = 5 / CUTOUT_SCALE / IMAGE_SIZE  # of the width
    axes.imshow(pixels)
    axes.plot([0.06, 0.06 + bar], [0.06, 0.06], color="white", linewidth=2, transform=axes.transAxes)
    axes.text(0.06 + bar / 2, 0.08, "5″", color="white", ha="center", transform=axes.transAxes)
    if not simulated:
        for text, end in (("N", (0.92, 0.26)), ("E", (0.74, 0.08))):
            arrow = {"arrowstyle": "->", "color": "white"}
            axes.annotate("", end, (0.92, 0.08), "axes fraction", arrowprops=arrow)
            axes.text(*end, text, color="white", ha="right", va="bottom", transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def draw_probabilities(axes: Axes, row: dict[str, Any]) -> None:
    colours = ["tab:green" if name == row["catalog_subclass"] else "gray" for name in CLASS_NAMES]
    bars = axes.bar(CLASS_NAMES, [row[f"p_{name}"] for name in CLASS_NAMES], color=colours)
    axes.bar_label(bars, fmt="%.2f", fontsize=8)
    title = f"spectral type {row['spectral_type']}\n"
    title += f"outlier score {row['outlier_score']:.2f}" + "\nUNLIKE THE TRAINING STARS" * row["is_outlier"]
    axes.set(ylim=(0, 1.1), ylabel="probability" + " (green: its label)" * (row["catalog_subclass"] in CLASS_NAMES))
    axes.set_title(title, fontsize=9, color="tab:red" if row["is_outlier"] else "black")


@torch.inference_mode()
def occlusion_map(classifier: Classifier, star: Batch) -> tuple[np.ndarray, np.ndarray]:
    """For a batch of one star: the centre of each piece (Å), and the drop in the log odds of its class without it."""
    flux = star.spectra[0, 0]
    # The continuum that the recipe filters out is kept.
    ordinary = classifier.standardise.mean + flux - classifier.standardise.filter(star.spectra)[0][0]
    pieces = [slice(start, start + WINDOW) for start in range(0, SPECTRUM_LENGTH - WINDOW + 1, STEP)]
    spectra = star.spectra.repeat(1 + len(pieces), 1, 1)  # the first one stays whole
    for occluded, piece in zip(spectra[1:, 0], pieces, strict=True):
        occluded[piece] = ordinary[piece]
    others = (None if part is None else part.expand(len(spectra), *part.shape[1:]) for part in star[1:])
    exact = copy.copy(classifier)
    exact.precision = "fp32"  # bfloat16's steps are as large as what many pieces contribute
    logits = exact(Batch(spectra, *others))[2].double()
    predicted = logits[0].argmax()
    not_predicted = torch.arange(len(CLASS_NAMES)) != predicted
    log_odds = logits[:, predicted] - logits[:, not_predicted].logsumexp(dim=1)
    centres = np.array([WAVELENGTH[piece].mean() for piece in pieces])
    return centres, (log_odds[0] - log_odds[1:]).numpy()


def draw_occlusion(axes: Axes, page: Page) -> None:
    centres, losses = occlusion_map(page.classifier, make_batch(page.classifier, [page.inputs]))
    axes.bar(centres, losses, width=np.gradient(centres), color="tab:green", linewidth=0)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_ylabel(f"log odds of {page.row['predicted_subclass']}\nlost without this piece")


def draw_page(path: Path, page: Page) -> None:
    """A star's page: its spectrum and image, the network's input and prediction, as far as there are any."""
    classified, has_input = "predicted_subclass" in page.row, "spectra" in page.inputs.arrays
    spectra = [draw_spectrum] * bool(page.spectrum) + [draw_input] * has_input
    spectra += [draw_occlusion] * (has_input and classified)
    with new_figure(path, (15, 0.3 + 3.4 * max(2, len(spectra))), dpi=110, software=SOFTWARE) as figure:
        panels = bool(page.cutout) + classified
        left, right = figure.subfigures(1, 2, width_ratios=(3.2, 1)) if panels else (figure, None)
        for number, draw in enumerate(spectra):
            axes = left.add_subplot(len(spectra), 1, number + 1, sharex=left.axes[0] if number else None)
            draw(axes, page)
            mark_features(axes, labels=number == 0)
            axes.tick_params(labelbottom=number == len(spectra) - 1)
            axes.set_xlim(3750, 9300)
        if spectra:
            axes.set_xlabel("vacuum wavelength (Å)")
        if page.cutout:
            draw_cutout(right.add_subplot(panels, 1, 1), page.cutout.pixels, page.inputs.star.simulated)
        if classified:
            draw_probabilities(right.add_subplot(panels, 1, panels), page.row)
        figure.suptitle(page_title(page), parse_math=False)


def page_title(page: Page) -> str:
    star, problem = page.inputs.star, page.inputs.problem
    is_named_after_file = star.file and Path(star.file).name.startswith(star.name)
    title = [
        star.name if is_named_after_file else f"{star.name} ({star.spectrum_id})",
        f"label: {star.subclass or 'none'}",
    ]
    if page.classifier:
        title.append(f"network: {page.row.get('predicted_subclass', 'not classified')}")
    title += ["SIMULATED"] * star.simulated
    lines = [", ".join(title), describe_indices(page.inputs.indices), *textwrap.wrap(problem, 150)]
    return "\n".join(filter(None, lines))


def describe_indices(indices: dict[str, Any]) -> str:
    """The measured ones, in one line."""
    values = [
        f"{name} {indices[name]:.2f} ± {indices[f'{name}_err']:.2f}" + " Å" * name.startswith("EW")
        for name in ("TiO5", "CaH2", "CaH3", "zeta", "EW_Halpha")
        if not np.isnan(indices.get(name, np.nan))
    ]
    activity = {True: "active", False: "not active"}.get(indices.get("is_active"))
    return ", ".join(filter(None, [*values, indices.get("metallicity_class"), activity]))


def choose_sheet_stars(data_dir: Path) -> tuple[list[list[StarInputs]], int]:
    """The first usable stars of each class, and of all others; the number of stars in the catalogue.

    Where no star has an image, as with LAMOST's, spectra alone are enough.
    """
    stars, _ = read_catalog(catalog_path(data_dir), labelled=False)
    index, chosen = FileIndex(data_dir), []
    kinds = INPUTS["fusion" if any(index.cutout(star) for star in stars) else "spectrum"]
    for class_name in (*CLASS_NAMES, ""):
        members = (star for star in stars if star.class_name == class_name)
        read = (read_star(kinds, star, index.files(star)) for star in members)
        if some := list(itertools.islice((inputs for inputs in read if not inputs.problem), SHEET_STARS)):
            chosen.append(some)
    if not chosen:
        problem = read_star(kinds, stars[0], index.files(stars[0])).problem
        raise DataError(f"{data_dir}: none of its {len(stars)} stars has good {' and '.join(kinds)} ({problem})")
    return chosen, len(stars)


def draw_sheet(path: Path, chosen: list[list[StarInputs]], count: int) -> None:
    """A row of stars for each class. count: the number of stars in the catalogue."""
    with new_figure(path, (19, 2.3 * len(chosen) + 0.8), dpi=110, software=SOFTWARE) as figure:
        rows = figure.subplots(len(chosen), 2 * SHEET_STARS, squeeze=False, width_ratios=(2.2, 1) * SHEET_STARS)
        for panels, members in zip(rows, chosen, strict=True):
            for spectrum, image, inputs in zip(panels[::2], panels[1::2], members, strict=False):
                if "images" in inputs.arrays:
                    draw_cutout(image, inputs.arrays["images"].transpose(1, 2, 0), inputs.star.simulated)
                flux = inputs.arrays["spectra"][0]
                spectrum.plot(WAVELENGTH, flux, color="black", linewidth=0.4)
                set_limits(spectrum, flux)
                mark_features(spectrum)
                spectrum.set_title(f"{inputs.star.subclass or 'no label'}: {inputs.star.name}", fontsize=9)
        for axes in figure.axes:
            axes.set_visible(axes.has_data())
        for axes in rows[-1, ::2]:
            axes.set_xlabel("vacuum wavelength (Å)")
        shown = [inputs.star for members in chosen for inputs in members]
        figure.suptitle(f"{describe(shown)} of {count}: flux / median, and the image if there is one; "
                        "shaded: TiO red, CaH blue, Na orange, Hα violet")  # fmt: skip


if __name__ == "__main__":
    run_as_script(lambda: main(ARGUMENTS))
