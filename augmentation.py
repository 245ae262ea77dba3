"""Random changes of the training stars, drawn anew for each batch, on the device that the stars are on.

Spectrum, image and label of a star are mixed with those of a star of the same or an adjacent subclass; spectra are
shifted and get more noise; images are rotated and mirrored. The subclass depends on none of these. Random numbers come
from torch's default generator of the device.
"""

import torch
from torch import Tensor

from catalog import CLASS_NAMES
from dataset import Batch
from preparation import SPECTRUM_LENGTH, noise_of
from recipe import Recipe


def augment(batch: Batch, recipe: Recipe) -> Batch:
    """The batch, changed as the recipe says."""
    if recipe.mixup:
        batch = mix(batch, recipe.mixup)
    spectra, images, image_mask = batch.spectra, batch.images, batch.image_mask
    if spectra is not None and recipe.spectrum_shift:
        spectra = shift(spectra, recipe.spectrum_shift)
    if spectra is not None and recipe.spectrum_tilt:
        spectra = tilt(spectra, recipe.spectrum_tilt)
    if spectra is not None and recipe.spectrum_noise:
        spectra = add_noise(spectra, recipe.spectrum_noise)
    if images is not None and recipe.rotate_and_flip:
        images = rotate_and_flip(images)
    if images is not None and recipe.image_dropout:
        image_mask = torch.rand(len(images), device=images.device) >= recipe.image_dropout
    return batch._replace(spectra=spectra, images=images, image_mask=image_mask)


def mix(batch: Batch, max_weight: float) -> Batch:
    """Mixup (Zhang et al. 2018) with a random star of the same or an adjacent class in the batch.

    The other star's weight is uniform from 0 to `max_weight`. Subclasses follow each other without a step: an M2 mixed
    with an M3 is the spectrum of a star between the two, or of a close pair.
    """
    classes = batch.targets
    adjacent = (classes[:, None] - classes[None, :]).abs() <= 1  # a star may be mixed with itself
    partners = (torch.rand(adjacent.shape, device=classes.device) * adjacent).argmax(dim=1)
    weights = torch.rand(len(classes), device=classes.device) * max_weight
    spectra = images = None
    if batch.spectra is not None:
        share, (flux, ivar) = weights[:, None], batch.spectra.unbind(dim=1)
        good = (ivar > 0) & (ivar[partners] > 0)
        variance = (1 - share) ** 2 / ivar + share**2 / ivar[partners]
        mixed_ivar = torch.where(good, 1 / variance, 0.0)
        spectra = torch.stack([torch.lerp(flux, flux[partners], share), mixed_ivar], dim=1)
    if batch.images is not None:
        images = batch.images.float()
        images = torch.lerp(images, images[partners], weights[:, None, None, None])
    one_hot = (classes[:, None] == torch.arange(len(CLASS_NAMES), device=classes.device)).float()
    targets = torch.lerp(one_hot, one_hot[partners], weights[:, None])
    return batch._replace(spectra=spectra, images=images, targets=targets)


def shift(spectra: Tensor, largest: int) -> Tensor:
    """Spectra (B, 2, 3522), each shifted by up to `largest` whole pixels; the last pixel is repeated at the end."""
    shifts = torch.randint(-largest, largest + 1, (len(spectra), 1), device=spectra.device)
    pixels = (torch.arange(SPECTRUM_LENGTH, device=spectra.device) - shifts).clamp(0, SPECTRUM_LENGTH - 1)
    return spectra.gather(2, pixels[:, None].expand(-1, 2, -1))


def tilt(spectra: Tensor, deviation: float) -> Tensor:
    """Spectra (B, 2, 3522), each multiplied by the exponential of a random parabola: an error of the flux calibration."""
    x = torch.linspace(-1, 1, SPECTRUM_LENGTH, device=spectra.device)
    slope, bend = torch.randn(2, len(spectra), 1, device=spectra.device) * deviation
    factor = torch.exp(slope * x + bend * (x**2 - 1 / 3))
    return torch.stack([spectra[:, 0] * factor, spectra[:, 1] / factor**2], dim=1)


def add_noise(spectra: Tensor, most: float) -> Tensor:
    """Spectra (B, 2, 3522) with Gaussian noise of up to `most` times the noise that each pixel has."""
    flux, ivar = spectra.unbind(dim=1)
    level = torch.rand(len(spectra), 1, device=spectra.device) * most
    flux = flux + level * noise_of(ivar) * torch.randn_like(flux)
    return torch.stack([flux, ivar / (1 + level**2)], dim=1)


def rotate_and_flip(images: Tensor) -> Tensor:
    """Each image (B, 3, H, H) in one of its eight rotations and reflections: the sky has no up and no left."""
    transposed, mirrored, upended = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(transposed, images.transpose(2, 3), images)
    images = torch.where(mirrored, images.flip(3), images)
    return torch.where(upended, images.flip(2), images)
