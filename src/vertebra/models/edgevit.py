"""EdgeViTs: Competing Light-weight CNNs on Mobile Devices with Vision Transformers (ECCV 2022, arXiv 2205.03436).
Official code: github.com/saic-fi/edgevit, Apache-2.0.

Local, global, local: convolutions gather what is around a cell, one cell of each square attends to those of all other
squares, and a transposed convolution spreads the result over the square again. Attention so sees the whole map at every
stage for the price of a small one.

Unusual here: the sample is a strided pick, not a mean; norm and output projection come after the spreading, at full
resolution. Both halves of a block have their own conditional positions, and the local half has batch norms and no
activation between its convolutions. The last norm is a batch norm. Norms of the sparse half have eps 1e-6, all others
1e-5. The last stage has no local half and plain attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage, plus_one
from ..layers import BatchNorm, Block, Conv, Mlp, PatchEmbed, ResidualConv, drop_path_rates
from ..mixers import SparseGlobalAttention
from ..registry import Family, Variant, Weights


class LocalGlobalLocal(nn.Module):
    """The block of Fig. 2 (b), (B, *S, C) -> (B, *S, C): local aggregation if `ratio` > 1, then sparse attention."""

    def __init__(self, ndim: int, dim: int, heads: int, ratio: int, hidden: int, drop_path: float):
        super().__init__()
        self.local: nn.Module = nn.Identity()
        if ratio > 1:
            gather = nn.Sequential(Conv(ndim, dim, dim), Conv(ndim, dim, dim, 5, groups=dim), Conv(ndim, dim, dim))
            mlp = Mlp(dim, hidden, linear=partial(Conv, ndim))
            self.local = Block(dim, gather, mlp, drop_path, position=ResidualConv(ndim, dim), norm=BatchNorm)
        attn = SparseGlobalAttention(ndim, dim, heads, ratio)
        self.sparse = Block(dim, attn, Mlp(dim, hidden), drop_path, eps=1e-6, position=ResidualConv(ndim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.sparse(self.local(x))


class EdgeViT(Backbone):
    """The pyramid of Fig. 2 (a); `ratios` are the sampling ratios of the stages.

    A ragged end is cut off by each patch embedding. The dense version returns raw maps.
    """

    OFFICIAL = (
        (r"^patch_embed\.", "patch_embed1."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"patch_embed{plus_one(m)}."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"blocks{plus_one(m)}."),
        (r"\.local\.attn\.(\d)\.", lambda m: f".LocalAgg.{('conv1', 'attn', 'conv2')[int(m[1])]}."),
        (r"\.local\.", ".LocalAgg."),
        (r"\.sparse\.", ".SelfAttn."),
        (r"\.position\.conv\.", ".pos_embed."),
        (r"\.spread\.", ".LocalProp."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        ratios: Sequence[int] = (4, 2, 2, 1),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dims[0], 4, norm=nn.LayerNorm(dims[0]))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            hidden = int(dim * mlp_ratio)
            blocks = [LocalGlobalLocal(ndim, dim, heads[i], ratios[i], hidden, rate) for rate in rates[i]]
            down = PatchEmbed(ndim, dims[i - 1], dim, 2, norm=nn.LayerNorm(dim)) if i else None
            self.stages.append(Stage(blocks, down=down))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.norm = BatchNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


def _variant(dims, depths, heads, params, gmacs, top1, retinanet_ap, box_ap, miou) -> Variant:
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.1)
    figures |= dict(retinanet_ap=retinanet_ap, box_ap=box_ap, miou=miou)
    return Variant(dict(dims=dims, depths=depths, heads=heads), figures, weights=Weights("never released"))


_NARROW, _WIDE = (36, 72, 144, 288), (48, 96, 240, 384)

FAMILY = Family(
    name="edgevit",
    model=EdgeViT,
    paper="EdgeViTs: Competing Light-weight CNNs on Mobile Devices with Vision Transformers",
    venue="ECCV 2022",
    arxiv="2205.03436",
    code="github.com/saic-fi/edgevit",
    licence="Apache-2.0",
    # params_m, gmacs and top1 of the paper, but for params_m of edgevit_s: the paper prints 11.1, the official code
    # builds 13.1 at the printed cost. COCO 1x: RetinaNet and Mask R-CNN box AP; ADE20K Semantic FPN miou
    variants={
        "edgevit_xxs": _variant(_NARROW, (1, 1, 3, 2), (1, 2, 4, 8), 4.1, 0.6, 74.4, 38.7, 39.9, 39.7),
        "edgevit_xs": _variant(_WIDE, (1, 1, 3, 1), (1, 2, 5, 8), 6.7, 1.1, 77.5, 40.6, 41.4, 41.4),
        "edgevit_s": _variant(_WIDE, (1, 2, 5, 3), (1, 2, 5, 8), 13.1, 1.9, 81.0, 43.4, 44.8, 45.9),
    },
)
