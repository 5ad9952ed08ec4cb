"""Sliding windows, mirrored and resized copies, against brute force and against models with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vertebra.tasks.inference import class_map, detect, resized, segment, window_starts

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def net(ndim: int = 2, kernel: int = 3, classes: int = 3) -> nn.Module:
    """A model whose answer at a cell depends on its neighbours, also on those beyond a window's edge."""
    torch.manual_seed(0)
    return CONV[ndim](2, classes, kernel, padding=kernel // 2).eval()


@given(st.integers(1, 200), st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_windows_cover_everything_and_stay_inside(side, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(side, window, stride)
    size = min(window, side)
    covered = {cell for start in starts for cell in range(start, start + size)}
    assert covered == set(range(side)) and starts[-1] == side - size
    assert starts == sorted(set(starts)) and all(s % stride == 0 for s in starts[:-1])
    assert len(starts) == (1 if window >= side else math.ceil((side - window) / stride) + 1)


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_overlapping_windows_are_the_mean_of_those_that_cover_a_cell(ndim):
    model, sides, window, stride = net(ndim), (13, 9, 7)[:ndim], (5, 4, 9)[:ndim], (3, 4, 2)[:ndim]
    x = torch.randn(2, *sides)
    total, count = np.zeros((3, *sides)), np.zeros(sides)
    counts = [max(s - w + t - 1, 0) // t + 1 for s, w, t in zip(sides, window, stride, strict=True)]
    for at in np.ndindex(*counts):
        place = []
        for i, s, w, t in zip(at, sides, window, stride, strict=True):
            stop = min(i * t + w, s)
            place.append(slice(max(stop - w, 0), stop))
        with torch.no_grad():
            total[(slice(None), *place)] += model(x[(slice(None), *place)][None])[0].numpy()
        count[tuple(place)] += 1
    assert count.max() > 1
    for batch in (1, 4, 100):
        found = segment(model, x, window, stride, batch=batch)
        assert np.allclose(found.numpy(), total / count, atol=1e-5)
    assert not torch.allclose(found, segment(model, x), atol=1e-3)  # the edges of windows are seen


def test_a_window_as_large_as_the_image_is_the_model_itself():
    model, x = net(), torch.randn(2, 12, 17)
    with torch.no_grad():
        whole = model(x[None])[0]
    assert torch.equal(segment(model, x), whole)
    assert torch.equal(segment(model, x, (12, 17)), whole) and torch.equal(segment(model, x, 50, 7), whole)
    assert not torch.is_grad_enabled() or not segment(model, x).requires_grad


@given(st.integers(1, 3), st.integers(1, 9), st.booleans(), st.data())
@settings(max_examples=25, deadline=None)
def test_a_model_of_single_cells_does_not_see_how_it_is_asked(ndim, window, flip, data):
    sides = data.draw(st.tuples(*[st.integers(1, 11)] * ndim))
    stride = data.draw(st.integers(1, window))
    model, x = net(ndim, kernel=1), torch.randn(2, *sides, generator=torch.Generator().manual_seed(1))
    expected = segment(model, x).log_softmax(0)
    found = segment(model, x, window, stride, flip, (1.0, 1.0), batch=3)
    assert torch.allclose(found.log_softmax(0), expected, atol=1e-5)


def test_copies_are_the_mean_of_probabilities():
    model, x = net(), torch.randn(2, 12, 10)
    with torch.no_grad():
        plain, mirrored = model(x[None]), model(x[None].flip(-1)).flip(-1)
        large = model(F.interpolate(x[None], (18, 15), mode="bilinear"))
        large = F.interpolate(large, (12, 10), mode="bilinear")
        small = model(F.interpolate(x[None], (6, 5), mode="bilinear", antialias=True))
        small = F.interpolate(small, (12, 10), mode="bilinear")
    both = segment(model, x, flip=True)
    assert torch.allclose(both.exp(), (plain.softmax(1) + mirrored.softmax(1))[0] / 2, atol=1e-6)
    three = segment(model, x, scales=(1, 1.5, 0.5))
    assert torch.allclose(three.exp(), sum(v.softmax(1)[0] for v in (plain, large, small)) / 3, atol=1e-5)
    assert torch.allclose(segment(model, x, scales=(1.5,)), large[0], atol=1e-5)  # one copy: logits as they are


def test_copies_are_not_smaller_than_the_model_takes():
    model, seen = net(), []
    model.min_size = 8
    model.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape[2:])))
    assert segment(model, torch.randn(2, 10, 20), scales=(0.5,)).shape == (3, 10, 20)
    assert seen == [(8, 10)]


def test_a_class_map_at_another_size():
    logits = torch.randn(4, 5, 6)
    assert torch.equal(class_map(logits), logits.argmax(0))
    expected = F.interpolate(logits[None], (11, 9), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(class_map(logits, (11, 9)), expected)
    for old, new in (((8,), (5,)), ((4, 4, 4), (2, 3, 5))):
        assert resized(torch.randn(2, *old), new).shape == (2, *new)


def test_what_cannot_be_is_refused():
    model, x = net(), torch.randn(2, 9, 9)
    for options, message in (
        ({"window": 4, "stride": 5}, "leave gaps"),
        ({"window": 0}, "leave gaps"),
        ({"stride": 2}, "needs a window"),
        ({"window": (4, 4, 4)}, "3 entries"),
        ({"scales": ()}, "scales"),
        ({"scales": (0.0,)}, "scales"),
        ({"scales": (math.nan,)}, "scales"),
        ({"window": 4, "batch": 0}, "batch"),
    ):
        with pytest.raises(ValueError, match=message):
            segment(model, x, **options)
    for ask in (segment, detect):
        with pytest.raises(ValueError, match="training mode"):
            ask(model.train(), x)


class Finder(nn.Module):
    """Stands in for a detector: one box tight around what is bright in each third of the channels."""

    def forward(self, images):
        return [self.one(image) for image in images]

    def one(self, image):
        boxes, labels, scores, masks = [], [], [], []
        for label, plane in enumerate(image):
            bright = plane > 0.5
            if bright.any():
                rows, columns = bright.any(1).nonzero()[:, 0], bright.any(0).nonzero()[:, 0]
                boxes.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
                labels.append(label)
                scores.append(float(plane[bright].mean()) - 0.001 * int(columns[0]))  # what lies left is surer
                masks.append(bright.float()[None])
        shape = (0, 1, *image.shape[1:])
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.long),
            "scores": torch.tensor(scores),
            "masks": torch.stack(masks) if masks else torch.zeros(shape),
        }


def test_boxes_and_masks_of_a_mirrored_copy_come_back_to_their_places():
    image = torch.zeros(3, 20, 30)
    image[0, 4:9, 2:8] = 1
    image[2, 10:14, 20:29] = 0.8
    model = Finder().eval()
    plain = model([image])[0]
    both = detect(model, image, flip=True)
    order = both["labels"].argsort()
    for key in ("boxes", "labels", "masks"):
        assert torch.equal(both[key][order], plain[key])
    # of the two that fall together the surer one stays: the left one as it is, the right one mirrored (it lies at 1)
    assert both["scores"].tolist() == pytest.approx([1 - 0.002, 0.8 - 0.001])
    assert detect(model, image, flip=True, most=1)["labels"].tolist() == [0]
    assert detect(model, image.flip(-1), flip=True)["boxes"].tolist() == [[22, 4, 28, 9], [1, 10, 10, 14]]
    nothing = detect(model, torch.zeros(3, 8, 8), flip=True, scales=(1, 2))
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 1, 8, 8)


def test_boxes_of_different_classes_do_not_push_each_other_out():
    image = torch.zeros(3, 16, 16)
    image[:2, 4:8, 4:8] = 1
    assert sorted(detect(Finder().eval(), image, flip=True)["labels"].tolist()) == [0, 1]


def test_boxes_and_masks_of_a_larger_copy_are_in_the_images_pixels():
    image = torch.zeros(3, 20, 32)
    image[1, 4:12, 8:24] = 1
    found = detect(Finder().eval(), image, scales=(2.0,))
    assert torch.allclose(found["boxes"], torch.tensor([[8.0, 4.0, 24.0, 12.0]]), atol=0.5)
    assert torch.equal(found["masks"][0, 0] > 0.5, image[1] > 0.5)


def test_a_detector_that_resizes_is_asked_at_the_scale():
    """Resizing the image in front of it would be undone inside."""
    import vertebra

    small = dict(dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
    torch.manual_seed(0)
    model = vertebra.detection(
        "pvt_v2_b0", "retinanet", 2, min_size=64, max_size=96, head_options={"light": True}, **small
    ).eval()
    seen = []
    model.pyramid.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    image = torch.rand(3, 50, 50)
    for scale, side in ((1.0, 64), (0.5, 32), (1.5, 96)):
        found = detect(model, image, scales=(scale,))
        assert seen.pop() == (side, side) and not seen
        assert found["boxes"].shape[1] == 4
    assert torch.equal(detect(model, image)["boxes"], model([image])[0]["boxes"]) and seen[0] == (64, 64)
