"""MobileNetV2 against torchvision, and its rounding of widths."""

from __future__ import annotations

import pytest
import torch
import torchvision
from oracle import error, fill

import vertebra
from vertebra.layers import BatchNorm


def small(name="mobilenet_v2_w0_35", **options):
    model = fill(vertebra.create_model(name, num_classes=7, **options))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("width", [0.35, 1.3])
@pytest.mark.parametrize("sides", [(64, 64), (45, 70)])
def test_network_is_torchvisions_under_the_same_names(width, sides):
    ours = small(f"mobilenet_v2_w{str(width).replace('.', '_')}")
    theirs = torchvision.models.mobilenet_v2(width_mult=width, num_classes=7).eval()
    missing, unexpected = theirs.load_state_dict(vertebra.to_official(ours), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    x = 30 * torch.randn(2, 3, *sides)  # far enough to saturate ReLU6
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 2e-6
        y = x
        maps = iter(ours.forward_intermediates(x))
        for i, layer in enumerate(theirs.features):
            y = layer(y)
            if i in (3, 6, 13, 17):
                assert error(next(maps), y) <= 2e-6


def test_widths_are_multiples_of_eight_and_the_last_is_never_narrowed():
    found = {}
    for name in vertebra.list_models("mobilenet_v2*"):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        found[name] = (
            model.stem.conv.weight.shape[0],
            model.head.in_features,
            sum(p.numel() for p in model.parameters()),
        )
    assert found == {
        "mobilenet_v2": (32, 1280, 3_504_872),
        "mobilenet_v2_w0_35": (16, 1280, 1_677_128),
        "mobilenet_v2_w0_5": (16, 1280, 1_968_680),
        "mobilenet_v2_w0_75": (24, 1280, 2_636_424),
        "mobilenet_v2_w1_3": (40, 1664, 5_386_792),
        "mobilenet_v2_w1_4": (48, 1792, 6_108_776),
    }


def test_projections_are_linear_and_residuals_need_equal_shapes():
    model = small()
    blocks = [b for stage in model.stages for b in stage.blocks]
    assert all(isinstance(b.project.act, torch.nn.Identity) for b in blocks)
    assert [b.residual for b in blocks].count(True) == 10
    with pytest.raises(ValueError, match="drop_path_rate"):
        vertebra.create_model("mobilenet_v2", drop_path_rate=0.1)
    with pytest.raises(ValueError, match="width must be positive"):
        vertebra.create_model("mobilenet_v2", width=0)
