"""ViT-Adapter: Vision Transformer Adapter for Dense Predictions (ICLR 2023, arXiv 2205.08534). Official code:
github.com/czczup/ViT-Adapter, Apache-2.0.

A plain ViT keeps its weights and gets a pyramid beside it: convolutions read the image at strides 4 to 32, and four
times the ViT's map reads the pyramid (injector) and, some blocks later, the pyramid reads the map (extractor), both by
deformable attention. There is no classifier: the network always gives four maps of equal width.

Unusual here: queries, keys and values of windowed blocks are padded after their projection, and padding takes part with
logit zero; the class token's row of the position table is kept and never read; positions are resampled without
antialiasing; the injectors start at zero, so that the ViT starts unchanged. The detection and the segmentation code add
other maps of the ViT to the outputs (`staged`). Where officially sides must divide by 32, here the image is padded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage, conv_norms
from ..layers import (
    Attention,
    BatchNorm,
    Block,
    Conv,
    ConvNorm,
    ConvTranspose,
    DropPath,
    LayerScale,
    Linear,
    Mlp,
    PatchEmbed,
    Positions,
    TokenBlock,
    attend,
    built_grid,
    crop,
    drop_path_rates,
    init_fan_out,
    max_pool,
    merge_heads,
    ntuple,
    pad_to,
    resize,
    split_heads,
    windows,
)
from ..layers.space import channels_first
from ..mixers import GlobalAttention, MultiScaleDeformableAttention
from ..mixers.multi_scale_deformable import centres
from ..registry import Family, Inputs, Variant, Weights, create_model
from .vit import EPS, VisionTransformer

STRIDES = (4, 8, 16, 32)


class State(NamedTuple):
    """The ViT's map and the pyramid's tokens on their way, and what else the run knows."""

    x: Tensor  # (B, *S / patch, C)
    c: Tensor  # tokens (B, N, C) of the maps at strides 8, 16 and 32
    grids: tuple[tuple[int, ...], ...]  # their sides
    fine: Tensor  # (B, *S / 4, C), which only the outputs read
    sides: tuple[int, ...]  # of the image as given


class PaddedWindowAttention(Attention):
    """Attention in windows that pads after the projection, so that padding has logit and value zero.

    (B, *S, C) -> (B, *S, C); memory grows linearly with the map.
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int | Sequence[int]):
        super().__init__(dim, heads)
        self.window = ntuple(window, ndim, "window")

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        sides = tuple(x.shape[1:-1])
        parts = windows(sides, self.window, device=x.device)
        y = attend(*split_heads(parts.split(self.qkv(x)), self.heads, 3))
        return self.proj(parts.join(merge_heads(y), sides))


class MapBlock(Block):
    """A block of the ViT: sees its map alone."""

    def forward(self, state: State) -> State:
        return state._replace(x=super().forward(state.x))


class Injector(nn.Module):
    """The ViT's map reads the pyramid (eq. 1): x + gamma * attention(x, c)."""

    def __init__(self, ndim: int, dim: int, **deform: Any):
        super().__init__()
        self.query_norm, self.feat_norm = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.deform = MultiScaleDeformableAttention(ndim, dim, levels=3, **deform)
        self.scale = LayerScale(dim, 0.0)

    def forward(self, state: State) -> State:
        x = state.x
        query, places = self.query_norm(x).flatten(1, -2), centres(tuple(x.shape[1:-1]), device=x.device)
        y = self.deform.read(query, places, self.feat_norm(state.c), state.grids)
        return state._replace(x=x + self.scale(y).reshape(x.shape))


class PyramidMlp(nn.Module):
    """MLP with a depthwise convolution on each map of the pyramid: tokens (B, N, C) -> (B, N, C)."""

    def __init__(self, ndim: int, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.conv = Conv(ndim, hidden, hidden, 3, groups=hidden)

    def forward(self, c: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        maps = [self.conv(m).flatten(1, -2) for m in to_maps(self.fc1(c), grids)]
        return self.fc2(F.gelu(torch.cat(maps, 1)))


class Extractor(nn.Module):
    """The pyramid reads the ViT's map, then an MLP (eq. 2 and 3): c + attention(c, x), then c + mlp(c)."""

    def __init__(self, ndim: int, dim: int, hidden: int, drop_path: float, **deform: Any):
        super().__init__()
        self.query_norm, self.feat_norm, self.ffn_norm = (nn.LayerNorm(dim, eps=EPS) for _ in range(3))
        self.deform = MultiScaleDeformableAttention(ndim, dim, levels=1, **deform)
        self.ffn, self.drop_path = PyramidMlp(ndim, dim, hidden), DropPath(drop_path)

    def forward(self, state: State) -> State:
        x, c, grids = state.x, state.c, state.grids
        places = torch.cat([centres(grid, device=x.device) for grid in grids])
        value = self.feat_norm(x).flatten(1, -2)
        c = c + self.deform.read(self.query_norm(c), places, value, [tuple(x.shape[1:-1])])
        return state._replace(c=c + self.drop_path(self.ffn(self.ffn_norm(c), grids)))


class SpatialPrior(nn.Module):
    """Convolutions over the image (Fig. 4c): (B, *S, in_chans) -> maps (B, *S / stride, dim), strides 4, 8, 16, 32.

    The last three know their level by a learned vector.
    """

    no_decay = ("level_embed",)

    def __init__(self, ndim: int, in_chans: int, width: int, dim: int):
        super().__init__()
        dims = (width, 2 * width, 4 * width, 4 * width)
        self.stem = nn.Sequential(
            *(ConvNorm(ndim, width if i else in_chans, width, 3, 1 if i else 2, act=nn.ReLU) for i in range(3))
        )
        self.down = nn.ModuleList(ConvNorm(ndim, dims[i], dims[i + 1], 3, 2, act=nn.ReLU) for i in range(3))
        self.proj = nn.ModuleList(Conv(ndim, d, dim) for d in dims)
        self.level_embed = nn.Parameter(torch.randn(3, dim))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [max_pool(self.stem(x), 3, 2, 1)]
        for down in self.down:
            maps.append(down(maps[-1]))
        fine, *levels = (proj(m) for proj, m in zip(self.proj, maps, strict=True))
        return [fine, *(m + e for m, e in zip(levels, self.level_embed.unbind(0), strict=True))]


def to_maps(c: Tensor, grids: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tokens (B, N, C) -> maps (B, *grid, C)."""
    parts = c.split([math.prod(grid) for grid in grids], 1)
    return [part.reshape(c.shape[0], *grid, c.shape[-1]) for part, grid in zip(parts, grids, strict=True)]


class ViTAdapter(Backbone):
    """A plain ViT, its spatial prior and four interactions (Fig. 4); always dense, whatever `features_only` says.

    `interactions` has the number of the ViT's blocks in each of the four, by default even shares of `depth`. All
    blocks but the last of each attend in windows of `window` tokens per axis; None makes every one global. With
    `staged` output i adds the ViT's map after interaction i (the segmentation code), otherwise all add the last one.
    `deform_heads`, `deform_ratio` and `points` belong to the deformable attention. An image is padded with zeros to
    multiples of 32; where the patches do not divide that (14), the ViT reads it resampled, to patches at stride 16.

    ``load_checkpoint(model, file, strict=False)`` loads a plain ViT or DeiT file into the ViT, `adapt` a plain model.
    """

    heads = ()

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 12,
        heads: int,
        patch: int = 16,
        mlp_ratio: float = 4.0,
        interactions: Sequence[int] | None = None,
        window: int | Sequence[int] | None = None,
        staged: bool = True,
        layer_scale: bool = True,
        deform_heads: int = 6,
        deform_ratio: float = 1.0,
        points: int = 4,
        prior: int = 64,
        ffn_ratio: float = 0.25,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract | dict(features_only=True, num_classes=0))
        spans = tuple(interactions or (depth * (i + 1) // 4 - depth * i // 4 for i in range(4)))
        if len(spans) != 4 or min(spans) < 1 or sum(spans) != depth:
            raise ValueError(f"interactions must be 4 numbers of blocks that add up to depth={depth}, got {spans}")
        ndim, self.patch, self.staged, self.spans = self.ndim, patch, staged, spans
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dim, patch)
        grid = built_grid(img_size, ndim, patch)
        self.pos_embed = Positions(dim, grid, prefix=1, antialias=False)
        self.prior = SpatialPrior(ndim, self.in_chans, prior, dim)
        self.stages = nn.ModuleList()
        scale = 1.0 if layer_scale else None
        deform: dict[str, Any] = dict(heads=deform_heads, points=points, ratio=deform_ratio)
        for i, rates in enumerate(drop_path_rates(drop_path_rate, spans)):
            parts: list[nn.Module] = [Injector(ndim, dim, **deform)]
            for j, rate in enumerate(rates, start=1):
                whole = window is None or j == len(rates)
                attn = GlobalAttention(dim, heads) if whole else PaddedWindowAttention(ndim, dim, heads, window)
                parts.append(MapBlock(dim, attn, Mlp(dim, int(dim * mlp_ratio)), rate, EPS, scale))
            hidden = int(dim * ffn_ratio)
            extractors = 1 if i < 3 else 3  # two more after the last interaction
            parts += [Extractor(ndim, dim, hidden, drop_path_rate, **deform) for _ in range(extractors)]
            self.stages.append(Stage(parts))
        self.neck = ConvTranspose(ndim, dim, dim)
        self.output_norms = nn.ModuleList(BatchNorm(dim) for _ in STRIDES)
        self.describe([dim] * 4, STRIDES)
        self.make_head()
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        init_fan_out(self)
        for module in self.modules():
            if isinstance(module, MultiScaleDeformableAttention):
                module.reset_parameters()

    @property
    def OFFICIAL(self) -> Rules:  # type: ignore[override]  # blocks are counted through all interactions
        """Our names -> official names: injector, blocks and extractors of a stage lie in one list."""

        def part(m: re.Match) -> str:
            i, j = int(m[1]), int(m[2])
            after = j - 1 - self.spans[i]
            if j > 0 and after < 0:
                return f"blocks.{sum(self.spans[:i]) + j - 1}."
            name = "injector" if j == 0 else "extractor" if after == 0 else f"extra_extractors.{after - 1}"
            return f"interactions.{i}.{name}."

        return (
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", part),
            (r"\.deform\.", ".attn."),
            (r"\.ffn\.conv\.", ".ffn.dwconv.dwconv."),
            (r"\.scale(\d?)\.gamma$", r".gamma\1"),
            (r"^pos_embed\.table$", "pos_embed"),
            conv_norms(r"prior\.stem", "spm.stem"),
            (r"^prior\.level_embed$", "level_embed"),
            (r"^prior\.down\.(\d)\.(conv|norm)\.", lambda m: f"spm.conv{int(m[1]) + 2}.{int(m[2] == 'norm')}."),
            (r"^prior\.proj\.(\d)\.", lambda m: f"spm.fc{int(m[1]) + 1}."),
            (r"^neck\.", "up."),
            (r"^output_norms\.(\d)\.", lambda m: f"norm{int(m[1]) + 1}."),
        )

    def embed(self, x: Tensor) -> State:
        image = pad_to(x, STRIDES[-1])
        fine, *levels = self.prior(image)
        grids = tuple(tuple(m.shape[1:-1]) for m in levels)
        c = torch.cat([m.flatten(1, -2) for m in levels], 1)
        if STRIDES[-1] % self.patch:
            image = resize(image, [s * self.patch for s in grids[1]])
        patches = self.patch_embed(image)
        grid = tuple(patches.shape[1:-1])
        places = self.pos_embed(grid)[:, 1:].reshape(1, *grid, patches.shape[-1])
        return State(patches + places, c, grids, fine, tuple(x.shape[1:-1]))

    def to_map(self, state: State, index: int) -> Tensor:
        """The ViT's own map."""
        return state.x

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | int | None = None, **context: Any
    ) -> list[Tensor]:
        """Maps (B, C, *S / stride) of the levels `indices`, all read off the end: prior, pyramid and ViT added up."""
        wanted = self._indices(indices)
        state, seen = self._embed(x, **context), []
        for index in range(len(self.stages)):
            state, _ = self.through(state, span=(index, index + 1))
            seen.append(state.x)
        levels = to_maps(state.c, state.grids)
        maps = [state.fine + self.neck(levels[0]) if 0 in wanted else state.fine, *levels]
        found = []
        for i in wanted:
            y = maps[i] + resize(seen[i] if self.staged else state.x, tuple(maps[i].shape[1:-1]))
            sides = [(s + STRIDES[i] - 1) // STRIDES[i] for s in state.sides]
            found.append(channels_first(self.output_norm(crop(y, sides), i)))
        return found

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        raise ValueError("ViT-Adapter is always dense and has no head: use model(x) or forward_intermediates(x)")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The ViT's blocks in their order; the adapter is new and so belongs to the last group, as a head does."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {"stem": r"^(?:patch_embed|pos_embed)\.", "blocks": rf"{blocks}.*\.(?:norm\d|attn|mlp|scale\d)\."}

    @classmethod
    def translate(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published files are whole detectors; a distilled DeiT has one more row of positions than the table here."""
        state = {k: v for k, v in state.items() if k.startswith("backbone.")} or state
        state = VisionTransformer.translate(state)
        if "dist_token" in state:
            table = state["pos_embed"]
            state = state | {"pos_embed": torch.cat([table[:, :1], table[:, 2:]], 1)}
        return state


def adapt(vit: VisionTransformer, kind: str = "seg", **options: Any) -> ViTAdapter:
    """A ViT-Adapter around the weights of a plain `vit` (any ViT or DeiT, at any rank), the adapter itself fresh.

    `kind` is "seg" or "det"; `options` go to `create_model`. Class tokens, last norm and head are left behind.
    """
    if kind not in ("seg", "det"):
        raise ValueError(f"kind must be seg or det, got {kind!r}")
    blocks = [stage.blocks[0] for stage in vit.stages] if isinstance(vit, VisionTransformer) else []
    plain = [type(b) is TokenBlock and type(b.attn) is Attention and type(b.mlp) is Mlp for b in blocks]
    if not blocks or not all(plain) or type(vit.patch_embed) is not PatchEmbed:
        raise ValueError(f"only a plain ViT or DeiT can be adapted, got {type(vit).__name__}")
    (patch, *_), (hidden, dim) = vit.patch_embed.proj.kernel, blocks[0].mlp.fc1.weight.shape
    heads, wide = blocks[0].attn.heads, dim >= 768
    shape = dict(dim=dim, depth=len(blocks), heads=heads, patch=patch, mlp_ratio=hidden / dim)
    shape |= dict(deform_heads=max(6, heads), deform_ratio=0.5 if wide else 1.0, ndim=vit.ndim, in_chans=vit.in_chans)
    shape |= dict(img_size=tuple(cells * patch for cells in vit.pos_embed.grid))
    model = create_model(f"vit_adapter_base_{kind}", **shape | options)
    ours = [b for stage in model.stages for b in stage.blocks if isinstance(b, MapBlock)]
    for mine, theirs in zip(ours, blocks, strict=True):
        mine.load_state_dict(mine.state_dict() | theirs.state_dict())
    model.patch_embed.load_state_dict(vit.patch_embed.state_dict())
    table, prefix = vit.pos_embed.table.detach(), len(vit.prefix)
    table = torch.cat([table[:, :1], table[:, prefix:]], 1)
    if table.shape != model.pos_embed.table.shape:
        table = model.pos_embed.adapt("table", table, vit.pos_embed.grid)
    with torch.no_grad():
        model.pos_embed.table.copy_(table)
    return model


_SIZES = {  # dim, depth, heads, heads and ratio of the deformable attention, drop path
    "tiny": (192, 12, 3, 6, 1.0, 0.1),
    "small": (384, 12, 6, 6, 1.0, 0.2),
    "base": (768, 12, 12, 12, 0.5, 0.3),
    "large": (1024, 24, 16, 16, 0.5, 0.4),
}
_HALF = (0.5, 0.5, 0.5)


def _variant(name: str, params: float, img: int, scores: dict[str, float], file: str = "") -> Variant:
    size, kind = name.split("_")[2], name.rsplit("_", 1)[1]
    dim, depth, heads, deform_heads, ratio, rate = _SIZES[size]
    config: dict[str, Any] = dict(
        dim=dim, depth=depth, heads=heads, deform_heads=deform_heads, deform_ratio=ratio,
    )  # fmt: skip
    config |= dict(window=14 if kind == "det" else None, staged=kind == "seg")
    release = "https://github.com/czczup/ViT-Adapter/releases/download/"
    where = Weights(release + file, "Apache-2.0", "direct") if file else _MANUAL
    inputs = Inputs(img, _HALF, _HALF) if img == 384 else Inputs(img)
    return Variant(config, dict(params_m=params, drop_path=rate) | scores, inputs, where)


_MANUAL = Weights("README and releases of github.com/czczup/ViT-Adapter, huggingface.co/czczup", "Apache-2.0", "manual")


def _coco(box: float, mask: float, params: float, box_1x: float, mask_1x: float) -> dict[str, float]:
    return dict(box_ap=box, mask_ap=mask, box_ap_1x=box_1x, mask_ap_1x=mask_1x, detector_params_m=params)


def _ade(single: float, multi: float, params: float | None = None) -> dict[str, float]:
    return dict(miou=single, miou_ms=multi) | ({} if params is None else dict(segmentor_params_m=params))


# The image size is that of the ViT's own training. params_m as counted (papers print whole detectors). COCO: Mask R-CNN
# 3x with multi-scale training, and 1x; ADE20K: UPerNet on 512 pixels. The ViT is DeiT, AugReg where the name says so
# and in the large networks.
_TABLE: dict[str, tuple[Any, ...]] = {
    "vit_adapter_tiny_det": (
        7.967, 224, _coco(46.0, 41.0, 28, 41.1, 37.5), "v0.1.2/mask_rcnn_deit_adapter_tiny_fpn_3x_coco.pth.tar",
    ),
    "vit_adapter_small_det": (27.504, 224, _coco(48.2, 42.8, 48, 44.7, 39.9)),
    "vit_adapter_base_det": (99.495, 224, _coco(49.6, 43.6, 120, 47.0, 41.8)),
    "vit_adapter_large_det": (326.974, 384, _coco(52.1, 46.0, 348, 48.7, 43.3)),
    "vit_adapter_tiny_seg": (7.967, 224, _ade(42.6, 43.6, 36)),
    "vit_adapter_small_seg": (27.504, 224, _ade(46.2, 47.1, 58)),
    "vit_adapter_base_seg": (99.495, 224, _ade(48.8, 49.7, 134)),
    "vit_adapter_large_seg": (326.974, 384, _ade(53.4, 54.4, 364)),
    "vit_adapter_tiny_augreg_seg": (7.967, 224, _ade(43.9, 44.8, 36)),
    "vit_adapter_base_augreg_seg": (99.787, 384, _ade(51.9, 52.5, 134)),
}  # fmt: skip

FAMILY = Family(
    name="vit_adapter",
    model=ViTAdapter,
    paper="Vision Transformer Adapter for Dense Predictions",
    venue="ICLR 2023",
    arxiv="2205.08534",
    code="github.com/czczup/ViT-Adapter",
    licence="Apache-2.0",
    variants={name: _variant(name, *row) for name, row in _TABLE.items()},
)
