import csv
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vertebra
from vertebra.data import open_source
from vertebra.train import Config, ConfigError, Run, RunError, TrainError, evaluate, fit, predict, resume
from vertebra.train.watch import Watch


class StopIn(Watch):
    """Interrupts in the middle of an epoch (numbered from 1)."""

    def __init__(self, epoch):
        self.left = epoch * 4 - 2  # four steps an epoch

    def step(self, loss):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


EVERYTHING = {  # that a recipe can switch on, and that could remember something from step to step
    "opt_options": {"betas": [0.9, 0.99]},
    "lr_base_batch": 50,
    "layer_decay": 0.8,
    "schedule": "onecycle",
    "min_lr": 1e-6,
    "warmup_epochs": 1,
    "clip_mode": "agc",
    "accumulate": 2,
    "ema": 0.9,
    "ema_warmup": False,
    "mixup": 0.4,
    "cutmix": 1.0,
    "mix_prob": 0.8,
    "mixup_off_epoch": 2,
    "augment": "standard",
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.5,
    "color_jitter": 0.3,
    "hflip": 0.3,
    "vflip": 0.3,
    "scale": [0.5, 1.0],
    "ratio": [0.8, 1.2],
    "repeats": 2,
    "workers": 2,
}


def same(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def timeless(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


@pytest.mark.parametrize(
    "extra",
    [{}, {"ema": 0.9, "mixup": 0.4, "augment": "strong", "workers": 2}, EVERYTHING],
    ids=["plain", "all", "everything"],
)
def test_resumed_is_bit_identical(tiny, tmp_path, extra):
    config = Config(**tiny | extra)
    whole = fit(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "broken", StopIn(2))
    torch.manual_seed(99)  # another process would have other random numbers
    resumed = resume(tmp_path / "broken")
    for name in ("last.safetensors", "best.safetensors"):
        assert same(tmp_path / "whole" / name, tmp_path / "broken" / name)
    states = [Run.open(tmp_path / name).read_state() for name in ("whole", "broken")]
    assert states[0]["epoch"] == 3 and states[0]["step"] == states[1]["step"] == 12
    for part in ("model", "ema"):
        a, b = (state[part] or {} for state in states)
        assert all(torch.equal(a[key], b[key]) for key in a)
    moments = [state["optimizer"]["state"] for state in states]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[0])
    assert timeless(whole.history) == timeless(resumed.history)
    assert whole.test_accuracy == resumed.test_accuracy


def test_another_seed_is_another_run(tiny, finished, tmp_path):
    other = fit(Config(**tiny | {"seed": 1, "epochs": 1}), tmp_path)
    assert other.history[0]["train_loss"] != finished.history[0]["train_loss"]


def test_what_a_run_leaves(finished):
    folder = finished.folder
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == finished.history and [row["epoch"] for row in rows] == [1, 2, 3]
    with open(folder / "metrics.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert [float(row["val_loss"]) for row in table] == [row["val_loss"] for row in rows]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert finished.best_epoch == best["epoch"] and finished.val_accuracy == best["val_accuracy"]
    result = json.loads((folder / "result.json").read_text())
    assert result["test_accuracy"] == finished.test_accuracy and result["test_samples"] == 100
    config = json.loads((folder / "config.json").read_text())["config"]
    open_ones = {"max_skipped", "checkpoint", "layer_decay", "ema", "teacher", "teacher_checkpoint"}
    open_ones |= {"lr_base_batch", "min_lr", "warmup_lr", "warmup_epochs", "decay_epochs", "decay_rate"}
    open_ones |= {"mixup_off_epoch", "auto_augment", "random_erasing", "color_jitter"}
    open_ones |= {"hflip", "vflip", "scale", "ratio"}
    dense = {"head", "ignore", "max_size", "scale_jitter", "window", "stride", "iterations"}  # nothing of labels
    assert {key for key, value in config.items() if value is None} == open_ones | dense
    report = (folder / "report.html").read_text()
    assert f"{finished.test_accuracy:.2%}" in report and report.count("data:image/png;base64,") == 2 + 24
    assert "http" not in report.replace("crossformer", "")  # nothing outside it is needed
    assert not list(folder.glob(".*")) and not list(folder.glob("*.tmp"))


def test_weights_load_into_the_plain_model(finished, tiny):
    model = vertebra.create_model(tiny["model"], in_chans=1, num_classes=10, img_size=32, **tiny["overrides"])
    vertebra.load_checkpoint(model, finished.folder / "best.safetensors")
    expected = load_file(finished.folder / "best.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_evaluate_and_predict_agree_with_the_run(finished, tiny, tmp_path):
    result = evaluate(finished.folder)
    assert result.accuracy == finished.test_accuracy and result.samples == 100
    assert sum(map(sum, result.confusion)) == 100 and all(c["samples"] == 10 for c in result.classes.values())
    split = open_source("digits", tiny["limit"]).splits["test"]
    paths = [tmp_path / str(label) / f"{i}.png" for i, label in enumerate(split.labels)]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(split.read(i)[0].numpy()).save(path)
    predictions = predict(finished.folder, [*paths, tmp_path / "nothing.png"], top=10)
    right = [p.top[0][0] == str(label) for p, label in zip(predictions, split.labels)]
    assert sum(right) / 100 == result.accuracy
    assert all(abs(sum(q for _, q in p.top) - 1) < 1e-5 and len(p.top) == 10 for p in predictions[:-1])
    assert predictions[-1].error and not predictions[-1].top
    (tmp_path / "3" / "bad.png").write_bytes(b"bad")
    moved = evaluate(finished.folder, str(tmp_path))
    assert (moved.accuracy, moved.confusion) == (result.accuracy, result.confusion)
    assert list(moved.skipped) == [str(tmp_path / "3" / "bad.png")]


def make_folder(root, n=12):
    for k, name in enumerate(("dark & <b>", "light")):
        (root / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (48, 40), (150 * k + i, 150 * k, 100)).save(root / name / f"{i}.png")


def test_folder_with_a_picture_cut_off(tiny, tmp_path):
    data = tmp_path / "data"
    make_folder(data)
    source = open_source(str(data))
    cut = data / source.splits["train"].names[0]
    noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:3000])  # the header is whole: only reading the pixels can tell
    notes = []

    class Listen(Watch):
        def note(self, text):
            notes.append(text)

    config = Config(**tiny | {"data": str(data), "img_size": 40, "batch_size": 8, "limit": None, "epochs": 2})
    result = fit(config, tmp_path / "run", Listen())
    assert list(result.skipped) == [str(cut)] and "truncated" in result.skipped[str(cut)]
    assert sum(note.startswith(f"skipped {cut}") for note in notes) == 1
    report = (result.folder / "report.html").read_text()
    assert "Skipped files: 1" in report and "dark &amp; &lt;b&gt;" in report and "<b>" not in report
    resolved = Run.open(result.folder).config
    assert (resolved.channels, resolved.mean) == (3, vertebra.model_info(tiny["model"]).inputs.mean)
    (data / "light" / "new.png").write_bytes((data / "light" / "0.png").read_bytes())
    with pytest.raises(RunError, match="not the data of"):
        resume(result.folder)


def test_diverging_stops_with_step_and_rate(tiny, tmp_path):
    config = Config(**tiny | {"opt": "sgd", "lr": 1e30, "warmup": 0.0, "clip": 1e30})
    with pytest.raises(TrainError, match=r"the loss is (nan|inf) at step \d+ \(epoch 1, learning rate \d.*e\+\d\d\)"):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(RunError, match="no epoch was finished"):
        resume(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "crosformer_tiny", "overrides": {}},
            "unknown model 'crosformer_tiny'; did you mean crossformer_tiny",
        ),
        ({"img_size": 16}, "32"),
        ({"overrides": {"depht": 3}}, "'depht'"),
        ({"opt": "adamv"}, "did you mean adam"),
        ({"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}, "mean and std need 1 values each"),
    ],
)
def test_configurations_that_cannot_work(tiny, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message) as error:
        fit(Config(**tiny | change), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_rgb_and_checkpoint(tiny, finished, tmp_path):
    checkpoint = str(finished.folder / "last.safetensors")
    config = Config(**tiny | {"channels": 1, "checkpoint": checkpoint, "epochs": 1, "lr": 1e-6})
    tuned = fit(config, tmp_path / "tuned")
    assert abs(tuned.val_accuracy - finished.history[-1]["val_accuracy"]) <= 0.05
    colour = fit(Config(**tiny | {"channels": 3, "epochs": 1}), tmp_path / "colour")
    assert Run.open(colour.folder).config.channels == 3 and math.isfinite(colour.history[0]["val_loss"])


def test_a_run_is_never_overwritten(tiny, finished):
    with pytest.raises(RunError, match="holds a run already"):
        fit(Config(**tiny), finished.folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1", b'{"config": {"model": 3}, "data": {}}', b"\xff\xfe"])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json: cannot be used"):
        Run.open(tmp_path)


def test_damaged_state(finished, tmp_path):
    for name in ("config.json", "last.pt"):
        content = (finished.folder / name).read_bytes()
        (tmp_path / name).write_bytes(content if name == "config.json" else content[: len(content) // 2])
    with pytest.raises(RunError, match=r"last\.pt: cannot be read"):
        resume(tmp_path)


def test_the_loss_is_the_configurations(tiny, finished, tmp_path):
    """Focal loss without focus is the default, cross entropy; with focus it is smaller from the first step on."""
    plain, focused = (
        fit(Config(**tiny | {"loss": "focal", "loss_options": {"gamma": gamma}}), tmp_path / str(gamma))
        for gamma in (0.0, 2.0)
    )
    assert plain.history[0]["train_loss"] == pytest.approx(finished.history[0]["train_loss"], rel=1e-5)
    assert focused.history[0]["train_loss"] < 0.9 * plain.history[0]["train_loss"]


def test_a_loss_that_reads_several_outputs(tiny, tmp_path):
    """RepNeXt has a head for the label and one for a teacher; without a teacher both can learn from the label."""
    few = {"dim": 8, "depths": [1, 1, 1, 1]}
    config = tiny | {"model": "repnext_m0", "overrides": few, "drop_path_rate": None, "epochs": 1}
    heads = {"loss": "mean_of_heads", "loss_options": {"heads": ["class_logits", "dist_logits"]}}
    assert math.isfinite(fit(Config(**config | heads), tmp_path / "run").history[0]["train_loss"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "focl"}, "loss: unknown loss 'focl'; did you mean focal"),
        ({"loss_options": {"gamma": 2}}, "loss: cross_entropy has no option 'gamma'"),
        ({"loss": "soft_distillation"}, "loss: the outputs lack teacher_logits: they have logits"),
    ],
)
def test_losses_that_cannot_be_used(tiny, tmp_path, settings, words):
    with pytest.raises(ConfigError, match=words) as error:
        fit(Config(**tiny | settings), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
