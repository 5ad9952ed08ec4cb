"""ConvNeXt: A ConvNet for the 2020s (CVPR 2022, arXiv 2201.03545). Official code: github.com/facebookresearch/ConvNeXt,
MIT.

A ResNet brought step by step to what vision transformers do, without attention: patches, four stages, one wide
depthwise convolution per block in the place of the token mixer, an inverted MLP, few norms and activations. The
isotropic form keeps one resolution, as ViT does.

Unusual here: a block has one norm and one residual; the way down is norm, then convolution; the last norm comes after
the mean over the map. Of the isotropic models only the large one's published file should have layer scales (its recipe
leaves the training script's default), so it is built with them: 0.037 M more; `layer_scale=None` takes them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage, four_taps
from ..layers import Conv, Mlp, NextBlock, PatchEmbed, drop_path_rates, init_truncated
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6
_BLOCK = (
    (r"\.mixer\.", ".dwconv."),
    (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
    (r"\.scale\.gamma$", ".gamma"),
)


def block(ndim: int, dim: int, drop_path: float, scale: float | None) -> NextBlock:
    """ConvNeXt block (Fig. 4): depthwise 7x7, norm, MLP, layer scale, one residual."""
    mixer, norm = Conv(ndim, dim, dim, 7, groups=dim), nn.LayerNorm(dim, eps=EPS)
    return NextBlock(dim, mixer, norm, Mlp(dim, 4 * dim), drop_path, scale)


class _Head(Backbone):
    """What both forms share: the norm after the mean, and initialisation."""

    norm: nn.LayerNorm

    def init_weights(self) -> None:
        init_truncated(self)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.norm(features.flatten(1, -2).mean(1))


class ConvNeXt(_Head):
    """Four stages at strides 4 to 32 (section 2.2). A ragged end is cut off by each non-overlapping convolution.

    The dense version norms each output.
    """

    OFFICIAL = (
        (r"^patch_embed\.proj\.", "downsample_layers.0.0."),
        (r"^patch_embed\.norm\.", "downsample_layers.0.1."),
        (r"^stages\.(\d+)\.down\.", r"downsample_layers.\1."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
        *_BLOCK,
        (r"^output_norms\.(\d+)", r"norm\1"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        layer_scale: float | None = 1e-6,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, rates = self.ndim, drop_path_rates(drop_path_rate, depths)
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dims[0], 4, norm=nn.LayerNorm(dims[0], eps=EPS))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            down = None
            if i:
                shrink = Conv(ndim, dims[i - 1], dim, 2, 2, padding=0)
                down = nn.Sequential(nn.LayerNorm(dims[i - 1], eps=EPS), shrink)
            self.stages.append(Stage([block(ndim, dim, rate, layer_scale) for rate in rates[i]], down=down))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)


class IsotropicConvNeXt(_Head):
    """Patches of 16 and blocks of one width (section 3.3). Each block is a stage; dense: four raw maps.

    A ragged image end is filled with zeros to whole patches.
    """

    OFFICIAL = ((r"^stem\.proj\.", "stem."), (r"^stages\.(\d+)\.blocks\.0\.", r"blocks.\1."), *_BLOCK)

    def __init__(
        self, *, dim: int, depth: int, layer_scale: float | None = None, drop_path_rate: float = 0.0, **contract: Any
    ):
        super().__init__(**contract)
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.stem = PatchEmbed(self.ndim, self.in_chans, dim, 16, pad=True)
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        self.stages = nn.ModuleList(Stage([block(self.ndim, dim, rate, layer_scale)]) for rate in rates)
        if self.features_only:
            self.default_indices = four_taps(depth)
        self.describe([dim] * depth, [16] * depth)
        if not self.features_only:
            self.norm = nn.LayerNorm(dim, eps=EPS)
        self.make_head()
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)


_URL = "https://dl.fbaipublicfiles.com/convnext"


def _pyramid(file, dim, depth, drop_path, params, gmacs, top1=None, **more) -> Variant:
    config = dict(dims=tuple(dim * 2**i for i in range(4)), depths=(3, 3, depth, 3))
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | more
    kept = {k: v for k, v in figures.items() if v is not None}
    return Variant(config, kept, Inputs(), Weights(f"{_URL}/{file}.pth", "MIT", "direct"))


def _isotropic(size, dim, depth, drop_path, params, gmacs, top1, scale=None) -> Variant:
    config = dict(model=IsotropicConvNeXt, dim=dim, depth=depth, layer_scale=scale)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path)
    return Variant(config, figures, Inputs(), Weights(f"{_URL}/convnext_iso_{size}_1k_224_ema.pth", "MIT", "direct"))


# params_m, gmacs and top1 as the repository prints them; _384: fine-tuned at 384 pixels, _22k: after pre-training on
# ImageNet-22k (the same networks, files convnext_*_22k_1k_*.pth). box/mask AP: COCO Mask R-CNN 3x, cascade_: Cascade
# Mask R-CNN 3x; miou, miou_ms: ADE20K UPerNet at one and at several scales
FAMILY = Family(
    name="convnext",
    model=ConvNeXt,
    paper="A ConvNet for the 2020s",
    venue="CVPR 2022",
    arxiv="2201.03545",
    code="github.com/facebookresearch/ConvNeXt",
    licence="MIT",
    variants={
        "convnext_tiny": _pyramid(
            "convnext_tiny_1k_224_ema", 96, 9, 0.1, 28.6, 4.5, 82.1, top1_22k=82.9, top1_22k_384=84.1, box_ap=46.2,
            mask_ap=41.7, cascade_box_ap=50.4, cascade_mask_ap=43.7, miou=46.0, miou_ms=46.7,
        ),
        "convnext_small": _pyramid(
            "convnext_small_1k_224_ema", 96, 27, 0.4, 50, 8.7, 83.1, top1_22k=84.6, top1_22k_384=85.8,
            cascade_box_ap=51.9, cascade_mask_ap=45.0, miou=48.7, miou_ms=49.6,
        ),
        "convnext_base": _pyramid(
            "convnext_base_1k_224_ema", 128, 27, 0.5, 89, 15.4, 83.8, top1_384=85.1, gmacs_384=45.0, top1_22k=85.8,
            top1_22k_384=86.8, cascade_box_ap=52.7, cascade_mask_ap=45.6, cascade_box_ap_22k=54.0,
            cascade_mask_ap_22k=46.9, miou=49.1, miou_ms=49.9, miou_22k=52.6, miou_ms_22k=53.1,
        ),
        "convnext_large": _pyramid(
            "convnext_large_1k_224_ema", 192, 27, 0.5, 198, 34.4, 84.3, top1_384=85.5, gmacs_384=101, top1_22k=86.6,
            top1_22k_384=87.5, cascade_box_ap_22k=54.8, cascade_mask_ap_22k=47.6, miou_22k=53.2, miou_ms_22k=53.7,
        ),
        "convnext_xlarge": _pyramid(
            "convnext_xlarge_22k_1k_224_ema", 256, 27, 0.2, 350, 60.9, top1_22k=87.0, top1_22k_384=87.8, gmacs_384=179,
            cascade_box_ap_22k=55.2, cascade_mask_ap_22k=47.7, miou_22k=53.6, miou_ms_22k=54.0,
        ),
        "convnext_isotropic_small": _isotropic("small", 384, 18, 0.1, 22, 4.3, 78.7),
        "convnext_isotropic_base": _isotropic("base", 768, 18, 0.2, 87, 16.9, 82.0),
        "convnext_isotropic_large": _isotropic("large", 1024, 36, 0.5, 306, 59.7, 82.6, scale=1e-6),
    },
)  # fmt: skip
