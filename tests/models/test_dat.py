"""DAT and DAT++ against their rules written out plainly, and their quirks as numbers."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import error, fill
from torch import nn

import vertebra
from vertebra.mixers import DeformableAttention, NeighborhoodAttention, WindowAttention

COUNTS = {
    "dat_tiny": 28_319_138,
    "dat_small": 49_700_402,
    "dat_base": 87_881_632,
    "dat_base_384": 88_178_272,
    "dat_pp_tiny": 23_962_876,
    "dat_pp_small": 53_127_366,
    "dat_pp_base": 93_690_640,
    "dat_pp_base_384": 94_119_440,
}
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def small(name: str = "dat_tiny", ndim: int = 2, **options):
    settings = dict(dims=(8, 16, 24, 32), depths=(2, 1, 2, 1), heads=(2, 2, 3, 4), groups=(1, 2, 3, 2), num_classes=7)
    return fill(vertebra.create_model(name, ndim=ndim, **(settings | options)))


def hats(places, sides):
    """Linear interpolation as weights: places (..., ndim), -1 and 1 on the outermost cells -> (..., *sides).

    A cell counts 1 - its distance along each axis; what lies outside of the map is zero.
    """
    ndim = len(sides)
    total: torch.Tensor | float = 1.0
    for d, side in enumerate(sides):
        distance = ((places[..., d, None] + 1) / 2 * (side - 1) - torch.arange(side)).abs()
        shape = [*places.shape[:-1], *(side if axis == d else 1 for axis in range(ndim))]
        total = total * (1 - distance).clamp(min=0).reshape(shape)
    return total


def regular(sides, value):
    """(cells, ndim) of value(index, side) per axis."""
    grids = [torch.tensor([value(i, s) for i in range(s)]) for s in sides]
    return torch.stack(torch.meshgrid(*grids, indexing="ij"), -1).flatten(0, -2)


def plain_deformable(mixer, x, stride, plus):
    """One sample, one group, one head at a time; sampling by explicit weights of every cell."""
    batch, *sides, dim = x.shape
    ndim, groups, heads = len(sides), mixer.groups, mixer.heads
    wide, width, per = dim // groups, dim // heads, heads // groups
    down, norm, _, up = mixer.conv_offset

    def project(t, m):
        return t @ m.weight.flatten(1).t() + m.bias

    q, out = project(x, mixer.proj_q), torch.zeros_like(x)
    for b in range(batch):
        seen, bias = [], []
        for g in range(groups):
            part = slice(g * wide, (g + 1) * wide)
            moved = q[b : b + 1, ..., part].movedim(-1, 1)
            moved = CONV[ndim](moved, down.weight, down.bias, stride, down.weight.shape[-1] // 2, groups=wide)
            moved = F.gelu(F.layer_norm(moved.movedim(1, -1), (wide,), norm.weight, norm.bias))
            few = moved.shape[1:-1]
            offsets = (moved @ up.weight.flatten(1).t()).flatten(0, -2)
            if plus:
                places = (offsets + regular(few, lambda i, s: 2 * (i + 0.5) / (s - 1) - 1)).clamp(-1, 1)
                cells = regular(sides, lambda i, s: 2 * i / (s - 1) - 1)
            else:
                places = offsets.tanh() * 2 / torch.tensor(few) + regular(few, lambda i, s: 2 * (i + 0.5) / s - 1)
                cells = regular(sides, lambda i, s: 2 * (i + 0.5) / s - 1)
            seen.append(hats(places, sides).flatten(1) @ x[b, ..., part].flatten(0, -2))
            table = mixer.table[g * per : (g + 1) * per]
            bias.append(hats((cells[:, None] - places) / 2, table.shape[1:]).flatten(2) @ table.flatten(1).t())
        k, v = (project(torch.cat(seen, -1), m) for m in (mixer.proj_k, mixer.proj_v))
        for h, one in enumerate(torch.cat(bias, -1).unbind(-1)):
            s = slice(h * width, (h + 1) * width)
            weights = (q[b, ..., s].flatten(0, -2) @ k[:, s].t() * width**-0.5 + one).softmax(-1)
            out[b, ..., s] = (weights @ v[:, s]).reshape(*sides, width)
    return project(out, mixer.proj_out)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize(("sides", "stride"), [((11,), 1), ((12,), 2), ((6, 7), 1), ((8, 9), 2), ((4, 3, 5), 1)])
def test_deformable_attention_equals_the_steps_written_out(plus, sides, stride):
    ndim = len(sides)
    mixer = DeformableAttention(ndim, 16, 4, 2, (5,) * ndim, 3, stride, None if plus else 2.0)
    mixer = fill(mixer)
    with torch.no_grad():
        mixer.conv_offset[3].weight.mul_(10)
        mixer.table.mul_(10)
    x, weight = torch.randn(2, *sides, 16, requires_grad=True), torch.randn(2, *sides, 16)
    got, want = mixer(x), plain_deformable(mixer, x, stride, plus)
    assert error(got, want) <= 1e-5
    wanted = [x, *mixer.parameters()]
    grads = [torch.autograd.grad((y * weight).sum(), wanted) for y in (got, want)]
    assert max(error(a, b) for a, b in zip(*grads, strict=True) if b.norm() > 1e-4) <= 1e-4


def test_the_two_generations_hold_different_places():
    mixer = fill(DeformableAttention(2, 8, 2, 2, (7, 7)))
    offsets = torch.zeros(1, 3, 4, 2)
    places, less = mixer.places(offsets)
    assert less == 0 and torch.allclose(places[0, 0], torch.tensor([2 * 0.5 / 3 - 1, 2 * 0.5 / 4 - 1]))
    far, _ = mixer.places(offsets + 100)  # bounded: two half cells, and free to leave the map
    assert torch.allclose(far - places, torch.tensor([2 / 3, 2 / 4]).expand_as(far)) and far.max() > 1
    mixer.offset_range = None
    places, less = mixer.places(offsets)
    assert less == 1 and torch.allclose(places[0, 0], torch.tensor([2 * 0.5 / 2 - 1, 2 * 0.5 / 3 - 1]))
    assert torch.equal(places[0, -1], torch.ones(2))  # 2 * 2.5 / 2 - 1 is beyond the map, and held
    assert torch.equal(mixer.places(offsets - 100)[0], -torch.ones(1, 12, 2))


def test_all_groups_share_the_weights_of_their_offsets():
    mixer = fill(DeformableAttention(2, 8, 4, 4, (5, 5)))
    assert mixer.conv_offset[0].weight.shape == (2, 1, 3, 3) and mixer.conv_offset[3].weight.shape == (2, 2, 1, 1)
    assert mixer.conv_offset[3].bias is None


def test_a_map_of_one_cell_is_finite():
    for offset_range in (2.0, None):
        mixer = fill(DeformableAttention(2, 8, 2, 2, (7, 7), 9, 8, offset_range))
        for sides in ((1, 1), (1, 6), (8, 8)):
            assert mixer(torch.randn(1, *sides, 8)).isfinite().all()


@pytest.mark.parametrize("plus", [False, True])
def test_a_line_is_a_plane_of_height_one(plus):
    bound = None if plus else 2.0
    line, plane = (fill(DeformableAttention(n, 8, 2, 2, (5,) * n, 3, 1, bound)) for n in (1, 2))
    state = line.state_dict()
    for name, tensor in state.items():
        if tensor.ndim == 3:
            state[name] = tensor.unsqueeze(2)
    state["table"] = torch.cat([torch.zeros(2, 4, 9), line.table[:, None], torch.zeros(2, 4, 9)], 1)
    state["conv_offset.0.weight"] = F.pad(line.conv_offset[0].weight.unsqueeze(2), (0, 0, 1, 1))
    last = line.conv_offset[3].weight.unsqueeze(2)
    state["conv_offset.3.weight"] = torch.cat([torch.zeros_like(last), last])
    plane.load_state_dict(state)
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        if plus:  # on an axis of one cell the only place is its end, which for the table is half a map away
            plane.table.copy_(line.table[:, None].expand(2, 9, 9))
        assert error(plane(x[:, None])[:, 0], line(x)) <= 1e-5


def plain_neighborhood(mixer, x):
    """Cell by cell, windows moved to stay inside of the map; a small map is filled with zeros first."""
    kernel, sides = mixer.kernel, x.shape[1:-1]
    for axis, side in enumerate(sides, start=1):
        if side < kernel:
            more = torch.zeros(*x.shape[:axis], kernel - side, *x.shape[axis + 1 :])
            x = torch.cat([x, more], axis)
    full, heads, width = x.shape[1:-1], mixer.heads, x.shape[-1] // mixer.heads
    q, k, v = mixer.qkv(x).unflatten(-1, (3, heads, width)).unbind(-3)
    out = torch.zeros_like(q)
    for cell in itertools.product(*(range(s) for s in full)):
        first = [min(max(c - kernel // 2, 0), s - kernel) for c, s in zip(cell, full, strict=True)]
        keys = list(itertools.product(*(range(f, f + kernel) for f in first)))
        bias = [mixer.rpb[:, *(y - c + kernel - 1 for y, c in zip(key, cell, strict=True))] for key in keys]
        logits = torch.stack([(q[:, *cell] * k[:, *key]).sum(-1) * width**-0.5 for key in keys], -1)
        weights = (logits + torch.stack(bias, -1)).softmax(-1)
        out[:, *cell] = (weights.unsqueeze(-1) * torch.stack([v[:, *key] for key in keys], 2)).sum(2)
    return mixer.proj(out.flatten(-2))[:, *(slice(0, s) for s in sides)]


@pytest.mark.parametrize(
    ("sides", "kernel"), [((16,), 7), ((4,), 7), ((8, 9), 7), ((5, 7), 7), ((6, 5), 3), ((4, 3, 5), 3)]
)
def test_neighborhood_attention_equals_loops(sides, kernel):
    mixer = fill(NeighborhoodAttention(len(sides), 12, 3, kernel))
    with torch.no_grad():
        mixer.rpb.mul_(10)
    x, weight = torch.randn(2, *sides, 12, requires_grad=True), torch.randn(2, *sides, 12)
    got, want = mixer(x), plain_neighborhood(mixer, x)
    assert error(got, want) <= 1e-5
    grads = [torch.autograd.grad((y * weight).sum(), [x, mixer.rpb]) for y in (got, want)]
    assert max(error(a, b) for a, b in zip(*grads, strict=True)) <= 1e-5


def kinds(model):
    letter = {NeighborhoodAttention: "N", DeformableAttention: "D"}
    named = [[letter.get(type(b.attn), "S" if hasattr(b.attn, "shift") and b.attn.shift[0] else "L") for b in s.blocks]
             for s in model.stages]  # fmt: skip
    return ["".join(stage) for stage in named]


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_published_configurations(name):
    with torch.device("meta"):
        model = vertebra.create_model(name)
    plus, base = "pp" in name, "base" in name
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    deep = 6 if name == "dat_tiny" else 18
    assert kinds(model) == (["ND", "NDND", "ND" * 9, "DD"] if plus else ["LS", "LS", "LD" * (deep // 2), "LD"])
    attention = [b.attn for s in model.stages for b in s.blocks]
    windows = [a for a in attention if isinstance(a, WindowAttention)]
    window = 12 if name == "dat_base_384" else 7
    assert {a.window for a in windows} == (set() if plus else {(window, window)})
    assert {a.shift[0] for a in windows} == (set() if plus else {0, (window + 1) // 2})  # 4 of 7, not 3
    assert {a.kernel for a in attention if isinstance(a, NeighborhoodAttention)} == ({7} if plus else set())
    groups = (1, 1, 4, 8) if base else (1, 1, 3, 6)
    if plus:
        groups = {"dat_pp_tiny": (1, 2, 4, 8), "dat_pp_small": (1, 2, 3, 6)}.get(name, (2, 4, 8, 16))
    cells = 96 if "384" in name else 56
    for i, stage in enumerate(model.stages):
        for attn in (b.attn for b in stage.blocks if isinstance(b.attn, DeformableAttention)):
            offset, bound = attn.conv_offset[0], None if plus else 2
            assert (attn.groups, attn.offset_range) == (groups[i], bound)
            assert attn.table.shape[1:] == (2 * (cells >> i) - 1,) * 2 and offset.kernel == ((9, 7, 5, 3)[i],) * 2
            assert offset.stride == ((8, 4, 2, 1)[i] if plus else 1,) * 2


def test_windows_larger_than_the_map_ignore_the_padding():
    attn = small().stages[0].blocks[0].attn
    x = torch.randn(1, 3, 5, 8)
    with torch.no_grad():
        q, k, v = attn.qkv(x.flatten(1, 2)).reshape(1, 15, 3, 2, 4).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) * 4**-0.5
        cells = list(itertools.product(range(3), range(5)))
        for (i, a), (j, b) in itertools.product(enumerate(cells), enumerate(cells)):
            logits[:, :, i, j] += attn.pos.table[(a[0] - b[0] + 6) * 13 + a[1] - b[1] + 6]
        want = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).reshape(x.shape)
        assert error(attn(x), want) <= 1e-5


def test_a_ragged_end_is_cut_off_by_patches_and_kept_by_convolutions():
    x = torch.randn(1, 3, 67, 99)
    model, plus = small(), small("dat_pp_tiny")
    with torch.no_grad():
        assert error(model(x), model(x[:, :, :64, :96])) == 0
        assert error(plus(x), plus(x[:, :, :64, :96])) > 1e-4
        assert plus.forward_intermediates(x, 1)[0].shape[2:] == (3, 4)
    assert model.stages[1].down.proj.bias is None and plus.stages[1].down.proj.bias is None


def test_a_block_of_the_second_generation_has_convolutions_before_it_and_in_its_mlp():
    block = small("dat_pp_tiny").stages[0].blocks[0]
    x = torch.randn(1, 9, 8, 8)

    def depthwise(t, conv):
        return F.conv2d(t.movedim(-1, 1), conv.weight, conv.bias, padding=1, groups=t.shape[-1]).movedim(1, -1)

    with torch.no_grad():
        y = x + depthwise(x, block.position.conv)
        y = y + block.attn(block.norm1(y))
        hidden = block.norm2(y) @ block.mlp.fc1.weight.flatten(1).t() + block.mlp.fc1.bias
        hidden = F.gelu(hidden + depthwise(hidden, block.mlp.middle.conv))
        y = y + hidden @ block.mlp.fc2.weight.flatten(1).t() + block.mlp.fc2.bias
        assert error(block(x), y) <= 1e-5


@pytest.mark.parametrize("name", ["dat_tiny", "dat_pp_tiny"])
def test_the_dense_version_norms_each_output_and_feeds_on_the_raw_map(name):
    model, dense = small(name), small(name, features_only=True)
    report = vertebra.load_checkpoint(dense, vertebra.to_official(model))
    assert sorted(report.fresh) == sorted(f"norms.{i}.norm.{leaf}" for i in range(4) for leaf in ("weight", "bias"))
    x = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        raw = model.forward_intermediates(x)
        for got, want, norm in zip(dense(x), raw, dense.output_norms, strict=True):
            assert error(got.movedim(1, -1), norm(want.movedim(1, -1))) <= 1e-6


def test_official_names():
    first, second = (set(vertebra.to_official(small(n))) for n in ("dat_tiny", "dat_pp_tiny"))
    both = {"cls_norm.norm.weight", "cls_head.bias", "patch_proj.1.norm.bias", "down_projs.2.0.weight"}
    both |= {"stages.2.attns.1.rpe_table", "stages.2.attns.1.conv_offset.1.norm.weight", "down_projs.0.1.norm.bias"}
    both |= {"stages.0.layer_norms.3.norm.weight", "stages.2.attns.1.conv_offset.3.weight"}
    assert both <= first & second
    assert {"stages.0.attns.1.relative_position_bias_table", "stages.0.attns.1.proj_qkv.bias"} <= first
    assert {"stages.0.attns.0.proj_out.weight", "stages.1.mlps.0.chunk.linear2.bias"} <= first
    assert {"stages.0.attns.0.rpb", "stages.0.attns.0.qkv.bias", "stages.0.attns.0.proj.weight"} <= second
    assert {"stages.0.mlps.0.linear1.0.weight", "stages.0.mlps.0.dwc.bias", "patch_proj.4.norm.bias"} <= second
    assert {"stages.3.local_perception_units.0.weight", "patch_proj.3.weight"} <= second


def test_tables_of_another_size_are_resampled_and_constants_left_out():
    model, wide = small(img_size=128), small(img_size=256, window=9)
    state = vertebra.to_official(model)
    state["stages.0.attns.0.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    state["stages.0.attns.1.attn_mask"] = torch.zeros(64, 49, 49)
    report = vertebra.load_checkpoint(wide, {"model": state})
    assert len(report.adapted) == 6 and not report.missing and not report.unexpected
    old, new = (m.stages[2].blocks[1].attn.table.detach() for m in (model, wide))
    assert old.shape == (3, 15, 15) and new.shape == (3, 31, 31)
    assert error(new, F.interpolate(old[None], size=(31, 31), mode="bicubic", align_corners=False)[0]) <= 1e-6


def test_tables_are_exempt_from_weight_decay():
    leaves = {n.rsplit(".attn.")[1] for n in small().no_weight_decay() | small("dat_pp_tiny").no_weight_decay()}
    assert leaves == {"pos.table", "table", "rpb"}


def test_impossible_options_are_errors():
    with pytest.raises(ValueError, match="spec"):
        small(spec=("LS", "LS", "LX", "LD"))
    with pytest.raises(ValueError, match="4 stages"):
        small(spec=("LS", "LS", "LD"))
    with pytest.raises(ValueError, match="3 heads do not divide into 2 groups"):
        small(groups=(1, 1, 2, 1))
    with pytest.raises(ValueError, match="odd"):
        NeighborhoodAttention(2, 8, 2, kernel=4)
