"""CeiT: Incorporating Convolution Designs into Visual Transformers (ICCV 2021, arXiv 2103.11816). Official code:
github.com/coeusguo/ceit, Apache-2.0.

ViT with three ideas from convolutional networks: tokens are cut from low-level features instead of pixels, a depthwise
convolution in the feed-forward relates neighbouring patches, and at the end the class tokens of all blocks attend to
each other, so that the head reads every depth.

Unusual here: no activation after the stem's batch norm; a batch norm after every convolution of the feed-forward, the
last too, and each convolution keeps its bias; the class token goes round the convolutions, so that its branch adds the
normed token itself. The last block's feed-forward of the patches does not reach the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Attention, Block, Conv, ConvNorm, Mlp, Positions, attend, max_pool, merge_heads, split_heads
from ..registry import Family, Inputs, Variant, Weights
from .vit import VisionTransformer

STEM = 64  # channels of the low-level features
State = tuple[Tensor, tuple[int, ...], tuple[Tensor, ...]]  # ViT's, and the class token (B, C) after each block


class ImageToTokens(nn.Module):
    """I2T (section 3.2, eq. 1): (B, *S, in_chans) -> (B, *S / patch, dim), patches cut from a map of stride four."""

    def __init__(self, ndim: int, in_chans: int, dim: int, patch: int):
        super().__init__()
        self.backbone = ConvNorm(ndim, in_chans, STEM, 7, 2)
        self.proj = Conv(ndim, STEM, dim, patch // 4, patch // 4, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(max_pool(self.backbone(x), 3, 2, 1))


class LocallyEnhanced(nn.Sequential):
    """LeFF (section 3.3, Fig. 3): tokens (B, 1 + N, C) -> the same; the patches lie on `grid` for the convolutions."""

    def __init__(self, ndim: int, dim: int, hidden: int):
        super().__init__(
            ConvNorm(ndim, dim, hidden, act=nn.GELU, bias=True),
            ConvNorm(ndim, hidden, hidden, 3, groups=hidden, act=nn.GELU, bias=True),
            ConvNorm(ndim, hidden, dim, bias=True),
        )

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        patches = super().forward(x[:, 1:].reshape(x.shape[0], *grid, x.shape[-1]))
        return torch.cat([x[:, :1], patches.flatten(1, -2)], 1)


class EnhancedBlock(Block):
    """A block with LeFF in place of the MLP (eq. 2 to 7); its class token joins those of the blocks before."""

    def forward(self, state: State) -> State:
        tokens, grid, classes = state
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens), grid))
        return tokens, grid, (*classes, tokens[:, 0].clone())  # a view would keep all tokens of each block in memory


class LayerwiseAttention(Block):
    """LCA (section 3.4, Fig. 4): class tokens of all blocks (B, depth, C) -> (B, 1, C).

    Only the last one asks; keys and values come from all.
    """

    def __init__(self, dim: int, heads: int, hidden: int, depth: int, eps: float):
        super().__init__(dim, Attention(dim, heads), Mlp(dim, hidden), eps=eps)
        self.table = nn.Parameter(torch.zeros(1, depth, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table
        q, k, v = split_heads(self.attn.qkv(self.norm1(x)), self.attn.heads, 3)
        last = x[:, -1:] + self.attn.proj(merge_heads(attend(q[:, :, -1:], k, v)))
        return last + self.mlp(self.norm2(last))


class CeiT(VisionTransformer):
    """I2T, blocks with LeFF, LCA, norm (Fig. 1). `forward_features` gives the one token (B, 1, C) that the head reads.

    The dense version (four taps, evenly spaced) gives raw maps; the paper has none.
    """

    prefix_std = 0.02
    pools = ("token",)
    load_antialias = False
    OFFICIAL = (
        (r"^patch_embed\.backbone\.norm\.", "i2t.backbone.bn."),
        (r"^patch_embed\.", "i2t."),
        (r"^neck\.table$", "pos_layer_embed"),
        (r"^neck\.mlp\.", "lca.feedforward."),
        (r"^neck\.", "lca."),
        (r"\.mlp\.(\d)\.conv\.", lambda m: f".leff.conv{int(m[1]) + 1}."),
        (r"\.mlp\.(\d)\.norm\.", lambda m: f".leff.bn{int(m[1]) + 1}."),
        *VisionTransformer.OFFICIAL,
    )

    def __init__(self, *, dim: int, depth: int = 12, heads: int, mlp_ratio: float = 4.0, **vit: Any):
        super().__init__(dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio, **vit)
        if not self.features_only:
            self.neck = LayerwiseAttention(dim, heads, int(dim * mlp_ratio), depth, self.eps)
            self.init_weights()

    def make_stem(self, dim: int, patch: int) -> nn.Module:
        if patch < 4 or patch % 4:
            raise ValueError(f"patch must be a multiple of the stem's stride 4, got {patch}")
        return ImageToTokens(self.ndim, self.in_chans, dim, patch)

    def make_positions(self, dim: int, img_size: tuple[int, ...], patch: int) -> Positions:
        grid = tuple((s + 3) // 4 // (patch // 4) for s in img_size)  # the stem rounds up, the patches down
        if min(grid) < 1:
            raise ValueError(f"img_size must hold a patch of {patch} on every axis, got {img_size}")
        return Positions(dim, grid, len(self.prefix), load_antialias=self.load_antialias)

    def make_block(self, dim: int, heads: int, hidden: int, drop_path: float) -> nn.Module:
        return EnhancedBlock(dim, Attention(dim, heads), LocallyEnhanced(self.ndim, dim, hidden), drop_path, self.eps)

    def embed(self, x: Tensor) -> State:
        return *super().embed(x), ()

    def to_map(self, state: State, index: int) -> Tensor:
        return super().to_map(state[:2], index)

    def finish(self, state: State) -> Tensor:
        return self.norm(self.neck(torch.stack(state[2], 1)))


_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}


def _variant(size: str, img: int, params: float, gmacs: float | None, top1: float, **more) -> Variant:
    dim, heads = _SIZES[size]
    figures = dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=0.1) | more
    where = Weights("README of github.com/coeusguo/ceit (Google Drive, one archive)", "Apache-2.0", "manual")
    return Variant(dict(patch=16, dim=dim, heads=heads), figures, Inputs(img), where)


FAMILY = Family(
    name="ceit",
    model=CeiT,
    paper="Incorporating Convolution Designs into Visual Transformers",
    venue="ICCV 2021",
    arxiv="2103.11816",
    code="github.com/coeusguo/ceit",
    licence="Apache-2.0",
    # params_m and top1 as the repository prints them (base: after 100 epochs; small at 384 pixels: as measured, 24.2 is
    # printed); the paper's gmacs leave the products inside attention out
    variants={
        "ceit_tiny_patch16_224": _variant("tiny", 224, 6.4, 1.2, 76.4),
        "ceit_tiny_patch16_384": _variant("tiny", 384, 6.4, 3.6, 78.8),
        "ceit_small_patch16_224": _variant("small", 224, 24.2, 4.5, 82.0),
        "ceit_small_patch16_384": _variant("small", 384, 24.35, 12.9, 83.3),
        "ceit_base_patch16_224": _variant("base", 224, 94.4, None, 81.9, top1_150_epochs=82.5),
    },
)
