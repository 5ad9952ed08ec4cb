"""Everything a run is decided by. What is None is filled in by the data and the model, once, before training."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, ValidationInfo, field_validator


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


# what has keys of its own
OPEN = ("overrides", "data_options", "loss_options", "head_options", "teacher_overrides", "opt_options")


class Config(BaseModel):
    """See docs/training.md. `fit` writes the version with nothing left open to config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # what
    model: str = "pvt_v2_b0"
    overrides: dict[str, Any] = {}  # keyword arguments of the model's constructor
    head: str | None = None  # of segmentation or detection: semantic_fpn, upernet ...; retinanet, mask_rcnn ...
    head_options: dict[str, Any] = {}  # keyword arguments of the head's constructor
    data: str = "digits"
    data_options: dict[str, Any] = {}  # keyword arguments of the data's reader
    limit: int | None = Field(None, gt=0)  # samples a split
    max_skipped: int | None = Field(None, ge=0)  # samples that may be unreadable before a run stops; None: any number
    pretrained: bool = False
    checkpoint: str | None = None
    teacher: str | None = None  # distillation: a run folder, or a model's name
    teacher_checkpoint: str | None = None  # the teacher's weights, where not its run's best or the published ones
    teacher_overrides: dict[str, Any] = {}  # keyword arguments of the teacher's constructor
    # samples; what concerns images only is left alone by signals and volumes
    ndim: Literal[1, 2, 3] | None = None
    task: Literal["single", "multi", "forecast", "segmentation", "detection"] | None = None
    img_size: int | tuple[int, ...] | None = None  # of each axis as the model is given it
    channels: int | None = Field(None, gt=0)
    normalise: Literal["set", "sample", "none"] | None = None  # of signals and volumes
    beside: int | None = Field(None, ge=0)  # last channels that augmentation leaves alone: numbers beside a signal
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float | None = Field(None, gt=0, le=1)  # share of the shorter side kept in testing; 1: stretch instead
    interpolation: Literal["bilinear", "bicubic", "nearest"] | None = None
    order: Literal["RGB", "BGR"] | None = None  # of the channels as the model is given them
    augment: Literal["none", "light", "standard", "strong"] | None = None
    # of images; what is None is as `augment` says
    auto_augment: str | None = None  # none, trivial, or a policy of timm's: rand-m9-mstd0.5-inc1, original, augmix-m3
    random_erasing: float | None = Field(None, ge=0, le=1)  # chance that a box becomes noise
    color_jitter: float | None = Field(None, ge=0, le=1)  # largest change of brightness, contrast and saturation
    hflip: float | None = Field(None, ge=0, le=1)  # chance of mirroring left and right
    vflip: float | None = Field(None, ge=0, le=1)  # chance of mirroring up and down
    flips: tuple[Annotated[float, Field(ge=0, le=1)], ...] = ()  # of segmented signals and volumes: for each axis
    scale: tuple[PositiveFloat, Annotated[float, Field(gt=0, le=1)]] | None = None  # area that random crops keep
    ratio: tuple[PositiveFloat, PositiveFloat] | None = None  # width by height of random crops
    repeats: int = Field(1, gt=0)  # so many differently augmented copies of a sample in a batch, fewer samples an epoch
    # of segmentation and detection
    ignore: int | None = None  # the number of a target's cells that count nowhere; None: as the data say
    max_size: int | None = Field(None, gt=0)  # detection: no side is longer, whatever img_size says of the shorter one
    short_sides: tuple[Annotated[int, Field(gt=0)], ...] = ()  # detection: the shorter side in training, one is drawn
    scale_jitter: tuple[PositiveFloat, PositiveFloat] | None = None  # samples are scaled by, before they are cropped
    window: int | tuple[int, ...] | None = None  # segmentation: test in windows of this size that slide over a sample
    stride: int | tuple[int, ...] | None = None  # by so much; None: two thirds of a window
    test_flip: bool = False  # test a sample also mirrored, and take the mean
    test_scales: tuple[PositiveFloat, ...] = ()  # test a sample at these sizes, and take the mean
    # optimisation
    epochs: int | None = Field(None, gt=0)
    iterations: int | None = Field(None, gt=0)  # steps in place of epochs, rounded up to whole epochs
    batch_size: int | None = Field(None, gt=0)  # over all devices
    opt: str = "adamw"  # any name timm.optim knows
    opt_options: dict[str, Any] = {}  # betas, eps, momentum and the like, as timm's optimizer takes them
    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    lr_base_batch: int | None = Field(None, gt=0)  # lr is meant for this batch size and scales with batch_size
    schedule: Literal["cosine", "step", "multistep", "poly", "onecycle", "constant"] = "cosine"
    min_lr: float | None = Field(None, ge=0, allow_inf_nan=False)  # where cosine, poly and onecycle end; None: lr / 100
    warmup_lr: float | None = Field(None, ge=0, allow_inf_nan=False)  # where warm-up starts; None: lr / 100
    warmup_epochs: float | None = Field(None, ge=0, allow_inf_nan=False)  # wins over `warmup`
    decay_epochs: float | tuple[float, ...] | None = None  # step: epochs between steps (30); multistep: at which epochs
    decay_rate: float | None = Field(None, gt=0, allow_inf_nan=False)  # factor of a step (0.1), power of poly (0.9)
    weight_decay: float = Field(0.05, ge=0, allow_inf_nan=False)
    layer_decay: float | None = Field(None, gt=0, le=1)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of all steps
    clip: float | None = Field(1.0, gt=0)  # largest gradient norm, or as clip_mode says; None: off
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    accumulate: int = Field(1, gt=0)  # parts that a batch is worked off in: less memory, the same step
    nonfinite: Literal["stop", "skip"] = "stop"  # what a loss or gradient that is NaN or infinite does to training
    loss: str | None = None  # any name vertebra.tasks.create_loss knows that fits the task
    loss_options: dict[str, Any] = {}
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)  # alpha of the Beta distribution; 0: off
    cutmix: float = Field(0.0, ge=0)  # the same; with both on each batch draws one of them
    balance: Literal["none", "loss", "sample", "group"] = "none"  # of classes: weights in the loss, or in what is drawn
    class_weights: tuple[float, ...] = ()  # those of balance: loss; empty: from the training labels
    select: str | None = None  # the figure of the validation that chooses the best epoch: f1, auc, loss, ...
    mix_prob: float = Field(1.0, ge=0, le=1)  # share of the batches that are mixed at all
    mix_switch: float = Field(0.5, ge=0, le=1)  # with both on: share of the mixed batches that cutmix gets
    mixup_off_epoch: int | None = Field(None, gt=0)  # so many epochs are mixed, those after them are not
    ema: float | None = Field(None, gt=0, lt=1)  # decay of the averaged weights, which are then the ones tested
    ema_warmup: bool = True  # the decay grows to its value over the first thousands of steps
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] | Literal["published"] | None = None  # published: the variant's
    seed: int = Field(0, ge=0)
    tensorboard: bool = False  # also write event files for TensorBoard
    # machine
    workers: int | None = Field(None, ge=0)
    threads: int | None = Field(None, gt=0)
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = Field(1, gt=0)  # processes on each machine
    nodes: int = Field(1, gt=0)  # machines
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"  # weights whole in each process, or spread over all; auto: ddp
    sync_bn: bool = False  # batch norm over the samples of all processes
    compile: bool = False  # torch.compile: pays off on GPUs and long runs
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """True is no number; YAML also reads on, off, yes and no so."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise ValueError("true, false, yes, no, on and off are no values of it (null leaves it open)")
        return value

    @field_validator("img_size", "window", "stride")
    @classmethod
    def _positive(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        sides = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(side < 1 for side in sides) or value == ():
            raise ValueError("every side must be greater than 0")
        return value

    @field_validator("scale", "ratio", "scale_jitter")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError("the smaller number comes first")
        return value

    @property
    def scaled_lr(self) -> float:
        """The learning rate that training has; of a resolved configuration."""
        assert self.lr is not None and self.batch_size is not None
        return self.lr if self.lr_base_batch is None else self.lr * self.batch_size / self.lr_base_batch

    @property
    def sides(self) -> tuple[int, ...]:
        """The size of a sample as the model is given it; of a resolved configuration."""
        assert self.img_size is not None and self.ndim is not None
        return self.img_size if isinstance(self.img_size, tuple) else (self.img_size,) * self.ndim


def make_config(values: dict[str, Any], settings: Iterable[str] = ()) -> Config:
    """A Config from values and "key=value" settings (YAML values; `overrides.depths=[1, 1]` reaches inside).

    Raises ConfigError naming the key and what it takes.
    """
    import yaml

    from .values import Loader

    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key, _, inner = key.strip().partition(".")
        if not equals or not key:
            raise ConfigError(f"--set {setting}: expected key=value")
        try:
            value = yaml.load(text, Loader)
        except yaml.YAMLError as e:
            raise ConfigError(f"--set {setting}: the value is not YAML") from e
        if inner and key not in OPEN:
            raise ConfigError(f"--set {setting}: only {', '.join(OPEN)} have keys inside, as in overrides.{inner}=...")
        if inner:
            values.setdefault(key, {})[inner] = value
        else:
            values[key] = value
    try:
        return Config(**values)
    except ValidationError as e:
        raise ConfigError(one_line(e)) from e


def one_line(error: ValidationError) -> str:
    """What is wrong first, with its key."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown setting {key!r}{suggest(key, Config.model_fields)}"
    message = first["msg"][:1].lower() + first["msg"][1:]
    return f"{key}: {message}, got {first['input']!r}"


def suggest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" with the closest known names, or nothing."""
    import difflib

    close = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
