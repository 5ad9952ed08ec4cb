"""GC ViT: Global Context Vision Transformers (ICML 2023, arXiv 2206.09959). Official code: github.com/NVlabs/GCVit,
NVIDIA Source Code License-NC (non-commercial).

Blocks alternate between local attention in windows and global attention, whose queries are the same for all windows:
once per level a few convolutions and poolings shrink the map to one window, and every window answers that summary of
the image with its own keys and values. So no shift and no mask is needed to join windows.

Unusual here: the query has no projection and is made from the map before its norm; the norms of a downsampler stand
before and after its convolutions, and the residual is of the normed map; no convolution but the first has a bias.
Level 3's window is twice as wide as the others and covers its map. The dense version has windows of 24 at every level,
each map's own norm, and pools level 3's query once; padded cells take part as zero tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, Conv, Linear, Mlp, drop_path_rates, max_pool, ntuple, resize
from ..mixers import GlobalWindowAttention, WindowAttention
from ..registry import Family, Inputs, Variant, Weights

RATIOS = (32, 32, 16, 32)  # side of the image over side of a window, per level
UNITS = (3, 2, 1, 1)  # convolution units that make a level's query
State = tuple[Tensor, Tensor | None]  # the map (B, *S, C) and the level's global query (B, *window, C)


class FusedMBConv(nn.Module):
    """Modified Fused-MBConv: x + conv1x1(SE(GELU(dwconv3x3(x)))), no norm and no bias: (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int):
        super().__init__()
        self.depthwise = Conv(ndim, dim, dim, 3, groups=dim, bias=False)
        self.squeeze, self.excite = Linear(dim, dim // 4, bias=False), Linear(dim // 4, dim, bias=False)
        self.project = Conv(ndim, dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.depthwise(x))
        mean = y.mean(tuple(range(1, x.ndim - 1)), keepdim=True)
        return x + self.project(y * torch.sigmoid(self.excite(F.gelu(self.squeeze(mean)))))


class Downsampler(nn.Module):
    """Norm, convolution unit, strided convolution, norm: (B, *S, dim) -> (B, *ceil(S / 2), out)."""

    def __init__(self, ndim: int, dim: int, out: int):
        super().__init__()
        self.norm1, self.conv = nn.LayerNorm(dim), FusedMBConv(ndim, dim)
        self.reduction = Conv(ndim, dim, out, 3, 2, padding=1, bias=False)
        self.norm2 = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.reduction(self.conv(self.norm1(x))))


class GlobalQuery(nn.Module):
    """Global query generator (Fig. 4): `units` convolution units, the first `pools` followed by a max pooling.

    (B, *S, C) -> (B, *window, C); what is no window by then is resampled.
    """

    def __init__(self, ndim: int, dim: int, window: Sequence[int], units: int, pools: int):
        super().__init__()
        self.window, self.pools = tuple(window), pools
        self.units = nn.ModuleList(FusedMBConv(ndim, dim) for _ in range(units))

    def forward(self, x: Tensor) -> Tensor:
        for i, unit in enumerate(self.units):
            x = unit(x)
            if i < self.pools:
                x = max_pool(x, 3, 2, 1)
        return resize(x, self.window, "cubic")


class Entry(nn.Module):
    """Way into a level: the downsampler of the level before, then the query for all of this level's blocks."""

    def __init__(self, reduce: nn.Module, query: GlobalQuery):
        super().__init__()
        self.reduce, self.query = reduce, query

    def forward(self, state: State) -> State:
        x = self.reduce(state[0])
        return x, self.query(x)


class ContextBlock(Block):
    """Transformer block with local or global attention in windows; hands the query on."""

    def forward(self, state: State) -> State:
        x, query = state
        y = self.norm1(x)
        y = self.attn(y, query) if isinstance(self.attn, GlobalWindowAttention) else self.attn(y)
        x = x + self.drop_path(self.scale1(y))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x)))), query


class GCViT(Backbone):
    """The pyramid of Fig. 2. `img_size` only decides the windows, unless `window` says them: one number for all levels
    or one entry per level. Any input is padded to fit and its query resampled.

    The dense version's windows have 24 cells per axis, at rank 3, where that would be 13824 tokens, 8.
    """

    OFFICIAL = (
        (r"^patch_embed\.0\.", "patch_embed.proj."),
        (r"^patch_embed\.1\.", "patch_embed.conv_down."),
        (r"^stages\.(\d+)\.down\.reduce\.", lambda m: f"levels.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", "levels."),
        (r"\.down\.query\.units\.(\d+)\.", r".q_global_gen.to_q_global.\1.conv."),
        (r"\.conv\.depthwise\.", ".conv.0."),
        (r"\.conv\.squeeze\.", ".conv.2.fc.0."),
        (r"\.conv\.excite\.", ".conv.2.fc.2."),
        (r"\.conv\.project\.", ".conv.3."),
        (r"\.attn\.kv\.", ".attn.qkv."),
        (r"\.attn\.pos\.table$", ".attn.relative_position_bias_table"),
        (r"\.scale([12])\.gamma$", r".gamma\1"),
        (r"^output_norms\.(\d+)", r"norm\1"),
    )
    CONSTANT = (r"\.attn\.relative_position_index$",)

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        window: int | Sequence[int | Sequence[int]] | None = None,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        dims = [dim * 2**i for i in range(4)]
        sides, reach = self._windows(window, img_size)
        self.patch_embed = nn.Sequential(Conv(ndim, self.in_chans, dim, 3, 2, padding=1), Downsampler(ndim, dim, dim))
        self.stages = nn.ModuleList()
        for i, width in enumerate(dims):
            # as published: level 3 pools unless its window covers the map, level 4 never does
            pools = (3, 2, int(reach[i] != tuple(s // 16 for s in sides)), 0)[i]
            query = GlobalQuery(ndim, width, reach[i], UNITS[i], pools)
            blocks = []
            for j, rate in enumerate(rates[i]):
                mixer = GlobalWindowAttention if j % 2 else WindowAttention
                attn, mlp = mixer(ndim, width, heads[i], reach[i]), Mlp(width, int(width * mlp_ratio))
                blocks.append(ContextBlock(width, attn, mlp, rate, scale=layer_scale))
            reduce = Downsampler(ndim, dims[i - 1], width) if i else nn.Identity()
            self.stages.append(Stage(blocks, down=Entry(reduce, query)))
        self.describe(dims, [4 * 2**i for i in range(4)])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(width) for width in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def _windows(self, window, img_size) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Sides of the image that the tables are built for, and the window of each level."""
        sides = ntuple(img_size, self.ndim, "img_size")
        if min(sides) < 32:
            raise ValueError(f"img_size must be at least 32 per side, got {img_size!r}")
        if window is None and self.features_only:
            window = 24 if self.ndim < 3 else 8
        if window is None:
            return sides, [tuple(s // ratio for s in sides) for ratio in RATIOS]
        reach = [ntuple(w, self.ndim, "window") for w in ntuple(window, 4, "window (one entry per level)")]
        if min(map(min, reach)) < 1:
            raise ValueError(f"windows must have at least one cell per axis, got {window!r}")
        return sides, reach

    def embed(self, x: Tensor) -> State:
        return self.patch_embed(x), None

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]

    def finish(self, state: State) -> Tensor:
        return self.norm(state[0])


_FILES = "https://huggingface.co/nvidia/GCViT/resolve/main"


def _variant(name, dim, depths, params, gmacs, top1, drop_path, size=224, ratio=3, scale=None, **more) -> Variant:
    config = dict(dim=dim, depths=depths, heads=tuple(dim // 32 * 2**i for i in range(4)), mlp_ratio=ratio)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | more
    place = Weights("README of github.com/NVlabs/GCVit", "CC-BY-NC-SA-4.0", "manual")
    if name:
        place = Weights(f"{_FILES}/gcvit_{name}.pth.tar", "CC-BY-NC-SA-4.0", "direct")
    return Variant(config | dict(layer_scale=scale), figures, Inputs(size), place)


_TINY, _WIDE = (3, 4, 19, 5), dict(ratio=2, scale=1e-5)
_T = dict(box_ap=47.9, mask_ap=43.2, cascade_box_ap=51.6, cascade_mask_ap=44.6)
_S, _B = dict(cascade_box_ap=52.4, cascade_mask_ap=45.4), dict(cascade_box_ap=52.9, cascade_mask_ap=45.8)

FAMILY = Family(
    name="gcvit",
    model=GCViT,
    paper="Global Context Vision Transformers",
    venue="ICML 2023",
    arxiv="2206.09959",
    code="github.com/NVlabs/GCVit",
    licence="NVIDIA Source Code License-NC (non-commercial)",
    # params_m, gmacs and top1 as the repository prints them (its weights of May 2023; xtiny's GMACs measure 2.9), but
    # for the large ones' params_m, which are counted (printed: 201 for every size);
    # box/mask AP: COCO Mask R-CNN 3x, cascade_: Cascade Mask R-CNN 3x; _21k: ImageNet-21k first, then 1k at that size
    variants={
        "gc_vit_xxtiny": _variant("1k_xxtiny", 64, (2, 2, 6, 2), 12, 2.1, 79.9, 0.2),
        "gc_vit_xtiny": _variant("1k_xtiny", 64, (3, 4, 6, 5), 20, 2.6, 82.0, 0.2),
        "gc_vit_tiny": _variant("1k_tiny", 64, _TINY, 28, 4.7, 83.5, 0.2, **_T),
        "gc_vit_tiny2": _variant("1k_tiny2", 64, (3, 4, 29, 5), 34, 5.5, 83.7, 0.25),
        "gc_vit_small": _variant("1k_small", 96, _TINY, 51, 8.5, 84.3, 0.3, **_WIDE, **_S),
        "gc_vit_small2": _variant("1k_small2", 96, (3, 4, 23, 5), 68, 10.7, 84.8, 0.35, scale=1e-5),
        "gc_vit_base": _variant("1k_base", 128, _TINY, 90, 14.8, 85.0, 0.5, **_WIDE, **_B),
        "gc_vit_large": _variant("1k_large", 192, _TINY, 202.1, 32.6, 85.7, 0.5, **_WIDE),
        "gc_vit_large_224_21k": _variant("", 192, _TINY, 202.1, 32.6, 86.6, 0.5, **_WIDE),
        "gc_vit_large_384_21k": _variant("21k_large_384", 192, _TINY, 202.9, 120.4, 87.4, 0.1, 384, **_WIDE),
        "gc_vit_large_512_21k": _variant("21k_large_512", 192, _TINY, 203.8, 245.0, 87.6, 0.1, 512, **_WIDE),
    },
)
