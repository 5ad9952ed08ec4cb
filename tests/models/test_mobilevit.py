"""MobileViT: the patch layout by explicit loops, the block written out, timm's network, and its quirks as numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.inspect.peers import renamed
from vertebra.layers import BatchNorm
from vertebra.models.mobilevit import MobileViTBlock, join_patches, split_patches

SMALL = dict(dims=(8, 16, 24, 24, 32), widths=(16, 16, 24), depths=(1, 2, 1), stem=8)


def prepared(module):
    """Weights and running statistics away from their initial values."""
    fill(module)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.running_mean.normal_(std=0.1), part.running_var.uniform_(0.5, 2)
    return module


def small(**options):
    torch.manual_seed(0)
    return prepared(vertebra.create_model("mobilevit_xx_small", **(SMALL | dict(num_classes=7) | options)))


@pytest.mark.parametrize("sides", [(64, 96), (45, 70), (224, 160)])
def test_network_is_timms(sides):
    torch.manual_seed(1)
    ours = prepared(vertebra.create_model("mobilevit_xx_small", num_classes=7))
    theirs = timm.create_model("mobilevit_xxs", num_classes=7).eval()
    state = renamed(vertebra.to_official(ours), "mobilevit", theirs)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    x = 10 * torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 2e-6
        y, maps = theirs.stem(x), ours.forward_intermediates(x)
        for stage, ours_map in zip(theirs.stages, maps, strict=True):
            y = stage(y)
            assert error(ours_map, y) <= 5e-6


@pytest.mark.parametrize("sides", [(6,), (4, 6), (2, 4, 6)])
def test_cells_are_grouped_by_their_place_in_the_patch(sides):
    x, n = torch.randn(2, *sides, 3), len(sides)
    cells = split_patches(x)
    assert cells.shape == (2, 2**n, math.prod(sides) // 2**n, 3)
    patches = itertools.product(*(range(s // 2) for s in sides))
    for j, patch in enumerate(patches):
        for i, place in enumerate(itertools.product(range(2), repeat=n)):
            cell = tuple(2 * p + o for p, o in zip(patch, place, strict=True))
            assert torch.equal(cells[:, i, j], x[(slice(None), *cell)])
    assert torch.equal(join_patches(cells, sides), x)


def test_only_equal_places_meet_in_the_transformers():
    torch.manual_seed(0)
    block = prepared(MobileViTBlock(2, 4, 8, 1))
    x = torch.randn(1, 4, 6, 8, requires_grad=True)
    y = join_patches(block.transformer(split_patches(x).flatten(0, 1)).reshape(1, 4, 6, 8), (4, 6))
    (grad,) = torch.autograd.grad(y[0, 1, 2].square().sum(), x)
    reached = grad.abs().sum(-1)[0] > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(reached, expected)


def batch_norm(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


@pytest.mark.parametrize("ndim", (1, 2, 3))
@pytest.mark.parametrize("odd", [False, True])
def test_block(ndim, odd):
    torch.manual_seed(ndim)
    dim, width, heads = 6, 8, 4
    block = prepared(MobileViTBlock(ndim, dim, width, 2, heads))
    sides = tuple(s - odd for s in (6, 4, 8)[:ndim])
    even = tuple(s + odd for s in sides)
    conv, mode = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1], ("linear", "bilinear", "trilinear")[ndim - 1]
    x = torch.randn(2, dim, *sides)
    y = F.silu(batch_norm(conv(x, block.local.conv.weight, padding=1), block.local.norm))
    y = conv(y, block.widen.weight)
    y = F.interpolate(y, size=even, mode=mode, align_corners=False)
    out = torch.zeros_like(y)
    for place in itertools.product(range(2), repeat=ndim):
        where = (slice(None), slice(None), *(slice(o, None, 2) for o in place))
        t = y[where].flatten(2).transpose(1, 2)
        for layer in block.transformer[:2]:
            rows = F.layer_norm(t, (width,), layer.norm1.weight, layer.norm1.bias, 1e-5)
            rows = F.linear(rows, layer.attn.qkv.weight, layer.attn.qkv.bias)
            found = []
            for h in range(heads):
                q, k, v = (rows[..., part * width + 2 * h : part * width + 2 * h + 2] for part in range(3))
                found.append((q * 2**-0.5 @ k.transpose(1, 2)).softmax(-1) @ v)
            t = t + F.linear(torch.cat(found, -1), layer.attn.proj.weight, layer.attn.proj.bias)
            rows = F.layer_norm(t, (width,), layer.norm2.weight, layer.norm2.bias, 1e-5)
            rows = F.silu(F.linear(rows, layer.mlp.fc1.weight, layer.mlp.fc1.bias))
            t = t + F.linear(rows, layer.mlp.fc2.weight, layer.mlp.fc2.bias)
        t = F.layer_norm(t, (width,), block.transformer[2].weight, block.transformer[2].bias, 1e-5)
        out[where] = t.transpose(1, 2).reshape(y[where].shape)
    out = F.interpolate(out, size=sides, mode=mode, align_corners=False)
    out = F.silu(batch_norm(conv(out, block.conv_proj.conv.weight), block.conv_proj.norm))
    joined = conv(torch.cat([x, out], 1), block.fusion.conv.weight, padding=1)
    expected = F.silu(batch_norm(joined, block.fusion.norm))
    with torch.no_grad():
        assert error(block(x.movedim(1, -1)).movedim(-1, 1), expected) <= 2e-6


def test_there_is_no_additive_residual_around_the_block():
    block, x = prepared(MobileViTBlock(2, 4, 8, 1)), torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        block.fusion.conv.weight.zero_()
        constant = F.silu(batch_norm(torch.zeros(1, 4, 4, 4), block.fusion.norm)).movedim(1, -1)
        torch.testing.assert_close(block(x), constant)


def test_one_axis_is_a_map_of_the_authors_code_repeated_over_the_other():
    """A network on a line with the middle rows of the kernels is the plane's on a map that is constant along height."""
    torch.manual_seed(0)
    line = prepared(MobileViTBlock(1, 4, 8, 2))
    plane = MobileViTBlock(2, 4, 8, 2).eval()
    state = {}
    for name, tensor in line.state_dict().items():
        wanted = plane.state_dict()[name].shape
        if tensor.ndim == 3:
            wide = tensor.new_zeros(wanted)
            wide[:, :, wanted[2] // 2] = tensor
            tensor = wide
        state[name] = tensor
    plane.load_state_dict(state)
    x = torch.randn(2, 10, 4)
    with torch.no_grad():
        flat = plane(x[:, None].expand(2, 6, 10, 4).contiguous())
        for row in flat.unbind(1):
            assert error(row, line(x)) <= 2e-6


def test_published_configurations():
    found = {}
    for name in vertebra.list_models(family="mobilevit"):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        heads = {b.attn.heads for stage in model.stages[2:] for b in stage.blocks[1].transformer[:-1]}
        depths = [len(stage.blocks[1].transformer) - 1 for stage in model.stages[2:]]
        assert heads == {4} and depths == [2, 4, 3] and len(model.stages[1].blocks) == 3
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm | BatchNorm)} == {1e-5}
        found[name] = (sum(p.numel() for p in model.parameters()), model.head.in_features)
    assert found == {
        "mobilevit_xx_small": (1_272_024, 320),
        "mobilevit_x_small": (2_317_848, 384),
        "mobilevit_small": (5_578_632, 640),
    }


def test_residuals_of_the_first_block_need_equal_widths():
    for name, residuals in (("mobilevit_xx_small", True), ("mobilevit_x_small", False)):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        assert model.stages[0].blocks[0].residual is residuals
        assert [b.residual for b in model.stages[1].blocks] == [False, True, True]


def test_weights_expect_bgr_from_zero_to_one():
    inputs = vertebra.model_info("mobilevit_small").inputs
    assert (inputs.channels, inputs.size, inputs.mean, inputs.std) == ("BGR", 256, (0.0,) * 3, (1.0,) * 3)
    assert round(inputs.size / inputs.crop) == 288


def test_errors():
    with pytest.raises(ValueError, match="dims needs 5 entries"):
        small(dims=(8, 16, 24, 32))
    with pytest.raises(ValueError, match="16 channels do not divide into 3 heads"):
        small(heads=3)
    with pytest.raises(ValueError, match="drop_path_rate"):
        small(drop_path_rate=0.1)
