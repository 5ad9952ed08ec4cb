"""oneDNN's kernels in inference: the plain expression's numbers, and torch's own operators for whoever watches."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vertebra.deploy.packing import pack
from vertebra.layers import Conv, DeformConv, Linear, Mlp, SqueezeExcite, kernels
from vertebra.layers.conv import ConvNorm
from vertebra.layers.kernels import activation, plus, then, usable

ACTS = [
    nn.Identity(), nn.ReLU(), nn.ReLU6(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(0.2), nn.ELU(),
]  # fmt: skip
LAYERS = {
    "linear": (lambda: Linear(24, 32), (2, 5, 24)),
    "conv1": (lambda: Conv(1, 24, 32, 3, 2), (2, 9, 24)),
    "conv2": (lambda: Conv(2, 24, 32, (3, 5), 2, bias=False), (2, 9, 8, 24)),
    "conv3": (lambda: Conv(3, 24, 32, 3), (1, 4, 5, 6, 24)),
    "depthwise": (lambda: Conv(2, 24, 24, 5, groups=24, dilation=2), (2, 9, 8, 24)),
    "kernel 13": (lambda: Conv(2, 24, 24, 13, groups=24), (2, 9, 8, 24)),
    "pointwise": (lambda: Conv(2, 24, 32), (2, 9, 8, 24)),
    "sampled": (lambda: Conv(2, 24, 32, stride=2), (2, 9, 8, 24)),
    "deformed": (lambda: DeformConv(2, 24, 32), (2, 9, 8, 24)),
    "narrow in half": (lambda: Conv(2, 7, 8, 7, 4), (2, 32, 31, 7)),
}


@pytest.fixture
def small(monkeypatch):
    """The kernels for every product, however small."""
    monkeypatch.setattr(kernels, "SMALL", 0)


@pytest.fixture
def calls(monkeypatch, small):
    """Activation, and whether a shortcut, of every call of a kernel; torch computes, so that any processor will do."""
    seen = []

    def told(y, act=None, shortcut=None):
        seen.append((type(act or nn.Identity()), shortcut is not None))
        return kernels.after(y, act, shortcut)

    def product(x, weight, bias, *follows):
        return told(F.linear(x, weight, bias), *follows)

    def convolution(x, weight, bias, padding, stride, dilation, groups, *follows):
        return told(F.conv2d(x, weight, bias, stride, padding, dilation, groups), *follows)

    monkeypatch.setattr(kernels, "present", lambda dtype: True)
    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(kernels, "convolution", convolution)
    return seen


def error(y, x) -> float:
    assert y.shape == x.shape
    return ((y.float() - x).abs().max() / x.abs().max()).item()


@pytest.mark.parametrize("act", ACTS, ids=repr)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_what_follows_is_the_plain_expression(kind, act, small):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer, x = build().requires_grad_(False), torch.randn(shape)
    half = copy.deepcopy(layer).bfloat16()
    with torch.enable_grad():  # torch's own operators
        y = layer(x.clone().requires_grad_()).detach()
    shortcut = torch.randn_like(y)
    for added in (None, shortcut, shortcut.mT.contiguous().mT):
        want = act(y if added is None else y + added)
        assert error(layer(x, act, added), want) <= 2e-6
        rest = None if added is None else added.bfloat16()
        assert error(half(x.bfloat16(), act, rest), want) <= 0.02
    assert error(then(layer, act, x), act(y)) <= 2e-6
    assert error(plus(layer, x, shortcut), y + shortcut) <= 2e-6


def test_which_kernels_run(calls):
    """One call for a layer and what follows it."""

    def of(module, *inputs):
        calls.clear()
        with torch.no_grad():
            module(*inputs)
        return list(calls)

    x = torch.randn(1, 6, 6, 8)
    none, gelu, relu = (nn.Identity, False), (nn.GELU, False), (nn.ReLU, False)
    assert of(Mlp(8, 16), x) == [gelu]  # torch's own product in float32 where nothing follows
    assert of(Mlp(8, 16).bfloat16(), x.bfloat16()) == [gelu, none]
    assert of(Mlp(8, 16, middle=Conv(2, 16, 16, 3, groups=16)), x) == [gelu]
    assert of(Mlp(8, 16, middle=nn.LayerNorm(16)), x) == []
    assert of(SqueezeExcite(2, 8, 4), x) == [relu, (nn.Sigmoid, False)]
    block = ConvNorm(2, 8, 8, 3, act=nn.ReLU)
    assert of(block, x) == []  # batch statistics
    assert of(block.eval(), x.new_ones(1, 100, 100, 8)) == [relu]
    assert of(block, x.new_ones(1, 100, 100, 8), x.new_ones(1, 100, 100, 8)) == [(nn.ReLU, True)]
    assert of(block, x) == []  # the map is small, so its norm is not folded
    assert of(block.bfloat16(), x.bfloat16()) == []
    block.float()
    assert of(block.fuse(published=False), x) == [relu]


def test_small_products_in_float32_are_torchs_own(monkeypatch):
    monkeypatch.setattr(kernels, "present", lambda dtype: True)
    layer, x = Linear(16, 32), torch.randn(5, 16)
    with torch.no_grad():
        want = F.gelu(F.linear(x, layer.weight, layer.bias))
        assert torch.equal(layer(x, nn.GELU()), want)
        monkeypatch.setattr(kernels, "product", lambda *a: pytest.fail("the kernel was called"))
        assert torch.equal(layer(x, nn.GELU()), want)
        monkeypatch.setattr(kernels, "SMALL", 5 * 16 * 32 + 1)
        assert torch.equal(layer(x, nn.GELU()), want)
        monkeypatch.setattr(kernels, "SMALL", 5 * 16 * 32)
        with pytest.raises(pytest.fail.Exception):
            layer(x, nn.GELU())


def test_where_the_kernels_step_aside(monkeypatch):
    monkeypatch.setattr(kernels, "present", lambda dtype: True)
    x, layer = torch.randn(3, 8), Linear(8, 4)
    with torch.no_grad():
        assert usable(x, layer.weight)
        assert not usable(x.double(), layer.weight) and not usable(x.double(), layer.double().weight)
        layer.float()
        assert (
            not usable(x.bfloat16(), layer.weight)
            and not usable(x[:0], layer.weight)
            and not usable(x[0], layer.weight)
        )
        assert not usable(x.to("meta"), layer.weight.to("meta"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not usable(x, layer.weight)
        with FlopCounterMode(display=False):
            assert not usable(x, layer.weight)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not usable(x, layer.weight)
        assert not usable(nn.Parameter(x).as_subclass(type("Other", (torch.Tensor,), {})), layer.weight)
    assert not usable(x, layer.weight) and usable(x, layer.weight.detach())
    assert not usable(x.clone().requires_grad_(), layer.weight.detach())


def test_watchers_see_torchs_own_operators(small):
    """A counter of operations, a trace, and the transforms of torch.func."""
    torch.manual_seed(0)
    net, x = Mlp(8, 16).eval().requires_grad_(False), torch.randn(2, 6, 6, 8)
    want = net.fc2(F.gelu(net.fc1(x)))
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() == 2 * 72 * (8 * 16 + 16 * 8)
    with torch.no_grad():
        traced = torch.jit.trace(net, x)
    assert "mkldnn::" not in str(traced.inlined_graph) and error(traced(x), want) <= 1e-6
    assert error(torch.vmap(net)(x), want) <= 1e-6
    slope, push = torch.randn_like(x), torch.func.jvp(net, (x,), (torch.ones_like(x),))[1]
    assert error(push, torch.autograd.functional.jvp(net, x, torch.ones_like(x))[1]) <= 1e-5
    assert error(torch.func.vjp(net, x)[1](slope)[0], torch.autograd.functional.vjp(net, x, slope)[1]) <= 1e-5


def test_a_watched_layer_shows_its_own_output(small):
    x, seen = torch.randn(2, 6, 6, 8), []
    net = Mlp(8, 16).requires_grad_(False)
    want = net(x)
    net.fc1.register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    assert error(net(x), want) <= 1e-6
    assert error(seen[0], F.linear(x, net.fc1.weight, net.fc1.bias)) <= 1e-6
    block = ConvNorm(2, 8, 8, 3).eval().requires_grad_(False)
    want = plus(block, x, x)
    block.norm.register_forward_hook(lambda module, args, y: seen.append(y))
    assert error(plus(block, x, x), want) <= 1e-6
    assert error(block(x, x), want) <= 1e-6
    block.act = nn.ReLU()
    assert error(block(x, x), want.relu()) <= 1e-6 and error(block(x), (want - x).relu()) <= 1e-6
    assert all(error(y, want - x) <= 1e-6 for y in seen[1:])  # not written over by the sum


def test_a_sum_keeps_the_wider_type():
    conv, x = ConvNorm(2, 8, 8).eval(), torch.randn(1, 4, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plus(conv.conv, x, x).dtype == torch.float32


def test_activations_that_onednn_knows():
    assert activation(None) == activation(nn.Identity()) == kernels.NONE
    assert activation(nn.ReLU6()) == ("hardtanh", [0.0, 6.0], "")
    assert activation(nn.ELU()) is None


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_no_size_is_compared_while_tracing(fused, deployed, monkeypatch):
    """A program traced at a small map is right for a large one."""
    monkeypatch.setattr(kernels, "SMALL", 2**14)  # reached within the sizes below
    net = nn.Sequential(
        *(ConvNorm(2, 8, 8, k, groups=g, act=nn.ReLU) for k, g in ((1, 1), (3, 1), (3, 8))),
        Mlp(8, 16),
        Conv(2, 8, 8, 2, 2),
    )
    net = net.eval().requires_grad_(False)
    if fused:
        for i in range(3):
            net[i] = net[i].fuse(published=False)
    if deployed:
        pack(net)
    sides = {i: torch.export.Dim(f"s{i}", min=4, max=400) for i in (1, 2)}
    with torch.no_grad():
        program = torch.export.export(net, (torch.randn(1, 6, 8, 8),), dynamic_shapes=(sides,)).module()
        for size in ((4, 4), (7, 9), (100, 90)):
            x = torch.randn(1, *size, 8)
            assert error(program(x), net(x)) <= 1e-5


@pytest.mark.parametrize("kind", ["linear", "conv2"])
def test_gelu_of_small_maps_is_torchs_without_avx512(kind, small, monkeypatch):
    layer, act = LAYERS[kind][0]().requires_grad_(False), nn.GELU()
    x = torch.randn(LAYERS[kind][1])
    numbers = act(layer(x)).numel()
    if kind == "conv2":
        numbers = x.numel() // 24 * 32 // 4  # as many as the map would have if no cell were left over
    for wide, large, passes in [(True, numbers + 1, 0), (False, numbers + 1, 1), (False, numbers, 0)]:
        monkeypatch.setattr(kernels, "WIDE", wide)
        monkeypatch.setattr(kernels, "LARGE", large)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            y = then(layer, act, x)
        found = [event.key for event in seen.key_averages()].count("aten::gelu")
        assert found == (passes if kernels.present(torch.float32) else 1)  # off x86 torch computes all of it
        torch.testing.assert_close(y, act(layer(x)), atol=1e-5, rtol=1e-5)
