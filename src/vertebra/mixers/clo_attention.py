"""Context-aware local enhancement beside pooled attention: the Clo block of CloFormer (arXiv 2303.17803)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Conv, attend, avg_pool, check_heads, merge_heads, split_heads
from ..layers.cached import tracing


class AttnConv(nn.Module):
    """Depthwise convolution whose result is weighted by what lies there: (B, *S, dim) -> (B, *S, share).

    Queries, keys and values pass one convolution of shared weights; a gate between -1 and 1, grown from the product of
    queries and keys, weighs the values. No cell is compared with another: time and memory are linear in the map.
    """

    def __init__(self, ndim: int, dim: int, share: int, kernel: int, scale: float):
        super().__init__()
        self.scale = scale
        self.qkv, self.conv = Conv(ndim, dim, 3 * share), Conv(ndim, 3 * share, 3 * share, kernel, groups=3 * share)
        self.gate = nn.Sequential(Conv(ndim, share, share), nn.SiLU(), Conv(ndim, share, share))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.conv(self.qkv(x)).chunk(3, -1)
        return torch.tanh(self.gate(q * k) * self.scale) * v


class CloAttention(nn.Module):
    """Some heads look near by convolution, the others far by attention: (B, *S, C) -> (B, *S, C).

    `shares` has the heads of each local branch, one per kernel of `kernels`, and last those of the global one, which
    attends to the map averaged over cells of `window` per axis (a ragged end is cut off); zero leaves a branch out.
    With N cells time is O(N^2 / window^ndim), memory O(N).
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, shares: Sequence[int], kernels: Sequence[int] = (3,), window: int = 1
    ):
        super().__init__()
        check_heads(dim, heads)
        if len(shares) != len(kernels) + 1 or sum(shares) != heads or min(shares) < 0:
            raise ValueError(
                f"shares {tuple(shares)} must sum to {heads} heads: one for each of {len(kernels)} kernels, and global"
            )
        width = dim // heads
        self.window, self.heads = window, shares[-1]
        self.local = nn.ModuleList(
            AttnConv(ndim, dim, share * width, kernel, width**-0.5)
            for share, kernel in zip(shares, kernels, strict=False)
            if share
        )
        if self.heads:
            self.q, self.kv = Conv(ndim, dim, self.heads * width), Conv(ndim, dim, 2 * self.heads * width)
        self.proj = Conv(ndim, dim, dim)

    def _global(self, x: Tensor) -> Tensor:
        """The global branch: (B, *S, C) -> (B, *S, heads * width)."""
        q, y = self.q(x), x
        if self.window > 1:
            # a side shorter than a window is one; a traced program is for maps that have one
            y = avg_pool(x, self.window if tracing() else [min(self.window, s) for s in x.shape[1:-1]])
        k, v = split_heads(self.kv(y).flatten(1, -2), self.heads, 2)
        (rows,) = split_heads(q.flatten(1, -2), self.heads)
        return merge_heads(attend(rows, k, v)).reshape(q.shape)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.local]
        if self.heads:
            parts.append(self._global(x))
        return self.proj(torch.cat(parts, -1))
