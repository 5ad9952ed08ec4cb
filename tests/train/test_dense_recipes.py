"""The shipped recipes of segmentation and detection."""

from __future__ import annotations

import pytest
import torch
from dense_samples import dense_source

import vertebra
from vertebra.train import build_config, recipes
from vertebra.train.build import make_loss, make_transforms, resolve
from vertebra.train.dense_setup import make_dense_model
from vertebra.train.reading import read_recipe
from vertebra.train.schedules import make_schedule

NAMES = [name for name in sorted(recipes()) if read_recipe(name).values.get("task") in ("segmentation", "detection")]


def resolved(name, settings=()):
    config = build_config({"data": "squares"}, settings, recipe=name)
    masks = config.head == "mask_rcnn"
    source = dense_source(config.task, masks, {"train": 32, "val": 1, "test": 1})
    return resolve(config, source), source


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_and_builds_its_network(name):
    config, source = resolved(name)
    for key, value in read_recipe(name).values.items():
        if not isinstance(value, dict | str | list):
            assert getattr(config, key) == value, key
    assert config.model in vertebra.list_models()
    options = {"ndim": 2, "in_chans": 3, "img_size": None, "drop_path_rate": config.drop_path_rate}
    with torch.device("meta"):
        model = make_dense_model(config, len(source.classes), options)
    assert sum(p.numel() for p in model.parameters()) > 1e6
    split = source.splits["train"]
    image, target = make_transforms(config)[0](split.read(0), split.target(0))
    assert bool(torch.isfinite(image).all())
    if config.task == "segmentation":
        assert image.shape == (3, *config.sides) and target.shape == config.sides
        make_loss(config, _Given(len(source.classes)))
    else:
        assert set(target) >= {"boxes", "labels"} and ("masks" in target) == (config.head == "mask_rcnn")


class _Given(torch.nn.Module):
    prediction = "logits"

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward_outputs(self, x):
        return {"logits": x.new_zeros(1, self.classes, *x.shape[2:])}


def test_they_say_what_the_papers_say():
    one, three = resolved("crossformer_retinanet_1x")[0], resolved("swin_mask_rcnn_3x")[0]
    assert (one.epochs, one.batch_size, one.lr, one.weight_decay, one.decay_epochs) == (12, 16, 1e-4, 1e-4, (8, 11))
    assert (three.epochs, three.weight_decay, three.short_sides[0], three.short_sides[-1]) == (36, 0.05, 480, 800)
    semantic, uper = resolved("crossformer_semantic_fpn_80k")[0], resolved("swin_upernet_160k")[0]
    assert (semantic.iterations, semantic.decay_rate, uper.iterations, uper.decay_rate) == (80000, 0.9, 160000, 1.0)
    assert (uper.lr, uper.weight_decay, uper.sides) == (6e-5, 0.01, (512, 512))
    assert resolved("pvt_v2_semantic_fpn_40k")[0].iterations == 40000


def test_the_1x_schedule_falls_where_it_should():
    config = resolved("crossformer_retinanet_1x")[0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.lr)
    schedule, steps, rates = make_schedule(config, optimizer, 12 * 1000), (0, 70, 7990, 8000, 10990, 11000), []
    for step in steps:
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-7, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
