"""Deformable convolution (arXiv 1703.06211, section 2.1) at any rank."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cached import sized_cache
from .kernels import after
from .space import Conv, Sizes, grid_sample
from .window import _spread


@sized_cache
def _taps(
    sides: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    dilation: tuple[int, ...], device=None,
) -> Tensor:  # fmt: skip
    """(*sides, taps, ndim) cell that each tap of each output reads before it is moved; taps row-major."""
    axes = []
    for side, k, step, pad, gap in zip(sides, kernel, stride, padding, dilation, strict=True):
        first = torch.arange(side, device=device) * step - pad
        axes.append(first[:, None] + torch.arange(k, device=device) * gap)
    cells = torch.stack(torch.broadcast_tensors(*_spread(axes, 2)), -1)
    return cells.reshape(*sides, math.prod(kernel), len(sides)).float()


def deform_conv(
    x: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,), dilation: Sequence[int] = (1,),
) -> Tensor:  # fmt: skip
    """Convolution of (B, *S, C) whose taps are moved by `offsets` (B, *S', taps * ndim) -> (B, *S', out), eq. 2.

    Offsets count cells; of tap k (row-major) they are the channels from k * ndim, first axis first. Between cells the
    map is interpolated linearly, outside it is zero: ``torchvision.ops.deform_conv2d`` at every rank.
    """
    ndim, kernel = x.ndim - 2, tuple(weight.shape[2:])
    batch, *out, channels = offsets.shape
    taps = math.prod(kernel)
    if channels != taps * ndim:
        raise ValueError(f"offsets have {channels} channels, {taps} taps of rank {ndim} need {taps * ndim}")
    moved = offsets.unflatten(-1, (taps, ndim)).to(torch.promote_types(offsets.dtype, torch.float32))
    moved = moved + _taps(tuple(out), kernel, tuple(stride), tuple(padding), tuple(dilation), device=x.device)
    # cell i of a side of s lies at (2 i + 1) / s - 1; grid_sample names the last axis first
    sides = x.shape[1:-1]
    where = torch.stack([(2 * moved[..., d] + 1) / sides[d] - 1 for d in reversed(range(ndim))], -1)
    lead, last = out[:-1], out[-1]
    seen = grid_sample(x.to(where.dtype), where.reshape(batch, *lead, last * taps, ndim)).to(x.dtype)
    rows = seen.reshape(batch, *out, taps * x.shape[-1])
    return F.linear(rows, weight.movedim(1, -1).flatten(1), bias)


class DeformConv(Conv):
    """Convolution that moves its own taps: `conv_offset`, at first zero, reads offsets off the same input.

    (B, *S, dim) -> (B, *S', out). One set of offsets serves all channels, and none are weighted (version 1). The cells
    that all taps read are gathered, taps / stride^ndim times the map.
    """

    def __init__(
        self, ndim: int, dim: int, out: int, kernel: Sizes = 3, stride: Sizes = 1, padding: Sizes | None = None,
        dilation: Sizes = 1, bias: bool = True,
    ):  # fmt: skip
        super().__init__(ndim, dim, out, kernel, stride, padding, dilation, bias=bias)
        taps = math.prod(self.kernel)
        self.conv_offset = Conv(ndim, dim, ndim * taps, self.kernel, self.stride, self.padding, self.dilation)
        self.still()

    def still(self) -> None:
        """Set the offsets to zero, where training starts."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        options = self.stride, self.padding, self.dilation
        return after(deform_conv(x, self.conv_offset(x), self.weight, self.bias, *options), act, shortcut)
