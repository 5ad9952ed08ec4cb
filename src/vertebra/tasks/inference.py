"""Asking a trained model of places: sliding windows, mirrored and resized copies, and their answers put together.

Windows and test-time copies as in mmsegmentation's "slide" mode (github.com/open-mmlab/mmsegmentation) and the COCO
tables of detection papers: copies are mirrored along the last axis and resized, their answers brought back and merged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.space import Sizes, ntuple, resize


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows along an axis begin: every `stride` cells, the last one moved back inside."""
    if window >= side:
        return [0]
    count = math.ceil((side - window) / stride) + 1
    return [min(i * stride, side - window) for i in range(count)]


@torch.no_grad()
def segment(
    model: nn.Module,
    image: Tensor,
    window: Sizes | None = None,
    stride: Sizes | None = None,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    batch: int = 4,
) -> Tensor:
    """Logits (classes, *S), float32, of one sample (C, *S) of any rank, prepared as the model takes it.

    With a `window` (cells of each axis) the model sees windows of that size, `batch` at a time, every `stride` cells
    (default: two thirds of the window), and each cell's logits are the mean over the windows that cover it; an axis
    shorter than the window is taken whole. With `flip` a copy mirrored along the last axis, and with `scales` a copy of
    each size, is looked at as well: then the result is the logarithm of the mean of their probabilities, which argmax
    and softmax read like logits. Copies have at least the model's `min_size`. Raises ValueError for a model in training
    mode and for windows, strides and scales that cannot be.
    """
    _check(model, scales)
    sides = tuple(image.shape[1:])
    windows, strides = _windows(window, stride, len(sides))
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    least = min(getattr(model, "min_size", 1), *sides)  # what is too small as it is, the model refuses itself
    total, copies = None, 0
    for scale in scales:
        size = tuple(max(round(side * scale), least) for side in sides)
        copy = resized(image, size, smooth=True)
        for mirrored in (False, True) if flip else (False,):
            logits = _slide(model, copy.flip(-1) if mirrored else copy, windows, strides, batch)
            logits = resized(logits.flip(-1) if mirrored else logits, sides)
            if not flip and len(scales) == 1:
                return logits
            chances = logits.softmax(0)
            total, copies = chances if total is None else total + chances, copies + 1
    assert total is not None
    return (total / copies).clamp_min(torch.finfo(total.dtype).tiny).log()


def resized(x: Tensor, size: Sequence[int], smooth: bool = False) -> Tensor:
    """A sample or its logits (C, *S) at another size (C, *size): linear, with `smooth` averaged where it shrinks."""
    if tuple(x.shape[1:]) == tuple(size):
        return x
    small = smooth and any(new < old for new, old in zip(size, x.shape[1:], strict=True))
    return resize(x.movedim(0, -1)[None], tuple(size), antialias=small)[0].movedim(-1, 0)


def class_map(logits: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """The likeliest class of each cell, (*S) int64, of logits (classes, *S), brought to `size` first."""
    return (logits if size is None else resized(logits.float(), size)).argmax(0)


def _check(model: nn.Module, scales: Sequence[float]) -> None:
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() first")
    if not scales or any(not 0 < scale < math.inf for scale in scales):
        raise ValueError(f"scales must be positive numbers, at least one, got {scales!r}")


def _windows(window: Sizes | None, stride: Sizes | None, ndim: int) -> tuple[Any, Any]:
    if window is None:
        if stride is not None:
            raise ValueError(f"stride {stride!r} needs a window")
        return None, None
    windows = ntuple(window, ndim, "window")
    strides = tuple(max(2 * w // 3, 1) for w in windows) if stride is None else ntuple(stride, ndim, "stride")
    if min(windows) < 1 or any(not 1 <= s <= w for s, w in zip(strides, windows, strict=True)):
        raise ValueError(f"windows of {windows} every {strides} cells leave gaps: a stride lies in 1..window")
    return windows, strides


def _slide(model: nn.Module, x: Tensor, windows: Any, strides: Any, batch: int) -> Tensor:
    """Logits (classes, *S) of (C, *S), the mean over windows."""
    sides = tuple(x.shape[1:])
    if windows is None or all(w >= side for w, side in zip(windows, sides, strict=True)):
        return model(x[None])[0].float()
    starts = [window_starts(*axis) for axis in zip(sides, windows, strides, strict=True)]
    places = [tuple(slice(a, a + w) for a, w in zip(at, windows, strict=True)) for at in itertools.product(*starts)]
    total, cover = None, torch.zeros(sides, device=x.device)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        logits = model(torch.stack([x[(slice(None), *place)] for place in some])).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], *sides)
        for place, part in zip(some, logits, strict=True):
            total[(slice(None), *place)] += part
            cover[place] += 1
    assert total is not None
    return total / cover


@torch.no_grad()
def detect(
    model: nn.Module,
    image: Tensor,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    iou: float = 0.5,
    most: int | None = None,
) -> dict[str, Tensor]:
    """Objects in one image (C, H, W), float 0..1: boxes (N, 4) xyxy in its pixels, labels, scores, masks (N, 1, H, W).

    With `flip` a mirrored copy, and with `scales` a copy of each size relative to the detector's own, is looked at as
    well; of boxes of one class that overlap by more than `iou` the best stays (non-maximum suppression), at most `most`
    in all, best first. Raises ValueError for a model in training mode and for scales that cannot be.
    """
    from torchvision.ops import batched_nms

    _check(model, scales)
    found = []
    for scale in scales:
        for mirrored in (False, True) if flip else (False,):
            one = _looked(model, image.flip(-1) if mirrored else image, scale)
            found.append(_mirrored(one, image.shape[-1]) if mirrored else one)
    if len(found) > 1:
        merged = {key: torch.cat([one[key] for one in found]) for key in found[0]}
        keep = batched_nms(merged["boxes"].float(), merged["scores"].float(), merged["labels"], iou)
        found = [{key: value[keep] for key, value in merged.items()}]
    return {key: value[:most] for key, value in found[0].items()}


def _looked(model: nn.Module, image: Tensor, scale: float) -> dict[str, Tensor]:
    """The model's answer for one image, seen `scale` times as large as usual."""
    with _scaled(model, scale) as inside:
        if inside or scale == 1:
            return dict(model([image])[0])
    sides = image.shape[1:]
    size = [max(round(side * scale), 1) for side in sides]
    found = dict(model([resized(image, size, smooth=True)])[0])
    height, width = (old / new for old, new in zip(sides, size, strict=True))
    found["boxes"] = found["boxes"] * found["boxes"].new_tensor([width, height, width, height])
    if "masks" in found:
        found["masks"] = resize(found["masks"].movedim(1, -1), tuple(sides)).movedim(-1, 1)
    return found


@contextmanager
def _scaled(model: nn.Module, scale: float) -> Iterator[bool]:
    """The size that the detector brings images to, times `scale`; False for a model that takes them as they are.

    Resizing the image itself would be undone by the detector's own resizing.
    """
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    inside = next((m for m in model.modules() if isinstance(m, GeneralizedRCNNTransform)), None)
    if inside is None or scale == 1:
        yield inside is not None
        return
    before = inside.min_size, inside.max_size, inside.fixed_size
    inside.min_size = tuple(max(round(side * scale), 1) for side in before[0])
    inside.max_size = max(round(before[1] * scale), 1)
    if before[2] is not None:
        inside.fixed_size = tuple(max(round(side * scale), 1) for side in before[2])
    try:
        yield True
    finally:
        inside.min_size, inside.max_size, inside.fixed_size = before


def _mirrored(found: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """What was found in a mirrored image of that width, where it is in the image itself."""
    left, top, right, bottom = found["boxes"].unbind(-1)
    out = dict(found) | {"boxes": torch.stack([width - right, top, width - left, bottom], -1)}
    if "masks" in found:
        out["masks"] = found["masks"].flip(-1)
    return out
