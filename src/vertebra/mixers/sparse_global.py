"""Attention among a sparse sample of cells, spread to the rest (EdgeViTs, arXiv 2205.03436, section 3.1, Fig. 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..layers import Attention, attend, crop, merge_heads, split_heads


class LocalPropagation(nn.Module):
    """Each cell fills a cube of `ratio` cells per axis, with one factor per place and channel and a bias.

    (B, *S, C) -> (B, *S * ratio, C). It is a depthwise transposed convolution whose kernel is its stride, so that no
    two cells meet and a broadcast product does it.
    """

    def __init__(self, ndim: int, dim: int, ratio: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, *(ratio,) * ndim))
        self.bias = nn.Parameter(torch.empty(dim))
        bound = 1 / math.sqrt(ratio**ndim)  # torch's default for a transposed convolution of these shapes
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        batch, *sides, dim = x.shape
        ratio = self.weight.shape[-1]
        weight = self.weight.squeeze(1).movedim(0, -1).reshape(*(v for _ in sides for v in (1, ratio)), dim)
        y = x.reshape(batch, *(v for s in sides for v in (s, 1)), dim) * weight
        return y.add_(self.bias).reshape(batch, *(s * ratio for s in sides), dim)


class SparseGlobalAttention(Attention):
    """Every `ratio`-th cell per axis attends to all others of the sample: (B, *S, C) -> (B, *S, C).

    The first cell of each cube stands for it; what it learnt goes back to the whole cube by `LocalPropagation`, then
    norm and projection at full resolution. Ragged cubes at the end of an axis are cropped. For N cells the logits take
    time (N / ratio^ndim)^2, everything else is linear in N, and memory is linear in N where attention is fused. At
    ratio 1 this is plain attention, without propagation and norm.
    """

    def __init__(self, ndim: int, dim: int, heads: int, ratio: int = 1):
        super().__init__(dim, heads)
        if ratio < 1:
            raise ValueError(f"the sampling ratio must be at least 1, got {ratio}")
        self.ratio = ratio
        if ratio > 1:
            self.spread, self.norm = LocalPropagation(ndim, dim, ratio), nn.LayerNorm(dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        sides = x.shape[1:-1]
        if self.ratio > 1:
            x = x[(slice(None), *(slice(None, None, self.ratio) for _ in sides))]
        q, k, v = split_heads(self.qkv(x.flatten(1, -2)), self.heads, 3)
        y = merge_heads(attend(q, k, v, bias)).reshape(x.shape)
        if self.ratio > 1:
            y = self.norm(crop(self.spread(y), sides))
        return self.proj(y)
