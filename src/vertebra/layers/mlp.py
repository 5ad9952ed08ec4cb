"""Channel MLPs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import frugal
from .cached import tracing
from .kernels import Linear, linear, then
from .space import Conv

_LARGE, _PART, _ROWS = 2**25, 2**22, 1024  # bytes of a hidden map taken in parts, bytes and least rows of a part


class Mlp(nn.Module):
    """fc1, activation, fc2 over the last axis: (..., C) -> (..., out).

    `middle` is a module on the hidden map between fc1 and the activation (such as PVT v2's depthwise convolution).
    With `act_first` it comes after the activation instead. forward's `gamma` (out,) multiplies the result.
    `linear` builds fc1 and fc2: ``partial(Conv, ndim)`` where a checkpoint has them as 1x1 convolutions.
    """

    def __init__(
        self, dim: int, hidden: int, out: int | None = None, act=nn.GELU, middle: nn.Module | None = None,
        linear: Callable[..., nn.Module] = Linear, bias: bool = True, act_first: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.fc1 = linear(dim, hidden, bias=bias)
        self.middle = middle
        self.act, self.act_first = act(), act_first
        self.fc2 = linear(hidden, out or dim, bias=bias)

    def forward(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        rows = self._rows(x)
        if rows:
            parts = x.flatten(0, -2).split(rows)
            return torch.cat([self._through(part, gamma) for part in parts]).view(*x.shape[:-1], -1)
        return self._through(x, gamma)

    def _rows(self, x: Tensor) -> int:
        """How many rows of `x` to take at a time in inference, 0 for all.

        On a CPU a large hidden map is written to memory that the system has to find and clear first, which takes about
        as long as the products; some rows at a time stay in the cache.
        """
        if self.middle is not None or x.device.type != "cpu" or torch.is_grad_enabled() or tracing():
            return 0
        if frugal.hooked(self.fc1, self.act, self.fc2):  # who watches them is to see the whole map
            return 0
        width = self.fc1.weight.shape[0] * x.element_size()
        return max(_ROWS, _PART // width) if x.numel() // x.shape[-1] * width > _LARGE else 0

    def _through(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        if self.act_first:
            x = then(self.fc1, self.act, x)
            x = self.fc2(x if self.middle is None else self.middle(x))
        else:
            last, x = (self.fc1, x) if self.middle is None else (self.middle, self.fc1(x))
            if torch.is_grad_enabled():
                x = last(x)
                if frugal.wanted(x) and frugal.saves(self.act, self.fc2):
                    return frugal.act_linear(x, self.act, self.fc2, gamma)
                x = self.fc2(self.act(x))
            else:
                x = self.fc2(then(last, self.act, x))
        return x if gamma is None else x * gamma


class ConvGlu(nn.Module):
    """Convolutional gated linear unit (TransNeXt, arXiv 2311.17132): (B, *S, C) -> (B, *S, out).

    fc1 gives a gate and a value; the gate passes a depthwise convolution and the activation, so that each cell's
    channels are weighed by what lies around it.
    """

    def __init__(self, ndim: int, dim: int, hidden: int, out: int | None = None, kernel: int = 3, act=nn.GELU):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, 2 * hidden), Linear(hidden, out or dim)
        self.conv, self.act = Conv(ndim, hidden, hidden, kernel, groups=hidden), act()

    def forward(self, x: Tensor) -> Tensor:
        # two products, not two halves of one: the convolution would copy its half
        (gate, value), (gate_bias, value_bias) = self.fc1.weight.chunk(2), self.fc1.bias.chunk(2)
        gates = then(self.conv, self.act, linear(x, gate, gate_bias))
        return self.fc2(gates * linear(x, value, value_bias))
