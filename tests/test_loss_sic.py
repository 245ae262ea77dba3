"""The loss against the paper's formula."""

import pytest
import torch

from loss_sic import contrastive_loss, loss_sic, loss_terms


def test_the_loss_is_the_papers_formula():
    align, fuse, targets = torch.randn(4, 4), torch.randn(4, 5), torch.tensor([0, 4, 2, 2])
    by_image = sum(align[i].exp().sum().log() - align[i, i] for i in range(4)) / 4
    by_spectrum = sum(align[:, i].exp().sum().log() - align[i, i] for i in range(4)) / 4
    classes = sum(fuse[i].exp().sum().log() - fuse[i, k] for i, k in enumerate(targets)) / 4
    contrast = (by_image + by_spectrum) / 2
    assert contrastive_loss(align).item() == pytest.approx(contrast.item(), abs=1e-5)
    for weight in (1.0, 0.3, 0.0):
        loss = loss_sic(align, fuse, targets, sic_weight=weight)
        assert loss.item() == pytest.approx((weight * contrast + classes).item(), abs=1e-5)
        terms = [term.item() for term in loss_terms(align, fuse, targets, sic_weight=weight)]
        assert terms == pytest.approx([classes.item(), (weight * contrast).item()], abs=1e-5)
    assert loss_sic(align, fuse, targets) == loss_sic(align, fuse, targets, sic_weight=1.0)
    assert loss_sic(None, fuse, targets).item() == pytest.approx(classes.item(), abs=1e-5)


def test_a_star_alone_has_no_others_to_be_told_from():
    assert contrastive_loss(torch.tensor([[5.0]])) == 0
