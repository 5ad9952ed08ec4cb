"""ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices (CVPR 2018, arXiv 1707.01083) and
ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design (ECCV 2018, arXiv 1807.11164). Official code:
github.com/megvii-model/ShuffleNet-Series, MIT; torchvision's v2 (BSD-3-Clause) is a network of its own beside it.

1x1 convolutions are most of a small network's cost. v1 groups them and shuffles the channels, so that groups meet. v2
groups nothing: it splits the channels, leaves one half alone, and shuffles after.

Unusual here: v1's shuffle stands behind the depthwise convolution and is the inverse of the usual one, its very first
1x1 convolution has one group, its pooled branch counts zeros and gets no ReLU, and there is no bias anywhere. megvii's
v2 splits into even and odd channels and shuffles nothing; where a stage begins its branches differ in width from
torchvision's; its head has no bias. megvii's weights expect BGR images of 0 to 255.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Conv, ConvNorm, avg_pool, channel_shuffle, max_pool
from ..registry import Family, Inputs, Variant, Weights

DEPTHS = (4, 8, 4)
_STARTS = (0, 0, 4, 12)  # official number of each stage's first block


class Pool(nn.Module):
    """Maximum over 3 cells per axis, every second one: (B, *S, C) -> (B, *ceil(S / 2), C)."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool(x, 3, 2, 1)


class GroupedUnit(nn.Module):
    """v1's unit (Fig. 2b, c): (B, *S, dim) -> (B, *ceil(S / stride), out); at stride 2 the pooled input is joined."""

    def __init__(self, ndim: int, dim: int, out: int, stride: int, groups: int, first: bool = False):
        super().__init__()
        mid = out // 4
        if mid % groups:
            raise ValueError(f"{mid} channels (a quarter of {out}) do not divide into {groups} groups")
        self.stride, self.shuffle = stride, mid // groups
        self.squeeze = ConvNorm(ndim, dim, mid, groups=1 if first else groups, act=nn.ReLU)
        self.depthwise = ConvNorm(ndim, mid, mid, 3, stride, groups=mid)
        self.project = ConvNorm(ndim, mid, out - dim if stride > 1 else out, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(channel_shuffle(self.depthwise(self.squeeze(x)), self.shuffle))
        if self.stride == 1:
            return (x + y).relu()
        return torch.cat([avg_pool(x, 3, 2, 1), y.relu()], -1)


class SplitUnit(nn.Module):
    """v2's unit (Fig. 3c, d): (B, *S, dim) -> (B, *ceil(S / stride), out).

    `interleaved` is megvii's form: split into even and odd channels, and no shuffle.
    """

    def __init__(self, ndim: int, dim: int, out: int, stride: int, interleaved: bool):
        super().__init__()
        self.stride, self.interleaved = stride, interleaved
        enters, half = dim if stride > 1 else dim // 2, out // 2
        self.main = nn.Sequential(
            ConvNorm(ndim, enters, half, act=nn.ReLU),
            ConvNorm(ndim, half, half, 3, stride, groups=half),
            ConvNorm(ndim, half, out - enters if interleaved else half, act=nn.ReLU),
        )
        self.side = None
        if stride > 1:
            thin = ConvNorm(ndim, dim, dim, 3, stride, groups=dim)
            self.side = nn.Sequential(thin, ConvNorm(ndim, dim, dim if interleaved else half, act=nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None:
            kept, made = self.side(x), self.main(x)
        else:
            kept, used = (x[..., ::2], x[..., 1::2]) if self.interleaved else x.chunk(2, -1)
            made = self.main(used)
        if self.interleaved:
            return torch.cat([kept, made], -1)
        return torch.stack([kept, made], -1).flatten(-2)  # joined and shuffled in one copy, a third of the time of two


class ShuffleNet(Backbone):
    """v1: a pooled stem at stride 4, then three stages at strides 8, 16 and 32 (Table 1)."""

    OFFICIAL = (
        (r"^stem\.(conv|norm)\.", lambda m: f"first_conv.{int(m[1] == 'norm')}."),
        (r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"features.{_STARTS[int(m[1])] + int(m[2])}."),
        (r"\.squeeze\.(conv|norm)\.", lambda m: f".branch_main_1.{int(m[1] == 'norm')}."),
        (r"\.depthwise\.(conv|norm)\.", lambda m: f".branch_main_1.{3 + (m[1] == 'norm')}."),
        (r"\.project\.(conv|norm)\.", lambda m: f".branch_main_2.{int(m[1] == 'norm')}."),
        (r"^head\.", "classifier.0."),
    )
    head_bias = False

    def __init__(self, *, stem: int, dims: Sequence[int], groups: int = 1, last: int | None = None, **contract: Any):
        super().__init__(**contract)
        ndim, widths = self.ndim, (stem, *dims)
        self.stem = ConvNorm(ndim, self.in_chans, stem, 3, 2, act=nn.ReLU)
        self.stages = nn.ModuleList([Stage([], down=Pool())])
        for i, depth in enumerate(DEPTHS):
            dim, out = widths[i], widths[i + 1]
            units = [self.unit(dim if j == 0 else out, out, 1 if j else 2, groups, i + j == 0) for j in range(depth)]
            self.stages.append(Stage(units))
        self.describe(widths, [4, 8, 16, 32])
        self.neck: nn.Module = nn.Identity()
        if last and not self.features_only:
            self.neck = ConvNorm(ndim, dims[-1], last, act=nn.ReLU)
        self.make_head(last or dims[-1])
        self.init_weights()

    def unit(self, dim: int, out: int, stride: int, groups: int, first: bool) -> nn.Module:
        """One unit; `first` is the network's first."""
        return GroupedUnit(self.ndim, dim, out, stride, groups, first)

    def _new_head(self) -> nn.Module:
        head = super()._new_head()
        if isinstance(head, nn.Linear) and not self.head_bias:
            head.register_parameter("bias", None)
        return head

    def init_weights(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, Conv):
                nn.init.normal_(module.weight, std=0.01 if name.startswith("stem") else 1 / module.weight.shape[1])
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(features).flatten(1, -2).mean(1)


class ShuffleNetV2Megvii(ShuffleNet):
    """v2 as the authors have it: units that take even channels past odd ones."""

    OFFICIAL = (
        *ShuffleNet.OFFICIAL[:2],
        (r"\.main\.(\d)\.(conv|norm)\.", lambda m: f".branch_main.{(0, 3, 5)[int(m[1])] + (m[2] == 'norm')}."),
        (r"\.side\.(\d)\.(conv|norm)\.", lambda m: f".branch_proj.{2 * int(m[1]) + (m[2] == 'norm')}."),
        (r"^neck\.(conv|norm)\.", lambda m: f"conv_last.{int(m[1] == 'norm')}."),
        (r"^head\.", "classifier.0."),
    )
    interleaved = True

    def unit(self, dim: int, out: int, stride: int, groups: int, first: bool) -> nn.Module:
        return SplitUnit(self.ndim, dim, out, stride, self.interleaved)


class ShuffleNetV2(ShuffleNetV2Megvii):
    """v2 as torchvision has it: halves, then a shuffle; the head has a bias."""

    OFFICIAL = (
        (r"^stem\.(conv|norm)\.", lambda m: f"conv1.{int(m[1] == 'norm')}."),
        (r"^stages\.(\d)\.blocks\.", lambda m: f"stage{int(m[1]) + 1}."),
        (r"\.main\.(\d)\.(conv|norm)\.", lambda m: f".branch2.{(0, 3, 5)[int(m[1])] + (m[2] == 'norm')}."),
        (r"\.side\.(\d)\.(conv|norm)\.", lambda m: f".branch1.{2 * int(m[1]) + (m[2] == 'norm')}."),
        (r"^neck\.(conv|norm)\.", lambda m: f"conv5.{int(m[1] == 'norm')}."),
        (r"^head\.", "fc."),
    )
    head_bias, interleaved = True, False


_MEGVII = Inputs(224, (0.0,) * 3, (1 / 255,) * 3, "BGR", interpolation="bilinear")
_DRIVE = Weights("README of github.com/megvii-model/ShuffleNet-Series (OneDrive; Baidu, code mc24)", "MIT", "manual")


def _v1(stem, dim, groups, params, gmacs, top1) -> Variant:
    config = dict(stem=stem, dims=(dim, 2 * dim, 4 * dim), groups=groups)
    return Variant(config, dict(params_m=params, gmacs=gmacs, top1=top1), _MEGVII, _DRIVE)


def _v2(size: str, params: float, gmacs: float, top1: float, file: str = "") -> Variant:
    dims = dict(x0_5=(48, 96, 192), x1_0=(116, 232, 464), x1_5=(176, 352, 704), x2_0=(244, 488, 976))[size]
    config: dict[str, Any] = dict(stem=24, dims=dims, last=2048 if size == "x2_0" else 1024)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1)
    if not file:
        return Variant(config | dict(model=ShuffleNetV2Megvii), figures, _MEGVII, _DRIVE)
    where = Weights(f"https://download.pytorch.org/models/shufflenetv2_{file}.pth", "BSD-3-Clause", "direct")
    return Variant(config | dict(model=ShuffleNetV2), figures, Inputs(224, interpolation="bilinear"), where)


# stem, first width, groups; params_m, gmacs and top1 as the repositories print them (megvii: 100 minus the error)
FAMILY = Family(
    name="shufflenet",
    model=ShuffleNet,
    paper="ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices; ShuffleNet V2",
    venue="CVPR 2018; ECCV 2018",
    arxiv="1707.01083, 1807.11164",
    code="github.com/megvii-model/ShuffleNet-Series",
    licence="MIT",
    variants={
        "shufflenet_v1_x0_5_g3": _v1(12, 120, 3, 0.7, 0.038, 57.3),
        "shufflenet_v1_x1_0_g3": _v1(24, 240, 3, 1.9, 0.138, 67.8),
        "shufflenet_v1_x1_5_g3": _v1(24, 360, 3, 3.4, 0.292, 71.6),
        "shufflenet_v1_x2_0_g3": _v1(48, 480, 3, 5.4, 0.524, 74.1),
        "shufflenet_v1_x0_5_g8": _v1(16, 192, 8, 1.0, 0.040, 58.8),
        "shufflenet_v1_x1_0_g8": _v1(24, 384, 8, 2.4, 0.138, 68.0),
        "shufflenet_v1_x1_5_g8": _v1(24, 576, 8, 4.3, 0.290, 71.0),
        "shufflenet_v1_x2_0_g8": _v1(48, 768, 8, 6.5, 0.522, 72.9),
        "shufflenet_v2_x0_5": _v2("x0_5", 1.367, 0.04, 60.552, "x0.5-f707e7126e"),
        "shufflenet_v2_x1_0": _v2("x1_0", 2.279, 0.145, 69.362, "x1-5666bf0f80"),
        "shufflenet_v2_x1_5": _v2("x1_5", 3.504, 0.296, 72.996, "x1_5-3c479a10"),
        "shufflenet_v2_x2_0": _v2("x2_0", 7.394, 0.583, 76.230, "x2_0-8be3c8ee"),
        "shufflenet_v2_x0_5_megvii": _v2("x0_5", 1.4, 0.041, 61.1),
        "shufflenet_v2_x1_0_megvii": _v2("x1_0", 2.3, 0.146, 69.4),
        "shufflenet_v2_x1_5_megvii": _v2("x1_5", 3.5, 0.299, 72.6),
        "shufflenet_v2_x2_0_megvii": _v2("x2_0", 7.4, 0.591, 75.0),
    },
)
