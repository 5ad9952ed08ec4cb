"""From a configuration to the pieces: the resolved configuration, the model, the view of the images."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import vertebra

from ..backbone import Backbone
from ..compose import is_spec, read_spec
from ..data import Source, transforms, waves
from ..data.transforms import View
from ..data.waves import WaveView
from ..registry import families
from ..tasks import Loss, create_loss
from ..tasks.losses import TEACHER
from .balance import Weighted, class_weights
from .config import Config, ConfigError
from .dense import DENSE, make_dense_task
from .dense_setup import (
    check_dense,
    dense_choices,
    is_image,
    make_dense_loss,
    make_dense_model,
    make_dense_transforms,
)
from .task import TASKS, Task

# What is used where the configuration leaves it open. Digits: measured; the others: the usual values. One thread for
# the digits: with so little work two are at best 1.5 times as fast, and on busy cores, where they wait for each other,
# they took 12 times as long.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "epochs": 12,
        "batch_size": 64,
        "lr": 2e-3,
        "img_size": 32,
        "augment": "light",
        "drop_path_rate": 0.0,
        "threads": 1,
    },
    "idx": {"epochs": 10, "batch_size": 128, "lr": 2e-3, "img_size": 32, "augment": "light", "workers": 0},
    "folder": {"epochs": 30, "batch_size": 64, "lr": 1e-3, "augment": "standard", "workers": 2},
    "signals": {"epochs": 30, "batch_size": 64, "lr": 1e-3, "augment": "standard", "workers": 0},
    "series": {"epochs": 10, "batch_size": 64, "lr": 1e-3, "augment": "none", "workers": 0},
}


EXTRAS = ("auto_augment", "random_erasing", "color_jitter", "hflip", "vflip", "scale", "ratio")  # of images alone


def model_info(name: str) -> Any:
    """vertebra.model_info. Raises ConfigError with close names for an unknown model."""
    try:
        return vertebra.model_info(name)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def expand(config: Config) -> Config:
    """A configuration whose model is a file of parts with those parts in it, so that a run does not need the file.

    Rank, channels and classes are left to the data. Raises ConfigError for a file that cannot be used.
    """
    if not is_spec(config.model):
        return with_windows(config)
    try:
        parts = read_spec(config.model)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    parts = {key: value for key, value in parts.items() if key not in ("ndim", "in_chans", "num_classes")}
    size = parts.pop("img_size", None) if config.img_size is None else config.img_size
    return Config(
        **config.model_dump() | {"model": "composed", "overrides": parts | config.overrides, "img_size": size}
    )


def forecasts(model: str) -> bool:
    """Whether a variant is a forecaster. Raises ConfigError for an unknown one."""
    family = families().get(model_info(model).family)  # a composed network has none
    return family is not None and family.model.prediction == "forecast"


def with_windows(config: Config) -> Config:
    """A forecaster's configuration with the windows its paper trains on, where the data's options leave them open."""
    if not forecasts(config.model):
        return config
    about = model_info(config.model)
    length = config.img_size if isinstance(config.img_size, int) else _side(about.inputs.size)
    windows = {"length": length, "horizon": about.config["num_classes"]}
    return Config(**config.model_dump() | {"data_options": windows | config.data_options})


def _check_forecast(config: Config, source: Source) -> None:
    if not forecasts(config.model):
        names = ", ".join(sorted(name for name, family in families().items() if family.model.prediction == "forecast"))
        raise ConfigError(f"model: {config.model} gives classes, no forecast; families that forecast: {names}")
    assert source.size is not None
    if config.img_size not in (None, source.size, source.size[0]):
        raise ConfigError(f"img_size: windows have {source.size[0]} steps (data_options.length), got {config.img_size}")


def resolve(config: Config, source: Source) -> Config:
    """The configuration with nothing left open that training depends on. Raises ConfigError for a contradiction."""
    inputs = model_info(config.model).inputs
    weights = config.pretrained or config.checkpoint is not None
    dense = source.task in DENSE
    image = source.ndim == 2 and source.task == "single" and source.kind in ("digits", "idx", "folder")
    image = image or (dense and is_image(source))
    channels = config.channels or (3 if weights and image else source.channels)
    size: Any = source.size or _side(inputs.size)
    chosen: dict[str, Any] = {"img_size": size, "workers": 0, "threads": torch.get_num_threads()}
    for key, there in (("ndim", source.ndim), ("task", source.task)):
        if getattr(config, key) not in (None, there):
            raise ConfigError(f"{key}: the data are of {key} {there}, got {getattr(config, key)!r}")
    check_dense(config, source)
    chosen |= dense_choices(config, source) if dense else RECIPES[source.kind]
    if weights:
        chosen["lr"] *= 0.2  # fine-tuning
    if source.task == "forecast":
        _check_forecast(config, source)
    if wrong := [key for key in EXTRAS if getattr(config, key) is not None and not image]:
        raise ConfigError(f"{wrong[0]}: is for images, and the data are {source.kind}")
    if config.drop_path_rate == "published":
        found = model_info(config.model).published.get("drop_path") or 0.0
        config = config.model_copy(update={"drop_path_rate": found})
    task = TASKS[source.task]
    loss = task.loss if config.teacher is None else "soft_distillation"
    if config.balance != "none" and source.splits["train"].targets is not None:
        raise ConfigError(f"balance: task {task.name} has no classes to balance")
    if config.balance == "group" and (source.splits["train"].groups is None or task.name != "single"):
        raise ConfigError("balance: group needs samples of one label, and groups (data_options.group)")
    if config.balance == "loss" and not config.class_weights:
        config = config.model_copy(update={"class_weights": class_weights(source.splits["train"])})
    if config.class_weights and len(config.class_weights) != len(source.classes):
        raise ConfigError(f"class_weights: needs {len(source.classes)}, one for each class")
    if config.select is not None and config.select not in task.figures:
        raise ConfigError(f"select: task {task.name} has the figures {', '.join(task.figures)}, got {config.select!r}")
    chosen["select"] = task.score
    chosen |= {"ndim": source.ndim, "task": source.task, "channels": channels, "loss": loss, "normalise": "set"}
    chosen["beside"] = source.beside
    if not image:
        if channels != source.channels:
            raise ConfigError(f"channels: the samples have {source.channels}, got {channels}")
        if source.scaled is not None:  # kept in config.json; the samples are not scaled again
            chosen["normalise"], (chosen["mean"], chosen["std"]) = "none", source.scaled
        elif config.mean is None or config.std is None:
            chosen["mean"], chosen["std"] = waves.statistics(source.splits["train"], channels)
        return _resolved(config, chosen, channels, source)
    if channels not in (1, 3):
        raise ConfigError(f"channels: images have 1 or 3, got {channels}")
    chosen["crop"] = inputs.crop if source.kind == "folder" else 1.0
    chosen["order"] = inputs.channels if channels == 3 else "RGB"
    chosen["interpolation"] = inputs.interpolation if source.kind == "folder" else "bilinear"
    if channels == 3:
        chosen["mean"], chosen["std"] = tuple(inputs.mean), tuple(inputs.std)
    elif config.mean is None or config.std is None:
        chosen["mean"], chosen["std"] = _grey_statistics(source)
    return _resolved(config, chosen, channels, source)


def _resolved(config: Config, chosen: dict[str, Any], channels: int, source: Source) -> Config:
    """`config` with what is `chosen` where it leaves something open."""
    given = config.model_dump()
    if config.iterations is not None:
        batch = min(config.batch_size or chosen["batch_size"], len(source.splits["train"]))
        chosen["epochs"] = -(-config.iterations // (len(source.splits["train"]) // batch))
        if config.epochs not in (None, chosen["epochs"]):  # a run's own file has both, and they agree
            raise ConfigError(f"iterations: {config.iterations} are {chosen['epochs']} epochs, got epochs "
                              f"{config.epochs} too; iterations=null leaves them to epochs")  # fmt: skip
    resolved = Config(**given | {key: value for key, value in chosen.items() if given[key] is None})
    assert resolved.mean is not None and resolved.std is not None and resolved.batch_size is not None
    if not len(resolved.mean) == len(resolved.std) == channels:
        raise ConfigError(f"mean and std need {channels} values each, as many as channels")
    if resolved.batch_size % (resolved.devices * resolved.nodes):
        many = f"{resolved.devices} devices" + (f" on {resolved.nodes} nodes" if resolved.nodes > 1 else "")
        raise ConfigError(f"batch_size {resolved.batch_size} is not a multiple of {many}")
    if isinstance(resolved.img_size, tuple) and len(resolved.img_size) != resolved.ndim:
        raise ConfigError(f"img_size: needs one number, or one for each of {resolved.ndim} axes")
    return resolved


def _grey_statistics(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    train = source.splits["train"]
    mean, std = transforms.statistics(train, source.channels)
    return (sum(mean) / len(mean),), (sum(std) / len(std),)


def _side(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else min(size[-2:])


@contextmanager
def threads(config: Config) -> Iterator[None]:
    """The configuration's number of CPU threads, for as long as it is needed."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_view(config: Config) -> View | WaveView:
    """How a resolved configuration looks at samples."""
    assert config.channels and config.mean and config.std
    if config.crop is None:  # no image
        how = config.normalise or "set"
        return WaveView(config.sides, config.channels, config.mean, config.std, how, config.beside or 0)
    assert config.interpolation
    height, width = config.sides
    order = config.order or "RGB"
    return View((height, width), config.channels, config.mean, config.std, config.crop, config.interpolation, order)


def make_transforms(config: Config) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What samples (of segmentation and detection with their targets) go through in training and in testing."""
    view = make_view(config)
    assert config.augment is not None
    if config.task in DENSE:
        try:
            return make_dense_transforms(config, view)
        except ValueError as e:
            raise ConfigError(" ".join(str(e).split())) from e
    if isinstance(view, WaveView):
        return waves.train_transform(view, config.augment), waves.eval_transform(view)
    extras = transforms.Extras(**{key: getattr(config, key) for key in EXTRAS})
    try:
        return transforms.train_transform(view, config.augment, extras), transforms.eval_transform(view)
    except ValueError as e:
        raise ConfigError(str(e)) from e


def make_task(config: Config) -> Task:
    return make_dense_task(config) if config.task in DENSE else TASKS[config.task or "single"]


def blank(config: Config) -> Tensor:
    """One sample of zeros, as the model is given it."""
    assert config.channels
    return torch.zeros(1, config.channels, *config.sides)


def outputs_of(source: Source) -> int:
    """How many outputs a model for this data has."""
    return len(source.classes) if source.horizon is None else source.horizon


def make_model(config: Config, num_classes: int, start: bool = False) -> Any:
    """The model of a resolved configuration (a detector excepted) tried on one blank sample.

    `start` loads the weights to start from.
    Raises ConfigError for an option or an input size that the model refuses.
    """
    size = config.img_size
    options: dict[str, Any] = {
        "ndim": config.ndim,
        "in_chans": config.channels,
        "num_classes": num_classes,
        "img_size": size[0] if isinstance(size, tuple) and len(set(size)) == 1 else size,
    }
    if config.drop_path_rate is not None:
        options["drop_path_rate"] = config.drop_path_rate
    if start:
        options |= {"pretrained": config.pretrained, "checkpoint": config.checkpoint}
    try:
        if config.task in DENSE:
            model = make_dense_model(config, num_classes, options).eval()
        else:
            model = vertebra.create_model(config.model, **options | config.overrides).eval()
        if config.task == "detection":  # it takes any size, and its usual one takes long
            return model
        with torch.inference_mode():
            model(blank(config))
    except (ValueError, TypeError, OSError) as e:
        raise ConfigError(" ".join(str(e).split())) from e
    return model


def _balanced(config: Config, name: str, task: Task, options: dict[str, Any]) -> Any:
    """The loss `name`, with class weights where the configuration asks for them."""
    if config.balance != "loss":
        return create_loss(name, **options)
    if task.name == "single":
        if "reduction" in options:
            raise ValueError("reduction cannot be chosen with balance: loss")
        return Weighted(create_loss(name, **options | {"reduction": "none"}), config.class_weights)
    if name != "binary_cross_entropy":
        raise ValueError(f"balance: loss needs binary_cross_entropy, not {name}, where a sample has several labels")
    return create_loss(name, **{"pos_weight": config.class_weights} | options)


def _must_listen(loss: Any, outputs: dict[str, Tensor], target: Tensor, name: str) -> None:
    """ValueError for a loss that does without the teacher who is there."""
    try:
        loss(outputs, target)
    except ValueError:
        return
    raise ValueError(f"{name} does not read a teacher; take soft_, hard_ or token_distillation, or no teacher")


def make_loss(config: Config, model: Any, teacher: Backbone | None = None) -> Loss:
    """The loss of a resolved configuration, tried on the model's outputs for one blank sample.

    Raises ConfigError for an unknown name or option, and where the loss reads what the model does not give.
    """
    task, name = make_task(config), config.loss
    assert name is not None
    if task.losses and name not in task.losses:
        raise ConfigError(f"loss: {name} does not fit task {task.name}; there are: {', '.join(task.losses)}")
    smoothing = {"label_smoothing": config.label_smoothing} if task.name == "single" else {}
    try:
        if task.name == "detection":
            return make_dense_loss(config)
        loss = make_dense_loss(config) if task.dense else _balanced(config, name, task, smoothing | config.loss_options)
        with torch.inference_mode():
            outputs = model.eval().forward_outputs(blank(config))
            prediction = outputs[model.prediction]
            target = task.blank(prediction.shape[1], tuple(prediction.shape[1:]))
            if teacher is not None:
                taught = outputs | {TEACHER: teacher(blank(config))}
                loss(taught, target)
                _must_listen(loss, outputs, target, name)
            else:
                loss(outputs, target)
    except (ValueError, TypeError) as e:
        raise ConfigError(f"loss: {' '.join(str(e).split())}") from e
    return loss
