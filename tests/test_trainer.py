"""One training step: its loss, its gradients, its schedule."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import random_stars
from torch.nn.utils import get_total_norm

from classifier import Classifier
from dataset import Batch, StarLoader
from loss_sic import loss_sic
from model import contrastive_logits
from recipe import IMPROVED, PAPER, Recipe
from train import train_one_epoch
from trainer import Trainer, make_optimizer, rotate_and_flip, warmup_and_cosine

SPECTRUM = replace(PAPER, modality="spectrum", num_layers=1)
FUSION = replace(PAPER, image_backbone="resnet18", num_layers=1)


def batch_of(count: int) -> Batch:
    prepared = random_stars(count // 5)
    return Batch(prepared.spectra, prepared.images, prepared.targets)


def make_trainer(recipe: Recipe, epochs: int = 10, steps_per_epoch: int = 5) -> Trainer:
    torch.manual_seed(0)
    return Trainer(Classifier(recipe).train(), epochs, steps_per_epoch)


def test_a_step_follows_the_gradient_of_the_loss():
    trainer, batch = make_trainer(FUSION), batch_of(10)
    *features, fuse_logits = copy.deepcopy(trainer.classifier)(batch)
    expected = loss_sic(contrastive_logits(*features), fuse_logits, batch.targets)
    losses = [trainer.step(batch).sum().item() for _ in range(8)]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5) and losses[-1] < 0.8 * losses[0]


def test_images_are_rotated_and_flipped_in_all_eight_ways():
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    torch.manual_seed(0)
    changed = rotate_and_flip(image.expand(400, -1, -1, -1))
    ways = [image.rot90(k, (1, 2)).flip(axes) for k in range(4) for axes in ((), (2,))]
    counts = [sum(torch.equal(one, way) for one in changed) for way in ways]
    assert sum(counts) == 400 and min(counts) > 25


@pytest.mark.parametrize("rotate_and_flip", [0, 1])
def test_a_step_augments_if_the_recipe_says_so(rotate_and_flip):
    trainer = make_trainer(replace(FUSION, rotate_and_flip=rotate_and_flip, learning_rate=1e-9))
    batch = batch_of(10)
    losses = [trainer.step(batch).sum().item() for _ in range(3)]
    assert (max(losses) - min(losses) > 1e-3) == bool(rotate_and_flip)


def test_the_augmentation_of_an_epoch_follows_from_the_seed_of_the_run():
    """Not from the state of torch's generator, which a resumed run has not."""
    losses, loader = [], StarLoader(random_stars(4), np.arange(20), torch.device("cpu"))
    for state in (1, 2):
        trainer = make_trainer(replace(FUSION, rotate_and_flip=1))
        torch.manual_seed(state)
        losses.append(train_one_epoch(trainer, loader, 1, 42, ""))
    assert losses[0] == losses[1]


def test_weights_decay_but_biases_norms_and_embeddings_do_not():
    network = Classifier(FUSION).network
    decayed, others = make_optimizer(network, 1e-4, 0.01).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    names = {parameter: name for name, parameter in network.named_parameters()}
    kept = {names.pop(parameter) for parameter in others["params"]}
    assert {"cls_token", "position_embedding", "token_type_embedding.weight", "classifier.bias"} <= kept
    assert {"transformer.norm.weight", "image_encoder.model.1.weight", "image_encoder.fc.bias"} <= kept
    assert {names.pop(parameter).rpartition(".")[2] for parameter in decayed["params"]} == {"weight", "in_proj_weight"}
    assert not names


def test_the_learning_rate_warms_up_then_falls_to_zero():
    trainer, rates = make_trainer(SPECTRUM, epochs=10, steps_per_epoch=2), []
    for _ in range(20):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert rates[:4] == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4])
    assert rates[4] == pytest.approx(1e-4) and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.5e-4) and trainer.optimizer.param_groups[1]["lr"] == pytest.approx(0, abs=1e-9)


def test_the_warm_up_is_at_most_a_third_of_a_run():
    (rate, *_) = make_trainer(SPECTRUM, epochs=3, steps_per_epoch=10).scheduler.lr_lambdas
    assert rate(8) == pytest.approx(0.9) and rate(9) == 1.0 and rate(11) < 1.0
    assert warmup_and_cosine(0, 10)(0) == 1.0 and warmup_and_cosine(1, 1)(0) == 1.0


def test_gradients_are_clipped_together():
    recipe = replace(FUSION, max_gradient_norm=0.01, learning_rate=1e-9)
    trainer = make_trainer(recipe)
    trainer.step(batch_of(10))
    assert get_total_norm(p.grad for p in trainer.classifier.parameters()).item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("recipe", [PAPER, IMPROVED], ids=["paper", "improved"])
def test_a_trainer_goes_on_from_its_state(recipe):
    recipe, batch = replace(recipe, image_backbone="resnet18", num_layers=1, warmup_epochs=0.2), batch_of(10)
    whole, other = make_trainer(recipe), make_trainer(recipe)
    whole.step(batch)
    states = whole.state_dict()
    for trainer in (whole, other):
        if trainer is other:
            other.load_state_dict(states)
        torch.manual_seed(1)
        for _ in range(2):
            trainer.step(batch)
    states = other.classifier.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in whole.classifier.state_dict().items())
    assert whole.scheduler.last_epoch == other.scheduler.last_epoch == 3


def test_a_state_is_a_copy():
    trainer, batch = make_trainer(SPECTRUM), batch_of(5)
    states = trainer.state_dict()
    before = copy.deepcopy(states)
    trainer.step(batch)
    torch.testing.assert_close(states, before, rtol=0, atol=0)


def test_a_state_stays_as_it_was_when_training_goes_on_from_it():
    trainer, batch = make_trainer(SPECTRUM), batch_of(5)
    trainer.step(batch)
    states = trainer.state_dict()
    before = copy.deepcopy(states)
    other = make_trainer(SPECTRUM)
    other.load_state_dict(states)
    other.step(batch)
    torch.testing.assert_close(states["optimizer"]["state"], before["optimizer"]["state"], rtol=0, atol=0)
    torch.testing.assert_close(states["classifier"], before["classifier"], rtol=0, atol=0)


def test_a_loss_that_is_not_a_number_is_returned_as_it_is():
    batch = batch_of(5)
    batch.spectra[0, 0, 0] = torch.nan
    assert math.isnan(make_trainer(SPECTRUM).step(batch).sum().item())
