"""ShuffleNet v2 against torchvision; the megvii units and v1's written out; counts of all variants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from oracle import error, fill

import vertebra
from vertebra.layers import BatchNorm
from vertebra.models.shufflenet import GroupedUnit, SplitUnit


def settle(module):
    fill(module)
    for part in module.modules():
        if isinstance(part, BatchNorm):
            part.running_mean.normal_(std=0.1), part.running_var.uniform_(0.5, 2)
    return module


def apply(unit, x, act=False):
    """Convolution and norm on (B, C, H, W), from torch's calls."""
    c, n = unit.conv, unit.norm
    y = F.conv2d(x, c.weight, None, c.stride, c.padding, 1, c.groups)
    y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)
    return y.relu() if act else y


@pytest.mark.parametrize("sides", [(64, 64), (45, 70)])
def test_v2_is_torchvisions_under_the_same_names(sides):
    ours = settle(vertebra.create_model("shufflenet_v2_x0_5", num_classes=7))
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=7).eval()
    missing, unexpected = theirs.load_state_dict(vertebra.to_official(ours), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 2e-6


@pytest.mark.parametrize("groups", (3, 8))
def test_v1_unit_shuffles_behind_the_depthwise_convolution_the_other_way(groups):
    dim = 4 * 2 * groups
    unit, x = settle(GroupedUnit(2, dim, dim, 1, groups)), torch.randn(2, 5, 6, dim)
    y = apply(unit.depthwise, apply(unit.squeeze, x.movedim(-1, 1), act=True))
    mid = dim // 4
    dealt = torch.empty_like(y)
    for i in range(mid // groups):
        for j in range(groups):
            dealt[:, j * (mid // groups) + i] = y[:, i * groups + j]
    expected = (x.movedim(-1, 1) + apply(unit.project, dealt)).relu().movedim(1, -1)
    torch.testing.assert_close(unit(x), expected, rtol=1e-4, atol=1e-5)


def test_v1_stride_joins_a_pooled_input_without_activation():
    unit, x = settle(GroupedUnit(2, 12, 48, 2, 3, first=True)), torch.randn(2, 7, 6, 12)
    y = unit(x).movedim(-1, 1)
    assert unit.squeeze.conv.groups == 1 and unit.project.conv.groups == 3 and y.shape == (2, 48, 4, 3)
    pooled = F.avg_pool2d(x.movedim(-1, 1), 3, 2, 1)  # counts the zeros of the border
    torch.testing.assert_close(y[:, :12], pooled)
    assert (y[:, :12] < 0).any() and (y[:, 12:] >= 0).all()


def test_megvii_units_take_even_channels_past_odd_ones():
    unit, x = settle(SplitUnit(2, 8, 8, 1, interleaved=True)), torch.randn(2, 5, 6, 8)
    maps = x.movedim(-1, 1)
    y = apply(unit.main[2], apply(unit.main[1], apply(unit.main[0], maps[:, 1::2], True)), True)
    torch.testing.assert_close(unit(x).movedim(-1, 1), torch.cat([maps[:, ::2], y], 1), rtol=1e-4, atol=1e-5)
    strided = settle(SplitUnit(2, 6, 16, 2, interleaved=True))
    side = apply(strided.side[1], apply(strided.side[0], maps[:, :6]), True)
    main = apply(strided.main[2], apply(strided.main[1], apply(strided.main[0], maps[:, :6], True)), True)
    assert side.shape[1] == 6 and main.shape[1] == 10
    got = strided(x[..., :6].contiguous()).movedim(-1, 1)
    torch.testing.assert_close(got, torch.cat([side, main], 1), rtol=1e-4, atol=1e-5)


def test_weights_of_one_v2_do_not_load_into_the_other():
    ours = vertebra.create_model("shufflenet_v2_x1_0", num_classes=7)
    with pytest.raises(vertebra.CheckpointError):
        vertebra.load_checkpoint(
            vertebra.create_model("shufflenet_v2_x1_0_megvii", num_classes=7), vertebra.to_official(ours)
        )


def test_published_counts_and_heads():
    counts = {}
    for name in vertebra.list_models(family="shufflenet"):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        counts[name.removeprefix("shufflenet_")] = sum(p.numel() for p in model.parameters())
        assert (model.head.bias is None) == ("v1" in name or "megvii" in name)
    assert counts == {
        "v1_x0_5_g3": 717_324, "v1_x1_0_g3": 1_864_728, "v1_x1_5_g3": 3_441_168, "v1_x2_0_g3": 5_449_776,
        "v1_x0_5_g8": 1_010_448, "v1_x1_0_g8": 2_433_768, "v1_x1_5_g8": 4_268_952, "v1_x2_0_g8": 6_521_232,
        "v2_x0_5": 1_366_792, "v2_x1_0": 2_278_604, "v2_x1_5": 3_503_624, "v2_x2_0": 7_393_996,
        "v2_x0_5_megvii": 1_365_792, "v2_x1_0_megvii": 2_278_760, "v2_x1_5_megvii": 3_506_720,
        "v2_x2_0_megvii": 7_402_600,
    }  # fmt: skip
    assert vertebra.model_info("shufflenet_v2_x1_0_megvii").inputs.channels == "BGR"


def test_groups_must_divide_the_middle():
    with pytest.raises(ValueError, match="do not divide into 5 groups"):
        GroupedUnit(2, 24, 48, 1, 5)
