"""The block that almost every transformer repeats."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from . import frugal
from .drop import DropPath, LayerScale, residual
from .mlp import Mlp


def _after_mlp(x: Any, normed: Any, mlp: nn.Module, scale: nn.Module, drop_path: DropPath) -> Any:
    """x + drop_path(scale(mlp(normed))); in training the MLP takes the scale in, which saves a map and two passes."""
    if type(scale) is LayerScale and type(mlp) is Mlp and frugal.wanted(scale.gamma) and not frugal.hooked(scale, mlp):
        return x + drop_path(mlp(normed, scale.gamma.view(-1)))
    return residual(x, mlp(normed), scale, drop_path)


class Block(nn.Module):
    """Transformer block, norms first: x + attn(norm1 x), then x + mlp(norm2 x); (..., C) -> (..., C).

    Both branches have stochastic depth, and with `scale` a layer scale that starts there. `position` runs before them
    (such as a convolution with a residual, which tells a token where it is); `norm` builds other norms than LayerNorm.
    """

    def __init__(
        self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float = 0.0, eps: float = 1e-5,
        scale: float | None = None, position: nn.Module | None = None, norm: Callable[[int], nn.Module] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.position = position or nn.Identity()
        norm = norm or partial(nn.LayerNorm, eps=eps)
        self.norm1, self.norm2 = norm(dim), norm(dim)
        self.attn, self.mlp = attn, mlp
        self.scale1, self.scale2 = (nn.Identity() if scale is None else LayerScale(dim, scale) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Any) -> Any:
        x = self.position(x)
        x = residual(x, self.attn(self.norm1(x)), self.scale1, self.drop_path)
        return _after_mlp(x, self.norm2(x), self.mlp, self.scale2, self.drop_path)


class DownBlock(Block):
    """x + attn(norm1 x), then shortcut(x) + mlp(norm2 x), which makes the map smaller: (B, *S, C) -> (B, *S', C').

    `mlp` and `shortcut` both give the new map; attention still sees the large one (CloFormer, FAT).
    """

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, shortcut: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(dim, attn, mlp, *args, **kwargs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.position(x)
        x = residual(x, self.attn(self.norm1(x)), self.scale1, self.drop_path)
        return self.shortcut(x) + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class NextBlock(nn.Module):
    """x + mlp(norm(mixer x)): one residual around token mixer and MLP; (B, *S, C) -> (B, *S, C).

    The block of ConvNeXt (arXiv 2201.03545, Fig. 4), which InceptionNeXt calls MetaNeXt. `scale` starts a layer scale.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, norm: nn.Module, mlp: nn.Module, drop_path: float = 0.0,
        scale: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.mixer, self.norm, self.mlp = mixer, norm, mlp
        self.scale = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return _after_mlp(x, self.norm(self.mixer(x)), self.mlp, self.scale, self.drop_path)


class TokenBlock(Block):
    """The same over a state (tokens (B, P + N, C), grid of the N patches), for attention that never asks for places."""

    def forward(self, state: tuple[Tensor, tuple[int, ...]]) -> tuple[Tensor, tuple[int, ...]]:
        return super().forward(state[0]), state[1]


class GridBlock(Block):
    """The same for attention that asks where its patches lie: attn(tokens, grid)."""

    def forward(self, state: tuple[Tensor, tuple[int, ...]]) -> tuple[Tensor, tuple[int, ...]]:
        x, grid = self.position(state[0]), state[1]
        x = residual(x, self.attn(self.norm1(x), grid), self.scale1, self.drop_path)
        return _after_mlp(x, self.norm2(x), self.mlp, self.scale2, self.drop_path), grid
