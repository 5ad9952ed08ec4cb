"""PVT: Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions (ICCV 2021, arXiv
2102.12122) and PVT v2: Improved Baselines with Pyramid Vision Transformer (CVMJ 2022, arXiv 2106.13797). Official code:
github.com/whai362/PVT, Apache-2.0.

A transformer in four stages at strides 4 to 32. High resolutions are affordable because attention reads its keys and
values from a spatially reduced map. v2 needs no positions: patches overlap and the MLP has a depthwise convolution.
Its linear form reads keys and values from 7 x 7 averages.

Unusual here: two eps values (1e-6 in blocks and outputs, 1e-5 after embeddings and reductions); v1's position tables
are resampled per stage, where the official comparison with stage 1's table crashes at 448 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage, plus_one
from ..layers import Block, Conv, Mlp, PatchEmbed, Positions, TokenBlock, drop_path_rates, init_fan_out, ntuple
from ..mixers import SpatialReductionAttention
from ..registry import Family, Variant, Weights

EPS = 1e-6
KERNELS = (4, 2, 2, 2)  # v1's patch sizes, and the strides of both


class Embed(PatchEmbed):
    """v1's patches, norm and positions: (B, *S, dim) -> (B, *S // kernel, out). The first `prefix` rows stay unused."""

    def __init__(self, ndim: int, dim: int, out: int, kernel: int, grid: Sequence[int], prefix: int = 0):
        super().__init__(ndim, dim, out, kernel, norm=nn.LayerNorm(out))
        self.pos = Positions(out, grid, prefix, mode="linear", antialias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.pos(x.shape[1:-1])[:, self.pos.prefix :].reshape(1, *x.shape[1:])


class TokenEmbed(Embed):
    """The same with a class token in front: (B, *S, dim) -> (tokens (B, 1 + N, out), grid)."""

    no_decay = ("cls_token",)

    def __init__(self, ndim: int, dim: int, out: int, kernel: int, grid: Sequence[int], prefix: int = 1):
        super().__init__(ndim, dim, out, kernel, grid, prefix)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, out), std=0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x = PatchEmbed.forward(self, x)
        grid = tuple(x.shape[1:-1])
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, -2)], 1)
        return tokens + self.pos(grid), grid


class _Pyramid(Backbone):
    """What v1 and v2 share: names and strides."""

    OFFICIAL = (
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.(\d+)\.down\.cls_token$", "cls_token"),
        (r"^stages\.(\d+)\.down\.", lambda m: f"patch_embed{plus_one(m)}."),
        (r"^patch_embed(\d+)\.pos\.table$", r"pos_embed\1"),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"block{plus_one(m)}."),
        (r"^stages\.(\d+)\.norm\.", lambda m: f"norm{plus_one(m)}."),
        (r"\.mlp\.middle\.(?:1\.)?", ".mlp.dwconv.dwconv."),
    )


class PyramidVisionTransformer(_Pyramid):
    """PVT v1 (Fig. 3): the class token joins in the last stage, and forward_features gives tokens (B, 1 + N, C).

    The dense version has no class token and no norm: raw maps. A ragged end is cut off by each patch embedding.
    """

    tokens = True

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int],
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        ratios: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        img_size: int | Sequence[int] = 224,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if ratios[-1] != 1:
            raise ValueError(f"the last reduction ratio must be 1 (its tokens lie on no grid), got {ratios[-1]}")
        rates, grid = drop_path_rates(drop_path_rate, depths), ntuple(img_size, ndim, "img_size")
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            last = i == len(dims) - 1
            embed, block = (TokenEmbed, TokenBlock) if last and not self.features_only else (Embed, Block)
            grid = tuple(max(s // KERNELS[i], 1) for s in grid)
            down = embed(ndim, dims[i - 1] if i else in_chans, dim, KERNELS[i], grid, prefix=int(last))
            if i == 0:
                self.patch_embed = down
            blocks = []
            for rate in rates[i]:
                attn = SpatialReductionAttention(ndim, dim, heads[i], ratios[i])
                blocks.append(block(dim, attn, Mlp(dim, int(dim * mlp_ratios[i])), rate, eps=EPS))
            self.stages.append(Stage(blocks, down=down if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def to_map(self, state, index: int) -> Tensor:
        if not isinstance(state, tuple):
            return state
        tokens, grid = state
        return tokens[:, 1:].reshape(tokens.shape[0], *grid, tokens.shape[-1])

    def finish(self, state) -> Tensor:
        return self.norm(state[0])

    def pre_logits(self, features: Tensor) -> Tensor:
        return features[:, 0]


class PyramidVisionTransformerV2(_Pyramid):
    """PVT v2: overlapping patches, convolution in the MLP, a norm after each stage; `linear` is the variant b2-li."""

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int],
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        ratios: Sequence[int] = (8, 4, 2, 1),
        linear: bool = False,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = PatchEmbed(ndim, in_chans, dims[0], 7, 4, norm=nn.LayerNorm(dims[0]))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            down = PatchEmbed(ndim, dims[i - 1], dim, 3, 2, norm=nn.LayerNorm(dim)) if i else None
            blocks = []
            for rate in rates[i]:
                hidden = int(dim * mlp_ratios[i])
                middle: nn.Module = Conv(ndim, hidden, hidden, 3, groups=hidden)
                middle = nn.Sequential(nn.ReLU(), middle) if linear else middle
                attn = SpatialReductionAttention(ndim, dim, heads[i], ratios[i], linear)
                blocks.append(Block(dim, attn, Mlp(dim, hidden, middle=middle), rate, eps=EPS))
            self.stages.append(Stage(blocks, down=down, norm=nn.LayerNorm(dim, eps=EPS)))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        self.make_head()
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init_fan_out(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)


def _variant(name, depths, params, gmacs, top1, drop_path=0.1, retina=None, mask=None, miou=None, **config) -> Variant:
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path, retinanet_ap=retina)
    figures |= dict(box_ap=mask and mask[0], mask_ap=mask and mask[1], miou=miou)
    if not name.startswith("pvt_v2"):
        config["model"] = PyramidVisionTransformer
    where = f"https://github.com/whai362/PVT/releases/download/v2/{name}.pth"
    kept = {k: v for k, v in figures.items() if v is not None}
    return Variant(config | dict(depths=depths), kept, weights=Weights(where, "Apache-2.0", "direct"))


_B0, _B5 = dict(dims=(32, 64, 160, 256)), dict(mlp_ratios=(4, 4, 4, 4))
# name, depths, params_m, gmacs, top1, drop path; COCO 1x: RetinaNet AP, Mask R-CNN box and mask AP; ADE20K miou; config
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("pvt_tiny", (2, 2, 2, 2), 13.2, 1.9, 75.1, 0.1, 36.7, (36.7, 35.1), 35.7, {}),
    ("pvt_small", (3, 4, 6, 3), 24.5, 3.8, 79.8, 0.1, 40.4, (40.4, 37.8), 39.8, {}),
    ("pvt_medium", (3, 4, 18, 3), 44.2, 6.7, 81.2, 0.3, 41.9, (42.0, 39.0), 41.6, {}),
    ("pvt_large", (3, 8, 27, 3), 61.4, 9.8, 81.7, 0.3, 42.6, (42.9, 39.5), 42.1, {}),
    ("pvt_v2_b0", (2, 2, 2, 2), 3.7, 0.6, 70.5, 0.1, 37.2, (38.2, 36.2), None, _B0),
    ("pvt_v2_b1", (2, 2, 2, 2), 14.0, 2.1, 78.7, 0.1, 41.2, (41.8, 38.8), None, {}),
    ("pvt_v2_b2", (3, 4, 6, 3), 25.4, 4.04, 82.0, 0.1, 44.6, (45.3, 41.2), None, {}),
    ("pvt_v2_b2_li", (3, 4, 6, 3), 22.6, 3.9, 82.1, 0.1, 43.6, (44.1, 40.5), None, dict(linear=True)),
    ("pvt_v2_b3", (3, 4, 18, 3), 45.2, 6.9, 83.1, 0.3, 45.9, (47.0, 42.5), None, {}),
    ("pvt_v2_b4", (3, 8, 27, 3), 62.6, 10.1, 83.6, 0.3, 46.1, (47.5, 42.7), None, {}),
    ("pvt_v2_b5", (3, 6, 40, 3), 82.0, 11.8, 83.8, 0.3, 46.2, (47.4, 42.5), None, _B5),
)

FAMILY = Family(
    name="pvt",
    model=PyramidVisionTransformerV2,
    paper="Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions; PVT v2",
    venue="ICCV 2021; CVMJ 2022",
    arxiv="2102.12122, 2106.13797",
    code="github.com/whai362/PVT",
    licence="Apache-2.0",
    variants={name: _variant(name, *row, **config) for name, *row, config in _TABLE},
)
