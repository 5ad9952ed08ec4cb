"""GC ViT against timm under renamed weights, against the paper's rules written out, and its quirks as numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import error, spread

import vertebra
from vertebra.inspect.peers import renamed
from vertebra.mixers import GlobalWindowAttention, WindowAttention
from vertebra.models.gcvit import Downsampler, GlobalQuery

COUNTS = {
    "gc_vit_xxtiny": 11_995_428,
    "gc_vit_xtiny": 19_981_294,
    "gc_vit_tiny": 28_221_974,
    "gc_vit_tiny2": 34_535_654,
    "gc_vit_small": 51_092_173,
    "gc_vit_small2": 68_615_197,
    "gc_vit_base": 90_320_836,
    "gc_vit_large": 202_075_570,
    "gc_vit_large_384_21k": 202_860_610,
    "gc_vit_large_512_21k": 203_795_362,
}


def small(ndim: int = 2, seed: int = 0, **options):
    torch.manual_seed(seed)
    settings = dict(dim=16, depths=(2, 3, 2, 2), heads=(1, 2, 2, 4), num_classes=7, layer_scale=0.5, img_size=64)
    return spread(vertebra.create_model("gc_vit_small", ndim=ndim, **(settings | options)))


@pytest.mark.parametrize("name", vertebra.list_models(family="gcvit"))
def test_counts_and_windows_are_the_published_ones(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS.get(name, COUNTS["gc_vit_large"])
    size = vertebra.model_info(name).inputs.size
    wide = {224: 14, 384: 24, 512: 32}[size]
    for i, stage in enumerate(model.stages):
        want = wide if i == 2 else wide // 2
        assert {b.attn.window for b in stage.blocks} == {(want, want)}
        kinds = [type(b.attn) for b in stage.blocks]
        assert kinds == [(WindowAttention, GlobalWindowAttention)[j % 2] for j in range(len(kinds))]
        assert (stage.down.query.pools, len(stage.down.query.units)) == ((3, 3), (2, 2), (0, 1), (0, 1))[i]
    scaled = [m for m in model.modules() if isinstance(m, vertebra.layers.LayerScale)]
    assert bool(scaled) == (name not in ("gc_vit_xxtiny", "gc_vit_xtiny", "gc_vit_tiny", "gc_vit_tiny2"))
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    hidden = model.stages[0].blocks[0].mlp.fc1.out_features / model.feature_info[0]["num_chs"]
    assert hidden == (3 if not scaled or name == "gc_vit_small2" else 2)


@pytest.mark.parametrize(("size", "scale"), [((64, 64), 0.5), ((128, 64), None), ((160, 160), 0.5)])
def test_logits_equal_timm(size, scale):
    pytest.importorskip("timm")
    from timm.models.gcvit import GlobalContextVit

    model = small(dim=32, img_size=size, layer_scale=scale, mlp_ratio=2)
    other = GlobalContextVit(
        img_size=size, embed_dim=32, depths=(2, 3, 2, 2), num_heads=(1, 2, 2, 4), num_classes=7, mlp_ratio=2,
        layer_scale=scale,
    ).eval()  # fmt: skip
    missing = other.load_state_dict(renamed(vertebra.to_official(model), "gcvit", other), strict=False)
    assert not missing.unexpected_keys and all("index" in k for k in missing.missing_keys)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert error(model(x), other(x)) <= 2e-6
        assert error(model.forward_features(x), other.forward_features(x)) <= 2e-6


def plain_global(mixer, x, query):
    """Global attention of one map x (*S, C) window by window, cell by cell; zeros beyond the map."""
    window, heads, dim = mixer.window, mixer.heads, x.shape[-1]
    width = dim // heads
    out = torch.zeros_like(x)
    cells = list(itertools.product(*(range(w) for w in window)))
    for start in itertools.product(*(range(0, s, w) for s, w in zip(x.shape[:-1], window, strict=True))):
        places = [tuple(a + b for a, b in zip(start, c, strict=True)) for c in cells]
        inside = [all(p < s for p, s in zip(place, x.shape[:-1], strict=True)) for place in places]
        tokens = torch.stack([x[p] if ok else torch.zeros(dim) for p, ok in zip(places, inside, strict=True)])
        k, v = mixer.kv(tokens).split(dim, -1)
        for qi, (cell, place) in enumerate(zip(cells, places, strict=True)):
            if not inside[qi]:
                continue
            parts = []
            for h in range(heads):
                cut = slice(h * width, (h + 1) * width)
                logits = k[:, cut] @ query[cell][cut] * width**-0.5
                for ki, other in enumerate(cells):
                    row = 0
                    for a, b, w in zip(cell, other, window, strict=True):
                        row = row * (2 * w - 1) + a - b + w - 1
                    logits[ki] += mixer.pos.table[row, h]
                parts.append(logits.softmax(0) @ v[:, cut])
            out[place] = mixer.proj(torch.cat(parts))
    return out


@pytest.mark.parametrize(
    ("sides", "window"), [((7,), (3,)), ((4, 6), (2, 3)), ((5, 7), (2, 3)), ((1, 2), (2, 2)), ((3, 2, 5), (2, 2, 2))]
)
def test_global_attention_equals_the_windows_written_out(sides, window):
    torch.manual_seed(0)
    mixer = GlobalWindowAttention(len(sides), 8, 2, window)
    with torch.no_grad():
        mixer.pos.table.normal_()
        x, query = torch.randn(2, *sides, 8), torch.randn(2, *window, 8)
        want = torch.stack([plain_global(mixer, a, q) for a, q in zip(x, query, strict=True)])
        assert error(mixer(x, query), want) <= 2e-6
        assert error(mixer(x, query.flip(0)), want) > 0.1  # each image has its own query
        if sides == (4, 6):  # without a query: the mean of each cell's share of the map
            own = F.adaptive_avg_pool2d(x.movedim(-1, 1), window).movedim(1, -1)
            assert error(mixer(x), mixer(x, own)) <= 2e-6


def test_a_query_of_another_size_is_refused():
    mixer = GlobalWindowAttention(2, 8, 2, 3)
    with pytest.raises(ValueError, match="global query"):
        mixer(torch.randn(1, 6, 6, 8), torch.randn(1, 2, 2, 8))
    with pytest.raises(ValueError, match="heads"):
        GlobalWindowAttention(2, 8, 3)


def plain_unit(unit, x):
    """The convolution unit of a map x (B, C, H, W)."""
    y = F.gelu(F.conv2d(x, unit.depthwise.weight, padding=1, groups=x.shape[1]))
    gate = F.gelu(y.mean((2, 3)) @ unit.squeeze.weight.t()) @ unit.excite.weight.t()
    return x + F.conv2d(y * gate.sigmoid()[:, :, None, None], unit.project.weight)


def test_units_and_downsampler_equal_the_steps_written_out():
    torch.manual_seed(0)
    down = spread(Downsampler(2, 8, 16))
    assert {n for n, _ in down.named_parameters() if n.endswith("bias")} == {"norm1.bias", "norm2.bias"}
    x = torch.randn(2, 7, 8, 8)
    with torch.no_grad():
        normed = F.layer_norm(x, (8,), down.norm1.weight, down.norm1.bias).movedim(-1, 1)
        y = F.conv2d(plain_unit(down.conv, normed), down.reduction.weight, stride=2, padding=1).movedim(1, -1)
        assert error(down(x), F.layer_norm(y, (16,), down.norm2.weight, down.norm2.bias)) <= 1e-6


@pytest.mark.parametrize(
    ("units", "pools", "sides"), [(3, 3, (16, 24)), (1, 1, (9, 8)), (1, 0, (2, 3)), (2, 2, (5, 5))]
)
def test_the_query_generator_equals_the_steps_written_out(units, pools, sides):
    torch.manual_seed(0)
    query = spread(GlobalQuery(2, 8, (2, 3), units, pools))
    x = torch.randn(2, *sides, 8)
    with torch.no_grad():
        y = x.movedim(-1, 1)
        for i in range(units):
            y = plain_unit(query.units[i], y)
            y = F.max_pool2d(y, 3, 2, 1) if i < pools else y
        if tuple(y.shape[2:]) != (2, 3):
            y = F.interpolate(y, size=(2, 3), mode="bicubic", align_corners=False)
        assert error(query(x), y.movedim(1, -1)) <= 1e-6


def test_the_query_is_of_the_level_s_own_map_before_any_norm():
    model = small()
    seen = {}
    for block in model.stages[1].blocks:
        block.register_forward_pre_hook(lambda m, args: seen.setdefault("states", []).append(args[0]))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)
        states = seen["states"]
        assert all(s[1] is states[0][1] for s in states)  # one query for all blocks
        assert error(states[0][1], model.stages[1].down.query(states[0][0])) == 0
        other = states[0][1] + 1
        local, globally, _ = model.stages[1].blocks
        assert error(local((states[0][0], other))[0], local(states[0])[0]) == 0
        assert error(globally((states[1][0], other))[0], globally(states[1])[0]) > 1e-2


def test_a_block_equals_its_equations():
    block = small().stages[0].blocks[1]
    x, query = torch.randn(2, 8, 8, 16), torch.randn(2, *block.attn.window, 16)
    with torch.no_grad():
        y = x + block.scale1.gamma * block.attn(block.norm1(x), query)
        y = y + block.scale2.gamma * block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y))))
        assert error(block((x, query))[0], y) <= 1e-6


def test_the_dense_version_has_windows_of_24_and_pools_the_third_query():
    model, dense = small(), small(seed=1, features_only=True)
    assert {b.attn.window for s in dense.stages for b in s.blocks} == {(24, 24)}
    assert [s.down.query.pools for s in dense.stages] == [3, 2, 1, 0]
    one, three = (
        vertebra.create_model("gc_vit_xxtiny", n, dim=8, heads=(1, 1, 1, 1), features_only=True) for n in (1, 3)
    )
    assert one.stages[0].blocks[0].attn.window == (24,) and three.stages[0].blocks[0].attn.window == (8, 8, 8)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    assert sorted(report.unused) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    assert len(report.adapted) == 9
    table, wide = (m.stages[0].blocks[1].attn.pos.table.detach() for m in (model, dense))
    grid = table.t().reshape(1, 1, 3, 3)
    want = F.interpolate(grid, size=(47, 47), mode="bicubic", align_corners=False).reshape(1, -1).t()
    assert error(wide, want) <= 1e-6
    x = torch.randn(1, 3, 70, 64)
    with torch.no_grad():
        raw, state = [], dense.embed(x.movedim(1, -1))
        for stage in dense.stages:
            state = stage(state)
            raw.append(state[0])
        for y, z, norm in zip(dense(x), raw, dense.output_norms, strict=True):
            assert error(y, norm(z).movedim(-1, 1)) == 0


def test_windows_follow_the_image_or_the_option():
    def reach(**options):
        return [s.blocks[0].attn.window for s in small(**options).stages]

    assert reach(img_size=(256, 192)) == [(8, 6), (8, 6), (16, 12), (8, 6)]
    assert reach(img_size=100) == [(3, 3), (3, 3), (6, 6), (3, 3)]
    assert reach(window=5) == [(5, 5)] * 4
    assert reach(window=(2, 3, (4, 2), 1)) == [(2, 2), (3, 3), (4, 2), (1, 1)]
    assert small(window=4).stages[2].down.query.pools == 0  # 64 / 16: the window covers the map
    assert small(window=2).stages[2].down.query.pools == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(img_size=31), "img_size"),
        (dict(img_size=(64, 64, 64)), "img_size"),
        (dict(window=0), "window"),
        (dict(window=(7, 7)), "one entry per level"),
        (dict(heads=(3, 3, 3, 3)), "heads"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_flat_map_of_one_more_axis_gives_the_same(ndim):
    """Kernels and windows of one cell along a new first axis: the network of rank ndim + 1 is that of rank ndim."""
    line = small(ndim, window=(2, 3, 2, 2))
    plane = small(ndim + 1, seed=1, window=tuple((1, *(w,) * ndim) for w in (2, 3, 2, 2)))
    state = line.state_dict()
    for name, want in plane.state_dict().items():
        if state[name].shape != want.shape:
            middle = want.shape[2] // 2
            wide = torch.zeros_like(want)
            wide[:, :, middle] = state[name]
            state[name] = wide
    plane.load_state_dict(state)
    line.stages[2].down.query.pools = plane.stages[2].down.query.pools = 1
    x = torch.randn(2, *(50, 41)[:ndim], 3)
    with torch.no_grad():
        a, b = line.through(line.embed(x))[0], plane.through(plane.embed(x.unsqueeze(1)))[0]
    assert error(b[0].squeeze(1), a[0]) <= 2e-6 and error(b[1].squeeze(1), a[1]) <= 2e-6


def test_official_names():
    names = set(vertebra.to_official(small()))
    assert {
        "patch_embed.proj.bias", "patch_embed.conv_down.conv.2.fc.0.weight", "levels.0.downsample.conv.3.weight",
        "levels.0.q_global_gen.to_q_global.2.conv.2.fc.2.weight", "levels.1.blocks.1.attn.qkv.bias",
        "levels.3.blocks.1.gamma2", "levels.2.blocks.0.attn.relative_position_bias_table", "norm.bias", "head.weight",
    } <= names  # fmt: skip
    assert not any(n.startswith("levels.3.downsample") for n in names)
    assert vertebra.to_official(small())["levels.1.blocks.1.attn.qkv.weight"].shape == (64, 32)
    model, state = small(), vertebra.to_official(small(seed=1))
    state["levels.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    assert not vertebra.load_checkpoint(model, {"state_dict": state}).unexpected


def test_drop_path_grows_over_all_blocks_and_tables_and_scales_are_not_decayed():
    model = small(drop_path_rate=0.4)
    rates = [b.drop_path.rate for s in model.stages for b in s.blocks]
    assert rates == pytest.approx([0.05 * i for i in range(9)])
    assert {n.rsplit(".", 1)[1] for n in model.no_weight_decay()} == {"table", "gamma"}
    assert len(model.no_weight_decay()) == 9 * 3
