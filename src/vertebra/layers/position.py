"""Where a token is: absolute tables, relative biases, a learned bias function, sines and cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .cached import settled, sized_cache, tracing
from .kernels import Linear
from .space import ntuple, resize


@sized_cache
def relative_index(size: tuple[int, ...], device=None) -> Tensor:
    """(L, L) row of an offset table of (2 g - 1) entries per axis, row-major: query minus key, shifted to start at 0.

    L is the product of `size`. For a window of 7x7 entry [q, k] is (yq - yk + 6) * 13 + (xq - xk + 6).
    """
    cells = torch.cartesian_prod(*(torch.arange(s, device=device) for s in size)).reshape(-1, len(size))
    offsets = cells[:, None] - cells[None, :]
    index: Tensor | int = 0
    for axis, side in enumerate(size):
        index = index * (2 * side - 1) + offsets[..., axis] + side - 1
    return index


@sized_cache
def relative_offsets(size: tuple[int, ...], device=None) -> Tensor:
    """(prod(2 g - 1), ndim) float offsets from 1 - g to g - 1 per axis, row-major: what `relative_index` points at."""
    axes = (torch.arange(1 - s, s, device=device) for s in size)
    return torch.cartesian_prod(*axes).reshape(-1, len(size)).float()


class RelativePositionBias(nn.Module):
    """One learned number per head and offset (Swin, arXiv 2103.14030, eq. 4): () -> (heads, L, L).

    The table has prod(2 g - 1) rows, as checkpoints keep it; one of another window is resampled on loading.
    """

    no_decay = ("table",)

    def __init__(self, size: Sequence[int], heads: int):
        super().__init__()
        self.size = tuple(size)
        self.table = nn.Parameter(torch.empty(math.prod(2 * s - 1 for s in self.size), heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    @settled
    def forward(self) -> Tensor:
        index = relative_index(self.size, device=self.table.device)
        length = index.shape[0]
        return self.table.index_select(0, index.flatten()).reshape(length, length, -1).permute(2, 0, 1).contiguous()

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table of another (cubic) window, resampled to this one; None where it cannot be."""
        if tensor.ndim != 2 or tensor.shape[1] != self.table.shape[1]:
            return None
        side = round(tensor.shape[0] ** (1 / len(self.size)))
        if side % 2 == 0 or side ** len(self.size) != tensor.shape[0]:  # a window of g has 2 g - 1 offsets
            return None
        grid = tensor.float().reshape(1, *(side,) * len(self.size), -1)
        return resize(grid, [2 * s - 1 for s in self.size], "cubic").reshape(self.table.shape).to(tensor.dtype)


class DynamicPositionBias(nn.Module):
    """A small MLP from an offset to one bias per head (CrossFormer, arXiv 2108.00154, section 3.3, eq. 4).

    forward(size) -> (heads, L, L) for a group of `size` tokens per axis: any size, no table to resample. The width of
    the hidden layers is dim // 16 as in the official code (the paper's text says D / 4).
    """

    def __init__(self, ndim: int, dim: int, heads: int):
        super().__init__()
        width = dim // 16
        if width < 1:
            raise ValueError(f"a dynamic position bias needs at least 16 channels, got {dim}")
        self.pos_proj = Linear(ndim, width)
        for i, out in enumerate((width, width, heads), start=1):
            self.add_module(f"pos{i}", nn.Sequential(nn.LayerNorm(width), nn.ReLU(), Linear(width, out)))

    @settled
    def forward(self, size: tuple[int, ...]) -> Tensor:
        weight = self.pos_proj.weight
        values = self.pos_proj(relative_offsets(size, device=weight.device).to(weight.dtype))
        values = self.pos3(self.pos2(self.pos1(values)))
        index = relative_index(size, device=weight.device)
        length = index.shape[0]
        return values.index_select(0, index.flatten()).reshape(length, length, -1).permute(2, 0, 1).contiguous()


class Positions(nn.Module):
    """Learned absolute positions kept in the official flat shape (1, prefix + N, C), N cells of `grid`.

    forward(grid) -> (1, prefix + prod(grid), C): the table itself on its own grid, else its cells resampled. `prefix`
    rows (class tokens) have no place on the grid and stay as they are.
    """

    no_decay = ("table",)

    def __init__(
        self,
        dim: int,
        grid: Sequence[int],
        prefix: int = 0,
        mode: str = "cubic",
        antialias: bool = True,
        load_antialias: bool = False,
    ):
        super().__init__()
        self.grid, self.prefix, self.mode, self.antialias = tuple(grid), prefix, mode, antialias
        self.load_antialias = load_antialias
        self.table = nn.Parameter(torch.empty(1, prefix + math.prod(self.grid), dim))
        nn.init.trunc_normal_(self.table, std=0.02)

    @settled
    def forward(self, grid: Sequence[int]) -> Tensor:
        # a comparison with a symbolic grid would be a guard: when tracing always resample (exact at equal size)
        if not tracing() and tuple(grid) == self.grid:
            return self.table
        return self._resample(self.table, self.grid, grid, self.antialias)

    def _resample(self, table: Tensor, old: Sequence[int], new: Sequence[int], antialias: bool) -> Tensor:
        prefix, cells = table[:, : self.prefix], table[:, self.prefix :]
        grid = resize(cells.float().reshape(1, *old, cells.shape[-1]), tuple(new), self.mode, antialias)
        return torch.cat([prefix, grid.flatten(1, -2).to(table.dtype)], 1)

    def adapt(self, name: str, tensor: Tensor, published: Sequence[int] | None = None) -> Tensor | None:
        """A table of another grid resampled to this one (not antialiased unless asked for); None where it cannot be.

        The old grid is the published one where its count fits, else the root (a square), else by proportions.
        """
        if tensor.ndim != 3 or tensor.shape[-1] != self.table.shape[-1]:
            return None
        count, ndim = tensor.shape[1] - self.prefix, len(self.grid)
        if count < 1:
            return None
        root = round(count ** (1 / ndim))
        scale = (count / math.prod(self.grid)) ** (1 / ndim)
        guesses = [tuple(published or ()), (root,) * ndim, tuple(round(s * scale) for s in self.grid)]
        old = next((g for g in guesses if g and math.prod(g) == count), None)
        if old is None:
            return None
        return self._resample(tensor, old, self.grid, self.load_antialias)


@sized_cache
def sincos(sides: tuple[int, ...], dim: int, temperature: float = 10000.0, device=None) -> Tensor:
    """Fixed sines and cosines (MoCo v3's layout): (prod(sides), dim), dim split evenly over axes, then sin | cos.

    Raises ValueError when dim does not divide by twice the number of axes.
    """
    if dim % (2 * len(sides)):
        raise ValueError(
            f"sin-cos positions on {len(sides)} axes need channels divisible by {2 * len(sides)}, got {dim}"
        )
    width = dim // (2 * len(sides))
    omega = temperature ** -(torch.arange(width, device=device, dtype=torch.float64) / width)
    cells = torch.cartesian_prod(*(torch.arange(s, device=device) for s in sides)).reshape(-1, len(sides))
    angles = cells.double()[:, :, None] * omega
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1).float()


def built_grid(img_size, ndim: int, patch: int) -> tuple[int, ...]:
    """Cells of a patch grid on an image of `img_size`, the last ones padded."""
    return tuple((s + patch - 1) // patch for s in ntuple(img_size, ndim, "img_size"))
