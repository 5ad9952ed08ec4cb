"""The functions of layers/frugal.py: the plain expressions' numbers and gradients, from fewer saved bytes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vertebra
from vertebra.inspect import peak_bytes
from vertebra.layers import Attention, LayerScale, Mlp, NextBlock, frugal, windows


def random(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def plain(monkeypatch):
    """Call it to switch the own backward passes off."""
    return lambda: monkeypatch.setattr(frugal, "wanted", lambda *tensors: False)


def saved_bytes(call) -> int:
    """Bytes of all storages that autograd keeps for `call`, weights left out."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter) and not (t._base is not None and isinstance(t._base, nn.Parameter)):
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    del y
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def explicit(q, k, v, bias=None):
    weights = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (weights if bias is None else weights + frugal.repeat(bias, q.shape[0])).softmax(-1) @ v


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish()], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_of_act_linear(act, bias, scaled):
    layer, x = nn.Linear(5, 4, bias=bias).double(), random(2, 3, 5)
    gamma = random(4) if scaled else None
    leaves = [x, *layer.parameters(), *([gamma] if scaled else [])]
    y = frugal.act_linear(x, act, layer, gamma)
    want = layer(act(x)) * (gamma if scaled else 1)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    assert torch.autograd.gradcheck(lambda *_: frugal.act_linear(x, act, layer, gamma), leaves)
    slope = torch.randn_like(y)
    got, want = (torch.autograd.grad(out, leaves, slope) for out in (y, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [None, 1, 2, 6])
@pytest.mark.parametrize("chunk", [1, 50, 2**19])
def test_gradients_of_attention(rows, chunk, monkeypatch):
    """A bias per window is read over and over along the batch, whichever way the batch is cut."""
    monkeypatch.setattr(frugal, "CHUNK", chunk)
    q, k, v = random(6, 2, 5, 4), random(6, 2, 3, 4), random(6, 2, 3, 4)
    bias = None if rows is None else random(rows, 2, 5, 3)
    leaves = [t for t in (q, k, v, bias) if t is not None]
    assert frugal.attends(q, k, v, bias)
    y, want = frugal.attend(q, k, v, bias, None), explicit(q, k, v, bias)
    torch.testing.assert_close(y, want)
    slope = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, slope), torch.autograd.grad(want, leaves, slope))
    assert torch.autograd.gradcheck(lambda *_: frugal.attend(q, k, v, bias, None), leaves)


def test_a_mask_for_all_heads_and_a_frozen_bias():
    q, k, v = (random(4, 3, 5, 4) for _ in range(3))
    for bias in (random(2, 1, 5, 5), torch.randn(2, 3, 5, 5, dtype=torch.float64)):
        leaves = [t for t in (q, k, v, bias) if t.requires_grad]
        y, want = frugal.attend(q, k, v, bias, None), explicit(q, k, v, bias)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


def test_bfloat16_attention_is_as_exact_as_the_explicit_softmax():
    exact = [random(4, 3, 49, 16) for _ in range(3)]
    slope = torch.randn(4, 3, 49, 16, dtype=torch.float64)
    want = torch.autograd.grad(explicit(*exact), exact, slope)
    half = [t.detach().bfloat16().requires_grad_() for t in exact]
    errors = []
    for call in (lambda *a: frugal.attend(*a, None, None), explicit):
        got = torch.autograd.grad(call(*half), half, slope.bfloat16())
        errors.append(max(((g - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)))
    assert errors[0] < 1.2 * errors[1] < 0.02


@pytest.mark.parametrize("sides", [(8, 12), (7, 9), (3, 10)])
@pytest.mark.parametrize("shift", [0, 2])
def test_windows_there_and_back(sides, shift, plain):
    x = random(2, *sides, 3)
    parts = windows(sides, (4, 4), shift=(shift, shift))
    y = parts.split(x)
    slope = torch.randn_like(y)
    there = torch.autograd.grad(y, x, slope)[0]
    z = random(*y.shape)
    m = parts.join(z, sides)
    back = torch.autograd.grad(m, z, torch.ones_like(m))[0]
    assert torch.autograd.gradcheck(parts.split, x) and torch.autograd.gradgradcheck(parts.split, x)
    plain()
    assert torch.equal(parts.split(x), y) and torch.equal(parts.join(z, sides), m)
    torch.testing.assert_close(torch.autograd.grad(parts.split(x), x, slope)[0], there, rtol=0, atol=0)
    assert torch.equal(torch.autograd.grad(parts.join(z, sides), z, torch.ones_like(m))[0], back)


def test_what_an_mlp_keeps(plain):
    """The map before the activation (4 C) and the input (C); not the activation (4 C)."""
    mlp, x = Mlp(16, 64), torch.randn(8, 16, requires_grad=True)
    size = x.numel() * 4
    assert saved_bytes(lambda: mlp(x)) == 5 * size
    plain()
    assert saved_bytes(lambda: mlp(x)) == 9 * size


def test_what_a_scaled_block_keeps(plain):
    """Norm's input, mean and scale (8 numbers), the MLP's as above; the layer scale keeps no map of its own."""
    block = NextBlock(16, nn.Identity(), nn.LayerNorm(16), Mlp(16, 64), scale=0.1)
    x = torch.randn(8, 16, requires_grad=True)
    size, statistics = x.numel() * 4, 2 * 8 * 4
    assert saved_bytes(lambda: block(x)) == 6 * size + statistics
    plain()
    assert saved_bytes(lambda: block(x)) == 11 * size + statistics


def test_what_attention_with_a_bias_keeps(plain):
    """Input (C), queries, keys and values (3 C), output (C) and the bias; no weights, no scaled copies."""
    layer, x = Attention(16, 2), torch.randn(8, 9, 16, requires_grad=True)
    bias = torch.randn(1, 2, 9, 9, requires_grad=True)
    size = x.numel() * 4
    assert saved_bytes(lambda: layer(x, bias)) == 5 * size + bias.numel() * 4
    plain()
    assert saved_bytes(lambda: layer(x, bias)) > 6 * size


@pytest.mark.parametrize(
    "name, most", [("swin_tiny_patch4_window7_224", 0.8), ("vit_tiny_patch16_224", 0.85), ("convnext_tiny", 0.78)]
)
def test_whole_models_learn_the_same_from_less(name, most, plain):
    small = {
        "swin_tiny_patch4_window7_224": {"dim": 24, "depths": (2, 2), "heads": (2, 2), "img_size": 56},
        "vit_tiny_patch16_224": {"img_size": 64, "dim": 32, "heads": 2, "patch": 8, "depth": 6},
        "convnext_tiny": {"dims": (16, 32), "depths": (2, 2)},
    }[name]
    model = vertebra.create_model(name, num_classes=5, **small).train()
    for p in model.parameters():
        nn.init.normal_(p, 0.1 if p.ndim > 1 else 0.5, 0.1)
    x = torch.randn(8, 3, 56 if "swin" in name else 64, 56 if "swin" in name else 64)

    def step() -> list[Tensor]:
        loss = F.cross_entropy(model(x), torch.arange(8) % 5)
        return list(torch.autograd.grad(loss, list(model.parameters())))

    got, memory = step(), peak_bytes(step)
    model.set_grad_checkpointing(True)
    checkpointed, checkpointed_memory = step(), peak_bytes(step)
    model.set_grad_checkpointing(False)
    plain()
    want, before = step(), peak_bytes(step)
    top = max(g.abs().max() for g in want)
    for a, b, c in zip(got, want, checkpointed, strict=True):
        assert (a - b).abs().max() <= 1e-5 * top and torch.equal(a, c)
    assert memory <= most * before and checkpointed_memory < memory


def test_autocast_with_a_copy_and_frozen_weights(plain):
    block = NextBlock(16, nn.Identity(), nn.LayerNorm(16), Mlp(16, 64), scale=0.1)
    for p in block.mlp.fc2.parameters():
        p.requires_grad_(False)
    twin, x = copy.deepcopy(block), torch.randn(8, 16)

    def gradients(b: nn.Module) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = b(x)
        y.float().square().sum().backward()
        return {name: p.grad for name, p in b.named_parameters() if p.grad is not None}

    got = gradients(block)
    plain()
    want = gradients(twin)
    assert got.keys() == want.keys() and not any("fc2" in name for name in got)
    for name, grad in want.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - grad).norm() < 0.02 * grad.norm(), name


def test_watched_layers_are_called():
    mlp, seen = Mlp(4, 8), []
    mlp.act.register_forward_hook(lambda module, args, y: seen.append(y))
    mlp(torch.randn(2, 4))
    assert len(seen) == 1
    scale = LayerScale(4)
    block = NextBlock(4, nn.Identity(), nn.Identity(), Mlp(4, 8), scale=0.1)
    block.scale.register_forward_hook(lambda module, args, y: seen.append(y))
    block(torch.randn(2, 4))
    assert len(seen) == 2 and isinstance(block.scale, type(scale))


def test_second_derivatives_and_torch_func(plain):
    mlp, x = Mlp(4, 8).double(), random(2, 4)
    q, bias = random(4, 2, 3, 4), random(2, 2, 3, 3)
    layer, gamma = nn.Linear(4, 2).double(), random(2)
    assert torch.autograd.gradgradcheck(lambda q, b: frugal.attend(q, q, q, b, None), (q, bias))
    assert torch.autograd.gradgradcheck(
        lambda *_: frugal.act_linear(x, mlp.act, layer, gamma), (x, gamma, layer.weight)
    )
    (first,) = torch.autograd.grad(mlp(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), mlp.fc1.weight)
    got = torch.func.grad(lambda t: mlp(t).sum())(x.detach())
    torch.testing.assert_close(got, first.detach())
    plain()
    (want,) = torch.autograd.grad(mlp(x).sum(), x, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(want.square().sum(), mlp.fc1.weight)[0], second)
    torch.testing.assert_close(torch.func.jvp(mlp, (x.detach(),), (torch.ones_like(x),))[1].sum(), first.detach().sum())
