"""Multi-head attention on torch's fused kernels, with a way to look at the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import frugal
from .cached import tracing
from .kernels import Linear

_recorder: list[Tensor] | None = None


@contextmanager
def record_attention() -> Iterator[list[Tensor]]:
    """Inside the block every attention appends its weights (B, heads, queries, keys) to the yielded list.

    The fused kernels never form the weights, so recording runs the explicit softmax: same outputs, more memory.
    """
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, scale: float | None = None, fused: bool = True
) -> Tensor:
    """softmax(q k^T * scale + bias) v for q (B, H, L, D), k (B, H, M, D), v (B, H, M, E) -> (B, H, L, E).

    `bias` broadcasts to (B, H, L, M) and takes q's dtype; one of W rows, where W divides B, is for row b mod W of the
    batch. `scale` defaults to D^-0.5. Without `fused` the softmax is explicit, which is faster where many heads have
    few queries and keys each.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if fused and _recorder is None and frugal.attends(q, k, v, bias):
        return frugal.attend(q, k, v, bias, scale)
    if bias is not None and bias.ndim == 4 and not tracing():
        bias = frugal.repeat(bias, q.shape[0])
    # torch has no fused CPU kernel for values of another width than the keys, and its fallback takes twice as long
    unequal = q.device.type == "cpu" and v.shape[-1] != q.shape[-1]
    if _recorder is not None or unequal or not fused:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        logits = (q * scale) @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        if _recorder is not None:
            _recorder.append(weights.detach())
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def split_heads(x: Tensor, heads: int, parts: int = 1) -> tuple[Tensor, ...]:
    """(B, L, parts * C) with rows [part, head, channel] -> `parts` tensors (B, heads, L, C / heads)."""
    batch, length, dim = x.shape
    return x.reshape(batch, length, parts, heads, dim // (parts * heads)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def check_heads(dim: int, heads: int) -> None:
    """ValueError when `dim` channels do not divide into `heads`."""
    if heads < 1 or dim % heads:
        raise ValueError(f"{dim} channels do not divide into {heads} heads")


class Attention(nn.Module):
    """Multi-head self-attention over tokens: (B, L, C) -> (B, L, C), "Attention Is All You Need", section 3.2.

    `bias` broadcasts to (B, heads, L, L) and is added to the scaled logits.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, proj_bias: bool = True):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.proj(merge_heads(attend(q, k, v, bias)))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, L, C) to a context (B, M, C): (B, L, C). `bias` broadcasts to (B, heads, L, M)."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.q, self.kv = Linear(dim, dim, bias=qkv_bias), Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        (q,) = split_heads(self.q(x), self.heads)
        k, v = split_heads(self.kv(context), self.heads, 2)
        return self.proj(merge_heads(attend(q, k, v, bias)))


def attention_rollout(weights: list[Tensor]) -> Tensor:
    """Attention rollout (arXiv 2005.00928, eq. 1) of equally sized maps (B, H, L, L) -> (B, L, L)."""
    total = None
    for w_BHLL in weights:
        a = w_BHLL.mean(1)
        a = (a + torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)) / 2
        total = a if total is None else a @ total
    if total is None:
        raise ValueError("no attention weights were given")
    return total
