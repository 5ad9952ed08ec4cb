"""Super Token ViT: Vision Transformer with Super Token Sampling (CVPR 2023, arXiv 2211.11167).
Official code: github.com/hhb072/STViT, MIT.

As superpixels stand for pixels, super tokens stand for the tokens around them: in the first two stages tokens are
shared out over the super tokens nearby, attention runs among those, and every token reads the result back with the same
weights. So high resolutions get global attention early; the last two stages attend to all tokens directly.

Unusual here: GELU comes before batch norm in the stem; a batch norm, not a layer norm, stands before the MLP, which
has a second residual around its depthwise convolution; queries, keys and values are packed head by head. Layer scale
is in the last two stages of the larger models only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import BatchNorm, Block, Conv, ConvNorm, LayerScale, Mlp, ResidualConv, drop_path_rates
from ..mixers import SuperTokenAttention
from ..registry import Family, Inputs, Variant, Weights


class SuperTokenBlock(Block):
    """Position convolution, super token attention, convolutional MLP (section 3.1): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim, dim, heads, size, iterations, mlp_ratio, drop_path, scale):
        attn, hidden = SuperTokenAttention(ndim, dim, heads, size, iterations), int(dim * mlp_ratio)
        middle = nn.Sequential(nn.GELU(), ResidualConv(ndim, hidden))  # section 3.1, convolutional feed-forward
        mlp = Mlp(dim, hidden, act=nn.Identity, middle=middle, linear=partial(Conv, ndim))
        super().__init__(dim, attn, mlp, drop_path, eps=1e-6, position=ResidualConv(ndim, dim))
        self.norm2 = BatchNorm(dim)
        if scale is not None:
            self.scale1, self.scale2 = (LayerScale(dim, scale, (1, dim, *(1,) * ndim)) for _ in range(2))


class SuperTokenViT(Backbone):
    """Four stages (section 3.1). `sizes`, `iterations` and `scales` (layer scale, None for none) are per stage."""

    OFFICIAL = (
        (r"^patch_embed\.", "patch_embed.proj."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.proj."),
        (r"\.downsample\.proj\.(conv|norm)\.", lambda m: f".downsample.proj.{int(m[1] == 'norm')}."),
        (r"^stages\.", "layers."),
        (r"\.position\.", ".pos_embed."),
        (r"\.norm1\.", ".norm1.norm."),
        (r"\.attn\.", ".attn.stoken_refine."),
        (r"\.mlp\.middle\.1\.", ".mlp2.conv."),
        (r"\.mlp\.", ".mlp2."),
        (r"\.scale(\d)\.gamma$", r".gamma_\1"),
        (r"^neck\.conv\.", "proj."),
        (r"^neck\.norm\.", "norm."),
    )
    CONSTANT = (r"\.attn\.(un)?fold\.weights$",)

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        sizes: Sequence[int] = (8, 4, 1, 1),
        iterations: Sequence[int] = (1, 1, 1, 1),
        scales: Sequence[float | None] = (None, None, None, None),
        mlp_ratio: float = 4.0,
        neck: int = 1024,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, count = self.ndim, len(depths)
        given = dict(dims=dims, heads=heads, sizes=sizes, iterations=iterations, scales=scales)
        for name, value in given.items():
            if len(value) != count:
                raise ValueError(f"{name} needs one entry for each of the {count} stages, got {value!r}")
        widths = (self.in_chans, dims[0] // 2, dims[0] // 2, dims[0], dims[0])
        stem: list[nn.Module] = []
        for i, out in enumerate(widths[1:]):
            stem += [Conv(ndim, widths[i], out, 3, 2 - i % 2), nn.GELU(), BatchNorm(out)]
        self.patch_embed = nn.Sequential(*stem)
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            rest = (heads[i], sizes[i], iterations[i], mlp_ratio)
            blocks = [SuperTokenBlock(ndim, dim, *rest, rate, scales[i]) for rate in rates[i]]
            self.stages.append(Stage(blocks, down=ConvNorm(ndim, dims[i - 1], dim, 3, 2, bias=True) if i else None))
        self.describe(dims, [4 * 2**i for i in range(count)])
        if not self.features_only:
            self.neck = ConvNorm(ndim, dims[-1], neck, act=nn.SiLU, bias=True)
        self.make_head(neck)
        self.init_weights()

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


def _variant(name, dims, depths, heads, scale, drop_path, params, gmacs, top1, **more) -> Variant:
    config = dict(dims=dims, depths=depths, heads=heads, scales=(None, None, scale, scale))
    figures = dict(params_m=params, gmacs=gmacs[0], top1=top1[0], drop_path=drop_path)
    figures |= dict(gmacs_384=gmacs[1], top1_384=top1[1]) | more
    where = (
        f"stvit-{name}-224.pth and stvit-{name}-384.pth, Google Drive folder in the README of github.com/hhb072/STViT"
    )
    return Variant(config, figures, Inputs(), Weights(where, "MIT", "manual"))


FAMILY = Family(
    name="svit",
    model=SuperTokenViT,
    paper="Vision Transformer with Super Token Sampling",
    venue="CVPR 2023",
    arxiv="2211.11167",
    code="github.com/hhb072/STViT",
    licence="MIT",
    # as the repository prints them, at 224 pixels and fine-tuned at 384; box/mask AP (COCO) and miou (ADE20K): abstract
    variants={
        "svit_small": _variant(
            "small", (64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), None, 0.1, 25, (4.4, 14.1), (83.6, 85.0)
        ),
        "svit_base": _variant(
            "base", (96, 192, 384, 512), (4, 6, 14, 6), (2, 3, 6, 8), 1e-6, 0.4, 52, (9.9, 32.5), (84.8, 86.0)
        ),
        "svit_large": _variant(
            "large", (96, 192, 448, 640), (4, 7, 19, 8), (2, 3, 7, 10), 1e-6, 0.6, 95, (15.6, 49.7), (85.3, 86.4),
            box_ap=53.9, mask_ap=46.8, miou=51.9,
        ),
    },
)  # fmt: skip
