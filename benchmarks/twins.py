"""Training beside timm: the same start, samples, recipe and seeds; accuracy of both, ratio of steps. See README.md."""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from pathlib import Path

import speed
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import vertebra
from vertebra.data import open_source
from vertebra.data.loader import Batch, Samples, TrainOrder, train_loader
from vertebra.train.build import make_transforms, resolve
from vertebra.train.config import Config
from vertebra.train.schedules import make_schedule

RESULTS = Path(__file__).resolve().parent / "results"
SIDE = 32  # small variants for small images: ours, then timm's under its names for the same options
TWINS: dict[str, tuple[str, dict, str, dict]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"dim": 48, "depths": [2, 2, 2, 2], "heads": [2, 4, 8, 16], "window": 4, "img_size": SIDE},
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16), "window_size": 4, "img_size": SIDE},
    ),
    "pvt_v2": ("pvt_v2_b0", {}, "pvt_v2_b0", {}),
    "convnext": (
        "convnext_tiny",
        {"dims": [40, 80, 160, 320], "depths": [2, 2, 4, 2]},
        "convnext_tiny",
        {"dims": (40, 80, 160, 320), "depths": (2, 2, 4, 2)},
    ),
    "vit": (
        "vit_tiny_patch16_224",
        {"patch": 8, "depth": 6, "img_size": SIDE},
        "vit_tiny_patch16_224",
        {"patch_size": 8, "depth": 6, "img_size": SIDE},
    ),
}


class Side:
    """One of the two: a model with its optimizer and schedule, and the seconds of its steps."""

    def __init__(self, model: nn.Module, config: Config, steps: int, channels_last: bool) -> None:
        self.model = model.train()
        self.optimizer = create_optimizer_v2(model, "adamw", lr=config.lr or 1e-3, weight_decay=config.weight_decay)
        self.schedule = make_schedule(config, self.optimizer, steps)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.seconds: list[float] = []

    def step(self, x: Tensor, y: Tensor) -> None:
        self.schedule.step_update(len(self.seconds))
        x = x.contiguous(memory_format=self.layout)
        began = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began)

    @torch.inference_mode()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        self.model.eval()
        hits = sum(int((self.model(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), y.split(250)))
        return hits / len(y)


def build(name: str, seed: int) -> tuple[nn.Module, nn.Module, float]:
    ours, options, theirs, their_options = TWINS[name]
    torch.manual_seed(seed)
    model = vertebra.create_model(ours, in_chans=1, num_classes=10, drop_path_rate=0.0, **options).eval()
    peer = timm.create_model(theirs, in_chans=1, num_classes=10, drop_path_rate=0.0, **their_options).eval()
    check = torch.randn(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    return model, peer, speed.copy_weights(model, peer, check)


def faster_layout(peer: nn.Module) -> bool:
    """Whether the peer trains faster with channels last."""
    x, y = torch.randn(64, 1, SIDE, SIDE), torch.randint(10, (64,))
    inputs = {f: x.contiguous(memory_format=m) for f, m in speed.FORMATS.items()}
    times = {}
    for layout, memory_format in speed.FORMATS.items():
        peer.to(memory_format=memory_format)
        state = {k: v.clone() for k, v in peer.state_dict().items()}
        call = speed.training(peer, inputs[layout], y)
        times[layout] = statistics.median(speed.seconds(call, torch.device("cpu")) for _ in range(7))
        peer.load_state_dict(state)
    return times["cl"] < times["nchw"]


def contest(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    source = open_source(str(args.data), None)
    config = Config(model="pvt_v2_b0", data=str(args.data), img_size=SIDE, seed=seed, epochs=args.epochs)
    config = resolve(config.model_copy(update={"batch_size": 64, "lr": 1e-3, "augment": "light"}), source)
    training, testing = make_transforms(config)
    order = TrainOrder(args.images, 64, seed, 0, 1, None, 1)
    loader = train_loader(Samples(source.splits["train"], training, seed), order, 0)
    model, peer, error = build(name, seed)
    last = faster_layout(peer)
    peer.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    steps = args.epochs * len(order)
    sides = [Side(model, config, steps, False), Side(peer, config, steps, last)]
    step = 0
    for epoch in range(args.epochs):
        order.epoch = epoch
        for batch in loader:
            assert isinstance(batch, Batch)
            for side in sides if step % 2 == 0 else sides[::-1]:
                side.step(batch.images, batch.targets)
            step += 1
    tests = Samples(source.splits["test"], testing)
    pairs = [tests[0, i] for i in range(len(tests.split))]
    x, y = torch.stack([p[0] for p in pairs]), torch.tensor([int(p[1]) for p in pairs])
    ratio = statistics.median(b / a for a, b in zip(sides[0].seconds[10:], sides[1].seconds[10:]))
    rate = 1 / statistics.median(sides[0].seconds)
    return {
        "ours": sides[0].accuracy(x, y),
        "timm": sides[1].accuracy(x, y),
        "ratio": ratio,
        "rate": rate,
        "error": error,
        "params": sum(p.numel() for p in model.parameters()) / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder of IDX files, such as Fashion-MNIST")
    parser.add_argument("--models", nargs="+", default=list(TWINS), choices=list(TWINS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_fused_attn(True)
    date = datetime.date.today().isoformat()
    lines = [f"# Training beside timm, {date}", ""]
    about = f"""\
{args.images} images of Fashion-MNIST at {SIDE} pixels, {args.epochs} epochs, batches of 64, adamw 1e-3, cosine, light
augmentation, label smoothing 0.1, no drop path. The two take turns step by step from the same weights, timm in its
faster layout and with fused attention. Test accuracy on 10,000 images: mean (largest minus smallest) over the seeds.
Ratio of step times, above 1: ours is faster. One thread, {os.cpu_count()} cores. {args.note}
"""
    lines += about.splitlines() + [""]
    lines += ["| | Parameters (M) | Ours | timm | Each seed, ours - timm | Steps/s, ours | Ratio of each seed |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name in args.models:
        rows = [contest(name, seed, args) for seed in range(args.seeds)]
        ours, theirs = [r["ours"] for r in rows], [r["timm"] for r in rows]
        cells = [name, f"{rows[0]['params']:.2f}"]
        cells += [f"{statistics.mean(a):.4f} ({max(a) - min(a):.4f})" for a in (ours, theirs)]
        cells += [", ".join(f"{a - b:+.4f}" for a, b in zip(ours, theirs))]
        cells += [f"{statistics.median(r['rate'] for r in rows):.1f}", ", ".join(f"{r['ratio']:.2f}" for r in rows)]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], f"start differs by {max(r['error'] for r in rows):.1e}", flush=True)
    (RESULTS / f"twins_{date}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
