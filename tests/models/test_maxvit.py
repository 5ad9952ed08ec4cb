"""MaxViT against timm and torchvision, its attentions against loops, TensorFlow's padding, its quirks as numbers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from oracle import error, spread

import vertebra
from vertebra.layers import BatchNorm, RelativePositionBias
from vertebra.mixers import BlockAttention, GridAttention, KeyOffsetBias
from vertebra.models.maxvit import MBConv, SameConv

TINY, TORCHVISION = "maxvit_tiny_tf_224", "torchvision_maxvit_t"
COUNTS = {  # timm's and torchvision's own
    "maxvit_tiny_tf_224": 30_916_528,
    "maxvit_tiny_tf_384": 30_977_008,
    "maxvit_tiny_tf_512": 31_049_584,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_large_tf_224": 211_785_560,
    "maxvit_xlarge_tf_384": 475_323_472,
    "torchvision_maxvit_t": 30_919_624,
}


def small(name: str = TINY, ndim: int = 2, seed: int = 0, **options):
    torch.manual_seed(seed)
    settings = dict(dims=(32, 32, 64, 64), depths=(1, 1, 2, 1), stem=32, num_classes=7, img_size=64, window=None)
    return spread(vertebra.create_model(name, ndim=ndim, **(settings | options)))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_windows_and_eps_are_the_published_ones(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    size = vertebra.model_info(name).inputs.size
    for block in (b for s in model.stages for b in s.blocks):
        assert block.block.attn.window == block.grid.attn.window == (size // 32,) * 2
        assert block.block.attn.heads * 32 == block.block.norm1.normalized_shape[0]
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, BatchNorm)} == {(1e-3, 0.01)}
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    approximate = {m.approximate for m in model.modules() if isinstance(m, torch.nn.GELU)}
    assert approximate == {"none" if name == TORCHVISION else "tanh"}


def timm_twin(model, size):
    timm = pytest.importorskip("timm")
    other = timm.create_model(
        TINY, img_size=size, embed_dim=(32, 32, 64, 64), depths=(1, 1, 2, 1), stem_width=32, head_hidden_size=64,
        num_classes=7,
    ).eval()  # fmt: skip
    missing = other.load_state_dict(vertebra.to_official(model), strict=False)
    assert not missing.unexpected_keys and all(k.endswith("num_batches_tracked") for k in missing.missing_keys)
    return other


# built for, run at: also windows that are not square, odd sides (windows of one cell), other multiples
@pytest.mark.parametrize(
    ("size", "run"), [((64, 64), (64, 64)), ((128, 64), (128, 64)), ((45, 51), (45, 51)), ((64, 64), (64, 192))]
)
def test_logits_equal_timm(size, run):
    model = small(img_size=size)
    other = timm_twin(model, size)
    x = torch.randn(2, 3, *run)
    with torch.no_grad():
        for scale in (1, 100):
            assert error(model(scale * x), other(scale * x)) <= 2e-6
        assert error(model.forward_features(x), other.forward_features(x)) <= 2e-6


@pytest.mark.parametrize(("size", "window"), [(64, 2), (51, 1), (96, 3)])
def test_logits_equal_torchvision(size, window):
    pytest.importorskip("torchvision")
    from torchvision.models.maxvit import MaxVit

    torch.manual_seed(0)
    other = spread(
        MaxVit(
            input_size=(size, size),
            stem_channels=32,
            partition_size=window,
            block_channels=[32, 32, 64, 64],
            block_layers=[1, 1, 2, 1],
            head_dim=32,
            stochastic_depth_prob=0.2,
            num_classes=7,
        )
    )
    model = small(TORCHVISION, window=window)
    report = vertebra.load_checkpoint(model, other.state_dict())
    assert not report.missing and not report.unexpected and not report.adapted
    assert vertebra.to_official(model).keys() == {n for n, _ in other.named_parameters()} | {
        n for n, _ in other.named_buffers() if "running" in n
    }
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        for scale in (1, 100):
            assert error(model(scale * x), other(scale * x)) <= 2e-6


def plain_attention(mixer, x, grid: bool, scale=None):
    """Attention of one map x (*S, C), cell by cell: each asks the cells of its block or grid inside the map."""
    sides, dim = x.shape[:-1], x.shape[-1]
    width = dim // mixer.heads
    steps = [math.ceil(s / w) for s, w in zip(sides, mixer.window, strict=True)]
    q, k, v = mixer.qkv(x).split(dim, -1)
    out = torch.zeros_like(x)

    def home(cell):  # (which window, where in it)
        pairs = [
            (c % n, c // n) if grid else (c // w, c % w) for c, n, w in zip(cell, steps, mixer.window, strict=True)
        ]
        return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)

    cells = list(itertools.product(*(range(s) for s in sides)))
    for cell in cells:
        window, here = home(cell)
        others = [c for c in cells if home(c)[0] == window]
        parts = []
        for h in range(mixer.heads):
            cut = slice(h * width, (h + 1) * width)
            logits = torch.stack([q[cell][cut] @ k[c][cut] for c in others]) * (scale or width**-0.5)
            for i, c in enumerate(others):
                ahead = [b - a for a, b in zip(here, home(c)[1], strict=True)]  # key minus query
                if isinstance(mixer.pos, KeyOffsetBias):
                    logits[i] += mixer.pos.table[(h, *(o + w - 1 for o, w in zip(ahead, mixer.window, strict=True)))]
                else:  # Swin's sign
                    row = 0
                    for o, w in zip(ahead, mixer.window, strict=True):
                        row = row * (2 * w - 1) - o + w - 1
                    logits[i] += mixer.pos.table[row, h]
            parts.append(logits.softmax(0) @ torch.stack([v[c][cut] for c in others]))
        out[cell] = mixer.proj(torch.cat(parts))
    return out


@pytest.mark.parametrize("kind", [BlockAttention, GridAttention])
@pytest.mark.parametrize(
    ("sides", "window"),
    [((8,), (2,)), ((7,), (3,)), ((4, 6), (2, 3)), ((5, 7), (2, 3)), ((1, 2), (2, 4)), ((3, 2, 5), (2, 2, 2))],
)
def test_attention_equals_the_cells_written_out(kind, sides, window):
    torch.manual_seed(0)
    grid = kind is GridAttention
    x = torch.randn(1, *sides, 8)
    with torch.no_grad():
        for options, scale in (({}, None), (dict(position=RelativePositionBias, scale=0.1), 0.1)):
            mixer = kind(len(sides), 8, 2, window, **options)
            mixer.pos.table.normal_()
            assert error(mixer(x)[0], plain_attention(mixer, x[0], grid, scale)) <= 2e-6


def test_a_grid_reaches_across_the_map_and_a_block_does_not():
    x = torch.randn(1, 12, 8).requires_grad_()
    for kind, seen in ((BlockAttention, [4, 5, 6, 7]), (GridAttention, [2, 5, 8, 11])):
        (g,) = torch.autograd.grad(kind(1, 8, 2, 4)(x)[0, 5].sum(), x)
        assert g[0].abs().sum(-1).nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("sides", [(8,), (7,), (6, 8), (5, 8), (6, 3), (5, 7), (4, 3, 6)])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding_is_tensorflow_s(sides, groups, monkeypatch):
    torch.manual_seed(0)
    ndim = len(sides)
    layer = SameConv(ndim, 4, 8, 3, 2, groups=groups)
    x = torch.randn(2, *sides, 4)
    pads = []
    for s in reversed(sides):
        total = max((math.ceil(s / 2) - 1) * 2 + 3 - s, 0)
        pads += [total // 2, total - total // 2]
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    with torch.no_grad():
        want = call(F.pad(x.movedim(-1, 1), pads), layer.weight, layer.bias, stride=2, groups=groups).movedim(1, -1)
        assert error(layer(x), want) <= 1e-6
        monkeypatch.setattr("vertebra.models.maxvit.tracing", lambda: True)  # where sizes may be symbolic
        assert error(layer(x), want) <= 1e-6


@pytest.mark.parametrize("tf", [True, False])
@pytest.mark.parametrize(("stride", "out"), [(1, 8), (2, 8), (2, 16)])
def test_mbconv_equals_the_steps_written_out(tf, stride, out):
    torch.manual_seed(0)
    act = torch.nn.GELU(approximate="tanh" if tf else "none")
    unit = spread(MBConv(2, 8, out, stride, lambda: act, tf))

    def norm(m, y):
        return F.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-3)

    x = torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        y = F.conv2d(norm(unit.pre_norm, x.movedim(-1, 1)), unit.expand.conv.weight)
        y = act(norm(unit.expand.norm, y))
        if stride == 2:
            y = F.pad(y, (0, 1, 0, 1) if tf else (1, 1, 1, 1))
        y = F.conv2d(y, unit.depthwise.conv.weight, stride=stride, padding=2 - stride, groups=4 * out)
        y = act(norm(unit.depthwise.norm, y))
        gate = y.mean((2, 3), keepdim=True)
        gate = F.silu(F.conv2d(gate, unit.squeeze.down.weight, unit.squeeze.down.bias))
        assert gate.shape[1] == out // 4
        y = y * F.conv2d(gate, unit.squeeze.up.weight, unit.squeeze.up.bias).sigmoid()
        y = F.conv2d(y, unit.project.weight, unit.project.bias)
        short = x.movedim(-1, 1)
        if stride == 2:
            short = F.avg_pool2d(short, 2) if tf else F.avg_pool2d(short, 3, 2, 1)
        if stride == 2 and (out != 8 or not tf):
            short = F.conv2d(short, unit.shortcut.weight, unit.shortcut.bias)
        assert error(unit(x), (y + short).movedim(1, -1)) <= 1e-6


def test_the_head_has_a_hidden_layer_with_tanh():
    for name, bias in ((TINY, True), (TORCHVISION, False)):
        model = small(name)
        f = torch.randn(2, 64, 3, 4)
        with torch.no_grad():
            hidden = F.layer_norm(f.mean((2, 3)), (64,), model.neck[0].weight, model.neck[0].bias)
            hidden = torch.tanh(hidden @ model.neck[1].weight.t() + model.neck[1].bias)
            assert error(model.forward_head(f, pre_logits=True), hidden) <= 1e-6
            want = hidden @ model.head.weight.t() + (model.head.bias if bias else 0)
            assert error(model.forward_head(f), want) <= 1e-6
        model.reset_classifier(3)
        assert (model.head.bias is not None) == bias and model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


def test_windows_follow_the_image_or_the_option():
    def reach(**options):
        return small(**options).stages[3].blocks[0].grid.attn.window

    assert reach(img_size=(256, 192)) == (8, 6)
    assert reach(img_size=100) == (3, 3)
    assert reach(window=5) == (5, 5) and reach(window=(2, 4)) == (2, 4)
    fixed = vertebra.create_model(TORCHVISION, img_size=448, dims=(32,) * 4, depths=(1, 1, 1, 1))
    assert fixed.stages[0].blocks[0].block.attn.window == (7, 7)


def test_tables_of_another_size_are_resampled_on_loading():
    keys = (
        "stages.1.blocks.0.attn_grid.attn.rel_pos.relative_position_bias_table",
        "blocks.1.layers.0.layers.grid_attention.attn_layer.1.relative_position_bias_table",
    )
    for name, key in zip((TINY, TORCHVISION), keys, strict=True):
        model, wide = small(name, window=2), small(name, seed=1, window=(4, 3))
        state = vertebra.to_official(model)
        report = vertebra.load_checkpoint(wide, state)
        assert len(report.adapted) == 10 and not report.missing and not report.unexpected
        if name == TINY:  # linearly, as the official fine-tuning at a larger size
            want = F.interpolate(state[key][None], size=(7, 5), mode="bilinear", align_corners=False)[0]
        else:
            square = state[key].t().reshape(1, 1, 3, 3)
            want = F.interpolate(square, size=(7, 5), mode="bicubic", align_corners=False).reshape(1, -1).t()
        assert error(wide.stages[1].blocks[0].grid.attn.pos.table.detach(), want) <= 1e-6


@pytest.mark.parametrize("name", [TINY, TORCHVISION])
def test_the_dense_version_gives_the_raw_maps(name):
    model, dense = small(name), small(name, seed=1, features_only=True)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert not report.fresh and len(report.unused) == (6 if name == TINY else 5)
    x = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        maps = dense(x)
        assert [tuple(m.shape) for m in maps] == [(1, 32, 18, 23), (1, 32, 9, 12), (1, 64, 5, 6), (1, 64, 3, 3)]
        assert all(torch.equal(a, b) for a, b in zip(maps, model.forward_intermediates(x), strict=True))
        assert torch.equal(maps[-1], model.forward_features(x))


@pytest.mark.parametrize("name", [TINY, TORCHVISION])
def test_folding_all_norms_keeps_the_padding(name):
    model = small(name)
    x = torch.randn(2, 3, 70, 64)
    fused = vertebra.fuse(model, published=False)
    assert sum(isinstance(m, BatchNorm) for m in fused.modules()) == 5  # the norms that begin the blocks
    assert sum(isinstance(m, SameConv) for m in fused.modules()) == (5 if name == TINY else 0)
    with torch.no_grad():
        assert error(fused(x), model(x)) <= 1e-5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(img_size=31), "img_size"),
        (dict(img_size=(64, 64, 64)), "img_size"),
        (dict(window=0), "window"),
        (dict(window=(7, 7, 7)), "window"),
        (dict(dims=(32, 48, 64, 64)), "heads of 32"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_drop_path_covers_all_five_residuals_of_a_block_and_tables_are_not_decayed():
    model = small(drop_path_rate=0.4)
    for want, block in zip((0, 0.1, 0.2, 0.3, 0.4), (b for s in model.stages for b in s.blocks), strict=True):
        assert [m.rate for m in (block.conv.drop_path, block.block.drop_path, block.grid.drop_path)] == pytest.approx(
            [want] * 3
        )
    names = model.no_weight_decay()
    assert len(names) == 10 and all(n.endswith(".attn.pos.table") for n in names)


def test_official_names():
    assert {
        "stem.conv1.bias", "stem.norm1.running_var", "stem.conv2.weight",
        "stages.2.blocks.0.conv.shortcut.expand.bias", "stages.3.blocks.0.attn_grid.mlp.fc1.bias",
        "stages.0.blocks.0.conv.se.fc2.weight",
        "stages.2.blocks.1.attn_block.attn.rel_pos.relative_position_bias_table",
        "head.norm.weight", "head.pre_logits.fc.weight", "head.fc.bias",
    } <= set(vertebra.to_official(small()))  # fmt: skip
    assert not any(n.startswith("stages.0.blocks.0.conv.shortcut") for n in vertebra.to_official(small()))
    assert "blocks.0.layers.0.layers.MBconv.proj.1.weight" in vertebra.to_official(small(TORCHVISION))
