"""Score networks and classical methods on real stars.

    python benchmarks/real_spectra.py DIR --spectra-dir LAMOST --checkpoints checkpoints/best_model_*.pth
    python benchmarks/real_spectra.py DIR --spectra-dir LAMOST --catalog lamost_m_stars.csv --templates-dir TEMPLATES

LAMOST is a directory with spectra of M0 to M4 stars, in any format that predict.py reads, and a catalogue with the
columns file and subclass. The classical methods are trained on simulated stars and, with --templates-dir (see
accuracy.py), on stars made from published spectra; DIR/stars keeps them. Rows of "these stars" are cross-validated on
the real stars; networks of spectra alone are fine-tuned, as by train.py --initial-checkpoint. Colours are those of the
400 real stars of objects.csv.

Surveys differ in the zero point of their labels. So agreement is given as labelled, and after the median difference
(offset) is subtracted from the continuous type: the mean of the subclass numbers over the probabilities or, for a
method without probabilities, its class. DIR/real_spectra.md gets the tables, with 95 % intervals by the bootstrap.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr
from sklearn.base import BaseEstimator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie one directory up

import classical
from template_stars import simulate_from_templates
from training_run import train_best, training_options

import train
from cache import PreparedStars
from catalog import CLASS_NAMES, read_catalog
from checkpoint import describe_training, load_checkpoint
from classifier import Classifier
from cli import DataError, ScriptParser, quietly, run_as_script, write_atomically
from evaluation import BOOTSTRAP_DRAWS
from outliers import References
from prediction import StarInputs, classify, inputs_without_images, read_star
from simulate_sdss_data import simulate

SEED = 1
FOLDS = 5
TRAINING = {"per_class": 80, "min_snr": 5, "max_snr": 60, "seed": SEED}  # stars that classical methods are trained on
LDA = "LDA on 32 band means"
CLASSICAL = ("random forest", LDA, "LDA on TiO5, CaH2, CaH3", "χ² fit to class means")
CONTINUE = ("--epochs", "20", "--batch-size", "8", "--learning-rate", "3e-5")  # few stars: small batches, slow
COLUMNS = ("exact", "within 1", "offset", "exact, less offset", "within 1, less offset", "rank correlation")


class Answers(NamedTuple):
    """The answers of a method on N stars."""

    classes: np.ndarray  # (N,) subclass numbers
    types: np.ndarray  # (N,) continuous subclass numbers; NaN where unknown


def read_real_stars(directory: Path, catalog: str) -> list[StarInputs]:
    """The usable stars of a folder of spectra with their catalogue. Raises DataError where there are none."""
    if not directory.is_dir():
        raise DataError(
            f"{directory}: no such folder; --spectra-dir must hold real spectra of M0 to M4 stars, SDSS's or LAMOST's, "
            f"and {catalog} with the columns file and subclass"
        )
    stars, _ = read_catalog(directory / catalog)
    read = [read_star(("spectra",), star, {"spectra": directory / star.file, "images": None}) for star in stars]
    for entry in read:
        if entry.problem:
            print(f"left out: {entry.problem}")
    if not (usable := [entry for entry in read if not entry.problem]):
        raise DataError(f"{directory}: none of its {len(stars)} stars can be used")
    return usable


def prepare(real: Sequence[StarInputs]) -> PreparedStars:
    stars = [entry.star for entry in real]
    spectra = torch.from_numpy(np.stack([entry.arrays["spectra"] for entry in real]))
    return PreparedStars(stars, spectra, None, torch.tensor([CLASS_NAMES.index(star.subclass) for star in stars]))


def cross_validate(labels: np.ndarray, ask: Callable[[np.ndarray, np.ndarray], Answers]) -> Answers:
    """Answers by stratified cross-validation. `ask` trains on the stars of its first indices, answers on its second."""
    order = np.lexsort([np.random.default_rng(SEED).random(len(labels)), labels])
    parts = [order[fold::FOLDS] for fold in range(FOLDS)]
    answers = [ask(np.setdiff1d(order, part), part) for part in parts]
    back = np.argsort(np.concatenate(parts))
    return Answers(*(np.concatenate(values)[back] for values in zip(*answers, strict=True)))


def ask_network(classifier: Classifier, references: References, real: Sequence[StarInputs]) -> Answers:
    table = pd.DataFrame(classify(classifier, references, real))
    classes = table["predicted_subclass"].map(CLASS_NAMES.index)
    return Answers(classes.to_numpy(), table["expected_subclass"].to_numpy(float))


def continue_network(path: Path, real: Sequence[StarInputs]) -> Classifier:
    """The best checkpoint of a run that starts from this one, on these stars."""
    options = training_options("--initial-checkpoint", str(path), *CONTINUE)
    classifier, checkpoint = load_checkpoint(path)
    options, prepared = train.continue_from(options, classifier, checkpoint), prepare(real)
    return train_best(options, prepared, classifier.state_dict())[0]


def network_rows(path: Path, real: list[StarInputs], labels: np.ndarray) -> dict[str, Answers]:
    classifier, checkpoint = load_checkpoint(path)
    inputs_without_images(classifier)
    references, modality = checkpoint["references"], classifier.recipe.modality
    rows = {f"{path.stem}, {modality}: {describe_training(checkpoint)}": ask_network(classifier, references, real)}

    def ask(training: np.ndarray, others: np.ndarray) -> Answers:
        with quietly():
            continued = continue_network(path, [real[i] for i in training])
        return ask_network(continued, references, [real[i] for i in others])

    if modality == "spectrum":
        rows[f"{path.stem}, continued: these stars"] = cross_validate(labels, ask)
    return rows


def ask_estimator(estimator: BaseEstimator, X: np.ndarray, y: np.ndarray, others: np.ndarray) -> Answers:
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of a class with one star
        classes = estimator.fit(X, y).predict(others)
    if not hasattr(estimator, "predict_proba"):
        return Answers(classes, classes.astype(float))
    return Answers(classes, estimator.predict_proba(others) @ estimator.classes_)


def cross_validate_estimator(estimator: BaseEstimator, X: np.ndarray, y: np.ndarray) -> Answers:
    return cross_validate(y, lambda rows, others: ask_estimator(estimator, X[rows], y[rows], X[others]))


def training_stars(directory: Path, templates_dir: Path | None) -> dict[str, classical.ObservedStars]:
    """Stars to train on, by their origin."""
    makers = {"simulated": simulate}
    for name, path in classical.template_files(templates_dir).items():
        makers[name] = partial(simulate_from_templates, templates_path=path)
    for name, make in makers.items():
        if not (directory / "stars" / name).exists():
            make(directory / "stars" / name, **TRAINING)
    with quietly():
        return {name: classical.observed_stars(directory / "stars" / name) for name in makers}


def classical_rows(
    args: argparse.Namespace, real: list[StarInputs], stars: classical.ObservedStars
) -> dict[str, Answers]:
    methods = classical.methods(SEED, args.templates_dir)
    rows = {}
    for origin, training in training_stars(args.directory, args.templates_dir).items():
        for name in CLASSICAL:
            features, estimator = methods[name]
            X, y = features(training), training.targets
            rows[f"{name}: {origin}"] = ask_estimator(estimator, X, y, features(stars))
    for name, (features, estimator) in methods.items():
        if name.endswith("'s templates"):  # there is nothing to train
            rows[name] = ask_estimator(estimator, features(stars), stars.targets, features(stars))
    slope, constant = classical.TIO5_RELATION
    types = slope * np.array([entry.indices["TiO5"] for entry in real]) + constant
    rows["relation of TiO5"] = Answers(nearest_class(types), types)
    features, estimator = methods[LDA]
    return rows | {f"{LDA}: these stars": cross_validate_estimator(estimator, features(stars), stars.targets)}


def colour_rows() -> tuple[np.ndarray, dict[str, Answers], np.ndarray]:
    """Labels (N,) of the stars in objects.csv, the rows of the methods on colours, r magnitudes (N,)."""
    catalog = pd.read_csv(Path(__file__).resolve().parents[1] / "objects.csv")
    magnitudes = catalog[[f"{band}_mag" for band in "ugriz"]].to_numpy()
    labels, r = catalog["subclass"].map(CLASS_NAMES.index).to_numpy(), magnitudes[:, 2]
    estimator = classical.methods(SEED)["SVM on colours"].estimator
    colours = -np.diff(magnitudes, axis=1)
    inputs = {"SVM on colours": colours, "SVM on colours and r": np.column_stack([colours, r])}
    return labels, {name: cross_validate_estimator(estimator, X, labels) for name, X in inputs.items()}, r


def nearest_class(types: np.ndarray) -> np.ndarray:
    """(N,) subclass numbers from 0 to 4; NaN stays."""
    return np.clip(np.floor(types + 0.5), 0, len(CLASS_NAMES) - 1)


def score(labels: np.ndarray, answers: Answers) -> np.ndarray:
    """The values of COLUMNS."""
    offset = np.nanmedian(answers.types - labels)
    errors = np.abs(np.stack([answers.classes, nearest_class(answers.types - offset)]) - labels)
    exact, within_one = np.mean(errors == 0, axis=1), np.mean(errors <= 1, axis=1)
    rank_correlation = spearmanr(answers.types, labels, nan_policy="omit").statistic
    return np.array([exact[0], within_one[0], offset, exact[1], within_one[1], rank_correlation])


def as_markdown(title: str, labels: np.ndarray, rows: dict[str, Answers], stars: np.ndarray) -> str:
    """A table of the rows' scores on these stars, given as indices."""
    draws = np.random.default_rng(SEED).choice(stars, (BOOTSTRAP_DRAWS, len(stars)))
    lines = [f"| {title}, {len(stars)} stars | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name, answers in rows.items():
        values, *resampled = (score(labels[k], Answers(*(part[k] for part in answers))) for k in (stars, *draws))
        limits = np.nanquantile(resampled, [0.025, 0.975], axis=0)
        cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in zip(values, *limits, strict=True)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(labels: np.ndarray, rows: dict[str, Answers], values: np.ndarray, quantity: str) -> list[str]:
    """Tables of all stars, and of those below and above the median of a quantity."""
    middle = np.median(values)
    parts = {f"{quantity} up to {middle:.1f}": values <= middle, f"{quantity} above {middle:.1f}": values > middle}
    halves = [as_markdown(title, labels, rows, np.flatnonzero(part)) for title, part in parts.items()]
    return [as_markdown("All", labels, rows, np.arange(len(labels))), *halves]


def main() -> None:
    parser = ScriptParser(__doc__)
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="directory for the tables, and for stars to train on")
    add("--spectra-dir", type=Path, required=True, metavar="LAMOST", help="directory of real spectra, with a catalogue")
    add("--catalog", default="objects.csv", metavar="NAME", help="file of the catalogue in --spectra-dir")
    add("--templates-dir", type=Path, metavar="TEMPLATES", help="directory with the published mean spectra")
    add("--checkpoints", type=Path, nargs="+", default=[], metavar="CHECKPOINT", help="networks, written by train.py")
    args = parser.parse_args()
    real = read_real_stars(args.spectra_dir, args.catalog)
    prepared = prepare(real)
    stars = classical.ObservedStars(prepared.spectra.numpy(), None, prepared.targets.numpy())
    rows = {}
    for path in args.checkpoints:
        rows |= network_rows(path, real, stars.targets)
    rows |= classical_rows(args, real, stars)
    snr = classical.median_snr(stars.spectra)
    text = "\n".join(tables(stars.targets, rows, snr, "S/N") + tables(*colour_rows(), "r"))
    with write_atomically(args.directory / "real_spectra.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\nin {args.directory}: real_spectra.md")


if __name__ == "__main__":
    run_as_script(main)
