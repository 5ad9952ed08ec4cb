"""Detectors: torchvision's own figures with the same weights, pixels, labels, learning, bad targets, checkpoints."""

from __future__ import annotations

import copy
import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

import vertebra
from vertebra.tasks.detection import HEADS, Detector
from vertebra.tasks.necks import FPN, Anchors

sys.path.append(str(Path(__file__).resolve().parents[1] / "parity"))
from figures import fill_value, full_arrays, load_table, make_input, official_shapes, places, relative_error

TINY = {"dims": (16, 32, 80, 128), "depths": (1, 1, 1, 1)}
LIGHT = {"light": True}
FEW = LIGHT | {"candidates": 30, "train_candidates": 30, "proposals": 30, "samples": 24, "anchor_samples": 64}


def tiny(head: str, num_classes: int = 2, **options) -> Detector:
    torch.manual_seed(0)
    given = {"min_size": 96, "max_size": 160, "head_options": LIGHT} | TINY | options
    return vertebra.detection("pvt_v2_b0", head, num_classes, **given)


def squares(device=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A grey image of 96 pixels with a red and a blue square, classes 0 and 1."""
    image = torch.full((3, 96, 96), 0.5)
    boxes, masks = [[8, 12, 44, 48], [52, 40, 88, 84]], torch.zeros(2, 96, 96, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[:, y1:y2, x1:x2] = torch.tensor([1.0, 0, 0] if k == 0 else [0, 0, 1.0])[:, None, None]
        masks[k, y1:y2, x1:x2] = 1
    return image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor([0, 1]), "masks": masks}


# --- torchvision's own detectors, with the same weights ---------------------------------------------------------------


def _theirs(head: str):
    """torchvision's detector on its ResNet-18 with 32 channels in the neck, three classes, and its default anchors."""
    torch.manual_seed(1)
    two = head == "mask_rcnn"
    layers = {f"layer{k}": str(k - 1) for k in ((1, 2, 3, 4) if two else (2, 3, 4))}
    dims = [64, 128, 256, 512] if two else [128, 256, 512]
    extra = {"mask_rcnn": LastLevelMaxPool(), "retinanet": LastLevelP6P7(512, 32), "fcos": LastLevelP6P7(32, 32)}[head]
    backbone = BackboneWithFPN(resnet18(), layers, dims, 32, extra)
    common = {"min_size": 128, "max_size": 200}
    if two:
        return MaskRCNN(
            backbone, box_head=TwoMLPHead(32 * 49, 64), box_predictor=FastRCNNPredictor(64, 4),
            mask_head=MaskRCNNHeads(32, (32,), 1), mask_predictor=MaskRCNNPredictor(32, 32, 4),
            rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=100, box_score_thresh=0.0, **common,
        )  # fmt: skip
    made = RetinaNetHead(32, 9, 3) if head == "retinanet" else FCOSHead(32, 1, 3, 4)
    for parameter in made.parameters():  # scores further apart than the usual beginning has them
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    net = RetinaNet if head == "retinanet" else FCOS
    return net(backbone, 3, head=made, score_thresh=0.005, detections_per_img=100, **common)


@pytest.mark.parametrize("head", ["retinanet", "fcos", "mask_rcnn"])
def test_equals_torchvision(head):
    theirs = _theirs(head)
    options = {"width": 32, "score_thresh": 0.005}
    if head == "mask_rcnn":
        options = {
            "width": 32,
            "mask_convs": (32,),
            "mask_width": 32,
            "proposals": 100,
            "score_thresh": 0.0,
            "box_width": 64,
        }
    ours = vertebra.detection("resnet18", head, 3, min_size=128, max_size=200, head_options=options)
    vertebra.load_checkpoint(ours.pyramid.backbone, theirs.backbone.body.state_dict())
    neck = theirs.backbone.fpn.state_dict()
    rename = {"extra_blocks.p6": "coarser.0", "extra_blocks.p7": "coarser.1"}
    for old, new in rename.items():
        neck = {k.replace(old, new): v for k, v in neck.items()}
    ours.neck.load_state_dict(neck)
    ours.net.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("backbone.")})
    place = lambda net: net.rpn if head == "mask_rcnn" else net  # noqa: E731
    place(ours.net).anchor_generator = place(theirs).anchor_generator

    torch.manual_seed(2)
    images = [torch.rand(3, 150, 121), torch.rand(3, 100, 128)]
    masks = torch.zeros(2, 150, 121, dtype=torch.uint8)
    masks[0, 20:80, 10:90], masks[1, 60:140, 60:100] = 1, 1
    boxes = torch.tensor([[10.0, 20, 90, 80], [60, 60, 100, 140]])
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [
        {"boxes": boxes, "labels": torch.tensor([2, 0]), "masks": masks},
        nothing | {"masks": torch.zeros(0, 100, 128, dtype=torch.uint8)},
    ]
    ours.eval()
    theirs.train().backbone.eval()
    shift = int(head == "mask_rcnn")
    shifted = [{**t, "labels": t["labels"] + shift} for t in targets]
    torch.manual_seed(3)  # both draw their samples
    expected = theirs(copy.deepcopy(images), shifted)
    torch.manual_seed(3)
    losses = ours.forward_outputs(images, targets)
    assert list(losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        wanted, found = theirs.eval()(images), ours(images)
    for a, b in zip(wanted, found, strict=True):
        assert len(a["boxes"]) == len(b["boxes"]) > 0
        # near-equal scores may change places: to each of theirs the nearest of ours, and the other way about
        rows = [torch.cat([d["boxes"], 100 * d["labels"][:, None] - by, 100 * d["scores"][:, None]], 1) for d, by in
                ((a, 100 * shift), (b, 0))]  # fmt: skip
        apart = torch.cdist(*rows, p=float("inf"))
        assert apart.amin(0).max() < 0.01 and apart.amin(1).max() < 0.01
        if shift:
            torch.testing.assert_close(b["masks"][apart.argmin(1)], a["masks"], rtol=1e-4, atol=1e-4)


# --- neck and anchors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", ["input", "output"])
def test_coarse_levels_of_half_precision(top):
    """On maps of one cell and on tall ones, where torch's bfloat16 convolution reads memory that is not its own."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *args: None)
    neck = FPN((16, 16, 16), (8, 16, 32), 32, 8, 128, top)
    maps = [torch.randn(2, 16, side, -(-side // 20)) for side in (160, 80, 40)]

    def outs_and_gradients():
        outs = neck(maps)
        loss = sum(v.float().square().mean() for v in outs.values())
        return [v.float() for v in (*outs.values(), *torch.autograd.grad(loss, list(neck.coarser.parameters())))]

    wanted = outs_and_gradients()
    mallopt(-6, 165)  # fills what is freed
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = outs_and_gradients()
    finally:
        mallopt(-6, 0)
    assert all(((a - b).norm() / b.norm()).item() < 0.03 for a, b in zip(found, wanted, strict=True))


def test_anchors_are_the_papers():
    strides = (8, 16, 32, 64, 128)
    anchors = Anchors(strides, 4.0, 3)
    maps = [torch.zeros(2, 1, -(-100 // s), -(-150 // s), dtype=torch.bfloat16) for s in strides]
    found = anchors(ImageList(torch.zeros(2, 3, 100, 150), [(100, 150), (90, 150)]), maps)
    assert len(found) == 2 and found[0].dtype == torch.float32
    expected = []
    for stride, grid in zip(strides, maps, strict=True):
        for y in range(grid.shape[2]):
            for x in range(grid.shape[3]):
                for ratio in (0.5, 1.0, 2.0):
                    for octave in range(3):
                        side = 4 * stride * 2 ** (octave / 3)
                        h, w = side * ratio**0.5, side / ratio**0.5
                        cx, cy = x * stride, y * stride
                        expected.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(found[1], torch.tensor(expected))


def test_finer_level_comes_from_the_finest_lateral():
    torch.manual_seed(0)
    neck = FPN((6, 8), (8, 16), out=4, first=4, last=32)
    maps = [torch.randn(1, 6, 5, 7), torch.randn(1, 8, 3, 4)]
    found = neck(maps)
    assert list(found) == ["0", "1", "2", "3"] and neck.strides == (4, 8, 16, 32)
    assert [tuple(v.shape[2:]) for v in found.values()] == [(10, 14), (5, 7), (3, 4), (2, 2)]
    fine, coarse = (block(x) for block, x in zip(neck.inner_blocks, maps, strict=True))
    near = lambda x, size: torch.nn.functional.interpolate(x, size=size, mode="nearest")  # noqa: E731
    merged = fine + near(coarse, (5, 7))
    torch.testing.assert_close(found["1"], neck.layer_blocks[1](merged))
    torch.testing.assert_close(found["0"], neck.layer_blocks[0](neck.finer[0](fine) + near(merged, (10, 14))))
    torch.testing.assert_close(found["3"], found["2"][..., ::2, ::2])


@pytest.mark.parametrize(
    "name, own, finer", [("lightvit_tiny", (8, 16, 32), 1), ("efficientvit_m0", (16, 32, 64), 2)], ids=["8", "16"]
)
def test_backbones_of_three_stages(name, own, finer):
    model = vertebra.detection(name, "faster_rcnn", 2, min_size=64, head_options=LIGHT).eval()
    assert model.pyramid.strides == own
    assert len(model.neck.finer) == finer
    assert model.neck.strides == (4, 8, 16, 32, 64)
    assert model.net.transform.size_divisible == max(32, own[-1])
    with torch.no_grad():
        maps = model.neck(model.pyramid(torch.rand(1, 3, 128, 64)))
    assert [tuple(v.shape[2:]) for v in maps.values()] == [(128 // s, 64 // s) for s in model.neck.strides]


@pytest.mark.parametrize(
    "name, head, published",
    [
        ("crossformer_small", "retinanet", 40.8),
        ("crossformer_base", "mask_rcnn", 71.5),
        ("pvt_v2_b0", "retinanet", 13.0),
        ("lightvit_tiny", "mask_rcnn", 28),
        ("swin_tiny_patch4_window7_224", "mask_rcnn", 48),
    ],
)
def test_parameters_are_the_papers(name, head, published):
    with torch.device("meta"):
        model = vertebra.detection(name, head, 80)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(published, rel=0.005)


# --- learning and detecting -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt() -> Detector:
    """A tiny Mask R-CNN that has seen the squares forty times."""
    model, (image, target) = tiny("mask_rcnn", head_options=FEW), squares()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        sum(model.forward_outputs([image], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def _found(model: Detector, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(IoU of the first detection of either class with the box of that class, these detections in order of class)."""
    with torch.no_grad():
        one = model([image])[0]
    first = [int((one["labels"] == k).nonzero()[0]) for k in (0, 1)]
    best = {k: v[first] for k, v in one.items()}
    scale = image.shape[-1] / 96
    return box_iou(best["boxes"], squares()[1]["boxes"] * scale).diagonal(), best


def test_learns_one_image(learnt):
    overlap, best = _found(learnt, squares()[0])
    assert (overlap > 0.6).all() and (best["scores"] > 0.5).all()
    truth = squares()[1]["masks"].bool()
    masks = best["masks"][:, 0] > 0.5
    assert best["masks"].shape == (2, 1, 96, 96)
    assert (((masks & truth).sum((1, 2)) / (masks | truth).sum((1, 2))) > 0.6).all()


def test_boxes_are_in_pixels_of_the_image_given(learnt):
    image = squares()[0]
    _, small = _found(learnt, image)
    twice = image.repeat_interleave(2, 1).repeat_interleave(2, 2)  # resized to min_size it is the same image
    overlap, large = _found(learnt, twice)
    torch.testing.assert_close(large["boxes"], 2 * small["boxes"], rtol=1e-4, atol=1e-3)
    assert large["masks"].shape == (2, 1, 192, 192) and (overlap > 0.6).all()


def test_half_precision_keeps_the_pixels(learnt):
    _, full = _found(learnt, squares()[0])
    with torch.autocast("cpu", torch.bfloat16):
        _, half = _found(learnt, squares()[0])
    assert half["boxes"].dtype == torch.float32
    assert (full["boxes"] - half["boxes"]).abs().max() < 1.5


def test_training_mode_changes_neither_detections_nor_losses(learnt):
    model = copy.deepcopy(learnt)
    image, target = squares()
    with torch.no_grad():
        before = model([image])[0]
        after = model.train()([image])[0]
        torch.testing.assert_close(after["boxes"], before["boxes"])
        assert model.net.training and model.net.roi_heads.training
        torch.manual_seed(0)
        training = model.forward_outputs([image], [target])
        torch.manual_seed(0)
        evaluating = model.eval().forward_outputs([image], [target])
    assert training.keys() == evaluating.keys() and not model.net.training
    for name in training:
        torch.testing.assert_close(training[name], evaluating[name])


def test_copy_is_independent(learnt):
    twin, image = copy.deepcopy(learnt), squares()[0]
    with torch.no_grad():
        before = learnt([image])[0]["scores"]
        for parameter in twin.pyramid.parameters():
            parameter.zero_()
        assert not torch.equal(twin([image])[0]["scores"], before)  # its heads read its own backbone
        torch.testing.assert_close(learnt([image])[0]["scores"], before)


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns(head):
    model = tiny(head, num_classes=1)
    image, target = squares()
    target = {**target, "labels": torch.zeros(2, dtype=torch.int64)}
    empty = {k: v[:0] for k, v in target.items()}
    losses = model.forward_outputs([image, image.flip(2)], [target, empty])
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    still = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == []
    model.zero_grad()
    losses = model.forward_outputs([image], [empty])
    assert all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        images = [torch.rand(3, 71, 93), torch.rand(3, 120, 65), torch.rand(3, 33, 40)]
        found = model.eval()(images)
    for one, x in zip(found, images, strict=True):
        size = torch.tensor([x.shape[2], x.shape[1]] * 2)
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= size + 1e-3).all()
        assert (one["labels"] == 0).all() and one["labels"].dtype == torch.int64
        assert ("masks" in one) == (head == "mask_rcnn")


def test_levels_that_nothing_reads_want_no_gradient():
    """Data-parallel training stops at a parameter without a gradient."""
    for name in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"):
            one = vertebra.detection(name, "retinanet", 2, head_options=LIGHT)
            two = vertebra.detection(name, "faster_rcnn", 2, head_options=LIGHT)
        frozen = [n for n, p in one.named_parameters() if not p.requires_grad]
        start = "pyramid.finer.0." if name.startswith("vit") else "pyramid.backbone.output_norms.0."
        assert frozen and all(n.startswith(start) for n in frozen)
        assert all(p.requires_grad for p in two.parameters())


def test_batch_or_list_is_the_same(learnt):
    x = torch.stack([squares()[0], squares()[0].flip(1)])
    with torch.no_grad():
        for a, b in zip(learnt(x), learnt(list(x)), strict=True):
            torch.testing.assert_close(a, b)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"boxes": torch.tensor([[8.0, 12, 44, 48], [52, 40, 97, 84]])}, r"image 1, box 1: .*97.* lies outside"),
        ({"boxes": torch.tensor([[-3.0, 12, 44, 48], [52, 40, 88, 84]])}, r"image 1, box 0: .* lies outside"),
        ({"boxes": torch.tensor([[8.0, 12, 8, 48], [52, 40, 88, 84]])}, r"image 1, box 0: .* has no area"),
        ({"boxes": torch.tensor([[8.0, 12, 44, 48], [52, 84, 88, 40]])}, r"image 1, box 1: .* has no area"),
        ({"boxes": torch.tensor([[8.0, 12, 44, float("nan")], [52, 40, 88, 84]])}, r"image 1, box 0: "),
        ({"boxes": torch.zeros(2, 5)}, r"boxes of image 1 are \(2, 5\)"),
        ({"labels": torch.tensor([0, 2])}, r"image 1, box 1: label 2, needs 0 to 1"),
        ({"labels": torch.tensor([-1, 0])}, r"image 1, box 0: label -1"),
        ({"labels": torch.tensor([0.0, 1.0])}, r"labels of image 1 are torch.float32"),
        ({"labels": torch.tensor([0])}, r"labels of image 1 are .*2 boxes"),
        ({"masks": torch.zeros(2, 96, 95)}, r"masks of image 1 are \(2, 96, 95\).*\(2, 96, 96\)"),
        ({"masks": torch.zeros(1, 96, 96)}, r"masks of image 1 are \(1, 96, 96\)"),
        ({"masks": None}, r"target of image 1 lacks masks"),
    ],
)
def test_bad_targets(learnt, change, message):
    image, target = squares()
    bad = {k: v for k, v in (target | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        learnt.forward_outputs([image, image], [target, bad])


def test_crowds_are_left_out(learnt):
    image, target = squares()
    alone = {k: v[:1] for k, v in target.items()}
    results = []
    for one in (alone, {**target, "iscrowd": torch.tensor([False, True])}):
        torch.manual_seed(0)
        results.append(learnt.forward_outputs([image], [one]))
    assert results[0] == results[1]


def test_bad_input(learnt):
    with pytest.raises(ValueError, match="uint8"):
        learnt([torch.zeros(3, 96, 96, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"image 0 is \(1, 96, 96\), needs \(3, H, W\)"):
        learnt(torch.zeros(1, 1, 96, 96))
    with pytest.raises(ValueError, match="no images"):
        learnt([])
    with pytest.raises(ValueError, match="2 images need as many targets, got 1"):
        learnt.forward_outputs([squares()[0]] * 2, [squares()[1]])
    for message, options in {
        "head must be one of": {"head": "yolo"},
        "num_classes": {"num_classes": 0},
        "has no option widht": {"head_options": {"widht": 3}},
        "multiple of 32": {"head": "fcos", "head_options": {"width": 48}},
        "ratios needs": {"head_options": {"ratios": []}},
        "mean has 1": {"mean": [0.5]},
        "min_size": {"min_size": 0},
        "no dense version": {"name": "cf_deit_small"},
        "exists at rank": {"name": "pathformer_etth1_96"},
    }.items():
        with pytest.raises(ValueError, match=message):
            vertebra.detection(**({"name": "pvt_v2_b0", "num_classes": 2} | options))


# --- training's questions and checkpoints -----------------------------------------------------------------------------


def test_groups_and_decay():
    from timm.models import group_parameters

    model = tiny("retinanet")
    backbone = model.pyramid.backbone
    names = model.no_weight_decay()
    assert names == {f"pyramid.backbone.{n}" for n in backbone.no_weight_decay()}
    inside = group_parameters(backbone, backbone.group_matcher())
    whole = group_parameters(model, model.group_matcher())
    assert {k: [n.removeprefix("pyramid.backbone.") for n in v] for k, v in whole.items() if k in inside} == inside
    last = whole[max(whole)]
    assert all(n.startswith(("neck.", "net.")) for n in last) and len(whole) == len(inside) + 1
    model.set_grad_checkpointing(True)
    assert all(stage.checkpointing for stage in backbone.stages)


def test_own_checkpoint(learnt, tmp_path):
    vertebra.save_checkpoint(learnt, tmp_path / "model.safetensors")
    fresh = tiny("mask_rcnn", head_options=FEW, checkpoint=tmp_path / "model.safetensors").eval()
    assert fresh.load_report.naming == "ours" and not fresh.load_report.missing
    _, a = _found(learnt, squares()[0])
    _, b = _found(fresh, squares()[0])
    torch.testing.assert_close(a, b)
    other = tiny("mask_rcnn", num_classes=5)
    with pytest.raises(vertebra.CheckpointError, match="box_predictor"):
        vertebra.load_checkpoint(other, tmp_path / "model.safetensors")
    report = vertebra.load_checkpoint(other, tmp_path / "model.safetensors", new_head=True)
    assert all("box_predictor" in n or "mask_fcn_logits" in n for n in report.fresh) and len(report.fresh) == 6
    torch.testing.assert_close(other.neck.state_dict(), learnt.neck.state_dict())


@pytest.mark.parametrize(
    "stem, name",
    [
        pytest.param("crossformer/crossformer_tiny_dense_224x320", "crossformer_tiny", marks=pytest.mark.parity_all),
        pytest.param("swin/swin_tiny_dense_256x192", "swin_tiny_patch4_window7_224", marks=pytest.mark.parity_all),
        ("lightvit/lightvit_tiny_dense_256x192", "lightvit_tiny"),
    ],
)
def test_backbone_of_a_published_detector(stem, name):
    """A checkpoint of mmdetection: its backbone gives the official maps, its heads are reported."""
    model = vertebra.detection(name, "mask_rcnn", 80, head_options=LIGHT).eval()
    backbone = model.pyramid.backbone
    shapes = official_shapes(backbone)
    state = {f"backbone.{k}": torch.from_numpy(fill_value(k, s)) for k, s in shapes.items()}
    heads = ["neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.weight", "roi_head.bbox_head.fc_cls.weight"]
    before = {k: v.clone() for k, v in model.neck.state_dict().items()}
    report = vertebra.load_checkpoint(model, {"state_dict": state | {k: torch.zeros(1) for k in heads}, "meta": {}})
    assert sorted(report.loaded) == sorted(state) and sorted(report.unused) == sorted(heads)
    assert any(n.startswith("neck.") for n in report.fresh)
    torch.testing.assert_close(model.neck.state_dict(), before)
    row = load_table()[stem]
    with torch.no_grad():
        maps = model.pyramid(torch.from_numpy(make_input(row["input"])))
    full = full_arrays(stem)
    for (output, figures), found in zip(row["outputs"].items(), maps, strict=True):
        ours = found.numpy()
        assert relative_error(ours.ravel()[places(ours.size)], figures["values"], figures["largest"]) <= 1e-5
        if full:
            assert relative_error(ours, full[output]) <= 1e-5
    with pytest.raises(vertebra.CheckpointError, match=r"under 'backbone.'"):
        vertebra.load_checkpoint(model, dict(list(state.items())[1:]))
