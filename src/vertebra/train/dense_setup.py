"""From a configuration to the pieces, for segmentation and detection; build.py calls it where the data are of these."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import vertebra

from ..data import Source
from ..data.transforms import View
from ..data.waves import WaveView
from .config import Config, ConfigError, suggest
from .dense import DENSE, HEADS, MASK_HEAD
from .dense_losses import LOSSES

# usual values on small data; the papers' are recipes
RECIPES: dict[str, dict[str, Any]] = {
    "segmentation": {"epochs": 30, "batch_size": 8, "lr": 5e-4, "augment": "standard", "workers": 0},
    "detection": {"epochs": 30, "batch_size": 4, "lr": 2e-4, "augment": "standard", "workers": 0, "img_size": 320},
}
CROPS = {1: 1024, 2: 256, 3: 64}  # sides of what a segmenter is trained on, by the number of axes
LONGEST = 1333 / 800  # sides of what a detector sees: the longer one to the shorter at most, as on COCO
KEYS = (  # settings of dense prediction alone, and the tasks they are for
    ("head", "segmentation detection"),
    ("head_options", "segmentation detection"),
    ("ignore", "segmentation"),
    ("max_size", "segmentation detection"),
    ("short_sides", "segmentation detection"),
    ("scale_jitter", "segmentation detection"),
    ("flips", "segmentation"),
    ("window", "segmentation"),
    ("stride", "segmentation"),
    ("test_flip", "segmentation detection"),
    ("test_scales", "segmentation detection"),
)
NOT_DENSE = ("auto_augment", "random_erasing", "scale", "ratio", "mixup", "cutmix", "teacher")


def check_dense(config: Config, source: Source) -> None:
    """ConfigError for a setting that does not go with the task of the data."""
    task, fields = source.task, Config.model_fields
    for key, tasks in KEYS:
        if getattr(config, key) != fields[key].default and task not in tasks.split():
            raise ConfigError(f"{key}: is for {' and '.join(tasks.split())}, and the data are of task {task}")
    if task not in DENSE:
        return
    for key in NOT_DENSE:
        if getattr(config, key) not in (None, 0, 0.0, "none"):
            raise ConfigError(f"{key}: does not go with {task}, whose targets are of places")
    if config.balance != "none" or config.class_weights:
        advice = "; loss_options.class_weights weighs the classes of cells" if task == "segmentation" else ""
        raise ConfigError(f"balance: {task} has no label of a whole sample to balance by{advice}")
    if config.strategy == "fsdp":
        raise ConfigError(f"strategy: fsdp cannot train for {task}, whose samples differ in size; use ddp")
    if config.compile and task == "detection":
        raise ConfigError("compile: a detector's boxes differ in number from step to step; leave it off")
    if config.stride is not None and config.window is None:
        raise ConfigError("stride: is of windows, and window is not set")
    sides = 2 if source.ndim is None else source.ndim
    for key in ("window", "stride"):
        value = getattr(config, key)
        if isinstance(value, tuple) and len(value) != sides:
            raise ConfigError(f"{key}: needs one number, or one for each of {sides} axes, got {value}")
    head = config.head or default_head(source)
    if task == "detection":
        if head == MASK_HEAD and not source.masks:
            raise ConfigError(f"head: {MASK_HEAD} learns masks, and the data have boxes only")
        if (config.select or "").startswith("mask_") and head != MASK_HEAD:
            raise ConfigError(f"select: {config.select} is a figure of {MASK_HEAD}, the head is {head}")
        if isinstance(config.img_size, tuple):
            raise ConfigError("img_size: of a detector it is one number, the shorter side of an image")
    known = heads(task)
    if head not in known:
        raise ConfigError(f"head: {head!r} is none for {task}{suggest(head, known)} (there are: {', '.join(known)})")


def heads(task: str) -> list[str]:
    if task == "segmentation":
        from ..tasks.segmentation import HEADS as known

        return list(known)
    from ..tasks.detection import HEADS as found

    return list(found)


def default_head(source: Source) -> str:
    return MASK_HEAD if source.task == "detection" and source.masks else HEADS[source.task]


def dense_choices(config: Config, source: Source) -> dict[str, Any]:
    """What is used where the configuration leaves it open."""
    chosen = dict(RECIPES[source.task]) | {"head": default_head(source)}
    if source.task == "detection":
        side: Any = config.img_size or chosen["img_size"]
        chosen["max_size"] = math.ceil(max(side, *config.short_sides, 0) * LONGEST)
        return chosen
    chosen["ignore"] = source.ignore
    crop = CROPS[source.ndim]
    # no larger than the samples are, where all are of a size, but for a multiple of 32
    sides = source.size or (crop,) * source.ndim
    chosen["img_size"] = tuple(min(crop, 32 * -(-side // 32)) for side in sides)
    return chosen


def is_image(source: Source) -> bool:
    """Whether the samples are pictures (whole numbers from 0 to 255), which are normalised as such."""
    return source.ndim == 2 and source.channels in (1, 3) and source.kind not in ("signals", "arrays", "volumes")


def make_dense_model(config: Config, num_classes: int, options: dict[str, Any]) -> Any:
    """The segmenter or detector; `options` are those of every model. Raises ValueError, TypeError or OSError."""
    assert config.head is not None
    given: dict[str, Any] = {**options, "num_classes": num_classes, "head_options": config.head_options}
    if config.task == "segmentation":
        return vertebra.segmentation(config.model, config.head, **given | config.overrides)
    side = config.sides[0]
    given |= {
        "min_size": (*(other for other in config.short_sides if other != side), side),  # tests take the last one
        "max_size": config.max_size,
        "mean": config.mean,
        "std": config.std,
    }
    del given["ndim"], given["img_size"]
    return vertebra.detection(config.model, config.head, **given | config.overrides)


def make_dense_loss(config: Config) -> Any:
    """The loss by name. Raises ValueError or TypeError."""
    assert config.loss is not None
    usual = {"ignore": config.ignore} if config.task == "segmentation" else {}
    return LOSSES[config.loss](**usual | config.loss_options)


def make_dense_transforms(config: Config, view: View | WaveView) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What samples and targets go through in training and in testing. Raises ValueError.

    A segmenter is tested on whole samples in the size they have, or at the last of `short_sides`; with `augment` none
    it is trained on samples stretched to `img_size` and tested so.
    """
    from ..data.joint import joint_eval, joint_train

    task: Any = config.task
    assert config.augment is not None
    ignore = 255 if config.ignore is None else config.ignore
    image = isinstance(view, View)
    options: dict[str, Any] = {"scale_jitter": config.scale_jitter, "ignore": ignore}
    if config.flips:
        if image:
            raise ValueError("flips: is for signals and volumes; images have hflip and vflip")
        options["flips"] = config.flips
    if image:
        options |= {key: getattr(config, key) for key in ("hflip", "vflip", "color_jitter")}
    if task == "segmentation" and image:
        options |= {"short_sides": config.short_sides or None, "max_size": config.max_size}
    train = joint_train(view, task, config.augment, **options)
    if task == "detection":  # the model itself resizes
        return train, joint_eval(view, task)
    still = config.augment == "none" and config.scale_jitter is None and not config.short_sides
    short = config.short_sides[-1] if config.short_sides and image else None
    return train, joint_eval(view, task, short=short, max_size=config.max_size, fixed=still, ignore=ignore)
