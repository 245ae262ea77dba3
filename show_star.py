"""Draw stars: spectrum, image, what the network gets of them and, with a checkpoint, what it makes of them.

    python show_star.py --data-dir DIR                               a few stars of each class: is my data read right?
    python show_star.py NAME NAME --data-dir DIR                     a page for each, plots/star_PLATE-MJD-FIBERID.png
    python show_star.py NAME --data-dir DIR --checkpoint CHECKPOINT  and its probabilities, and which bands decided

NAME is the star's in objects.csv, or plate-mjd-fiberID. Which bands decided is tried out: a piece of the spectrum
is replaced by the mean spectrum of the training stars, and the log odds of the predicted subclass are taken
again; what they lose, that piece had contributed (less than nothing: it spoke against). In an M star one expects
the bands of TiO.

Wavelengths (Å, air): band heads of TiO, Kirkpatrick et al. 1991 (ApJS 77, 417) and Valenti et al. 1998 (ApJ 498,
851); CaH, the indices CaH1–CaH3 of Reid, Hawley & Gizis 1995 (AJ 110, 1838); lines, NIST Atomic Spectra Database.
SkyServer's cutouts have north up and east left (https://skyserver.sdss.org/dr16/en/tools/chart/chartinfo.aspx).
"""

import argparse
import itertools
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import data
from data import CLASS_NAMES, CUTOUT_SCALE, DataError, Star
from model import FusionModel, flatten_spectra, load_checkpoint, project
from predict import StarFiles, class_logits, classify, read_files
from simulate_sdss_data import air_to_vacuum

TIO_LENGTH = 80  # Å shown of a band of TiO, which fades to the red of its head
FEATURES = (  # Å, air
    *(("TiO", head, head + TIO_LENGTH) for head in (4954, 5167, 5448, 5847, 6158, 6651, 7053)),
    *(("CaH", first, last) for first, last in ((6380, 6390), (6814, 6846), (6960, 6990))),
    *(("Na", first, last) for first, last in ((5889.95, 5895.92), (8183.26, 8194.82))),
    ("Hα", 6562.8, 6562.8),
)
COLOURS = {"TiO": "tab:red", "CaH": "tab:blue", "Na": "tab:orange", "Hα": "tab:purple"}
WAVELENGTH = 10 ** ((data.FIRST_PIXEL + np.arange(data.SPECTRUM_LENGTH)) / data.PIXELS_PER_DEX)  # Å, vacuum
SHEET_STARS = 3  # of each class
WINDOW, STEP = 110, 55  # pixels replaced at once: 1/32 of the spectrum, as a token is; and from one to the next


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = data.ScriptParser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="the stars to draw; none: a sheet with stars of each class")
    add("--data-dir", type=Path, default=Path("."), metavar="DIR", help="holds objects.csv, spectra/ and images/")
    add("--checkpoint", type=Path, metavar="CHECKPOINT", help="a file that train.py wrote into checkpoints/")
    add("--output-dir", type=Path, default=Path("plots"), metavar="DIR",
        help="gets the PNG files; an earlier one of this script is replaced, no other file is")  # fmt: skip
    parser.add_quiet()
    args = parser.parse_args(argv)
    if args.checkpoint and not args.names:
        parser.error("--checkpoint: name the stars that it is to classify; the sheet shows data alone")
    return args


def find_stars(names: list[str], stars: list[Star], catalog: Path) -> list[Star]:
    """The rows of these names or plate-mjd-fiberIDs, each once; a star observed twice has two of one name."""
    for name in set(names) - {label for star in stars for label in (star.name, star.spectrum_id)}:
        raise DataError(f"{catalog}: no star {name}; the first of its {len(stars)} is {stars[0].name}")
    return [star for star in stars if star.name in names or star.spectrum_id in names]


# The parts of a page


def mark_features(axes: Axes, labels: bool = False) -> None:
    """Shade the features behind the curve, and name them above it."""
    for species, first, last in FEATURES:
        ends = air_to_vacuum(np.array([first, last]))
        axes.axvspan(ends[0] - 5, ends[1] + 5, color=COLOURS[species], alpha=0.25, linewidth=0)
        if labels:
            height = 1.01 if species == "TiO" else 1.09  # the Na line lies in a band of TiO
            axes.text(ends.mean(), height, species, color=COLOURS[species], fontsize=8, ha="center",
                      transform=axes.get_xaxis_transform())  # fmt: skip


def draw_observed(axes: Axes, entry: StarFiles) -> None:
    """The spectrum as it is in the file, its noise, and its bad pixels."""
    wavelength, flux, ivar = 10**entry.observed.loglam, entry.observed.flux, entry.observed.ivar
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
        low, high = np.percentile(flux[good], [0.5, 99.5])  # a cosmic ray does not set the scale
        axes.set_ylim(min(0, low) - 0.03 * (high - low), high + 0.25 * (high - low))
        title = f"median S/N {np.median(flux[good] * np.sqrt(ivar[good])):.1f} a pixel"
    axes.set_ylabel("flux (10⁻¹⁷ erg s⁻¹ cm⁻² Å⁻¹)")
    axes.legend(loc="upper left", fontsize=8, ncols=4, title=title, title_fontsize=8)


def draw_prepared(axes: Axes, entry: StarFiles, model: FusionModel | None) -> None:
    """The spectrum as any network gets it or, with one that reads spectra, flattened and smoothed as that one does it,
    what it sees of that, and the mean that it subtracts."""
    if model is None or model.spec_encoder is None:
        axes.plot(WAVELENGTH, entry.prepared["spectrum"], color="black", linewidth=0.5, label="what the network gets")
        axes.set_ylabel("flux / median")
    else:
        spectrum, normalisation = entry.prepared["spectrum"][None], model.spectrum_normalisation
        flat, mean = flatten_spectra(spectrum, normalisation.continuum_basis)[0], normalisation.mean
        seen = mean + normalisation.std * normalisation(spectrum)[0][0]
        less_continuum = ", less its continuum" if normalisation.continuum_basis.shape[1] > 0 else ""
        axes.plot(WAVELENGTH, flat, color="0.6", linewidth=0.5, label="the spectrum")
        axes.plot(WAVELENGTH, seen, color="black", linewidth=1.0, label="what the network sees of it")
        axes.plot(WAVELENGTH, mean, color="tab:cyan", linewidth=1.0, label="the mean of the training stars")
        axes.set_ylabel(f"flux / median{less_continuum}, smoothed")
    axes.legend(loc="upper left", fontsize=8)


def draw_cutout(axes: Axes, entry: StarFiles) -> None:
    """The image with a bar of 5″ and, on the sky, north and east; its scale is not in the file."""
    size = len(entry.pixels)
    bar = 5 / CUTOUT_SCALE / size  # of the width
    axes.imshow(entry.pixels)
    axes.plot([0.06, 0.06 + bar], [0.06, 0.06], color="white", linewidth=2, transform=axes.transAxes)
    axes.text(0.06 + bar / 2, 0.08, "5″", color="white", ha="center", transform=axes.transAxes)
    if not entry.star.simulated:
        for text, end in (("N", (0.92, 0.26)), ("E", (0.74, 0.08))):
            arrow = {"arrowstyle": "->", "color": "white"}
            axes.annotate("", end, (0.92, 0.08), "axes fraction", arrowprops=arrow)
            axes.text(*end, text, color="white", ha="right", va="bottom", transform=axes.transAxes)
    axes.set(xticks=[], yticks=[])


def draw_probabilities(axes: Axes, row: dict, label: str) -> None:
    probabilities = [row[f"p_{name}"] for name in CLASS_NAMES]
    colours = ["tab:green" if name == label else "gray" for name in CLASS_NAMES]
    bars = axes.bar(CLASS_NAMES, probabilities, color=colours)
    axes.bar_label(bars, [f"{p:.2f}" for p in probabilities], fontsize=8)
    title = f"expected subclass {row['expected_subclass']:.2f} ± {row['expected_subclass_std']:.2f}"
    if "unlikeness" in row:
        title += f"\nunlikeness {row['unlikeness']:.2f}" + "\nNOT LIKE THE TRAINING STARS" * row["unlike_training"]
    axes.set(ylim=(0, 1.1), ylabel="probability" + " (green: catalogue)" * bool(label))
    axes.set_title(title, fontsize=9, color="tab:red" if row.get("unlike_training") else "black")


def occlusion_map(model: FusionModel, inputs: dict[str, torch.Tensor], predicted: int) -> tuple[np.ndarray, np.ndarray]:
    """Centre of each piece (Å), and what the log odds of the predicted subclass lose without it."""

    def log_odds(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = class_logits(model, inputs)
        others = [k for k in range(len(CLASS_NAMES)) if k != predicted]
        return logits[:, predicted] - logits[:, others].logsumexp(dim=1)

    whole = {kind: values[None] for kind, values in inputs.items()}
    before = log_odds(whole)
    spectrum = whole["spectrum"]
    # this star's continuum, mean bands; the network smooths these once more, which wide bands do not notice, and sees
    # the eigenspectra's fit to the whole
    normalisation = model.spectrum_normalisation
    ordinary = project(spectrum, normalisation.continuum_basis) + normalisation.mean
    centres, losses = [], []
    for start in range(0, data.SPECTRUM_LENGTH - WINDOW + 1, STEP):
        piece = slice(start, start + WINDOW)
        occluded = spectrum.clone()
        occluded[:, piece] = ordinary[:, piece]
        centres.append(WAVELENGTH[piece].mean())
        losses.append((before - log_odds(whole | {"spectrum": occluded})).item())
    return np.array(centres), np.array(losses)


def draw_occlusion(axes: Axes, centres: np.ndarray, losses: np.ndarray, predicted: str) -> None:
    axes.bar(centres, losses, width=np.gradient(centres), color="tab:green", linewidth=0)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_ylabel(f"log odds of {predicted}\nlost without this piece")


# Pages


def draw_star(entry: StarFiles, model: FusionModel | None, references: dict) -> Figure:
    """A star's page: of its files, and of what the network makes of them, as much as there is."""
    star = entry.star
    row = {} if model is None else classify(model, references, [entry])[0]
    kinds = row["inputs"].split("+") if row.get("inputs") else []
    occluded = "spectrum" in kinds
    figure = Figure(figsize=(15, 10.5 if occluded else 7.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3.2, 1))
    axes = left.subplots(3 if occluded else 2, 1, sharex=True)
    if entry.observed is not None:
        draw_observed(axes[0], entry)
        mark_features(axes[0], labels=True)
    if "spectrum" in entry.prepared:
        draw_prepared(axes[1], entry, model)
        mark_features(axes[1])
    if occluded:
        inputs = {kind: entry.prepared[kind] for kind in kinds}
        predicted = row["predicted_subclass"]
        draw_occlusion(axes[2], *occlusion_map(model, inputs, CLASS_NAMES.index(predicted)), predicted)
        mark_features(axes[2])
    axes[-1].set(xlim=(3750, 9300), xlabel="vacuum wavelength (Å)")
    cutout, verdict = right.subplots(2, 1)
    if entry.pixels is not None:
        draw_cutout(cutout, entry)
        size, scale = len(entry.pixels), CUTOUT_SCALE
        cutout.set_title(f"{size} × {size} pixels: {size * scale:.1f}″ if at {scale}″ a pixel", fontsize=9)
    if kinds:
        draw_probabilities(verdict, row, star.subclass)
    for panel in (*axes, cutout, verdict):
        panel.set_visible(panel.has_data())
    title = [f"{star.name} ({star.spectrum_id})", f"catalogue: {star.subclass or 'no label'}"]
    if model is not None:
        title.append(f"network: {row['predicted_subclass']}" if kinds else "network: not classified")
    title += ["SIMULATED"] * star.simulated
    figure.suptitle("\n".join([", ".join(title), *(textwrap.fill(problem, 150) for problem in entry.problems)]))
    return figure


def draw_sheet(stars: list[Star], data_dir: Path) -> Figure:
    """For each class, and for stars without one, the first stars whose files can be read."""
    rows = {}
    for subclass in (*CLASS_NAMES, ""):
        members = (read_files(data_dir, star) for star in stars if star.subclass == subclass)
        if chosen := list(itertools.islice((entry for entry in members if not entry.problems), SHEET_STARS)):
            rows[subclass] = chosen
    if not rows:
        problems = "; ".join(read_files(data_dir, stars[0]).problems)
        raise DataError(f"{data_dir}: none of its {len(stars)} stars has a good spectrum and a good image ({problems})")

    figure = Figure(figsize=(19, 2.3 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), 2 * SHEET_STARS, squeeze=False, width_ratios=(2.2, 1) * SHEET_STARS)
    for panel in axes.flat:
        panel.set_axis_off()
    for panels, (subclass, entries) in zip(axes, rows.items(), strict=True):
        for spectrum, cutout, entry in zip(panels[::2], panels[1::2], entries, strict=False):
            for panel in (spectrum, cutout):
                panel.set_axis_on()
            draw_cutout(cutout, entry)
            spectrum.plot(WAVELENGTH, entry.prepared["spectrum"], color="black", linewidth=0.4)
            mark_features(spectrum)
            spectrum.set_ylim(0, 1.15 * np.percentile(entry.prepared["spectrum"], 99.5))  # a cosmic ray sets no scale
            spectrum.set_title(f"{subclass or 'no label'}: {entry.star.name}", fontsize=9)
    for panel in axes[-1, ::2]:
        panel.set_xlabel("vacuum wavelength (Å)")
    shown = [entry.star for entries in rows.values() for entry in entries]
    figure.suptitle(f"{data.describe(shown)} of {len(stars)}: flux / median, and the image; "
                    "shaded: TiO red, CaH blue, Na orange, Hα violet")  # fmt: skip
    return figure


def save(figure: Figure, path: Path) -> None:
    with data.write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": Path(__file__).name})
    print(path)


def draw(args: argparse.Namespace) -> None:
    catalog = data.catalog_path(args.data_dir)
    stars, _ = data.read_catalog(catalog, labelled=False)
    chosen = find_stars(args.names, stars, catalog)
    paths = [args.output_dir / f"star_{star.spectrum_id}.png" for star in chosen] or [args.output_dir / "stars.png"]
    for path in paths:
        data.refuse_foreign_file(path, Path(__file__).name)
    if not chosen:
        save(draw_sheet(stars, args.data_dir), paths[0])
        return
    model, checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else (None, {})
    for star, path in zip(chosen, paths, strict=True):
        entry = read_files(args.data_dir, star)
        if entry.observed is None and entry.pixels is None:
            raise DataError(f"{star.name}: {'; '.join(entry.problems)}")
        save(draw_star(entry, model, checkpoint.get("references", {})), path)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with data.quietly(args.quiet):
        draw(args)


if __name__ == "__main__":
    data.run_as_script(main)
