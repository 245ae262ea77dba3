"""What training changes in its stars, and that a label changes only with its star."""

import pytest
import torch

from augmentation import (
    MAX_EXTRA_NOISE,
    MAX_SHIFT,
    MIN_SHARE,
    NOISE_TABLE,
    blend,
    blend_images,
    draw_augmentation,
    estimate_noise,
    shift_and_add_noise,
    turn_images,
)
from data import SPECTRUM_LENGTH


def test_each_star_gets_its_own_of_all_that_can_happen():
    augmentation = draw_augmentation(torch.zeros(4000, dtype=torch.int64), 0.3, seed=0, epoch=1)
    assert augmentation.image_seen.float().mean() == pytest.approx(0.7, abs=0.03)
    assert augmentation.symmetries.bincount().tolist() == pytest.approx([500] * 8, rel=0.2)
    shifts, counts = augmentation.shifts.unique(return_counts=True)
    assert shifts.tolist() == list(range(-MAX_SHIFT, MAX_SHIFT + 1)) and counts.min() > 700
    assert augmentation.noise_levels.min() >= 0 and 0.99 < augmentation.noise_levels.max() / MAX_EXTRA_NOISE < 1
    assert augmentation.noise_starts.max() + SPECTRUM_LENGTH <= NOISE_TABLE
    some = augmentation.of([5, 3])
    assert torch.equal(some.symmetries, augmentation.symmetries[[5, 3]])


def test_a_partner_is_any_star_of_the_own_or_an_adjacent_class():
    classes = torch.randint(5, (5000,), generator=torch.Generator().manual_seed(0))
    augmentation = draw_augmentation(classes, 0.5, seed=0, epoch=1)
    for k in range(5):
        adjacent = (classes - k).abs() <= 1
        found = classes[augmentation.partners[classes == k]]
        expected = classes[adjacent].bincount(minlength=5) / adjacent.sum()
        assert torch.allclose(found.bincount(minlength=5) / len(found), expected, atol=0.05)
        assert (expected == 0).equal(found.bincount(minlength=5) == 0)
    assert len(augmentation.partners.unique()) > 3000  # of 5000 drawn, 1 - 1/e are different
    assert augmentation.shares.min() == MIN_SHARE and augmentation.shares.max() == 1
    assert augmentation.shares.mean() == pytest.approx((1 + MIN_SHARE) / 2, abs=0.01)


def test_a_blend_has_its_share_of_each():
    own, partners = torch.tensor([[0, 200], [10, 10]]), torch.tensor([[100, 0], [30, 10]])
    assert torch.equal(blend(own, partners, torch.tensor([0.75, 0.5])), torch.tensor([[25.0, 150.0], [20.0, 10.0]]))


def test_images_are_blended_as_spectra_are_to_the_nearest_integer():
    random = torch.Generator().manual_seed(0)
    own, partners = torch.randint(256, (2, 65, 3, 8, 8), dtype=torch.uint8, generator=random)
    own[0], partners[0] = 255, 255
    shares = torch.arange(64, 129) / 128
    expected = blend(own.flatten(1), partners.flatten(1), shares)
    blended = blend_images(own, partners, shares)
    assert blended.dtype == torch.uint8 and (blended.flatten(1) - expected).abs().max() <= 0.5
    assert torch.equal(blended[-1], own[-1])


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
    augmentation = draw_augmentation(torch.zeros(200, dtype=torch.int64), 0.5, seed=0, epoch=1)
    changed = shift_and_add_noise(spectra, augmentation)
    assert torch.equal(changed.diff().argmax(dim=1) + 1, 1000 + augmentation.shifts)
    moved = shift_and_add_noise(spectra, augmentation._replace(noise_levels=torch.zeros(200)))
    added = (changed - moved).std(dim=1)
    assert added[:100].max() == 0  # of spectra without noise
    assert torch.allclose(added[100:], 0.01 * augmentation.noise_levels[100:], rtol=0.3, atol=1e-6)
