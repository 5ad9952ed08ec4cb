"""Dual-ViT: semantic tokens, both kinds of block and the head written out, the dense version, other ranks."""

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.models.dual_vit import FAMILY, DualAttention, MergeBlock, SemanticTokens

NAME = "dualvit_s"
SMALL = dict(stem=8, dims=(16, 32, 48, 64), heads=(1, 2, 2, 4), depths=(1, 1, 2, 2), num_classes=7)


def small(**options):
    return vertebra.create_model(NAME, **(SMALL | options)).eval()


def heads_of(q, k, v, heads):
    """Softmax attention a head at a time, (B, L, C)."""
    read = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        read.append((a @ b.mT * a.shape[-1] ** -0.5).softmax(-1) @ c)
    return torch.cat(read, -1)


def normed(norm, x):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


@pytest.mark.parametrize("sides", [(56, 56), (64, 48), (30, 71)])
@pytest.mark.parametrize("dense", [False, True])
def test_semantic_tokens_as_the_equations_say(sides, dense):
    tokens, x = fill(SemanticTokens(2, 12, dense)), torch.randn(2, *sides, 12)
    pooled = F.avg_pool2d(x.movedim(-1, 1), 7)
    grid = pooled.shape[2:]
    assert tuple(grid) == (sides[0] // 7, sides[1] // 7)
    queries = F.interpolate(tokens.q.T.reshape(1, 12, 8, 8), size=grid, mode="bicubic", align_corners=False)
    q = tokens.q_embed[1](normed(tokens.q_embed[0], queries.flatten(2).mT))
    cells = pooled.flatten(2).mT
    kv = tokens.kv(cells)
    gathered = (q @ kv[..., :12].mT * 12**-0.5).softmax(-1) @ kv[..., 12:]
    mean = (gathered + cells).mean(1)
    gate = tokens.se[2](F.relu(tokens.se[0](mean))).reshape(2, 2, 12).softmax(1)
    expected = normed(tokens.proxy_ln, gathered * gate[:, None, 0] + cells * gate[:, None, 1])
    torch.testing.assert_close(tokens(x), expected, rtol=1e-4, atol=1e-5)


def test_classification_counts_tokens_where_the_dense_version_looks_at_the_grid():
    plain, dense = (fill(SemanticTokens(2, 12, flag)) for flag in (False, True))
    dense.load_state_dict(plain.state_dict())
    assert torch.equal(plain.queries((8, 8))[0], plain.q) and torch.equal(dense.queries((8, 8))[0], plain.q)
    assert torch.equal(plain.queries((4, 16))[0], plain.q)
    assert error(dense.queries((4, 16))[0], plain.q) > 0.1
    torch.testing.assert_close(plain.queries((5, 9)), dense.queries((5, 9)))


@pytest.mark.parametrize("sides", [(11,), (3, 5), (2, 3, 4)])
def test_dual_attention_as_the_equations_say(sides):
    attn = fill(DualAttention(16, 2, 0.0))
    x, s = torch.randn(2, *sides, 16), torch.randn(2, 5, 16)
    pixels, t = x.flatten(1, -2), s
    q, k, v = attn.qkv_proxy[1](normed(attn.qkv_proxy[0], t)).chunk(3, -1)
    t = t + attn.scale1.gamma * heads_of(q, k, v, 2)
    q = attn.q_proxy(normed(attn.q_proxy_ln, t))
    t = t + attn.scale2.gamma * heads_of(q, *attn.kv_proxy(pixels).chunk(2, -1), 2)
    t = t + attn.scale3.gamma * attn.mlp_proxy[2](F.relu(attn.mlp_proxy[0](normed(attn.p_ln, t))))
    read = heads_of(attn.q(pixels), *attn.kv(normed(attn.proxy_ln, t)).chunk(2, -1), 2)
    y, out = attn(x, s)
    torch.testing.assert_close(out, t, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, attn.proj(read).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_dual_block():
    block = fill(small()).stages[0].blocks[0]
    x, s = torch.randn(2, 6, 5, 16), torch.randn(2, 4, 16)
    y, t = block.attn(normed(block.norm1, x), s)
    z = x + block.scale1.gamma * y
    h = block.mlp.fc1(normed(block.norm2, z)).movedim(-1, 1)
    h = F.conv2d(h, block.mlp.middle.weight, block.mlp.middle.bias, padding=1, groups=128).movedim(1, -1)
    z = z + block.scale2.gamma * block.mlp.fc2(F.gelu(h))
    ours = block((x, s))
    torch.testing.assert_close(ours[0], z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1], t)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dense", [False, True])
def test_merge_block(ndim, dense):
    block = fill(small(ndim=ndim, features_only=dense)).stages[3].blocks[1]
    assert isinstance(block, MergeBlock)
    x, s = torch.randn(2, *(5, 3, 4)[:ndim], 64), torch.randn(2, 6, 64)
    count = x[0, ..., 0].numel()
    tokens = torch.cat([x.flatten(1, -2), s], 1)
    y = normed(block.norm1, tokens)
    y = block.attn.proj(heads_of(block.attn.q(y), *block.attn.kv(y).chunk(2, -1), 4))
    tokens = tokens + block.scale1.gamma * y
    y = normed(block.norm2, tokens)
    z = block.mlp.fc1(y[:, :count]).reshape(*x.shape[:-1], -1).movedim(-1, 1)
    conv = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    z = conv(z, block.mlp.middle.weight, block.mlp.middle.bias, padding=1, groups=z.shape[1])
    z = x.new_tensor(0) + block.scale2.gamma * block.mlp.fc2(F.gelu(z.flatten(2).mT))
    ours = block((x, s))
    torch.testing.assert_close(ours[0].flatten(1, -2), tokens[:, :count] + z, rtol=1e-4, atol=1e-5)
    if dense:
        assert ours[1] is None and block.fc_proxy is None
    else:
        w = block.fc_proxy[2](F.gelu(block.fc_proxy[0](y[:, count:])))
        torch.testing.assert_close(ours[1], tokens[:, count:] + block.scale2.gamma * w, rtol=1e-4, atol=1e-5)


def test_class_token_reads_all_tokens():
    neck, tokens = fill(small()).neck, torch.randn(2, 9, 64)
    cls = tokens.mean(1, keepdim=True)
    y = normed(neck.norm1, torch.cat([cls, tokens], 1))
    cls = cls + neck.attn.proj(heads_of(neck.attn.q(y[:, :1]), *neck.attn.kv(y).chunk(2, -1), 4))
    cls = cls + neck.mlp.fc2(F.gelu(neck.mlp.fc1(normed(neck.norm2, cls))))
    torch.testing.assert_close(neck(tokens), cls, rtol=1e-4, atol=1e-5)
    assert neck.mlp.fc1.out_features == 128


def test_logits_are_the_class_tokens_and_half_of_the_best_image_tokens():
    model, x = fill(small()), torch.randn(2, 3, 64, 90)
    with torch.no_grad():
        features, cls = model.forward_features(x)
        outputs = model.forward_outputs(x)
        assert features.shape == (2, 64, 2, 3) and cls.shape == (2, 64)
        aux = model.aux_head(features.flatten(2).mT)
        torch.testing.assert_close(outputs["aux_logits"], aux)
        torch.testing.assert_close(outputs["class_logits"], model.head(cls))
        torch.testing.assert_close(model(x), model.head(cls) + 0.5 * aux.max(1).values)
        torch.testing.assert_close(features, model.forward_intermediates(x, 1)[0])
        state = vertebra.to_official(model)
        alone = small(token_label=False, checkpoint={k: v for k, v in state.items() if "aux" not in k})
        assert set(vertebra.to_official(alone)) == {k for k in state if not k.startswith("aux_head")}
        torch.testing.assert_close(alone(x), outputs["class_logits"])
        assert set(alone.forward_outputs(x)) == {"logits"}
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.forward_outputs(x)["aux_logits"].shape == (2, 6, 3)
    alone.reset_classifier(3)
    assert not hasattr(alone, "aux_head")


def test_dense_version_gives_the_normed_maps_of_the_classification_network():
    model = fill(small())
    dense = small(features_only=True, checkpoint=vertebra.to_official(model))
    assert not dense.load_report.fresh
    gone = {k for k in vertebra.to_official(model) if k.startswith(("post_network", "head", "aux_head"))}
    gone |= {k for k in vertebra.to_official(model) if k.startswith("block4.1.mlp.fc_proxy")}
    assert {k for k in dense.load_report.unused if not k.endswith("num_batches_tracked")} == gone
    x = torch.randn(1, 3, 75, 97)
    with torch.no_grad():
        for ours, theirs in zip(dense(x), model.forward_intermediates(x), strict=True):
            assert error(ours, theirs) <= 1e-6


def test_semantic_tokens_keep_their_number_and_change_their_width():
    model = small()
    state, seen = model._embed(torch.randn(1, 3, 64, 96)), []
    for stage in model.stages:
        state = stage(state)
        seen.append(tuple(state[1].shape))
    assert seen == [(1, 6, 16), (1, 6, 32), (1, 6, 48), (1, 6, 64)]  # 16 x 24 cells of stride 4, 2 x 3 of 7 x 7


def test_one_dimension_equals_two_where_all_rows_are_equal():
    """Of the dual stages: in the merge stages tokens come more often than cells, which attention does notice."""
    line, plane = fill(small(ndim=1)), small()
    state = {}
    for key, want in plane.state_dict().items():
        tensor = line.state_dict()[key]
        if key == "semantics.q":
            tensor = tensor.repeat(8, 1)
        elif want.shape != tensor.shape:
            wide = torch.zeros_like(want)
            wide[:, :, want.shape[2] // 2] = tensor
            tensor = wide
        state[key] = tensor
    plane.load_state_dict(state)
    with torch.no_grad():
        for length in (224, 150):
            x = torch.randn(1, 3, length)
            two = plane.forward_intermediates(x.unsqueeze(2).expand(-1, -1, 90, -1), [0, 1])
            for one, other in zip(line.forward_intermediates(x, [0, 1]), two, strict=True):
                assert error(one.unsqueeze(2).expand_as(other), other) <= 1e-5


def test_a_volume_gives_maps_at_every_stride():
    model = small(ndim=3)
    maps = model.forward_intermediates(torch.randn(1, 3, 32, 41, 35))
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 11, 9), (4, 6, 5), (2, 3, 3), (1, 2, 2)]


def test_eps_and_activations():
    for key, module in small().named_modules():
        if isinstance(module, nn.LayerNorm):
            loose = ("patch_embed", "semantics.", ".down.", ".attn.")
            assert module.eps == (1e-5 if any(part in key for part in loose) else 1e-6), key
        if isinstance(module, nn.ReLU | nn.GELU):
            relu = key.startswith("patch_embed") or ".mlp_proxy." in key or key.startswith("semantics.se")
            assert isinstance(module, nn.ReLU) == relu, key


def test_initialisation():
    model = vertebra.create_model(NAME)
    scales = [p for n, p in model.named_parameters() if n.endswith("gamma")]
    assert len(scales) == 7 * 5 + 9 * 2 and all((p == 1e-6).all() for p in scales)
    assert model.semantics.q.std().item() == pytest.approx(0.02, rel=0.1)
    middle = model.stages[3].blocks[0].mlp.middle
    assert middle.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1) and not middle.bias.any()
    assert "semantics.q" in model.no_weight_decay()


def test_drop_path_grows_over_all_blocks_and_reaches_inside_dual_attention():
    model = small(drop_path_rate=0.5)
    blocks = [b for stage in model.stages for b in stage.blocks]
    assert [b.drop_path.rate for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert [b.attn.drop_path.rate for b in blocks[:2]] == pytest.approx([0, 0.1])


def test_published_configurations():
    for name, heads, ratios in (
        ("dualvit_s", (2, 4, 10, 14), [4, 3, 4, 3, 4, 3]), ("dualvit_l", (3, 6, 12, 16), [4, 3] * 10 + [4]),
    ):  # fmt: skip
        with torch.device("meta"):
            model = vertebra.create_model(name)
        assert [stage.blocks[0].attn.heads for stage in model.stages] == list(heads)
        assert [b.mlp.fc1.out_features / b.mlp.fc1.in_features for b in model.stages[2].blocks] == ratios
        assert {b.mlp.fc1.out_features / b.mlp.fc1.in_features for b in model.stages[3].blocks} == {3}
        assert {b.fc_proxy[0].out_features // b.fc_proxy[0].in_features for b in model.stages[3].blocks} == {2}
    assert {n: v.config["depths"] for n, v in FAMILY.variants.items()} == {
        "dualvit_s": (3, 4, 6, 3), "dualvit_b": (3, 4, 15, 3), "dualvit_l": (3, 6, 21, 3),
    }  # fmt: skip
    for name, count in (("dualvit_s", 25_054_000), ("dualvit_b", 42_627_024)):
        with torch.device("meta"):
            assert sum(p.numel() for p in vertebra.create_model(name).parameters()) == count


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="do not divide"):
        small(heads=(3, 2, 2, 4))
