"""Drawing changes exactly the pixels it is about, in the colours of the classes."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.tasks.draw import (
    as_picture,
    colours,
    draw_classes,
    draw_objects,
    draw_signal,
    draw_slices,
    palette_png,
    picture_file,
    spans,
)


def picture(*sides: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, *sides), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_colours_are_stable_and_differ():
    table = colours(256)
    assert len(table.unique(dim=0)) == 256 and torch.equal(colours(7), table[:7])
    near = torch.cdist(table[:20].float(), table[:20].float()) + 1e6 * torch.eye(20)
    assert near.min() > 30


def test_a_class_map_changes_the_pixels_of_its_classes_and_no_other():
    image, labels = picture(12, 9), torch.zeros(12, 9, dtype=torch.long)
    labels[2:5, 3:7], labels[8:, :2] = 1, 3
    drawn = draw_classes(image, labels, 0.5, skip=(0,))
    table = colours(4).float()
    assert torch.equal(drawn[:, labels == 0], image[:, labels == 0])
    for i in (1, 3):
        expected = image[:, labels == i].float() * 0.5 + table[i][:, None] * 0.5
        assert (drawn[:, labels == i].float() - expected).abs().max() <= 1
    assert torch.equal(draw_classes(image, labels, skip=(0, 1, 3)), image)
    with pytest.raises(ValueError, match="does not lie on"):
        draw_classes(image, labels[:5])


def test_a_mask_changes_its_pixels_and_the_best_lies_on_top():
    image, masks = picture(40, 40), torch.zeros(2, 1, 40, 40)
    masks[0, 0, 10:20, 10:20], masks[1, 0, 15:30, 15:30] = 0.9, 0.6
    found = {
        "boxes": torch.tensor([[10.0, 10, 20, 20], [15, 15, 30, 30]]),
        "labels": torch.tensor([0, 1]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": masks,
    }
    drawn = draw_objects(image, found, ["one", "two"], alpha=1.0)
    table = colours(2)
    assert drawn[:, 17, 17].tolist() == table[0].tolist() and drawn[:, 25, 25].tolist() == table[1].tolist()
    far = torch.ones(40, 40, dtype=torch.bool)
    far[8:32, 8:] = False  # boxes, masks and names
    assert torch.equal(drawn[:, far], image[:, far])
    assert torch.equal(draw_objects(image, found, ["one", "two"], threshold=0.95), image)
    only = draw_objects(image, found, ["one", "two"], threshold=0.85)
    assert torch.equal(only[:, 25:, 25:], image[:, 25:, 25:])


def test_boxes_are_outlines_with_names():
    image = torch.zeros(3, 60, 80, dtype=torch.uint8)
    found = {"boxes": torch.tensor([[20.0, 30, 60, 50]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.75])}
    drawn = draw_objects(image, found, ["a", "牛$b"])  # a name that the font lacks is no error
    tint = colours(2)[1]
    for side in (drawn[:, 30, 20:60], drawn[:, 50, 20:60], drawn[:, 30:50, 20], drawn[:, 30:50, 60]):
        assert torch.equal(side, tint[:, None].expand_as(side))
    assert not drawn[:, 45:49, 40:58].any()  # inside, away from the name


def test_any_sample_becomes_a_picture():
    x = torch.tensor([[[-1.0, 0.0], [1.0, float("nan")]]])
    assert as_picture(x).tolist() == [[[0, 128], [255, 128]]] * 3
    assert as_picture(torch.full((1, 2, 2), 7.0)).unique().tolist() == [0]
    image = picture(4, 5)
    assert torch.equal(as_picture(image), image) and torch.equal(as_picture(image[:2])[1], image[0])


def test_slices_of_a_volume_lie_side_by_side():
    sample, labels = torch.rand(1, 6, 8, 10), torch.zeros(6, 8, 10, dtype=torch.long)
    labels[3, 2, 1] = 1
    drawn, plain = draw_slices(sample, labels, 1.0, (0,)), draw_slices(sample, labels * 0, 1.0, (0,))
    assert drawn.shape == (3, 8, 10 + 2 + 10 + 2 + 8)
    changed = (drawn != plain).any(0).nonzero().tolist()
    assert changed == [[2, 1]]  # in the slice across the first axis, at 3 of 6
    assert torch.equal(plain[:, :, :10], as_picture(sample.flatten(2)).view(3, 6, 8, 10)[:, 3])


def test_a_signal_is_drawn_with_its_spans():
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 2])
    assert spans(labels) == [(0, 2, 0), (2, 5, 1), (5, 6, 0), (6, 7, 2)]
    content = draw_signal(torch.randn(2, 7), labels, ["rest", "$beat", "noise"], skip=(0,))
    shown = np.array(Image.open(io.BytesIO(content)).convert("RGB")).reshape(-1, 3)
    assert len(shown) > 10_000

    def there(i):  # the class's colour at 0.4 on white
        wanted = 255 * 0.6 + colours(3)[i].numpy() * 0.4
        return (np.abs(shown - wanted).max(1) <= 2).sum()

    assert there(1) > 2.5 * there(2) > 100 and there(0) == 0


def test_files_hold_the_numbers():
    labels = torch.randint(0, 256, (9, 7))
    image = Image.open(io.BytesIO(palette_png(labels)))
    assert image.mode == "P" and np.array_equal(np.array(image), labels.numpy())
    assert np.array_equal(np.array(image.convert("RGB")), colours(256)[labels].numpy())
    shown = picture(5, 6)
    assert np.array_equal(np.array(Image.open(io.BytesIO(picture_file(shown)))), shown.permute(1, 2, 0).numpy())
    assert Image.open(io.BytesIO(picture_file(shown, "JPEG"))).format == "JPEG"
