"""EdgeViTs: sparse attention and its spreading written out, the block's two halves, and published configurations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import fill

import vertebra
from vertebra.mixers import GlobalAttention, SparseGlobalAttention

SMALL = dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 1), heads=(1, 2, 2, 4))


def small(**options):
    torch.manual_seed(0)
    return fill(vertebra.create_model("edgevit_xxs", **(SMALL | dict(num_classes=7) | options)))


def reference(mixer, x):
    """Sample, attend head by head, paint each cube, norm, project: one cell at a time, any rank."""
    *sides, dim = x.shape[1:]
    r, width = mixer.ratio, dim // mixer.heads
    picked = [p for p in itertools.product(*(range(s) for s in sides)) if all(c % r == 0 for c in p)]
    tokens = torch.stack([x[(slice(None), *p)] for p in picked], 1)
    q, k, v = mixer.qkv(tokens).split(dim, -1)
    heads = []
    for h in range(mixer.heads):
        part = slice(h * width, (h + 1) * width)
        weights = (q[..., part] @ k[..., part].mT / width**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    tokens = torch.cat(heads, -1)
    out = torch.empty_like(x)
    for cell in itertools.product(*(range(s) for s in sides)):
        home = picked.index(tuple(c // r * r for c in cell))
        value = tokens[:, home]
        if r > 1:
            place = mixer.spread.weight[(slice(None), 0, *(c % r for c in cell))]
            value = F.layer_norm(value * place + mixer.spread.bias, (dim,), mixer.norm.weight, mixer.norm.bias, 1e-5)
        out[(slice(None), *cell)] = value
    return mixer.proj(out)


@pytest.mark.parametrize("sides", [(11,), (6, 9), (8, 4), (3, 5, 4)])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_attention_among_the_first_cells_of_cubes(sides, ratio):
    torch.manual_seed(0)
    mixer = fill(SparseGlobalAttention(len(sides), 12, 3, ratio))
    x = torch.randn(2, *sides, 12)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(mixer, x), atol=1e-5, rtol=1e-5)


def test_spreading_is_a_depthwise_transposed_convolution():
    torch.manual_seed(0)
    spread = fill(SparseGlobalAttention(2, 6, 2, 3)).spread
    x = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        theirs = F.conv_transpose2d(x.movedim(-1, 1), spread.weight, spread.bias, stride=3, groups=6)
        torch.testing.assert_close(spread(x), theirs.movedim(1, -1))


def test_what_is_not_sampled_has_no_say():
    torch.manual_seed(0)
    mixer = fill(SparseGlobalAttention(2, 8, 2, 4))
    x = torch.randn(1, 8, 8, 8)
    noisy = x + torch.randn_like(x)
    noisy[:, ::4, ::4] = x[:, ::4, ::4]
    with torch.no_grad():
        assert torch.equal(mixer(noisy), mixer(x))
        noisy[:, 4, 4] += 1
        assert not torch.allclose(mixer(noisy)[:, 0, 0], mixer(x)[:, 0, 0])


def test_ratio_one_is_plain_attention():
    mixer, plain = SparseGlobalAttention(2, 8, 2), GlobalAttention(8, 2)
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 5, 3, 8)
    assert torch.equal(mixer(x), plain(x))


def test_a_ratio_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SparseGlobalAttention(2, 8, 2, 0)


def norm(x, state, name, batch=False):
    """The layer norm (eps 1e-6) or evaluated batch norm `name` on (B, C, H, W)."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    if batch:
        return F.batch_norm(x, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias, eps=1e-5)
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, 1e-6).movedim(-1, 1)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_block_from_its_official_weights(stage):
    """Channels first, every step by official name; the last stage has no local half."""
    model = small()
    block = model.stages[stage].blocks[0]
    prefix = f"blocks{stage + 1}.0."
    with torch.no_grad():
        for name, buffer in block.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
        state = {k.removeprefix(prefix): v for k, v in vertebra.to_official(model).items() if k.startswith(prefix)}
        dim = SMALL["dims"][stage]

        def conv(x, name, groups=1):
            weight = state[f"{name}.weight"]
            return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=groups)

        x = y = torch.randn(2, dim, 6, 5)
        if stage < 3:
            y = y + conv(y, "LocalAgg.pos_embed", dim)
            z = conv(norm(y, state, "LocalAgg.norm1", batch=True), "LocalAgg.conv1")
            y = y + conv(conv(z, "LocalAgg.attn", dim), "LocalAgg.conv2")  # no activation in between
            z = conv(norm(y, state, "LocalAgg.norm2", batch=True), "LocalAgg.mlp.fc1")
            y = y + conv(F.gelu(z), "LocalAgg.mlp.fc2")
        else:
            assert not any(k.startswith("LocalAgg") for k in state)
        y = y + conv(y, "SelfAttn.pos_embed", dim)
        z = norm(y, state, "SelfAttn.norm1").movedim(1, -1)
        y = y + reference(block.sparse.attn, z).movedim(-1, 1)
        z = norm(y, state, "SelfAttn.norm2").movedim(1, -1)
        z = F.linear(z, state["SelfAttn.mlp.fc1.weight"], state["SelfAttn.mlp.fc1.bias"])
        z = F.linear(F.gelu(z), state["SelfAttn.mlp.fc2.weight"], state["SelfAttn.mlp.fc2.bias"])
        y = y + z.movedim(-1, 1)
        torch.testing.assert_close(block(x.movedim(1, -1)).movedim(-1, 1), y, atol=1e-5, rtol=1e-5)


def test_eps_of_norms_and_the_last_norm():
    model = small()
    block = model.stages[0].blocks[0]
    assert [block.sparse.norm1.eps, block.sparse.norm2.eps, block.sparse.attn.norm.eps] == [1e-6, 1e-6, 1e-5]
    assert [block.local.norm1.eps, block.local.norm2.eps] == [1e-5] * 2
    assert [model.patch_embed.norm.eps, model.stages[1].down.norm.eps, model.norm.eps] == [1e-5] * 3
    # the last norm keeps channel statistics of training: it does not centre a single cell
    with torch.no_grad():
        model.norm.running_mean.fill_(2.0)
        x = torch.randn(1, 3, 32, 32)
        last = model.forward_intermediates(x, 1)[0]
        scale, shift = (t[:, None, None] for t in (model.norm.weight / (1 + 1e-5) ** 0.5, model.norm.bias))
        torch.testing.assert_close(model.forward_features(x), (last - 2.0) * scale + shift)


def test_both_halves_of_a_block_drop_at_the_same_rate():
    model = small(drop_path_rate=0.4)
    rates = [(b.local, b.sparse) for s in model.stages for b in s.blocks]
    assert [round(half[1].drop_path.rate, 3) for half in rates] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert [half[0].drop_path.rate for half in rates[:4]] == [half[1].drop_path.rate for half in rates[:4]]


def test_dense_version_gives_raw_maps():
    model, dense = small(), small(features_only=True)
    vertebra.load_checkpoint(dense, vertebra.to_official(model))
    x = torch.randn(1, 3, 75, 50)
    with torch.no_grad():
        maps = dense(x)
        assert [tuple(m.shape[1:]) for m in maps] == [(16, 18, 12), (24, 9, 6), (32, 4, 3), (48, 2, 1)]
        torch.testing.assert_close(maps[-1], model.forward_intermediates(x, 1)[0])


def test_one_axis_is_two_of_height_one_inside_a_stage():
    """A line equals a map of height one where the kernels' middle row is the line's kernel."""
    line, flat = (fill(small(ndim=n).stages[1].blocks[0]) for n in (1, 2))
    with torch.no_grad():
        for (name, p), q in zip(line.named_parameters(), flat.parameters(), strict=True):
            if p.shape == q.shape:
                q.copy_(p)
            else:
                q.zero_()
                q.select(2, 0 if "spread" in name else q.shape[2] // 2).copy_(p)
        x = torch.randn(2, 9, 24)
        torch.testing.assert_close(line(x), flat(x.unsqueeze(1)).squeeze(1), atol=1e-6, rtol=1e-5)


def test_published_configurations():
    with torch.device("meta"):
        models = {n.removeprefix("edgevit_"): vertebra.create_model(n) for n in vertebra.list_models("edgevit_*")}
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}
    assert counts == {"xxs": 4_067_704, "xs": 6_770_056, "s": 13_108_168}
    for name, width in (("xxs", 36), ("xs", 48), ("s", 48)):
        mixers = [b.sparse.attn for s in models[name].stages for b in s.blocks]
        assert {m.qkv.in_features // m.heads for m in mixers} == {width}
        assert [s.blocks[0].sparse.attn.ratio for s in models[name].stages] == [4, 2, 2, 1]
    assert vertebra.model_info("edgevit_s").weights.status == "none"
