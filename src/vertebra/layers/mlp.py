"""Channel MLPs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc1, activation, fc2 over the last axis: (..., C) -> (..., out).

    `middle` is a module on the hidden map between fc1 and the activation (such as PVT v2's depthwise convolution).
    `linear` builds fc1 and fc2: ``partial(Conv, ndim)`` where a checkpoint has them as 1x1 convolutions.
    """

    def __init__(
        self, dim: int, hidden: int, out: int | None = None, act=nn.GELU, middle: nn.Module | None = None,
        linear: Callable[..., nn.Module] = nn.Linear, bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.fc1 = linear(dim, hidden, bias=bias)
        self.middle = middle
        self.act = act()
        self.fc2 = linear(hidden, out or dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.middle is not None:
            x = self.middle(x)
        return self.fc2(self.act(x))
