"""Channel MLPs."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc1, activation, fc2 over the last axis: (..., C) -> (..., out).

    `middle` is a module on the hidden map between fc1 and the activation (such as PVT v2's depthwise convolution).
    """

    def __init__(self, dim: int, hidden: int, out: int | None = None, act=nn.GELU, middle: nn.Module | None = None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.middle = middle
        self.act = act()
        self.fc2 = nn.Linear(hidden, out or dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.middle is not None:
            x = self.middle(x)
        return self.fc2(self.act(x))
