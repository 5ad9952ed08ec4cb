"""Fully adaptive self-attention of FAT (arXiv 2306.00396)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv, ConvNorm, attend, check_heads, merge_heads, split_heads


class FineDownsample(nn.Module):
    """Halve a map `steps` times, depthwise, channels mixed in between: (B, *S, C) -> (B, *ceil(S / 2^steps), C)."""

    def __init__(self, ndim: int, dim: int, steps: int):
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(ndim, dim, dim, 5, 2, groups=dim, bias=True) for _ in range(steps))
        self.mixes = nn.ModuleList(Conv(ndim, dim, dim) for _ in range(steps - 1))

    def forward(self, x: Tensor) -> Tensor:
        for i, conv in enumerate(self.convs):
            x = conv(self.mixes[i - 1](x) if i else x)
        return x


class FullyAdaptiveAttention(nn.Module):
    """Attention and convolution of the same queries, one modulating the other: (B, *S, C) -> (B, *S, C).

    What attention found passes a sigmoid and gates what the convolution found; the product of both is projected. As
    published, the way back (local gates global) is left out. Keys and values come from a map smaller by `window`, a
    power of two. With N cells time is O(N^2 / window^ndim), memory O(N).
    """

    def __init__(self, ndim: int, dim: int, heads: int, kernel: int = 3, window: int = 1):
        super().__init__()
        check_heads(dim, heads)
        if window < 1 or window & (window - 1):
            raise ValueError(f"window must be a power of two, got {window}")
        self.heads = heads
        self.q, self.kv, self.proj = Conv(ndim, dim, dim), Conv(ndim, dim, 2 * dim), Conv(ndim, dim, dim)
        self.down = FineDownsample(ndim, dim, window.bit_length() - 1)
        self.local = Conv(ndim, dim, dim, kernel, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        k, v = split_heads(self.kv(self.down(x)).flatten(1, -2), self.heads, 2)
        (rows,) = split_heads(q.flatten(1, -2), self.heads)
        far = merge_heads(attend(rows, k, v)).reshape(x.shape)
        near = F.silu(self.local(q)) * torch.sigmoid(far)
        return self.proj(near * far)
