"""Synthetic samples of dense prediction: bright squares on noise, as class maps or as objects."""

from __future__ import annotations

import numpy as np
import torch

from vertebra.data import Source
from vertebra.data.source import Split

SEGMENTER = {
    "model": "pvt_v2_b0",
    "overrides": {"dims": [16, 16, 32, 32], "heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1]},
    "data": "squares",
    "head": "semantic_fpn",
    "head_options": {"channels": 32, "neck_channels": 32},
    "img_size": 64,
    "batch_size": 4,
    "epochs": 2,
    "lr": 2e-3,
    "augment": "light",
    "threads": 1,
    "accelerator": "cpu",
}
DETECTOR = SEGMENTER | {"head": "retinanet", "head_options": {"light": True, "anchor_scale": 4.0}, "lr": 1e-3}


def squares(i: int, side: int = 64, count: int = 2) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], list[int]]:
    """Image (3, side, side) uint8, class map with 0 for the ground, boxes xyxy and their classes 0 (red) or 1 (green).

    The first square is left of the middle, the second right: none overlap.
    """
    draw = np.random.default_rng(i)
    image = draw.integers(0, 60, (3, side, side), np.uint8)
    classes, boxes, labels = np.zeros((side, side), np.uint8), [], []
    for place in range(count):
        size = int(draw.integers(side // 4, side // 2 - 4))
        left = place * side // 2 + int(draw.integers(0, side // 2 - size))
        top, label = int(draw.integers(0, side - size)), int(draw.integers(2))
        image[label, top : top + size, left : left + size] += 150
        classes[top : top + size, left : left + size] = label + 1
        boxes.append([left, top, left + size, top + size])
        labels.append(label)
    return torch.from_numpy(image), torch.from_numpy(classes), boxes, labels


def objects(i: int, masks: bool = False, side: int = 64, count: int = 2) -> dict[str, torch.Tensor]:
    _, _, boxes, labels = squares(i, side, count)
    box = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    target = {
        "boxes": box,
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(count, dtype=torch.bool),
        "area": (box[:, 2:] - box[:, :2]).prod(1),
    }
    if masks:
        target["masks"] = torch.zeros(count, side, side, dtype=torch.uint8)
        for k, (x1, y1, x2, y2) in enumerate(boxes):
            target["masks"][k, y1:y2, x1:x2] = 1
    return target


def dense_source(task: str, masks: bool = False, sizes: dict[str, int] | None = None, side: int = 64) -> Source:
    splits, start = {}, 0
    for key, n in (sizes or {"train": 8, "val": 3, "test": 3}).items():
        index = np.arange(start, start + n)
        start += n
        target = (lambda i: squares(i, side)[1]) if task == "segmentation" else (lambda i: objects(i, masks, side))
        splits[key] = Split(
            [f"{i}.png" for i in index], np.zeros(n, np.int64), lambda i: squares(i, side)[0], index, target
        )
    names = ("ground", "red", "green") if task == "segmentation" else ("red", "green")
    more = {"masks": masks} if task == "detection" else {"ignore": 255}
    return Source("squares", task, names, 3, splits, task=task, **more)
