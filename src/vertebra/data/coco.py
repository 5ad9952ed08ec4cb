"""Objects from COCO's json files: boxes, polygons and run lengths. https://cocodataset.org/#format-data

open_source("nuclei")                           # images/, instances_train.json, instances_val.json
open_source("coco", masks=False)                # annotations/instances_train2017.json, train2017/, ...
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from .folder import ALIASES
from .objects import (
    Complaints,
    Gathered,
    Objects,
    area_of,
    box_within,
    finish,
    fitting,
    inside,
    numbers,
    read_json,
    renamed,
    shape_within,
)
from .source import DataError, Source

PLACES = ("instances_{}.json", "annotations/instances_{}.json", "{}/_annotations.coco.json")


def is_coco(root: Path) -> bool:
    """A file of annotations, or a folder in which one of the usual names is found."""
    if root.is_file():
        return root.suffix.lower() == ".json"
    return root.is_dir() and any(found_file(root, key) is not None for key in ALIASES)


def found_file(root: Path, key: str) -> Path | None:
    """The annotations of a split by their usual names. DataError where there are several."""
    for pattern in PLACES:
        for alias in ALIASES[key]:
            years = pattern.format(alias + "20[0-9][0-9]") if pattern.endswith("instances_{}.json") else None
            found = sorted({*root.glob(pattern.format(alias)), *(root.glob(years) if years else ())})
            found = [path for path in found if path.is_file()]
            if len(found) > 1:
                names = ", ".join(str(path.relative_to(root)) for path in found)
                raise DataError(f"{root}: several files for {key}: {names}; choose one with data_options.{key}")
            if found:
                return found[0]
    return None


def open_coco(
    root: Path,
    train: str | None = None,
    val: str | float | None = None,
    test: str | float | None = None,
    images: str | None = None,
    masks: bool | None = None,
    classes: Any = None,
    bad: str = "stop",
    empty: str = "keep",
    whole: bool = False,
) -> Source:
    """Boxes with labels, and masks where there are any.

    train, val, test: files below `root` where they have other names; numbers are shares of train to split off.
    images: their folder below `root` where it has another name.
    masks: true: every object needs one; false: boxes alone; open: whether the first file has any.
    classes: names to keep, in this order, or a mapping old: new; open: all of train's.
    bad: stop: what cannot be used is an error; skip: it is left out, named and counted.
    empty: keep or drop images without objects.
    whole: only data to test on: test, else val, else train, all of it.

    Raises DataError.
    """
    if root.is_file():
        root, train = root.parent, root.name
    complaints, notes = Complaints(bad), list[str]()
    files = {}
    for key, given in {"train": train, "val": val, "test": test}.items():
        place = inside(root, given, f"{root}: {key}") if isinstance(given, str) else None
        if given is None:
            place = found_file(root, key) if train is None or key != "train" else None
        if place is not None:
            files[key] = place
    if whole:
        key = next((key for key in ("test", "val", "train") if key in files), "test")
        files = {"test": files[key]} if key in files else {}
    if not files or not (whole or "train" in files):
        raise DataError(
            f"{root}: no annotations of train (expected {PLACES[0].format('train')}, or data_options.train)"
        )
    contents = {key: _content(path) for key, path in files.items()}
    first = next(iter(contents))
    names = _names(contents[first]["categories"], files[first])
    if masks is None:
        masks = any(isinstance(a, dict) and a.get("segmentation") for a in contents[first]["annotations"])
    used, numbers_of = renamed(list(dict.fromkeys(names.values())), classes if not whole else _present(classes, names),
                               str(files[first]))  # fmt: skip
    if whole and isinstance(classes, list | tuple):  # numbers are the model's, whatever this file lacks
        used = tuple(map(str, classes))
        if not set(used) & set(names.values()):
            raise DataError(f"{files[first]}: has none of the model's classes {', '.join(used[:12])}")
        numbers_of = {name: used.index(name) if name in used else None for name in names.values()}
    parts = {}
    left_out: Counter[str] = Counter()
    for key, path in files.items():
        reader = _Reader(path, _image_folder(root, path, images, contents[key]["images"]), complaints, masks)
        parts[key] = reader.read(contents.pop(key), numbers_of, left_out)
    if left_out:
        told = ", ".join(f"{name} {count}" for name, count in left_out.most_common(8))
        notes.append(f"objects of other classes left out: {told}{', ...' if len(left_out) > 8 else ''}")
    shares = {key: float(v) for key, v in {"val": val, "test": test}.items() if isinstance(v, int | float)}
    count = sum(len(one.boxes) for part in parts.values() for one in part.objects)
    notes.insert(0, f"{count} objects{' with masks' if masks else ''}")
    return finish(root, "coco", used, parts, complaints, masks, empty, {} if whole else shares, notes)


def _present(classes: Any, names: dict[int, str]) -> Any:
    return (
        [name for name in classes if name in names.values()] or None if isinstance(classes, list | tuple) else classes
    )


def _content(path: Path) -> dict[str, list[Any]]:
    content = read_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: has no list {key!r}: not COCO's format for objects")
    return content


def _names(categories: list[Any], path: Path) -> dict[int, str]:
    """Category id -> name, in the file's order."""
    names: dict[int, str] = {}
    for one in categories:
        if not isinstance(one, dict) or type(one.get("id")) is not int or not isinstance(one.get("name"), str):
            raise DataError(f"{path}: a category needs an id and a name, got {str(one)[:80]}")
        if one["id"] in names or one["name"] in names.values():
            raise DataError(f"{path}: category {one['id']} {one['name']!r} is there twice")
        names[one["id"]] = one["name"]
    if not names:
        raise DataError(f"{path}: no categories")
    return dict(sorted(names.items()))


def _image_folder(root: Path, path: Path, images: str | None, listed: list[Any]) -> Path:
    """Where the images are: the first of the usual places that has the first of them."""
    if images is not None:
        return inside(root, images, f"{root}: images")
    stem = path.stem.removeprefix("instances_")
    places = [root / "images" / stem, root / stem, root / "images", path.parent, root]
    names = [one["file_name"] for one in listed if isinstance(one, dict) and isinstance(one.get("file_name"), str)]
    for name in names[:20]:
        for place in places:
            if inside(place, name, str(path)).is_file():
                return place
    return next((place for place in places if place.is_dir()), root)


class _Reader:
    """One file of annotations."""

    def __init__(self, path: Path, folder: Path, complaints: Complaints, masks: bool) -> None:
        self.path, self.folder, self.complaints, self.masks = path, folder, complaints, masks

    def read(self, content: dict[str, list[Any]], numbers_of: dict[str, int | None], left_out: Counter) -> Gathered:
        names = _names(content["categories"], self.path)
        out = Gathered()
        by_id = self._images(content["images"], out)
        seen: set[int] = set()
        twice = _twice(content["images"])
        for place, one in enumerate(content["annotations"]):
            name = one.get("id", place) if isinstance(one, dict) else place
            where = f"{self.path} annotation {name}"
            if not isinstance(one, dict):
                self.complaints.add(where, f"is {str(one)[:40]!r}")
                continue
            if type(name) is int and "id" in one:
                if name in seen:
                    self.complaints.add(where, "its id is there twice")
                    continue
                seen.add(name)
            image = one.get("image_id")
            if not isinstance(image, int | str) or image not in by_id:
                if image not in twice:  # else the image was complained of
                    self.complaints.add(where, f"there is no image {image!r}")
                continue
            if (objects := by_id[image]) is None:
                continue
            category = one.get("category_id")
            if type(category) is not int or category not in names:
                self.complaints.add(where, f"category {category!r} is not in the list of categories")
                continue
            if names[category] not in numbers_of:
                self.complaints.add(where, f"category {names[category]!r} is not in the list of the training file")
                continue
            label = numbers_of[names[category]]
            if label is None:
                left_out[names[category]] += 1
                continue
            if wrong := self._add(objects, one, label):
                self.complaints.add(where, wrong)
        return out

    def _images(self, listed: list[Any], out: Gathered) -> dict[Any, Objects | None]:
        """Image id -> its objects, still none; None for an image that is left out."""
        by_id: dict[Any, Objects | None] = {}
        twice, files = _twice(listed), set()
        for place, one in enumerate(listed):
            name = one.get("id") if isinstance(one, dict) else None
            where = f"{self.path} image {name if name is not None else f'number {place}'}"
            if not isinstance(one, dict) or not isinstance(name, int | str):
                self.complaints.add(where, "needs an id and a file_name")
                continue
            by_id[name] = None
            if name in twice:  # whose objects are whose cannot be told
                self.complaints.add(where, "its id is there twice")
                continue
            path = inside(self.folder, one.get("file_name"), where)
            size = (one.get("height"), one.get("width"))
            try:
                if size != (None, None) and not all(type(side) is int and side > 0 for side in size):
                    raise DataError(f"{path}: height and width are {size[0]!r} and {size[1]!r}")
                if one["file_name"] in files:
                    raise DataError(f"{path}: is listed twice")
                seen, upright, grey = fitting(path, None if size == (None, None) else size)  # type: ignore[arg-type]
            except DataError as e:
                self.complaints.add(where, str(e))
                continue
            files.add(one["file_name"])
            found = Objects(seen)
            by_id[name] = found
            out.add(f"{self.folder.name}/{one['file_name']}", path, upright, grey, found)
        return by_id

    def _add(self, objects: Objects, one: dict[str, Any], label: int) -> str | None:
        """The object, or what is wrong with it."""
        flat, crowd = numbers(one.get("bbox"), 4), one.get("iscrowd", 0)
        if flat is None:
            return f"its bbox must be four numbers, got {str(one.get('bbox'))[:60]}"
        if crowd not in (0, 1):
            return f"iscrowd must be 0 or 1, got {crowd!r}"
        x, y, width, height = flat
        box = box_within((x, y, x + width, y + height), objects.size)
        if isinstance(box, str):
            return box
        area = one.get("area")
        if self.masks:
            shape = shape_within(one.get("segmentation"), objects.size)
            if isinstance(shape, str):
                return shape
            objects.shapes.append(shape)
            area = area_of(shape) if area is None else area
        if area is None:
            area = (box[2] - box[0]) * (box[3] - box[1])
        if numbers([area]) is None or area < 0:
            if self.masks:
                objects.shapes.pop()
            return f"its area must be a number from 0, got {area!r}"
        objects.boxes.append(box)
        objects.labels.append(label)
        objects.crowd.append(bool(crowd))
        objects.area.append(float(area))
        return None


def _twice(listed: list[Any]) -> set[Any]:
    ids = Counter(one["id"] for one in listed if isinstance(one, dict) and isinstance(one.get("id"), int | str))
    return {name for name, count in ids.items() if count > 1}
