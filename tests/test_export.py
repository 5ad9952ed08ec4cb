"""Exported files: what they hold, at which sizes they run, and what is refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

import vertebra
from vertebra import cli
from vertebra.deploy import exporting
from vertebra.deploy.exporting import ExportError
from vertebra.layers.cached import one_trace
from vertebra.layers.window import windows

NETS = {  # class token; pyramid of shifted windows
    "deit_tiny_distilled_patch16_224": dict(dim=24, depth=1, heads=3, img_size=32),
    "swin_tiny_patch4_window7_224": dict(dim=8, depths=(2, 1), heads=(2, 2), window=2, img_size=32),
}
torch.set_num_threads(1)


def lively(model: nn.Module) -> nn.Module:
    """Weights at which every part moves the outputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.1 * torch.randn_like(p))
    return model.eval()


def small(name: str = "resnet18", **options):
    if name == "resnet18":
        options = dict(layers=(1, 1, 1, 1)) | options
    return lively(vertebra.create_model(name, **({"in_chans": 2, "num_classes": 3} | NETS.get(name, {}) | options)))


@pytest.mark.parametrize(("name", "to"), list(zip(NETS, ["torch-export", "onnx"], strict=True)))
def test_one_file_runs_at_sizes_nobody_traced(name, to, tmp_path):
    if to == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    model, path = small(name), tmp_path / ("net" + exporting.FORMATS[to])
    report = vertebra.export(model, path, to)
    assert report.dynamic == ("batch", "side 0", "side 1") and report.bytes == path.stat().st_size
    least = model.min_size
    assert {f"1x2x{least}x{least}", f"3x2x{least}x{least}", f"1x2x{least}x{2 * least + 3}"} <= set(report.errors)
    assert len(report.errors) == 8 and max(report.errors.values()) <= 1e-5
    run = vertebra.load_exported(path, trusted=True)
    assert run.format == to and run.metadata == report.metadata and run.metadata["min_size"] == least
    x = torch.randn(2, 2, least + 1, 3 * least + 5)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=1e-4)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parity_all  # a C++ compiler works on it for half a minute to a minute
@pytest.mark.parametrize("name", ["resnet18", *NETS])
def test_machine_code_runs_at_sizes_nobody_traced(name, tmp_path):
    report = vertebra.export(small(name), tmp_path / "net.pt2", "aoti")
    assert len(report.errors) == 8 and max(report.errors.values()) <= 1e-5
    assert vertebra.load_exported(tmp_path / "net.pt2", trusted=True).metadata == report.metadata


def test_maps_and_normalisation_are_in_the_file(tmp_path):
    model = small(in_chans=3, features_only=True, out_indices=(1, 3))
    path = tmp_path / "maps.pt2"
    report = vertebra.export(model, path)
    assert report.metadata["mean"] == [0.485, 0.456, 0.406] and report.metadata["features"] is True
    maps = vertebra.load_exported(path, trusted=True)(torch.randn(1, 3, 40, 64))
    assert [m.shape[1] for m in maps] == [model.feature_info[i]["num_chs"] for i in (1, 3)]
    extra = {"vertebra.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["vertebra.json"]) == report.metadata


def test_a_segmentation_network_is_one_file_for_any_size(tmp_path):
    net = vertebra.segmentation(
        "resnet18", "semantic_fpn", 4, layers=(1, 1, 1, 1), in_chans=2,
        head_options={"neck_channels": 8, "channels": 8},
    )  # fmt: skip
    report = vertebra.export(lively(net), tmp_path / "net.pt2", sides=(40, 57))
    assert report.metadata["network"] == type(net).__name__ and report.metadata["num_classes"] == 4
    assert len(report.errors) == 8 and max(report.errors.values()) <= 1e-5
    x = torch.randn(1, 2, 33, 90)
    with torch.no_grad():
        y = vertebra.load_exported(tmp_path / "net.pt2", trusted=True)(x)
        assert y.shape == (1, 4, 33, 90)
        torch.testing.assert_close(y, net(x), atol=1e-5, rtol=1e-5)


def test_blocks_of_one_stage_share_their_tables(tmp_path):
    """The tables of windows are in the program once per size and shift, however many blocks there are."""

    def counted(depth: int) -> int:
        vertebra.export(small("swin_tiny_patch4_window7_224", depths=(depth, 1)), tmp_path / "net.pt2", verify=False)
        nodes = torch.export.load(tmp_path / "net.pt2").graph.nodes
        return sum("arange" in str(node.target) for node in nodes)

    assert counted(2) == counted(4) > 0
    with one_trace():  # outside of a trace nothing changes
        assert windows((4, 4), (2, 2)) is windows((4, 4), (2, 2))


def test_a_program_refuses_what_the_model_refuses(tmp_path):
    model, path = small(), tmp_path / "net.pt2"
    vertebra.export(model, path, verify=False)
    run = vertebra.load_exported(path, trusted=True)
    assert run(torch.randn(1, 2, 32, 32)).shape == (1, 3)
    for shape, needed in [
        ((1, 2, 31, 32), "every side must be at least 32"),
        ((1, 3, 32, 32), r"\(B, 2, \*S\) with 2 sizes"),
        ((1, 2, 32), r"\(B, 2, \*S\) with 2 sizes"),
    ]:
        with pytest.raises(ValueError, match=needed):
            run(torch.randn(shape))


@pytest.mark.parametrize("name", NETS)
def test_sizes_that_are_multiples(name, tmp_path):
    model, path = small(name), tmp_path / "net.pt2"
    report = vertebra.export(model, path, multiple=16)
    shapes = ["32x32", "48x80", "16x16", "16x48"] if model.min_size == 16 else ["32x32", "48x80", "16x16", "16x32"]
    assert list(report.errors) == [f"{batch}x2x{size}" for size in shapes for batch in (1, 3)]
    assert max(report.errors.values()) <= 1e-5 and report.metadata["multiple"] == 16
    run = vertebra.load_exported(path, trusted=True)
    x = torch.randn(5, 2, 96, 112)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"every side must be at least \d+ and be a multiple of 16"):
        run(torch.randn(1, 2, 96, 100))
    assert next(iter(vertebra.export(model, path, multiple=24).errors)) == "1x2x48x48"
    for options, message in [
        (dict(multiple=0), "multiple is at least 1, .* got 0"),
        (dict(multiple=16, dynamic="batch"), "1 where sizes are not free .* got 16"),
        (dict(multiple=24, sides=32), r"sides \(32, 32\) are no multiples of 24"),
    ]:
        with pytest.raises(ValueError, match=message):
            vertebra.export(model, path, **options)


@pytest.mark.parametrize("least", [1, 16, 32])
@pytest.mark.parametrize("multiple", [1, 32, 100])
def test_the_traced_sides_stand_for_all(least, multiple):
    sides = exporting._traced(least, 3, multiple)
    assert all(side % multiple == 0 and side >= 9 * max(least, multiple) for side in sides)
    assert sides[0] != sides[1] != sides[2]


def test_a_static_file_has_one_shape(tmp_path):
    report = vertebra.export(small(), tmp_path / "net.pt2", dynamic=False, sides=(40, 33))
    assert report.dynamic == () and list(report.errors) == ["1x2x40x33"]
    with pytest.raises(ValueError, match="the file takes batches of 1"):
        vertebra.load_exported(tmp_path / "net.pt2", trusted=True)(torch.randn(2, 2, 40, 33))


def test_a_file_of_one_size_takes_any_batch(tmp_path):
    path = tmp_path / "net.pt2"
    report = vertebra.export(small(), path, dynamic="batch", sides=(40, 33))
    assert report.dynamic == ("batch",) and list(report.errors) == ["1x2x40x33", "3x2x40x33"]
    assert report.metadata["sizes"] == [40, 33] and report.metadata["batch"] == "any"
    with pytest.raises(ValueError, match=r"the file takes sides \(40, 33\)"):
        vertebra.load_exported(path, trusted=True)(torch.randn(1, 2, 40, 40))
    with pytest.raises(ValueError, match="dynamic is True, \"batch\" or False, got 'all'"):
        vertebra.export(small(), path, dynamic="all")


def test_weights_as_long_as_the_input_keep_it_and_say_why(tmp_path):
    options = dict(dim=4, patches=((6, 4),), top=1, hidden=8, img_size=24)
    model = small("pathformer_etth1_96", **options)
    assert type(model).EXPORT
    with pytest.raises(ExportError, match="cannot be exported to torch-export"):
        vertebra.export(model, tmp_path / "net.pt2", sides=48)
    report = vertebra.export(model, tmp_path / "net.pt2")
    assert report.dynamic == ("batch",) and list(report.errors) == ["1x2x24", "3x2x24"]


def test_a_file_that_differs_is_not_left(tmp_path, monkeypatch):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"older")
    monkeypatch.setitem(exporting.TOLERANCE, "torch-export", -1.0)
    monkeypatch.setattr(exporting, "_worst", lambda found, wanted: 0.5)
    with pytest.raises(ExportError, match=r"differs by 5\.0e-01 at 1x2x40x40"):
        vertebra.export(small(), path, dynamic=False, sides=40)
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(to="tflite"), "unknown format 'tflite'"),
        (dict(to="onnx"), r"is named \*.onnx"),
        (dict(sides=16), "at least 32"),
    ],
)
def test_what_cannot_be_asked(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        vertebra.export(small(), tmp_path / "net.pt2", **options)


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="training mode"):
        vertebra.export(small().train(), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="Linear cannot be exported"):
        vertebra.export(nn.Linear(2, 2), tmp_path / "net.pt2")


def test_untrusted_files(tmp_path):
    path = tmp_path / "net.pt2"
    vertebra.export(small(), path, dynamic=False, sides=32, verify=False)
    with pytest.raises(ValueError, match="can run code"):
        vertebra.load_exported(path)
    with pytest.raises(FileNotFoundError):
        vertebra.load_exported(tmp_path / "none.pt2")
    pytest.importorskip("onnxruntime")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="cannot open it"):
        vertebra.load_exported(tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    "wrong",
    [
        {"in_chans": None}, {"ndim": "2"}, {"min_size": 0}, {"multiple": 0}, {"batch": None}, {"batch": True},
        {"sizes": "all"}, {"sizes": [32, -1]}, {"sizes": None},
    ],
    ids=str,
)  # fmt: skip
def test_metadata_is_checked(wrong, tmp_path):
    right = {"in_chans": 3, "ndim": 2, "min_size": 32, "batch": "any", "sizes": [32, 40]}
    assert exporting._notes(json.dumps(right), tmp_path) == right | {"multiple": 1}
    with pytest.raises(ExportError, match="does not say what the file takes"):
        exporting._notes(json.dumps(right | wrong), tmp_path)
    for text in (None, "", "[]", "{"):
        with pytest.raises(ExportError, match="metadata is missing"):
            exporting._notes(text, tmp_path)


def test_worst_error_is_relative_to_each_output():
    one = torch.tensor([1.0, 2.0])
    assert exporting._worst([one, 100 * one + 2], [one, 100 * one]) == pytest.approx(0.01)
    assert exporting._worst(one * float("nan"), one) == float("inf")
    assert exporting._worst(one[:1], one) == float("inf")


def test_a_program_holds_no_cast_that_does_nothing(tmp_path):
    class Casts(nn.Module):
        def forward(self, x):
            return x.float() + x.double().float()

    x = torch.randn(3)
    program = torch.export.export(Casts(), (x,))
    exporting._drop_casts(program.graph)
    program.graph.lint()
    casts = [node.args[1] for node in program.graph.nodes if node.target is torch.ops.aten.to.dtype]
    assert casts == [torch.float64, torch.float32]
    assert not any("metadata" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), 2 * x)


def test_a_small_number_is_not_lost_in_onnx(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Shares(nn.Module):
        def forward(self, x):
            return x / (x.abs().sum(-1, keepdim=True) + 1e-12)  # onnxscript's rewriting takes it for "+ 0"

    x = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    with exporting._quiet():
        exporting._write_onnx(
            torch.export.export(Shares(), (x,)), tmp_path / "s.onnx", {"outputs": 1, "features": False}
        )
    session = onnxruntime.InferenceSession(str(tmp_path / "s.onnx"), providers=["CPUExecutionProvider"])
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), Shares()(x))


def test_the_command(tmp_path, monkeypatch, capsys):
    def vertebra_export(*options):
        monkeypatch.setattr(sys, "argv", ["vertebra", "export", "mobilenet_v2_w0_35", *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    path = tmp_path / "net.pt2"
    code, said = vertebra_export("--img-size", "64", "--multiple", "32", "--out", str(path))
    assert code == 0 and "free: batch, side 0, side 1" in said.out
    sizes = ["64x64", "96x160", "32x32", "32x96"]
    seen = [line.split()[2].rstrip(":") for line in said.out.splitlines() if line.startswith("verified")]
    assert seen == [f"{batch}x3x{size}" for size in sizes for batch in (1, 3)]
    assert vertebra.load_exported(path, trusted=True)(torch.randn(1, 3, 128, 32)).shape == (1, 1000)
    for options, message in [
        (("--static", "--multiple", "32"), "multiple is at least 1"),
        (("--to", "tflite"), "unknown format 'tflite'"),
        (("--img-size", "40", "--multiple", "32"), "sides (40, 40) are no multiples of 32"),
    ]:
        code, said = vertebra_export(*options)
        assert code == 2 and said.err.startswith("error: ") and message in said.err
