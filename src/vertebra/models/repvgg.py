"""RepVGG: Making VGG-style ConvNets Great Again (CVPR 2021, arXiv 2101.03697).
Official code: github.com/DingXiaoH/RepVGG, MIT.

A plain stack of 3x3 convolutions and ReLU, made trainable by two parallel branches (1x1 and identity, each with its
batch norm) that fold into the 3x3 kernel afterwards: ``vertebra.fuse`` gives the published inference network.

Unusual here: the identity is a batch norm, not a bare skip; the stem is never wider than 64; every second block counted
over the whole network, not within its stage, has grouped convolutions; D2se puts its squeeze-excitation before the
ReLU. RepVGGplus (squeeze-excitation after it, auxiliary heads) is not in the paper and not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Branches, SqueezeExcite
from ..registry import Family, Inputs, Variant, Weights


class Block(nn.Module):
    """RepVGG block (Fig. 2): ReLU(SE(dense(x) + one(x) + identity(x))), (B, *S, dim) -> (B, *ceil(S / stride), out).

    The identity exists where the shape allows. After `fuse` the three branches are one convolution with a bias.
    """

    def __init__(self, ndim: int, dim: int, out: int, stride: int, groups: int, squeeze: bool):
        super().__init__()
        same = dim == out and stride == 1
        self.reparam = Branches(ndim, dim, out, {"dense": 3, "1x1": 1}, stride, groups, identity=same)
        self.se = SqueezeExcite(ndim, out, out // 16) if squeeze else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.se(self.reparam(x)))


class RepVGG(Backbone):
    """Five stages (Table 2), the first being the stem of one block: `widths` has five entries, `blocks` the later four.

    `groups` apply to the blocks 2, 4, 6 ... counted from the stem, which is block 0.
    """

    OFFICIAL = (
        (r"^stem\.", "stage0."),
        (r"^stages\.(\d+)\.blocks", lambda m: f"stage{int(m[1]) + 1}"),
        (r"\.reparam\.(dense|1x1|identity)\.", r".rbr_\1."),
        (r"\.norm\.", ".bn."),
        (r"\.reparam\.", ".rbr_reparam."),
        (r"^head\.", "linear."),
    )

    def __init__(
        self,
        *,
        blocks: Sequence[int],
        widths: Sequence[int],
        groups: int = 1,
        squeeze: bool = False,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        self.stem = Block(ndim, in_chans, widths[0], 2, 1, squeeze)
        self.stages, dim, index = nn.ModuleList(), widths[0], 0
        for width, depth in zip(widths[1:], blocks, strict=True):
            stage = []
            for j in range(depth):
                index += 1
                stage.append(Block(ndim, dim, width, 1 if j else 2, 1 if index % 2 else groups, squeeze))
                dim = width
            self.stages.append(Stage(stage))
        self.describe(widths[1:], [4 * 2**i for i in range(len(blocks))])
        self.make_head()

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)


_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)


def _variant(blocks, a, b, train, deploy, gmacs=None, top1=None, **more) -> Variant:
    widths = (min(64, int(64 * a)), int(64 * a), int(128 * a), int(256 * a), int(512 * b))
    config = dict(blocks=blocks, widths=widths) | {k: more.pop(k) for k in ("groups", "squeeze") if k in more}
    figures = dict(params_m=train, params_deploy_m=deploy, gmacs=gmacs, top1=top1) | more
    where = "README of github.com/DingXiaoH/RepVGG (Google Drive, Baidu): RepVGG-*-train.pth, the training structure"
    figures = {k: v for k, v in figures.items() if v is not None}
    return Variant(config, figures, Inputs(interpolation="bilinear"), Weights(where, "MIT", "manual"))


FAMILY = Family(
    name="repvgg",
    model=RepVGG,
    paper="RepVGG: Making VGG-style ConvNets Great Again",
    venue="CVPR 2021",
    arxiv="2101.03697",
    code="github.com/DingXiaoH/RepVGG",
    licence="MIT",
    # params_m: the training structure, counted; params_deploy_m and gmacs: the fused network, as the paper prints them
    # (counted for b2g2, b3g2 and d2se, which it leaves out); B3 and B3g4 were trained for 200 epochs with AutoAugment
    variants={
        "repvgg_a0": _variant(_A, 0.75, 2.5, 9.109, 8.30, 1.4, 72.41),
        "repvgg_a1": _variant(_A, 1, 2.5, 14.092, 12.78, 2.4, 74.46),
        "repvgg_a2": _variant(_A, 1.5, 2.75, 28.211, 25.49, 5.1, 76.48),
        "repvgg_b0": _variant(_B, 1, 2.5, 15.818, 14.33, 3.1, 75.14),
        "repvgg_b1": _variant(_B, 2, 4, 57.415, 51.82, 11.8, 78.37),
        "repvgg_b1g2": _variant(_B, 2, 4, 45.782, 41.36, 8.8, 77.78, groups=2),
        "repvgg_b1g4": _variant(_B, 2, 4, 39.966, 36.12, 7.3, 77.58, groups=4),
        "repvgg_b2": _variant(_B, 2.5, 5, 89.022, 80.31, 18.4, 78.78),
        "repvgg_b2g2": _variant(_B, 2.5, 5, 70.846, 63.957, groups=2),
        "repvgg_b2g4": _variant(_B, 2.5, 5, 61.758, 55.77, 11.3, 78.50, groups=4),
        "repvgg_b3": _variant(_B, 3, 5, 123.085, 110.96, 26.2, 80.52),
        "repvgg_b3g2": _variant(_B, 3, 5, 96.912, 87.405, groups=2),
        "repvgg_b3g4": _variant(_B, 3, 5, 83.825, 75.62, 16.1, 80.21, groups=4),
        "repvgg_d2se": _variant(_D, 2.5, 5, 133.335, 120.388, top1=81.82, squeeze=True, top1_320=83.55),
    },
)
