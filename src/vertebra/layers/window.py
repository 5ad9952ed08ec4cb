"""Windows as index tables: one gather in, one gather out, at any rank.

Padding, shift, dilation, partition and crop are all inside the tables, so that a map (B, *S, C) becomes windows
(B * W, L, C) by a single ``index_select`` and comes back by another.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .cached import sized_cache

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
        y = x.reshape(batch, math.prod(sides), dim).index_select(1, self.there)
        if self.valid is not None:
            y = y * self.valid.to(y.dtype)
        return y.reshape(batch * self.number, self.length, dim)

    def join(self, y: Tensor, sides) -> Tensor:
        """(B * W, L, C) -> (B, *S, C), the inverse of `split`."""
        dim = y.shape[-1]
        batch = y.shape[0] // self.number
        x = y.reshape(batch, self.number * self.length, dim).index_select(1, self.back)
        return x.reshape(batch, *sides, dim)

    def bias(self, bias: Tensor | None, batch: int) -> Tensor | None:
        """`bias` (heads, L, L) plus the mask, as attention over (B * W, heads, L, L) takes it."""
        if self.mask is None:
            return None if bias is None else bias.unsqueeze(0)
        mask = self.mask.unsqueeze(1)
        both = mask if bias is None else bias.unsqueeze(0) + mask.to(bias.dtype)
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
    device: torch.device | None = None,
) -> Windows:
    """Tables that split a map of `sides` into windows of `size` tokens per axis.

    interval: cells of a window lie this far apart (CrossFormer's long-distance groups, MaxViT's grids); default 1.
    shift: the map is rolled by -shift first, and pairs that were not neighbours before the roll get -100 (Swin).
    lead: zero cells put before the map instead of a roll (SwinMLP).
    mask_keys: padded keys get -1e4; otherwise they take part as zeros, as in Swin's dense version.
    The map is padded with zeros at the end of each axis to a multiple of size * interval.
    """
    ndim = len(sides)
    ones, zeros = (1,) * ndim, (0,) * ndim
    interval, shift, lead = interval or ones, shift or zeros, lead or zeros
    reads, oks, regions, homes, places, counts = [], [], [], [], [], []
    for side, w, i, s, before in zip(sides, size, interval, shift, lead, strict=True):
        span = w * i
        groups = (side + before + span - 1) // span
        padded = groups * span
        p = torch.arange(padded, device=device)
        grid = p.reshape(groups, w, i).transpose(1, 2).reshape(groups * i, w)  # window (group, phase), token
        source = (grid + s) % padded - before
        oks.append((source >= 0) & (source < side))
        reads.append(source.clamp(0, side - 1))
        regions.append((grid >= padded - w).long() + (grid >= padded - s).long())
        cell = (torch.arange(side, device=device) + before - s) % padded
        homes.append(cell // span * i + cell % i)
        places.append(cell % span // i)
        counts.append(groups * i)
    count, length = math.prod(counts), math.prod(size)
    there = _flatten(reads, sides, 2)
    back = _flatten(homes, counts, 1) * length + _flatten(places, size, 1)
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
