"""Scores, and the stars that they are taken over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from common import random_stars

import evaluation
from classifier import Classifier
from dataset import StarLoader
from evaluation import Evaluation, evaluate
from loss_sic import loss_sic
from model import contrastive_logits
from recipe import PAPER

SMALL = replace(PAPER, image_backbone="resnet18", num_layers=1, sic_weight=0.5, batch_size=8)


def scores(targets: list[int], predictions: list[int]) -> dict[str, float]:
    return Evaluation(0.0, np.array(targets), np.array(predictions)).scores()


def test_scores_are_weighted_by_class_frequency():
    found = scores([0, 0, 0, 1, 1, 4], [0, 0, 1, 1, 2, 0])
    by_class = (3 / 6) * (2 / 3) + (2 / 6) * (1 / 2)  # precision, recall and so F1 of M0 are 2/3, of M1 1/2, of M4 0
    expected = {"accuracy": 3 / 6, "precision": by_class, "recall": by_class, "f1": by_class}
    assert found == pytest.approx(expected | {"f1_macro": (2 / 3 + 1 / 2) / 3, "within_one_subclass": 5 / 6})


def test_a_perfect_score_on_three_classes_is_one():
    assert set(scores([0, 1, 3, 3], [0, 1, 3, 3]).values()) == {1.0}


def test_the_interval_of_a_score_is_that_of_its_sampling():
    """Of 400 stars nine in ten are right: a fraction whose standard deviation is 0.015."""
    targets = np.arange(400) % 5
    found = Evaluation(0.0, targets, np.where(np.arange(400) < 40, (targets + 1) % 5, targets))
    assert found.intervals()["accuracy"] == pytest.approx([0.9 - 1.96 * 0.015, 0.9 + 1.96 * 0.015], abs=0.006)
    final = found.final_metrics("val", "400 validation stars")
    assert final["final_val_accuracy"] == 0.9 and "M3" in found.report()
    assert {"final_val_f1_weighted", "final_val_f1_macro", "final_val_within_one_subclass"} <= final.keys()


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SMALL)


@pytest.mark.parametrize("at_once", [1, 16, 512])
def test_the_loss_is_by_star_and_contrasts_one_batch_of_training(classifier, monkeypatch, at_once):
    """However many stars the network takes at once."""
    monkeypatch.setattr(evaluation, "STARS_AT_ONCE", {"cpu": at_once})
    prepared = random_stars(4)
    loader = StarLoader(prepared, np.arange(20), torch.device("cpu"))
    found = evaluate(classifier, loader)
    total, predictions = 0.0, []
    with torch.inference_mode():
        for batch in loader.in_order(8):
            *features, fuse_logits = classifier.eval()(batch)
            loss = loss_sic(contrastive_logits(*features), fuse_logits, batch.targets, sic_weight=0.5)
            total += loss.item() * len(batch.targets)
            predictions += fuse_logits.argmax(dim=1).tolist()
    assert found.loss == pytest.approx(total / 20, rel=1e-5)
    assert found.predictions.tolist() == predictions and found.targets.tolist() == prepared.targets.tolist()


def test_evaluation_changes_nothing(classifier):
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.train()
    evaluate(classifier, StarLoader(random_stars(2), np.arange(10), torch.device("cpu")))
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
