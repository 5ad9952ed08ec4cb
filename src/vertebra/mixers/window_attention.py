"""Window attention of Swin (arXiv 2103.14030, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..layers import Attention, RelativePositionBias, ntuple, windows


class WindowAttention(Attention):
    """Attention in windows of `window` tokens per axis, rolled by `shift`: (B, *S, C) -> (B, *S, C).

    After a roll cells from opposite edges share a window; pairs of them are masked. A map that windows do not fill is
    padded with zeros, which take part as keys unless `mask_keys`. `position` False leaves out the relative position
    bias. Memory grows linearly with the map.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, window: int | Sequence[int] = 7, shift: int = 0,
        mask_keys: bool = False, position: bool = True,
    ):  # fmt: skip
        super().__init__(dim, heads)
        self.window, self.shift, self.mask_keys = ntuple(window, ndim, "window"), (shift,) * ndim, mask_keys
        self.pos = RelativePositionBias(self.window, heads) if position else None

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[1:-1])
        parts = windows(sides, self.window, shift=self.shift, mask_keys=self.mask_keys, device=x.device)
        bias = parts.bias(None if self.pos is None else self.pos(), x.shape[0])
        return parts.join(super().forward(parts.split(x), bias), sides)
