"""vertebra bench: what its figures are made of, files in and out, what it refuses; no absolute time is asserted."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import vertebra
from vertebra import cli
from vertebra.inspect import bench as bench_module
from vertebra.inspect import bench_figures, bench_report, count_macs, peers
from vertebra.inspect.bench import Settings, bench, resolve_names, smallest_of_families
from vertebra.inspect.bench_figures import COLUMNS
from vertebra.inspect.bench_report import read_rows, write_rows

TIMM = [  # the columns of timm's benchmark.py
    *("model", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "infer_img_size", "infer_gmacs"),
    *("train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count"),
]
TINY = "shufflenet_v2_x0_5"
QUICK = Settings(batch=2, img_size=32, rounds=1, threads=1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(bench_module, "WARM_UP", 0)
    monkeypatch.setattr(bench_module, "MATMUL_SIDE", {"cpu": 16, "cuda": 16})


# --- figures from given times ----------------------------------------------------------------------------------------

TIMES = {
    "infer float32": [2.0, 4.0, 8.0],
    "deploy float32": [1.0, 2.0, 5.0],
    "peer float32": [6.0, 4.0, 16.0],
    "deploy bfloat16": [0.5, 1.0, 1.0],
    "infer bfloat16": [1.0, 2.0, 3.0],
    "matmul float32": [0.5, 1.0, 1.0],
    "matmul bfloat16": [0.25, 0.25, 0.25],
}
ALONE = {"infer float32": [0.3, 0.2, 0.5], "peer float32": [0.3, 0.3, 0.3], "deploy float32": [0.1, 0.1, 0.2]}


def test_ratios_are_medians_of_the_rounds_own_ratios():
    row = bench_figures.inference_figures("float32", TIMES, ALONE, 8, macs=5e9, matmul_macs=1e10)
    assert row["infer_ratio"] == 2.0  # of 3, 1, 2; the ratio of the medians would be 1.5
    assert row["deploy_ratio"] == pytest.approx(3.2)  # of 6, 2, 3.2
    assert row["deploy_ratio_float32"] == row["deploy_ratio"]
    assert row["latency_ratio"] == pytest.approx(1.0) and row["infer_latency"] == pytest.approx(300)
    assert row["deploy_latency_ratio"] == pytest.approx(3.0)
    assert row["infer_samples_per_sec"] == 2.0 and row["infer_step_time"] == 4000
    assert row["peer_infer_samples_per_sec"] == pytest.approx(8 / 6) and row["peer_infer_latency"] == 300
    # 8 samples of 5e9 in 2, 4, 8 s beside 1e10 in 0.5, 1, 1 s: 4/4 of it, 4/4, 2/4
    assert row["infer_matmul_share"] == pytest.approx(1.0)
    assert row["matmul_gmacs_per_sec"] == pytest.approx(10.0)


def test_a_lower_precision_is_set_beside_the_peers_float32():
    row = bench_figures.inference_figures("bfloat16", TIMES, {}, 8, macs=5e9, matmul_macs=1e10)
    assert row["deploy_ratio_float32"] == 12.0  # of 12, 4, 16
    assert "deploy_ratio" not in row and "infer_ratio" not in row and "infer_latency" not in row


def test_a_deployed_network_is_set_beside_the_peer_as_it_is_deployed():
    times = TIMES | {"merged float32": [3.0, 2.0, 4.0]}
    row = bench_figures.inference_figures("float32", times, ALONE, 8, macs=5e9, matmul_macs=1e10)
    plain = bench_figures.inference_figures("float32", TIMES, ALONE, 8, macs=5e9, matmul_macs=1e10)
    assert row["peer_deploy_step_time"] == 3000
    ours = times["deploy float32"]
    assert row["deploy_ratio"] == row["deploy_ratio_float32"] == sorted(a / b for a, b in zip([3, 2, 4], ours))[1]
    assert row["deploy_ratio"] < plain["deploy_ratio"] and row["infer_ratio"] == plain["infer_ratio"]
    assert row["deploy_latency_ratio"] == plain["deploy_latency_ratio"]  # of one sample no merged peer was timed


def test_a_peer_is_merged_where_its_library_can():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("repvgg_a0", num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    merged = peers.merged(net)
    assert merged is not None and sum(1 for _ in merged.modules()) < sum(1 for _ in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(x), net(x), atol=1e-4, rtol=1e-4)
    assert peers.merged(timm.create_model("resnet18")) is None
    assert peers.merged(nn.Linear(2, 2)) is None


def test_training_counts_three_inferences():
    times = {"train float32": [6.0, 6.0, 12.0], "peer float32": [9.0, 6.0, 6.0], "matmul float32": [1.0, 1.0, 1.0]}
    row = bench_figures.training_figures("float32", times, 4, macs=5e9, matmul_macs=1e10)
    assert row["train_ratio"] == 1.0 and row["train_samples_per_sec"] == pytest.approx(4 / 6)
    assert row["train_matmul_share"] == pytest.approx(1.0)  # 60e9 in 6 s beside 10e9 in 1 s


def test_memory_ratios_are_ours_over_theirs():
    row = {"infer_peak_mib": 3.0, "peer_infer_peak_mib": 4.0, "train_peak_mib": 3.0}
    assert bench_figures.memory_ratios(row) == {"infer_peak_ratio": 0.75}


def test_rounds_alternate_and_the_first_ones_do_not_count(monkeypatch):
    monkeypatch.setattr(bench_module, "WARM_UP", 2)
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = bench_module.paired(calls, 2, torch.device("cpu"))
    assert "".join(order) == "abba" * 2 and [len(t) for t in times.values()] == [2, 2]


# --- which networks ---------------------------------------------------------------------------------------------------


def test_names_families_and_patterns():
    assert resolve_names(["swin"]) == vertebra.list_models(family="swin")
    assert resolve_names(["pvt_v2_b*", "pvt_v2_b0", "resnet18"]) == [*vertebra.list_models("pvt_v2_b*"), "resnet18"]
    assert resolve_names(["crossformer_tiny"]) == ["crossformer_tiny"]
    with pytest.raises(ValueError, match="no model matches 'zzz"):
        resolve_names(["zzz*"])
    with pytest.raises(ValueError, match=r"did you mean.*resnet18"):
        resolve_names(["resnet81"])


def test_one_smallest_variant_of_each_family():
    names = smallest_of_families()
    infos = [vertebra.model_info(name) for name in names]
    assert [i.family for i in infos] == vertebra.list_families()
    for info in infos:
        sizes = [vertebra.model_info(n).published["params_m"] for n in vertebra.list_models(family=info.family)]
        assert info.published["params_m"] == min(sizes)
    with_peer = dict(zip(vertebra.list_families(), smallest_of_families(True), strict=True))
    assert with_peer["convnext"] == "convnext_tiny"  # its smallest, an isotropic one, has no peer
    assert with_peer["mobilevit"] == "mobilevit_xx_small" and with_peer["biformer"] == "biformer_tiny"


def test_every_name_of_a_peer_exists():
    import timm
    import torchvision

    for ours, theirs in peers.PEERS.items():
        assert vertebra.model_info(ours)
        library, _, name = theirs.rpartition(".")
        known = torchvision.models.list_models() if library else timm.list_models()
        assert name in known, (ours, theirs)


@pytest.mark.parametrize(
    "wrong",
    [{"precision": ("int8",)}, {"precision": ("float32",) * 2}, {"precision": ()}, {"device": "tpu"}, {"batch": 0}],
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    settings = dataclasses.replace(QUICK, train=True, against="timm")
    names = [TINY, "mobilenet_v2_w0_35"]
    run = bench(names, settings, tmp_path)
    first = next(run)
    run.close()  # killed after one row
    header, line = csv.reader((tmp_path / "bench.csv").read_text().splitlines())
    assert header == list(COLUMNS) and header[: len(TIMM)] == TIMM and line[0] == TINY
    model = vertebra.create_model(TINY)
    assert first["infer_gmacs"] == count_macs(model, (1, 3, 32, 32)) / 1e9
    assert first["param_count"] == sum(p.numel() for p in model.parameters()) / 1e6
    assert first["peer"] == "torchvision.shufflenet_v2_x0_5" and first["peer_weights"] == "equal"
    assert first["ratios_of"] == "paired" and first["error"] is None and first["top1"] == 60.552
    for key in ("infer_ratio", "latency_ratio", "train_ratio", "infer_peak_ratio", "train_matmul_share"):
        assert first[key] > 0
    assert first["train_peak_mib"] > first["infer_peak_mib"] > 0

    measured = []
    real = bench_module.measure
    monkeypatch.setattr(bench_module, "measure", lambda name, s: measured.append(name) or real(name, s))
    rows = list(bench(names, settings, tmp_path))
    assert measured == names[1:] and [row["model"] for row in rows] == names
    assert rows[1]["peer"] is None and rows[1]["infer_samples_per_sec"] > 0
    again = read_rows(tmp_path / "bench.csv")
    assert [row["model"] for row in again] == names
    assert again[0]["infer_ratio"] == pytest.approx(first["infer_ratio"], rel=1e-5)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))

    facts = json.loads((tmp_path / "bench.json").read_text())
    assert facts["settings"]["rounds"] == 1 and facts["machine"]["torch"] == torch.__version__
    assert not {"host", "hostname", "node", "user"} & set(facts["machine"])
    with pytest.raises(ValueError, match="rows measured with rounds 1, now 2; give another --out"):
        list(bench(names, dataclasses.replace(settings, rounds=2), tmp_path))
    monkeypatch.setattr(bench_module, "machine_facts", lambda s: facts["machine"] | {"torch": "1.0"})
    with pytest.raises(ValueError, match="rows measured with torch"):
        list(bench(names, settings, tmp_path))


def test_a_network_that_fails_is_a_row_and_is_tried_again(tmp_path, monkeypatch):
    def fail(name, settings):
        raise RuntimeError("no\nmemory")

    monkeypatch.setattr(bench_module, "_Bench", fail)
    (row,) = bench([TINY], QUICK, tmp_path)
    assert row["error"] == "RuntimeError: no memory" and row["infer_samples_per_sec"] is None
    assert read_rows(tmp_path / "bench.csv")[0]["error"] == "RuntimeError: no memory"
    monkeypatch.undo()
    monkeypatch.setattr(bench_module, "MATMUL_SIDE", {"cpu": 16})
    (row,) = bench([TINY], QUICK, tmp_path)
    assert row["error"] is None and len(read_rows(tmp_path / "bench.csv")) == 1


def test_networks_of_other_ranks_and_without_classes():
    # a forecaster that routes by its data, and a network that gives maps
    for name, size in (("pathformer_etth1_96", None), ("vit_adapter_tiny_augreg_seg", 64)):
        (row,) = bench([name], dataclasses.replace(QUICK, train=True, batch=1, img_size=size))
        assert row["error"] is None and row["train_samples_per_sec"] > 0, row["error"]
        assert row["infer_gmacs"] > 0 and row["infer_img_size"] == (size or 96)


# --- files ------------------------------------------------------------------------------------------------------------

GOOD = dict.fromkeys(COLUMNS) | {
    "model": TINY,
    "family": "shufflenet",
    "precision": "float32",
    "infer_samples_per_sec": 20.0,
    "infer_batch_size": 8,
    "infer_img_size": 224,
    "infer_latency": 30.0,
    "infer_peak_mib": 6.0,
    "train_samples_per_sec": 5.0,
}


def test_rows_read_back_as_written(tmp_path):
    write_rows(tmp_path / "a.csv", [GOOD, GOOD | {"precision": "bfloat16", "error": 'RuntimeError: a, "b"'}])
    first, second = read_rows(tmp_path / "a.csv")
    assert first == GOOD and second["error"] == 'RuntimeError: a, "b"'


def test_ratios_to_an_earlier_table():
    old = GOOD | {
        "infer_samples_per_sec": 10.0,
        "infer_latency": 60.0,
        "infer_peak_mib": 8.0,
        "train_samples_per_sec": 4.0,
    }
    gained = bench_figures.against_rows(GOOD | {"deploy_samples_per_sec": 40.0, "deploy_latency": 10.0}, [old])
    assert gained["ratios_of"] == "different runs" and gained["peer"] == TINY
    assert (gained["infer_ratio"], gained["latency_ratio"], gained["train_ratio"]) == (2.0, 2.0, 1.25)
    assert (gained["deploy_ratio"], gained["deploy_latency_ratio"]) == (4.0, 6.0)
    assert gained["infer_peak_ratio"] == 0.75 and gained["peer_infer_samples_per_sec"] == 10.0
    for other in ({"precision": "bfloat16"}, {"infer_img_size": 192}, {"infer_batch_size": 1}, {"model": "resnet18"}):
        assert bench_figures.against_rows(GOOD, [old | other]) == {}
    timms = dict.fromkeys(COLUMNS) | {"model": "gcvit_tiny", "infer_samples_per_sec": 10.0}  # says no precision
    assert bench_figures.against_rows(GOOD | {"model": "gc_vit_tiny"}, [timms])["infer_ratio"] == 2.0


HEAD = "model,precision,infer_samples_per_sec\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no column model"),
        (b"model,precision\nx,float32\n", "no column infer_samples_per_sec"),
        (b"model,model,infer_samples_per_sec\na,b,1\n", "a column twice"),
        (b"\xff\xfe\x00", "not a csv file"),
        ((HEAD + '"a,float32,1').encode(), "not a csv file"),
        ((HEAD + "a,float32\n").encode(), "row 2: 2 cells under 3 columns"),
        ((HEAD + ",float32,1\n").encode(), "row 2: no model"),
        ((HEAD + "a,float32,nan\n").encode(), "not a positive number"),
        ((HEAD + "a,float32,inf\n").encode(), "not a positive number"),
        ((HEAD + "a,float32,-1\n").encode(), "not a positive number"),
        ((HEAD + "a,float32,0\n").encode(), "not a positive number"),
        ((HEAD + f"a,float32,{'9' * 5000}\n").encode(), "not a positive number"),
        ((HEAD + "=cmd(),float32,1\n").encode(), "which is no name"),
        ((HEAD + "a\x1b[2J,float32,1\n").encode(), "which is no name"),
        ((HEAD + "a" * 300 + ",float32,1\n").encode(), "which is no name"),
        ((HEAD + "a,float32,1\na,float32,2\n").encode(), "a twice at the same precision"),
    ],
)
def test_tables_that_are_none_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "old.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_report, "LARGEST", 2**20)
    (tmp_path / "old.csv").write_bytes(b"a" * (2**20 + 1))
    with pytest.raises(ValueError, match="more than 1 MiB"):
        read_rows(tmp_path / "old.csv")


@pytest.mark.parametrize("content", ["", "[]", '{"settings": 3, "machine": {}}', "[" * 100_000])
def test_a_folder_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(ValueError, match="not written by vertebra bench"):
        next(bench([TINY], QUICK, tmp_path))
    assert (tmp_path / "bench.json").read_text() == content


def test_command_line(tmp_path, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["vertebra", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, *capsys.readouterr()

    old = tmp_path / "old.csv"
    write_rows(old, [GOOD | {"infer_batch_size": 2, "infer_img_size": 32}])
    quick = ("--batch", 2, "--img-size", 32, "--rounds", 1, "--threads", 1)
    code, out, _ = run(TINY, *quick, "--against", old, "--out", tmp_path / "new")
    assert code == 0 and TINY in out and str(tmp_path / "new" / "bench.csv") in out
    (row,) = read_rows(tmp_path / "new" / "bench.csv")
    assert row["ratios_of"] == "different runs"
    assert row["infer_ratio"] == pytest.approx(row["infer_samples_per_sec"] / 20, rel=1e-4)
    for words, said in (
        ((), "--families"),
        (("resnet81",), "did you mean"),
        ((TINY, "--precision", "int4"), "int4"),
        ((TINY, *quick, "--against", tmp_path / "none.csv"), "none.csv: No such file"),
        ((TINY, *quick, "--out", tmp_path / "new"), "rows measured with against"),
    ):
        code, out, err = run(*words)
        assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_inspect_needs_neither_timm_nor_matplotlib():
    code = (
        "import sys\nfor name in ('timm', 'torchvision', 'matplotlib'): sys.modules[name] = None\n"
        "from vertebra.inspect import bench, bench_report, peers\n"
        "assert not bench.resolve_names(['resnet18']) == []\n"
        "try:\n    peers.peer_model('resnet18')\nexcept ValueError as e:\n    print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "comparing with timm needs timm: pip install timm"
