"""Array files, class folders and records: the samples, labels and splits they become, and what hostile ones say."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vertebra.data import DataError, open_source
from vertebra.data.arrayfiles import LIMIT
from vertebra.data.arrays import ratios
from vertebra.data.loader import Samples, eval_loader

RNG = np.random.default_rng(0)
SHARED = Path(os.environ.get("VERTEBRA_SHARED", Path(__file__).parents[3] / "shared"))


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def beats(n=60, shape=(40,), classes=3):
    return RNG.integers(-500, 500, (n, *shape)).astype(np.int16), np.arange(n) % classes


def counts(source):
    return {key: len(split) for key, split in source.splits.items()}


def test_samples_stay_int16_and_are_scaled_one_at_a_time(tmp_path):
    x, y = beats()
    source = open_source(npz(tmp_path / "a.npz", x=x, y=y, classes=np.array(["N", "S", "V"])), scale=0.005)
    assert (source.kind, source.ndim, source.channels, source.size) == ("signals", 1, 1, (40,))
    assert source.task == "single" and source.classes == ("N", "S", "V")
    assert counts(source) == {"train": 42, "val": 6, "test": 12}
    split = source.splits["val"]
    assert split.load.arrays[0].dtype == np.int16
    for i in range(6):
        k = int(split.index[i])
        assert torch.equal(split.read(i), torch.from_numpy(x[k]).float()[None] * 0.005) and split.target(i) == k % 3
    assert sorted(np.concatenate([s.index for s in source.splits.values()]).tolist()) == list(range(60))
    again = open_source(str(tmp_path / "a.npz"), scale=0.005)
    assert again.fingerprint() == source.fingerprint()


@pytest.mark.parametrize(
    ("shape", "layout", "size", "channels"),
    [
        ((30, 4), "last", (30,), 4),
        ((4, 30), "first", (30,), 4),
        ((5, 6), "none", (5, 6), 1),
        ((2, 5, 6, 7), "first", (5, 6, 7), 2),
        ((5, 6, 7, 2), "last", (5, 6, 7), 2),
        ((5, 6, 7), "none", (5, 6, 7), 1),
        ((9,), "last", (9,), 1),
    ],
)
def test_axes_come_from_the_shape_and_the_layout(tmp_path, shape, layout, size, channels):
    x, y = beats(30, shape)
    source = open_source(npz(tmp_path / "a.npz", x=x, y=y), layout=layout)
    assert (source.ndim, source.size, source.channels) == (len(size), size, channels)
    split = source.splits["train"]
    want = x[split.index[3]].astype(np.float32)
    if len(shape) == 1 or layout == "none":
        want = want[None]
    elif layout == "last":
        want = np.moveaxis(want, -1, 0)
    assert np.array_equal(split.read(3).numpy(), want)


def test_stored_splits_features_and_groups(tmp_path):
    x, y = beats(80)
    record, rr = np.repeat(np.arange(8), 10), RNG.integers(200, 400, (80, 2))
    arrays = {f"{k}_{p}": v[s] for p, s in (("train", slice(60)), ("test", slice(60, 80)))
              for k, v in (("X", x), ("y", y), ("record", record), ("rr", rr))}  # fmt: skip
    data = npz(tmp_path / "a.npz", **arrays)
    source = open_source(data, x="X", group="record", features="rr", ratio=True, val=0.2)
    assert source.channels == 5 and counts(source)["test"] == 20
    owners = {key: set(record[split.index]) for key, split in source.splits.items()}
    assert owners["test"] == {6, 7} and owners["train"] | owners["val"] == set(range(6))
    assert not owners["train"] & owners["val"] and len(owners["val"]) == 1
    split = source.splits["test"]
    sample, k = split.read(4), int(split.index[4])
    middle = np.median(rr[record == record[k]], 0)
    assert torch.equal(sample[0], torch.from_numpy(x[k]).float())
    for c, value in enumerate([*rr[k], *(rr[k] / middle)], start=1):
        assert torch.allclose(sample[c], torch.full((40,), float(value)))
    alone = (
        open_source(data, x="X", group="record", features="rr", ratio="only", standardise=True).splits["test"].read(4)
    )
    assert torch.equal(alone[1:], sample[3:]) and len(alone) == 3
    assert alone[0].mean().abs() < 1e-6 and alone[0].std(correction=0) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(alone[0], (sample[0] - sample[0].mean()) / sample[0].std(correction=0))
    with pytest.raises(DataError, match="ratio needs groups"):
        open_source(data, x="X", features="rr", ratio=True)
    arrays["record_test"][0] = 3
    with pytest.raises(DataError, match="group 3 is in train and in test"):
        open_source(npz(tmp_path / "b.npz", **arrays), x="X", group="record")
    assert ratios(np.array([[0.0], [0.0], [6.0]]), np.array(["a", "a", "b"])).tolist() == [[0], [0], [1]]


def test_the_median_sample_of_a_group_lies_beside_and_scales(tmp_path):
    x, y = beats(60)
    record = np.repeat(np.arange(6), 10)
    data = npz(tmp_path / "a.npz", x=x, y=y, record=record, rr=RNG.random((60, 2)))
    beside = open_source(data, group="record", features="rr", reference=True, standardise=True)
    scaled = open_source(data, group="record", reference=True, standardise="group")
    factor = open_source(data, group="record", standardise="group")
    assert (beside.channels, beside.beside, scaled.channels, factor.channels) == (4, 2, 2, 1)
    split = beside.splits["train"]
    k = int(split.index[7])
    mine = x[record == record[k]].astype(np.float64)
    alike = (mine - mine.mean(1, keepdims=True)) / mine.std(1, keepdims=True)
    wave = (x[k] - x[k].mean()) / x[k].astype(np.float64).std()
    assert np.allclose(split.read(7)[:2].numpy(), [wave, np.median(alike, 0)], atol=1e-5)
    # torch's median of an even number of values is the lower of the two in the middle
    lower = mine - np.sort(mine, 1)[:, (mine.shape[1] - 1) // 2][:, None]
    middle = np.median(lower, 0)
    own = (x[k] - np.sort(x[k])[(len(x[k]) - 1) // 2]) / np.abs(middle).max()
    found = scaled.splits["train"].read(7).numpy()
    assert np.allclose(found, [own, middle / np.abs(middle).max()], atol=1e-5) and np.abs(found[1]).max() == 1
    assert np.array_equal(factor.splits["train"].read(7).numpy(), found[:1])
    assert np.array_equal(scaled.splits["train"].groups, record[split.index].astype(str))
    for options, told in (({"reference": True}, "reference needs groups"), ({"standardise": "group"}, "group needs")):
        with pytest.raises(DataError, match=told):
            open_source(data, **options)
    with pytest.raises(DataError, match="standardise must be true, false or group"):
        open_source(data, group="record", standardise="all")


def test_folds_and_several_labels(tmp_path):
    x, fold = beats(100, (50, 2))[0], np.arange(100) % 10 + 1
    y = (RNG.random((100, 3)) < 0.4).astype(np.uint8)
    data = npz(tmp_path / "a.npz", X=x, Y=y, fold=fold, patient=np.arange(100) // 2, classes=np.array(["a", "b", "c"]))
    options = {"x": "X", "y": "Y", "split": "fold", "layout": "last"}
    source = open_source(data, **options, val_folds=[8], test_folds=[9, 10])
    assert source.task == "multi" and source.classes == ("a", "b", "c") and source.channels == 2
    for key, wanted in (("train", {*range(1, 8)}), ("val", {8}), ("test", {9, 10})):
        assert set(fold[source.splits[key].index]) == wanted
    assert np.array_equal(source.splits["val"].labels, y[fold == 8])
    some = open_source(data, **options, train_folds=[1, 2, 3, 4], test_folds=[10])
    assert counts(some) == {"train": 36, "val": 4, "test": 10}  # a tenth of the four folds
    for wrong, message in (({"test_folds": [11]}, "no fold 11"), ({"test_folds": [1], "val_folds": [1]}, "two splits")):
        with pytest.raises(DataError, match=message):
            open_source(data, **options, **wrong)
    with pytest.raises(DataError, match="split '1' is none of train"):
        open_source(data, **options)
    with pytest.raises(DataError, match=r"need data_options\.split"):
        open_source(data, x="X", y="Y", layout="last", test_folds=[1])


def test_groups_are_never_torn_and_classes_stay_even(tmp_path):
    owner = RNG.integers(0, 40, 800)
    y = np.where(RNG.random(800) < 0.1, 2, RNG.integers(0, 2, 800))
    y[owner == 7] = 3  # a class that one group alone has stays in training
    source = open_source(npz(tmp_path / "a.npz", x=beats(800)[0], y=y, who=owner), group="who", val=0.1, test=0.2)
    owners = {key: set(owner[split.index]) for key, split in source.splits.items()}
    assert sum(map(len, owners.values())) == 40 == len(set().union(*owners.values())) and 7 in owners["train"]
    for key, share in (("val", 0.1), ("test", 0.2)):
        for c in range(3):
            assert abs((source.splits[key].labels == c).sum() / (y == c).sum() - share) < 0.04
    with pytest.raises(DataError, match="2 groups are too few"):
        open_source(npz(tmp_path / "b.npz", x=beats(40)[0], y=np.arange(40) % 2, who=np.arange(40) // 20), group="who")


def test_only_some_classes(tmp_path):
    x, y = beats(80, classes=4)
    data = npz(tmp_path / "a.npz", x=x, y=y, classes=np.array(list("NSVQ")))
    source = open_source(data, only=["V", "N"])
    assert source.classes == ("N", "V") and sum(counts(source).values()) == 40
    for split in source.splits.values():
        assert np.array_equal(y[split.index], np.array([0, 2])[split.labels])
    with pytest.raises(DataError, match="no class 'X'; there are: N, S, V, Q"):
        open_source(data, only=["X", "N"])


def test_npy_files_are_mapped(tmp_path):
    x, y = beats(30)
    for name, array in (("wave", x), ("y", y.astype(str))):
        np.save(tmp_path / f"{name}.npy", array)
    one = open_source(str(tmp_path / "wave.npy"))
    two = open_source(str(tmp_path), x="wave", y="y")
    assert isinstance(one.splits["train"].load.arrays[0], np.memmap)
    for source in (one, two):
        split = source.splits["test"]
        assert torch.equal(split.read(2), torch.from_numpy(x[split.index[2]]).float()[None])
        assert source.classes == ("0", "1", "2")


def test_a_csv_has_a_sample_a_line(tmp_path):
    path = tmp_path / "a.csv"
    lines = [f"p{i // 3},{'ab'[i % 2]},{i},{-i}.5,{'train' if i < 20 else 'test'},{i / 10}" for i in range(30)]
    path.write_text("\n".join(["patient,kind,t0,t1,part,age", *lines, ""]))
    with pytest.raises(DataError, match="say which column is the label"):
        open_source(str(path))
    source = open_source(str(path), y="kind", group=None, split="part", features="age", x=["t0", "t1"])
    assert source.classes == ("a", "b") and source.size == (2,) and source.channels == 2
    assert counts(source) == {"train": 18, "val": 2, "test": 10}
    split = source.splits["test"]
    assert torch.allclose(split.read(3), torch.tensor([[23.0, -23.5], [2.3, 2.3]])) and split.target(3) == 1
    path.write_text("\n".join(f"{i % 2},{i},{i + 1},{i + 2}" for i in range(30)))
    bare = open_source(str(path), y=0)
    split = bare.splits["train"]
    assert torch.equal(split.read(0)[0], torch.tensor([0.0, 1, 2]) + int(split.index[0]))
    path.write_text("0,1,2\n1,2\n")
    with pytest.raises(DataError, match="line 2 has 2 columns, the first has 3"):
        open_source(str(path), y=0)
    with pytest.raises(DataError, match="has no column 'w'; it has: a, b"):
        path.write_text("a,b\n1,2\n")
        open_source(str(path), y="w")


def test_class_folders_of_arrays(tmp_path):
    for c, name in enumerate(("left", "right")):
        (tmp_path / name).mkdir()
        for i in range(12):
            wave = np.full((3, 20 + 2 * (i % 3)), 10 * c + i, np.float32)
            np.save(tmp_path / name / f"{i}.npy", wave)
        np.savez(tmp_path / name / "z.npz", wave)
        (tmp_path / name / "t.csv").write_text("\n".join("1,2,3" for _ in range(22)))
    (tmp_path / "left" / "bad.npy").write_bytes(b"not an array")
    source = open_source(str(tmp_path))
    assert (source.classes, source.channels, source.size) == (("left", "right"), 3, (22,))
    assert any("sizes differ, 20 to 24" in note for note in source.notes)
    found = {name: split.read(i) for split in source.splits.values()
             for i, name in enumerate(split.names) if "bad" not in name}  # fmt: skip
    assert len(found) == 28 and found["right/4.npy"].eq(14).all() and found["right/4.npy"].shape == (3, 22)
    assert torch.equal(found["left/t.csv"], torch.tensor([1.0, 2, 3])[:, None].expand(3, 22))
    name = "left/bad.npy"
    bad = next((split, split.names.index(name)) for split in source.splits.values() if name in split.names)
    with pytest.raises(DataError, match=r"bad\.npy: not an npy array"):
        bad[0].read(bad[1])


def test_bad_samples_are_left_out_and_counted(tmp_path):
    x, y = beats()
    x = x.astype(np.float32)
    x[4, 3], x[5, 0] = np.nan, np.inf
    split = open_source(npz(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)).splits["test"]
    [batch] = list(eval_loader(Samples(split, lambda v: v), 60, 0))
    assert len(batch.targets) == 58 and not set(batch.positions.tolist()) & {4, 5} and batch.images.isfinite().all()
    assert [bad.path for bad in batch.skipped] == ["a.npz x_test[4]", "a.npz x_test[5]"]
    assert batch.skipped[0].reason == "holds NaN or infinite values"


class Trap:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["TRAP"])),))


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    trap = np.array([Trap(), Trap()], dtype=object)
    data = npz(tmp_path / "a.npz", x=trap, y=np.arange(2))
    np.save(tmp_path / "x.npy", trap, allow_pickle=True)
    for place in (data, str(tmp_path / "x.npy")):
        with pytest.raises(DataError, match=r"never unpickled|no 'y'"):
            open_source(place)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="not an npz file"):
        open_source(str(tmp_path / "b.npz"))
    assert not (tmp_path / "sprung").exists()


def header(shape, dtype="<f4"):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_declared_sizes_are_not_believed(tmp_path):
    for shape in ((2**40, 2**20), (10, 10)):
        path = tmp_path / "a.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x.npy", header(shape) + bytes(64))
            file.writestr("y.npy", header((10,)) + bytes(40))
        with pytest.raises(DataError, match=r"a.npz x: declares \d+ bytes for .* but holds another number"):
            open_source(str(path))
        (tmp_path / "w.npy").write_bytes(header(shape) + bytes(64))
        (tmp_path / "y.npy").write_bytes(header((10,)) + bytes(40))
        with pytest.raises(DataError, match=r"w.npy: declares \d+ bytes for .* but holds 64"):
            open_source(str(tmp_path / "w.npy"))
    info = zipfile.ZipFile(path).getinfo("x.npy")
    whole = bytearray(path.read_bytes())
    place = whole.index(b"PK\x01\x02") + 24  # the size in the central directory
    assert int.from_bytes(whole[place : place + 4], "little") == info.file_size
    whole[place : place + 4] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=f"declares {2**32 - 2} bytes, more than it can hold or {LIMIT} allow"):
        open_source(str(path))
    path.write_bytes(bytes(whole[: len(whole) // 2]))
    with pytest.raises(DataError, match="not an npz file"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"y": [0, 1, 5]}, {"classes": ["a", "b"]}, "label 5 is out of range: there are 2 class names"),
        ({"y": [0, -1, 1]}, {"classes": ["a", "b"]}, "label -1 is out of range"),
        ({"y": [0, 1]}, {}, "y: 2 entries for 3 samples"),
        ({"y": [0, 0.5, 1]}, {}, "whole numbers"),
        ({"y": [0, 0, 0]}, {}, "only the class '0'"),
        ({"y": ["a", "b", "c"]}, {"classes": ["a", "b"]}, "label 'c' is not among the classes a, b"),
        ({"y": [[0, 1], [2, 0], [1, 1]]}, {}, "must be 0 or 1"),
        ({"y": [[0, 1]] * 3}, {"classes": ["a"]}, "1 class names for 2 columns"),
        ({"y": [0, 1, 1], "f": [1, 2]}, {"features": "f"}, "f: 2 entries for 3 samples"),
        ({"y": [0, 1, 1]}, {"x": "signal"}, "no 'signal' nor 'signal_train' in it.*there are: x, y"),
        ({"y": [0, 1, 1]}, {"layout": "middle"}, "layout must be first, last or none"),
        ({"y": [0, 1, 1], "x": ["a", "b", "c"]}, {}, "needs numbers, holds <U1"),
        ({"y": [0, 1, 1], "x": [1, 2, 3]}, {}, "have not one to three axes"),
        ({"y": [0, 1, 1], "x": np.zeros((3, 1, 2, 2, 2, 2))}, {}, "have not one to three axes"),
        ({"y": [0, 1, 1]}, {"val": 0.5, "test": 0.5}, "together below 1"),
        ({"y": [0, 1, 1]}, {"wrong": 1}, "no option 'wrong'"),
        ({"y": [0, 1, 1]}, {}, "class '0' has 1 samples, too few"),
    ],
)
def test_what_cannot_be_used_is_said(tmp_path, arrays, options, message):
    stored = {"x": np.zeros((3, 8))} | {key: np.array(value) for key, value in arrays.items()}
    with pytest.raises(DataError, match=message) as caught:
        open_source(npz(tmp_path / "a.npz", **stored), **options)
    assert "\n" not in str(caught.value) and "a.npz" in str(caught.value)


def test_a_class_that_training_lacks(tmp_path):
    x, y = beats()
    data = npz(tmp_path / "a.npz", x_train=x, y_train=y % 2, x_test=x, y_test=y)
    with pytest.raises(DataError, match="class '2' is in test but not in the training samples"):
        open_source(data)


def records(root):
    wfdb = pytest.importorskip("wfdb")
    lines = ["record,label,patient"]
    for i in range(20):
        wave = np.stack([np.linspace(-1, 1, 50) * (i + 1), np.full(50, 0.5)], 1)
        wfdb.wrsamp(f"r{i}", 100, ["mV", "mV"], ["I", "II"], p_signal=wave, fmt=["16", "16"], write_dir=str(root))
        lines.append(f"r{i},{'ab'[i % 2]},{i // 2}")
    (root / "labels.csv").write_text("\n".join(lines))


def test_wfdb_records(tmp_path):
    records(tmp_path)
    source = open_source(str(tmp_path))
    assert (source.classes, source.channels, source.size, source.ndim) == (("a", "b"), 2, (50,), 1)
    patients = [{int(name[1:]) // 2 for name in split.names} for split in source.splits.values()]
    assert sum(map(len, patients)) == 10 == len(set().union(*patients))
    split = source.splits["train"]
    i = int(split.names[0][1:])
    want = torch.stack([torch.linspace(-1, 1, 50) * (i + 1), torch.full((50,), 0.5)])
    assert (split.read(0) - want).abs().max() < 1e-3 * (i + 1)
    hea = tmp_path / "r0.hea"
    bad = next((split, split.names.index("r0")) for split in source.splits.values() if "r0" in split.names)
    whole = hea.read_text()
    for name, message in (("other.dat", "names the file 'other.dat', which is not beside it"), ("../r1.dat", "r0.hea")):
        hea.write_text(whole.replace("r0.dat", name))
        with pytest.raises(DataError, match=message):
            bad[0].read(bad[1])
    hea.write_text("r0 2 100 9000000000\nr0.dat 16 200/mV\nr0.dat 16 200/mV\n")
    with pytest.raises(DataError, match="declares 2 signals of 9000000000"):
        bad[0].read(bad[1])
    (tmp_path / "labels.csv").write_text("record,label\n../r1,a\nr2,b\n")
    with pytest.raises(DataError, match=r"no record '\.\./r1'"):
        open_source(str(tmp_path))


def test_wfdb_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    (tmp_path / "r.hea").write_text("")
    monkeypatch.setitem(sys.modules, "wfdb", None)
    with pytest.raises(DataError, match=r"needs wfdb: pip install 'vertebra\[signals\]'"):
        open_source(str(tmp_path))


@pytest.mark.skipif(not (SHARED / "data/mitbih/beats.npz").is_file(), reason="the recordings are not here")
def test_real_beats_keep_patients_apart():
    path = SHARED / "data/mitbih/beats.npz"
    source = open_source(str(path), x="X", group="record", features="rr", only=["N", "S", "V", "F"], val=0.2)
    with np.load(path) as arrays:
        record, label = (np.concatenate([arrays[f"{k}_train"], arrays[f"{k}_test"]]) for k in ("record", "y"))
    owners = {key: set(record[split.index].tolist()) for key, split in source.splits.items()}
    assert {key: len(v) for key, v in owners.items()} == {"train": 18, "val": 4, "test": 22}
    assert len(set().union(*owners.values())) == 44
    assert np.array_equal(np.bincount(source.splits["test"].labels), [3300, 546, 835, 126])
    for split in source.splits.values():
        assert np.array_equal(label[split.index], split.labels) and (np.bincount(split.labels) > 0).all()
