"""Focal attention against loops over windows and keys, the surround against rolled maps, and the quirks as numbers."""

from __future__ import annotations

import itertools
import sys
import zlib

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.mixers import FocalAttention, FocalFastAttention
from vertebra.mixers.focal import focal_keys, nearest_sets, surround

TINY, CONV = "focal_tiny_patch4_window7_224", "focal_tiny_useconv_patch4_window7_224"
FAST = "focalv2_tiny_useconv_patch4_window7_224"


def small(name: str = TINY, ndim: int = 2, seed: int = 0, **options):
    torch.manual_seed(seed)
    settings = dict(dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4), num_classes=5, window=3, img_size=64) | options
    if name != FAST:
        settings = dict(expand=1, focals=(3, 3, 1, 1)) | settings
    return fill(vertebra.create_model(name, ndim=ndim, **settings))


def product(sides):
    return list(itertools.product(*map(range, sides)))


def published_surround(w: int, e: int) -> list[tuple[int, int]]:
    """tl, tr, bl, br of the official code: a map of cell names rolled, cut, and the middle window's slots chosen."""
    n = 3 * w
    names = torch.arange(n * n).reshape(n, n)
    keep = {"tl": torch.ones(w, w), "tr": torch.ones(w, w), "bl": torch.ones(w, w), "br": torch.ones(w, w)}
    keep["tl"][: w - e, : w - e] = 0
    keep["tr"][: w - e, e:] = 0
    keep["bl"][e:, : w - e] = 0
    keep["br"][e:, e:] = 0
    found = []
    for corner, shift in (("tl", (-e, -e)), ("tr", (-e, e)), ("bl", (e, -e)), ("br", (e, e))):
        window = names.roll(shift, (0, 1))[w : 2 * w, w : 2 * w]
        for name in window[keep[corner] > 0].tolist():
            found.append((name // n - w, name % n - w))
    return found


@pytest.mark.parametrize(("window", "expand"), [(7, 3), (4, 2), (6, 3), (3, 1), (5, 1)])
def test_the_surround_is_that_of_four_rolled_maps(window, expand):
    assert surround((window, window), expand) == published_surround(window, expand)


def test_the_surround_at_every_rank():
    plane = surround((7, 7), 3)
    assert len(plane) == 132 and len(set(plane)) == 120  # 12 cells come twice
    twice = {c for c in plane if plane.count(c) == 2}
    assert all(3 in c for c in twice)  # level with the middle row or column of the window
    assert surround((7,), 3) == [(7,), (8,), (9,), (-3,), (-2,), (-1,)]
    volume = surround((3, 3, 3), 1)
    ring = {c for c in itertools.product(range(-1, 4), repeat=3) if any(not 0 <= v < 3 for v in c)}
    assert len(volume) == 8 * (27 - 8) and set(volume) == ring


def focal_reference(attn: FocalAttention, x):
    """Window by window: own cells, the ring with wrap-around, summaries with zeros and -100 beyond the map."""
    (w, *_), e, f, ndim = attn.window, attn.expand, attn.focal, len(attn.window)
    heads, dim = attn.heads, x.shape[-1]
    sides = x.shape[1:-1]
    x = F.pad(x, [0, 0, *(v for s in reversed(sides) for v in (0, -s % w))])
    padded = x.shape[1:-1]
    counts = [s // w for s in padded]
    qkv, slots = attn.qkv(x), product((w,) * ndim)
    summary = {}
    for place in product(counts):
        cells = [x[(0, *(p * w + c for p, c in zip(place, slot, strict=True)))] for slot in slots]
        total = sum(a * c for a, c in zip(attn.pool.weight[0], cells, strict=True)) + attn.pool.bias
        summary[place] = attn.qkv(total)
    ring = []
    for signs in itertools.product((1, -1), repeat=ndim) if e else ():
        for slot in slots:
            cell = [c + s * e for c, s in zip(slot, signs, strict=True)]
            if not all(0 <= c < w for c in cell):
                ring.append(cell)
    patch = product((f,) * ndim)
    out = torch.zeros_like(x)
    for place in product(counts):
        q = torch.stack([qkv[(0, *(p * w + c for p, c in zip(place, s, strict=True)))] for s in slots])[:, :dim]
        keys, bias = [], []
        for k in slots:
            keys.append(qkv[(0, *(p * w + c for p, c in zip(place, k, strict=True)))])
            rows = []
            for s in slots:
                row = 0
                for a, b in zip(s, k, strict=True):
                    row = row * (2 * w - 1) + a - b + w - 1
                rows.append(attn.pos.table[row])
            bias.append(torch.stack(rows))
        for n, c in enumerate(ring):
            keys.append(qkv[(0, *((p * w + v) % s for p, v, s in zip(place, c, padded, strict=True)))])
            bias.append(attn.around[0, :, :, n].t())
        for k in patch:
            other = tuple(p + v - f // 2 for p, v in zip(place, k, strict=True))
            real = other in summary
            keys.append(summary[other] if real else torch.zeros(3 * dim, dtype=x.dtype))
            columns = []
            for s in slots:
                column = 0
                for a, b in zip(s, k, strict=True):
                    column = column * (w + f - 1) + a - b + f - 1
                columns.append(attn.far[:, column])
            bias.append(torch.stack(columns) - (0 if real else 100))
        kv = torch.stack(keys)
        key, value = kv[:, dim : 2 * dim], kv[:, 2 * dim :]
        d = dim // heads
        parts = []
        for h in range(heads):
            cut = slice(h * d, (h + 1) * d)
            logits = q[:, cut] @ key[:, cut].t() * d**-0.5 + torch.stack(bias, 1)[:, :, h]
            parts.append(logits.softmax(-1) @ value[:, cut])
        y = attn.proj(torch.cat(parts, -1))
        for slot, row in zip(slots, y, strict=True):
            out[(0, *(p * w + c for p, c in zip(place, slot, strict=True)))] = row
    return out[(slice(None), *(slice(0, s) for s in sides))]


@pytest.mark.parametrize(
    ("sides", "window", "expand", "focal"),
    [
        ((8, 12), 4, 2, 3),  # windows that fit
        ((10, 7), 4, 1, 5),  # padded; more summaries asked for than there are
        ((2, 3), 4, 2, 3),  # one window, which surrounds itself
        ((4, 8), 4, 0, 1),  # no rim, its own summary: the last published stage
        ((11,), 3, 1, 3),
        ((4, 5, 3), 2, 1, 3),
    ],
)
def test_focal_attention_is_that_of_its_windows(sides, window, expand, focal):
    torch.manual_seed(0)
    attn = FocalAttention(len(sides), 12, 2, window, expand, focal).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.4)
        x = 3 * torch.randn(1, *sides, 12, dtype=torch.float64)
        assert error(attn(x), focal_reference(attn, x)) <= 1e-12
        both = torch.cat([x, x.flip(1)])
        assert error(attn(both)[:1], attn(x)) <= 1e-12


def test_keys_outside_are_zero_vectors_at_minus_100_and_not_shut_out():
    """With logits far below -100 the empty keys win, as they do in the published network."""
    attn = fill(FocalAttention(2, 8, 1, 2, 0, 3)).double()
    with torch.no_grad():
        attn.qkv.weight.zero_()
        attn.qkv.bias.copy_(torch.cat([torch.full((8,), 20.0), torch.full((8,), -20.0), torch.ones(8)]))
        attn.pos.table.zero_(), attn.far.zero_()
        x = torch.zeros(1, 2, 2, 8, dtype=torch.float64)  # logits of real keys: -400 * 8^0.5
        assert error(attn(x), attn.proj(torch.zeros_like(x))) <= 1e-12


def test_a_window_reads_a_constant_number_of_keys():
    for n in (8, 16):
        rows, mask = focal_keys((n, n), (7, 7), 3, 7)
        assert rows.numel() == n * n * (49 + 132 + 49) and mask.shape == (n * n, 230)
        assert rows.max() == n * n * 50  # the one empty row after 49 cells and one summary for each window


def fast_reference(attn: FocalFastAttention, x, sets=None):
    """Each query against the sets of its window; the MLPs run on every pair."""
    w, heads, dim = attn.window[0], attn.heads, x.shape[-1]
    sides = x.shape[1:-1]
    d = dim // heads
    fine, coarse = sets or nearest_sets(sides, attn.window, attn.top)
    real, slots = product(sides), product(attn.window)
    places = product([(s + w - 1) // w for s in sides])
    padded = F.pad(x, [0, 0, *(v for s in reversed(sides) for v in (0, -s % w))])
    inside = [
        torch.stack([padded[(0, *(p * w + c for p, c in zip(place, s, strict=True)))] for s in slots])
        for place in places
    ]
    summaries = [attn.qkv((attn.pool.weight[0][:, None] * cells).sum(0) + attn.pool.bias) for cells in inside]
    out = torch.zeros_like(x)
    for n, place in enumerate(places):
        for slot, token in zip(slots, inside[n], strict=True):
            here = tuple(p * w + c for p, c in zip(place, slot, strict=True))
            if here not in real:
                continue
            q = attn.qkv(token)[:dim]
            keys, bias = [], []
            for i in fine[n].tolist():
                keys.append(attn.qkv(x[(0, *real[i])]))
                bias.append(attn.offsets[0](x.new_tensor([a - b for a, b in zip(here, real[i], strict=True)])))
            for i in coarse[n].tolist():
                centre = [w * p + w // 2 for p in places[i]]
                keys.append(summaries[i])
                bias.append(attn.offsets[1](x.new_tensor([a - b for a, b in zip(here, centre, strict=True)])))
            kv, b = torch.stack(keys), torch.stack(bias)
            parts = []
            for h in range(heads):
                cut = slice(h * d, (h + 1) * d)
                weights = (kv[:, dim : 2 * dim][:, cut] @ q[cut] * d**-0.5 + b[:, h]).softmax(0)
                parts.append(weights @ kv[:, 2 * dim :][:, cut])
            out[(0, *here)] = attn.proj(torch.cat(parts))
    return out


@pytest.mark.parametrize(
    ("sides", "window", "top"), [((6, 9), 3, 10), ((7, 5), 3, 4), ((2, 2), 3, 9), ((14,), 4, 5), ((3, 4, 5), 2, 7)]
)
def test_fast_attention_is_that_of_its_sets(sides, window, top):
    torch.manual_seed(0)
    attn = FocalFastAttention(len(sides), 8, 2, window, top).double()
    with torch.no_grad():
        for p in attn.parameters():
            p.normal_(std=0.4)
        x = torch.randn(1, *sides, 8, dtype=torch.float64)
        assert error(attn(x), fast_reference(attn, x)) <= 1e-12


@pytest.mark.parametrize("sides", [(20, 13), (37,), (6, 7, 5)])
def test_sets_hold_the_nearest(sides):
    w, top = 4, 9
    fine, coarse = nearest_sets(sides, (w,) * len(sides), top)
    places = torch.tensor(product([(s + w - 1) // w for s in sides])).double()
    for found, points, centres in (
        (fine, torch.tensor(product(sides)).double(), places * w + 2),
        (coarse, places, places),
    ):
        distance = torch.cdist(centres, points)
        assert found.shape == (len(places), min(top, len(points)))
        assert all(len(set(row)) == len(row) for row in found.tolist())
        chosen = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, found, True)
        nearest_left = distance.masked_fill(chosen, 1e9).amin(1)
        assert (distance.masked_fill(~chosen, 0).amax(1) <= nearest_left + 1e-12).all()


# crc32 of the sets in the official files at 224 pixels, sorted, as little-endian int32: 56, 28, 14 and 7 cells per axis
OFFICIAL_SETS = {56: 3676319793, 28: 4171481968, 14: 1845573459, 7: 3400614844}


@pytest.mark.skipif(sys.platform != "linux", reason="ties fall as the C++ library's partial sort lets them")
@pytest.mark.parametrize("side", OFFICIAL_SETS)
def test_ties_fall_as_in_the_official_files(side):
    fine, coarse = nearest_sets((side, side), (7, 7), 128)
    assert zlib.crc32(fine.sort(-1).values.numpy().astype("<i4").tobytes()) == OFFICIAL_SETS[side]
    assert torch.equal(coarse.sort(-1).values, torch.arange((side // 7) ** 2).expand((side // 7) ** 2, -1))
    if side == 56:  # there is something to settle: lower indices first gives other sets
        cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
        centres = torch.cartesian_prod(torch.arange(8), torch.arange(8)) * 7.0 + 3
        square = (centres[:, None] - cells[None]).square().sum(-1)
        stable = square.sort(dim=1, stable=True).indices[:, :128].sort(-1).values
        assert (stable != fine.sort(-1).values).any(1).sum() > 32


def with_sets(model, change: bool):
    """The official state dict with the sets of each block; `change`: in each a nearer cell replaced by a far one."""
    state = vertebra.to_official(model)
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            fine, coarse = nearest_sets(model.grids[i], block.attn.window, block.attn.top)
            if change and fine.shape[1] < model.grids[i][0] ** 2:
                for row in fine:
                    row[0] = next(n for n in range(10**6) if n not in row)
            state[f"layers.{i}.blocks.{j}.attn.topk_cloest_indice_0"] = fine.int()
            state[f"layers.{i}.blocks.{j}.attn.topk_cloest_indice_1"] = coarse.int()
            state[f"layers.{i}.blocks.{j}.attn.topk_cloest_coords_0"] = torch.zeros(1)
            state[f"layers.{i}.blocks.{j}.attn.window_coords"] = torch.zeros(3, 3, 2)
    return state


def test_sets_of_a_file_are_used_at_its_size():
    options = dict(top=10, window=2)
    model = small(FAST, **options)
    x, other = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 96, 64)
    same, changed, wider = (small(FAST, seed=1, img_size=size, **options) for size in (64, 64, 128))
    with torch.no_grad():
        own, elsewhere = model(x), model(other)
        assert not vertebra.load_checkpoint(same, with_sets(model, False)).unexpected
        vertebra.load_checkpoint(changed, with_sets(model, True))
        assert same.stages[0].blocks[0].attn.grid == (16, 16)
        assert torch.equal(same(x), own) and torch.equal(same(other), elsewhere)
        assert error(changed(x), own) > 1e-3 and torch.equal(changed(other), elsewhere)
        vertebra.load_checkpoint(wider, with_sets(model, True))  # built for another size: sets are searched
        assert wider.stages[0].blocks[0].attn.grid is None and torch.equal(wider(x), own)
    assert set(changed.state_dict()) == set(model.state_dict())  # they are no weights
    attn = changed.stages[0].blocks[0].attn.double()
    y = torch.randn(1, 16, 16, 16, dtype=torch.float64)
    fine, coarse = nearest_sets((16, 16), (2, 2), 10)
    assert (attn.fine != fine).any(1).all()
    with torch.no_grad():
        assert error(attn(y), fast_reference(attn, y, (attn.fine, coarse))) <= 1e-12
    sets = [s.flip(1) for s in nearest_sets((8, 8), (2, 2), 10)]
    same.adopt({f"layers.1.topk_cloest_indice_{i}": s for i, s in enumerate(sets)})  # one for a stage's blocks
    assert torch.equal(same.stages[1].blocks[0].attn.fine, sets[0])


def test_windows_and_rims_follow_the_built_size_by_its_smaller_side():
    def facts(name=TINY, **options):
        with torch.device("meta"):
            model = vertebra.create_model(name, **options)
        return [(s.blocks[0].attn.window[0], getattr(s.blocks[0].attn, "expand", None)) for s in model.stages]

    full = (7, 3)
    assert facts() == facts(img_size=(448, 224)) == facts(features_only=True) == [full, full, full, (7, 0)]
    assert facts(img_size=448) == [full] * 4
    assert facts(img_size=(256, 192)) == [full, full, full, (6, 0)]
    assert facts(img_size=96) == [full, full, (6, 0), (3, 0)]
    assert facts(FAST, img_size=192)[3] == (6, None)
    with torch.device("meta"):
        model = vertebra.create_model(TINY)
    assert [s.blocks[0].attn.focal for s in model.stages] == [7, 5, 3, 1]
    shapes = {k: tuple(v.shape) for k, v in vertebra.to_official(model).items()}
    assert shapes["layers.0.blocks.1.attn.relative_position_bias_table_to_neighbors"] == (1, 3, 49, 132)
    assert shapes["layers.1.blocks.0.attn.relative_position_bias_table_to_windows.0"] == (6, 121)
    assert shapes["layers.3.blocks.0.pool_layers.0.weight"] == (1, 49)
    assert not any("layers.3" in k and "neighbors" in k for k in shapes)


@pytest.mark.parametrize(("name", "kernels"), [(TINY, (4, 2)), (CONV, (7, 3)), (FAST, (7, 3))])
def test_embeddings_are_convolutions_with_bias_then_a_norm(name, kernels):
    model = small(name)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for down, kernel, stride in ((model.patch_embed, kernels[0], 4), (model.stages[1].down, kernels[1], 2)):
            y = x if stride == 4 else torch.randn(1, 16, 8, 12)
            weight, bias = down.proj.weight, down.proj.bias
            want = F.conv2d(y, weight, bias, stride, {7: 2, 3: 1, 4: 0, 2: 0}[kernel]).movedim(1, -1)
            want = F.layer_norm(want, want.shape[-1:], down.norm.weight, down.norm.bias)
            assert weight.shape[2:] == (kernel, kernel) and error(down(y.movedim(1, -1)), want) <= 1e-5
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-5}


def test_starting_values():
    model = vertebra.create_model(TINY, dim=16, depths=(1, 1, 1, 1), heads=(1, 2, 2, 4))
    attn = model.stages[0].blocks[0].attn
    assert attn.pos.table.abs().max() == 0 and 0 < attn.around.std() < 0.03 and 0 < attn.far.std() < 0.03
    assert not attn.pool.weight.eq(1 / 49).any() and attn.pool.bias.item() == 0  # as published: overwritten by 0.02
    assert torch.allclose(FocalAttention(1, 8, 1, 5).pool.weight, torch.tensor(0.2))
    decay = model.no_weight_decay()
    assert {"stages.0.blocks.0.attn.around", "stages.3.blocks.0.attn.far", "stages.1.blocks.0.attn.pos.table"} <= decay


def test_published_rates_and_dense_norms():
    rates = {n: vertebra.model_info(n).published["drop_path"] for n in vertebra.list_models(family="focal_transformer")}
    assert len(rates) == 9
    assert {n.split("_")[1]: r for n, r in rates.items()} == {"tiny": 0.2, "small": 0.3, "base": 0.5}
    model, dense = small(), small(features_only=True, seed=1)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"norm{i}.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    x = torch.randn(1, 3, 50, 64)
    with torch.no_grad():
        for norm, ours, raw in zip(dense.output_norms, dense(x), model.forward_intermediates(x), strict=True):
            assert error(ours, norm(raw.movedim(1, -1)).movedim(-1, 1)) <= 1e-6


def test_constants_of_official_files_are_dropped():
    model = small()
    state = vertebra.to_official(model) | {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long),
        "layers.0.blocks.0.attn.relative_position_index_0": torch.zeros(9, 9, dtype=torch.long),
        "layers.0.blocks.0.attn.valid_ind_rolled": torch.zeros(20, dtype=torch.long),
    }
    report = vertebra.load_checkpoint(small(seed=1), {"model": state})
    assert report.naming == "official" and not report.unexpected and not report.missing


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FocalAttention(2, 8, 3), "3 heads"),
        (lambda: FocalAttention(2, 8, 2, window=0), "window"),
        (lambda: FocalAttention(2, 8, 2, window=3, expand=4), "expand"),
        (lambda: FocalAttention(2, 8, 2, focal=4), "odd"),
        (lambda: FocalFastAttention(2, 8, 2, top=0), "top"),
        (lambda: vertebra.create_model(TINY, img_size=0), "img_size"),
    ],
)
def test_impossible_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
