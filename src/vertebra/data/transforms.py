"""From uint8 images to what a model is given, with torchvision's transforms v2."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from .source import DataError, Split

Augment = Literal["none", "light", "standard", "strong"]


@dataclass(frozen=True)
class View:
    """How images are brought to `size` and scaled; the same for training, testing and prediction."""

    size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0  # share of the shorter side that testing keeps; at 1.0 the image is stretched to `size` instead
    interpolation: str = "bilinear"
    order: str = "RGB"  # BGR: channels are turned round before mean and std, which then are in that order too


def eval_transform(view: View) -> v2.Compose:
    """uint8 (C, H, W) -> float (channels, *size); nothing random."""
    mode = InterpolationMode(view.interpolation)
    if view.crop >= 1:
        resize = [v2.Resize(view.size, mode, antialias=True)]
    else:
        short = round(min(view.size) / view.crop)
        resize = [v2.Resize(short, mode, antialias=True), v2.CenterCrop(view.size)]
    return v2.Compose([_Channels(view.channels), *resize, *_finish(view)])


def train_transform(view: View, augment: Augment) -> v2.Compose:
    """The same with augmentation.

    light: small turns, shifts and scales, never mirrored (digits, small grey images);
    standard: random crops and mirroring; strong: TrivialAugment and erasing besides.
    """
    if augment == "none":
        return eval_transform(view)
    mode = InterpolationMode(view.interpolation)
    if augment == "light":
        move = v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        return v2.Compose([_Channels(view.channels), v2.Resize(view.size, mode, antialias=True), move, *_finish(view)])
    steps = [
        v2.RandomResizedCrop(view.size, (0.35, 1.0), interpolation=mode, antialias=True),
        v2.RandomHorizontalFlip(),
    ]
    after = []
    if augment == "strong":
        steps.append(v2.TrivialAugmentWide())
        after.append(v2.RandomErasing(0.25))
    return v2.Compose([_Channels(view.channels), *steps, *_finish(view), *after])


def statistics(split: Split, channels: int, most: int = 2000) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel, in 0..1, of the first `most` readable images."""
    total, squares, pixels = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64), 0
    for i in range(min(most, len(split))):
        try:
            image = split.read(i).expand(channels, -1, -1).double().flatten(1) / 255
        except DataError:
            continue  # reported when it is met in training
        total, squares, pixels = total + image.sum(1), squares + image.square().sum(1), pixels + image.shape[1]
    mean = total / max(pixels, 1)
    std = (squares / max(pixels, 1) - mean.square()).clamp(min=1e-4).sqrt()
    return tuple(round(v, 4) for v in mean.tolist()), tuple(round(v, 4) for v in std.tolist())


def _finish(view: View) -> list[torch.nn.Module]:
    turned = [_Reversed()] if view.order == "BGR" and view.channels == 3 else []
    return [*turned, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(view.mean), list(view.std))]


class _Reversed(torch.nn.Module):
    """RGB to BGR."""

    def forward(self, image: Tensor) -> Tensor:
        return image.flip(-3)


class _Channels(torch.nn.Module):
    """Grey repeated to three channels, or colour to grey, as the model needs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[0] == self.channels:
            return image
        if self.channels == 3:
            return image.expand(3, -1, -1)
        return v2.functional.rgb_to_grayscale(image)
