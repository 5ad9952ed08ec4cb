"""FastViT against timm and plain formulas: both structures, their names, the published quirks, other ranks."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from oracle import error
from timm.utils import reparameterize_model
from torch import nn

import vertebra
from vertebra.layers import BatchNorm, Conv
from vertebra.mixers import RepMixer
from vertebra.models.fastvit import AttentionBlock, ConvFfn, MobileOne, RepCPE

SMALL = dict(dims=(16, 32, 32, 64), depths=(1, 2, 1, 1), num_classes=7)
NETS = ("fastvit_t8", "fastvit_sa12")
RULES = (  # official names -> timm's
    (r"^patch_embed\.", "stem."),
    (r"^network\.6\.pe\.", "stages.3.pos_emb.pos_enc."),
    (r"^network\.6\.reparam_conv\.", "stages.3.pos_emb.reparam_conv."),
    (r"^network\.7\.", "stages.3.blocks."),
    (r"^network\.([0246])\.", lambda m: f"stages.{int(m[1]) // 2}.blocks."),
    (r"^network\.([135])\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample."),
    (r"^conv_exp\.", "final_conv."),
    (r"\.se\.reduce\.", ".se.fc1."),
    (r"\.se\.expand\.", ".se.fc2."),
    (r"\.rbr_conv\.", ".conv_kxk."),
    (r"\.rbr_scale\.", ".conv_scale."),
    (r"\.rbr_skip\.", ".identity."),
    (r"\.lkb_origin\.", ".large_conv."),
    (r"\.lkb_reparam\.", ".reparam_conv."),
    (r"\.convffn\.", ".mlp."),
    (r"\.(layer_scale(?:_\d)?)$", r".\1.gamma"),
    (r"^head\.", "head.fc."),
)


def shake(module):
    """Weights and statistics far from their initialisation, layer scales that count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            fan = p[0].numel() if p.ndim > 1 else 1
            p.normal_(std=0.3 if fan == 1 else fan**-0.5)
            if p.ndim == 1 and name.endswith("weight"):
                p.add_(1.0)
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.3)
                part.running_var.uniform_(0.3, 3)
    return module.eval()


def small(name, **options):
    return shake(vertebra.create_model(name, **(SMALL | options)))


def plain_norm(x, n):
    """Batch norm of (B, *S, C) in evaluation mode, written out."""
    return (x - n.running_mean) / (n.running_var + 1e-5).sqrt() * n.weight + n.bias


def plain_conv(x, c):
    """Convolution of (B, H, W, C) by torch's own channels-first call."""
    y = F.conv2d(x.movedim(-1, 1), c.weight, c.bias, c.stride, c.padding, groups=c.groups)
    return y.movedim(1, -1)


def timm_names(state):
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("fused", [False, True])
def test_agrees_with_timm(name, fused):
    ours, theirs = shake(vertebra.create_model(name, num_classes=7)), timm.create_model(name, num_classes=7).eval()
    if fused:
        ours, theirs = vertebra.fuse(ours), reparameterize_model(theirs)
    report = theirs.load_state_dict(timm_names(vertebra.to_official(ours)), strict=False)
    assert not report.unexpected_keys and all(k.endswith("num_batches_tracked") for k in report.missing_keys)
    ours, theirs = ours.double(), theirs.double()  # these weights make a softmax so sharp that float32 is no judge
    with torch.no_grad():
        for sides in ((64, 96), (75, 49)):
            x = 100 * torch.randn(2, 3, *sides, dtype=torch.float64)
            assert error(ours(x), theirs(x)) <= 1e-10


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("name", NETS)
def test_fused_network_gives_the_same_outputs(name, ndim):
    model = small(name, ndim=ndim)
    x = torch.randn(2, 3, *(33, 64, 39)[:ndim])
    with torch.no_grad():
        for published in (True, False):
            fused = vertebra.fuse(model, published=published)
            assert error(fused(x), model(x)) <= 1e-5
            for a, b in zip(fused.forward_intermediates(x), model.forward_intermediates(x), strict=True):
                assert error(a, b) <= 1e-5


@pytest.mark.parametrize(("name", "attending"), [("fastvit_t8", 0), ("fastvit_sa12", 1)])
def test_published_fused_structure_keeps_the_norm_of_each_feed_forward_part(name, attending):
    model = small(name)

    def norms(net):
        return [n for n, m in net.named_modules() if isinstance(m, BatchNorm)]

    kept = norms(vertebra.fuse(model))
    assert sum(n.endswith("mlp.conv.norm") for n in kept) == 5 and len(kept) == 5 + attending
    assert len(norms(vertebra.fuse(model, published=False))) == attending


def test_official_names_of_both_structures():
    model = small("fastvit_sa12")
    official = vertebra.to_official(model)
    assert {
        "patch_embed.0.rbr_conv.0.conv.weight", "patch_embed.2.rbr_skip.running_var",
        "network.1.proj.0.small_conv.bn.bias",
        "network.2.1.token_mixer.norm.rbr_skip.weight", "network.2.1.token_mixer.mixer.rbr_scale.bn.weight",
        "network.6.pe.bias", "network.7.0.norm.weight", "network.7.0.token_mixer.qkv.weight", "conv_exp.se.reduce.bias",
        "network.7.0.convffn.conv.bn.running_mean", "conv_exp.rbr_scale.conv.weight", "head.weight",
    } <= official.keys()  # fmt: skip
    for key in ("network.0.0.layer_scale", "network.0.0.token_mixer.layer_scale"):
        assert official[key].shape == (16, 1, 1)
    assert official["network.7.0.layer_scale_2"].shape == (64, 1, 1)
    fused = vertebra.to_official(vertebra.fuse(model))
    assert {
        "patch_embed.2.reparam_conv.bias", "network.1.proj.0.lkb_reparam.weight", "network.1.proj.1.reparam_conv.bias",
        "network.4.0.token_mixer.reparam_conv.weight", "network.6.reparam_conv.bias", "conv_exp.reparam_conv.weight",
        "network.4.0.convffn.conv.bn.weight", "network.4.0.layer_scale",
    } <= fused.keys()  # fmt: skip
    assert not any("rbr_" in k or "token_mixer.layer_scale" in k for k in fused)
    with pytest.raises(vertebra.CheckpointError, match="fused"):
        vertebra.load_checkpoint(model, fused)


@pytest.mark.parametrize("kernel", [3, 5])
def test_rep_mixer_written_out(kernel):
    mixer = shake(RepMixer(2, 6, kernel))
    x, b = torch.randn(2, 5, 7, 6), mixer.branches
    with torch.no_grad():
        mixed = plain_norm(plain_conv(x, b.dense.conv), b.dense.norm) + plain_norm(x, b.identity)
        mixed = mixed + plain_norm(x * b.one.conv.weight.flatten(), b.one.norm)
        want = x + mixer.scale.gamma.flatten() * (mixed - plain_norm(x, mixer.norm))
        assert error(mixer(x), want) <= 1e-6
        assert error(plain_conv(x, mixer.fuse()), want) <= 1e-6
    with pytest.raises(ValueError, match="kernel must be odd"):
        RepMixer(2, 6, 4)


def test_way_down_has_no_activation_after_the_large_kernel():
    large, small_one = small("fastvit_t8").stages[1].down
    x = torch.randn(2, 9, 8, 16)
    with torch.no_grad():
        y = plain_norm(plain_conv(x, large.large.conv), large.large.norm)
        y = y + plain_norm(plain_conv(x, large.small.conv), large.small.norm)
        assert y.shape == (2, 5, 4, 32) and error(large(x), y) <= 1e-6
        one = small_one.reparam
        want = F.gelu(plain_norm(y @ one.dense.conv.weight.flatten(1).T, one.dense.norm) + plain_norm(y, one.identity))
        assert error(nn.Sequential(large, small_one)(x), want) <= 1e-6


def test_expansion_squeezes_before_its_activation():
    model = small("fastvit_t8")
    neck, x = model.neck, torch.randn(2, 4, 3, 64)
    assert isinstance(neck, MobileOne) and neck.se.down.weight.shape == (8, 128, 1, 1)  # 2 * 64 / 16
    one, dense, se = neck.reparam.one, neck.reparam.dense, neck.se
    with torch.no_grad():
        y = plain_norm(plain_conv(x, dense.conv), dense.norm) + plain_norm(plain_conv(x, one.conv), one.norm)
        gate = F.relu(y.mean((1, 2)) @ se.down.weight.flatten(1).T + se.down.bias)
        gate = torch.sigmoid(gate @ se.up.weight.flatten(1).T + se.up.bias)
        want = F.gelu(y * gate[:, None, None])
        assert error(neck(x), want) <= 1e-6
        assert (
            error(model.forward_head(x.movedim(-1, 1)), want.mean((1, 2)) @ model.head.weight.T + model.head.bias)
            <= 1e-6
        )


def test_attention_block_written_out():
    block = shake(AttentionBlock(2, 64, 96, 0.0, 1e-5))
    x = torch.randn(2, 3, 5, 64)
    with torch.no_grad():
        rows = plain_norm(x, block.norm).reshape(2, 15, 64)
        q, k, v = (rows @ w.T for w in block.attn.qkv.weight.chunk(3))
        heads = []
        for h in (slice(0, 32), slice(32, 64)):
            heads.append((q[..., h] @ k[..., h].transpose(1, 2) * 32**-0.5).softmax(-1) @ v[..., h])
        y = torch.cat(heads, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
        y = x + block.scale1.gamma.flatten() * y.reshape(x.shape)
        mlp = block.mlp
        z = plain_norm(plain_conv(y, mlp.conv.conv), mlp.conv.norm)
        z = F.gelu(z @ mlp.fc1.weight.flatten(1).T + mlp.fc1.bias) @ mlp.fc2.weight.flatten(1).T + mlp.fc2.bias
        assert error(block(x), y + block.scale2.gamma.flatten() * z) <= 1e-6
    with pytest.raises(ValueError, match="48 channels do not divide into attention heads of 32"):
        vertebra.create_model("fastvit_sa12", dims=(12, 12, 24, 48))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_position_encoding_fuses_its_residual(ndim):
    encoding = shake(RepCPE(ndim, 4, 7))
    x = torch.randn(2, *(5, 9, 6)[:ndim], 4)
    with torch.no_grad():
        want = x + encoding.conv(x)
        assert error(encoding(x), want) == 0
        conv = encoding.fuse()
        assert isinstance(conv, Conv) and error(conv(x), want) <= 1e-6


@pytest.mark.parametrize(("name", "last"), [("fastvit_t8", 6), ("fastvit_sa12", 7)])
def test_dense_version_norms_the_output_of_every_stage(name, last):
    dense = small(name, features_only=True)
    x = torch.randn(2, 3, 64, 70)
    with torch.no_grad():
        state, maps = dense.embed(x.movedim(1, -1)), dense(x)
        for stage, norm, y in zip(dense.stages, dense.output_norms, maps, strict=True):
            state = stage(state)  # the last one too, not its position encoding
            assert error(y.movedim(1, -1), plain_norm(state, norm)) <= 1e-6
    names = {k.split(".")[0] for k in vertebra.to_official(dense) if k.startswith("norm")}
    assert names == {"norm0", "norm2", "norm4", f"norm{last}"}
    assert not any(k.startswith(("conv_exp", "head")) for k in vertebra.to_official(dense))


@pytest.mark.parametrize("ndim", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_a_flat_input_of_the_next_rank_gives_the_same(name, ndim):
    low, high = small(name, ndim=ndim), small(name, ndim=ndim + 1)
    lifted = high.state_dict()
    for key, value in low.state_dict().items():
        want = lifted[key]
        if value.ndim < want.ndim:  # the kernel in the middle of the new axis
            wide = torch.zeros_like(want)
            wide.select(2, want.shape[2] // 2).copy_(value)
            lifted[key] = wide
        else:
            lifted[key] = value
    high.load_state_dict(lifted)
    x = torch.randn(2, *(45, 38)[:ndim], 3)

    def logits(model, x):
        return model.outputs(model.through(model.embed(x))[0])["logits"]

    with torch.no_grad():
        assert error(logits(high, x.unsqueeze(1)), logits(low, x)) <= 1e-5


def test_published_configurations():
    with torch.device("meta"):
        tiny, large = vertebra.create_model("fastvit_t8"), vertebra.create_model("fastvit_ma36", drop_path_rate=0.35)
        middle = vertebra.create_model("fastvit_sa12")
    assert [s.blocks[0].mlp.fc1.weight.shape[0] for s in tiny.stages] == [144, 288, 576, 1152]
    assert large.stages[3].blocks[0].attn.heads == 19 and large.neck.se.down.weight.shape[0] == 76
    rates = [b.drop_path.rate for s in large.stages for b in s.blocks]
    assert rates == pytest.approx([0.35 * i / 35 for i in range(36)])
    kinds = [type(s.blocks[0]).__name__ for s in middle.stages]
    assert kinds == ["RepMixerBlock"] * 3 + ["AttentionBlock"]
    assert [vertebra.model_info(n).config["layer_scale"] for n in ("fastvit_sa24", "fastvit_sa36")] == [1e-5, 1e-6]
    assert {m.eps for m in middle.modules() if isinstance(m, BatchNorm)} == {1e-5}


@pytest.mark.parametrize("name", vertebra.list_models(family="fastvit"))
def test_parameter_count_of_the_fused_network(name):
    with torch.device("meta"):
        model = vertebra.create_model(name).eval()
    count = sum(p.numel() for p in vertebra.fuse(model).parameters()) / 1e6
    assert abs(count - vertebra.model_info(name).published["params_deploy_m"]) <= 0.0006


def test_initialisation():
    torch.manual_seed(0)
    model = vertebra.create_model("fastvit_sa12")
    block = model.stages[3].blocks[0]
    for weight in (block.mlp.fc1.weight, block.mlp.conv.conv.weight, block.attn.qkv.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not block.mlp.fc1.bias.any() and (block.scale1.gamma == 1e-5).all()
    stem = model.patch_embed[0].reparam.dense.conv.weight  # torch's default: uniform within 1 / sqrt(27)
    assert stem.std().item() == pytest.approx((3 * 27) ** -0.5, rel=0.05)
    assert isinstance(block.mlp, ConvFfn) and block.mlp.conv.keep


@pytest.mark.parametrize("side", [5, 6, 7])
def test_large_kernel_at_rank_three_is_torchs_in_value_and_gradient(side):
    down = Conv(3, 8, 16, 7, 2, groups=8, bias=False)  # pads its first axis itself, see Conv
    x = torch.randn(2, side, 6, 5, 8)
    copy = down.weight.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    y, want = down(x), F.conv3d(x.movedim(-1, 1).contiguous(), copy, None, 2, 3, 1, 8).movedim(1, -1)
    assert error(y, want) <= 1e-6
    y.square().sum().backward()
    want.square().sum().backward()
    assert error(down.weight.grad, copy.grad) <= 1e-6
