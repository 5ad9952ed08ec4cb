"""Super token attention (arXiv 2211.11167, section 3.2)."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import Conv, attend, check_heads, merge_heads, windows
from ..layers.cached import sized_cache


class Neighbours(NamedTuple):
    """The 3^d cells around each of the N cells of a grid, row-major offsets from (-1, ..) to (1, ..)."""

    there: Tensor  # (N * 3^d,) flat cell; any where there is none
    valid: Tensor  # (N, 3^d, 1) False outside of the grid

    def gather(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 3^d, C), zeros outside of the grid."""
        batch, cells, dim = x.shape
        views = x.index_select(1, self.there).reshape(batch, cells, self.valid.shape[1], dim)
        return views * self.valid.to(x.dtype)

    def scatter(self, parts: Tensor) -> Tensor:
        """The adjoint of `gather`: parts (B, N, 3^d, C) go to the neighbours they are meant for and add up, (B, N, C).

        A cell reads what its neighbour at an offset has for the opposite offset, so this is a gather too.
        """
        batch, cells, around, dim = parts.shape
        slot = torch.arange(around - 1, -1, -1, device=parts.device)
        rows = (self.there.reshape(cells, around) * around + slot).flatten()
        views = parts.reshape(batch, cells * around, dim).index_select(1, rows).reshape(parts.shape)
        return (views * self.valid.to(parts.dtype)).sum(2)


@sized_cache
def neighbours(grid: tuple[int, ...], device: torch.device | None = None) -> Neighbours:
    """The table of `Neighbours` for a grid of cells."""
    ndim = len(grid)
    steps = torch.tensor(list(product((-1, 0, 1), repeat=ndim)), device=device)
    index: Tensor | int = 0
    valid: Tensor | bool = True
    for axis, side in enumerate(grid):
        shape = [1] * axis + [side] + [1] * (ndim - axis)
        cell = torch.arange(side, device=device).reshape(shape) + steps[:, axis]
        index = index * side + cell.clamp(0, side - 1)
        valid = valid & (cell >= 0) & (cell < side)
    return Neighbours(index.flatten(), valid.reshape(-1, 3**ndim, 1))


class SuperTokenAttention(nn.Module):
    """Attention among super tokens, means of the tokens that belong to them: (B, *S, C) -> (B, *S, C), section 3.2.

    Cells of `size` tokens per axis give one super token each, at first their mean. A softmax shares each token out over
    the 3^d super tokens around it, which become the means of all tokens weighted by these shares; `iterations` times.
    Then they attend to each other, and each token reads its 3^d super tokens with the same shares. The shares carry no
    gradient. Beyond the border super tokens are zero but still take part in the softmax; a map that cells do not fill
    is padded with zeros that count as tokens. Size 1 is plain attention.

    With N tokens and M = N / size^d super tokens memory is O(N (C + 3^d) + 3^d M C) and time O((3^d N + M^2) C): the
    surroundings are gathered on the small map of super tokens only.
    """

    def __init__(self, ndim: int, dim: int, heads: int, size: int = 8, iterations: int = 1):
        super().__init__()
        check_heads(dim, heads)
        for name, value in (("size", size), ("iterations", iterations)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.heads, self.size, self.iterations = heads, size, iterations
        self.qkv, self.proj = Conv(ndim, dim, 3 * dim), Conv(ndim, dim, dim)

    def attention(self, x: Tensor) -> Tensor:
        """Multi-head attention over (B, N, C); each head has its query, key and value side by side in `qkv`."""
        batch, length, dim = x.shape
        width = dim // self.heads
        q, k, v = self.qkv(x).reshape(batch, length, self.heads, 3 * width).transpose(1, 2).split(width, -1)
        return self.proj(merge_heads(attend(q, k, v)))

    def share(self, tokens: Tensor, means: Tensor, around: Neighbours) -> tuple[Tensor, Tensor]:
        """Shares (B * M, L, 3^d) of the tokens (B * M, L, C), by cell, in the super tokens `means` (B, M, C) around it.

        Also what each super token gets in all, (B, M, 1) in float32: in half precision the sum of one that nobody chose
        would make a division by zero.
        """
        views = around.gather(means).flatten(0, 1)
        shares = (tokens @ (views * tokens.shape[-1] ** -0.5).mT).softmax(-1)
        sums = shares.sum(1, dtype=torch.float32).reshape(*means.shape[:2], shares.shape[-1], 1)
        return shares, (around.scatter(sums) * 1e12 + 1) / 1e12  # + 1e-12, which ONNX's optimiser would take for zero

    def collect(self, tokens: Tensor, shares: Tensor, mass: Tensor, around: Neighbours) -> Tensor:
        """Super tokens (B, M, C): the means of all tokens, weighted by their shares."""
        parts = (shares.mT @ tokens).reshape(*mass.shape[:2], shares.shape[-1], tokens.shape[-1])
        return (around.scatter(parts) / mass).to(tokens.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return self.attention(x.flatten(1, -2)).reshape(x.shape)
        sides, size = tuple(x.shape[1:-1]), self.size
        cells = windows(sides, (size,) * len(sides), device=x.device)
        around = neighbours(tuple((s + size - 1) // size for s in sides), device=x.device)
        tokens = cells.split(x)
        still = tokens.detach()
        shares, mass = self.share(still, still.mean(1).reshape(x.shape[0], cells.number, x.shape[-1]), around)
        for _ in range(self.iterations - 1):
            shares, mass = self.share(still, self.collect(still, shares, mass, around), around)
        refined = self.attention(self.collect(tokens, shares, mass, around))
        return cells.join(shares @ around.gather(refined).flatten(0, 1), sides)
