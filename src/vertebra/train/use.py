"""Use a finished run: test it, or ask it about images, signals and volumes."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric import Fabric

import vertebra

from ..backbone import Backbone
from ..data import DataError, open_source
from ..data.folder import EXTENSIONS, read_image
from ..data.loader import Samples, eval_loader
from ..data.objects import runs_from, text_of
from ..data.open import open_unseen
from ..data.samples import ENDINGS, Series, read_sample, walk
from ..data.transforms import View
from ..tasks.inference import class_map
from .answers import Table
from .build import make_model, make_task, make_transforms, make_view, threads
from .files import write_atomic
from .loop import eval_epoch
from .pictures import Pictures
from .reliability import Guarded, lost_workers
from .run import Run, RunError
from .task import Scores
from .watch import Watch

DENSE = ("segmentation", "detection")


@dataclass(frozen=True)
class Evaluation:
    """A test: figures over all samples (accuracy, f1, auc, mse ... by task), and those of each class by its name."""

    metrics: dict[str, float]
    samples: int
    classes: dict[str, dict[str, float]]
    confusion: list[list[int]] | None  # true x predicted, where a sample has one label
    skipped: dict[str, str]

    @property
    def accuracy(self) -> float:
        """Share of right answers, in 0..1; KeyError where a sample has not one label."""
        return self.metrics["accuracy"]

    @property
    def loss(self) -> float:
        return self.metrics["loss"]


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one sample with their probabilities, or its forecast, or why it could not be read; of
    segmentation each class's share of the cells and the class map, of detection the objects."""

    image: str  # the path, whatever lies there
    top: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    forecast: dict[str, list[float]] | None = None  # variable -> its next values
    size: tuple[int, ...] = ()  # of what was segmented or searched, as it was read
    shares: dict[str, float] | None = None  # class -> its share of the cells
    labels: torch.Tensor | None = None  # (*size) int64, the class map
    objects: tuple[dict[str, Any], ...] | None = None  # class, score, box (xyxy pixels), mask (COCO RLE) if there is
    files: tuple[str, ...] = ()  # what was written of it

    def as_dict(self) -> dict[str, Any]:
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        if self.forecast is not None:
            return {"image": self.image, "forecast": self.forecast}
        if self.shares is not None or self.objects is not None:
            found = {"shares": self.shares} if self.objects is None else {"objects": list(self.objects)}
            return {"image": self.image, "size": list(self.size), **found, "files": list(self.files)}
        return {"image": self.image, "top": [{"class": name, "probability": p} for name, p in self.top]}


def load_best(run: Run, model: Backbone) -> Backbone:
    """The run's best weights into its model. Raises RunError if there are none, CheckpointError if they do not fit."""
    path = run.folder / "best.safetensors"
    if not path.is_file():
        raise RunError(f"{run.folder}: no best.safetensors; no epoch was finished")
    vertebra.load_checkpoint(model, path)
    return model


def evaluate(
    folder: str | Path, data: str | None = None, watch: Watch | None = None, predictions: str | Path | None = None
) -> Evaluation:
    """Test a run's best weights on its test split, or on other data with the same classes.

    `predictions` names a .csv file for each sample's name, target and prediction (see `answers.Table`).
    Raises RunError or DataError for what cannot be used.
    """
    run, watch = Run.open(folder), watch or Watch()
    config, classes, task = run.config, run.classes, make_task(run.config)
    assert config.batch_size and config.workers is not None
    if data is None:
        source = open_source(config.data, config.limit, **config.data_options)
        if source.fingerprint() != run.data["fingerprint"]:
            raise RunError(f"{config.data}: not the data of {run.folder} any more; name the test data with --data")
    else:
        source = open_unseen(data, classes, run.data["kind"], **config.data_options)
    split = source.splits["test"]
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    model = fabric.to_device(load_best(run, make_model(config, run.outputs)))
    skipped = {bad.path: bad.reason for bad in source.skipped}
    for path, reason in skipped.items():
        watch.note(f"skipped {path}: {reason}")
    samples = Samples(split, make_transforms(config)[1], target=task.target)
    loader = Guarded(eval_loader(samples, 2 * config.batch_size, config.workers), "test", skipped, config.max_skipped)
    with threads(config), lost_workers():
        if predictions is None:
            scores = eval_epoch(fabric, model, loader, task, classes, skipped, watch)
        else:
            found: list[Scores] = []

            def write(file: BinaryIO) -> None:
                keep = Table(file, task.name, classes, split.names, getattr(task, "ignore", -1))
                found.append(eval_epoch(fabric, model, loader, task, classes, skipped, watch, keep))

            write_atomic(predictions, write)
            (scores,) = found
    confusion = None if scores.confusion is None else scores.confusion.tolist()
    return Evaluation(scores.metrics, len(scores.rows), scores.classes, confusion, skipped)


def predict(
    folder: str | Path,
    images: Sequence[str | Path],
    top: int = 5,
    out: str | Path | None = None,
    threshold: float = 0.5,
) -> list[Prediction]:
    """`predict_iter` as a list."""
    return list(predict_iter(folder, images, top, out, threshold))


def predict_iter(
    folder: str | Path,
    inputs: Iterable[str | Path],
    top: int = 5,
    out: str | Path | None = None,
    threshold: float = 0.5,
) -> Iterator[Prediction]:
    """What a run's best weights see in files, in their order; unreadable ones come back with `error` set.

    A folder among the `inputs` stands for the files below it: images, or for a run on signals or volumes what
    `vertebra.data.samples.read_sample` takes. A forecast is of what follows a series file's last steps. Files are read
    as the answers are asked for, one batch of the run's size at a time. Raises RunError before the first answer for a
    run that cannot be used.

    Segmentation and detection look at one file at a time, at its own size, with the windows and copies that the run's
    configuration names. Objects have at least the score `threshold`. With `out`, a folder, each file's answer is drawn
    there (see `pictures.Pictures`); RunError if an input lies in it, or if the run is of another task.
    """
    run = Run.open(folder)
    config = run.config
    dense = config.task in DENSE
    if out is not None and not dense:
        raise RunError(f"{run.folder}: task {config.task or 'single'} has no pictures to write to {out}")
    pictures = None if out is None else Pictures(out, run.classes, threshold)
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    model = fabric.to_device(load_best(run, make_model(config, run.outputs))).eval()
    if dense:
        return _dense_answers(run, fabric, model, _reader(run), inputs, pictures, threshold)
    return _answers(run, fabric, model, _reader(run), inputs, top)


def _dense_answers(
    run: Run,
    fabric: Fabric,
    model: torch.nn.Module,
    read: Callable[[str | Path], torch.Tensor],
    inputs: Iterable[str | Path],
    pictures: Pictures | None,
    threshold: float,
) -> Iterator[Prediction]:
    config, task = run.config, make_task(run.config)
    transform = make_transforms(config)[1]
    kinds = EXTENSIONS if isinstance(make_view(config), View) else ENDINGS
    for path in walk(inputs if pictures is None else pictures.apart(inputs), kinds):
        try:
            if os.path.isdir(path):
                raise DataError(f"a folder with no file of {', '.join(sorted(kinds))} in it")
            sample = read(path)
            given = fabric.to_device(_given(transform, sample))
            with threads(config), torch.inference_mode(), fabric.autocast():
                (found,) = task.predict(model, given[None] if config.task == "segmentation" else [given])
        except ValueError as e:  # DataError, or a sample that is too small for the model
            yield Prediction(str(path), error=" ".join(str(e).split()).removeprefix(f"{path}: "))
            continue
        size = tuple(sample.shape[1:])
        if isinstance(found, torch.Tensor):
            labels = class_map(found, size).cpu()
            counts = torch.bincount(labels.flatten(), minlength=len(run.classes)).double() / labels.numel()
            files = () if pictures is None else pictures.segmentation(path, sample, labels)
            shares = dict(zip(run.classes, counts.tolist(), strict=True))
            yield Prediction(str(path), size=size, shares=shares, labels=labels, files=files)
        else:
            found = {key: value.cpu() for key, value in found.items()}
            files = () if pictures is None else pictures.detection(path, sample, found)
            yield Prediction(str(path), size=size, objects=_objects(found, run.classes, threshold), files=files)


def _given(transform: Callable[..., Any], sample: torch.Tensor) -> torch.Tensor:
    """A sample as the model is given it in testing."""
    return transform(sample, None)[0] if getattr(transform, "joint", False) else transform(sample)


def _objects(found: dict[str, torch.Tensor], classes: Sequence[str], threshold: float) -> tuple[dict[str, Any], ...]:
    """Boxes of at least the score `threshold`, best first, as they are written to json."""
    objects = []
    for i in found["scores"].argsort(descending=True, stable=True).tolist():
        if (score := float(found["scores"][i])) < threshold:
            break
        box = [round(v, 2) for v in found["boxes"][i].tolist()]
        one = {"class": classes[int(found["labels"][i])], "score": round(score, 5), "box": box}
        objects.append(one | ({"mask": run_lengths(found["masks"][i, 0] > 0.5)} if "masks" in found else {}))
    return tuple(objects)


def run_lengths(mask: torch.Tensor) -> dict[str, Any]:
    """A mask (H, W) as COCO's json files have it: {"size": [H, W], "counts": text}."""
    return {"size": list(mask.shape), "counts": text_of(runs_from(mask.numpy()))}


def _answers(
    run: Run,
    fabric: Fabric,
    model: torch.nn.Module,
    read: Callable[[str | Path], torch.Tensor],
    inputs: Iterable[str | Path],
    top: int,
) -> Iterator[Prediction]:
    config, task = run.config, make_task(run.config)
    assert config.batch_size
    transform = make_transforms(config)[1]
    kinds = EXTENSIONS if isinstance(make_view(config), View) else ENDINGS
    files = walk(inputs, kinds)
    while batch := list(itertools.islice(files, config.batch_size)):
        found: list[Any] = []  # a prepared sample, or why there is none
        for path in batch:
            try:
                if os.path.isdir(path):
                    raise DataError(f"a folder with no file of {', '.join(sorted(kinds))} in it")
                found.append(transform(read(path)))
            except DataError as e:
                found.append(str(e).removeprefix(f"{path}: "))
        good = [x for x in found if not isinstance(x, str)]
        if good:
            with threads(config), torch.inference_mode(), fabric.autocast():
                outputs = iter(model(fabric.to_device(torch.stack(good))))
        for path, x in zip(batch, found, strict=True):
            if isinstance(x, str):
                yield Prediction(str(path), error=x)
                continue
            answer = task.answer(next(outputs), run.classes, top)
            if config.task == "forecast":
                answer = read.restored(answer) if isinstance(read, Series) else answer
                yield Prediction(str(path), forecast=dict(zip(run.classes, answer, strict=True)))
            else:
                yield Prediction(str(path), answer)


def _reader(run: Run) -> Callable[[str | Path], torch.Tensor]:
    """What reads one file as the run's samples were read. Raises DataError where that takes data that are gone."""
    config, view = run.config, make_view(run.config)
    if isinstance(view, View):
        return partial(read_image, channels=view.channels)
    if run.data["kind"] == "series":
        return Series(Path(config.data).expanduser(), config.data_options, run.classes, view.size[0])
    kept = {key: value for key, value in config.data_options.items() if key in ("layout", "scale")}
    return partial(read_sample, channels=view.channels, ndim=len(view.size), **kept)
