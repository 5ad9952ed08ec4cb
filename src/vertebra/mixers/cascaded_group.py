"""Cascaded group attention in windows (EfficientViT, arXiv 2305.07027, section 2.2, Fig. 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvNorm, attend, check_heads, ntuple, resize, windows
from ..layers.cached import settled, sized_cache
from ..layers.window import KEY_MASK, Windows


@sized_cache
def _distances(size: tuple[int, ...], table: tuple[int, ...], device=None) -> Tensor:
    """(L * L,) row, in a row-major table of `table` distances per axis, of each pair of cells in a window of `size`."""
    cells = torch.cartesian_prod(*(torch.arange(s, device=device) for s in size)).reshape(-1, len(size))
    distances = (cells[:, None] - cells[None, :]).abs()
    index: Tensor | int = 0
    for axis, side in enumerate(table):
        index = index * side + distances[..., axis]
    return index.flatten()


class DistanceBias(nn.Module):
    """One learned number per head and pair of distances, the same to either side (LeViT): (heads, L, L).

    The table is (heads, prod(size)), as checkpoints keep it; a smaller window reads its first rows. A table of another
    window is resampled on loading.
    """

    no_decay = ("table",)

    def __init__(self, size: Sequence[int], heads: int):
        super().__init__()
        self.size = tuple(size)
        self.table = nn.Parameter(torch.zeros(heads, math.prod(self.size)))

    @settled
    def forward(self, size: Sequence[int]) -> Tensor:
        index = _distances(tuple(size), self.size, device=self.table.device)
        length = math.prod(size)
        return self.table.index_select(1, index).reshape(self.table.shape[0], length, length)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table of another (cubic) window, resampled to this one; None where it cannot be."""
        if tensor.ndim != 2 or tensor.shape[0] != self.table.shape[0]:
            return None
        side = round(tensor.shape[1] ** (1 / len(self.size)))
        if side ** len(self.size) != tensor.shape[1]:
            return None
        grid = tensor.float().t().reshape(1, *(side,) * len(self.size), -1)
        return resize(grid, self.size, "cubic").reshape(-1, tensor.shape[0]).t().to(tensor.dtype)


class CascadedGroupAttention(nn.Module):
    """Each head reads its own share of the channels plus what the head before it gave: (B, *S, C) -> (B, *S, C).

    Head j projects its C / heads channels to query and key of `key_dim` and a value as wide as the share (eqs. 2, 3);
    a depthwise convolution of `kernels[j]` runs over the query inside the window. Attention is in windows of `window`
    cells per axis. A map that fits into one window is taken whole; another that windows do not fill is padded with
    zeros, which take part as keys (batch norm makes them other than zero). `unit` builds convolution and norm. Time and
    memory grow linearly with the map.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, window: int | Sequence[int] = 7, key_dim: int = 16,
        kernels: Sequence[int] = (5, 5, 5, 5), unit: type[ConvNorm] = ConvNorm,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, heads)
        if len(kernels) < heads:
            raise ValueError(f"{heads} heads need as many query kernels, got {tuple(kernels)}")
        if any(k % 2 == 0 for k in kernels):
            raise ValueError(f"query kernels must be odd, got {tuple(kernels)}")
        self.window, share = ntuple(window, ndim, "window"), dim // heads
        self.parts = (key_dim, key_dim, share)
        self.qkvs = nn.ModuleList(unit(ndim, share, sum(self.parts), keep=False) for _ in range(heads))
        self.dws = nn.ModuleList(unit(ndim, key_dim, key_dim, k, groups=key_dim, keep=False) for k in kernels[:heads])
        self.proj = unit(ndim, dim, dim, keep=False)
        self.pos = DistanceBias(self.window, heads)

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[1:-1])
        exported = torch.compiler.is_exporting() and any(type(s) is not int for s in sides)
        if not exported and all(s <= w for s, w in zip(sides, self.window, strict=True)):
            return self.within(x)
        parts = windows(sides, self.window, device=x.device)
        y = parts.split(x).reshape(x.shape[0] * parts.number, *self.window, x.shape[-1])
        outside = self._outside(parts, sides, x.shape[0]) if exported else None
        return parts.join(self.within(y, outside).flatten(1, -2), sides)

    def _outside(self, parts: Windows, sides: Sequence[int], batch: int) -> Tensor:
        """(B * W, *window, 1): cells of a window that are no cells of a map which one window holds.

        An exported program takes such a map too, so that the choice is among its numbers, not made while tracing.
        """
        where = parts.there.device
        fits = [torch.scalar_tensor(s, device=where) <= w for s, w in zip(sides, self.window, strict=True)]
        padded = ~parts.valid.reshape(parts.number, *self.window, 1)
        padded = padded & torch.stack(fits).all()
        return padded.expand(batch, *padded.shape).flatten(0, 1)

    def within(self, x: Tensor, outside: Tensor | None = None) -> Tensor:
        """Attention of all cells of a window (B, *S, C) to each other, but for those `outside` (B, *S, 1)."""
        bias = self.pos(x.shape[1:-1])
        keys = 0 if outside is None else KEY_MASK * outside.flatten(1, -2).mT.unsqueeze(1).to(bias.dtype)
        y, outs = None, []
        for j, (share, qkv, dw) in enumerate(zip(x.chunk(len(self.qkvs), -1), self.qkvs, self.dws, strict=True)):
            q, k, v = qkv(share if y is None else share + y).split(self.parts, -1)
            q = q if outside is None else q.masked_fill(outside, 0)
            q, k, v = (t.flatten(1, -2).unsqueeze(1) for t in (dw(q), k, v))
            y = attend(q, k, v, bias[j] + keys).reshape(share.shape)
            outs.append(y)
        return self.proj(F.relu(torch.cat(outs, -1), inplace=True))
