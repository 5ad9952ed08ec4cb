"""BiFormer: Vision Transformer with Bi-Level Routing Attention (CVPR 2023, arXiv 2303.08810).
Official code: github.com/rayleizhu/BiFormer, MIT.

Attention is sparse by content: the map falls into 7 x 7 regions, each region looks for the few regions whose mean key
fits its mean query, and its cells attend to the cells of those alone. With 1, 4 and 16 regions in the first stages the
number of keys stays level while the resolution falls; the last stage attends to everything.

Unusual here: the logits of routed attention are scaled by the whole width, those of the last stage by a head's, which
has 8 heads at any width and no bias in its projection. The convolution beside attention (LePE) reads the values, but in
the last stage the block's input. Windows are counted, not measured: 7 of them whatever the image, or `n_win`.
biformer_stl has Swin-T's layout; its file for channels-first maps, biformer_stl_nchw, is another function: LePE always
reads the values, and sizes that regions do not fill are padded later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage, conv_norms
from ..layers import (
    Attention,
    BatchNorm,
    Block,
    Conv,
    ConvNorm,
    Mlp,
    ResidualConv,
    attend,
    drop_path_rates,
    merge_heads,
    split_heads,
)  # fmt: skip
from ..mixers import BiLevelRoutingAttention
from ..registry import Family, Variant, Weights

EPS = 1e-6
_NAMES = (
    conv_norms("patch_embed", "downsample_layers.0"),
    (r"^patch_embed\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.down\.", r"downsample_layers.\1."),
    (r"^(downsample_layers\.\d+)\.(conv|norm)\.", lambda m: f"{m[1]}.{int(m[2] == 'norm')}."),
    (r"\.position\.conv\.", ".pos_embed."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"^output_norms\.", "extra_norms."),
)
_ROUTED = r"^(stages\.[0-2]\..*\.attn)\.(qkv|proj)\."  # the stages before the last


class LocalGlobalAttention(Attention):
    """Attention over the whole map plus LePE, a depthwise convolution: (B, *S, C) -> (B, *S, C), last stage.

    The convolution reads the input, or with `of_values` the values.
    """

    def __init__(self, ndim: int, dim: int, heads: int, kernel: int, of_values: bool = False):
        super().__init__(dim, heads, qkv_bias=False)
        self.lepe, self.of_values = Conv(ndim, dim, dim, kernel, groups=dim), of_values

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x)
        local = self.lepe(qkv[..., 2 * x.shape[-1] :] if self.of_values else x)
        q, k, v = split_heads(qkv.flatten(1, -2), self.heads, 3)
        return self.proj(merge_heads(attend(q, k, v, bias)).reshape(x.shape) + local)


class BiFormer(Backbone):
    """Four stages (section 3.3). `topks` counts the routed regions of each stage but the last, which attends globally.

    The dense version norms every output; the paper uses n_win = 8 for ADE20K and 16 for COCO, with the same weights.
    """

    OFFICIAL: ClassVar[Rules] = (
        *_NAMES,
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.mlp\.fc2\.", ".mlp.3."),
        (_ROUTED, lambda m: f"{m[1]}.{'qkv.qkv' if m[2] == 'qkv' else 'wo'}."),
    )
    normed_outputs: ClassVar[bool] = True
    nchw: ClassVar[bool] = False

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        mlp_ratio: float = 3.0,
        topks: Sequence[int] = (1, 4, 16),
        n_win: int = 7,
        kernel: int = 5,
        head_dim: int = 32,
        global_heads: int = 8,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim
        if len(dims) != len(depths) or len(topks) != len(depths) - 1:
            raise ValueError(
                f"{len(depths)} depths need as many dims and one topk less (the last stage attends globally), "
                f"got dims={dims!r}, topks={topks!r}"
            )
        self.patch_embed = self.stem(dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                attn: nn.Module
                if i < len(topks):
                    heads = dim // head_dim
                    attn = BiLevelRoutingAttention(ndim, dim, heads, n_win, topks[i], kernel, self.nchw)
                else:
                    attn = LocalGlobalAttention(ndim, dim, global_heads, kernel, of_values=self.nchw)
                blocks.append(Block(dim, attn, Mlp(dim, int(dim * mlp_ratio)), rate, EPS, position=self.position(dim)))
            self.stages.append(Stage(blocks, down=self.merge(dims[i - 1], dim) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.norm = BatchNorm(dims[-1])
        elif self.normed_outputs:
            self.output_norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in dims)
        self.make_head()
        self.init_weights()

    def stem(self, out: int) -> nn.Module:
        """Image -> map at stride 4."""
        half = ConvNorm(self.ndim, self.in_chans, out // 2, 3, 2, act=nn.GELU, bias=True)
        return nn.Sequential(half, ConvNorm(self.ndim, out // 2, out, 3, 2, bias=True))

    def merge(self, dim: int, out: int) -> nn.Module:
        """(B, *S, dim) -> (B, *ceil(S / 2), out)."""
        return ConvNorm(self.ndim, dim, out, 3, 2, bias=True)

    def position(self, dim: int) -> nn.Module | None:
        """What runs before each block."""
        return ResidualConv(self.ndim, dim)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


class BiFormerSTL(BiFormer):
    """Swin-T's layout, from the ablation: no position convolution, patches that do not overlap.

    A ragged end is cut off, as by the official convolutions.
    """

    OFFICIAL = (*_NAMES, (r"\.mlp\.fc2\.", ".mlp.2."), BiFormer.OFFICIAL[-1])
    normed_outputs = False

    def stem(self, out: int) -> nn.Module:
        return ConvNorm(self.ndim, self.in_chans, out, 4, 4, padding=0, bias=True)

    def merge(self, dim: int, out: int) -> nn.Module:
        return nn.Sequential(BatchNorm(dim), Conv(self.ndim, dim, out, 2, 2, padding=0))

    def position(self, dim: int) -> nn.Module | None:
        return None


class BiFormerSTLNchw(BiFormerSTL):
    """The channels-first rewrite of the same layout, whose linear layers are 1x1 convolutions in the checkpoint."""

    OFFICIAL = (
        *_NAMES,
        (r"\.mlp\.fc2\.", ".mlp.2."),
        (_ROUTED, lambda m: f"{m[1]}.{'qkv' if m[2] == 'qkv' else 'output'}_linear."),
    )
    nchw = True

    def __init__(self, **options: Any):
        super().__init__(**options)
        for module in [m for stage in self.stages for block in stage.blocks for m in (block.attn, block.mlp)]:
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    bias = child.bias is not None
                    setattr(module, name, Conv(self.ndim, child.in_features, child.out_features, bias=bias))


def _variant(name, dim, depths, params, gmacs, top1, model=None, **figures) -> Variant:
    config: dict[str, Any] = dict(dims=tuple(dim * 2**i for i in range(4)), depths=depths)
    if model is not None:
        config |= dict(model=model, mlp_ratio=4.0)
    where = f"{name}_in1k.pth, OneDrive links in the README of github.com/rayleizhu/BiFormer (reported dead, issue 53)"
    return Variant(
        config, dict(params_m=params, gmacs=gmacs, top1=top1) | figures, weights=Weights(where, "MIT", "manual")
    )


_DEEP = (4, 4, 18, 4)
_SMALL = dict(box_ap=47.8, mask_ap=43.2, retinanet_ap=45.9, miou=48.9, miou_upernet=49.8)
_BASE = dict(box_ap=48.6, mask_ap=43.7, retinanet_ap=47.1, miou=49.9, miou_upernet=51.0)
# name, dim, depths, params_m, gmacs and top1 as the repository prints them; top1_token_label: trained with token
# labelling; box/mask AP: COCO Mask R-CNN 1x, retinanet_ap: RetinaNet 1x; miou: ADE20K Semantic FPN, UPerNet one scale
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("biformer_tiny", 64, (2, 2, 8, 2), 13.1, 2.2, 81.4, None, dict(drop_path=0.1)),
    ("biformer_small", 64, _DEEP, 25.5, 4.5, 83.8, None, dict(drop_path=0.15, top1_token_label=84.3) | _SMALL),
    ("biformer_base", 96, _DEEP, 56.8, 9.8, 84.3, None, dict(drop_path=0.4, top1_token_label=85.4) | _BASE),
    ("biformer_stl", 96, (2, 2, 6, 2), 28.4, 4.6, 82.7, BiFormerSTL, {}),
    ("biformer_stl_nchw", 96, (2, 2, 6, 2), 28.4, 4.6, 82.7, BiFormerSTLNchw, {}),
)

FAMILY = Family(
    name="biformer",
    model=BiFormer,
    paper="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    venue="CVPR 2023",
    arxiv="2303.08810",
    code="github.com/rayleizhu/BiFormer",
    licence="MIT",
    variants={name: _variant(name, *row, **figures) for name, *row, figures in _TABLE},
)
