"""Twins: Revisiting the Design of Spatial Attention in Vision Transformers (NeurIPS 2021, arXiv 2104.13840).
Official code: github.com/Meituan-AutoML/Twins, Apache-2.0.

Two pyramids. PCPVT is PVT with its position tables replaced by one depthwise convolution per stage, so that any size
works. SVT separates spatial attention as depthwise convolution separates filters: attention inside windows (LSA), then
attention of every position to a sub-sampled map (GSA), which joins what the windows kept apart.

Unusual here: positions are encoded after the first block of a stage; two eps values (1e-6 in blocks and outputs, 1e-5
after embeddings and reductions); windows that a map does not fill see zeros there, which take part as keys. The
official segmentation code masks them instead, but only where every side needs padding: `mask_padding` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Attention, Block, Mlp, PatchEmbed, ResidualConv, drop_path_rates, init_fan_out, windows
from ..mixers import SpatialReductionAttention, WindowAttention
from ..registry import Family, Variant, Weights

EPS = 1e-6


class PositionedBlock(Block):
    """Block, then the position encoding generator (PEG, section 3.1 and Fig. 1): (B, *S, C) -> (B, *S, C)."""

    no_decay = ("peg.conv.weight", "peg.conv.bias")

    def __init__(self, ndim: int, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float, eps: float):
        super().__init__(dim, attn, mlp, drop_path, eps)
        self.peg = ResidualConv(ndim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.peg(super().forward(x))


class MaskedWindowAttention(WindowAttention):
    """Windows of the segmentation code: padded keys are masked, unless some side needs no padding: (B, *S, C) -> same.

    There the mask is painted over the last `pad` rows and columns, and the last 0 rows are all rows: then everything
    counts as padding and nothing is masked.
    """

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[1:-1])
        cells = windows(sides, self.window, mask_keys=True, device=x.device)
        if cells.mask is not None:
            pads = [(s + w - 1) // w * w - s for s, w in zip(sides, self.window, strict=True)]
            cells = cells._replace(mask=cells.mask * torch.sym_min(math.prod(pads), 1))
        return cells.join(Attention.forward(self, cells.split(x), cells.bias(None, x.shape[0])), sides)


class Twins(Backbone):
    """The pyramid of Fig. 1 and 2: PCPVT without `window`; with it SVT, whose even blocks attend in windows (eq. 1).

    Odd blocks, in PCPVT all, read keys and values from a map made smaller by the stage's entry of `ratios`. A ragged
    end is cut off by each patch embedding. SVT's dense version ends each stage in a norm, which the next stage reads
    too; PCPVT's gives raw maps. Both keep the classification norm and head, which official dense checkpoints hold,
    unused and frozen.
    """

    OFFICIAL = (
        (r"^patch_embed\.", "patch_embeds.0."),
        (r"^stages\.(\d+)\.down\.", r"patch_embeds.\1."),
        (r"^stages\.(\d+)\.blocks\.0\.peg\.conv\.", r"pos_block.\1.proj.0."),
        (r"^stages\.(\d+)\.blocks\.", r"blocks.\1."),
        (r"^stages\.(\d+)\.norm\.", r"norm_list.\1."),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        mlp_ratios: Sequence[float] = (4, 4, 4, 4),
        ratios: Sequence[int] = (8, 4, 2, 1),
        window: int | None = None,
        mask_padding: bool = False,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        if mask_padding and window is None:
            raise ValueError("mask_padding=True needs windows: PCPVT has none, SVT (window=7) has")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be None or a whole number of at least 1, got {window!r}")
        local = MaskedWindowAttention if mask_padding else WindowAttention
        rates = drop_path_rates(drop_path_rate, depths)
        self.patch_embed = PatchEmbed(ndim, in_chans, dims[0], 4, norm=nn.LayerNorm(dims[0]))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks: list[nn.Module] = []
            for j, rate in enumerate(rates[i]):
                if window and j % 2 == 0:
                    attn: nn.Module = local(ndim, dim, heads[i], window, position=False)
                else:
                    attn = SpatialReductionAttention(ndim, dim, heads[i], ratios[i])
                parts = (dim, attn, Mlp(dim, int(dim * mlp_ratios[i])), rate, EPS)
                blocks.append(Block(*parts) if j else PositionedBlock(ndim, *parts))
            down = PatchEmbed(ndim, dims[i - 1], dim, 2, norm=nn.LayerNorm(dim)) if i else None
            norm = nn.LayerNorm(dim, eps=EPS) if window and self.features_only else None
            self.stages.append(Stage(blocks, down, norm))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.make_head()
        if self.features_only:
            self.head_features, self.head = dims[-1], self._new_head()
            self.norm.requires_grad_(False), self.head.requires_grad_(False)
        self.init_weights()
        init_fan_out(self)

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, state: Tensor) -> Tensor:
        return self.norm(state)


def _variant(kind, width, depths, params, gmacs, top1, drop_path, miou, miou_ms, seg_params, seg_gflops) -> Variant:
    if kind == "pcpvt":
        config = dict(dims=(64, 128, 320, 512), heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4), depths=depths)
    else:
        dims = tuple(width * 2**i for i in range(4))
        config = dict(dims=dims, heads=tuple(d // 32 for d in dims), depths=depths, window=7)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path, miou=miou, miou_ms=miou_ms)
    figures |= dict(upernet_params_m=seg_params, upernet_gflops=seg_gflops)
    where = "README of github.com/Meituan-AutoML/Twins (Google Drive); same names: huggingface.co/timm, twins_*.in1k"
    return Variant(config, figures, weights=Weights(where, "Apache-2.0", "manual"))


# params_m, gmacs and top1 as the repository prints them; drop_path: svt_base's is the repository's, the others (not
# printed there) the paper's for their size; miou, miou_ms (several scales), upernet_*: ADE20K UPerNet, 160k iterations
FAMILY = Family(
    name="twins",
    model=Twins,
    paper="Twins: Revisiting the Design of Spatial Attention in Vision Transformers",
    venue="NeurIPS 2021",
    arxiv="2104.13840",
    code="github.com/Meituan-AutoML/Twins",
    licence="Apache-2.0",
    variants={
        "twins_pcpvt_small": _variant("pcpvt", 64, (3, 4, 6, 3), 24.1, 3.7, 81.2, 0.2, 46.2, 47.5, 54.6, 234),
        "twins_pcpvt_base": _variant("pcpvt", 64, (3, 4, 18, 3), 43.8, 6.4, 82.7, 0.3, 47.1, 48.4, 74.3, 250),
        "twins_pcpvt_large": _variant("pcpvt", 64, (3, 8, 27, 3), 60.9, 9.5, 83.1, 0.5, 48.6, 49.8, 91.5, 269),
        "twins_svt_small": _variant("svt", 64, (2, 2, 10, 4), 24, 2.8, 81.7, 0.2, 46.2, 47.1, 54.4, 228),
        "twins_svt_base": _variant("svt", 96, (2, 2, 18, 2), 56, 8.3, 83.2, 0.3, 47.4, 48.9, 88.5, 261),
        "twins_svt_large": _variant("svt", 128, (2, 2, 18, 2), 99.2, 14.8, 83.7, 0.5, 48.8, 50.2, 133, 297),
    },
)
