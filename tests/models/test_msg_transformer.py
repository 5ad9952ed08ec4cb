"""Messenger windows and their exchange against loops, the merge, the head, and what larger images do."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import windows
from vertebra.mixers import MessengerAttention
from vertebra.mixers.messenger import MessengerWindowAttention, region_slots, shuffle_messengers
from vertebra.models.msg_transformer import Merge, MessengerBlock, enter, leave

TINY = "msg_tiny_p4_win7_224"


def small(ndim: int = 2, seed: int = 0, **options):
    torch.manual_seed(seed)
    settings = dict(dim=32, depths=(1, 1, 1, 1), heads=(2, 2, 4, 4), num_classes=5, window=3) | options
    return fill(vertebra.create_model(TINY, ndim=ndim, **settings))


def product(sides):
    return list(itertools.product(*map(range, sides)))


def attention_reference(attn, tokens, real, queries=None):
    """One window (1 + L, C), messenger first, keys only where `real`: each logit's bias looked up on its own."""
    w, heads = attn.window[0], attn.heads
    dim = tokens.shape[-1]
    d = dim // heads
    slots = product(attn.window)
    q, k, v = attn.qkv(tokens).split(dim, -1)
    out = []
    for i in range(len(tokens)) if queries is None else queries:
        parts = []
        for h in range(heads):
            cut = slice(h * d, (h + 1) * d)
            logits = []
            for j in range(len(tokens)):
                if i == 0:
                    bias = attn.messenger[h, 1, 0, 0]  # the messenger asks: one value for all, itself included
                elif j == 0:
                    bias = attn.messenger[h, 0, 0, 0]
                else:
                    row = 0
                    for a, b in zip(slots[i - 1], slots[j - 1], strict=True):
                        row = row * (2 * w - 1) + a - b + w - 1
                    bias = attn.pos.table[row, h]
                logits.append(q[i, cut] @ k[j, cut] * d**-0.5 + bias if real[j] else q.new_tensor(-torch.inf))
            parts.append(torch.stack(logits).softmax(0) @ v[:, cut])
        out.append(attn.proj(torch.cat(parts)))
    return torch.stack(out)


def cut(x, w):
    """(1, *S, C) -> per window its cells (L, C) and which are real, row-major."""
    sides = x.shape[1:-1]
    padded = F.pad(x, [0, 0, *(v for s in reversed(sides) for v in (0, -s % w))])
    for place in product([(s + w - 1) // w for s in sides]):
        at = [tuple(p * w + c for p, c in zip(place, s, strict=True)) for s in product((w,) * len(sides))]
        yield (
            torch.stack([padded[(0, *c)] for c in at]),
            [all(v < s for v, s in zip(c, sides, strict=True)) for c in at],
        )


@pytest.mark.parametrize("sides", [(6, 3), (5, 4), (1, 1), (7,), (3, 2, 4)])
def test_window_attention_with_its_messenger(sides):
    attn = MessengerWindowAttention(len(sides), 8, 2, window=3).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.5)
        x = torch.randn(1, *sides, 8, dtype=torch.float64)
        cells = windows(sides, attn.window)
        messengers = torch.randn(1, cells.number, 8, dtype=torch.float64)
        tokens, kept = enter(x, messengers, attn.window)
        assert kept == sides and torch.equal(leave((tokens, sides), attn.window), x)
        found = attn(tokens, cells)
        for n, (inside, real) in enumerate(cut(x, 3)):
            window = torch.cat([messengers[0, n : n + 1], inside])
            assert torch.equal(window, tokens[0, n])
            assert error(found[0, n], attention_reference(attn, window, [True, *real])) <= 1e-12
        both = torch.cat([tokens, 2 * tokens])  # the mask is repeated for each sample
        assert error(attn(both, cells)[:1], found) <= 1e-12


@pytest.mark.parametrize(("counts", "region"), [((8, 8), 4), ((4, 4), 2), ((2, 6), 2), ((6,), 3), ((4, 2, 2), 2)])
def test_whole_regions_swap_blocks_of_channels(counts, region):
    group, ndim = region ** len(counts), len(counts)
    x = torch.randn(2, *counts, group * 3)
    axes = [v for n in counts for v in (n // region, region)]
    order = [0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1]
    y = x.reshape(2, *axes, -1).permute(order)
    regions = y.reshape(-1, group, group, 3).transpose(1, 2).reshape(y.shape)  # the published view and swap
    want = regions.permute([order.index(i) for i in range(len(order))]).reshape(x.shape)
    got = shuffle_messengers(x.flatten(1, -2), counts, region)
    assert torch.equal(got, want.flatten(1, -2))
    assert not torch.equal(got, x.flatten(1, -2))
    assert torch.equal(shuffle_messengers(got, counts, region), x.flatten(1, -2))  # a swap undoes itself


@pytest.mark.parametrize(("counts", "region"), [((5, 6), 4), ((1, 1), 4), ((3, 2), 2), ((7,), 4), ((3, 2, 1), 2)])
def test_cut_regions_swap_what_they_have(counts, region):
    group, places = region ** len(counts), product(counts)
    x = torch.randn(1, len(places), group * 2)
    want = x.clone().reshape(len(places), group, 2)
    old = want.clone()
    members = product((region,) * len(counts))
    for n, place in enumerate(places):
        here = members.index(tuple(p % region for p in place))
        assert region_slots(counts, region)[n] == here
        for j, member in enumerate(members):
            other = tuple(p - p % region + m for p, m in zip(place, member, strict=True))
            if other in places:
                want[n, j] = old[places.index(other), here]
    got = shuffle_messengers(x, counts, region)
    assert torch.equal(got.reshape(want.shape), want)
    assert torch.equal(got.flatten().sort().values, x.flatten().sort().values)  # nothing lost, nothing twice
    assert torch.equal(got, x) == (counts == (1, 1))


def test_a_block_exchanges_between_attention_and_mlp():
    block = fill(MessengerBlock(2, 16, 2, 3, 2, 4.0, 0.0)).double()
    sides = (6, 9)
    with torch.no_grad():
        state = enter(torch.randn(2, *sides, 16), torch.randn(2, 6, 16), (3, 3))[0].double(), sides
        before = state[0].clone()
        y = state[0] + block.attn(block.norm1(state[0]), windows(sides, (3, 3)))
        y = torch.cat([shuffle_messengers(y[:, :, 0], (2, 3), 2).unsqueeze(2), y[:, :, 1:]], 2)
        found, kept = block(state)
        assert kept == sides and torch.equal(state[0], before)  # the input is not written to
        assert error(found, y + block.mlp(block.norm2(y))) <= 1e-12


def test_gradients_go_through_the_exchange():
    block = fill(MessengerBlock(1, 4, 1, 2, 2, 1.0, 0.0)).double()
    tokens = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: block((t, (3,)))[0], (tokens,))


@pytest.mark.parametrize(
    ("sides", "counts"), [((12, 12), (4, 4)), ((7, 10), (3, 4)), ((13,), (5,)), ((3, 7, 4), (1, 3, 2))]
)
def test_one_convolution_and_norm_merge_cells_and_messengers(sides, counts):
    ndim = len(sides)
    merge = fill(Merge(ndim, 4, 8, 3))
    x, m = torch.randn(2, *sides, 4), torch.randn(2, *counts, 4)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]

    def expected(y):
        z = conv(y.movedim(-1, 1), merge.proj.weight, merge.proj.bias, 2, 1).movedim(1, -1)
        return F.layer_norm(z, (8,), merge.norm.weight, merge.norm.bias)

    with torch.no_grad():
        tokens, below = merge(enter(x, m.flatten(1, -2), (3,) * ndim))
        assert below == tuple((s + 1) // 2 for s in sides)
        assert error(leave((tokens, below), (3,) * ndim), expected(x)) <= 1e-5
        assert error(tokens[:, :, 0], expected(m).flatten(1, -2)) <= 1e-5


def test_learned_messengers_are_shared_by_regions():
    model = small()
    with torch.no_grad():
        tokens, sides = model.embed(torch.randn(2, 96, 72, 3))  # 8 x 6 windows in regions of 4 x 4
    assert sides == (24, 18) and tokens.shape == (2, 48, 10, 32)
    table = model.msg_tokens.detach()[0, :, 0].reshape(4, 4, 32)
    for i, j in product((8, 6)):
        assert torch.equal(tokens[1, 6 * i + j, 0], table[i % 4, j % 4])


def test_the_head_reads_the_mean_of_the_last_messengers():
    model = small()
    for size, number in ((96, 1), (192, 4), (90, 1), (100, 4)):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            state, maps = model.through(model._embed(x), [3])
            messengers = state[0][:, :, 0]
            assert messengers.shape == (1, number, 256)
            want = F.layer_norm(messengers, (256,), model.norm.weight, model.norm.bias).mean(1)
            assert error(model.forward_head(model.forward_features(x), pre_logits=True), want) <= 1e-5
            assert error(model(x), F.linear(want, model.head.weight, model.head.bias)) <= 1e-5
            changed = state[0].clone()
            changed[:, :, 1:] += 1  # cells of the last map do not count
            features = model.finish((changed, state[1]))
            assert error(model.pre_logits(features), want) <= 1e-5
            last, tokens = model.forward_features(x)
            norm = model.norm(maps[3]).movedim(-1, 1)
            assert error(last, norm) <= 1e-6 and tokens.shape == messengers.shape


def standalone_reference(attn: MessengerAttention, x):
    w, region, ndim = attn.window[0], attn.region, len(attn.window)
    parts = list(cut(x, w))
    counts = tuple((s + w - 1) // w for s in x.shape[1:-1])
    members = product((region,) * ndim)
    start = [attn.tokens[members.index(tuple(p % region for p in place))] for place in product(counts)]
    told = []
    for messenger, (inside, real) in zip(start, parts, strict=True):
        window = torch.cat([messenger[None], inside])
        told.append(messenger + attention_reference(attn, window, [True, *real], [0])[0])
    news = shuffle_messengers(torch.stack(told)[None], counts, region)[0]
    padded = torch.zeros(1, *(n * w for n in counts), x.shape[-1], dtype=x.dtype)
    for place, messenger, (inside, real) in zip(product(counts), news, parts, strict=True):
        y = attention_reference(attn, torch.cat([messenger[None], inside]), [True, *real])[1:]
        for slot, row in zip(product(attn.window), y, strict=True):
            padded[(0, *(p * w + c for p, c in zip(place, slot, strict=True)))] = row
    return padded[(slice(None), *(slice(0, s) for s in x.shape[1:-1]))]


@pytest.mark.parametrize("sides", [(4, 6), (5, 3), (7,), (3, 2, 4)])
def test_the_mixer_on_its_own(sides):
    attn = MessengerAttention(len(sides), 8, 2, window=2, region=2).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.5)
        x = torch.randn(1, *sides, 8, dtype=torch.float64)
        assert error(attn(x), standalone_reference(attn, x)) <= 1e-12
        near = x.clone()
        near[0, 2] += 1  # the first window hears of the second
        first = (0,) * (len(sides) + 1)
        assert (attn(near)[first] - attn(x)[first]).abs().max() > 1e-6


def test_configuration_and_names():
    with torch.device("meta"):
        model = vertebra.create_model(TINY)
    assert [s.blocks[0].region for s in model.stages] == [4, 4, 2, 1]
    assert [len(s.blocks) for s in model.stages] == [2, 4, 12, 4]
    assert model.msg_tokens.shape == (1, 16, 1, 64)
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}
    names = {k: tuple(v.shape) for k, v in vertebra.to_official(model).items()}
    assert names["layers.0.downsample.reduction.weight"] == (128, 64, 3, 3)
    assert names["layers.0.blocks.1.attn.rel_pos_msg"] == (2, 2, 1, 1) and "layers.2.downsample.norm.bias" in names
    assert {"msg_tokens", "stages.0.blocks.0.attn.messenger"} <= model.no_weight_decay()
    published = {n: vertebra.model_info(n) for n in vertebra.list_models(family="msg_transformer")}
    assert [i.published["drop_path"] for i in published.values()] == [0.5, 0.3, 0.1]
    assert {i.weights.status for i in published.values()} == {"none"}
    state = vertebra.to_official(small())
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.long)
    assert not vertebra.load_checkpoint(small(seed=1), {"model": state}).unexpected


def test_regions_of_volumes_are_as_large_as_the_channels_allow():
    with torch.device("meta"):
        volume = vertebra.create_model("msg_small_p4_win7_224", ndim=3)
        line = vertebra.create_model("msg_small_p4_win7_224", ndim=1)
    assert [s.blocks[0].region for s in volume.stages] == [2, 4, 2, 1]  # 4^3 = 64 divides 192 but not 96
    assert [s.blocks[0].region for s in line.stages] == [4, 4, 2, 1]
    assert volume.msg_tokens.shape == (1, 8, 1, 96) and line.msg_tokens.shape == (1, 4, 1, 96)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: vertebra.create_model(TINY, dim=24, heads=(2, 2, 2, 2)), "24 channels"),
        (lambda: vertebra.create_model(TINY, window=0), "window"),
        (lambda: MessengerAttention(2, 8, 3), "3 heads"),
        (lambda: MessengerAttention(2, 8, 2, region=0), "region"),
        (lambda: MessengerAttention(3, 32, 2, region=4), "4\\^3 blocks"),
    ],
)
def test_impossible_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
