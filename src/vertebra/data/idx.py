"""Fashion-MNIST-style idx files, plain or gz, parsed with every size checked: they come from anywhere."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from .source import DataError, Source, Split, carve, from_arrays

LIMIT = 2**31  # bytes a file may declare
PARTS = {"train": "train", "test": "t10k"}


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The uint8 array in an idx file of `ndim` dimensions. Raises DataError naming the file and what is wrong."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as f:
            head = f.read(4 + 4 * ndim)
            if len(head) < 4 + 4 * ndim:
                raise DataError(f"{path}: ends inside its header ({len(head)} bytes)")
            if head[:4] != bytes([0, 0, 8, ndim]):
                raise DataError(f"{path}: not an idx{ndim} file of bytes (it starts with {head[:4].hex()})")
            shape = tuple(int(n) for n in np.frombuffer(head, ">u4", ndim, 4))
            size = 1
            for n in shape:  # python integers: the product of four-byte sizes overflows int64
                size *= n
            if not 0 < size <= LIMIT:
                raise DataError(f"{path}: declares a size of {shape}, which is empty or over {LIMIT} bytes")
            body = f.read(size + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read ({e})") from e
    if len(body) != size:
        raise DataError(f"{path}: declares {size} bytes for {shape} but holds {_count(len(body), size)}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _count(found: int, size: int) -> str:
    return "more" if found > size else f"{found}"


def find(root: Path, stem: str) -> Path | None:
    """The file `stem` or `stem.gz` in root."""
    return next((p for p in (root / f"{stem}.gz", root / stem) if p.is_file()), None)


def is_idx(root: Path) -> bool:
    return find(root, "train-images-idx3-ubyte") is not None


def open_idx(root: Path) -> Source:
    """Train and test as the files have them; validation is a tenth of train."""
    arrays = {key: _read_part(root, part) for key, part in PARTS.items() if key == "train" or _has(root, part)}
    values = np.unique(arrays["train"][1])
    classes = tuple(str(v) for v in values)
    if len(classes) < 2:
        raise DataError(f"{root}: all training labels are {classes[0]}; at least two classes are needed")
    splits: dict[str, Split] = {}
    for key, (images, labels) in arrays.items():
        if unknown := sorted(set(labels.tolist()) - set(values.tolist())):
            raise DataError(f"{root}: label {unknown[0]} of the {key} files is not in the training labels")
        splits[key] = from_arrays(images, np.searchsorted(values, labels), key)
    shares = {"val": 0.1} if "test" in splits else {"val": 0.1, "test": 0.2}
    notes = (f"idx files: {' and '.join(shares)} split off train, the same share of every class",)
    splits |= carve(splits["train"], shares, classes)
    return Source(root.name, "idx", classes, 1, splits, (), notes)


def _has(root: Path, part: str) -> bool:
    return find(root, f"{part}-images-idx3-ubyte") is not None


def _read_part(root: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images_path, labels_path = find(root, f"{part}-images-idx3-ubyte"), find(root, f"{part}-labels-idx1-ubyte")
    if images_path is None or labels_path is None:
        raise DataError(f"{root}: {part}-images-idx3-ubyte(.gz) and {part}-labels-idx1-ubyte(.gz) must both be there")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels)} labels for {len(images)} images")
    return images, labels
