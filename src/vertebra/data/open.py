"""From what the user names to a Source."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .choose import choose, is_shards
from .digits import open_digits
from .folder import open_folder
from .idx import is_idx, open_idx
from .source import DataError, Source


def open_source(data: str, limit: int | None = None, **options: Any) -> Source:
    """Open "digits", a folder of idx files or an image folder; at most `limit` samples a split.

    `options` go to the reader. Raises DataError if there is nothing there or it cannot be used, and for an option that
    the reader does not have.
    """
    open_it, place = reader(data, options)
    known = inspect.signature(open_it).parameters
    wrong = sorted(set(options) - set(known) | ({"root"} & set(options)))
    if wrong:
        raise DataError(f"{data}: its reader has no option {', '.join(map(repr, wrong))}; it has: {', '.join(known)}")
    source = open_it(*place, **options)
    if limit is not None:
        if source.task == "single" and limit < len(source.classes):
            raise DataError(f"a limit of {limit} leaves classes empty: there are {len(source.classes)}")
        source = replace(source, splits={key: split.limit(limit) for key, split in source.splits.items()})
    return source


def reader(
    data: str, options: Mapping[str, Any] = MappingProxyType({})
) -> tuple[Callable[..., Source], tuple[Any, ...]]:
    """The function that opens `data`, and what it is called with first."""
    if data == "digits":
        return open_digits, ()
    if (chosen := choose(data, options)) is not None:
        return chosen
    root = folder(data)
    return (open_idx if is_idx(root) else open_folder), (root,)


def open_unseen(data: str, classes: tuple[str, ...], kind: str = "folder", **options: Any) -> Source:
    """Data for testing a model that knows `classes`: test/ or the t10k files where there are any, else everything."""
    if kind in ("digits", "idx", "folder") and reader(data)[0] is open_folder:
        return open_folder(folder(data), classes, whole=True)
    if is_shards(data):
        from .shards import open_shards

        same = {key: options[key] for key in ("label", "channels") if key in options}
        return open_shards(data, classes=classes, whole=True, **same)
    dense = {"whole": True} if kind in ("coco", "voc", "masks") else {}
    if kind in ("coco", "voc") and not isinstance(options.get("classes"), dict):
        dense["classes"] = classes  # type: ignore[assignment]
    source = open_source(data, **options | dense)
    if source.classes != classes:
        raise DataError(f"{data}: its classes {list(source.classes)} are not the model's {list(classes)}")
    return source


def folder(data: str) -> Path:
    root = Path(data).expanduser()
    if not root.exists():
        raise DataError(f"{data}: no such folder (the embedded set is called digits)")
    if not root.is_dir():
        raise DataError(f"{data}: not a folder")
    return root
