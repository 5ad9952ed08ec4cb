"""Files that dense answers are written to: label maps, arrays, and what can be looked at."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from ..tasks import draw
from .files import write_atomic
from .run import RunError

BACKGROUND = ("background", "void", "unlabelled", "unlabeled")  # classes that are not drawn, whatever their case


class Pictures:
    """Writes the answers for files into one `folder`, which is made; RunError if that cannot be.

    Names come from the inputs' own: what is no letter, digit, space, dot, dash or underscore becomes an underscore, and
    an input whose files would have the names of an earlier one's gets a number. Files of an earlier call are replaced.
    """

    def __init__(self, folder: str | Path, classes: Sequence[str], threshold: float = 0.5) -> None:
        self.folder, self.classes, self.threshold = Path(folder), classes, threshold
        self.skip = [i for i, name in enumerate(classes) if name.lower() in BACKGROUND]
        self._used: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"{self.folder}: cannot be made ({e.strerror})") from e

    def apart(self, inputs: Iterable[str | Path]) -> Iterator[str | Path]:
        """The inputs; RunError for one that lies in the folder, which an answer could be written over, and for a folder
        that this one lies in, whose answers would be read as inputs."""
        mine = self.folder.resolve()
        for item in inputs:
            other = Path(item).resolve()
            if mine in (other, *other.parents):
                raise RunError(f"{self.folder}: the input {item} lies in it; choose another folder")
            if other in mine.parents and other.is_dir():
                raise RunError(f"{self.folder}: lies in the input {item}; choose another folder")
            yield item

    def segmentation(self, path: str | Path, sample: Tensor, labels: Tensor) -> tuple[str, ...]:
        """The class map (*S) of a sample (C, *S) as it was read -> the files written.

        An image: NAME.png, whose pixels are class numbers, and NAME_drawn.png; a signal or volume: NAME.npy and
        NAME_drawn.png, curves over coloured spans or the middle slices.
        """
        small = len(self.classes) <= 256
        if labels.ndim == 2 and small:
            map_name, map_file = ".png", draw.palette_png(labels)
        else:
            map_name, map_file = ".npy", _npy(labels, small)
        if labels.ndim == 1:
            drawn = draw.draw_signal(sample, labels, self.classes, self.skip)
        else:
            on_it = draw.draw_slices if labels.ndim == 3 else _on_image
            drawn = draw.picture_file(on_it(sample, labels, skip=self.skip))
        return self._write(path, {map_name: map_file, "_drawn.png": drawn})

    def detection(self, path: str | Path, image: Tensor, found: Mapping[str, Tensor]) -> tuple[str, ...]:
        """What `detect` found in an image -> the file written, NAME_drawn.jpg."""
        drawn = draw.draw_objects(draw.as_picture(image), found, self.classes, self.threshold)
        return self._write(path, {"_drawn.jpg": draw.picture_file(drawn, "JPEG")})

    def _write(self, path: str | Path, contents: Mapping[str, bytes]) -> tuple[str, ...]:
        files = self._names(path, tuple(contents))
        for file, content in zip(files, contents.values(), strict=True):
            write_atomic(file, content)
        return tuple(str(file) for file in files)

    def _names(self, path: str | Path, endings: Sequence[str]) -> list[Path]:
        stem = "".join(c if c.isalnum() or c in " ._-" else "_" for c in Path(path).stem).lstrip(". ") or "sample"
        while len(stem.encode()) > 200:  # file systems end at 255 bytes
            stem = stem[:-1]
        number, names = 1, [stem + ending for ending in endings]
        while not self._used.isdisjoint(name.casefold() for name in names):  # some file systems know no case
            number += 1
            names = [f"{stem}_{number}{ending}" for ending in endings]
        self._used.update(name.casefold() for name in names)
        return [self.folder / name for name in names]


def _on_image(sample: Tensor, labels: Tensor, skip: Sequence[int]) -> Tensor:
    return draw.draw_classes(draw.as_picture(sample), labels, skip=skip)


def _npy(labels: Tensor, small: bool) -> bytes:
    content = io.BytesIO()
    np.save(content, labels.cpu().numpy().astype(np.uint8 if small else np.int32))
    return content.getvalue()
