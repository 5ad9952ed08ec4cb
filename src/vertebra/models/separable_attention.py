"""MobileViTv2: Separable Self-attention for Mobile Vision Transformers (TMLR 2023, arXiv 2206.02680). Official code:
github.com/apple/ml-cvnets, Apple sample code licence; timm (Apache-2.0) has the same networks under other names.

One score per token replaces the scores of all pairs: their softmax weighs the keys into a single context vector, which
scales the values everywhere. That is linear in the number of tokens and needs no products of large matrices.

Unusual here: the norms in a transformer have one group over all channels, places and patches; only the values pass a
ReLU; the softmax runs over patches, separately for each place in a patch; the local convolutions are depthwise; a
block neither adds nor joins its input. A map with an odd side is resampled (corners aligned) to the next even one and
stays so: at 224 pixels the last map is 8x8. Training used no stochastic depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbone import Rules
from ..layers import Block, Conv, ConvNorm, Mlp, OneGroup, make_divisible, resize
from ..mixers import SeparableAttention
from ..registry import Family, Inputs, Variant, Weights
from .mobilevit import MobilePyramid, MobileViT, join_patches, split_patches, whole_patches

_TIMM = {"expand": "conv1_1x1", "depthwise": "conv2_kxk", "project": "conv3_1x1", "local": "conv_kxk"}


class SeparableBlock(nn.Module):
    """Local convolutions, then transformers with separable attention over the patches (section 3.2).

    (B, *S, dim) -> (B, *S', dim), S' being S rounded up to even; the transformers are `width` wide. Time and memory
    grow with the number of cells.
    """

    def __init__(self, ndim: int, dim: int, width: int, depth: int):
        super().__init__()
        linear = partial(Conv, ndim)
        self.local = ConvNorm(ndim, dim, dim, 3, groups=dim, act=nn.SiLU)
        self.narrow = Conv(ndim, dim, width, bias=False)
        blocks = []
        for _ in range(depth):
            attn = SeparableAttention(width, axis=2, linear=linear)  # of (B, places, patches, width)
            mlp = Mlp(width, 2 * width, act=nn.SiLU, linear=linear)
            blocks.append(Block(width, attn, mlp, norm=OneGroup))
        self.transformer = nn.Sequential(*blocks, OneGroup(width))
        self.conv_proj = ConvNorm(ndim, width, dim)

    def forward(self, x: Tensor) -> Tensor:
        sides = whole_patches(x.shape[1:-1])
        x = self.narrow(self.local(resize(x, sides, align_corners=True)))
        return self.conv_proj(join_patches(self.transformer(split_patches(x)), sides))


class MobileViTV2(MobilePyramid):
    """Five stages at strides 2 to 32, `width` times 64 to 512 wide; transformers are half as wide. timm's names."""

    OFFICIAL: ClassVar[Rules] = (
        (r"^head\.", "head.fc."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        (r"\.(expand|depthwise|project|local)\.", lambda m: f".{_TIMM[m[1]]}."),
        (r"(stem|_1x1|_kxk|conv_proj)\.norm\.", r"\1.bn."),
        (r"\.narrow\.", ".conv_1x1."),
        (r"\.transformer\.\d+\.(weight|bias)$", r".norm.\1"),
        (r"\.attn\.(qkv|proj)\.", lambda m: f".attn.{'qkv' if m[1] == 'qkv' else 'out'}_proj."),
    )

    def __init__(self, *, width: float = 1.0, depths: Sequence[int] = (2, 4, 3), **contract: Any):
        super().__init__(**contract)
        if width <= 0:
            raise ValueError(f"width must be positive, got {width!r}")
        if len(depths) != 3:
            raise ValueError(f"depths needs 3 entries, got {depths!r}")
        dims = [make_divisible(64 * width, 16), *(make_divisible(c * width) for c in (128, 256, 384, 512))]
        rows = zip(dims[2:], (128, 192, 256), depths, strict=True)
        blocks = [SeparableBlock(self.ndim, dim, make_divisible(c * width), depth) for dim, c, depth in rows]
        self.lay_out(make_divisible(min(max(32 * width, 16), 64)), dims, 2, 2, blocks)
        self.make_head()
        self.init_weights()


class OfficialMobileViTV2(MobileViTV2):
    """The same network under the names of the authors' code."""

    OFFICIAL = (
        (r"^head\.", "classifier.1."),
        (r"\.local\.", ".local_rep.0.block."),
        (r"\.narrow\.", ".local_rep.1.block.conv."),
        (r"\.norm1\.", ".pre_norm_attn.0."),
        (r"\.attn\.qkv\.", ".pre_norm_attn.1.qkv_proj.block.conv."),
        (r"\.attn\.proj\.", ".pre_norm_attn.1.out_proj.block.conv."),
        (r"\.mlp\.fc1\.", ".pre_norm_ffn.1.block.conv."),
        (r"\.mlp\.fc2\.", ".pre_norm_ffn.3.block.conv."),
        *MobileViT.OFFICIAL,
    )


_URL = "https://docs-assets.developer.apple.com/ml-research/models/cvnets-v2/classification/mobilevitv2/imagenet1k"
# width, params_m, gmacs (timm's count) at 256 pixels, top1 of the authors' model zoo at 256 and 384 pixels, both after
# pre-training on ImageNet-21k, SSDLite at 320 pixels on COCO, PSPNet on ADE20K
_TABLE: tuple[tuple[float | None, ...], ...] = (
    (0.5, 1.4, 0.48, 70.18, 72.14, None, None, 21.24, 31.77),
    (0.75, 2.9, 1.05, 75.56, 76.98, None, None, 24.57, 35.22),
    (1.0, 4.9, 1.84, 78.09, 79.68, None, None, 26.47, 36.57),
    (1.25, 7.5, 2.86, 79.65, 80.94, None, None, 27.85, 38.76),
    (1.5, 10.6, 4.09, 80.38, 81.50, 81.46, 82.60, 28.83, None),
    (1.75, 14.3, 5.54, 80.84, 82.04, 81.94, 82.93, 29.52, None),
    (2.0, 18.4, 7.22, 81.17, 82.17, 82.36, 83.41, 30.21, None),
)
_FIGURES = ("params_m", "gmacs", "top1", "top1_384", "top1_in21k", "top1_in21k_384", "ssdlite_ap", "miou")


def _variants() -> dict[str, Variant]:
    found = {}
    inputs = Inputs(256, (0.0,) * 3, (1.0,) * 3, crop=256 / 288)
    for width, *values in _TABLE:
        figures = {k: v for k, v in zip(_FIGURES, values, strict=True) if v is not None} | dict(drop_path=0.0)
        code = f"{round(100 * width):03d}"
        timm = Weights(f"https://huggingface.co/timm/mobilevitv2_{code}.cvnets_in1k", "Apple sample code", "manual")
        cvnets = Weights(f"{_URL}/256x256/mobilevitv2-{width}.pt", "Apple sample code", "direct")
        found[f"mobilevitv2_{code}"] = Variant(dict(width=width), figures, inputs, timm)
        config = dict(width=width, model=OfficialMobileViTV2)
        found[f"mobilevit_v2_{code}_cvnets"] = Variant(config, figures, inputs, cvnets)
    return found


FAMILY = Family(
    name="separable_attention",
    model=MobileViTV2,
    paper="Separable Self-attention for Mobile Vision Transformers",
    venue="TMLR 2023",
    arxiv="2206.02680",
    code="github.com/apple/ml-cvnets",
    licence="Apple sample code",
    variants=_variants(),
)
