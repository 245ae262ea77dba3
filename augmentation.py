"""What training changes in its stars from epoch to epoch.

Each star is blended with another one of its own or of an adjacent subclass, and so is its label. All else changes
nothing that the subclass depends on: images are turned and mirrored, or hidden; spectra are moved by a few pixels and
get more noise. What happens to a star is drawn for all stars at once, so that it depends neither on the batches nor
on the process.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import SPECTRUM_LENGTH

MIN_SHARE = 0.5  # of a star in its blend
SHARE_BITS = 7  # shares are multiples of 1/128: blends of 8-bit images fit into 16 bits, as 255 · 128 + 64 < 2¹⁵
MAX_SHIFT = 2  # pixels of 69 km/s; stars of the disc move at up to about 100 km/s along the line of sight
MAX_EXTRA_NOISE = 1.0  # in units of the noise that the spectrum has, as blended
NOISE_TABLE = 2**20  # normal deviates, of which each star gets a piece: quicker than drawing as many for each
NOISE_STRIDE = 8  # of the pixels, every eighth is enough to estimate the noise from
# Of the median noise, the least that a weight heeds: no star decides alone, not even one of which half is filled with
# straight lines, where no noise is found. Simulated stars of S/N 5 to 60 are all above it.
LEAST_NOISE = 0.2


class Augmentation(NamedTuple):
    """What happens to each of N stars in one epoch."""

    partners: Tensor  # (N,) which of the stars is blended in
    shares: Tensor  # (N,) MIN_SHARE…1: of the star itself
    image_seen: Tensor  # (N,) bool: whether the Transformer sees the image
    symmetries: Tensor  # (N,) 0…7: how the image is turned and mirrored; the sky has no up and no left
    shifts: Tensor  # (N,) pixels towards the red
    noise_levels: Tensor  # (N,) of the noise added, in units of what the spectrum has, as blended
    noise_starts: Tensor  # (N,) where that noise begins in the table
    noise_table: Tensor  # (NOISE_TABLE,), of all stars

    def of(self, positions: list[int]) -> "Augmentation":
        """That of some of the stars."""
        *parts, noise_table = self
        return Augmentation(*(part[positions] for part in parts), noise_table)


def draw_augmentation(classes: Tensor, image_dropout: float, *, seed: int, epoch: int) -> Augmentation:
    """For stars of these classes (N,), the image hidden of that fraction."""
    stars, generator = len(classes), torch.Generator().manual_seed(seed + epoch)
    by_class = classes.argsort(stable=True)
    first = torch.searchsorted(classes[by_class], classes - 1)
    end = torch.searchsorted(classes[by_class], classes + 1, right=True)
    place = torch.rand(stars, generator=generator, dtype=torch.float64)  # float32 could be rounded up to `end`
    return Augmentation(
        partners=by_class[first + (place * (end - first)).long()],
        shares=torch.randint(round(MIN_SHARE * 2**SHARE_BITS), 2**SHARE_BITS + 1, (stars,), generator=generator)
        / 2**SHARE_BITS,
        image_seen=torch.rand(stars, generator=generator) >= image_dropout,
        symmetries=torch.randint(8, (stars,), generator=generator),
        shifts=torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (stars,), generator=generator),
        noise_levels=torch.rand(stars, generator=generator) * MAX_EXTRA_NOISE,
        noise_starts=torch.randint(NOISE_TABLE - SPECTRUM_LENGTH + 1, (stars,), generator=generator),
        noise_table=torch.randn(NOISE_TABLE, generator=torch.Generator().manual_seed(seed)),
    )


def blend(own: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """Of each star (N, L) its share (N,), and the rest of its partner.

    Mixup (Zhang et al. 2018) where a mixture is something that exists: subclasses follow each other without a step, and
    what is blended of an M2 and an M3 is the spectrum of a star between the two, or of a close pair.
    """
    return torch.lerp(partners.to(shares.dtype), own.to(shares.dtype), shares[:, None])


def blend_images(own: Tensor, partners: Tensor, shares: Tensor) -> Tensor:
    """The same of images (N, 3, H, H), uint8: in integers, one at a time so that they stay in the processor's cache."""
    blended = torch.empty_like(own)
    weights = (shares * 2**SHARE_BITS).to(torch.int16).numpy()
    for image, partner, weight, target in zip(own.numpy(), partners.numpy(), weights, blended.numpy(), strict=True):
        mixture = image * weight
        mixture += partner * (2**SHARE_BITS - weight)
        mixture += 2 ** (SHARE_BITS - 1)  # to the nearest integer
        mixture >>= SHARE_BITS
        target[:] = mixture
    return blended


def turn_images(images: Tensor, symmetries: Tensor) -> Tensor:
    """Each image (B, 3, H, H) turned by k % 4 quarter turns, and mirrored if its k is 4 or more."""
    turned = torch.empty_like(images)
    # NumPy turns and mirrors without copying, so that each image is copied once.
    for image, target, k in zip(images.numpy(), turned.numpy(), symmetries.tolist(), strict=True):
        view = np.rot90(image, k % 4, axes=(1, 2))
        target[:] = view[:, :, ::-1] if k >= 4 else view
    return turned


def estimate_noise(spectra: Tensor) -> Tensor:
    """(B, 1): the standard deviation of a pixel of each spectrum (B, L) by DER_SNR (Stoehr et al. 2008), from second
    differences over five pixels; their median ignores lines and cosmic rays, which touch few pixels."""
    left, centre, right = (spectra[:, start : start + spectra.shape[1] - 4 : NOISE_STRIDE] for start in (0, 2, 4))
    return 1.4826 / math.sqrt(6) * (2 * centre - left - right).abs().median(dim=1, keepdim=True).values


def inverse_variances(spectra: Tensor) -> Tensor:
    """(B, 1): what each spectrum (B, L) counts for among them; one of the median noise counts for 1."""
    noise = estimate_noise(spectra)
    return (noise / noise.median().clamp(min=1e-6)).clamp(min=LEAST_NOISE) ** -2


def shift_and_add_noise(spectra: Tensor, augmentation: Augmentation) -> Tensor:
    """Spectra (B, 3522), each moved, with its last pixel repeated at the end, and with Gaussian noise, which is the
    same over the whole spectrum."""
    pixels = (torch.arange(SPECTRUM_LENGTH) - augmentation.shifts[:, None]).clamp(0, SPECTRUM_LENGTH - 1)
    noise = augmentation.noise_table.unfold(0, SPECTRUM_LENGTH, 1)[augmentation.noise_starts]
    return spectra.gather(1, pixels) + augmentation.noise_levels[:, None] * estimate_noise(spectra) * noise
