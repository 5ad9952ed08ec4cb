"""Performer attention (FAVOR+ with positive features, arXiv 2009.14794, lemma 1), as T2T-ViT uses it."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..layers import Linear, check_heads, merge_heads, split_heads


class PerformerAttention(nn.Module):
    """Softmax attention approximated by random features: (B, *S, dim) -> (B, *S, width).

    phi(u) = exp(w u - |u|^2 / 2) / sqrt(features), and out = phi(q) (phi(k)^T v) / (phi(q) sum of phi(k)): the kernel
    exp(q . k) without a scale. `w` has orthogonal rows and is stored but not trained. Time and memory O(tokens *
    width): no weight per pair of tokens is ever formed.

    `width` defaults to dim and `features` to half of a head. With `value_residual` the result is added to the values,
    for a layer that changes the width and so cannot add its input. exp spans many decades, so the features and their
    sums are float32 under autocast too.
    """

    def __init__(
        self, dim: int, heads: int = 1, width: int | None = None, features: int | None = None,
        value_residual: bool = False, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        width = width or dim
        check_heads(width, heads)
        self.heads, self.value_residual = heads, value_residual
        count = features or max(width // heads // 2, 1)
        self.kqv, self.proj, self.drop = Linear(dim, 3 * width), Linear(width, width), nn.Dropout(dropout)
        self.w = nn.Parameter(torch.empty(count, width // heads), requires_grad=False)
        if not self.w.is_meta:  # torch imports for seconds before it decomposes on the meta device
            nn.init.orthogonal_(self.w, gain=math.sqrt(count))

    def features(self, u: Tensor) -> Tensor:
        """phi(u) for each head: (B, L, width) -> (B, heads, L, features)."""
        (u,) = split_heads(u.float(), self.heads)
        w = self.w.float()
        half = (u.square().sum(-1, keepdim=True) + math.log(w.shape[0])) / 2  # with the logarithm of sqrt(features)
        return (u @ w.T - half).exp()

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(x.flatten(1, -2)).chunk(3, -1)
        device = x.device.type
        casting = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if casting else nullcontext():
            keys, queries = self.features(k), self.features(q)
            (values,) = split_heads(v.float(), self.heads)
            # both sides of the quotient times 1e8: the published 1e-8 below it ONNX's optimiser would take for zero
            total = queries @ (keys.sum(-2).unsqueeze(-1) * 1e8) + 1
            y = queries @ (keys.transpose(-1, -2) @ values * 1e8) / total
        y = self.drop(self.proj(merge_heads(y).to(v.dtype)))
        return (v + y if self.value_residual else y).reshape(*x.shape[:-1], -1)
