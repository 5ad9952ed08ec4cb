"""Runs as YAML files: what wins, what is said of a wrong one, and the shipped recipes against what papers say."""

from __future__ import annotations

import dataclasses
import json
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vertebra
from vertebra import cli
from vertebra.data import open_source
from vertebra.data.loader import TrainOrder
from vertebra.data.transforms import Extras, View, train_transform
from vertebra.train import Config, ConfigError, build_config, fit, recipes
from vertebra.train.build import make_transforms, resolve
from vertebra.train.loop import mix
from vertebra.train.reading import read_config, read_recipe


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """An image folder of two classes, grey and flat."""
    root = tmp_path_factory.mktemp("flowers")
    draw = np.random.default_rng(0)
    for name in ("rose", "tulip"):
        (root / name).mkdir()
        for i in range(12):
            Image.fromarray(draw.integers(0, 255, (40, 48, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_the_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(
        tmp_path, "model: resnet18\nlr: 1e-3\nepochs: 7\noverrides: {zero_init_residual: true}\nbatch_size: 32\n"
    )
    config = build_config({"epochs": 3}, ["batch_size=16", "overrides.groups=1", "opt_options.eps=1e-7"], path)
    assert (config.lr, config.epochs, config.batch_size, config.seed) == (1e-3, 3, 16, 0)
    assert config.overrides == {"zero_init_residual": True, "groups": 1} and config.opt_options == {"eps": 1e-7}
    other = build_config({"model": "resnet34"}, ["overrides.groups=1"], path)
    assert (other.model, other.overrides, other.lr) == ("resnet34", {"groups": 1}, 1e-3)
    assert build_config({}, ["model=resnet34"], path).overrides == {}
    assert build_config({"model": "resnet18"}, (), path).overrides == {"zero_init_residual": True}
    assert build_config({}, (), write(tmp_path, "# nothing\n")) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: resnet18\n\nepoch: 3\n", "line 3: unknown setting 'epoch'; did you mean epochs?"),
        ("epochs: many\n", "line 1: epochs: input should be a valid integer.*got 'many'"),
        ("seed: 1\nepochs: 0\n", "line 2: epochs: input should be greater than 0, got 0"),
        ("epochs: on\n", "line 1: epochs: value error, true, false.*got True"),
        ("ema: off\n", "line 1: ema: .*got False"),
        ("epochs: 3\nlr: 1\nepochs: 4\n", "line 3: 'epochs' is there twice, first in line 1"),
        ("overrides:\n  dim: 3\n  dim: 4\n", r"line 3: 'overrides\.dim' is there twice, first in line 2"),
        ("mean: [0.1, x]\n", r"line 1: mean\.1: .*got 'x'"),
        ("augment: heavy\n", "line 1: augment: input should be 'none'"),
        ("scale: [0.9, 0.5]\n", "line 1: scale: value error, the smaller number comes first"),
        ("ratio: 3\n", "line 1: ratio: input should be a valid tuple"),
        ("a: &x [1]\nb: *x\n", r"line 1: YAML aliases"),
        ("epochs: [1\n", "line 2: not YAML that can be read"),
        ("- epochs\n", "expected key: value lines, got list"),
        ("3: 4\n", "line 1: unknown setting 3"),
        ("model: !!python/object/apply:os.system [true]\n", "line 1: not YAML that can be read"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as error:
        build_config({}, (), path)
    assert str(error.value).startswith(f"{path}") and "\n" not in str(error.value)


def test_files_that_are_not_there_or_too_large(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        build_config({}, (), tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="too large"):
        build_config({}, (), write(tmp_path, "#" * (2**20 + 1)))
    with pytest.raises(ConfigError, match="unknown recipe 'deti'; did you mean deit"):
        build_config({}, (), recipe="deti")
    with pytest.raises(ConfigError, match="cannot be given together"):
        build_config({}, (), write(tmp_path, ""), "deit")


def test_a_run_can_be_given_back(finished):
    given = json.loads((finished.folder / "config.json").read_text())["config"]
    config = build_config({}, (), finished.folder / "config.json")
    assert config == Config(**given) and config.mean is not None
    assert read_config(finished.folder / "config.json").lines[("model",)] == 3


def test_the_command_line_takes_and_lists_them(tiny, tmp_path, capsys, monkeypatch):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["vertebra", *map(str, args)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0, *capsys.readouterr()

    code, out, _ = call("recipes")
    assert code == 0 and all(f" {name} " in out and about in out for name, about in recipes().items())
    assert call("train", "--recipe", "list") == (0, out, "")
    path = write(tmp_path, json.dumps(tiny | {"epochs": 5}))
    code, out, err = call("train", "--config", path, "--epochs", 1, "--out", tmp_path / "run")
    assert (code, err) == (0, "") and "epoch   1/1" in out
    path = write(tmp_path, "epoch: 3\n")
    assert call("train", "--config", path) == (
        2,
        "",
        f"error: {path}, line 1: unknown setting 'epoch'; did you mean epochs?\n",
    )
    code, _, err = call("train", "--resume", tmp_path / "run", "--recipe", "deit")
    assert code == 2 and "--resume takes its configuration from the run" in err
    quick = [part for key in ("model", "limit", "threads") for part in (f"--{key}", tiny[key])]
    small = [part for key, v in tiny["overrides"].items() for part in ("--set", f"overrides.{key}={v}")]
    code, out, err = call("lr-range", *quick, *small, "--steps", 10, "--out", tmp_path / "range")
    assert (code, err) == (0, "") and str(tmp_path / "range" / "lr_range.png") in out


DENSE = ("segmentation", "detection")  # these recipes are in test_dense_recipes.py
OTHERS = [name for name in sorted(recipes()) if read_recipe(name).values.get("task") not in DENSE]


@pytest.fixture(scope="module")
def beats(tmp_path_factory):
    """Ten patients with eight beats each, of two classes."""
    path, draw = tmp_path_factory.mktemp("beats") / "beats.npz", np.random.default_rng(0)
    record = np.repeat(np.arange(10), 8)
    np.savez(path, x=draw.normal(size=(80, 64)), y=np.tile([0, 1], 40), record=record, rr=draw.random((80, 2)) + 0.5)
    return path


@pytest.mark.parametrize("name", OTHERS)
def test_every_shipped_recipe_resolves(name, flowers, beats):
    """For its own model, with the figures filled in; and what prepares the images runs."""
    given = read_recipe(name)
    data = {"signals": "digits", "beats": beats}.get(name, flowers)
    config = build_config({}, [f"data={data}"], recipe=name)
    assert config.model in vertebra.list_models() or config.model == "composed"
    source = open_source(config.data, **config.data_options)
    done = resolve(config, source)
    for key, value in given.values.items():
        if value is not None and key not in ("drop_path_rate", "scale", "ratio") and not isinstance(value, dict | str):
            assert getattr(done, key) == value
    published = vertebra.model_info(config.model).published.get("drop_path", 0.0) if config.model != "composed" else 0.0
    if config.drop_path_rate == "published":
        assert done.drop_path_rate == published
    torch.manual_seed(0)
    image = make_transforms(done)[0](source.splits["train"].read(0))
    assert image.shape == (done.channels, *done.sides) and bool(torch.isfinite(image).all())


def test_recipes_say_what_the_papers_say():
    def of(name):
        return build_config({}, (), recipe=name)

    deit = of("deit")
    assert (deit.epochs, deit.lr, deit.lr_base_batch, deit.weight_decay, deit.warmup_epochs) == (
        300,
        5e-4,
        512,
        0.05,
        5,
    )
    assert (deit.mixup, deit.cutmix, deit.random_erasing, deit.repeats, deit.label_smoothing) == (
        0.8,
        1.0,
        0.25,
        3,
        0.1,
    )
    assert (deit.auto_augment, deit.clip, deit.ema, deit.scaled_lr) == ("rand-m9-mstd0.5-inc1", None, None, 1e-3)
    crossformer = of("crossformer")
    assert (crossformer.warmup_epochs, crossformer.clip, crossformer.epochs) == (20, 5.0, 300)
    light, dual = of("lightvit"), of("dualtoken_vit")
    for one in (light, dual):
        assert (one.scaled_lr, one.weight_decay, one.warmup_epochs, one.mixup, one.cutmix) == (1e-3, 0.04, 20, 0.2, 1.0)
    mobile = of("mobilevit")
    assert (mobile.lr, mobile.warmup_lr, mobile.weight_decay, mobile.ema) == (2e-3, 2e-4, 0.01, 0.9995)
    assert mobile.mixup == mobile.cutmix == 0 and mobile.auto_augment is None and mobile.drop_path_rate is None
    repvgg, resnet = of("repvgg"), of("resnet")
    assert (repvgg.opt, repvgg.lr, repvgg.schedule, repvgg.batch_size, repvgg.epochs) == (
        "momentum",
        0.1,
        "cosine",
        256,
        120,
    )
    assert (resnet.lr, resnet.schedule, resnet.decay_epochs, resnet.epochs, resnet.weight_decay) == (
        0.1,
        "step",
        30,
        90,
        1e-4,
    )
    assert of("mobilenet_v2").decay_rate == 0.98 and of("mobilenet_v2").lr == 0.045
    assert of("swin").scaled_lr == of("pvt_v2").scaled_lr == of("fastvit").scaled_lr == 1e-3
    assert (of("transnext").clip, of("caformer").opt, of("fastvit").mixup) == (1.0, "lamb", 0.2)


@pytest.mark.parametrize("name", ["lightvit", "mobilevit", "resnet", "caformer"])
def test_a_step_of_a_recipe(name, tiny, tmp_path):
    """The settings of four different kinds on a narrow network: optimizer, schedule and augmentation work together."""
    quick = {key: tiny[key] for key in ("model", "overrides", "data", "threads", "accelerator")}
    settings = ["limit=20", "epochs=1", "batch_size=20", "img_size=32", "channels=1"]
    result = fit(build_config(quick, settings, recipe=name), tmp_path / "run")
    assert np.isfinite(result.history[0]["train_loss"])


# the parts that recipes are made of


def test_repeated_augmentation():
    order = TrainOrder(10, 5, 3, repeats=3)
    order.epoch = 4
    keys = [key for batch in order for key in batch]
    assert len(keys) == 10 and len(set(keys)) == 10 and {key[0] for key in keys} == {4}
    samples = [key[1] for key in keys]
    assert samples == sorted(samples, key=samples.index)  # the copies of a sample lie side by side
    assert [samples.count(i) for i in dict.fromkeys(samples)] == [3, 3, 3, 1]
    first = TrainOrder(10, 5, 3)
    first.epoch = 4
    assert list(dict.fromkeys(samples)) == [key[1] for batch in first for key in batch][:4]
    order.epoch = 5
    assert [key[1] for batch in order for key in batch] != samples
    shared = [list(TrainOrder(10, 10, 3, rank, 2, repeats=2)) for rank in (0, 1)]
    assert [key[1] for key in shared[0][0]] == [key[1] for key in shared[1][0]]  # a copy for each process


def test_mixing_happens_as_often_as_asked():
    images, targets = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 6, 6), torch.arange(8)
    mixed = [mix(images, targets, 0.8, 1.0, seed, 0.3, 0.25) for seed in range(400)]
    # with `share` of its own, mixup leaves one value in an image and cutmix two
    changed = [x for x, _, share in mixed if share < 1]
    assert abs(len(changed) / 400 - 0.3) < 0.07
    assert all(torch.equal(x, images) for x, _, share in mixed if share == 1)
    boxes = [len(x[0].unique()) == 2 for x in changed]
    assert abs(sum(boxes) / len(boxes) - 0.25) < 0.12


def test_mixing_stops_after_some_epochs(tiny, tmp_path):
    """The epochs up to mixup_off_epoch are those of a mixed run, bit by bit; the next one is not."""
    values = tiny | {"mixup": 0.8, "epochs": 2, "limit": 50}
    mixed = fit(Config(**values), tmp_path / "mixed").history
    off = fit(Config(**values | {"mixup_off_epoch": 1}), tmp_path / "off").history
    losses = [[row["train_loss"] for row in history] for history in (mixed, off)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w2", "original-mstd0.5", "trivial"])
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_draw_from_torch_alone(policy, channels):
    """The same seed of torch's gives the same image, whatever the other generators are, which come back untouched."""
    view = View((24, 20), channels, (0.5,) * channels, (0.2,) * channels)
    transform = train_transform(view, "none", Extras(auto_augment=policy))
    image = torch.randint(0, 256, (channels, 24, 20), dtype=torch.uint8)
    found = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        states = random.getstate(), np.random.get_state()[1].tolist()
        found.append([])
        for seed in range(8):
            torch.manual_seed(seed)
            found[-1].append(transform(image))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].shape == (channels, 24, 20) and len({x.sum().item() for x in found[0]}) > 3


def test_flips_crops_and_erasing_do_what_they_say():
    view = View((4, 4), 1, (0.0,), (1.0,))
    image = torch.arange(16, dtype=torch.uint8).view(1, 4, 4) * 10
    plain = image / 255
    assert torch.allclose(train_transform(view, "none", Extras(hflip=1.0))(image), plain.flip(2))
    assert torch.allclose(train_transform(view, "none", Extras(vflip=1.0))(image), plain.flip(1))
    assert torch.allclose(train_transform(view, "none", Extras(scale=(1.0, 1.0), ratio=(1.0, 1.0)))(image), plain)
    both = Extras(hflip=0.0, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert torch.allclose(train_transform(view, "standard", both)(image), plain)
    assert train_transform(view, "none", Extras(random_erasing=1.0))(image).ne(plain).any()
    jitter = train_transform(view, "none", Extras(color_jitter=0.5))
    torch.manual_seed(0)
    assert jitter(image).ne(plain).any()


def test_unknown_policies_and_parts_that_are_for_images(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"auto_augment: expected none, trivial.*got 'heavy'"):
        fit(Config(**tiny | {"auto_augment": "heavy"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    signals = open_source("digits")
    signals = dataclasses.replace(signals, kind="signals", ndim=1)
    with pytest.raises(ConfigError, match="hflip: is for images, and the data are signals"):
        resolve(Config(hflip=0.5), signals)


@pytest.mark.parametrize(("mode", "clip"), [("norm", 0.01), ("value", 1e-3), ("agc", 0.01)])
def test_gradients_are_clipped_as_asked(tiny, mode, clip, tmp_path):
    from timm.models import model_parameters
    from timm.utils import dispatch_clip_grad

    from vertebra.train.fitting import _trainer
    from vertebra.train.loop import clip_gradients
    from vertebra.train.strategies import make_fabric
    from vertebra.train.watch import Watch

    config = Config(**tiny | {"clip": clip, "clip_mode": mode})
    source = open_source("digits", 20)
    config = resolve(config, source)
    trainer, _ = _trainer(config, source, make_fabric(config), Watch(), start=True)
    free, _ = _trainer(config.model_copy(update={"clip": None}), source, make_fabric(config), Watch(), start=True)
    expected = _trainer(config, source, make_fabric(config), Watch(), start=True)[0].net
    for net in (trainer.net, free.net, expected):
        torch.manual_seed(0)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
    raw = [p.grad.clone() for p in expected.parameters()]
    norm = torch.cat([g.flatten() for g in raw]).norm()
    dispatch_clip_grad(model_parameters(expected, exclude_head=mode == "agc"), clip, mode)
    for t in (trainer, free):
        assert clip_gradients(t).item() == pytest.approx(norm.item(), rel=1e-5)
    for p, q, g, e in zip(*(n.parameters() for n in (trainer.net, free.net)), raw, expected.parameters(), strict=True):
        assert torch.allclose(p.grad, e.grad, rtol=1e-4) and torch.equal(q.grad, g)
    assert any(not torch.equal(p.grad, g) for p, g in zip(trainer.net.parameters(), raw, strict=True))


def test_compile_is_used_for_training_and_changes_nothing(tiny, finished, tmp_path, monkeypatch):
    calls = []

    def compile(function):
        def compiled(*args):
            calls.append(1)
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    result = fit(Config(**tiny | {"compile": True}), tmp_path / "run")
    assert len(calls) == 12 and result.history[-1]["train_loss"] == finished.history[-1]["train_loss"]


def test_training_in_bfloat16_computes_in_bfloat16(tiny, tmp_path, monkeypatch):
    """Fabric casts `forward` alone, and training calls forward_outputs."""
    from vertebra.backbone import Backbone

    seen, before = [], Backbone.forward_outputs

    def forward_outputs(self, x):
        outputs = before(self, x)
        seen.append((self.training, outputs["logits"].dtype))
        return outputs

    monkeypatch.setattr(Backbone, "forward_outputs", forward_outputs)
    fit(Config(**tiny | {"precision": "bf16-mixed", "epochs": 1}), tmp_path / "run")
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}


def test_optimizer_options_reach_it(tiny, tmp_path):
    from vertebra.train import Run

    config = Config(**tiny | {"epochs": 1, "opt": "adamw", "opt_options": {"betas": [0.8, 0.9], "eps": 1e-6}})
    fit(config, tmp_path / "run")
    group = Run.open(tmp_path / "run").read_state()["optimizer"]["param_groups"][0]
    assert (list(group["betas"]), group["eps"]) == ([0.8, 0.9], 1e-6)
    with pytest.raises(ConfigError, match="opt"):
        fit(Config(**tiny | {"opt_options": {"momentums": 1}}), tmp_path / "other")
