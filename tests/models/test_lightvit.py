"""LightViT: a block against an explicit reference at any rank, the dense version's rules, global tokens."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import vertebra

SMALL = dict(dims=(16, 32, 48), depths=(1, 2, 2), heads=(1, 2, 3), tokens=3, neck=40)


def build(ndim=2, **options):
    torch.manual_seed(0)
    model = vertebra.create_model("lightvit_tiny", ndim=ndim, **({"num_classes": 5} | options | SMALL))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + ("norm" in name and name.endswith("weight")))
    return model


def error(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def attention_reference(attn, x, g):
    """One sample, one head and one query at a time: (*S, C), (T, C) normed -> the same."""
    *sides, dim = x.shape
    width, heads, window = dim // attn.heads, attn.heads, attn.window[0]
    zeros, cells = torch.zeros(dim), list(itertools.product(*(range(-(-s // window) * window) for s in sides)))
    inside = [all(i < s for i, s in zip(c, sides, strict=True)) for c in cells]
    qkv = torch.stack([attn.qkv(x[c] if ok else zeros) for c, ok in zip(cells, inside, strict=True)])
    tokens = attn.qkv(g)
    place = torch.tensor(cells)
    home = place // window
    real = torch.tensor(inside)
    out_x, out_g = torch.zeros(len(cells), dim), torch.zeros(len(g), dim)
    table = attn.pos.table
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (qkv[:, i * dim : (i + 1) * dim][:, part] for i in range(3))
        out_g[:, part] = ((tokens[:, :dim][:, part] / math.sqrt(width)) @ k[real].T).softmax(-1) @ v[real]
        for i in range(len(cells)):
            if inside[i]:
                mates = (home == home[i]).all(1)
                row = 0
                for axis in range(len(sides)):
                    row = row * (2 * window - 1) + place[i, axis] - place[mates][:, axis] + window - 1
                weights = (k[mates] @ q[i] / math.sqrt(width) + table[row, h]).softmax(0)
                out_x[i, part] = weights @ v[mates]
    kv = attn.kv_global(out_g)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        k, v = kv[:, :dim][:, part], kv[:, dim:][:, part]
        out_x[:, part] += (qkv[:, :dim][:, part] @ k.T / math.sqrt(width)).softmax(-1) @ v
    return attn.proj(out_x[real]).reshape(x.shape), attn.proj(out_g)


def mlp_reference(mlp, tokens):
    """The published order: one sequence (N, C)."""
    y = mlp.fc2(F.gelu(mlp.fc1(tokens)))
    z = F.layer_norm(y, y.shape[-1:], mlp.attn.norm.weight, mlp.attn.norm.bias, 1e-5)
    mean = F.gelu(mlp.attn.global_reduce(z.mean(0)))
    both = torch.cat([F.gelu(mlp.attn.local_reduce(z)), mean.expand(len(z), -1)], 1)
    return y * mlp.attn.channel_select(mean).sigmoid() * mlp.attn.spatial_select(both).sigmoid()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("sides", [(9,), (7, 7), (9, 8), (3, 1), (2, 8, 3)])
def test_block_against_an_explicit_reference(sides, dense):
    model = build(len(sides), features_only=dense).eval()
    block = model.stages[2].blocks[1]
    assert block.drop_tokens is dense
    x, g = torch.randn(2, *sides, 48), torch.randn(2, 3, 48)
    norm = lambda t, n: F.layer_norm(t, t.shape[-1:], n.weight, n.bias, 1e-6)  # noqa: E731
    with torch.no_grad():
        got_x, got_g = block((x, g))
        for b in range(2):
            dx, dg = attention_reference(block.attn, norm(x[b], block.norm1), norm(g[b], block.norm1))
            image, tokens = (x[b] + dx).flatten(0, -2), g[b] + dg
            if not dense:
                image = torch.cat([tokens, image])
            image = image + mlp_reference(block.mlp, norm(image, block.norm2))
            if not dense:
                assert error(got_g[b], image[:3]) <= 1e-5
                image = image[3:]
            assert error(got_x[b], image.reshape(got_x[b].shape)) <= 1e-5
    assert (got_g is None) is dense


def test_norm_eps_as_published():
    model = vertebra.create_model("lightvit_tiny", **SMALL)
    small = {n for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm) and m.eps == 1e-6}
    blocks = [f"stages.{i}.blocks.{j}" for i, d in enumerate(SMALL["depths"]) for j in range(d)]
    assert small == {"norm"} | {f"{b}.norm{k}" for b in blocks for k in (1, 2)}


def test_merging_pads_with_zeros_before_the_maximum():
    down = build().stages[1].down
    x, g = -1 - torch.rand(1, 3, 5, 16), torch.randn(1, 3, 16)
    padded = F.pad(x, (0, 0, 0, 1, 0, 1))
    cells = torch.cat([padded[:, 0::2, 0::2], padded[:, 1::2, 0::2], padded[:, 0::2, 1::2], padded[:, 1::2, 1::2]], -1)
    peak = torch.stack(cells.chunk(4, -1)).amax(0)
    assert peak[:, -1].eq(0).all()
    with torch.no_grad():
        got, tokens = down((x, g))
        assert got.shape == (1, 2, 3, 32)
        assert error(got, down.reduction(down.norm(cells)) + down.res_proj(peak)) <= 1e-6
        assert torch.equal(tokens, down.proj(down.norm2(g)))


def test_head_reads_image_and_global_tokens_alike():
    model = build().eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        image, tokens = model.forward_features(x)
        assert image.shape == (2, 48, 2, 3) and tokens.shape == (2, 3, 48)
        rows = torch.cat([tokens, image.flatten(2).transpose(1, 2)], 1)
        assert error(model.head(model.neck(rows).mean(1)), model(x)) <= 1e-6
        model.global_token.normal_()
        assert error(model(x), model.forward_head((image, tokens))) > 1e-3


@pytest.mark.parametrize(("ndim", "sides"), [(1, (75,)), (2, (41, 64)), (3, (33, 32, 40))])
def test_ranks_train_at_odd_sizes(ndim, sides):
    model = build(ndim, in_chans=2).train()
    model(torch.randn(2, 2, *sides)).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    maps = model.eval().forward_intermediates(torch.randn(1, 2, *sides))
    for m, stride in zip(maps, (8, 16, 32), strict=True):
        assert m.shape[2:] == tuple(-(-s // stride) for s in sides)
    with pytest.raises(ValueError, match="too small"):
        model(torch.randn(1, 2, *(31,) * ndim))


def test_dense_version_differs_in_the_last_block_alone():
    model, dense = build().eval(), build(features_only=True).eval()
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert {k.split(".")[0] for k in report.fresh} == {"norm0", "norm1", "norm2"}
    assert {k.split(".")[0] for k in report.unused} == {"norm", "neck", "head"}
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        dense.output_norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
        first, second, third = (error(a, b) for a, b in zip(dense(x), model.forward_intermediates(x), strict=True))
    assert first == second == 0 and third > 1e-4


def test_drop_path_drops_a_sample_of_map_and_tokens_together():
    block = build(drop_path_rate=0.9).train().stages[2].blocks[1]
    block.mlp = None
    block.norm2 = torch.nn.Identity()
    x, g = torch.randn(64, 2, 2, 48), torch.randn(64, 3, 48)
    dx, dg = block.drop_path.together(x, g)
    kept = dx.flatten(1).abs().sum(1) > 0
    assert torch.equal(kept, dg.flatten(1).abs().sum(1) > 0) and 0 < kept.sum() < 32
    assert torch.allclose(dx[kept], x[kept] * 10) and torch.allclose(dg[kept], g[kept] * 10)


def test_checkpointing_and_headless():
    plain = build(drop_path_rate=0.3).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.randn(2, 3, 40, 64)
    grads = []
    for model in (plain, saving):
        torch.manual_seed(1)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max())) for a, b in zip(*grads, strict=True))
    assert build(num_classes=0).eval()(x).shape == (2, 40)


@pytest.mark.parametrize(("name", "count"), [("tiny", 9.378), ("small", 19.200), ("base", 35.196)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        model = vertebra.create_model(f"lightvit_{name}")
    measured = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(measured - count) <= 0.0006
    assert abs(measured - vertebra.model_info(f"lightvit_{name}").published["params_m"]) <= 0.05
