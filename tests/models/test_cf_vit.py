"""CF-ViT: both runs written out plainly for both backbones, the selection, early exit, and the quirks as numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill

import vertebra
from vertebra.layers import record_attention, resize
from vertebra.models.cf_vit import ClassRowAttention
from vertebra.tasks import CoarseToFineLoss

DEIT, LV = "cf_deit_small", "cf_lvvit_small"


def small(name=DEIT, **options):
    settings = dict(dim=32, depth=5, heads=2, num_classes=7, img_size=64) | options
    torch.manual_seed(options.get("depth", 5))
    return fill(vertebra.create_model(name, **settings))


# --- the paper written out: one image, whole attention maps, loops over patches ---------------------------------------


def run_blocks(model, tokens, lv):
    """Tokens (L, C) through all blocks -> normed tokens, running average of whole attention maps (heads, L, L)."""
    total = 0.0
    for i, stage in enumerate(model.stages):
        block = stage.blocks[0]
        z, heads = block.norm1(tokens), block.attn.heads
        q, k, v = block.attn.qkv(z).reshape(len(z), 3, heads, -1).permute(1, 2, 0, 3)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        part = 2 if lv else 1
        tokens = tokens + block.attn.proj((weights @ v).movedim(0, 1).flatten(1)) / part
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens)))) / part
        if i >= 3:
            total = 0.99 * total + 0.01 * weights
    return model.norm(tokens), total


def answer(model, tokens, lv, divide):
    logits = model.head(tokens[0])
    if lv:
        logits = logits + 0.25 * model.aux_head(tokens[1:]).amax(0)
    return logits / divide


def by_hand(model, x, lv):
    """The four outputs for one image (3, H, W) whose sides are multiples of 32."""
    patches = lambda image: model.patch_embed(image.movedim(1, -1))[0]  # noqa: E731
    _, height, width = x.shape
    half = F.interpolate(x[None], (height // 2, width // 2), mode="bilinear", align_corners=True)
    small_map, large_map = patches(half), patches(x[None])
    rows, columns, dim = small_map.shape
    token = model.cls_token[0]
    embedded = torch.cat([token, small_map.flatten(0, 1)]) + model.pos_embed[0]((rows, columns))[0]
    normed, attention = run_blocks(model, embedded, lv)
    reuse = model.reuse_block(normed[1:]).reshape(rows, columns, dim)
    table = model.pos_embed[1]((2 * rows, 2 * columns))[0]
    added = table if model.full_positions else torch.zeros_like(table)
    cells = large_map.clone()
    for r in range(2 * rows):
        for c in range(2 * columns):
            cells[r, c] += reuse[r // 2, c // 2]
    everything = torch.cat([token, cells.flatten(0, 1)])
    full, _ = run_blocks(model, everything + added, lv)

    score = attention[:, 0, 1:].mean(0)
    best = sorted(range(rows * columns), key=lambda p: -score[p].item())
    count = math.ceil(0.5 * rows * columns)
    chosen, rest = best[:count], best[count:]
    sequence = [(token + table[:1])[0]]
    for dr, dc in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the official order: a corner of all, then the next
        for p in chosen:
            r, c = 2 * (p // columns) + dr, 2 * (p % columns) + dc
            sequence.append(cells[r, c] + table[1 + r * 2 * columns + c])
    sequence += [embedded[1 + p] for p in rest]
    fine, _ = run_blocks(model, torch.stack(sequence), lv)
    coarse_logits = answer(model, normed, lv, 1.25 if lv else 1)
    fine_logits = answer(model, fine, lv, 1)
    sure = coarse_logits.softmax(0).max() >= model.threshold
    return {
        "logits": fine_logits,
        "coarse_logits": coarse_logits,
        "full_fine_logits": answer(model, full, lv, 1),
        "early_exit_logits": coarse_logits if sure else fine_logits,
    }


@pytest.mark.parametrize("name", [DEIT, LV])
@pytest.mark.parametrize("sides", [(64, 64), (96, 160)])
@torch.no_grad()
def test_both_runs_by_hand(name, sides):
    """The second size is off the built one and has an odd number of coarse patches, so their half is rounded up."""
    lv = name == LV
    model = small(name)
    x = torch.randn(2, 3, *sides)
    confidence = model.forward_outputs(x)["coarse_logits"].softmax(-1).amax(-1)
    model.threshold = confidence.mean().item()  # one of the two leaves early
    found = model.forward_outputs(x)
    for b in range(2):
        for key, expected in by_hand(model, x[b], lv).items():
            assert error(found[key][b], expected) <= 2e-6, key
    assert error(model(x), found["logits"]) == 0


@pytest.mark.parametrize("name", [DEIT, LV])
@torch.no_grad()
def test_early_exit_refines_the_unsure_only(name):
    model = small(name)
    x = torch.randn(5, 3, 70, 64)
    confidence = model.forward_outputs(x)["coarse_logits"].softmax(-1).amax(-1)
    seen = []
    hook = model.norm.register_forward_hook(lambda module, inputs, y: seen.append(tuple(y.shape[:2])))
    for unsure in (0, 2, 5):
        ordered = confidence.sort()[0].tolist()
        threshold = 0.0 if unsure == 0 else 1.0 if unsure == 5 else (ordered[unsure - 1] + ordered[unsure]) / 2
        model.threshold = threshold
        seen.clear()
        saving = model.early_exit(x)
        assert [batch for batch, _ in seen] == [5, unsure][: 1 + bool(unsure)]
        static = model.forward_outputs(x)
        assert error(saving, static["early_exit_logits"]) <= 1e-6
        same = (static["early_exit_logits"] == static["coarse_logits"]).all(1)
        assert same.sum() == 5 - unsure
        model.threshold = 1.0
        assert error(model.early_exit(x, threshold), saving) <= 1e-6
    hook.remove()


@torch.no_grad()
def test_threshold_one_never_leaves_early():
    model = small()
    model.head.bias[0] = 1000.0  # a probability of exactly one
    found = model.forward_outputs(x := torch.randn(2, 3, 64, 64))
    assert (found["coarse_logits"].softmax(-1).amax(-1) == 1).all()
    assert torch.equal(found["early_exit_logits"], found["logits"])
    assert error(model.early_exit(x), found["logits"]) <= 1e-6
    assert torch.equal(model.early_exit(x, 0.999), found["coarse_logits"])


@pytest.mark.parametrize(("size", "coarse", "fine"), [(224, 50, 125), (288, 82, 205)])
@torch.no_grad()
def test_token_counts_of_the_published_models(size, coarse, fine):
    """1 + 49, then 1 + 4 * 25 + 24; for 288 pixels 1 + 81, then 1 + 4 * 41 + 40."""
    model = small(img_size=size, depth=1)
    tokens, first, place = model.forward_features(torch.randn(1, 3, size, size))
    assert (tokens.shape[1], first.shape[1], place.shape[1]) == (fine, coarse, (size // 16) ** 2)


def test_published_configurations():
    for name, params in ((DEIT, 23_252_200), (LV, 27_058_064)):
        counts = []
        for size in (224, 288):
            with torch.device("meta"):
                model = vertebra.create_model(name, img_size=size)
            counts.append(sum(p.numel() for p in model.parameters()))
        # 32 more coarse and 128 more fine positions
        assert counts == [params, params + 160 * 384]
        assert round(counts[1] / 1e6, 2) == vertebra.model_info(name).published["params_m_288"]
    for name, eps, bias in ((DEIT, 1e-6, True), (LV, 1e-5, False)):
        model = small(name)
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}
        assert (model.stages[0].blocks[0].attn.qkv.bias is not None) == bias


@torch.no_grad()
def test_class_row_is_the_recorded_map():
    attn = fill(ClassRowAttention(32, 4))
    x = torch.randn(2, 6, 32)
    with record_attention() as maps:
        recorded, row = attn(x, row=True)
    assert error(row, maps[0][:, :, 0].mean(1)) <= 1e-6
    plain, nothing = attn(x)
    assert nothing is None and error(plain, recorded) <= 1e-6


@torch.no_grad()
def test_without_selection_all_fine_patches_are_read():
    """The DeiT models then go without positions (the official slip), unless told otherwise; the LV models have them."""
    x = torch.randn(1, 3, 64, 64)
    for name, options, positions in ((DEIT, {}, False), (DEIT, dict(full_positions=True), True), (LV, {}, True)):
        model = small(name, select=False, **options)
        before = model.forward_outputs(x)
        assert torch.equal(before["logits"], before["full_fine_logits"])
        assert model.forward_features(x)[0].shape[1] == 17
        model.pos_embed[1].table.normal_()
        moved = not torch.equal(model(x), before["logits"])
        assert moved == positions
        model.select = True  # a switch for training
        assert (error(model.forward_outputs(x)["full_fine_logits"], before["logits"]) > 1e-3) == positions
        assert model.forward_features(x)[0].shape[1] == 1 + 4 * 2 + 2


@pytest.mark.parametrize("ndim", [1, 2, 3])
@torch.no_grad()
def test_every_cell_is_stood_for(ndim):
    """What `place` points at: a fine cell's own token where its patch was split, else its patch's coarse embedding."""
    model = small(ndim=ndim)
    sides = (96, 64, 64)[:ndim]
    image = torch.randn(1, *sides, 3)
    normed, embedded, score = model.coarse(image)
    state = model.fine(image, normed, embedded, score, True)
    full = model.fine(image, normed, embedded, score, False)
    grid, coarse = [s // 16 for s in sides], [s // 32 for s in sides]
    kept = set(score[0].argsort(descending=True)[: math.ceil(math.prod(coarse) / 2)].tolist())
    table = model.pos_embed[1](tuple(grid))[0, 1:]
    for cell in range(math.prod(grid)):
        rest, patch, step = cell, 0, 1
        for g, c in zip(reversed(grid), reversed(coarse), strict=True):
            rest, at = divmod(rest, g)
            patch, step = patch + at // 2 * step, step * c
        found = state.tokens[0, 1 + state.place[0, cell]]
        expected = embedded[0, 1 + patch]
        if patch in kept:
            expected = full.tokens[0, 1 + full.place[0, cell]] + table[cell]
        assert error(found, expected) <= 1e-6
    assert state.tokens.shape[1] == 1 + 2**ndim * len(kept) + math.prod(coarse) - len(kept)


@torch.no_grad()
def test_maps_of_a_ragged_image():
    model = small()
    maps = model.forward_intermediates(torch.randn(2, 3, 50, 90))
    assert [tuple(m.shape) for m in maps] == [(2, 32, 4, 6)] * 5


@torch.no_grad()
def test_every_patch_is_labelled():
    """aux_logits: the second head on each fine cell, a patch that stayed coarse four times."""
    model = small(LV)
    x = torch.randn(1, 3, 64, 96)
    found = model.forward_outputs(x)
    tokens, _, place = model.forward_features(x)
    torch.testing.assert_close(found["class_logits"], model.head(tokens[:, 0]))
    rows = torch.stack([model.aux_head(tokens[0, 1 + p]) for p in place[0].tolist()])
    torch.testing.assert_close(found["aux_logits"][0], rows)
    best = found["class_logits"] + 0.25 * found["aux_logits"].amax(1)
    torch.testing.assert_close(found["logits"], best)
    model.reset_classifier(3)
    assert model.forward_outputs(x)["aux_logits"].shape == (1, 24, 3)


@pytest.mark.parametrize("select", [True, False])
def test_training_step(select):
    """Training leaves the third run out; the loss reaches both runs."""
    model = small(select=select).train()
    found = model.forward_outputs(torch.randn(2, 3, 64, 64))
    assert ("full_fine_logits" in found) == (not select)
    CoarseToFineLoss()(found, torch.tensor([0, 1])).backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert unused == ([] if select else ["pos_embed.1.table"])  # the slip of the DeiT models


def test_resizing_with_aligned_corners():
    x = torch.randn(2, 12, 3)
    expected = torch.empty(2, 6, 3)
    for i in range(6):
        at = i * 11 / 5
        low = min(int(at), 10)
        expected[:, i] = x[:, low] * (low + 1 - at) + x[:, low + 1] * (at - low)
    assert error(resize(x, (6,), align_corners=True), expected) <= 1e-6
    for sides in ((8, 12), (4, 6, 8)):
        x = torch.randn(1, *sides, 2)
        mode = {2: "bilinear", 3: "trilinear"}[len(sides)]
        half = [s // 2 for s in sides]
        theirs = F.interpolate(x.movedim(-1, 1), half, mode=mode, align_corners=True).movedim(1, -1)
        assert error(resize(x, half, align_corners=True), theirs) <= 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(features_only=True), "no dense version"),
        (dict(alpha=0.0), "alpha"),
        (dict(threshold=-0.1), "threshold"),
        (dict(depth=0), "depth"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_early_exit_needs_classes():
    with pytest.raises(ValueError, match="num_classes"):
        small(num_classes=0).early_exit(torch.randn(1, 3, 64, 64))
