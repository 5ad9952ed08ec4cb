"""Cross-shaped window attention of CSWin (arXiv 2107.00652, sections 3.2 and 3.3, Fig. 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import Conv, Linear, attend, check_heads, merge_heads, split_heads, windows
from ..layers.window import KEY_MASK


class CrossShapedAttention(nn.Module):
    """Attention in stripes, a share of the heads along each axis: (B, *S, C) -> (B, *S, C).

    The heads of an axis attend in stripes that take up the whole of it and `stripe` cells of every other axis; together
    they reach a cross (in 3-D three bars). A line has two shares, as an image of height one: windows of `stripe` cells
    and the whole line. A depthwise convolution of the values inside each stripe says where a token is (LePE,
    section 3.3). `whole` makes one stripe of the map. A ragged last stripe is only shorter: padded keys are masked.

    With N tokens and L the longest side time grows with N L stripe^(ndim - 1) (`whole`: N^2). Memory grows with N:
    fused attention forms no weights, and every head's tokens are copied once into their stripes.
    """

    def __init__(self, ndim: int, dim: int, heads: int, stripe: int = 7, whole: bool = False):
        super().__init__()
        check_heads(dim, heads)
        shares = 1 if whole else max(ndim, 2)
        if heads < shares:
            raise ValueError(f"{heads} heads cannot be shared out over {shares} directions of stripes")
        if stripe < 1:
            raise ValueError(f"stripe must be at least 1, got {stripe}")
        ends = [heads * (i + 1) // shares for i in range(shares)]
        self.shares = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        self.ndim, self.heads, self.stripe, self.whole = ndim, heads, stripe, whole
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)
        widths = [share * dim // heads for share in self.shares]
        self.local = nn.ModuleList(Conv(ndim, width, width, 3, groups=width) for width in widths)

    def _attend(self, stripes: Tensor, index: int, mask: Tensor | None = None) -> Tensor:
        """q|k|v of stripes (W, *size, 3 c) -> (W, L, c) for the heads of share `index`."""
        q, k, v = split_heads(stripes.flatten(1, -2), self.shares[index], 3)
        place = self.local[index](stripes[..., stripes.shape[-1] // 3 * 2 :])
        return merge_heads(attend(q, k, v, mask)) + place.flatten(1, -2)

    def forward(self, x: Tensor) -> Tensor:
        batch, *sides, dim = x.shape
        qkv = self.qkv(x)
        if self.whole:
            return self.proj(self._attend(qkv, 0).reshape(x.shape))
        parts = qkv.unflatten(-1, (3, self.heads, dim // self.heads)).split(self.shares, -2)
        found = []
        for index, part in enumerate(parts):
            along = index - len(parts) + self.ndim  # the axis that these stripes follow; -1, none, on a line
            size = tuple(side if axis == along else self.stripe for axis, side in enumerate(sides))
            once = tuple(1 if axis == along else None for axis in range(self.ndim))
            cut = windows(tuple(sides), size, groups=once, device=x.device)
            stripes = cut.split(part.flatten(-3))
            mask = None
            if cut.valid is not None:
                keys = KEY_MASK * (~cut.valid).to(x.dtype).reshape(1, cut.number, 1, 1, cut.length)
                mask = keys.expand(batch, -1, -1, -1, -1).flatten(0, 1)
            y = self._attend(stripes.reshape(stripes.shape[0], *size, stripes.shape[-1]), index, mask)
            found.append(cut.join(y, sides))
        return self.proj(torch.cat(found, -1))
