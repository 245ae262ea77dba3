"""Random augmentation of the training stars, drawn anew for each batch, on the stars' device.

Images are rotated, mirrored or hidden; spectra and labels stay. Random numbers come from torch's default generator of
the device.
"""

import torch
from torch import Tensor

from preparation import Batch
from recipe import Recipe


def augment(batch: Batch, recipe: Recipe) -> Batch:
    """The batch, changed as the recipe says."""
    if batch.images is not None and recipe.rotate_and_flip:
        batch = batch._replace(images=rotate_and_flip(batch.images))
    if recipe.modality == "fusion" and recipe.image_dropout:
        image_mask = torch.rand(len(batch.images), device=batch.images.device) >= recipe.image_dropout
        batch = batch._replace(image_mask=image_mask)
    return batch


def rotate_and_flip(images: Tensor) -> Tensor:
    """Each image (B, 3, H, H) in one of its eight rotations and reflections: the sky has no up and no left."""
    transposed, mirrored, upended = torch.rand(3, len(images), 1, 1, 1, device=images.device) < 0.5
    images = torch.where(transposed, images.transpose(2, 3), images)
    images = torch.where(mirrored, images.flip(3), images)
    return torch.where(upended, images.flip(2), images)
