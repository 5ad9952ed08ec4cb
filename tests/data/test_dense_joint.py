import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from vertebra.data import open_source
from vertebra.data.joint import by_short_side, crop_or_fill, joint_eval, joint_train, measured, tight_boxes
from vertebra.data.loader import Samples, TrainOrder, collate, eval_loader, train_loader
from vertebra.data.source import DataError, Skipped, Split
from vertebra.data.transforms import View
from vertebra.data.waves import WaveView

VIEW = View((24, 20), 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
WAVES = {1: WaveView((12,), 2, (0.0, 0.0), (1.0, 1.0)), 3: WaveView((6, 5, 4), 2, (0.0, 0.0), (1.0, 1.0))}


def image(height=30, width=26, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def coded(height, width):
    """An image whose first channel is the class map itself: what is done to both can be compared."""
    target = (torch.arange(height)[:, None] // 4 + torch.arange(width)[None] // 5) % 4
    return (target * 60).to(torch.uint8).expand(3, -1, -1).contiguous(), target.to(torch.uint8)


def objects(height=30, width=26):
    """Three boxes with their masks, the last one a crowd."""
    boxes = torch.tensor([[2.0, 3, 12, 11], [10, 10, 26, 30], [0, 0, 5, 5]])
    masks = torch.zeros(3, height, width, dtype=torch.uint8)
    for mask, box in zip(masks, boxes.int().tolist(), strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = 1
    return {
        "boxes": boxes,
        "labels": torch.tensor([1, 0, 2]),
        "iscrowd": torch.tensor([False, False, True]),
        "area": masks.flatten(1).sum(1).float(),
        "masks": masks,
    }


# segmentation of images


def test_testing_normalises_and_leaves_the_target_alone():
    x, target = image(), torch.zeros(30, 26, dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (VIEW.mean, VIEW.std))
    found, same = joint_eval(VIEW, "segmentation")(x, target)
    torch.testing.assert_close(found, (x / 255 - mean) / std)
    assert same is target
    resized, same = joint_eval(VIEW, "segmentation", fixed=True)(x, target)
    expected = v2.functional.resize(x, [24, 20], antialias=True)
    torch.testing.assert_close(resized, (expected / 255 - mean) / std)
    assert same is target
    assert joint_eval(VIEW, "segmentation", short=13, max_size=14)(x, target)[0].shape == (3, 14, 12)
    turned = joint_eval(View((24, 20), 3, VIEW.mean, VIEW.std, order="BGR"), "segmentation")(x, target)[0]
    torch.testing.assert_close(turned, (x.flip(0) / 255 - mean) / std)


@pytest.mark.parametrize("sides", [(30, 26), (10, 50), (7, 9), (24, 20)])
@pytest.mark.parametrize("augment", ["none", "light", "standard", "strong"])
def test_training_gives_the_view_s_size(augment, sides):
    x, target = coded(*sides)
    found, moved = joint_train(VIEW, "segmentation", augment)(x, target)
    assert found.shape == (3, 24, 20) and found.dtype == torch.float32 and type(found) is torch.Tensor
    assert moved.shape == (24, 20) and moved.dtype == torch.uint8 and type(moved) is torch.Tensor
    assert set(moved.unique().tolist()) <= {0, 1, 2, 3, 255}


def test_the_target_goes_where_the_pixels_go():
    plain = View((24, 20), 3, (0.0,) * 3, (1.0,) * 3, interpolation="nearest")
    change = joint_train(plain, "segmentation", "standard", scale_jitter=(1.0, 1.0), vflip=0.5)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        x, target = coded(30, 26)
        found, moved = change(x, target)
        assert torch.equal((found[0] * 255 / 60).round().to(torch.uint8), moved)
        seen.add(found.numpy().tobytes())
    assert len(seen) > 6


@pytest.mark.parametrize("by", [0.5, 0.3, 2.0])
def test_scaled_maps_lie_under_the_scaled_pixels(by):
    size = round(60 * by), round(40 * by)
    plain = View(size, 3, (0.0,) * 3, (1.0,) * 3)
    x, target = image(60, 40), torch.randint(0, 4, (60, 40)).to(torch.uint8)
    found, moved = joint_train(plain, "segmentation", "light", scale_jitter=(by, by))(x, target)
    torch.testing.assert_close(found, v2.functional.resize(x, list(size), antialias=True) / 255)
    assert torch.equal(moved, F.interpolate(target[None, None], size, mode="nearest-exact")[0, 0])


def test_what_is_filled_is_the_mean_and_void():
    x, target = image(10, 9), torch.ones(10, 9, dtype=torch.int64)
    change = joint_train(VIEW, "segmentation", "light", scale_jitter=(1.0, 1.0), ignore=65535)
    found, moved = change(x, target)
    assert (moved == 65535).sum() == 24 * 20 - 90 and (moved[:10, :9] == 1).all()
    assert found[:, 10:].abs().max() < 0.011 / 0.2 and found[:, :10, :9].abs().max() > 1


def test_crops_full_of_one_class_are_drawn_again():
    x, target = image(40, 40), torch.zeros(40, 40, dtype=torch.uint8)
    target[:, 20:] = 1
    share = []
    for most in (1.0, 0.75):
        change = joint_train(VIEW, "segmentation", "light", scale_jitter=(1.0, 1.0), most=most)
        full = 0
        for seed in range(40):
            torch.manual_seed(seed)
            full += float(change(x, target)[1].float().mean().sub(0.5).abs()) > 0.25
        share.append(full)
    assert share[0] > 8 and share[1] == 0


def test_short_sides_and_jitter():
    change = joint_train(VIEW, "segmentation", "light", short_sides=(40, 60), scale_jitter=(1.0, 1.0), max_size=70)
    sizes = {change._scaled((30, 60)) for _ in range(30)}
    assert sizes == {(35, 70)}
    change = joint_train(VIEW, "segmentation", "light", short_sides=(40, 60), scale_jitter=(1.0, 1.0))
    assert {change._scaled((30, 60)) for _ in range(30)} == {(40, 80), (60, 120)}
    assert by_short_side((800, 1333), 800, 1333) == (800, 1333) and by_short_side((100, 400), 800, 1333) == (333, 1333)
    wide = [joint_train(VIEW, "segmentation", scale_jitter=(0.5, 2.0))._scaled((100, 100))[0] for _ in range(200)]
    assert 50 <= min(wide) < 70 and 180 < max(wide) <= 200
    with pytest.raises(DataError, match="over"):
        joint_train(VIEW, "segmentation", scale_jitter=(16.0, 16.0))._scaled((9000, 9000))


# detection


def test_detection_in_testing_is_in_0_to_1_with_all_objects():
    x, target = image(), objects()
    found, same = joint_eval(VIEW, "detection")(x, target)
    torch.testing.assert_close(found, x / 255)
    assert same is target
    grey, _ = joint_eval(View((24, 20), 1, (0.5,), (0.2,)), "detection")(x, target)
    assert grey.shape == (1, 30, 26)


def test_without_augmentation_only_crowds_leave():
    x, target = image(), objects()
    found, kept = joint_train(VIEW, "detection", "none")(x, target)
    torch.testing.assert_close(found, x / 255)
    assert kept["boxes"].tolist() == target["boxes"][:2].tolist() and kept["labels"].tolist() == [1, 0]
    assert torch.equal(kept["masks"], target["masks"][:2]) and kept["area"].tolist() == [80, 320]
    assert len(target["boxes"]) == 3 and all(type(v) is torch.Tensor for v in kept.values())


@pytest.mark.parametrize("which", ["hflip", "vflip"])
def test_mirrored_boxes_by_hand_and_back(which):
    change = joint_train(VIEW, "detection", "none", **{which: 1.0})
    x, target = image(), objects()
    found, moved = change(x, target)
    axis, side = (2, 26) if which == "hflip" else (1, 30)
    torch.testing.assert_close(found, (x / 255).flip(axis))
    near, far = (0, 2) if which == "hflip" else (1, 3)
    assert moved["boxes"][:, near].tolist() == (side - target["boxes"][:2, far]).tolist()
    assert moved["boxes"][:, far].tolist() == (side - target["boxes"][:2, near]).tolist()
    assert torch.equal(moved["masks"], target["masks"][:2].flip(axis))
    again, back = change((found * 255).round().to(torch.uint8), moved)
    torch.testing.assert_close(again, x / 255)
    assert all(torch.equal(back[key], target[key][:2]) for key in target)


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=25, deadline=None)
def test_boxes_stay_around_their_masks(seed, with_masks):
    torch.manual_seed(seed)
    change = joint_train(VIEW, "detection", "standard", scale_jitter=(0.4, 2.5), vflip=0.5)
    x, target = image(), objects()
    if not with_masks:
        del target["masks"]
    found, moved = change(x, target)
    height, width = found.shape[1:]
    assert height <= 30 and width <= 26
    boxes = moved["boxes"]
    assert len({len(v) for v in moved.values()}) == 1 and not moved["iscrowd"].any()
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all()
    assert (boxes[:, 2] <= width).all() and (boxes[:, 3] <= height).all()
    if with_masks:
        assert moved["masks"].shape[1:] == (height, width)
        assert not len(boxes) or float((boxes - tight_boxes(moved["masks"])).abs().max()) <= 1.001
    else:  # the box is where a mask of it would be, to a pixel: both go through the same random numbers
        torch.manual_seed(seed)
        masked = change(x, objects())[1]["boxes"]
        if len(masked) == len(boxes) > 0:
            assert float((masked - boxes).abs().max()) <= 1.001


def test_objects_cut_off_leave_with_label_and_mask():
    target = objects()
    target["masks"][1] = 0
    target["masks"][2, 0] = 0
    left = measured({key: v.clone() for key, v in target.items()}, cut=True)
    assert left["boxes"].tolist() == [[2, 3, 12, 11], [0, 1, 5, 5]] and left["area"].tolist() == [80, 20]
    assert left["labels"].tolist() == [1, 2] and left["masks"].shape == (2, 30, 26)
    del target["masks"]
    target["boxes"][0, 2] = target["boxes"][0, 0]
    left = measured(target, cut=True)
    assert left["labels"].tolist() == [0, 2] and left["area"].tolist() == [320, 25]


def test_an_image_without_objects_stays():
    empty = {key: v[:0] for key, v in objects().items()}
    _, moved = joint_train(VIEW, "detection", "strong", scale_jitter=(0.5, 2.0))(image(), empty)
    assert moved["boxes"].shape == (0, 4) and moved["masks"].shape[0] == 0


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_tight_boxes_against_nonzero(seed):
    masks = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(seed)) < 0.1
    masks[:, 3, 4] = True
    for mask, box in zip(masks, tight_boxes(masks.to(torch.uint8)).tolist(), strict=True):
        ys, xs = mask.nonzero().T
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


# signals and volumes


@pytest.mark.parametrize("rank", [1, 3])
def test_waves_and_maps_stay_together(rank):
    view, size = WAVES[rank], (17, 5, 3)[:rank]
    target = torch.arange(int(np.prod(size))).reshape(size) % 5
    x = target.float().expand(2, *size).contiguous()
    change = joint_train(view, "segmentation", "light", flips=(0.5,) * rank)
    for seed in range(6):
        torch.manual_seed(seed)
        found, moved = change(x, target)
        assert found.shape == (2, *view.size) and moved.shape == view.size
        real = moved != 255
        assert int(real.sum()) == int(np.prod([min(a, b) for a, b in zip(size, view.size, strict=True)]))
        # intensity is scaled and shifted and has noise, yet goes with the classes
        pair = torch.stack([found[0][real], moved[real].float()])
        assert torch.corrcoef(pair)[0, 1] > 0.99


def test_flips_twice_are_nothing_and_once_is_torch_s():
    view, x = WAVES[3], torch.randn(2, 6, 5, 4)
    target = torch.randint(0, 3, (6, 5, 4))
    change = joint_train(view, "segmentation", "light", flips=(1, 0, 1))
    once = change(x, target)[1]
    assert torch.equal(once, target.flip((0, 2))) and torch.equal(change(x, once)[1], target)


def test_crop_or_fill_fills_at_the_end():
    x, target = torch.randn(1, 4, 3), torch.ones(4, 3, dtype=torch.int64)
    found, moved = crop_or_fill(x, target, (6, 2), 9)
    assert (found[:, 4:] == 0).all() and (moved[4:] == 9).all() and (moved[:4] == 1).all()
    assert found.shape == (1, 6, 2) and any(torch.equal(found[:, :4], x[:, :, i : i + 2]) for i in (0, 1))


def test_waves_in_testing():
    view, x = WAVES[1], torch.randn(2, 17)
    found, same = joint_eval(view, "segmentation")(x, target := torch.zeros(17))
    assert torch.equal(found, x) and same is target
    fixed = joint_eval(view, "segmentation", fixed=True)(x, target)[0]
    torch.testing.assert_close(fixed, F.interpolate(x[None], 12, mode="linear")[0])
    stretched, moved = joint_train(view, "segmentation", "none")(x, torch.arange(17))
    torch.testing.assert_close(stretched, fixed)
    expected = F.interpolate(torch.arange(17.0)[None, None], 12, mode="nearest-exact")[0, 0]
    assert moved.tolist() == expected.tolist()


def test_contradictions_are_told():
    for call, words in (
        (lambda: joint_train(VIEW, "segmentation", "much"), "augment: must be one of"),
        (lambda: joint_train(VIEW, "segmentation", scale_jitter=(2.0, 1.0)), "scale_jitter"),
        (lambda: joint_train(WAVES[1], "detection"), "detection is for images"),
        (lambda: joint_train(WAVES[3], "segmentation", flips=(1,)), "flips: needs 3"),
        (lambda: joint_train(WAVES[3], "segmentation", scale_jitter=(0.5, 2.0)), "are for images"),
        (lambda: joint_eval(WAVES[1], "detection"), "are for images"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# batches


def dense_split(sizes):
    """Samples of these sizes; the target of each is its own first channel."""
    return Split([f"s{i}" for i in range(len(sizes))], np.zeros(len(sizes), np.int64), _Image(sizes),
                 np.arange(len(sizes)), _Target(sizes))  # fmt: skip


class _Image:
    def __init__(self, sizes):
        self.sizes = sizes

    def __call__(self, i):
        return image(*self.sizes[i], seed=i)


class _Target(_Image):
    def __call__(self, i):
        return image(*self.sizes[i], seed=i)[0] % 4


def test_batches_are_stacked_where_sizes_agree_and_lists_elsewhere():
    split = dense_split([(30, 26), (28, 24), (30, 26), (30, 26)])
    uneven = next(iter(eval_loader(Samples(split, joint_eval(VIEW, "segmentation")), 3, 0)))
    assert [tuple(x.shape) for x in uneven.images] == [(3, 30, 26), (3, 28, 24), (3, 30, 26)]
    assert isinstance(uneven.targets, list) and torch.equal(uneven.targets[1], split.target(1))
    fixed = next(iter(eval_loader(Samples(split, joint_eval(VIEW, "segmentation", fixed=True)), 3, 0)))
    assert fixed.images.shape == (3, 3, 24, 20) and isinstance(fixed.targets, list) and len(fixed.targets) == 3
    batch = collate([Samples(split, joint_eval(VIEW, "segmentation"))[(0, i)] for i in (0, 2)])
    assert batch.images.shape == (2, 3, 30, 26) and batch.targets.shape == (2, 30, 26)
    lists = collate([(x, objects(), i) for i, x in enumerate(uneven.images)])
    assert isinstance(lists.images, list) and isinstance(lists.targets, list) and lists.positions.tolist() == [0, 1, 2]


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone():
    split = dense_split([(30, 26)] * 4)
    change = joint_train(VIEW, "segmentation", "strong")
    first, again = (Samples(split, change, seed=3)[(1, 2)] for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    other = Samples(split, change, seed=3)[(2, 2)]
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Samples(split, change)[(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    batch = next(iter(train_loader(Samples(split, change, 3), TrainOrder(4, 4, 0), 0)))
    assert batch.images.shape == (4, 3, 24, 20) and batch.targets.shape == (4, 24, 20)


def test_a_target_of_another_size_is_skipped_and_named():
    split = dense_split([(30, 26), (28, 24)])
    wrong = Split(split.names, split.labels, split.load, split.index, _Target([(29, 26), (28, 24)]))
    found = Samples(wrong, joint_train(VIEW, "segmentation"))[(0, 0)]
    assert isinstance(found, Skipped) and found.path == "s0" and "(30, 26)" in found.reason


def test_a_folder_of_objects_goes_all_the_way(tmp_path):
    (tmp_path / "images").mkdir()
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
    for i in range(4):
        Image.new("RGB", (20 + i, 16)).save(tmp_path / "images" / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": 16, "width": 20 + i})
        content["annotations"].append({"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 5 + i, 6]})
    (tmp_path / "instances_train.json").write_text(json.dumps(content))
    source = open_source(str(tmp_path), val=0.25)
    train = source.splits["train"]
    batch = next(iter(train_loader(Samples(train, joint_train(VIEW, "detection", "none")), TrainOrder(3, 3, 0), 0)))
    for x, target, position in zip(batch.images, batch.targets, batch.positions.tolist(), strict=True):
        assert x.shape[2] == 20 + int(train.index[position])
        assert target["boxes"].tolist() == [[1, 2, 6 + int(train.index[position]), 8]]
