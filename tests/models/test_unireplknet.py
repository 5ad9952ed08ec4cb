"""UniRepLKNet: the block written out, its branches tap by tap, every step of the fusion, and published facts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.layers import BatchNorm, Conv
from vertebra.mixers import DilatedReparam
from vertebra.mixers.dilated_reparam import BRANCHES
from vertebra.models.unireplknet import Block, ResponseNorm

SMALL = dict(dims=(8, 16, 24, 32), depths=(1, 2, 3, 1), kernels=((3,), (7,), (13, 3), (7,)))
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def lively(module):
    """Filled weights, and statistics far from their defaults."""
    torch.manual_seed(0)
    fill(module)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):  # keeps what passes through it at its size
                part.weight.normal_(0, part.in_features**-0.5)
            elif isinstance(part, Conv) and part.groups > 1:
                part.weight.normal_(0, 0.3)
            if isinstance(part, BatchNorm):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.3, 3)
            if isinstance(part, ResponseNorm):
                part.gamma.normal_()
                part.beta.normal_()
    return module


def small(**options):
    return lively(vertebra.create_model("unireplknet_t", **(SMALL | dict(num_classes=5) | options)))


def normed(y, n):
    return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5)


@pytest.mark.parametrize(("ndim", "kernel"), [(n, k) for n in (1, 2, 3) for k in sorted(BRANCHES) if n < 3 or k <= 9])
def test_branches_read_dilated_taps_and_fold_into_the_large_kernel(ndim, kernel):
    mixer = lively(DilatedReparam(ndim, 4, kernel))
    x = torch.randn(2, *(11, 8, 6)[:ndim], 4)
    first, call = x.movedim(-1, 1), CONV[ndim]
    main = mixer.large.main
    want = normed(call(first, main.conv.weight, padding=kernel // 2, groups=4), main.norm)
    for size, r in BRANCHES[kernel]:
        branch = getattr(mixer.large, f"k{size}_{r}")
        padding = (r * (size - 1) + 1) // 2
        y = call(first, branch.conv.weight, padding=padding, dilation=r, groups=4)
        want = want + normed(y, branch.norm)
    with torch.no_grad():
        assert error(mixer(x), want.movedim(1, -1)) <= 1e-6
        merged = mixer.large.fuse()
        assert merged.kernel == (kernel,) * ndim and merged.dilation == (1,) * ndim
        assert error(merged(x), want.movedim(1, -1)) <= 1e-5


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_response_norm_measures_each_channel_over_the_map(ndim):
    layer = lively(ResponseNorm(ndim, 5))
    x = torch.randn(2, *(4, 3, 6)[:ndim], 5)
    want = torch.empty_like(x)
    for b in range(2):
        lengths = torch.stack([x[b, ..., c].square().sum().sqrt() for c in range(5)])
        for c in range(5):
            share = lengths[c] / (lengths.mean() + 1e-6)
            gamma, beta = layer.gamma.flatten()[c], layer.beta.flatten()[c]
            want[b, ..., c] = (gamma * share + 1) * x[b, ..., c] + beta
    with torch.no_grad():
        assert layer.gamma.shape == (*(1,) * (ndim + 1), 5)
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def written_out(block, x):
    """The block in plain 2-D torch on a channels-first map."""
    mixer, mlp = block.mixer, block.mlp
    if isinstance(mixer, Conv):
        y = F.conv2d(x, mixer.weight, padding=mixer.kernel[0] // 2, groups=x.shape[1])
    else:
        y = mixer(x.movedim(1, -1)).movedim(-1, 1)
    y = normed(y, block.norm)
    gate = F.relu(F.conv2d(y.mean((2, 3), keepdim=True), mlp.se.down.weight, mlp.se.down.bias))
    y = y * F.conv2d(gate, mlp.se.up.weight, mlp.se.up.bias).sigmoid()
    z = F.gelu(F.linear(y.movedim(1, -1), mlp.fc1.weight, mlp.fc1.bias))
    length = z.norm(dim=(1, 2), keepdim=True)
    z = (mlp.grn.gamma * length / (length.mean(-1, keepdim=True) + 1e-6) + 1) * z + mlp.grn.beta
    y = normed(F.linear(z, mlp.fc2.weight).movedim(-1, 1), mlp.norm)
    return x + block.scale.gamma[:, None, None] * y


@pytest.mark.parametrize("kernel", (3, 5, 7, 13))
def test_block_has_no_norm_in_front_and_two_behind_the_large_kernel(kernel):
    block = lively(Block(2, 8, kernel, 0.0, 0.5)).double()
    assert isinstance(block.mixer, Conv if kernel <= 5 else DilatedReparam)
    assert block.mlp.fc2.bias is None and block.mlp.se.down.weight.shape == (2, 8, 1, 1)
    x = torch.randn(2, 8, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        want = written_out(block, x)
        branch = block(x.movedim(1, -1)).movedim(-1, 1) - x
        assert error(branch, want - x) <= 1e-10  # the branch by itself, which is small beside the shortcut


@pytest.mark.parametrize("kernel", (3, 7))
def test_a_fused_block_is_convolution_gate_and_two_linears(kernel):
    block = lively(Block(2, 8, kernel, 0.0, 0.5)).double()
    x = torch.randn(2, 9, 10, 8, dtype=torch.float64)
    with torch.no_grad():
        before = block(x)
        old = {k: v.clone() for k, v in block.state_dict().items()}
        fused = block.fuse()
        torch.testing.assert_close(fused(x), before, rtol=1e-10, atol=1e-10)
        norm = {k: old[f"mlp.norm.{k}"] for k in ("weight", "bias", "running_mean", "running_var")}
        factor = norm["weight"] / (norm["running_var"] + 1e-5).sqrt()
        bias = (old["mlp.fc2.weight"] @ old["mlp.grn.beta"].flatten() - norm["running_mean"]) * factor + norm["bias"]
        torch.testing.assert_close(fused.mlp.fc2.bias, bias * old["scale.gamma"])
        torch.testing.assert_close(fused.mlp.fc2.weight, old["mlp.fc2.weight"] * (factor * old["scale.gamma"])[:, None])
    names = set(fused.state_dict())
    assert not any("norm" in n or "beta" in n or n.startswith("scale") for n in names)
    assert "mlp.grn.gamma" in names
    assert fused.fuse() is fused and set(fused.state_dict()) == names


@pytest.mark.parametrize("ndim", (1, 2, 3))
@pytest.mark.parametrize("published", (True, False))
def test_fused_network_gives_the_same_outputs(ndim, published):
    model = small(ndim=ndim, layer_scale=0.5, kernels=((3,), (7,), (9, 5), (7,)))
    x = torch.randn(2, 3, *(45, 38, 33)[:ndim])
    fused = vertebra.fuse(model, published=published)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    with torch.no_grad():
        assert error(fused(x), model(x)) <= 1e-5
        for a, b in zip(fused.forward_intermediates(x), model.forward_intermediates(x), strict=True):
            assert error(a, b) <= 1e-5


def test_names_of_both_structures():
    model = small()
    names = set(vertebra.to_official(model))
    assert {
        "downsample_layers.0.4.bias", "downsample_layers.3.1.weight", "stages.0.0.dwconv.weight",
        "stages.2.0.dwconv.lk_origin.weight", "stages.2.0.dwconv.origin_bn.running_var",
        "stages.2.0.dwconv.dil_conv_k7_2.weight", "stages.2.0.dwconv.dil_bn_k3_5.bias", "stages.2.1.dwconv.weight",
        "stages.1.1.pwconv2.2.running_mean", "stages.1.1.act.1.beta", "stages.1.1.gamma",
    } <= names  # fmt: skip
    fused = vertebra.fuse(model)
    deployed = vertebra.to_official(fused)
    block = {n.removeprefix("stages.2.0.") for n in deployed if n.startswith("stages.2.0.")}
    assert block == {
        "dwconv.lk_origin.weight", "dwconv.lk_origin.bias", "se.down.weight", "se.down.bias", "se.up.weight",
        "se.up.bias", "pwconv1.1.weight", "pwconv1.1.bias", "act.1.gamma", "pwconv2.0.weight", "pwconv2.0.bias",
    }  # fmt: skip
    assert {"stages.2.1.dwconv.weight", "stages.2.1.dwconv.bias"} <= set(deployed)
    with pytest.raises(vertebra.CheckpointError, match="fused"):
        vertebra.load_checkpoint(model, deployed)
    other = vertebra.fuse(small(layer_scale=0.3))
    vertebra.load_checkpoint(other, deployed)
    x = torch.randn(1, 3, 40, 33)
    assert torch.equal(other(x), fused(x))


def test_stem_and_ways_down_round_up_and_norm_behind_the_convolution():
    model, x = small(), torch.randn(1, 3, 37, 50)
    first, norm1, _, second, norm2 = model.stem

    def ln(y, n):
        return F.layer_norm(y.movedim(1, -1), n.weight.shape, n.weight, n.bias, 1e-6).movedim(-1, 1)

    with torch.no_grad():
        y = F.gelu(ln(F.conv2d(x, first.weight, first.bias, 2, 1), norm1))
        y = ln(F.conv2d(y, second.weight, second.bias, 2, 1), norm2)
        assert error(model.embed(x.movedim(1, -1)), y.movedim(1, -1)) <= 1e-6
        down, z = model.stages[1].down, torch.randn(1, 7, 5, 8)
        want = ln(F.conv2d(z.movedim(-1, 1), down.proj.weight, down.proj.bias, 2, 1), down.norm)
        assert error(down(z), want.movedim(1, -1)) <= 1e-6
    assert [tuple(m.shape[2:]) for m in model.forward_intermediates(x)] == [(10, 13), (5, 7), (3, 4), (2, 2)]


def test_dense_version_norms_its_outputs():
    model, dense = small(), small(features_only=True)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    x = torch.randn(1, 3, 64, 50)
    with torch.no_grad():
        for i, (raw, got) in enumerate(zip(model.forward_intermediates(x), dense(x), strict=True)):
            norm = dense.output_norms[i]
            assert norm.eps == 1e-6
            torch.testing.assert_close(got, norm(raw.movedim(1, -1)).movedim(-1, 1), rtol=1e-4, atol=1e-5)


def test_one_axis_is_a_line_of_a_flat_image():
    """At rank 1 a branch's kernel is the middle row of a square one on a map of height one."""
    line, square = small(ndim=1), small()
    with torch.no_grad():
        for block1, block2 in zip(line.stages[2].blocks, square.stages[2].blocks, strict=True):
            state = block2.state_dict()
            for name, p in block1.state_dict().items():
                q = state[name]
                if q.ndim == 4 and q.shape[-1] > 1:
                    q = q[:, :, q.shape[2] // 2]
                p.copy_(q.reshape(p.shape))
            x = torch.randn(2, 17, 24)
            assert error(block1(x), block2(x[:, None])[:, 0]) <= 1e-5


@pytest.mark.parametrize("name", vertebra.list_models(family="unireplknet"))
def test_published_kernels_and_counts_of_the_fused_network(name):
    info = vertebra.model_info(name)
    with torch.device("meta"):
        model = vertebra.create_model(name).eval()
        third = ["L" if isinstance(b.mixer, DilatedReparam) else "s" for b in model.stages[2].blocks]
        assert all(isinstance(b.mixer, Conv) for b in model.stages[0].blocks)
        assert all(isinstance(b.mixer, DilatedReparam) for i in (1, 3) for b in model.stages[i].blocks)
        deployed = 0  # by arithmetic: what fusing leaves of each part, without building it
        for n, p in model.named_parameters():
            gone = n.endswith(("grn.beta", "scale.gamma")) or ".large.k" in n or "mlp.norm" in n or ".main.norm" in n
            deployed += 0 if gone or (".blocks." in n and n.split(".")[4] == "norm") else p.numel()
        deployed += 2 * sum(b.norm.num_features for stage in model.stages for b in stage.blocks)  # two biases each
        deployed /= 1e6
    size = name.split("_")[1]
    assert "".join(third) == {"t": "Ls" * 9}.get(size, "Lss" * 9 if size in ("s", "b", "l", "xl") else "L" * len(third))
    measured = dict(a=4.437, f=6.235, p=10.742, n=18.319, t=31.038, s=55.646, b=98.008, l=218.455).get(size, 386.529)
    assert abs(deployed - measured) <= 0.0006
    assert abs(deployed - info.published["params_deploy_m"]) <= 0.55
    assert info.inputs.size == (384 if size in ("b", "l", "xl") else 224)


def test_kernels_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="kernel must be one of"):
        DilatedReparam(2, 8, 19)
    with pytest.raises(ValueError, match="each of 4 stages"):
        vertebra.create_model("unireplknet_a", kernels=((3,), (13,)))
