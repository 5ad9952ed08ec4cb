"""Speed against timm and torchvision: equal weights, equal input, one process, paired ratios. See README.md here."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from timm.layers import set_fused_attn
from timm.utils.model import reparameterize_model
from torch import nn

import vertebra
from vertebra.inspect.bench import FORMATS, Settings, inference, machine_facts, paired, seconds, training
from vertebra.inspect.peers import PEERS, TOLERANCE, copy_weights, corrupts_memory, peer_model, unsettle

__all__ = ["FORMATS", "PEERS", "copy_weights", "paired", "peer_model", "seconds", "training"]  # other scripts use them

MODELS = (
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "pvt_v2_b0",
    "pvt_v2_b2",
    "resnet18",
    "resnet50",
    "repvgg_a0",
    "twins_pcpvt_small",
    "twins_svt_small",
    "gc_vit_xxtiny",
    "maxvit_tiny_tf_224",
    "torchvision_maxvit_t",
    "mixer_s32_224",
    "crossvit_tiny_224",
    "crossvit_9_dagger_224",
    "convnext_tiny",
    "inceptionnext_tiny",
    "poolformerv2_s12",
    "convformer_s18",
    "caformer_s18",
    "mobilenet_v2",
    "shufflenet_v2_x1_0",
    "mobilevit_small",
    "mobilevitv2_100",
    "fastvit_t8",
    "fastvit_sa12",
    "efficientvit_m4",
)
RESULTS = Path(__file__).resolve().parent / "results"


def contest(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, object]:
    """Paired ratio of timm's better layout to ours, and each side's median seconds."""
    times = paired(calls, repeats, device)
    median = {name: statistics.median(t) for name, t in times.items()}
    best = min((f for f in FORMATS if f in calls), key=lambda f: median[f])
    ratios = [b / a for a, b in zip(times["ours"], times[best])]
    return {"ratio": statistics.median(ratios), "peer_format": best, "seconds": median}


def measure(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    def build(dtype: torch.dtype) -> tuple[nn.Module, dict[str, nn.Module], float]:
        torch.manual_seed(0)
        ours = vertebra.create_model(name, num_classes=1000, drop_path_rate=0.0).eval()
        unsettle(ours, torch.Generator().manual_seed(1))
        peers, error = {}, 0.0
        check = torch.randn(2, 3, args.size, args.size, generator=torch.Generator().manual_seed(2))
        for layout, memory_format in FORMATS.items():
            peer = peer_model(name)
            error = max(error, copy_weights(ours, peer, check))
            if args.fuse:
                peer = reparameterize_model(peer)
            peers[layout] = peer.to(device, dtype).to(memory_format=memory_format)
        if args.fuse:
            ours = vertebra.fuse(ours)
        return ours.to(device, dtype), peers, error

    row: dict[str, object] = {"model": name}
    for dtype_name in args.dtype:
        dtype = getattr(torch, dtype_name)
        ours, peers, error = build(dtype)
        row["error"], row["weights"] = error, "equal" if error <= TOLERANCE else "unequal weights"
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(args.batch, 3, args.size, args.size, generator=generator).to(device, dtype)
        target = torch.randint(1000, (args.batch,), generator=generator).to(device)
        inputs = {f: x.contiguous(memory_format=m) for f, m in FORMATS.items()}
        calls = {"ours": inference(ours, x)} | {f: inference(peers[f], inputs[f]) for f in FORMATS}
        row[f"forward {dtype_name}"] = contest(calls, args.repeats, device)
        if args.train and not args.fuse:
            formats = ["nchw"] if corrupts_memory(peers["cl"], dtype, device) else list(FORMATS)
            calls = {"ours": training(ours, x, target)} | {f: training(peers[f], inputs[f], target) for f in formats}
            row[f"train {dtype_name}"] = contest(calls, args.repeats, device)
        del ours, peers, calls
        gc.collect()
    return row


# --- report -----------------------------------------------------------------------------------------------------------


def machine(args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """What a reader needs to judge the ratios; nothing that names the computer."""
    return machine_facts(Settings(against="timm", device=device.type)) | {
        "batch": args.batch,
        "size": args.size,
        "repeats": args.repeats,
        "fused": args.fuse,
    }


def table(rows: list[dict[str, object]], facts: dict[str, object], date: str) -> str:
    columns = [k for k in rows[0] if isinstance(rows[0][k], dict)]
    lines = [
        f"# Speed against timm, {date}",
        "",
        "timm's time divided by ours (above 1: ours is faster), then timm's better layout.",
        "",
        ", ".join(f"{k} {v}" for k, v in facts.items()) + ".",
        "",
        "| model | weights | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = [f"{row[c]['ratio']:.2f} ({row[c]['peer_format']})" for c in columns]  # type: ignore[index]
        lines.append(f"| {row['model']} | {row['weights']} | " + " | ".join(cells) + " |")
    means = [statistics.geometric_mean([row[c]["ratio"] for row in rows]) for c in columns]  # type: ignore[index]
    lines.append("| geometric mean | | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--train", action="store_true", help="measure the training step too")
    parser.add_argument("--fuse", action="store_true", help="re-parameterise both sides; inference only")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the reports")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    set_fused_attn(True)
    device = torch.device(args.device)
    if wrong := [m for m in args.models if m not in vertebra.list_models()]:
        parser.error(f"unknown: {', '.join(wrong)}")

    rows = []
    for name in args.models:
        rows.append(measure(name, args, device))
        shown = {k: round(v["ratio"], 3) for k, v in rows[-1].items() if isinstance(v, dict)}
        print(name, rows[-1]["weights"], f"error {rows[-1]['error']:.1e}", shown, flush=True)

    date = datetime.date.today().isoformat()
    facts = machine(args, device)
    text = table(rows, facts, date)
    print("\n" + text)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"speed_{date}" + ("_fused" if args.fuse else "") + ("_cuda" if device.type == "cuda" else "")
    (args.out / f"{stem}.md").write_text(text, encoding="utf-8")
    (args.out / f"{stem}.json").write_text(json.dumps({"date": date, "machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
