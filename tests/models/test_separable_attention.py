"""MobileViTv2 against timm, its block written out in loops, and its quirks as numbers."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import BatchNorm, OneGroup
from vertebra.mixers import SeparableAttention
from vertebra.models.mobilevit import split_patches
from vertebra.models.separable_attention import SeparableBlock


def prepared(module):
    """Weights and running statistics away from their initial values."""
    fill(module)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.running_mean.normal_(std=0.1), part.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(("name", "sides"), [("050", (64, 96)), ("050", (45, 70)), ("075", (96, 64))])
def test_network_is_timms_under_the_same_names(name, sides):
    torch.manual_seed(0)
    ours = prepared(vertebra.create_model(f"mobilevitv2_{name}", num_classes=7))
    theirs = timm.create_model(f"mobilevitv2_{name}", num_classes=7).eval()
    missing, unexpected = theirs.load_state_dict(vertebra.to_official(ours), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    x = 10 * torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 5e-6
        y = theirs.stem(x)
        for stage, ours_map in zip(theirs.stages, ours.forward_intermediates(x), strict=True):
            y = stage(y)
            assert error(ours_map, y) <= 5e-6


def test_both_names_are_one_network():
    torch.manual_seed(0)
    options = dict(width=0.25, depths=(1, 2, 1), num_classes=7)
    ours = prepared(vertebra.create_model("mobilevitv2_050", **options))
    other = vertebra.create_model("mobilevit_v2_050_cvnets", **options).eval()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours(x), other(x))
    names = vertebra.to_official(other)
    for name, shape in {
        "conv_1.block.conv.weight": (16, 3, 3, 3),
        "layer_4.1.local_rep.0.block.conv.weight": (96, 1, 3, 3),
        "layer_4.1.local_rep.1.block.conv.weight": (48, 96, 1, 1),
        "layer_4.1.global_rep.1.pre_norm_attn.1.qkv_proj.block.conv.weight": (97, 48, 1, 1),
        "layer_4.1.global_rep.2.weight": (48,),
        "classifier.1.bias": (7,),
    }.items():
        assert names[name].shape == shape


def batch_norm(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def one_group(x, norm):
    """All of a sample (places, patches, channels) has one mean and one variance."""
    mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias


@pytest.mark.parametrize("ndim", (1, 2, 3))
@pytest.mark.parametrize("odd", [False, True])
def test_block(ndim, odd):
    torch.manual_seed(ndim)
    dim, width = 6, 4
    block = prepared(SeparableBlock(ndim, dim, width, 2))
    sides = tuple(s - odd for s in (6, 4, 8)[:ndim])
    even = tuple(s + odd for s in sides)
    conv, mode = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1], ("linear", "bilinear", "trilinear")[ndim - 1]
    x = torch.randn(2, dim, *sides)
    y = F.interpolate(x, size=even, mode=mode, align_corners=True) if odd else x
    y = F.silu(batch_norm(conv(y, block.local.conv.weight, padding=1, groups=dim), block.local.norm))
    y = conv(y, block.narrow.weight).movedim(1, -1)
    places = [(slice(None), *(slice(o, None, 2) for o in p)) for p in itertools.product(range(2), repeat=ndim)]
    t = torch.stack([y[where].flatten(1, -2) for where in places], 1)

    def linear(rows, layer):
        return rows @ layer.weight.flatten(1).T + layer.bias

    for layer in block.transformer[:2]:
        rows = linear(one_group(t, layer.norm1), layer.attn.qkv)
        mixed = torch.zeros_like(t)
        for b, p in itertools.product(range(2), range(2**ndim)):
            weights = rows[b, p, :, 0].exp() / rows[b, p, :, 0].exp().sum()
            context = sum(w * row[1 : 1 + width] for w, row in zip(weights, rows[b, p], strict=True))
            mixed[b, p] = rows[b, p, :, 1 + width :].clamp(min=0) * context
        t = t + linear(mixed, layer.attn.proj)
        t = t + linear(F.silu(linear(one_group(t, layer.norm2), layer.mlp.fc1)), layer.mlp.fc2)
    t = one_group(t, block.transformer[2])
    out = torch.zeros_like(y)
    for i, where in enumerate(places):
        out[where] = t[:, i].reshape(y[where].shape)
    out = batch_norm(conv(out.movedim(-1, 1), block.conv_proj.conv.weight), block.conv_proj.norm)
    with torch.no_grad():
        found = block(x.movedim(1, -1)).movedim(-1, 1)
        assert found.shape == (2, dim, *even) and error(found, out) <= 2e-6


def test_a_block_neither_adds_nor_joins_its_input():
    block, x = prepared(SeparableBlock(2, 4, 8, 1)), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        block.conv_proj.conv.weight.zero_()
        constant = batch_norm(torch.zeros(1, 4, 4, 4), block.conv_proj.norm).movedim(1, -1)
        torch.testing.assert_close(block(x), constant)


def test_attention_with_pointwise_convolutions_is_the_linear_one():
    linear = fill(SeparableAttention(6, axis=2))
    block = SeparableBlock(3, 4, 6, 1).transformer[0].attn
    state = {k: v.reshape(block.state_dict()[k].shape) for k, v in linear.state_dict().items()}
    assert state["qkv.weight"].shape == (13, 6, 1, 1, 1)
    block.load_state_dict(state)
    x = torch.randn(2, 8, 5, 6)
    with torch.no_grad():
        torch.testing.assert_close(block(x), linear(x))


def test_places_share_nothing_but_the_norms():
    torch.manual_seed(0)
    attn, x = fill(SeparableAttention(6, axis=2)), torch.randn(1, 4, 6, requires_grad=True)
    cells = split_patches(x[:, :, None].expand(1, 4, 4, 6))
    (grad,) = torch.autograd.grad(attn(cells)[0, 0].sum(), x)  # the first place: even rows
    assert torch.equal(grad[0].abs().sum(-1) > 0, torch.tensor([True, False, True, False]))


def test_odd_maps_grow_and_stay_so():
    model = prepared(vertebra.create_model("mobilevitv2_050", width=0.25, depths=(1, 1, 1)))
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, 224, 160))
    assert [tuple(m.shape[2:]) for m in maps] == [(112, 80), (56, 40), (28, 20), (14, 10), (8, 6)]


def test_published_configurations():
    found = {}
    for name in vertebra.list_models("mobilevitv2_*"):
        with torch.device("meta"):
            model = vertebra.create_model(name)
            twin = vertebra.create_model(f"mobilevit_v2_{name[-3:]}_cvnets")
        assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
        assert [len(stage.blocks[1].transformer) - 1 for stage in model.stages[2:]] == [2, 4, 3]
        assert {m.eps for m in model.modules() if isinstance(m, OneGroup | BatchNorm)} == {1e-5}
        assert {m.num_groups for m in model.modules() if isinstance(m, OneGroup)} == {1}
        w = int(name[-3:]) / 100
        assert [i["num_chs"] for i in model.feature_info] == [c * w for c in (64, 128, 256, 384, 512)]
        assert [stage.blocks[1].narrow.weight.shape[0] for stage in model.stages[2:]] == [
            c * w for c in (128, 192, 256)
        ]
        assert model.stem.conv.weight.shape[0] == 32 * w
        found[name[-3:]] = round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
    assert (found["050"], found["075"], found["100"]) == (1.371, 2.866, 4.902) and len(found) == 7


def test_stems_are_kept_between_16_and_64_channels():
    for width, stem in ((0.25, 16), (3.0, 64)):
        with torch.device("meta"):
            assert vertebra.create_model("mobilevitv2_050", width=width).stem.conv.weight.shape[0] == stem


def test_errors():
    with pytest.raises(ValueError, match="width must be positive"):
        vertebra.create_model("mobilevitv2_050", width=-1.0)
    with pytest.raises(ValueError, match="depths needs 3 entries"):
        vertebra.create_model("mobilevitv2_050", depths=(1, 1))
