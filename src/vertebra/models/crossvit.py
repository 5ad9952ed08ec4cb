"""CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification (ICCV 2021, arXiv 2103.14899).
Official code: github.com/IBM/CrossViT, Apache-2.0.

Two vision transformers read the image at two patch sizes, a shallow narrow one with patches of 12 and a deep wide one
with patches of 16. After each stage the class token of either branch looks once at the patches of the other branch, so
that the scales meet at a cost linear in the number of patches.

Unusual here: each branch resizes the image to its own square (240 and 224, bicubic), so the cost of classification does
not depend on the input; the exchanged class token replaces the old one, nothing is added; the projections of class
tokens are norm, GELU, linear, in that order; the exchange has no MLP; logits are the mean of both heads'. The paper has
no dense version: here it lets the image keep its size, and its maps are the large branch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import (
    Attention,
    Block,
    Conv,
    DropPath,
    Linear,
    Mlp,
    PatchEmbed,
    Positions,
    attend,
    check_heads,
    drop_path_rates,
    merge_heads,
    ntuple,
    pad_to,
    resize,
    split_heads,
)
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6
PATCHES = (12, 16)  # of the small and the large branch
State = tuple[Tensor, Tensor, tuple[int, ...]]  # tokens (B, 1 + N, C) of both branches, grid of the large branch


class ConvStem(nn.Module):
    """Three convolutions in place of one patch projection (the dagger models): (B, *S, dim) -> (B, *S / patch, out).

    Strides 4, 3, 1 make patches of 12, strides 4, 2, 2 patches of 16.
    """

    def __init__(self, ndim: int, dim: int, out: int, patch: int):
        super().__init__()
        (stride, padding), last = ((3, 0), 1) if patch == 12 else ((2, 1), 2)
        self.proj = nn.Sequential(
            Conv(ndim, dim, out // 4, 7, 4),
            nn.ReLU(),
            Conv(ndim, out // 4, out // 2, 3, stride, padding),
            nn.ReLU(),
            Conv(ndim, out // 2, out, 3, last),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ClassAttention(nn.Module):
    """The first token reads all tokens, itself included (eq. 4, Fig. 4): (B, 1 + N, C) -> (B, 1, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.wq, self.wk, self.wv, self.proj = (Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(part, self.heads)[0] for part in (self.wq(x[:, :1]), self.wk(x), self.wv(x)))
        return self.proj(merge_heads(attend(q, k, v)))


class Exchange(nn.Module):
    """The class token of one branch, width `dim`, visits the patches of the other, width `other` (eq. 3-5).

    (B, 1, dim), (B, N, other) -> the new class token (B, 1, dim): projected, attention with a residual, projected back.
    """

    def __init__(self, dim: int, other: int, heads: int, drop_path: float):
        super().__init__()
        self.there, self.back = self._project(dim, other), self._project(other, dim)
        self.norm1, self.attn = nn.LayerNorm(other, eps=EPS), ClassAttention(other, heads)
        self.drop_path = DropPath(drop_path)

    @staticmethod
    def _project(dim: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(dim, eps=EPS), nn.GELU(), Linear(dim, out))

    def forward(self, token: Tensor, patches: Tensor) -> Tensor:
        x = torch.cat([self.there(token), patches], 1)
        return self.back(x[:, :1] + self.drop_path(self.attn(self.norm1(x))))


class MultiScaleBlock(nn.Module):
    """Both branches' own blocks, then the exchange both ways from the tokens as they then are (Fig. 2)."""

    def __init__(self, dims, depths, heads: int, mlp_ratio: float, rates: Sequence[float]):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(dim, Attention(dim, heads), Mlp(dim, int(dim * mlp_ratio)), rates[j], EPS)
                    for j in range(depth)
                )
            )
            for dim, depth in zip(dims, depths, strict=True)
        )
        self.exchanges = nn.ModuleList(Exchange(dims[i], dims[1 - i], heads, rates[-1]) for i in (0, 1))

    def forward(self, state: State) -> State:
        x = [branch(tokens) for branch, tokens in zip(self.branches, state[:2], strict=True)]
        new = [self.exchanges[i](x[i][:, :1], x[1 - i][:, 1:]) for i in (0, 1)]
        small, large = (torch.cat([token, tokens[:, 1:]], 1) for token, tokens in zip(new, x, strict=True))
        return small, large, state[2]


class CrossViT(Backbone):
    """Three stages of two branches (Fig. 2); pairs are (small, large). forward_features gives the normed tokens of the
    large and of the small branch, forward_outputs also each branch's own logits.

    `img_size` is the image that the small branch reads (240); the large one reads 14/15 of it, both rounded to whole
    patches. A classifier squashes any input to these squares. With features_only the image keeps its size: the large
    branch pads it to whole patches, the small one resizes it in the built proportion, and tables are resampled. On an
    input of the large branch's own size both ways are the same.
    """

    tokens = True
    OFFICIAL = (
        (r"^pos_embed\.(\d)\.table$", r"pos_embed.\1"),
        (r"^stages\.(\d+)\.blocks\.0\.", r"blocks.\1."),
        (r"\.branches\.", ".blocks."),
        (r"\.exchanges\.(\d)\.there\.", r".projs.\1."),
        (r"\.exchanges\.(\d)\.back\.", r".revert_projs.\1."),
        (r"\.exchanges\.", ".fusion."),
    )
    no_decay = ("cls_token.0", "cls_token.1")

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: int,
        mlp_ratio: float = 4.0,
        conv_stem: bool = False,
        stage_count: int = 3,
        img_size: int | Sequence[int] = 240,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if len(dims) != 2 or len(depths) != 2 or min(depths) < 1:
            raise ValueError(f"dims and depths are pairs (small, large) of at least 1, got {dims} and {depths}")
        sides = ntuple(img_size, ndim, "img_size")
        if min(sides) < 1:
            raise ValueError(f"img_size must be positive, got {img_size!r}")
        # cells per branch and axis: 240 pixels give 20 and 14, 408 give 34 and 24
        self.grids = tuple(max((s + 6) // 12, 1) for s in sides), tuple(max((7 * s + 60) // 120, 1) for s in sides)
        self.patch_embed = nn.ModuleList(
            ConvStem(ndim, in_chans, dim, p) if conv_stem else PatchEmbed(ndim, in_chans, dim, p)
            for dim, p in zip(dims, PATCHES, strict=True)
        )
        self.cls_token = nn.ParameterList(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02) for dim in dims)
        self.pos_embed = nn.ModuleList(Positions(dim, grid, 1) for dim, grid in zip(dims, self.grids, strict=True))
        rates = drop_path_rates(drop_path_rate, [max(depths)] * stage_count)
        self.stages = nn.ModuleList(Stage([MultiScaleBlock(dims, depths, heads, mlp_ratio, r)]) for r in rates)
        self.dims = tuple(dims)
        self.describe([dims[1]] * stage_count, [PATCHES[1]] * stage_count)
        if not self.features_only:
            self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in dims)
        self.make_head(sum(dims))
        self.init_weights()

    def _new_head(self) -> nn.Module:
        """One linear head per branch."""
        heads = [Linear(dim, self.num_classes) if self.num_classes else nn.Identity() for dim in self.dims]
        for head in heads if self.num_classes else ():
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return nn.ModuleList(heads)

    def _images(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image as the small and as the large branch reads it."""
        grids, large = self.grids, x
        if self.features_only:
            large = pad_to(x, PATCHES[1])
            cells = tuple(s // PATCHES[1] for s in large.shape[1:-1])
            # as many small cells for a large one as in the built pair, rounded
            grids = tuple((2 * c * a + b) // (2 * b) for c, a, b in zip(cells, *self.grids, strict=True)), cells
        else:
            large = resize(x, [PATCHES[1] * c for c in grids[1]], "cubic")
        return resize(x, [PATCHES[0] * c for c in grids[0]], "cubic"), large

    def embed(self, x: Tensor) -> State:
        tokens, grid = [], ()
        for i, image in enumerate(self._images(x)):
            patches = self.patch_embed[i](image)
            grid = tuple(patches.shape[1:-1])
            token = self.cls_token[i].expand(patches.shape[0], -1, -1)
            tokens.append(torch.cat([token, patches.flatten(1, -2)], 1) + self.pos_embed[i](grid))
        return tokens[0], tokens[1], grid

    def to_map(self, state: State, index: int) -> Tensor:
        _, large, grid = state
        return large[:, 1:].reshape(large.shape[0], *grid, large.shape[-1])

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        return self.norm[1](state[1]), self.norm[0](state[0])

    def pre_logits(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """Both class tokens, the small branch's first."""
        return torch.cat([features[1][:, 0], features[0][:, 0]], -1)

    def outputs(self, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        if not self.num_classes:
            return {"logits": self.pre_logits(features)}
        small, large = self.head[0](features[1][:, 0]), self.head[1](features[0][:, 0])
        return {"logits": (small + large) / 2, "small_logits": small, "large_logits": large}


_RELEASES = "https://github.com/IBM/CrossViT/releases/download/weights-0.1"
# size: widths, depth of the large branch, heads, MLP ratio
_SIZES = {
    "tiny": ((96, 192), 4, 3, 4),
    "small": ((192, 384), 4, 6, 4),
    "base": ((384, 768), 4, 12, 4),
    "9": ((128, 256), 3, 4, 3),
    "15": ((192, 384), 5, 6, 3),
    "18": ((224, 448), 6, 7, 3),
}
# params_m as counted (exact for the files; the paper prints up to 0.3 less), gmacs and top1_timm as timm measured them,
# top1 of the paper
_TABLE: dict[str, tuple[float, float | None, float, float]] = {
    "crossvit_tiny_224": (7.015, 1.57, 73.4, 73.35),
    "crossvit_small_224": (26.856, 5.63, 81.0, 81.04),
    "crossvit_base_224": (105.03, 21.22, 82.2, 82.21),
    "crossvit_9_224": (8.553, 1.85, 73.9, 73.99),
    "crossvit_15_224": (27.53, 5.81, 81.5, 81.52),
    "crossvit_18_224": (43.27, 9.05, 82.5, 82.39),
    "crossvit_9_dagger_224": (8.777, 1.99, 77.1, 76.99),
    "crossvit_15_dagger_224": (28.209, 6.13, 82.3, 82.30),
    "crossvit_18_dagger_224": (44.27, 9.50, 82.8, 82.49),
    "crossvit_15_dagger_384": (28.50, 21.4, 83.5, 83.84),
    "crossvit_18_dagger_384": (44.61, 32.4, 83.9, 84.20),
}


def _variant(name: str, params: float, gmacs: float | None, top1: float, measured: float) -> Variant:
    dims, depth, heads, ratio = _SIZES[name.split("_")[1]]
    config = dict(dims=dims, depths=(1, depth), heads=heads, mlp_ratio=ratio, conv_stem="dagger" in name)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, top1_timm=measured, drop_path=0.1)
    # the names have the large branch's size; images come at the small branch's
    inputs = Inputs(408, crop=1.0) if name.endswith("384") else Inputs(240)
    return Variant(config, figures, inputs, Weights(f"{_RELEASES}/{name}.pth", "Apache-2.0", "direct"))


FAMILY = Family(
    name="crossvit",
    model=CrossViT,
    paper="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    venue="ICCV 2021",
    arxiv="2103.14899",
    code="github.com/IBM/CrossViT",
    licence="Apache-2.0",
    variants={name: _variant(name, *row) for name, row in _TABLE.items()},
)
