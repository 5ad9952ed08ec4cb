"""Rank-free building blocks on channels-last maps (B, *S, C); they know nothing of models or papers' names."""

from .attention import (
    Attention,
    CrossAttention,
    attend,
    attention_rollout,
    check_heads,
    merge_heads,
    record_attention,
    split_heads,
)
from .block import Block, GridBlock, TokenBlock
from .conv import ConvNorm, InvertedResidual, ResidualConv, SqueezeExcite, init_fan_out
from .drop import DropPath, LayerScale, drop_path_rates
from .embed import CrossScale, PatchEmbed, PatchMerging
from .mlp import Mlp
from .position import DynamicPositionBias, Positions, RelativePositionBias, built_grid, relative_index, sincos
from .reparam import Branches
from .space import (
    BatchNorm,
    Conv,
    ConvTranspose,
    GroupNorm,
    adaptive_avg_pool,
    avg_pool,
    crop,
    grid_sample,
    max_pool,
    ntuple,
    pad_to,
    resize,
    space_to_depth,
    unfold,
)
from .window import Windows, windows

__all__ = [
    "Attention",
    "BatchNorm",
    "Block",
    "Branches",
    "Conv",
    "ConvNorm",
    "ConvTranspose",
    "CrossAttention",
    "CrossScale",
    "DropPath",
    "DynamicPositionBias",
    "GridBlock",
    "GroupNorm",
    "InvertedResidual",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "Positions",
    "RelativePositionBias",
    "ResidualConv",
    "SqueezeExcite",
    "TokenBlock",
    "Windows",
    "adaptive_avg_pool",
    "attend",
    "attention_rollout",
    "avg_pool",
    "built_grid",
    "check_heads",
    "crop",
    "drop_path_rates",
    "grid_sample",
    "init_fan_out",
    "max_pool",
    "merge_heads",
    "ntuple",
    "pad_to",
    "record_attention",
    "relative_index",
    "resize",
    "sincos",
    "space_to_depth",
    "split_heads",
    "unfold",
    "windows",
]
