"""Pyramids at strides 4 to 32 from every kind of backbone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vertebra
from vertebra.tasks.pyramid import Finer, Pyramid

torch.set_num_threads(1)
PVT = dict(dims=(8, 16, 40, 32), depths=(1, 1, 1, 1))
PLAIN = dict(dim=24, depth=2, heads=2)


def pyramid(name, finer=True, ndim=2, **options):
    torch.manual_seed(0)
    return Pyramid(vertebra.create_model(name, ndim=ndim, in_chans=2, features_only=True, **options), finer).eval()


def maps(model, *sides):
    with torch.no_grad():
        return model(torch.randn(2, 2, *sides, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("sides", [(67,), (67, 45), (33, 34, 39)])
def test_levels_of_a_pyramid_are_the_backbone_s_own(sides):
    model = pyramid("pvt_v2_b0", ndim=len(sides), **PVT)
    assert model.strides == (4, 8, 16, 32) and model.channels == (8, 16, 40, 32) and len(model.finer) == 0
    x = torch.randn(2, 2, *sides)
    with torch.no_grad():
        for ours, theirs in zip(model(x), model.backbone(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("sides", [(64,), (64, 96), (32, 64, 32)])
def test_a_plain_network_gets_the_simple_feature_pyramid(sides):
    """ViTDet (arXiv 2203.16527): x4, x2, as it is, 2x2 maximum, each from the last map."""
    model = pyramid("deit_tiny_patch16_224", ndim=len(sides), img_size=32, **PLAIN)
    assert model.strides == (4, 8, 16, 32) and model.channels == (6, 12, 24, 24)
    found, last = maps(model, *sides), maps(model.backbone, *sides)[-1]
    assert [tuple(m.shape[2:]) for m in found] == [tuple(s // r for s in sides) for r in (4, 8, 16, 32)]
    turn = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(sides)]
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(sides)]
    first, norm, _, second = model.finer[0]
    with torch.no_grad():
        x = turn(last, first.weight, first.bias, 2)
        x = F.gelu(F.layer_norm(x.movedim(1, -1), (12,), norm.weight, norm.bias, 1e-6).movedim(-1, 1))
        torch.testing.assert_close(found[0], turn(x, second.weight, second.bias, 2), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[1], turn(last, model.finer[1][0].weight, model.finer[1][0].bias, 2))
    torch.testing.assert_close(found[2], last, rtol=0, atol=0)
    torch.testing.assert_close(found[3], pool(last, 2), rtol=0, atol=0)


def test_the_coarsest_map_of_one_cell_stays_one_cell():
    found = maps(pyramid("deit_tiny_patch16_224", img_size=32, **PLAIN), 16, 50)
    assert [tuple(m.shape[2:]) for m in found] == [(4, 16), (2, 8), (1, 4), (1, 2)]
    found = maps(pyramid("deit_tiny_patch16_224", img_size=32, **PLAIN), 80, 80)
    torch.testing.assert_close(found[3], F.max_pool2d(found[2], 2, ceil_mode=True), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "strides", "without"),
    [
        ("lightvit_tiny", dict(depths=(1, 1, 1)), (4, 8, 16, 32), (8, 16, 32)),
        ("efficientvit_m0", {}, (4, 8, 16, 32, 64), (16, 32, 64)),
        ("cvt_13", dict(depths=(1, 1, 1)), (4, 8, 16, 32), (4, 8, 16, 32)),
        ("mobilevit_xx_small", {}, (4, 8, 16, 32), (4, 8, 16, 32)),
    ],
)
def test_missing_levels_are_made_and_those_above_four_left_out(name, options, strides, without):
    model, plain = pyramid(name, **options), pyramid(name, finer=False, **options)
    assert (model.strides, plain.strides) == (strides, without)
    sides = (64, 128)
    found, own = maps(model, *sides), maps(plain, *sides)
    assert [m.shape[1] for m in found] == list(model.channels)
    assert [tuple(m.shape[2:]) for m in found] == [tuple(-(-s // r) for s in sides) for r in strides]
    for level, stride in enumerate(without):
        torch.testing.assert_close(own[level], found[strides.index(stride)], rtol=0, atol=0)
    assert len(plain.finer) == 0 and len(model.finer) == len(strides) - len(without)


def test_finer_halves_the_channels_at_every_doubling():
    up = Finer(2, 20, 3)
    assert up.dim == 2 and up(torch.randn(1, 2, 3, 20)).shape == (1, 16, 24, 2)
    assert [tuple(m.weight.shape[:2]) for m in up if hasattr(m, "kernel")] == [(20, 10), (10, 5), (5, 2)]


def test_every_added_level_learns():
    model = pyramid("efficientvit_m0").train()
    sum(m.square().mean() for m in model(torch.randn(2, 2, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.finer.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="features_only=True"):
        Pyramid(vertebra.create_model("pvt_v2_b0", **PVT))
    with pytest.raises(ValueError, match="too small"):
        maps(pyramid("pvt_v2_b0", **PVT), 31, 64)
