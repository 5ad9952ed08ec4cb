"""What every dataset becomes: named splits of labelled samples (images, signals, volumes), read one at a time."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used; the message is one line and names the file or folder."""


@dataclass(frozen=True)
class Skipped:
    """A file left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Split:
    """Samples of one split. `names` are unique and stable: they, not positions, decide where a sample goes."""

    names: Sequence[str]
    labels: np.ndarray  # (N,) class numbers, or (N, classes) of 0 and 1; what `targets` gives wins over it
    load: Callable[[int], Tensor] = field(repr=False)  # position -> (C, *S); DataError if it cannot be read
    index: np.ndarray = field(repr=False)  # (N,) what `load` is called with
    targets: Callable[[int], Any] | None = field(default=None, repr=False)  # as `load`: what is to be predicted
    groups: np.ndarray | None = field(default=None, repr=False)  # (N,) whom a sample is of, where that is known

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, i: int) -> Tensor:
        """The i-th sample, (C, *S): images as uint8, all else as float32. DataError names what cannot be read."""
        return self.load(int(self.index[i]))

    def target(self, i: int) -> Any:
        """What is to be predicted of the i-th sample."""
        return self.labels[i] if self.targets is None else self.targets(int(self.index[i]))

    def take(self, positions: np.ndarray) -> "Split":
        """The samples at these positions, in this order."""
        names = [self.names[i] for i in positions]
        groups = None if self.groups is None else self.groups[positions]
        return replace(self, names=names, labels=self.labels[positions], index=self.index[positions], groups=groups)

    def limit(self, n: int) -> "Split":
        """At most n samples, classes as even as they allow, always the same ones."""
        if n >= len(self):
            return self
        rank = np.empty(len(self), np.int64)  # place within the class, in hash order
        seen: dict[int, int] = {}
        if self.labels.ndim > 1 or self.targets is not None:
            return self.take(np.sort(hash_order(self.names)[:n]))
        for i in hash_order(self.names):
            rank[i] = seen.setdefault(int(self.labels[i]), 0)
            seen[int(self.labels[i])] += 1
        return self.take(np.sort(np.lexsort((self.labels, rank))[:n]))


@dataclass(frozen=True)
class Source:
    """A dataset: splits train, val and test, class names, and what was found while opening it."""

    name: str
    kind: str  # digits, idx, folder, or another reader's name: what is used where a configuration leaves it open
    classes: tuple[str, ...]  # for a forecast the variables
    channels: int  # of images 1 if all are grey, else 3
    splits: dict[str, Split]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()  # what was decided by the data, for people
    task: str = "single"  # single, multi, forecast, segmentation or detection: see train/task.py
    ndim: int = 2
    size: tuple[int, ...] | None = None  # of a sample, where all have the same
    horizon: int | None = None  # steps to forecast
    beside: int = 0  # channels at the end that are numbers of a sample, not part of its wave
    scaled: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # mean and deviation they were scaled by already
    ignore: int = 255  # segmentation: what marks positions without a class
    masks: bool = False  # detection: whether objects have masks
    content: str = ""  # of dense targets, which `labels` does not hold: a hash of all of them

    def fingerprint(self) -> str:
        """Changes when a sample, its label or its split changes (not when pixels do)."""
        h = hashlib.sha256("\n".join(self.classes).encode())
        for key in sorted(self.splits):
            split = self.splits[key]
            h.update(f"\n{key} {len(split)}\n".encode() + "\n".join(split.names).encode("utf-8", "surrogateescape"))
            h.update(np.ascontiguousarray(split.labels, "<i8").tobytes())
        if self.horizon is not None:
            h.update(f"{self.size} {self.horizon}".encode())
        if self.content:
            h.update(f"{self.ignore} {self.masks} {self.content}".encode())
        return h.hexdigest()[:16]


def hash_order(names: Sequence[str]) -> np.ndarray:
    """Positions ordered by a hash of the name: a shuffle that no version of numpy or torch can change."""
    keys = [hashlib.blake2b(n.encode("utf-8", "surrogateescape"), digest_size=8).digest() for n in names]
    return np.array(sorted(range(len(names)), key=keys.__getitem__), np.int64)


def carve(split: Split, fractions: dict[str, float], classes: Sequence[str]) -> dict[str, Split]:
    """Split into "train" and the named parts, the same share of every class: round(share * n), at least one.

    Of samples with several labels, the same share of all. Raises DataError for a class too small to be in all of them.
    """
    if split.labels.ndim > 1:
        whole = replace(split, labels=np.zeros(len(split), np.int64))
        parts_of_all = carve(whole, fractions, ("all",))
        place = {name: i for i, name in enumerate(split.names)}
        return {key: split.take(np.array([place[n] for n in part.names])) for key, part in parts_of_all.items()}
    parts: dict[str, list[int]] = {key: [] for key in ("train", *fractions)}
    order = hash_order(split.names)
    for label, name in enumerate(classes):
        members = order[split.labels[order] == label]
        start = 0
        for key, fraction in fractions.items():
            stop = start + max(1, round(fraction * len(members)))
            parts[key].extend(members[start:stop])
            start = stop
        if start >= len(members):
            wanted = ", ".join(parts)
            raise DataError(f"class {name!r} has {len(members)} samples, too few to be split into {wanted}")
        parts["train"].extend(members[start:])
    return {key: split.take(np.sort(np.array(p, np.int64))) for key, p in parts.items()}


def from_arrays(images: np.ndarray, labels: np.ndarray, prefix: str) -> Split:
    """A split of grey images held in memory: uint8 (N, H, W) and labels (N,)."""
    names = [f"{prefix}/{i}" for i in range(len(images))]
    return Split(names, labels.astype(np.int64), _Pixels(images), np.arange(len(images)))


class _Pixels:
    """images[i] as (1, H, W); a class and not a closure so that loader workers can be sent it."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __call__(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(self.images[i]))[None]
