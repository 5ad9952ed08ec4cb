"""Time and memory of the gradient step against timm and torchvision: equal weights, input, precision, one process.

See README.md here. The clock counts the process's own CPU time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor, nn

import vertebra
from vertebra.inspect import peak_bytes
from vertebra.inspect.bench import FORMATS
from vertebra.inspect.peers import TOLERANCE, copy_weights, corrupts_memory, peer_model, unsettle

MODELS = (
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "pvt_v2_b0",
    "resnet18",
    "twins_svt_small",
    "gc_vit_xxtiny",
    "maxvit_tiny_tf_224",
    "mixer_s32_224",
    "convnext_tiny",
    "inceptionnext_tiny",
    "caformer_s18",
    "mobilenet_v2",
    "mobilevit_small",
    "fastvit_t8",
    "efficientvit_m4",
)
PRECISIONS = ("float32", "bfloat16", "autocast")  # all in float32, all in bfloat16, float32 weights under autocast
RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 2


def gradients(model: nn.Module, x: Tensor, target: Tensor, precision: str) -> Callable[[], None]:
    """Forward, cross-entropy and backward; the gradients are dropped at the end, no optimizer runs."""
    model.train()

    def call() -> None:
        cast = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()
        with cast:
            loss = F.cross_entropy(model(x).float(), target)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return call


def cpu_times(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, round by round, every other round in reverse order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM_UP + rounds):
        for name in list(calls) if i % 2 == 0 else list(calls)[::-1]:
            start = time.process_time()
            calls[name]()
            if i >= WARM_UP:
                times[name].append(time.process_time() - start)
    return times


def measure(name: str, precision: str, args: argparse.Namespace) -> dict[str, object]:
    """One row: the peer's better layout in time, and its better one in memory, over ours."""
    torch.manual_seed(0)
    ours = vertebra.create_model(name, num_classes=1000, drop_path_rate=0.0).eval()
    unsettle(ours, torch.Generator().manual_seed(1))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    check = torch.randn(2, 3, args.size, args.size, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(dtype)
    target = torch.randint(1000, (args.batch,), generator=generator)
    calls, error = {}, 0.0
    for layout, memory_format in FORMATS.items():
        peer = peer_model(name)
        error = max(error, copy_weights(ours, peer, check))
        if layout == "cl" and corrupts_memory(peer, dtype, torch.device("cpu")):
            continue
        peer = peer.to(dtype).to(memory_format=memory_format)
        calls[layout] = gradients(peer, x.contiguous(memory_format=memory_format), target, precision)
    calls["ours"] = gradients(ours.to(dtype), x, target, precision)
    memory = {key: peak_bytes(call) for key, call in calls.items()}
    times = cpu_times(calls, args.rounds)
    median = {key: statistics.median(t) for key, t in times.items()}
    best = min((key for key in calls if key != "ours"), key=lambda key: median[key])
    least = min(value for key, value in memory.items() if key != "ours")
    return {
        "model": name,
        "precision": precision,
        "weights": "equal" if error <= TOLERANCE else "unequal",
        "time": statistics.median(b / a for a, b in zip(times["ours"], times[best], strict=True)),
        "memory": memory["ours"] / least,
        "peer_format": best,
        "seconds": median,
        "bytes": memory,
    }


def table(rows: list[dict], args: argparse.Namespace, date: str) -> str:
    """A line per model, a pair of columns per precision, geometric means last."""
    lines = [
        f"# The gradient step against timm and torchvision, {date}",
        "",
        "time: the peer's CPU seconds for forward and backward divided by ours (above 1: ours is faster), against the",
        "faster of contiguous and channels_last. memory: our peak divided by the peer's smaller one (below 1: ours is",
        "smaller); activations, gradients and temporary buffers, not the weights.",
        "bfloat16: weights and input in bfloat16; autocast: float32 weights under CPU autocast to bfloat16.",
        "",
        f"Batch {args.batch} of {args.size} x {args.size}, one thread, {args.rounds} rounds, "
        f"torch {torch.__version__}, timm {timm.__version__}.",
        "",
        "| model | " + " | ".join(f"{p} time | {p} memory" for p in args.precision) + " |",
        "|---|" + "---|" * (2 * len(args.precision)),
    ]
    found = {(row["model"], row["precision"]): row for row in rows}
    full = [m for m in args.models if all((m, p) in found for p in args.precision)]
    for name in full:
        mark = "" if all(found[name, p]["weights"] == "equal" for p in args.precision) else " (unequal weights)"
        cells = [f"{found[name, p][key]:.2f}" for p in args.precision for key in ("time", "memory")]
        lines.append(f"| {name}{mark} | " + " | ".join(cells) + " |")
    means = [
        statistics.geometric_mean([found[name, p][key] for name in full])
        for p in args.precision
        for key in ("time", "memory")
    ]
    lines.append("| geometric mean | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the reports")
    args = parser.parse_args()
    if wrong := [m for m in args.models if m not in vertebra.list_models()]:
        parser.error(f"unknown: {', '.join(wrong)}")

    torch.set_num_threads(1)
    set_fused_attn(True)
    rows = []
    for name in args.models:
        for precision in args.precision:
            row = measure(name, precision, args)
            rows.append(row)
            print(f"{name} {precision} time {row['time']:.3f} memory {row['memory']:.3f} {row['weights']}", flush=True)
            gc.collect()
        date = datetime.date.today().isoformat()  # written after every model: the whole run takes long
        args.out.mkdir(parents=True, exist_ok=True)
        done = argparse.Namespace(**vars(args) | {"models": args.models[: args.models.index(name) + 1]})
        (args.out / f"step_{date}.md").write_text(table(rows, done, date), encoding="utf-8")
        (args.out / f"step_{date}.json").write_text(json.dumps({"date": date, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
