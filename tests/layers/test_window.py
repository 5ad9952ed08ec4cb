"""Windows as index tables against loops over cells."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.layers import windows
from vertebra.layers.frugal import repeat

torch.set_num_threads(1)


def naive(sides, size, interval, shift, lead):
    """For each window, row-major in (group, phase) per axis: its cells, None where padded, and their regions."""
    ndim = len(sides)
    padded = [-(-(s + b) // (w * i)) * w * i for s, w, i, b in zip(sides, size, interval, lead)]
    found = []
    per_axis = [
        [[g * w * i + phase + t * i for t in range(w)] for g in range(p // (w * i)) for phase in range(i)]
        for p, w, i in zip(padded, size, interval)
    ]
    for window in itertools.product(*per_axis):
        cells = []
        for rolled in itertools.product(*window):
            source = [(r + s) % p - b for r, s, p, b in zip(rolled, shift, padded, lead)]
            inside = all(0 <= source[d] < sides[d] for d in range(ndim))
            region = tuple(  # Swin's slices of the rolled map: up to -w, from -w to -s, from -s
                0 if r < p - w else (1 if r < p - s else 2) for r, p, w, s in zip(rolled, padded, size, shift)
            )
            cells.append((tuple(source) if inside else None, region))
        found.append(cells)
    return found


def check(sides, size, interval=None, shift=None, lead=None, mask_keys=False):
    ndim = len(sides)
    plan = windows(sides, size, interval, shift, lead, mask_keys)
    reference = naive(sides, size, interval or (1,) * ndim, shift or (0,) * ndim, lead or (0,) * ndim)
    assert (plan.number, plan.length) == (len(reference), math.prod(size))
    numbers = torch.arange(1, 2 * math.prod(sides) * 2 + 1, dtype=torch.float64)
    x = numbers.reshape(2, *sides, 2).requires_grad_()
    y = plan.split(x)
    want = torch.zeros(2, plan.number, plan.length, 2, dtype=torch.float64)
    for w, cells in enumerate(reference):
        for t, (cell, _) in enumerate(cells):
            if cell is not None:
                want[:, w, t] = x.detach()[:, *cell]
    assert torch.equal(y, want.flatten(0, 1))
    back = plan.join(y, sides)
    assert torch.equal(back, x)
    (gradient,) = torch.autograd.grad((y * y.detach()).sum(), x)
    assert torch.equal(gradient, x)  # every cell is read exactly once

    padding = any(cell is None for cells in reference for cell, _ in cells)
    assert (plan.valid is not None) == padding
    mask = torch.zeros(plan.number, plan.length, plan.length)
    for w, cells in enumerate(reference):
        for (q, (_, a)), (k, (cell, b)) in itertools.product(enumerate(cells), enumerate(cells)):
            if shift and any(shift) and a != b:
                mask[w, q, k] -= 100.0
            if mask_keys and cell is None:
                mask[w, q, k] -= 1e4
    if (shift and any(shift)) or (mask_keys and padding):
        assert torch.equal(plan.mask, mask)
    else:
        assert plan.mask is None
    return plan


@pytest.mark.parametrize("ndim", (1, 2, 3))
@pytest.mark.parametrize("mask_keys", (False, True))
@pytest.mark.parametrize("extra", (0, 1))
def test_every_kind_of_window(ndim, mask_keys, extra):
    sides = tuple(s + extra for s in (8, 4, 12)[:ndim])
    size = (4, 2, 3)[:ndim]
    check(sides, size, mask_keys=mask_keys)
    check(sides, size, shift=(2, 1, 1)[:ndim], mask_keys=mask_keys)
    check(sides, size, interval=(2, 2, 2)[:ndim], mask_keys=mask_keys)
    check(sides, size, lead=(2, 1, 2)[:ndim], mask_keys=mask_keys)


def test_shift_of_one_axis_only():
    check((8, 8), (4, 4), shift=(2, 0))
    check((8, 9), (4, 4), shift=(0, 2), mask_keys=True)


axis = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(st.lists(axis, min_size=1, max_size=3), st.sampled_from(["plain", "interval", "shift", "lead"]), st.booleans())
def test_any_size(axes, kind, mask_keys):
    axes = axes if len(axes) < 3 else [(min(a[0], 6), min(a[1], 3), min(a[2], 2), *a[3:]) for a in axes]
    sides, size, interval, shift, lead = zip(*axes)
    shift = tuple(min(s, w - 1) for s, w in zip(shift, size))
    lead = tuple(min(b, w - 1) for b, w in zip(lead, size))
    options = {"interval": interval, "shift": shift, "lead": lead}
    check(sides, size, mask_keys=mask_keys, **{k: v for k, v in options.items() if k == kind})


def test_swin_mask_of_the_official_code():
    """Swin's own lines: slices of a 12 x 12 map, windows of 4, shift 2."""
    image = torch.zeros(12, 12)
    parts = (slice(0, -4), slice(-4, -2), slice(-2, None))
    for count, (h, w) in enumerate(itertools.product(parts, parts)):
        image[h, w] = count
    names = image.reshape(3, 4, 3, 4).transpose(1, 2).reshape(9, 16)
    different = names[:, None] - names[:, :, None]
    want = different.masked_fill(different != 0, -100.0)
    assert torch.equal(windows((12, 12), (4, 4), shift=(2, 2)).mask, want)


def test_bias_joins_the_mask_in_the_order_of_the_windows():
    plan = windows((6, 5), (4, 4), shift=(2, 2), mask_keys=True)
    bias = torch.randn(3, 16, 16, dtype=torch.float64)
    both = repeat(plan.bias(bias, 2), 2 * plan.number)
    assert both.shape == (2 * plan.number, 3, 16, 16)
    for b, w, h in itertools.product(range(2), range(plan.number), range(3)):
        assert torch.equal(both[b * plan.number + w, h], bias[h] + plan.mask[w].double())
    alone = repeat(plan.bias(None, 2), 2 * plan.number)
    assert torch.equal(alone, plan.mask.repeat(2, 1, 1)[:, None])
    bare = windows((8, 4), (4, 4))
    assert bare.bias(None, 2) is None
    assert torch.equal(bare.bias(bias, 2), bias[None])


def test_tables_are_built_once_per_size():
    assert windows((8, 8), (4, 4)).there is windows((8, 8), (4, 4)).there
