"""Answers drawn on what they are about: boxes and masks on images, class maps on images, slices and curves."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GOLDEN = 0.6180339887498949  # turns that never come back to where they were: neighbouring classes differ most


def colours(count: int) -> Tensor:
    """(count, 3) uint8, one colour a class, the same for class i however many there are."""
    # three brightnesses: two hues that come close after many turns still differ
    tones = ((0.85, 0.95), (0.55, 1.0), (0.95, 0.65))
    rgb = [colorsys.hsv_to_rgb(i * GOLDEN % 1, *tones[i % 3]) for i in range(count)]
    return (torch.tensor(rgb).reshape(count, 3) * 255).round().to(torch.uint8)


def as_picture(image: Tensor) -> Tensor:
    """A sample (C, H, W) as something to look at, (3, H, W) uint8: bytes as they are, floats from lowest to highest.

    One channel is grey, three are colours; of any other number the first is shown.
    """
    image = image.detach().cpu()
    if image.shape[0] != 3:
        image = image[:1]
    if image.dtype != torch.uint8:
        image = image.float().nan_to_num()
        low, high = image.amin(), image.amax()
        image = ((image - low) / (high - low).clamp_min(1e-12) * 255).round().to(torch.uint8)
    return image.expand(3, -1, -1).contiguous()


def draw_classes(picture: Tensor, labels: Tensor, alpha: float = 0.5, skip: Sequence[int] = ()) -> Tensor:
    """(3, H, W) uint8 with every cell of the class map `labels` (H, W) in its class's colour, `alpha` of it.

    Classes in `skip`, such as a background, are left as they are.
    """
    from torchvision.utils import draw_segmentation_masks

    labels = labels.cpu().long()
    if labels.shape != picture.shape[1:]:
        raise ValueError(f"a class map of {tuple(labels.shape)} does not lie on a picture of {tuple(picture.shape)}")
    shown = [i for i in labels.unique().tolist() if i not in skip]
    if not shown:
        return picture.clone()
    table = colours(max(shown) + 1).tolist()
    masks = torch.stack([labels == i for i in shown])
    return draw_segmentation_masks(picture, masks, alpha, [tuple(table[i]) for i in shown])


def draw_objects(
    picture: Tensor,
    found: Mapping[str, Tensor],
    classes: Sequence[str],
    threshold: float = 0.5,
    alpha: float = 0.5,
) -> Tensor:
    """(3, H, W) uint8 with the boxes, names and scores of what `detect` found with at least the score `threshold`.

    Masks, where there are any, are coloured where they are above a half; of overlapping ones the best lies on top.
    """
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    keep = (found["scores"] >= threshold).nonzero()[:, 0].flip(0)  # the best is drawn last
    if not len(keep):
        return picture.clone()
    labels = found["labels"][keep].tolist()
    table = colours(max(labels) + 1).tolist()
    tints = [tuple(table[i]) for i in labels]
    if "masks" in found:
        masks = found["masks"][keep, 0].cpu() > 0.5
        for mask, tint in zip(masks, tints, strict=True):  # one by one: where they overlap colours must not mix
            if mask.any():
                picture = draw_segmentation_masks(picture, mask, alpha, [tint])
    scores = found["scores"][keep].tolist()
    names = [f"{_plain(classes[i])} {score:.2f}" for i, score in zip(labels, scores, strict=True)]
    boxes = found["boxes"][keep].cpu().float()
    width = max(1, round(min(picture.shape[1:]) / 250))
    return draw_bounding_boxes(picture, boxes, names, tints, width=width)


def _plain(name: str) -> str:
    """A class's name as the built-in font has it."""
    return name.encode("latin-1", "replace").decode("latin-1")


def draw_slices(sample: Tensor, labels: Tensor, alpha: float = 0.5, skip: Sequence[int] = ()) -> Tensor:
    """The middle slices of a volume (C, D, H, W) across its three axes side by side, classes drawn on them.

    (3, height, width) uint8, the slices centred at the top of it; all are scaled together, from lowest to highest.
    """
    flat = as_picture(sample.flatten(2)).view(3, *sample.shape[1:])
    parts = []
    for axis, side in enumerate(labels.shape):
        plane = flat.select(axis + 1, side // 2)
        parts.append(draw_classes(plane.contiguous(), labels.select(axis, side // 2), alpha, skip))
    most = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 2 * (i < 2), 0, most - part.shape[1])) for i, part in enumerate(parts)], 2)


def draw_signal(sample: Tensor, labels: Tensor, classes: Sequence[str], skip: Sequence[int] = ()) -> bytes:
    """A PNG file: the channels of a signal (C, L) below each other, its classes (L,) as coloured spans behind them."""
    from matplotlib.figure import Figure

    sample, labels = sample.detach().float().cpu(), labels.cpu().long()
    rows = min(len(sample), 12)  # more would be too small to see
    figure = Figure((11, 1.2 + 0.9 * rows), layout="constrained")
    table = (colours(len(classes)).float() / 255).tolist()
    seen: dict[str, Any] = {}
    for axes, values in zip(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0], sample, strict=False):
        for first, last, label in spans(labels):
            if label not in skip:
                seen[classes[label]] = axes.axvspan(first - 0.5, last - 0.5, color=table[label], alpha=0.4, linewidth=0)
        axes.plot(values.numpy(), color="black", linewidth=0.8)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    names = [name.replace("$", r"\$") for name in seen]
    if names:
        figure.legend(list(seen.values()), names, loc="outside upper center", ncols=6)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    return content.getvalue()


def spans(labels: Tensor) -> list[tuple[int, int, int]]:
    """(first, last + 1, class) of each run of one class in (L,)."""
    values, lengths = labels.unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0)
    return list(zip((ends - lengths).tolist(), ends.tolist(), values.tolist(), strict=True))


def palette_png(labels: Tensor) -> bytes:
    """A class map (H, W) of at most 256 classes as a PNG file: class numbers, shown in the classes' colours."""
    from PIL import Image

    image = Image.fromarray(labels.cpu().to(torch.uint8).numpy(), mode="P")
    image.putpalette(colours(256).flatten().tolist())
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()


def picture_file(picture: Tensor, format: str = "PNG") -> bytes:
    """A picture (3, H, W) uint8 as the bytes of a PNG or JPEG file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(content, format=format)
    return content.getvalue()
