"""Window attention whose queries come from the whole image (GC ViT, arXiv 2206.09959, Fig. 3)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import (
    Linear,
    RelativePositionBias,
    adaptive_avg_pool,
    attend,
    check_heads,
    merge_heads,
    ntuple,
    split_heads,
    windows,
)


class GlobalWindowAttention(nn.Module):
    """Every window answers the same queries with its own keys and values: (B, *S, C) -> (B, *S, C).

    `query` is a map (B, *window, C) of the image; cell i of it asks in place of the i-th token of every window, as it
    is, without a projection. Without one the map itself is averaged to a window. A map that windows do not fill is
    padded with zeros, which take part as keys. Time and memory grow linearly with the map: beside the logits of each
    window the query is repeated per window, which is one more copy of the map.
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int | tuple[int, ...] = 7):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.window = heads, ntuple(window, ndim, "window")
        self.kv, self.proj = Linear(dim, 2 * dim), Linear(dim, dim)
        self.pos = RelativePositionBias(self.window, heads)

    def forward(self, x: Tensor, query: Tensor | None = None) -> Tensor:
        if query is None:
            query = adaptive_avg_pool(x, self.window)
        if tuple(query.shape[1:-1]) != self.window or query.shape[-1] != x.shape[-1]:
            given, needed = tuple(query.shape[1:]), (*self.window, x.shape[-1])
            raise ValueError(f"the global query has shape (B, *{given}), windows of this layer need (B, *{needed})")
        sides = tuple(x.shape[1:-1])
        parts = windows(sides, self.window, device=x.device)
        k, v = split_heads(self.kv(parts.split(x)), self.heads, 2)
        (q,) = split_heads(query.flatten(1, -2).to(k.dtype), self.heads)
        q = q.unsqueeze(1).expand(-1, parts.number, -1, -1, -1).flatten(0, 1)
        y = attend(q, k, v, parts.bias(self.pos(), x.shape[0]))
        return parts.join(self.proj(merge_heads(y)), sides)
