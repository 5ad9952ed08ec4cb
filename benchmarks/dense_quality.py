"""Masks of a Mask R-CNN run as one picture: intersection over union of the foreground, and F1 of the objects.

Beside COCO's averages over thresholds, these are the figures that segmentation by thresholds and connected components
is judged by, so that a run can be compared with it. Objects count from the score on that gives the best F1 on the
run's validation images; a found object is right if its mask overlaps by more than half with one that no surer one took.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from vertebra.data import open_source
from vertebra.data.loader import Samples
from vertebra.train import Run
from vertebra.train.build import make_model, make_transforms
from vertebra.train.use import load_best

SCORES = [round(0.05 * k, 2) for k in range(1, 20)]


def matched(found: Tensor, truth: Tensor, least: float = 0.5) -> int:
    """Of masks (N, H, W), surest first, and (M, H, W), both bool: how many are right."""
    if not len(found) or not len(truth):
        return 0
    a, b = found.flatten(1).float(), truth.flatten(1).float()
    shared = a @ b.T
    iou = shared / (a.sum(1)[:, None] + b.sum(1) - shared).clamp(min=1)
    right = 0
    for row in iou:
        best = int(row.argmax())
        if row[best] > least:
            right += 1
            iou[:, best] = 0
    return right


@torch.inference_mode()
def counts(run: Run, model: torch.nn.Module, split) -> Tensor:
    """(len(SCORES), 5): cells shared and in either, objects right, found and true, over the images of a split."""
    total = torch.zeros(len(SCORES), 5, dtype=torch.float64)
    samples = Samples(split, make_transforms(run.config)[1], target=lambda target: target)
    for i in range(len(split)):
        image, target, _ = samples[0, i]
        truth, found = target["masks"].bool(), model([image])[0]
        masks, there = found["masks"][:, 0] > 0.5, truth.any(0)
        for k, score in enumerate(SCORES):
            mine = masks[found["scores"] >= score]
            said = mine.any(0)
            cells = int((said & there).sum()), int((said | there).sum())
            total[k] += torch.tensor([*cells, matched(mine, truth), len(mine), len(truth)])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="folders of Mask R-CNN runs")
    torch.set_num_threads(1)
    for folder in parser.parse_args().runs:
        run = Run.open(folder)
        source = open_source(run.config.data, run.config.limit, **run.config.data_options)
        model = load_best(run, make_model(run.config, run.outputs)).eval()
        val, test = counts(run, model, source.splits["val"]), counts(run, model, source.splits["test"])
        best = int((2 * val[:, 2] / (val[:, 3] + val[:, 4])).argmax())
        shared, either, right, found, true = test[best].tolist()
        f1 = 2 * right / (found + true)
        print(
            f"{folder}: from score {SCORES[best]}: foreground IoU {shared / either:.3f}, F1 {f1:.3f}, "
            f"precision {right / max(found, 1):.3f}, recall {right / true:.3f}"
        )


if __name__ == "__main__":
    main()
