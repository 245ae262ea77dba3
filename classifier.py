"""The network, and all that its output depends on: the recipe, the standardisation, the precision, the calibration."""

import contextlib

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from catalog import CLASS_NAMES
from loss_sic import loss_terms
from model import FusionModel, contrastive_logits
from preparation import Batch, Standardisation
from recipe import Recipe


class Classifier(nn.Module):
    """A FusionModel, its weights random at first, behind the standardisation of its inputs.

    forward: a Batch of B stars → image_features and spectrum_features (B, 512), None where an input is not read, and
    fuse_logits (B, 5) float32.
    """

    def __init__(self, recipe: Recipe, precision: str = "fp32") -> None:
        super().__init__()
        self.recipe, self.precision = recipe, precision
        self.standardise = Standardisation(recipe)
        self.network = FusionModel(
            len(CLASS_NAMES),
            num_layers=recipe.num_layers,
            modality=recipe.modality,
            image_backbone=recipe.image_backbone,
        )
        self.register_buffer("calibration_temperature", torch.ones(()))  # fitted by train.py on validation stars
        self.to(memory_format=torch.channels_last)

    def forward(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor]:
        specs, imgs = self.standardise(batch.spectra, batch.images)
        device, in_bf16 = batch.targets.device, self.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16), attention_kernels(device):
            *features, fuse_logits = self.network.forward_features(specs, imgs)
        return *features, fuse_logits.float()

    def probabilities(self, fuse_logits: Tensor) -> Tensor:
        """(B, 5) float64: the calibrated probabilities of the classes."""
        return (fuse_logits.double() / self.calibration_temperature).softmax(dim=1)

    @property
    def device(self) -> torch.device:
        return self.calibration_temperature.device

    @property
    def is_contrastive(self) -> bool:
        """Whether the loss has its contrastive term."""
        return self.recipe.modality == "fusion" and self.recipe.sic_weight > 0

    def losses(
        self, image_features: Tensor | None, spectrum_features: Tensor | None, fuse_logits: Tensor, targets: Tensor
    ) -> Tensor:
        """(2,): both terms of the loss of a batch, from the outputs of `forward` and the targets (B,)."""
        align_logits = contrastive_logits(image_features, spectrum_features)
        return torch.stack(loss_terms(align_logits, fuse_logits, targets, sic_weight=self.recipe.sic_weight))


def attention_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """Attention without fusion on a CPU: in bf16, the backward pass of the fused kernel takes five times as long."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
