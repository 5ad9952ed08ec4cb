"""Hydra attention (arXiv 2209.07484): as many heads as channels, cosine similarity for a kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Linear


class HydraAttention(nn.Module):
    """out = q * sum over tokens of (k * v), q and k of unit length over all channels: (B, *S, C) -> (B, *S, C).

    Section 3.3, eq. 6. No softmax, no scale, so the output grows with the number of tokens. Time and memory
    O(tokens * C): nothing larger than the map itself is formed.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        whole = (k * v).sum(tuple(range(1, x.ndim - 1)), keepdim=True)
        return self.proj(q * whole)
