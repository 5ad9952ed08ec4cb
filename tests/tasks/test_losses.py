"""Losses in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from vertebra.tasks import CoarseToFineLoss


def test_coarse_to_fine_in_closed_form():
    """Two classes: fine softmax (3/4, 1/4), coarse (1/2, 1/2); label 0 in one sample, label 1 in the other."""
    fine = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    coarse = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1])
    entropy = (-math.log(3 / 4) - math.log(1 / 4)) / 2
    divergence = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    loss = CoarseToFineLoss()({"logits": fine, "coarse_logits": coarse}, labels)
    assert loss.item() == pytest.approx(entropy + divergence, rel=1e-12)
    loss.backward()
    # the label alone moves the fine logits: (softmax - one hot) / batch; the teacher alone the coarse: (q - p) / batch
    torch.testing.assert_close(fine.grad, torch.tensor([[-1 / 8, 1 / 8], [3 / 8, -3 / 8]], dtype=torch.float64))
    torch.testing.assert_close(coarse.grad, torch.tensor([[-1 / 8, 1 / 8]] * 2, dtype=torch.float64))
    weighted = CoarseToFineLoss(weight=0.5)({"logits": fine, "coarse_logits": coarse}, labels)
    assert weighted.item() == pytest.approx(entropy + divergence / 2, rel=1e-12)


def test_coarse_to_fine_takes_mixed_and_smoothed_labels():
    fine = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    outputs = {"logits": fine, "coarse_logits": fine}  # equal: no divergence
    mixed = CoarseToFineLoss()(outputs, torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    assert mixed.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 4)) / 2, rel=1e-12)
    smoothed = CoarseToFineLoss(label_smoothing=0.2)(outputs, torch.tensor([0]))
    assert smoothed.item() == pytest.approx(-0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4), rel=1e-12)


def test_coarse_to_fine_needs_both_outputs():
    with pytest.raises(ValueError, match="lack coarse_logits"):
        CoarseToFineLoss()({"logits": torch.zeros(1, 2)}, torch.tensor([0]))
