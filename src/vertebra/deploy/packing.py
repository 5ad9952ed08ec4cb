"""Linear layers and convolutions as oneDNN wants them: the weight laid out once, what follows inside the kernel.

torch's plain calls lay the weight out anew at every call, and write the sum with a shortcut and the activation in
further passes over memory. The operators here are those that torch's own compiler uses for frozen weights on the CPU.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.cached import tracing, version
from ..layers.space import Conv, _wrong_in_half, channels_first, channels_last

Act = tuple[str, list[float], str]  # oneDNN's name of an activation, its numbers, its algorithm

NONE: Act = ("none", [], "")
_SMALL = 2**24  # multiplications up to which torch's own float32 call, which starts sooner, beats the packed one
_PACKS = 3  # input shapes that a convolution keeps a packed weight for, such as one sample, a batch, the last batch
DTYPES = (torch.float32, torch.bfloat16)


def activation(module: nn.Module) -> Act | None:
    """What oneDNN calls this activation; None where it has no such one."""
    match module:
        case nn.Identity():
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


class _Packed(nn.Module):
    """What a packed linear layer and a packed convolution share: when the packed weight may be used, and which it is.

    The plain weight stays where it was, under its name: the state dict is the same, and a weight that was loaded,
    moved or changed in place is packed anew. Wherever packing does not apply (a gradient is wanted, autocast, another
    device or dtype, while tracing) or does not pay (a small float32 product) the plain layer runs. A call's `shortcut`,
    of the output's shape, is added before the activation.
    """

    @property
    def sums(self) -> bool:
        """Whether the layer and a shortcut are all that it computes; see `layers.drop.plus`."""
        return isinstance(self.act, nn.Identity)

    weight: Any  # the layer's own, declared by the class that this one is mixed into
    bias: Any

    def _begin(self, act: nn.Module) -> None:
        self.act = act
        self._act: Act = activation(act) or NONE
        self._work = self._multiplications()
        self._packed: dict[Any, Tensor] = {}
        self._version = -1

    def _ready(self, x: Tensor) -> bool:
        if tracing() or (x.dtype == torch.float32 and x.numel() * self._work < _SMALL):
            return False
        weight = self.weight
        return not (
            x.dtype != weight.dtype
            or x.dtype not in DTYPES
            or x.device.type != "cpu"
            or x.numel() == 0
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        )

    def _multiplications(self) -> float:
        """How many for each number of the input."""
        raise NotImplementedError

    def _weight(self, shape: torch.Size) -> Tensor:
        """The weight packed for inputs of `shape`, or for the first one where others may use the same."""
        if self._version != version(self.weight):
            self._packed, self._version = {}, version(self.weight)
        key = self._key(shape)
        if key not in self._packed:
            if len(self._packed) >= _PACKS:
                self._packed.pop(next(iter(self._packed)))
            with torch.inference_mode(False), torch.no_grad():
                self._packed[key] = self._pack(self.weight.detach(), shape)
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

    def _plainly(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """The same by the plain layer, where the kernels do not apply."""
        y = super().forward(x)  # type: ignore[misc]
        y = y if shortcut is None else y + shortcut
        return y if self._act == NONE else self.act(y)

    def _product(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """The layer over the last axis of `x`."""
        call, packed = torch.ops.mkldnn._linear_pointwise, self._weight(x.shape)
        if shortcut is None:
            return call(x, packed, self.bias, *self._act)
        return self.act(call.binary(x, shortcut, packed, self.bias, "add"))


def _fits(shortcut: Tensor | None, x: Tensor) -> bool:
    """Whether the kernels can add `shortcut` to a product of `x`."""
    return shortcut is None or (shortcut.dtype == x.dtype and shortcut.is_contiguous())


class PackedLinear(_Packed, nn.Linear):
    """A linear layer, a shortcut and the activation after them: (..., in) -> (..., out)."""

    def _multiplications(self) -> float:
        return self.out_features

    def _pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), math.prod(shape[:-1]))

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        ready = self._ready(x) and _fits(shortcut, x)
        return self._product(x, shortcut) if ready else self._plainly(x, shortcut)


class PackedConv(_Packed, Conv):
    """A convolution, a shortcut and the activation after them: (B, *S, dim) -> (B, *S', out)."""

    def _multiplications(self) -> float:
        if self.groups != 1:  # those of torch start no sooner
            return math.inf
        return self.weight.numel() / self.weight.shape[1] / math.prod(self.stride)

    def _pack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        if self.pointwise:
            return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1).contiguous(), math.prod(shape[:-1]))
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
        return None if self.pointwise else shape

    def _delicate(self, x: Tensor) -> bool:
        """Whether `Conv` knows a way around a kernel of torch's here."""
        if self.widened or any(self.grown):
            return True
        options = self.stride, self.padding, self.dilation, self.groups
        half = x.dtype == torch.bfloat16 and not self.pointwise
        return half and _wrong_in_half(x.shape[1:-1], self.weight, *options)

    def _geometry(self) -> tuple[tuple[int, ...], ...]:
        """Padding, stride and dilation as the kernel takes them, with an axis more at rank 1."""
        rank1 = len(self.kernel) == 1
        stride = (1,) * len(self.kernel) if self.sampled else self.stride
        plain = self.padding, stride, self.dilation
        return tuple((v, *axes) for v, axes in zip((0, 1, 1), plain)) if rank1 else plain

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if not self._ready(x) or self._delicate(x) or not _fits(shortcut, x):
            return self._plainly(x, shortcut)
        if self.sampled:
            x = x[(slice(None), *(slice(None, None, s) for s in self.stride))].contiguous()
        if self.pointwise:
            return self._product(x, shortcut)
        call, line = torch.ops.mkldnn._convolution_pointwise, len(self.kernel) == 1

        def maps(t: Tensor) -> Tensor:
            return channels_first(t.unsqueeze(1) if line else t)

        rest = self._weight(x.shape), self.bias, *self._geometry(), self.groups
        if shortcut is None:
            y = call(maps(x), *rest, *self._act)
        elif self.groups != 1:  # the kernel takes sums of full convolutions only
            y = self.act(call(maps(x), *rest, *NONE).add_(maps(shortcut)))
        elif self._act[0] == "relu":
            y = call.binary(maps(x), maps(shortcut), *rest, "add", 1.0, *self._act)
        else:
            y = self.act(call.binary(maps(x), maps(shortcut), *rest, "add", 1.0, None, [], None))
        y = channels_last(y)
        return y.squeeze(1) if line else y


_PACKED: dict[type, type] = {nn.Linear: PackedLinear, Conv: PackedConv}


def packed(layer: nn.Module, act: nn.Module | None = None) -> nn.Module:
    """`layer` with its weight packed and `act` taken in; the same layer where it cannot be packed.

    The layer becomes another class and keeps its tensors, names and hooks.
    """
    if type(layer) in _PACKED and layer.weight.dtype in DTYPES:
        layer.__class__ = _PACKED[type(layer)]
        layer._begin(act or nn.Identity())
    return layer


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of a layer and of the activation that follows it, among the children of `module`."""
    if type(module) is nn.Sequential:
        names = list(module._modules)
        return list(itertools.pairwise(names))
    return list(getattr(module, "activated", ()))


def pack(model: nn.Module) -> int:
    """Pack every linear layer and convolution of `model` in place -> how many there are."""
    for module in model.modules():
        for first, second in _pairs(module):
            layer, act = getattr(module, first), getattr(module, second)
            if type(layer) in _PACKED and not isinstance(act, nn.Identity) and activation(act) is not None:
                packed(layer, act)
                setattr(module, second, nn.Identity())
    for module in list(model.modules()):
        packed(module)
    return sum(isinstance(m, _Packed) for m in model.modules())
