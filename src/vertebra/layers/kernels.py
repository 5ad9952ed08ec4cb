"""oneDNN's kernels for inference on the CPU: a product or a convolution, a shortcut and an activation in one pass.

torch's plain calls write the bias, the sum with a shortcut and the activation in further passes over memory; on large
maps these cost as much as the products. The operators here are those that torch's own compiler uses on the CPU.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cached import tracing

Act = tuple[str, list[float], str]  # oneDNN's name of an activation, its numbers, its algorithm

NONE: Act = ("none", [], "")
DTYPES = (torch.float32, torch.bfloat16)
_OVER = {nn.ReLU: F.relu, nn.ReLU6: F.relu6, nn.SiLU: F.silu, nn.Hardswish: F.hardswish}  # can be done in place
WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
LARGE = 3 * 2**20  # numbers of a map that GELU writes sooner inside the kernel on processors that are not WIDE
SMALL = 2**24  # float32 multiplications up to which torch's own call, which starts sooner, is the faster one


def activation(module: nn.Module | None) -> Act | None:
    """What oneDNN calls this activation; None where it has no such one."""
    match module:
        case None | nn.Identity():
            return NONE
        case nn.ReLU():
            return "relu", [], ""
        case nn.GELU():
            return "gelu", [], module.approximate
        case nn.SiLU():
            return "swish", [], ""
        case nn.Sigmoid():
            return "sigmoid", [], ""
        case nn.Tanh():
            return "tanh", [], ""
        case nn.Hardswish():
            return "hardswish", [], ""
        case nn.Hardsigmoid():
            return "hardsigmoid", [], ""
        case nn.Hardtanh():  # nn.ReLU6 is one
            return "hardtanh", [module.min_val, module.max_val], ""
        case nn.LeakyReLU():
            return "leaky_relu", [module.negative_slope], ""
    return None


def _inside(act: nn.Module | None, numbers: int) -> Act | None:
    """The activation that oneDNN applies to an output of so many numbers; None where torch does it, or does it sooner.

    Without AVX-512 its GELU takes two to three times as long as torch's, which pays where the map leaves the caches.
    """
    return None if not WIDE and isinstance(act, nn.GELU) and numbers < LARGE else activation(act)


def hooked(*modules: nn.Module) -> bool:
    """Whether somebody watches one of `modules`: then it has to be called, not its weights used."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


@functools.cache
def present(dtype: torch.dtype) -> bool:
    """Whether this torch and processor have the kernels for `dtype`; on x86 only, they were not measured elsewhere."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def unwatched() -> bool:
    """Whether nobody looks at torch's operators as they run: a trace, a counter of operations, torch.func."""
    return (
        not tracing()
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels may stand in for torch's calls on `x`.

    They know neither gradients nor autocast nor tensors of another class, and watchers are to see the usual operators.
    """
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and x.dtype == weight.dtype
        and x.ndim > 1
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and torch._C._get_mkldnn_enabled()
        and present(x.dtype)
        and unwatched()
    )


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """act(x weight^T + bias + shortcut) by the kernel, for x (..., in) and weight (out, in), plain or packed."""
    kernel, known = torch.ops.mkldnn._linear_pointwise, _inside(act, x.numel() // x.shape[-1] * weight.shape[0])
    if shortcut is not None:
        return after(kernel.binary(x, shortcut, weight, bias, "add"), act)
    return after(kernel(x, weight, bias, *NONE), act) if known is None else kernel(x, weight, bias, *known)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding, stride, dilation, groups: int,
    act: nn.Module | None = None, shortcut: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(convolution of x + shortcut) by the kernel, for x (B, dim, *S) at rank 2 or 3, weight plain or packed."""
    numbers = x.numel() // x.shape[1] * weight.shape[0] // math.prod(stride)  # about as many, whatever the padding
    kernel, known = torch.ops.mkldnn._convolution_pointwise, _inside(act, numbers)
    geometry = padding, stride, dilation, groups
    if shortcut is None:
        if known is None:
            return after(kernel(x, weight, bias, *geometry, *NONE), act)
        return kernel(x, weight, bias, *geometry, *known)
    if groups != 1:  # the kernel takes sums of full convolutions only
        return after(kernel(x, weight, bias, *geometry, *NONE).add_(shortcut), act)
    if known is not None and known[0] == "relu":
        return kernel.binary(x, shortcut, weight, bias, *geometry, "add", 1.0, *known)
    return after(kernel.binary(x, shortcut, weight, bias, *geometry, "add", 1.0, None, [], None), act)


def after(y: Tensor, act: nn.Module | None, shortcut: Tensor | None = None) -> Tensor:
    """act(y + shortcut) in passes of their own; without gradients both overwrite `y`, which nothing else may read.

    (With them they must not: `y` is a view, and for what is written into a view autograd copies the whole gradient.)
    """
    over = not torch.is_grad_enabled() and not tracing()
    if shortcut is not None:
        y = y.add_(shortcut) if over and y.dtype == shortcut.dtype else y + shortcut
    if act is None:
        return y
    return _OVER[type(act)](y, inplace=True) if over and type(act) in _OVER and not hooked(act) else act(y)


def adds(x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the kernels can add `shortcut` to what they make of `x`."""
    return shortcut is None or (shortcut.dtype == x.dtype and shortcut.is_contiguous())


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module | None = None, shortcut: Tensor | None = None
) -> Tensor:
    """act(x weight^T + bias + shortcut) by what is fastest, for x (..., in) and weight (out, in): (..., out)."""
    if x.dtype == torch.float32:
        follows = not isinstance(act, None | nn.Identity)
        pays = follows and not tracing() and x.numel() * weight.shape[0] >= SMALL
    else:
        pays = True  # torch's own writes the bias first
    if pays and usable(x, weight) and adds(x, shortcut):
        return product(x, weight, bias, act, shortcut)
    return after(F.linear(x, weight, bias), act, shortcut)


class Linear(nn.Linear):
    """torch's linear layer, act(layer + shortcut) where forward is given these: (..., in) -> (..., out)."""

    takes_act = sums = True  # see `then` and `plus`

    def forward(self, x: Tensor, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        return linear(x, self.weight, self.bias, act, shortcut)


def plus(layer: nn.Module, x: Tensor, shortcut: Tensor) -> Tensor:
    """layer(x) + shortcut, by the layer's own kernel where it says that it `sums`."""
    if getattr(layer, "sums", False) and not hooked(layer):
        return layer(x, shortcut=shortcut)
    return layer(x) + shortcut


def then(layer: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(layer(x)), in one pass where the layer's kernel takes the activation along."""
    if getattr(layer, "takes_act", False) and unwatched() and not hooked(layer, act):
        return layer(x, act)
    return act(layer(x))
