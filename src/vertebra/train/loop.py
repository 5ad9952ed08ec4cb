"""The loop: one epoch of training, one pass of testing."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ..backbone import Backbone
from ..data import Skipped
from ..data.loader import Batch, derive
from ..tasks import Loss
from ..tasks.losses import TEACHER
from .config import Config
from .task import Scores, Task
from .watch import Watch


class TrainError(RuntimeError):
    """Training that cannot go on; the message is one line."""


@dataclass
class Trainer:
    """What one epoch needs and changes."""

    config: Config
    fabric: Fabric
    net: Backbone  # the model itself
    model: Any  # the same as Fabric wrapped it
    task: Task
    loss: Loss
    optimizer: Any
    schedule: Any
    ema: Any  # timm's ModelEmaV3, or None
    watch: Watch
    teacher: Any = None  # a model in evaluation mode whose logits the loss reads, or None
    step: int = 0
    saved: str = "none yet"  # where the last good checkpoint is
    blank: Batch | None = None  # what a process takes part with that has no sample where others have
    sharded: bool = False  # no process has the weights whole: a forward is everybody's affair
    skipped: dict[str, str] = field(default_factory=dict)  # path -> reason

    @property
    def tested(self) -> Backbone:
        """The weights that are tested and kept: the averaged ones where there are any."""
        return self.net if self.ema is None else self.ema.module


def train_epoch(t: Trainer, loader: Iterable[Batch | list[Skipped]], epoch: int, classes: int) -> dict[str, float]:
    """One epoch, numbered from 0. Returns the mean loss on what was seen (of one label also the accuracy), the last
    learning rate, and how many steps were left out.

    Raises TrainError when the loss is not finite, before the weights are touched; with nonfinite=skip it leaves such
    a step out, unless all of an epoch's are.
    """
    # Dropout and drop path draw from the global generators. Seeding them here, from the epoch and the process, makes
    # an epoch depend on nothing but the weights it starts from: that is what makes resuming exact.
    seed = derive(t.config.seed, epoch, t.fabric.global_rank, 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    mean_loss = MeanMetric().to(t.fabric.device)
    accuracy = MulticlassAccuracy(classes, average="micro").to(t.fabric.device) if t.task.name == "single" else None
    t.model.train()
    lr, steps, left_out = None, 0, 0
    for batch in loader:
        note_skipped(t.skipped, batch, t.watch)
        count = len(batch.targets) if isinstance(batch, Batch) else 0
        if not isinstance(batch, Batch):
            if t.blank is None:
                t.step += 1
                continue
            batch = t.blank
        images, targets = t.fabric.to_device(batch.images), t.fabric.to_device(batch.targets)
        t.schedule.step_update(t.step)
        lr = max(group["lr"] for group in t.optimizer.param_groups)
        images, other, share = _mixed(t, images, targets, epoch, derive(seed, t.step))
        before = _statistics(t) if t.config.nonfinite == "skip" else []
        shown, predictions, there = _gradients(t, images, targets, other, share, count)
        if not there:  # nobody could read a sample
            t.optimizer.zero_grad(set_to_none=True)
            t.step += 1
            continue
        steps += 1
        wrong = None if math.isfinite(shown) else f"the loss is {shown}"
        if wrong is None:
            norm = clip_gradients(t)
            # a loss can be finite and its gradient not; clipping would make NaN of it. The scale of float16 may try
            if t.config.precision != "16-mixed" and not math.isfinite(size := float(full(norm))):
                wrong = f"the gradient is {size}"
        if wrong is None:
            t.optimizer.step()
        elif t.config.nonfinite == "stop":
            raise TrainError(
                f"{wrong} at step {t.step} (epoch {epoch + 1}, learning rate {lr:.3g}); "
                f"last good checkpoint: {t.saved}; a lower --lr, a longer warmup or --precision 32-true may help"
            )
        else:
            left_out += 1
            for buffer, value in before:  # batch norms have seen the samples already
                buffer.copy_(value)
            t.watch.note(f"step {t.step} left out: {wrong} (learning rate {lr:.3g})")
        t.optimizer.zero_grad(set_to_none=True)
        t.step += 1
        if wrong is None:
            if t.ema is not None:
                t.ema.update(t.net, step=t.step)
            mean_loss.update(shown, count)
            if accuracy is not None and count:
                accuracy.update(predictions, targets)
        t.watch.step(shown)
    if lr is None:
        raise TrainError("not one training sample could be read")
    if left_out == steps:
        raise TrainError(
            f"the loss or its gradient was never finite in epoch {epoch + 1} (learning rate {lr:.3g}); "
            f"last good checkpoint: {t.saved}"
        )
    row = {"lr": lr, "train_loss": float(mean_loss.compute())}
    if accuracy is not None:
        row["train_accuracy"] = float(accuracy.compute())
    return row | ({"left_out": left_out} if left_out else {})


def clip_gradients(t: Trainer) -> Tensor:
    """Gradients cut as the configuration says -> their norm before that, a scalar."""
    clip, mode = t.config.clip, t.config.clip_mode
    most = clip if clip is not None and mode == "norm" else math.inf  # at infinity nothing changes: only the norm
    norm = t.fabric.clip_gradients(t.model, t.optimizer, max_norm=most, error_if_nonfinite=False)
    if clip is not None and mode != "norm":
        from timm.models import model_parameters
        from timm.utils import dispatch_clip_grad

        dispatch_clip_grad(model_parameters(t.net, exclude_head=mode == "agc"), clip, mode)
    return norm  # type: ignore[return-value]


def _mixed(t: Trainer, images: Any, targets: Any, epoch: int, seed: int) -> tuple[Any, Any, float]:
    """`mix` as the configuration says for this epoch, numbered from 0."""
    c = t.config
    if c.mixup_off_epoch is not None and epoch >= c.mixup_off_epoch:
        return images, targets, 1.0
    return mix(images, targets, c.mixup, c.cutmix, seed, c.mix_prob, c.mix_switch)


def _statistics(t: Trainer) -> list[tuple[Tensor, Tensor]]:
    """The model's buffers (batch norms' running statistics), and what is in them now."""
    return [(buffer, buffer.clone()) for buffer in t.net.buffers()]


def full(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes, gathered; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _gradients(
    t: Trainer, images: Any, targets: Any, other: Any, share: float, count: int
) -> tuple[float, Tensor, bool]:
    """Gradients of a batch, worked off in `accumulate` parts -> mean loss over the samples of all processes,
    predictions (B, ...) where an accuracy is shown, and whether there were samples at all.

    Samples and targets are tensors, or lists where they differ in size. `count` of `images` count, all or none.
    A loss that is not finite gives no predictions, and gradients of no use.
    """
    # Gradients are averaged over processes, which may have unequal shares: each weighs its loss so that the average
    # is the mean over all samples. And all take the same number of parts, or some would wait for the others for ever.
    world = t.fabric.world_size
    everybody = torch.full((), float(count), device=t.fabric.device)
    pieces = min(t.config.accumulate, count)
    if world > 1:
        everybody, pieces = t.fabric.all_reduce(everybody, reduce_op="sum"), t.config.accumulate  # type: ignore
    total, predictions = torch.zeros((), device=t.fabric.device), []
    parts = [part.tolist() for part in torch.arange(len(images)).tensor_split(pieces)]
    for number, part in enumerate(parts):
        here = slice(part[0], part[-1] + 1) if part else slice(0, 1)  # without weight
        last = number == len(parts) - 1
        with t.fabric.no_backward_sync(t.model, enabled=not last):
            with t.fabric.autocast():  # Fabric itself casts `forward` alone
                outputs = t.task.outputs(t.model, images[here], targets[here])
            if t.teacher is not None:
                outputs = outputs | {TEACHER: _teach(t, images[here])}
            loss = share * t.loss(outputs, targets[here])
            if share < 1:
                loss = loss + (1 - share) * t.loss(outputs, other[here])
            loss = loss * (len(part) * world * bool(count) / everybody.to(loss).clamp(min=1))
            total = total + loss.detach()
            if last:  # one look at the loss a step: reading it makes a GPU wait
                mean = t.fabric.all_reduce(total, reduce_op="mean")
                shown, there = torch.stack([mean, everybody.to(mean)]).tolist()  # type: ignore[arg-type, list-item]
                if not math.isfinite(shown) or not there:
                    break
            t.fabric.backward(loss)
        if part and t.task.name == "single":  # an accuracy is shown
            predictions.append(outputs[t.net.prediction].detach())
    if not predictions or not math.isfinite(shown) or not there:
        return shown, torch.zeros(0, device=t.fabric.device), bool(there)
    return shown, torch.cat(predictions), True


@torch.no_grad()  # no inference mode: the loss keeps the logits for its backward pass
def _teach(t: Trainer, images: Tensor) -> Tensor:
    """The teacher's logits (B, classes) for what the student is given."""
    with t.fabric.autocast():
        return t.teacher(images)


def mix(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, seed: int, prob: float = 1.0, switch: float = 0.5
) -> tuple[Tensor, Tensor, float]:
    """Each sample mixed with its mirror place in the batch: samples, the others' targets, the share of its own.

    mixup (arXiv 1710.09412) blends, cutmix (arXiv 1905.04899) sets in a box of the other, at any number of axes; the
    arguments are the alphas of their Beta distributions. With both on, a draw decides, cutmix with the chance `switch`,
    as in timm; `prob` is the chance that the batch is mixed at all.
    """
    if not mixup and not cutmix:
        return images, targets, 1.0
    draw = np.random.default_rng(seed)
    if prob < 1 and draw.random() >= prob:
        return images, targets, 1.0
    box = bool(cutmix) and (not mixup or draw.random() < switch)
    alpha = cutmix if box else mixup
    share = float(draw.beta(alpha, alpha))
    if not box:
        return images.lerp(images.flip(0), 1 - share), targets.flip(0), share
    sides = images.shape[2:]
    cut = (1 - share) ** (1 / len(sides))
    mask = torch.ones(sides, dtype=torch.bool, device=images.device)
    for axis, side in enumerate(sides):
        centre, half = int(draw.integers(side)), round(side * cut) // 2
        near = torch.zeros(side, dtype=torch.bool, device=images.device)
        near[max(centre - half, 0) : centre + half] = True
        mask &= near.view(-1, *(1,) * (len(sides) - axis - 1))
    return torch.where(mask, images.flip(0), images), targets.flip(0), 1 - float(mask.double().mean())


def _together(loader: Any, fabric: Fabric) -> Iterator[Batch | list[Skipped]]:
    """As many rounds on every process as the one with the most batches needs."""
    rounds = int(fabric.all_gather(torch.tensor(len(loader), device=fabric.device)).max())  # type: ignore[union-attr]
    yield from loader
    for _ in range(rounds - len(loader)):
        yield []


@torch.inference_mode()
def eval_epoch(
    fabric: Fabric,
    model: nn.Module,
    loader: Iterable[Batch | list[Skipped]],
    task: Task,
    classes: tuple[str, ...],
    skipped: dict[str, str],
    watch: Watch,
    keep: Callable[[Tensor, Any, Any], object] | None = None,
    blank: Tensor | None = None,
) -> Scores:
    """Every process tests its share; all get the same Scores. `model` is in evaluation mode, and not wrapped.

    `keep` is shown each batch of this process: positions (B,), targets and predictions (B, ...) or lists. A model whose
    weights
    are spread runs on all processes or on none: who has no samples left runs it on `blank`.
    """
    meter = task.meter(classes, fabric.device)
    model.eval()
    for batch in loader if blank is None else _together(loader, fabric):
        note_skipped(skipped, batch, watch)
        if not isinstance(batch, Batch):
            if blank is not None:
                with fabric.autocast():
                    model(blank)
            continue
        images, targets = fabric.to_device(batch.images), fabric.to_device(batch.targets)
        with fabric.autocast():
            prediction = task.predict(model, images)
        if keep is not None:
            keep(batch.positions, targets, prediction)
        meter.update(batch.positions, targets, prediction)
    scores = meter.compute()
    if scores is None:
        raise TrainError("not one sample of this split could be read")
    return scores


def note_skipped(skipped: dict[str, str], batch: Batch | list[Skipped], watch: Watch) -> None:
    """Remember files that could not be read, and say so the first time."""
    for bad in batch.skipped if isinstance(batch, Batch) else batch:
        if bad.path not in skipped:
            skipped[bad.path] = bad.reason
            watch.note(f"skipped {bad.path}: {bad.reason}")
