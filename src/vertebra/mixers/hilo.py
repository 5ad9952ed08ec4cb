"""HiLo attention of LITv2 (arXiv 2205.13213, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import Linear, attend, avg_pool, check_heads, merge_heads, pad_to, split_heads, windows


class HiLoAttention(nn.Module):
    """Some heads look at fine detail nearby, the others at what varies slowly: (B, *S, C) -> (B, *S, C), Fig. 1.

    Of the heads a share `alpha` (rounded down) is Lo-Fi: all cells attend to the map averaged over cells of `window`
    per axis. The others are Hi-Fi: attention inside windows of that size. Each part has its own projections; the output
    is Hi-Fi channels, then Lo-Fi channels, not mixed. A window of 1 leaves plain attention: all heads are Lo-Fi. A map
    that windows do not fill is padded with zeros that take part.
    With N cells time is O(N^2 / window^ndim), memory O(N).
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int = 2, alpha: float = 0.9):
        super().__init__()
        check_heads(dim, heads)
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {window!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is the share of Lo-Fi heads, between 0 and 1, got {alpha}")
        self.window = (window,) * ndim
        self.low = heads if window == 1 else int(heads * alpha)
        self.high = heads - self.low
        low, high = (count * (dim // heads) for count in (self.low, self.high))
        if high:
            self.hi_qkv, self.hi_proj = Linear(dim, 3 * high), Linear(high, high)
        if low:
            self.lo_q, self.lo_kv, self.lo_proj = Linear(dim, low), Linear(dim, 2 * low), Linear(low, low)

    def hifi(self, x: Tensor) -> Tensor:
        """Attention inside windows: (B, *S, C) -> (B, *S, high)."""
        sides = tuple(x.shape[1:-1])
        cells = windows(sides, self.window, device=x.device)
        q, k, v = split_heads(self.hi_qkv(cells.split(x)), self.high, 3)
        return cells.join(self.hi_proj(merge_heads(attend(q, k, v))), sides)

    def lofi(self, x: Tensor) -> Tensor:
        """Attention of all cells to the averaged map: (B, *S, C) -> (B, *S, low)."""
        few = x if self.window[0] == 1 else avg_pool(pad_to(x, self.window), self.window)
        (q,) = split_heads(self.lo_q(x).flatten(1, -2), self.low)
        k, v = split_heads(self.lo_kv(few).flatten(1, -2), self.low, 2)
        y = self.lo_proj(merge_heads(attend(q, k, v)))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.hifi(x)] if self.high else []
        if self.low:
            parts.append(self.lofi(x))
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
