"""Agent attention (arXiv 2312.08874, section 4, Fig. 3): a few pooled queries stand between all tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv, Linear, adaptive_avg_pool, attend, check_heads, merge_heads, ntuple, resize, split_heads
from ..layers.cached import settled

AXES = "dhw"  # the letters of the last three axes in the names of the tables
CELLS = 7  # the block tables an and na have as many cells per axis, whatever the map


def agent_grid(agents: int, ndim: int) -> tuple[int, ...]:
    """Agents per axis, nearest to `agents` in all; at rank 2 their number must be a square."""
    side = max(round(agents ** (1 / ndim)), 1)
    if agents < 1 or (ndim == 2 and side * side != agents):
        raise ValueError(f"agents lie on a square grid: their number must be a square (9, 16, 49), got {agents}")
    return (side,) * ndim


def _resampled(table: Tensor, axis: int, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """`table`, whose axis `axis` is a map of sides `old` laid out flat, with that map resampled linearly to `new`."""
    lead, tail = table.shape[:axis], table.shape[axis + 1 :]
    cells = table.reshape(math.prod(lead), *old, math.prod(tail))
    return resize(cells, new).reshape(*lead, math.prod(new), *tail)


class AgentAttention(nn.Module):
    """Softmax attention in two steps through A agents: (B, *S, C) -> (B, *S, C).

    The agents are the queries averaged to a small grid. First they attend to all tokens, then every token attends to
    the agents: softmax(q a^T + bias2) softmax(a k^T + bias1) v, plus a depthwise convolution of the values.
    As A is fixed, time and memory grow linearly with the map; the biases, one number per head, agent and token, are
    the largest thing beside it.

    Each bias is a sum of a table of 7 cells per axis and of one table per axis of the map, made for a map of `size`
    and resampled linearly for any other (one axis table per axis at rank 1 and 3). `agents` is the number that
    the tables are made for. `pooled` agents may take part instead (dense prediction has more): then the tables are
    resampled along the agents too. `prefix` tokens in front of the map (a class token) are keys and queries with a
    bias of their own but no part of agents and convolution; x is then (B, prefix + N, C), called with the map's `grid`.
    `packed` False makes q and k|v two layers.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, size: int | Sequence[int], agents: int = 49, pooled: int | None = None,
        prefix: int = 0, packed: bool = True,
    ):  # fmt: skip
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.prefix, self.packed, self.size = heads, prefix, packed, ntuple(size, ndim, "size")
        self.agents, self.pooled = agent_grid(agents, ndim), agent_grid(pooled or agents, ndim)
        self.axes = AXES[-ndim:]
        count = math.prod(self.agents)
        block = (heads, count, *(CELLS,) * ndim)
        shapes: dict[str, tuple[int, ...]] = {"an_bias": block, "na_bias": block}
        for axis, letter in enumerate(self.axes):
            line = tuple(side if i == axis else 1 for i, side in enumerate(self.size))
            shapes |= {f"a{letter}_bias": (1, heads, count, *line), f"{letter}a_bias": (1, heads, *line, count)}
        if prefix:
            shapes |= {"ac_bias": (1, heads, count, prefix), "ca_bias": (1, heads, prefix, count)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02)))
        if packed:
            self.qkv = Linear(dim, 3 * dim)
        else:
            self.q, self.kv = Linear(dim, dim), Linear(dim, 2 * dim)
        self.proj = Linear(dim, dim)
        self.dwc = Conv(ndim, dim, dim, 3, groups=dim)

    @settled
    def bias(self, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What agents (1, heads, A, P + N) and what tokens (1, heads, P + N, A) add to their logits on a map `grid`."""
        heads, count, block = self.heads, math.prod(self.agents), (CELLS,) * len(grid)
        gather = _resampled(self.an_bias.flatten(2), 2, block, grid).reshape(heads, count, *grid)
        spread = _resampled(self.na_bias.flatten(2).mT, 1, block, grid).reshape(heads, *grid, count)
        for axis, (letter, old, new) in enumerate(zip(self.axes, self.size, grid, strict=True)):
            gather = gather + _resampled(getattr(self, f"a{letter}_bias")[0], 2 + axis, (old,), (new,))
            spread = spread + _resampled(getattr(self, f"{letter}a_bias")[0], 1 + axis, (old,), (new,))
        gather, spread = gather.flatten(2), spread.flatten(1, -2)
        if self.prefix:
            gather = torch.cat([self.ac_bias[0], gather], 2)
            spread = torch.cat([self.ca_bias[0], spread], 1)
        if self.pooled != self.agents:
            gather = _resampled(gather, 1, self.agents, self.pooled)
            spread = _resampled(spread, 2, self.agents, self.pooled)
        return gather.unsqueeze(0), spread.unsqueeze(0)

    def forward(self, x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        if grid is None:
            if self.prefix:
                raise ValueError(f"with {self.prefix} prefix tokens attention needs the grid of the others")
            grid = tuple(x.shape[1:-1])
        tokens = x.flatten(1, -2)
        q, k, v = self.qkv(tokens).chunk(3, -1) if self.packed else (self.q(tokens), *self.kv(tokens).chunk(2, -1))
        cells = (x.shape[0], *grid, x.shape[-1])
        agents = adaptive_avg_pool(q[:, self.prefix :].reshape(cells), self.pooled).flatten(1, -2)
        local = self.dwc(v[:, self.prefix :].reshape(cells)).flatten(1, -2)
        gather, spread = self.bias(grid)
        q, k, v, agents = (split_heads(part, self.heads)[0] for part in (q, k, v, agents))
        y = merge_heads(attend(q, agents, attend(agents, k, v, gather), spread))
        y = y + (F.pad(local, (0, 0, self.prefix, 0)) if self.prefix else local)
        return self.proj(y).reshape(x.shape)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table of another map or number of agents, resampled to this one; None where it cannot be."""
        want = getattr(self, name).shape
        block = name in ("an_bias", "na_bias")
        heads, agents = (0, 1) if block else (1, 2 if name[0] == "a" else len(want) - 1)
        if tensor.ndim != len(want) or tensor.shape[: heads + 1] != want[: heads + 1]:
            return None
        for axis in range(heads + 1, len(want)):
            old, new, ndim = tensor.shape[axis], want[axis], len(self.size)
            if old == new:
                continue
            if axis != agents:
                tensor = _resampled(tensor, axis, (old,), (new,))
                continue
            side = round(old ** (1 / ndim))
            if side**ndim != old:
                return None
            tensor = _resampled(tensor, axis, (side,) * ndim, self.agents)
        return tensor
