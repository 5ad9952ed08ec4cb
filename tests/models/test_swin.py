"""Swin and SwinMLP against timm, against the papers' rules written out plainly, and their quirks as numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vertebra
from vertebra.models.swin import WindowMixing

TINY, MLP = "swin_tiny_patch4_window7_224", "swin_mlp_tiny_c24_patch4_window8_256"
COUNTS = {
    TINY: 28_288_354,
    "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224,
    "swin_base_patch4_window12_384": 87_903_584,
    "swin_large_patch4_window7_224": 196_532_476,
    "swin_large_patch4_window12_384": 196_735_516,
    "swin_tiny_c24_patch4_window8_256": 28_306_432,
    MLP: 20_386_632,
}


def small(name: str = TINY, ndim: int = 2, seed: int = 0, **options):
    """Two blocks a stage, narrow, with parameters far enough from zero that every path counts."""
    torch.manual_seed(seed)
    settings = dict(dim=16, depths=(2, 2, 2, 2), heads=(1, 2, 2, 4), num_classes=7) | options
    model = vertebra.create_model(name, ndim=ndim, **settings).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.ndim == 1 else p[0].numel() ** -0.5))
    return model


def error(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def settings_of(model) -> list[list[tuple[int, int]]]:
    """(window, shift) of every block, per stage."""
    return [[(b.attn.window[0], b.attn.shift[0]) for b in s.blocks] for s in model.stages]


@pytest.mark.parametrize("name", vertebra.list_models(family="swin"))
def test_counts_are_the_published_ones(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    published = vertebra.model_info(name).published["params_m"]
    assert round(count / 1e6) == published
    assert count == COUNTS.get(name, count)


def test_layer_norms_have_torchs_default_eps():
    assert {m.eps for m in small().modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize(("size", "window"), [((224, 224), 7), ((256, 384), 4), ((256, 256), 8)])
def test_logits_equal_timm(size, window):
    timm = pytest.importorskip("timm")
    model = small(img_size=size, window=window)
    other = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=size, window_size=window, embed_dim=16, depths=(2, 2, 2, 2),
        num_heads=(1, 2, 2, 4), num_classes=7,
    ).eval()  # fmt: skip
    theirs = {}
    for name, tensor in vertebra.to_official(model).items():
        stage = name.split(".")[1] if ".downsample." in name else ""
        name = name.replace(f"layers.{stage}.downsample", f"layers.{int(stage) + 1}.downsample") if stage else name
        theirs[name.replace("head.", "head.fc.")] = tensor
    assert not other.load_state_dict(theirs, strict=False).unexpected_keys
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert error(model(x), other(x)) <= 1e-5


def plain_attention(mixer, x, masked=True):
    """Shifted-window attention of x (B, H, W, C), dense version, step by step: pad, roll, cut, paint the mask, crop."""
    (w, _), (s, _) = mixer.window, mixer.shift
    b, h, wide, c = x.shape
    x = F.pad(x, (0, 0, 0, -wide % w, 0, -h % w))
    hp, wp = x.shape[1:3]
    x = x.roll((-s, -s), (1, 2))
    paint = torch.zeros(1, hp, wp, 1)
    edges = [slice(0, -w), slice(-w, -s), slice(-s, None)] if s else [slice(None)]
    for i, rows in enumerate(edges):
        for j, cols in enumerate(edges):
            paint[:, rows, cols] = 3 * i + j

    def cut(y):
        return y.reshape(y.shape[0], hp // w, w, wp // w, w, -1).transpose(2, 3).reshape(-1, w * w, y.shape[-1])

    names = cut(paint)[..., 0]
    mask = -100.0 * (names[:, :, None] != names[:, None, :]).float() * masked
    qkv = mixer.qkv(cut(x)).reshape(-1, w * w, 3, mixer.heads, c // mixer.heads).permute(2, 0, 3, 1, 4)
    logits = qkv[0] @ qkv[1].transpose(-1, -2) * (c // mixer.heads) ** -0.5
    for q in range(w * w):
        for k in range(w * w):
            row = (q // w - k // w + w - 1) * (2 * w - 1) + q % w - k % w + w - 1
            logits[:, :, q, k] += mixer.pos.table[row]
    logits = logits + mask.repeat(b, 1, 1)[:, None]
    y = mixer.proj((logits.softmax(-1) @ qkv[2]).transpose(1, 2).flatten(2))
    y = y.reshape(b, hp // w, wp // w, w, w, c).transpose(2, 3).reshape(b, hp, wp, c)
    return y.roll((s, s), (1, 2))[:, :h, :wide]


@pytest.mark.parametrize("sides", [(12, 10), (8, 4), (3, 9), (1, 1)])
def test_padded_shifted_attention_equals_the_steps_written_out(sides):
    dense = small(features_only=True, window=4)
    x = torch.randn(2, *sides, 16)
    with torch.no_grad():
        for block in dense.stages[0].blocks:
            assert error(block.attn(x), plain_attention(block.attn, x)) <= 1e-5
        shifted = dense.stages[0].blocks[1].attn
        if min(sides) > 1:  # the mask is what keeps cells from opposite edges apart
            assert error(shifted(x), plain_attention(shifted, x, masked=False)) > 1e-2


@pytest.mark.parametrize(("sides", "shift"), [((8, 12), 2), ((8, 12), 0), ((7, 5), 2)])
def test_window_mixing_equals_the_grouped_convolution(sides, shift):
    w, heads, dim = 4, 2, 6
    torch.manual_seed(0)
    mixer = WindowMixing(2, dim, heads, w, shift)
    with torch.no_grad():
        mixer.weight.normal_()
        mixer.bias.normal_()
        x = torch.randn(2, *sides, dim)
        y = F.pad(x, (0, 0, 0, -sides[1] % w, 0, -sides[0] % w))
        if shift:
            y = F.pad(y, (0, 0, w - shift, shift, w - shift, shift))
        hp, wp = y.shape[1:3]
        y = y.reshape(2, hp // w, w, wp // w, w, dim).transpose(2, 3).reshape(-1, w * w, heads, dim // heads)
        y = F.conv1d(y.transpose(1, 2).reshape(-1, heads * w * w, dim // heads), mixer.weight, mixer.bias, groups=heads)
        y = y.reshape(-1, heads, w * w, dim // heads).transpose(1, 2).reshape(2, hp // w, wp // w, w, w, dim)
        y = y.transpose(2, 3).reshape(2, hp, wp, dim)
        start = w - shift if shift else 0
        y = y[:, start : start + sides[0], start : start + sides[1]]
        assert error(mixer(x), y) <= 1e-5


def test_windows_follow_the_built_size_by_its_smaller_side():
    full = [(7, 0), (7, 3)]
    assert settings_of(small(img_size=224)) == [full, full, full, [(7, 0), (7, 0)]]
    assert settings_of(small(img_size=(448, 224))) == [full, full, full, [(7, 0), (7, 0)]]
    assert settings_of(small(img_size=448)) == [full] * 4
    assert settings_of(small(img_size=96)) == [full, full, [(6, 0)] * 2, [(3, 0)] * 2]
    assert settings_of(small(img_size=90)) == [full, full, [(6, 0)] * 2, [(3, 0)] * 2]  # 23, 12, 6, 3 cells
    assert small(img_size=96).stages[3].blocks[0].attn.pos.table.shape == (25, 4)
    assert settings_of(small(img_size=96, features_only=True)) == [full] * 4
    with pytest.raises(ValueError, match="img_size"):
        small(img_size=0)
    with pytest.raises(ValueError, match="img_size"):
        small(img_size=(224, 224, 224))


def test_the_dense_version_shifts_small_maps_and_normalises_each_output():
    model = small()
    dense = small(seed=1, features_only=True)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    with torch.no_grad():
        for i in range(4):
            norm = dense.output_norms[i]
            norm.weight.fill_(1), norm.bias.fill_(0)
        x = torch.randn(1, 3, 224, 224)
        maps, raw = dense(x), model.forward_intermediates(x)
    normed = [F.layer_norm(m.movedim(1, -1), m.shape[1:2]).movedim(-1, 1) for m in raw]
    assert max(error(a, b) for a, b in zip(maps[:3], normed[:3], strict=True)) <= 1e-5
    assert error(maps[3], normed[3]) > 1e-2  # a 7x7 map: one unshifted window there, four shifted ones here


def test_merging_reads_the_cell_column_first():
    merge = small().stages[1].down
    x = torch.randn(1, 4, 6, 16)
    parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
    with torch.no_grad():
        assert error(merge(x), merge.reduction(merge.norm(torch.cat(parts, -1)))) <= 1e-6
        odd = merge(x[:, :3, :5])
        assert error(odd, merge(F.pad(x[:, :3, :5], (0, 0, 0, 1, 0, 1)))) == 0


def test_official_names_put_the_merge_at_the_end_of_a_stage():
    names = set(vertebra.to_official(small()))
    assert {"layers.0.downsample.reduction.weight", "layers.2.downsample.norm.bias"} <= names
    assert not any(n.startswith("layers.3.downsample") for n in names)
    assert "layers.1.blocks.1.attn.relative_position_bias_table" in names and "layers.3.blocks.0.attn.qkv.bias" in names
    mixing = set(vertebra.to_official(small(MLP)))
    assert {"layers.0.blocks.1.spatial_mlp.weight", "layers.0.blocks.1.spatial_mlp.bias"} <= mixing
    assert not any(".attn." in n for n in mixing)


def test_constant_buffers_may_be_in_the_file_and_tables_are_resampled():
    model, wide = small(), small(seed=1, window=12, img_size=384)
    state = vertebra.to_official(model)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    report = vertebra.load_checkpoint(wide, {"model": state})
    assert len(report.adapted) == 8 and not report.missing and not report.unexpected
    name = "layers.1.blocks.0.attn.relative_position_bias_table"
    table = state[name].t().reshape(1, 2, 13, 13)
    want = F.interpolate(table, size=(23, 23), mode="bicubic", align_corners=False).reshape(2, -1).t()
    assert error(wide.stages[1].blocks[0].attn.pos.table.detach(), want) <= 1e-6


@pytest.mark.parametrize("name", [TINY, MLP])
@pytest.mark.parametrize(("ndim", "sides"), [(1, (97,)), (2, (32, 71)), (3, (33, 32, 40))])
def test_other_ranks_and_sizes_train(name, ndim, sides):
    model = small(name, ndim, window=3, img_size=64, in_chans=2).train()
    y = model(torch.randn(2, 2, *sides))
    y.square().sum().backward()
    assert y.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", [TINY, MLP])
def test_a_row_of_a_plane_is_the_line(name):
    """A plane of equal rows gives the line's result in each row, when its tables do not look across rows."""
    torch.manual_seed(0)
    line, plane = small(name, 1, window=4).stages[0].blocks, small(name, 2, window=4).stages[0].blocks
    x = torch.randn(1, 10, 16)
    w = 4
    with torch.no_grad():
        for one, two in zip(line, plane, strict=True):
            if name == TINY:  # equal keys repeated as often leave a softmax's mean as it was
                two.attn.load_state_dict(one.attn.state_dict() | {"pos.table": one.attn.pos.table.repeat(2 * w - 1, 1)})
                got = two.attn(x[:, None].expand(1, 8, 10, 16))
                assert error(got, one.attn(x)[:, None].expand_as(got)) <= 1e-5
            else:
                heads = one.attn.heads
                matrix = torch.zeros(heads, w, w, w, w)
                matrix[:] = torch.einsum("rs,hqk->hrqsk", torch.eye(w), one.attn.weight.view(heads, w, w))
                two.attn.weight.copy_(matrix.reshape(heads * w * w, w * w, 1))
                two.attn.bias.copy_(one.attn.bias.view(heads, 1, w).expand(heads, w, w).reshape(-1))
                got = two.attn(x[:, None].expand(1, 8, 10, 16))
                assert error(got, one.attn(x)[:, None].expand_as(got)) <= 1e-5


def test_tables_are_exempt_from_weight_decay():
    names = small().no_weight_decay()
    assert len(names) == 8 and all(n.endswith(".attn.pos.table") for n in names)
