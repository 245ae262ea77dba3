"""Is a star unlike those that a network was trained on? A network gives every input a class: a galaxy, too.

    references = fit_references(train_loader)                        # train.py: into the checkpoint
    outlier_score("spectrum", spectra, references["spectrum"])          # predict.py: (B,), flagged above 1

Of each input a few numbers are kept: of a spectrum its mean flux in 32 bands, of an image the median
brightness of 6 rings around its centre in 3 colours, which neighbours in the field hardly change. A star's
Mahalanobis distance from the training stars (covariance after Ledoit & Wolf 2004, J. Multivariate Analysis
88, 365, sound also for fewer stars than numbers) is divided by the one that 99.5 % of these keep within.
"""

import numpy as np
import torch
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import KFold
from torch import Tensor

from cache import PreparedStars
from sdss_files import CUTOUT_SCALE, IMAGE_SIZE

BANDS = 32
RING_EDGES = (0.0, 1.0, 2.0, 3.0, 4.5, 7.0, 12.0)  # arcsec from the star
ORDINARY = 0.995  # fraction of the training stars that is taken for ordinary


def summarise_spectra(spectra: Tensor) -> Tensor:
    """(B, 2, 3522) → (B, 32): the mean flux of bands of equal width in log wavelength."""
    return torch.stack([band.mean(dim=1) for band in spectra[:, 0].tensor_split(BANDS, dim=1)], dim=1)


def summarise_images(images: Tensor) -> Tensor:
    """(B, 3, 128, 128) → (B, 18): the median brightness of rings around the centre, by colour."""
    offset = (torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2) * CUTOUT_SCALE
    radius = torch.hypot(offset[:, None], offset)
    rings = [(inner <= radius) & (radius < outer) for inner, outer in zip(RING_EDGES, RING_EDGES[1:], strict=False)]
    return torch.cat([images[:, :, ring].float().median(dim=2).values for ring in rings], dim=1)


SUMMARIES = {"spectrum": summarise_spectra, "image": summarise_images}


def fit_references(prepared: PreparedStars, rows: np.ndarray) -> dict[str, dict[str, Tensor]]:
    """The reference that `outlier_score` compares with, for each input of the training stars, `rows` of the prepared
    ones."""
    references = {}
    for kind, inputs in (("spectrum", prepared.spectra), ("image", prepared.images)):
        if inputs is not None:
            summaries = [SUMMARIES[kind](inputs[some]) for some in np.array_split(rows, len(rows) // 1024 + 1)]
            references[kind] = _fit(torch.cat(summaries))
    return references


def _fit(summaries: Tensor) -> dict[str, Tensor]:
    rows = summaries.double().numpy()
    # Each star is measured by a fit without it: stars lie closer to a mean that they made themselves.
    folds = KFold(min(5, len(rows)), shuffle=True, random_state=0).split(rows)
    distances = [LedoitWolf().fit(rows[others]).mahalanobis(rows[held_out]) for others, held_out in folds]
    covariance = LedoitWolf().fit(rows)
    limit = np.quantile(np.sqrt(np.concatenate(distances)), ORDINARY)
    arrays = {"mean": covariance.location_, "precision": covariance.precision_, "limit": limit}
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def outlier_score(kind: str, inputs: Tensor, reference: dict[str, Tensor]) -> Tensor:
    """(B,): the distance of these spectra or images from the training stars', 1 where 99.5 % of these are nearer."""
    offset = SUMMARIES[kind](inputs).double() - reference["mean"]
    distance = torch.einsum("bi,ij,bj->b", offset, reference["precision"], offset).clamp(min=0).sqrt()
    return distance / reference["limit"]
