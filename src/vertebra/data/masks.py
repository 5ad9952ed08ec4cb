"""Images with class maps of the same size: folders of images beside folders of masks.

images/train/0001.jpg  masks/train/0001.png     or images/0001.jpg masks/0001.png, then split here
leftImg8bit/train/*/x_leftImg8bit.png  gtFine/train/*/x_gtFine_labelTrainIds.png     Cityscapes
images/training/x.jpg  annotations/training/x.png     ADE20K, with first=1
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .folder import ALIASES, EXTENSIONS, FORMATS
from .objects import Complaints, Pictures, divided, header, inside, none_twice, read_json, read_text
from .source import DataError, Source, Split

IMAGES, MASKS = ("images", "imgs", "leftImg8bit", "JPEGImages"), ("masks", "annotations", "labels", "gtFine",
                                                                  "SegmentationClass")  # fmt: skip
CITYSCAPES = ("_leftImg8bit", "_gtFine_labelTrainIds")
VALUES = 2**16  # a mask may hold values below this


def pair_of(root: Path) -> tuple[Path, Path] | None:
    """The folders of images and masks in `root`, or in its folder of training data."""
    if not root.is_dir():
        return None
    trained = [root / alias for alias in ALIASES["train"]]
    for place in (root, *(path for path in trained if path.is_dir())):
        image, mask = (next((place / n for n in names if (place / n).is_dir()), None) for names in (IMAGES, MASKS))
        if image is not None and mask is not None:
            return image, mask
    return None


def is_masks(root: Path) -> bool:
    return (pair := pair_of(root)) is not None and _first_image(pair[0]) and _first_image(pair[1])


def _first_image(place: Path) -> bool:
    for _, _, names in os.walk(place):
        for name in names:
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith("."):
                return True
    return False


@dataclass(frozen=True)
class Values:
    """Which class a value in the file is: `table` (VALUES,) has -1 where it is none."""

    table: np.ndarray
    ignore: int

    def classes(self, values: np.ndarray, name: str) -> np.ndarray:
        """Class numbers, uint8 where they fit. DataError names the first value that is no class."""
        if values.dtype.kind not in "biu" or (values.size and (values.min() < 0 or values.max() >= VALUES)):
            low, high = (values.min(), values.max()) if values.size else (0, 0)
            raise DataError(
                f"{name}: class numbers must be whole, within 0..{VALUES - 1}; {values.dtype} {low}..{high}"
            )
        out = self.table[values]
        if (out < 0).any():
            wrong, counts = np.unique(values[out < 0], return_counts=True)
            more = f" and {len(wrong) - 1} other values" if len(wrong) > 1 else ""
            raise DataError(
                f"{name}: the value {wrong[0]} is no class ({counts[0]} positions){more}; "
                "name what to leave out with data_options.ignore"
            )
        return out.astype(np.uint8 if self.ignore < 256 else np.int64)


def values_of(count: int, first: int, values: Sequence[int] | None, ignore: Any, where: str) -> Values:
    """The table for `count` classes: `values` in the file, one a class, or from `first` on; `ignore` is void."""
    if first < 0 or first + count > VALUES:
        raise DataError(f"{where}: classes from {first} to {first + count - 1} are not within 0..{VALUES - 1}")
    taken = list(range(first, first + count)) if values is None else [int(v) for v in values]
    void = [ignore] if isinstance(ignore, int) else list(ignore)
    if len(taken) != count or len(set(taken)) < count or not all(0 <= v < VALUES for v in taken):
        raise DataError(f"{where}: values must be {count} different numbers, one for each class, got {taken[:20]}")
    if not all(isinstance(v, int) and 0 <= v < VALUES for v in void):
        raise DataError(f"{where}: ignore must be numbers from 0 to {VALUES - 1}, got {ignore!r}")
    if both := sorted(set(void) & set(taken)):
        raise DataError(f"{where}: {both[0]} is a class and to be ignored")
    mark = 255 if count <= 255 else VALUES - 1
    table = np.full(VALUES, -1, np.int64)
    table[taken] = np.arange(count)
    table[void] = mark
    return Values(table, mark)


class MaskFiles:
    """Reads the i-th mask as class numbers (H, W)."""

    def __init__(self, paths: list[Path], upright: list[bool], values: Values) -> None:
        self.paths, self.upright, self.values = paths, upright, values

    def __call__(self, i: int) -> Tensor:
        return torch.from_numpy(self.values.classes(read_mask(self.paths[i], self.upright[i]), str(self.paths[i])))


def read_mask(path: Path, upright: bool = True) -> np.ndarray:
    """(H, W) of the values in the file: grey of 1, 8 or 16 bits, or the places in a palette. DataError."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as file:
                if file.mode not in ("1", "L", "P", "I") and not file.mode.startswith("I;16"):
                    raise DataError(f"{path}: a mask of mode {file.mode}: class numbers (grey or a palette) are needed")
                if file.format == "JPEG":
                    raise DataError(f"{path}: a JPEG file, which blurs class numbers; png is needed")
                return np.array(ImageOps.exif_transpose(file) if upright else file)
    except DataError:
        raise
    except Exception as e:
        raise DataError(f"{path}: not an image that can be read ({' '.join(str(e).split())[:120]})") from e


def open_masks(
    root: Path,
    images: str | None = None,
    masks: str | None = None,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    lists: str | None = None,
    classes: Any = None,
    values: Sequence[int] | None = None,
    first: int = 0,
    ignore: Any = None,
    val: float | None = None,
    test: float | None = None,
    check: bool = True,
    bad: str = "stop",
    whole: bool = False,
) -> Source:
    """Images with class maps.

    images, masks: their folders below `root`; image_suffix, mask_suffix: what their names end in beside the extension.
    lists: folder with train.txt, val.txt, test.txt, a name a line, where splits are no folders.
    classes: names; open: those of classes.json (a list, or {"classes": [...], "ignore_index": n}) or classes.txt, or
        all values that occur.
    values: the value of each class in the files; open: from `first` on, without gaps.
    ignore: values without a class; open: classes.json's, else 255 (with first=1 also 0).
    val, test: shares of train to split off where there are no folders of them.
    check: read every mask now. Otherwise a bad one is found when it is read, and then skipped and named.
    bad: stop: what cannot be used is an error; skip: image and mask are left out, named and counted.
    whole: only data to test on: test, else val, else train, all of it.

    Raises DataError.
    """
    complaints, notes = Complaints(bad), list[str]()
    found = pair_of(root)
    if found is None and not (images and masks):
        raise DataError(f"{root}: no folders {IMAGES[0]} and {MASKS[0]}; name them with data_options.images and .masks")
    if found is not None and found[0].name == "leftImg8bit":
        image_suffix, mask_suffix = image_suffix or CITYSCAPES[0], mask_suffix or CITYSCAPES[1]
    nested = found is not None and found[0].parent != root and images is None  # train/images, val/images, ...
    names = [inside(root, images, str(root)).relative_to(root) if images else found[0].relative_to(
        found[0].parent if nested else root) if found else Path()]  # fmt: skip
    names.append(inside(root, masks, str(root)).relative_to(root) if masks else found[1].relative_to(
        found[1].parent if nested else root) if found else Path())  # fmt: skip
    pairs = _split_pairs(root, names[0], names[1], nested, (image_suffix or "", mask_suffix or ""), complaints)
    if lists is not None:
        pairs = _by_lists(inside(root, lists, str(root)), pairs)
    if whole:
        pairs = next(({"test": pairs[key]} for key in ("test", "val", "train") if key in pairs), {})
    if not (pairs.get("train") or (whole and pairs.get("test"))):
        raise DataError(
            f"{root}: no pairs of image and mask of one name (image_suffix and mask_suffix say how they end)"
        )
    labels, void = _named(root, classes)
    listed = [pair for ones in pairs.values() for pair in ones]
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        looked = list(pool.map(lambda pair: _look(pair[0], pair[1], check), listed))
    if labels is None:
        labels = _found_classes(root, looked, values, first, [255] if ignore is None else ignore)
        notes.append(f"no class names: the {len(labels)} values that occur")
    if len(labels) < 2:
        raise DataError(f"{root}: only the class {labels[0]!r}; at least two are needed")
    if ignore is None:
        taken = set(values or range(first, first + len(labels)))
        ignore = [void] if void is not None else [v for v in (*range(first), 255) if v not in taken]
    table = values_of(len(labels), first, values, ignore, str(root))
    grey, h, splits, place = True, hashlib.sha256(table.table.tobytes()), dict[str, Split](), 0
    for key, ones in pairs.items():
        kept, upright = [], []
        for pair, look in zip(ones, looked[place : place + len(ones)], strict=True):
            wrong = look.wrong
            if wrong is None and look.values is not None and not (table.table[look.values] >= 0).all():
                odd = look.values[table.table[look.values] < 0]
                wrong = f"{pair[1]}: the value {odd[0]} is no class; name what to leave out with data_options.ignore"
            if wrong is not None:
                where, _, reason = wrong.partition(": ")
                complaints.add(where, reason)
                continue
            kept.append(pair)
            upright.append(look.upright)
            grey &= look.grey
            h.update(look.digest)
        place += len(ones)
        if not kept:
            raise DataError(f"{root}: no pair of {key} can be used")
        load = Pictures([image for image, _ in kept], [True] * len(kept), 3)
        targets = MaskFiles([mask for _, mask in kept], upright, table)
        texts = [str(image.relative_to(root)) for image, _ in kept]
        splits[key] = Split(texts, np.zeros(len(kept), np.int64), load, np.arange(len(kept)), targets)
    for split in splits.values():
        split.load.channels = 1 if grey else 3  # type: ignore[attr-defined]
    none_twice(root, splits)
    shares = {} if whole else {key: v for key, v in {"val": val, "test": test}.items() if v is not None}
    splits = divided(root, splits, shares, notes)
    return Source(
        root.name, "masks", labels, 1 if grey else 3, splits, tuple(complaints.skipped), tuple(notes), "segmentation",
        ignore=table.ignore, content=h.hexdigest(),
    )  # fmt: skip


Pair = tuple[Path, Path]


def _images_below(place: Path, suffix: str) -> dict[str, Path]:
    """Files by their path in `place` without suffix and extension."""
    out: dict[str, Path] = {}
    for folder, inner, files in os.walk(place):
        inner.sort()
        for name in sorted(files):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in EXTENSIONS or name.startswith(".") or not stem.endswith(suffix):
                continue
            key = str((Path(folder) / stem.removesuffix(suffix)).relative_to(place))
            if key in out:
                raise DataError(f"{place}: {out[key].name} and {name} have the same name")
            out[key] = Path(folder) / name
    return out


def _split_pairs(
    root: Path, images: Path, masks: Path, nested: bool, suffixes: tuple[str, str], complaints: Complaints
) -> dict[str, list[Pair]]:
    """Pairs by split. A mask without an image is no matter, an image without a mask is bad."""
    places: dict[str, Pair] = {}
    for key, aliases in ALIASES.items():
        for alias in aliases:
            place = (root / alias / images, root / alias / masks) if nested else (root / images / alias,
                                                                                  root / masks / alias)  # fmt: skip
            if place[0].is_dir():
                if place[1].is_dir():
                    places.setdefault(key, place)
                elif key != "test":  # sets often come with a test part whose masks are kept back
                    raise DataError(f"{place[1]}: no such folder, but there is {place[0]}")
    if "train" not in places and not (places and nested):
        places = places or {"train": (root / images, root / masks)}
    out = {}
    for key, (image_place, mask_place) in places.items():
        pictures, maps = _images_below(image_place, suffixes[0]), _images_below(mask_place, suffixes[1])
        out[key] = [(pictures[name], maps[name]) for name in sorted(pictures) if name in maps]
        if not out[key]:
            raise DataError(f"{image_place}: none of its {len(pictures)} images has a mask in {mask_place}")
        for name in sorted(set(pictures) - set(maps)):
            complaints.add(str(pictures[name]), f"has no mask in {mask_place}")
    return out


def _by_lists(lists: Path, pairs: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    by_stem = {image.stem: (image, mask) for ones in pairs.values() for image, mask in ones}
    out = {}
    for key, aliases in ALIASES.items():
        for path in (lists / f"{alias}.txt" for alias in aliases):
            if path.is_file():
                names = read_text(path).decode("utf-8", "replace").split()
                if unknown := sorted(set(names) - set(by_stem)):
                    raise DataError(f"{path}: there is no pair of image and mask called {unknown[0]!r}")
                out[key] = [by_stem[name] for name in dict.fromkeys(names)]
    return out


def _named(root: Path, classes: Any) -> tuple[tuple[str, ...] | None, int | None]:
    """Class names, and the value without a class, where they are given."""
    void = None
    if classes is None and (root / "classes.json").is_file():
        classes = read_json(root / "classes.json")
        if isinstance(classes, dict):
            void, classes = classes.get("ignore_index"), classes.get("classes")
        if not isinstance(classes, list):
            raise DataError(f"{root / 'classes.json'}: needs a list of names, or one called classes")
    elif classes is None and (root / "classes.txt").is_file():
        lines = read_text(root / "classes.txt").decode("utf-8", "replace").split("\n")
        classes = [line.strip() for line in lines if line.strip()]
    if classes is None:
        return None, None
    if not isinstance(classes, list | tuple) or not classes:
        raise DataError(f"{root}: classes must be a list of names, got {classes!r}")
    names = tuple(map(str, classes))
    if len(set(names)) < len(names):
        raise DataError(f"{root}: a class name is there twice")
    if void is not None and (type(void) is not int or not 0 <= void < VALUES):
        raise DataError(f"{root / 'classes.json'}: ignore_index must be a number from 0, got {void!r}")
    return names, void


@dataclass(frozen=True)
class _Look:
    """What a first look at a pair found."""

    wrong: str | None = None
    grey: bool = True
    upright: bool = True  # of the mask
    values: np.ndarray | None = None  # that occur, if it was read
    digest: bytes = b""


def _look(image: Path, mask: Path, check: bool) -> _Look:
    try:
        size, turned, grey = header(image)
        mask_size, mask_turned, _ = header(mask)
        seen = (size[1], size[0]) if turned else size
        upright = ((mask_size[1], mask_size[0]) if mask_turned else mask_size) == seen
        if not upright and mask_size != seen:
            told = f"{mask_size[1]}x{mask_size[0]}, its image {seen[1]}x{seen[0]} (width x height)"
            raise DataError(f"{mask}: is of another size, {told}")
        digest = hashlib.sha256(read_text(mask)).digest()
        found = None
        if check:
            found = occurring(read_mask(mask, upright), str(mask))
        return _Look(None, grey, upright, found, digest)
    except DataError as e:
        return _Look(str(e))


def occurring(values: np.ndarray, name: str) -> np.ndarray:
    """The values of a map, sorted. DataError for one that no map may hold."""
    if values.dtype.kind not in "biu" or (values.size and (values.min() < 0 or values.max() >= VALUES)):
        raise DataError(f"{name}: class numbers must be whole, from 0 and below {VALUES}, it holds {values.dtype}")
    return np.flatnonzero(np.bincount(values.ravel()))


def _found_classes(
    root: Path, looked: list[_Look], values: Sequence[int] | None, first: int, ignore: Any
) -> tuple[str, ...]:
    if values is not None:
        return tuple(map(str, values))
    seen = {int(v) for look in looked if look.values is not None for v in look.values}
    seen -= {ignore} if isinstance(ignore, int) else set(ignore)
    if not seen or max(seen) < first:
        raise DataError(f"{root}: name the classes with data_options.classes, classes.json or classes.txt")
    return tuple(map(str, range(first, max(seen) + 1)))
