"""FAT: its attention, its ways to make maps smaller and its blocks written out, and published configurations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import BatchNorm, Block, DownBlock
from vertebra.mixers import FullyAdaptiveAttention

SMALL = dict(dims=(16, 24, 32, 40), depths=(2, 1, 3, 1), heads=(2, 2, 4, 4))
CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIDES = (17, 9, 8)
ranks = pytest.mark.parametrize("ndim", (1, 2, 3))


def shake(module):
    """Weights and batch statistics far from their initialisation."""
    fill(module)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module


def small(**options):
    torch.manual_seed(4)
    return shake(vertebra.create_model("fat_b0", **(SMALL | dict(num_classes=7) | options)))


def point(conv, x):
    """A 1x1 convolution of (B, *S, C) as a product."""
    return x @ conv.weight.flatten(1).T + conv.bias


def depthwise(conv, x, stride=1):
    """Each channel for itself: (B, *S, C), padded by half of the kernel."""
    call, y, pad = CONVS[x.ndim - 2], x.movedim(-1, 1), conv.weight.shape[-1] // 2
    assert conv.weight.shape[1] == 1
    maps = [
        call(y[:, c : c + 1], conv.weight[c : c + 1], conv.bias[c : c + 1], stride=stride, padding=pad)
        for c in range(y.shape[1])
    ]
    return torch.cat(maps, 1).movedim(1, -1)


def batch_norm(n, x):
    return (x - n.running_mean) / (n.running_var + 1e-5).sqrt() * n.weight + n.bias


def one_group(norm, x):
    axes = tuple(range(1, x.ndim))
    return (x - x.mean(axes, True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def attention(mixer, x, heads, steps):
    """Near and far from one projection; far gates near, near does not gate far."""
    q, y, width = point(mixer.q, x), x, x.shape[-1] // heads
    for i in range(steps):
        y = batch_norm(mixer.down.convs[i].norm, depthwise(mixer.down.convs[i].conv, y, 2))
        if i < steps - 1:
            y = point(mixer.down.mixes[i], y)
    k, v = (t.flatten(1, -2) for t in point(mixer.kv, y).chunk(2, -1))
    far, rows = torch.empty_like(q.flatten(1, -2)), q.flatten(1, -2)
    for h in range(heads):
        one = slice(h * width, (h + 1) * width)
        far[..., one] = (rows[..., one] @ k[..., one].transpose(1, 2) / width**0.5).softmax(-1) @ v[..., one]
    far = far.reshape(x.shape)
    near = depthwise(mixer.local, q)
    return point(mixer.proj, near * near.sigmoid() * far.sigmoid() * far)


@ranks
@pytest.mark.parametrize(("window", "steps", "kernel"), [(1, 0, 3), (2, 1, 5), (8, 3, 3)])
def test_attention(ndim, window, steps, kernel):
    torch.manual_seed(1)
    mixer = shake(FullyAdaptiveAttention(ndim, 12, 3, kernel, window))
    with torch.no_grad():
        for p in mixer.parameters():
            p.mul_(4)  # so that the softmax is not flat
        x = torch.randn(2, *SIDES[:ndim], 12)
        assert len(mixer.down.convs) == steps and len(mixer.down.mixes) == max(steps - 1, 0)
        assert mixer.down(x).shape[1:-1] == tuple((s + window - 1) // window for s in SIDES[:ndim])
        assert error(mixer(x), attention(mixer, x, 3, steps)) < 1e-5


@pytest.mark.parametrize("window", (0, 3, 6, -2))
def test_windows_are_powers_of_two(window):
    with pytest.raises(ValueError, match="power of two"):
        FullyAdaptiveAttention(2, 12, 3, 3, window)


@ranks
@pytest.mark.parametrize("shrink", (False, True))
def test_blocks(ndim, shrink):
    model = small(ndim=ndim)
    block = model.stages[1].down[0] if shrink else model.stages[0].blocks[0]
    assert type(block) is (DownBlock if shrink else Block)
    x, mlp = torch.randn(2, *SIDES[:ndim], 16), block.mlp
    with torch.no_grad():
        y = x + depthwise(block.position.conv, x)  # no norm before it
        y = y + attention(block.attn, one_group(block.norm1, y), 2, 3)
        h = F.gelu(point(mlp.fc1, one_group(block.norm2, y)))
        if shrink:  # the residual of the hidden map goes, its norm stays; the shortcut is depthwise
            h = depthwise(mlp.middle.conv, h, 2)
            short = block.shortcut
            y = point(short[1], batch_norm(short[0].norm, depthwise(short[0].conv, y, 2)))
        else:
            h = h + depthwise(mlp.middle.conv, h)
        want = y + point(mlp.fc2, batch_norm(mlp.middle.norm, h))
        ours = block(x)
    assert ours.shape == want.shape == (2, *((s + 1) // 2 if shrink else s for s in SIDES[:ndim]), 24 if shrink else 16)
    assert error(ours, want) < 1e-5


def test_fusing_more_than_published_leaves_no_norm_in_the_mlp():
    model, x = small(), torch.randn(2, 3, 45, 70)
    kept, more = vertebra.fuse(model), vertebra.fuse(model, published=False)
    names = {n for n, m in more.named_modules() if isinstance(m, BatchNorm)}
    assert names == set() and vertebra.to_official(kept).keys() == vertebra.to_official(model).keys()
    with torch.no_grad():
        assert error(more(x), model(x)) < 1e-5


def test_stages_end_before_the_block_that_shrinks():
    model = small(drop_path_rate=0.6)
    kinds = [[type(b) for b in (*stage.down.children(), *stage.blocks)] for stage in model.stages]
    assert kinds == [[Block], [DownBlock], [DownBlock, Block, Block], [DownBlock, Block]]
    blocks = [b for stage in model.stages for b in (*stage.down.children(), *stage.blocks)]
    assert [b.drop_path.rate for b in blocks] == pytest.approx([0.1 * i for i in range(7)])
    assert [b.position.conv.kernel[0] for b in blocks] == [b.attn.local.kernel[0] for b in blocks]
    assert [b.position.conv.kernel[0] for b in blocks] == [3, 3, 5, 7, 7, 7, 9]
    official = vertebra.to_official(model)
    shrinking = {k.split(".downsample")[0] for k in official if ".downsample." in k}
    assert shrinking == {"layers.0.blocks.1", "layers.1.blocks.0", "layers.2.blocks.2"}
    assert official["layers.0.blocks.1.attn.pool.bn2.running_var"] is not None
    assert "layers.0.blocks.1.attn.pool.linear2.weight" not in official


def test_maps_are_raw_and_the_norm_comes_before_the_mean():
    model, dense = small(), small(features_only=True)
    vertebra.load_checkpoint(dense, vertebra.to_official(model))
    x = torch.randn(2, 3, 45, 70)
    with torch.no_grad():
        maps = dense(x)
        assert [tuple(m.shape[1:]) for m in maps] == [(16, 12, 18), (24, 6, 9), (32, 3, 5), (40, 2, 3)]
        last = one_group(model.norm, maps[-1].movedim(1, -1))
        torch.testing.assert_close(model.head(last.mean((1, 2))), model(x), rtol=1e-4, atol=1e-5)


def test_published_configurations():
    with torch.device("meta"):
        models = {n: vertebra.create_model(n) for n in vertebra.list_models("fat_*")}
    counts = {n: round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for n, m in models.items()}
    assert counts == {"fat_b0": 4.494, "fat_b1": 7.820, "fat_b2": 13.467, "fat_b3": 29.196}
    attns = [stage.blocks[0].attn for stage in models["fat_b0"].stages]
    assert [a.heads for a in attns] == [2, 5, 10, 16]
    assert [len(a.down.convs) for a in attns] == [3, 2, 1, 0]
    assert {m.eps for model in models.values() for m in model.modules() if hasattr(m, "eps")} == {1e-5}
    assert [vertebra.model_info(n).published["drop_path"] for n in counts] == [0.05, 0.1, 0.1, 0.15]
    assert {vertebra.model_info(n).weights.status for n in counts} == {"none"}
