"""Object detectors on any backbone: RetinaNet, FCOS, Faster and Mask R-CNN with torchvision's heads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import MultiScaleRoIAlign

from ..checkpoint import load_checkpoint, read_checkpoint
from ..registry import create_model, model_info
from .necks import FPN, Anchors
from .pyramid import OnPyramid, Pyramid

Images = Tensor | Sequence[Tensor]
_PARTS = ("bbox_head.", "rpn_head.", "roi_head.", "net.head.", "net.rpn.")  # only files of whole detectors have them
SLACK = 0.01  # pixels that a box may reach over the image's edge: what rounding to two decimals does


@dataclass(frozen=True)
class OneStage:
    """What can be chosen of RetinaNet and FCOS; the defaults are the papers'.

    `width` channels of the neck and `convs` convolutions of the heads; `top` where the two coarsest levels begin
    ("input": the backbone's last map, "output": the neck's last output); anchors of `anchor_scale` strides in
    `octaves` sizes at the aspect `ratios` (RetinaNet); detections with a score above `score_thresh`, `candidates` of
    each level before suppression at `nms_thresh`, `detections` of an image in all.
    """

    width: int = 256
    convs: int = 4
    top: str = "input"
    anchor_scale: float = 4.0
    octaves: int = 3
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    candidates: int = 1000
    detections: int = 100


@dataclass(frozen=True)
class TwoStage:
    """What can be chosen of Faster and Mask R-CNN; the defaults are the papers'.

    `width` channels of the neck; `box_width` of the two linear layers of the box head; `mask_convs` channels of the
    mask head's convolutions, `mask_width` of its transposed one (Mask R-CNN); anchors of `anchor_scale` strides at the
    aspect `ratios`; `candidates` proposals of each level before suppression and `proposals` of an image after it, the
    same in training and evaluation but for `train_candidates`; `samples` of them to learn from; `anchor_samples`
    anchors; detections with a score above `score_thresh`, suppressed at `nms_thresh`, `detections` of an image in all.
    """

    width: int = 256
    box_width: int = 1024
    mask_convs: tuple[int, ...] = (256, 256, 256, 256)
    mask_width: int = 256
    anchor_scale: float = 8.0
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    candidates: int = 1000
    train_candidates: int = 2000
    proposals: int = 1000
    anchor_samples: int = 256
    samples: int = 512
    score_thresh: float = 0.05
    nms_thresh: float = 0.5
    detections: int = 100


# heads for small data and small machines: about a tenth of the work of the papers' (head_options={"light": True})
_LIGHT_ONE = OneStage(width=64, convs=1, candidates=200)
_LIGHT_TWO = TwoStage(
    width=64, box_width=128, mask_convs=(64, 64), mask_width=64, candidates=200, train_candidates=200, proposals=200,
    samples=64,
)  # fmt: skip


def _in_float(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook: a head's predictions in float32. torchvision would turn anchors into half precision to decode."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, Mapping):
        return {k: v.float() for k, v in output.items()}
    return type(output)(_in_float(module, inputs, v) for v in output)


class _Maps:
    """The backbone that torchvision's detectors see. Not a module: the detector owns the pyramid and the neck."""

    def __init__(self, pyramid: Pyramid, neck: FPN):
        self.pyramid, self.neck, self.out_channels = pyramid, neck, neck.out_channels

    def __call__(self, x: Tensor) -> dict[str, Tensor]:
        return self.neck(self.pyramid(x))


def _retinanet(maps: _Maps, classes: int, o: OneStage, **resizing: Any) -> nn.Module:
    anchors = Anchors(maps.neck.strides, o.anchor_scale, o.octaves, o.ratios)
    head = RetinaNetHead(o.width, anchors.num_anchors_per_location()[0], classes)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = branch.conv[: o.convs]
    head.register_forward_hook(_in_float)
    return RetinaNet(
        maps, classes, anchor_generator=anchors, head=head, score_thresh=o.score_thresh, nms_thresh=o.nms_thresh,
        detections_per_img=o.detections, topk_candidates=o.candidates, **resizing,
    )  # fmt: skip


def _fcos(maps: _Maps, classes: int, o: OneStage, **resizing: Any) -> nn.Module:
    head = FCOSHead(o.width, 1, classes, o.convs)
    head.register_forward_hook(_in_float)
    return FCOS(
        maps, classes, anchor_generator=Anchors(maps.neck.strides, 1.0, 1, (1.0,)), head=head,
        score_thresh=o.score_thresh, nms_thresh=o.nms_thresh, detections_per_img=o.detections,
        topk_candidates=o.candidates, **resizing,
    )  # fmt: skip


def _rcnn(maps: _Maps, classes: int, o: TwoStage, *, masks: bool, **resizing: Any) -> nn.Module:
    names = [str(k) for k, s in enumerate(maps.neck.strides) if s <= 32]  # coarser ones are for proposals alone
    parts: dict[str, Any] = {
        "box_roi_pool": MultiScaleRoIAlign(names, 7, 2),
        "box_head": TwoMLPHead(o.width * 49, o.box_width),
        "box_predictor": FastRCNNPredictor(o.box_width, classes + 1),
    }
    if masks:
        parts |= {
            "mask_roi_pool": MultiScaleRoIAlign(names, 14, 2),
            "mask_head": MaskRCNNHeads(o.width, o.mask_convs, 1),
            "mask_predictor": MaskRCNNPredictor(o.mask_convs[-1], o.mask_width, classes + 1),
        }
    net = (MaskRCNN if masks else FasterRCNN)(
        maps, rpn_anchor_generator=Anchors(maps.neck.strides, o.anchor_scale, 1, o.ratios),
        rpn_pre_nms_top_n_train=o.train_candidates, rpn_pre_nms_top_n_test=o.candidates,
        rpn_post_nms_top_n_train=o.proposals, rpn_post_nms_top_n_test=o.proposals,
        rpn_batch_size_per_image=o.anchor_samples, box_batch_size_per_image=o.samples,
        box_score_thresh=o.score_thresh, box_nms_thresh=o.nms_thresh, box_detections_per_img=o.detections,
        **parts, **resizing,
    )  # fmt: skip
    for part in (net.rpn.head, net.roi_heads.box_predictor, *([net.roi_heads.mask_predictor] if masks else [])):
        part.register_forward_hook(_in_float)
    return net


@dataclass(frozen=True)
class _Head:
    build: Callable[..., nn.Module]
    options: OneStage | TwoStage
    light: OneStage | TwoStage
    background: bool  # torchvision's R-CNNs keep label 0 for it
    last: tuple[str, ...]


_LAST_ONE = ("head.classification_head.cls_logits",)
_LAST_TWO = ("roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits")
HEADS: dict[str, _Head] = {
    "retinanet": _Head(_retinanet, OneStage(), _LIGHT_ONE, False, _LAST_ONE),
    "fcos": _Head(_fcos, OneStage(top="output"), replace(_LIGHT_ONE, top="output"), False, _LAST_ONE),
    "faster_rcnn": _Head(partial(_rcnn, masks=False), TwoStage(), _LIGHT_TWO, True, _LAST_TWO),
    "mask_rcnn": _Head(partial(_rcnn, masks=True), TwoStage(), _LIGHT_TWO, True, _LAST_TWO),
}


def _options(head: str, given: Mapping[str, Any] | None) -> OneStage | TwoStage:
    found = dict(given or {})
    light = found.pop("light", False)
    base = HEADS[head].light if light else HEADS[head].options
    known = {f.name for f in fields(base)}
    if wrong := sorted(set(found) - known):
        raise ValueError(f"{head} has no option {', '.join(wrong)}; it has: {', '.join(sorted(known | {'light'}))}")
    for name, value in found.items():
        default = getattr(base, name)
        if isinstance(default, tuple):
            kind = type(default[0])
            if isinstance(value, str) or not isinstance(value, Sequence) or not value:
                raise ValueError(f"{name} needs a list of numbers, got {value!r}")
            if any(isinstance(v, bool) or not isinstance(v, int | kind) or v <= 0 for v in value):
                raise ValueError(f"{name} needs positive numbers, got {value!r}")
            found[name] = tuple(value)
        elif isinstance(default, str):
            if value not in ("input", "output"):
                raise ValueError(f"{name} must be input or output, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int | type(default)) or value < 0:
            raise ValueError(f"{name} needs a number of at least 0, got {value!r}")
        elif isinstance(default, int) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    options = replace(base, **found)
    if head == "fcos" and options.width % 32:
        raise ValueError(f"fcos norms groups of 32 channels: width must be a multiple of 32, got {options.width}")
    return options


class Detector(OnPyramid):
    """A backbone's pyramid, a feature pyramid network and torchvision's head; see `detection`.

    `pyramid` (the backbone inside), `neck`, and `net`: torchvision's detector, which holds the heads and what resizes,
    normalises and batches the images.
    """

    prediction: ClassVar[str] = "detections"
    ndim: ClassVar[int] = 2
    own_heads: ClassVar[bool] = True  # of a published detector's checkpoint the backbone alone is taken
    load_report: Any = None

    def __init__(self, pyramid: Pyramid, neck: FPN, net: nn.Module, head: str, num_classes: int, in_chans: int):
        super().__init__()
        self.pyramid, self.neck, self.net = pyramid, neck, net
        self.head, self.num_classes, self.in_chans = head, num_classes, in_chans
        self.masks = head == "mask_rcnn"
        self.last_layers = tuple(f"net.{layer}" for layer in HEADS[head].last)  # those that know the classes
        self._shift = int(HEADS[head].background)

    @contextlib.contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        """torchvision's part as in training or not: by that it decides between losses and detections.

        Nothing in it but this decision depends on the mode; the backbone and the neck keep theirs.
        """
        before = self.net.training
        self.net.train(training)
        try:
            yield
        finally:
            self.net.train(before)

    def _images(self, images: Images) -> list[Tensor]:
        found = list(images)
        if not found:
            raise ValueError("no images given")
        for i, image in enumerate(found):
            if image.ndim != 3 or image.shape[0] != self.in_chans:
                raise ValueError(f"image {i} is {tuple(image.shape)}, needs ({self.in_chans}, H, W)")
            if not image.is_floating_point():
                raise ValueError(f"image {i} is {image.dtype}, needs floating point from 0 to 1")
            if 0 in image.shape:
                raise ValueError(f"image {i} is empty: {tuple(image.shape)}")
        return found

    def forward(self, images: Images) -> list[dict[str, Tensor]]:
        """Images, (B, C, H, W) or a list of (C, H, W), from 0 to 1 -> the detections of each, best first.

        Each is {"boxes" (N, 4): left, top, right, bottom in pixels of the image given, "labels" (N,), "scores" (N,)},
        with Mask R-CNN also "masks" (N, 1, H, W), probabilities.
        """
        with self._mode(training=False):
            found = self.net(self._images(images))
        return [{k: v - self._shift if k == "labels" else v for k, v in one.items()} for one in found]

    def forward_outputs(self, images: Images, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The losses, by torchvision's names, on images as `forward` takes them; their sum is what to minimise.

        A target is {"boxes" (N, 4) as detections have them, "labels" (N,) from 0, where there are crowds "iscrowd"
        (N,), for Mask R-CNN "masks" (N, H, W)}; boxes of crowds are left out, images without objects are fine.

        Raises ValueError naming the image and the box for a target that does not fit.
        """
        found = self._images(images)
        if len(targets) != len(found):
            raise ValueError(f"{len(found)} images need as many targets, got {len(targets)}")
        checked = [self._target(i, *pair) for i, pair in enumerate(zip(found, targets, strict=True))]
        with self._mode(training=True):
            return self.net(found, checked)

    def _target(self, i: int, image: Tensor, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The target of image `i` as torchvision takes it, checked."""
        height, width = image.shape[-2:]
        names = ("boxes", "labels", *(("masks",) if self.masks else ()))
        if lacking := [k for k in names if k not in target]:
            raise ValueError(f"the target of image {i} lacks {', '.join(lacking)}; it has {', '.join(target)}")
        boxes, labels = target["boxes"], target["labels"]
        count = len(boxes)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"boxes of image {i} are {tuple(boxes.shape)}, need (N, 4)")
        if labels.shape != (count,) or labels.is_floating_point():
            raise ValueError(
                f"labels of image {i} are {labels.dtype} {tuple(labels.shape)}, {count} boxes need integers ({count},)"
            )
        crowd = target.get("iscrowd")
        keep = torch.ones(count, dtype=torch.bool, device=boxes.device) if crowd is None else ~crowd.bool()
        if keep.shape != (count,):
            raise ValueError(f"iscrowd of image {i} is {tuple(keep.shape)}, {count} boxes need ({count},)")
        boxes = boxes.to(image.device, torch.float32)
        labels = labels.to(image.device, torch.int64)
        edge = boxes.new_tensor([width, height]) + SLACK
        # negated comparisons, so that nan is wrong too
        outside = ~((boxes[:, :2] >= -SLACK) & (boxes[:, 2:] <= edge)).all(1)
        empty = ~(boxes[:, 2:] > boxes[:, :2]).all(1)
        unknown = (labels < 0) | (labels >= self.num_classes)
        if count and bool((outside | empty | unknown).any()):  # one look at the device for all three
            k = int((outside | empty | unknown).nonzero()[0])
            shown = [round(v, 2) for v in boxes[k].tolist()]
            if unknown[k]:
                raise ValueError(f"image {i}, box {k}: label {int(labels[k])}, needs 0 to {self.num_classes - 1}")
            what = "has no area" if empty[k] else "lies outside"
            raise ValueError(f"image {i}, box {k}: {shown} {what}, needs x1 < x2, y1 < y2 inside {width} x {height}")
        limit = boxes.new_tensor([width, height, width, height])
        keep = keep.to(image.device)
        made = {"boxes": boxes.clamp(min=0).minimum(limit)[keep], "labels": labels[keep] + self._shift}
        if self.masks:
            masks = target["masks"]
            if masks.shape != (count, height, width):
                raise ValueError(
                    f"masks of image {i} are {tuple(masks.shape)}, {count} boxes need {(count, height, width)}"
                )
            made["masks"] = masks.to(image.device)[keep]
        return made


def _freeze_unread(pyramid: Pyramid, neck: FPN) -> None:
    """No gradients for what makes the levels that the neck leaves out (RetinaNet's and FCOS' stride 4).

    Data-parallel training waits for the gradient of every parameter that wants one.
    """
    unread = set(range(len(pyramid.strides))) - set(neck.kept)
    norms = pyramid.backbone.output_norms
    for level in unread:
        own = level - len(pyramid.finer)
        if own < 0:
            pyramid.finer[level].requires_grad_(False)
        elif norms is not None and own < len(pyramid.indices):
            norms[pyramid.indices[own]].requires_grad_(False)


def _statistic(given: Sequence[float] | None, published: Sequence[float], in_chans: int, name: str) -> list[float]:
    if given is not None:
        if len(given) != in_chans:
            raise ValueError(f"{name} has {len(given)} numbers, in_chans={in_chans} needs as many")
        return [float(v) for v in given]
    if len(published) == in_chans:
        return list(published)
    return [sum(published) / len(published)] * in_chans


def detection(
    name: str,
    head: str = "retinanet",
    num_classes: int = 80,
    *,
    in_chans: int = 3,
    img_size: int | tuple[int, ...] | None = None,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    drop_path_rate: float | None = None,
    pretrained: bool = False,
    checkpoint: Any = None,
    head_options: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Detector:
    """A detector for images on the backbone `name` (see `create_model`, which takes `overrides`).

    Args:
        head: retinanet (arXiv 1708.02002), fcos (1904.01355), faster_rcnn (1506.01497) or mask_rcnn (1703.06870), all
            on a feature pyramid network (1612.03144), with anchors and sizes as the backbones' papers set them.
        num_classes: categories, without background; labels run from 0 to num_classes - 1.
        img_size: what the backbone's tables are built for; any image works whatever this is.
        min_size, max_size: images are resized so that the shorter side is `min_size`, or less where the longer would
            exceed `max_size`; of several values of `min_size` training draws one per image, evaluation takes the last.
        mean, std: of each channel; those that the backbone was published with (averaged for other than three channels).
        pretrained, checkpoint: the backbone's weights, as in `create_model`; or a whole detector's, saved by
            `save_checkpoint`, or one of mmdetection, of which the backbone is taken (see ``model.load_report``).
        head_options: fields of `OneStage` or `TwoStage`; {"light": True} begins from small heads, for small data.

    Raises ValueError for an unknown name, head or option, or a backbone without a dense version.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")
    sides = [min_size] if isinstance(min_size, int) else list(min_size)
    if not sides or any(not isinstance(s, int) or s < 1 for s in (*sides, max_size)):
        raise ValueError(f"min_size and max_size must be whole numbers of at least 1, got {min_size!r}, {max_size!r}")
    options = _options(head, head_options)
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    whole = state is not None and any(part in key for key in state for part in _PARTS)
    backbone = create_model(
        name, ndim=2, in_chans=in_chans, img_size=img_size, drop_path_rate=drop_path_rate, features_only=True,
        pretrained=pretrained, checkpoint=None if whole else state, **overrides,
    )  # fmt: skip
    inputs = model_info(name).inputs
    resizing = {
        "min_size": tuple(sides),
        "max_size": max_size,
        "image_mean": _statistic(mean, inputs.mean, in_chans, "mean"),
        "image_std": _statistic(std, inputs.std, in_chans, "std"),
    }
    pyramid = Pyramid(backbone, finer=False)
    first, last, top = (8, 128, options.top) if isinstance(options, OneStage) else (4, 64, "pool")
    neck = FPN(pyramid.channels, pyramid.strides, options.width, first, last, top)
    _freeze_unread(pyramid, neck)
    resizing["size_divisible"] = max(32, *pyramid.strides)
    net = HEADS[head].build(_Maps(pyramid, neck), num_classes, options, **resizing)
    model = Detector(pyramid, neck, net, head, num_classes, in_chans)
    model.load_report = load_checkpoint(model, state) if whole else backbone.load_report
    return model
