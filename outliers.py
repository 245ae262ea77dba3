"""Is a star unlike the training stars? A network gives every input a class, a galaxy too.

    references = fit_references(prepared, training_rows)                # train.py keeps them in the checkpoint
    score = outlier_score("spectra", spectra, references["spectra"])    # predict.py: (B,), an outlier above 1

Each input is summarised: a spectrum by its mean flux in 32 bands, an image by the median brightness of 6 rings around
its centre in 3 colours, which neighbours in the field hardly change. The score is the star's Mahalanobis
distance from the training stars over the distance that 99.5 % of these keep within. Their covariance is shrunk after
Ledoit & Wolf 2004 (J. Multivariate Analysis 88, 365), which also works for fewer stars than numbers.
"""

import numpy as np
import torch
from torch import Tensor

from cache import PreparedStars
from survey_files import CUTOUT_SCALE, IMAGE_SIZE

BANDS = 32
RING_EDGES = (0.0, 1.0, 2.0, 3.0, 4.5, 7.0, 12.0)  # arcsec from the star
ORDINARY = 0.995  # fraction of the training stars with a score below 1
FOLDS = 5
ROWS_AT_ONCE = 1024

References = dict[str, dict[str, Tensor]]  # by input, "spectra" and "images": mean, precision, limit


def summarise_spectra(spectra: Tensor) -> Tensor:
    """(B, 2, 3522) → (B, 32): the mean flux of bands of equal width in log wavelength."""
    return torch.stack([band.mean(dim=1) for band in spectra[:, 0].tensor_split(BANDS, dim=1)], dim=1)


def summarise_images(images: Tensor) -> Tensor:
    """(B, 3, 128, 128) → (B, 18): the median brightness of rings around the centre, by colour."""
    offset = (torch.arange(IMAGE_SIZE, device=images.device) - (IMAGE_SIZE - 1) / 2) * CUTOUT_SCALE
    radius = torch.hypot(offset[:, None], offset)
    rings = [(inner <= radius) & (radius < outer) for inner, outer in zip(RING_EDGES, RING_EDGES[1:], strict=False)]
    return torch.cat([images[:, :, ring].float().median(dim=2).values for ring in rings], dim=1)


SUMMARIES = {"spectra": summarise_spectra, "images": summarise_images}


def fit_references(prepared: PreparedStars, rows: np.ndarray) -> References:
    """The reference of each input for `outlier_score`, fitted to the training stars: `rows` of the prepared ones."""
    references = {}
    for kind, summarise in SUMMARIES.items():
        inputs = getattr(prepared, kind)
        if inputs is not None:
            parts = np.array_split(rows, len(rows) // ROWS_AT_ONCE + 1)
            references[kind] = _fit(torch.cat([summarise(inputs[part]) for part in parts]).double().numpy())
    return references


def _fit(summaries: np.ndarray) -> dict[str, Tensor]:
    """Mean, precision matrix and limit of the distance of the training stars' summaries (N, K)."""
    from sklearn.covariance import LedoitWolf  # here: it takes a second, which classification does not need
    from sklearn.model_selection import KFold

    # Cross-validated: a star lies closer to a mean that it is part of.
    folds = KFold(min(FOLDS, len(summaries)), shuffle=True, random_state=0).split(summaries)
    squares = [LedoitWolf().fit(summaries[others]).mahalanobis(summaries[held_out]) for others, held_out in folds]
    limit = np.quantile(np.sqrt(np.concatenate(squares)), ORDINARY)
    covariance = LedoitWolf().fit(summaries)
    arrays = {"mean": covariance.location_, "precision": covariance.precision_, "limit": limit}
    return {name: torch.as_tensor(array) for name, array in arrays.items()}


def outlier_score(kind: str, inputs: Tensor, reference: dict[str, Tensor]) -> Tensor:
    """(B,) float64 on the CPU: the distance of these spectra or images from the training stars, over the limit."""
    offset = SUMMARIES[kind](inputs).double().cpu() - reference["mean"]
    distance = torch.einsum("bi,ij,bj->b", offset, reference["precision"], offset).clamp(min=0).sqrt()
    return distance / reference["limit"]


def is_outlier(score: Tensor) -> Tensor:
    """(B,) bool: whether the stars lie farther from the training stars than 99.5 % of these."""
    return score > 1
