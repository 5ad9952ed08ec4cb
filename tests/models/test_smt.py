"""SMT: modulation and attention written out, names of both generations, and published configurations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import fill

import vertebra
from vertebra.mixers import LocalEnhancedAttention, ScaleAwareModulation

SMALL = dict(dims=(16, 32, 48, 64), depths=(1, 1, 3, 1), heads=(4, 4, 3, 4))


def small(**options):
    return fill(vertebra.create_model("smt_tiny", **(SMALL | dict(num_classes=7) | options)))


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_modulation_interleaves_its_heads(ndim):
    torch.manual_seed(1)
    mixer, x = fill(ScaleAwareModulation(ndim, 12, 3)), torch.randn(2, *(7, 8, 9)[:ndim], 12)
    mixer.norm.running_mean.normal_(std=0.1), mixer.norm.running_var.uniform_(0.5, 2)
    call = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1]
    s = mixer.s(x).movedim(-1, 1)
    heads = [
        call(s[:, 4 * i : 4 * i + 4], conv.weight, conv.bias, padding=i + 1, groups=4)
        for i, conv in enumerate(mixer.local)
    ]
    mixed = torch.empty(2, 24, *x.shape[1:-1])
    for channel in range(4):  # each group sees one channel of every head and gives six
        group = torch.stack([head[:, channel] for head in heads], -1)
        rows = slice(6 * channel, 6 * channel + 6)
        weight = mixer.proj0.weight[rows].flatten(1)
        mixed[:, rows] = F.linear(group, weight, mixer.proj0.bias[rows]).movedim(-1, 1)
    n = mixer.norm
    mixed = F.gelu(F.batch_norm(mixed, n.running_mean, n.running_var, n.weight, n.bias)).movedim(1, -1)
    modulator = F.linear(mixed, mixer.proj1.weight.flatten(1), mixer.proj1.bias)
    torch.testing.assert_close(mixer(x), mixer.proj(mixer.v(x) * modulator), rtol=1e-4, atol=1e-5)


def test_third_stage_takes_turns_and_begins_with_modulation():
    model = small()
    kinds = [[type(b.attn) for b in stage.blocks] for stage in model.stages]
    m, a = ScaleAwareModulation, LocalEnhancedAttention
    assert kinds == [[m], [m], [m, a, m], [a]]
    with pytest.raises(ValueError, match="letters of M, A"):
        small(mixers=("M", "M", "MX", "A"))


def test_stage_norms_feed_the_next_stage():
    model, x = small(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second = model.forward_intermediates(x, [0, 1])
        assert first.mean(1).abs().max() > 1e-3  # an affine norm: not centred any more
        again = model.stages[1](first.movedim(1, -1).contiguous()).movedim(-1, 1)
        torch.testing.assert_close(again, second)
    eps = [(m.norm.eps, m.blocks[0].norm1.eps) for m in model.stages]
    assert eps == [(1e-6, 1e-6)] * 4 and [s.down.norm.eps for s in model.stages[1:]] == [1e-5] * 3


def test_the_older_name_of_the_values_convolution_loads_too():
    model, other = small(), small()
    state = {k.replace(".attn.local_conv.", ".attn.dw_conv."): v for k, v in vertebra.to_official(model).items()}
    assert any(".dw_conv." in k for k in state)
    vertebra.load_checkpoint(other, state)
    x = torch.randn(1, 3, 45, 70)
    with torch.no_grad():
        torch.testing.assert_close(other(x), model(x))


def test_published_configurations():
    with torch.device("meta"):
        models = {n.removeprefix("smt_"): vertebra.create_model(n) for n in vertebra.list_models("smt_*")}
    counts = {k: round(sum(p.numel() for p in m.parameters()) / 1e6, 3) for k, m in models.items()}
    assert counts == {"tiny": 11.507, "small": 22.551, "base": 32.037, "large": 80.620}
    assert models["large"].stages[0].blocks[0].scale1.gamma.shape == (96,)
    assert models["base"].patch_embed.convs[0].conv.kernel == (7, 7)
    assert [b.attn.heads for b in models["large"].stages[2].blocks if hasattr(b.attn, "heads")][:1] == [8]
