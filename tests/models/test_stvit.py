"""STViT: semantic tokens by loops over windows, the published 14x14 rules, groups, options, and the plain versions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import Block, Positions
from vertebra.models.stvit import (
    Gather,
    Generate,
    Recover,
    Refine,
    SizedBias,
    ToMap,
    neighbourhoods,
    pool_windows,
)

TINY, PLAIN, DEIT = "stvit_r_swin_tiny", "stvit_swin_tiny", "stvit_deit_tiny"
COUNTS = {TINY: 28_320_214, "stvit_r_swin_small": 49_625_518, "stvit_r_swin_base": 87_812_336}


def small(name=TINY, **options):
    settings = dict(num_classes=7)
    if name == DEIT:
        settings |= dict(dim=48, depth=6, heads=3, keep=2)
    else:
        settings |= dict(dim=24, depths=(1, 1, 6, 1), heads=(1, 2, 4, 8))
    torch.manual_seed(1)
    return fill(vertebra.create_model(name, **(settings | options)))


def attention_by_hand(attn, queries, keys):
    """(L, C) and (M, C), head by head."""
    q, k, v = attn.q(queries), *attn.kv(keys).chunk(2, -1)
    width = q.shape[1] // attn.heads
    parts = []
    for h in range(attn.heads):
        cut = slice(h * width, (h + 1) * width)
        parts.append((q[:, cut] @ k[:, cut].T * width**-0.5).softmax(-1) @ v[:, cut])
    return attn.proj(torch.cat(parts, 1))


def finished(block, x, attended):
    x = x + attended * block.scale1.gamma
    return x + block.mlp(block.norm2(x)) * block.scale2.gamma


@pytest.mark.parametrize(("window", "samples"), [(7, 3), (7, 4), (8, 4), (7, 7), (5, 1)])
def test_pooling_is_torchs_in_every_window(window, samples):
    x = torch.randn(2, 2 * window, 3 * window, 5)
    found = pool_windows(x, (window,) * 2, samples)
    for r, c in itertools.product(range(2), range(3)):
        part = x[:, window * r : window * (r + 1), window * c : window * (c + 1)].movedim(-1, 1)
        expected = F.adaptive_max_pool2d(part, samples).movedim(1, -1)
        cut = found[:, samples * r : samples * (r + 1), samples * c : samples * (c + 1)]
        assert torch.equal(cut, expected)


def test_pooling_at_a_ragged_end_repeats_the_last_cell():
    x = torch.randn(1, 10, 4)
    padded = torch.cat([x, x[:, -1:].expand(-1, 4, -1)], 1)
    assert torch.equal(pool_windows(x, (7,), 3), pool_windows(padded, (7,), 3))


def test_neighbourhoods_at_14_are_the_published_ones():
    """Kernel 10, stride 4, no padding."""
    cells = torch.arange(196.0).reshape(1, 1, 14, 14)
    published = F.unfold(cells, kernel_size=10, stride=4)[0].T
    index, real = neighbourhoods((14, 14), (7, 7), (10, 10))
    assert torch.equal(index.float(), published) and real is None


@pytest.mark.parametrize("side", [3, 7, 10, 11, 21, 23])
def test_neighbourhoods_hold_their_window_and_stay_inside(side):
    index, real = neighbourhoods((side,), (7,), (10,))
    assert (real is None) == (side >= 10)
    for w, row in enumerate(index.tolist()):
        cells = [c for i, c in enumerate(row) if real is None or real[w, i]]
        assert len(cells) == len(set(cells)) == min(10, side)
        assert set(range(7 * w, min(7 * w + 7, side))) <= set(cells) <= set(range(side))


@pytest.mark.parametrize("sides", [(14, 14), (9, 16), (11,), (7, 8, 3)])
@pytest.mark.parametrize("options", [{}, dict(shortcut=True, conv_pos=True)])
@torch.no_grad()
def test_generating_by_hand(sides, options):
    """Window by window: the maximum of each bin, keys that hold the pooled tokens and the cells around, one norm."""
    ndim, dim, window, samples, reach = len(sides), 12, 7, 3, 10
    block = fill(Generate(ndim, dim, 2, 2.0, 0.0, samples=samples, window=window, **options))
    x = torch.randn(1, *sides, dim)
    same, t = block(x)
    assert same is x
    counts = [math.ceil(s / window) for s in sides]
    assert t.shape == (1, *(samples * n for n in counts), dim)
    for where in itertools.product(*(range(n) for n in counts)):
        pooled = torch.empty(*(samples,) * ndim, dim)
        for j in itertools.product(range(samples), repeat=ndim):
            bins = []
            for w, k, s in zip(where, j, sides, strict=True):
                cells = range(w * window + k * window // samples, w * window + math.ceil((k + 1) * window / samples))
                bins.append(sorted({min(c, s - 1) for c in cells}))
            pooled[j] = torch.stack([x[(0, *c)] for c in itertools.product(*bins)]).amax(0)
        around = []
        for w, s in zip(where, sides, strict=True):
            start = max(min(w * window - 1, s - reach), 0)
            around.append(range(start, min(start + reach, s)))
        if block.conv_pos is not None:
            kernel = block.conv_pos.conv
            conv = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
            pooled = pooled + conv(pooled.movedim(-1, 0)[None], kernel.weight, kernel.bias, padding=1, groups=dim)[
                0
            ].movedim(0, -1)
        p = pooled.flatten(0, -2)
        near = torch.stack([x[(0, *c)] for c in itertools.product(*around)])
        a = attention_by_hand(block.attn, block.norm1(p), block.norm1(torch.cat([p, near]))) * block.scale1.gamma
        expected = p + a if block.shortcut else a
        expected = expected + block.mlp(block.norm2(expected)) * block.scale2.gamma
        cut = t[(0, *(slice(samples * w, samples * (w + 1)) for w in where))].flatten(0, -2)
        assert error(cut, expected) <= 2e-6


@torch.no_grad()
def test_the_whole_map_as_one_window():
    block = fill(Generate(2, 12, 2, 2.0, 0.0, samples=4))
    x = torch.randn(1, 14, 9, 12)
    p = F.adaptive_max_pool2d(x.movedim(-1, 1), 4).movedim(1, -1)[0].flatten(0, 1)
    keys = block.norm1(torch.cat([p, x[0].flatten(0, 1)]))
    a = attention_by_hand(block.attn, block.norm1(p), keys) * block.scale1.gamma
    expected = a + block.mlp(block.norm2(a)) * block.scale2.gamma
    assert error(block(x)[1][0].flatten(0, 1), expected) <= 1e-6


@torch.no_grad()
def test_gathering_and_recovering_by_hand():
    """The centre is added to queries and residual, not to the semantic tokens among the keys, which come first."""
    x, t = torch.randn(1, 4, 5, 12), torch.randn(1, 2, 3, 12)
    image, tokens = x[0].flatten(0, 1), t[0].flatten(0, 1)
    block = fill(Gather(12, 2, 2.0, 0.0, centre=Positions(12, (2, 3))))
    block.centre.table.normal_()
    queries = tokens + block.centre.table[0]
    a = attention_by_hand(block.attn, block.norm1(queries), block.norm1(torch.cat([tokens, image])))
    same, found = block((x, t))
    assert same is x and error(found[0].flatten(0, 1), finished(block, queries, a)) <= 1e-6
    block = fill(Recover(12, 2, 2.0, 0.0, 1e-5))
    a = attention_by_hand(block.attn, block.norm1(image), block.norm1(tokens))
    assert error(block((x, t))[0].flatten(0, 1), finished(block, image, a)) <= 1e-6


@torch.no_grad()
def test_refining_is_local_or_global():
    x, t = torch.zeros(1, 7, 14, 12), torch.randn(1, 3, 6, 12)
    local, whole = (fill(Refine(12, 2, 2.0, 0.0, size)) for size in ((3, 3), None))
    found = local((x, t))[1]
    for c in (0, 3):
        part = t[0, :, c : c + 3].flatten(0, 1)
        expected = finished(local, part, attention_by_hand(local.attn, local.norm1(part), local.norm1(part)))
        assert error(found[0, :, c : c + 3].flatten(0, 1), expected) <= 1e-6
    tokens = t[0].flatten(0, 1)
    expected = finished(whole, tokens, attention_by_hand(whole.attn, whole.norm1(tokens), whole.norm1(tokens)))
    assert error(whole((x, t))[1][0].flatten(0, 1), expected) <= 1e-6


@torch.no_grad()
def test_bias_of_another_size_is_the_resampled_table():
    bias = SizedBias((6, 6), 2)
    bias.table.normal_()
    assert bias((6, 6)).shape == (2, 36, 36)
    table = F.interpolate(bias.table.T.reshape(1, 2, 11, 11), (7, 9), mode="bicubic", align_corners=False)[0]
    found = bias((4, 5))
    for q, k in itertools.product(range(20), repeat=2):
        expected = table[:, q // 5 - k // 5 + 3, q % 5 - k % 5 + 4]
        torch.testing.assert_close(found[:, q, k], expected, rtol=1e-5, atol=1e-6)


def test_groups_of_six():
    with torch.device("meta"):
        deep = vertebra.create_model("stvit_r_swin_small", use_global=True, relative_pos=True)
    blocks = deep.stages[2].blocks
    assert [type(b) for b in blocks] == [Block, Generate, Gather, Refine, Refine, Recover] * 3
    assert [b.local for b in blocks if isinstance(b, Refine)] == [(3, 3), None] * 3
    assert {b.attn.shift for b in blocks if type(b) is Block} == {(0, 0)}  # never shifted, odd block or even
    assert [b.centre is not None for b in blocks if isinstance(b, Gather)] == [True, False, False]
    assert [tuple(b.pos.table.shape) for b in blocks if isinstance(b, Refine)] == [(25, 12), (121, 12)] * 3
    assert [b.attn.shift[0] for b in deep.stages[0].blocks] == [0, 3]
    assert [b.attn.shift[0] for b in deep.stages[3].blocks] == [0, 0]
    assert {m.eps for m in deep.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    fresh = small(depths=(1, 1, 6, 1))
    assert [n for n, _ in fresh.stages[0].named_parameters() if "gamma" in n] == []
    initial = vertebra.create_model(TINY, dim=24, heads=(1, 2, 4, 8)).stages[2].blocks[1].scale1.gamma
    assert (initial == 1e-5).all()


def test_drop_path_grows_over_all_blocks():
    model = small(depths=(1, 1, 6, 2), drop_path_rate=0.9)
    rates = [b.drop_path.rate for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(10)])


def test_published_counts_and_names():
    for name, count in COUNTS.items():
        with torch.device("meta"):
            model = vertebra.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == count
    names = vertebra.to_official(small(use_global=True, relative_pos=True, use_conv_pos=True))
    assert {
        "patch_embed.proj.0.c.weight", "patch_embed.proj.2.bn.running_mean", "layers.2.semantic_token2",
        "layers.2.blocks.3.attn.relative_position_bias_table", "layers.2.blocks.1.layer_scale_1",
        "layers.2.blocks.1.conv_pos.proj.0.weight", "layers.2.blocks.5.attn.kv.bias", "layers.2.downsample.norm.weight",
    } <= set(names)  # fmt: skip


@torch.no_grad()
def test_dense_version_gives_pyramid_maps():
    dense = small(features_only=True)
    maps = dense(torch.randn(1, 3, 200, 168))
    assert [tuple(m.shape[1:]) for m in maps] == [(24, 50, 42), (48, 25, 21), (96, 13, 11), (192, 7, 6)]


@torch.no_grad()
def test_plain_swin_goes_on_with_semantic_tokens_alone():
    model = small(PLAIN, depths=(1, 1, 7, 2))
    blocks = model.stages[2].blocks
    assert [type(b) for b in blocks] == [Block, Generate, Gather, *[Refine] * 4]
    assert [b.local for b in blocks[3:]] == [(4, 4), None] * 2
    assert {b.attn.window for b in model.stages[3].blocks} == {(4, 4)}
    x = torch.randn(1, 3, 224, 224)
    maps = model.forward_intermediates(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(56, 56), (28, 28), (8, 8), (4, 4)]
    state, _ = model.through(model._embed(x), span=(0, 2))
    stage = model.stages[2]
    state = stage.blocks[1](stage.blocks[0](stage.down(state)))
    image, t = stage.blocks[2](state)
    for block in blocks[3:]:  # from here on the image tokens have no say
        t = block((torch.full_like(image, float("nan")), t))[1]
    assert error(maps[2].movedim(1, -1), t) <= 1e-6
    torch.testing.assert_close(model(x), model.head(model.norm(model.stages[3](t)).mean((1, 2))))


@torch.no_grad()
def test_plain_deit_goes_on_with_sixteen_tokens():
    model = small(DEIT)
    x = torch.randn(2, 3, 100, 224)
    assert [tuple(m.shape[2:]) for m in model.forward_intermediates(x)] == [(7, 14)] * 2 + [(4, 4)] * 4
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 16, 48)
    torch.testing.assert_close(model(x), model.head(model.fc_norm(tokens.mean(1))))
    patches, grid = model.through(model._embed(x), span=(0, 2))[0]
    image = ToMap()((patches, grid))
    t = model.stages[3].blocks[0](model.stages[2].blocks[0](image))[1].flatten(1, 2)
    for stage in model.stages[4:]:
        t = stage((t, (4, 4)))[0]
    assert error(tokens, t) <= 1e-6


def gmacs(name):
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = vertebra.create_model(name).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    return counter.get_total_flops() / 2e9


def test_work_saved():
    assert 0.37 < gmacs(DEIT) / 1.26 < 0.45  # DeiT-Ti; the paper: nearly 60 % fewer
    recovering, plain = gmacs(TINY), gmacs(PLAIN)
    # keys of the 196 cells are projected once, where the published code projects four neighbourhoods of 100
    saved = (400 - 196) * 384 * 2 * 384 / 1e9
    assert recovering == pytest.approx(vertebra.model_info(TINY).published["gmacs"] - saved, abs=0.006)
    assert plain < recovering < 0.82 * 4.5  # Swin-T


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (TINY, dict(depths=(1, 1, 5, 1)), "multiple of 6"),
        (PLAIN, dict(depths=(1, 1, 2, 1)), "at least 3"),
        (TINY, dict(samples=8), "samples"),
        (PLAIN, dict(features_only=True), "no dense version"),
        (DEIT, dict(features_only=True), "no dense version"),
        (DEIT, dict(keep=5), "two blocks after keep"),
        (DEIT, dict(global_pool="token"), "global_pool"),
    ],
)
def test_impossible_options(name, options, words):
    with pytest.raises(ValueError, match=words):
        small(name, **options)
