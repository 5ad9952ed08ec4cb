import os

import pytest
import torch

from vertebra.train.files import write_atomic


def test_write_and_replace(tmp_path):
    path = tmp_path / "x.bin"
    write_atomic(path, b"one")
    write_atomic(path, lambda f: f.write(b"two"))
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_writer_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x.bin"
    write_atomic(path, b"good")

    def write(f):
        f.write(b"half of")
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, write)
    assert path.read_bytes() == b"good" and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_the_last_moment(tmp_path, monkeypatch, call):
    path = tmp_path / "x.pt"
    write_atomic(path, lambda f: torch.save({"a": 1}, f))

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, lambda f: torch.save({"a": 2}, f))
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == ["x.pt"]
