"""Mobile-Former: Bridging MobileNet and Transformer (CVPR 2022, arXiv 2108.05895). Official code:
github.com/AAboys/MobileFormer, no licence stated.

A MobileNet keeps the image and at most six learned tokens keep what is global. They run side by side and talk in every
block: the tokens read the map, think, set the slopes of the convolutions' activations, and are read by the map. Seen
from the map each way costs no more than a thin 1x1 convolution.

Unusual here: the map is its own key and value, and its own query, without projection; tokens have post-norms and four
heads, the bridges two; depthwise convolutions that halve the map also expand it; slopes (there are no intercepts) come
from token 0 after its update, which read the map as it enters the block. The head joins a pooled map and token 0. The
smallest network groups its 1x1 convolutions and shuffles channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage
from ..layers import (
    BatchNorm,
    Conv,
    ConvNorm,
    DropPath,
    Linear,
    Mlp,
    attend,
    channel_shuffle,
    check_heads,
    merge_heads,
    split_heads,
)  # fmt: skip
from ..registry import Family, Inputs, Variant, Weights

State = tuple[Tensor, Tensor]  # map (B, *S, C), tokens (B, M, d)
HEADS, FORMER_HEADS = 2, 4


def _shuffle(x: Tensor, groups: int) -> Tensor:
    return channel_shuffle(x, groups) if groups > 1 else x


class MobileToFormer(nn.Module):
    """Tokens gather from the map (eq. 1): (B, *S, C), (B, M, d) -> (B, M, d). Time grows linearly with the map."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        check_heads(dim, HEADS)
        self.gate, self.q = Linear(width, dim), Linear(width, dim)
        self.proj, self.norm = Linear(dim, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        (q,) = split_heads(self.q(tokens), HEADS)
        (kv,) = split_heads(x.flatten(1, -2), HEADS)
        gathered = merge_heads(attend(q, kv, kv)) * (2 * F.hardsigmoid(self.gate(tokens)))
        return self.norm(tokens + self.proj(gathered))


class Former(nn.Module):
    """Attention among the tokens, then an MLP, each with its norm after the sum: (B, M, d) -> (B, M, d)."""

    def __init__(self, width: int):
        super().__init__()
        check_heads(width, FORMER_HEADS)
        self.q, self.proj, self.norm1 = Linear(width, width), Linear(width, width), nn.LayerNorm(width)
        self.mlp, self.norm2 = Mlp(width, 2 * width), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        (q,), (kv,) = split_heads(self.q(tokens), FORMER_HEADS), split_heads(tokens, FORMER_HEADS)
        tokens = self.norm1(tokens + self.proj(merge_heads(attend(q, kv, kv))))
        return self.norm2(tokens + self.mlp(tokens))


class FormerToMobile(nn.Module):
    """Every cell of the map reads the tokens (eq. 2): (B, *S, C), (B, M, d) -> (B, *S, C)."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        check_heads(dim, HEADS)
        self.k, self.v = Linear(width, dim), Linear(width, dim)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        (q,) = split_heads(x.flatten(1, -2), HEADS)
        (k,), (v,) = split_heads(self.k(tokens), HEADS), split_heads(self.v(tokens), HEADS)
        return x + merge_heads(attend(q, k, v)).reshape(x.shape)


class DynamicReLU(nn.Module):
    """max(a x, b x) per channel, slopes a in [0, 2] and b in [-1, 1] from a token: (B, *S, C), (B, d) -> (B, *S, C).

    Dynamic ReLU (arXiv 2003.10027) without intercepts, fed by the token in place of a pooled map.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.hyper = Mlp(width, width // 4, 2 * dim, act=nn.ReLU)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        slopes = F.hardsigmoid(self.hyper(token))
        a, b = slopes.reshape(x.shape[0], 2, *(1,) * (x.ndim - 2), x.shape[-1]).unbind(1)
        return torch.maximum(x * (2 * a), x * (2 * b - 1))


class FirstBlock(nn.Module):
    """Expanding depthwise convolution, projection; tokens pass by. Map (B, *S, dim) -> (B, *ceil(S / stride), out)."""

    def __init__(self, ndim, dim, out, expansion, stride, groups, drop_path):
        super().__init__()
        hidden = dim * expansion
        self.shuffle = dim if groups > 1 else 1
        self.expand = ConvNorm(ndim, dim, hidden, 3, stride, groups=dim, act=nn.ReLU6)
        self.project = ConvNorm(ndim, hidden, out, groups=groups)
        self.skip, self.drop_path = stride == 1 and dim == out, DropPath(drop_path)

    def forward(self, state: State) -> State:
        x, tokens = state
        y = self.project(_shuffle(self.expand(x), self.shuffle))
        return (x + self.drop_path(y) if self.skip else y), tokens


class Bridged(nn.Module):
    """A row of Fig. 3: the tokens read the incoming map and think, the map goes its way, then reads the tokens."""

    def __init__(self, dim: int, out: int, width: int, skip: bool, drop_path: float):
        super().__init__()
        self.to_former, self.former = MobileToFormer(dim, width), Former(width)
        self.to_mobile = FormerToMobile(out, width)
        self.skip, self.drop_path = skip, DropPath(drop_path)

    def mobile(self, x: Tensor, token: Tensor) -> Tensor:
        """The convolutions, whose activations listen to the first token (B, d)."""
        raise NotImplementedError

    def forward(self, state: State) -> State:
        x, tokens = state
        tokens = self.former(self.to_former(x, tokens))
        y = self.mobile(x, tokens[:, 0])
        return self.to_mobile(x + self.drop_path(y) if self.skip else y, tokens), tokens


class MobileBlock(Bridged):
    """Inverted bottleneck (Fig. 3): map (B, *S, dim) -> (B, *S, out)."""

    def __init__(self, ndim, dim, out, width, expansion, groups, drop_path):
        super().__init__(dim, out, width, dim == out, drop_path)
        hidden, self.groups = dim * expansion, groups
        self.conv1, self.relu1 = ConvNorm(ndim, dim, hidden, groups=groups), DynamicReLU(hidden, width)
        self.conv2, self.relu2 = ConvNorm(ndim, hidden, hidden, 3, groups=hidden), DynamicReLU(hidden, width)
        self.conv3 = ConvNorm(ndim, hidden, out, groups=groups)

    def mobile(self, x: Tensor, token: Tensor) -> Tensor:
        x = self.relu1(_shuffle(self.conv1(x), self.groups), token)
        x = self.relu2(self.conv2(x), token)
        return _shuffle(self.conv3(x), self.groups)


class DownBlock(Bridged):
    """Two expanding depthwise convolutions, each projected; the first has the stride: (B, *S, dim) -> (B, *S', out).

    The second pair has a shortcut of its own.
    """

    def __init__(self, ndim, dim, out, width, expansions, stride, groups, drop_path):
        super().__init__(dim, out, width, stride == 1 and dim == out, drop_path)
        first, second = dim * expansions[0], out * expansions[1]
        self.shuffles = (dim, out) if groups > 1 else (1, 1)
        self.conv1, self.relu1 = ConvNorm(ndim, dim, first, 3, stride, groups=dim), DynamicReLU(first, width)
        self.conv2 = ConvNorm(ndim, first, out, groups=groups)
        self.conv3, self.relu3 = ConvNorm(ndim, out, second, 3, groups=out), DynamicReLU(second, width)
        self.conv4 = ConvNorm(ndim, second, out, groups=groups)

    def mobile(self, x: Tensor, token: Tensor) -> Tensor:
        x = self.conv2(self.relu1(_shuffle(self.conv1(x), self.shuffles[0]), token))
        return x + self.conv4(self.relu3(_shuffle(self.conv3(x), self.shuffles[1]), token))


class Neck(nn.Module):
    """What the head reads: pooled map and first token, joined: (B, *S, C), (B, M, d) -> (B, out).

    `bridge` is the tokens' last look at the map, before the head.
    """

    def __init__(self, ndim: int, dim: int, width: int, out: int, groups: int):
        super().__init__()
        self.bridge, self.groups = MobileToFormer(dim, width), groups
        self.conv = ConvNorm(ndim, dim, 6 * dim, groups=groups, act=nn.ReLU6)
        self.fc = nn.Sequential(Linear(6 * dim + width, out), BatchNorm(out), nn.Hardswish())

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        pooled = F.hardswish(self.conv(_shuffle(x, self.groups)).flatten(1, -2).mean(1))
        return self.fc(torch.cat([pooled, tokens[:, 0]], 1))


class MobileFormer(Backbone):
    """Stem at stride 2, then rows of blocks (Table 1 and appendix).

    `rows` are lists, one per stage, of (expansion, width) for a block of stride one and (expansion, second expansion,
    width, stride) for one with two projections; a second expansion of 0 is the first block, without bridges. `tokens`
    is (number, width) and `neck` the width that the head reads; `groups` divides all 1x1 convolutions.
    """

    no_decay = ("token_table",)

    def __init__(
        self,
        *,
        rows: Sequence[Sequence[Sequence[int]]],
        stem: int,
        tokens: Sequence[int],
        neck: int,
        groups: int = 1,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim, dim, (number, width) = self.ndim, stem, tokens
        self.token_table = nn.Parameter(torch.empty(number, width))
        self.stem = ConvNorm(ndim, self.in_chans, dim, 3, 2, act=nn.ReLU6)
        self.stages, dims, strides, stride = nn.ModuleList(), [], [], 2
        total, done = sum(len(stage) for stage in rows), 0
        self.depths = [len(stage) for stage in rows]
        for stage in rows:
            blocks: list[nn.Module] = []
            for row in stage:
                done += 1
                rate = drop_path_rate * done / total  # from the first block on
                if len(row) == 2:
                    expansion, out = row
                    blocks.append(MobileBlock(ndim, dim, out, width, expansion, groups, rate))
                elif len(row) == 4:
                    first, second, out, step = row
                    stride *= step
                    if second:
                        blocks.append(DownBlock(ndim, dim, out, width, (first, second), step, groups, rate))
                    else:
                        blocks.append(FirstBlock(ndim, dim, out, first, step, groups, rate))
                else:
                    raise ValueError(f"a row has 2 or 4 numbers (see the docstring), got {tuple(row)}")
                dim = out
            self.stages.append(Stage(blocks))
            dims.append(dim)
            strides.append(stride)
        self.describe(dims, strides)
        if not self.features_only:
            self.neck = Neck(ndim, dim, width, neck, groups)
        self.make_head(neck)
        self.init_weights()

    @property
    def OFFICIAL(self) -> Rules:  # type: ignore[override]  # blocks are counted through all stages
        """Our names -> official names, with the number of rows in each stage."""
        starts = [sum(self.depths[:i]) for i in range(len(self.depths))]
        return (
            (r"^token_table$", "tokens.weight"),
            (r"^stem\.(conv|norm)\.", lambda m: f"stem.{int(m[1] == 'norm')}."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"features.{starts[int(m[1])] + int(m[2])}."),
            (r"\.(expand|project)\.(conv|norm)\.", lambda m: f".conv.{4 * (m[1] == 'project') + (m[2] == 'norm')}."),
            (r"\.conv(\d)\.(conv|norm)\.", lambda m: f".conv{m[1]}.{int(m[2] == 'norm')}."),
            (r"\.relu(\d)\.hyper\.fc(\d)\.", lambda m: f".hyper{m[1]}.hyper.{2 * int(m[2]) - 2}."),
            (r"\.former\.mlp\.fc(\d)\.", lambda m: f".global_block.ffn.{2 * int(m[1]) - 2}."),
            (r"\.former\.(q|proj|norm1|norm2)\.", lambda m: f".global_block.{_FORMER[m[1]]}."),
            (r"\.to_mobile\.(k|v)\.", lambda m: f".global_local.{'k' if m[1] == 'k' else 'proj'}."),
            (r"\.to_former\.", ".local_global."),
            (r"^neck\.bridge\.", "local_global."),
            (r"local_global\.gate\.", "local_global.alpha.0."),
            (r"local_global\.norm\.", "local_global.layer_norm."),
            (r"^neck\.conv\.(conv|norm)\.", lambda m: f"classifier.conv.{1 + (m[1] == 'norm')}."),
            (r"^neck\.fc\.", "classifier.fc."),
            (r"^head\.", "classifier.classifier.1."),
        )

    def init_weights(self) -> None:
        nn.init.normal_(self.token_table)
        for module in self.modules():
            if isinstance(module, Conv):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (math.prod(module.kernel) * module.weight.shape[0])))
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def embed(self, x: Tensor) -> State:
        return self.stem(x), self.token_table.expand(x.shape[0], *self.token_table.shape)

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]

    def finish(self, state: State) -> State:
        return state[0], self.neck.bridge(*state)

    def pre_logits(self, features: State) -> Tensor:
        return self.neck(*features)


_FORMER = dict(q="q", proj="channel_mlp", norm1="layer_norm", norm2="ffn_norm")


def _rows(widths, expansions) -> tuple:
    """The rows of the five largest networks: widths of the six steps, expansions of the blocks that follow them."""
    a, b, c, d, e, f = widths
    i, j, k = expansions
    return (
        ((2, 0, a, 1), (6, 4, b, 2), *([(i, b)] if i else [])),
        ((6, 4, c, 2), (j, c)),
        ((6, 4, d, 2), (k, d), (6, e), *([(6, e)] if i else [])),
        ((6, 4, f, 2), (6, f), *([(6, f)] if i else [])),
    )


_SMALL = (
    ((3, 0, 12, 2), (3, 12)),
    ((6, 4, 24, 2), (3, 24)),
    ((6, 4, 48, 2), (4, 48), (6, 64)),
    ((6, 4, 96, 2), (6, 96)),
)
_WHERE = Weights("README of github.com/AAboys/MobileFormer (Google Drive)", "none stated", "manual")


def _variant(mmacs, rows, stem, tokens, neck, params, top1, **config) -> Variant:
    figures = dict(params_m=params, gmacs=mmacs / 1000, top1=top1, drop_path=0.0)
    return Variant(dict(rows=rows, stem=stem, tokens=tokens, neck=neck) | config, figures, Inputs(), _WHERE)


# params_m, gmacs and top1 as the paper prints them; names are its millions of multiply-adds
FAMILY = Family(
    name="mobile_former",
    model=MobileFormer,
    paper="Mobile-Former: Bridging MobileNet and Transformer",
    venue="CVPR 2022",
    arxiv="2108.05895",
    code="github.com/AAboys/MobileFormer",
    licence="none stated",
    variants={
        "mobile_former_508m": _variant(
            508, _rows((24, 40, 72, 128, 176, 240), (3, 3, 4)), 24, (6, 192), 1920, 14.0, 79.3
        ),
        "mobile_former_294m": _variant(
            294, _rows((16, 24, 48, 96, 128, 192), (4, 4, 4)), 16, (6, 192), 1920, 11.4, 77.9
        ),
        "mobile_former_214m": _variant(
            214, _rows((12, 20, 40, 80, 112, 160), (3, 4, 4)), 12, (6, 192), 1600, 9.4, 76.7
        ),
        "mobile_former_151m": _variant(151, _rows((12, 16, 32, 64, 88, 128), (3, 3, 4)), 12, (6, 192), 1280, 7.6, 75.2),
        "mobile_former_96m": _variant(
            96, _rows((12, 16, 32, 64, 88, 128), (None, 3, 4)), 12, (4, 128), 1280, 4.6, 72.8
        ),
        "mobile_former_52m": _variant(52, _SMALL, 8, (3, 128), 1024, 3.5, 68.7),
        "mobile_former_26m": _variant(26, _SMALL, 8, (3, 128), 1024, 3.2, 64.0, groups=4),
    },
)
