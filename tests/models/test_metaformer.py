"""MetaFormer's networks against timm, their mixers written out, and their quirks as numbers."""

from __future__ import annotations

import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.mixers import PoolMixer, RandomMixer, SeparableConvMixer, StarReLU
from vertebra.models.metaformer import MapNorm

SMALL = dict(dims=(16, 24, 32, 64), depths=(1, 2, 1, 1))
RULES = (
    (r"^downsample_layers\.0\.conv", "stem.conv"),
    (r"^downsample_layers\.0\.post_norm", "stem.norm"),
    (r"^downsample_layers\.(\d)\.pre_norm", r"stages.\1.downsample.norm"),
    (r"^downsample_layers\.(\d)\.conv", r"stages.\1.downsample.conv"),
    (r"^(stages\.\d)\.(\d+)\.", r"\1.blocks.\2."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^head\.(fc1|fc2)\.", r"head.fc.\1."),
)


def small(name, **options):
    return fill(vertebra.create_model(name, **(SMALL | dict(num_classes=7) | options)))


@pytest.mark.parametrize("name", ["convformer_s18", "caformer_s18", "poolformerv2_s12"])
@pytest.mark.parametrize("sides", [(64, 64), (45, 70)])
def test_baselines_are_timms(name, sides):
    ours = fill(vertebra.create_model(name, num_classes=7))
    theirs = timm.create_model(name, num_classes=7).eval()
    state = {}
    for key, tensor in vertebra.to_official(ours).items():
        head = key.startswith("head.norm.")
        for pattern, new in RULES:
            key = re.sub(pattern, new, key)
        state[key.replace("head.norm.", "head.fc.norm.") if head else key] = tensor
    wanted = theirs.state_dict()  # some of their linear layers are 1x1 convolutions, and scalars have one axis
    theirs.load_state_dict({k: v.reshape(wanted[k].shape) for k, v in state.items()})
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 5e-6


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_pooling_counts_real_cells_and_takes_the_cell_away(ndim):
    sides = (5, 4, 3)[:ndim]
    x, mixer = torch.randn(1, *sides, 2), PoolMixer()
    y = mixer(x)
    for cell in torch.cartesian_prod(*(torch.arange(s) for s in sides)).reshape(-1, ndim).tolist():
        near = tuple(slice(max(c - 1, 0), c + 2) for c in cell)
        mean = x[(0, *near)].flatten(0, -2).mean(0)
        torch.testing.assert_close(y[(0, *cell)], mean - x[(0, *cell)], rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="must be odd"):
        PoolMixer(2)


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_separable_convolution(ndim):
    mixer, x = fill(SeparableConvMixer(ndim, 4, 3)), torch.randn(2, *(5, 6, 4)[:ndim], 4)
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    h = mixer.act1.scale * (x @ mixer.pwconv1.weight.T).clamp(min=0) ** 2 + mixer.act1.bias
    h = call(h.movedim(-1, 1), mixer.dwconv.weight, padding=1, groups=8).movedim(1, -1)
    torch.testing.assert_close(mixer(x), h @ mixer.pwconv2.weight.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_random_mixing_is_one_fixed_matrix(grid):
    mixer, x = RandomMixer(grid), torch.randn(2, *grid, 3)
    assert not mixer.random_matrix.requires_grad and mixer.random_matrix.shape == (math.prod(grid),) * 2
    torch.testing.assert_close(mixer.random_matrix.sum(1), torch.ones(math.prod(grid)))
    y = torch.einsum("mn,bnc->bmc", mixer.random_matrix, x.flatten(1, -2)).reshape(x.shape)
    torch.testing.assert_close(mixer(x), y)
    constant = torch.ones(1, *(2 * s + 1 for s in grid), 3)  # rows sum to one, so a constant map stays
    torch.testing.assert_close(mixer(constant), constant)


def test_star_relu():
    act = StarReLU()
    with torch.no_grad():
        act.scale.fill_(2.0), act.bias.fill_(-0.5)
        assert act(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [-0.5, -0.5, 17.5]


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_map_norm_has_one_mean_for_all_channels_and_cells(ndim):
    norm, x = MapNorm(5), 3 + 2 * torch.randn(2, *(4, 3, 2)[:ndim], 5)
    torch.nn.init.normal_(norm.weight)
    y = F.group_norm(x.movedim(-1, 1), 1, norm.weight, eps=1e-6).movedim(1, -1)
    torch.testing.assert_close(norm(x), y, rtol=1e-4, atol=1e-5)


def test_poolformer_norms_the_map_and_then_averages():
    model, x = small("poolformer_s12", layer_scale=0.5), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        raw = model.forward_intermediates(x, 1)[0]
        normed = F.group_norm(raw, 1, model.norm.weight, model.norm.bias)
        torch.testing.assert_close(model(x), model.head(normed.mean((2, 3))), rtol=1e-4, atol=1e-5)


def test_identity_still_adds_the_normed_map_and_late_residuals_are_scaled():
    block, x = small("identityformer_s12").stages[2].blocks[0], torch.randn(2, 3, 4, 32)
    with torch.no_grad():
        y = block.res_scale1.scale * x + block.norm1(x)
        y = block.res_scale2.scale * y + block.mlp(block.norm2(y))
        torch.testing.assert_close(block(x), y)
    early = small("identityformer_s12").stages[1].blocks[0]
    assert isinstance(early.res_scale1, torch.nn.Identity)


def test_published_configurations():
    counts = {}
    for name in vertebra.list_models(family="metaformer"):
        with torch.device("meta"):
            counts[name] = round(sum(p.numel() for p in vertebra.create_model(name).parameters()) / 1e6, 3)
    expected = {
        "poolformer_s36": 30.863, "poolformer_m48": 73.473, "identityformer_s12": 11.892, "identityformer_m36": 56.077,
        "randformer_s24": 21.812, "randformer_m48": 74.287, "convformer_s36": 40.012, "convformer_b36": 99.883,
        "caformer_m36": 56.205, "caformer_b36": 98.754,
    }  # fmt: skip
    assert {k: counts[k] for k in expected} == expected
    with pytest.raises(ValueError, match="mixers needs one of identity"):
        vertebra.create_model("caformer_s18", mixers=("conv", "conv", "atention", "conv"))
