"""Shunted Self-Attention via Multi-Scale Token Aggregation (CVPR 2022, arXiv 2111.15193). Official code:
github.com/OliverRensu/Shunted-Transformer, no licence stated.

PVT reduces keys and values by one ratio for all heads, which blurs small objects. Here half of the heads of a layer
reads a coarse map and half a finer one, so that one layer sees objects of several sizes. The rest is PVT v2 with a
convolutional stem and a residual around the convolution in the MLP.

Unusual here: the local term joins the values before attention in stages 1 to 3 but the output in stage 4; two eps
values (1e-6 in blocks and outputs, 1e-5 after embeddings and inside attention); ReLU in the stem only. No dense code
is published; the dense version gives the normed output of each stage, as PVT v2 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage, conv_norms, plus_one
from ..layers import Block, ConvStem, Mlp, PatchEmbed, ResidualConv, drop_path_rates, init_fan_out
from ..mixers import LocalEnhancedAttention, ShuntedAttention
from ..registry import Family, Variant, Weights

EPS = 1e-6


class ShuntedTransformer(Backbone):
    """The pyramid of Fig. 2. A stage of ratio r > 1 shunts its heads over the ratios r and r / 2 (Table 1)."""

    OFFICIAL = (
        conv_norms(r"patch_embed\.convs", "patch_embed1.conv"),
        (r"^patch_embed\.convs\.(\d+)\.", lambda m: f"patch_embed1.conv.{3 * int(m[1])}."),
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"patch_embed{plus_one(m)}."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"block{plus_one(m)}."),
        (r"^stages\.(\d+)\.norm\.", lambda m: f"norm{plus_one(m)}."),
        (r"\.scales\.(\d+)\.local\.conv\.", lambda m: f".local_conv{plus_one(m)}."),
        (r"\.scales\.(\d+)\.(\w+)\.", lambda m: f".{m[2]}{plus_one(m)}."),
        (r"\.mlp\.middle\.conv\.", ".mlp.dwconv.dwconv."),
    )

    def __init__(
        self,
        *,
        depths: Sequence[int],
        stem: int,
        dims: Sequence[int] = (64, 128, 256, 512),
        heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        ratios: Sequence[int] = (8, 4, 2, 1),
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if any(r < 1 or (r > 1 and r % 2) for r in ratios):
            raise ValueError(f"ratios must be 1 or even (half of the heads takes half of it), got {tuple(ratios)}")
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = ConvStem(ndim, in_chans, dims[0], extra=stem)
        self.stages = nn.ModuleList()
        for i, (dim, ratio) in enumerate(zip(dims, ratios, strict=True)):
            blocks = []
            for rate in rates[i]:
                if ratio > 1:
                    attn: nn.Module = ShuntedAttention(ndim, dim, heads[i], (ratio, ratio // 2))
                else:
                    attn = LocalEnhancedAttention(ndim, dim, heads[i])
                hidden = int(dim * mlp_ratios[i])
                blocks.append(Block(dim, attn, Mlp(dim, hidden, middle=ResidualConv(ndim, hidden)), rate, EPS))
            down = PatchEmbed(ndim, dims[i - 1], dim, 3, 2, norm=nn.LayerNorm(dim)) if i else None
            self.stages.append(Stage(blocks, down=down, norm=nn.LayerNorm(dim, eps=EPS)))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        self.make_head()
        self.init_weights()
        init_fan_out(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)


def _variant(depths, stem, params, gmacs, top1, drop_path) -> Variant:
    where = "README of github.com/OliverRensu/Shunted-Transformer (Google Drive; Baidu, code hazr)"
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path)
    return Variant(dict(depths=depths, stem=stem), figures, weights=Weights(where, "none stated", "manual"))


FAMILY = Family(
    name="shunted",
    model=ShuntedTransformer,
    paper="Shunted Self-Attention via Multi-Scale Token Aggregation",
    venue="CVPR 2022",
    arxiv="2111.15193",
    code="github.com/OliverRensu/Shunted-Transformer",
    licence="none stated",
    # params_m and top1 as the repository prints them, gmacs the paper's (counted: 2.147, 4.993, 8.150)
    variants={
        "shunted_t": _variant((1, 2, 4, 1), 0, 11.5, 2.1, 79.8, 0.1),
        "shunted_s": _variant((2, 4, 12, 1), 1, 22.4, 4.9, 82.9, 0.2),
        "shunted_b": _variant((3, 4, 24, 2), 2, 39.6, 8.1, 84.0, 0.3),
    },
)
