"""How well the stars of one pass were classified: scores, their uncertainty, a report by class."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from sklearn.metrics import classification_report, precision_recall_fscore_support
from sklearn.utils import resample

from data import CLASS_NAMES

BOOTSTRAP_DRAWS = 1000


class Evaluation(NamedTuple):
    loss: float  # mean, by star
    targets: np.ndarray  # (N,) class indices
    predictions: np.ndarray  # (N,) class indices

    def scores(self) -> dict[str, float]:
        """Accuracy; precision, recall and F1 weighted by class frequency, F1 also as the plain mean over
        classes; fraction within ± 1 subclass."""
        *by_class, count = precision_recall_fscore_support(
            self.targets, self.predictions, labels=range(len(CLASS_NAMES)), zero_division=0
        )
        precision, recall, f1 = (float(np.average(score, weights=count)) for score in by_class)
        return {
            "accuracy": float((self.predictions == self.targets).mean()),
            "precision": precision,
            "recall": recall,
            "f1": f1,
            "f1_macro": float(by_class[2].mean()),
            "within_one_subclass": float((np.abs(self.predictions - self.targets) <= 1).mean()),
        }

    def intervals(self) -> dict[str, list[float]]:
        """The 95 % interval of each score, by the bootstrap: these stars drawn again with replacement."""
        random = np.random.RandomState(0)
        draws = [
            Evaluation(self.loss, *resample(self.targets, self.predictions, random_state=random)).scores()
            for _ in range(BOOTSTRAP_DRAWS)
        ]
        return pd.DataFrame(draws).quantile([0.025, 0.975]).to_dict(orient="list")

    def final_metrics(self, key: str, scored_on: str) -> dict[str, Any]:
        """The entries of a record's final_metrics; `key` is "val" or "test"."""
        scores = self.scores()
        names = {name: f"{name}_weighted" for name in ("precision", "recall", "f1")}
        return {f"final_{key}_{names.get(name, name)}": value for name, value in scores.items()} | {
            f"final_{key}_intervals_95": self.intervals(),
            f"final_{key}_scored_on": scored_on,
        }

    def report(self) -> str:
        labels = range(len(CLASS_NAMES))
        return classification_report(
            self.targets, self.predictions, labels=labels, target_names=CLASS_NAMES, digits=3, zero_division=0
        )


def print_scores(scores: dict[str, float], intervals: dict[str, list[float]]) -> None:
    print("with its 95 % bootstrap interval:")
    for name, value in scores.items():
        low, high = intervals[name]
        print(f"{name.replace('_', ' '):>22} {value:.3f}  ({low:.3f} to {high:.3f})")
