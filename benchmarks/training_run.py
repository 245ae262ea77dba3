"""A run of train.py inside a benchmark: the same steps, without its files.

classifier, trainer, record = train_best(training_options("--epochs", "20"), prepared)
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

import history
import train
from cache import PreparedStars
from checkpoint import load_checkpoint
from classifier import Classifier
from train_options import parse_arguments
from trainer import Trainer


def training_options(*words: str) -> argparse.Namespace:
    """The options of train.py, with these words on its command line."""
    return parse_arguments(train.__doc__, list(words))


def train_best(
    options: argparse.Namespace, prepared: PreparedStars, weights: dict[str, Tensor] | None = None
) -> tuple[Classifier, Trainer, dict[str, Any]]:
    """The classifier of the best epoch, the trainer after the last one, and the record.

    weights: of a checkpoint, to start from.
    """
    trainer, loaders, splits = train.set_up(options, prepared, weights)
    with tempfile.TemporaryDirectory() as directory:
        paths = history.run_paths(Path(directory), "run")
        run = history.begin(options, "run", trainer.classifier, prepared, splits, {})
        train.fit(trainer, loaders, run, paths, {"config": run.record["config"], "splits": {}, "references": {}})
        return load_checkpoint(paths.checkpoint, trainer.device)[0], trainer, run.record
