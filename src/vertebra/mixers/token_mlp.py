"""Token mixing of MLP-Mixer (arXiv 2105.01601, eq. 1, first line)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import resize


class CellLinear(nn.Linear):
    """A linear layer along the cells of a map, the same for each channel: (B, in, C) -> (B, out, C).

    The cells of `grid` are its inputs where `reads`, else its outputs; `hidden` is the other side.
    """

    def __init__(self, grid: Sequence[int], hidden: int, reads: bool):
        cells = math.prod(grid)
        super().__init__(*((cells, hidden) if reads else (hidden, cells)))
        self.grid, self.reads = tuple(grid), reads

    def forward(self, x: Tensor) -> Tensor:
        # the weight on the left side: neither x nor the result is ever transposed
        return torch.baddbmm(self.bias.unsqueeze(1), self.weight.expand(x.shape[0], -1, -1), x)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """The weight or bias of another (cubic) grid, joined with the resampling from and to that grid.

        So a mixer built for its own size gives what the stored one gives there, exactly. None where it cannot be.
        """
        ndim = len(self.grid)
        if tensor.ndim != getattr(self, name).ndim or (self.reads and name == "bias"):
            return None
        old = tensor.shape[1 if self.reads else 0]
        root = round(old ** (1 / ndim))
        if not old or root**ndim != old:
            return None
        if self.reads:  # what each cell of this grid gives to those of the old one
            cells = torch.eye(self.in_features, device=tensor.device).reshape(-1, *self.grid, 1)
            return tensor.float() @ resize(cells, root, antialias=True).flatten(1).T
        rows = tensor.float().reshape(1, *(root,) * ndim, -1)
        return resize(rows, self.grid, antialias=True).reshape(-1, *tensor.shape[1:])


class TokenMlp(nn.Module):
    """One MLP over all cells of a map, shared by the channels: (B, *S, C) -> (B, *S, C).

    Its weights know the cells of `grid` by number. A map of another size is resampled to that grid, mixed there and
    resampled back (linear, antialiased), so that every weight goes on seeing its part of the image; on the grid itself
    nothing is resampled. Time O(grid * hidden * C) and memory O((grid + hidden) * C) whatever the map, plus the map.
    """

    def __init__(self, grid: Sequence[int], hidden: int):
        super().__init__()
        self.grid = tuple(grid)
        self.fc1 = CellLinear(grid, hidden, reads=True)
        self.act = nn.GELU()
        self.fc2 = CellLinear(grid, hidden, reads=False)

    def forward(self, x: Tensor) -> Tensor:
        cells = resize(x, self.grid, antialias=True)
        mixed = self.fc2(self.act(self.fc1(cells.flatten(1, -2))))
        return resize(mixed.reshape(cells.shape), x.shape[1:-1], antialias=True)
