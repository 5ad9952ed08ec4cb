"""DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition (IEEE TMM 2023, arXiv 2302.01791). Official
code: github.com/JIAOJIAYUASD/dilateformer, no licence stated.

In shallow layers attention is local and sparse, so a cell attends to nine cells of a window instead of to the whole
map, and each group of heads spreads its window by another dilation. The two deep stages, whose maps are small, attend
globally.

Unusual here: keys outside of the map are zeros and take part in the softmax; qkv of the dilated stages is a 1x1
convolution, that of the global ones a linear layer; merging convolutions have a bias before their batch norm; eps 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage, conv_norms
from ..layers import Block, Conv, ConvNorm, Mlp, ResidualConv, drop_path_rates
from ..mixers import DilatedAttention, GlobalAttention
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6


def stem(ndim: int, dim: int, hidden: int, out: int) -> nn.Sequential:
    """Overlapping tokenizer (Fig. 3): (B, *S, dim) -> (B, *ceil(S / 4), out), four convolutions, no norm at the end."""
    steps = [(dim, hidden, 1), (hidden, 2 * hidden, 2), (2 * hidden, 4 * hidden, 1)]
    layers: list[nn.Module] = [ConvNorm(ndim, a, b, 3, stride, act=nn.GELU) for a, b, stride in steps]
    return nn.Sequential(*layers, Conv(ndim, 4 * hidden, out, 3, 2, bias=False))


class DilateFormer(Backbone):
    """The pyramid of Fig. 3; `attention` names each stage's kind, D dilated or G global."""

    OFFICIAL = (
        conv_norms("patch_embed", "patch_embed.proj"),
        (r"^patch_embed\.3\.", "patch_embed.proj.9."),
        (r"^stages\.(\d+)\.down\.conv\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.proj.0."),
        (r"^stages\.(\d+)\.down\.norm\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.proj.1."),
        (r"\.position\.conv\.", ".pos_embed."),
    )

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int] = (3, 6, 12, 24),
        attention: str = "DDGG",
        kernel: int = 3,
        dilations: Sequence[int] = (1, 2, 3),
        mlp_ratio: float = 4.0,
        stem_dim: int = 16,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim
        if len(attention) != len(depths) or set(attention) - set("DG"):
            raise ValueError(f"attention needs one letter, D or G, for each of {len(depths)} stages, got {attention!r}")
        self.patch_embed = stem(ndim, self.in_chans, stem_dim, dim)
        dims = [dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, width in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                attn: nn.Module = GlobalAttention(width, heads[i])
                if attention[i] == "D":
                    attn = DilatedAttention(ndim, width, heads[i], kernel, dilations)
                mlp = Mlp(width, int(width * mlp_ratio))
                blocks.append(Block(width, attn, mlp, rate, EPS, position=ResidualConv(ndim, width)))
            down = ConvNorm(ndim, dims[i - 1], width, 3, 2, bias=True) if i else None
            self.stages.append(Stage(blocks, down=down))
        self.describe(dims, [4 * 2**i for i in range(len(depths))])
        if not self.features_only:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


def _variant(dim: int, depths: Sequence[int], params: float, gmacs: float, **more: float) -> Variant:
    where = Weights("README of github.com/JIAOJIAYUASD/dilateformer (Google Drive, Baidu)", "none stated", "manual")
    figures = dict(params_m=params, gmacs=gmacs, drop_path=0.1) | more
    return Variant(dict(dim=dim, depths=depths), figures, Inputs(224), where)


FAMILY = Family(
    name="dilateformer",
    model=DilateFormer,
    paper="DilateFormer: Multi-Scale Dilated Transformer for Visual Recognition",
    venue="IEEE TMM 2023",
    arxiv="2302.01791",
    code="github.com/JIAOJIAYUASD/dilateformer",
    licence="none stated",
    # params_m are counted from the official code, whose small is larger than the paper's (21 M); gmacs and top1 are the
    # paper's. top1_tl: with token labelling (top1_tl_384 at 384 pixels). COCO 3x: Mask R-CNN box_ap and mask_ap,
    # Cascade likewise; ADE20K: miou with UPerNet (_ms: several scales), miou_fpn with Semantic FPN.
    variants={
        "dilateformer_tiny": _variant(72, (2, 2, 6, 2), 17.239, 3.2, top1=82.1),
        "dilateformer_small": _variant(
            72, (3, 5, 8, 3), 24.058, 4.8, top1=83.3, top1_tl=83.9, miou=47.1, miou_ms=47.6, miou_fpn=47.1
        ),
        "dilateformer_base": _variant(
            96, (4, 8, 10, 3), 47.432, 10.0, top1_tl=84.9, top1_tl_384=85.6, box_ap=49.9, mask_ap=43.7,
            cascade_box_ap=53.3, cascade_mask_ap=46.1, miou=50.4, miou_ms=50.5, miou_fpn=48.8,
        ),
    },
)  # fmt: skip
