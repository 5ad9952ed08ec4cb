"""Swin Transformer: Hierarchical Vision Transformer using Shifted Windows (ICCV 2021, arXiv 2103.14030) and the SwinMLP
of the same repository. Official code: github.com/microsoft/Swin-Transformer, MIT.

Attention stays inside small windows, so its cost grows linearly with the image; every second block shifts the windows
by half of their size, which joins what the block before kept apart. Merging 2x2 cells between stages gives the pyramid.
SwinMLP mixes the tokens of a window by one learned matrix per head instead of attention.

Unusual here: how far a window reaches and whether it shifts is decided when the classification model is built, from
`img_size` and its smaller side (a stage whose map is no larger than a window gets windows of that side, unshifted); the
dense version keeps the window and always shifts. Windows that a map does not fill see zeros there, which take part as
keys. The official code ends a stage with its merge; here a stage begins with it and ends where its feature map is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, Mlp, PatchEmbed, PatchMerging, built_grid, check_heads, drop_path_rates, windows
from ..mixers import WindowAttention
from ..registry import Family, Inputs, Variant, Weights


class WindowMixing(nn.Module):
    """SwinMLP: one matrix (L, L) per head over the L tokens of a window: (B, *S, C) -> (B, *S, C).

    Shifted windows are not rolled: they begin `window` - `shift` cells before the map and see zeros there. The weight
    (heads * L, L, 1) is the official grouped 1x1 convolution's; a batched product computes it faster.
    """

    def __init__(self, ndim: int, dim: int, heads: int, window: int, shift: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads, self.window = heads, (window,) * ndim
        self.lead = (window - shift if shift else 0,) * ndim
        length = window**ndim
        self.weight = nn.Parameter(torch.empty(heads * length, length, 1))
        self.bias = nn.Parameter(torch.zeros(heads * length))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        sides, heads = tuple(x.shape[1:-1]), self.heads
        parts = windows(sides, self.window, lead=self.lead, device=x.device)
        tokens = parts.split(x).unflatten(-1, (heads, x.shape[-1] // heads))
        matrix, bias = self.weight.view(heads, parts.length, parts.length), self.bias.view(heads, parts.length)
        mixed = torch.einsum("hqk,nkhd->nqhd", matrix, tokens) + bias.t().unsqueeze(-1)
        return parts.join(mixed.flatten(2), sides)


class SwinTransformer(Backbone):
    """The pyramid of Fig. 3a. `img_size` only decides each stage's window and shift; any input is padded to fit."""

    OFFICIAL = (
        (r"^stages\.(\d+)\.down\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", "layers."),
        (r"\.attn\.pos\.table$", ".attn.relative_position_bias_table"),
        (r"\.attn\.(weight|bias)$", r".spatial_mlp.\1"),
        (r"^output_norms\.(\d+)", r"norm\1"),
    )
    CONSTANT = (r"\.attn\.relative_position_index$", r"\.attn_mask$")
    mixer: ClassVar[type[nn.Module]] = WindowAttention

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        mlp_ratio: float = 4.0,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if not isinstance(window, int) or window < 1:
            raise ValueError(f"window must be a whole number of at least 1, got {window!r}")
        side = min(built_grid(img_size, ndim, 4))
        if side < 1:
            raise ValueError(f"img_size must be positive, got {img_size!r}")
        self.patch_embed = PatchEmbed(ndim, in_chans, dim, 4, norm=nn.LayerNorm(dim), pad=True)
        dims = [dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            reach, shift = window, window // 2
            if side <= window and not self.features_only:
                reach, shift = side, 0
            mixers = [self.mixer(ndim, width, heads[i], reach, shift if j % 2 else 0) for j in range(depth)]
            hidden = int(width * mlp_ratio)
            blocks = [Block(width, mix, Mlp(width, hidden), rate) for mix, rate in zip(mixers, rates[i], strict=True)]
            self.stages.append(Stage(blocks, down=PatchMerging(ndim, dims[i - 1], width) if i else None))
            side = (side + 1) // 2
        self.describe(dims, [4 * 2**i for i in range(len(depths))])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(width) for width in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


class SwinMLP(SwinTransformer):
    """Swin with `WindowMixing` in the place of attention."""

    mixer = WindowMixing


_STORAGE = "https://github.com/SwinTransformer/storage/releases/download"
_TINY, _DEEP = (2, 2, 6, 2), (2, 2, 18, 2)


def _variant(
    dim, depths, heads, window, size, drop_path, params, gmacs, file, release="v1.0.0", model=SwinTransformer, **more
):
    config = dict(model=model, dim=dim, depths=depths, heads=tuple(heads * 2**i for i in range(4)), window=window)
    weights = Weights(f"{_STORAGE}/{release}/{file}.pth", "MIT", "direct")
    figures = dict(params_m=params, gmacs=gmacs, drop_path=drop_path) | more
    return Variant(config, figures, Inputs(size), weights)


# params_m, gmacs and top1 as the repository prints them; top1_22k: pre-trained on ImageNet-22k, then fine-tuned.
# box/mask AP: COCO Mask R-CNN 3x (cascade_: Cascade Mask R-CNN 3x; htc_: HTC++, 22k); miou: ADE20K UPerNet, one scale,
# 512 pixels (miou_22k: 640 pixels, 22k). weights_22k: the pre-trained network, a head of 21841 classes.
FAMILY = Family(
    name="swin",
    model=SwinTransformer,
    paper="Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
    venue="ICCV 2021",
    arxiv="2103.14030",
    code="github.com/microsoft/Swin-Transformer",
    licence="MIT",
    variants={
        "swin_tiny_patch4_window7_224": _variant(
            96, _TINY, 3, 7, 224, 0.2, 28, 4.5, "swin_tiny_patch4_window7_224", top1=81.2, top1_22k=80.9,
            box_ap=46.0, mask_ap=41.6, cascade_box_ap=50.4, cascade_mask_ap=43.7, miou=44.51,
            weights_22k=f"{_STORAGE}/v1.0.8/swin_tiny_patch4_window7_224_22k.pth",
        ),
        "swin_small_patch4_window7_224": _variant(
            96, _DEEP, 3, 7, 224, 0.3, 50, 8.7, "swin_small_patch4_window7_224", top1=83.2, top1_22k=83.2,
            box_ap=48.5, mask_ap=43.3, cascade_box_ap=51.9, cascade_mask_ap=45.0, miou=47.64,
            weights_22k=f"{_STORAGE}/v1.0.8/swin_small_patch4_window7_224_22k.pth",
        ),
        "swin_base_patch4_window7_224": _variant(
            128, _DEEP, 4, 7, 224, 0.5, 88, 15.4, "swin_base_patch4_window7_224", top1=83.5, top1_22k=85.2,
            cascade_box_ap=51.9, cascade_mask_ap=45.0, htc_box_ap=56.4, htc_mask_ap=49.1, miou=48.13, miou_22k=50.04,
            weights_22k=f"{_STORAGE}/v1.0.0/swin_base_patch4_window7_224_22k.pth",
        ),
        "swin_base_patch4_window12_384": _variant(
            128, _DEEP, 4, 12, 384, 0.5, 88, 47.1, "swin_base_patch4_window12_384", top1=84.5, top1_22k=86.4,
            weights_22k=f"{_STORAGE}/v1.0.0/swin_base_patch4_window12_384_22k.pth",
        ),
        "swin_large_patch4_window7_224": _variant(
            192, _DEEP, 6, 7, 224, 0.2, 197, 34.5, "swin_large_patch4_window7_224_22kto1k", top1=86.3, top1_22k=86.3,
            htc_box_ap=57.1, htc_mask_ap=49.5, miou_22k=52.05,
            weights_22k=f"{_STORAGE}/v1.0.0/swin_large_patch4_window7_224_22k.pth",
        ),
        "swin_large_patch4_window12_384": _variant(
            192, _DEEP, 6, 12, 384, 0.2, 197, 103.9, "swin_large_patch4_window12_384_22kto1k", top1=87.3, top1_22k=87.3,
            weights_22k=f"{_STORAGE}/v1.0.0/swin_large_patch4_window12_384_22k.pth",
        ),
        "swin_tiny_c24_patch4_window8_256": _variant(
            96, _TINY, 4, 8, 256, 0.2, 28, 5.9, "swin_tiny_c24_patch4_window8_256", "v1.0.5", top1=81.6
        ),
        "swin_mlp_tiny_c24_patch4_window8_256": _variant(
            96, _TINY, 4, 8, 256, 0.2, 20, 4.0, "swin_mlp_tiny_c24_patch4_window8_256", "v1.0.5", SwinMLP, top1=79.4
        ),
        "swin_mlp_tiny_c12_patch4_window8_256": _variant(
            96, _TINY, 8, 8, 256, 0.2, 21, 4.0, "swin_mlp_tiny_c12_patch4_window8_256", "v1.0.5", SwinMLP, top1=79.6
        ),
        "swin_mlp_tiny_c6_patch4_window8_256": _variant(
            96, _TINY, 16, 8, 256, 0.2, 23, 4.0, "swin_mlp_tiny_c6_patch4_window8_256", "v1.0.5", SwinMLP, top1=79.7
        ),
        "swin_mlp_base_patch4_window7_224": _variant(
            128, _DEEP, 4, 7, 224, 0.5, 61, 10.4, "swin_mlp_base_patch4_window7_224", "v1.0.5", SwinMLP, top1=81.3
        ),
    },
)  # fmt: skip
