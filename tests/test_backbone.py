"""The base class by a small network of its own, without any family."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

from vertebra import fuse
from vertebra.backbone import Backbone, Stage, build
from vertebra.layers import (
    BatchNorm,
    Conv,
    ConvNorm,
    DropPath,
    PatchEmbed,
    Positions,
    RelativePositionBias,
    drop_path_rates,
)

torch.set_num_threads(1)


class ToyBlock(nn.Module):
    def __init__(self, ndim, dim, drop_path):
        super().__init__()
        self.mix = ConvNorm(ndim, dim, dim, 3, groups=dim, keep=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        return x + self.drop_path(self.mix(x))


class Toy(Backbone):
    """Patches, positions, two stages; the dense version has a norm on each output."""

    heads = ("head", "aux")
    OFFICIAL = (
        (r"^patch\.proj", "stem.conv"),
        (r"^pos\.table", "pos_embed"),
        (r"^stages\.(\d+)\.down", lambda m: f"layers.{int(m[1]) - 1}.downsample"),
        (r"^stages\.", "layers."),
        (r"^head\.", "classifier."),
        (r"^aux\.", "classifier_dist."),
    )
    CONSTANT = (r"attn_mask$", r"relative_position_index$")

    def __init__(
        self, ndim=2, in_chans=3, num_classes=1000, features_only=False, out_indices=None, drop_path_rate=0.0,
        *, dim=8, grid=(4, 4), window=3,
    ):  # fmt: skip
        super().__init__(ndim, in_chans, num_classes, features_only, out_indices)
        self.patch = PatchEmbed(ndim, in_chans, dim, 4, pad=True)
        self.pos = Positions(dim, grid)
        self.bias = RelativePositionBias((window,) * ndim, 1)
        rates = drop_path_rates(drop_path_rate, (2, 1))
        self.stages = nn.ModuleList(
            [
                Stage([ToyBlock(ndim, dim, r) for r in rates[0]]),
                Stage([ToyBlock(ndim, 2 * dim, r) for r in rates[1]], down=Conv(ndim, dim, 2 * dim, 2, 2, 0)),
            ]
        )
        self.describe((dim, 2 * dim), (4, 8))
        if features_only:
            self.out_norms = nn.ModuleList(nn.LayerNorm(c["num_chs"]) for c in self.feature_info)
        else:
            self.norm = nn.LayerNorm(2 * dim)
        self.make_head()
        self.init_weights()

    def embed(self, x):
        x = self.patch(x)
        return x + self.pos(x.shape[1:-1]).reshape(1, *x.shape[1:]) + self.bias().mean()

    def finish(self, state):
        return self.norm(state)

    def output_norm(self, x, index):
        return self.out_norms[index](x) if self.features_only else x

    def outputs(self, features):
        pooled = self.pre_logits(features)
        a, b = self.head(pooled), self.aux(pooled)
        return {"logits": (a + b) / 2, "head": a, "aux": b}


def toy(seed=0, **kwargs):
    kwargs = dict(num_classes=5) | kwargs
    if kwargs.get("ndim", 2) != 2:
        kwargs.setdefault("grid", (4,) * kwargs["ndim"])
    torch.manual_seed(seed)
    model = build({"cls": Toy, "name": "toy", "kwargs": kwargs}).eval()
    for norm in (m for m in model.modules() if isinstance(m, BatchNorm)):
        nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2), nn.init.normal_(norm.bias)
    return model


def image(ndim=2, side=16, batch=2, channels=3):
    return torch.randn(batch, channels, *(side,) * ndim, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_the_contract(ndim):
    model = toy(ndim=ndim)
    x = image(ndim)
    features = model.forward_features(x)
    assert features.shape == (2, 16, *(2,) * ndim)
    logits = model(x)
    assert logits.shape == (2, 5)
    assert torch.equal(model.forward_head(features), logits)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.flatten(2).mean(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, (model.head(pooled) + model.aux(pooled)) / 2, rtol=1e-6, atol=1e-6)
    outputs = model.forward_outputs(x)
    assert list(outputs) == ["logits", "head", "aux"]
    assert torch.equal(outputs["logits"], logits)
    maps = model.forward_intermediates(x)
    assert [m.shape[1] for m in maps] == [i["num_chs"] for i in model.feature_info] == [8, 16]
    assert [16 // m.shape[2] for m in maps] == [i["reduction"] for i in model.feature_info] == [4, 8]
    torch.testing.assert_close(features, model.norm(maps[-1].movedim(1, -1)).movedim(-1, 1), rtol=1e-6, atol=1e-6)
    assert model(image(ndim, 17)).shape == (2, 5)


def test_intermediates_by_index():
    model, x = toy(), image()
    first, second = model.forward_intermediates(x)
    for indices, want in ((1, [second]), (2, [first, second]), ((0,), [first]), ((-1, 0), [second, first])):
        got = model.forward_intermediates(x, indices)
        assert len(got) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    for wrong in ((2,), (-3,), (), 0, -1):
        with pytest.raises(ValueError, match=r"feature"):
            model.forward_intermediates(x, wrong)


def test_more_last_maps_than_there_are():
    with pytest.raises(ValueError, match="feature"):
        toy().forward_intermediates(image(), 3)


def test_the_stages_behind_the_last_index_do_not_run():
    model = toy()
    model.stages[1].register_forward_hook(lambda *a: pytest.fail("ran"))
    assert len(model.forward_intermediates(image(), (0,))) == 1


def test_features_only():
    plain, dense = toy(), toy(features_only=True, out_indices=(1,))
    assert dense.out_indices == (1,)
    assert not hasattr(dense, "head")
    (got,) = dense(image())
    assert got.shape == (2, 16, 2, 2)
    assert torch.equal(got, dense.forward_intermediates(image(), (1,))[0])
    assert plain.out_indices == (0, 1)
    for call in (dense.forward_features, dense.forward_outputs):
        with pytest.raises(ValueError, match="features_only model has no head"):
            call(image())
    with pytest.raises(ValueError, match="no classifier to reset"):
        dense.reset_classifier(3)


def test_inputs_that_do_not_fit():
    model = toy()
    for shape, words in (
        ((2, 3, 16), "ndim=2 needs (B, C, *S)"),
        ((2, 3, 16, 16, 16), "ndim=2 needs (B, C, *S)"),
        ((2, 1, 16, 16), "1 channels, this model needs in_chans=3"),
        ((2, 3, 16, 7), "(16, 7) is too small: every side needs at least 8"),
    ):
        for call in (model, model.forward_features, model.forward_intermediates, model.forward_outputs):
            with pytest.raises(ValueError, match=re.escape(words)):
                call(torch.zeros(shape))
    assert model.min_size == 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(ndim=4), "not at ndim=4"),
        (dict(in_chans=0), "in_chans must be a whole number of at least 1, got 0"),
        (dict(num_classes=-1), "num_classes must be a whole number of at least 0, got -1"),
        (dict(num_classes=2.5), "num_classes must be a whole number"),
        (dict(out_indices=(0,)), "out_indices needs features_only=True"),
        (dict(features_only=True, out_indices=(2,)), r"\(2,\) are not all in 0\.\.1"),
    ],
)
def test_impossible_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        Toy(**options)


def test_reset_classifier():
    model = toy().double()
    model.reset_classifier(7)
    assert model.num_classes == model.recipe["kwargs"]["num_classes"] == 7
    assert model(image().double()).shape == (2, 7)
    assert model.aux.weight.dtype == torch.float64
    assert model.aux.bias.abs().sum() == 0
    model.reset_classifier(0)
    assert model(image().double()).shape == (2, 16)
    assert [n for n in model.state_dict() if n.startswith(("head", "aux"))] == []
    for wrong in (-1, 2.0, None):
        with pytest.raises(ValueError, match="num_classes must be a whole number"):
            model.reset_classifier(wrong)


def test_a_new_head_is_in_the_model_s_mode():
    model = toy()
    model.reset_classifier(7)
    assert not any(m.training for m in model.modules())
    fuse(model)


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_grad_checkpointing_changes_nothing(ndim):
    """Same outputs, gradients, random numbers of drop path, and batch statistics counted once."""
    plain = toy(ndim=ndim, drop_path_rate=0.5).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    runs = []
    for model in (plain, saving):
        calls = []
        hook = model.stages[0].blocks[0].register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        torch.manual_seed(11)
        y = model(image(ndim, batch=4))
        y.square().sum().backward()
        hook.remove()
        runs.append((y, len(calls)))
    assert [n for _, n in runs] == [1, 2]
    assert torch.equal(runs[0][0], runs[1][0])
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7, msg=name)
    for name, a in plain.named_buffers():
        assert torch.equal(a, saving.get_buffer(name)), name
    assert saving.stages[0].blocks[0].mix.norm.num_batches_tracked == 1
    saving.set_grad_checkpointing(False)
    assert not any(m.checkpointing for m in saving.modules() if isinstance(m, Stage))


def test_no_weight_decay_and_groups():
    model = toy()
    assert model.no_weight_decay() == {"pos.table", "bias.table"}
    coarse, fine = model.group_matcher(coarse=True), model.group_matcher()
    assert re.match(coarse["stem"], "patch.proj.weight")
    assert re.match(coarse["stem"], "pos.table")
    assert not re.match(coarse["stem"], "norm.weight")
    assert re.match(coarse["blocks"], "stages.1.down.weight").groups() == ("1",)
    helpers = pytest.importorskip("timm.models._manipulate")
    groups = helpers.group_parameters(model, fine)
    assert sorted(n for g in groups.values() for n in g) == sorted(n for n, _ in model.named_parameters())
    layer = helpers.group_parameters(model, fine, reverse=True)
    blocks = [f"stages.{name}.mix.conv.weight" for name in ("0.blocks.0", "0.blocks.1", "1.blocks.0")]
    order = ["pos.table", *blocks[:2], "stages.1.down.weight", blocks[2], "head.weight"]
    place = [layer[n] for n in order]
    assert place == sorted(place)
    assert layer["head.weight"] == layer["norm.weight"] == max(layer.values())
    assert len({layer[n] for n in ("patch.proj.weight", "stages.0.blocks.0.mix.conv.weight", "head.weight")}) == 3


@pytest.mark.parametrize("published", (True, False))
def test_fuse_leaves_the_model_alone(published):
    model = toy()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, published=published)
    x = image()
    assert (fused(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    assert not any(isinstance(m, BatchNorm) for m in fused.modules())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "fused" not in model.recipe
    again = fuse(fused, published=published)
    assert all(torch.equal(v, fused.state_dict()[k]) for k, v in again.state_dict().items())
    model.stages[0].blocks[0].mix.norm.train()
    with pytest.raises(ValueError, match=r"stages\.0\.blocks\.0\.mix\.norm is in training mode"):
        fuse(model)
