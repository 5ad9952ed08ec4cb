"""Networks for semantic segmentation: every head against plain torch, sizes, ranks, checkpoints, costs."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vertebra
from vertebra import CheckpointError, load_checkpoint, save_checkpoint, to_official
from vertebra.tasks.pyramid import prefixed_groups
from vertebra.tasks.segmentation import HEADS, segmentation

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
PVT = dict(dims=(8, 16, 40, 32), depths=(1, 1, 1, 1))
SMALL = {
    "semantic_fpn": dict(neck_channels=12, channels=8), "fpn": dict(neck_channels=12, channels=8),
    "upernet": dict(channels=8), "pspnet": dict(channels=8, pool_scales=(1, 2)),
    "deeplabv3": dict(channels=8, dilations=(1, 2, 3)), "segformer": dict(channels=8),
    "unet": dict(channels=4, most=24),
}  # fmt: skip


def small(head, ndim=2, seed=0, num_classes=5, **options):
    torch.manual_seed(seed)
    options = {"head_options": SMALL[head]} | options
    model = segmentation("pvt_v2_b0", head, num_classes, ndim=ndim, in_chans=2, **(PVT | options)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # norms that do something
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("running_mean", "norm.bias")):
                tensor.normal_()
        for part in (model.decode_head, model.auxiliary_head):
            if part is not None:
                part.conv_seg.weight.normal_(std=0.5)
                part.conv_seg.bias.normal_()
    return model


def image(*sides, batch=2, seed=3):
    return torch.randn(batch, 2, *sides, generator=torch.Generator().manual_seed(seed))


# --- every head, again in plain torch -------------------------------------------------------------------------------


class Plain:
    """The heads as mmsegmentation's papers draw them, channels first, from an official state dict."""

    def __init__(self, state, ndim):
        self.state, self.ndim = state, ndim
        self.conv_call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
        self.pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[ndim]
        self.mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[ndim]

    def conv(self, name, x, padding=None, stride=1, dilation=1):
        weight = self.state[f"{name}.weight"]
        padding = dilation * (weight.shape[2] // 2) if padding is None else padding
        return self.conv_call(x, weight, self.state.get(f"{name}.bias"), stride, padding, dilation)

    def block(self, name, x, **options):
        assert f"{name}.conv.bias" not in self.state  # a norm follows
        x = self.conv(f"{name}.conv", x, **options)
        bn = {k: self.state[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        return F.relu(F.batch_norm(x, **bn, eps=1e-5))

    def to(self, x, size):
        return F.interpolate(x, size=size, mode=self.mode, align_corners=False)

    def neck(self, maps):
        x = [self.conv(f"neck.lateral_convs.{i}.conv", m) for i, m in enumerate(maps)]
        for i in (2, 1, 0):
            x[i] = x[i] + F.interpolate(x[i + 1], size=x[i].shape[2:], mode="nearest")
        return [self.conv(f"neck.fpn_convs.{i}.conv", m) for i, m in enumerate(x)]

    def semantic_fpn(self, head, maps, image):
        maps = self.neck(maps)
        total = self.block(f"{head}.scale_heads.0.0", maps[0])
        for i in (1, 2, 3):
            x = maps[i]
            for k in range(i):
                x = self.block(f"{head}.scale_heads.{i}.{2 * k}", x)
                x = F.interpolate(x, scale_factor=2, mode=self.mode, align_corners=False)
            total = total + self.to(x, total.shape[2:])
        return total

    fpn = semantic_fpn

    def pyramid_pooling(self, head, x, scales):
        parts = [x]
        for i, scale in enumerate(scales):
            parts.append(self.to(self.block(f"{head}.psp_modules.{i}.1", self.pool(x, scale)), x.shape[2:]))
        return self.block(f"{head}.bottleneck", torch.cat(parts, 1))

    def upernet(self, head, maps, image):
        x = [self.block(f"{head}.lateral_convs.{i}", maps[i]) for i in range(3)]
        x.append(self.pyramid_pooling(head, maps[3], (1, 2, 3, 6)))
        for i in (2, 1, 0):
            x[i] = x[i] + self.to(x[i + 1], x[i].shape[2:])
        outs = [self.block(f"{head}.fpn_convs.{i}", x[i]) for i in range(3)] + [x[3]]
        return self.block(f"{head}.fpn_bottleneck", torch.cat([self.to(o, outs[0].shape[2:]) for o in outs], 1))

    def pspnet(self, head, maps, image):
        return self.pyramid_pooling(head, maps[3], (1, 2))

    def deeplabv3(self, head, maps, image):
        x = maps[3]
        parts = [self.to(self.block(f"{head}.image_pool.1", self.pool(x, 1)), x.shape[2:])]
        parts += [self.block(f"{head}.aspp_modules.{i}", x, dilation=d) for i, d in enumerate((1, 2, 3))]
        parts[1] = self.block(f"{head}.aspp_modules.0", x, padding=0)  # a 1x1
        return self.block(f"{head}.bottleneck", torch.cat(parts, 1))

    def segformer(self, head, maps, image):
        x = [self.to(self.block(f"{head}.convs.{i}", m), maps[0].shape[2:]) for i, m in enumerate(maps)]
        return self.block(f"{head}.fusion_conv", torch.cat(x, 1))

    def unet(self, head, maps, image):
        full = self.block(f"{head}.stem.0", image)
        half = self.block(f"{head}.stem.1", full, stride=2)
        skips, x = [full, half, *maps[:3]], maps[3]
        for i in (4, 3, 2, 1, 0):
            x = torch.cat([self.to(x, skips[i].shape[2:]), skips[i]], 1)
            x = self.block(f"{head}.levels.{i}.1", self.block(f"{head}.levels.{i}.0", x))
        return x

    def auxiliary(self, maps):
        return self.conv("auxiliary_head.conv_seg", self.block("auxiliary_head.convs.0", maps[2]))


@pytest.mark.parametrize("sides", [(53,), (45, 70), (33, 36, 40)])
@pytest.mark.parametrize("head", HEADS)
def test_heads_equal_plain_torch(head, sides):
    """From mmsegmentation's names to logits at the input's odd size: a wrong kernel, norm or path would show."""
    model, x = small(head, len(sides)), image(*sides)
    plain = Plain(to_official(model), len(sides))
    with torch.no_grad():
        maps = model.pyramid(x)
        want = plain.conv("decode_head.conv_seg", getattr(plain, head)("decode_head", maps, x))
        if head == "unet":
            assert want.shape[2:] == sides
        found = model.forward_outputs(x)
        assert found["logits"].shape == (2, 5, *sides) and want.std() > 0.1
        torch.testing.assert_close(
            found["logits"], plain.to(want, sides), rtol=1e-5, atol=1e-5 * float(want.abs().max())
        )
        torch.testing.assert_close(model(x), found["logits"], rtol=0, atol=0)
        assert ("auxiliary" in found) == (head in ("upernet", "pspnet", "deeplabv3"))
        if "auxiliary" in found:
            aux = plain.to(plain.auxiliary(maps), sides)
            torch.testing.assert_close(found["auxiliary"], aux, rtol=1e-5, atol=1e-5 * float(aux.abs().max()))


def test_parameter_counts_by_hand():
    model = small("upernet", auxiliary=False)
    pooling = 4 * 32 * 8 + (32 + 4 * 8) * 8 * 9
    fpn = (8 + 16 + 40) * 8 + 3 * 8 * 8 * 9 + 4 * 8 * 8 * 9
    norms, classes = 12 * 16, 8 * 5 + 5
    assert sum(p.numel() for p in model.decode_head.parameters()) == pooling + fpn + norms + classes
    model = small("semantic_fpn")
    assert sum(p.numel() for p in model.neck.parameters()) == 96 * 12 + 4 * 12 + 4 * (12 * 12 * 9 + 12)
    blocks = 4 * (12 * 8 * 9 + 16) + 3 * (8 * 8 * 9 + 16)
    assert sum(p.numel() for p in model.decode_head.parameters()) == blocks + classes


def test_published_costs():
    """Of the papers' tables: parameters with the auxiliary head where they train with one; on the meta device."""
    import dense_costs

    rows = {(r.name, r.head): r for r in dense_costs.ROWS}
    for name, head in (("crossformer_small", "semantic_fpn"), ("swin_tiny_patch4_window7_224", "upernet")):
        assert dense_costs.fits(dense_costs.params_m(rows[name, head]), rows[name, head].params_m)
    row = rows["convnext_tiny", "upernet"]
    assert dense_costs.fits(dense_costs.params_m(row), row.params_m)
    assert all(dense_costs.fits(macs, row.gmacs) for macs in dense_costs.gmacs(row))
    assert dense_costs.fits(31.4, 31) and dense_costs.fits(101, 100) and not dense_costs.fits(31.6, 31)


# --- training, options, sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns(head):
    model = small(head).train()
    outputs = model.forward_outputs(image(64, 64))
    sum(v.square().mean() for v in outputs.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert idle == []


def test_dropout_takes_whole_channels_in_training_alone():
    model = small("segformer", head_options=dict(channels=8, dropout=0.5))
    head, seen = model.decode_head, []
    head.conv_seg.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(image(64, 64))
    head.training = True  # of itself alone: the norms go on with their running statistics
    model(image(64, 64))
    plain, dropped = seen
    zero = (dropped == 0).flatten(1, 2).all(1)
    assert 0 < zero.sum() < zero.numel()
    kept = ~zero[:, None, None, :].expand_as(plain)
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


def test_the_smallest_and_other_sizes():
    for head in HEADS:
        model = small(head)
        assert model.min_size == 32
        with torch.no_grad():
            assert model(image(32, 47)).shape == (2, 5, 32, 47)
    with pytest.raises(ValueError, match="too small"):
        model(image(31, 64))


@pytest.mark.parametrize("name", ("deit_tiny_patch16_224", "efficientvit_m0", "mixer_s16_224"))
def test_networks_without_the_four_levels(name):
    options = {} if name == "efficientvit_m0" else dict(dim=24, depth=2)
    options |= dict(heads=2) if name.startswith("deit") else {}
    model = segmentation(name, "upernet", 3, head_options=dict(channels=8), **options).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 70, 65)).shape == (1, 3, 70, 65)


def test_every_family_builds():
    """All families that have a dense version at rank 2, by their smallest variant, on the meta device."""
    without = set()
    for family in vertebra.list_families():
        names = vertebra.list_models(family=family)
        model, refusal = None, ""
        for name in sorted(names, key=lambda n: vertebra.model_info(n).published.get("params_m", 1e3)):
            try:
                with torch.device("meta"):
                    model = segmentation(name, "semantic_fpn", 7)
                break
            except ValueError as error:
                refusal = str(error)
        if model is None:
            assert "dense version" in refusal or "rank" in refusal, refusal
            without.add(family)
            continue
        assert model.pyramid.strides[:4] == (4, 8, 16, 32), family
        assert model.decode_head.conv_seg.weight.shape == (7, 128, 1, 1)
    assert without == {"cf_vit", "pathformer"}


def test_new_classes_groups_decay_and_checkpointing():
    from timm.optim._param_groups import group_parameters

    model = small("upernet").train()
    model.reset_classifier(9)
    assert model.num_classes == 9 and {v.shape[1] for v in model.forward_outputs(image(64, 64)).values()} == {9}
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    inner = group_parameters(model.pyramid.backbone, model.pyramid.backbone.group_matcher(), reverse=True)
    for name, layer in inner.items():
        assert groups[f"pyramid.backbone.{name}"] == layer
    assert {groups[n] for n in groups if n.startswith(("decode_head", "auxiliary_head"))} == {max(inner.values()) + 1}
    rules = {"a": r"^x", "b": [(r"^y\.(\d+)", None), (r"z", (9,))]}
    assert prefixed_groups(rules, "p.") == {"a": r"^p\.x", "b": [(r"^p\.y\.(\d+)", None), (r"^p\..*?z", (9,))]}
    swin = segmentation("swin_tiny_patch4_window7_224", "segformer", 2, dim=12, depths=(1, 1, 1, 1))
    names = dict(swin.named_parameters())
    assert swin.no_weight_decay() and swin.no_weight_decay() <= set(names)
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing()
    grads = []
    for each in (model, plain):
        torch.manual_seed(0)
        each(image(64, 64)).square().sum().backward()
        grads.append(next(each.pyramid.backbone.parameters()).grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(head="unet++"), "unknown segmentation head 'unet\\+\\+'; there are: semantic_fpn"),
        (
            dict(head="segformer", head_options=dict(width=3)),
            "head 'segformer' has no option 'width'; it has: channels",
        ),
        (dict(head="pspnet", head_options=dict(level=4)), "level 4 is not one of the pyramid's 4 maps"),
        (dict(head="segformer", head_options=dict(dropout=1.0)), "dropout must be in"),
        (dict(head="segformer", num_classes=0), "num_classes must be a whole number of at least 1, got 0"),
        (dict(head="segformer", depth=3), "has no option 'depth'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        segmentation("pvt_v2_b0", **({"num_classes": 2} | PVT | options))


# --- checkpoints ----------------------------------------------------------------------------------------------------


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if not k.endswith("num_batches_tracked")) and a.keys() == b.keys()


def mmseg(model):
    """As mmsegmentation writes it: under "state_dict", with counters, beside other things."""
    return {"meta": {"epoch": 3}, "state_dict": to_official(model), "optimizer": {}}


@pytest.mark.parametrize("head", ("semantic_fpn", "upernet", "deeplabv3"))
def test_official_files_load(head, tmp_path):
    source, target = small(head), small(head, seed=1)
    state = to_official(source)
    assert {k.split(".")[0] for k in state} <= {"backbone", "neck", "decode_head", "auxiliary_head"}
    assert not any(".norm." in k for k in state if not k.startswith("backbone."))
    torch.save(mmseg(source), tmp_path / "iter_80000.pth")
    report = load_checkpoint(target, tmp_path / "iter_80000.pth")
    assert equal(source, target) and report.naming == "official"
    assert (report.missing, report.unexpected, report.unused, report.fresh) == ([], [], [], [])
    assert len(report.loaded) == len(state)
    save_checkpoint(source, tmp_path / "ours.safetensors")
    again = small(head, seed=2)
    assert load_checkpoint(again, tmp_path / "ours.safetensors").naming == "ours" and equal(source, again)
    built = small(head, seed=3, checkpoint=tmp_path / "iter_80000.pth")
    with torch.no_grad():
        assert built.load_report.naming == "official" and not equal(built, small(head, seed=3))


def test_swin_names_go_through_the_backbone_s_own_rules():
    model = segmentation("swin_tiny_patch4_window7_224", "upernet", 3, dim=12, depths=(1, 1, 1, 1),
                         head_options=dict(channels=4))  # fmt: skip
    state = to_official(model)
    names = ["backbone.layers.0.blocks.0.attn.qkv.weight", "backbone.norm3.weight", "auxiliary_head.convs.0.bn.weight"]
    names += ["decode_head.psp_modules.3.1.conv.weight", "decode_head.fpn_bottleneck.bn.running_var"]
    assert [n for n in names if n not in state] == []


def refused(model, state, *words, **options):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, state, **options)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_what_does_not_fit_is_refused_whole():
    state = to_official(small("upernet"))
    model = small("upernet", seed=1)
    other = small("upernet", seed=2, num_classes=7)
    refused(other, state, "decode_head.conv_seg.weight: (5, 8, 1, 1) in the file, (7, 8, 1, 1)", "new_head=True")
    report = load_checkpoint(other, state, new_head=True)
    assert sorted(report.fresh) == sorted(
        f"{h}_head.conv_seg.{w}" for h in ("decode", "auxiliary") for w in ("weight", "bias")
    )
    assert torch.equal(other.decode_head.bottleneck.conv.weight, state["decode_head.bottleneck.conv.weight"])
    refused(model, {k: v for k, v in state.items() if not k.startswith("auxiliary")}, "missing", "auxiliary=False")
    refused(model, state | {"decode_head.extra.weight": torch.zeros(1)}, "1 unexpected: decode_head.extra.weight")
    refused(model, {k: v for k, v in state.items() if "decode_head.fpn_convs.1" not in k}, "5 missing")
    bad = {k: v for k, v in state.items() if k != "backbone.patch_embed1.proj.weight"}
    assert len(bad) == len(state) - 1
    refused(model, bad, "'backbone.'", "patch_embed1.proj.weight")
    refused(model, {k: v for k, v in state.items() if k.startswith("backbone.")}, "model.pyramid.backbone")
    refused(model, {k: v for k, v in state.items() if not k.startswith("backbone.")}, "heads alone")
    refused(small("segformer"), state, "does not fit")
    report = load_checkpoint(small("upernet", auxiliary=False), state)
    assert report.unused and all(k.startswith("auxiliary_head.") for k in report.unused)
    report = load_checkpoint(model, bad, strict=False)
    assert report.missing == ["backbone.patch_embed1.proj.weight"]
    with pytest.raises(TypeError, match="not for Linear"):
        load_checkpoint(nn.Linear(2, 2), state)


def test_a_classification_checkpoint_goes_into_the_backbone(tmp_path):
    torch.manual_seed(5)
    classifier = vertebra.create_model("pvt_v2_b0", in_chans=2, **PVT)
    save_checkpoint(classifier, tmp_path / "c.safetensors")
    model = small("segformer", checkpoint=tmp_path / "c.safetensors")
    state = classifier.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.pyramid.backbone.state_dict().items() if "running" not in k
               and not k.endswith("norm.bias"))  # fmt: skip
    assert any(k.startswith("head") for k in model.load_report.unused)


def test_a_segmenter_exports_with_any_batch_and_size():
    net = small("pspnet")  # pools, resizes and joins as UPerNet does, and is exported in half the time
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(net, (image(72, 104),), dynamic_shapes=(sizes,), strict=False).module()
    for x in (image(65, 90, batch=3), image(96, 64, batch=1)):
        got, want = program(x), net(x)  # with gradients patches are a product: other sums
        assert got.shape == want.shape and (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_logits_of_few_channels_do_not_begin_near_zero():
    """They never left the background again on volumes with a small part to find: the hippocampus, Dice 0."""
    torch.manual_seed(0)
    net = segmentation("pvt_v2_b0", "unet", 3, ndim=3, in_chans=1, head_options={"channels": 8, "most": 16}, **PVT)
    with torch.no_grad():
        logits = net.train()(torch.randn(1, 1, 40, 32, 32))
    assert (logits.std(dim=(0, 2, 3, 4)) > 0.1).all()  # 0.02 with weights of deviation 0.01
