"""DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion (SDM 2024, arXiv 2309.12424).

No official code, checkpoint or other implementation is known: this is built in the manner of the paper from its prose,
and nothing can prove that the numbers are the authors'. Where a verified model is wanted, take LightViT, whose stem,
merging, bi-dimensional attention and head the paper reuses (their names here are LightViT's).

Image tokens meet position-aware global tokens, one per cell of a 7x7 grid. A convolutional encoder gives local
features; they are reduced step by step to the grid, attend to each other there, enrich the global tokens cell by cell,
and the result is broadcast to every image token.

What the prose leaves open was fitted to its figures (parameters, GMACs, differences in its ablations) or chosen.
Fitted: widths and depths (LightViT-T's for S), MLP on the image tokens only, dense 3x3 convolutions in the reduction,
no output projection in the aggregation, one projection after the fusion. Chosen: alpha weighs the tokens' MLP and
1 - alpha the image; norms where LightViT has them, also on the dense version's outputs; drop path on the image's
branches; the head reads image tokens only; the reduced map is resized linearly where it is not the grid's size; odd
maps are averaged over the cells that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Stage
from ..layers import (
    Conv,
    DropPath,
    Linear,
    attend,
    check_heads,
    drop_path_rates,
    mean_pool,
    merge_heads,
    resize,
    split_heads,
)
from ..mixers import WindowAttention
from ..registry import Family, Variant
from .lightvit import BiDimensionalMlp, Merge, Pyramid, State, Stem


class ConvEncoder(nn.Module):
    """ConvNeXt block (section 3.2): depthwise k, norm, expansion by 4, with a shortcut: (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int, kernel: int):
        super().__init__()
        self.conv, self.norm = Conv(ndim, dim, dim, kernel, groups=dim), nn.LayerNorm(dim, eps=1e-6)
        self.fc1, self.fc2 = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(self.conv(x)))))


class WindowEncoder(WindowAttention):
    """The ablation's local part: window attention with a shortcut: (B, *S, C) -> (B, *S, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Reduction(nn.Module):
    """Step-wise downsampling (section 3.2): (B, *S, C) -> (B, *ceil(S / 2^(steps + 1)), C).

    Halve, then `steps` times convolve and halve; with `stepwise` False one pooling (the ablation).
    """

    def __init__(self, ndim: int, dim: int, steps: int, stepwise: bool):
        super().__init__()
        self.first = 2 if stepwise else 2 ** (steps + 1)
        self.convs = nn.ModuleList(Conv(ndim, dim, dim, 3) for _ in range(steps if stepwise else 0))

    def forward(self, x: Tensor) -> Tensor:
        x = mean_pool(x, self.first)
        for conv in self.convs:
            x = mean_pool(conv(x), 2)
        return x


class MixMlp(nn.Module):
    """A linear map over the tokens, GELU, one over the channels: (B, T, C) -> (B, T, C), T fixed."""

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.tokens, self.channels = Linear(tokens, tokens), Linear(dim, dim)

    def forward(self, g: Tensor) -> Tensor:
        return self.channels(F.gelu(self.tokens(g.transpose(1, 2)).transpose(1, 2)))


class WeightedSum(nn.Module):
    """Position-aware enrichment (section 3.2): alpha MLP(G) + (1 - alpha) A, both (B, T, C), cell by cell."""

    def __init__(self, tokens: int, dim: int, kind: str, alpha: float):
        super().__init__()
        plain = lambda: nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, dim))  # noqa: E731
        self.mlp, self.alpha = MixMlp(tokens, dim) if kind == "mix" else plain(), alpha

    def forward(self, g: Tensor, gathered: Tensor) -> Tensor:
        return self.alpha * self.mlp(g) + (1 - self.alpha) * gathered


class AttentionFusion(nn.Module):
    """The ablation's ordinary tokens: G (B, T, C) gathers from A (B, cells, C) by attention -> (B, T, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)

    def forward(self, g: Tensor, gathered: Tensor) -> Tensor:
        (q,), (k, v) = split_heads(self.q(g), self.heads), split_heads(self.kv(gathered), self.heads, 2)
        return self.proj(merge_heads(attend(q, k, v)))


class DualTokenAttention(nn.Module):
    """Attention of the dual token block (Fig. 3): map (B, *S, C), tokens (B, T, C) or None -> the same.

    Encode locally, reduce to the grid, gather there, enrich the tokens, broadcast them to every position, fuse. Without
    `encoder` (the last stage, which is at the grid's size already) the map itself is what gathers and nothing is fused.
    """

    def __init__(self, dim: int, heads: int, grid: Sequence[int], encoder, reduction, enrich):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.grid = heads, tuple(grid)
        self.encoder, self.reduction, self.enrich = encoder, reduction, enrich
        self.qkv, self.q = Linear(dim, 3 * dim), Linear(dim, dim)
        self.kv, self.proj = Linear(dim, 2 * dim), Linear(dim, dim)

    def forward(self, x: Tensor, g: Tensor | None) -> State:
        local = x if self.encoder is None else self.encoder(x)
        reduced = local if self.reduction is None else self.reduction(local)
        cells = resize(reduced, self.grid).flatten(1, -2)
        gathered = merge_heads(attend(*split_heads(self.qkv(cells), self.heads, 3)))
        fresh = gathered if g is None else self.enrich(g, gathered)
        queries = split_heads(self.q(x.flatten(1, -2)), self.heads)
        y = merge_heads(attend(*queries, *split_heads(self.kv(fresh), self.heads, 2))).reshape(x.shape)
        return self.proj(y if self.encoder is None else local + y), None if g is None else g + fresh


class Block(nn.Module):
    """Dual token block (Fig. 2): attention over map and tokens, then LightViT's MLP over the map alone."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attn, BiDimensionalMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, state: State) -> State:
        x, g = state
        y, g = self.attn(self.norm1(x), g)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))[0]), g


class DualTokenViT(Pyramid):
    """Three stages at strides 8, 16 and 32, with the switches of the paper's ablations.

    tokens: None for position-aware tokens (one per cell of a grid with `grid` cells per axis), 0 for none, n for n
    ordinary ones fused by attention. token_mlp: "plain" or "mix". kernels: of the encoder per stage, 0 for none; steps:
    convolutions in the reduction per stage. encoder: "conv" or "window". stepwise False: one pooling.
    """

    no_decay = ("global_token",)

    def __init__(
        self, *, dims: Sequence[int], depths: Sequence[int], heads: Sequence[int],
        mlp_ratios: Sequence[float] = (8, 4, 4),
        token_mlp: str = "mix", tokens: int | None = None, grid: int = 7, alpha: float = 0.1,
        kernels: Sequence[int] = (5, 7, 0), steps: Sequence[int] = (1, 0, 0), stepwise: bool = True,
        encoder: str = "conv", neck: int = 1280, drop_path_rate: float = 0.0, **contract: Any,
    ):  # fmt: skip
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if token_mlp not in ("plain", "mix"):
            raise ValueError(f"token_mlp must be one of plain, mix, got {token_mlp!r}")
        if encoder not in ("conv", "window"):
            raise ValueError(f"encoder must be one of conv, window, got {encoder!r}")
        count = grid**ndim if tokens is None else tokens
        self.patch_embed = Stem(ndim, in_chans, dims[0])
        self.global_token = None
        if count:
            self.global_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, count, dims[0]), std=0.02))

        def attention(i: int) -> DualTokenAttention:
            dim, local, reduction, enrich = dims[i], None, None, None
            if kernels[i]:
                local = (
                    ConvEncoder(ndim, dim, kernels[i])
                    if encoder == "conv"
                    else WindowEncoder(ndim, dim, heads[i], mask_keys=True)
                )
                reduction = Reduction(ndim, dim, steps[i], stepwise)
            if count:
                enrich = WeightedSum(count, dim, token_mlp, alpha) if tokens is None else AttentionFusion(dim, heads[i])
            return DualTokenAttention(dim, heads[i], (grid,) * ndim, local, reduction, enrich)

        self.stages, rates = nn.ModuleList(), drop_path_rates(drop_path_rate, depths)
        for i, dim in enumerate(dims):
            blocks = [Block(dim, attention(i), mlp_ratios[i], rate) for rate in rates[i]]
            self.stages.append(Stage(blocks, down=Merge(ndim, dims[i - 1], dim, tokens=count > 0) if i else None))
        self._ends(dims, neck)

    def embed(self, x: Tensor) -> State:
        g = self.global_token
        return self.patch_embed(x), None if g is None else g.expand(x.shape[0], -1, -1)

    def finish(self, state: State) -> Tensor:
        return self.norm(state[0])

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


_S = dict(dims=(64, 128, 256), depths=(2, 6, 6), heads=(2, 4, 8))
_MINI = dict(dims=(48, 96, 192), depths=(2, 6, 4), heads=(2, 3, 6))

FAMILY = Family(
    name="dualtoken_vit",
    model=DualTokenViT,
    paper="DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion",
    venue="SDM 2024",
    arxiv="2309.12424",
    code="none",
    licence="none",
    # gmacs and top1 from the paper's prose; params_m as reported of it, which could not be checked against the tables;
    # box/mask AP: COCO Mask R-CNN 1x. Widths and depths are fitted: counted 5.81 M / 0.52 G, 11.38 / 1.01, 11.85 / 1.03
    variants={
        "dualtoken_vit_mini": Variant(_MINI, dict(params_m=5.8, gmacs=0.5, top1=75.4)),
        "dualtoken_vit_s_mix": Variant(_S, dict(params_m=11.4, gmacs=1.0, top1=79.4)),
        "dualtoken_vit_s": Variant(
            _S | dict(token_mlp="plain"), dict(params_m=11.9, top1=79.5, box_ap=41.1, mask_ap=38.1)
        ),
    },
)
