"""Scores, and the stars that they are taken over."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import random_stars

import evaluation
from classifier import Classifier
from dataset import StarLoader
from evaluation import Evaluation, evaluate, fit_temperature, retrieval_accuracy
from loss_sic import loss_terms
from model import contrastive_logits
from recipe import PAPER

SMALL = replace(PAPER, image_backbone="resnet18", num_layers=1, sic_weight=0.5, batch_size=8)


def scored(targets: list[int], predictions: list[int]) -> Evaluation:
    return Evaluation(np.array(targets), np.eye(5)[predictions])


def scores(targets: list[int], predictions: list[int]) -> dict[str, float]:
    return scored(targets, predictions).scores()


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
    found = scored(targets, np.where(np.arange(400) < 40, (targets + 1) % 5, targets))
    assert found.intervals()["accuracy"] == pytest.approx([0.9 - 1.96 * 0.015, 0.9 + 1.96 * 0.015], abs=0.006)


def test_the_record_has_the_scores_of_each_class_as_numbers():
    final = scored([0, 0, 0, 1, 1, 4], [0, 0, 1, 1, 2, 0]).final_metrics("val", "6 validation stars", 1.0)
    assert json.loads(json.dumps(final)) == final
    assert {"final_val_f1_weighted", "final_val_f1_macro", "final_val_within_one_subclass"} <= final.keys()
    expected = {"precision": 1 / 2, "recall": 1 / 2, "f1-score": 1 / 2, "support": 2}
    assert final["final_val_by_class"]["M1"] == pytest.approx(expected) and len(final["final_val_by_class"]) == 5
    matrix = [[2, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5, [1, 0, 0, 0, 0]]
    assert final["final_val_confusion_matrix"] == matrix


# Calibration


@pytest.fixture(scope="module")
def overconfident() -> Evaluation:
    """2,000 stars whose logits are three times those by which their classes were drawn."""
    random = np.random.default_rng(0)
    logits = -1.2 * (np.arange(5) - random.uniform(0, 4, (2000, 1))) ** 2
    return Evaluation((logits + random.gumbel(size=logits.shape)).argmax(axis=1), 3 * logits)


def test_the_temperature_makes_probabilities_the_fractions_that_are_right(overconfident):
    temperature = fit_temperature(overconfident.logits, overconfident.targets)
    assert temperature == pytest.approx(3, abs=0.3)
    assert overconfident.calibration_error(1.0) > 0.15 and overconfident.calibration_error(temperature) < 0.04
    final = overconfident.final_metrics("test", "2000 stars", temperature)
    assert final["final_test_calibration_error"] < final["final_test_calibration_error_before"]
    probability, right, stars = overconfident.reliability(temperature)
    assert stars.sum() == 2000 and (right * stars).sum() == pytest.approx(2000 * overconfident.scores()["accuracy"])
    assert np.all(np.diff(probability) > 0)


def test_a_few_stars_that_are_all_right_do_not_make_probabilities_certain():
    logits = 2.0 * np.eye(5)[np.arange(10) % 5]  # 0.65 for the right class
    temperature = fit_temperature(logits, np.arange(10) % 5)
    assert 0.2 < temperature < 0.9


def test_the_calibration_error_is_the_distance_of_probability_and_fraction_right():
    """Of two bins of 20 stars, 0.6 and 0.8, and 0.9 and 1."""
    logits = np.log([[0.6, 0.1, 0.1, 0.1, 0.1]] * 20 + [[0.9, 0.025, 0.025, 0.025, 0.025]] * 20)
    found = Evaluation(np.array([0] * 16 + [1, 2, 3, 4] + [0] * 20), logits)
    assert found.calibration_error(1.0) == pytest.approx(0.5 * (0.8 - 0.6) + 0.5 * (1 - 0.9))


# One pass over the stars


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
    total, own, logits = np.zeros(2), 0, []
    with torch.inference_mode():
        for batch in loader.in_order(8):
            *features, fuse_logits = classifier.eval()(batch)
            align_logits = contrastive_logits(*features)
            losses = loss_terms(align_logits, fuse_logits, batch.targets, sic_weight=0.5)
            total += np.array(losses) * len(batch.targets)
            own += sum(int(row.argmax()) == i for i, row in enumerate(align_logits))
            logits += fuse_logits.tolist()
    assert found.losses == pytest.approx(total / 20, rel=1e-5) and found.retrieval_accuracy == pytest.approx(own / 20)
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    assert found.targets.tolist() == prepared.targets.tolist()
    assert found.predictions.tolist() == np.argmax(logits, axis=1).tolist()


def test_an_image_finds_its_spectrum_where_no_other_is_closer():
    images = torch.eye(4, 512)
    assert retrieval_accuracy(images, images) == 1 and retrieval_accuracy(images, images.roll(1, dims=0)) == 0
    assert retrieval_accuracy(images, images[[0, 1, 3, 2]]) == 0.5


def test_a_network_of_one_input_has_no_contrast():
    classifier = Classifier(replace(SMALL, modality="spectrum"))
    found = evaluate(classifier, StarLoader(random_stars(2)._replace(images=None), np.arange(10), torch.device("cpu")))
    assert found.losses[1] == 0 and found.retrieval_accuracy is None


def test_evaluation_changes_nothing(classifier):
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.train()
    evaluate(classifier, StarLoader(random_stars(2), np.arange(10), torch.device("cpu")))
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
