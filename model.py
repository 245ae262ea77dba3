"""The network of "Deep Multimodal Networks for M-type Star Classification with Paired Spectrum and
Photometric Image" (PASP 2023): a ResNet-152 for the image, a 1D-CNN for the spectrum, and a
Transformer that reads the tokens of both behind a [CLS] token.

    model = FusionModel()                                    # downloads nothing
    model.spectrum_normalisation.fit(training_spectra)       # (n, 3522): what spectra are compared with
    align_logits, fuse_logits = model(specs, imgs)           # (B, 3522), (B, 3, 128, 128), as data.py prepares them

The encoders follow, layer by layer and name by name, the authors' code
(https://github.com/Gajiln/Spectrum-Image-Star-Classification), so that their trained encoder weights
load. The Transformer has the shape of ViLT (Kim et al. 2021), as theirs, built of torch's own parts.
"""

import contextlib
import http.client
import math
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms.functional import gaussian_blur

from augmentation import inverse_variances
from data import CLASS_NAMES, SPECTRUM_LENGTH, DataError
from distributed import gather_stars

# Mean and standard deviation of ImageNet's images, by colour; torchvision's weights expect them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Slopes and bends over the whole window are mostly reddening and flux calibration, far larger than what
# tells subclasses apart; polynomials of this degree hold them.
CONTINUUM_DEGREE = 3
MAX_CONTINUUM_DEGREE = 20  # beyond that, polynomials follow the bands
# The spectrum encoder keeps the largest of four values, which of noisy pixels is mostly noise. Molecular bands are far
# wider than this; of a line as narrow as the spectrograph allows (about 1 pixel), a third of the depth stays.
SMOOTHING_SIGMA = 3.0  # pixels of 69 km/s; of a Gaussian
# Noise is spread over all directions of a spectrum's 3522 pixels; what tells M stars apart lies in few. More
# eigenspectra would keep more noise, and be fitted to that of the training stars; ten did best in cross-validation.
NUM_EIGENSPECTRA = 10
COEFFICIENT_STD = 0.1  # of coefficient_encoder's initial weights
MAX_DEVIATION = 5.0  # of a spectrum's pixel from the mean spectrum, in units of SpectrumNormalisation.std

MODALITIES = ("fusion", "spectrum", "image")
IMAGE_BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# Without weights, residual blocks begin as identities (Goyal et al. 2017, 5.1), and gradients smaller.
RANDOM_RESNET = {"zero_init_residual": True}
TEMPERATURE = 0.07  # of the contrastive logits; the authors' fixed value
INIT_STD = 0.02  # standard deviation of ViLT's initial weights and embeddings
# With those, attention begins nearly uniform, so that [CLS] sees the mean of all tokens and cannot tell
# wavelengths apart; these begin with heads that each look at a few places (attention logits of about ± 1.3).
POSITION_STD = 0.1  # of the position embeddings
ATTENTION_STD = 0.05  # of the weights of queries and keys

# What torch.load raises on files that are damaged or something else.
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, pickle.UnpicklingError)
# The mark of a checkpoint that train.py wrote. A change of what the network makes of its inputs, which are not in the
# file, takes another number, so that no weights are used on what they were not trained on.
CHECKPOINT_FORMAT = "m-star classifier 4"
# What those who load one rely on; train.py writes it.
CHECKPOINT_KEYS = {
    "checkpoint": ("model_arguments", "model_state", "config", "splits", "epoch"),
    "config": ("class_names", "modality", "stars", "batch_size", "sic_weight", "sic_negatives"),
    "splits": ("train", "validation", "test"),
}


def make_continuum_basis(degree: int = CONTINUUM_DEGREE) -> Tensor:
    """(3522, degree + 1): Legendre polynomials over the window's pixels, made orthonormal; none for a degree of -1."""
    polynomials = np.polynomial.legendre.legvander(np.linspace(-1, 1, SPECTRUM_LENGTH), max(degree, 0))[:, : degree + 1]
    return torch.from_numpy(np.linalg.qr(polynomials)[0]).to(torch.get_default_dtype())


def project(spectra: Tensor, basis: Tensor) -> Tensor:
    """Spectra (N, 3522), of each the sum of the orthonormal spectra in basis (3522, K) that fits it best."""
    return spectra @ basis @ basis.T


def remove_continuum(spectra: Tensor, basis: Tensor) -> Tensor:
    """Spectra (N, 3522), each less the polynomial in log wavelength that fits it best, of `make_continuum_basis`."""
    return spectra - project(spectra, basis)


def smooth(spectra: Tensor) -> Tensor:
    """Spectra (N, 3522), each convolved with a Gaussian that is cut off at four SMOOTHING_SIGMA; its ends mirrored."""
    size = 2 * math.ceil(4 * SMOOTHING_SIGMA) + 1
    return gaussian_blur(spectra[None], kernel_size=[size, 1], sigma=[SMOOTHING_SIGMA, 1.0])[0]  # along an image's rows


def flatten_spectra(spectra: Tensor, basis: Tensor) -> Tensor:
    """Spectra (N, 3522) without their continuum, and smoothed: what eigenspectra are taken from and fitted to."""
    return smooth(remove_continuum(spectra, basis))


class ImageEncoder(nn.Module):
    """ResNet without its pooling and classifier, pooled to four tokens.

    forward: imgs (B, 3, H, W) with values 0…255 → image_features (B, hidden_size), image_tokens (B, 4, hidden_size).
    """

    def __init__(
        self, hidden_size: int = 512, *, backbone: str = "resnet152", weights: str | Path | None = None
    ) -> None:
        super().__init__()
        resnet = _build_resnet(backbone, weights)
        self.model = nn.Sequential(*list(resnet.children())[:-2])
        self.pool = nn.AdaptiveAvgPool2d((4, 1))
        self.fc = nn.Linear(resnet.fc.in_features, hidden_size)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def normalise(self, imgs: Tensor) -> Tensor:
        """Values 0…255, as data.py prepares them → what ImageNet's weights expect."""
        return (imgs / 255 - self.mean) / self.std

    def forward(self, imgs: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(self.model(self.normalise(imgs)))  # (B, 2048, 4, 1)
        image_tokens = self.fc(pooled.flatten(2).transpose(1, 2))  # (B, 2048, 4) → (B, 4, 2048) → (B, 4, 512)
        image_features = self.fc(pooled.mean(dim=(2, 3)))
        return image_features, image_tokens


class SpecEncoder(nn.Module):
    """Five plain convolutions, with neither activation nor normalisation between them, as the authors have it.

    forward: specs (B, L) → spectrum_features (B, hidden_size), spectrum_tokens (B, 32, hidden_size).
    """

    def __init__(self, hidden_size: int = 512) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, 32, kernel_size=4)
        self.conv2 = nn.Conv1d(32, 64, kernel_size=4)
        self.conv3 = nn.Conv1d(64, 128, kernel_size=4)
        self.conv4 = nn.Conv1d(128, 256, kernel_size=4)
        self.conv5 = nn.Conv1d(256, hidden_size, kernel_size=4)
        self.max_pool = nn.MaxPool1d(4)
        self.token_pool = nn.AdaptiveAvgPool1d(32)
        self.fc = nn.Linear(hidden_size, hidden_size)

    def forward(self, specs: Tensor) -> tuple[Tensor, Tensor]:
        x = specs.unsqueeze(1)  # (B, 3522) → (B, 1, 3522)
        x = self.max_pool(self.conv2(self.conv1(x)))  # (B, 64, 879)
        x = self.max_pool(self.conv4(self.conv3(x)))  # (B, 256, 218)
        x = self.conv5(x)  # (B, 512, 215)
        spectrum_tokens = self.token_pool(x).transpose(1, 2)  # (B, 512, 32) → (B, 32, 512)
        spectrum_features = self.fc(x.mean(dim=2))
        return spectrum_features, spectrum_tokens


class SpectrumNormalisation(nn.Module):
    """Takes off a spectrum's continuum, smooths it, takes off the training stars' mean spectrum, and keeps of what is
    left the sum of their eigenspectra that fits it best.

    Args:
        continuum_degree: of the polynomial in log wavelength that is taken off each spectrum, at most
            MAX_CONTINUUM_DEGREE; -1 takes none off.

    forward: specs (B, 3522) in units of the median flux → spectra (B, 3522), that sum, and coefficients (B, 10): how
        much of each eigenspectrum is in it. The mean squares of a star's two are equal; over the training stars they
        are about 1 where noise is little, less where it is more.
    """

    def __init__(self, continuum_degree: int = CONTINUUM_DEGREE) -> None:
        super().__init__()
        if not -1 <= continuum_degree <= MAX_CONTINUUM_DEGREE:
            raise ValueError(f"continuum_degree is {continuum_degree}, not one from -1 to {MAX_CONTINUUM_DEGREE}")
        # The ten polynomials after the continuum's stand in for eigenspectra until `fit`.
        basis = make_continuum_basis(continuum_degree + NUM_EIGENSPECTRA)
        self.register_buffer("continuum_basis", basis[:, : continuum_degree + 1].clone(), persistent=False)
        self.register_buffer("mean", torch.zeros(SPECTRUM_LENGTH))
        self.register_buffer("std", torch.ones(()))
        self.register_buffer("eigenspectra", basis[:, continuum_degree + 1 :].clone())

    def fit(self, spectra: Tensor) -> None:
        """Take from the spectra (n, 3522) of training stars, without continuum and smoothed, their mean, the standard
        deviation of a pixel (the mean of all pixels), and their eigenspectra: the directions in which they differ most
        (principal components; Yip et al. 2004).

        In mean and eigenspectra a spectrum counts by its inverse variance. Of n stars there are at most n - 1
        eigenspectra; the columns that remain are zero.

        Raises DataError where the spectra are all the same.
        """
        spectra = spectra.to(self.mean)  # its device and dtype
        flat = flatten_spectra(spectra, self.continuum_basis)
        if torch.allclose(flat, flat[:1], atol=1e-6):
            raise DataError("the training stars all have the same spectrum: there is nothing to learn from them")
        weights = inverse_variances(spectra)
        self.mean.copy_((weights * flat).sum(dim=0) / weights.sum())
        self.std.copy_(flat.std(dim=0).mean())
        svd = TruncatedSVD(min(NUM_EIGENSPECTRA, len(spectra) - 1), random_state=0)
        components = svd.fit((weights.sqrt() * self.deviations(flat)).cpu().numpy()).components_
        self.eigenspectra.zero_()[:, : len(components)] = torch.from_numpy(components.T)

    def deviations(self, flat: Tensor) -> Tensor:
        """Those of flattened spectra (B, 3522) from the mean spectrum, in the unit of `std`, no more than
        MAX_DEVIATION."""
        return ((flat - self.mean) / self.std).clamp(-MAX_DEVIATION, MAX_DEVIATION)

    def forward(self, specs: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 (on a GPU, TF32) also under autocast: bfloat16 would round the flux to its third digit.
        with torch.autocast(specs.device.type, enabled=False):
            amplitudes = self.deviations(flatten_spectra(specs, self.continuum_basis)) @ self.eigenspectra
            # Ten numbers with the mean square of the spectrum's 3522.
            coefficients = amplitudes * math.sqrt(NUM_EIGENSPECTRA / SPECTRUM_LENGTH)
            return amplitudes @ self.eigenspectra.T, coefficients


class FusionModel(nn.Module):
    """Both encoders, the Transformer that fuses their tokens, and the classifier.

    Args:
        modality: "fusion" reads both inputs; "spectrum" and "image" build only the one encoder, and
            the Transformer reads its tokens alone.
        image_backbone: one of IMAGE_BACKBONES; the paper's is "resnet152", smaller ones serve tests.
        image_weights: None for random weights, "imagenet" for torchvision's (downloaded once), or the
            path of a file in torchvision's format. Raises OSError when they cannot be had.
        continuum_degree: of what is taken off each spectrum; see SpectrumNormalisation.
        image_dropout: the fraction of stars of which training hides the image from the Transformer, so that
            it learns the spectrum also where the image alone would do.

    forward: specs (B, 3522) in units of the median flux, imgs (B, 3, 128, 128) with values 0…255, as data.py
        prepares them, B ≥ 1, on the model's device; the one that the modality does not read may be None.
        In "fusion" the image tokens are zeros where image_seen (B,) is false, and everywhere if imgs is None →
        align_logits (B, B): cosine of image i and spectrum j over the temperature; None unless both are read;
        fuse_logits (B, num_classes): the classes, from the Transformer's [CLS] output.
        In training by several processes, B of the logits counts the stars of all.
    """

    def __init__(
        self,
        num_classes: int = 5,
        hidden_size: int = 512,
        num_heads: int = 8,
        num_layers: int = 8,
        dropout: float = 0.0,
        *,
        continuum_degree: int = CONTINUUM_DEGREE,
        image_dropout: float = 0.5,
        modality: str = "fusion",
        image_backbone: str = "resnet152",
        image_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {
            "num_classes": num_classes,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_layers": num_layers,
            "dropout": dropout,
            "continuum_degree": continuum_degree,
            "image_dropout": image_dropout,
            "modality": modality,
            "image_backbone": image_backbone,
        }
        if modality not in MODALITIES:
            raise ValueError(f"modality is {modality!r}, not one of {', '.join(MODALITIES)}")
        self.modality, self.image_dropout = modality, image_dropout
        self.spectrum_normalisation = self.spec_encoder = self.coefficient_encoder = self.image_encoder = None
        num_tokens = 1  # [CLS]
        if modality != "image":
            self.spectrum_normalisation = SpectrumNormalisation(continuum_degree)
            self.spec_encoder = SpecEncoder(hidden_size)
            self.coefficient_encoder = nn.Linear(NUM_EIGENSPECTRA, hidden_size)
            num_tokens += 32
        if modality != "spectrum":
            self.image_encoder = ImageEncoder(hidden_size, backbone=image_backbone, weights=image_weights)
            num_tokens += 4

        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, num_tokens, hidden_size))
        self.token_type_embedding = nn.Embedding(2, hidden_size)  # 0: [CLS] and spectrum, 1: image
        layer = nn.TransformerEncoderLayer(
            hidden_size,
            num_heads,
            dim_feedforward=4 * hidden_size,
            dropout=dropout,
            activation="gelu",
            norm_first=True,
            batch_first=True,
        )
        self.transformer = nn.TransformerEncoder(
            layer, num_layers, norm=nn.LayerNorm(hidden_size), enable_nested_tensor=False
        )
        self.classifier = nn.Linear(hidden_size, num_classes)
        self._initialise_fusion()

    def _initialise_fusion(self) -> None:
        """ViLT's initial weights, but for attention. Torch's own Transformer starts as eight copies of one layer."""
        nn.init.normal_(self.position_embedding, std=POSITION_STD)
        nn.init.normal_(self.token_type_embedding.weight, std=INIT_STD)
        if self.spec_encoder is not None:
            nn.init.normal_(self.coefficient_encoder.weight, std=COEFFICIENT_STD)
            nn.init.zeros_(self.coefficient_encoder.bias)
        for module in (*self.transformer.modules(), self.classifier):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.MultiheadAttention):
                queries, keys, values = module.in_proj_weight.chunk(3)
                nn.init.normal_(queries, std=ATTENTION_STD)
                nn.init.normal_(keys, std=ATTENTION_STD)
                nn.init.normal_(values, std=INIT_STD)

    def forward(
        self, specs: Tensor | None, imgs: Tensor | None, image_seen: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        tokens, align_logits = [], None
        spectrum_type, image_type = self.token_type_embedding.weight
        gather = gather_stars if self.training else lambda values: values
        cls_token = self.cls_token + spectrum_type
        if self.spec_encoder is not None:
            spectra, coefficients = self.spectrum_normalisation(specs)
            spectrum_features, spectrum_tokens = self.spec_encoder(spectra)
            tokens.append(spectrum_tokens + spectrum_type)
            # Directly as well: convolutions and pooling seem to lose what small coefficients tell.
            cls_token = cls_token + self.coefficient_encoder(coefficients)[:, None]
        if self.image_encoder is not None and imgs is not None:
            image_features, image_tokens = self.image_encoder(imgs)
            if self.spec_encoder is not None:
                align_logits = contrastive_logits(gather(image_features), gather(spectrum_features))
                if image_seen is not None:
                    image_tokens = image_tokens * image_seen[:, None, None]
            tokens.append(image_tokens + image_type)
        elif self.image_encoder is not None:
            tokens.append(image_type.expand(len(specs), 4, -1))

        cls_token = cls_token.expand(len(tokens[0]), -1, -1)
        x = torch.cat([cls_token, *tokens], dim=1) + self.position_embedding  # (B, 1 + 32 + 4, 512)
        with attention_kernels(x.device):
            fuse_logits = self.classifier(self.transformer(x)[:, 0])
        return align_logits, gather(fuse_logits)


def attention_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """What computes attention there: on a CPU, where the fused kernel's backward pass takes five times as long in
    bfloat16 as those of plain products do, the latter."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def contrastive_logits(image_features: Tensor, spectrum_features: Tensor) -> Tensor:
    """(B, B): cosine similarity of image i and spectrum j, over the temperature."""
    # In float32 also under autocast: divided by 0.07, bfloat16's three digits would be too coarse.
    with torch.autocast(image_features.device.type, enabled=False):
        image_features = F.normalize(image_features.float(), dim=1)
        spectrum_features = F.normalize(spectrum_features.float(), dim=1)
        return image_features @ spectrum_features.T / TEMPERATURE


def _build_resnet(backbone: str, weights: str | Path | None) -> torchvision.models.ResNet:
    if backbone not in IMAGE_BACKBONES:
        raise ValueError(f"image_backbone is {backbone!r}, not one of {', '.join(IMAGE_BACKBONES)}")
    resnet = torchvision.models.get_model(backbone, weights=None, **RANDOM_RESNET)
    if weights is not None:
        state = _fetch_imagenet_weights(backbone) if weights == "imagenet" else torch_load(Path(weights))
        try:
            resnet.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise OSError(f"{weights}: not the weights of torchvision's {backbone}") from error
    return resnet


def _fetch_imagenet_weights(backbone: str) -> OrderedDict[str, Tensor]:
    # V1 is what `pretrained=True` gave when the paper was written.
    imagenet = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1
    try:
        return imagenet.get_state_dict(progress=True, check_hash=True)
    except (OSError, http.client.HTTPException, *_UNREADABLE) as error:  # RuntimeError: another hash than its name's
        raise OSError(
            f"the ImageNet weights could not be had from {imagenet.url}, or what lies of them in "
            f"{torch.hub.get_dir()} is damaged ({type(error).__name__}: {error}); download that file elsewhere "
            "and give its path (--image-weights PATH), or train from random weights (--image-weights none)"
        ) from error


def save_checkpoint(path: Path, model: FusionModel, **contents: Any) -> None:
    """Write the weights, the arguments that build their network, and `contents` (plain values) to a file."""
    checkpoint = {"format": CHECKPOINT_FORMAT, "model_arguments": model.arguments, "model_state": model.state_dict()}
    torch_save(checkpoint | contents, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[FusionModel, dict[str, Any]]:
    """The network of a checkpoint that train.py wrote, on the device and ready to evaluate, and all else in the file.

    Raises OSError for a file that is missing, damaged, another program's, another version's, of other classes or of
    other options.
    """
    checkpoint = torch_load(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise OSError(
            f"{path}: not a checkpoint of this program in this version (train.py writes them to checkpoints/)"
        )
    for name, keys in CHECKPOINT_KEYS.items():
        part = checkpoint if name == "checkpoint" else checkpoint[name]
        missing = [key for key in keys if not isinstance(part, dict) or key not in part]
        if missing:
            raise OSError(f"{path}: no {', '.join(missing)} in its {name}; another version of train.py wrote it")
    class_names = checkpoint["config"]["class_names"]
    if class_names != list(CLASS_NAMES):
        raise OSError(f"{path}: made for other classes, {class_names}")
    try:
        # Its arguments must not name weights: they would be fetched, or read from anywhere.
        model = FusionModel(**checkpoint["model_arguments"], image_weights=None)
        model.load_state_dict(checkpoint["model_state"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise OSError(f"{path}: its weights are not those of its network ({type(error).__name__})") from error
    if model.classifier.out_features != len(CLASS_NAMES):
        raise OSError(f"{path}: its network knows {model.classifier.out_features} classes, not {len(CLASS_NAMES)}")
    return model.eval().to(device, memory_format=torch.channels_last), checkpoint


def torch_save(contents: dict[str, Any], path: Path) -> None:
    """Raises OSError where torch itself tells of a full disk as of an error in the program."""
    try:
        torch.save(contents, path)
    except RuntimeError as error:
        raise OSError(f"{path}: cannot be written; is the disk full? ({error})") from error


def torch_load(path: Path) -> Any:
    """Tensors and plain values only: nothing in the file is executed."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of other programs' files; what follows says it in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise OSError(f"{path}: no such file") from None
    except _UNREADABLE as error:
        raise OSError(f"{path}: damaged, or not a file of PyTorch weights ({type(error).__name__})") from error
