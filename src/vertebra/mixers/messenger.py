"""Windows that write to each other through messenger tokens (MSG-Transformer, arXiv 2105.15168, section 3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Attention, RelativePositionBias, Windows, attend, merge_heads, split_heads, windows
from ..layers.cached import sized_cache
from ..layers.window import KEY_MASK


def _windows_of(counts: tuple[int, ...], device) -> Tensor:
    """(W, ndim) place of each of the `counts` windows, row-major."""
    axes = (torch.arange(n, device=device) for n in counts)
    return torch.cartesian_prod(*axes).reshape(math.prod(counts), len(counts))


@sized_cache
def region_slots(counts: tuple[int, ...], region: int, device=None) -> Tensor:
    """(W,) which of the region^ndim places of its region each of the `counts` windows has, row-major."""
    slot: Tensor | int = 0
    for place in _windows_of(counts, device).unbind(1):
        slot = slot * region + place % region
    return slot


@sized_cache
def _partners(counts: tuple[int, ...], region: int, device=None) -> Tensor:
    """(W * G,) block of channels, numbered window by window, that each block comes from; G = region^ndim."""
    ndim, number = len(counts), math.prod(counts)
    group = region**ndim
    members = torch.tensor(list(itertools.product(range(region), repeat=ndim)), device=device)
    other: Any = 0
    real: Any = True
    for axis, place in enumerate(_windows_of(counts, device).unbind(1)):
        there = (place - place % region)[:, None] + members[None, :, axis]
        other, real = other * counts[axis] + there, (there < counts[axis]) & real
    own = torch.arange(number * group, device=device).reshape(number, group)
    swapped = other * group + region_slots(counts, region, device=device)[:, None]
    return torch.where(real, swapped, own).reshape(-1)


def check_region(dim: int, ndim: int, region: int) -> None:
    """ValueError when `dim` channels do not divide into one block for each window of a region."""
    if not isinstance(region, int) or region < 1:
        raise ValueError(f"region must be a whole number of at least 1, got {region!r}")
    if dim % region**ndim:
        raise ValueError(f"{dim} channels do not divide into {region}^{ndim} blocks, one for each window of a region")


def shuffle_messengers(messengers: Tensor, counts: tuple[int, ...], region: int) -> Tensor:
    """Exchange of messengers (B, W, C) inside regions of region^ndim windows -> (B, W, C).

    Channels are cut into as many blocks as a region has windows; block j of window i changes places with block i of
    window j. In a region cut off by the end of the map, a block whose partner is missing stays where it is.
    """
    if region == 1:
        return messengers
    batch, number, dim = messengers.shape
    group = region ** len(counts)
    source = _partners(tuple(counts), region, device=messengers.device)
    blocks = messengers.reshape(batch, number * group, dim // group)
    return blocks.index_select(1, source).reshape(batch, number, dim)


def window_counts(sides: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """Windows per axis of a map, the last ones padded."""
    return tuple((s + w - 1) // w for s, w in zip(sides, window, strict=True))


class MessengerWindowAttention(Attention):
    """Attention inside windows that hold a messenger in front: (B, W, 1 + L, C) -> (B, W, 1 + L, C), section 3.

    `cells` are the windows of the map that the L tokens come from; padded cells are no keys. Cells have relative
    positions; a messenger as key, and as query, has one bias per head.
    """

    no_decay: tuple[str, ...] = ("messenger",)

    def __init__(self, ndim: int, dim: int, heads: int, window: int = 7):
        super().__init__(dim, heads)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {window!r}")
        self.window = (window,) * ndim
        self.pos = RelativePositionBias(self.window, heads)
        self.messenger = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, 2, 1, 1), std=0.02))

    def bias(self, cells: Windows, batch: int) -> Tensor:
        """(1 or B * W, heads, 1 + L, 1 + L)."""
        inner, (column, row) = self.pos(), self.messenger.unbind(1)
        length = inner.shape[-1]
        lower = torch.cat([column.expand(-1, length, 1), inner], 2)
        bias = torch.cat([row.expand(-1, 1, length + 1), lower], 1).unsqueeze(0)
        if cells.valid is None:
            return bias
        mask = KEY_MASK * (~cells.valid).to(bias.dtype).reshape(cells.number, 1, 1, length)
        bias = bias + F.pad(mask, (1, 0))
        return bias.expand(batch, *bias.shape).flatten(0, 1)

    def forward(self, x: Tensor, cells: Windows) -> Tensor:
        return super().forward(x.flatten(0, 1), self.bias(cells, x.shape[0])).reshape(x.shape)


class MessengerAttention(MessengerWindowAttention):
    """Window attention whose windows exchange messengers, on its own: (B, *S, C) -> (B, *S, C).

    Every window gets a learned messenger (by its place in its region), which gathers from the window; the messengers
    are shuffled in regions of `region` windows per axis; then the cells attend to their window and to what its
    messenger brought. MSG-Transformer spreads this over two blocks and keeps its messengers between them; here both
    halves share their weights. Time and memory grow linearly with the map.
    """

    no_decay = ("messenger", "tokens")

    def __init__(self, ndim: int, dim: int, heads: int, window: int = 7, region: int = 4):
        super().__init__(ndim, dim, heads, window)
        check_region(dim, ndim, region)
        self.region = region
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(region**ndim, dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        batch, *rest, dim = x.shape
        sides = tuple(rest)
        cells, counts = windows(sides, self.window, device=x.device), window_counts(sides, self.window)
        slots = region_slots(counts, self.region, device=x.device)
        messengers = self.tokens.index_select(0, slots).expand(batch, cells.number, dim)
        bias = self.bias(cells, batch)
        q, k, v = split_heads(self.qkv(cells.split(x)), self.heads, 3)

        ask, *first = split_heads(self.qkv(messengers.reshape(batch * cells.number, 1, dim)), self.heads, 3)
        gathered = self._read(ask, k, v, first, bias[:, :, :1]).reshape(messengers.shape)
        news = shuffle_messengers(messengers + gathered, counts, self.region)

        _, *first = split_heads(self.qkv(news.reshape(batch * cells.number, 1, dim)), self.heads, 3)
        return cells.join(self._read(q, k, v, first, bias[:, :, 1:]), sides)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, first: Sequence[Tensor], bias: Tensor) -> Tensor:
        """What queries take from the messenger's key and value, `first`, and from those of the window's cells."""
        k, v = torch.cat([first[0], k], 2), torch.cat([first[1], v], 2)
        return self.proj(merge_heads(attend(q, k, v, bias)))
