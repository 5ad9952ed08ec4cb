"""RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization (2024, arXiv 2406.16004). Official code:
github.com/suous/RepNeXt, Apache-2.0.

Several reaches at once without attention: the channels of a block are dealt to nothing, a small, a medium and a long
depthwise kernel. The small and medium ones are sums of squares, oblongs and crossed lines in training;
``vertebra.fuse`` merges each sum into one kernel and gives the published inference network.

Unusual here: no norm or activation stands inside the token mixer or between it and the MLP but one batch norm, which
the published network keeps; where a stage begins, the residual starts behind that norm. Two heads, each with its own
batch norm, are averaged whether or not the second was trained by distillation, and become one when fused. The official
dense version keeps batch norms in evaluation mode while it is trained; that is left to the training code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import BatchNorm, Conv, ConvNorm, NextBlock
from ..layers.reparam import fold, folded
from ..mixers import ChunkMixer
from ..mixers.chunk import medium_kernels, small_kernels
from ..registry import Family, Inputs, Variant, Weights


class FoldedConvNorm(ConvNorm):
    """A convolution and its norm that become a plain convolution: (B, *S, dim) -> (B, *S', out)."""

    def fuse(self, published: bool = True) -> Conv:
        return fold(self.conv, self.norm)


def channel_mixer(ndim: int, dim: int, hidden: int) -> nn.Sequential:
    """The MLP with batch norms in the place of biases: (B, *S, C) -> (B, *S, C)."""
    return nn.Sequential(FoldedConvNorm(ndim, dim, hidden), nn.GELU(), FoldedConvNorm(ndim, hidden, dim))


class CopyConv(nn.Module):
    """All channels through a small and through a medium kernel: (B, *S, C) -> (B, *ceil(S / 2), 2 C)."""

    def __init__(self, ndim: int, dim: int):
        super().__init__()
        self.small, self.medium = small_kernels(ndim, dim, 2), medium_kernels(ndim, dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.small(x), self.medium(x)], -1)


class Down(nn.Module):
    """y + mlp(y) with y = norm(copies of x) (Fig. 3): (B, *S, C) -> (B, *ceil(S / 2), 2 C)."""

    def __init__(self, ndim: int, dim: int, ratio: int):
        super().__init__()
        self.mixer, self.norm = CopyConv(ndim, dim), BatchNorm(2 * dim)
        self.mlp = channel_mixer(ndim, 2 * dim, 2 * dim * ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.mixer(x))
        return x + self.mlp(x)


class Classifier(nn.Module):
    """Batch norm, then linear: (B, C) -> (B, classes)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.norm, self.linear = BatchNorm(linear.in_features), linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, in float64, of the one linear layer that equals this."""
        norm, weight = self.norm, self.linear.weight.double()
        gain, shift = folded(torch.ones_like(norm.weight), None, norm)
        return weight * gain, self.linear.bias.double() + weight @ shift


class TwoHeads(nn.Module):
    """One classifier for the label, one for a teacher: (B, C) -> two (B, classes). Fused they are their mean."""

    def __init__(self, head: nn.Linear, head_dist: nn.Linear):
        super().__init__()
        self.head, self.head_dist = Classifier(head), Classifier(head_dist)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.head_dist(x)

    def fuse(self, published: bool = True) -> nn.Linear:
        """The linear layer that gives the mean of both."""
        like = self.head.linear.weight
        merged = nn.Linear(like.shape[1], like.shape[0], device=like.device, dtype=like.dtype)
        (weight, bias), (other, more) = self.head.weights(), self.head_dist.weights()
        with torch.no_grad():
            merged.weight.copy_((weight + other) / 2)
            merged.bias.copy_((bias + more) / 2)
        return merged


class RepNeXt(Backbone):
    """Four stages at strides 4 to 32, each twice as wide as the last (Fig. 3). features_only gives raw maps.

    Outputs: logits, and until it is fused class_logits and dist_logits, whose mean they are.
    """

    OFFICIAL = (
        (r"^stem\.", "stem.stem."),
        (r"\.down\.", ".downsample."),
        (r"\.mlp\.", ".channel_mixer."),
        (r"\.mixer\.", ".token_mixer."),
        (r"\.small\.0\.", ".conv_s.conv_3_3."),
        (r"\.small\.1\.(\d)\.", lambda m: f".conv_s.conv_3_{'whd'[int(m[1])]}."),
        (r"\.small\.2\.", ".conv_s.conv_2_2."),
        (r"\.small\.", ".conv_s."),
        (r"\.medium\.0\.", ".conv_m.conv_7_7."),
        (r"\.medium\.1\.(\d)\.", lambda m: f".conv_m.conv_{('5_3', '3_5', '3_3_5')[int(m[1])]}."),
        (r"\.medium\.([23])\.(\d)\.", lambda m: f".conv_m.conv_{'75'[int(m[1]) - 2]}_{'whd'[int(m[2])]}."),
        (r"\.medium\.", ".conv_m."),
        (r"\.large\.", ".conv_l."),
    )

    def __init__(self, *, dim: int, depths: Sequence[int], mlp_ratio: int = 2, **contract: Any):
        super().__init__(**contract)
        ndim, half = self.ndim, dim // 2
        self.stem = nn.Sequential(
            FoldedConvNorm(ndim, self.in_chans, half, 3, 2), nn.GELU(), FoldedConvNorm(ndim, half, dim, 3, 2)
        )
        self.stages, dims = nn.ModuleList(), [dim * 2**i for i in range(len(depths))]
        for i, (width, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [
                NextBlock(
                    width, ChunkMixer(ndim, width), BatchNorm(width), channel_mixer(ndim, width, width * mlp_ratio)
                )
                for _ in range(depth)
            ]
            self.stages.append(Stage(blocks, down=Down(ndim, width // 2, mlp_ratio) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        self.make_head()

    def _new_head(self) -> nn.Module:
        first, second = super()._new_head(), super()._new_head()
        return TwoHeads(first, second) if isinstance(first, nn.Linear) and isinstance(second, nn.Linear) else first

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def outputs(self, features: Tensor) -> dict[str, Tensor]:
        pooled = self.pre_logits(features)
        if not isinstance(self.head, TwoHeads):
            return {"logits": self.head(pooled)}
        by_class, by_teacher = self.head(pooled)
        return {"logits": (by_class + by_teacher) / 2, "class_logits": by_class, "dist_logits": by_teacher}


_URL = "https://github.com/suous/RepNeXt/releases/download/v1.0"


def _variant(name, dim, depths, params, deploy, gmacs, top1, top1_plain, **more) -> Variant:
    figures = dict(params_m=params, params_deploy_m=deploy, gmacs=gmacs, top1=top1, top1_plain=top1_plain) | more
    where = Weights(f"{_URL}/{name}_distill_300e.pth", "Apache-2.0", "direct")
    return Variant(dict(dim=dim, depths=depths), figures, Inputs(), where)


# dim, depths; params_m: the training structure, counted; params_deploy_m and gmacs: the fused network as the repository
# prints it; top1 with and without distillation, 300 epochs; further top1 of the StarNet recipe, box/mask AP of COCO
# Mask R-CNN 1x, miou of ADE20K Semantic FPN, and milliseconds on an iPhone 12
_TABLE: dict[str, tuple[tuple[Any, ...], dict[str, float]]] = {
    "repnext_m0": (
        (40, (2, 2, 9, 1), 2.716, 2.3, 0.4, 74.2, 72.6),
        dict(top1_starnet=75.4, top1_plain_starnet=73.8, iphone12_ms=0.59),
    ),
    "repnext_m1": (
        (48, (3, 3, 15, 2), 5.323, 4.8, 0.8, 78.8, 77.5),
        dict(top1_starnet=79.7, top1_plain_starnet=77.9, iphone12_ms=0.86),
    ),
    "repnext_m2": (
        (56, (3, 3, 15, 2), 7.049, 6.5, 1.1, 80.1, 78.9),
        dict(top1_starnet=80.6, top1_plain_starnet=78.8, iphone12_ms=1.00),
    ),
    "repnext_m3": (
        (64, (3, 3, 13, 2), 8.467, 7.8, 1.3, 80.7, 79.4),
        dict(box_ap=40.8, mask_ap=37.8, miou=40.6, iphone12_ms=1.11),
    ),
    "repnext_m4": (
        (64, (5, 5, 25, 4), 14.080, 13.3, 2.3, 82.3, 81.2),
        dict(box_ap=42.9, mask_ap=39.1, miou=43.3, iphone12_ms=1.48),
    ),
    "repnext_m5": (
        (80, (7, 7, 35, 2), 22.709, 21.7, 4.5, 83.3, 82.4),
        dict(box_ap=44.7, mask_ap=40.7, miou=45.0, iphone12_ms=2.20),
    ),
}

FAMILY = Family(
    name="repnext",
    model=RepNeXt,
    paper="RepNeXt: A Fast Multi-Scale CNN using Structural Reparameterization",
    venue="arXiv 2024",
    arxiv="2406.16004",
    code="github.com/suous/RepNeXt",
    licence="Apache-2.0",
    variants={name: _variant(name, *row, **more) for name, (row, more) in _TABLE.items()},
)
