"""Training of segmenters and detectors on synthetic squares: what they learn, resuming, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from dense_samples import DETECTOR, SEGMENTER, dense_source, squares
from safetensors.torch import load_file

from vertebra.data import DataError
from vertebra.tasks.inference import segment
from vertebra.train import Config, ConfigError, Run, fit, fitting, resume, use
from vertebra.train.build import make_loss, make_model, make_transforms, resolve
from vertebra.train.comparing import compare


@pytest.fixture
def opened(monkeypatch):
    """fit() finds the squares: opened("segmentation", masks=False, sizes={...})."""

    def put(task, masks=False, **options):
        monkeypatch.setattr(fitting, "open_source", lambda *args, **more: dense_source(task, masks, **options))

    return put


def same(a, b):
    first, second = load_file(a / "last.safetensors"), load_file(b / "last.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_segmenter_learns_squares(opened, tmp_path):
    opened("segmentation", sizes={"train": 24, "val": 1, "test": 4})
    easy = {"head": "unet", "head_options": {}, "augment": "none", "lr": 4e-3, "epochs": 8}
    result = fit(Config(**SEGMENTER | easy), tmp_path / "run")
    assert result.score == "miou" and result.test["miou"] > 0.9
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    summary = json.loads((tmp_path / "run" / "result.json").read_text())
    assert summary["test_miou"] == result.test["miou"] and set(summary["classes"]) == {"ground", "red", "green"}
    assert summary["classes"]["red"]["iou"] > 0.8
    page = (tmp_path / "run" / "report.html").read_text()
    assert "of the cells right" in page and page.count('<img alt="prediction"') == 4


def test_a_detector_learns_squares(opened, tmp_path):
    opened("detection", sizes={"train": 20, "val": 1, "test": 4})
    result = fit(Config(**DETECTOR | {"augment": "none", "lr": 3e-3, "epochs": 7, "max_size": 64}), tmp_path / "run")
    assert result.score == "map" and result.test["map_50"] > 0.5
    assert result.history[-1]["train_loss"] < 0.6 * result.history[0]["train_loss"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_map_50"] == result.history[-1]["val_map_50"] and rows[-1]["val_map_large"] is None
    assert json.loads((tmp_path / "run" / "result.json").read_text())["classes"]["red"]["objects"] > 0
    assert '<img alt="found"' in (tmp_path / "run" / "report.html").read_text()


SHORT = {"epochs": 2, "drop_path_rate": 0.2, "accumulate": 2, "clip": 0.5, "layer_decay": 0.8, "ema": 0.9}
FEW = {"train": 8, "val": 1, "test": 1}


@pytest.mark.parametrize("head", ["semantic_fpn", "mask_rcnn"])
def test_resuming_is_exact(head, opened, tmp_path, monkeypatch):
    """With crops, flips and all that draws random numbers, a detector's samples of boxes too."""
    segments = head == "semantic_fpn"
    opened("segmentation" if segments else "detection", not segments, sizes=FEW)
    config = (SEGMENTER if segments else DETECTOR) | SHORT | {"head": head, "augment": "strong"}
    if not segments:
        config |= {
            "head_options": {"light": True, "samples": 16, "proposals": 20, "train_candidates": 20, "detections": 5},
            "short_sides": (48, 64),
        }
    monkeypatch.setattr(fitting, "write_report", lambda *args, **more: None)  # drawing takes longer than training
    whole = fit(Config(**config), tmp_path / "whole")
    train = fitting.train_epoch

    def stop(t, loader, epoch, classes):
        if epoch == 1:
            raise KeyboardInterrupt
        return train(t, loader, epoch, classes)

    monkeypatch.setattr(fitting, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(Config(**config), tmp_path / "broken")
    monkeypatch.setattr(fitting, "train_epoch", train)
    again = resume(tmp_path / "broken")
    assert same(tmp_path / "whole", tmp_path / "broken")
    # equal figures, and none where there is none
    assert str(again.test) == str(whole.test)
    assert [row["train_loss"] for row in again.history] == [row["train_loss"] for row in whole.history]


def test_the_backbone_learns_slower_by_layer_decay(opened):
    opened("segmentation")
    config = resolve(Config(**SEGMENTER | {"layer_decay": 0.5}), dense_source("segmentation"))
    from lightning.fabric import Fabric

    trainer, _ = fitting._trainer(
        config, dense_source("segmentation"), Fabric(accelerator="cpu"), fitting.Watch(), start=True
    )
    scale = {id(p): group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    named = {name: scale[id(p)] for name, p in trainer.net.named_parameters()}
    heads = {value for name, value in named.items() if not name.startswith("pyramid.backbone.")}
    inside = {value for name, value in named.items() if name.startswith("pyramid.backbone.")}
    assert heads == {1.0} and min(inside) < 0.2 and len(inside) > 3


def test_half_precision_trains_a_segmenter(opened, tmp_path):
    opened("segmentation", sizes=FEW)
    result = fit(Config(**SEGMENTER | {"precision": "bf16-mixed", "epochs": 1}), tmp_path / "run")
    assert math.isfinite(result.history[0]["train_loss"])


def test_testing_looks_as_the_configuration_says(opened, tmp_path, monkeypatch):
    """fit's and evaluate's figures are those of segment() called by hand on each test sample."""
    opened("segmentation", sizes={"train": 4, "val": 1, "test": 3})
    monkeypatch.setattr(fitting, "write_report", lambda *args, **more: None)
    monkeypatch.setattr(use, "open_source", fitting.open_source)
    looks = {"window": 48, "stride": 20, "test_flip": True, "test_scales": (0.75, 1.0)}
    easy = {"head": "unet", "head_options": {"channels": 8}, "augment": "light", "lr": 1e-2, "epochs": 1}
    result = fit(Config(**SEGMENTER | easy | looks), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    model, transform = use.load_best(run, make_model(run.config, 3)).eval(), make_transforms(run.config)[1]
    figures = {}
    for name, how in (("looks", {"window": 48, "stride": 20, "flip": True, "scales": (0.75, 1.0)}), ("plain", {})):
        (hit, said, true), losses = torch.zeros(3, 3, dtype=torch.float64), []
        for i in range(5, 8):
            image, truth = transform(*squares(i)[:2])
            logits = segment(model, image, **how)
            losses.append(float(torch.nn.functional.cross_entropy(logits[None], truth[None].long())))
            guess = logits.argmax(0)
            for one in range(3):
                hit[one] += ((guess == one) & (truth == one)).sum()
                said[one] += (guess == one).sum()
                true[one] += (truth == one).sum()
        figures[name] = [float((hit / (said + true - hit)).nanmean()), sum(losses) / 3]
    assert abs(figures["looks"][1] - figures["plain"][1]) > 1e-4
    for found in (result.test, use.evaluate(tmp_path / "run").metrics):
        assert [found["miou"], found["loss"]] == pytest.approx(figures["looks"], rel=1e-6)


def test_mirroring_of_volumes_is_for_each_axis():
    view = {"model": "pvt_v2_b0", "data": "lumps", "task": "segmentation", "head": "unet", "channels": 1, "ndim": 3}
    view |= {"mean": (0.0,), "std": (1.0,), "img_size": (8, 8, 8), "augment": "light", "accelerator": "cpu"}
    x = torch.arange(512.0).view(1, 8, 8, 8)
    train, _ = make_transforms(Config(**view, flips=(1, 0, 1)))
    assert torch.equal(train(x, x[0].long())[1], x[0].long().flip(0, 2))
    assert torch.equal(make_transforms(Config(**view))[0](x, x[0].long())[1], x[0].long())
    with pytest.raises(ConfigError, match="flips: needs 3 chances"):
        make_transforms(Config(**view, flips=(0.5,)))
    with pytest.raises(ConfigError, match="flips: is for signals and volumes"):
        make_transforms(settled("segmentation", flips=(0.5, 0.5)))
    with pytest.raises(ConfigError, match="flips: is for segmentation"):
        settled("detection", flips=(0.5, 0.5))


def test_half_precision_trains_a_detector(opened, tmp_path, monkeypatch):
    """Maps of a single cell are the coarsest: torch's own gradient there is of memory that is not the map's."""
    opened("detection", sizes=FEW)
    monkeypatch.setattr(fitting, "write_report", lambda *args, **more: None)
    change = {"precision": "bf16-mixed", "augment": "none", "max_size": 64, "clip": None, "epochs": 1}
    losses = [fit(Config(**DETECTOR | change | {"precision": kind}), tmp_path / kind).history[0]["train_loss"]
              for kind in ("bf16-mixed", "32-true")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# --- what a configuration becomes ------------------------------------------------------------------------------------


def settled(kind, masks=False, **values):
    return resolve(Config(data="squares", accelerator="cpu", **values), dense_source(kind, masks))


def test_what_is_left_open_comes_from_the_data():
    segmenter = settled("segmentation")
    assert (segmenter.task, segmenter.head, segmenter.loss, segmenter.select) == (
        "segmentation", "semantic_fpn", "segmentation", "miou",
    )  # fmt: skip
    assert (segmenter.ignore, segmenter.img_size, segmenter.channels) == (255, (256, 256), 3)
    boxes, masks = settled("detection"), settled("detection", masks=True)
    assert (boxes.head, masks.head, boxes.img_size, boxes.max_size) == ("retinanet", "mask_rcnn", 320, 534)
    model = make_model(settled("detection", short_sides=(32, 48), img_size=48), 2)
    assert model.net.transform.min_size == (32, 48) and model.net.transform.max_size == 80


def test_iterations_become_whole_epochs():
    config = settled("segmentation", iterations=5, batch_size=4)  # 8 samples: 2 steps an epoch
    assert config.epochs == 3
    assert (
        settled(
            "segmentation",
            **{k: v for k, v in config.model_dump().items() if k in ("iterations", "epochs", "batch_size")},
        ).epochs
        == 3
    )
    with pytest.raises(ConfigError, match="iterations: 5 are 3 epochs, got epochs 7 too"):
        settled("segmentation", iterations=5, batch_size=4, epochs=7)


@pytest.mark.parametrize(
    ("task", "values", "words"),
    [
        ("segmentation", {"mixup": 0.2}, "mixup: does not go with segmentation"),
        ("detection", {"cutmix": 1.0}, "cutmix: does not go with detection"),
        ("detection", {"teacher": "resnet50"}, "teacher: does not go with detection"),
        ("segmentation", {"auto_augment": "trivial"}, "auto_augment: does not go"),
        ("segmentation", {"balance": "loss"}, "balance: segmentation has no label.*loss_options.class_weights"),
        ("detection", {"balance": "sample"}, "balance: detection has no label of a whole sample"),
        ("segmentation", {"head": "semantic_fnp"}, "head: 'semantic_fnp' is none.*did you mean semantic_fpn"),
        ("detection", {"head": "upernet"}, "head: 'upernet' is none for detection"),
        ("detection", {"head": "mask_rcnn"}, "head: mask_rcnn learns masks, and the data have boxes only"),
        ("detection", {"select": "mask_map"}, "select: mask_map is a figure of mask_rcnn, the head is retinanet"),
        ("detection", {"window": 64}, "window: is for segmentation, and the data are of task detection"),
        ("segmentation", {"stride": 32}, "stride: is of windows"),
        ("segmentation", {"window": (32, 32, 32)}, "window: needs one number, or one for each of 2 axes"),
        ("detection", {"img_size": (32, 64)}, "img_size: of a detector it is one number"),
        ("detection", {"strategy": "fsdp"}, "strategy: fsdp cannot train for detection"),
        ("detection", {"compile": True}, "compile: "),
        ("segmentation", {"select": "map"}, "select: task segmentation has the figures miou"),
        ("segmentation", {"task": "detection"}, "task: the data are of task segmentation"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_task_is_refused(task, values, words):
    with pytest.raises(ConfigError, match=words):
        settled(task, **values)


def test_dense_settings_are_refused_for_labels():
    from vertebra.data import open_source

    for key, value in (("head", "upernet"), ("test_flip", True), ("short_sides", (32,))):
        with pytest.raises(
            ConfigError, match=f"{key}: is for segmentation and detection, and the data are of task single"
        ):
            resolve(Config(**{key: value}), open_source("digits"))


def test_wrong_options_of_loss_and_head():
    config = settled("segmentation", img_size=64, loss_options={"dise": 1.0})
    with pytest.raises(ConfigError, match=r"loss: .*dise"):
        make_loss(config, make_model(config, 3))
    config = settled("segmentation", img_size=64, loss="focal")
    with pytest.raises(ConfigError, match="loss: focal does not fit task segmentation; there are: segmentation"):
        make_loss(config, make_model(config, 3))
    with pytest.raises(ConfigError, match="widht"):
        make_model(settled("detection", head_options={"widht": 3}), 2)


def test_a_class_that_is_not_there_is_told(opened, tmp_path, monkeypatch):
    source = dense_source("segmentation")
    object.__setattr__(source, "classes", ("ground", "red"))
    monkeypatch.setattr(fitting, "open_source", lambda *args, **more: source)
    with pytest.raises((DataError, IndexError)):
        fit(Config(**SEGMENTER | {"epochs": 1}), tmp_path / "run")


def test_a_comparison_has_the_costs_of_both_tasks(opened, tmp_path):
    opened("detection", sizes=FEW)
    (row,) = compare({"net": Config(**DETECTOR | {"epochs": 1})}, tmp_path / "boxes")
    assert row.score == "map" and row.error is None and row.params_m > 0.1 and row.memory_mib > 0.1
    opened("segmentation", sizes=FEW)
    (row,) = compare({"net": Config(**SEGMENTER | {"epochs": 1})}, tmp_path / "cells")
    assert row.score == "miou" and row.gmacs > 0 and row.memory_mib > 0.1
