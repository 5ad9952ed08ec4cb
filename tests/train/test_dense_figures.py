"""Figures and losses of segmentation and detection against loops in numpy, torchmetrics and hand formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from vertebra.data import DataError
from vertebra.train.dense import DetectionTask, SegmentationTask
from vertebra.train.dense_losses import DetectionLoss, SegmentationLoss
from vertebra.train.task import TASKS

NAMES = ("a", "b", "c", "d")


def maps(n=5, classes=4, sides=(9, 7), seed=0):
    """Logits and targets with ignored cells; class 3 is nowhere, neither true nor said, class 2 only said."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, *sides, generator=draw)
    logits[:, 3] = -9.0
    target = torch.randint(2, (n, *sides), generator=draw)
    target[torch.rand(n, *sides, generator=draw) < 0.2] = 255
    return logits, target


def metered(task, batches, names=NAMES):
    meter = task.meter(names, "cpu")
    for positions, target, prediction in batches:
        meter.update(torch.tensor(positions), target, prediction)
    return meter.compute()


def test_figures_of_cells_are_those_of_a_loop_and_of_torchmetrics():
    logits, target = maps()
    scores = metered(TASKS["segmentation"], [(range(5), target, logits)])
    guess, truth = logits.argmax(1).numpy(), target.numpy()
    hit, said, true = np.zeros(4), np.zeros(4), np.zeros(4)
    for g, t in zip(guess.ravel(), truth.ravel()):
        if t != 255:
            hit[t] += g == t
            said[g] += 1
            true[t] += 1
    assert true[2] == 0 and said[2] > 0 and said[3] == 0
    iou = [hit[c] / (said[c] + true[c] - hit[c]) for c in range(3)]
    dice = [2 * hit[c] / (said[c] + true[c]) for c in range(3)]
    losses = [F.cross_entropy(one[None], t[None], ignore_index=255).item() for one, t in zip(logits, target)]
    wanted = {"loss": np.mean(losses), "miou": np.mean(iou), "dice": np.mean(dice), "accuracy": hit.sum() / true.sum()}
    assert scores.metrics == pytest.approx(wanted, rel=1e-6) and scores.score == scores.metrics["miou"]
    theirs = MulticlassJaccardIndex(4, ignore_index=255)(logits, target)
    assert scores.metrics["miou"] == pytest.approx(float(theirs), rel=1e-6)
    assert scores.classes["b"] == pytest.approx(
        {"pixels": true[1], "iou": iou[1], "dice": dice[1], "recall": hit[1] / true[1]}
    )
    assert np.isnan(scores.classes["d"]["iou"]) and np.isnan(scores.classes["c"]["recall"])
    assert scores.classes["c"]["iou"] == 0


def test_uneven_batches_in_any_order_give_the_figures_of_one_batch():
    logits, target = maps()
    whole = metered(TASKS["segmentation"], [(range(5), target, logits)])
    parts = [
        ([4], target[4:], logits[4:]),
        ([0, 1, 2], list(target[:3]), list(logits[:3])),
        ([3], target[3:4], logits[3:4]),
    ]
    others = metered(TASKS["segmentation"], parts)
    assert others.metrics == whole.metrics and torch.equal(others.rows, whole.rows)
    assert metered(TASKS["segmentation"], []) is None


def test_ignored_cells_count_nowhere():
    logits, target = maps()
    task = SegmentationTask(ignore=255)
    other = logits.clone()
    other.movedim(1, -1)[target == 255] = torch.tensor([0.0, 0.0, 9.0, 0.0])
    assert torch.equal(task.rows(other, target), task.rows(logits, target))
    nothing = torch.full_like(target, 255)
    nothing[0] = target[0]
    scores = metered(task, [(range(5), nothing, logits)])
    alone = metered(task, [([0], target[:1], logits[:1])])
    assert scores.metrics == alone.metrics
    with pytest.raises(DataError, match=r"class 255, there are 4 \(ignored: 9\)"):
        SegmentationTask(ignore=9).rows(logits, target)


@pytest.mark.parametrize("sides", [(11,), (6, 8), (4, 5, 3)])
def test_logits_are_brought_to_the_size_of_their_target(sides):
    task, mode = TASKS["segmentation"], {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    logits = torch.randn(2, 4, *sides, generator=torch.Generator().manual_seed(1))
    large = [2 * side + 1 for side in sides]
    target = torch.randint(4, (2, *large), generator=torch.Generator().manual_seed(2))
    larger = F.interpolate(logits, large, mode=mode, align_corners=False)
    assert torch.equal(task.rows(logits, target), task.rows(larger, target))


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_loss_of_cells_by_hand():
    logits, target = maps()
    one = SegmentationLoss()({"logits": logits}, target)
    each = torch.stack([F.cross_entropy(x[None], t[None], ignore_index=255) for x, t in zip(logits, target)])
    assert torch.allclose(one, each.mean())
    parts = [
        SegmentationLoss()({"logits": logits[part]}, target[part]) * len(logits[part])
        for part in (slice(2), slice(2, 5))
    ]
    assert torch.allclose(sum(parts) / 5, one)
    both = SegmentationLoss()({"logits": logits, "auxiliary": logits.flip(0)}, target)
    assert torch.allclose(both, one + 0.4 * SegmentationLoss()({"logits": logits.flip(0)}, target))
    there = target != 255
    p = logits.softmax(1).gather(1, target.where(there, 0)[:, None])[:, 0]
    focal = (-((1 - p) ** 2) * p.log() * there).flatten(1).sum(1) / there.flatten(1).sum(1)
    assert torch.allclose(SegmentationLoss(gamma=2.0)({"logits": logits}, target), focal.mean(), atol=1e-6)
    weights = [1.0, 3.0, 0.0, 0.0]
    weighed = F.cross_entropy(logits, target, torch.tensor(weights), ignore_index=255, reduction="none")
    weighed = (weighed.flatten(1).sum(1) / there.flatten(1).sum(1)).mean()
    assert torch.allclose(SegmentationLoss(class_weights=weights)({"logits": logits}, target), weighed)
    smooth = torch.stack(
        [F.cross_entropy(x[None], t[None], ignore_index=255, label_smoothing=0.1) for x, t in zip(logits, target)]
    )
    assert torch.allclose(SegmentationLoss(label_smoothing=0.1)({"logits": logits}, target), smooth.mean())


def test_soft_dice_by_hand():
    logits, target = maps()
    values = []
    for x, t in zip(logits.softmax(1), target):
        found = []
        for c in t[t != 255].unique().tolist():
            p, y = x[c][t != 255], (t[t != 255] == c).float()
            found.append(1 - 2 * (p * y).sum() / (p.sum() + y.sum()))
        values.append(torch.stack(found).mean())
    loss = SegmentationLoss(cross_entropy=0, dice=1.0)
    assert torch.allclose(loss({"logits": logits}, target), torch.stack(values).mean())
    perfect = F.one_hot(target.where(target != 255, 0), 4).movedim(-1, 1) * 99.0
    assert loss({"logits": perfect}, target) < 1e-6
    void = torch.full_like(target, 255)
    sole = logits.clone().requires_grad_()
    SegmentationLoss(dice=1.0)({"logits": sole}, void).backward()
    assert torch.equal(sole.grad, torch.zeros_like(sole))  # nothing to learn, and no NaN


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dice": -1}, "dice must be a number of at least 0"),
        ({"cross_entropy": 0}, "both 0"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"class_weights": [1, 1]}, "class_weights: needs 4"),
    ],
)
def test_wrong_options_of_the_loss(options, words):
    logits, target = maps()
    with pytest.raises(ValueError, match=words):
        SegmentationLoss(**options)({"logits": logits}, target)


def test_the_loss_of_objects_is_the_weighed_sum():
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert DetectionLoss()(losses, None) == 3 and DetectionLoss({"b": 0.5})(losses, None) == 2
    with pytest.raises(ValueError, match="no loss c; it has a, b"):
        DetectionLoss({"c": 1.0})(losses, None)


# --- objects ---------------------------------------------------------------------------------------------------------


def scene(n, seed, side=64, masks=True, classes=2):
    """Boxes on a grid, predicted a little beside, some missed and some with another class."""
    draw = torch.Generator().manual_seed(seed)
    left = 8.0 * (torch.arange(n) % 8)
    top = 8.0 * (torch.arange(n) // 8 % 8)
    boxes = torch.stack([left, top, left + 7, top + 7], 1)
    labels = torch.randint(classes, (n,), generator=draw)
    truth = {
        "boxes": boxes,
        "labels": labels,
        "iscrowd": torch.zeros(n, dtype=torch.bool),
        "area": torch.full((n,), 49.0),
    }
    kept = torch.rand(n, generator=draw) < 0.8
    moved = (boxes + torch.randint(-1, 2, (n, 4), generator=draw))[kept].clamp(0, side)
    others = torch.where(torch.rand(n, generator=draw) < 0.9, labels, 1 - labels)[kept]
    found = {"boxes": moved, "labels": others, "scores": torch.rand(int(kept.sum()), generator=draw)}
    for one, key in ((truth, "masks"), (found, "masks")) if masks else ():
        maps = torch.zeros(len(one["boxes"]), side, side)
        for i, (x1, y1, x2, y2) in enumerate(one["boxes"].long().tolist()):
            maps[i, y1:y2, x1:x2] = 1
        one[key] = maps.to(torch.uint8) if one is truth else maps[:, None] * 0.9
    return truth, found


def test_average_precision_is_that_of_torchmetrics_on_the_whole_split():
    scenes = [scene(n, seed) for seed, n in enumerate((5, 0, 12, 3))]
    truths, found = [list(part) for part in zip(*scenes)]
    truths[2]["iscrowd"][0] = True
    meter = MeanAveragePrecision(iou_type=("bbox", "segm"), class_metrics=True, backend="faster_coco_eval")
    flat = [one | {"masks": one["masks"][:, 0] > 0.5} for one in found]
    meter.update(flat, [one | {"masks": one["masks"].bool(), "iscrowd": one["iscrowd"].long()} for one in truths])
    theirs = meter.compute()
    names = ("x", "y", "never")
    batches = [
        ([3, 1], [truths[3], truths[1]], [found[3], found[1]]),
        ([0, 2], [truths[0], truths[2]], [found[0], found[2]]),
    ]
    scores = metered(DetectionTask(masks=True), batches, names)
    for ours, other in (("", "bbox_"), ("mask_", "segm_")):
        for key in ("map", "map_50", "map_75", "map_small"):
            assert scores.metrics[ours + key] == pytest.approx(float(theirs[other + key]), abs=1e-6), ours + key
        assert np.isnan(scores.metrics[ours + "map_large"])
        by_class = [scores.classes[name][ours + "map"] for name in ("x", "y")]
        assert by_class == pytest.approx(theirs[f"{other}map_per_class"].tolist(), abs=1e-6)
    assert 0.1 < scores.score < 0.9 and scores.score == scores.metrics["map"]
    assert scores.rows[:, 0].tolist() == [0, 1, 2, 3] and scores.rows[:, 1].tolist() == [5, 0, 12, 3]
    assert scores.classes["never"]["objects"] == 0 and np.isnan(scores.classes["never"]["map"])
    assert metered(DetectionTask(), [], names) is None


def test_more_objects_than_coco_looks_at_all_count():
    side = 120
    boxes = torch.tensor([[8.0 * x, 8.0 * y, 8.0 * x + 6, 8.0 * y + 6] for y in range(15) for x in range(10)])
    truth = {"boxes": boxes, "labels": torch.zeros(150, dtype=torch.long)}
    found = truth | {"scores": torch.linspace(1, 0.1, 150)}
    masks = torch.zeros(150, side, side, dtype=torch.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes.long().tolist()):
        masks[i, y1:y2, x1:x2] = 1
    scores = metered(
        DetectionTask(True), [([0], [truth | {"masks": masks}], [found | {"masks": masks[:, None].float()}])], ("a",)
    )
    for key in ("map", "map_50", "mask_map", "mask_map_75"):
        assert scores.metrics[key] == pytest.approx(1.0)


def test_a_split_without_objects_has_no_precision():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    scores = metered(DetectionTask(), [([0], [none], [none | {"scores": torch.zeros(0)}])], ("a",))
    assert np.isnan(scores.metrics["map"]) and scores.rows.tolist() == [[0.0, 0.0, 0.0]]


def test_better_works_without_a_loss_in_testing():
    task = TASKS["detection"]
    assert task.better({"val_map": 0.2}, {"val_map": 0.1}) and not task.better({"val_map": 0.1}, {"val_map": 0.1})
