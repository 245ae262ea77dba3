"""Evaluation of a classifier: one pass over some stars, the scores with their intervals, the calibration."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import distributed
from catalog import CLASS_NAMES
from classifier import Classifier
from cli import progress
from dataset import StarLoader
from model import contrastive_logits

BOOTSTRAP_DRAWS = 1000
CALIBRATION_BINS = 10  # at most; fewer where there are few stars
STARS_PER_BIN = 20  # at least
TEMPERATURES = (0.05, 20.0)  # limits of the fit
STARS_AT_ONCE = {"cuda": 512, "cpu": 64}  # classified together, about; more are no quicker on an H200


class Evaluation(NamedTuple):
    targets: np.ndarray  # (N,) class indices
    logits: np.ndarray  # (N, 5)
    losses: tuple[float, float] = (math.nan, math.nan)  # classification and contrastive, means by star
    # Fraction of the images whose closest spectrum, of those in their batch, is their own
    retrieval_accuracy: float | None = None

    @property
    def predictions(self) -> np.ndarray:
        """(N,) class indices."""
        return self.logits.argmax(axis=1)

    def scores(self) -> dict[str, float]:
        """Accuracy; precision, recall and F1 weighted by class frequency; F1 as the plain mean over the classes that
        occur; fraction within one subclass."""
        return scores_of(self.targets, self.predictions, np.ones(len(self.targets)))

    def intervals(self) -> dict[str, list[float]]:
        """The 95 % interval of each score, by the bootstrap: the stars are resampled with replacement."""
        pairs, counts = np.unique(np.stack([self.targets, self.predictions]), axis=1, return_counts=True)
        draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=BOOTSTRAP_DRAWS)
        scores = [scores_of(*pairs, draw) for draw in draws]
        return {name: np.quantile([score[name] for score in scores], [0.025, 0.975]).tolist() for name in scores[0]}

    def reliability(self, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In bins of as many stars each, ordered by the probability of the predicted class: its mean, the fraction
        classified right, and the number of stars, each (bins,)."""
        from scipy.special import softmax

        probability = softmax(self.logits / temperature, axis=1).max(axis=1)
        right = self.predictions == self.targets
        number = min(CALIBRATION_BINS, max(1, len(right) // STARS_PER_BIN))
        bins = np.array_split(probability.argsort(kind="stable"), number)
        return (
            np.array([probability[rows].mean() for rows in bins]),
            np.array([right[rows].mean() for rows in bins]),
            np.array([len(rows) for rows in bins]),
        )

    def calibration_error(self, temperature: float) -> float:
        """Expected calibration error: the mean over the bins, weighted by stars, of |probability − fraction right|."""
        probability, right, stars = self.reliability(temperature)
        return float(np.average(np.abs(probability - right), weights=stars))

    def final_metrics(self, key: str, scored_on: str, temperature: float) -> dict[str, Any]:
        """The entries of a record's final_metrics; `key` is "val" or "test"."""
        from sklearn.metrics import confusion_matrix

        names = {name: f"{name}_weighted" for name in ("precision", "recall", "f1")}
        by_class = self.report(as_dict=True)
        matrix = confusion_matrix(self.targets, self.predictions, labels=range(len(CLASS_NAMES)))
        return {f"final_{key}_{names.get(name, name)}": value for name, value in self.scores().items()} | {
            f"final_{key}_intervals_95": self.intervals(),
            f"final_{key}_scored_on": scored_on,
            f"final_{key}_by_class": {name: by_class[name] for name in CLASS_NAMES},
            f"final_{key}_confusion_matrix": matrix.tolist(),  # a row for each class of the catalogue
            f"final_{key}_calibration_error": self.calibration_error(temperature),
            f"final_{key}_calibration_error_before": self.calibration_error(1.0),
        }

    def report(self, *, as_dict: bool = False) -> str | dict[str, Any]:
        """Precision, recall, F1 and number of stars by class, and their means."""
        from sklearn.metrics import classification_report

        return classification_report(
            self.targets, self.predictions, labels=range(len(CLASS_NAMES)), target_names=CLASS_NAMES, digits=3,
            zero_division=0, output_dict=as_dict,
        )  # fmt: skip


def scores_of(targets: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The scores of pairs of class indices, each (P,), where pair i stands for counts[i] stars."""
    from sklearn.metrics import precision_recall_fscore_support

    labels = range(len(CLASS_NAMES))
    *by_class, stars = precision_recall_fscore_support(
        targets, predictions, labels=labels, sample_weight=counts, zero_division=0
    )
    precision, recall, f1 = (float(np.average(score, weights=stars)) for score in by_class)
    distance = np.abs(targets - predictions)
    return {
        "accuracy": float(np.average(distance == 0, weights=counts)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "f1_macro": float(by_class[2][stars > 0].mean()),
        "within_one_subclass": float(np.average(distance <= 1, weights=counts)),
    }


@torch.inference_mode()
def evaluate(classifier: Classifier, loader: StarLoader, description: str = "evaluating") -> Evaluation:
    """One pass over a loader's stars, spread over all processes.

    The contrastive loss grows with the batch, so it is computed over batches as large as in training; the network takes
    several of them at once.
    """
    batch_size = classifier.recipe.batch_size
    classifier.eval()
    at_once = batch_size * max(1, STARS_AT_ONCE[loader.device.type] // batch_size)
    totals, targets, logits = [], [], []
    batches = math.ceil(len(loader) / at_once / distributed.world_size())
    for batch in progress(loader.in_order(at_once), desc=description, unit="batch", total=batches):
        outputs = (*classifier(batch), batch.targets)
        for start in range(0, len(batch.targets), batch_size):
            part = [None if output is None else output[start : start + batch_size] for output in outputs]
            means = [*classifier.losses(*part)]
            if classifier.is_contrastive:
                means.append(retrieval_accuracy(*part[:2]))
            totals.append(torch.stack(means) * len(part[-1]))  # summed over its stars
        targets.append(batch.targets)
        logits.append(outputs[2])
    # Read once, at the end: the pass never waits for the device.
    own = [torch.stack(totals).sum(dim=0), torch.cat(targets), torch.cat(logits)] if totals else []
    parts = [part for part in distributed.gather_objects([value.cpu().numpy() for value in own]) if part]
    totals, *both = zip(*parts, strict=True)
    classification, contrastive, *retrieval = (np.sum(totals, axis=0) / len(loader)).tolist()
    return Evaluation(*map(np.concatenate, both), (classification, contrastive), *retrieval)


def retrieval_accuracy(image_features: Tensor, spectrum_features: Tensor) -> Tensor:
    """The fraction of the images (B, 512) that are closest to their own spectrum among the spectra (B, 512)."""
    closest = contrastive_logits(image_features, spectrum_features).argmax(dim=1)
    return (closest == torch.arange(len(closest), device=closest.device)).float().mean()


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature T for which softmax(logits / T) is most likely for these stars (Guo et al. 2017,
    arXiv:1706.04599). A log-normal prior around 1 matters only for few stars: were all classified right, T would be 0.

    logits: (N, 5). targets: (N,) class indices.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def cost(log_temperature: float) -> float:
        log_probabilities = log_softmax(logits / np.exp(log_temperature), axis=1)
        return log_temperature**2 / 2 - log_probabilities[np.arange(len(targets)), targets].sum()

    return float(np.exp(minimize_scalar(cost, bounds=np.log(TEMPERATURES), method="bounded").x))


def print_scores(scores: dict[str, float], intervals: dict[str, list[float]]) -> None:
    print("with its 95 % bootstrap interval:")
    for name, value in scores.items():
        low, high = intervals[name]
        print(f"{name.replace('_', ' '):>22} {value:.3f}  ({low:.3f} to {high:.3f})")


def print_calibration(evaluation: Evaluation, temperature: float) -> None:
    before, after = evaluation.calibration_error(1.0), evaluation.calibration_error(temperature)
    print(f"{'calibration error':>22} {after:.3f}  (at temperature {temperature:.2f}; {before:.3f} at 1)")
