"""MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer (ICLR 2022, arXiv 2110.02178).
Official code: github.com/apple/ml-cvnets, Apple sample code licence.

A convolution is unfolding, a matrix product and folding; MobileViT puts a transformer in the place of the matrix
product. MobileNetV2's blocks shrink the map, and in the last three stages cells with the same place in their 2x2 patch
attend to each other, so that with the 3x3 convolution before every cell sees the whole map.

Unusual here: no positions at all; SiLU everywhere, in the transformers too; the convolutions around a transformer are
dense; its result is joined to its input by a convolution, not added. Maps with an odd side are resampled to the next
even one for the transformers and back. The weights expect BGR images from 0 to 1, as OpenCV reads them. Training used
dropout (0.1) and no stochastic depth; there is neither here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage, plus_one
from ..layers import Attention, Block, Conv, ConvNorm, InvertedResidual, Mlp, resize
from ..registry import Family, Inputs, Variant, Weights

PATCH = 2  # cells per axis
_MV2 = {"expand": "exp_1x1", "depthwise": "conv_3x3", "project": "red_1x1"}


def split_patches(x: Tensor) -> Tensor:
    """The cells of a map grouped by their place inside their patch: (B, *S, C) -> (B, PATCH^ndim, N, C).

    Places and patches run row-major. Sides must divide by PATCH.
    """
    batch, *sides, dim = x.shape
    n, grid = len(sides), [s // PATCH for s in sides]
    x = x.reshape(batch, *(v for g in grid for v in (g, PATCH)), dim)
    x = x.permute(0, *range(2, 2 * n + 1, 2), *range(1, 2 * n + 1, 2), 2 * n + 1)
    return x.reshape(batch, PATCH**n, math.prod(grid), dim)


def join_patches(x: Tensor, sides: Sequence[int]) -> Tensor:
    """The inverse: (B, PATCH^ndim, N, C) -> (B, *sides, C)."""
    batch, dim, n = x.shape[0], x.shape[-1], len(sides)
    x = x.reshape(batch, *(PATCH,) * n, *(s // PATCH for s in sides), dim)
    x = x.permute(0, *(v for i in range(n) for v in (1 + n + i, 1 + i)), 2 * n + 1)
    return x.reshape(batch, *sides, dim)


def whole_patches(sides: Sequence[int]) -> list[int]:
    """`sides` rounded up to whole patches."""
    return [(s + PATCH - 1) // PATCH * PATCH for s in sides]


class MobileViTBlock(nn.Module):
    """Local convolutions, transformers over equal places of all patches, fusion with the input (section 3.1, Fig. 1b).

    (B, *S, dim) -> (B, *S, dim); the transformers are `width` wide. Time grows with the square of the number of
    patches, memory with the number of cells.
    """

    def __init__(self, ndim: int, dim: int, width: int, depth: int, heads: int = 4):
        super().__init__()
        self.local = ConvNorm(ndim, dim, dim, 3, act=nn.SiLU)
        self.widen = Conv(ndim, dim, width, bias=False)
        blocks = [Block(width, Attention(width, heads), Mlp(width, 2 * width, act=nn.SiLU)) for _ in range(depth)]
        self.transformer = nn.Sequential(*blocks, nn.LayerNorm(width))
        self.conv_proj = ConvNorm(ndim, width, dim, act=nn.SiLU)
        self.fusion = ConvNorm(ndim, 2 * dim, dim, 3, act=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[1:-1]
        even = whole_patches(sides)
        cells = split_patches(resize(self.widen(self.local(x)), even))
        cells = self.transformer(cells.flatten(0, 1)).reshape(cells.shape)
        y = self.conv_proj(resize(join_patches(cells, even), sides))
        return self.fusion(torch.cat([x, y], -1))


class MobilePyramid(Backbone):
    """What both MobileViTs share: a stem at stride 2 and five stages at strides 2 to 32 (Table 4).

    The first two are MobileNetV2's blocks, `repeats` of them in the second; each other one shrinks the map by one such
    block and goes on with one of `globals_`.
    """

    def lay_out(self, stem: int, dims: Sequence[int], repeats: int, expansion: int, globals_: Sequence[nn.Module]):
        def shrink(dim: int, out: int, stride: int = 2) -> nn.Module:
            return InvertedResidual(self.ndim, dim, out, 3, stride, expansion, act=nn.SiLU)

        self.stem = ConvNorm(self.ndim, self.in_chans, stem, 3, 2, act=nn.SiLU)
        second = [shrink(dims[0], dims[1])] + [shrink(dims[1], dims[1], 1) for _ in range(repeats - 1)]
        self.stages = nn.ModuleList([Stage([shrink(stem, dims[0], 1)]), Stage(second)])
        for dim, out, block in zip(dims[1:], dims[2:], globals_, strict=False):
            self.stages.append(Stage([shrink(dim, out), block]))
        self.describe(dims, [2, 4, 8, 16, 32])

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)


class MobileViT(MobilePyramid):
    """`dims` of the five stages; `widths` and `depths` of the transformers in the last three."""

    OFFICIAL = (
        (r"^stem\.", "conv_1.block."),
        (r"^neck\.", "conv_1x1_exp.block."),
        (r"^head\.", "classifier.fc."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"layer_{plus_one(m)}."),
        (r"\.(expand|depthwise|project)\.", lambda m: f".block.{_MV2[m[1]]}.block."),
        (r"\.local\.", ".local_rep.conv_3x3.block."),
        (r"\.widen\.", ".local_rep.conv_1x1.block.conv."),
        (r"\.(conv_proj|fusion)\.", r".\1.block."),
        (r"\.transformer\.", ".global_rep."),
        (r"\.norm1\.", ".pre_norm_mha.0."),
        (r"\.attn\.qkv\.", ".pre_norm_mha.1.qkv_proj."),
        (r"\.attn\.proj\.", ".pre_norm_mha.1.out_proj."),
        (r"\.norm2\.", ".pre_norm_ffn.0."),
        (r"\.mlp\.fc1\.", ".pre_norm_ffn.1."),
        (r"\.mlp\.fc2\.", ".pre_norm_ffn.4."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        widths: Sequence[int],
        depths: Sequence[int] = (2, 4, 3),
        stem: int = 16,
        expansion: int = 4,
        heads: int = 4,
        **contract: Any,
    ):
        super().__init__(**contract)
        if (len(dims), len(widths), len(depths)) != (5, 3, 3):
            raise ValueError(f"dims needs 5 entries, widths and depths 3, got {dims!r}, {widths!r}, {depths!r}")
        rows = zip(dims[2:], widths, depths, strict=True)
        self.lay_out(stem, dims, 3, expansion, [MobileViTBlock(self.ndim, *row, heads) for row in rows])
        last = min(4 * dims[-1], 960)
        if not self.features_only:
            self.neck = ConvNorm(self.ndim, dims[-1], last, act=nn.SiLU)
        self.make_head(last)
        self.init_weights()

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


_URL = "https://docs-assets.developer.apple.com/ml-research/models/cvnets/classification"


def _variant(size: str, dims, widths, params, gmacs, top1, ap, miou, **config) -> Variant:
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.0, ssdlite_ap=ap, voc_miou=miou)
    inputs = Inputs(256, (0.0,) * 3, (1.0,) * 3, channels="BGR", crop=256 / 288, interpolation="bilinear")
    where = Weights(f"{_URL}/mobilevit_{size}.pt", "Apple sample code", "direct")
    return Variant(dict(dims=dims, widths=widths) | config, figures, inputs, where)


# params_m, top1 of the paper, gmacs counted at 256 pixels (the paper prints 0.7 for x_small, which does not add up);
# SSDLite at 320 pixels on COCO and DeepLabv3 on VOC 2012 as the repository has them
FAMILY = Family(
    name="mobilevit",
    model=MobileViT,
    paper="MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer",
    venue="ICLR 2022",
    arxiv="2110.02178",
    code="github.com/apple/ml-cvnets",
    licence="Apple sample code",
    variants={
        "mobilevit_xx_small": _variant(
            "xxs", (16, 24, 48, 64, 80), (64, 80, 96), 1.3, 0.407, 69.0, 19.9, 72.8, expansion=2
        ),
        "mobilevit_x_small": _variant("xs", (32, 48, 64, 80, 96), (96, 120, 144), 2.3, 0.986, 74.8, 24.8, 77.1),
        "mobilevit_small": _variant("s", (32, 64, 96, 128, 160), (144, 192, 240), 5.6, 2.0, 78.4, 27.9, 79.1),
    },
)
