"""CvT: Introducing Convolutions to Vision Transformers (ICCV 2021, arXiv 2103.15808). Official code:
github.com/microsoft/CvT, MIT.

A transformer in three stages. Overlapping convolutions embed the tokens of each stage, and depthwise convolutions make
queries, keys and values, so no table of positions is needed. Keys and values are taken at stride 2, which makes
attention four times cheaper. A class token joins in the last stage.

Unusual here: logits are scaled by the whole width, C^-0.5; the MLP has QuickGELU; the first embedding pads by 2, not 3;
stochastic depth is in the last stage only, from 0 to `drop_path_rate`. The official code returns a vector for a batch
of one, here it is a batch of one. The dense version gives each stage's raw map; the class token still takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, GridBlock, Mlp, PatchEmbed, drop_path_rates
from ..mixers import ConvProjectionAttention
from ..registry import Family, Inputs, Variant, Weights

STRIDES = (4, 2, 2)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of GELU: (..., C) -> (..., C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TokenEmbed(PatchEmbed):
    """Convolutional token embedding with a class token in front: (B, *S, dim) -> (tokens (B, 1 + N, out), grid)."""

    no_decay = ("cls_token",)

    def __init__(self, ndim: int, dim: int, out: int, kernel: int, stride: int, padding: int):
        super().__init__(ndim, dim, out, kernel, stride, nn.LayerNorm(out), padding=padding)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, out), std=0.02))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        x = super().forward(x)
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, -2)], 1)
        return tokens, tuple(x.shape[1:-1])


class CvT(Backbone):
    """Three stages at strides 4, 8, 16 (Fig. 2); forward_features gives the last one's tokens (B, 1 + N, C)."""

    tokens = True
    OFFICIAL = (
        (r"^patch_embed\.", "stage0.patch_embed."),
        (r"^stages\.(\d+)\.down\.cls_token$", r"stage\1.cls_token"),
        (r"^stages\.(\d+)\.down\.", r"stage\1.patch_embed."),
        (r"^stages\.(\d+)\.", r"stage\1."),
        (r"\.attn\.([qkv])\.", r".attn.proj_\1."),
        (r"\.attn\.conv_([qkv])\.norm\.", r".attn.conv_proj_\1.bn."),
        (r"\.attn\.conv_([qkv])\.conv\.", r".attn.conv_proj_\1.conv."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int],
        heads: Sequence[int] = (1, 3, 6),
        kernels: Sequence[int] = (7, 3, 3),
        paddings: Sequence[int] = (2, 1, 1),
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, last = self.ndim, len(dims) - 1
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            before, place = dims[i - 1] if i else self.in_chans, (kernels[i], STRIDES[i])
            down: nn.Module
            if i == last:
                down = TokenEmbed(ndim, before, dim, *place, paddings[i])
            else:
                down = PatchEmbed(ndim, before, dim, *place, nn.LayerNorm(dim), padding=paddings[i])
            if i == 0:
                self.patch_embed = down
            block = GridBlock if i == last else Block
            (rates,) = drop_path_rates(drop_path_rate if i == last else 0.0, [depths[i]])
            blocks = []
            for rate in rates:
                attn = ConvProjectionAttention(ndim, dim, heads[i], prefix=int(i == last))
                blocks.append(block(dim, attn, Mlp(dim, 4 * dim, act=QuickGELU), rate))
            self.stages.append(Stage(blocks, down=down if i else None))
        self.describe(dims, [4, 8, 16])
        if not self.features_only:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def to_map(self, state: Any, index: int) -> Tensor:
        if not isinstance(state, tuple):
            return state
        tokens, grid = state
        return tokens[:, 1:].reshape(tokens.shape[0], *grid, tokens.shape[-1])

    def finish(self, state: tuple[Tensor, tuple[int, ...]]) -> Tensor:
        return self.norm(state[0])

    def pre_logits(self, features: Tensor) -> Tensor:
        return features[:, 0]


def _variant(depths, params, gmacs, drop_path, size=224, **more) -> Variant:
    config = {name: more.pop(name) for name in ("dims", "heads") if name in more}
    figures = dict(params_m=params, gmacs=gmacs, drop_path=drop_path) | more
    where = Weights("OneDrive folder in the README of github.com/microsoft/CvT", "MIT", "manual")
    return Variant(dict(depths=depths) | config, figures, Inputs(size, crop=0.875 if size == 224 else 1.0), where)


FAMILY = Family(
    name="cvt",
    model=CvT,
    paper="CvT: Introducing Convolutions to Vision Transformers",
    venue="ICCV 2021",
    arxiv="2103.15808",
    code="github.com/microsoft/CvT",
    licence="MIT",
    # params_m, gmacs and top1 as the repository prints them; _384: fine-tuned at 384 pixels (the same network), _22k:
    # after pre-training on ImageNet-22k. 384 pixels are evaluated without a centre crop; w24's weights are of 384 only.
    # Files: CvT-13-224x224-IN-1k.pth, CvT-13-384x384-IN-1k.pth, CvT-13-384x384-IN-22k.pth and so on.
    variants={
        "cvt_13": _variant((1, 2, 10), 20, 4.5, 0.1, top1=81.6, gmacs_384=16.3, top1_384=83.0, top1_22k_384=83.3),
        "cvt_21": _variant((1, 4, 16), 32, 7.1, 0.1, top1=82.5, gmacs_384=24.9, top1_384=83.3, top1_22k_384=84.9),
        "cvt_w24": _variant(
            (2, 2, 20), 277, 193.2, 0.3, 384, dims=(192, 768, 1024), heads=(3, 12, 16), top1_22k_384=87.6
        ),
    },
)  # fmt: skip
