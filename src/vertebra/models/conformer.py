"""Conformer: Local Features Coupling Global Representations for Visual Recognition (ICCV 2021, arXiv 2105.03889).
Official code: github.com/pengzhiliang/Conformer, Apache-2.0. (Not the Conformer that hears speech.)

A ResNet and a ViT read the same stem and run side by side over their whole depth. In every block the convolutions hand
their features to the tokens and the tokens hand theirs back, so that the map learns what is global and the tokens what
is local. Each branch has its classifier; the prediction is the sum of their logits.

Unusual here: no table of positions, as the map tells the tokens where they are. The class token is doubled on entering
each coupled block, for what the map sends is summed with the tokens and has a copy of the class token in its first row.
Norms in the blocks have eps 1e-6, the stem's and the last one 1e-5. Tokens return through a batch norm, a ReLU and
nearest-neighbour upsampling, in front of a bottleneck's 3x3. The last map is at stride 32, its tokens are not.

The map is averaged before it is projected to the tokens' width, which is the same (both are linear) at 1 / factor^ndim
of the published cost. At sizes that the official code refuses, tokens at a ragged end average the cells that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone, Rules, Stage
from ..layers import (
    Attention,
    Block,
    Conv,
    ConvNorm,
    Linear,
    Mlp,
    PatchEmbed,
    crop,
    drop_path_rates,
    init_fan_out,
    max_pool,
    mean_pool,
    resize,
)
from ..registry import Family, Inputs, Variant, Weights

EPS = 1e-6
State = tuple[Tensor, Tensor, tuple[int, ...]]  # map (B, *S, C), tokens (B, 1 + N, E), grid of the N patches


class Bottleneck(nn.Module):
    """ResNet's bottleneck (Fig. 2b): (B, *S, dim) -> (B, *ceil(S / stride), out) and its inner map, out / 4 wide.

    `extra` (B, *S, out / 4) is added in front of the 3x3 convolution; the inner map is what leaves it, after norm and
    ReLU. `project` makes the shortcut a 1x1 convolution.
    """

    def __init__(self, ndim: int, dim: int, out: int, stride: int = 1, project: bool = False):
        super().__init__()
        inner = out // 4
        self.conv1 = ConvNorm(ndim, dim, inner, act=nn.ReLU, eps=EPS)
        self.conv2 = ConvNorm(ndim, inner, inner, 3, stride, act=nn.ReLU, eps=EPS)
        self.conv3 = ConvNorm(ndim, inner, out, act=nn.ReLU, eps=EPS)
        self.skip = ConvNorm(ndim, dim, out, 1, stride, eps=EPS) if project else nn.Identity()

    def forward(self, x: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.conv1(x)
        inner = self.conv2(y if extra is None else y + extra)
        return self.conv3(inner, self.skip(x)), inner


class Squeeze(nn.Module):
    """Feature coupling unit, map to tokens (Fig. 2b): (B, *S, dim) -> (B, N, out), N = prod(ceil(S / factor))."""

    def __init__(self, ndim: int, dim: int, out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.proj, self.norm, self.act = Conv(ndim, dim, out), nn.LayerNorm(out, eps=EPS), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.proj(mean_pool(x, self.factor)).flatten(1, -2)))


class Expand(nn.Module):
    """Feature coupling unit, tokens to map (Fig. 2b): (B, N, dim) of `grid` -> (B, *sides, out), nearest neighbour."""

    def __init__(self, ndim: int, dim: int, out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.proj = ConvNorm(ndim, dim, out, act=nn.ReLU, bias=True, eps=EPS)

    def forward(self, tokens: Tensor, grid: Sequence[int], sides: Sequence[int]) -> Tensor:
        x = self.proj(tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1]))
        return crop(resize(x, [g * self.factor for g in grid], "nearest"), sides) if self.factor > 1 else x


class FirstBlock(nn.Module):
    """Both branches side by side, not yet coupled (section 3.2): state -> state."""

    def __init__(self, cnn: nn.Module, trans: nn.Module):
        super().__init__()
        self.cnn, self.trans = cnn, trans

    def forward(self, state: State) -> State:
        x, tokens, grid = state
        return self.cnn(x)[0], self.trans(tokens), grid


class CoupledBlock(nn.Module):
    """Two bottlenecks and a transformer block (Fig. 2b, section 3.2): state -> state.

    The inner map of the first bottleneck goes to the tokens, these go to the inside of the second, `fusion`.
    """

    def __init__(self, cnn: Bottleneck, trans: nn.Module, fusion: Bottleneck, squeeze: Squeeze, expand: Expand):
        super().__init__()
        self.cnn, self.trans, self.fusion, self.squeeze, self.expand = cnn, trans, fusion, squeeze, expand

    def forward(self, state: State) -> State:
        x, tokens, grid = state
        x, inner = self.cnn(x)
        sent = torch.cat([tokens[:, :1], self.squeeze(inner)], 1)
        tokens = self.trans(sent.add_(tokens))
        return self.fusion(x, self.expand(tokens[:, 1:], grid, inner.shape[1:-1]))[0], tokens, grid


class Conformer(Backbone):
    """Stem at stride 4, then blocks at strides 4, 8 and 16 (Table 1); the very last one leaves its map at stride 32.

    `dims` are the map's widths at the three strides, `depths` the numbers of blocks; tokens have width `embed_dim` and
    one grid, of stride `patch`, from the first block to the last. forward_features gives the map and the normed tokens,
    forward_outputs also each branch's own logits. The dense version (mmdetection's) gives the map after the last block
    of each stride.
    """

    no_decay = ("cls_token",)

    def __init__(
        self, *, dims: Sequence[int], depths: Sequence[int] = (4, 4, 4), embed_dim: int, heads: int, patch: int = 16,
        stem: int = 64, mlp_ratio: float = 4.0, drop_path_rate: float = 0.0, **contract: Any,
    ):  # fmt: skip
        super().__init__(**contract)
        if len(dims) != 3 or any(dim % 4 for dim in dims):
            raise ValueError(f"dims needs three widths that divide by 4, got {tuple(dims)}")
        if len(depths) != 3 or min(depths) < 1 or depths[2] < 2:
            raise ValueError(f"depths needs three numbers of at least 1, the last at least 2, got {tuple(depths)}")
        if patch < 16 or patch % 16:
            raise ValueError(f"patch must be a multiple of 16, the stride of the map beside the tokens, got {patch}")
        ndim, before = self.ndim, stem
        self.stem = ConvNorm(ndim, self.in_chans, stem, 7, 2, act=nn.ReLU)
        self.patch_embed = PatchEmbed(ndim, stem, embed_dim, patch // 4, pad=True)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        rates, self.stages = drop_path_rates(drop_path_rate, depths), nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                last, factor = i == 2 and j == depth - 1, patch // 4 // 2**i
                cnn = Bottleneck(ndim, before, dim, 2 if i and not j else 1, project=not j)
                attn, mlp = Attention(embed_dim, heads), Mlp(embed_dim, int(embed_dim * mlp_ratio))
                trans, before = Block(embed_dim, attn, mlp, rates[i][j], EPS), dim
                if i == j == 0:
                    blocks.append(FirstBlock(cnn, trans))
                    continue
                fusion = Bottleneck(ndim, dim, dim, 2 if last else 1, project=last)
                squeeze = Squeeze(ndim, dim // 4, embed_dim, factor)
                expand = Expand(ndim, embed_dim, dim // 4, factor)
                blocks.append(CoupledBlock(cnn, trans, fusion, squeeze, expand))
            for part in [blocks] if i < 2 else [blocks[:-1], blocks[-1:]]:
                self.stages.append(Stage(part))
        self.head_dims = {"conv": dims[2], "trans": embed_dim}
        self.describe([*dims, dims[2]], [4, 8, 16, 32])
        if not self.features_only:
            self.norm = nn.LayerNorm(embed_dim)
        self.make_head(sum(self.head_dims.values()))
        self.init_weights()
        init_fan_out(self)

    @property
    def OFFICIAL(self) -> Rules:  # type: ignore[override]  # blocks are counted through all stages
        """Our names -> official names, with the number of blocks in each stage."""
        depths = [len(stage.blocks) for stage in self.stages]
        number = lambda m: f"conv_trans_{sum(depths[: int(m[1])]) + int(m[2]) + 1}."  # noqa: E731
        return (
            (r"^stem\.conv\.", "conv1."),
            (r"^stem\.norm\.", "bn1."),
            (r"^patch_embed\.proj\.", "trans_patch_conv."),
            (r"^norm\.", "trans_norm."),
            (r"^head\.(conv|trans)\.", r"\1_cls_head."),
            (r"^stages\.0\.blocks\.0\.cnn\.", "conv_1."),
            (r"^stages\.0\.blocks\.0\.trans\.", "trans_1."),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", number),
            (r"\.expand\.proj\.(conv|norm)\.", lambda m: f".expand.{'conv_project' if m[1] == 'conv' else 'bn'}."),
            (r"\.squeeze\.(proj|norm)\.", lambda m: f".squeeze.{'conv_project' if m[1] == 'proj' else 'ln'}."),
            (r"\.conv(\d)\.conv\.", r".conv\1."),
            (r"\.conv(\d)\.norm\.", r".bn\1."),
            (r"\.skip\.conv\.", ".residual_conv."),
            (r"\.skip\.norm\.", ".residual_bn."),
            (r"\.(cnn|trans|fusion|squeeze|expand)\.", r".\1_block."),
        )

    def _new_head(self) -> nn.Module:
        """One linear head per branch."""
        heads = nn.ModuleDict()
        for name, dim in self.head_dims.items():
            heads[name] = Linear(dim, self.num_classes) if self.num_classes else nn.Identity()
            if self.num_classes:
                nn.init.trunc_normal_(heads[name].weight, std=0.02)
                nn.init.zeros_(heads[name].bias)
        return heads

    def embed(self, x: Tensor) -> State:
        x = max_pool(self.stem(x), 3, 2, padding=1)
        patches = self.patch_embed(x)
        token = self.cls_token.expand(x.shape[0], -1, -1)
        return x, torch.cat([token, patches.flatten(1, -2)], 1), tuple(patches.shape[1:-1])

    def to_map(self, state: State, index: int) -> Tensor:
        return state[0]

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        return state[0], self.norm(state[1])

    def pre_logits(self, features: tuple[Tensor, Tensor]) -> Tensor:
        """The mean over the map and the class token, joined."""
        return torch.cat([features[0].flatten(1, -2).mean(1), features[1][:, 0]], -1)

    def outputs(self, features: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        pooled = self.pre_logits(features)
        if not self.num_classes:
            return {"logits": pooled}
        by_map, by_token = pooled.split(list(self.head_dims.values()), -1)
        conv, trans = self.head["conv"](by_map), self.head["trans"](by_token)
        return {"logits": conv + trans, "conv_logits": conv, "trans_logits": trans}


def _variant(ratio: int, patch: int, params: float, gmacs: float, top1: float, where: str, **more) -> Variant:
    """`ratio` widens the map: 64, 128, 256 times it."""
    width, heads = (576, 9) if ratio == 6 else (384, 6)
    config = dict(dims=tuple(64 * 2**i * ratio for i in range(3)), embed_dim=width, heads=heads, patch=patch)
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.1) | more
    weights = Weights(f"{where} of github.com/pengzhiliang/Conformer (Google Drive)", "Apache-2.0", "manual")
    return Variant(config, figures, Inputs(), weights)


FAMILY = Family(
    name="conformer",
    model=Conformer,
    paper="Conformer: Local Features Coupling Global Representations for Visual Recognition",
    venue="ICCV 2021",
    arxiv="2105.03889",
    code="github.com/pengzhiliang/Conformer",
    licence="Apache-2.0",
    # small_patch32: params_m, gmacs and top1 as mmpretrain lists them; box_ap: COCO 1x, Mask R-CNN with an FPN
    variants={
        "conformer_tiny_patch16": _variant(1, 16, 23.5, 5.2, 81.3, "README"),
        "conformer_small_patch16": _variant(4, 16, 37.7, 10.6, 83.4, "README"),
        "conformer_small_patch32": _variant(
            4, 32, 38.85, 7.09, 81.96, "mmdetection/README", faster_rcnn_box_ap=43.1, box_ap=43.6
        ),
        "conformer_base_patch16": _variant(6, 16, 83.3, 23.3, 84.1, "README"),
    },
)
