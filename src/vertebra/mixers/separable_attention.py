"""Separable self-attention of MobileViTv2 (arXiv 2206.02680, section 3.1, Fig. 4)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..layers import Linear


class SeparableAttention(nn.Module):
    """One score per token instead of one per pair: (B, *S, C) -> (B, *S, C).

    The softmax of the scores over the tokens weighs the keys into one context vector, which multiplies ReLU(value) at
    every token. Time and memory O(tokens * C). With `axis` the softmax and the sum run over that axis alone, as
    MobileViTv2 does over its patches; by default over all tokens. `linear` builds both projections:
    ``partial(Conv, ndim)`` where a checkpoint has them as 1x1 convolutions.
    """

    def __init__(self, dim: int, axis: int | None = None, linear: Callable[..., nn.Module] = Linear):
        super().__init__()
        self.axis = axis
        self.qkv, self.proj = linear(dim, 1 + 2 * dim), linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        dim = x.shape[-1]
        tokens = x.flatten(1, -2) if self.axis is None else x
        axis = 1 if self.axis is None else self.axis
        score, k, v = self.qkv(tokens).split((1, dim, dim), -1)
        context = (score.softmax(axis) * k).sum(axis, keepdim=True)
        return self.proj(v.relu() * context).reshape(x.shape)
