"""Checkpoints of small networks with random weights: they classify, and take no time to train."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from common import checkpoint_contents

from cache import read_stars
from checkpoint import save_checkpoint
from classifier import Classifier
from outliers import fit_references
from recipe import PAPER


def save_untrained(path: Path, data_dir: Path, modality: str, seed: int = 0) -> Path:
    """A checkpoint as if trained on all stars of the directory."""
    prepared, _ = read_stars(data_dir, modality, 1)
    rows = np.arange(len(prepared.stars))
    torch.manual_seed(seed)
    recipe = dataclasses.replace(PAPER, modality=modality, image_backbone="resnet18", num_layers=1)
    classifier = Classifier(recipe)
    if prepared.spectra is not None:
        classifier.standardise.fit(prepared.spectra[rows])
    contents = checkpoint_contents()
    contents["config"]["training_id"] = f"{modality} {seed}"
    contents["splits"]["train"] = [list(star) for star in prepared.stars]
    save_checkpoint(path, classifier, **contents | {"references": fit_references(prepared, rows)})
    return path
