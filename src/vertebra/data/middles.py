"""The median sample of a patient's or a record's samples: what is usual there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .source import DataError

MOST = 1000  # samples of a group that its median is taken of, evenly spread


class Middles:
    """Holds each group's median sample (C, *S), over the samples that can be read.

    Called with a sample it divides it, with `factor`, by the largest magnitude in the group's median sample (of all
    channels), and with `append` adds that median sample behind it as further channels.
    """

    def __init__(self, read: Callable[[int], Tensor], groups: np.ndarray, append: bool, factor: bool) -> None:
        self.append = append
        names, self.member = np.unique(groups, return_inverse=True)
        found, factors = [], []
        for number in range(len(names)):
            mine = np.flatnonzero(self.member == number)
            middle = _median(read, mine[np.linspace(0, len(mine) - 1, min(len(mine), MOST)).astype(int)])
            by = float(middle.abs().max().clamp(min=1e-6)) if factor else 1.0
            found.append(middle / by)
            factors.append(by)
        self.middles, self.factors = found, factors

    def __call__(self, i: int, sample: Tensor) -> Tensor:
        group = self.member[i]
        sample = sample / self.factors[group]
        return torch.cat([sample, self.middles[group]]) if self.append else sample


def _median(read: Callable[[int], Tensor], places: np.ndarray) -> Tensor:
    samples, why = [], None
    for i in places:
        try:
            samples.append(read(int(i)))
        except DataError as e:  # named and counted when it is drawn
            why = e
    if not samples:
        raise DataError(str(why))
    return torch.from_numpy(np.median(torch.stack(samples).numpy(), 0))
