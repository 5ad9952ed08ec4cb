"""From nothing to the first output: import, create, first forward in fresh processes, beside `import torch` alone.

python benchmarks/startup.py --model crossformer_tiny --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

STEPS = """
import time
t0 = time.perf_counter()
import torch
t1 = time.perf_counter()
import vertebra
t2 = time.perf_counter()
model = vertebra.create_model({model!r}).eval()
t3 = time.perf_counter()
with torch.inference_mode():
    model(torch.zeros(1, model.in_chans, *({size},) * model.ndim))
t4 = time.perf_counter()
print([t1 - t0, t2 - t1, t3 - t2, t4 - t3])
"""


def whole(code: str) -> tuple[float, float, str]:
    """Seconds of a fresh process from start to end, seconds of processor it used, and what it printed."""
    began, used = time.perf_counter(), processor()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return time.perf_counter() - began, processor() - used, done.stdout


def processor() -> float:
    """Seconds of processor of all processes that were started here and have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="crossformer_tiny")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    code = STEPS.format(model=args.model, size=args.size)
    times: dict[str, list[tuple[float, float]]] = {code: [], "import torch": []}
    steps = []
    for i in range(-1, args.rounds):  # the first round fills the disk cache
        for what in list(times) if i % 2 == 0 else list(times)[::-1]:
            wall, used, printed = whole(what)
            if i >= 0:
                times[what].append((wall, used))
                if what is code:
                    steps.append(json.loads(printed))
    print(
        f"{args.model}, median of {args.rounds} pairs of fresh processes, one beside the other's `import torch` alone:"
    )
    for i, kind in enumerate(("seconds", "seconds of processor (what a busy machine changes little)")):
        ours, alone = ([t[i] for t in times[what]] for what in (code, "import torch"))
        beyond = statistics.median(a - b for a, b in zip(ours, alone, strict=True))
        both = f"{statistics.median(ours):.2f} and {statistics.median(alone):.2f}"
        print(f"{both} {kind}: {beyond:.2f} beyond torch")
    for name, column in zip(("import torch", "import vertebra", "create", "first forward"), zip(*steps, strict=True)):
        print(f"  {name:16s} {statistics.median(column):.2f} s")


if __name__ == "__main__":
    main()
