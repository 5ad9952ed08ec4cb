"""The two attentions of ScopeViT (Pattern Recognition 153, 110470): keys of several scales, and dilated groups."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import Attention, Conv, CrossAttention, InvertedResidual, Mlp, relative_index, windows
from ..layers.cached import settled, tracing
from ..layers.position import relative_offsets


class MultiScaleAttention(CrossAttention):
    """MSSA: attention whose keys and values were seen at several scales: (B, *S, C) -> (B, *S, C).

    An inverted residual, which serves as position encoding, makes the map that queries come from. Depthwise
    convolutions of the `kernels` make it smaller by `stride` for keys and values, each on its share of the channels:
    `groups` counts heads per kernel, and a group of none has no convolution. The linear layer of keys and values mixes
    the scales before heads are split. With N cells, time grows as N^2 / stride^ndim, memory as N where attention is
    fused.
    """

    def __init__(
        self, ndim: int, dim: int, groups: Sequence[int] = (2, 1, 1), stride: int = 1,
        kernels: Sequence[int] = (7, 5, 3), expansion: float = 4,
    ):  # fmt: skip
        if len(groups) != len(kernels) or min(groups) < 0 or not any(groups):
            raise ValueError(f"groups needs heads for each of the kernels {tuple(kernels)}, got {tuple(groups)}")
        if any(k % 2 == 0 for k in kernels) or stride < 1:
            raise ValueError(f"kernels must be odd and stride at least 1, got {tuple(kernels)} and {stride}")
        super().__init__(dim, sum(groups), qkv_bias=False)
        self.encode = InvertedResidual(ndim, dim, dim, 3, expansion=expansion, act=nn.ReLU)
        self.scales = nn.ModuleDict()
        for heads, kernel in zip(groups, kernels, strict=True):
            if heads:
                width = heads * dim // sum(groups)
                # with this padding every kernel gives the same size: at stride 4 one key more than S / 4
                padding = (stride - 1 + kernel - 1) // 2
                self.scales[str(kernel)] = Conv(ndim, width, width, kernel, stride, padding, groups=width, bias=False)
        self.parts = [scale.groups for scale in self.scales.values()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(x)
        keys = [scale(part) for scale, part in zip(self.scales.values(), x.split(self.parts, -1), strict=True)]
        return super().forward(x.flatten(1, -2), torch.cat(keys, -1).flatten(1, -2)).reshape(x.shape)


class LogPositionBias(nn.Module):
    """An MLP from the logarithm of an offset, sign(d) ln(1 + |d|) per axis, to one bias per head.

    forward(size) -> (heads, L, L) for a group of `size` tokens per axis: any size, no table to resample.
    """

    def __init__(self, ndim: int, heads: int, hidden: int = 512, dropout: float = 0.125):
        super().__init__()
        self.mlp = Mlp(ndim, hidden, heads, act=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(dropout)))

    @settled
    def forward(self, size: tuple[int, ...]) -> Tensor:
        weight = self.mlp.fc1.weight
        offsets = relative_offsets(size, device=weight.device)
        values = self.mlp((offsets.sign() * offsets.abs().log1p()).to(weight.dtype))
        index = relative_index(size, device=weight.device)
        length = index.shape[0]
        return values.index_select(0, index.flatten()).reshape(length, length, -1).permute(2, 0, 1).contiguous()


class GlobalScaleDilatedAttention(Attention):
    """GSDA: attention among at most `dilation` cells per axis, spread evenly over the map: (B, *S, C) -> (B, *S, C).

    The cells of a group lie ceil(S / dilation) apart, so that each group sees all of the map, thinly. A map that groups
    do not fill is padded, padded keys are masked; one of fewer than `dilation` cells is a single group. A bias counts
    offsets in steps of the group. Time and memory grow linearly with the map.
    """

    def __init__(self, ndim: int, dim: int, heads: int, dilation: int = 8):
        super().__init__(dim, heads, qkv_bias=False)
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        self.dilation = dilation
        self.pos = LogPositionBias(ndim, heads)

    def forward(self, x: Tensor) -> Tensor:
        sides, most = tuple(x.shape[1:-1]), self.dilation
        interval = tuple((s + most - 1) // most for s in sides)
        # rows of a group that are padding in every group are left out; a traced program of any size keeps them, masked
        size = tuple(most if tracing() else (s + i - 1) // i for s, i in zip(sides, interval, strict=True))
        groups = windows(sides, size, interval, mask_keys=True, groups=(1,) * len(sides), device=x.device)
        bias = groups.bias(self.pos(size), x.shape[0])
        return groups.join(super().forward(groups.split(x), bias), sides)
