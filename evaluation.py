"""How well a classifier does: one pass over some stars, its scores, their uncertainty, a report by class."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

import distributed
from catalog import CLASS_NAMES
from classifier import Classifier
from cli import progress
from dataset import StarLoader

BOOTSTRAP_DRAWS = 1000
STARS_AT_ONCE = {"cuda": 512, "cpu": 64}  # classified together, about; more are no quicker on an H200


class Evaluation(NamedTuple):
    loss: float  # mean, by star
    targets: np.ndarray  # (N,) class indices
    predictions: np.ndarray  # (N,) class indices

    def scores(self) -> dict[str, float]:
        """Accuracy; precision, recall and F1 weighted by class frequency; F1 as the plain mean over the classes that
        occur; fraction within one subclass."""
        return scores_of(self.targets, self.predictions, np.ones(len(self.targets)))

    def intervals(self) -> dict[str, list[float]]:
        """The 95 % interval of each score, by the bootstrap: these stars drawn again with replacement."""
        pairs, counts = np.unique(np.stack([self.targets, self.predictions]), axis=1, return_counts=True)
        draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=BOOTSTRAP_DRAWS)
        scores = [scores_of(*pairs, draw) for draw in draws]
        return {name: np.quantile([score[name] for score in scores], [0.025, 0.975]).tolist() for name in scores[0]}

    def final_metrics(self, key: str, scored_on: str) -> dict[str, Any]:
        """The entries of a record's final_metrics; `key` is "val" or "test"."""
        names = {name: f"{name}_weighted" for name in ("precision", "recall", "f1")}
        return {f"final_{key}_{names.get(name, name)}": value for name, value in self.scores().items()} | {
            f"final_{key}_intervals_95": self.intervals(),
            f"final_{key}_scored_on": scored_on,
        }

    def report(self) -> str:
        from sklearn.metrics import classification_report

        labels = range(len(CLASS_NAMES))
        return classification_report(
            self.targets, self.predictions, labels=labels, target_names=CLASS_NAMES, digits=3, zero_division=0
        )


def scores_of(targets: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """The scores of pairs of classes, each of which counts for so many stars."""
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
    """One pass over a loader's stars, those of all processes.

    The contrastive loss is larger the more stars there are to tell apart, so it is taken over batches as large as in
    training; the network takes several of them at once.
    """
    batch_size = classifier.recipe.batch_size
    classifier.eval()
    at_once = batch_size * max(1, STARS_AT_ONCE[loader.device.type] // batch_size)
    losses, targets, predictions = [], [], []
    batches = math.ceil(len(loader) / at_once / distributed.world_size())
    for batch in progress(loader.in_order(at_once), desc=description, unit="batch", total=batches):
        outputs = (*classifier(batch), batch.targets)
        for start in range(0, len(batch.targets), batch_size):
            part = [None if output is None else output[start : start + batch_size] for output in outputs]
            losses.append(classifier.loss(*part) * len(part[-1]))  # summed over its stars
        targets.append(batch.targets)
        predictions.append(outputs[2].argmax(dim=1))
    # Read once, at the end: the pass never waits for the device.
    own = [torch.stack(losses).sum(), torch.cat(targets), torch.cat(predictions)] if losses else []
    parts = [part for part in distributed.gather_objects([value.cpu().numpy() for value in own]) if part]
    totals, *both = zip(*parts, strict=True)
    return Evaluation(float(np.sum(totals)) / len(loader), *map(np.concatenate, both))


def print_scores(scores: dict[str, float], intervals: dict[str, list[float]]) -> None:
    print("with its 95 % bootstrap interval:")
    for name, value in scores.items():
        low, high = intervals[name]
        print(f"{name.replace('_', ' '):>22} {value:.3f}  ({low:.3f} to {high:.3f})")
