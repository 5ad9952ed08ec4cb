"""Spatial-reduction attention of PVT (arXiv 2102.12122, Fig. 4) and PVT v2's linear form (arXiv 2106.13797, Fig. 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv, adaptive_avg_pool, attend, check_heads, crop, merge_heads, split_heads


class CellConv(Conv):
    """Convolution whose kernel is its stride, as one matrix product: (B, *S, dim) -> (B, *S // kernel, out).

    Cells do not overlap, so gathering them is one copy and the weight (out, dim, *K) serves as it lies. A ragged end is
    cut off, as the convolution does.
    """

    def __init__(self, ndim: int, dim: int, out: int, kernel: int):
        super().__init__(ndim, dim, out, kernel, kernel, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        batch, *sides, dim = x.shape
        ndim = len(sides)
        counts = [s // k for s, k in zip(sides, self.kernel, strict=True)]
        x = crop(x, [c * k for c, k in zip(counts, self.kernel, strict=True)])
        split = x.reshape(batch, *(v for pair in zip(counts, self.kernel, strict=True) for v in pair), dim)
        cells = split.permute(0, *range(1, 2 * ndim, 2), 2 * ndim + 1, *range(2, 2 * ndim + 1, 2))
        return F.linear(cells.reshape(batch, *counts, self.weight[0].numel()), self.weight.flatten(1), self.bias)


class SpatialReductionAttention(nn.Module):
    """Attention whose keys and values come from a smaller map: (B, *S, C) -> (B, *S, C), PVT eq. 1 to 3.

    A convolution with kernel and stride `ratio` makes the map smaller; `ratio` 1 is plain attention. The `linear` form
    averages the map to `pool` cells per axis instead, whatever its size, so that the cost grows linearly with it.
    """

    def __init__(self, ndim: int, dim: int, heads: int, ratio: int = 1, linear: bool = False, pool: int = 7):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.pool = heads, pool if linear else None
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.reduced = linear or ratio > 1
        if self.reduced:
            self.sr = Conv(ndim, dim, dim) if linear else CellConv(ndim, dim, dim, ratio)
            self.norm = nn.LayerNorm(dim)
            self.act = nn.GELU() if linear else nn.Identity()

    def reduce(self, x: Tensor) -> Tensor:
        """The map that keys and values are read from, (B, *S', C)."""
        if not self.reduced:
            return x
        if self.pool is not None:
            x = adaptive_avg_pool(x, self.pool)
        return self.act(self.norm(self.sr(x)))

    def forward(self, x: Tensor) -> Tensor:
        (q,) = split_heads(self.q(x.flatten(1, -2)), self.heads)
        k, v = split_heads(self.kv(self.reduce(x).flatten(1, -2)), self.heads, 2)
        return self.proj(merge_heads(attend(q, k, v)).reshape(x.shape))
