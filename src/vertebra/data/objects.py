"""Boxes and masks of objects, checked before anything is believed: run lengths, polygons, and what to do with bad ones.

Run lengths are COCO's: pixels down the columns, a run of 0 first. https://cocodataset.org/#format-data
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .folder import FORMATS, GREY, read_image
from .source import DataError, Skipped, Source, Split, carve

BYTES = 2**31  # masks of one image may take together
TEXT = 2**31  # a file of annotations may have
ROUND = 1.0  # pixels by which a box may stick out: rounding, and clipped
OUTLINE = 10**7  # pixels, the longest outline of a polygon
Shape = np.ndarray | list[np.ndarray]  # run lengths (n,), or polygons (points, 2) in x, y


@dataclass
class Complaints:
    """What is wrong with the annotations: the first is an error (`stop`), or all are named and left out (`skip`)."""

    bad: str
    skipped: list[Skipped] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.bad not in ("stop", "skip"):
            raise DataError(f"bad: must be stop or skip, got {self.bad!r}")

    def add(self, where: str, reason: str) -> None:
        if self.bad == "stop":
            raise DataError(f"{where}: {reason} (data_options.bad=skip leaves it out)")
        self.skipped.append(Skipped(where, reason))


@dataclass
class Objects:
    """Those of one image of `size` (height, width)."""

    size: tuple[int, int]
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # x1, y1, x2, y2
    labels: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)  # none, or one an object


class Targets:
    """The i-th image's objects as tensors: boxes (N, 4), labels (N,), iscrowd (N,), area (N,), masks (N, H, W)."""

    def __init__(self, found: list[Objects], names: Sequence[str], masks: bool) -> None:
        self.found, self.names, self.masks = found, names, masks

    def __call__(self, i: int) -> dict[str, Tensor]:
        one = self.found[i]
        out = {
            "boxes": torch.tensor(one.boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(one.labels, dtype=torch.int64),
            "iscrowd": torch.tensor(one.crowd, dtype=torch.bool),
            "area": torch.tensor(one.area, dtype=torch.float32),
        }
        if self.masks:
            height, width = one.size
            if (need := len(one.shapes) * height * width) > BYTES:
                raise DataError(f"{self.names[i]}: its {len(one.shapes)} masks take {need} bytes, over {BYTES}")
            masks = torch.zeros(len(one.shapes), height, width, dtype=torch.uint8)
            for place, shape in enumerate(one.shapes):
                masks[place] = torch.from_numpy(mask_of(shape, one.size))
            out["masks"] = masks
        return out


class Pictures:
    """Reads the i-th image; `upright` says whether it is turned as its EXIF tag says."""

    def __init__(self, paths: list[Path], upright: list[bool], channels: int) -> None:
        self.paths, self.upright, self.channels = paths, upright, channels

    def __call__(self, i: int) -> Tensor:
        return read_image(self.paths[i], self.channels, upright=self.upright[i])


def header(path: Path) -> tuple[tuple[int, int], bool, bool]:
    """Of an image: (height, width) as stored, whether EXIF lays it on its side, whether it is grey. DataError."""
    from PIL import Image

    if not path.is_file():
        raise DataError(f"{path}: no such image")
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = path.suffix.lower() in (".jpg", ".jpeg", ".tif", ".tiff") and image.getexif().get(0x0112, 1) in (
                5, 6, 7, 8,
            )  # fmt: skip
            return (image.height, image.width), turned, image.mode in GREY or image.mode.startswith("I;16")
    except Exception as e:  # as in read_image: decoders raise almost anything
        raise DataError(f"{path}: not an image that can be read ({' '.join(str(e).split())[:120]})") from e


def fitting(path: Path, size: tuple[int, int] | None) -> tuple[tuple[int, int], bool, bool]:
    """(height, width), whether to turn by EXIF so that the image has the `size` of its annotation, whether grey."""
    stored, turned, grey = header(path)
    seen = (stored[1], stored[0]) if turned else stored
    if size is None or size == seen:
        return seen, True, grey
    if size == stored:
        return stored, False, grey
    raise DataError(f"{path}: is {seen[1]}x{seen[0]} (width x height), its annotation says {size[1]}x{size[0]}")


def inside(place: Path, name: Any, where: str) -> Path:
    """The file `name` below `place`. DataError for one that leads out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise DataError(f"{where}: {name!r} is no file name")
    pure, odd = PurePosixPath(name), PureWindowsPath(name)
    if pure.is_absolute() or odd.drive or odd.root or ".." in (*pure.parts, *odd.parts):
        raise DataError(f"{where}: the file name {name!r} leads out of the data's folder")
    return place / name


def numbers(values: Any, count: int | None = None) -> list[float] | None:
    """Finite numbers from json, or None."""
    if not isinstance(values, list) or (count is not None and len(values) != count):
        return None
    good = all(type(v) in (int, float) and abs(v) < 1e15 for v in values)  # a comparison that NaN and inf fail
    return [float(v) for v in values] if good else None


def box_within(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float] | str:
    """(x1, y1, x2, y2) clipped by less than a pixel of rounding, or what is wrong with it."""
    height, width = size
    x1, y1, x2, y2 = box
    told = f"box {', '.join(f'{v:g}' for v in box)} (x1, y1, x2, y2)"
    if x2 <= x1 or y2 <= y1:
        return f"{told} has no area"
    if min(x1, y1) < -ROUND or x2 > width + ROUND or y2 > height + ROUND:
        return f"{told} is outside the image of {width}x{height}"
    clipped = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    return clipped if clipped[0] < clipped[2] and clipped[1] < clipped[3] else f"{told} has no area in the image"


def shape_within(segmentation: Any, size: tuple[int, int]) -> Shape | str:
    """COCO's `segmentation` (polygons, run lengths as a list or as a string), or what is wrong with it."""
    if isinstance(segmentation, dict):
        given, counts = segmentation.get("size"), segmentation.get("counts")
        if given != list(size):
            return f"its mask is of another size, {given}, than the image, {list(size)} (height, width)"
        try:
            found = _list_of_runs(counts) if isinstance(counts, list) else runs_of(counts, 2 * math.prod(size))
        except ValueError as e:
            return f"its mask cannot be decoded: {e}"
        if (pixels := sum(found)) != math.prod(size):  # python's integers, which do not overflow
            return f"its mask has {pixels} pixels, the image {math.prod(size)}"
        runs = np.array(found, np.uint32)
        return runs if runs[1::2].any() else "its mask is empty"
    if not isinstance(segmentation, list) or not segmentation:
        return "has no mask (data_options.masks=false takes the boxes alone)"
    parts, outline = [], 0.0
    for part in segmentation:
        flat = numbers(part)
        if flat is None or len(flat) < 6 or len(flat) % 2:
            return f"a polygon of its mask needs three or more pairs of numbers, got {str(part)[:60]}"
        points = np.array(flat).reshape(-1, 2)
        limits = np.array([size[1], size[0]])
        if (points < -limits).any() or (points > 2 * limits).any():
            return "a polygon of its mask is far outside the image"
        outline += float(np.abs(points - np.roll(points, 1, 0)).max(1).sum())
        parts.append(points)
    return parts if outline <= OUTLINE else f"the polygons of its mask have an outline of {outline:.0f} pixels"


def _list_of_runs(counts: list[Any]) -> list[int]:
    if not counts or not all(type(v) is int and 0 <= v < 2**40 for v in counts):
        raise ValueError("its run lengths must be whole numbers from 0")
    return counts


def runs_of(text: Any, most: int) -> list[int]:
    """Run lengths from COCO's string: five bits a character from 48 on, a sixth where more follow, low bits first.

    From the fourth run on the difference to the run before the last is what is written. ValueError.
    """
    if not isinstance(text, str | bytes) or not text:
        raise ValueError("its run lengths must be a list or a string")
    codes = [c - 48 for c in (text.encode("latin-1", "replace") if isinstance(text, str) else text)]
    runs: list[int] = []
    value = bits = 0
    for code in codes:
        if not 0 <= code < 64 or bits > 35:
            raise ValueError(f"{chr(code + 48)!r} in its string of run lengths")
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:  # a negative number
            value -= 1 << bits
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        if runs[-1] < 0 or runs[-1] > most or len(runs) > most + 2:
            raise ValueError(f"a run of {runs[-1]}")
        value = bits = 0
    if bits:
        raise ValueError("its string of run lengths is cut off")
    return runs


def text_of(runs: Iterable[int]) -> str:
    """COCO's string of run lengths: what `runs_of` reads."""
    out, before = [], list[int]()
    for run in map(int, runs):
        value = run - before[-2] if len(before) > 2 else run
        before.append(run)
        more = True
        while more:
            low, value = value & 31, value >> 5
            more = value != (-1 if low & 16 else 0)
            out.append(chr(48 + (low | 32 * more)))
    return "".join(out)


def runs_from(mask: np.ndarray) -> np.ndarray:
    """(H, W) of 0 and 1 -> run lengths."""
    flat = np.concatenate([[0], np.asarray(mask).astype(bool).T.ravel().astype(np.int8), [-1]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(edges, prepend=0) if len(edges) else np.array([0])


def mask_of(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    """(H, W) uint8 of 0 and 1. Polygons are drawn as COCO's tools do, by faster-coco-eval or pycocotools."""
    height, width = size
    if isinstance(shape, np.ndarray):
        bits = np.repeat((np.arange(len(shape)) % 2).astype(np.uint8), shape)
        return np.ascontiguousarray(bits.reshape(width, height).T)
    tools = coco_tools()
    drawn = tools.frPyObjects([part.ravel().tolist() for part in shape], height, width)
    return np.ascontiguousarray(tools.decode(tools.merge(drawn)))


def coco_tools() -> Any:
    """COCO's mask functions. DataError where neither library that has them is installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        try:
            from pycocotools import mask  # type: ignore[import-not-found, no-redef]
        except ImportError as e:
            needed = "pip install 'vertebra[dense]' (faster-coco-eval)"
            raise DataError(f"masks drawn as polygons need {needed}, or data_options.masks=false") from e
    return mask


def area_of(shape: Shape) -> float:
    """Pixels of run lengths; of polygons the areas within them."""
    if isinstance(shape, np.ndarray):
        return float(shape[1::2].sum())
    turns = [p[:, 0] @ np.roll(p[:, 1], -1) - p[:, 1] @ np.roll(p[:, 0], -1) for p in shape]
    return float(sum(abs(turn) / 2 for turn in turns))


@dataclass
class Gathered:
    """The images of one split with their objects."""

    names: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    upright: list[bool] = field(default_factory=list)
    objects: list[Objects] = field(default_factory=list)
    grey: bool = True

    def add(self, name: str, path: Path, upright: bool, grey: bool, found: Objects) -> None:
        self.names.append(name)
        self.paths.append(path)
        self.upright.append(upright)
        self.objects.append(found)
        self.grey &= grey

    def digest(self) -> bytes:
        h = hashlib.sha256()
        for one in self.objects:
            h.update(repr((one.size, one.boxes, one.labels, one.crowd)).encode())
            for shape in one.shapes:
                for part in [shape] if isinstance(shape, np.ndarray) else shape:
                    h.update(repr(part.shape).encode() + part.astype("<f8").tobytes())
        return h.digest()


def finish(
    root: Path,
    kind: str,
    classes: tuple[str, ...],
    parts: dict[str, Gathered],
    complaints: Complaints,
    masks: bool,
    empty: str,
    shares: dict[str, float],
    notes: list[str],
) -> Source:
    """The Source of what was gathered: missing splits carved off train, a missing test split the validation's."""
    if empty not in ("keep", "drop"):
        raise DataError(f"{root}: empty must be keep or drop, got {empty!r}")
    channels = 1 if all(part.grey for part in parts.values()) else 3
    h = hashlib.sha256()
    splits: dict[str, Split] = {}
    for key, part in parts.items():
        h.update(key.encode() + part.digest())
        kept = [i for i, one in enumerate(part.objects) if one.boxes or empty == "keep"]
        bare = sum(not one.boxes for one in part.objects)
        if bare:
            notes.append(f"{key}: {bare} images without objects {'kept' if empty == 'keep' else 'left out'}")
        if not kept:
            raise DataError(f"{root}: no images in {key}")
        load = Pictures(part.paths, part.upright, channels)
        targets = Targets(part.objects, [str(path) for path in part.paths], masks)
        index = np.array(kept, np.int64)
        splits[key] = Split([part.names[i] for i in kept], np.zeros(len(kept), np.int64), load, index, targets)
    if "train" in parts and not any(parts["train"].objects[i].boxes for i in splits["train"].index):
        raise DataError(f"{root}: no image of train has an object")
    none_twice(root, splits)
    return Source(
        root.name, kind, classes, channels, divided(root, splits, shares, notes), tuple(complaints.skipped),
        tuple(notes), "detection", masks=masks, content=h.hexdigest(),
    )  # fmt: skip


def none_twice(root: Path, splits: dict[str, Split]) -> None:
    """DataError for a sample that is in two splits."""
    owner: dict[str, str] = {}
    for key, split in splits.items():
        for name in split.names:
            if owner.setdefault(name, key) != key:
                raise DataError(f"{root}: {name} is in {owner[name]} and in {key}")


def divided(root: Path, splits: dict[str, Split], shares: dict[str, float], notes: list[str]) -> dict[str, Split]:
    """With what is missing: the shares split off train, and the validation in place of a test that has no share."""
    for key, share in shares.items():
        if not 0 < share < 1:
            raise DataError(f"{root}: {key} must be a file or folder, or a share of train between 0 and 1, got {share}")
    missing = {key: share for key, share in shares.items() if key not in splits}
    if "val" not in splits and "val" not in missing and "train" in splits:
        missing = {"val": 0.1} | missing
    if missing and "train" in splits:
        try:
            splits = splits | carve(splits["train"], missing, ("all",))
        except DataError as e:
            raise DataError(f"{root}: {len(splits['train'])} images are too few to be split") from e
        notes.append(f"{' and '.join(missing)} split off train")
    if "test" not in splits:
        splits = splits | {"test": splits["val"]}
        notes.append("no test split: the validation split is tested on (data_options.test gives a file or a share)")
    return splits


def read_text(path: Path) -> bytes:
    try:
        if path.stat().st_size > TEXT:
            raise DataError(f"{path}: over {TEXT} bytes")
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e


def read_json(path: Path) -> Any:
    """DataError with the place where a file that is cut off or damaged breaks."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not json that can be read, or cut off ({' '.join(str(e).split())[:120]})") from e


def renamed(names: Sequence[str], classes: Any, where: str) -> tuple[tuple[str, ...], dict[str, int | None]]:
    """Class names to use, and for each name in the data its number, None where it is left out.

    `classes`: None takes all as they are, a list those to keep in its order, a mapping also renames them (several may
    become one).
    """
    if classes is None:
        wanted = {name: name for name in names}
    elif isinstance(classes, dict):
        wanted = {str(key): str(value) for key, value in classes.items()}
    elif isinstance(classes, list | tuple) and classes:
        wanted = {str(name): str(name) for name in classes}
    else:
        raise DataError(f"{where}: classes must be a list of names or a mapping old: new, got {classes!r}")
    if unknown := sorted(set(wanted) - set(names)):
        shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise DataError(f"{where}: classes: there is no {unknown[0]!r}; there are: {shown}")
    used = tuple(dict.fromkeys(wanted.values()))
    return used, {name: used.index(wanted[name]) if name in wanted else None for name in names}
