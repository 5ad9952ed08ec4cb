"""Arrays with a class for every position: X (N, *S) or (N, C, *S), Y (N, *S), in one, two or three axes.

    open_source("hippocampus60.npz", split="split", test_folds=[1], shape="shape")

`shape` names an array (N, axes) of how much of each sample is real where all are padded at their ends to one size;
`padding` void (default) leaves the rest out of every loss and score, crop cuts it off, keep takes it as it is. `values`
are the numbers in Y, one a class (open: from 0 on); `ignore` those without a class. `bad` stop: a map with another
value is an error; skip: its sample is left out, named and counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import Loader, Table
from .masks import Values, occurring, values_of
from .objects import Complaints
from .source import DataError, Source, Split


class MapRows:
    """The i-th map of arrays that lie one after the other, as class numbers (*S)."""

    def __init__(
        self, arrays: Sequence[np.ndarray], names: Sequence[str], values: Values, shapes: np.ndarray | None, crop: bool
    ) -> None:
        self.arrays, self.names, self.values, self.shapes, self.crop = list(arrays), names, values, shapes, crop
        self.starts = np.cumsum([0, *(len(a) for a in arrays)])

    def stored(self, i: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        return whole_numbers(np.asarray(self.arrays[part][i - self.starts[part]]), self.names[i])

    def __call__(self, i: int) -> Tensor:
        stored = self.stored(i)
        if self.shapes is None:
            return torch.from_numpy(self.values.classes(stored, self.names[i]))
        real = tuple(slice(int(side)) for side in self.shapes[i])
        inner = self.values.classes(stored[real], self.names[i])
        if self.crop:
            return torch.from_numpy(inner)
        out = np.full(stored.shape, self.values.ignore, inner.dtype)
        out[real] = inner
        return torch.from_numpy(out)


class CroppedRows:
    """Samples without their padding."""

    def __init__(self, load: Loader, shapes: np.ndarray) -> None:
        self.load, self.shapes = load, shapes

    def __call__(self, i: int) -> Tensor:
        return self.load(i)[(slice(None), *(slice(int(side)) for side in self.shapes[i]))].contiguous()


@dataclass(frozen=True)
class Mapped:
    """A table whose labels are maps, checked."""

    table: Table
    kept: np.ndarray  # positions of the samples that can be used
    classes: tuple[str, ...]
    targets: MapRows
    complaints: Complaints
    cropped: bool
    content: str

    def source(self, name: str, splits: dict[str, Split], notes: list[str]) -> Source:
        found = self.table
        return Source(
            name, "signals", self.classes, found.channels, splits, tuple(self.complaints.skipped), tuple(notes),
            "segmentation", len(found.size), None if self.cropped else found.size, beside=found.beside,
            ignore=self.targets.values.ignore, content=self.content,
        )  # fmt: skip


def open_maps(
    root: Path,
    table: Table,
    names: tuple[str, ...] | None,
    values: Sequence[int] | None,
    ignore: Any,
    padding: str,
    bad: str,
) -> Mapped:
    """The table with maps for labels: see the head of this file. Raises DataError."""
    assert table.maps is not None
    if padding not in ("void", "crop", "keep"):
        raise DataError(f"{root}: padding must be void, crop or keep, got {padding!r}")
    complaints = Complaints(bad)
    shapes = None if table.shapes is None or padding == "keep" else _checked_shapes(root, table)
    raw = MapRows(table.maps, table.names, Values(np.zeros(0), 0), None, False)
    void = [ignore] if isinstance(ignore, int) else list(ignore)
    h = hashlib.sha256(repr((padding, values, void)).encode())
    found: list[np.ndarray | None] = []  # the values of each map
    for i, name in enumerate(table.names):
        try:
            stored = raw.stored(i)
            if shapes is not None:
                stored = stored[tuple(slice(int(side)) for side in shapes[i])]
            found.append(occurring(stored, name))
            h.update(str(stored.shape).encode() + np.ascontiguousarray(stored, "<i8").tobytes())
        except DataError as e:
            complaints.add(name, str(e).removeprefix(f"{name}: "))
            found.append(None)
    seen = sorted({int(v) for one in found if one is not None for v in one} - set(void))
    if names is None:
        names = tuple(map(str, values if values is not None else range(max(seen, default=0) + 1)))
    if len(names) < 2:
        raise DataError(f"{root}: only the class {names[0]!r}; at least two are needed")
    table_of = values_of(len(names), 0, values, [v for v in void if v >= len(names) or values is not None], str(root))
    kept = []
    for i, one in enumerate(found):
        if one is None:
            continue
        if (odd := one[table_of.table[one] < 0]).size:
            complaints.add(table.names[i], f"its map holds {odd[0]}, which is none of the {len(names)} classes")
            continue
        kept.append(i)
    crop = shapes is not None and padding == "crop"
    load = CroppedRows(table.load, shapes) if crop and shapes is not None else table.load
    targets = MapRows(table.maps, table.names, table_of, shapes, crop)
    if not kept:
        raise DataError(f"{root}: no sample can be used")
    return Mapped(replace(table, load=load), np.array(kept), names, targets, complaints, crop, h.hexdigest())


def whole_numbers(stored: np.ndarray, name: str) -> np.ndarray:
    """As integers. DataError for text, and for fractions."""
    if stored.dtype.kind == "f" and np.isfinite(stored).all() and (np.abs(stored) < 2**31).all():
        whole = stored.astype(np.int64)
        if (whole == stored).all():
            return whole
    if stored.dtype.kind not in "biu":
        raise DataError(f"{name}: its map must hold whole class numbers, it holds {stored.dtype}")
    return stored


def _checked_shapes(root: Path, table: Table) -> np.ndarray:
    shapes = np.asarray(table.shapes)
    if shapes.shape != (len(table.names), len(table.size)):
        raise DataError(f"{root}: shape must be {len(table.names)} rows of {len(table.size)} sides, got {shapes.shape}")
    if not ((shapes >= 1) & (shapes <= np.array(table.size)) & (shapes == np.round(shapes))).all():
        wrong = int(np.flatnonzero(((shapes < 1) | (shapes > np.array(table.size))).any(1))[:1].sum())
        raise DataError(f"{table.names[wrong]}: the shape {shapes[wrong].tolist()} is not within {table.size}")
    return shapes.astype(np.int64)
