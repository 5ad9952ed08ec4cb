"""What inference does otherwise than training: the same numbers, and who watches a layer sees what it always saw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vertebra.inspect import peak_bytes
from vertebra.layers import LayerScale, Mlp
from vertebra.layers import mlp as mlp_module
from vertebra.layers.conv import ConvNorm
from vertebra.layers.drop import DropPath, residual


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def error(y: Tensor, x: Tensor) -> float:
    return ((y - x).abs().max() / x.abs().max()).item()


@pytest.mark.parametrize(("groups", "stride", "bias"), [(1, 1, False), (1, 2, True), (8, 1, True), (8, 2, False)])
def test_a_norm_is_folded_where_the_map_is_large(groups, stride, bias):
    layer = ConvNorm(2, 8, 16 if groups == 1 else 8, 3, stride, groups=groups, act=nn.ReLU, bias=bias).eval()
    for p in layer.norm.parameters():
        nn.init.normal_(p)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    large, small = torch.randn(2, 64, 64, 8), torch.randn(1, 3, 3, 8)
    wants = [layer(x).detach() for x in (large, small)]  # with gradients: as it stands
    with torch.no_grad():
        assert all(error(layer(x), want) <= 1e-6 for x, want in zip((large, small), wants))
        seen: list[int] = []
        layer.norm.forward = lambda x: seen.append(x.shape[1]) or x  # type: ignore[method-assign]
        layer(large)
        assert not seen  # the norm did not run
        layer(small)
        assert seen
        seen.clear()
        layer.norm.register_forward_hook(lambda *_: None)
        layer(large)
        assert seen  # somebody watches it


def test_scale_and_residual_are_one_pass():
    x, y, scale = torch.randn(2, 5, 8), torch.randn(2, 5, 8), LayerScale(8, 0.3)
    want = x + y * 0.3
    for rate, training in ((0.0, True), (0.5, False)):
        assert error(residual(x, y, scale, DropPath(rate).train(training)), want) <= 1e-6
    dropped = residual(x, y, scale, DropPath(0.5).train())
    kept = (dropped != x).flatten(1).any(1)
    assert error(dropped[kept], x[kept] + 2 * 0.3 * y[kept]) <= 1e-6 if kept.any() else torch.equal(dropped, x)
    calls = []
    scale.register_forward_hook(lambda *_: calls.append(1))
    assert error(residual(x, y, scale, DropPath()), want) <= 1e-6 and calls == [1]


def test_a_large_hidden_map_is_taken_in_parts(monkeypatch):
    layer, x = Mlp(16, 64).eval(), torch.randn(3, 50, 40, 16)
    call = torch.no_grad()(lambda: layer(x))
    want, whole = call(), peak_bytes(call)
    monkeypatch.setattr(mlp_module, "_LARGE", 2**20)
    monkeypatch.setattr(mlp_module, "_PART", 2**16)
    assert call().shape == want.shape and error(call(), want) <= 1e-6
    # 1024 of 6000 rows at a time: their hidden map and the outputs, once in parts and once together
    assert peak_bytes(call) <= 0.5 * whole
    rows = []
    layer.fc1.register_forward_hook(lambda m, args, y: rows.append(y.shape[:-1].numel()))
    call()
    assert rows == [6000]
    rows.clear()
    layer(x).sum().backward()
    assert rows == [6000]
