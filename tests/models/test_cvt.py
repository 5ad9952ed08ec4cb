"""CvT: convolutional projections written out, the class token's way, scale, activation, strides, stochastic depth."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.mixers import ConvProjectionAttention
from vertebra.models.cvt import FAMILY, QuickGELU

SMALL = dict(dims=(8, 24, 32), heads=(1, 3, 4), depths=(1, 1, 2), num_classes=7)


def wake(module):
    """Statistics of batch norms too, and logits that are not flat."""
    fill(module)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.normal_(std=0.4)
        for name, b in module.named_buffers():
            if b.is_floating_point():
                b.normal_(1.0 if name.endswith("var") else 0.0, 0.1)
    return module.eval()


def small(**options):
    torch.manual_seed(0)
    return fill(vertebra.create_model("cvt_13", **(SMALL | options)))


def written_out(m, x, grid):
    """Attention of tokens x (B, P + N, C), head by head."""
    ndim, dim, p = len(grid), x.shape[-1], m.prefix
    width, cells = dim // m.heads, x[:, p:].mT.reshape(x.shape[0], dim, *grid)

    def project(conv, linear, stride):
        y = getattr(F, f"conv{ndim}d")(cells, conv.conv.weight, None, stride, 1, 1, dim)
        norm = conv.norm
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
        assert tuple(y.shape[2:]) == tuple((s + stride - 1) // stride for s in grid)
        return linear(torch.cat([x[:, :p], y.flatten(2).mT], 1))

    q, k, v = project(m.conv_q, m.q, 1), project(m.conv_k, m.k, 2), project(m.conv_v, m.v, 2)
    out = []
    for h in range(m.heads):
        part = slice(h * width, (h + 1) * width)
        out.append((q[..., part] @ k[..., part].mT / math.sqrt(dim)).softmax(-1) @ v[..., part])
    return m.proj(torch.cat(out, -1))


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("ndim", "grid"), [(1, (12,)), (1, (7,)), (2, (6, 8)), (2, (5, 1)), (3, (4, 3, 5))])
@torch.no_grad()
def test_attention_as_the_paper_writes_it(ndim, grid, prefix):
    m = wake(ConvProjectionAttention(ndim, 12, 3, prefix=prefix))
    x = torch.randn(2, prefix + math.prod(grid), 12)
    want = written_out(m, x, grid)
    assert error(m(x, grid), want) <= 1e-6
    if prefix:
        with pytest.raises(ValueError, match="grid"):
            m(x)
    else:
        assert error(m(x.reshape(2, *grid, 12)).flatten(1, -2), want) <= 1e-6
    m.scale = (12 // 3) ** -0.5  # the usual scale is another network
    assert error(m(x, grid), want) > 1e-3


@torch.no_grad()
def test_a_line_is_an_image_of_height_one():
    line, plane = wake(ConvProjectionAttention(1, 8, 2)), ConvProjectionAttention(2, 8, 2).eval()
    state = {k: F.pad(v.unsqueeze(2), (0, 0, 1, 1)) if v.ndim == 3 else v for k, v in line.state_dict().items()}
    plane.load_state_dict(state)
    x = torch.randn(2, 11, 8)
    assert error(line(x), plane(x.unsqueeze(1)).squeeze(1)) <= 1e-6


def test_activation_is_quick_gelu():
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(QuickGELU()(x), torch.tensor([v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]))
    assert (QuickGELU()(x) - F.gelu(x)).abs().max() > 0.01
    model = small()
    assert {type(b.mlp.act) for s in model.stages for b in s.blocks} == {QuickGELU}
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-5}


@torch.no_grad()
def test_strides_and_paddings():
    model = small()
    maps = model.forward_intermediates(torch.randn(1, 3, 250, 190))
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 62, 47), (24, 31, 24), (32, 16, 12)]
    stem, x = model.patch_embed, torch.randn(1, 3, 33, 40)
    want = F.conv2d(x, stem.proj.weight, stem.proj.bias, 4, 2).movedim(1, -1)
    torch.testing.assert_close(stem(x.movedim(1, -1)), F.layer_norm(want, (8,), stem.norm.weight, stem.norm.bias))


@torch.no_grad()
def test_block_by_block():
    """The whole network from its parts: no norm between stages, the class token from the last embedding on."""
    model, x = small(), torch.randn(2, 3, 36, 52)
    state = model.patch_embed(x.movedim(1, -1))
    for i, stage in enumerate(model.stages):
        if i:
            down = stage.down
            state = F.conv2d(state.movedim(-1, 1), down.proj.weight, down.proj.bias, 2, 1).movedim(1, -1)
            state = down.norm(state)
        grid, tokens = tuple(state.shape[1:-1]), state.flatten(1, 2)
        if i == 2:
            tokens = torch.cat([stage.down.cls_token.expand(2, -1, -1), tokens], 1)
        for block in stage.blocks:
            assert block.attn.prefix == (i == 2)
            tokens = tokens + written_out(block.attn, block.norm1(tokens), grid)
            hidden = block.mlp.fc1(block.norm2(tokens))
            tokens = tokens + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))
        state = tokens[:, int(i == 2) :].reshape(2, *grid, -1)
        assert error(model.forward_intermediates(x)[i].movedim(1, -1), state) <= 1e-6
    assert model.forward_features(x).shape == (2, 1 + math.prod(grid), 32)
    assert error(model(x), model.head(model.norm(tokens[:, 0]))) <= 1e-6
    assert model(x[:1]).shape == (1, 7)  # the official code drops the batch of one


@torch.no_grad()
def test_dense_version_is_the_same_network_without_a_head():
    model = small()
    dense = small(features_only=True)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.unused) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]
    x = torch.randn(1, 3, 48, 32)
    assert all(torch.equal(a, b) for a, b in zip(dense(x), model.forward_intermediates(x), strict=True))


def test_stochastic_depth_is_in_the_last_stage():
    model = vertebra.create_model("cvt_13", **(SMALL | dict(depths=(1, 3, 5))), drop_path_rate=0.2)
    rates = [[b.drop_path.rate for b in s.blocks] for s in model.stages]
    assert rates == [[0.0], [0.0] * 3, pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])]


def test_official_names():
    names = vertebra.to_official(small())
    assert {
        "stage0.patch_embed.proj.bias", "stage1.patch_embed.norm.weight", "stage2.cls_token", "norm.bias",
        "stage2.blocks.1.attn.conv_proj_k.conv.weight", "stage0.blocks.0.attn.conv_proj_v.bn.running_var",
        "stage1.blocks.0.attn.proj_q.bias", "stage1.blocks.0.attn.proj.weight", "stage2.blocks.0.mlp.fc2.weight",
    } <= set(names)  # fmt: skip
    assert names["stage2.cls_token"].shape == (1, 1, 32)
    assert small().no_weight_decay() == {"stages.2.down.cls_token"}


@pytest.mark.parametrize(
    ("name", "count", "size"), [("cvt_13", 19_997_480, 224), ("cvt_21", 31_622_696, 224), ("cvt_w24", 277_196_392, 384)]
)
def test_published_variants(name, count, size):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count
    assert vertebra.model_info(name).inputs.size == size
    assert {f"stages.{i}.{j}" for i, s in enumerate(model.stages) for j in range(len(s.blocks))} == {
        f"stages.{i}.{j}" for i, d in enumerate(FAMILY.variants[name].config["depths"]) for j in range(d)
    }
    for stage in model.stages:  # heads are 64 wide, keys and values at half of the resolution in every stage
        attn = stage.blocks[0].attn
        assert attn.q.in_features == 64 * attn.heads and attn.scale == attn.q.in_features**-0.5
        assert [attn.conv_q.conv.stride, attn.conv_k.conv.stride, attn.conv_v.conv.stride] == [(1, 1), (2, 2), (2, 2)]
        assert attn.conv_k.conv.bias is None
