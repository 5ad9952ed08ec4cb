"""Time and peak memory of dense prediction, per head, beside torchvision's own networks. See README.md here.

    python benchmarks/dense_speed.py                      # everything, for hours on one core
    python benchmarks/dense_speed.py --models resnet50 --sizes 512x512 --heads retinanet mask_rcnn deeplabv3
    python benchmarks/dense_speed.py --more               # what is not in today's file yet

One image, one thread, random weights, median of three calls after two others; memory is the most that a call holds at
one time beyond the weights. Detectors are told to keep the image's size, all of them alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vertebra
from vertebra.inspect import peak_bytes

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = {
    "resnet50": "resnet50",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "pvt_v2_b2": "pvt_v2_b2",
    "crossformer_small": "crossformer_small",
}
SEGMENTERS = ("semantic_fpn", "upernet", "pspnet", "deeplabv3", "segformer")
DETECTORS = ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")
THEIRS = {
    "retinanet": "retinanet_resnet50_fpn",
    "mask_rcnn": "maskrcnn_resnet50_fpn",
    "deeplabv3": "deeplabv3_resnet50",
}
SEGMENTED, DETECTED = 150, 80  # classes of ADE20K and of COCO


def ours(model: str, head: str, size: tuple[int, int]) -> nn.Module:
    if head in SEGMENTERS:
        return vertebra.segmentation(MODELS[model], head, SEGMENTED).eval()
    return vertebra.detection(MODELS[model], head, DETECTED, min_size=min(size), max_size=max(size)).eval()


def theirs(head: str, size: tuple[int, int]) -> nn.Module:
    """torchvision's; its DeepLabv3 has an output stride of 8 by dilation, ours reads the pyramid's last map."""
    import torchvision

    bare: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if head in SEGMENTERS:
        found = torchvision.models.get_model(THEIRS[head], num_classes=SEGMENTED, **bare)
        return Logits(found).eval()
    classes = DETECTED + (head != "retinanet")  # its R-CNNs count the background
    sides = {"min_size": min(size), "max_size": max(size)}
    return torchvision.models.get_model(THEIRS[head], num_classes=classes, **bare, **sides).eval()


class Logits(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)["out"]


def measure(model: nn.Module, size: tuple[int, int], half: bool, repeats: int) -> dict[str, float]:
    x = torch.rand(1, 3, *size)

    def call() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(x)

    memory = peak_bytes(call)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak_mib": memory / 2**20}


def page(rows: list[dict[str, Any]]) -> str:
    """The table, and the ratios to torchvision where both were measured."""
    lines = [
        "# Dense prediction: time and peak memory",
        "",
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread, batch 1, "
        "random weights, median of three.",
        "MiB: the most that a call holds beyond the weights. bf16 is autocast. Written by benchmarks/dense_speed.py.",
        "",
        "| network | head | size | parameters (M) | float32 (s) | MiB | bf16 (s) | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    table: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        table.setdefault((row["model"], row["head"], row["size"]), {})[row["precision"]] = row

    def cells(row: dict[str, Any] | None) -> str:
        if row is None:
            return "– | –"
        return row["error"] + " | –" if "error" in row else f"{row['seconds']:.2f} | {row['peak_mib']:.0f}"

    for (model, head, size), found in table.items():
        params = next(iter(found.values()))["params_m"]
        both = " | ".join(cells(found.get(precision)) for precision in ("float32", "bf16"))
        lines.append(f"| {model} | {head} | {size} | {params:.1f} | {both} |")
    lines += [
        "",
        "torchvision's time and memory by ours, ResNet-50, same run (above 1: ours is faster, or needs less):",
        "",
    ]
    lines += ["| head | size | precision | time | memory |", "|---|---|---|---|---|"]
    for (model, head, size), found in table.items():
        for precision, mine in found.items():
            other = table.get(("torchvision", head, size), {}).get(precision)
            if model == "resnet50" and other and not ("error" in mine or "error" in other):
                ratios = [other[key] / mine[key] for key in ("seconds", "peak_mib")]
                lines.append(f"| {head} | {size} | {precision} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[*MODELS, "torchvision"], choices=[*MODELS, "torchvision"])
    parser.add_argument("--heads", nargs="*", default=[*SEGMENTERS, *DETECTORS], choices=[*SEGMENTERS, *DETECTORS])
    parser.add_argument("--sizes", nargs="*", default=["512x512", "800x1280"])
    parser.add_argument("--precisions", nargs="*", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--more", action="store_true", help="add to today's file what it lacks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    stem = f"dense_speed_{datetime.date.today()}"
    store = options.out / f"{stem}.json"
    rows: list[dict[str, Any]] = json.loads(store.read_text()) if options.more and store.exists() else []
    done = {(r["model"], r["head"], r["size"], r["precision"]) for r in rows}
    for text in options.sizes:
        height, width = map(int, text.split("x"))
        for head in options.heads:
            for model in options.models:
                if model == "torchvision" and head not in THEIRS:
                    continue
                wanted = [p for p in options.precisions if (model, head, text, p) not in done]
                if not wanted:
                    continue
                make: Callable[[], nn.Module] = (
                    (lambda h=head, s=(height, width): theirs(h, s)) if model == "torchvision"
                    else lambda m=model, h=head, s=(height, width): ours(m, h, s)
                )  # fmt: skip
                torch.manual_seed(0)
                net = make()
                params = sum(p.numel() for p in net.parameters()) / 1e6
                for precision in wanted:
                    row = {"model": model, "head": head, "size": text, "precision": precision, "params_m": params}
                    try:
                        row |= measure(net, (height, width), precision == "bf16", options.repeats)
                    except RuntimeError as e:  # an operation that has no bfloat16 form
                        row["error"] = " ".join(str(e).split())[:60]
                    print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                    rows.append(row)
                    for path, content in (
                        (store, json.dumps(rows, indent=1)),
                        (options.out / f"{stem}.md", page(rows)),
                    ):
                        temporary = path.with_suffix(".tmp")
                        temporary.write_text(content)
                        os.replace(temporary, path)


if __name__ == "__main__":
    main()
