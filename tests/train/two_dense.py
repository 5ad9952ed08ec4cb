"""What test_dense_strategies.py runs as two processes and as one: dense prediction on squares.

python two_dense.py FOLDER
"""

import contextlib
import json
import multiprocessing
import os
import socket
import sys
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist
from dense_samples import DETECTOR, SEGMENTER, dense_source, objects

from vertebra.train import Config, fit, fitting
from vertebra.train.dense import AveragePrecision

SIZES = {"train": 4, "val": 1, "test": 3}  # unequal shares to test, of one sample none for the second process
ONCE = {"epochs": 1, "augment": "none", "batch_size": 2}  # nothing is drawn: each process has its own generator
CELLS = SEGMENTER | ONCE | {"head": "unet", "head_options": {"channels": 4, "most": 8}, "lr": 1e-2}
BOXES = DETECTOR | ONCE | {"max_size": 64, "head_options": {"light": True, "score_thresh": 0.0, "detections": 20}}
MASKS = BOXES | {"head": "mask_rcnn", "head_options": {"light": True, "samples": 16, "proposals": 20, "detections": 10}}
CLASSES = ("red", "green")


@contextlib.contextmanager
def exact():
    """Squares, networks and samples in float64, and no reports: drawing them takes longer than the training."""
    opened, make, report = fitting.open_source, fitting.make_transforms, fitting.write_report

    def transforms(config):
        def doubled(transform):
            def call(sample, target):
                sample, target = transform(sample, target)
                return sample.double(), target

            call.joint = True
            return call

        return [doubled(transform) for transform in make(config)]

    fitting.open_source = lambda name, *args, **more: dense_source(name, sizes=SIZES)
    fitting.make_transforms, fitting.write_report = transforms, lambda *args, **options: None
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        fitting.open_source, fitting.make_transforms, fitting.write_report = opened, make, report
        torch.set_default_dtype(torch.float32)


def figures(shares):
    """What AveragePrecision says of boxes and masks near the true ones; process r of the world has images shares[r]."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = []
    for masks in (True, False):
        meter = AveragePrecision(CLASSES, masks)
        for i in shares[rank]:
            truth = objects(i, masks)
            truth["iscrowd"][1] = i == 2
            draw = torch.Generator().manual_seed(i)
            guess = {
                "boxes": truth["boxes"] + 4 * torch.rand(2, 4, generator=draw),
                "labels": truth["labels"] ^ (i == 1),
            }
            guess["scores"] = torch.rand(2, generator=draw)
            if masks:
                guess["masks"] = truth["masks"][:, None].float().roll(i, 3)
            meter.update(torch.tensor([i]), [truth], [guess])
        scores = meter.compute()
        found.append([scores.metrics, scores.classes, scores.rows.tolist()])
    return found


def every(out, more):
    """The runs, to FOLDER/<name>."""
    with exact():
        fit(Config(**CELLS | more | {"data": "segmentation", "sync_bn": "devices" in more}), out / "cells")
        fit(Config(**BOXES | more | {"data": "detection"}), out / "boxes")


def work(rank, port, out):
    """One process of two, as torchrun starts it."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "squares"}
    os.environ |= {key: str(value) for key, value in (here | there).items()}
    torch.set_num_threads(1)
    every(out, {"devices": 2})
    fitting.open_source = lambda *args, **more: dense_source("detection", True, SIZES)
    fitting.write_report = lambda *args, **more: None
    fit(Config(**MASKS, devices=2), out / "masks")
    said = [figures([[1, 3, 4], [2, 0]]), figures([[], [1, 2]])]
    (out / f"figures-{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked, since importing takes longer than all the rest; nothing has run in this process yet
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=work, args=(rank, port, Path(sys.argv[1])), daemon=True) for rank in (0, 1)]
    for process in both:
        process.start()
    running = list(both)
    while running and all(process.exitcode in (None, 0) for process in both):
        wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
    # who fails takes the other, who would wait for it, along: daemons end with this process
    sys.exit(any(process.exitcode != 0 for process in both))
