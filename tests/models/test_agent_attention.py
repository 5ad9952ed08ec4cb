"""Agent attention: the two softmaxes and their tables written out, the four hosts' quirks, dense versions, loading."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from test_mixers import peak_bytes
from vertebra.mixers import AgentAttention, CrossShapedAttention, SpatialReductionAttention, WindowAttention
from vertebra.models.agent_attention import FAMILY

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
SMALL = {
    "agent_deit_tiny": dict(dim=24, depth=3, heads=3, agents=9, agent_blocks=2, img_size=64),
    "agent_pvt_tiny": dict(dims=(8, 16, 24, 32), heads=(1, 2, 3, 4), depths=(1, 1, 2, 1), img_size=64),
    "agent_swin_tiny": dict(
        dim=12, heads=(1, 2, 3, 4), depths=(1, 1, 4, 1), agent_blocks=(1, 1, 1, 0), window=2, img_size=64
    ),
    "agent_cswin_tiny": dict(
        dim=12, heads=(2, 2, 4, 4), depths=(1, 1, 2, 1), agent_blocks=(1, 1, 1, 0), stripes=(1, 2, 2, 2), img_size=64
    ),
}
each = pytest.mark.parametrize("name", SMALL)


def small(name, **options):
    torch.manual_seed(0)
    return fill(vertebra.create_model(name, num_classes=7, **(SMALL[name] | options)))


def wake(mixer):
    """Tables as large as the logits, so that a misplaced bias shows."""
    with torch.no_grad():
        for p in fill(mixer).parameters():
            p.normal_(std=0.7 if p.ndim > 2 else 0.3)
    return mixer


def along(table, axis, old, new, ndim):
    """`table` with axis `axis` (sides `old`, flat) resized linearly by torch's own interpolation."""
    moved = table.movedim(axis, -1)
    cells = F.interpolate(moved.reshape(1, -1, *old), size=new, mode=MODES[len(old)], align_corners=False)
    return cells.reshape(*moved.shape[:-1], math.prod(new)).movedim(-1, axis)


def written_out(m, x, grid):
    """Agent attention of tokens x (1, P + N, C), each bias put together cell by cell."""
    ndim, heads, p, dim = len(grid), m.heads, m.prefix, x.shape[-1]
    width, cells = dim // heads, list(itertools.product(*map(range, grid)))
    q, k, v = m.qkv(x).chunk(3, -1) if m.packed else (m.q(x), *m.kv(x).chunk(2, -1))
    as_map = lambda t: t[:, p:].mT.reshape(1, dim, *grid)  # noqa: E731
    a = getattr(F, f"adaptive_avg_pool{ndim}d")(as_map(q), m.pooled).flatten(2).mT
    count = math.prod(m.agents)
    an, na = (
        F.interpolate(t.reshape(1, -1, *(7,) * ndim), size=grid, mode=MODES[ndim], align_corners=False)
        .reshape(heads, count, *grid) for t in (m.an_bias, m.na_bias)
    )  # fmt: skip
    lines = []  # per axis: what agents and what tokens read, (heads, A, side) both
    for axis, letter in enumerate("dhw"[-ndim:]):
        both = (getattr(m, f"a{letter}_bias").flatten(2), getattr(m, f"{letter}a_bias").flatten(2))
        both = (both[0].reshape(heads, count, -1), both[1].reshape(heads, -1, count).mT)
        lines.append([along(t, 2, (m.size[axis],), (grid[axis],), ndim) for t in both])
    gather, spread = torch.zeros(heads, count, p + len(cells)), torch.zeros(heads, p + len(cells), count)
    if p:
        gather[:, :, :p], spread[:, :p] = m.ac_bias[0], m.ca_bias[0]
    for n, cell in enumerate(cells):
        gather[:, :, p + n] = an[(..., *cell)] + sum(lines[i][0][:, :, c] for i, c in enumerate(cell))
        spread[:, p + n] = na[(..., *cell)] + sum(lines[i][1][:, :, c] for i, c in enumerate(cell))
    if m.pooled != m.agents:  # the dense code: first the map, then the agents
        gather, spread = (along(t, i, m.agents, m.pooled, ndim) for t, i in ((gather, 1), (spread, 2)))
    out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        held = ((a[..., part] * width**-0.5) @ k[..., part].mT + gather[h]).softmax(-1) @ v[..., part]
        out.append(((q[..., part] * width**-0.5) @ a[..., part].mT + spread[h]).softmax(-1) @ held)
    y = torch.cat(out, -1)
    y[:, p:] += getattr(F, f"conv{ndim}d")(as_map(v), m.dwc.weight, m.dwc.bias, padding=1, groups=dim).flatten(2).mT
    return m.proj(y)


@pytest.mark.parametrize(("prefix", "packed", "pooled"), [(0, True, None), (1, True, None), (0, False, 16)])
@pytest.mark.parametrize(
    ("ndim", "size", "grid"),
    [(1, 12, (12,)), (1, 12, (19,)), (2, (6, 5), (6, 5)), (2, 6, (9, 4)), (3, (4, 3, 5), (4, 3, 5)), (3, 4, (3, 6, 5))],
)
@torch.no_grad()
def test_agent_attention_as_the_paper_writes_it(ndim, size, grid, prefix, packed, pooled):
    m = wake(AgentAttention(ndim, 12, 3, size, 9, pooled, prefix, packed))
    x = torch.randn(1, prefix + math.prod(grid), 12)
    want = written_out(m, x, grid)
    assert error(m(x, grid), want) <= 1e-6
    if not prefix:
        assert error(m(x.reshape(1, *grid, 12)).flatten(1, -2), want) <= 1e-6
    tables = {k: v for k, v in m.named_parameters() if k.endswith("_bias")}
    assert len(tables) == 2 + 2 * ndim + 2 * prefix
    for table in tables.values():  # each of them counts
        kept = table.clone()
        table.zero_()
        assert error(m(x, grid), want) > 1e-4
        table.copy_(kept)


@pytest.mark.parametrize("train", [False, True])
def test_memory_of_agent_attention_is_linear_in_the_tokens(train):
    m, peaks = AgentAttention(2, 32, 2, 14).train(train), []
    for side in (28, 56):
        x = torch.randn(1, side, side, 32, requires_grad=train)
        with torch.set_grad_enabled(train):
            peaks.append(peak_bytes(lambda x=x: m(x).sum().backward() if train else m(x)))
    assert 3.4 <= peaks[1] / peaks[0] <= 4.2  # four times the tokens


@pytest.mark.parametrize("agents", [1, 9, 49])
def test_number_of_agents_at_each_rank(agents):
    side = math.isqrt(agents)
    assert AgentAttention(2, 8, 2, 7, agents).agents == (side, side)
    assert AgentAttention(1, 8, 2, 7, agents).agents == (agents,)
    assert AgentAttention(3, 8, 2, 7, agents).agents == ({1: 1, 9: 2, 49: 4}[agents],) * 3
    with pytest.raises(ValueError, match="square"):
        AgentAttention(2, 8, 2, 7, agents + 1)


def test_prefix_tokens_need_a_grid():
    with pytest.raises(ValueError, match="grid"):
        AgentAttention(2, 8, 2, 4, prefix=1)(torch.randn(1, 17, 8))


# --- stripes ------------------------------------------------------------------------------------------------------


def stripe_by_stripe(m, x):
    """Cross-shaped attention of x (1, *S, C) by slicing each stripe out; a ragged one is short."""
    ndim, dim, sides = x.ndim - 2, x.shape[-1], x.shape[1:-1]
    q, k, v = m.qkv(x).chunk(3, -1)
    out, start, width = torch.zeros_like(x), 0, dim // m.heads
    axes = [None] if m.whole else [None, 0] if ndim == 1 else range(ndim)
    for axis, share, conv in zip(axes, m.shares, m.local, strict=True):
        channels = slice(start, start + share * width)
        start += share * width
        full = [m.whole or i == axis for i in range(ndim)]
        steps = [[slice(0, s)] if f else [slice(i, i + m.stripe) for i in range(0, s, m.stripe)]
                 for s, f in zip(sides, full, strict=True)]  # fmt: skip
        for place in itertools.product(*steps):
            qs, ks, vs = (t[(slice(None), *place, channels)] for t in (q, k, v))
            local = getattr(F, f"conv{ndim}d")(
                vs.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=vs.shape[-1]
            )
            heads = []
            for h in range(share):
                qh, kh, vh = (t[..., h * width : (h + 1) * width].flatten(1, -2) for t in (qs, ks, vs))
                heads.append((qh @ kh.mT * width**-0.5).softmax(-1) @ vh)
            out[(slice(None), *place, channels)] = torch.cat(heads, -1).reshape(vs.shape) + local.movedim(1, -1)
    return m.proj(out)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("ndim", "sides"), [(1, (12,)), (1, (11,)), (2, (6, 9)), (2, (7, 4)), (2, (2, 5)), (3, (6, 3, 6)), (3, (4, 5, 3))]
)
@torch.no_grad()
def test_cross_shaped_attention_stripe_by_stripe(ndim, sides, whole):
    m, x = wake(CrossShapedAttention(ndim, 20, 5, 3, whole)), torch.randn(1, *sides, 20)
    assert m.shares == ([5] if whole else [1, 2, 2] if ndim == 3 else [2, 3])
    assert error(m(x), stripe_by_stripe(m, x)) <= 1e-6
    assert error(m(x.repeat(2, *[1] * (ndim + 1)))[1:], m(x)) <= 1e-6


@torch.no_grad()
def test_stripes_of_a_line_are_those_of_an_image_of_height_one():
    line, plane = wake(CrossShapedAttention(1, 8, 4, 3)), CrossShapedAttention(2, 8, 4, 3)
    state = {k: v.unsqueeze(2) if v.ndim == 3 else v for k, v in line.state_dict().items()}
    plane.load_state_dict({k: F.pad(v, (0, 0, 1, 1)) if v.ndim == 4 else v for k, v in state.items()})
    x = torch.randn(2, 11, 8)
    assert error(line(x), plane(x.unsqueeze(1)).squeeze(1)) <= 1e-6


def test_too_few_heads_for_stripes():
    with pytest.raises(ValueError, match="2 heads"):
        CrossShapedAttention(3, 8, 2)
    with pytest.raises(ValueError, match="stripe"):
        CrossShapedAttention(2, 8, 2, 0)


# --- hosts ----------------------------------------------------------------------------------------------------------


def kinds(model):
    """One letter per block and stage: A for agents, B for the host's own attention."""
    return ["".join("A" if isinstance(b.attn, AgentAttention) else "B" for b in s.blocks) for s in model.stages]


@pytest.mark.parametrize("name", FAMILY.variants)
def test_published_arrangement(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    size, found = vertebra.model_info(name).inputs.size, kinds(model)
    mixers = [[b.attn for b in s.blocks] for s in model.stages]
    agents = [m.agents for row in mixers for m in row if isinstance(m, AgentAttention)]
    if "deit" in name:
        assert "".join(found) == ("AAAABBBBBBBB" if "base" in name else "A" * 12)
        assert set(agents) == {(9, 9) if "base" in name else (7, 7)}
        assert {m.agents for (m,) in mixers[:4]} == set(agents) and mixers[0][0].size == (size // 16,) * 2
        return
    assert [m.size[0] for row in mixers for m in row[:1] if isinstance(m, AgentAttention)] == [
        size // s for s, row in zip((4, 8, 16, 32), found, strict=True) if row[0] == "A"
    ]
    sides = {size // s: (side, side) for s, side in zip((4, 8, 16, 32), (3, 4, 7, 7), strict=True)}
    for row in mixers:
        assert all(m.agents == sides[m.size[0]] == m.pooled for m in row if isinstance(m, AgentAttention))
    whole = [row[0] if len(set(row)) == 1 else row.rstrip("B") for row in found]
    if "pvt" in name:
        assert whole == ["A"] * 4 and all(not m.packed for row in mixers for m in row)
    elif "swin" in name and "cswin" not in name:
        assert (
            whole
            == {"tiny": ["A", "A", "A", "B"], "small": ["A", "A", "B", "B"], "base": ["A", "A", "AA", "B"]}[
                name.split("_")[2]
            ]
        )
        window = {224: 7, 288: 9, 384: 12}[size]
        for row in mixers[2:]:  # the place in the stage decides about the shift, the last map has one window
            for j, m in enumerate(row):
                if isinstance(m, WindowAttention):
                    assert (m.window, m.shift) == (
                        (window,) * 2,
                        (window // 2 * (j % 2 if row is mixers[2] else 0),) * 2,
                    )
    else:
        assert whole == ["A", "A", "B", "B"]
        assert {(m.stripe, m.whole, len(m.local)) for m in mixers[2]} == {(size // 32, False, 2)}
        assert {(m.whole, len(m.local)) for m in mixers[3]} == {(True, 1)}


@pytest.mark.parametrize(("name", "outer"), [("agent_deit_tiny", 1e-6), ("agent_pvt_tiny", 1e-5)])
def test_eps(name, outer):
    for key, module in small(name).named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-6 if ".blocks." in key else outer), key
    assert {m.eps for m in small("agent_swin_tiny").modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in small("agent_cswin_tiny").modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@torch.no_grad()
def test_pvt_pools_without_a_norm_and_has_no_class_token():
    model, x = small("agent_pvt_tiny"), torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert features.shape == (2, 32, 2, 3)
    torch.testing.assert_close(model(x), model.head(features.mean((2, 3))))
    assert not any("norm" in n for n, _ in model.named_modules() if n.count(".") == 0)
    assert vertebra.to_official(model)["pos_embed4"].shape == (1, 4, 32)


@torch.no_grad()
def test_pvt_blocks_without_agents_reduce_as_pvt_does():
    model = small("agent_pvt_tiny", agent_blocks=(0, 1, 1, 0))
    assert kinds(model) == ["B", "A", "AB", "B"]
    last = [s.blocks[-1].attn for s in model.stages]
    assert [m.sr.kernel[0] if m.reduced else 1 for m in last if isinstance(m, SpatialReductionAttention)] == [8, 2, 1]
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


@torch.no_grad()
def test_cswin_convolutions_and_pooling():
    model, x = small("agent_cswin_tiny"), torch.randn(1, 3, 75, 64)
    stem, merge = model.patch_embed.proj, model.stages[1].down.proj
    first = F.conv2d(x, stem.weight, stem.bias, 4, 2)
    normed = F.layer_norm(first.movedim(1, -1), (12,), model.patch_embed.norm.weight, model.patch_embed.norm.bias)
    torch.testing.assert_close(model.embed(x.movedim(1, -1)), normed)
    assert first.shape[2:] == (19, 16) and (merge.kernel, merge.stride, merge.padding) == ((3, 3), (2, 2), (1, 1))
    maps = model.forward_intermediates(x)
    assert [tuple(m.shape[2:]) for m in maps] == [(19, 16), (10, 8), (5, 4), (3, 2)]
    torch.testing.assert_close(model(x), model.head(model.norm(maps[-1].movedim(1, -1)).mean((1, 2))))


@torch.no_grad()
def test_deit_class_token_is_key_and_query_but_no_agent():
    model = small("agent_deit_tiny")
    m, x = model.stages[0].blocks[0].attn, torch.randn(1, 17, 24)
    assert error(m(x, (4, 4)), written_out(m, x, (4, 4))) <= 1e-6
    assert [type(s.blocks[0].attn).__name__ for s in model.stages] == ["AgentAttention", "AgentAttention", "Attention"]
    wide = torch.randn(2, 3, 64, 97)  # another grid: the tables follow, and so does the blocks' state
    assert model.forward_features(wide).shape == (2, 1 + 4 * 7, 24)


@torch.no_grad()
def test_swin_agents_see_the_whole_map():
    model = small("agent_swin_tiny")
    x, y = torch.randn(1, 16, 16, 12), None
    y = x.clone()
    y[:, -1, -1] += 3
    agents, windowed = model.stages[0].blocks[0].attn, WindowAttention(2, 12, 1, 2)
    assert (agents(x) - agents(y))[0, 0, 0].abs().max() > 1e-5
    assert torch.equal(windowed(x)[0, 0, 0], windowed(y)[0, 0, 0])


# --- dense versions and loading ---------------------------------------------------------------------------------------


def test_dense_versions_have_more_agents():
    for name, sides in (("agent_pvt_tiny", (12, 16, 28, 28)), ("agent_swin_tiny", (9, 12, 14))):
        model, dense = small(name), small(name, features_only=True)
        report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
        want = [f"norm{i}.{leaf}" for i in range(4) for leaf in ("bias", "weight")] if "swin" in name else []
        assert sorted(report.fresh) == want and not report.adapted
        mixers = [s.blocks[0].attn for s in dense.stages[: len(sides)]]
        assert [m.pooled[0] for m in mixers] == list(sides) and [m.agents[0] for m in mixers] == [3, 4, 7, 7][
            : len(sides)
        ]
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 96)
        model = wake(small("agent_pvt_tiny"))
        state, raw = vertebra.to_official(model), model.forward_intermediates(x)
        more = small("agent_pvt_tiny", features_only=True)
        same = small("agent_pvt_tiny", features_only=True, dense_agents=(9, 16, 49, 49))
        more, same = (vertebra.load_checkpoint(m, state) and m(x) for m in (more, same))
    assert all(torch.equal(a, b) for a, b in zip(same, raw, strict=True))
    assert error(more[0], raw[0]) > 1e-4


@pytest.mark.parametrize("name", ["agent_pvt_tiny", "agent_swin_tiny", "agent_cswin_tiny"])
@torch.no_grad()
def test_loading_into_another_size_equals_resizing_in_the_forward_pass(name):
    plain = small(name)
    built = small(name, img_size=(96, 128), checkpoint=vertebra.to_official(plain))
    vertebra.load_checkpoint(built, vertebra.to_official(plain))
    x = torch.randn(1, 3, 96, 128)
    assert error(built(x), plain(x)) <= 1e-5
    attn = built.stages[0].blocks[0].attn
    assert attn.ah_bias.shape[3:] == (24, 1) and attn.wa_bias.shape[2:4] == (1, 32)
    old = plain.stages[0].blocks[0].attn.ha_bias  # linear along its own axis
    want = F.interpolate(old[0, :, :, 0].mT, size=24, mode="linear", align_corners=False).mT
    torch.testing.assert_close(attn.ha_bias[0, :, :, 0], want)


@torch.no_grad()
def test_tables_of_another_number_of_agents_are_resampled():
    few, many = wake(AgentAttention(2, 8, 2, 6, 9, prefix=1)), AgentAttention(2, 8, 2, 6, 16, prefix=1)
    for name, table in few.named_parameters():
        if name.endswith("_bias"):
            axis = 1 if name in ("an_bias", "na_bias") else 2 if name[0] == "a" else table.ndim - 1
            torch.testing.assert_close(many.adapt(name, table), along(table, axis, (3, 3), (4, 4), 2))
    assert many.adapt("ah_bias", torch.zeros(1, 3, 9, 6, 1)) is None  # other heads
    assert many.adapt("ah_bias", torch.zeros(1, 2, 10, 6, 1)) is None  # no square
    assert many.adapt("an_bias", torch.zeros(2, 9, 7)) is None
    with pytest.raises(vertebra.CheckpointError, match="ah_bias"):
        model = small("agent_deit_tiny")
        state = vertebra.to_official(model)
        state["blocks.0.attn.ah_bias"] = torch.zeros(1, 3, 10, 4, 1)
        vertebra.load_checkpoint(model, state)


def test_official_names():
    names = {n: set(vertebra.to_official(small(n))) for n in SMALL}
    assert {"blocks.1.attn.ca_bias", "blocks.0.attn.dwc.weight", "blocks.2.attn.qkv.bias"} <= names["agent_deit_tiny"]
    assert {"block3.1.attn.kv.weight", "block1.0.attn.an_bias", "patch_embed2.norm.bias"} <= names["agent_pvt_tiny"]
    assert {
        "layers.2.blocks.0.attn.wa_bias", "layers.2.blocks.1.attn.relative_position_bias_table",
        "layers.0.downsample.reduction.weight",
    } <= names["agent_swin_tiny"]  # fmt: skip
    assert {
        "stage1_conv_embed.2.weight", "merge3.conv.bias", "merge1.norm.weight", "stage1.0.attns.0.get_v.weight",
        "stage1.0.attns.0.aw_bias", "stage1.0.qkv.bias", "stage3.1.attns.1.get_v.bias", "stage4.0.proj.weight",
    } <= names["agent_cswin_tiny"]  # fmt: skip


@each
def test_biases_have_weight_decay_and_start_small(name):
    model = vertebra.create_model(name, **SMALL[name])
    assert not any(n.endswith("_bias") for n in model.no_weight_decay())
    tables = [p for n, p in model.named_parameters() if n.endswith("_bias")]
    assert torch.cat([t.flatten() for t in tables]).std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["agent_pvt_tiny", "agent_swin_tiny", "agent_cswin_tiny"])
def test_options_are_per_stage(name):
    with pytest.raises(ValueError, match="agents needs one number per stage, 4 in all"):
        small(name, agents=(9, 16))
