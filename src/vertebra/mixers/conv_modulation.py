"""Convolutional modulation of Conv2Former (arXiv 2211.11943, section 3.2, Fig. 2c)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import Conv


class ConvModulation(nn.Module):
    """Values weighted by a wide depthwise convolution instead of attention: (B, *S, C) -> (B, *S, C), eq. 5 and 6.

    proj(dwconv(GELU(a x)) * v x). Time and memory grow linearly with the map.
    """

    def __init__(self, ndim: int, dim: int, kernel: int = 11):
        super().__init__()
        self.att = nn.Sequential(Conv(ndim, dim, dim), nn.GELU(), Conv(ndim, dim, dim, kernel, groups=dim))
        self.v, self.proj = Conv(ndim, dim, dim), Conv(ndim, dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.att(x) * self.v(x))
