"""Attention, positions, embeddings, MLP, drop path, squeeze-excite, fusing: each against its formula."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vertebra.layers import (
    Attention,
    BatchNorm,
    Block,
    Branches,
    Conv,
    ConvNorm,
    CrossAttention,
    CrossScale,
    DropPath,
    DynamicPositionBias,
    InvertedResidual,
    LayerScale,
    Mlp,
    NextBlock,
    PatchEmbed,
    PatchMerging,
    Positions,
    RelativePositionBias,
    ResidualConv,
    SqueezeExcite,
    TokenBlock,
    attend,
    attention_rollout,
    built_grid,
    channel_shuffle,
    check_heads,
    drop_path_rates,
    make_divisible,
    merge_heads,
    record_attention,
    relative_index,
    sincos,
    split_heads,
    windows,
)

torch.set_num_threads(1)
RANKS = (1, 2, 3)
SIDES = {1: (12,), 2: (8, 10), 3: (6, 4, 8)}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def first(x):
    return x.movedim(-1, 1)


def last(x):
    return x.movedim(1, -1)


def close(a, b, tolerance=1e-11):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (None, 0.7))
@pytest.mark.parametrize("bias", (None, (1, 3, 5, 7), (2, 1, 5, 7), (2, 3, 5, 7)))
def test_attend(scale, bias):
    q, k, v = (randn(2, 3, n, 8, seed=n).requires_grad_() for n in (5, 7, 7))
    b = None if bias is None else randn(*bias, seed=9).requires_grad_()
    leaves = [q, k, v] + ([] if b is None else [b])
    logits = torch.einsum("bhld,bhmd->bhlm", q, k) * (8**-0.5 if scale is None else scale)
    weights = (logits if b is None else logits + b).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    want = torch.einsum("bhlm,bhmd->bhld", weights, v)
    ours = attend(q, k, v, b, scale)
    close(ours, want)
    seed = randn(*want.shape, seed=4)
    for a, c in zip(torch.autograd.grad((ours * seed).sum(), leaves), torch.autograd.grad((want * seed).sum(), leaves)):
        close(a, c)
    with record_attention() as seen:
        close(attend(q, k, v, b, scale), want)
    close(seen[0], weights.detach())
    assert not seen[0].requires_grad


def test_attention_against_torch():
    layer = Attention(12, 3).double()
    reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
    reference.load_state_dict(
        {
            "in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias,
            "out_proj.weight": layer.proj.weight, "out_proj.bias": layer.proj.bias,
        }
    )  # fmt: skip
    x = randn(2, 6, 12)
    bias = randn(6, 6, seed=1)
    close(layer(x), reference(x, x, x)[0])
    close(layer(x, bias), reference(x, x, x, attn_mask=bias)[0])
    assert Attention(12, 3, qkv_bias=False).qkv.bias is None


@pytest.mark.parametrize("heads", [1, 4])
def test_cross_attention_against_torch(heads):
    torch.manual_seed(0)
    ours, theirs = CrossAttention(8, heads), nn.MultiheadAttention(8, heads, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context, bias = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(5, 7)
    y, _ = theirs(x, context, context, attn_mask=bias)
    torch.testing.assert_close(ours(x, context, bias), y, rtol=1e-4, atol=1e-6)
    assert CrossAttention(8, 2, qkv_bias=False).q.bias is None


def test_recording_changes_nothing_and_ends():
    layer = Attention(12, 3).double()
    x = randn(2, 6, 12)
    with record_attention() as outer:
        a = layer(x)
        with record_attention() as inner:
            layer(x)
        layer(x)
    assert (len(outer), len(inner)) == (2, 1)
    layer(x)
    assert len(outer) == 2
    close(a, layer(x))
    assert outer[0].shape == (2, 3, 6, 6)
    close(outer[0].sum(-1), torch.ones(2, 3, 6, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="stop"), record_attention() as cut:
        raise RuntimeError("stop")
    layer(x)
    assert cut == []


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("record", (False, True))
def test_masked_windows_are_finite_in_low_precision(dtype, record):
    """The last window of a shifted, padded map has rows in which every key is masked."""
    torch.manual_seed(0)
    layer = Attention(16, 2)
    plan = windows((9,), (4,), shift=(2,), mask_keys=True)
    lonely = (plan.mask <= -100).all(-1)
    assert lonely.any()
    x = randn(2, 9, 16, dtype=torch.float32) * 5
    bias = plan.bias(RelativePositionBias((4,), 2)(), 2)
    with torch.autocast("cpu", dtype):
        if record:
            with record_attention() as seen:
                y = layer(plan.split(x), bias)
            assert torch.isfinite(seen[0]).all()
        else:
            y = layer(plan.split(x), bias)
    assert torch.isfinite(y).all()
    y.float().sum().backward()
    assert torch.isfinite(layer.qkv.weight.grad).all()
    exact, got = plan.join(layer(plan.split(x), bias), (9,)), plan.join(y, (9,)).float()
    assert (got - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()  # at the cells that are kept


def test_heads():
    x = randn(2, 5, 24)
    parts = split_heads(x, 4, 2)
    assert len(parts) == 2
    for p, h, d in itertools.product(range(2), range(4), range(3)):
        assert torch.equal(parts[p][:, h, :, d], x[:, :, p * 12 + h * 3 + d])
    assert torch.equal(merge_heads(split_heads(x, 4)[0]), x)
    check_heads(12, 3)
    for dim, heads in ((12, 5), (12, 0)):
        with pytest.raises(ValueError, match=f"12 channels do not divide into {heads} heads"):
            check_heads(dim, heads)


def test_rollout():
    weights = [randn(2, 3, 4, 4, seed=i).softmax(-1) for i in range(3)]
    got = attention_rollout(weights)
    steps = [(w.mean(1) + torch.eye(4, dtype=torch.float64)) / 2 for w in weights]
    close(got, steps[2] @ steps[1] @ steps[0])
    close(got.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="no attention weights"):
        attention_rollout([])


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1,), (5,), (3, 4), (7, 7), (2, 3, 4)])
def test_relative_index(size):
    index = relative_index(size)
    cells = list(itertools.product(*map(range, size)))
    for (q, a), (k, b) in itertools.product(enumerate(cells), enumerate(cells)):
        row = 0
        for i, j, s in zip(a, b, size):
            row = row * (2 * s - 1) + i - j + s - 1
        assert index[q, k] == row


@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_relative_bias(size):
    layer = RelativePositionBias(size, 3).double()
    bias = layer()
    assert torch.equal(bias, layer.table[relative_index(size)].permute(2, 0, 1))
    seed = randn(*bias.shape)
    (gradient,) = torch.autograd.grad((bias * seed).sum(), layer.table)
    want = torch.zeros_like(layer.table)
    for q, k in itertools.product(range(math.prod(size)), repeat=2):
        want[relative_index(size)[q, k]] += seed[:, q, k]
    close(gradient, want)


@pytest.mark.parametrize("ndim", RANKS)
def test_relative_bias_adapts_another_window(ndim):
    layer = RelativePositionBias((4,) * ndim, 3)
    table = randn(5**ndim, 3, dtype=torch.float32)
    got = layer.adapt("table", table)
    assert got.shape == (7**ndim, 3)
    if ndim == 2:
        want = F.interpolate(table.T.reshape(1, 3, 5, 5), size=(7, 7), mode="bicubic", align_corners=False)
        close(got, want[0].flatten(1).T, 1e-6)
    close(got.mean(0), table.mean(0), 0.5)
    close(layer.adapt("table", torch.ones(9**ndim, 3)), torch.ones(7**ndim, 3), 1e-6)
    assert torch.equal(layer.adapt("table", layer.table.detach()), layer.table)
    for wrong in (torch.zeros(5**ndim, 2), torch.zeros(5**ndim), torch.tensor(1.0), torch.zeros(0, 3)):
        assert layer.adapt("table", wrong) is None
    if ndim > 1:
        assert layer.adapt("table", torch.zeros(5**ndim + 1, 3)) is None


@pytest.mark.parametrize("size", [(5,), (3, 4), (2, 3, 2)])
def test_dynamic_bias(size):
    layer = DynamicPositionBias(len(size), 32, 3).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    bias = layer(size)
    cells = list(itertools.product(*map(range, size)))
    for (q, a), (k, b) in itertools.product(enumerate(cells), enumerate(cells)):
        offset = torch.tensor([i - j for i, j in zip(a, b)], dtype=torch.float64)
        close(bias[:, q, k], layer.pos3(layer.pos2(layer.pos1(layer.pos_proj(offset)))))
    with pytest.raises(ValueError, match="at least 16 channels, got 15"):
        DynamicPositionBias(2, 15, 3)


@pytest.mark.parametrize("prefix", (0, 2))
@pytest.mark.parametrize("grid", [(6,), (4, 5), (3, 4, 2)])
def test_positions(grid, prefix):
    layer = Positions(4, grid, prefix, mode="linear", antialias=False)
    assert layer.table.shape == (1, prefix + math.prod(grid), 4)
    assert layer(grid) is layer.table
    new = tuple(s + 2 for s in grid)
    cells = layer.table[:, prefix:].unflatten(1, grid)
    name = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(grid)]
    want = last(F.interpolate(first(cells), size=new, mode=name, align_corners=False)).flatten(1, -2)
    got = layer(new)
    close(got[:, prefix:], want, 1e-6)
    assert torch.equal(got[:, :prefix], layer.table[:, :prefix])
    (gradient,) = torch.autograd.grad(got.sum(), layer.table)
    assert gradient.sum().item() == pytest.approx(got.numel(), rel=1e-5)


def test_positions_resample_cubic_with_antialiasing():
    layer = Positions(4, (6, 7))
    cells = first(layer.table.unflatten(1, (6, 7)))
    want = F.interpolate(cells, size=(3, 9), mode="bicubic", align_corners=False, antialias=True)
    close(layer((3, 9)), last(want).flatten(1, 2), 1e-6)


def test_positions_adapt():
    layer = Positions(4, (6, 8), prefix=1)

    def want(table, old):
        cells = F.interpolate(first(table[:, 1:].unflatten(1, old)), size=(6, 8), mode="bicubic", align_corners=False)
        return torch.cat([table[:, :1], last(cells).flatten(1, 2)], 1)

    square = randn(1, 1 + 36, 4, dtype=torch.float32)
    close(layer.adapt("table", square), want(square, (6, 6)), 1e-6)
    close(layer.adapt("table", square, published=(4, 9)), want(square, (4, 9)), 1e-6)
    close(layer.adapt("table", square, published=(4, 8)), want(square, (6, 6)), 1e-6)
    wide = randn(1, 1 + 12, 4, dtype=torch.float32)  # no square: the proportions of the grid, 3 x 4
    close(layer.adapt("table", wide), want(wide, (3, 4)), 1e-6)
    for wrong in (torch.zeros(1, 14, 4), torch.zeros(1, 37, 5), torch.zeros(37, 4), torch.zeros(1, 1, 4)):
        assert layer.adapt("table", wrong) is None
    half = layer.adapt("table", square.half())
    assert half.dtype == torch.float16


@pytest.mark.parametrize("sides", [(5,), (3, 4), (2, 3, 4)])
def test_sincos(sides):
    ndim, width = len(sides), 3
    table = sincos(sides, 2 * ndim * width, 100.0)
    for n, cell in enumerate(itertools.product(*map(range, sides))):
        row = []
        for place in cell:
            angles = [place / 100.0 ** (j / width) for j in range(width)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        close(table[n], torch.tensor(row), 1e-6)
    with pytest.raises(ValueError, match=f"divisible by {2 * ndim}, got {2 * ndim * width + 1}"):
        sincos(sides, 2 * ndim * width + 1)


def test_sincos_is_mocos():
    """The lines of MoCo v3's build_2d_sincos_position_embedding."""
    grid_w, grid_h = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    omega = 1.0 / (10000.0 ** (torch.arange(4, dtype=torch.float32) / 4))
    w, h = (torch.einsum("m,d->md", g.flatten(), omega) for g in (grid_w, grid_h))
    close(sincos((5, 5), 16), torch.cat([w.sin(), w.cos(), h.sin(), h.cos()], 1), 1e-6)


def test_built_grid():
    assert built_grid(224, 2, 16) == (14, 14)
    assert built_grid((225, 30), 2, 16) == (15, 2)
    with pytest.raises(ValueError, match="img_size"):
        built_grid((224, 224), 3, 16)


# --- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", RANKS)
def test_patch_embed(ndim):
    x = randn(2, *(9, 10, 8)[:ndim], 3)
    whole = tuple(s // 4 for s in x.shape[1:-1])
    embed = PatchEmbed(ndim, 3, 5, 4).double()
    y = embed(x)
    assert y.shape == (2, *whole, 5)  # ViT's patches, a ragged end cut off
    for cell in itertools.product(*map(range, whole)):
        patch = x[:, *(slice(4 * c, 4 * c + 4) for c in cell)]
        close(y[:, *cell], first(patch).flatten(1) @ embed.proj.weight.flatten(1).T + embed.proj.bias)
    padded = PatchEmbed(ndim, 3, 5, 4, pad=True).double()
    padded.load_state_dict(embed.state_dict())
    z = padded(x)
    assert z.shape == (2, *(-(-s // 4) for s in x.shape[1:-1]), 5)
    close(z[:, *(slice(0, s) for s in whole)], y)  # sums may be taken in another order


def test_overlapping_patches_with_a_norm():
    embed = PatchEmbed(2, 3, 6, 7, 4, nn.LayerNorm(6)).double()
    x = randn(2, 17, 20, 3)
    want = last(F.conv2d(first(x), embed.proj.weight, embed.proj.bias, 4, 3))
    close(embed(x), F.layer_norm(want, (6,)))


@pytest.mark.parametrize("ndim", RANKS)
def test_cross_scale(ndim):
    layer = CrossScale(ndim, 3, 32, (4, 8, 16, 32), 4).double()
    assert [c.weight.shape[0] for c in layer.convs] == [16, 8, 4, 4]
    assert [c.padding[0] for c in layer.convs] == [0, 2, 6, 14]
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    x = randn(1, *(8, 12, 8)[:ndim], 3)
    parts = [conv(first(x), c.weight, c.bias, 4, p) for c, p in zip(layer.convs, (0, 2, 6, 14))]
    close(layer(x), last(torch.cat(parts, 1)), 1e-10)
    assert [c.weight.shape[0] for c in CrossScale(ndim, 3, 32, (2, 4), 2).convs] == [16, 16]
    assert [c.weight.shape[0] for c in CrossScale(ndim, 3, 32, (4,), 4).convs] == [32]


def test_cross_scale_refuses_channels_that_it_cannot_share_out():
    with pytest.raises(ValueError, match=r"12 channels .* 4 kernels"):
        CrossScale(2, 3, 12, (4, 8, 16, 32), 4)


@pytest.mark.parametrize("ndim", RANKS)
def test_patch_merging(ndim):
    layer = PatchMerging(ndim, 3, 7).double()
    nn.init.normal_(layer.norm.weight), nn.init.normal_(layer.norm.bias)
    x = randn(2, *(5, 6, 4)[:ndim], 3)
    even = F.pad(x, [0, 0] * ndim + [0, 1])  # the first side is odd
    cells = []
    for offset in itertools.product((0, 1), repeat=ndim):
        cells.append(even[:, *(slice(o, None, 2) for o in offset[::-1])])
    close(layer(x), layer.reduction(layer.norm(torch.cat(cells, -1))))


# --- small blocks ---------------------------------------------------------------------------------------------------


def test_mlp():
    layer = Mlp(6, 10, 4).double()
    x = randn(2, 3, 5, 6)
    want = F.gelu(x @ layer.fc1.weight.T + layer.fc1.bias) @ layer.fc2.weight.T + layer.fc2.bias
    close(layer(x), want)
    assert Mlp(6, 10).fc2.out_features == 6
    middle = Mlp(6, 10, act=nn.ReLU, middle=Conv(2, 10, 10, 3, groups=10)).double()
    close(middle(x), middle.fc2(F.relu(middle.middle(middle.fc1(x)))))


def test_drop_path():
    x = randn(4000, 2, 3) + 5
    layer = DropPath(0.3)
    torch.manual_seed(0)
    y = layer(x)
    kept = y[:, 0, 0] != 0
    close(y, torch.where(kept[:, None, None], x / 0.7, 0 * x))  # a sample as a whole, rescaled
    assert abs(kept.double().mean().item() - 0.7) < 4 * math.sqrt(0.21 / 4000)
    assert layer.eval()(x) is x
    assert DropPath(0.0)(x) is x
    assert torch.equal(DropPath(1.0)(x), torch.zeros_like(x))


def test_drop_path_gradient_reaches_kept_samples_only():
    x = randn(50, 4).requires_grad_()
    torch.manual_seed(1)
    y = DropPath(0.5)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.where(y.detach() != 0, 2.0, 0.0).double())
    assert 0 < (gradient[:, 0] == 0).sum() < 50


def test_drop_path_rates():
    rates = drop_path_rates(0.3, (1, 2, 3))
    assert [len(r) for r in rates] == [1, 2, 3]
    assert [v for r in rates for v in r] == pytest.approx(torch.linspace(0, 0.3, 6).tolist(), abs=1e-7)
    assert drop_path_rates(0.3, (1,)) == [[0.0]]
    assert drop_path_rates(0.4, (0, 2, 0)) == [[], [0.0, 0.4], []]


def test_layer_scale():
    stored = LayerScale(3, 0.25, (1, 3, 1, 1))
    assert stored.gamma.shape == (1, 3, 1, 1) and torch.equal(stored(torch.ones(2, 5, 3)), torch.full((2, 5, 3), 0.25))
    layer = LayerScale(3, 0.25)
    assert layer.gamma.tolist() == [0.25] * 3
    x = randn(2, 4, 5, 3)
    layer.gamma.data = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    close(layer(x), x * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert layer.no_decay == ("gamma",)


def test_block_adds_each_branch_to_what_came_before():
    attn, mlp, position = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
    block, x = Block(6, attn, mlp, eps=1e-2, scale=0.3, position=position), randn(2, 3, 4, 6, dtype=torch.float32)
    with torch.no_grad():
        block.norm2.weight.mul_(2)
        block.scale2.gamma.fill_(0.7)
    y = position(x)
    y = y + 0.3 * attn(F.layer_norm(y, (6,), eps=1e-2))
    y = y + 0.7 * mlp(2 * F.layer_norm(y, (6,), eps=1e-2))
    torch.testing.assert_close(block(x), y)
    plain = Block(6, attn, mlp)
    assert not isinstance(plain.scale1, LayerScale) and plain.norm1.eps == 1e-5


def test_block_drops_both_branches_in_training():
    block, x = Block(4, nn.Linear(4, 4), nn.Linear(4, 4), drop_path=1 - 1e-9), randn(3, 5, 4, dtype=torch.float32)
    torch.testing.assert_close(block.train()(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_token_block_passes_the_grid_on():
    block = TokenBlock(4, nn.Linear(4, 4), nn.Linear(4, 4))
    plain, x = Block(4, block.attn, block.mlp), randn(2, 7, 4, dtype=torch.float32)
    y, grid = block((x, (2, 3)))
    torch.testing.assert_close(y, plain(x))
    assert grid == (2, 3)


@pytest.mark.parametrize("ndim", RANKS)
def test_residual_conv(ndim):
    layer, x = ResidualConv(ndim, 3), randn(2, *(5, 6, 7)[:ndim], 3, dtype=torch.float32)
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    y = call(x.movedim(-1, 1), layer.conv.weight, layer.conv.bias, padding=1, groups=3).movedim(1, -1)
    torch.testing.assert_close(layer(x), x + y)


@pytest.mark.parametrize("ndim", RANKS)
def test_squeeze_excite(ndim):
    layer = SqueezeExcite(ndim, 8, 2).double()
    x = randn(2, *SIDES[ndim], 8)
    mean = x.flatten(1, -2).mean(1)
    gate = F.relu(mean @ layer.down.weight.flatten(1).T + layer.down.bias) @ layer.up.weight.flatten(1).T
    gate = torch.sigmoid(gate + layer.up.bias).reshape(2, *(1,) * ndim, 8)
    close(layer(x), x * gate)


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(
    ("stride", "out", "expansion", "squeeze"), [(1, 4, 6, 2), (2, 4, 6, 0), (1, 6, 2, 0), (1, 4, 1, 0)]
)
def test_inverted_residual(ndim, stride, out, expansion, squeeze):
    layer = InvertedResidual(ndim, 4, out, 3, stride, expansion, squeeze=squeeze).double().eval()
    scatter(layer)
    x = randn(2, *SIDES[ndim], 4)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]

    def convnorm(part, x, **options):
        n = part.norm
        y = conv(x, part.conv.weight, None, **options)
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)

    y = first(x)
    if expansion != 1:
        y = F.relu6(convnorm(layer.expand, y))
    y = F.relu6(convnorm(layer.depthwise, y, stride=stride, padding=1, groups=4 * expansion))
    if squeeze:
        y = first(layer.squeeze(last(y)))
    y = last(convnorm(layer.project, y))
    close(layer(x), x + y if stride == 1 and out == 4 else y)


# --- fusing ---------------------------------------------------------------------------------------------------------


def scatter(module):
    """Random statistics and weights for every batch norm."""
    for i, norm in enumerate(m for m in module.modules() if isinstance(m, BatchNorm)):
        g = torch.Generator().manual_seed(i)
        nn.init.normal_(norm.running_mean, generator=g), nn.init.uniform_(norm.running_var, 0.2, 3, generator=g)
        nn.init.uniform_(norm.weight, -2, 2, generator=g), nn.init.normal_(norm.bias, generator=g)


def relative_error(a, b):
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(
    "options",
    [dict(kernel=3), dict(kernel=3, stride=2, groups=4), dict(kernel=3, dilation=2, bias=True), dict(act=nn.GELU)],
    ids=str,
)
def test_conv_norm_fuses(ndim, options):
    layer = ConvNorm(ndim, 8, 12, eps=1e-3, keep=False, **options).eval()
    scatter(layer)
    x = randn(2, *SIDES[ndim], 8, dtype=torch.float32)
    want = copy.deepcopy(layer)(x)
    fused = layer.fuse()
    assert isinstance(fused.norm, nn.Identity)
    assert relative_error(fused(x), want) < 1e-5
    assert fused.fuse() is fused
    assert relative_error(fused(x), want) < 1e-5
    exact = ConvNorm(ndim, 8, 12, eps=1e-3, keep=False, **options).eval().double()
    scatter(exact)
    want = exact(x.double())
    assert relative_error(exact.fuse()(x.double()), want) < 1e-13


def test_conv_norm_that_is_to_stay():
    layer = ConvNorm(2, 8, 8, 3).eval()
    scatter(layer)
    assert layer.fuse() is layer
    assert isinstance(layer.norm, BatchNorm)
    assert isinstance(layer.fuse(published=False).norm, nn.Identity)


@pytest.mark.parametrize("ndim", RANKS)
@pytest.mark.parametrize(
    ("kernels", "stride", "groups", "identity"),
    [
        ({"large": 3, "small": 1}, 1, 1, True),
        ({"large": 3, "small": 1}, 2, 1, False),
        ({"large": 7, "small": 3}, 1, 8, False),
        ({"large": 5, "small": 3, "point": 1}, 1, 4, True),
        ({"only": 1}, 1, 8, True),
    ],
    ids=str,
)
def test_branches_fuse(ndim, kernels, stride, groups, identity):
    layer = Branches(ndim, 8, 8, kernels, stride, groups, identity, eps=1e-3).eval()
    scatter(layer)
    x = randn(2, *SIDES[ndim], 8, dtype=torch.float32)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    norms = [] if layer.identity is None else [(first(x), layer.identity)]
    for name, k in kernels.items():
        branch = getattr(layer, name)
        norms.append((conv(first(x), branch.conv.weight, None, stride, k // 2, 1, groups), branch.norm))
    want = sum(F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps) for y, n in norms)
    close(layer(x), last(want), 1e-5)
    fused = layer.fuse()
    assert type(fused) is Conv
    assert fused.weight.shape[2:] == (next(iter(kernels.values())),) * ndim
    assert relative_error(fused(x), layer(x)) < 1e-5
    exact = layer.double()
    assert relative_error(exact.fuse()(x.double()), exact(x.double())) < 1e-13


@pytest.mark.parametrize("ndim", RANKS)
def test_dilated_branches_fuse(ndim):
    kernels = {"origin": 7, "near": (5, 1), "wide": (3, 2), "widest": (3, 3)}
    layer = Branches(ndim, 4, 4, kernels, groups=4)
    for norm in [m for m in layer.modules() if isinstance(m, BatchNorm)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
    x = randn(2, *(11, 9, 8)[:ndim], 4, dtype=torch.float32)
    with torch.no_grad():
        before, fused = layer.eval()(x), layer.fuse()
        assert isinstance(fused, Conv) and fused.kernel == (7,) * ndim
        torch.testing.assert_close(fused(x), before, rtol=1e-5, atol=1e-5)


def test_branches_train_every_branch():
    layer = Branches(2, 4, 4, {"large": 3, "small": 1}, identity=True).double()
    layer(randn(2, 5, 5, 4)).pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert layer.identity.num_batches_tracked == 1


def test_identity_branch_needs_equal_shapes():
    with pytest.raises(ValueError, match="equal channels and stride 1, got 4 -> 8, stride 1"):
        Branches(2, 4, 8, {"large": 3}, identity=True)
    with pytest.raises(ValueError, match="got 4 -> 4, stride 2"):
        Branches(2, 4, 4, {"large": 3}, 2, identity=True)


def test_next_block_has_one_residual():
    mixer, norm, mlp = nn.Linear(5, 5), nn.LayerNorm(5), nn.Linear(5, 5)
    block, x = NextBlock(5, mixer, norm, mlp, scale=0.25), randn(2, 3, 5, dtype=torch.float32)
    torch.testing.assert_close(block(x), x + 0.25 * mlp(norm(mixer(x))))
    assert not isinstance(NextBlock(5, mixer, norm, mlp).scale, LayerScale)


@pytest.mark.parametrize(("value", "rounded"), [(3, 8), (8.8, 8), (12, 16), (33, 32), (35, 32), (36, 40)])
def test_make_divisible(value, rounded):
    assert make_divisible(value) == rounded


def test_make_divisible_never_takes_away_a_tenth():
    assert make_divisible(10) == 16  # 8 would be 0.8 of it


def test_channel_shuffle_deals_groups_out():
    x = torch.arange(12.0).reshape(1, 12)
    assert channel_shuffle(x, 3)[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    assert torch.equal(channel_shuffle(channel_shuffle(x, 3), 4), x)


def test_conv_norm_with_the_activation_first_cannot_be_folded():
    layer, x = ConvNorm(2, 3, 4, 3, act=nn.GELU, act_first=True), randn(2, 5, 6, 3, dtype=torch.float32)
    layer.norm.running_mean.uniform_(-1, 1), layer.norm.running_var.uniform_(0.5, 2)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.norm(F.gelu(layer.conv(x))))
    assert layer.fuse(published=False) is layer and isinstance(layer.norm, BatchNorm)
