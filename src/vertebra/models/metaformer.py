"""MetaFormer Is Actually What You Need for Vision (PoolFormer; CVPR 2022, arXiv 2111.11418) and MetaFormer Baselines
for Vision (TPAMI 2024, arXiv 2210.13452). Official code: github.com/sail-sg/poolformer and
github.com/sail-sg/metaformer, Apache-2.0.

The frame of a transformer, norm, token mixer, norm, MLP, with the plainest mixers there are: pooling (PoolFormer), none
at all (IdentityFormer), a fixed random one (RandFormer), separable convolution (ConvFormer), and convolution early with
attention late (CAFormer). That they do well says that the frame matters more than the mixer.

Unusual here: PoolFormer norms the last map and then averages it, its norms have one group over all channels and cells;
the later networks have no biases inside their blocks, norms with a weight alone, StarReLU for activation, and learned
factors on the residuals of the last two stages. The identity mixer still adds the normed map. The random matrices are
stored but not trained, and belong to the size a model is built for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage
from ..layers import Block, Conv, Linear, Mlp, OneGroup, PatchEmbed, drop_path_rates, init_truncated, ntuple
from ..mixers import GlobalAttention, PoolMixer, RandomMixer, SeparableConvMixer, StarReLU
from ..registry import Family, Inputs, Variant, Weights

EPS, HEAD = 1e-6, 32


class PoolFormer(Backbone):
    """Four stages at strides 4 to 32 (PoolFormer, Fig. 2). The dense version norms its outputs."""

    OFFICIAL = (
        (r"^stages\.(\d+)\.down\.", lambda m: f"network.{2 * int(m[1]) - 1}."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"network.{2 * int(m[1])}."),
        (r"\.scale([12])\.gamma$", r".layer_scale_\1"),
        (r"^output_norms\.(\d+)", lambda m: f"norm{2 * int(m[1])}"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        pool: int = 3,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates, linear = self.ndim, drop_path_rates(drop_path_rate, depths), partial(Conv, self.ndim)
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dims[0], 7, 4, padding=2)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            hidden = int(dim * mlp_ratio)
            blocks = [
                Block(dim, PoolMixer(pool), Mlp(dim, hidden, linear=linear), rate, scale=layer_scale, norm=OneGroup)
                for rate in rates[i]
            ]
            self.stages.append(Stage(blocks, down=PatchEmbed(ndim, dims[i - 1], dim, 3, 2) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if self.features_only:
            self.output_norms = nn.ModuleList(OneGroup(dim) for dim in dims)
        else:
            self.norm = OneGroup(dims[-1])
        self.make_head()
        self.init_weights()

    def init_weights(self) -> None:
        init_truncated(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


class MapNorm(nn.Module):
    """Norm over all channels and cells of a sample, with a weight per channel: (B, *S, C) -> (B, *S, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:], eps=EPS) * self.weight


class ResidualScale(nn.Module):
    """A learned factor per channel on the residual (eq. 11): (..., C) -> (..., C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class BaselineBlock(Block):
    """r1 x + mixer(norm1 x), then r2 x + mlp(norm2 x) (section 2.1): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, drop_path: float, norm, rescale: bool):
        super().__init__(dim, mixer, mlp, drop_path, norm=norm)
        self.res_scale1, self.res_scale2 = (ResidualScale(dim) if rescale else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.res_scale1(x) + self.drop_path(self.attn(self.norm1(x)))
        return self.res_scale2(x) + self.drop_path(self.mlp(self.norm2(x)))


class SquaredReLU(nn.Module):
    """relu(x)^2: any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


_weight_norm = partial(nn.LayerNorm, eps=EPS, bias=False)


class Shrink(nn.Module):
    """Norm, then a convolution of stride 2: (B, *S, dim) -> (B, *ceil(S / 2), out)."""

    def __init__(self, ndim: int, dim: int, out: int):
        super().__init__()
        self.pre_norm, self.conv = _weight_norm(dim), Conv(ndim, dim, out, 3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pre_norm(x))


class MetaFormer(Backbone):
    """The later networks (section 2.2). `mixers` names each stage's: identity, random, pool, conv or attention.

    `mlp_head` is ConvFormer's and CAFormer's. `img_size` matters to random mixers alone. features_only gives raw maps.
    """

    OFFICIAL: ClassVar[Rules] = (
        (r"^patch_embed\.proj\.", "downsample_layers.0.conv."),
        (r"^patch_embed\.norm\.", "downsample_layers.0.post_norm."),
        (r"^stages\.(\d+)\.down\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.attn\.", ".token_mixer."),
        (r"^head\.", "head.fc2."),
        (r"^neck\.0\.", "head.fc1."),
        (r"^neck\.2\.", "head.norm."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mixers: Sequence[str],
        mlp_ratio: float = 4.0,
        mlp_head: bool = False,
        map_norm: bool = False,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        known = ("identity", "random", "pool", "conv", "attention")
        if len(mixers) != len(dims) or set(mixers) - set(known):
            raise ValueError(f"mixers needs one of {', '.join(known)} for each of {len(dims)} stages, got {mixers}")
        grid = tuple((s - 3) // 4 + 1 for s in ntuple(img_size, ndim, "img_size"))
        if min(grid) < 1:
            raise ValueError(f"img_size must be at least 3 per side, got {img_size!r}")
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dims[0], 7, 4, _weight_norm(dims[0]), padding=2)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks: list[nn.Module] = []
            for rate in rates[i]:
                mlp = Mlp(dim, int(dim * mlp_ratio), act=StarReLU, bias=False)
                norm = MapNorm if map_norm else _weight_norm
                blocks.append(BaselineBlock(dim, self._mixer(mixers[i], dim, grid), mlp, rate, norm, rescale=i >= 2))
            self.stages.append(Stage(blocks, down=Shrink(ndim, dims[i - 1], dim) if i else None))
            grid = tuple((s + 1) // 2 for s in grid)
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        last, hidden = dims[-1], 4 * dims[-1]
        if not self.features_only:
            self.norm = nn.LayerNorm(last, eps=EPS)
            self.neck: nn.Module = nn.Identity()
            if mlp_head:
                self.neck = nn.Sequential(Linear(last, hidden), SquaredReLU(), nn.LayerNorm(hidden))
        self.make_head(hidden if mlp_head else last)
        self.init_weights()

    def _mixer(self, kind: str, dim: int, grid: tuple[int, ...]) -> nn.Module:
        if kind == "attention":
            return GlobalAttention(dim, dim // HEAD, qkv_bias=False, proj_bias=False)
        if kind == "conv":
            return SeparableConvMixer(self.ndim, dim)
        if kind == "random":
            return RandomMixer(grid)
        return PoolMixer() if kind == "pool" else nn.Identity()

    def init_weights(self) -> None:
        init_truncated(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(self.norm(features.flatten(1, -2).mean(1)))


class PlainHeadMetaFormer(MetaFormer):
    """The networks whose head is one linear layer: without the names of the MLP's parts."""

    OFFICIAL = MetaFormer.OFFICIAL[:5]


_SIZES = {
    "s12": ((2, 2, 6, 2), (64, 128, 320, 512)),
    "s24": ((4, 4, 12, 4), (64, 128, 320, 512)),
    "s36": ((6, 6, 18, 6), (64, 128, 320, 512)),
    "m36": ((6, 6, 18, 6), (96, 192, 384, 768)),
    "m48": ((8, 8, 24, 8), (96, 192, 384, 768)),
}
_WIDE_SIZES = {
    "s18": ((3, 3, 9, 3), (64, 128, 320, 512)),
    "s36": ((3, 12, 18, 3), (64, 128, 320, 512)),
    "m36": ((3, 12, 18, 3), (96, 192, 384, 576)),
    "b36": ((3, 12, 18, 3), (128, 256, 512, 768)),
}
_MIXERS = {
    "identityformer": ("identity",) * 4,
    "randformer": ("identity", "identity", "random", "random"),
    "poolformerv2": ("pool",) * 4,
    "convformer": ("conv",) * 4,
    "caformer": ("conv", "conv", "attention", "attention"),
}
_COLUMNS = ("drop_path", "params_m", "gmacs", "top1", "top1_384", "top1_21k", "top1_21k_384")
# drop path, params_m, gmacs and top1 as the repositories print them (randformer: counted with its frozen matrices);
# _384: fine-tuned at 384 pixels, _21k: after pre-training on ImageNet-21k
_TABLE: dict[str, tuple[float, ...]] = {
    "poolformer_s12": (0.1, 12, 1.8, 77.2),
    "poolformer_s24": (0.1, 21, 3.4, 80.3),
    "poolformer_s36": (0.2, 31, 5.0, 81.4),
    "poolformer_m36": (0.3, 56, 8.8, 82.1),
    "poolformer_m48": (0.4, 73, 11.6, 82.5),
    "identityformer_s12": (0.1, 11.9, 1.8, 74.6),
    "identityformer_s24": (0.1, 21.3, 3.4, 78.2),
    "identityformer_s36": (0.2, 30.8, 5.0, 79.3),
    "identityformer_m36": (0.3, 56.1, 8.8, 80.0),
    "identityformer_m48": (0.4, 73.3, 11.5, 80.4),
    "randformer_s12": (0.1, 12.127, 1.9, 76.6),
    "randformer_s24": (0.1, 21.812, 3.5, 78.2),
    "randformer_s36": (0.2, 31.497, 5.2, 79.5),
    "randformer_m36": (0.3, 56.783, 9.0, 81.2),
    "randformer_m48": (0.3, 74.287, 11.9, 81.4),
    "poolformerv2_s12": (0.1, 11.9, 1.8, 78.0),
    "poolformerv2_s24": (0.1, 21.3, 3.4, 80.7),
    "poolformerv2_s36": (0.2, 30.8, 5.0, 81.6),
    "poolformerv2_m36": (0.3, 56.1, 8.8, 82.2),
    "poolformerv2_m48": (0.4, 73.3, 11.5, 82.6),
    "convformer_s18": (0.2, 27, 3.9, 83.0, 84.4, 83.7, 85.0),
    "convformer_s36": (0.3, 40, 7.6, 84.1, 85.4, 85.4, 86.4),
    "convformer_m36": (0.4, 57, 12.8, 84.5, 85.6, 86.1, 86.9),
    "convformer_b36": (0.6, 100, 22.6, 84.8, 85.7, 87.0, 87.6),
    "caformer_s18": (0.15, 26, 4.1, 83.6, 85.0, 84.1, 85.4),
    "caformer_s36": (0.3, 39, 8.0, 84.5, 85.7, 85.8, 86.9),
    "caformer_m36": (0.4, 56, 13.2, 85.2, 86.2, 86.6, 87.5),
    "caformer_b36": (0.6, 99, 23.2, 85.5, 86.4, 87.4, 88.1),
}
# COCO 1x: RetinaNet AP, Mask R-CNN box and mask AP; ADE20K Semantic FPN miou
_DENSE: dict[str, dict[str, float]] = {
    "poolformer_s12": dict(retinanet_ap=36.2, box_ap=37.3, mask_ap=34.6, miou=37.2),
    "poolformer_s24": dict(retinanet_ap=38.9, box_ap=40.1, mask_ap=37.0, miou=40.3),
    "poolformer_s36": dict(retinanet_ap=39.5, box_ap=41.0, mask_ap=37.7, miou=42.0),
    "poolformer_m36": dict(miou=42.4),
    "poolformer_m48": dict(miou=42.7),
}


def _variant(name: str, row: tuple[float, ...]) -> Variant:
    kind, size = name.split("_")
    figures = dict(zip(_COLUMNS, row, strict=False)) | _DENSE.get(name, {})
    depths, dims = (_WIDE_SIZES if kind in ("convformer", "caformer") else _SIZES)[size]
    config: dict[str, Any] = dict(dims=dims, depths=depths)
    if kind == "poolformer":
        config |= dict(model=PoolFormer, layer_scale=1e-5 if size in ("s12", "s24") else 1e-6)
        where = f"https://github.com/sail-sg/poolformer/releases/download/v1.0/{name}.pth.tar"
        inputs = Inputs(224, crop=0.95 if size.startswith("m") else 0.9)
    else:
        wide = kind in ("convformer", "caformer")
        config |= dict(mixers=_MIXERS[kind], mlp_head=wide, map_norm=not wide)
        config |= {} if wide else dict(model=PlainHeadMetaFormer)
        where = f"https://huggingface.co/sail/dl/resolve/main/{kind}/{name}.pth"
        inputs = Inputs(224, crop=1.0)
    return Variant(config, figures, inputs, Weights(where, "Apache-2.0", "direct"))


FAMILY = Family(
    name="metaformer",
    model=MetaFormer,
    paper="MetaFormer Is Actually What You Need for Vision; MetaFormer Baselines for Vision",
    venue="CVPR 2022; TPAMI 2024",
    arxiv="2111.11418, 2210.13452",
    code="github.com/sail-sg/poolformer, github.com/sail-sg/metaformer",
    licence="Apache-2.0",
    variants={name: _variant(name, row) for name, row in _TABLE.items()},
)
