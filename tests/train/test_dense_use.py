"""Asking runs of segmentation and detection: what is said, what is written, and where it may be written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import call

from vertebra.tasks.inference import segment
from vertebra.train import Config, Run, RunError, predict, predict_iter
from vertebra.train.answers import Table, as_text
from vertebra.train.build import make_model, make_transforms
from vertebra.train.pictures import Pictures
from vertebra.train.use import Prediction, _objects, load_best, run_lengths

SMALL = dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
CLASSES = ("background", "cell", "other")


def untrained(folder: Path, task: str, head: str, ndim: int = 2, **options) -> Run:
    """A run as training leaves it, with weights at random; a detector that is sure of something."""
    image = dict(crop=1.0, interpolation="bilinear", order="RGB") if ndim == 2 else dict(normalise="none")
    channels = 3 if ndim == 2 else 1
    given = dict(model="pvt_v2_b0", overrides=SMALL, data="gone", task=task, head=head, ndim=ndim, channels=channels,
                 mean=(0.5,) * channels, std=(0.25,) * channels, img_size=32, augment="standard", loss=task,
                 batch_size=2, workers=0, threads=1, accelerator="cpu")  # fmt: skip
    config = Config(**given | image | options)
    data = {"classes": list(CLASSES), "kind": "masks", "name": "gone", "fingerprint": "", "counts": {}, "notes": []}
    run = Run(folder, config, data)
    folder.mkdir()
    run.write_json("config.json", {"config": config.model_dump(), "data": data})
    torch.manual_seed(0)
    run.write_weights("best.safetensors", make_model(config, run.outputs).state_dict())
    return run


@pytest.fixture
def ask(capsys, monkeypatch):
    return lambda *args: call(capsys, monkeypatch, *args)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images of one name in two folders, of different and odd sizes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [root / "a" / "one.png", root / "b" / "one.png"]
    for path, sides in zip(paths, ((37, 50), (64, 41)), strict=True):
        path.parent.mkdir()
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(path)
    return root, paths


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "segmenter", "segmentation", "segformer",
                     head_options={"channels": 8})  # fmt: skip


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("runs") / "detector", "detection", "mask_rcnn",
                     head_options={"light": True}, max_size=64)  # fmt: skip


def test_a_segmenter_is_asked_at_each_images_own_size(segmenter, pictures, ask, tmp_path):
    _, paths = pictures
    out = tmp_path / "answers"
    code, told, err = ask("predict", segmenter.folder, *paths, "--format", "json", "--out", out)
    assert (code, err) == (0, "") and told == f"2 read: {out / 'predictions.json'}\n"
    names = {"one.png", "one_drawn.png", "one_2.png", "one_2_drawn.png", "predictions.json"}
    assert {p.name for p in out.iterdir()} == names
    model = load_best(segmenter, make_model(segmenter.config, 3)).eval()
    transform = make_transforms(segmenter.config)[1]
    for path, answer, name in zip(paths, json.loads((out / "predictions.json").read_text()), ("one", "one_2")):
        pixels = np.array(Image.open(path))
        x, _ = transform(torch.from_numpy(pixels).permute(2, 0, 1), None)
        with torch.no_grad():
            expected = model(x[None])[0].argmax(0).numpy()
        found = np.array(Image.open(out / f"{name}.png"))
        assert np.array_equal(found, expected) and answer["size"] == list(pixels.shape[:2])
        shares = np.bincount(expected.ravel(), minlength=3) / expected.size
        assert list(answer["shares"]) == list(CLASSES)
        assert list(answer["shares"].values()) == pytest.approx(shares.tolist())
        drawn = np.array(Image.open(out / f"{name}_drawn.png"))
        assert ((drawn != pixels).any(-1) <= (found != 0)).all() and (drawn[found == 0] == pixels[found == 0]).all()
        assert answer["files"] == [str(out / f"{name}.png"), str(out / f"{name}_drawn.png")]


def test_a_segmenter_is_asked_with_the_runs_windows(segmenter, pictures, tmp_path):
    _, paths = pictures
    options = dict(window=32, stride=16, test_flip=True, test_scales=(1.0, 1.5), head_options={"channels": 8})
    run = untrained(tmp_path / "run", "segmentation", "segformer", **options)
    (found,) = predict(run.folder, paths[:1])
    pixels = torch.from_numpy(np.array(Image.open(paths[0]))).permute(2, 0, 1)
    x, _ = make_transforms(run.config)[1](pixels, None)
    model = load_best(run, make_model(run.config, 3)).eval()
    expected = segment(model, x, 32, 16, True, (1.0, 1.5)).argmax(0)
    assert torch.equal(found.labels, expected) and found.files == ()
    (plain,) = predict(segmenter.folder, paths[:1])  # the same weights
    assert not torch.equal(plain.labels, expected)


def test_volumes_and_signals_get_arrays(tmp_path):
    for ndim, sides in ((1, (90,)), (3, (33, 32, 35))):
        run = untrained(tmp_path / f"run{ndim}", "segmentation", "segformer", ndim, head_options={"channels": 8})
        run.data["kind"] = "signals"
        path, out = tmp_path / f"sample{ndim}.npy", tmp_path / f"out{ndim}"
        np.save(path, np.random.default_rng(0).normal(size=(1, *sides)).astype(np.float32))
        (found,) = predict(run.folder, [path], out=out)
        assert found.error is None and found.size == sides
        labels = np.load(out / f"sample{ndim}.npy")
        assert labels.dtype == np.uint8 and np.array_equal(labels, found.labels.numpy()) and labels.shape == sides
        assert Image.open(out / f"sample{ndim}_drawn.png").size[0] > 50


def test_a_detector_writes_boxes_masks_and_pictures(detector, pictures, ask, tmp_path):
    rle = pytest.importorskip("faster_coco_eval.core").mask
    _, paths = pictures
    out = tmp_path / "answers"
    code, told, err = ask("predict", detector.folder, *paths, "--format", "json", "--threshold", 0.3, "--out", out)
    assert (code, err) == (0, "") and {p.name for p in out.iterdir()} == {
        "one_drawn.jpg", "one_2_drawn.jpg", "predictions.json"}  # fmt: skip
    answers = json.loads((out / "predictions.json").read_text())
    model = load_best(detector, make_model(detector.config, 3)).eval()
    for path, answer in zip(paths, answers, strict=True):
        x = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
        with torch.no_grad():
            expected = model([x])[0]
        keep = expected["scores"] >= 0.3
        assert keep.any() and len(answer["objects"]) == int(keep.sum())
        for i, one in enumerate(answer["objects"]):
            assert one["class"] == CLASSES[int(expected["labels"][i])]
            assert one["score"] == pytest.approx(float(expected["scores"][i]), abs=1e-5)
            assert one["box"] == pytest.approx(expected["boxes"][i].tolist(), abs=0.01)
            shown = rle.decode({**one["mask"], "counts": one["mask"]["counts"].encode()})
            assert np.array_equal(shown, (expected["masks"][i, 0] > 0.5).numpy())
        assert answer["size"] == list(x.shape[1:])
    code, told, _ = ask("predict", detector.folder, paths[0], "--threshold", 0.3, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(told)))
    assert code == 0 and len(rows) == len(answers[0]["objects"])
    assert float(rows[0]["right"]) == answers[0]["objects"][0]["box"][2] and rows[0]["error"] == ""
    code, told, _ = ask("predict", detector.folder, paths[0], "--threshold", 1)
    assert (code, told) == (0, f"{paths[0]}  nothing\n")


def test_damaged_and_tiny_files_are_reported_in_their_places(segmenter, pictures, ask, tmp_path):
    _, paths = pictures
    (tmp_path / "bad.png").write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(tmp_path / "tiny.png")
    given = [paths[0], tmp_path / "bad.png", tmp_path / "tiny.png", paths[1]]
    code, _, err = ask("predict", segmenter.folder, *given, "--format", "csv", "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "predictions.csv").open()))
    assert code == 2 and [bool(row["error"]) for row in rows] == [False, True, True, False]
    assert "too small" in rows[2]["error"] and err.count("\n") == 2
    assert sum(float(rows[3][f"share {name}"]) for name in CLASSES) == pytest.approx(1)


def test_no_input_is_overwritten_and_no_other_task_draws(segmenter, pictures, tmp_path):
    root, paths = pictures
    before = paths[0].read_bytes()
    for asked, out, message in (
        (paths[0], paths[0].parent, "lies in it"),
        (paths[0], root, "lies in it"),
        (root, root, "lies in it"),
        (root, root / "out", "lies in the input"),
    ):
        with pytest.raises(RunError, match=message):
            predict(segmenter.folder, [asked], out=out)
    assert paths[0].read_bytes() == before and not any((root / "out").iterdir())
    (root / "out").rmdir()
    run = Run(tmp_path, Config(task="single"), {"classes": list(CLASSES)})
    run.write_json("config.json", {"config": run.config.model_dump(), "data": run.data})
    with pytest.raises(RunError, match="task single has no pictures"):
        predict_iter(tmp_path, paths, out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        predict_iter(segmenter.folder, paths, out=tmp_path / "file")


def test_names_never_collide_and_never_leave_the_folder(tmp_path):
    out = Pictures(tmp_path / "out", CLASSES)
    labels, image = torch.zeros(4, 4, dtype=torch.long), torch.zeros(3, 4, 4, dtype=torch.uint8)
    given = ["a.png", "b/a.jpg", "A.png", "a_2.png", "a_drawn.png", "...", "x/.hidden", "\x1b[2J/..\\..\\c.png"]
    given += ["牛.png", "é" * 300 + ".png"]
    written = [Path(file) for path in given for file in out.segmentation(path, image, labels)]
    assert len({str(path).casefold() for path in written}) == len(written) == 2 * len(given)
    assert {path.parent for path in written} == {tmp_path / "out"}
    assert sorted(written) == sorted((tmp_path / "out").iterdir())
    for path in written:
        assert path.name.isprintable() and not path.name.startswith(".") and len(path.name.encode()) < 256
    assert written[0].name == "a.png" and written[1].name == "a_drawn.png"
    again = Pictures(tmp_path / "out", CLASSES)  # a second call answers under the same names
    assert again.segmentation("a.png", image, labels + 1) == tuple(map(str, written[:2]))
    assert (np.array(Image.open(written[0])) == 1).all()


def test_objects_are_the_best_first():
    found = {"boxes": torch.arange(12.0).view(3, 4), "labels": torch.tensor([2, 0, 1]),
             "scores": torch.tensor([0.6, 0.2, 0.9])}  # fmt: skip
    assert [(one["class"], one["box"]) for one in _objects(found, CLASSES, 0.5)] == [
        ("other", [0, 1, 2, 3]), ("cell", [8, 9, 10, 11])][::-1]  # fmt: skip
    assert "mask" not in _objects(found, CLASSES, 0.0)[2] and len(_objects(found, CLASSES, 0.0)) == 3


def test_what_is_said_for_people(tmp_path):
    run = Run(tmp_path, Config(task="segmentation"), {"classes": list(CLASSES)})
    found = [Prediction("f", shares={"background": 0.25, "cell": 0.75, "other": 0.0}, size=(2, 2))]
    assert "".join(as_text(found, run, "table", 5)) == "f  cell 75.0%, background 25.0%\n"
    assert "".join(as_text(found, run, "table", 1)) == "f  cell 75.0%\n"
    run = Run(tmp_path, Config(task="detection"), {"classes": list(CLASSES)})
    one = {"class": "cell", "score": 0.9, "box": [1.0, 2.0, 3.0, 4.0]}
    found = [Prediction("f", objects=(one, one | {"class": "other"}, one)), Prediction("g", objects=())]
    assert "".join(as_text(found, run, "table", 5)) == "f  cell 2, other 1\ng  nothing\n"
    lines = "".join(as_text(found, run, "csv", 5)).splitlines()
    assert lines[0] == "image,class,score,left,top,right,bottom,error"
    assert lines[1] == "f,cell,0.9,1.0,2.0,3.0,4.0," and lines[4] == "g,,,,,,," and len(lines) == 5


def test_tables_of_segmentation_and_detection():
    file = io.BytesIO()
    write = Table(file, "segmentation", CLASSES, ["first", "second"], 255)
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 1, 0] = logits[0, 0, 1] = 50.0  # the first row is "cell", the second "background"
    write(torch.tensor([1]), torch.tensor([[[1, 255], [0, 1]]]), logits)
    write(torch.tensor([0]), [torch.zeros(4, 4, dtype=torch.long)], [logits[0]])  # at its target's size
    one, two = csv.DictReader(io.StringIO(file.getvalue().decode()))
    assert one["name"] == "second" and two["name"] == "first"
    # cell: one of two true cells found; background: one found, two said; nothing of the other class
    assert (float(one["accuracy"]), float(one["iou cell"])) == pytest.approx((2 / 3, 1 / 2))
    assert float(one["iou background"]) == pytest.approx(1 / 2) and one["iou other"] == ""
    assert float(one["miou"]) == pytest.approx(1 / 2) and float(one["loss"]) == pytest.approx(50 / 3, rel=1e-4)
    assert float(two["accuracy"]) == pytest.approx(0.5)
    file = io.BytesIO()
    write = Table(file, "detection", CLASSES, ["first"])
    boxes = torch.tensor([[1.0, 2, 3, 4]])
    write(torch.tensor([0]), [{"boxes": boxes, "labels": torch.tensor([1])}],
          [{"boxes": boxes + 1, "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}])  # fmt: skip
    assert file.getvalue().decode().splitlines() == ["name,what,class,score,left,top,right,bottom",
        "first,target,cell,,1.0,2.0,3.0,4.0", "first,prediction,other,0.5,2.0,3.0,4.0,5.0"]  # fmt: skip


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_run_lengths_are_cocos(height, width, seed, share):
    masks = pytest.importorskip("faster_coco_eval.core").mask
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    found = run_lengths(mask)
    expected = masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    assert found["counts"] == expected["counts"].decode() and found["size"] == list(expected["size"])
    assert np.array_equal(masks.decode({**found, "counts": found["counts"].encode()}).astype(bool), mask.numpy())


def test_run_lengths_by_hand():
    """The columns of [[0, 1], [0, 1]] are two zeros and two ones; a mask of ones begins with no zeros."""
    assert run_lengths(torch.tensor([[0, 1], [0, 1]]))["counts"] == "22"
    assert run_lengths(torch.ones(2, 3))["counts"] == "06"
    # 40 has six bits: 8 with the sixth bit set for "more", then 1
    assert run_lengths(torch.zeros(40, 1))["counts"] == chr(48 + 8 + 32) + chr(48 + 1)
