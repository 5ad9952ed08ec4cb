"""MobileNetV2: Inverted Residuals and Linear Bottlenecks (CVPR 2018, arXiv 1801.04381). The authors' code is in
TensorFlow; names and numbers here are torchvision's (BSD-3-Clause), which hosts weights for the width 1.0.

Blocks are thin at both ends and wide in between: expand, filter each channel by itself, project. Residuals join the
thin ends, which have no activation, because a ReLU would destroy what little they hold.

Unusual here: ReLU6; every width is rounded to a multiple of 8 (never below 0.9 of it); the last layer is not narrowed
with the rest; the first block does not expand. Strided convolutions pad evenly; weights of the TensorFlow code need
another padding and another eps.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Conv, ConvNorm, InvertedResidual, make_divisible
from ..registry import Family, Inputs, Variant, Weights

# per stage, which ends where a map is read: (expansion, width, repeats, stride of the first), Table 2
STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 2)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
_FIRST = (1, 4, 7, 14)  # official number of each stage's first block


class MobileNetV2(Backbone):
    """A stem at stride 2 and four stages at strides 4 to 32 (Table 2), `width` times as wide."""

    OFFICIAL = (
        (r"^(stem|neck)\.(conv|norm)\.", lambda m: f"features.{0 if m[1] == 'stem' else 18}.{int(m[2] == 'norm')}."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"features.{_FIRST[int(m[1])] + int(m[2])}."),
        (r"^features\.1\.depthwise\.(conv|norm)\.", lambda m: f"features.1.conv.0.{int(m[1] == 'norm')}."),
        (r"^features\.1\.project\.(conv|norm)\.", lambda m: f"features.1.conv.{1 + (m[1] == 'norm')}."),
        (r"\.expand\.(conv|norm)\.", lambda m: f".conv.0.{int(m[1] == 'norm')}."),
        (r"\.depthwise\.(conv|norm)\.", lambda m: f".conv.1.{int(m[1] == 'norm')}."),
        (r"\.project\.(conv|norm)\.", lambda m: f".conv.{2 + (m[1] == 'norm')}."),
        (r"^head\.", "classifier.1."),
    )

    def __init__(self, *, width: float = 1.0, **contract: Any):
        super().__init__(**contract)
        if width <= 0:
            raise ValueError(f"width must be positive, got {width!r}")
        ndim, dim = self.ndim, make_divisible(32 * width)
        self.stem = ConvNorm(ndim, self.in_chans, dim, 3, 2, act=nn.ReLU6)
        self.stages, ends = nn.ModuleList(), []
        for rows in STAGES:
            blocks = []
            for expansion, channels, repeats, first in rows:
                out = make_divisible(channels * width)
                for i in range(repeats):
                    blocks.append(InvertedResidual(ndim, dim, out, 3, 1 if i else first, expansion))
                    dim = out
            self.stages.append(Stage(blocks))
            ends.append(dim)
        self.describe(ends, [4, 8, 16, 32])
        last = make_divisible(1280 * max(1.0, width))
        if not self.features_only:
            self.neck = ConvNorm(ndim, dim, last, act=nn.ReLU6)
        self.make_head(last)
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


def _variant(width: float, params: float, gmacs: float, top1: float, file: str = "", **more) -> Variant:
    figures = dict(params_m=params, gmacs=gmacs, top1=top1) | more
    where = Weights(f"https://download.pytorch.org/models/{file}.pth", "BSD-3-Clause", "direct") if file else Weights()
    return Variant(dict(width=width), figures, Inputs(224, interpolation="bilinear"), where)


FAMILY = Family(
    name="mobilenet_v2",
    model=MobileNetV2,
    paper="MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    venue="CVPR 2018",
    arxiv="1801.04381",
    code="github.com/tensorflow/models (TensorFlow); torchvision",
    licence="BSD-3-Clause",
    # params_m as torchvision or the TensorFlow table has them (the paper prints 3.4, and 6.9 for 1.4), top1 of the
    # paper or the TensorFlow table
    variants={
        "mobilenet_v2": _variant(1.0, 3.50, 0.300, 72.0, "mobilenet_v2-b0353104", top1_torchvision=71.878),
        "mobilenet_v2_w0_35": _variant(0.35, 1.68, 0.059, 60.3),
        "mobilenet_v2_w0_5": _variant(0.5, 1.97, 0.097, 65.4),
        "mobilenet_v2_w0_75": _variant(0.75, 2.64, 0.209, 69.8),
        "mobilenet_v2_w1_3": _variant(1.3, 5.39, 0.509, 74.4),
        "mobilenet_v2_w1_4": _variant(1.4, 6.11, 0.585, 74.7),
    },
)
