"""Random changes of the training stars: a label changes only with its star, and noise is carried through."""

import dataclasses

import pytest
import torch

from augmentation import augment, mix, rotate_and_flip
from dataset import Batch
from preparation import SPECTRUM_LENGTH
from recipe import IMPROVED, PAPER


def batch_of(count: int, noise: float = 0.1) -> Batch:
    torch.manual_seed(0)
    flux = 1 + noise * torch.randn(count, SPECTRUM_LENGTH)
    spectra = torch.stack([flux, torch.full_like(flux, noise**-2)], dim=1)
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


# Mixup


def test_label_spectrum_and_image_are_mixed_by_one_weight():
    batch, value = batch_of(400), torch.arange(400) % 5
    batch = Batch(
        torch.stack([20.0 * value, torch.ones(400)], dim=1)[:, :, None].expand(-1, -1, SPECTRUM_LENGTH),
        (20 * value).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).to(torch.uint8),
        value,
    )
    mixed = mix(batch, 0.5)
    expected = 20 * mixed.targets @ torch.arange(5.0)
    assert torch.allclose(mixed.targets.sum(dim=1), torch.ones(400))
    assert (mixed.targets.gather(1, value[:, None]) >= 0.5).all() and 0.5 < mixed.targets.max(dim=1).values.min() < 0.52
    assert torch.allclose(mixed.spectra[:, 0], expected[:, None], atol=1e-3)
    assert torch.allclose(mixed.images, expected[:, None, None, None], atol=1e-3)
    # Two of the noise 1: (1 − w)² + w².
    other = 1 - mixed.targets.gather(1, value[:, None])
    between = (mixed.targets > 0).sum(dim=1) == 2  # else the partner is of the own class: the weight is not seen
    assert torch.allclose(1 / mixed.spectra[between, 1], ((1 - other) ** 2 + other**2)[between], atol=1e-3)


def test_a_partner_is_of_the_own_or_an_adjacent_class():
    batch = batch_of(500)
    mixed = mix(batch, 1.0).targets
    classes = torch.arange(5)
    for k in range(5):
        partners = mixed[batch.targets == k]
        assert torch.equal((partners > 0).any(dim=0), (classes - k).abs() <= 1)


def test_a_pixel_bad_in_either_star_is_bad_in_their_mixture():
    batch = batch_of(6)
    batch.spectra[:3, 1, 100] = 0
    batch = batch._replace(targets=torch.zeros(6, dtype=torch.int64))
    torch.manual_seed(1)
    mixed = mix(batch, 0.5)
    assert mixed.spectra.isfinite().all()
    assert not mixed.spectra[:3, 1, 100].any() and mixed.spectra[:, 1, 99].all()


# One star


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
