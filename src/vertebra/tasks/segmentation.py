"""Semantic segmentation: any backbone under any head of `decode_heads`, at any size and rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..backbone import Backbone, Rules
from ..checkpoint import read_checkpoint
from ..layers.space import channels_first, channels_last, resize
from ..registry import create_model
from . import decode_heads as parts
from .pyramid import OnPyramid, Pyramid
from .whole import load_whole

# head -> (its class, whether an FPN comes before it, whether the papers train it with an auxiliary head)
HEADS: dict[str, tuple[Callable[..., parts.DecodeHead], bool, bool]] = {
    "semantic_fpn": (parts.SemanticFPNHead, True, False),
    "fpn": (parts.SemanticFPNHead, True, False),  # mmsegmentation's name for the same
    "upernet": (parts.UPerHead, False, True),
    "pspnet": (parts.PSPHead, False, True),
    "deeplabv3": (parts.ASPPHead, False, True),
    "segformer": (parts.SegFormerHead, False, False),
    "unet": (parts.UNetHead, False, False),
}
AUXILIARY_WEIGHT = 0.4


def _options(
    head: Callable[..., nn.Module], given: Mapping[str, Any], name: str, extra: tuple[str, ...] = ()
) -> dict[str, Any]:
    fixed = ("ndim", "dims", "strides", "num_classes", "in_chans")
    known = [k for k in inspect.signature(head).parameters if k not in fixed]
    wrong = sorted(set(given) - {*known, *extra})
    if wrong:
        raise ValueError(
            f"head {name!r} has no option {', '.join(map(repr, wrong))}; it has: {', '.join([*known, *extra])}"
        )
    return dict(given)


class Segmenter(OnPyramid):
    """A backbone's pyramid, a neck where the head wants one, the head: (B, C, *S) -> logits (B, num_classes, *S).

    Args:
        backbone: built with ``features_only=True``.
        head: one of `HEADS`.
        num_classes: classes of a pixel, background counted where it is one.
        auxiliary: whether a second, small head on the map of stride 16 is trained beside (its loss counts
            `auxiliary_weight`); None as the papers do with this head. ``model(x)`` never computes it.
        head_options: options of the head's class, such as ``channels``; of "semantic_fpn" ``neck_channels`` (256) too.

    Raises ValueError for an unknown head or option, and for a number of classes below one.
    """

    prediction: ClassVar[str] = "logits"
    last_layers: ClassVar[tuple[str, ...]] = ("decode_head.conv_seg", "auxiliary_head.conv_seg")
    OFFICIAL: ClassVar[Rules] = parts.RULES
    auxiliary_weight: float = AUXILIARY_WEIGHT
    load_report: Any = None

    def __init__(
        self,
        backbone: Backbone,
        head: str = "upernet",
        num_classes: int = 150,
        auxiliary: bool | None = None,
        head_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"unknown segmentation head {head!r}; there are: {', '.join(HEADS)}")
        _check_classes(num_classes)
        self.pyramid = Pyramid(backbone)
        self.head_name, self.num_classes = head, num_classes
        self.ndim, self.in_chans = backbone.ndim, backbone.in_chans
        cls, through_neck, usual = HEADS[head]
        options = _options(cls, head_options or {}, head, ("neck_channels",) if through_neck else ())
        dims, strides = self.pyramid.channels, self.pyramid.strides
        place = (num_classes, backbone.in_chans)
        self.neck = None
        if through_neck:
            width = options.pop("neck_channels", 256)
            self.neck = parts.FPN(self.ndim, dims, width)
            self.decode_head = cls(self.ndim, (width,) * len(dims), strides, *place, **options)
        else:
            self.decode_head = cls(self.ndim, dims, strides, *place, **options)
        wanted = usual if auxiliary is None else auxiliary
        self.auxiliary_head = parts.FCNHead(self.ndim, dims, strides, *place) if wanted else None

    @property
    def min_size(self) -> int:
        """The smallest side of an input."""
        return self.pyramid.backbone.min_size

    def _full(self, logits: Tensor, x: Tensor) -> Tensor:
        return channels_first(resize(logits, x.shape[2:]))

    def _maps(self, x: Tensor) -> list[Tensor]:
        return [channels_last(m) for m in self.pyramid(x)]

    def _decoded(self, maps: list[Tensor], x: Tensor) -> Tensor:
        maps = maps if self.neck is None else self.neck(maps)
        return self._full(self.decode_head(maps, channels_last(x)), x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *S) -> logits (B, num_classes, *S), linearly upsampled (align_corners False)."""
        return self._decoded(self._maps(x), x)

    def forward_outputs(self, x: Tensor) -> dict[str, Tensor]:
        """ "logits" and, with an auxiliary head, "auxiliary": both (B, num_classes, *S)."""
        maps = self._maps(x)
        outputs = {"logits": self._decoded(maps, x)}
        if self.auxiliary_head is not None:
            outputs["auxiliary"] = self._full(self.auxiliary_head(maps, x), x)
        return outputs

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh last layers of `num_classes` outputs in the head and the auxiliary head."""
        _check_classes(num_classes)
        self.num_classes = num_classes
        for head in (self.decode_head, self.auxiliary_head):
            if head is not None:
                where = head.conv_seg.weight
                head.conv_seg = head.classifier(num_classes).to(where.device, where.dtype)


def _check_classes(num_classes: Any) -> None:
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")


def segmentation(
    name: str,
    head: str = "upernet",
    num_classes: int = 150,
    *,
    ndim: int = 2,
    in_chans: int = 3,
    img_size: int | tuple[int, ...] | None = None,
    drop_path_rate: float | None = None,
    pretrained: bool = False,
    checkpoint: Any = None,
    auxiliary: bool | None = None,
    head_options: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Segmenter:
    """The variant `name` of `create_model` as the backbone of a network for semantic segmentation.

    Args:
        head: "semantic_fpn" (or "fpn"), "upernet", "pspnet", "deeplabv3", "segformer", "unet" (up to full resolution).
        num_classes: classes of a pixel, background counted where it is one.
        ndim: 2 for images, 1 for signals, 3 for volumes.
        checkpoint: a classification checkpoint for the backbone, or a whole segmentation network's in our naming or
            mmsegmentation's (recognised by its ``decode_head.``; one of another `num_classes` is refused).
        auxiliary, head_options: see `Segmenter`.

    The others, `pretrained` and `overrides` too, are `create_model`'s. Raises ValueError for what cannot be built,
    CheckpointError for a file that does not fit.
    """
    state = None if checkpoint is None else read_checkpoint(checkpoint)
    whole = state if state is not None and any("decode_head." in key for key in state) else None
    backbone = create_model(
        name, ndim, in_chans, img_size=img_size, drop_path_rate=drop_path_rate, features_only=True,
        pretrained=pretrained, checkpoint=None if whole else state, **overrides,
    )  # fmt: skip
    model = Segmenter(backbone, head, num_classes, auxiliary, head_options)
    model.load_report = load_whole(model, whole, "the checkpoint") if whole else backbone.load_report
    return model
