import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from vertebra.data import DataError, open_source
from vertebra.data.idx import read_idx

FASHION = Path(os.environ.get("VERTEBRA_SHARED") or Path(__file__).parents[3] / "shared") / "data" / "fashion-mnist"


def idx_bytes(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_set(root, part="train", n=40, classes=4, size=12):
    rng = np.random.default_rng(len(part))
    images = rng.integers(0, 256, (n, size, size), dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) % classes
    (root / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return images, labels


@pytest.mark.parametrize("name", ["a.gz", "a"])
def test_round_trip(tmp_path, name):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    content = idx_bytes(array)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert np.array_equal(read_idx(tmp_path / name, 3), array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


HEAD = b"\0\0\x08\x03"
BROKEN = {  # what is in the gz file (or, as is, what is in place of it), and what the message says
    "floats": (b"\0\0\x0d\x03" + GOOD[4:], "not an idx3 file of bytes"),
    "labels for images": (idx_bytes(np.zeros(20, np.uint8)), "not an idx3 file of bytes"),
    "one byte short": (GOOD[:-1], "holds 23"),
    "one byte more": (GOOD + b"x", "holds more"),
    "half a header": (GOOD[:9], "ends inside its header"),
    "empty": (b"", "ends inside its header"),
    "2^96 bytes": (HEAD + b"\xff" * 12, "over 2147483648 bytes"),
    "no images": (HEAD + struct.pack(">3I", 0, 28, 28), "is empty"),
    "2 GB declared, 3 bytes there": (HEAD + struct.pack(">3I", 2000, 1000, 1000) + b"abc", "holds 3"),
    "gz cut off": (gzip.compress(GOOD)[:-12], "cannot be read"),
    "gz checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "cannot be read"),
    "no gz": (b"not a gz file at all", "cannot be read"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_corruption_is_one_line_with_the_path(tmp_path, case):
    content, message = BROKEN[case]
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content if "gz" in case else gzip.compress(content))
    with pytest.raises(DataError, match=message) as error:
        read_idx(path, 3)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_damage_anywhere_is_an_error_or_other_pixels(tmp_path):
    """One flipped byte at every place of the file: never anything but DataError or an array of bytes."""
    content = gzip.compress(GOOD, mtime=0)
    path = tmp_path / "x.gz"
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            assert read_idx(path, 3).dtype == np.uint8
        except DataError as e:
            assert str(path) in str(e)


def test_splits(tmp_path):
    images, labels = write_set(tmp_path)
    test_images, _ = write_set(tmp_path, "t10k", 8)
    source = open_source(str(tmp_path))
    assert source.classes == ("0", "1", "2", "3") and source.channels == 1
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 36, "val": 4, "test": 8}
    assert np.bincount(source.splits["val"].labels).tolist() == [1, 1, 1, 1]
    assert np.array_equal(source.splits["test"].read(3)[0].numpy(), test_images[3])
    i = int(source.splits["val"].names[0].split("/")[1])
    assert np.array_equal(source.splits["val"].read(0)[0].numpy(), images[i])
    assert source.splits["val"].labels[0] == labels[i]


def test_labels_and_images_must_match(tmp_path):
    write_set(tmp_path)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(39, np.uint8))))
    with pytest.raises(DataError, match="39 labels for 40 images"):
        open_source(str(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match="must both be there"):
        open_source(str(tmp_path))


def test_a_test_label_unknown_in_training(tmp_path):
    write_set(tmp_path)
    write_set(tmp_path, "t10k", 10, classes=5)
    with pytest.raises(DataError, match="label 4 of the test files"):
        open_source(str(tmp_path))


@pytest.mark.skipif(not FASHION.is_dir(), reason="the Fashion-MNIST files are not here")
def test_fashion_mnist():
    source = open_source(str(FASHION), limit=1000)
    assert {key: len(split) for key, split in source.splits.items()} == {"train": 1000, "val": 1000, "test": 1000}
    for split in source.splits.values():
        assert np.bincount(split.labels).tolist() == [100] * 10
    assert source.splits["train"].read(0).shape == (1, 28, 28)
