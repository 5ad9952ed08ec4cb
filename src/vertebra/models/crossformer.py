"""CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention (ICLR 2022, arXiv 2108.00154) and
CrossFormer++ (TPAMI 2023, arXiv 2303.06908). Official code: github.com/cheerss/CrossFormer, MIT.

Every embedding mixes patches of several scales. Attention alternates between short distance (windows of neighbours)
and long distance (cells sampled at an interval), so that each costs one window and together they reach the whole map. A
small MLP turns relative offsets into position biases, so any group size works. ++ adds activation cooling layers and
smaller early groups.

Unusual here: the position MLP is C / 16 wide (the paper says D / 4) and reads offsets in raw group cells; the norm sits
before the merging convolutions but after those of the embedding; padded keys are masked, padded queries only cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, Conv, CrossScale, Mlp, drop_path_rates, pad_to
from ..mixers import GroupedAttention
from ..registry import Family, Variant, Weights


class CoolingLayer(nn.Module):
    """Activation cooling layer of ++ (ACL): depthwise convolution and norm without a residual, so that the amplitude
    which residuals pile up starts afresh. (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int):
        super().__init__()
        self.conv, self.norm = Conv(ndim, dim, dim, 3, groups=dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class CoolBlock(Block):
    """The block of ++ that ends in a cooling layer."""

    def __init__(self, ndim: int, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__(dim, attn, mlp, drop_path)
        self.cool = CoolingLayer(ndim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.cool(super().forward(x))


class Merging(nn.Module):
    """Cross-scale embedding between stages (section 3.1): (B, *S, C) -> (B, *ceil(S / 2), 2 C)."""

    def __init__(self, ndim: int, dim: int, kernels: Sequence[int]):
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(dim), CrossScale(ndim, dim, 2 * dim, kernels, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(pad_to(self.norm(x), 2))


class CrossFormer(Backbone):
    """The pyramid of four stages (Fig. 1). `groups` and `intervals` are per stage; `cooling` makes it a ++."""

    OFFICIAL = (
        (r"^patch_norm", "patch_embed.norm"),
        (r"^patch_embed\.convs", "patch_embed.projs"),
        (r"^stages\.(\d+)\.down\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"\.reduce\.convs\.", ".reductions."),
        (r"^stages\.", "layers."),
        (r"\.cool\.(conv|norm)", lambda m: {"conv": ".ex_conv", "norm": ".ex_ln"}[m[1]]),
    )
    EXPORT = "a map with a side of one group or less is a single group: sizes differ in their graphs"
    CONSTANT = (r"\.attn\.biases$", r"\.attn\.relative_position_index$", r"\.attn_mask$")

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        groups: Sequence[int] = (7, 7, 7, 7),
        intervals: Sequence[int] = (8, 4, 2, 1),
        cooling: bool = False,
        mlp_ratio: float = 4.0,
        kernels: Sequence[int] = (4, 8, 16, 32),
        merge_kernels: Sequence[int] = (2, 4),
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        self.patch_embed = CrossScale(ndim, in_chans, dim, kernels, stride=4)
        self.patch_norm = nn.LayerNorm(dim)
        dims = [dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates[i]):
                attn = GroupedAttention(ndim, width, heads[i], groups[i], intervals[i] if j % 2 else 1)
                mlp = Mlp(width, int(width * mlp_ratio))
                cool = cooling and (j + 1) % 3 == 0 and j < depth - 1
                blocks.append(CoolBlock(ndim, width, attn, mlp, rate) if cool else Block(width, attn, mlp, rate))
            self.stages.append(Stage(blocks, down=Merging(ndim, dims[i - 1], merge_kernels) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(depths))])
        if not self.features_only:  # the dense version returns raw maps
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_norm(self.patch_embed(x))

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


def _variant(dim, depths, heads, drop_path, params, gmacs, top1, pp=False, **dense) -> Variant:
    config = dict(dim=dim, depths=depths, heads=heads)
    if pp:
        config |= dict(groups=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooling=True)
    where = "README of github.com/cheerss/CrossFormer" + (" (Baidu only)" if pp else " (Google Drive, Baidu)")
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | dense
    return Variant(config, figures, weights=Weights(where, "MIT", "manual"))


_NARROW, _WIDE, _WIDEST = (2, 4, 8, 16), (3, 6, 12, 24), (4, 8, 16, 32)

FAMILY = Family(
    name="crossformer",
    model=CrossFormer,
    paper="CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention; CrossFormer++",
    venue="ICLR 2022; TPAMI 2023",
    arxiv="2108.00154, 2303.06908",
    code="github.com/cheerss/CrossFormer",
    licence="MIT",
    # params_m, gmacs and top1 as the repository prints them; box/mask AP: COCO Mask R-CNN 1x; miou: ADE20K Semantic FPN
    variants={
        "crossformer_tiny": _variant(64, (1, 1, 8, 6), _NARROW, 0.1, 27.8, 2.9, 81.5),
        "crossformer_small": _variant(
            96, (2, 2, 6, 2), _WIDE, 0.2, 30.7, 4.9, 82.5, box_ap=45.4, mask_ap=41.4, miou=46.4
        ),
        "crossformer_base": _variant(
            96, (2, 2, 18, 2), _WIDE, 0.3, 52.0, 9.2, 83.4, box_ap=47.2, mask_ap=42.7, miou=48.0
        ),
        "crossformer_large": _variant(128, (2, 2, 18, 2), _WIDEST, 0.5, 92.0, 16.1, 84.0, miou=49.1),
        "crossformer_pp_small": _variant(
            64, (2, 2, 18, 2), _NARROW, 0.2, 23.3, 4.9, 83.2, pp=True, box_ap=46.4, mask_ap=42.1, miou=47.4
        ),
        "crossformer_pp_base": _variant(
            96, (2, 2, 18, 2), _WIDE, 0.3, 52.0, 9.5, 84.2, pp=True, box_ap=47.7, mask_ap=43.2, miou=48.6
        ),
        "crossformer_pp_large": _variant(128, (2, 2, 18, 2), _WIDEST, 0.5, 92.0, 16.6, 84.7, pp=True),
        "crossformer_pp_huge": _variant(128, (6, 6, 18, 2), _WIDEST, 0.5, 96.0, 21.8, 84.9, pp=True),
    },
)
