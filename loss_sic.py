"""The spectrum–image contrastive (SIC) loss of the paper, and its sum with the classification loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(align_logits: Tensor) -> Tensor:
    """Symmetric cross-entropy: each image must find its own spectrum (rows), and each spectrum its image (columns).

    align_logits: (B, B), image i against spectrum j. Zero for a batch of one.
    """
    own = torch.arange(len(align_logits), device=align_logits.device)
    return (F.cross_entropy(align_logits, own) + F.cross_entropy(align_logits.T, own)) / 2


def loss_terms(
    align_logits: Tensor | None, fuse_logits: Tensor, targets: Tensor, *, sic_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the classes, and sic_weight · contrastive loss.

    align_logits: (B, B), or None where an input is not read: the contrastive term is zero.
    fuse_logits: (B, num_classes).
    targets: (B,) class indices.
    """
    classification = F.cross_entropy(fuse_logits, targets)
    if align_logits is None or sic_weight == 0:
        return classification, torch.zeros_like(classification)
    return classification, sic_weight * contrastive_loss(align_logits)


def loss_sic(align_logits: Tensor | None, fuse_logits: Tensor, targets: Tensor, *, sic_weight: float = 1.0) -> Tensor:
    """The paper's loss: the sum of both terms of `loss_terms`."""
    classification, contrastive = loss_terms(align_logits, fuse_logits, targets, sic_weight=sic_weight)
    return classification + contrastive
