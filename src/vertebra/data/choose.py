"""Which reader opens what is neither an embedded set nor a plain folder: series, shards, dense targets and tables.

A series is asked for: by the option `horizon`, or by `series:` before the path. Shards are known by `.tar` (a file, a
glob, a brace list, a URL, or a folder of them), tables by `.parquet` or by the files that `save_to_disk` leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .source import DataError, Source

SERIES, URLS = "series:", ("http://", "https://", "file:")


def choose(data: str, options: Mapping[str, Any]) -> tuple[Callable[..., Source], tuple[Any, ...]] | None:
    """The reader and what it is called with first; None for what is not one of these."""
    if data.startswith(SERIES) or "horizon" in options:
        from .series import open_series

        return open_series, (Path(data.removeprefix(SERIES)).expanduser(),)
    if is_shards(data):
        from .shards import open_shards

        return open_shards, (data,)
    path = Path(data).expanduser()
    if (dense := choose_dense(path, options)) is not None:
        return dense
    if is_tables(path):
        from .tables import open_tables

        return open_tables, (path,)
    if is_arrays(path):
        from .arrays import open_arrays

        return open_arrays, (path,)
    if "://" in data or data.startswith("pipe:"):
        raise DataError(f"{data}: of URLs those of .tar shards can be read, by http, https or file")
    return None


def choose_dense(path: Path, options: Mapping[str, Any]) -> tuple[Callable[..., Source], tuple[Any, ...]] | None:
    """Objects in COCO's or VOC's format, or images with class maps.

    Known by the usual names of files and folders, or by options that name them: `train` a json file, `annotations` a
    folder of xml files, `masks` one of masks.
    """
    from .coco import is_coco, open_coco
    from .masks import is_masks, open_masks
    from .voc import is_voc, open_voc

    if str(options.get("train", "")).endswith(".json") or is_coco(path):
        return open_coco, (path,)
    if isinstance(options.get("annotations"), str) or is_voc(path):
        return open_voc, (path,)
    return (open_masks, (path,)) if isinstance(options.get("masks"), str) or is_masks(path) else None


def is_shards(data: str) -> bool:
    if data.endswith(".tar") or (data.startswith(URLS) and ".tar" in data):
        return True
    path = Path(data).expanduser()
    return path.is_dir() and any(p.suffix == ".tar" for p in path.iterdir())


def is_tables(path: Path) -> bool:
    if path.suffix == ".parquet":
        return True
    if not path.is_dir():
        return False
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return True
    return any(path.glob("*.parquet")) or any(path.glob("data/*.parquet"))


def is_arrays(path: Path) -> bool:
    """An npz, npy or csv file, or a folder that has npy arrays, wfdb records, or class folders of such files."""
    files = (".npz", ".npy", ".csv")
    if path.is_file():
        return path.suffix.lower() in files
    if not path.is_dir():
        return False
    if any(path.glob("*.hea")) or any(path.glob("*.npy")):
        return True
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    inner = [q for p in folders for q in sorted(p.iterdir()) if not q.name.startswith(".")]
    inner += [r for q in inner if q.is_dir() for r in sorted(q.iterdir())[:1]]
    first = next((p for p in inner if p.is_file()), None)
    return first is not None and first.suffix.lower() in files
