"""Linear layers and convolutions with their weights laid out once, as oneDNN wants them.

torch's plain calls, and the kernels given a plain weight, lay it out anew at every call.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import kernels
from ..layers.cached import tracing, version
from ..layers.kernels import Linear
from ..layers.space import Conv, _wrong_in_half, channels_first, channels_last

_PACKS = 3  # input shapes that a convolution keeps a packed weight for, such as one sample, a batch, the last batch


class _Packed(nn.Module):
    """What a packed linear layer and a packed convolution share: when the packed weight may be used, and which it is.

    The plain weight stays where it was, under its name: the state dict is the same, and a weight that was loaded,
    moved or changed in place is packed anew. Where the kernels do not apply (see `kernels.usable`) or do not pay (a
    small float32 product) the plain layer runs. `act` is an activation that followed the layer in a Sequential.
    """

    weight: Any  # the layer's own, declared by the class that this one is mixed into
    bias: Any
    act: nn.Module

    def _begin(self, act: nn.Module) -> None:
        self.__dict__["act"] = act  # no child module: those are found more slowly, and this runs at every call
        self._work = self._multiplications()
        self._packed: dict[Any, Tensor] = {}
        self._version = -1

    def _ready(self, x: Tensor, weight: Tensor) -> bool:
        if tracing():
            return False
        large = x.dtype != torch.float32 or x.numel() * self._work >= kernels.SMALL
        return large and kernels.usable(x, weight)

    def _multiplications(self) -> float:
        """How many for each number of the input."""
        raise NotImplementedError

    def _weight(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """`weight` packed for inputs of `shape`, or for the first one where others may use the same."""
        if self._version != version(weight):
            self._packed, self._version = {}, version(weight)
        key = self._key(shape)
        if key not in self._packed:
            if len(self._packed) >= _PACKS:
                self._packed.pop(next(iter(self._packed)))
            with torch.inference_mode(False), torch.no_grad():
                self._packed[key] = self._pack(weight.detach(), shape)
        return self._packed[key]

    def _key(self, shape: torch.Size) -> Any:
        return None

    def _pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = {}
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles: oneDNN's tensors can be neither
        return self.__dict__ | {"_packed": {}}

    def _product(self, x: Tensor, weight: Tensor, act: nn.Module | None, shortcut: Tensor | None) -> Tensor:
        """The layer over the last axis of `x`."""
        return kernels.product(x, self._weight(weight, x.shape), self.bias, act, shortcut)


class PackedLinear(_Packed, Linear):
    """act(linear layer + shortcut): (..., in) -> (..., out)."""

    def _multiplications(self) -> float:
        return self.out_features

    def _pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), math.prod(shape[:-1]))

    def forward(self, x: Tensor, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        act = self.act if act is None else act
        weight = self.weight
        if self._ready(x, weight) and kernels.adds(x, shortcut):
            return self._product(x, weight, act, shortcut)
        return super().forward(x, act, shortcut)


class PackedConv(_Packed, Conv):
    """act(convolution + shortcut): (B, *S, dim) -> (B, *S', out)."""

    def _multiplications(self) -> float:
        if self.groups != 1:  # those of torch start no sooner
            return math.inf
        return self.weight.numel() / self.weight.shape[1] / math.prod(self.stride)

    def _pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        if self._is_product(shape):
            rows = weight.movedim(1, -1).flatten(1).contiguous()
            return torch.ops.mkldnn._reorder_linear_weight(rows, math.prod(shape[:-1]))
        line, (batch, *sides, dim) = weight.ndim == 3, shape
        if line:
            weight, sides = weight.unsqueeze(2), [1, *sides]
        padding, stride, dilation = self._geometry()
        nn_ops = torch._C._nn
        reorder = nn_ops.mkldnn_reorder_conv2d_weight if weight.ndim == 4 else nn_ops.mkldnn_reorder_conv3d_weight
        # (the size of the input, which the stubs of torch leave out, decides the layout)
        return reorder(weight.to_mkldnn(), padding, stride, dilation, self.groups, (batch, dim, *sides))  # type: ignore[call-arg]

    def _key(self, shape: torch.Size) -> Any:
        # a layout for another batch takes up to twice the plain layer's time in bfloat16
        return None if self._is_product(shape) else shape

    def _is_product(self, shape: torch.Size) -> bool:
        """Whether an input of `shape` has all that makes one output cell in one row."""
        return (self.pointwise or self.patches) and shape[-1] == self.span

    def _delicate(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `Conv` knows a way around a kernel of torch's here."""
        if self.widened or any(self.grown):
            return True
        options = self.stride, self.padding, self.dilation, self.groups
        half = x.dtype == torch.bfloat16 and not self.pointwise
        return half and _wrong_in_half(x.shape[1:-1], weight, *options)

    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        """Padding, stride and dilation as the kernel takes them, with an axis more at rank 1."""
        rank1 = len(self.kernel) == 1
        stride = (1,) * len(self.kernel) if self.sampled else self.stride
        plain = self.padding, stride, self.dilation
        return tuple((v, *axes) for v, axes in zip((0, 1, 1), plain)) if rank1 else plain

    def forward(self, x: Tensor, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        act = self.act if act is None else act
        weight = self.weight
        if not self._ready(x, weight) or self._delicate(x, weight) or not kernels.adds(x, shortcut):
            return super().forward(x, act, shortcut)
        if self.sampled:
            x = x[(slice(None), *(slice(None, None, s) for s in self.stride))].contiguous()
        if self.patches and self._multiplies(x, weight):
            x = self._cells(x)
        if self._is_product(x.shape):
            return self._product(x, weight, act, shortcut)
        line = len(self.kernel) == 1

        def maps(t: Tensor) -> Tensor:
            return channels_first(t.unsqueeze(1) if line else t)

        rest = None if shortcut is None else maps(shortcut)
        padding, stride, dilation = self._geometry()
        given = maps(x), self._weight(weight, x.shape), self.bias
        y = channels_last(kernels.convolution(*given, padding, stride, dilation, self.groups, act, rest))
        return y.squeeze(1) if line else y


_PACKED: dict[type, type] = {nn.Linear: PackedLinear, Linear: PackedLinear, Conv: PackedConv}


def packed(layer: nn.Module, act: nn.Module | None = None) -> nn.Module:
    """`layer` with its weight packed and `act` taken in; the same layer where it cannot be packed.

    The layer becomes another class and keeps its tensors, names and hooks.
    """
    if type(layer) in _PACKED and layer.weight.dtype in kernels.DTYPES:
        layer.__class__ = _PACKED[type(layer)]
        layer._begin(act or nn.Identity())
    return layer


def pack(model: nn.Module) -> int:
    """Pack every linear layer and convolution of `model` in place -> how many there are."""
    for module in model.modules():
        if type(module) is not nn.Sequential:
            continue  # elsewhere a layer is given the activation after it when it is called
        for first, second in itertools.pairwise(list(module._modules)):
            layer, act = getattr(module, first), getattr(module, second)
            if type(layer) in _PACKED and not isinstance(act, nn.Identity) and kernels.activation(act) is not None:
                packed(layer, act)
                setattr(module, second, nn.Identity())
    for module in list(model.modules()):
        packed(module)
    return sum(isinstance(m, _Packed) for m in model.modules())
