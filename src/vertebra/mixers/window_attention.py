"""Window attention of Swin (arXiv 2103.14030, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..layers import Attention, RelativePositionBias, ntuple, windows
from ..layers.cached import settled
from ..layers.frugal import repeat
from ..layers.window import Windows


class WindowAttention(Attention):
    """Attention in windows of `window` tokens per axis, rolled by `shift`: (B, *S, C) -> (B, *S, C).

    After a roll cells from opposite edges share a window; pairs of them are masked. A map that windows do not fill is
    padded with zeros, which take part as keys unless `mask_keys`. `position` False leaves out the relative position
    bias. Memory grows linearly with the map.
    """

    kept = None  # by `vertebra.deploy`: what was computed from weights alone; see layers.cached.settled

    def __init__(
        self, ndim: int, dim: int, heads: int, window: int | Sequence[int] = 7, shift: int = 0,
        mask_keys: bool = False, position: bool = True,
    ):  # fmt: skip
        super().__init__(dim, heads)
        self.window, self.shift, self.mask_keys = ntuple(window, ndim, "window"), (shift,) * ndim, mask_keys
        self.pos = RelativePositionBias(self.window, heads) if position else None

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[1:-1])
        parts = self._windows(sides)
        return parts.join(super().forward(parts.split(x), self._bias(sides, x.shape[0])), sides)

    def _windows(self, sides: tuple[int, ...]) -> Windows:
        where = self.proj.weight.device
        return windows(sides, self.window, shift=self.shift, mask_keys=self.mask_keys, device=where)

    @settled
    def _bias(self, sides: tuple[int, ...], batch: int) -> Tensor | None:
        parts = self._windows(sides)
        bias = parts.bias(None if self.pos is None else self.pos(), batch)
        return bias if self.kept is None else repeat(bias, batch * parts.number)  # deployed: repeated once for all
