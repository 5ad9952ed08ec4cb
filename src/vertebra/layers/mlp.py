"""Channel MLPs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Mlp(nn.Module):
    """fc1, activation, fc2 over the last axis: (..., C) -> (..., out).

    `middle` is a module on the hidden map between fc1 and the activation (such as PVT v2's depthwise convolution).
    With `act_first` it comes after the activation instead.
    `linear` builds fc1 and fc2: ``partial(Conv, ndim)`` where a checkpoint has them as 1x1 convolutions.
    """

    def __init__(
        self, dim: int, hidden: int, out: int | None = None, act=nn.GELU, middle: nn.Module | None = None,
        linear: Callable[..., nn.Module] = nn.Linear, bias: bool = True, act_first: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.fc1 = linear(dim, hidden, bias=bias)
        self.middle = middle
        self.act, self.act_first = act(), act_first
        self.fc2 = linear(hidden, out or dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.act_first:
            x = self.act(x)
        if self.middle is not None:
            x = self.middle(x)
        return self.fc2(x if self.act_first else self.act(x))
