"""Token mixers that stand alone, one signature: module(x: (B, *S, C)) -> (B, *S, C)."""

from .hydra import HydraAttention
from .separable_attention import SeparableAttention
from .spatial_reduction import SpatialReductionAttention
from .window_attention import WindowAttention

__all__ = ["HydraAttention", "SeparableAttention", "SpatialReductionAttention", "WindowAttention"]
