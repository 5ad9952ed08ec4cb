"""EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (CVPR 2023, arXiv 2305.07027).
Official code: github.com/microsoft/Cream (EfficientViT), MIT. Another EfficientViT (arXiv 2205.14756) is not here.

One attention layer between many cheap convolutional ones, because attention is bound by memory traffic; and each head
reads its own share of the channels plus the output of the head before it, so that heads differ and deepen one another.

Unusual here: three stages at strides 16, 32 and 64; every convolution has a batch norm and there is no other norm; the
classifier is a batch norm and a linear layer. Position biases know distances only, not directions. A stage whose map
(at `img_size`) is smaller than a window has a table of the map's size, so `img_size` can change the number of
parameters; the dense version always has whole windows and resamples such tables on loading.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage, plus_one
from ..layers import BatchNorm, ConvNorm, SqueezeExcite, conv_norm_channels_first, make_divisible, ntuple
from ..layers.kernels import after
from ..layers.reparam import fold
from ..mixers import CascadedGroupAttention
from ..registry import Family, Variant, Weights


class Unit(ConvNorm):
    """Convolution, batch norm, activation; fused, a plain convolution in their place, as the official code does it.

    The cascade's very sharp softmaxes turn a last digit into the fifth, so that in evaluation the convolutions add up
    in the published order, channels first. Training, half precision and the fused structure run channels last, which is
    faster.
    """

    def ordered(self, x: Tensor) -> bool:
        """Whether `x` is added up in the published order."""
        return not self.training and x.dtype not in (torch.bfloat16, torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        if not self.ordered(x):
            return super().forward(x)
        return after(conv_norm_channels_first(x, self.conv, self.norm), self.act)

    def fuse(self, published: bool = True) -> nn.Module:
        return nn.Sequential(OrderedDict(fused=fold(self.conv, self.norm), act=self.act)).train(self.training)


class NormLinear(nn.Module):
    """The classifier, batch norm and linear: (B, C) -> (B, out)."""

    def __init__(self, dim: int, linear: nn.Linear):
        super().__init__()
        self.norm, self.linear = BatchNorm(dim), linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    def fuse(self, published: bool = True) -> nn.Linear:
        """The linear layer that equals both in evaluation mode."""
        norm, linear = self.norm, self.linear
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight, shift = linear.weight.double(), norm.bias.double() - norm.running_mean.double() * scale
        merged = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        with torch.no_grad():
            merged.weight.copy_(weight * scale)
            merged.bias.copy_(linear.bias.double() + weight @ shift)
        return merged.train(self.training)


class Residual(nn.Module):
    """x + m(x): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, m: nn.Module):
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)


def local_pair(ndim: int, dim: int) -> tuple[Residual, Residual]:
    """Token interaction (depthwise convolution) and feed-forward network, each with its residual (Fig. 6)."""
    ffn = nn.Sequential(Unit(ndim, dim, 2 * dim, act=nn.ReLU), Unit(ndim, 2 * dim, dim))
    return Residual(Unit(ndim, dim, dim, 3, groups=dim)), Residual(ffn)


def block(ndim: int, dim: int, mixer: nn.Module) -> nn.Sequential:
    """The sandwich of eq. 1: a local pair, attention, a local pair."""
    (dw0, ffn0), (dw1, ffn1) = local_pair(ndim, dim), local_pair(ndim, dim)
    return nn.Sequential(OrderedDict(dw0=dw0, ffn0=ffn0, mixer=Residual(mixer), dw1=dw1, ffn1=ffn1))


def downsample(ndim: int, dim: int, out: int) -> nn.Sequential:
    """Inverted residual without shortcut between local pairs (Fig. 6): (B, *S, dim) -> (B, *ceil(S / 2), out)."""
    wide = 4 * dim
    gate = SqueezeExcite(ndim, wide, make_divisible(wide / 4))
    gate.down.pointwise = gate.up.pointwise = False  # see Unit: a matrix product adds up in another order
    merge = OrderedDict(
        conv1=Unit(ndim, dim, wide, act=nn.ReLU),
        conv2=Unit(ndim, wide, wide, 3, 2, groups=wide, act=nn.ReLU),
        se=gate,
        conv3=Unit(ndim, wide, out),
    )
    pre, post = nn.Sequential(*local_pair(ndim, dim)), nn.Sequential(*local_pair(ndim, out))
    return nn.Sequential(pre, nn.Sequential(merge), post)


class EfficientViT(Backbone):
    """A stem at stride 16 and three stages (Fig. 6). `kernels` are those of the heads' queries, first head first."""

    OFFICIAL = (
        (r"^stem\.(\d+)\.", lambda m: f"patch_embed.{2 * int(m[1])}."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"blocks{plus_one(m)}."),
        (r"^stages\.0\.blocks\.", "blocks1."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"blocks{plus_one(m)}.{int(m[2]) + 3}."),
        (r"\.mixer\.m\.", ".mixer.m.attn."),
        (r"\.pos\.table$", ".attention_biases"),
        (r"\.proj\.", ".proj.1."),
        (r"\.m\.([01])\.", lambda m: f".m.pw{plus_one(m)}."),
        (r"\.se\.(down|up)\.", lambda m: f".se.fc{1 if m[1] == 'down' else 2}."),
        (r"\.conv\.", ".c."),
        (r"\.norm\.", ".bn."),
        (r"\.linear\.", ".l."),
        (r"\.fused\.", "."),
    )
    CONSTANT = (r"\.attention_bias_idxs$",)
    any_layout = True  # see Unit

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        kernels: Sequence[int] = (7, 5, 3, 3),
        key_dim: int = 16,
        window: int = 7,
        img_size: int | Sequence[int] = 224,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, width = self.ndim, dims[0]
        if width % 8:
            raise ValueError(f"the stem needs a first width that divides by 8, got {width}")
        widths = (self.in_chans, width // 8, width // 4, width // 2, width)
        self.stem = nn.Sequential(
            *(Unit(ndim, a, b, 3, 2, act=None if b == width else nn.ReLU) for a, b in pairwise(widths))
        )
        sides = tuple((s + 15) // 16 for s in ntuple(img_size, ndim, "img_size"))
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            if i:
                sides = tuple((s + 1) // 2 for s in sides)
            size = (window,) * ndim if self.features_only else tuple(min(window, s) for s in sides)
            mixers = (
                CascadedGroupAttention(ndim, dim, heads[i], size, key_dim, kernels, Unit) for _ in range(depths[i])
            )
            down = downsample(ndim, dims[i - 1], dim) if i else None
            self.stages.append(Stage([block(ndim, dim, mixer) for mixer in mixers], down=down))
        self.describe(dims, [16 * 2**i for i in range(len(dims))])
        self.make_head()
        self.init_weights()

    def _new_head(self) -> nn.Module:
        head = super()._new_head()
        return NormLinear(self.head_features, head) if isinstance(head, nn.Linear) else head

    def init_weights(self) -> None:
        """Every residual branch starts at zero."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, Residual):
                m = module.m
                last = m.proj if isinstance(m, CascadedGroupAttention) else m[-1] if isinstance(m, nn.Sequential) else m
                nn.init.zeros_(last.norm.weight)

    def embed(self, x: Tensor) -> Tensor:
        first = self.stem[0]
        return self.stem(x if isinstance(first, Unit) and first.ordered(x) else x.contiguous())


def _variant(size, dims, depths, heads, params, gmacs, top1, kernels=(7, 5, 3, 3), **more) -> Variant:
    config = dict(dims=dims, depths=depths, heads=heads, kernels=kernels)
    where = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0"
    figures = dict(params_m=params, gmacs=gmacs, top1=top1) | more
    return Variant(config, figures, weights=Weights(f"{where}/efficientvit_{size}.pth", "MIT", "direct"))


_SMALL, _LARGE, _FIVES = (1, 2, 3), (1, 3, 4), (5, 5, 5, 5)

FAMILY = Family(
    name="efficientvit",
    model=EfficientViT,
    paper="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention",
    venue="CVPR 2023",
    arxiv="2305.07027",
    code="github.com/microsoft/Cream (EfficientViT)",
    licence="MIT",
    # params_m, gmacs and top1 as the paper prints them; COCO 1x: RetinaNet box AP, Mask R-CNN mask AP
    variants={
        f"efficientvit_{size}": _variant(size, *row, **more)
        for size, *row, more in (
            ("m0", (64, 128, 192), _SMALL, (4, 4, 4), 2.3, 0.079, 63.2, dict(kernels=_FIVES)),
            ("m1", (128, 144, 192), _SMALL, (2, 3, 3), 3.0, 0.167, 68.4, {}),
            ("m2", (128, 192, 224), _SMALL, (4, 3, 2), 4.2, 0.201, 70.8, {}),
            ("m3", (128, 240, 320), _SMALL, (4, 3, 4), 6.9, 0.263, 73.4, dict(kernels=_FIVES)),
            ("m4", (128, 256, 384), _SMALL, (4, 4, 4), 8.8, 0.299, 74.3, dict(retinanet_ap=32.7, mask_ap=31.0)),
            ("m5", (192, 288, 384), _LARGE, (3, 3, 4), 12.4, 0.522, 77.1, {}),
        )
    },
)
