"""The inception token mixer of iFormer (arXiv 2205.12956): high and low frequencies apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv, Linear, attend, check_heads, crop, max_pool, mean_pool, merge_heads, split_heads


class FrequencyMixer(nn.Module):
    """Convolution and max pooling for high frequencies, attention for low ones: (B, *S, C) -> (B, *S, C).

    Of `heads` shares of the channels the last `low_heads` attend to the whole map, where `pool` > 1 to its means over
    cubes of that many cells per axis. One half of the others goes through a 1x1 and a depthwise convolution, one half
    through a maximum over 3 cells per axis and a 1x1 convolution; both double their channels. A depthwise convolution
    with a residual and a projection blend the three. A ragged end is averaged over the cells that are there.

    With N cells and M = N / pool^ndim of them in attention, time grows as N + M^2, and memory as N where attention is
    fused.
    """

    def __init__(self, ndim: int, dim: int, heads: int, low_heads: int, pool: int = 1):
        super().__init__()
        check_heads(dim, heads)
        if not 1 <= low_heads < heads:
            raise ValueError(
                f"low_heads must be 1 to {heads - 1} of {heads} heads, so that both kinds exist, got {low_heads}"
            )
        if pool < 1:
            raise ValueError(f"pool must be at least 1, got {pool}")
        low = dim // heads * low_heads
        high = dim - low
        if high % 2:
            raise ValueError(f"{high} channels of high frequency cannot be halved for convolution and pooling")
        half, wide = high // 2, 2 * high + low
        self.parts, self.low_heads, self.pool = (half, half, low), low_heads, pool
        self.expand, self.local = Conv(ndim, half, high, bias=False), Conv(ndim, high, high, 3, groups=high, bias=False)
        self.peak = Conv(ndim, half, high)
        self.qkv = Linear(low, 3 * low)
        self.blend = Conv(ndim, wide, wide, 3, groups=wide, bias=False)
        self.proj = Conv(ndim, wide, dim)

    def attention(self, x: Tensor) -> Tensor:
        """The low frequencies: means, attention among them, each result given to all cells of its cube."""
        sides, pool = x.shape[1:-1], self.pool
        x = mean_pool(x, pool)
        batch, *coarse, dim = x.shape
        y = merge_heads(attend(*split_heads(self.qkv(x.flatten(1, -2)), self.low_heads, 3)))
        if pool == 1:
            return y.reshape(x.shape)
        y = y.reshape(batch, *(v for s in coarse for v in (s, 1)), dim)
        y = y.expand(batch, *(v for s in coarse for v in (s, pool)), dim)
        return crop(y.reshape(batch, *(s * pool for s in coarse), dim), sides)

    def forward(self, x: Tensor) -> Tensor:
        near, peak, low = x.split(self.parts, -1)
        near = F.gelu(self.local(self.expand(near)))
        peak = F.gelu(self.peak(max_pool(peak, 3, 1, 1)))
        y = torch.cat([near, peak, self.attention(low)], -1)
        return self.proj(y + self.blend(y))
