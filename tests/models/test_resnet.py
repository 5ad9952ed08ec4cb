"""ResNet, ResNeXt and Wide ResNet against torchvision and timm, and their quirks as numbers."""

from __future__ import annotations

import re

import pytest
import torch

import vertebra
from vertebra.layers import ConvNorm

SMALL = dict(layers=(2, 1, 2, 1), num_classes=7)
KINDS = {
    "resnet18": dict(block="BasicBlock"),
    "resnet50": dict(block="Bottleneck"),
    "resnext50_32x4d": dict(block="Bottleneck", groups=32, width_per_group=4),
    "wide_resnet50_2": dict(block="Bottleneck", width_per_group=128),
}


def filled(model):
    """Norms and statistics away from their initial values."""
    torch.manual_seed(0)
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            tensor.copy_((1 if key.endswith(("weight", "running_var")) else 0) + 0.1 * torch.randn_like(tensor).abs())
    return model.eval()


def error(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def torchvision_net(kind: str, **options):
    resnet = pytest.importorskip("torchvision.models.resnet")
    settings = dict(KINDS[kind])
    block = getattr(resnet, settings.pop("block"))
    return filled(resnet.ResNet(block, list(SMALL["layers"]), num_classes=7, **settings, **options))


@pytest.mark.parametrize("name", vertebra.list_models(family="resnet"))
def test_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == round(vertebra.model_info(name).published["params_m"] * 1e6)


@pytest.mark.parametrize("name", vertebra.list_models(family="resnet"))
def test_weights_carry_the_digits_of_their_digest(name):
    info = vertebra.model_info(name)
    assert re.fullmatch(rf"https://download\.pytorch\.org/models/{name}-([0-9a-f]{{8}})\.pth", info.weights.location)
    assert info.weights.location.endswith(f"-{info.weights.sha256}.pth")
    assert info.inputs.interpolation == "bilinear"
    assert info.inputs.crop == (224 / 232 if name == "resnext101_64x4d" else 0.875)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(64, 64), (33, 75)])
def test_logits_equal_torchvision(kind, sides):
    other = torchvision_net(kind)
    model = vertebra.create_model(kind, **SMALL).eval()
    report = vertebra.load_checkpoint(model, other.state_dict())
    assert not report.missing and not report.unexpected
    assert set(vertebra.to_official(model)) == {k for k in other.state_dict() if "num_batches" not in k}
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(model(x), other(x)) <= 1e-5


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_maps_equal_timm(name):
    timm = pytest.importorskip("timm")
    other = filled(timm.create_model(name))
    model = vertebra.create_model(name, features_only=True).eval()
    report = vertebra.load_checkpoint(model, other.state_dict())
    assert set(report.unused) == {"fc.weight", "fc.bias"}
    x = torch.randn(1, 3, 65, 94)
    with torch.no_grad():
        maps = other.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
        assert max(error(a, b) for a, b in zip(model(x), maps, strict=True)) <= 1e-5


@pytest.mark.parametrize("flags", [(False, False, True), (False, True, True), (True, True, True)])
def test_dilation_equals_torchvision_and_keeps_maps_large(flags):
    settings = dict(replace_stride_with_dilation=list(flags))
    other = torchvision_net("resnet50", **settings)
    model = vertebra.create_model("resnet50", **SMALL, **settings).eval()
    vertebra.load_checkpoint(model, other.state_dict())
    x = torch.randn(1, 3, 64, 72)
    with torch.no_grad():
        assert error(model(x), other(x)) <= 1e-5
        sides = [tuple(m.shape[2:]) for m in model.forward_intermediates(x)]
    strides = [info["reduction"] for info in model.feature_info]
    assert strides == {1: [4, 8, 16, 16], 2: [4, 8, 8, 8], 3: [4, 4, 4, 4]}[sum(flags)]
    assert sides == [(-(-64 // s), -(-72 // s)) for s in strides]


def test_the_first_block_of_a_dilated_stage_keeps_the_old_dilation():
    model = vertebra.create_model("resnet50", replace_stride_with_dilation=(False, True, True))
    spread = [[b.conv2.conv.dilation[0] for b in s.blocks] for s in model.stages]
    assert spread == [[1] * 3, [1] * 4, [1, *[2] * 5], [2, 4, 4]]


def test_options_that_do_not_fit_are_refused():
    for bad in ((True, False), (True,) * 4):
        with pytest.raises(ValueError, match="three"):
            vertebra.create_model("resnet50", replace_stride_with_dilation=bad)
    with pytest.raises(ValueError, match="dilation"):
        vertebra.create_model("resnet18", replace_stride_with_dilation=(False, False, True))
    with pytest.raises(ValueError, match="basic"):
        vertebra.create_model("resnet18", width_per_group=128)
    with pytest.raises(ValueError, match="no residual paths"):
        vertebra.create_model("resnet18", drop_path_rate=0.1)
    assert vertebra.create_model("resnet18", drop_path_rate=0.0, **SMALL).num_classes == 7


def test_the_pool_pads_with_minus_infinity():
    model = vertebra.create_model("resnet18", **SMALL).eval()
    with torch.no_grad():
        model.stem.norm.bias.fill_(-1)
        model.stem.act = torch.nn.Identity()  # without the ReLU zero padding would win at the border
        maps = model.embed(torch.zeros(1, 32, 32, 3))
    assert torch.equal(maps, torch.full((1, 8, 8, 64), -1.0))


def test_stride_sits_in_the_middle_convolution_and_shortcuts_only_where_shapes_change():
    wide = vertebra.create_model("resnet50", **SMALL)
    first = wide.stages[2].blocks[0]
    assert [c.conv.stride for c in (first.conv1, first.conv2, first.conv3)] == [(1, 1), (2, 2), (1, 1)]
    assert [isinstance(s.blocks[0].skip, ConvNorm) for s in wide.stages] == [True] * 4
    basic = vertebra.create_model("resnet18", **SMALL)
    assert [isinstance(s.blocks[0].skip, ConvNorm) for s in basic.stages] == [False, True, True, True]
    assert not any(isinstance(b.skip, ConvNorm) for m in (wide, basic) for s in m.stages for b in s.blocks[1:])


def test_initial_weights():
    torch.manual_seed(0)
    model = vertebra.create_model("resnet50", zero_init_residual=True)
    for block in (model.stages[0].blocks[1], model.stages[3].blocks[2]):
        assert not block.conv3.norm.weight.any() and block.conv2.norm.weight.eq(1).all()
    weight = model.stages[2].blocks[1].conv2.conv.weight
    assert abs(weight.std().item() / (2 / (weight.shape[0] * 9)) ** 0.5 - 1) < 0.01
    plain = vertebra.create_model("resnet50", **SMALL)
    assert plain.stages[0].blocks[1].conv3.norm.weight.eq(1).all()
    norms = [m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-5, 0.1)}


def test_published_fusing_keeps_batch_norms_and_full_fusing_folds_them():
    model = filled(vertebra.create_model("resnet50", **SMALL))
    x = torch.randn(1, 3, 40, 40)
    kept, folded = vertebra.fuse(model), vertebra.fuse(model, published=False)
    assert kept.state_dict().keys() == model.state_dict().keys()
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in folded.modules())
    with torch.no_grad():
        assert error(folded(x), model(x)) <= 1e-5


@pytest.mark.parametrize("kind", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize(("ndim", "sides"), [(1, (129,)), (2, (32, 45)), (3, (33, 32, 40))])
def test_other_ranks_and_sizes_train(kind, ndim, sides):
    model = vertebra.create_model(kind, ndim=ndim, in_chans=2, **SMALL)
    y = model(torch.randn(2, 2, *sides))
    y.square().sum().backward()
    assert y.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_line_equals_torchvisions_network_with_one_dimensional_operators():
    """A 1-D network is the 2-D one on a map that does not vary along the rows, its kernels summed over them."""
    torch.manual_seed(0)
    line = filled(vertebra.create_model("resnet18", ndim=1, **SMALL))
    plane = filled(vertebra.create_model("resnet18", ndim=2, **SMALL))
    own = plane.state_dict()
    for key, tensor in line.state_dict().items():
        wide = torch.zeros_like(own[key])
        if tensor.ndim == 3:  # the kernel in the middle row: nothing of the zero padding above and below is read
            wide[:, :, wide.shape[2] // 2] = tensor
        own[key] = wide if tensor.ndim == 3 else tensor
    plane.load_state_dict(own)
    x = torch.randn(2, 3, 90)
    with torch.no_grad():
        assert error(plane(x[:, :, None].expand(2, 3, 64, 90)), line(x)) <= 1e-5
