"""Random changes of the training stars' images."""

import dataclasses

import pytest
import torch

from augmentation import augment, rotate_and_flip
from dataset import Batch
from preparation import SPECTRUM_LENGTH
from recipe import IMPROVED, PAPER


def batch_of(count: int) -> Batch:
    torch.manual_seed(0)
    spectra = torch.ones(count, 2, SPECTRUM_LENGTH)
    return Batch(spectra, torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8), torch.randint(5, (count,)))


def test_the_papers_recipe_changes_nothing():
    batch = batch_of(8)
    assert augment(batch, PAPER) == batch


@pytest.mark.parametrize("modality", ["spectrum", "image"])
def test_one_input_is_changed_without_the_other(modality):
    batch = batch_of(8)._replace(**({"images": None} if modality == "spectrum" else {"spectra": None}))
    changed = augment(batch, dataclasses.replace(IMPROVED, modality=modality))
    assert (changed.spectra is None, changed.images is None) == (batch.spectra is None, batch.images is None)
    assert changed.image_mask is None  # the only input is never hidden


def test_images_are_rotated_and_flipped_in_all_eight_ways():
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    torch.manual_seed(0)
    changed = rotate_and_flip(image.expand(400, -1, -1, -1))
    ways = [image.rot90(k, (1, 2)).flip(axes) for k in range(4) for axes in ((), (2,))]
    counts = [sum(torch.equal(one, way) for one in changed) for way in ways]
    assert sum(counts) == 400 and min(counts) > 25


def test_a_fraction_of_the_images_is_hidden():
    changed = augment(batch_of(2000), dataclasses.replace(PAPER, image_dropout=0.3))
    assert changed.image_mask.float().mean().item() == pytest.approx(0.7, abs=0.04)
