"""T2T-ViT: Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet (ICCV 2021, arXiv 2101.11986).
Official code: github.com/yitu-opensource/T2T-ViT, Clear BSD.

A plain ViT cuts the image into patches that know nothing of their neighbours. Here tokens are made in steps: a small
transformer or Performer layer, then overlapping windows of its map joined into fewer, longer tokens. A deep, narrow
encoder with a class token follows.

Unusual here: in a tokens-to-token layer the residual is the value, as the width changes; the Performer's projection is
ordered key, query, value and has no scale, the transformer's scale is (input width)^-0.5. The table of positions (sines
and cosines over the running number of a token) and the Performer's features are stored, not trained. The Performer
layers have dropout 0.1 in training whatever the options. The official code is for squares of 16; here the grid is what
the windows give, and the table is resampled for it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layers import Attention, Linear, Mlp, Positions, TokenBlock, attend, unfold
from ..mixers import PerformerAttention
from ..registry import Family, Inputs, Variant, Weights
from .vit import VisionTransformer

WIDTH = 64  # of the tokens-to-token layers


class ValueAttention(nn.Module):
    """One head of softmax attention that changes the width, added to its values: (B, *S, dim) -> (B, *S, width)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.scale = dim**-0.5
        self.qkv, self.proj = Linear(dim, 3 * width, bias=False), Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(1, -2).unsqueeze(1)).chunk(3, -1)
        y = v + self.proj(attend(q, k, v, scale=self.scale))
        return y.reshape(*x.shape[:-1], -1)


class TokenLayer(nn.Module):
    """A layer of the tokens-to-token module (eq. 2): (B, *S, dim) -> (B, *S, WIDTH)."""

    def __init__(self, dim: int, attn: nn.Module, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.norm2, self.mlp, self.drop = nn.LayerNorm(WIDTH), Mlp(WIDTH, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.drop(self.mlp(self.norm2(x)))


def transformer_layer(dim: int) -> TokenLayer:
    """The layer of T2T-ViT_t: softmax over all pairs, so its time is quadratic in the tokens of a large map."""
    return TokenLayer(dim, ValueAttention(dim, WIDTH))


def performer_layer(dim: int) -> TokenLayer:
    """The layer of T2T-ViT: linear in the tokens."""
    return TokenLayer(dim, PerformerAttention(dim, width=WIDTH, value_residual=True, dropout=0.1), dropout=0.1)


class TokensToToken(nn.Module):
    """Soft splits and layers in turn (Fig. 3, eq. 1 to 4): (B, *S, in_chans) -> (B, *S / 16, dim).

    A soft split joins the cells of each window of 7, 3, 3 at a stride of 4, 2, 2 into one token.
    """

    def __init__(self, ndim: int, in_chans: int, dim: int, layer):
        super().__init__()
        longer = WIDTH * 3**ndim
        self.attention1, self.attention2 = layer(in_chans * 7**ndim), layer(longer)
        self.project = Linear(longer, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention1(unfold(x, 7, 4, 2))
        x = self.attention2(unfold(x, 3, 2, 1))
        return self.project(unfold(x, 3, 2, 1))


def sinusoid(length: int, dim: int) -> Tensor:
    """(length, dim): sine in even columns, cosine in odd ones, of row / 10000^(2 floor(column / 2) / dim)."""
    cpu = torch.device("cpu")  # whatever the default: arithmetic on the meta device imports for seconds
    row, pair = torch.arange(length, device=cpu).double(), torch.arange((dim + 1) // 2, device=cpu).double()
    angle = row[:, None] / 10000 ** (2 * pair / dim)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :dim].float()


class T2TViT(VisionTransformer):
    """Tokens-to-token module with Performer layers, then the encoder (Fig. 4)."""

    layer: ClassVar = staticmethod(performer_layer)
    prefix_std = 0.02
    pools = ("token",)
    load_antialias = False
    eps = 1e-5
    OFFICIAL = (
        (r"^patch_embed\.(attention\d)\.attn\.", r"tokens_to_token.\1."),
        (r"^patch_embed\.(attention\d\.mlp)\.fc(\d)", lambda m: f"tokens_to_token.{m[1]}.{2 * int(m[2]) - 2}"),
        (r"^patch_embed\.", "tokens_to_token."),
        *VisionTransformer.OFFICIAL,
    )

    def make_stem(self, dim: int, patch: int) -> nn.Module:
        if patch != 16:
            raise ValueError(f"the soft splits of T2T-ViT make patches of 16, not of {patch}")
        return TokensToToken(self.ndim, self.in_chans, dim, self.layer)

    def make_positions(self, dim: int, img_size: tuple[int, ...], patch: int) -> Positions:
        grid = tuple((((s + 1) // 4 + 1) // 2 + 1) // 2 for s in img_size)  # what the soft splits give
        if min(grid) < 1:
            raise ValueError(f"img_size must be at least 3 on every axis, got {img_size}")
        # resampled as the official code does on loading, so that a model built for a size equals one that meets it
        positions = Positions(dim, grid, len(self.prefix), antialias=False)
        positions.table.requires_grad_(False).copy_(sinusoid(positions.table.shape[1], dim))
        return positions

    def make_block(self, dim: int, heads: int, hidden: int, drop_path: float) -> nn.Module:
        return TokenBlock(dim, Attention(dim, heads, qkv_bias=False), Mlp(dim, hidden), drop_path, self.eps)


class T2TViTt(T2TViT):
    """T2T-ViT_t: transformer layers in the tokens-to-token module."""

    layer = staticmethod(transformer_layer)
    OFFICIAL = T2TViT.OFFICIAL[2:]


_SIZES = {  # dim, depth, heads, mlp_ratio
    "7": (256, 7, 4, 2),
    "10": (256, 10, 4, 2),
    "12": (256, 12, 4, 2),
    "14": (384, 14, 6, 3),
    "19": (448, 19, 7, 3),
    "24": (512, 24, 8, 3),
    "14_resnext": (384, 14, 32, 3),
    "14_wide": (768, 4, 12, 3),
}
_RELEASES = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main"


def _variant(size: str, params: float, gmacs: float | None, top1: float | None, t="", img=224, **more) -> Variant:
    dim, depth, heads, mlp_ratio = _SIZES[size]
    config = dict(patch=16, dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio) | (dict(model=T2TViTt) if t else {})
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.1) | more
    where = Weights(f"{_RELEASES}/{top1}_T2T_ViT{t}_{size}.pth.tar", "Clear BSD", "direct") if top1 else Weights()
    return Variant(config, figures, Inputs(img, crop=0.9), where)


FAMILY = Family(
    name="t2t_vit",
    model=T2TViT,
    paper="Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet",
    venue="ICCV 2021",
    arxiv="2101.11986",
    code="github.com/yitu-opensource/T2T-ViT",
    licence="Clear BSD",
    # params_m, gmacs and top1 as the repository prints them; params_m as measured at 384 pixels and for the two
    # ablations (figures not to hand, no weights); top1_tl: with token labelling, a file of its own
    variants={
        "t2t_vit_7": _variant("7", 4.3, 1.1, 71.7),
        "t2t_vit_10": _variant("10", 5.9, 1.5, 75.2),
        "t2t_vit_12": _variant("12", 6.9, 1.8, 76.5),
        "t2t_vit_14": _variant("14", 21.5, 4.8, 81.5),
        "t2t_vit_14_384": _variant("14", 21.69, None, 83.3, img=384),
        "t2t_vit_19": _variant("19", 39.2, 8.5, 81.9),
        "t2t_vit_24": _variant("24", 64.1, 13.8, 82.3, top1_tl=84.2),
        "t2t_vit_t_14": _variant("14", 21.5, 6.1, 81.7, "t"),
        "t2t_vit_t_19": _variant("19", 39.2, 9.8, 82.4, "t"),
        "t2t_vit_t_24": _variant("24", 64.1, 15.0, 82.6, "t"),
        "t2t_vit_14_resnext": _variant("14_resnext", 21.55, None, None),
        "t2t_vit_14_wide": _variant("14_wide", 25.16, None, None),
    },
)
