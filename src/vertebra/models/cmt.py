"""CMT: Convolutional Neural Networks Meet Vision Transformers (CVPR 2022, arXiv 2107.06263). Code by the first author:
github.com/ggjy/CMT.pytorch, MIT.

A pyramid whose blocks begin with a depthwise convolution (local perception unit), attend with keys and values that a
strided depthwise convolution made fewer, and end in an inverted residual MLP with another depthwise convolution.

Unusual here: activations come before batch norms, in the stem and in the MLP; the bias of attention is one learned
table of queries by keys per stage, shared by its blocks, so its shape belongs to the size the model is built for: on
another map it is resampled over the places of the keys, then over those of the queries. Head widths such as 46 are as
published.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import (
    BatchNorm,
    Block,
    Conv,
    ConvNorm,
    Linear,
    PatchEmbed,
    ResidualConv,
    attend,
    check_heads,
    drop_path_rates,
    merge_heads,
    ntuple,
    resize,
    split_heads,
)  # fmt: skip
from ..layers.cached import tracing
from ..registry import Family, Inputs, Variant, Weights

EPS, NECK = 1e-6, 1280
State = tuple[Tensor, Tensor]  # map (B, *S, C), the stage's bias (1, heads, N, M)


class SharedBias(nn.Module):
    """One bias per head, query and key of a map of `grid` (section 3.2, eq. 4): sides -> (1, heads, N, M).

    Keys are `ratio` times fewer per axis, so the table has heads * N^2 / ratio^ndim numbers.
    """

    no_decay = ("table",)

    def __init__(self, grid: Sequence[int], heads: int, ratio: int):
        super().__init__()
        self.grid, self.ratio = tuple(grid), ratio
        self.keys = tuple(max(s // ratio, 1) for s in grid)
        self.table = nn.Parameter(torch.randn(heads, math.prod(self.grid), math.prod(self.keys)))

    def forward(self, sides: Sequence[int]) -> Tensor:
        if not tracing() and tuple(sides) == self.grid:
            return self.table.unsqueeze(0)
        return self._resampled(self.table, self.grid, self.keys, sides, [s // self.ratio for s in sides]).unsqueeze(0)

    @staticmethod
    def _resampled(table: Tensor, grid, keys, sides, fewer) -> Tensor:
        heads = table.shape[0]
        cells = resize(table.float().reshape(-1, *keys, 1), tuple(fewer), "cubic")
        rows = resize(cells.reshape(heads, *grid, math.prod(fewer)), tuple(sides), "cubic")
        return rows.flatten(1, -2).to(table.dtype)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table of another (cubic) map, resampled to this one; None where it cannot be."""
        ndim = len(self.grid)
        if tensor.ndim != 3 or tensor.shape[0] != self.table.shape[0]:
            return None
        side, fewer = (round(n ** (1 / ndim)) for n in tensor.shape[1:])
        if side**ndim != tensor.shape[1] or fewer**ndim != tensor.shape[2]:
            return None
        return self._resampled(tensor, (side,) * ndim, (fewer,) * ndim, self.grid, self.keys)


class LightAttention(nn.Module):
    """Lightweight attention (section 3.2, eq. 3 and 4): map (B, *S, C) and bias (1, heads, N, M) -> (B, *S, C).

    Keys and values come from a depthwise convolution of kernel and stride `ratio`. Time N^2 / ratio^ndim.
    """

    def __init__(self, ndim: int, dim: int, heads: int, ratio: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.q, self.k, self.v, self.proj = (Linear(dim, dim) for _ in range(4))
        self.sr = ConvNorm(ndim, dim, dim, ratio, ratio, padding=0, groups=dim, bias=True) if ratio > 1 else None

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = x if self.sr is None else self.sr(x)
        q, k, v = (split_heads(t.flatten(1, -2), self.heads)[0] for t in (self.q(x), self.k(y), self.v(y)))
        return self.proj(merge_heads(attend(q, k, v, bias)).reshape(x.shape))


class InvertedMlp(nn.Module):
    """Inverted residual feed-forward (section 3.3, eq. 5): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int, hidden: int):
        super().__init__()
        self.conv1 = ConvNorm(ndim, dim, hidden, act=nn.GELU, act_first=True, bias=True)
        self.local, self.norm = ResidualConv(ndim, hidden), BatchNorm(hidden)
        self.conv2 = ConvNorm(ndim, hidden, dim, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm(F.gelu(self.local(self.conv1(x)))))


class CMTBlock(Block):
    """Local perception unit, attention, feed-forward (Fig. 2c): state -> state."""

    def forward(self, state: State) -> State:
        x, bias = self.position(state[0]), state[1]
        x = x + self.drop_path(self.attn(self.norm1(x), bias))
        return x + self.drop_path(self.mlp(self.norm2(x))), bias


class Entry(nn.Module):
    """2x2 patch embedding, and the bias that the stage's blocks share."""

    def __init__(self, embed: PatchEmbed, bias: SharedBias):
        super().__init__()
        self.embed, self.bias = embed, bias

    def forward(self, state: State | Tensor) -> State:
        x = self.embed(state[0] if isinstance(state, tuple) else state)
        return x, self.bias(x.shape[1:-1])


def _letter(match) -> str:
    return "abcdefgh"[int(match[1])]


class CMT(Backbone):
    """A stem at stride 2, then four stages at strides 4 to 32 (Fig. 2b). `img_size` is what tables are built for."""

    OFFICIAL = (
        (r"^patch_embed\.(\d)\.conv\.", lambda m: f"stem_conv{int(m[1]) + 1}."),
        (r"^patch_embed\.(\d)\.norm\.", lambda m: f"stem_norm{int(m[1]) + 1}."),
        (r"^stages\.(\d)\.down\.embed\.", lambda m: f"patch_embed_{_letter(m)}."),
        (r"^stages\.(\d)\.down\.bias\.table$", lambda m: f"relative_pos_{_letter(m)}"),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"blocks_{_letter(m)}."),
        (r"\.position\.conv\.", ".proj."),
        (r"\.attn\.sr\.conv\.", ".attn.sr.0."),
        (r"\.attn\.sr\.norm\.", ".attn.sr.1."),
        (r"\.mlp\.local\.conv\.", ".mlp.proj."),
        (r"\.mlp\.norm\.", ".mlp.proj_bn."),
        (r"\.mlp\.conv1\.(conv|norm)\.", lambda m: f".mlp.conv1.{2 * (m[1] == 'norm')}."),
        (r"\.mlp\.conv2\.(conv|norm)\.", lambda m: f".mlp.conv2.{int(m[1] == 'norm')}."),
        (r"^neck\.conv\.", "_fc."),
        (r"^neck\.norm\.", "_bn."),
    )

    def __init__(
        self,
        *,
        stem: int,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 4.0,
        ratios: Sequence[int] = (8, 4, 2, 1),
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        sides = ntuple(img_size, ndim, "img_size")
        if min(sides) < 32:
            raise ValueError(f"img_size must be at least 32 per side, got {img_size!r}")
        steps = [(self.in_chans, 2), (stem, 1), (stem, 1)]
        self.patch_embed = nn.Sequential(
            *(ConvNorm(ndim, dim, stem, 3, stride, act=nn.GELU, act_first=True, bias=True) for dim, stride in steps)
        )
        self.stages, grid = nn.ModuleList(), tuple((s + 1) // 2 for s in sides)
        for i, dim in enumerate(dims):
            grid = tuple(s // 2 for s in grid)
            blocks = []
            for rate in rates[i]:
                attn, mlp = LightAttention(ndim, dim, heads[i], ratios[i]), InvertedMlp(ndim, dim, int(dim * mlp_ratio))
                blocks.append(CMTBlock(dim, attn, mlp, rate, EPS, position=ResidualConv(ndim, dim)))
            embed = PatchEmbed(ndim, dims[i - 1] if i else stem, dim, 2, norm=nn.LayerNorm(dim))
            self.stages.append(Stage(blocks, down=Entry(embed, SharedBias(grid, heads[i], ratios[i]))))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.neck = ConvNorm(ndim, dims[-1], NECK, act=nn.SiLU, bias=True)
        self.make_head(NECK)
        self.init_weights()

    def init_weights(self) -> None:
        super().init_weights()
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]

    def finish(self, state: State) -> Tensor:
        return state[0]

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


_URL = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1"


def _variant(file, stem, dim, depths, ratio, drop_path, size, params, gmacs, top1, **more) -> Variant:
    config = dict(stem=stem, dims=tuple(dim * 2**i for i in range(4)), depths=depths, mlp_ratio=ratio)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | more
    return Variant(config, figures, Inputs(size), Weights(f"{_URL}/{file}.pth", "MIT", "direct"))


FAMILY = Family(
    name="cmt",
    model=CMT,
    paper="CMT: Convolutional Neural Networks Meet Vision Transformers",
    venue="CVPR 2022",
    arxiv="2107.06263",
    code="github.com/ggjy/CMT.pytorch",
    licence="MIT",
    # params_m, gmacs and top1 of the paper, each at its own size (small: counted, 25.1 is printed); head dropout of the
    # recipe: 0.1, base 0.3
    variants={
        "cmt_ti": _variant("cmt_tiny", 16, 46, (2, 2, 10, 2), 3.6, 0.1, 160, 9.5, 0.6, 79.2, top1_code=79.0),
        "cmt_xs": _variant("cmt_xs", 16, 52, (3, 3, 12, 3), 3.77, 0.08, 192, 15.2, 1.5, 81.8),
        "cmt_s": _variant("cmt_small", 32, 64, (3, 3, 16, 3), 4, 0.1, 224, 26.26, 4.0, 83.5, ap=44.3),
        "cmt_b": _variant("cmt_base", 38, 76, (4, 4, 20, 4), 4, 0.25, 256, 45.7, 9.3, 84.5),
    },
)
