"""Shunted Transformer: both attentions and the MLP written out, stem, published variants, other ranks."""

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.layers import ConvStem
from vertebra.mixers import LocalEnhancedAttention, ShuntedAttention
from vertebra.models.shunted import FAMILY

T, S = "shunted_t", "shunted_s"
SMALL = dict(dims=(16, 32, 48, 64), heads=(2, 4, 4, 8), depths=(1, 1, 2, 1), num_classes=7)


def small(name=T, **options):
    return vertebra.create_model(name, **(SMALL | options)).eval()


def conv(layer, x, **options):
    """A convolution of ours on (B, *S, C) by torch's own function."""
    call = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    return call(x.movedim(-1, 1), layer.weight, layer.bias, **options).movedim(1, -1)


def heads_of(q, k, v, heads):
    """Softmax attention a head at a time, (B, L, C)."""
    read = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        read.append((a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) @ c)
    return torch.cat(read, -1)


@pytest.mark.parametrize(("ndim", "sides"), [(1, (19,)), (2, (9, 14)), (3, (4, 7, 5))])
@pytest.mark.parametrize("ratios", [(4, 2), (2, 1)])
def test_half_of_the_heads_reads_each_scale(ndim, sides, ratios):
    mixer, x = fill(ShuntedAttention(ndim, 16, 4, ratios)), torch.randn(2, *sides, 16)
    queries, read = mixer.q(x).flatten(1, -2), []
    for i, ratio in enumerate(ratios):
        scale = mixer.scales[i]
        small_map = conv(scale.sr, x, stride=ratio)
        assert tuple(small_map.shape[1:-1]) == tuple(s // ratio for s in sides)
        small_map = F.gelu(F.layer_norm(small_map, (16,), scale.norm.weight, scale.norm.bias, 1e-5))
        kv = small_map @ scale.kv.weight.T + scale.kv.bias
        k, v = kv[..., :8], kv[..., 8:]
        v = v + conv(scale.local.conv, v, padding=1, groups=8)
        read.append(heads_of(queries[..., 8 * i : 8 * i + 8], k.flatten(1, -2), v.flatten(1, -2), 2))
    expected = mixer.proj(torch.cat(read, -1)).reshape(x.shape)
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_any_number_of_scales():
    mixer = ShuntedAttention(2, 18, 6, (4, 2, 1))
    assert [s.kv.out_features for s in mixer.scales] == [12, 12, 12]
    assert mixer(torch.randn(1, 5, 8, 18)).shape == (1, 5, 8, 18)


@pytest.mark.parametrize(("ndim", "sides"), [(1, (19,)), (2, (3, 4)), (3, (2, 3, 2))])
def test_without_reduction_the_local_term_joins_the_output(ndim, sides):
    mixer, x = fill(LocalEnhancedAttention(ndim, 16, 4)), torch.randn(2, *sides, 16)
    k, v = mixer.kv(x)[..., :16], mixer.kv(x)[..., 16:]
    y = heads_of(*(t.flatten(1, -2) for t in (mixer.q(x), k, v)), 4).reshape(x.shape)
    expected = mixer.proj(y + conv(mixer.local_conv, v, padding=1, groups=16))
    torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_mlp_activates_the_sum_of_hidden_map_and_its_convolution():
    mlp, x = fill(small()).stages[1].blocks[0].mlp, torch.randn(2, 6, 5, 32)
    h = mlp.fc1(x)
    assert h.shape[-1] == 8 * 32
    h = h + conv(mlp.middle.conv, h, padding=1, groups=256)
    torch.testing.assert_close(mlp(x), mlp.fc2(F.gelu(h)))


@pytest.mark.parametrize("extra", [0, 2])
def test_stem(extra):
    stem, x = fill(ConvStem(2, 3, 8, extra=extra)), torch.randn(2, 21, 34, 3)
    y = x
    for i in range(1 + extra):
        block = stem.convs[i]
        y = conv(block.conv, y, stride=1 if i else 2, padding=1 if i else 3)
        y = F.relu(
            (y - block.norm.running_mean) / (block.norm.running_var + 1e-5) ** 0.5 * block.norm.weight + block.norm.bias
        )
    y = conv(stem.convs[-1], y, stride=2)
    expected = F.layer_norm(y, (8,), stem.norm.weight, stem.norm.bias, 1e-5)
    torch.testing.assert_close(stem(x), expected, rtol=1e-4, atol=1e-5)
    assert stem(x).shape == (2, 5, 8, 8)  # the first convolution rounds up, the last down


def test_official_names_of_the_stem_follow_its_length():
    for name, last in ((T, 3), (S, 6), ("shunted_b", 9)):
        with torch.device("meta"):
            names = vertebra.to_official(vertebra.create_model(name))
        assert names[f"patch_embed1.conv.{last}.weight"].shape == (64, 64, 2, 2)
        assert f"patch_embed1.conv.{last}.bias" in names and f"patch_embed1.conv.{last - 3}.bias" not in names


def test_which_stages_shunt():
    model = vertebra.create_model(T)
    for stage, ratio, heads in zip(model.stages[:3], (8, 4, 2), (1, 2, 4), strict=True):
        attn = stage.blocks[0].attn
        assert [s.sr.kernel for s in attn.scales] == [(ratio,) * 2, (ratio // 2,) * 2] and attn.heads == heads
    assert isinstance(model.stages[3].blocks[0].attn, LocalEnhancedAttention)


def test_head_and_dense_version_read_normed_maps():
    model = fill(small())
    dense = small(features_only=True, checkpoint=vertebra.to_official(model))
    assert sorted(dense.load_report.unused) == ["head.bias", "head.weight"] and not dense.load_report.fresh
    x = torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        maps = dense(x)
        state = model.stages[0].down(model.embed(x.movedim(1, -1)))
        raw = model.stages[0].blocks[0](state)
        norm = model.stages[0].norm
        expected = F.layer_norm(raw, (16,), norm.weight, norm.bias, 1e-6)
        torch.testing.assert_close(maps[0].movedim(1, -1), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), model.head(maps[3].mean((2, 3))))


@pytest.mark.parametrize("sides", [(101,), (32, 41, 35)])
def test_other_ranks_equal_two_dimensions_where_they_can(sides):
    """Rows that are all equal: convolutions whose middle row alone counts, and keys that come several times over."""
    ndim = len(sides)
    line = fill(small(S, ndim=ndim, depths=(1, 1, 1, 1)))
    maps = line.forward_intermediates(torch.randn(1, 3, *sides))
    assert [tuple(m.shape[2:]) for m in maps] == [
        tuple(-(-(-(-s // 2) // 2) // f) for s in sides) for f in (1, 2, 4, 8)
    ]
    if ndim == 3:
        return
    plane, state = small(S, depths=(1, 1, 1, 1)), {}
    for key, want in plane.state_dict().items():
        tensor = line.state_dict()[key]
        if want.shape != tensor.shape:
            wide = torch.zeros_like(want)
            wide[:, :, want.shape[2] // 2] = tensor
            tensor = wide
        state[key] = tensor
    plane.load_state_dict(state)
    x = torch.randn(1, 3, *sides)
    with torch.no_grad():
        two = plane.forward_intermediates(x.unsqueeze(2).expand(-1, -1, 64, -1))
        for one, other in zip(line.forward_intermediates(x), two, strict=True):
            assert error(one.unsqueeze(2).expand_as(other), other) <= 1e-5


def test_two_values_of_eps_and_relu_in_the_stem_alone():
    for key, module in small(S).named_modules():
        if isinstance(module, nn.LayerNorm):
            inner = "patch_embed" in key or ".down." in key or ".attn." in key
            assert module.eps == (1e-5 if inner else 1e-6), key
        if isinstance(module, nn.ReLU | nn.GELU):
            assert isinstance(module, nn.ReLU) == key.startswith("patch_embed"), key


def test_initialisation():
    model = vertebra.create_model(T)
    attn = model.stages[2].blocks[0].attn
    for layer, fan_out in ((attn.scales[0].sr, 4 * 256), (model.stages[3].blocks[0].mlp.middle.conv, 9)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert not layer.bias.any()


def test_published_configurations():
    configs = {name: (v.config["depths"], v.config["stem"]) for name, v in FAMILY.variants.items()}
    assert configs == {"shunted_t": ((1, 2, 4, 1), 0), "shunted_s": ((2, 4, 12, 1), 1), "shunted_b": ((3, 4, 24, 2), 2)}
    for name, count in (("shunted_t", 11_553_576), ("shunted_s", 22_401_256)):
        with torch.device("meta"):
            assert sum(p.numel() for p in vertebra.create_model(name).parameters()) == count


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="shared out"):
        ShuntedAttention(2, 12, 3, (4, 2))
    with pytest.raises(ValueError, match="shared out"):
        ShuntedAttention(2, 12, 3, ())
    with pytest.raises(ValueError, match="ratios"):
        small(ratios=(8, 4, 3, 1))
    with pytest.raises(ValueError, match="do not divide"):
        small(heads=(3, 4, 4, 8))
