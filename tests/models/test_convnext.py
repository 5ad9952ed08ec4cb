"""ConvNeXt against timm, its block written out, and its quirks as numbers."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import LayerScale
from vertebra.models.convnext import block

SMALL = dict(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1))
RULES = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.", "stages."),
    (r"^(stages\.\d)\.([01])\.(weight|bias)$", r"\1.downsample.\2.\3"),
    (r"^(stages\.\d)\.(\d+)\.", r"\1.blocks.\2."),
    (r"dwconv", "conv_dw"),
    (r"pwconv(\d)", r"mlp.fc\1"),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def small(**options):
    return fill(vertebra.create_model("convnext_tiny", **(SMALL | dict(num_classes=7) | options)))


def renamed(state):
    out = {}
    for name, tensor in state.items():
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        out[name] = tensor
    return out


@pytest.mark.parametrize("sides", [(64, 64), (45, 70)])
def test_pyramid_is_timms(sides):
    ours = small(layer_scale=0.5)
    theirs = timm.create_model("convnext_tiny", dims=SMALL["dims"], depths=SMALL["depths"], num_classes=7).eval()
    theirs.load_state_dict(renamed(vertebra.to_official(ours)))
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 2e-6
        for a, b in zip(ours.forward_intermediates(x), theirs.forward_intermediates(x)[1], strict=True):
            assert error(a, b) <= 2e-6


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_block_has_one_norm_behind_the_convolution(ndim):
    layer, x = fill(block(ndim, 6, 0.0, 0.3)), torch.randn(2, *(9, 8, 7)[:ndim], 6)
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    y = call(x.movedim(-1, 1), layer.mixer.weight, layer.mixer.bias, padding=3, groups=6).movedim(1, -1)
    y = F.layer_norm(y, (6,), layer.norm.weight, layer.norm.bias, 1e-6)
    y = F.linear(
        F.gelu(F.linear(y, layer.mlp.fc1.weight, layer.mlp.fc1.bias)), layer.mlp.fc2.weight, layer.mlp.fc2.bias
    )
    torch.testing.assert_close(layer(x), x + layer.scale.gamma * y, rtol=1e-4, atol=1e-5)


def test_the_last_norm_comes_after_the_mean():
    model, x = small(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = model.forward_features(x)
        mean = F.layer_norm(features.mean((2, 3)), (32,), model.norm.weight, model.norm.bias, 1e-6)
        torch.testing.assert_close(model(x), model.head(mean), rtol=1e-4, atol=1e-5)


def test_the_dense_version_norms_outputs_but_not_what_goes_on():
    model = small()
    dense = fill(vertebra.create_model("convnext_tiny", features_only=True, **SMALL))
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for i, (raw, got) in enumerate(zip(model.forward_intermediates(x), dense(x), strict=True)):
            torch.testing.assert_close(
                got, dense.output_norms[i](raw.movedim(1, -1)).movedim(-1, 1), rtol=1e-4, atol=1e-5
            )


def test_isotropic_models_keep_one_map_and_scales_only_where_published():
    scales = {}
    for size in ("small", "base", "large"):
        with torch.device("meta"):
            model = vertebra.create_model(f"convnext_isotropic_{size}")
        scales[size] = sum(isinstance(m, LayerScale) for m in model.modules())
        assert {info["reduction"] for info in model.feature_info} == {16}
        assert sum(p.numel() for p in model.parameters()) == {"small": 22_308_712, "base": 87_083_752}.get(
            size, 305_905_640 + 36 * 1024
        )
    assert scales == {"small": 0, "base": 0, "large": 36}


def test_isotropic_dense_version_taps_four_depths():
    model = vertebra.create_model("convnext_isotropic_small", dim=16, depth=8, features_only=True)
    assert model.out_indices == (1, 3, 5, 7)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        vertebra.create_model("convnext_isotropic_small", depth=0)
