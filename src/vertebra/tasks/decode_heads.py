"""Heads that turn a pyramid of feature maps into one map of class logits, at any rank.

Maps are (B, *S, C). The structure is that of the published systems in mmsegmentation (kernels, widths, where the norms
and the dropout are), and our names differ from theirs in one word, "norm" for "bn", so that published ``neck.``,
``decode_head.`` and ``auxiliary_head.`` weights fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.conv import ConvNorm, init_fan_out
from ..layers.space import Conv, adaptive_avg_pool, channels_first, channels_last, resize

RULES = ((r"\.norm\.", ".bn."),)  # our names -> mmsegmentation's


def _block(ndim: int, dim: int, out: int, kernel: int = 1, **options) -> ConvNorm:
    return ConvNorm(ndim, dim, out, kernel, act=nn.ReLU, **options)


def _like(x: Tensor, other: Tensor) -> Tensor:
    """`x` at the size of `other`, linearly."""
    return resize(x, other.shape[1:-1])


class FPN(nn.Module):
    """Feature pyramid network (arXiv 1612.03144, Fig. 3): maps of `dims` channels -> as many of `out` channels.

    1x1 laterals, top-down sums with nearest upsampling, a 3x3 convolution on each: no norms, no activations.
    """

    def __init__(self, ndim: int, dims: Sequence[int], out: int = 256):
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Plain(ndim, dim, out, 1) for dim in dims)
        self.fpn_convs = nn.ModuleList(_Plain(ndim, out, out, 3) for _ in dims)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sums = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + resize(sums[i], sums[i - 1].shape[1:-1], "nearest")
        return [conv(x) for conv, x in zip(self.fpn_convs, sums, strict=True)]


class _Plain(nn.Module):
    """A convolution with bias under the name ``conv``, Xavier uniform: what the FPN consists of."""

    def __init__(self, ndim: int, dim: int, out: int, kernel: int):
        super().__init__()
        self.conv = Conv(ndim, dim, out, kernel)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DecodeHead(nn.Module):
    """Base of the heads: (maps, image) -> logits (B, *S', num_classes), the image (B, *S, in_chans).

    A head defines ``merge(maps, image) -> (B, *S', channels)``; whole channels are dropped at rate `dropout`, then
    ``conv_seg`` classifies.
    """

    def __init__(self, ndim: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        self.ndim, self.channels, self.dropout = ndim, channels, dropout
        self.conv_seg = self.classifier(num_classes)

    def classifier(self, num_classes: int) -> Conv:
        """A fresh 1x1 convolution to `num_classes`: normal 0.01, bias zero."""
        conv = Conv(self.ndim, self.channels, num_classes)
        nn.init.normal_(conv.weight, std=0.01)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        return conv

    def merge(self, maps: Sequence[Tensor], image: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, maps: Sequence[Tensor], image: Tensor) -> Tensor:
        x = self.merge(maps, image)
        if self.training and self.dropout:
            x = channels_last(torch.feature_dropout(channels_first(x), self.dropout, True))
        return self.conv_seg(x)


class SemanticFPNHead(DecodeHead):
    """The semantic branch of Panoptic FPN (arXiv 1901.02446, Fig. 3), on FPN maps.

    Each level goes to the finest one's resolution by 3x3 convolutions, each followed by a doubling; then their sum.
    """

    def __init__(self, ndim, dims, strides, num_classes, in_chans=3, channels: int = 128, dropout: float = 0.1):
        super().__init__(ndim, channels, num_classes, dropout)
        self.scale_heads = nn.ModuleList()
        for dim, stride in zip(dims, strides, strict=True):
            doublings = (stride // strides[0]).bit_length() - 1
            parts: list[nn.Module] = []
            for k in range(max(doublings, 1)):
                parts.append(_block(ndim, dim if k == 0 else channels, channels, 3))
                if doublings:
                    parts.append(_Doubled())
            self.scale_heads.append(nn.Sequential(*parts))
        init_fan_out(self.scale_heads)

    def merge(self, maps, image):
        total = self.scale_heads[0](maps[0])
        for head, x in zip(list(self.scale_heads)[1:], maps[1:], strict=True):
            total = total + _like(head(x), total)
        return total


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return resize(x, [2 * side for side in x.shape[1:-1]])


class _Pooled(nn.Module):
    """Mean over `scale` bins per axis; the first half of a pooling branch."""

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_avg_pool(x, self.scale)


class PyramidPooling(nn.ModuleList):
    """Means over `scales` bins per axis, each to `out` channels and back at the map's size (PSPNet, arXiv 1612.01105).

    (B, *S, dim) -> (B, *S, dim + len(scales) * out), the map itself first.
    """

    def __init__(self, ndim: int, dim: int, out: int, scales: Sequence[int]):
        super().__init__(nn.Sequential(_Pooled(s), _block(ndim, dim, out)) for s in scales)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(_like(branch(x), x) for branch in self)], -1)


class UPerHead(DecodeHead):
    """UPerNet (arXiv 1807.10221, section 3): pyramid pooling on the last map, an FPN with norms, all levels fused."""

    def __init__(
        self, ndim, dims, strides, num_classes, in_chans=3,
        channels: int = 512, pool_scales: Sequence[int] = (1, 2, 3, 6), dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(ndim, channels, num_classes, dropout)
        self.psp_modules = PyramidPooling(ndim, dims[-1], channels, pool_scales)
        self.bottleneck = _block(ndim, dims[-1] + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_block(ndim, dim, channels) for dim in dims[:-1])
        self.fpn_convs = nn.ModuleList(_block(ndim, channels, channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = _block(ndim, len(dims) * channels, channels, 3)
        for part in (self.psp_modules, self.bottleneck, self.lateral_convs, self.fpn_convs, self.fpn_bottleneck):
            init_fan_out(part)

    def merge(self, maps, image):
        sums = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        sums.append(self.bottleneck(self.psp_modules(maps[-1])))
        for i in range(len(sums) - 1, 0, -1):
            sums[i - 1] = sums[i - 1] + _like(sums[i], sums[i - 1])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, sums[:-1], strict=True)] + sums[-1:]
        return self.fpn_bottleneck(torch.cat([_like(x, levels[0]) for x in levels], -1))


class PSPHead(DecodeHead):
    """Pyramid pooling on one map (PSPNet, arXiv 1612.01105, Fig. 3), by default the last; `level` chooses another."""

    def __init__(
        self, ndim, dims, strides, num_classes, in_chans=3,
        channels: int = 512, pool_scales: Sequence[int] = (1, 2, 3, 6), level: int = -1, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(ndim, channels, num_classes, dropout)
        self.level = _level(level, dims)
        dim = dims[self.level]
        self.psp_modules = PyramidPooling(ndim, dim, channels, pool_scales)
        self.bottleneck = _block(ndim, dim + len(pool_scales) * channels, channels, 3)
        init_fan_out(self.psp_modules)
        init_fan_out(self.bottleneck)

    def merge(self, maps, image):
        return self.bottleneck(self.psp_modules(maps[self.level]))


class ASPPHead(DecodeHead):
    """Atrous spatial pyramid pooling (DeepLabv3, arXiv 1706.05587, Fig. 5) on one map, by default the last."""

    def __init__(
        self, ndim, dims, strides, num_classes, in_chans=3,
        channels: int = 512, dilations: Sequence[int] = (1, 12, 24, 36), level: int = -1, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(ndim, channels, num_classes, dropout)
        self.level = _level(level, dims)
        dim = dims[self.level]
        self.image_pool = nn.Sequential(_Pooled(1), _block(ndim, dim, channels))
        self.aspp_modules = nn.ModuleList(
            _block(ndim, dim, channels, 1 if d == 1 else 3, dilation=d) for d in dilations
        )
        self.bottleneck = _block(ndim, (len(dilations) + 1) * channels, channels, 3)
        for part in (self.image_pool, self.aspp_modules, self.bottleneck):
            init_fan_out(part)

    def merge(self, maps, image):
        x = maps[self.level]
        return self.bottleneck(torch.cat([_like(self.image_pool(x), x), *(conv(x) for conv in self.aspp_modules)], -1))


class SegFormerHead(DecodeHead):
    """The head of linear layers of SegFormer (arXiv 2105.15203, section 3.2), with a norm on each level's as well."""

    def __init__(self, ndim, dims, strides, num_classes, in_chans=3, channels: int = 256, dropout: float = 0.1):
        super().__init__(ndim, channels, num_classes, dropout)
        self.convs = nn.ModuleList(_block(ndim, dim, channels) for dim in dims)
        self.fusion_conv = _block(ndim, len(dims) * channels, channels)
        init_fan_out(self.convs)
        init_fan_out(self.fusion_conv)

    def merge(self, maps, image):
        levels = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return self.fusion_conv(torch.cat([_like(x, levels[0]) for x in levels], -1))


class FCNHead(DecodeHead):
    """3x3 convolutions on one map (arXiv 1411.4038): the auxiliary head, on the map of stride 16."""

    def __init__(
        self, ndim, dims, strides, num_classes, in_chans=3,
        channels: int = 256, num_convs: int = 1, level: int | None = None, dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__(ndim, channels, num_classes, dropout)
        self.level = _level((strides.index(16) if 16 in strides else -1) if level is None else level, dims)
        self.convs = nn.Sequential(
            *(_block(ndim, dims[self.level] if k == 0 else channels, channels, 3) for k in range(num_convs))
        )
        init_fan_out(self.convs)

    def merge(self, maps, image):
        return self.convs(maps[self.level])


class UNetHead(DecodeHead):
    """A U-shaped decoder up to full resolution (U-Net, arXiv 1505.04597, Fig. 1), for volumes and signals.

    From the coarsest map on: linear upsampling to the next finer one, concatenation with it, two 3x3 convolutions. At
    strides 2 and 1, where the pyramid ends, the image itself is the skip through a convolution, as in UNETR (arXiv
    2103.10504). At stride s there are `channels` * s channels, at most `most`.
    """

    def __init__(
        self, ndim, dims, strides, num_classes, in_chans=3, channels: int = 16, most: int = 256, dropout: float = 0.0
    ):
        super().__init__(ndim, channels, num_classes, dropout)
        image = [2**k for k in range((strides[0]).bit_length() - 1)]  # the strides finer than the pyramid's
        widths = [min(channels * s, most) for s in (*image, *strides[:-1])]
        skips = [*widths[: len(image)], *dims[:-1]]
        self.stem = nn.ModuleList(
            _block(ndim, in_chans if k == 0 else widths[k - 1], widths[k], 3, stride=1 if k == 0 else 2)
            for k in range(len(image))
        )
        below = [*widths[1:], dims[-1]]
        self.levels = nn.ModuleList(
            nn.Sequential(_block(ndim, deep + skip, width, 3), _block(ndim, width, width, 3))
            for deep, skip, width in zip(below, skips, widths, strict=True)
        )
        init_fan_out(self.stem)
        init_fan_out(self.levels)

    def classifier(self, num_classes: int) -> Conv:
        """torch's own initialisation: from so few channels, logits near zero would take very long to grow."""
        return Conv(self.ndim, self.channels, num_classes)

    def merge(self, maps, image):
        skips = []
        for conv in self.stem:
            image = conv(image)
            skips.append(image)
        skips += maps[:-1]
        x = maps[-1]
        for level, skip in zip(reversed(self.levels), reversed(skips), strict=True):
            x = level(torch.cat([_like(x, skip), skip], -1))
        return x


def _level(level: int, dims: Sequence[int]) -> int:
    if not -len(dims) <= level < len(dims):
        raise ValueError(f"level {level} is not one of the pyramid's {len(dims)} maps")
    return level % len(dims)
