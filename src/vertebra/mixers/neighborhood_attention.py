"""Neighbourhood attention (NAT, arXiv 2204.07143, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import Attention, crop, merge_heads, pad_least, split_heads, tile_side, tiles
from ..layers.cached import settled
from ..layers.window import Tiles


class NeighborhoodAttention(Attention):
    """Attention to the `kernel` cells per axis around each cell, with a relative position bias: (B, *S, C) likewise.

    At the map's edges the window moves inwards, so that every cell has kernel^ndim keys (eq. 1 to 3); a map smaller
    than a window is filled with zeros to one, which take part as keys. `rpb` (heads, *(2 kernel - 1,) * ndim) is
    read at key minus query. Time and memory grow linearly with the map: tiles of cells share their keys, so that keys
    and values are copied (1 + (kernel - 1) / tile)^ndim times (3.4 for kernel 7 in 2-D), not kernel^ndim times; the
    bias is (tile + kernel - 1)^ndim numbers per cell and head, once for the whole batch.
    """

    no_decay = ("rpb",)

    def __init__(self, ndim: int, dim: int, heads: int, kernel: int = 7, qkv_bias: bool = True):
        super().__init__(dim, heads, qkv_bias)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"a neighbourhood is centred on its cell: kernel must be odd, got {kernel}")
        self.ndim, self.kernel = ndim, kernel
        self.rpb = nn.Parameter(torch.empty(heads, *(2 * kernel - 1,) * ndim))
        nn.init.trunc_normal_(self.rpb, std=0.02)

    @settled
    def _bias(self, sides: tuple[int, ...]) -> Tensor:
        return self._tiles(sides).bias(self.heads, self.rpb.flatten(1))

    def _tiles(self, sides: tuple[int, ...]) -> Tiles:
        tile = (tile_side(self.ndim, self.kernel),) * self.ndim
        return tiles(sides, tile, (self.kernel,) * self.ndim, clamped=True, device=self.rpb.device)

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[1:-1]
        x = pad_least(x, self.kernel)
        filled = tuple(x.shape[1:-1])
        q, k, v = split_heads(self.qkv(x).flatten(1, -2), self.heads, 3)
        y = merge_heads(self._tiles(filled).attend(q, k, v, self._bias(filled)))
        return self.proj(crop(y.reshape(x.shape), sides))
