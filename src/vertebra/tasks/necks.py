"""What lies between a pyramid of feature maps and a detection head: the feature pyramid network, and its anchors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork

from ..layers.space import channels_first
from ..layers.space import conv as space_conv

TOPS = ("pool", "input", "output")


class FPN(FeaturePyramidNetwork):
    """Feature Pyramid Networks (arXiv 1612.03144): maps (B, channels[i], *S_i) -> dict of (B, out, *S'_i).

    torchvision's network and parameters, for levels at every power of two from stride `first` to `last`. Those that the
    backbone lacks at the fine end are made from its finest lateral by 2x2 transposed convolutions of stride two, as
    LightViT (arXiv 2207.05557) does for its three stages, and then take part like the others. Those missing at the
    coarse end come, by `top`, from every second cell of the last output ("pool", Faster R-CNN), or from 3x3
    convolutions of stride two that begin at the backbone's last map ("input", RetinaNet, arXiv 1708.02002) or at the
    last output ("output", FCOS, arXiv 1904.01355), with a ReLU between them.

    The result's keys are "0", "1", ... from fine to coarse, at `strides`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        out: int = 256,
        first: int = 4,
        last: int = 64,
        top: str = "pool",
    ):
        if top not in TOPS:
            raise ValueError(f"top must be one of {', '.join(TOPS)}, got {top!r}")
        kept = [i for i, s in enumerate(strides) if s >= first]
        if not kept:
            raise ValueError(f"maps at strides {tuple(strides)} leave nothing at stride {first} or coarser")
        super().__init__([channels[i] for i in kept], out)
        self.kept, self.top, self.out_channels = kept, top, out
        finest, coarsest = strides[kept[0]], strides[kept[-1]]
        above = (finest // first).bit_length() - 1
        below = max((last // coarsest).bit_length() - 1, 0)
        self.finer = nn.ModuleList(nn.ConvTranspose2d(out, out, 2, 2) for _ in range(above))
        for _ in range(above):
            self.layer_blocks.insert(0, type(self.layer_blocks[0])(out, out, 3, norm_layer=None, activation_layer=None))
        self.pooled = below if top == "pool" else 0
        start = channels[kept[-1]] if top == "input" else out
        convs = 0 if top == "pool" else below
        self.coarser = nn.ModuleList(nn.Conv2d(out if k else start, out, 3, 2, 1) for k in range(convs))
        for module in (*self.layer_blocks[:above].modules(), *self.finer, *self.coarser):
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        levels = [first << k for k in range(above)] + [strides[i] for i in kept]
        self.strides = (*levels, *(coarsest << (k + 1) for k in range(below)))

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:  # a list, where torchvision's takes a dict
        maps = [maps[i] for i in self.kept]
        laterals = [block(x) for block, x in zip(self.inner_blocks, maps, strict=True)]
        for up in self.finer:
            laterals.insert(0, up(laterals[0]))
        for i in range(len(laterals) - 2, -1, -1):
            laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[-2:], mode="nearest")
        outs = [block(x) for block, x in zip(self.layer_blocks, laterals, strict=True)]
        for _ in range(self.pooled):
            outs.append(outs[-1][..., ::2, ::2])
        x = maps[-1] if self.top == "input" else outs[-1]
        for k, conv in enumerate(self.coarser):
            x = F.relu(x) if k else x
            # not the module's own call: on narrow maps torch's bfloat16 convolution reads memory that is not its own
            x = channels_first(space_conv(x.movedim(1, -1), conv.weight, conv.bias, (2, 2), (1, 1), (1, 1)))
            outs.append(x)
        return OrderedDict((str(k), v) for k, v in enumerate(outs))


class Anchors(AnchorGenerator):
    """Anchors of `scale` times the stride, in `octaves` sizes an octave apart in all, at the aspect `ratios` (h / w).

    torchvision's, but for three things that its generator takes from the input and that then go wrong: a level's stride
    is the given one (not the image's size over the map's, which is off where a coarse map is rounded up), sizes are not
    rounded, and coordinates are float32 even where the maps are of half precision.
    """

    def __init__(
        self, strides: Sequence[int], scale: float, octaves: int = 1, ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ):
        sizes = tuple(tuple(scale * s * 2 ** (k / octaves) for k in range(octaves)) for s in strides)
        super().__init__(sizes, (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=None) -> Tensor:
        """(ratios * sizes, 4): boxes around the origin, sizes varying fastest."""
        size = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        h, w = (root[:, None] * size).flatten() / 2, (size / root[:, None]).flatten() / 2
        return torch.stack([-w, -h, w, h], 1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors (N, 4) of each image, level by level; cell (0, 0) is at the image's corner."""
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        step = torch.tensor(self.strides, dtype=torch.int64, device=device)
        grids = [list(x.shape[-2:]) for x in feature_maps]
        found = torch.cat(self.grid_anchors(grids, [[s, s] for s in step[: len(grids)]]))
        return [found for _ in image_list.image_sizes]
