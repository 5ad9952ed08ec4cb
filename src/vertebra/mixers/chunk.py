"""RepNeXt's chunked convolutions (arXiv 2406.16004, section 3) and the sums of depthwise kernels in them."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Conv
from ..layers.reparam import convolution_like, dense
from ..layers.space import conv


def _lines(ndim: int, dim: int, size: int, stride: int = 1, bias: bool = False) -> list[Conv]:
    """Depthwise kernels of `size` cells along one axis each, the last axis first; each strides along its own axis."""
    found = []
    for axis in reversed(range(ndim)):
        kernel, step = ([n if i == axis else 1 for i in range(ndim)] for n in (size, stride))
        found.append(Conv(ndim, dim, dim, kernel, step, groups=dim, bias=bias))
    return found


def _kernel(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one depthwise convolution that equals `module`."""
    if isinstance(module, Conv):
        weight = dense(module.weight.to(dtype), module.dilation)
        return weight, weight.new_zeros(weight.shape[0]) if module.bias is None else module.bias.to(dtype)
    assert isinstance(module, nn.Sequential)
    weights, biases = zip(*(_kernel(part, dtype) for part in module), strict=True)
    if not isinstance(module, KernelSum):  # lines across each other and without biases: their outer product
        return functools.reduce(operator.mul, weights), biases[0]
    full = [max(sizes) for sizes in zip(*(w.shape[2:] for w in weights), strict=True)]
    centred = []
    for w in weights:
        margins = [(f - k) // 2 for f, k in zip(full, w.shape[2:], strict=True)]
        centred.append(F.pad(w, [m for m in reversed(margins) for _ in range(2)]))
    return functools.reduce(operator.add, centred), functools.reduce(operator.add, biases)


class KernelSum(nn.Sequential):
    """Depthwise convolutions, chains and sums of them side by side, added up: (B, *S, C) -> (B, *S', C).

    A plain ``nn.Sequential`` among them is a chain of lines. The first is the widest and sets stride and padding. There
    is nothing but sums and products between the input and the output, so the kernels are added up instead of the maps:
    in training, too, one convolution runs. `fuse` keeps it and drops the parts.
    """

    def forward(self, x: Tensor) -> Tensor:
        main = self[0]
        weight, bias = _kernel(self, main.weight.dtype)
        return conv(x, weight, bias, main.stride, main.padding, main.dilation, main.groups)

    def fuse(self, published: bool = True) -> Conv:
        """The convolution that equals this sum."""
        assert isinstance(self[0], Conv)
        return convolution_like(self[0], *_kernel(self, torch.float64))


def small_kernels(ndim: int, dim: int, stride: int = 1) -> KernelSum:
    """One 3x3 in training: 3x3, a line of 3 per axis, and the corners alone (2x2, dilation 2).

    The lines stand side by side at stride one; at a stride they are a chain without biases.
    """
    lines = _lines(ndim, dim, 3, stride, bias=stride == 1)
    return KernelSum(
        Conv(ndim, dim, dim, 3, stride, groups=dim),
        KernelSum(*lines) if stride == 1 else nn.Sequential(*lines),
        Conv(ndim, dim, dim, 2, stride, dilation=2, groups=dim),
    )


def medium_kernels(ndim: int, dim: int, stride: int = 1) -> KernelSum:
    """One 7x7 in training: 7x7, a 5x3 that lies along each axis, and chains of lines of 7 and of 5."""
    slabs = ([5 if i == axis else 3 for i in range(ndim)] for axis in range(ndim))
    return KernelSum(
        Conv(ndim, dim, dim, 7, stride, groups=dim),
        KernelSum(*(Conv(ndim, dim, dim, slab, stride, groups=dim) for slab in slabs)),
        nn.Sequential(*_lines(ndim, dim, 7, stride)),
        nn.Sequential(*_lines(ndim, dim, 5, stride)),
    )


class ChunkMixer(nn.Module):
    """Four equal chunks of channels: kept, a small kernel, a medium one, a chain of long lines.

    (B, *S, C) -> (B, *S, C), Fig. 3. Small and medium kernels are sums that `vertebra.fuse` turns into one 3x3 and one
    7x7; the lines of `band` cells, one per axis, have biases and stay a chain. Time and memory grow linearly with the
    map.
    """

    def __init__(self, ndim: int, dim: int, band: int = 11):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim must divide into four chunks, got {dim}")
        share = dim // 4
        self.small, self.medium = small_kernels(ndim, share), medium_kernels(ndim, share)
        self.large = nn.Sequential(*_lines(ndim, share, band, bias=True))

    def forward(self, x: Tensor) -> Tensor:
        kept, small, medium, large = x.chunk(4, -1)
        return torch.cat([kept, self.small(small), self.medium(medium), self.large(large)], -1)
