"""Focal self-attention (arXiv 2107.00641, section 3.2): near tokens as they are, far ones summarised by window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Linear, RelativePositionBias, Windows, attend, check_heads, merge_heads, split_heads, windows
from ..layers.cached import sized_cache, tracing
from ..layers.position import relative_offsets

OUTSIDE = -100.0  # bias of a pooled token outside of the map: the published value
_SEARCH = 2**22  # distances held at once while looking for the nearest tokens


def _cells(sides: Sequence[int], device) -> Tensor:
    """(prod(sides), ndim) coordinates, row-major."""
    axes = (torch.arange(s, device=device) for s in sides)
    return torch.cartesian_prod(*axes).reshape(math.prod(sides), len(sides))


def surround(window: Sequence[int], expand: int) -> list[tuple[int, ...]]:
    """Cells around a window, as offsets from its first cell, in the published order.

    The window is moved by `expand` cells along every axis, in each combination of directions (in 2-D to the bottom
    right, bottom left, top right, top left), and what falls outside of the window itself is kept, row-major. Where two
    moved windows overlap a cell comes twice. 7x7 moved by 3: 4 x 33 cells.
    """
    found = []
    for signs in itertools.product((1, -1), repeat=len(window)):
        for slot in itertools.product(*map(range, window)):
            cell = tuple(c + s * expand for c, s in zip(slot, signs, strict=True))
            if any(not 0 <= c < w for c, w in zip(cell, window, strict=True)):
                found.append(cell)
    return found


def _counts(sides: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Windows per axis of a map, the last ones padded."""
    return tuple((s + w - 1) // w for s, w in zip(sides, window, strict=True))


@sized_cache
def focal_keys(counts: tuple[int, ...], window: tuple[int, ...], expand: int, focal: int, device=None):
    """Where each of the `counts` windows reads its keys -> (W * K,) rows, (W, K) additive mask or None.

    Rows: first all cells, window by window, then the pooled tokens, then one empty row for pooled tokens outside.
    """
    ndim, number, length = len(window), math.prod(counts), math.prod(window)
    near = [*itertools.product(*map(range, window)), *(surround(window, expand) if expand else ())]
    slots = torch.tensor(near, device=device)
    reach = torch.tensor([*itertools.product(range(-(focal // 2), focal // 2 + 1), repeat=ndim)], device=device)
    places = _cells(counts, device)
    home: Any = 0
    slot: Any = 0
    coarse: Any = 0
    inside: Any = True
    for axis, (n, w) in enumerate(zip(counts, window, strict=True)):
        cell = (places[:, None, axis] * w + slots[None, :, axis]) % (n * w)  # the map is a ring
        home, slot = home * n + cell // w, slot * w + cell % w
        other = places[:, None, axis] + reach[None, :, axis]
        coarse, inside = coarse * n + other, (other >= 0) & (other < n) & inside
    rows = torch.cat([home * length + slot, torch.where(inside, coarse, number) + number * length], 1)
    if focal == 1:  # a window's own summary is never outside
        return rows.reshape(-1), None
    return rows.reshape(-1), F.pad(OUTSIDE * (~inside).float(), (len(near), 0))


@sized_cache
def _far_index(window: tuple[int, ...], focal: int, device=None) -> Tensor:
    """(L * focal^ndim,) column of the table of pooled tokens: offset of a cell in the window to one in the patch."""
    queries, keys = _cells(window, device), _cells((focal,) * len(window), device)
    index: Tensor | int = 0
    for axis, w in enumerate(window):
        index = index * (w + focal - 1) + queries[:, None, axis] - keys[None, :, axis] + focal - 1
    return index.reshape(-1)


def _nearest(centres: Tensor, points: Tensor, top: int) -> Tensor:
    """(W, K) indices of the min(`top`, N) `points` (N, ndim) nearest to each of the `centres` (W, ndim).

    Equal distances are settled as ``torch.topk`` does, on the CPU, as in the published network.
    """
    number = points.shape[0]
    parts = [centres] if tracing() else centres.split(max(1, _SEARCH // number))
    found = []
    for part in parts:
        square: Tensor | int = 0
        for axis in range(points.shape[1]):
            square = square + (part[:, None, axis] - points[None, :, axis]).float().square()
        found.append(square.sqrt().neg().topk(torch.sym_min(top, number), -1).indices)
    return torch.cat(found)


def nearest_sets(sides: Sequence[int], window: tuple[int, ...], top: int) -> tuple[Tensor, Tensor]:
    """For each window of a map the `top` nearest cells (W, K) and the `top` nearest windows (W, K'), flat indices."""
    device = torch.device("cpu")
    steps = torch.tensor(window, device=device)
    places = _cells(_counts(sides, window), device)
    return _nearest(places * steps + steps // 2, _cells(sides, device), top), _nearest(places, places, top)


def _offsets(sides: Sequence[int], window: tuple[int, ...], fine: Tensor, coarse: Tensor) -> Tensor:
    """(W * L * K,) offset of each query of a window to each of its keys, `fine` cells and `coarse` windows.

    It counts in the table of `relative_offsets` over the padded map; for summaries, which stand at the centre of their
    window, in a second one after it.
    """
    device = fine.device
    places = _cells(_counts(sides, window), device)
    points, slots = _cells(sides, device), _cells(window, device)
    index: Any = 0
    table: Any = 1
    for axis, (s, w) in enumerate(zip(sides, window, strict=True)):
        span = (s + w - 1) // w * w
        queries = places[:, None, axis] * w + slots[None, :, axis]
        keys = torch.cat([points[:, axis][fine], places[:, axis][coarse] * w + w // 2], 1)
        index = index * (2 * span - 1) + queries[:, :, None] - keys[:, None, :] + span - 1
        table = table * (2 * span - 1)
    second = torch.cat([fine.new_zeros(fine.shape[1]), coarse.new_ones(coarse.shape[1])]) * table
    return (index + second).reshape(-1).int()


@sized_cache
def _nearest_keys(sides: tuple[int, ...], window: tuple[int, ...], top: int, device=None):
    """`nearest_sets` and their `_offsets`."""
    fine, coarse = (found.to(device) for found in nearest_sets(sides, window, top))
    return fine, coarse, _offsets(sides, window, fine, coarse)


class _Focal(nn.Module):
    """What both forms share: every window attends to some cells and to some windows' summaries.

    A window's summary is one learned weighted sum of its cells. A map that windows do not fill is padded with zeros.
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int):
        super().__init__()
        check_heads(dim, heads)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {window!r}")
        self.heads, self.window = heads, (window,) * ndim
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)
        length = window**ndim
        self.pool = Linear(length, 1)
        nn.init.constant_(self.pool.weight, 1 / length)
        nn.init.zeros_(self.pool.bias)

    def context(self, sides: tuple[int, ...], cells: Windows, device) -> tuple[Tensor, Tensor]:
        """Rows of keys (W * K,) and the bias (heads, W or 1, L, K)."""
        raise NotImplementedError

    def _rows(self, kv: Tensor) -> Tensor:
        """(B, N, 2 * C) -> (B, heads, N, 2 * d): a row holds the key and the value of one token in one head."""
        batch, number, width = kv.shape
        split = kv.reshape(batch, number, 2, self.heads, width // (2 * self.heads))
        return split.permute(0, 3, 1, 2, 4).flatten(3)

    def forward(self, x: Tensor) -> Tensor:
        batch, *rest, dim = x.shape
        sides, heads = tuple(rest), self.heads
        cells = windows(sides, self.window, device=x.device)
        number, length = cells.number, cells.length
        tokens = cells.split(x)
        summary = self.pool(tokens.transpose(1, 2)).reshape(batch, number, dim)
        qkv = self.qkv(tokens.reshape(batch, number * length, dim))
        coarse = F.linear(summary, self.qkv.weight[dim:], self.qkv.bias[dim:])

        # attention runs over (B, heads * W, L, K): heads before windows, so that the bias needs no copy per sample
        fine, coarse = self._rows(qkv[..., dim:]), self._rows(coarse)
        rows, bias = self.context(sides, cells, x.device)
        bank = torch.cat([fine, coarse, fine.new_zeros(batch, heads, 1, fine.shape[-1])], 2)
        keys = bias.shape[-1]
        kv = bank.index_select(2, rows).reshape(batch, heads * number, keys, 2 * (dim // heads))
        (q,) = split_heads(qkv[..., :dim], heads)
        q = q.reshape(batch, heads * number, length, dim // heads)
        bias = bias.expand(heads, number, length, keys).reshape(1, heads * number, length, keys)
        k, v = kv.chunk(2, -1)
        y = attend(q, k, v, bias)
        y = self.proj(merge_heads(y.reshape(batch, heads, number * length, dim // heads)))
        return cells.join(y.reshape(batch * number, length, dim), sides)


class FocalAttention(_Focal):
    """Window, surround and summaries: (B, *S, C) -> (B, *S, C), section 3.2, with one level of summaries.

    The queries of a window see its own cells, those around it (the window moved by `expand` cells towards each corner,
    see `surround`; across the border the map goes on at its other side) and the summaries of `focal` windows per axis.
    Each has its own table of biases. The keys of a window are of constant number, so time and memory grow linearly with
    the map; that number and the surround's table grow fast with the rank (7, 3, 7 in 3-D: 2918 keys), so volumes want
    smaller windows.
    """

    no_decay = ("around", "far")

    def __init__(self, ndim: int, dim: int, heads: int, window: int = 7, expand: int = 3, focal: int = 7):
        super().__init__(ndim, dim, heads, window)
        if not isinstance(expand, int) or not 0 <= expand <= window:
            raise ValueError(f"expand must be a whole number from 0 to the window's {window}, got {expand!r}")
        if not isinstance(focal, int) or focal < 1 or focal % 2 == 0:
            raise ValueError(f"focal must be an odd number of windows, got {focal!r}")
        self.expand, self.focal = expand, focal
        self.pos = RelativePositionBias(self.window, heads)
        nn.init.zeros_(self.pos.table)
        self.far = nn.Parameter(torch.empty(heads, (window + focal - 1) ** ndim))
        self.around = None
        if expand:
            length, count = window**ndim, len(surround(self.window, expand))
            self.around = nn.Parameter(torch.empty(1, heads, length, count))
            nn.init.trunc_normal_(self.around, std=0.02)
        nn.init.trunc_normal_(self.far, std=0.02)

    def context(self, sides, cells, device):
        rows, mask = focal_keys(_counts(sides, self.window), self.window, self.expand, self.focal, device=device)
        index = _far_index(self.window, self.focal, device=device)
        far = self.far.index_select(1, index).reshape(self.heads, cells.length, -1)
        around = [] if self.around is None else [self.around[0]]
        bias = torch.cat([self.pos(), *around, far], -1).unsqueeze(1)
        return rows, bias if mask is None else bias + mask.unsqueeze(1)


class FocalFastAttention(_Focal):
    """The nearest cells and summaries: (B, *S, C) -> (B, *S, C), "Focal-fast" of the official repository.

    A window attends to the `top` cells nearest to its centre and to the `top` nearest summaries; an MLP for each turns
    the offset of a query to a key into a bias. It runs once per distinct offset, and all that each call does is linear
    in the map. The sets are searched once per size, in time that grows with cells times windows; a bounded part of the
    distances is held at once.
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int = 7, top: int = 128):
        super().__init__(ndim, dim, heads, window)
        if not isinstance(top, int) or top < 1:
            raise ValueError(f"top must be a whole number of at least 1, got {top!r}")
        self.top, width = top, dim // heads
        self.offsets = nn.ModuleList(
            nn.Sequential(Linear(ndim, width), nn.ReLU(), Linear(width, heads)) for _ in range(2)
        )
        self.grid: tuple[int, ...] | None = None  # the map that sets were given for; see `adopt`
        for name in ("fine", "coarse", "index"):
            self.register_buffer(name, None, persistent=False)

    def adopt(self, sides: Sequence[int], fine: Tensor, coarse: Tensor) -> bool:
        """Use these sets on a map of `sides` (ties may have fallen otherwise there); False where they do not fit."""
        sides, device = tuple(sides), self.proj.weight.device
        cells, number = math.prod(sides), math.prod(_counts(sides, self.window))
        wanted = [(number, min(self.top, n)) for n in (cells, number)]
        if [tuple(fine.shape), tuple(coarse.shape)] != wanted:
            return False
        self.fine, self.coarse = fine.to(device).long(), coarse.to(device).long()
        self.index, self.grid = _offsets(sides, self.window, self.fine, self.coarse), sides
        return True

    def context(self, sides, cells, device):
        if self.grid is not None and all(type(s) is int for s in sides) and sides == self.grid:
            fine, coarse, index = self.fine, self.coarse, self.index
        else:
            fine, coarse, index = _nearest_keys(sides, self.window, self.top, device=device)
        rows = torch.cat([cells.back[fine], coarse + cells.number * cells.length], 1)
        spans = tuple((s + w - 1) // w * w for s, w in zip(sides, self.window, strict=True))
        offsets = relative_offsets(spans, device=device).to(self.proj.weight.dtype)
        table = torch.cat([level(offsets) for level in self.offsets]).t().contiguous()
        bias = table.index_select(1, index).reshape(self.heads, cells.number, cells.length, rows.shape[1])
        return rows.reshape(-1), bias
