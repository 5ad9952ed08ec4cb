"""Attention in windows that are spread over the map, on the input itself (EMO, arXiv 2301.01146)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers import Conv, attend, check_heads, merge_heads, ntuple, split_heads, windows


class SpreadWindowAttention(nn.Module):
    """softmax(q k^T) x among `window` cells per axis, ceil(S / window) apart: (B, *S, C) -> (B, *S, C).

    Only queries and keys are projected: each head averages its share of the input's channels, so that whatever is
    linear may follow, such as an expansion that would make wide values costly. A map that windows do not fill is padded
    with zeros, which take part as keys. `window` None is one window over the whole map. Time and memory grow linearly
    with the map (time with its square for None).
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int | Sequence[int] | None = 7):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.window = None if window is None else ntuple(window, ndim, "window")
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"window must be at least 1 on every axis (None: the whole map), got {window!r}")
        self.qk = Conv(ndim, dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[1:-1])
        size = self.window or sides
        interval = tuple((s + w - 1) // w for s, w in zip(sides, size, strict=True))
        parts = windows(sides, size, interval, groups=(1,) * len(sides), device=x.device)
        cells = parts.split(x)
        q, k = split_heads(self.qk(cells), self.heads, 2)  # a 1x1 convolution does not ask for the rank
        (v,) = split_heads(cells, self.heads)
        return parts.join(merge_heads(attend(q, k, v)), sides)
