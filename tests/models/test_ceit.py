"""CeiT: the network written out in plain torch from the official names, at ranks 1, 2 and 3; quirks as numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.models.ceit import FAMILY

NAME = "ceit_tiny_patch16_224"


def small(**options):
    torch.manual_seed(0)
    options = dict(depth=3, dim=24, heads=2, num_classes=7, img_size=64) | options
    model = fill(vertebra.create_model(NAME, **options))
    with torch.no_grad():
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_(std=0.3)
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    return model


def official(w, x, heads, grid, depth):
    """Logits from the official state dict `w` for x (B, C, *S) on its own grid, step by step, channels first."""
    n = x.ndim - 2
    conv, pool = getattr(F, f"conv{n}d"), getattr(F, f"max_pool{n}d")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def batch_norm(x, name):
        statistics = (w[f"{name}.running_mean"], w[f"{name}.running_var"])
        return F.batch_norm(x, *statistics, w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def attention(x, name, last=False):
        out = []
        q, k, v = linear(x, f"{name}.qkv").chunk(3, -1)
        for qh, kh, vh in zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True):
            out.append((qh @ kh.mT / math.sqrt(qh.shape[-1])).softmax(-1) @ vh)
        y = linear(torch.cat(out, -1), f"{name}.proj")
        return y[:, -1:] if last else y

    x = batch_norm(conv(x, w["i2t.backbone.conv.weight"], stride=2, padding=3), "i2t.backbone.bn")
    x = conv(pool(x, 3, 2, 1), w["i2t.proj.weight"], w["i2t.proj.bias"], stride=4)
    assert tuple(x.shape[2:]) == grid
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], 1) + w["pos_embed"]
    classes = []
    for i in range(depth):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn")
        z = norm(x, f"blocks.{i}.norm2")
        y = z[:, 1:].mT.reshape(len(x), -1, *grid)
        for j in (1, 2, 3):
            name = f"blocks.{i}.leff."
            options = dict(padding=1, groups=y.shape[1]) if j == 2 else {}
            y = batch_norm(conv(y, w[f"{name}conv{j}.weight"], w[f"{name}conv{j}.bias"], **options), f"{name}bn{j}")
            y = F.gelu(y) if j < 3 else y
        x = x + torch.cat([z[:, :1], y.flatten(2).mT], 1)
        classes.append(x[:, :1])
    z = torch.cat(classes, 1) + w["pos_layer_embed"]
    o = z[:, -1:] + attention(norm(z, "lca.norm1"), "lca.attn", last=True)
    o = o + linear(F.gelu(linear(norm(o, "lca.norm2"), "lca.feedforward.fc1")), "lca.feedforward.fc2")
    return linear(norm(o, "norm")[:, 0], "head")


@pytest.mark.parametrize(
    ("sides", "grid"),
    [
        ((64, 64), (4, 4)),
        ((32, 80), (2, 5)),
        ((45, 71), (3, 4)),
        ((16, 17), (1, 1)),
        ((90,), (5,)),
        ((16, 33, 48), (1, 2, 3)),
    ],
)
def test_equals_the_steps_written_out(sides, grid):
    model = small(ndim=len(sides), img_size=sides)
    x = torch.randn(2, 3, *sides)
    with torch.no_grad():
        assert model.pos_embed.grid == grid
        assert error(model(x), official(vertebra.to_official(model), x, 2, grid, 3)) <= 1e-5


def test_table_of_another_grid_on_loading_is_bicubic_without_antialias():
    state = vertebra.to_official(small())
    built = small(img_size=(96, 48), checkpoint=None)
    report = vertebra.load_checkpoint(built, {"model": state})
    old = state["pos_embed"]
    want = F.interpolate(old[:, 1:].mT.reshape(1, 24, 4, 4), size=(6, 3), mode="bicubic").flatten(2).mT
    assert report.adapted == ["pos_embed"]
    torch.testing.assert_close(built.pos_embed.table.detach(), torch.cat([old[:, :1], want], 1))


def test_the_class_token_adds_its_own_norm():
    """Its way round the convolutions is the normed token, not nothing."""
    model = small()
    block = model.stages[0].blocks[0]
    tokens = torch.randn(2, 7, 24)
    with torch.no_grad():
        out, grid, classes = block((tokens, (2, 3), ()))
        x = tokens + block.attn(block.norm1(tokens))
        torch.testing.assert_close(out[:, 0], (x + block.norm2(x))[:, 0])
        assert grid == (2, 3) and torch.equal(classes[0], out[:, 0])


def test_the_last_feed_forward_of_the_patches_does_not_matter():
    model, x = small(), torch.randn(2, 3, 48, 64)
    before = model(x)
    first, last = (model.stages[i].blocks[0].mlp[2].norm.bias for i in (1, 2))
    grads = torch.autograd.grad(before.sum(), [first, last])
    assert grads[0].abs().max() > 0 and not grads[1].any()


def test_every_block_reaches_the_head_through_its_class_token():
    model = small()
    classes = torch.randn(2, 3, 24)
    with torch.no_grad():
        before = model.neck(classes)
        assert before.shape == (2, 1, 24)
        for i in range(3):
            changed = classes.clone()
            changed[:, i] = torch.randn(2, 24)
            assert error(model.neck(changed), before) > 1e-3
        swapped = model.neck(classes[:, [1, 0, 2]])  # the table of layers tells the blocks apart
        assert error(swapped, before) > 1e-4


def test_the_head_reads_one_token():
    model, x = small(), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        token = model.forward_features(x)
        assert token.shape == (2, 1, 24)
        assert torch.equal(model(x), model.head(token[:, 0]))
        maps = model.forward_intermediates(x)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 3, 4)] * 3


def test_no_activation_follows_the_stem_and_every_convolution_keeps_its_bias():
    model = small()
    with torch.no_grad():
        assert (model.patch_embed.backbone(torch.randn(1, 32, 32, 3)) < 0).any()
    assert model.patch_embed.backbone.conv.bias is None
    leff = model.stages[0].blocks[0].mlp
    assert all(part.conv.bias is not None and part.norm.eps == 1e-5 for part in leff)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


def test_folding_every_norm_is_asked_for():
    """The paper's code never folds its batch norms."""
    model, x = small(), torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        kept, folded = vertebra.fuse(model), vertebra.fuse(model, published=False)
        assert error(folded(x), model(x)) <= 1e-5
    assert set(kept.state_dict()) == set(model.state_dict())
    assert not any("running_mean" in k for k in folded.state_dict())


def test_fresh_tables():
    model = vertebra.create_model(NAME, depth=2)
    assert not model.neck.table.any() and 0.015 < model.pos_embed.table.std() < 0.025
    assert 0.015 < model.neck.mlp.fc1.weight.std() < 0.025
    assert model.no_weight_decay() == {"cls_token", "pos_embed.table"}


def test_the_dense_version_has_no_layerwise_attention():
    dense = small(depth=4, features_only=True)
    assert dense.out_indices == (0, 1, 2, 3) and not any(k.startswith(("neck", "norm")) for k in dense.state_dict())
    report = vertebra.load_checkpoint(dense, vertebra.to_official(small(depth=4)))
    assert "lca.attn.qkv.weight" in report.unused and "pos_layer_embed" in report.unused and not report.missing


@pytest.mark.parametrize(("ndim", "sides", "grid"), [(1, (35,), (2,)), (3, (16, 17, 40), (1, 1, 2))])
def test_other_ranks_train(ndim, sides, grid):
    model = small(ndim=ndim, img_size=48, drop_path_rate=0.1).train()
    model(torch.randn(2, 3, *sides)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.forward_intermediates(torch.randn(1, 3, *sides), 1)[0].shape == (1, 24, *grid)


def test_published_facts():
    for name, (dim, heads, cells) in {
        NAME: (192, 3, 196), "ceit_small_patch16_384": (384, 6, 576), "ceit_base_patch16_224": (768, 12, 196),
    }.items():  # fmt: skip
        with torch.device("meta"):
            model = vertebra.create_model(name)
        block = model.stages[-1].blocks[0]
        assert (model.num_features, len(model.stages), block.attn.heads) == (dim, 12, heads)
        assert model.pos_embed.table.shape == (1, 1 + cells, dim) and model.neck.table.shape == (1, 12, dim)
        assert block.mlp[1].conv.weight.shape == (4 * dim, 1, 3, 3)
        assert model.patch_embed.proj.weight.shape == (dim, 64, 4, 4)
    assert FAMILY.variants["ceit_tiny_patch16_384"].published["top1"] == 78.8


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="multiple of the stem's stride 4, got 14"):
        small(patch=14)
    with pytest.raises(ValueError, match="must hold a patch of 16"):
        small(img_size=8)
    with pytest.raises(ValueError, match="global_pool must be one of token"):
        small(global_pool="avg")
    with pytest.raises(ValueError, match="at least 16"):
        small()(torch.randn(1, 3, 15, 32))
