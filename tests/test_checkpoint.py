"""Checkpoints in and out: what fits loads bit for bit, what does not is named and leaves the model as it was."""

from __future__ import annotations

import collections
import copy
import json
import os
import pickle
import resource
import stat
import struct

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import vertebra
from test_backbone import Toy, image, toy
from vertebra import CheckpointError, create_model, fuse, load_checkpoint, save_checkpoint, to_official

torch.set_num_threads(1)
TINY = dict(depths=(1, 1, 2, 1), dim=32, num_classes=5)


def crossformer(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("crossformer_tiny", **(TINY | options))


def same(a, b):
    """Equal names and equal bits, NaN included, however the memory is ordered."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].numpy().tobytes() == b[k].numpy().tobytes()
        for k in a
    )


def snapshot(model):
    return copy.deepcopy(dict(model.state_dict()))


def refused(model, source, *words, **options):
    """`source` raises a CheckpointError that says all of `words`, and the model keeps every bit."""
    before = snapshot(model)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, source, **options)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert same(dict(model.state_dict()), before)
    return str(error.value)


# --- what loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", (toy, crossformer))
@pytest.mark.parametrize("naming", ("ours", "official"))
@pytest.mark.parametrize("kind", ("dict", "safetensors", "zip", "legacy"))
def test_round_trip(make, naming, kind, tmp_path):
    source, model = make(0), make(1)
    state = dict(source.state_dict()) if naming == "ours" else to_official(source)
    where = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, where)
    elif kind != "dict":
        torch.save(state, where, _use_new_zipfile_serialization=kind == "zip")
    random = torch.get_rng_state()
    report = load_checkpoint(model, state if kind == "dict" else where)
    assert torch.equal(torch.get_rng_state(), random)  # building the twin draws no number
    assert same(model, source)
    assert report.naming == naming
    assert sorted(report.loaded) == sorted(state)
    assert report.missing == report.unexpected == report.misshapen == report.fresh == report.unused == []
    assert report.adapted == []


@pytest.mark.parametrize("make", (toy, crossformer))
def test_to_official_is_a_bijection(make):
    model = make()
    official = to_official(model)
    ours = [k for k in model.state_dict() if not k.endswith("num_batches_tracked")]
    assert len(official) == len(ours)
    assert set(official) != set(ours)
    for name, tensor in zip(official, (model.state_dict()[k] for k in ours)):
        assert official[name].data_ptr() == tensor.data_ptr()
        assert not official[name].requires_grad
    other = make(1)
    load_checkpoint(other, official)
    again = to_official(other)
    assert same(dict(again), dict(official))


def test_rules_that_are_not_one_to_one_are_a_fault(monkeypatch):
    monkeypatch.setattr(Toy, "OFFICIAL", ((r"^(head|aux)\.", "fc."),))
    for call in (lambda m: to_official(m), lambda m: load_checkpoint(m, m.state_dict())):
        with pytest.raises(RuntimeError, match="name rules of Toy are not one to one"):
            call(toy())


WRAPPERS = {
    "model": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {0: torch.zeros(3)}}},
    "state_dict": lambda s: {"state_dict": s, "arch": "x"},
    "ema first": lambda s: {"state_dict": {k: torch.zeros_like(v) for k, v in s.items()}, "state_dict_ema": s},
    "empty ema": lambda s: {"model_ema": {}, "model": s},
    "no ema": lambda s: {"model_ema": None, "model": s},
    "nested": lambda s: {"network": {"model": {"state_dict": s}}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "backbone.": lambda s: {f"backbone.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "several": lambda s: {"model": {f"module._orig_mod.model.{k}": v for k, v in s.items()}},
    "head outside": lambda s: {k if k.startswith(("head", "cl", "aux")) else f"backbone.{k}": v for k, v in s.items()},
    "plain values": lambda s: {"version": 1, "note": "text"} | s,
}  # fmt: skip


@pytest.mark.parametrize("naming", ("ours", "official"))
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(naming, wrapper, tmp_path):
    source, model = toy(0), toy(1)
    state = dict(source.state_dict()) if naming == "ours" else to_official(source)
    torch.save(WRAPPERS[wrapper](state), tmp_path / "w.pth")
    report = load_checkpoint(model, tmp_path / "w.pth")
    assert same(model, source)
    assert report.naming == naming


def test_safetensors_under_any_name(tmp_path):
    source, model = toy(0), toy(1)
    save_checkpoint(source, tmp_path / "w.bin")
    load_checkpoint(model, str(tmp_path / "w.bin"))
    assert same(model, source)


def test_constant_buffers_may_be_there_or_not():
    source, model = toy(0), toy(1)
    state = to_official(source) | {
        "layers.0.attn_mask": torch.zeros(3),
        "relative_position_index": torch.zeros(2).long(),
    }
    report = load_checkpoint(model, state)
    assert same(model, source)
    assert report.unexpected == []
    refused(model, state | {"attn_mask2": torch.zeros(3)}, "1 unexpected: attn_mask2")


@pytest.mark.parametrize("naming", ("ours", "official"))
def test_batch_counters_are_optional(naming):
    source, model = toy(0), toy(1)
    for norm in (m for m in source.modules() if hasattr(m, "num_batches_tracked")):
        norm.num_batches_tracked.fill_(7)
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    state = state if naming == "ours" else to_official(source)
    assert load_checkpoint(model, state).missing == []
    assert model.stages[0].blocks[0].mix.norm.num_batches_tracked == 0
    full = dict(source.state_dict())
    if naming == "official":
        full = {vertebra.checkpoint.official_name(source, k): v for k, v in full.items()}
    load_checkpoint(model, full)
    assert model.stages[0].blocks[0].mix.norm.num_batches_tracked == 7
    fused = fuse(toy(1))
    assert load_checkpoint(fused, fuse(source).state_dict() | {"stages.0.x.num_batches_tracked": torch.tensor(1)})


def test_nan_is_loaded_as_it_is():
    source, model = toy(0), toy(1)
    with torch.no_grad():
        source.norm.weight[0] = float("nan")
        source.norm.bias[1] = float("inf")
    load_checkpoint(model, to_official(source))
    assert same(model, source)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_other_precisions_are_cast(dtype):
    source, model = toy(0), toy(1)
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.state_dict().items()}
    load_checkpoint(model, state)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == source.state_dict()[name].dtype
        assert torch.equal(tensor, state[name].to(tensor.dtype))


def test_the_source_is_not_tied_to_the_model():
    source, model = toy(0), toy(1)
    state = dict(source.state_dict())
    load_checkpoint(model, state)
    with torch.no_grad():
        model.norm.weight.add_(1)
    assert not torch.equal(model.norm.weight, source.norm.weight)


# --- what does not load ----------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_the_payload_would_work(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ("zip", "legacy", "bare", "bare 2"))
@pytest.mark.parametrize("suffix", (".pth", ".pt", ".bin", ".safetensors", ""))
def test_code_in_a_pickle_does_not_run(kind, suffix, tmp_path):
    file, side_effect = tmp_path / f"evil{suffix}", tmp_path / "pwned"
    found = {"model": dict(toy().state_dict()), "epoch": Payload(side_effect)}
    if kind.startswith("bare"):
        file.write_bytes(pickle.dumps(Payload(side_effect), protocol=2 if kind == "bare 2" else None))
    else:
        torch.save(found, file, _use_new_zipfile_serialization=kind == "zip")
    message = refused(toy(), file, str(file))
    assert not side_effect.exists()
    if kind != "bare" and suffix != ".safetensors":
        assert "refused" in message
        assert "mkdir" in message
        assert "torch.save(model.state_dict()" in message
    assert "weights_only" not in message  # torch's hint how to run it all the same


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    refused(toy(), tmp_path / "w.pth", "refused", "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("share", (0.0, 0.01, 0.5, 0.99))
@pytest.mark.parametrize("kind", ("safetensors", "zip", "legacy"))
def test_truncated_files(kind, share, tmp_path):
    source = toy()
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_checkpoint(source, file)
    else:
        torch.save(source.state_dict(), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    message = refused(toy(1), file, str(file))
    assert "not a whole safetensors file" in message or "cannot be read, truncated or no checkpoint" in message


@pytest.mark.parametrize("suffix", (".pth", ".safetensors", ".bin"))
@pytest.mark.parametrize("content", (b"", b"<!DOCTYPE html><html>not found</html>", bytes(range(256)) * 9, b"\0" * 999))
def test_garbage(suffix, content, tmp_path):
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    message = refused(toy(), file, str(file))
    assert "could run code" not in message


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**62, None),
        (None, {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        (None, {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}}),
        (None, {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}),
        (None, {"w": {"dtype": "NONE", "shape": [4], "data_offsets": [0, 16]}}),
    ],
)
def test_a_safetensors_header_that_lies_allocates_nothing(length, header, tmp_path):
    text = json.dumps(header or {}).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + b"\0" * 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(toy(), file, "not a whole safetensors file")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_no_file(tmp_path):
    refused(toy(), tmp_path / "none.pth", "none.pth: no such file")
    refused(toy(), tmp_path, "a folder, not a file")
    for wrong in (None, 3, [1], b"bytes"):
        refused(toy(), wrong, "a checkpoint is a path, a URL or a state dict")


def test_things_that_are_no_state_dict(tmp_path):
    for found, word in (([torch.zeros(1)], "holds list"), (torch.zeros(3), "holds Tensor"), ({"a": 1}, "no tensors")):
        torch.save(found, tmp_path / "w.pth")
        refused(toy(), tmp_path / "w.pth", word)
    refused(toy(), {}, "no tensors")


def test_missing_unexpected_and_misshapen_are_named():
    model = toy(1)
    state = to_official(toy(0))
    lacking = {k: v for k, v in state.items() if k != "norm.weight"}
    refused(model, lacking, "does not fit toy (official naming)", "1 missing: norm.weight", "strict=False")
    refused(model, state | {"extra.weight": torch.zeros(1)}, "1 unexpected: extra.weight")
    refused(model, state | {"stem.conv.bias": torch.zeros(9)}, "1 misshapen: stem.conv.bias: (9,) in the file, (8,)")
    refused(model, state | {"norm.bias": torch.zeros(16).long()}, "norm.bias: torch.int64 in the file, torch.float32")
    refused(model, state | {"norm.bias": torch.tensor(1.0)}, "norm.bias: () in the file, (16,)")
    refused(model, state | {"pos_embed": torch.tensor(1.0)}, "pos_embed: () in the file")
    refused(model, state | {"bias.table": torch.tensor(1.0)}, "bias.table: () in the file")
    many = {k: v for k, v in state.items() if k.startswith(("layers", "stem"))}
    assert " and " in refused(model, many, "missing: ", " more")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("kind", ("sparse", "meta"))
def test_tensors_that_cannot_be_copied(kind, tmp_path):
    """The fault must be found before the first tensor is copied."""
    state = dict(toy(0).state_dict())
    last = list(state)[-1]
    state[last] = state[last].to_sparse() if kind == "sparse" else state[last].to("meta")
    torch.save(state, tmp_path / "w.pth")
    refused(toy(1), tmp_path / "w.pth", f"{last}: not a plain dense tensor")


def test_another_model_s_file():
    refused(crossformer(), to_official(toy()), "does not fit crossformer_tiny", "another model", "list_models")
    refused(toy(), to_official(crossformer()), "does not fit toy", "another model")


def test_another_variant():
    message = refused(crossformer(1), crossformer(dim=64).state_dict(), "misshapen: ", " more")
    assert "num_classes" not in message


def test_loose_loading_takes_what_fits():
    source, model = toy(0), toy(1)
    before = snapshot(model)
    state = dict(source.state_dict()) | {"extra": torch.zeros(1), "norm.weight": torch.zeros(3)}
    del state["norm.bias"]
    report = load_checkpoint(model, state, strict=False)
    assert report.missing == ["norm.bias"]
    assert report.unexpected == ["extra"]
    assert report.misshapen == ["norm.weight: (3,) in the file, (16,) in the model"]
    for name, tensor in model.state_dict().items():
        kept = name in ("norm.bias", "norm.weight")
        assert torch.equal(tensor, before[name] if kept else source.state_dict()[name])
    refused(model, {"other": torch.zeros(1)}, "1 unexpected", strict=False)


# --- heads, stems, tables, dense versions ---------------------------------------------------------------------------


@pytest.mark.parametrize("naming", ("ours", "official"))
def test_a_head_of_another_size(naming):
    source, model = toy(0, num_classes=9), toy(1)
    state = dict(source.state_dict()) if naming == "ours" else to_official(source)
    refused(model, state, "misshapen", "(9, 16) in the file, (5, 16)", "num_classes", "new_head=True")
    before = snapshot(model)
    report = load_checkpoint(model, state, new_head=True)
    names = ("head", "aux") if naming == "ours" else ("classifier", "classifier_dist")
    assert report.fresh == [f"{n}.{p}" for n in names for p in ("weight", "bias")]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(("head", "aux")) else source.state_dict()[name])


def test_a_head_by_create_model(tmp_path):
    source = crossformer(num_classes=1000)
    save_checkpoint(source, tmp_path / "w.safetensors")
    tiny = {k: v for k, v in TINY.items() if k != "num_classes"}
    model = create_model("crossformer_tiny", checkpoint=tmp_path / "w.safetensors", **tiny)
    assert same(model, source)
    assert model.load_report.fresh == []
    other = create_model("crossformer_tiny", num_classes=7, checkpoint=tmp_path / "w.safetensors", **tiny)
    assert other.load_report.fresh == ["head.weight", "head.bias"]
    assert torch.equal(other.stages[3].blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight)
    with pytest.raises(CheckpointError, match=r"misshapen: head\.weight"):
        save_checkpoint(other, tmp_path / "seven.safetensors")
        create_model("crossformer_tiny", checkpoint=tmp_path / "seven.safetensors", **tiny)


@pytest.mark.parametrize("naming", ("ours", "official"))
@pytest.mark.parametrize("make", (toy, crossformer))
def test_a_classification_file_without_its_head(make, naming):
    """num_classes=0 is the same network without the head: the head is reported, not a misfit."""
    source, model = make(0), make(1, num_classes=0)
    state = dict(source.state_dict()) if naming == "ours" else to_official(source)
    report = load_checkpoint(model, state)
    assert report.unused
    assert all(n.startswith(("head.", "aux.", "classifier")) for n in report.unused)
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("naming", ("ours", "official"))
def test_a_classification_file_in_the_dense_version(naming):
    source, model = toy(0), toy(1, features_only=True)
    before = snapshot(model)
    state = dict(source.state_dict()) if naming == "ours" else to_official(source)
    report = load_checkpoint(model, state)
    heads = ("head", "aux") if naming == "ours" else ("classifier", "classifier_dist")
    assert sorted(report.unused) == sorted(f"{n}.{p}" for n in ("norm", *heads) for p in ("weight", "bias"))
    assert report.fresh == [f"out_norms.{i}.{p}" for i in (0, 1) for p in ("weight", "bias")]
    assert report.missing == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith("out_norms") else source.state_dict()[name])


def test_crossformer_s_dense_version():
    report = load_checkpoint(crossformer(1, features_only=True), to_official(crossformer(0)))
    assert sorted(report.unused) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert report.fresh == []


def test_a_dense_file_in_the_classification_version():
    dense = crossformer(0, features_only=True)
    refused(crossformer(1), to_official(dense), "4 missing: norm.weight, norm.bias, head.weight, head.bias")
    report = load_checkpoint(crossformer(1), to_official(dense), strict=False)
    assert report.missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert load_checkpoint(toy(1, features_only=True), toy(0, features_only=True).state_dict()).missing == []


@pytest.mark.parametrize("channels", (1, 2, 4, 6))
def test_a_stem_for_other_channels(channels):
    source = crossformer(0)
    model = crossformer(1, in_chans=channels, checkpoint=to_official(source))
    stems = [f"patch_embed.projs.{i}.weight" for i in range(4)]
    assert model.load_report.adapted == stems
    x = image(side=32, channels=1)
    if channels in (1, 6):  # copies of one grey channel give what they gave the image stem
        a, b = model(x.expand(-1, channels, -1, -1)), source(x.expand(-1, 3, -1, -1))
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    old, new = source.patch_embed.convs[0].weight, model.patch_embed.convs[0].weight
    if channels > 1:
        want = torch.stack([old[:, i % 3] for i in range(channels)], 1) * 3 / channels
        torch.testing.assert_close(new, want, rtol=1e-6, atol=0)
    refused(crossformer(1, in_chans=channels), to_official(source), "misshapen", f"in the file, (16, {channels}, 4, 4)")
    for name, tensor in model.state_dict().items():
        if not name.startswith("patch_embed"):
            assert torch.equal(tensor, source.state_dict()[name])


@pytest.mark.parametrize("naming", ("ours", "official"))
def test_tables_of_another_size(naming):
    source, model = toy(0, grid=(6, 6), window=2), toy(1)
    state = dict(source.state_dict()) if naming == "ours" else to_official(source)
    report = load_checkpoint(model, state)
    assert report.adapted == (["pos.table", "bias.table"] if naming == "ours" else ["pos_embed", "bias.table"])
    cells = source.pos.table.reshape(1, 6, 6, 8).permute(0, 3, 1, 2)
    want = F.interpolate(cells, size=(4, 4), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(model.pos.table, want, rtol=1e-6, atol=1e-6)
    offsets = source.bias.table.reshape(1, 1, 3, 3)
    want = F.interpolate(offsets, size=(5, 5), mode="bicubic", align_corners=False).reshape(25, 1)
    torch.testing.assert_close(model.bias.table, want, rtol=1e-6, atol=1e-6)
    refused(model, state | {"pos.table" if naming == "ours" else "pos_embed": torch.zeros(1, 37, 8)}, "(1, 37, 8)")


def test_fused_files():
    source = toy(0)
    fused = fuse(source)
    other = fuse(toy(1))
    report = load_checkpoint(other, to_official(fused))
    assert same(other, fused)
    assert report.missing == report.unexpected == []
    refused(toy(1), to_official(fused), "fused (deploy) structure", "vertebra.fuse(model.eval())")
    refused(other, to_official(source), "The model is fused; load an unfused checkpoint before vertebra.fuse")


def test_a_model_fused_wholly_stays_so_in_its_recipe():
    """fuse(published=True) after published=False must not claim the published structure."""
    twice = fuse(fuse(crossformer().eval(), published=False), published=True)
    assert twice.recipe["fused"] is False


# --- saving ---------------------------------------------------------------------------------------------------------


def test_save(tmp_path):
    model = toy(0)
    model.norm.weight.data = torch.randn(16, 2)[:, 0]  # not contiguous
    file = tmp_path / "w.safetensors"
    save_checkpoint(model, file, {"epoch": "3"})
    assert same(dict(load_file(file)), {k: load_file(file)[k] for k in load_file(file)})
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in load_file(file).items())
    assert len(load_file(file)) == len(model.state_dict())
    save_checkpoint(toy(1), str(file))
    assert same({k: load_file(file)[k] for k in toy(1).state_dict()}, dict(toy(1).state_dict()))
    assert os.listdir(tmp_path) == ["w.safetensors"]
    with pytest.raises(FileNotFoundError):
        save_checkpoint(model, tmp_path / "none" / "w.safetensors")


def test_saved_files_have_the_usual_rights(tmp_path):
    old = os.umask(0o022)
    try:
        save_checkpoint(toy(), tmp_path / "w.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize("fault", ("writer", "fsync", "replace"))
def test_a_failing_writer_leaves_the_old_file(fault, tmp_path, monkeypatch):
    file = tmp_path / "w.safetensors"
    save_checkpoint(toy(0), file)
    before = file.read_bytes()

    def fail(*args, **kwargs):
        if fault == "writer":
            with open(args[1], "wb") as half:
                half.write(b"half")
        raise OSError("No space left on device")

    import safetensors.torch

    target = {"writer": (safetensors.torch, "save_file"), "fsync": (os, "fsync"), "replace": (os, "replace")}[fault]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(toy(1), file)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_ordered_dict_and_module_state(tmp_path):
    source, model = toy(0), toy(1)
    load_checkpoint(model, collections.OrderedDict(source.state_dict()))
    assert same(model, source)


def test_options_kept_beside_the_weights_do_no_harm(tmp_path):
    """Official training scripts store their argparse options in the file."""
    import argparse

    model, other = crossformer(), crossformer(seed=1)
    state = {k: v + 1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}, tmp_path / "m.pth")
    vertebra.load_checkpoint(other, tmp_path / "m.pth")
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_a_file_without_a_head_loads_when_a_new_one_is_asked_for():
    model = crossformer()
    headless = {k: v for k, v in vertebra.to_official(model).items() if not k.startswith("head.")}
    with pytest.raises(vertebra.CheckpointError, match=r"head\.weight"):
        vertebra.load_checkpoint(crossformer(), headless)
    report = vertebra.load_checkpoint(crossformer(), headless, new_head=True)
    assert sorted(report.fresh) == ["head.bias", "head.weight"] and report.missing == []
