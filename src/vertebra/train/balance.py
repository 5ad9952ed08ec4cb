"""Classes that are not equally frequent: weights in the loss, or in what is drawn for training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Split
from ..tasks import Loss


def class_weights(split: Split) -> tuple[float, ...]:
    """What `balance: loss` weighs each class by.

    Of one label n / (K n_c), n samples and n_c of class c, K classes that occur: the mean over all samples is one, so
    the loss keeps its scale. Of several labels (n - n_c) / n_c, the weight of a yes. A class that never occurs has 0
    of one label, 1 of several.
    """
    labels, n = split.labels, len(split)
    if labels.ndim > 1:
        yes = labels.sum(0)
        return tuple(float(f"{(n - k) / k:.6g}") if k else 1.0 for k in yes.tolist())
    counts = np.bincount(labels)
    there = int((counts > 0).sum())
    return tuple(float(f"{n / (there * k):.6g}") if k else 0.0 for k in counts.tolist())


def sample_weights(split: Split) -> Tensor:
    """(N,) float64, mean one: what `balance: sample` draws by. All classes then have the same share.

    Of several labels the mean over the classes of 1 / (samples with the same yes or no).
    """
    labels = split.labels
    if labels.ndim == 1:
        weights = 1 / np.bincount(labels)[labels]
    else:
        yes = labels.sum(0)
        weights = (1 / np.where(labels == 1, yes, len(labels) - yes)).mean(1)
    return torch.from_numpy(weights / weights.mean())


def group_weights(split: Split) -> Tensor:
    """(N,) float64, mean one: what `balance: group` draws by, 1 / sqrt(n_c n_gc).

    n_c are the samples of class c, n_gc those of them in the sample's group (a patient, a record). Rare classes become
    more frequent, though not as frequent as the others, and nobody's samples make up most of a class: a network learns
    less of who somebody is.
    """
    assert split.groups is not None
    labels, group = split.labels, np.unique(split.groups, return_inverse=True)[1]
    pair = np.unique(group * (labels.max() + 1) + labels, return_inverse=True)[1]
    weights = 1 / np.sqrt(np.bincount(labels)[labels] * np.bincount(pair)[pair])
    return torch.from_numpy(weights / weights.mean())


def draw_weights(balance: str, split: Split) -> Tensor | None:
    """What the setting `balance` draws training samples by; None: each once."""
    ways = {"sample": sample_weights, "group": group_weights}
    return ways[balance](split) if balance in ways else None


class Weighted(nn.Module):
    """`loss` (with reduction "none") of each sample times its class's weight, then the mean over the samples.

    Divided by the number of samples and not by the sum of the weights (as F.cross_entropy does), so that parts of a
    batch and several processes add up to the whole batch exactly.
    """

    def __init__(self, loss: Loss, weights: tuple[float, ...]) -> None:
        super().__init__()
        self.loss, self.weights = loss, torch.tensor(weights)

    def forward(self, outputs: Mapping[str, Tensor], target: Tensor) -> Tensor:
        values = self.loss(outputs, target)
        return (self.weights.to(values)[target] * values).mean()
