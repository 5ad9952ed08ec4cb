"""RepNeXt: mixers written out, every sum merged, two heads made one, and published facts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.layers import BatchNorm, Conv
from vertebra.mixers import ChunkMixer
from vertebra.mixers.chunk import KernelSum, medium_kernels, small_kernels
from vertebra.models.repnext import Down, FoldedConvNorm

SMALL = dict(dim=16, depths=(1, 2, 1, 1))
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def lively(module):
    """Filled weights, and statistics far from their defaults."""
    torch.manual_seed(0)
    fill(module)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, BatchNorm):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.3, 3)
            elif isinstance(part, Conv) and part.groups > 1:
                part.weight.normal_(0, 0.3)
    return module


def small(**options):
    return lively(vertebra.create_model("repnext_m0", **(SMALL | dict(num_classes=5) | options)))


def depthwise(x, conv, stride=1, padding=0, dilation=1):
    return F.conv2d(x, conv.weight, conv.bias, stride, padding, dilation, x.shape[1])


@pytest.mark.parametrize("stride", (1, 2))
def test_small_kernels_are_the_published_branches(stride):
    layer, x = lively(small_kernels(2, 4, stride)), torch.randn(2, 9, 8, 4)
    cube, lines, corners = layer
    first = x.movedim(-1, 1)
    want = depthwise(first, cube, stride, 1) + depthwise(first, corners, stride, 1, 2)
    if stride == 1:
        want = want + depthwise(first, lines[0], 1, (0, 1)) + depthwise(first, lines[1], 1, (1, 0))
    else:
        want = want + depthwise(depthwise(first, lines[0], (1, 2), (0, 1)), lines[1], (2, 1), (1, 0))
    with torch.no_grad():
        assert error(layer(x), want.movedim(1, -1)) <= 1e-6
    assert [c.kernel for c in lines] == [(1, 3), (3, 1)]
    assert [c.bias is not None for c in lines] == [stride == 1] * 2


@pytest.mark.parametrize("stride", (1, 2))
def test_medium_kernels_are_the_published_branches(stride):
    layer, x = lively(medium_kernels(2, 4, stride)), torch.randn(2, 9, 8, 4)
    cube, slabs, seven, five = layer
    first = x.movedim(-1, 1)
    want = depthwise(first, cube, stride, 3)
    want = want + depthwise(first, slabs[0], stride, (2, 1)) + depthwise(first, slabs[1], stride, (1, 2))
    for chain, pad in ((seven, 3), (five, 2)):
        want = want + depthwise(depthwise(first, chain[0], (1, stride), (0, pad)), chain[1], (stride, 1), (pad, 0))
        assert all(c.bias is None for c in chain)
    with torch.no_grad():
        assert error(layer(x), want.movedim(1, -1)) <= 1e-6
    assert [c.kernel for c in slabs] == [(5, 3), (3, 5)]


def one_by_one(part, x):
    """Every convolution run by itself, chains in a row, sums added up."""
    if isinstance(part, Conv):
        return part(x)
    if isinstance(part, KernelSum):
        return sum(one_by_one(p, x) for p in part)
    for conv in part:
        x = conv(x)
    return x


@pytest.mark.parametrize("ndim", (1, 2, 3))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize(("make", "size"), [(small_kernels, 3), (medium_kernels, 7)])
def test_a_sum_is_one_convolution(ndim, stride, make, size):
    layer = lively(make(ndim, 4, stride)).double()
    x = torch.randn(2, *(9, 8, 7)[:ndim], 4, dtype=torch.float64)
    merged = layer.fuse()
    assert merged.kernel == (size,) * ndim and merged.stride == (stride,) * ndim and merged.dilation == (1,) * ndim
    with torch.no_grad():
        want = one_by_one(layer, x)
        assert error(layer(x), want) <= 1e-12 and error(merged(x), want) <= 1e-12
        plain = CONV[ndim](x.movedim(-1, 1), merged.weight, merged.bias, stride, size // 2, groups=4)
        assert error(plain.movedim(1, -1), want) <= 1e-12


def test_gradients_reach_the_parts_through_the_added_kernels():
    layer = lively(medium_kernels(2, 4, 2)).double()
    x = torch.randn(2, 9, 8, 4, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(one_by_one(layer, x).square().sum(), list(layer.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", (5, 6, 7))
def test_gradient_of_a_strided_kernel_on_a_shallow_volume(depth):
    """torch's own is wrong there, or corrupts the heap: the first axis is padded by hand."""
    layer = lively(medium_kernels(3, 8, 2))
    x = torch.randn(2, depth, 4, 5, 8)
    ours = torch.autograd.grad(layer(x).square().sum(), layer[0].weight)[0]
    layer = layer.double()
    want = torch.autograd.grad(layer(x.double()).square().sum(), layer[0].weight)[0]
    assert error(ours.double(), want) <= 1e-5


def test_corners_are_corners():
    layer = lively(small_kernels(2, 4))
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.mul_(name == "2.weight")
        kernel, corners = layer.fuse().weight, layer[2].weight
    assert torch.equal(kernel[:, :, ::2, ::2], corners)
    assert not kernel[:, :, 1].any() and not kernel[:, :, :, 1].any()


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_chunks_are_kept_small_medium_long(ndim):
    mixer, x = lively(ChunkMixer(ndim, 8)), torch.randn(2, *(9, 8, 7)[:ndim], 8)
    long = x[..., 6:].movedim(-1, 1)
    for conv, axis in zip(mixer.large, reversed(range(ndim)), strict=True):
        padding = [5 if i == axis else 0 for i in range(ndim)]
        long = CONV[ndim](long, conv.weight, conv.bias, padding=padding, groups=2)
    with torch.no_grad():
        y = mixer(x)
        assert torch.equal(y[..., :2], x[..., :2])
        assert error(y[..., 2:4], mixer.small(x[..., 2:4].contiguous())) <= 1e-6
        assert error(y[..., 4:6], mixer.medium(x[..., 4:6].contiguous())) <= 1e-6
        assert error(y[..., 6:], long.movedim(1, -1)) <= 1e-6


def test_residual_of_a_way_down_starts_behind_its_norm():
    down, x = lively(Down(2, 4, 2)), torch.randn(2, 9, 8, 4)
    with torch.no_grad():
        y = torch.cat([down.mixer.small(x), down.mixer.medium(x)], -1)
        n = down.norm
        y = F.batch_norm(y.movedim(-1, 1), n.running_mean, n.running_var, n.weight, n.bias).movedim(1, -1)
        assert y.shape == (2, 5, 4, 8)
        z = y
        for layer in (down.mlp[0], down.mlp[2]):
            m, z = layer.norm, F.linear(z, layer.conv.weight.flatten(1))
            z = (z - m.running_mean) / (m.running_var + 1e-5).sqrt() * m.weight + m.bias
            z = F.gelu(z) if layer is down.mlp[0] else z
        assert error(down(x), y + z) <= 1e-6


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_fused_network_gives_the_same_outputs(ndim):
    model = small(ndim=ndim)
    x = torch.randn(2, 3, *(45, 38, 33)[:ndim])
    fused = vertebra.fuse(model)
    assert not any(isinstance(m, KernelSum) for m in fused.modules())
    kept = [n for n, m in fused.named_modules() if isinstance(m, BatchNorm)]
    assert kept and all(n.endswith((".down.norm", ".norm")) and ".mlp." not in n for n in kept)
    assert len(kept) == 3 + sum(SMALL["depths"])  # those between token mixer and MLP stay
    with torch.no_grad():
        assert error(fused(x), model(x)) <= 1e-5
        for a, b in zip(fused.forward_intermediates(x), model.forward_intermediates(x), strict=True):
            assert error(a, b) <= 1e-5


def test_heads_are_averaged_in_both_modes_and_become_one():
    model, x = small(), torch.randn(3, 3, 40, 36)
    for mode in (False, True):
        model.train(mode)
        for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
            norm.momentum = 0.0
        with torch.no_grad():
            out = model.forward_outputs(x)
            torch.testing.assert_close(out["logits"], (out["class_logits"] + out["dist_logits"]) / 2)
            assert torch.equal(model(x), out["logits"]) and error(out["class_logits"], out["dist_logits"]) > 0.1
    model.eval()
    pooled = torch.randn(4, 128)
    want = torch.zeros(4, 5)
    with torch.no_grad():
        for part in (model.head.head, model.head.head_dist):
            n = part.norm
            y = (pooled - n.running_mean) / (n.running_var + 1e-5).sqrt() * n.weight + n.bias
            want += F.linear(y, part.linear.weight, part.linear.bias) / 2
        fused = vertebra.fuse(model)
        assert type(fused.head) is nn.Linear
        torch.testing.assert_close(fused.head(pooled), want, rtol=1e-5, atol=1e-5)
    assert set(fused.forward_outputs(x)) == {"logits"}
    model.reset_classifier(3)
    assert model(x).shape == (3, 3) and model.head.head_dist.linear.out_features == 3


def test_names_of_both_structures():
    model = small()
    names = set(vertebra.to_official(model))
    mixer = {n.split("token_mixer.")[1] for n in names if n.startswith("stages.1.blocks.0.token_mixer")}
    biased = ("conv_s.conv_3_3", "conv_s.conv_3_w", "conv_s.conv_3_h", "conv_s.conv_2_2", "conv_l.0", "conv_l.1")
    biased += ("conv_m.conv_7_7", "conv_m.conv_5_3", "conv_m.conv_3_5")
    chains = ("conv_m.conv_7_w", "conv_m.conv_7_h", "conv_m.conv_5_w", "conv_m.conv_5_h")
    assert mixer == {f"{n}.{leaf}" for n in biased for leaf in ("weight", "bias")} | {f"{n}.weight" for n in chains}
    assert {"stem.stem.2.norm.running_var", "head.head_dist.linear.bias", "stages.1.downsample.norm.weight"} <= names
    fused = vertebra.fuse(model)
    deployed = vertebra.to_official(fused)
    assert {
        "stem.stem.0.bias", "stages.1.downsample.token_mixer.conv_m.bias", "stages.1.blocks.1.channel_mixer.2.weight",
        "stages.1.blocks.1.token_mixer.conv_l.1.bias", "stages.1.blocks.1.norm.running_mean", "head.weight",
    } <= set(deployed)  # fmt: skip
    assert not any("conv_3" in n or "head_dist" in n for n in deployed)
    with pytest.raises(vertebra.CheckpointError, match="fused"):
        vertebra.load_checkpoint(model, deployed)
    other = vertebra.fuse(vertebra.create_model("repnext_m0", **SMALL, num_classes=5).eval())
    vertebra.load_checkpoint(other, deployed)
    x = torch.randn(1, 3, 40, 33)
    assert torch.equal(other(x), fused(x))


def test_one_axis_is_a_line_of_a_flat_image():
    """At rank 1 a mixer is one at rank 2 on a map of height one, whose lines across the map have one tap, of 1."""
    line, square = lively(ChunkMixer(1, 8)), lively(ChunkMixer(2, 8))
    x = torch.randn(2, 15, 8)
    with torch.no_grad():
        for part in ("small", "medium"):
            merged = getattr(square, part).fuse()
            reach = merged.kernel[0] // 2
            flat = getattr(line, part).fuse()
            merged.weight.zero_()
            merged.weight[:, :, reach] = flat.weight
            merged.bias.copy_(flat.bias)
            y = x[..., 2:4].contiguous()
            assert error(getattr(line, part)(y), merged(y[:, None])[:, 0]) <= 1e-5


@pytest.mark.parametrize("name", vertebra.list_models(family="repnext"))
def test_counts_of_the_fused_network(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
        once = {}  # a sum, convolution with norm or pair of heads, counted as what it becomes
        for part, module in model.named_modules():
            if part.endswith((".small", ".medium")):
                once[part] = module[0].weight.numel() + module[0].bias.numel()
            elif isinstance(module, FoldedConvNorm):
                once[part] = module.conv.weight.numel() + module.conv.weight.shape[0]
        once["head"] = model.head.head.linear.weight.numel() + 1000
    inside = tuple(f"{part}." for part in once)
    left = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(inside))
    count = (sum(once.values()) + left) / 1e6
    assert abs(count - dict(m0=2.333, m1=4.830, m2=6.473, m3=7.819, m4=13.342, m5=21.738)[name[-2:]]) <= 0.0006
    assert abs(count - vertebra.model_info(name).published["params_deploy_m"]) <= 0.051


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="four chunks"):
        ChunkMixer(2, 10)
    with pytest.raises(ValueError, match="no residual paths"):
        vertebra.create_model("repnext_m0", drop_path_rate=0.1)
