"""Self-attention with relative sines (Transformer-XL, arXiv 1901.02860, section 3.3) as Conformer uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import Linear, attend, check_heads, merge_heads, split_heads
from ..layers.cached import sized_cache


@sized_cache
def relative_sines(side: int, dim: int, device=None) -> Tensor:
    """(2 side, dim): sine and cosine, channel by channel in turn, of the distances side - 1 down to -side."""
    omega = 10000.0 ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angles = torch.arange(side - 1, -side - 1, -1, device=device, dtype=torch.float64)[:, None] * omega
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).float()


def shift(scores: Tensor) -> Tensor:
    """Scores by distance to scores by key: (..., L, 2 L), column m for distance L - 1 - m, -> (..., L, L).

    Key j of query i stands in column L - 1 - i + j: in rows that are one number shorter, in the same column everywhere.
    """
    *lead, length, width = scores.shape
    rows = scores.reshape(*lead, length * width)[..., length - 1 : -1]
    return rows.reshape(*lead, length, width - 1)[..., :length]


class RelativeAttention(nn.Module):
    """Every cell attends to every cell by content and distance: (B, *S, C) -> (B, *S, C).

    score(i, j) = ((q_i + u) . k_j + (q_i + v) . p(i - j)) / sqrt(d) with p a projection of sines and cosines of the
    signed distance and learned u, v per head. On a map of several axes they share the channels of the sines evenly, and
    p is the sum over the axes. `bias` broadcasts to (B, heads, N, N) and is added to the scores.

    Time and memory grow with the square of the number N of cells: per head N x N scores, and for each axis of side s
    another N x 2 s; no vector per pair is formed.
    """

    no_decay = ("u", "v")

    def __init__(self, ndim: int, dim: int, heads: int):
        super().__init__()
        check_heads(dim, heads)
        if dim % (2 * ndim):
            raise ValueError(f"sines on {ndim} axes need channels divisible by {2 * ndim}, got {dim}")
        self.heads = heads
        self.query, self.key, self.value = (Linear(dim, dim) for _ in range(3))
        self.pos = Linear(dim, dim, bias=False)
        self.proj = Linear(dim, dim)
        self.u, self.v = (nn.Parameter(nn.init.xavier_uniform_(torch.empty(heads, dim // heads))) for _ in range(2))

    def near(self, q: Tensor, sides: tuple[int, ...]) -> Tensor:
        """(q_i + v) . p(i - j) for all pairs: q (B, heads, N, D) -> (B, heads, N, N)."""
        batch, heads, cells, width = q.shape
        rank, total = len(sides), torch.zeros((), dtype=q.dtype, device=q.device)
        q = (q + self.v[:, None].to(q.dtype)).reshape(batch, heads, *sides, width)
        weights = self.pos.weight.chunk(rank, 1)
        for axis, side in enumerate(sides):
            sines = relative_sines(side, weights[axis].shape[1], device=q.device).to(weights[axis].dtype)
            p = nn.functional.linear(sines, weights[axis]).reshape(2 * side, heads, width).permute(1, 2, 0)
            lines = q.movedim(2 + axis, -2)
            scores = torch.matmul(lines, p.reshape(heads, *(1,) * (rank - 1), width, 2 * side))
            found = shift(scores).movedim(-2, 2 + axis)
            total = total + found.reshape(batch, heads, *sides, *(s if a == axis else 1 for a, s in enumerate(sides)))
        return total.reshape(batch, heads, cells, cells)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        tokens = x.flatten(1, -2)
        q, k, v = (split_heads(part(tokens), self.heads)[0] for part in (self.query, self.key, self.value))
        near = self.near(q, tuple(x.shape[1:-1])) * q.shape[-1] ** -0.5
        near = near if bias is None else near + bias.to(near.dtype)
        y = attend(q + self.u[:, None].to(q.dtype), k, v, near)
        return self.proj(merge_heads(y)).reshape(x.shape)
