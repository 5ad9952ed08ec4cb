"""What a run says of samples, as text: predictions as they come, and the table of a test's samples."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from .run import Run

if TYPE_CHECKING:
    from .use import Prediction

SIDES = ("left", "top", "right", "bottom")  # of a box, as columns
YES = 0.5  # the probability from which one of several labels is taken to be there


def as_text(results: Iterable[Prediction], run: Run, format: str, top: int) -> Iterator[str]:
    """Pieces of a table (for people), of a JSON list or of a .csv file, one for each prediction as it comes.

    The .csv file has the columns image, class_1, probability_1, ... class_top, probability_top, error; of a forecast
    image, variable, step_1, ... and error, a line for each variable; of segmentation image, each class's share of the
    cells and error; of detection image, class, score, left, top, right, bottom, error, a line for each object, and one
    that ends after the image for an image with none.
    """
    if format == "json":
        yield "["
        for i, result in enumerate(results):
            yield (",\n " if i else "\n ") + json.dumps(result.as_dict())
        yield "\n]\n"
    elif format == "csv":
        yield from _csv(results, run, top)
    else:
        for result in results:
            if result.error is None:
                yield f"{printable(result.image)}  {printable(_said(result, top))}\n"


def _said(result: Prediction, top: int) -> str:
    if result.shares is not None:
        most = sorted(result.shares.items(), key=lambda pair: -pair[1])[:top]
        return ", ".join(f"{name} {share:.1%}" for name, share in most if share)
    if result.objects is not None:
        counts = Counter(found["class"] for found in result.objects)  # best first, as the objects are
        return ", ".join(f"{name} {count}" for name, count in counts.items()) or "nothing"
    if result.forecast is None:
        return ", ".join(f"{name} {p:.3f}" for name, p in result.top)
    return "; ".join(f"{name} " + " ".join(f"{v:.4g}" for v in values) for name, values in result.forecast.items())


def printable(text: str) -> str:
    """Names from elsewhere move no cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _csv(results: Iterable[Prediction], run: Run, top: int) -> Iterator[str]:
    task, ahead = run.config.task, run.config.task == "forecast"
    count = run.outputs if ahead else min(top, len(run.classes))
    if ahead:
        columns = ["image", "variable", *(f"step_{i + 1}" for i in range(count)), "error"]
    elif task == "segmentation":
        columns = ["image", *(f"share {name}" for name in run.classes), "error"]
    elif task == "detection":
        columns = ["image", "class", "score", *SIDES, "error"]
    else:
        columns = ["image", *(f"{what}_{i + 1}" for i in range(count) for what in ("class", "probability")), "error"]
    yield _line(columns)
    for result in results:
        if result.error is not None:
            yield _line([result.image, *[""] * (len(columns) - 2), result.error])
        elif result.forecast is not None:
            for name, values in result.forecast.items():
                yield _line([result.image, name, *values, ""])
        elif result.shares is not None:
            yield _line([result.image, *result.shares.values(), ""])
        elif result.objects is not None:
            for found in result.objects or ({"class": "", "score": "", "box": [""] * 4},):
                yield _line([result.image, found["class"], found["score"], *found["box"], ""])
        else:
            yield _line([result.image, *(part for pair in result.top for part in pair), ""])


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


class Table:
    """Writes name, target and prediction of each sample of a test to a .csv `file`, batch by batch.

    single: name, target, prediction, probability; multi: the same with the classes that are there joined by "|", and
    the probability of each class in a column of its own; forecast: name, variable, target_1 ..., prediction_1 ...;
    segmentation: name, loss, accuracy, miou and each class's IoU, empty where the sample has no cell of the class, with
    cells of the target class `ignore` left out; detection: name, what (target or prediction), class, score and sides of
    each object.
    """

    def __init__(
        self, file: BinaryIO, task: str, classes: tuple[str, ...], names: Sequence[str], ignore: int = -1
    ) -> None:
        self.file, self.task, self.classes, self.names, self.ignore = file, task, classes, names, ignore
        self.begun = False
        self.write: dict[str, Callable[[str, Any, Any], list[list[Any]]]] = {
            "single": self._single,
            "multi": self._multi,
            "forecast": self._forecast,
            "segmentation": self._segmentation,
            "detection": self._detection,
        }

    def __call__(self, positions: Tensor, targets: Any, predictions: Any) -> None:
        """Positions (B,), and targets and predictions as tensors (B, ...) or as lists."""
        if isinstance(targets, Tensor) and isinstance(predictions, Tensor):
            targets, predictions = targets.cpu(), predictions.float().cpu()
        if not self.begun:
            self._say(self._columns(predictions))
            self.begun = True
        for position, target, prediction in zip(positions.tolist(), targets, predictions, strict=True):
            for cells in self.write[self.task](self.names[position], target, prediction):
                self._say(cells)

    def _say(self, cells: Sequence[Any]) -> None:
        self.file.write(_line(cells).encode("utf-8", "surrogateescape"))

    def _columns(self, predictions: Any) -> list[str]:
        if self.task == "segmentation":
            return ["name", "loss", "accuracy", "miou", *(f"iou {name}" for name in self.classes)]
        if self.task == "detection":
            return ["name", "what", "class", "score", *SIDES]
        if self.task == "single":
            return ["name", "target", "prediction", "probability"]
        if self.task == "multi":
            return ["name", "target", "prediction", *(f"probability {name}" for name in self.classes)]
        steps = range(1, predictions.shape[-1] + 1)
        return ["name", "variable", *(f"{what}_{i}" for what in ("target", "prediction") for i in steps)]

    def _single(self, name: str, target: Tensor, prediction: Tensor) -> list[list[Any]]:
        probability, guess = prediction.softmax(-1).max(-1)
        return [[name, self.classes[int(target)], self.classes[int(guess)], float(probability)]]

    def _multi(self, name: str, target: Tensor, prediction: Tensor) -> list[list[Any]]:
        chances = prediction.sigmoid().tolist()
        there, seen = target.tolist(), [p > YES for p in chances]
        joined = ["|".join(c for c, yes in zip(self.classes, marks, strict=True) if yes) for marks in (there, seen)]
        return [[name, *joined, *chances]]

    def _forecast(self, name: str, target: Tensor, prediction: Tensor) -> list[list[Any]]:
        rows = zip(self.classes, target.tolist(), prediction.tolist(), strict=True)
        return [[name, variable, *truth, *ahead] for variable, truth, ahead in rows]

    def _segmentation(self, name: str, target: Tensor, prediction: Tensor) -> list[list[Any]]:
        from .dense import SegmentationTask

        task = SegmentationTask(self.ignore)
        row = task.rows([prediction], [target]).cpu()
        scores = task.judge(torch.cat([torch.zeros_like(row[:, :1]), row], 1), self.classes)
        whole = [scores.metrics[key] for key in ("loss", "accuracy", "miou")]
        each = [figures["iou"] for figures in scores.classes.values()]
        return [[name, *("" if math.isnan(value) else value for value in (*whole, *each))]]

    def _detection(self, name: str, target: Mapping[str, Tensor], prediction: Mapping[str, Tensor]) -> list[list[Any]]:
        rows = []
        for what, found in (("target", target), ("prediction", prediction)):
            scores = found["scores"].tolist() if what == "prediction" else [""] * len(found["labels"])
            for label, score, box in zip(found["labels"].tolist(), scores, found["boxes"].tolist(), strict=True):
                rows.append([name, what, self.classes[label], score, *box])
        return rows
