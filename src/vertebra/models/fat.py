"""FAT: Lightweight Vision Transformer with Bidirectional Interaction (NeurIPS 2023, arXiv 2306.00396). Official code:
github.com/qhfan/FAT, no licence stated.

A depthwise convolution and attention read the same queries, and each is meant to adapt to the other: what attention
finds gates what the convolution finds. Keys and values come from a map that strided depthwise convolutions made smaller
in small steps, with channels mixed in between, instead of one coarse pooling.

Unusual here: the code computes the gate from local to global but does not apply it, so neither does this. As in
CloFormer the last block of a stage makes the map smaller inside its MLP (the shortcut's convolution is depthwise here),
and norms have one group. The MLP's convolution has a residual only where it keeps the size, and a batch norm always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backbone import Rules
from ..layers import BatchNorm, Block, Conv, ConvNorm, DownBlock, Mlp, OneGroup, ResidualConv
from ..layers.reparam import fold, folded
from ..mixers import FullyAdaptiveAttention
from ..registry import Family, Variant
from .cloformer import ShrinkingPyramid


class LocalNorm(nn.Module):
    """The hidden part of the MLP: depthwise convolution, a residual at stride 1, norm.

    (B, *S, C) -> (B, *ceil(S / stride), C).
    """

    def __init__(self, ndim: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.residual = stride == 1
        self.conv = Conv(ndim, dim, dim, kernel, stride, groups=dim)
        self.norm: nn.Module = BatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(x + y if self.residual else y)

    def fuse(self, published: bool = True) -> nn.Module:
        """The same with norm and residual folded into the convolution, where more than the published code is asked."""
        if published or not isinstance(self.norm, BatchNorm):
            return self
        conv = fold(self.conv, self.norm)
        if self.residual:  # one at the centre of every kernel, scaled as the norm scales
            scale, _ = folded(torch.ones_like(self.norm.weight).unsqueeze(1), None, self.norm)
            with torch.no_grad():
                conv.weight[(slice(None), slice(None), *(k // 2 for k in conv.kernel))] += scale
        self.conv, self.norm, self.residual = conv, nn.Identity().train(self.training), False
        return self


class FAT(ShrinkingPyramid):
    """The pyramid: strides 4 to 32, each stage with its heads, kernel and reduction of keys (`windows`)."""

    OFFICIAL: ClassVar[Rules] = (
        *ShrinkingPyramid.OFFICIAL,
        (r"\.position\.conv\.", ".cpe."),
        (r"\.attn\.local\.", ".attn.local_mixer."),
        (r"\.attn\.proj\.", ".attn.mixer."),
        (r"\.attn\.down\.convs\.(\d+)\.conv\.", r".attn.pool.conv\1."),
        (r"\.attn\.down\.convs\.(\d+)\.norm\.", r".attn.pool.bn\1."),
        (r"\.attn\.down\.mixes\.(\d+)\.", r".attn.pool.linear\1."),
        (r"\.mlp\.middle\.conv\.", ".ffn.dwconv."),
        (r"\.mlp\.middle\.norm\.", ".ffn.bn."),
        (r"\.mlp\.fc", ".ffn.fc"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int],
        heads: Sequence[int],
        depths: Sequence[int] = (2, 2, 6, 2),
        kernels: Sequence[int] = (3, 5, 7, 9),
        windows: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        mlp_kernel: int = 5,
        drop_path_rate: float = 0.0,
        **contract: Any,
    ):
        super().__init__(**contract)
        ndim = self.ndim

        def make(i: int, rate: float, out: int | None) -> nn.Module:
            dim, hidden = dims[i], int(dims[i] * mlp_ratio)
            attn = FullyAdaptiveAttention(ndim, dim, heads[i], kernels[i], windows[i])
            local = LocalNorm(ndim, hidden, mlp_kernel, 2 if out else 1)
            mlp = Mlp(dim, hidden, out, middle=local, linear=partial(Conv, ndim), act_first=True)
            position = ResidualConv(ndim, dim, kernels[i])
            if out is None:
                return Block(dim, attn, mlp, rate, norm=OneGroup, position=position)
            shortcut = nn.Sequential(ConvNorm(ndim, dim, dim, 5, 2, groups=dim, bias=True), Conv(ndim, dim, out))
            return DownBlock(dim, attn, mlp, shortcut, rate, norm=OneGroup, position=position)

        self.grow(dims, depths, drop_path_rate, make)


def _variant(dims, heads, drop_path, params, gmacs, top1, depths=(2, 2, 6, 2)) -> Variant:
    config = dict(dims=dims, heads=heads, depths=depths)
    return Variant(config, dict(params_m=params, gmacs=gmacs, top1=top1, drop_path=drop_path))


# figures as the repository prints them; no weights were ever published
FAMILY = Family(
    name="fat",
    model=FAT,
    paper="Lightweight Vision Transformer with Bidirectional Interaction",
    venue="NeurIPS 2023",
    arxiv="2306.00396",
    code="github.com/qhfan/FAT",
    licence="none stated",
    variants={
        "fat_b0": _variant((32, 80, 160, 256), (2, 5, 10, 16), 0.05, 4.5, 0.7, 77.6),
        "fat_b1": _variant((48, 96, 192, 384), (3, 6, 12, 24), 0.1, 7.8, 1.2, 80.1),
        "fat_b2": _variant((64, 128, 256, 512), (2, 4, 8, 16), 0.1, 13.5, 2.0, 81.9),
        "fat_b3": _variant((64, 128, 256, 512), (2, 4, 8, 16), 0.15, 29, 4.4, 83.6, (4, 4, 16, 4)),
    },
)
