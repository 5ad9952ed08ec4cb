"""MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens (CVPR 2022, arXiv 2105.15168).
Official code: github.com/hustvl/MSG-Transformer, Apache-2.0.

Attention stays in windows, unshifted. Each window carries a messenger token, which takes part like any other; in every
block, after attention, the messengers of a region of windows swap blocks of their channels, and so carry news across.

Unusual here: the classifier reads the messenger and never the map; merging runs one convolution and one norm over the
map and over the much smaller map of messengers, each with its own zero border. The published code works at 224 pixels
only, where one window is left at the end. Here any size does: a map is padded to whole windows, padded cells are no
keys; in a region cut off by the border the windows that exist exchange what they can; the head reads the mean of the
last stage's messengers. At other ranks a region is at most so large that the channels divide into its windows. The
dense version, of which no code was released, gives the maps without their messengers and has no norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Stage
from ..layers import Block, Mlp, PatchEmbed, drop_path_rates, pad_to, windows
from ..mixers.messenger import (
    MessengerWindowAttention,
    check_region,
    region_slots,
    shuffle_messengers,
    window_counts,
)  # fmt: skip
from ..registry import Family, Variant, Weights

State = tuple[Tensor, tuple[int, ...]]  # windows (B, W, 1 + L, C), a messenger first in each; sides of their map


def enter(x: Tensor, messengers: Tensor, window: tuple[int, ...]) -> State:
    """Map (B, *S, C) and messengers (B, W, C) -> windows with their messengers."""
    sides = tuple(x.shape[1:-1])
    cells = windows(sides, window, device=x.device)
    inside = cells.split(x).reshape(x.shape[0], cells.number, cells.length, x.shape[-1])
    return torch.cat([messengers.unsqueeze(2), inside], 2), sides


def leave(state: State, window: tuple[int, ...]) -> Tensor:
    """The map (B, *S, C) of windows with messengers."""
    tokens, sides = state
    batch, number, length, dim = tokens.shape
    back = windows(sides, window, device=tokens.device).back
    back = back + back // (length - 1) + 1  # one messenger before the cells of each window up to this one
    return tokens.reshape(batch, number * length, dim).index_select(1, back).reshape(batch, *sides, dim)


class MessengerBlock(Block):
    """Window attention, exchange of messengers in regions of `region` windows per axis, MLP (section 3)."""

    def __init__(self, ndim: int, dim: int, heads: int, window: int, region: int, mlp_ratio: float, drop_path: float):
        attn = MessengerWindowAttention(ndim, dim, heads, window)
        super().__init__(dim, attn, Mlp(dim, int(dim * mlp_ratio)), drop_path)
        check_region(dim, ndim, region)
        self.region = region

    def forward(self, state: State) -> State:
        x, sides = state
        window = self.attn.window
        x = x + self.drop_path(self.attn(self.norm1(x), windows(sides, window, device=x.device)))
        if self.region > 1:  # in place: no gradient needs the sum as it was, and a copy would pass over all windows
            x[:, :, 0] = shuffle_messengers(x[:, :, 0], window_counts(sides, window), self.region)
        return x + self.drop_path(self.mlp(self.norm2(x))), sides


class Merge(PatchEmbed):
    """3x3 convolution of stride 2, then norm, over the map and over the messengers' map."""

    def __init__(self, ndim: int, dim: int, out: int, window: int):
        super().__init__(ndim, dim, out, 3, 2, nn.LayerNorm(out))
        self.window = (window,) * ndim

    def forward(self, state: State) -> State:
        tokens, sides = state
        counts = window_counts(sides, self.window)
        messengers = tokens[:, :, 0].reshape(tokens.shape[0], *counts, tokens.shape[-1])
        below = super().forward(messengers).flatten(1, -2)  # half as many, as the next stage has windows
        return enter(super().forward(leave(state, self.window)), below, self.window)


class MSGTransformer(Backbone):
    """Four stages; `regions` are the sides, in windows, of the regions that exchange in each stage.

    forward_features gives the last map and its messengers (B, W, C), normalised.
    """

    no_decay = ("msg_tokens",)
    OFFICIAL = (
        (r"^stages\.(\d+)\.down\.proj\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.reduction."),
        (r"^stages\.(\d+)\.down\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
        (r"^stages\.", "layers."),
        (r"\.attn\.pos\.table$", ".attn.relative_position_bias_table"),
        (r"\.attn\.messenger$", ".attn.rel_pos_msg"),
    )
    CONSTANT = (r"\.attn\.relative_position_index$",)

    def __init__(
        self,
        *,
        dim: int,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        regions: Sequence[int] = (4, 4, 2, 1),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim
        dims = [dim * 2**i for i in range(len(depths))]
        regions = [self._region(r, d) for r, d in zip(regions, dims, strict=True)]
        rates = drop_path_rates(drop_path_rate, depths)
        self.window, self.region = (window,) * ndim, regions[0]
        self.patch_embed = PatchEmbed(ndim, self.in_chans, dim, 7, 4, nn.LayerNorm(dim), padding=2)
        self.msg_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.region**ndim, 1, dim), std=0.02))
        self.stages = nn.ModuleList()
        for i, width in enumerate(dims):
            blocks = [MessengerBlock(ndim, width, heads[i], window, regions[i], mlp_ratio, rate) for rate in rates[i]]
            self.stages.append(Stage(blocks, down=Merge(ndim, dims[i - 1], width, window) if i else None))
        self.describe(dims, [4 * 2**i for i in range(len(depths))])
        if not self.features_only:
            self.norm = nn.LayerNorm(dims[-1])
        self.make_head()
        self.init_weights()

    def _region(self, region: int, dim: int) -> int:
        """The largest side up to `region` whose windows the channels divide into, at ranks that are not published."""
        while self.ndim != 2 and region > 1 and dim % region**self.ndim:
            region -= 1
        return region

    def embed(self, x: Tensor) -> State:
        x = self.patch_embed(pad_to(x, 4))
        slots = region_slots(window_counts(tuple(x.shape[1:-1]), self.window), self.region, device=x.device)
        messengers = self.msg_tokens[0, :, 0].index_select(0, slots)
        return enter(x, messengers.to(x.dtype).expand(x.shape[0], *messengers.shape), self.window)

    def to_map(self, state: State, index: int) -> Tensor:
        return leave(state, self.window)

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        tokens = self.norm(state[0])
        return leave((tokens, state[1]), self.window), tokens[:, :, 0]

    def pre_logits(self, features: tuple[Tensor, Tensor]) -> Tensor:
        return features[1].mean(1)


def _variant(dim, depth, heads, drop_path, params, gmacs, top1, box_ap, mask_ap) -> Variant:
    config = dict(dim=dim, depths=(2, 4, depth, 4), heads=tuple(heads * 2**i for i in range(4)))
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path)
    figures |= dict(cascade_box_ap=box_ap, cascade_mask_ap=mask_ap)
    return Variant(config, figures, weights=Weights("", "Apache-2.0", "none"))


# params_m, gmacs and top1 of the architecture of December 2021 (the first arXiv version had others); box/mask AP: COCO
# Cascade Mask R-CNN. No weights were ever published.
FAMILY = Family(
    name="msg_transformer",
    model=MSGTransformer,
    paper="MSG-Transformer: Exchanging Local Spatial Information by Manipulating Messenger Tokens",
    venue="CVPR 2022",
    arxiv="2105.15168",
    code="github.com/hustvl/MSG-Transformer",
    licence="Apache-2.0",
    variants={
        "msg_tiny_p4_win7_224": _variant(64, 12, 2, 0.1, 25, 3.8, 82.4, 51.4, 44.6),
        "msg_small_p4_win7_224": _variant(96, 12, 3, 0.3, 56, 8.4, 83.4, 52.5, 45.5),
        "msg_base_p4_win7_224": _variant(96, 28, 3, 0.5, 84, 14.2, 84.0, 52.8, 45.7),
    },
)
