"""Random augmentation of the training stars, drawn anew for each batch, on the stars' device.

Spectrum, image and label of a star are mixed with those of a star of the same or an adjacent subclass; images are
rotated, mirrored or hidden. Random numbers come from torch's default generator of the device.
"""

import torch
from torch import Tensor

from catalog import CLASS_NAMES
from preparation import Batch
from recipe import Recipe


def augment(batch: Batch, recipe: Recipe) -> Batch:
    """The batch, changed as the recipe says."""
    if recipe.mixup:
        batch = mix(batch, recipe.mixup)
    if batch.images is not None and recipe.rotate_and_flip:
        batch = batch._replace(images=rotate_and_flip(batch.images))
    if recipe.modality == "fusion" and recipe.image_dropout:
        image_mask = torch.rand(len(batch.images), device=batch.images.device) >= recipe.image_dropout
        batch = batch._replace(image_mask=image_mask)
    return batch


def mix(batch: Batch, max_weight: float) -> Batch:
    """Mixup (Zhang et al. 2018) with a random star of the same or an adjacent class in the batch.

    The other star's weight is uniform from 0 to `max_weight`. Subclasses are a continuum: an M2 mixed with an M3 looks
    like a star between the two, or like a close pair.
    """
    classes = batch.targets
    adjacent = (classes[:, None] - classes[None, :]).abs() <= 1  # a star may be mixed with itself
    partners = (torch.rand(adjacent.shape, device=classes.device) * adjacent).argmax(dim=1)
    weights = torch.rand(len(classes), device=classes.device) * max_weight
    spectra = images = None
    if batch.spectra is not None:
        weight, (flux, ivar) = weights[:, None], batch.spectra.unbind(dim=1)
        good = (ivar > 0) & (ivar[partners] > 0)
        variance = (1 - weight) ** 2 / ivar + weight**2 / ivar[partners]
        mixed_ivar = torch.where(good, 1 / variance, 0.0)
        spectra = torch.stack([torch.lerp(flux, flux[partners], weight), mixed_ivar], dim=1)
    if batch.images is not None:
        images = batch.images.float()
        images = torch.lerp(images, images[partners], weights[:, None, None, None])
    one_hot = (classes[:, None] == torch.arange(len(CLASS_NAMES), device=classes.device)).float()
    targets = torch.lerp(one_hot, one_hot[partners], weights[:, None])
    return batch._replace(spectra=spectra, images=images, targets=targets)


def rotate_and_flip(images: Tensor) -> Tensor:
    """Each image (B, 3, H, H) in one of its eight rotations and reflections: the sky has no up and no left."""
    transposed, mirrored, upended = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(transposed, images.transpose(2, 3), images)
    images = torch.where(mirrored, images.flip(3), images)
    return torch.where(upended, images.flip(2), images)
