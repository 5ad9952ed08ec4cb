"""Scale-aware modulation of SMT (arXiv 2307.08579, section 3.2, Fig. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import BatchNorm, Conv, Linear, check_heads


class ScaleAwareModulation(nn.Module):
    """Values weighted by convolutions of several widths: (B, *S, C) -> (B, *S, C), eq. 1 to 5.

    A projection is cut into `heads`, each with a depthwise convolution wider by 2 than the one before (3, 5, 7, 9). The
    heads' i-th channels form a group (interleaved), each group is mixed by itself, then all are, and the result weighs
    the values cell by cell. No softmax. Time and memory grow linearly with the map.
    """

    def __init__(self, ndim: int, dim: int, heads: int = 4, expand: int = 2):
        super().__init__()
        check_heads(dim, heads)
        width = dim // heads
        self.v, self.s, self.proj = (Linear(dim, dim) for _ in range(3))
        self.local = nn.ModuleList(Conv(ndim, width, width, 3 + 2 * i, groups=width) for i in range(heads))
        self.proj0, self.norm = Conv(ndim, dim, expand * dim, groups=width), BatchNorm(expand * dim)
        self.act, self.proj1 = nn.GELU(), Conv(ndim, expand * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.s(x).chunk(len(self.local), -1)
        scales = torch.stack([conv(part) for conv, part in zip(self.local, parts, strict=True)], -1).flatten(-2)
        modulator = self.proj1(self.act(self.norm(self.proj0(scales))))
        return self.proj(self.v(x) * modulator)
