"""The residual path: stochastic depth, layer scale, and the sum with the shortcut."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .kernels import hooked


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): in training a branch is dropped with probability `rate`."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = float(rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * (mask / keep if keep else mask)

    def together(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Several tensors of one branch (a map and its tokens) with a single draw per sample."""
        if self.rate == 0.0 or not self.training:
            return parts
        mask = self(parts[0].new_ones(parts[0].shape[0]))
        return tuple(x * mask.view(-1, *(1,) * (x.ndim - 1)) for x in parts)

    def extra_repr(self) -> str:
        return f"{self.rate:.3f}"


class LayerScale(nn.Module):
    """One learned factor per channel (arXiv 2103.17239, eq. 5): (..., C) -> (..., C).

    With `shape` it is stored with further axes of one, as checkpoints of channels-first networks have it.
    """

    no_decay = ("gamma",)

    def __init__(self, dim: int, value: float = 1e-5, shape: Sequence[int] | None = None):
        super().__init__()
        self.gamma = nn.Parameter(torch.full(tuple(shape or (dim,)), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.view(-1)


def residual(x: Tensor, y: Tensor, scale: nn.Module, drop_path: DropPath) -> Tensor:
    """x + drop_path(scale(y)), in one pass over memory where `scale` is a layer scale and nothing is dropped."""
    if type(scale) is LayerScale and not (drop_path.training and drop_path.rate) and not hooked(scale):
        return torch.addcmul(x, y, scale.gamma.view(-1))
    return x + drop_path(scale(y))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates that grow linearly from 0 to `rate` over all blocks, as one list per stage."""
    total = sum(depths)
    ramp = [rate * i / max(total - 1, 1) for i in range(total)]
    ends = [sum(depths[: i + 1]) for i in range(len(depths))]
    return [ramp[end - depth : end] for end, depth in zip(ends, depths, strict=True)]
