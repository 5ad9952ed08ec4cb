"""An image folder: one subfolder a class, with or without train/, val/ and test/ above them."""

import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from .source import DataError, Skipped, Source, Split, carve

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm"}
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # what Pillow may try; none runs another program
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
SHARES = {"val": 0.1, "test": 0.2}
GREY = ("1", "L", "LA", "I", "F")


def read_image(path: str | Path | IO[bytes], channels: int, name: str | None = None, upright: bool = True) -> Tensor:
    """uint8 (channels, H, W), if `upright` turned as its EXIF tag says; channels is 1 or 3.

    DataError names path or `name`.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; a bomb is an error above its limit
            with Image.open(path, formats=FORMATS) as file:
                image = ImageOps.exif_transpose(file) if upright else file
                if image.mode.startswith("I") or image.mode == "F":
                    image = _eight_bits(image)
                array = np.array(image.convert("L" if channels == 1 else "RGB"))
    except Exception as e:  # decoders raise almost anything on a broken file (OSError, SyntaxError, struct.error, ...)
        raise DataError(f"{name or path}: {_reason(e)}") from e
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()


def _eight_bits(image):
    """16-bit and float grey: Pillow's own conversion would clip them at 255."""
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    scale = 1.0 if values.max(initial=0) <= 255 else 257.0
    return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8))


def _reason(e: Exception) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    return "not an image that can be read" if "cannot identify" in text else text


def is_grey(path: Path | IO[bytes], name: str | None = None) -> bool:
    """From the header alone. Raises DataError if there is none."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return image.mode in GREY or image.mode.startswith("I;16")
    except Exception as e:
        raise DataError(f"{name or path}: {_reason(e)}") from e


class Files:
    """Reads the i-th file; `channels` may be changed once the data is known."""

    def __init__(self, paths: list[Path], channels: int) -> None:
        self.paths, self.channels = paths, channels

    def __call__(self, i: int) -> Tensor:
        return read_image(self.paths[i], self.channels)


def scan(root: Path, classes: tuple[str, ...] | None = None) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files and labels under root/<class>/. Raises DataError for no classes, an empty or an unknown one."""
    found = tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not found:
        raise DataError(f"{root}: no class folders (expected {root}/<class>/<image>)")
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        raise DataError(f"{root / unknown[0]}: class {unknown[0]!r} is not among the {len(classes)} known classes")
    classes = classes or found
    paths: list[Path] = []
    labels: list[int] = []
    for name in found:
        files = sorted(Path(d) / f for d, _, fs in os.walk(root / name) for f in fs)
        files = [p for p in files if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".")]
        if not files:
            raise DataError(f"{root / name}: class folder has no images")
        paths += files
        labels += [classes.index(name)] * len(files)
    return paths, labels, classes


def open_folder(root: Path, classes: tuple[str, ...] | None = None, whole: bool = False) -> Source:
    """Splits as their folders say, missing ones split off train. Files without a readable header are skipped.

    `whole` takes everything for the test (or test/ alone where there is one): new data for a trained model.
    """
    places = {key: next((root / a for a in names if (root / a).is_dir()), None) for key, names in ALIASES.items()}
    if whole:
        places = {"test": places["test"] or root}
    elif places["train"] is None:
        places = {"train": root}
    splits: dict[str, Split] = {}
    skipped: list[Skipped] = []
    grey = True
    files = Files([], 3)
    for key, place in places.items():
        if place is None:
            continue
        paths, labels, classes = scan(place, classes)
        kept, bad, all_grey = _check(paths)
        skipped += bad
        grey &= all_grey
        if key == "train" or whole:
            _no_class_lost(place, labels, kept, classes)
        index = np.array(kept, np.int64) + len(files.paths)
        files.paths += paths
        names = [str(paths[i].relative_to(root)) for i in kept]
        splits[key] = Split(names, np.array(labels, np.int64)[kept], files, index)
    assert classes is not None
    if len(classes) < 2:
        raise DataError(f"{root}: only the class {classes[0]!r}; at least two are needed")
    notes = [f"{'all images are grey: 1 channel' if grey else 'colour images among them: 3 channels'}"]
    shares = {} if whole else {key: share for key, share in SHARES.items() if key not in splits}
    if shares:
        splits |= carve(splits["train"], shares, classes)
        notes.append(f"{' and '.join(shares)} split off train, the same share of every class")
    files.channels = 1 if grey else 3
    return Source(root.name, "folder", classes, files.channels, splits, tuple(skipped), tuple(notes))


def _check(paths: list[Path]) -> tuple[list[int], list[Skipped], bool]:
    """Positions with a readable header, the others, and whether all are grey."""
    kept, bad, grey = [], [], True
    for i, path in enumerate(paths):
        try:
            grey &= is_grey(path)
            kept.append(i)
        except DataError as e:
            bad.append(Skipped(str(path), str(e).removeprefix(f"{path}: ")))
    return kept, bad, grey


def _no_class_lost(place: Path, labels: list[int], kept: list[int], classes: tuple[str, ...]) -> None:
    for lost in sorted(set(labels) - {labels[i] for i in kept}):
        raise DataError(f"{place / classes[lost]}: none of its images can be read")
