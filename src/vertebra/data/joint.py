"""Sample and target changed together: class maps, boxes and masks go where the pixels go.

    train = joint_train(view, "segmentation", augment="standard", ignore=source.ignore)
    image, target = train(image, target)        # float (C, *S), (*S)

`loader.Samples` hands the target of a sample to a transform whose attribute `joint` is true. Everything random is drawn
from torch's global generator, which the loader seeds for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as vf

from .source import DataError
from .transforms import View, _Channels, _Reversed
from .waves import LEVELS, Prepare, WaveView

Dense = Literal["segmentation", "detection"]
# per level: range of random scales, chance of mirroring, photometric changes
JITTER: dict[str, tuple[tuple[float, float] | None, float, bool]] = {
    "none": (None, 0.0, False),
    "light": ((0.9, 1.1), 0.0, False),
    "standard": ((0.5, 2.0), 0.5, False),
    "strong": ((0.5, 2.0), 0.5, True),
}
TRIES = 10  # crops looked at before one with too much of one class is taken
BYTES = 2**31  # an enlarged sample may have


def joint_train(
    view: View | WaveView,
    task: Dense,
    augment: str = "standard",
    *,
    scale_jitter: tuple[float, float] | None = None,
    short_sides: Sequence[int] | None = None,
    max_size: int | None = None,
    hflip: float | None = None,
    vflip: float | None = None,
    flips: Sequence[float] | None = None,
    color_jitter: float | None = None,
    most: float = 0.75,
    ignore: int = 255,
) -> JointTransform:
    """What training makes of a sample and its target.

    Segmentation: images are scaled, cropped to `view.size` (what is too small filled with the mean, the target with
    `ignore`), mirrored, changed in colour and normalised. Signals and volumes: cropped to `view.size`, filled in the
    same way, scaled in intensity, shifted and given noise. `augment` none stretches to `view.size` instead.
    Detection: images in 0..1, not normalised, of any size; crowds leave the target. With `scale_jitter` the image is
    scaled and then cropped to at most its old size; boxes of which nothing is left are dropped with label and mask.

    augment: none, light, standard or strong: usual values of all that is None here.
    scale_jitter: (low, high), the range of the random scale. Detection has none by default.
    short_sides, max_size: first the shorter side becomes one of these, drawn at random, the longer at most `max_size`.
    hflip, vflip: chance of mirroring an image.
    flips: the same for each axis of a signal or volume; none by default.
    color_jitter: largest change of brightness, contrast and saturation.
    most: no class should cover more of a crop of an image (tried ten times).

    Raises ValueError for values that contradict each other.
    """
    if augment not in JITTER:
        raise ValueError(f"augment: must be one of {', '.join(JITTER)}, got {augment!r}")
    if scale_jitter is not None and not 0 < scale_jitter[0] <= scale_jitter[1] <= 16:
        raise ValueError(f"scale_jitter: needs 0 < low <= high <= 16, got {scale_jitter}")
    if isinstance(view, WaveView):
        if task == "detection":
            raise ValueError("detection is for images, and the data are signals or volumes")
        if scale_jitter is not None or short_sides is not None:
            raise ValueError("scale_jitter and short_sides are for images, and the data are signals or volumes")
        chances = tuple(flips or ())
        if chances and len(chances) != len(view.size):
            raise ValueError(f"flips: needs {len(view.size)} chances, one for each axis, got {len(chances)}")
        return WaveMaps(view, augment, chances, ignore)
    jitter, mirrored, photometric = JITTER[augment]
    if task == "detection":
        jitter = None
    return ImageJoint(
        view,
        task,
        still=augment == "none" and scale_jitter is None and short_sides is None,
        jitter=scale_jitter or jitter,
        short_sides=tuple(short_sides or ()),
        max_size=max_size,
        hflip=mirrored if hflip is None else hflip,
        vflip=vflip or 0.0,
        colour=_colour(color_jitter, photometric),
        most=most,
        ignore=ignore,
    )


def joint_eval(
    view: View | WaveView,
    task: Dense,
    *,
    short: int | None = None,
    max_size: int | None = None,
    fixed: bool = False,
    ignore: int = 255,
) -> JointTransform:
    """What testing makes of a sample; the target stays as it is, at its own size, and so do boxes and crowds.

    Segmentation: the sample normalised, at its own size; with `fixed` it is resized to `view.size`, with `short` (of
    images) its shorter side to that, the longer to at most `max_size`. Detection: the image in 0..1, at its own size.
    """
    if isinstance(view, WaveView) and (task == "detection" or short is not None):
        raise ValueError("detection and sizes by the shorter side are for images, and the data are signals or volumes")
    return EvalJoint(view, task, short, max_size, fixed)


class JointTransform:
    """(sample (C, *S), target) -> (sample, target)."""

    joint = True

    def __call__(self, sample: Tensor, target: Any) -> tuple[Tensor, Any]:
        raise NotImplementedError


@dataclass
class EvalJoint(JointTransform):
    view: View | WaveView
    task: Dense
    short: int | None
    max_size: int | None
    fixed: bool

    def __call__(self, sample: Tensor, target: Any) -> tuple[Tensor, Any]:
        view = self.view
        if isinstance(view, WaveView):
            x = _prepared(sample, view)
            return (_resized_wave(x, view.size) if self.fixed else x), target
        image = _Channels(view.channels)(sample)
        if self.task == "detection":
            return _unit(image, view), target
        size = view.size if self.fixed else None
        if size is None and self.short is not None:
            size = by_short_side(_sides(image), self.short, self.max_size)
        if size is not None and size != _sides(image):
            image = vf.resize(image, list(size), InterpolationMode(view.interpolation), antialias=True)
        return _normalised(image, view), target


@dataclass
class ImageJoint(JointTransform):
    """See `joint_train`."""

    view: View
    task: Dense
    still: bool
    jitter: tuple[float, float] | None
    short_sides: tuple[int, ...]
    max_size: int | None
    hflip: float
    vflip: float
    colour: torch.nn.Module | None
    most: float
    ignore: int

    def __call__(self, sample: Tensor, target: Any) -> tuple[Tensor, Any]:
        image = tv_tensors.Image(_Channels(self.view.channels)(sample))
        if self.task == "detection":
            image, found = self._objects(image, wrapped(target, _sides(image)))
            return _unit(image.as_subclass(Tensor), self.view), found
        image, mask = self._maps(image, tv_tensors.Mask(_fitting(target, _sides(image))))
        return _normalised(image.as_subclass(Tensor), self.view), mask.as_subclass(Tensor)

    def _scaled(self, sides: tuple[int, int]) -> tuple[int, int]:
        """The size that an image of this size is brought to."""
        size = sides
        if self.short_sides:
            size = by_short_side(sides, self.short_sides[_below(len(self.short_sides))], self.max_size)
        if self.jitter is not None:
            by = _uniform(*self.jitter)
            size = max(1, round(size[0] * by)), max(1, round(size[1] * by))
        if math.prod(size) * self.view.channels * 4 > BYTES:
            raise DataError(f"an image of {sides} scaled to {size} is over {BYTES} bytes")
        return size

    def _maps(self, image: Any, mask: Any) -> tuple[Any, Any]:
        mode = InterpolationMode(self.view.interpolation)
        size = self.view.size if self.still else self._scaled(_sides(image))
        if size != _sides(image):
            image, mask = vf.resize(image, list(size), mode, antialias=True), _resized_mask(mask, size)
        if not self.still:
            image, mask = self._cropped(image, mask)
        image, mask = self._flipped(image, mask)
        return (image if self.colour is None else self.colour(image)), mask

    def _cropped(self, image: Any, mask: Any) -> tuple[Any, Any]:
        height, width = self.view.size
        down, right = (max(0, want - have) for want, have in zip(self.view.size, _sides(image), strict=True))
        if down or right:
            mean = [round(255 * m) for m in (self.view.mean[::-1] if _turned(self.view) else self.view.mean)]
            image = vf.pad(image, [0, 0, right, down], fill=mean)
            mask = vf.pad(mask, [0, 0, right, down], fill=self.ignore)
        rows, columns = _sides(image)
        for _ in range(TRIES):
            top, left = _below(rows - height + 1), _below(columns - width + 1)
            part = mask[..., top : top + height, left : left + width]
            known = part[part != self.ignore]
            if self.most >= 1 or (known.numel() and known.long().bincount().max() <= self.most * known.numel()):
                break
        return vf.crop(image, top, left, height, width), vf.crop(mask, top, left, height, width)

    def _flipped(self, image: Any, *others: Any) -> tuple[Any, ...]:
        items: tuple[Any, ...] = (image, *others)
        if self.hflip and _uniform(0, 1) < self.hflip:
            items = tuple(vf.horizontal_flip(v) for v in items)
        if self.vflip and _uniform(0, 1) < self.vflip:
            items = tuple(vf.vertical_flip(v) for v in items)
        return items

    def _objects(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        target = _kept(target, ~target["iscrowd"])
        old = _sides(image)
        size = self._scaled(old)
        spatial = [key for key in ("boxes", "masks") if key in target]
        if size != old:
            mode = InterpolationMode(self.view.interpolation)
            image = vf.resize(image, list(size), mode, antialias=True)
            target["boxes"] = vf.resize(target["boxes"], list(size))
            if "masks" in target:
                target["masks"] = _resized_mask(target["masks"], size)
        height, width = min(old[0], size[0]), min(old[1], size[1])
        cut = self.jitter is not None and (height, width) != size
        if cut:
            top, left = _below(size[0] - height + 1), _below(size[1] - width + 1)
            image = vf.crop(image, top, left, height, width)
            target |= {key: vf.crop(target[key], top, left, height, width) for key in spatial}
        image, *moved = self._flipped(image, *(target[key] for key in spatial))
        target |= dict(zip(spatial, moved, strict=True))
        target |= {"boxes": vf.clamp_bounding_boxes(target["boxes"])}  # what is cut off, and what float32 rounds
        if self.colour is not None:
            image = self.colour(image)
        return image, measured({key: v.as_subclass(Tensor) for key, v in target.items()}, cut)


def wrapped(target: dict[str, Tensor], sides: tuple[int, int]) -> dict[str, Any]:
    """Boxes and masks as tv_tensors, which torchvision's transforms know how to move."""
    kind = tv_tensors.BoundingBoxFormat.XYXY
    out: dict[str, Any] = dict(target)
    out["boxes"] = tv_tensors.BoundingBoxes(target["boxes"].clone(), format=kind, canvas_size=sides)  # type: ignore[call-overload]
    if "masks" in target:
        out["masks"] = tv_tensors.Mask(_fitting(target["masks"], sides))
    return out


def measured(target: dict[str, Tensor], cut: bool) -> dict[str, Tensor]:
    """Objects of which something is left, with the areas of now; boxes that were `cut` are tight around their masks."""
    if "masks" in target:
        there = target["masks"].flatten(1).bool().any(1)
        target = _kept(target, there)
        if cut:
            target["boxes"] = tight_boxes(target["masks"])
        target["area"] = target["masks"].flatten(1).sum(1).float()
    sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
    target = _kept(target, (sides > 1e-3).all(1))
    if "masks" not in target:
        target["area"] = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(1)
    return target


def tight_boxes(masks: Tensor) -> Tensor:
    """(N, H, W), none of them empty -> (N, 4) the smallest boxes (x1, y1, x2, y2) that hold all their pixels."""
    ends = []
    for axis in (1, 2):  # columns give x, rows y
        line = masks.bool().any(axis).int()
        first = line.argmax(1) if line.numel() else line.sum(1)
        last = line.shape[1] - (line.flip(1).argmax(1) if line.numel() else line.sum(1))
        ends.append((first, last))
    (left, right), (top, bottom) = ends
    return torch.stack([left, top, right, bottom], 1).float()


class WaveMaps(JointTransform):
    """Signals and volumes with class maps: see `joint_train`."""

    def __init__(self, view: WaveView, augment: str, flips: tuple[float, ...], ignore: int) -> None:
        self.view, self.augment, self.flips, self.ignore = view, augment, flips, ignore

    def __call__(self, sample: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        view = self.view
        x, target = _prepared(sample, view), _fitting(target, tuple(sample.shape[1:]))
        if self.augment == "none":
            return _resized_wave(x, view.size), _nearest(target, view.size)
        x, target = crop_or_fill(x, target, view.size, self.ignore)
        for axis, chance in enumerate(self.flips):
            if _uniform(0, 1) < chance:
                x, target = x.flip(axis + 1), target.flip(axis)
        noise, scale, *_ = LEVELS[self.augment]
        wave, beside = x.split([x.shape[0] - view.beside, view.beside])
        wave = wave * (1 + _uniform(-scale, scale)) + _uniform(-scale, scale) / 2
        return torch.cat([wave + noise * torch.randn_like(wave), beside]), target


def crop_or_fill(x: Tensor, target: Tensor, size: tuple[int, ...], ignore: int) -> tuple[Tensor, Tensor]:
    """(C, *S) and (*S) -> (C, *size) and (*size): cut at random, filled at the end with zeros and `ignore`."""
    for axis, want in enumerate(size):
        have = target.shape[axis]
        if have > want:
            start = _below(have - want + 1)
            x, target = x.narrow(axis + 1, start, want), target.narrow(axis, start, want)
    gap = [v for want, have in zip(reversed(size), reversed(target.shape), strict=True) for v in (0, want - have)]
    return F.pad(x, gap), F.pad(target, gap, value=ignore)


def by_short_side(sides: tuple[int, int], short: int, longest: int | None) -> tuple[int, int]:
    """The size at which the shorter side is `short`, or less so that the longer one is at most `longest`."""
    by = short / min(sides)
    if longest is not None:
        by = min(by, longest / max(sides))
    return max(1, round(sides[0] * by)), max(1, round(sides[1] * by))


def _prepared(x: Tensor, view: WaveView) -> Tensor:
    """Scaled as the model is given it, at its own size."""
    return Prepare(replace(view, size=tuple(x.shape[1:])))(x)


def _resized_wave(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[1:]) == tuple(size):
        return x
    return F.interpolate(x[None], size, mode=("linear", "bilinear", "trilinear")[len(size) - 1])[0]


def _resized_mask(mask: Any, size: tuple[int, int]) -> Any:
    return tv_tensors.wrap(_nearest(mask.as_subclass(Tensor), size), like=mask)


def _nearest(target: Tensor, size: tuple[int, ...]) -> Tensor:
    """(..., *S) -> (..., *size): the values of the positions whose middles are nearest.

    torchvision resizes masks by the position's corner, which shifts them against the image by up to half a pixel.
    """
    for axis, want in enumerate(size, start=target.ndim - len(size)):
        have = target.shape[axis]
        target = target.index_select(axis, ((2 * torch.arange(want) + 1) * have).div(2 * want, rounding_mode="floor"))
    return target


def _fitting(maps: Tensor, sides: tuple[int, ...]) -> Tensor:
    if tuple(maps.shape[maps.ndim - len(sides) :]) != sides:
        raise DataError(f"a sample of size {sides} has a target of size {tuple(maps.shape)}")
    return maps


def _kept(target: dict[str, Any], keep: Tensor) -> dict[str, Any]:
    if bool(keep.all()):
        return dict(target)
    return {key: tv_tensors.wrap(v[keep], like=v) if isinstance(v, tv_tensors.TVTensor) else v[keep]
            for key, v in target.items()}  # fmt: skip


def _sides(image: Tensor) -> tuple[int, int]:
    return int(image.shape[-2]), int(image.shape[-1])


def _turned(view: View) -> bool:
    return view.order == "BGR" and view.channels == 3


def _unit(image: Tensor, view: View) -> Tensor:
    """uint8 -> 0..1, channels in the view's order."""
    return vf.to_dtype(_Reversed()(image) if _turned(view) else image, torch.float32, scale=True)


def _normalised(image: Tensor, view: View) -> Tensor:
    return vf.normalize(_unit(image, view), list(view.mean), list(view.std))


def _colour(jitter: float | None, photometric: bool) -> torch.nn.Module | None:
    if jitter:
        return v2.ColorJitter(jitter, jitter, jitter)
    # SSD's ranges (arXiv 1512.02325), as mmsegmentation uses them: brightness by 32 of 255, hue by 18 of 360 degrees
    return v2.ColorJitter(32 / 255, 0.5, 0.5, 18 / 360) if photometric and jitter is None else None


def _uniform(low: float, high: float) -> float:
    return float(torch.empty((), dtype=torch.float64).uniform_(low, high)) if high > low else low


def _below(n: int) -> int:
    """A whole number of 0..n-1."""
    return int(torch.randint(n, ()))
