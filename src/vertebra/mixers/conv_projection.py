"""Attention with convolutional projections (CvT, arXiv 2103.15808, section 3.2, Fig. 3c)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import ConvNorm, Linear, attend, check_heads, merge_heads, split_heads


class ConvProjectionAttention(nn.Module):
    """Queries, keys and values through depthwise convolutions: (B, *S, C) -> (B, *S, C), eq. 2.

    Each of the three is depthwise 3x3, batch norm, linear; keys and values take every `stride`-th cell. Logits are
    scaled by C^-0.5, with the whole width for the head's. `prefix` tokens in front of the map (a class token) pass the
    convolutions by; x is then (B, prefix + N, C), called with the map's `grid`.

    Time grows with N^2 / stride^ndim for N tokens, memory with N: fused attention forms no weights.
    """

    def __init__(self, ndim: int, dim: int, heads: int, stride: int = 2, prefix: int = 0):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.prefix, self.scale = heads, prefix, dim**-0.5
        self.conv_q = ConvNorm(ndim, dim, dim, 3, groups=dim)
        self.conv_k, self.conv_v = (ConvNorm(ndim, dim, dim, 3, stride, groups=dim) for _ in range(2))
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        if self.prefix and grid is None:
            raise ValueError(f"with {self.prefix} prefix tokens attention needs the grid of the others")
        if grid is None:
            cells = x
        else:  # one copy here, or each of the convolutions would make its own
            cells = x[:, self.prefix :].reshape(x.shape[0], *grid, x.shape[-1]).contiguous()

        def project(conv: nn.Module, linear: nn.Module) -> Tensor:
            tokens = conv(cells).flatten(1, -2)
            if self.prefix:
                tokens = torch.cat([x[:, : self.prefix], tokens], 1)
            return split_heads(linear(tokens), self.heads)[0]

        q, k, v = project(self.conv_q, self.q), project(self.conv_k, self.k), project(self.conv_v, self.v)
        return self.proj(merge_heads(attend(q, k, v, scale=self.scale))).reshape(x.shape)
