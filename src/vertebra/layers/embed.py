"""From image to first map and from one stage to the next: patches, overlapping patches, cross-scale convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .conv import ConvNorm
from .kernels import Linear
from .space import Conv, OneGroup, pad_to, space_to_depth


class PatchEmbed(nn.Module):
    """Convolution with a stride, then an optional norm: (B, *S, dim) -> (B, *S / stride, out).

    kernel == stride gives ViT's patches (`pad` fills a ragged end with zeros, otherwise it is cut off), a larger kernel
    gives overlapping patches (PVT v2, CvT) padded by `padding`, by default kernel // 2.
    """

    def __init__(
        self, ndim, dim, out, kernel, stride=None, norm: nn.Module | None = None, pad: bool = False,
        padding: int | None = None, bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        stride = stride or kernel
        if padding is None:
            padding = 0 if kernel == stride else kernel // 2
        self.multiple = stride if pad and kernel == stride else None
        self.proj = Conv(ndim, dim, out, kernel, stride, padding, bias=bias)
        self.norm = norm or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.multiple is not None:
            x = pad_to(x, self.multiple)
        return self.norm(self.proj(x))


class ConvStem(nn.Module):
    """A strided convolution, `extra` more, a 2x2 patch, norm: (B, *S, dim) -> (B, *ceil(S / 2) // 2, out).

    Shunted Transformer (arXiv 2111.15193, section 3.3) and SMT (arXiv 2307.08579, section 3.1).
    """

    def __init__(self, ndim: int, dim: int, out: int, kernel: int = 7, extra: int = 0):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNorm(ndim, dim, out, kernel, 2, act=nn.ReLU),
            *(ConvNorm(ndim, out, out, 3, act=nn.ReLU) for _ in range(extra)),
            Conv(ndim, out, out, 2, 2, padding=0),
        )
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convs(x))


class DeepStem(nn.Module):
    """Four 3x3 convolutions, the first two strided, then 1x1 and a norm: (B, *S, dim) -> (B, *ceil(S / 4), out).

    The norm has one group. CloFormer (arXiv 2303.17803) and FAT (arXiv 2306.00396).
    """

    def __init__(self, ndim: int, dim: int, out: int):
        super().__init__()
        widths = (dim, out // 2, out, out, out)
        self.convs = nn.Sequential(
            *(ConvNorm(ndim, widths[i], widths[i + 1], 3, 2 if i < 2 else 1, act=nn.ReLU, bias=True) for i in range(4))
        )
        self.proj, self.norm = Conv(ndim, out, out), OneGroup(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(self.convs(x)))


class CrossScale(nn.Module):
    """Cross-scale embedding layer: convolutions of several kernels, one stride, concatenated (CrossFormer, Fig. 2).

    (B, *S, dim) -> (B, *S // stride, out). The smallest kernel has half of the channels, each next half of that, and
    the last the same as the one before.
    """

    def __init__(self, ndim: int, dim: int, out: int, kernels: Sequence[int], stride: int):
        super().__init__()
        last = len(kernels) - 1
        shares = [out // 2 ** min(i + 1, last) for i in range(len(kernels))] if last else [out]
        if sum(shares) != out or not all(shares):
            raise ValueError(
                f"{out} channels cannot be shared out over {len(kernels)} kernels: must divide by {2**last}"
            )
        self.convs = nn.ModuleList(
            Conv(ndim, dim, share, kernel, stride, padding=(kernel - stride) // 2)
            for kernel, share in zip(kernels, shares, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([conv(x) for conv in self.convs], dim=-1)


class PatchMerging(nn.Module):
    """Swin's merge: cells of 2 per axis concatenated, norm, linear (section 3.1): (B, *S, dim) -> (B, *S / 2, out)."""

    def __init__(self, ndim: int, dim: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(2**ndim * dim)
        self.reduction = Linear(2**ndim * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # order of the cells: the first axis varies fastest, as published weights expect
        return self.reduction(self.norm(space_to_depth(pad_to(x, 2), 2, first_axis_fastest=True)))
