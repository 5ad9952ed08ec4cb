"""Multi-scale dilated attention of DilateFormer (arXiv 2302.01791, section III-B, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Conv, Linear, check_heads, tile_side, tiles


class DilatedAttention(nn.Module):
    """Attention to a dilated window around each cell, one dilation per group of heads: (B, *S, C) -> (B, *S, C).

    A head of dilation r sees the cells at -r, 0 and r per axis (`kernel` 3; eq. 3 to 5). There is no position bias and
    no mask: places outside of the map are zero keys and values, which take part in the softmax with logit 0.
    Time and memory grow linearly with the map: tiles of cells share their keys, so that keys and values are copied
    (1 + (kernel - 1) / tile)^ndim times (2.25 in 2-D), not kernel^ndim times.
    """

    def __init__(self, ndim: int, dim: int, heads: int, kernel: int = 3, dilations: Sequence[int] = (1, 2, 3)):
        super().__init__()
        check_heads(dim, heads)
        if heads % len(dilations):
            raise ValueError(f"{heads} heads do not divide over {len(dilations)} dilations {tuple(dilations)}")
        self.ndim, self.heads, self.kernel, self.dilations = ndim, heads, kernel, tuple(dilations)
        self.qkv, self.proj = Conv(ndim, dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, *sides, dim = x.shape
        ndim, groups, width = self.ndim, len(self.dilations), dim // self.heads
        kernel, tile = (self.kernel,) * ndim, (tile_side(ndim, self.kernel),) * ndim
        # output channels run [query, key or value; dilation; head of the dilation; channel of the head]
        parts = self.qkv(x).flatten(1, -2).unflatten(-1, (3, groups, self.heads // groups, width))
        found = []
        for (q, k, v), dilation in zip(parts.permute(3, 2, 0, 4, 1, 5), self.dilations, strict=True):
            near = tiles(tuple(sides), tile, kernel, (dilation,) * ndim, device=x.device)
            found.append(near.attend(q, k, v, near.bias(q.shape[1])).transpose(1, 2))
        return self.proj(torch.cat(found, 2).reshape(batch, *sides, dim))
