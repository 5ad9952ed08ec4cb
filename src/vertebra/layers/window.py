"""Windows as index tables: one gather in, one gather out, at any rank.

Padding, shift, dilation, partition and crop are all inside the tables, so that a map (B, *S, C) becomes windows
(B * W, L, C) by a single ``index_select`` and comes back by another. `windows` is for windows that do not overlap,
`tiles` for a window that slides from cell to cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import frugal
from .attention import attend
from .cached import sized_cache, tracing

SHIFT_MASK = -100.0  # Swin's value; a pair in different regions of a shifted map
KEY_MASK = -1e4  # padded keys: far below any logit, and finite in float16 where -1e6 would be -inf


class Windows(NamedTuple):
    """How a map of the given sides falls into windows; see `windows`."""

    there: Tensor  # (W * L,) flat cell that each window position reads
    back: Tensor  # (N,) window position of each cell
    valid: Tensor | None  # (W * L, 1) False where a position is padding; None where nothing is padded
    mask: Tensor | None  # (W, L, L) additive; None where nothing is masked
    number: int  # W
    length: int  # L

    def split(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B * W, L, C), zeros where padded."""
        batch, *sides, dim = x.shape
        x = x.reshape(batch, math.prod(sides), dim)
        if frugal.wanted(x):
            y = frugal.take(x, self.there, self.back, self.valid)
        else:
            y = x.index_select(1, self.there)
            if self.valid is not None:
                y = y * self.valid.to(y.dtype)
        return y.reshape(batch * self.number, self.length, dim)

    def join(self, y: Tensor, sides) -> Tensor:
        """(B * W, L, C) -> (B, *S, C), the inverse of `split`."""
        dim = y.shape[-1]
        batch = y.shape[0] // self.number
        y = y.reshape(batch, self.number * self.length, dim)
        if frugal.wanted(y):
            x = frugal.take(y, self.back, self.there, back_valid=self.valid)
        else:
            x = y.index_select(1, self.back)
        return x.reshape(batch, *sides, dim)

    def bias(self, bias: Tensor | None, batch: int) -> Tensor | None:
        """`bias` (heads, L, L) plus the mask, as `attend` takes it for (B * W, heads, L, L) logits."""
        if self.mask is None:
            return None if bias is None else bias.unsqueeze(0)
        mask = self.mask.unsqueeze(1)
        both = mask if bias is None else bias.unsqueeze(0) + mask.to(bias.dtype)
        if not tracing():
            return both  # attend repeats it where it has to
        return both.expand(batch, *both.shape).flatten(0, 1)


def _spread(tables: list[Tensor], block: int) -> list[Tensor]:
    """View per-axis tables (n_d, g_d) so that they broadcast to (n_1 .. n_d, g_1 .. g_d); one value per cell if 1-D."""
    ndim = len(tables)
    views = []
    for axis, table in enumerate(tables):
        shape = [1] * (block * ndim)
        for part in range(block):
            shape[part * ndim + axis] = table.shape[part]
        views.append(table.reshape(shape))
    return views


def _flatten(tables: list[Tensor], sizes, block: int) -> Tensor:
    """Row-major flat index of the per-axis coordinates `tables` in a grid of `sizes`."""
    flat: Tensor | int = 0
    for view, size in zip(_spread(tables, block), sizes, strict=True):
        flat = flat * size + view
    return flat.reshape(-1)


@sized_cache
def windows(
    sides: tuple[int, ...],
    size: tuple[int, ...],
    interval: tuple[int, ...] | None = None,
    shift: tuple[int, ...] | None = None,
    lead: tuple[int, ...] | None = None,
    mask_keys: bool = False,
    groups: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> Windows:
    """Tables that split a map of `sides` into windows of `size` tokens per axis.

    interval: cells of a window lie this far apart (CrossFormer's long-distance groups, MaxViT's grids); default 1.
    shift: the map is rolled by -shift first, and pairs that were not neighbours before the roll get -100 (Swin).
    lead: zero cells put before the map instead of a roll (SwinMLP).
    mask_keys: padded keys get -1e4; otherwise they take part as zeros, as in Swin's dense version.
    groups: how often size * interval fits on each axis, where the caller knows (None: does not): a plain number,
        whatever the sides are, where symbolic ones would give an expression that nobody can simplify.
    The map is padded with zeros at the end of each axis to a multiple of size * interval.
    """
    ndim = len(sides)
    ones, zeros = (1,) * ndim, (0,) * ndim
    interval, shift, lead = interval or ones, shift or zeros, lead or zeros
    reads, oks, regions, homes, places, counts = [], [], [], [], [], []
    for axis, (side, w, i, s, before) in enumerate(zip(sides, size, interval, shift, lead, strict=True)):
        span = w * i
        known = None if groups is None else groups[axis]
        fits = (side + before + span - 1) // span if known is None else known
        padded = fits * span
        p = torch.arange(padded, device=device)
        grid = p.reshape(fits, w, i).transpose(1, 2).reshape(fits * i, w)  # window (group, phase), token
        source = (grid + s) % padded - before
        oks.append((source >= 0) & (source < side))
        reads.append(source.clamp(0, side - 1))
        regions.append((grid >= padded - w).long() + (grid >= padded - s).long())
        cell = (torch.arange(side, device=device) + before - s) % padded
        homes.append(cell // span * i + cell % i)
        places.append(cell % span // i)
        counts.append(fits * i)
    count, length = math.prod(counts), math.prod(size)
    there = _flatten(reads, sides, 2)
    # never below zero, which torch's inductor fails to see (and then to compile) through // and %
    back = (_flatten(homes, counts, 1) * length + _flatten(places, size, 1)).clamp(min=0)
    valid, mask = None, None
    if any(type(s) is not int or n * w != s for s, n, w in zip(sides, counts, size, strict=True)):
        valid = torch.stack(torch.broadcast_tensors(*_spread(oks, 2))).all(0).reshape(count, length)
    if any(shift):
        names = _flatten(regions, (3,) * ndim, 2).reshape(count, length)
        mask = SHIFT_MASK * (names[:, :, None] != names[:, None, :]).float()
    if mask_keys and valid is not None:
        keys = KEY_MASK * (~valid).float()[:, None, :].expand(count, length, length)
        mask = keys if mask is None else mask + keys
    return Windows(there, back, None if valid is None else valid.reshape(-1, 1), mask, count, length)


class Tiles(NamedTuple):
    """How a map falls into tiles of queries, each with the keys that its sliding windows reach; see `tiles`."""

    queries: Tensor  # (W * L,) flat cell that each query of a tile reads
    back: Tensor  # (N,) query of each cell
    keys: Tensor  # (W * M,) flat cell that each key of a tile reads; N where it lies outside of the map
    offsets: list[Tensor]  # per axis (n or 1, t, m): where each key stands in the window of each query
    rows: tuple[int, ...]  # offsets that a window has, per axis; that number itself stands for "not in the window"
    number: int  # W
    length: int  # L
    reach: int  # M
    clamped: bool

    def bias(self, heads: int, table: Tensor | None = None) -> Tensor:
        """`table` (heads, prod(rows)) at every pair of query and key, -1e4 where the key is not in the query's window.

        (1, heads * W, L, M); (1, 1, L, M) without a table where all tiles are alike.
        """
        if table is None:
            table = torch.zeros(1, math.prod(self.rows), device=self.back.device)
        grid = table.reshape(table.shape[0], *self.rows)
        grid = F.pad(grid, [0, 1] * len(self.rows), value=KEY_MASK)
        # only the index of each axis is kept: the whole one is as large as the bias
        index = _flatten(self.offsets, [r + 1 for r in self.rows], 3)
        number = self.number if self.clamped else 1
        bias = grid.flatten(1).index_select(1, index).reshape(-1, number, self.length, self.reach)
        if bias.shape[0] == 1 and not self.clamped:
            return bias
        return bias.expand(heads, self.number, -1, -1).reshape(1, heads * self.number, self.length, self.reach)

    def split_queries(self, x: Tensor) -> Tensor:
        """(B, heads, N, D) -> (B, heads * W, L, D)."""
        batch, heads, cells, dim = x.shape
        y = x.reshape(batch * heads, cells, dim).index_select(1, self.queries)
        return y.reshape(batch, heads * self.number, self.length, dim)

    def split_keys(self, x: Tensor) -> Tensor:
        """(B, heads, N, D) -> (B, heads * W, M, D), zeros outside of the map."""
        batch, heads, cells, dim = x.shape
        if not self.clamped:
            x, cells = F.pad(x, [0, 0, 0, 1]), cells + 1
        y = x.reshape(batch * heads, cells, dim).index_select(1, self.keys)
        return y.reshape(batch, heads * self.number, self.reach, dim)

    def join(self, y: Tensor, heads: int) -> Tensor:
        """(B, heads * W, L, D) -> (B, heads, N, D), the inverse of `split_queries`."""
        batch, dim = y.shape[0], y.shape[-1]
        x = y.reshape(batch * heads, self.number * self.length, dim).index_select(1, self.back)
        return x.reshape(batch, heads, self.back.shape[0], dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention of each cell to its window, q, k and v (B, heads, N, D) -> (B, heads, N, D)."""
        y = attend(self.split_queries(q), self.split_keys(k), self.split_keys(v), bias)
        return self.join(y, q.shape[1])


def tile_side(ndim: int, kernel: int) -> int:
    """Queries per axis and tile that were fastest on a CPU: more waste logits, fewer copy keys too often."""
    return (32, max(kernel, 4), 4)[ndim - 1]


@sized_cache
def tiles(
    sides: tuple[int, ...],
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    interval: tuple[int, ...] | None = None,
    clamped: bool = False,
    device: torch.device | None = None,
) -> Tiles:
    """Tables for windows of `kernel` cells, `interval` apart, centred on every cell of a map of `sides`.

    The map is cut into tiles of `size` queries per axis. A tile's keys are its own cells and a rim of half a window, so
    that keys are copied prod(1 + (kernel - 1) / size) times, not prod(kernel) times.
    clamped: at the map's edges a window is moved to lie inside (neighbourhood attention) and offsets are key minus
    query + kernel - 1, of 2 kernel - 1; every side needs `kernel` cells. Otherwise keys outside of the map are zeros
    that take part, and offsets are places in the window, of `kernel`.
    """
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"a window is centred on its cell: kernel must be odd, got {kernel}")
    if clamped and interval is not None:
        raise ValueError("clamped windows have no interval")
    interval = interval or (1,) * len(sides)
    reads, keys, inside, offsets, homes, places, counts = [], [], [], [], [], [], []
    for side, t, k, i in zip(sides, size, kernel, interval, strict=True):
        half, span, m = k // 2, t * i, t + k - 1
        groups = (side + span - 1) // span
        p = torch.arange(groups * span, device=device)
        grid = p.reshape(groups, t, i).transpose(1, 2).reshape(groups * i, t)  # tile (group, phase), query
        query, rim = grid.clamp(max=side - 1), torch.arange(m, device=device)
        if clamped:
            cells = (grid[:, :1] - half).clamp(max=side - m).clamp(min=0) + rim
            first = (query - half).clamp(0, side - k)[:, :, None]
            near = (cells[:, None] >= first) & (cells[:, None] < first + k)
            offset = torch.where(near, cells[:, None] - query[:, :, None] + k - 1, 2 * k - 1)
        else:
            cells = grid[:, :1] + (rim - half) * i
            offset = (rim - torch.arange(t, device=device)[:, None])[None]
            offset = torch.where((offset >= 0) & (offset < k), offset, k)
        reads.append(query)
        keys.append(cells.clamp(0, side - 1))
        inside.append((cells >= 0) & (cells < side))
        offsets.append(offset.int())
        cell = torch.arange(side, device=device)
        homes.append(cell // span * i + cell % i)
        places.append(cell % span // i)
        counts.append(groups * i)
    count, length = math.prod(counts), math.prod(size)
    flat = _flatten(keys, sides, 2)
    if not clamped:
        ok = torch.stack(torch.broadcast_tensors(*_spread(inside, 2))).all(0).reshape(-1)
        flat = torch.where(ok, flat, math.prod(sides))
    back = (_flatten(homes, counts, 1) * length + _flatten(places, size, 1)).clamp(min=0)  # as in `windows`
    rows = tuple(2 * k - 1 if clamped else k for k in kernel)
    reach = math.prod([t + k - 1 for t, k in zip(size, kernel, strict=True)])
    return Tiles(_flatten(reads, sides, 2), back, flat, offsets, rows, count, length, reach, clamped)
