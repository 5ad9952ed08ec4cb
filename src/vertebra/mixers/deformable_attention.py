"""Deformable attention of DAT (arXiv 2201.00520, section 3.2, Fig. 2) and DAT++ (arXiv 2309.01430)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Conv, attend, check_heads, grid_sample, merge_heads, resize, split_heads
from ..layers.cached import sized_cache


@sized_cache
def lattice(sides: tuple[int, ...], first: int, less: int, device=None) -> Tensor:
    """(prod(sides), ndim) with (2 i + first) / (side - less) - 1 for cell i; finite also on an axis of one cell."""
    axes = []
    for side in sides:
        cell = torch.arange(side, device=device)
        span = cell[-1:] + 1 - less
        axes.append((2 * cell + first - span) / span.clamp(min=1))
    return torch.cartesian_prod(*axes).reshape(-1, len(sides))


def from_corners(places: Tensor, sides: Sequence[int]) -> Tensor:
    """Places whose -1 and 1 are the centres of the outermost cells, first axis first -> as `grid_sample` takes them."""
    return torch.stack([places[..., d] * ((s - 1) / s) for d, s in reversed(list(enumerate(sides)))], -1)


class DeformableAttention(nn.Module):
    """Every cell attends to the same few places, and the input moves them: (B, *S, C) -> (B, *S, C).

    A small network reads offsets off the queries (every `stride` cells; its weights are shared by the `groups` of
    channels), the offsets move a regular grid, and keys and values are projections of the map sampled there (eq. 6 to
    8). A table of biases, built for a map of `grid`, is sampled at query minus place (eq. 9), so that any size works.

    `offset_range` is DAT's: offsets are bounded by tanh to that many half cells. None is DAT++: free offsets, places
    held inside of the map, and another spacing of the grids (the code's: `lattice`).
    Each head keeps N x N / stride^ndim biases, per sample because places depend on it: time and memory grow with the
    square of the map, divided by stride^ndim.
    """

    no_decay = ("table",)

    def __init__(
        self, ndim: int, dim: int, heads: int, groups: int, grid: Sequence[int], kernel: int = 3, stride: int = 1,
        offset_range: float | None = 2.0,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, heads)
        if groups < 1 or heads % groups:
            raise ValueError(f"{heads} heads do not divide into {groups} groups of offsets")
        self.heads, self.groups, self.offset_range = heads, groups, offset_range
        width, padding = dim // groups, 0 if kernel == stride else kernel // 2
        self.conv_offset = nn.Sequential(
            Conv(ndim, width, width, kernel, stride, padding, groups=width),
            nn.LayerNorm(width),
            nn.GELU(),
            Conv(ndim, width, ndim, bias=False),
        )
        self.proj_q, self.proj_k, self.proj_v, self.proj_out = (Conv(ndim, dim, dim) for _ in range(4))
        self.table = nn.Parameter(torch.empty(heads, *(2 * s - 1 for s in grid)))
        nn.init.trunc_normal_(self.table, std=0.01)

    def places(self, offsets: Tensor) -> tuple[Tensor, int]:
        """Offsets (R, *S', ndim) -> places (R, n, ndim), first axis first, and the `less` of their lattice."""
        sides = tuple(offsets.shape[1:-1])
        offsets = offsets.flatten(1, -2).to(torch.promote_types(offsets.dtype, torch.float32))
        if self.offset_range is None:
            return (lattice(sides, 1, 1, device=offsets.device) + offsets).clamp(-1, 1), 1
        bound = torch.stack([offsets[..., d].tanh() * (self.offset_range / s) for d, s in enumerate(sides)], -1)
        return lattice(sides, 1, 0, device=offsets.device) + bound, 0

    def forward(self, x: Tensor) -> Tensor:
        batch, *sides, dim = x.shape
        ndim, groups, heads = len(sides), self.groups, self.heads
        rows, line = batch * groups, (1,) * (ndim - 1)  # a list of places is a map of n x 1 x 1 cells

        def grouped(t: Tensor) -> Tensor:
            return t.unflatten(-1, (groups, dim // groups)).movedim(-2, 1).flatten(0, 1)

        q = self.proj_q(x)
        places, less = self.places(self.conv_offset(grouped(q)))
        count = places.shape[1]
        where = from_corners(places, sides).reshape(rows, count, *line, ndim)
        seen = grid_sample(grouped(x).to(where.dtype), where).to(x.dtype)
        seen = seen.reshape(batch, groups, count, dim // groups).transpose(1, 2).reshape(batch, count, dim)

        table = self.table.to(where.dtype).unflatten(0, (groups, heads // groups)).movedim(1, -1)
        cells = lattice(tuple(sides), 1 - less, less, device=x.device).to(where.dtype)
        spans = table.shape[1:-1]
        apart = from_corners(cells / 2, spans)[:, None] - from_corners(places / 2, spans)[:, None]
        table = table.expand(batch, *table.shape).flatten(0, 1)
        length = cells.shape[0]
        bias = grid_sample(table, apart.reshape(rows, length * count, *line, ndim))
        bias = bias.reshape(rows, length, count, heads // groups).movedim(-1, 1).reshape(batch, heads, length, count)

        q, k, v = (split_heads(t, heads)[0] for t in (q.flatten(1, -2), self.proj_k(seen), self.proj_v(seen)))
        return self.proj_out(merge_heads(attend(q, k, v, bias)).reshape(x.shape))

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table built for another size, resampled to this one; None where it cannot be."""
        want = self.table.shape
        if name != "table" or tensor.ndim != len(want) or tensor.shape[0] != want[0]:
            return None
        return resize(tensor.float().movedim(0, -1).unsqueeze(0), want[1:], "cubic")[0].movedim(-1, 0).to(tensor.dtype)
