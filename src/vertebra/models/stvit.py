"""STViT: Making Vision Transformers Efficient from A Token Sparsification View (CVPR 2023, arXiv 2303.08685).
Official code: github.com/changsn/STViT-R, MIT.

A few semantic tokens, pooled from the image tokens and then refined by attention like cluster centres, take over the
work of all tokens. Plain STViT goes on with them alone; STViT-R recovers the image tokens from them at the end of each
group of blocks, so that dense tasks keep their map.

Unusual here: the attention that makes semantic tokens has no residual (unless `shortcut`), so they start near zero; one
norm serves its queries and keys; pooling takes the maximum. Only STViT-R on Swin was ever published as code; the plain
versions follow the paper's description and have no reference figures. Published code reads maps of 14x14 only. Here
windows at a ragged edge pool from cells inside the map, and neighbourhoods are moved inside it, which at 14x14 are
exactly the published four corners of 10x10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Stage
from ..layers import (
    Block,
    ConvNorm,
    CrossAttention,
    Mlp,
    Positions,
    RelativePositionBias,
    ResidualConv,
    attend,
    built_grid,
    merge_heads,
    relative_index,
    resize,
    split_heads,
    windows,
)
from ..layers.cached import settled, sized_cache, tracing
from ..layers.window import KEY_MASK
from ..mixers import WindowAttention
from ..registry import Family, Inputs, Variant, Weights
from .deit import DeiT
from .swin import SwinTransformer

GROUP = 6  # blocks from one recovery to the next
State = tuple[Tensor, Tensor]  # image tokens (B, *S, C), semantic tokens (B, *T, C)


@sized_cache
def pooling_bins(side: int, window: int, samples: int, device: torch.device | None = None) -> Tensor:
    """(windows * samples, longest bin) cells of each bin of adaptive pooling, window by window along one axis.

    Shorter bins repeat their last cell and those past the end the last of the map: a maximum does not mind.
    """
    count, j = (side + window - 1) // window, torch.arange(samples, device=device)
    start, end = j * window // samples, ((j + 1) * window + samples - 1) // samples
    longest = (window + 2 * samples - 2) // samples
    inside = torch.minimum(start[:, None] + torch.arange(longest, device=device), end[:, None] - 1)
    first = window * torch.arange(count, device=device)[:, None, None]
    return (first + inside).clamp(max=side - 1).reshape(count * samples, longest)


def pool_windows(x: Tensor, window: Sequence[int], samples: int) -> Tensor:
    """Adaptive maximum over windows: (B, *S, C) -> (B, *windows * samples, C), one axis after the other."""
    for axis, size in enumerate(window, start=1):
        bins = pooling_bins(x.shape[axis], size, samples, device=x.device)
        x = x.index_select(axis, bins.flatten()).unflatten(axis, bins.shape).amax(axis + 1)
    return x


@sized_cache
def neighbourhoods(
    sides: tuple[int, ...], window: tuple[int, ...], reach: tuple[int, ...], device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """Flat cells (W, prod(reach)) around each window, and which exist (None: all).

    A neighbourhood lies about its window, moved as far as needed to be inside the map.
    """
    index = torch.zeros(1, 1, dtype=torch.long, device=device)
    real = torch.ones(1, 1, dtype=torch.bool, device=device)
    for side, size, r in zip(sides, window, reach, strict=True):
        count = (side + size - 1) // size
        start = (size * torch.arange(count, device=device) - (r - size) // 2).clamp(max=side - r).clamp(min=0)
        cells = start[:, None] + torch.arange(r, device=device)
        shape = index.shape[0] * count, index.shape[1] * r
        index = (index[:, None, :, None] * side + cells.clamp(max=side - 1)[None, :, None]).reshape(shape)
        real = (real[:, None, :, None] & (cells < side)[None, :, None]).reshape(shape)
    known = all(type(s) is int and s >= r for s, r in zip(sides, reach, strict=True))
    return index, None if known else real


class SizedBias(RelativePositionBias):
    """A relative position bias for a map of any size, its table resampled off the built one."""

    @settled
    def forward(self, size: tuple[int, ...]) -> Tensor:  # type: ignore[override]
        if not tracing() and size == self.size:
            return super().forward()
        grid = self.table.reshape(1, *(2 * s - 1 for s in self.size), self.table.shape[-1])
        table = resize(grid, [2 * s - 1 for s in size], "cubic").flatten(1, -2)[0]
        index = relative_index(size, device=table.device)
        return table.index_select(0, index.flatten()).reshape(*index.shape, table.shape[-1]).permute(2, 0, 1)


class TokenUpdate(Block):
    """A pre-norm block with layer scale whose attention reads its keys from anywhere; see its descendants."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float, eps: float):
        super().__init__(dim, CrossAttention(dim, heads), Mlp(dim, int(dim * mlp_ratio)), drop_path, eps, scale=1e-5)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Both residuals: what attention found, then the MLP."""
        x = x + self.drop_path(self.scale1(attended))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class Generate(TokenUpdate):
    """Semantic tokens from image tokens (section 3.2): (B, *S, C) -> the same, (B, *T, C).

    Each window is max-pooled to `samples` cells per axis, which attend to themselves and to the cells around the window
    (`reach` per axis). `window` None: the whole map is one window. The map is projected to keys and values once, only
    they are gathered; time and memory grow linearly with the map (with one window too).
    """

    def __init__(
        self, ndim, dim, heads, mlp_ratio, drop_path, eps=1e-5, *,
        samples: int, window: int | None = None, reach: int = 10, shortcut: bool = False, conv_pos: bool = False,
    ):  # fmt: skip
        super().__init__(dim, heads, mlp_ratio, drop_path, eps)
        self.samples, self.window, self.reach, self.shortcut = samples, window, reach, shortcut
        self.conv_pos = ResidualConv(ndim, dim) if conv_pos else None

    def forward(self, x: Tensor) -> State:
        batch, *sides, dim = x.shape
        ndim = len(sides)
        size = tuple(sides) if self.window is None else (self.window,) * ndim
        pooled = pool_windows(x, size, self.samples)
        grid = tuple(pooled.shape[1:-1])
        parts = windows(grid, (self.samples,) * ndim, device=x.device)
        p = parts.split(pooled)
        if self.conv_pos is not None:  # inside each window
            p = self.conv_pos(p.reshape(p.shape[0], *(self.samples,) * ndim, dim)).flatten(1, -2)
        normed = self.norm1(p)
        around = self.attn.kv(self.norm1(x)).flatten(1, -2)
        bias = None
        if self.window is not None:
            index, real = neighbourhoods(tuple(sides), size, (self.reach,) * ndim, device=x.device)
            around = around.index_select(1, index.flatten()).reshape(batch * parts.number, index.shape[1], 2 * dim)
            if real is not None:
                absent = nn.functional.pad(KEY_MASK * (~real).to(x.dtype), (parts.length, 0))[:, None, None]
                bias = absent.expand(batch, *absent.shape).flatten(0, 1)
        (q,) = split_heads(self.attn.q(normed), self.attn.heads)
        k, v = split_heads(torch.cat([self.attn.kv(normed), around], 1), self.attn.heads, 2)
        y = self.scale1(self.attn.proj(merge_heads(attend(q, k, v, bias))))
        y = parts.join(p + self.drop_path(y) if self.shortcut else y, grid)
        return x, y + self.drop_path(self.scale2(self.mlp(self.norm2(y))))


class Gather(TokenUpdate):
    """Semantic tokens read themselves and the whole image (section 3.2): state -> state.

    `centre` is a learned table added to the queries and the residual alone (the paper's global cluster centre G). Time
    grows with semantic times image tokens.
    """

    def __init__(self, dim, heads, mlp_ratio, drop_path, eps=1e-5, centre: Positions | None = None):
        super().__init__(dim, heads, mlp_ratio, drop_path, eps)
        self.centre = centre

    def forward(self, state: State) -> State:
        x, t = state
        grid = tuple(t.shape[1:-1])
        tokens = t.flatten(1, -2)
        context = self.norm1(torch.cat([tokens, x.flatten(1, -2)], 1))
        if self.centre is not None:
            tokens = tokens + self.centre(grid)
        return x, self.after(tokens, self.attn(self.norm1(tokens), context)).reshape(t.shape)


class Refine(TokenUpdate):
    """Self-attention among semantic tokens, in windows of `local` per axis or over all (None): state -> state."""

    def __init__(self, dim, heads, mlp_ratio, drop_path, local: tuple[int, ...] | None, built=None):
        super().__init__(dim, heads, mlp_ratio, drop_path, 1e-5)
        self.local = local
        self.pos = None if built is None else SizedBias(local or built, heads)

    def forward(self, state: State) -> State:
        x, t = state
        size = self.local or tuple(t.shape[1:-1])
        bias = None if self.pos is None else self.pos(size).unsqueeze(0)
        y = self.norm1(t)
        if self.local is None:
            y = y.flatten(1, -2)
            return x, self.after(t, self.attn(y, y, bias).reshape(t.shape))
        parts = windows(tuple(t.shape[1:-1]), size, device=t.device)
        y = parts.split(y)
        return x, self.after(t, parts.join(self.attn(y, y, bias), t.shape[1:-1]))


class Recover(TokenUpdate):
    """Image tokens read the semantic ones (section 3.4): state -> (B, *S, C). Time grows as in `Gather`."""

    def forward(self, state: State) -> Tensor:
        x, t = state
        y = self.attn(self.norm1(x).flatten(1, -2), self.norm1(t).flatten(1, -2))
        return self.after(x, y.reshape(x.shape))


class Semantic(nn.Module):
    """Let the image tokens go: state -> (B, *T, C)."""

    def forward(self, state: State) -> Tensor:
        return state[1]


class STViTSwin(SwinTransformer):
    """Swin with semantic tokens in its third stage, `samples` per axis and window.

    `recover` True is STViT-R (Fig. 3): groups of six blocks, Swin (unshifted), generate, gather, refine locally, refine
    globally, recover. False is plain STViT: once generated, semantic tokens alone go through the rest of the stage,
    local and global in turn, and through the last stage; it has no dense version, and forward_intermediates gives the
    semantic maps as they are. `use_global`, `shortcut`, `relative_pos` and `use_conv_pos` are the official options.
    """

    OFFICIAL = (  # type: ignore[assignment]
        (r"^patch_embed\.(\d)\.conv\.", lambda m: f"patch_embed.proj.{2 * int(m[1])}.c."),
        (r"^patch_embed\.(\d)\.norm\.", lambda m: f"patch_embed.proj.{2 * int(m[1])}.bn."),
        (r"^stages\.2\.blocks\.2\.centre\.table$", "layers.2.semantic_token2"),
        (r"\.scale([12])\.gamma$", r".layer_scale_\1"),
        (r"\.conv_pos\.conv\.", ".conv_pos.proj.0."),
        (r"\.(\d+)\.pos\.table$", r".\1.attn.relative_position_bias_table"),
        *SwinTransformer.OFFICIAL,
    )

    def __init__(
        self,
        *,
        dim: int,
        heads: Sequence[int],
        window: int = 7,
        mlp_ratio: float = 4.0,
        img_size: int | Sequence[int] = 224,
        samples: int = 3,
        recover: bool = True,
        use_global: bool = False,
        shortcut: bool = False,
        relative_pos: bool = False,
        use_conv_pos: bool = False,
        **swin: Any,
    ):
        super().__init__(dim=dim, heads=heads, window=window, mlp_ratio=mlp_ratio, img_size=img_size, **swin)
        ndim, width = self.ndim, 4 * dim
        old = list(self.stages[2].blocks)
        if self.features_only and not recover:
            raise ValueError("plain STViT has no dense version (its image tokens are gone): use recover=True")
        if not 1 <= samples <= window:
            raise ValueError(f"samples must be in 1..{window} (the window), got {samples!r}")
        if (recover and len(old) % GROUP) or len(old) < 3:
            need = f"a multiple of {GROUP}" if recover else "at least 3"
            raise ValueError(f"the third stage needs {need} blocks, got {len(old)}")
        half = dim // 2
        self.patch_embed = nn.Sequential(  # type: ignore[assignment]
            ConvNorm(ndim, self.in_chans, half, 3, 2, act=nn.Hardswish),
            ConvNorm(ndim, half, dim, 3, 2, act=nn.Hardswish),
        )
        grid = tuple(samples * ((c + window - 1) // window) for c in built_grid(img_size, ndim, 16))
        blocks: list[nn.Module] = []
        for j, block in enumerate(old):
            common, step = (width, heads[2], mlp_ratio, block.drop_path.rate), j % GROUP if recover else j
            if step == 0:
                block.attn.shift = (0,) * ndim
                blocks.append(block)
            elif step == 1:
                options = dict(samples=samples, window=window, shortcut=shortcut, conv_pos=use_conv_pos)
                blocks.append(Generate(ndim, *common, **options))
            elif step == 2:
                blocks.append(Gather(*common, centre=Positions(width, grid) if use_global and j == 2 else None))
            elif step == GROUP - 1 and recover:
                blocks.append(Recover(*common, 1e-5))
            else:
                local = (samples,) * ndim if j % 2 else None
                blocks.append(Refine(*common, local, grid if relative_pos else None))
        self.stages[2].blocks = nn.ModuleList(blocks)
        if not recover:
            self.stages[2].norm = Semantic()
            reach = max(min(window, *((c + 1) // 2 for c in grid)), 1)  # the last stage's windows fit its smaller map
            for block in self.stages[3].blocks:
                block.attn = WindowAttention(ndim, 2 * width, heads[3], reach)
        self.init_weights()


class ToMap(nn.Module):
    """(tokens (B, N, C), grid) -> (B, *grid, C)."""

    def forward(self, state: tuple[Tensor, tuple[int, ...]]) -> Tensor:
        tokens, grid = state
        return tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


class ToTokens(nn.Module):
    """State -> (semantic tokens (B, T, C), their grid)."""

    def forward(self, state: State) -> tuple[Tensor, tuple[int, ...]]:
        return state[1].flatten(1, -2), tuple(state[1].shape[1:-1])


class STViTDeiT(DeiT):
    """Plain STViT on DeiT: `keep` ordinary blocks, two that make the semantic tokens (`samples` per axis from the whole
    map, a learned centre in the second), then ordinary blocks on those alone; the head reads their mean.

    There is no dense version; forward_intermediates gives semantic maps of `samples` per axis once they exist, though
    feature_info says the stride of the patches.
    """

    prefix, no_decay, pools = (), (), ("avg",)

    def __init__(self, *, dim: int, heads: int, mlp_ratio: float = 4.0, keep: int = 4, samples: int = 4, **vit: Any):
        super().__init__(dim=dim, heads=heads, mlp_ratio=mlp_ratio, **({"global_pool": "avg"} | vit))
        if self.features_only:
            raise ValueError("plain STViT has no dense version (its image tokens are gone)")
        if samples < 1 or not 0 <= keep <= len(self.stages) - 2:
            raise ValueError(f"needs samples >= 1 and two blocks after keep, got {samples!r} and {keep!r}")
        rates = [self.stages[i].blocks[0].drop_path.rate for i in (keep, keep + 1)]
        generate = Generate(self.ndim, dim, heads, mlp_ratio, rates[0], 1e-6, samples=samples)
        centre = Positions(dim, (samples,) * self.ndim)
        gather = Gather(dim, heads, mlp_ratio, rates[1], 1e-6, centre)
        self.stages[keep], self.stages[keep + 1] = Stage([generate], down=ToMap()), Stage([gather], norm=ToTokens())
        self.init_weights()

    def to_map(self, state: Any, index: int) -> Tensor:
        tokens, grid = state
        return grid if isinstance(grid, Tensor) else tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])


_HUB = "https://huggingface.co/csncsn/STViT-R/resolve/main/STViT-R-Swin-{}.pth"
_TINY, _DEEP = (2, 2, 6, 2), (2, 2, 18, 2)


def _swin(dim: int, depths, drop_path: float, params: float, file: str = "", plain: bool = False, **figures) -> Variant:
    config = dict(dim=dim, depths=depths, heads=tuple(dim // 32 * 2**i for i in range(4)))
    config |= dict(recover=False, samples=4) if plain else {}
    weights = Weights(_HUB.format(file), "MIT", "direct") if file else Weights()
    return Variant(config, dict(params_m=params, drop_path=drop_path) | figures, weights=weights)


def _deit(dim: int, heads: int, params: float) -> Variant:
    config = dict(model=STViTDeiT, patch=16, dim=dim, depth=12, heads=heads)
    return Variant(config, dict(params_m=params, drop_path=0.1), Inputs(224))


FAMILY = Family(
    name="stvit",
    model=STViTSwin,
    paper="Making Vision Transformers Efficient from A Token Sparsification View",
    venue="CVPR 2023",
    arxiv="2303.08685",
    code="github.com/changsn/STViT-R",
    licence="MIT",
    # STViT-R: counts as the authors' logs print them, gmacs as counted, cascade AP of the detection repository (Cascade
    # Mask R-CNN 3x). The plain ones were never released: counts are of this code, accuracy is the paper's to show.
    variants={
        "stvit_r_swin_tiny": _swin(96, _TINY, 0.2, 28.320, gmacs=3.60),
        "stvit_r_swin_small": _swin(
            96, _DEEP, 0.3, 49.626, "S", gmacs=5.80, top1=82.7, cascade_box_ap=51.8, cascade_mask_ap=44.7
        ),
        "stvit_r_swin_base": _swin(
            128, _DEEP, 0.4, 87.812, "B", gmacs=10.23, top1=83.2, cascade_box_ap=52.2, cascade_mask_ap=45.2
        ),
        "stvit_swin_tiny": _swin(96, _TINY, 0.2, 28.314, plain=True),
        "stvit_swin_small": _swin(96, _DEEP, 0.3, 49.617, plain=True),
        "stvit_swin_base": _swin(128, _DEEP, 0.4, 87.801, plain=True),
        "stvit_deit_tiny": _deit(192, 3, 5.721),
        "stvit_deit_small": _deit(384, 6, 22.058),
        "stvit_deit_base": _deit(768, 12, 86.581),
    },
)
