"""Objects from PASCAL VOC's xml files, one an image: Annotations/, JPEGImages/ and ImageSets/Main/{train,val,test}.txt.

What an xml file could do beyond saying what is in it (entities, other files, any depth) is refused.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from .folder import ALIASES, EXTENSIONS
from .objects import Complaints, Gathered, Objects, box_within, finish, fitting, inside, read_text, renamed
from .source import DataError, Source

FOLDERS, IMAGES = ("Annotations", "annotations"), ("JPEGImages", "images")
LARGEST, DEPTH = 2**24, 16  # bytes of a file, elements within each other


def is_voc(root: Path) -> bool:
    """Whether there is a folder of xml annotations."""
    for place in (root / name for name in FOLDERS):
        if place.is_dir():
            return any(name.endswith(".xml") for name in os.listdir(place))
    return False


def open_voc(
    root: Path,
    annotations: str | None = None,
    images: str | None = None,
    lists: str = "ImageSets/Main",
    val: float | None = None,
    test: float | None = None,
    classes: Any = None,
    difficult: str = "crowd",
    origin: int = 1,
    bad: str = "stop",
    empty: str = "keep",
    whole: bool = False,
) -> Source:
    """Boxes with labels.

    annotations, images, lists: folders below `root`; without lists all is train.
    val, test: shares of train to split off where there is no list.
    classes: names to keep, in this order, or a mapping old: new; open: all names in train, sorted.
    difficult: crowd (tested neither for nor against), keep (as any object) or drop.
    origin: number of the first pixel. VOC counts from 1 and includes the last pixel; many tools write 0.
    bad, empty, whole: as in `open_coco`.

    Raises DataError.
    """
    if difficult not in ("crowd", "keep", "drop"):
        raise DataError(f"{root}: difficult must be crowd, keep or drop, got {difficult!r}")
    if origin not in (0, 1):
        raise DataError(f"{root}: origin must be 0 or 1, got {origin!r}")
    complaints, notes = Complaints(bad), list[str]()
    place, pictures = _below(root, annotations, FOLDERS), _below(root, images, IMAGES)
    stems = _listed(root, inside(root, lists, f"{root}: lists"), place)
    if whole:
        last = next(key for key in ("test", "val", "train") if key in stems)
        stems = {"test": stems[last]}
    if "train" not in stems and not whole:
        raise DataError(f"{root}: no list of train in {lists}")
    files = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in EXTENSIONS}
    trees: dict[str, dict[str, Element]] = {}
    for key, names in stems.items():
        trees[key] = {}
        for name in names:
            path = inside(place, f"{name}.xml", str(root))
            try:
                trees[key][name] = read_xml(path)
            except DataError as e:
                complaints.add(str(path), str(e).removeprefix(f"{path}: "))
    first = next(iter(trees))
    found = sorted({_text(o, "name") for tree in trees[first].values() for o in tree.iter("object")} - {""})
    known = tuple(map(str, classes)) if whole and isinstance(classes, list | tuple) else None
    if known is not None:  # numbers are the model's, whatever these files lack
        used, numbers_of = known, {name: known.index(name) if name in known else None for name in {*found, *known}}
    else:
        used, numbers_of = renamed(found, classes, str(place))
    if not used or (known is not None and not set(used) & set(found)):
        raise DataError(f"{place}: no objects{' of the classes ' + ', '.join(used[:12]) if used else ''}")
    parts, left_out = {}, 0
    for key, ones in trees.items():
        parts[key] = Gathered()
        for name, tree in ones.items():
            where = str(place / f"{name}.xml")
            objects = _picture(tree, name, where, pictures, files, parts[key], complaints)
            for number, one in enumerate(tree.iter("object") if objects is not None else ()):
                assert objects is not None
                label, wrong, hard = _object(one, numbers_of, objects.size, origin)
                if isinstance(wrong, str):
                    complaints.add(f"{where} object {number + 1}", wrong)
                elif label is None or (hard and difficult == "drop"):
                    left_out += 1
                else:
                    objects.boxes.append(wrong)
                    objects.labels.append(label)
                    objects.crowd.append(hard and difficult == "crowd")
                    objects.area.append((wrong[2] - wrong[0]) * (wrong[3] - wrong[1]))
    if left_out:
        notes.append(f"{left_out} objects of other classes or difficult left out")
    notes.insert(0, f"{sum(len(one.boxes) for part in parts.values() for one in part.objects)} objects")
    shares = {} if whole else {key: v for key, v in {"val": val, "test": test}.items() if v is not None}
    return finish(root, "voc", used, parts, complaints, False, empty, shares, notes)


def _below(root: Path, given: str | None, usual: tuple[str, ...]) -> Path:
    places = [inside(root, given, str(root))] if given is not None else [root / name for name in usual]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(f"{root}: no folder {' or '.join(place.name for place in places)}")


def _listed(root: Path, lists: Path, annotations: Path) -> dict[str, list[str]]:
    """Names of images by split; all of them train's where there are no lists."""
    out: dict[str, list[str]] = {}
    for key, aliases in ALIASES.items():
        path = next((lists / f"{alias}.txt" for alias in aliases if (lists / f"{alias}.txt").is_file()), None)
        if path is None:
            continue
        lines = read_text(path).decode("utf-8", "replace").split("\n")
        names = [line.split()[0] for line in lines if line.split()]  # a second column says whether a class is there
        if len(set(names)) < len(names):
            raise DataError(f"{path}: names an image twice")
        out[key] = names
    return out or {"train": sorted(path.stem for path in annotations.glob("*.xml"))}


def read_xml(path: Path) -> Element:
    """The tree of an xml file without document type or entities. DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path}: over {LARGEST} bytes")
    builder, depth = TreeBuilder(), 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEPTH:
            raise DataError(f"{path}: elements lie more than {DEPTH} deep")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: Any) -> None:
        raise DataError(f"{path}: declares a document type, which may hold entities: refused")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(read_text(path), True)
        return builder.close()
    except (expat.ExpatError, AssertionError, LookupError, ValueError) as e:
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path}: not xml that can be read, or cut off ({e})") from e


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _picture(
    tree: Element,
    name: str,
    where: str,
    pictures: Path,
    files: dict[str, Path],
    out: Gathered,
    complaints: Complaints,
) -> Objects | None:
    """The image an annotation is of, put into `out`; None where it cannot be used."""
    path = files.get(name)
    if path is None and _text(tree, "filename"):
        path = inside(pictures, _text(tree, "filename"), where)
    try:
        if path is None:
            raise DataError(f"{pictures / name}: no such image")
        given = _text(tree, "size/height"), _text(tree, "size/width")
        if given != ("", "") and not all(side.isascii() and side.isdecimal() and len(side) < 10 for side in given):
            raise DataError(f"{where}: height and width are {given[0]!r} and {given[1]!r}")
        size = (int(given[0]), int(given[1])) if given not in (("", ""), ("0", "0")) else None  # 0: not filled in
        seen, upright, grey = fitting(path, size)
    except DataError as e:
        complaints.add(where, str(e))
        return None
    objects = Objects(seen)
    out.add(f"{pictures.name}/{path.name}", path, upright, grey, objects)
    return objects


def _object(
    one: Element, numbers_of: dict[str, int | None], size: tuple[int, int], origin: int
) -> tuple[int | None, tuple[float, float, float, float] | str, bool]:
    """Label (None: left out), box or what is wrong with the object, and whether it is difficult."""
    name, hard = _text(one, "name"), _text(one, "difficult") == "1"
    if name not in numbers_of:
        return None, f"class {name!r} is not in the list of the training files", hard
    try:
        x1, y1, x2, y2 = (float(_text(one, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None, "its bndbox needs the numbers xmin, ymin, xmax and ymax", hard
    if not all(abs(v) < 1e9 for v in (x1, y1, x2, y2)):
        return None, "its bndbox holds a number that is not finite or too large", hard
    if x2 < x1 or y2 < y1 or (origin == 0 and (x1 == x2 or y1 == y2)):
        return None, f"box {x1:g}, {y1:g}, {x2:g}, {y2:g} (xmin, ymin, xmax, ymax) has no area", hard
    return numbers_of[name], box_within((x1 - origin, y1 - origin, x2, y2), size), hard
