"""CloFormer: both branches of its mixer and the shrinking block written out, and published configurations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import Block, DeepStem, DownBlock
from vertebra.mixers import CloAttention

SMALL = dict(dims=(16, 24, 32, 40), depths=(2, 1, 3, 1), heads=(4, 4, 8, 8), shares=((3, 1), (2, 2), (4, 4), (2, 6)))
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIDES = (17, 9, 8)
ranks = pytest.mark.parametrize("ndim", (1, 2, 3))


def small(**options):
    torch.manual_seed(4)
    return fill(vertebra.create_model("cloformer_xxs", **(SMALL | dict(num_classes=7) | options)))


def point(conv, x):
    """A 1x1 convolution of (B, *S, C) as a product."""
    return x @ conv.weight.flatten(1).T + conv.bias


def one_group(norm, x):
    """Group norm of one group: statistics over channels and cells of a sample."""
    axes = tuple(range(1, x.ndim))
    return (x - x.mean(axes, True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def local_branch(branch, x, kernel, head_width):
    """Channel by channel: convolution of q, k and v alike, gate from their product, scale before tanh."""
    ndim, y = x.ndim - 2, point(branch.qkv, x).movedim(-1, 1)
    maps = [
        CONVS[ndim](y[:, c : c + 1], branch.conv.weight[c : c + 1], branch.conv.bias[c : c + 1], padding=kernel // 2)
        for c in range(y.shape[1])
    ]
    share = len(maps) // 3
    q, k, v = (torch.cat(maps[i * share : (i + 1) * share], 1).movedim(1, -1) for i in range(3))
    gate = point(branch.gate[0], q * k)
    gate = point(branch.gate[2], gate * gate.sigmoid())
    return (gate / head_width**0.5).tanh() * v


def global_branch(mixer, x, heads, width, window):
    """Head by head over keys that are means of whole windows."""
    batch, ndim = x.shape[0], x.ndim - 2
    pooled, counts = x, [s // window for s in x.shape[1:-1]]
    for axis, count in enumerate(counts, start=1):
        rows = [pooled.narrow(axis, i * window, window).mean(axis, True) for i in range(count)]
        pooled = torch.cat(rows, axis)
    q = point(mixer.q, x).reshape(batch, -1, heads, width)
    kv = point(mixer.kv, pooled).reshape(batch, -1, 2, heads, width)
    out = torch.empty_like(q)
    for h in range(heads):
        weights = (q[:, :, h] @ kv[:, :, 0, h].transpose(1, 2) / width**0.5).softmax(-1)
        out[:, :, h] = weights @ kv[:, :, 1, h]
    return out.reshape(*x.shape[: ndim + 1], heads * width)


@ranks
@pytest.mark.parametrize("window", (1, 4))
def test_mixer_is_local_beside_global(ndim, window):
    torch.manual_seed(1)
    mixer = fill(CloAttention(ndim, 24, 6, (1, 3, 2), (3, 5), window))
    with torch.no_grad():
        for p in mixer.parameters():
            p.mul_(6)  # so that neither tanh nor softmax is near its flat start
    x = torch.randn(2, *SIDES[:ndim], 24)
    parts = [local_branch(mixer.local[0], x, 3, 4), local_branch(mixer.local[1], x, 5, 4)]
    parts.append(global_branch(mixer, x, 2, 4, window))
    assert error(mixer(x), point(mixer.proj, torch.cat(parts, -1))) < 1e-5


def test_a_branch_without_heads_does_not_exist():
    x = torch.randn(2, 6, 5, 24)
    near, far = fill(CloAttention(2, 24, 4, (4, 0), (3,))), fill(CloAttention(2, 24, 4, (4,), (), 2))
    assert not hasattr(near, "q") and len(far.local) == 0
    assert error(near(x), point(near.proj, local_branch(near.local[0], x, 3, 6))) < 1e-5
    assert error(far(x), point(far.proj, global_branch(far, x, 4, 6, 2))) < 1e-5


def test_a_map_smaller_than_the_window_has_one_key_along_that_side():
    mixer, x = fill(CloAttention(2, 24, 4, (4,), (), 8)), torch.randn(2, 3, 19, 24)
    keys = x[:, :, :16].reshape(2, 3, 2, 8, 24).mean((1, 3))
    k, v = point(mixer.kv, keys).chunk(2, -1)
    q = point(mixer.q, x).flatten(1, 2)
    parts = zip(*(t.split(6, -1) for t in (q, k, v)), strict=True)
    heads = [F.softmax(a @ b.transpose(1, 2) / 6**0.5, -1) @ c for a, b, c in parts]
    assert error(mixer(x), point(mixer.proj, torch.cat(heads, -1)).reshape(x.shape)) < 1e-5


@pytest.mark.parametrize("shares", [(3, 2), (4,), (5, -1), ()])
def test_shares_that_do_not_fit(shares):
    with pytest.raises(ValueError, match="must sum to 4 heads"):
        CloAttention(2, 24, 4, shares, (3,))


@ranks
def test_stem(ndim):
    torch.manual_seed(2)
    stem, x = fill(DeepStem(ndim, 3, 8)), torch.randn(2, *SIDES[:ndim], 3)
    y = x.movedim(-1, 1)
    for i, layer in enumerate(stem.convs):
        layer.norm.running_mean.normal_(std=0.1), layer.norm.running_var.uniform_(0.5, 2)
        n = layer.norm
        y = CONVS[ndim](y, layer.conv.weight, layer.conv.bias, stride=2 if i < 2 else 1, padding=1)
        y = F.relu(F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5))
    assert len(stem.convs) == 4 and stem.convs[0].conv.weight.shape[:2] == (4, 3)
    ours = stem(x)
    assert error(ours, one_group(stem.norm, point(stem.proj, y.movedim(1, -1)))) < 1e-5
    assert ours.shape == (2, *((s + 3) // 4 for s in SIDES[:ndim]), 8)


@ranks
def test_the_last_block_of_a_stage_shrinks_the_map(ndim):
    model = small(ndim=ndim)
    (block,) = model.stages[1].down  # the second block of the first published stage
    shortcut, middle = block.shortcut, block.mlp.middle
    shortcut[0].norm.running_mean.normal_(std=0.1), shortcut[0].norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, *SIDES[:ndim], 16)
    x1 = x + block.attn(one_group(block.norm1, x))  # at the high resolution
    n = shortcut[0].norm
    assert shortcut[0].conv.groups == 1  # dense
    short = CONVS[ndim](x1.movedim(-1, 1), shortcut[0].conv.weight, shortcut[0].conv.bias, stride=2, padding=2)
    short = F.batch_norm(short, n.running_mean, n.running_var, n.weight, n.bias, eps=1e-5).movedim(1, -1)
    h = F.gelu(point(block.mlp.fc1, one_group(block.norm2, x1))).movedim(-1, 1)
    h = CONVS[ndim](h, middle.weight, middle.bias, stride=2, padding=2, groups=64).movedim(1, -1)
    want = point(shortcut[1], short) + point(block.mlp.fc2, h)
    assert want.shape == (2, *((s + 1) // 2 for s in SIDES[:ndim]), 24)
    with torch.no_grad():
        assert error(block(x), want) < 1e-5


def test_an_ordinary_block_keeps_size_and_width():
    block, x = small().stages[0].blocks[0], torch.randn(2, 9, 8, 16)
    x1 = x + block.attn(one_group(block.norm1, x))
    h = F.gelu(point(block.mlp.fc1, one_group(block.norm2, x1))).movedim(-1, 1)
    h = F.conv2d(h, block.mlp.middle.weight, block.mlp.middle.bias, padding=2, groups=64).movedim(1, -1)
    assert error(block(x), x1 + point(block.mlp.fc2, h)) < 1e-5


def test_stages_end_before_the_block_that_shrinks():
    model = small(drop_path_rate=0.6)
    kinds = [[type(b) for b in (*stage.down.children(), *stage.blocks)] for stage in model.stages]
    assert kinds == [[Block], [DownBlock], [DownBlock, Block, Block], [DownBlock, Block]]
    blocks = [b for stage in model.stages for b in (*stage.down.children(), *stage.blocks)]
    assert [b.drop_path.rate for b in blocks] == pytest.approx([0.1 * i for i in range(7)])
    names = {".".join(k.split(".")[:4]) for k in vertebra.to_official(model) if k.startswith("layers")}
    counts = [sum(n.startswith(f"layers.{i}.") for n in names) for i in range(4)]
    assert counts == [2, 1, 3, 1]
    shrinking = {k.split(".downsample")[0] for k in vertebra.to_official(model) if ".downsample." in k}
    assert shrinking == {"layers.0.blocks.1", "layers.1.blocks.0", "layers.2.blocks.2"}


def test_maps_are_raw_and_the_norm_comes_before_the_mean():
    model, dense = small(), small(features_only=True)
    vertebra.load_checkpoint(dense, vertebra.to_official(model))
    x = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        maps = dense(x)
        assert [tuple(m.shape[2:]) for m in maps] == [(12, 18), (6, 9), (3, 5), (2, 3)]
        last = one_group(model.norm, maps[-1].movedim(1, -1))
        torch.testing.assert_close(model.head(last.mean((1, 2))), model(x), rtol=1e-4, atol=1e-5)


def test_a_line_is_a_map_of_height_one():
    """Without pooling and with all weights outside of the middle row zero, both ranks are the same network."""
    torch.manual_seed(5)
    line = fill(CloAttention(1, 24, 4, (2, 2), (5,)))
    flat = fill(CloAttention(2, 24, 4, (2, 2), (5,)))
    state = {k: v.unsqueeze(2) if v.ndim == 3 else v for k, v in line.state_dict().items()}
    state["local.0.conv.weight"] = F.pad(state["local.0.conv.weight"], (0, 0, 2, 2))
    flat.load_state_dict(state)
    x = torch.randn(2, 13, 24)
    assert error(line(x), flat(x[:, None])[:, 0]) < 1e-5


def test_wrong_depths():
    with pytest.raises(ValueError, match="depths needs"):
        small(depths=(1, 1, 1))
    with pytest.raises(ValueError, match="depths needs"):
        small(depths=(1, 0, 1, 1))


def test_published_configurations():
    def count(name, **options):
        with torch.device("meta"):
            model = vertebra.create_model(name, **options)
        return round(sum(p.numel() for p in model.parameters()) / 1e6, 3)

    counts = {n: count(n) for n in vertebra.list_models("cloformer_*")}
    assert counts == {"cloformer_xxs": 4.167, "cloformer_xs": 7.172, "cloformer_s": 12.346}
    heads = (4, 4, 8, 16)  # the paper's ablations
    assert count("cloformer_xxs", shares=[(h,) for h in heads], kernels=((),) * 4) == 3.998
    assert count("cloformer_xxs", shares=[(h, 0) for h in heads]) == 4.733
    with torch.device("meta"):
        model = vertebra.create_model("cloformer_xs")
    attns = [stage.blocks[0].attn for stage in model.stages]
    assert [a.window for a in attns] == [8, 4, 2, 1] and [a.heads for a in attns] == [1, 3, 5, 15]
    assert [a.local[0].conv.kernel for a in attns] == [(3, 3), (5, 5), (7, 7), (9, 9)]
    assert {a.local[0].scale for a in attns} == {16**-0.5}
    eps = {m.eps for m in model.modules() if hasattr(m, "eps")}
    assert eps == {1e-5}
