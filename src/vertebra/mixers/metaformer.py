"""The plain mixers of MetaFormer (arXiv 2111.11418, 2210.13452): pooling, fixed random mixing, separable convolution.

They show how much of a transformer's accuracy is due to its frame. Identity, the plainest, is ``nn.Identity``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Conv, Linear, avg_pool, resize


class StarReLU(nn.Module):
    """s * relu(x)^2 + b with two learned scalars (arXiv 2210.13452, section 2.3, eq. 9): any shape."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.relu().square() + self.bias


class PoolMixer(nn.Module):
    """Mean over `kernel` cells per axis, minus the cell itself: (B, *S, C) -> (B, *S, C), arXiv 2111.11418, eq. 4.

    The border's windows are smaller: padding is not counted. No parameters; time and memory linear in the map.
    """

    def __init__(self, kernel: int = 3):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"a window is centred on its cell: kernel must be odd, got {kernel}")
        self.kernel = kernel

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool(x, self.kernel, 1, self.kernel // 2, count_include_pad=False) - x


class RandomMixer(nn.Module):
    """A fixed random matrix over the cells of `grid`: (B, *S, C) -> (B, *S, C), arXiv 2210.13452, eq. 4.

    It is stored but not trained. A map of another size is resampled to the grid, mixed, and resampled back (linear,
    antialiased). Time and memory are those of the built grid, quadratic in its cells, plus the map.
    """

    def __init__(self, grid: Sequence[int]):
        super().__init__()
        self.grid, cells = tuple(grid), math.prod(grid)
        self.random_matrix = nn.Parameter(torch.rand(cells, cells).softmax(-1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        cells = resize(x, self.grid, antialias=True)
        mixed = torch.matmul(self.random_matrix.to(cells.dtype), cells.flatten(1, -2))
        return resize(mixed.reshape(cells.shape), x.shape[1:-1], antialias=True)


class SeparableConvMixer(nn.Module):
    """Pointwise, StarReLU, depthwise `kernel`, pointwise, no biases: (B, *S, C) -> (B, *S, C), arXiv 2210.13452, eq. 7.

    MobileNetV2's separable convolution as a token mixer. Time and memory linear in the map.
    """

    def __init__(self, ndim: int, dim: int, kernel: int = 7, expand: int = 2):
        super().__init__()
        wide = expand * dim
        self.pwconv1, self.act1 = Linear(dim, wide, bias=False), StarReLU()
        self.dwconv, self.pwconv2 = (
            Conv(ndim, wide, wide, kernel, groups=wide, bias=False),
            Linear(wide, dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pwconv2(self.dwconv(self.act1(self.pwconv1(x))))
