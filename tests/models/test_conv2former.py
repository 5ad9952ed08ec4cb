"""Conv2Former: its modulation, MLP, stem and head written out, and published configurations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import fill

import vertebra
from vertebra.mixers import ConvModulation

SMALL = dict(dims=(8, 16, 24, 32), depths=(1, 1, 2, 1), kernel=5)


def small(**options):
    return fill(vertebra.create_model("conv2former_t", **(SMALL | dict(num_classes=7) | options)))


def pointwise(layer, x):
    return F.linear(x, layer.weight.flatten(1), layer.bias)


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_modulation_weighs_values_by_a_wide_convolution(ndim):
    mixer, x = fill(ConvModulation(ndim, 6, 5)), torch.randn(2, *(7, 8, 9)[:ndim], 6)
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    a = F.gelu(pointwise(mixer.att[0], x)).movedim(-1, 1)
    a = call(a, mixer.att[2].weight, mixer.att[2].bias, padding=2, groups=6).movedim(1, -1)
    y = pointwise(mixer.proj, a * pointwise(mixer.v, x))
    torch.testing.assert_close(mixer(x), y, rtol=1e-4, atol=1e-6)


def test_block_adds_a_convolution_with_its_own_activation_inside_the_mlp():
    block, x = fill(small(layer_scale=0.5).stages[0].blocks[0]), torch.randn(2, 7, 6, 8)
    with torch.no_grad():
        y = x + block.scale1.gamma * block.attn(F.layer_norm(x, (8,), block.norm1.weight, block.norm1.bias, 1e-6))
        z = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
        h = F.gelu(pointwise(block.mlp.fc1, z))
        conv = block.mlp.middle[1].conv
        h = h + F.gelu(F.conv2d(h.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=32).movedim(1, -1))
        y = y + block.scale2.gamma * pointwise(block.mlp.fc2, h)
        torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)


def test_stem_activates_before_its_norms_and_ends_without_one():
    model, x = small(), torch.randn(1, 3, 64, 64)
    y = x
    with torch.no_grad():
        for unit, stride in zip(list(model.patch_embed)[:2], (2, 1), strict=True):
            unit.norm.running_mean.normal_(std=0.1), unit.norm.running_var.uniform_(0.5, 2)
            assert unit.conv.bias is None
            y = F.gelu(F.conv2d(y, unit.conv.weight, stride=stride, padding=1))
            n = unit.norm
            y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)
        y = F.conv2d(y, model.patch_embed[2].weight, stride=2)
        got = model.embed(x.movedim(1, -1).contiguous()).movedim(-1, 1)
        torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)


def test_head_norms_every_cell_before_the_mean():
    model, x = small(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        cells = F.gelu(pointwise(model.neck[0], model.forward_features(x).movedim(1, -1)))
        cells = F.layer_norm(cells, (1280,), model.neck[2].weight, model.neck[2].bias, 1e-6)
        torch.testing.assert_close(model(x), model.head(cells.mean((1, 2))), rtol=1e-4, atol=1e-5)


def test_published_configurations():
    with torch.device("meta"):
        models = {
            n.removeprefix("conv2former_"): vertebra.create_model(n) for n in vertebra.list_models("conv2former*")
        }
    counts = {k: round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for k, m in models.items()}
    assert counts == {"n": 14.993, "t": 26.697, "s": 50.033, "b": 90.029, "b_22k": 88.785, "l": 198.894}
    kernels = {k: m.stages[0].blocks[0].attn.att[2].kernel[0] for k, m in models.items()}
    assert kernels == {"n": 7, "t": 11, "s": 11, "b": 11, "b_22k": 7, "l": 11}
