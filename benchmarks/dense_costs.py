"""Parameters and multiply-accumulates of whole dense networks beside the papers' tables: results/dense_costs.md.

Nothing is computed: networks are built and counted on the meta device, as `vertebra.inspect.count_macs` counts
(matrix products, convolutions, attention). The published figures come mostly from mmcv's counter, which calls
multiply-accumulates FLOPs, counts norms, activations and interpolation too (a per mille), and leaves out what is no
module, as the two products of attention, unless a family's own script added them. So both sums are given, and the
deviation is that of the nearer one.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vertebra
from vertebra.layers import record_attention

FILE = Path(__file__).resolve().parent / "results" / "dense_costs.md"


@dataclass(frozen=True)
class Row:
    """One published system: `sides` is the input its GMACs are for, None where no figure is known.

    `options` are those of `vertebra.segmentation` or `vertebra.detection`; `reason` says why a figure is more than 1 %
    off.
    """

    name: str
    head: str
    num_classes: int
    sides: tuple[int, int] | None
    params_m: float | None
    gmacs: float | None
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    fused: bool = False  # the figures are those of the backbone's inference structure


WIDE, SQUARE = (512, 2048), (512, 512)
NARROW = dict(head_options=dict(channels=256))
FUSED = "counted as published: fused, without the auxiliary head"
EMO = "the head's width, 256, is inferred from the figures, which look cut off, not rounded"
FOCAL = (
    "not explained: the paper's dense network may have the convolutional embedding (62.5 M); its counter is not known"
)


def _ade(name, head, params, gmacs=None, sides=None, source="", reason="", fused=False, **options) -> Row:
    return Row(name, head, 150, sides, params, gmacs, source, options, reason, fused)


SEGMENTATION = [
    _ade("crossformer_small", "semantic_fpn", 34.3, source="CrossFormer, ADE20K table"),
    _ade("crossformer_base", "semantic_fpn", 55.6, source="CrossFormer, ADE20K table"),
    _ade("crossformer_large", "semantic_fpn", 95.4, source="CrossFormer, ADE20K table"),
    _ade("crossformer_pp_small", "semantic_fpn", 27.1, source="CrossFormer++, ADE20K table"),
    _ade("crossformer_small", "upernet", 62.3, source="CrossFormer, ADE20K table"),
    _ade("crossformer_base", "upernet", 83.6, source="CrossFormer, ADE20K table"),
    _ade("crossformer_large", "upernet", 125.5, source="CrossFormer, ADE20K table"),
    _ade("swin_tiny_patch4_window7_224", "upernet", 60, 945, WIDE, "Swin repository"),
    _ade("swin_small_patch4_window7_224", "upernet", 81, 1038, WIDE, "Swin repository"),
    _ade("swin_base_patch4_window7_224", "upernet", 121, 1188, WIDE, "Swin repository"),
    _ade("convnext_tiny", "upernet", 60, 939, WIDE, "ConvNeXt repository"),
    _ade("convnext_small", "upernet", 82, 1027, WIDE, "ConvNeXt repository"),
    _ade("convnext_base", "upernet", 122, 1170, WIDE, "ConvNeXt repository"),
    _ade("focal_tiny_patch4_window7_224", "upernet", 62, 998, WIDE, "Focal Transformer, ADE20K table", FOCAL),
    _ade("focal_tiny_useconv_patch4_window7_224", "upernet", 62, 998, WIDE, "Focal Transformer, ADE20K table"),
    _ade("smt_small", "upernet", 50, 935, WIDE, "SMT, ADE20K table", "the paper's SMT-S has 20.5 M, its code 22.55 M"),
    _ade("smt_base", "upernet", 62, 1004, WIDE, "SMT, ADE20K table"),
    _ade("unireplknet_t", "upernet", 61, 946, WIDE, "UniRepLKNet, ADE20K table", FUSED, fused=True, auxiliary=False),
    _ade("unireplknet_s", "upernet", 86, 1036, WIDE, "UniRepLKNet, ADE20K table", FUSED, fused=True, auxiliary=False),
    _ade("litv2_s", "semantic_fpn", 31, 41, SQUARE, "LITv2, ADE20K table"),
    _ade("litv2_m", "semantic_fpn", 52, 63, SQUARE, "LITv2, ADE20K table"),
    _ade("litv2_b", "semantic_fpn", 90, 93, SQUARE, "LITv2, ADE20K table"),
    _ade("iformer_small", "semantic_fpn", 24, 181, WIDE, "iFormer, ADE20K table"),
    _ade("iformer_small", "upernet", 49, 938, WIDE, "iFormer, ADE20K table"),
    _ade("twins_pcpvt_small", "upernet", 54.6, 234, SQUARE, "Twins, ADE20K table"),
    _ade("twins_pcpvt_base", "upernet", 74.3, 250, SQUARE, "Twins, ADE20K table"),
    _ade("twins_pcpvt_large", "upernet", 91.5, 269, SQUARE, "Twins, ADE20K table"),
    _ade("emo_1m", "deeplabv3", 5.6, source="EMO, ADE20K table", reason=EMO, **NARROW),
    _ade("emo_2m", "deeplabv3", 6.9, source="EMO, ADE20K table", reason=EMO, **NARROW),
    _ade("emo_5m", "deeplabv3", 10.3, source="EMO, ADE20K table", reason=EMO, **NARROW),
    _ade("emo_1m", "pspnet", 4.3, source="EMO, ADE20K table", reason=EMO, **NARROW),
    _ade("emo_2m", "pspnet", 5.5, source="EMO, ADE20K table", reason=EMO, **NARROW),
    _ade("emo_5m", "pspnet", 8.5, source="EMO, ADE20K table", reason=EMO, **NARROW),
]


COCO = (800, 1280)
FROZEN = "mmdetection leaves out the frozen stem and first stage, 0.225 M"
UNRELEASED = "not explained: the dense code was never released"
LARGER = "not explained: the paper's backbone costs {} more than ours, the same under both heads"


def _coco(name, head, params, gmacs=None, source="", reason="", **options) -> Row:
    return Row(name, head, 80, COCO, params, gmacs, source, options, reason)


DETECTION = [
    _coco("resnet50", "retinanet", 37.74, 239, "mmdetection", FROZEN),
    _coco("resnet50", "faster_rcnn", 41.53, 207, "mmdetection", FROZEN),
    _coco("resnet50", "mask_rcnn", 44.18, 260, "mmdetection", FROZEN),
    _coco("resnet50", "fcos", None),
    _coco("crossformer_small", "retinanet", 40.8, 282.0, "CrossFormer, COCO table", LARGER.format("25.2 G")),
    _coco("crossformer_base", "retinanet", 62.1, 389.0, "CrossFormer, COCO table", LARGER.format("40.1 G")),
    _coco("crossformer_small", "mask_rcnn", 50.2, 301.0, "CrossFormer, COCO table", LARGER.format("25.2 G")),
    _coco("crossformer_base", "mask_rcnn", 71.5, 407.9, "CrossFormer, COCO table", LARGER.format("40.1 G")),
    _coco("swin_tiny_patch4_window7_224", "mask_rcnn", 48, 267, "Swin repository"),
    _coco("convnext_tiny", "mask_rcnn", 48, 262, "ConvNeXt repository"),
    _coco("lightvit_tiny", "mask_rcnn", 28, 187, "LightViT, COCO table"),
    _coco("lightvit_small", "mask_rcnn", 38, 204, "LightViT, COCO table"),
    _coco("lightvit_base", "mask_rcnn", 54, 240, "LightViT, COCO table"),
    _coco("dualtoken_vit_s", "mask_rcnn", None, 191, "DualToken-ViT, COCO table"),
    _coco("smt_small", "mask_rcnn", 40, 265, "SMT, COCO table", "the paper's SMT-S has 20.5 M, its code 22.55 M"),
    _coco("smt_base", "mask_rcnn", 52, 328, "SMT, COCO table"),
    _coco("iformer_small", "mask_rcnn", 40, 263, "iFormer, COCO table"),
    _coco("iformer_base", "mask_rcnn", 67, 351, "iFormer, COCO table"),
    _coco("focal_tiny_patch4_window7_224", "mask_rcnn", 49, 291, "Focal Transformer, COCO table", UNRELEASED),
    _coco("focal_small_patch4_window7_224", "mask_rcnn", 71, 401, "Focal Transformer, COCO table", UNRELEASED),
    _coco("gc_vit_tiny", "mask_rcnn", 48, 291, "GC ViT, COCO table", "not explained"),
    _coco("pvt_tiny", "retinanet", 23.0, source="PVT, COCO table"),
    _coco("pvt_small", "retinanet", 34.2, source="PVT, COCO table"),
    _coco("pvt_v2_b0", "retinanet", 13.0, source="PVT v2, COCO table"),
    _coco("pvt_v2_b2", "retinanet", 35.1, source="PVT v2, COCO table"),
    _coco("pvt_v2_b2", "mask_rcnn", 45.0, source="PVT v2, COCO table"),
]
ROWS = [*SEGMENTATION, *DETECTION]


def build(row: Row) -> nn.Module:
    """The network of `row`, without memory, in evaluation mode."""
    make = vertebra.detection if row in DETECTION else vertebra.segmentation
    with torch.device("meta"):
        model = make(row.name, row.head, row.num_classes, **row.options).eval().requires_grad_(False)
    if row.fused:
        model.pyramid.backbone = vertebra.fuse(model.pyramid.backbone)
    return model


def params_m(row: Row) -> float:
    """Millions of parameters, of the auxiliary head too."""
    return sum(p.numel() for p in build(row).parameters()) / 1e6


def _detect(model: nn.Module, x: torch.Tensor) -> None:
    """What mmdetection's get_flops runs of a detector: every level, 1000 proposals, 100 of them for the masks."""
    maps = list(model.neck(model.pyramid(x)).values())
    net, width = model.net, model.neck.out_channels
    if hasattr(net, "head"):
        net.head(maps)
        return
    net.rpn.head(maps)
    net.roi_heads.box_predictor(net.roi_heads.box_head(x.new_empty(1000, width, 7, 7)))
    if model.masks:
        net.roi_heads.mask_predictor(net.roi_heads.mask_head(x.new_empty(100, width, 14, 14)))


def gmacs(row: Row) -> tuple[float, float] | None:
    """Billions of multiply-accumulates of one image of the row's sides, and those without the products of attention.

    None where the row names no size.
    """
    if row.sides is None:
        return None
    model = build(row)
    x = torch.empty((1, model.in_chans, *row.sides), device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad(), record_attention():
        _detect(model, x) if row in DETECTION else model(x)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "bmm" in str(operation))
    return counter.get_total_flops() / 2e9, (counter.get_total_flops() - products) / 2e9


def fits(ours: float, theirs: float) -> bool:
    """Within 1 %, or the same once rounded to the digits printed."""
    digits = len(f"{theirs:g}".partition(".")[2])
    return abs(ours - theirs) <= 0.01 * theirs or round(ours, digits) == theirs


def _percent(ours: float, theirs: float) -> str:
    return f"{100 * (ours / theirs - 1):+.1f}"


def line(row: Row) -> str:
    """The row of the table, with our figures and the deviations."""
    params, counted = params_m(row), gmacs(row)
    cells = [row.name, row.head, "x".join(map(str, row.sides)) if row.sides else "", f"{params:.2f}"]
    cells += ["", ""] if row.params_m is None else [f"{row.params_m:g}", _percent(params, row.params_m)]
    cells += ["", ""] if counted is None else [f"{macs:.1f}" for macs in counted]
    if counted is None or row.gmacs is None:
        cells += ["", ""]
    else:
        nearer = min(counted, key=lambda macs: abs(macs - row.gmacs))
        cells += [f"{row.gmacs:g}", _percent(nearer, row.gmacs)]
    return "| " + " | ".join([*cells, row.source, row.reason]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", metavar="PATTERN", default="*", help="print these alone; the file stays as it is")
    args = parser.parse_args()
    lines = []
    for row in ROWS:
        if fnmatch.fnmatch(row.name, args.models):
            lines.append(line(row))
            print(lines[-1], flush=True)
    if args.models != "*":
        return
    heads = (
        "model | head | input | params M | published | % | GMACs | without attention | published | % | source | note"
    )
    text = [
        "# Costs of dense networks\n",
        *(" ".join(part.split()) + "\n" for part in (__doc__ or "").split("\n\n")[1:]),
        "Written by `python benchmarks/dense_costs.py`. Parameters count the auxiliary head, multiply-accumulates do"
        " not (it is not run).\n",
        f"| {heads} |",
        "|" + "---|" * 12,
        *lines,
    ]
    temporary = FILE.with_suffix(".tmp")
    temporary.write_text("\n".join(text) + "\n", encoding="utf-8")
    os.replace(temporary, FILE)


if __name__ == "__main__":
    main()
