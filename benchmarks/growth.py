"""How time and memory grow with the map: every mixer at three ranks, some whole networks. See README.md here.

python benchmarks/growth.py                         # all that is not in the table yet; hours on one core
python benchmarks/growth.py --ranks 1 --only hydra performer
python benchmarks/growth.py --report                # table and plots of what there is
"""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

import vertebra
from vertebra.inspect import count_macs, peak_bytes
from vertebra.mixers.catalogue import MIXERS, Place
from vertebra.train.files import write_atomic

RESULTS = Path(__file__).resolve().parent / "results"
DIM = {1: 64, 2: 64, 3: 96}  # by rank: sines on three axes need a multiple of six channels
HEADS = {1: 2, 2: 2, 3: 6}  # stripes along three axes a multiple of three heads
SIDES = {  # cells per axis; at rank 2 those of images of 96 to 1024 pixels at stride 4
    1: (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    2: (24, 32, 48, 64, 96, 128, 192, 256),
    3: (8, 12, 16, 24, 32),
}
PIXELS = (96, 128, 192, 256, 384, 512, 768, 1024)
MODELS = {  # whole networks and how their cost grows with the number of pixels N, from their papers
    "resnet18": "N",
    "convnext_tiny": "N",
    "swin_tiny_patch4_window7_224": "N",
    "crossformer_tiny": "N",
    "mobilevitv2_100": "N",
    "pvt_v2_b0": "N^2 / ratio^ndim",
    "vit_tiny_patch16_224": "N^2",
}
COLUMNS = ("kind", "name", "side", "cells", "seconds", "linear", "mib", "gmacs", "left_out")
MARGIN = 0.2  # what an exponent may lie above the claim: caches fill up as maps grow
Point = dict[str, str | float]


def claimed(claim: str, ndim: int) -> float:
    """The exponent of N that a claim of the catalogue comes to on large maps."""
    if claim.startswith("N^2"):
        return 2.0
    return 1 + 1 / ndim if claim == "N^(1 + 1 / ndim)" else 1.0


def slope(cells: list[float], values: list[float], last: int = 3) -> float:
    """Exponent of `values` in `cells`: least squares on logarithms over the last points; nan of fewer than two."""
    x, y = ([math.log(v) for v in values[-last:]] for values in (cells, values))
    if len(x) < 2:
        return math.nan
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def predicted(cells: list[float], values: list[float], now: float, claim: float) -> float:
    """What `now` cells should cost, from the last two measured sizes or, after one, from the claim; 0 without any."""
    if not values:
        return 0.0
    rate = max(slope(cells, values, 2), 1.0) if len(values) > 1 else claim
    return values[-1] * (now / cells[-1]) ** rate


class Reference(torch.nn.Module):
    """What is linear by construction: queries, keys and values, multiplied cell by cell, and a projection.

    Its time per cell rises too, once maps no longer fit into caches; the mixers' times are set beside it.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = torch.nn.Linear(dim, 3 * dim), torch.nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(q * k * v)


def timed(call: Callable[[], object], reference: Callable[[], object], limit: float) -> tuple[float, float]:
    """Seconds of a call and of the reference, in turn: the least of six, of two where they take long.

    The first call makes the tables of its size. Seconds of processor: with one thread they are those of the clock, and
    other processes disturb them less.
    """
    found: list[list[float]] = [[], []]
    reference()
    while len(found[0]) < 2 or (len(found[0]) < 6 and sum(found[0]) <= limit / 4):
        for i, run in enumerate((call, reference)):
            began = time.process_time()
            run()
            found[i].append(time.process_time() - began)
    return min(found[0]), min(found[1])


def build(kind: str, name: str) -> tuple[torch.nn.Module, int, str, str]:
    """The network, its rank, and the claims of time and memory."""
    torch.manual_seed(0)
    if kind == "model":
        return vertebra.create_model(name).eval(), 2, MODELS[name], MODELS[name] if name not in FUSED else "N"
    ndim = int(kind.removeprefix("rank "))
    entry = MIXERS[name]
    place = Place(ndim, DIM[ndim], HEADS[ndim], (SIDES[ndim][0],) * ndim)
    return entry.build(place).eval(), ndim, entry.time, entry.memory


FUSED = ("vit_tiny_patch16_224", "pvt_v2_b0")  # fused attention keeps no map of weights


def measure(kind: str, name: str, limit: float, most: float) -> list[Point]:
    """A point per size; those that would take more than `limit` seconds or `most` MiB are left out and say so."""
    network, ndim, time_claim, memory_claim = build(kind, name)
    dim = DIM[ndim]
    reference = Reference(dim).eval()
    points: list[Point] = []
    cells: list[float] = []
    seconds: list[float] = []
    mib: list[float] = []
    why = ""
    for side in PIXELS if kind == "model" else SIDES[ndim]:
        count = float(side**ndim)
        point: Point = {"kind": kind, "name": name, "side": side, "cells": count}
        if predicted(cells, seconds, count, claimed(time_claim, ndim)) > limit:
            why = why or "time"
        elif predicted(cells, mib, count, claimed(memory_claim, ndim)) > most:
            why = why or "memory"
        if not why:
            shape = (1, 3, side, side) if kind == "model" else (1, *(side,) * ndim, dim)
            x = torch.randn(shape)
            flat = torch.randn(1, side**ndim // (16 if kind == "model" else 1), dim)

            def call(network: torch.nn.Module = network, x: torch.Tensor = x) -> object:
                with torch.inference_mode():
                    return network(x)

            point["seconds"], point["linear"] = timed(call, lambda flat=flat: call(reference, flat), limit)
            point["mib"] = max(peak_bytes(call), 1) / 2**20
            point["gmacs"] = count_macs(network, shape) / 1e9
            cells.append(count), seconds.append(float(point["seconds"])), mib.append(float(point["mib"]))
        points.append(point | {"left_out": why})
    return points


# --- table and plots --------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Point]:
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return [
            {k: v if k in ("kind", "name", "left_out") else float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(f)
        ]


def write(path: Path, points: list[Point]) -> None:
    text = io.StringIO(newline="")
    lines = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    lines.writeheader()
    lines.writerows(
        {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in p.items() if k in COLUMNS} for p in points
    )
    write_atomic(path, text.getvalue().encode())


def series(points: list[Point], kind: str) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for p in points:
        if p["kind"] == kind:
            found.setdefault(str(p["name"]), []).append(p)
    return found


def report(points: list[Point], limit: float, most: float, date: str) -> str:
    lines = [
        f"# Cost as maps grow, {date}",
        "",
        f"Inference of one sample, float32, CPU, one thread, torch {torch.__version__}; by benchmarks/growth.py.",
        f"Mixers have {DIM[2]} channels and {HEADS[2]} heads ({DIM[3]} and {HEADS[3]} at rank 3), as built for the",
        "first stage. Exponents in the number of cells (of pixels for networks) are slopes of logarithms over the",
        "last three sizes. N^2 divided by a number is linear as long as its linear part is the larger one. A size that",
        f"would have taken more than {limit:g} s or {most / 1024:g} GiB is left out. Time per cell rises where maps",
        "outgrow the caches, of any mixer: corrected exponents are of the time over that of three linear layers and a",
        f"product of their outputs on the same map. **Bold**: more than {MARGIN} above the claim (of time, the",
        "corrected one).",
    ]
    for kind in ("rank 1", "rank 2", "rank 3", "model"):
        found = series(points, kind)
        if not found:
            continue
        lines += ["", f"## {'Networks' if kind == 'model' else 'Mixers at ' + kind}", ""]
        lines += ["| name | claimed time | measured | corrected | multiply-accumulates | claimed memory | measured | largest | cells/s there | MiB there | left out |"]  # fmt: skip # noqa: E501
        lines += ["|---|---|---|---|---|---|---|---|---|---|---|"]
        ndim = 2 if kind == "model" else int(kind[-1])
        for name, own in found.items():
            if kind == "model":
                time_claim, memory_claim = MODELS[name], "N" if name in FUSED else MODELS[name]
            else:
                time_claim, memory_claim = MIXERS[name].time, MIXERS[name].memory
            done = [p for p in own if "seconds" in p]
            cells = [float(p["cells"]) for p in done]
            exponents = {}
            for p in done:
                p["corrected"] = float(p["seconds"]) / float(p["linear"]) * float(p["cells"])
            for what, claim in (("seconds", None), ("corrected", time_claim), ("gmacs", None), ("mib", memory_claim)):
                values = [float(p[what]) for p in done]
                rate = slope(cells, values) if values and min(values) > 0 else math.nan
                shown = "-" if rate != rate else f"{rate:.2f}"
                above = claim is not None and rate > claimed(claim, ndim) + MARGIN
                exponents[what] = f"**{shown}**" if above else shown
            out = ", ".join(f"{p['side']:g}" for p in own if "seconds" not in p)
            why = next((str(p["left_out"]) for p in own if p.get("left_out")), "")
            end = done[-1]
            rate = end["cells"] / end["seconds"]
            lines.append(
                f"| {name} | {time_claim} | {exponents['seconds']} | {exponents['corrected']} | {exponents['gmacs']} |"
                f" {memory_claim} | {exponents['mib']} | {end['side']:g} | {rate:.3g} | {end['mib']:.3g} |"
                f" {f'{out} ({why})' if out else ''} |"
            )
    return "\n".join(lines) + "\n"


def plot(points: list[Point], kind: str, path: Path) -> None:
    """Small multiples: time (blue) and memory (orange) against cells, each with its claim as a dashed line."""
    from matplotlib.figure import Figure

    found = series(points, kind)
    columns = 8 if len(found) > 12 else 4
    rows = math.ceil(len(found) / columns)
    figure = Figure((1.6 * columns, 1.45 * rows), layout="constrained")
    ndim = 2 if kind == "model" else int(kind[-1])
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for (name, own), axes in zip(found.items(), panels):
        claims = (MODELS[name], "N" if name in FUSED else MODELS[name]) if kind == "model" else (
            MIXERS[name].time, MIXERS[name].memory)  # fmt: skip
        done = [p for p in own if "seconds" in p]
        cells = [float(p["cells"]) for p in done]
        for what, claim, colour in zip(("seconds", "mib"), claims, ("C0", "C1")):
            values = [float(p[what]) / float(done[0][what]) for p in done]
            axes.loglog(cells, values, color=colour, linewidth=1)
            rate = claimed(claim, ndim)
            axes.loglog(cells, [(c / cells[0]) ** rate for c in cells], "--", color=colour, linewidth=0.5)
        axes.set_title(name, fontsize=6)
        axes.tick_params(labelsize=5, length=1)
        axes.minorticks_off()
    for axes in list(panels):
        axes.axis("off")
    figure.suptitle(f"{kind}: time (blue) and memory (orange) over the smallest map's; dashed: claimed", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=80)
    write_atomic(path, content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", choices=(1, 2, 3), default=[2, 1, 3])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=list(MIXERS), default=list(MIXERS), help="mixers")
    parser.add_argument("--seconds", type=float, default=20.0, help="a size that would take longer is left out")
    parser.add_argument("--mib", type=float, default=4096.0, help="a size that would need more is left out")
    parser.add_argument("--budget", type=float, default=math.inf, help="start nothing after so many seconds")
    parser.add_argument("--again", action="store_true", help="measure anew what the table has")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    table, began = args.out / "growth.csv", time.perf_counter()
    order = {name: i for i, name in enumerate([*MIXERS, *MODELS])}
    points = sorted(read(table), key=lambda p: (p["kind"], order[str(p["name"])]))
    wanted = [(f"rank {n}", name) for n in args.ranks for name in args.only] + [("model", m) for m in args.models]
    have = {(p["kind"], p["name"]) for p in points} if not args.again else set()
    for kind, name in [] if args.report else [key for key in wanted if key not in have]:
        if time.perf_counter() - began > args.budget:
            break
        fresh = measure(kind, name, args.seconds, args.mib)
        points = [p for p in points if (p["kind"], p["name"]) != (kind, name)] + fresh
        write(table, points)
        done = [p for p in fresh if "seconds" in p]
        print(kind, name, *(f"{p['side']:g}: {p['seconds']:.3f} s {p['mib']:.0f} MiB," for p in done), flush=True)
    date = datetime.date.today().isoformat()
    write_atomic(args.out / f"growth_{date}.md", report(points, args.seconds, args.mib, date).encode())
    for kind in ("rank 1", "rank 2", "rank 3", "model"):
        if series(points, kind):
            plot(points, kind, args.out / f"growth_{kind.replace(' ', '_')}.png")


if __name__ == "__main__":
    main()
