"""A few test samples of a report: what is true and what the network says, drawn side by side."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import DataError, Split
from .dense import at_size
from .task import Scores

LARGEST = 640  # pixels of the longer side of a picture
SURE = 0.3  # the score from which a found object is drawn


def draw_samples(
    split: Split,
    classes: tuple[str, ...],
    task: Any,
    scores: Scores,
    ask: Callable[[Tensor, Any], Any],
    ignore: int = 255,
    most: int = 6,
) -> str:
    """HTML of `most` samples of a split: of class maps the worst and the best, of objects some from all over the split.

    `ask` takes a sample as it is read and its target, and gives the model's prediction of it alone.
    """
    segments = task.name == "segmentation"
    rows = scores.rows
    if segments:
        hit, _, true = rows[:, 2:].view(len(rows), 3, len(classes)).sum(2).unbind(1)
        order = (hit / true.clamp(min=1)).argsort(stable=True).tolist()
        chosen = [*order[: most // 2], *order[-(most - most // 2) :]]
    else:
        chosen = torch.linspace(0, len(rows) - 1, min(most, len(rows))).round().long().tolist()
    items = []
    for row in dict.fromkeys(chosen):
        position = int(rows[row, 0])
        try:
            sample, target = split.read(position), split.target(position)
        except DataError:  # it could be read a moment ago
            continue
        found = ask(sample, target)
        pictures = (
            _maps(sample, target, found, classes, ignore) if segments else _objects(sample, target, found, classes)
        )
        said = f"{float(hit[row] / true[row].clamp(min=1)):.1%} of the cells right · " if segments else ""
        images = "".join(f'<img alt="{what}" src="data:image/png;base64,{content}">' for what, content in pictures)
        items.append(f"<p>{said}{html.escape(split.names[position])}</p><div class=mistakes>{images}</div>")
    told = "The worst first, the best last. " if segments else f"Objects with a score of at least {SURE}. "
    return f"<p>{told}Truth, then prediction.</p>{''.join(items)}"


def _maps(sample: Tensor, target: Any, logits: Tensor, classes: tuple[str, ...], ignore: int) -> list[tuple[str, str]]:
    from ..tasks.draw import as_picture, draw_classes, draw_signal, draw_slices

    truth = torch.as_tensor(target).long()
    said = at_size(logits[None].float(), truth.shape)[0].argmax(0).cpu()
    skip = (0, ignore)  # the first class is the ground in most sets: what lies on it shows better without
    drawn = []
    for what, labels in (("truth", truth), ("prediction", said)):
        if labels.ndim == 1:
            content = draw_signal(sample, labels, classes, [*range(len(classes), ignore + 1)])
            drawn.append((what, base64.b64encode(content).decode()))
        elif labels.ndim == 3:
            drawn.append((what, _png(draw_slices(sample.float(), labels, skip=skip))))
        else:
            drawn.append((what, _png(draw_classes(as_picture(sample), labels, skip=skip))))
    return drawn


def _objects(sample: Tensor, target: Any, found: dict[str, Tensor], classes: tuple[str, ...]) -> list[tuple[str, str]]:
    from ..tasks.draw import as_picture, draw_objects

    true = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["labels"]))}
    if "masks" in target and "masks" in found:
        true["masks"] = target["masks"][:, None].float()
    found = {key: value.cpu() for key, value in found.items()}
    picture = as_picture(sample)
    return [
        (what, _png(draw_objects(picture, one, classes, SURE))) for what, one in (("truth", true), ("found", found))
    ]


def _png(picture: Tensor) -> str:
    from ..tasks.draw import picture_file

    longest = max(picture.shape[1:])
    if longest > LARGEST:
        size = [max(1, round(side * LARGEST / longest)) for side in picture.shape[1:]]
        picture = F.interpolate(picture[None].float(), size, mode="area")[0].round().to(torch.uint8)
    return base64.b64encode(picture_file(picture)).decode()
