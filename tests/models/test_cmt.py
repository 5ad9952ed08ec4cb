"""CMT: attention, MLP and the shared bias written out, other sizes, and published configurations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import fill

import vertebra
from vertebra.models.cmt import InvertedMlp, LightAttention, SharedBias

SMALL = dict(stem=8, dims=(16, 24, 32, 40), depths=(1, 2, 1, 1), heads=(1, 2, 2, 4), img_size=64)


def small(**options):
    return fill(vertebra.create_model("cmt_ti", **(SMALL | dict(num_classes=7) | options)))


@pytest.mark.parametrize(("ndim", "ratio"), [(1, 2), (2, 2), (3, 2), (2, 1)])
def test_attention_reads_fewer_keys_and_adds_the_bias_as_it_is(ndim, ratio):
    attn, x = fill(LightAttention(ndim, 8, 2, ratio)), torch.randn(2, *(5, 4, 6)[:ndim], 8)
    y = x
    if ratio > 1:
        attn.sr.norm.running_mean.normal_(std=0.1), attn.sr.norm.running_var.uniform_(0.5, 2)
        call, c, n = (F.conv1d, F.conv2d, F.conv3d)[ndim - 1], attn.sr.conv, attn.sr.norm
        maps = call(x.movedim(-1, 1), c.weight, c.bias, stride=ratio, groups=8)
        y = F.batch_norm(maps, n.running_mean, n.running_var, n.weight, n.bias).movedim(1, -1)
    q, k, v = attn.q(x).flatten(1, -2), attn.k(y).flatten(1, -2), attn.v(y).flatten(1, -2)
    bias = torch.randn(1, 2, q.shape[1], k.shape[1])
    heads = []
    for h in range(2):
        cut = slice(4 * h, 4 * h + 4)
        logits = q[..., cut] @ k[..., cut].mT * 4**-0.5 + bias[0, h]
        heads.append(logits.softmax(-1) @ v[..., cut])
    expected = attn.proj(torch.cat(heads, -1)).reshape(x.shape)
    torch.testing.assert_close(attn(x, bias), expected, rtol=1e-4, atol=1e-5)


def test_mlp_activates_before_its_norms():
    mlp, x = fill(InvertedMlp(2, 6, 10)), torch.randn(2, 5, 4, 6)
    for norm in (mlp.conv1.norm, mlp.norm, mlp.conv2.norm):
        norm.running_mean.normal_(std=0.1), norm.running_var.uniform_(0.5, 2)

    def normed(y, n):
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias)

    h = normed(F.gelu(F.conv2d(x.movedim(-1, 1), mlp.conv1.conv.weight, mlp.conv1.conv.bias)), mlp.conv1.norm)
    h = h + F.conv2d(h, mlp.local.conv.weight, mlp.local.conv.bias, padding=1, groups=10)
    h = normed(F.gelu(h), mlp.norm)
    y = normed(F.conv2d(h, mlp.conv2.conv.weight, mlp.conv2.conv.bias), mlp.conv2.norm).movedim(1, -1)
    torch.testing.assert_close(mlp(x), y, rtol=1e-4, atol=1e-5)


def test_bias_is_shared_by_the_blocks_of_a_stage_and_by_nothing_else():
    model = small()
    tables = [n for n, p in model.named_parameters() if n.endswith("bias.table")]
    assert tables == [f"stages.{i}.down.bias.table" for i in range(4)]
    assert [tuple(s.down.bias.table.shape) for s in model.stages] == [
        (1, 256, 4), (2, 64, 4), (2, 16, 4), (4, 4, 4),
    ]  # fmt: skip
    assert {vertebra.checkpoint.official_name(model, n) for n in tables} == {f"relative_pos_{c}" for c in "abcd"}


def test_bias_on_another_map_is_resampled_over_keys_and_queries():
    bias = SharedBias((4, 6), 2, 2)
    table = bias.table.detach().reshape(2, 4, 6, 2, 3)
    with torch.no_grad():
        got = bias((8, 6)).reshape(2, 8, 6, 4, 3)
    cells = F.interpolate(table.reshape(48, 1, 2, 3), size=(4, 3), mode="bicubic").reshape(2, 4, 6, 12)
    rows = F.interpolate(cells.movedim(-1, 1), size=(8, 6), mode="bicubic").movedim(1, -1)
    torch.testing.assert_close(got, rows.reshape(2, 8, 6, 4, 3), rtol=1e-4, atol=1e-5)
    assert torch.equal(bias((4, 6))[0], bias.table)


def test_a_model_built_for_another_size_takes_the_tables():
    model, wide = small(), small(img_size=96)
    report = vertebra.load_checkpoint(wide, vertebra.to_official(model))
    assert len(report.adapted) == 4
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():  # the same resampling on loading as on meeting the size
        torch.testing.assert_close(wide(x), model(x), rtol=1e-4, atol=1e-5)


def test_published_configurations():
    counts = {}
    for name in vertebra.list_models("cmt_*"):
        with torch.device("meta"):
            model = vertebra.create_model(name)
        counts[name] = round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
    assert counts == {"cmt_ti": 9.492, "cmt_xs": 15.247, "cmt_s": 26.256, "cmt_b": 45.715}
    with pytest.raises(ValueError, match="img_size must be at least 32"):
        vertebra.create_model("cmt_ti", img_size=16)
