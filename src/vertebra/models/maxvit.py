"""MaxViT: Multi-Axis Vision Transformer (ECCV 2022, arXiv 2204.01697). Official code (TensorFlow):
github.com/google-research/maxvit, Apache-2.0; the names here are those of its PyTorch port in timm, which hosts the
official weights. torchvision's maxvit_t (BSD-3-Clause) is a network of its own beside them.

Every block mixes three ways: an inverted residual convolution, attention inside blocks of neighbours, and attention in
grids, whose cells are spread evenly over the whole map. Both attentions cost the same and grow linearly with the map,
so even the first stage sees globally.

Unusual here: strided convolutions are padded as TensorFlow does it, after the last cell only (on an even side); GELU is
the tanh form; batch norms have eps 1e-3; a block begins with a batch norm without activation; biases count offsets from
query to key; the head has a hidden layer with tanh. torchvision pads evenly, has the exact GELU, pools its shortcuts 3
wide, scales logits by the whole width, and its last layer has no bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import (
    BatchNorm,
    Block,
    Conv,
    ConvNorm,
    DropPath,
    Linear,
    Mlp,
    RelativePositionBias,
    SqueezeExcite,
    avg_pool,
    drop_path_rates,
    ntuple,
    pad_to,
)
from ..layers.cached import tracing
from ..layers.space import conv
from ..mixers import BlockAttention, GridAttention, KeyOffsetBias
from ..registry import IMAGENET_MEAN, IMAGENET_STD, Family, Inputs, Variant, Weights

EPS, MOMENTUM = 1e-3, 0.01  # of the batch norms
HEAD = 32  # channels of an attention head


class SameConv(Conv):
    """3x3 convolution of stride 2 with TensorFlow's SAME padding: (B, *S, dim) -> (B, *ceil(S / 2), out).

    An even side gets one cell after its end, an odd one a cell at either end.
    """

    def forward(self, x: Tensor, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        sides, none, one = x.shape[1:-1], (0,) * (x.ndim - 2), (1,) * (x.ndim - 2)
        if tracing():
            x = F.pad(x, [0, 0, *(v for s in reversed(sides) for v in ((s + 1) // 2 * 2 - s, 1))])
            return conv(x, self.weight, self.bias, self.stride, none, one, self.groups, act, shortcut)
        # the same sums without a copy of the map: for an even side the kernel gets a zero in front, padding is even
        weight = F.pad(self.weight, [v for s in reversed(sides) for v in (1 - s % 2, 0)])
        return conv(x, weight, self.bias, self.stride, one, one, self.groups, act, shortcut)


def _unit(ndim, dim, out, kernel=1, stride=1, groups=1, act=nn.GELU, bias=False, same=False) -> ConvNorm:
    """Convolution, batch norm, activation; `same` takes TensorFlow's padding for a stride."""
    unit = ConvNorm(ndim, dim, out, kernel, stride, groups=groups, act=act, bias=bias, eps=EPS)
    if same and stride > 1:
        unit.conv = SameConv(ndim, dim, out, kernel, stride, groups=groups, bias=bias)
    return unit


class MBConv(nn.Module):
    """Inverted residual with norm first, squeeze and excitation (Fig. 2): (B, *S, dim) -> (B, *ceil(S / stride), out).

    The shortcut of a stride is an average pooling and a 1x1 convolution, in `tf` only where the width changes.
    """

    def __init__(self, ndim: int, dim: int, out: int, stride: int, act, tf: bool, drop_path: float = 0.0):
        super().__init__()
        mid, self.stride, self.tf = 4 * out, stride, tf
        widen = dim != out or (stride > 1 and not tf)
        self.shortcut = Conv(ndim, dim, out) if widen else nn.Identity()
        self.pre_norm = BatchNorm(dim, eps=EPS)
        self.expand = _unit(ndim, dim, mid, act=act)
        self.depthwise = _unit(ndim, mid, mid, 3, stride, groups=mid, act=act, same=tf)
        self.squeeze = SqueezeExcite(ndim, mid, out // 4, act=nn.SiLU)
        self.project = Conv(ndim, mid, out)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        short = x
        if self.stride > 1:  # a ragged end counts zeros in the mean
            short = avg_pool(pad_to(x, 2), 2) if self.tf else avg_pool(x, 3, 2, 1)
        y = self.depthwise(self.expand(self.pre_norm(x)))
        return self.shortcut(short) + self.drop_path(self.project(self.squeeze(y)))


class MultiAxisBlock(nn.Module):
    """MBConv, block attention, grid attention, each attention with its MLP (Fig. 2): (B, *S, dim) -> (B, *S', out)."""

    def __init__(self, ndim, dim, out, stride, window, act, tf: bool, drop_path: float):
        super().__init__()
        self.conv = MBConv(ndim, dim, out, stride, act, tf, drop_path)
        options: dict[str, Any] = dict(position=KeyOffsetBias if tf else RelativePositionBias)
        options |= dict(scale=None if tf else out**-0.5)
        for name, mixer in (("block", BlockAttention), ("grid", GridAttention)):
            attn = mixer(ndim, out, out // HEAD, window, **options)
            self.add_module(name, Block(out, attn, Mlp(out, 4 * out, act=act), drop_path))

    def forward(self, x: Tensor) -> Tensor:
        return self.grid(self.block(self.conv(x)))


class MaxViT(Backbone):
    """The pyramid of Fig. 2. Blocks and grids have `window` cells per axis, by default img_size / 32 per side.

    Any input is padded to whole windows, the padding masked. The dense version gives raw maps.
    """

    OFFICIAL: ClassVar[Any] = (
        (r"^stem\.0\.conv\.", "stem.conv1."),
        (r"^stem\.0\.norm\.", "stem.norm1."),
        (r"^stem\.1\.", "stem.conv2."),
        (r"\.conv\.shortcut\.", ".conv.shortcut.expand."),
        (r"\.conv\.expand\.conv\.", ".conv.conv1_1x1."),
        (r"\.conv\.depthwise\.conv\.", ".conv.conv2_kxk."),
        (r"\.conv\.(expand|depthwise)\.norm\.", lambda m: f".conv.norm{'12'[m[1] == 'depthwise']}."),
        (r"\.conv\.squeeze\.(down|up)\.", lambda m: f".conv.se.fc{'12'[m[1] == 'up']}."),
        (r"\.conv\.project\.", ".conv.conv3_1x1."),
        (r"\.(block|grid)\.", r".attn_\1."),
        (r"\.pos\.table$", ".rel_pos.relative_position_bias_table"),
        (r"^head\.", "head.fc."),
        (r"^neck\.0\.", "head.norm."),
        (r"^neck\.1\.", "head.pre_logits.fc."),
    )
    tf: ClassVar[bool] = True
    act: ClassVar[Any] = partial(nn.GELU, approximate="tanh")

    def __init__(
        self,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        stem: int = 64,
        window: int | Sequence[int] | None = None,
        img_size: int | Sequence[int] = 224,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, tf, act = self.ndim, self.tf, type(self).act
        sides = ntuple(img_size, ndim, "img_size")
        if min(sides) < 32:
            raise ValueError(f"img_size must be at least 32 per side, got {img_size!r}")
        size = ntuple(tuple(s // 32 for s in sides) if window is None else window, ndim, "window")
        if min(size) < 1:
            raise ValueError(f"windows must have at least one cell per axis, got {window!r}")
        if any(d % HEAD for d in dims):
            raise ValueError(f"every width must divide into heads of {HEAD} channels, got {tuple(dims)}")
        first = _unit(ndim, self.in_chans, stem, 3, 2, act=act, bias=tf, same=tf)
        self.stem = nn.Sequential(first, Conv(ndim, stem, stem, 3))
        rates, ins = drop_path_rates(drop_path_rate, depths), (stem, *dims)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for j, rate in enumerate(rates[i]):
                blocks.append(MultiAxisBlock(ndim, dim if j else ins[i], dim, 1 if j else 2, size, act, tf, rate))
            self.stages.append(Stage(blocks))
        self.describe(dims, [4 * 2**i for i in range(len(dims))])
        if not self.features_only:
            self.neck = nn.Sequential(nn.LayerNorm(dims[-1]), Linear(dims[-1], dims[-1]), nn.Tanh())
        self.make_head()
        self.init_weights()

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | Conv):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, BatchNorm):
                module.momentum = MOMENTUM

    def embed(self, x: Tensor) -> Tensor:
        return self.stem(x)

    def pre_logits(self, features: Tensor) -> Tensor:
        return self.neck(super().pre_logits(features))


class TorchvisionMaxViT(MaxViT):
    """torchvision's network (its maxvit_t), with torchvision's names; see the head of this file for the differences."""

    OFFICIAL = (
        (r"^stem\.0\.conv\.", "stem.0.0."),
        (r"^stem\.0\.norm\.", "stem.0.1."),
        (r"^stem\.1\.", "stem.1.0."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"blocks.\1.layers.\2.layers."),
        (r"\.conv\.shortcut\.", ".MBconv.proj.1."),
        (r"\.conv\.(expand|depthwise)\.(conv|norm)\.",
         lambda m: f".MBconv.layers.conv_{'ab'[m[1] == 'depthwise']}.{'01'[m[2] == 'norm']}."),
        (r"\.conv\.squeeze\.(down|up)\.", lambda m: f".MBconv.layers.squeeze_excitation.fc{'12'[m[1] == 'up']}."),
        (r"\.conv\.project\.", ".MBconv.layers.conv_c."),
        (r"\.conv\.pre_norm\.", ".MBconv.layers.pre_norm."),
        (r"\.block\.", ".window_attention."),
        (r"\.grid\.", ".grid_attention."),
        (r"\.norm1\.", ".attn_layer.0."),
        (r"\.attn\.qkv\.", ".attn_layer.1.to_qkv."),
        (r"\.attn\.proj\.", ".attn_layer.1.merge."),
        (r"\.attn\.pos\.table$", ".attn_layer.1.relative_position_bias_table"),
        (r"\.norm2\.", ".mlp_layer.0."),
        (r"\.mlp\.fc1\.", ".mlp_layer.1."),
        (r"\.mlp\.fc2\.", ".mlp_layer.3."),
        (r"^neck\.0\.", "classifier.2."),
        (r"^neck\.1\.", "classifier.3."),
        (r"^head\.", "classifier.5."),
    )  # fmt: skip
    CONSTANT = (r"\.relative_position_index$",)
    tf = False
    act = nn.GELU

    def _new_head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        head = Linear(self.head_features, self.num_classes, bias=False)
        nn.init.normal_(head.weight, std=0.02)
        return head


_HALF = (0.5, 0.5, 0.5)
_HUB = "https://huggingface.co/timm"
_SHALLOW, _DEEP = (2, 2, 5, 2), (2, 6, 14, 2)
# dims, depths, stem width, drop path (ImageNet-1k), params_m; then per size GMACs, top1, top1 after ImageNet-21k
_SIZES: dict[str, tuple[Any, ...]] = {
    "tiny": (64, _SHALLOW, 64, 0.2, 31, {224: (5.6, 83.62), 384: (17.7, 85.24), 512: (33.7, 85.72)}),
    "small": (96, _SHALLOW, 64, 0.3, 69, {224: (11.7, 84.45), 384: (36.1, 85.74), 512: (67.6, 86.19)}),
    "base": (96, _DEEP, 64, 0.4, 119, {224: (24.2, 84.95), 384: (74.2, 86.34, 88.24), 512: (138.5, 86.66, 88.38)}),
    "large": (128, _DEEP, 128, 0.6, 212, {224: (43.9, 85.17), 384: (133.1, 86.40, 88.32), 512: (245.4, 86.70, 88.46)}),
    "xlarge": (
        192, _DEEP, 192, None, 475, {224: (97.8, None), 384: (293.7, None, 88.51), 512: (535.2, None, 88.70)}
    ),
}  # fmt: skip


def _variant(name: str, img: int) -> Variant:
    """A size of the official family; its weights are of ImageNet-1k, of 21k where there are no others."""
    dim, depths, stem, drop_path, params, figures = _SIZES[name]
    gmacs, top1, *top1_21k = figures[img]
    published = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path)
    place = f"{_HUB}/maxvit_{name}_tf_{img}.%s/resolve/main/model.safetensors"
    status = "direct"
    if name in ("base", "large", "xlarge"):
        more = place % ("in21k" if img == 224 else "in21k_ft_in1k")
        published |= dict(weights_21k=more) | (dict(top1_21k=top1_21k[0]) if top1_21k else {})
        if name == "xlarge":  # at 224 a head of 21843 classes
            place, status = more, "manual" if img == 224 else "direct"
    where = Weights(place.replace("%s", "in1k"), "Apache-2.0", status)
    plain = img == 224 and name != "xlarge"  # as the files of the port say
    inputs = Inputs(
        img, *((IMAGENET_MEAN, IMAGENET_STD) if plain else (_HALF, _HALF)), crop=0.95 if img == 224 else 1.0
    )
    config = dict(dims=tuple(dim * 2**i for i in range(4)), depths=depths, stem=stem)
    return Variant(config, {k: v for k, v in published.items() if v is not None}, inputs, where)


FAMILY = Family(
    name="maxvit",
    model=MaxViT,
    paper="MaxViT: Multi-Axis Vision Transformer",
    venue="ECCV 2022",
    arxiv="2204.01697",
    code="github.com/google-research/maxvit",
    licence="Apache-2.0",
    # params_m, gmacs and top1 as the repository prints them (xlarge and _21k: the paper)
    variants={f"maxvit_{name}_tf_{img}": _variant(name, img) for name in _SIZES for img in (224, 384, 512)}
    | {
        "torchvision_maxvit_t": Variant(
            dict(model=TorchvisionMaxViT, dims=(64, 128, 256, 512), depths=_SHALLOW, window=7),
            dict(params_m=30.9, gmacs=5.558, top1=83.70, drop_path=0.2),
            Inputs(224, crop=1.0),
            Weights("https://download.pytorch.org/models/maxvit_t-bc5ab103.pth", "BSD-3-Clause", "direct", "bc5ab103"),
        )
    },
)
