"""DilateFormer against its rules written out plainly, and its quirks as numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.mixers import DilatedAttention

COUNTS = {"dilateformer_tiny": 17_238_744, "dilateformer_small": 24_057_504, "dilateformer_base": 47_432_376}


def small(ndim: int = 2, **options):
    settings = dict(dim=24, depths=(1, 1, 1, 1), heads=(3, 3, 3, 3), num_classes=7) | options
    return fill(vertebra.create_model("dilateformer_tiny", ndim=ndim, **settings))


def plain_attention(mixer, x, outside_bias: bool = False):
    """Cell by cell and head by head: keys at -r, 0 and r per axis, zeros (or projected zeros) outside of the map."""
    batch, *sides, dim = x.shape
    groups, width = len(mixer.dilations), dim // mixer.heads
    per = mixer.heads // groups
    qkv = x @ mixer.qkv.weight.flatten(1).t() + mixer.qkv.bias
    out = torch.zeros_like(x)
    for cell in itertools.product(*(range(s) for s in sides)):
        for g, dilation in enumerate(mixer.dilations):
            for h in range(per):
                start = (g * per + h) * width
                part = [slice(which * dim + start, which * dim + start + width) for which in range(3)]
                keys, values = [], []
                for step in itertools.product((-dilation, 0, dilation), repeat=len(sides)):
                    place = tuple(c + s for c, s in zip(cell, step, strict=True))
                    inside = all(0 <= p < s for p, s in zip(place, sides, strict=True))
                    row = qkv[:, *place] if inside else (mixer.qkv.bias.expand(batch, -1) * outside_bias)
                    keys.append(row[:, part[1]])
                    values.append(row[:, part[2]])
                logits = torch.stack([(qkv[:, *cell][:, part[0]] * k).sum(-1) for k in keys], -1) * width**-0.5
                mixed = (logits.softmax(-1).unsqueeze(-1) * torch.stack(values, 1)).sum(1)
                out[:, *cell, start : start + width] = mixed
    return mixer.proj(out)


@pytest.mark.parametrize("sides", [(11,), (1,), (7, 5), (4, 9), (3, 2, 4)])
@pytest.mark.parametrize("heads", [3, 6])
def test_dilated_attention_equals_loops(sides, heads):
    mixer = fill(DilatedAttention(len(sides), 12, heads))
    x = torch.randn(2, *sides, 12)
    with torch.no_grad():
        assert error(mixer(x), plain_attention(mixer, x)) <= 1e-5
        # zeros outside are put in after the projection: they are not its bias
        assert error(plain_attention(mixer, x), plain_attention(mixer, x, outside_bias=True)) > 1e-3


def test_other_kernels_and_dilations():
    mixer = fill(DilatedAttention(2, 8, 2, dilations=(2, 4)))
    x = torch.randn(1, 6, 9, 8)
    with torch.no_grad():
        assert error(mixer(x), plain_attention(mixer, x)) <= 1e-5


def test_dilated_attention_has_the_gradients_of_the_loops():
    mixer = fill(DilatedAttention(2, 6, 3))
    x, weight = torch.randn(1, 5, 4, 6, requires_grad=True), torch.randn(1, 5, 4, 6)
    both = [torch.autograd.grad((f(x) * weight).sum(), x)[0] for f in (mixer, lambda x: plain_attention(mixer, x))]
    assert error(*both) <= 1e-5


def image_conv(x, conv, stride):
    return F.conv2d(x, conv.weight, conv.bias, stride, 1)


def image_norm(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def test_stem_is_four_convolutions_without_bias_and_no_last_norm():
    stem = small().patch_embed
    assert [m.bias for m in stem.modules() if hasattr(m, "kernel")] == [None] * 4
    x = torch.randn(1, 3, 21, 26)
    y = x
    with torch.no_grad():
        for layer, stride in zip(list(stem)[:3], (1, 2, 1), strict=True):
            y = F.gelu(image_norm(image_conv(y, layer.conv, stride), layer.norm))
        y = image_conv(y, stem[3], 2)
        assert y.shape[2:] == (6, 7)  # halves rounded up twice
        assert error(stem(x.movedim(1, -1)).movedim(-1, 1), y) <= 1e-5


def test_merges_have_a_bias_before_the_norm():
    down = small().stages[1].down
    x = torch.randn(1, 24, 7, 6)
    with torch.no_grad():
        assert down.conv.bias.abs().min() > 0
        want = image_norm(image_conv(x, down.conv, 2), down.norm)
        assert error(down(x.movedim(1, -1)).movedim(-1, 1), want) <= 1e-5


@pytest.mark.parametrize("stage", [0, 3])
def test_a_block_is_position_then_attention_then_mlp(stage):
    block = small().stages[stage].blocks[0]
    dim = block.norm1.normalized_shape[0]
    x = torch.randn(2, 5, 4, dim)
    conv = block.position.conv
    with torch.no_grad():
        y = x + F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=dim).movedim(1, -1)
        y = y + block.attn(F.layer_norm(y, (dim,), block.norm1.weight, block.norm1.bias, 1e-6))
        normed = F.layer_norm(y, (dim,), block.norm2.weight, block.norm2.bias, 1e-6)
        assert error(block(x), y + block.mlp.fc2(F.gelu(block.mlp.fc1(normed)))) <= 1e-6


def test_global_attention_sees_every_cell():
    attn = small().stages[2].blocks[0].attn
    x = torch.randn(2, 3, 5, 96)
    with torch.no_grad():
        qkv = attn.qkv(x.flatten(1, 2)).reshape(2, 15, 3, 3, 32).permute(2, 0, 3, 1, 4)
        mixed = (qkv[0] @ qkv[1].transpose(-1, -2) * 32**-0.5).softmax(-1) @ qkv[2]
        assert error(attn(x), attn.proj(mixed.transpose(1, 2).reshape(2, 3, 5, 96))) <= 1e-5


def test_position_convolutions_are_not_under_drop_path():
    block = small(drop_path_rate=0.9).stages[3].blocks[0].train()
    block.drop_path.rate = 1.0
    x = torch.randn(2, 3, 3, 192)
    with torch.no_grad():
        assert torch.equal(block(x), block.position(x))
        assert error(block.position(x), x) > 1e-2


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_published_configurations(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm1d)} == {1e-5}
    attention = [b.attn for s in model.stages for b in s.blocks]
    kinds = [isinstance(a, DilatedAttention) for a in attention]
    depths = vertebra.model_info(name).config["depths"]
    assert kinds == [True] * sum(depths[:2]) + [False] * sum(depths[2:])
    assert {a.dilations for a in attention if isinstance(a, DilatedAttention)} == {(1, 2, 3)}
    assert [s.blocks[0].attn.heads for s in model.stages] == [3, 6, 12, 24]


def test_official_names_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in vertebra.to_official(small()).items()}
    assert {k.split(".")[2] for k in shapes if k.startswith("patch_embed.proj.")} == {"0", "1", "3", "4", "6", "7", "9"}
    assert shapes["stages.0.blocks.0.attn.qkv.weight"] == (72, 24, 1, 1)
    assert shapes["stages.2.blocks.0.attn.qkv.weight"] == (288, 96)
    assert {"stages.0.downsample.proj.0.bias", "stages.2.downsample.proj.1.running_mean"} <= shapes.keys()
    assert "stages.3.blocks.0.pos_embed.weight" in shapes
    assert not any(k.startswith("stages.3.downsample") for k in shapes)


def test_the_dense_version_gives_raw_maps():
    model, dense = small(), small(features_only=True)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert not report.fresh and sorted(report.unused) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    x = torch.randn(1, 3, 75, 66)
    with torch.no_grad():
        maps = dense(x)
        assert [tuple(m.shape[2:]) for m in maps] == [(19, 17), (10, 9), (5, 5), (3, 3)]
        assert error(model.forward_features(x), model.norm(maps[3].movedim(1, -1)).movedim(-1, 1)) <= 1e-6


def test_impossible_options_are_errors():
    with pytest.raises(ValueError, match="4 heads do not divide over 3 dilations"):
        small(heads=(4, 3, 3, 3))
    with pytest.raises(ValueError, match="'DDG'"):
        small(attention="DDG")
    with pytest.raises(ValueError, match="'DDGX'"):
        small(attention="DDGX")
