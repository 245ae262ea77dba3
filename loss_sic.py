"""The spectrum–image contrastive (SIC) loss of the paper, and its sum with the classification loss."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(align_logits: Tensor, classes: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, by row and by column, of finding star i's spectrum for its image and the reverse.

    align_logits: (B, B), image i against spectrum j. Zero for a batch of one.
    classes: (B,) class indices; if given, a star is found among those of other classes only. The paper's
        form, without them, also pushes apart stars that share a class: a fifth of every batch.
    """
    own = torch.arange(len(align_logits), device=align_logits.device)
    if classes is not None:
        same_class = (classes[:, None] == classes[None, :]) & (own[:, None] != own[None, :])
        align_logits = align_logits.masked_fill(same_class, -torch.inf)
    return (F.cross_entropy(align_logits, own) + F.cross_entropy(align_logits.T, own)) / 2


def loss_sic(
    align_logits: Tensor | None,
    fuse_logits: Tensor,
    targets: Tensor,
    *,
    sic_weight: float = 1.0,
    same_class_negatives: bool = True,
) -> Tensor:
    """sic_weight · contrastive loss + cross-entropy of the classes; the paper's loss has both defaults.

    align_logits: (B, B), or None for a model of one modality, which has no contrastive term.
    fuse_logits: (B, num_classes); targets, on the same device: (B,) class indices, or (B, num_classes) the shares of
        the classes in blended stars; for the contrast, such a star belongs to the class with the largest share, of
        equal ones the first.
    """
    classification = F.cross_entropy(fuse_logits, targets)
    if align_logits is None or sic_weight == 0:
        return classification
    if targets.dim() == 2:
        targets = targets.argmax(dim=1)
    return sic_weight * contrastive_loss(align_logits, None if same_class_negatives else targets) + classification
