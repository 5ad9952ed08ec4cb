"""Aggregated attention and length-scaled cosine attention of TransNeXt (arXiv 2311.17132, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv, Linear, adaptive_avg_pool, attend, check_heads, ntuple, resize
from ..layers.cached import settled, sized_cache, tracing
from ..layers.window import KEY_MASK

_HELD = 2**18  # hidden numbers of the position MLP that are held at once: they stay in a core's cache
TEMPERATURE = math.log(math.exp(1 / 0.24) - 1)  # its softplus is 1 / 0.24


@sized_cache
def differences(side: int, bins: int, trained: int, device=None) -> tuple[Tensor, Tensor]:
    """Cell minus centre of a pooled bin along one axis -> (M,) log coordinates, (side, bins) which of them is meant.

    A bin's centre is the mean of its cells, so that differences are multiples of half a cell, of a whole one where all
    bins are alike: many pairs share one. `trained` is the side that a difference is measured by.
    """
    i = torch.arange(bins, device=device)
    twice = i * side // bins + ((i + 1) * side + bins - 1) // bins - 1  # twice the centre
    if type(side) is int and type(bins) is int:
        step, low = 2 if side % bins == 0 else 1, 1 - side - (bins - 1) * side // bins
        high = 2 * side - 1 - (side + bins - 1) // bins
    else:  # symbolic: wider bounds without a division, whose expressions would make tracing slow
        step, low, high = 1, 1 - 2 * side, 2 * side - 1
    count = (high - low) // step + 1
    delta = (torch.arange(count, device=device) * step + low) / 2 / max(trained - 1, 1) * 8
    index = (2 * torch.arange(side, device=device)[:, None] - twice - low) // step
    return delta.sign() * torch.log2(delta.abs() + 1) / math.log2(8), index


@sized_cache
def surroundings(sides: tuple[int, ...], kernel: int, keys: int, device=None) -> tuple[Tensor, Tensor]:
    """For each cell: (*S, 1, K) -1e4 where its window leaves the map, (*S, 1, 1) log of how many keys it has.

    The keys are the cells of its window that lie on the map, and `keys` more.
    """
    reach = torch.arange(kernel, device=device) - kernel // 2
    inside: Tensor | None = None
    for side in sides:
        place = torch.arange(side, device=device)[:, None] + reach
        line = (place >= 0) & (place < side)
        if inside is None:
            inside = line
        else:  # (*S, K) with the new axis' side and offsets -> (*S, side, K * kernel)
            inside = (inside[..., None, :, None] & line[:, None, :]).flatten(-2)
    assert inside is not None
    mask = KEY_MASK * (~inside).float()
    return mask.unsqueeze(-2), (inside.sum(-1) + keys).float().log()[..., None, None]


class ContinuousPositionBias(nn.Module):
    """A small MLP from a log-spaced difference of places to one bias per head (Swin v2's idea, without its bound).

    forward(sides, bins) -> (heads, N, P) for N cells of a map of `sides` and P cells of the same map averaged to
    `bins`. With `built`, a pair (sides, bins), it is evaluated there and resized linearly to what is asked. The MLP
    runs once for each difference that occurs, about prod(2 side) of them, not for each of the N * P pairs; in
    inference its hidden layer is never held whole.
    """

    no_decay = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")

    def __init__(
        self, ndim: int, heads: int, trained: int | Sequence[int], hidden: int = 512,
        built: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.trained, self.built = ntuple(trained, ndim, "trained"), built
        self.fc1, self.fc2 = Linear(ndim, hidden), Linear(hidden, heads)

    @settled
    def forward(self, sides: Sequence[int], bins: Sequence[int]) -> Tensor:
        if self.built is None:
            return self._evaluated(sides, bins)
        (old_sides, old_bins), heads = self.built, self.fc2.out_features
        bias = self._evaluated(old_sides, old_bins)
        bias = resize(bias.reshape(-1, *old_bins, 1), bins).reshape(heads, *old_sides, math.prod(bins))
        return resize(bias, sides).flatten(1, -2)

    def _evaluated(self, sides: Sequence[int], bins: Sequence[int]) -> Tensor:
        weight, ndim = self.fc1.weight, len(self.trained)
        tables = [differences(s, b, t, device=weight.device) for s, b, t in zip(sides, bins, self.trained, strict=True)]
        # the first layer is a sum over axes: (M_1, hidden) and the rest (M_2, .., hidden)
        first, *others = (torch.outer(c.to(w.dtype), w) for (c, _), w in zip(tables, weight.unbind(1), strict=True))
        rest: Tensor = self.fc1.bias
        for other in others:
            rest = rest.unsqueeze(-2) + other
        rows = first[(slice(None), *(None,) * (ndim - 1))]
        parts = (rows,) if tracing() else rows.split(max(1, _HELD // rest.numel()))
        values = torch.cat([self.fc2((part + rest).relu_()) for part in parts]).movedim(-1, 0)
        for axis, (_, index) in enumerate(tables, start=1):
            values = values.index_select(axis, index.flatten())
        pairs = [n for pair in zip(sides, bins, strict=True) for n in pair]
        order = (0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2))
        values = values.reshape(values.shape[0], *pairs).permute(order)
        return values.reshape(values.shape[0], math.prod(sides), math.prod(bins))


class _Cosine(nn.Module):
    """What both attentions share: unit queries and keys, a query embedding, a temperature per head, position bias."""

    no_decay: tuple[str, ...] = ("temperature", "query_embedding")

    def __init__(self, ndim: int, dim: int, heads: int, trained, built):
        super().__init__()
        check_heads(dim, heads)
        self.ndim, self.heads = ndim, heads
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), TEMPERATURE))
        self.query_embedding = nn.Parameter(torch.empty(heads, 1, dim // heads))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.position = ContinuousPositionBias(ndim, heads, trained, built=built)
        self.proj = Linear(dim, dim)

    def unit(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., heads, D), each of length one; in float32, where the least length does not vanish."""
        return F.normalize(x.unflatten(-1, (self.heads, -1)).float(), dim=-1)

    def scaled(self, q: Tensor, length: Tensor) -> Tensor:
        """Unit queries (..., heads, D) -> queries with embedding, times temperature and `length`."""
        return (q + self.query_embedding.squeeze(1)) * (F.softplus(self.temperature.squeeze(1)) * length)


class LengthScaledAttention(_Cosine):
    """Every cell attends to every cell by cosine, scaled by the log of their number: (B, *S, C) -> (B, *S, C).

    `trained` is the map's side in training, by which the position bias measures; `size`, if given, the map it is
    evaluated on and then resized from. Time and memory grow with the square of the number N of cells: fused attention
    forms no weights, but the bias is heads * N * N numbers, once for the whole batch. In training, where torch has no
    fused CPU kernel for a bias with a gradient, the weights are formed too.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, trained: int | Sequence[int] = 7,
        size: int | Sequence[int] | None = None,
    ):  # fmt: skip
        grid = None if size is None else ntuple(size, ndim, "size")
        super().__init__(ndim, dim, heads, trained, None if grid is None else (grid, grid))
        self.qkv = Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[1:-1]
        cells = math.prod(sides)
        q, k, v = self.qkv(x.flatten(1, -2)).chunk(3, -1)
        length = torch.full((1,), cells, dtype=torch.float32, device=x.device).log()
        q, k = (part.to(v.dtype).transpose(1, 2) for part in (self.scaled(self.unit(q), length), self.unit(k)))
        bias = self.position(sides, sides).unsqueeze(0)
        y = attend(q, k, v.unflatten(-1, (self.heads, -1)).transpose(1, 2), bias, scale=1.0)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class AggregatedAttention(_Cosine):
    """One softmax over the `kernel` cells per axis around each cell and the whole map pooled: (B, *S, C) likewise.

    Pixel-focused attention, aggregated with a query embedding and learned tokens; logits are cosines scaled by the log
    of how many keys a cell has. The map is pooled to S // `ratio` cells per axis, or to `pool` cells if given. The
    tokens give each place of the window a weight beside the softmax, from the unit query alone. `trained` is the map's
    side in training, by which the position bias measures; `size`, if given, the map it is evaluated on and then
    resized from.

    Windows are not copied out: they are kernel^ndim shifted views of one padded map. The softmax over both kinds of
    keys is one call of fused attention, to which the window counts as one more key with the log of its sum as logit;
    what falls to that key is shared out over the window. With N cells and P = N / ratio^ndim pooled ones, time is O(N *
    P) and memory that of the position bias, heads * N * P numbers once for the whole batch, beside O(N * kernel^ndim)
    for the windows. With `pool` both grow linearly with the map. In training, where torch has no fused CPU kernel for a
    bias with a gradient, the weights to the pooled cells are formed too, for each sample.
    """

    no_decay = (*_Cosine.no_decay, "local_bias")

    def __init__(
        self, ndim: int, dim: int, heads: int, ratio: int = 8, kernel: int = 3, trained: int | Sequence[int] = 56,
        pool: int | Sequence[int] | None = None, size: int | Sequence[int] | None = None,
    ):  # fmt: skip
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"a window is centred on its cell: kernel must be odd, got {kernel}")
        pools = None if pool is None else ntuple(pool, ndim, "pool")
        if ratio < 1 or (pools is not None and min(pools) < 1):
            raise ValueError(f"ratio and pool must be at least 1, got {ratio} and {pool}")
        self.ratio, self.kernel, self.pool = ratio, kernel, pools
        grid = None if size is None else ntuple(size, ndim, "size")
        super().__init__(ndim, dim, heads, trained, None if grid is None else (grid, self.bins(grid)))
        places = kernel**ndim
        self.local_bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, places), std=0.0004))
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, dim // heads, places), std=0.02))
        self.token_bias = nn.Parameter(torch.zeros(heads, 1, places))
        self.q, self.kv = Linear(dim, dim), Linear(dim, 2 * dim)
        self.sr, self.act, self.norm = Conv(ndim, dim, dim), nn.GELU(), nn.LayerNorm(dim)

    def bins(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Pooled cells per axis of a map of `sides`: at least one, at most the map's own."""
        most: Callable = torch.sym_max if tracing() else max  # a comparison would become a guard
        least: Callable = torch.sym_min if tracing() else min
        if self.pool is None:
            return tuple(most(side // self.ratio, 1) for side in sides)
        return tuple(least(side, cells) for side, cells in zip(sides, self.pool, strict=True))

    def _window(self, x: Tensor) -> list[Tensor]:
        """(B, *S, heads, D) at each place of the window, row-major, as views (B, *S, heads, D) of the padded map."""
        sides, half = x.shape[1:-2], self.kernel // 2
        views = [F.pad(x, [0, 0, 0, 0, *(half,) * (2 * self.ndim)])]
        for axis, side in enumerate(sides, start=1):
            views = [view.narrow(axis, start, side) for view in views for start in range(self.kernel)]
        return views

    def forward(self, x: Tensor) -> Tensor:
        sides, ndim = tuple(x.shape[1:-1]), self.ndim
        bins = self.bins(sides)
        q, (k, v) = self.unit(self.q(x)), self.kv(x).chunk(2, -1)
        pooled = self.norm(adaptive_avg_pool(self.act(self.sr(x)), bins)).flatten(1, -2)
        pool_k, pool_v = self.kv(pooled).chunk(2, -1)
        mask, length = surroundings(sides, self.kernel, math.prod(bins), device=x.device)
        scaled = self.scaled(q, length)
        local = torch.stack([(scaled * near).sum(-1) for near in self._window(self.unit(k))], -1)
        local = local + self.local_bias + mask
        most = local.amax(-1, keepdim=True).detach()
        local = (local - most).exp()
        total = local.sum(-1, keepdim=True)
        # one more channel: the window as a key, (0, .., 0, 1), meets a query's last number, the log of its sum; as a
        # value it counts how much of the softmax falls to it
        query = torch.cat([scaled, most + total.log()], -1).to(v.dtype).flatten(1, ndim).transpose(1, 2)
        pool_v = pool_v.unflatten(-1, (self.heads, -1))
        key, value = (self._with_window(part.to(v.dtype)) for part in (self.unit(pool_k), pool_v))
        bias = F.pad(self.position(sides, bins), (0, 1)).unsqueeze(0)
        y = attend(query, key, value, bias, scale=1.0).transpose(1, 2).unflatten(1, sides)
        y, share = y[..., :-1], y[..., -1:]
        learned = torch.einsum("...hd,hdk->...hk", q.to(self.tokens.dtype), self.tokens)
        weights = local * (share / total) + learned
        weights = (weights + self.token_bias.squeeze(1)).to(v.dtype).unsqueeze(-2)
        y = y.clone()  # fused attention keeps its own for the backward pass
        for weight, near in zip(weights.unbind(-1), self._window(v.unflatten(-1, (self.heads, -1))), strict=True):
            y.addcmul_(weight, near)
        return self.proj(y.flatten(-2))

    @staticmethod
    def _with_window(x: Tensor) -> Tensor:
        """Pooled keys or values (B, P, heads, D) -> (B, heads, P + 1, D + 1), the last of them the window's."""
        x = F.pad(x.transpose(1, 2), (0, 1))
        last = F.pad(x.new_zeros(x.shape[0], x.shape[1], 1, x.shape[3] - 1), (0, 1), value=1.0)
        return torch.cat([x, last], 2)
