"""InceptionNeXt against timm, its mixer written out, and its quirks as numbers."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import BatchNorm
from vertebra.mixers import InceptionMixer

SMALL = dict(dims=(16, 24, 32, 40), depths=(1, 1, 2, 1))


def small(**options):
    model = fill(vertebra.create_model("inceptionnext_tiny", **(SMALL | dict(num_classes=7) | options)))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("sides", [(64, 64), (45, 70)])
def test_network_is_timms_under_the_same_names(sides):
    ours = small(layer_scale=0.5)
    theirs = timm.create_model("inception_next_tiny", **SMALL, num_classes=7).eval()
    state = vertebra.to_official(ours)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 2e-6


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_mixer_leaves_most_channels_and_bands_run_along_each_axis(ndim):
    mixer, x = fill(InceptionMixer(ndim, 32, 0.125, band=5)), torch.randn(2, *(7, 8, 9)[:ndim], 32)
    call, maps = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1], x.movedim(-1, 1)
    kept = 32 - 4 * (ndim + 1)
    parts = [
        maps[:, :kept],
        call(maps[:, kept : kept + 4], mixer.square.weight, mixer.square.bias, padding=1, groups=4),
    ]
    for n, axis in enumerate(reversed(range(ndim))):  # the last axis first
        band, at = mixer.bands[n], kept + 4 * (n + 1)
        padding = tuple(2 if i == axis else 0 for i in range(ndim))
        assert band.weight.shape[2:] == tuple(5 if i == axis else 1 for i in range(ndim))
        parts.append(call(maps[:, at : at + 4], band.weight, band.bias, padding=padding, groups=4))
    torch.testing.assert_close(mixer(x), torch.cat(parts, 1).movedim(1, -1), rtol=1e-4, atol=1e-5)


def test_mixer_refuses_shares_that_do_not_fit():
    with pytest.raises(ValueError, match=r"0\.01 of 32 channels"):
        InceptionMixer(2, 32, 0.01)
    with pytest.raises(ValueError, match="leaves -8"):
        InceptionMixer(3, 32, 0.3125)


def test_head_is_an_mlp_with_its_norm_behind_the_activation():
    model, x = small(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        mean = model.forward_features(x).mean((2, 3))
        hidden = F.layer_norm(F.gelu(model.neck[0](mean)), (120,), model.neck[2].weight, model.neck[2].bias, 1e-6)
        torch.testing.assert_close(model(x), model.head(hidden), rtol=1e-4, atol=1e-5)


def test_published_configurations():
    with torch.device("meta"):
        models = {name: vertebra.create_model(name) for name in vertebra.list_models(family="inception_next")}
    counts = {name.split("next_")[1]: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert {k: round(v / 1e6, 3) for k, v in counts.items()} == {
        "atto": 4.157, "tiny": 28.056, "small": 49.374, "base": 86.672, "base_384": 86.672,
    }  # fmt: skip
    atto = models["inceptionnext_atto"].stages[0].blocks[0].mixer
    assert atto.parts == (10, 10, 10, 10) and atto.bands[0].kernel == (1, 9)
    ratios = [
        s.blocks[0].mlp.fc1.weight.shape[0] / s.blocks[0].mlp.fc1.weight.shape[1]
        for s in models["inceptionnext_tiny"].stages
    ]
    assert ratios == [4, 4, 4, 3]
