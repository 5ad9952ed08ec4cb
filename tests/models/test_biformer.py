"""BiFormer: bi-level routing cell by cell, what the two STL files differ in, the dense version, official names."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import Largest, error, fill

import vertebra
from vertebra.layers import BatchNorm, record_attention
from vertebra.mixers import BiLevelRoutingAttention
from vertebra.models.biformer import FAMILY, LocalGlobalAttention

TINY, STL, NCHW = "biformer_tiny", "biformer_stl", "biformer_stl_nchw"
SMALL = dict(dims=(32, 32, 64, 64), depths=(1, 1, 2, 1), num_classes=7)


def small(name, **options):
    torch.manual_seed(0)
    return fill(vertebra.create_model(name, **(SMALL | options)))


def mixed(mixer):
    """Weights that give logits of some size, so that routing and softmax matter."""
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    return mixer.eval()


def reference(m, x):
    """One sample (*S, C): every cell's routed cells by hand, per head, with the padding that the options ask for."""
    *sides, dim = x.shape
    late, width = m.late_padding, dim // m.heads
    size = [max(s // m.n_win, 1) if late else -(-s // m.n_win) for s in sides]
    count = [m.n_win if len(sides) == 2 and not late else -(-s // w) for s, w in zip(sides, size, strict=True)]
    full = [n * w for n, w in zip(count, size, strict=True)]

    def padded(t):
        out = torch.zeros(*full, t.shape[-1])
        out[tuple(slice(0, s) for s in sides)] = t
        return out

    linear = lambda t: F.linear(t, m.qkv.weight, m.qkv.bias)  # noqa: E731
    q, k, v = (padded(linear(x)) if late else linear(padded(x))).split(dim, -1)
    regions = {}
    for cell in itertools.product(*map(range, full)):
        regions.setdefault(tuple(c // w for c, w in zip(cell, size, strict=True)), []).append(cell)
    real = lambda cell: all(c < s for c, s in zip(cell, sides, strict=True))  # noqa: E731
    seen = {r: [c for c in cells if real(c) or not late] for r, cells in regions.items()}
    means = {r: [torch.stack([t[c] for c in cells]).mean(0) for t in (q, k)] for r, cells in seen.items()}
    out = torch.zeros(*full, dim)
    for region, cells in regions.items():
        fit = {r: (means[region][0] @ means[r][1]).item() for r in regions}
        chosen = sorted(regions, key=lambda r: -fit[r])[: m.topk]
        keys = [c for r in chosen for c in regions[r]]
        for cell in cells:
            for h in range(m.heads):
                part = slice(h * width, (h + 1) * width)
                logits = torch.stack([q[cell][part] @ k[key][part] for key in keys]) / dim**0.5
                out[cell][part] = logits.softmax(0) @ torch.stack([v[key][part] for key in keys])
    inside = tuple(slice(0, s) for s in sides)
    values = (v[inside] if late else v).movedim(-1, 0).unsqueeze(0)
    conv = getattr(F, f"conv{len(sides)}d")
    local = conv(values, m.lepe.weight, m.lepe.bias, padding=m.lepe.weight.shape[-1] // 2, groups=dim)
    return F.linear(out[inside] + local[0].movedim(0, -1)[inside], m.proj.weight, m.proj.bias)


@pytest.mark.parametrize(
    ("sides", "n_win", "topk"),
    [
        ((6, 6), 3, 2),  # regions that fit
        ((7, 8), 3, 4),  # the last regions partly padding
        ((4, 7), 3, 9),  # a row of regions of padding alone, and all regions are chosen
        ((2, 3), 3, 1),  # fewer cells than regions
        ((13,), 4, 2),
        ((3,), 4, 16),  # more routes than regions
        ((3, 4, 5), 2, 3),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_routing_cell_by_cell(sides, n_win, topk, late):
    mixer = mixed(BiLevelRoutingAttention(len(sides), 8, 2, n_win, topk, 3, late))
    x = torch.randn(2, *sides, 8)
    with torch.no_grad():
        y = mixer(x)
        for ours, sample in zip(y, x, strict=True):
            torch.testing.assert_close(ours, reference(mixer, sample), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "late", "groups", "keys"),
    [
        ((16, 12), False, 49, 4 * 3 * 2),  # 21 x 14: always 7 x 7 regions, of 3 x 2 cells
        ((16,), False, 6, 4 * 3),  # 1-D: six regions of 3 cells cover the line
        ((8, 8, 8), False, 4**3, 4 * 2**3),  # and a volume is not padded to 14 x 14 x 14
        ((16, 12), True, 8 * 12, 4 * 2 * 1),  # regions of 16 // 7 by 12 // 7 cells
    ],
)
def test_regions_of_a_map(sides, late, groups, keys):
    mixer = BiLevelRoutingAttention(len(sides), 8, 2, 7, 4, late_padding=late)
    with torch.no_grad(), record_attention() as seen:
        mixer(torch.randn(1, *sides, 8))
    assert seen[0].shape[0] == groups and seen[0].shape[-1] == keys


def test_gradient_reaches_routed_regions_only():
    """The choice has no gradient, so nothing reaches a cell through the means of its region."""
    mixer = mixed(BiLevelRoutingAttention(1, 8, 2, 6, 1))
    torch.nn.init.zeros_(mixer.lepe.weight)
    x = torch.randn(1, 24, 8, requires_grad=True)
    mixer(x)[0, :4].square().sum().backward()
    q, k, _ = F.linear(x.detach(), mixer.qkv.weight, mixer.qkv.bias).reshape(6, 4, 24).mean(1).split(8, -1)
    routed = {0, int((q[0] @ k.T).argmax())}
    touched = x.grad.reshape(6, -1).abs().sum(1)
    assert {i for i in range(6) if touched[i] > 0} == routed and len(routed) == 2


def test_largest_tensor_is_the_gathered_keys_and_values():
    mixer = BiLevelRoutingAttention(2, 32, 1, 7, 4)
    for side in (28, 56):
        with torch.no_grad(), Largest() as seen:
            mixer(torch.randn(1, side, side, 32))
        assert seen.numbers == 4 * side * side * 2 * 32


@pytest.mark.parametrize("of_values", [False, True])
@pytest.mark.parametrize(("ndim", "sides"), [(1, (9,)), (2, (4, 5)), (3, (2, 3, 4))])
def test_global_attention_has_8_heads_and_a_head_width_scale(ndim, sides, of_values):
    attn, x = mixed(LocalGlobalAttention(ndim, 16, 8, 5, of_values)), torch.randn(2, *sides, 16)
    assert attn.qkv.bias is None
    q, k, v = (x @ attn.qkv.weight.T).flatten(1, -2).split(16, -1)
    heads = [
        (q[..., h : h + 2] @ k[..., h : h + 2].mT / 2**0.5).softmax(-1) @ v[..., h : h + 2] for h in range(0, 16, 2)
    ]
    read = (v.reshape(x.shape) if of_values else x).movedim(-1, 1)
    local = getattr(F, f"conv{ndim}d")(read, attn.lepe.weight, attn.lepe.bias, padding=2, groups=16).movedim(1, -1)
    expected = attn.proj(torch.cat(heads, -1).reshape(x.shape) + local)
    with torch.no_grad():
        torch.testing.assert_close(attn(x), expected, rtol=1e-4, atol=1e-5)


def test_stl_files_differ_in_the_last_stage_and_in_padding():
    plain, other = small(STL), small(NCHW)
    state = plain.state_dict()
    other.load_state_dict({k: state[k].reshape(v.shape) for k, v in other.state_dict().items()})
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = plain.forward_intermediates(x), other.forward_intermediates(x)
        for i in range(3):
            assert error(ours[i], theirs[i]) <= 1e-5
        assert error(ours[3], theirs[3]) > 1e-3  # LePE of the input or of the values
        odd = torch.randn(1, 3, 200, 200)
        assert error(plain.forward_intermediates(odd, [0])[0], other.forward_intermediates(odd, [0])[0]) > 1e-3


def test_any_size_is_the_padded_rule_by_default():
    """An image whose maps divide gives the same whatever the rule; one that does not is padded inside attention."""
    model = small(TINY)
    block = model.stages[0].blocks[0]
    x = torch.randn(1, 10, 9, 32)
    with torch.no_grad():
        rows = F.pad(block.norm1(x), (0, 0, 0, 5, 0, 4))  # 14 x 14, zeros after the norm
        torch.testing.assert_close(block.attn(block.norm1(x)), block.attn(rows)[:, :10, :9])
        assert model(torch.randn(1, 3, 75, 131)).isfinite().all()


def test_dense_version_norms_its_outputs_only():
    model = small(TINY)
    dense = small(TINY, features_only=True, n_win=4)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"extra_norms.{i}.{p}" for i in range(4) for p in ("weight", "bias"))
    assert {n.split(".")[0] for n in report.unused} == {"norm", "head"}
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        raw, normed = small(TINY, n_win=4).forward_intermediates(x), dense(x)
        for i, (a, b) in enumerate(zip(raw, normed, strict=True)):
            norm = dense.output_norms[i]
            assert norm.eps == 1e-6
            expected = F.layer_norm(a.movedim(1, -1), (a.shape[1],), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
            assert error(b, expected) <= 1e-6
        assert error(model.forward_intermediates(x)[0], raw[0]) > 1e-3  # another number of windows
    assert small(STL, features_only=True).output_norms is None


def test_structure_of_the_published_models():
    for name, figures in ((TINY, (2, 2, 8, 2)), ("biformer_small", (4, 4, 18, 4)), (STL, (2, 2, 6, 2))):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        assert tuple(len(s.blocks) for s in model.stages) == figures
        for i, stage in enumerate(model.stages):
            for block in stage.blocks:
                dim = block.norm1.normalized_shape[0]
                assert block.norm1.eps == block.norm2.eps == 1e-6
                assert block.attn.heads == (dim // 32 if i < 3 else 8)
                assert block.mlp.fc1.out_features == dim * (4 if name == STL else 3)
                assert block.attn.lepe.kernel == (5, 5)
                if i < 3:
                    assert (block.attn.n_win, block.attn.topk) == (7, (1, 4, 16)[i])
        assert all(m.eps == 1e-5 for m in model.modules() if isinstance(m, BatchNorm))
    for name, millions in {TINY: 13.143, "biformer_small": 25.536, STL: 28.373, NCHW: 28.373}.items():
        with torch.device("meta"):
            model = vertebra.create_model(name)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.0005)
    assert FAMILY.variants["biformer_base"].published["drop_path"] == 0.4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            TINY,
            {
                "downsample_layers.0.3.weight": (32, 16, 3, 3), "downsample_layers.0.4.running_var": (32,),
                "downsample_layers.2.0.weight": (64, 32, 3, 3), "downsample_layers.2.1.bias": (64,),
                "stages.0.0.pos_embed.weight": (32, 1, 3, 3), "stages.2.1.attn.qkv.qkv.bias": (192,),
                "stages.2.1.attn.wo.weight": (64, 64), "stages.2.0.attn.lepe.weight": (64, 1, 5, 5),
                "stages.3.0.attn.qkv.weight": (192, 64), "stages.3.0.attn.proj.bias": (64,),
                "stages.1.0.mlp.3.weight": (32, 96), "norm.running_mean": (64,), "head.weight": (7, 64),
            },
        ),
        (
            STL,
            {
                "downsample_layers.0.0.weight": (32, 3, 4, 4), "downsample_layers.0.1.running_var": (32,),
                "downsample_layers.2.0.running_mean": (32,), "downsample_layers.2.1.weight": (64, 32, 2, 2),
                "stages.2.blocks.1.attn.wo.weight": (64, 64), "stages.3.blocks.0.mlp.2.weight": (64, 256),
            },
        ),
        (
            NCHW,
            {
                "stages.2.blocks.1.attn.qkv_linear.weight": (192, 64, 1, 1),
                "stages.2.blocks.1.attn.output_linear.bias": (64,),
                "stages.3.blocks.0.attn.qkv.weight": (192, 64, 1, 1),
                "stages.3.blocks.0.attn.proj.weight": (64, 64, 1, 1), "stages.0.blocks.0.mlp.2.weight": (32, 128, 1, 1),
            },
        ),
    ],
)  # fmt: skip
def test_official_names(name, expected):
    state = {k: tuple(v.shape) for k, v in vertebra.to_official(small(name)).items()}
    assert expected.items() <= state.items()
    assert ("stages.3.0.attn.qkv.bias" in state, any("pos_embed" in k for k in state)) == (False, name == TINY)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(topks=(1, 4)), "topk"),
        (dict(dims=(32, 32, 64)), "dims"),
        (dict(topks=(1, 0, 2)), "topk must be .* got 0"),
        (dict(n_win=0), "n_win must be .* got 0"),
        (dict(dims=(16, 32, 64, 64)), "16 channels do not divide"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        vertebra.create_model(TINY, **(SMALL | options))
