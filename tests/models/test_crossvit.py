"""CrossViT: timm as the live oracle, the exchange written out, the two ways to read an image."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.models.crossvit import Exchange, MultiScaleBlock

timm = pytest.importorskip("timm")
NAMES = {"crossvit_9_224": "crossvit_9_240", "crossvit_9_dagger_224": "crossvit_9_dagger_240"}
COUNTS = {
    "crossvit_tiny_224": 7_014_800,
    "crossvit_9_dagger_224": 8_776_592,
}


def small(name="crossvit_9_dagger_224", **options):
    """Two stages, seven classes."""
    settings = dict(depths=(1, 2), stage_count=2, num_classes=7) | options
    return fill(vertebra.create_model(name, **settings))


def narrow(**options):
    return small(**({"dims": (24, 32), "heads": 2, "img_size": 60} | options))


def theirs_as_official(state):
    """timm's keys as IBM's: pos_embed_0 -> pos_embed.0."""
    return {k.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token."): v for k, v in state.items()}


@pytest.mark.parametrize(
    ("name", "sides"),
    [("crossvit_9_224", (224, 224)), ("crossvit_9_dagger_224", (240, 240)), ("crossvit_9_224", (200, 312))],
)
def test_equals_timm(name, sides):
    theirs = fill(timm.create_model(NAMES[name], depth=[[1, 2, 0]] * 2, num_classes=7))
    state = theirs_as_official(theirs.state_dict())
    ours = small(name)
    vertebra.load_checkpoint(ours, {"model": state})
    assert set(vertebra.to_official(ours)) == set(state)
    x = torch.randn(1, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
        large, narrower = ours.forward_features(x)
        small_tokens, large_tokens = theirs.forward_features(x)
        assert error(large, large_tokens) <= 1e-5 and error(narrower, small_tokens) <= 1e-5
        pooled = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (ours, theirs)]
        assert error(*pooled) <= 1e-5


def attention_by_hand(attn, z):
    """The first row of z against all rows, head by head."""
    q, k, v = attn.wq(z[:1]), attn.wk(z), attn.wv(z)
    width = q.shape[1] // attn.heads
    parts = []
    for h in range(attn.heads):
        cut = slice(h * width, (h + 1) * width)
        weights = (q[:, cut] @ k[:, cut].T * width**-0.5).softmax(-1)
        parts.append(weights @ v[:, cut])
    return attn.proj(torch.cat(parts, 1))


def exchange_by_hand(e, token, patches):
    there = e.there[2](F.gelu(e.there[0](token)))
    t = torch.cat([there, patches])
    c = t[:1] + attention_by_hand(e.attn, e.norm1(t))
    return e.back[2](F.gelu(e.back[0](c)))


@torch.no_grad()
def test_exchange_is_the_equations():
    e = fill(Exchange(12, 16, heads=2, drop_path=0.0))
    token, patches = torch.randn(2, 1, 12), torch.randn(2, 5, 16)
    expected = torch.stack([exchange_by_hand(e, token[b], patches[b]) for b in range(2)])
    assert error(e(token, patches), expected) <= 1e-6
    assert {m.eps for m in e.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@torch.no_grad()
def test_both_ways_read_the_tokens_before_the_exchange():
    """The old class token is replaced, patches are as the branch's own blocks left them."""
    block = fill(MultiScaleBlock((12, 16), (1, 2), heads=2, mlp_ratio=2, rates=[0.0, 0.0]))
    before = torch.randn(1, 7, 12), torch.randn(1, 5, 16)
    small_tokens, large_tokens, grid = block((*before, (4,)))
    a, b = block.branches[0](before[0])[0], block.branches[1](before[1])[0]
    to_small, to_large = block.exchanges
    assert error(small_tokens[0], torch.cat([exchange_by_hand(to_small, a[:1], b[1:]), a[1:]])) <= 1e-6
    assert error(large_tokens[0], torch.cat([exchange_by_hand(to_large, b[:1], a[1:]), b[1:]])) <= 1e-6
    assert grid == (4,)


@torch.no_grad()
def test_outputs_are_two_heads_and_their_mean():
    model = narrow()
    x = torch.randn(2, 3, 40, 70)
    found = model.forward_outputs(x)
    large, small_tokens = model.forward_features(x)
    torch.testing.assert_close(found["small_logits"], model.head[0](small_tokens[:, 0]))
    torch.testing.assert_close(found["large_logits"], model.head[1](large[:, 0]))
    torch.testing.assert_close(found["logits"], (found["small_logits"] + found["large_logits"]) / 2)
    model.reset_classifier(3)
    assert {v.shape for v in model.forward_outputs(x).values()} == {(2, 3)}


@torch.no_grad()
def test_a_classifier_squashes_any_image():
    """Only what the two resized images show can matter, so resizing to one of them by hand changes nothing there."""
    model = narrow()  # 60 pixels: small branch 60, large branch 64 of the 56 that 14 / 15 would be
    assert model.grids == ((5, 5), (4, 4))
    x = torch.randn(1, 3, 50, 90)
    images = model._images(x.movedim(1, -1))
    for image, side in zip(images, (60, 64), strict=True):
        expected = F.interpolate(x, (side, side), mode="bicubic", align_corners=False)
        torch.testing.assert_close(image.movedim(-1, 1), expected, rtol=1e-5, atol=1e-5)
    native = torch.randn(1, 60, 60, 3)
    assert torch.equal(model._images(native)[0], native)


@torch.no_grad()
def test_dense_version_keeps_the_size_and_agrees_on_the_built_one():
    model = small()
    dense = small(features_only=True)
    vertebra.load_checkpoint(dense, model.state_dict())
    x = torch.randn(1, 3, 224, 224)  # the large branch's own size: nothing is padded, the small one reads 240
    for ours, theirs in zip(dense(x), model.forward_intermediates(x), strict=True):
        assert ours.shape == (1, 256, 14, 14)
        assert error(ours, theirs) <= 1e-6
    assert [m.shape[2:] for m in dense(torch.randn(1, 3, 97, 320))] == [(7, 20)] * 2
    small_image, large_image = dense._images(torch.randn(1, 97, 320, 3))
    assert large_image.shape[1:3] == (112, 320)
    assert small_image.shape[1:3] == (120, 348)  # 20 small cells to 14 large ones: 10 and 28.6, rounded


def test_published_configurations():
    for name in (*COUNTS, "crossvit_18_dagger_384"):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        expected = ((34, 34), (24, 24)) if name.endswith("384") else ((20, 20), (14, 14))
        assert model.grids == expected
        count = sum(p.numel() for p in model.parameters())
        assert count == COUNTS.get(name, count)
        assert [len(b.blocks[0].branches[0]) for b in model.stages] == [1, 1, 1]
    state = vertebra.create_model("crossvit_9_dagger_224", num_classes=0).state_dict()
    assert state["patch_embed.0.proj.2.weight"].shape == (64, 32, 3, 3)


def test_dagger_stems_make_whole_patches():
    model = narrow()
    for stem, strides, paddings in zip(model.patch_embed, ((4, 3, 1), (4, 2, 2)), ((3, 0, 1), (3, 1, 1)), strict=True):
        convs = [m for m in stem.proj if hasattr(m, "kernel")]
        assert [c.stride[0] for c in convs] == list(strides)
        assert [c.padding[0] for c in convs] == list(paddings)


def test_drop_path_grows_over_the_longer_branch():
    model = narrow(drop_path_rate=0.3)
    rates = [
        (
            [[b.drop_path.rate for b in branch] for branch in s.blocks[0].branches],
            s.blocks[0].exchanges[0].drop_path.rate,
        )
        for s in model.stages
    ]
    first, last = (pytest.approx(v) for v in ([0.0, 0.1], [0.2, 0.3]))
    assert rates[0][0][1] == first and rates[1][0][1] == last
    assert rates[1][0][0] == [pytest.approx(0.2)] and rates[1][1] == pytest.approx(0.3)


@torch.no_grad()
def test_rank_1_by_hand():
    """Patches of a line as matrix products, class token and table added."""
    model = narrow(name="crossvit_9_224", ndim=1)
    assert model.grids == ((5,), (4,))
    x = torch.randn(1, 3, 60)
    small_tokens, large_tokens, grid = model._embed(x)
    weight, bias = model.patch_embed[0].proj.weight, model.patch_embed[0].proj.bias
    patches = x[0].unfold(1, 12, 12).movedim(1, 0).flatten(1) @ weight.flatten(1).T + bias
    expected = torch.cat([model.cls_token[0][0], patches]) + model.pos_embed[0].table[0]
    assert error(small_tokens[0], expected) <= 1e-6
    assert large_tokens.shape == (1, 5, 32) and grid == (4,)


def test_tables_of_another_size_are_resampled_on_loading():
    report = vertebra.load_checkpoint(narrow(img_size=120), vertebra.to_official(narrow()))
    assert sorted(report.adapted) == ["pos_embed.0", "pos_embed.1"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dims=(24, 32, 48)), "pairs"),
        (dict(depths=(0, 2)), "pairs"),
        (dict(heads=5), "5 heads"),
        (dict(img_size=0), "img_size"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ValueError, match=words):
        narrow(**options)
