"""EMO: spread windows and the one block written out, its two shortcuts, published configurations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill, loud

import vertebra
from vertebra.layers import BatchNorm
from vertebra.mixers import SpreadWindowAttention
from vertebra.models.emo import InvertedResidualMobileBlock

SMALL = dict(dims=(16, 24, 40, 42), depths=(1, 2, 2, 2), stem=8, window=4, num_classes=7)


def small(**options):
    return fill(vertebra.create_model("emo_1m", **(SMALL | options)))


def spread_attention(mixer, x, window):
    """Each cell by itself: a cell's window are the cells with the same remainders; padding is zeros, no mask."""
    sides, heads = x.shape[:-1], mixer.heads
    dim = x.shape[-1]
    width, steps = dim // heads, [-(-s // window) for s in sides]
    weight, bias = mixer.qk.weight.flatten(1), mixer.qk.bias
    out = torch.zeros_like(x)
    for cell in itertools.product(*(range(s) for s in sides)):
        axes = [range(c % n, n * window, n) for c, n in zip(cell, steps, strict=True)]
        members = [
            x[m] if all(i < s for i, s in zip(m, sides, strict=True)) else torch.zeros(dim)
            for m in itertools.product(*axes)
        ]
        values = torch.stack(members)
        q, keys = F.linear(x[cell], weight, bias)[:dim], F.linear(values, weight, bias)[:, dim:]
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            out[cell][part] = (keys[:, part] @ q[part] / width**0.5).softmax(0) @ values[:, part]
    return out


@pytest.mark.parametrize("sides", [(7,), (4, 6), (5, 2), (3, 4, 2)])
def test_windows_are_spread_and_padding_takes_part(sides):
    torch.manual_seed(0)
    mixer, x = loud(SpreadWindowAttention(len(sides), 6, 2, 3)), torch.randn(2, *sides, 6)
    with torch.no_grad():
        wanted = torch.stack([spread_attention(mixer, sample, 3) for sample in x])
        torch.testing.assert_close(mixer(x), wanted, rtol=1e-4, atol=1e-5)


def test_without_a_window_the_whole_map_is_one():
    mixer, x = loud(SpreadWindowAttention(2, 6, 2, None)), torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        q, k = mixer.qk(x).reshape(15, 2, 2, 3).permute(1, 2, 0, 3)
        v = x.reshape(15, 2, 3).transpose(0, 1)
        wanted = ((q @ k.mT / 3**0.5).softmax(-1) @ v).transpose(0, 1).reshape(x.shape)
        torch.testing.assert_close(mixer(x), wanted, rtol=1e-4, atol=1e-5)
    for window in (0, (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            SpreadWindowAttention(2, 6, 2, window)


@pytest.mark.parametrize(("late", "kernel"), [(False, 3), (True, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_written_out(late, kernel, stride):
    torch.manual_seed(1)
    heads = 2 if late and stride == 1 else None
    block = loud(InvertedResidualMobileBlock(2, 6, 6, 2.5, kernel, stride, heads, 3, late))
    x = torch.randn(2, 7, 8, 6)
    with torch.no_grad():
        n = block.norm
        if late:
            y = F.layer_norm(x, (6,), n.weight, n.bias, 1e-6)
        else:
            y = (x - n.running_mean) / (n.running_var + 1e-6).sqrt() * n.weight + n.bias
        if heads:
            y = torch.stack([spread_attention(block.attn, sample, 3) for sample in y])
        y = F.linear(y, block.v.weight.flatten(1), block.v.bias)  # 15 channels
        y = (F.gelu(y) if late else F.silu(y)).movedim(-1, 1)
        conv, bn = block.local.conv, block.local.norm
        z = F.conv2d(y, conv.weight, None, stride, kernel // 2, groups=15)
        z = F.silu(F.batch_norm(z, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=1e-6))
        z = F.conv2d(z + y if stride == 1 else z, block.proj.weight).movedim(1, -1)
        assert error(block(x), x + z if stride == 1 else z) < 1e-5


def test_stem_written_out():
    model, x = loud(small()), torch.randn(1, 3, 33, 40)
    first, local, se, proj = model.stem
    with torch.no_grad():
        y = F.conv2d(x, first.conv.weight, first.conv.bias, 2, 1)
        norm = lambda m, v: F.batch_norm(v, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-6)  # noqa: E731
        y = norm(first.norm, y)  # no activation
        y = F.silu(norm(local.norm, F.conv2d(y, local.conv.weight, None, 1, 1, groups=8)))
        gate = F.conv2d(F.silu(F.conv2d(y.mean((2, 3), True), se.down.weight, se.down.bias)), se.up.weight, se.up.bias)
        wanted = F.conv2d(y * gate.sigmoid(), proj.weight)
        assert error(model.embed(x.movedim(1, -1)).movedim(-1, 1), wanted) < 1e-5


def test_stages_begin_wide_and_attend_late():
    model = small()
    with pytest.raises(ValueError, match="heads of 19"):
        small(head_dims=(None, None, 19, 21))
    firsts = [(s.blocks[0].v.weight.shape[:2], s.blocks[0].skip) for s in model.stages]
    assert firsts == [((32, 8), False), ((80, 16), False), ((144, 24), False), ((280, 40), False)]
    attends = [[isinstance(b.attn, SpreadWindowAttention) for b in s.blocks] for s in model.stages]
    assert attends == [[False], [False, False], [False, True], [False, True]]
    assert all(m.eps == 1e-6 for m in model.modules() if isinstance(m, BatchNorm | torch.nn.LayerNorm))


def test_official_file_with_its_wrapper_loads():
    model, other = small(), small()
    state = vertebra.to_official(model)
    assert {"stage0.0.convs.0.1.weight", "stage0.1.se.conv_expand.bias", "stage3.1.qk.conv.weight"} <= state.keys()
    assert {"stage1.0.norm.weight", "stage3.0.norm.norm.weight", "norm.norm.bias"} <= state.keys()
    vertebra.load_checkpoint(other, {"net": state, "iter": 7})
    x = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))


def test_published_configurations():
    with torch.device("meta"):
        models = {n.removeprefix("emo_"): vertebra.create_model(n) for n in vertebra.list_models("emo_*")}
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}
    assert counts == {"1m": 1361168, "2m": 2377472, "5m": 5108848, "6m": 6168496}
    heads = {k: [m.stages[i].blocks[1].attn.heads for i in (2, 3)] for k, m in models.items()}
    assert heads == {"1m": [4, 8], "2m": [6, 10], "5m": [5, 9], "6m": [8, 10]}
    kernels = [s.blocks[0].local.conv.kernel[0] for s in models["1m"].stages]
    assert kernels == [3, 3, 5, 5]
    assert models["1m"].stages[3].blocks[1].v.weight.shape[0] == 588
