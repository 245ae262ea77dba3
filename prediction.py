"""From a star's files to its row in the table of predictions; shared by predict.py and show_star.py.

    inputs = read_star(INPUTS["fusion"], star, FileIndex(data_dir).files(star))
    [row] = classify(classifier, checkpoint["references"], [inputs])

A star can be classified where a network could have been trained on it: cache.py has the rule.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache import Paths, check_star, decode_file
from catalog import CLASS_NAMES, Star
from classifier import Classifier
from evaluation import STARS_AT_ONCE
from outliers import References, is_outlier, outlier_score
from preparation import Batch, move

COLUMNS = (
    "name", "plate", "mjd", "fiberID", "catalog_subclass", "simulated", "predicted_subclass",
    *(f"p_{name}" for name in CLASS_NAMES), "expected_subclass", "expected_subclass_std",
    "outlier_score", "is_outlier", "problem",
)  # fmt: skip


class StarInputs(NamedTuple):
    """A star, and its files' content as the network gets it."""

    star: Star  # with its spectrum's position where the catalogue has none
    arrays: dict[str, np.ndarray]  # "spectra": (2, 3522) float32, "images": (3, 128, 128) uint8; the usable ones
    problem: str  # why the star cannot be classified; "" if it can


def read_star(kinds: tuple[str, ...], star: Star, paths: Paths) -> StarInputs:
    """Decode the files of a star that is to be classified from these kinds of input, "spectra" and "images"."""
    # The spectrum is read in any case: it says where it was taken.
    read = {kind: path for kind, path in paths.items() if path and kind in (*kinds, "spectra")}
    decoded = {kind: decode_file(kind, path, star) for kind, path in read.items()}
    checked = check_star(star, paths, {kind: finding for kind, (finding, _) in decoded.items()}, kinds)
    arrays = {kind: array for kind, (_, array) in decoded.items() if kind in kinds and array is not None}
    return StarInputs(checked.star, arrays, "" if checked.state == "used" else checked.problem or checked.state)


def classify(classifier: Classifier, references: References, stars: Sequence[StarInputs]) -> list[dict[str, Any]]:
    """The table's row of each star, by column; a star with a problem has no prediction."""
    usable = [entry for entry in stars if not entry.problem]
    at_once = STARS_AT_ONCE[next(classifier.parameters()).device.type]
    batches = (make_batch(classifier, usable[start : start + at_once]) for start in range(0, len(usable), at_once))
    predictions = (prediction for batch in batches for prediction in predict_batch(classifier, references, batch))
    rows = []
    for star, _, problem in stars:
        row = {column: getattr(star, column) for column in ("name", "plate", "mjd", "fiberID", "simulated")}
        row |= {"catalog_subclass": star.subclass, "problem": problem}
        rows.append(row if problem else row | next(predictions))
    return rows


def make_batch(classifier: Classifier, stars: Sequence[StarInputs]) -> Batch:
    """The stars' inputs on the classifier's device; their targets are not known, and 0."""
    arrays = [entry.arrays for entry in stars]
    spectra, images = (
        torch.from_numpy(np.stack([own[kind] for own in arrays])) if kind in arrays[0] else None
        for kind in ("spectra", "images")
    )
    targets = torch.zeros(len(stars), dtype=torch.int64)
    return move(Batch(spectra, images, targets), next(classifier.parameters()).device)


@torch.inference_mode()
def predict_batch(classifier: Classifier, references: References, batch: Batch) -> list[dict[str, Any]]:
    """The predicted columns of each star."""
    probabilities = classifier(batch)[2].double().softmax(dim=1).cpu()
    subclass = torch.arange(len(CLASS_NAMES), dtype=torch.float64)
    mean = probabilities @ subclass
    std = (probabilities * (subclass - mean[:, None]) ** 2).sum(dim=1).sqrt()
    # An odd image makes a star odd, whatever its spectrum, and the reverse: the larger score counts.
    scores = [outlier_score(kind, getattr(batch, kind), reference) for kind, reference in references.items()]
    score = torch.stack(scores).amax(dim=0)
    columns = {
        "predicted_subclass": [CLASS_NAMES[k] for k in probabilities.argmax(dim=1)],
        **{f"p_{name}": rounded(probabilities[:, k], 5) for k, name in enumerate(CLASS_NAMES)},
        "expected_subclass": rounded(mean, 3),
        "expected_subclass_std": rounded(std, 3),
        "outlier_score": rounded(score, 3),
        "is_outlier": is_outlier(score).tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def rounded(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]
