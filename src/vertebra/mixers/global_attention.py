"""Plain self-attention over a whole map ("Attention Is All You Need", section 3.2)."""

from __future__ import annotations

from torch import Tensor

from ..layers import Attention


class GlobalAttention(Attention):
    """Every cell attends to every cell: (B, *S, C) -> (B, *S, C).

    Time grows with the square of the number of cells, memory with the number itself where attention is fused.
    """

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x.flatten(1, -2), bias).reshape(x.shape)
