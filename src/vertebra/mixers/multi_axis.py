"""Multi-axis attention of MaxViT (arXiv 2204.01697, section 3.2, Fig. 3): blocks of neighbours, grids over the map."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..layers import Attention, Windows, attend, merge_heads, ntuple, relative_index, resize, split_heads, windows
from ..layers.cached import settled


class KeyOffsetBias(nn.Module):
    """One learned number per head and offset, counted from the query to the key: () -> (heads, L, L).

    Swin counts the other way. The table is (heads, *(2 g - 1)), as TensorFlow's checkpoints keep it; one of another
    window is resampled linearly on loading, as the official fine-tuning at a larger size does.
    """

    no_decay = ("table",)

    def __init__(self, size: Sequence[int], heads: int):
        super().__init__()
        self.size = tuple(size)
        self.table = nn.Parameter(torch.empty(heads, *(2 * s - 1 for s in self.size)))
        nn.init.normal_(self.table, std=0.02)

    @settled
    def forward(self) -> Tensor:
        index = relative_index(self.size, device=self.table.device)
        length = index.shape[0]
        return self.table.flatten(1).index_select(1, index.t().flatten()).reshape(-1, length, length)

    def adapt(self, name: str, tensor: Tensor) -> Tensor | None:
        """A table of another window, resampled to this one; None where it cannot be."""
        if tensor.ndim != self.table.ndim or tensor.shape[0] != self.table.shape[0]:
            return None
        grid = tensor.float().movedim(0, -1).unsqueeze(0)
        return resize(grid, self.table.shape[1:], "linear").squeeze(0).movedim(-1, 0).to(tensor.dtype)


class BlockAttention(Attention):
    """Attention in blocks of `window` neighbouring cells per axis: (B, *S, C) -> (B, *S, C).

    A map that windows do not fill is padded, and the padded keys are masked. `position` makes the bias, `scale`
    replaces (C / heads)^-0.5. Time and memory grow linearly with the map.
    """

    def __init__(
        self, ndim: int, dim: int, heads: int, window: int | Sequence[int] = 7,
        position: Callable[[tuple[int, ...], int], nn.Module] = KeyOffsetBias, scale: float | None = None,
    ):  # fmt: skip
        super().__init__(dim, heads)
        self.window, self.scale = ntuple(window, ndim, "window"), scale
        self.pos = position(self.window, heads)

    def cut(self, sides: tuple[int, ...], device: torch.device) -> Windows:
        """How a map of `sides` falls into windows."""
        return windows(sides, self.window, mask_keys=True, device=device)

    def forward(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[1:-1])
        parts = self.cut(sides, x.device)
        q, k, v = split_heads(self.qkv(parts.split(x)), self.heads, 3)
        y = attend(q, k, v, parts.bias(self.pos(), x.shape[0]), self.scale)
        return parts.join(self.proj(merge_heads(y)), sides)


class GridAttention(BlockAttention):
    """The same among `window` cells per axis that are spread evenly over the whole map: (B, *S, C) -> (B, *S, C).

    The cells lie side / window apart, so that each window sees all of the map, thinly.
    """

    def cut(self, sides: tuple[int, ...], device: torch.device) -> Windows:
        interval = tuple((s + w - 1) // w for s, w in zip(sides, self.window, strict=True))
        return windows(sides, self.window, interval, mask_keys=True, groups=(1,) * len(sides), device=device)
