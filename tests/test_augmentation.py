"""What training changes in its stars, and that it leaves what tells their subclass."""

import pytest
import torch

from augmentation import (
    MAX_EXTRA_NOISE,
    MAX_SHIFT,
    NOISE_TABLE,
    draw_augmentation,
    estimate_noise,
    shift_and_add_noise,
    turn_images,
)
from data import SPECTRUM_LENGTH


def test_each_star_gets_its_own_of_all_that_can_happen():
    augmentation = draw_augmentation(4000, 0.3, seed=0, epoch=1)
    assert augmentation.image_seen.float().mean() == pytest.approx(0.7, abs=0.03)
    assert augmentation.symmetries.bincount().tolist() == pytest.approx([500] * 8, rel=0.2)
    shifts, counts = augmentation.shifts.unique(return_counts=True)
    assert shifts.tolist() == list(range(-MAX_SHIFT, MAX_SHIFT + 1)) and counts.min() > 700
    assert augmentation.noise_levels.min() >= 0 and 0.99 < augmentation.noise_levels.max() / MAX_EXTRA_NOISE < 1
    assert augmentation.noise_starts.max() + SPECTRUM_LENGTH <= NOISE_TABLE
    some = augmentation.of([5, 3])
    assert torch.equal(some.symmetries, augmentation.symmetries[[5, 3]])


def test_images_are_turned_and_mirrored_in_eight_ways():
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    turned = turn_images(image.expand(8, -1, -1, -1), torch.arange(8))
    symmetries = [image.rot90(k, (1, 2)).flip(axes) for k in range(4) for axes in ((), (2,))]
    assert all(sum(torch.equal(one, symmetry) for one in turned) == 1 for symmetry in symmetries)


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_the_noise_of_a_spectrum_is_found_beside_its_lines(noise):
    spectra = 1 + noise * torch.randn(200, SPECTRUM_LENGTH, generator=torch.Generator().manual_seed(0))
    spectra += torch.linspace(-0.5, 0.5, SPECTRUM_LENGTH)  # a continuum
    spectra[:, 500:600] -= 0.8  # a band
    spectra[:, ::400] += 5  # cosmic rays
    found = estimate_noise(spectra)
    assert found.shape == (200, 1)
    assert found.mean().item() == pytest.approx(noise, rel=0.05) and found.std().item() < 0.1 * noise


def test_spectra_are_moved_and_get_noise_in_proportion_to_their_own():
    random = torch.Generator().manual_seed(1)
    own = torch.tensor([0.0, 0.01]).repeat_interleave(100)[:, None]
    spectra = 1 + own * torch.randn(200, SPECTRUM_LENGTH, generator=random)
    spectra[:, 1000:] += 10
    augmentation = draw_augmentation(200, 0.5, seed=0, epoch=1)
    changed = shift_and_add_noise(spectra, augmentation)
    assert torch.equal(changed.diff().argmax(dim=1) + 1, 1000 + augmentation.shifts)
    moved = shift_and_add_noise(spectra, augmentation._replace(noise_levels=torch.zeros(200)))
    added = (changed - moved).std(dim=1)
    assert added[:100].max() == 0  # of spectra without noise
    assert torch.allclose(added[100:], 0.01 * augmentation.noise_levels[100:], rtol=0.3, atol=1e-6)
