"""Dilated re-parameterisation block of UniRepLKNet (arXiv 2311.15599, section 3.1, Fig. 2)."""

from __future__ import annotations

from torch import Tensor, nn

from ..layers import Branches, Conv

# (kernel, dilation) of the branches beside each large kernel, as the paper's code has them
BRANCHES = {
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    7: ((5, 1), (3, 2), (3, 3)),
    5: ((3, 1), (3, 2)),
}


class DilatedReparam(nn.Module):
    """A large depthwise kernel trained beside small dilated ones: (B, *S, C) -> (B, *S, C).

    Every branch has its batch norm; the sum folds into the large kernel alone (`vertebra.fuse`). Time and memory grow
    linearly with the map; in training the time is that of all kernels and the memory that of one map per branch.
    """

    def __init__(self, ndim: int, dim: int, kernel: int):
        super().__init__()
        if kernel not in BRANCHES:
            raise ValueError(f"kernel must be one of {sorted(BRANCHES)}, got {kernel!r}")
        beside = {f"k{size}_{dilation}": (size, dilation) for size, dilation in BRANCHES[kernel]}
        self.large: nn.Module = Branches(ndim, dim, dim, {"main": kernel, **beside}, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x)

    def merged(self) -> Conv:
        """The large kernel with all branches in it."""
        assert isinstance(self.large, Branches)
        return self.large.fuse()
