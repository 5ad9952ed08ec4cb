"""Twins: timm as a live oracle, the two window rules, dense versions, positions after the first block, other ranks."""

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.mixers import SpatialReductionAttention, WindowAttention
from vertebra.models.twins import FAMILY, MaskedWindowAttention, PositionedBlock

SVT, PCPVT = "twins_svt_small", "twins_pcpvt_small"
SMALL = {
    SVT: dict(dims=(16, 32, 40, 64), heads=(1, 2, 2, 4), depths=(2, 1, 3, 1), num_classes=7),
    PCPVT: dict(dims=(16, 32, 40, 64), heads=(1, 2, 2, 4), depths=(2, 1, 2, 1), num_classes=7),
}


def small(name, **options):
    return vertebra.create_model(name, **(SMALL[name] | options)).eval()


@pytest.mark.parametrize("name", [SVT, PCPVT])
@pytest.mark.parametrize("sides", [(224, 56), (95, 130), (32, 32)])
def test_equals_timm(name, sides):
    timm = pytest.importorskip("timm")
    options = dict(embed_dims=[16, 32, 40, 64], num_heads=[1, 2, 2, 4], depths=list(SMALL[name]["depths"]))
    theirs = fill(timm.create_model(name, num_classes=7, **options))
    ours = small(name, checkpoint=theirs.state_dict())
    assert {k: v.shape for k, v in vertebra.to_official(ours).items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert error(ours(x), theirs(x)) <= 1e-5
        for mine, other in zip(
            ours.forward_intermediates(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True
        ):
            assert error(mine, other) <= 1e-5


def masked(mixer, x):
    """A window at a time, over real cells alone."""
    out = torch.empty_like(x)
    ndim = x.ndim - 2
    starts = [range(0, s, w) for s, w in zip(x.shape[1:-1], mixer.window, strict=True)]
    for start in torch.cartesian_prod(*(torch.tensor(list(r)) for r in starts)).reshape(-1, ndim).tolist():
        box = (slice(None), *(slice(a, a + w) for a, w in zip(start, mixer.window, strict=True)))
        cells = x[box].flatten(1, -2)
        q, k, v = mixer.qkv(cells).chunk(3, -1)
        size = q.shape[-1] // mixer.heads
        read = [
            (q[..., h : h + size] @ k[..., h : h + size].mT * size**-0.5).softmax(-1) @ v[..., h : h + size]
            for h in range(0, q.shape[-1], size)
        ]
        out[box] = mixer.proj(torch.cat(read, -1)).reshape(x[box].shape)
    return out


@pytest.mark.parametrize("sides", [(17,), (9, 13), (8, 9, 10), (7, 14)])
def test_masked_windows_see_real_cells_alone(sides):
    mixer, x = fill(MaskedWindowAttention(len(sides), 8, 2, 7, position=False)), torch.randn(2, *sides, 8)
    torch.testing.assert_close(mixer(x), masked(mixer, x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sides", [(14, 9), (9, 7), (8, 7, 9)])
def test_masked_windows_mask_nothing_where_one_side_is_full(sides):
    mixer, x = fill(MaskedWindowAttention(len(sides), 8, 2, 7, position=False)), torch.randn(2, *sides, 8)
    plain = WindowAttention(len(sides), 8, 2, 7, position=False)
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), plain(x))
    padded = F.pad(x, [0, 0, *(v for s in reversed(sides) for v in (0, -s % 7))])  # zeros that take part
    full = masked(mixer, padded)[(slice(None), *(slice(0, s) for s in sides))]
    torch.testing.assert_close(mixer(x), full, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [SVT, PCPVT])
def test_positions_join_after_the_first_block_of_a_stage(name):
    model, x = fill(small(name)), torch.randn(2, 9, 8, 16)
    first, second = model.stages[0].blocks
    with torch.no_grad():
        y = x + first.attn(first.norm1(x))
        y = y + first.mlp(first.norm2(y))
        weight, bias = first.peg.conv.weight, first.peg.conv.bias
        y = y + F.conv2d(y.movedim(-1, 1), weight, bias, padding=1, groups=16).movedim(1, -1)
        y = y + second.attn(second.norm1(y))
        y = y + second.mlp(second.norm2(y))
        torch.testing.assert_close(model.stages[0](x), y)
    assert [[isinstance(b, PositionedBlock) for b in s.blocks].count(True) for s in model.stages] == [1, 1, 1, 1]
    assert model.no_weight_decay() == {
        f"stages.{i}.blocks.0.peg.conv.{leaf}" for i in range(4) for leaf in ("weight", "bias")
    }


def test_which_blocks_attend_in_windows():
    svt = [[type(b.attn) for b in stage.blocks] for stage in small(SVT).stages]
    assert svt == [[(WindowAttention, SpatialReductionAttention)[j % 2] for j in range(d)] for d in (2, 1, 3, 1)]
    assert {type(b.attn) for s in small(PCPVT).stages for b in s.blocks} == {SpatialReductionAttention}
    for model in (small(SVT, depths=(2, 2, 2, 2)), small(PCPVT)):
        assert [s.blocks[-1].attn.reduced for s in model.stages] == [True, True, True, False]
        assert [s.blocks[-1].attn.sr.kernel for s in model.stages[:3]] == [(8, 8), (4, 4), (2, 2)]
    assert all(b.attn.pos is None for s in small(SVT).stages for b in s.blocks[::2])


def test_svt_dense_norms_feed_the_next_stage():
    model = fill(small(SVT))
    dense = small(SVT, features_only=True, checkpoint=vertebra.to_official(model))
    assert sorted(dense.load_report.fresh) == sorted(f"norm_list.{i}.{n}" for i in range(4) for n in ("weight", "bias"))
    assert not dense.load_report.unused
    fill(dense)
    x = torch.randn(1, 3, 64, 90)
    with torch.no_grad():
        maps = dense(x)
        last = maps[2].movedim(1, -1)
        norm = dense.stages[3].norm
        raw = dense.stages[3].blocks[0](dense.stages[3].down(last))
        torch.testing.assert_close(maps[3].movedim(1, -1), F.layer_norm(raw, (64,), norm.weight, norm.bias, 1e-6))


def test_pcpvt_dense_gives_raw_maps():
    model = fill(small(PCPVT))
    dense = small(PCPVT, features_only=True, checkpoint=vertebra.to_official(model))
    x = torch.randn(1, 3, 64, 90)
    with torch.no_grad():
        for ours, theirs in zip(dense(x), model.forward_intermediates(x), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", [SVT, PCPVT])
def test_dense_keeps_the_unused_norm_and_head_of_official_files(name):
    dense = small(name, features_only=True)
    kept = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert kept <= set(vertebra.to_official(dense))
    assert {n for n, p in dense.named_parameters() if not p.requires_grad} == kept
    sum(m.sum() for m in dense.train()(torch.randn(2, 3, 64, 64))).backward()
    assert {n for n, p in dense.named_parameters() if p.grad is None} == kept


def test_mask_padding_changes_only_maps_that_windows_do_not_fill():
    state = vertebra.to_official(fill(small(SVT, features_only=True)))
    plain, mask = (small(SVT, features_only=True, mask_padding=flag, checkpoint=state) for flag in (False, True))
    with torch.no_grad():
        for sides, same in (((224, 224), True), ((224, 200), True), ((200, 264), False)):
            x = torch.randn(1, 3, *sides)
            errors = [error(a, b) for a, b in zip(mask(x), plain(x), strict=True)]
            assert max(errors) <= 1e-6 if same else min(errors) > 1e-3


def test_masked_windows_export_with_sizes_that_fill_them_or_not():
    from torch.fx.experimental import _config

    mixer = fill(MaskedWindowAttention(2, 8, 2, 7, position=False))
    dims = dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC)
    x = torch.randn(2, 17, 20, 8)
    with torch.no_grad(), _config.patch(backed_size_oblivious=True):
        program = torch.export.export(mixer, (x,), dynamic_shapes=(dims,)).module()
        for sides in ((17, 20), (21, 20), (23, 30), (28, 35)):
            y = torch.randn(3, *sides, 8)
            torch.testing.assert_close(program(y), mixer(y))


@pytest.mark.parametrize("name", [SVT, PCPVT])
def test_one_dimension_equals_two_where_all_rows_are_equal(name):
    """224 rows fill the windows of every stage; keys that come several times over do not change attention."""
    line, plane = fill(small(name, ndim=1)), small(name)
    state = {}
    for key, want in plane.state_dict().items():
        tensor = line.state_dict()[key]
        if want.shape != tensor.shape:
            wide = torch.zeros_like(want)
            wide[:, :, want.shape[2] // 2] = tensor
            tensor = wide
        state[key] = tensor
    plane.load_state_dict(state)
    x = torch.randn(1, 3, 101)
    with torch.no_grad():
        two = plane.forward_intermediates(x.unsqueeze(2).expand(-1, -1, 224, -1))
        for one, other in zip(line.forward_intermediates(x), two, strict=True):
            assert error(one.unsqueeze(2).expand_as(other), other) <= 1e-5


@pytest.mark.parametrize("name", [SVT, PCPVT])
def test_a_volume_gives_maps_at_every_stride(name):
    model = small(name, ndim=3, depths=(1, 1, 1, 1))
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 41, 35))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 10, 8), (4, 5, 4), (2, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize("name", [SVT, PCPVT])
@pytest.mark.parametrize("dense", [False, True])
def test_two_values_of_eps(name, dense):
    norms = {k: m.eps for k, m in small(name, features_only=dense).named_modules() if isinstance(m, nn.LayerNorm)}
    for key, eps in norms.items():
        inner = "patch_embed" in key or ".down." in key or ".attn." in key
        assert eps == (1e-5 if inner else 1e-6), key
    assert ("stages.0.norm" in norms) == (dense and name == SVT)


def test_initialisation():
    model = vertebra.create_model(SVT, depths=(2, 1, 1, 1))
    for conv, fan_out in ((model.stages[3].blocks[0].peg.conv, 9), (model.stages[3].down.proj, 4 * 512)):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
        assert not conv.bias.any()
    assert model.stages[3].blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_published_configurations():
    configs = {name: v.config for name, v in FAMILY.variants.items()}
    assert {n: c["depths"] for n, c in configs.items()} == {
        "twins_pcpvt_small": (3, 4, 6, 3), "twins_pcpvt_base": (3, 4, 18, 3), "twins_pcpvt_large": (3, 8, 27, 3),
        "twins_svt_small": (2, 2, 10, 4), "twins_svt_base": (2, 2, 18, 2), "twins_svt_large": (2, 2, 18, 2),
    }  # fmt: skip
    assert configs["twins_svt_large"]["dims"] == (128, 256, 512, 1024)
    assert [configs[f"twins_svt_{s}"]["heads"][0] for s in ("small", "base", "large")] == [2, 3, 4]
    for size, count in (("small", 24.061), ("base", 56.071), ("large", 99.271)):
        with torch.device("meta"):
            model = vertebra.create_model(f"twins_svt_{size}")
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(count, abs=6e-4)


def test_options_that_cannot_be():
    with pytest.raises(ValueError, match="PCPVT has none"):
        small(PCPVT, mask_padding=True)
    for window in (0, 7.0):
        with pytest.raises(ValueError, match="window must be"):
            small(SVT, window=window)
