"""Exports the smallest variant of every family to every format: results/exports.csv. See README.md here.

Each export runs in a process of its own with a time limit, and its row is added as soon as it is there, so that a run
can be stopped and go on: what has a row is left out (--again for another try of those that failed). Weights are drawn
so large that every layer, attention too, moves the outputs: at the small ones a network begins with, a wrong bias or
mask would hide behind the residual path.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FILE = Path(__file__).resolve().parent / "results" / "exports.csv"
# a format's name may be followed by which sizes the file takes; without, any
SIZES = {"": {}, "of one size": {"dynamic": "batch"}, "of sizes in 32s": {"multiple": 32}}
COLUMNS = ("family", "model", "format", "seconds", "bytes", "dynamic", "default", "odd", "minimum", "mixed", "error")


def smallest() -> dict[str, str]:
    """The variant with the fewest published parameters of each family."""
    import vertebra

    def millions(name: str) -> float:
        return float(vertebra.model_info(name).published.get("params_m", math.inf))

    return {f: min(vertebra.list_models(family=f), key=millions) for f in vertebra.list_families()}


def lively(model) -> None:
    """Fill the weights so that no part is too quiet to be seen in the outputs."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim < 2:
                p.add_(0.1 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * max(p[0].numel(), 1) ** -0.5)


def one(name: str, to: str, threads: int) -> dict[str, object]:
    """The row of one export, in this process."""
    import torch

    import vertebra

    torch.set_num_threads(threads)
    model = vertebra.create_model(name).eval()
    lively(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("net.onnx" if to == "onnx" else "net.pt2")
        kind, _, sizes = to.partition(" ")
        made = vertebra.export(model, path, kind, **SIZES[sizes])
    worst = list(made.errors.values())  # two batches at each size
    places = ("default", "odd", "minimum", "mixed")
    errors = {key: f"{max(worst[2 * i : 2 * i + 2]):.1e}" for i, key in enumerate(places) if 2 * i < len(worst)}
    return {"seconds": f"{made.seconds:.1f}", "bytes": made.bytes, "dynamic": " ".join(made.dynamic), **errors}


def run(name: str, to: str, threads: int, limit: float) -> dict[str, object]:
    """The row of one export from a process of its own; a failure is a row with the reason under "error"."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--one", name, "--format", to, "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"seconds": f"{time.perf_counter() - start:.1f}", "error": told[:400]}


def read() -> list[dict[str, str]]:
    """The rows that are there."""
    if not FILE.exists():
        return []
    with FILE.open(newline="", encoding="utf-8") as stored:
        return list(csv.DictReader(stored))


def write(rows: list[dict[str, object]], mode: str) -> None:
    with FILE.open(mode, newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
        if mode == "w" or out.tell() == 0:
            table.writeheader()
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["torch-export", "onnx", *(f"aoti {s}".strip() for s in SIZES)])
    parser.add_argument("--families", nargs="+", metavar="PATTERN", default=["*"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for each export with its verification")
    parser.add_argument("--again", action="store_true", help="export those that failed once more")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--format", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.format, args.threads)))
        return
    rows = read()
    if args.again:
        rows = [row for row in rows if not row["error"]]
        write(rows, "w")
    done = {(row["family"], row["format"]) for row in rows}
    for to in args.formats:
        for family, name in smallest().items():
            if (family, to) in done or not any(fnmatch.fnmatch(family, pattern) for pattern in args.families):
                continue
            row = {"family": family, "model": name, "format": to, **run(name, to, args.threads, args.timeout)}
            write([row], "a")
            print(" ".join(str(row.get(key, "")) for key in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
