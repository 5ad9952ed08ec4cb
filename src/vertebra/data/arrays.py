"""Signals, maps and volumes from array files: npz, npy, csv, folders of them, and wfdb records.

    open_source("beats.npz", x="X", y="y", group="record", features="rr")

Samples stay as they are stored (int16, mapped npy files) and become float32 one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .arrayfiles import Npys, Npz, read_table
from .grouped import carve_groups
from .middles import Middles
from .source import DataError, Source, Split, carve

FILES = {".npz", ".npy", ".csv"}
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}


class Loader(Protocol):
    """Reads the i-th sample; a class, so that loader workers can be sent it."""

    def __call__(self, i: int) -> Tensor: ...


@dataclass(frozen=True)
class Table:
    """All samples of a dataset before they are split, N of them."""

    names: list[str]
    load: Loader
    y: np.ndarray  # (N,) labels, or (N, classes) of 0 and 1
    channels: int
    size: tuple[int, ...]
    groups: np.ndarray | None = None  # (N,) text: whom a sample is of
    parts: np.ndarray | None = None  # (N,) "train", "val" or "test" as the data say; "" for what may be split
    notes: list[str] = field(default_factory=list)
    beside: int = 0  # of the channels, those that are features
    maps: Sequence[np.ndarray] | None = None  # in place of y: (N, *S) each, one after the other
    shapes: np.ndarray | None = None  # (N, axes): how much of a sample is no padding


def open_arrays(
    root: Path,
    x: Any = None,
    y: str | int | None = None,
    group: str | int | None = None,
    split: str | int | None = None,
    features: Any = None,
    ratio: bool | str = False,
    standardise: bool | str = False,
    reference: bool = False,
    classes: Any = None,
    only: Sequence[str] | None = None,
    train_folds: Sequence[int] | None = None,
    val_folds: Sequence[int] | None = None,
    test_folds: Sequence[int] | None = None,
    val: float = 0.1,
    test: float = 0.2,
    layout: str = "first",
    scale: float = 1.0,
    table: str | None = None,
    maps: bool | None = None,
    shape: str | None = None,
    padding: str = "void",
    values: Sequence[int] | None = None,
    ignore: Any = 255,
    bad: str = "stop",
) -> Source:
    """Samples of one, two or three axes with labels, or with a class for every position.

    `x`, `y`, `group`, `split` and `features` name arrays or columns; those of an npz file or a folder of npy files may
    end in _train, _val and _test. Samples are multiplied by `scale`.

    group: whom a sample is of; no group gets into two splits.
    split: train, val and test, or fold numbers that `train_folds`, `val_folds` and `test_folds` share out. What is not
        given is split off train, the shares `val` and `test`.
    features: numbers beside a sample, appended as constant channels; `ratio` true appends them also divided by their
        median over the group, "only" in their stead.
    standardise: bring each channel of a sample (not its features) to mean 0 and deviation 1 by itself; "group" to
        median 0, and all samples of a group by one factor, so that the group's median sample reaches 1.
    reference: append the group's median sample as channels, so that a network sees what is unlike the others of its
        group. It needs no labels, but the group's other samples.
    classes, only: class names or the name of the array that has them; those to keep.
    layout: first (N, C, *S), last (N, *S, C) or none (N, *S).
    table: the csv of wfdb records.
    maps: whether y (N, *S) has a class for each position; open: where it has two or three such axes, those of x.
    shape, padding, values, ignore, bad: of maps, see `maps.py`.

    Raises DataError.
    """
    from .records import is_records, open_files, open_records

    if layout not in ("first", "last", "none"):
        raise DataError(f"{root}: layout must be first, last or none, got {layout!r}")
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(f"{root}: the shares val {val} and test {test} must be above 0 and together below 1")
    names = {"x": x, "y": y, "group": group, "split": split, "features": features, "shape": shape}
    if ratio not in (False, True, "only"):
        raise DataError(f"{root}: ratio must be true, false or only, got {ratio!r}")
    if standardise not in (False, True, "group"):
        raise DataError(f"{root}: standardise must be true, false or group, got {standardise!r}")
    if (standardise or reference) and root.is_dir() and not any(root.glob("*.npy")):
        told = "standardise is for arrays; set normalise to sample" if standardise else "reference is for arrays, not"
        raise DataError(f"{root}: {told} for one file a sample")
    if root.is_dir() and is_records(root):
        found = open_records(root, table, names)
    elif root.is_dir() and not any(root.glob("*.npy")):
        found = open_files(root, layout, scale)
    else:
        found = _stored(root, names, ratio, layout, scale, standardise, reference, maps)
    if found.maps is None and (maps or shape):
        raise DataError(f"{root}: the labels are no maps: y must be (N, *S) with the axes of x (N, *S) or x's layout")
    mapped = None
    if found.maps is not None:
        from .maps import open_maps

        if only is not None:
            raise DataError(f"{root}: only is for labels, and y has a class for every position")
        mapped = open_maps(root, found, _class_names(root, classes), values, ignore, padding, bad)
        found = mapped.table
    if mapped is None:
        labels, named, task = encode(found.y, _class_names(root, classes), str(root))
    else:  # all of one class: a map has many
        labels, named, task = np.zeros(len(found.names), np.int64), ("all",), "segmentation"
    parts = _parts(root, found, {"train": train_folds, "val": val_folds, "test": test_folds})
    index = np.arange(len(labels))
    notes = list(found.notes)
    if only is not None:
        index, labels, named = _only(root, labels, named, task, only)
        notes.append(f"{len(found.names) - len(index)} samples of other classes than {', '.join(named)} left out")
    if mapped is not None:
        labels, index = labels[mapped.kept], mapped.kept
    targets = None if mapped is None else mapped.targets
    whole = Split([found.names[i] for i in index], labels, found.load, index, targets)
    groups = None if found.groups is None else found.groups[index]
    whole = replace(whole, groups=groups)
    splits = _divide(root, whole, None if parts is None else parts[index], groups, {"val": val, "test": test}, named)
    if missing := {"val", "test"} - (set() if parts is None else set(parts)):
        how = "whole groups, classes as even as they allow" if groups is not None else "the same share of every class"
        notes.append(f"{' and '.join(sorted(missing, reverse=True))} split off train: {how}")
    sides = "x".join(map(str, found.size))
    notes.insert(0, f"{found.channels} channel{'s' if found.channels > 1 else ''} of {sides}")
    if mapped is not None:
        return mapped.source(root.stem, splits, notes)
    return Source(
        root.stem, "signals", named, found.channels, splits, (), tuple(notes), task, len(found.size), found.size,
        beside=found.beside,
    )  # fmt: skip


class Rows:
    """Samples of arrays that lie one after the other: (N, *shape) each, as stored -> float32 (C, *S)."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        names: Sequence[str],
        layout: str = "none",
        scale: float = 1.0,
        features: np.ndarray | None = None,
        standardise: bool | str = False,
    ) -> None:
        self.arrays, self.names, self.layout, self.scale, self.features = list(arrays), names, layout, scale, features
        self.standardise = standardise
        self.middles: Middles | None = None
        self.starts = np.cumsum([0, *(len(a) for a in arrays)])

    def wave(self, i: int) -> Tensor:
        """The i-th sample without what is appended, standardised but for the group's factor."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        sample = arranged(self.arrays[part][i - self.starts[part]], self.layout, self.scale, self.names[i])
        axes = tuple(range(1, sample.ndim))
        if self.standardise == "group":
            return sample - sample.flatten(1).median(1).values.view(-1, *(1,) * len(axes))
        if self.standardise:
            deviation = sample.std(axes, correction=0, keepdim=True)
            sample = (sample - sample.mean(axes, keepdim=True)) / deviation.clamp(min=1e-6)
        return sample

    def __call__(self, i: int) -> Tensor:
        sample = self.wave(i)
        if self.middles is not None:
            sample = self.middles(i, sample)
        if self.features is None:
            return sample
        beside = torch.from_numpy(self.features[i])
        if not beside.isfinite().all():
            raise DataError(f"{self.names[i]}: its features hold NaN or infinite values")
        beside = beside.view(-1, *(1,) * (sample.ndim - 1)).expand(-1, *sample.shape[1:])
        return torch.cat([sample, beside])


def arranged(values: np.ndarray, layout: str, scale: float, name: str) -> Tensor:
    """A stored sample as float32 (C, *S). DataError where it holds NaN or infinity."""
    sample = torch.from_numpy(np.array(values, np.float32))
    if layout == "none":
        sample = sample[None]
    elif layout == "last":
        sample = sample.movedim(-1, 0).contiguous()
    if scale != 1:
        sample *= scale
    if not sample.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite values")
    return sample


def shape_of(shape: Sequence[int], layout: str, where: str) -> tuple[int, tuple[int, ...], str]:
    """Of a stored sample: channels, size, and its layout ("first" of a single axis is "none"). DataError if unfit."""
    if len(shape) < 2:
        layout = "none"
    channels = 1 if layout == "none" else shape[0 if layout == "first" else -1]
    size = tuple(shape) if layout == "none" else tuple(shape[1:] if layout == "first" else shape[:-1])
    if not 1 <= len(size) <= 3 or min(size + (channels,)) < 1:
        raise DataError(f"{where}: samples of shape {tuple(shape)}, layout {layout}, have not one to three axes to use")
    return channels, size, layout


def check_numbers(array: np.ndarray, where: str) -> None:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where}: needs numbers, holds {array.dtype}")


def _stored(
    root: Path, names: Mapping[str, Any], ratio: bool | str, layout: str, scale: float, standardise: bool | str,
    reference: bool = False, maps: bool | None = None,
) -> Table:  # fmt: skip
    """One array a role, or one a role and split: npz, npy, csv."""
    archive: Mapping[str, np.ndarray]
    names = dict(names)
    if root.suffix.lower() == ".csv":
        if names["y"] is None:
            raise DataError(f"{root}: say which column is the label with data_options.y")
        archive = read_table(root, names)
        names |= {key: key for key in names if key in archive}
    elif root.suffix.lower() == ".npz":
        archive = Npz(root)
    else:
        archive = Npys(root if root.is_dir() else root.parent)
        if not root.is_dir() and names["x"] is None:
            names["x"] = root.stem
    keys = {role: _keys(archive, root, role, name) for role, name in names.items() if name is not None or role in "xy"}
    parts = list(keys["x"])
    for role, places in keys.items():
        if set(places) != set(parts):
            raise DataError(f"{root}: {role} is there for {_told(places)}, x for {_told(parts)}")
    found = {role: [archive[places[part]] for part in parts] for role, places in keys.items()}
    for role, arrays in found.items():
        for part, array, samples in zip(parts, arrays, found["x"], strict=True):
            where = f"{root} {keys[role][part]}"
            if array.ndim < 1 or len(array) != len(samples):
                raise DataError(f"{where}: {len(array) if array.ndim else 0} entries for {len(samples)} samples")
            if not len(array):
                raise DataError(f"{where}: is empty")
            if role in ("x", "features", "shape"):
                check_numbers(array, where)
    if same_axes(found["x"][0], found["y"][0], maps):
        layout = "none"
    shapes = [shape_of(a.shape[1:], layout, f"{root} {keys['x'][p]}") for p, a in zip(parts, found["x"], strict=True)]
    if len({(channels, len(size)) for channels, size, _ in shapes}) > 1:
        raise DataError(f"{root}: the splits have samples of different channels or axes")
    channels, size, layout = shapes[0]
    labels = [f"{root.name} {keys['x'][p]}[{i}]" for p, a in zip(parts, found["x"], strict=True) for i in range(len(a))]
    groups = np.concatenate([_texts(a) for a in found["group"]]) if "group" in found else None
    beside = None
    if "features" in found:
        beside = np.concatenate([np.asarray(a, np.float32).reshape(len(a), -1) for a in found["features"]])
        if ratio:
            if groups is None:
                raise DataError(f"{root}: ratio needs groups: name them with data_options.group")
            relative = ratios(beside, groups)
            beside = relative if ratio == "only" else np.concatenate([beside, relative], 1)
        channels += beside.shape[1]
    given = None
    if parts != [""]:
        given = np.concatenate([np.full(len(a), part) for part, a in zip(parts, found["x"], strict=True)])
    if "split" in found:
        if given is not None:
            raise DataError(f"{root}: x is stored by split already, split cannot be given too")
        given = _texts(found["split"][0])
    dense = maps is not False and are_maps(found["y"], [a.shape[1:] for a in found["x"]], layout, bool(maps))
    try:
        y = np.zeros(len(labels), np.int64) if dense else np.concatenate(found["y"])
    except ValueError as e:
        raise DataError(f"{root}: the labels of the splits do not fit together ({e})") from e
    rows = Rows(found["x"], labels, layout, scale, beside, standardise)
    if reference or standardise == "group":
        if groups is None:
            wanted = "reference" if reference else "standardise: group"
            raise DataError(f"{root}: {wanted} needs groups: name them with data_options.group")
        rows.middles = Middles(rows.wave, groups, reference, standardise == "group")
        channels += (channels - (0 if beside is None else beside.shape[1])) * reference
    return Table(
        labels, rows, y, channels, size, groups, given, beside=0 if beside is None else beside.shape[1],
        maps=found["y"] if dense else None, shapes=np.concatenate(found["shape"]) if "shape" in found else None,
    )  # fmt: skip


def same_axes(x: np.ndarray, y: np.ndarray, maps: bool | None) -> bool:
    """Whether y says of x that it has no axis of channels: both are (N, *S) and y has a class for each position."""
    return maps is not False and x.shape == y.shape and (y.ndim > 2 or bool(maps))


def are_maps(ys: Sequence[np.ndarray], shapes: Sequence[Sequence[int]], layout: str, rows: bool) -> bool:
    """Whether every y is (N, *S) for samples of `shapes`; with one axis, like rows of labels, only if it is asked."""
    fit = all(tuple(y.shape[1:]) == shape_of(shape, layout, "y")[1] for y, shape in zip(ys, shapes, strict=True))
    return fit and (rows or ys[0].ndim > 2)


def _told(parts: Sequence[str] | Mapping[str, str]) -> str:
    return ", ".join(part or "all samples" for part in parts)


def _keys(archive: Mapping[str, Any], root: Path, role: str, name: Any) -> dict[str, str]:
    """Where a role is stored: {"": key}, or {"train": key, ...}. Raises DataError."""
    asked = role if name is None else str(name)
    lower: dict[str, list[str]] = {}
    for key in archive:
        lower.setdefault(key.lower(), []).append(key)

    def look(key: str) -> str | None:
        alike = lower.get(key.lower(), [])
        return key if key in archive else alike[0] if len(alike) == 1 else None

    if (whole := look(asked)) is not None:
        return {"": whole}
    found: dict[str, str] = {}
    for part, aliases in PARTS.items():
        for alias in aliases:
            if (place := look(f"{asked}_{alias}") or look(f"{alias}_{asked}")) is not None:
                found.setdefault(part, place)
    if "train" not in found:
        there = ", ".join(list(archive)[:12]) or "none"
        lost = f"no {asked!r} nor {asked + '_train'!r} in it"
        raise DataError(f"{root}: {lost}; name it with data_options.{role} (there are: {there})")
    return found


def ratios(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(N, F) divided by their medians over each group; by 1 where a median is 0."""
    out = np.empty_like(features)
    for name in np.unique(groups):
        mine = groups == name
        middle = np.nanmedian(features[mine], 0)
        out[mine] = features[mine] / np.where(middle == 0, 1, middle)
    return out


def _texts(values: np.ndarray) -> np.ndarray:
    """(N,) of anything as text; numbers that are whole without a point."""
    values = np.asarray(values)
    if values.ndim != 1:
        values = values.reshape(len(values), -1)[:, 0]
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == np.round(values)).all():
        values = values.astype(np.int64)
    return values.astype(str)


def _class_names(root: Path, classes: Any) -> tuple[str, ...] | None:
    if isinstance(classes, list | tuple):
        return tuple(map(str, classes))
    if root.suffix.lower() != ".npz":
        if classes is None:
            return None
        raise DataError(f"{root}: classes must be a list of names, got {classes!r}")
    archive = Npz(root)
    if classes is None and "classes" not in archive:
        return None
    if (key := str(classes or "classes")) not in archive:
        raise DataError(f"{root}: no array {key!r} with class names")
    names = archive[key]
    if names.ndim != 1:
        raise DataError(f"{root} {key}: class names must be one row, got {names.shape}")
    return tuple(_texts(names).tolist())


def encode(y: np.ndarray, names: tuple[str, ...] | None, where: str) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Labels as stored -> class numbers (N,) or 0 and 1 (N, classes), class names, task. Raises DataError."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8", "replace")
    if y.dtype.kind not in "biufU" or y.ndim not in (1, 2):
        held = f"{y.dtype} of shape {y.shape}"
        raise DataError(f"{where}: labels must be a number or text a sample, or rows of 0 and 1; they are {held}")
    if names is not None and len(set(names)) < len(names):
        raise DataError(f"{where}: a class name is there twice")
    if y.ndim == 2:
        if y.dtype.kind == "U" or not np.isin(y, (0, 1)).all():
            raise DataError(f"{where}: labels of several classes must be 0 or 1")
        names = names or tuple(map(str, range(y.shape[1])))
        if len(names) != y.shape[1]:
            raise DataError(f"{where}: {len(names)} class names for {y.shape[1]} columns of labels")
        return y.astype(np.int64), names, "multi"
    if y.dtype.kind == "U":
        values = np.unique(y).tolist()
        names = names or tuple(values)
        if unknown := sorted(set(values) - set(names)):
            raise DataError(f"{where}: label {unknown[0]!r} is not among the classes {', '.join(names)}")
        place = {name: i for i, name in enumerate(names)}
        labels = np.array([place[v] for v in y.tolist()], np.int64)
    else:
        if y.dtype.kind == "f" and not (np.isfinite(y).all() and (y == np.round(y)).all()):
            raise DataError(f"{where}: labels must be whole numbers")
        numbers = y.astype(np.int64)
        if names is None:
            found = np.unique(numbers)
            labels, names = np.searchsorted(found, numbers), tuple(map(str, found.tolist()))
        else:
            labels = numbers
            if wrong := sorted({int(v) for v in numbers[(numbers < 0) | (numbers >= len(names))]}):
                raise DataError(f"{where}: label {wrong[0]} is out of range: there are {len(names)} class names")
    if len(names) < 2:
        raise DataError(f"{where}: only the class {names[0]!r}; at least two are needed")
    return labels.astype(np.int64), names, "single"


def _only(
    root: Path, labels: np.ndarray, classes: tuple[str, ...], task: str, only: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Positions and labels of the samples of the classes in `only`; of several labels all samples stay."""
    wanted = tuple(map(str, only))
    if unknown := sorted(set(wanted) - set(classes)):
        raise DataError(f"{root}: only: there is no class {unknown[0]!r}; there are: {', '.join(classes)}")
    if len(set(wanted)) < 2:
        raise DataError(f"{root}: only: at least two classes are needed")
    places = [i for i, name in enumerate(classes) if name in wanted]
    kept = tuple(classes[i] for i in places)
    if task == "multi":
        return np.arange(len(labels)), labels[:, places], kept
    index = np.flatnonzero(np.isin(labels, places))
    return index, np.searchsorted(places, labels[index]).astype(np.int64), kept


def _parts(root: Path, found: Table, folds: Mapping[str, Sequence[int] | None]) -> np.ndarray | None:
    """(N,) train, val, test or "" (left out), from names or fold numbers; None where the data say nothing."""
    values = found.parts
    asked = {part: {str(v) for v in chosen} for part, chosen in folds.items() if chosen is not None}
    if values is None:
        if asked:
            raise DataError(
                f"{root}: {', '.join(f'{p}_folds' for p in asked)} need data_options.split to name the folds"
            )
        return None
    known = {alias: part for part, aliases in PARTS.items() for alias in aliases}
    out = np.full(len(values), "", "<U5")
    if asked:
        for part, chosen in asked.items():
            if lost := sorted(chosen - set(values.tolist())):
                there = ", ".join(sorted(set(values.tolist())))
                raise DataError(f"{root}: {part}_folds: there is no fold {lost[0]}; there are {there}")
            if (out[np.isin(values, list(chosen))] != "").any():
                raise DataError(f"{root}: a fold is in two splits")
            out[np.isin(values, list(chosen))] = part
        if "train" not in asked:
            out[out == ""] = "train"
    else:
        lowered = np.char.lower(values)
        if unknown := sorted(set(lowered.tolist()) - set(known)):
            hint = "for fold numbers give data_options.test_folds"
            raise DataError(f"{root}: split {unknown[0]!r} is none of train, val, test; {hint}")
        out = np.array([known[v] for v in lowered.tolist()])
    if "train" not in out:
        raise DataError(f"{root}: no training samples")
    return out


def _divide(
    root: Path,
    whole: Split,
    parts: np.ndarray | None,
    groups: np.ndarray | None,
    shares: dict[str, float],
    classes: tuple[str, ...],
) -> dict[str, Split]:
    """Splits as `parts` says, what is missing carved off train."""
    where = {part: np.flatnonzero(np.full(len(whole), True) if parts is None and part == "train" else parts == part)
             for part in (("train",) if parts is None else ("train", "val", "test"))}  # fmt: skip
    where = {part: index for part, index in where.items() if len(index)}
    if "train" not in where:
        raise DataError(f"{root}: no training samples")
    if groups is not None:
        owners = {part: set(groups[index].tolist()) for part, index in where.items()}
        for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
            if both := sorted(owners.get(a, set()) & owners.get(b, set())):
                raise DataError(f"{root}: group {both[0]} is in {a} and in {b}")
    splits = {part: whole.take(index) for part, index in where.items()}
    _check_classes(root, splits, classes)
    missing = {part: share for part, share in shares.items() if part not in splits}
    if "test" in missing and not missing["test"]:
        raise DataError(f"{root}: no test samples: give them, or a share for them with data_options.test")
    if not missing:
        return splits
    if groups is None:
        try:
            return splits | carve(splits["train"], missing, classes)
        except DataError as e:
            raise DataError(f"{root}: {e}") from e
    return splits | carve_groups(splits["train"], groups[where["train"]], missing, str(root))


def _check_classes(root: Path, splits: dict[str, Split], classes: tuple[str, ...]) -> None:
    """No split has a class that training lacks."""
    there = {
        key: split.labels.any(0) if split.labels.ndim > 1 else np.bincount(split.labels, minlength=len(classes)) > 0
        for key, split in splits.items()
    }
    for key, found in there.items():
        for i in np.flatnonzero(found & ~there["train"]):
            raise DataError(f"{root}: class {classes[i]!r} is in {key} but not in the training samples")
