"""Super Token ViT: super token attention token by token, its gradient and memory, stem, MLP, neck and names."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import Largest, error, fill
from torch import nn

import vertebra
from vertebra.layers import BatchNorm
from vertebra.mixers import SuperTokenAttention
from vertebra.mixers.super_token import neighbours
from vertebra.models.svit import SuperTokenBlock

SMALL = dict(dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4), num_classes=7)


def small(name="svit_base", **options):
    torch.manual_seed(0)
    return fill(vertebra.create_model(name, **(SMALL | dict(scales=(None, None, 0.5, 0.5)) | options)))


def mixed(mixer):
    """Weights that give logits of some size."""
    with torch.no_grad():
        for p in mixer.parameters():
            p.normal_(std=0.5)
    return mixer.eval()


def attention(m, tokens):
    """Plain attention over a list of vectors; a head's query, key and value lie side by side."""
    rows = F.linear(torch.stack(tokens), m.qkv.weight.flatten(1), m.qkv.bias)
    width = rows.shape[1] // 3 // m.heads
    parts = []
    for h in range(m.heads):
        q, k, v = rows[:, 3 * width * h : 3 * width * (h + 1)].split(width, -1)
        parts.append((q @ k.T / width**0.5).softmax(-1) @ v)
    return F.linear(torch.cat(parts, -1), m.proj.weight.flatten(1), m.proj.bias)


def reference(m, x):
    """One sample (*S, C), token by token and super token by super token."""
    *sides, dim = x.shape
    grid = [-(-s // m.size) for s in sides]
    cells = list(itertools.product(*map(range, grid)))
    home, token = {}, {}
    for p in itertools.product(*(range(g * m.size) for g in grid)):
        home[p] = tuple(c // m.size for c in p)
        token[p] = x[p] if all(c < s for c, s in zip(p, sides, strict=True)) else x.new_zeros(dim)
    means = {c: torch.stack([token[p].detach() for p in home if home[p] == c]).mean(0) for c in cells}
    steps = list(itertools.product((-1, 0, 1), repeat=len(sides)))
    for i in range(m.iterations):
        shares = {}
        with torch.no_grad():
            for p, c in home.items():
                near = [tuple(a + b for a, b in zip(c, s, strict=True)) for s in steps]
                logits = [token[p] @ means.get(n, x.new_zeros(dim)) / dim**0.5 for n in near]
                shares[p] = dict(zip(near, torch.stack(logits).softmax(0), strict=True))
        last = i == m.iterations - 1
        for c in cells:
            mine = [(shares[p][c], token[p] if last else token[p].detach()) for p in home if c in shares[p]]
            means[c] = sum(a * t for a, t in mine) / (sum(a for a, _ in mine) + 1e-12)
    refined = dict(zip(cells, attention(m, [means[c] for c in cells]), strict=True))
    out = [
        sum(a * refined[c] for c, a in shares[p].items() if c in refined) for p in itertools.product(*map(range, sides))
    ]
    return torch.stack(out).reshape(x.shape)


@pytest.mark.parametrize(
    ("sides", "size", "iterations"),
    [
        ((8, 12), 4, 1),
        ((7, 6), 2, 2),  # padded
        ((5, 4), 4, 1),  # one column of super tokens: most neighbours lie outside
        ((11,), 3, 3),
        ((2,), 3, 1),  # smaller than a cell
        ((4, 3, 5), 2, 1),
        ((3, 3, 3), 2, 2),
    ],
)
def test_super_tokens_one_by_one_with_their_gradient(sides, size, iterations):
    mixer = mixed(SuperTokenAttention(len(sides), 8, 2, size, iterations))
    x = torch.randn(2, *sides, 8)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = mixer(ours), torch.stack([reference(mixer, sample) for sample in theirs])
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (z * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ndim", "sides"), [(1, (9,)), (2, (4, 5)), (3, (2, 3, 4))])
def test_size_one_is_plain_attention(ndim, sides):
    mixer, x = mixed(SuperTokenAttention(ndim, 8, 2, 1, 3)), torch.randn(1, *sides, 8)
    with torch.no_grad():
        expected = attention(mixer, list(x.flatten(0, -2))).reshape(x.shape)
        torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-5)


def test_neighbours_are_unfold_and_fold():
    x, parts = torch.randn(2, 20, 3), torch.randn(2, 20, 9, 3)
    around = neighbours((4, 5))
    views = F.unfold(x.mT.reshape(2, 3, 4, 5), 3, padding=1).reshape(2, 3, 9, 20).permute(0, 3, 2, 1)
    torch.testing.assert_close(around.gather(x), views)
    folded = F.fold(parts.permute(0, 3, 2, 1).reshape(2, 27, 20), (4, 5), 3, padding=1).flatten(2).mT
    torch.testing.assert_close(around.scatter(parts), folded)


@pytest.mark.parametrize("grid", [(1,), (7,), (3, 1, 4)])
def test_scatter_is_the_adjoint_of_gather(grid):
    around, cells = neighbours(grid), torch.Size(grid).numel()
    x, y = torch.randn(1, cells, 2).double(), torch.randn(1, cells, 3 ** len(grid), 2).double()
    torch.testing.assert_close((around.gather(x) * y).sum(), (x * around.scatter(y)).sum())


def test_no_tensor_is_larger_than_the_tokens():
    """The surroundings of super tokens, 9 M C numbers, are gathered, never those of tokens."""

    mixer = SuperTokenAttention(2, 32, 1, 8)
    for side in (32, 64):
        x = torch.randn(1, side, side, 32)
        with torch.no_grad(), Largest() as seen:
            mixer(x)
        assert seen.numbers == x.numel()


def test_a_super_token_that_nobody_chose_is_no_division_by_zero():
    mixer = SuperTokenAttention(1, 1, 1, 4).half()
    x = torch.tensor([10.0] * 4 + [40.0] * 4).half().reshape(1, 8, 1)  # all tokens choose the second one
    with torch.no_grad():
        assert mixer(x).isfinite().all()


def test_convolutional_mlp():
    block = SuperTokenBlock(2, 6, heads=1, size=1, iterations=1, mlp_ratio=10 / 6, drop_path=0.0, scale=None)
    mlp, x = fill(block.mlp), torch.randn(2, 5, 4, 6)
    weight, bias = mlp.middle[1].conv.weight, mlp.middle[1].conv.bias
    h = F.gelu(F.conv2d(x.movedim(-1, 1), mlp.fc1.weight, mlp.fc1.bias))
    h = h + F.conv2d(h, weight, bias, padding=1, groups=10)
    expected = F.conv2d(h, mlp.fc2.weight, mlp.fc2.bias).movedim(1, -1)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-6)


def test_stem_activates_before_the_norm_and_has_two_strides():
    stem = small().patch_embed
    assert [type(m).__name__ for m in stem] == ["Conv", "GELU", "BatchNorm"] * 4
    assert [m.stride[0] for m in stem if hasattr(m, "stride")] == [2, 1, 2, 1]


def test_block_and_neck_step_by_step():
    model = small()
    block, x = model.stages[2].blocks[0], torch.randn(2, 5, 7, 32)
    with torch.no_grad():
        for norm in [m for m in model.modules() if isinstance(m, BatchNorm)]:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        y = x + block.position.conv(x)
        y = y + block.attn(
            F.layer_norm(y, (32,), block.norm1.weight, block.norm1.bias, 1e-6)
        ) * block.scale1.gamma.view(-1)
        bn = block.norm2
        normed = (y - bn.running_mean) / (bn.running_var + 1e-5).sqrt() * bn.weight + bn.bias
        y = y + block.mlp(normed) * block.scale2.gamma.view(-1)
        torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-5)
        image = torch.randn(1, 3, 70, 64)
        last = model.forward_intermediates(image, [3])[0].movedim(1, -1)
        pooled = F.silu(model.neck.norm(model.neck.conv(last))).mean((1, 2))
        torch.testing.assert_close(model(image), model.head(pooled))
        assert pooled.shape == (1, 1024) and last.shape == (1, 3, 2, 64)


def test_iterations_and_sizes_are_per_stage():
    model, more = small(), small(iterations=(2, 3, 1, 1), sizes=(8, 2, 1, 1))
    assert [s.blocks[0].attn.iterations for s in more.stages] == [2, 3, 1, 1]
    assert [s.blocks[0].attn.size for s in more.stages] == [8, 2, 1, 1]
    more.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        assert error(more(x), model(x)) > 1e-5


def test_official_names_and_constants():
    model = small()
    state = vertebra.to_official(model)
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    expected = {
        "patch_embed.proj.9.weight": (16, 16, 3, 3), "patch_embed.proj.11.running_mean": (16,),
        "layers.0.downsample.proj.0.weight": (32, 16, 3, 3), "layers.0.downsample.proj.1.bias": (32,),
        "layers.2.blocks.1.gamma_1": (1, 32, 1, 1), "layers.3.blocks.0.gamma_2": (1, 64, 1, 1),
        "layers.0.blocks.0.pos_embed.conv.weight": (16, 1, 3, 3), "layers.0.blocks.0.norm1.norm.weight": (16,),
        "layers.0.blocks.0.attn.stoken_refine.qkv.weight": (48, 16, 1, 1),
        "layers.0.blocks.0.attn.stoken_refine.proj.bias": (16,), "layers.0.blocks.0.norm2.running_var": (16,),
        "layers.0.blocks.0.mlp2.fc1.weight": (64, 16, 1, 1), "layers.0.blocks.0.mlp2.conv.conv.weight": (64, 1, 3, 3),
        "layers.0.blocks.0.mlp2.fc2.bias": (16,), "proj.weight": (1024, 64, 1, 1), "norm.weight": (1024,),
    }  # fmt: skip
    assert expected.items() <= shapes.items()
    assert not any("gamma" in k for k in shapes if k.startswith(("layers.0", "layers.1")))
    kernels = torch.eye(9).reshape(9, 1, 3, 3)
    for i, j in ((0, 0), (3, 0)):
        state |= {f"layers.{i}.blocks.{j}.attn.{part}.weights": kernels for part in ("unfold", "fold")}
    other = vertebra.create_model("svit_base", **SMALL, scales=(None, None, 0.5, 0.5), checkpoint=state).eval()
    assert not other.load_report.unexpected
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


def test_structure_of_the_published_models():
    measured = {"svit_small": 25.495624, "svit_base": 51.691, "svit_large": 95}
    for name, millions in measured.items():
        with torch.device("meta"):
            model = vertebra.create_model(name)
        unit = {"svit_small": 0, "svit_base": 0.0005, "svit_large": 1}[name]
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=unit, rel=0)
        for i, stage in enumerate(model.stages):
            for block in stage.blocks:
                assert (block.attn.size, block.attn.iterations) == ((8, 4, 1, 1)[i], 1)
                assert block.norm1.eps == 1e-6 and block.norm2.eps == 1e-5
                scaled = not isinstance(block.scale1, nn.Identity)
                assert scaled == (name != "svit_small" and i > 1)
    scales = vertebra.create_model("svit_base", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), heads=(1, 1, 1, 1))
    assert scales.stages[3].blocks[0].scale2.gamma.flatten().tolist() == pytest.approx([1e-6] * 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(iterations=(2, 2)), "iterations needs one entry for each of the 4 stages"),
        (dict(sizes=(8, 4, 0, 1)), "size must be .* got 0"),
        (dict(iterations=(0, 1, 1, 1)), "iterations must be .* got 0"),
        (dict(heads=(3, 2, 2, 4)), "16 channels do not divide into 3 heads"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        vertebra.create_model("svit_base", **(SMALL | options))
