"""From what the user names to a Source."""

from dataclasses import replace
from pathlib import Path

from .digits import open_digits
from .folder import open_folder
from .idx import is_idx, open_idx
from .source import DataError, Source


def open_source(data: str, limit: int | None = None) -> Source:
    """Open "digits", a folder of idx files or an image folder; at most `limit` samples a split.

    Raises DataError if there is nothing there or it cannot be used.
    """
    if data == "digits":
        source = open_digits()
    else:
        root = folder(data)
        source = open_idx(root) if is_idx(root) else open_folder(root)
    if limit is not None:
        if limit < len(source.classes):
            raise DataError(f"a limit of {limit} leaves classes empty: there are {len(source.classes)}")
        source = replace(source, splits={key: split.limit(limit) for key, split in source.splits.items()})
    return source


def open_unseen(data: str, classes: tuple[str, ...]) -> Source:
    """Data for testing a model that knows `classes`: test/ or the t10k files where there are any, else everything."""
    root = folder(data) if data != "digits" else None
    if root is not None and not is_idx(root):
        return open_folder(root, classes, whole=True)
    source = open_source(data)
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
