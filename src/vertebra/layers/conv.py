"""Convolutional blocks that many papers share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .cached import tracing
from .drop import DropPath
from .kernels import after, hooked, plus, then
from .reparam import fold
from .space import BatchNorm, Conv

_FOLD = 4  # a norm is folded at call time where the map that comes out has this many times the weight's numbers
_LEAST = 2**16  # and the one that goes in so many: below, folding takes longer than the norm


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `value`, at least one of them and never below 0.9 of it (MobileNet)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Deal the channels of (..., C) out like cards: output i * groups + j is input j * C / groups + i.

    ShuffleNet (arXiv 1707.01083, Fig. 1), so that the next grouped convolution sees every group.
    """
    return x.unflatten(-1, (groups, x.shape[-1] // groups)).transpose(-1, -2).flatten(-2)


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation: (B, *S, dim) -> (B, *S', out).

    forward's `shortcut` (B, *S', out) is added in front of the activation, with `act_first` at the end.
    `act_first` puts the activation before the norm, which then cannot be folded into the convolution.
    `keep` marks a batch norm that the paper's own deployed network leaves in place: `vertebra.fuse` folds it only when
    asked for more than the published structure.
    """

    def __init__(
        self, ndim, dim, out, kernel=1, stride=1, padding=None, dilation=1, groups=1,
        act=None, bias=False, eps=1e-5, keep=True, act_first=False,
    ):  # fmt: skip
        super().__init__()
        self.conv = Conv(ndim, dim, out, kernel, stride, padding, dilation, groups, bias)
        self.norm = BatchNorm(out, eps=eps)
        self.act = nn.Identity() if act is None else act()
        self.keep, self.act_first = keep, act_first

    @property
    def sums(self) -> bool:
        """Whether a shortcut may be added on the way; see `plus`."""
        return isinstance(self.act, nn.Identity) and not hooked(self.conv, self.norm)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        conv, norm, act = self.conv, self.norm, self.act
        if self.act_first:
            x = norm(then(conv, act, x))
            return x if shortcut is None else x + shortcut
        if self._folds(x, conv, norm, act):
            return conv.run(x, *self._folded(), act, shortcut)
        if isinstance(norm, nn.Identity) and getattr(conv, "takes_act", False) and not hooked(conv, act):
            return conv(x, act, shortcut)
        x = norm(conv(x))
        if hooked(conv, norm):  # who watches them is to keep what they gave
            return act(x if shortcut is None else x + shortcut)
        return after(x, act, shortcut)

    def _folds(self, x: Tensor, conv: nn.Module, norm: nn.Module, act: nn.Module) -> bool:
        """Whether it is sooner in inference to scale the weight, which is small, than the map that comes out."""
        return (
            not tracing()
            and x.numel() >= _LEAST
            and type(norm) is BatchNorm
            and type(conv) is Conv
            and not norm.training
            and not self.act_first
            and not torch.is_grad_enabled()
            and not hooked(conv, norm, act)
            and not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
            and _FOLD * conv.span * math.prod(conv.stride) * conv.dim < x.numel()
        )

    def _folded(self) -> tuple[Tensor, Tensor]:
        conv, norm = self.conv, self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
        return conv.weight * scale.view(-1, *(1,) * (conv.weight.ndim - 1)), torch.addcmul(norm.bias, shift, -scale)

    def fuse(self, published: bool = True) -> nn.Module:
        """The same map with the norm folded into the convolution (itself, where the norm is to stay)."""
        if isinstance(self.norm, nn.Identity) or self.act_first or (published and self.keep):
            return self
        self.conv, self.norm = fold(self.conv, self.norm), nn.Identity().train(self.training)
        return self


class ResidualConv(nn.Module):
    """x + depthwise convolution of x: (B, *S, C) -> (B, *S, C).

    In front of attention it serves as a conditional position encoding (CPVT, arXiv 2102.10882).
    """

    def __init__(self, ndim: int, dim: int, kernel: int = 3):
        super().__init__()
        self.conv = Conv(ndim, dim, dim, kernel, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return plus(self.conv, x, x)


class SqueezeExcite(nn.Module):
    """Channel gate from the global mean (arXiv 1709.01507, Fig. 2): (B, *S, C) -> (B, *S, C)."""

    def __init__(self, ndim: int, dim: int, hidden: int, act=nn.ReLU, gate=nn.Sigmoid):
        super().__init__()
        self.down, self.act = Conv(ndim, dim, hidden), act()
        self.up, self.gate = Conv(ndim, hidden, dim), gate()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(tuple(range(1, x.ndim - 1)), keepdim=True)
        return x * then(self.up, self.gate, then(self.down, self.act, mean))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project, shortcut where shapes allow (MobileNet v2, Fig. 4): (B, *S, dim) -> (B, *S', out)."""

    def __init__(self, ndim, dim, out, kernel=3, stride=1, expansion=6, act=nn.ReLU6, squeeze: int = 0, drop_path=0.0):
        super().__init__()
        hidden = round(dim * expansion)
        self.expand = ConvNorm(ndim, dim, hidden, act=act) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(ndim, hidden, hidden, kernel, stride, groups=hidden, act=act)
        self.squeeze = SqueezeExcite(ndim, hidden, squeeze) if squeeze else nn.Identity()
        self.project = ConvNorm(ndim, hidden, out)
        self.drop_path = DropPath(drop_path)
        self.residual = stride == 1 and dim == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(self.depthwise(self.expand(x)))
        if not self.residual:
            return self.project(y)
        if self.drop_path.training and self.drop_path.rate:
            return x + self.drop_path(self.project(y))
        return plus(self.project, y, x)


def init_truncated(module: nn.Module, std: float = 0.02) -> None:
    """Every convolution and linear layer truncated normal, its bias zero: ConvNeXt's rule."""
    for part in module.modules():
        if isinstance(part, Conv | nn.Linear):
            nn.init.trunc_normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def init_fan_out(module: nn.Module) -> None:
    """Every convolution in `module` normal with variance 2 / fan out, its bias zero: the rule of PVT's descendants."""
    for part in module.modules():
        if isinstance(part, Conv):
            fan_out = math.prod(part.kernel) * part.weight.shape[0] // part.groups
            nn.init.normal_(part.weight, std=math.sqrt(2 / fan_out))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
