"""Mobile-Former: the bridges and slopes written out, channel shuffles, rows and published configurations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill, loud

import vertebra
from vertebra.models.mobile_former import (
    DownBlock,
    DynamicReLU,
    FirstBlock,
    Former,
    FormerToMobile,
    MobileBlock,
    MobileToFormer,
)

ROWS = (((2, 0, 8, 1), (2, 2, 12, 2)), ((2, 2, 16, 2), (3, 16)), ((2, 2, 24, 2),), ((2, 2, 32, 2), (2, 40)))
SMALL = dict(rows=ROWS, stem=8, tokens=(3, 16), neck=32, num_classes=7)


def small(**options):
    return fill(vertebra.create_model("mobile_former_96m", **(SMALL | options)))


def attention(q, k, v, heads):
    """One query, one head at a time: q (L, C), k and v (M, C) -> (L, C), heads side by side in the channels."""
    out, width = torch.zeros_like(q), q.shape[1] // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for i in range(q.shape[0]):
            weights = (k[:, part] @ q[i, part] / width**0.5).softmax(0)
            out[i, part] = weights @ v[:, part]
    return out


def hard_sigmoid(x):
    return (x + 3).clamp(0, 6) / 6


@pytest.mark.parametrize("sides", [(7,), (3, 4), (2, 3, 2)])
def test_bridges_use_the_raw_map(sides):
    torch.manual_seed(0)
    into, out = loud(MobileToFormer(6, 8)), loud(FormerToMobile(6, 8))
    x, tokens = torch.randn(2, *sides, 6), torch.randn(2, 3, 8)
    with torch.no_grad():
        for b in range(2):
            cells = x[b].reshape(-1, 6)
            gathered = attention(into.q(tokens[b]), cells, cells, 2) * 2 * hard_sigmoid(into.gate(tokens[b]))
            wanted = F.layer_norm(tokens[b] + into.proj(gathered), (8,), into.norm.weight, into.norm.bias)
            torch.testing.assert_close(into(x, tokens)[b], wanted, rtol=1e-4, atol=1e-5)
            wanted = cells + attention(cells, out.k(tokens[b]), out.v(tokens[b]), 2)
            torch.testing.assert_close(out(x, tokens)[b].reshape(-1, 6), wanted, rtol=1e-4, atol=1e-5)


def test_former_has_four_heads_and_norms_after_the_sum():
    former, tokens = loud(Former(8)), torch.randn(1, 3, 8)
    with torch.no_grad():
        t = tokens[0]
        t = F.layer_norm(t + former.proj(attention(former.q(t), t, t, 4)), (8,), former.norm1.weight, former.norm1.bias)
        hidden = F.gelu(former.mlp.fc1(t))
        assert hidden.shape[1] == 16
        t = F.layer_norm(t + former.mlp.fc2(hidden), (8,), former.norm2.weight, former.norm2.bias)
        torch.testing.assert_close(former(tokens)[0], t, rtol=1e-4, atol=1e-5)


def test_slopes_come_from_the_token():
    act, x, token = loud(DynamicReLU(6, 8)), torch.randn(2, 4, 3, 6), 3 * torch.randn(2, 8)
    with torch.no_grad():
        values = hard_sigmoid(act.hyper.fc2(F.relu(act.hyper.fc1(token))))
        y = act(x, token)
        for b in range(2):
            for c in range(6):
                a1, a2 = 2 * (values[b, c] - 0.5) + 1, 2 * (values[b, 6 + c] - 0.5)
                assert 0 <= a1 <= 2 and -1 <= a2 <= 1
                torch.testing.assert_close(y[b, ..., c], torch.maximum(a1 * x[b, ..., c], a2 * x[b, ..., c]))


def conv_norm(layer, x):
    """A layer's convolution and norm in plain torch, channels first."""
    conv, norm = layer.conv, layer.norm
    x = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, 1, conv.groups)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)


def deal(x, groups):
    """Channels first: channel g * n + j of `groups` groups of n goes to j * groups + g."""
    out, n = torch.empty_like(x), x.shape[1] // groups
    for g in range(groups):
        for j in range(n):
            out[:, j * groups + g] = x[:, g * n + j]
    return out


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kind", ["first", "down", "mobile"])
def test_blocks_written_out(kind, groups):
    torch.manual_seed(3)
    x, tokens = torch.randn(2, 5, 6, 8), torch.randn(2, 3, 16)
    shuffle = deal if groups > 1 else lambda v, g: v
    first = lambda v: v.movedim(-1, 1)  # noqa: E731
    with torch.no_grad():
        if kind == "first":
            block = loud(FirstBlock(2, 8, 8, 2, 1, groups, 0.0))
            hidden = shuffle(conv_norm(block.expand, first(x)).clamp(0, 6), 8)
            y, t = block((x, tokens))
            assert torch.equal(t, tokens)
            torch.testing.assert_close(first(y), first(x) + conv_norm(block.project, hidden), rtol=1e-4, atol=1e-4)
            return
        if kind == "down":
            block = loud(DownBlock(2, 8, 12, 16, (2, 3), 2, groups, 0.0))
        else:
            block = loud(MobileBlock(2, 8, 8, 16, 3, groups, 0.0))
        t = block.former(block.to_former(x, tokens))  # reads the incoming map
        relu = lambda act, v: first(act(v.movedim(1, -1), t[:, 0]))  # noqa: E731
        if kind == "down":
            u = conv_norm(block.conv2, relu(block.relu1, shuffle(conv_norm(block.conv1, first(x)), 8)))
            y = u + conv_norm(block.conv4, relu(block.relu3, shuffle(conv_norm(block.conv3, u), 12)))
            assert y.shape == (2, 12, 3, 3)
        else:
            y = relu(block.relu1, shuffle(conv_norm(block.conv1, first(x)), 4))
            y = shuffle(conv_norm(block.conv3, relu(block.relu2, conv_norm(block.conv2, y))), 4)
            y = first(x) + y  # before the tokens are read
        wanted = block.to_mobile(y.movedim(1, -1), t)
        map_, after = block((x, tokens))
        torch.testing.assert_close(after, t)
        assert error(map_, wanted) < 1e-5


@pytest.mark.parametrize("groups", [1, 4])
def test_head_joins_the_pooled_map_and_the_first_token(groups):
    model = loud(vertebra.create_model("mobile_former_96m", **(SMALL | dict(groups=groups))))
    x = torch.randn(2, 3, 70, 45)
    with torch.no_grad():
        map_, tokens = model.forward_features(x)
        assert map_.shape == (2, 40, 3, 2) and tokens.shape == (2, 3, 16)
        state = model.through(model._embed(x))[0]
        torch.testing.assert_close(tokens, model.neck.bridge(*state))  # they have read the last map once more
        inner = conv_norm(model.neck.conv, deal(map_, 4) if groups > 1 else map_).clamp(0, 6).mean((2, 3))
        pooled = inner * hard_sigmoid(inner)
        linear, norm, _ = model.neck.fc
        y = linear(torch.cat([pooled, tokens[:, 0]], 1))
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        torch.testing.assert_close(model(x), model.head(y * hard_sigmoid(y)), rtol=1e-4, atol=1e-4)


def test_a_line_is_a_map_whose_rows_are_alone():
    line, plane = small(ndim=1), small()
    state = line.state_dict()
    for name, v in plane.state_dict().items():
        if v.ndim == 4:  # kernels with one row, so that no row of the map sees another
            full = torch.zeros_like(v)
            full[:, :, v.shape[2] // 2] = state[name]
            state[name] = full
    plane.load_state_dict(state)
    x = torch.randn(2, 3, 75)
    with torch.no_grad():
        maps = plane.forward_intermediates(x[:, :, None].expand(-1, -1, 64, -1))  # rows alike: means do not change
        for flat, deep in zip(line.forward_intermediates(x), maps, strict=True):
            assert error(deep, flat[:, :, None].expand_as(deep)) < 1e-5


def test_drop_path_rises_from_the_first_block():
    model = small(drop_path_rate=0.7)
    rates = [b.drop_path.rate for stage in model.stages for b in stage.blocks]
    torch.testing.assert_close(rates, [0.1 * (i + 1) for i in range(7)])


def test_rows_and_published_configurations():
    with pytest.raises(ValueError, match="2 or 4 numbers"):
        small(rows=(((2, 0, 8),),))
    with pytest.raises(ValueError, match="do not divide into 2 heads"):
        small(rows=(((2, 2, 9, 2), (2, 9)),))
    with pytest.raises(ValueError, match="do not divide into 4 heads"):
        small(tokens=(3, 18))
    with torch.device("meta"):
        models = {
            n.removeprefix("mobile_former_"): vertebra.create_model(n) for n in vertebra.list_models("mobile_former_*")
        }
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in models.items()}
    assert counts == {
        "508m": 13976976, "294m": 11422648, "214m": 9425920, "151m": 7595828, "96m": 4585252, "52m": 3469092,
        "26m": 3232788,
    }  # fmt: skip
    for name, model in models.items():
        assert [f["reduction"] for f in model.feature_info] == [4, 8, 16, 32]
        first = model.stages[0].blocks[0]
        assert isinstance(first, FirstBlock) and first.skip == (name not in ("52m", "26m"))
        kinds = [type(stage.blocks[0]) for stage in model.stages[1:]]
        assert kinds == [DownBlock] * 3
    names = set(vertebra.to_official(models["508m"]))
    assert {"features.0.conv.5.weight", "features.11.global_local.proj.weight", "local_global.alpha.0.bias"} <= names
