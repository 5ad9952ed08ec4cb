"""Rank-dependent primitives on channels-last maps: the only file that knows the rank or torch's channels-first calls.

Every function takes and returns a map (B, *S, C) with one, two or three spatial sizes S. torch's kernels see the same
memory as channels first through a stride trick (for 2-D exactly torch's ``channels_last``), so nothing is copied.
Rank 1 runs as rank 2 of height one, because only the 2-D kernels have a channels-last form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .cached import sized_cache, tracing

Sizes = int | Sequence[int]

# axes for permute, which starts sooner than movedim
_FIRST = {n: (0, n - 1, *range(1, n - 1)) for n in range(2, 7)}
_LAST = {n: (0, *range(2, n), 1) for n in range(2, 7)}
_CONV = {2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOL = {2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def ntuple(value: Sizes, ndim: int, what: str = "size") -> tuple[int, ...]:
    """`value` for each of `ndim` axes; ValueError when a sequence has another length."""
    if isinstance(value, Sequence):
        if len(value) != ndim:
            raise ValueError(
                f"{what} {tuple(value)} has {len(value)} entries, {ndim} are needed (one per spatial axis)"
            )
        return tuple(value)
    return (value,) * ndim


def channels_first(x: Tensor) -> Tensor:
    """View (B, *S, C) as (B, C, *S)."""
    return x.permute(_FIRST[x.ndim])


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) as a contiguous (B, *S, C): a view where the memory is channels last already, else one copy."""
    return x.permute(_LAST[x.ndim]).contiguous()


def _rank2(x: Tensor) -> Tensor:
    """View a rank-1 map (B, L, C) as the rank-2 map (B, 1, L, C)."""
    return x.unsqueeze(1)


def conv(
    x, weight, bias=None, stride=(1,), padding=(0,), dilation=(1,), groups=1,
    act: nn.Module | None = None, shortcut: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolution of (B, *S, C) with `weight` (out, C / groups, *K); `stride`, `padding`, `dilation` one per axis.

    `shortcut`, of the output's shape, is added and `act` applied to the sum.
    """
    if weight.ndim == 3:
        line, shortcut = _rank2(x), None if shortcut is None else _rank2(shortcut)
        geometry = (1, *stride), (0, *padding), (1, *dilation), groups
        return conv(line, weight.unsqueeze(2), bias, *geometry, act, shortcut).squeeze(1)
    if weight.ndim == 5 and groups > 1 and stride[0] > 1 and weight.shape[2] > 3 and padding[0] > 0:
        # torch 2.15's CPU weight gradient of a strided depthwise 7x7x7, channels last, on maps 5 to 7 deep, writes
        # outside of its memory when it pads the first axis itself
        x, padding = F.pad(x, (0, 0, 0, 0, 0, 0, padding[0], padding[0])), (0, *padding[1:])
    if _half(x) and not tracing() and _wrong_in_half(x.shape[1:-1], weight, stride, padding, dilation, groups):
        with torch.autocast("cpu", enabled=False):
            wide = None if bias is None else bias.float()
            y = conv(x.float(), weight.float(), wide, stride, padding, dilation, groups).bfloat16()
    elif (act is not None or shortcut is not None) and _in_one_pass(x, weight, stride, groups, shortcut):
        rest = None if shortcut is None else channels_first(shortcut)
        y = kernels.convolution(channels_first(x), weight, bias, padding, stride, dilation, groups, act, rest)
        return channels_last(y)
    else:
        y = channels_last(_CONV[weight.ndim - 2](channels_first(x), weight, bias, stride, padding, dilation, groups))
    return kernels.after(y, act, shortcut)


def _in_one_pass(x: Tensor, weight: Tensor, stride, groups: int, shortcut: Tensor | None) -> bool:
    """Whether oneDNN's kernel should add the shortcut and apply the activation."""
    if tracing():
        return False
    large = groups > 1 or x.numel() * weight.numel() >= kernels.SMALL * weight.shape[1] * math.prod(stride)
    return (large or x.dtype == torch.bfloat16) and kernels.adds(x, shortcut) and kernels.usable(x, weight)


def _half(x: Tensor) -> bool:
    """Whether a convolution of `x` runs in bfloat16 on the CPU."""
    if not x.is_cpu:
        return False
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == torch.bfloat16


def _wrong_in_half(sides, weight, stride, padding, dilation, groups) -> bool:
    """Whether torch 2.15's bfloat16 convolution of a map of these `sides` is wrong on CPUs with AMX.

    Measured against float32 over kernels, strides, channels and sizes. The first and the last read memory that is not
    theirs, so that now and then a gradient is NaN; a strided kernel over five to 31 channels gives wrong outputs.
    """
    reach = dilation[-1] * (weight.shape[-1] - 1)
    if stride[-1] > 1 and (sides[-1] + 2 * padding[-1] - reach - 1) // stride[-1] == 0:  # the output is one cell wide
        return True
    if groups == 1 and stride[-1] >= 4 and 4 < weight.shape[1] < 32:
        return True
    return weight.ndim == 5 and groups > 1 and any(s < k for s, k in zip(sides[:2], weight.shape[2:4], strict=True))


class Conv(nn.Module):
    """Convolution at rank `ndim`: (B, *S, dim) -> (B, *S', out).

    The weight keeps the checkpoint's shape (out, dim / groups, *K). A 1x1 convolution takes every stride-th cell
    and runs as a matrix product. `padding` defaults to "same" for odd kernels at stride one:
    dilation * (kernel - 1) // 2.
    """

    def __init__(
        self,
        ndim: int,
        dim: int,
        out: int,
        kernel: Sizes = 1,
        stride: Sizes = 1,
        padding: Sizes | None = None,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        if dim % groups or out % groups:
            raise ValueError(f"channels {dim} -> {out} do not divide into {groups} groups")
        self.kernel, self.stride = ntuple(kernel, ndim, "kernel"), ntuple(stride, ndim, "stride")
        self.dilation, self.groups = ntuple(dilation, ndim, "dilation"), groups
        same = tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel, strict=True))
        self.padding = same if padding is None else ntuple(padding, ndim, "padding")
        # stored as the kernels read it, or they would reorder it at every call
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(ndim, torch.contiguous_format)
        self.weight = nn.Parameter(torch.empty(out, dim // groups, *self.kernel, memory_format=layout))
        self.bias = nn.Parameter(torch.empty(out)) if bias else None
        single = math.prod(self.kernel) == 1 and not any(self.padding)
        self.pointwise = single and groups == 1
        self.sampled = single and math.prod(self.stride) > 1
        self.dim = dim
        self.span = math.prod(self.kernel) * dim // groups  # numbers of the input that make one of the output
        apart = self.kernel == self.stride and not any(self.padding) and max(self.dilation) == 1
        self.patches = apart and groups == 1 and not single
        self.widened = dim == 2 and groups == 1 and max(self.kernel) >= 32
        deep = dim == out == groups and max(self.dilation) == 1
        self.grown = tuple(int(deep and k == 13) for k in self.kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default for convolutions: uniform within 1 / sqrt(fan in)."""
        fresh = torch.empty(self.weight.shape, device=self.weight.device)  # drawn in torch's order of memory
        with torch.no_grad():
            self.weight.copy_(nn.init.kaiming_uniform_(fresh, a=math.sqrt(5)))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    takes_act = sums = True  # see `kernels.then` and `kernels.plus`

    def forward(self, x: Tensor, act: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        """act(convolution + shortcut)"""
        return self.run(x, self.weight, self.bias, act, shortcut)

    def run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None,
        act: nn.Module | None = None, shortcut: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """act(this convolution with another weight and bias of the same shape + shortcut)."""
        stride = self.stride
        if self.sampled:
            # not left to torch: its CPU weight gradient of a strided 1x1 convolution with fewer than 16 channels,
            # channels last, writes outside of its memory (oneDNN issue 6035; seen in torch 2.15)
            # (made contiguous: products of what has gaps take up to ten times as long in bf16)
            x = x[(slice(None), *(slice(None, None, s) for s in stride))].contiguous()
            stride = (1,) * len(stride)
        if self.pointwise:
            return kernels.linear(x, weight.flatten(1), bias, act, shortcut)
        if self.patches and self._multiplies(x, weight):
            return kernels.linear(self._cells(x), weight.movedim(1, -1).flatten(1), bias, act, shortcut)
        padding = self.padding
        if any(self.grown) and x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_exporting():
            # (in exported programs not, other runtimes have other kernels)
            # torch 2.15's depthwise kernels of 13 cells, channels last, take 1.7 (bfloat16) to 4 times (float32) as
            # long as those of 15; a rim of zeros changes nothing else, but its gradient is slow: only without one
            weight = F.pad(weight, [n for n in reversed(self.grown) for _ in range(2)])
            padding = tuple(p + n for p, n in zip(padding, self.grown, strict=True))
        if self.widened:
            # torch 2.15's bfloat16 convolution of two channels with kernels of 32 is wrong on AMX CPUs; three are right
            x, weight = F.pad(x, (0, 1)), F.pad(weight, (*(0, 0) * len(stride), 0, 1))
        return conv(x, weight, bias, stride, padding, self.dilation, self.groups, act, shortcut)

    def _multiplies(self, x: Tensor, weight: Tensor) -> bool:
        """Whether a product over patches that do not overlap is sooner than torch's convolution of them.

        Its CPU gradients are: in bfloat16 those of 32 x 32 pixels take 23 times the product's time. In inference the
        copy of the patches pays for large weights only.
        """
        if not x.is_cpu or tracing():
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return self.span >= 512
        return weight.numel() > (2**18 if x.dtype == torch.bfloat16 else 2**20)

    def _cells(self, x: Tensor) -> Tensor:
        """The patches of `x` as rows: (B, *S, dim) -> (B, *S', prod(kernel) * dim)."""
        return space_to_depth(crop(x, [s // k * k for s, k in zip(x.shape[1:-1], self.kernel)]), self.kernel)

    def extra_repr(self) -> str:
        out, dim = self.weight.shape[:2]
        return (
            f"{dim * self.groups}, {out}, kernel={self.kernel}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}"
        )


class ConvTranspose(nn.Module):
    """Transposed convolution at rank `ndim`: (B, *S, dim) -> (B, *S', out); weight (dim, out / groups, *K)."""

    def __init__(self, ndim, dim, out, kernel=2, stride=2, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        self.kernel, self.stride = ntuple(kernel, ndim, "kernel"), ntuple(stride, ndim, "stride")
        self.padding, self.dilation = ntuple(padding, ndim, "padding"), ntuple(dilation, ndim, "dilation")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(dim, out // groups, *self.kernel))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        weight, stride, padding, dilation = self.weight, self.stride, self.padding, self.dilation
        line = weight.ndim == 3
        if line:
            x, weight = _rank2(x), weight.unsqueeze(2)
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        call = _CONV_TRANSPOSE[weight.ndim - 2]
        y = channels_last(call(channels_first(x), weight, self.bias, stride, padding, 0, self.groups, dilation))
        return y.squeeze(1) if line else y


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over all axes but the last: (B, *S, C) -> (B, *S, C), any rank."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if not self.training and mean is not None and not tracing():  # torch's module takes longer than a small map
            rows = x.reshape(-1, x.shape[-1])
            return F.batch_norm(rows, mean, var, self.weight, self.bias, False, 0.0, self.eps).view(x.shape)
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


def conv_norm_channels_first(x: Tensor, conv: Conv, norm: BatchNorm) -> Tensor:
    """`conv`, then `norm` with its running statistics, on channels-first memory: (B, *S, dim) -> (B, *S', out).

    The same numbers up to rounding, more slowly; the result is a view of channels-first memory, so that a chain of
    these never copies. For networks whose published outputs depend on the order in which a convolution adds up.
    """
    weight = conv.weight.flatten().view(conv.weight.shape)  # axes of one cell would still look channels last
    call = F.conv1d if weight.ndim == 3 else _CONV[weight.ndim - 2]
    y = call(channels_first(x).contiguous(), weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return y.movedim(1, -1)


class GroupNorm(nn.GroupNorm):
    """Group norm of each sample: (B, *S, C) -> (B, *S, C), any rank."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_last(super().forward(channels_first(x)))


class OneGroup(nn.GroupNorm):
    """Norm of each sample over all its channels and cells, weight and bias per channel: (B, *S, C) -> (B, *S, C).

    Runs as a layer norm over the whole sample: torch's group norm subtracts squares on channels-last memory on the
    CPU, which costs a digit and adds up over the norms of a network.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__(1, dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[1:], eps=self.eps), self.weight)


def _pool(table, x, kernel, stride, padding, **options) -> Tensor:
    ndim = x.ndim - 2
    kernel = ntuple(kernel, ndim, "kernel")
    stride, padding = ntuple(kernel if stride is None else stride, ndim), ntuple(padding, ndim)
    if ndim == 1:
        return _pool(table, _rank2(x), (1, *kernel), (1, *stride), (0, *padding), **options).squeeze(1)
    return channels_last(table[ndim](channels_first(x), kernel, stride, padding, **options))


def max_pool(x: Tensor, kernel: Sizes, stride: Sizes | None = None, padding: Sizes = 0) -> Tensor:
    """Maximum over windows; padding counts as minus infinity. (B, *S, C) -> (B, *S', C)."""
    return _pool(_MAX_POOL, x, kernel, stride, padding)


def avg_pool(
    x: Tensor, kernel: Sizes, stride: Sizes | None = None, padding: Sizes = 0, count_include_pad: bool = True
) -> Tensor:
    """Mean over windows. (B, *S, C) -> (B, *S', C)."""
    if x.ndim == 5 and x.device.type == "cpu" and x.element_size() == 2:  # torch has no such kernel
        return avg_pool(x.float(), kernel, stride, padding, count_include_pad).to(x.dtype)
    if x.ndim == 5 and padding:  # torch's 3-D kernel refuses a map smaller than the window: pad first
        pads = [0, 0, *(p for p in reversed(ntuple(padding, 3, "padding")) for _ in range(2))]
        mean = _pool(_AVG_POOL, F.pad(x, pads), kernel, stride, 0)
        if count_include_pad:
            return mean
        real = _pool(_AVG_POOL, F.pad(x.new_ones(1, *x.shape[1:-1], 1), pads), kernel, stride, 0)
        return mean / real
    return _pool(_AVG_POOL, x, kernel, stride, padding, count_include_pad=count_include_pad)


@sized_cache
def _averaging(side: int, out: int, dtype: torch.dtype, device=None) -> Tensor:
    """The (out, side) matrix of adaptive average pooling: bin i covers floor(i s / o) .. ceil((i + 1) s / o)."""
    cell, i = torch.arange(side, device=device), torch.arange(out, device=device)[:, None]
    start, end = i * side // out, ((i + 1) * side + out - 1) // out
    return ((cell >= start) & (cell < end)).to(dtype) / (end - start)


@sized_cache
def _cubic(side: int, out: int, dtype: torch.dtype, device=None) -> Tensor:
    """The (out, side) matrix of cubic convolution with half-pixel centres, a = -0.75 and edges repeated, as torch's."""
    a, taps = -0.75, torch.arange(-1, 3, device=device)
    scale = torch.full((1,), side, dtype=torch.float32, device=device) / out
    place = scale * (torch.arange(out, device=device) + 0.5) - 0.5  # rounded as torch rounds
    first = place.floor()
    d = ((place - first)[:, None] - taps).abs()
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    cells = (first.long()[:, None] + taps).clamp(0, side - 1)
    hits = cells[:, :, None] == torch.arange(side, device=device)
    return (torch.where(d <= 1, near, far)[:, :, None] * hits).sum(1).to(dtype)


def _along_axes(x: Tensor, size: Sizes, matrix_of: Callable[..., Tensor]) -> Tensor:
    """(B, *S, C) -> (B, *size, C) by the matrices (out, side) of each axis."""
    for axis, out in enumerate(ntuple(size, x.ndim - 2), start=1):
        side = x.shape[axis]
        if not tracing() and side == out:
            continue
        matrix = matrix_of(side, out, x.dtype, device=x.device)
        lead, tail = x.shape[:axis], x.shape[axis + 1 :]
        rows = x.reshape(math.prod(lead), side, math.prod(tail))
        x = torch.matmul(matrix, rows).reshape(*lead, out, *tail)
    return x


def adaptive_avg_pool(x: Tensor, size: Sizes) -> Tensor:
    """Average to a fixed `size` with torch's bins: (B, *S, C) -> (B, *size, C). One matrix product per axis."""
    return _along_axes(x, size, _averaging)


def resize(
    x: Tensor, size: Sizes, mode: str = "linear", antialias: bool = False, align_corners: bool = False
) -> Tensor:
    """Resample (B, *S, C) to (B, *size, C); `mode` nearest, linear or cubic.

    Half-pixel centres, but for nearest, which reads cell floor(i * old / new) as torch's "nearest" does, and with
    `align_corners` (linear and cubic), which puts the first and last cells of both grids on each other.

    Identity at equal size. torch has cubic and antialiased kernels at rank 2 only, but both are separable: other ranks
    go axis by axis.
    """
    ndim = x.ndim - 2
    size = ntuple(size, ndim)
    if mode not in ("nearest", "linear", "cubic"):
        raise ValueError(f"mode {mode!r} is unknown; use nearest, linear or cubic")
    if not tracing() and tuple(x.shape[1:-1]) == tuple(size):
        return x
    if ndim == 1:
        return resize(_rank2(x), (1, *size), mode, antialias, align_corners).squeeze(1)
    if mode == "nearest":
        return channels_last(F.interpolate(channels_first(x), size=size, mode="nearest"))
    if mode == "cubic" and not antialias and not align_corners and torch.compiler.is_exporting():
        return _along_axes(x, size, _cubic)  # onnxruntime moves transposes past its own resizing and then refuses it
    if ndim == 2:
        name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
        if antialias and x.dtype in (torch.bfloat16, torch.float16):  # torch's antialiased CPU kernels lack both
            return resize(x.float(), size, mode, antialias).to(x.dtype)
        y = F.interpolate(channels_first(x), size=size, mode=name, align_corners=align_corners, antialias=antialias)
        return channels_last(y)
    first, *rest = size
    plane = resize(x.flatten(0, 1), rest, mode, antialias, align_corners).unflatten(0, x.shape[:2])
    line = resize(plane.flatten(2), (first,), mode, antialias, align_corners)
    return line.unflatten(2, plane.shape[2:])


def pad_to(x: Tensor, multiple: Sizes) -> Tensor:
    """Zero-pad (B, *S, C) at the end of each axis to a multiple of `multiple`."""
    sides = x.shape[1:-1]
    steps = ntuple(multiple, x.ndim - 2, "multiple")
    pads = [(s + m - 1) // m * m - s for s, m in zip(sides, steps, strict=True)]
    if not tracing() and not any(pads):
        return x
    return F.pad(x, [0, 0, *(v for p in reversed(pads) for v in (0, p))])


def pad_least(x: Tensor, side: int) -> Tensor:
    """Zeros at the end of each axis of (B, *S, C) that has fewer than `side` cells."""
    least = torch.sym_max if tracing() else max  # a comparison of symbolic sizes would become a guard
    pads = [least(side, s) - s for s in x.shape[1:-1]]  # not max(side - s, 0): sizes stay positive symbols
    if not tracing() and not any(pads):
        return x
    return F.pad(x, [0, 0, *(v for p in reversed(pads) for v in (0, p))])


@sized_cache
def _correction(sides: tuple[int, ...], pool: int, device=None) -> Tensor:
    """(*ceil(S / pool), 1): pool^ndim / real cells, which makes means over zero-padded cubes those of real cells."""
    table = torch.ones((), device=device)
    for side in sides:
        cell = torch.arange((side + pool - 1) // pool, device=device)
        table = table.unsqueeze(-1) * (pool / (side - cell * pool).clamp(max=pool))
    return table.unsqueeze(-1)


def mean_pool(x: Tensor, factor: int) -> Tensor:
    """Mean over cells of `factor` per axis, at ragged ends over those that exist: to (B, *ceil(S / factor), C)."""
    if factor == 1:
        return x
    sides = tuple(x.shape[1:-1])
    mean = avg_pool(pad_to(x, factor), factor)
    if not tracing() and all(s % factor == 0 for s in sides):
        return mean
    return mean * _correction(sides, factor, device=x.device).to(x.dtype)


def crop(x: Tensor, sides: Sequence[int]) -> Tensor:
    """The first `sides` cells of each axis of (B, *S, C)."""
    if tracing():  # a slice compares sizes and so becomes a guard; negative padding does not
        cuts = [s - h for s, h in zip(sides, x.shape[1:-1], strict=True)]
        return F.pad(x, [0, 0, *(v for c in reversed(cuts) for v in (0, c))])
    if tuple(x.shape[1:-1]) == tuple(sides):
        return x
    return x[(slice(None), *(slice(0, s) for s in sides))]


def unfold(x: Tensor, kernel: Sizes, stride: Sizes = 1, padding: Sizes = 0) -> Tensor:
    """The window of `kernel` cells at every step as one row: (B, *S, C) -> (B, *S', C * prod(kernel)).

    A row runs channel by channel, row-major inside each, as the columns of torch's ``Unfold``. Zeros are padded.
    """
    batch, *sides, dim = x.shape
    ndim = len(sides)
    kernel, stride, padding = (ntuple(v, ndim) for v in (kernel, stride, padding))
    x = F.pad(x, [0, 0, *(p for p in reversed(padding) for _ in range(2))])
    for axis, (size, step) in enumerate(zip(kernel, stride, strict=True), start=1):
        x = x.unfold(axis, size, step)  # a view; the window's axis comes last
    return x.reshape(batch, *x.shape[1 : ndim + 1], dim * math.prod(kernel))


def grid_sample(x: Tensor, grid: Tensor, mode: str = "linear", padding_mode: str = "zeros") -> Tensor:
    """Values of (B, *S, C) at `grid` (B, *S', ndim) -> (B, *S', C).

    Coordinates run from -1 to 1 over the map's outer edges (align_corners False) and, as in torch, name the **last**
    axis first. `mode` is linear or nearest.
    """
    ndim = x.ndim - 2
    if mode not in ("linear", "nearest"):
        raise ValueError(f"mode {mode!r} is unknown; use linear or nearest")
    if grid.shape[-1] != ndim or grid.ndim != x.ndim:
        raise ValueError(f"grid {tuple(grid.shape)} does not fit a map of rank {ndim}: needs (B, *S, {ndim})")
    if ndim == 1:
        flat = torch.cat([grid, torch.zeros_like(grid)], -1)
        return grid_sample(_rank2(x), _rank2(flat), mode, padding_mode).squeeze(1)
    name = "bilinear" if mode == "linear" else mode
    y = F.grid_sample(channels_first(x), grid, mode=name, padding_mode=padding_mode, align_corners=False)
    return channels_last(y)


def space_to_depth(x: Tensor, factor: Sizes = 2, first_axis_fastest: bool = False) -> Tensor:
    """Fold cells of `factor` per axis into channels: (B, *S, C) -> (B, *S / factor, factor^ndim * C).

    The offset inside a cell runs row-major; with `first_axis_fastest` the first axis' offset varies fastest, which is
    the order of Swin's patch merging. Sides must divide by `factor` (see `pad_to`).
    """
    batch, *sides, dim = x.shape
    ndim = len(sides)
    factors = ntuple(factor, ndim, "factor")
    split = [v for s, f in zip(sides, factors, strict=True) for v in (s // f, f)]
    offsets = range(2 * ndim, 0, -2) if first_axis_fastest else range(2, 2 * ndim + 1, 2)
    y = x.reshape(batch, *split, dim).permute(0, *range(1, 2 * ndim, 2), *offsets, 2 * ndim + 1)
    return y.reshape(batch, *split[::2], math.prod(factors) * dim)
