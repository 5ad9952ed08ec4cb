"""Losses that read the named outputs of a model (``forward_outputs``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn


class CoarseToFineLoss(nn.Module):
    """CF-ViT's loss (arXiv 2203.03821, eq. 12): the label teaches the fine run, the fine run teaches the coarse one.

    Cross entropy of ``logits`` plus `weight` times KL(softmax(logits) || softmax(coarse_logits)), both means over the
    batch. No gradient flows from the second term into ``logits``, and the coarse logits never see a label. `target` is
    (B,) class numbers or (B, classes) probabilities.
    """

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0):
        super().__init__()
        self.weight, self.label_smoothing = weight, label_smoothing

    def forward(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        missing = [name for name in ("logits", "coarse_logits") if name not in outputs]
        if missing:
            raise ValueError(f"the outputs lack {', '.join(missing)}: they have {', '.join(outputs)}")
        fine, coarse = outputs["logits"], outputs["coarse_logits"]
        label = F.cross_entropy(fine, target, label_smoothing=self.label_smoothing)
        teacher = fine.detach().log_softmax(-1)
        distil = F.kl_div(coarse.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
        return label + self.weight * distil
