"""Inception depthwise convolution of InceptionNeXt (arXiv 2303.16900, section 3.2, Fig. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import Conv


class InceptionMixer(nn.Module):
    """A wide depthwise convolution taken apart: (B, *S, C) -> (B, *S, C), Algorithm 1.

    Most channels pass as they are; `ratio` of them goes through a small cube of `square` cells per axis, and as many
    through a band of `band` cells along each axis (the last axis first). Time and memory grow linearly with the map.
    """

    def __init__(self, ndim: int, dim: int, ratio: float = 0.125, square: int = 3, band: int = 11):
        super().__init__()
        share = int(dim * ratio)
        kept = dim - (ndim + 1) * share
        if share < 1 or kept < 0:
            raise ValueError(f"a share of {ratio} of {dim} channels leaves {kept} of them beside {ndim + 1} branches")
        self.parts = (kept, *(share,) * (ndim + 1))
        self.square = Conv(ndim, share, share, square, groups=share)
        lines = [tuple(band if i == axis else 1 for i in range(ndim)) for axis in reversed(range(ndim))]
        self.bands = nn.ModuleList(Conv(ndim, share, share, line, groups=share) for line in lines)

    def forward(self, x: Tensor) -> Tensor:
        kept, cube, *lines = x.split(self.parts, -1)
        mixed = [band(line) for band, line in zip(self.bands, lines, strict=True)]
        return torch.cat([kept, self.square(cube), *mixed], -1)
