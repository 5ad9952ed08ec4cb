"""Two gloo processes, started by torchrun, against one: the same losses, weights, figures and files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import BAD, BATCHES, EMA, FEW, LAYERS, ONCE, double, not_finite, stopped_after, unreadable

from vertebra.data.loader import TrainOrder
from vertebra.train import Config, ConfigError, Run, fit, resume

# what rounding in float64 may grow to: Adam divides a gradient by its own size
CLOSE = 1e-9  # of figures and moments
WEIGHTS = 1e-11  # measured: at most 9e-13


def torchrun(script, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(part) for part in (Path(__file__).with_name(script), *args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs: those of two processes under their names, those of one under one-<name>."""
    out = tmp_path_factory.mktemp("runs")
    with double():
        for name, values in {"plain": ONCE, "few": FEW | EMA, "ema": EMA}.items():
            fit(Config(**LAYERS | values), out / f"one-{name}")
        fit(Config(**BATCHES), out / "one-norms")
        with unreadable(5):
            fit(Config(**BAD), out / "one-bad")
        with stopped_after(1):
            fit(Config(**LAYERS | EMA), out / "from-one")
    done = torchrun("two_processes.py", out)
    assert done.returncode == 0, done.stderr[-5000:]
    with double():
        resume(out / "to-one", devices=1, strategy="auto")
    return out


def far(a, b):
    """The largest difference between two safetensors files with the same names and shapes."""
    a, b = load_file(a), load_file(b)
    assert a.keys() == b.keys() and all(a[key].shape == b[key].shape for key in a)
    assert all(a[key].dtype == b[key].dtype for key in a)
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("plain", "ddp"),
        ("plain", "fsdp"),
        ("plain", "accumulate"),  # 4, 3 and 3 of 10 samples a process, against 20 at once
        ("few", "few-ddp"),  # 11 and 10 samples, in two parts, with averaged weights
        ("few", "few-fsdp"),
        ("norms", "norms"),  # batch norm over all processes' samples
        ("bad", "bad-ddp"),  # a process whose only sample of a step cannot be read
        ("bad", "bad-fsdp"),
        ("ema", "from-one"),  # begun by one process, ended by two that share the weights
        ("ema", "to-one"),  # and the other way round
    ],
)
def test_two_processes_equal_one(runs, one, two):
    a, b = runs / f"one-{one}", runs / two
    for name in ("last.safetensors", "best.safetensors"):
        assert far(a / name, b / name) < WEIGHTS
    first, second = rows(a), rows(b)
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        assert x.keys() == y.keys()
        assert all(x[key] == pytest.approx(y[key], abs=CLOSE) for key in x if key != "seconds")
        assert x["val_accuracy"] == y["val_accuracy"]
        assert x["train_accuracy"] == pytest.approx(y["train_accuracy"], abs=1e-12)
    x, y = (json.loads((folder / "result.json").read_text()) for folder in (a, b))
    assert x["test_samples"] == y["test_samples"] == {"norms": 20, "few": 21, "bad": 11}.get(one, 81)
    assert x["test_accuracy"] == y["test_accuracy"]  # counts, so to the last bit
    counts = [{n: (c["samples"], c["accuracy"]) for n, c in result["classes"].items()} for result in (x, y)]
    assert counts[0] == counts[1]


def test_the_state_of_a_shared_run_is_whole(runs):
    states = [Run.open(runs / name).read_state() for name in ("one-few", "few-ddp", "few-fsdp")]
    for other in states[1:]:
        for part in ("model", "ema"):
            assert all(type(value) is torch.Tensor for value in other[part].values())
            assert {k: v.shape for k, v in other[part].items()} == {k: v.shape for k, v in states[0][part].items()}
        moments, expected = other["optimizer"]["state"], states[0]["optimizer"]["state"]
        assert moments.keys() == expected.keys()
        for number, one in expected.items():
            for key, value in one.items():
                assert type(moments[number][key]) is torch.Tensor
                torch.testing.assert_close(moments[number][key], value, rtol=0, atol=CLOSE)


def test_files_are_written_once(runs):
    assert not list(runs.glob("*/.*"))
    assert {path.name for path in (runs / "fsdp").iterdir()} == {path.name for path in (runs / "one-plain").iterdir()}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_nan_on_one_process_is_left_out_by_all(runs, strategy):
    both = [json.loads((runs / f"skip-{strategy}-{rank}.json").read_text()) for rank in (0, 1)]
    for found in both:
        assert found["error"] is None and len(found["seen"]) == 4
        assert found["seen"][2] == found["seen"][1]  # weights, averages, statistics
        assert len(set(found["seen"])) == 3  # the others moved
        (note,) = found["notes"]
        assert "step 2 left out: the loss is nan (learning rate " in note
    if strategy == "ddp":
        assert both[0]["seen"] == both[1]["seen"]
    (row,) = rows(runs / f"skip-{strategy}")
    assert row["left_out"] == 1


def test_a_loss_that_is_nan_on_one_process_stops_all_and_names_the_checkpoint(runs):
    both = [json.loads((runs / f"stop-{rank}.json").read_text()) for rank in (0, 1)]
    assert both[0]["error"] == both[1]["error"]
    assert "the loss is nan at step 5 (epoch 2, learning rate " in both[0]["error"]
    assert f"last good checkpoint: {runs / 'stop' / 'last.pt'};" in both[0]["error"]
    assert Run.open(runs / "stop").read_state()["step"] == 4


@pytest.mark.parametrize("model", ["layers", "norms"])
def test_one_process_leaves_a_step_out(tmp_path, model):
    """Batch norms too: their statistics have seen what gave NaN before the loss tells."""
    values = (LAYERS if model == "layers" else BATCHES | {"limit": 40}) | EMA | {"nonfinite": "skip", "epochs": 1}
    with double():
        found = not_finite(values, tmp_path, 1, 0, 0)
    assert found["seen"][1] == found["seen"][0] and "step 1 left out: the loss is nan" in found["notes"][0]
    assert len(set(found["seen"])) == len(found["seen"]) - 1


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    found = not_finite(LAYERS, tmp_path, 0, 0, 0)
    assert "the loss is nan at step 0 (epoch 1, learning rate " in found["error"]
    assert "last good checkpoint: none yet;" in found["error"]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [60, 67, 11])
def test_each_sample_at_most_once_an_epoch_over_all_processes(world, n):
    orders = [TrainOrder(n, 12, 0, rank, world) for rank in range(world)]
    seen = [i for order in orders for batch in order for _, i in batch]
    assert len(seen) == len(set(seen)) == (n // 12 * 12 or n)  # 60 and 11: every one
    whole = list(TrainOrder(n, 12, 0))
    for b, batches in enumerate(zip(*orders, strict=True)):
        assert sorted(i for batch in batches for i in batch) == sorted(whole[b])
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_what_cannot_be_shared_is_named(tmp_path, monkeypatch):
    few = Config(**LAYERS)
    with pytest.raises(ConfigError, match="batch_size 20 is not a multiple of 3 devices on 2 nodes"):
        from vertebra.data import open_source
        from vertebra.train.build import resolve

        resolve(few.model_copy(update={"devices": 3, "nodes": 2}), open_source("digits", 81))
    with pytest.raises(ConfigError, match="16-mixed scales its loss per process, strategy fsdp needs"):
        fit(few.model_copy(update={"strategy": "fsdp", "precision": "16-mixed"}), tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="torchrun started 4 processes, but 1 devices on 1 nodes were asked for"):
        fit(few, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_ends_well_while_gloo_still_drops_tensors():
    done = torchrun("abandoned_work.py")  # with sys.exit it ended with SIGABRT, 6 times of 6
    assert done.returncode == 0, done.stderr[-5000:]
    assert "fashion" in done.stdout.lower()
