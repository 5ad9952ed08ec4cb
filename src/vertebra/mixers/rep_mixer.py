"""RepMixer of FastViT (arXiv 2303.14189, section 3.2.1): mixing that is one depthwise convolution once trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import BatchNorm, Branches, Conv, LayerScale
from ..layers.reparam import folded


class RepMixer(nn.Module):
    """x + scale * (branches(x) - norm(x)): (B, *S, C) -> (B, *S, C), eq. 2 as published.

    The branches are depthwise: `kernel`, one cell and the cell itself, each with a batch norm. All is linear, the
    residual too, so `fuse` leaves a single depthwise convolution. Time and memory grow linearly with the map.
    """

    def __init__(self, ndim: int, dim: int, kernel: int = 3, scale: float = 1e-5):
        super().__init__()
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
        self.branches = Branches(ndim, dim, dim, {"dense": kernel, "one": 1}, groups=dim, identity=True)
        self.norm = BatchNorm(dim)
        self.scale = LayerScale(dim, scale, (dim, *(1,) * ndim))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.branches(x) - self.norm(x))

    def fuse(self, published: bool = True) -> Conv:
        """The convolution of kernel 1 + scale * (branches - norm), eq. 3."""
        conv, scale = self.branches.fuse(published), self.scale.gamma.double().flatten()
        centre = (slice(None), 0, *(k // 2 for k in conv.kernel))
        factor, shift = folded(torch.ones_like(scale)[:, None], None, self.norm)  # the norm as a kernel of one cell
        weight = conv.weight.double() * scale.view(-1, *(1,) * (conv.weight.ndim - 1))
        weight[centre] += 1 - scale * factor[:, 0]
        with torch.no_grad():
            conv.weight.copy_(weight)
            conv.bias.copy_(scale * (conv.bias.double() - shift))
        return conv
