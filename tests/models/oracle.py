"""What the comparisons with other libraries share."""

from __future__ import annotations

import torch


def fill(module):
    """Weights far from their initialisation, so that a norm or a bias out of place shows."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(std=0.05).add_(1.0 if name.endswith("weight") and p.ndim == 1 else 0.0)
    return module.eval()


def error(ours, theirs):
    """Relative error in the Euclidean norm."""
    return ((ours - theirs).norm() / theirs.norm()).item()
