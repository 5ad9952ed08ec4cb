"""What a run is trained and judged for: one label, several labels, or a forecast; dense prediction is in dense.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_f1_score,
)


@dataclass(frozen=True)
class Scores:
    """A pass over a split.

    `metrics` are means over all samples, never over batches; `score` is the one that chooses the best epoch, larger is
    better. `rows` (N, K) float64 has what the task keeps of each sample, its position first, in order of position.
    """

    metrics: dict[str, float]
    score: float
    rows: Tensor
    confusion: Tensor | None = None  # (classes, classes) int64, true x predicted, for one label
    classes: dict[str, dict[str, float]] = field(default_factory=dict)  # figures of each class, by its name

    @property
    def loss(self) -> float:
        return self.metrics["loss"]

    @property
    def accuracy(self) -> float:
        """Of one label; KeyError for another task."""
        return self.metrics["accuracy"]


class Meter(ABC):
    """Collects what the batches of a split say, in any order; each process is given its share."""

    @abstractmethod
    def update(self, positions: Tensor, targets: Any, prediction: Any) -> None:
        """A batch: positions in the split (B,), targets and predictions."""

    @abstractmethod
    def compute(self) -> Scores | None:
        """The scores of all processes' samples, the same on each; None if there was not one. All must call it."""


class Rows(Meter):
    """Rows of numbers, one for each sample, which the task judges when all are there."""

    def __init__(self, task: Task, classes: tuple[str, ...], device: Any) -> None:
        self.task, self.classes, self.width = task, classes, 0
        self.rows = CatMetric(nan_strategy="disable").to(device)  # left out, a NaN would shift what follows it
        self.rows.set_dtype(torch.float64)

    def update(self, positions: Tensor, targets: Any, prediction: Any) -> None:
        found = self.task.rows(prediction, targets)
        found = torch.cat([positions.to(found)[:, None], found], 1)
        self.width = found.shape[1]
        self.rows.update(found.flatten())  # flat as the nothing of a process without a sample, or they do not gather

    def compute(self) -> Scores | None:
        table = self.rows.compute()
        if not isinstance(table, Tensor) or table.numel() == 0:
            return None
        table = table.reshape(-1, self.width or self.task.width(len(self.classes))).cpu()
        return self.task.judge(table[table[:, 0].argsort(stable=True)], self.classes)


class Task(ABC):
    """How outputs become rows of numbers, one for each sample, and rows become figures."""

    name: str
    loss: str  # the usual one
    score: str  # the metric that chooses the best epoch
    sign: float = 1.0  # -1 where less of it is better
    figures: tuple[str, ...] = ()  # what may choose the best epoch instead
    losses: tuple[str, ...] = ()  # the names of create_loss that fit; none: all
    dense: bool = False  # whether targets are maps or objects, which change with their sample when it is augmented

    def outputs(self, model: Any, images: Any, targets: Any) -> dict[str, Tensor]:
        """What the loss reads of a training batch."""
        return model.forward_outputs(images)

    def predict(self, model: Any, images: Any) -> Any:
        """What a model in evaluation mode says of a batch."""
        return model(images)

    def meter(self, classes: tuple[str, ...], device: Any) -> Meter:
        """A new one, for a pass over a split."""
        return Rows(self, classes, device)

    @abstractmethod
    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Prediction and target of a batch -> (B, K) float64."""

    @abstractmethod
    def judge(self, rows: Tensor, classes: tuple[str, ...]) -> Scores:
        """Rows (N, 1 + K) of a whole split, position first -> its scores."""

    @abstractmethod
    def width(self, classes: int) -> int:
        """Numbers in a row, the position included."""

    @abstractmethod
    def answer(self, prediction: Tensor, classes: tuple[str, ...], top: int) -> Any:
        """What `predict` says of one sample."""

    def target(self, labels: Any) -> Tensor:
        """Labels of one sample as a tensor."""
        return torch.as_tensor(labels)

    @abstractmethod
    def blank(self, classes: int, shape: tuple[int, ...] = ()) -> Tensor:
        """A target for one sample, to try a loss on; `shape` is that of a prediction."""

    def better(self, new: Mapping[str, float], old: Mapping[str, float] | None, select: str | None = None) -> bool:
        """Whether an epoch's validation is better than the best so far by the figure `select` (by default the score).

        Equal ones go by the loss.
        """
        if old is None:
            return True
        key = f"val_{select or self.score}"
        sign = -1.0 if select in ("loss", "mse", "mae") else 1.0 if select else self.sign
        losses = -new.get("val_loss", 0.0), -old.get("val_loss", 0.0)  # a detector has none in testing
        return (sign * new[key], losses[0]) > (sign * old[key], losses[1])


class SingleLabel(Task):
    """One class of several; rows: label, prediction, its probability, cross entropy."""

    name, loss, score = "single", "cross_entropy", "accuracy"
    figures = ("accuracy", "f1", "loss")

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        logits = prediction.float()
        loss = F.cross_entropy(logits, target, reduction="none")
        probability, guess = logits.softmax(-1).max(-1)
        return torch.stack([v.double() for v in (target, guess, probability, loss)], -1)

    def judge(self, rows: Tensor, classes: tuple[str, ...]) -> Scores:
        label, guess = rows[:, 1].long(), rows[:, 2].long()
        confusion = multiclass_confusion_matrix(guess, label, len(classes))
        f1 = multiclass_f1_score(guess, label, len(classes), average="none")
        there = confusion.sum(1) > 0  # a class that the split lacks has no F1
        hits = float((label == guess).double().mean())
        metrics = {"loss": float(rows[:, 4].mean()), "accuracy": hits, "f1": float(f1[there].double().mean())}
        found = {
            name: {"samples": int(n), "accuracy": float(k / n) if n else float("nan"), "f1": float(one)}
            for name, n, k, one in zip(classes, confusion.sum(1), confusion.diagonal(), f1, strict=True)
        }
        return Scores(metrics, hits, rows, confusion.long().cpu(), found)

    def width(self, classes: int) -> int:
        return 5

    def answer(self, prediction: Tensor, classes: tuple[str, ...], top: int) -> Any:
        probability, index = prediction.float().softmax(-1).cpu().topk(min(top, len(classes)))
        return tuple((classes[i], p) for i, p in zip(index.tolist(), probability.tolist(), strict=True))

    def target(self, labels: Any) -> Tensor:
        return torch.as_tensor(labels, dtype=torch.long)

    def blank(self, classes: int, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.zeros(1, dtype=torch.long)


class MultiLabel(Task):
    """Any number of classes at once; rows: binary cross entropy, then labels and probabilities of the classes."""

    name, loss, score = "multi", "binary_cross_entropy", "auc"
    figures = ("auc", "map", "f1", "loss")
    losses = ("binary_cross_entropy", "sigmoid_focal")

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        logits = prediction.float()
        loss = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none").mean(1, keepdim=True)
        return torch.cat([loss, target, logits.sigmoid()], 1).double()

    def judge(self, rows: Tensor, classes: tuple[str, ...]) -> Scores:
        count = len(classes)
        labels, chances = rows[:, 2 : 2 + count].long(), rows[:, 2 + count :].float()
        # a class that is always or never there has neither AUC nor precision, and counts in no mean
        there = (labels.amin(0) == 0) & (labels.amax(0) == 1)
        auc = multilabel_auroc(chances, labels, count, average="none")
        precision = multilabel_average_precision(chances, labels, count, average="none")
        f1 = multilabel_f1_score(chances, labels, count, average="none")
        means = [float(v[there].double().mean()) if there.any() else float("nan") for v in (auc, precision, f1)]
        metrics = {"loss": float(rows[:, 1].mean())} | dict(zip(("auc", "map", "f1"), means, strict=True))
        found = {
            name: {"samples": int(n), "auc": float(a) if ok else float("nan"), "f1": float(f)}
            for name, n, a, f, ok in zip(classes, labels.sum(0), auc, f1, there, strict=True)
        }
        return Scores(metrics, metrics["auc"], rows, None, found)

    def width(self, classes: int) -> int:
        return 2 + 2 * classes

    def answer(self, prediction: Tensor, classes: tuple[str, ...], top: int) -> Any:
        probability, index = prediction.float().sigmoid().cpu().topk(min(top, len(classes)))
        return tuple((classes[i], p) for i, p in zip(index.tolist(), probability.tolist(), strict=True))

    def target(self, labels: Any) -> Tensor:
        return torch.as_tensor(labels, dtype=torch.float32)

    def blank(self, classes: int, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.zeros(1, classes)


class Forecast(Task):
    """Future values of every variable; rows: mean squared and mean absolute error of the sample."""

    name, loss, score, sign = "forecast", "forecast", "mse", -1.0
    figures = ("mse", "mae", "loss")
    losses = ("forecast",)

    def rows(self, prediction: Tensor, target: Tensor) -> Tensor:
        error = prediction.double() - target.double()
        return torch.stack([error.square().flatten(1).mean(1), error.abs().flatten(1).mean(1)], -1)

    def judge(self, rows: Tensor, classes: tuple[str, ...]) -> Scores:
        mse, mae = rows[:, 1:].mean(0).tolist()
        return Scores({"loss": mse, "mse": mse, "mae": mae}, -mse, rows)

    def width(self, classes: int) -> int:
        return 3

    def answer(self, prediction: Tensor, classes: tuple[str, ...], top: int) -> Any:
        return prediction.float().cpu().tolist()

    def target(self, labels: Any) -> Tensor:
        return torch.as_tensor(labels, dtype=torch.float32)

    def blank(self, classes: int, shape: tuple[int, ...] = ()) -> Tensor:
        return torch.zeros(1, *shape)


TASKS: dict[str, Task] = {task.name: task for task in (SingleLabel(), MultiLabel(), Forecast())}
