import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.data import DataError, open_source

SHARED = Path(os.environ.get("VERTEBRA_SHARED", Path(__file__).parents[3] / "shared")) / "data"


def save(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        image = Image.fromarray(np.asarray(values, np.uint8))
        image.putpalette([5, 5, 5] * 256)  # all of one colour: the places count, not the colours
    image.save(path)


def folders(root, splits=("train", "val", "test"), count=3, masks="masks", images="images", mode=None, low=0):
    rng = np.random.default_rng(0)
    for key in splits:
        for i in range(count):
            save(root / images / key / f"{i}.png", rng.integers(0, 255, (6, 8, 3), np.uint8))
            values = rng.integers(low, 3 + low, (6, 8)).astype(np.uint8)
            values[0, :3] = np.arange(low, low + 3)
            save(root / masks / key / f"{i}.png", values, mode)
    return values


def sizes(source):
    return {key: len(split) for key, split in source.splits.items()}


@pytest.mark.parametrize("mode", [None, "P"])
def test_mask_folders(tmp_path, mode):
    values = folders(tmp_path, mode=mode)
    source = open_source(str(tmp_path), classes=["a", "b", "c"])
    assert (source.kind, source.task, source.ignore, source.channels) == ("masks", "segmentation", 255, 3)
    assert sizes(source) == {"train": 3, "val": 3, "test": 3}
    target = source.splits["test"].target(2)
    assert target.dtype == torch.uint8 and (target.numpy() == values).all()
    assert source.splits["test"].read(2).shape == (3, 6, 8) and source.splits["test"].names[2] == "images/test/2.png"
    assert open_source(str(tmp_path)).classes == ("0", "1", "2")


def test_void_becomes_one_mark_and_values_become_numbers(tmp_path):
    folders(tmp_path, low=4)
    source = open_source(str(tmp_path), classes=["x", "y"], values=[6, 4], ignore=5)
    raw = np.asarray(Image.open(tmp_path / "masks/val/0.png"))
    expected = np.select([raw == 6, raw == 4], [0, 1], 255)
    assert (source.splits["val"].target(0).numpy() == expected).all()
    with pytest.raises(DataError, match="the value 5 is no class"):
        open_source(str(tmp_path), classes=["x", "y"], values=[6, 4])
    with pytest.raises(DataError, match="2 different numbers"):
        open_source(str(tmp_path), classes=["x", "y"], values=[6, 6])
    with pytest.raises(DataError, match="4 is a class and to be ignored"):
        open_source(str(tmp_path), classes=["x", "y"], values=[6, 4], ignore=[4, 5])


def test_binary_masks_of_0_and_255(tmp_path):
    folders(tmp_path, count=1)
    for key in ("train", "val", "test"):
        save(tmp_path / "masks" / key / "0.png", np.tile(np.array([[0, 255]], np.uint8), (6, 4)))
    source = open_source(str(tmp_path), classes=["ground", "cell"], values=[0, 255])
    assert source.splits["train"].target(0)[0].tolist() == [0, 1] * 4


def test_many_classes_need_wider_numbers(tmp_path):
    for key in ("train", "val"):
        save(tmp_path / "images" / key / "0.png", np.zeros((6, 8), np.uint8))
        save(tmp_path / "masks" / key / "0.png", np.full((6, 8), 300, np.uint16))
    source = open_source(str(tmp_path), classes=[f"c{i}" for i in range(400)])
    target = source.splits["train"].target(0)
    assert source.ignore == 65535 and target.dtype == torch.int64 and (target == 300).all() and source.channels == 1


def test_ade_and_cityscapes_layouts(tmp_path):
    ade, city = tmp_path / "ade", tmp_path / "city"
    folders(ade, ("training", "validation"), masks="annotations", low=0)
    source = open_source(str(ade), classes=["wall", "sky"], first=1)
    raw = np.asarray(Image.open(ade / "annotations/training/1.png")).astype(int)
    assert sizes(source) == {"train": 3, "val": 3, "test": 3} and "no test split" in source.notes[-1]
    assert (source.splits["train"].target(1).numpy() == np.where(raw == 0, 255, raw - 1)).all()
    for key in ("train", "val"):
        save(city / "leftImg8bit" / key / "ulm" / "ulm_0_leftImg8bit.png", np.zeros((6, 8, 3), np.uint8))
        for kind in ("color", "labelTrainIds"):
            save(city / "gtFine" / key / "ulm" / f"ulm_0_gtFine_{kind}.png", np.full((6, 8), 1, np.uint8))
    source = open_source(str(city), classes=["road", "car"])
    assert list(source.splits["train"].names) == ["leftImg8bit/train/ulm/ulm_0_leftImg8bit.png"]


def test_flat_folders_are_split_and_lists_are_followed(tmp_path):
    for i in range(10):
        save(tmp_path / "images" / f"{i}.jpg", np.zeros((6, 8, 3), np.uint8))
        save(tmp_path / "masks" / f"{i}_m.png", np.full((6, 8), i % 2, np.uint8))
    source = open_source(str(tmp_path), mask_suffix="_m", val=0.2, test=0.1)
    assert sizes(source) == {"train": 7, "val": 2, "test": 1}
    assert source.fingerprint() == open_source(str(tmp_path), mask_suffix="_m", val=0.2, test=0.1).fingerprint()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/train.txt").write_text("1\n2\n3\n")
    (tmp_path / "lists/val.txt").write_text("4\n")
    source = open_source(str(tmp_path), mask_suffix="_m", lists="lists")
    assert sizes(source) == {"train": 3, "val": 1, "test": 1}
    (tmp_path / "lists/val.txt").write_text("44\n")
    with pytest.raises(DataError, match=r"val.txt: there is no pair of image and mask called '44'"):
        open_source(str(tmp_path), mask_suffix="_m", lists="lists")


def test_split_folders_above(tmp_path):
    for key in ("train", "val"):
        save(tmp_path / key / "images" / "a.png", np.zeros((6, 8, 3), np.uint8))
        save(tmp_path / key / "masks" / "a.png", np.eye(6, 8, dtype=np.uint8))
    assert list(open_source(str(tmp_path)).splits["val"].names) == ["val/images/a.png"]


def test_classes_json_names_classes_and_void(tmp_path):
    folders(tmp_path)
    (tmp_path / "classes.json").write_text(json.dumps({"classes": ["a", "b"], "ignore_index": 2}))
    source = open_source(str(tmp_path))
    assert source.classes == ("a", "b") and source.splits["train"].target(0)[0, :3].tolist() == [0, 1, 255]
    (tmp_path / "classes.json").write_text('{"classes": ["a", ')
    with pytest.raises(DataError, match=r"classes.json: not json"):
        open_source(str(tmp_path))


def broken_size(root):
    save(root / "masks/train/1.png", np.zeros((8, 6), np.uint8))


def broken_value(root):
    save(root / "masks/train/1.png", np.full((6, 8), 9, np.uint8))


def broken_colour(root):
    save(root / "masks/train/1.png", np.zeros((6, 8, 3), np.uint8))


def broken_file(root):
    path = root / "masks/train/1.png"
    path.write_bytes(path.read_bytes()[:60])


def broken_image(root):
    (root / "images/train/1.png").write_bytes(b"no image")


def broken_pair(root):
    (root / "masks/train/1.png").unlink()


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (broken_size, "masks/train/1.png: is of another size, 6x8, its image 8x6"),
        (broken_value, "masks/train/1.png: the value 9 is no class"),
        (broken_colour, "masks/train/1.png: a mask of mode RGB"),
        (broken_file, "masks/train/1.png: not an image"),
        (broken_image, "images/train/1.png: not an image"),
        (broken_pair, "images/train/1.png: has no mask"),
    ],
)
def test_bad_pairs_stop_or_are_counted_and_named(breaks, words, tmp_path):
    folders(tmp_path)
    breaks(tmp_path)
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path), classes=["a", "b", "c"])
    source = open_source(str(tmp_path), classes=["a", "b", "c"], bad="skip")
    assert list(source.splits["train"].names) == ["images/train/0.png", "images/train/2.png"]
    assert len(source.skipped) == 1 and "1.png" in source.skipped[0].path


def test_unchecked_masks_are_found_bad_when_they_are_read(tmp_path):
    folders(tmp_path)
    broken_value(tmp_path)
    source = open_source(str(tmp_path), classes=["a", "b", "c"], check=False)
    with pytest.raises(DataError, match=r"1.png: the value 9 is no class \(48 positions\)"):
        source.splits["train"].target(1)


def test_the_fingerprint_follows_the_masks(tmp_path):
    folders(tmp_path)
    before = open_source(str(tmp_path)).fingerprint()
    save(tmp_path / "masks/train/1.png", np.tile(np.array([0, 1], np.uint8), (6, 4)))
    assert open_source(str(tmp_path)).fingerprint() != before


# arrays


def archive(path, rank, n=12, **more):
    rng = np.random.default_rng(rank)
    size = (8, 6, 5)[:rank]
    x, y = rng.normal(size=(n, *size)).astype(np.float32), rng.integers(0, 3, (n, *size))
    np.savez(path, X=x, Y=y, **more)
    return x, y


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_maps_of_every_rank(rank, tmp_path):
    x, y = archive(tmp_path / "a.npz", rank)
    source = open_source(str(tmp_path / "a.npz"), maps=True if rank == 1 else None)
    assert (source.task, source.ndim, source.channels, source.size) == ("segmentation", rank, 1, (8, 6, 5)[:rank])
    assert source.classes == ("0", "1", "2") and sum(sizes(source).values()) == 12
    for split in source.splits.values():
        for i, place in enumerate(split.index):
            assert (split.read(i)[0].numpy() == x[place]).all() and (split.target(i).numpy() == y[place]).all()


def test_one_axis_of_labels_is_no_map_unless_it_is_asked(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.random.rand(20, 4), Y=np.tile(np.eye(4, dtype=int), (5, 1)))
    assert open_source(str(tmp_path / "a.npz")).task == "multi"
    assert open_source(str(tmp_path / "a.npz"), maps=True).task == "segmentation"


def test_channels_beside_maps(tmp_path):
    x = np.random.rand(10, 2, 8, 6)
    np.savez(tmp_path / "a.npz", X=x, Y=np.arange(480).reshape(10, 8, 6) % 2)
    assert open_source(str(tmp_path / "a.npz")).channels == 2
    np.savez(tmp_path / "b.npz", X=np.moveaxis(x, 1, -1), Y=np.arange(480).reshape(10, 8, 6) % 2)
    assert open_source(str(tmp_path / "b.npz"), layout="last").channels == 2
    with pytest.raises(DataError, match="the labels are no maps"):
        open_source(str(tmp_path / "b.npz"), maps=True)


def test_padding_is_void_cropped_or_kept(tmp_path):
    shapes = np.array([[8, 6], [5, 4]] * 6)
    x, y = archive(tmp_path / "a.npz", 2, shape=shapes, split=np.array([0, 0, 1] * 4))
    options = {"shape": "shape", "split": "split", "val_folds": [1], "test": 0.3}
    void = open_source(str(tmp_path / "a.npz"), **options)
    crop = open_source(str(tmp_path / "a.npz"), padding="crop", **options)
    assert len(void.splits["val"]) == 4 and void.size == (8, 6) and crop.size is None
    for i, place in enumerate(void.splits["train"].index):
        rows, columns = shapes[place]
        expected = np.full((8, 6), 255)
        expected[:rows, :columns] = y[place, :rows, :columns]
        assert (void.splits["train"].target(i).numpy() == expected).all()
        assert (crop.splits["train"].target(i).numpy() == y[place, :rows, :columns]).all()
        assert (crop.splits["train"].read(i)[0].numpy() == x[place, :rows, :columns]).all()
    kept = open_source(str(tmp_path / "a.npz"), padding="keep", **options)
    assert len({s.fingerprint() for s in (void, crop, kept)}) == 3
    archive(tmp_path / "b.npz", 2, shape=shapes + 1)
    with pytest.raises(DataError, match=r"the shape \[9, 7\] is not within"):
        open_source(str(tmp_path / "b.npz"), shape="shape")


def test_whole_groups_stay_together(tmp_path):
    archive(tmp_path / "a.npz", 2, 20, patient=np.repeat(np.arange(10), 2))
    source = open_source(str(tmp_path / "a.npz"), group="patient")
    for split in source.splits.values():
        assert all((split.index // 2 == patient).sum() == 2 for patient in split.index // 2)


@pytest.mark.parametrize(("value", "words"), [(7, "holds 7, which is none of the 3 classes"), (-1, "whole")])
def test_a_value_that_is_no_class(value, words, tmp_path):
    x, y = archive(tmp_path / "a.npz", 2)
    y[4, 2, 2] = value
    np.savez(tmp_path / "a.npz", X=x, Y=y, classes=np.array(["a", "b", "c"]))
    with pytest.raises(DataError, match=rf"X\[4\].*{words}"):
        open_source(str(tmp_path / "a.npz"))
    source = open_source(str(tmp_path / "a.npz"), bad="skip")
    assert sum(sizes(source).values()) == 11 and len(source.skipped) == 1 and "X[4]" in source.skipped[0].path


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="the data are not here")
def test_the_sets_at_hand_have_their_published_counts():
    camvid = open_source(str(SHARED / "camvid"), check=False)
    assert sizes(camvid) == {"train": 367, "val": 101, "test": 233} and len(camvid.classes) == 11
    values = np.bincount(
        np.concatenate([camvid.splits["val"].target(i).numpy().ravel() for i in range(101)]), minlength=256
    )
    counts = json.loads((SHARED / "camvid/classes.json").read_text())["pixel_counts"]["val"]
    assert values[:11].tolist() == [counts[name] for name in camvid.classes] and values[255] == counts["void"]
    volumes = open_source(str(SHARED / "hippocampus/hippocampus60.npz"), split="split", test_folds=[1], shape="shape")
    assert sizes(volumes) == {"train": 36, "val": 4, "test": 20} and volumes.ndim == 3
    assert volumes.classes == ("background", "anterior", "posterior")
    targets = np.concatenate([s.target(i).numpy().ravel() for s in volumes.splits.values() for i in range(len(s))])
    assert np.bincount(targets)[1:3].tolist() == [103722, 92944]
