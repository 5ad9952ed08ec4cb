"""Token mixers that stand alone, one signature: module(x: (B, *S, C)) -> (B, *S, C)."""

from .spatial_reduction import SpatialReductionAttention

__all__ = ["SpatialReductionAttention"]
