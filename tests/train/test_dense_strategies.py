"""Two gloo processes against one in dense prediction: the same losses, weights and figures, each sample once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from two_dense import SIZES, every, figures

CLOSE = 1e-9  # what rounding in float64 may grow to


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the runs of one process, and of two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = [sys.executable, Path(__file__).with_name("two_dense.py"), two]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    every(one, {})
    return one, two


@pytest.mark.parametrize("name", ["cells", "boxes"])
def test_two_processes_equal_one(runs, name):
    one, two = (folder / name for folder in runs)
    first, second = load_file(one / "last.safetensors"), load_file(two / "last.safetensors")
    assert first.keys() == second.keys()
    assert max(float((first[key].double() - second[key].double()).abs().max()) for key in first) < CLOSE
    x, y = (json.loads((folder / "metrics.jsonl").read_text()) for folder in (one, two))
    assert x.keys() == y.keys()
    # a detector's heads answer in float32 whatever the network has
    assert x["train_loss"] == pytest.approx(y["train_loss"], abs=CLOSE if name == "cells" else 1e-6)
    x, y = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    assert x["test_samples"] == y["test_samples"] == SIZES["test"]
    figures = [key for key in x if key.startswith("test_") and key != "test_loss"]
    assert len(figures) > 3 and {key: x[key] for key in figures} == {key: y[key] for key in figures}
    assert x["classes"] == y["classes"]
    counted = [sum(c.get("objects", c.get("pixels", 0)) for c in result["classes"].values()) for result in (x, y)]
    assert counted == [SIZES["test"] * (64 * 64 if name == "cells" else 2)] * 2


def test_average_precision_is_the_same_whoever_has_the_images(runs):
    """Crowds, wrong classes and a process without any image among them; the same to the last bit."""
    expected = json.dumps([figures([range(5)]), figures([range(1, 3)])])
    assert 0.1 < json.loads(expected)[0][0][0]["map"] < 0.9 and "mask_map" in expected
    for rank in (0, 1):
        assert (runs[1] / f"figures-{rank}.json").read_text() == expected


def test_a_detector_whose_parameters_are_not_all_used_trains_in_two_processes(runs):
    (row,) = [json.loads(line) for line in (runs[1] / "masks" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < row["train_loss"] < 10
    result = json.loads((runs[1] / "masks" / "result.json").read_text())
    assert result["test_samples"] == SIZES["test"] and "test_mask_map" in result
