"""What a run of dense prediction is trained and judged for: a class for every cell, or objects in boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..data import DataError
from ..layers.space import channels_first, channels_last, resize
from .config import Config
from .task import TASKS, Meter, Scores, Task

HEADS = {"segmentation": "semantic_fpn", "detection": "retinanet"}  # where a configuration leaves the head open
MASK_HEAD = "mask_rcnn"
COCO_MOST = 100  # objects of an image that COCO's figures look at


class SegmentationTask(Task):
    """A class for every cell; rows: cross entropy, then for each class the cells hit, predicted and true.

    A cell whose target is `ignore` counts nowhere. Logits of another size than their target are interpolated to it.
    `testing` are the keyword arguments of `segment` (windows, flips, scales); empty: the model is called as it is.
    """

    name, loss, score = "segmentation", "segmentation", "miou"
    figures = ("miou", "dice", "accuracy", "loss")
    losses = ("segmentation",)
    dense = True

    def __init__(self, ignore: int = 255, testing: Mapping[str, Any] | None = None) -> None:
        self.ignore, self.testing = ignore, dict(testing or {})

    def predict(self, model: Any, images: Any) -> Any:
        """(B, C, *S), or a list of (C, *S) -> logits (B, classes, *S), or a list of (classes, *S)."""
        if self.testing:
            from ..tasks.inference import segment

            return [segment(model, image, **self.testing) for image in images]
        return model(images) if isinstance(images, Tensor) else [model(image[None])[0] for image in images]

    def rows(self, prediction: Any, target: Any) -> Tensor:
        return torch.stack([self._row(logits, truth) for logits, truth in zip(prediction, target, strict=True)])

    def _row(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Logits (classes, *S) and target (*S') of one sample -> (1 + 3 classes,) float64."""
        count, logits = len(logits), at_size(logits[None].float(), truth.shape)[0]
        there = truth != self.ignore
        wanted, scores = truth[there].long(), logits[:, there]
        if wanted.numel() and int(wanted.max()) >= count:
            raise DataError(f"a target holds class {int(wanted.max())}, there are {count} (ignored: {self.ignore})")
        guess = scores.argmax(0)
        loss = F.cross_entropy(scores.T, wanted) if len(wanted) else logits.new_zeros(())
        counts = [torch.bincount(each, minlength=count) for each in (wanted[guess == wanted], guess, wanted)]
        return torch.cat([loss.double()[None], *(each.double() for each in counts)])

    def judge(self, rows: Tensor, classes: tuple[str, ...]) -> Scores:
        hit, said, true = rows[:, 2:].sum(0).view(3, len(classes))
        iou, dice = hit / (said + true - hit), 2 * hit / (said + true)  # 0 / 0 where a class is nowhere: no figure
        metrics = {
            "loss": float(
                rows[rows[:, -len(classes) :].sum(1) > 0, 1].mean()
            ),  # one without a cell that counts has none
            "miou": float(iou.nanmean()),
            "dice": float(dice.nanmean()),
            "accuracy": float(hit.sum() / true.sum()),
        }
        found = {
            name: {"pixels": int(n), "iou": float(i), "dice": float(d), "recall": float(h / n) if n else torch.nan}
            for name, n, i, d, h in zip(classes, true, iou, dice, hit, strict=True)
        }
        return Scores(metrics, metrics["miou"], rows, None, found)

    def width(self, classes: int) -> int:
        return 2 + 3 * classes

    def answer(self, prediction: Tensor, classes: tuple[str, ...], top: int) -> Any:
        """The class of every cell, (*S) of uint8 or int64."""
        return prediction.argmax(0).to(torch.uint8 if len(classes) <= 256 else torch.int64).cpu()

    def target(self, labels: Any) -> Tensor:
        return torch.as_tensor(labels).long()

    def blank(self, classes: int, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.zeros(1, *shape[1:], dtype=torch.long)


def at_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, classes, *S) interpolated linearly to `size`, corners not aligned."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    return channels_first(resize(channels_last(logits), tuple(size)))


class DetectionTask(Task):
    """Objects of classes in boxes, with `masks` also their shapes; the figures are COCO's average precisions.

    The loss is of training only. Rows: objects in the truth, and found with any score.
    """

    name, loss, score = "detection", "detection", "map"
    figures = ("map", "map_50", "map_75", "mask_map", "mask_map_50", "mask_map_75")
    losses = ("detection",)
    dense = True

    def __init__(self, masks: bool = False, testing: Mapping[str, Any] | None = None) -> None:
        self.masks, self.testing = masks, dict(testing or {})

    def outputs(self, model: Any, images: Any, targets: Any) -> dict[str, Tensor]:
        """The model's losses. A crowd is no single object to be found: it is left out of training."""
        return model.forward_outputs(list(images), [_single(target) for target in targets])

    def predict(self, model: Any, images: Any) -> list[dict[str, Tensor]]:
        if self.testing:
            from ..tasks.inference import detect

            return [detect(model, image, **self.testing) for image in images]
        return model(list(images))

    def meter(self, classes: tuple[str, ...], device: Any) -> Meter:
        return AveragePrecision(classes, self.masks)

    def rows(self, prediction: Any, target: Any) -> Tensor:
        counts = [[len(truth["labels"]), len(found["labels"])] for found, truth in zip(prediction, target, strict=True)]
        return torch.tensor(counts, dtype=torch.float64)

    def judge(self, rows: Tensor, classes: tuple[str, ...]) -> Scores:
        raise NotImplementedError("average precision needs all boxes of a split: see meter")

    def width(self, classes: int) -> int:
        return 3

    def answer(self, prediction: Any, classes: tuple[str, ...], top: int) -> Any:
        """The boxes as they are; `top` is for classes of a whole image."""
        return {key: value.cpu() for key, value in prediction.items()}

    def target(self, labels: Any) -> Any:
        return labels

    def blank(self, classes: int, shape: tuple[int, ...] = ()) -> Any:
        """One box over all of a sample of `shape` (C, H, W)."""
        height, width = shape[-2:]
        box = torch.tensor([[0.0, 0.0, width, height]])
        target = {"boxes": box, "labels": torch.zeros(1, dtype=torch.long), "iscrowd": torch.zeros(1, dtype=torch.bool)}
        target["area"] = box[:, 2] * box[:, 3]
        return [target | ({"masks": torch.ones(1, height, width, dtype=torch.uint8)} if self.masks else {})]


def _single(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model learns from: the objects that are no crowds."""
    crowd = target.get("iscrowd")
    keep = {key: target[key] for key in ("boxes", "labels", "masks") if key in target}
    return keep if crowd is None or not bool(crowd.any()) else {key: value[~crowd] for key, value in keep.items()}


class AveragePrecision(Meter):
    """COCO's figures over a whole split, by torchmetrics and faster-coco-eval, the same whoever has which images.

    As COCO has it, the 100 best of an image count, or more where a model gives more (its `detections_per_img`). Masks
    are kept run-length encoded, predicted ones cut at 0.5. A figure that does not exist, as of a class without
    objects, is NaN.
    """

    STATES = (
        "detection_box", "detection_mask", "detection_scores", "detection_labels",
        "groundtruth_box", "groundtruth_mask", "groundtruth_labels", "groundtruth_crowds", "groundtruth_area",
    )  # fmt: skip

    def __init__(self, classes: tuple[str, ...], masks: bool) -> None:
        self.classes, self.types = classes, ("bbox", "segm") if masks else ("bbox",)
        self.metric, self.positions = self._metric(COCO_MOST), []  # type: ignore[var-annotated]

    def _metric(self, most: int) -> Any:
        from torchmetrics.detection import MeanAveragePrecision

        from .config import ConfigError

        try:
            metric = MeanAveragePrecision(
                iou_type=self.types,  # type: ignore[arg-type]
                max_detection_thresholds=[1, 10, most],
                extended_summary=True,
                backend="faster_coco_eval",
                sync_on_compute=False,  # gathered here: a process may have no image
            )
        except (ImportError, ModuleNotFoundError) as e:
            raise ConfigError("detection: its figures need faster-coco-eval (pip install 'vertebra[dense]')") from e
        metric.warn_on_many_detections = False  # `most` is as many as there are when it counts
        return metric

    def update(self, positions: Tensor, targets: Any, prediction: Any) -> None:
        found, wanted = [], []
        for one, truth in zip(prediction, targets, strict=True):
            found.append({key: one[key].float().cpu() for key in ("boxes", "scores")} | {"labels": one["labels"].cpu()})
            wanted.append({key: truth[key].cpu() for key in ("boxes", "labels", "iscrowd", "area") if key in truth})
            if "iscrowd" in wanted[-1]:
                wanted[-1]["iscrowd"] = wanted[-1]["iscrowd"].long()
            if "segm" in self.types:
                height, width = truth["masks"].shape[-2:]
                found[-1]["masks"] = (one["masks"].view(-1, height, width) > 0.5).cpu()
                wanted[-1]["masks"] = truth["masks"].bool().cpu()
        self.metric.update(found, wanted)
        self.positions += positions.tolist()

    def compute(self) -> Scores | None:
        states = {name: list(getattr(self.metric, name)) for name in self.STATES} | {"positions": self.positions}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, states)
            states = {name: [value for one in every for value in one[name]] for name in states}
        positions = states.pop("positions")
        if not positions:
            return None
        order = sorted(range(len(positions)), key=positions.__getitem__)
        counts = [[len(states[f"{part}_labels"][i]) for part in ("groundtruth", "detection")] for i in order]
        metric = self._metric(max(COCO_MOST, max(found for _, found in counts)))
        for name, values in states.items():  # one entry an image, none where there are no masks
            setattr(metric, name, [values[i] for i in order] if values else [])
        metric._update_count = 1  # or torchmetrics warns that nothing was given
        metrics, by_class = self._figures(metric.compute())
        rows = torch.tensor([[positions[i], *both] for i, both in zip(order, counts, strict=True)], dtype=torch.float64)
        objects = torch.cat(states["groundtruth_labels"]).long().cpu()
        number = torch.bincount(objects, minlength=len(self.classes)).tolist()
        classes = {name: {"objects": number[i]} | by_class[i] for i, name in enumerate(self.classes)}
        return Scores(metrics, metrics["map"], rows, None, classes)

    def _figures(self, found: Mapping[str, Any]) -> tuple[dict[str, float], list[dict[str, float]]]:
        """Of the whole split, and of each class."""
        metrics: dict[str, float] = {}
        each: list[dict[str, float]] = [{} for _ in self.classes]
        place = {int(number): i for i, number in enumerate(found["classes"].flatten())}
        for kind in self.types:
            before, after = ("mask_" if kind == "segm" else ""), (f"{kind}_" if len(self.types) > 1 else "")
            for key in ("map", "map_50", "map_75", "map_small", "map_medium", "map_large"):
                metrics[before + key] = _known(float(found[after + key]))
            # thresholds x recalls x classes x areas (all first) x most detections (most last)
            precision = found[f"{after}precision"][:, :, :, 0, -1]
            for number, figures in enumerate(each):
                mine = precision[:, :, place[number]] if number in place else precision.new_empty(1, 0)
                for key, part in (("map", mine), ("map_50", mine[0])):
                    part = part[part > -1]
                    figures[before + key] = float(part.double().mean()) if part.numel() else torch.nan
        return metrics, each


def _known(value: float) -> float:
    """COCO says -1 where there is no figure."""
    return torch.nan if value < 0 else value


DENSE: dict[str, Task] = {task.name: task for task in (SegmentationTask(), DetectionTask())}
TASKS.update(DENSE)  # build.py imports this module: whoever makes a task has them all


def make_dense_task(config: Config) -> Task:
    """The task of a resolved configuration of task segmentation or detection."""
    testing: dict[str, Any] = {"flip": True} if config.test_flip else {}
    if config.test_scales:
        testing["scales"] = config.test_scales
    if config.task == "detection":
        return DetectionTask(config.head == MASK_HEAD, testing)
    if config.window is not None:
        testing |= {"window": config.window, "stride": config.stride}
    return SegmentationTask(255 if config.ignore is None else config.ignore, testing)
