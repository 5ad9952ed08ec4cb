"""Bi-level routing attention of BiFormer (arXiv 2303.08810, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Conv, Linear, attend, check_heads, crop, merge_heads, pad_to, split_heads, windows


class BiLevelRoutingAttention(nn.Module):
    """Each region attends to the `topk` regions that fit it best: (B, *S, C) -> (B, *S, C).

    The map falls into `n_win` regions per axis. The mean query of a region is compared with every region's mean key,
    all heads together; its cells then attend to all cells of the regions that win. The choice carries no gradient. A
    depthwise convolution of the values (LePE) is added. Logits are scaled by C^-0.5, not by the width of a head.

    Memory grows linearly with the map of N cells: the gathered keys and values have topk * N rows of 2 C numbers (one
    gather for both) and the affinities (n_win^ndim)^2 numbers. Time grows as topk / n_win^ndim * N^2. `topk` is the
    same at every rank, and never more than there are regions.

    A map that regions do not fill is padded with zeros before the projection, so that padded keys are the projection's
    bias and take part. In 2-D, as published, there are always n_win regions, some of them maybe padding alone; in 1-D
    and 3-D those are left out, because they would be most of a small volume. With `late_padding` regions are S // n_win
    cells wide, at least one (so there can be more than n_win); zeros come after the projection and stay out of the
    means, but take part as keys.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, n_win: int = 7, topk: int = 4, kernel: int = 5,
        late_padding: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, heads)
        for name, value in (("n_win", n_win), ("topk", topk)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.ndim, self.heads, self.n_win, self.topk, self.late_padding = ndim, heads, n_win, topk, late_padding
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)
        self.lepe = Conv(ndim, dim, dim, kernel, groups=dim)

    def region(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Cells per axis of one region on a map of `sides`."""
        if self.late_padding:
            return tuple(max(s // self.n_win, 1) for s in sides)
        return tuple((s + self.n_win - 1) // self.n_win for s in sides)

    def forward(self, x: Tensor) -> Tensor:
        batch, *sides, dim = x.shape
        size = self.region(sides)
        known = self.ndim == 2 and not self.late_padding  # always n_win regions per axis
        if not self.late_padding:
            x = pad_to(x, self.n_win if known else size)
        full = tuple(x.shape[1:-1])
        regions = windows(full, size, groups=(self.n_win,) * 2 if known else None, device=x.device)
        number, length = regions.number, regions.length
        qkv = regions.split(self.qkv(x)) if self.late_padding else self.qkv(regions.split(x))

        means = qkv[..., : 2 * dim].detach().mean(1).reshape(batch, number, 2 * dim)
        if self.late_padding and regions.valid is not None:
            means = means * (length / regions.valid.reshape(number, length, 1).sum(1)).to(means.dtype)
        q, k = means.chunk(2, -1)
        scale = dim**-0.5
        count = min(self.topk, number)
        routes = (q * scale @ k.mT).topk(count, sorted=False).indices
        rows = routes + number * torch.arange(batch, device=x.device).reshape(batch, 1, 1)
        kv = qkv[..., dim:].index_select(0, rows.flatten()).reshape(batch * number, count * length, 2 * dim)
        (q,), (k, v) = split_heads(qkv[..., :dim], self.heads), split_heads(kv, self.heads, 2)

        local = self.lepe(regions.join(qkv[..., 2 * dim :], full))
        y = regions.join(merge_heads(attend(q, k, v, scale=scale)), full) + local
        return self.proj(crop(y, sides))
