"""Use a finished run: test it, or ask it about images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

import vertebra

from ..backbone import Backbone
from ..data import DataError, open_source
from ..data.folder import read_image
from ..data.loader import Images, eval_loader
from ..data.open import open_unseen
from ..data.transforms import eval_transform
from .build import make_model, make_view, threads
from .loop import eval_epoch
from .run import Run, RunError
from .watch import Watch


@dataclass(frozen=True)
class Evaluation:
    """A test: accuracy in 0..1, mean cross-entropy, and per class how many there were and the share found."""

    accuracy: float
    loss: float
    images: int
    classes: dict[str, tuple[int, float | None]]
    confusion: list[list[int]]  # true x predicted
    skipped: dict[str, str]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image with their probabilities, or why it could not be read."""

    image: str
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        return {"image": self.image, "top": [{"class": name, "probability": p} for name, p in self.top]}


def load_best(run: Run, model: Backbone) -> Backbone:
    """The run's best weights into its model. Raises RunError if there are none, CheckpointError if they do not fit."""
    path = run.folder / "best.safetensors"
    if not path.is_file():
        raise RunError(f"{run.folder}: no best.safetensors; no epoch was finished")
    vertebra.load_checkpoint(model, path)
    return model


def evaluate(folder: str | Path, data: str | None = None, watch: Watch | None = None) -> Evaluation:
    """Test a run's best weights on its test split, or on other data with the same classes.

    Raises RunError or DataError for what cannot be used.
    """
    run, watch = Run.open(folder), watch or Watch()
    config, classes = run.config, run.classes
    assert config.batch_size and config.workers is not None
    if data is None:
        source = open_source(config.data, config.limit)
        if source.fingerprint() != run.data["fingerprint"]:
            raise RunError(f"{config.data}: not the data of {run.folder} any more; name the test data with --data")
    else:
        source = open_unseen(data, classes)
    split = source.splits["test"]
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    model = fabric.to_device(load_best(run, make_model(config, len(classes))))
    skipped = {bad.path: bad.reason for bad in source.skipped}
    for path, reason in skipped.items():
        watch.note(f"skipped {path}: {reason}")
    loader = eval_loader(Images(split, eval_transform(make_view(config))), 2 * config.batch_size, config.workers)
    with threads(config):
        scores = eval_epoch(fabric, model, loader, len(classes), skipped, watch)
    found, total = scores.confusion.diagonal().tolist(), scores.confusion.sum(1).tolist()
    shares = {name: (n, k / n if n else None) for name, n, k in zip(classes, total, found)}
    return Evaluation(scores.accuracy, scores.loss, len(scores.rows), shares, scores.confusion.tolist(), skipped)


@torch.inference_mode()
def predict(folder: str | Path, images: Sequence[str | Path], top: int = 5) -> list[Prediction]:
    """What a run's best weights see in image files, in their order; unreadable ones come back with `error` set."""
    run = Run.open(folder)
    config, classes = run.config, run.classes
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    model = fabric.to_device(load_best(run, make_model(config, len(classes)))).eval()
    view = make_view(config)
    transform = eval_transform(view)
    results = []
    for path in images:
        try:
            image = transform(read_image(path, view.channels))
        except DataError as e:
            results.append(Prediction(str(path), error=str(e).removeprefix(f"{path}: ")))
            continue
        with fabric.autocast():
            logits = model(fabric.to_device(image[None]))
        probability, index = logits[0].float().softmax(-1).cpu().topk(min(top, len(classes)))
        pairs = tuple((classes[i], p) for i, p in zip(index.tolist(), probability.tolist()))
        results.append(Prediction(str(path), pairs))
    return results
