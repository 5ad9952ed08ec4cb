"""Re-parameterisation: parallel branches in training, one convolution after (RepVGG, arXiv 2101.03697, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .kernels import after
from .space import BatchNorm, Conv


def folded(weight: Tensor, bias: Tensor | None, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a convolution followed by `norm` in evaluation mode."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.running_mean.double() - (0 if bias is None else bias.double())
    return weight.double() * scale.view(-1, *(1,) * (weight.ndim - 1)), norm.bias.double() - shift * scale


def convolution_like(like: Conv, weight: Tensor, bias: Tensor) -> Conv:
    """A convolution with the geometry of `like`, a bias, and these weights."""
    ndim = weight.ndim - 2
    out, dim = weight.shape[0], weight.shape[1] * like.groups
    merged = type(like)(ndim, dim, out, tuple(weight.shape[2:]), like.stride, like.padding, like.dilation, like.groups)
    merged.to(device=like.weight.device, dtype=like.weight.dtype).train(like.training)
    with torch.no_grad():
        merged.weight.copy_(weight)
        merged.bias.copy_(bias)
    return merged


def fold(conv: Conv, norm: BatchNorm) -> Conv:
    """`norm(conv(x))` in evaluation mode as one convolution."""
    return convolution_like(conv, *folded(conv.weight, conv.bias, norm))


def dense(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """A dilated kernel as the equal plain one: zeros between its taps (UniRepLKNet, arXiv 2311.15599, section 3.1)."""
    sizes = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    wide = weight.new_zeros(*weight.shape[:2], *sizes)
    wide[(slice(None), slice(None), *(slice(None, None, d) for d in dilation))] = weight
    return wide


class Branches(nn.Module):
    """Sum of conv + batch norm branches and an optional batch-norm identity: (B, *S, dim) -> (B, *S', out).

    `kernels` names each branch and gives its kernel size, or kernel size and dilation; the first is the largest and
    sets the geometry, smaller ones are centred on it. `fuse` returns the one convolution that computes the same.
    """

    def __init__(
        self, ndim, dim, out, kernels: dict[str, int | tuple[int, int]], stride=1, groups=1, identity: bool = False,
        eps=1e-5,
    ):  # fmt: skip
        super().__init__()
        self.names = tuple(kernels)
        for name, size in kernels.items():
            kernel, dilation = size if isinstance(size, tuple) else (size, 1)
            branch = nn.Module()
            branch.conv = Conv(ndim, dim, out, kernel, stride, dilation=dilation, groups=groups, bias=False)
            branch.norm = BatchNorm(out, eps=eps)
            self.add_module(name, branch)
        if identity and (dim != out or stride != 1):
            raise ValueError(
                f"an identity branch needs equal channels and stride 1, got {dim} -> {out}, stride {stride}"
            )
        self.identity = BatchNorm(dim, eps=eps) if identity else None

    def forward(self, x: Tensor) -> Tensor:
        y = None if self.identity is None else self.identity(x)
        for name in self.names:
            branch = getattr(self, name)
            y = after(branch.norm(branch.conv(x)), None, y)
        return y

    def fuse(self, published: bool = True) -> Conv:
        """The convolution that equals this sum in evaluation mode."""
        main = getattr(self, self.names[0]).conv
        centre = tuple(k // 2 for k in main.kernel)
        weight = torch.zeros_like(main.weight, dtype=torch.float64)
        bias = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
        for name in self.names:
            branch = getattr(self, name)
            w, b = folded(branch.conv.weight, branch.conv.bias, branch.norm)
            w = dense(w, branch.conv.dilation)
            inner = tuple(slice(c - k // 2, c - k // 2 + k) for c, k in zip(centre, w.shape[2:], strict=True))
            weight[(slice(None), slice(None), *inner)] += w
            bias += b
        if self.identity is not None:
            out, per_group = weight.shape[:2]
            eye = torch.zeros_like(weight)
            rows = torch.arange(out, device=weight.device)
            eye[(rows, rows % per_group, *centre)] = 1
            w, b = folded(eye, None, self.identity)
            weight, bias = weight + w, bias + b
        return convolution_like(main, weight, bias)
