"""From a star's files to its row in the table of predictions; shared by predict.py and show_star.py.

    inputs = read_star(INPUTS["fusion"], star, FileIndex(data_dir).files(star))
    [row] = classify(classifier, checkpoint["references"], [inputs])

The rule by which a star can be classified is that of training, `cache.check_star`. A spectrum needs no catalogue:
`star_of_file` makes the star.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache import Finding, StarFiles, check_star, decode_file
from catalog import CLASS_NAMES, SPECTRUM_ENDING, Star, without_note
from classifier import Classifier
from cli import DataError
from evaluation import STARS_AT_ONCE
from indices import measure_indices
from outliers import References, is_outlier, outlier_score
from preparation import Batch, move
from star_files import spectrum_numbers


class StarInputs(NamedTuple):
    """A star, and its files' content as the network gets it."""

    star: Star  # with its spectrum's position, and subclass, where the catalogue has none
    arrays: dict[str, np.ndarray]  # "spectra": (2, 3522) float32, "images": (3, 128, 128) uint8; the usable ones
    problem: str  # why the star cannot be classified; "" if it can
    indices: dict[str, Any]  # of a usable spectrum, as of `measure_indices`; else {}


def star_of_file(path: Path) -> tuple[Star, StarFiles]:
    """A star known only from its spectrum, and its files."""
    numbers = spectrum_numbers(path.name) or (0, 0, 0)
    return Star(SPECTRUM_ENDING.sub("", path.name), "", *numbers, file=str(path)), {"spectra": path, "images": None}


def inputs_without_images(classifier: Classifier) -> tuple[str, ...]:
    """The kinds of input of stars known only from their spectra. Raises DataError for a network of images."""
    recipe = classifier.recipe
    if recipe.modality == "image":
        raise DataError("this network classifies images; spectra need one of --modality spectrum or fusion")
    if recipe.modality == "fusion":
        print("warning: this network was trained with images, and gets none; --modality spectrum trains one without")
    return ("spectra",)


def read_star(kinds: tuple[str, ...], star: Star, paths: StarFiles) -> StarInputs:
    """Decode the files of a star that is to be classified from these kinds of input, "spectra" and "images"."""
    # The spectrum is always read: for its position, and to measure its indices.
    read = {kind: path for kind, path in paths.items() if path and kind in (*kinds, "spectra")}
    decoded = {kind: decode_file(kind, path, star) for kind, path in read.items()}
    checked = check_star(star, paths, {kind: finding for kind, (finding, _) in decoded.items()}, kinds)
    star = checked.star
    finding, spectrum = decoded.get("spectra", (Finding(), None))
    star = star._replace(subclass=star.subclass or without_note(finding.subclass))
    arrays = {kind: array for kind, (_, array) in decoded.items() if kind in kinds and array is not None}
    indices = {} if spectrum is None else measure_indices(spectrum, finding.redshift)
    return StarInputs(star, arrays, "" if checked.state == "used" else checked.problem or checked.state, indices)


def classify(classifier: Classifier, references: References, stars: Sequence[StarInputs]) -> list[dict[str, Any]]:
    """The table's row of each star, by column; None is an unknown value. A star with a problem has neither prediction
    nor indices."""
    usable = [entry for entry in stars if not entry.problem]
    at_once = STARS_AT_ONCE[classifier.device.type]
    batches = (make_batch(classifier, usable[start : start + at_once]) for start in range(0, len(usable), at_once))
    predictions = (prediction for batch in batches for prediction in predict_batch(classifier, references, batch))
    rows = []
    for star, _, problem, indices in stars:
        row = {column: getattr(star, column) or None for column in ("name", "plate", "mjd", "fiberID")}
        row |= {"ra": rounded(star.ra, 6), "dec": rounded(star.dec, 6), "catalog_subclass": star.subclass}
        row |= {"simulated": star.simulated, "problem": problem}
        if not problem:
            row |= {name: rounded(value, 4) for name, value in indices.items()} | next(predictions)
        rows.append(row)
    return rows


def make_batch(classifier: Classifier, stars: Sequence[StarInputs]) -> Batch:
    """The stars' inputs on the classifier's device; their targets are not known, and 0."""
    arrays = [entry.arrays for entry in stars]
    spectra, images = (
        torch.from_numpy(np.stack([own[kind] for own in arrays])) if kind in arrays[0] else None
        for kind in ("spectra", "images")
    )
    targets = torch.zeros(len(stars), dtype=torch.int64)
    return move(Batch(spectra, images, targets), classifier.device)


@torch.inference_mode()
def predict_batch(classifier: Classifier, references: References, batch: Batch) -> list[dict[str, Any]]:
    """The predicted columns of each star, from the calibrated probabilities p_k of the subclasses k = 0 to 4.

    spectral_type "M2.5 ± 0.4" is the mean Σ k p_k and the standard deviation √(Σ k² p_k − mean²), at least 0.1: how
    widely the probability is spread over the subclasses. It does not include the errors of the training labels, whose
    zero point differs between surveys, and does not hold for stars outside M0 to M4, where the mean cannot go.
    """
    probabilities = classifier.probabilities(classifier(batch)[2]).cpu()
    subclass = torch.arange(len(CLASS_NAMES), dtype=torch.float64)
    mean = probabilities @ subclass
    std = (probabilities * (subclass - mean[:, None]) ** 2).sum(dim=1).sqrt()
    shown = zip(mean.tolist(), std.clamp(min=0.1).tolist(), strict=True)
    # A star is an outlier if its spectrum or its image is: the larger score counts.
    seen = {"spectra": batch.spectra, "images": batch.images}
    scores = [outlier_score(kind, seen[kind], references[kind]) for kind in seen if seen[kind] is not None]
    score = torch.stack(scores).amax(dim=0)
    columns = {
        "predicted_subclass": [CLASS_NAMES[k] for k in probabilities.argmax(dim=1)],
        **{f"p_{name}": rounded_all(probabilities[:, k], 5) for k, name in enumerate(CLASS_NAMES)},
        "spectral_type": [f"M{k:.1f} ± {spread:.1f}" for k, spread in shown],
        "expected_subclass": rounded_all(mean, 3),
        "expected_subclass_std": rounded_all(std, 3),
        "outlier_score": rounded_all(score, 3),
        "is_outlier": is_outlier(score).tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def rounded(value: Any, digits: int) -> Any:
    """The value, a float rounded; None in place of NaN."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else round(value, digits)


def rounded_all(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
