"""Training with less saved and less copied: the same numbers, other backward passes.

torch keeps for the backward pass whatever its operations read. Some of that is cheap to make again (an activation from
its input, attention weights from queries and keys), some of torch's backward kernels are slow on a CPU. The functions
here stand in for the plain expressions where gradients are wanted; the plain expression runs without gradients, under
torch.compile and torch.export, inside torch.func transforms, and where a gradient is to be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from . import kernels
from .cached import tracing
from .kernels import Linear, hooked
from .space import Conv

_aten = torch.ops.aten
CHUNK = 2**19  # logits that a backward pass of attention forms at a time: they stay in a core's cache
SHORT = 2**18  # pairs of query and key up to which products beat torch's fused bfloat16 backward pass on the CPU

# activations that keep their input, by class: the output and the gradient from that input
_ACTS = {
    nn.GELU: (
        lambda act, x: F.gelu(x, approximate=act.approximate),
        lambda act, grad, x: _aten.gelu_backward(grad, x, approximate=act.approximate),
    ),
    nn.SiLU: (lambda act, x: F.silu(x), lambda act, grad, x: _aten.silu_backward(grad, x)),
    nn.Hardswish: (lambda act, x: F.hardswish(x), lambda act, grad, x: _aten.hardswish_backward(grad, x)),
}


def wanted(*tensors: Tensor | None) -> bool:
    """Whether an own backward pass may stand in here: gradients are asked for, by plain reverse-mode autograd alone."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and not tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """`others` in the type that autocast would compute in, as they are outside of it."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(o if o is None or o.dtype == torch.float64 else o.to(dtype) for o in others)


def _plainly(call: Callable[..., Tensor], inputs, needed, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of call(*inputs) by autograd itself, which can be differentiated again."""
    inputs = [None if t is None else t.view_as(t) for t in inputs]  # one tensor given twice is two inputs
    found = iter(
        torch.autograd.grad(
            call(*inputs), [t for t, n in zip(inputs, needed, strict=True) if n], grad, create_graph=True
        )
    )
    return tuple(next(found) if n else None for n in needed)


# --- activation, then linear ------------------------------------------------------------------------------------------


class _ActLinear(Function):
    """gamma * linear(act(x)) that keeps x alone: neither act(x) nor what gamma multiplies.

    With G = grad^T act(x), the gradient of gamma is the sum of G * weight over the inputs, plus the bias' share.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, act: nn.Module) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(x, weight, bias, gamma)
        with torch.autocast(x.device.type, enabled=False):
            y = kernels.linear(_ACTS[type(act)][0](act, x).to(weight.dtype), weight, bias)
            return y if gamma is None else y.mul_(gamma)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias, gamma = ctx.saved_tensors
        forward, backward = _ACTS[type(ctx.act)]
        if torch.is_grad_enabled():

            def plain(x, weight, bias, gamma):
                y = F.linear(forward(ctx.act, x).to(weight.dtype), weight, bias)
                return y if gamma is None else y * gamma

            return *_plainly(plain, ctx.saved_tensors, ctx.needs_input_grad[:4], grad), None
        for_x, for_weight, for_bias, for_gamma, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_gamma = None
        with torch.autocast(x.device.type, enabled=False):
            rows = grad.reshape(-1, grad.shape[-1])
            if for_weight or for_gamma:
                y = forward(ctx.act, x).to(weight.dtype)
                grad_weight = rows.t() @ y.reshape(-1, y.shape[-1])
                del y
            if for_bias or (for_gamma and bias is not None):
                grad_bias = rows.sum(0)
            if gamma is not None:
                if for_gamma:
                    grad_gamma = torch.bmm(grad_weight.unsqueeze(1), weight.unsqueeze(2)).flatten()
                    if bias is not None:
                        grad_gamma = grad_gamma.addcmul(grad_bias, bias)
                grad_weight = grad_weight.mul_(gamma.unsqueeze(1)) if for_weight else None
                grad_bias = grad_bias * gamma if for_bias else None
                rows = rows * gamma
            if for_x:
                grad_x = backward(ctx.act, (rows @ weight).view(x.shape).to(x.dtype), x)
        return grad_x, grad_weight, grad_bias, grad_gamma, None


def act_linear(x: Tensor, act: nn.Module, layer: nn.Module, gamma: Tensor | None = None) -> Tensor:
    """`layer` (see `linear_like`) of act(x), times `gamma` (out,): (..., C) -> (..., out), without keeping act(x)."""
    weight, bias, scale = _autocast(x, layer.weight.flatten(1), layer.bias, gamma)
    return _ActLinear.apply(x, weight, bias, scale, act)


def linear_like(layer: nn.Module) -> bool:
    """Whether `layer` is no more than a product with its weight over the last axis."""
    return type(layer) in (nn.Linear, Linear) or (type(layer) is Conv and layer.pointwise and not layer.sampled)


def saves(act: nn.Module, layer: nn.Module) -> bool:
    """Whether `act_linear` may stand for `act`, then `layer`: torch would keep both sides of the activation."""
    return type(act) in _ACTS and not getattr(act, "inplace", False) and linear_like(layer) and not hooked(act, layer)


# --- attention --------------------------------------------------------------------------------------------------------


def repeat(bias: Tensor | None, batch: int) -> Tensor | None:
    """`bias` (W, heads, L, M) for `batch` rows that go through the W over and over."""
    if bias is None or bias.shape[0] in (1, batch):
        return bias
    return bias.expand(batch // bias.shape[0], *bias.shape).flatten(0, 1)


class _Attend(Function):
    """Attention by torch's fused CPU kernel whose backward pass knows the gradient of the bias.

    torch falls back to the explicit softmax in float32 where the bias wants a gradient, and keeps its weights. Here
    they are made again, some rows of the batch at a time, which in bfloat16 is faster than torch's fused pass too.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        mask = repeat(bias, q.shape[0])
        out, total = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
        short = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] * k.shape[2] <= SHORT
        ctx.explicit = short or ctx.needs_input_grad[3]
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, bias, *(() if ctx.explicit else (out, total)))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, bias, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():

            def plain(q, k, v, bias):
                logits = q * ctx.scale @ k.transpose(-2, -1)
                return (logits if bias is None else logits + repeat(bias, q.shape[0])).softmax(-1) @ v

            return *_plainly(plain, (q, k, v, bias), ctx.needs_input_grad[:4], grad), None
        if not ctx.explicit:
            grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad, q, k, v, *rest, 0.0, False, attn_mask=repeat(bias, q.shape[0]), scale=ctx.scale
            )
            return *grads, None, None
        with torch.autocast("cpu", enabled=False):
            return *_attend_backward(grad, q, k, v, bias, ctx.scale, ctx.needs_input_grad[3]), None


def _attend_backward(grad, q, k, v, bias, scale, with_bias):
    """Gradients of q, k, v and the bias: the attention weights once more, for CHUNK logits at a time."""
    batch, heads, length = q.shape[:3]
    reach, period = k.shape[2], 1 if bias is None else bias.shape[0]
    # memory in the order (B, L, heads, D), as the linear layers before have it
    grads = [
        torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2) for t in (q, k, v)
    ]
    wide = torch.promote_types(q.dtype, torch.float32)  # sums over the batch
    grad_bias = torch.zeros_like(bias, dtype=wide) if with_bias else None
    step = max(1, CHUNK // (heads * length * reach))
    if period > 1:  # a chunk is some whole rounds through the bias, or a part of one
        step = step // period * period or max(s for s in range(1, step + 1) if period % s == 0)
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        count = rows.stop - start
        qs, ks, vs, gs = (t[rows].reshape(count * heads, t.shape[2], t.shape[3]) for t in (q, k, v, grad))
        qs = qs * scale
        logits = torch.bmm(qs, ks.transpose(1, 2)).view(count, heads, length, reach)
        if bias is not None:
            begin = start % period
            part = bias if period == 1 or count >= period else bias[begin : begin + count]
            logits.view(-1, part.shape[0], heads, length, reach).add_(part)
        weights = logits.softmax(-1).view(count * heads, length, reach)
        grads[2][rows] = torch.bmm(weights.transpose(1, 2), gs).view(count, heads, reach, -1)
        slope = torch.bmm(gs, vs.transpose(1, 2), out=logits.view(weights.shape))
        slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
        grads[1][rows] = torch.bmm(slope.transpose(1, 2), qs).view(count, heads, reach, -1)
        grads[0][rows] = torch.bmm(slope, ks).mul_(scale).view(count, heads, length, -1)
        if with_bias:
            part = grad_bias if period == 1 or count >= period else grad_bias[begin : begin + count]
            rounds = slope.view(-1, part.shape[0], heads, length, reach).sum(0, dtype=wide)
            part += rounds.sum_to_size(part.shape)
    return *grads, None if grad_bias is None else grad_bias.to(bias.dtype)


def attends(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether `attend` takes these: on the CPU, as torch's fused kernel there does, the bias with all of its axes."""
    if q.device.type != "cpu" or q.ndim != 4 or not wanted(q, k, v, bias):
        return False
    if not (q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[0] == k.shape[0] and q.shape[1] == k.shape[1]):
        return False
    if any(t.stride(-1) != 1 or not t.numel() for t in (q, k, v)):
        return False
    if bias is None:
        return True
    if bias.ndim != 4 or bias.shape[1] not in (1, q.shape[1]) or bias.shape[2:] != (q.shape[2], k.shape[2]):
        return False
    return q.shape[0] % bias.shape[0] == 0 and bias.stride(-1) == 1


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """softmax(q k^T * scale + bias) v; `bias` (W, heads, L, M), where W divides B: row b of the batch reads b mod W."""
    q, k, v, bias = _autocast(q, q, k, v, bias)  # type: ignore[assignment]
    return _Attend.apply(q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)


# --- windows ----------------------------------------------------------------------------------------------------------


def _take(x: Tensor, index: Tensor, valid: Tensor | None) -> Tensor:
    y = x.index_select(1, index)
    return y if valid is None else y.mul_(valid.to(y.dtype))


class _Take(Function):
    """Rows of x (B, N, C) by a table that reads every row once; `back` says where each row of x went.

    The gradient is read by `back`: torch would add into zeros. `valid` and `back_valid` are zero for rows of padding.
    """

    @staticmethod
    def forward(ctx, x, index, back, valid, back_valid):
        ctx.save_for_backward(index, back, valid, back_valid)
        return _take(x, index, valid)

    @staticmethod
    def backward(ctx, grad):
        index, back, valid, back_valid = ctx.saved_tensors
        return _Take.apply(grad, back, index, back_valid, valid), None, None, None, None


def take(x: Tensor, index: Tensor, back: Tensor, valid: Tensor | None = None, back_valid: Tensor | None = None):
    """`x` (B, N, C) -> (B, M, C): row index[m], times `valid` (M, 1). See `_Take`."""
    return _Take.apply(x, index, back, valid, back_valid)
