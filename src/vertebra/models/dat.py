"""DAT: Vision Transformer with Deformable Attention (CVPR 2022, arXiv 2201.00520) and DAT++: Spatially Dynamic Vision
Transformer with Deformable Attention (arXiv 2309.01430). Official code: github.com/LeapLabTHU/DAT, Apache-2.0.

Attention reads its keys and values at a few places that the input itself chooses, the same for all queries of a group.
Blocks of it alternate with local ones: windows and shifted windows in DAT, neighbourhoods in DAT++, which also has
convolutional patches, a convolution before each block and another in its MLP.

Unusual here: windows shift by 4 of 7 cells, not 3; the two generations differ in the formula of deformable attention
(see its module), so that weights run only with their own; where the official windows must divide the map, here it is
padded and padded keys are masked. A ragged end is cut off by DAT's patches, as by theirs, and kept by DAT++'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage
from ..layers import Block, Conv, Mlp, PatchEmbed, ResidualConv, built_grid, drop_path_rates
from ..mixers import DeformableAttention, NeighborhoodAttention, WindowAttention
from ..registry import Family, Inputs, Variant, Weights

_NAMES: Rules = (
    (r"^patch_embed\.(\d+)\.proj\.", lambda m: f"patch_proj.{3 * int(m[1]) // 2}."),
    (r"^patch_embed\.(\d+)\.norm\.", lambda m: f"patch_proj.{3 * int(m[1]) // 2 + 1}.norm."),
    (r"^stages\.(\d+)\.down\.proj\.", lambda m: f"down_projs.{int(m[1]) - 1}.0."),
    (r"^stages\.(\d+)\.down\.norm\.", lambda m: f"down_projs.{int(m[1]) - 1}.1.norm."),
    (r"\.blocks\.(\d+)\.norm([12])\.", lambda m: f".layer_norms.{2 * int(m[1]) + int(m[2]) - 1}.norm."),
    (r"\.blocks\.(\d+)\.position\.conv\.", r".local_perception_units.\1."),
    (r"\.blocks\.(\d+)\.(attn|mlp)\.", r".\2s.\1."),
    (r"\.conv_offset\.1\.", ".conv_offset.1.norm."),
    (r"\.pos\.table$", ".relative_position_bias_table"),
    (r"\.table$", ".rpe_table"),
    (r"^(norm|head)\.", lambda m: {"norm": "cls_norm.norm.", "head": "cls_head."}[m[1]]),
    (r"^output_norms\.(\d+)\.", r"norms.\1.norm."),
)


class DAT(Backbone):
    """The pyramid of Fig. 3. `spec` has each stage's kinds of attention, repeated over its blocks.

    L windows, S shifted windows, N neighbourhood, D deformable with the stage's `groups`, `strides` and `kernels`.
    Tables of D are built for `img_size`; any input fits.
    """

    OFFICIAL: ClassVar[Rules] = (
        *_NAMES,
        (r"\.(qkv|proj)\.(weight|bias)$", lambda m: f".proj_{m[1].replace('proj', 'out')}.{m[2]}"),
        (r"\.fc([12])\.", r".chunk.linear\1."),
    )
    CONSTANT: ClassVar[Sequence[str]] = (r"\.relative_position_index$", r"\.attn_mask$")
    offset_range: ClassVar[float | None] = 2.0

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        spec: Sequence[str],
        groups: Sequence[int],
        strides: Sequence[int] = (1, 1, 1, 1),
        kernels: Sequence[int] = (9, 7, 5, 3),
        window: int = 7,
        mlp_ratio: float = 4.0,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim
        wrong = sorted(set("".join(spec)) - set("LSND"))
        if wrong or len(spec) != len(depths) or not all(spec):
            raise ValueError(f"spec needs letters of L, S, N, D for each of {len(depths)} stages, got {tuple(spec)}")
        self.patch_embed = self.stem(dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        self.stages = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            grid = built_grid(img_size, ndim, 4 * 2**i)
            makers: dict[str, Any] = {
                "L": partial(WindowAttention, ndim, dim, heads[i], window, mask_keys=True),
                "S": partial(WindowAttention, ndim, dim, heads[i], window, (window + 1) // 2, mask_keys=True),
                "N": partial(NeighborhoodAttention, ndim, dim, heads[i], window),
                "D": partial(
                    DeformableAttention, ndim, dim, heads[i], groups[i], grid, kernels[i], strides[i], self.offset_range
                ),
            }
            kinds = [makers[spec[i][j % len(spec[i])]] for j in range(depth)]
            blocks = [self.block(dim, make(), int(dim * mlp_ratio), r) for make, r in zip(kinds, rates[i], strict=True)]
            self.stages.append(Stage(blocks, down=self.merge(dims[i - 1], dim) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(depths))])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(dim) for dim in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()

    def stem(self, dim: int) -> nn.Module:
        """Image -> first map: (B, *S, in_chans) -> (B, *S / 4, dim)."""
        return nn.Sequential(PatchEmbed(self.ndim, self.in_chans, dim, 4, norm=nn.LayerNorm(dim)))

    def merge(self, dim: int, out: int) -> nn.Module:
        """Between stages: (B, *S, dim) -> (B, *S / 2, out)."""
        return PatchEmbed(self.ndim, dim, out, 2, norm=nn.LayerNorm(out), bias=False)

    def block(self, dim: int, attn: nn.Module, hidden: int, drop_path: float) -> nn.Module:
        return Block(dim, attn, Mlp(dim, hidden), drop_path)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


class DATPlusPlus(DAT):
    """DAT++: overlapping patches, a local perception unit before each block and a convolution in its MLP."""

    OFFICIAL = (*_NAMES, (r"\.fc([12])\.", r".linear\1.0."), (r"\.middle\.conv\.", ".dwc."))
    CONSTANT = ()
    offset_range = None

    def stem(self, dim: int) -> nn.Module:
        half = dim // 2
        first = PatchEmbed(self.ndim, self.in_chans, half, 3, 2, nn.LayerNorm(half))
        return nn.Sequential(first, nn.GELU(), PatchEmbed(self.ndim, half, dim, 3, 2, nn.LayerNorm(dim)))

    def merge(self, dim: int, out: int) -> nn.Module:
        return PatchEmbed(self.ndim, dim, out, 3, 2, nn.LayerNorm(out), bias=False)

    def block(self, dim: int, attn: nn.Module, hidden: int, drop_path: float) -> nn.Module:
        mlp = Mlp(dim, hidden, middle=ResidualConv(self.ndim, hidden), linear=partial(Conv, self.ndim))
        return Block(dim, attn, mlp, drop_path, position=ResidualConv(self.ndim, dim))


_DEEP = (2, 2, 18, 2)
_WINDOWS = dict(spec=("LS", "LS", "LD", "LD"))
_PLUS = dict(model=DATPlusPlus, spec=("ND", "ND", "ND", "D"), depths=(2, 4, 18, 2), strides=(8, 4, 2, 1))


def _variant(name, dim, heads, groups, size, drop_path, params, gmacs, top1, depths=_DEEP, **more) -> Variant:
    """`dim` and `heads` are the first stage's; they double from stage to stage."""
    config: dict[str, Any] = dict(depths=depths, **_WINDOWS) if not name.startswith("dat_pp") else dict(_PLUS)
    config |= dict(zip(("dims", "heads"), (tuple(n * 2**i for i in range(4)) for n in (dim, heads)), strict=True))
    config |= dict(groups=groups) | ({} if size == 224 or "pp" in name else dict(window=size // 32))
    place = "OneDrive, Tsinghua Cloud" if "pp" in name else "Google Drive, Tsinghua Cloud"
    file = f"{name.removesuffix('_384')}_in1k_{size}.pth"
    where = Weights(f"README of github.com/LeapLabTHU/DAT ({place}): {file}", "Apache-2.0", "manual")
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | more
    return Variant(config, figures, Inputs(size), where)


# name, width and heads of the first stage, groups per stage, size, drop path, params_m, gmacs and top1 as published,
# two params_m counted to three digits. COCO 3x, of the detection repository: Mask R-CNN box_ap and mask_ap (base:
# Cascade Mask R-CNN).
_TABLE: tuple[tuple[Any, ...], ...] = (
    ("dat_tiny", 96, 3, (1, 1, 3, 6), 224, 0.2, 28.319, 4.6, 82.0, dict(depths=(2, 2, 6, 2))),
    ("dat_small", 96, 3, (1, 1, 3, 6), 224, 0.3, 49.700, 9.0, 83.7, {}),
    ("dat_base", 128, 4, (1, 1, 4, 8), 224, 0.5, 88, 15.8, 84.0, {}),
    ("dat_base_384", 128, 4, (1, 1, 4, 8), 384, 0.5, 88, 49.8, 84.8, {}),
    ("dat_pp_tiny", 64, 2, (1, 2, 4, 8), 224, 0.2, 23.963, 4.3, 83.9, dict(box_ap=50.5, mask_ap=45.1)),
    ("dat_pp_small", 96, 3, (1, 2, 3, 6), 224, 0.4, 53, 9.4, 84.6, dict(box_ap=51.2, mask_ap=45.7)),
    (
        "dat_pp_base", 128, 4, (2, 4, 8, 16), 224, 0.7, 94, 16.6, 84.9,
        dict(cascade_box_ap=54.5, cascade_mask_ap=47.0),
    ),
    ("dat_pp_base_384", 128, 4, (2, 4, 8, 16), 384, 0.6, 94, 49.7, 85.9, {}),
)  # fmt: skip

FAMILY = Family(
    name="dat",
    model=DAT,
    paper="Vision Transformer with Deformable Attention; DAT++: Spatially Dynamic Vision Transformer",
    venue="CVPR 2022; arXiv 2023",
    arxiv="2201.00520, 2309.01430",
    code="github.com/LeapLabTHU/DAT",
    licence="Apache-2.0",
    variants={name: _variant(name, *row, **more) for name, *row, more in _TABLE},
)
