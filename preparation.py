"""From the content of a star's files to the inputs of the network, in two stages.

    prepared = prepare_spectrum(spectrum)              # (2, 3522), once a file: the cache holds it
    pixels = prepare_cutout(cutout.pixels)             # (3, 128, 128)

    standardise = Standardisation(recipe)              # a part of every checkpoint
    standardise.fit(spectra)                           # on the training stars alone
    specs, imgs = standardise(spectra, images)         # (B, 3522), (B, 3, 128, 128): what FusionModel reads

The authors' code takes spectra and images of any size; 3522 pixels and 128×128 are those of an earlier reproduction.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import median_filter
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from cli import DataError
from recipe import Recipe
from survey_files import PIXELS_PER_DEX, Spectrum

# Pixels 36021…39542 of SDSS's grid, loglam = pixel · 1e-4, are all those between 4000 and 9000 Å.
FIRST_PIXEL = 36021
SPECTRUM_LENGTH = 3522
WAVELENGTH = 10 ** ((FIRST_PIXEL + np.arange(SPECTRUM_LENGTH)) / PIXELS_PER_DEX)  # Å, vacuum
MIN_GOOD_FRACTION = 0.5  # a spectrum with fewer good pixels in the window is not used

# Cosmic rays and failed sky subtraction that ivar does not mark: a pixel is rejected if it departs from the median of
# its neighbours by more than both. Noise alone stays within the first, an M star's lines within the second; Hα, which
# flares higher, is kept.
OUTLIER_SIGMA = 5.0
OUTLIER_FLUX = 2.0  # of the neighbours' median or, where that is less, of the spectrum's
OUTLIER_WINDOW = 15  # pixels
H_ALPHA = (6555, 6575)  # Å, at any velocity of a star of the Galaxy

# A pixel's weight in the mean spectrum is 1 / (its variance + INTRINSIC_SCATTER²), so no bright star decides alone.
INTRINSIC_SCATTER = 0.1  # of the median flux; about how much stars of one class differ

# Mean and standard deviation of ImageNet's images, by colour; torchvision's weights expect them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Batch(NamedTuple):
    """Some prepared stars; an input that is not read is None."""

    spectra: Tensor | None  # (B, 2, 3522) float32: flux over its median, and its inverse variance
    images: Tensor | None  # (B, 3, 128, 128) uint8
    targets: Tensor  # (B,) int64 class indices


def prepare_spectrum(spectrum: Spectrum) -> np.ndarray:
    """(2, 3522) float32, 4000–9000 Å on the SDSS grid: flux over its median, and the inverse variance of that.

    A pixel that is bad (ivar = 0, not finite, absent) or an outlier has an inverse variance of 0; its flux is
    interpolated. Raises DataError, naming the file, if its pixels are not of SDSS's size, more than half of the window
    is bad, or its median flux is not positive.
    """
    index, flux, ivar = resample(spectrum)
    good = (index >= 0) & (index < SPECTRUM_LENGTH) & (ivar > 0)
    if good.sum() < MIN_GOOD_FRACTION * SPECTRUM_LENGTH:
        raise DataError(
            f"{spectrum.path}: only {good.sum()} of the {SPECTRUM_LENGTH} pixels between 4000 and 9000 Å are good"
        )
    index, flux, ivar = index[good], flux[good], ivar[good]
    median = np.median(flux)
    if not median > 0:
        raise DataError(f"{spectrum.path}: its median flux is {median:.3g}: there is no star in this spectrum")
    flux, ivar = flux / median, ivar * median**2
    neighbours = median_filter(flux, OUTLIER_WINDOW, mode="nearest")
    largest = np.maximum(OUTLIER_SIGMA / np.sqrt(ivar), OUTLIER_FLUX * np.maximum(neighbours, 1))
    kept = (np.abs(flux - neighbours) <= largest) | (np.abs(WAVELENGTH[index] - np.mean(H_ALPHA)) < np.ptp(H_ALPHA) / 2)
    prepared = np.zeros((2, SPECTRUM_LENGTH), np.float32)
    prepared[0] = np.interp(np.arange(SPECTRUM_LENGTH), index[kept], flux[kept])
    prepared[1, index[kept]] = ivar[kept]
    return prepared


def resample(spectrum: Spectrum) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index from the window's first pixel, flux and inverse variance of a spectrum on SDSS's grid; 0 where it is bad.

    Where its own pixels lie between SDSS's, flux is interpolated; of a bad pixel and its neighbour, the result is bad.
    """
    good = np.isfinite(spectrum.flux) & np.isfinite(spectrum.ivar) & (spectrum.ivar > 0)
    flux, ivar = np.where(good, spectrum.flux, 0), np.where(good, spectrum.ivar, 0)
    position = spectrum.loglam * PIXELS_PER_DEX - FIRST_PIXEL
    index = np.rint(position[0]) + np.arange(len(position))
    if np.abs(position - index).max() < 0.1:  # float32 loglam is good to 0.005 pixel
        return index.astype(int), flux, ivar
    if np.abs(np.diff(position) - 1).max(initial=0) > 0.1:
        raise DataError(f"{spectrum.path}: its pixels are not of SDSS's size (loglam in steps of 1e-4)")
    index = np.arange(math.ceil(position[0]), math.floor(position[-1]) + 1)
    right = np.searchsorted(position, index).clip(1)
    left = right - 1
    weight = (index - position[left]) / (position[right] - position[left])
    flux = (1 - weight) * flux[left] + weight * flux[right]
    with np.errstate(divide="ignore", invalid="ignore"):  # ivar is 0 of bad pixels
        variance = (1 - weight) ** 2 / ivar[left] + weight**2 / ivar[right]
    return index, flux, np.where(good[left] & good[right], 1 / variance, 0)


def prepare_cutout(pixels: np.ndarray) -> np.ndarray:
    """(3, 128, 128) uint8 from a cutout's (128, 128, 3)."""
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # height, width, colour → colour, height, width


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; to a GPU through pinned memory, so that nothing waits for the copy."""
    if device.type == "cpu":
        return batch
    return Batch(*(None if part is None else part.pin_memory().to(device, non_blocking=True) for part in batch))


def smooth(flux: Tensor, ivar: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Spectra (B, L) convolved with a Gaussian of `sigma` pixels, each pixel weighted by its inverse variance."""

    def blur(values: Tensor, width: float) -> Tensor:
        size = 2 * math.ceil(4 * width) + 1
        return gaussian_blur(values[None], kernel_size=[size, 1], sigma=[width, 1.0])[0]  # along an image's rows

    weights = ivar + 1e-6  # a gap wider than the kernel is filled with its interpolated flux
    total = blur(weights, sigma)
    # A Gaussian squared is one of 1/√2 of its width, of sum 1 / (2 √π σ).
    variance = blur(weights, sigma / math.sqrt(2)) / (2 * math.sqrt(math.pi) * sigma) / total**2
    return blur(weights * flux, sigma) / total, 1 / variance


class Standardisation(nn.Module):
    """Prepared stars to the network's inputs; its statistics are those of the training stars.

    forward: spectra (B, 2, 3522) as of `prepare_spectrum`, images (B, 3, 128, 128) with values 0…255, or None →
    specs (B, 3522), (flux − mean spectrum) / scale; imgs (B, 3, 128, 128), normalised as for ImageNet.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        degree = recipe.continuum_degree
        polynomials = np.polynomial.legendre.legvander(np.linspace(-1, 1, SPECTRUM_LENGTH), max(degree, 0))
        basis = torch.from_numpy(np.linalg.qr(polynomials[:, : degree + 1])[0]).float()
        self.register_buffer("continuum_basis", basis, persistent=False)
        self.register_buffer("mean", torch.zeros(SPECTRUM_LENGTH))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255, persistent=False)

    def fit(self, spectra: Tensor) -> None:
        """Take mean spectrum and scale from the prepared spectra (n, 2, 3522) of training stars.

        Pixels are weighted by 1 / (variance + INTRINSIC_SCATTER²): a noisy star moves neither. Raises DataError where
        the spectra are all the same.
        """
        flux, ivar = self.filter(spectra.to(self.mean))
        if torch.allclose(flux, flux[:1], atol=1e-6):
            raise DataError("the training stars all have the same spectrum: there is nothing to learn from them")
        weights = ivar / (1 + ivar * INTRINSIC_SCATTER**2) + 1e-6  # where no star has a good pixel, all count alike
        self.mean.copy_((weights * flux).sum(dim=0) / weights.sum(dim=0))
        deviations = flux - self.mean
        self.scale.copy_(((weights * deviations**2).sum() / weights.sum()).sqrt())

    def filter(self, spectra: Tensor) -> tuple[Tensor, Tensor]:
        """Flux and inverse variance (B, 3522), smoothed and without continuum as the recipe says."""
        flux, ivar = spectra.unbind(dim=1)
        if self.recipe.smoothing:
            flux, ivar = smooth(flux, ivar, self.recipe.smoothing)
        if self.recipe.continuum_degree >= 0:
            flux = flux - flux @ self.continuum_basis @ self.continuum_basis.T
        return flux, ivar

    def forward(self, spectra: Tensor | None, images: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        specs = imgs = None
        if spectra is not None:
            specs = (self.filter(spectra)[0] - self.mean) / self.scale
        if images is not None:
            imgs = (images - self.image_mean) / self.image_std
            imgs = imgs.contiguous(memory_format=torch.channels_last)
        return specs, imgs
