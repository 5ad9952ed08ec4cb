"""Focal Self-attention for Local-Global Interactions in Vision Transformers (NeurIPS 2021, arXiv 2107.00641) and the
"Focal-fast" networks of its repository. Official code: github.com/microsoft/Focal-Transformer, MIT.

A token attends finely to its own window and a rim around it, and coarsely, by one summary per window, to a wide
neighbourhood: local and global context at a constant number of keys. The fast form takes the 128 cells and the 128
summaries nearest to a window instead, with a small MLP for the biases.

Unusual here: the rim wraps around the border of the image, unmasked, and 12 of its 132 cells come twice, each with its
own bias; merging is a convolution with a bias, then the norm. Windows are settled when the model is built, from
`img_size` and its smaller side: a stage whose map is no larger than a window gets windows of that side and no rim. For
another input size keep the published `img_size`: any input is padded to fit. The fast form's ties between equally near
cells are settled by a file's own sets where it has them (buffers "topk_cloest_indice"; a file of ours does not keep
them), else as ``torch.topk`` does. No dense code was released: the dense version has the same windows and a norm on
each output.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, Mlp, PatchEmbed, built_grid, drop_path_rates, pad_to
from ..mixers import FocalAttention, FocalFastAttention
from ..registry import Family, Variant, Weights


class FocalTransformer(Backbone):
    """Four stages (section 3.1). `focals` are the summaries seen per axis in each stage, `expand` is the rim's width.

    conv_embed: overlapping convolutions (7x7, then 3x3) instead of patches. top: the fast form, with so many cells and
    summaries per window (`expand` and `focals` mean nothing then).
    """

    OFFICIAL = (
        (r"^stages\.(\d+)\.down\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", "layers."),
        (r"\.attn\.pool\.", ".pool_layers.0."),
        (r"\.attn\.pos\.table$", ".attn.relative_position_bias_table"),
        (r"\.attn\.around$", ".attn.relative_position_bias_table_to_neighbors"),
        (r"\.attn\.far$", ".attn.relative_position_bias_table_to_windows.0"),
        (r"\.attn\.offsets\.", ".attn.coord2rpb_all."),
        (r"^output_norms\.(\d+)", r"norm\1"),
    )
    CONSTANT = (
        r"\.attn\.relative_position_index(_\d+)?$",
        r"\.attn\.valid_ind_rolled$",
        r"\.attn\.window_coords$",
        r"\.topk_cloest_(indice|coords)_\d$",
    )

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        expand: int = 3,
        focals: Sequence[int] = (7, 5, 3, 1),
        top: int | None = None,
        conv_embed: bool = False,
        mlp_ratio: float = 4.0,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim
        grid = built_grid(img_size, ndim, 4)
        if min(grid) < 1:
            raise ValueError(f"img_size must be positive, got {img_size!r}")
        dims = [dim * 2**i for i in range(len(depths))]
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = self._embedding(self.in_chans, dim, 4, 7 if conv_embed else 4)
        self.stages = nn.ModuleList()
        self.grids = []  # of each stage, at `img_size`
        for i, width in enumerate(dims):
            reach, rim = (min(grid), 0) if min(grid) <= window else (window, expand)
            blocks = []
            for rate in rates[i]:
                attn: nn.Module
                if top is None:
                    attn = FocalAttention(ndim, width, heads[i], reach, rim, focals[i])
                else:
                    attn = FocalFastAttention(ndim, width, heads[i], reach, top)
                blocks.append(Block(width, attn, Mlp(width, int(width * mlp_ratio)), rate))
            down = self._embedding(dims[i - 1], width, 2, 3 if conv_embed else 2) if i else None
            self.stages.append(Stage(blocks, down=down))
            self.grids.append(grid)
            grid = tuple((s + 1) // 2 for s in grid)
        self.describe(dims, [4 * 2**i for i in range(len(depths))])
        if self.features_only:
            self.output_norms = nn.ModuleList(nn.LayerNorm(width) for width in dims)
        else:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def _embedding(self, dim: int, out: int, stride: int, kernel: int) -> PatchEmbed:
        return PatchEmbed(
            self.ndim, dim, out, kernel, stride, nn.LayerNorm(out), pad=True, padding=(kernel - stride + 1) // 2
        )

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(pad_to(x, 4))

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)

    def adopt(self, constants: dict[str, torch.Tensor]) -> None:
        sets: dict[Any, dict[str, Tensor]] = {}
        for name, tensor in constants.items():
            found = re.fullmatch(r"layers\.(\d+)\.(?:blocks\.(\d+)\.attn\.)?topk_cloest_indice_([01])", name)
            if found:
                stage, block, level = found.groups()
                for j in range(len(self.stages[int(stage)].blocks)) if block is None else (int(block),):
                    sets.setdefault((int(stage), j), {})[level] = tensor
        for (stage, block), pair in sets.items():
            attn = self.stages[stage].blocks[block].attn
            if len(pair) == 2 and isinstance(attn, FocalFastAttention):
                attn.adopt(self.grids[stage], pair["0"], pair["1"])


_T, _S, _B = (96, (2, 2, 6, 2), 3, 0.2), (96, (2, 2, 18, 2), 3, 0.3), (128, (2, 2, 18, 2), 4, 0.5)
_HOST = "https://projects4jw.blob.core.windows.net/model/focal-transformer/imagenet1k"


def _variant(size, file, params, gmacs, top1, dense=None, **config) -> Variant:
    dim, depths, heads, drop_path = size
    config |= dict(dim=dim, depths=depths, heads=tuple(heads * 2**i for i in range(4)))
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path) | (dense or {})
    # "direct" would promise a download; the host may be gone
    return Variant(config, figures, weights=Weights(f"{_HOST}/{file}-is224-ws7.pth", "MIT", "manual"))


def _dense(box, mask, box3, mask3, retina, retina3, miou, **more) -> dict[str, float]:
    figures = dict(box_ap=box, mask_ap=mask, box_ap_3x=box3, mask_ap_3x=mask3, miou=miou)
    return figures | dict(retinanet_ap=retina, retinanet_ap_3x=retina3) | more


_CONV, _FAST = dict(conv_embed=True), dict(conv_embed=True, top=128)

# params_m, gmacs and top1 as the repository prints them (its GMACs leave out the MLP of offsets of the fast forms: with
# it Focal-fast-T counts 5.4); box/mask AP: COCO Mask R-CNN 1x and 3x; retinanet: RetinaNet; miou: ADE20K UPerNet at one
# scale
FAMILY = Family(
    name="focal_transformer",
    model=FocalTransformer,
    paper="Focal Self-attention for Local-Global Interactions in Vision Transformers",
    venue="NeurIPS 2021",
    arxiv="2107.00641",
    code="github.com/microsoft/Focal-Transformer",
    licence="MIT",
    variants={
        "focal_tiny_patch4_window7_224": _variant(
            _T, "focal-tiny", 28.9, 4.9, 82.2,
            _dense(44.8, 41.0, 47.2, 42.7, 43.7, 45.5, 45.8, cascade_box_ap_3x=51.5),
        ),
        "focal_small_patch4_window7_224": _variant(
            _S, "focal-small", 51.1, 9.4, 83.6, _dense(47.4, 42.8, 48.8, 43.8, 45.6, 47.3, 48.0)
        ),
        "focal_base_patch4_window7_224": _variant(
            _B, "focal-base", 89.8, 16.4, 84.0, _dense(47.8, 43.2, 49.0, 43.7, 46.3, 46.9, 49.0)
        ),
        "focal_tiny_useconv_patch4_window7_224": _variant(_T, "focal-tiny-useconv", 30.8, 5.2, 82.7, **_CONV),
        "focal_small_useconv_patch4_window7_224": _variant(_S, "focal-small-useconv", 53.1, 9.7, 83.8, **_CONV),
        "focal_base_useconv_patch4_window7_224": _variant(_B, "focal-base-useconv", 93.3, 16.8, 84.2, **_CONV),
        "focalv2_tiny_useconv_patch4_window7_224": _variant(_T, "focalv2-tiny-useconv", 30.2, 5.0, 82.4, **_FAST),
        "focalv2_small_useconv_patch4_window7_224": _variant(_S, "focalv2-small-useconv", 51.5, 9.4, 83.6, **_FAST),
        "focalv2_base_useconv_patch4_window7_224": _variant(_B, "focalv2-base-useconv", 91.2, 16.4, 84.0, **_FAST),
    },
)  # fmt: skip
