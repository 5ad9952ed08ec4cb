import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageDraw

from vertebra.data import DataError, open_source
from vertebra.data.objects import area_of, box_within, inside, mask_of, runs_from, runs_of, shape_within, text_of
from vertebra.data.open import open_unseen
from vertebra.data.voc import open_voc

SHARED = Path(os.environ.get("VERTEBRA_SHARED", Path(__file__).parents[3] / "shared")) / "data"
MASKS = hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 1))


def tools():
    return pytest.importorskip("faster_coco_eval.core.mask")


# run lengths and polygons


@given(MASKS)
@settings(max_examples=60, deadline=None)
def test_run_lengths_round_trip(mask):
    runs = runs_from(mask)
    assert (mask_of(runs, mask.shape) == mask).all() and runs.sum() == mask.size
    assert runs_of(text_of(runs), 2 * mask.size) == runs.tolist()
    assert area_of(runs) == mask.sum()


@given(MASKS)
@settings(max_examples=40, deadline=None)
def test_run_lengths_are_those_of_coco_s_tools(mask):
    made = tools().encode(np.asfortranarray(mask))
    assert text_of(runs_from(mask)).encode() == bytes(made["counts"])
    assert (tools().decode({"size": list(mask.shape), "counts": text_of(runs_from(mask)).encode()}) == mask).all()


def test_run_lengths_by_hand():
    # down the columns, zeros first: column 0 is 0 1, column 1 is 1 0
    assert mask_of(np.array([1, 2, 1]), (2, 2)).tolist() == [[0, 1], [1, 0]]
    assert runs_from(np.ones((2, 2))).tolist() == [0, 4]


@pytest.mark.parametrize("text", ["", "P", "\x7f", "o", "oooooooooooo1", None, 7])
def test_broken_strings_of_run_lengths_are_refused(text):
    with pytest.raises(ValueError):
        runs_of(text, 100)


def test_polygons_are_drawn_as_coco_s_tools_do_and_near_pillow():
    tools()
    square, triangle = [2, 1, 8, 1, 8, 6, 2, 6], [12.0, 2.0, 18.5, 9.0, 11.0, 9.5]
    shape = shape_within([square, triangle], (12, 20))
    mask = mask_of(shape, (12, 20))
    expected = tools().decode(tools().merge(tools().frPyObjects([square, triangle], 12, 20)))
    assert (mask == expected).all() and mask[1:6, 2:8].all() and mask[:, :10].sum() == 30
    drawn = Image.new("1", (20, 12))
    ImageDraw.Draw(drawn).polygon(triangle, fill=1)
    assert (np.asarray(drawn)[:, 10:] ^ mask[:, 10:].astype(bool)).sum() <= 12  # the outline, which Pillow includes
    assert area_of(shape) == 30 + abs((18.5 - 12) * (9.5 - 2) - (11 - 12) * (9 - 2)) / 2


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [4, 5], "counts": [20]}, "another size"),
        ({"size": [5, 4], "counts": [19, 2]}, "21 pixels, the image 20"),
        ({"size": [5, 4], "counts": [20]}, "empty"),
        ({"size": [5, 4], "counts": [-1, 21]}, "whole numbers"),
        ({"size": [5, 4], "counts": [10**30]}, "whole numbers"),
        ({"size": [5, 4], "counts": "o"}, "cut off"),
        ([], "has no mask"),
        (None, "has no mask"),
        ([[1, 2, 3, 4]], "three or more pairs"),
        ([[1, 2, 3, 4, 5]], "three or more pairs"),
        ([[0, 0, 1e9, 0, 0, 1]], "far outside"),
        ([[0, 0, float("nan"), 0, 0, 1]], "three or more pairs"),
    ],
)
def test_masks_that_cannot_be_used_are_told(segmentation, words):
    assert words in shape_within(segmentation, (5, 4))


def test_an_endless_outline_is_refused_before_it_is_drawn():
    zigzag = [0, 0, 4000, 4000] * 1500
    assert "outline" in shape_within([zigzag], (4000, 4000))


def test_boxes_are_clipped_by_rounding_only():
    assert box_within((-0.4, 2, 10.5, 8.9), (9, 10)) == (0, 2, 10, 8.9)
    for box in ((-1.5, 0, 5, 5), (0, 0, 11.5, 5), (20, 20, 30, 30)):
        assert "outside the image of 10x9" in box_within(box, (9, 10))
    for box in ((3, 3, 3, 5), (5, 5, 2, 6)):
        assert "no area" in box_within(box, (9, 10))
    assert "no area in the image" in box_within((10.0, 1, 10.5, 2), (9, 10))


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "a/../../x", "C:\\x.png", "..\\x", "", None, "a\0b"])
def test_file_names_stay_in_the_folder(name, tmp_path):
    with pytest.raises(DataError):
        inside(tmp_path, name, "here")


# COCO


def picture(path, size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


def runs(size, box):
    mask = np.zeros(size, np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return mask


def coco(root, key="train", images=6, change=None, masks=True, mode="RGB"):
    """Images of 20x16 with two objects each, in categories 7 and 3; `change` edits the content."""
    content = {"images": [], "annotations": [], "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]}
    for i in range(images):
        picture(root / "images" / f"{key}{i}.png", mode=mode)
        content["images"].append({"id": 10 + i, "file_name": f"{key}{i}.png", "width": 20, "height": 16})
        for j, (category, box) in enumerate([(7, (2, 3, 8, 9)), (3, (5, 5, 20, 16))]):
            one = {"id": 2 * i + j, "image_id": 10 + i, "category_id": category, "iscrowd": 0}
            one["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            if masks:
                counts = runs_from(runs((16, 20), box))
                one["segmentation"] = {"size": [16, 20], "counts": text_of(counts) if j else counts.tolist()}
            content["annotations"].append(one)
    if change is not None:
        change(content)
    (root / f"instances_{key}.json").write_text(json.dumps(content))
    return content


def test_coco_objects_are_read(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val", 2)
    source = open_source(str(tmp_path))
    assert (source.kind, source.task, source.classes, source.masks) == ("coco", "detection", ("dog", "cat"), True)
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 6, "val": 2, "test": 2}
    target = source.splits["train"].target(0)
    assert target["boxes"].tolist() == [[2, 3, 8, 9], [5, 5, 20, 16]] and target["boxes"].dtype == torch.float32
    assert target["labels"].tolist() == [1, 0] and target["iscrowd"].tolist() == [False, False]
    assert target["area"].tolist() == [36, 165] and target["masks"].dtype == torch.uint8
    assert (target["masks"].numpy() == np.stack([runs((16, 20), (2, 3, 8, 9)), runs((16, 20), (5, 5, 20, 16))])).all()
    assert source.splits["train"].read(0).shape == (3, 16, 20)
    assert "masks" not in open_source(str(tmp_path), masks=False).splits["train"].target(0)


def test_missing_splits_are_carved_and_the_same_each_time(tmp_path):
    coco(tmp_path, images=10)
    source = open_source(str(tmp_path), val=0.2, test=0.3)
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 5, "val": 2, "test": 3}
    again = open_source(str(tmp_path), val=0.2, test=0.3)
    assert again.fingerprint() == source.fingerprint()
    assert list(again.splits["val"].names) == list(source.splits["val"].names)
    coco(tmp_path, images=10, change=lambda c: c["annotations"][3].update(bbox=[5, 5, 14, 11]))
    assert open_source(str(tmp_path), val=0.2, test=0.3).fingerprint() != source.fingerprint()


def test_coco_as_it_is_shipped(tmp_path):
    content = coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    for key in ("train2017", "val2017"):
        (tmp_path / "annotations" / f"instances_{key}.json").write_text(json.dumps(content))
        for i in range(6):
            picture(tmp_path / key / f"train{i}.png")
    (tmp_path / "instances_train.json").unlink()
    assert len(open_source(str(tmp_path)).splits["val"]) == 6
    assert open_source(str(tmp_path)).splits["val"].names[0] == "val2017/train0.png"
    (tmp_path / "annotations" / "instances_train2014.json").write_text("{}")
    with pytest.raises(DataError, match=r"several files for train.*data_options.train"):
        open_source(str(tmp_path))
    named = open_source(str(tmp_path), train="annotations/instances_train2017.json")
    assert len(named.splits["train"]) == 6
    (tmp_path / "some.json").write_text(json.dumps(content))
    alone = open_source(str(tmp_path / "some.json"), images="val2017", val=0.5)
    assert {key: len(split) for key, split in alone.splits.items()} == {"train": 3, "val": 3, "test": 3}


def test_classes_are_chosen_renamed_and_merged(tmp_path):
    coco(tmp_path)
    chosen = open_source(str(tmp_path), classes=["cat"])
    assert chosen.classes == ("cat",) and chosen.splits["train"].target(0)["labels"].tolist() == [0]
    assert "objects of other classes left out: dog 6" in chosen.notes
    merged = open_source(str(tmp_path), classes={"cat": "pet", "dog": "pet"})
    assert merged.classes == ("pet",) and merged.splits["train"].target(0)["labels"].tolist() == [0, 0]
    with pytest.raises(DataError, match="no 'cow'; there are: dog, cat"):
        open_source(str(tmp_path), classes=["cow"])


def edit(place, **values):
    return lambda content: content["annotations"][place].update(values)


BAD = {
    "outside": (edit(3, bbox=[10, 3, 30, 5]), "annotation 3: box 10, 3, 40, 8", 11),
    "no area": (edit(3, bbox=[10, 3, 0, 5]), "annotation 3: .* has no area", 11),
    "text": (edit(3, bbox=[10, "3", 2, 5]), "annotation 3: its bbox must be four numbers", 11),
    "mask size": (edit(3, segmentation={"size": [20, 16], "counts": [320]}), "annotation 3: .*another size", 11),
    "no mask": (edit(3, segmentation=[]), "annotation 3: has no mask", 11),
    "category": (edit(3, category_id=9), "annotation 3: category 9 is not in the list", 11),
    "odd category": (edit(3, category_id=[7]), "annotation 3: category", 11),
    "image": (edit(3, image_id=99), "annotation 3: there is no image 99", 11),
    "twice": (edit(3, id=2), "annotation 2: its id is there twice", 11),
    "crowd": (edit(3, iscrowd=5), "annotation 3: iscrowd must be 0 or 1", 11),
    "image twice": (lambda c: c["images"][1].update(id=10), "image 10: its id is there twice", 8),
    "image missing": (lambda c: c["images"][1].update(file_name="no.png"), r"image 11: .*no.png: no such image", 10),
    "image size": (lambda c: c["images"][1].update(width=30), "is 20x16 .* annotation says 30x16", 10),
    "no object": (lambda c: c["annotations"].append(7), "annotation 12: is '7'", 12),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_annotations_stop_or_are_counted_and_named(case, tmp_path):
    change, words, left = BAD[case]
    coco(tmp_path, change=change)
    with pytest.raises(DataError, match=words) as e:
        open_source(str(tmp_path))
    assert "\n" not in str(e.value) and "instances_train.json" in str(e.value)
    source = open_source(str(tmp_path), bad="skip", val=0.2)
    objects = sum(len(split.target(i)["boxes"]) for k, split in source.splits.items() if k != "test"
                  for i in range(len(split)))  # fmt: skip
    assert objects == left and len(source.skipped) == (4 if case == "image twice" else 1)
    assert "instances_train.json" in source.skipped[0].path


@pytest.mark.parametrize("cut", [0.5, 0.99])
def test_a_file_cut_off_is_an_error_by_any_option(cut, tmp_path):
    coco(tmp_path)
    path = tmp_path / "instances_train.json"
    text = path.read_text()
    path.write_text(text[: int(cut * len(text))])
    for bad in ("stop", "skip"):
        with pytest.raises(DataError, match=r"instances_train.json: not json that can be read, or cut off"):
            open_source(str(tmp_path), bad=bad)


def test_paths_out_of_the_folder_and_deep_json_are_refused(tmp_path):
    coco(tmp_path, change=lambda c: c["images"][0].update(file_name="../../secret.png"))
    with pytest.raises(DataError, match="leads out of the data's folder"):
        open_source(str(tmp_path), bad="skip")
    (tmp_path / "instances_train.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not json"):
        open_source(str(tmp_path))
    (tmp_path / "instances_train.json").write_text('{"images": []}')
    with pytest.raises(DataError, match="has no list 'annotations'"):
        open_source(str(tmp_path))


def test_images_without_objects_are_kept_or_dropped(tmp_path):
    coco(tmp_path, change=lambda c: c.update(annotations=c["annotations"][2:]))
    kept = open_source(str(tmp_path), val=0.2)
    assert sum(len(kept.splits[key]) for key in ("train", "val")) == 6
    empty = [t for k in ("train", "val") for i in range(len(kept.splits[k]))
             if not len((t := kept.splits[k].target(i))["boxes"])]  # fmt: skip
    assert len(empty) == 1 and empty[0]["boxes"].shape == (0, 4) and empty[0]["masks"].shape == (0, 16, 20)
    dropped = open_source(str(tmp_path), val=0.2, empty="drop")
    assert sum(len(dropped.splits[key]) for key in ("train", "val")) == 5
    assert "train: 1 images without objects left out" in dropped.notes


def test_an_image_in_two_splits_is_an_error(tmp_path):
    content = coco(tmp_path)
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"images/train0.png is in train and in val"):
        open_source(str(tmp_path))


def test_a_picture_laid_on_its_side_by_exif_keeps_its_boxes(tmp_path):
    coco(tmp_path, masks=False)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = json.loads((tmp_path / "instances_train.json").read_text())
    for name, size in (("a.jpg", (20, 16)), ("b.jpg", (16, 20))):
        Image.new("RGB", size).save(tmp_path / "images" / name, exif=exif)
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "a.jpg", "b.jpg"
    (tmp_path / "instances_train.json").write_text(json.dumps(content))
    train = open_source(str(tmp_path), val="instances_train.json", whole=True).splits["test"]
    # a: annotated as stored; b: annotated as it is seen
    assert train.read(0).shape == (3, 16, 20) and train.read(1).shape == (3, 16, 20)


def test_new_data_for_a_trained_model_have_its_numbers(tmp_path):
    coco(tmp_path, "test", 3, lambda c: c.update(annotations=[a for a in c["annotations"] if a["category_id"] == 7]))
    source = open_unseen(str(tmp_path), ("bird", "cat", "dog"), "coco")
    assert source.classes == ("bird", "cat", "dog") and len(source.splits["test"]) == 3
    assert source.splits["test"].target(0)["labels"].tolist() == [1]
    with pytest.raises(DataError, match="none of the model's classes"):
        open_unseen(str(tmp_path), ("bird", "cow"), "coco")


# VOC

XML = """<annotation><filename>{name}.png</filename><size><width>20</width><height>16</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{name}</name><difficult>{hard}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>
<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def voc(root, names=("a", "b", "c", "d"), split=True, boxes=((1, 1, 20, 16), (3, 4, 8, 9))):
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        picture(root / "JPEGImages" / f"{name}.png")
        objects = "".join(OBJECT.format(*box, name=("dog", "cat")[i % 2], hard=i % 2) for i, box in enumerate(boxes))
        (root / "Annotations" / f"{name}.xml").write_text(XML.format(name=name, objects=objects))
    if split:
        for key, some in (("train", names[:2]), ("val", names[2:3]), ("test", names[3:])):
            (root / "ImageSets" / "Main" / f"{key}.txt").write_text("".join(f"{name}  1\n" for name in some))


def test_voc_objects_are_read(tmp_path):
    voc(tmp_path)
    source = open_source(str(tmp_path))
    assert (source.kind, source.task, source.classes, source.masks) == ("voc", "detection", ("cat", "dog"), False)
    assert {key: list(split.names) for key, split in source.splits.items()} == {
        "train": ["JPEGImages/a.png", "JPEGImages/b.png"], "val": ["JPEGImages/c.png"], "test": ["JPEGImages/d.png"],
    }  # fmt: skip
    target = source.splits["test"].target(0)
    assert target["boxes"].tolist() == [[0, 0, 20, 16], [2, 3, 8, 9]]  # from 1, the last pixel included
    assert target["labels"].tolist() == [1, 0] and target["iscrowd"].tolist() == [False, True]
    assert target["area"].tolist() == [320, 36]
    kept = open_source(str(tmp_path), difficult="keep", classes={"cat": "pet"}).splits["test"].target(0)
    assert kept["iscrowd"].tolist() == [False] and kept["labels"].tolist() == [0]
    assert len(open_source(str(tmp_path), difficult="drop", classes=["dog"]).splits["test"].target(0)["boxes"]) == 1


def test_voc_without_lists_is_split(tmp_path):
    voc(tmp_path, tuple("abcdefghij"), split=False)
    source = open_source(str(tmp_path), val=0.2, test=0.2)
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 6, "val": 2, "test": 2}


def test_voc_counts_from_zero_where_it_is_told(tmp_path):
    voc(tmp_path, boxes=((0, 0, 20, 16),))
    assert open_voc(tmp_path, origin=0).splits["test"].target(0)["boxes"].tolist() == [[0, 0, 20, 16]]
    assert open_voc(tmp_path).splits["test"].target(0)["boxes"].tolist() == [[0, 0, 20, 16]]  # clipped by one


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("<xmax>8</xmax>", "<xmax>80</xmax>", "object 2: box .* outside the image of 20x16"),
        ("<xmax>8</xmax>", "<xmax>1</xmax>", "object 2: box .* has no area"),
        ("<xmax>8</xmax>", "<xmax>nan</xmax>", "object 2: .* not finite"),
        ("<xmax>8</xmax>", "", "object 2: .* needs the numbers"),
        ("<name>cat</name>", "<name>cow</name>", "object 2: class 'cow' is not in the list"),
        ("<width>20</width>", "<width>30</width>", "is 20x16 .* says 30x16"),
        ("</annotation>", "", "not xml that can be read, or cut off"),
        ("<annotation>", '<!DOCTYPE a [<!ENTITY b "c">]><annotation>', "declares a document type"),
        ("<annotation>", "<annotation>" + "<a>" * 40, "deep"),
    ],
)
def test_bad_xml_stops_or_is_counted(old, new, words, tmp_path):
    voc(tmp_path)
    path = tmp_path / "Annotations" / "d.xml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path))
    voc(tmp_path, tuple("abcde"))
    path.write_text(path.read_text().replace(old, new))
    source = open_source(str(tmp_path), bad="skip")
    assert len(source.skipped) == 1 and "d.xml" in source.skipped[0].path


# the sets at hand


@pytest.mark.skipif(not (SHARED / "nuclei").is_dir(), reason="the data are not here")
def test_the_sets_at_hand_have_their_published_counts():
    counts = {}
    for name in ("nuclei", "bccd", "coco-mini"):
        source = open_source(str(SHARED / name))
        counts[name] = {
            key: (len(s), sum(len(s.targets.found[i].boxes) for i in s.index)) for key, s in source.splits.items()
        }
    assert counts["nuclei"] == {"train": (119, 3817), "val": (51, 1415), "test": (51, 1415)}
    assert counts["bccd"] == {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}
    assert counts["coco-mini"] == {"train": (70, 582), "val": (68, 484), "test": (68, 484)}
    nuclei = open_source(str(SHARED / "nuclei")).splits["val"]
    target = nuclei.target(0)
    ys, xs = np.nonzero(target["masks"][0].numpy())
    assert target["boxes"][0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert target["area"][0] == len(xs)
    bccd = open_source(str(SHARED / "bccd"))
    labels = np.concatenate([o.labels for s in bccd.splits.values() for o in s.targets.found])
    assert dict(zip(bccd.classes, np.bincount(labels).tolist(), strict=True)) == {
        "RBC": 4153, "WBC": 372, "Platelets": 361,
    }  # fmt: skip
