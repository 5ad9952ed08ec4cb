"""What test_strategies.py runs as two processes under torchrun, and as one: in float64, so that equal means equal.

    torchrun --nproc-per-node 2 two_processes.py FOLDER

Every run goes to FOLDER/<name>; what each process saw of a loss that is not finite to FOLDER/<name>-<rank>.json.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from vertebra import cli
from vertebra.data import DataError
from vertebra.data.source import Split
from vertebra.tasks import CrossEntropyLoss
from vertebra.train import Config, TrainError, fit, fitting
from vertebra.train.watch import Watch

LAYERS = {  # layer norms only
    "model": "crossformer_tiny",
    "overrides": {"dim": 16, "depths": [1, 1, 1, 1], "heads": [1, 1, 2, 2]},
    "data": "digits",
    "limit": 81,  # 41 and 40 to test: unequal numbers of batches too
    "epochs": 2,
    "batch_size": 20,
    "threads": 1,
    "accelerator": "cpu",
}
BATCHES = LAYERS | {
    "model": "resnet18",
    "overrides": {"layers": [1, 1, 1, 1]},
    "limit": 20,
    "epochs": 1,
}
FEW = {"limit": 21, "batch_size": 64}  # one batch, of 11 and 10
BAD = LAYERS | {"limit": 12, "batch_size": 2, "epochs": 1, "augment": "none"}  # a bad sample leaves a process nothing
ONCE = {"epochs": 1}
EMA = {"ema": 0.9, "accumulate": 2}


@contextlib.contextmanager
def double():
    """Everything in float64, and no reports: drawing them takes longer than the training."""
    make, report = fitting.make_transforms, fitting.write_report

    def transforms(config):
        return [lambda x, f=f: f(x).double() for f in make(config)]

    fitting.make_transforms, fitting.write_report = transforms, lambda *args, **options: None
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        fitting.make_transforms, fitting.write_report = make, report
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def unreadable(position):
    """The sample at this position of every split cannot be read."""
    read = Split.read

    def fail(self, i):
        if i == position:
            raise DataError(f"{i}.png: truncated")
        return read(self, i)

    Split.read = fail
    try:
        yield
    finally:
        Split.read = read


@contextlib.contextmanager
def stopped_after(epochs):
    """Every process is interrupted when an epoch more is to begin."""
    train = fitting.train_epoch

    def stop(t, loader, epoch, classes):
        if epoch == epochs:
            raise KeyboardInterrupt
        return train(t, loader, epoch, classes)

    fitting.train_epoch = stop
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        fitting.train_epoch = train


class Sums(Watch):
    """After each step, what of the network could have moved, and what was said."""

    def __init__(self, trainer):
        self.trainer, self.seen, self.notes = trainer, [], []

    def step(self, loss):
        states = [self.trainer.net.state_dict(), self.trainer.tested.state_dict()]
        tensors = [t.to_local() if hasattr(t, "to_local") else t for state in states for t in state.values()]
        self.seen.append(sum(float(t.double().abs().sum()) for t in tensors))

    def note(self, text):
        self.notes.append(text)


def not_finite(values, out, step, rank, here):
    """A run whose loss is NaN at `step` on process `rank` alone; what this process, `here`, sees."""
    forward, train, watches, calls = CrossEntropyLoss.forward, fitting.train_epoch, [], [0]

    def loss(self, outputs, target):
        value = forward(self, outputs, target)
        if not watches:  # not training yet
            return value
        calls[0] += 1
        return value * float("nan") if calls[0] - 1 == step * values.get("accumulate", 1) and here == rank else value

    def watched(t, loader, epoch, classes):
        watches.append(Sums(t))
        t.watch = watches[-1]
        return train(t, loader, epoch, classes)

    CrossEntropyLoss.forward, fitting.train_epoch = loss, watched
    error = None
    try:
        fit(Config(**values), out)
    except TrainError as e:
        error = str(e)
    finally:
        CrossEntropyLoss.forward, fitting.train_epoch = forward, train
    seen, notes = watches[-1].seen, [note for watch in watches for note in watch.notes if "step" in note]
    return {"seen": seen, "notes": notes, "error": error}


def main(out):
    two = {"devices": 2}
    with double():
        fit(Config(**LAYERS | ONCE, **two), out / "ddp")
        rank = dist.get_rank()
        fit(Config(**LAYERS | ONCE, **two, strategy="fsdp"), out / "fsdp")
        fit(Config(**LAYERS | ONCE | {"accumulate": 3}, **two), out / "accumulate")
        fit(Config(**LAYERS | FEW | EMA, **two), out / "few-ddp")
        fit(Config(**LAYERS | FEW | EMA, **two, strategy="fsdp"), out / "few-fsdp")
        fit(Config(**BATCHES, **two, sync_bn=True), out / "norms")
        with unreadable(5):
            fit(Config(**BAD, **two), out / "bad-ddp")
            fit(Config(**BAD, **two, strategy="fsdp"), out / "bad-fsdp")
        with stopped_after(1):
            fit(Config(**LAYERS | EMA, **two, strategy="fsdp"), out / "to-one")
        skip = LAYERS | EMA | two | {"nonfinite": "skip", "epochs": 1}
        for strategy in ("ddp", "fsdp"):
            found = not_finite(skip | {"strategy": strategy}, out / f"skip-{strategy}", 2, 1, rank)
            (out / f"skip-{strategy}-{rank}.json").write_text(json.dumps(found))
        found = not_finite(LAYERS | two, out / "stop", 5, 1, rank)
        (out / f"stop-{rank}.json").write_text(json.dumps(found))
        sys.argv = ["vertebra", "train", "--resume", str(out / "from-one"), "--devices", "2", "--strategy", "fsdp"]
        cli.main()  # ends the process as the command does


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
