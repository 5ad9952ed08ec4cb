"""FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization (ICCV 2023, arXiv 2303.14189). Official
code: github.com/apple/ml-fastvit, Apple sample code licence.

A MetaFormer built for latency: tokens are mixed by depthwise convolutions whose residual folds into the kernel, the
stem and the ways down are over-parameterised in training and single convolutions after it, and only the larger models
attend, on the smallest map. ``vertebra.fuse`` gives the published inference network.

Unusual here: the large kernel of a way down has no activation after it (the official module computes one and drops it);
RepMixer subtracts a batch norm of its input and convolves before it norms, where the paper draws the reverse; attention
has a batch norm, the feed-forward part none but the one in its own convolution; nothing is normed before the head. That
convolution's norm stays in the published inference network (`fuse(model, published=False)` folds it). The official
dense version of the models with attention gives out the position encoding in the place of the last stage, a known bug;
here it is the last stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage
from ..layers import (
    BatchNorm,
    Branches,
    Conv,
    ConvNorm,
    DropPath,
    LayerScale,
    Mlp,
    ResidualConv,
    SqueezeExcite,
    drop_path_rates,
    init_truncated,
)
from ..mixers import GlobalAttention, RepMixer
from ..registry import Family, Inputs, Variant, Weights

HEAD_DIM = 32


class MobileOne(nn.Module):
    """MobileOne block (arXiv 2206.04040, Fig. 3): GELU(SE(sum of branches)), (B, *S, dim) -> (B, *S', out).

    The branches are a convolution, one of a single cell where `kernel` is larger, and the identity where shapes allow.
    `squeeze` is the hidden width of the squeeze-excitation, zero for none.
    """

    def __init__(self, ndim: int, dim: int, out: int, kernel=1, stride=1, groups: int = 1, squeeze: int = 0):
        super().__init__()
        kernels = {"dense": kernel} | ({"one": 1} if kernel > 1 else {})
        self.reparam = Branches(ndim, dim, out, kernels, stride, groups, identity=dim == out and stride == 1)
        self.se = SqueezeExcite(ndim, out, squeeze) if squeeze else nn.Identity()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.se(self.reparam(x)))


class ConvFfn(Mlp):
    """Depthwise 7x7 with batch norm, then the MLP (section 3.2.3, Fig. 2c): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int, hidden: int):
        super().__init__(dim, hidden, linear=partial(Conv, ndim))
        self.conv = ConvNorm(ndim, dim, dim, 7, groups=dim, keep=True)
        init_truncated(self)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x))


class RepMixerBlock(nn.Module):
    """RepMixer, which holds its own residual, then x + scale * ffn(x) (Fig. 2a): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int, hidden: int, drop_path: float, scale: float):
        super().__init__()
        self.mixer = RepMixer(ndim, dim, 3, scale)
        self.mlp = ConvFfn(ndim, dim, hidden)
        self.scale, self.drop_path = LayerScale(dim, scale, (dim, *(1,) * ndim)), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        return x + self.drop_path(self.scale(self.mlp(x)))


class AttentionBlock(nn.Module):
    """x + scale1 * attn(norm x), then x + scale2 * ffn(x) (Fig. 2a): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int, hidden: int, drop_path: float, scale: float):
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"{dim} channels do not divide into attention heads of {HEAD_DIM}")
        self.norm, self.attn = BatchNorm(dim), GlobalAttention(dim, dim // HEAD_DIM, qkv_bias=False)
        self.mlp = ConvFfn(ndim, dim, hidden)
        self.scale1, self.scale2 = (LayerScale(dim, scale, (dim, *(1,) * ndim)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.attn(self.norm(x))))
        return x + self.drop_path(self.scale2(self.mlp(x)))


class RepCPE(ResidualConv):
    """x + depthwise convolution of x (CPVT, arXiv 2102.10882), by `fuse` one convolution: (B, *S, C) -> (B, *S, C)."""

    def fuse(self, published: bool = True) -> Conv:
        with torch.no_grad():
            self.conv.weight[(slice(None), 0, *(k // 2 for k in self.conv.kernel))] += 1
        return self.conv


class FastViT(Backbone):
    """Four stages of RepMixer blocks at strides 4 to 32 (Fig. 2a, Table 2). Dense: a norm on each map."""

    attention: ClassVar[bool] = False  # in the last stage, after a position encoding
    OFFICIAL: ClassVar[Rules] = (
        (r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}."),
        (r"^stages\.(\d)\.down\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj."),
        (r"^output_norms\.(\d)\.", lambda m: f"norm{2 * int(m[1])}."),
        (r"^neck\.", "conv_exp."),
        (r"\.mixer\.branches\.", ".token_mixer.mixer."),
        (r"\.mixer\.norm\.", ".token_mixer.norm.rbr_skip."),
        (r"\.mixer\.scale\.", ".token_mixer.scale."),
        (r"\.mixer\.(weight|bias)$", r".token_mixer.reparam_conv.\1"),
        (r"\.attn\.", ".token_mixer."),
        (r"\.mlp\.", ".convffn."),
        (r"(?:\.reparam)?\.dense\.", ".rbr_conv.0."),
        (r"(?:\.reparam)?\.one\.", ".rbr_scale."),
        (r"(?:\.reparam)?\.identity\.", ".rbr_skip."),
        (r"\.reparam\.", ".reparam_conv."),
        (r"\.large\.", ".lkb_origin."),
        (r"\.small\.", ".small_conv."),
        (r"\.proj\.0\.(weight|bias)$", r".proj.0.lkb_reparam.\1"),
        (r"(rbr_conv\.0|rbr_scale|lkb_origin|small_conv|convffn\.conv)\.norm\.", r"\1.bn."),
        (r"\.scale\.gamma$", ".layer_scale"),
        (r"\.scale(\d)\.gamma$", r".layer_scale_\1"),
        (r"\.se\.down\.", ".se.reduce."),
        (r"\.se\.up\.", ".se.expand."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, dim, rates = self.ndim, dims[0], drop_path_rates(drop_path_rate, depths)
        self.patch_embed = nn.Sequential(
            MobileOne(ndim, self.in_chans, dim, 3, 2), MobileOne(ndim, dim, dim, 3, 2, dim), MobileOne(ndim, dim, dim)
        )
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            attention, down = self.attention and i == len(dims) - 1, []
            if i:  # no activation after the large kernel
                large = Branches(ndim, dims[i - 1], dim, {"large": 7, "small": 3}, 2, groups=dims[i - 1])
                down = [large, MobileOne(ndim, dim, dim), *([RepCPE(ndim, dim, 7)] if attention else [])]
            block = AttentionBlock if attention else RepMixerBlock
            blocks = [block(ndim, dim, int(dim * mlp_ratio), rate, layer_scale) for rate in rates[i]]
            self.stages.append(Stage(blocks, down=nn.Sequential(*down) if down else None))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        wide = 2 * dims[-1]
        if self.features_only:
            self.output_norms = nn.ModuleList(BatchNorm(dim) for dim in dims)
        else:
            self.neck = MobileOne(ndim, dims[-1], wide, 3, groups=dims[-1], squeeze=wide // 16)
        self.make_head(wide)
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


class AttentionFastViT(FastViT):
    """The same with self-attention in the last stage (SA and MA models)."""

    attention = True
    OFFICIAL = (
        (r"^stages\.3\.blocks\.", "network.7."),
        (r"^stages\.3\.down\.2\.conv\.", "network.6.pe."),
        (r"^stages\.3\.down\.2\.", "network.6.reparam_conv."),
        (r"^output_norms\.3\.", "norm7."),
        *FastViT.OFFICIAL,
    )


_12, _24, _36 = (2, 2, 6, 2), (4, 4, 12, 4), (6, 6, 18, 6)
_URL = "https://docs-assets.developer.apple.com/ml-research/models/fastvit/image_classification_models"


def _variant(
    name, dim, depths, params, deploy, gmacs, top1, distilled, drop_path, ratio=4, scale=1e-5, **more
) -> Variant:
    config = dict(dims=tuple(dim * 2**i for i in range(4)), depths=depths, mlp_ratio=ratio)
    config |= dict(layer_scale=scale, model=AttentionFastViT if "a" in name else FastViT)
    figures = dict(params_m=params, params_deploy_m=deploy, gmacs=gmacs, top1=top1, top1_distilled=distilled)
    inputs = Inputs(size=256, crop=0.95 if name == "ma36" else 0.9)
    weights = Weights(f"{_URL}/fastvit_{name}.pth.tar", "Apple sample code", "direct")
    return Variant(config, figures | dict(drop_path=drop_path) | more, inputs, weights)


# params_m: the training structure, params_deploy_m: the fused one, both counted from the code, which has more than the
# paper's table prints (3.6, 6.8, 8.8, 10.9, 20.6, 30.4, 42.7); top1 and top1_distilled (RegNetY-16GF, in the folder
# image_classification_distilled_models) as in the paper; the fused files are called fastvit_*_reparam.pth.tar.
# box/mask AP: COCO Mask R-CNN 1x; miou: ADE20K Semantic FPN
FAMILY = Family(
    name="fastvit",
    model=FastViT,
    paper="FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization",
    venue="ICCV 2023",
    arxiv="2303.14189",
    code="github.com/apple/ml-fastvit",
    licence="Apple sample code",
    variants={
        "fastvit_t8": _variant("t8", 48, (2, 2, 4, 2), 4.026, 3.996, 0.7, 76.2, 77.2, 0, ratio=3),
        "fastvit_t12": _variant("t12", 64, _12, 7.554, 7.509, 1.4, 79.3, 80.3, 0, ratio=3),
        "fastvit_s12": _variant("s12", 64, _12, 9.474, 9.429, 1.8, 79.9, 81.1, 0),
        "fastvit_sa12": _variant(
            "sa12", 64, _12, 11.581, 11.545, 1.9, 80.9, 81.9, 0.1, box_ap=38.9, mask_ap=35.9, miou=38.0
        ),
        "fastvit_sa24": _variant(
            "sa24", 64, _24, 21.554, 21.501, 3.8, 82.7, 83.4, 0.1, box_ap=42.0, mask_ap=38.0, miou=41.0
        ),
        "fastvit_sa36": _variant(
            "sa36", 64, _36, 31.527, 31.457, 5.6, 83.6, 84.2, 0.2, scale=1e-6, box_ap=43.8, mask_ap=39.4, miou=42.9
        ),
        "fastvit_ma36": _variant(
            "ma36", 76, _36, 44.068, 43.985, 7.9, 83.9, 84.6, 0.35, scale=1e-6, box_ap=45.1, mask_ap=40.5, miou=44.6
        ),
    },
)
