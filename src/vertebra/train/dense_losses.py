"""Losses of dense prediction, of the outputs that segmenters and detectors give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import at_size


class SegmentationLoss(nn.Module):
    """Cross entropy of every cell, and what options add: outputs {"logits", "auxiliary"} and target (B, *S) -> scalar.

    Of each sample the mean over its cells that are not `ignore`, then the mean over the samples (one without such a
    cell counts as zero): so parts of a batch and several processes add up to the whole batch exactly. Options:
    `cross_entropy` its weight; `dice` the weight of 1 - Dice, the mean over the classes that a sample's target has
    (soft Dice, arXiv 1606.04797, with probabilities unsquared); `gamma` makes the cross entropy a focal loss (arXiv
    1708.02002); `label_smoothing`; `class_weights` one for each class; `auxiliary` the weight of the auxiliary head's
    loss, which is the same sum.
    """

    def __init__(
        self,
        ignore: int = 255,
        cross_entropy: float = 1.0,
        dice: float = 0.0,
        gamma: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        auxiliary: float = 0.4,
    ) -> None:
        super().__init__()
        numbers = {"cross_entropy": cross_entropy, "dice": dice, "gamma": gamma, "auxiliary": auxiliary}
        for name, value in numbers.items():
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in 0..1, got {label_smoothing!r}")
        if not cross_entropy and not dice:
            raise ValueError("cross_entropy and dice are both 0: there is nothing to learn from")
        self.ignore, self.cross_entropy, self.dice, self.gamma = ignore, cross_entropy, dice, gamma
        self.label_smoothing, self.auxiliary = label_smoothing, auxiliary
        self.weights = None if class_weights is None else torch.tensor([float(w) for w in class_weights])

    def forward(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        loss = self.one(outputs["logits"], target)
        if "auxiliary" in outputs and self.auxiliary:
            loss = loss + self.auxiliary * self.one(outputs["auxiliary"], target)
        return loss

    def one(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits (B, classes, *S) and target (B, *S') -> scalar."""
        if target.ndim != logits.ndim - 1 or len(target) != len(logits):
            raise ValueError(f"target must be (B, *S) for logits {tuple(logits.shape)}, got {tuple(target.shape)}")
        if self.weights is not None and len(self.weights) != logits.shape[1]:
            raise ValueError(f"class_weights: needs {logits.shape[1]}, one for each class, got {len(self.weights)}")
        logits = at_size(logits if logits.dtype == torch.float64 else logits.float(), target.shape[1:]).flatten(2)
        target = target.flatten(1).long()
        there = target != self.ignore
        count = there.sum(1).clamp(min=1)
        loss = logits.new_zeros(len(logits))
        if self.cross_entropy:
            weights = None if self.weights is None else self.weights.to(logits)
            values = F.cross_entropy(
                logits,
                target,
                weights,
                ignore_index=self.ignore,
                reduction="none",
                label_smoothing=self.label_smoothing,
            )
            if self.gamma:
                sure = logits.softmax(1).gather(1, target.where(there, 0)[:, None])[:, 0]
                values = values * (1 - sure) ** self.gamma
            loss = loss + self.cross_entropy * values.sum(1) / count
        if self.dice:
            loss = loss + self.dice * self._dice(logits, target, there)
        return loss.mean()

    @staticmethod
    def _dice(logits: Tensor, target: Tensor, there: Tensor) -> Tensor:
        """1 - Dice of each sample, (B,), over its cells that count and the classes they have."""
        true = F.one_hot(target.where(there, 0), logits.shape[1]).movedim(-1, 1) * there[:, None]
        said = logits.softmax(1) * there[:, None]
        shared, sizes = (said * true).sum(2), said.sum(2) + true.sum(2)
        has = true.any(2)
        dice = torch.where(has, 1 - 2 * shared / sizes.clamp(min=1e-6), 0.0)
        return dice.sum(1) / has.sum(1).clamp(min=1)


class DetectionLoss(nn.Module):
    """The sum of a detector's own losses, each times its weight in `weights` (1 where it has none)."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.weights = dict(weights or {})

    def forward(self, outputs: Mapping[str, Tensor], target: Any) -> Tensor:
        wrong = sorted(set(self.weights) - set(outputs))
        if wrong:
            raise ValueError(f"weights: the model has no loss {', '.join(wrong)}; it has {', '.join(outputs)}")
        return torch.stack([self.weights.get(key, 1.0) * value.float() for key, value in outputs.items()]).sum()


LOSSES = {"segmentation": SegmentationLoss, "detection": DetectionLoss}
