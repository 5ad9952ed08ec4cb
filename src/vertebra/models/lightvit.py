"""LightViT: Towards Light-Weight Convolution-Free Vision Transformers (2022, arXiv 2207.05557).
Official code: github.com/hunto/LightViT and github.com/hunto/image_classification_sota, Apache-2.0.

A few learnable global tokens travel beside the image. In each block they gather from the whole map and give back to
every position, while the image itself attends in windows only. The MLP ends in bi-dimensional attention: a gate over
channels times a gate over positions.

Unusual here: the keys of the broadcast come from the gathered tokens before the output projection; the head averages
over image and global tokens alike; in the dense version the very last block drops the global tokens before its MLP.
Padding takes part in local windows (as the bias of qkv) but is never seen by the global tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage, conv_norms
from ..layers import (
    Conv,
    ConvNorm,
    DropPath,
    Linear,
    Mlp,
    PatchMerging,
    RelativePositionBias,
    attend,
    check_heads,
    drop_path_rates,
    max_pool,
    merge_heads,
    pad_to,
    split_heads,
    windows,
)  # fmt: skip
from ..layers.window import KEY_MASK
from ..registry import Family, Variant, Weights

State = tuple[Tensor, Tensor | None]  # map (B, *S, C), global tokens (B, T, C)


class Stem(nn.Module):
    """Convolutions from the image to the first map (section 3.4): (B, *S, dim) -> (B, *ceil(S / 8), out)."""

    def __init__(self, ndim: int, dim: int, out: int):
        super().__init__()
        half = out // 2
        self.convs = nn.Sequential(
            ConvNorm(ndim, dim, half, 3, 2, act=nn.GELU),
            *(ConvNorm(ndim, half, half, 3, stride, groups=half, act=nn.GELU) for stride in (1, 1, 2)),
        )
        self.proj, self.norm = Conv(ndim, half, out, 3, 2), nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.convs(x)))


class LocalGlobalAttention(nn.Module):
    """Local windows, aggregation and broadcast (section 3.2, eq. 2-5): (B, *S, C), (B, T, C) -> the same.

    The map is gathered into windows once. Aggregation and broadcast do not care about the order of positions, so they
    read the very same queries, keys and values as the windows, with padded keys masked.
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.window = heads, (window,) * ndim
        self.qkv, self.kv_global, self.proj = Linear(dim, 3 * dim), Linear(dim, 2 * dim), Linear(dim, dim)
        self.pos = RelativePositionBias(self.window, heads)

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        batch, *sides, dim = x.shape
        cells = windows(tuple(sides), self.window, device=x.device)
        qkv = self.qkv(cells.split(x))
        q, k, v = split_heads(qkv, self.heads, 3)
        local = merge_heads(attend(q, k, v, self.pos().unsqueeze(0)))

        q, k, v = split_heads(qkv.reshape(batch, cells.number * cells.length, 3 * dim), self.heads, 3)
        real = None if cells.valid is None else KEY_MASK * (~cells.valid).to(x.dtype).view(1, 1, 1, -1)
        gathered = merge_heads(attend(split_heads(self.qkv(g), self.heads, 3)[0], k, v, real))
        spread = merge_heads(attend(q, *split_heads(self.kv_global(gathered), self.heads, 2)))
        return self.proj(cells.join(local + spread.reshape(local.shape), sides)), self.proj(gathered)


class BiDimensionalAttention(nn.Module):
    """Gates over channels and positions (section 3.3, Fig. 4): map (B, *S, C) and tokens (B, T, C) or None -> the same.

    The channel gate reads the mean over all positions and tokens, a position's gate reads that position and the mean.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.global_reduce, self.local_reduce = Linear(dim, dim // 4), Linear(dim, dim // 4)
        self.channel_select, self.spatial_select = Linear(dim // 4, dim), Linear(dim // 4 * 2, 1)

    def _gated(self, y: Tensor, z: Tensor, mean: Tensor, channel: Tensor) -> Tensor:
        lift = (slice(None), *(None,) * (y.ndim - 2))
        local = F.gelu(self.local_reduce(z))
        spatial = self.spatial_select(torch.cat([local, mean[lift].expand_as(local)], -1)).sigmoid()
        return y * (channel[lift] * spatial)

    def forward(self, x: Tensor, g: Tensor | None = None) -> State:
        zx, zg = self.norm(x), None if g is None else self.norm(g)
        mean = zx.flatten(1, -2).mean(1)
        if zg is not None:
            share = zg.shape[1] / (zg.shape[1] + zx[0, ..., 0].numel())
            mean = mean * (1 - share) + zg.mean(1) * share
        mean = F.gelu(self.global_reduce(mean))
        channel = self.channel_select(mean).sigmoid()
        return self._gated(x, zx, mean, channel), None if zg is None else self._gated(g, zg, mean, channel)


class BiDimensionalMlp(Mlp):
    """MLP followed by bi-dimensional attention: map (B, *S, C) and tokens (B, T, C) or None -> the same."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(dim, hidden)
        self.attn = BiDimensionalAttention(dim)

    def forward(self, x: Tensor, g: Tensor | None = None) -> State:
        return self.attn(super().forward(x), None if g is None else super().forward(g))


class Block(nn.Module):
    """Attention, then MLP, over map and tokens (Fig. 2). With `drop_tokens` the MLP sees the map alone."""

    def __init__(self, ndim, dim, heads, window, mlp_ratio, drop_path, drop_tokens: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = LocalGlobalAttention(ndim, dim, heads, window)
        self.mlp = BiDimensionalMlp(dim, int(dim * mlp_ratio))
        self.drop_path, self.drop_tokens = DropPath(drop_path), drop_tokens

    def forward(self, state: State) -> State:
        x, g = state
        dx, dg = self.drop_path.together(*self.attn(self.norm1(x), self.norm1(g)))
        x, g = x + dx, g + dg
        if self.drop_tokens:
            return x + self.drop_path(self.mlp(self.norm2(x))[0]), None
        dx, dg = self.drop_path.together(*self.mlp(self.norm2(x), self.norm2(g)))
        return x + dx, g + dg


class Merge(PatchMerging):
    """Residual patch merging (section 3.4): map (B, *S, C) -> (B, *ceil(S / 2), C'), tokens (B, T, C) -> (B, T, C').

    Swin's merge plus a projected maximum over each cell. `tokens` False: there are none.
    """

    def __init__(self, ndim: int, dim: int, out: int, tokens: bool = True):
        super().__init__(ndim, dim, out)
        self.res_proj = Linear(dim, out, bias=False)
        if tokens:
            self.norm2, self.proj = nn.LayerNorm(dim), Linear(dim, out, bias=False)

    def forward(self, state: State) -> State:
        x, g = state
        x = pad_to(x, 2)  # before both ways: the maximum sees the zeros, as published
        x = super().forward(x) + self.res_proj(max_pool(x, 2))
        return x, None if g is None else self.proj(self.norm2(g))


class Pyramid(Backbone):
    """What LightViT and DualToken-ViT share: stem, merges' names, output norms of the dense version, neck and head."""

    OFFICIAL = (
        conv_norms(r"patch_embed\.convs", "patch_embed.stem"),
        (r"^stages\.(\d+)\.down", r"stages.\1.0"),
        (r"^stages\.(\d+)\.blocks\.(\d+)", lambda m: f"stages.{m[1]}.{int(m[2]) + (m[1] != '0')}"),
        (r"\.pos\.table$", ".relative_position_bias_table"),
        (r"^output_norms\.(\d+)", r"norm\1"),
    )
    CONSTANT = (r"\.relative_position_index$",)

    def _ends(self, dims: Sequence[int], neck: int) -> None:
        """Feature description, then the output norms (dense) or norm, neck and head (classification)."""
        self.describe(dims, [8 * 2**i for i in range(len(dims))])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(d, eps=1e-6) for d in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
            self.neck = nn.Sequential(Linear(dims[-1], neck), nn.LayerNorm(neck), nn.GELU())
        self.make_head(neck)
        self.init_weights()

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]


class LightViT(Pyramid):
    """Three stages at strides 8, 16 and 32 (Table 1); `tokens` global tokens, windows of `window` cells per axis."""

    no_decay = ("global_token",)

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        tokens: int,
        mlp_ratios: Sequence[float] = (8, 4, 4),
        window: int = 7,
        neck: int = 1280,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        self.patch_embed = Stem(ndim, in_chans, dims[0])
        self.global_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, dims[0]), std=0.02))
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            last = [self.features_only and i == len(dims) - 1 and j == depth - 1 for j in range(depth)]
            blocks = [Block(ndim, dim, heads[i], window, mlp_ratios[i], rates[i][j], last[j]) for j in range(depth)]
            self.stages.append(Stage(blocks, down=Merge(ndim, dims[i - 1], dim) if i else None))
        self._ends(dims, neck)

    def embed(self, x: Tensor) -> State:
        return self.patch_embed(x), self.global_token.expand(x.shape[0], -1, -1)

    def finish(self, state: State) -> State:
        return self.norm(state[0]), self.norm(state[1])

    def pre_logits(self, features: State) -> Tensor:
        return self.neck(torch.cat([features[0].flatten(1, -2), features[1]], 1)).mean(1)


def _variant(name, dim, depths, heads, tokens, drop_path, params, gmacs, top1, top5, ap1x, ap3x) -> Variant:
    config = dict(dims=(dim, 2 * dim, 4 * dim), depths=depths, heads=(heads, 2 * heads, 4 * heads), tokens=tokens)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, top5=top5, drop_path=drop_path)
    figures |= dict(box_ap=ap1x[0], mask_ap=ap1x[1], box_ap_3x=ap3x[0], mask_ap_3x=ap3x[1])
    url = f"https://github.com/hunto/LightViT/releases/download/v0.0.1/lightvit_{name}_{top1}.ckpt"
    return Variant(config, figures, weights=Weights(url, "Apache-2.0", "direct"))


FAMILY = Family(
    name="lightvit",
    model=LightViT,
    paper="LightViT: Towards Light-Weight Convolution-Free Vision Transformers",
    venue="arXiv 2022",
    arxiv="2207.05557",
    code="github.com/hunto/LightViT",
    licence="Apache-2.0",
    # as the repository prints them (counted: 0.77, 1.83 and 4.11 GMACs); box/mask AP: COCO Mask R-CNN, 1x and 3x
    variants={
        "lightvit_tiny": _variant("tiny", 64, (2, 6, 6), 2, 8, 0.1, 9.4, 0.7, 78.7, 94.4, (37.8, 35.9), (41.5, 38.4)),
        "lightvit_small": _variant(
            "small", 96, (2, 6, 6), 3, 16, 0.1, 19.2, 1.7, 80.9, 95.3, (40.0, 37.4), (43.2, 39.9)
        ),
        "lightvit_base": _variant(
            "base", 128, (3, 8, 6), 4, 24, 0.3, 35.2, 3.9, 82.1, 95.9, (41.7, 38.8), (45.0, 41.2)
        ),
    },
)
