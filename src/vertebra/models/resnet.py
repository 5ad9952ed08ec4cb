"""Deep Residual Learning for Image Recognition (CVPR 2016, arXiv 1512.03385), with ResNeXt (arXiv 1611.05431) and Wide
ResNet (arXiv 1605.07146). Reference: torchvision's models/resnet.py, BSD-3, with the names that most checkpoints have.

Each block learns what to add to its input, so that gradients reach the first layers of very deep networks. ResNeXt
splits the middle convolution of a block into groups, Wide ResNet widens it.

Unusual here: the stride sits in the 3x3 convolution ("v1.5"), the paper and Caffe weights have it in the first 1x1. The
activation comes after the addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Conv, ConvNorm, max_pool
from ..registry import Family, Inputs, Variant, Weights


class Residual(nn.Module):
    """Residual block, the activation after the sum (eq. 1 and 2): (B, *S, dim) -> (B, *S / stride, out).

    The shortcut is the input, or a 1x1 convolution where the shape changes (section 3.3, option B).
    """

    def __init__(self, ndim: int, dim: int, out: int, stride: int):
        super().__init__()
        self.skip = ConvNorm(ndim, dim, out, 1, stride) if stride != 1 or dim != out else nn.Identity()


class Basic(Residual):
    """Two 3x3 convolutions (Fig. 5 left)."""

    expansion = 1

    def __init__(self, ndim, dim, planes, stride=1, dilation=1, groups=1, width_per_group=64):
        super().__init__(ndim, dim, planes, stride)
        if dilation != 1 or groups != 1 or width_per_group != 64:
            raise ValueError("basic blocks have no dilation, groups or other widths: use a bottleneck variant")
        self.conv1 = ConvNorm(ndim, dim, planes, 3, stride, act=nn.ReLU)
        self.conv2 = ConvNorm(ndim, planes, planes, 3, act=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), self.skip(x))


class Bottleneck(Residual):
    """1x1 down, 3x3 with stride, dilation and groups, 1x1 up to four times `planes` (Fig. 5 right)."""

    expansion = 4

    def __init__(self, ndim, dim, planes, stride=1, dilation=1, groups=1, width_per_group=64):
        super().__init__(ndim, dim, 4 * planes, stride)
        width = int(planes * width_per_group / 64) * groups
        self.conv1 = ConvNorm(ndim, dim, width, act=nn.ReLU)
        self.conv2 = ConvNorm(ndim, width, width, 3, stride, dilation=dilation, groups=groups, act=nn.ReLU)
        self.conv3 = ConvNorm(ndim, width, 4 * planes, act=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)), self.skip(x))


class ResNet(Backbone):
    """Stem of stride 4 and four stages (Table 1).

    replace_stride_with_dilation: for stages 2, 3 and 4 whether the stride becomes a dilation of all that follows, which
    keeps the maps large (bottleneck variants only). zero_init_residual: every block starts as its shortcut.
    """

    OFFICIAL = (
        (r"^stem\.conv\.", "conv1."),
        (r"^stem\.norm\.", "bn1."),
        (r"^stages\.(\d+)\.blocks\.", lambda m: f"layer{int(m[1]) + 1}."),
        (r"\.skip\.(conv|norm)\.", lambda m: f".downsample.{int(m[1] == 'norm')}."),
        (r"\.conv(\d)\.conv\.", r".conv\1."),
        (r"\.conv(\d)\.norm\.", r".bn\1."),
        (r"^head\.", "fc."),
    )

    def __init__(
        self,
        *,
        layers: Sequence[int],
        bottleneck: bool = True,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] = (False, False, False),
        zero_init_residual: bool = False,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, in_chans = self.ndim, self.in_chans
        dilate = (False, *replace_stride_with_dilation)
        if len(dilate) != 4 or len(layers) != 4:
            raise ValueError("layers needs four entries and replace_stride_with_dilation three (stages 2, 3 and 4)")
        if any(dilate) and not bottleneck:
            raise ValueError("replace_stride_with_dilation needs bottleneck blocks, basic ones have no dilation")
        self.stem = ConvNorm(ndim, in_chans, 64, 7, 2, act=nn.ReLU)
        kind = Bottleneck if bottleneck else Basic
        self.stages = nn.ModuleList()
        dim, dilation, reduction, reductions = 64, 1, 4, []
        for i, depth in enumerate(layers):
            planes, stride, before = 64 * 2**i, 2 if i else 1, dilation
            if dilate[i]:
                stride, dilation = 1, 2 * dilation
            blocks = []
            for j in range(depth):  # the first block keeps the dilation of the stage before
                step, spread = (1, dilation) if j else (stride, before)
                blocks.append(kind(ndim, dim, planes, step, spread, groups, width_per_group))
                dim = planes * kind.expansion
            self.stages.append(Stage(blocks))
            reduction *= stride
            reductions.append(reduction)
        self.describe([64 * 2**i * kind.expansion for i in range(4)], reductions)
        self.make_head()
        self.init_weights(zero_init_residual)

    def init_weights(self, zero_init_residual: bool = False) -> None:
        """He's normal initialisation by fan out; optionally zero for each block's last norm."""
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Residual) and zero_init_residual:
                nn.init.zeros_((module.conv3 if isinstance(module, Bottleneck) else module.conv2).norm.weight)

    def embed(self, x: Tensor) -> Tensor:
        return max_pool(self.stem(x), 3, 2, padding=1)


_FILES = "https://download.pytorch.org/models"


def _variant(layers, params, gmacs, top1, file, top1_v2=None, file_v2=None, resize=256, **config) -> Variant:
    """`file` ends in the leading digits of its SHA-256; the V2 weights come from a later, longer recipe."""
    figures = dict(params_m=params, gmacs=gmacs, top1=top1)
    if top1_v2:
        figures |= dict(top1_v2=top1_v2, weights_v2=f"{_FILES}/{file_v2}.pth")
    weights = Weights(f"{_FILES}/{file}.pth", "BSD-3-Clause", "direct", file.rpartition("-")[2])
    return Variant(dict(layers=layers) | config, figures, Inputs(crop=224 / resize, interpolation="bilinear"), weights)


_50, _101 = (3, 4, 6, 3), (3, 4, 23, 3)

FAMILY = Family(
    name="resnet",
    model=ResNet,
    paper="Deep Residual Learning for Image Recognition; ResNeXt; Wide Residual Networks",
    venue="CVPR 2016; CVPR 2017; BMVC 2016",
    arxiv="1512.03385, 1611.05431, 1605.07146",
    code="github.com/pytorch/vision",
    licence="BSD-3-Clause",
    # params_m is exact; gmacs and top1 are torchvision's. V2 weights are evaluated at resize 232
    variants={
        "resnet18": _variant((2, 2, 2, 2), 11.689512, 1.814, 69.758, "resnet18-f37072fd", bottleneck=False),
        "resnet34": _variant(_50, 21.797672, 3.664, 73.314, "resnet34-b627a593", bottleneck=False),
        "resnet50": _variant(_50, 25.557032, 4.089, 76.130, "resnet50-0676ba61", 80.858, "resnet50-11ad3fa6"),
        "resnet101": _variant(_101, 44.54916, 7.801, 77.374, "resnet101-63fe2227", 81.886, "resnet101-cd907fc2"),
        "resnet152": _variant(
            (3, 8, 36, 3), 60.192808, 11.514, 78.312, "resnet152-394f9c45", 82.284, "resnet152-f82ba261"
        ),
        "resnext50_32x4d": _variant(
            _50, 25.028904, 4.23, 77.618, "resnext50_32x4d-7cdf4587", 81.198, "resnext50_32x4d-1a0047aa",
            groups=32, width_per_group=4,
        ),
        "resnext101_32x8d": _variant(
            _101, 88.791336, 16.414, 79.312, "resnext101_32x8d-8ba56ff5", 82.834, "resnext101_32x8d-110c445d",
            groups=32, width_per_group=8,
        ),
        "resnext101_64x4d": _variant(
            _101, 83.455272, 15.46, 83.246, "resnext101_64x4d-173b62eb", resize=232, groups=64, width_per_group=4
        ),
        "wide_resnet50_2": _variant(
            _50, 68.88324, 11.398, 78.468, "wide_resnet50_2-95faca4d", 81.602, "wide_resnet50_2-9ba9bcbe",
            width_per_group=128,
        ),
        "wide_resnet101_2": _variant(
            _101, 126.886696, 22.753, 78.848, "wide_resnet101_2-32ee1156", 82.51, "wide_resnet101_2-d733dc28",
            width_per_group=128,
        ),
    },
)  # fmt: skip
