"""Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition (IEEE TPAMI 2024, arXiv 2211.11943). Official
code: github.com/HVision-NKU/Conv2Former, Apache-2.0.

A transformer block whose attention is replaced by a product: what a wide depthwise convolution makes of the features
weighs the values, cell by cell. So large kernels are used where attention would look far.

Unusual here: the stem's activation comes before its batch norm; the MLP's depthwise convolution has a GELU of its own
and a residual; the head normalises a map of 1280 channels before the mean. The nano model has kernels of 7, as the
PyTorch file has it (the Jittor file of the same repository has 11).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage, conv_norms
from ..layers import Block, Conv, ConvNorm, Mlp, drop_path_rates, init_truncated
from ..mixers import ConvModulation
from ..registry import Family, Inputs, Variant, Weights

EPS, NECK = 1e-6, 1280


class Positions(nn.Module):
    """h + GELU(depthwise 3x3 of h), inside the MLP: (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int):
        super().__init__()
        self.conv = Conv(ndim, dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.conv(x))


class Conv2Former(Backbone):
    """Four stages at strides 4 to 32 (Table 1). The repository has no dense version: features_only gives raw maps."""

    OFFICIAL = (
        (r"^head\.", "pred."),
        (r"^neck\.", "head."),
        conv_norms("patch_embed", "downsample_layers.0"),
        (r"^patch_embed\.2\.", "downsample_layers.0.6."),
        (r"^stages\.(\d+)\.down\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"^(downsample_layers\.0)\.([14])\.", lambda m: f"{m[1]}.{int(m[2]) + 1}."),  # the activation is in between
        (r"\.norm1\.", ".attn.norm."),
        (r"\.norm2\.", ".mlp.norm."),
        (r"\.mlp\.middle\.1\.conv\.", ".mlp.pos."),
        (r"\.scale(\d)\.gamma$", r".layer_scale_\1"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        kernel: int = 11,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, half, rates = self.ndim, dims[0] // 2, drop_path_rates(drop_path_rate, depths)
        self.patch_embed = nn.Sequential(
            ConvNorm(ndim, self.in_chans, half, 3, 2, act=nn.GELU, act_first=True),
            ConvNorm(ndim, half, half, 3, act=nn.GELU, act_first=True),
            Conv(ndim, half, dims[0], 2, 2, padding=0, bias=False),
        )
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks, hidden = [], int(dim * mlp_ratio)
            for rate in rates[i]:
                middle = nn.Sequential(nn.GELU(), Positions(ndim, hidden))
                mlp = Mlp(dim, hidden, act=nn.Identity, middle=middle, linear=partial(Conv, ndim))
                blocks.append(Block(dim, ConvModulation(ndim, dim, kernel), mlp, rate, EPS, layer_scale))
            down = None
            if i:
                shrink = Conv(ndim, dims[i - 1], dim, 2, 2, padding=0)
                down = nn.Sequential(nn.LayerNorm(dims[i - 1], eps=EPS), shrink)
            self.stages.append(Stage(blocks, down=down))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.neck = nn.Sequential(Conv(ndim, dims[-1], NECK), nn.GELU(), nn.LayerNorm(NECK, eps=EPS))
        self.make_head(NECK)
        self.init_weights()

    def init_weights(self) -> None:
        init_truncated(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


def _variant(dim, depths, params, gmacs, top1=None, kernel=11, **more) -> Variant:
    config = dict(dims=tuple(dim * 2**i for i in range(4)), depths=depths, kernel=kernel)
    figures = {k: v for k, v in (dict(params_m=params, gmacs=gmacs, top1=top1) | more).items() if v is not None}
    where = "README of github.com/HVision-NKU/Conv2Former (Baidu)"
    return Variant(config, figures, Inputs(), Weights(where, "Apache-2.0", "manual"))


FAMILY = Family(
    name="conv2former",
    model=Conv2Former,
    paper="Conv2Former: A Simple Transformer-Style ConvNet for Visual Recognition",
    venue="IEEE TPAMI 2024",
    arxiv="2211.11943",
    code="github.com/HVision-NKU/Conv2Former",
    licence="Apache-2.0",
    # params_m, gmacs and top1 as the repository prints them (b_22k: counted); _22k: after pre-training on ImageNet-22k
    variants={
        "conv2former_n": _variant(64, (2, 2, 8, 2), 15, 2.2, 81.5, kernel=7),
        "conv2former_t": _variant(72, (3, 3, 12, 3), 27, 4.4, 83.2),
        "conv2former_s": _variant(72, (4, 4, 32, 4), 50, 8.7, 84.1, top1_22k=84.9),
        "conv2former_b": _variant(96, (4, 4, 34, 4), 90, 15.9, 84.4),
        "conv2former_b_22k": _variant(
            96, (4, 4, 34, 4), 88.785, 15.6, None, 7, top1_22k=86.2, gmacs_384=46.7, top1_22k_384=87.0
        ),
        "conv2former_l": _variant(128, (4, 4, 48, 4), 199, 36.0, None, top1_22k=87.0, gmacs_384=106, top1_22k_384=87.7),
    },
)
