"""Labelled images from an embedded set, an image folder or idx files, split once and for all.

    source = open_source("digits")              # or a folder
    source.splits["train"].read(0)              # uint8 (C, H, W)

Only `transforms` and `loader` need torchvision; nothing here knows of models.
"""

from .open import open_source
from .source import DataError, Skipped, Source, Split

__all__ = ["DataError", "Skipped", "Source", "Split", "open_source"]
