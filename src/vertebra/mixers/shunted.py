"""Shunted self-attention (arXiv 2111.15193, section 3.1, Fig. 3) and the form of it without reduction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import (
    Conv,
    CrossAttention,
    Linear,
    ResidualConv,
    attend,
    check_heads,
    merge_heads,
    pad_least,
    split_heads,
)


class _Scale(nn.Module):
    """Keys and values of one scale, from a map made smaller by `ratio`: (B, *S, dim) -> two of (B, M, share).

    Values are enhanced by a depthwise convolution with a residual (eq. 4); a ragged end of the map is cut off, and
    a smaller map is filled with zeros to one cell.
    """

    def __init__(self, ndim: int, dim: int, share: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.sr, self.norm, self.act = Conv(ndim, dim, dim, ratio, ratio, padding=0), nn.LayerNorm(dim), nn.GELU()
        self.kv = Linear(dim, 2 * share)
        self.local = ResidualConv(ndim, share)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.kv(self.act(self.norm(self.sr(pad_least(x, self.ratio))))).chunk(2, -1)
        return k.flatten(1, -2), self.local(v).flatten(1, -2)


class ShuntedAttention(nn.Module):
    """Attention whose heads see keys and values of different granularity: (B, *S, C) -> (B, *S, C), eq. 1 to 4.

    The heads are shared out evenly over `ratios`; a head of ratio r reads a map r times smaller per axis. With N cells
    it takes time O(N * M) and memory O(N) for M = sum of N / r^ndim keys: quadratic still, but 1 / r^ndim of it.
    """

    def __init__(self, ndim: int, dim: int, heads: int, ratios: Sequence[int] = (8, 4)):
        super().__init__()
        check_heads(dim, heads)
        if not ratios or heads % len(ratios):
            raise ValueError(f"{heads} heads cannot be shared out evenly over {len(ratios)} ratios")
        self.heads = heads // len(ratios)
        self.q, self.proj = Linear(dim, dim), Linear(dim, dim)
        self.scales = nn.ModuleList(_Scale(ndim, dim, dim // len(ratios), ratio) for ratio in ratios)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.q(x).flatten(1, -2).chunk(len(self.scales), -1)
        read = []
        for q, scale in zip(queries, self.scales, strict=True):
            q, k, v = (split_heads(t, self.heads)[0] for t in (q, *scale(x)))
            read.append(merge_heads(attend(q, k, v)))
        return self.proj(torch.cat(read, -1)).reshape(x.shape)


class LocalEnhancedAttention(CrossAttention):
    """Self-attention plus a depthwise convolution of its values: (B, *S, C) -> (B, *S, C).

    What Shunted Transformer uses where nothing is reduced; the local term joins after the product, not before it. Time
    quadratic in the number of cells, memory linear.
    """

    def __init__(self, ndim: int, dim: int, heads: int):
        super().__init__(dim, heads)
        self.local_conv = Conv(ndim, dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, -1)
        parts = (split_heads(t.flatten(1, -2), self.heads)[0] for t in (self.q(x), k, v))
        return self.proj(merge_heads(attend(*parts)).reshape(x.shape) + self.local_conv(v))
